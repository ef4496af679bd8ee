"""Losses of restoration and of distillation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

CHARBONNIER_EPSILON = 1e-3


def charbonnier(got: Tensor, want: Tensor) -> Tensor:
    """Return the mean of sqrt(difference^2 + eps^2), a smooth L1 (Charbonnier 1994), a scalar."""
    return torch.sqrt((got - want).square() + CHARBONNIER_EPSILON**2).mean()


def mean_squared(got: Tensor, want: Tensor) -> Tensor:
    """Return the mean squared error, a scalar."""
    return (got - want).square().mean()


def feature_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean squared distance of two maps, each normalised to unit RMS per picture, a scalar.

    A teacher's map of another size is first averaged to the student's (n, c, h, w).
    """
    if teacher.shape[-2:] != student.shape[-2:]:
        height, width = student.shape[-2:]
        teacher = nn.functional.adaptive_avg_pool2d(teacher, (height, width))
    return (_unit_rms(student) - _unit_rms(teacher)).square().mean()


def _unit_rms(x: Tensor) -> Tensor:
    x = x.float()
    scale: Tensor = x.square().mean((1, 2, 3), keepdim=True).add(1e-12).rsqrt()
    return x * scale
