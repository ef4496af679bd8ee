package android.content;

/** A stand-in with what edgekit's classes use of Android's. */
public class Context {
    public static final String ACTIVITY_SERVICE = "activity";
    private final Object service;

    public Context(Object service) {
        this.service = service;
    }

    public Object getSystemService(String name) {
        return name.equals(ACTIVITY_SERVICE) ? service : null;
    }
}
