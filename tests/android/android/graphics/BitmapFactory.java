package android.graphics;

import java.io.InputStream;

/** A declaration of what the example uses of Android's; it does nothing. */
public class BitmapFactory {
    public static Bitmap decodeStream(InputStream from) {
        return null;
    }
}
