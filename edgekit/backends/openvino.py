"""The door to OpenVINO, for Intel and AMD processors."""

from __future__ import annotations

import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from edgekit.backends import Source, check_local, openvino_graph
from edgekit.backends.weight_bits import NOTES, weight_bits
from edgekit.bundle import Built
from edgekit.errors import InputError, IntegrityError, UnsupportedError, is_out_of_memory
from edgekit.graph.checks import DENOISED, SIGMA, read_onnx
from edgekit.graph.reference import Reference, agreement_db, feeds, probe
from edgekit.graph.walk import float_convolutions
from edgekit.measure import host
from edgekit.report import Audit
from edgekit.target import Precision, Target

# `import openvino` reports to a server unless the user has opted out; it does without this package.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
import openvino  # noqa: E402

from edgekit.backends import openvino_audit  # noqa: E402

Array = NDArray[np.float32]
ARTIFACT, WEIGHTS = "model.xml", "model.bin"
# A sound artifact stays far above these; below them a kernel or a range is wrong.
LEAST_AGREEMENT_DB: dict[Precision, float] = {"float32": 80.0, "float16": 50.0, "int8": 25.0}
# From the INT8 graph as it says, or as far as that is from the float graph; 51 to 62 dB for the students that ship,
# whose roundings fall otherwise here and there.
LEAST_WITH_INT8_DB = 40.0
_CHECK_PICTURES = 4
# Of its errors: they say where in its own source, and through which call, an error came.
_SOURCE_LINES = ("Exception from", "Check '", "FrontEnd API failed")
_COUNTED = re.compile(r"[A-Za-z]+_\d+")


class OpenvinoSession:
    """A model compiled for this machine's CPU; float parts are computed in float32, on machines with AMX too."""

    level: Literal["native"] = "native"

    def __init__(self, path: Path, threads: int) -> None:
        """Read and compile the file; see `open_onnx`."""
        self._path, self.compiled = path, _compile(_read(path), threads)
        self._request = self.compiled.create_infer_request()
        self._takes_sigma = SIGMA in {name for port in self.compiled.inputs for name in port.get_names()}

    def __call__(self, noisy: Array, sigma: float) -> Array:
        """Return the denoised picture, shaped as `noisy` (1, c, h, w); InputError where the file does not take it."""
        try:
            result = self._request.infer(feeds(noisy, sigma, takes_sigma=self._takes_sigma))
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            raise self._refused(noisy, _reason(error)) from error
        # Sums of maps that do not fit are no error there.
        if result[DENOISED].shape != noisy.shape:
            raise self._refused(noisy, f"the result has another shape, {result[DENOISED].shape}")
        return np.array(result[DENOISED], np.float32)

    def _refused(self, noisy: Array, why: str) -> InputError:
        height, width = noisy.shape[2:]
        return InputError(
            f"{self._path}: OpenVINO cannot run it on a picture of {width}x{height}: {why}",
            remedy="give a picture whose sides it takes, or export it for any",
        )


def check(target: Target) -> None:
    """Refuse another runner than this machine; OpenVINO takes each precision and shape. Raises as the protocol says."""
    check_local(target)


