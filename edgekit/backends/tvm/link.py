"""C compiler and linker without an NDK: both come with the package `ziglang`.

Android's own libraries are not linked: what is made here needs none of them.
"""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from edgekit.backends.tvm.elf import PAGE_BYTES
from edgekit.errors import EdgekitError, ToolMissingError, UnsupportedError
from edgekit.target import Isa

ZIG = "ziglang"
_ANDROID = re.compile(r"aarch64-linux-android(?P<api>\d+)")
_LINUX = ("aarch64-linux-gnu", "x86_64-linux-gnu")
# Only for headers as <elf.h>: nothing of musl is linked.
LINUX = "aarch64-linux-musl"
_CODE = (
    "-O2",
    "-g0",
    "-fPIC",
    "-ffreestanding",
    "-fno-stack-protector",
    "-fno-sanitize=all",
    "-ffp-contract=off",
    "-Wall",
    "-Wextra",
    "-Werror",
)

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class System:
    """The operating system and processor that a library is for.

    zig: Its name in zig's notation.
    api: The lowest Android API level; None for Linux.
    libc: SONAMEs of the system's libc: what it says that it needs.
    folder: Where an app looks for libraries, relative to a bundle.
    """

    zig: str
    api: int | None
    libc: tuple[str, ...]
    folder: str


def system_of(isa: Isa) -> System:
    """Return the system that a triple names.

    Raises:
        UnsupportedError: Not Android with an API level on 64-bit ARM, nor Linux with glibc.
    """
    if match := _ANDROID.fullmatch(isa.triple):
        api = int(match["api"])
        return System(zig=f"aarch64-linux-android.{api}", api=api, libc=("libc.so",), folder="jniLibs/arm64-v8a")
    if isa.triple in _LINUX:
        return System(zig=isa.triple, api=None, libc=("libc.so.6", "libpthread.so.0"), folder="lib")
    raise UnsupportedError(
        f"isa.triple '{isa.triple}' is not supported",
        remedy=f"one of aarch64-linux-android24 (with an API level), {', '.join(_LINUX)}",
    )


def compile_c(source: Path, zig_target: str) -> Path:
    """Compile a freestanding C file, position-independent, to an object file beside it; returns that."""
    made = source.with_suffix(".o")
    _zig(["cc", "-target", zig_target, *_CODE, "-c", source.name, "-o", made.name], source.parent)
    return made


def link_stub(name: str, symbols: Sequence[str], system: System, folder: Path) -> Path:
    """Return a library of that name in `folder` that has the symbols and does nothing: what a linker wants to see."""
    source = folder / f"{name}.stub.c"
    source.write_text("".join(f"void {symbol}(void) {{}}\n" for symbol in symbols), encoding="utf-8")
    _zig(["cc", "-target", system.zig, *_CODE, "-fno-builtin", "-c", source.name, "-o", f"{name}.stub.o"], folder)
    _zig(["ld.lld", "-shared", "-soname", name, f"{name}.stub.o", "-o", name], folder)
    return folder / name


def link_library(objects: Sequence[Path], symbols: Sequence[str], library: Path, *, needs: Sequence[Path] = ()) -> None:
    """Link objects into a shared library that exports only `symbols` and needs no library but `needs`.

    All files lie in one folder; no path gets into the library.
    """
    exports = library.with_suffix(".map")
    exports.write_text(f"{{ global: {' '.join(f'{symbol};' for symbol in symbols)} local: *; }};\n", encoding="utf-8")
    options = [
        "-shared",
        *("-soname", library.name),
        "--hash-style=both",
        *("-z", f"max-page-size={PAGE_BYTES}"),
        *("-z", "relro", "-z", "now", "-z", "noexecstack", "-z", "text"),
        "--build-id=sha1",
        "--no-undefined",
        "--gc-sections",
        "--strip-all",
        f"--version-script={exports.name}",
    ]
    _zig(["ld.lld", *options, *(path.name for path in (*objects, *needs)), "-o", library.name], library.parent)


def link_object(objects: Sequence[Path], made: Path) -> None:
    """Link objects, all in one folder, into one object."""
    _zig(["ld.lld", "-r", *(path.name for path in objects), "-o", made.name], made.parent)


def archive(made: Path, library: Path) -> Path:
    """Return a static library of one object file, both in one folder; the same bytes for the same object."""
    library.unlink(missing_ok=True)
    _zig(["ar", "rcsD", library.name, made.name], library.parent)
    return library


def musl_licence() -> Path:
    """Return the file with the licence of the libc that is in a static program.

    Raises:
        ToolMissingError: It is not where `ziglang` has it.
    """
    found = find_spec(ZIG)
    folder = Path(next(iter(found.submodule_search_locations or ()))) if found else Path()
    path = folder / "lib" / "libc" / "musl" / "COPYRIGHT"
    if not path.is_file():
        raise ToolMissingError(f"the package '{ZIG}' has no {path.name} of musl", remedy=f"install another {ZIG}")
    return path


def link_program(objects: Sequence[Path], program: Path) -> None:
    """Link objects with a `_start` of their own into a static program."""
    _zig(["ld.lld", "-static", "--strip-all", *(path.name for path in objects), "-o", program.name], program.parent)


def compile_program(source: Path, program: Path, zig_target: str, *libraries: Path) -> None:
    """Compile a C file to a static program with musl, which runs on any Linux and Android of its processor.

    zig builds musl when it is first asked for a target: about half a minute of one core, once per machine.
    """
    options = ["-static", "-O2", "-s", "-fno-sanitize=all", "-Wall", "-Wextra", "-Werror"]
    _zig(["cc", "-target", zig_target, *options, str(source), *map(str, libraries), "-o", str(program)], program.parent)


def tools() -> dict[str, str]:
    """Return the version of the compiler and linker."""
    return {ZIG: metadata.version(ZIG)}


def _zig(arguments: Sequence[str], folder: Path) -> None:
    if find_spec(ZIG) is None:
        raise ToolMissingError(f"the package '{ZIG}' is not installed", remedy="run: pip install 'edgekit[tvm]'")
    log.debug("zig %s", " ".join(arguments))
    command = [sys.executable, "-m", ZIG, *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise EdgekitError(f"zig {arguments[0]} failed with exit code {done.returncode}: {done.stderr.strip()}")
