"""Programs on a device that is reached through a client program (adb, ssh) which runs a line of its shell."""

from __future__ import annotations

import re
import secrets
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from edgekit.errors import IncompleteError, InputError
from edgekit.files import atomic_file
from edgekit.runners import Completed, Kind, Level, facts
from edgekit.runners.facts import Facts

# A client's own exit codes cannot be told from the program's: the shell there says what the program's was.
_ENDED = re.compile(rb"edgekit-ended (\d+)\n\Z")
# A shell's exit code for a program that signal n killed is 128 + n; Linux has 64 signals.
_SIGNALLED, _SIGNALS = 128, 64
ANSWER_S = 60.0


class Transport(Protocol):
    """A way to a device."""

    @property
    def kind(self) -> Kind:
        """`adb` or `ssh`."""
        ...

    @property
    def name(self) -> str:
        """The device, as the client knows it."""
        ...

    @property
    def root(self) -> str:
        """A folder there whose files may be executed."""
        ...

    def shell(self, line: str) -> list[str]:
        """Return the command here that runs a line in the device's shell."""
        ...

    def send(self, file: Path, path: str) -> None:
        """Copy a file there, with its permissions.

        Raises:
            IncompleteError: It did not arrive.
        """
        ...

    def fetch(self, path: str, to: Path) -> None:
        """Copy a file from there.

        Raises:
            IncompleteError: It did not arrive.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Remote:
    """A device that is reached through a transport; `open_remote` makes one.

    folder: Its own folder there.
    """

    transport: Transport
    folder: str = field(repr=False)

    @property
    def kind(self) -> Kind:
        """`adb` or `ssh`."""
        return self.transport.kind

    @property
    def label(self) -> str:
        """Name of the place for reports, as "adb emulator-5554"."""
        return f"{self.transport.kind} {self.transport.name}"

    @property
    def level(self) -> Level:
        """`native`."""
        return "native"

    def push(self, file: Path) -> str:
        """Copy a file, with its permissions, into the folder there; return its path there.

        Raises:
            IncompleteError: The device went away, or its storage is full.
        """
        self.transport.send(file, self.path(file.name))
        return self.path(file.name)

    def path(self, name: str) -> str:
        """Return the path there of a file in the folder."""
        return f"{self.folder}/{name}"

    def run(self, argv: Sequence[str], stdin: bytes = b"", *, timeout_s: float = 600.0) -> Completed:
        """Run a program to its end with `stdin` as its input.

        A program that is killed by a signal is told from one that ends with a code above 128 only by that code.

        Raises:
            IncompleteError: It did not end within the time, or the device went away.
            KeyboardInterrupt: As any program; here and where it did not end in time, what runs there is killed.
        """
        # Its number is kept, so that what hangs can be killed there and does not heat a phone for hours.
        program = f"echo $$ >{shlex.quote(self.path('pid'))}; exec {shlex.join(argv)}"
        try:
            return _ask(self.transport, f"sh -c {shlex.quote(program)}", stdin, argv[0], timeout_s)
        except subprocess.TimeoutExpired as error:
            self._kill()
            raise IncompleteError(f"{argv[0]} on {self.label} did not end within {timeout_s:g} s") from error
        except KeyboardInterrupt:
            self._kill()
            raise

    def pull(self, name: str, to: Path) -> None:
        """Copy a file of the folder there to `to`, whole or not at all.

        Raises:
            IncompleteError: There is no such file, or the device went away.
        """
        counted = _answer(self.transport, f"wc -c <{shlex.quote(self.path(name))}", f"the size of {name}")
        if counted.code != 0:
            raise IncompleteError(f"{name}: the program on {self.label} did not write it")
        with atomic_file(to) as temporary:
            self.transport.fetch(self.path(name), temporary)
            if temporary.stat().st_size != int(counted.stdout):
                raise gone(self.transport, f"while {name} was copied from it")

    def facts(self) -> Facts:
        """Return what the device tells of itself.

        Raises:
            IncompleteError: The device went away.
        """
        told = _answer(self.transport, facts.SCRIPT, "what it is")
        return facts.parse(told.stdout.decode(errors="replace"))

    def close(self) -> None:
        """Remove the folder there, as far as the device can still be reached."""
        _quietly(self.transport, f"rm -rf {shlex.quote(self.folder)}")

    def _kill(self) -> None:
        _quietly(self.transport, f"kill -9 $(cat {shlex.quote(self.path('pid'))})")


def open_remote(transport: Transport) -> Remote:
    """Return a device with a new folder there.

    Raises:
        InputError: No folder can be made there.
        IncompleteError: The device went away.
    """
    folder = f"{transport.root}/edgekit-{secrets.token_hex(4)}"
    made = _answer(transport, f"mkdir -p {shlex.quote(folder)}", "a folder")
    if made.code != 0:
        why = made.stderr.decode(errors="replace").strip()
        raise InputError(f"{transport.kind} {transport.name}: {folder} cannot be made there: {why}")
    return Remote(transport=transport, folder=folder)


def gone(transport: Transport, when: str, said: bytes = b"") -> IncompleteError:
    """Return the error for a device that went away."""
    told = " ".join(said.decode(errors="replace").split())
    return IncompleteError(
        f"{transport.kind} {transport.name}: the device went away {when}" + (f" ({told})" if told else ""),
        remedy="connect it again and start the same command; nothing of this run is kept",
    )


def _ask(transport: Transport, line: str, stdin: bytes, what: str, timeout_s: float) -> Completed:
    """Run a line of the device's shell; raises TimeoutExpired, or IncompleteError where the device went away."""
    command = transport.shell(f"{line}\nprintf 'edgekit-ended %d\\n' $? >&2")
    done = subprocess.run(command, input=stdin, capture_output=True, timeout=timeout_s, check=False)
    if (match := _ENDED.search(done.stderr)) is None:
        raise gone(transport, f"while it ran {what}", done.stderr)
    code = int(match[1])
    return Completed(
        code=_SIGNALLED - code if _SIGNALLED < code <= _SIGNALLED + _SIGNALS else code,
        stdout=done.stdout,
        stderr=done.stderr[: match.start()],
    )


def _answer(transport: Transport, line: str, what: str) -> Completed:
    """Run a short line of the device's shell."""
    try:
        return _ask(transport, line, b"", f"the shell that tells {what}", ANSWER_S)
    except subprocess.TimeoutExpired as error:
        raise IncompleteError(
            f"{transport.kind} {transport.name}: no answer within {ANSWER_S:g} s when asked for {what}"
        ) from error


def _quietly(transport: Transport, line: str) -> None:
    """Run a line that tidies up; a device that cannot be reached any more keeps what it has."""
    try:
        subprocess.run(transport.shell(line), input=b"", capture_output=True, timeout=ANSWER_S, check=False)
    except subprocess.TimeoutExpired:
        return
