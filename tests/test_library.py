"""The C library of a bundle: whole pictures from a network of one tile, through every door that the bundle has."""

from __future__ import annotations

import ctypes
import dataclasses
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import tiny
import torch
from conftest import Call
from numpy.typing import NDArray
from PIL import Image
from skimage import data
from torch import nn

from edgekit import backends, target
from edgekit.backends import Source
from edgekit.bundle import Built
from edgekit.compress import quantize
from edgekit.compress.export import export_onnx
from edgekit.compress.placement import PLACEMENTS
from edgekit.data import noise
from edgekit.errors import UnsupportedError
from edgekit.measure import quality
from edgekit.pipeline import networks, pages
from edgekit.recipe import Quantization
from edgekit.target import InputShape, Isa, Runner, Target

pytest.importorskip("tvm")
tvm = backends.load("tvm")
driver = sys.modules["edgekit.backends.tvm.driver"]
elf = sys.modules["edgekit.backends.tvm.elf"]
library_files = sys.modules["edgekit.backends.tvm.library"]
link = sys.modules["edgekit.backends.tvm.link"]
processor = sys.modules["edgekit.backends.tvm.processor"]
qemu = pytest.importorskip("edgekit.runners.qemu")
pytestmark = [pytest.mark.backend]

SIGMA255 = 25.0
TILE_HEIGHT, TILE_WIDTH = 32, 40
HALO = STRIDE = 4
MACHINE = platform.machine()
ANDROID = dataclasses.replace(target.load("android-arm64"), precision="float32")
HOST = dataclasses.replace(
    ANDROID,
    name="linux-here",
    isa=Isa(triple=f"{MACHINE}-linux-gnu", cpu="x86-64" if MACHINE == "x86_64" else "generic"),
    input=InputShape(height=TILE_HEIGHT, width=TILE_WIDTH),
    runner=Runner(kind="local"),
)
ARM_LINUX = dataclasses.replace(
    HOST, isa=Isa(triple="aarch64-linux-gnu", cpu="generic"), runner=Runner(kind="qemu", cpus=("cortex-a76",))
)
Array = NDArray[np.float32]
Picture = NDArray[np.uint8] | Array


