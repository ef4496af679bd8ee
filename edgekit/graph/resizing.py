"""What a Resize node means that enlarges a map to a whole multiple: every value repeated, or linear between them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

# Coordinates and rounding by which every value is repeated, at any whole factor; and at twice the size alone.
_REPEATS = (("asymmetric", "floor"), ("half_pixel", "round_prefer_floor"), ("half_pixel", "round_prefer_ceil"))
_REPEATS_TWICE = ("asymmetric", "round_prefer_floor")


@dataclass(frozen=True, kw_only=True)
class Resizing:
    """mode: How the new values come about, centres of pixels in place. height, width: The factors, 1 or more."""

    mode: Literal["nearest", "linear"]
    height: int
    width: int


def resizing(attributes: Mapping[str, object], scales: NDArray[np.generic] | None) -> Resizing | None:
    """Return what a Resize does, or None where it is anything else than repeating or linear by whole factors.

    Source: the operator's definition, https://onnx.ai/onnx/operators/onnx__Resize.html. `pytorch_half_pixel` differs
    from `half_pixel` in results of one pixel only.

    Args:
        attributes: The node's, text as `str` or as the `bytes` that ONNX stores.
        scales: The node's third input (n, c, h, w), if it is a constant.
    """
    mode = _text(attributes, "mode", "nearest")
    coordinates = _text(attributes, "coordinate_transformation_mode", "half_pixel").removeprefix("pytorch_")
    rounding = _text(attributes, "nearest_mode", "round_prefer_floor")
    factors = [] if scales is None else [float(scale) for scale in scales.astype(np.float64)]
    if len(factors) != 4 or factors[:2] != [1, 1] or any(f < 1 or f % 1 for f in factors):
        return None
    height, width = int(factors[2]), int(factors[3])
    repeats = (coordinates, rounding) in (*_REPEATS, *([_REPEATS_TWICE] if height == width == 2 else []))
    if mode == "nearest" and repeats:
        return Resizing(mode="nearest", height=height, width=width)
    if mode == "linear" and coordinates == "half_pixel":
        return Resizing(mode="linear", height=height, width=width)
    return None


def _text(attributes: Mapping[str, object], name: str, default: str) -> str:
    value = attributes.get(name, default)
    return value.decode() if isinstance(value, bytes) else str(value)
