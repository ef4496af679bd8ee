"""The ranges of a float graph's tensors on noisy pictures, which its quantizers are laid over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from edgekit.graph.checks import DENOISED, NOISY, SIGMA
from edgekit.graph.reference import feeds, session_options
from edgekit.graph.walk import copied

Array = NDArray[np.float32]
Calibration = Sequence[tuple[Array, float]]
Method = Literal["minmax", "percentile"]

# Of each picture this share of the values lies outside at either end. Taken picture by picture, so that the noisiest
# pictures keep their range; a percentile over all pictures together clips them.
TAIL = 1e-4
# Values of a tensor that a percentile is taken from; an odd number, so that a stride meets all columns.
_SAMPLE = 2**18 - 1


@dataclass(frozen=True, kw_only=True)
class Observed:
    """What was seen of each tensor with four dimensions.

    ranges: Lowest and highest value; zero lies between them.
    peaks: Largest magnitude in each channel.
    """

    ranges: Mapping[str, tuple[float, float]]
    peaks: Mapping[str, NDArray[np.float64]]


def observe(model: onnx.ModelProto, pictures: Calibration, method: Method) -> Observed:
    """Return what the tensors of a float graph hold while it denoises the pictures.

    Args:
        model: A checked float graph.
        pictures: Noisy pictures (1, c, h, w) with their sigma on the scale [0, 1].
        method: `minmax` takes the outermost values, `percentile` leaves out the outermost 0.01 % of each picture.
    """
    watched = copied(model)
    names = [name for node in model.graph.node for name in node.output if name and name != DENOISED]
    watched.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    options = session_options(1)
    # Fused operators give other tensors than the graph names.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(watched.SerializeToString(), options, providers=["CPUExecutionProvider"])
    takes_sigma = SIGMA in {i.name for i in session.get_inputs()}
    lows: dict[str, float] = {}
    highs: dict[str, float] = {}
    peaks: dict[str, NDArray[np.float64]] = {}
    for noisy, sigma in pictures:
        seen = dict(zip(names, session.run(names, feeds(noisy, sigma, takes_sigma=takes_sigma)), strict=True))
        for name, values in {NOISY: noisy, **seen}.items():
            if values.ndim != 4:
                continue
            low, high = _ends(values, method)
            lows[name] = min(low, lows.get(name, 0.0))
            highs[name] = max(high, highs.get(name, 0.0))
            peak = np.abs(values).max((0, 2, 3)).astype(np.float64)
            peaks[name] = np.maximum(peak, peaks[name]) if name in peaks else peak
    return Observed(ranges={name: (lows[name], highs[name]) for name in lows}, peaks=peaks)


def _ends(values: Array, method: Method) -> tuple[float, float]:
    """Return the lowest and the highest value that a range must hold."""
    if method == "minmax":
        return float(values.min()), float(values.max())
    sample = values.ravel()[:: max(values.size // _SAMPLE, 1)]
    outside = round(sample.size * TAIL)
    parted = np.partition(sample, (outside, sample.size - 1 - outside))
    return float(parted[outside]), float(parted[sample.size - 1 - outside])
