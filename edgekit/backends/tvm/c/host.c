/*
 * Runs a denoising library under an emulator with nothing else there: no libc, no dynamic loader.
 *
 *     host LIBRARY SYMBOL_PREFIX FLOATS < requests > replies
 *
 * The file LIBRARY is mapped, relocated and protected as bionic's loader does it, and its functions are found through its
 * DT_GNU_HASH table. A request is a u32 trial, a float sigma and FLOATS floats of a picture; a reply is an i32 code, a u32
 * length, an error text of that length, and FLOATS floats. Requests are answered until the input ends. Each array ends at
 * a page that cannot be touched, so a library that writes behind one is killed.
 *
 * Exit codes: 0 all answered, 2 wrong arguments or a cut request, 3 the library cannot be loaded (stderr says why).
 */
#include <elf.h>
#include <stddef.h>
#include <stdint.h>

enum { READ = 63, WRITE = 64, OPENAT = 56, EXIT = 93, MMAP = 222, MPROTECT = 226 };
enum { NONE = 0, READABLE = 1, WRITABLE = 2, EXECUTABLE = 4 };
enum { PRIVATE = 2, FIXED = 16, ANONYMOUS = 32 };
enum { GUEST_PAGE = 4096, LARGEST_PAGE = 65536, CURRENT_FOLDER = -100 };

/* What to do wrong on purpose, in the order of the library's error codes. */
enum trial { CORRECT, NULL_NOISY, NULL_DENOISED, NULL_WORKSPACE, SMALL_WORKSPACE, SKEWED_WORKSPACE, IN_PLACE, IN_WORKSPACE };

