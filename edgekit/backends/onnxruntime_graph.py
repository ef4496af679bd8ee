"""Graphs as ONNX Runtime is to compute them: layers in float stay so, and the others take less time.

```
conv - Q - DQ - DepthToSpace - Q - DQ    ->   conv - Q - Transpose, Reshape - DQ      (channels last in between)
```
Its integer convolutions have their channels last, and DepthToSpace would have them first: it is the slowest of all its
nodes for the bytes that it moves, one by one, and its neighbours are transposed for its sake. `base` in INT8 took
14.1 ms, and takes 13.2 (docs/int8-inside.md). In float it brings nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import onnx
from onnx import helper, numpy_helper

from edgekit.graph import float_layers, walk
from edgekit.graph.shuffle import channels_by_plane, way_up
from edgekit.graph.walk import PAIR, attribute, consumers, copied, initializers, producers, stored_behind


class _Moves(NamedTuple):
    nodes: list[onnx.NodeProto]
    shapes: list[onnx.TensorProto]


def rewritten(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a QDQ graph for one picture at a time that computes the same; what has no such nodes stays as it is."""
    return shuffles_with_channels_last(channels_by_plane(float_layers.kept(model)))


def shuffles_with_channels_last(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the graph whose DepthToSpace between integer convolutions are transpositions of vectors of channels.

    It is for DepthToSpace whose channels are by plane, between two pairs that round alike.
    """
    changed = copied(model)
    made_by, readers, stored = producers(changed), consumers(changed), initializers(changed)
    nodes: list[onnx.NodeProto] = []
    rounded_again: set[str] = set()
    taken = walk.names(changed)
    for node in changed.graph.node:
        channels = _channels_between_pairs(node, made_by, readers, stored)
        if channels is None:
            nodes.append(node)
            continue
        integers, result = made_by[node.input[0]].input[0], readers[node.output[0]][0].output[0]
        rounded_again |= {node.input[0], result}
        fewer = channels // attribute(node, "blocksize") ** 2
        moves = _moves(node, integers, result, fewer, taken)
        nodes += moves.nodes
        changed.graph.initializer.extend(moves.shapes)
    kept = [n for n in nodes if n.op_type not in PAIR or rounded_again.isdisjoint(n.output)]
    del changed.graph.node[:]
    changed.graph.node.extend(kept)
    return changed


def _channels_between_pairs(
    node: onnx.NodeProto,
    made_by: Mapping[str, onnx.NodeProto],
    readers: Mapping[str, list[onnx.NodeProto]],
    stored: Mapping[str, onnx.TensorProto],
) -> int | None:
    """Return the channels that a DepthToSpace by planes is given, None of any that is not between alike integers."""
    if node.op_type != "DepthToSpace" or attribute(node, "mode") not in (None, b"DCR"):
        return None
    before, after = made_by.get(node.input[0]), readers.get(node.output[0], [])
    if before is None or before.op_type != PAIR[1] or len(readers[node.input[0]]) > 1:
        return None
    if [n.op_type for n in after] != [PAIR[0]] or after[0].input[1:] != before.input[1:]:
        return None
    source = made_by.get(way_up(node, made_by, stored)[-1])
    weights = stored_behind(source.input[1], made_by, stored) if source and source.op_type == "Conv" else ()
    return int(stored[weights[0]].dims[0]) if weights else None


def _moves(node: onnx.NodeProto, source: str, result: str, channels: int, taken: set[str]) -> _Moves:
    """Return what a DepthToSpace to so many channels is with its channels last, of any height h and width w.

    (1, bbc, h, w) -> (1, h, w, b, bc) -> (h, 1, b, w, bc) -> (h, b, wb, c) -> (1, hb, wb, c) -> (1, c, hb, wb).
    A shape of zero keeps what is there, in the same place; so one batch more would have no place. The new nodes and
    tensors have names that are not `taken`, and are added to them.
    """
    block = attribute(node, "blocksize")
    steps = [
        ("Transpose", [0, 2, 3, 1]),
        ("Reshape", [0, 0, 0, block, block * channels]),
        ("Transpose", [1, 0, 3, 2, 4]),
        ("Reshape", [0, block, -1, channels]),
        ("Reshape", [1, -1, 0, channels]),
        ("Transpose", [0, 3, 1, 2]),
    ]
    nodes, shapes = [], []
    for index, (kind, numbers) in enumerate(steps):
        name = walk.free_name(f"{node.name}_{index}", taken)
        made = result if index == len(steps) - 1 else walk.free_name(f"{result}_{index}", taken)
        if kind == "Transpose":
            nodes.append(helper.make_node(kind, [source], [made], name, perm=numbers))
        else:
            shape = walk.free_name(f"{made}_shape", taken)
            shapes.append(numpy_helper.from_array(np.array(numbers, np.int64), shape))
            nodes.append(helper.make_node(kind, [source, shape], [made], name))
        source = made
    return _Moves(nodes, shapes)
