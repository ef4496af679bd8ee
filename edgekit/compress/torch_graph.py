"""ONNX graphs, float or with quantize-dequantize (QDQ) pairs, as torch networks that are trained and written back."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import TypeAlias, cast

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from edgekit.compress.torch_operators import ARITHMETIC, HALVES, OPERATORS, OPSETS, Node, read
from edgekit.errors import UnsupportedError, is_out_of_memory
from edgekit.graph.checks import DENOISED, NOISY, SIGMA, opset
from edgekit.graph.cost import infer_shapes
from edgekit.graph.walk import CONVOLUTIONS, copied, initializers

Stored: TypeAlias = NDArray[np.generic]

_RANGES = {"int8": (-128, 127), "uint8": (0, 255), "int16": (-32768, 32767), "uint16": (0, 65535)}
# Processors whose sums of two products saturate get weights of 7 bits.
_SEVEN_BITS = 64
_NARROWER = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
_SCALES = ("log_scale", ".zero")


class ActivationQuantizer(nn.Module):
    """Rounds a tensor to `scale * (integer - zero_point)` for all pairs of the graph that share one scale.

    The scale is learned by its logarithm, so that a step of the optimizer moves every scale by the same ratio (Jain et
    al., "Trained Quantization Thresholds", 2020), with the gradient of learned step sizes (Esser et al., "Learned Step
    Size Quantization", 2020); the factor that the latter put before it cancels in Adam. The zero point is an integer,
    so that zero is always exact; it is learned only where it lies inside the range: at the range's end it is a ReLU, at
    zero of a signed type it is symmetric.
    """

    def __init__(self, scale: Stored, zero_point: Stored, *, may_move: bool) -> None:
        super().__init__()
        self.low, self.high = _RANGES[zero_point.dtype.name]
        zero = int(zero_point.reshape(-1)[0])
        self.log_scale = nn.Parameter(torch.tensor([math.log(float(scale.reshape(-1)[0]))]))
        # In parts of the range, as one step of the optimizer moves it about as far as it moves a scale.
        place = torch.tensor([(zero - self.low) / (self.high - self.low)])
        self.zero: nn.Parameter | None = None
        if may_move and zero != self.low and not (zero == 0 and self.low < 0):
            self.zero = nn.Parameter(place)
        else:
            self.register_buffer("fixed_zero", place)

    def scale(self) -> Tensor:
        """Return the scale (1,), with its gradient."""
        return self.log_scale.exp()

    def zero_point(self) -> Tensor:
        """Return the zero point (1,), a whole number as float32; its gradient passes the rounding."""
        place = cast(Tensor, self.fixed_zero) if self.zero is None else self.zero
        return self.low + _round(place.clamp(0, 1) * (self.high - self.low))

    @torch.no_grad()
    def fit(self, x: Tensor, weight: Tensor) -> None:
        """Narrow the range to where the weighted squared error of x (n, c, h, w) is least; `weight` is (n, 1, 1, 1)."""
        wanted = x.clamp(min=0) if int(self.zero_point()) == self.low else x
        widest, errors = self.log_scale.clone(), {}
        for part in _NARROWER:
            self.log_scale.copy_(widest + math.log(part))
            errors[part] = float(((self(x) - wanted).square() * weight).mean())
        self.log_scale.copy_(widest + math.log(min(_NARROWER, key=errors.__getitem__)))

    def forward(self, x: Tensor) -> Tensor:
        """Return what the integers stand for, shaped as x."""
        result: Tensor = _Rounded.apply(x, self.scale(), self.zero_point(), self.low, self.high)  # type: ignore[no-untyped-call]
        return result


class WeightQuantizer(nn.Module):
    """Float weights that are rounded to integers times a scale, one per channel or one for all; symmetric."""

    def __init__(self, values: Stored, scale: Stored, *, axis: int, low: int, high: int) -> None:
        super().__init__()
        self.low, self.high, self.axis = low, high, axis
        self.values = nn.Parameter(torch.from_numpy(values.astype(np.float32)))
        self.log_scale = nn.Parameter(torch.from_numpy(np.log(scale.astype(np.float64)).reshape(-1)).float())

    def scale(self) -> Tensor:
        """Return the scales, one for each channel or a single one: (n,)."""
        return self.log_scale.exp()

    def integers(self) -> Tensor:
        """Return the integers as float32, shaped as the weights; gradients pass the rounding, and stop at the clip."""
        return self._rounded(self._along(self.scale()))

    def original(self) -> Tensor:
        """Return the float weights."""
        return self.values

    def forward(self) -> Tensor:
        """Return what the integers stand for, shaped as the weights."""
        scale = self._along(self.scale())
        return self._rounded(scale) * scale

    def _rounded(self, scale: Tensor) -> Tensor:
        return _round((self.values / scale).clamp(self.low, self.high))

    def _along(self, scale: Tensor) -> Tensor:
        if scale.numel() == 1:
            return scale.reshape(())
        return scale.reshape(tuple(-1 if i == self.axis else 1 for i in range(self.values.dim())))


class BiasQuantizer(nn.Module):
    """Float biases that are rounded to int32; their scale is that of the convolution's sums, input times weight."""

    def __init__(self, values: Stored, scale: Stored, step: Callable[[], Tensor] | None) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.from_numpy(values.astype(np.float32)))
        self._own = torch.from_numpy(scale.astype(np.float32).reshape(-1))
        self._step = step

    def scale(self) -> Tensor:
        """Return the scales (n,); no gradient passes them."""
        return self._own if self._step is None else self._step().detach()

    def integers(self) -> Tensor:
        """Return the integers, not yet rounded, as float64, which holds all of int32."""
        return self.values.double() / self.scale().double()

    def forward(self) -> Tensor:
        """Return what the integers stand for, shaped as the biases."""
        scale = self.scale()
        return _round(self.values / scale) * scale


