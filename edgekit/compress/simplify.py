"""Simplifying an ONNX graph, with a check that it still computes the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxsim
from onnx import helper, version_converter

from edgekit.compress.export import OPSET, set_pads, strip, write
from edgekit.compress.idle import idle_left_out
from edgekit.compress.shuffles import shuffles_named
from edgekit.errors import InputError, IntegrityError, UnsupportedError
from edgekit.graph.checks import LEAST_OPSET, NOISY, interface, load_onnx, opset
from edgekit.graph.cost import WEIGHT_INPUT, infer_shapes, stride
from edgekit.graph.reference import Reference, probe, relative_change
from edgekit.graph.walk import attribute, constants_stored, copied, initializers

MOST_CHANGE = 1e-5
_SIGMAS = (5 / 255, 25 / 255, 50 / 255)
# Multiples of the largest stride that a network may have.
_SIZES = ((64, 96), (96, 32), (128, 128))
_IR_VERSION = 8
# The first in which a Resize says how it finds its coordinates.
_LEAST_OPSET_OF_COORDINATES = 11
_SAME = (b"SAME_UPPER", b"SAME_LOWER")

Simplifier = Callable[[onnx.ModelProto], onnx.ModelProto]


def onnx_simplifier(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return what onnxsim makes of a model."""
    simplified, _ = onnxsim.simplify(model)
    return simplified