def build(source: Source, target: Target, out: Path) -> Built:
    """Write `model.xml` and `model.bin` into the folder `out`; equal sources give equal bytes.

    INT8 is the QDQ graph, whose pairs OpenVINO fuses into integer kernels; in the placement for OpenVINO that is as
    fast as what NNCF makes of the float graph, and loses less (docs/int8-tried.md).

    Raises:
        InputError: INT8 without a QDQ graph, or a file that is not ONNX.
        UnsupportedError: OpenVINO does not take an operator, or would compute all of the INT8 in float.
        IntegrityError: The artifact's output is too far from the float or the INT8 graph's.
    """
    notes: tuple[str, ...] = ()
    bits = None
    model = _read(source.fp32_onnx)
    if target.precision == "int8":
        if source.int8_onnx is None:
            raise InputError(f"target '{target.name}' asks for int8, and the model '{source.name}' has no INT8 graph")
        model = _read(source.int8_onnx)
        bits = weight_bits(source.int8_onnx)
        notes = (_float_note(source.int8_onnx), *([NOTES[bits]] if bits else []))
    if target.precision == "float16":
        notes = ("Weights are stored as float16; the CPU computes in float32.",)
    out.mkdir(parents=True, exist_ok=True)
    openvino.save_model(model, out / ARTIFACT, compress_to_fp16=target.precision == "float16")
    _strip(out / ARTIFACT, source.int8_onnx if target.precision == "int8" and source.int8_onnx else source.fp32_onnx)
    session = open_onnx(out / ARTIFACT, 1)
    found = openvino_audit.audit(_read(out / ARTIFACT), session.compiled)
    if target.precision == "int8" and found.integer_macs_permille == 0:
        raise UnsupportedError(
            f"target '{target.name}': OpenVINO {openvino.__version__} computes no convolution of '{source.name}' "
            "in integers"
        )
    _check_agreement(session, source, target, saturates=bits == 8 and host.sums_saturate())
    return Built(
        files={"artifact": ARTIFACT, "weights": WEIGHTS},
        precision="int8" if target.precision == "int8" else "float32",
        tools={"openvino": openvino.__version__},
        facts={"integer_macs_permille": found.integer_macs_permille} | ({"weight_bits": bits} if bits else {}),
        notes=notes,
        audit=found,
    )


def open_session(bundle: Path, built: Built, target: Target, *, threads: int = 1) -> list[tuple[str, OpenvinoSession]]:
    """Return the artifact, compiled for this machine's CPU.

    Raises:
        InputError: A file of the artifact is missing or damaged.
    """
    if not (bundle / built.files["weights"]).is_file():
        raise InputError(f"{bundle / built.files['weights']}: no such file", remedy="compile the target again")
    return [("openvino", open_onnx(bundle / built.files["artifact"], threads))]


def open_onnx(path: Path, threads: int) -> OpenvinoSession:
    """Return any denoiser, ONNX or OpenVINO's own format, compiled for `threads` threads and low latency.

    Raises:
        InputError: The file is missing or cannot be read.
        UnsupportedError: An operator that the CPU does not take.
    """
    return OpenvinoSession(path, threads)


def audit(bundle: Path, built: Built, target: Target) -> Audit:
    """Return what OpenVINO computes in integers here, of the artifact compiled as `open_session` does it.

    Raises:
        InputError: A file of the artifact is missing or damaged.
    """
    ((_, session),) = open_session(bundle, built, target)
    return openvino_audit.audit(_read(bundle / built.files["artifact"]), session.compiled)


def node_times_us(path: Path, noisy: Array, *, runs: int = 10) -> dict[str, int]:
    """Return node of an ONNX file -> its shortest time in microseconds for a picture (1, c, h, w), on one thread.

    A node that was fused counts with the one that it was fused into, as additions do with the convolution before them.

    Raises:
        InputError: The file is missing or cannot be read.
    """
    compiled = _compile(_read(path), 1, profiled=True)
    request = compiled.create_infer_request()
    takes_sigma = SIGMA in {name for port in compiled.inputs for name in port.get_names()}
    shortest: dict[str, int] = {}
    for _ in range(runs):
        request.infer(feeds(noisy, 25 / 255, takes_sigma=takes_sigma))
        for node in request.profiling_info:
            name = node.node_name.removesuffix(openvino_audit.SPLIT)
            if time_us := round(node.real_time.total_seconds() * 1e6):
                shortest[name] = min(time_us, shortest.get(name, time_us))
    return shortest


def _core() -> openvino.Core:
    """Return a new core, whose CPU plugin was loaded by a thread that is no more.

    The plugin puts a stack for signals in place of its thread's, and the one before back when it goes. Where the first
    of two goes first, that is memory which is no longer there: Ctrl-C then ends in a segmentation fault. One core for
    all is no way out: after an error of a network that has gone, the next one crashes (docs/int8-inside.md).
    """
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(_loaded_core).result()


