"""What every network of edgekit is: a picture in, the same picture without its noise out."""

from __future__ import annotations

from torch import Tensor, nn


class Denoiser(nn.Module):
    """A network whose output is its input less the noise that it finds.

    Attributes:
        channels: Planes of the picture, 1 or 3.
        stride: Height and width of the input must be multiples of it.
        takes_sigma: Whether `forward` needs the noise level.
        feature_channels: Channels of the two maps that distillation compares: (bottleneck, deepest decoder level);
            None for a network without levels.
    """

    channels: int
    stride: int
    takes_sigma: bool
    feature_channels: tuple[int, int] | None = None

    def noise(self, noisy: Tensor, sigma: Tensor | None) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Return the estimated noise, shaped as `noisy`, and the two feature maps, if there are any."""
        raise NotImplementedError

    def forward(self, noisy: Tensor, sigma: Tensor | None = None) -> Tensor:
        """Return the denoised pictures.

        Args:
            noisy: (n, channels, h, w), pixels in [0, 1] plus noise, unclipped; h and w multiples of `stride`.
            sigma: Standard deviation of the noise on the same scale, (n, 1, 1, 1); None for a blind network.
        """
        return noisy - self.noise(noisy, sigma)[0]

    def forward_with_features(self, noisy: Tensor, sigma: Tensor | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return the denoised pictures and the feature maps (bottleneck, deepest decoder level)."""
        noise, features = self.noise(noisy, sigma)
        if features is None:
            raise TypeError(f"{type(self).__name__} has no levels to compare")
        return noisy - noise, features
