/*
 * Calls the library edgekit_tiny with random pictures, each in memory that ends where it ends, and with wrong arguments.
 *
 *     sanitized SEED ROUNDS
 *
 * Prints how many calls were right and how many refused. Ends with 1 where a picture in place differs from one beside it,
 * bytes outside of a picture changed, or a wrong argument was taken; a sanitizer ends it for anything else.
 */
#include "edgekit_tiny.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static uint64_t state;

static size_t below(size_t limit)
{
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (size_t)(state >> 33) % limit;
}

static void expect(int right, const char *what)
{
    if (!right) {
        fprintf(stderr, "%s\n", what);
        exit(1);
    }
}

struct image {
    size_t width, height, stride, bytes;
    int format, is_float;
    char *memory;
};

/* Returns an image of random values whose memory ends with its last pixel. */
static struct image make(size_t width, size_t height, int format, int is_float)
{
    size_t sample = is_float ? 4 : 1, row = width * (size_t)format * sample;
    struct image image = {width, height, row + below(9) * sample, 0, format, is_float, NULL};
    image.bytes = image.stride * (height - 1) + row;
    image.memory = malloc(image.bytes);
    for (size_t i = 0; i < image.bytes / 4 * 4 && is_float; i += 4) {
        float value = (float)below(1000) / 900.0f - 0.05f;
        memcpy(image.memory + i, &value, sizeof value);
    }
    for (size_t i = 0; i < image.bytes && !is_float; ++i)
        image.memory[i] = (char)below(256);
    return image;
}

static int denoise(edgekit_tiny *denoiser, const struct image *from, struct image *to)
{
    if (from->is_float)
        return edgekit_tiny_denoise_f32(denoiser, (float *)from->memory, from->stride, (float *)to->memory, to->stride,
                                        from->width, from->height, from->format, 25.0f);
    return edgekit_tiny_denoise_u8(denoiser, (uint8_t *)from->memory, from->stride, (uint8_t *)to->memory, to->stride,
                                   from->width, from->height, from->format, 25.0f);
}

static void backwards(void *context, int count, void (*task)(void *, int), void *job)
{
    (void)context;
    while (count--)
        task(job, count);
}

/* The tasks of an executor that breaks its word: it returns while they are at work, or before they begin. */
struct crowd {
    size_t count;
    pthread_t threads[512];
    struct call {
        void (*task)(void *, int);
        void *job;
        int index;
    } calls[512];
};

static void *call(void *argument)
{
    const struct call *call = argument;
    call->task(call->job, call->index);
    return NULL;
}

static void hasty(void *context, int count, void (*task)(void *, int), void *job)
{
    struct crowd *crowd = context;
    for (int i = 0; i < count; ++i, ++crowd->count) {
        expect(crowd->count < 512, "too many tasks");
        crowd->calls[crowd->count] = (struct call){task, job, i};
        expect(!pthread_create(&crowd->threads[crowd->count], NULL, call, &crowd->calls[crowd->count]), "no thread");
    }
}

static edgekit_tiny *create(const struct image *largest, void **memory)
{
    edgekit_tiny *denoiser;
    edgekit_tiny_options options = {.threads = (int)below(5)};
    if (below(2))
        options.executor = backwards;
    *memory = NULL;
    if (below(2)) {
        size_t bytes = (size_t)largest->format * (largest->is_float ? 4 : 1);
        options.memory_size = edgekit_tiny_workspace_size(options.threads, largest->width, largest->height, bytes);
        options.memory = *memory = aligned_alloc(EDGEKIT_TINY_WORKSPACE_ALIGNMENT, (options.memory_size + 63) / 64 * 64);
    }
    expect(!edgekit_tiny_create(&denoiser, &options), "create failed");
    return denoiser;
}

static void good_picture(void)
{
    const int formats[] = {EDGEKIT_TINY_GRAY, EDGEKIT_TINY_RGB, EDGEKIT_TINY_RGBA};
    size_t width = 1 + below(below(4) ? 150 : 6), height = 1 + below(below(4) ? 110 : 6);
    struct image noisy = make(width, height, formats[below(3)], (int)below(2));
    struct image denoised = make(width, height, noisy.format, noisy.is_float);
    size_t row = width * (size_t)noisy.format * (noisy.is_float ? 4 : 1);
    char *before = malloc(denoised.bytes), *given = malloc(noisy.bytes);
    memcpy(before, denoised.memory, denoised.bytes);
    memcpy(given, noisy.memory, noisy.bytes);

    void *memory;
    edgekit_tiny *denoiser = create(&noisy, &memory);
    expect(!denoise(denoiser, &noisy, &denoised), edgekit_tiny_last_error(denoiser));
    expect(!memcmp(given, noisy.memory, noisy.bytes), "the noisy picture changed");
    expect(!denoise(denoiser, &noisy, &noisy), edgekit_tiny_last_error(denoiser));
    edgekit_tiny_destroy(denoiser);
    for (size_t y = 0; y < height; ++y) {
        const char *in_place = noisy.memory + y * noisy.stride, *beside = denoised.memory + y * denoised.stride;
        expect(!memcmp(in_place, beside, row), "in place differs from beside");
        if (y + 1 < height) {
            expect(!memcmp(in_place + row, given + y * noisy.stride + row, noisy.stride - row), "in place wrote outside");
            expect(!memcmp(beside + row, before + y * denoised.stride + row, denoised.stride - row), "wrote outside");
        }
    }
    free(memory);
    free(before);
    free(given);
    free(noisy.memory);
    free(denoised.memory);
}

