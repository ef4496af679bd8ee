"""Running a graph as ONNX Runtime does it, and how far two pictures are apart."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from edgekit.errors import InputError, UnsupportedError, is_out_of_memory
from edgekit.graph import float_layers
from edgekit.graph.checks import DENOISED, NOISY, SIGMA

Array = NDArray[np.float32]
FATAL_ONLY = 4  # an error raises as well, and is told by edgekit


def feeds(noisy: Array, sigma: float, *, takes_sigma: bool) -> dict[str, Array]:
    """Return the inputs of a graph by name."""
    if not takes_sigma:
        return {NOISY: noisy}
    return {NOISY: noisy, SIGMA: np.full((1, 1, 1, 1), sigma, np.float32)}


def session_options(threads: int) -> onnxruntime.SessionOptions:
    """Return options for repeatable results: `threads` inside an operator, one operator at a time, quiet."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = FATAL_ONLY
    return options


@contextmanager
def runtime_errors(what: str, remedy: str) -> Iterator[None]:
    """Tell ONNX Runtime's errors in edgekit's, but that memory ran out, which every command tells alike.

    Args:
        what: It failed to do, a sentence to which the reason is added.
        remedy: What the reader can do now.

    Raises:
        UnsupportedError: An operator that ONNX Runtime does not have.
        InputError: Anything else that it does not load or run.
    """
    state = onnxruntime.capi.onnxruntime_pybind11_state
    try:
        yield
    except state.NotImplemented as error:
        raise UnsupportedError(f"{what}: {_reason(error)}") from error
    except (
        state.Fail,
        state.InvalidProtobuf,
        state.InvalidGraph,
        state.InvalidArgument,
        state.NoSuchFile,
        state.RuntimeException,
    ) as error:
        if is_out_of_memory(error):
            raise
        raise InputError(f"{what}: {_reason(error)}", remedy=remedy) from error


def _reason(error: Exception) -> str:
    """Return the first line of an error without ONNX Runtime's code, and place in its source, in front."""
    line = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", str(error).splitlines()[0])
    return re.sub(r"^/\S+:\d+ .*?\) (?=[A-Z])", "", line)


def runtime(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    """Return a graph opened on the CPU with one thread, for any inputs."""
    return onnxruntime.InferenceSession(
        model.SerializeToString(), session_options(1), providers=["CPUExecutionProvider"]
    )


class Reference:
    """A graph opened in ONNX Runtime on the CPU with one thread.

    Args:
        model: The graph.
        exact: Compute quantized operators in floats, between the pairs as the graph has them. Else ONNX Runtime makes
            8-bit kernels of them, whose sums of two products saturate on x86 without VNNI; of those alone whose weights
            are quantized (`float_layers`).
        blocked: Let ONNX Runtime rewrite convolutions for channels in blocks, as it does by default. Such a one takes
            fewer channels than it has weights for, where the block fills them up (16 with AVX-512), and is not refused.
        name: Of the graph, for the errors.

    Raises:
        InputError: It cannot be opened, or run on a picture.
        UnsupportedError: An operator that ONNX Runtime does not have.
    """

    def __init__(
        self, model: onnx.ModelProto, *, exact: bool = False, blocked: bool = True, name: str = "the graph"
    ) -> None:
        self._name = name
        options = session_options(1)
        options.add_session_config_entry("session.disable_quant_qdq", str(int(exact)))
        if not blocked:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        with runtime_errors(f"{name}: ONNX Runtime cannot load it", "export it again"):
            self._session = onnxruntime.InferenceSession(
                (model if exact else float_layers.kept(model)).SerializeToString(),
                options,
                providers=["CPUExecutionProvider"],
            )
        self._takes_sigma = SIGMA in {i.name for i in self._session.get_inputs()}

    def __call__(self, noisy: Array, sigma: float) -> Array:
        """Return the denoised picture, shaped as `noisy` (1, c, h, w)."""
        what = f"{self._name}: ONNX Runtime cannot run it on a picture of {noisy.shape[2]}x{noisy.shape[3]}"
        with runtime_errors(what, "export a network whose pictures may have sides of any multiple of 32"):
            (denoised,) = self._session.run([DENOISED], feeds(noisy, sigma, takes_sigma=self._takes_sigma))
        return np.asarray(denoised, np.float32)


def relative_change(got: Array, want: Array) -> float:
    """Return the largest absolute difference over the largest absolute value of `want`; nan if either has one."""
    if got.shape != want.shape:
        return math.inf
    return float(np.abs(got - want).max() / max(float(np.abs(want).max()), np.finfo(np.float32).tiny))


def agreement_db(got: Array, want: Array) -> float:
    """Return the PSNR of `got` against `want` for a peak of 1; inf where equal, nan if either has one."""
    error = float(np.mean(np.square(got.astype(np.float64) - want.astype(np.float64))))
    return math.inf if error == 0 else -10 * math.log10(error)


def probe(height: int, width: int, channels: int, *, seed: int) -> Array:
    """Return a made-up noisy picture (1, c, h, w): smooth waves and noise, about as bright as a photograph."""
    random = np.random.RandomState(seed)
    y, x = np.mgrid[0:height, 0:width]
    phase = random.rand(channels, 1, 1) * 6.0
    waves = 0.5 + 0.25 * np.sin(x / 7.0 + phase) + 0.2 * np.cos(y / 11.0 - phase)
    noisy: Array = (waves + random.randn(channels, height, width) * 0.1)[None].astype(np.float32)
    return noisy
