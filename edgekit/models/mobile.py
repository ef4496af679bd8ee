"""The students: a small UNet of MobileNetV3 inverted residuals on a space-to-depth input.

```
noisy ─unshuffle 2─ head 3x3 ─(+ noise level)─ level 0 ─────────── + ─ level 0 ─ tail 3x3 ─shuffle 2─ noise
                                                  └ 2x2 s2 ─ level 1 ─ + ─ level 1 ┘ (1x1 + shuffle)
                                                               └ 2x2 s2 ─ level 2 ┘
```
Space-to-depth first, channels in multiples of 16 and ReLU are what makes INT8 pay: docs/models.md has the measurements.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from edgekit.models.blocks import Activation, InvertedResidual, NoiseLevel, ShuffleUp, conv
from edgekit.models.denoiser import Denoiser


class MobileUnet(Denoiser):
    """A student of three levels.

    Args:
        widths: Channels of each level.
        encoder: Inverted residuals of each level on the way down; the last entry is the bottleneck.
        decoder: Inverted residuals of levels 0 and 1 on the way up.
        expansion: Ratio of the hidden channels of a block to its channels.
        channels: Planes of the picture.
        noise_level: Whether the network is told the noise level; a blind one is not.
        activation: `hardswish` puts it in levels 1 and 2, as MobileNetV3 does in its deep half; level 0 keeps ReLU.
        se: Squeeze-and-excitation in the bottleneck's blocks.
        batchnorm: BatchNorm after every convolution of the blocks and the head; folded before export.
    """

    def __init__(
        self,
        *,
        widths: tuple[int, int, int],
        encoder: tuple[int, int, int],
        decoder: tuple[int, int],
        expansion: int,
        channels: int = 1,
        noise_level: bool = True,
        activation: Activation = "relu",
        se: bool = False,
        batchnorm: bool = False,
    ) -> None:
        super().__init__()
        self.channels, self.stride, self.takes_sigma = channels, 8, noise_level
        self.feature_channels = (widths[2], widths[1])

        def stage(level: int, blocks: int) -> nn.Sequential:
            act: Activation = activation if level else "relu"
            gate = se and level == 2
            return nn.Sequential(
                *(InvertedResidual(widths[level], expansion, act, se=gate, batchnorm=batchnorm) for _ in range(blocks))
            )

        self.head = conv(4 * channels, widths[0], 3, batchnorm=batchnorm)
        self.level = NoiseLevel(widths[0]) if noise_level else None
        self.encoder = nn.ModuleList(stage(i, n) for i, n in enumerate(encoder))
        self.down = nn.ModuleList(conv(i, o, 2, stride=2, batchnorm=batchnorm) for i, o in pairwise(widths))
        self.up = nn.ModuleList(ShuffleUp(widths[i + 1], widths[i], 1) for i in (1, 0))
        self.decoder = nn.ModuleList(stage(i, decoder[i]) for i in (1, 0))
        self.tail = nn.Conv2d(widths[0], 4 * channels, 3, padding=1)

    def noise(self, noisy: Tensor, sigma: Tensor | None) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Return the estimated noise and the maps of the bottleneck and the deepest decoder level."""
        x = self.head(nn.functional.pixel_unshuffle(noisy, 2))
        if self.level is not None and sigma is not None:
            x = self.level(x, sigma)
        top = self.encoder[0](x)
        middle = self.encoder[1](self.down[0](top))
        bottleneck = self.encoder[2](self.down[1](middle))
        deepest = self.decoder[0](self.up[0](bottleneck) + middle)
        x = self.decoder[1](self.up[1](deepest) + top)
        return nn.functional.pixel_shuffle(self.tail(x), 2), (bottleneck, deepest)
