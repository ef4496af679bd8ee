"""How far a network looks: the halo that a tile needs, computed from the graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from edgekit.errors import UnsupportedError
from edgekit.graph.checks import DENOISED, NOISY
from edgekit.graph.cost import WEIGHT_INPUT, Shape, folded, infer_shapes, stride
from edgekit.graph.resizing import resizing
from edgekit.graph.walk import attribute, constants_stored, consumers, initializers, producers


@dataclass(frozen=True, kw_only=True)
class ReceptiveField:
    """What one pixel of the output depends on.

    halo_px: Pixels on each side, ways through global operators not counted.
    global_nodes: Names of the operators that look at the whole picture; with any, no halo makes tiles exact.
    grid_px: Pixels from which on its maps repeat: tiles that start elsewhere pool other pixels together.
    """

    halo_px: int
    global_nodes: tuple[str, ...]
    grid_px: int

    def aligned(self, stride: int) -> int:
        """Return the halo in pixels, rounded up to a multiple of the stride, at which tiles start.

        Raises:
            UnsupportedError: The network's own grid is coarser, as where it pads pictures to a multiple by itself.
        """
        if stride % self.grid_px:
            raise UnsupportedError(
                f"tiles start at multiples of {stride} pixels, and the maps of the network lie on a grid of "
                f"{self.grid_px}",
                remedy=f"say that pictures come in multiples of {self.grid_px}: stride = {self.grid_px}",
            )
        return -(-self.halo_px // stride) * stride


@dataclass(frozen=True)
class _Span:
    """Element i along an axis depends on the input pixels from `jump * i + low` to `jump * i + high`."""

    jump: Fraction
    low: Fraction
    high: Fraction


def receptive_field(model: onnx.ModelProto) -> ReceptiveField:
    """Return how far the output looks, exactly for the operators of our networks.

    Every tensor gets the span of input pixels that one of its elements depends on, along height and width (Araujo 2019,
    "Computing Receptive Fields of Convolutional Neural Networks", with rational strides for up-sampling).

    Maps that hold no pixels but have the picture's size, as one of the noise level, count too: windows that reach
    beyond their borders show where the picture ends.

    Raises:
        UnsupportedError: An operator whose span is not known, operands of different resolution, or values that depend
            on the place in the picture.
    """
    shapes: Mapping[str, Shape] = {}
    if any(node.op_type in _SIZES for node in model.graph.node):
        model = constants_stored(folded(model, *_LOOKED_AT, without_idle=True))
        shapes = infer_shapes(model, *_LOOKED_AT)
    kept = _kept_by_norms(model)
    unit = _Span(Fraction(1), Fraction(0), Fraction(0))
    spans: dict[str, tuple[_Span, _Span]] = {NOISY: (unit, unit)}
    global_nodes: list[str] = []
    grid = 1
    constants = {name: numpy_helper.to_array(t) for name, t in initializers(model).items() if math.prod(t.dims) < 64}
    constants |= {n.output[0]: numpy_helper.to_array(n.attribute[0].t) for n in model.graph.node if _holds_tensor(n)}
    stored = initializers(model) if shapes else {}
    for node in model.graph.node:
        spans |= _maps_of_sizes(node, stored)
        operands = [spans[name] for name in node.input if name in spans]
        if not operands and node.op_type in _SPREAD and _is_map(shape := shapes.get(node.output[0], ())):
            spans[node.output[0]] = _over(shape)
        if not operands or node.op_type in _SIZES:
            continue
        if _is_global(node, constants):
            global_nodes.append(node.name)
            if node.op_type in _NORMALIZE:
                spans[node.output[0]] = _union(node, operands)
            continue
        if node.output[0] in kept:
            spans[node.output[0]] = _union(node, operands)
            continue
        if node.op_type not in _RULES or node.domain not in _ONNX:
            raise UnsupportedError(
                f"node '{node.name}' ({node.op_type}): how far it looks is not known",
                remedy="export the network with convolutions, SpaceToDepth, DepthToSpace and element-wise operators",
            )
        height, width = _union(node, operands)
        rule = _RULES[node.op_type]
        attributes = _attributes(node) | _resizing(node, constants) | _shift(node, constants)
        for name in filter(None, node.output):
            spans[name] = (rule(height, attributes, 0), rule(width, attributes, 1))
            grid = math.lcm(grid, *(span.jump.numerator for span in spans[name]))
    if DENOISED not in spans:
        raise UnsupportedError(f"'{DENOISED}' does not depend on the pixels of '{NOISY}' one by one")
    if any(span.jump != 1 for span in spans[DENOISED]):
        raise UnsupportedError(f"'{DENOISED}' has another resolution than '{NOISY}'")
    halo = max(max(-span.low, span.high) for span in spans[DENOISED])
    return ReceptiveField(halo_px=math.ceil(halo), global_nodes=tuple(global_nodes), grid_px=grid)


def tile_stride(model: onnx.ModelProto, path: Path) -> int:
    """Return of what pictures and the places of tiles are multiples: the network's stride, or more where its grid asks.

    A network that pads pictures to a multiple by itself takes any, and yet its maps lie on a grid of that multiple.

    Raises:
        UnsupportedError: As `cost.stride`.
    """
    found = stride(model, path)
    try:
        return math.lcm(found, receptive_field(model).grid_px)
    except UnsupportedError:
        return found


def _maps_of_sizes(node: onnx.NodeProto, stored: Mapping[str, onnx.TensorProto]) -> dict[str, tuple[_Span, _Span]]:
    """Return the spans of the constant maps that a node reads, in a graph that was folded at one size.

    Raises:
        UnsupportedError: Values that differ not at the borders alone.
    """
    found = dict[str, tuple[_Span, _Span]]()
    if node.op_type == "DequantizeLinear":
        return found
    for name in node.input[: 1 if node.op_type in WEIGHT_INPUT else None]:
        if name not in stored or len(stored[name].dims) != 4 or max(stored[name].dims[2:]) == 1:
            continue
        values = numpy_helper.to_array(stored[name])
        border = _border(values)
        if 4 * border > min(values.shape[2:]):
            raise UnsupportedError(
                f"node '{node.name}' ({node.op_type}): '{name}' depends on the place in the picture",
                remedy="leave coordinates out where pictures are denoised in tiles",
            )
        if _is_map(values.shape):
            found[name] = _over(values.shape, border=border)
    return found


def _border(values: NDArray[np.generic]) -> int:
    """Return how wide the border of a map (n, c, h, w) is whose values differ from the one in the middle."""
    height, width = values.shape[2:]
    _, _, rows, columns = np.nonzero(values != values[:, :, height // 2, width // 2][:, :, None, None])
    edges = np.minimum.reduce([rows, height - 1 - rows, columns, width - 1 - columns])
    return int(edges.max(initial=-1)) + 1


def _is_map(shape: Shape) -> bool:
    return len(shape) == 4 and min(shape[2:]) > 1


def _over(shape: Shape, *, border: int = 0) -> tuple[_Span, _Span]:
    """Return the spans of a map that holds no pixels; `border` elements at its edges differ from those inside."""
    spans = []
    for size, side in zip(shape[2:], _LOOKED_AT, strict=True):
        jump = Fraction(round(Fraction(side, size))) if size < side else 1 / Fraction(round(Fraction(size, side)))
        # It may be larger or smaller than the picture by a border of its own.
        reach = abs(jump * size - side) + jump * border
        spans.append(_Span(jump, -reach, max(jump - 1, Fraction(0)) + reach))
    height, width = spans
    return height, width


def _kept_by_norms(model: onnx.ModelProto) -> frozenset[str]:
    """Return what the Reshapes around an InstanceNormalization give that keep a map's shape in the end: a GroupNorm."""
    norms = [node for node in model.graph.node if node.op_type == "InstanceNormalization"]
    if not norms:
        return frozenset()
    shapes, made_by, readers = infer_shapes(model, *_LOOKED_AT), producers(model), consumers(model)
    kept = set[str]()
    for norm in norms:
        before, behind = made_by.get(norm.input[0]), readers.get(norm.output[0], [])
        if before is None or [before.op_type, *(n.op_type for n in behind)] != ["Reshape", "Reshape"]:
            continue
        if shapes.get(before.input[0], ()) == shapes.get(behind[0].output[0]):
            kept.update((before.output[0], behind[0].output[0]))
    return frozenset(kept)


