from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import tiny
import torch
from onnx import TensorProto, helper, numpy_helper

from edgekit.compress import budget, placement, qat
from edgekit.compress.budget import Budget, Judge, Loss
from edgekit.compress.export import export_onnx
from edgekit.compress.qat import QatReport, finetune
from edgekit.compress.quantize import quantize_static
from edgekit.compress.ranges import observe
from edgekit.compress.simplify import simplify
from edgekit.compress.torch_graph import ActivationQuantizer, TorchGraph, WeightQuantizer, lowest
from edgekit.data.noise import add_gaussian
from edgekit.data.synthetic import dead_leaves
from edgekit.errors import InputError, IntegrityError, UnsupportedError
from edgekit.graph import cost
from edgekit.graph.checks import NOISY
from edgekit.graph.reference import Reference, agreement_db, feeds, probe, relative_change, session_options
from edgekit.measure import host
from edgekit.measure.quality import psnr
from edgekit.pipeline import networks
from edgekit.recipe import Qat, Quantization
from edgekit.training.loop import Moment

SIGMA = 25 / 255
PICTURES = [dead_leaves(seed, 64, 64) for seed in range(6)]
CALIBRATION = [(add_gaussian(p, 25.0, index=i)[None], SIGMA) for i, p in enumerate((*PICTURES, *PICTURES))]
HELD_OUT = [dead_leaves(seed, 64, 80) for seed in range(100, 103)]
NO_LOSS = Budget(mean_db=0.0)
FEW = Qat(steps=20, batch=2, patch=32, rate=1e-4, scale_rate=2e-2, ema=0.8)
Graph = tuple[Path, Path]


def exported(name: str, folder: Path, options: dict[str, object] | None = None) -> Path:
    """Return the simplified float graph of a network with random weights."""
    net = tiny.network(name, options)
    raw = export_onnx(net, channels=net.channels, takes_sigma=net.takes_sigma, stride=net.stride, out=folder / "r.onnx")
    return simplify(raw, folder / "fp32.onnx")


def quantized(fp32: Path, *, keep_float: tuple[str, ...] = ()) -> Path:
    settings = Quantization(calibration_pictures=8, keep_float=keep_float, change_basis=False)
    return quantize_static(fp32, CALIBRATION, fp32.with_name("int8.onnx"), settings).onnx


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    """Return the float and the fully quantized graph of the shipped nano."""
    folder = tmp_path_factory.mktemp("nano")
    net = networks.shipped("nano").net
    raw = export_onnx(net, channels=1, takes_sigma=net.takes_sigma, stride=net.stride, out=folder / "raw.onnx")
    fp32 = simplify(raw, folder / "fp32.onnx")
    return fp32, quantized(fp32)


def in_torch(graph: TorchGraph, noisy: np.ndarray, sigma: float = SIGMA) -> np.ndarray:
    with torch.no_grad():
        return graph(torch.from_numpy(noisy), torch.full((1, 1, 1, 1), sigma)).numpy()


def values(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


def silent(moment: Moment) -> None:
    pass


def tune(
    graph: Graph,
    out: Path,
    settings: Qat = FEW,
    report: Callable[[Moment], None] = silent,
    limit: Budget = NO_LOSS,
) -> QatReport:
    fp32, qdq = graph
    return finetune(
        qdq=qdq,
        fp32=fp32,
        pictures=PICTURES,
        judge=Judge(model := onnx.load(fp32), HELD_OUT, (15.0, 25.0, 50.0), cost.stride(model, fp32)),
        limit=limit,
        sigma=(5.0, 50.0),
        settings=settings,
        out=out,
        folder=out.parent / f"{out.stem}-state",
        report=report,
    )


# Graphs in torch


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("nano", {}),
        ("nano", {"channels": 3}),
        ("nano", {"noise_level": False}),
        ("nano", {"activation": "hardswish", "se": True}),
        ("control", {}),
    ],
    ids=["nano", "colour", "blind", "V3's activations", "control"],
)
def test_a_float_graph_gives_onnx_runtimes_numbers(name, options, tmp_path):
    model = onnx.load(exported(name, tmp_path, options))
    noisy = probe(64, 96, options.get("channels", 1), seed=1)
    got, want = in_torch(TorchGraph(model), noisy), Reference(model)(noisy, SIGMA)
    assert relative_change(got, want) < 1e-5


