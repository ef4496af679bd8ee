"""Android devices through adb, the client of Android's platform tools."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from edgekit.errors import IncompleteError, InputError, ToolMissingError
from edgekit.runners import Kind
from edgekit.runners.remote import ANSWER_S, Remote, gone, open_remote

_TRANSFER_S = 600.0
_STATES = {
    "unauthorized": "unlock it and allow USB debugging for this machine",
    "authorizing": "unlock it and allow USB debugging for this machine",
    "offline": "reconnect it, or run: adb reconnect",
    "no permissions": "give this user access to the USB device (udev rules)",
}


@dataclass(frozen=True, kw_only=True)
class Adb:
    """One Android device. program: Path of adb. name: The device's serial number, as `adb devices` lists it."""

    program: str
    name: str

    @property
    def kind(self) -> Kind:
        """`adb`."""
        return "adb"

    @property
    def root(self) -> str:
        """The one folder that adb's shell may write to and execute from on an unrooted phone."""
        return "/data/local/tmp"

    def shell(self, line: str) -> list[str]:
        """Return the command here that runs a line in the device's shell."""
        return [self.program, "-s", self.name, "shell", "-T", line]

    def send(self, file: Path, path: str) -> None:
        """Copy a file there, with its permissions.

        Raises:
            IncompleteError: It did not arrive.
        """
        self._transfer("push", str(file), path, f"while {file.name} was copied to it")

    def fetch(self, path: str, to: Path) -> None:
        """Copy a file from there.

        Raises:
            IncompleteError: It did not arrive.
        """
        self._transfer("pull", path, str(to), f"while {path.rpartition('/')[2]} was copied from it")

    def _transfer(self, verb: str, source: str, to: str, when: str) -> None:
        command = [self.program, "-s", self.name, verb, source, to]
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_TRANSFER_S, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise gone(self, when) from error
        if done.returncode != 0:
            if state(self.program, self.name) == "device":
                why = " ".join((done.stdout + done.stderr).decode(errors="replace").split())
                raise IncompleteError(f"adb {self.name}: adb {verb} failed: {why}")
            raise gone(self, when, done.stderr)


def find(serial: str = "") -> Remote:
    """Return the device of that serial number, or the only one that is connected.

    Raises:
        ToolMissingError: adb is not installed (exit code 5).
        InputError: No such device, none at all, several, or one that does not let this machine in (exit code 2).
        IncompleteError: It went away.
    """
    program = _program()
    connected = devices(program)
    shown = ", ".join(f"{name} ({state})" for name, state in connected.items())
    if not connected:
        raise InputError(
            "adb: no device is connected", remedy="connect one with USB debugging on, or run: adb connect HOST:PORT"
        )
    if serial and serial not in connected:
        raise InputError(f"adb: no device '{serial}'; connected: {shown}")
    if not serial and len(connected) > 1:
        raise InputError(f"adb: several devices are connected: {shown}", remedy="name one: adb:SERIAL")
    chosen = serial or next(iter(connected))
    if connected[chosen] != "device":
        found = connected[chosen]
        remedy = next((text for start, text in _STATES.items() if found.startswith(start)), "reconnect it")
        raise InputError(f"adb {chosen}: the device is '{found}'", remedy=remedy)
    return open_remote(Adb(program=program, name=chosen))


def devices(program: str) -> dict[str, str]:
    """Return serial number -> state of what adb sees.

    Raises:
        ToolMissingError: adb's server does not start, or does not answer.
    """
    remedy = "run: adb kill-server"
    try:
        done = subprocess.run(
            [program, "devices"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=ANSWER_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ToolMissingError(f"'adb devices' did not answer within {ANSWER_S:g} s", remedy=remedy) from error
    if done.returncode != 0:
        raise ToolMissingError(f"'adb devices' failed: {' '.join(done.stderr.split())}", remedy=remedy)
    _, _, listed = done.stdout.partition("List of devices attached\n")
    pairs = (line.split("\t", 1) for line in listed.splitlines() if "\t" in line)
    return {serial: state.strip() for serial, state in pairs}


def state(program: str, serial: str) -> str:
    """Return the state of one device; empty where adb does not see it."""
    return devices(program).get(serial, "")


def _program() -> str:
    if found := shutil.which("adb"):
        return found
    raise ToolMissingError(
        "adb is not on the PATH",
        remedy="install Android's platform tools; on Debian and Ubuntu: apt-get install adb",
    )