_Attributes = Mapping[str, tuple[int, ...]]
_Rule = Callable[[_Span, _Attributes, int], _Span]


def _window(span: _Span, a: _Attributes, axis: int) -> _Span:
    """Element i reads elements i * stride - pad + k * dilation."""
    reach = (a["kernel_shape"][axis] - 1) * _at(a, "dilations", axis, 1)
    pad = _at(a, "pads", axis, 0)
    return _Span(
        span.jump * _at(a, "strides", axis, 1), span.low - span.jump * pad, span.high + span.jump * (reach - pad)
    )


def _transposed(span: _Span, a: _Attributes, axis: int) -> _Span:
    """Element i reads the elements (i + pad - k * dilation) / stride that are whole."""
    reach = (a["kernel_shape"][axis] - 1) * _at(a, "dilations", axis, 1)
    pad, jump = _at(a, "pads", axis, 0), span.jump / _at(a, "strides", axis, 1)
    return _Span(jump, span.low + jump * (pad - reach), span.high + jump * pad)


def _space_to_depth(span: _Span, a: _Attributes, axis: int) -> _Span:
    size = a["blocksize"][0]
    return _Span(span.jump * size, span.low, span.high + span.jump * (size - 1))


def _depth_to_space(span: _Span, a: _Attributes, axis: int) -> _Span:
    size = a["blocksize"][0]
    jump = span.jump / size
    return _Span(jump, span.low - jump * (size - 1), span.high)


