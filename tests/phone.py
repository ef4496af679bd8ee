"""The device side of adb, as far as `adb connect`, `shell`, `push` and `pull` need it, for the real client.

Spoken over TCP: the transport's messages (CNXN, AUTH, OPEN, OKAY, WRTE, CLSE), the shell service in its second version
(standard streams and exit code apart), and the sync service in its first (STAT, SEND, RECV). The phone is a folder; its
programs are arm64 programs that run under QEMU, its shell is this machine's.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import socket
import stat
import struct
import subprocess
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

CNXN, AUTH, OPEN, OKAY, CLSE, WRTE = (
    int.from_bytes(name, "little") for name in (b"CNXN", b"AUTH", b"OPEN", b"OKAY", b"CLSE", b"WRTE")
)
VERSION, MOST_BYTES, TOKEN = 0x01000001, 256 * 1024, 1
MESSAGE = struct.Struct("<6I")
PACKET = struct.Struct("<BI")
STDIN, STDOUT, STDERR, EXIT, CLOSE_STDIN = range(5)
# Read through the shell; on the phone they are its own.
OWN = ("/data/local/tmp", "/proc/cpuinfo", "/sys/devices/system/cpu", "/sys/class/thermal")
PROPERTIES = {
    "ro.product.manufacturer": "edgekit",
    "ro.product.model": "Phone 1",
    "ro.soc.manufacturer": "QEMU",
    "ro.soc.model": "virt",
    "ro.build.version.release": "14",
    "ro.build.version.sdk": "34",
}
CPUINFO = """\
processor\t: 0
Features\t: fp asimd evtstrm aes asimdhp asimddp
CPU implementer\t: 0x41
CPU part\t: 0xd05

processor\t: 1
Features\t: fp asimd evtstrm aes asimdhp asimddp
CPU implementer\t: 0x41
CPU part\t: 0xd0b
"""


class Phone:
    """A phone on a port of this machine.

    root: The folder that is the phone. serial: As `adb devices` lists it, once it is connected.
    locked: It asks for keys, and takes none: its owner allows nobody in.
    full: It has no room for files. cuts: So many bytes are missing at the end of each file that is fetched.
    """

    full, cuts = False, 0

    def __init__(self, root: Path, cpu: str, properties: dict[str, str] | None = None, *, locked: bool = False) -> None:
        self.root, self.locked, self._cpu = root, locked, cpu
        self._emulator = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
        self._furnish(PROPERTIES | (properties or {}))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.serial = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._connections: list[socket.socket] = []
        self._children: list[subprocess.Popen[bytes]] = []
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def files(self) -> list[Path]:
        """Return what lies in the folder that adb's shell may write to."""
        return sorted(p for p in (self.root / "data/local/tmp").rglob("*"))

    def unplug(self) -> None:
        """Be gone from one moment to the next."""
        # Closing alone leaves the thread that waits in `accept` one more connection.
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in self._connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()
        for child in self._children:
            # What the shell started goes with it.
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)

    def shell(self, line: str) -> subprocess.Popen[bytes]:
        for path in OWN:
            line = line.replace(path, f"{self.root}{path}")
        child = subprocess.Popen(
            ["/bin/sh", "-c", line],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={"PATH": f"{self.root}/system/bin:{os.environ['PATH']}"},
            start_new_session=True,
        )
        self._children.append(child)
        return child

    def put(self, path: str, content: bytes, mode: int) -> None:
        """Keep a file; an arm64 program gets a script in front of it that runs it under QEMU."""
        file = self.root / path.lstrip("/")
        if content[:4] == b"\x7fELF" and content[16:20] == struct.pack("<HH", 2, 183):
            program = file.with_suffix(".elf")
            program.write_bytes(content)
            program.chmod(0o755)  # QEMU ends with 1 and no word else
            content = f'#!/bin/sh\nexec {self._emulator} -cpu {self._cpu} {program} "$@"\n'.encode()
        file.write_bytes(content)
        file.chmod(mode & 0o777)

    def _furnish(self, properties: dict[str, str]) -> None:
        (self.root / "data/local/tmp").mkdir(parents=True)
        (self.root / "system/bin").mkdir(parents=True)
        cases = "".join(f"{name}) echo '{value}';;\n" for name, value in properties.items())
        getprop = self.root / "system/bin/getprop"
        getprop.write_text(f'#!/bin/sh\ncase "$1" in\n{cases}esac\n')
        getprop.chmod(0o755)
        (self.root / "system/bin/uname").write_text('#!/bin/sh\n[ "$1" = -m ] && echo aarch64 || echo 6.1.0\n')
        (self.root / "system/bin/uname").chmod(0o755)
        (self.root / "proc").mkdir()
        (self.root / "proc/cpuinfo").write_text(CPUINFO)
        for index, khz in enumerate(("1800000", "2400000")):
            core = self.root / f"sys/devices/system/cpu/cpu{index}/cpufreq"
            core.mkdir(parents=True)
            for name, text in (("min", "300000"), ("max", khz)):
                (core / f"cpuinfo_{name}_freq").write_text(f"{text}\n")
            (core / "scaling_governor").write_text("schedutil\n")
        for index, (name, text) in enumerate(
            (("battery", "31000"), ("cpu-0-0-usr", "42500"), ("cpu-1-0-usr", "44100"))
        ):
            zone = self.root / f"sys/class/thermal/thermal_zone{index}"
            zone.mkdir(parents=True)
            (zone / "type").write_text(f"{name}\n")
            (zone / "temp").write_text(f"{text}\n")

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._connections.append(connection)
                threading.Thread(target=_Connection(self, connection).serve, daemon=True).start()


