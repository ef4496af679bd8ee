"""Which layers of an INT8 graph go back to float so that it loses no more than a budget: best dB per time first."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray

from edgekit.compress.placement import FloatCosts, Placement, release
from edgekit.data.noise import add_gaussian
from edgekit.errors import InputError, LimitError
from edgekit.graph.cost import infer_shapes, integer_permille, macs_by_node
from edgekit.graph.reference import Reference
from edgekit.graph.walk import integer_convolutions
from edgekit.measure.quality import Denoise, crop, pad_to_multiple, psnr

Array = NDArray[np.float32]
Picture = NDArray[np.uint8]

# Least shares of integer multiply-accumulates: what is kept if the budget allows it, and what a graph needs not to be a
# float graph with decoration.
MOSTLY_INTEGER_PERMILLE, LEAST_INTEGER_PERMILLE = 950, 500
# Neither the draw that figures are measured with nor the one of the calibration.
_SEED = 2
_SIDE = 256


@dataclass(frozen=True, kw_only=True)
class Loss:
    """PSNR lost against the float graph, in thousandths of a dB: mean and worst over pictures and noise levels."""

    mean_mdb: int
    worst_mdb: int


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The most that may be lost on the held-out pictures, in dB.

    mean_db: In the mean over pictures and noise levels. worst_db: On any picture at any level; None asks for nothing.
    """

    mean_db: float
    worst_db: float | None = None

    def holds(self, loss: Loss) -> bool:
        """Return whether a loss is within it."""
        return not self.missed(loss)

    def part(self, share: float) -> Budget:
        """Return the budget of that share of it."""
        return Budget(mean_db=self.mean_db * share, worst_db=None if self.worst_db is None else self.worst_db * share)

    def over_mdb(self, loss: Loss) -> float:
        """Return by how much a loss misses the limit that it misses most, in thousandths of a dB; below 0 within it."""
        worst = -math.inf if self.worst_db is None else loss.worst_mdb - 1000 * self.worst_db
        return max(loss.mean_mdb - 1000 * self.mean_db, worst)

    def rank(self, loss: Loss) -> tuple[float, float]:
        """Return what puts losses in order, the best first: by how much they miss a limit, then by the mean."""
        return max(0.0, self.over_mdb(loss)), loss.mean_mdb

    def missed(self, loss: Loss) -> str:
        """Return which limit a loss misses, and by what; empty where none."""
        if loss.mean_mdb > round(1000 * self.mean_db):
            return (
                f"int8_drop_db: INT8 loses {loss.mean_mdb / 1000:.3f} dB on the held-out pictures, {self.mean_db:g} "
                "may be lost"
            )
        if self.worst_db is not None and loss.worst_mdb > round(1000 * self.worst_db):
            return (
                f"int8_worst_db: INT8 loses {loss.worst_mdb / 1000:.3f} dB on the worst held-out picture, "
                f"{self.worst_db:g} may be lost"
            )
        return ""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A convolution or an addition, with what it would bring to have it in float.

    Where the engine rounds what integer nodes give, as ONNX Runtime does, one addition alone in float would read what
    the others of its residual trunk rounded: there all additions of one resolution are one layer.

    nodes: Names in the graph. integer_macs: That the graph would lose.
    harm_udb: Loss in millionths of a dB that its rounding adds to a graph that is else in INT8, estimated from how far
        it moves the output; below nothing where its error makes up for another layer's.
    cost_us: Microseconds that it would cost for 256x256 pixels, by the cost model.
    """

    name: str
    nodes: tuple[str, ...]
    integer_macs: int
    harm_udb: int
    cost_us: int


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A graph within its budget. released: What is in float for it, in the order in which it was decided."""

    model: onnx.ModelProto
    loss: Loss
    released: tuple[str, ...]


