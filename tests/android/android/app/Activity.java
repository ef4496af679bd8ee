package android.app;

import android.content.ContentResolver;
import android.content.Context;
import android.content.Intent;
import android.os.Bundle;
import android.widget.ImageView;

/** A declaration of what the example uses of Android's; it does nothing. */
public class Activity extends Context {
    public Activity() {
        super(null);
    }

    protected void onCreate(Bundle savedInstanceState) {
    }

    public void setContentView(ImageView view) {
    }

    public Intent getIntent() {
        return null;
    }

    public ContentResolver getContentResolver() {
        return null;
    }

    public void finish() {
    }

    public final void runOnUiThread(Runnable action) {
    }
}
