"""Integer networks in numpy, bit for bit as `integer` defines them: what every compiled kernel is held against."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgekit.backends.tvm.integer import (
    INT8_MAX,
    INT8_MIN,
    MOST_NOISE,
    UNBOUNDED,
    Concat,
    Convolution,
    Feature,
    Ints,
    Network,
    Picture,
    Quantize,
    Resample,
    Resampling,
)

Array = NDArray[np.float32]
_INT8 = (INT8_MIN, INT8_MAX)
_INT16 = (-(2**15), 2**15 - 1)


@dataclass(frozen=True, kw_only=True)
class Planes:
    """A feature map, (h, w, channels): q, and what it leaves of finer values, 0 where nothing is kept."""

    whole: Ints
    rest: Ints


def run(network: Network, noisy: Array, sigma: float) -> Array:
    """Return the denoised picture, shaped as `noisy` (1, c, h, w), which has the network's size."""
    features: dict[str, Planes] = {}
    denoised = np.zeros_like(noisy)
    for operator in network.operators:
        if isinstance(operator, Quantize):
            features[operator.writes.name] = quantize(operator, noisy, sigma)
        elif isinstance(operator, Concat):
            parts = [features[part.name].whole for part in operator.reads]
            features[operator.writes.name] = _coarse(np.concatenate(parts, -1))
        elif isinstance(operator, Resample):
            features[operator.writes.name] = _coarse(resampled(operator.how, features[operator.reads.name].whole))
        elif isinstance(operator.writes, Picture):
            denoised = picture(operator, operator.writes, features, noisy, sigma)
        else:
            features[operator.writes.name] = requantized(operator, features, sigma)
    return denoised


def quantize(operator: Quantize, noisy: Array, sigma: float) -> Planes:
    """Return the picture, and maps of the noise level beside it, on the grid of its feature map, (h, w, channels)."""
    low, high = (np.float32(end) for end in operator.ends)
    block, level = operator.block, np.full(noisy.shape[1:], sigma, np.float32)
    planes = [
        level[0, ::block, ::block] if place is None else noisy[0, place[0], place[1] :: block, place[2] :: block]
        for place in operator.places
    ]
    scaled = np.clip(np.stack(planes, -1) * operator.inverse, low, high)
    bits = operator.writes.rest_bits
    values = np.rint(scaled).astype(np.int64) + (operator.writes.grid.zero_point << bits)
    whole = (values + (1 << bits >> 1)) >> bits
    return Planes(whole=whole, rest=values - (whole << bits))


def resampled(how: Resampling, values: Ints) -> Ints:
    """Return a map of (h, w, channels) at twice or half its resolution."""
    if how == "maximum":
        height, width = values.shape[0] // 2, values.shape[1] // 2
        squares = values[: 2 * height, : 2 * width].reshape(height, 2, width, 2, -1)
        largest: Ints = squares.max((1, 3))
        return largest
    if how == "nearest":
        return values.repeat(2, 0).repeat(2, 1)
    return (_between(_between(values, 0), 1) + 8) >> 4


def _between(values: Ints, axis: int) -> Ints:
    """Return the values at the quarters between pixels along an axis, twice as many, times 4; the border repeats."""
    count = values.shape[axis]
    near = np.arange(2 * count) // 2
    side = np.clip(near + np.where(np.arange(2 * count) % 2, 1, -1), 0, count - 1)
    between: Ints = 3 * values.take(near, axis) + values.take(side, axis)
    return between


def _coarse(values: Ints) -> Planes:
    return Planes(whole=values, rest=0 * values)


def sums(operator: Convolution, features: dict[str, Planes], sigma: float) -> Ints:
    """Return the int32 sums of a convolution, (h, w, c_out)."""
    read, zero_point = features[operator.reads.name], operator.reads.grid.zero_point
    total = _products(operator, read.whole, zero_point, operator.weights)
    if operator.weight_rests is not None:
        total = total << operator.reads.rest_bits
        total = total + _products(operator, read.rest, 0, operator.weights)
        total = total + _products(operator, read.whole, zero_point, operator.weight_rests)
    bias = operator.bias
    if operator.noise_gain is not None:
        noise = np.clip(np.float32(sigma) * operator.noise_gain, -MOST_NOISE, MOST_NOISE)
        bias = bias + np.rint(noise).astype(np.int64)
    whole: Ints = total + bias
    return whole


