import dataclasses
import re
import sys

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from edgekit import models
from edgekit.compress.export import export_onnx
from edgekit.compress.fuse import fuse
from edgekit.compress.quantize import quantize_static
from edgekit.compress.simplify import simplify
from edgekit.errors import InputError, IntegrityError, UnsupportedError
from edgekit.graph import checks, walk
from edgekit.graph.reference import Reference, agreement_db, probe, relative_change
from edgekit.recipe import Quantization

SIGMA = 25 / 255
PICTURES = [(probe(48, 64, 1, seed=i), SIGMA) for i in range(8)]
EVERYTHING = Quantization(calibration_pictures=8, keep_float=(), change_basis=False)
FLOAT_ENDS = dataclasses.replace(EVERYTHING, keep_float=("head", "tail", "skip"))


class Net(nn.Module):
    """A blind network around a body, for one gray channel."""

    channels, stride, takes_sigma = 1, 1, False

    def __init__(self, *body: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)

    def forward(self, noisy):
        return noisy - self.body(noisy)


def lived_in(net: nn.Module, seed: int = 0) -> nn.Module:
    """Give the BatchNorms statistics and weights such as training leaves, of either sign and uneven."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.copy_(torch.randn_like(module.weight))
                module.bias.normal_()
        net.train()
        for step in range(20):
            noisy = torch.from_numpy(probe(64, 64, net.channels, seed=step))
            net(*((noisy, torch.full((1, 1, 1, 1), SIGMA)) if net.takes_sigma else (noisy,)))
    return net.eval()


def example(net: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
    noisy = torch.from_numpy(probe(64, 96, net.channels, seed=99))
    return noisy, torch.full((1, 1, 1, 1), SIGMA) if net.takes_sigma else None


def export(net: nn.Module, path):
    return export_onnx(net, channels=net.channels, takes_sigma=net.takes_sigma, stride=net.stride, out=path)


@pytest.fixture(scope="module")
def nano_onnx(tmp_path_factory):
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("nano")
    return simplify(export(models.create("nano"), folder / "nano.onnx"), folder / "simple.onnx")


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: models.create("nano", {"batchnorm": True}), id="nano"),
        pytest.param(lambda: models.create("nano", {"batchnorm": True, "noise_level": False}), id="blind nano"),
        pytest.param(
            lambda: Net(nn.Conv2d(1, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 1, 1)),
            id="before ReLU",
        ),
        pytest.param(lambda: Net(nn.Conv2d(1, 1, 3, padding=1), nn.BatchNorm2d(1)), id="without activation"),
        pytest.param(
            lambda: Net(nn.Conv2d(1, 4, 2, 2), nn.ConvTranspose2d(4, 1, 2, 2), nn.BatchNorm2d(1)), id="transposed"
        ),
        pytest.param(
            lambda: Net(
                nn.Conv2d(1, 4, 1), nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.BatchNorm2d(4), nn.Conv2d(4, 1, 1)
            ),
            id="depthwise",
        ),
    ],
)
def test_fusing_leaves_no_batchnorm_and_the_same_picture(make):
    net = lived_in(make())
    noisy, sigma = example(net)
    fused = fuse(net, noisy, sigma)
    assert not [m for m in fused.modules() if isinstance(m, nn.BatchNorm2d)]
    assert [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)], "the network that was given is left as it was"
    other = torch.from_numpy(probe(32, 48, 1, seed=5))
    arguments = (other,) if sigma is None else (other, sigma)
    with torch.no_grad():
        assert relative_change(fused(*arguments).numpy(), net(*arguments).numpy()) < 1e-5


def test_a_batchnorm_student_goes_all_the_way_to_int8(tmp_path):
    net = lived_in(models.create("nano", {"batchnorm": True, "channels": 3}))
    fused = fuse(net, *example(net))
    path = simplify(export(fused, tmp_path / "student.onnx"), tmp_path / "simple.onnx")
    assert "BatchNormalization" not in checks.op_counts(checks.load_onnx(path))
    noisy = probe(40, 72, 3, seed=3)
    with torch.no_grad():
        want = net(torch.from_numpy(noisy), torch.full((1, 1, 1, 1), SIGMA)).numpy()
    assert relative_change(Reference(checks.load_onnx(path))(noisy, SIGMA), want) < 1e-4
    pictures = [(probe(48, 64, 3, seed=i), SIGMA) for i in range(8)]
    report = quantize_static(path, pictures, tmp_path / "int8.onnx", FLOAT_ENDS)
    assert report.integer_macs_permille > 700


class Twice(Net):
    """Reads a convolution's output once more, beside the BatchNorm."""

    def forward(self, noisy):
        conv, norm = self.body
        x = conv(noisy)
        return noisy - norm(x) - x