class FloatValues(nn.Module):
    """Values that stay in float: weights, biases, or an operand of an addition or a product."""

    def __init__(self, values: Stored) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.from_numpy(values.astype(np.float32)))

    def forward(self) -> Tensor:
        """Return the values."""
        return self.values


class TorchGraph(nn.Module):
    """An ONNX graph that computes in torch what ONNX Runtime computes, with its weights and scales as parameters.

    Float weights and biases of convolutions, and float operands of sums and products, are parameters; so are the float
    originals of integer weights, their scales, and those of the activations. Everything else is constant.

    A pair around a tensor is computed by its first half, and a constant by the node that dequantizes it:

    ```
    x ─ QuantizeLinear ─ DequantizeLinear ─ conv        x ─ ActivationQuantizer ─ (passed on) ─ conv
    int8 weight ─ DequantizeLinear ─────────┤      ->   WeightQuantizer ────────────────────────┤
    int32 bias ─ DequantizeLinear ──────────┘           BiasQuantizer ──────────────────────────┘
    ```
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        """Read a graph; it is not changed.

        Raises:
            UnsupportedError: An operator, or a form of one, that is not followed; names the operator and the node.
        """
        super().__init__()
        if opset(model) not in OPSETS:
            raise UnsupportedError(
                f"the graph is of opset {opset(model)}; {OPSETS.start} to {OPSETS.stop - 1} can be trained",
                remedy="export it with opset 17",
            )
        self._model = copied(model)
        self._stored = {name: numpy_helper.to_array(tensor) for name, tensor in initializers(model).items()}
        self._nodes: list[Node] = []
        for proto in model.graph.node:
            if proto.op_type == "Constant":
                self._stored[proto.output[0]] = _constant(proto)
            else:
                self._nodes.extend(read(proto))
        self._made_by = {node.output: node for node in self._nodes}
        self._last_use = {name: i for i, node in enumerate(self._nodes) for name in node.inputs}
        self._parts = nn.ModuleDict()
        self._places: dict[str, str] = {}
        self._present: dict[str, Callable[[], Tensor]] = {}
        self._add_activations()
        self._add_weights()
        self._add_biases()
        self._add_floats()

    def forward(self, noisy: Tensor, sigma: Tensor) -> Tensor:
        """Return the denoised pictures (n, c, h, w); `sigma` (n, 1, 1, 1) is not read by a blind graph."""
        return self.tensors(noisy, sigma, (DENOISED,))[DENOISED]

    def tensors(self, noisy: Tensor, sigma: Tensor, wanted: Collection[str]) -> dict[str, Tensor]:
        """Return the tensors of these names for noisy pictures (n, c, h, w) and their noise levels (n, 1, 1, 1)."""
        found = {NOISY: noisy, SIGMA: sigma}
        for index, node in enumerate(self._nodes):
            found[node.output] = self._computed(node, found)
            for name in node.inputs:
                if self._last_use[name] == index and name not in wanted:
                    found.pop(name, None)
        return {name: found[name] for name in wanted}

    def fit_ranges(self, noisy: Tensor, sigma: Tensor, weight: Tensor) -> None:
        """Narrow the ranges of the activations, one after the other, to where each rounds its tensor best.

        The largest value of many pictures sets a range that hardly any pixel uses; clipping it costs less than the
        finer steps win.

        Args:
            noisy: Pictures (n, c, h, w).
            sigma: Their noise levels (n, 1, 1, 1).
            weight: How much the squared error of each picture counts (n, 1, 1, 1).
        """
        fitted: set[nn.Module] = set()

        def fit(module: nn.Module, given: tuple[Tensor, ...]) -> None:
            if module not in fitted and isinstance(module, ActivationQuantizer):
                fitted.add(module)
                module.fit(given[0], weight)

        handles = [part.register_forward_pre_hook(fit) for part in self._parts.values()]
        with torch.no_grad():
            self(noisy, sigma)
        for handle in handles:
            handle.remove()

    def made(self) -> tuple[str, ...]:
        """Return the names of the tensors that the graph computes, in its order."""
        return tuple(node.output for node in self._nodes)

    def scales(self) -> list[nn.Parameter]:
        """Return the logarithms of the scales, and the places of the zero points that are learned."""
        return [p for name, p in self.named_parameters() if name.endswith(_SCALES)]

    def values(self) -> list[nn.Parameter]:
        """Return the weights, the biases and the other float operands."""
        return [p for name, p in self.named_parameters() if not name.endswith(_SCALES)]

    def weights(self) -> dict[str, WeightQuantizer | FloatValues]:
        """Return the part that holds the weights of each convolution, by the convolutions' names."""
        found = {n.name: self._part(n.inputs[1]) for n in self._nodes if n.operator in CONVOLUTIONS}
        return {name: part for name, part in found.items() if isinstance(part, WeightQuantizer | FloatValues)}

    @torch.no_grad()
    def written(self) -> onnx.ModelProto:
        """Return the graph with the present weights, scales, zero points and biases; nothing else is changed."""
        result = copied(self._model)
        for tensor in result.graph.initializer:
            if tensor.name in self._present:
                value = self._present[tensor.name]().double().numpy(force=True)
                tensor.CopyFrom(numpy_helper.from_array(_like(value, self._stored[tensor.name]), tensor.name))
        return result

    def _computed(self, node: Node, found: Mapping[str, Tensor]) -> Tensor:
        part = self._parts[self._places[node.output]] if node.output in self._places else None
        if part is not None:
            made: Tensor = part(found[node.inputs[0]]) if isinstance(part, ActivationQuantizer) else part()
            return made
        if node.operator == "DequantizeLinear":
            return found[node.inputs[0]]
        given = [self._input(name, found) for name in node.inputs]
        try:
            return OPERATORS[node.operator](node, given)
        except (RuntimeError, ValueError, IndexError) as error:
            # Maps of other dimensions than pictures have, or a shape that holds for one picture alone.
            if is_out_of_memory(error):
                raise
            raise node.unsupported(f"what torch cannot compute so ({str(error).splitlines()[0]})") from error

    def _input(self, name: str, found: Mapping[str, Tensor]) -> Tensor | None:
        if not name or name in found:
            return found.get(name)
        if name in self._places:
            value: Tensor = self._parts[self._places[name]]()
            return value
        return torch.from_numpy(self._stored[name].copy())

    def _part(self, name: str) -> nn.Module | None:
        """Return the part behind a tensor, through the second half of a pair."""
        node = self._made_by.get(name)
        if name not in self._places and node is not None and node.operator == "DequantizeLinear":
            name = node.inputs[0]
        return self._parts[self._places[name]] if name in self._places else None

    def _add(self, part: nn.Module, tensors: Iterable[str]) -> None:
        key = str(len(self._parts))
        self._parts[key] = part
        self._places |= dict.fromkeys(tensors, key)

    def _write_with(self, names: Iterable[str], value: Callable[[], Tensor], node: Node) -> None:
        for name in names:
            if name in self._present:
                raise node.unsupported(f"reads '{name}', which belongs to another pair as well")
            self._present[name] = value

    def _dequantizers(self, node: Node) -> list[Node]:
        return [n for n in self._nodes if n.operator == "DequantizeLinear" and n.inputs[0] == node.output]

    def _add_activations(self) -> None:
        """Make one quantizer for all pairs that share a scale."""
        groups: dict[str, list[Node]] = {}
        for node in self._nodes:
            if node.operator == "QuantizeLinear" and node.inputs[0] not in self._stored:
                groups.setdefault(node.inputs[1], []).append(node)
        halves = {scale: [h for n in nodes for h in (n, *self._dequantizers(n))] for scale, nodes in groups.items()}
        users = Counter(zero for nodes in halves.values() for zero in {z for n in nodes for z in n.inputs[2:]})
        for scale, nodes in groups.items():
            scales, zeros = ({n.inputs[i] for n in halves[scale] if len(n.inputs) > i} for i in (1, 2))
            quantizer = self._activation_quantizer(
                nodes[0], scales, zeros, may_move=bool(zeros) and all(users[z] == 1 for z in zeros)
            )
            self._add(quantizer, [n.output for n in nodes])
            self._write_with(scales, quantizer.scale, nodes[0])
            if quantizer.zero is not None:
                self._write_with(zeros, quantizer.zero_point, nodes[0])

    def _activation_quantizer(
        self, node: Node, scales: set[str], zeros: set[str], *, may_move: bool
    ) -> ActivationQuantizer:
        scale = self._stored[node.inputs[1]]
        found = [self._stored[z] for z in sorted(zeros)] or [np.zeros((), np.uint8)]
        if scale.size != 1:
            raise node.unsupported("an activation with several scales")
        if any(self._stored[s] != scale for s in scales):
            raise node.unsupported("dequantized with another scale than it was quantized with")
        if any(z.dtype != found[0].dtype or z != found[0] for z in found):
            raise node.unsupported("one scale with several zero points")
        if found[0].dtype.name not in _RANGES:
            raise node.unsupported(f"quantized to {found[0].dtype.name}")
        return ActivationQuantizer(scale, found[0], may_move=may_move)

    def _add_weights(self) -> None:
        """Make the quantizers of weights, which are stored as integers, or as floats in front of a whole pair."""
        narrow = self._weight_limit()
        for node in self._nodes:
            stored = self._stored.get(node.inputs[0])
            if stored is None or node.operator not in HALVES or stored.dtype == np.int32:
                continue
            scale, zero = self._stored[node.inputs[1]], [self._stored[z] for z in node.inputs[2:]]
            kind = zero[0].dtype.name if zero else stored.dtype.name
            if kind not in ("int8", "int16") or any(z.any() for z in zero) or scale.ndim > 1:
                raise node.unsupported(f"weights that are not symmetric {kind} per channel or per tensor")
            axis = node.integer("axis", 1) % stored.ndim
            values = stored
            if node.operator == "DequantizeLinear":
                values = stored * _along(scale, axis, stored.ndim)
            integers = node.operator == "DequantizeLinear"
            # Symmetric: the lowest integer would have no counterpart.
            limit = narrow if integers and kind == "int8" else _RANGES[kind][1]
            part = WeightQuantizer(values, scale, axis=axis, low=-limit, high=limit)
            self._add(part, [node.output])
            self._write_with([node.inputs[0]], part.integers if integers else part.original, node)
            self._write_with({n.inputs[1] for n in (node, *self._dequantizers(node))}, part.scale, node)

    def _weight_limit(self) -> int:
        """Return the largest magnitude of int8 weights: 127, or less where all were kept to 7 bits."""
        stored = [self._stored[n.inputs[0]] for n in self._nodes if n.inputs[0] in self._stored]
        peak = max((int(np.abs(w.astype(np.int16)).max()) for w in stored if w.dtype == np.int8), default=127)
        return peak if peak <= _SEVEN_BITS else 127

    def _add_biases(self) -> None:
        for node in self._nodes:
            stored = self._stored.get(node.inputs[0])
            if node.operator != "DequantizeLinear" or stored is None or stored.dtype != np.int32:
                continue
            scale = self._stored[node.inputs[1]]
            step = self._step_of_sums(node, scale.size)
            part = BiasQuantizer(stored * scale, scale, step)
            self._add(part, [node.output])
            self._write_with([node.inputs[0]], part.integers, node)
            self._write_with([node.inputs[1]], part.scale, node)

    def _step_of_sums(self, bias: Node, size: int) -> Callable[[], Tensor] | None:
        """Return the scale of the sums of the one convolution that reads a bias; None where it is not of integers."""
        readers = [n for n in self._nodes if bias.output in n.inputs]
        if len(readers) != 1 or readers[0].operator not in CONVOLUTIONS:
            return None
        source, weight = (self._part(name) for name in readers[0].inputs[:2])
        if not isinstance(source, ActivationQuantizer) or not isinstance(weight, WeightQuantizer):
            return None
        if weight.log_scale.numel() != size:
            return None
        return lambda: source.scale() * weight.scale()

    def _add_floats(self) -> None:
        for node in self._nodes:
            for name in node.inputs[1:] if node.operator in CONVOLUTIONS else node.inputs:
                stored = self._stored.get(name)
                if stored is None or name in self._places or stored.dtype != np.float32 or stored.size < 2:
                    continue
                if node.operator in CONVOLUTIONS or node.operator in ARITHMETIC:
                    part = FloatValues(stored)
                    self._add(part, [name])
                    self._write_with([name], part, node)


