package android.content;

/** A declaration of what the example uses of Android's; it does nothing. */
public class Intent {
    public static final String EXTRA_STREAM = "android.intent.extra.STREAM";

    public <T> T getParcelableExtra(String name) {
        return null;
    }
}