static long call(long number, long a, long b, long c, long d, long e, long f)
{
    register long x8 __asm__("x8") = number, x0 __asm__("x0") = a, x1 __asm__("x1") = b, x2 __asm__("x2") = c;
    register long x3 __asm__("x3") = d, x4 __asm__("x4") = e, x5 __asm__("x5") = f;
    __asm__ volatile("svc 0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4), "r"(x5) : "memory");
    return x0;
}

static size_t length(const char *text)
{
    size_t size = 0;
    while (text[size])
        ++size;
    return size;
}

static int equal(const char *one, const char *other)
{
    while (*one && *one == *other)
        ++one, ++other;
    return *one == *other;
}

static _Noreturn void leave(int code, const char *why)
{
    call(WRITE, 2, (long)why, (long)length(why), 0, 0, 0);
    call(EXIT, code, 0, 0, 0, 0, 0);
    __builtin_unreachable();
}

static char *map(char *at, size_t size, int protection, int flags, int file, size_t offset)
{
    long mapped = call(MMAP, (long)at, (long)size, protection, flags, file, (long)offset);
    if (mapped < 0 && mapped > -GUEST_PAGE)
        leave(3, "mmap failed\n");
    return (char *)mapped;
}

/* Returns `size` bytes that end where an untouchable page begins; the start is aligned as `size` is. */
static void *guarded(size_t size)
{
    size_t room = (size + GUEST_PAGE - 1) / GUEST_PAGE * GUEST_PAGE;
    char *start = map(NULL, room + GUEST_PAGE, NONE, PRIVATE | ANONYMOUS, -1, 0);
    if (call(MPROTECT, (long)start, (long)room, READABLE | WRITABLE, 0, 0, 0))
        leave(3, "mprotect failed\n");
    return start + room - size;
}

static int protection_of(const Elf64_Phdr *segment)
{
    int protection = NONE;
    if (segment->p_flags & PF_R)
        protection |= READABLE;
    if (segment->p_flags & PF_W)
        protection |= WRITABLE;
    if (segment->p_flags & PF_X)
        protection |= EXECUTABLE;
    return protection;
}

static char *map_segments(int file, const Elf64_Ehdr *header, const Elf64_Phdr *segments)
{
    size_t end = 0;
    for (int i = 0; i < header->e_phnum; ++i)
        if (segments[i].p_type == PT_LOAD && segments[i].p_vaddr + segments[i].p_memsz > end)
            end = segments[i].p_vaddr + segments[i].p_memsz;
    char *base = map(NULL, end + 2 * LARGEST_PAGE, NONE, PRIVATE | ANONYMOUS, -1, 0);
    base += -(uintptr_t)base % LARGEST_PAGE;
    for (int i = 0; i < header->e_phnum; ++i) {
        const Elf64_Phdr *s = &segments[i];
        size_t skew = s->p_vaddr % GUEST_PAGE;
        if (s->p_type != PT_LOAD)
            continue;
        if (s->p_filesz != s->p_memsz && s->p_flags & PF_W)
            map(base + s->p_vaddr - skew, s->p_memsz + skew, protection_of(s), PRIVATE | ANONYMOUS | FIXED, -1, 0);
        if (s->p_filesz)
            map(base + s->p_vaddr - skew, s->p_filesz + skew, protection_of(s), PRIVATE | FIXED, file, s->p_offset - skew);
    }
    return base;
}

struct library {
    char *base;
    const Elf64_Sym *symbols;
    const char *names;
    const uint32_t *gnu_hash;
};

static char *find(const struct library *library, const char *name)
{
    const uint32_t *table = library->gnu_hash, *buckets = table + 4 + 2 * table[2], *chains = buckets + table[0];
    uint32_t hash = 5381;
    for (const char *c = name; *c; ++c)
        hash = hash * 33 + (unsigned char)*c;
    for (uint32_t i = buckets[hash % table[0]]; i >= table[1]; ++i) {
        if ((chains[i - table[1]] | 1) == (hash | 1) && equal(library->names + library->symbols[i].st_name, name))
            return library->base + library->symbols[i].st_value;
        if (chains[i - table[1]] & 1)
            break;
    }
    leave(3, "a function is missing\n");
}

static const uint64_t *auxiliary;

/* The only function of libc that a library calls for one tile. */
static unsigned long getauxval(unsigned long type)
{
    for (const uint64_t *entry = auxiliary; entry[0]; entry += 2)
        if (entry[0] == type)
            return entry[1];
    return 0;
}

static void not_for_a_tile(void)
{
    leave(3, "it called a function of libc that one tile does not need\n");
}

static Elf64_Addr address(const struct library *library, const Elf64_Sym *symbol)
{
    if (symbol->st_shndx != SHN_UNDEF)
        return (Elf64_Addr)library->base + symbol->st_value;
    const char *name = library->names + symbol->st_name;
    if (equal(name, "getauxval"))
        return (Elf64_Addr)getauxval;
    if (equal(name, "malloc") || equal(name, "free") || equal(name, "pthread_create") || equal(name, "pthread_join"))
        return (Elf64_Addr)not_for_a_tile;
    leave(3, "a symbol is undefined\n");
}

static void relocate(const struct library *library, const Elf64_Rela *entries, size_t bytes)
{
    for (size_t i = 0; i < bytes / sizeof *entries; ++i) {
        const Elf64_Rela *entry = &entries[i];
        const Elf64_Sym *symbol = &library->symbols[ELF64_R_SYM(entry->r_info)];
        Elf64_Addr value = (Elf64_Addr)entry->r_addend;
        switch (ELF64_R_TYPE(entry->r_info)) {
        case R_AARCH64_ABS64:
        case R_AARCH64_GLOB_DAT:
        case R_AARCH64_JUMP_SLOT:
            value += address(library, symbol);
            break;
        case R_AARCH64_RELATIVE:
            value += (Elf64_Addr)library->base;
            break;
        default:
            leave(3, "a relocation is of an unknown type\n");
        }
        *(Elf64_Addr *)(library->base + entry->r_offset) = value;
    }
}

static int part_of_libc(const char *name)
{
    return equal(name, "libc.so") || equal(name, "libc.so.6") || equal(name, "libpthread.so.0");
}

static struct library load(const char *path)
{
    long file = call(OPENAT, CURRENT_FOLDER, (long)path, 0, 0, 0, 0);
    if (file < 0)
        leave(3, "the library cannot be opened\n");
    const char *start = map(NULL, GUEST_PAGE, READABLE, PRIVATE, (int)file, 0);
    const Elf64_Ehdr *header = (const Elf64_Ehdr *)start;
    const Elf64_Phdr *segments = (const Elf64_Phdr *)(start + header->e_phoff);
    if (header->e_phoff + header->e_phnum * sizeof *segments > GUEST_PAGE)
        leave(3, "the program headers are not in the first page\n");

    struct library library = {.base = map_segments((int)file, header, segments)};
    const Elf64_Dyn *dynamic = NULL;
    const Elf64_Rela *rela = NULL, *jumps = NULL;
    size_t rela_bytes = 0, jump_bytes = 0;
    for (int i = 0; i < header->e_phnum; ++i)
        if (segments[i].p_type == PT_DYNAMIC)
            dynamic = (const Elf64_Dyn *)(library.base + segments[i].p_vaddr);
    for (const Elf64_Dyn *d = dynamic; d && d->d_tag != DT_NULL; ++d) {
        char *at = library.base + d->d_un.d_ptr;
        switch (d->d_tag) {
        case DT_SYMTAB: library.symbols = (const Elf64_Sym *)at; break;
        case DT_STRTAB: library.names = at; break;
        case DT_GNU_HASH: library.gnu_hash = (const uint32_t *)at; break;
        case DT_RELA: rela = (const Elf64_Rela *)at; break;
        case DT_RELASZ: rela_bytes = d->d_un.d_val; break;
        case DT_JMPREL: jumps = (const Elf64_Rela *)at; break;
        case DT_PLTRELSZ: jump_bytes = d->d_un.d_val; break;
        case DT_INIT_ARRAY: leave(3, "it has constructors\n");
        }
    }
    if (!library.symbols || !library.names || !library.gnu_hash)
        leave(3, "it has no symbols\n");
    for (const Elf64_Dyn *d = dynamic; d && d->d_tag != DT_NULL; ++d)
        if (d->d_tag == DT_NEEDED && !part_of_libc(library.names + d->d_un.d_val))
            leave(3, "it needs another library\n");
    relocate(&library, rela, rela_bytes);
    relocate(&library, jumps, jump_bytes);
    for (int i = 0; i < header->e_phnum; ++i)
        if (segments[i].p_type == PT_GNU_RELRO) {
            size_t skew = segments[i].p_vaddr % GUEST_PAGE;
            size_t size = (segments[i].p_memsz + skew) / GUEST_PAGE * GUEST_PAGE;
            if (call(MPROTECT, (long)(library.base + segments[i].p_vaddr - skew), (long)size, READABLE, 0, 0, 0))
                leave(3, "mprotect failed\n");
        }
    return library;
}

/* Returns how much was read before the input ended. */
static size_t receive(void *to, size_t size)
{
    size_t got = 0;
    while (got < size) {
        long more = call(READ, 0, (long)((char *)to + got), (long)(size - got), 0, 0, 0);
        if (more <= 0)
            break;
        got += (size_t)more;
    }
    return got;
}

static void reply(const void *from, size_t size)
{
    for (size_t done = 0; done < size;) {
        long more = call(WRITE, 1, (long)((const char *)from + done), (long)(size - done), 0, 0, 0);
        if (more <= 0)
            leave(2, "the reply cannot be written\n");
        done += (size_t)more;
    }
}

static char *find_function(const struct library *library, const char *prefix, const char *suffix)
{
    char name[256];
    size_t size = 0;
    for (; *prefix && size < sizeof name - 1; ++prefix)
        name[size++] = *prefix;
    for (; *suffix && size < sizeof name - 1; ++suffix)
        name[size++] = *suffix;
    name[size] = 0;
    return find(library, name);
}

typedef int denoise_function(const float *, float, float *, void *, size_t);

static int try(denoise_function *denoise, enum trial trial, const float *noisy, float sigma, float *denoised, char *workspace,
               size_t size)
{
    switch (trial) {
    case NULL_NOISY: return denoise(NULL, sigma, denoised, workspace, size);
    case NULL_DENOISED: return denoise(noisy, sigma, NULL, workspace, size);
    case NULL_WORKSPACE: return denoise(noisy, sigma, denoised, NULL, size);
    case SMALL_WORKSPACE: return denoise(noisy, sigma, denoised, workspace, size - 1);
    case SKEWED_WORKSPACE: return denoise(noisy, sigma, denoised, workspace + 4, size);
    case IN_PLACE: return denoise(denoised, sigma, denoised, workspace, size);
    case IN_WORKSPACE: return denoise(noisy, sigma, (float *)workspace, workspace, size);
    default: return denoise(noisy, sigma, denoised, workspace, size);
    }
}

static _Noreturn __attribute__((used)) void run(const long *stack)
{
    const char *const *arguments = (const char *const *)(stack + 1), *const *environment = arguments + stack[0] + 1;
    while (*environment)
        ++environment;
    auxiliary = (const uint64_t *)(environment + 1);
    if (stack[0] != 4)
        leave(2, "usage: host LIBRARY SYMBOL_PREFIX FLOATS\n");
    size_t bytes = 0;
    for (const char *digit = arguments[3]; *digit; ++digit)
        bytes = bytes * 10 + (size_t)(*digit - '0');
    bytes *= sizeof(float);

    struct library library = load(arguments[1]);
    denoise_function *denoise = (denoise_function *)find_function(&library, arguments[2], "_tile_f32");
    size_t (*workspace_size)(void) = (size_t(*)(void))find_function(&library, arguments[2], "_tile_workspace_size");
    const char *(*error_text)(int) = (const char *(*)(int))find_function(&library, arguments[2], "_error_text");

    size_t size = workspace_size();
    float *noisy = guarded(bytes), *denoised = guarded(bytes);
    char *workspace = guarded(size);
    struct { uint32_t trial; float sigma; } request;
    size_t got;
    while ((got = receive(&request, sizeof request)) == sizeof request && receive(noisy, bytes) == bytes) {
        int32_t code = try(denoise, request.trial, noisy, request.sigma, denoised, workspace, size);
        const char *text = error_text(code);
        uint32_t text_length = (uint32_t)length(text);
        reply(&code, sizeof code);
        reply(&text_length, sizeof text_length);
        reply(text, text_length);
        reply(denoised, bytes);
    }
    leave(got ? 2 : 0, got ? "the last request is cut\n" : "");
}

__asm__(".globl _start\n_start:\n\tmov x0, sp\n\tbl run\n");
