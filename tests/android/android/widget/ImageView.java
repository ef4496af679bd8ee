package android.widget;

import android.content.Context;
import android.graphics.Bitmap;

/** A declaration of what the example uses of Android's; it does nothing. */
public class ImageView {
    public ImageView(Context context) {
    }

    public void setImageBitmap(Bitmap bitmap) {
    }
}