class _Connection:
    """One client: messages for several streams."""

    def __init__(self, phone: Phone, connection: socket.socket) -> None:
        self._phone, self._connection = phone, connection
        self._lock, self._streams = threading.Lock(), dict[int, _Stream]()

    def serve(self) -> None:
        with suppress(OSError, EOFError):
            while True:
                command, theirs, ours, size, _, _ = MESSAGE.unpack(self._exactly(MESSAGE.size))
                content = self._exactly(size)
                if self._phone.locked and command in (CNXN, AUTH):
                    self.send(AUTH, TOKEN, 0, bytes(20))
                elif command == CNXN:
                    self.send(CNXN, VERSION, MOST_BYTES, b"device::ro.product.name=edgekit;features=shell_v2,cmd")
                elif command == OPEN:
                    self._open(theirs, content.rstrip(b"\0").decode())
                elif ours in self._streams:
                    self._streams[ours].handle(command, content)

    def send(self, command: int, first: int, second: int, content: bytes = b"") -> None:
        header = MESSAGE.pack(command, first, second, len(content), sum(content) & 0xFFFFFFFF, command ^ 0xFFFFFFFF)
        with self._lock:
            self._connection.sendall(header + content)

    def _open(self, theirs: int, service: str) -> None:
        stream = _Stream(self, len(self._streams) + 1, theirs)
        self._streams[stream.ours] = stream
        self.send(OKAY, stream.ours, theirs)
        serve: Callable[[], None] = partial(_sync, self._phone, stream)
        if service.startswith("shell,v2"):
            serve = partial(_shell, self._phone, stream, service.partition(":")[2])
        threading.Thread(target=_then_close, args=(serve, stream), daemon=True).start()

    def _exactly(self, size: int) -> bytes:
        got = b""
        while len(got) < size:
            more = self._connection.recv(size - len(got))
            if not more:
                raise EOFError
            got += more
        return got


