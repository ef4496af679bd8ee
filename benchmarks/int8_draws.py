"""Measures how much INT8 depends on the draw of its calibration pictures, and writes it to results/benchmarks/.

    python benchmarks/int8_draws.py nano base

A draw is another order of the held-out pictures, so that each meets another noise level and other noise. What is
compared is the loss of the graph that is all in INT8, on the embedded evaluation pictures, before anything is trained
or rolled back: what comes after only brings the draws closer together.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from edgekit.compress import placement, quantize, simplify
from edgekit.compress.budget import Judge
from edgekit.compress.export import export_onnx
from edgekit.data.sets import PictureSet
from edgekit.files import write_json
from edgekit.graph.checks import load_onnx
from edgekit.measure import host
from edgekit.pipeline import int8, networks, pictures
from edgekit.recipe import Data, Noise, Quantization

RESULTS = Path(__file__).parent.parent / "results" / "benchmarks"
DRAWS = 5
MOST_SPREAD_DB = 0.02


def losses_mdb(model: str, where: str, folder: Path) -> list[int]:
    """Return the mean loss of each draw in thousandths of a dB."""
    net = networks.shipped(model).net
    raw = export_onnx(
        net, channels=net.channels, takes_sigma=net.takes_sigma, stride=net.stride, out=folder / "raw.onnx"
    )
    fp32 = simplify.simplify(raw, folder / "fp32.onnx")
    held_out, settings = pictures.held_out(Data()), Quantization()
    shown = pictures.evaluation(Data())
    judge = Judge(load_onnx(fp32), [p.pixels for p in shown], int8.levels(Noise()), net.stride)
    found = []
    for draw in range(DRAWS):
        turned = held_out.pictures[draw * 5 :] + held_out.pictures[: draw * 5]
        samples = pictures.noisy_samples(
            PictureSet(name=f"draw {draw}", pictures=turned),
            Noise(),
            count=settings.calibration_pictures,
            stride=net.stride,
        )
        prepared = quantize.prepare(fp32, samples, settings, placement.PLACEMENTS[where])
        graph = placement.place(prepared.model, prepared.ranges, placement.PLACEMENTS[where])
        found.append(judge.loss(graph).mean_mdb)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the models that were named, and write one file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--placement", choices=sorted(placement.PLACEMENTS), default="openvino")
    chosen = parser.parse_args(arguments)
    rows = {}
    for model in chosen.models:
        with tempfile.TemporaryDirectory() as folder:
            found = losses_mdb(model, chosen.placement, Path(folder))
        spread = max(found) - min(found)
        rows[model] = {"loss_mdb": found, "spread_mdb": spread, "kept": spread <= 1000 * MOST_SPREAD_DB}
        print(f"{model}: {found} thousandths of a dB, spread {spread}", flush=True)
    write_json(
        RESULTS / "int8_draws.json",
        {"placement": chosen.placement, "draws": DRAWS, "models": rows, "host": asdict(host.describe())},
    )


if __name__ == "__main__":
    main()
