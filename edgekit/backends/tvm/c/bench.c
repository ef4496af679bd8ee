/*
 * Measures a denoising library on the device that it is for: one static program, nothing else is needed there.
 *
 *     bench LIBRARY SYMBOL_PREFIX CHANNELS TILE_WIDTH TILE_HEIGHT SIGMA NOISY DENOISED WARM_UP RUNS SECONDS SIDE THREADS
 *           HWCAP_MASK
 *
 * The file LIBRARY is mapped, relocated and protected as bionic's loader does it. NOISY holds tiles of floats, planes of
 * rows; each is denoised once, into DENOISED ("-": only the first, and nothing is written). Then the first is denoised
 * WARM_UP times, and RUNS times and until SECONDS have passed, each run timed. Then, unless SIDE is 0, the same with a
 * picture of SIDE x SIDE pixels of bytes, by THREADS threads. HWCAP_MASK (hexadecimal) is laid over what the library
 * learns of the processor, so that a variant for lesser ones can be measured too.
 *
 * stdout: one JSON object, times in nanoseconds. load_ns: from opening the file to the last relocation; first_ns: the
 * first tile after that. Exit codes: 0 measured, 2 wrong arguments or files, 3 the library cannot be loaded, 4 it refused
 * a picture; stderr says why.
 */
#define _GNU_SOURCE
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

/* No system has larger pages. */
enum { LARGEST_PAGE = 65536 };
enum { MOST_CORES = 1024 };

#if defined __aarch64__
enum { RELATIVE = R_AARCH64_RELATIVE, ABSOLUTE = R_AARCH64_ABS64, DATA = R_AARCH64_GLOB_DAT, JUMP = R_AARCH64_JUMP_SLOT };
#elif defined __x86_64__
enum { RELATIVE = R_X86_64_RELATIVE, ABSOLUTE = R_X86_64_64, DATA = R_X86_64_GLOB_DAT, JUMP = R_X86_64_JUMP_SLOT };
#else
#error "no relocations are known for this processor"
#endif

static _Noreturn void leave(int code, const char *what, const char *why)
{
    fprintf(stderr, "%s: %s\n", what, why);
    exit(code);
}

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static unsigned long hwcap_mask;

static unsigned long masked_getauxval(unsigned long type)
{
    unsigned long value = getauxval(type);
    return type == AT_HWCAP ? value & hwcap_mask : value;
}

/* What a library may import. Nothing whose size differs between musl and bionic is ever shared with it. */
static const struct { const char *name; void *address; } PROVIDED[] = {
    {"getauxval", (void *)masked_getauxval},
    {"malloc", (void *)malloc},
    {"free", (void *)free},
    {"memcpy", (void *)memcpy},
    {"memmove", (void *)memmove},
    {"memset", (void *)memset},
    {"pthread_create", (void *)pthread_create},
    {"pthread_join", (void *)pthread_join},
};

struct library {
    const char *path;
    char *base;
    const Elf64_Sym *symbols;
    const char *names;
    const uint32_t *gnu_hash;
};

static int protection_of(const Elf64_Phdr *segment)
{
    return (segment->p_flags & PF_R ? PROT_READ : 0) | (segment->p_flags & PF_W ? PROT_WRITE : 0) |
           (segment->p_flags & PF_X ? PROT_EXEC : 0);
}

static void map_at(const char *path, char *at, size_t size, int protection, int flags, int file, size_t offset)
{
    if (mmap(at, size, protection, MAP_PRIVATE | MAP_FIXED | flags, file, (off_t)offset) == MAP_FAILED)
        leave(3, path, strerror(errno));
}

static void map_segment(const char *path, char *base, int file, const Elf64_Phdr *s, size_t page)
{
    size_t skew = s->p_vaddr % page;
    if (s->p_offset % page != skew)
        leave(3, path, "its segments do not fit the pages of this system");
    char *start = base + s->p_vaddr - skew, *file_end = base + s->p_vaddr + s->p_filesz;
    if (s->p_filesz)
        map_at(path, start, s->p_filesz + skew, protection_of(s), 0, file, s->p_offset - skew);
    if (s->p_memsz == s->p_filesz)
        return;
    size_t tail = -(uintptr_t)file_end % page, zeros = s->p_memsz - s->p_filesz;
    if (s->p_filesz && s->p_flags & PF_W)
        memset(file_end, 0, tail < zeros ? tail : zeros);
    if (zeros > tail)
        map_at(path, file_end + tail, zeros - tail, protection_of(s), MAP_ANONYMOUS, -1, 0);
}