class Judge:
    """Measures the loss of graphs against one float graph, on clean pictures with noise of fixed seeds.

    Args:
        floating: The float graph.
        pictures: Clean uint8 (c, h, w) that nothing was trained on.
        sigmas255: Noise levels on the scale of 0 to 255.
        stride: Sides are padded to multiples of it.
        exact: As `Reference` has it.

    Raises:
        InputError: There are no pictures.
    """

    def __init__(
        self,
        floating: onnx.ModelProto,
        pictures: Sequence[Picture],
        sigmas255: Sequence[float],
        stride: int,
        *,
        exact: bool = False,
    ) -> None:
        if not pictures:
            raise InputError("there are no held-out pictures to measure the loss on")
        self._cases = [
            [(add_gaussian(p, sigma, index=i, seed=_SEED), p.astype(np.float32) / 255) for i, p in enumerate(pictures)]
            for sigma in sigmas255
        ]
        self._sigmas, self._stride, self._exact = [s / 255 for s in sigmas255], stride, exact
        self._outputs = self._run(self._reference(floating))
        self._before = self._psnr(self._outputs)

    def loss(self, model: onnx.ModelProto) -> Loss:
        """Return what a graph loses."""
        lost = self._before - self._psnr(self._run(self._reference(model)))
        return Loss(mean_mdb=round(1000 * float(lost.mean())), worst_mdb=round(1000 * float(lost.max())))

    def distance_udb(self, model: onnx.ModelProto, pictures: int) -> float:
        """Return the loss in millionths of a dB if what a graph does to the output were noise, over some pictures.

        It is less precise than `loss` and far less noisy: small differences between graphs show.
        """
        outputs = self._run(self._reference(model), pictures)
        found = []
        for level, (got, want) in enumerate(zip(outputs, self._outputs, strict=True)):
            for index, (one, other) in enumerate(zip(got, want, strict=False)):
                moved = float(np.mean(np.square(one - other, dtype=np.float64)))
                error = 10 ** (-self._before[level, index] / 10)
                found.append(10 * np.log10(1 + moved / error))
        return float(1e6 * np.mean(found))

    def apart_db(self, model: onnx.ModelProto, denoise: Denoise, pictures: int) -> float:
        """Return by how many dB the PSNR of a graph and of a function differ at most, over some pictures."""
        ours, theirs = (self._psnr(self._run(run, pictures), pictures) for run in (self._reference(model), denoise))
        return float(np.abs(ours - theirs).max())

    def _reference(self, model: onnx.ModelProto) -> Reference:
        return Reference(model, exact=self._exact)

    def _run(self, run: Denoise, pictures: int | None = None) -> list[list[Array]]:
        return [
            [
                crop(run(pad_to_multiple(noisy[None], self._stride), sigma), *noisy.shape[-2:])[0]
                for noisy, _ in cases[:pictures]
            ]
            for sigma, cases in zip(self._sigmas, self._cases, strict=True)
        ]

    def _psnr(self, outputs: Sequence[Sequence[Array]], pictures: int | None = None) -> NDArray[np.float64]:
        return np.array(
            [
                [psnr(got, clean) for got, (_, clean) in zip(found, cases[:pictures], strict=True)]
                for found, cases in zip(outputs, self._cases, strict=True)
            ]
        )


def layers(
    quantized: onnx.ModelProto,
    floating: onnx.ModelProto,
    placement: Placement,
    judge: Judge,
    *,
    trained: bool = False,
    pictures: int = 4,
) -> tuple[Layer, ...]:
    """Return the layers of a QDQ graph that have anything rounded, best dB per time first.

    Only additions of maps are ever rounded (`placement.computes_in_integers`); those of vectors are left out.

    Args:
        quantized: The graph.
        floating: The float graph that it was made from.
        placement: That of the graph.
        judge: Measures.
        trained: Whether the graph was trained, so that layers keep its weights and not those of the float graph.
        pictures: Of the judge's pictures, how many are looked at.
    """
    before, originals = judge.distance_udb(quantized, pictures), None if trained else floating
    macs, shapes = macs_by_node(floating, _SIDE, _SIDE), infer_shapes(floating, _SIDE, _SIDE)
    groups: dict[str, list[onnx.NodeProto]] = {}
    for node in floating.graph.node:
        if node.op_type == "Conv":
            groups[node.name] = [node]
        elif node.op_type == "Add" and len(shapes.get(node.output[0], ())) == 4:
            trunk = f"additions at 1/{_SIDE // shapes[node.output[0]][2]}"
            groups.setdefault(trunk if placement.results else node.name, []).append(node)
    found = []
    for name, nodes in groups.items():
        names = tuple(str(node.name) for node in nodes)
        without = release(quantized, names, placement, originals)
        if _inputs(without) == _inputs(quantized):
            continue
        found.append(
            Layer(
                name=name,
                nodes=names,
                integer_macs=sum(macs.get(node, 0) for node in names),
                harm_udb=round(before - judge.distance_udb(without, pictures)),
                cost_us=max(round(sum(_cost_ps(node, placement.costs, macs, shapes) for node in nodes) * 1e-6), 1),
            )
        )
    return tuple(sorted(found, key=lambda layer: (-layer.harm_udb / layer.cost_us, layer.name)))


