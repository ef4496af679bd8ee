"""Walks over an ONNX graph: who makes a tensor, who reads it, what is stored behind it, where convolutions are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from edgekit.graph.checks import DENOISED, NOISY, SIGMA

CONVOLUTIONS = frozenset({"Conv", "ConvTranspose"})
PAIR = ("QuantizeLinear", "DequantizeLinear")


def copied(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy that can be changed."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


def names(model: onnx.ModelProto) -> set[str]:
    """Return the names of all nodes and tensors of a graph, which those of new ones must not be."""
    graph = model.graph
    given = {value.name for value in (*graph.input, *graph.initializer)}
    return given | {name for node in graph.node for name in (node.name, *node.output)}


def free_name(name: str, taken: set[str]) -> str:
    """Return the name, longer where it is taken, and take it."""
    while name in taken:
        name += "_"
    taken.add(name)
    return name


def attribute(node: onnx.NodeProto, name: str) -> Any:
    """Return an attribute's value, None if it is not given."""
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), None)


def group_count(convolution: onnx.NodeProto) -> int:
    """Return how many groups of channels a convolution has."""
    return int(attribute(convolution, "group") or 1)


def producers(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    """Return tensor name -> the node that makes it; inputs and initializers have none."""
    return {name: node for node in model.graph.node for name in node.output if name}


def consumers(model: onnx.ModelProto) -> dict[str, list[onnx.NodeProto]]:
    """Return tensor name -> the nodes that read it, in the graph's order."""
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in dict.fromkeys(node.input):
            readers.setdefault(name, []).append(node)
    return readers


def initializers(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    """Return the initializers by name."""
    return {tensor.name: tensor for tensor in model.graph.initializer}


def constants_stored(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the graph whose Constant nodes are initializers; those of text, or sparse, stay."""
    changed = copied(model)
    for node in model.graph.node:
        values = _constant(node) if node.op_type == "Constant" else None
        if values is not None:
            changed.graph.node.remove(node)
            changed.graph.initializer.add().CopyFrom(values)
            changed.graph.initializer[-1].name = node.output[0]
    return changed


def _constant(node: onnx.NodeProto) -> onnx.TensorProto | None:
    """Return what a Constant node holds."""
    (given,) = node.attribute
    if given.name == "value":
        return given.t
    kind = {"value_float": np.float32, "value_floats": np.float32, "value_int": np.int64, "value_ints": np.int64}
    if given.name not in kind:
        return None
    return numpy_helper.from_array(np.array(helper.get_attribute_value(given), kind[given.name]))


def stored_behind(
    name: str, made_by: Mapping[str, onnx.NodeProto], stored: Mapping[str, onnx.TensorProto]
) -> tuple[str, ...]:
    """Return the initializers that a tensor is or is dequantized from, the values first; none of any other tensor.

    What has a scale for each element of another axis than the first is such another.
    """
    if name in stored:
        return (name,)
    node = made_by.get(name)
    if node is None or node.op_type != PAIR[1] or not stored.keys() >= set(node.input):
        return ()
    along_first = attribute(node, "axis") == 0 or max(stored[node.input[1]].dims, default=1) == 1
    return tuple(node.input) if along_first else ()


def derived_from(model: onnx.ModelProto, tensor: str) -> set[str]:
    """Return the names of all tensors that depend on `tensor`, itself included."""
    reached = {tensor}
    for node in model.graph.node:
        if not reached.isdisjoint(node.input):
            reached.update(node.output)
    return reached


def first_convolutions(model: onnx.ModelProto, tensor: str) -> tuple[str, ...]:
    """Return the names of the convolutions that are reached first on every way down from `tensor`."""
    readers = consumers(model)
    return _reach([tensor], lambda name: readers.get(name, []), lambda node: node.output)


def last_convolutions(model: onnx.ModelProto, tensor: str) -> tuple[str, ...]:
    """Return the names of the convolutions that are reached first on every way up from `tensor`."""
    made_by = producers(model)
    return _reach([tensor], lambda name: [made_by[name]] if name in made_by else [], lambda node: node.input)


def last_sum(model: onnx.ModelProto) -> str:
    """Return the tensor that the picture is, or is clipped or cropped from."""
    made_by, name = producers(model), DENOISED
    while name in made_by and made_by[name].op_type in ("Clip", "Identity", "Slice"):
        name = made_by[name].input[0]
    return name


def is_noise_level(node: onnx.NodeProto, stored: Mapping[str, onnx.TensorProto]) -> bool:
    """Return whether a node multiplies the noise level by constants, one for each channel of what it is added to."""
    return node.op_type == "Mul" and node.input[0] == SIGMA and node.input[1] in stored


def input_maps(model: onnx.ModelProto) -> set[str]:
    """Return the tensors that hold pixels of the input, in places of their own, and maps of the noise level beside."""
    levels, found = level_maps(model), {NOISY}
    for node in model.graph.node:
        if node.op_type == "Concat" and attribute(node, "axis") in (1, -3):
            moved = not found.isdisjoint(node.input) and (found | levels).issuperset(node.input)
        else:
            moved = node.op_type in ("SpaceToDepth", "Gather") and node.input[0] in found
        if moved:
            found.update(node.output)
    return found


def level_maps(model: onnx.ModelProto) -> set[str]:
    """Return the tensors that hold the noise level at each pixel."""
    made_by, stored = producers(model), initializers(model)

    def is_one(name: str) -> bool:
        node = made_by.get(name)
        if node is None or node.op_type not in ("ConstantOfShape", "Expand"):
            return name in stored and numpy_helper.to_array(stored[name]).reshape(-1).tolist() == [1.0]
        if node.op_type == "Expand":
            return is_one(node.input[0])
        value = attribute(node, "value")
        return value is not None and numpy_helper.to_array(value).tolist() == [1.0]

    found = {SIGMA}
    for node in model.graph.node:
        read = [name for name in node.input if name not in found]
        if node.op_type == "Mul" and len(read) == 1:
            is_level = read[0] in made_by and is_one(read[0])
        else:
            is_level = node.op_type in ("Expand", "Tile") and node.input[0] in found
        found.update(node.output if is_level else ())
    return found - {SIGMA}


def integer_convolutions(model: onnx.ModelProto) -> tuple[str, ...]:
    """Return the names of the convolutions of a QDQ graph whose weights are dequantized integers."""
    made_by = producers(model)
    return tuple(n.name for n in model.graph.node if n.op_type in CONVOLUTIONS and is_dequantized(made_by, n.input[1]))


def float_convolutions(model: onnx.ModelProto) -> tuple[str, ...]:
    """Return the names of the other convolutions of a QDQ graph."""
    made_by = producers(model)
    return tuple(
        n.name for n in model.graph.node if n.op_type in CONVOLUTIONS and not is_dequantized(made_by, n.input[1])
    )


def is_dequantized(made_by: Mapping[str, onnx.NodeProto], name: str) -> bool:
    """Return whether a tensor is what a DequantizeLinear gives."""
    return name in made_by and made_by[name].op_type == "DequantizeLinear"


def _reach(
    start: list[str],
    step: Callable[[str], Iterable[onnx.NodeProto]],
    onward: Callable[[onnx.NodeProto], Iterable[str]],
) -> tuple[str, ...]:
    """Return the convolutions at which a walk from the tensors `start` stops."""
    found: dict[str, None] = {}
    seen: set[str] = set()
    while start:
        name = start.pop()
        if name in seen:
            continue
        seen.add(name)
        for node in step(name):
            if node.op_type in CONVOLUTIONS:
                found[node.name] = None
            else:
                start.extend(onward(node))
    return tuple(found)
