"""An integer network as calls of kernels: the code of each operator, and its constants in the order it reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from tvm import tirx

from edgekit.backends.tvm import integer_kernels as kernels
from edgekit.backends.tvm.integer import (
    INT8_MIN,
    MOST_NOISE,
    Concat,
    Convolution,
    Feature,
    Ints,
    Network,
    Operator,
    Picture,
    Quantize,
    Rescale,
)
from edgekit.backends.tvm.integer_kernels import (
    Dense,
    Depthwise,
    Finish,
    FromPicture,
    Joined,
    Kernel,
    Level,
    Map,
    Resampled,
    ToPicture,
    Window,
)
from edgekit.backends.tvm.machine import Machine
from edgekit.backends.tvm.program import Constant, Input, Result, Step, Tensor

_Number = TypeVar("_Number", np.int64, np.float32)


@dataclass(frozen=True, kw_only=True)
class IntegerProgram:
    """A network for one machine.

    kernels: Name -> code; operators of the same shape share one.
    steps: The calls, in order; the last one writes the picture.
    macs: Name of a kernel -> multiply-accumulates of all of its calls for one picture; 0 for what is no convolution.
    """

    kernels: dict[str, tirx.PrimFunc]
    steps: tuple[Step, ...]
    macs: dict[str, int]


def write(network: Network, machine: Machine) -> IntegerProgram:
    """Return the code of a network."""
    writer = _Writer(network, machine)
    for operator in network.operators:
        writer.add(operator)
    return IntegerProgram(kernels=writer.kernels, steps=tuple(writer.steps), macs=writer.macs)


class _Writer:
    def __init__(self, network: Network, machine: Machine) -> None:
        self._network, self._machine = network, machine
        self._features: dict[str, Result] = {}
        self._names: dict[Kernel, str] = {}
        self.kernels: dict[str, tirx.PrimFunc] = {}
        self.steps: list[Step] = []
        self.macs: dict[str, int] = {}

    def add(self, operator: Operator) -> None:
        """Add the call, or calls, of an operator."""
        if isinstance(operator, Quantize):
            self._quantize(operator)
        elif isinstance(operator, Convolution):
            self._convolution(operator)
        elif isinstance(operator, Concat):
            parts = tuple((part.channels, self._first_plane(part)) for part in operator.reads)
            self._move(Joined(parts=parts, writes=self._map(operator.writes)), operator.reads, operator.writes)
        else:
            reads, writes = self._first_plane(operator.reads), self._map(operator.writes)
            self._move(Resampled(how=operator.how, reads=reads, writes=writes), (operator.reads,), operator.writes)

    def _quantize(self, operator: Quantize) -> None:
        zero_point = (operator.writes.grid.zero_point + self._offset) << operator.writes.rest_bits
        settings = np.array([operator.inverse, *operator.ends, zero_point], np.float32)
        writes = self._map(operator.writes)
        kernel = FromPicture(planes=self._network.channels, block=operator.block, places=operator.places, writes=writes)
        level = (Input("sigma"),) if None in operator.places else ()
        reads = (Input("noisy"), *level, _constant(settings), self._outside(operator.writes))
        self._features[operator.writes.name] = self._call(kernel, reads, writes.bytes)

    def _move(self, kernel: Joined | Resampled, reads: Sequence[Feature], writes: Feature) -> None:
        given: list[Tensor] = [self._features[feature.name] for feature in reads]
        if self._margin(writes):
            given.append(self._outside(writes))
        self._features[writes.name] = self._call(kernel, tuple(given), kernel.writes.bytes)

    def _convolution(self, operator: Convolution) -> None:
        kernel = self._kernel(operator)
        squares = _squares(operator)
        stored = (kernel.channels if isinstance(kernel, Dense) else kernel.ends.writes.channels) * squares
        order = kernels.lanes_of(kernel, self._machine)
        bias = _by_lane(_padded(self._bias(operator), squares, stored), order).astype(np.int32)
        pack = pack_dense if isinstance(kernel, Dense) else pack_depthwise
        parts = [part for part in (operator.weights, operator.weight_rests) if part is not None]
        packed = np.concatenate([pack(operator, part, kernel, self._machine).reshape(-1) for part in parts])
        reads: list[Tensor] = [self._features[operator.reads.name], _constant(packed)]
        if operator.noise_gain is None:
            reads.append(_constant(bias))
        else:
            gain = _by_lane(_padded(operator.noise_gain, squares, stored), order).astype(np.float32)
            bound = np.full(stored, MOST_NOISE, np.float32)
            level = (Input("sigma"), _constant(bias), _constant(gain), _constant(bound))
            reads.append(self._call(Level(channels=stored), level, 4 * stored))
        if isinstance(operator.writes, Picture):
            reads.append(_constant(_padded(operator.writes.scale, 1, stored)))
            if operator.writes.onto_noisy:
                reads.append(Input("noisy"))
            size = 4 * self._network.channels * self._network.height * self._network.width
        else:
            reads += self._finish(operator, operator.rescale, stored, order)
            size = self._map(operator.writes).bytes
        written = self._call(kernel, tuple(reads), size, operator.macs)
        if isinstance(operator.writes, Feature):
            self._features[operator.writes.name] = written

    def _finish(self, operator: Convolution, steps: Rescale | None, stored: int, order: Sequence[int]) -> list[Tensor]:
        assert steps is not None
        squares = operator.shuffle**2
        shift = _by_lane(_padded(steps.shift, squares, stored), order)
        multiplier = _padded(steps.multiplier, squares, stored)
        reads: list[Tensor]
        if self._machine.unsigned:
            reads = [_constant(np.maximum(shift, 0).astype(np.int32))]
            if (steps.shift < 0).any():
                reads.append(_constant(np.maximum(-shift, 0).astype(np.int32)))
        else:
            reads = [_constant((-shift).astype(np.int32))]
        reads.append(_constant(multiplier.astype(np.int16)))
        if operator.residual is not None:
            reads.append(self._features[operator.residual.feature.name])
            lanes = self._machine.vectors * self._machine.lanes
            reads.append(_constant(np.full(lanes, operator.residual.multiplier, np.int16)))
        assert isinstance(operator.writes, Feature)
        if self._margin(operator.writes):
            reads.append(self._outside(operator.writes))
        return reads

    def _kernel(self, operator: Convolution) -> Dense | Depthwise:
        rows, columns = operator.weights.shape[2:]
        wide = operator.weight_rests is not None
        window = Window(
            reads=self._map(operator.reads) if wide else self._first_plane(operator.reads),
            rows=rows,
            columns=columns,
            stride=operator.stride,
            padding=operator.padding,
            height=operator.height,
            width=operator.width,
        )
        ends = self._ends(operator)
        if isinstance(ends, ToPicture):
            assert not operator.depthwise
            lanes = self._machine.lanes
            channels = -(-len(operator.bias) // lanes) * lanes
            folded = kernels.folded_columns(window, len(operator.bias), self._machine)
            if folded > 1:
                window = replace(window, columns=1)
            return Dense(window=window, channels=channels, ends=ends, wide=wide, folded=folded)
        if operator.depthwise:
            assert operator.shuffle == 1
            return Depthwise(window=window, ends=ends)
        return Dense(window=window, channels=ends.writes.channels, ends=ends, wide=wide)

    def _ends(self, operator: Convolution) -> Finish | ToPicture:
        if isinstance(operator.writes, Picture):
            return ToPicture(
                planes=self._network.channels,
                height=self._network.height,
                width=self._network.width,
                block=operator.writes.block,
                places=operator.writes.places,
                onto_noisy=operator.writes.onto_noisy,
            )
        assert operator.rescale is not None
        return Finish(
            writes=self._map(operator.writes),
            shuffle=operator.shuffle,
            residual=self._map(operator.residual.feature) if operator.residual is not None else None,
            fraction=operator.rescale.fraction,
            # Where no second plane is kept, 8 bits bound it anyway.
            low=operator.low if operator.writes.rest_bits else max(operator.low, INT8_MIN),
            left=self._machine.unsigned and bool((operator.rescale.shift < 0).any()),
        )

    def _call(self, kernel: Kernel, reads: tuple[Tensor, ...], size: int, macs: int = 0) -> Result:
        if kernel not in self._names:
            name = f"{self._machine.name}_{len(self._names)}_{type(kernel).__name__.lower()}"
            self._names[kernel] = name
            self.kernels[name] = kernels.write(kernel, name, self._machine)
        name = self._names[kernel]
        self.macs[name] = self.macs.get(name, 0) + macs
        written = Result(len(self.steps), size)
        self.steps.append(Step(kernel=name, reads=reads, writes=written))
        return written

    def _map(self, feature: Feature) -> Map:
        return Map(
            height=feature.height,
            width=feature.width,
            channels=self._network.stored_channels(feature),
            margin=self._margin(feature),
            rest_bits=feature.rest_bits,
        )

    def _first_plane(self, feature: Feature) -> Map:
        """Return where the first plane lies: kernels that read one plane are the same whether there is another."""
        return replace(self._map(feature), rest_bits=0)

    def _margin(self, feature: Feature) -> int:
        return self._network.margins.get(feature.name, 0)

    @property
    def _offset(self) -> int:
        return 128 if self._machine.unsigned else 0

    def _outside(self, feature: Feature) -> Constant:
        planes = [feature.grid.zero_point, *([0] if feature.rest_bits else [])]
        values = np.repeat(np.array(planes) + self._offset, kernels.VECTOR_BYTES)
        return _constant(values.astype(np.uint8 if self._machine.unsigned else np.int8))

    def _bias(self, operator: Convolution) -> Ints:
        bias: Ints = operator.bias - self._offset * operator.sum_of_weights(lambda part: part)
        return bias


def pack_dense(operator: Convolution, weights: NDArray[np.int8], kernel: Kernel, machine: Machine) -> NDArray[np.int8]:
    """Return the weights as [block of channels][row][group of four bytes in a row][vector][lane][four]."""
    assert isinstance(kernel, Dense)
    if kernel.folded > 1:
        weights = np.concatenate(np.split(weights, kernel.folded, axis=3))
    rows, columns = weights.shape[2:]
    squares = _squares(operator)
    order = kernels.lanes_of(kernel, machine)
    given = weights.reshape(squares, -1, *weights.shape[1:])
    full = np.zeros((squares, kernel.channels, rows, columns, kernel.window.reads.channels), np.int8)
    full[:, : given.shape[1], :, :, : given.shape[2]] = given.transpose(0, 1, 3, 4, 2)
    split = full.reshape(-1, len(order), rows, kernel.window.run, kernels.QUAD)[:, order]
    split = split.reshape(len(split), -1, machine.lanes, *split.shape[2:])
    return np.ascontiguousarray(split.transpose(0, 3, 4, 1, 2, 5))


def pack_depthwise(
    operator: Convolution, weights: NDArray[np.int8], kernel: Kernel, machine: Machine
) -> NDArray[np.int8]:
    """Return the weights as [block of channels][row][group of four columns][neighbour][vector][lane][four]."""
    assert isinstance(kernel, Depthwise)
    window = kernel.window
    neighbours = 2 if kernels.shares_groups(window) else 1
    channels = kernel.ends.writes.channels
    full = np.zeros((channels, window.rows, neighbours, window.groups * kernels.QUAD), np.int8)
    for neighbour in range(neighbours):
        full[: len(weights), :, neighbour, neighbour : neighbour + window.columns] = weights[:, 0]
    order = kernels.lanes_of(kernel, machine)
    split = full.reshape(-1, len(order), window.rows, neighbours, window.groups, kernels.QUAD)[:, order]
    split = split.reshape(len(split), -1, machine.lanes, *split.shape[2:])
    return np.ascontiguousarray(split.transpose(0, 3, 5, 4, 1, 2, 6))


def _squares(operator: Convolution) -> int:
    """Return how many pixels of a feature map one pixel becomes; the picture's own shuffle is in its places."""
    return operator.shuffle**2 if isinstance(operator.writes, Feature) else 1


def _padded(values: NDArray[_Number], squares: int, stored: int) -> NDArray[_Number]:
    """Return values per channel with zeros for the channels that only fill up, in each square of a shuffle."""
    given = values.reshape(squares, -1)
    full = np.zeros((squares, stored // squares), values.dtype)
    full[:, : given.shape[1]] = given
    return full.reshape(-1)


def _by_lane(values: NDArray[_Number], order: Sequence[int]) -> NDArray[_Number]:
    """Return values per channel in the order of the lanes that sum them; `order` is that of one block."""
    return values.reshape(-1, len(order))[:, order].reshape(-1)


def _constant(values: NDArray[np.generic]) -> Constant:
    return Constant(np.ascontiguousarray(values).tobytes())
