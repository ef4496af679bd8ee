"""The learning rate and the other things that change in the course of a run."""

from __future__ import annotations

import math
from typing import Literal

from edgekit.recipe import Training


def progress(settings: Training, step: int, seconds: float) -> float:
    """Return how much of the run is behind it, 0 to 1: by steps, or by time where no number of steps is set."""
    if settings.steps:
        return min(1.0, step / settings.steps)
    return min(1.0, seconds / (60 * settings.max_minutes))


def is_over(settings: Training, step: int, seconds: float) -> bool:
    """Return whether the step limit or the time limit is reached."""
    out_of_time = settings.max_minutes > 0 and seconds >= 60 * settings.max_minutes
    return out_of_time or (settings.steps > 0 and step >= settings.steps)


def learning_rate(settings: Training, step: int, done: float) -> float:
    """Return the rate of a step: a linear warm-up, and a cosine from the peak to the final rate over the whole run."""
    cosine = 0.5 * (1 + math.cos(math.pi * done))
    rate = settings.final_rate + (settings.peak_rate - settings.final_rate) * cosine
    return rate * min(1.0, (step + 1) / (settings.warmup_steps + 1))


def patch_side(settings: Training, done: float) -> int:
    """Return the side of a patch in pixels."""
    if settings.late_patch is not None and done >= settings.late_from:
        return settings.late_patch
    return settings.patch


def loss(settings: Training, done: float) -> Literal["charbonnier", "mse", "psnr"]:
    """Return which loss compares pictures."""
    return "mse" if settings.loss == "charbonnier" and done >= settings.mse_from else settings.loss


def feature_weight(peak: float, until: float, done: float) -> float:
    """Return the weight of the feature loss, which falls linearly to nothing at the fraction `until` of the run."""
    return 0.0 if until <= done else peak * (1 - done / until)
