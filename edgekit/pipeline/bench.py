"""bundle, device -> measurement: the artifact itself, timed on the device that it is for, and its pictures judged here.

Emulated time is never a latency: on an emulated core the cost is counted in instructions.
"""

from __future__ import annotations

import importlib
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgekit import __version__, backends, bundle
from edgekit.backends import Session
from edgekit.bundle import Built, Manifest, artifact_files, combined_sha256
from edgekit.data import sets
from edgekit.data.sets import PictureSet
from edgekit.errors import IncompleteError, IntegrityError, ToolMissingError, UnsupportedError
from edgekit.graph import checks, cost
from edgekit.measure import quality
from edgekit.measure.quality import CEILING_MDB, Array
from edgekit.pipeline.golden import GOLDEN_DB, GOLDEN_SIDE, golden_agreement_db, read_golden
from edgekit.pipeline.measurement import CostCard, Instructions, Latency, Measurement, Quality, Shape
from edgekit.pipeline.verify import size_bytes
from edgekit.report import Percentiles
from edgekit.runners import Level, Runner, devices, instructions, qemu
from edgekit.runners.facts import Facts
from edgekit.runners.local import Local
from edgekit.target import Target

if TYPE_CHECKING:
    from types import ModuleType

    from edgekit.backends.tvm.bench import Library, Told

