"""Measures how much INT8 depends on the draw of its calibration pictures, and writes it to results/benchmarks/.

    python benchmarks/int8_draws.py nano base

A draw is another order of the held-out pictures, so that each meets another noise level and other noise. What is
compared is the loss on the embedded evaluation pictures of what `edgekit compile` makes for an engine, trained where
`compile` trains, and of the same graph before that, all in INT8. The record keeps what it has of other models.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from edgekit import zoo
from edgekit.compress import placement, quantize, simplify
from edgekit.compress.budget import Judge
from edgekit.compress.export import export_onnx
from edgekit.data.sets import PictureSet
from edgekit.files import write_json
from edgekit.graph.checks import load_onnx
from edgekit.measure import host
from edgekit.pipeline import compile as compiling
from edgekit.pipeline import int8, networks, pictures

RESULTS = Path(__file__).parent.parent / "results" / "benchmarks"
DRAWS = 5
MOST_SPREAD_DB = 0.02


def losses_mdb(model: str, where: str, folder: Path) -> tuple[list[int], list[int]]:
    """Return the mean loss of each draw in thousandths of a dB: before any training, and as it is compiled."""
    net, placed_for = networks.shipped(model).net, placement.PLACEMENTS[where]
    recipe = compiling.default_recipe(model, net.channels)
    raw = export_onnx(
        net, channels=net.channels, takes_sigma=net.takes_sigma, stride=net.stride, out=folder / "raw.onnx"
    )
    student = int8.Student(
        name=model, model=model, fp32=simplify.simplify(raw, folder / "fp32.onnx"), stride=net.stride
    )
    shown = pictures.load(recipe.data)
    held_out = shown.held_out
    judge = Judge(
        load_onnx(student.fp32),
        [p.pixels for p in shown.evaluation],
        int8.levels(recipe.noise),
        net.stride,
        exact=not placed_for.saturates,
    )
    first, compiled = list[int](), list[int]()
    for draw in range(DRAWS):
        turn = draw * len(held_out) // DRAWS
        samples = pictures.noisy_samples(
            PictureSet(name=f"draw {draw}", pictures=held_out.pictures[turn:] + held_out.pictures[:turn]),
            recipe.noise,
            count=recipe.quantization.calibration_pictures,
            stride=net.stride,
        )
        prepared = quantize.prepare(student.fp32, samples, recipe.quantization, placed_for)
        graph = placement.place(prepared.model, prepared.ranges, placed_for, weight_limit=prepared.weight_limit)
        reached = int8.within_budget(prepared, recipe, shown, student, placed_for, folder, checkpoints=folder)
        first.append(judge.loss(graph).mean_mdb)
        compiled.append(judge.loss(reached.kept.model).mean_mdb)
        print(f"{model}, draw {draw}: {first[-1]}, compiled {compiled[-1]} thousandths of a dB", flush=True)
    return first, compiled


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the models that were named, and write one file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--placement", choices=sorted(placement.PLACEMENTS), default="openvino")
    chosen = parser.parse_args(arguments)
    record = RESULTS / "int8_draws.json"
    before = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    here = json.loads(json.dumps(asdict(host.describe())))
    # The record has one description of where it was made: rows made elsewhere do not stay under today's.
    same = before.get("placement") == chosen.placement and all(
        before["host"][what] == here[what] for what in ("cpu", "kernel", "packages")
    )
    rows = dict(before["models"]) if same else {}
    for model in chosen.models:
        with tempfile.TemporaryDirectory() as folder:
            first, compiled = losses_mdb(model, chosen.placement, Path(folder))
        spread = max(compiled) - min(compiled)
        rows[model] = {
            "loss_before_training_mdb": first,
            "loss_mdb": compiled,
            "spread_mdb": spread,
            "kept": spread < 1000 * MOST_SPREAD_DB,
            "weights_sha256": zoo.card(model).sha256,
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        write_json(
            record,
            {
                "placement": chosen.placement,
                "draws": DRAWS,
                "models": rows,
                "host": here,
                "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            },
        )


if __name__ == "__main__":
    main()