W = np.random.RandomState(0).randn
SHUFFLED = {"parts": (1, 2, 2, 8, 12), "whole": (1, 4, 8, 12)}
OPERATORS = {
    "strided Conv, uneven pads": ("Conv", [W(2, 2, 3, 3)], {"strides": [2, 2], "pads": [0, 1, 1, 2]}),
    "dilated grouped Conv": ("Conv", [W(4, 1, 3, 3), W(4)], {"group": 2, "dilations": [2, 2], "pads": [2] * 4}),
    "ConvTranspose": ("ConvTranspose", [W(2, 3, 2, 2), W(3)], {"strides": [2, 2]}),
    "ConvTranspose with padding": (
        "ConvTranspose",
        [W(2, 3, 3, 3)],
        {"strides": [2, 2], "pads": [1] * 4, "output_padding": [1, 1]},
    ),
    "Relu": ("Relu", [], {}),
    "Clip": ("Clip", [np.array(-0.1), np.array(0.3)], {}),
    "Clip of nothing": ("Clip", [], {}),
    "HardSwish": ("HardSwish", [], {}),
    "HardSigmoid": ("HardSigmoid", [], {"alpha": 1 / 6, "beta": 0.5}),
    "Sigmoid": ("Sigmoid", [], {}),
    "Tanh": ("Tanh", [], {}),
    "Erf": ("Erf", [], {}),
    "Exp": ("Exp", [], {}),
    "Neg": ("Neg", [], {}),
    "Elu": ("Elu", [], {"alpha": 0.7}),
    "LeakyRelu": ("LeakyRelu", [], {"alpha": 0.2}),
    "LeakyRelu as it is by default": ("LeakyRelu", [], {}),
    "PRelu": ("PRelu", [W(2, 1, 1)], {}),
    "Softplus": ("Softplus", [], {}),
    "Pow": ("Pow", [np.array(2.0)], {}),
    "Mod with the sign of what is divided": ("Mod", [np.array(0.3)], {"fmod": 1}),
    "Add": ("Add", [W(1, 2, 1, 1)], {}),
    "Sub": ("Sub", [W(1, 2, 1, 1)], {}),
    "Mul": ("Mul", [W(1, 2, 1, 1)], {}),
    "Concat": ("Concat", [W(1, 3, 8, 12)], {"axis": 1}),
    "MaxPool": ("MaxPool", [], {"kernel_shape": [2, 2], "strides": [2, 2]}),
    "MaxPool, uneven pads": ("MaxPool", [], {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [0, 0, 1, 1]}),
    "GlobalAveragePool": ("GlobalAveragePool", [], {}),
    "ReduceMean": ("ReduceMean", [], {"axes": [1], "keepdims": 1}),
    "ReduceMax": ("ReduceMax", [], {"axes": [2, 3], "keepdims": 1}),
    "SpaceToDepth": ("SpaceToDepth", [], {"blocksize": 2}),
    "Resize": ("Resize", [None, np.array([1, 1, 2, 3])], {"coordinate_transformation_mode": "asymmetric"}),
    "Resize from centres": ("Resize", [None, np.array([1, 1, 3, 2])], {}),
    "Gather": ("Gather", [np.array([1, 0], np.int64)], {"axis": 1}),
    "Identity": ("Identity", [], {}),
}


