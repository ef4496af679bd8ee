"""The smallest things that the real stages run on: pictures of 64x64 pixels, and recipes that take seconds."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import interpolate, max_pool2d, relu

from edgekit import bundle, models
from edgekit.data.synthetic import dead_leaves
from edgekit.models import weights
from edgekit.models.denoiser import Denoiser
from edgekit.recipe import Budgets, Data, Model, Noise, Quantization, Recipe, Training
from edgekit.target import Target

SIDE = 64
_ROOT = Path(__file__).parent.parent
_SETS = {"train": 6, "held_out": 8, "evaluation": 2}


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


def like_named(pictures: Path) -> Data:
    """Move what `write_pictures` wrote into three folders that are all called `images`, and return them as data."""
    images = {}
    for name in _SETS:
        (pictures / name).rename(pictures / "images")
        (pictures / name).mkdir()
        images[name] = str((pictures / "images").rename(pictures / name / "images"))
    return Data(train=(images["train"],), calibration=images["held_out"], evaluation=images["evaluation"])


def script(path: str) -> ModuleType:
    """Return a file that is in no package, as `benchmarks/int8.py`, as a module."""
    spec = importlib.util.spec_from_file_location(path.removesuffix(".py").replace("/", "_"), _ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    # Dataclasses look their module up by its name.
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def recipe(pictures: Path, *, channels: int = 1, name: str = "tiny", **changes: object) -> Recipe:
    """Return a recipe on the pictures of `write_pictures`: a few steps of a random nano, without a teacher.

    Its INT8 keeps the basis that it has, as to try others takes longer than all the rest.
    """
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
        quantization=Quantization(calibration_pictures=8, change_basis=False),
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


def manifest(chosen: Target, built: bundle.Built, **model: object) -> bundle.Manifest:
    """Return the manifest of a bundle of a network that is like `model`, for a page to be written from."""
    about = {"name": "net", "channels": 1, "takes_sigma": True, "stride": 8, "parameters": 0, "macs_256": 0}
    return bundle.Manifest(
        edgekit="0",
        target=chosen,
        model=bundle.Model(**(about | {"halo_px": 8, "global_ops": ()} | model)),
        budgets=Budgets(),
        protocol=bundle.Protocol(
            noise="gaussian", sigma255=25.0, seeds=(0,), pictures="none", files=("none",), golden_outputs="none"
        ),
        built=built,
        chain=(),
        files={},
    )


def network(name: str, options: dict[str, models.Option] | None = None, *, seed: int = 0) -> Denoiser:
    """Return a network with random weights of that seed, in eval mode."""
    torch.manual_seed(seed)
    return models.create(name, options).eval()


class Unet(nn.Module):
    """A blind UNet of two levels: skips by concatenation, one nearest and one bilinear way up, max-pooling down.

    Its channels are no multiples of 16, alone or together.
    """

    channels, takes_sigma, stride = 1, False, 4

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.low = (_same(i, o) for i, o in ((1, 12), (12, 24), (24, 40)))
        self.third, self.fourth, self.last = (_same(i, o) for i, o in ((64, 24), (36, 12), (12, 1)))

    def forward(self, noisy: Tensor) -> Tensor:
        """Return the denoised picture."""
        first = relu(self.first(noisy))
        second = relu(self.second(max_pool2d(first, 2)))
        up = interpolate(relu(self.low(max_pool2d(second, 2))), scale_factor=2, mode="nearest")
        third = relu(self.third(torch.cat([up, second], 1)))
        up = interpolate(third, scale_factor=2, mode="bilinear", align_corners=False)
        return noisy - self.last(relu(self.fourth(torch.cat([up, first], 1))))


class Deep(nn.Module):
    """A blind network of four levels by strided convolutions, so that it takes multiples of 16 alone."""

    channels, takes_sigma, stride = 1, False, 16

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.Conv2d(1 if level == 0 else 4, 4, 3, 2, 1) for level in range(4))
        self.up = nn.ModuleList(nn.ConvTranspose2d(4, 1 if level == 0 else 4, 2, 2) for level in range(4))

    def forward(self, noisy: Tensor) -> Tensor:
        """Return the denoised picture."""
        levels = [noisy]
        for down in self.down:
            levels.append(relu(down(levels[-1])))
        deep = levels.pop()
        for up, skip in zip(reversed(self.up), reversed(levels), strict=True):
            deep = skip - up(deep)
        return deep


class Shortcuts(nn.Module):
    """A blind network with additions of two convolutions, of an addition, and of an activation read by no other."""

    channels, takes_sigma, stride = 1, False, 1

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(c, 8, 3, padding=1) for c in (1, 1, 8))
        self.last = nn.Conv2d(8, 1, 1)

    def forward(self, noisy: Tensor) -> Tensor:
        """Return the denoised picture."""
        both = self.first(noisy) + self.second(noisy)
        third = self.third(relu(both))
        return noisy - self.last(both + relu(third) + third)


def _same(inputs: int, outputs: int) -> nn.Conv2d:
    """Return a convolution whose results vary as much as what it reads, so that rounding anywhere shows."""
    conv = nn.Conv2d(inputs, outputs, 3, padding=1)
    nn.init.kaiming_normal_(conv.weight)
    return conv


def unet(*, seed: int = 0) -> Unet:
    """Return the UNet with random weights of that seed, in eval mode."""
    torch.manual_seed(seed)
    return Unet().eval()


def write_weights(name: str, path: Path, *, seed: int = 0, shrink: float = 1.0) -> Path:
    """Return `path`, now random weights of a network; `shrink` scales its last layer, so that it changes little."""
    net = network(name, seed=seed)
    values = dict(net.state_dict())
    for key in ("tail.weight", "tail.bias"):
        values[key] = values[key] * shrink
    weights.save(values, path)
    return path
