"""The shared library of a bundle as a function of a picture: loaded into this process, or run under emulation.

Under emulation a small host program loads it as Android would.
"""

from __future__ import annotations

import ctypes
import io
import logging
import math
import platform
import re
import shutil
import struct
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgekit.backends.tvm import driver, link
from edgekit.backends.tvm.program import ALIGNMENT
from edgekit.bundle import Built
from edgekit.errors import IncompleteError, InputError, IntegrityError
from edgekit.runners import Runner, qemu
from edgekit.target import Target

if TYPE_CHECKING:
    from edgekit.backends import Array, Level, Session

_LIBRARY = re.compile(r"lib(edgekit_\w+)\.so")
_REQUEST = struct.Struct("<If")
_REPLY = struct.Struct("<iI")
_POINTER = ctypes.c_void_p
# UNSUPPORTED_CPU of the library's header.
_UNSUPPORTED_CPU = 11

log = logging.getLogger(__name__)


class Trial(IntEnum):
    """What the host hands to the library: correct arguments, or one wrong on purpose."""

    CORRECT = 0
    NULL_NOISY = 1
    NULL_DENOISED = 2
    NULL_WORKSPACE = 3
    SMALL_WORKSPACE = 4
    SKEWED_WORKSPACE = 5
    IN_PLACE = 6
    IN_WORKSPACE = 7


