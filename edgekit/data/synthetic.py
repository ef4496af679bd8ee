"""Dead-leaves pictures: made from a seed, owed to nobody, and enough to train a denoiser on.

Overlapping textured shapes whose sizes follow a power law have the edges, the occlusions and the scale invariance of
photographs (Lee, Mumford and Huang, "Occlusion models for natural images", 2001; for denoisers: Achddou, Gousseau and
Ladjal, "Synthetic images as a regularity prior for image restoration neural networks", 2021).

The bits of a picture depend on its arguments alone. Hence only operations that IEEE 754 rounds in one way are used
(+ - * / sqrt, comparisons, rounding) and whole numbers: a sine, a power, a matrix product or a normal draw differs in
its last bit from one processor or library to the next.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgekit.data.photos import Channels, Pixels
from edgekit.errors import InputError

Plane = NDArray[np.float32]

COVERAGE = 5
MAX_LEAVES = 4000
FIELD_SIZE = 512
# Height of an octave over that of the next coarser one: from clouds (smooth) to sand (rough); photographs are near 1.
ROUGHNESS = (0.6, 0.8, 1.0)


@dataclass(frozen=True, kw_only=True)
class _Leaf:
    """One shape: half-sizes `along` and `across` around (y, x) in pixels, turned to the unit vector (cos, sin).

    softness: width in pixels of its edge, as of a lens out of focus.
    """

    y: float
    x: float
    along: float
    across: float
    cos: float
    sin: float
    softness: float

    @property
    def reach(self) -> int:
        """Whole pixels from the centre to the farthest corner."""
        return math.ceil(math.sqrt(self.along * self.along + self.across * self.across) + self.softness)


class _Draw:
    """Random numbers of which every bit is fixed by the seed."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.Generator(np.random.PCG64(seed))

    def unit(self) -> float:
        """Return a number in [0, 1)."""
        return float(self._rng.random())

    def between(self, low: float, high: float) -> float:
        # Generator.uniform may fuse the product and the sum, which changes the last bit.
        return low + (high - low) * self.unit()

    def below(self, stop: int) -> int:
        return int(self._rng.integers(stop))

    def direction(self) -> tuple[float, float]:
        """Return the cosine and sine of a random angle."""
        while True:
            x, y = self.between(-1, 1), self.between(-1, 1)
            length = math.sqrt(x * x + y * y)
            if 0.1 < length <= 1:
                return x / length, y / length

    def grid(self, size: int) -> Plane:
        """Return (size, size) numbers in [-0.5, 0.5)."""
        return (self._rng.random((size, size)) - 0.5).astype(np.float32)


def dead_leaves(seed: int, height: int, width: int, channels: Channels = 1) -> Pixels:
    """Return a dead-leaves picture, uint8 (channels, height, width), the same bits for the same arguments everywhere.

    Raises:
        InputError: A side is not in 8..4096, or the seed is negative.
    """
    if seed < 0 or not (8 <= height <= 4096 and 8 <= width <= 4096):
        raise InputError(f"no dead leaves of {height}x{width} pixels from seed {seed}", remedy="sides are 8 to 4096")
    draw = _Draw(seed)
    fields = [_fractal(draw, gain) for gain in ROUGHNESS]
    contrast, brightness = draw.between(0.5, 1), draw.unit()
    saturation, sharpness = draw.between(0, 0.5), draw.unit()
    smallest = draw.between(2, 6)
    canvas = np.full((channels, height, width), brightness, dtype=np.float32)
    area = 0.0
    for _ in range(MAX_LEAVES):
        leaf = _leaf(draw, height, width, smallest=smallest, softest=1 + 2 * sharpness)
        colour = _colour(draw, channels, contrast=contrast, brightness=brightness, saturation=saturation)
        _paint(canvas, leaf, colour, draw, fields)
        area += 4 * leaf.along * leaf.across
        if area > COVERAGE * height * width:
            break
    levels: Pixels = np.rint(np.clip(canvas, 0, 1) * np.float32(255)).astype(np.uint8)
    return levels


def _leaf(draw: _Draw, height: int, width: int, *, smallest: float, softest: float) -> _Leaf:
    """Return a leaf anywhere on the picture whose half-size r has the density r^-3, from `smallest` to half a side."""
    largest = max(min(height, width) / 2, smallest + 1)
    ratio = smallest / largest
    size = smallest / math.sqrt(1 - draw.unit() * (1 - ratio * ratio))
    # Half of the leaves are as broad as long; the rest go down to wires.
    aspect = 1.0 if draw.unit() < 0.5 else draw.between(0.1, 1)
    cos, sin = draw.direction()
    return _Leaf(
        y=draw.between(0, height),
        x=draw.between(0, width),
        along=size,
        across=max(size * aspect, 0.7),
        cos=cos,
        sin=sin,
        softness=draw.between(1, softest),
    )