def one_node(operator: str, constants: list[np.ndarray | None], attributes: dict[str, object]) -> onnx.ModelProto:
    """Return noisy (1, 2, h, w) -> operator -> denoised."""
    if operator == "Resize":
        nearest = "floor" if "coordinate_transformation_mode" in attributes else "round_prefer_floor"
        attributes = {**attributes, "mode": "nearest", "nearest_mode": nearest}
    names, stored = [NOISY], []
    for i, constant in enumerate(constants):
        names.append("" if constant is None else f"c{i}")
        if constant is not None:
            kept = constant if constant.dtype == np.int64 and operator == "Gather" else constant.astype(np.float32)
            stored.append(numpy_helper.from_array(kept, f"c{i}"))
    graph = helper.make_graph(
        [helper.make_node(operator, names, ["denoised"], "the node", **attributes)],
        "g",
        [helper.make_tensor_value_info(NOISY, TensorProto.FLOAT, [1, 2, "h", "w"])],
        [helper.make_tensor_value_info("denoised", TensorProto.FLOAT, None)],
        stored,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("case", OPERATORS.values(), ids=OPERATORS.keys())
def test_an_operator_gives_onnx_runtimes_numbers(case):
    model = one_node(*case)
    noisy = np.random.RandomState(1).randn(1, 2, 8, 12).astype(np.float32)
    assert relative_change(in_torch(TorchGraph(model), noisy), Reference(model)(noisy, SIGMA)) < 1e-5


@pytest.mark.parametrize("mode", ["CRD", "DCR"])
def test_both_orders_of_depth_to_space_are_onnx_runtimes(mode):
    model = one_node("DepthToSpace", [], {"blocksize": 2, "mode": mode})
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 8
    noisy = np.random.RandomState(1).randn(1, 8, 4, 6).astype(np.float32)
    assert np.array_equal(in_torch(TorchGraph(model), noisy), Reference(model)(noisy, SIGMA))


@pytest.mark.parametrize(
    ("operator", "attributes", "said"),
    [
        ("Softsign", {}, r"node 'the node' \(Softsign\): an operator"),
        ("ReduceMean", {}, r"\(ReduceMean\): a reduction over all axes"),
        ("MaxPool", {"kernel_shape": [2, 2], "auto_pad": "SAME_UPPER"}, r"\(MaxPool\): auto_pad=SAME_UPPER"),
        ("ConvTranspose", {"strides": [2, 2], "auto_pad": "SAME_UPPER"}, r"\(ConvTranspose\): auto_pad=SAME_UPPER"),
        ("Concat", {"axis": 1}, r"\(Concat\): what torch cannot compute so \(Sizes of tensors must match"),
    ],
    ids=["operator", "all axes", "automatic padding", "automatic padding of a transposed one", "one picture alone"],
)
def test_what_is_not_followed_is_refused_by_name(operator, attributes, said):
    constants = {"ConvTranspose": [W(2, 3, 3, 3)], "Concat": [W(1, 3, 8, 8)]}.get(operator, [])
    two = torch.from_numpy(probe(8, 8, 2, seed=0)).repeat(2, 1, 1, 1)
    with pytest.raises(UnsupportedError, match=said):
        TorchGraph(one_node(operator, constants, attributes))(two, torch.full((2, 1, 1, 1), SIGMA))


def test_channels_that_are_shuffled_by_the_shape_of_one_picture_are_trained_on_several():
    shapes = [numpy_helper.from_array(np.array(shape, np.int64), name) for name, shape in SHUFFLED.items()]
    graph = helper.make_graph(
        [
            helper.make_node("Reshape", [NOISY, "parts"], ["grouped"], "group"),
            helper.make_node("Transpose", ["grouped"], ["turned"], "turn", perm=[0, 2, 1, 3, 4]),
            helper.make_node("Reshape", ["turned", "whole"], ["denoised"], "join"),
        ],
        "g",
        [helper.make_tensor_value_info(NOISY, TensorProto.FLOAT, [1, 4, "h", "w"])],
        [helper.make_tensor_value_info("denoised", TensorProto.FLOAT, None)],
        shapes,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    pictures = [probe(8, 12, 4, seed=seed) for seed in range(3)]
    with torch.no_grad():
        got = TorchGraph(model)(torch.from_numpy(np.concatenate(pictures)), torch.full((3, 1, 1, 1), SIGMA)).numpy()
    want = [Reference(model, blocked=False)(noisy, SIGMA) for noisy in pictures]
    assert np.array_equal(got, np.concatenate(want))


def test_a_quantized_layer_gives_onnx_runtimes_integers(nano):
    """One layer is compared, from the same integers: over many, single roundings that fall the other way pile up."""
    model = onnx.load(nano[1])
    first = next(n for n in model.graph.node if n.op_type == "QuantizeLinear" and "head" in n.input[0])
    behind = next(n for n in model.graph.node if first.output[0] in n.input)
    model.graph.output.append(helper.make_tensor_value_info(behind.output[0], TensorProto.FLOAT, None))
    noisy = probe(64, 96, 1, seed=1)
    session = onnxruntime.InferenceSession(model.SerializeToString(), session_options(1))
    (want,) = session.run([behind.output[0]], feeds(noisy, SIGMA, takes_sigma=True))
    graph = TorchGraph(model)
    with torch.no_grad():
        level = torch.full((1, 1, 1, 1), SIGMA)
        got = graph.tensors(torch.from_numpy(noisy), level, [behind.output[0]])[behind.output[0]].numpy()
    steps = np.rint((got - want) / values(model)[first.input[1]])
    assert np.abs(steps).max() <= 1
    assert np.count_nonzero(steps) <= 0.001 * steps.size


def test_a_quantized_graph_is_as_near_to_onnx_runtime_as_onnx_runtime_to_itself(nano):
    model = onnx.load(nano[1])
    noisy = add_gaussian(HELD_OUT[0], 25.0, index=0)[None]
    plain = session_options(1)
    plain.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), plain)
    (unfused,) = session.run(None, feeds(noisy, SIGMA, takes_sigma=True))
    got, fused = in_torch(TorchGraph(model), noisy), Reference(model)(noisy, SIGMA)
    # One value that rounds the other way is enough for about 57 dB.
    assert agreement_db(got, fused) > min(agreement_db(unfused, fused), 58) - 3
    float_graph = in_torch(TorchGraph(onnx.load(nano[0])), noisy)
    assert agreement_db(got, fused) > agreement_db(got, float_graph) + 3


