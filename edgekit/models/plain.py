"""Networks to compare with: a plain residual UNet of the size of `base`, and DnCNN."""

from __future__ import annotations

from torch import Tensor, nn

from edgekit.models.blocks import NoiseLevel, ResidualDoubleConv, ShuffleUp
from edgekit.models.denoiser import Denoiser


class PlainUnet(Denoiser):
    """The control: dense 3x3 convolutions instead of inverted residuals, on two levels of 32 and 64 channels."""

    def __init__(self, *, channels: int = 1, noise_level: bool = True) -> None:
        super().__init__()
        self.channels, self.stride, self.takes_sigma = channels, 4, noise_level
        self.feature_channels = (64, 32)
        self.head = nn.Conv2d(4 * channels, 32, 3, padding=1)
        self.level = NoiseLevel(32) if noise_level else None
        self.encoder = nn.Sequential(ResidualDoubleConv(32, 32), ResidualDoubleConv(32, 32))
        self.down = nn.Conv2d(32, 64, 2, 2)
        self.bottleneck = nn.Sequential(*(ResidualDoubleConv(64, 64) for _ in range(5)))
        self.up = ShuffleUp(64, 32, 1)
        self.decoder = nn.Sequential(ResidualDoubleConv(32, 32), ResidualDoubleConv(32, 32))
        self.tail = nn.Conv2d(32, 4 * channels, 3, padding=1)

    def noise(self, noisy: Tensor, sigma: Tensor | None) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Return the estimated noise and the maps of the bottleneck and the decoder."""
        x = self.head(nn.functional.pixel_unshuffle(noisy, 2))
        if self.level is not None and sigma is not None:
            x = self.level(x, sigma)
        top = self.encoder(x)
        bottleneck = self.bottleneck(self.down(top))
        x = self.decoder(self.up(bottleneck) + top)
        return nn.functional.pixel_shuffle(self.tail(x), 2), (bottleneck, x)


class DnCnn(Denoiser):
    """DnCNN (Zhang 2017): 17 layers of 64 channels, blind, BatchNorm folded; 0.555M parameters for gray pictures."""

    def __init__(self, *, channels: int = 1, depth: int = 17) -> None:
        super().__init__()
        self.channels, self.stride, self.takes_sigma = channels, 1, False
        layers: list[nn.Module] = [nn.Conv2d(channels, 64, 3, padding=1), nn.ReLU(inplace=True)]
        for _ in range(depth - 2):
            layers += [nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(inplace=True)]
        self.body = nn.Sequential(*layers, nn.Conv2d(64, channels, 3, padding=1))

    def noise(self, noisy: Tensor, sigma: Tensor | None) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Return the estimated noise; there are no levels to compare."""
        return self.body(noisy), None