class Shared(Net):
    """Runs one convolution and its BatchNorm twice."""

    def forward(self, noisy):
        return noisy - self.body(self.body(noisy))


class Unused(Net):
    """Has a BatchNorm that forward does not run."""

    def forward(self, noisy):
        return noisy - self.body[0](noisy)


class Borrowed(Net):
    """Reads the weights of a folded convolution a second time."""

    def forward(self, noisy):
        return noisy - self.body(noisy) - nn.functional.conv2d(noisy, self.body[0].weight, padding=1)


class Branching(Net):
    """Decides by the values of the picture."""

    def forward(self, noisy):
        return noisy - self.body(noisy) if noisy.mean() > 0 else noisy


class Measuring(Net):
    """Looks at the number of dimensions."""

    def forward(self, noisy):
        return noisy - self.body(noisy) if len(noisy.shape) == 4 else noisy


def conv_and_norm() -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(1, 1, 3, padding=1), nn.BatchNorm2d(1)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        pytest.param(lambda: Net(nn.BatchNorm2d(1), nn.Conv2d(1, 1, 1)), "'body.0'.*its input is 'noisy'", id="first"),
        pytest.param(
            lambda: Net(nn.Conv2d(1, 1, 1), nn.ReLU(), nn.BatchNorm2d(1)),
            r"'body.2'.*'body.1' \(ReLU\)",
            id="after ReLU",
        ),
        pytest.param(lambda: Twice(*conv_and_norm()), "'body.1'.*'body.0' is also read by 'sub_1'", id="read twice"),
        pytest.param(lambda: Shared(*conv_and_norm()), "'body.1'.*more than once", id="run twice"),
        pytest.param(lambda: Unused(*conv_and_norm()), r"'body.1'.*forward\(\) does not run it", id="not run"),
        pytest.param(
            lambda: Net(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1, track_running_stats=False)),
            "'body.1'.*no running statistics",
            id="no statistics",
        ),
        pytest.param(
            lambda: Net(
                nn.Conv2d(1, 4, 1), nn.ConvTranspose2d(4, 4, 1, groups=2), nn.BatchNorm2d(4), nn.Conv2d(4, 1, 1)
            ),
            "'body.2'.*has 2 groups",
            id="grouped transposed",
        ),
        pytest.param(lambda: Branching(*conv_and_norm()), "Branching.*cannot be traced", id="branches on pixels"),
        pytest.param(lambda: Measuring(*conv_and_norm()), "Measuring.*cannot be traced: 'len'", id="asks for a length"),
    ],
)
def test_a_batchnorm_that_cannot_be_folded_is_refused_by_name(make, said):
    with pytest.raises(UnsupportedError, match=said):
        fuse(make(), *example(Net()))


def test_folding_that_moves_the_output_stops_with_the_figure():
    net = lived_in(Borrowed(*conv_and_norm()))
    with pytest.raises(IntegrityError, match=r"moved the output by [\d.]+"):
        fuse(net, *example(net))


