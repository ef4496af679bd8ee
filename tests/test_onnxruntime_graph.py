import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper
from torch.nn.functional import pixel_shuffle

from edgekit.backends import onnxruntime_graph
from edgekit.compress import placement, quantize
from edgekit.compress.export import export_onnx
from edgekit.compress.simplify import simplify
from edgekit.graph.checks import DENOISED, NOISY
from edgekit.graph.reference import Reference, probe, session_options
from edgekit.pipeline import networks
from edgekit.recipe import Quantization

SIGMA = 25 / 255


@pytest.fixture(scope="module", params=["nano", "base-blind", "base-color"])
def qdq(request, tmp_path_factory) -> onnx.ModelProto:
    folder = tmp_path_factory.mktemp(request.param)
    net = networks.shipped(request.param).net
    traced = export_onnx(
        net, channels=net.channels, takes_sigma=net.takes_sigma, stride=net.stride, out=folder / "traced.onnx"
    )
    pictures = [(probe(48, 64, net.channels, seed=i), SIGMA) for i in range(8)]
    where = placement.PLACEMENTS["onnxruntime"]
    settings = Quantization(calibration_pictures=8, change_basis=False)
    prepared = quantize.prepare(simplify(traced, folder / "simple.onnx"), pictures, settings, where)
    return placement.place(prepared.model, prepared.ranges, where)


def shuffles_of_integers(model: onnx.ModelProto) -> int:
    """Return how many DepthToSpace ONNX Runtime executes on integers."""
    integers = {n.output[0] for n in model.graph.node if n.op_type == "QLinearConv"}
    while (
        more := {n.output[0] for n in model.graph.node if n.op_type == "Transpose" and n.input[0] in integers}
        - integers
    ):
        integers |= more
    return sum(n.op_type == "DepthToSpace" and n.input[0] in integers for n in model.graph.node)


def optimized(model: onnx.ModelProto, path) -> onnx.ModelProto:
    options = session_options(1)
    options.optimized_model_filepath = str(path)
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return onnx.load(path)


@pytest.mark.parametrize("size", [(40, 72), (64, 32)], ids=["wide", "high"])
def test_every_integer_stays_what_it_is(qdq, size):
    after = onnxruntime_graph.rewritten(qdq)
    onnx.checker.check_model(after, full_check=True)
    channels = qdq.graph.input[0].type.tensor_type.shape.dim[1].dim_value
    given = {i.name: np.full((1, 1, 1, 1), SIGMA, np.float32) for i in qdq.graph.input}
    given[NOISY] = probe(*size, channels, seed=3)
    sessions = [
        onnxruntime.InferenceSession(m.SerializeToString(), session_options(1), providers=["CPUExecutionProvider"])
        for m in (qdq, after)
    ]
    before, now = (session.run([DENOISED], given)[0] for session in sessions)
    assert np.array_equal(before, now)


def test_no_shuffle_of_integers_is_left_and_fewer_transpositions_are_executed(qdq, tmp_path):
    before = optimized(qdq, tmp_path / "before.onnx")
    now = optimized(onnxruntime_graph.rewritten(qdq), tmp_path / "now.onnx")
    assert shuffles_of_integers(before) == 2
    assert shuffles_of_integers(now) == 0
    count = [sum(n.op_type == "Transpose" for n in model.graph.node) for model in (before, now)]
    assert count[1] < count[0]


def test_a_shuffle_that_is_rounded_anew_or_read_twice_stays():
    for result, more in (("other", []), ("one", [helper.make_node("Relu", ["shuffled"], ["more"], "more")])):
        model = graph_of_a_shuffle(result, more)
        assert onnxruntime_graph.shuffles_with_channels_last(model).SerializeToString() == model.SerializeToString()
    assert onnxruntime_graph.shuffles_with_channels_last(graph_of_a_shuffle("one", [])).graph.node[5].op_type == (
        "Transpose"
    )


