"""Put trained weights into edgekit/zoo with a card whose figures are measured here on the file as it is shipped.

    python scripts/ship_weights.py nano trained.safetensors --trained trained.json --research-data ../shared/data

`--trained` is a JSON object that says how the weights were trained, with `TOLD` at least; it goes into the card as it
is.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import click
import torch

from edgekit import models, zoo
from edgekit.data import sets
from edgekit.data.sets import Channels, PictureSet
from edgekit.files import atomic_file, sha256, write_json
from edgekit.measure import quality
from edgekit.models import weights
from edgekit.models.denoiser import Denoiser
from edgekit.pipeline import networks

SIGMAS = (15, 25, 50)
TOLD = ("device", "minutes", "noise", "pictures", "seed", "teacher")
NOTES = (
    "trained on research data; commercial use of the weights is unsettled",
    "the PSNR figures are of this very file in PyTorch, float32, noise unclipped, by docs/protocol.md",
)


def main() -> None:
    """Write NAME.safetensors and NAME.json into the zoo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("weights", type=Path)
    parser.add_argument("--model", help="network [default: NAME]")
    parser.add_argument("--options", type=json.loads, default={}, help="options of the network, as JSON")
    parser.add_argument("--trained", type=Path, required=True)
    parser.add_argument("--half", action="store_true", help="store float16; the figures are measured after rounding")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--research-data", type=Path, help="folder with test/set12, test/bsd68, test/cbsd68")
    given = parser.parse_args()

    trained = json.loads(given.trained.read_text(encoding="utf-8"))
    if missing := [key for key in TOLD if key not in trained]:
        parser.error(f"{given.trained}: does not say {', '.join(missing)}")
    net = models.create(given.model or given.name, given.options)
    weights.load_into(net, given.weights)
    evaluation = evaluation_sets(given.research_data, 3 if net.channels == 3 else 1)
    folder = Path(zoo.__file__).parent
    path = folder / f"{given.name}.safetensors"
    kind = torch.float16 if given.half else torch.float32
    with tempfile.TemporaryDirectory() as scratch:
        weights.save({name: t.to(kind) for name, t in net.state_dict().items()}, file := Path(scratch, path.name))
        weights.load_into(net, file)
        measured = [measure(net.eval(), pictures, sigma, given.seeds) for pictures in evaluation for sigma in SIGMAS]
        for entry in measured:
            click.echo(entry)
        # Not before they are measured: weights beside the card of others would be refused.
        with atomic_file(path) as temporary:
            shutil.copyfile(file, temporary)
    write_json(
        folder / f"{given.name}.json",
        {
            "name": given.name,
            "model": given.model or given.name,
            "options": given.options,
            "sha256": sha256(path),
            "parameters": models.parameter_count(net),
            "trained": trained,
            "measured": measured,
            "notes": NOTES,
        },
    )


def evaluation_sets(research: Path | None, channels: Channels) -> list[PictureSet]:
    """Return the embedded evaluation pictures, and Set12 and BSD68, or CBSD68, where their folder is given."""
    found = [sets.embedded("evaluation", channels=channels)]
    if research:
        names = ("set12", "bsd68") if channels == 1 else ("cbsd68",)
        found += [sets.folder(research / "test" / name, channels=channels) for name in names]
    return found


def measure(net: Denoiser, pictures: PictureSet, sigma: int, seeds: int) -> dict[str, str | int]:
    """Return the mean PSNR on a set as an entry of the card."""
    report = quality.evaluate(
        networks.as_function(net), pictures, sigma255=sigma, seeds=tuple(range(seeds)), stride=net.stride
    )
    return {"pictures": pictures.name, "sigma": sigma, "seeds": seeds, "psnr_mdb": report.psnr_mdb}


if __name__ == "__main__":
    main()
