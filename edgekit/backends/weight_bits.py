"""Weights of 7 or 8 bits, where an engine's sums of two 8-bit products saturate on x86 without VNNI."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from onnx import TensorProto, numpy_helper

from edgekit.graph.checks import read_onnx

_LARGEST_OF_7_BITS = 63
NOTES = {
    7: "Weights have 7 bits, so that the engine's sums do not saturate on x86 without VNNI either.",
    8: "Weights have 8 bits: on x86 without VNNI the engine's sums saturate, and pictures lose far more. For such "
    "processors, compile with quantization.reduce_range=always.",
}


def weight_bits(int8_onnx: Path) -> int | None:
    """Return how many bits the signed weights of a QDQ graph have, 7 or 8; None where it has none, as in dynamic INT8.

    Raises:
        InputError: The file is missing or is not ONNX.
    """
    weights = [t for t in read_onnx(int8_onnx).graph.initializer if t.data_type == TensorProto.INT8 and t.dims]
    if not weights:
        return None
    largest = max(int(np.abs(numpy_helper.to_array(t).astype(np.int16)).max()) for t in weights)
    return 7 if largest <= _LARGEST_OF_7_BITS else 8
