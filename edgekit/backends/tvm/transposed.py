"""Transposed convolutions as convolutions whose channels are shuffled into pixels, for which there are kernels.

    x ─ ConvTranspose ─     ->     x ─ Conv ─ DepthToSpace ─

Of a stride s, the pixels of the result in one row and column of each square of s x s pixels read the same part of the
window. So they are some channels of a convolution of stride 1. Where such parts reach differently far, weights of zero
fill them up: 2x2 and 4x4 of their own stride become 1x1, 3x3 of stride 2 2x2, and 4x4 of stride 2 3x3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from edgekit.graph.walk import attribute, copied, free_name, group_count, initializers, names

_Number = TypeVar("_Number", bound=np.generic)


@dataclass(frozen=True, kw_only=True)
class Shuffled(Generic[_Number]):
    """A convolution of stride 1 whose result, shuffled, is that of a transposed one; the picture grows by `factor`.

    weights: (factor x factor x outputs, inputs, rows, columns), the channels in the order (row, column, output).
    before, after: Padding of (rows, columns).
    """

    weights: NDArray[_Number]
    before: tuple[int, int]
    after: tuple[int, int]
    factor: int


def shuffled(node: onnx.NodeProto, weights: NDArray[_Number]) -> Shuffled[_Number] | None:
    """Return the convolution that stands for a ConvTranspose; None where there is none.

    There is one where the stride is the same for both axes, the picture grows by exactly that, and there are neither
    groups nor dilation.
    """
    strides = attribute(node, "strides") or [1, 1]
    pads, more = attribute(node, "pads") or [0, 0, 0, 0], attribute(node, "output_padding") or [0, 0]
    factor, kernel = strides[0], weights.shape[2:]
    plain = set(strides) == {factor} and set(attribute(node, "dilations") or [1]) == {1}
    given = attribute(node, "auto_pad") not in (None, b"NOTSET") or attribute(node, "output_shape") is not None
    grows = all(kernel[i] - pads[i] - pads[i + 2] + more[i] == factor for i in range(2))
    if not plain or given or not grows or group_count(node) != 1:
        return None
    taps = [_taps(kernel[i], factor, pads[i]) for i in range(2)]
    before = [max(0, *(-pixel for _, _, pixel in axis)) for axis in taps]
    after = [max(0, *(pixel for _, _, pixel in axis)) for axis in taps]
    inputs, outputs = weights.shape[:2]
    window = [first + last + 1 for first, last in zip(before, after, strict=True)]
    made = np.zeros((factor, factor, outputs, inputs, *window), weights.dtype)
    for row, tap_row, y in taps[0]:
        for column, tap_column, x in taps[1]:
            made[row, column, :, :, y + before[0], x + before[1]] = weights[:, :, tap_row, tap_column].T
    return Shuffled(
        weights=made.reshape(-1, inputs, *window),
        before=(before[0], before[1]),
        after=(after[0], after[1]),
        factor=factor,
    )


def _taps(window: int, stride: int, padding: int) -> list[tuple[int, int, int]]:
    """Return (place in a square of the result, place in the window, pixels to the one that is read) along an axis."""
    return [
        (place, tap, (place + padding - tap) // stride)
        for place in range(stride)
        for tap in range(window)
        if (place + padding - tap) % stride == 0
    ]


def without_transposed(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a float graph whose transposed convolutions are shuffled ones; those that cannot be stay."""
    changed, stored, taken = copied(model), initializers(model), names(model)
    del changed.graph.node[:]
    for node in model.graph.node:
        weights = stored.get(node.input[1]) if node.op_type == "ConvTranspose" else None
        found = shuffled(node, numpy_helper.to_array(weights)) if weights is not None else None
        bias = [name for name in node.input[2:] if name]
        if found is None or not stored.keys() >= set(bias):
            changed.graph.node.add().CopyFrom(node)
            continue
        result = node.output[0]
        constants = {free_name(f"{result}_weights", taken): found.weights}
        for name in bias:
            tiled = np.tile(numpy_helper.to_array(stored[name]), found.factor**2)
            constants[free_name(f"{result}_bias", taken)] = tiled
        changed.graph.initializer.extend(numpy_helper.from_array(values, name) for name, values in constants.items())
        pads = [*found.before, *found.after]
        made = free_name(f"{result}_squares", taken)
        squares = helper.make_node("Conv", [node.input[0], *constants], [made], node.name, pads=pads)
        name = free_name(f"{result}_spread", taken)
        spread = helper.make_node("DepthToSpace", [made], [result], name, blocksize=found.factor)
        changed.graph.node.extend([squares, spread])
    return changed
