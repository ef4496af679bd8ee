"""The door to ONNX Runtime: the artifact is the ONNX file itself, run on the CPU."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from edgekit.backends import Source, check_local, onnxruntime_audit, onnxruntime_graph, onnxruntime_times
from edgekit.backends.weight_bits import NOTES, weight_bits
from edgekit.bundle import Built
from edgekit.errors import InputError, IntegrityError, UnsupportedError
from edgekit.graph.checks import DENOISED, SIGMA, read_onnx
from edgekit.graph.reference import Reference, agreement_db, feeds, probe, runtime_errors, session_options
from edgekit.report import Audit
from edgekit.target import Precision, Target

Array = NDArray[np.float32]
FILES: dict[Precision, str] = {"float32": "model.fp32.onnx", "int8": "model.int8.onnx"}
# What is rewritten rounds to the same integers; a channel in another's place is far below this.
LEAST_AGREEMENT_DB = 60.0
_CHECKED = ((64, 96), (96, 64))


class OnnxSession:
    """An ONNX file opened in ONNX Runtime's CPU provider."""

    level: Literal["native"] = "native"

    def __init__(self, path: Path, threads: int) -> None:
        """Open the file; see `open_onnx`."""
        self._path, self._session = path, _inference_session(path, session_options(threads))
        self._takes_sigma = SIGMA in {i.name for i in self._session.get_inputs()}

    def __call__(self, noisy: Array, sigma: float) -> Array:
        """Return the denoised picture, shaped as `noisy` (1, c, h, w); InputError where the file does not take it."""
        height, width = noisy.shape[2:]
        what = f"{self._path}: ONNX Runtime cannot run it on a picture of {width}x{height}"
        with runtime_errors(what, "give a picture whose sides it takes, or export it for any"):
            (denoised,) = self._session.run([DENOISED], feeds(noisy, sigma, takes_sigma=self._takes_sigma))
        return np.asarray(denoised, np.float32)


def check(target: Target) -> None:
    """Refuse float16, and another runner than this machine; raises as the protocol says."""
    check_local(target)
    if target.precision not in FILES:
        raise UnsupportedError(
            f"target '{target.name}': ONNX Runtime's CPU provider has no {target.precision} convolutions",
            remedy="set its precision to int8 or float32",
        )


def build(source: Source, target: Target, out: Path) -> Built:
    """Write the ONNX files into the folder `out`; the artifact is the one of the target's precision.

    The INT8 graph is written as ONNX Runtime computes it quickest (`onnxruntime_graph`), the float one as it is.

    Raises:
        UnsupportedError: The target asks for float16, or for INT8 that ONNX Runtime would compute in float.
        InputError: There is no INT8 graph though the target asks for one, or a file is not ONNX.
        IntegrityError: The INT8 graph as it is written computes something else.
    """
    check(target)
    if target.precision == "int8" and source.int8_onnx is None:
        raise InputError(f"target '{target.name}' asks for int8, and the model '{source.name}' has no INT8 graph")
    out.mkdir(parents=True, exist_ok=True)
    files = {"fp32": FILES["float32"]} | ({"int8": FILES["int8"]} if source.int8_onnx else {})
    shutil.copyfile(source.fp32_onnx, out / FILES["float32"])
    if source.int8_onnx is not None:
        given = read_onnx(source.int8_onnx)
        quick = onnxruntime_graph.rewritten(given)
        _check_same(quick, given, source)
        (out / FILES["int8"]).write_bytes(quick.SerializeToString(deterministic=True))
    artifact = out / FILES[target.precision]
    bits = weight_bits(source.int8_onnx) if target.precision == "int8" and source.int8_onnx else None
    found = audit_file(artifact)
    if target.precision == "int8" and found.integer_macs_permille == 0:
        raise UnsupportedError(
            f"{artifact}: ONNX Runtime {onnxruntime.__version__} computes none of its convolutions in integers",
            remedy="quantize it with edgekit, whose QDQ placement ONNX Runtime fuses",
        )
    return Built(
        files={**files, "artifact": artifact.name},
        precision=target.precision,
        tools={"onnxruntime": onnxruntime.__version__, "onnx": onnx.__version__},
        facts={"integer_macs_permille": found.integer_macs_permille} | ({"weight_bits": bits} if bits else {}),
        notes=(NOTES[bits],) if bits else (),
        audit=found,
    )


def _check_same(quick: onnx.ModelProto, given: onnx.ModelProto, source: Source) -> None:
    """Raise IntegrityError where a rewritten graph computes something else than the one that it was made from."""
    # As the graphs say: where 8-bit sums saturate, another order of channels may saturate others.
    run_quick, run_given = Reference(quick, exact=True), Reference(given, exact=True)
    for seed, (height, width) in enumerate(_CHECKED):
        noisy = probe(height, width, source.channels, seed=seed)
        agreement = agreement_db(run_quick(noisy, 25 / 255), run_given(noisy, 25 / 255))
        if not agreement >= LEAST_AGREEMENT_DB:
            raise IntegrityError(
                f"{source.int8_onnx}: as ONNX Runtime computes it quickest it is {agreement:.1f} dB from what it was; "
                f"at least {LEAST_AGREEMENT_DB:g} dB is sound",
                remedy="report it to edgekit with the file",
            )


def open_session(bundle: Path, built: Built, target: Target, *, threads: int = 1) -> list[tuple[str, OnnxSession]]:
    """Return the artifact, opened on this machine's CPU.

    Raises:
        InputError: The artifact is missing or is not ONNX.
    """
    return [("onnxruntime", open_onnx(bundle / built.files["artifact"], threads))]


def open_onnx(path: Path, threads: int) -> OnnxSession:
    """Return any ONNX denoiser, opened with `threads` threads inside an operator and one operator at a time.

    Raises:
        InputError: The file is missing or is not ONNX.
        UnsupportedError: An operator that ONNX Runtime does not have.
    """
    return OnnxSession(path, threads)


def audit(bundle: Path, built: Built, target: Target) -> Audit:
    """Return what ONNX Runtime computes in integers here; raises as `audit_file`."""
    return audit_file(bundle / built.files["artifact"])


def audit_file(path: Path) -> Audit:
    """Return what ONNX Runtime computes of an ONNX file in integers on this machine, from the graph that it optimizes.

    Raises:
        InputError: The file is missing or is not ONNX.
    """
    return onnxruntime_audit.audit(read_onnx(path), lambda options: _inference_session(path, options))


def node_times_us(path: Path, noisy: Array, *, runs: int = 10) -> dict[str, int]:
    """Return node of an ONNX file -> its shortest time in microseconds for a picture (1, c, h, w), on one thread.

    Raises:
        InputError: The file is missing or is not ONNX.
    """
    return onnxruntime_times.node_times_us(
        read_onnx(path), lambda options: _inference_session(path, options), noisy, runs
    )


def _inference_session(path: Path, options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
    """Return the file opened in ONNX Runtime, its errors told in edgekit's."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    what = f"{path}: ONNX Runtime cannot load it ({path.stat().st_size} bytes)"
    with runtime_errors(what, "export or copy it again"):
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
