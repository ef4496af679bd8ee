package android.content;

import android.net.Uri;
import java.io.InputStream;

/** A declaration of what the example uses of Android's; it does nothing. */
public class ContentResolver {
    public InputStream openInputStream(Uri uri) {
        return null;
    }
}
