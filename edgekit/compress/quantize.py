"""Static INT8: an ONNX graph with quantize-dequantize (QDQ) pairs, which engines turn into integer operators."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper
from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType
from onnxruntime.quantization import quantize_static as ort_quantize_static

from edgekit.compress.export import strip, write
from edgekit.errors import InputError, IntegrityError
from edgekit.graph.checks import DENOISED, NOISY, Interface, interface, is_quantized, load_onnx
from edgekit.graph.cost import integer_permille
from edgekit.graph.reference import Reference, agreement_db, feeds
from edgekit.graph.walk import (
    derived_from,
    first_convolutions,
    float_convolutions,
    last_convolutions,
    producers,
)
from edgekit.recipe import Quantization

Array = NDArray[np.float32]
Calibration = Sequence[tuple[Array, float]]

LEAST_PICTURES = 8
# A sound INT8 denoiser stays above 40 dB; below this the ranges or the placement are wrong.
LEAST_AGREEMENT_DB = 25.0
_METHODS = {
    "minmax": CalibrationMethod.MinMax,
    "percentile": CalibrationMethod.Percentile,
    "entropy": CalibrationMethod.Entropy,
}
_PERCENTILE = 99.99


@dataclass(frozen=True, kw_only=True)
class QuantizationReport:
    """What was done.

    onnx: The QDQ graph.
    integer_nodes: Names of the convolutions that compute in integers.
    float_nodes: Names of the convolutions that were left in float.
    integer_macs_permille: Share of the multiply-accumulates that are integers, in thousandths.
    calibration_pictures: Pictures that the ranges were taken from.
    agreement_millidb: PSNR of the INT8 graph's output against the float graph's on the calibration pictures, in
        thousandths of a dB: how far the two are apart, not how good either is.
    """

    onnx: Path
    integer_nodes: tuple[str, ...]
    float_nodes: tuple[str, ...]
    integer_macs_permille: int
    calibration_pictures: int
    agreement_millidb: int


def quantize_static(fp32: Path, calibration: Calibration, out: Path, settings: Quantization) -> QuantizationReport:
    """Return the report on `out`, now the graph with QDQ pairs; equal inputs give equal bytes.

    Weights are symmetric int8 per output channel, activations uint8 per tensor, with the ranges that noisy pictures
    produce. Convolutions are quantized; transposed ones are not, since ONNX Runtime has no integer kernel for them.
    Where an addition stays in float it reads the float tensor, not the one that was rounded for the convolution:

    ```
    x ─ Q ─ DQ ┬ conv ─ … ─ Q ─ DQ ─ Add        x ┬ Q ─ DQ ─ conv ─ … ─ Q ─ DQ ─ Add
               └─────────────────────┘     ->     └──────────────────────────────┘
    ```
    so rounding errors do not pile up along the residual trunk. The last subtraction, which carries the picture itself,
    and the addition of the noise level are always float.

    Args:
        fp32: Fused and simplified float graph.
        calibration: Noisy pictures (1, c, h, w) with their sigma; h and w multiples of the stride.
        out: Where the file goes.
        settings: The recipe's; `keep_float` names `head`, `tail` and `skip` (all additions of skips and residuals).

    Raises:
        InputError: The graph is quantized already, has no convolution, or has NaN in its weights; or there are too few
            calibration pictures, or one is constant, not finite or of the wrong shape.
        IntegrityError: The quantized graph's output is further than 25 dB from the float graph's.
    """
    model = load_onnx(fp32)
    face = interface(model, fp32)
    _check_graph(model, fp32)
    pictures = _check_calibration(calibration, settings.calibration_pictures, face)
    float_nodes = _kept_float(model, frozenset[str](settings.keep_float))
    quantized = _insert_qdq(model, pictures, face, settings.method, float_nodes)
    _read_float(quantized, frozenset(float_nodes))
    strip(quantized)
    left = float_convolutions(quantized)
    integer = tuple(n.name for n in quantized.graph.node if n.op_type == "Conv" and n.name not in left)
    if not integer:
        raise InputError(
            f"{fp32}: no convolution took INT8; left in float: {', '.join(left) or 'none'}",
            remedy="take names out of quantization.keep_float",
        )
    agreement = _agreement(model, quantized, pictures)
    if not agreement >= LEAST_AGREEMENT_DB:
        raise IntegrityError(
            f"{fp32}: the INT8 graph is {agreement:.1f} dB from the float graph on the calibration pictures; "
            f"at least {LEAST_AGREEMENT_DB:g} dB is sound",
            remedy="calibrate on noisy pictures like those the network was trained on, with quantization.method=minmax",
        )
    write(quantized, out)
    return QuantizationReport(
        onnx=out,
        integer_nodes=integer,
        float_nodes=left,
        integer_macs_permille=integer_permille(quantized, frozenset(integer)),
        calibration_pictures=len(pictures),
        agreement_millidb=min(round(1000 * agreement), 999_999) if agreement < 999 else 999_999,
    )


class _Pictures:
    """The calibration pictures as ONNX Runtime reads them, one at a time to bound the memory."""

    def __init__(self, pictures: Calibration, face: Interface) -> None:
        self._pictures, self._face = pictures, face
        self._next, self._end = 0, len(pictures)

    def __len__(self) -> int:
        return len(self._pictures)

    def set_range(self, start_index: int, end_index: int) -> None:
        """Give the pictures from `start_index` to before `end_index` next."""
        self._next, self._end = start_index, end_index

    def get_next(self) -> dict[str, Array] | None:
        """Return the next picture's inputs; None when there is no more."""
        if self._next >= self._end:
            return None
        noisy, sigma = self._pictures[self._next]
        self._next += 1
        return feeds(noisy, sigma, takes_sigma=self._face.takes_sigma)