@dataclass(frozen=True, kw_only=True)
class Request:
    """One call of the library."""

    noisy: Array
    sigma: float
    trial: Trial = Trial.CORRECT


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the library answered: its code, its text for that code, and the picture, (1, c, h, w)."""

    code: int
    text: str
    denoised: Array


@dataclass(frozen=True, kw_only=True)
class Host:
    """The host program and the library that it loads.

    shape: Shape of the picture that the library takes, (1, c, h, w).
    folder: Holds the program `host`.
    """

    runner: Runner
    library: Path
    prefix: str
    shape: tuple[int, int, int, int]
    folder: tempfile.TemporaryDirectory[str]

    def ask(self, requests: Sequence[Request]) -> list[Answer]:
        """Return the library's answers to calls that one process makes one after the other.

        Raises:
            InputError: A picture is not of the shape that the library was compiled for.
            IntegrityError: The library does not load or was killed.
        """
        argv = [str(Path(self.folder.name) / "host"), str(self.library), self.prefix, str(math.prod(self.shape))]
        done = self.runner.run(argv, b"".join(map(self._packed, requests)))
        if done.code != 0:
            why = done.stderr.decode(errors="replace").strip()
            raise IntegrityError(f"{self.library.name} on {self.runner.label} ended with code {done.code}: {why}")
        replies = io.BytesIO(done.stdout)
        return [self._unpacked(replies) for _ in requests]

    def _packed(self, request: Request) -> bytes:
        if request.noisy.shape != self.shape:
            raise InputError(f"{self.library.name} takes a tile of shape {self.shape}, found {request.noisy.shape}")
        return _REQUEST.pack(request.trial, request.sigma) + np.ascontiguousarray(request.noisy, dtype="<f4").tobytes()

    def _unpacked(self, replies: io.BytesIO) -> Answer:
        code, text_bytes = _REPLY.unpack(replies.read(_REPLY.size))
        text = replies.read(text_bytes).decode("ascii")
        denoised = np.frombuffer(replies.read(4 * math.prod(self.shape)), dtype="<f4").astype(np.float32)
        return Answer(code=code, text=text, denoised=denoised.reshape(self.shape))


class EmulatedSession:
    """The library as a function of a picture."""

    level: Level = "emulated"

    def __init__(self, host: Host) -> None:
        self._host = host

    def __call__(self, noisy: Array, sigma: float) -> Array:
        """Return the denoised picture, shaped as `noisy` (1, c, h, w), which must be one tile.

        Raises:
            InputError: The picture is not of the tile's shape, or the library refuses sigma.
            IntegrityError: The library does not load or was killed.
        """
        (answer,) = self._host.ask([Request(noisy=noisy, sigma=sigma)])
        if answer.code != 0:
            raise InputError(f"{self._host.library.name} refuses the picture: {answer.text}")
        return answer.denoised


class NativeSession:
    """The library, loaded into this process, as a function of a picture; one thread at a time, others wait."""

    level: Level = "native"

    def __init__(self, library: Path, built: Built) -> None:
        prefix, self._shape = _interface(library, built)
        self._name = library.name
        loaded = _loaded(library)
        self._denoise = getattr(loaded, f"{prefix}_tile_f32")
        self._denoise.argtypes = (_POINTER, ctypes.c_float, _POINTER, _POINTER, ctypes.c_size_t)
        self._error_text = getattr(loaded, f"{prefix}_error_text")
        self._error_text.restype = ctypes.c_char_p
        workspace_size = getattr(loaded, f"{prefix}_tile_workspace_size")
        workspace_size.restype = ctypes.c_size_t
        self._workspace_bytes = int(workspace_size())
        memory = np.zeros(self._workspace_bytes + ALIGNMENT, np.uint8)
        self._workspace = memory[-memory.ctypes.data % ALIGNMENT :]
        self._workspace_free = threading.Lock()

    def __call__(self, noisy: Array, sigma: float) -> Array:
        """Return the denoised picture, shaped as `noisy` (1, c, h, w), which must be one tile.

        Raises:
            InputError: The picture is not of the tile's shape, or the library refuses sigma.
            IncompleteError: The processor lacks instructions that the library is made of.
        """
        if noisy.shape != self._shape:
            raise InputError(f"{self._name} takes a tile of shape {self._shape}, found {noisy.shape}")
        given, denoised = np.ascontiguousarray(noisy, np.float32), np.empty(self._shape, np.float32)
        pointers = (given.ctypes.data, sigma, denoised.ctypes.data, self._workspace.ctypes.data)
        with self._workspace_free:
            code = self._denoise(*pointers, self._workspace_bytes)
        if code:
            text = self._error_text(code).decode()
            if code == _UNSUPPORTED_CPU:
                raise IncompleteError(f"{self._name} cannot be run here: {text}")
            raise InputError(f"{self._name} refuses the picture: {text}")
        return denoised

    def try_processor(self) -> None:
        """Denoise a black tile, whose picture nobody sees; raises as a call."""
        self(np.zeros(self._shape, np.float32), 0.0)


def open_session(bundle: Path, built: Built, target: Target, *, threads: int = 1) -> list[tuple[str, Session]]:
    """Open the bundle's library: under QEMU, once for each core of `target.runner.cpus`, or in this process.

    Args:
        bundle: The folder that `built.files` is relative to.
        built: What `build` returned, or the same read from a manifest.
        target: Names the cores.
        threads: Ignored, as the library runs in its caller's thread.

    Raises:
        IncompleteError: This machine, or its processor, cannot run the target's code.
        ToolMissingError: QEMU is not installed.
    """
    library = bundle / built.files["artifact"]
    if target.runner.kind == "qemu":
        runners = [qemu.find(cpu) for cpu in target.runner.cpus]
        folder = host_folder()
        return [(runner.label, EmulatedSession(open_host(library, built, runner, folder))) for runner in runners]
    triple = target.isa.triple if target.isa is not None else ""
    if target.runner.kind == "local" and triple.startswith(f"{platform.machine()}-linux-gnu"):
        session = NativeSession(library, built)
        session.try_processor()
        return [(f"tvm {triple}", session)]
    raise IncompleteError(
        f"target '{target.name}': runner '{target.runner.kind}' cannot run code for '{triple}' on this machine"
    )


def _loaded(library: Path) -> ctypes.CDLL:
    """Return the library, loaded into this process.

    A loader takes a path that it knows for what it loaded from there, though another file may lie there since: one that
    was compiled again. So it is told another path each time; whether it knows the file, it then sees by the file.
    """
    with tempfile.TemporaryDirectory(prefix="edgekit-library-") as folder:
        path = Path(folder, library.name)
        path.symlink_to(library.resolve())
        try:
            return ctypes.CDLL(str(path))
        except OSError as error:
            raise IntegrityError(f"{library.name} does not load: {error}") from error


def open_host(library: Path, built: Built, runner: Runner, folder: tempfile.TemporaryDirectory[str]) -> Host:
    """Return a host for the library of a bundle, run by `runner`."""
    prefix, shape = _interface(library, built)
    return Host(runner=runner, library=library.resolve(), prefix=prefix, shape=shape, folder=folder)


def _interface(library: Path, built: Built) -> tuple[str, tuple[int, int, int, int]]:
    """Return the prefix of a library's functions and the shape of the picture that it takes."""
    if (match := _LIBRARY.fullmatch(library.name)) is None or not library.is_file():
        raise IntegrityError(f"{library} is not a library that edgekit compiled")
    width, height = (int(size) for size in str(built.facts["tile"]).split("x"))
    return match[1], (1, int(built.facts["channels"]), height, width)


@cache
def host_folder() -> tempfile.TemporaryDirectory[str]:
    """Return the folder of the program `host`, compiled once per process and removed when the process ends."""
    log.info("compiling the program that loads the library under emulation")
    folder = tempfile.TemporaryDirectory(prefix="edgekit-host-")
    work = Path(folder.name)
    for name in ("host.c", "memory.c"):
        shutil.copyfile(driver.C_FOLDER / name, work / name)
    link.link_program([link.compile_c(work / name, link.LINUX) for name in ("host.c", "memory.c")], work / "host")
    return folder
