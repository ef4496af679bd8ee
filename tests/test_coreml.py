"""The Core ML backend on packages that it really made: the numbers, the interface, and damage that must be found."""

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import tiny
import torch
from torch import nn
from torch.nn import functional as F

from edgekit import backends, files, models, target
from edgekit.backends import Source
from edgekit.bundle import Built
from edgekit.errors import (
    EdgekitError,
    IncompleteError,
    InputError,
    IntegrityError,
    UnsupportedError,
)
from edgekit.pipeline import pages

coreml = pytest.importorskip("edgekit.backends.coreml")
from edgekit.backends.coreml import convert, engine, evaluate, structure  # noqa: E402
from edgekit.backends.coreml.program import Package  # noqa: E402

pytestmark = pytest.mark.backend

SIDE = 64
SIGMA = 25 / 255
OFF_A_MAC = pytest.mark.skipif(engine.ON_A_MAC, reason="about machines without Core ML")


def network(**options: models.Option) -> nn.Module:
    """Return a student with random weights; zeros would hide a weight that is not read."""
    torch.manual_seed(0)
    net = models.create("nano", options).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return net


def source_of(net: nn.Module, *, takes_sigma: bool = True, channels: int = 1, stride: int = 8) -> Source:
    return Source(
        name="nano",
        fp32_onnx=Path("not-read-by-this-backend.onnx"),
        int8_onnx=None,
        module=lambda: net,
        channels=channels,
        takes_sigma=takes_sigma,
        stride=stride,
    )


def small_target(**changes: object) -> target.Target:
    shipped = target.load("ios-arm64")
    return replace(shipped, **{"input": target.InputShape(height=SIDE, width=SIDE), **changes})


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return network()


@pytest.fixture(scope="module")
def made(net: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Built]:
    out = tmp_path_factory.mktemp("bundle")
    return out, backends.load("coreml").build(source_of(net), small_target(), out)


@pytest.fixture
def copy(made: tuple[Path, Built], tmp_path: Path) -> Path:
    """Return a package that the test may damage."""
    return Path(shutil.copytree(made[0] / "nano.mlpackage", tmp_path / "nano.mlpackage"))


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    crop = skimage.data.camera()[100 : 100 + SIDE, 200 : 200 + SIDE].astype(np.float32) / 255
    noise = np.random.default_rng(7).normal(0, SIGMA, crop.shape).astype(np.float32)
    return (crop + noise)[None, None]


def psnr_db(got: np.ndarray, want: np.ndarray) -> float:
    return float(-10 * np.log10(np.mean((got.astype(np.float64) - want) ** 2)))


def edit_spec(package: Path, edit: Callable[[object], None]) -> None:
    path = package / engine.SPEC_FILE
    spec = engine.ct.proto.Model_pb2.Model.FromString(path.read_bytes())
    edit(spec)
    path.write_bytes(spec.SerializeToString(deterministic=True))


def damage_weights(package: Path, *, record: bool) -> None:
    """Overwrite eight bytes of the last blob; with `record`, let the specification vouch for the damaged file."""
    weights = package / engine.WEIGHT_FILE
    content = bytearray(weights.read_bytes())
    content[-8:] = b"\x12\x34" * 4
    weights.write_bytes(content)
    if record:
        edit_spec(
            package,
            lambda spec: spec.description.metadata.userDefined.update({structure.WEIGHTS_KEY: files.sha256(weights)}),
        )


def test_the_package_on_disk_computes_what_torch_computes_on_a_photograph(made, net, photo):
    ((label, session),) = [s for s in coreml.open_session(*made, small_target()) if s[1].level == "reference"]
    got = session(photo, SIGMA)
    with torch.no_grad():
        want = net(torch.from_numpy(photo), torch.full((1, 1, 1, 1), SIGMA)).numpy()
    assert label == "reference evaluation"
    assert got.shape == photo.shape
    assert got.dtype == np.float32
    assert 60 < psnr_db(got, want) < 100, "float16 must round, and must do no more than that"
    assert psnr_db(session(photo, 0.0), want) < 60, "the noise level must be read"


