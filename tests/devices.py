"""Fixtures' parts: an adb server of the tests' own with phones, and a board in ssh's reach."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from board import Board, sshd
from phone import Phone


@contextmanager
def adb_server(folder: Path) -> Iterator[None]:
    """Give an adb server on a socket of its own, with keys of its own, that knows no device yet."""
    if not shutil.which("adb"):
        pytest.skip("adb is not installed: apt-get install adb")
    with pytest.MonkeyPatch.context() as patch:
        # A file, as another test could take a port before the server does.
        patch.setenv("ADB_SERVER_SOCKET", f"localfilesystem:{folder}/server")
        patch.delenv("ANDROID_ADB_SERVER_PORT", raising=False)
        patch.delenv("ANDROID_SERIAL", raising=False)
        # The server alone gets another home, where it makes its keys: zig's cache lies in the true one.
        subprocess.run(["adb", "start-server"], env=os.environ | {"HOME": str(folder)}, capture_output=True, check=True)
        try:
            yield
        finally:
            adb("kill-server")


@contextmanager
def connected(folder: Path, **options: object) -> Iterator[Phone]:
    """Give a phone that the adb server knows."""
    phone = Phone(folder / "phone", "cortex-a76", **options)
    try:
        adb("connect", phone.serial)
        yield phone
    finally:
        adb("disconnect", phone.serial)
        phone.unplug()


@contextmanager
def board(folder: Path) -> Iterator[Board]:
    """Give a board that `ssh board` reaches."""
    if not (shutil.which("ssh") and sshd()):
        pytest.skip("sshd is not installed: apt-get install openssh-server")
    made = Board(folder / "board", "cortex-a72")
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PATH", str(made.bin), prepend=os.pathsep)
            yield made
    finally:
        made.unplug()


def adb(*arguments: str) -> str:
    done = subprocess.run(["adb", *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr
