"""Graphs that compute the same in less time: what OpenVINO's kernels ask for, and it does not do by itself.

```
noisy - DepthToSpace(conv(W, b))        ->   DepthToSpace(SpaceToDepth(noisy) + conv(-W, -b))
DepthToSpace, planes of a channel together ->  channels of a plane together
x - [zero point z] - conv(W, b)         ->   x + s z - [zero point 0] - conv(W, b - s z sum(W))
```
The last subtraction is slow where it meets maps of one channel, and nothing where it is a part of the last convolution;
whole vectors of channels move faster than single values; a zero point of zero needs no correction. `base` in INT8 took
14.9 ms, and takes 14.3, 13.9 and 13.6 with one after the other (docs/int8-inside.md).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from edgekit.graph.checks import DENOISED
from edgekit.graph.cost import infer_shapes
from edgekit.graph.shuffle import channels_by_plane
from edgekit.graph.walk import (
    PAIR,
    attribute,
    constants_stored,
    consumers,
    copied,
    free_name,
    initializers,
    names,
    producers,
    stored_behind,
)

_NEXT_TO_NOTHING = 1e-20
# Pixels: multiples of every stride that a network may have.
_LOOKED_AT = (64, 96)


def rewritten(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a float or QDQ graph that computes the same with all of these; what has none of them stays as it is."""
    sound = without_columns(with_biases(with_averages_apart(without_folded_orders(constants_stored(model)))))
    return without_zero_points(subtraction_before_shuffle(channels_by_plane(sound)))


