"""The teachers: UNets of residual double convolutions, CBAM on the skips, SE in the decoder, stepwise up-sampling."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from edgekit.models.blocks import Cbam, NoiseLevel, ResidualDoubleConv, ShuffleUp
from edgekit.models.denoiser import Denoiser


class UnetA(Denoiser):
    """The article's plan: one double convolution a level, max-pooling, skips by concatenation; 8.155M parameters."""

    def __init__(self, *, channels: int = 1, noise_level: bool = True) -> None:
        super().__init__()
        widths = (32, 64, 128, 256, 512)
        self.channels, self.stride, self.takes_sigma = channels, 16, noise_level
        self.feature_channels = (widths[4], widths[3])
        self.encoder = nn.ModuleList(ResidualDoubleConv(i, o) for i, o in pairwise((channels, *widths)))
        self.level = NoiseLevel(widths[0]) if noise_level else None
        self.up = nn.ModuleList(
            [nn.ConvTranspose2d(widths[i + 1], widths[i], 2, 2) for i in (3, 2)]
            + [ShuffleUp(widths[i + 1], widths[i], 1) for i in (1, 0)]
        )
        self.skip = nn.ModuleList(Cbam(c) for c in reversed(widths[:4]))
        self.decoder = nn.ModuleList(ResidualDoubleConv(2 * c, c, se_reduction=8) for c in reversed(widths[:4]))
        self.tail = nn.Conv2d(widths[0], channels, 1)

    def noise(self, noisy: Tensor, sigma: Tensor | None) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Return the estimated noise and the maps of the bottleneck and the deepest decoder level."""
        x, skips = noisy, []
        for depth, block in enumerate(self.encoder):
            x = block(x if depth == 0 else nn.functional.max_pool2d(x, 2))
            if depth == 0 and self.level is not None and sigma is not None:
                x = self.level(x, sigma)
            skips.append(x)
        bottleneck, deepest = skips.pop(), x
        for depth, (up, attend, block) in enumerate(zip(self.up, self.skip, self.decoder, strict=True)):
            x = block(torch.cat([up(x), attend(skips.pop())], 1))
            deepest = x if depth == 0 else deepest
        return self.tail(x), (bottleneck, deepest)


class UnetB(Denoiser):
    """The strong one: four double convolutions a level, strided convolutions, additive skips; 8.244M parameters."""

    def __init__(self, *, channels: int = 1, noise_level: bool = True, blocks: int = 4) -> None:
        super().__init__()
        widths = (32, 64, 128, 256)
        self.channels, self.stride, self.takes_sigma = channels, 8, noise_level
        self.feature_channels = (widths[3], widths[2])
        self.head = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.level = NoiseLevel(widths[0]) if noise_level else None
        self.encoder = nn.ModuleList(_stage(c, blocks, attend=False) for c in widths)
        self.down = nn.ModuleList(nn.Conv2d(i, o, 2, 2) for i, o in pairwise(widths))
        self.up = nn.ModuleList(
            [
                nn.ConvTranspose2d(widths[3], widths[2], 2, 2),
                nn.ConvTranspose2d(widths[2], widths[1], 2, 2),
                ShuffleUp(widths[1], widths[0], 3),
            ]
        )
        self.skip = nn.ModuleList(Cbam(c) for c in reversed(widths[:3]))
        self.decoder = nn.ModuleList(_stage(c, blocks, attend=True) for c in reversed(widths[:3]))
        self.tail = nn.Conv2d(widths[0], channels, 3, padding=1)

    def noise(self, noisy: Tensor, sigma: Tensor | None) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Return the estimated noise and the maps of the bottleneck and the deepest decoder level."""
        x = self.head(noisy)
        if self.level is not None and sigma is not None:
            x = self.level(x, sigma)
        skips = []
        for stage, down in zip(self.encoder, self.down, strict=False):
            skips.append(stage(x))
            x = down(skips[-1])
        bottleneck = deepest = x = self.encoder[-1](x)
        for depth, (up, attend, stage) in enumerate(zip(self.up, self.skip, self.decoder, strict=True)):
            x = stage(up(x) + attend(skips.pop()))
            deepest = x if depth == 0 else deepest
        return self.tail(x), (bottleneck, deepest)


def _stage(channels: int, blocks: int, *, attend: bool) -> nn.Sequential:
    """Return a stage of double convolutions; in the decoder the last one carries the squeeze-and-excitation gate."""
    last = blocks - 1
    return nn.Sequential(
        *(
            ResidualDoubleConv(channels, channels, se_reduction=8 if attend and i == last else None)
            for i in range(blocks)
        )
    )
