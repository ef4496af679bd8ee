import dataclasses
from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
import tiny
import torch
from onnx import numpy_helper
from torch import nn

from edgekit import models
from edgekit.compress import budget, quantize
from edgekit.compress.equalize import equalize
from edgekit.compress.export import export_onnx
from edgekit.compress.placement import PLACEMENTS, place, release
from edgekit.compress.ranges import observe
from edgekit.compress.simplify import simplify
from edgekit.compress.torch_graph import TorchGraph
from edgekit.data.synthetic import dead_leaves
from edgekit.errors import InputError, UnsupportedError
from edgekit.graph import checks, float_layers, walk
from edgekit.graph.reference import Reference, agreement_db, feeds, probe, relative_change, session_options
from edgekit.measure import host
from edgekit.models.blocks import InvertedResidual
from edgekit.pipeline import networks
from edgekit.recipe import Quantization

SIGMA = 25 / 255
PICTURES = [(probe(48, 64, 1, seed=i), SIGMA) for i in range(8)]
SETTINGS = Quantization(calibration_pictures=8)
# Where the basis makes no difference to what is looked at: to try all of them takes most of the time.
ONE_BASIS = Quantization(calibration_pictures=8, change_basis=False)
# As on a processor whose sums do not saturate, whatever this one does.
WIDE_SUMS = dataclasses.replace(PLACEMENTS["onnxruntime"], saturates=False)


def exported(net, folder):
    path = export_onnx(net.eval(), channels=1, takes_sigma=net.takes_sigma, stride=net.stride, out=folder / "a.onnx")
    return simplify(path, folder / "simple.onnx")


def opened(model: onnx.ModelProto) -> Reference:
    """Return the graph in ONNX Runtime's 8-bit kernels, or as it says where the sums of those saturate."""
    return Reference(model, exact=host.sums_saturate())


@pytest.fixture(scope="module")
def nano(tmp_path_factory):
    return exported(networks.shipped("nano").net, tmp_path_factory.mktemp("nano"))


@pytest.fixture(scope="module")
def unet(tmp_path_factory):
    return quantize.prepare(exported(tiny.unet(), tmp_path_factory.mktemp("unet")), PICTURES, SETTINGS, WIDE_SUMS)


@pytest.fixture(scope="module")
def control(tmp_path_factory):
    """Return a student that loses more by its additions than `nano`, whose other parts lose as much."""
    net = networks.shipped("control").net
    return quantize.prepare(exported(net, tmp_path_factory.mktemp("control")), PICTURES, ONE_BASIS, WIDE_SUMS)


@pytest.fixture(scope="module")
def prepared(nano):
    return quantize.prepare(nano, PICTURES, ONE_BASIS, WIDE_SUMS)


def placed(prepared, name: str) -> onnx.ModelProto:
    return place(prepared.model, prepared.ranges, PLACEMENTS[name])


def rounded(model: onnx.ModelProto) -> set[str]:
    return {n.input[0] for n in model.graph.node if n.op_type == "QuantizeLinear"}


def optimized(model: onnx.ModelProto, path) -> onnx.ModelProto:
    options = session_options(1)
    options.optimized_model_filepath = str(path)
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return onnx.load(path)


@pytest.mark.parametrize("name", PLACEMENTS)
def test_every_placement_is_a_valid_graph_close_to_the_float_one(prepared, name):
    model = placed(prepared, name)
    onnx.checker.check_model(model, full_check=True)
    assert walk.float_convolutions(model) == ()
    before, after = opened(prepared.model), opened(model)
    assert min(agreement_db(after(n, s), before(n, s)) for n, s in PICTURES[:3]) > 40


@pytest.mark.parametrize("name", PLACEMENTS)
def test_activations_have_the_type_and_the_zero_point_that_the_engine_wants(prepared, name):
    model, where = placed(prepared, name), PLACEMENTS[name]
    stored = walk.initializers(model)
    zeros = [numpy_helper.to_array(stored[n.input[2]]) for n in model.graph.node if n.op_type == "QuantizeLinear"]
    assert {z.dtype.name for z in zeros} == {where.activations, *({"int16"} if where.trunk == "int16" else ())}
    assert {z.shape for z in zeros} == {()}
    assert (not any(z.any() for z in zeros)) == where.symmetric
    kinds = {numpy_helper.to_array(stored[n]).dtype.name for n in walk.initializers(model) if "bias_quantized" in n}
    assert kinds == ({"int32"} if where.integer_biases else set())