def test_float32_agrees_to_the_last_bits(net, photo, tmp_path):
    built = coreml.build(source_of(net), small_target(precision="float32"), tmp_path)
    session = dict(coreml.open_session(tmp_path, built, small_target()))["reference evaluation"]
    with torch.no_grad():
        want = net(torch.from_numpy(photo), torch.full((1, 1, 1, 1), SIGMA)).numpy()
    assert built.precision == "float32"
    np.testing.assert_allclose(session(photo, SIGMA), want, atol=2e-6)


def test_what_was_built_is_told_in_files_and_facts(made, net):
    out, built = made
    package = out / built.files["artifact"]
    assert {p.relative_to(package).as_posix() for p in package.rglob("*") if p.is_file()} == {
        "Manifest.json",
        "Data/com.apple.CoreML/model.mlmodel",
        "Data/com.apple.CoreML/weights/weight.bin",
    }
    assert (built.precision, built.tools["coremltools"]) == ("float16", "9.0")
    assert built.facts["package_bytes"] == sum(p.stat().st_size for p in package.rglob("*") if p.is_file())
    assert (built.facts["tile"], built.facts["spec_version"]) == ("64x64", 8)
    assert "27 conv" in str(built.facts["operators"])
    assert built.facts["weights_checked"] == len(list(net.parameters()))


def test_the_app_sees_stable_names_float32_and_who_made_it(made):
    spec = engine.ct.utils.load_spec(str(made[0] / "nano.mlpackage"))
    package = structure.check_structure(made[0] / "nano.mlpackage")
    assert {n: t.shape for n, t in package.described_inputs.items()} == {"noisy": (1, 1, 64, 64), "sigma": (1, 1, 1, 1)}
    assert {t.dtype for t in package.described_inputs.values()} == {"fp32"}
    assert package.described_outputs == {"denoised": package.described_inputs["noisy"]}
    about = spec.description.metadata
    assert all((about.author, about.license, about.versionString, about.shortDescription))
    assert all(feature.shortDescription for feature in (*spec.description.input, *spec.description.output))
    wanted = {"precision": "float16", "tile": "64x64", "stride": "8", "channels": "1", "target": "ios-arm64"}
    assert wanted.items() <= {k.removeprefix("com.edgekit."): v for k, v in about.userDefined.items()}.items()
    assert not [key for key in about.userDefined if "date" in key]


def test_a_blind_colour_network_has_no_sigma_in_the_package_nor_in_swift(tmp_path):
    net = network(noise_level=False, channels=3)
    built = coreml.build(source_of(net, takes_sigma=False, channels=3), small_target(), tmp_path)
    package = structure.check_structure(tmp_path / built.files["artifact"])
    assert {n: t.shape for n, t in package.program.inputs.items()} == {"noisy": (1, 3, 64, 64)}
    assert "sigma" not in (tmp_path / built.files["swift"]).read_text()


def test_the_swift_file_names_this_package_and_its_interface(made):
    swift = (made[0] / made[1].files["swift"]).read_text()
    for text in ('forResource: "nano"', '"noisy"', '"sigma"', '"denoised"', "height = 64", ".cpuAndNeuralEngine"):
        assert text in swift
    assert "Never compiled" in swift
    assert swift.count("{") == swift.count("}")