@pytest.mark.parametrize("keep_float", [(), ("head", "tail", "skip")], ids=["all integers", "some float"])
def test_an_untrained_graph_is_written_as_it_was_read(keep_float, nano, tmp_path):
    (tmp_path / "fp32.onnx").write_bytes(nano[0].read_bytes())
    model = onnx.load(quantized(tmp_path / "fp32.onnx", keep_float=keep_float))
    written = TorchGraph(model).written()
    before, after = values(model), values(written)
    assert [n.SerializeToString() for n in model.graph.node] == [n.SerializeToString() for n in written.graph.node]
    assert list(before) == list(after)
    for name, value in before.items():
        assert after[name].dtype == value.dtype
        assert after[name].shape == value.shape
        if value.dtype == np.float32:
            assert np.allclose(after[name], value, rtol=1e-6), name
        elif value.dtype == np.int32:
            assert np.abs(after[name].astype(int) - value).max() <= max(1, 1e-6 * np.abs(value).max()), name
        else:
            assert np.array_equal(after[name], value), name


@pytest.mark.parametrize("engine", placement.PLACEMENTS)
@pytest.mark.parametrize("limit", [127, 63], ids=["8 bits", "7 bits"])
def test_every_engines_placement_is_followed(engine, limit, nano):
    model = onnx.load(nano[0])
    ranges = observe(model, CALIBRATION, "minmax").ranges
    placed = placement.place(model, ranges, placement.PLACEMENTS[engine], weight_limit=limit)
    noisy = add_gaussian(HELD_OUT[0], 25.0, index=0)[None]
    graph = TorchGraph(placed)
    got, want = in_torch(graph, noisy), Reference(placed, exact=host.sums_saturate())(noisy, SIGMA)
    clean = HELD_OUT[0] / np.float32(255)
    assert psnr(got[0], clean) == pytest.approx(psnr(want[0], clean), abs=0.05)
    assert agreement_db(got, want) > agreement_db(in_torch(TorchGraph(model), noisy), want) + 1
    parts = [part for part in graph.weights().values() if isinstance(part, WeightQuantizer)]
    assert len(parts) == 27
    wide = {32767} if placement.PLACEMENTS[engine].trunk == "int16" else set()
    assert {part.high for part in parts} == {limit, *wide}
    with torch.no_grad():
        for part in parts:
            part.values.mul_(2)
    stored = [v for v in values(graph.written()).values() if v.dtype == np.int8 and v.ndim == 4]
    assert {int(v.max()) for v in stored} <= {limit, limit - 1}
    assert min(int(v.min()) for v in stored) == -limit


