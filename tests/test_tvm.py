"""Android libraries by TVM: the very file of a bundle, loaded and run under emulation, against ONNX Runtime."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from skimage import data
from torch import nn

from edgekit import backends, models, target
from edgekit.backends import Source
from edgekit.bundle import Built
from edgekit.errors import EdgekitError, IncompleteError, InputError, IntegrityError, ToolMissingError, UnsupportedError
from edgekit.graph import checks
from edgekit.pipeline import networks
from edgekit.pipeline.compile import float_graph
from edgekit.target import InputShape, Runner, Target

pytest.importorskip("tvm")
tvm = backends.load("tvm")
compile_module = sys.modules["edgekit.backends.tvm.compile"]
elf = sys.modules["edgekit.backends.tvm.elf"]
kernels = sys.modules["edgekit.backends.tvm.kernels"]
link = sys.modules["edgekit.backends.tvm.link"]
program = sys.modules["edgekit.backends.tvm.program"]
session = sys.modules["edgekit.backends.tvm.session"]
pytestmark = [pytest.mark.backend, pytest.mark.emulated]

ANDROID = dataclasses.replace(target.load("android-arm64").with_tile(256), precision="float32")
SIGMA = 25 / 255
FLOAT_TOLERANCE = 1e-5


def _target(height: int, width: int, cpu: str = "cortex-a76") -> Target:
    shape, runner = InputShape(height=height, width=width), Runner(kind="qemu", cpus=(cpu,))
    return dataclasses.replace(ANDROID, input=shape, runner=runner)


def _source(net: nn.Module, name: str, folder: Path, *, channels: int, takes_sigma: bool, stride: int) -> Source:
    """Export a network as the interface of every graph wants it."""
    noisy, sigma = torch.rand(1, channels, 2 * stride, 4 * stride), torch.full((1, 1, 1, 1), SIGMA)
    path = folder / f"{name}.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            net.eval(),
            (noisy, sigma) if takes_sigma else (noisy,),
            str(path),
            dynamo=False,
            opset_version=17,
            input_names=["noisy", "sigma"][: 1 + takes_sigma],
            output_names=["denoised"],
            dynamic_axes={"noisy": {2: "height", 3: "width"}, "denoised": {2: "height", 3: "width"}},
        )
    return Source(
        name=name,
        fp32_onnx=path,
        int8_onnx=None,
        module=lambda: net,
        channels=channels,
        takes_sigma=takes_sigma,
        stride=stride,
    )


def _model(name: str, folder: Path, **options: bool | int | str) -> Source:
    torch.manual_seed(0)
    net = models.create(name, options)
    for parameter in net.parameters():
        if not parameter.any():  # a zero would hide that it is not read
            nn.init.normal_(parameter, std=0.1)
    return _source(net, name, folder, channels=net.channels, takes_sigma=net.takes_sigma, stride=net.stride)


def _photograph(channels: int, height: int, width: int) -> NDArray[np.float32]:
    crop = data.astronaut()[60 : 60 + height, 100 : 100 + width, :channels].transpose(2, 0, 1)[None] / 255
    return (crop + np.random.default_rng(7).normal(0, SIGMA, crop.shape)).astype(np.float32)


def _expected(source: Source, noisy: NDArray[np.float32], sigma: float = SIGMA) -> NDArray[np.float32]:
    feeds = {"noisy": noisy}
    if source.takes_sigma:
        feeds["sigma"] = np.full((1, 1, 1, 1), sigma, np.float32)
    engine = onnxruntime.InferenceSession(str(source.fp32_onnx), providers=["CPUExecutionProvider"])
    (denoised,) = engine.run(None, feeds)
    return np.asarray(denoised)


def _difference(source: Source, height: int, width: int, out: Path) -> float:
    """Return the largest difference between the compiled network and ONNX Runtime on a photograph."""
    compiled = tvm.build(source, _target(height, width), out)
    ((_, denoise),) = tvm.open_session(out, compiled, _target(height, width))
    noisy = _photograph(source.channels, height, width)
    wanted = _expected(source, noisy)
    assert np.abs(wanted - noisy).max() > 0.01, "a network that does nothing proves nothing"
    return float(np.abs(denoise(noisy, SIGMA) - wanted).max())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bundle:
    folder: Path
    built: Built
    source: Source

    @property
    def library(self) -> Path:
        return self.folder / self.built.files["artifact"]


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("nano")
    source = _model("nano", folder)
    return Bundle(folder=folder, built=tvm.build(source, ANDROID, folder), source=source)


@pytest.fixture(scope="module")
def small_tile(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("small_tile")
    source = _model("nano", folder)
    return Bundle(folder=folder, built=tvm.build(source, _target(32, 64), folder), source=source)


def _host(bundle: Bundle) -> session.Host:
    return session.open_host(bundle.library, bundle.built, session.qemu.find("cortex-a76"), session.host_folder())


def test_the_library_gives_the_picture_of_onnx_runtime_on_every_core_of_the_target(nano: Bundle) -> None:
    crop = data.camera()[128:384, 128:384][None, None] / 255
    noisy = (crop + np.random.default_rng(1).normal(0, SIGMA, crop.shape)).astype(np.float32)
    opened = tvm.open_session(nano.folder, nano.built, ANDROID)
    assert [label for label, _ in opened] == ["qemu cortex-a53", "qemu cortex-a76"]
    for _, denoise in opened:
        assert denoise.level == "emulated"
        denoised = denoise(noisy, SIGMA)
        assert denoised.dtype == np.float32
        assert np.abs(denoised - _expected(nano.source, noisy)).max() < FLOAT_TOLERANCE


def test_the_noise_level_reaches_the_network(small_tile: Bundle) -> None:
    ((_, denoise),) = tvm.open_session(small_tile.folder, small_tile.built, _target(32, 64))
    noisy = _photograph(1, 32, 64)
    for sigma in (0.0, 0.5):
        assert np.abs(denoise(noisy, sigma) - _expected(small_tile.source, noisy, sigma)).max() < FLOAT_TOLERANCE
    assert np.abs(denoise(noisy, 0.0) - denoise(noisy, 0.5)).max() > 0.01


@pytest.mark.parametrize(
    ("name", "options", "height", "width"),
    [
        pytest.param("nano", {"channels": 3, "noise_level": False}, 64, 96, id="colour, blind"),
        pytest.param(
            "nano", {"se": True, "activation": "hardswish", "batchnorm": True}, 40, 104, id="SE, h-swish, odd tile"
        ),
        pytest.param("base", {}, 32, 32, id="base"),
        pytest.param("control", {}, 32, 32, id="control"),
        pytest.param("dncnn", {}, 24, 40, id="dncnn"),
    ],
)
def test_models_and_options_compile_and_give_the_same_picture(
    tmp_path: Path, name: str, options: dict[str, bool | int | str], height: int, width: int
) -> None:
    assert _difference(_model(name, tmp_path, **options), height, width, tmp_path) < FLOAT_TOLERANCE


class _Concatenation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 5, 3, padding=1), nn.Conv2d(6, 1, 1)

    def forward(self, noisy: torch.Tensor) -> torch.Tensor:
        return self.last(torch.cat([self.first(noisy), noisy], 1))


class _GlobalMean(nn.Module):
    def forward(self, noisy: torch.Tensor) -> torch.Tensor:
        return noisy - noisy.mean((2, 3), keepdim=True)


class _Pooled(nn.Module):
    def forward(self, noisy: torch.Tensor) -> torch.Tensor:
        return noisy - nn.functional.max_pool2d(noisy, 3, 1, 1)


def _sequence(*layers: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*layers)


NETS: dict[str, Callable[[], nn.Module]] = {
    "strided 3x3": _sequence(nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.PixelShuffle(2)),
    "strided depthwise": _sequence(
        nn.Conv2d(1, 12, 1), nn.Conv2d(12, 12, 3, 2, 1, groups=12), nn.Conv2d(12, 4, 1), nn.PixelShuffle(2)
    ),
    "depthwise 5x5": _sequence(nn.Conv2d(1, 7, 1), nn.Conv2d(7, 7, 5, padding=2, groups=7), nn.Conv2d(7, 1, 1)),
    "dilated": _sequence(nn.Conv2d(1, 4, 3, padding=2, dilation=2), nn.ReLU(), nn.Conv2d(4, 1, 3, padding=1)),
    "grouped": _sequence(nn.Conv2d(1, 8, 1), nn.Conv2d(8, 4, 3, padding=1, groups=2), nn.Conv2d(4, 1, 1)),
    "without bias": _sequence(nn.Conv2d(1, 6, 3, padding=1, bias=False), nn.Conv2d(6, 1, 1, bias=False)),
    "many channels": _sequence(nn.Conv2d(1, 260, 3, padding=1), nn.ReLU(), nn.Conv2d(260, 1, 3, padding=1)),
    "space to depth": _sequence(
        nn.PixelUnshuffle(4), nn.Conv2d(16, 48, 1), nn.Hardswish(), nn.Conv2d(48, 16, 1), nn.PixelShuffle(4)
    ),
    "concatenation": _Concatenation,
    "global mean": _GlobalMean,
    "max pooling": _Pooled,
    "max pooling without padding": _sequence(
        nn.Conv2d(1, 5, 1), nn.MaxPool2d(2), nn.Conv2d(5, 4, 3, padding=1), nn.PixelShuffle(2)
    ),
    "average without padding": _sequence(nn.AvgPool2d(2), nn.Conv2d(1, 4, 3, padding=1), nn.PixelShuffle(2)),
    "transposed 2x2": _sequence(nn.Conv2d(1, 6, 2, 2), nn.ConvTranspose2d(6, 1, 2, 2)),
    "transposed 3x3": _sequence(
        nn.Conv2d(1, 6, 2, 2), nn.ConvTranspose2d(6, 5, 3, 2, 1, output_padding=1), nn.ReLU(), nn.Conv2d(5, 1, 1)
    ),
    "transposed 4x4": _sequence(nn.Conv2d(1, 6, 2, 2), nn.ConvTranspose2d(6, 1, 4, 2, 1, bias=False)),
    "transposed 4x4 of stride 4": _sequence(nn.Conv2d(1, 6, 4, 4), nn.ConvTranspose2d(6, 1, 4, 4)),
    "transposed 5x3": _sequence(
        nn.Conv2d(1, 6, 2, 2), nn.ConvTranspose2d(6, 1, (5, 3), 2, (2, 1), output_padding=1), nn.ReLU()
    ),
}


@pytest.mark.parametrize("name", NETS)
def test_kernels_of_every_kind_are_right(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    source = _source(NETS[name](), "net", tmp_path, channels=1, takes_sigma=False, stride=4)
    assert _difference(source, 20, 28, tmp_path) < FLOAT_TOLERANCE


class _MapOnUnshuffled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(15, 12, 3, padding=1), nn.PixelShuffle(2)

    def forward(self, noisy: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        unshuffled = nn.functional.pixel_unshuffle(noisy, 2)
        level = sigma.expand(1, 3, *unshuffled.shape[2:])
        denoised: torch.Tensor = noisy - self.last(self.first(torch.cat([unshuffled, level], 1)))
        return denoised


def test_a_map_of_the_noise_level_beside_unshuffled_colour_is_compiled_in_float(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = networks.Foreign(_MapOnUnshuffled(), channels=3, stride=2, takes_sigma=True).eval()
    source = Source(
        name="net",
        fp32_onnx=float_graph(net, tmp_path),
        int8_onnx=None,
        module=lambda: net,
        channels=3,
        takes_sigma=True,
        stride=2,
    )
    assert "Gather" in checks.op_counts(checks.load_onnx(source.fp32_onnx))
    assert _difference(source, 20, 28, tmp_path) < FLOAT_TOLERANCE


@pytest.mark.parametrize(
    ("trial", "code", "text"),
    [
        ("NULL_NOISY", 1, "a pointer that is needed is NULL"),
        ("NULL_DENOISED", 1, "a pointer that is needed is NULL"),
        ("NULL_WORKSPACE", 1, "a pointer that is needed is NULL"),
        ("SMALL_WORKSPACE", 2, "the working memory is smaller than the library says that it must be"),
        ("SKEWED_WORKSPACE", 3, "the working memory is not at a multiple of 64 bytes, or floats are not at one of 4"),
        ("IN_PLACE", 4, "pictures or working memory share memory"),
        ("IN_WORKSPACE", 4, "pictures or working memory share memory"),
    ],
)
def test_a_wrong_argument_gets_its_code_and_writes_nothing(
    small_tile: Bundle, trial: str, code: int, text: str
) -> None:
    wrong = session.Request(noisy=_photograph(1, 32, 64), sigma=SIGMA, trial=session.Trial[trial])
    right = dataclasses.replace(wrong, trial=session.Trial.CORRECT)
    refused, answered = _host(small_tile).ask([wrong, right])
    assert (refused.code, refused.text) == (code, text)
    assert not refused.denoised.any()
    assert (answered.code, answered.text) == (0, "no error")


@pytest.mark.parametrize("sigma", [-0.1, float("inf"), float("nan")])
def test_a_sigma_that_is_none_is_refused(small_tile: Bundle, sigma: float) -> None:
    ((_, denoise),) = tvm.open_session(small_tile.folder, small_tile.built, _target(32, 64))
    with pytest.raises(InputError, match="sigma is negative, infinite or not a number"):
        denoise(_photograph(1, 32, 64), sigma)


def test_a_blind_model_ignores_sigma(tmp_path: Path) -> None:
    source = _model("nano", tmp_path, noise_level=False)
    blind = Bundle(folder=tmp_path, built=tvm.build(source, _target(32, 32), tmp_path), source=source)
    noisy = _photograph(1, 32, 32)
    answers = _host(blind).ask([session.Request(noisy=noisy, sigma=sigma) for sigma in (SIGMA, float("nan"))])
    assert [answer.code for answer in answers] == [0, 0]
    assert np.array_equal(answers[0].denoised, answers[1].denoised)
    assert "Ignored: this network estimates the noise" in (tmp_path / blind.built.files["header"]).read_text()


def test_a_model_that_takes_a_sigma_and_never_reads_it_is_compiled(tmp_path: Path) -> None:
    blind = _model("nano", tmp_path, noise_level=False)
    built = tvm.build(dataclasses.replace(blind, takes_sigma=True), _target(32, 32), tmp_path)
    ((_, denoise),) = tvm.open_session(tmp_path, built, _target(32, 32))
    noisy = _photograph(1, 32, 32)
    assert np.abs(denoise(noisy, SIGMA) - _expected(blind, noisy)).max() < FLOAT_TOLERANCE


def test_a_call_leaves_nothing_behind_for_the_next(small_tile: Bundle) -> None:
    first, second = _photograph(1, 32, 64), 1 - _photograph(1, 32, 64)
    requests = [session.Request(noisy=noisy, sigma=SIGMA) for noisy in (first, second, first)]
    one, other, again = _host(small_tile).ask(requests)
    assert np.array_equal(one.denoised, again.denoised)
    assert not np.array_equal(one.denoised, other.denoised)


def test_another_tile_is_refused_with_its_shape(small_tile: Bundle) -> None:
    ((_, denoise),) = tvm.open_session(small_tile.folder, small_tile.built, _target(32, 64))
    with pytest.raises(InputError, match=r"takes a tile of shape \(1, 1, 32, 64\), found \(1, 1, 64, 32\)"):
        denoise(_photograph(1, 64, 32), SIGMA)


@pytest.mark.parametrize("size", [0, 100, 4096, 60000])
def test_a_cut_library_is_an_integrity_error(small_tile: Bundle, tmp_path: Path, size: int) -> None:
    cut = tmp_path / small_tile.library.name
    cut.write_bytes(small_tile.library.read_bytes()[:size])
    built = dataclasses.replace(small_tile.built, files={"artifact": cut.name})
    ((_, denoise),) = tvm.open_session(tmp_path, built, _target(32, 64))
    with pytest.raises(IntegrityError, match=r"libedgekit_nano\.so on qemu cortex-a76 ended with code"):
        denoise(_photograph(1, 32, 64), SIGMA)


def test_the_library_is_fit_for_android_and_exports_only_its_interface(nano: Bundle) -> None:
    elf.check(nano.library, api=24, imports=sys.modules["edgekit.backends.tvm.driver"].ASKED)
    assert elf.mutable_bytes(nano.library) == 0
    with nano.library.open("rb") as stream:
        dynamic = next(elf.ELFFile(stream).iter_segments("PT_DYNAMIC"))
        exported = {symbol.name for symbol in dynamic.iter_symbols() if symbol.name}
        assert [tag.needed for tag in dynamic.iter_tags("DT_NEEDED")] == ["libc.so"]
    own = {name for name in exported if name.startswith(("edgekit_nano_", "Java_edgekit_1nano_ByteDenoiser_"))}
    assert exported - own == {"free", "getauxval", "malloc", "pthread_create", "pthread_join"}
    header = (nano.folder / nano.built.files["header"]).read_text()
    assert {name for name in own if name.startswith("e")} == set(
        re.findall(r"^(?!typedef)\w[\w *]*?\b(\w+)\(", header, re.MULTILINE)
    )


def test_the_facts_are_those_of_the_files(nano: Bundle) -> None:
    facts = nano.built.facts
    weights = 4 * models.parameter_count(models.create("nano"))
    assert (facts["tile"], facts["channels"]) == ("256x256", 1)
    assert facts["so_bytes"] == nano.library.stat().st_size
    assert weights <= int(facts["weights_bytes"]) < weights + 64 * 100
    assert 0 < int(facts["stack_bytes"]) <= kernels.MOST_STACK_BYTES
    assert nano.built.precision == "float32"
    assert set(nano.built.tools) == {"apache-tvm", "apache-tvm-ffi", "ziglang"}


@pytest.mark.parametrize(("language", "standard"), [("c", "c99"), ("c++", "c++11")])
def test_the_header_is_c_and_cpp(nano: Bundle, tmp_path: Path, language: str, standard: str) -> None:
    user = tmp_path / "user.c"
    user.write_text(
        '#include "edgekit_nano.h"\n'
        "int use(const float *in, float *out, void *workspace) {\n"
        "    enum { PIXELS = EDGEKIT_NANO_WIDTH * EDGEKIT_NANO_HEIGHT * EDGEKIT_NANO_CHANNELS };\n"
        "    int code = edgekit_nano_tile_f32(in, 0.1f, out, workspace, edgekit_nano_tile_workspace_size());\n"
        "    const char *text = edgekit_nano_error_text(code), *version = edgekit_nano_version();\n"
        "    return code == EDGEKIT_NANO_OK && PIXELS == 65536 && text && version;\n"
        "}\n"
    )
    include = nano.folder / Path(nano.built.files["header"]).parent
    options = ["-Wall", "-Wextra", "-Wpedantic", "-Werror", f"-std={standard}", "-x", language, f"-I{include}"]
    command = [sys.executable, "-m", link.ZIG, "cc", "-target", link.LINUX, *options, "-c", str(user), "-o", "user.o"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def _hashes(bundle: Path, built: Built) -> dict[str, str]:
    return {role: hashlib.sha256((bundle / path).read_bytes()).hexdigest() for role, path in built.files.items()}


AGAIN = """
import dataclasses
import sys
from pathlib import Path
from edgekit import backends, target
onnx, out = map(Path, sys.argv[1:])
source = backends.Source(
    name="nano", fp32_onnx=onnx, int8_onnx=None, module=lambda: None, channels=1, takes_sigma=True, stride=8
)
android = dataclasses.replace(target.load("android-arm64").with_tile(256), precision="float32")
backends.load("tvm").build(source, android, out)
"""


@pytest.mark.slow
def test_another_process_elsewhere_builds_the_same_bytes(nano: Bundle, tmp_path: Path) -> None:
    elsewhere = tmp_path / "else" / "where"
    elsewhere.mkdir(parents=True)
    subprocess.run(
        [sys.executable, "-c", AGAIN, str(nano.source.fp32_onnx), str(elsewhere)],
        cwd=elsewhere,
        env=os.environ | {"PYTHONHASHSEED": "12345", "TMPDIR": str(tmp_path)},
        check=True,
    )
    assert _hashes(elsewhere, nano.built) == _hashes(nano.folder, nano.built)


def test_no_path_of_this_machine_is_in_the_files(nano: Bundle) -> None:
    for path in nano.built.files.values():
        content = (nano.folder / path).read_bytes()
        for place in (str(nano.folder), tempfile.gettempdir(), str(Path.home()), str(Path.cwd())):
            assert place.encode() not in content


def test_a_precision_without_kernels_is_refused(nano: Bundle, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="has no float16 kernels; use precision: int8 or float32") as refused:
        tvm.build(nano.source, dataclasses.replace(ANDROID, precision="float16"), tmp_path)
    assert refused.value.exit_code == 4
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("shape", "told"),
    [
        (InputShape(), "has a fixed tile, input is None x None; set input.height and input.width"),
        (InputShape(width=256), "has a fixed tile, input is None x 256; set input.height and input.width"),
        (InputShape(height=256, width=252), "input 252x256 is not a tile .* to multiples of 8"),
    ],
)
def test_a_tile_that_the_model_cannot_take_is_refused(
    nano: Bundle, tmp_path: Path, shape: InputShape, told: str
) -> None:
    with pytest.raises(UnsupportedError, match=told):
        tvm.build(nano.source, dataclasses.replace(ANDROID, input=shape), tmp_path)


@pytest.mark.parametrize("triple", ["x86_64-linux-android24", "aarch64-linux-android"])
def test_another_triple_is_refused(nano: Bundle, tmp_path: Path, triple: str) -> None:
    assert ANDROID.isa is not None
    isa = dataclasses.replace(ANDROID.isa, triple=triple)
    with pytest.raises(UnsupportedError, match=f"isa.triple '{triple}'"):
        tvm.build(nano.source, dataclasses.replace(ANDROID, isa=isa, input=InputShape(height=8, width=8)), tmp_path)


@pytest.mark.parametrize(
    ("layer", "complaint"),
    [
        pytest.param(nn.Softmax(dim=1), r"kernel 'softmax\w*' has no schedule", id="no schedule"),
        pytest.param(nn.Sigmoid(), r"the kernels call expf, which a library without libc", id="needs libm"),
        pytest.param(
            nn.ConvTranspose2d(4, 4, 3, padding=1, groups=4), r"kernel '\w*transpose\w*' has no schedule", id="groups"
        ),
    ],
)
def test_what_has_no_kernel_is_named_and_leaves_nothing(tmp_path: Path, layer: nn.Module, complaint: str) -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 1), layer, nn.Conv2d(4, 1, 1))
    source = _source(net, "net", tmp_path, channels=1, takes_sigma=False, stride=4)
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(UnsupportedError, match=complaint):
        tvm.build(source, _target(16, 16), out)
    assert not list(out.iterdir())


def test_a_tvm_that_crashes_is_noticed_and_the_pin_named(
    nano: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compile_module, "_PROBE", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    compile_module._probe.cache_clear()
    try:
        with pytest.raises(ToolMissingError, match=r"exit code -11.*apache-tvm-ffi==0\.1\.14\.post0"):
            tvm.build(nano.source, ANDROID, tmp_path)
    finally:
        compile_module._probe.cache_clear()


def test_a_library_that_keeps_state_is_not_delivered(tmp_path: Path) -> None:
    (tmp_path / "counter.c").write_text("static int calls; int answer(void) { return ++calls; }")
    made = link.compile_c(tmp_path / "counter.c", link.LINUX)
    link.link_library([made], ["answer"], tmp_path / "libedgekit_x.so")
    with pytest.raises(EdgekitError, match="not reentrant"):
        compile_module._check_stateless(tmp_path / "libedgekit_x.so")


def test_code_for_another_machine_is_not_run_on_this_one(nano: Bundle) -> None:
    said = "runner 'local' cannot run code for 'aarch64-linux-android24' on this machine"
    with pytest.raises(IncompleteError, match=said):
        tvm.open_session(nano.folder, nano.built, dataclasses.replace(ANDROID, runner=Runner(kind="local")))


def test_arrays_on_the_stack_are_counted_per_kernel() -> None:
    llvm_ir = (
        "define dllexport void @one(ptr noalias %a) #0 {\nentry:\n"
        "  %p = alloca [192 x <4 x float>], align 16\n  %q = alloca [10 x float], align 16\n  ret void\n}\n"
        "define weak float @two(i16 %a) {\n  ret float 0.0\n}\n"
    )
    assert kernels.stack_bytes(llvm_ir) == {"one": 192 * 16 + 40, "two": 0}


@pytest.mark.parametrize("seed", range(20))
def test_tensors_that_live_at_the_same_time_do_not_share_memory(seed: int) -> None:
    random = np.random.default_rng(seed)
    results: list[program.Result] = []
    steps: list[program.Step] = []
    for number in range(12):
        chosen = random.choice(number, size=min(number, 2), replace=False) if number else []
        reads = (program.Input("noisy"), *(results[i] for i in chosen))
        results.append(program.Result(number, int(random.integers(1, 1000))))
        steps.append(program.Step(kernel="k", reads=reads, writes=results[-1]))
    layout = program.lay_out(steps)
    last = {r.step: max([s.writes.step for s in steps if r in s.reads], default=r.step) for r in results}
    for one, other in combinations(results[:-1], 2):
        if other.step <= last[one.step]:
            start, end = layout.arena_offsets[one.step], layout.arena_offsets[other.step]
            assert start + one.bytes <= end or end + other.bytes <= start
    assert all(offset % 64 == 0 for offset in layout.arena_offsets.values())
    assert layout.arena_bytes <= sum(-(-r.bytes // 64) * 64 for r in results)