log = logging.getLogger(__name__)
Say = Callable[[str], None]
_NOISY, _DENOISED = "noisy.f32", "denoised.f32"
# With fewer, the 99th percentile is the largest by another name.
_RUNS_FOR_P99 = 100
_MACHINES = {"arm64": "aarch64", "amd64": "x86_64"}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How much is measured.

    warm_up: Runs that are not timed. runs, seconds: Timed runs, so many at least and for so long.
    side: Of the square picture whose tiles are timed together, in pixels. threads: That work on it.
    without: Features that the library shall believe the processor to lack, as `asimddp`.
    timeout_s: Longest that the program may run on the device.
    """

    warm_up: int = 3
    runs: int = 20
    seconds: int = 10
    side: int = 1024
    threads: int = 1
    without: tuple[str, ...] = ()
    count_instructions: bool = True
    timeout_s: float = 3600.0


@dataclass(frozen=True, kw_only=True)
class _Opened:
    """A bundle that is to be measured."""

    path: Path
    manifest: Manifest
    golden: PictureSet

    @property
    def target(self) -> Target:
        return self.manifest.target

    @property
    def built(self) -> Built:
        return self.manifest.built

    @property
    def shape(self) -> Shape:
        height, width = self.target.input.height, self.target.input.width
        if height is None or width is None:
            # Whole pictures of any size are taken, so nothing is computed twice.
            return Shape(height=GOLDEN_SIDE, width=GOLDEN_SIDE, halo=0, delivered_pixels=GOLDEN_SIDE**2)
        halo = self.manifest.halo(height, width)
        delivered = max(0, height - 2 * halo) * max(0, width - 2 * halo)
        return Shape(height=height, width=width, halo=halo, delivered_pixels=delivered)

    @property
    def sigma255(self) -> float:
        return self.manifest.protocol.sigma255

    @property
    def seed(self) -> int:
        # The golden noisy pictures are of the first.
        return self.manifest.protocol.seeds[0]


@dataclass(frozen=True, kw_only=True)
class _Ran:
    """What came out of a device, and how: `protocol`.

    times_us: Of tiles. pictures_us: Of pictures of `side` x `side` pixels.
    """

    outputs: list[Array]
    times_us: tuple[int, ...]
    pictures_us: tuple[int, ...]
    side: int
    load_us: int | None
    first_us: int
    cores: Mapping[str, int]
    threads: int
    variant: str
    features: tuple[str, ...]
    peak_memory_kib: int | None
    protocol: str


def bench(path: Path, device: str, *, settings: Settings | None = None, say: Say = log.info) -> Measurement:
    """Return what a bundle's artifact does on a device.

    Args:
        path: The bundle.
        device: `local`, `qemu:CPU`, `adb:SERIAL` or `ssh:HOST`.
        settings: How much is measured.
        say: Told what is being done.

    Raises:
        InputError: No bundle, no such device, or several. ToolMissingError: adb, ssh, QEMU or the engine is missing.
        UnsupportedError: The artifact is not for this device, or a feature cannot be hidden from it.
        IncompleteError: The device went away, or hangs.
        IntegrityError: A file changed, the artifact crashes, or its pictures are not the golden ones.
    """
    settings = settings or Settings()
    opened = _open(path)
    shipped = artifact_files(path, opened.built.files)
    # Of what is about to run; another may lie there when it has run.
    artifact_sha256 = combined_sha256(shipped)
    with devices.find(device) as runner:
        before = runner.facts()
        say(f"{opened.target.name}: measuring on {runner.label}")
        ran = _run(opened, runner, before, settings)
        after = runner.facts()
        counted, reason = _counted(opened, runner, settings, say)
        kind, level = runner.kind, _level(runner, before)
    return Measurement(
        target=opened.target.name,
        model=opened.manifest.model.name,
        precision=opened.built.precision,
        artifact_sha256=artifact_sha256,
        device=kind,
        level=level,
        variant=ran.variant,
        features=ran.features,
        shape=opened.shape,
        latency=_latency(ran) if level == "native" else None,
        emulated_us=ran.first_us if level == "emulated" else None,
        quality=_quality(opened, ran.outputs),
        cost=_cost(opened, shipped, ran, counted, reason),
        before=before,
        after=after,
        protocol=ran.protocol,
        tools={"edgekit": __version__, **opened.built.tools} | ({"qemu": qemu.version()} if kind == "qemu" else {}),
        date=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        hidden=tuple(sorted(set(settings.without))),
    )


def instructions_per_picture(path: Path, cpu: str, *, pictures: int = 2, without: tuple[str, ...] = ()) -> Instructions:
    """Return how many instructions one call of a bundle's library takes on an emulated core, with one thread.

    A count of what is executed, the same on every machine; what an instruction costs differs, so it is no latency.

    Args:
        path: The bundle.
        cpu: Name of the core, one of `qemu-aarch64 -cpu help`.
        pictures: Calls of the longer of the two runs; two or more.
        without: Features that the library shall believe the processor to lack.

    Raises:
        UnsupportedError: The bundle is none of a library for 64-bit ARM.
        ToolMissingError: No QEMU that takes plugins, or no C compiler. IncompleteError: The program failed.
    """
    opened = _open(path)
    module, library = _library(opened)
    if library.machine != "aarch64":
        raise UnsupportedError(f"{library.file.name} is for {library.machine}; instructions are counted on 64-bit ARM")
    runner = qemu.find(cpu)
    try:
        program, there = module.push(library, runner)
        noisy = runner.push(opened.path / "golden" / f"{opened.golden.pictures[0].name}.noisy.f32")

        def count(runs: int) -> int:
            order = module.Order(sigma=opened.sigma255 / 255, noisy=noisy, denoised=None, runs=runs, without=without)
            return instructions.count(cpu, module.argv(library, program, there, order))

        # The picture that is denoised first is not among the runs.
        one, all_of_them = count(0), count(pictures - 1)
    finally:
        runner.close()
    return Instructions(
        cpu=cpu,
        qemu=qemu.version(instructions.emulator()),
        per_call=round((all_of_them - one) / (pictures - 1)),
        pictures=pictures,
        of_all=all_of_them,
        of_one=one,
    )


def _open(path: Path) -> _Opened:
    manifest = bundle.read(path)
    golden = read_golden(path, manifest.protocol.pictures, manifest.protocol.files)
    return _Opened(path=path, manifest=manifest, golden=golden)


def _library(opened: _Opened) -> tuple[ModuleType, Library]:
    """Return the module that measures libraries, behind its engine's door, and the bundle's library."""
    if opened.target.engine != "tvm":
        raise UnsupportedError(
            f"target '{opened.target.name}': an artifact of '{opened.target.engine}' is no library",
            remedy="measure it with --device local",
        )
    backends.load("tvm")
    module = importlib.import_module("edgekit.backends.tvm.bench")
    library: Library = module.library_of(opened.path, opened.built, opened.target.isa)
    return module, library


def _run(opened: _Opened, runner: Runner, device: Facts, settings: Settings) -> _Ran:
    if opened.target.engine != "tvm" and runner.kind == "local":
        return _run_session(opened, settings)
    return _run_library(opened, runner, device, settings)


def _run_library(opened: _Opened, runner: Runner, device: Facts, settings: Settings) -> _Ran:
    """Run the bundle's library by a program of its own on the device."""
    module, library = _library(opened)
    _check_machine(library, runner, device)
    if library.machine != "aarch64":
        _refuse_hiding(settings, f"{library.file.name}, which is for {library.machine}")
    with tempfile.TemporaryDirectory(prefix="edgekit-bench-") as folder:
        noisy, denoised = Path(folder) / _NOISY, Path(folder) / _DENOISED
        noisy.write_bytes(b"".join(_noisy(opened, p.name).tobytes() for p in opened.golden))
        timed = _level(runner, device) == "native"
        order = module.Order(
            sigma=opened.sigma255 / 255,
            noisy=runner.push(noisy),
            denoised=runner.path(_DENOISED),
            warm_up=settings.warm_up if timed else 0,
            runs=settings.runs if timed else 0,
            seconds=settings.seconds if timed else 0,
            side=_side(opened, settings) if timed else 0,
            threads=settings.threads,
            without=settings.without,
        )
        told: Told = module.run(library, runner, order, timeout_s=settings.timeout_s)
        runner.pull(_DENOISED, denoised)
        shape = (len(opened.golden), 1, library.channels, library.height, library.width)
        outputs = np.fromfile(denoised, "<f4").astype(np.float32)
    if outputs.size != np.prod(shape):
        raise IntegrityError(f"{_DENOISED} from {runner.label} holds {outputs.size} numbers, not {np.prod(shape)}")
    hidden = tuple(name for name in told.features or device.features if name not in settings.without)
    return _Ran(
        outputs=list(outputs.reshape(shape)),
        times_us=_microseconds(told.runs_ns),
        pictures_us=_microseconds(told.pictures_ns),
        side=order.side,
        load_us=round(told.load_ns / 1000),
        first_us=round(told.first_ns / 1000),
        cores=told.cores,
        threads=settings.threads,
        variant=library.variant(hidden),
        features=told.features or device.features,
        # Under an emulator it is the emulator's.
        peak_memory_kib=(told.peak_kib or None) if timed else None,
        protocol=_library_protocol(settings, order.side, timed=timed),
    )


