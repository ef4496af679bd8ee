package android.os;

/** A declaration of what the example uses of Android's; it does nothing. */
public class Bundle {
}
