"""Where each engine wants its quantizers: one float graph and its ranges, written as QDQ graphs that differ per engine.

```
float           x ─ conv ─ relu ─ conv ─ + ─ conv              Q, DQ: one pair, written [] here
                └───────────────────────┘

on reads        x ─ [] ┬ conv ─ relu ─ [] ─ conv ─ + ─ [] ─ conv        OpenVINO, ARM, TensorRT
                       └───────────────────────────┘

on results too  x ─ [] ┬ conv ─ relu ─ [] ─ conv ─ [] ─ + ─ [] ─ conv   ONNX Runtime
                       └────────────────────────────────┘

16-bit trunk     x ─ [16] ┬ conv ─ relu ─ [] ─ conv ─ + ─ [16] ─ conv     ARM
                     x ┬ [16] ─ +         what both an addition and a convolution read has two pairs
                       └ [] ─ conv

maps             x ─ [] ─ resize ─ [] ┬ concat ─ [] ─ conv                ARM, ONNX Runtime
                 y ─ [] ──────────────┘     one grid where the ranges are alike
```
What is subtracted from the picture, or added to it, at the end (but for a clip or crop) meets the same integers as the
first convolution reads, where they are of 8 bits: their rounding is then a little more noise in the input, which the
network takes away too. If the network saw it and the picture did not have it, it would reach the output whole.

OpenVINO and our ARM kernels add the residual inside the convolution before they round, so a pair between the two would
only lose precision. ONNX Runtime has no such kernel: without the second pair its convolution falls back to float.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper, version_converter

from edgekit.graph.checks import DENOISED, NOISY
from edgekit.graph.walk import (
    CONVOLUTIONS,
    PAIR,
    attribute,
    consumers,
    copied,
    derived_from,
    first_convolutions,
    group_count,
    initializers,
    input_maps,
    last_convolutions,
    last_sum,
    producers,
)

Range = tuple[float, float]
# They move values without computing, or give means of neighbours, so that both sides can share a scale.
_MOVES = frozenset({"DepthToSpace", "SpaceToDepth", "MaxPool", "Resize"})
# Operators of their own between maps of 8 bits, where other moves are part of a convolution.
_BETWEEN_MAPS = frozenset({"Concat", "MaxPool", "Resize"})
# A part of a concatenation with at least this share of the whole's range lies on the grid of the whole from the start,
# which costs its other readers a bit at most; a smaller one is rounded to its own grid first.
_ALIKE = 0.5
_MEANS = frozenset({"ReduceMean", "ReduceMax", "GlobalAveragePool", "GlobalMaxPool"})
_INT32_MAX = 2**31 - 1
_MOST_BIAS = 2.0**30
_LEAST_SCALE = 1e-8
# Steps of a 16-bit pair to one of the 8-bit pair over the same range.
_FINER = 256
# How much more than the range seen a tensor of 16 bits gets: what lies outside costs most there, and steps are fine.
# Where convolutions read its upper 8 bits, the best of 1, 1.1, 1.15, 1.2 and 1.3, measured on nano and base.
_ROOM, _ROOM_READ_COARSELY = 2.0, 1.15
# Weights of 16 bits stay within 127 x this, so that their upper half is a weight of 8 bits.
_FINER_WEIGHTS = 128
# The first with 16-bit quantizers.
_OPSET_16_BITS, _IR_16_BITS = 21, 10
_LEAST_UNIT = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True, kw_only=True)
class FloatCosts:
    """What a layer's way back to float costs an engine, in picoseconds of one core: a model, not a measurement.

    mac: Of each multiply-accumulate of a convolution, its output channels filled up to `channels`.
    added: Of each value that an addition writes. passed: Of each value that a convolution reads or writes.
    """

    mac: float
    added: float
    passed: float
    channels: int


# Fitted to base with single layers in float, 256x256, one core with VNNI (docs/int8-tried.md). An engine that was
# not measured gets OpenVINO's.
_OPENVINO_COSTS = FloatCosts(mac=10.0, added=360.0, passed=50.0, channels=16)
_ONNXRUNTIME_COSTS = FloatCosts(mac=9.0, added=1350.0, passed=800.0, channels=1)


@dataclass(frozen=True, kw_only=True)
class Placement:
    """How an engine wants a QDQ graph.

    activations: Integer type of the activations; weights are always symmetric int8 per output channel.
    symmetric: Whether the zero point of activations is zero.
    results: Whether what convolutions and additions give is rounded even where no convolution reads it.
    integer_biases: Whether biases are int32, in units of input scale x weight scale; float otherwise.
    floats: Whether the engine computes single layers of an INT8 graph in float.
    trunk: Type of what additions read, and of what the first and last convolutions read and of their weights.
    saturates: Whether its sums of two 8-bit products saturate on x86 without VNNI, so that weights have 7 bits there.
    costs: What layers in float cost.
    """

    activations: Literal["uint8", "int8"]
    symmetric: bool = False
    results: bool = False
    integer_biases: bool = False
    floats: bool = True
    trunk: Literal["int8", "int16"] = "int8"
    saturates: bool = True
    costs: FloatCosts = _OPENVINO_COSTS


PLACEMENTS: dict[str, Placement] = {
    "onnxruntime": Placement(activations="uint8", results=True, integer_biases=True, costs=_ONNXRUNTIME_COSTS),
    "openvino": Placement(activations="uint8"),
    "arm": Placement(activations="int8", integer_biases=True, floats=False, trunk="int16", saturates=False),
    "tensorrt": Placement(activations="int8", symmetric=True, saturates=False),
}


def place(
    model: onnx.ModelProto,
    ranges: Mapping[str, Range],
    placement: Placement,
    *,
    weight_limit: int = 127,
) -> onnx.ModelProto:
    """Return the graph with a QDQ pair on every tensor that the placement rounds; all convolutions compute in integers.

    Left in float are the convolutions of channel attention, which are cheap and read a global mean, the addition of the
    noise level, whose range is far from the features', and the last subtraction, which carries the picture itself.
    A graph with 16-bit pairs is of opset 21, any other of the opset that it was.

    Args:
        model: A checked float graph. It is not changed.
        ranges: Tensor -> lowest and highest value.
        placement: The engine's.
        weight_limit: Largest magnitude of a quantized weight: 127, or 63 on processors that saturate.
    """
    return _Writer(model, ranges, placement, weight_limit).written()


def computes_in_integers(model: onnx.ModelProto, ranges: Mapping[str, Range], placement: Placement) -> frozenset[str]:
    """Return the names of the convolutions and additions of a float graph that are quantized.

    Only maps of four dimensions have ranges; what else is added stays in float. Transposed convolutions, of one group,
    are only where the engine has nothing else than integers: the others compute them in float.
    """
    features, gates = derived_from(model, NOISY), _gates(model)

    def is_integer(node: onnx.NodeProto) -> bool:
        return node.op_type == "Conv" or (
            node.op_type == "ConvTranspose" and not placement.floats and group_count(node) == 1
        )

    return frozenset(
        node.name
        for node in model.graph.node
        if (is_integer(node) and node.input[0] in ranges and node.input[0] not in gates)
        or (node.op_type == "Add" and NOISY not in node.input and (features & ranges.keys()).issuperset(node.input))
    )


def release(
    quantized: onnx.ModelProto,
    names: Collection[str],
    placement: Placement,
    floating: onnx.ModelProto | None = None,
) -> onnx.ModelProto:
    """Return a QDQ graph in which the named convolutions and additions are in float.

    They read tensors that were not rounded wherever such a tensor exists: what ONNX Runtime's integer convolution gives
    exists as integers only. Pairs that nothing reads any more are gone.

    Args:
        quantized: A graph of `place`. It is not changed.
        names: Convolutions and additions; unknown names are ignored.
        placement: That of the graph.
        floating: Where the weights and biases come from; None takes what the integers stand for.
    """
    model = copied(quantized)
    if not names:
        return model
    made_by, stored = producers(model), initializers(model)
    originals = initializers(floating) if floating is not None else {}
    chosen = [n for n in model.graph.node if n.name in names and n.op_type in ("Conv", "Add")]
    for node in chosen:
        for index, name in enumerate(node.input):
            source = made_by.get(name)
            if source is not None and source.op_type == "DequantizeLinear" and source.input[0] in stored:
                node.input[index] = _float_constant(model, source, originals)
    integer = _integer_nodes(model, made_by, placement) - frozenset(names)

    def read_unrounded(node: onnx.NodeProto, but: str | None = None) -> bool:
        """Return whether that changed what a node reads."""
        before = list(node.input)
        for index, name in enumerate(node.input):
            raw = _before_pair(name, made_by)
            if (
                raw is not None
                and raw != but
                and not (placement.results and _is_integer(made_by.get(raw), integer, made_by))
            ):
                node.input[index] = raw
        return before != list(node.input)

    last = last_sum(model)
    for node in model.graph.node:
        if node.op_type in PAIR or _moves(node) or _is_between(node) or node.name in integer:
            continue
        # What the picture is subtracted from meets the rounded one as long as a convolution reads that.
        read_unrounded(node, but=NOISY if node.output[0] == last else None)
    drop_unread(model)
    # One behind the other, the last one first.
    while any(
        read_unrounded(n) for n in model.graph.node if (_moves(n) or _is_between(n)) and not _is_rounded(n, model)
    ):
        drop_unread(model)
    seeing = [node for node in model.graph.node if _reads_picture(node, made_by)]
    if all(node.output[0] == last for node in seeing):
        for node in seeing:
            read_unrounded(node)
        drop_unread(model)
    return model


def drop_unread(model: onnx.ModelProto) -> None:
    """Remove the nodes and initializers that nothing reads any more."""
    wanted = {output.name for output in model.graph.output}
    kept: list[onnx.NodeProto] = []
    for node in reversed(model.graph.node):
        if not wanted.isdisjoint(node.output):
            wanted.update(node.input)
            kept.append(node)
    stored = [tensor for tensor in model.graph.initializer if tensor.name in wanted]
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(reversed(kept))
    model.graph.initializer.extend(stored)


class _Writer:
    """One walk over a float graph that writes the QDQ graph node by node."""

    def __init__(
        self,
        model: onnx.ModelProto,
        ranges: Mapping[str, Range],
        placement: Placement,
        weight_limit: int,
    ) -> None:
        if placement.trunk == "int16":
            model = version_converter.convert_version(model, _OPSET_16_BITS)
            model.ir_version = max(model.ir_version, _IR_16_BITS)
        self._model, self._placement, self._weight_limit = model, placement, weight_limit
        self._stored, self._made_by, self._readers = initializers(model), producers(model), consumers(model)
        self._integer = computes_in_integers(model, ranges, placement)
        self._relus = _fused_relus(model, self._integer)
        self._only_integers = {self._result(n) for n in model.graph.node if n.name in self._integer}
        self._ranges = dict(ranges)
        self._last = last_sum(model)
        self._between = self._results_between_maps()
        self._rounded = self._tensors_to_round()
        self._wide = self._ends_of_16_bits() if placement.trunk == "int16" else frozenset[str]()
        self._fine = self._tensors_of_16_bits() if placement.trunk == "int16" else frozenset[str]()
        self._give_room()
        self._share_ranges()
        self._scales: dict[str, np.float32] = {}
        self._nodes: list[onnx.NodeProto] = []
        self._tensors: list[onnx.TensorProto] = []

    def written(self) -> onnx.ModelProto:
        """Return the QDQ graph."""
        if NOISY in self._rounded:
            self._write_pair(NOISY)
        for original in self._model.graph.node:
            node = onnx.NodeProto()
            node.CopyFrom(original)
            for index, name in enumerate(original.input):
                if name in self._rounded and self._reads_rounded(original, name):
                    coarsely = original.op_type in CONVOLUTIONS or original.output[0] in self._between
                    fine = name in self._fine and (not coarsely or original.name in self._wide)
                    node.input[index] = f"{name}_fine_dequantized" if fine else f"{name}_dequantized"
            if original.op_type in CONVOLUTIONS and original.name in self._integer:
                self._write_weights(original, node)
            self._nodes.append(node)
            for name in original.output:
                if name in self._rounded:
                    self._write_pair(name)
        model = copied(self._model)
        del model.graph.node[:], model.graph.value_info[:]
        model.graph.node.extend(self._nodes)
        model.graph.initializer.extend(self._tensors)
        drop_unread(model)
        return model

    def _result(self, node: onnx.NodeProto) -> str:
        """Return the tensor that an integer operator gives, behind the ReLU that is fused with it."""
        return self._relus.get(str(node.output[0]), str(node.output[0]))

    def _results_between_maps(self) -> Mapping[str, tuple[str, ...]]:
        """Return result -> the maps that it is made of, of the nodes that engines compute from integers to integers."""
        if self._placement.floats and not self._placement.results:
            return {}
        maps = (self._ranges.keys() & derived_from(self._model, NOISY)) - _gates(self._model)
        # A kernel of our own writes the picture and the noise level into one map.
        written = input_maps(self._model) if self._placement.trunk == "int16" else set()
        found = {}
        for node in self._model.graph.node:
            reads = tuple(node.input if node.op_type == "Concat" else node.input[:1])
            if _is_between(node) and node.output[0] not in written and maps.issuperset((*reads, node.output[0])):
                found[str(node.output[0])] = reads
        return found

    def _tensors_to_round(self) -> frozenset[str]:
        rounded: set[str] = set()
        for node in self._model.graph.node:
            if node.output[0] in self._between:
                rounded.update((*self._between[node.output[0]], node.output[0]))
            if node.name not in self._integer:
                continue
            if node.op_type in CONVOLUTIONS:
                rounded.add(node.input[0])
            elif self._placement.results:
                rounded.update(node.input)
            elif not self._placement.floats:
                rounded.update(self._added_from_memory(node))
            if self._placement.results:
                rounded.add(self._result(node))
        rounded.discard(DENOISED)
        if self._placement.trunk == "int8" and rounded & _moved(self._model, NOISY):
            rounded.add(NOISY)
        return frozenset(rounded - self._stored.keys())

    def _added_from_memory(self, addition: onnx.NodeProto) -> list[str]:
        """Return what an addition reads from memory: all but one convolution that gives nothing but a part of it."""
        operands = [str(name) for name in addition.input]
        for name in reversed(operands):
            source = self._made_by.get(name)
            if source is not None and source.op_type == "DepthToSpace":
                source = self._made_by.get(source.input[0])
            if source is not None and source.op_type in CONVOLUTIONS and len(self._readers[name]) == 1:
                operands.remove(name)
                break
        return operands

    def _share_ranges(self) -> None:
        """What only moves values must not change their scale, or the engine computes it in float."""
        before: dict[str, Range] = {}
        while before != self._ranges:
            before = dict(self._ranges)
            for node in self._model.graph.node:
                if node.output[0] in self._between:
                    self._share_range(node)
        for node in self._model.graph.node:
            if _moves(node) and self._rounded.issuperset((node.input[0], node.output[0])):
                self._ranges[node.output[0]] = self._ranges[node.input[0]]

    def _share_range(self, node: onnx.NodeProto) -> None:
        """Give what a node between maps reads and writes one range; far smaller parts of a Concat keep theirs."""
        result = str(node.output[0])
        least = _ALIKE * _width(self._ranges[result]) if node.op_type == "Concat" else 0.0
        tensors = [result, *(name for name in self._between[result] if _width(self._ranges[name]) >= least)]
        lows, highs = zip(*(self._ranges[name] for name in tensors), strict=True)
        self._ranges.update(dict.fromkeys(tensors, (min(lows), max(highs))))

    def _ends_of_16_bits(self) -> frozenset[str]:
        """Return the first and last convolutions that are integer ones over all channels, of maps that can be finer."""
        reads = {n.name: n.input[0] for n in self._model.graph.node if n.op_type == "Conv"}
        return frozenset(name for name in _dense_ends(self._model, self._integer) if reads[name] not in self._between)

    def _give_room(self) -> None:
        narrow = self._integer - self._wide
        coarsely = {n.input[0] for n in self._model.graph.node if n.op_type in CONVOLUTIONS and n.name in narrow}
        for name in self._fine:
            low, high = self._ranges[name]
            room = _ROOM_READ_COARSELY if name in coarsely else _ROOM
            self._ranges[name] = (low * room, high * room)

    def _tensors_of_16_bits(self) -> frozenset[str]:
        """Return what is rounded and read by additions, or by the convolutions with 16-bit weights."""
        read = {
            name
            for node in self._model.graph.node
            if (node.op_type == "Add" and node.name in self._integer) or node.name in self._wide
            for name in node.input
        }
        return frozenset(read & self._rounded - self._between.keys())

    def _reads_rounded(self, node: onnx.NodeProto, name: str) -> bool:
        if node.name in self._integer or node.output[0] in self._between or name in self._between:
            return True
        if name == NOISY and node.output[0] == self._last:
            return self._placement.trunk == "int8"
        if _moves(node) and node.output[0] in self._rounded:
            return True
        return self._placement.results and name in self._only_integers

    def _write_pair(self, name: str) -> None:
        scale, zero = _grid(self._ranges[name], self._placement)
        self._scales[name] = scale
        if (origin := self._origin(name)) != name:
            self._add_pair(name, name, f"{origin}_scale", f"{origin}_zero_point")
            return
        kind = np.uint8 if self._placement.activations == "uint8" else np.int8
        self._store_pair(name, name, np.array(scale, np.float32), np.array(zero, kind))
        if name in self._fine:
            # Not one behind the other: ONNX Runtime makes one pair of two in a row, and a wrong one of different types.
            scale, zero = np.float32(scale / _FINER), zero * _FINER
            self._store_pair(name, f"{name}_fine", np.array(scale, np.float32), np.array(zero, np.int16))

    def _origin(self, name: str) -> str:
        """Return the rounded tensor whose values this one has in other places: both keep one scale, in training too."""
        node = self._made_by.get(name)
        if self._placement.trunk == "int16" or node is None or not _moves(node) or name in self._between:
            return name
        return self._origin(node.input[0]) if node.input[0] in self._rounded else name

    def _store_pair(self, read: str, name: str, scale: NDArray[np.generic], zero: NDArray[np.generic]) -> None:
        """Write a pair of that name behind the tensor `read`, and its scale and zero point."""
        self._store(f"{name}_scale", scale)
        self._store(f"{name}_zero_point", zero)
        self._add_pair(read, name, f"{name}_scale", f"{name}_zero_point")

    def _add_pair(self, read: str, name: str, *parameters: str) -> None:
        """Write a pair of that name behind the tensor `read`."""
        self._nodes += [
            helper.make_node(PAIR[0], [read, *parameters], [f"{name}_quantized"], f"{name}_Q"),
            helper.make_node(PAIR[1], [f"{name}_quantized", *parameters], [f"{name}_dequantized"], f"{name}_DQ"),
        ]

    def _write_weights(self, original: onnx.NodeProto, node: onnx.NodeProto) -> None:
        """Let a convolution read integers that stand for its weights, and for its bias where the engine wants it."""
        wide, name = original.name in self._wide, original.input[1]
        limit = self._weight_limit * (_FINER_WEIGHTS if wide else 1)
        weights = numpy_helper.to_array(self._stored[name]).astype(np.float32)
        step = self._scales[original.input[0]] / (_FINER if wide else 1)
        whole_bias = self._placement.integer_biases and len(original.input) > 2
        # The axis of the output's channels.
        axis = 1 if original.op_type == "ConvTranspose" else 0
        others = tuple(a for a in range(weights.ndim) if a != axis)
        least = np.full(weights.shape[axis], _LEAST_SCALE)
        if whole_bias:
            # Where weights are nothing next to their bias, they are rounded to what the bias can be counted in.
            bias = numpy_helper.to_array(self._stored[original.input[2]]).astype(np.float64)
            least = np.maximum(least, np.abs(bias) / (step * _MOST_BIAS))
        scales = np.maximum(np.abs(weights).max(axis=others) / limit, least).astype(np.float32)
        integers = np.clip(np.rint(weights / np.expand_dims(scales, others)), -limit, limit).astype(
            np.int16 if wide else np.int8
        )
        node.input[1] = self._write_constant(name, integers, scales, axis)
        if whole_bias:
            units = (step * scales).astype(np.float32)
            counts = bias / np.maximum(units, _LEAST_UNIT).astype(np.float64)
            rounded = np.clip(np.rint(counts), -_INT32_MAX, _INT32_MAX).astype(np.int32)
            node.input[2] = self._write_constant(original.input[2], rounded, units, 0)

    def _write_constant(
        self,
        name: str,
        integers: NDArray[np.int8] | NDArray[np.int16] | NDArray[np.int32],
        scales: NDArray[np.float32],
        axis: int,
    ) -> str:
        """Store integers with one scale for each of an axis; return the name of what they stand for."""
        parts = [f"{name}_quantized", f"{name}_scale", f"{name}_zero_point"]
        self._store(parts[0], integers)
        self._store(parts[1], scales)
        self._store(parts[2], np.zeros(len(scales), integers.dtype))
        self._nodes.append(helper.make_node(PAIR[1], parts, [f"{name}_dequantized"], f"{name}_DQ", axis=axis))
        return f"{name}_dequantized"

    def _store(self, name: str, values: NDArray[np.generic]) -> None:
        self._tensors.append(numpy_helper.from_array(values, name))


def _moved(model: onnx.ModelProto, tensor: str) -> set[str]:
    """Return a tensor and those that have nothing but its values, in other places."""
    found = {tensor}
    for node in model.graph.node:
        if _moves(node) and node.input[0] in found:
            found.add(node.output[0])
    return found


def _moves(node: onnx.NodeProto) -> bool:
    return node.op_type in _MOVES and not _is_cubic(node)


def _is_between(node: onnx.NodeProto) -> bool:
    return node.op_type in _BETWEEN_MAPS and not _is_cubic(node)


def _is_cubic(node: onnx.NodeProto) -> bool:
    """Return whether a Resize gives values beyond those that it reads; engines have no integer kernel for it."""
    return node.op_type == "Resize" and bool(attribute(node, "mode") == b"cubic")


def _width(values: Range) -> float:
    return values[1] - values[0]


def _grid(values: Range, placement: Placement) -> tuple[np.float32, int]:
    """Return the scale and the zero point of 8 bits over a range; zero is always on the grid."""
    low, high = min(values[0], 0.0), max(values[1], 0.0)
    if placement.symmetric:
        return np.float32(max(-low, high, _LEAST_SCALE) / 127), 0
    scale = max((high - low) / 255, _LEAST_SCALE)
    zero = min(max(round(-low / scale), 0), 255)
    return np.float32(scale), zero - (128 if placement.activations == "int8" else 0)


def _fused_relus(model: onnx.ModelProto, integer: frozenset[str]) -> dict[str, str]:
    """Return output of an integer operator -> output of the ReLU that alone reads it."""
    made_by, readers = producers(model), consumers(model)
    found = {}
    for node in model.graph.node:
        source = made_by.get(node.input[0]) if node.op_type == "Relu" else None
        if source is not None and source.name in integer and len(readers[node.input[0]]) == 1:
            found[node.input[0]] = node.output[0]
    return found


def _dense_ends(model: onnx.ModelProto, integer: frozenset[str]) -> frozenset[str]:
    """Return the first and last convolutions that are integer ones over all channels."""
    ends = {*first_convolutions(model, NOISY), *last_convolutions(model, DENOISED)} & integer
    return frozenset(n.name for n in model.graph.node if n.name in ends and n.op_type == "Conv" and group_count(n) == 1)


def _gates(model: onnx.ModelProto) -> set[str]:
    """Return the tensors that are computed from global means alone: the inside of channel attention."""
    stored, reached = initializers(model), set[str]()
    for node in model.graph.node:
        inputs = [name for name in node.input if name and name not in stored]
        if node.op_type in _MEANS or (inputs and reached.issuperset(inputs)):
            reached.update(node.output)
    return reached


def _float_constant(
    model: onnx.ModelProto, dequantize: onnx.NodeProto, originals: Mapping[str, onnx.TensorProto]
) -> str:
    """Return the name of a float initializer, added to the graph, for a dequantized constant."""
    name = str(dequantize.output[0]).removesuffix("_dequantized")
    stored = initializers(model)
    if name in stored:
        return name
    if name in originals:
        model.graph.initializer.append(originals[name])
        return name
    integers, scales = (numpy_helper.to_array(stored[i]) for i in dequantize.input[:2])
    values = integers.astype(np.float32) * scales.reshape(-1, *(1,) * (integers.ndim - 1))
    model.graph.initializer.append(numpy_helper.from_array(values.astype(np.float32), name))
    return name


def _integer_nodes(
    model: onnx.ModelProto, made_by: Mapping[str, onnx.NodeProto], placement: Placement
) -> frozenset[str]:
    """Return the convolutions and additions that engines compute in integers.

    All of their operands are dequantized and what they give is rounded where the placement rounds results; elsewhere
    one operand of an addition may be what a convolution gives, since both are computed in one.
    """
    readers = consumers(model)
    operands = all if placement.results else any

    def gives_integers(name: str) -> bool:
        reads = {reader.op_type for reader in readers.get(name, [])}
        if reads == {"Relu"}:
            return gives_integers(readers[name][0].output[0])
        return reads == {PAIR[0]}

    return frozenset(
        n.name
        for n in model.graph.node
        if n.op_type in ("Conv", "Add")
        and operands(name in made_by and made_by[name].op_type == PAIR[1] for name in n.input[:2])
        and (not placement.results or gives_integers(n.output[0]))
    )


def _before_pair(name: str, made_by: Mapping[str, onnx.NodeProto]) -> str | None:
    """Return the tensor that a QDQ pair ending in `name` rounds; None where there is no such pair."""
    dequantize = made_by.get(name)
    if dequantize is None or dequantize.op_type != PAIR[1]:
        return None
    quantize = made_by.get(dequantize.input[0])
    return quantize.input[0] if quantize is not None and quantize.op_type == PAIR[0] else None


def _reads_picture(node: onnx.NodeProto, made_by: Mapping[str, onnx.NodeProto]) -> bool:
    """Return whether a node reads the rounded input of the graph."""
    return any(_before_pair(name, made_by) == NOISY for name in node.input)


def _is_integer(node: onnx.NodeProto | None, integer: frozenset[str], made_by: Mapping[str, onnx.NodeProto]) -> bool:
    """Return whether a node, or the node before its ReLU, is one that engines compute in integers."""
    if node is not None and node.op_type == "Relu":
        node = made_by.get(node.input[0])
    return node is not None and node.name in integer


def _is_rounded(node: onnx.NodeProto, model: onnx.ModelProto) -> bool:
    return any(n.op_type == PAIR[0] and n.input[0] == node.output[0] for n in model.graph.node)