def without_folded_orders(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the graph in which OpenVINO does not fold a Gather that puts channels in another order.

    ```
    Gather([1, 2, 0])  ->  Gather([[1, 2, 0]]) ─ Squeeze
    ```
    OpenVINO 2026.4 folds it into the weights of the convolutions behind it, as if each order were its own inverse:
    right for [2, 1, 0], another network for [1, 2, 0].
    """
    changed = copied(model)
    stored, taken = initializers(changed), names(changed)
    for node in list(changed.graph.node):
        if node.op_type != "Gather" or attribute(node, "axis") not in (1, -3) or node.input[1] not in stored:
            continue
        order = numpy_helper.to_array(stored[node.input[1]])
        count = np.arange(order.size)
        places = order % max(order.size, 1)
        if order.ndim != 1 or not np.array_equal(np.sort(places), count) or np.array_equal(places[places], count):
            continue
        listed, axis, moved = (free_name(f"{node.output[0]}_{part}", taken) for part in ("order", "axis", "listed"))
        changed.graph.initializer.append(numpy_helper.from_array(order[None], listed))
        changed.graph.initializer.append(numpy_helper.from_array(np.array([1]), axis))
        squeeze = helper.make_node("Squeeze", [moved, axis], node.output, free_name(f"{node.name}_squeezed", taken))
        node.input[1], node.output[0] = listed, moved
        changed.graph.node.insert(list(changed.graph.node).index(node) + 1, squeeze)
    return changed


def with_averages_apart(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a QDQ graph in which average pooling that counts its border reads what a LeakyRelu of slope 1 gives.

    OpenVINO 2026.4 takes a product and a sum before it, as of a picture brought to [-1, 1], for a dequantization and
    computes them behind it, where the border is no longer zero: 35 to 51 dB from the graph. It does not move a
    LeakyRelu.
    """
    changed = copied(model)
    if not any(node.op_type == PAIR[0] for node in model.graph.node):
        return changed
    taken = names(changed)
    for node in list(changed.graph.node):
        if node.op_type != "AveragePool" or not attribute(node, "count_include_pad") or not _has_border(node):
            continue
        apart, name = free_name(f"{node.input[0]}_apart", taken), free_name(f"{node.name}_apart", taken)
        leaky = helper.make_node("LeakyRelu", node.input[:1], [apart], name, alpha=1.0)
        node.input[0] = apart
        changed.graph.node.insert(list(changed.graph.node).index(node), leaky)
    return changed


def with_biases(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a QDQ graph in which integer convolutions that have no bias, or one of zeros, have one of next to nothing.

    Where several nodes read what such a convolution gives, and one of them computes in float, OpenVINO 2026.4
    multiplies by the scales twice: 11 to 37 dB from the float graph instead of 48 to 53. A bias of zeros it drops.
    """
    changed = copied(model)
    made_by, stored, taken = producers(changed), initializers(changed), names(changed)
    for node in changed.graph.node:
        if node.op_type != "Conv" or node.input[1] in stored:
            continue
        weights = stored_behind(node.input[1], made_by, stored)
        given = stored.get(node.input[2]) if len(node.input) > 2 and node.input[2] else None
        if not weights or (len(node.input) > 2 and node.input[2] and given is None):
            continue
        if given is None or not numpy_helper.to_array(given).any():
            name = free_name(f"{node.output[0]}_bias", taken)
            bias = np.full(stored[weights[0]].dims[0], _NEXT_TO_NOTHING, np.float32)
            changed.graph.initializer.append(numpy_helper.from_array(bias, name))
            node.input[:] = [*node.input[:2], name]
    return changed


def without_columns(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a QDQ graph whose integer windows of one column, with a border above or below, have zeros beside it.

    ```
    conv(W of 3x1, pads 1 above and below)  ->  conv([0 W 0] of 3x3, pads 1 around)
    ```
    OpenVINO 2026.4 computes the border rows of 3x1 and 4x1 windows wrongly where the map's zero point is not zero: 9 to
    18 dB from the graph on a Xeon with VNNI and AMX.
    """
    changed = copied(model)
    made_by, stored, taken = producers(changed), initializers(changed), names(changed)
    for node in list(changed.graph.node):
        parts = stored_behind(node.input[1], made_by, stored) if node.op_type == "Conv" else ()
        pads = attribute(node, "pads") or (0, 0, 0, 0)
        if len(parts) < 2 or len(pads) != 4 or not (pads[0] or pads[2]) or pads[1] or pads[3]:
            continue
        values = numpy_helper.to_array(stored[parts[0]])
        if values.ndim != 4 or values.shape[3] != 1 or values.shape[2] == 1:
            continue
        # Of this node alone: other nodes may read the same weights.
        name, dequantize = free_name(f"{node.input[1]}_wide", taken), onnx.NodeProto()
        dequantize.CopyFrom(made_by[node.input[1]])
        dequantize.input[0], dequantize.output[0], dequantize.name = f"{name}_stored", name, name
        wide = np.pad(values, ((0, 0), (0, 0), (0, 0), (1, 1)))
        changed.graph.initializer.append(numpy_helper.from_array(wide, dequantize.input[0]))
        node.input[1] = name
        window = {
            "kernel_shape": wide.shape[2:],
            "pads": (pads[0], 1, pads[2], 1),
            "dilations": ((attribute(node, "dilations") or (1, 1))[0], 1),
        }
        for old in [a for a in node.attribute if a.name in window]:
            node.attribute.remove(old)
        node.attribute.extend(helper.make_attribute(key, given) for key, given in window.items())
        changed.graph.node.insert(list(changed.graph.node).index(node), dequantize)
    return changed


def subtraction_before_shuffle(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the graph in which what is subtracted from the picture, or added to it, meets it where the channels are.

    It is for graphs that begin with a SpaceToDepth and end with a convolution and a DepthToSpace of the same block, its
    channels by plane and as many as the picture's; others stay. A subtraction becomes an addition, by weights of the
    other sign.
    """
    changed = copied(model)
    made_by, readers = producers(changed), consumers(changed)
    last = made_by.get(DENOISED)
    if last is None or last.op_type not in ("Add", "Sub"):
        return changed
    # One gray residual may be added to all planes of a colour picture.
    planes = {name: shape[1] for name, shape in infer_shapes(changed, *_LOOKED_AT).items() if len(shape) == 4}
    for picture, residual in (tuple(last.input), tuple(reversed(last.input)))[: 2 if last.op_type == "Add" else 1]:
        shuffle = made_by.get(residual)
        spread = next((n for n in readers.get(picture, []) if n.op_type == "SpaceToDepth"), None)
        if spread is None or shuffle is None or shuffle.op_type != "DepthToSpace" or len(readers[residual]) > 1:
            continue
        if attribute(shuffle, "blocksize") != attribute(spread, "blocksize"):
            continue
        if attribute(shuffle, "mode") not in (None, b"DCR") or planes.get(shuffle.input[0]) != planes.get(
            spread.output[0]
        ):
            continue
        if last.op_type == "Sub" and not _negated(made_by.get(shuffle.input[0]), changed):
            continue
        operands = [_rounded(spread, made_by, readers), shuffle.input[0]]
        together = helper.make_node("Add", operands, [f"{residual}_and_picture"], last.name)
        shuffle.input[0], shuffle.output[0] = together.output[0], DENOISED
        shuffle_last = onnx.NodeProto()
        shuffle_last.CopyFrom(shuffle)
        changed.graph.node.remove(shuffle)
        changed.graph.node.remove(last)
        changed.graph.node.extend([together, shuffle_last])
        break
    return changed


def without_zero_points(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a QDQ graph whose maps are moved so far up, by the biases of what makes them, that zero points are zero.

    The integers stay what they are; kernels are spared the correction for the zero point. Maps stay that are read by a
    convolution with a border, where zero means zero, or by anything else than convolutions and additions, or that
    nothing with a bias of its own goes into.
    """
    changed = copied(model)
    moves = _Moves(changed)
    shifts = moves.possible()
    for node in list(changed.graph.node):
        moves.absorb(node, shifts)
    for tensor in shifts:
        moves.clear_zero_point(tensor)
    return changed


class _Moves:
    """The maps of a QDQ graph and how far up each can be moved."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._model = model
        self._made_by, self._readers, self._stored = producers(model), consumers(model), initializers(model)
        self._taken, self._moved = names(model), dict[str, str]()

    def possible(self) -> dict[str, float]:
        """Return map -> how far up it goes: the largest choice in which every node can absorb what it is given."""
        shifts = {}
        for node in self._model.graph.node:
            if node.op_type == PAIR[0] and set(node.input[1:]) <= self._stored.keys():
                scale, zero = (numpy_helper.to_array(self._stored[name]) for name in node.input[1:3])
                ends = self._readers[node.output[0]]
                alone = node.input[0] in self._made_by and len(self._readers[node.input[0]]) == 1
                paired = all(end.op_type == PAIR[1] and end.input[1:] == node.input[1:] for end in ends)
                if zero.dtype == np.uint8 and zero.size == 1 and zero != 0 and alone and paired:
                    shifts[str(node.input[0])] = float(scale) * float(zero)
        before: dict[str, float] = {}
        while before != shifts:
            before = dict(shifts)
            for node in self._model.graph.node:
                if node.op_type not in PAIR:
                    for name in self._too_much_for(node):
                        shifts.pop(name, None)
        return shifts

    def _too_much_for(self, node: onnx.NodeProto) -> list[str]:
        """Return the maps that cannot move because of a node that reads or makes them."""
        read, made = [self._raw(name) for name in node.input], [str(name) for name in node.output]
        if node.op_type == "Conv" and self._has_bias(node):
            return read[:1] if _has_border(node) else []
        if node.op_type == "Add" and self._with_bias(node) is not None:
            return []
        return [*read, *made]

    def absorb(self, node: onnx.NodeProto, shifts: Mapping[str, float]) -> None:
        """Put into biases what the maps that a node reads and makes are moved by."""
        given = sum(shifts.get(self._raw(name), 0.0) for name in node.input[: 1 if node.op_type == "Conv" else None])
        wanted = shifts.get(str(node.output[0]), 0.0)
        if node.op_type == "Conv" and (given or wanted):
            weights = self._weights(node.input[1])
            self._add_to_bias(node, wanted - given * weights.reshape(len(weights), -1).sum(1))
        elif node.op_type == "Add" and wanted != given:
            source = self._with_bias(node)
            assert source is not None, "possible() left it in"
            self._add_to_bias(source, wanted - given)

    def clear_zero_point(self, tensor: str) -> None:
        """Give a map's pair a zero point of zero."""
        (quantize,) = self._readers[tensor]
        name = free_name(f"{tensor}_no_zero_point", self._taken)
        self._model.graph.initializer.append(numpy_helper.from_array(np.array(0, np.uint8), name))
        for node in (quantize, *self._readers[quantize.output[0]]):
            node.input[2] = name

    def _with_bias(self, addition: onnx.NodeProto) -> onnx.NodeProto | None:
        """Return a convolution with a bias that gives nothing but a part of a sum."""
        for name in addition.input:
            source = self._made_by.get(name)
            while source is not None and len(self._readers[name]) == 1:
                if source.op_type == "Conv":
                    return source if self._has_bias(source) else None
                if source.op_type != "DepthToSpace":
                    break
                name = source.input[0]
                source = self._made_by.get(name)
        return None

    def _has_bias(self, node: onnx.NodeProto) -> bool:
        weights = stored_behind(node.input[1], self._made_by, self._stored)
        return bool(weights) and len(node.input) > 2 and node.input[2] in self._stored

    def _raw(self, name: str) -> str:
        """Return the tensor that the pair ending in `name` rounds, else the name."""
        dequantize = self._made_by.get(name)
        if dequantize is None or dequantize.op_type != PAIR[1]:
            return name
        quantize = self._made_by.get(dequantize.input[0])
        return str(quantize.input[0]) if quantize is not None else name

    def _weights(self, name: str) -> NDArray[np.float64]:
        parts = stored_behind(name, self._made_by, self._stored)
        values, *grid = (numpy_helper.to_array(self._stored[part]).astype(np.float64) for part in parts)
        scale, *zero = (part.reshape(-1, *[1] * (values.ndim - 1)) for part in grid or [np.ones(1)])
        return np.asarray((values - zero[0] if zero else values) * scale)

    def _add_to_bias(self, node: onnx.NodeProto, more: NDArray[np.float64] | float) -> None:
        if not np.any(more):
            return
        bias = numpy_helper.to_array(self._stored[node.input[2]]).astype(np.float64) + more
        # One that was moved already is of this node alone; what was given may be another's too.
        if node.output[0] not in self._moved:
            self._moved[node.output[0]] = free_name(f"{node.output[0]}_moved_bias", self._taken)
        name = self._moved[node.output[0]]
        moved = numpy_helper.from_array(bias.astype(np.float32), name)
        if name in self._stored:
            self._stored[name].CopyFrom(moved)
        else:
            self._model.graph.initializer.append(moved)
            self._stored[name] = self._model.graph.initializer[-1]
        node.input[2] = name


def _has_border(window: onnx.NodeProto) -> bool:
    """Return whether a window reads beyond the edges of its map, or may, as `auto_pad` does at some sizes."""
    automatic = attribute(window, "auto_pad") not in (None, b"NOTSET", b"VALID")
    return automatic or any(attribute(window, "pads") or ())


def _negated(convolution: onnx.NodeProto | None, model: onnx.ModelProto) -> bool:
    """Give a convolution that nothing shares anything with the other sign; return whether that could be done."""
    made_by, readers, stored = producers(model), consumers(model), initializers(model)
    if convolution is None or convolution.op_type != "Conv" or len(readers[convolution.output[0]]) > 1:
        return False
    parts = [stored_behind(name, made_by, stored)[:1] for name in convolution.input[1:]]
    tensors = [stored[name] for part in parts for name in part]
    if not all(parts) or any(len(readers[t.name]) > 1 for t in tensors):
        return False
    values = [numpy_helper.to_array(tensor) for tensor in tensors]
    if any(v.dtype.kind not in "if" or (v.dtype.kind == "i" and v.min() == np.iinfo(v.dtype).min) for v in values):
        return False
    for tensor, value in zip(tensors, values, strict=True):
        tensor.CopyFrom(numpy_helper.from_array(-value, tensor.name))
    return True


def _rounded(
    spread: onnx.NodeProto, made_by: Mapping[str, onnx.NodeProto], readers: Mapping[str, list[onnx.NodeProto]]
) -> str:
    """Return what a SpaceToDepth gives, as integers give it where it is on the grid of what it reads."""
    before = made_by.get(spread.input[0])
    grid = list(before.input[1:]) if before is not None and before.op_type == PAIR[1] else []
    for quantize in readers[spread.output[0]]:
        if quantize.op_type == PAIR[0] and quantize.input[1:] == grid:
            return str(readers[quantize.output[0]][0].output[0])
    return str(spread.output[0])