def test_arm_rounds_what_additions_read_and_the_ends_to_16_bits(prepared):
    model = placed(prepared, "arm")
    made_by, stored = walk.producers(model), walk.initializers(model)

    def bits(name: str) -> int:
        zero = numpy_helper.to_array(stored[made_by[name].input[2]])
        return 8 * zero.dtype.itemsize

    ends = {*walk.first_convolutions(model, checks.NOISY), *walk.last_convolutions(model, checks.DENOISED)}
    assert len(ends) == 2
    for node in model.graph.node:
        if node.op_type == "Conv":
            assert {bits(name) for name in node.input[:2]} == ({16} if node.name in ends else {8})
    additions = [n for n in model.graph.node if n.op_type == "Add" and "level" not in n.name]
    rounded_by = [[bits(x) for x in n.input if made_by[x].op_type == "DequantizeLinear"] for n in additions]
    assert rounded_by == [[16]] * len(additions)


def test_a_trunk_of_16_bits_loses_less_than_one_of_8(prepared):
    before = opened(prepared.model)
    coarse, fine = (
        place(prepared.model, prepared.ranges, dataclasses.replace(PLACEMENTS["arm"], trunk=trunk))
        for trunk in ("int8", "int16")
    )
    far, near = (np.mean([agreement_db(opened(m)(n, s), before(n, s)) for n, s in PICTURES]) for m in (coarse, fine))
    assert near > far + 4


def test_the_bias_of_a_channel_without_weights_survives(tmp_path):
    net = networks.shipped("nano").net
    with torch.no_grad():
        net.encoder[0][0].project[0].weight[0] = 0
        net.encoder[0][0].project[0].bias[0] = 0.3
    settings = dataclasses.replace(SETTINGS, equalize=False)
    made = quantize.prepare(exported(net, tmp_path), PICTURES, settings, PLACEMENTS["arm"])
    model = placed(made, "arm")
    stored = walk.initializers(model)
    bias, scale = (
        numpy_helper.to_array(stored[f"encoder.0.0.project.0.bias_{part}"]) for part in ("quantized", "scale")
    )
    assert bias[0] * float(scale[0]) == pytest.approx(0.3, rel=1e-5)


def test_openvino_rounds_only_what_convolutions_read_and_the_picture(prepared):
    model = placed(prepared, "openvino")
    read = {n.input[0] for n in prepared.model.graph.node if n.op_type == "Conv"}
    assert rounded(model) == read | {checks.NOISY}


def read_by(model: onnx.ModelProto, operator: str) -> str:
    """Return the tensor that the only node of a type reads first, through a pair if there is one."""
    (node,) = (n for n in model.graph.node if n.op_type == operator)
    return str(node.input[0])


@pytest.mark.parametrize("name", ["onnxruntime", "openvino", "tensorrt"])
def test_what_the_noise_is_taken_from_is_the_picture_that_the_network_saw(prepared, name):
    model = placed(prepared, name)
    assert read_by(model, "Sub") == read_by(model, "SpaceToDepth") == f"{checks.NOISY}_dequantized"
    pairs = [n for n in model.graph.node if n.op_type == "QuantizeLinear"][:2]
    assert [n.input[0] for n in pairs] == [checks.NOISY, "/SpaceToDepth_output_0"]
    assert pairs[0].input[1:] == pairs[1].input[1:]


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_a_first_convolution_in_float_leaves_the_picture_as_it_is(prepared, name):
    model = release(placed(prepared, name), quantize.kept_float(prepared.model, frozenset({"head"})), PLACEMENTS[name])
    assert read_by(model, "Sub") == read_by(model, "SpaceToDepth") == checks.NOISY


def test_our_own_kernels_take_the_noise_from_the_picture_itself(prepared):
    assert read_by(placed(prepared, "arm"), "Sub") == checks.NOISY


