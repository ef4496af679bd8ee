"""From a QDQ graph to an integer network: what lies between the quantized maps becomes part of the convolutions.

    x ─ Q ─ DQ ─ Conv ─ Relu ─ Q ─ DQ ─ ...                               -> one convolution with bounds
    x ─ Q ─ DQ ─ Conv ─ (Q ─ DQ) ─ DepthToSpace ─ (Q ─ DQ) ─ Add ─ Q ─    -> one convolution, shuffled, with a residual
    noisy ─ SpaceToDepth ─ Q ─ DQ ─ Conv ─ (Q ─ DQ) ─ Add(sigma x v) ─ Q  -> quantize; one convolution with a noise gain
    noisy ──────── Concat ─ Q ─ DQ ─ Conv ─                                -> quantize, sigma too, into one map
    sigma ─ Expand ┘
    ... ─ Conv ─ (Q ─ DQ) ─ DepthToSpace ─ (Q ─ DQ) ─ Sub(noisy, .)       -> one convolution that writes the picture; so
                                                                             with Add(noisy, .), or neither

    ... ─ Q ─ DQ ┬ Concat, Resize or MaxPool ─ Q ─ DQ ─                 -> the same, of int8; a map on another grid than
    ... ─ Q ─ DQ ┘                                                      the result's is brought to it by a convolution

    ... ─ Add ┬ Q16 ─ DQ16 ─ Add                                        -> one map of two planes: convolutions read the
              └ Q ─ DQ ─ Conv                                              first; additions, and convolutions with
                                                                           16-bit weights, both

The pairs in brackets fall away: a sum goes to the grid of the last map in its row and is rounded there only once. Maps
of uint8 become int8 by a shift of 128.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias, TypeGuard

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from edgekit.backends.tvm import remedies
from edgekit.backends.tvm.integer import (
    CHANNEL_GROUP,
    INT8_MAX,
    INT8_MIN,
    PICTURE_REST_BITS,
    UNBOUNDED,
    Concat,
    Convolution,
    Feature,
    Floats,
    Grid,
    Network,
    Operator,
    Picture,
    Quantize,
    Resample,
    Resampling,
    Residual,
    check_sums,
    folded_bias,
    rescale,
)
from edgekit.backends.tvm.transposed import shuffled
from edgekit.errors import UnsupportedError
from edgekit.graph.checks import DENOISED, NOISY, SIGMA
from edgekit.graph.resizing import resizing
from edgekit.graph.walk import PAIR, consumers, initializers, input_maps, level_maps, producers

Weights: TypeAlias = NDArray[np.int8 | np.int16]

_ONLY = f"export the model with that, which is all there are kernels for, or {remedies.FLOAT32}"
# What the picture is changed by last.
_SIGNS = {"Add": 1, "Sub": -1}
_BOUNDS = ("Clip", "Relu")
_NO_SUMS = ("Concat", "MaxPool", "Resize")
# The weight of a copy that only changes the grid: the finer, the less its rounding costs.
_COPY_WEIGHT = 64
# Far finer than a picture of 16 bits.
_PICTURE_STEP = 2.0**-20
_MOST_BIAS = 2.0**28
# Zero points, of a map and of what is added to it, on the grid of the result.
_MOST_STEPS = 512


def read(path: Path, *, channels: int, height: int, width: int) -> Network:
    """Return the integer network of a QDQ graph for pictures of that size.

    Raises:
        UnsupportedError: Something in the graph is not computed in integers; the message names it.
    """
    model = onnx.load(path)
    return _Reader(model, path.name, channels, height, width).network()


@dataclass(frozen=True, kw_only=True)
class _Spaced:
    """The picture, or squares of it as channels, with maps of the noise level; `places` as in `integer.Quantize`."""

    places: tuple[tuple[int, int, int] | None, ...]
    block: int


@dataclass(frozen=True, kw_only=True)
class _Noise:
    """sigma x gain, gain in real units per channel."""

    gain: Floats


@dataclass(frozen=True, kw_only=True)
class _Sum:
    """A convolution whose sums were not stored yet; what follows it may still become part of it.

    weights: Of 16 bits where both planes are read.
    unit: Real value of a sum of one, per channel.
    bias: In units.
    """

    name: str
    reads: Feature
    weights: Weights
    depthwise: bool
    stride: int
    padding: int
    height: int
    width: int
    unit: Floats
    bias: Floats
    shuffle: int = 1
    relu: bool = False
    residual: Feature | None = None
    noise: Floats | None = None

    @property
    def wide(self) -> bool:
        """Whether both planes are read, with 16-bit weights."""
        return self.weights.dtype == np.int16


class _LevelMap:
    """sigma at each pixel."""


_Value = _Spaced | _LevelMap | _Noise | _Sum | Feature


class _Reader:
    """One walk over a graph; values of tensors are made when something asks for them."""

    def __init__(self, model: onnx.ModelProto, file: str, channels: int, height: int, width: int) -> None:
        self._file, self._channels, self._height, self._width = file, channels, height, width
        self._made_by, self._readers = producers(model), consumers(model)
        self._constants = {name: numpy_helper.to_array(tensor) for name, tensor in initializers(model).items()}
        for node in model.graph.node:
            if node.op_type == "Constant":
                self._constants[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
        picture = _Spaced(places=tuple((plane, 0, 0) for plane in range(channels)), block=1)
        self._values: dict[str, _Value] = {NOISY: picture, **dict.fromkeys(level_maps(model), _LevelMap())}
        self._inputs = input_maps(model)
        self._operators: list[Operator] = []

    def network(self) -> Network:
        """Return the whole network."""
        self._finish()
        margins: dict[str, int] = {}
        narrow = {operator.writes.name for operator in self._operators if _few_channels(operator)}
        for operator in self._operators:
            if isinstance(operator, Convolution):
                margins[operator.reads.name] = max(margins.get(operator.reads.name, 0), _margin(operator))
                narrow -= {operator.reads.name} if operator.depthwise else set()
                narrow -= {operator.residual.feature.name} if operator.residual is not None else set()
            elif isinstance(operator, Concat):
                narrow -= {part.name for part in operator.reads}
            elif isinstance(operator, Resample):
                narrow -= {operator.reads.name}
        return Network(
            channels=self._channels,
            height=self._height,
            width=self._width,
            operators=tuple(self._operators),
            margins=margins,
            narrow=frozenset(narrow),
        )

    def _finish(self) -> None:
        """Make the operator that writes the picture."""
        name = self._real(DENOISED)
        node, sign = self._made_by[name], 0
        if node.op_type in _BOUNDS:
            raise self._refused(
                node,
                "bounds the picture",
                f"leave it out, since the library clips the bytes that it writes, or {remedies.FLOAT32}",
            )
        if node.op_type in _SIGNS:
            reads = [self._real(read) for read in node.input]
            if NOISY not in reads or (reads[0] != NOISY and node.op_type == "Sub"):
                raise self._refused(node, "changes something else than the picture", remedies.instead_of("Sub"))
            sign, name = _SIGNS[node.op_type], reads[1 - reads.index(NOISY)]
        last = self._made_by.get(name, node)
        total = self._value(name) if last.op_type not in _NO_SUMS else None
        if not isinstance(total, _Sum) or total.residual is not None or total.relu or total.depthwise:
            raise self._refused(last, "writes the picture, and is no dense convolution", remedies.ENDING)
        total = _conditioned(total, _PICTURE_STEP)
        places = _square(total.shuffle, self._channels)
        if len(places) != total.weights.shape[0] or total.height * total.shuffle != self._height:
            raise self._refused(node, "writes a picture of another shape", remedies.ENDING)
        scale = ((sign or 1) * total.unit).astype(np.float32)
        picture = Picture(scale=scale, places=places, block=total.shuffle, onto_noisy=sign != 0)
        self._add(total, replace(_unscaled(total), writes=picture, bias=folded_bias(total.name, total.bias, None)))

    def _value(self, name: str) -> _Value:
        """Return what a tensor holds, and add the operators that it takes."""
        if name not in self._values:
            node = self._made_by.get(name)
            if name == SIGMA:
                raise UnsupportedError(f"{self._file}: '{SIGMA}' goes into an operator of maps", remedy=remedies.LEVEL)
            if node is None:
                raise UnsupportedError(f"{self._file}: nothing makes the tensor '{name}'")
            if node.op_type not in _RULES:
                raise self._refused(node, "is not computed in integers", remedies.instead_of(node.op_type))
            self._values[name] = _RULES[node.op_type](self, node)
        return self._values[name]

    def _convolution(self, node: onnx.NodeProto) -> _Sum:
        settings = _attributes(node)
        reads = self._feature(node.input[0], node)
        weights, scale = self._weights(node)
        groups = settings.get("group", [1])[0]
        depthwise = groups == reads.channels == weights.shape[0] and weights.shape[1] == 1 and groups > 1
        stride, kernel, pads = settings.get("strides", [1, 1]), weights.shape[2:], settings.get("pads", [0, 0, 0, 0])
        plain = len(set(stride)) == 1 and set(settings.get("dilations", [1])) == {1} and len(set(pads[:2])) == 1
        if not plain or (groups > 1 and not depthwise):
            raise self._refused(
                node, "has dilation, groups, or strides or padding that differ between the axes", remedies.WINDOW
            )
        size = [
            (extent + pads[axis] + pads[axis + 2] - kernel[axis]) // stride[0] + 1
            for axis, extent in enumerate((reads.height, reads.width))
        ]
        if weights.dtype == np.int16:
            if depthwise or not reads.rest_bits:
                raise self._refused(node, "has weights of 16 bits and is depthwise, or reads a map of 8 bits")
            step = max(int(np.abs(weights.astype(int)).max()), 1) / (INT8_MAX << reads.rest_bits)
            weights, scale = np.rint(weights / step).astype(np.int16), scale * step
        elif reads.rest_bits and self._is_wide(node.input[0]):
            raise self._refused(node, "has weights of 8 bits and reads a map of 16 bits")
        unit = reads.grid.scale * scale
        zeros = weights.astype(np.float64).sum((1, 2, 3)) * reads.grid.zero_point
        return _Sum(
            name=node.name,
            reads=reads,
            weights=weights,
            depthwise=depthwise,
            stride=stride[0],
            padding=pads[0],
            height=size[0],
            width=size[1],
            unit=unit,
            bias=self._real_bias(node, len(unit)) / unit - zeros,
        )

    def _transposed(self, node: onnx.NodeProto) -> _Sum:
        """A transposed convolution is one to the channels of all pixels that one becomes, shuffled (`transposed`)."""
        weights, scale = self._weights(node)
        found = shuffled(node, weights)
        if found is None or len(set(found.before)) != 1:
            raise self._refused(
                node, "does not make a square of pixels of each, or has groups or dilation", remedies.ENLARGING
            )
        reads = self._feature(node.input[0], node)
        if weights.dtype != np.int8 or self._is_wide(node.input[0]):
            raise self._refused(node, "is transposed and of 16 bits")
        unit = reads.grid.scale * np.tile(np.broadcast_to(scale, weights.shape[1]), found.factor**2)
        bias = np.tile(self._real_bias(node, weights.shape[1]), found.factor**2)
        zeros = found.weights.astype(np.float64).sum((1, 2, 3)) * reads.grid.zero_point
        return _Sum(
            name=node.name,
            reads=reads,
            weights=found.weights,
            depthwise=False,
            stride=1,
            padding=found.before[0],
            height=reads.height,
            width=reads.width,
            unit=unit,
            bias=bias / unit - zeros,
            shuffle=found.factor,
        )

    def _activated(self, node: onnx.NodeProto) -> _Sum:
        value = self._value(self._real(node.input[0]))
        if isinstance(value, Feature):
            value = self._copy(value, node.name)
        # The bound of a result holds for what was added, too.
        return replace(value, relu=True) if isinstance(value, _Sum) else self._not_a_sum(node)

    def _shuffled(self, node: onnx.NodeProto) -> _Sum:
        total = self._open_sum(node.input[0], node)
        settings = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        factor = int(settings["blocksize"])
        if total.shuffle != 1 or total.noise is not None or total.depthwise:
            raise self._refused(node, "shuffles the pixels of what is no sum of a dense convolution", remedies.DENSE)
        channels = len(total.unit) // factor**2
        order = np.arange(len(total.unit))
        if settings.get("mode", b"DCR") == b"CRD":
            order = order.reshape(channels, factor, factor).transpose(1, 2, 0).reshape(-1)
        return replace(
            total,
            shuffle=factor,
            weights=np.ascontiguousarray(total.weights[order]),
            unit=total.unit[order],
            bias=total.bias[order],
        )

    def _spaced(self, node: onnx.NodeProto) -> _Spaced:
        picture = self._value(self._real(node.input[0]))
        if not isinstance(picture, _Spaced) or picture.block != 1:
            raise self._refused(
                node,
                "reads something else than the picture",
                f"use a convolution whose stride is its window in its place, or {remedies.FLOAT32}",
            )
        factor = _attributes(node)["blocksize"][0]
        return _Spaced(places=_square(factor, self._channels), block=factor)

    def _reordered(self, node: onnx.NodeProto) -> _Spaced:
        picture = self._value(self._real(node.input[0]))
        order = self._constants.get(node.input[1])
        if not isinstance(picture, _Spaced) or order is None or _attributes(node).get("axis", [0])[0] != 1:
            raise self._refused(node, "is no reordering of the picture's channels", remedies.instead_of("Gather"))
        return replace(picture, places=tuple(picture.places[int(index)] for index in order.reshape(-1)))

    def _concatenated(self, node: onnx.NodeProto) -> Feature | _Spaced:
        if node.output[0] in self._inputs:
            return self._with_levels(node)
        grid = self._grid_of_result(node)
        parts = tuple(self._on_grid(name, grid, node) for name in node.input)
        height, width = parts[0].height, parts[0].width
        if _attributes(node)["axis"] not in ([1], [-3]) or any((p.height, p.width) != (height, width) for p in parts):
            raise self._refused(node, "joins something else than the channels of maps of one size", remedies.FLOAT32)
        channels = sum(part.channels for part in parts)
        joined = Feature(name=node.output[0], channels=channels, height=height, width=width, grid=grid)
        self._operators.append(Concat(reads=parts, writes=joined))
        return joined

    def _with_levels(self, node: onnx.NodeProto) -> _Spaced:
        """The picture and maps of the noise level, whose channels are those that the convolutions read beside it."""
        parts = [self._value(name) for name in node.input]
        pictures = [part for part in parts if isinstance(part, _Spaced)]
        levels = len(parts) - len(pictures)
        readers = [n for n in self._real_readers(node.output[0]) if n.op_type == "Conv"]
        wanted = {self._weights(reader)[0].shape[1] for reader in readers}
        beside = {count - sum(len(picture.places) for picture in pictures) for count in wanted}
        if len({picture.block for picture in pictures}) != 1 or len(beside) != 1 or (levels > 1 and beside != {levels}):
            raise self._refused(
                node, "joins more than the picture with one map of the noise level", remedies.LEVEL_BESIDE
            )
        each = beside.pop() if levels == 1 else 1
        places = [part.places if isinstance(part, _Spaced) else (None,) * each for part in parts]
        return _Spaced(places=tuple(place for some in places for place in some), block=pictures[0].block)

    def _resized(self, node: onnx.NodeProto) -> Feature:
        scales = self._constants.get(node.input[2]) if len(node.input) > 2 else None
        found = resizing({a.name: helper.get_attribute_value(a) for a in node.attribute}, scales)
        if found is None or (found.height, found.width) != (2, 2):
            raise self._refused(
                node, "is no resizing to twice the height and width, nearest or bilinear as half_pixel", _ONLY
            )
        return self._resampled(node, "bilinear" if found.mode == "linear" else found.mode)

    def _pooled(self, node: onnx.NodeProto) -> Feature:
        settings = _attributes(node)
        square = settings["kernel_shape"] == settings.get("strides") == [2, 2] and not any(settings.get("pads", [0]))
        if not square or settings.get("ceil_mode", [0])[0] or set(settings.get("dilations", [1])) != {1}:
            raise self._refused(node, "is no pooling of 2x2 pixels with stride 2", _ONLY)
        return self._resampled(node, "maximum")

    def _resampled(self, node: onnx.NodeProto, how: Resampling) -> Feature:
        reads = self._on_grid(node.input[0], self._grid_of_result(node), node)
        height, width = (n // 2 if how == "maximum" else 2 * n for n in (reads.height, reads.width))
        resampled = replace(reads, name=node.output[0], height=height, width=width, rest_bits=0)
        self._operators.append(Resample(how=how, reads=reads, writes=resampled))
        return resampled

    def _grid_of_result(self, node: onnx.NodeProto) -> Grid:
        """Return the 8-bit grid of what a node gives that is no convolution."""
        grid = self._grid(node.output[0])
        if grid is None or any(map(self._is_wide_pair, self._readers[node.output[0]])):
            raise self._refused(node, "gives a map that is not quantized, or to 16 bits")
        return grid

    def _on_grid(self, name: str, grid: Grid, reader: onnx.NodeProto) -> Feature:
        """Return the map behind a tensor that `reader` reads, brought to that grid if it has another."""
        feature = self._feature(name, reader)
        if feature.grid == grid:
            return feature
        return self._stored(
            f"{feature.name} for {reader.output[0]}", self._copy(feature, reader.name), grid, wide=False
        )

    def _noise_level(self, node: onnx.NodeProto) -> _Noise:
        sigma, gain = sorted(map(self._real, node.input), key=lambda name: name != SIGMA)
        if sigma != SIGMA or gain not in self._constants:
            raise self._refused(node, "multiplies something else than sigma by constants, in float", remedies.FACTORS)
        return _Noise(gain=self._constants[gain].astype(np.float64).reshape(-1))

    def _sum_of_two(self, node: onnx.NodeProto) -> _Sum:
        first, second = (self._value(self._real(name)) for name in node.input)
        for one, other in ((first, second), (second, first)):
            if isinstance(one, _Sum) and isinstance(other, _Noise):
                # Shuffled channels are in the order (row, column, channel), so each pixel of a square has them all.
                squares = one.shuffle**2
                gain = np.tile(np.broadcast_to(other.gain, len(one.unit) // squares), squares)
                return replace(self._open(one, node), noise=gain if one.noise is None else one.noise + gain)
        names = [self._real(name) for name in node.input]
        pending = [
            name for name in names if isinstance(self._values[name], _Sum) and self._is_open(self._values[name], name)
        ]
        if not pending:
            copied, residual = (self._feature(name, node) for name in node.input)
            # A copy has no second plane: of two maps that have one, that on the finer grid loses less.
            coarser = residual.rest_bits and copied.grid.scale > residual.grid.scale
            if copied.rest_bits and (coarser or not residual.rest_bits):
                copied, residual = residual, copied
            return replace(self._copy(copied, node.name), residual=residual)
        total = self._values[pending[-1]]
        assert isinstance(total, _Sum)
        other_name = node.input[1 - names.index(pending[-1])]
        return replace(total, residual=self._feature(other_name, node))

    def _copy(self, feature: Feature, name: str) -> _Sum:
        """A feature map as a sum, so that another grid or another map can be brought to it."""
        return _Sum(
            name=name,
            reads=feature,
            weights=np.full((feature.channels, 1, 1, 1), _COPY_WEIGHT, np.int8),
            depthwise=True,
            stride=1,
            padding=0,
            height=feature.height,
            width=feature.width,
            unit=np.full(feature.channels, feature.grid.scale / _COPY_WEIGHT),
            bias=np.full(feature.channels, -float(_COPY_WEIGHT * feature.grid.zero_point)),
        )

    def _feature(self, name: str, reader: onnx.NodeProto) -> Feature:
        """Return the int8 map behind a tensor that `reader` reads through a QDQ pair."""
        real = self._real(name)
        value = self._value(real)
        if isinstance(value, Feature):
            return value
        wide = any(map(self._is_wide_pair, self._readers.get(real, [])))
        grid = self._grid(real)
        if isinstance(value, _Noise | _LevelMap):
            raise self._refused(reader, f"reads '{real}', a level of the noise", remedies.LEVEL)
        if grid is None:
            raise self._refused(reader, f"reads '{real}', which is not quantized")
        if isinstance(value, _Spaced):
            made = self._quantized(real, value, grid, wide)
        else:
            made = self._stored(real, value, grid, wide=wide)
        self._values[real] = made
        return made

    def _quantized(self, name: str, value: _Spaced, grid: Grid, wide: bool) -> Feature:
        feature = Feature(
            name=name,
            channels=len(value.places),
            height=self._height // value.block,
            width=self._width // value.block,
            grid=grid,
            rest_bits=PICTURE_REST_BITS if wide else 0,
        )
        inverse = np.float32(2**feature.rest_bits / np.float32(grid.scale))
        self._operators.append(Quantize(writes=feature, inverse=inverse, places=value.places, block=value.block))
        return feature

    def _stored(self, name: str, total: _Sum, grid: Grid, *, wide: bool) -> Feature:
        """Add the operator that brings sums to a grid; returns the map that it writes."""
        ratio = total.residual.grid.scale / grid.scale if total.residual is not None else 0.0
        offset = grid.zero_point - (total.residual.grid.zero_point * ratio if total.residual is not None else 0.0)
        total = _conditioned(total, grid.scale)
        factors = total.unit / grid.scale
        steps = rescale(factors, 128 * (1 + ratio))
        feature = Feature(
            name=name,
            channels=len(total.unit) // total.shuffle**2,
            height=total.height * total.shuffle,
            width=total.width * total.shuffle,
            grid=grid,
            rest_bits=steps.fraction if wide else 0,
        )
        residual = None
        if total.residual is not None:
            if (total.residual.height, total.residual.width, total.residual.channels) != (
                feature.height,
                feature.width,
                feature.channels,
            ):
                raise UnsupportedError(
                    f"{self._file}: '{total.name}': an addition of maps of different shapes", remedy=remedies.FLOAT32
                )
            if steps.fraction < 2:
                raise UnsupportedError(f"{self._file}: '{total.name}': the ranges of an addition are too far apart")
            multiplier = round(ratio * 2 ** (steps.fraction + 7))
            residual = Residual(feature=total.residual, multiplier=multiplier)
        convolution = replace(
            _unscaled(total),
            writes=feature,
            bias=folded_bias(total.name, total.bias + offset / factors, steps),
            rescale=steps,
            residual=residual,
            low=max(INT8_MIN, min(grid.zero_point, INT8_MAX)) if total.relu else UNBOUNDED,
        )
        self._add(total, convolution)
        return feature

    def _add(self, total: _Sum, convolution: Convolution) -> None:
        if total.noise is not None:
            convolution = replace(convolution, noise_gain=(total.noise / total.unit).astype(np.float32))
        check_sums(convolution)
        self._operators.append(convolution)

    def _open_sum(self, name: str, node: onnx.NodeProto) -> _Sum:
        real = self._real(name)
        value = self._value(real)
        if isinstance(value, Feature):
            return self._copy(value, node.name)
        return self._open(value, node) if isinstance(value, _Sum) else self._not_a_sum(node)

    def _open(self, total: _Sum, node: onnx.NodeProto) -> _Sum:
        if total.residual is not None or total.relu:
            raise self._refused(node, "follows an activation or an addition", remedies.DENSE)
        return total

    def _not_a_sum(self, node: onnx.NodeProto) -> _Sum:
        raise self._refused(node, "reads something else than a feature map", remedies.DENSE)

    def _is_open(self, total: _Value, name: str) -> bool:
        """Return whether a sum can take a residual: nothing else reads it, and nothing was done to it yet."""
        if not isinstance(total, _Sum) or total.residual is not None or total.relu or total.noise is not None:
            return False
        return len(self._real_readers(name)) == 1

    def _real_readers(self, name: str) -> list[onnx.NodeProto]:
        """Return the nodes that read a tensor, also through a QDQ pair."""
        found: list[onnx.NodeProto] = []
        for node in self._readers.get(name, []):
            found += self._real_readers(node.output[0]) if node.op_type in PAIR else [node]
        return found

    def _real(self, name: str) -> str:
        """Return the tensor that a QDQ pair rounds, or the tensor itself."""
        node = self._made_by.get(name)
        while node is not None and node.op_type in PAIR and node.input[0] not in self._constants:
            name = node.input[0]
            node = self._made_by.get(name)
        return name

    def _grid(self, name: str) -> Grid | None:
        """Return the 8-bit grid that a tensor is rounded to; None where nothing rounds it.

        Of a tensor with a 16-bit pair it is the one that convolutions read, of which the finer values are then parts,
        or, where there is none, the one over the same range.
        """
        finer = None
        for node in self._readers.get(name, []):
            if node.op_type == "QuantizeLinear":
                scale = float(self._constants[node.input[1]].reshape(-1)[0])
                zero = self._constants[node.input[2]] if len(node.input) > 2 else np.zeros(1, np.uint8)
                if zero.dtype == np.int16:
                    finer = Grid(scale=256 * scale, zero_point=round(int(zero.reshape(-1)[0]) / 256))
                    continue
                if zero.dtype not in (np.int8, np.uint8):
                    raise self._refused(node, f"rounds to {zero.dtype}, not to 8 or 16 bits")
                shift = 128 if zero.dtype == np.uint8 else 0
                return Grid(scale=scale, zero_point=int(zero.reshape(-1)[0]) - shift)
        return finer

    def _is_wide(self, name: str) -> bool:
        """Return whether a tensor is what a 16-bit pair gives."""
        return name in self._made_by and self._is_wide_pair(self._made_by[name])

    def _is_wide_pair(self, node: onnx.NodeProto) -> bool:
        """Return whether a node is half of a 16-bit pair."""
        return node.op_type in PAIR and len(node.input) > 2 and self._constants[node.input[2]].dtype == np.int16

    def _weights(self, node: onnx.NodeProto) -> tuple[Weights, Floats]:
        """Return a convolution's int8 or int16 weights and the scale of each output channel."""
        made = self._made_by.get(node.input[1])
        if made is None or made.op_type != "DequantizeLinear" or made.input[0] not in self._constants:
            raise self._refused(node, "has weights in float")
        weights, scale = self._constants[made.input[0]], self._constants[made.input[1]].astype(np.float64)
        zero = self._constants[made.input[2]] if len(made.input) > 2 else np.zeros(1, np.int8)
        lowest = {np.dtype(np.int8): -INT8_MAX, np.dtype(np.int16): -(2**15)}
        if weights.dtype not in lowest or zero.any() or weights.min() < lowest[weights.dtype]:
            raise self._refused(node, "has weights that are not symmetric int8 in [-127, 127] or int16")
        axis = 0 if node.op_type == "Conv" else 1
        if scale.size > 1 and _attributes(made).get("axis", [1])[0] != axis:
            raise self._refused(node, f"has a weight scale for another axis than that of its output, {axis}")
        return weights, np.broadcast_to(scale.reshape(-1), weights.shape[axis]).copy()

    def _real_bias(self, node: onnx.NodeProto, count: int) -> Floats:
        """Return a convolution's bias in real units."""
        name = node.input[2] if len(node.input) > 2 else ""
        if not name:
            return np.zeros(count)
        if name in self._constants:
            stored: Floats = self._constants[name].astype(np.float64)
            return stored
        made = self._made_by[name]
        if made.op_type != "DequantizeLinear" or made.input[0] not in self._constants:
            raise self._refused(node, "has a bias that is not constant")
        whole, unit = (self._constants[name].astype(np.float64) for name in made.input[:2])
        bias: Floats = whole * unit
        return bias

    def _refused(self, node: onnx.NodeProto, why: str, remedy: str = remedies.PLACE) -> UnsupportedError:
        return UnsupportedError(f"{self._file}: {node.op_type} '{node.name}' {why}", remedy=remedy)