@pytest.mark.parametrize(("size", "pads"), [(3, [2, 2, 2, 2]), ((2, 4), [1, 3, 1, 3])], ids=str)
def test_a_dilated_convolution_padded_as_same_says_by_how_much(tmp_path, size, pads):
    net = nn.Conv2d(1, 1, size, padding="same", dilation=2)
    path = export_onnx(net, channels=1, takes_sigma=False, stride=8, out=tmp_path / "same.onnx")
    (node,) = onnx.load(path).graph.node
    assert walk.attribute(node, "pads") == pads


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["nano", "control", "teacher-a"])
def test_an_exported_network_is_clean_and_the_same_every_time(tmp_path, name, channels):
    torch.manual_seed(0)
    net = models.create(name, {"channels": channels})
    first, second = export(net, tmp_path / "a.onnx"), export(net, tmp_path / "b.onnx")
    assert first.read_bytes() == second.read_bytes()
    model = checks.load_onnx(first)
    operators = checks.op_counts(model)
    del model.graph.initializer[:]  # random bytes spell anything now and then
    assert not re.findall(rb"site-packages|\.py\b|" + re.escape(str(tmp_path).encode()), model.SerializeToString())
    assert not {"Reshape", "Transpose", "Unsqueeze", "BatchNormalization"} & set(operators)
    assert ("SpaceToDepth" in operators) == (name != "teacher-a")


class Colours(nn.Module):
    """Shows the channels of PixelUnshuffle in the open, with no convolution to hide their order in."""

    channels, stride, takes_sigma = 3, 2, False

    def forward(self, noisy):
        x = nn.functional.pixel_unshuffle(noisy, 2)
        return noisy - nn.functional.pixel_shuffle(x * torch.arange(12.0).view(1, 12, 1, 1), 2)


def test_the_channels_of_a_pixel_unshuffle_keep_their_order(tmp_path):
    model = checks.load_onnx(export(Colours(), tmp_path / "colours.onnx"))
    noisy = probe(16, 24, 3, seed=0)
    assert relative_change(Reference(model)(noisy, 0.0), Colours()(torch.from_numpy(noisy)).numpy()) < 1e-6


class Frozen(Net):
    """Computes a number from the picture in Python, which tracing turns into a constant."""

    def forward(self, noisy):
        return noisy * float(noisy.std())


class FrozenLevel(Net):
    """Computes with the noise level in Python."""

    takes_sigma = True

    def forward(self, noisy, sigma):
        return noisy * float(sigma)


class Spectrum(Net):
    """Uses an operator that ONNX has no form for."""

    def forward(self, noisy):
        return torch.special.bessel_j0(noisy)


@pytest.mark.parametrize(
    ("net", "error", "said"),
    [
        pytest.param(Net(nn.BatchNorm2d(1)), UnsupportedError, "BatchNormalization", id="BatchNorm left"),
        pytest.param(Frozen(), IntegrityError, r"at 40x56 the exported graph differs", id="frozen value"),
        pytest.param(FrozenLevel(), IntegrityError, r"at 64x96 the exported graph differs", id="frozen noise level"),
        pytest.param(Spectrum(), UnsupportedError, "bessel_j0", id="no such operator"),
    ],
)
def test_an_export_that_would_be_wrong_leaves_no_file(tmp_path, net, error, said):
    with pytest.raises(error, match=said):
        export(net, tmp_path / "net.onnx")
    assert list(tmp_path.iterdir()) == []


def test_an_operator_that_onnx_has_no_form_for_is_refused_without_a_word_of_torchs(tmp_path, capfd):
    with pytest.raises(UnsupportedError, match="bessel_j0"):
        export(Spectrum(), tmp_path / "net.onnx")
    sys.stdout.write("after\n")
    assert capfd.readouterr().out == "after\n"


def altered(change):
    """Return a simplifier that changes the model's largest weight."""

    def simplifier(model: onnx.ModelProto) -> onnx.ModelProto:
        tensor = max(model.graph.initializer, key=lambda t: len(t.raw_data))
        tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor)).astype(np.float32), tensor.name))
        return model

    return simplifier


