"""What a graph costs: parameters and multiply-accumulates, the same on every machine."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnxsim
from onnx import helper

from edgekit.errors import UnsupportedError
from edgekit.graph.checks import DENOISED, NOISY
from edgekit.graph.walk import constants_stored, copied, initializers, producers

# Type -> which input holds the weights; the data is the first.
WEIGHT_INPUT = {
    **dict.fromkeys(("Conv", "ConvTranspose", "Gemm", "MatMul", "ConvInteger", "MatMulInteger"), 1),
    **dict.fromkeys(("QLinearConv", "QLinearMatMul"), 3),
}
# Whatever they read beside their map sets what they do.
_SET_BY_INPUTS = frozenset({"Clip", "Pad", "Resize"})
Shape = tuple[int, ...]
STRIDES = (8, 16, 32)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The cost of one picture.

    parameters: Learned numbers, in whatever type; scales, zero points and shapes are not counted.
    macs: Multiply-accumulates of convolutions and matrix products.
    """

    parameters: int
    macs: int


def cost(model: onnx.ModelProto, height: int, width: int) -> Cost:
    """Return the cost of one picture of height x width pixels.

    Raises:
        UnsupportedError: A shape that cannot be inferred.
    """
    return Cost(parameters=parameters(model), macs=sum(macs_by_node(model, height, width).values()))


def parameters(model: onnx.ModelProto) -> int:
    """Return the number of learned parameters: float tensors and the integers that are dequantized to them.

    Scales, what bounds, pads and sizes are given by, and numbers without an axis, as of a formula, are not learned.
    """
    scales = {
        name for n in model.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear") for name in n.input[1:]
    }
    stored = {n.input[0] for n in model.graph.node if n.op_type == "DequantizeLinear"}
    settings = {n for node in model.graph.node if node.op_type in _SET_BY_INPUTS for n in node.input[1:]}
    return sum(
        math.prod(tensor.dims)
        for name, tensor in initializers(constants_stored(model)).items()
        if tensor.dims
        and name not in scales | settings
        and (tensor.data_type == onnx.TensorProto.FLOAT or name in stored)
    )


def macs_by_node(model: onnx.ModelProto, height: int, width: int) -> dict[str, int]:
    """Return node name -> multiply-accumulates, for convolutions and matrix products.

    Raises:
        UnsupportedError: A shape that cannot be inferred, or a convolution without a name.
    """
    shapes = infer_shapes(model, height, width)
    result: dict[str, int] = {}
    for node in model.graph.node:
        if node.op_type not in WEIGHT_INPUT:
            continue
        if not node.name or node.name in result:
            raise UnsupportedError(
                f"two nodes are named '{node.name}' ({node.op_type}); names must be unique and not empty"
            )
        result[node.name] = _macs(node, shapes)
    return result


def stride(model: onnx.ModelProto, path: Path) -> int:
    """Return the least of `STRIDES` of which a picture's sides may be any multiples.

    Args:
        model: A denoiser's graph (`checks.interface`).
        path: Named in the error.

    Raises:
        UnsupportedError: None of them.
    """
    wrong = ""
    for candidate in STRIDES:
        height, width = 33 * candidate, 35 * candidate
        try:
            given = infer_shapes(model, height, width).get(DENOISED, ())[2:] or (height, width)
        except UnsupportedError as error:
            wrong = str(error)
            continue
        if given == (height, width):
            return candidate
        wrong = f"a picture of {height}x{width} comes out as {given[0]}x{given[1]}"
    raise UnsupportedError(
        f"{path}: {wrong}",
        remedy=f"pictures come in any multiple of {', '.join(map(str, STRIDES[:-1]))} or {STRIDES[-1]}",
    )


def infer_shapes(model: onnx.ModelProto, height: int, width: int) -> dict[str, Shape]:
    """Return tensor name -> shape for one picture of height x width pixels.

    Raises:
        UnsupportedError: The size does not fit the graph.
    """
    fixed = _of_size(model, height, width)
    for node in fixed.graph.node:
        # onnx's inference does not know it. It keeps its map's shape.
        if node.op_type == "GroupNormalization":
            node.CopyFrom(helper.make_node("Identity", node.input[:1], node.output[:1], node.name))
    try:
        shapes = _inferred(fixed)
        if any(name and name not in shapes for node in fixed.graph.node for name in node.output):
            # Sizes are computed from the picture's as the graph runs.
            shapes = _inferred(folded(model, height, width)) | shapes
    except onnx.shape_inference.InferenceError as error:
        raise UnsupportedError(f"no shapes for a picture of {height}x{width}: {str(error).splitlines()[0]}") from error
    return shapes