BUILD_AGAIN = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_coreml as t
t.coreml.build(t.source_of(t.network()), t.small_target(), Path({out!r}))
"""


def test_another_process_builds_the_same_bytes_and_says_nothing(made, tmp_path):
    code = BUILD_AGAIN.format(tests=str(Path(__file__).parent), out=str(tmp_path))
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    names = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file())
    assert len(names) == 4
    for name in names:
        assert (tmp_path / name).read_bytes() == (made[0] / name).read_bytes(), name


def test_the_manifest_names_its_items_by_uuids_that_follow_the_content(made, tmp_path, net):
    ours = json.loads((made[0] / "nano.mlpackage/Manifest.json").read_text())
    with torch.no_grad():
        other = network()
        other.tail.weight.add_(0.01)
    coreml.build(source_of(other), small_target(), tmp_path)
    theirs = json.loads((tmp_path / "nano.mlpackage/Manifest.json").read_text())
    assert ours["rootModelIdentifier"] in ours["itemInfoEntries"]
    assert not set(ours["itemInfoEntries"]) & set(theirs["itemInfoEntries"])


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("Torch version 2.13.0 has not been tested with coremltools. You may run into unexpected errors.", False),
        ("scikit-learn version 1.9.1 is not supported. Minimum required version: 0.17.", False),
        ("Fail to import BlobReader from libmilstoragepython. no such file", True),
        ("Failed to load _MLModelProxy: symbol not found", True),
        ("\n\nERROR - converting 'fft_fft2' op (located at: 'net/3'):\n", False),
    ],
    ids=["torch version", "scikit-learn version", "broken weight reader", "broken proxy", "operator"],
)
def test_only_the_harmless_messages_are_hidden(message, shown, caplog):
    logging.getLogger("coremltools").warning(message)
    assert (message in caplog.messages) is shown


def test_overwritten_weights_are_found_from_the_package_alone(copy):
    damage_weights(copy, record=False)
    with pytest.raises(IntegrityError, match=r"weight\.bin: SHA-256 is"):
        structure.check_structure(copy)


def test_overwritten_weights_are_found_against_the_network_even_where_the_hash_was_made_to_fit(copy, net):
    assert structure.check_weights(structure.check_structure(copy), net) == 55
    damage_weights(copy, record=True)
    package = structure.check_structure(copy)
    with pytest.raises(IntegrityError, match=r"the constant '.*' .* is no weight of MobileUnet"):
        structure.check_weights(package, net)


EVERYTHING = {"activation": "hardswish", "se": True, "batchnorm": True, "channels": 3}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        *(pytest.param(name, {}, id=name) for name in models.names()),
        pytest.param("nano", EVERYTHING, id="every option"),
    ],
)
def test_every_shipped_network_becomes_a_package(name, options, tmp_path):
    torch.manual_seed(0)
    net = models.create(name, options).eval()
    source = source_of(net, takes_sigma=net.takes_sigma, channels=net.channels, stride=net.stride)
    built = coreml.build(source, small_target(), tmp_path)
    assert built.facts["reference_agreement_db"] >= 60


def test_another_networks_answers_are_refused(copy, photo):
    with pytest.raises(IntegrityError, match=r"agrees with the network to .* dB, expected at least 60"):
        convert.check_agreement(structure.check_structure(copy), network(noise_level=True, se=True), (photo, SIGMA), 60)


def test_answers_that_are_not_finite_are_refused(copy, net, photo):
    photo = photo.copy()
    photo[0, 0, 0, 0] = 1e6
    with pytest.raises(IntegrityError, match="exceed half precision's range"):
        convert.check_agreement(structure.check_structure(copy), net, (photo, SIGMA), 60)


def operations(spec: object) -> list:
    (block,) = spec.mlProgram.functions["main"].block_specializations.values()
    return block.operations


def rename_output(spec: object) -> None:
    spec.description.output[0].name = "cleaned"


def rename_input_everywhere(spec: object) -> None:
    spec.description.input[0].name = "image"
    function = spec.mlProgram.functions["main"]
    function.inputs[0].name = "image"
    for op in operations(spec):
        for argument in op.inputs.values():
            for binding in argument.arguments:
                if binding.name == "noisy":
                    binding.name = "image"


def describe_as_half(spec: object) -> None:
    spec.description.output[0].type.multiArrayType.dataType = engine.ct.proto.FeatureTypes_pb2.ArrayFeatureType.FLOAT16


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (rename_output, "describes the outputs cleaned fp32 1x1x64x64, its program has denoised"),
        (describe_as_half, "describes the outputs denoised fp16"),
        (rename_input_everywhere, "has image fp32 1x1x64x64, sigma .* expected float32 'noisy'"),
    ],
    ids=["output renamed", "output retyped", "input renamed"],
)
def test_an_interface_that_the_app_could_not_call_is_refused(edit, message, copy):
    edit_spec(copy, edit)
    with pytest.raises(IntegrityError, match=message):
        structure.check_structure(copy)


def swap_an_operator(spec: object) -> None:
    next(op for op in operations(spec) if op.type == "relu").type = "erf"


def test_an_unknown_operator_is_named_and_not_guessed(copy, made):
    edit_spec(copy, swap_an_operator)
    with pytest.raises(UnsupportedError, match=r"MIL operator\(s\) erf; replace that operator in the network"):
        coreml.open_session(copy.parent, made[1], small_target())


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", [cut, Path.unlink], ids=["cut", "missing"])
@pytest.mark.parametrize("name", ["Manifest.json", str(engine.SPEC_FILE), str(engine.WEIGHT_FILE)])
def test_every_file_of_the_package_is_needed_whole(name, damage, copy, made):
    damage(copy / name)
    with pytest.raises(IntegrityError, match=r"nano\.mlpackage: not a readable ML Program package"):
        coreml.open_session(copy.parent, made[1], small_target())


@pytest.mark.parametrize(
    ("changes", "error", "exit_code", "message"),
    [
        ({"precision": "int8"}, UnsupportedError, 4, "does not do int8 in this release; set 'precision: float16'"),
        ({"input": target.InputShape()}, UnsupportedError, 4, "fixed tile here, input is None x None"),
        ({"input": target.InputShape(height=64, width=60)}, InputError, 2, "60x64 is no multiple of 8"),
    ],
    ids=["int8", "no tile", "tile off the stride"],
)
def test_what_the_backend_does_not_do_is_refused_before_any_work(changes, error, exit_code, message, net, tmp_path):
    with pytest.raises(error, match=message) as refused:
        coreml.build(source_of(net), small_target(**changes), tmp_path)
    assert refused.value.exit_code == exit_code
    assert not list(tmp_path.iterdir())


class Spectrum(nn.Module):
    def forward(self, noisy: torch.Tensor) -> torch.Tensor:
        return torch.fft.fft2(noisy).abs()


class Computed(nn.Module):
    """A convolution whose weight is computed from its parameter, so that the package cannot hold the parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(1, 1, 5, 5))

    def forward(self, noisy: torch.Tensor) -> torch.Tensor:
        return F.conv2d(noisy, self.weight / self.weight.sum(), padding=2)


