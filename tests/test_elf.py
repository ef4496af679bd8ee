"""The gate for Android libraries: each thing that it forbids is made here by a real linker or by changing the file."""

from __future__ import annotations

import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from edgekit.errors import IntegrityError, UnsupportedError

elf = pytest.importorskip("edgekit.backends.tvm.elf")
link = pytest.importorskip("edgekit.backends.tvm.link")
pytestmark = pytest.mark.backend

SOURCES = {
    "plain": "int answer(void) { return 42; }",
    "table": 'const char *const names[] = {"a", "b"};',
    "counter": "static int calls; int answer(void) { return ++calls; }",
    "importing": "int elsewhere(void); int answer(void) { return elsewhere(); }",
    "thread_local": "static __thread int calls; int answer(void) { return ++calls; }",
    "text_relocation": '__asm__(".text\\n.globl answer\\nanswer: .quad answer\\n"); extern int elsewhere;',
    "program": "void _start(void) { for (;;); }",
}
GOOD = ["-shared", "-soname", "libx.so", "--hash-style=both", "-z", "max-page-size=16384", "-z", "relro", "-z", "now"]


@pytest.fixture(scope="session")
def objects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("objects")
    made: dict[str, Path] = {}
    for name, code in SOURCES.items():
        source = folder / f"{name}.c"
        source.write_text(code)
        made[name] = link.compile_c(source, link.LINUX)
    foreign = folder / "foreign.c"
    foreign.write_text(SOURCES["plain"])
    made["foreign"] = link.compile_c(foreign, "x86_64-linux-musl")
    return made


