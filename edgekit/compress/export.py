"""From a torch network to an ONNX file that every engine takes."""

from __future__ import annotations

import copy
import math
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from torch import Tensor, nn
from torch.onnx import register_custom_op_symbolic, symbolic_helper, unregister_custom_op_symbolic  # type: ignore[attr-defined]

from edgekit.errors import IntegrityError, UnsupportedError
from edgekit.files import atomic_file
from edgekit.graph.checks import DENOISED, NOISY, SIGMA, interface, op_counts
from edgekit.graph.cost import Shape, infer_shapes
from edgekit.graph.reference import Reference, probe, relative_change
from edgekit.graph.walk import attribute, consumers, group_count, initializers

OPSET = 17
MOST_CHANGE = 1e-4
# Neither is the one that the network is traced with, which it may have taken for a constant.
_TRACED_SIGMA, _CHECKED_SIGMAS = 25 / 255, (5 / 255, 50 / 255)


def export_onnx(net: nn.Module, *, channels: int, takes_sigma: bool, stride: int, out: Path) -> Path:
    """Return `out`, now the network as ONNX with dynamic height and width; equal networks give equal bytes.

    The TorchScript-based exporter is used: it needs no further package, and torch's newer one writes PixelUnshuffle
    with the channels in the wrong order (pytorch/pytorch#186080). PixelUnshuffle becomes SpaceToDepth (with the next
    convolution's weights re-ordered where there are several colours), PixelShuffle DepthToSpace.

    Args:
        net: `forward(noisy, sigma)`, or `forward(noisy)` if blind; BatchNorm folded. It is not changed.
        channels: Planes of the picture.
        takes_sigma: Whether the network takes a noise level.
        stride: Height and width of the input are multiples of it.
        out: Where the file goes; its folder is made.

    Raises:
        UnsupportedError: An operator that ONNX has no form for, or a BatchNorm that was not folded.
        IntegrityError: The file's outputs differ from the network's by more than 1e-4.
    """
    net = copy.deepcopy(net).cpu().float().eval()
    unit = math.lcm(8, stride)
    sizes = ((8 * unit, 12 * unit), (5 * unit, 7 * unit))
    model = _traced(net, _example(*sizes[0], channels, _TRACED_SIGMA if takes_sigma else None, seed=0))
    if "BatchNormalization" in op_counts(model):
        raise UnsupportedError(
            f"{type(net).__name__}: the exported graph has a BatchNormalization", remedy="fold it first: compress.fuse"
        )
    _write_pads(model)
    shuffles = [node for node in model.graph.node if node.op_type == "SpaceToDepth"]
    restore_channel_order(model, shuffles, infer_shapes(model, *sizes[0]))
    strip(model)
    interface(model, out)
    onnx.checker.check_model(model)
    run = Reference(model)
    for seed, ((height, width), sigma) in enumerate(zip(sizes, _CHECKED_SIGMAS, strict=True)):
        example = _example(height, width, channels, sigma if takes_sigma else None, seed=seed)
        with torch.inference_mode():
            # A network may change its input in place.
            want = net(*(tensor.clone() for tensor in example)).numpy()
        change = relative_change(run(example[0].numpy(), sigma), want)
        if not change <= MOST_CHANGE:
            raise IntegrityError(
                f"{out}: at {height}x{width} the exported graph differs from the network by {change:.2g} of the "
                f"largest value; at most {MOST_CHANGE:g} is right",
                remedy="look for Python code in forward() that fixes a shape, the noise level or another value",
            )
    write(model, out)
    return out


