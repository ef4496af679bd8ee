"""Integer libraries by TVM: every kernel on every instruction set, bit for bit against the reference in numpy."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import json
import platform
import re
import sys
from collections.abc import Callable
from fractions import Fraction
from functools import cache, partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import tiny
import torch
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from skimage import data
from torch import nn

from edgekit import backends, models, target, zoo
from edgekit.backends import Source
from edgekit.bundle import Built
from edgekit.compress import quantize
from edgekit.compress.export import export_onnx
from edgekit.compress.placement import PLACEMENTS
from edgekit.errors import InputError, UnsupportedError
from edgekit.models import weights as model_weights
from edgekit.pipeline import compile as compiling
from edgekit.recipe import Quantization
from edgekit.runners import qemu
from edgekit.target import InputShape, Isa, Runner, Target

pytest.importorskip("tvm")
tvm = backends.load("tvm")
integer = sys.modules["edgekit.backends.tvm.integer"]
link = sys.modules["edgekit.backends.tvm.link"]
machine_code = sys.modules["edgekit.backends.tvm.machine_code"]
qdq = sys.modules["edgekit.backends.tvm.qdq"]
variants = sys.modules["edgekit.backends.tvm.variants"]
reference = importlib.import_module("edgekit.backends.tvm.reference")
pytestmark = [pytest.mark.backend, pytest.mark.emulated]

_QUANTIZED = ["Conv", "ConvTranspose", "Relu", "Add", "DepthToSpace", "SpaceToDepth", "Concat", "Resize", "MaxPool"]
SIGMA = 25 / 255
SIDE = 24
ARM = dataclasses.replace(target.load("android-arm64"), precision="int8")
X86 = dataclasses.replace(
    ARM,
    name="linux-x86_64-tvm",
    isa=Isa(triple="x86_64-linux-gnu", cpu="icelake-server"),
    runner=Runner(kind="local"),
)
assert X86.isa is not None
X86_WITHOUT_AMX = dataclasses.replace(X86, isa=dataclasses.replace(X86.isa, features=(*X86.isa.features, "-amx-int8")))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bundle:
    folder: Path
    built: Built


def _has(*flags: str) -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    found = cpuinfo.read_text() if cpuinfo.is_file() else ""
    return platform.machine() == "x86_64" and all(flag in found for flag in flags)


def _has_vnni() -> bool:
    return _has("avx512_vnni", "avx512_vbmi")


def _has_amx() -> bool:
    return _has_vnni() and _has("amx_int8")


MACHINES = [
    pytest.param("dotprod", id="dotprod"),
    pytest.param("neon", id="neon"),
    pytest.param("vnni", id="vnni", marks=pytest.mark.skipif(not _has_vnni(), reason="this machine has no VNNI")),
    pytest.param("amx", id="amx", marks=pytest.mark.skipif(not _has_amx(), reason="this machine has no AMX")),
]
PLACES = {
    "dotprod": (ARM, Runner(kind="qemu", cpus=("cortex-a76",))),
    "neon": (ARM, Runner(kind="qemu", cpus=("cortex-a53",))),
    "vnni": (X86_WITHOUT_AMX, X86.runner),
    "amx": (X86, X86.runner),
}


def _target(where: str, height: int, width: int) -> Target:
    base, runner = PLACES[where]
    return dataclasses.replace(base, input=InputShape(height=height, width=width), runner=runner)


class _Pictures(CalibrationDataReader):
    def __init__(self, channels: int, height: int, width: int, takes_sigma: bool) -> None:
        sigma = {"sigma": np.full((1, 1, 1, 1), SIGMA, np.float32)} if takes_sigma else {}
        self._left = [{"noisy": _photograph(channels, height, width, seed)} | sigma for seed in range(2)]

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        return self._left.pop() if self._left else None


def _photograph(channels: int, height: int, width: int, seed: int = 7) -> NDArray[np.float32]:
    crop = data.astronaut()[60 : 60 + height, 100 : 100 + width, :channels].transpose(2, 0, 1)[None] / 255
    return (crop + np.random.default_rng(seed).normal(0, SIGMA, crop.shape)).astype(np.float32)


def _source(
    net: nn.Module,
    folder: Path,
    *,
    channels: int = 1,
    takes_sigma: bool = False,
    stride: int = 4,
    name: str = "net",
    activations: QuantType = QuantType.QInt8,
    kept_float: tuple[str, ...] = ("Sub",),
) -> Source:
    """Export a network, and quantize everything but the last subtraction, as the placement for arm does."""
    fp32, int8 = folder / f"{name}.onnx", folder / f"{name}.{activations}.onnx"
    export_onnx(net, channels=channels, takes_sigma=takes_sigma, stride=stride, out=fp32)
    model = onnx.load(fp32)
    with contextlib.redirect_stdout(io.StringIO()):
        quantize_static(
            model,
            int8,
            _Pictures(channels, 48, 48, takes_sigma),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=activations,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=_QUANTIZED,
            nodes_to_exclude=[node.name for node in model.graph.node if node.op_type in kept_float],
        )
    return Source(
        name=name,
        fp32_onnx=fp32,
        int8_onnx=int8,
        module=lambda: net,
        channels=channels,
        takes_sigma=takes_sigma,
        stride=stride,
    )


def _network(source: Source, height: int, width: int) -> integer.Network:
    assert source.int8_onnx is not None
    return qdq.read(source.int8_onnx, channels=source.channels, height=height, width=width)


def _by_onnx_runtime(path: Path, noisy: NDArray[np.float32], *, takes_sigma: bool) -> NDArray[np.float32]:
    feeds = {"noisy": noisy} | ({"sigma": np.full((1, 1, 1, 1), SIGMA, np.float32)} if takes_sigma else {})
    # Pair by pair as the file says: the integer kernels that it would fuse saturate on x86 without VNNI.
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (denoised,) = session.run(None, feeds)
    return np.asarray(denoised)


def _psnr(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    return float(-10 * np.log10(np.mean((one - other) ** 2)))


def _sequence(*layers: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*layers)


class _Residuals(nn.Module):
    """An addition of a convolution, one of two maps that others read too, and one after an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(c, 16, 1) for c in (1, 16, 16))
        self.last = nn.Conv2d(16, 1, 3, padding=1)

    def forward(self, noisy: torch.Tensor) -> torch.Tensor:
        one = self.first(noisy)
        two = torch.relu(self.second(one))
        three = one + self.third(two)
        return noisy - self.last(three + two + one)


