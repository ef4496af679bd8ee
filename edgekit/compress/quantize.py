"""INT8: ONNX graphs with quantize-dequantize (QDQ) pairs, which engines turn into integer operators."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnxruntime.quantization import QuantType
from onnxruntime.quantization import quantize_dynamic as ort_quantize_dynamic

from edgekit.compress import placement as placements
from edgekit.compress.basis import other_bases
from edgekit.compress.equalize import equalize
from edgekit.compress.export import strip, write
from edgekit.compress.placement import Placement, Range
from edgekit.compress.ranges import Calibration, observe
from edgekit.errors import InputError, IntegrityError, UnsupportedError
from edgekit.graph.checks import DENOISED, LEAST_OPSET, NOISY, Interface, interface, load_float_onnx
from edgekit.graph.cost import integer_permille
from edgekit.graph.reference import Reference, agreement_db
from edgekit.graph.walk import (
    CONVOLUTIONS,
    constants_stored,
    consumers,
    copied,
    first_convolutions,
    float_convolutions,
    free_name,
    initializers,
    integer_convolutions,
    is_noise_level,
    last_convolutions,
    names,
)
from edgekit.measure import host
from edgekit.recipe import LEAST_CALIBRATION_PICTURES, Quantization

# A sound INT8 denoiser stays above 40 dB; below this the ranges or the placement are wrong.
LEAST_AGREEMENT_DB = 25.0
_FULL, _REDUCED = 127, 63


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What a placement is written from.

    model: The float graph, its channels equalized and its residual trunks in another basis where that was asked for.
    ranges: Tensor -> lowest and highest value.
    weight_limit: Largest magnitude of a quantized weight.
    exact: Whether the engine computes what the graph says whatever this processor does, as `Reference` has it.
    pictures: The calibration pictures with their sigma.
    """

    model: onnx.ModelProto
    ranges: Mapping[str, Range]
    weight_limit: int
    exact: bool
    pictures: Calibration


@dataclass(frozen=True, kw_only=True)
class QuantizationReport:
    """What was done.

    onnx: The QDQ graph.
    integer_nodes: Names of the convolutions that compute in integers.
    float_nodes: Names of the convolutions that were left in float.
    integer_macs_permille: Share of the multiply-accumulates that are integers, in thousandths, rounded down.
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


def quantize_static(
    fp32: Path,
    calibration: Calibration,
    out: Path,
    settings: Quantization,
    *,
    placement: Placement = placements.PLACEMENTS["onnxruntime"],
) -> QuantizationReport:
    """Return the report on `out`, now the graph with QDQ pairs; equal inputs give equal bytes.

    Weights are symmetric int8 per output channel, activations 8 bits per tensor, with the ranges that noisy pictures
    produce; where the pairs stand is the placement's. Convolutions are quantized; transposed ones are not, since ONNX
    Runtime has no integer kernel for them.

    Args:
        fp32: Fused and simplified float graph.
        calibration: Noisy pictures (1, c, h, w) with their sigma; h and w multiples of the stride.
        out: Where the file goes.
        settings: The recipe's; `keep_float` names `head`, `tail` and `skip` (all additions of skips and residuals).
        placement: Where the engine wants its quantizers.

    Raises:
        InputError: The graph is quantized already, has no convolution, or has NaN in its weights; or there are too few
            calibration pictures, or one is constant, not finite or of the wrong shape.
        UnsupportedError: The graph's opset is too old, or a convolution computes its weights.
        IntegrityError: The quantized graph's output is further than 25 dB from the float graph's.
    """
    prepared = prepare(fp32, calibration, settings, placement)
    return written(placed(prepared, placement, settings), prepared, fp32, out)


def placed(prepared: Prepared, placement: Placement, settings: Quantization) -> onnx.ModelProto:
    """Return the QDQ graph of a prepared one, with the layers in float that the settings keep there."""
    quantized = placements.place(prepared.model, prepared.ranges, placement, weight_limit=prepared.weight_limit)
    kept = kept_float(prepared.model, frozenset[str](settings.keep_float))
    return placements.release(quantized, kept, placement, prepared.model)


def prepare(
    fp32: Path,
    calibration: Calibration,
    settings: Quantization,
    placement: Placement = placements.PLACEMENTS["onnxruntime"],
) -> Prepared:
    """Return what a placement is written from, in the basis that loses least there; raises as `quantize_static`."""
    model = load_float_onnx(fp32)
    face = interface(model, fp32)
    if face.opset < LEAST_OPSET:
        raise UnsupportedError(
            f"{fp32}: is of opset {face.opset}; INT8 needs {LEAST_OPSET} or more", remedy="simplify it first"
        )
    model = _with_own_weights(constants_stored(model))
    _check_weights(model, fp32)
    pictures = _check_calibration(calibration, settings.calibration_pictures, face)
    if settings.equalize:
        model = equalize(model, observe(model, pictures, "minmax").peaks)
    reduced = settings.reduce_range == "always" or (settings.reduce_range == "auto" and narrowed(placement))
    others = other_bases(model, pictures) if settings.change_basis and placement.trunk == "int8" else ()
    prepared = [
        Prepared(
            model=basis,
            ranges=observe(basis, pictures, settings.method).ranges,
            weight_limit=_REDUCED if reduced else _FULL,
            exact=not placement.saturates,
            pictures=pictures,
        )
        for basis in (model, *others)
    ]

    def agreement(one: Prepared) -> float:
        placed = placements.place(one.model, one.ranges, placement, weight_limit=one.weight_limit)
        return _agreement(model, placed, one)

    return max(prepared, key=agreement) if others else prepared[0]


def _check_weights(model: onnx.ModelProto, path: Path) -> None:
    """Raise UnsupportedError where a convolution's weights are made while the graph runs."""
    stored = initializers(model)
    for node in model.graph.node:
        if node.op_type in CONVOLUTIONS and any(name and name not in stored for name in node.input[1:]):
            raise UnsupportedError(
                f"{path}: '{node.name}' ({node.op_type}) computes its weights, and INT8 needs them beforehand",
                remedy="set the target's precision to float32, or export weights that are constant",
            )