def test_the_rounding_of_the_picture_is_noise_that_the_network_takes_away(nano):
    settings = dataclasses.replace(SETTINGS, change_basis=False)
    made = quantize.prepare(nano, PICTURES, settings, PLACEMENTS["openvino"])
    seen = placed(made, "openvino")
    unseen = onnx.ModelProto()
    unseen.CopyFrom(seen)
    next(n for n in unseen.graph.node if n.op_type == "Sub").input[0] = checks.NOISY
    before = opened(made.model)
    far, near = (np.mean([agreement_db(opened(m)(n, s), before(n, s)) for n, s in PICTURES]) for m in (unseen, seen))
    assert near > far + 0.3


def test_onnxruntime_leaves_no_pair_between_its_integer_operators(prepared, tmp_path):
    model = optimized(placed(prepared, "onnxruntime"), tmp_path / "optimized.onnx")
    counts = checks.op_counts(model)
    convolutions = sum(n.op_type == "Conv" for n in prepared.model.graph.node)
    additions = sum(n.op_type == "Add" for n in prepared.model.graph.node)
    assert sum(n.op_type == "QLinearConv" for n in model.graph.node) == convolutions
    # All additions but that of the noise level; the picture (read twice), its planes, the head's and the tail's output
    # are where floats begin and end.
    assert counts["com.microsoft::QLinearAdd"] == additions - 1
    assert counts["QuantizeLinear"] == 3
    assert counts["DequantizeLinear"] == 4


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_the_noise_level_is_added_to_what_a_float_convolution_gives(prepared, name):
    head = quantize.kept_float(prepared.model, frozenset({"head"}))
    model = release(placed(prepared, name), head, PLACEMENTS[name])
    (first,) = (n for n in model.graph.node if n.name in head)
    assert first.output[0] in next(n for n in model.graph.node if n.name == "/level/Add").input


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_layers_go_to_float_one_after_the_other_as_they_do_together(prepared, name):
    def nodes(model):
        return [(n.name, *n.input) for n in model.graph.node]

    names = ["/tail/Conv", "/decoder.1/decoder.1.1/Add", "/decoder.1/decoder.1.0/Add", "/head/head.0/Conv"]
    assert {n.name for n in prepared.model.graph.node}.issuperset(names)
    one_by_one = placed(prepared, name)
    for released in names:
        one_by_one = release(one_by_one, [released], PLACEMENTS[name], prepared.model)
    together = release(placed(prepared, name), names, PLACEMENTS[name], prepared.model)
    assert nodes(one_by_one) == nodes(together)


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_everything_released_is_the_float_graph(prepared, name):
    names = [n.name for n in prepared.model.graph.node]
    model = release(placed(prepared, name), names, PLACEMENTS[name], prepared.model)
    assert not checks.is_quantized(model)
    noisy = probe(48, 64, 1, seed=20)
    assert relative_change(opened(model)(noisy, SIGMA), opened(prepared.model)(noisy, SIGMA)) < 1e-5


def test_onnxruntime_computes_in_float_what_was_released(prepared, tmp_path):
    quantized = placed(prepared, "onnxruntime")
    names = walk.integer_convolutions(quantized)
    assert len(names) > 20
    for name in names:
        released = release(quantized, [name], PLACEMENTS["onnxruntime"], prepared.model)
        counts = Counter(
            n.op_type for n in optimized(float_layers.kept(released), tmp_path / "optimized.onnx").graph.node
        )
        assert (counts["QLinearConv"], counts["Conv"] + counts["FusedConv"]) == (len(names) - 1, 1), name
    # The last of these lies between two pairs, where ONNX Runtime rounds its weights if nothing is done about it.
    inner = release(quantized, ["/decoder.1/decoder.1.1/project/project.0/Conv"], PLACEMENTS["onnxruntime"])
    assert walk.float_convolutions(inner)
    as_it_is = optimized(inner, tmp_path / "optimized.onnx")
    assert not any(n.op_type in ("Conv", "FusedConv") for n in as_it_is.graph.node)