def beheaded(model: onnx.ModelProto) -> onnx.ModelProto:
    del model.graph.node[0]
    return model


@pytest.mark.parametrize(
    ("simplifier", "said"),
    [
        pytest.param(altered(lambda w: w * 1.05), "moved the output at 64x96 by", id="a weight 5 percent off"),
        pytest.param(altered(lambda w: w * np.nan), "moved the output at 64x96 by nan", id="NaN"),
        pytest.param(beheaded, "not valid", id="a missing node"),
    ],
)
def test_a_simplifier_that_changes_the_model_is_caught(tmp_path, nano_onnx, simplifier, said):
    with pytest.raises(IntegrityError, match=said):
        simplify(nano_onnx, tmp_path / "out.onnx", simplifier=simplifier)
    assert list(tmp_path.iterdir()) == []


def test_a_network_that_gives_values_that_are_not_finite_is_named_itself(tmp_path):
    class Root(nn.Module):
        def forward(self, noisy: torch.Tensor) -> torch.Tensor:
            return noisy - 0 * torch.sqrt(noisy - 10)

    path = tmp_path / "root.onnx"
    torch.onnx.export(
        Root(),
        torch.rand(1, 1, 64, 64),
        path,
        input_names=["noisy"],
        output_names=["denoised"],
        dynamo=False,
        dynamic_axes={name: {2: "h", 3: "w"} for name in ("noisy", "denoised")},
    )
    with pytest.raises(
        InputError, match=r"root\.onnx: gives values that are not finite for a picture of 96x64 at noise"
    ):
        simplify(path, tmp_path / "out.onnx")


def test_simplifying_is_the_same_every_time_and_leaves_no_notes(tmp_path, nano_onnx):
    again, twice = simplify(nano_onnx, tmp_path / "a.onnx"), simplify(nano_onnx, tmp_path / "b.onnx")
    assert again.read_bytes() == twice.read_bytes()
    model = onnx.load(again)
    assert not model.metadata_props
    assert not model.graph.value_info


def hand_made(opset: int = 17, *, domain: str = "", inputs: int = 1) -> onnx.ModelProto:
    """Return two convolutions, the first one's weights of a Constant node, the second one of so many inputs."""
    random = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array(random.standard_normal(shape).astype(np.float32) / 9, name)
        for name, shape in (("w", (8, 1, 3, 3)), ("v", (1, 8 * inputs, 3, 3)))
    ]
    make, size = onnx.helper.make_node, [1, 1, "h", "w"]
    nodes = [
        make("Constant", [], ["w"], "constant", value=weights[0]),
        make("Conv", [checks.NOISY, "w"], ["a"], "first", pads=[1] * 4, kernel_shape=[3, 3]),
        make("Relu", ["a"], ["b"], "relu", domain=domain),
        make("Conv", ["b", "v"], ["c"], "second", pads=[1] * 4, kernel_shape=[3, 3]),
        make("Sub", [checks.NOISY, "c"], [checks.DENOISED], "last"),
    ]
    given, got = (onnx.helper.make_tensor_value_info(n, 1, size) for n in (checks.NOISY, checks.DENOISED))
    opsets = [onnx.helper.make_opsetid("", opset), *([onnx.helper.make_opsetid(domain, 1)] if domain else [])]
    return onnx.helper.make_model(
        onnx.helper.make_graph(nodes, "made", [given], [got], weights[1:]), opset_imports=opsets, ir_version=8
    )


def test_simplifying_stores_constants_as_weights(tmp_path):
    (tmp_path / "made.onnx").write_bytes(hand_made().SerializeToString())
    model = checks.load_onnx(simplify(tmp_path / "made.onnx", tmp_path / "s.onnx", simplifier=lambda model: model))
    assert "Constant" not in checks.op_counts(model)
    assert {tuple(tensor.dims) for tensor in model.graph.initializer} == {(8, 1, 3, 3), (1, 8, 3, 3)}


