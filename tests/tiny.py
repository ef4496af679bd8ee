"""The smallest things that the real stages run on: pictures of 64x64 pixels, and recipes that take seconds."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from edgekit import models
from edgekit.data.synthetic import dead_leaves
from edgekit.models import weights
from edgekit.models.denoiser import Denoiser
from edgekit.recipe import Budgets, Data, Model, Noise, Quantization, Recipe, Training

SIDE = 64
_SETS = {"train": 6, "held_out": 2, "evaluation": 2}


def write_pictures(folder: Path, *, channels: int = 1) -> Path:
    """Return `folder` with three subfolders of dead leaves: `train`, `held_out` and `evaluation`."""
    seed = 0
    for name, count in _SETS.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = dead_leaves(seed, SIDE, SIDE, 1 if channels == 1 else 3)
            plane = pixels[0] if channels == 1 else pixels.transpose(1, 2, 0)
            Image.fromarray(np.ascontiguousarray(plane)).save(folder / name / f"{number}.png")
            seed += 1
    return folder


def recipe(pictures: Path, *, channels: int = 1, name: str = "tiny", **changes: object) -> Recipe:
    """Return a recipe on the pictures of `write_pictures`: a few steps of a random nano, without a teacher."""
    made = Recipe(
        schema_version=1,
        name=name,
        description="A test.",
        student=Model(model="nano", weights="random"),
        data=Data(
            train=(str(pictures / "train"),),
            calibration=str(pictures / "held_out"),
            evaluation=str(pictures / "evaluation"),
            channels=1 if channels == 1 else 3,
            evaluation_pictures=2,
        ),
        noise=Noise(train=(5.0, 50.0)),
        training=training(),
        quantization=Quantization(calibration_pictures=8),
        budgets=Budgets(student_drop_db=60.0, int8_drop_db=10.0),
    )
    return dataclasses.replace(made, **changes)


def training(**changes: object) -> Training:
    """Return settings that take a second."""
    made = Training(
        steps=20,
        batch=2,
        patch=32,
        peak_rate=2e-3,
        warmup_steps=5,
        precision="float32",
        validate_every=1000,
        keep_better=False,
    )
    return dataclasses.replace(made, **changes)


def network(name: str, options: dict[str, models.Option] | None = None, *, seed: int = 0) -> Denoiser:
    """Return a network with random weights of that seed, in eval mode."""
    torch.manual_seed(seed)
    return models.create(name, options).eval()


def write_weights(name: str, path: Path, *, seed: int = 0, shrink: float = 1.0) -> Path:
    """Return `path`, now random weights of a network; `shrink` scales its last layer, so that it changes little."""
    net = network(name, seed=seed)
    values = dict(net.state_dict())
    for key in ("tail.weight", "tail.bias"):
        values[key] = values[key] * shrink
    weights.save(values, path)
    return path