class _Stream:
    """One service of one client, as bytes in and out; each block out waits until it is acknowledged."""

    def __init__(self, connection: _Connection, ours: int, theirs: int) -> None:
        self.ours, self._theirs, self._connection = ours, theirs, connection
        self._acknowledged = threading.Event()
        self._arrived, self._content, self._ended = threading.Condition(), b"", False

    def handle(self, command: int, content: bytes) -> None:
        if command == OKAY:
            self._acknowledged.set()
            return
        with self._arrived:
            self._content += content
            self._ended |= command == CLSE
            self._arrived.notify()
        if command == WRTE:
            self._connection.send(OKAY, self.ours, self._theirs)

    def read(self, size: int) -> bytes:
        with self._arrived:
            self._arrived.wait_for(lambda: len(self._content) >= size or self._ended)
            got, self._content = self._content[:size], self._content[size:]
            return got

    def write(self, content: bytes) -> None:
        for start in range(0, len(content), MOST_BYTES):
            self._acknowledged.clear()
            self._connection.send(WRTE, self.ours, self._theirs, content[start : start + MOST_BYTES])
            self._acknowledged.wait(60)

    def close(self) -> None:
        self._connection.send(CLSE, self.ours, self._theirs)


def _then_close(serve: Callable[[], None], stream: _Stream) -> None:
    with suppress(OSError, struct.error):
        serve()
        stream.close()


def _shell(phone: Phone, stream: _Stream, line: str) -> None:
    child = phone.shell(line)
    assert child.stdin is not None
    assert child.stdout is not None
    assert child.stderr is not None
    lock = threading.Lock()

    def pump(number: int, source: int) -> None:
        with suppress(OSError):  # a client that hangs up early
            while block := os.read(source, MOST_BYTES // 2):
                with lock:
                    stream.write(PACKET.pack(number, len(block)) + block)

    def feed(target: int) -> None:
        with suppress(OSError, struct.error):
            while True:
                number, size = PACKET.unpack(stream.read(PACKET.size))
                if number == CLOSE_STDIN:
                    break
                os.write(target, stream.read(size))
        os.close(target)

    threads = [
        threading.Thread(target=pump, args=(number, source.fileno()), daemon=True)
        for number, source in ((STDOUT, child.stdout), (STDERR, child.stderr))
    ]
    threading.Thread(target=feed, args=(os.dup(child.stdin.fileno()),), daemon=True).start()
    child.stdin.close()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    code = child.wait()
    stream.write(PACKET.pack(EXIT, 1) + bytes([code if code >= 0 else 128 - code]))


def _sync(phone: Phone, stream: _Stream) -> None:
    while len(header := stream.read(8)) == 8:
        name, size = header[:4], int.from_bytes(header[4:], "little")
        if name == b"QUIT":
            return
        path = stream.read(size).decode()
        answer = {b"STAT": _stat, b"SEND": _receive, b"RECV": _send}[name]
        answer(phone, stream, path)


def _stat(phone: Phone, stream: _Stream, path: str) -> None:
    file = phone.root / path.lstrip("/")
    found = file.stat() if file.exists() else None
    size = found.st_size if found and stat.S_ISREG(found.st_mode) else 0
    stream.write(b"STAT" + struct.pack("<3I", found.st_mode if found else 0, size, 0))


def _receive(phone: Phone, stream: _Stream, path_and_mode: str) -> None:
    path, _, mode = path_and_mode.rpartition(",")
    content = b""
    while True:
        name, size = struct.unpack("<4sI", stream.read(8))
        if name == b"DONE":
            break
        content += stream.read(size)
    try:
        if phone.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        phone.put(path, content, int(mode))
    except OSError as error:
        stream.write(_failure(error))
    else:
        stream.write(b"OKAY" + bytes(4))


def _send(phone: Phone, stream: _Stream, path: str) -> None:
    try:
        content = (phone.root / path.lstrip("/")).read_bytes()
        content = content[: len(content) - phone.cuts]
    except OSError as error:
        stream.write(_failure(error))
        return
    for start in range(0, len(content), 65536):
        block = content[start : start + 65536]
        stream.write(b"DATA" + struct.pack("<I", len(block)) + block)
    stream.write(b"DONE" + bytes(4))


def _failure(error: OSError) -> bytes:
    why = str(error.strerror).encode()
    return b"FAIL" + struct.pack("<I", len(why)) + why
