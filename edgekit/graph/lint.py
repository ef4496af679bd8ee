"""What in a graph will hurt once it is quantized, tiled or compiled: known before anything is trained.

Each finding has the measured cost behind it: `lint_costs.json`, which `benchmarks/bench.py blocks` writes by exchanging
one part of the `base` student for another and timing both by turns.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import onnx

from edgekit.errors import IntegrityError
from edgekit.graph.checks import NOISY
from edgekit.graph.cost import Shape, infer_shapes, macs_by_node
from edgekit.graph.walk import CONVOLUTIONS, attribute, derived_from, initializers, producers

COSTS = Path(__file__).with_name("lint_costs.json")
SIDE = 256
CHANNELS = 16
_SMOOTH = frozenset({"HardSwish", "HardSigmoid", "Sigmoid", "Tanh", "Erf", "Gelu", "Softplus", "Elu", "Mish"})
_OTHER_ACTIVATIONS = frozenset({"PRelu", "LeakyRelu"})
_GLOBAL = frozenset({"GlobalAveragePool", "GlobalMaxPool", "InstanceNormalization", "GroupNormalization"})
# Over an axis, and for a LayerNormalization over all behind it too.
_OVER_AXES = frozenset({"LayerNormalization", "Softmax", "LogSoftmax", "LpNormalization"})


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something that will hurt.

    rule: Its name, a key of the measured costs. where: Names of the nodes. what: One sentence with the figures of this
    graph. advice: What to do. cost: One sentence on what it was measured to cost; says so where nothing was measured.
    only_int8: Whether a float target does not mind.
    """

    rule: str
    where: tuple[str, ...]
    what: str
    advice: str
    cost: str
    only_int8: bool


@dataclass(frozen=True, kw_only=True)
class _Graph:
    """A graph with what the rules ask of it, at a picture of `SIDE` x `SIDE`; larger: the shapes at twice the sides."""

    model: onnx.ModelProto
    shapes: Mapping[str, Shape]
    macs: Mapping[str, int]
    larger: Mapping[str, Shape]

    def side(self, tensor: str) -> int:
        """Return the height of a tensor; 0 where it has none."""
        shape = self.shapes.get(tensor, ())
        return shape[2] if len(shape) == 4 else 0

    def both(self, tensor: str) -> tuple[Shape, Shape]:
        """Return the shape of a tensor at both sizes; axes in which they differ grow with the picture."""
        return self.shapes.get(tensor, ()), self.larger.get(tensor, ())


def lint(model: onnx.ModelProto) -> list[Finding]:
    """Return what will hurt, in the order of the rules.

    Args:
        model: A denoiser's float graph; its weights do not matter.

    Raises:
        UnsupportedError: A shape that cannot be inferred. IntegrityError: The measured costs are damaged.
    """
    graph = _Graph(
        model=model,
        shapes=infer_shapes(model, SIDE, SIDE),
        macs=macs_by_node(model, SIDE, SIDE),
        larger=infer_shapes(model, 2 * SIDE, 2 * SIDE),
    )
    return [finding for rule in _RULES for finding in rule(graph)]


def _activations(graph: _Graph) -> Iterable[Finding]:
    smooth = [n for n in graph.model.graph.node if n.op_type in _SMOOTH and graph.side(n.output[0]) > 1]
    if smooth:
        kinds = ", ".join(sorted({n.op_type for n in smooth}))
        largest = max(graph.side(n.output[0]) for n in smooth)
        yield _finding(
            "smooth_activation",
            smooth,
            f"{len(smooth)} element-wise {kinds}, up to {largest}x{largest} of a {SIDE}x{SIDE} picture; engines "
            "compute them in float between integer convolutions",
            "use ReLU, or compile for a float target",
        )
    leaky = [n for n in graph.model.graph.node if n.op_type in _OTHER_ACTIVATIONS]
    if leaky:
        kinds = ", ".join(sorted({n.op_type for n in leaky}))
        yield _finding(
            "leaky_activation",
            leaky,
            f"{len(leaky)} {kinds}, which do not fold into the clamp of an integer convolution",
            "use ReLU",
        )


def _squeeze_excite(graph: _Graph) -> Iterable[Finding]:
    """Find products of a map with a gate that is one number per channel."""
    features = derived_from(graph.model, NOISY)
    gates = [
        n
        for n in graph.model.graph.node
        if n.op_type == "Mul"
        and any(graph.side(i) == 1 and i in features for i in n.input)
        and graph.side(n.output[0]) > 1
    ]
    if gates:
        largest = max(graph.side(n.output[0]) for n in gates)
        yield _finding(
            "squeeze_excite",
            gates,
            f"{len(gates)} channel gates (SE), up to {largest}x{largest} of a {SIDE}x{SIDE} picture: a mean over the "
            "whole map, and a product in float",
            "leave them out, or keep one at the lowest level and in float",
        )


def _global(graph: _Graph) -> Iterable[Finding]:
    found = [
        n for n in graph.model.graph.node if n.op_type in _GLOBAL or _reduces_space(n, graph) or _mixes_places(n, graph)
    ]
    if found:
        kinds = ", ".join(sorted({n.op_type for n in found}))
        yield _finding(
            "global_operator",
            found,
            f"{len(found)} operators look at the whole map ({kinds}): a tile of a large picture is then denoised "
            "otherwise than the picture",
            "leave them out where pictures are denoised in tiles, or state the tiling error",
            only_int8=False,
        )


