"""DepthToSpace with its channels in the order of planes: it moves whole vectors of channels, not single values."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import numpy_helper

from edgekit.graph.walk import PAIR, attribute, consumers, copied, group_count, initializers, producers, stored_behind


def channels_by_plane(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a float or QDQ graph that computes the same, whose DepthToSpace take the channels of a plane together.

    The output channels of the convolutions before them change places. What else reads such a convolution, has groups,
    or has a shape that does not tell its channels, stays.
    """
    changed = copied(model)
    made_by, readers, stored = producers(changed), consumers(changed), initializers(changed)
    for node in changed.graph.node:
        if node.op_type != "DepthToSpace" or attribute(node, "mode") != b"CRD":
            continue
        way = way_up(node, made_by, stored)
        source = made_by.get(way[-1])
        if source is None or source.op_type != "Conv" or group_count(source) != 1:
            continue
        parts = [stored_behind(name, made_by, stored) for name in source.input[1:]]
        tensors = [name for part in parts for name in part]
        if not all(parts) or any(len(readers[name]) > 1 for name in (*tensors, *way)):
            continue
        channels = stored[parts[0][0]].dims[0]
        order = np.arange(channels).reshape(-1, attribute(node, "blocksize") ** 2).T.reshape(-1)
        for name in tensors:
            if tuple(stored[name].dims[:1]) == (channels,):
                values = np.ascontiguousarray(numpy_helper.to_array(stored[name])[order])
                stored[name].CopyFrom(numpy_helper.from_array(values, name))
        next(a for a in node.attribute if a.name == "mode").s = b"DCR"
    return changed


def way_up(
    node: onnx.NodeProto, made_by: Mapping[str, onnx.NodeProto], stored: Mapping[str, onnx.TensorProto]
) -> list[str]:
    """Return the tensors from what a node reads up through pairs that round a whole map by one scale."""
    way = [str(node.input[0])]
    while (pair := made_by.get(way[-1])) is not None and pair.op_type in PAIR:
        if not all(name in stored and max(stored[name].dims, default=1) == 1 for name in pair.input[1:]):
            break
        way.append(str(pair.input[0]))
    return way
