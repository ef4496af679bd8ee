"""Muon for the weights of dense convolutions, AdamW for all else.

torch.optim.Muon takes matrices only, and one after the other; this one takes convolutions, all of one shape at once.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

_MOMENTUM = 0.95
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
_SMALLEST_SIDE = 16


class Muon(torch.optim.AdamW):
    """AdamW, with Muon's step (Jordan 2024, kellerjordan.github.io/posts/muon) for the weights of dense convolutions.

    Muon's step is the momentum with all its singular values brought near 1, so that every direction of a convolution
    is learned equally fast; a weight (out, in, kh, kw) is the matrix (out, in * kh * kw). Scaled by
    0.2 * sqrt(larger side), as of Liu 2025 (arXiv 2502.16982), so that rates made for AdamW fit both. Depthwise
    convolutions, biases and what has a side below 16 get AdamW's step.

    precision: In which the singular values are brought together.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], *, lr: float, weight_decay: float, fused: bool, precision: torch.dtype
    ) -> None:
        super().__init__(parameters, lr=lr, weight_decay=weight_decay, fused=fused)
        self._precision = precision

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Make one step."""
        for group in self.param_groups:
            alike: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None and is_matrix(parameter):
                    alike[parameter.shape].append(parameter)
            for shape, weights in alike.items():
                momenta = torch.stack([self._momentum(weight) for weight in weights])
                updates = orthogonal(momenta.flatten(2).to(self._precision)).to(momenta.dtype).view(-1, *shape)
                rate = group["lr"] * 0.2 * math.sqrt(max(shape[0], shape[1:].numel()))
                torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(weights, list(updates.unbind()), alpha=-rate)
                for weight in weights:
                    weight.grad = None  # So AdamW passes over it.
        loss: float | None = super().step(closure)
        return loss

    def _momentum(self, weight: Tensor) -> Tensor:
        """Return Nesterov's momentum, with this step's gradient in it."""
        state: dict[str, Any] = self.state[weight]
        if "momentum" not in state:
            # AdamW, which loads the state of all, wants a step in each.
            state["step"], state["momentum"] = torch.zeros(()), torch.zeros_like(weight)
        gradient = weight.grad
        assert gradient is not None
        state["step"] += 1
        state["momentum"].lerp_(gradient, 1 - _MOMENTUM)
        return gradient.lerp(state["momentum"], _MOMENTUM)


def is_matrix(parameter: Tensor) -> bool:
    """Return whether Muon takes this parameter: the weight of a dense convolution, wide enough on both sides."""
    return (
        parameter.ndim == 4
        and parameter.shape[1] > 1
        and min(parameter.shape[0], parameter.shape[1:].numel()) >= _SMALLEST_SIDE
    )


def orthogonal(matrices: Tensor) -> Tensor:
    """Return matrices (n, rows, columns) with their singular values brought near 1, all but the smallest.

    Five of Newton and Schulz's iterations with Jordan's coefficients, which end within 0.6 and 1.25.
    """
    a, b, c = _COEFFICIENTS
    upright = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if upright else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if upright else x