def _with_own_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the graph in which no convolution, or multiplication of the noise level, shares its constants.

    Each is scaled, mixed and rounded by what its own node reads and makes.
    """
    changed = copied(model)
    stored, readers = initializers(changed), consumers(changed)
    taken = names(changed)
    for name, nodes in readers.items():
        if name not in stored:
            continue
        owners = [n for n in nodes if n.op_type in CONVOLUTIONS or is_noise_level(n, stored)]
        # One of them keeps the tensor where nothing else reads it.
        for number, node in enumerate(owners[1:] if len(owners) == len(nodes) else owners, 1):
            own = free_name(f"{name}_{number}", taken)
            changed.graph.initializer.add().CopyFrom(stored[name])
            changed.graph.initializer[-1].name = own
            node.input[list(node.input).index(name)] = own
    return changed


def written(quantized: onnx.ModelProto, prepared: Prepared, fp32: Path, out: Path) -> QuantizationReport:
    """Write a QDQ graph to `out` and return the report on it; raises as `quantize_static`.

    Args:
        quantized: The graph, made from `prepared`.
        prepared: Its float graph and calibration pictures.
        fp32: Named in the errors.
        out: Where the file goes.
    """
    strip(quantized)
    left, integer = float_convolutions(quantized), integer_convolutions(quantized)
    if not integer:
        raise InputError(
            f"{fp32}: no convolution took INT8; left in float: {', '.join(left) or 'none'}",
            remedy="take names out of quantization.keep_float",
        )
    agreement = _agreement(prepared.model, quantized, prepared)
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
        calibration_pictures=len(prepared.pictures),
        agreement_millidb=min(round(1000 * agreement), 999_999) if agreement < 999 else 999_999,
    )


def quantize_dynamic(fp32: Path, out: Path) -> Path:
    """Return `out`, now the graph with int8 weights whose activations are quantized picture by picture as it runs.

    Finding the ranges while it runs costs more than the integers save: docs/int8-inside.md has the measurement. It is
    there to be compared with.

    Raises:
        InputError: The graph is quantized already, or has NaN in its weights.
    """
    model = load_float_onnx(fp32)
    mark_as_prepared(model)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        made = Path(folder, "dynamic.onnx")
        # ONNX Runtime's ConvInteger takes uint8 weights only.
        ort_quantize_dynamic(model, made, op_types_to_quantize=["Conv"], weight_type=QuantType.QUInt8)
        quantized = onnx.ModelProto.FromString(made.read_bytes())
    strip(quantized)
    write(quantized, out)
    return out


def mark_as_prepared(model: onnx.ModelProto) -> None:
    """Tell ONNX Runtime's quantizer that the graph is simplified; it asks for its own pre-processing otherwise."""
    mark = model.metadata_props.add()
    mark.key, mark.value = "onnx.quant.pre_process", "onnxruntime.quant"


def narrowed(placement: Placement) -> bool:
    """Return whether weights get 7 bits by default: the engine's sums saturate at 16 bits on this processor."""
    return placement.saturates and host.sums_saturate()


def kept_float(model: onnx.ModelProto, parts: frozenset[str]) -> tuple[str, ...]:
    """Return the names of the convolutions and additions that the named parts of a graph consist of.

    Args:
        model: A checked float graph.
        parts: Of `head`, `tail` and `skip`.
    """
    kept: list[str] = []
    if "head" in parts:
        kept += first_convolutions(model, NOISY)
    if "tail" in parts:
        kept += last_convolutions(model, DENOISED)
    if "skip" in parts:
        kept += [node.name for node in model.graph.node if node.op_type == "Add"]
    return tuple(kept)


def _check_calibration(calibration: Calibration, wanted: int, face: Interface) -> Calibration:
    """Return the pictures to calibrate on, the first `wanted`."""
    if len(calibration) < max(LEAST_CALIBRATION_PICTURES, wanted):
        least = LEAST_CALIBRATION_PICTURES
        raise InputError(
            f"{len(calibration)} calibration pictures, expected {max(least, wanted)}",
            remedy=f"give more pictures, or lower quantization.calibration_pictures (at least {least})",
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


def _agreement(before: onnx.ModelProto, after: onnx.ModelProto, prepared: Prepared) -> float:
    """Return the mean PSNR in dB of one graph's output against the other's on the calibration pictures."""
    run_before, run_after = Reference(before), Reference(after, exact=prepared.exact)
    return float(np.mean([agreement_db(run_after(n, s), run_before(n, s)) for n, s in prepared.pictures]))