def _run_session(opened: _Opened, settings: Settings) -> _Ran:
    """Run an artifact whose engine is in this process."""
    _refuse_hiding(settings, f"'{opened.target.engine}'")
    backend = backends.load(opened.target.engine)
    label, session = backend.open_session(opened.path, opened.built, opened.target, threads=1)[0]
    if session.level != "native":
        raise UnsupportedError(f"target '{opened.target.name}' is only evaluated here ({session.level}), not run")
    sigma, noisy = opened.sigma255 / 255, [_noisy(opened, p.name) for p in opened.golden]
    first_ns, first = _timed(session, noisy[0], sigma)
    outputs = [first, *(session(picture, sigma) for picture in noisy[1:])]
    for _ in range(settings.warm_up):
        session(noisy[0], sigma)
    times_us = pictures_us = tuple(_times_us(session, noisy[0], sigma, settings))
    if settings.threads > 1:
        several = backend.open_session(opened.path, opened.built, opened.target, threads=settings.threads)[0][1]
        several(noisy[0], sigma)
        pictures_us = tuple(_times_us(several, noisy[0], sigma, settings))
    return _Ran(
        outputs=outputs,
        times_us=times_us,
        # It takes whole pictures, of which these are some.
        pictures_us=pictures_us,
        side=opened.shape.width if opened.shape.height == opened.shape.width else 0,
        load_us=None,
        first_us=round(first_ns / 1000),
        cores={},
        threads=settings.threads,
        variant=label,
        features=Local().facts().features,
        peak_memory_kib=None,
        protocol=_session_protocol(settings, opened.shape),
    )


