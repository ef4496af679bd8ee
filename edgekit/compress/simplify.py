"""Simplifying an ONNX graph, with a check that it still computes the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import onnxsim
from onnx import version_converter

from edgekit.compress.export import OPSET, strip, write
from edgekit.errors import IntegrityError, UnsupportedError
from edgekit.graph.checks import LEAST_OPSET, interface, load_onnx, opset
from edgekit.graph.reference import Reference, probe, relative_change
from edgekit.graph.walk import constants_stored, copied

MOST_CHANGE = 1e-5
_SIGMAS = (5 / 255, 25 / 255, 50 / 255)
# Multiples of the largest stride that a network may have.
_SIZES = ((64, 96), (96, 32), (128, 128))
_IR_VERSION = 8

Simplifier = Callable[[onnx.ModelProto], onnx.ModelProto]


def onnx_simplifier(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return what onnxsim makes of a model."""
    simplified, _ = onnxsim.simplify(model)
    return simplified


def simplify(onnx_in: Path, out: Path, *, simplifier: Simplifier = onnx_simplifier) -> Path:
    """Return `out`, now the simplified graph; equal inputs give equal bytes.

    onnxsim's own check is not relied on: it compares at one size with loose bounds, and has let changed outputs pass
    (onnxsim#1284). Here three pictures of different size, content and noise level must come out the same.

    Constant nodes become initializers, which is where weights are looked for. A file of an opset in which weights
    cannot be quantized by channel becomes one of opset 17.

    Raises:
        InputError: `onnx_in` is not a whole denoiser, or ONNX Runtime does not load or run it.
        UnsupportedError: An opset that cannot be converted, or an operator that ONNX Runtime does not have.
        IntegrityError: An output moved by more than 1e-5 of its largest value, or the result is not valid ONNX.
    """
    before = load_onnx(onnx_in)
    run_before = Reference(before, name=str(onnx_in))
    after = constants_stored(simplifier(_with_enough_opset(copied(before), onnx_in)))
    strip(after)
    try:
        onnx.checker.check_model(after, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise IntegrityError(f"{onnx_in}: the simplified graph is not valid: {str(error).splitlines()[0]}") from error
    channels = interface(after, out).channels
    run_after = Reference(after, name=str(onnx_in))
    for seed, ((height, width), sigma) in enumerate(zip(_SIZES, _SIGMAS, strict=True)):
        noisy = probe(height, width, channels, seed=seed)
        want = run_before(noisy, sigma)
        change = relative_change(run_after(noisy, sigma), want)
        if not change <= MOST_CHANGE:
            raise IntegrityError(
                f"{onnx_in}: simplifying moved the output at {height}x{width} by {change:.2g} of its largest value; "
                f"at most {MOST_CHANGE:g} is right",
                remedy="report the file to onnxsim, and use another version of it",
            )
    write(after, out)
    return out


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
    try:
        return version_converter.convert_version(model, OPSET)
    except (version_converter.ConvertError, RuntimeError) as error:
        raise UnsupportedError(
            f"{path}: is of opset {opset(model)} and cannot be converted to {OPSET}: {str(error).splitlines()[0]}",
            remedy=f"export it with opset {LEAST_OPSET} or more",
        ) from error