static char *reserve(const char *path, const Elf64_Ehdr *header, const Elf64_Phdr *segments)
{
    size_t end = 0;
    for (int i = 0; i < header->e_phnum; ++i)
        if (segments[i].p_type == PT_LOAD && segments[i].p_vaddr + segments[i].p_memsz > end)
            end = segments[i].p_vaddr + segments[i].p_memsz;
    char *room = mmap(NULL, end + 2 * LARGEST_PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (room == MAP_FAILED)
        leave(3, path, strerror(errno));
    return room + -(uintptr_t)room % LARGEST_PAGE;
}

static uint64_t address_of(const struct library *library, const Elf64_Sym *symbol)
{
    if (symbol->st_shndx != SHN_UNDEF)
        return (uint64_t)library->base + symbol->st_value;
    const char *name = library->names + symbol->st_name;
    for (size_t i = 0; i < sizeof PROVIDED / sizeof *PROVIDED; ++i)
        if (!strcmp(PROVIDED[i].name, name))
            return (uint64_t)PROVIDED[i].address;
    fprintf(stderr, "%s needs the function '%s', ", library->path, name);
    leave(3, library->path, "which is not provided");
}

static void relocate(const struct library *library, const Elf64_Rela *entries, size_t bytes)
{
    for (size_t i = 0; i < bytes / sizeof *entries; ++i) {
        const Elf64_Rela *entry = &entries[i];
        uint64_t value = (uint64_t)entry->r_addend;
        switch (ELF64_R_TYPE(entry->r_info)) {
        case ABSOLUTE:
        case DATA:
        case JUMP:
            value += address_of(library, &library->symbols[ELF64_R_SYM(entry->r_info)]);
            break;
        case RELATIVE:
            value += (uint64_t)library->base;
            break;
        default:
            leave(3, library->path, "a relocation is of an unknown type");
        }
        memcpy(library->base + entry->r_offset, &value, sizeof value);
    }
}

static void link_library(struct library *library, const Elf64_Dyn *dynamic)
{
    const Elf64_Rela *rela = NULL, *jumps = NULL;
    size_t rela_bytes = 0, jump_bytes = 0;
    for (const Elf64_Dyn *d = dynamic; d->d_tag != DT_NULL; ++d) {
        char *at = library->base + d->d_un.d_ptr;
        switch (d->d_tag) {
        case DT_SYMTAB: library->symbols = (const Elf64_Sym *)at; break;
        case DT_STRTAB: library->names = at; break;
        case DT_GNU_HASH: library->gnu_hash = (const uint32_t *)at; break;
        case DT_RELA: rela = (const Elf64_Rela *)at; break;
        case DT_RELASZ: rela_bytes = d->d_un.d_val; break;
        case DT_JMPREL: jumps = (const Elf64_Rela *)at; break;
        case DT_PLTRELSZ: jump_bytes = d->d_un.d_val; break;
        case DT_INIT_ARRAY: leave(3, library->path, "it has constructors");
        }
    }
    if (!library->symbols || !library->names || !library->gnu_hash)
        leave(3, library->path, "it has no symbols");
    relocate(library, rela, rela_bytes);
    relocate(library, jumps, jump_bytes);
}

static struct library load(const char *path)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0)
        leave(3, path, strerror(errno));
    char start[4096] = {0};
    const Elf64_Ehdr *header = (const Elf64_Ehdr *)start;
    if (read(file, start, sizeof start) < (ssize_t)sizeof *header || memcmp(start, ELFMAG, SELFMAG))
        leave(3, path, "it is no library");
    if (header->e_phoff + header->e_phnum * sizeof(Elf64_Phdr) > sizeof start)
        leave(3, path, "the program headers are not in the first 4096 bytes");
    const Elf64_Phdr *segments = (const Elf64_Phdr *)(start + header->e_phoff);

    struct library library = {.path = path, .base = reserve(path, header, segments)};
    const Elf64_Dyn *dynamic = NULL;
    for (int i = 0; i < header->e_phnum; ++i) {
        if (segments[i].p_type == PT_LOAD)
            map_segment(path, library.base, file, &segments[i], page);
        if (segments[i].p_type == PT_DYNAMIC)
            dynamic = (const Elf64_Dyn *)(library.base + segments[i].p_vaddr);
    }
    close(file);
    if (!dynamic)
        leave(3, path, "it is no shared library");
    link_library(&library, dynamic);
    for (int i = 0; i < header->e_phnum; ++i)
        if (segments[i].p_type == PT_GNU_RELRO) {
            size_t skew = segments[i].p_vaddr % page;
            size_t size = (segments[i].p_memsz + skew) / page * page;
            if (size && mprotect(library.base + segments[i].p_vaddr - skew, size, PROT_READ))
                leave(3, path, strerror(errno));
        }
    return library;
}

