"""Losses of restoration and of distillation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

CHARBONNIER_EPSILON = 1e-3
# Squared errors far below this, 50 dB, count alike: flat patches would else decide everything.
_LEAST_SQUARED = 1e-5
# Makes its gradient as long as that of the others, which the clipping of gradients is set for.
_LOG_SQUARED_SCALE = 0.01


def charbonnier(got: Tensor, want: Tensor) -> Tensor:
    """Return the mean of sqrt(difference^2 + eps^2), a smooth L1 (Charbonnier 1994), a scalar."""
    return torch.sqrt((got - want).square() + CHARBONNIER_EPSILON**2).mean()


def mean_squared(got: Tensor, want: Tensor) -> Tensor:
    """Return the mean squared error, a scalar."""
    return (got - want).square().mean()


def log_squared(got: Tensor, want: Tensor) -> Tensor:
    """Return the mean over pictures (n, c, h, w) of the logarithm of the mean squared error, scaled, a scalar.

    It is the mean PSNR with the sign changed (Chen et al., "Simple Baselines for Image Restoration", 2022), so that a
    picture counts as much with little noise as with much, and a flat one as much as a rich one.
    """
    squared = (got - want).square().mean((1, 2, 3))
    return _LOG_SQUARED_SCALE * torch.log(squared + _LEAST_SQUARED).mean()


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
