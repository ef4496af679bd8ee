"""Devices by name: local, qemu:CPU, adb:SERIAL, ssh:HOST."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from edgekit.errors import InputError, nearest
from edgekit.runners import Runner, adb, qemu, ssh
from edgekit.runners.local import Local

KINDS = ("local", "qemu", "adb", "ssh")


@contextmanager
def find(name: str) -> Iterator[Runner]:
    """Give the device of that name; its folder there goes when the block ends.

    Args:
        name: `local`, `qemu:CPU`, `adb:SERIAL`, `adb` (the only one that is connected), or `ssh:HOST`.

    Raises:
        InputError: No such kind, no such device, or several (exit code 2).
        ToolMissingError: adb, ssh or QEMU is not installed (exit code 5).
    """
    opened = _open(name)
    try:
        yield opened
    finally:
        opened.close()


def _open(name: str) -> Runner:
    kind, _, rest = name.partition(":")
    if kind == "qemu":
        return qemu.find(rest)
    if kind == "adb":
        return adb.find(rest)
    if kind == "ssh":
        return ssh.find(rest)
    if name == "local":
        return Local()
    raise InputError(
        f"--device {name}: no such kind of device ({nearest(kind, KINDS)})",
        remedy="give local, qemu:CPU, adb:SERIAL or ssh:HOST",
    )
