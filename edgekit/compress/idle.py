"""Padding to a multiple, and the crop that takes it away again, left out where sides are multiples already.

```
noisy ─ Pad(to even sides) ─ ... ─ Slice(to the sides of noisy) ─ denoised     FFDNet, as published
```
A bundle takes pictures whose sides are multiples of the network's stride, so that neither does anything there. Kernels
of our own have neither, and no engine needs to move a map for nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from edgekit.errors import UnsupportedError
from edgekit.graph.checks import DENOISED, NOISY
from edgekit.graph.cost import folded, infer_shapes, stride
from edgekit.graph.walk import constants_stored, copied, initializers

_KINDS = ("Pad", "Slice")
# Times the stride: what does nothing to them all does nothing to any multiple, whatever it pads to.
_SIZES = ((33, 35), (34, 36), (37, 47))


def idle_left_out(model: onnx.ModelProto, path: Path, step: int | None = None) -> onnx.ModelProto:
    """Return the graph without the Pads and Slices that do nothing to pictures whose sides are multiples of the stride.

    Args:
        model: A denoiser's graph of opset 13 or more. It is not changed.
        path: Of its file, for errors.
        step: The stride, in pixels; found from the graph unless told.
    """
    if not any(node.op_type in _KINDS for node in model.graph.node):
        return model
    try:
        step = step or stride(model, path)
        idle = set.intersection(*(_idle(model, rows * step, columns * step) for rows, columns in _SIZES))
    except UnsupportedError:
        return model
    changed = copied(model)
    source = {node.output[0]: node.input[0] for node in changed.graph.node if node.output[0] in idle}

    def behind(name: str) -> str:
        while name in source:
            name = source[name]
        return name

    # The result keeps its name.
    last = behind(DENOISED)
    if last == NOISY:
        return model
    kept = [node for node in changed.graph.node if node.output[0] not in source]
    for node in kept:
        for names in (node.input, node.output):
            names[:] = [DENOISED if behind(name) == last else behind(name) for name in names]
    del changed.graph.node[:]
    changed.graph.node.extend(kept)
    return changed


def _idle(model: onnx.ModelProto, height: int, width: int) -> set[str]:
    """Return the results of the Pads and Slices that are what they read, for pictures of that size."""
    fixed = constants_stored(folded(model, height, width))
    shapes = infer_shapes(fixed, height, width)
    stored = {name: numpy_helper.to_array(tensor).reshape(-1) for name, tensor in initializers(fixed).items()}
    return {
        node.output[0]
        for node in fixed.graph.node
        if (node.op_type == "Pad" and node.input[1] in stored and not stored[node.input[1]].any())
        or (node.op_type == "Slice" and _takes_all(node, stored, shapes.get(node.input[0], ())))
    }


def _takes_all(node: onnx.NodeProto, stored: Mapping[str, NDArray[np.generic]], shape: Sequence[int]) -> bool:
    """Return whether a Slice takes all of a map of that shape, in its order."""
    if not shape or not stored.keys() >= {name for name in node.input[1:] if name}:
        return False
    given: list[list[int]] = [stored[name].tolist() if name else [] for name in node.input[1:]]
    starts, ends, axes, steps = [*given, [], []][:4]
    axes, steps = axes or list(range(len(starts))), steps or [1] * len(starts)
    return all(
        step == 1 and start == 0 and end >= shape[axis]
        for start, end, axis, step in zip(starts, ends, axes, steps, strict=True)
    )