def _resize(span: _Span, a: _Attributes, axis: int) -> _Span:
    """Element i reads element floor(i / scale), or linearly the two around (i + 1/2) / scale - 1/2."""
    scale = a["scales"][axis]
    jump = span.jump / scale
    if not a["linear"][0]:
        return _Span(jump, span.low - jump * (scale - 1), span.high)
    middle, reach = (jump - span.jump) / 2, span.jump - jump / 2
    return _Span(jump, span.low + middle - reach, span.high + middle + reach)


def _shifted(span: _Span, a: _Attributes, axis: int) -> _Span:
    """Element i reads element i * step + start, or the picture's border."""
    start = span.jump * a["starts"][axis]
    return _Span(span.jump * a["steps"][axis], span.low + start, span.high + start)


def _same(span: _Span, a: _Attributes, axis: int) -> _Span:
    return span


_ELEMENTWISE = (
    *("Add", "Sub", "Mul", "Div", "Relu", "LeakyRelu", "PRelu", "Clip", "HardSwish", "HardSigmoid", "Sigmoid", "Tanh"),
    *("Elu", "Selu", "Celu", "Gelu", "Mish", "Softplus", "Softsign", "ThresholdedRelu", "Erf", "Log", "Reciprocal"),
    *("Identity", "Neg", "Abs", "Min", "Max", "Pow", "Sqrt", "Exp", "Cast", "QuantizeLinear", "DequantizeLinear"),
    *("Concat", "Split", "Gather", "BatchNormalization", "ReduceMean", "ReduceMax"),
)
_RULES: dict[str, _Rule] = {
    "Conv": _window,
    "MaxPool": _window,
    "AveragePool": _window,
    "ConvTranspose": _transposed,
    "SpaceToDepth": _space_to_depth,
    "DepthToSpace": _depth_to_space,
    "Resize": _resize,
    "Pad": _shifted,
    "Slice": _shifted,
    **dict.fromkeys(_ELEMENTWISE, _same),
}
_ONNX = ("", "ai.onnx")
_INPUTS = {"Pad": ("pads", "value", "axes"), "Slice": ("starts", "ends", "axes", "steps")}
_CHANNEL_AXES = ((1,), (-3,))
# They give pixels by means over the whole picture.
_NORMALIZE = frozenset({"InstanceNormalization", "LayerNormalization", "GroupNormalization"})
# Pixels: any multiple of 32, and of no other power of two, so that what pads to more does pad.
_LOOKED_AT = (33 * 32, 35 * 32)
# They spread what they read over a map.
_SPREAD = frozenset({"Expand", "Tile"})
# They give sizes, on which no pixel's value has a bearing.
_SIZES = frozenset({"Shape", "Size"})


def _is_global(node: onnx.NodeProto, constants: Mapping[str, NDArray[np.generic]]) -> bool:
    """Return whether a node mixes all pixels; reductions over channels alone do not."""
    if node.op_type in ("GlobalAveragePool", "GlobalMaxPool", *_NORMALIZE):
        return True
    if node.op_type not in ("ReduceMean", "ReduceMax", "Concat", "Split", "Gather"):
        return False
    axes = _axes(node, constants)
    if node.op_type in ("ReduceMean", "ReduceMax"):
        return axes not in _CHANNEL_AXES
    if axes not in _CHANNEL_AXES:
        raise UnsupportedError(f"node '{node.name}' ({node.op_type}): it acts on axis {axes}, expected the channels")
    return False