@pytest.mark.parametrize(
    ("module", "error", "message"),
    [
        (Spectrum(), UnsupportedError, "coremltools 9.0 does not convert it: .*fft_fft2"),
        (Computed(), IntegrityError, r"is no weight of Computed; .* into parameters or buffers"),
        (nn.Conv2d(2, 1, 3), InputError, "Conv2d: does not run on noisy"),
    ],
    ids=["operator", "computed weight", "wrong channels"],
)
def test_a_network_that_cannot_be_carried_over_faithfully_is_refused(module, error, message, tmp_path, caplog):
    caplog.set_level(logging.CRITICAL)
    with pytest.raises(error, match=message):
        coreml.build(source_of(module, takes_sigma=False), small_target(), tmp_path)


@pytest.mark.parametrize(
    ("kind", "error"),
    [("qemu", UnsupportedError), pytest.param("local", IncompleteError, marks=OFF_A_MAC)],
)
def test_a_runner_that_cannot_run_core_ml_is_refused(kind: str, error: type[EdgekitError], made):
    with pytest.raises(error, match=f"no emulator|'{kind}' needs a Mac"):
        coreml.open_session(*made, small_target(runner=target.Runner(kind=kind)))


def test_another_size_than_the_tile_is_refused(made):
    session = dict(coreml.open_session(*made, small_target()))["reference evaluation"]
    with pytest.raises(InputError, match=r"takes .*64, 64.* only; cut it into tiles"):
        session(np.zeros((1, 1, 128, 128), np.float32), SIGMA)