@pytest.mark.parametrize("convolution", ["conv", "transposed"])
@pytest.mark.parametrize("behind", [nn.Identity(), nn.ReLU(), nn.ReLU6()], ids=["nothing", "relu", "clip"])
def test_a_float_layer_between_integers_gives_what_its_float_weights_say(tmp_path, convolution, behind):
    torch.manual_seed(0)
    layer = {"conv": nn.Conv2d(8, 8, 3, padding=1), "transposed": nn.ConvTranspose2d(8, 8, 3, padding=1)}[convolution]
    with torch.no_grad():
        # One grid for all of them is coarse for the others.
        (layer.weight[0] if convolution == "conv" else layer.weight[:, 0]).mul_(20)
    last = [nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 1, 3, padding=1)]
    net = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), layer, behind, *last)
    path = export_onnx(net.eval(), channels=1, takes_sigma=False, stride=8, out=tmp_path / "a.onnx")
    made = quantize.prepare(simplify(path, tmp_path / "simple.onnx"), PICTURES, ONE_BASIS, WIDE_SUMS)
    middle = [n.name for n in made.model.graph.node if n.op_type in walk.CONVOLUTIONS][1]
    model = release(placed(made, "onnxruntime"), [middle], PLACEMENTS["onnxruntime"], made.model)
    assert walk.float_convolutions(model) == (middle,)
    noisy = PICTURES[0][0]
    exact = Reference(model, exact=True)(noisy, SIGMA)
    peak = np.abs(exact).max()
    assert agreement_db(opened(model)(noisy, SIGMA) / peak, exact / peak) > 45


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_a_released_convolution_has_its_float_weights_or_what_the_integers_stand_for(prepared, name):
    quantized = placed(prepared, name)
    tail = walk.last_convolutions(prepared.model, checks.DENOISED)
    original = numpy_helper.to_array(walk.initializers(prepared.model)["tail.weight"])
    step = np.abs(original).max(axis=(1, 2, 3), keepdims=True) / 127
    for source, exact in ((prepared.model, True), (None, False)):
        model = release(quantized, tail, PLACEMENTS[name], source)
        assert walk.float_convolutions(model) == tail
        values = numpy_helper.to_array(walk.initializers(model)["tail.weight"])
        assert np.array_equal(values, original) == exact
        assert (np.abs(values - original) <= step * 0.5001).all()


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_float_additions_lose_less(control, name):
    quantized = placed(control, name)
    additions = [n.name for n in control.model.graph.node if n.op_type == "Add"]
    before = opened(control.model)
    far, near = (
        np.mean([agreement_db(opened(m)(n, s), before(n, s)) for n, s in PICTURES[:3]])
        for m in (quantized, release(quantized, additions, PLACEMENTS[name], control.model))
    )
    assert near > far + 1


def test_channel_attention_and_the_noise_level_stay_in_float(tmp_path):
    fp32 = exported(models.create("nano", {"activation": "hardswish", "se": True}), tmp_path)
    made = quantize.prepare(fp32, PICTURES, ONE_BASIS)
    model = place(made.model, made.ranges, PLACEMENTS["openvino"])
    gates = {n.name for n in made.model.graph.node if n.op_type == "Conv" and "attention" in n.name}
    assert gates
    assert set(walk.float_convolutions(model)) == gates
    level = next(n for n in model.graph.node if n.name == "/level/Add")
    assert not any("dequantized" in name for name in level.input)


@pytest.mark.parametrize("name", PLACEMENTS)
def test_every_placement_of_a_unet_is_close_to_the_float_one_and_can_be_trained(unet, name):
    model = placed(unet, name)
    onnx.checker.check_model(model, full_check=True)
    assert walk.float_convolutions(model) == ()
    before, after = opened(unet.model), opened(model)
    assert min(agreement_db(after(n, s), before(n, s)) for n, s in PICTURES[:3]) > 35
    noisy, sigma = PICTURES[0]
    twin = TorchGraph(model)(torch.from_numpy(noisy), torch.full((1, 1, 1, 1), sigma)).detach().numpy()
    assert agreement_db(twin, after(noisy, sigma)) > 45


