package edgekit.example

import android.app.Activity
import android.content.Intent
import android.graphics.BitmapFactory
import android.net.Uri
import android.os.Bundle
import android.widget.ImageView
import edgekit_base.Denoiser
import kotlin.concurrent.thread

/** Shows a picture that was shared with the app, first as it is, then without its noise. */
class DenoiseActivity : Activity() {
    override fun onCreate(savedInstanceState: Bundle?) {
        super.onCreate(savedInstanceState)
        val view = ImageView(this)
        setContentView(view)
        val uri = intent.getParcelableExtra<Uri>(Intent.EXTRA_STREAM) ?: return finish()
        thread {
            val noisy = contentResolver.openInputStream(uri)?.use { BitmapFactory.decodeStream(it) }
            if (noisy == null) {
                runOnUiThread { finish() }
                return@thread
            }
            runOnUiThread { view.setImageBitmap(noisy) }
            val clean = Denoiser(this).use { it.denoise(noisy, sigma255 = 25f) }
            runOnUiThread { view.setImageBitmap(clean) }
        }
    }
}