class Many(nn.Module):
    """What each layer makes of a convolution of the picture, one after the other in the channels."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.head = nn.Conv2d(4, 4, 1)
        self.layers = nn.ModuleList(layers)

    def forward(self, noisy: torch.Tensor) -> torch.Tensor:
        x = self.head(noisy)
        return torch.cat([layer(x) for layer in self.layers], 1)


class Calls(nn.Module):
    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


def prelu() -> nn.Module:
    layer = nn.PReLU(4)
    nn.init.uniform_(layer.weight, 0.1, 0.9)
    return layer


def batchnorm(channels: int) -> nn.Module:
    layer = nn.BatchNorm2d(channels)
    for values in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
        nn.init.uniform_(values, 0.5, 1.5)
    return layer


def normalized(layer: nn.Module) -> nn.Module:
    """Return a layer whose weight and bias are not those that change nothing."""
    for values in layer.parameters():
        nn.init.uniform_(values, 0.5, 1.5)
    return layer


class Channels(nn.Module):
    """A layer of the last axis, applied to the channels."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


CASES: dict[str, Callable[[], nn.Module]] = {
    "activations": lambda: Many(
        *(nn.ReLU(), nn.ReLU6(), nn.LeakyReLU(0.1), prelu(), nn.Sigmoid(), nn.Hardsigmoid(), nn.Hardswish()),
        *(nn.SiLU(), nn.Tanh(), nn.GELU(), nn.GELU(approximate="tanh"), nn.Hardtanh(-0.2, 0.3)),
        *(nn.Hardtanh(0, 1), Calls(lambda x: x.clamp(0, 1))),
    ),
    "arithmetic": lambda: Many(
        Calls(lambda x: x / (x * x + 1)),
        Calls(lambda x: torch.maximum(x, 0.3 - x)),
        Calls(lambda x: torch.minimum(x, 0.3 - x)),
    ),
    "convolutions": lambda: Many(
        nn.Conv2d(4, 6, 3, padding=1, bias=False),
        nn.Conv2d(4, 6, (3, 5), padding=(1, 2)),
        nn.Conv2d(4, 8, 3, padding=2, dilation=2, groups=2),
        nn.Conv2d(4, 6, (5, 2), padding="same"),
        nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(4, 6, 5, padding=2, padding_mode="replicate"),
        nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), batchnorm(6)),
        nn.Sequential(nn.ZeroPad2d((1, 2, 0, 3)), nn.ReLU(), nn.Conv2d(4, 6, (4, 4))),
    ),
    "down and up": lambda: Many(
        nn.Sequential(nn.Conv2d(4, 6, 2, 2), nn.ConvTranspose2d(6, 5, 2, 2)),
        nn.Sequential(nn.Conv2d(4, 6, 3, 2, 1), nn.ConvTranspose2d(6, 6, 3, 2, 1, output_padding=1, groups=2)),
        nn.Sequential(nn.MaxPool2d(2), nn.Upsample(scale_factor=2)),
        nn.Sequential(nn.MaxPool2d(3, 2, 1), nn.Upsample(scale_factor=2, mode="bilinear")),
        nn.Sequential(nn.AvgPool2d(2), nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)),
        nn.Sequential(nn.AvgPool2d(3, 2, 1), nn.PixelShuffle(2)),
        nn.Sequential(nn.AvgPool2d(3, 2, 1, count_include_pad=False), nn.PixelShuffle(2)),
        nn.AvgPool2d(3, 1, 1, count_include_pad=False),
        nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(16, 8, 1), nn.PixelShuffle(2)),
    ),
    "slices": lambda: Many(
        Calls(lambda x: F.pad(x, (2, 2, 2, 2), mode="reflect")[:, :, 2:-2, 2:-2]),
        Calls(lambda x: F.pad(x, (1, 2, 3, 4))[..., : x.shape[-2], : x.shape[-1]]),
        Calls(lambda x: x[:, :2] * x[:, 2:]),
        Calls(lambda x: torch.mul(*x.chunk(2, 1))),
        Calls(lambda x: torch.cat(torch.split(x, [1, 3], 1)[::-1], 1)),
        Calls(lambda x: x * x[:, 0].unsqueeze(1)),
        nn.Sequential(Calls(lambda x: torch.cat([x[..., ::2, 1::2], x[..., 1::2, ::2]], 1)), nn.PixelShuffle(2)),
    ),
    "maps of one number": lambda: Many(
        Calls(lambda x: x.mean((1, 2, 3), keepdim=True).expand(1, 2, x.shape[2], x.shape[3])),
        Calls(lambda x: x.mean((1, 2, 3), keepdim=True).expand_as(x)),
        Calls(lambda x: x.mean((1, 2, 3), keepdim=True).repeat(1, 2, x.shape[2], x.shape[3])),
        Calls(lambda x: torch.ones_like(x) * x.mean((1, 2, 3), keepdim=True)),
    ),
    "normalization": lambda: Many(
        nn.InstanceNorm2d(4),
        normalized(nn.InstanceNorm2d(4, affine=True)),
        normalized(nn.GroupNorm(2, 4)),
        Channels(normalized(nn.LayerNorm(4))),
    ),
    "attention": lambda: Many(
        Calls(lambda x: x * x.mean((2, 3), keepdim=True)),
        Calls(lambda x: x * x.amax((2, 3), keepdim=True)),
        Calls(lambda x: x * torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1).mean(1, keepdim=True)),
    ),
}


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], tuple[nn.Module, Package]]:
    made: dict[tuple[str, str], tuple[nn.Module, Package]] = {}
    about = engine.Description(
        author="", license="", version="", summary="", features={"noisy": "", "denoised": ""}, metadata={}
    )

    def get(name: str, compute: str) -> tuple[nn.Module, Package]:
        if (name, compute) not in made:
            torch.manual_seed(1)
            module = CASES[name]().eval()
            path = tmp_path_factory.mktemp(compute) / f"{name}.mlpackage"
            engine.convert(module, {"noisy": (1, 4, 16, 24)}, "denoised", compute, about, path)
            made[name, compute] = module, engine.read(path, evaluate.OPERATORS)
        return made[name, compute]

    return get