def _cost_ps(
    node: onnx.NodeProto, costs: FloatCosts, macs: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]]
) -> float:
    result = shapes[node.output[0]]
    values = math.prod(result)
    if node.op_type == "Add":
        return costs.added * values
    filled = -(-result[1] // costs.channels) * costs.channels / result[1]
    return costs.mac * macs[node.name] * filled + costs.passed * (values + math.prod(shapes[node.input[0]]))


def keep(
    quantized: onnx.ModelProto,
    floating: onnx.ModelProto,
    placement: Placement,
    judge: Judge,
    budget: Budget,
    *,
    trained: bool = False,
    say: Callable[[str], None],
) -> Kept:
    """Return the graph with as few layers in float as its budget allows.

    The layers go back in the order of `layers`; how many is found by bisection, and those among them that the budget
    does not need stay in integers, as 95 % of the arithmetic do where it is possible.

    Args:
        quantized: The graph.
        floating: The float graph that it was made from.
        placement: That of the graph.
        judge: Measures.
        budget: What may be lost.
        trained: As for `layers`.
        say: Told what is being done.

    Raises:
        LimitError: The budget cannot be kept by a graph of which half is integers; says what was reached.
    """
    loss = judge.loss(quantized)
    if budget.holds(loss):
        return Kept(model=quantized, loss=loss, released=())
    if not placement.floats:
        raise _missed(loss, budget, quantized, "the engine computes no single layers in float", trained=trained)
    say(f"{budget.missed(loss)}: looking for the layers to leave in float")
    found = layers(quantized, floating, placement, judge, trained=trained)
    losses: dict[frozenset[str], Loss] = {frozenset(): loss}

    def released(layers_: Sequence[Layer]) -> onnx.ModelProto:
        names = [name for layer in layers_ for name in layer.nodes]
        return release(quantized, names, placement, None if trained else floating)

    def loss_with(layers_: Sequence[Layer]) -> Loss:
        key = frozenset(layer.name for layer in layers_)
        if key not in losses:
            losses[key] = judge.loss(released(layers_))
        return losses[key]

    def fits(layers_: Sequence[Layer]) -> bool:
        return budget.holds(loss_with(layers_))

    # Errors partly make up for each other: the layers that seem to do no harm alone are taken only if all must be.
    orders = [
        _affordable(layers_, floating, least)
        for least in (MOSTLY_INTEGER_PERMILLE, LEAST_INTEGER_PERMILLE)
        for layers_ in ([x for x in found if x.harm_udb > 0], found)
    ]
    order = next(filter(fits, orders), None)
    if order is None:
        best = min(orders, key=lambda layers_: budget.over_mdb(loss_with(layers_)))
        how = f"with {', '.join(layer.name for layer in best) or 'nothing'} in float"
        raise _missed(loss_with(best), budget, released(best), how, trained=trained)
    few, chosen = 0, order
    while len(chosen) - few > 1:
        middle = (few + len(chosen)) // 2
        if fits(order[:middle]):
            chosen = order[:middle]
        else:
            few = middle
    # Beside the layer that decided it, those before it may not be needed.
    while spare := [x for x in chosen if fits(_without(chosen, x))]:
        chosen = _without(chosen, max(spare, key=lambda layer: layer.cost_us))
    names = tuple(layer.name for layer in chosen)
    say(f"in float: {', '.join(names)}; it loses {loss_with(chosen).mean_mdb / 1000:.3f} dB")
    return Kept(model=released(chosen), loss=loss_with(chosen), released=names)


def _without(layers_: Sequence[Layer], one: Layer) -> list[Layer]:
    return [layer for layer in layers_ if layer is not one]


def _affordable(found: Sequence[Layer], floating: onnx.ModelProto, least_permille: int) -> list[Layer]:
    """Return the layers that can go back one after the other with that share of the arithmetic left in integers."""
    whole = sum(macs_by_node(floating, _SIDE, _SIDE).values())
    left, chosen = whole, list[Layer]()
    for layer in found:
        if left - layer.integer_macs >= whole * least_permille / 1000:
            left -= layer.integer_macs
            chosen.append(layer)
    return chosen


def _missed(loss: Loss, budget: Budget, model: onnx.ModelProto, how: str, *, trained: bool) -> LimitError:
    missed = budget.missed(loss)
    training = (
        "train it for more steps (quantization.qat.steps) or on pictures like yours (data.train)"
        if trained
        else "train with its rounding (quantization.qat.steps)"
    )
    return LimitError(
        f"{missed}; that is the best reached, {how}, {integer_macs_permille(model) / 10:.1f} % of the arithmetic in "
        "integers",
        remedy=f"{training}, take a larger student, or raise budgets.{missed.partition(':')[0]}",
    )


def integer_macs_permille(model: onnx.ModelProto) -> int:
    """Return the share of multiply-accumulates whose weights are integers, in thousandths."""
    return integer_permille(model, frozenset(integer_convolutions(model)))


def _inputs(model: onnx.ModelProto) -> list[list[str]]:
    return [list(node.input) for node in model.graph.node]
