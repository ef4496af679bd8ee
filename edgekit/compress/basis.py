"""Residual trunks in the basis in which rounding them to 8 bits harms the output least.

```
conv(V, b) ─ + ─ + ─ conv(W)     ->   conv(R V, R b) ─ + ─ + ─ conv(W R^-1)       R invertible, one for a trunk
```
What flows through additions, from convolutions to convolutions, may be mixed by any invertible matrix: the graph
computes the same. One scale for all channels fits better then: no channel has outliers alone, and what the output
depends on most gets the most steps.

Language models are rotated so (QuaRot, Ashkboos et al., 2024; SpinQuant, Liu et al., 2024). Here R is any matrix, found
by gradient descent on an estimate of how far rounding moves the output: for each tensor of the trunk, squared step
times how the output's error grows with it; the same for what the rounding of their weights does to what convolutions
give. Factors of channels that pass a ReLU are `equalize`'s.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import Tensor

from edgekit.compress.ranges import Calibration
from edgekit.compress.torch_graph import TorchGraph
from edgekit.errors import UnsupportedError
from edgekit.graph.checks import DENOISED
from edgekit.graph.cost import infer_shapes
from edgekit.graph.reference import Reference, probe, relative_change
from edgekit.graph.walk import attribute, consumers, copied, group_count, initializers, is_noise_level, producers

log = logging.getLogger(__name__)

Shapes = Mapping[str, tuple[int, ...]]
Stored = Mapping[str, onnx.TensorProto]

MOST_CHANGE = 1e-3
_SIDE = 256
# Of each picture one pixel in so many is looked at, and of those the outermost are kept.
_STRIDE, _KEPT = 7, 64
_RATE = 0.01
# The exponent of the norm that stands for the largest of all channels and has a gradient for each.
_NORM = 30.0
_LEAST_SIGMA = 1 / 255
_ACTIVATION_STEPS, _WEIGHT_STEPS = 255, 127
_TINY = 1e-12


@dataclass(frozen=True, kw_only=True)
class Descent:
    """steps: Of a descent. coherent: How much more the rounding of weights counts than noise would.

    What the rounding of a weight does is alike at all pixels.
    """

    steps: int
    coherent: float


# What the estimate leaves out is worth as much as what it tells apart, and differs from network to network: the first
# is better for base, the second for nano (docs/int8-inside.md).
DESCENTS = (Descent(steps=200, coherent=3.0), Descent(steps=400, coherent=1.0))

# What was learned in this process, by what it was learned from: `compile` asks once for each engine.
_LEARNED: dict[str, list[dict[str, Tensor]]] = {}


@dataclass(frozen=True, kw_only=True)
class Trunk:
    """Tensors that share a basis.

    channels: Of the basis.
    planes: Tensor -> planes for each channel: 1, or as many as DepthToSpace makes one plane of.
    """

    channels: int
    planes: Mapping[str, int]


def other_bases(model: onnx.ModelProto, pictures: Calibration) -> tuple[onnx.ModelProto, ...]:
    """Return graphs that compute the same, their residual trunks in other bases; none where there is nothing to change.

    Which of them loses least in INT8, by how much, and whether less than in the basis that it was, rounding shows. Left
    out are bases in which the output moves by more than 1e-3 of its largest value; the log says so, as it does of an
    operator that training does not follow.

    Args:
        model: A checked float graph. It is not changed.
        pictures: Noisy pictures (1, c, h, w) with their sigma on the scale [0, 1].
    """
    found = trunks(model)
    if not found:
        return ()
    if (asked := _digest(model, pictures)) not in _LEARNED:
        try:
            _LEARNED[asked] = _learned(model, TorchGraph(model), found, pictures)
        except UnsupportedError as error:
            log.info("residual trunks keep their basis: %s", error)
            return ()
    noisy = probe(64, 96, pictures[0][0].shape[1], seed=0)
    before, changed = Reference(model)(noisy, 25 / 255), list[onnx.ModelProto]()
    for bases in _LEARNED[asked]:
        other = _written(model, bases)
        change = relative_change(Reference(other)(noisy, 25 / 255), before)
        if change <= MOST_CHANGE:
            changed.append(other)
        else:
            log.info("a basis of residual trunks moved the output by %.2g of its largest value: left out", change)
    return tuple(changed)


def _digest(model: onnx.ModelProto, pictures: Calibration) -> str:
    """Return a hash of all that decides which bases are learned; sums depend on the number of threads."""
    digest = hashlib.sha256(repr((DESCENTS, torch.get_num_threads(), len(pictures))).encode())
    digest.update(model.SerializeToString(deterministic=True))
    for noisy, sigma in pictures:
        digest.update(repr((noisy.shape, str(noisy.dtype), sigma)).encode())
        digest.update(noisy.tobytes())
    return digest.hexdigest()


def trunks(model: onnx.ModelProto) -> tuple[Trunk, ...]:
    """Return what can have another basis: maps made and read by convolutions over all channels, added and moved."""
    shapes, stored = infer_shapes(model, _SIDE, _SIDE), initializers(model)
    made_by, readers = producers(model), consumers(model)
    passed = {node.output[0]: _passed(node, shapes, stored) for node in model.graph.node}
    ways: dict[str, set[str]] = {name: set() for name in (*passed, *(n for maps in passed.values() for n in maps))}
    for result, maps in passed.items():
        for name in maps:
            ways[result].add(name)
            ways[name].add(result)

    def may_change(name: str) -> bool:
        made = made_by.get(name)
        return (
            made is not None
            and name != DENOISED
            and (bool(passed[name]) or is_noise_level(made, stored) or _is_dense(made))
            and all(name in passed[n.output[0]] or (_is_dense(n) and name == n.input[0]) for n in readers[name])
        )

    found, left = list[Trunk](), dict.fromkeys(passed)
    while left:
        names = _reached(next(iter(left)), ways)
        left = dict.fromkeys(name for name in left if name not in names)
        if not all(may_change(name) for name in names):
            continue
        channels = min(shapes[name][1] for name in names)
        if channels > 1 and not any(shapes[name][1] % channels for name in names):
            found.append(Trunk(channels=channels, planes={name: shapes[name][1] // channels for name in names}))
    return tuple(found)


def _passed(node: onnx.NodeProto, shapes: Shapes, stored: Stored) -> tuple[str, ...]:
    """Return the maps that a node adds or moves, all channels alike; none where it does anything else."""
    if node.op_type == "Add" and stored.keys().isdisjoint(node.input):
        maps = tuple(node.input)
    elif node.op_type == "Resize" or _is_shuffle(node):
        maps = tuple(node.input[:1])
    else:
        return ()
    return maps if {len(shapes.get(name, ())) for name in (*maps, node.output[0])} == {4} else ()


def _reached(start: str, ways: Mapping[str, set[str]]) -> dict[str, None]:
    found, left = {start: None}, [start]
    while left:
        new = sorted(ways[left.pop()] - found.keys())
        found.update(dict.fromkeys(new))
        left += new
    return found


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """What was seen of a tensor of c channels.

    values: Outlying pixels (c, n).
    harm: How the output's squared error grows with the products of the channels' errors (c, c).
    """

    values: Tensor
    harm: Tensor


@dataclass(frozen=True, kw_only=True)
class _Maker:
    """A convolution that makes a tensor of a trunk: its result, its weights (o, n), and the power of what it reads."""

    result: str
    weights: Tensor
    power: float


def _learned(
    model: onnx.ModelProto, graph: TorchGraph, found: Sequence[Trunk], pictures: Calibration
) -> list[dict[str, Tensor]]:
    """Return, for each descent, the matrix of each tensor that gets another basis."""
    made_by, readers, stored = producers(model), consumers(model), initializers(model)
    names = {name for trunk in found for name in trunk.planes}
    made = {name: made_by[name] for name in names if made_by[name].op_type == "Conv"}
    seen, powers = _look(graph, pictures, sorted(names), sorted({node.input[0] for node in made.values()}))

    def maker(result: str) -> _Maker:
        weights = torch.from_numpy(numpy_helper.to_array(stored[made[result].input[1]]).copy())
        taps = weights.shape[2] * weights.shape[3]
        return _Maker(result=result, weights=weights.flatten(1), power=taps * powers[made[result].input[0]])

    learned = [dict[str, Tensor]() for _ in DESCENTS]
    for trunk in found:
        rounded = [n for n in trunk.planes if any(r.op_type in ("Conv", "Add") for r in readers[n])]
        makers = [maker(name) for name in trunk.planes if name in made]
        for descent, bases in zip(DESCENTS, learned, strict=True):
            basis = _basis(trunk, seen, rounded, makers, descent)
            bases |= {name: _for_planes(basis, planes) for name, planes in trunk.planes.items()}
    return learned


def _basis(
    trunk: Trunk, seen: Mapping[str, _Seen], rounded: Sequence[str], makers: Sequence[_Maker], descent: Descent
) -> Tensor:
    """Return the matrix (c, c) with which rounding moves the output least, by descent from the identity."""
    basis = torch.eye(trunk.channels, requires_grad=True)
    optimizer = torch.optim.Adam([basis], lr=_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, descent.steps)
    for _ in range(descent.steps):
        back = torch.linalg.inv(basis)
        parts = []
        for name in rounded:
            values = basis @ seen[name].values
            width = _largest(values.amax(1)) + _largest(-values.amin(1))
            parts.append((width / _ACTIVATION_STEPS).square() * _harm(seen[name], back).sum())
        for maker in makers:
            planes = trunk.planes[maker.result]
            steps = _largest((_for_planes(basis, planes) @ maker.weights).abs().T) / _WEIGHT_STEPS
            harm = _harm(seen[maker.result], _for_planes(back, planes))
            parts.append(descent.coherent * maker.power * (steps.square() * harm).sum())
        optimizer.zero_grad()
        torch.autograd.backward(torch.stack(parts).sum().log())
        optimizer.step()
        schedule.step()
    return basis.detach()


def _look(
    graph: TorchGraph, pictures: Calibration, names: Sequence[str], read: Sequence[str]
) -> tuple[dict[str, _Seen], dict[str, float]]:
    """Return what the tensors hold and how the output depends on them; and the power of those that are `read`.

    The power of a tensor is the mean square of all its values together, times its channels. The output need not depend
    on what is read: that may be the noise level itself.

    Random signs at the output's pixels, passed back, have the wanted products of derivatives for their mean products.
    """
    random = torch.Generator().manual_seed(0)
    found: dict[str, list[_Seen]] = {name: [] for name in names}
    powers = dict.fromkeys(read, 0.0)
    for noisy, sigma in pictures:
        given = torch.from_numpy(noisy).requires_grad_()
        tensors = graph.tensors(given, torch.full((1, 1, 1, 1), sigma), {*names, *read, DENOISED})
        denoised = tensors[DENOISED]
        signs = torch.randint(0, 2, denoised.shape, generator=random) * 2.0 - 1.0
        slopes = torch.autograd.grad(denoised, [tensors[name] for name in names], signs)
        # An error counts for more where the noise, and with it the denoiser's own error, is small.
        weight = 1 / ((sigma + _LEAST_SIGMA) * denoised.numel())
        for name, slope in zip(names, slopes, strict=True):
            found[name].append(_of_picture(tensors[name].detach()[0].flatten(1), slope[0].flatten(1), weight))
        for name in read:
            every = tensors[name].detach()[0].flatten(1)[:, ::_STRIDE].square().mean(1, keepdim=True)
            powers[name] += float(every.sum())
    joined = {
        name: _Seen(values=torch.cat([s.values for s in seen], 1), harm=torch.stack([s.harm for s in seen]).sum(0))
        for name, seen in found.items()
    }
    return joined, {name: power / len(pictures) for name, power in powers.items()}


def _of_picture(pixels: Tensor, slope: Tensor, weight: float) -> _Seen:
    """Return what was seen of one picture's pixels (c, n) and of the output's slope against them (c, n)."""
    some = pixels[:, ::_STRIDE]
    squares = some.square().mean(1, keepdim=True)
    outermost = (some / squares.sqrt().clamp(min=_TINY)).norm(dim=0).topk(min(_KEPT, some.shape[1])).indices
    return _Seen(values=some[:, outermost], harm=weight * (slope @ slope.T))


def _for_planes(basis: Tensor, planes: int) -> Tensor:
    """Return the basis of a tensor in which each channel lies in so many planes, one after the other."""
    return basis if planes == 1 else torch.kron(basis.contiguous(), torch.eye(planes, dtype=basis.dtype))


def _harm(seen: _Seen, back: Tensor) -> Tensor:
    """Return how the output's squared error grows with that of each channel (c,) of the new basis."""
    return ((seen.harm @ back) * back).sum(0)