def test_weights_start_from_the_floats_that_they_were_rounded_from(nano):
    student, teacher = (TorchGraph(onnx.load(path)) for path in reversed(nano))
    with torch.no_grad():
        for name, part in student.weights().items():
            assert isinstance(part, WeightQuantizer)
            step = part.scale().reshape(-1, 1, 1, 1)
            teacher.weights()[name].values.copy_(part.values + 0.3 * step)
    qat.take_float_weights(student, teacher)
    for name, part in student.weights().items():
        assert torch.equal(part.values, teacher.weights()[name].values), name


def test_weights_that_the_quantizer_changed_start_from_their_integers(nano):
    student, teacher = (TorchGraph(onnx.load(path)) for path in reversed(nano))
    name = next(iter(teacher.weights()))
    with torch.no_grad():
        teacher.weights()[name].values.mul_(2.5)
    before = student.weights()[name].values.clone()
    qat.take_float_weights(student, teacher)
    assert torch.equal(student.weights()[name].values, before)


def test_the_lowest_tensor_is_that_of_the_bottleneck(nano):
    model = onnx.load(nano[0])
    assert lowest(model, {"/encoder.2/encoder.2.0/Add_output_0", "noisy", "/head/head.0/Conv_output_0"}) == (
        "/encoder.2/encoder.2.0/Add_output_0"
    )
    assert lowest(model, set()) is None


# Quantizers


@pytest.mark.parametrize(
    ("zero", "learned"),
    [(np.uint8(0), False), (np.uint8(120), True), (np.int8(0), False), (np.int8(-128), False), (np.int8(-9), True)],
    ids=["ReLU u8", "u8", "symmetric s8", "ReLU s8", "s8"],
)
def test_a_zero_point_is_learned_only_inside_its_range(zero, learned):
    quantizer = ActivationQuantizer(np.array(0.1), np.array(zero), may_move=True)
    assert (quantizer.zero is not None) == learned
    assert quantizer.zero_point().item() == zero
    assert ActivationQuantizer(np.array(0.1), np.array(zero), may_move=False).zero is None


def test_the_gradients_are_those_of_learned_step_sizes():
    quantizer = ActivationQuantizer(np.array(0.5), np.array(4, np.uint8), may_move=True)
    x = torch.tensor([[[[-9.0, -0.6, 0.2, 0.9, 200.0]]]], requires_grad=True)
    y = quantizer(x)
    assert y.flatten().tolist() == [-2.0, -0.5, 0.0, 1.0, 125.5]
    weight = torch.tensor([1.0, 2.0, 3.0, 5.0, 7.0])
    (y * weight).sum().backward()
    assert x.grad is not None
    assert x.grad.flatten().tolist() == [0, 2, 3, 5, 0]
    # Inside: round(x / s) - x / s; outside: the end of the range in integers. By the logarithm: times the scale.
    of_scale = 1 * -4 + 2 * (-1 + 1.2) + 3 * (0 - 0.4) + 5 * (2 - 1.8) + 7 * 251
    assert quantizer.log_scale.grad is not None
    assert quantizer.log_scale.grad.item() == pytest.approx(0.5 * of_scale, rel=1e-5)
    assert quantizer.zero is not None
    assert quantizer.zero.grad is not None
    assert quantizer.zero.grad.item() == pytest.approx(255 * -0.5 * (1 + 7), rel=1e-5)


