"""Measures what one exchanged part of the `base` student costs, for `edgekit lint`.

    python benchmarks/blocks.py         # writes edgekit/graph/lint_costs.json

Weights are random: time does not depend on them. Each variant runs by turns with the unchanged student in the same
engine and arithmetic; the figure is the variant's time over the student's.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from edgekit import backends, models
from edgekit.backends import Session
from edgekit.compress import export, fuse, placement, quantize, simplify
from edgekit.files import write_json
from edgekit.graph import lint
from edgekit.measure import host, latency
from edgekit.models.denoiser import Denoiser
from edgekit.models.mobile import MobileUnet
from edgekit.pipeline import networks, pictures
from edgekit.recipe import Data, Noise, Quantization

SIDE = 256
Engine = Literal["onnxruntime", "openvino"]
ENGINES: tuple[Engine, ...] = ("onnxruntime", "openvino")


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A student with one part exchanged. change: What was exchanged, for a reader of the finding."""

    change: str
    make: Callable[[], Denoiser]


class FullResolution(MobileUnet):
    """`base` on the picture itself: half the channels at twice the resolution make about as many operations."""

    def __init__(self) -> None:
        super().__init__(widths=(16, 32, 48), encoder=(2, 3, 4), decoder=(2, 3), expansion=3)
        self.head = nn.Conv2d(1, 16, 3, padding=1)
        self.tail = nn.Conv2d(16, 1, 3, padding=1)

    def noise(self, noisy: Tensor, sigma: Tensor | None) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Return the estimated noise."""
        assert self.level is not None
        assert sigma is not None
        top = self.encoder[0](self.level(self.head(noisy), sigma))
        middle = self.encoder[1](self.down[0](top))
        bottleneck = self.encoder[2](self.down[1](middle))
        deepest = self.decoder[0](self.up[0](bottleneck) + middle)
        return self.tail(self.decoder[1](self.up[1](deepest) + top)), None


def _narrower() -> Denoiser:
    return MobileUnet(widths=(28, 60, 92), encoder=(2, 3, 4), decoder=(2, 3), expansion=3)


def _with_up(make: Callable[[int, int], nn.Module]) -> Denoiser:
    net = models.create("base")
    net.up = nn.ModuleList(make(c_in, c_out) for c_in, c_out in ((96, 64), (64, 32)))
    return net


def _resized(mode: str) -> Callable[[], Denoiser]:
    def up(c_in: int, c_out: int) -> nn.Module:
        return nn.Sequential(nn.Upsample(scale_factor=2, mode=mode), nn.Conv2d(c_in, c_out, 1))

    return lambda: _with_up(up)


def _leaky() -> Denoiser:
    net = models.create("base")
    for module in list(net.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.ReLU):
                setattr(module, name, nn.LeakyReLU(0.1))
    return net


VARIANTS: Mapping[str, Variant] = {
    "smooth_activation": Variant(
        change="base with h-swish in its two deep levels",
        make=lambda: models.create("base", {"activation": "hardswish"}),
    ),
    "leaky_activation": Variant(change="base with LeakyReLU everywhere", make=_leaky),
    "squeeze_excite": Variant(
        change="base with SE in its four blocks at the bottom", make=lambda: models.create("base", {"se": True})
    ),
    "channels": Variant(
        change="base with 28-60-92 instead of 32-64-96 channels, and so 0.85 of the multiply-accumulates",
        make=_narrower,
    ),
    "transposed_convolution": Variant(
        change="base with 2x2 transposed convolutions instead of 1x1 and PixelShuffle",
        make=lambda: _with_up(lambda c_in, c_out: nn.ConvTranspose2d(c_in, c_out, 2, stride=2)),
    ),
    "resize_nearest": Variant(
        change="base with nearest Resize and 1x1 instead of 1x1 and PixelShuffle", make=_resized("nearest")
    ),
    "resize_linear": Variant(
        change="base with bilinear Resize and 1x1 instead of 1x1 and PixelShuffle", make=_resized("bilinear")
    ),
    "resize_cubic": Variant(
        change="base with bicubic Resize and 1x1 instead of 1x1 and PixelShuffle", make=_resized("bicubic")
    ),
    "full_resolution": Variant(
        change="base on the picture itself, with 16-32-48 channels, instead of space-to-depth", make=FullResolution
    ),
}


def main() -> None:
    """Measure all variants."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4.0, help="of interleaved runs for each ratio")
    seconds = parser.parse_args().seconds
    figures: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as folder:
        plain = _sessions(models.create("base"), Path(folder, "base"))
        for rule, variant in VARIANTS.items():
            torch.manual_seed(0)
            net = variant.make().eval()
            opened = _sessions(net, Path(folder, rule))
            engines = {
                engine: {kind: _ratio(opened[engine, kind], plain[engine, kind], seconds) for kind in ("fp32", "int8")}
                for engine in ENGINES
            }
            figures[rule] = {"change": variant.change, "engines": engines}
            print(rule, engines, flush=True)
    write_json(
        lint.COSTS,
        {
            "schema_version": 1,
            "kind": "edgekit-lint-costs",
            "protocol": f"time of the variant over that of base, 1x1x{SIDE}x{SIDE}, one thread, medians of pairs by "
            f"turns for {seconds:g} s; everything quantized that the engine takes; random weights",
            "figures": figures,
            "host": asdict(host.describe()),
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        },
    )


def _sessions(net: Denoiser, folder: Path) -> Mapping[tuple[Engine, str], Session]:
    folder.mkdir()
    raw = export.export_onnx(
        fuse.fuse(net, *networks.example(net)),
        channels=net.channels,
        takes_sigma=net.takes_sigma,
        stride=net.stride,
        out=folder / "raw.onnx",
    )
    fp32 = simplify.simplify(raw, folder / "fp32.onnx")
    settings = Quantization(keep_float=(), calibration_pictures=8)
    calibration = pictures.noisy_samples(
        pictures.held_out(Data()), Noise(), count=settings.calibration_pictures, stride=net.stride
    )
    opened: dict[tuple[Engine, str], Session] = {}
    for engine in ENGINES:
        int8 = folder / f"{engine}.onnx"
        quantize.quantize_static(fp32, calibration, int8, settings, placement=placement.PLACEMENTS[engine])
        door = backends.load_onnx(engine)
        opened[engine, "fp32"] = door.open_onnx(fp32, threads=1)
        opened[engine, "int8"] = door.open_onnx(int8, threads=1)
    return opened


def _ratio(variant: Session, plain: Session, seconds: float) -> float:
    noisy = np.random.default_rng(0).random((1, 1, SIDE, SIDE), dtype=np.float32)

    def once(session: Session) -> Callable[[], None]:
        def run() -> None:
            session(noisy, 25 / 255)

        return run

    paired = latency.interleave(once(variant), once(plain), min_pairs=8, max_seconds=seconds)
    return latency.ratio_with_bound(paired).ratio_e3 / 1000


if __name__ == "__main__":
    main()
