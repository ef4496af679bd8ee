"""64-bit ARM programs under QEMU's user-mode emulation.

It shows what machine code computes on a named core, never how fast: emulated time is not latency.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from edgekit.errors import IncompleteError, InputError, ToolMissingError
from edgekit.runners import Completed

PROGRAMS = ("qemu-aarch64-static", "qemu-aarch64")


@dataclass(frozen=True, kw_only=True)
class Qemu:
    """An emulated core.

    program: Path of QEMU.
    cpu: Name of the core, one of `qemu-aarch64 -cpu help`; it decides which instructions exist.
    """

    program: str
    cpu: str

    @property
    def label(self) -> str:
        """Name of the place for reports, as "qemu cortex-a76"."""
        return f"qemu {self.cpu}"

    def run(self, argv: Sequence[str], stdin: bytes = b"", *, timeout_s: float = 600.0) -> Completed:
        """Run a program to its end with `stdin` as its input.

        Raises:
            IncompleteError: It did not end within the time.
        """
        try:
            done = subprocess.run(
                [self.program, "-cpu", self.cpu, *argv],
                input=stdin,
                capture_output=True,
                timeout=timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise IncompleteError(f"{argv[0]} on {self.label} did not end within {timeout_s:g} s") from error
        return Completed(code=done.returncode, stdout=done.stdout, stderr=done.stderr)


def find(cpu: str) -> Qemu:
    """Return an emulated core of that name.

    Raises:
        InputError: The core is `max`, or QEMU does not know it (exit code 2).
        ToolMissingError: QEMU is not installed (exit code 5).
    """
    if cpu == "max":
        # It has SME, which no phone of the target has; XNNPACK takes a wrong path on it.
        raise InputError("runner.cpus: 'max' is no real core", remedy="name one, as cortex-a76")
    qemu = Qemu(program=_program(), cpu=cpu)
    if cpu not in cpus():
        raise InputError(f"runner.cpus: QEMU {version()} does not know the core '{cpu}'; known: {', '.join(cpus())}")
    return qemu


def cpus() -> tuple[str, ...]:
    """Return the names of the cores that QEMU can emulate.

    Raises:
        ToolMissingError: QEMU is not installed.
    """
    listed = subprocess.run(
        [_program(), "-cpu", "help"], capture_output=True, text=True, check=False
    ).stdout  # it exits with 1
    return tuple(sorted(line.strip() for line in listed.splitlines()[1:] if line.strip() not in ("", "max")))


def version() -> str:
    """Return QEMU's version, as "7.2.22".

    Raises:
        ToolMissingError: QEMU is not installed, or does not tell its version.
    """
    told = subprocess.run([_program(), "--version"], capture_output=True, text=True, check=False).stdout
    if (match := re.search(r"version (\d+[\d.]*)", told)) is None:
        raise ToolMissingError(
            f"{_program()} does not tell its version", remedy="reinstall the package qemu-user-static"
        )
    return match[1]


def _program() -> str:
    for name in PROGRAMS:
        if found := shutil.which(name):
            return found
    raise ToolMissingError(
        f"none of {', '.join(PROGRAMS)} is on the PATH",
        remedy="install QEMU's user-mode emulation; on Debian and Ubuntu: apt-get install qemu-user-static",
    )