class _Up(nn.Module):
    """Down by a strided window, up by a pixel shuffle with a skip, and by a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.down = nn.Conv2d(1, 16, 1), nn.Conv2d(16, 24, 2, stride=2)
        self.shuffled, self.transposed = nn.Conv2d(24, 64, 1), nn.ConvTranspose2d(24, 16, 2, stride=2)
        self.last = nn.Conv2d(16, 1, 1)

    def forward(self, noisy: torch.Tensor) -> torch.Tensor:
        head = self.head(noisy)
        low = torch.relu(self.down(head))
        up = nn.functional.pixel_shuffle(self.shuffled(low), 2) + head
        return noisy - self.last(self.transposed(low) + up)


class _PictureAsFeatures(nn.Module):
    """The picture itself in a depthwise window and in an addition."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, noisy: torch.Tensor) -> torch.Tensor:
        squares = nn.functional.pixel_unshuffle(noisy, 2)
        return nn.functional.pixel_shuffle(self.second(self.first(squares) + squares), 2)


class _Concats(nn.Module):
    """Concatenations of maps on grids of their own, of the picture, and of one another, of 49 and 77 channels.

    They are read by windows of both kinds and by an addition.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 12, 3, padding=1), nn.Conv2d(12, 24, 1)
        nn.init.normal_(self.second.weight, std=0.02)
        self.depthwise, self.third = _depthwise(49, 3), nn.Conv2d(49, 28, 1)
        self.last = nn.Conv2d(77, 1, 3, padding=1)

    def forward(self, noisy: torch.Tensor) -> torch.Tensor:
        first = self.first(noisy)
        joined = torch.cat([first, torch.relu(self.second(first)), noisy, torch.relu(first)], 1)
        joined = self.depthwise(joined) + joined
        third = torch.relu(self.third(joined))
        return noisy - self.last(torch.cat([third, joined], 1))


class _Resized(nn.Module):
    """Ways up and down that are added, read by windows with and without a margin, and of the picture itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(c, 20, 1) for c in (1, 20, 21))
        self.last = nn.Conv2d(20, 1, 3, padding=1)

    def forward(self, noisy: torch.Tensor) -> torch.Tensor:
        interpolate, max_pool2d = nn.functional.interpolate, nn.functional.max_pool2d
        first = self.first(noisy)
        low = self.second(max_pool2d(first, 2))
        joined = torch.cat([low, max_pool2d(noisy, 2)], 1)
        near = interpolate(self.third(joined), scale_factor=2, mode="nearest")
        smooth = interpolate(low, scale_factor=2, mode="bilinear", align_corners=False)
        return noisy - self.last(near + first + smooth)


class _Transposed(nn.Module):
    """Transposed convolutions whose windows reach over the pixel that they enlarge, the last one to the picture."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.low = nn.Conv2d(1, 24, 2, stride=2), nn.Conv2d(20, 16, 2, stride=2)
        self.three = nn.ConvTranspose2d(24, 20, 3, 2, 1, output_padding=1)
        self.last = nn.ConvTranspose2d(16, 1, 4, 2, 1)

    def forward(self, noisy: torch.Tensor) -> torch.Tensor:
        return noisy - self.last(torch.relu(self.low(torch.relu(self.three(self.down(noisy))))))


class _Crossed(nn.Module):
    """An addition of two maps that others read too, the first of eight times the range, in both orders."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(c, 16, 1) for c in (1, 1, 16))
        nn.init.uniform_(self.first.weight, 4, 8)
        nn.init.uniform_(self.second.weight, -1, 1)
        self.last = nn.Conv2d(16, 1, 1)
        nn.init.normal_(self.last.weight, std=0.01)

    def forward(self, noisy: torch.Tensor) -> torch.Tensor:
        one, two = self.first(noisy), self.second(noisy)
        return noisy - self.last((one + two) + (two + one) + (one + self.third(two)))


class _Cancelled(nn.Module):
    """A residual block that takes away what it is added to, so that its own part reaches far beyond its result."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 16, 1)
        self.last = nn.Conv2d(16, 1, 1)
        with torch.no_grad():
            self.first.weight[8:] = -self.first.weight[:8]
            self.second.weight[:, :, 0, 0] = torch.eye(16).roll(8, 0) - torch.eye(16)
            for layer in (self.first, self.second):
                layer.bias *= 0.01

    def forward(self, noisy: torch.Tensor) -> torch.Tensor:
        first = torch.relu(self.first(noisy))
        return noisy - self.last(torch.relu(first + self.second(first)))


class _Added(nn.Module):
    """A network whose result is added to the picture."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 1, 3, padding=1))

    def forward(self, noisy: torch.Tensor) -> torch.Tensor:
        return self.net(noisy) + noisy


def _dead() -> nn.Module:
    """Channels without weights, and with weights that are nothing next to their bias, as training leaves them."""
    first, last = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 4, 1)
    with torch.no_grad():
        for layer in (first, last):
            layer.weight[0] = 0
            layer.weight[1] *= 1e-9
            layer.bias[:2] = torch.tensor([0.3, -0.2])
    return nn.Sequential(first, last, nn.PixelShuffle(2), nn.Conv2d(1, 1, 2, stride=2))