def _check_graph(model: onnx.ModelProto, path: Path) -> None:
    if is_quantized(model):
        raise InputError(f"{path}: is quantized already", remedy="give the float graph that it was made from")
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.dtype.kind == "f" and (bad := int(np.count_nonzero(~np.isfinite(values)))):
            raise InputError(
                f"{path}: weight '{tensor.name}' has {bad} of {values.size} values that are NaN or infinite",
                remedy="train again from a checkpoint before the loss became NaN",
            )


def _check_calibration(calibration: Calibration, wanted: int, face: Interface) -> Calibration:
    """Return the pictures to calibrate on, the first `wanted`."""
    if len(calibration) < max(LEAST_PICTURES, wanted):
        raise InputError(
            f"{len(calibration)} calibration pictures, expected {max(LEAST_PICTURES, wanted)}",
            remedy=f"give more pictures, or lower quantization.calibration_pictures (at least {LEAST_PICTURES})",
        )
    for index, (noisy, sigma) in enumerate(calibration[:wanted]):
        if noisy.dtype != np.float32 or noisy.ndim != 4 or noisy.shape[:2] != (1, face.channels):
            raise InputError(
                f"calibration picture {index} is {noisy.dtype} {noisy.shape}, "
                f"expected float32 (1, {face.channels}, h, w)"
            )
        if not np.isfinite(noisy).all() or not np.isfinite(sigma):
            raise InputError(f"calibration picture {index} (sigma {sigma:g}) has values that are NaN or infinite")
        if float(noisy.max()) == float(noisy.min()):
            raise InputError(
                f"calibration picture {index} is constant: every pixel is {float(noisy.max()):g}",
                remedy="calibrate on photographs with noise added",
            )
    return calibration[:wanted]


def _kept_float(model: onnx.ModelProto, parts: frozenset[str]) -> list[str]:
    """Return the names of the nodes that stay in float."""
    kept: list[str] = []
    if "head" in parts:
        kept += first_convolutions(model, NOISY)
    if "tail" in parts:
        kept += last_convolutions(model, DENOISED)
    # An operand that the picture has no part in is the noise level, whose range is far from the features'; the picture
    # itself must not be rounded on its way to the output.
    features = derived_from(model, NOISY)
    for node in model.graph.node:
        if node.op_type == "Add" and ("skip" in parts or NOISY in node.input or not features.issuperset(node.input)):
            kept.append(node.name)
    return kept