def test_weights_are_rounded_per_channel_and_learn_their_steps():
    stored = np.array([[[[10.0]]], [[[-3.0]]]]) * np.array([0.1, 0.2]).reshape(2, 1, 1, 1)
    part = WeightQuantizer(stored + 0.03, np.array([0.1, 0.2]), axis=0, low=-127, high=127)
    assert part.integers().flatten().tolist() == [10, -3]
    part().sum().backward()
    assert part.values.grad is not None
    assert part.values.grad.flatten().tolist() == [1, 1]
    assert part.log_scale.grad is not None
    assert part.log_scale.grad.tolist() == pytest.approx([0.1 * (10 - 10.3), 0.2 * (-3 + 2.85)], rel=1e-3)


@pytest.mark.parametrize(("zero", "wide"), [(128, 0.06), (0, 0.03)], ids=["both sides", "ReLU"])
def test_a_range_is_narrowed_to_where_it_rounds_best(zero, wide):
    x = torch.randn(2, 4, 64, 64, generator=torch.Generator().manual_seed(0))
    wanted = x if zero else x.relu()
    quantizer = ActivationQuantizer(np.array(wide), np.array(zero, np.uint8), may_move=True)
    before = (quantizer(x) - wanted).square().mean()
    quantizer.fit(x, torch.ones(2, 1, 1, 1))
    # Eight bits round a normal distribution best when they span about four deviations to either side.
    assert 3.4 < quantizer.scale().item() * (255 - zero) < 4.8
    assert quantizer.zero_point().item() == zero
    assert (quantizer(x) - wanted).square().mean() < before / 2


def test_a_range_without_outliers_stays():
    x = torch.linspace(-1, 1, 4096).reshape(1, 1, 64, 64)
    quantizer = ActivationQuantizer(np.array(2 / 255), np.array(128, np.uint8), may_move=True)
    quantizer.fit(x, torch.ones(1, 1, 1, 1))
    assert quantizer.scale().item() == pytest.approx(2 / 255)


def test_narrower_ranges_bring_the_graph_nearer_to_its_float_self(coarse):
    noisy = add_gaussian(HELD_OUT[0], 25.0, index=0)[None]
    level = torch.full((1, 1, 1, 1), SIGMA)
    want = in_torch(TorchGraph(onnx.load(coarse[0])), noisy)
    graph = TorchGraph(onnx.load(coarse[1]))
    before = agreement_db(in_torch(graph, noisy), want)
    learned_from = torch.from_numpy(add_gaussian(PICTURES[0], 25.0, index=0)[None])
    graph.fit_ranges(learned_from, level, torch.ones(1, 1, 1, 1))
    assert agreement_db(in_torch(graph, noisy), want) > before + 3


# Training


@pytest.fixture(scope="module")
def coarse(nano: Graph, tmp_path_factory: pytest.TempPathFactory) -> Graph:
    """Return the nano with every range of activations three times as wide as it should be."""
    model = onnx.load(nano[1])
    graph = TorchGraph(model)
    with torch.no_grad():
        for part in graph.modules():
            if isinstance(part, ActivationQuantizer):
                part.log_scale.add_(np.log(3))
    path = tmp_path_factory.mktemp("coarse") / "int8.onnx"
    onnx.save(graph.written(), path)
    return nano[0], path


def test_training_wins_back_more_than_narrower_ranges_alone(coarse, tmp_path):
    moments: list[Moment] = []
    settings = dataclasses.replace(FEW, steps=200, rate=5e-4, scale_rate=5e-3)
    found = tune(coarse, tmp_path / "out.onnx", settings, moments.append)
    untrained = dataclasses.replace(settings, steps=1, rate=1e-12, scale_rate=0.0)
    narrowed = tune(coarse, tmp_path / "narrowed.onnx", untrained)
    assert found.kept == narrowed.kept == "trained"
    assert narrowed.after.mean_mdb < 0.6 * narrowed.before.mean_mdb
    assert found.after.mean_mdb < 0.6 * found.before.mean_mdb
    # Their means lie about 0, for what is rounded may be better than float; nowhere is the worst picture's loss so.
    assert found.after.worst_mdb < 0.9 * narrowed.after.worst_mdb
    assert [m.step for m in moments] == list(range(10, 201, 10))
    assert moments[-1].seconds_left == 0