_RULES: dict[str, Callable[[_Reader, onnx.NodeProto], _Value]] = {
    "Conv": _Reader._convolution,
    "ConvTranspose": _Reader._transposed,
    "Relu": _Reader._activated,
    "Add": _Reader._sum_of_two,
    "DepthToSpace": _Reader._shuffled,
    "SpaceToDepth": _Reader._spaced,
    "Gather": _Reader._reordered,
    "Mul": _Reader._noise_level,
    "Concat": _Reader._concatenated,
    "Resize": _Reader._resized,
    "MaxPool": _Reader._pooled,
}


def _unscaled(total: _Sum) -> Convolution:
    """Return the operator of a sum, still without what it writes."""
    bits = total.reads.rest_bits if total.wide else 0
    whole = (total.weights.astype(np.int64) + (1 << bits >> 1)) >> bits
    return Convolution(
        name=total.name,
        reads=total.reads,
        weights=whole.astype(np.int8),
        weight_rests=(total.weights - (whole << bits)).astype(np.int8) if total.wide else None,
        depthwise=total.depthwise,
        stride=total.stride,
        padding=total.padding,
        height=total.height,
        width=total.width,
        bias=np.zeros(len(total.unit), np.int64),
        writes=total.reads,
        shuffle=total.shuffle,
    )


