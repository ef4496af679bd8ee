"""Training pictures that stay on the device as uint8, and random patches cut from them there."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgekit.errors import InputError

SEEDS = 2**64  # What torch takes.


class PatchBank:
    """All training pictures in one flat uint8 buffer.

    A batch is a function of its seed alone, so that a resumed run draws what an undisturbed one would have drawn.
    """

    def __init__(self, pictures: Sequence[NDArray[np.uint8]], device: torch.device) -> None:
        """Copy the pictures (c, h, w) to the device."""
        if not pictures:
            raise InputError("there are no training pictures")
        self._device = device
        self._planes = pictures[0].shape[0]
        self._sides = torch.tensor([p.shape[1:] for p in pictures], device=device)
        sizes = [p.size for p in pictures]
        self._starts = torch.tensor(np.concatenate([[0], np.cumsum(sizes)[:-1]]), device=device)
        # By the root of the size: a huge smooth picture would else crowd out the others, and small ones its variety.
        self._weights = torch.tensor(sizes, dtype=torch.float64, device=device).sqrt()
        self._pixels = torch.from_numpy(np.concatenate([p.reshape(-1) for p in pictures])).to(device)
        self.smallest_side = int(self._sides.min())

    def draw(self, *, batch: int, patch: int, sigma: tuple[float, float], seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return (clean, noisy, sigma): random crops, flipped and turned, with noise of a random level.

        Args:
            batch: Number of patches.
            patch: Side in pixels.
            sigma: Range of the noise's standard deviation on the scale of 0 to 255, drawn uniformly for each patch.
            seed: The batch's own seed; any whole number.

        Returns:
            clean (batch, c, patch, patch) in [0, 1]; noisy, shaped the same, unclipped; sigma (batch, 1, 1, 1).
        """
        if patch > self.smallest_side:
            raise InputError(
                f"a patch of {patch} pixels does not fit the smallest training picture, which has a side of "
                f"{self.smallest_side}",
                remedy="set training.patch lower, or remove the picture",
            )
        generator = torch.Generator(self._device).manual_seed(seed % SEEDS)

        def rand(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=generator, device=self._device)

        chosen = torch.multinomial(self._weights, batch, replacement=True, generator=generator)
        height, width = self._sides[chosen].unbind(1)
        top = (rand(batch) * (height - patch + 1)).long()
        left = (rand(batch) * (width - patch + 1)).long()
        row, column = self._oriented_grid(patch, (rand(batch, 3) < 0.5).view(batch, 3, 1, 1))
        offset = (top.view(-1, 1, 1) + row) * width.view(-1, 1, 1) + left.view(-1, 1, 1) + column
        plane = torch.arange(self._planes, device=self._device).view(1, -1, 1, 1) * (height * width).view(-1, 1, 1, 1)
        clean = self._pixels[self._starts[chosen].view(-1, 1, 1, 1) + plane + offset.unsqueeze(1)].float() / 255
        level = (sigma[0] + rand(batch, 1, 1, 1) * (sigma[1] - sigma[0])) / 255
        noise = torch.randn(clean.shape, generator=generator, device=self._device)
        return clean, clean + noise * level, level

    def _oriented_grid(self, patch: int, coins: Tensor) -> tuple[Tensor, Tensor]:
        """Return row and column indices (batch, patch, patch) of one of the eight orientations for each patch."""
        steps = torch.arange(patch, device=self._device)
        row, column = steps.view(1, -1, 1), steps.view(1, 1, -1)
        flip_row, flip_column, turn = coins.unbind(1)
        row = torch.where(flip_row, patch - 1 - row, row)
        column = torch.where(flip_column, patch - 1 - column, column)
        return torch.where(turn, row.mT, row), torch.where(turn, column.mT, column)