def _times_us(session: Session, noisy: Array, sigma: float, settings: Settings) -> Iterator[int]:
    end, done = time.monotonic() + settings.seconds, 0
    while done < settings.runs or time.monotonic() < end:
        yield max(1, round(_timed(session, noisy, sigma)[0] / 1000))
        done += 1


def _timed(session: Session, noisy: Array, sigma: float) -> tuple[int, Array]:
    start = time.perf_counter_ns()
    denoised = session(noisy, sigma)
    return time.perf_counter_ns() - start, denoised


def _level(runner: Runner, device: Facts) -> Level:
    """Return `emulated` for what says so itself, as Android's emulator, which adb reaches like a phone."""
    return "emulated" if device.emulated else runner.level


def _check_machine(library: Library, runner: Runner, device: Facts) -> None:
    found = _MACHINES.get(device.machine.lower(), device.machine)
    if found != library.machine:
        remedy = "measure it with --device qemu:cortex-a76" if library.machine == "aarch64" else None
        raise UnsupportedError(
            f"{library.file.name} is for {library.machine}, and {runner.label} is {found or 'of an unknown kind'}",
            remedy=remedy,
        )


def _refuse_hiding(settings: Settings, name: str) -> None:
    if settings.without:
        raise UnsupportedError(
            f"the feature '{settings.without[0]}' cannot be hidden from {name}",
            remedy="leave --without out: only libraries for 64-bit ARM take it",
        )


def _noisy(opened: _Opened, name: str) -> Array:
    """Return one golden picture with its noise, (1, c, h, w)."""
    file = opened.path / "golden" / f"{name}.noisy.f32"
    shape = opened.shape
    channels = opened.manifest.model.channels
    found: Array = np.fromfile(file, "<f4").astype(np.float32)
    if found.size != channels * shape.height * shape.width:
        raise IntegrityError(f"{file}: holds {found.size} numbers, not {channels}x{shape.height}x{shape.width}")
    return found.reshape(1, channels, shape.height, shape.width)


def _quality(opened: _Opened, outputs: Sequence[Array]) -> Quality:
    """Return the quality of the device's pictures.

    Raises:
        IntegrityError: They are not the golden ones: the time of wrong pictures means nothing.
    """
    left = zip((_noisy(opened, picture.name) for picture in opened.golden), outputs, strict=True)

    def replay(noisy: Array, sigma: float) -> Array:
        given, denoised = next(left)
        if not np.array_equal(noisy, given):
            raise IntegrityError(
                f"{opened.path / 'golden'}: a noisy picture is not what the protocol makes", remedy="compile it again"
            )
        return denoised

    found = quality.evaluate(
        replay,
        opened.golden,
        sigma255=opened.sigma255,
        seeds=(opened.seed,),
        stride=opened.manifest.model.stride,
    )
    agreement = golden_agreement_db(opened.path, opened.golden, outputs)
    if agreement is not None and agreement < GOLDEN_DB:
        raise IntegrityError(
            f"{opened.target.name}: the device's pictures agree with the golden ones to {agreement:.1f} dB only",
            remedy="times of wrong pictures mean nothing; is the processor one that the target names?",
        )
    return Quality(
        psnr_mdb=found.psnr_mdb,
        agreement_mdb=None if agreement is None else round(min(1000 * agreement, CEILING_MDB)),
        pictures=len(opened.golden),
        pictures_sha256=sets.digest(opened.golden),
        sigma255=opened.sigma255,
        seed=opened.seed,
    )


