"""The program that measures a library on a device: how it is built, told what to do, and read."""

from __future__ import annotations

import json
import logging
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from edgekit.backends.tvm import driver, link
from edgekit.bundle import Built
from edgekit.errors import IntegrityError, UnsupportedError
from edgekit.runners import Runner, facts
from edgekit.target import Isa

PROGRAM = "bench"
_ALL = 0xFFFF_FFFF_FFFF_FFFF
_LIBRARY = re.compile(r"lib(edgekit_\w+)\.so")
# What a variant needs; the library takes the first of its variants that the processor can run (variants.py).
_NEEDS: Mapping[str, str] = {"dotprod": "asimddp", "amx": "amx_int8"}

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Library:
    """A bundle's library as the program is told of it.

    isa: What it was compiled for. channels, height, width: Of the tile that one call takes.
    variants: In the order in which they are tried.
    """

    file: Path
    isa: Isa
    channels: int
    height: int
    width: int
    variants: tuple[str, ...]

    @property
    def prefix(self) -> str:
        """Prefix of its functions' names."""
        match = _LIBRARY.fullmatch(self.file.name)
        assert match is not None, "checked by library_of"
        return match[1]

    @property
    def machine(self) -> str:
        """Processor, as `aarch64`."""
        return self.isa.triple.partition("-")[0]

    def variant(self, features: Sequence[str]) -> str:
        """Return the name of the variant that it takes on a processor with these features."""
        return next(name for name in self.variants if name not in _NEEDS or _NEEDS[name] in features)


@dataclass(frozen=True, kw_only=True)
class Order:
    """What the program shall do.

    sigma: Of all pictures, on the scale [0, 1]. noisy: File there, pictures of float32, planes of rows.
    denoised: Name of the file to be written there; None: only the first picture is read, and none is written.
    runs, seconds: The first picture is denoised so often and so long, each run timed, after `warm_up` runs.
    side, threads: Then a picture of bytes with sides of so many pixels, as often, by so many threads; 0: none.
    without: Features that the library shall believe the processor to lack.
    """

    sigma: float
    noisy: str
    denoised: str | None
    warm_up: int = 0
    runs: int = 0
    seconds: int = 0
    side: int = 0
    threads: int = 1
    without: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Told:
    """What the program measured; times in nanoseconds.

    peak_kib: Most memory that the program held; 0 where the system does not tell.
    features: Those that the library was told of by the kernel; empty on x86, where it does not ask.
    cores: Core -> how many of the runs ended on it. pictures_ns: Runs of the larger picture.
    """

    version: str
    workspace_bytes: int
    peak_kib: int
    page_bytes: int
    features: tuple[str, ...]
    load_ns: int
    first_ns: int
    cores: Mapping[str, int]
    runs_ns: tuple[int, ...]
    pictures_ns: tuple[int, ...]


def library_of(bundle: Path, built: Built, isa: Isa | None) -> Library:
    """Return the library of a bundle.

    Raises:
        IntegrityError: It is none that edgekit compiled.
    """
    file = bundle / built.files["artifact"]
    if isa is None or _LIBRARY.fullmatch(file.name) is None:
        raise IntegrityError(f"{file} is not a library that edgekit compiled")
    width, height = (int(size) for size in str(built.facts["tile"]).split("x"))
    return Library(
        file=file,
        isa=isa,
        channels=int(built.facts["channels"]),
        height=height,
        width=width,
        variants=tuple(str(built.facts.get("variants", built.precision)).split()),
    )


def push(library: Library, runner: Runner) -> tuple[str, str]:
    """Copy the program and the library to a device; return their paths there."""
    return runner.push(_program(library.machine)), runner.push(library.file)


def argv(library: Library, program: str, there: str, order: Order) -> list[str]:
    """Return the command line.

    Raises:
        UnsupportedError: A feature that cannot be hidden from the library.
    """
    if unknown := sorted(set(order.without) - set(facts.HWCAP_BITS)):
        raise UnsupportedError(
            f"the feature '{unknown[0]}' cannot be hidden from a library",
            remedy=f"one of {', '.join(facts.HWCAP_BITS)}, on 64-bit ARM",
        )
    mask = _ALL & ~sum(1 << facts.HWCAP_BITS[name] for name in set(order.without))
    return [
        program,
        there,
        library.prefix,
        *map(str, (library.channels, library.width, library.height)),
        float(np.float32(order.sigma)).hex(),
        order.noisy,
        order.denoised or "-",
        *map(str, (order.warm_up, order.runs, order.seconds, order.side, order.threads)),
        f"{mask:x}",
    ]


def run(library: Library, runner: Runner, order: Order, *, timeout_s: float) -> Told:
    """Run the program on a device, and return what it measured; the pictures lie there, under their name.

    Raises:
        IntegrityError: The library does not load there, refuses a picture, or crashes.
        IncompleteError: The device went away, or the time was up.
    """
    program, there = push(library, runner)
    done = runner.run(argv(library, program, there, order), timeout_s=timeout_s)
    if done.code != 0:
        why = " ".join(done.stderr.decode(errors="replace").split())
        raise IntegrityError(
            f"{library.file.name} on {runner.label}: the program that measures it {done.ending()}"
            + (f": {why}" if why else "")
        )
    return told(done.stdout, library)


def told(stdout: bytes, library: Library) -> Told:
    """Return what the program's output says.

    Raises:
        IntegrityError: It is not what the program writes.
    """
    try:
        raw = json.loads(stdout)
        hwcap, hwcap2 = int(raw.pop("hwcap")), int(raw.pop("hwcap2"))
        features = facts.arm64_features(hwcap, hwcap2) if library.machine == "aarch64" else ()
        runs_ns, pictures_ns = tuple(raw.pop("runs_ns")), tuple(raw.pop("pictures_ns"))
        return Told(features=features, runs_ns=runs_ns, pictures_ns=pictures_ns, **raw)
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{library.file.name}: the program that measures it wrote {stdout[:80]!r}") from error


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="edgekit-bench-")


@cache
def _program(machine: str) -> Path:
    """Return the program for a processor, compiled once per process and removed when the process ends."""
    log.info("compiling the program that measures for %s", machine)
    folder = Path(_folder().name) / machine
    folder.mkdir(exist_ok=True)
    link.compile_program(driver.C_FOLDER / "bench.c", folder / PROGRAM, f"{machine}-linux-musl")
    return folder / PROGRAM