static void *find(const struct library *library, const char *prefix, const char *suffix)
{
    char name[256];
    snprintf(name, sizeof name, "%s%s", prefix, suffix);
    const uint32_t *table = library->gnu_hash, *buckets = table + 4 + 2 * table[2], *chains = buckets + table[0];
    uint32_t hash = 5381;
    for (const char *c = name; *c; ++c)
        hash = hash * 33 + (unsigned char)*c;
    for (uint32_t i = buckets[hash % table[0]]; i >= table[1]; ++i) {
        if ((chains[i - table[1]] | 1) == (hash | 1) && !strcmp(library->names + library->symbols[i].st_name, name))
            return library->base + library->symbols[i].st_value;
        if (chains[i - table[1]] & 1)
            break;
    }
    fprintf(stderr, "no function '%s' in ", name);
    leave(3, library->path, "it was not made by edgekit");
}

/* ---- The library's functions: all that is to be changed for other ones; see edgekit_<model>.h. ---- */

typedef int tile_function(const float *, float, float *, void *, size_t);
typedef int picture_function(void *, const uint8_t *, size_t, uint8_t *, size_t, size_t, size_t, int, float);

struct options {
    int threads;
    void *executor, *executor_context, *memory;
    size_t memory_size;
};

struct denoiser {
    struct library library;
    const char *prefix;
    tile_function *tile;
    const char *(*error_text)(int);
    const char *version;
    void *workspace;
    size_t workspace_bytes;
    float sigma;
};

static struct denoiser open_denoiser(const char *path, const char *prefix, float sigma)
{
    struct library library = load(path);
    struct denoiser opened = {
        .library = library,
        .prefix = prefix,
        .tile = (tile_function *)find(&library, prefix, "_tile_f32"),
        .error_text = (const char *(*)(int))find(&library, prefix, "_error_text"),
        .version = ((const char *(*)(void))find(&library, prefix, "_version"))(),
        .workspace_bytes = ((size_t(*)(void))find(&library, prefix, "_tile_workspace_size"))(),
        .sigma = sigma,
    };
    if (posix_memalign(&opened.workspace, (size_t)sysconf(_SC_PAGESIZE), opened.workspace_bytes))
        leave(2, path, "no memory for the workspace");
    return opened;
}

static void check(const struct denoiser *opened, int code)
{
    if (code)
        leave(4, opened->library.path, opened->error_text(code));
}

static void denoise(const struct denoiser *opened, const float *noisy, float *denoised)
{
    check(opened, opened->tile(noisy, opened->sigma, denoised, opened->workspace, opened->workspace_bytes));
}

/* A picture of the user's, as an app has it. */
struct photograph {
    const struct denoiser *opened;
    void *maker;
    picture_function *denoise;
    uint8_t *noisy, *denoised;
    size_t side, channels;
};