def _products(operator: Convolution, values: Ints, outside: int, weights: NDArray[np.int8]) -> Ints:
    """Return the sums of one plane's products, (h, w, c_out)."""
    windows = _windows(operator, values, outside)
    # Sums stay far below 2^53, so float64 is exact, and there is a fast product of matrices for it.
    factors = weights.astype(np.float64)
    if operator.depthwise:
        total = np.einsum("yxcij,cij->yxc", windows, factors[:, 0])
    else:
        flat = windows.reshape(operator.height * operator.width, -1)
        total = flat @ factors.reshape(len(factors), -1).T
    whole: Ints = total.reshape(operator.height, operator.width, len(factors)).astype(np.int64)
    return whole


def requantized(operator: Convolution, features: dict[str, Planes], sigma: float) -> Planes:
    """Return the feature map that a convolution writes, (h, w, channels)."""
    steps = operator.rescale
    assert steps is not None
    total = sums(operator, features, sigma)
    t = np.clip((total << np.maximum(-steps.shift, 0)) >> np.maximum(steps.shift, 0), *_INT16)
    u = _shuffled((t * steps.multiplier + 2**14) >> 15, operator.shuffle)
    if operator.residual is not None:
        feature = operator.residual.feature
        planes = features[feature.name]
        added = 256 * planes.whole + (planes.rest << (8 - feature.rest_bits))
        u = np.clip(u + ((np.clip(added, *_INT16) * operator.residual.multiplier + 2**14) >> 15), *_INT16)
    if operator.low > UNBOUNDED:
        u = np.maximum(u, operator.low << steps.fraction)
    q = np.clip((u + (1 << (steps.fraction - 1))) >> steps.fraction, *_INT8)
    assert isinstance(operator.writes, Feature)
    keeps = operator.writes.rest_bits > 0
    return Planes(whole=q, rest=np.clip(np.clip(u - (q << steps.fraction), *_INT16), *_INT8) if keeps else 0 * q)


def picture(operator: Convolution, writes: Picture, features: dict[str, Planes], noisy: Array, sigma: float) -> Array:
    """Return the denoised picture, shaped as `noisy`."""
    total = sums(operator, features, sigma).astype(np.float32)
    denoised = np.zeros_like(noisy)
    for channel, (plane, row, column) in enumerate(writes.places):
        place = (0, plane, slice(row, None, writes.block), slice(column, None, writes.block))
        given = noisy[place] if writes.onto_noisy else np.zeros_like(noisy[place])
        denoised[place] = _fused(total[:, :, channel], writes.scale[channel], given)
    return denoised


def _fused(one: Array, factor: np.float32, added: Array) -> Array:
    """Return `one x factor + added`, rounded once.

    In float64 the product is exact, and the sum is rounded to odd, which a second rounding cannot spoil (Boldo and
    Melquiond, "Emulation of FMA and correctly rounded sums: proved algorithms using rounding to odd", 2008).
    """
    product, wide = one.astype(np.float64) * np.float64(factor), added.astype(np.float64)
    total = product + wide
    part = total - product
    lost = (product - (total - part)) + (wide - part)
    even = total.view(np.int64) % 2 == 0
    odd = np.nextafter(total, np.where(lost > 0, np.inf, -np.inf))
    return np.where((lost != 0) & even, odd, total).astype(np.float32)


def _windows(operator: Convolution, values: Ints, outside: int) -> NDArray[np.float64]:
    """Return what each sum reads, (h, w, c_in, rows, columns)."""
    _, _, rows, columns = operator.weights.shape
    below = (operator.height - 1) * operator.stride + rows - operator.padding - values.shape[0]
    right = (operator.width - 1) * operator.stride + columns - operator.padding - values.shape[1]
    edges = ((operator.padding, max(below, 0)), (operator.padding, max(right, 0)), (0, 0))
    padded = np.pad(values, edges, constant_values=outside).astype(np.float64)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (rows, columns), axis=(0, 1))
    return windows[:: operator.stride, :: operator.stride][: operator.height, : operator.width]


def _shuffled(values: Ints, factor: int) -> Ints:
    """Return (h, w, factor x factor x c) as (factor x h, factor x w, c)."""
    height, width, channels = values.shape
    split = values.reshape(height, width, factor, factor, channels // factor**2)
    return split.transpose(0, 2, 1, 3, 4).reshape(height * factor, width * factor, channels // factor**2)