def _colour(
    draw: _Draw, channels: Channels, *, contrast: float, brightness: float, saturation: float
) -> tuple[float, ...]:
    """Return one tone for each channel, around the picture's brightness; gray and colour draw alike."""
    tone = brightness + contrast * (draw.unit() - brightness)
    tints = [saturation * draw.between(-0.5, 0.5) for _ in range(3)]
    return (tone,) if channels == 1 else tuple(tone + tint for tint in tints)


def _paint(canvas: Plane, leaf: _Leaf, colour: tuple[float, ...], draw: _Draw, fields: list[Plane]) -> None:
    """Lay the leaf over the canvas (c, h, w), in place."""
    height, width = canvas.shape[1:]
    top, bottom = max(int(leaf.y) - leaf.reach, 0), min(int(leaf.y) + leaf.reach + 1, height)
    left, right = max(int(leaf.x) - leaf.reach, 0), min(int(leaf.x) + leaf.reach + 1, width)
    dy = np.arange(top, bottom, dtype=np.float32)[:, None] - np.float32(leaf.y)
    dx = np.arange(left, right, dtype=np.float32)[None, :] - np.float32(leaf.x)
    u = dx * np.float32(leaf.cos) + dy * np.float32(leaf.sin)
    v = dy * np.float32(leaf.cos) - dx * np.float32(leaf.sin)
    cover = np.clip(_depth(draw, leaf, u, v) / np.float32(leaf.softness) + np.float32(0.5), 0, 1)
    texture = _texture(draw, leaf, u, v, fields)
    region = canvas[:, top:bottom, left:right]
    for channel, tone in enumerate(colour):
        region[channel] += cover * (texture + np.float32(tone) - region[channel])


def _depth(draw: _Draw, leaf: _Leaf, u: Plane, v: Plane) -> Plane:
    """Return how many pixels each point lies inside an ellipse, a box, or a box with a corner cut off."""
    along, across = np.float32(leaf.along), np.float32(leaf.across)
    shape = draw.unit()
    if shape < 0.5:
        radius = np.sqrt(u * u / (along * along) + v * v / (across * across))
        return (1 - radius) * across
    box: Plane = np.minimum(along - np.abs(u), across - np.abs(v))
    if shape < 0.75:
        return box
    cos, sin = draw.direction()
    cut = np.float32(draw.between(0, 0.7)) * across
    return np.minimum(box, cut - (u * np.float32(cos) + v * np.float32(sin)))


def _texture(draw: _Draw, leaf: _Leaf, u: Plane, v: Plane, fields: list[Plane]) -> Plane:
    """Return what is added to the leaf's tone: nothing, a slope, waves, or a fractal surface; most of it faint."""
    kind, strength = draw.unit(), draw.unit()
    height = np.float32(0.4 * strength * strength)
    if kind < 0.15:
        return np.zeros_like(u)
    if kind < 0.3:
        return u * np.float32(strength / (2 * leaf.along))
    if kind < 0.45:
        wavelength, phase = draw.between(2.5, 20), draw.unit()
        return _wave(u / np.float32(wavelength) + np.float32(phase)) * height
    field = fields[draw.below(len(fields))]
    rows = (np.arange(u.shape[0]) + draw.below(FIELD_SIZE)) % FIELD_SIZE
    columns = (np.arange(u.shape[1]) + draw.below(FIELD_SIZE)) % FIELD_SIZE
    return field[np.ix_(rows, columns)] * height


def _wave(turns: Plane) -> Plane:
    """Return a wave of period 1 and height 1: two parabolas, within 6 % of a sine."""
    x = 2 * (turns - np.floor(turns)) - 1
    wave: Plane = 4 * x * (1 - np.abs(x))
    return wave


def _fractal(draw: _Draw, gain: float) -> Plane:
    """Return a random surface (FIELD_SIZE, FIELD_SIZE) that wraps around, about -1..1: each octave `gain` as high."""
    surface, height = draw.grid(4), 1.0
    while surface.shape[0] < FIELD_SIZE:
        height *= gain
        surface = _doubled(surface) + draw.grid(2 * surface.shape[0]) * np.float32(height)
    low, high = surface.min(), surface.max()
    spread: Plane = (surface - low) / (high - low) * np.float32(2) - np.float32(1)
    return spread


def _doubled(surface: Plane) -> Plane:
    """Return the surface at twice the size, linear between its points and wrapping around."""
    for axis in (0, 1):
        between = (surface + np.roll(surface, -1, axis)) * np.float32(0.5)
        pair = np.stack((surface, between), axis + 1)
        shape = [2 * size if dimension == axis else size for dimension, size in enumerate(surface.shape)]
        surface = pair.reshape(shape)
    return surface
