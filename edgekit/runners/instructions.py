"""How many instructions a program takes on an emulated core: a cost without a clock, and never a latency.

QEMU's own plugin interface counts them. Debian's static QEMU takes no plugins; the dynamic one (`qemu-user`) does.
"""

from __future__ import annotations

import logging
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from edgekit.errors import IncompleteError, ToolMissingError
from edgekit.runners import qemu
from edgekit.runners.local import run_here

_SOURCE = Path(__file__).with_name("instructions.c")
_COUNT = re.compile(rb"^edgekit-instructions (\d+)$", re.MULTILINE)
_COMPILERS = ("gcc", "cc", "clang")
# QEMU 9.0 raised the least version that it takes from 1 to 2.
_FIRST_WITH_API_2 = 9

log = logging.getLogger(__name__)


def count(cpu: str, argv: Sequence[str], *, timeout_s: float = 3600.0) -> int:
    """Return the instructions that a static program with one thread takes from its start to its end.

    Args:
        cpu: Name of the core; it decides which instructions exist, not what they cost.
        argv: The program and its arguments.
        timeout_s: The longest that it may run.

    Raises:
        ToolMissingError: No QEMU that takes plugins, or no C compiler.
        IncompleteError: The program failed, or did not end within the time.
    """
    program = emulator()
    command = [program, "-cpu", cpu, "-plugin", str(_plugin(program)), "-d", "plugin", *argv]
    done = run_here(command, b"", name=argv[0], label=f"qemu {cpu}", timeout_s=timeout_s)
    if done.code != 0:
        why = " ".join(done.stderr.decode(errors="replace").split())
        raise IncompleteError(f"{argv[0]} on qemu {cpu} {done.ending()} while its instructions were counted: {why}")
    if (match := _COUNT.search(done.stderr)) is None:
        raise ToolMissingError(f"{program} does not count instructions", remedy="reinstall the package qemu-user")
    return int(match[1])


def emulator() -> str:
    """Return the path of the QEMU that counts, the first that takes plugins.

    Raises:
        ToolMissingError: There is none.
    """
    for name in qemu.PROGRAMS:
        found = shutil.which(name)
        # It lists its options and exits with 0 or 1, by version.
        if found and "-plugin" in subprocess.run([found, "-help"], capture_output=True, text=True, check=False).stdout:
            return found
    raise ToolMissingError(
        "no QEMU on the PATH takes plugins, which count instructions (a static one does not)",
        remedy="install the dynamic one; on Debian and Ubuntu: apt-get install qemu-user",
    )


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="edgekit-plugin-")


def _plugin(program: str) -> Path:
    """Return the plugin for a QEMU, compiled once per process and interface, and removed when the process ends."""
    compiler = next((found for name in _COMPILERS if (found := shutil.which(name))), None)
    if compiler is None:
        raise ToolMissingError(
            f"none of {', '.join(_COMPILERS)} is on the PATH; one compiles the plugin that counts instructions",
            remedy="on Debian and Ubuntu: apt-get install gcc libc6-dev",
        )
    api = 1 if int(qemu.version(program).partition(".")[0]) < _FIRST_WITH_API_2 else 2
    made = Path(_folder().name) / f"instructions-{api}.so"
    if made.is_file():
        return made
    command = [compiler, "-shared", "-fPIC", "-O2", f"-DAPI={api}", "-o", str(made), str(_SOURCE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ToolMissingError(
            f"{compiler} cannot compile the plugin that counts instructions: {' '.join(done.stderr.split())}",
            remedy="on Debian and Ubuntu: apt-get install gcc libc6-dev",
        )
    return made
