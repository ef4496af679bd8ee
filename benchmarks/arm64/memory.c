/*
 * Says how much memory a library takes beyond a picture: what it asks malloc for, counted; see arm64.py beside this folder.
 *
 *     memory LIBRARY SYMBOL_PREFIX SIDE THREADS IN_PLACE
 *
 * A picture of SIDE x SIDE bytes is denoised by THREADS threads, in place unless IN_PLACE is 0. Under an emulator what the
 * kernel knows of the process is the emulator's, so malloc, free and pthread_create, which the library gets from bench.c
 * (edgekit/backends/tvm/c), are counted instead. stdout: one JSON object.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stddef.h>
#include <stdlib.h>

enum { HEADER = 64 };
static size_t held, most;
static unsigned started;

static void *counted_malloc(size_t size)
{
    char *block = malloc(size + HEADER);
    if (!block)
        return NULL;
    *(size_t *)block = size;
    size_t now = __atomic_add_fetch(&held, size, __ATOMIC_SEQ_CST), before = __atomic_load_n(&most, __ATOMIC_SEQ_CST);
    while (now > before && !__atomic_compare_exchange_n(&most, &before, now, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST))
        ;
    return block + HEADER;
}

static void counted_free(void *pointer)
{
    if (!pointer)
        return;
    char *block = (char *)pointer - HEADER;
    __atomic_sub_fetch(&held, *(size_t *)block, __ATOMIC_SEQ_CST);
    free(block);
}

static int counted_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*start)(void *), void *argument)
{
    __atomic_add_fetch(&started, 1, __ATOMIC_SEQ_CST);
    return pthread_create(thread, attributes, start, argument);
}

#define malloc counted_malloc
#define free counted_free
#define pthread_create counted_create
#define main measure_time
#include "bench.c"
#undef main

int main(int count, char **arguments)
{
    if (count != 6)
        leave(2, "usage", "memory LIBRARY SYMBOL_PREFIX SIDE THREADS IN_PLACE");
    size_t side = (size_t)number(arguments[3], "SIDE", 10), bytes = side * side;
    int threads = (int)number(arguments[4], "THREADS", 10), in_place = (int)number(arguments[5], "IN_PLACE", 10);
    hwcap_mask = ~0ul;
    struct denoiser opened = open_denoiser(arguments[1], arguments[2], 25.0f / 255);
    struct photograph made = open_photograph(&opened, side, 1, threads);
    uint32_t state = 1;
    for (size_t i = 0; i < bytes; ++i)
        made.noisy[i] = (uint8_t)((state = 1664525 * state + 1013904223) >> 24);
    if (in_place)
        made.denoised = made.noisy;
    denoise_photograph(&made);
    uint64_t hash = 14695981039346656037u;
    for (size_t i = 0; i < bytes; ++i)
        hash = (hash ^ made.denoised[i]) * 1099511628211u;
    printf("{\"beyond_bytes\": %zu, \"threads_started\": %u, \"hash\": \"%016llx\"}\n", most - 2 * bytes, started,
           (unsigned long long)hash);
    return 0;
}
