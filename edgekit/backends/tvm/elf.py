"""What Android's loader and Google Play demand of a shared library, checked on the file itself.

Sources: developer.android.com/guide/practices/page-sizes (16 KB pages) and bionic's
`android-changes-for-ndk-developers.md`: no text relocations from API 23 on, section headers wanted from 24, ELF
thread-local storage known from 29, DT_RELR from 30.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from elftools.common.exceptions import ELFError
from elftools.construct.lib.container import Container
from elftools.elf.dynamic import DynamicSegment
from elftools.elf.elffile import ELFFile

from edgekit.errors import IntegrityError, UnsupportedError

PAGE_BYTES = 16 * 1024
BIONIC = frozenset({"libc.so", "libm.so", "libdl.so", "liblog.so"})
TLS_API = 29
RELR_API = 30
_EXECUTABLE = 1
_WRITABLE = 2
_TEXTREL_FLAG = 4


def check(
    path: Path, api: int = 24, *, imports: frozenset[str] = frozenset(), libraries: frozenset[str] = BIONIC
) -> None:
    """Check that a library loads on every 64-bit ARM phone of that API level or later.

    Args:
        path: The shared library, under the name that it ships with.
        api: The lowest API level that it is for.
        imports: Undefined symbols that are known to be exported by the system's libraries.
        libraries: What it may need.

    Raises:
        IntegrityError: Not a whole ELF file (exit code 6).
        UnsupportedError: What the loader or Google Play would refuse, all of it in one message (exit code 4).
    """
    with _opened(path) as file:
        problems = [*_header(file), *_segments(file, api), *_dynamic(file, path.name, api, imports, libraries)]
    if problems:
        raise UnsupportedError(f"{path.name}: {'; '.join(problems)}")


def mutable_bytes(path: Path) -> int:
    """Return how many bytes a library can still write to after it was relocated; 0 means that it keeps no state.

    Raises:
        IntegrityError: Not a whole ELF file.
    """
    with _opened(path) as file:
        writable = [s.header for s in file.iter_segments("PT_LOAD") if s.header.p_flags & _WRITABLE]
        protected = [s.header for s in file.iter_segments("PT_GNU_RELRO")]
        return sum(int(s.p_memsz) - sum(_common_bytes(s, relro) for relro in protected) for s in writable)


@contextmanager
def _opened(path: Path) -> Iterator[ELFFile]:
    try:
        with path.open("rb") as stream:
            yield ELFFile(stream)
    except (ELFError, UnicodeDecodeError) as error:
        raise IntegrityError(f"{path.name}: not a whole ELF file: {error}") from error


def _common_bytes(one: Container, other: Container) -> int:
    start = max(one.p_vaddr, other.p_vaddr)
    return int(max(0, min(one.p_vaddr + one.p_memsz, other.p_vaddr + other.p_memsz) - start))


def _header(file: ELFFile) -> Iterator[str]:
    if (file.elfclass, file.little_endian, file.header.e_machine) != (64, True, "EM_AARCH64"):
        yield f"is for {file.get_machine_arch()} with {file.elfclass} bits, expected AArch64, little endian"
    if file.header.e_type != "ET_DYN":
        yield f"is {file.header.e_type}, expected a shared library (ET_DYN)"
    if file.header.e_shnum == 0:
        yield "has no section headers"


def _segments(file: ELFFile, api: int) -> Iterator[str]:
    for segment in file.iter_segments("PT_LOAD"):
        yield from _load(segment.header)
    stacks = list(file.iter_segments("PT_GNU_STACK"))
    if not stacks or stacks[0].header.p_flags & _EXECUTABLE:
        yield "asks for an executable stack"
    if any(file.iter_segments("PT_TLS")) and api < TLS_API:
        yield f"uses ELF thread-local storage, which needs API {TLS_API}"


def _load(header: Container) -> Iterator[str]:
    where = f"segment at {header.p_vaddr:#x}"
    if header.p_align < PAGE_BYTES:
        yield f"{where} is aligned to {header.p_align} bytes, 16 KB pages need {PAGE_BYTES}"
    elif (header.p_vaddr - header.p_offset) % header.p_align:
        yield f"{where} lies at file offset {header.p_offset:#x}, which differs from it modulo {header.p_align}"
    if header.p_flags & _WRITABLE and header.p_flags & _EXECUTABLE:
        yield f"{where} is writable and executable"


def _dynamic(file: ELFFile, name: str, api: int, imports: frozenset[str], libraries: frozenset[str]) -> Iterator[str]:
    dynamic = next(iter(file.iter_segments("PT_DYNAMIC")), None)
    if not isinstance(dynamic, DynamicSegment):
        yield "has no dynamic section"
        return
    tags = {tag.entry.d_tag: tag for tag in dynamic.iter_tags()}
    soname = tags["DT_SONAME"].soname if "DT_SONAME" in tags else None
    if soname != name:
        yield f"has the SONAME {soname!r}, expected '{name}'"
    needed = {tag.needed for tag in dynamic.iter_tags("DT_NEEDED")}
    if foreign := sorted(needed - libraries):
        yield f"needs {', '.join(foreign)}, which the system does not have"
    if "DT_TEXTREL" in tags or ("DT_FLAGS" in tags and tags["DT_FLAGS"].entry.d_val & _TEXTREL_FLAG):
        yield "has text relocations"
    if "DT_RELR" in tags and api < RELR_API:
        yield f"uses DT_RELR relocations, which need API {RELR_API}"
    undefined = {s.name for s in dynamic.iter_symbols() if s.name and s.entry.st_shndx == "SHN_UNDEF"}
    if unknown := sorted(undefined - imports):
        yield f"has undefined symbols: {', '.join(unknown)}"


def undefined_symbols(path: Path) -> set[str]:
    """Return the symbols that an object file leaves to the linker.

    Raises:
        IntegrityError: Not a whole ELF file.
    """
    with _opened(path) as file:
        table = file.get_section_by_name(".symtab")
        return {s.name for s in table.iter_symbols() if s.name and s.entry.st_shndx == "SHN_UNDEF"}
