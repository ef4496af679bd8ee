package android.graphics;

import java.nio.Buffer;
import java.nio.ByteBuffer;

/** A stand-in with what edgekit's classes use of Android's: pixels of four bytes, rows with a gap behind them. */
public class Bitmap {
    public enum Config { ARGB_8888, RGB_565 }

    private static final int GAP = 12;
    private final int width;
    private final int height;
    private final boolean mutable;
    private final byte[] pixels;

    public Bitmap(int width, int height, boolean mutable) {
        this.width = width;
        this.height = height;
        this.mutable = mutable;
        pixels = new byte[getRowBytes() * height];
    }

    public int getWidth() {
        return width;
    }

    public int getHeight() {
        return height;
    }

    public int getRowBytes() {
        return 4 * width + GAP;
    }

    public byte[] bytes() {
        return pixels;
    }

    public Bitmap copy(Config config, boolean isMutable) {
        Bitmap made = new Bitmap(width, height, isMutable);
        System.arraycopy(pixels, 0, made.pixels, 0, pixels.length);
        return made;
    }

    public void copyPixelsToBuffer(Buffer to) {
        ((ByteBuffer) to).put(pixels);
    }

    public void copyPixelsFromBuffer(Buffer from) {
        if (!mutable) {
            throw new IllegalStateException("the bitmap is immutable");
        }
        ((ByteBuffer) from).get(pixels);
    }
}