static struct photograph open_photograph(const struct denoiser *opened, size_t side, size_t channels, int threads)
{
    int (*create)(void **, const struct options *) =
        (int (*)(void **, const struct options *))find(&opened->library, opened->prefix, "_create");
    struct options options = {.threads = threads};
    struct photograph made = {
        .opened = opened,
        .denoise = (picture_function *)find(&opened->library, opened->prefix, "_denoise_u8"),
        .noisy = malloc(side * side * channels),
        .denoised = malloc(side * side * channels),
        .side = side,
        .channels = channels,
    };
    if (!made.noisy || !made.denoised)
        leave(2, opened->library.path, "no memory for the picture");
    check(opened, create(&made.maker, &options));
    return made;
}

static void denoise_photograph(const struct photograph *made)
{
    size_t stride = made->side * made->channels;
    check(made->opened, made->denoise(made->maker, made->noisy, stride, made->denoised, stride, made->side, made->side,
                                      (int)made->channels, 255 * made->opened->sigma));
}

/* ---- */

struct pictures {
    float *noisy, *denoised;
    size_t count;
};

static struct pictures read_pictures(const char *path, size_t bytes, int only_first)
{
    FILE *file = fopen(path, "rb");
    if (!file || fseek(file, 0, SEEK_END))
        leave(2, path, strerror(errno));
    size_t size = (size_t)ftell(file), count = only_first ? 1 : size / bytes;
    if (!bytes || size < bytes || size % bytes)
        leave(2, path, "it does not hold whole pictures");
    struct pictures read = {.noisy = malloc(count * bytes), .denoised = calloc(count, bytes), .count = count};
    if (!read.noisy || !read.denoised)
        leave(2, path, "no memory for the pictures");
    rewind(file);
    if (fread(read.noisy, bytes, count, file) != count)
        leave(2, path, "it cannot be read");
    fclose(file);
    return read;
}

static void write_pictures(const char *path, const struct pictures *pictures, size_t bytes)
{
    FILE *file = fopen(path, "wb");
    if (!file || fwrite(pictures->denoised, bytes, pictures->count, file) != pictures->count || fclose(file))
        leave(2, path, strerror(errno));
}

struct times {
    uint64_t *ns;
    size_t count, room;
    uint32_t by_core[MOST_CORES];
};

static void keep(struct times *times, uint64_t ns)
{
    if (times->count == times->room) {
        times->room = times->room ? 2 * times->room : 1024;
        if (!(times->ns = realloc(times->ns, times->room * sizeof *times->ns)))
            leave(2, "bench", "no memory for the times");
    }
    times->ns[times->count++] = ns;
    int core = sched_getcpu();
    if (core >= 0 && core < MOST_CORES)
        ++times->by_core[core];
}

static long number(const char *text, const char *name, int base)
{
    char *end;
    errno = 0;
    long value = strtol(text, &end, base);
    if (!*text || *end || errno || value < 0)
        leave(2, name, "is not a number");
    return value;
}

/* Whether to go on: at least `runs`, and until the time is up. */
static int wanted(const struct times *times, size_t runs, uint64_t end_ns)
{
    return times->count < runs || (end_ns && now_ns() < end_ns);
}

/* The tile's pixels again and again, clipped to bytes. */
static void fill(const struct photograph *made, const float *tile, size_t width, size_t height)
{
    for (size_t y = 0; y < made->side; ++y)
        for (size_t x = 0; x < made->side; ++x)
            for (size_t c = 0; c < made->channels; ++c) {
                float value = 255 * tile[(c * height + y % height) * width + x % width] + 0.5f;
                made->noisy[(y * made->side + x) * made->channels + c] = (uint8_t)(value < 0 ? 0 : value > 255 ? 255 : value);
            }
}

static void print_list(const char *name, const struct times *times)
{
    printf("\"%s\": [", name);
    for (size_t i = 0; i < times->count; ++i)
        printf("%s%llu", i ? ", " : "", (unsigned long long)times->ns[i]);
    printf("]");
}

/* getrusage would tell of what this process was before it became this program. */
static long peak_kib(void)
{
    FILE *file = fopen("/proc/self/status", "r");
    char line[256];
    long kib = 0;
    while (file && fgets(line, sizeof line, file))
        if (sscanf(line, "VmHWM: %ld", &kib) == 1)
            break;
    if (file)
        fclose(file);
    return kib;
}

