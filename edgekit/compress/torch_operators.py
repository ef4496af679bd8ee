"""ONNX operators as torch computes them: what quantization-aware training follows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias, cast

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor
from torch.nn import functional

from edgekit.errors import UnsupportedError
from edgekit.graph.resizing import resizing

Attribute: TypeAlias = int | float | str | tuple[int, ...] | tuple[float, ...] | onnx.TensorProto
Given: TypeAlias = Sequence[Tensor | None]

# The opsets whose forms of the operators below were read.
OPSETS = range(13, 22)


@dataclass(frozen=True, kw_only=True)
class Node:
    """An operator: the names of its tensors (an omitted input is empty) and its attributes."""

    name: str
    operator: str
    inputs: tuple[str, ...]
    output: str
    attributes: Mapping[str, Attribute]

    def integer(self, name: str, default: int) -> int:
        """Return an integer attribute."""
        return int(cast(int, self.attributes.get(name, default)))

    def number(self, name: str, default: float) -> float:
        """Return a float attribute."""
        return float(cast(float, self.attributes.get(name, default)))

    def text(self, name: str, default: str) -> str:
        """Return a string attribute."""
        return str(self.attributes.get(name, default))

    def integers(self, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
        """Return an attribute of several integers."""
        return cast(tuple[int, ...], self.attributes.get(name, default))

    def unsupported(self, what: str) -> UnsupportedError:
        """Return the error that names this node."""
        return UnsupportedError(
            f"node '{self.name}' ({self.operator}): {what}, which quantization-aware training does not follow",
            remedy="export the network without it to have it trained",
        )


def read(proto: onnx.NodeProto) -> list[Node]:
    """Return the operator of a graph's node; of a Split one for each of its results.

    Raises:
        UnsupportedError: An operator that is not followed.
    """
    attributes: dict[str, Attribute] = {}
    node = Node(
        name=proto.name or proto.output[0],
        operator=proto.op_type,
        inputs=tuple(proto.input),
        output=proto.output[0],
        attributes=attributes,
    )
    if (node.operator not in OPERATORS and node.operator not in HALVES) or proto.domain not in ("", "ai.onnx"):
        raise node.unsupported("an operator")
    if any(proto.output[1:]) and node.operator != "Split":
        raise node.unsupported("several outputs")
    for attribute in proto.attribute:
        value = onnx.helper.get_attribute_value(attribute)
        attributes[attribute.name] = (
            value.decode() if isinstance(value, bytes) else tuple(value) if isinstance(value, list) else value
        )
    if node.operator != "Split":
        return [node]
    parts = {"parts": len(proto.output)}
    return [
        replace(node, output=output, attributes=attributes | parts | {"part": number})
        for number, output in enumerate(proto.output)
    ]


def _tensor(node: Node, given: Given, index: int) -> Tensor:
    value = given[index] if index < len(given) else None
    if value is None:
        raise node.unsupported(f"its input {index} is missing")
    return value


def _optional(given: Given, index: int) -> Tensor | None:
    return given[index] if index < len(given) else None


def _padded(node: Node, x: Tensor, *, fill: float = 0.0) -> tuple[Tensor, tuple[int, int]]:
    """Return the tensor and the padding that is left for the operator; other padding is applied to the tensor."""
    if node.text("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        raise node.unsupported(f"auto_pad={node.text('auto_pad', '')}")
    top, left, bottom, right = node.integers("pads", (0, 0, 0, 0))
    if (top, left) == (bottom, right):
        return x, (top, left)
    return functional.pad(x, (left, right, top, bottom), value=fill), (0, 0)


def _pair(node: Node, name: str, default: tuple[int, ...] = (1, 1)) -> tuple[int, int]:
    height, width = node.integers(name, default)
    return height, width


def _conv(node: Node, given: Given) -> Tensor:
    x, padding = _padded(node, _tensor(node, given, 0).contiguous(memory_format=torch.channels_last))
    return functional.conv2d(
        x,
        _tensor(node, given, 1).contiguous(memory_format=torch.channels_last),
        _optional(given, 2),
        _pair(node, "strides"),
        padding,
        _pair(node, "dilations"),
        node.integer("group", 1),
    )


def _conv_transpose(node: Node, given: Given) -> Tensor:
    top, left, bottom, right = node.integers("pads", (0, 0, 0, 0))
    if (top, left) != (bottom, right) or "output_shape" in node.attributes:
        raise node.unsupported("uneven pads or an output_shape")
    if node.text("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        raise node.unsupported(f"auto_pad={node.text('auto_pad', '')}")
    return functional.conv_transpose2d(
        _tensor(node, given, 0),
        _tensor(node, given, 1),
        _optional(given, 2),
        _pair(node, "strides"),
        (top, left),
        _pair(node, "output_padding", (0, 0)),
        node.integer("group", 1),
        _pair(node, "dilations"),
    )


def _clip(node: Node, given: Given) -> Tensor:
    x, low, high = _tensor(node, given, 0), _optional(given, 1), _optional(given, 2)
    if low is None and high is None:
        return x
    return torch.clamp(x, None if low is None else float(low), None if high is None else float(high))


def _prelu(node: Node, given: Given) -> Tensor:
    x = _tensor(node, given, 0)
    return torch.where(x > 0, x, x * _tensor(node, given, 1))


def _hard_sigmoid(node: Node, given: Given) -> Tensor:
    return (_tensor(node, given, 0) * node.number("alpha", 0.2) + node.number("beta", 0.5)).clamp(0, 1)


def _max_pool(node: Node, given: Given) -> Tensor:
    x, padding = _padded(node, _tensor(node, given, 0), fill=-math.inf)
    return functional.max_pool2d(
        x,
        _pair(node, "kernel_shape"),
        _pair(node, "strides"),
        padding,
        _pair(node, "dilations"),
        bool(node.integer("ceil_mode", 0)),
    )


def _axes(node: Node, given: Given) -> tuple[int, ...]:
    value = _optional(given, 1)
    axes = node.integers("axes", ()) if value is None else tuple(int(v) for v in value.reshape(-1))
    if not axes:
        raise node.unsupported("a reduction over all axes")
    return axes


def _reduce_mean(node: Node, given: Given) -> Tensor:
    return _tensor(node, given, 0).mean(_axes(node, given), keepdim=bool(node.integer("keepdims", 1)))


def _reduce_max(node: Node, given: Given) -> Tensor:
    return _tensor(node, given, 0).amax(_axes(node, given), keepdim=bool(node.integer("keepdims", 1)))


def _depth_to_space(node: Node, given: Given) -> Tensor:
    x, block = _tensor(node, given, 0), node.integer("blocksize", 0)
    if node.text("mode", "DCR") == "DCR":
        n, c, h, w = x.shape
        x = x.reshape(n, block * block, c // block**2, h, w).transpose(1, 2).reshape(n, c, h, w)
    return functional.pixel_shuffle(x, block)


def _space_to_depth(node: Node, given: Given) -> Tensor:
    x, block = _tensor(node, given, 0), node.integer("blocksize", 0)
    deep = functional.pixel_unshuffle(x, block)
    n, c, h, w = deep.shape
    # torch orders the planes colour, row, column; ONNX row, column, colour.
    return deep.reshape(n, x.shape[1], block * block, h, w).transpose(1, 2).reshape(n, c, h, w)


def _resize(node: Node, given: Given) -> Tensor:
    x, scales = _tensor(node, given, 0), _optional(given, 2)
    found = resizing(node.attributes, None if scales is None else scales.numpy())
    if found is None:
        raise node.unsupported("a resizing that is neither nearest nor linear by whole factors of height and width")
    if found.mode == "linear":
        return functional.interpolate(x, scale_factor=(found.height, found.width), mode="bilinear", align_corners=False)
    return x.repeat_interleave(found.height, 2).repeat_interleave(found.width, 3)


def _reshape(node: Node, given: Given) -> Tensor:
    x, shape = _tensor(node, given, 0), [int(v) for v in _tensor(node, given, 1)]
    if node.integer("allowzero", 0):
        raise node.unsupported("allowzero")
    if x.dim() > 2 and shape[:1] == [1]:
        # Graphs are written for one picture, and trained on several.
        shape[0] = x.shape[0]
    return x.reshape([x.shape[i] if size == 0 else size for i, size in enumerate(shape)])


def _gather(node: Node, given: Given) -> Tensor:
    x, indices, axis = _tensor(node, given, 0), _tensor(node, given, 1), node.integer("axis", 0)
    if indices.dim() > 1 or (axis, x.dim()) not in ((0, 1), (1, 4)) or (indices.dim() == 0 and axis == 1):
        raise node.unsupported("other indices than a list of planes, or of sizes")
    chosen = x.index_select(axis, indices.reshape(-1) % x.shape[axis])
    return chosen if indices.dim() else chosen.reshape(())


def _shape(node: Node, given: Given) -> Tensor:
    sizes = torch.tensor(_tensor(node, given, 0).shape)
    return sizes[node.integer("start", 0) : node.integer("end", len(sizes))]


def _integers(node: Node, given: Given, index: int) -> tuple[int, ...]:
    return tuple(int(v) for v in _tensor(node, given, index).reshape(-1))


def _divided(a: Tensor, b: Tensor) -> Tensor:
    return torch.div(a, b) if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def _cast(node: Node, given: Given) -> Tensor:
    kind = _KINDS.get(node.integer("to", 0))
    if kind is None:
        raise node.unsupported(f"to={onnx.TensorProto.DataType.Name(node.integer('to', 0))}")
    return _tensor(node, given, 0).to(kind)


def _constant_of_shape(node: Node, given: Given) -> Tensor:
    value = node.attributes.get("value")
    filled = numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else np.zeros(1, np.float32)
    return torch.from_numpy(filled.copy()).expand(_integers(node, given, 0))


def _expand(node: Node, given: Given) -> Tensor:
    # Graphs are written for one picture, and trained on several.
    x = _tensor(node, given, 0)
    return x.expand(torch.broadcast_shapes(x.shape, _integers(node, given, 1)))  # type: ignore[no-untyped-call]


def _transpose(node: Node, given: Given) -> Tensor:
    x = _tensor(node, given, 0)
    return x.permute(node.integers("perm", tuple(reversed(range(x.dim())))))


def _unsqueeze(node: Node, given: Given) -> Tensor:
    x, axes = _tensor(node, given, 0), _integers(node, given, 1)
    for axis in sorted(axis % (x.dim() + len(axes)) for axis in axes):
        x = x.unsqueeze(axis)
    return x


def _squeeze(node: Node, given: Given) -> Tensor:
    return _tensor(node, given, 0).squeeze(_integers(node, given, 1))


def _slice(node: Node, given: Given) -> Tensor:
    x, starts, ends = _tensor(node, given, 0), _integers(node, given, 1), _integers(node, given, 2)
    axes = tuple(range(len(starts))) if _optional(given, 3) is None else _integers(node, given, 3)
    steps = (1,) * len(starts) if _optional(given, 4) is None else _integers(node, given, 4)
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        chosen = range(x.shape[axis])[start:end:step]
        # A part in one piece is not copied.
        x = x.narrow(axis, chosen.start, len(chosen)) if step == 1 else x.index_select(axis, torch.tensor(chosen))
    return x


def _split(node: Node, given: Given) -> Tensor:
    x, axis, parts = _tensor(node, given, 0), node.integer("axis", 0), node.integer("parts", 1)
    equal = (-(-x.shape[axis] // parts),) * parts
    sizes = equal if _optional(given, 1) is None else _integers(node, given, 1)
    return torch.split(x, list(sizes) if sum(sizes) == x.shape[axis] else sizes[0], axis)[node.integer("part", 0)]


def _pad(node: Node, given: Given) -> Tensor:
    x, pads, value = _tensor(node, given, 0), _integers(node, given, 1), _optional(given, 2)
    count = len(pads) // 2
    axes = tuple(range(x.dim())) if _optional(given, 3) is None else _integers(node, given, 3)
    sides = {axis % x.dim(): (pads[i], pads[i + count]) for i, axis in enumerate(axes)}
    mode = {"constant": "constant", "reflect": "reflect", "edge": "replicate"}.get(node.text("mode", "constant"))
    if mode is None or x.dim() != 4 or any(any(sides.get(axis, (0,))) for axis in (0, 1)):
        raise node.unsupported("padding of planes, or wrapped around")
    around = (*sides.get(3, (0, 0)), *sides.get(2, (0, 0)))
    return functional.pad(x, around, mode, float(value or 0) if mode == "constant" else None)


def _where(node: Node, given: Given) -> Tensor:
    return torch.where(_tensor(node, given, 0), _tensor(node, given, 1), _tensor(node, given, 2))


def _arithmetic(compute: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Node, Given], Tensor]:
    return lambda node, given: compute(_tensor(node, given, 0), _tensor(node, given, 1))


def _elementwise(compute: Callable[[Tensor], Tensor]) -> Callable[[Node, Given], Tensor]:
    return lambda node, given: compute(_tensor(node, given, 0))


_KINDS = {
    onnx.TensorProto.FLOAT: torch.float32,
    onnx.TensorProto.INT32: torch.int32,
    onnx.TensorProto.INT64: torch.int64,
    onnx.TensorProto.BOOL: torch.bool,
}
HALVES = frozenset({"QuantizeLinear", "DequantizeLinear"})
ARITHMETIC: dict[str, Callable[[Node, Given], Tensor]] = {
    "Add": _arithmetic(torch.add),
    "Div": _arithmetic(_divided),
    "Mul": _arithmetic(torch.mul),
    "Pow": _arithmetic(torch.pow),
    "Sub": _arithmetic(torch.sub),
}
OPERATORS: dict[str, Callable[[Node, Given], Tensor]] = ARITHMETIC | {
    "Cast": _cast,
    "Ceil": _elementwise(torch.ceil),
    "Clip": _clip,
    "Concat": lambda node, given: torch.cat([t for t in given if t is not None], node.integer("axis", 1)),
    "ConstantOfShape": _constant_of_shape,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "DepthToSpace": _depth_to_space,
    "Elu": lambda node, given: functional.elu(_tensor(node, given, 0), node.number("alpha", 1.0)),
    "Equal": _arithmetic(torch.eq),
    "Erf": _elementwise(torch.erf),
    "Exp": _elementwise(torch.exp),
    "Expand": _expand,
    "Floor": _elementwise(torch.floor),
    "Gather": _gather,
    "GlobalAveragePool": _elementwise(lambda x: x.mean((2, 3), keepdim=True)),
    "GlobalMaxPool": _elementwise(lambda x: x.amax((2, 3), keepdim=True)),
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _elementwise(functional.hardswish),
    "Identity": _elementwise(lambda x: x),
    "LeakyRelu": lambda node, given: functional.leaky_relu(_tensor(node, given, 0), node.number("alpha", 0.01)),
    "MaxPool": _max_pool,
    "Mod": lambda node, given: (torch.fmod if node.integer("fmod", 0) else torch.remainder)(
        _tensor(node, given, 0), _tensor(node, given, 1)
    ),
    "Neg": _elementwise(torch.neg),
    "PRelu": _prelu,
    "Pad": _pad,
    "ReduceMax": _reduce_max,
    "ReduceMean": _reduce_mean,
    "Relu": _elementwise(torch.relu),
    "Reshape": _reshape,
    "Resize": _resize,
    "Shape": _shape,
    "Sigmoid": _elementwise(torch.sigmoid),
    "Slice": _slice,
    "Softplus": _elementwise(functional.softplus),
    "SpaceToDepth": _space_to_depth,
    "Split": _split,
    "Sqrt": _elementwise(torch.sqrt),
    "Squeeze": _squeeze,
    "Tanh": _elementwise(torch.tanh),
    "Tile": lambda node, given: _tensor(node, given, 0).tile(_integers(node, given, 1)),
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "Where": _where,
}