class _Net(nn.Module):
    """Looks three pixels far, down by two and up again, and has different borders everywhere."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(channels, 8, 2, stride=2)
        self.middle = nn.Conv2d(8, 8, 3, padding=1)
        self.up = nn.Conv2d(8, 4 * channels, 1)

    def forward(self, noisy: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        features = torch.relu(self.middle(torch.relu(self.down(noisy))))
        return noisy - nn.functional.pixel_shuffle(self.up(features), 2) * sigma * 4


def _source(folder: Path, channels: int, name: str = "tiny", net_type: type[_Net] = _Net) -> Source:
    torch.manual_seed(channels)
    net = net_type(channels).eval()
    path = export_onnx(net, channels=channels, takes_sigma=True, stride=STRIDE, out=folder / f"{name}.onnx")
    return Source(
        name=name,
        fp32_onnx=path,
        int8_onnx=None,
        module=lambda: net,
        channels=channels,
        takes_sigma=True,
        stride=STRIDE,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bundle:
    folder: Path
    built: Built
    target: Target
    source: Source

    @property
    def library(self) -> Path:
        return self.folder / self.built.files["artifact"]

    @property
    def include(self) -> Path:
        return (self.folder / self.built.files["header"]).parent

    def python(self) -> ModuleType:
        """Return the bundle's own wrapper, imported from where it lies."""
        path = self.folder / self.built.files["python"]
        spec = importlib.util.spec_from_file_location(f"{path.stem}_{id(self)}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    def tiled(self, noisy: Array, sigma255: float = SIGMA255) -> Array:
        """Return what Python's tiling makes of planes (c, h, w) with this library's tile."""
        ((_, denoise),) = tvm.open_session(self.folder, self.built, self.target)
        return quality.denoise_tiled(
            denoise,
            np.ascontiguousarray(noisy[None]),
            sigma255 / 255,
            tile_height=TILE_HEIGHT,
            tile_width=TILE_WIDTH,
            halo=int(self.built.facts["halo_px"]),
            stride=STRIDE,
        )[0]


def _bundle(
    folder: Path, built_for: Target, channels: int = 1, name: str = "tiny", net_type: type[_Net] = _Net
) -> Bundle:
    source = _source(folder, channels, name, net_type)
    out = folder / "bundle"
    out.mkdir()
    return Bundle(folder=out, built=tvm.build(source, built_for, out), target=built_for, source=source)


@pytest.fixture(scope="module")
def gray(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return _bundle(tmp_path_factory.mktemp("gray"), HOST)


@pytest.fixture(scope="module")
def colour(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return _bundle(tmp_path_factory.mktemp("colour"), HOST, channels=3)


def _noisy(height: int, width: int, samples: int, seed: int = 0) -> NDArray[np.uint8]:
    """Return a photograph's corner with noise: (h, w) for one sample, (h, w, samples) for more."""
    photograph = np.tile(data.astronaut(), (1 + height // 512, 1 + width // 512, 1))[:height, :width]
    noisy = noise.add_gaussian(photograph.transpose(2, 0, 1), SIGMA255, index=seed)
    pixels = noise.clipped_uint8(noisy).transpose(1, 2, 0)
    if samples == 4:
        alpha = np.random.default_rng(seed).integers(0, 256, (height, width, 1), np.uint8)
        return np.concatenate([pixels, alpha], axis=2)
    return np.ascontiguousarray(pixels[..., 0] if samples == 1 else pixels)


def _as_float(pixels: NDArray[np.uint8]) -> Array:
    return pixels.astype(np.float32) / np.float32(255)


def _expected(bundle: Bundle, pixels: Picture) -> Array:
    """Return the planes (c, h, w) that the Python code gives for a picture as the library's header says."""
    given = _as_float(pixels) if pixels.dtype == np.uint8 else pixels
    planes = given[None] if given.ndim == 2 else given.transpose(2, 0, 1)[:3]
    if bundle.source.channels == 1:
        return np.concatenate([bundle.tiled(plane[None]) for plane in planes])
    if len(planes) == 1:
        luma = np.array([0.299, 0.587, 0.114], np.float32)
        return np.tensordot(luma, bundle.tiled(np.repeat(planes, 3, 0)), 1)[None].astype(np.float32)
    return bundle.tiled(planes)


SIZES = [
    pytest.param(1, 1, id="a pixel"),
    pytest.param(1, 90, id="a row"),
    pytest.param(90, 1, id="a column"),
    pytest.param(3, 2, id="tiny"),
    pytest.param(TILE_HEIGHT, TILE_WIDTH, id="a tile"),
    pytest.param(TILE_HEIGHT + 1, TILE_WIDTH - 1, id="a pixel more and one less"),
    pytest.param(97, 131, id="many tiles"),
    pytest.param(TILE_HEIGHT - 5, 300, id="wide"),
    pytest.param(259, 30, id="high"),
]


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("samples", [1, 3, 4], ids=["gray", "RGB", "RGBA"])
@pytest.mark.parametrize("network", ["gray", "colour"])
def test_a_picture_is_tiled_as_python_does_it(
    request: pytest.FixtureRequest, network: str, samples: int, height: int, width: int
) -> None:
    bundle: Bundle = request.getfixturevalue(network)
    pixels = _noisy(height, width, samples)
    wanted = _expected(bundle, pixels)
    with bundle.python().Denoiser() as denoiser:
        as_float, as_bytes = denoiser.denoise(_as_float(pixels)), denoiser.denoise(pixels)
    got = as_float[None] if samples == 1 else as_float.transpose(2, 0, 1)
    if network == "colour" and samples == 1:  # a sum, whose order numpy chooses
        assert np.abs(got - wanted).max() < 1e-6
    else:
        assert np.array_equal(got[:3], wanted)
        planes = as_bytes[None] if samples == 1 else as_bytes.transpose(2, 0, 1)
        assert np.array_equal(planes[:3], noise.clipped_uint8(wanted))
    assert (
        np.abs(got[:3] - (_as_float(pixels) if samples == 1 else _as_float(pixels).transpose(2, 0, 1)[:3])).max() > 0.01
    )
    if samples == 4:
        assert np.array_equal(as_bytes[..., 3], pixels[..., 3])
        assert np.array_equal(as_float[..., 3], _as_float(pixels)[..., 3])


def _windows(pixels: Picture, margin: int) -> tuple[Picture, Picture]:
    """Return a copy of a picture inside a larger one, whose other bytes must stay, and the larger one."""
    around = np.full((pixels.shape[0], pixels.shape[1] + margin, *pixels.shape[2:]), 77, pixels.dtype)
    window = around[:, : pixels.shape[1]]
    window[...] = pixels
    return window, around


class Api:
    """The C functions themselves, with the checks of the Python wrapper out of the way."""

    def __init__(self, bundle: Bundle) -> None:
        self.module = bundle.python()
        self.c = self.module._load(bundle.library)
        self.prefix = f"edgekit_{bundle.source.name}"
        self.workspace_size = self["workspace_size"]
        self.workspace_size.argtypes = (ctypes.c_int, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_size_t)
        self.workspace_size.restype = ctypes.c_size_t

    def __getitem__(self, name: str) -> Callable[..., int]:
        return getattr(self.c, f"{self.prefix}_{name}")

    def create(self, **options: object) -> tuple[int, ctypes.c_void_p]:
        made = ctypes.c_void_p(1)
        return self["create"](ctypes.byref(made), ctypes.byref(self.module._Options(**options))), made

    def denoise(
        self, denoiser: ctypes.c_void_p, noisy: Picture, denoised: Picture, sigma255: float = SIGMA255
    ) -> tuple[int, str]:
        samples = 1 if noisy.ndim == 2 else noisy.shape[2]
        name = "denoise_u8" if noisy.dtype == np.uint8 else "denoise_f32"
        pointers = (noisy.ctypes.data, noisy.strides[0], denoised.ctypes.data, denoised.strides[0])
        code = self[name](denoiser, *pointers, noisy.shape[1], noisy.shape[0], samples, sigma255)
        return code, self["last_error"](denoiser).decode()


@pytest.fixture(scope="module")
def api(gray: Bundle) -> Api:
    return Api(gray)


@pytest.fixture
def denoiser(api: Api) -> Iterator[ctypes.c_void_p]:
    code, made = api.create()
    assert code == 0
    yield made
    api["destroy"](made)


def _denoised(api: Api, pixels: Picture, denoiser: ctypes.c_void_p) -> Picture:
    out = np.empty_like(pixels)
    assert api.denoise(denoiser, pixels, out) == (0, "no error")
    return out


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("samples", [1, 4], ids=["gray", "RGBA"])
@pytest.mark.parametrize("as_float", [False, True], ids=["u8", "f32"])
def test_a_picture_in_place_comes_out_as_beside_it_and_nothing_around_it_changes(
    api: Api, denoiser: ctypes.c_void_p, as_float: bool, samples: int, height: int, width: int
) -> None:
    pixels = _as_float(_noisy(height, width, samples)) if as_float else _noisy(height, width, samples)
    wanted = _denoised(api, pixels, denoiser)
    window, around = _windows(pixels, margin=7)
    assert api.denoise(denoiser, window, window) == (0, "no error")
    assert np.array_equal(window, wanted)
    assert (around[:, width:] == 77).all()


@pytest.mark.parametrize("threads", [2, 5, 64])
def test_more_threads_give_the_same_picture(api: Api, denoiser: ctypes.c_void_p, threads: int) -> None:
    pixels = _noisy(150, 170, 3)
    code, several = api.create(threads=threads)
    assert code == 0
    in_place = pixels.copy()
    assert np.array_equal(_denoised(api, pixels, several), _denoised(api, pixels, denoiser))
    assert api.denoise(several, in_place, in_place)[0] == 0
    assert np.array_equal(in_place, _denoised(api, pixels, denoiser))
    api["destroy"](several)


TASK = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int)
EXECUTOR = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int, TASK, ctypes.c_void_p)


def _at_once(context: int | None, count: int, task: Callable[[int | None, int], None], job: int | None) -> None:
    threads = [threading.Thread(target=task, args=(job, index)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _backwards(context: int | None, count: int, task: Callable[[int | None, int], None], job: int | None) -> None:
    for index in reversed(range(-1, count + 1)):
        task(job, index)
        task(job, index)


def _only_the_last(context: int | None, count: int, task: Callable[[int | None, int], None], job: int | None) -> None:
    task(job, count - 1)


def _never(context: int | None, count: int, task: Callable[[int | None, int], None], job: int | None) -> None:
    pass


@pytest.mark.parametrize("run", [_at_once, _backwards, _only_the_last])
def test_an_executor_of_the_caller_gives_the_same_picture(
    api: Api, denoiser: ctypes.c_void_p, run: Callable[..., None]
) -> None:
    executor, pixels = EXECUTOR(run), _noisy(90, 100, 1)
    code, made = api.create(threads=3, executor=ctypes.cast(executor, ctypes.c_void_p))
    assert code == 0
    assert np.array_equal(_denoised(api, pixels, made), _denoised(api, pixels, denoiser))
    api["destroy"](made)


def test_an_executor_that_does_nothing_is_noticed(api: Api) -> None:
    executor, pixels = EXECUTOR(_never), _noisy(20, 20, 1)
    _, made = api.create(threads=3, executor=ctypes.cast(executor, ctypes.c_void_p))
    assert api.denoise(made, pixels, np.empty_like(pixels)) == (
        13,
        "the executor returned when 0 of 1 tiles were denoised",
    )
    api["destroy"](made)


def test_a_task_that_is_called_after_its_picture_touches_nothing(api: Api) -> None:
    kept: list[tuple[Callable[[int | None, int], None], int | None]] = []

    def keep(context: int | None, count: int, task: Callable[[int | None, int], None], job: int | None) -> None:
        kept.append((task, job))

    executor, pixels = EXECUTOR(keep), _noisy(90, 100, 1)
    _, made = api.create(threads=3, executor=ctypes.cast(executor, ctypes.c_void_p))
    out = np.zeros_like(pixels)
    assert api.denoise(made, pixels, out)[0] == 13
    for task, job in kept:
        task(job, 0)
    assert not out.any()
    api["destroy"](made)


def test_a_second_thread_in_the_same_denoiser_is_told_so(api: Api) -> None:
    found: list[int] = []
    pixels = _noisy(20, 20, 1)

    def again(context: int | None, count: int, task: Callable[[int | None, int], None], job: int | None) -> None:
        found.append(api.denoise(made, pixels, np.empty_like(pixels))[0])
        task(job, 0)

    executor = EXECUTOR(again)
    _, made = api.create(executor=ctypes.cast(executor, ctypes.c_void_p))
    assert api.denoise(made, pixels, np.empty_like(pixels)) == (0, "no error")
    assert found == [12]
    api["destroy"](made)


def test_many_denoisers_work_at_once(api: Api, denoiser: ctypes.c_void_p) -> None:
    pictures = [_noisy(70 + 9 * seed, 110 - 7 * seed, 1, seed) for seed in range(4)]
    wanted = [_denoised(api, pixels, denoiser) for pixels in pictures]
    got: dict[int, Picture] = {}

    def work(number: int) -> None:
        _, mine = api.create()
        for _ in range(5):
            got[number] = _denoised(api, pictures[number], mine)
        api["destroy"](mine)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(got[number], wanted[number]) for number in range(4))


def _aligned(size: int) -> NDArray[np.uint8]:
    memory = np.full(size + 64, 0xA5, np.uint8)
    return memory[-memory.ctypes.data % 64 :][:size]


def test_memory_of_the_caller_is_enough_when_the_library_says_so_and_no_byte_less(
    api: Api, denoiser: ctypes.c_void_p
) -> None:
    pixels = _noisy(100, 90, 3)
    fixed, in_place = api.workspace_size(2, 0, 0, 0), api.workspace_size(2, 90, 100, 3)
    assert fixed < in_place
    for size, wanted in ((fixed - 1, 2), (fixed, 0), (in_place - 1, 0), (in_place, 0)):
        memory = _aligned(size)
        code, made = api.create(threads=2, memory=memory.ctypes.data, memory_size=size)
        assert (code, bool(made)) == (wanted, wanted == 0)
        if code:
            continue
        assert np.array_equal(_denoised(api, pixels, made), _denoised(api, pixels, denoiser))
        window = pixels.copy()
        code, text = api.denoise(made, window, window)
        if size == in_place:
            assert (code, text) == (0, "no error")
            assert np.array_equal(window, _denoised(api, pixels, denoiser))
        else:
            assert code == 2
            assert f"needs {in_place - size} bytes more" in text
            assert np.array_equal(window, pixels)
        api["destroy"](made)


@pytest.mark.parametrize(
    ("threads", "width", "height", "pixel_bytes"),
    [(-1, 0, 0, 0), (65, 0, 0, 0), (1, 2**24 + 1, 1, 1), (1, 1, 2**63, 1), (1, 8, 8, 2**40)],
)
def test_no_memory_is_enough_for_what_cannot_be(
    api: Api, threads: int, width: int, height: int, pixel_bytes: int
) -> None:
    assert api.workspace_size(threads, width, height, pixel_bytes) == 0


def test_what_create_is_given_is_checked(api: Api) -> None:
    memory = _aligned(api.workspace_size(1, 0, 0, 0) + 64)
    place = memory.ctypes.data
    assert api["create"](None, None) == 1
    assert api.create(threads=-1)[0] == 9
    assert api.create(threads=65)[0] == 9
    assert api.create(memory=place + 4, memory_size=memory.size - 4)[0] == 3
    assert api.create(memory=place, memory_size=0)[0] == 2
    assert not api.create(threads=65)[1]
    api["destroy"](None)


PIXELS = _noisy(20, 30, 3)
HUGE = 2**64 - 1


@pytest.mark.parametrize(
    ("change", "code", "text"),
    [
        ({"noisy": 0}, 1, "noisy is NULL"),
        ({"denoised": 0}, 1, "denoised is NULL"),
        ({"width": 0}, 6, "a picture of 0 x 20 pixels has a side that is not 1 to 16777216"),
        ({"height": 0}, 6, "a picture of 30 x 0 pixels has a side that is not 1 to 16777216"),
        ({"width": HUGE}, 6, f"a picture of {HUGE} x 20 pixels has a side that is not 1 to 16777216"),
        ({"height": 2**24 + 1}, 6, "a picture of 30 x 16777217 pixels has a side that is not 1 to 16777216"),
        ({"noisy_stride": 89}, 7, "a stride of 89 bytes is less than a row's 90"),
        ({"denoised_stride": 0}, 7, "a stride of 0 bytes is less than a row's 90"),
        ({"noisy_stride": HUGE}, 7, f"20 rows {HUGE} bytes apart end beyond the address space"),
        ({"denoised_stride": 2**62}, 7, f"20 rows {2**62} bytes apart end beyond the address space"),
        (
            {"height": 2**24, "noisy_stride": 2**44},
            7,
            f"16777216 rows {2**44} bytes apart end beyond the address space",
        ),
        ({"format": 2}, 8, "the format is none of gray (1), RGB (3) and RGBA (4)"),
        ({"format": -1}, 8, "the format is none of gray (1), RGB (3) and RGBA (4)"),
        ({"sigma255": -1.0}, 5, "sigma255 is negative, infinite or not a number"),
        ({"sigma255": float("nan")}, 5, "sigma255 is negative, infinite or not a number"),
        ({"sigma255": float("inf")}, 5, "sigma255 is negative, infinite or not a number"),
        ({"denoised": PIXELS.ctypes.data + 1}, 4, "noisy and denoised overlap in part"),
        ({"denoised": PIXELS.ctypes.data, "denoised_stride": 91}, 4, "noisy and denoised overlap in part"),
        ({"denoised": PIXELS.ctypes.data + 19 * 90 + 89}, 4, "noisy and denoised overlap in part"),
    ],
)
def test_a_wrong_argument_gets_its_code_and_a_text_with_the_value(
    api: Api, denoiser: ctypes.c_void_p, change: dict[str, float], code: int, text: str
) -> None:
    out = np.full_like(PIXELS, 7)
    given: dict[str, float] = {
        "noisy": PIXELS.ctypes.data,
        "noisy_stride": 90,
        "denoised": out.ctypes.data,
        "denoised_stride": 90,
        "width": 30,
        "height": 20,
        "format": 3,
        "sigma255": SIGMA255,
    }
    assert api["denoise_u8"](denoiser, *(given | change).values()) == code
    assert api["last_error"](denoiser).decode() == text
    assert (out == 7).all()
    assert api["denoise_u8"](denoiser, *given.values()) == 0
    assert api["last_error"](denoiser) == b"no error"


def test_a_float_picture_must_be_aligned(api: Api, denoiser: ctypes.c_void_p) -> None:
    out = np.zeros((20, 30), np.float32)
    place = out.ctypes.data
    assert api["denoise_f32"](denoiser, place + 2, 120, place + 2, 120, 30, 19, 1, SIGMA255) == 3
    assert api["denoise_f32"](denoiser, place, 118 + 4, place, 118 + 4, 29, 19, 1, SIGMA255) == 3
    assert api["denoise_f32"](denoiser, place, 120, place, 120, 30, 20, 1, SIGMA255) == 0


def test_a_picture_in_the_working_memory_is_refused(api: Api) -> None:
    memory = _aligned(api.workspace_size(1, 0, 0, 0))
    _, made = api.create(memory=memory.ctypes.data, memory_size=memory.size)
    inside = memory[-600:].reshape(20, 30)
    assert api.denoise(made, inside, PIXELS[..., 0].copy()) == (4, "a picture overlaps the denoiser's working memory")
    api["destroy"](made)


def test_without_a_denoiser_there_is_an_error_and_no_crash(api: Api) -> None:
    assert api.denoise(ctypes.c_void_p(), PIXELS, PIXELS.copy()) == (1, "denoiser is NULL")


def test_every_code_of_the_header_has_a_text(api: Api, gray: Bundle) -> None:
    header = (gray.folder / gray.built.files["header"]).read_text()
    codes = [int(code) for code in re.findall(r"^ +EDGEKIT_TINY_\w+ = (\d+)", header, re.MULTILINE)]
    texts = [api["error_text"](code).decode() for code in codes]
    assert codes == list(range(14))
    assert len(set(texts)) == 14
    assert "unknown code" not in texts
    assert api["error_text"](99) == b"unknown code"


def test_what_is_not_finite_harms_only_what_looks_at_it(api: Api, denoiser: ctypes.c_void_p) -> None:
    good = _as_float(_noisy(60, 70, 1))
    bad = good.copy()
    bad[5, 5], bad[6, 7], bad[7, 5] = np.nan, np.inf, -np.inf
    out = np.empty_like(bad)
    assert api.denoise(denoiser, bad, out)[0] == 0
    assert np.array_equal(out[20:, 20:], _denoised(api, good, denoiser)[20:, 20:])


def test_the_largest_and_least_values_round_as_in_python(api: Api, denoiser: ctypes.c_void_p) -> None:
    steps = np.linspace(-0.3, 1.3, 128 * 200, dtype=np.float32).reshape(128, 200)
    as_float = _denoised(api, steps, denoiser)
    got = np.empty(steps.shape, np.uint8)
    pixels = noise.clipped_uint8(steps)
    assert api.denoise(denoiser, pixels, got)[0] == 0
    assert np.array_equal(got, noise.clipped_uint8(_denoised(api, _as_float(pixels), denoiser)))
    assert as_float.min() < 0
    assert as_float.max() > 1
    assert got.min() == 0
    assert got.max() == 255


def test_tiles_give_the_picture_that_the_network_gives_in_one_piece(gray: Bundle) -> None:
    large = _as_float(_noisy(128, 160, 1))
    with torch.no_grad():
        whole = gray.source.module()(torch.from_numpy(large[None, None]), torch.full((1, 1, 1, 1), SIGMA255 / 255))
    with gray.python().Denoiser() as denoiser:
        tiled = denoiser.denoise(large)
    assert np.abs(tiled - whole.numpy()[0, 0]).max() < 1e-6


SANITIZERS = {"address": "address,undefined", "threads": "thread"}
SANITIZED = [("address", 1), ("address", 3), ("threads", 1)]


def _has_sanitizer(name: str, folder: Path) -> bool:
    """Return whether the system's C compiler has the sanitizer and what it builds runs."""
    if shutil.which("gcc") is None:
        return False
    (folder / "empty.c").write_text("int main(void) { return 0; }")
    command = ["gcc", f"-fsanitize={name}", "empty.c", "-o", "empty"]
    built = subprocess.run(command, cwd=folder, capture_output=True, check=False).returncode == 0
    return built and subprocess.run([folder / "empty"], capture_output=True, check=False).returncode == 0


def _generate(folder: Path, channels: int) -> Path:
    """Return a folder with the library's generated C code, kernels and weights, as they were compiled."""
    kept = folder / "generated"
    compile_sources = library_files.compile_sources

    def keep(work: Path, zig_target: str) -> list[Path]:
        shutil.copytree(work, kept)
        return compile_sources(work, zig_target)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(library_files, "compile_sources", keep)
        _bundle(folder, HOST, channels)
    return kept


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "channels"), SANITIZED)
def test_random_pictures_and_wrong_arguments_under_a_sanitizer(tmp_path: Path, kind: str, channels: int) -> None:
    if not _has_sanitizer(SANITIZERS[kind], tmp_path):
        pytest.skip(f"no gcc with -fsanitize={SANITIZERS[kind]}")
    work = _generate(tmp_path, channels)
    shutil.copyfile(Path(__file__).parent / "sanitized.c", work / "sanitized.c")
    options = ["-g", "-O1", f"-fsanitize={SANITIZERS[kind]}", "-fno-sanitize-recover=all", "-ffp-contract=off"]
    files = ["sanitized.c", "library.c", "api.c", "jni.c", "float32.o"]
    warnings = ["-Wall", "-Wextra", "-Werror"]
    subprocess.run(["gcc", *options, *warnings, *files, "-o", "sanitized", "-lpthread"], cwd=work, check=True)
    done = subprocess.run([work / "sanitized", "1", "60"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    right, refused = map(int, re.findall(r"\d+", done.stdout))
    assert right >= 60
    assert refused >= 60


def _readme(bundle: Bundle, folder: Path) -> dict[str, list[str]]:
    """Return language -> code blocks of the page that the bundle comes with, in their order."""
    manifest = tiny.manifest(
        bundle.target,
        bundle.built,
        name=bundle.source.name,
        channels=bundle.source.channels,
        takes_sigma=bundle.source.takes_sigma,
        stride=bundle.source.stride,
        halo_px=bundle.built.facts["halo_px"],
    )
    pages.write(folder, manifest, None)
    found: dict[str, list[str]] = {}
    for language, block in re.findall(r"^```(\w+)\n(.*?)^```$", (folder / "README.md").read_text(), re.M | re.S):
        found.setdefault(language, []).append(block)
    return found


def _write_pictures(folder: Path) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Write the pictures that the README names; return the gray and the colour one."""
    gray_pixels, colour_pixels = _noisy(77, 93, 1), _noisy(71, 88, 3)
    Image.fromarray(gray_pixels).save(folder / "noisy.pgm")
    for name in ("noisy.ppm", "noisy.png"):
        Image.fromarray(colour_pixels).save(folder / name)
    return gray_pixels, colour_pixels


def _read(path: Path) -> NDArray[np.uint8]:
    pixels = np.asarray(Image.open(path))
    path.unlink()
    return pixels


def _by_wrapper(bundle: Bundle, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    with bundle.python().Denoiser() as denoiser:
        return denoiser.denoise(pixels, sigma255=25)


def _shell(lines: str, folder: Path, **environment: str) -> None:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["sh", "-ec", lines],
        cwd=folder,
        env=os.environ | {"PATH": path} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def _cross_compiler(folder: Path, zig_target: str, *options: str) -> str:
    """Return a PATH on which `cc` compiles for another system."""
    tools = folder / "tools"
    tools.mkdir()
    script = tools / "cc"
    script.write_text(
        f'#!/bin/sh\nexec {sys.executable} -m {link.ZIG} cc -target {zig_target} {" ".join(options)} "$@"\n'
    )
    script.chmod(0o755)
    return f"{tools}:{os.environ['PATH']}"


@pytest.mark.slow
def test_program_script_and_c_example_of_the_readme_each_denoise_a_picture(gray: Bundle, tmp_path: Path) -> None:
    if shutil.which("cc") is None:
        pytest.skip("no C compiler is installed")
    folder = tmp_path / "bundle"
    shutil.copytree(gray.folder, folder)
    blocks = _readme(gray, folder)
    gray_pixels, colour_pixels = _write_pictures(folder)
    wanted, wanted_colour = _by_wrapper(gray, gray_pixels), _by_wrapper(gray, colour_pixels)
    (folder / "example.py").write_text(blocks["python"][0])
    (folder / "example.c").write_text(blocks["c"][0])
    program, script, compiling = blocks["sh"]
    _shell(program, folder)
    assert np.array_equal(_read(folder / "denoised.ppm"), wanted_colour)
    _shell(script, folder)
    assert np.array_equal(_read(folder / "denoised.png"), wanted_colour)
    _shell(compiling, folder)
    for name in ("example", "example_static"):
        _shell(f"./{name}", folder)
        assert np.array_equal(_read(folder / "denoised.pgm"), wanted)
    (folder / "noisy.pgm").write_bytes(b"P5 8 4 65535\n" + bytes(64))
    assert subprocess.run(["./example_static"], cwd=folder, check=False).returncode == 1, "it has two bytes a pixel"


@pytest.fixture(scope="module")
def arm(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return _bundle(tmp_path_factory.mktemp("arm"), ARM_LINUX)


@pytest.fixture(scope="module")
def android(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return _bundle(tmp_path_factory.mktemp("android"), dataclasses.replace(ANDROID, input=HOST.input))


@pytest.mark.slow
@pytest.mark.emulated
@pytest.mark.parametrize("cpu", ["cortex-a53", "cortex-a76"])
def test_the_program_and_the_static_library_for_arm_denoise_a_picture_by_the_readme(
    gray: Bundle, arm: Bundle, android: Bundle, tmp_path: Path, cpu: str
) -> None:
    core = qemu.find(cpu)
    path = _cross_compiler(tmp_path, "aarch64-linux-musl", "-static")
    for bundle in (arm, android):
        folder = tmp_path / bundle.built.files["artifact"].split("/")[0]
        shutil.copytree(bundle.folder, folder)
        blocks = _readme(bundle, folder)
        gray_pixels, colour_pixels = _write_pictures(folder)
        (folder / "example.c").write_text(blocks["c"][0])
        _shell(blocks["sh"][-1].splitlines()[-1], folder, PATH=path)
        _shell(f"{core.program} -cpu {cpu} ./example_static", folder)
        assert np.abs(_read(folder / "denoised.pgm").astype(int) - _by_wrapper(gray, gray_pixels)).max() <= 1
        if bundle is arm:
            _shell(f"{core.program} -cpu {cpu} {blocks['sh'][0]}", folder)
            assert np.abs(_read(folder / "denoised.ppm").astype(int) - _by_wrapper(gray, colour_pixels)).max() <= 1


@pytest.mark.slow
@pytest.mark.emulated
@pytest.mark.parametrize("system", ["arm", "android"])
def test_the_shared_libraries_for_arm_are_loaded_by_the_loader_of_glibc(
    request: pytest.FixtureRequest, gray: Bundle, tmp_path: Path, system: str
) -> None:
    root = Path("/usr/aarch64-linux-gnu")
    if not (root / "lib/ld-linux-aarch64.so.1").is_file():
        pytest.skip("no glibc for arm64 (Debian's libc6-arm64-cross) is installed")
    bundle: Bundle = request.getfixturevalue(system)
    folder = tmp_path / "bundle"
    shutil.copytree(bundle.folder, folder)
    gray_pixels, _ = _write_pictures(folder)
    (folder / "example.c").write_text(_readme(bundle, folder)["c"][0])
    place = bundle.library.parent.relative_to(bundle.folder)
    # What bionic calls libc.so, glibc calls libc.so.6.
    (folder / place / "libc.so").symlink_to(root / "lib/libc.so.6")
    compiling = f"cc -Iinclude example.c -L{place} -ledgekit_tiny -o example"
    _shell(compiling, folder, PATH=_cross_compiler(tmp_path, "aarch64-linux-gnu"))
    for cpu in ("cortex-a53", "cortex-a76"):
        _shell(f"{qemu.find(cpu).program} -cpu {cpu} -L {root} -E LD_LIBRARY_PATH={place} ./example", folder)
        assert np.abs(_read(folder / "denoised.pgm").astype(int) - _by_wrapper(gray, gray_pixels)).max() <= 1


def test_the_android_library_is_fit_for_bionic_and_names_what_it_takes_from_it(android: Bundle) -> None:
    elf.check(android.library, api=24, imports=driver.ASKED)
    with pytest.raises(UnsupportedError, match="has undefined symbols: free, malloc, pthread_create, pthread_join"):
        elf.check(android.library, api=24, imports=frozenset({"getauxval"}))
    assert elf.mutable_bytes(android.library) == 0


_KEEPS_X18 = r"""
#include "edgekit_tiny.h"
#include <stdlib.h>
static float noisy[EDGEKIT_TINY_HEIGHT * EDGEKIT_TINY_WIDTH], denoised[EDGEKIT_TINY_HEIGHT * EDGEKIT_TINY_WIDTH];
int main(void)
{
    size_t size = edgekit_tiny_tile_workspace_size(), after;
    void *workspace = aligned_alloc(EDGEKIT_TINY_WORKSPACE_ALIGNMENT, size);
    __asm__ volatile("mov x18, %0" : : "r"(size));
    int code = edgekit_tiny_tile_f32(noisy, 0.1f, denoised, workspace, size);
    __asm__ volatile("mov %0, x18" : "=r"(after));
    return code ? code : after != size ? 99 : 0;
}
"""


@pytest.mark.emulated
def test_the_register_that_android_keeps_for_itself_is_left_alone(android: Bundle, tmp_path: Path) -> None:
    (tmp_path / "x18.c").write_text(_KEEPS_X18)
    path = _cross_compiler(tmp_path, "aarch64-linux-musl", "-static", "-ffixed-x18", f"-I{android.include}")
    _shell(f"cc x18.c {android.folder / android.built.files['static']} -o x18", tmp_path, PATH=path)
    _shell(f"{qemu.find('cortex-a76').program} -cpu cortex-a76 ./x18", tmp_path)


@pytest.mark.parametrize("files", [("noisy.txt",), ("missing.ppm",), ("cut.ppm",), ("deep.ppm",), ("huge.ppm",), ()])
def test_the_program_says_what_is_wrong_with_a_file(gray: Bundle, tmp_path: Path, files: tuple[str, ...]) -> None:
    (tmp_path / "noisy.txt").write_text("hello")
    (tmp_path / "cut.ppm").write_bytes(b"P6\n# a comment\n8 8 255\n" + bytes(191))
    (tmp_path / "deep.ppm").write_bytes(b"P6 8 8 65535\n" + bytes(384))
    (tmp_path / "huge.ppm").write_bytes(b"P6 16777217 8 255\n")
    wrong = {
        "noisy.txt": "is no binary PGM or PPM file (P5 or P6)",
        "missing.ppm": "cannot be opened",
        "cut.ppm": "is cut short",
        "deep.ppm": "does not have 8 bits a sample (255)",
        "huge.ppm": "has no width and height of 1 to 16777216",
    }
    program = gray.folder / gray.built.files["program"]
    command = [program, *files, *(["out.ppm"] if files else [])]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {files[0]}: {wrong[files[0]]}\n" if files else done.stderr.startswith("usage: ")
    assert not (tmp_path / "out.ppm").exists()


@pytest.mark.parametrize("option", [("--sigma", "much"), ("--threads", "0"), ("--threads", "65"), ("--level", "3")])
def test_the_program_shows_its_usage_for_a_wrong_option(gray: Bundle, option: tuple[str, str]) -> None:
    command = [gray.folder / gray.built.files["program"], *option, "a.ppm", "b.ppm"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: edgekit_tiny_denoise")


def test_the_python_wrapper_says_what_is_wrong(gray: Bundle, tmp_path: Path) -> None:
    module = gray.python()
    with pytest.raises(OSError, match=r"libedgekit_none\.so"):
        module.Denoiser(library=tmp_path / "libedgekit_none.so")
    with pytest.raises(ValueError, match="threads is 0, not 1 to 64"):
        module.Denoiser(threads=0)
    with module.Denoiser() as denoiser:
        for wrong in (np.zeros((4, 4, 2), np.uint8), np.zeros((4, 4), np.float64), np.zeros(4, np.uint8)):
            with pytest.raises(ValueError, match="is none of gray, RGB and RGBA in uint8 or float32"):
                denoiser.denoise(wrong)
        with pytest.raises(ValueError, match="has a side that is not 1 to 16777216"):
            denoiser.denoise(np.zeros((0, 4), np.uint8))
        with pytest.raises(ValueError, match="sigma255 is negative"):
            denoiser.denoise(np.zeros((4, 4), np.uint8), sigma255=-1)
        pixels = _noisy(40, 50, 3)
        assert np.array_equal(denoiser.denoise(pixels[::-1, ::2]), denoiser.denoise(pixels[::-1, ::2].copy()))
    with pytest.raises(RuntimeError, match="the denoiser is closed"):
        denoiser.denoise(pixels)


def test_the_python_wrapper_loads_a_library_of_the_current_folder(
    gray: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copyfile(gray.library, tmp_path / gray.library.name)
    monkeypatch.chdir(tmp_path)
    assert gray.python().version(gray.library.name).startswith("tiny float32")


def test_the_python_wrapper_says_that_another_thread_is_in_it(gray: Bundle) -> None:
    wrapper, pixels, found = gray.python().Denoiser(), _noisy(20, 20, 1), []
    wrapper.close()

    def again(context: int | None, count: int, task: Callable[[int | None, int], None], job: int | None) -> None:
        with pytest.raises(RuntimeError, match="another thread is in a call with the same denoiser") as raised:
            wrapper.denoise(pixels)
        found.append(raised)
        task(job, 0)

    # An executor is called while its denoiser is busy; the wrapper takes none.
    executor, api = EXECUTOR(again), Api(gray)
    _, wrapper._denoiser = api.create(executor=ctypes.cast(executor, ctypes.c_void_p))
    assert api.denoise(wrapper._denoiser, pixels, np.empty_like(pixels)) == (0, "no error")
    assert len(found) == 1
    wrapper.close()


_CLOSES_EARLY = """
import threading
from contextlib import suppress
import numpy as np
from edgekit_tiny import Denoiser

denoiser, found = Denoiser(threads=64), []
noisy = np.full((1200, 1200), 9, np.uint8)


def work():
    while not found:
        with suppress(RuntimeError):  # the other thread looks whether this one is in it
            found.append(denoiser.denoise(noisy))


thread = threading.Thread(target=work)
thread.start()
while not found:
    try:
        denoiser.denoise(noisy[:1, :1])
    except RuntimeError:
        break
assert not found, "it was too quick to be closed in the middle"
denoiser.close()
thread.join()
with Denoiser() as again:
    assert np.array_equal(found[0], again.denoise(noisy))
"""


def test_the_python_wrapper_is_closed_when_a_call_of_another_thread_has_ended(gray: Bundle, tmp_path: Path) -> None:
    (tmp_path / "closes.py").write_text(_CLOSES_EARLY)
    _shell("python closes.py", tmp_path, PYTHONPATH=str(gray.library.parent))


def test_two_models_link_statically_into_one_program(gray: Bundle, tmp_path: Path) -> None:
    if shutil.which("cc") is None:
        pytest.skip("no C compiler is installed")
    other = _bundle(tmp_path, HOST, name="other")
    (tmp_path / "both.c").write_text(
        '#include "edgekit_tiny.h"\n#include "edgekit_other.h"\n#include <stdio.h>\n'
        "int main(void) {\n"
        "    edgekit_tiny *one; edgekit_other *two;\n"
        "    int code = edgekit_tiny_create(&one, NULL) | edgekit_other_create(&two, NULL);\n"
        '    printf("%d\\n%s\\n%s\\n", code, edgekit_tiny_version(), edgekit_other_version());\n'
        "    edgekit_tiny_destroy(one), edgekit_other_destroy(two);\n"
        "    return 0;\n}\n"
    )
    archives = [bundle.folder / bundle.built.files["static"] for bundle in (gray, other)]
    command = ["cc", f"-I{gray.include}", f"-I{other.include}", "both.c", *archives, "-lpthread", "-o", "both"]
    subprocess.run(command, cwd=tmp_path, check=True)
    said = subprocess.run([tmp_path / "both"], capture_output=True, text=True, check=True).stdout.splitlines()
    assert [said[0], said[1].split()[0], said[2].split()[0]] == ["0", "tiny", "other"]


@pytest.mark.emulated
def test_a_processor_without_the_needed_instructions_gets_a_code_and_no_crash(tmp_path: Path) -> None:
    isa = Isa(triple="aarch64-linux-gnu", cpu="generic", features=("+neon", "+dotprod", "+fullfp16"))
    bundle = _bundle(tmp_path, dataclasses.replace(ARM_LINUX, isa=isa))
    program = bundle.folder / bundle.built.files["program"]
    _write_pictures(tmp_path)
    for cpu, code in (("cortex-a53", 4), ("cortex-a76", 0)):
        command = [qemu.find(cpu).program, "-cpu", cpu, program, "noisy.ppm", "out.ppm"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == code
        said = "lacks some of the instructions that the library is made of: dotprod fullfp16" in done.stderr
        assert said == (code != 0)


@pytest.mark.skipif(MACHINE != "x86_64", reason="asks an x86 processor")
@pytest.mark.emulated
@pytest.mark.slow
def test_x86_features_are_asked_for_as_the_system_tells_them(gray: Bundle, tmp_path: Path) -> None:
    emulator = shutil.which("qemu-x86_64-static") or shutil.which("qemu-x86_64")
    if emulator is None:
        pytest.skip("no qemu-x86_64 is installed")
    flags = set(Path("/proc/cpuinfo").read_text().split())
    names = {"avx2": "avx2", "avx512vnni": "avx512_vnni", "bmi2": "bmi2"}
    for feature, flag in names.items():
        assert HOST.isa is not None
        isa = dataclasses.replace(HOST.isa, features=(f"+{feature}",))
        wanted = processor.needs(isa, [])
        assert feature in wanted.features
        (tmp_path / feature).mkdir()
        bundle = _bundle(tmp_path / feature, dataclasses.replace(HOST, isa=isa))
        code, made = Api(bundle).create()
        assert code == (0 if flag in flags else 11)
        Api(bundle)["destroy"](made)
        program = bundle.folder / bundle.built.files["program"]
        _write_pictures(tmp_path)
        # A core of 2008: SSE4.2, no AVX.
        command = [emulator, "-cpu", "Nehalem", program, "noisy.ppm", "out.ppm"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert (done.returncode, f"is made of: {' '.join(wanted.features)}\n" in done.stderr) == (4, True)
        plain = [emulator, "-cpu", "Nehalem", gray.folder / gray.built.files["program"], "noisy.ppm", "out.ppm"]
        subprocess.run(plain, cwd=tmp_path, check=True)


# LLVM's name of a feature -> Linux's names of it.
HWCAPS = {
    "aes": "HWCAP_AES HWCAP_PMULL",
    "sha2": "HWCAP_SHA1 HWCAP_SHA2",
    "crc": "HWCAP_CRC32",
    "lse": "HWCAP_ATOMICS",
    "fullfp16": "HWCAP_FPHP HWCAP_ASIMDHP",
    "rdm": "HWCAP_ASIMDRDM",
    "jsconv": "HWCAP_JSCVT",
    "complxnum": "HWCAP_FCMA",
    "rcpc": "HWCAP_LRCPC",
    "sha3": "HWCAP_SHA3 HWCAP_SHA512",
    "dotprod": "HWCAP_ASIMDDP",
    "sve": "HWCAP_SVE",
    "fp16fml": "HWCAP_ASIMDFHM",
    "flagm": "HWCAP_FLAGM",
    "sve2": "HWCAP2_SVE2",
    "i8mm": "HWCAP2_I8MM",
    "bf16": "HWCAP2_BF16",
    "cssc": "HWCAP2_CSSC",
    "mops": "HWCAP2_MOPS",
    "faminmax": "HWCAP2_FAMINMAX",
}


def test_arm_features_are_asked_for_by_the_bits_of_linux() -> None:
    # Zig has Linux's own header.
    zig = Path(pytest.importorskip("ziglang").__file__).parent
    header = (zig / "lib/libc/include/aarch64-linux-any/asm/hwcap.h").read_text()
    bits = {name: 1 << int(bit) for name, bit in re.findall(r"define (HWCAP2?_\w+)\s+\(1\w* << (\d+)\)", header)}

    def word(names: str, prefix: str) -> int:
        return sum(bits[name] for name in names.split() if name.startswith(prefix))

    wanted = {name: (word(names, "HWCAP_"), word(names, "HWCAP2_")) for name, names in HWCAPS.items()}
    assert wanted == processor._AARCH64


@pytest.mark.parametrize(("cpu", "feature"), [("ampere1b", "cssc"), ("c1-pro", "mops"), ("olympus", "faminmax")])
def test_what_a_named_core_brings_along_is_asked_for(cpu: str, feature: str) -> None:
    assert feature in processor.needs(Isa(triple="aarch64-linux-gnu", cpu=cpu), []).features


@pytest.mark.parametrize("feature", ["+amx-int8", "+sme"])
def test_a_feature_that_cannot_be_asked_for_is_refused(feature: str) -> None:
    triple = "x86_64-linux-gnu" if "amx" in feature else "aarch64-linux-gnu"
    with pytest.raises(UnsupportedError, match=f"cannot ask a processor for {feature[1:]}"):
        processor.needs(Isa(triple=triple, cpu="generic", features=(feature,)), [])


def test_a_processor_that_llvm_does_not_know_is_refused() -> None:
    with pytest.raises(
        UnsupportedError, match=r"isa.cpu: LLVM knows no 'cortexa76' for aarch64-linux-gnu; did you mean"
    ):
        processor.needs(Isa(triple="aarch64-linux-gnu", cpu="cortexa76"), [])


@pytest.mark.parametrize("feature", ["+dotprd", "-dotprd"])
def test_a_feature_that_llvm_does_not_know_is_refused(feature: str) -> None:
    with pytest.raises(
        UnsupportedError, match=r"isa.features: LLVM knows no 'dotprd' for aarch64-linux-gnu; did you mean 'dotprod'\?"
    ):
        processor.needs(Isa(triple="aarch64-linux-gnu", cpu="generic", features=(feature,)), [])


def test_a_tile_without_an_inside_takes_no_larger_picture_and_says_so(tmp_path: Path) -> None:
    small = dataclasses.replace(HOST, input=InputShape(height=2 * HALO, width=TILE_WIDTH))
    bundle = _bundle(tmp_path, small)
    assert f"nothing of the tile {TILE_WIDTH}x{2 * HALO} lies inside its halo of {HALO} px" in bundle.built.notes[-1]
    _readme(bundle, tmp_path)
    said = [(tmp_path / "README.md"), *(bundle.folder / bundle.built.files[role] for role in ("header", "python"))]
    for text in (path.read_text(encoding="utf-8") for path in said):
        assert "any size" not in text
        assert f"at most {TILE_WIDTH} x {2 * HALO} pixels" in text
    with bundle.python().Denoiser() as denoiser:
        assert denoiser.denoise(_noisy(2 * HALO, 90, 1)).shape == (2 * HALO, 90)
        with pytest.raises(ValueError, match=f"so it takes pictures up to {TILE_WIDTH} x {2 * HALO}"):
            denoiser.denoise(_noisy(2 * HALO + 1, TILE_WIDTH, 1))


class _Turned(_Net):
    """How far this one looks is not known: it turns the picture."""

    def forward(self, noisy: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return super().forward(noisy.transpose(2, 3), sigma).transpose(2, 3)


def test_a_network_whose_reach_is_not_known_takes_no_larger_picture_and_says_so(tmp_path: Path) -> None:
    bundle = _bundle(tmp_path, HOST, net_type=_Turned)
    assert "(Transpose): how far it looks is not known" in bundle.built.notes[-1]
    with bundle.python().Denoiser() as denoiser:
        assert denoiser.denoise(_noisy(TILE_HEIGHT, TILE_WIDTH, 1)).shape == (TILE_HEIGHT, TILE_WIDTH)
        said = f"^how far this network looks is not known, so it takes pictures up to {TILE_WIDTH} x {TILE_HEIGHT}$"
        for height, width in ((TILE_HEIGHT + 1, TILE_WIDTH), (TILE_HEIGHT, TILE_WIDTH + 1)):
            with pytest.raises(ValueError, match=said):
                denoiser.denoise(_noisy(height, width, 1))


def test_the_class_for_android_says_the_same(tmp_path: Path) -> None:
    bundle = _bundle(tmp_path, dataclasses.replace(ANDROID, input=InputShape(height=2 * HALO, width=TILE_WIDTH)))
    text = (bundle.folder / bundle.built.files["kotlin_bytes"]).read_text(encoding="utf-8")
    assert f"Removes noise from pictures of at most {TILE_WIDTH} x {2 * HALO} pixels in direct byte buffers" in text


def test_pictures_of_any_size_are_taken_where_the_tile_has_an_inside(gray: Bundle, tmp_path: Path) -> None:
    _readme(gray, tmp_path)
    said = [(tmp_path / "README.md"), *(gray.folder / gray.built.files[role] for role in ("header", "python"))]
    assert all("any size" in path.read_text(encoding="utf-8") for path in said)


def test_a_session_that_several_threads_call_gives_each_its_picture(gray: Bundle) -> None:
    ((_, denoise),) = tvm.open_session(gray.folder, gray.built, gray.target)
    pictures = np.random.default_rng(0).random((4, 1, 1, TILE_HEIGHT, TILE_WIDTH), np.float32)
    wanted = [denoise(picture, 0.1) for picture in pictures]
    with ThreadPoolExecutor(4) as pool:
        got = pool.map(lambda i: np.array_equal(denoise(pictures[i % 4], 0.1), wanted[i % 4]), range(4000))
        assert all(got)


class _Darker(_Net):
    def forward(self, noisy: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return super().forward(noisy, sigma) * 0.5


def test_a_library_in_the_place_of_an_earlier_one_is_what_computes(gray: Bundle, tmp_path: Path) -> None:
    other = _bundle(tmp_path, HOST, net_type=_Darker)
    placed = tmp_path / "placed"
    picture = np.full((1, TILE_HEIGHT, TILE_WIDTH), 0.5, np.float32)
    for bundle in (gray, other):
        shutil.rmtree(placed, ignore_errors=True)
        shutil.copytree(bundle.folder, placed)
        got = dataclasses.replace(bundle, folder=placed).tiled(picture)
        assert np.array_equal(got, bundle.tiled(picture))
    assert got.max() < 0.3


def test_the_same_model_gives_the_same_bytes(gray: Bundle, tmp_path: Path) -> None:
    again = _bundle(tmp_path, HOST)
    for path in gray.built.files.values():
        assert (again.folder / path).read_bytes() == (gray.folder / path).read_bytes(), path


MEASURE = """
import ctypes, importlib.util, pathlib, sys
import numpy as np

spec = importlib.util.spec_from_file_location("wrapper", sys.argv[1])
wrapper = importlib.util.module_from_spec(spec)
spec.loader.exec_module(wrapper)
library = wrapper._load(pathlib.Path(sys.argv[2]))


def kib(name):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(name))


noisy = np.full((3000, 4000, 4), 100, np.uint8)
denoiser, options = ctypes.c_void_p(), wrapper._Options(threads=4)
with open("/proc/self/clear_refs", "w") as peaks:
    peaks.write("5")
before = kib("VmRSS")
assert library.edgekit_tiny_create(ctypes.byref(denoiser), ctypes.byref(options)) == 0
place = (noisy.ctypes.data, 16000)
assert library.edgekit_tiny_denoise_u8(denoiser, *place, *place, 4000, 3000, 4, 25.0) == 0
print(kib("VmHWM") - before)
"""


@pytest.mark.slow
def test_a_picture_of_twelve_megapixels_takes_the_memory_that_the_library_says(gray: Bundle, api: Api) -> None:
    wrapper = gray.folder / gray.built.files["python"]
    command = [sys.executable, "-c", MEASURE, str(wrapper), str(gray.library)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    said = api.workspace_size(4, 4000, 3000, 4)
    assert said < 64 * 2**20
    # The stacks of three threads, and pages of the library itself that are touched for the first time.
    assert int(done.stdout) * 1024 < said + 2**20
    assert int(done.stdout) * 1024 > said / 2


@pytest.mark.slow
def test_base_keeps_to_its_memory_with_the_tile_that_the_target_has(tmp_path: Path) -> None:
    shipped = target.load("android-arm64")
    source = _integer_base(tmp_path)
    isa = Isa(triple=f"{MACHINE}-linux-gnu", cpu="icelake-server" if MACHINE == "x86_64" else "generic")
    place = dataclasses.replace(shipped, isa=isa, runner=HOST.runner)
    built = tvm.build(source, place, tmp_path)
    api = Api(Bundle(folder=tmp_path, built=built, target=place, source=source))
    room = {(w, h): api.workspace_size(4, w, h, 16) for w, h in ((4000, 3000), (3000, 4000), (3464, 3464))}
    # The stacks of three threads and the library's own pages were measured as 0.9 MiB.
    assert max(room.values()) < 63 * 2**20
    assert min(room.values()) > 4 * int(built.facts["arena_bytes"])
    assert target.load("linux-arm64").input == shipped.input


def _integer_base(folder: Path) -> Source:
    net = networks.shipped("base").net
    fp32 = export_onnx(net, channels=1, takes_sigma=True, stride=net.stride, out=folder / "base.onnx")
    pictures = [(_as_float(_noisy(64, 64, 1, seed))[None, None], SIGMA255 / 255) for seed in range(8)]
    settings = Quantization(calibration_pictures=8)
    int8 = quantize.quantize_static(fp32, pictures, folder / "int8.onnx", settings, placement=PLACEMENTS["arm"]).onnx
    return Source(
        name="base",
        fp32_onnx=fp32,
        int8_onnx=int8,
        module=lambda: net,
        channels=1,
        takes_sigma=True,
        stride=net.stride,
    )


def test_another_tile_is_a_setting_of_the_command(call: Call) -> None:
    shown = call("compile", "base", "-t", "android-arm64", "--tile", "256", "--dry-run", "--json")
    (place,) = json.loads(shown.out)["items"]
    assert place["input"] == {"height": 256, "width": 256}
    refused = call("-q", "compile", "base", "-t", "onnx", "--tile", "256")
    refused.refused(2, "target 'onnx' takes pictures of any size", "leave --tile out")


@pytest.mark.slow
@pytest.mark.emulated
def test_a_whole_picture_in_integers_is_that_of_the_reference_on_every_core(tmp_path: Path) -> None:
    import test_tvm_int8 as integers

    side = 128
    net = networks.shipped("nano").net
    source = integers._source(net, tmp_path, channels=1, takes_sigma=True, stride=net.stride, name="nano")
    place = dataclasses.replace(ARM_LINUX, precision="int8", input=InputShape(height=side, width=side))
    built = tvm.build(source, place, tmp_path)
    network = integers._network(source, side, side)
    pixels = _noisy(150, 190, 1)
    wanted = quality.denoise_tiled(
        lambda tile, sigma: integers.reference.run(network, tile, sigma),
        _as_float(pixels)[None, None],
        SIGMA255 / 255,
        tile_height=side,
        tile_width=side,
        halo=int(built.facts["halo_px"]),
        stride=net.stride,
    )
    Image.fromarray(pixels).save(tmp_path / "noisy.pgm")
    program = tmp_path / built.files["program"]
    for cpu in ("cortex-a53", "cortex-a76"):
        command = [qemu.find(cpu).program, "-cpu", cpu, program, "--threads", "2", "noisy.pgm", "out.pgm"]
        subprocess.run(command, cwd=tmp_path, check=True)
        assert np.array_equal(_read(tmp_path / "out.pgm"), noise.clipped_uint8(wanted)[0, 0]), cpu
