import android.app.ActivityManager
import android.content.Context
import android.graphics.Bitmap
import edgekit_tiny.ByteDenoiser
import edgekit_tiny.Denoiser
import java.io.File
import java.nio.ByteBuffer

/** What a call ends with: its result, or the name and the message of what it threw. */
fun outcome(call: () -> Any?): String = try {
    call().toString()
} catch (error: RuntimeException) {
    "${error.javaClass.simpleName}: ${error.message}"
}

fun direct(size: Int): ByteBuffer = ByteBuffer.allocateDirect(size)

/** Denoises the picture of a file, RGBA with rows of a stride, through the byte buffers and through a bitmap. */
fun denoise(arguments: List<String>) {
    val (from, beside, inPlace, bitmap) = arguments.take(4).map { File(it) }
    val (width, height) = arguments.drop(4).map { it.toInt() }
    val pixels = from.readBytes()
    val stride = pixels.size / height

    val noisy = direct(pixels.size + 5)
    noisy.position(5)
    noisy.put(pixels)
    noisy.position(5)
    val denoised = direct(pixels.size)
    val got = ByteArray(pixels.size)
    ByteDenoiser(threads = 3).use {
        it.denoise(noisy, stride, denoised, stride, width, height, ByteDenoiser.RGBA, 25f)
        denoised.get(got)
        beside.writeBytes(got)
        it.denoise(noisy, stride, noisy, stride, width, height)
    }
    noisy.get(got)
    inPlace.writeBytes(got)

    val given = Bitmap(width, height, false)
    for (y in 0 until height) {
        System.arraycopy(pixels, y * stride, given.bytes(), y * given.rowBytes, 4 * width)
    }
    val before = given.bytes().clone()
    val clean = Denoiser(Context(ActivityManager(true))).use { it.denoise(given) }
    check(before.contentEquals(given.bytes())) { "the given bitmap changed" }
    bitmap.writeBytes(clean.bytes())
    println(ByteDenoiser.version())
}

/** Prints what wrong calls end with, one a line. */
fun refuse() {
    println(outcome { ByteDenoiser(threads = 0) })
    println(outcome { ByteDenoiser(threads = 65) })
    val closed = ByteDenoiser()
    closed.close()
    closed.close()
    println(outcome { closed.denoise(direct(4), 4, direct(4), 4, 1, 1) })
    ByteDenoiser().use {
        println(outcome { it.denoise(ByteBuffer.allocate(400), 40, direct(400), 40, 10, 10) })
        println(outcome { it.denoise(direct(399), 40, direct(400), 40, 10, 10) })
        println(outcome { it.denoise(direct(400), 40, direct(400).apply { position(1) }, 40, 10, 10) })
        println(outcome { it.denoise(direct(400).apply { limit(399) }, 40, direct(400), 40, 10, 10) })
        println(outcome { it.denoise(direct(400), 40, direct(400).apply { limit(399) }, 40, 10, 10) })
        println(outcome { it.denoise(direct(400), 40, direct(400).asReadOnlyBuffer(), 40, 10, 10) })
        println(outcome { it.denoise(direct(400), 39, direct(400), 40, 10, 10) })
        println(outcome { it.denoise(direct(400), Int.MAX_VALUE, direct(400), 40, 10, 10) })
        println(outcome { it.denoise(direct(400), -40, direct(400), 40, 10, 10) })
        println(outcome { it.denoise(direct(400), 40, direct(400), 40, 0, 10) })
        println(outcome { it.denoise(direct(400), 40, direct(400), 40, 10, Int.MIN_VALUE) })
        println(outcome { it.denoise(direct(400), 40, direct(400), 40, Int.MAX_VALUE, 1) })
        println(outcome { it.denoise(direct(400), 40, direct(400), 40, 10, 10, 2) })
        println(outcome { it.denoise(direct(400), 40, direct(400), 40, 10, 10, 4, Float.NaN) })
        println(outcome { it.denoise(direct(400), 40, direct(400), 40, 10, 10) })
    }
}

fun main(arguments: Array<String>) {
    if (arguments.isEmpty()) refuse() else denoise(arguments.toList())
}