def _reduces_space(node: onnx.NodeProto, graph: _Graph) -> bool:
    """Return whether a reduction is over an axis that grows with the picture."""
    if not node.op_type.startswith("Reduce"):
        return False
    axes = next((set(a.ints) for a in node.attribute if a.name == "axes"), set[int]())
    if not axes and len(node.input) > 1 and node.input[1] in (constants := initializers(graph.model)):
        axes = {int(v) for v in onnx.numpy_helper.to_array(constants[node.input[1]])}
    shape, larger = graph.both(node.input[0])
    return not axes or not shape or any(shape[axis] != larger[axis] for axis in axes)


def _mixes_places(node: onnx.NodeProto, graph: _Graph) -> bool:
    """Return whether an operator over axes mixes what lies along an axis that grows with the picture."""
    if node.op_type not in (*_OVER_AXES, "MatMul"):
        return False
    shape, larger = graph.both(node.input[0])
    if node.op_type == "MatMul":
        return shape[-1:] != larger[-1:]
    axis = attribute(node, "axis")
    first = -1 if axis is None else int(axis)
    axes = slice(first, None) if node.op_type == "LayerNormalization" else slice(first, first + 1 or None)
    return shape[axes] != larger[axes] or not shape


def _channels(graph: _Graph) -> Iterable[Finding]:
    """Find convolutions inside the network whose channels leave part of a vector empty."""
    odd, inside, wasted = [], 0, 0
    weights = initializers(graph.model)
    for node in graph.model.graph.node:
        if node.op_type != "Conv" or node.input[1] not in weights:
            continue
        out, per_group = weights[node.input[1]].dims[:2]
        inner = out if per_group == 1 else min(out, per_group)
        if inner < CHANNELS or graph.side(node.output[0]) == 1:
            continue  # the picture's own planes at either end, and gates
        inside += graph.macs[node.name]
        padded = _up(out) / out * (1.0 if per_group == 1 else _up(per_group) / per_group)
        if padded > 1:
            odd.append(node)
            wasted += round(graph.macs[node.name] * (padded - 1))
    if odd:
        yield _finding(
            "channels",
            odd,
            f"{len(odd)} convolutions have channels that are no multiples of {CHANNELS}; kernels that pad them do "
            f"{100 * wasted / max(1, inside):.0f} % more work",
            f"round the channels to multiples of {CHANNELS}",
        )


def _up(channels: int) -> int:
    return -(-channels // CHANNELS) * CHANNELS


def _upsampling(graph: _Graph) -> Iterable[Finding]:
    transposed = [n for n in graph.model.graph.node if n.op_type == "ConvTranspose"]
    if transposed:
        share = sum(graph.macs[n.name] for n in transposed) / max(1, sum(graph.macs.values()))
        yield _finding(
            "transposed_convolution",
            transposed,
            f"{len(transposed)} transposed convolutions with {100 * share:.0f} % of the multiply-accumulates; ONNX "
            "Runtime has no integer kernel for them",
            "use a 1x1 convolution and PixelShuffle",
        )
    # Nearest and bilinear cost nothing beside PixelShuffle (`lint_costs.json`), so nothing is said of them.
    cubic = [n for n in graph.model.graph.node if n.op_type == "Resize" and _mode(n) == "cubic"]
    if cubic:
        yield _finding(
            "resize_cubic",
            cubic,
            f"{len(cubic)} Resize operators, mode cubic, which not every engine has",
            "use nearest, bilinear, or a 1x1 convolution and PixelShuffle",
            only_int8=False,
        )


def _mode(node: onnx.NodeProto) -> str:
    return next((a.s.decode() for a in node.attribute if a.name == "mode"), "nearest")


def _full_resolution(graph: _Graph) -> Iterable[Finding]:
    """Find a first convolution on the picture itself."""
    made_by = producers(graph.model)
    first = [
        n
        for n in graph.model.graph.node
        if n.op_type in CONVOLUTIONS and graph.side(n.input[0]) == SIDE and graph.side(n.output[0]) == SIDE
    ]
    share = sum(graph.macs[n.name] for n in first) / max(1, sum(graph.macs.values()))
    if first and share > 0.1:
        before = made_by.get(first[0].input[0])
        yield _finding(
            "full_resolution",
            first,
            f"{len(first)} convolutions run at the picture's own resolution, with {100 * share:.0f} % of the "
            "multiply-accumulates" + (f", the first after {before.op_type}" if before is not None else ""),
            "begin with space-to-depth (PixelUnshuffle 2) and end with PixelShuffle",
            only_int8=False,
        )


_RULES: tuple[Callable[[_Graph], Iterable[Finding]], ...] = (
    _activations,
    _squeeze_excite,
    _global,
    _channels,
    _upsampling,
    _full_resolution,
)


def _finding(rule: str, nodes: Iterable[onnx.NodeProto], what: str, advice: str, *, only_int8: bool = True) -> Finding:
    return Finding(
        rule=rule,
        where=tuple(n.name or n.output[0] for n in nodes),
        what=what,
        advice=advice,
        cost=_costs().get(rule, "not measured by edgekit"),
        only_int8=only_int8,
    )


@cache
def _costs() -> Mapping[str, str]:
    """Return rule -> what it was measured to cost, as a sentence."""
    try:
        raw = json.loads(COSTS.read_text(encoding="utf-8"))
        return {
            rule: f"{entry['change']}: " + "; ".join(_told(engine, row) for engine, row in entry["engines"].items())
            for rule, entry in raw["figures"].items()
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{COSTS}: damaged costs: {error}", remedy="reinstall edgekit") from error


def _told(engine: str, row: Mapping[str, float]) -> str:
    return f"{engine} FP32 x{row['fp32']:.2f}, INT8 x{row['int8']:.2f} the time"
