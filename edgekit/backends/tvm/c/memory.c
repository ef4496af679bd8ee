/*
 * The functions that a compiler may call in freestanding code (C11 4p6 and GCC's manual, "Standards").
 * Hidden, so that a library with them neither imports an app's libc nor replaces any of it.
 */
#include <stddef.h>

#define HIDDEN __attribute__((visibility("hidden")))
typedef float vector __attribute__((vector_size(16), aligned(1), may_alias));
typedef unsigned long word __attribute__((aligned(1), may_alias));

HIDDEN void *memcpy(void *restrict to, const void *restrict from, size_t size)
{
    char *out = to;
    const char *in = from;
    for (; size >= 64; size -= 64, in += 64, out += 64) {
        vector a = *(const vector *)in, b = *(const vector *)(in + 16);
        vector c = *(const vector *)(in + 32), d = *(const vector *)(in + 48);
        *(vector *)out = a, *(vector *)(out + 16) = b;
        *(vector *)(out + 32) = c, *(vector *)(out + 48) = d;
    }
    for (; size >= 16; size -= 16, in += 16, out += 16)
        *(vector *)out = *(const vector *)in;
    for (; size; --size)
        *out++ = *in++;
    return to;
}

HIDDEN void *memmove(void *to, const void *from, size_t size)
{
    char *out = to;
    const char *in = from;
    if (out <= in || out >= in + size)
        for (; size; --size)
            *out++ = *in++;
    else
        while (size--)
            out[size] = in[size];
    return to;
}

HIDDEN void *memset(void *to, int value, size_t size)
{
    unsigned char *out = to;
    for (; size >= 8; size -= 8, out += 8)
        *(word *)out = 0x0101010101010101ul * (unsigned char)value;
    for (; size; --size)
        *out++ = (unsigned char)value;
    return to;
}