def test_what_is_written_has_the_same_nodes_and_types_and_other_numbers(coarse, tmp_path):
    tune(coarse, tmp_path / "out.onnx")
    before, after = onnx.load(coarse[1]), onnx.load(tmp_path / "out.onnx")
    onnx.checker.check_model(after, full_check=True)
    assert [n.SerializeToString() for n in before.graph.node] == [n.SerializeToString() for n in after.graph.node]
    ours, theirs = values(before), values(after)
    assert {n: (v.dtype, v.shape) for n, v in ours.items()} == {n: (v.dtype, v.shape) for n, v in theirs.items()}
    changed = {name for name, value in ours.items() if not np.array_equal(value, theirs[name])}
    for kind in ("weight_quantized", "weight_scale", "bias_quantized", "output_0_scale", "level.weight"):
        assert any(name.endswith(kind) for name in changed), kind
    for name, value in theirs.items():
        if name.endswith("Relu_output_0_zero_point"):
            assert value == 0
        if name.endswith("weight_quantized"):
            assert value.min() >= -127


def test_biases_are_stored_in_the_scale_of_the_sums(coarse, tmp_path):
    tune(coarse, tmp_path / "out.onnx")
    model = onnx.load(tmp_path / "out.onnx")
    made_by, stored = {o: n for n in model.graph.node for o in n.output}, values(model)
    convolutions = [n for n in model.graph.node if n.op_type == "Conv"]
    for node in convolutions:
        source, weight, bias = (stored[made_by[name].input[1]] for name in node.input)
        assert np.allclose(bias, source * weight, rtol=1e-6), node.name
    assert len(convolutions) == 27


class StoppedError(Exception):
    """What kills a training in a test."""


def test_a_killed_training_goes_on_bit_for_bit(coarse, tmp_path):
    settings = dataclasses.replace(FEW, checkpoint_seconds=1e-9)
    tune(coarse, tmp_path / "whole.onnx", settings)

    def stop(moment: Moment) -> None:
        if moment.step == 20:
            raise StoppedError

    with pytest.raises(StoppedError):
        tune(coarse, tmp_path / "killed.onnx", settings, stop)
    assert not (tmp_path / "killed.onnx").exists()
    seen: list[int] = []
    tune(coarse, tmp_path / "killed.onnx", settings, lambda moment: seen.append(moment.step))
    assert seen == [20]
    assert (tmp_path / "killed.onnx").read_bytes() == (tmp_path / "whole.onnx").read_bytes()


def test_a_training_that_was_killed_while_writing_only_writes(coarse, tmp_path):
    settings = dataclasses.replace(FEW, steps=10, checkpoint_seconds=1e-9)
    tune(coarse, tmp_path / "out.onnx", settings)
    written = (tmp_path / "out.onnx").read_bytes()
    (tmp_path / "out.onnx").unlink()
    seen: list[Moment] = []
    tune(coarse, tmp_path / "out.onnx", settings, seen.append)
    assert seen == []
    assert (tmp_path / "out.onnx").read_bytes() == written


def test_a_checkpoint_of_another_training_is_refused(coarse, tmp_path):
    settings = dataclasses.replace(FEW, steps=10, checkpoint_seconds=1e-9)
    tune(coarse, tmp_path / "out.onnx", settings)
    with pytest.raises(InputError, match="is the checkpoint of another run"):
        tune(coarse, tmp_path / "out.onnx", dataclasses.replace(settings, seed=1))


def test_a_training_that_makes_it_worse_is_not_kept(nano, tmp_path):
    found = tune(nano, tmp_path / "out.onnx", dataclasses.replace(FEW, rate=1.0, steps=10))
    assert found.kept == "start"
    assert found.after.mean_mdb > found.before.mean_mdb
    assert (tmp_path / "out.onnx").read_bytes() == nano[1].read_bytes()


