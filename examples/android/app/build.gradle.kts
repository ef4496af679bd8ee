plugins {
    id("com.android.application")
    id("org.jetbrains.kotlin.android")
}

android {
    namespace = "edgekit.example"
    compileSdk = 35

    defaultConfig {
        applicationId = "edgekit.example"
        minSdk = 28  // of ImageDecoder; the library itself asks for 24
        targetSdk = 35
        versionCode = 1
        versionName = "1.0"
        // The bundle's library is for these phones only.
        ndk { abiFilters += "arm64-v8a" }
    }

    compileOptions {
        sourceCompatibility = JavaVersion.VERSION_17
        targetCompatibility = JavaVersion.VERSION_17
    }
    kotlinOptions { jvmTarget = "17" }
}