@pytest.mark.parametrize("name", ["onnxruntime", "arm"])
def test_all_that_lies_between_maps_is_rounded_on_both_sides_to_8_bits(unet, name):
    model = placed(unet, name)
    made_by, stored = walk.producers(model), walk.initializers(model)
    between = [n for n in model.graph.node if n.op_type in ("Concat", "Resize", "MaxPool")]
    assert len(between) == 6
    for node in between:
        for read in node.input if node.op_type == "Concat" else node.input[:1]:
            assert made_by[read].op_type == "DequantizeLinear"
            assert numpy_helper.to_array(stored[made_by[read].input[2]]).dtype == PLACEMENTS[name].activations
        assert node.output[0] in rounded(model)


def test_what_moves_values_keeps_their_scale_and_small_parts_of_a_concatenation_have_finer_ones(unet):
    made_by, readers = walk.producers(unet.model), walk.consumers(unet.model)
    concat = next(n for n in unet.model.graph.node if n.op_type == "Concat")
    (up, second), joined = concat.input, concat.output[0]
    low, pooled = made_by[up].input[0], next(n.output[0] for n in readers[second] if n.op_type == "MaxPool")
    alike = {joined: 4.0, second: 3.0, pooled: 2.9}
    finer = {up: 0.5, low: 0.6}
    ranges = {**unet.ranges, **{name: (0.0, high) for name, high in (alike | finer).items()}}
    stored = walk.initializers(place(unet.model, ranges, PLACEMENTS["arm"]))
    scales = {name: float(numpy_helper.to_array(stored[f"{name}_scale"])) for name in alike | finer}
    assert {scales[name] for name in alike} == {np.float32(4 / 255)}
    assert {scales[name] for name in finer} == {np.float32(0.6 / 255)}


def test_onnxruntime_computes_a_unet_in_integers_from_end_to_end(unet, tmp_path):
    model = optimized(placed(unet, "onnxruntime"), tmp_path / "optimized.onnx")
    counts = Counter(n.op_type for n in model.graph.node)
    assert (counts["QLinearConv"], counts["QLinearConcat"], counts["Resize"], counts["Concat"]) == (6, 2, 2, 0)
    # The picture is read as floats by the first convolution's pair and by the last subtraction.
    assert (counts["QuantizeLinear"], counts["DequantizeLinear"]) == (2, 3)


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_a_unet_is_released_whole_and_in_part(unet, name):
    quantized, noisy = placed(unet, name), PICTURES[0][0]
    whole = release(quantized, [n.name for n in unet.model.graph.node], PLACEMENTS[name], unet.model)
    assert not checks.is_quantized(whole)
    assert relative_change(opened(whole)(noisy, SIGMA), opened(unet.model)(noisy, SIGMA)) < 1e-5
    part = release(quantized, ["/fourth/Conv"], PLACEMENTS[name], unet.model)
    assert walk.float_convolutions(part) == ("/fourth/Conv",)
    assert agreement_db(opened(part)(noisy, SIGMA), opened(unet.model)(noisy, SIGMA)) > 35


def test_all_but_one_operand_of_an_addition_is_rounded_for_arm(tmp_path):
    made = quantize.prepare(exported(tiny.Shortcuts(), tmp_path), PICTURES, SETTINGS)
    model = placed(made, "arm")
    made_by = walk.producers(model)
    kinds = [[made_by[name].op_type for name in n.input] for n in model.graph.node if n.op_type == "Add"]
    assert [kind.count("DequantizeLinear") for kind in kinds] == [1, 2, 2]


def test_equalizing_goes_through_concatenations_and_resizing(tmp_path):
    model = checks.load_onnx(exported(tiny.unet(), tmp_path))
    before = observe(model, PICTURES, "minmax")
    equal = equalize(model, before.peaks)
    noisy = probe(64, 48, 1, seed=30)
    assert relative_change(opened(equal)(noisy, SIGMA), opened(model)(noisy, SIGMA)) < 1e-4
    after = observe(equal, PICTURES, "minmax")
    factors = {name: after.peaks[name] / np.maximum(peak, 1e-6) for name, peak in before.peaks.items()}
    between = [n for n in model.graph.node if n.op_type in ("Concat", "Resize", "MaxPool")]
    assert len(between) == 6
    for node in between:
        read = np.concatenate([factors[name] for name in node.input if name in factors])
        assert factors[node.output[0]] == pytest.approx(read, rel=1e-3)
        assert read.max() > 1.5 * read[read > 0].min()


