package edgekit.example

import android.app.Activity
import android.content.Intent
import android.graphics.Bitmap
import android.graphics.ImageDecoder
import android.net.Uri
import android.os.Bundle
import android.widget.ImageView
import edgekit_base_color.Denoiser
import java.io.IOException
import kotlin.concurrent.thread

/** Shows a picture that was shared with the app, first as it is, then without its noise. */
class DenoiseActivity : Activity() {
    override fun onCreate(savedInstanceState: Bundle?) {
        super.onCreate(savedInstanceState)
        val view = ImageView(this)
        setContentView(view)
        val uri = intent.getParcelableExtra<Uri>(Intent.EXTRA_STREAM) ?: return finish()
        thread {
            val noisy = read(uri)
            if (noisy == null) {
                runOnUiThread { finish() }
                return@thread
            }
            runOnUiThread { view.setImageBitmap(noisy) }
            val clean = Denoiser(this).use { it.denoise(noisy, sigma255 = 25f) }
            runOnUiThread { view.setImageBitmap(clean) }
        }
    }

    /** Returns a picture, turned as its EXIF orientation says; null where it is none, or may not be read any more. */
    private fun read(uri: Uri): Bitmap? = try {
        ImageDecoder.decodeBitmap(ImageDecoder.createSource(contentResolver, uri)) { decoder, _, _ ->
            // A bitmap in the GPU's memory has no pixels to give.
            decoder.allocator = ImageDecoder.ALLOCATOR_SOFTWARE
        }
    } catch (error: IOException) {
        null
    } catch (error: SecurityException) {
        null
    }
}
