"""A package opened for pictures: evaluated by the reference anywhere, or run by Core ML on a Mac."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from edgekit.backends.coreml import engine, evaluate
from edgekit.backends.coreml.program import Package
from edgekit.backends.coreml.structure import INPUT, NOISE_LEVEL, OUTPUT
from edgekit.errors import InputError

if TYPE_CHECKING:
    from edgekit.backends import Array, Level


class ReferenceSession:
    """Evaluates the program on disk with torch; Core ML is not run, so it says nothing about speed."""

    level: Level = "reference"

    def __init__(self, package: Package) -> None:
        self._program = package.program
        self._constants = evaluate.prepare(package.program)

    def __call__(self, noisy: Array, sigma: float) -> Array:
        """Return the denoised picture, shaped as `noisy`, which must have the package's fixed shape."""
        _check_shape(noisy, self._program.inputs[INPUT].shape)
        feeds = {INPUT: torch.from_numpy(noisy), NOISE_LEVEL: torch.full((1, 1, 1, 1), sigma)}
        denoised: Array = evaluate.run(self._program, self._constants, feeds)[OUTPUT].numpy()
        return denoised


class NativeSession:
    """Runs the package by Core ML on a Mac's CPU and Neural Engine; written without a Mac, and never run."""

    level: Level = "native"

    def __init__(self, package: Package) -> None:
        self._inputs = package.program.inputs
        self._model = engine.predictor(package.path)

    def __call__(self, noisy: Array, sigma: float) -> Array:
        """Return the denoised picture, shaped as `noisy`, which must have the package's fixed shape."""
        _check_shape(noisy, self._inputs[INPUT].shape)
        feeds = {INPUT: noisy, NOISE_LEVEL: np.full((1, 1, 1, 1), sigma, np.float32)}
        denoised: Array = self._model.predict({name: feeds[name] for name in self._inputs})[OUTPUT]
        return denoised.astype(np.float32, copy=False)


def _check_shape(noisy: Array, shape: tuple[int, ...]) -> None:
    if noisy.shape != shape:
        raise InputError(f"the picture is {noisy.shape}, the package takes {shape} only", remedy="cut it into tiles")
