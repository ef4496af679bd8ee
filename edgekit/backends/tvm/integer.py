"""Integer networks: what the integer kernels compute, operator by operator, each defined to the last bit.

A feature map is int8, real value = scale x (q - zero_point). A convolution sums in int32 and brings the sum to the
grid of what it writes, in 16-bit steps that NEON and AVX-512 both have as one instruction each:

    t = saturate16(sum >> shift)                           an arithmetic shift per channel (to the left if negative)
    u = (t x multiplier + 2^14) >> 15                      sqrdmulh, vpmulhrsw
    u = saturate16(u + (256 x residual x m + 2^14) >> 15)  only where a feature map is added
    q = max(saturate8((u + 2^(fraction - 1)) >> fraction), low)

so u carries `fraction` bits behind the point. A map that additions read keeps them in a second plane:

    rest = saturate8(u - q x 2^fraction)                   after u = max(u, low x 2^fraction) if there is a ReLU
    256 x residual + rest x 2^(8 - fraction)               saturated to 16 bits, in place of 256 x residual above

and so does the picture, with 7 bits. The first and the last convolution read both planes and have 16-bit weights,
w x 2^bits + v, so that their sums are finer by 2^bits; the product of the two lower parts is left out:

    sum = bias + (sum of w x q) x 2^bits + sum of (w x rest + v x q)

Bias, both zero points, the noise level and the rounding of the first shift are part of the sum from the start. The last
convolution is not brought to a grid: the picture that it is subtracted from or added to is float32, and so is
`noisy + float(sum) x scale`, a fused multiply-add that is rounded once.

What lies between convolutions keeps the grid of what it reads, of which it takes the first plane, and writes 8 bits. A
map that comes on another grid is brought to it first, by a depthwise convolution of 1x1:

    concatenation  q
    nearest        q of the pixel (y >> 1, x >> 1)
    bilinear       (9 a + 3 b + 3 c + d + 8) >> 4    a that pixel; b, c, d its neighbours on the side of the result in
                                                     the row, in the column and in both; the border repeats itself
    maximum        the largest q of a square of 2 x 2
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import UnsupportedError

CHANNEL_GROUP = 16
QUAD = 4
INT8_MIN, INT8_MAX = -128, 127
# The lowest that two planes hold: a rest of -1 to the lowest q.
UNBOUNDED = INT8_MIN - 1
# What reaches an int16 reaches half of it at least once it was multiplied by the least multiplier, 2^14.
_MOST_PRODUCT = 2**14
# Of the picture.
PICTURE_REST_BITS = 7
_MOST_FRACTION = 7
_MOST_SHIFT = 30
# The most that the noise level adds to a sum, so that it fits into 32 bits whatever sigma is.
MOST_NOISE = 2.0**29

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Resampling = Literal["nearest", "bilinear", "maximum"]


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The int8 values of a feature map: real value = scale x (q - zero_point)."""

    scale: float
    zero_point: int


@dataclass(frozen=True, kw_only=True)
class Feature:
    """An int8 feature map, (height, width, channels) in memory.

    rest_bits: Bits behind the point that a second plane of int8 holds: q + rest / 2^rest_bits; 0 where there is none.
    """

    name: str
    channels: int
    height: int
    width: int
    grid: Grid
    rest_bits: int = 0


@dataclass(frozen=True, kw_only=True)
class Rescale:
    """How sums become values of `fraction` bits behind the point; one multiplier and shift per channel.

    multiplier: 2^14 to 2^15 - 1.
    shift: Bits to the right before it is multiplied; negative for bits to the left.
    """

    multiplier: Ints
    shift: Ints
    fraction: int


@dataclass(frozen=True, kw_only=True)
class Residual:
    """A feature map that is added to a convolution before it is rounded, times multiplier / 2^(7 + fraction)."""

    feature: Feature
    multiplier: int


@dataclass(frozen=True, kw_only=True)
class Quantize:
    """The picture on the grid of its feature map: clamp(rint(x * inverse), *ends) + zero_point, in float32.

    With a second plane that is in steps of it, of which q is the nearest multiple.

    places: Of each channel, the plane, row and column within a square of `block` x `block` pixels; None for one that
        holds sigma everywhere in place of x, a map of the noise level.
    """

    writes: Feature
    inverse: np.float32
    places: tuple[tuple[int, int, int] | None, ...]
    block: int

    @property
    def ends(self) -> tuple[int, int]:
        """Lowest and highest rounded value, before the zero point is added; in steps of the second plane if any."""
        zero_point, bits = self.writes.grid.zero_point, self.writes.rest_bits
        return (INT8_MIN - zero_point) << bits, ((INT8_MAX - zero_point) << bits) + max((1 << bits >> 1) - 1, 0)


@dataclass(frozen=True, kw_only=True)
class Picture:
    """What the last convolution writes: float(sum) x scale, added to the noisy picture if `onto_noisy`.

    scale: Negative where it is subtracted.
    places: As in `Quantize`; by channel of the convolution.
    """

    scale: NDArray[np.float32]
    places: tuple[tuple[int, int, int], ...]
    block: int
    onto_noisy: bool