/* Pictures that are gone as soon as the library has given them back, one in place, whatever the executor left running. */
static void hurried_pictures(void)
{
    static struct crowd crowd;
    edgekit_tiny *denoiser;
    edgekit_tiny_options options = {.threads = 4, .executor = hasty, .executor_context = &crowd};
    crowd.count = 0;
    expect(!edgekit_tiny_create(&denoiser, &options), "create failed");
    for (int i = 0; i < 4; ++i) {
        struct image noisy = make(1 + below(150), 1 + below(110), EDGEKIT_TINY_RGB, 0);
        struct image denoised = make(noisy.width, noisy.height, EDGEKIT_TINY_RGB, 0);
        int code = denoise(denoiser, &noisy, i == 3 ? &noisy : &denoised);
        expect(code == EDGEKIT_TINY_OK || code == EDGEKIT_TINY_EXECUTOR_FAILED, edgekit_tiny_last_error(denoiser));
        free(noisy.memory);
        free(denoised.memory);
    }
    while (crowd.count)
        pthread_join(crowd.threads[--crowd.count], NULL);
    edgekit_tiny_destroy(denoiser);
}

static size_t odd_size(size_t good)
{
    const size_t most = (size_t)1 << 24;
    const size_t odd[] = {0, 1, good - 1, good + 1, most, most + 1, SIZE_MAX / 2, SIZE_MAX - 63, SIZE_MAX};
    return below(3) ? good : odd[below(sizeof odd / sizeof *odd)];
}

/* Returns whether the library refused; it must not touch what lies outside of the two pictures. */
static int doubtful_picture(void)
{
    struct image noisy = make(1 + below(60), 1 + below(60), EDGEKIT_TINY_GRAY, 0);
    struct image denoised = make(noisy.width, noisy.height, EDGEKIT_TINY_GRAY, 0);
    const float sigmas[] = {25.0f, 0.0f, -1.0f, 1e30f, 0.0f / (float)(below(1) + 0.0f), 1e38f * 1e10f};
    void *memory;
    edgekit_tiny *denoiser = create(&noisy, &memory);
    struct image asked = noisy;
    int format = below(3) ? EDGEKIT_TINY_GRAY : (int)below(7) - 1;
    size_t to_stride = odd_size(denoised.stride);
    asked.stride = odd_size(noisy.stride), asked.width = odd_size(noisy.width), asked.height = odd_size(noisy.height);
    char *from = below(9) ? noisy.memory : NULL, *to = below(9) ? denoised.memory : NULL;

    /* Whatever would read or write more than there is must be refused by the test itself: the library cannot know. */
    size_t samples = format == 1 || format == 3 || format == 4 ? (size_t)format : 1, most = (size_t)1 << 24;
    int small = asked.width <= most && asked.height <= most && asked.height && asked.width;
    size_t row = asked.width * samples, bytes = 0, to_bytes = 0;
    if (small && asked.stride >= row && to_stride >= row &&
        !__builtin_mul_overflow(asked.stride, asked.height - 1, &bytes) && !__builtin_add_overflow(bytes, row, &bytes) &&
        !__builtin_mul_overflow(to_stride, asked.height - 1, &to_bytes) && !__builtin_add_overflow(to_bytes, row, &to_bytes) &&
        bytes <= PTRDIFF_MAX / 4 && to_bytes <= PTRDIFF_MAX / 4 && (bytes > noisy.bytes || to_bytes > denoised.bytes))
        to = NULL;
    int code = edgekit_tiny_denoise_u8(denoiser, (uint8_t *)from, asked.stride, (uint8_t *)to, to_stride, asked.width,
                                       asked.height, format, sigmas[below(sizeof sigmas / sizeof *sigmas)]);
    expect(!code == !strcmp(edgekit_tiny_last_error(denoiser), "no error"), "the text does not fit the code");
    edgekit_tiny_destroy(denoiser);
    free(memory);
    free(noisy.memory);
    free(denoised.memory);
    return code != 0;
}

int main(int count, char **arguments)
{
    if (count != 3)
        return 2;
    state = strtoull(arguments[1], NULL, 10);
    int rounds = atoi(arguments[2]), refused = 0;
    for (int i = 0; i < rounds; ++i) {
        good_picture();
        hurried_pictures();
        for (int j = 0; j < 5; ++j)
            refused += doubtful_picture();
    }
    printf("%d right, %d refused\n", rounds + 5 * rounds - refused, refused);
    return 0;
}