def set_pads(node: onnx.NodeProto, widths: Sequence[int]) -> None:
    """Have a node whose border was automatic pad by these widths, both sides of an axis together."""
    less, more = [width // 2 for width in widths], [-(-width // 2) for width in widths]
    pads = less + more if attribute(node, "auto_pad") == b"SAME_UPPER" else more + less
    node.attribute.remove(next(a for a in node.attribute if a.name == "auto_pad"))
    node.attribute.append(helper.make_attribute("pads", pads))


def strip(model: onnx.ModelProto) -> None:
    """Take out of a model whatever does not compute: comments, inferred shapes, and the tools' versions and notes."""
    model.producer_name, model.producer_version, model.doc_string = "edgekit", "", ""
    model.graph.doc_string = ""
    del model.metadata_props[:]
    del model.graph.metadata_props[:]
    del model.graph.value_info[:]
    for item in (*model.graph.node, *model.graph.initializer, *model.graph.input, *model.graph.output):
        item.doc_string = ""
        del item.metadata_props[:]


def write(model: onnx.ModelProto, out: Path) -> None:
    """Write a model, whole or not at all; equal models give equal bytes."""
    with atomic_file(out) as temporary:
        temporary.write_bytes(model.SerializeToString(deterministic=True))


def _write_pads(model: onnx.ModelProto) -> None:
    """Say how wide the border is of what torch pads as `same`; ONNX Runtime finds none for a dilated window."""
    for node in model.graph.node:
        if node.op_type == "Conv" and attribute(node, "auto_pad") == b"SAME_UPPER":
            axes = zip(attribute(node, "kernel_shape"), attribute(node, "dilations"), strict=True)
            # It has no strides.
            set_pads(node, [(size - 1) * apart for size, apart in axes])


def _example(height: int, width: int, channels: int, sigma: float | None, *, seed: int) -> tuple[Tensor, ...]:
    noisy = torch.from_numpy(probe(height, width, channels, seed=seed))
    return (noisy,) if sigma is None else (noisy, torch.full((1, 1, 1, 1), sigma))


def _traced(net: nn.Module, example: tuple[Tensor, ...]) -> onnx.ModelProto:
    """Return the graph that the exporter makes of the network."""
    size = {2: "height", 3: "width"}
    with tempfile.TemporaryDirectory() as folder, _space_to_depth(), _without_stdout(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        file = Path(folder, "traced.onnx")
        try:
            torch.onnx.export(
                net,
                example,
                file,
                dynamo=False,
                opset_version=OPSET,
                input_names=[NOISY, SIGMA][: len(example)],
                output_names=[DENOISED],
                dynamic_axes={NOISY: size, DENOISED: size},
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise UnsupportedError(
                f"{type(net).__name__}: {str(error).splitlines()[0]}", remedy="replace this operator in the network"
            ) from error
        except (RuntimeError, TypeError, ValueError) as error:
            raise UnsupportedError(
                f"{type(net).__name__} cannot be exported: {str(error).strip().splitlines()[0]}",
                remedy="write it with modules of torch.nn in float32, without torch.jit.script",
            ) from error
        return onnx.ModelProto.FromString(file.read_bytes())


@contextmanager
def _without_stdout() -> Iterator[None]:
    """Keep off stdout the graph that torch's C++ writes there before it raises, whose log has no switch that works."""
    if sys.stdout is None:
        yield
        return
    sys.stdout.flush()
    shown = os.dup(1)
    try:
        with Path(os.devnull).open("wb") as nothing:
            os.dup2(nothing.fileno(), 1)
        yield
    finally:
        os.dup2(shown, 1)
        os.close(shown)


class _Graph(Protocol):
    """The graph that the exporter builds; torch has no public name for it."""

    def op(self, name: str, *inputs: torch.Value, blocksize_i: int) -> torch.Value:
        """Return the output of a new node."""
        ...


@contextmanager
def _space_to_depth() -> Iterator[None]:
    """Have the exporter write PixelUnshuffle as SpaceToDepth; it writes three reshapes and a transpose otherwise."""

    @symbolic_helper.parse_args("v", "i")
    def symbolic(g: _Graph, x: torch.Value, size: int) -> torch.Value:
        return g.op("SpaceToDepth", x, blocksize_i=size)

    register_custom_op_symbolic("aten::pixel_unshuffle", symbolic, OPSET)
    try:
        yield
    finally:
        unregister_custom_op_symbolic("aten::pixel_unshuffle", OPSET)


def restore_channel_order(
    model: onnx.ModelProto, shuffles: Sequence[onnx.NodeProto], shapes: Mapping[str, Shape]
) -> None:
    """Bring the channels of SpaceToDepths that stand for PixelUnshuffles into torch's order, in place.

    ```
    colour, row, column  (torch)      SpaceToDepth ─ conv(w)   ->   SpaceToDepth ─ conv(w, inputs re-ordered)
    row, column, colour  (ONNX)       SpaceToDepth ─ other     ->   SpaceToDepth ─ Gather ─ other
    ```
    Raises:
        UnsupportedError: How many colours one reads is not known.
    """
    readers, weights = consumers(model), initializers(model)
    for node in shuffles:
        block = next(a.i for a in node.attribute if a.name == "blocksize") ** 2
        if node.input[0] not in shapes:
            raise UnsupportedError(
                f"node '{node.name}' (SpaceToDepth): the shape of '{node.input[0]}' cannot be inferred",
                remedy="give PixelUnshuffle a picture whose size does not depend on its values",
            )
        colours = shapes[node.input[0]][1]
        if colours == 1:
            continue
        order = np.arange(block * colours).reshape(block, colours).T.ravel()
        behind = readers.get(node.output[0], [])
        own = [n.input[1] for n in behind if n.op_type == "Conv" and n.input[1] in weights and group_count(n) == 1]
        if len(own) == len(behind) and all(len(readers[name]) == 1 for name in own):
            for name in own:
                values = numpy_helper.to_array(weights[name])
                weights[name].CopyFrom(
                    numpy_helper.from_array(np.ascontiguousarray(values[:, np.argsort(order)]), name)
                )
        else:
            _insert_gather(model, node, order)


def _insert_gather(model: onnx.ModelProto, node: onnx.NodeProto, order: NDArray[np.int64]) -> None:
    """Put a Gather over the channels behind a node; its output keeps the node's output name."""
    result, unordered, indices = node.output[0], f"{node.output[0]}_unordered", f"{node.name}_order"
    node.output[0] = unordered
    model.graph.initializer.append(numpy_helper.from_array(order.astype(np.int64), indices))
    gather = onnx.helper.make_node("Gather", [unordered, indices], [result], f"{node.name}_Gather", axis=1)
    model.graph.node.insert(list(model.graph.node).index(node) + 1, gather)
