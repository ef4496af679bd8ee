"""C compiler and linker without an NDK: both come with the package `ziglang`.

Android's own libraries are not linked: what is made here needs none of them.
"""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from edgekit.backends.tvm.elf import PAGE_BYTES
from edgekit.errors import EdgekitError, ToolMissingError, UnsupportedError
from edgekit.target import Isa

ZIG = "ziglang"
_TRIPLE = re.compile(r"(?P<arch>\w+)-linux-android(?P<api>\d+)")
# Only for headers as <elf.h>: nothing of musl is linked.
LINUX = "aarch64-linux-musl"
_CODE = ("-O2", "-fPIC", "-ffreestanding", "-fno-stack-protector", "-fno-sanitize=all", "-Wall", "-Wextra", "-Werror")

log = logging.getLogger(__name__)


def android_api(isa: Isa) -> int:
    """Return the Android API level that a triple names, 24 for `aarch64-linux-android24`.

    Raises:
        UnsupportedError: Not a triple of Android with an API level.
    """
    if (match := _TRIPLE.fullmatch(isa.triple)) is None:
        raise UnsupportedError(
            f"isa.triple '{isa.triple}' is not an Android triple with an API level",
            remedy="for example aarch64-linux-android24",
        )
    return int(match["api"])


def android(isa: Isa) -> str:
    """Return the target's name in zig's own notation."""
    return f"{isa.triple.partition('-')[0]}-linux-android.{android_api(isa)}"


def compile_c(source: Path, zig_target: str) -> Path:
    """Compile a freestanding C file, position-independent, to an object file beside it; returns that."""
    made = source.with_suffix(".o")
    _zig(["cc", "-target", zig_target, *_CODE, "-c", source.name, "-o", made.name], source.parent)
    return made


def link_library(objects: Sequence[Path], symbols: Sequence[str], library: Path) -> None:
    """Link objects into a shared library that exports only `symbols` and needs no other library.

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
    _zig(["ld.lld", *options, *(path.name for path in objects), "-o", library.name], library.parent)


def link_program(objects: Sequence[Path], program: Path) -> None:
    """Link objects with a `_start` of their own into a static program."""
    _zig(["ld.lld", "-static", "--strip-all", *(path.name for path in objects), "-o", program.name], program.parent)


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
