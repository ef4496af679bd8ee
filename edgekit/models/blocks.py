"""The blocks that the networks are made of. Feature maps are (n, c, h, w)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

Activation = Literal["relu", "hardswish"]


def activation(name: Activation) -> nn.Module:
    """Return the activation of that name."""
    return nn.ReLU(inplace=True) if name == "relu" else nn.Hardswish(inplace=True)


def conv(
    c_in: int, c_out: int, kernel: int, *, stride: int = 1, groups: int = 1, batchnorm: bool = False
) -> nn.Sequential:
    """Return a convolution that keeps the size (or divides it by `stride`), followed by BatchNorm if asked for."""
    padding = 0 if kernel == stride else kernel // 2
    layers: list[nn.Module] = [nn.Conv2d(c_in, c_out, kernel, stride, padding, groups=groups, bias=not batchnorm)]
    if batchnorm:
        layers.append(nn.BatchNorm2d(c_out))
    return nn.Sequential(*layers)


class NoiseLevel(nn.Module):
    """Adds the noise level to the first features: `x + sigma * v`, with one learned v per channel.

    A constant noise-level map that is concatenated to the input of a convolution (FFDNet, Zhang 2018; DRUNet,
    Zhang 2021) does the same away from the picture's border, at the price of a plane of input. `sigma` is (n, 1, 1, 1),
    or a map (n, 1, h, w) on the grid of the features.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Return x with the noise level added, shaped as x."""
        return x + sigma * self.weight


class SqueezeExcite(nn.Module):
    """Channel attention: scales each channel by a gate computed from its mean (Hu 2018; hard gate: Howard 2019)."""

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        hidden = max(8, channels // reduction)
        self.reduce = nn.Conv2d(channels, hidden, 1)
        self.expand = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return x with each channel scaled, shaped as x."""
        gate = self.expand(torch.relu(self.reduce(x.mean((2, 3), keepdim=True))))
        return x * nn.functional.hardsigmoid(gate)


class Cbam(nn.Module):
    """Channel attention, then spatial attention (CBAM, Woo 2018), with a 7x7 spatial kernel."""

    def __init__(self, channels: int, reduction: int = 8, kernel: int = 7) -> None:
        super().__init__()
        hidden = max(8, channels // reduction)
        self.mlp = nn.Sequential(nn.Conv2d(channels, hidden, 1), nn.ReLU(inplace=True), nn.Conv2d(hidden, channels, 1))
        self.spatial = nn.Conv2d(2, 1, kernel, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        """Return x scaled per channel and then per pixel, shaped as x."""
        gate = self.mlp(x.mean((2, 3), keepdim=True)) + self.mlp(x.amax((2, 3), keepdim=True))
        x = x * torch.sigmoid(gate)
        summary = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return x * torch.sigmoid(self.spatial(summary))


class ResidualDoubleConv(nn.Module):
    """x + conv(relu(conv(x))), with a 1x1 shortcut where the number of channels changes and SE where asked for."""

    def __init__(self, c_in: int, c_out: int, *, se_reduction: int | None = None, final_relu: bool = False) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(c_in, c_out, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(c_out, c_out, 3, padding=1)
        )
        self.attention = SqueezeExcite(c_out, se_reduction) if se_reduction else nn.Identity()
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.activation = nn.ReLU(inplace=True) if final_relu else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Return features (n, c_out, h, w)."""
        result: Tensor = self.activation(self.attention(self.body(x)) + self.shortcut(x))
        return result


class InvertedResidual(nn.Module):
    """x + project(depthwise(expand(x))), the block of MobileNetV3 (Howard 2019), channels unchanged."""

    def __init__(
        self, channels: int, expansion: int, act: Activation, *, se: bool = False, batchnorm: bool = False
    ) -> None:
        super().__init__()
        hidden = channels * expansion
        self.expand = conv(channels, hidden, 1, batchnorm=batchnorm)
        self.depthwise = conv(hidden, hidden, 3, groups=hidden, batchnorm=batchnorm)
        self.attention = SqueezeExcite(hidden, 4) if se else nn.Identity()
        self.project = conv(hidden, channels, 1, batchnorm=batchnorm)
        self.act1, self.act2 = activation(act), activation(act)

    def forward(self, x: Tensor) -> Tensor:
        """Return features shaped as x."""
        hidden = self.act2(self.depthwise(self.act1(self.expand(x))))
        result: Tensor = x + self.project(self.attention(hidden))
        return result


class ShuffleUp(nn.Sequential):
    """Doubles height and width: convolution to 4 x channels, then PixelShuffle (Shi 2016)."""

    def __init__(self, c_in: int, c_out: int, kernel: int) -> None:
        super().__init__(nn.Conv2d(c_in, 4 * c_out, kernel, padding=kernel // 2), nn.PixelShuffle(2))
