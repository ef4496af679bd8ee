package android.graphics;

import android.content.ContentResolver;
import android.net.Uri;
import java.io.IOException;

/** A declaration of what the example uses of Android's; it does nothing. */
public class ImageDecoder {
    public static final int ALLOCATOR_SOFTWARE = 1;

    /** As Android's. */
    public static class Source {
    }

    /** As Android's. */
    public static class ImageInfo {
    }

    /** As Android's. */
    public interface OnHeaderDecodedListener {
        void onHeaderDecoded(ImageDecoder decoder, ImageInfo info, Source source);
    }

    public static Source createSource(ContentResolver resolver, Uri uri) {
        return null;
    }

    public static Bitmap decodeBitmap(Source source, OnHeaderDecodedListener listener) throws IOException {
        return null;
    }

    public int getAllocator() {
        return 0;
    }

    public void setAllocator(int allocator) {
    }
}