def test_equalizing_keeps_the_function_and_brings_the_channels_together(nano):
    model = checks.load_onnx(nano)
    before = observe(model, PICTURES, "minmax")
    equal = equalize(model, before.peaks)
    noisy = probe(64, 48, 1, seed=30)
    assert relative_change(opened(equal)(noisy, SIGMA), opened(model)(noisy, SIGMA)) < 1e-4
    after = observe(equal, PICTURES, "minmax")

    def spread(peaks) -> float:
        inner = [p for name, p in peaks.items() if "depthwise" in name or "expand" in name]
        return float(np.mean([np.log(p.max() / np.median(p)) for p in inner]))

    assert spread(after.peaks) < 0.8 * spread(before.peaks)


def test_a_convolution_that_writes_the_output_itself_is_equalized_and_quantized(tmp_path):
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(1, 16, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(16, 1, 3, padding=1)
    )
    path = export_onnx(net.eval(), channels=1, takes_sigma=False, stride=1, out=tmp_path / "plain.onnx")
    report = quantize.quantize_static(simplify(path, tmp_path / "s.onnx"), PICTURES, tmp_path / "int8.onnx", SETTINGS)
    assert len(report.integer_nodes) == 2


class Small(torch.nn.Module):
    """A blind network of a few channels around a middle, by default one convolution of so many groups."""

    channels, takes_sigma, stride = 1, False, 2

    def __init__(self, *, middle: int = 16, groups: int = 1, tail: int = 1) -> None:
        super().__init__()
        self.head = torch.nn.Conv2d(1, 16, 3, padding=1)
        self.middle = torch.nn.Conv2d(16, middle, 3, padding=1, groups=groups)
        self.tail = torch.nn.Conv2d(middle, tail, 3, padding=1)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.middle(x))

    def forward(self, noisy: torch.Tensor) -> torch.Tensor:
        return noisy - self.tail(self.features(torch.relu(self.head(noisy))))


class Scaled(Small):
    """Scales a residual, which simplifying folds into constants of its own."""

    def features(self, x):
        return x + 0.1 * self.middle(x)


class Again(Small):
    """Runs one convolution three times."""

    def features(self, x):
        for _ in range(3):
            x = torch.relu(self.middle(x))
        return x


class ZeroBiases(Small):
    """Has equal biases, which the exporter stores once."""

    def __init__(self) -> None:
        super().__init__()
        for conv in (self.head, self.middle):
            torch.nn.init.zeros_(conv.bias)


class Shuffled(Small):
    """Ends in a PixelShuffle."""

    def __init__(self) -> None:
        super().__init__(tail=4)

    def forward(self, noisy):
        x = torch.relu(self.middle(torch.relu(self.head(noisy))))
        return torch.nn.functional.pixel_shuffle(self.tail(x[:, :, ::2, ::2]), 2)


