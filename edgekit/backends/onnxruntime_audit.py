"""What ONNX Runtime computes in integers, read from the graph that it makes of a file."""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import onnx
import onnxruntime

from edgekit.graph import audit as auditing
from edgekit.graph.audit import Executed, Weighted
from edgekit.graph.cost import dequantized_weight, macs_by_node
from edgekit.graph.reference import session_options
from edgekit.report import Audit

SIDE = 256
_COUNTER = re.compile(r"_token_\d+$")
_INTEGER_PRODUCTS = frozenset({"QLinearConv", "ConvInteger", "QLinearMatMul", "MatMulInteger", "QGemm"})
_FLOAT_PRODUCTS = frozenset({"Conv", "FusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul", "FusedMatMul"})


def audit(model: onnx.ModelProto, optimize: Callable[[onnxruntime.SessionOptions], object]) -> Audit:
    """Return the account of a model.

    Args:
        model: The artifact, whose nodes are what is counted.
        optimize: Opens the same file with the options that it is given.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = session_options(1)
        options.optimized_model_filepath = str(Path(folder, "optimized.onnx"))
        optimize(options)
        optimized = onnx.load(options.optimized_model_filepath)
    integer = _integer_nodes(model, optimized)
    ops = {node.name: node.op_type for node in model.graph.node}
    weighted = [
        Weighted(name=name, op=ops[name], macs=macs, integer=name in integer)
        for name, macs in macs_by_node(model, SIDE, SIDE).items()
    ]
    return auditing.audit(weighted, _plan(optimized), f"ONNX Runtime {onnxruntime.__version__}'s optimized graph")


def _integer_nodes(model: onnx.ModelProto, optimized: onnx.ModelProto) -> set[str]:
    """Return the names of the nodes that became an integer product of the optimized graph.

    ONNX Runtime names a product after its node, with a counter, and leaves a quantized weight its name; weights that
    were float it may quantize by itself. A product that neither leads to one node counts for none.
    """
    stored = dequantized_weight(model)
    shared = Counter(stored.values())
    owner = {weight: name for name, weight in stored.items() if shared[weight] == 1}
    products = [node for node in optimized.graph.node if node.op_type in _INTEGER_PRODUCTS]
    named = {_COUNTER.sub("", node.name) for node in products}
    return named | {owner[weight] for node in products for weight in node.input if weight in owner}


def _plan(optimized: onnx.ModelProto) -> list[Executed]:
    """Return the nodes of an optimized graph; all but those that quantize, dequantize or cast keep a tensor's type."""
    initializers = {tensor.name: tensor.data_type for tensor in optimized.graph.initializer}
    floats = {value.name for value in optimized.graph.input} | {
        name for name, kind in initializers.items() if kind == onnx.TensorProto.FLOAT
    }
    plan = []
    for node in optimized.graph.node:
        reads_float = not floats.isdisjoint(node.input[:1])
        to_float = node.op_type in ("DequantizeLinear", "Cast")
        if to_float or (reads_float and node.op_type not in ("QuantizeLinear", "DynamicQuantizeLinear")):
            floats.update(node.output)
        plan.append(
            Executed(
                op=node.op_type,
                arithmetic="float" if reads_float or to_float else "integer",
                multiplies=node.op_type in _INTEGER_PRODUCTS | _FLOAT_PRODUCTS,
                inputs=tuple(name for name in node.input if name not in initializers),
                outputs=tuple(node.output),
            )
        )
    return plan
