"""The FP32 teacher on this machine's GPU (or CPU): what every artifact is compared with."""

from __future__ import annotations

import copy
import logging
import re
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

import torch

from edgekit import zoo
from edgekit.data import sets
from edgekit.data.sets import PictureSet
from edgekit.errors import InputError, IntegrityError
from edgekit.files import write_json
from edgekit.measure import host, quality
from edgekit.models.denoiser import Denoiser
from edgekit.pipeline import networks
from edgekit.pipeline.networks import Network
from edgekit.target import STRICT

log = logging.getLogger(__name__)
SCHEMA_VERSION = 1
KIND = "edgekit-baseline"
FOLDER = Path("results/baselines")
SHAPES = ((256, 256), (512, 512), (1024, 1024))
_WARM_UP = 3
_AGAIN = "measure it again: edgekit baseline"


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Median and spread of one shape and arithmetic, batch 1, in microseconds, from `runs` runs."""

    __pydantic_config__: ClassVar = STRICT
    height: int
    width: int
    arithmetic: str
    median_us: int
    p10_us: int
    p90_us: int
    runs: int


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """A record of the FP32 teacher.

    device, driver: As the system names them. threads: Of a CPU; 0 on a GPU.
    quality: Digest of a set of pictures -> mean PSNR in thousandths of a dB at `sigma255`, seed 0.
    """

    __pydantic_config__: ClassVar = STRICT
    teacher: str
    teacher_sha256: str
    device: str
    driver: str
    threads: int
    latencies: tuple[Latency, ...]
    sigma255: float
    quality: Mapping[str, int]
    protocol: str
    packages: Mapping[str, str]
    date: str
    # Of the processor, which others of its name may lack; records of before 30 November 2026 have neither.
    features: tuple[str, ...] = ()
    kernel: str = ""

    def psnr_mdb(self, pictures: PictureSet, sigma255: float) -> int | None:
        """Return the recorded PSNR on these very pictures at this noise; None if it was not measured so."""
        return self.quality.get(sets.digest(pictures)) if sigma255 == self.sigma255 else None


def measure(
    teacher: Network,
    pictures: list[PictureSet],
    *,
    shapes: tuple[tuple[int, int], ...] = SHAPES,
    seconds: float = 10.0,
    sigma255: float = 25.0,
    say: Callable[[str], None] = log.info,
) -> Baseline:
    """Return a new record of a teacher on this machine's GPU, or on its CPU where there is none.

    FP32 is true FP32 (TF32 off); on a GPU, TF32 and fp16 are measured beside it.

    Args:
        teacher: The network.
        pictures: Sets that its PSNR is recorded on.
        shapes: Height and width of the timed inputs.
        seconds: For each shape and arithmetic.
        sigma255: Noise level of the PSNR.
        say: Told what is being measured.
    """
    gpu = host.gpu()
    device = "cuda" if gpu else "cpu"
    latencies = []
    for height, width in shapes:
        for arithmetic in ("float32", "tf32", "float16") if gpu else ("float32",):
            say(f"{teacher.name}: {height}x{width}, {arithmetic}, {device}")
            latencies.append(_latency(teacher.net, height, width, arithmetic, device, seconds))
    _set_tf32(allowed=False)
    net = teacher.net.to(device)
    measured = {}
    for chosen in pictures:
        say(f"{teacher.name}: PSNR on {chosen.name}")
        denoise = networks.as_function(net)
        measured[sets.digest(chosen)] = quality.evaluate(denoise, chosen, sigma255=sigma255, stride=net.stride).psnr_mdb
    net.to("cpu")
    machine = host.describe()
    return Baseline(
        teacher=teacher.name,
        teacher_sha256=teacher.sha256,
        device=gpu.name if gpu else machine.cpu.model,
        driver=f"{gpu.driver or 'unknown'}, CUDA {gpu.cuda}" if gpu else "",
        threads=0 if gpu else torch.get_num_threads(),
        latencies=tuple(latencies),
        sigma255=sigma255,
        quality=measured,
        protocol=f"PyTorch, batch 1, {_WARM_UP} warm-up runs, then for {seconds:g} s; TF32 off unless named",
        packages=dict(machine.packages),
        date=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        features=machine.cpu.features,
        kernel=machine.kernel,
    )


def write(record: Baseline, path: Path | None = None) -> Path:
    """Write a record to a file, `results/baselines/<teacher>-<device>.json` unless told; return where it lies.

    Weights other than the shipped ones have their hash in the name: a run's student may be called like its teacher.
    """
    name = "-".join(re.findall(r"[a-z0-9]+", record.device.lower())) or "unknown"
    shipped = record.teacher in zoo.names() and zoo.card(record.teacher).sha256 == record.teacher_sha256
    teacher = record.teacher if shipped else f"{record.teacher}-{record.teacher_sha256[:12]}"
    path = path or FOLDER / f"{teacher}-{name}.json"
    write_json(path, {"schema_version": SCHEMA_VERSION, "kind": KIND, **asdict(record)})
    return path


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """The records of a folder, oldest first. refused: Files there that are none, and why."""

    records: tuple[Baseline, ...]
    refused: tuple[str, ...]


def recorded(folder: Path = FOLDER) -> Recorded:
    """Return the records of a folder; none where it does not exist."""
    records, refused = [], []
    for path in sorted(folder.glob("*.json")):
        try:
            records.append(read(path))
        except (InputError, IntegrityError) as error:
            refused.append(str(error))
    return Recorded(records=tuple(sorted(records, key=lambda b: b.date)), refused=tuple(refused))


def read(path: Path) -> Baseline:
    """Return the record in a file.

    Raises:
        InputError: No such file, another kind of file, or a record of another version of edgekit.
        IntegrityError: It is damaged.
    """
    from edgekit import config  # reads with pydantic, which a borrowed machine that records does not have

    if not path.is_file():
        raise InputError(f"{path}: no such file", remedy="make one: edgekit baseline")
    return config.record(path, Baseline, kind=KIND, version=SCHEMA_VERSION, called="a baseline record", again=_AGAIN)


def _latency(net: Denoiser, height: int, width: int, arithmetic: str, device: str, seconds: float) -> Latency:
    kind = torch.float16 if arithmetic == "float16" else torch.float32
    _set_tf32(allowed=arithmetic == "tf32")
    net = copy.deepcopy(net).to(device=device, dtype=kind)
    noisy = torch.rand(1, net.channels, height, width, device=device, dtype=kind)
    sigma = torch.full((1, 1, 1, 1), 25 / 255, device=device, dtype=kind) if net.takes_sigma else None
    times_us: list[float] = []
    with torch.inference_mode():
        for _ in range(_WARM_UP):
            net(noisy, sigma)
        until = time.monotonic() + seconds
        while len(times_us) < 5 or time.monotonic() < until:
            _synchronize(device)
            start = time.perf_counter_ns()
            net(noisy, sigma)
            _synchronize(device)
            times_us.append((time.perf_counter_ns() - start) / 1000)
    tenths = statistics.quantiles(times_us, n=10, method="inclusive")
    return Latency(
        height=height,
        width=width,
        arithmetic=arithmetic,
        median_us=round(statistics.median(times_us)),
        p10_us=round(tenths[0]),
        p90_us=round(tenths[-1]),
        runs=len(times_us),
    )


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _set_tf32(*, allowed: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed
