"""The whole state of a training run in one safetensors file, written atomically."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from edgekit.errors import InputError, IntegrityError
from edgekit.models import weights


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where a run stands.

    job: Hash of everything that decides the run; a checkpoint of another job is refused.
    step: Optimizer steps done. seconds: Time spent in training, over all sittings.
    images: Patches learned from, by all processes; 0 where nobody counts them.
    best_psnr_db, best_step: The best held-out PSNR that was met on the way, and where; None before any was taken.
    """

    job: str
    step: int
    seconds: float
    images: int = 0
    best_psnr_db: float | None = None
    best_step: int = 0


@dataclass(frozen=True, kw_only=True)
class Saved:
    """What a checkpoint holds; `path` is where it was read from."""

    path: Path
    position: Position
    tensors: Mapping[str, Tensor]


def save(
    path: Path, position: Position, learner: nn.Module, ema: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
) -> None:
    """Write the weights, their moving average, and the optimizer's state."""
    tensors = {f"net/{name}": t for name, t in learner.state_dict().items()}
    tensors |= {f"{weights.AVERAGES}{name}": t for name, t in ema.items()}
    for name, parameter in learner.named_parameters():
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer/{name}/{key}"] = value
    weights.save(tensors, path, {"position": json.dumps(asdict(position))})


def restore(
    path: Path, job: str, learner: nn.Module, ema: dict[str, Tensor], optimizer: torch.optim.Optimizer
) -> Position:
    """Load a checkpoint into the learner, the average and the optimizer; return where the run stands.

    Raises:
        InputError: The checkpoint is of another run.
        IntegrityError: The file is damaged.
    """
    return load(read(path), job, learner, ema, optimizer)


def read(path: Path) -> Saved:
    """Return what a checkpoint holds.

    Raises:
        IntegrityError: The file is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            position = Position(**json.loads(file.metadata()["position"]))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise IntegrityError(
            f"{path}: damaged checkpoint: {error}", remedy="delete it to start the training again"
        ) from error
    return Saved(path=path, position=position, tensors=tensors)


def load(
    saved: Saved, job: str, learner: nn.Module, ema: dict[str, Tensor], optimizer: torch.optim.Optimizer
) -> Position:
    """Put a checkpoint into the learner, the average and the optimizer; return where the run stands.

    Raises:
        InputError: The checkpoint is of another run.
    """
    if saved.position.job != job:
        raise InputError(
            f"{saved.path}: is the checkpoint of another run (other settings, pictures, weights, code or versions)",
            remedy="delete it to start the training again, or choose another folder",
        )
    learner.load_state_dict(_part(saved.tensors, "net/"))
    for name, value in weights.averages(saved.tensors).items():
        ema[name].copy_(value)
    for name, parameter in learner.named_parameters():
        state = _part(saved.tensors, f"optimizer/{name}/")
        # In the parameter's own layout: a loop over another one may round differently in the last bit.
        optimizer.state[parameter] = {
            k: v if k == "step" else torch.empty_like(parameter).copy_(v) for k, v in state.items()
        }
    return saved.position


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
