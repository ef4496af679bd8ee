"""Whether INT8 pays: the artifact against its own FP32 self, on one engine, in interleaved runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgekit.backends import Session, load_onnx
from edgekit.graph.checks import op_counts, read_onnx
from edgekit.measure import latency
from edgekit.measure.latency import Paired, Ratio
from edgekit.measure.quality import Array
from edgekit.target import Engine

_MIN_PAIRS = 8
# Operators that engines compute in float between integer convolutions, with what each would be replaced by.
_COSTLY = {
    "HardSwish": "activation=relu",
    "Sigmoid": "activation=relu",
    "HardSigmoid": "se=false",
    "ReduceMean": "se=false",
    "GlobalAveragePool": "se=false",
}


@dataclass(frozen=True, kw_only=True)
class Worth:
    """Run times of the FP32 student and the artifact.

    in_float: Operators that keep the engine going to and fro. released: Whether products run in float.
    dynamic: Whether ranges are found in each picture.
    """

    engine: str
    paired: Paired
    ratio: Ratio
    in_float: tuple[str, ...]
    released: bool
    dynamic: bool

    def sentence(self) -> str:
        """Return the fact, with advice where INT8 is not worth it, or where these runs do not tell."""
        ratio = self.ratio
        bounds = f"{ratio.low_e3 / 1000:.2f} to {ratio.high_e3 / 1000:.2f}"
        fact = (
            f"INT8 against the same network in FP32 ({self.engine}, one picture, {ratio.pairs} interleaved pairs): "
            f"{self.paired.b_median_us / 1000:.1f} ms against {self.paired.a_median_us / 1000:.1f} ms, "
            f"{ratio.ratio_e3 / 1000:.2f}x ({bounds})."
        )
        if latency.decide(ratio, 1.0) == "pass":
            return fact
        if ratio.high_e3 > 1000:
            return f"{fact} Whether INT8 is faster here is not decided: time it longer, with nothing beside it."
        return f"{fact} INT8 is not worth it here: {self._cause()}, or ship float32."

    def _cause(self) -> str:
        """Return why it is not, and what would be."""
        if self.dynamic:
            return "ranges are found in each picture; leave out quantization.mode=dynamic"
        if self.in_float:
            advice = sorted({_COSTLY[name] for name in self.in_float})
            return (
                f"{', '.join(self.in_float)} run in float between the integer convolutions; train the student with "
                f"{' and '.join(advice)}, or take the 'control' network"
            )
        if self.released:
            return (
                "convolutions are in float; raise budgets.int8_drop_db, or take a larger student, where the budget "
                "put them there, else leave out quantization.keep_float and what `edgekit lint` names"
            )
        return "too little of its time is spent in convolutions; take a larger student"


def compare(
    engine: Engine,
    fp32: Path,
    artifact: Session,
    shape: tuple[int, ...],
    *,
    threads: int,
    seconds: float,
    released: bool = False,
    dynamic: bool = False,
    interleave: Callable[..., Paired] = latency.interleave,
) -> Worth | None:
    """Return how the artifact compares with the FP32 graph that it was made from; None for an engine that runs no ONNX.

    Args:
        engine: The artifact's.
        fp32: The FP32 graph.
        artifact: Opened with `threads` threads.
        shape: Of the picture that is timed, (1, c, h, w).
        threads: Of the engine.
        seconds: Time after which no further pair is begun.
        released: Whether products of the artifact run in float, as they do where its budget wants it.
        dynamic: Whether the artifact finds its ranges in each picture.
        interleave: Measures.
    """
    if engine not in ("onnxruntime", "openvino"):
        return None
    reference = load_onnx(engine).open_onnx(fp32, threads=threads)
    noisy = np.random.default_rng(0).random(shape, dtype=np.float32)
    paired = interleave(_once(reference, noisy), _once(artifact, noisy), min_pairs=_MIN_PAIRS, max_seconds=seconds)
    found = op_counts(read_onnx(fp32))
    return Worth(
        engine=engine,
        paired=paired,
        ratio=latency.ratio_with_bound(paired),
        in_float=tuple(name for name in _COSTLY if name in found),
        released=released,
        dynamic=dynamic,
    )


def _once(session: Session, noisy: Array) -> Callable[[], None]:
    def run() -> None:
        session(noisy, 25 / 255)

    return run