@pytest.fixture
def linked(objects: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    def make(name: str, *options: str, flags: list[str] = GOOD, file: str = "libx.so") -> Path:
        library = tmp_path / file
        command = [sys.executable, "-m", link.ZIG, "ld.lld", *flags, *options, str(objects[name]), "-o", str(library)]
        subprocess.run(command, check=True, capture_output=True)
        return library

    return make


@pytest.mark.parametrize("source", ["plain", "table", "counter"])
def test_a_sound_library_passes(linked: Callable[..., Path], source: str) -> None:
    elf.check(linked(source))


@pytest.mark.parametrize(
    ("source", "options", "complaint"),
    [
        pytest.param("plain", ["-z", "max-page-size=4096"], "16 KB pages need 16384", id="4 KB pages"),
        pytest.param(
            "plain", ["-soname", "liby.so"], "has the SONAME 'liby.so', expected 'libx.so'", id="another SONAME"
        ),
        pytest.param("plain", ["-z", "execstack"], "executable stack", id="executable stack"),
        pytest.param("importing", [], "undefined symbols: elsewhere", id="undefined symbol"),
        pytest.param("thread_local", [], "thread-local storage, which needs API 29", id="thread-local storage"),
        pytest.param("text_relocation", ["-z", "notext"], "text relocations", id="text relocation"),
        pytest.param(
            "table", ["--pack-dyn-relocs=relr"], "DT_RELR relocations, which need API 30", id="packed relocations"
        ),
    ],
)
def test_what_the_linker_did_wrong_is_named(
    linked: Callable[..., Path], source: str, options: list[str], complaint: str
) -> None:
    with pytest.raises(UnsupportedError, match=complaint):
        elf.check(linked(source, *options))


def test_a_library_without_a_soname_is_refused(linked: Callable[..., Path]) -> None:
    flags = [flag for flag in GOOD if flag not in ("-soname", "libx.so")]
    with pytest.raises(UnsupportedError, match="has the SONAME None"):
        elf.check(linked("plain", flags=flags))


def test_a_renamed_library_is_refused(linked: Callable[..., Path]) -> None:
    library = linked("plain")
    with pytest.raises(UnsupportedError, match=r"has the SONAME 'libx\.so', expected 'libz\.so'"):
        elf.check(library.rename(library.with_name("libz.so")))


def test_a_library_for_another_processor_is_refused(linked: Callable[..., Path]) -> None:
    with pytest.raises(UnsupportedError, match="expected AArch64"):
        elf.check(linked("foreign"))


def test_a_program_is_refused(linked: Callable[..., Path]) -> None:
    with pytest.raises(UnsupportedError, match=r"ET_EXEC.*no dynamic section"):
        elf.check(linked("program", flags=["-static", "-z", "max-page-size=16384"]))


def test_a_library_that_android_has_may_be_needed(linked: Callable[..., Path]) -> None:
    dependency = linked("plain", "-soname", "libm.so", file="libm.so")
    elf.check(linked("counter", "--no-as-needed", str(dependency)))


def test_a_library_that_android_does_not_have_is_refused(linked: Callable[..., Path]) -> None:
    dependency = linked("plain", "-soname", "libtvm_runtime.so", file="libtvm_runtime.so")
    with pytest.raises(UnsupportedError, match=r"needs libtvm_runtime\.so, which the system does not have"):
        elf.check(linked("counter", "--no-as-needed", str(dependency)))


def test_a_symbol_that_bionic_exports_may_be_imported(linked: Callable[..., Path]) -> None:
    elf.check(linked("importing"), imports=frozenset({"elsewhere"}))


def test_later_api_levels_allow_what_came_with_them(linked: Callable[..., Path]) -> None:
    elf.check(linked("thread_local"), api=29)
    elf.check(linked("table", "--pack-dyn-relocs=relr"), api=30)


def _segments(data: bytes) -> list[int]:
    """Return the file offset of each program header."""
    start, size, count = struct.unpack_from("<Q", data, 32)[0], *struct.unpack_from("<HH", data, 54)
    return [start + size * i for i in range(count)]


def _change(library: Path, change: Callable[[bytearray], None]) -> None:
    data = bytearray(library.read_bytes())
    change(data)
    library.write_bytes(data)


def _last_load(data: bytes) -> int:
    return [at for at in _segments(data) if struct.unpack_from("<I", data, at)[0] == 1][-1]


def _shift_alignment(data: bytearray) -> None:
    struct.pack_into("<Q", data, _last_load(data) + 48, 1 << 20)


def _allow_everything(data: bytearray) -> None:
    struct.pack_into("<I", data, _last_load(data) + 4, 7)


def _drop_section_headers(data: bytearray) -> None:
    struct.pack_into("<Q", data, 40, 0)
    struct.pack_into("<HHH", data, 58, 0, 0, 0)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        pytest.param(_shift_alignment, "differs from it modulo 1048576", id="segment off its alignment"),
        pytest.param(_allow_everything, "writable and executable", id="writable code"),
        pytest.param(_drop_section_headers, "no section headers", id="no section headers"),
    ],
)
def test_a_changed_header_is_noticed(
    linked: Callable[..., Path], change: Callable[[bytearray], None], complaint: str
) -> None:
    library = linked("counter")
    _change(library, change)
    with pytest.raises(UnsupportedError, match=complaint):
        elf.check(library)


@pytest.mark.parametrize("size", [0, 10, 500])
def test_a_cut_file_is_an_integrity_error(linked: Callable[..., Path], size: int) -> None:
    library = linked("table")
    library.write_bytes(library.read_bytes()[:size])
    with pytest.raises(IntegrityError, match="not a whole ELF file"):
        elf.check(library)


def test_a_text_file_is_an_integrity_error(tmp_path: Path) -> None:
    text = tmp_path / "libx.so"
    text.write_text("INPUT(-lm)\n")
    with pytest.raises(IntegrityError, match=r"libx\.so: not a whole ELF file"):
        elf.check(text)


@pytest.mark.parametrize(
    ("source", "stateless"),
    [("plain", True), ("table", True), ("counter", False)],
    ids=["code", "constant table", "counter"],
)
def test_state_that_a_library_keeps_is_counted(linked: Callable[..., Path], source: str, stateless: bool) -> None:
    assert (elf.mutable_bytes(linked(source)) == 0) is stateless


def test_undefined_symbols_of_an_object_are_listed(objects: dict[str, Path], tmp_path: Path) -> None:
    copy = shutil.copy(objects["importing"], tmp_path)
    assert elf.undefined_symbols(Path(copy)) == {"elsewhere"}