static void print(const struct denoiser *opened, const struct times *tiles, const struct times *pictures, uint64_t load_ns,
                  uint64_t first_ns)
{
    printf("{\"version\": \"%s\", \"workspace_bytes\": %zu, ", opened->version, opened->workspace_bytes);
    printf("\"hwcap\": %lu, \"hwcap2\": %lu, ", masked_getauxval(AT_HWCAP), getauxval(AT_HWCAP2));
    printf("\"page_bytes\": %ld, \"peak_kib\": %ld, ", sysconf(_SC_PAGESIZE), peak_kib());
    printf("\"load_ns\": %llu, \"first_ns\": %llu, \"cores\": {", (unsigned long long)load_ns, (unsigned long long)first_ns);
    const char *comma = "";
    for (int core = 0; core < MOST_CORES; ++core)
        if (tiles->by_core[core]) {
            printf("%s\"%d\": %u", comma, core, tiles->by_core[core]);
            comma = ", ";
        }
    printf("}, ");
    print_list("runs_ns", tiles);
    printf(", ");
    print_list("pictures_ns", pictures);
    printf("}\n");
}

int main(int count, char **arguments)
{
    if (count != 15)
        leave(2, "usage", "bench LIBRARY SYMBOL_PREFIX CHANNELS TILE_WIDTH TILE_HEIGHT SIGMA NOISY DENOISED WARM_UP RUNS "
                          "SECONDS SIDE THREADS HWCAP_MASK");
    const char *path = arguments[1], *prefix = arguments[2], *noisy = arguments[7], *denoised = arguments[8];
    size_t channels = (size_t)number(arguments[3], "CHANNELS", 10), width = (size_t)number(arguments[4], "TILE_WIDTH", 10);
    size_t height = (size_t)number(arguments[5], "TILE_HEIGHT", 10), floats = channels * width * height;
    float sigma = strtof(arguments[6], NULL);
    long warm_up = number(arguments[9], "WARM_UP", 10);
    size_t runs = (size_t)number(arguments[10], "RUNS", 10), side = (size_t)number(arguments[12], "SIDE", 10);
    uint64_t budget_ns = (uint64_t)number(arguments[11], "SECONDS", 10) * 1000000000u;
    int threads = (int)number(arguments[13], "THREADS", 10);
    hwcap_mask = strtoul(arguments[14], NULL, 16);
    struct pictures pictures = read_pictures(noisy, floats * sizeof(float), !strcmp(denoised, "-"));

    uint64_t start = now_ns();
    struct denoiser opened = open_denoiser(path, prefix, sigma);
    uint64_t loaded = now_ns();
    denoise(&opened, pictures.noisy, pictures.denoised);
    uint64_t first = now_ns();
    for (size_t i = 1; i < pictures.count; ++i)
        denoise(&opened, pictures.noisy + i * floats, pictures.denoised + i * floats);
    if (strcmp(denoised, "-"))
        write_pictures(denoised, &pictures, floats * sizeof(float));

    for (long i = 0; i < warm_up; ++i)
        denoise(&opened, pictures.noisy, pictures.denoised);
    struct times tiles = {0}, photographs = {0};
    for (uint64_t end = budget_ns ? now_ns() + budget_ns : 0; wanted(&tiles, runs, end);) {
        uint64_t before = now_ns();
        denoise(&opened, pictures.noisy, pictures.denoised);
        keep(&tiles, now_ns() - before);
    }
    if (side) {
        struct photograph made = open_photograph(&opened, side, channels, threads);
        fill(&made, pictures.noisy, width, height);
        for (long i = 0; i < warm_up; ++i)
            denoise_photograph(&made);
        for (uint64_t end = budget_ns ? now_ns() + budget_ns : 0; wanted(&photographs, runs, end);) {
            uint64_t before = now_ns();
            denoise_photograph(&made);
            keep(&photographs, now_ns() - before);
        }
    }
    print(&opened, &tiles, &photographs, loaded - start, first - loaded);
    return 0;
}
