"""What `edgekit bench` measured on a device: the record, its file, and the files that lie beside a bundle."""

from __future__ import annotations

import glob
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

from edgekit import config
from edgekit.errors import InputError
from edgekit.files import write_json
from edgekit.report import Percentiles
from edgekit.runners import Kind, Level
from edgekit.runners.facts import Facts
from edgekit.target import STRICT

SCHEMA_VERSION = 2
KIND = "edgekit-device-measurement"
_AGAIN = "measure it again: edgekit bench BUNDLE --device DEVICE"


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Times on the device.

    call: Of one tile, by one thread. megapixel: Of a megapixel delivered of a picture of `side` x `side` pixels, by
        `threads` threads: what its tiles compute twice, their halo, is in it; None where no such picture was timed.
    load_us: From opening the library to its last relocation; None where an engine loads it.
    first_us: The first call after that.
    cores: Core -> how many of the runs ended on it.
    """

    __pydantic_config__: ClassVar = STRICT
    call: Percentiles
    megapixel: Percentiles | None
    side: int
    threads: int
    runs: int
    picture_runs: int
    load_us: int | None
    first_us: int
    cores: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Of the golden pictures as the device denoised them, in thousandths of a dB.

    psnr_mdb: Against the clean pictures. agreement_mdb: PSNR against the bundle's golden outputs, the least of all
        pictures, 100 dB where equal; None where the bundle has none. pictures_sha256: Of the clean pictures.
    seed: Of their noise; 0 in records of before it was told, as almost all bundles have it.
    """

    __pydantic_config__: ClassVar = STRICT
    psnr_mdb: int
    agreement_mdb: int | None
    pictures: int
    pictures_sha256: str
    sigma255: float
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Instructions:
    """Instructions of one call, by the difference of `pictures` calls and one, so that loading drops out."""

    __pydantic_config__: ClassVar = STRICT
    cpu: str
    qemu: str
    per_call: int
    pictures: int
    of_all: int
    of_one: int


@dataclass(frozen=True, kw_only=True)
class CostCard:
    """What one call costs, without a clock; None where the artifact does not tell.

    macs: Multiply-accumulates of the graph for one tile. peak_memory_kib: Of the whole program that measured.
    """

    __pydantic_config__: ClassVar = STRICT
    macs: int
    artifact_bytes: int
    weights_bytes: int | None
    arena_bytes: int | None
    stack_bytes: int | None
    peak_memory_kib: int | None
    instructions: Instructions | None
    instructions_reason: str


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What one call takes, in pixels, and what of it can be delivered where tiles lie on all its sides."""

    __pydantic_config__: ClassVar = STRICT
    height: int
    width: int
    halo: int
    delivered_pixels: int


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What one artifact does on one device.

    level: `emulated` has no latency. emulated_us: How long the emulator took for one call; says nothing of the device.
    variant: Of the library's, the one that ran. features: What the program was told of the processor.
    hidden: Features that the library was made to believe the processor lacks.
    before, after: What the device told of itself around the runs; the temperature and the governor are what changes.
    """

    __pydantic_config__: ClassVar = STRICT
    target: str
    model: str
    precision: str
    artifact_sha256: str
    device: Kind
    level: Level
    variant: str
    features: tuple[str, ...]
    shape: Shape
    latency: Latency | None
    emulated_us: int | None
    quality: Quality
    cost: CostCard
    before: Facts
    after: Facts
    protocol: str
    tools: Mapping[str, str]
    date: str
    hidden: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The device's name, as "Google Pixel 7"; its processor where it has none."""
        told = self.before
        return (told.cpu if self.device == "qemu" else told.model or told.cpu) or "a device without a name"

    @property
    def no_latency(self) -> str:
        """Why its time is no latency; empty where it is one."""
        emulated = self.device == "qemu" or self.level == "emulated" or self.before.emulated
        return f"{self.name} was emulated, and emulated time is not latency" if emulated or not self.latency else ""

    @property
    def not_counted(self) -> str:
        """Why it decides nothing; empty where it may."""
        if self.no_latency or not self.hidden:
            return self.no_latency
        return f"{', '.join(self.hidden)} was hidden from the library: it is not what {self.name} does"

    def as_json(self) -> dict[str, object]:
        """Return the record for a file."""
        return {"schema_version": SCHEMA_VERSION, "kind": KIND, **asdict(self)}


def default_path(bundle: Path, measured: Measurement) -> Path:
    """Return where a record goes: beside its bundle, as `<bundle>.bench.adb-google-pixel-7.json`.

    One that was made with hidden features goes where `beside` does not find it, as
    `<bundle>.bench-without-asimddp.adb-google-pixel-7.json`.
    """
    name = "-".join(re.findall(r"[a-z0-9]+", f"{measured.device} {measured.name}".lower()))
    without = "".join(f"-{feature}" for feature in ("without", *measured.hidden)) if measured.hidden else ""
    return bundle.resolve().with_name(f"{bundle.resolve().name}.bench{without}.{name}.json")


def beside(bundle: Path) -> list[Path]:
    """Return the records that lie beside a bundle, sorted."""
    whole = bundle.resolve()
    return sorted(whole.parent.glob(f"{glob.escape(whole.name)}.bench.*.json"))


def write(measured: Measurement, path: Path) -> Path:
    """Write a record to a file; return where it lies."""
    write_json(path, measured.as_json())
    return path


def read(path: Path) -> Measurement:
    """Return the record in a file.

    Raises:
        InputError: No such file, another kind of file, or a record of another version of edgekit.
        IntegrityError: It is damaged.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file", remedy="make one: edgekit bench BUNDLE --device DEVICE -o FILE")
    return config.record(
        path, Measurement, kind=KIND, version=SCHEMA_VERSION, called="a record of edgekit bench", again=_AGAIN
    )