def graph_of_a_shuffle(result: str, more: list[onnx.NodeProto]) -> onnx.ModelProto:
    """Return convolution, pair, DepthToSpace by planes and a pair of the scale named `result`."""
    stored = [
        numpy_helper.from_array(np.ones((4, 1, 1, 1), np.int8), "w"),
        numpy_helper.from_array(np.float32(1), "one"),
        numpy_helper.from_array(np.float32(2), "other"),
        numpy_helper.from_array(np.int8(0), "zero"),
        numpy_helper.from_array(np.uint8(0), "middle"),
    ]
    make = helper.make_node
    nodes = [
        make("DequantizeLinear", ["w", "one", "zero"], ["weights"]),
        make("QuantizeLinear", [NOISY, "one", "middle"], ["noisy_q"]),
        make("DequantizeLinear", ["noisy_q", "one", "middle"], ["noisy_dq"]),
        make("Conv", ["noisy_dq", "weights"], ["parts"], "conv"),
        make("QuantizeLinear", ["parts", "one", "middle"], ["parts_q"]),
        make("DequantizeLinear", ["parts_q", "one", "middle"], ["parts_dq"]),
        make("DepthToSpace", ["parts_dq"], ["shuffled"], "shuffle", blocksize=2, mode="DCR"),
        *more,
        make("QuantizeLinear", ["shuffled", result, "middle"], ["shuffled_q"]),
        make("DequantizeLinear", ["shuffled_q", result, "middle"], [DENOISED]),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "shuffle",
        [value(NOISY, onnx.TensorProto.FLOAT, [1, 1, 8, 8])],
        [value(DENOISED, onnx.TensorProto.FLOAT, [1, 1, 16, 16])],
        stored,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model


class TwoShuffles(torch.nn.Module):
    """Shuffles twice, the second time what has passed a ReLU, which stays as it is."""

    channels, takes_sigma, stride = 1, False, 8

    def __init__(self) -> None:
        super().__init__()
        self.head, self.down = torch.nn.Conv2d(1, 16, 4, 4), torch.nn.Conv2d(4, 16, 1)
        self.middle, self.tail = torch.nn.Conv2d(16, 16, 1), torch.nn.Conv2d(4, 1, 3, padding=1)

    def forward(self, noisy):
        half = pixel_shuffle(self.middle(torch.relu(self.head(noisy))), 2)
        return noisy - self.tail(pixel_shuffle(torch.relu(self.down(half)), 2))


def placed(net: torch.nn.Module, folder) -> onnx.ModelProto:
    traced = export_onnx(net.eval(), channels=1, takes_sigma=False, stride=net.stride, out=folder / "traced.onnx")
    pictures = [(probe(48, 64, 1, seed=i), SIGMA) for i in range(8)]
    settings = Quantization(calibration_pictures=8, change_basis=False)
    prepared = quantize.prepare(simplify(traced, folder / "simple.onnx"), pictures, settings)
    return placement.place(prepared.model, prepared.ranges, placement.PLACEMENTS["onnxruntime"])


def test_the_name_of_a_shape_is_free_too():
    model = graph_of_a_shuffle("one", [helper.make_node("Relu", [NOISY], ["shuffled_q_1_shape"])])
    after = onnxruntime_graph.shuffles_with_channels_last(model)
    assert "DepthToSpace" not in {n.op_type for n in after.graph.node}
    onnx.checker.check_model(after)


def test_no_name_is_given_twice(tmp_path):
    torch.manual_seed(0)
    before = placed(TwoShuffles(), tmp_path)
    shuffles = [n.name for n in before.graph.node if n.op_type == "DepthToSpace"]
    assert shuffles == ["/DepthToSpace", "/DepthToSpace_1"]
    after = onnxruntime_graph.rewritten(before)
    assert [n.name for n in after.graph.node if n.op_type == "DepthToSpace"] == shuffles[1:]
    assert len({n.name for n in after.graph.node}) == len(after.graph.node)
    noisy = probe(48, 64, 1, seed=3)
    assert np.array_equal(Reference(after)(noisy, SIGMA), Reference(before)(noisy, SIGMA))
