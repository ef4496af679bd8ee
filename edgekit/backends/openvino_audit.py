"""What OpenVINO computes in integers, read from the runtime model of a compiled network."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import openvino

from edgekit.graph import audit as auditing
from edgekit.graph.audit import Executed, Weighted
from edgekit.graph.checks import NOISY
from edgekit.report import Audit

SIDE = 256
# What the ONNX reader puts behind the name of a convolution that it splits from its bias.
SPLIT = "/WithoutBiases"
_INTEGERS = ("i8", "u8")
_NOT_EXECUTED = ("Const", "Input", "Output", "Parameter", "Result")
_VAGUE = ("Eltwise", "Math", "Subgraph")
# OpenVINO counts up the nodes that its passes put in.
_COUNTED = re.compile(r"([A-Za-z]+)_\d+")
_PRODUCTS = ("Convolution", "Deconvolution", "FullyConnected", "MatMul")
Shape = tuple[int, ...]
# Type -> multiply-accumulates of its input, weight and output shapes; the weights of groups have an axis more in front.
# For a product of matrices n x k and k x m, either perhaps transposed, they are the root of nk * km * nm.
_MACS: dict[str, Callable[[Shape, Shape, Shape], int]] = {
    "Convolution": lambda source, weight, result: math.prod(result) * math.prod(weight[1:]),
    "GroupConvolution": lambda source, weight, result: math.prod(result) * math.prod(weight[2:]),
    "ConvolutionBackpropData": lambda source, weight, result: math.prod(source) * math.prod(weight[1:]),
    "GroupConvolutionBackpropData": lambda source, weight, result: math.prod(source) * math.prod(weight[2:]),
    "MatMul": lambda source, weight, result: (
        math.isqrt(math.prod(source[-2:]) * math.prod(weight[-2:]) * math.prod(result[-2:])) * math.prod(result[:-2])
    ),
}


def audit(model: openvino.Model, compiled: openvino.CompiledModel) -> Audit:
    """Return the account of a compiled model.

    Every executed node carries the precision of its kernel and the names of the nodes that it was made from; what is
    counted are the nodes of the artifact's own file.

    Args:
        model: The artifact as it was read; its input shape is set to a picture of 256x256.
        compiled: The same artifact, as the session runs it.
    """
    runtime = compiled.get_runtime_model().get_ordered_ops()
    integer = {
        name
        for node in runtime
        if _text(node, "layerType") in _PRODUCTS and _text(node, "runtimePrecision") in _INTEGERS
        for name in _made_from(node)
    }
    channels = model.input(NOISY).get_partial_shape()[1].get_length()
    model.reshape({NOISY: [1, channels, SIDE, SIDE]})
    operators = model.get_ordered_ops()
    weighted = [_weighted(node, integer) for node in operators if node.get_type_name() in _MACS]
    kinds = {node.get_friendly_name(): node.get_type_name() for node in operators}
    plan = [_executed(node, kinds) for node in runtime if _text(node, "layerType") not in _NOT_EXECUTED]
    return auditing.audit(weighted, plan, f"OpenVINO {_version()}'s runtime model")


def _weighted(node: openvino.Node, integer: set[str]) -> Weighted:
    source, weight, result = (tuple(port.get_shape()) for port in (*node.input_values()[:2], node.output(0)))
    return Weighted(
        name=_given_name(node),
        op=node.get_type_name(),
        macs=_MACS[node.get_type_name()](source, weight, result),
        integer=node.get_friendly_name() in integer,
    )


def _given_name(node: openvino.Node) -> str:
    """Return the name that a product has in the ONNX file; of one with a bias, the addition may bear it."""
    name, kind = str(node.get_friendly_name()), str(node.get_type_name())
    if kind.endswith("BackpropData") and name.startswith(kind):
        name = next(str(port.get_node().get_friendly_name()) for port in node.output(0).get_target_inputs())
    return name.removesuffix(SPLIT)


def _executed(node: openvino.Node, kinds: dict[str, str]) -> Executed:
    """Return an executed node; where its layer's type says little, under the type of the first node in it."""
    layer, first = _text(node, "layerType"), _made_from(node)[0]
    counted = _COUNTED.fullmatch(first)
    return Executed(
        op=kinds.get(first, counted[1] if counted else layer) if layer in _VAGUE else layer,
        arithmetic="integer" if _text(node, "runtimePrecision") in _INTEGERS else "float",
        multiplies=layer in _PRODUCTS,
        inputs=tuple(_edge(port.get_source_output()) for port in node.inputs()),
        outputs=tuple(_edge(port) for port in node.outputs()),
    )


def _edge(port: openvino.Output) -> str:
    return f"{port.get_node().get_friendly_name()}:{port.get_index()}"


def _made_from(node: openvino.Node) -> list[str]:
    return _text(node, "originalLayersNames").split(",")


def _text(node: openvino.Node, key: str) -> str:
    info = node.get_rt_info()
    return str(info[key].astype(str)) if key in info else ""


def _version() -> str:
    return str(openvino.__version__).split("-")[0]
