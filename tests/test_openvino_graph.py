import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekit.backends import openvino_graph
from edgekit.compress import placement, quantize
from edgekit.compress.export import export_onnx
from edgekit.compress.simplify import simplify
from edgekit.graph import walk
from edgekit.graph.checks import DENOISED, NOISY, load_onnx
from edgekit.graph.reference import Reference, probe
from edgekit.pipeline import networks
from edgekit.recipe import Quantization

SIGMA = 25 / 255
# Even zero points: a tie is rounded to even with them and without.
STEPS = {"first": (1 / 16, 90), "wide": (1 / 8, 0), "sum": (1 / 8, 76)}


def exact_graph(tail_pads: int) -> onnx.ModelProto:
    """Return conv - [first] - conv - relu - [wide] - conv - + - [sum] - conv in numbers that floats hold exactly."""
    random = np.random.default_rng(0)
    nodes, stored = [], []

    def constant(name: str, values: np.ndarray) -> str:
        stored.append(numpy_helper.from_array(values, name))
        return name

    def conv(name: str, source: str, shape: tuple[int, ...], result: str, pads: int = 0) -> None:
        integers = constant(f"{name}.q", random.integers(-8, 9, shape).astype(np.int8))
        scale = constant(f"{name}.s", np.exp2(-random.integers(3, 6, shape[0])).astype(np.float32))
        zero = constant(f"{name}.z", np.zeros(shape[0], np.int8))
        bias = constant(f"{name}.b", (random.integers(-16, 17, shape[0]) / 32).astype(np.float32))
        nodes.append(helper.make_node("DequantizeLinear", [integers, scale, zero], [f"{name}.w"], axis=0))
        nodes.append(helper.make_node("Conv", [source, f"{name}.w", bias], [result], name, pads=[pads] * 4))

    def pair(name: str) -> str:
        scale, zero = STEPS[name]
        grid = [constant(f"{name}_scale", np.float32(scale)), constant(f"{name}_zero_point", np.uint8(zero))]
        nodes.append(helper.make_node("QuantizeLinear", [name, *grid], [f"{name}_q"]))
        nodes.append(helper.make_node("DequantizeLinear", [f"{name}_q", *grid], [f"{name}_dq"]))
        return f"{name}_dq"

    conv("head", NOISY, (4, 1, 1, 1), "first")
    conv("expand", pair("first"), (8, 4, 1, 1), "expanded")
    nodes.append(helper.make_node("Relu", ["expanded"], ["wide"]))
    conv("project", pair("wide"), (4, 8, 1, 1), "projected")
    nodes.append(helper.make_node("Add", ["first_dq", "projected"], ["sum"], "add"))
    conv("tail", pair("sum"), (1, 4, 2 * tail_pads + 1, 2 * tail_pads + 1), "noise", tail_pads)
    nodes.append(helper.make_node("Sub", [NOISY, "noise"], [DENOISED], "last"))
    shape = [1, 1, 16, 16]
    graph = helper.make_graph(
        nodes,
        "exact",
        [helper.make_tensor_value_info(NOISY, TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(DENOISED, TensorProto.FLOAT, shape)],
        stored,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model


def zero_points(model: onnx.ModelProto) -> dict[str, int]:
    stored = walk.initializers(model)
    return {
        n.input[0]: int(numpy_helper.to_array(stored[n.input[2]]))
        for n in model.graph.node
        if n.op_type == "QuantizeLinear"
    }


@pytest.fixture(scope="module", params=["nano", "base-color"])
def fp32(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    net = networks.shipped(request.param).net
    traced = export_onnx(
        net, channels=net.channels, takes_sigma=net.takes_sigma, stride=net.stride, out=folder / "traced.onnx"
    )
    return simplify(traced, folder / "simple.onnx"), net.channels


@pytest.fixture(scope="module")
def qdq(fp32):
    path, channels = fp32
    pictures = [(probe(48, 64, channels, seed=i), SIGMA) for i in range(8)]
    where = placement.PLACEMENTS["openvino"]
    settings = Quantization(calibration_pictures=8, change_basis=False)
    prepared = quantize.prepare(path, pictures, settings, where)
    return prepared.model, placement.place(prepared.model, prepared.ranges, where)


@pytest.mark.parametrize(
    ("tail_pads", "left"), [(0, {"first": 0, "wide": 0, "sum": 0}), (1, {"first": 0, "wide": 0, "sum": 76})]
)
def test_without_zero_points_the_integers_are_the_same(tail_pads, left):
    before = exact_graph(tail_pads)
    after = openvino_graph.without_zero_points(before)
    assert zero_points(before) == {"first": 90, "wide": 0, "sum": 76}
    assert zero_points(after) == left, "a convolution with a border keeps the zero that it puts there"
    noisy = np.random.default_rng(1).integers(-64, 65, (1, 1, 16, 16)).astype(np.float32) / 16
    expected = Reference(before)(noisy, SIGMA)
    assert np.unique(expected - noisy).size > 10
    assert np.array_equal(Reference(after)(noisy, SIGMA), expected)


@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER"])
def test_a_border_of_a_width_that_the_engine_finds_keeps_its_zero(auto_pad):
    before = exact_graph(1)
    tail = next(n for n in before.graph.node if n.name == "tail")
    del tail.attribute[:]
    tail.attribute.append(helper.make_attribute("auto_pad", auto_pad))
    assert zero_points(openvino_graph.without_zero_points(before)) == {"first": 0, "wide": 0, "sum": 76}


def test_weights_that_are_constants_among_the_nodes_are_found():
    weights = [(np.random.default_rng(0).standard_normal((4, 1, 3, 3)) / 9).astype(np.float32), np.float32(0.1)]
    make = helper.make_node
    nodes = [
        *(make("Constant", [], [n], n, value=numpy_helper.from_array(w)) for n, w in zip("ws", weights, strict=True)),
        make("SpaceToDepth", [NOISY], ["spread"], "spread", blocksize=2),
        make("Conv", ["spread", "w"], ["parts"], "conv", group=4, pads=[1] * 4),
        make("Mul", ["parts", "s"], ["scaled"], "mul"),
        make("DepthToSpace", ["scaled"], ["noise"], "shuffle", blocksize=2, mode="CRD"),
        make("Sub", [NOISY, "noise"], [DENOISED], "sub"),
    ]
    value = helper.make_tensor_value_info
    shape = [1, 1, 8, 8]
    graph = helper.make_graph(
        nodes, "made", [value(NOISY, TensorProto.FLOAT, shape)], [value(DENOISED, TensorProto.FLOAT, shape)]
    )
    before = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    after = openvino_graph.rewritten(before)
    onnx.checker.check_model(after)
    assert {tensor.name for tensor in after.graph.initializer} >= {"w", "s"}
    noisy = probe(8, 8, 1, seed=3)
    assert np.abs(Reference(after)(noisy, SIGMA) - Reference(before)(noisy, SIGMA)).max() < 1e-6


@pytest.mark.parametrize("groups", [1, 2, 16])
def test_a_shuffle_behind_groups_keeps_its_order(groups):
    random = np.random.default_rng(0)
    weights = {"v": (16, 1, 1, 1), "w": (16, 16 // groups, 3, 3), "u": (1, 4, 1, 1)}
    make = helper.make_node
    nodes = [
        make("Conv", [NOISY, "v"], ["a"], "first"),
        make("Conv", ["a", "w"], ["b"], "second", group=groups, pads=[1] * 4, strides=[2, 2]),
        make("DepthToSpace", ["b"], ["c"], "shuffle", blocksize=2, mode="CRD"),
        make("Conv", ["c", "u"], [DENOISED], "last"),
    ]
    value = helper.make_tensor_value_info
    shape = [1, 1, 8, 8]
    graph = helper.make_graph(
        nodes,
        "made",
        [value(NOISY, TensorProto.FLOAT, shape)],
        [value(DENOISED, TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(random.standard_normal(s).astype(np.float32), n) for n, s in weights.items()],
    )
    before = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    after = openvino_graph.channels_by_plane(before)
    mode = walk.attribute(after.graph.node[2], "mode")
    assert mode == (b"DCR" if groups == 1 else b"CRD")
    noisy = probe(8, 8, 1, seed=3)
    assert np.abs(Reference(after)(noisy, SIGMA) - Reference(before)(noisy, SIGMA)).max() < 1e-5


@pytest.mark.parametrize("apart", [1, 2])
def test_a_window_of_one_column_gets_zeros_beside_it(apart):
    before = exact_graph(0)
    tail = next(n for n in before.graph.node if n.name == "tail")
    integers = next(t for t in before.graph.initializer if t.name == "tail.q")
    values = np.random.default_rng(3).integers(-8, 9, (1, 4, 3, 1)).astype(np.int8)
    integers.CopyFrom(numpy_helper.from_array(values, "tail.q"))
    del tail.attribute[:]
    window = {"kernel_shape": [3, 1], "pads": [apart, 0, apart, 0], "dilations": [apart, 1]}
    tail.attribute.extend(helper.make_attribute(key, given) for key, given in window.items())
    after = openvino_graph.without_columns(before)
    onnx.checker.check_model(after)
    wide = next(n for n in after.graph.node if n.name == "tail")
    assert list(walk.attribute(wide, "kernel_shape")) == [3, 3]
    assert [n for n in after.graph.node if n.name == "expand"] == [n for n in before.graph.node if n.name == "expand"]
    noisy = np.random.default_rng(1).integers(-64, 65, (1, 1, 16, 16)).astype(np.float32) / 16
    assert np.array_equal(Reference(after)(noisy, SIGMA), Reference(before)(noisy, SIGMA))


@pytest.mark.parametrize("planes", [1, 3])
def test_a_gray_residual_is_added_to_a_colour_picture_where_it_was(planes):
    weights = {"w": (np.random.default_rng(0).standard_normal((4 * planes, 12, 3, 3)) / 9).astype(np.float32)}
    make = helper.make_node
    nodes = [
        make("SpaceToDepth", [NOISY], ["spread"], "spread", blocksize=2),
        make("Conv", ["spread", "w"], ["parts"], "conv", pads=[1] * 4),
        make("DepthToSpace", ["parts"], ["noise"], "shuffle", blocksize=2, mode="DCR"),
        make("Add", [NOISY, "noise"], [DENOISED], "add"),
    ]
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 3, "h", "w"]) for n in (NOISY, DENOISED)]
    stored = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "made", values[:1], values[1:], stored)
    before = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    after = openvino_graph.rewritten(before)
    onnx.checker.check_model(after, full_check=True)
    assert walk.producers(after)[DENOISED].op_type == ("Add" if planes == 1 else "DepthToSpace")
    noisy = probe(16, 24, 3, seed=3)
    assert np.abs(Reference(after)(noisy, SIGMA) - Reference(before)(noisy, SIGMA)).max() < 1e-6


def test_a_map_that_something_else_reads_too_stays():
    before = exact_graph(0)
    before.graph.node.append(helper.make_node("Relu", ["sum_dq"], ["seen"]))
    assert zero_points(openvino_graph.without_zero_points(before)) == {"first": 0, "wide": 0, "sum": 76}


def test_maps_that_no_bias_goes_into_stay():
    before = exact_graph(0)
    project = next(n for n in before.graph.node if n.name == "project")
    del project.input[2]
    assert zero_points(openvino_graph.without_zero_points(before)) == {"first": 90, "wide": 0, "sum": 76}


def test_shuffles_move_vectors_and_the_subtraction_comes_before_the_last(fp32):
    path, channels = fp32
    before = load_onnx(path)
    after = openvino_graph.rewritten(before)
    onnx.checker.check_model(after)
    modes = [a.s for n in after.graph.node if n.op_type == "DepthToSpace" for a in n.attribute if a.name == "mode"]
    assert modes
    assert set(modes) == {b"DCR"}
    last = walk.producers(after)[DENOISED]
    assert last.op_type == "DepthToSpace"
    together = walk.producers(after)[last.input[0]]
    assert (together.op_type, walk.producers(after)[together.input[1]].name) == ("Add", "/tail/Conv")
    noisy = probe(48, 64, channels, seed=3)
    assert np.abs(Reference(after)(noisy, SIGMA) - Reference(before)(noisy, SIGMA)).max() < 1e-6


def test_in_integers_it_is_as_far_from_float_and_zero_points_are_only_where_they_must_be(fp32, qdq):
    channels, (floating, before) = fp32[1], qdq
    after = openvino_graph.rewritten(before)
    onnx.checker.check_model(after)
    readers = walk.consumers(floating)
    convolutions = [n for n in floating.graph.node if n.op_type == "Conv"]
    bordered = {n.input[0] for n in convolutions if any(a.name == "pads" and any(a.ints) for a in n.attribute)}
    for tensor, zero in zero_points(after).items():
        moved = any(r.op_type == "SpaceToDepth" for r in readers[tensor])
        assert zero == 0 or tensor in bordered or moved, tensor
    assert sum(z != 0 for z in zero_points(before).values()) > 2 + sum(z != 0 for z in zero_points(after).values())
    noisy = [probe(96, 96, channels, seed=i) for i in range(4)]
    truth = [Reference(floating)(n, SIGMA) for n in noisy]
    errors = [
        np.mean([np.square(Reference(model)(n, SIGMA) - t).mean() for n, t in zip(noisy, truth, strict=True)])
        for model in (before, after)
    ]
    assert errors[1] == pytest.approx(errors[0], rel=0.05)


def test_a_shuffle_whose_convolution_is_read_elsewhere_stays():
    model = load_and_share()
    changed = openvino_graph.channels_by_plane(model)
    assert changed.SerializeToString() == model.SerializeToString()
    assert openvino_graph.subtraction_before_shuffle(model).SerializeToString() == model.SerializeToString()


def load_and_share() -> onnx.ModelProto:
    weights = numpy_helper.from_array(np.ones((4, 4, 1, 1), np.float32), "w")
    nodes = [
        helper.make_node("SpaceToDepth", [NOISY], ["spread"], blocksize=2),
        helper.make_node("Conv", ["spread", "w"], ["parts"], "conv"),
        helper.make_node("DepthToSpace", ["parts"], ["noise"], blocksize=2, mode="CRD"),
        helper.make_node("ReduceMean", ["parts"], ["mean"], keepdims=1),
        helper.make_node("Sub", [NOISY, "noise"], ["clean"], "sub"),
        helper.make_node("Mul", ["clean", "mean"], [DENOISED], "mul"),
    ]
    value = helper.make_tensor_value_info
    shape = [1, 1, 8, 8]
    graph = helper.make_graph(
        nodes, "shared", [value(NOISY, 1, shape)], [value(DENOISED, TensorProto.FLOAT, shape)], [weights]
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