def _largest(ends: Tensor) -> Tensor:
    """Return the largest along the first axis, 0 if none is above, smoothly in all of them."""
    positive = ends.clamp(min=0)
    scale = positive.detach().amax(0, keepdim=True).clamp(min=_TINY)
    return scale[0] * ((positive / scale) ** _NORM).sum(0).clamp(min=_TINY) ** (1 / _NORM)


def _written(model: onnx.ModelProto, bases: Mapping[str, Tensor]) -> onnx.ModelProto:
    """Return the graph whose tensors are in these bases."""
    changed = copied(model)
    stored = initializers(changed)

    def change(name: str, how: str, matrix: NDArray[np.float64]) -> None:
        values = np.einsum(how, numpy_helper.to_array(stored[name]).astype(np.float64), matrix)
        stored[name].CopyFrom(numpy_helper.from_array(values.astype(np.float32), name))

    matrices = {name: basis.double().numpy() for name, basis in bases.items()}
    for node in changed.graph.node:
        made, reads = node.output[0] in matrices, not matrices.keys().isdisjoint(node.input[:1])
        if node.op_type == "Conv" and reads:
            change(node.input[1], "oihw,ij->ojhw", np.linalg.inv(matrices[node.input[0]]))
        if node.op_type == "Conv" and made:
            change(node.input[1], "oihw,po->pihw", matrices[node.output[0]])
            if len(node.input) > 2:
                change(node.input[2], "o,po->p", matrices[node.output[0]])
        elif made and is_noise_level(node, stored):
            gain = stored[node.input[1]]
            del gain.dims[:]
            gain.dims.extend((1, len(matrices[node.output[0]]), 1, 1))
            change(node.input[1], "nohw,po->nphw", matrices[node.output[0]])
    return changed


def _is_dense(node: onnx.NodeProto) -> bool:
    return node.op_type == "Conv" and group_count(node) == 1


def _is_shuffle(node: onnx.NodeProto) -> bool:
    """Return whether a node is a DepthToSpace that takes each channel's planes one after the other."""
    return node.op_type == "DepthToSpace" and bool(attribute(node, "mode") == b"CRD")
