"""Boards through OpenSSH's client; it needs nothing there but a POSIX shell with `cat` and `wc`.

User, port, key and jump hosts are the business of `~/.ssh/config`; nothing is asked for on the terminal.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from edgekit.errors import IncompleteError, InputError, ToolMissingError
from edgekit.runners import Kind
from edgekit.runners.remote import ANSWER_S, Remote, gone, open_remote

_TRANSFER_S = 600.0
# A board that hangs or loses power is noticed after 15 s.
_OPTIONS = ("BatchMode=yes", "ConnectTimeout=10", "ServerAliveInterval=5", "ServerAliveCountMax=3")
_REFUSED = {
    "Permission denied": "set up a key: ssh-copy-id",
    "Host key verification failed": "check the host's key, and log in once by hand",
    "Could not resolve hostname": "check the name",
    "Connection refused": "start its SSH server",
    "timed out": "check that it is on and reachable",
}


@dataclass(frozen=True, kw_only=True)
class Ssh:
    """One board. program: Path of ssh. name: As `user@host`, or a name of `~/.ssh/config`."""

    program: str
    name: str

    @property
    def kind(self) -> Kind:
        """`ssh`."""
        return "ssh"

    @property
    def root(self) -> str:
        """A folder for temporary files."""
        return "/tmp"

    def shell(self, line: str) -> list[str]:
        """Return the command here that runs a line in the device's shell."""
        options = [word for option in _OPTIONS for word in ("-o", option)]
        return [self.program, "-T", *options, "--", self.name, f"sh -c {shlex.quote(line)}"]

    def send(self, file: Path, path: str) -> None:
        """Copy a file there, with its permissions.

        Raises:
            IncompleteError: It did not arrive.
        """
        quoted, mode = shlex.quote(path), file.stat().st_mode & 0o777
        line = f"cat >{quoted} && chmod {mode:o} {quoted} && wc -c <{quoted}"
        when = f"while {file.name} was copied to it"
        try:
            with file.open("rb") as source:
                done = subprocess.run(
                    self.shell(line), stdin=source, capture_output=True, timeout=_TRANSFER_S, check=False
                )
        except subprocess.TimeoutExpired as error:
            raise gone(self, when) from error
        if done.returncode not in (0, 255):
            raise IncompleteError(
                f"ssh {self.name}: {path} cannot be written: {done.stderr.decode(errors='replace').strip()}"
            )
        if done.returncode == 255 or done.stdout.strip() != str(file.stat().st_size).encode():
            raise gone(self, when, done.stderr)

    def fetch(self, path: str, to: Path) -> None:
        """Copy a file from there.

        Raises:
            IncompleteError: It did not arrive.
        """
        when = f"while {path.rpartition('/')[2]} was copied from it"
        try:
            with to.open("wb") as target:
                done = subprocess.run(
                    self.shell(f"cat {shlex.quote(path)}"),
                    stdin=subprocess.DEVNULL,
                    stdout=target,
                    stderr=subprocess.PIPE,
                    timeout=_TRANSFER_S,
                    check=False,
                )
        except subprocess.TimeoutExpired as error:
            raise gone(self, when) from error
        if done.returncode != 0:
            raise gone(self, when, done.stderr)


def find(name: str) -> Remote:
    """Return the board of that name.

    Raises:
        ToolMissingError: ssh is not installed (exit code 5).
        InputError: No name, or the board does not let this machine in (exit code 2).
        IncompleteError: It went away.
    """
    if not name or name.startswith("-"):
        raise InputError(f"ssh:{name} names no host", remedy="as in ssh:pi@raspberrypi")
    transport = Ssh(program=_program(), name=name)
    _knock(transport)
    return open_remote(transport)


def _knock(transport: Ssh) -> None:
    try:
        done = subprocess.run(
            transport.shell("echo edgekit"),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            errors="replace",
            timeout=ANSWER_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise InputError(
            f"ssh {transport.name}: no answer within {ANSWER_S:g} s", remedy="try it by hand: ssh HOST true"
        ) from error
    said = done.stdout.split()
    if said == ["edgekit"]:
        return
    if said[-1:] == ["edgekit"]:
        raise InputError(
            f"ssh {transport.name}: its shell says '{' '.join(said[:-1])}' before it does what it is told",
            remedy="let ~/.bashrc there, or what else says so, be silent where no terminal is: [ -t 1 ] || return",
        )
    why = " ".join(done.stderr.split()) or f"ssh ended with exit code {done.returncode}"
    remedy = next((text for start, text in _REFUSED.items() if start in why), "try it by hand: ssh HOST true")
    raise InputError(f"ssh {transport.name}: cannot log in: {why}", remedy=remedy)


def _program() -> str:
    if found := shutil.which("ssh"):
        return found
    raise ToolMissingError(
        "ssh is not on the PATH",
        remedy="install OpenSSH's client; on Debian and Ubuntu: apt-get install openssh-client",
    )
