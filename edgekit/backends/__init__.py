"""One door per engine: a module with `build` and `open_session`, imported only when its engine is asked for.

Every engine's graph has the same interface. Input `noisy`, float32 (1, channels, height, width) with pixels in
[0, 1] plus noise, unclipped; height and width multiples of the model's stride. Input `sigma`, float32 (1, 1, 1, 1), the
noise's standard deviation on the same scale (25 / 255 for "sigma 25"), only where the model takes a noise level. Output
`denoised`, float32, shaped as `noisy`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, cast

from edgekit.bundle import Built
from edgekit.errors import ToolMissingError, UnsupportedError
from edgekit.report import Audit
from edgekit.target import Engine, Target

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import nn

    Array = NDArray[np.float32]

Level = Literal["native", "emulated", "reference"]
DOORS: dict[Engine, str] = {
    "onnxruntime": "edgekit.backends.onnxruntime",
    "openvino": "edgekit.backends.openvino",
    "tvm": "edgekit.backends.tvm",
    "coreml": "edgekit.backends.coreml",
}
DISTRIBUTIONS: dict[Engine, str] = {
    "onnxruntime": "onnxruntime",
    "openvino": "openvino",
    "tvm": "apache-tvm",
    "coreml": "coremltools",
}
# Those whose sessions work with as many threads as they are told to; others have one.
THREADED: tuple[Engine, ...] = ("onnxruntime", "openvino")
EXTRAS: dict[Engine, str] = {"openvino": "openvino", "tvm": "tvm", "coreml": "coreml"}


@dataclass(frozen=True, kw_only=True)
class Source:
    """What a backend compiles.

    name: Model name, safe in a file name and a C identifier.
    fp32_onnx: Fused, simplified FP32 graph with dynamic height and width.
    int8_onnx: The same graph with per-channel QDQ pairs; None where the target is not INT8.
    module: Returns the fused torch network in eval mode; `forward(noisy, sigma)`, or `forward(noisy)` when blind.
    calibration: Noisy pictures with their sigma, as `(noisy (1, c, h, w), sigma)`, h and w multiples of stride.
    """

    name: str
    fp32_onnx: Path
    int8_onnx: Path | None
    module: Callable[[], nn.Module]
    channels: int
    takes_sigma: bool
    stride: int
    calibration: Sequence[tuple[Array, float]] = ()


class Session(Protocol):
    """An opened artifact.

    level: `native` when the target's own engine runs on the target's own kind of processor, `emulated` when its machine
        code runs under an emulator, `reference` when its program is evaluated without its engine. Only `native`
        may be timed.
    """

    level: Level

    def __call__(self, noisy: Array, sigma: float) -> Array:
        """Return the denoised picture, shaped as `noisy` (1, c, h, w)."""
        ...


class Backend(Protocol):
    """What the module behind a door offers."""

    def check(self, target: Target) -> None:
        """Refuse a target that `build` and `open_session` would, whatever the model; nothing is made.

        Raises:
            UnsupportedError: A setting that the engine cannot do.
            InputError: A core that the emulator does not know.
        """
        ...

    def build(self, source: Source, target: Target, out: Path) -> Built:
        """Compile into the folder `out`; raises UnsupportedError for what the engine cannot do."""
        ...

    def open_session(
        self, bundle: Path, built: Built, target: Target, *, threads: int = 1
    ) -> list[tuple[str, Session]]:
        """Open the artifact in every way the target's runner names: (label, session), as ("qemu cortex-a76", s)."""
        ...

    def audit(self, bundle: Path, built: Built, target: Target) -> Audit:
        """Return what the artifact's own file computes in integers on this machine, by the engine's account.

        Raises:
            IncompleteError: The engine gives no account here; then the recorded one has to do.
        """
        ...


class OnnxBackend(Backend, Protocol):
    """A backend that also runs an ONNX file as it is, which the FP32 references need."""

    def open_onnx(self, path: Path, *, threads: int = 1) -> Session:
        """Open an ONNX file in its own precision."""
        ...


def check_local(target: Target) -> None:
    """Refuse another runner than this machine, for an engine that runs here alone: it would not be what ran.

    Raises:
        UnsupportedError: The target names one.
    """
    if target.runner.kind != "local":
        raise UnsupportedError(
            f"target '{target.name}': the engine '{target.engine}' runs on this machine alone, and the runner is "
            f"'{target.runner.kind}'",
            remedy="set 'runner: {kind: local}'",
        )


def load_onnx(engine: Literal["onnxruntime", "openvino"]) -> OnnxBackend:
    """Return an engine that runs ONNX files; raises as `load`."""
    return cast(OnnxBackend, load(engine))


def load(engine: Engine) -> Backend:
    """Return the backend of an engine.

    Raises:
        ToolMissingError: The engine is not installed, or is installed and does not load (exit code 5).
    """
    install = f"pip install 'edgekit[{EXTRAS.get(engine, 'all')}]'"
    try:
        return cast(Backend, importlib.import_module(DOORS[engine]))
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("edgekit"):
            raise
        raise ToolMissingError(
            f"the engine '{engine}' needs the package '{error.name}', which is not installed",
            remedy=f"run: {install}",
        ) from error
    except (ImportError, OSError) as error:
        raise ToolMissingError(
            f"the engine '{engine}' is installed but does not load: {error}",
            remedy=f"reinstall it: pip uninstall --yes {DISTRIBUTIONS[engine]} && {install}",
        ) from error
