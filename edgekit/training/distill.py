"""A network under training together with what it learns from."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from edgekit.models.denoiser import Denoiser
from edgekit.recipe import Distillation
from edgekit.training.losses import feature_distance
from edgekit.training.rounding import Rounding


class Learner(nn.Module):
    """A network, the 1x1 adapters that bring its two feature maps to the teacher's channels, and INT8's rounding."""

    def __init__(
        self, net: Denoiser, teacher: Denoiser | None, *, with_features: bool, rounding_bits: int | None = None
    ) -> None:
        super().__init__()
        self.net = net
        self.rounding = Rounding(net, rounding_bits) if rounding_bits is not None else None
        self.adapters: nn.ModuleList | None = None
        if with_features and teacher is not None and net.feature_channels and teacher.feature_channels:
            pairs = zip(net.feature_channels, teacher.feature_channels, strict=True)
            self.adapters = nn.ModuleList(nn.Conv2d(mine, its, 1) for mine, its in pairs)

    def forward(self, noisy: Tensor, sigma: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the denoised pictures and the adapted feature maps; none without adapters."""
        level = sigma if self.net.takes_sigma else None
        run = _Whole(self.net, with_features=self.adapters is not None)
        rounded = self.training and self.rounding is not None and self.rounding.rounds
        weights = Rounding.weights(run) if rounded else {}
        denoised, features = functional_call(run, weights, (noisy, level))
        return denoised, [adapt(f) for adapt, f in zip(self.adapters or (), features, strict=True)]


class _Whole(nn.Module):
    """A network with its features as one call, which can be made with other weights."""

    def __init__(self, net: Denoiser, *, with_features: bool) -> None:
        super().__init__()
        self.net, self._with_features = net, with_features

    def forward(self, noisy: Tensor, sigma: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        if self._with_features:
            return self.net.forward_with_features(noisy, sigma)
        return self.net(noisy, sigma), ()


class Lesson:
    """The loss of a batch: against the clean pictures, and against a teacher if there is one."""

    def __init__(self, teacher: Denoiser | None, settings: Distillation) -> None:
        self._teacher = teacher
        self._settings = settings

    def loss(
        self,
        learned: tuple[Tensor, list[Tensor]],
        clean: Tensor,
        noisy: Tensor,
        sigma: Tensor,
        *,
        feature_weight: float,
        compare: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        """Return the loss, a scalar.

        Args:
            learned: What the learner returned for the batch.
            clean: (n, c, h, w).
            noisy: The same noise draw that the learner saw.
            sigma: (n, 1, 1, 1).
            feature_weight: Weight of the feature loss now.
            compare: Of two batches of pictures, a scalar; one of `edgekit.training.losses`.
        """
        denoised, features = learned[0].float(), learned[1]
        against_clean = compare(denoised, clean)
        if self._teacher is None:
            return against_clean
        with torch.no_grad():
            level = sigma if self._teacher.takes_sigma else None
            if features:
                target, target_features = self._teacher.forward_with_features(noisy, level)
            else:
                target, target_features = self._teacher(noisy, level), None
        share = self._settings.output_weight
        total = (1 - share) * against_clean + share * compare(denoised, target.float())
        if target_features is not None:
            pairs = zip(features, target_features, strict=True)
            distance = sum(feature_distance(mine, its) for mine, its in pairs)
            total = total + feature_weight * distance
        return total