def _counted(opened: _Opened, runner: Runner, settings: Settings, say: Say) -> tuple[Instructions | None, str]:
    """Return the instructions of one call, or why they are not counted."""
    if not isinstance(runner, qemu.Qemu):
        return None, "that takes --device qemu:CPU"
    if not settings.count_instructions:
        return None, "left out on request"
    say(f"{opened.target.name}: counting instructions on {runner.label}")
    try:
        return instructions_per_picture(opened.path, runner.cpu, without=settings.without), ""
    except (ToolMissingError, IncompleteError) as error:
        return None, str(error)


def _cost(opened: _Opened, shipped: Sequence[Path], ran: _Ran, counted: Instructions | None, reason: str) -> CostCard:
    graph = checks.load_onnx(opened.path / "reference" / "student.fp32.onnx")

    def fact(name: str) -> int | None:
        found = opened.built.facts.get(name)
        return None if found is None else int(found)

    return CostCard(
        macs=cost.cost(graph, opened.shape.height, opened.shape.width).macs,
        artifact_bytes=size_bytes(shipped),
        weights_bytes=fact("weights_bytes"),
        arena_bytes=fact("arena_bytes"),
        stack_bytes=fact("stack_bytes"),
        peak_memory_kib=ran.peak_memory_kib,
        instructions=counted,
        instructions_reason=reason,
    )


def _latency(ran: _Ran) -> Latency:
    per_megapixel = 1e6 / ran.side**2 if ran.side else 0.0
    return Latency(
        call=_percentiles(ran.times_us, 1.0),
        megapixel=_percentiles(ran.pictures_us, per_megapixel) if ran.side and ran.pictures_us else None,
        side=ran.side,
        threads=ran.threads,
        runs=len(ran.times_us),
        picture_runs=len(ran.pictures_us),
        load_us=ran.load_us,
        first_us=ran.first_us,
        cores=ran.cores,
    )


def _side(opened: _Opened, settings: Settings) -> int:
    """Return the side of the picture to be timed; 0 where the library takes none that is larger than a tile."""
    return settings.side if opened.shape.delivered_pixels else 0


def _microseconds(times_ns: Sequence[int]) -> tuple[int, ...]:
    return tuple(max(1, round(ns / 1000)) for ns in times_ns)


def _percentiles(times_us: Sequence[int], scale: float) -> Percentiles:
    """Return percentiles that are each a time that was measured (no mean of two), times `scale`."""
    p10, p50, p90, p99 = (
        round(scale * float(t)) for t in np.percentile(times_us, (10, 50, 90, 99), method="inverted_cdf")
    )
    return Percentiles(p10_us=p10, p50_us=p50, p90_us=p90, p99_us=p99 if len(times_us) >= _RUNS_FOR_P99 else None)


def _library_protocol(settings: Settings, side: int, *, timed: bool) -> str:
    hidden = f"; the library does not see {', '.join(settings.without)}" if settings.without else ""
    if not timed:
        return f"the golden pictures once each, one thread, emulated: no time of it is a latency{hidden}"
    larger = f", then of a picture of {side}x{side} pixels of bytes by {settings.threads}" if side else ""
    first = "first of" if side else "of"
    return f"{_runs(settings)}, {first} one tile by one thread{larger}{hidden}"


def _session_protocol(settings: Settings, shape: Shape) -> str:
    again = f", then by {settings.threads} after one warm-up run" if settings.threads > 1 else ""
    return f"{_runs(settings)}, of a whole picture of {shape.width}x{shape.height} float32 pixels by one thread{again}"


def _runs(settings: Settings) -> str:
    return (
        f"each golden picture once; then {settings.warm_up} warm-up runs and {settings.runs} timed ones at least and "
        f"for {settings.seconds} s"
    )