@dataclass(frozen=True, kw_only=True)
class Convolution:
    """A convolution, with all that is done to its sums before they are stored.

    weights: (c_out, c_in, height, width), or (c_out, 1, height, width) if depthwise.
    weight_rests: Shaped as `weights`, v of the above; None where only the first plane is read.
    bias: What each sum starts from.
    noise_gain: Per channel, rint(sigma x gain) in float32, at most MOST_NOISE, is added to the bias; None where sigma
        has no part in it.
    padding: Pixels above and left of the picture, which hold the zero point.
    writes: A feature map, or the picture.
    rescale: None where it writes the picture.
    low: Bound of the result; ReLU is no more than that. `UNBOUNDED` where there is none.
    shuffle: Factor of a pixel shuffle: channels are in the order (row, column, channel) of the shuffled map.
    """

    name: str
    reads: Feature
    weights: NDArray[np.int8]
    depthwise: bool
    stride: int
    padding: int
    height: int
    width: int
    bias: Ints
    writes: Feature | Picture
    weight_rests: NDArray[np.int8] | None = None
    noise_gain: NDArray[np.float32] | None = None
    rescale: Rescale | None = None
    residual: Residual | None = None
    low: int = UNBOUNDED
    shuffle: int = 1

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one picture."""
        return self.height * self.width * int(self.weights.size)

    def sum_of_weights(self, of: Callable[[Ints], Ints]) -> Ints:
        """Return, per channel, the sum of `of` all factors that meet an activation of either plane."""
        parts = [self.weights.astype(np.int64)]
        if self.weight_rests is not None:
            parts += [parts[0] << self.reads.rest_bits, self.weight_rests.astype(np.int64)]
        total: Ints = np.sum([of(part).sum((1, 2, 3)) for part in parts], axis=0)
        return total


@dataclass(frozen=True, kw_only=True)
class Concat:
    """Maps of one grid, one behind the other along the channels."""

    reads: tuple[Feature, ...]
    writes: Feature


@dataclass(frozen=True, kw_only=True)
class Resample:
    """A map at twice its resolution (`nearest`, `bilinear`: as half_pixel places them) or at half of it (`maximum`)."""

    how: Resampling
    reads: Feature
    writes: Feature


Operator: TypeAlias = Quantize | Convolution | Concat | Resample


@dataclass(frozen=True, kw_only=True)
class Network:
    """An integer network at a fixed size of picture; the last operator writes the picture.

    margins: Name of a feature map -> pixels around it that hold its zero point, so that windows need no special case.
    narrow: Names of the feature maps whose channels are filled up to a multiple of 4 only, for dense windows.
    """

    channels: int
    height: int
    width: int
    operators: tuple[Operator, ...]
    margins: Mapping[str, int] = field(default_factory=dict)
    narrow: frozenset[str] = frozenset()

    def stored_channels(self, feature: Feature) -> int:
        """Return the channels in memory: the last ones, which nothing reads, fill a vector."""
        group = QUAD if feature.name in self.narrow else CHANNEL_GROUP
        return -(-feature.channels // group) * group


def rescale(factors: Floats, reach: float) -> Rescale:
    """Return the multipliers and shifts for `sum x factor`.

    Args:
        factors: Per channel, more than 0.
        reach: The largest magnitude of a result that must not saturate.
    """
    fraction = min(_MOST_FRACTION, int(np.floor(np.log2(_MOST_PRODUCT / reach))))
    mantissa, exponent = np.frexp(factors * 2.0**fraction)
    multiplier = np.rint(mantissa * 2.0**15).astype(np.int64)
    full = multiplier == 2**15
    shift = -exponent.astype(np.int64) - full
    small = shift > _MOST_SHIFT
    return Rescale(
        multiplier=np.where(small, 0, np.where(full, 2**14, multiplier)),
        shift=np.where(small, _MOST_SHIFT, shift),
        fraction=fraction,
    )


def folded_bias(name: str, bias: Floats, steps: Rescale | None) -> Ints:
    """Return the int32 bias, the rounding of the first shift included.

    Raises:
        UnsupportedError: It does not fit.
    """
    whole = np.rint(bias).astype(np.int64)
    if steps is not None:
        whole = whole + np.where(steps.shift > 0, 1 << np.maximum(steps.shift - 1, 0), 0)
    if np.abs(whole).max() > 2**30:
        raise UnsupportedError(f"'{name}': a bias of {np.abs(whole).max()} does not fit into 32 bits")
    return whole


def check_sums(convolution: Convolution) -> None:
    """Check that no sum can leave 32 bits, whatever the picture.

    Raises:
        UnsupportedError: One can.
    """
    largest = 128 * convolution.sum_of_weights(np.abs) + np.abs(convolution.bias)
    # Kernels for unsigned activations start from a bias that is that much lower.
    largest = largest + 128 * np.abs(convolution.sum_of_weights(lambda part: part))
    if convolution.noise_gain is not None:
        largest = largest + MOST_NOISE
    if convolution.rescale is not None:
        largest = largest * 2.0 ** np.maximum(-convolution.rescale.shift, 0)
    if largest.max() >= 2**31:
        raise UnsupportedError(f"'{convolution.name}': its sums reach {largest.max():.0f} and do not fit into 32 bits")