def _insert_qdq(
    model: onnx.ModelProto, pictures: Calibration, face: Interface, method: str, float_nodes: Sequence[str]
) -> onnx.ModelProto:
    """Return the graph that ONNX Runtime's quantizer makes."""
    source = onnx.ModelProto()
    source.CopyFrom(model)
    # The quantizer asks for its own pre-processing unless it finds this mark; simplify has done that work.
    mark = source.metadata_props.add()
    mark.key, mark.value = "onnx.quant.pre_process", "onnxruntime.quant"
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        file = Path(folder, "quantized.onnx")
        ort_quantize_static(
            source,
            file,
            _Pictures(pictures, face),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["Conv", "Relu", "Add"],
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=list(float_nodes),
            calibrate_method=_METHODS[method],
            extra_options={"WeightSymmetric": True, "CalibStridedMinMax": 1, "CalibPercentile": _PERCENTILE},
        )
        return onnx.ModelProto.FromString(file.read_bytes())


def _read_float(model: onnx.ModelProto, float_nodes: frozenset[str]) -> None:
    """Let every float node read the float tensor where one exists, and drop the QDQ pairs that nothing reads then.

    The output of an integer convolution, or addition, exists as integers only, so its readers keep the pair.
    """
    made_by = producers(model)
    integer = {
        n.name
        for n in model.graph.node
        if n.op_type in ("Conv", "Add") and n.name not in float_nodes and _operands_dequantized(n, made_by)
    }
    for node in model.graph.node:
        if node.name in integer or node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            continue
        for index, name in enumerate(node.input):
            raw = _before_pair(name, made_by)
            if raw is not None and not _is_integer(made_by.get(raw), integer, made_by):
                node.input[index] = raw
    _drop_unread(model)


def _operands_dequantized(node: onnx.NodeProto, made_by: dict[str, onnx.NodeProto]) -> bool:
    return all(name in made_by and made_by[name].op_type == "DequantizeLinear" for name in node.input[:2])


def _before_pair(name: str, made_by: dict[str, onnx.NodeProto]) -> str | None:
    """Return the tensor that a QDQ pair ending in `name` rounds; None where there is no such pair."""
    dequantize = made_by.get(name)
    if dequantize is None or dequantize.op_type != "DequantizeLinear":
        return None
    quantize = made_by.get(dequantize.input[0])
    return quantize.input[0] if quantize is not None and quantize.op_type == "QuantizeLinear" else None


def _is_integer(node: onnx.NodeProto | None, integer: set[str], made_by: dict[str, onnx.NodeProto]) -> bool:
    """Return whether a node, or the node before its ReLU, is one that engines compute in integers."""
    if node is not None and node.op_type == "Relu":
        node = made_by.get(node.input[0])
    return node is not None and node.name in integer


def _drop_unread(model: onnx.ModelProto) -> None:
    """Remove the nodes and initializers that nothing reads any more."""
    wanted = {output.name for output in model.graph.output}
    kept: list[onnx.NodeProto] = []
    for node in reversed(model.graph.node):
        if not wanted.isdisjoint(node.output):
            wanted.update(node.input)
            kept.append(node)
    stored = [tensor for tensor in model.graph.initializer if tensor.name in wanted]
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(reversed(kept))
    model.graph.initializer.extend(stored)


def _agreement(before: onnx.ModelProto, after: onnx.ModelProto, pictures: Calibration) -> float:
    """Return the mean PSNR in dB of one graph's output against the other's."""
    run_before, run_after = Reference(before), Reference(after)
    return float(np.mean([agreement_db(run_after(n, s), run_before(n, s)) for n, s in pictures]))
