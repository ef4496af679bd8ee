"""Where a program for the target's processor runs: an emulator here, later a phone or a board."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, kw_only=True)
class Completed:
    """A program that ended.

    code: Its exit code; negative is the number of the signal that killed it, as in `subprocess`.
    """

    code: int
    stdout: bytes
    stderr: bytes


class Runner(Protocol):
    """One processor that programs are run on."""

    @property
    def label(self) -> str:
        """Name of the place for reports, as "qemu cortex-a76"."""
        ...

    def run(self, argv: Sequence[str], stdin: bytes = b"", *, timeout_s: float = 600.0) -> Completed:
        """Run a program to its end with `stdin` as its input.

        Raises:
            IncompleteError: It did not end within the time.
        """
        ...
