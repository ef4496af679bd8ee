"""Make a larger student that computes what a smaller, trained one does, so that training goes on instead of beginning.

    python scripts/grow_student.py base large grown.safetensors
    edgekit train student-large --set student.weights=grown.safetensors --set data.train='[photos]'

Net2Net (Chen et al., 2016): new channels hold features of random weights that nothing reads yet, and new blocks add
nothing to what passes them. Training takes both into use.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from edgekit import models, zoo
from edgekit.errors import InputError
from edgekit.models import weights
from edgekit.models.denoiser import Denoiser

# Their new outputs meet old ones in an addition, or are the picture.
_MUST_STAY_SILENT = ("up.", "tail.")


def main() -> None:
    """Write the weights of the larger student."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("small", help="shipped student")
    parser.add_argument("large", help="network, at least as wide and as deep")
    parser.add_argument("out", type=Path)
    parser.add_argument("--weights", type=Path, help="of the small one [default: the shipped ones]")
    given = parser.parse_args()
    trained = models.create(given.small)
    weights.load_into(trained, given.weights or zoo.weights(given.small))
    torch.manual_seed(0)
    weights.save(grown(trained, models.create(given.large)), given.out)


def grown(small: Denoiser, large: Denoiser) -> dict[str, Tensor]:
    """Return weights with which `large`, whose random ones it has now, computes what `small` does.

    Raises:
        InputError: A part of the small network has no place in the large one.
    """
    old, fresh = small.state_dict(), large.state_dict()
    for name, value in old.items():
        if name not in fresh or any(a > b for a, b in zip(value.shape, fresh[name].shape, strict=True)):
            raise InputError(f"'{name}' of the small network has no place in the large one", remedy="take a larger one")
    return {name: _grown(name, old, value) for name, value in fresh.items()}


def _grown(name: str, old: Mapping[str, Tensor], fresh: Tensor) -> Tensor:
    if name not in old:
        return torch.zeros_like(fresh) if ".project." in name else fresh.clone()
    kept = old[name]
    made = torch.zeros_like(fresh)
    if fresh.dim() == 4 and not name.startswith(_MUST_STAY_SILENT):
        made[len(kept) :] = fresh[len(kept) :]
    made[tuple(slice(0, size) for size in kept.shape)] = kept
    return made


if __name__ == "__main__":
    main()
