"""Layers in float between layers in INT8, as ONNX Runtime has to be told that they are.

```
DQ - conv - Relu - Q   ->   DQ - conv - LeakyRelu of slope 0 - Q
DQ - conv - Q          ->   DQ - conv - LeakyRelu of slope 1 - Q
```
ONNX Runtime rounds the float weights of what lies between two pairs, all channels on one grid, and computes it in
integers (WeightBiasQuantization, when it optimizes a graph). It looks for a convolution or matrix product with nothing
but a ReLU or Clip before the quantizer. A LeakyRelu is neither, and is computed along with the convolution.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx
from onnx import helper

from edgekit.graph import walk
from edgekit.graph.walk import CONVOLUTIONS, PAIR, consumers, copied, producers

_ROUNDED_BY_ENGINE = CONVOLUTIONS | {"Gemm"}
_Readers = Mapping[str, list[onnx.NodeProto]]


def kept(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a QDQ graph of which ONNX Runtime computes in float what is in float; a float graph as it is."""
    if not any(node.op_type == PAIR[0] for node in model.graph.node):
        return model
    changed = copied(model)
    made_by, readers, taken = producers(changed), consumers(changed), walk.names(changed)
    nodes: list[onnx.NodeProto] = []
    for node in changed.graph.node:
        nodes.append(node)
        is_float = node.op_type in _ROUNDED_BY_ENGINE and not walk.is_dequantized(made_by, node.input[1])
        if not (is_float and walk.is_dequantized(made_by, node.input[0]) and _meets_quantizer(node, readers)):
            continue
        (behind,) = readers[node.output[0]]
        if behind.op_type == "Relu":
            behind.op_type = "LeakyRelu"
            behind.attribute.append(helper.make_attribute("alpha", 0.0))
        else:
            behind.input[0] = walk.free_name(f"{node.output[0]}_float", taken)
            name = walk.free_name(f"{node.name}_float", taken)
            nodes.append(helper.make_node("LeakyRelu", node.output, behind.input[:1], name, alpha=1.0))
    del changed.graph.node[:]
    changed.graph.node.extend(nodes)
    return changed


def _meets_quantizer(node: onnx.NodeProto, readers: _Readers) -> bool:
    """Return whether a quantizer alone reads what a node gives, perhaps behind a ReLU or Clip."""
    behind = readers.get(node.output[0], [])
    if [n.op_type for n in behind] in (["Relu"], ["Clip"]):
        return _meets_quantizer(behind[0], readers)
    return [n.op_type for n in behind] == [PAIR[0]]