def lowest(model: onnx.ModelProto, names: Collection[str]) -> str | None:
    """Return the last of the named tensors that have the fewest pixels, planes of a single pixel left out."""
    shapes = {name: shape for name, shape in infer_shapes(model, 64, 64).items() if name in names}
    pixels = {name: math.prod(s[2:]) for name, s in shapes.items() if len(s) == 4 and math.prod(s[2:]) > 1}
    order = [node.output[0] for node in model.graph.node if node.output[0] in pixels]
    return max((n for n in order if pixels[n] == min(pixels.values())), key=order.index, default=None)


class _Rounded(torch.autograd.Function):
    """Quantizes and dequantizes; the gradients are those of learned step sizes, in few passes over the memory."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, scale: Tensor, zero: Tensor, low: int, high: int) -> Tensor:
        ctx.limits = low - float(zero), high - float(zero)  # type: ignore[attr-defined]
        exact = x / scale
        integers = exact.round().clamp_(*ctx.limits)  # type: ignore[attr-defined]
        ctx.save_for_backward(exact, integers, scale)
        return integers * scale

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None, None]:
        exact, integers, scale = ctx.saved_tensors  # type: ignore[attr-defined]
        low, high = ctx.limits  # type: ignore[attr-defined]
        inside: Tensor = torch.ops.aten.hardtanh_backward(gradient, exact, low - 0.5, high + 0.5)
        of_scale = _dot(gradient, integers) - _dot(inside, exact)
        of_zero = -scale * (gradient.sum() - inside.sum()) if ctx.needs_input_grad[2] else None  # type: ignore[attr-defined]
        return inside, of_scale.reshape(1), of_zero, None, None


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Return the sum of the products of two tensors, in the order in which both lie in memory if it is the same."""
    if a.stride() == b.stride() and (a.is_contiguous() or a.is_contiguous(memory_format=torch.channels_last)):
        return torch.dot(a.as_strided((a.numel(),), (1,)), b.as_strided((b.numel(),), (1,)))
    return (a * b).sum()


def _round(x: Tensor) -> Tensor:
    """Return x rounded, half to even as ONNX does; gradients pass unchanged."""
    return x + (x.round() - x).detach()


def _along(scale: Stored, axis: int, rank: int) -> Stored:
    """Return scales shaped to be multiplied with weights; a single one stays as it is."""
    return scale.reshape(()) if scale.size == 1 else scale.reshape([-1 if i == axis else 1 for i in range(rank)])


def _like(value: NDArray[np.float64], stored: Stored) -> Stored:
    """Return a value in the type and shape of what was stored."""
    if stored.dtype.kind in "iu":
        limits = np.iinfo(stored.dtype.name)
        value = np.clip(np.rint(value), limits.min, limits.max)
    return value.astype(stored.dtype).reshape(stored.shape)


def _constant(proto: onnx.NodeProto) -> Stored:
    value = onnx.helper.get_attribute_value(proto.attribute[0])
    return numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else np.asarray(value)