@pytest.mark.usefixtures("one_thread")
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize(("compute", "atol"), [("float32", 2e-6), ("float16", 8e-3)])
@pytest.mark.parametrize("name", CASES)
def test_every_operator_is_evaluated_as_torch_computes_it(name, compute, atol, converted):
    module, package = converted(name, compute)
    x = torch.from_numpy(np.random.default_rng(3).normal(0, 1, (1, 4, 16, 24)).astype(np.float32))
    got = evaluate.run(package.program, evaluate.prepare(package.program), {"noisy": x})["denoised"]
    with torch.no_grad():
        torch.testing.assert_close(got, module(x), atol=atol, rtol=atol)


def test_corners_are_aligned_where_the_program_does_not_say(converted):
    program = converted("down and up", "float32")[1].program

    def without_default(step):
        name = step.arguments.get("align_corners")
        kept = {k: v for k, v in step.arguments.items() if k != "align_corners" or not program.constants[name]}
        return replace(step, arguments=kept)

    shorter = replace(program, steps=tuple(map(without_default, program.steps)))
    assert sum(a.arguments != b.arguments for a, b in zip(program.steps, shorter.steps, strict=True)) == 1
    x = torch.from_numpy(np.random.default_rng(3).normal(0, 1, (1, 4, 16, 24)).astype(np.float32))
    wanted, got = (evaluate.run(p, evaluate.prepare(p), {"noisy": x})["denoised"] for p in (program, shorter))
    assert torch.equal(got, wanted)