def _conditioned(total: _Sum, step: float) -> _Sum:
    """Return a sum whose bias fits into 32 bits, for results in steps of that size.

    A channel without weights gets a unit of its own, since any is right. Where a bias is more than 2^28 units, weights
    hardly count, and are rounded to a coarser unit.
    """
    dead = ~total.weights.any((1, 2, 3))
    unit = np.where(dead, step / 2**10, total.unit)
    largest = np.maximum(np.abs(total.bias) * total.unit, _MOST_STEPS * step) / unit
    coarser = 2.0 ** np.ceil(np.maximum(np.log2(largest / _MOST_BIAS), 0))
    weights = np.rint(total.weights / coarser[:, None, None, None]).astype(total.weights.dtype)
    return replace(total, weights=weights, unit=unit * coarser, bias=total.bias * total.unit / (unit * coarser))


def _few_channels(operator: Operator) -> TypeGuard[Quantize]:
    return isinstance(operator, Quantize) and operator.writes.channels <= CHANNEL_GROUP // 2


def _margin(operator: Convolution) -> int:
    """Return how many pixels beyond a map the windows of a convolution reach."""
    rows, columns = operator.weights.shape[2:]
    below = (operator.height - 1) * operator.stride + rows - operator.padding - operator.reads.height
    right = (operator.width - 1) * operator.stride + columns - operator.padding - operator.reads.width
    return max(operator.padding, int(below), int(right))


def _square(factor: int, channels: int) -> tuple[tuple[int, int, int], ...]:
    """Return (plane, row, column) of the channels of SpaceToDepth, which are in the order (row, column, plane)."""
    return tuple((p, r, c) for r in range(factor) for c in range(factor) for p in range(channels))


def _attributes(node: onnx.NodeProto) -> Mapping[str, list[int]]:
    """Return a node's integer attributes, each as a list."""
    found: dict[str, list[int]] = {}
    for attribute in node.attribute:
        value = helper.get_attribute_value(attribute)
        if isinstance(value, int):
            found[attribute.name] = [value]
        elif isinstance(value, (list, tuple)) and all(isinstance(one, int) for one in value):
            found[attribute.name] = list(value)
    return found
