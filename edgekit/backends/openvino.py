"""The door to OpenVINO, for Intel and AMD processors, with NNCF for INT8."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Literal
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from edgekit.backends import Built, Source
from edgekit.errors import InputError, IntegrityError, ToolMissingError, UnsupportedError
from edgekit.graph.checks import DENOISED, SIGMA, read_onnx
from edgekit.graph.cost import integer_permille
from edgekit.graph.reference import Reference, agreement_db, feeds, probe
from edgekit.graph.walk import float_additions, float_convolutions
from edgekit.target import Precision, Target

# `import openvino` and `import nncf` report to a server unless the user has opted out; both do without this package.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
import openvino  # noqa: E402
from openvino.passes import ConstantFolding, Manager  # noqa: E402

Array = NDArray[np.float32]
ARTIFACT, WEIGHTS = "model.xml", "model.bin"
# A sound artifact stays far above these; below them a kernel or a range is wrong.
LEAST_AGREEMENT_DB: dict[Precision, float] = {"float32": 80.0, "float16": 50.0, "int8": 25.0}
_CONVOLUTIONS = ("Convolution", "GroupConvolution", "ConvolutionBackpropData", "GroupConvolutionBackpropData")
_INTEGERS = ("i8", "u8")
_CHECK_PICTURES = 4
# What the ONNX reader puts behind the name of a convolution that it splits from its bias.
_SPLIT = "/WithoutBiases"
_COUNTED = re.compile(r"[A-Za-z]+_\d+")


class OpenvinoSession:
    """A model compiled for this machine's CPU; float parts are computed in float32, on machines with AMX too."""

    level: Literal["native"] = "native"

    def __init__(self, path: Path, threads: int) -> None:
        """Read and compile the file; see `open_onnx`."""
        self.compiled = _compile(_read(path), threads)
        self._request = self.compiled.create_infer_request()
        self._takes_sigma = SIGMA in {name for port in self.compiled.inputs for name in port.get_names()}

    def __call__(self, noisy: Array, sigma: float) -> Array:
        """Return the denoised picture, shaped as `noisy` (1, c, h, w)."""
        result = self._request.infer(feeds(noisy, sigma, takes_sigma=self._takes_sigma))
        return np.array(result[DENOISED], np.float32)


def build(source: Source, target: Target, out: Path) -> Built:
    """Write `model.xml` and `model.bin` into the folder `out`; equal sources give equal bytes.

    INT8 is NNCF's, calibrated on the source's pictures: its ranges and corrected biases measured better than the
    QDQ graph's. What the QDQ graph leaves in float is left in float here too.

    Raises:
        InputError: INT8 without a QDQ graph or calibration pictures, or a file that is not ONNX.
        UnsupportedError: OpenVINO does not take an operator, or would compute all of the INT8 in float.
        IntegrityError: The artifact's output is too far from the float graph's.
    """
    model = _read(source.fp32_onnx)
    notes: tuple[str, ...] = ()
    tools = {"openvino": openvino.__version__}
    if target.precision == "int8":
        nncf = _nncf()
        model = _quantized(nncf, model, source, target)
        tools["nncf"] = nncf.__version__
        notes = (_float_note(source),)
    if target.precision == "float16":
        notes = ("Weights are stored as float16; the CPU computes in float32.",)
    out.mkdir(parents=True, exist_ok=True)
    openvino.save_model(model, out / ARTIFACT, compress_to_fp16=target.precision == "float16")
    _strip(out / ARTIFACT, source.fp32_onnx)
    session = open_onnx(out / ARTIFACT, 1)
    permille = integer_macs_permille(session, source.fp32_onnx)
    if target.precision == "int8" and permille == 0:
        raise UnsupportedError(
            f"target '{target.name}': OpenVINO {openvino.__version__} computes no convolution of '{source.name}' "
            "in integers"
        )
    _check_agreement(session, source, target)
    return Built(
        files={"artifact": ARTIFACT, "weights": WEIGHTS},
        precision="int8" if target.precision == "int8" else "float32",
        tools=tools,
        facts={"integer_macs_permille": permille},
        notes=notes,
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


def integer_macs_permille(session: OpenvinoSession, fp32_onnx: Path) -> int:
    """Return the share of multiply-accumulates that the compiled model computes in integers, in thousandths.

    It is read from the runtime graph, where every convolution carries the precision of its kernel and the names of the
    nodes that it was made from. `fp32_onnx` is the graph that the artifact comes from; its nodes are what is counted.
    """
    integer: set[str] = set()
    for node in session.compiled.get_runtime_model().get_ordered_ops():
        info = node.get_rt_info()
        if (
            _text(info, "layerType") in ("Convolution", "Deconvolution")
            and _text(info, "runtimePrecision") in _INTEGERS
        ):
            integer.update(name.removesuffix(_SPLIT) for name in _text(info, "originalLayersNames").split(","))
    return integer_permille(read_onnx(fp32_onnx), frozenset(integer))


def _text(info: openvino.RTMap, key: str) -> str:
    return str(info[key].astype(str)) if key in info else ""


def _read(path: Path) -> openvino.Model:
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        return openvino.Core().read_model(path)
    except RuntimeError as error:
        raise InputError(
            f"{path}: OpenVINO cannot read it ({path.stat().st_size} bytes): {_reason(error)}", remedy="make it again"
        ) from error


def _compile(model: openvino.Model, threads: int) -> openvino.CompiledModel:
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": "1",
        "INFERENCE_NUM_THREADS": str(threads),
        "INFERENCE_PRECISION_HINT": "f32",
    }
    try:
        return openvino.Core().compile_model(model, "CPU", settings)
    except RuntimeError as error:
        raise UnsupportedError(f"OpenVINO's CPU plugin does not take the model: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Return the line of an OpenVINO error that says what is wrong; those before it are its own source lines."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if not line.startswith(("Exception from", "Check '"))), lines[0])