def _loaded_core() -> openvino.Core:
    core = openvino.Core()
    core.get_property("CPU", "FULL_DEVICE_NAME")
    return core


def _read(path: Path) -> openvino.Model:
    """Return the model in a file; one that is ONNX as OpenVINO's kernels want it, which computes the same."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        if path.suffix != ".onnx":
            return openvino.Core().read_model(path)
        return openvino.Core().read_model(openvino_graph.rewritten(read_onnx(path)).SerializeToString(), b"")
    except RuntimeError as error:
        raise InputError(
            f"{path}: OpenVINO cannot read it ({path.stat().st_size} bytes): {_reason(error)}", remedy="make it again"
        ) from error


def _compile(model: openvino.Model, threads: int, *, profiled: bool = False) -> openvino.CompiledModel:
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": "1",
        "INFERENCE_NUM_THREADS": str(threads),
        "INFERENCE_PRECISION_HINT": "f32",
        "PERF_COUNT": "YES" if profiled else "NO",
    }
    try:
        return _core().compile_model(model, "CPU", settings)
    except RuntimeError as error:
        raise UnsupportedError(f"OpenVINO's CPU plugin does not take the model: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Return the line of an OpenVINO error that says what is wrong; those before it are its own source lines."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if not line.startswith(_SOURCE_LINES)), lines[0])


def _float_note(int8_onnx: Path) -> str:
    names = ", ".join(float_convolutions(read_onnx(int8_onnx)))
    return f"Left in float: {names or 'no convolution'}."


def _strip(xml: Path, onnx_file: Path) -> None:
    """Take out of the file what does not compute and differs between equal builds.

    These are the notes on versions and settings, and the names that OpenVINO counts up within one process; they become
    the layer's type and place. Names that come from the ONNX file stay.
    """
    graph = read_onnx(onnx_file).graph
    given = {node.name for node in graph.node} | {tensor.name for tensor in graph.initializer}
    tree = ElementTree.parse(xml)
    root = tree.getroot()
    for notes in root.findall("rt_info"):
        root.remove(notes)
    for layer in root.iter("layer"):
        if _COUNTED.fullmatch(layer.attrib["name"]) and layer.attrib["name"] not in given:
            layer.attrib["name"] = f"{layer.attrib['type']}_{layer.attrib['id']}"
    tree.write(xml, encoding="utf-8", xml_declaration=True)


def _check_agreement(session: OpenvinoSession, source: Source, target: Target, *, saturates: bool) -> None:
    """Compare the artifact, on calibration pictures, with the graphs that it was made from, in ONNX Runtime.

    Raises:
        IntegrityError: It is further from the float graph than the precision explains; or from the INT8 graph, where
            its sums do not saturate.
    """
    run_float, run_int8 = Reference(read_onnx(source.fp32_onnx)), None
    if target.precision == "int8" and source.int8_onnx is not None and not saturates:
        run_int8 = Reference(read_onnx(source.int8_onnx), exact=True)
    pictures = source.calibration[:_CHECK_PICTURES] or [(probe(64, 96, source.channels, seed=0), 25 / 255)]
    for noisy, sigma in pictures:
        denoised, wanted = session(noisy, sigma), run_float(noisy, sigma)
        bounds = [("the float graph", wanted, LEAST_AGREEMENT_DB[target.precision])]
        if run_int8 is not None:
            rounded = run_int8(noisy, sigma)
            # Roundings that fall otherwise add no more than all of them have added already.
            bounds.append(("its INT8 graph", rounded, min(LEAST_WITH_INT8_DB, agreement_db(rounded, wanted))))
        for named, expected, least in bounds:
            agreement = agreement_db(denoised, expected)
            if not agreement >= least:
                raise IntegrityError(
                    f"target '{target.name}': the artifact is {agreement:.1f} dB from {named}; "
                    f"{target.precision} is sound from {least:.3g} dB on",
                    remedy="report it to edgekit with the network",
                )