def test_bilinear_as_torch_has_it_not_is_refused(converted):
    """Half-pixel centres beside aligned corners (or neither), which other converters than torch's write."""
    program = converted("down and up", "float32")[1].program
    (corners,) = {
        step.arguments["align_corners"]
        for step in program.steps
        if step.operator == "upsample_bilinear" and not program.constants[step.arguments["align_corners"]]
    }
    changed = tuple(
        replace(step, arguments={**step.arguments, "half_pixel_centers": corners})
        if step.operator == "upsample_bilinear"
        else step
        for step in program.steps
    )
    x = {"noisy": torch.zeros(1, 4, 16, 24)}
    with pytest.raises(UnsupportedError, match="half_pixel_centers"):
        evaluate.run(replace(program, steps=changed), evaluate.prepare(program), x)


MAPS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "expand": lambda noisy, sigma: sigma.expand(1, 1, noisy.shape[2], noisy.shape[3]),
    "repeat": lambda noisy, sigma: sigma.repeat(1, 1, noisy.shape[2], noisy.shape[3]),
    "ones": lambda noisy, sigma: torch.ones_like(noisy) * sigma,
    "unread": lambda noisy, sigma: torch.ones_like(noisy),
}


class Informed(nn.Module):
    """A network that is told the noise level as a map beside the picture."""

    def __init__(self, of_sigma: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.of_sigma = of_sigma
        self.head, self.tail = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 1, 3, padding=1)

    def forward(self, noisy: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        head = self.head(torch.cat([noisy, self.of_sigma(noisy, sigma)], 1))
        return noisy - self.tail(torch.relu(head) * self.of_sigma(head[:, :1], sigma))


@pytest.mark.parametrize("name", MAPS)
def test_a_map_of_the_noise_level_is_taken_however_it_is_made(name, tmp_path):
    torch.manual_seed(0)
    built = coreml.build(source_of(Informed(MAPS[name]).eval()), small_target(), tmp_path)
    assert built.facts["reference_agreement_db"] >= 60


@pytest.mark.parametrize("takes_sigma", [True, False], ids=["sigma", "blind"])
def test_a_package_spells_its_network_as_its_author_does(takes_sigma, tmp_path):
    source = replace(source_of(network(noise_level=takes_sigma), takes_sigma=takes_sigma), name="MyNet")
    built = coreml.build(source, small_target(), tmp_path)
    about = engine.ct.utils.load_spec(str(tmp_path / built.files["artifact"])).description.metadata
    kind = "Image" if takes_sigma else "Blind image"
    assert about.shortDescription == f"{kind} denoiser 'MyNet' for 64x64 tiles, computed in float16"


@pytest.mark.parametrize("takes_sigma", [True, False], ids=["sigma", "blind"])
def test_the_readme_calls_what_the_swift_file_defines(takes_sigma, tmp_path):
    built = coreml.build(source_of(network(noise_level=takes_sigma), takes_sigma=takes_sigma), small_target(), tmp_path)
    pages.write(tmp_path, tiny.manifest(small_target(), built, takes_sigma=takes_sigma), None)
    page, swift = ((tmp_path / name).read_text() for name in ("README.md", built.files["swift"]))
    (call,) = (line for line in page.splitlines() if "denoise(noisy" in line)
    (defined,) = (line for line in swift.splitlines() if "func denoise(" in line)
    assert ("sigma: 25.0 / 255.0" in call) == ("sigma: Float" in defined) == takes_sigma
    assert ("await" in call) == ("async" in defined)


def test_every_operator_of_the_table_is_exercised(converted):
    seen = {
        step.operator for name in CASES for c in ("float32", "float16") for step in converted(name, c)[1].program.steps
    }
    # Of an input that nothing reads, as above.
    assert seen == set(evaluate.OPERATORS) - {"identity"}


def weights(module: nn.Module) -> list[torch.Tensor]:
    return [t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]


@pytest.mark.parametrize("name", ["convolutions", "down and up"])
def test_no_weight_is_rewritten_on_its_way_into_the_package(name, converted):
    module, package = converted(name, "float16")
    assert structure.check_weights(package, module) == len(
        {p.detach().half().numpy().tobytes() for p in weights(module)}
    )
