"""Simplifying an ONNX graph, with a check that it still computes the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import onnxsim

from edgekit.compress.export import strip, write
from edgekit.errors import IntegrityError
from edgekit.graph.checks import interface, load_onnx
from edgekit.graph.reference import Reference, probe, relative_change

MOST_CHANGE = 1e-5
_SIGMAS = (5 / 255, 25 / 255, 50 / 255)
# Multiples of the strides of all our networks, the largest being 16.
_SIZES = ((64, 96), (80, 48), (112, 112))

Simplifier = Callable[[onnx.ModelProto], onnx.ModelProto]


def onnx_simplifier(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return what onnxsim makes of a model."""
    simplified, _ = onnxsim.simplify(model)
    return simplified


def simplify(onnx_in: Path, out: Path, *, simplifier: Simplifier = onnx_simplifier) -> Path:
    """Return `out`, now the simplified graph; equal inputs give equal bytes.

    onnxsim's own check is not relied on: it compares at one size with loose bounds, and has let changed outputs pass
    (onnxsim#1284). Here three pictures of different size, content and noise level must come out the same.

    Raises:
        InputError: `onnx_in` is not a whole denoiser.
        IntegrityError: An output moved by more than 1e-5 of its largest value, or the result is not valid ONNX.
    """
    before = load_onnx(onnx_in)
    after = onnx.ModelProto()
    after.CopyFrom(before)
    after = simplifier(after)
    strip(after)
    try:
        onnx.checker.check_model(after, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise IntegrityError(f"{onnx_in}: the simplified graph is not valid: {str(error).splitlines()[0]}") from error
    channels = interface(after, out).channels
    run_before, run_after = Reference(before), Reference(after)
    for seed, ((height, width), sigma) in enumerate(zip(_SIZES, _SIGMAS, strict=True)):
        noisy = probe(height, width, channels, seed=seed)
        change = relative_change(run_after(noisy, sigma), run_before(noisy, sigma))
        if not change <= MOST_CHANGE:
            raise IntegrityError(
                f"{onnx_in}: simplifying moved the output at {height}x{width} by {change:.2g} of its largest value; "
                f"at most {MOST_CHANGE:g} is right",
                remedy="report the file to onnxsim, and use another version of it",
            )
    write(after, out)
    return out
