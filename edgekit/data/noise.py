"""Noise of the measuring protocol: the same numbers for the same picture, every time and for everybody.

The training loop draws its own noise; this is the noise that figures are measured with.
"""

from __future__ import annotations

import math
from typing import Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from edgekit.data.photos import Pixels
from edgekit.errors import InputError, nearest

Array: TypeAlias = NDArray[np.float32]
Noise: TypeAlias = Literal["gaussian", "gaussian-uint8"]

# A prime far above any number of pictures, so that (index, seed) pairs do not meet.
SEED_STEP = 1_000_003
SEED_LIMIT = 2**32


def add(noise: Noise, picture: Pixels | Array, sigma255: float, *, index: int, seed: int = 0) -> Array:
    """Return the picture with the named noise, float32 (c, h, w) on the scale [0, 1].

    `gaussian` is unclipped, as papers measure; `gaussian-uint8` is what a phone sees: clipped and rounded to 8 bits.

    Raises:
        InputError: Unknown noise, or as `add_gaussian`.
    """
    if noise not in get_args(Noise):
        raise InputError(f"unknown noise '{noise}'", remedy=nearest(noise, get_args(Noise)))
    noisy = add_gaussian(picture, sigma255, index=index, seed=seed)
    return noisy if noise == "gaussian" else clipped_uint8(noisy).astype(np.float32) / np.float32(255)


def add_gaussian(picture: Pixels | Array, sigma255: float, *, index: int, seed: int = 0) -> Array:
    """Return the picture plus white Gaussian noise, unclipped, float32 (c, h, w).

    The noise is `RandomState(index + 1000003 * seed).randn(h, w, c) * sigma255 / 255`, brought to (c, h, w): for seed 0
    and a gray picture the numbers of `RandomState(index).randn(h, w)`, for colour those that the KAIR test scripts lay
    over a (h, w, c) picture. Sums are made in float64 and rounded once.

    Args:
        picture: uint8 in 0..255, or float32 in [0, 1]; (c, h, w).
        sigma255: Standard deviation on the scale 0..255.
        index: The picture's place in its set, from 0.
        seed: Which of the repeated draws this is, from 0.

    Raises:
        InputError: A negative or infinite sigma, a wrong shape, or an index or seed out of range.
    """
    if picture.ndim != 3:
        raise InputError(f"a picture of shape {picture.shape} takes no noise", remedy="give (c, h, w)")
    if not (math.isfinite(sigma255) and sigma255 >= 0):
        raise InputError(f"sigma {sigma255} is no standard deviation", remedy="give 0 or more, as 25")
    state = index + SEED_STEP * seed
    if index < 0 or seed < 0 or state >= SEED_LIMIT:
        raise InputError(
            f"no noise for picture {index} with seed {seed}", remedy="give an index from 0, a seed 0..4000"
        )
    channels, height, width = picture.shape
    drawn = np.random.RandomState(state).randn(height, width, channels).transpose(2, 0, 1)
    scale = 255.0 if picture.dtype == np.uint8 else 1.0
    return (picture.astype(np.float64) / scale + drawn * (sigma255 / 255)).astype(np.float32)


def clipped_uint8(noisy: Array) -> Pixels:
    """Return pictures on the scale [0, 1] as 8-bit pixels: clipped, then rounded (half to even), same shape."""
    levels: Pixels = np.rint(np.clip(noisy, 0, 1) * np.float32(255)).astype(np.uint8)
    return levels
