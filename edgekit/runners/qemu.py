"""64-bit ARM programs under QEMU's user-mode emulation.

It shows what machine code computes on a named core, never how fast: emulated time is not latency.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from edgekit.errors import InputError, ToolMissingError
from edgekit.runners import Completed, Kind, Level
from edgekit.runners.facts import Facts
from edgekit.runners.folder import Folder
from edgekit.runners.local import run_here

PROGRAMS = ("qemu-aarch64-static", "qemu-aarch64")


@dataclass(frozen=True, kw_only=True)
class Qemu:
    """An emulated core.

    program: Path of QEMU.
    cpu: Name of the core, one of `qemu-aarch64 -cpu help`; it decides which instructions exist.
    """

    program: str
    cpu: str
    folder: Folder = field(default_factory=Folder)

    @property
    def kind(self) -> Kind:
        """`qemu`."""
        return "qemu"

    @property
    def label(self) -> str:
        """Name of the place for reports, as "qemu cortex-a76"."""
        return f"qemu {self.cpu}"

    @property
    def level(self) -> Level:
        """`emulated`."""
        return "emulated"

    def push(self, file: Path) -> str:
        """Copy a file into the folder; return its path. Programs may read any other file of this machine as well."""
        return self.folder.push(file)

    def path(self, name: str) -> str:
        """Return the path of a file in the folder."""
        return self.folder.path(name)

    def run(self, argv: Sequence[str], stdin: bytes = b"", *, timeout_s: float = 600.0) -> Completed:
        """Run a program to its end with `stdin` as its input.

        Raises:
            IncompleteError: It did not end within the time.
        """
        command = [self.program, "-cpu", self.cpu, *argv]
        return run_here(command, stdin, name=argv[0], label=self.label, timeout_s=timeout_s)

    def pull(self, name: str, to: Path) -> None:
        """Copy a file of the folder to `to`, whole or not at all."""
        self.folder.pull(name, to)

    def facts(self) -> Facts:
        """Return what is emulated; the features are what a program asks the emulated kernel for."""
        return Facts(
            model=f"QEMU {version(self.program)}",
            soc="",
            cpu=self.cpu,
            machine="aarch64",
            system="Linux, user-mode emulation",
            kernel="",
            api_level=None,
            features=(),
            cores=(),
            temperature_mc=None,
            emulated=True,
        )

    def close(self) -> None:
        """Remove the folder."""
        self.folder.close()


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


def version(program: str | None = None) -> str:
    """Return the version of that QEMU, or of the one that runs programs, as "7.2.22".

    Raises:
        ToolMissingError: QEMU is not installed, or does not tell its version.
    """
    program = program or _program()
    told = subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout
    if (match := re.search(r"version (\d+[\d.]*)", told)) is None:
        raise ToolMissingError(
            f"{program} does not tell its version", remedy="reinstall the packages qemu-user-static and qemu-user"
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
