"""Shuffles by their own names: Reshapes and Transposes that do what SpaceToDepth or DepthToSpace does become one.

```
x ─ Unsqueeze ─ Reshape ─ Reshape ─ Transpose ─ Reshape ─ Squeeze     torch's exporter, of PixelUnshuffle
x ─ Reshape ─ Transpose ─ Reshape                                     written by hand, as FFDNet and others do
```
Engines have integer kernels for neither form, and how far a Reshape looks is not known. What a chain does is found by
running it on numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from edgekit.compress.export import restore_channel_order
from edgekit.errors import UnsupportedError
from edgekit.graph.cost import folded, infer_shapes
from edgekit.graph.reference import runtime
from edgekit.graph.walk import constants_stored, consumers, copied, initializers, producers

_MOVES = frozenset({"Reshape", "Transpose", "Unsqueeze", "Squeeze"})
_HEIGHT, _WIDTH = 64, 96
_BLOCKS = (2, 3, 4, 8)
Values = NDArray[np.float32]


def shuffles_named(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the graph with SpaceToDepth and DepthToSpace in place of chains that do the same; others stay."""
    if not any(node.op_type == "Transpose" for node in model.graph.node):
        return model
    changed = copied(model)
    try:
        shapes, fixed = infer_shapes(changed, _HEIGHT, _WIDTH), constants_stored(folded(changed, _HEIGHT, _WIDTH))
    except UnsupportedError:
        return model
    unordered = []
    for chain in list(_chains(changed)):
        given, result = chain[0].input[0], chain[-1].output[0]
        if len(shapes.get(given, ())) != 4 or len(shapes.get(result, ())) != 4:
            continue
        numbers = np.arange(np.prod(shapes[given]), dtype=np.float32).reshape(shapes[given])
        moved = _run(fixed, [node.output[0] for node in chain], given, numbers)
        node, as_torch = (None, False) if moved is None else _shuffle(numbers, moved)
        if node is None:
            continue
        node.input.append(given)
        node.output.append(result)
        node.name = chain[-1].name or result
        changed.graph.node.insert(list(changed.graph.node).index(chain[0]), node)
        for old in chain:
            changed.graph.node.remove(old)
        if as_torch:
            unordered.append(result)
    made_by = producers(changed)
    restore_channel_order(changed, [made_by[name] for name in unordered], shapes)
    return changed


def _chains(model: onnx.ModelProto) -> Iterator[list[onnx.NodeProto]]:
    """Yield the longest chains of nodes that move values, each read by the next alone."""
    made_by, readers = producers(model), consumers(model)

    def following(node: onnx.NodeProto) -> onnx.NodeProto | None:
        behind = readers.get(node.output[0], [])
        alone = len(behind) == 1 and behind[0].op_type in _MOVES and behind[0].input[0] == node.output[0]
        return behind[0] if alone else None

    for node in model.graph.node:
        before = made_by.get(node.input[0]) if node.op_type in _MOVES else None
        if node.op_type not in _MOVES or (before is not None and before.op_type in _MOVES and following(before)):
            continue
        chain, last = [node], following(node)
        while last is not None:
            chain.append(last)
            last = following(last)
        yield chain


def _run(fixed: onnx.ModelProto, outputs: Sequence[str], given: str, numbers: Values) -> Values | None:
    """Return what the nodes that make `outputs` do to numbers; None where something else than constants goes in."""
    made_by, stored = producers(fixed), initializers(fixed)
    nodes = [made_by[name] for name in outputs if name in made_by]
    wanted = {name for node in nodes for name in node.input if name} - {given, *outputs}
    if len(nodes) < len(outputs) or not wanted <= stored.keys():
        return None
    graph = helper.make_graph(
        nodes,
        "shuffle",
        [helper.make_tensor_value_info(given, onnx.TensorProto.FLOAT, numbers.shape)],
        [helper.make_tensor_value_info(outputs[-1], onnx.TensorProto.FLOAT, None)],
        [stored[name] for name in wanted],
    )
    alone = helper.make_model(graph, opset_imports=list(fixed.opset_import), ir_version=fixed.ir_version)
    (moved,) = runtime(alone).run(None, {given: numbers})
    return np.asarray(moved, np.float32)


def _shuffle(numbers: Values, moved: Values) -> tuple[onnx.NodeProto | None, bool]:
    """Return the node that moves numbers so, and whether it is a SpaceToDepth with its channels in torch's order."""
    _, channels, height, width = numbers.shape
    for block in _BLOCKS:
        if moved.shape == (1, channels * block**2, height // block, width // block):
            parts = numbers.reshape(channels, height // block, block, width // block, block)
            space_to_depth = helper.make_node("SpaceToDepth", [], [], blocksize=block)
            # From (c, h, i, w, j) to channels by place (i, j, c), as ONNX has them, or by colour (c, i, j), as torch.
            if np.array_equal(parts.transpose(2, 4, 0, 1, 3).reshape(moved.shape), moved):
                return space_to_depth, False
            if np.array_equal(parts.transpose(0, 2, 4, 1, 3).reshape(moved.shape), moved):
                return space_to_depth, True
        if moved.shape == (1, channels // block**2, height * block, width * block):
            for mode, shape, axes in (
                ("CRD", (-1, block, block, height, width), (0, 3, 1, 4, 2)),
                ("DCR", (block, block, -1, height, width), (2, 3, 0, 4, 1)),
            ):
                if np.array_equal(numbers.reshape(shape).transpose(axes).reshape(moved.shape), moved):
                    return helper.make_node("DepthToSpace", [], [], blocksize=block, mode=mode), False
    return None, False