@pytest.mark.parametrize(
    ("before", "after", "kept"),
    [((20, 160), (22, 100), "trained"), ((22, 100), (20, 160), "start"), ((22, 100), (20, 140), "trained")],
    ids=["only the trained one holds", "only the first one holds", "both hold"],
)
def test_the_graph_that_keeps_the_budget_is_the_better_one(nano, tmp_path, monkeypatch, before, after, kept):
    told = iter([Loss(mean_mdb=mean, worst_mdb=worst) for mean, worst in (before, after)])
    monkeypatch.setattr(Judge, "loss", lambda judge, model: next(told))
    limit = Budget(mean_db=0.05, worst_db=0.15)
    assert tune(nano, tmp_path / "out.onnx", dataclasses.replace(FEW, steps=1), limit=limit).kept == kept


def test_a_loss_that_is_not_finite_stops_the_training(nano, tmp_path):
    with pytest.raises(InputError, match=r"not finite at step 10 .*lower quantization.qat.rate"):
        tune(nano, tmp_path / "out.onnx", dataclasses.replace(FEW, scale_rate=1e4))
    assert not (tmp_path / "out.onnx").exists()


def test_an_engine_that_computes_something_else_is_caught(nano, tmp_path, monkeypatch):
    """Sums that saturate, as u8 times s8 does on processors without VNNI, change pictures more than rounding does."""

    class Saturating(Reference):
        def __call__(self, noisy, sigma):
            return np.minimum(super().__call__(noisy, sigma), np.float32(0.6))

    monkeypatch.setattr(budget, "Reference", Saturating)
    with pytest.raises(IntegrityError, match=r"in ONNX Runtime the trained graph is .* dB away"):
        tune(nano, tmp_path / "out.onnx", dataclasses.replace(FEW, steps=1))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"steps": 0}, "quantization.qat.steps is 0"),
        ({"patch": 40}, "quantization.qat.patch is 40, no multiple of 16"),
        ({"patch": 80}, "quantization.qat.patch is 80, and the smallest training picture has a side of 64"),
    ],
    ids=["no steps", "off the stride", "too large"],
)
def test_settings_that_cannot_work_are_refused(nano, tmp_path, changes, said):
    with pytest.raises(InputError, match=said):
        tune(nano, tmp_path / "out.onnx", dataclasses.replace(FEW, **changes))


def test_a_patch_that_is_no_multiple_of_the_graphs_stride_is_refused(tmp_path):
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 32, 32), torch.nn.ReLU(), torch.nn.ConvTranspose2d(8, 1, 32, 32))
    raw = export_onnx(net.eval(), channels=1, takes_sigma=False, stride=32, out=tmp_path / "raw.onnx")
    fp32 = simplify(raw, tmp_path / "fp32.onnx")
    with pytest.raises(InputError, match=r"quantization.qat.patch is 48, no multiple of 32"):
        tune((fp32, quantized(fp32)), tmp_path / "out.onnx", dataclasses.replace(FEW, patch=48))
    # Held-out pictures of 64x80 are padded to what the graph takes.
    assert tune((fp32, quantized(fp32)), tmp_path / "out.onnx", dataclasses.replace(FEW, steps=1)).onnx.is_file()


def test_graphs_in_each_others_place_are_refused(nano, tmp_path):
    fp32, qdq = nano
    with pytest.raises(InputError, match="has no quantized operator"):
        tune((fp32, fp32), tmp_path / "out.onnx")
    with pytest.raises(InputError, match=r"is quantized; give the float graph that .*int8.onnx was made from"):
        tune((qdq, qdq), tmp_path / "out.onnx")


def test_a_graph_of_another_network_is_refused(nano, tmp_path):
    blind = exported("nano", tmp_path, {"noise_level": False})
    with pytest.raises(InputError, match="takes other inputs"):
        tune((blind, nano[1]), tmp_path / "out.onnx")