def folded(model: onnx.ModelProto, height: int, width: int, *, without_idle: bool = False) -> onnx.ModelProto:
    """Return the graph for one picture of height x width pixels: what is computed from sizes alone is constant.

    Args:
        model: A denoiser's graph.
        height: Of the picture, in pixels.
        width: Of the picture, in pixels.
        without_idle: Leave out what does nothing at this size, as padding to a multiple.

    Raises:
        UnsupportedError: The size does not fit the graph.
    """
    try:
        return onnxsim.simplify(_of_size(model, height, width), perform_optimization=without_idle)[0]
    except (RuntimeError, ValueError, onnx.shape_inference.InferenceError, onnx.checker.ValidationError) as error:
        raise UnsupportedError(f"no graph for a picture of {height}x{width}: {str(error).splitlines()[0]}") from error


def _of_size(model: onnx.ModelProto, height: int, width: int) -> onnx.ModelProto:
    """Return the graph that takes one picture of height x width pixels."""
    fixed = copied(model)
    del fixed.graph.value_info[:]
    for value in fixed.graph.input:
        if value.name == NOISY:
            for axis, size in ((0, 1), (2, height), (3, width)):
                value.type.tensor_type.shape.dim[axis].dim_value = size
    for value in fixed.graph.output:
        if value.name == DENOISED:
            for dim in value.type.tensor_type.shape.dim:
                dim.Clear()
    return fixed


def _inferred(model: onnx.ModelProto) -> dict[str, Shape]:
    """Return tensor name -> shape, of those whose shape onnx can infer."""
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
    shapes = {i.name: tuple(i.dims) for i in model.graph.initializer}
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        tensor = value.type.tensor_type
        if tensor.HasField("shape") and all(d.HasField("dim_value") for d in tensor.shape.dim):
            shapes[value.name] = tuple(d.dim_value for d in tensor.shape.dim)
    return shapes


def integer_permille(model: onnx.ModelProto, integer_nodes: frozenset[str]) -> int:
    """Return the share of all multiply-accumulates that the named nodes make up, in thousandths, rounded down.

    The share hardly depends on the size of the picture; 256x256 is looked at.
    """
    macs = macs_by_node(model, 256, 256)
    return 1000 * sum(count for name, count in macs.items() if name in integer_nodes) // max(1, sum(macs.values()))


def dequantized_weight(model: onnx.ModelProto) -> dict[str, str]:
    """Return node name -> integer initializer, for the nodes whose weight is one, dequantized or as it is."""
    made_by, stored = producers(model), initializers(model)
    found: dict[str, str] = {}
    for node in model.graph.node:
        if node.op_type not in WEIGHT_INPUT:
            continue
        weight = node.input[WEIGHT_INPUT[node.op_type]]
        source = made_by.get(weight)
        if source is not None and source.op_type == "DequantizeLinear":
            weight = source.input[0]
        if weight in stored and stored[weight].data_type != onnx.TensorProto.FLOAT:
            found[node.name] = weight
    return found


def _macs(node: onnx.NodeProto, shapes: dict[str, Shape]) -> int:
    names = (node.input[0], node.input[WEIGHT_INPUT[node.op_type]], node.output[0])
    missing = [name for name in names if name not in shapes]
    if missing:
        raise UnsupportedError(
            f"node '{node.name}' ({node.op_type}): the shape of '{missing[0]}' cannot be inferred",
            remedy="export the network with ONNX's own operators, and before an engine optimized it",
        )
    source, weight, result = (shapes[name] for name in names)
    if node.op_type == "ConvTranspose":
        return math.prod(source) * math.prod(weight[1:])
    if node.op_type in ("Conv", "ConvInteger", "QLinearConv"):
        return math.prod(result) * math.prod(weight[1:])
    return math.prod(result) * source[-2 if _transposed(node) else -1]


def _transposed(node: onnx.NodeProto) -> bool:
    return any(a.name == "transA" and a.i for a in node.attribute)
