package android.app;

/** A stand-in with what edgekit's classes use of Android's. */
public class ActivityManager {
    private final boolean lowRam;

    public ActivityManager(boolean lowRam) {
        this.lowRam = lowRam;
    }

    public boolean isLowRamDevice() {
        return lowRam;
    }
}