class Attentive(Small):
    """Adds vectors of channels: attention by its mean and its largest value (CBAM)."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = torch.nn.Linear(16, 16)

    def features(self, x):
        gate = torch.sigmoid(self.mix(x.mean((2, 3))) + self.mix(x.amax((2, 3))))
        return x * gate[:, :, None, None]


class Tokens(Attentive):
    """Adds what has a token for each pixel."""

    def features(self, x):
        tokens = x.flatten(2).transpose(1, 2)
        return (tokens + self.mix(torch.relu(self.mix(tokens)))).transpose(1, 2).reshape(x.shape)


UNUSUAL = {
    "groups": lambda: Small(groups=4),
    "groups of other widths": lambda: Small(middle=32, groups=4),
    "depthwise, twice as many": lambda: Small(middle=32, groups=16),
    "scaled residual": Scaled,
    "run three times": Again,
    "equal biases": ZeroBiases,
    "shuffled last": Shuffled,
    "vectors added": Attentive,
    "tokens added": Tokens,
}


@pytest.fixture(scope="module", params=UNUSUAL.values(), ids=UNUSUAL.keys())
def unusual(request, tmp_path_factory):
    torch.manual_seed(0)
    return exported(request.param(), tmp_path_factory.mktemp("unusual"))


@pytest.mark.parametrize("name", PLACEMENTS)
def test_unusual_networks_are_placed_close_to_the_float_one(unusual, name):
    settings = dataclasses.replace(SETTINGS, change_basis=False)
    made = quantize.prepare(unusual, PICTURES, settings, dataclasses.replace(PLACEMENTS[name], saturates=False))
    model = placed(made, name)
    onnx.checker.check_model(model, full_check=True)
    noisy = probe(48, 64, 1, seed=30)
    assert agreement_db(Reference(model, exact=True)(noisy, SIGMA), opened(made.model)(noisy, SIGMA)) > 35


def test_the_layers_of_an_unusual_network_are_told_apart(unusual):
    where = PLACEMENTS["onnxruntime"]
    made = quantize.prepare(unusual, PICTURES, ONE_BASIS, where)
    judge = budget.Judge(made.model, [dead_leaves(0, 64, 64, 1)], (25.0,), 8)
    found = budget.layers(placed(made, "onnxruntime"), made.model, where, judge, pictures=1)
    assert {n.name for n in made.model.graph.node if n.op_type == "Conv"} <= {layer.name for layer in found}


def test_equalizing_an_unusual_network_keeps_the_function(unusual):
    with_it, without = (
        quantize.prepare(unusual, PICTURES, dataclasses.replace(SETTINGS, change_basis=False, equalize=equal)).model
        for equal in (True, False)
    )
    noisy = probe(64, 48, 1, seed=30)
    assert relative_change(opened(with_it)(noisy, SIGMA), opened(without)(noisy, SIGMA)) < 1e-4
    assert relative_change(opened(without)(noisy, SIGMA), opened(checks.load_onnx(unusual))(noisy, SIGMA)) < 1e-5


def test_the_channels_of_groups_are_brought_together(tmp_path):
    torch.manual_seed(0)
    net = Small(groups=4)
    with torch.no_grad():
        scale = 8 ** (2 * torch.rand(16) - 1)
        net.head.weight *= scale[:, None, None, None]
        net.head.bias *= scale
        net.middle.weight /= scale.reshape(4, 1, 4).expand(4, 4, 4).reshape(16, 4, 1, 1)
    model = checks.load_onnx(exported(net, tmp_path))
    before = observe(model, PICTURES, "minmax").peaks
    after = observe(equalize(model, before), PICTURES, "minmax").peaks
    (read,) = {n.input[0] for n in model.graph.node if "middle" in n.name}
    spread = [p.max() / np.median(p) for p in (before[read], after[read])]
    assert spread[1] < 0.7 * spread[0]


def test_no_convolution_shares_its_weights_with_another_and_the_rest_stays(tmp_path, nano):
    torch.manual_seed(0)
    made = quantize.prepare(exported(Again(), tmp_path), PICTURES, SETTINGS).model
    readers = walk.consumers(made)
    weights = [name for node in made.graph.node if node.op_type == "Conv" for name in node.input[1:]]
    assert len(weights) == 10
    assert all(len(readers[name]) == 1 for name in weights)
    plain = dataclasses.replace(SETTINGS, equalize=False, change_basis=False)
    assert quantize.prepare(nano, PICTURES, plain).model == checks.load_onnx(nano)


def test_a_graph_whose_weights_cannot_be_quantized_by_channel_is_refused(nano, tmp_path):
    model = checks.load_onnx(nano)
    model.opset_import[0].version = 12
    (tmp_path / "old.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(UnsupportedError, match=r"old\.onnx: is of opset 12; INT8 needs 13 or more; simplify it first"):
        quantize.prepare(tmp_path / "old.onnx", PICTURES, SETTINGS)


def test_equalizing_brings_int8_of_uneven_channels_closer_to_the_float_graph(tmp_path):
    # The shipped weights learned to do without it; ReLU lets each channel of theirs have another scale.
    net = networks.shipped("nano").net
    draw = torch.Generator().manual_seed(0)
    for block in (module for module in net.modules() if isinstance(module, InvertedResidual)):
        scale = 8 ** (2 * torch.rand(block.depthwise[0].out_channels, generator=draw) - 1)
        block.expand[0].weight.data *= scale[:, None, None, None]
        block.expand[0].bias.data *= scale
        block.depthwise[0].weight.data /= scale[:, None, None, None]
    uneven = exported(net, tmp_path)
    agreements = [
        quantize.quantize_static(
            uneven, PICTURES, tmp_path / "int8.onnx", dataclasses.replace(ONE_BASIS, equalize=equal)
        ).agreement_millidb
        for equal in (False, True)
    ]
    assert agreements[1] > agreements[0] + 300


@pytest.mark.parametrize(
    ("features", "architecture", "reduced"),
    [
        (("avx2",), "x86_64", True),
        (("avx2", "avx512f"), "x86_64", True),
        (("avx2", "avx512f", "avx512_vnni"), "x86_64", False),
        (("avx2", "avx_vnni"), "x86_64", False),
        (("asimd",), "aarch64", False),
    ],
    ids=["AVX2", "AVX-512", "VNNI", "AVX-VNNI", "ARM"],
)
def test_processors_whose_sums_saturate_get_weights_of_seven_bits(
    nano, tmp_path, monkeypatch, features, architecture, reduced
):
    machine = dataclasses.replace(
        host.describe(packages=()), architecture=architecture, cpu=host.Cpu(model="", features=features)
    )
    monkeypatch.setattr(host, "describe", lambda packages=(): machine)
    quantize.quantize_static(nano, PICTURES, tmp_path / "int8.onnx", ONE_BASIS)
    stored = walk.initializers(checks.load_onnx(tmp_path / "int8.onnx"))
    largest = max(np.abs(numpy_helper.to_array(t).astype(int)).max() for t in stored.values() if t.data_type == 3)
    assert largest == (63 if reduced else 127)


@pytest.mark.parametrize(("engine", "limit"), [("onnxruntime", 63), ("openvino", 63), ("arm", 127), ("tensorrt", 127)])
def test_weights_for_another_processor_have_eight_bits_whatever_this_one_does(nano, monkeypatch, engine, limit):
    monkeypatch.setattr(host, "sums_saturate", lambda: True)
    assert quantize.prepare(nano, PICTURES, ONE_BASIS, PLACEMENTS[engine]).weight_limit == limit


def test_what_is_compiled_for_another_processor_is_judged_by_what_the_graph_says(nano, tmp_path):
    made = quantize.quantize_static(nano, PICTURES, tmp_path / "int8.onnx", SETTINGS, placement=PLACEMENTS["arm"])
    options = session_options(1)
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    placed, whole = (onnxruntime.InferenceSession(str(path), options) for path in (made.onnx, nano))
    found = [
        agreement_db(*(s.run(None, feeds(n, level, takes_sigma=True))[0] for s in (placed, whole)))
        for n, level in PICTURES
    ]
    assert made.agreement_millidb == pytest.approx(1000 * np.mean(found), abs=100)


@pytest.mark.parametrize(("asked", "largest"), [("always", 63), ("never", 127)])
def test_the_range_of_weights_can_be_forced(nano, tmp_path, asked, largest):
    settings = dataclasses.replace(ONE_BASIS, reduce_range=asked)
    assert quantize.prepare(nano, PICTURES, settings).weight_limit == largest


def test_dynamic_int8_denoises_and_is_not_quantized_again(nano, tmp_path):
    path = quantize.quantize_dynamic(nano, tmp_path / "dynamic.onnx")
    counts = checks.op_counts(checks.load_onnx(path))
    assert counts["ConvInteger"] == sum(n.op_type == "Conv" for n in checks.load_onnx(nano).graph.node)
    noisy = probe(48, 64, 1, seed=40)
    assert agreement_db(opened(checks.load_onnx(path))(noisy, SIGMA), opened(checks.load_onnx(nano))(noisy, SIGMA)) > 25
    assert path.read_bytes() == quantize.quantize_dynamic(nano, tmp_path / "again.onnx").read_bytes()
    with pytest.raises(InputError, match="quantized already"):
        quantize.quantize_dynamic(path, tmp_path / "twice.onnx")
