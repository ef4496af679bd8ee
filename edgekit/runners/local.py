"""Programs on this machine."""

from __future__ import annotations

import dataclasses
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from edgekit.errors import IncompleteError, UnsupportedError
from edgekit.measure import host
from edgekit.runners import Completed, Kind, Level, facts
from edgekit.runners.facts import Facts
from edgekit.runners.folder import Folder


@dataclass(frozen=True, kw_only=True)
class Local:
    """This machine."""

    folder: Folder = field(default_factory=Folder)

    @property
    def kind(self) -> Kind:
        """`local`."""
        return "local"

    @property
    def label(self) -> str:
        """Name of the place for reports."""
        return "local"

    @property
    def level(self) -> Level:
        """`native`."""
        return "native"

    def push(self, file: Path) -> str:
        """Copy a file into the folder; return its path."""
        return self.folder.push(file)

    def path(self, name: str) -> str:
        """Return the path of a file in the folder."""
        return self.folder.path(name)

    def run(self, argv: Sequence[str], stdin: bytes = b"", *, timeout_s: float = 600.0) -> Completed:
        """Run a program to its end with `stdin` as its input.

        Raises:
            IncompleteError: It did not end within the time.
            UnsupportedError: This machine cannot run it.
        """
        return run_here(argv, stdin, name=argv[0], label=self.label, timeout_s=timeout_s)

    def pull(self, name: str, to: Path) -> None:
        """Copy a file of the folder to `to`, whole or not at all."""
        self.folder.pull(name, to)

    def facts(self) -> Facts:
        """Return what this machine tells of itself."""
        told = subprocess.run(["sh", "-c", facts.SCRIPT], capture_output=True, check=False)
        found = facts.parse(told.stdout.decode(errors="replace"))
        # macOS has no /proc.
        cpu = host.describe(()).cpu
        return dataclasses.replace(found, cpu=found.cpu or cpu.model, features=found.features or cpu.features)

    def close(self) -> None:
        """Remove the folder."""
        self.folder.close()


def run_here(argv: Sequence[str], stdin: bytes, *, name: str, label: str, timeout_s: float) -> Completed:
    """Run a program of this machine to its end.

    Raises:
        IncompleteError: It did not end within the time.
        UnsupportedError: This machine cannot run it.
    """
    try:
        done = subprocess.run(argv, input=stdin, capture_output=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired as error:
        raise IncompleteError(f"{name} on {label} did not end within {timeout_s:g} s") from error
    except OSError as error:
        raise UnsupportedError(f"{name} cannot be run on {label}: {error.strerror}") from error
    return Completed(code=done.returncode, stdout=done.stdout, stderr=done.stderr)