@pytest.mark.parametrize("opset", [9, 11, 12, 13, 18])
def test_a_graph_of_any_opset_goes_all_the_way_to_int8(tmp_path, opset):
    (tmp_path / "made.onnx").write_bytes(hand_made(opset).SerializeToString())
    fp32 = simplify(tmp_path / "made.onnx", tmp_path / "s.onnx")
    assert checks.opset(checks.load_onnx(fp32)) == (17 if opset < 13 else opset)
    assert quantize_static(fp32, PICTURES, tmp_path / "int8.onnx", EVERYTHING).integer_macs_permille == 1000


def test_an_old_graph_that_cannot_be_converted_is_refused(tmp_path):
    model = hand_made(9)
    # An experiment of the first opsets.
    model.graph.node[2].CopyFrom(onnx.helper.make_node("Affine", ["a"], ["b"], "affine", alpha=2.0, beta=0.5))
    (tmp_path / "made.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(UnsupportedError, match=r"made\.onnx: is of opset 9 and cannot be converted to 17"):
        simplify(tmp_path / "made.onnx", tmp_path / "s.onnx")


@pytest.mark.parametrize(
    ("model", "said"),
    [
        pytest.param(hand_made(domain="my.own"), "cannot load it.*my.own", id="an operator of its own"),
        pytest.param(hand_made(inputs=2), "cannot (load it|run it on a picture of 64x96)", id="shapes that do not fit"),
        pytest.param(hand_made(30), "cannot load it.*Opset 30", id="an opset to come"),
    ],
)
def test_what_onnx_runtime_does_not_run_is_refused_by_name(tmp_path, model, said):
    (tmp_path / "made.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(InputError, match=rf"made\.onnx: ONNX Runtime {said}"):
        simplify(tmp_path / "made.onnx", tmp_path / "s.onnx")


def test_pictures_may_have_to_be_multiples_of_32(tmp_path):
    net = Net(nn.Conv2d(1, 4, 32, 32), nn.ReLU(), nn.ConvTranspose2d(4, 1, 32, 32))
    net.stride = 32
    assert simplify(export(net.eval(), tmp_path / "deep.onnx"), tmp_path / "s.onnx").is_file()


def dequantized(model: onnx.ModelProto, tensor: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the scale and zero point that a tensor is dequantized with, None if it is not."""
    node = walk.producers(model).get(tensor)
    if node is None or node.op_type != "DequantizeLinear":
        return None
    stored = walk.initializers(model)
    scale, zero = (numpy_helper.to_array(stored[name]) for name in node.input[1:])
    return scale, zero


@pytest.mark.parametrize("method", ["minmax", "percentile"])
def test_int8_is_per_channel_symmetric_for_weights_and_per_tensor_for_activations(tmp_path, nano_onnx, method):
    settings = Quantization(calibration_pictures=8, keep_float=(), method=method, change_basis=False)
    report = quantize_static(nano_onnx, PICTURES, tmp_path / "int8.onnx", settings)
    model = checks.load_onnx(report.onnx)
    convolutions = [n for n in model.graph.node if n.op_type == "Conv"]
    assert report.integer_nodes == tuple(n.name for n in convolutions)
    for node in convolutions:
        scale, zero = dequantized(model, node.input[1])
        assert scale.shape == (len(scale),)
        assert len(scale) > 1
        assert zero.dtype == np.int8
        assert not zero.any()
        scale, zero = dequantized(model, node.input[0])
        assert scale.shape == ()
        assert zero.dtype == np.uint8
    assert report.integer_macs_permille == 1000


def test_equal_inputs_give_equal_int8(tmp_path, nano_onnx):
    paths = [quantize_static(nano_onnx, PICTURES, tmp_path / name, FLOAT_ENDS).onnx for name in ("a", "b")]
    assert paths[0].read_bytes() == paths[1].read_bytes()


@pytest.mark.parametrize("parts", [("head",), ("tail",), ("head", "tail")], ids="+".join)
def test_the_parts_that_are_kept_in_float_are_found_by_the_graph(tmp_path, nano_onnx, parts):
    names = [n.name for n in checks.load_onnx(nano_onnx).graph.node if n.op_type == "Conv"]
    settings = Quantization(calibration_pictures=8, keep_float=parts, change_basis=False)
    report = quantize_static(nano_onnx, PICTURES, tmp_path / "int8.onnx", settings)
    assert set(report.float_nodes) == {names[i] for i, part in ((0, "head"), (-1, "tail")) if part in parts}


def reads_rounded(node: onnx.NodeProto, model: onnx.ModelProto) -> bool:
    """Return whether a node reads a pair; one around an integer convolution does not count: it gives nothing else."""
    made_by = walk.producers(model)
    for name in node.input:
        if (half := made_by.get(name)) is None or half.op_type != "DequantizeLinear":
            continue
        pair = made_by.get(half.input[0])
        source = made_by.get(pair.input[0]) if pair is not None else None
        if source is not None and source.op_type == "Relu":
            source = made_by.get(source.input[0])
        if source is None or source.op_type != "Conv":
            return True
    return False


def test_skips_in_float_read_what_was_not_rounded_and_lose_less(tmp_path, nano_onnx):
    agreements = {}
    for parts in (("head", "tail"), ("head", "tail", "skip")):
        report = quantize_static(
            nano_onnx, PICTURES, tmp_path / "int8.onnx", dataclasses.replace(EVERYTHING, keep_float=parts)
        )
        model = checks.load_onnx(report.onnx)
        additions = {n.name for n in model.graph.node if n.op_type == "Add"}
        in_float = {n.name for n in model.graph.node if n.name in additions and not reads_rounded(n, model)}
        assert (in_float == additions) == ("skip" in parts)
        agreements[parts] = report.agreement_millidb
    assert agreements["head", "tail", "skip"] > agreements["head", "tail"] + 500


def test_the_noise_is_taken_from_the_picture_that_the_network_saw(tmp_path, nano_onnx):
    for settings, seen in ((EVERYTHING, "noisy_dequantized"), (FLOAT_ENDS, "noisy")):
        model = checks.load_onnx(quantize_static(nano_onnx, PICTURES, tmp_path / "int8.onnx", settings).onnx)
        made_by = walk.producers(model)
        assert (made_by["denoised"].op_type, made_by["denoised"].input[0]) == ("Sub", seen)
        assert made_by["/SpaceToDepth_output_0"].input[0] == seen


def constant(value: float) -> tuple[np.ndarray, float]:
    return np.full((1, 1, 48, 64), value, np.float32), SIGMA


@pytest.mark.parametrize(
    ("pictures", "settings", "said"),
    [
        pytest.param(PICTURES[:7], EVERYTHING, "7 calibration pictures, expected 8", id="seven"),
        pytest.param(PICTURES, Quantization(), "8 calibration pictures, expected 32", id="fewer than asked for"),
        pytest.param(
            [*PICTURES[:7], constant(0.5)], EVERYTHING, "picture 7 is constant: every pixel is 0.5", id="constant"
        ),
        pytest.param([constant(np.nan), *PICTURES], EVERYTHING, "picture 0.*NaN", id="NaN"),
        pytest.param(
            [(probe(48, 64, 3, seed=0), SIGMA), *PICTURES],
            EVERYTHING,
            r"picture 0 is float32 \(1, 3, 48, 64\)",
            id="colour",
        ),
        pytest.param(
            [(PICTURES[0][0].astype(np.float64), SIGMA), *PICTURES], EVERYTHING, "picture 0 is float64", id="float64"
        ),
    ],
)
def test_calibration_pictures_that_say_nothing_are_refused(tmp_path, nano_onnx, pictures, settings, said):
    with pytest.raises(InputError, match=said):
        quantize_static(nano_onnx, pictures, tmp_path / "int8.onnx", settings)


def test_weights_that_are_nan_are_refused_with_their_number(tmp_path, nano_onnx):
    model = checks.load_onnx(nano_onnx)
    tensor = next(t for t in model.graph.initializer if t.name.endswith("weight"))
    values = numpy_helper.to_array(tensor).copy()
    values.flat[:3] = np.nan
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    (tmp_path / "nan.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(InputError, match=f"'{tensor.name}' has 3 of {values.size} values that are NaN"):
        quantize_static(tmp_path / "nan.onnx", PICTURES, tmp_path / "int8.onnx", EVERYTHING)


def test_a_quantized_graph_is_not_quantized_again(tmp_path, nano_onnx):
    one_basis = dataclasses.replace(FLOAT_ENDS, change_basis=False)
    once = quantize_static(nano_onnx, PICTURES, tmp_path / "once.onnx", one_basis).onnx
    with pytest.raises(InputError, match="quantized already"):
        quantize_static(once, PICTURES, tmp_path / "twice.onnx", FLOAT_ENDS)


def test_keeping_everything_in_float_is_not_called_int8(tmp_path):
    path = export(Net(nn.Conv2d(1, 1, 3, padding=1)), tmp_path / "one.onnx")
    with pytest.raises(InputError, match="no convolution took INT8"):
        quantize_static(path, PICTURES, tmp_path / "int8.onnx", FLOAT_ENDS)


class Computed(nn.Module):
    """A convolution whose weights follow from the picture."""

    channels, takes_sigma, stride = 1, False, 1

    def __init__(self) -> None:
        super().__init__()
        self.first, self.weight = nn.Conv2d(1, 1, 3, padding=1), nn.Parameter(torch.rand(1, 1, 3, 3))

    def forward(self, noisy: torch.Tensor) -> torch.Tensor:
        return nn.functional.conv2d(self.first(noisy), self.weight * noisy.mean(), padding=1)


def test_weights_that_are_computed_are_not_for_int8(tmp_path):
    path = simplify(export(Computed(), tmp_path / "net.onnx"), tmp_path / "simple.onnx")
    with pytest.raises(UnsupportedError, match=r"simple\.onnx: '.*' \(Conv\) computes its weights"):
        quantize_static(path, PICTURES, tmp_path / "int8.onnx", EVERYTHING)


def outlier_net() -> Net:
    """Carries the picture beside a channel that is a million times larger and read by nobody."""
    net = Net(nn.Conv2d(1, 2, 1, bias=False), nn.Conv2d(2, 1, 1, bias=False))
    with torch.no_grad():
        net.body[0].weight.copy_(torch.tensor([1.0, 1e6]).view(2, 1, 1, 1))
        net.body[1].weight.copy_(torch.tensor([1.0, 0.0]).view(1, 2, 1, 1))
    return net


def test_int8_that_destroys_the_picture_stops(tmp_path):
    path = export(outlier_net(), tmp_path / "outlier.onnx")
    with pytest.raises(IntegrityError, match=r"is \d\.\d dB from the float graph"):
        quantize_static(path, PICTURES, tmp_path / "int8.onnx", EVERYTHING)
    assert not (tmp_path / "int8.onnx").exists()


def test_the_reported_agreement_is_that_of_the_file(tmp_path, nano_onnx):
    report = quantize_static(nano_onnx, PICTURES, tmp_path / "int8.onnx", FLOAT_ENDS)
    before, after = (Reference(checks.load_onnx(path)) for path in (nano_onnx, report.onnx))
    agreement = np.mean([agreement_db(after(n, s), before(n, s)) for n, s in PICTURES])
    assert report.agreement_millidb == round(1000 * agreement)