def _nncf() -> ModuleType:
    """Return NNCF, silenced; only compiling INT8 needs it.

    Raises:
        ToolMissingError: It is not installed.
    """
    try:
        nncf = importlib.import_module("nncf")
    except ModuleNotFoundError as error:
        raise ToolMissingError(
            f"INT8 for OpenVINO needs the package '{error.name}', which is not installed",
            remedy="run: pip install 'edgekit[openvino]'",
        ) from error
    nncf.set_log_level(logging.ERROR)
    return nncf


def _quantized(nncf: ModuleType, model: openvino.Model, source: Source, target: Target) -> openvino.Model:
    """Return the model with NNCF's quantizers."""
    if source.int8_onnx is None or not source.calibration:
        missing = "INT8 graph" if source.int8_onnx is None else "calibration pictures"
        raise InputError(f"target '{target.name}' asks for int8, and the model '{source.name}' has no {missing}")
    # The ONNX reader leaves a Reshape between the weights of a depthwise convolution and the convolution. NNCF 3.4 then
    # takes one scale per channel and column, which OpenVINO cannot compute in integers; folded first, it does not.
    folding = Manager()
    folding.register_pass(ConstantFolding())
    folding.run_passes(model)
    calibration = nncf.Dataset(source.calibration, lambda item: feeds(item[0], item[1], takes_sigma=source.takes_sigma))
    with _quiet():
        return nncf.quantize(
            model,
            calibration,
            subset_size=len(source.calibration),
            target_device=nncf.TargetDevice.CPU,
            fast_bias_correction=True,
            ignored_scope=nncf.IgnoredScope(names=_kept_float(model, source.int8_onnx)),
        )


def _kept_float(model: openvino.Model, int8_onnx: Path) -> list[str]:
    """Return the names in `model` of the operators that the QDQ graph leaves in float.

    Raises:
        IntegrityError: The QDQ graph names a convolution that the model does not have.
    """
    placement = read_onnx(int8_onnx)
    kept, additions = set(float_convolutions(placement)), set(float_additions(placement))
    operators = [(o.get_friendly_name(), o.get_type_name()) for o in model.get_ordered_ops()]
    convolutions = {
        alias: o.get_friendly_name()
        for o in model.get_ordered_ops()
        if o.get_type_name() in _CONVOLUTIONS
        for alias in _onnx_names(o)
    }
    if unknown := sorted(kept - set(convolutions)):
        raise IntegrityError(
            f"{int8_onnx}: its convolution '{unknown[0]}' is not in the float graph",
            remedy="quantize the float graph again",
        )
    # The last operator is called as the output, and carries the picture itself: 8 bits there would cap the quality.
    additions.add(DENOISED)
    return [convolutions[name] for name in sorted(kept)] + [
        name for name, kind in operators if kind == "Subtract" or (kind == "Add" and name in additions)
    ]


def _onnx_names(convolution: openvino.Node) -> set[str]:
    """Return the names under which the ONNX file may know a convolution; its bias carries the name in some cases."""
    behind = {port.get_node().get_friendly_name() for port in convolution.output(0).get_target_inputs()}
    own = convolution.get_friendly_name().removesuffix(_SPLIT)
    return {own, *behind}


def _float_note(source: Source) -> str:
    placement = read_onnx(source.int8_onnx) if source.int8_onnx else None
    names = ", ".join(float_convolutions(placement)) if placement is not None else ""
    return f"Left in float: {names or 'no convolution'}."


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Swallow NNCF's progress bars; its errors are exceptions."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


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


def _check_agreement(session: OpenvinoSession, source: Source, target: Target) -> None:
    """Compare the artifact with the float graph in ONNX Runtime on calibration pictures.

    Raises:
        IntegrityError: They are further apart than the precision explains.
    """
    reference = Reference(read_onnx(source.fp32_onnx))
    pictures = source.calibration[:_CHECK_PICTURES] or [(probe(64, 96, source.channels, seed=0), 25 / 255)]
    for noisy, sigma in pictures:
        agreement = agreement_db(session(noisy, sigma), reference(noisy, sigma))
        if not agreement >= LEAST_AGREEMENT_DB[target.precision]:
            raise IntegrityError(
                f"target '{target.name}': the artifact is {agreement:.1f} dB from the float graph; "
                f"{target.precision} is sound from {LEAST_AGREEMENT_DB[target.precision]:g} dB on"
            )
