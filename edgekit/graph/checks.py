"""What an ONNX file must be before anything is done with it, and how it is read."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import numpy_helper
from onnx.external_data_helper import ExternalDataInfo, load_external_data_for_model, uses_external_data

from edgekit.errors import InputError, UnsupportedError

NOISY = "noisy"
SIGMA = "sigma"
DENOISED = "denoised"
# The first in which weights are dequantized by channel.
LEAST_OPSET = 13
CONTROL_FLOW = frozenset({"If", "Loop", "Scan"})
QUANTIZED_OPS = frozenset(
    {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul", "ConvInteger"}
)
_PICTURE = f"'{NOISY}' (1, c, height, width)"


@dataclass(frozen=True, kw_only=True)
class Interface:
    """What a graph takes and gives.

    channels: Planes of the picture.
    takes_sigma: Whether there is an input `sigma`.
    opset: Version of the default operator set.
    """

    channels: int
    takes_sigma: bool
    opset: int


def load_onnx(path: Path) -> onnx.ModelProto:
    """Return the model in a file, after checking that it is whole, a denoiser by its interface, and finite.

    Raises:
        InputError: The file is missing, is not ONNX, is cut short, has another interface, or has weights that are not
            finite; says what was found.
        UnsupportedError: Control flow, or a shape other than (1, fixed channels, any height, any width).
    """
    model = read_onnx(path)
    interface(model, path)
    weighing = {name for node in model.graph.node if node.op_type != "Clip" for name in node.input}
    for tensor in model.graph.initializer:
        try:
            values = numpy_helper.to_array(tensor)
        except ValueError as error:
            raise InputError(
                f"{path}: weight '{tensor.name}' has other data than its shape {tuple(tensor.dims)} says: {error}",
                remedy="export it again, or copy it again with the files that lie beside it",
            ) from error
        if values.dtype.kind != "f":
            continue
        # A bound of a Clip may be infinite.
        wrong = ~np.isfinite(values) if tensor.name in weighing else np.isnan(values)
        if bad := int(np.count_nonzero(wrong)):
            raise InputError(
                f"{path}: weight '{tensor.name}' has {bad} of {values.size} values that are NaN or infinite",
                remedy="train again from a checkpoint before the loss became NaN",
            )
    return model


def read_onnx(path: Path) -> onnx.ModelProto:
    """Return the model in a file, after onnx's own checks only.

    Raises:
        InputError: The file is missing, is not ONNX, or is cut short.
    """
    try:
        model = onnx.ModelProto.FromString(path.read_bytes())
        load_external_data_for_model(model, str(path.parent))
        onnx.checker.check_model(model)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (DecodeError, ValueError, onnx.checker.ValidationError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "it cannot be decoded"
        raise InputError(
            f"{path}: is not a whole ONNX model ({path.stat().st_size} bytes): {reason}",
            remedy="export it again, or copy it again and compare the sizes",
        ) from error
    return model


def files_of(path: Path) -> tuple[Path, ...]:
    """Return an ONNX file and those beside it that its weights lie in, as PyTorch's exporter writes them.

    path: Of a file that `read_onnx` takes.
    """
    graph = onnx.ModelProto.FromString(path.read_bytes()).graph
    tensors = [*graph.initializer, *(attribute.t for node in graph.node for attribute in node.attribute)]
    beside = {ExternalDataInfo(tensor).location for tensor in tensors if uses_external_data(tensor)}
    return path, *(path.parent / name for name in sorted(beside))


def interface(model: onnx.ModelProto, path: Path) -> Interface:
    """Return the interface of a model.

    Args:
        model: The graph.
        path: Named in the errors.

    Raises:
        InputError: The names, types or ranks are not a denoiser's.
        UnsupportedError: Control flow, or a shape other than (1, fixed channels, any height, any width).
    """
    if found := sorted(CONTROL_FLOW & set(op_counts(model))):
        raise UnsupportedError(
            f"{path}: the graph has control flow ({', '.join(found)}), which engines for phones do not take",
            remedy="export a network without data-dependent branches",
        )
    weights = {i.name for i in model.graph.initializer}
    inputs = {i.name: i for i in model.graph.input if i.name not in weights}
    outputs = {o.name: o for o in model.graph.output}
    if NOISY not in inputs or set(inputs) - {NOISY, SIGMA} or set(outputs) != {DENOISED}:
        raise InputError(
            f"{path}: inputs are {_names(inputs)} and outputs {_names(outputs)}; a denoiser takes {_PICTURE}, "
            f"'{SIGMA}' (1, 1, 1, 1) unless it is blind, and gives '{DENOISED}'",
            remedy="rename them when you export, or in the file (docs/models.md has the lines)",
        )
    channels = _check_picture(inputs[NOISY], path)
    # Behind a crop, exporters name no number of channels; `simplify` looks at what comes out.
    if (given := _check_picture(outputs[DENOISED], path, unless_named=channels)) != channels:
        raise InputError(f"{path}: '{NOISY}' has {channels} channels and '{DENOISED}' has {given}; they must be equal")
    if SIGMA in inputs and _dims(inputs[SIGMA]) != (1, 1, 1, 1):
        raise InputError(f"{path}: '{SIGMA}' has the shape {_shown(inputs[SIGMA])}; expected (1, 1, 1, 1)")
    return Interface(channels=channels, takes_sigma=SIGMA in inputs, opset=opset(model))


def op_counts(model: onnx.ModelProto) -> dict[str, int]:
    """Return how many nodes of each operator the main graph has, by name; other domains as `domain::Op`."""
    names = (f"{n.domain}::{n.op_type}" if n.domain not in ("", "ai.onnx") else n.op_type for n in model.graph.node)
    return dict(sorted(Counter(names).items()))


def opset(model: onnx.ModelProto) -> int:
    """Return the version of the default operator set; 0 if the model does not say."""
    return next((int(o.version) for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)


def is_quantized(model: onnx.ModelProto) -> bool:
    """Return whether any operator of the graph quantizes or computes in integers."""
    return not QUANTIZED_OPS.isdisjoint(op_counts(model))


def load_float_onnx(path: Path) -> onnx.ModelProto:
    """Return the model in a file as `load_onnx`; raises InputError too where it is quantized."""
    model = load_onnx(path)
    if is_quantized(model):
        raise InputError(f"{path}: is quantized already", remedy="give the float graph that it was made from")
    return model


def _check_picture(value: onnx.ValueInfoProto, path: Path, *, unless_named: int | None = None) -> int:
    """Return the number of channels of an input or output (1, c, h, w) with any height and width.

    Args:
        value: The input or output.
        path: Named in the errors.
        unless_named: What it has where the graph does not say.
    """
    tensor, dims = value.type.tensor_type, _dims(value)
    if tensor.elem_type != onnx.TensorProto.FLOAT or len(dims) != 4:
        kind = onnx.TensorProto.DataType.Name(tensor.elem_type).lower()
        raise InputError(f"{path}: '{value.name}' is {kind} {_shown(value)}; expected float (1, c, height, width)")
    batch, channels, height, width = dims
    channels = unless_named if channels is None else channels
    if channels is None:
        raise UnsupportedError(
            f"{path}: '{value.name}' has a dynamic number of channels: {_shown(value)}",
            remedy="export it for 1 or 3 channels",
        )
    if batch not in (None, 1) or height is not None or width is not None:
        raise UnsupportedError(
            f"{path}: '{value.name}' has the shape {_shown(value)}; height and width must be dynamic and the batch 1",
            remedy="export it with dynamic axes 2 and 3",
        )
    return channels


def _dims(value: onnx.ValueInfoProto) -> tuple[int | None, ...]:
    """Return the shape, with None for every dimension that is not fixed."""
    return tuple(d.dim_value if d.HasField("dim_value") else None for d in value.type.tensor_type.shape.dim)


def _shown(value: onnx.ValueInfoProto) -> str:
    dims = value.type.tensor_type.shape.dim
    return "(" + ", ".join(str(d.dim_value) if d.HasField("dim_value") else d.dim_param or "?" for d in dims) + ")"


def _names(values: dict[str, onnx.ValueInfoProto]) -> str:
    return ", ".join(f"'{name}' {_shown(value)}" for name, value in values.items()) or "none"