def simplify(onnx_in: Path, out: Path, *, step: int | None = None, simplifier: Simplifier = onnx_simplifier) -> Path:
    """Return `out`, now the simplified graph; equal inputs give equal bytes.

    onnxsim's own check is not relied on: it compares at one size with loose bounds, and has let changed outputs pass
    (onnxsim#1284). Here three pictures of different size, content and noise level must come out the same.

    Padding and crops that do nothing to a picture whose sides are multiples of the stride are left out. Reshapes and
    Transposes that are shuffles become SpaceToDepth and DepthToSpace. Constant nodes become initializers, which is
    where weights are looked for. Borders that operators find by themselves get their widths. A file of an opset in
    which weights cannot be quantized by channel becomes one of opset 17.

    Args:
        onnx_in: The graph.
        out: Where the file goes.
        step: The network's stride, in pixels; found from the graph unless told.
        simplifier: In place of onnxsim.

    Raises:
        InputError: `onnx_in` is not a whole denoiser, or ONNX Runtime does not load or run it.
        UnsupportedError: An opset that cannot be converted, an operator that ONNX Runtime does not have, or a
            BatchNormalization that was exported for training.
        IntegrityError: An output moved by more than 1e-5 of its largest value, or the result is not valid ONNX.
    """
    before = load_onnx(onnx_in)
    _refuse_training(before, onnx_in)
    run_before = Reference(before, name=str(onnx_in))
    given = _with_enough_opset(copied(before), onnx_in)
    after = constants_stored(simplifier(shuffles_named(idle_left_out(given, onnx_in, step))))
    _write_pads(after, onnx_in)
    _leave_out_omitted(after)
    strip(after)
    _refuse_half(after, onnx_in)
    _name_channels(after)
    try:
        onnx.checker.check_model(after, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise IntegrityError(f"{onnx_in}: the simplified graph is not valid: {str(error).splitlines()[0]}") from error
    channels = interface(after, out).channels
    run_after = Reference(after, name=str(onnx_in))
    # Only as it stands in the file is a convolution refused whose channels do not fit, on every processor.
    Reference(before, blocked=False, name=str(onnx_in))(probe(*_SIZES[0], channels, seed=0), _SIGMAS[0])
    for seed, ((height, width), sigma) in enumerate(zip(_SIZES, _SIGMAS, strict=True)):
        noisy = probe(height, width, channels, seed=seed)
        want = run_before(noisy, sigma)
        if want.shape != noisy.shape:
            raise InputError(f"{onnx_in}: gives {want.shape} for a picture {noisy.shape}; they must be equal")
        if not np.isfinite(want).all():
            raise InputError(
                f"{onnx_in}: gives values that are not finite for a picture of {width}x{height} at noise level "
                f"{255 * sigma:g}",
                remedy="look for a root, a logarithm or a division of what may be 0 or less",
            )
        change = relative_change(run_after(noisy, sigma), want)
        if not change <= MOST_CHANGE:
            raise IntegrityError(
                f"{onnx_in}: simplifying moved the output at {height}x{width} by {change:.2g} of its largest value; "
                f"at most {MOST_CHANGE:g} is right",
                remedy="report the file to onnxsim, and use another version of it",
            )
    write(after, out)
    return out


def _leave_out_omitted(model: onnx.ModelProto) -> None:
    """Shorten each node's inputs by those at the end that are omitted: a convolution with an empty bias has none."""
    for node in model.graph.node:
        while node.input and not node.input[-1]:
            node.input.pop()


def _write_pads(model: onnx.ModelProto, path: Path) -> None:
    """Say how wide a border is that an operator finds by itself, where it is the same for all pictures; others stay.

    ```
    Conv(auto_pad=SAME_UPPER, kernel_shape=[4, 4])  ->  Conv(pads=[1, 1, 2, 2], kernel_shape=[4, 4])
    ```
    """
    for node in model.graph.node:
        if node.op_type == "ConvTranspose" and attribute(node, "auto_pad") in _SAME:
            _write_pads_of_transposed(node)
    kinds = ("Conv", "MaxPool", "AveragePool")
    automatic = [n for n in model.graph.node if n.op_type in kinds and attribute(n, "auto_pad") in _SAME]
    if not automatic:
        return
    step = stride(model, path)
    sizes = [infer_shapes(model, 33 * step + farther, 35 * step + farther) for farther in (0, step)]
    for node in automatic:
        window, strides = attribute(node, "kernel_shape"), attribute(node, "strides") or (1, 1)
        if not window or attribute(node, "ceil_mode") or any(node.input[0] not in shapes for shapes in sizes):
            continue
        sides, others = (shapes[node.input[0]][2:] for shapes in sizes)
        # What a stride leaves of a side is the same in a picture and the next larger one, or not in all.
        if any((a - b) % by for a, b, by in zip(sides, others, strides, strict=True)):
            continue
        axes = zip(sides, window, strides, attribute(node, "dilations") or (1, 1), strict=True)
        # As many results as ceil(side / by); the odd pixel lies where the kind says.
        set_pads(node, [max((-(-n // by) - 1) * by + (size - 1) * apart + 1 - n, 0) for n, size, by, apart in axes])


def _write_pads_of_transposed(node: onnx.NodeProto) -> None:
    """Say by how much a transposed convolution crops so that its result is as large as its strides say."""
    window, strides = attribute(node, "kernel_shape"), attribute(node, "strides") or (1, 1)
    if not window or attribute(node, "output_shape"):
        return
    axes = zip(
        window,
        strides,
        attribute(node, "dilations") or (1, 1),
        attribute(node, "output_padding") or (0, 0),
        strict=True,
    )
    widths = [(size - 1) * apart + 1 + more - by for size, by, apart, more in axes]
    if min(widths) >= 0:
        set_pads(node, widths)


def _refuse_training(model: onnx.ModelProto, path: Path) -> None:
    """Raise UnsupportedError where a BatchNormalization takes its statistics from the picture itself."""
    for node in model.graph.node:
        if node.op_type == "BatchNormalization" and (attribute(node, "training_mode") or len(node.output) > 1):
            raise UnsupportedError(
                f"{path}: node '{node.name}' (BatchNormalization) was exported for training: it takes mean and "
                "variance from each picture",
                remedy="export the network after net.eval()",
            )


def _refuse_half(model: onnx.ModelProto, path: Path) -> None:
    """Raise UnsupportedError where convolutions or products have weights of float16, and so compute in it."""
    stored = initializers(model)
    for node in model.graph.node:
        named = [name for name in node.input if name in stored and stored[name].data_type == onnx.TensorProto.FLOAT16]
        if node.op_type in WEIGHT_INPUT and named:
            raise UnsupportedError(
                f"{path}: node '{node.name}' ({node.op_type}) computes in float16",
                remedy="export the network in float32; targets with 'precision: float16' make float16 of it",
            )


def _name_channels(model: onnx.ModelProto) -> None:
    """Say of the result that it is one picture of as many channels as the input, where the graph does not say it."""
    (noisy,) = (value for value in model.graph.input if value.name == NOISY)
    (denoised,) = model.graph.output
    given = noisy.type.tensor_type.shape.dim[1].dim_value
    for dim, size in zip(denoised.type.tensor_type.shape.dim[:2], (1, given), strict=True):
        if not dim.HasField("dim_value"):
            dim.dim_value = size


def _with_enough_opset(model: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    """Return the model, of opset 17 if its own is less than INT8 needs."""
    if opset(model) >= LEAST_OPSET:
        return model
    model.ir_version = max(model.ir_version, _IR_VERSION)
    # As initializers that are inputs too they could be given from outside from that version on.
    stored = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in stored]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    loses_coordinates = opset(model) < _LEAST_OPSET_OF_COORDINATES
    try:
        converted = version_converter.convert_version(model, OPSET)
    except (version_converter.ConvertError, RuntimeError) as error:
        raise UnsupportedError(
            f"{path}: is of opset {opset(model)} and cannot be converted to {OPSET}: {str(error).splitlines()[0]}",
            remedy=f"export it with opset {LEAST_OPSET} or more",
        ) from error
    for node in converted.graph.node:
        if node.op_type == "Resize" and loses_coordinates:
            # onnx's converter leaves out what makes a Resize do as it, or an Upsample, did.
            node.attribute.extend(
                helper.make_attribute(name, value)
                for name, value in (("coordinate_transformation_mode", "asymmetric"), ("nearest_mode", "floor"))
            )
    return converted
