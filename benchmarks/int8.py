"""Measures what INT8 costs and brings: loss in dB, speed and integer share of each student, in each engine here.

    python benchmarks/int8.py --research-data ../shared/data      # writes results/int8/<model>.json, prints a table
    python benchmarks/int8.py base --set budgets.int8_worst_db=0.1 --name worst      # results/int8/base-worst.json

The artifacts are those of `edgekit compile`, opened as `edgekit verify` opens them. The last target has no float engine
worth comparing with: its ratios are against OpenVINO's FP32, in which the teacher is fastest. It takes tiles of one
size, so it is compiled anew for each size. With --targets, a record keeps what it has of other targets for the same
weights, settings, protocol and machine. Pictures are gray, and so are the students.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from edgekit import backends, bundle, run, target, zoo
from edgekit.backends import Session
from edgekit.data import sets
from edgekit.data.sets import PictureSet
from edgekit.files import write_json
from edgekit.measure import host, latency, quality
from edgekit.measure.quality import Denoise
from edgekit.pipeline import compile as compiling
from edgekit.pipeline import denoise, int8, networks
from edgekit.pipeline.compare import OnnxEngine
from edgekit.pipeline.denoise import Opened
from edgekit.target import Target

RESULTS = Path(__file__).parent.parent / "results" / "int8"
TARGETS = ("onnx", "linux-x86_64", "linux-x86_64-vnni")
SIGMAS = (15, 25, 50)
# Of the pictures that are timed; the teacher takes seconds for the larger ones, and is compared at the first.
SIDES = (256, 512, 1024)
# A tile of the largest would need more memory than the target allows.
TILES = (256, 512)
Figures = dict[str, object]


def main() -> None:
    """Measure the named students, or all that are shipped."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="shipped students for gray pictures [default: all]")
    parser.add_argument("--research-data", type=Path, help="folder with test/set12 and test/bsd68")
    parser.add_argument("--seconds", type=float, default=15.0, help="of interleaved runs for each ratio")
    parser.add_argument("--runs", type=Path, help="keep and re-use run folders here")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=TARGETS)
    parser.add_argument("--set", action="append", default=[], dest="settings", help="setting of `edgekit compile`")
    parser.add_argument("--name", default="", help="of this choice of settings, behind the model's in the file's name")
    parser.add_argument(
        "-o", "--output", type=Path, default=RESULTS, help="folder of the records [default: results/int8]"
    )
    given = parser.parse_args()
    if bool(given.settings) != bool(given.name):
        parser.error("--set and --name go together")
    if unknown := sorted(set(given.models) - set(students())):
        parser.error(f"no student for gray pictures: {', '.join(unknown)}")
    protocol = (
        f"PSNR: seed 0, docs/protocol.md; latency: one gray picture, one thread, by turns for {given.seconds:g} s, "
        "medians, 95 % bounds"
    )
    pictures = [sets.embedded("evaluation")]
    if given.research_data:
        pictures += [sets.folder(given.research_data / "test" / name, channels=1) for name in ("set12", "bsd68")]
    with tempfile.TemporaryDirectory() as scratch:
        for name in given.models or students():
            label = f"{name}-{given.name}" if given.name else name
            folder = (given.runs or Path(scratch)) / label
            found = {t: measure(name, t, given.settings, folder, pictures, given.seconds) for t in given.targets}
            before = kept(given.output / f"{label}.json", name, given.targets, given.settings, protocol)
            record = {
                "schema_version": 1,
                "kind": "edgekit-int8",
                "model": name,
                "settings": given.settings,
                "weights_sha256": zoo.card(name).sha256,
                "protocol": protocol,
                "engines": before | found,
                "host": asdict(host.describe()),
                "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            }
            write_json(given.output / f"{label}.json", record)


def students() -> list[str]:
    """Return the names of the shipped students that take gray pictures."""
    cards = [zoo.card(name) for name in zoo.names()]
    return [card.name for card in cards if card.name != "teacher" and card.options.get("channels", 1) == 1]


def kept(record: Path, name: str, measured: Sequence[str], settings: Sequence[str], protocol: str) -> dict[str, object]:
    """Return what a record has of the targets that are not measured now, if it was measured alike.

    That is of the same weights, with the same settings, by the same protocol, on the same processor and kernel, in the
    same versions: a record has one description of where it was made.
    """
    if not record.is_file():
        return {}
    before = json.loads(record.read_text(encoding="utf-8"))
    here = json.loads(json.dumps(asdict(host.describe())))
    alike = {"weights_sha256": zoo.card(name).sha256, "settings": list(settings), "protocol": protocol}
    # Not by the processor's name alone: "AMD EPYC" may have VNNI, or AVX2 and no more.
    same = all(before["host"][what] == here[what] for what in ("cpu", "kernel", "packages"))
    same = same and all(before[what] == value for what, value in alike.items())
    return {t: row for t, row in before["engines"].items() if same and t not in measured}


def measure(
    model: str, target_name: str, settings: list[str], folder: Path, pictures: list[PictureSet], seconds: float
) -> Mapping[str, object]:
    """Return the figures of one student in one engine."""
    made = compiling.compile_model(model, [target.load(target_name)], overrides=settings, folder=folder)
    path, audits = made.bundles[target_name], made.audits[target_name]
    manifest = bundle.read(path)
    chosen = manifest.target
    float_engine: OnnxEngine = "onnxruntime" if chosen.engine == "onnxruntime" else "openvino"
    engine = backends.load_onnx(float_engine)
    artifact = denoise.open_model(str(path), threads=1)
    fp32 = engine.open_onnx(path / "reference" / "student.fp32.onnx", threads=1)
    teacher = engine.open_onnx(path / "reference" / "teacher.fp32.onnx", threads=1)
    loss = {f"{p.name} {sigma}": _loss(fp32, artifact, p, sigma) for p in pictures for sigma in SIGMAS}
    sides = SIDES if chosen.input.height is None else TILES
    found: Figures = {
        "fp32_engine": float_engine,
        "against_fp32": {
            str(side): _paired(fp32, _for_side(model, chosen, settings, side, folder, artifact), side, seconds)
            for side in sides
        },
        "against_teacher": {str(SIDES[0]): _paired(teacher, artifact, SIDES[0], seconds)},
        "against_teacher_in_pytorch": {str(SIDES[0]): _paired_with_pytorch(artifact, SIDES[0], seconds)},
        "integer_macs_permille": audits.integer_macs_permille,
        "quantization": _quantization(folder, chosen),
        "loss_mdb": loss,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    print(model, chosen.engine, found, flush=True)
    return found


def _for_side(model: str, chosen: Target, settings: list[str], side: int, folder: Path, artifact: Opened) -> Opened:
    """Return the artifact for pictures of that size: itself, or compiled with a tile of it."""
    if chosen.input.height in (None, side):
        return artifact
    beside = folder.parent / f"{folder.name}-{side}"
    if not beside.exists():
        shutil.copytree(folder, beside)  # So that it is not quantized once more.
    made = compiling.compile_model(model, [chosen.with_tile(side)], overrides=settings, folder=beside)
    return denoise.open_model(str(made.bundles[chosen.name]), threads=1)


def _quantization(folder: Path, chosen: Target) -> Mapping[str, object]:
    """Return what the INT8 graph lost on the held-out pictures, before and after, and what is in float for it."""
    name = f"quantize/{int8.PLACEMENTS[chosen.engine]}"
    (stage,) = (s for s in run.read_stages(folder) if s.name == name)
    names = ("loss_before_mdb", "trained", "released", "float_nodes", "loss_mdb", "worst_loss_mdb", "weight_bits")
    return {name: stage.facts[name] for name in names}


def _loss(fp32: Session, artifact: Opened, pictures: PictureSet, sigma: float) -> Mapping[str, object]:
    before, after = (quality.evaluate(session, pictures, sigma255=sigma) for session in (fp32, artifact))
    drops = {b.name: b.psnr_mdb - a.psnr_mdb for b, a in zip(before.pictures, after.pictures, strict=True)}
    worst = max(drops, key=lambda name: drops[name])
    return {
        "fp32": before.psnr_mdb,
        "int8": after.psnr_mdb,
        "mean": before.psnr_mdb - after.psnr_mdb,
        "worst": drops[worst],
        "worst_picture": worst,
    }


def _paired_with_pytorch(artifact: Denoise, side: int, seconds: float) -> Mapping[str, float]:
    teacher, threads = networks.as_function(networks.shipped("teacher").net.eval()), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _paired(teacher, artifact, side, seconds)
    finally:
        torch.set_num_threads(threads)


def _paired(slow: Denoise, fast: Denoise, side: int, seconds: float) -> Mapping[str, float]:
    """Return the medians of both, in ms, and their ratio, for a square picture."""
    noisy = np.random.default_rng(0).random((1, 1, side, side), dtype=np.float32)
    paired = latency.interleave(_once(slow, noisy), _once(fast, noisy), min_pairs=8, max_seconds=seconds)
    ratio = latency.ratio_with_bound(paired)
    return {
        "slow_ms": paired.a_median_us / 1000,
        "int8_ms": paired.b_median_us / 1000,
        "ratio": ratio.ratio_e3 / 1000,
        "low": ratio.low_e3 / 1000,
        "high": ratio.high_e3 / 1000,
    }


def _once(session: Denoise, noisy: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> Callable[[], None]:
    def run() -> None:
        session(noisy, 25 / 255)

    return run


if __name__ == "__main__":
    main()
