"""Measures edgekit's own speed, and writes it to results/benchmarks/: see benchmarks/README.md."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from edgekit import backends, bundle, models, target
from edgekit.backends import Session
from edgekit.data import noise
from edgekit.data.synthetic import dead_leaves
from edgekit.files import write_json
from edgekit.measure import host, latency
from edgekit.pipeline import compile as compiling
from edgekit.pipeline import verify
from edgekit.recipe import Training
from edgekit.training.losses import charbonnier
from edgekit.training.patches import PatchBank

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results" / "benchmarks"
MODELS = ("nano", "base")
SIDE = 256
PAIR_SECONDS = 15.0
Figures = dict[str, object]


def import_time(folder: Path) -> Figures:
    """Return the time of `edgekit --help` against that of the interpreter alone, whole processes by turns."""
    executable = shutil.which("edgekit", path=str(Path(sys.executable).parent)) or "edgekit"
    paired = latency.interleave(
        lambda: _process(executable, "--help"), lambda: _process(sys.executable, "-c", ""), min_pairs=20, max_seconds=1
    )
    return {"help_ms": paired.a_median_us / 1000, "interpreter_ms": paired.b_median_us / 1000} | _ratio(paired)


def pictures_time(folder: Path) -> Figures:
    """Return the time to make a dead-leaves picture of 256x256 against that to add the protocol's noise to it."""
    seeds = iter(range(10**6))
    picture = dead_leaves(0, SIDE, SIDE)

    def make() -> None:
        dead_leaves(next(seeds), SIDE, SIDE)

    def add() -> None:
        noise.add_gaussian(picture, 25.0, index=0)

    paired = latency.interleave(make, add, min_pairs=20, max_seconds=1)
    return {"dead_leaves_ms": paired.a_median_us / 1000, "noise_ms": paired.b_median_us / 1000} | _ratio(paired)


def training_speed(folder: Path) -> Figures:
    """Return images per second of one optimizer step of 16 patches of 80x80, in both arithmetics by turns."""
    torch.set_num_threads(2)
    noise = np.random.default_rng(0).integers(0, 256, (8, 1, 256, 256), dtype=np.uint8)
    bank = PatchBank(list(noise), torch.device("cpu"))
    return {name: _training(name, bank) for name in MODELS}


def compile_time(folder: Path) -> Figures:
    """Return the seconds to compile each model for each target, each from an empty run folder."""
    found: Figures = {}
    for model in MODELS:
        for name in target.names():
            start = time.perf_counter()
            compiling.compile_model(model, [target.load(name)], folder=folder / f"{model}-{name}")
            found[f"{model} {name} s"] = round(time.perf_counter() - start, 1)
    return found


def verify_time(folder: Path) -> Figures:
    """Return the seconds to verify nano's bundle of each target; 6 s of them are interleaved runs where it is timed."""
    found: Figures = {}
    for name in target.names():
        path = _bundle(folder, "nano", name)
        start = time.perf_counter()
        verify.verify(path, settings=verify.Settings(seconds=6))
        found[f"{name} s"] = round(time.perf_counter() - start, 1)
    return found


def artifact_latency(folder: Path) -> Figures:
    """Return the latency of INT8 artifacts and FP32 students against the FP32 teacher in the same engine."""
    noisy = np.random.default_rng(0).random((1, 1, SIDE, SIDE), dtype=np.float32)
    found: Figures = {}
    for model in MODELS:
        for name in ("onnx", "linux-x86_64"):
            path = _bundle(folder, model, name)
            manifest = bundle.read(path)
            chosen, built = manifest.target, manifest.built
            engine = backends.load_onnx("openvino" if chosen.engine == "openvino" else "onnxruntime")
            teacher = engine.open_onnx(path / "reference" / "teacher.fp32.onnx", threads=1)
            rows: dict[str, Session] = {
                "int8": engine.open_session(path, built, chosen, threads=1)[0][1],
                "fp32": engine.open_onnx(path / "reference" / "student.fp32.onnx", threads=1),
            }
            for precision, session in rows.items():
                paired = latency.interleave(
                    _once(teacher, noisy), _once(session, noisy), min_pairs=8, max_seconds=PAIR_SECONDS
                )
                found[f"{model} {chosen.engine} {precision}"] = {
                    "teacher_ms": paired.a_median_us / 1000,
                    "student_ms": paired.b_median_us / 1000,
                } | _ratio(paired)
    return found


BENCHMARKS: dict[str, tuple[Callable[[Path], Figures], str]] = {
    "import": (import_time, "whole processes, 20 pairs by turns, medians"),
    "pictures": (pictures_time, f"dead leaves of {SIDE}x{SIDE}, one thread, 20 pairs by turns, medians"),
    "training": (training_speed, "forward, backward and AdamW step of 16x80x80, 2 threads, 20 pairs by turns, medians"),
    "compile": (
        compile_time,
        "one run each from an empty folder, with calibration and golden pictures; zig's cache warm",
    ),
    "verify": (verify_time, "one run each, four 256x256 pictures, 6 s of interleaved runs where the engine runs here"),
    "latency": (artifact_latency, f"1x1x{SIDE}x{SIDE}, one thread, pairs by turns for {PAIR_SECONDS:g} s, medians"),
}


def main() -> None:
    """Run the named benchmarks, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)} [default: all]")
    names = parser.parse_args().names or list(BENCHMARKS)
    if unknown := set(names) - set(BENCHMARKS):
        parser.error(f"unknown benchmark: {', '.join(sorted(unknown))}")
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            measure, protocol = BENCHMARKS[name]
            figures = measure(Path(folder))
            record = {
                "schema_version": 1,
                "kind": "edgekit-benchmark",
                "name": name,
                "protocol": protocol,
                "figures": figures,
                "host": asdict(host.describe()),
                "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            }
            write_json(RESULTS / f"{name}.json", record)
            print(name, figures, flush=True)


def _training(name: str, bank: PatchBank) -> Figures:
    net = models.create(name).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(net.parameters(), lr=Training().peak_rate)
    seeds = iter(range(10**6))

    def step(bf16: bool) -> None:
        clean, noisy, sigma = bank.draw(batch=16, patch=80, sigma=(0, 55), seed=next(seeds))
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = charbonnier(net(noisy.contiguous(memory_format=torch.channels_last), sigma).float(), clean)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    paired = latency.interleave(lambda: step(False), lambda: step(True), min_pairs=20, max_seconds=1)
    per_second = {"float32": 16e6 / paired.a_median_us, "bf16": 16e6 / paired.b_median_us}
    return {f"images_per_second_{kind}": round(value, 1) for kind, value in per_second.items()} | _ratio(paired)


def _bundle(folder: Path, model: str, name: str) -> Path:
    made = compiling.compile_model(model, [target.load(name)], folder=folder / f"{model}-{name}")
    return made.bundles[name]


def _once(session: Session, noisy: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> Callable[[], None]:
    def run() -> None:
        session(noisy, 25 / 255)

    return run


def _ratio(paired: latency.Paired) -> Figures:
    ratio = latency.ratio_with_bound(paired)
    return {
        "ratio": ratio.ratio_e3 / 1000,
        "low": ratio.low_e3 / 1000,
        "high": ratio.high_e3 / 1000,
        "pairs": ratio.pairs,
    }


def _process(*command: str) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