def _resizing(node: onnx.NodeProto, constants: Mapping[str, NDArray[np.generic]]) -> dict[str, tuple[int, ...]]:
    """Return the whole factors of a Resize, and whether it is linear; nothing of other nodes."""
    if node.op_type != "Resize":
        return {}
    given = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    scales = constants.get(node.input[2]) if len(node.input) > 2 else None
    found = resizing(given, scales)
    if found is None:
        text = {name: value.decode() for name, value in given.items() if isinstance(value, bytes)}
        raise UnsupportedError(
            f"node '{node.name}' (Resize): mode {text.get('mode', 'nearest')}, "
            f"{text.get('coordinate_transformation_mode', 'half_pixel')}, "
            f"scales {'missing' if scales is None else scales.tolist()}; how far it looks is known of nearest and "
            "linear ones to whole multiples"
        )
    return {"scales": (found.height, found.width), "linear": (int(found.mode == "linear"),)}


def _shift(node: onnx.NodeProto, constants: Mapping[str, NDArray[np.generic]]) -> dict[str, tuple[int, ...]]:
    """Return where a Pad or a Slice begins along height and width, and its steps; nothing of other nodes.

    Raises:
        UnsupportedError: The file does not say, or counts from the picture's end.
    """
    if node.op_type not in ("Pad", "Slice"):
        return {}
    if attribute(node, "mode") == b"wrap":
        raise UnsupportedError(f"node '{node.name}' (Pad): mode wrap; it looks at the picture's other side")
    named = dict(zip(_INPUTS[node.op_type], node.input[1:], strict=False))
    given = {role: [int(v) for v in np.ravel(constants[n])] for role, n in named.items() if n in constants}
    begins = [-v for v in given["pads"][: len(given["pads"]) // 2]] if "pads" in given else given.get("starts", [])
    axes = given.get("axes", range(len(begins)))
    starts = {axis % 4: begin for axis, begin in zip(axes, begins, strict=False)}
    steps = {axis % 4: step for axis, step in zip(axes, given.get("steps", []), strict=False)}
    if not starts or any(name and role in ("axes", "steps") and role not in given for role, name in named.items()):
        raise UnsupportedError(f"node '{node.name}' ({node.op_type}): the file does not say where it begins")
    if node.op_type == "Slice" and any(starts.get(axis, 0) < 0 or steps.get(axis, 1) < 1 for axis in (2, 3)):
        raise UnsupportedError(f"node '{node.name}' (Slice): it counts from the picture's end")
    return {"starts": (starts.get(2, 0), starts.get(3, 0)), "steps": (steps.get(2, 1), steps.get(3, 1))}


def _holds_tensor(node: onnx.NodeProto) -> bool:
    return str(node.op_type) == "Constant" and str(node.attribute[0].name) == "value"


def _axes(node: onnx.NodeProto, constants: Mapping[str, NDArray[np.generic]]) -> tuple[int, ...]:
    if (axes := attribute(node, "axes")) is not None:
        return tuple(axes)
    if (axis := attribute(node, "axis")) is not None:
        return (axis,)
    given = constants.get(node.input[1]) if node.op_type.startswith("Reduce") and len(node.input) > 1 else None
    return () if given is None else tuple(int(v) for v in np.ravel(given))


def _union(node: onnx.NodeProto, operands: list[tuple[_Span, _Span]]) -> tuple[_Span, _Span]:
    """Return the spans that cover all operands along height and width."""
    if len({(height.jump, width.jump) for height, width in operands}) > 1:
        raise UnsupportedError(f"node '{node.name}' ({node.op_type}): its operands have different resolutions")
    axes = zip(*operands, strict=True)
    height, width = (_Span(spans[0].jump, min(s.low for s in spans), max(s.high for s in spans)) for spans in axes)
    return height, width


def _attributes(node: onnx.NodeProto) -> dict[str, tuple[int, ...]]:
    """Return the integer attributes of a node as tuples.

    Raises:
        UnsupportedError: Padding that depends on the size of the picture, or a window of unknown size.
    """
    found = {a.name: tuple(a.ints) if a.ints else (a.i,) for a in node.attribute}
    padding = next((a.s.decode() for a in node.attribute if a.name == "auto_pad"), "NOTSET")
    if padding not in ("NOTSET", "VALID"):
        raise UnsupportedError(
            f"node '{node.name}' ({node.op_type}): auto_pad {padding}", remedy="export explicit padding"
        )
    if _RULES[node.op_type] in (_window, _transposed) and "kernel_shape" not in found:
        raise UnsupportedError(f"node '{node.name}' ({node.op_type}): it has no attribute kernel_shape")
    return found


def _at(attributes: _Attributes, name: str, axis: int, default: int) -> int:
    return attributes[name][axis] if name in attributes else default
