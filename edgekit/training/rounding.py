"""The rounding of INT8 while a network trains in float, so that the weights it ends with lose little when quantized.

Quantization-aware training (edgekit/compress/qat.py) is done on the quantized graph, in minutes and for one engine.
This lasts as long as the training itself and serves every engine: rounded is what the engine with the most roundings
rounds, ONNX Runtime, behind every convolution and every addition.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from edgekit.errors import InputError
from edgekit.models.blocks import InvertedResidual, ResidualDoubleConv
from edgekit.models.denoiser import Denoiser
from edgekit.models.mobile import MobileUnet
from edgekit.models.plain import PlainUnet

# Ranges change slowly, and finding one takes longer than rounding.
_LOOK_EVERY = 25
_KEPT = 0.8
# Of the values of a map, left out at either end; looked at are this many.
_OUTSIDE = 1e-4
_MOST_VALUES = 400_000
_MOST_WEIGHT = 127
_LEAST = 1e-8


class Rounding(nn.ModuleList):
    """What rounds the maps and weights of a student while it is in training mode; one `MapRounding` for each map.

    It begins when `begin` says so.

    Args:
        net: The student. bits: Of a map; weights have 8.

    Raises:
        InputError: A network without an INT8 form of its own: a teacher, or DnCNN.
    """

    def __init__(self, net: Denoiser, bits: int) -> None:
        super().__init__()
        self.rounds, self._bits = False, bits
        reads, gives = places(net)
        for module in reads:
            module.register_forward_pre_hook(self._before())
        for module in gives:
            module.register_forward_hook(self._behind())

    def begin(self, step: int, *, rounds: Callable[[int], bool]) -> None:
        """Say which step comes. Whether it is rounded is asked of the last step in which the ranges follow the maps."""
        before, self.rounds = self.rounds, rounds(step - step % _LOOK_EVERY)
        # By the clock it may begin at any step, and a map without a range is rounded to nothing.
        begins = self.rounds and not before
        for rounding in self:
            assert isinstance(rounding, MapRounding)
            rounding.looks = step % _LOOK_EVERY == 0 or (begins and rounding.is_empty())

    @staticmethod
    def weights(net: nn.Module) -> dict[str, Tensor]:
        """Return the weights of the convolutions by name, rounded to 8 bits per output channel."""
        return {
            f"{name}.weight": _straight(module.weight, *_of_weights(module.weight))
            for name, module in net.named_modules()
            if isinstance(module, nn.Conv2d)
        }

    def _new(self) -> MapRounding:
        rounding = MapRounding(self._bits)
        self.append(rounding)
        return rounding

    def _before(self) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...] | None]:
        rounding = self._new()
        return lambda module, given: (rounding(given[0]), *given[1:]) if module.training and self.rounds else None

    def _behind(self) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor | None]:
        rounding = self._new()
        return lambda module, given, result: rounding(result) if module.training and self.rounds else None


class MapRounding(nn.Module):
    """Rounds a map to 2 ** bits values of a range that follows it and holds zero.

    Gradients pass as if it did not, but for those of the values that the range leaves out.
    """

    low: Tensor
    high: Tensor

    def __init__(self, bits: int) -> None:
        super().__init__()
        self._steps = 2**bits - 1
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.zeros(()))
        self.looks = True

    def forward(self, x: Tensor) -> Tensor:
        """Return the rounded map, of the same type."""
        if self.looks:
            self._follow(x.detach())
        scale = (self.high - self.low).clamp_min(_LEAST) / self._steps
        return _straight(x, scale, torch.round(-self.low / scale), self._steps)

    def is_empty(self) -> bool:
        """Return whether no map was looked at yet, or nothing but zeros."""
        return bool(self.high <= self.low)

    @torch.no_grad()
    def _follow(self, x: Tensor) -> None:
        values = x.flatten()[:: max(1, x.numel() // _MOST_VALUES)].float()
        outside = max(1, round(_OUTSIDE * values.numel()))
        low = torch.topk(values, outside, largest=False).values[-1].clamp_max(0)
        high = torch.topk(values, outside).values[-1].clamp_min(0)
        kept = torch.where(self.high > self.low, _KEPT, 0.0)
        self.low.lerp_(low, 1 - kept)
        self.high.lerp_(high, 1 - kept)


class _Straight(torch.autograd.Function):
    """Rounds to scale x (integer - zero), 0 to `most`; the gradient goes straight through (Bengio et al., 2013).

    A value that is clipped gets none, or it would be pushed farther out, where rounding hides it and floats do not.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, scale: Tensor, zero: Tensor, most: int) -> Tensor:
        # Few passes, and bounds that are plain numbers: this runs on every map of every step.
        exact = x.mul(1 / scale).add_(zero)
        ctx.save_for_backward(exact)
        ctx.most = most  # type: ignore[attr-defined]
        return exact.round().clamp_(0, most).sub_(zero).mul_(scale)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (exact,) = ctx.saved_tensors  # type: ignore[attr-defined]
        inside = torch.ops.aten.hardtanh_backward(gradient, exact, -0.5, ctx.most + 0.5)  # type: ignore[attr-defined]
        return inside, None, None, None


def _straight(x: Tensor, scale: Tensor, zero: Tensor, most: int) -> Tensor:
    rounded: Tensor = _Straight.apply(x, scale, zero, most)  # type: ignore[no-untyped-call]
    return rounded


def _of_weights(weight: Tensor) -> tuple[Tensor, Tensor, int]:
    """Return the scale of each output channel, the zero point and the largest integer, as `_straight` takes them."""
    scale = weight.detach().abs().amax((1, 2, 3), keepdim=True).clamp_min(_LEAST) / _MOST_WEIGHT
    return scale, scale.new_tensor(_MOST_WEIGHT), 2 * _MOST_WEIGHT


def has_form(net: Denoiser) -> TypeGuard[MobileUnet | PlainUnet]:
    """Return whether a network is one that can be trained with the rounding of INT8."""
    return isinstance(net, MobileUnet | PlainUnet)


def places(net: Denoiser) -> tuple[list[nn.Module], list[nn.Module]]:
    """Return the modules whose first input is rounded, and those whose result is; raises as `Rounding`."""
    if not has_form(net):
        raise InputError(
            f"training.rounding_from: {type(net).__name__} has no INT8 form to be trained for",
            remedy="leave it out, or take a student",
        )
    # What enters a decoder is the sum of a skip, which no module gives.
    reads: list[nn.Module] = [net.head, *_each(net.decoder)]
    gives: list[nn.Module] = [net.head, *_each(net.down), *_each(net.up), net.tail]
    if net.level is not None:
        gives.append(net.level)
    for module in net.modules():
        if isinstance(module, InvertedResidual):
            gives += [module.act1, module.act2, module.project, module]
        elif isinstance(module, ResidualDoubleConv):
            gives += [module.body[1], module.body, module]
    return reads, gives


def _each(part: nn.Module) -> list[nn.Module]:
    return list(part) if isinstance(part, nn.ModuleList) else [part]
