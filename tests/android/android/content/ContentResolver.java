package android.content;

/** A declaration of what the example uses of Android's; it does nothing. */
public class ContentResolver {
}