def _depthwise(channels: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, kernel, stride, kernel // 2, groups=channels)


NETS: dict[str, Callable[[], nn.Module]] = {
    "pointwise": _sequence(nn.Conv2d(1, 16, 1), nn.ReLU(), nn.Conv2d(16, 168, 1), nn.ReLU(), nn.Conv2d(168, 1, 1)),
    "dense 3x3": _sequence(nn.Conv2d(1, 48, 3, padding=1), nn.ReLU(), nn.Conv2d(48, 1, 3, padding=1)),
    "strided 3x3": _sequence(nn.Conv2d(1, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 4, 3, padding=1), nn.PixelShuffle(2)),
    "depthwise 3x3": _sequence(nn.Conv2d(1, 40, 1), nn.ReLU(), _depthwise(40, 3), nn.ReLU(), nn.Conv2d(40, 1, 1)),
    "depthwise 5x5": _sequence(nn.Conv2d(1, 16, 1), _depthwise(16, 5), nn.Conv2d(16, 1, 1)),
    "strided depthwise": _sequence(nn.Conv2d(1, 16, 1), _depthwise(16, 3, 2), nn.Conv2d(16, 4, 1), nn.PixelShuffle(2)),
    "space to depth": _sequence(nn.PixelUnshuffle(4), nn.Conv2d(16, 32, 1), nn.Conv2d(32, 16, 1), nn.PixelShuffle(4)),
    "residuals": _Residuals,
    "up": _Up,
    "dead channels": _dead,
    "picture as features": _PictureAsFeatures,
    "concatenations": _Concats,
    "resized": _Resized,
    "one row": _sequence(
        nn.Conv2d(1, 16, 4, stride=4),
        nn.Upsample(scale_factor=2, mode="bilinear"),
        nn.ReLU(),
        nn.Upsample(scale_factor=2),
        nn.Conv2d(16, 1, 3, padding=1),
    ),
    "transposed": _Transposed,
    "crossed": _Crossed,
    "cancelled": _Cancelled,
    "added to the picture": _Added,
    "shortcuts": tiny.Shortcuts,
    "unet": tiny.unet,
}


# Those whose placement for arm has maps of two planes with everything that can meet them: windows with and without a
# margin, strides, an activation, pixel shuffles, maps of few channels.
TRUNKS = (
    *(
        "dense 3x3",
        "strided 3x3",
        "space to depth",
        "students",
        "students of 48",
        "picture as features",
        "dead channels",
    ),
    *("concatenations", "resized", "up", "one row", "transposed", "crossed", "cancelled"),
    *("added to the picture", "shortcuts", "unet"),
)


def _placed(net: nn.Module, folder: Path, *, equalize: bool = False) -> Source:
    """Export a network, and quantize it with the placement for arm."""
    takes_sigma, stride = bool(getattr(net, "takes_sigma", False)), int(getattr(net, "stride", 4))
    fp32 = export_onnx(net, channels=1, takes_sigma=takes_sigma, stride=stride, out=folder / "net.onnx")
    pictures = [(_photograph(1, 48, 48, seed), SIGMA) for seed in range(8)]
    settings = Quantization(calibration_pictures=8, equalize=equalize)
    int8 = quantize.quantize_static(fp32, pictures, folder / "int8.onnx", settings, placement=PLACEMENTS["arm"]).onnx
    return Source(
        name="net",
        fp32_onnx=fp32,
        int8_onnx=int8,
        module=lambda: net,
        channels=1,
        takes_sigma=takes_sigma,
        stride=stride,
    )


class _Students(nn.Module):
    """The additions of a student: residuals of maps with and without an activation, and a skip over a pixel shuffle."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.head, self.down, self.up = (
            nn.Conv2d(1, width, 3, padding=1),
            nn.Conv2d(width, 24, 2, stride=2),
            nn.Conv2d(24, 4 * width, 1),
        )
        self.first, self.second, self.third = (nn.Conv2d(width, width, 3, padding=1) for _ in range(3))
        self.low, self.last = nn.Conv2d(24, 24, 1), nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, noisy: torch.Tensor) -> torch.Tensor:
        head = self.head(noisy)
        one = head + self.first(head)
        two = torch.relu(self.second(one))
        down = self.down(two)
        low = down + self.low(down)
        skip = nn.functional.pixel_shuffle(self.up(low), 2) + two
        return noisy - self.last(skip + self.third(skip))


class _LevelBeside(nn.Module):
    """A network that is told the noise level by a map, or several, beside the picture or beside squares of it."""

    takes_sigma, stride = True, 4

    def __init__(self, level: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], maps: int = 1, block: int = 1):
        super().__init__()
        self.level, self.block = level, block
        self.head = nn.Conv2d(block**2 + maps, 24, 3, padding=1)
        self.tail = nn.Conv2d(24, block**2, 3, padding=1)
        with torch.no_grad():
            # Each channel another, so that one in the place of another is seen; a level is far smaller than pixels.
            self.head.weight *= torch.linspace(2, 6, block**2 + maps)[:, None, None]
            self.tail.weight *= 2

    def forward(self, noisy: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        squares = nn.functional.pixel_unshuffle(noisy, self.block) if self.block > 1 else noisy
        maps = torch.relu(self.head(self.level(squares, sigma)))
        shuffled = nn.functional.pixel_shuffle(self.tail(maps), self.block) if self.block > 1 else self.tail(maps)
        return noisy - shuffled


def _expanded(noisy: torch.Tensor, sigma: torch.Tensor, count: int = 1) -> torch.Tensor:
    return sigma.expand(noisy.shape[0], count, noisy.shape[2], noisy.shape[3])


LEVELS: dict[str, Callable[[], nn.Module]] = {
    "level expanded": lambda: _LevelBeside(lambda x, s: torch.cat((x, _expanded(x, s)), 1)),
    "level first": lambda: _LevelBeside(lambda x, s: torch.cat((_expanded(x, s, 2), x), 1), maps=2),
    "level times ones": lambda: _LevelBeside(lambda x, s: torch.cat((x, s * torch.ones_like(x)), 1)),
    "level repeated": lambda: _LevelBeside(lambda x, s: torch.cat((x, s.repeat(1, 1, *x.shape[2:])), 1)),
    "level of squares": lambda: _LevelBeside(lambda x, s: torch.cat((x, _expanded(x, s)), 1), block=2),
    "levels on both sides": lambda: _LevelBeside(
        lambda x, s: torch.cat((_expanded(x, s), x, s * torch.ones_like(x)), 1), maps=2
    ),
}


class _LevelAdded(nn.Module):
    """A network that is told the noise level by what is added to the maps that enlarging gives, perhaps twice."""

    takes_sigma, stride = True, 4

    def __init__(self, enlarged: nn.Module, twice: bool = False) -> None:
        super().__init__()
        self.down, self.enlarged, self.last = nn.Conv2d(1, 24, 2, stride=2), enlarged, nn.Conv2d(16, 1, 1)
        self.gains = nn.ParameterList(2 * torch.randn(1, 16, 1, 1) for _ in range(2 if twice else 1))

    def forward(self, noisy: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        maps = self.enlarged(torch.relu(self.down(noisy)))
        for gain in self.gains:
            maps = maps + sigma * gain
        return noisy - self.last(torch.relu(maps))


ADDED_LEVELS: dict[str, Callable[[], nn.Module]] = {
    "level behind a shuffle": lambda: _LevelAdded(nn.Sequential(nn.Conv2d(24, 64, 1), nn.PixelShuffle(2))),
    "level behind a transposed": lambda: _LevelAdded(nn.ConvTranspose2d(24, 16, 2, stride=2), twice=True),
}

NETS["students"] = _Students
# Of 16 channels, x86 finishes 32 together: here one pair and one that is alone.
NETS["students of 48"] = partial(_Students, 48)
Sources = Callable[[str], Source]
Denoise = Callable[[str, str], Callable[[NDArray[np.float32], float], NDArray[np.float32]]]


def _colour() -> nn.Module:
    return models.create("nano", {"channels": 3, "noise_level": False})


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    """Return a function that gives a net of `NETS`, perhaps with a 16-bit trunk, or the colour student; quantized."""

    @cache
    def source(name: str) -> Source:
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp("net")
        if name == "colour":
            return _source(_colour(), folder, channels=3, stride=8)
        if name in LEVELS or name in ADDED_LEVELS:
            return _placed((LEVELS | ADDED_LEVELS)[name](), folder)
        if name.startswith("trunk "):
            return _placed(NETS[name.removeprefix("trunk ")](), folder)
        return _source(NETS[name](), folder)

    return source


@pytest.fixture(scope="module")
def denoisers(sources: Sources, tmp_path_factory: pytest.TempPathFactory) -> Denoise:
    """Return a function that gives the compiled net of a name on a machine; both of ARM are in one library.

    So are both of x86, but it would take AMX wherever it can: VNNI's target rules that out.
    """

    @cache
    def built(name: str, where: str) -> Bundle:
        folder = tmp_path_factory.mktemp("library")
        place = _target(where, *_size(name))
        return Bundle(folder=folder, built=tvm.build(sources(name), place, folder))

    def denoiser(name: str, where: str) -> Callable[[NDArray[np.float32], float], NDArray[np.float32]]:
        place = _target(where, *_size(name))
        bundle = built(name, "dotprod" if where == "neon" else where)
        ((_, denoise),) = tvm.open_session(bundle.folder, bundle.built, place)
        return denoise

    return denoiser


def _size(name: str) -> tuple[int, int]:
    # AMX sums 32 pixels, or 16, of rows that have them; of these some are summed twice.
    sizes = {"colour": (40, 72), "one row": (4, 8), "students of 48": (SIDE, 72)}
    return sizes.get(name.removeprefix("trunk "), (SIDE, SIDE + 4))


@pytest.mark.parametrize("where", MACHINES)
@pytest.mark.parametrize("name", [*NETS, "colour", *(f"trunk {name}" for name in TRUNKS), *LEVELS, *ADDED_LEVELS])
def test_every_kernel_is_exact_on_every_instruction_set(
    sources: Sources, denoisers: Denoise, name: str, where: str
) -> None:
    noisy = _photograph(sources(name).channels, *_size(name))
    denoised = denoisers(name, where)(noisy, SIGMA)
    assert np.array_equal(denoised, reference.run(_network(sources(name), *_size(name)), noisy, SIGMA))
    assert np.abs(denoised - noisy).max() > 0.01


@pytest.mark.parametrize("name", [*NETS, *(f"trunk {name}" for name in TRUNKS)])
def test_the_reference_computes_what_the_quantized_graph_says(sources: Sources, name: str) -> None:
    source, noisy = sources(name), _photograph(1, SIDE, SIDE + 4)
    assert source.int8_onnx is not None
    wanted = _by_onnx_runtime(source.int8_onnx, noisy, takes_sigma=False)
    got = reference.run(_network(source, SIDE, SIDE + 4), noisy, SIGMA)
    # ONNX Runtime rounds more often, also the picture itself: a step of 1/255 or so, which is 50 dB.
    assert _psnr(got, wanted) > 42


@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("sigma", [5 / 255, SIGMA, 50 / 255])
def test_a_map_of_the_noise_level_beside_the_picture_is_read_with_it(sources: Sources, name: str, sigma: float) -> None:
    source, noisy = sources(name), _photograph(1, SIDE, SIDE + 4)
    network = _network(source, SIDE, SIDE + 4)
    got = reference.run(network, noisy, sigma)
    with torch.no_grad():
        wanted, other = (
            source.module()(torch.from_numpy(noisy), torch.full((1, 1, 1, 1), level)).numpy()
            for level in (sigma, sigma + 5 / 255)
        )
    assert _psnr(got, wanted) > max(_psnr(got, other) + 6, 35)
    assert [type(operator) for operator in network.operators] == [
        *(integer.Quantize, integer.Convolution, integer.Convolution)
    ]


@pytest.mark.parametrize("name", ADDED_LEVELS)
def test_a_level_of_the_noise_is_added_to_every_pixel_of_an_enlarged_map_and_to_what_was_added(
    sources: Sources, name: str
) -> None:
    source, noisy = sources(name), _photograph(1, SIDE, SIDE + 4)
    assert source.int8_onnx is not None
    wanted = _by_onnx_runtime(source.int8_onnx, noisy, takes_sigma=True)
    assert _psnr(reference.run(_network(source, SIDE, SIDE + 4), noisy, SIGMA), wanted) > 50


@pytest.mark.parametrize("name", ["trunk dense 3x3", "trunk strided 3x3"])
def test_what_a_relu_cuts_off_stays_cut_off_in_a_map_of_two_planes(sources: Sources, name: str) -> None:
    source, noisy = sources(name), _photograph(1, SIDE, SIDE + 4)
    assert source.int8_onnx is not None
    wanted = _by_onnx_runtime(source.int8_onnx, noisy, takes_sigma=False)
    # The sums of the last convolution read nothing of 8 bits.
    assert _psnr(reference.run(_network(source, SIDE, SIDE + 4), noisy, SIGMA), wanted) > 75


def test_a_whole_unet_with_concatenated_skips_is_compiled_in_integers(tmp_path: Path) -> None:
    net, noisy = tiny.unet(), _photograph(1, 64, 96)
    source = _placed(net, tmp_path, equalize=True)
    network = _network(source, 64, 96)
    wanted = reference.run(network, noisy, SIGMA)
    before = _by_onnx_runtime(source.fp32_onnx, noisy, takes_sigma=False)
    assert _psnr(wanted, before) > 30
    assert np.abs(wanted - noisy).mean() > 0.1
    assert [one.how for one in network.operators if isinstance(one, integer.Resample)] == [
        *("maximum", "maximum", "nearest", "bilinear")
    ]
    runner = Runner(kind="qemu", cpus=("cortex-a53", "cortex-a72", "cortex-a76"))
    place = dataclasses.replace(ARM, input=InputShape(height=64, width=96), runner=runner)
    built = tvm.build(source, place, tmp_path / "library")
    assert built.facts["integer_macs_permille"] == 1000
    opened = tvm.open_session(tmp_path / "library", built, place)
    assert len(opened) == 3
    assert all(np.array_equal(denoise(noisy, SIGMA), wanted) for _, denoise in opened)


@pytest.mark.slow
def test_a_unet_from_a_file_goes_through_edgekit_compile(tmp_path: Path) -> None:
    net = tiny.unet()
    with torch.no_grad():
        # It is not trained: it leaves the picture nearly as it is.
        net.last.weight *= 0.1
        net.last.bias *= 0
    path = export_onnx(net, channels=1, takes_sigma=False, stride=4, out=tmp_path / "unet.onnx")
    small = dataclasses.replace(
        ARM, input=InputShape(height=64, width=64), runner=Runner(kind="qemu", cpus=("cortex-a76",))
    )
    made = compiling.compile_model(str(path), [small], folder=tmp_path / "run")
    assert made.audits[small.name].integer_macs_permille == 1000
    bundle = made.bundles[small.name]
    model = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))["model"]
    assert (model["name"], model["halo_px"], model["global_ops"]) == ("unet", 15, [])
    golden = bundle / "golden" / "skimage-camera"
    noisy = np.fromfile(golden.with_suffix(".noisy.f32"), "<f4").reshape(1, 1, 64, 64)
    network = qdq.read(tmp_path / "run/06-quantize/arm/student.int8.onnx", channels=1, height=64, width=64)
    denoised = np.fromfile(golden.with_suffix(".denoised.f32"), "<f4").reshape(1, 1, 64, 64)
    assert np.array_equal(denoised, reference.run(network, noisy, SIGMA))


def test_of_two_maps_in_memory_the_finer_is_copied_to_be_added(sources: Sources) -> None:
    operators = _network(sources("trunk crossed"), SIDE, SIDE + 4).operators
    additions = [
        (one.reads, one.residual.feature)
        for one in operators
        if isinstance(one, integer.Convolution) and one.residual is not None and (one.weights == 64).all()
    ]
    assert len(additions) >= 2
    crossed = [pair for pair in additions if len({feature.grid.scale for feature in pair}) == 2]
    assert len(crossed) >= 2
    for copied, residual in crossed[:2]:
        assert copied.rest_bits
        assert residual.rest_bits
        assert 4 * copied.grid.scale < residual.grid.scale


def test_maps_on_one_grid_are_joined_as_they_are_and_others_are_brought_to_it(sources: Sources) -> None:
    operators = _network(sources("trunk concatenations"), SIDE, SIDE + 4).operators
    joined = [one for one in operators if isinstance(one, integer.Concat)]
    assert [[part.channels for part in one.reads] for one in joined] == [[12, 24, 1, 12], [28, 49]]
    assert all(part.grid == one.writes.grid for one in joined for part in one.reads)
    brought = [[" for " in part.name for part in one.reads] for one in joined]
    assert any(brought[0])
    assert not all(brought[0])


@pytest.mark.parametrize("how", ["nearest", "bilinear", "maximum"])
def test_resampling_is_rounded_once(how: integer.Resampling) -> None:
    values = np.random.default_rng(0).integers(-128, 128, (5, 6, 3))
    planes = torch.from_numpy(values.astype(np.float64)).permute(2, 0, 1)[None]
    if how == "maximum":
        wanted = nn.functional.max_pool2d(planes, 2)
    elif how == "nearest":
        wanted = nn.functional.interpolate(planes, scale_factor=2)
    else:
        wanted = nn.functional.interpolate(planes, scale_factor=2, mode="bilinear", align_corners=False)
    exact = wanted[0].permute(1, 2, 0).numpy()
    # Sixteenths are exact in float64; halves go up.
    assert np.array_equal(reference.resampled(how, values), np.floor(exact + 0.5))


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """Return the shipped nano, quantized with the placement for arm."""
    folder = tmp_path_factory.mktemp("nano")
    net = models.create("nano")
    model_weights.load_into(net, zoo.weights("nano"))
    fp32 = export_onnx(net, channels=1, takes_sigma=True, stride=8, out=folder / "nano.onnx")
    pictures = [(_photograph(1, 64, 64, seed), SIGMA) for seed in range(8)]
    settings = Quantization(calibration_pictures=8)
    int8 = quantize.quantize_static(fp32, pictures, folder / "int8.onnx", settings, placement=PLACEMENTS["arm"]).onnx
    return Source(
        name="nano", fp32_onnx=fp32, int8_onnx=int8, module=lambda: net, channels=1, takes_sigma=True, stride=8
    )


@pytest.fixture(scope="module")
def nano_library(nano: Source, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("library")
    place = dataclasses.replace(ARM, input=InputShape(height=64, width=64))
    return Bundle(folder=folder, built=tvm.build(nano, place, folder))


@pytest.mark.parametrize("sigma", [SIGMA, 0.0, 0.5, 1e30])
def test_one_library_gives_the_reference_on_cores_with_and_without_the_dot_product(
    nano: Source, nano_library: Bundle, sigma: float
) -> None:
    runner = Runner(kind="qemu", cpus=("cortex-a53", "cortex-a72", "cortex-a76"))
    place = dataclasses.replace(ARM, input=InputShape(height=64, width=64), runner=runner)
    noisy = _photograph(1, 64, 64)
    wanted = reference.run(_network(nano, 64, 64), noisy, sigma)
    for _, denoise in tvm.open_session(nano_library.folder, nano_library.built, place):
        assert np.array_equal(denoise(noisy, sigma), wanted)


_STACK = r"""
#include "edgekit_nano.h"
#include <pthread.h>
#include <stdio.h>
#include <string.h>
enum { SIDE = EDGEKIT_NANO_WIDTH, SIZE = 1 << 18, PAINT = 0x5a };
static char stack[SIZE] __attribute__((aligned(4096))), *top;
static uint8_t pixels[SIDE * SIDE];
static void *call(void *denoiser)
{
    top = __builtin_frame_address(0);
    int code = edgekit_nano_denoise_u8(denoiser, pixels, SIDE, pixels, SIDE, SIDE, SIDE, EDGEKIT_NANO_GRAY, 25.0f);
    return code ? denoiser : NULL;
}
int main(void)
{
    edgekit_nano *denoiser;
    pthread_attr_t attributes;
    pthread_t thread;
    void *failed = stack;
    size_t left = 0;
    memset(stack, PAINT, SIZE);
    int code = edgekit_nano_create(&denoiser, NULL) | pthread_attr_init(&attributes) |
               pthread_attr_setstack(&attributes, stack, SIZE) | pthread_create(&thread, &attributes, call, denoiser) |
               pthread_join(thread, &failed);
    while (stack[left] == PAINT)
        ++left;
    printf("%td\n", top - stack - (ptrdiff_t)left);
    return code || failed;
}
"""


def test_a_call_takes_no_more_stack_than_the_header_says(nano_library: Bundle, tmp_path: Path) -> None:
    header, static = (nano_library.folder / nano_library.built.files[role] for role in ("header", "static"))
    (tmp_path / header.name).write_text(header.read_text())
    (tmp_path / "stack.c").write_text(_STACK)
    link.compile_program(tmp_path / "stack.c", tmp_path / "stack", link.LINUX, static)
    said = re.search(r"up to (\d+) KiB of the stack", header.read_text())
    assert said is not None
    for cpu in ("cortex-a53", "cortex-a76"):
        done = qemu.find(cpu).run([str(tmp_path / "stack")])
        assert done.code == 0
        assert 2048 < int(done.stdout) <= 1024 * int(said[1])


def test_the_integer_network_is_as_good_as_onnx_runtime_makes_of_its_graph(nano: Source) -> None:
    clean = (data.camera()[100:228, 100:228] / 255).astype(np.float32)[None, None]
    noisy = (clean + np.random.default_rng(0).normal(0, SIGMA, clean.shape)).astype(np.float32)
    assert nano.int8_onnx is not None
    theirs = _psnr(_by_onnx_runtime(nano.int8_onnx, noisy, takes_sigma=True), clean)
    ours = _psnr(reference.run(_network(nano, 128, 128), noisy, SIGMA), clean)
    assert theirs > _psnr(noisy, clean) + 5
    assert ours > theirs - 0.02


def test_unsigned_activations_give_the_same_picture_as_signed_ones(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, noisy = NETS["depthwise 3x3"](), _photograph(1, SIDE, SIDE)
    pictures = [
        reference.run(_network(_source(net, tmp_path, activations=kind), SIDE, SIDE), noisy, SIGMA)
        for kind in (QuantType.QInt8, QuantType.QUInt8)
    ]
    assert np.array_equal(*pictures)


def test_linux_gets_the_same_integers(nano: Source, tmp_path: Path) -> None:
    place = dataclasses.replace(target.load("linux-arm64"), input=InputShape(height=32, width=40))
    built = tvm.build(nano, place, tmp_path)
    assert built.files["artifact"] == "lib/libedgekit_nano.so"
    noisy = _photograph(1, 32, 40)
    wanted = reference.run(_network(nano, 32, 40), noisy, SIGMA)
    opened = tvm.open_session(tmp_path, built, place)
    assert [label for label, _ in opened] == ["qemu cortex-a53", "qemu cortex-a72", "qemu cortex-a76"]
    assert all(np.array_equal(denoise(noisy, SIGMA), wanted) for _, denoise in opened)


@pytest.mark.skipif(not _has_vnni(), reason="this machine has no VNNI")
def test_the_library_in_this_process_refuses_what_it_cannot_denoise(nano: Source, tmp_path: Path) -> None:
    place = _target("vnni", 32, 40)
    ((label, denoise),) = tvm.open_session(tmp_path, tvm.build(nano, place, tmp_path), place)
    assert (label, denoise.level) == ("tvm x86_64-linux-gnu", "native")
    with pytest.raises(InputError, match=r"takes a tile of shape \(1, 1, 32, 40\), found \(1, 1, 40, 32\)"):
        denoise(_photograph(1, 40, 32), SIGMA)
    with pytest.raises(InputError, match="sigma is negative, infinite or not a number"):
        denoise(_photograph(1, 32, 40), float("nan"))


def test_every_multiplying_kernel_is_of_integers_by_its_machine_code(nano: Source, tmp_path: Path) -> None:
    assert ARM.isa is not None
    found = variants.compile_integer(nano, ARM.isa, 32, 32, tmp_path)
    for variant, mnemonic in zip(found, ("sdot", "smull"), strict=True):
        counts = machine_code.instruction_counts(variant.object_file)
        multiplying = [name for name in counts if "dense" in name or "depthwise" in name]
        assert len(multiplying) >= 15
        assert all(counts[name][mnemonic] for name in multiplying)
        assert all(not counts[name]["sdot"] for name in multiplying) == (variant.name == "neon")
        assert variant.integer_macs == variant.macs > 32 * 32 * 1000


def test_amx_multiplies_tiles_and_vnni_the_rest_by_their_machine_code(nano: Source, tmp_path: Path) -> None:
    assert X86.isa is not None
    amx, vnni = variants.compile_integer(nano, X86.isa, 32, 32, tmp_path)
    assert (amx.name, vnni.name, vnni.requires) == ("amx", "vnni", None)
    for variant in (amx, vnni):
        counts = machine_code.instruction_counts(variant.object_file)
        multiplying = {name: found for name, found in counts.items() if "dense" in name or "depthwise" in name}
        assert len(multiplying) >= 15
        assert all(found["tdpbusd"] or found["vpdpbusd"] for found in multiplying.values())
        # Not the first and the last, of 16-bit weights, nor the convolutions that write rows of 8 pixels or of 4.
        # Calls and not kernels: which layers requantize alike, and so share one, depends on the weights.
        tiled = sum(counts[step.kernel]["tdpbusd"] > 0 for step in variant.steps)
        assert tiled == (8 if variant is amx else 0)
        assert variant.integer_macs == variant.macs > 32 * 32 * 1000


@pytest.mark.skipif(not _has_vnni(), reason="this machine has no VNNI")
def test_the_benchmark_times_every_kernel_of_every_variant(
    nano: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    benchmark = tiny.script("benchmarks/x86_kernels.py")
    monkeypatch.setattr(benchmark, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["x86_kernels.py", "nano", str(nano.int8_onnx), "--side", "64", "--rounds", "3"])
    benchmark.main()
    record = json.loads((tmp_path / "x86_kernels_nano.json").read_text(encoding="utf-8"))
    assert sorted(record["microseconds"]) == (["amx", "vnni"] if _has_amx() else ["vnni"])
    assert all(time > 0 for kernels in record["microseconds"].values() for time in kernels.values())


def test_a_target_rules_out_a_variant_but_not_the_last() -> None:
    def names(*features: str) -> list[str]:
        isa = dataclasses.replace(X86.isa, features=features)
        return [choice.machine.name for choice in variants.choices(isa)]

    assert names("+avx512vnni") == ["amx", "vnni"]
    assert names("+avx512vnni", "-amx-int8") == ["vnni"]
    assert names("-avx512vnni") == ["vnni"]


def test_float_kernels_do_not_pass_for_integer_ones(nano: Source, tmp_path: Path) -> None:
    assert ARM.isa is not None
    (variant,) = variants.compile_float(nano, ARM.isa, 32, 32, tmp_path)
    counts = machine_code.instruction_counts(variant.object_file)
    assert sum(found["fmla"] for found in counts.values()) > 100
    for name in ("dotprod", "neon"):
        assert not machine_code.integer_kernels(variant.object_file, name)


def test_the_facts_are_those_of_the_library(nano_library: Bundle) -> None:
    built = nano_library.built
    assert built.precision == "int8"
    assert built.facts["variants"] == "dotprod neon"
    assert built.facts["integer_macs_permille"] == 1000
    assert built.audit is not None
    assert built.audit.integer_macs_permille == 1000
    parameters = models.parameter_count(models.create("nano"))
    assert parameters < int(built.facts["weights_bytes"]) < 2 * parameters


def test_a_convolution_in_float_is_refused_by_name(tmp_path: Path) -> None:
    source = _source(NETS["dense 3x3"](), tmp_path, kept_float=("Conv",))
    with pytest.raises(UnsupportedError, match=r"Conv '/\S*' (has weights in float|reads)"):
        tvm.build(source, _target("dotprod", SIDE, SIDE), tmp_path / "out")


def test_activations_of_16_bits_with_weights_of_8_are_refused_by_name(tmp_path: Path) -> None:
    source = _source(NETS["dense 3x3"](), tmp_path, activations=QuantType.QInt16)
    with pytest.raises(UnsupportedError, match=r"Conv '/\S*' has weights of 8 bits and reads a map of 16 bits"):
        tvm.build(source, _target("dotprod", SIDE, SIDE), tmp_path / "out")


def test_a_trunk_keeps_what_8_bits_round_away(nano: Source) -> None:
    network = _network(nano, 64, 64)
    convolutions = [one for one in network.operators if isinstance(one, integer.Convolution)]
    wide = [one.name for one in convolutions if one.weight_rests is not None]
    assert wide == [convolutions[0].name, convolutions[-1].name]
    added = [one.residual.feature for one in convolutions if one.residual is not None]
    assert len(added) == 9
    assert min(feature.rest_bits for feature in added) >= 5


def test_weights_that_training_moved_over_the_placements_limit_are_read(nano: Source, tmp_path: Path) -> None:
    assert nano.int8_onnx is not None
    model = onnx.load(nano.int8_onnx)
    for tensor in model.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        # Twice the integers of half the scale stand for the same weights.
        if values.dtype == np.int16 and values.ndim == 4:
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.clip(2 * values, -32768, 32767), tensor.name))
        if tensor.name in ("head.0.weight_scale", "tail.weight_scale"):
            tensor.CopyFrom(onnx.numpy_helper.from_array(values / 2, tensor.name))
    onnx.save(model, tmp_path / "moved.onnx")
    noisy = _photograph(1, 64, 64)
    moved = qdq.read(tmp_path / "moved.onnx", channels=1, height=64, width=64)
    wanted = reference.run(_network(nano, 64, 64), noisy, SIGMA)
    assert np.abs(reference.run(moved, noisy, SIGMA) - wanted).max() < 1e-3


def test_an_operator_without_an_integer_kernel_is_refused_by_name(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(1, 16, 1), nn.Sigmoid(), nn.Conv2d(16, 1, 1))
    with pytest.raises(UnsupportedError, match=r"Sigmoid '/1/Sigmoid' is not computed in integers"):
        tvm.build(_source(net, tmp_path), _target("dotprod", SIDE, SIDE), tmp_path / "out")


def _up(**settings: object) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 16, 2, stride=2), nn.Upsample(**settings), nn.Conv2d(16, 1, 1))


@pytest.mark.parametrize(
    ("net", "said"),
    [
        pytest.param(_up(scale_factor=2, mode="bicubic"), "is no resizing to twice", id="bicubic"),
        pytest.param(
            _up(scale_factor=2, mode="bilinear", align_corners=True), "is no resizing to twice", id="aligned corners"
        ),
        pytest.param(
            nn.Sequential(nn.Conv2d(1, 16, 4, stride=4), nn.Upsample(scale_factor=4), nn.Conv2d(16, 1, 1)),
            "is no resizing to twice",
            id="four times",
        ),
        pytest.param(
            nn.Sequential(nn.Conv2d(1, 16, 1), nn.MaxPool2d(3, 1, 1), nn.Conv2d(16, 1, 1)),
            "is no pooling of 2x2 pixels with stride 2",
            id="pooling of 3x3",
        ),
        pytest.param(
            nn.Sequential(nn.Conv2d(1, 16, 1), nn.AvgPool2d(2), nn.Upsample(scale_factor=2), nn.Conv2d(16, 1, 1)),
            r"AveragePool '/1/AveragePool' is not computed in integers",
            id="average",
        ),
    ],
)
def test_other_ways_to_resize_and_pool_are_refused_by_name(net: nn.Module, said: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=said):
        _network(_placed(net, tmp_path), SIDE, SIDE)


class _Calls(nn.Module):
    """A function of the picture, sigma where it takes that, and convolutions to 16 maps, among them, and back."""

    def __init__(self, function: Callable[..., torch.Tensor], takes_sigma: bool = False) -> None:
        super().__init__()
        self.function, self.takes_sigma = function, takes_sigma
        self.head, self.body, self.tail = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 1, 1)
        self.gated, self.level, self.last = nn.Conv2d(8, 1, 1), nn.Conv2d(1, 16, 1), nn.Conv2d(17, 1, 1)

    def forward(self, *given: torch.Tensor) -> torch.Tensor:
        return self.function(self, *given)


def _between(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 16, 1), *layers, nn.Conv2d(16, 1, 1))


REFUSED: dict[str, tuple[nn.Module, str]] = {
    "leaky ReLU": (
        _between(nn.LeakyReLU()),
        "LeakyRelu '.*' is not computed in integers; use ReLU in its place, or set",
    ),
    "PReLU": (_between(nn.PReLU()), "PRelu '.*' is not computed in integers; use ReLU in its place, or set"),
    "ReLU6": (_between(nn.ReLU6()), "Clip '.*' is not computed in integers; use ReLU in its place, or set"),
    "tanh": (_between(nn.Tanh()), "Tanh '.*' is not computed in integers; use ReLU in its place$"),
    "GELU": (_between(nn.GELU()), "Mul '.*; use ReLU in place of GELU and SiLU"),
    "instance norm": (_between(nn.InstanceNorm2d(16)), "InstanceNormalization '.*; use BatchNorm2d"),
    "reflecting padding": (
        _between(nn.ReflectionPad2d(1), nn.Conv2d(16, 16, 3)),
        "Pad '.*; let convolutions pad with zeros, or set",
    ),
    "average pooling": (
        _between(nn.AvgPool2d(3, 1, 1)),
        "AveragePool '.*; use max-pooling of 2x2 or a convolution of stride 2",
    ),
    "dilated": (
        _between(nn.Conv2d(16, 16, 3, padding=2, dilation=2)),
        "Conv '.*; use dense .* without dilation, .* or set",
    ),
    "grouped": (_between(nn.Conv2d(16, 16, 1, groups=4)), "Conv '.* groups.*; use dense or depthwise convolutions"),
    "transposed and dilated": (
        _between(nn.ConvTranspose2d(16, 16, 3, padding=2, dilation=2)),
        "ConvTranspose '.*; use one of 2x2 with stride 2, or a 1x1 convolution and PixelShuffle, or set",
    ),
    "maps to depth": (
        _between(nn.PixelUnshuffle(2), nn.Conv2d(64, 64, 1), nn.PixelShuffle(2)),
        "SpaceToDepth '.*; use a convolution whose stride is its window",
    ),
    "shuffled behind ReLU": (
        _between(nn.Conv2d(16, 64, 1), nn.ReLU(), nn.PixelShuffle(2), nn.Conv2d(16, 16, 2, stride=2)),
        "DepthToSpace '.*; put a dense convolution right before it, or set",
    ),
    "resized at the end": (
        nn.Sequential(nn.Conv2d(1, 16, 2, stride=2), nn.Conv2d(16, 1, 1), nn.Upsample(scale_factor=2)),
        "Resize '.*' writes the picture.*; end the model with a dense convolution",
    ),
    "gate": (_Calls(lambda net, x: x - net.gated(net.head(x)[:, :8] * net.head(x)[:, 8:])), "Mul '.*; .* no gates"),
    "clamped": (
        _Calls(lambda net, x: (x - net.tail(net.head(x))).clamp(0, 1)),
        "Clip '.*' bounds the picture; leave it out, since the library clips the bytes that it writes, or set",
    ),
    "ReLU at the end": (
        _Calls(lambda net, x: torch.relu(net.tail(net.head(x)))),
        "Relu '.*' bounds the picture; leave it out",
    ),
    "two stages": (
        _Calls(lambda net, x: (y := x - net.tail(net.head(x))) - net.tail(net.head(y))),
        "Sub '.*' changes something else than the picture; change the picture once, by the last operator",
    ),
    "embedded sigma": (
        _Calls(lambda net, x, sigma: x - net.tail(net.head(x) + net.level(sigma)), takes_sigma=True),
        "'sigma' goes into an operator of maps; add sigma times one constant per channel",
    ),
    "map of sigma": (
        _Calls(lambda net, x, sigma: x - net.tail(net.body(net.head(sigma.expand_as(x)))), takes_sigma=True),
        "Conv '.*' reads '.*', a level of the noise; add sigma times one constant per channel to what a",
    ),
    "a map of sigma beside maps": (
        _Calls(lambda net, x, sigma: x - net.last(torch.cat((net.head(x), _expanded(x, sigma)), 1)), takes_sigma=True),
        "Concat '.*' reads '.*', a level of the noise; add sigma times one constant per channel to what a",
    ),
    "hard-swish": (tiny.network("nano", {"activation": "hardswish"}), "HardSwish '.*; use ReLU in its place, or set"),
    "squeeze-and-excitation": (
        tiny.network("nano", {"se": True}),
        "Mul '.*attention.*; .* no gates .*; or set the target's precision",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_integer_kernel_is_refused_with_what_can_stand_in_its_place(name: str, tmp_path: Path) -> None:
    net, said = REFUSED[name]
    with pytest.raises(UnsupportedError, match=said):
        _network(_placed(net, tmp_path), SIDE, SIDE)


def test_a_depthwise_convolution_does_not_write_the_picture(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 3, 1), _depthwise(3, 3))
    source = _source(net, tmp_path, channels=3)
    with pytest.raises(UnsupportedError, match=r"Conv '/3/Conv' writes the picture.*; end the model with a dense"):
        _network(source, SIDE, SIDE)


def test_int8_without_a_quantized_graph_is_refused(nano: Source, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="'nano' has no quantized graph"):
        tvm.build(dataclasses.replace(nano, int8_onnx=None), _target("dotprod", 32, 32), tmp_path)


@pytest.mark.parametrize("reach", [128.0, 230.0, 256.0, 300.0])
@pytest.mark.parametrize("seed", range(5))
def test_a_rescaled_sum_is_the_nearest_value_or_next_to_it(seed: int, reach: float) -> None:
    random = np.random.default_rng(seed)
    factors = 2.0 ** random.uniform(-14, -1, 64)
    steps = integer.rescale(factors, reach)
    wanted = random.uniform(-1.1 * reach, 1.1 * reach, (1000, 64))
    sums = np.rint(wanted / factors).astype(np.int64)
    rounding = np.where(steps.shift > 0, 1 << np.maximum(steps.shift - 1, 0), 0)
    t = np.clip((sums + rounding << np.maximum(-steps.shift, 0)) >> np.maximum(steps.shift, 0), -32768, 32767)
    u = (t * steps.multiplier + 2**14) >> 15
    most = 0.5 + (0.03 if steps.fraction == 7 else 0.04)
    # What is added to it may bring it back into 8 bits.
    values = (u + (1 << (steps.fraction - 1))) >> steps.fraction
    inside = np.abs(sums * factors) <= reach - 1
    assert np.abs(values - sums * factors)[inside].max() < most
    assert np.abs(np.clip(values, -128, 127) - np.clip(sums * factors, -128, 127)).max() < most


@pytest.mark.parametrize("seed", range(5))
def test_the_fused_product_and_sum_is_rounded_once(seed: int) -> None:
    random = np.random.default_rng(seed)
    one, added = random.integers(-(2**20), 2**20, 500).astype(np.float32), random.random(500, np.float32)
    factor = np.float32(random.uniform(1e-7, 1e-5))
    got = reference._fused(one, factor, added)
    for x, y, z in zip(one, added, got, strict=True):
        exact = Fraction(float(x)) * Fraction(float(factor)) + Fraction(float(y))
        neighbours = [np.nextafter(z, np.float32(-np.inf)), z, np.nextafter(z, np.float32(np.inf))]
        assert min(neighbours, key=lambda n: abs(Fraction(float(n)) - exact)) == z


def test_a_sum_that_could_leave_32_bits_is_refused(sources: Sources) -> None:
    network = _network(sources("dense 3x3"), SIDE, SIDE)
    convolution = next(operator for operator in network.operators if isinstance(operator, integer.Convolution))
    with pytest.raises(UnsupportedError, match="do not fit into 32 bits"):
        integer.check_sums(dataclasses.replace(convolution, bias=np.full_like(convolution.bias, 2**31 - 1000)))
