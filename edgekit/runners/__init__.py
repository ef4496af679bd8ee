"""Where a program for the target's processor runs: this machine, an emulated core, a phone, a board.

| device | runner | time is latency |
|---|---|---|
| `local` | `local.Local` | yes |
| `qemu:CPU` | `qemu.Qemu` | no |
| `adb:SERIAL` | `remote.Remote` by `adb.Adb` | yes |
| `ssh:HOST` | `remote.Remote` by `ssh.Ssh` | yes |

`devices.find` returns one by its name.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from edgekit.runners.facts import Facts

Level = Literal["native", "emulated"]
Kind = Literal["local", "qemu", "adb", "ssh"]


@dataclass(frozen=True, kw_only=True)
class Completed:
    """A program that ended.

    code: Its exit code; negative is the number of the signal that killed it, as in `subprocess`.
    """

    code: int
    stdout: bytes
    stderr: bytes

    def ending(self) -> str:
        """Return how it ended, as "ended with exit code 3" or "was killed by SIGILL (Illegal instruction)"."""
        if self.code >= 0:
            return f"ended with exit code {self.code}"
        try:
            found = signal.Signals(-self.code)
        except ValueError:
            return f"was killed by signal {-self.code}"
        return f"was killed by {found.name} ({signal.strsignal(found)})"


class Runner(Protocol):
    """One processor that programs are run on, with a folder of its own there, which goes when the runner goes."""

    @property
    def kind(self) -> Kind:
        """What sort of place it is."""
        ...

    @property
    def label(self) -> str:
        """Name of the place for reports, as "qemu cortex-a76"."""
        ...

    @property
    def level(self) -> Level:
        """`native` where a time that is measured here is a latency, else `emulated`."""
        ...

    def push(self, file: Path) -> str:
        """Copy a file, with its permissions, into the folder there; return its path there.

        Raises:
            IncompleteError: The device went away.
        """
        ...

    def path(self, name: str) -> str:
        """Return the path there of a file in the folder, which a program may write."""
        ...

    def run(self, argv: Sequence[str], stdin: bytes = b"", *, timeout_s: float = 600.0) -> Completed:
        """Run a program to its end with `stdin` as its input.

        Raises:
            IncompleteError: It did not end within the time, or the device went away.
        """
        ...

    def pull(self, name: str, to: Path) -> None:
        """Copy a file of the folder there to `to`, whole or not at all.

        Raises:
            IncompleteError: There is no such file, or the device went away.
        """
        ...

    def facts(self) -> Facts:
        """Return what the device tells of itself.

        Raises:
            IncompleteError: The device went away.
        """
        ...

    def close(self) -> None:
        """Remove the folder there, as far as the device can still be reached."""
        ...
