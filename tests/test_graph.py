import itertools
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import tiny
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from torch.nn import functional

from edgekit import models
from edgekit.compress.export import export_onnx
from edgekit.compress.quantize import quantize_static
from edgekit.compress.simplify import simplify
from edgekit.errors import InputError, UnsupportedError
from edgekit.graph import checks, cost, receptive_field, reference, walk
from edgekit.graph.resizing import resizing
from edgekit.recipe import Quantization


def picture(name: str, shape: list[int | str | None]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def graph(
    nodes: list[onnx.NodeProto],
    *,
    inputs: list[onnx.ValueInfoProto] | None = None,
    outputs: list[onnx.ValueInfoProto] | None = None,
    weights: dict[str, np.ndarray] | None = None,
) -> onnx.ModelProto:
    made = helper.make_graph(
        nodes,
        "made",
        inputs or [picture("noisy", [1, 1, "h", "w"])],
        outputs or [picture("denoised", [1, 1, "h", "w"])],
        [numpy_helper.from_array(value, name) for name, value in (weights or {}).items()],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def saved(model: onnx.ModelProto, path: Path) -> Path:
    path.write_bytes(model.SerializeToString())
    return path


IDENTITY = helper.make_node("Identity", ["noisy"], ["denoised"], "same")


class Pyramid(nn.Module):
    """Every operator that changes the resolution, with kernels that are not centred."""

    channels, stride, takes_sigma = 1, 8, False

    def __init__(self) -> None:
        super().__init__()
        self.head, self.down = nn.Conv2d(4, 4, 5, padding=2), nn.Conv2d(4, 4, 2, 2)
        self.deep, self.up = nn.Conv2d(4, 4, 3, padding=2, dilation=2), nn.ConvTranspose2d(4, 4, 4, 2, 1)
        self.tail = nn.Conv2d(4, 4, (3, 1), padding=(1, 0))

    def forward(self, noisy: torch.Tensor) -> torch.Tensor:
        x = self.head(nn.functional.pixel_unshuffle(noisy, 2))
        y = self.up(self.deep(nn.functional.max_pool2d(self.down(x), 2)))
        y = nn.functional.pixel_shuffle(torch.cat([y, y, y, y], 1), 2)
        return noisy - nn.functional.pixel_shuffle(self.tail(x + y), 2)


class Resized(nn.Module):
    """Two ways down and, by repeating or between pixels, up again."""

    channels, stride, takes_sigma = 1, 8, False

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.head, self.first, self.second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 2, 2), nn.Conv2d(4, 4, 2, 2)
        self.deep, self.tail = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(8, 1, 3, padding=1)
        self.up = nn.Upsample(scale_factor=2, mode=mode)

    def forward(self, noisy: torch.Tensor) -> torch.Tensor:
        head = self.head(noisy)
        first = self.first(head)
        up = self.up(first + self.up(self.deep(self.second(first))))
        return noisy - self.tail(torch.cat([up, head], 1))


class Framed(nn.Module):
    """Padding, cropping and slicing by operators of their own, and activations made of several nodes."""

    channels, stride, takes_sigma = 1, 1, False

    def __init__(self) -> None:
        super().__init__()
        self.head, self.middle, self.tail = nn.Conv2d(1, 4, 5), nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 1, (1, 3))

    def forward(self, noisy: torch.Tensor) -> torch.Tensor:
        x = functional.gelu(self.head(functional.pad(noisy, (3, 1, 2, 2), mode="reflect")))
        x = functional.elu(self.middle(x[:, 1:3]))
        wide = functional.pad(x, (2, 2, 1, 1))[:, :, 1:, 1:]
        return noisy - self.tail(wide[:, :, :-1, :-1])


def exported(net: nn.Module, folder: Path, *, positive: bool = False) -> onnx.ModelProto:
    """Export a network; with `positive` weights no two ways through it can cancel out."""
    if positive:
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.copy_(parameter.abs() + 0.01)
    path = export_onnx(
        net, channels=net.channels, takes_sigma=net.takes_sigma, stride=net.stride, out=folder / "net.onnx"
    )
    return checks.load_onnx(simplify(path, folder / "simple.onnx"))


def test_a_denoiser_is_loaded_and_described(tmp_path):
    net = models.create("nano", {"channels": 3})
    model = exported(net, tmp_path)
    assert checks.interface(model, tmp_path) == checks.Interface(channels=3, takes_sigma=True, opset=17)
    assert checks.op_counts(model)["Conv"] == sum(isinstance(m, nn.Conv2d) for m in net.modules())
    assert not checks.is_quantized(model)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        pytest.param(None, "cannot be read", id="missing"),
        pytest.param(b"", "not a whole ONNX model", id="empty"),
        pytest.param(b"\x89PNG\r\n\x1a\n" * 99, "not a whole ONNX model", id="junk"),
        pytest.param("half", "not a whole ONNX model", id="cut short"),
    ],
)
def test_a_file_that_is_not_whole_is_refused_by_name(tmp_path, content, said):
    path = tmp_path / "model.onnx"
    if content == "half":
        exported(models.create("nano"), tmp_path)
        whole = (tmp_path / "simple.onnx").read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=said) as error:
        checks.load_onnx(path)
    assert str(path) in str(error.value)


def weighted() -> onnx.ModelProto:
    weights = {"w": np.ones((4, 1, 64, 64), np.float32), "v": np.ones((1, 4, 1, 1), np.float32)}
    nodes = [helper.make_node("Conv", ["noisy", "w"], ["x"], "a"), helper.make_node("Conv", ["x", "v"], ["denoised"])]
    return graph(nodes, weights=weights)


def test_data_that_lies_beside_the_file_and_is_cut_short_is_refused(tmp_path):
    onnx.save(weighted(), tmp_path / "m.onnx", save_as_external_data=True, location="m.bin", size_threshold=0)
    checks.load_onnx(tmp_path / "m.onnx")
    (tmp_path / "m.bin").write_bytes((tmp_path / "m.bin").read_bytes()[:1000])
    with pytest.raises(InputError, match=r"m\.onnx: is not a whole ONNX model.*for tensor 'w'"):
        checks.load_onnx(tmp_path / "m.onnx")


def test_a_weight_with_more_data_than_its_shape_says_is_refused(tmp_path):
    model = weighted()
    model.graph.initializer[0].dims[0] = 3
    with pytest.raises(InputError, match=r"m\.onnx: weight 'w' has other data than its shape \(3, 1, 64, 64\) says"):
        checks.load_onnx(saved(model, tmp_path / "m.onnx"))


@pytest.mark.parametrize(
    ("model", "error", "said"),
    [
        pytest.param(
            graph([helper.make_node("Identity", ["x"], ["denoised"])], inputs=[picture("x", [1, 1, "h", "w"])]),
            InputError,
            r"inputs are 'x' \(1, 1, h, w\)",
            id="another input name",
        ),
        pytest.param(
            graph([helper.make_node("Identity", ["noisy"], ["y"])], outputs=[picture("y", [1, 1, "h", "w"])]),
            InputError,
            r"outputs 'y'",
            id="another output name",
        ),
        pytest.param(
            graph([IDENTITY], inputs=[picture("noisy", [1, "h", "w"])], outputs=[picture("denoised", [1, "h", "w"])]),
            InputError,
            r"float \(1, h, w\)",
            id="rank 3",
        ),
        pytest.param(
            graph([IDENTITY], outputs=[picture("denoised", [1, 3, "h", "w"])]),
            InputError,
            "1 channels and 'denoised' has 3",
            id="other channels out",
        ),
        pytest.param(
            graph([IDENTITY], inputs=[picture("noisy", [1, 1, "h", "w"]), picture("sigma", [1])]),
            InputError,
            r"'sigma' has the shape \(1\)",
            id="sigma of rank 1",
        ),
        pytest.param(
            graph([IDENTITY], inputs=[picture("noisy", [1, "c", "h", "w"])]),
            UnsupportedError,
            "dynamic number of channels",
            id="dynamic channels",
        ),
        pytest.param(
            graph([IDENTITY], inputs=[picture("noisy", [1, 1, 256, 256])]),
            UnsupportedError,
            r"\(1, 1, 256, 256\); height and width must be dynamic",
            id="fixed size",
        ),
        pytest.param(
            graph(
                [
                    helper.make_node(
                        "If",
                        ["yes"],
                        ["denoised"],
                        then_branch=helper.make_graph(
                            [helper.make_node("Identity", ["noisy"], ["a"])], "a", [], [picture("a", None)]
                        ),
                        else_branch=helper.make_graph(
                            [helper.make_node("Neg", ["noisy"], ["b"])], "b", [], [picture("b", None)]
                        ),
                    )
                ],
                weights={"yes": np.array(True)},
            ),
            UnsupportedError,
            r"control flow \(If\)",
            id="control flow",
        ),
    ],
)
def test_another_interface_is_refused_and_what_was_found_is_named(tmp_path, model, error, said):
    path = saved(model, tmp_path / "model.onnx")
    with pytest.raises(error, match=said) as raised:
        checks.load_onnx(path)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("name", ["nano", "control", "dncnn"])
def test_the_cost_is_what_torch_counts(tmp_path, name):
    net = models.create(name)
    macs: list[int] = []
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(
                lambda conv, _, y: macs.append(y.numel() * conv.weight[0].numel())  # per output element
            )
    sigma = (torch.zeros(1, 1, 1, 1),) if net.takes_sigma else ()
    with torch.no_grad():
        net(torch.zeros(1, 1, 64, 96), *sigma)
        for parameter in net.parameters():
            parameter.normal_()  # onnxsim drops what is zero
    want = sum(macs)
    found = cost.cost(exported(net, tmp_path), 64, 96)
    assert (found.macs, found.parameters) == (want, models.parameter_count(net))


def test_the_stride_is_the_least_whose_multiples_the_graph_takes(tmp_path):
    assert cost.stride(exported(models.create("nano"), tmp_path), tmp_path) == 8
    assert cost.stride(exported(tiny.Deep(), tmp_path), tmp_path) == 16


@pytest.mark.parametrize(
    ("last", "size"),
    [
        (helper.make_node("DepthToSpace", ["four"], ["denoised"], blocksize=2), "2112x2240"),
        (helper.make_node("AveragePool", ["noisy"], ["denoised"], kernel_shape=[2, 2]), "1055x1119"),
    ],
    ids=["larger", "smaller"],
)
def test_a_graph_whose_output_has_another_size_has_no_stride(tmp_path, last, size):
    model = graph([helper.make_node("Concat", ["noisy"] * 4, ["four"], axis=1), last])
    with pytest.raises(UnsupportedError, match=rf"net\.onnx: a picture of 1056x1120 comes out as {size}"):
        cost.stride(model, tmp_path / "net.onnx")


def test_the_cost_of_a_transposed_convolution_is_counted_at_its_input(tmp_path):
    macs = cost.macs_by_node(exported(Pyramid(), tmp_path), 64, 64)
    assert macs["/up/ConvTranspose"] == (8 * 8) * 4 * 4 * 16


@pytest.mark.parametrize("name", ["same", ""], ids=["one name", "no name"])
def test_products_that_cannot_be_told_apart_are_not_counted_as_one(name):
    model = graph(
        [
            helper.make_node("Conv", ["noisy", "w"], ["between"], name),
            helper.make_node("Conv", ["between", "w"], ["denoised"], name),
        ],
        weights={"w": np.ones((1, 1, 1, 1), np.float32)},
    )
    with pytest.raises(UnsupportedError, match=f"two nodes are named '{name}'"):
        cost.macs_by_node(model, 64, 64)


def test_the_share_of_integers_is_rounded_down_as_an_engines_account_is():
    """Else 94.96 % would be released as 95 % and judged as 94.9 %, and 99.96 % be told as 100 %."""
    names = ["noisy", "a", "b", "denoised"]
    nodes = [helper.make_node("Conv", [names[i], "w"], [names[i + 1]], f"conv{i}") for i in range(3)]
    model = graph(nodes, weights={"w": np.ones((1, 1, 1, 1), np.float32)})
    for count, permille in ((0, 0), (1, 333), (2, 666), (3, 1000)):
        assert cost.integer_permille(model, frozenset(f"conv{i}" for i in range(count))) == permille


def test_quantizing_changes_the_bytes_but_not_the_count(tmp_path):
    float_model = exported(models.create("nano"), tmp_path)
    pictures = [(reference.probe(32, 32, 1, seed=i), 0.1) for i in range(8)]
    quantize_static(tmp_path / "simple.onnx", pictures, tmp_path / "int8.onnx", Quantization(calibration_pictures=8))
    integer_model = checks.load_onnx(tmp_path / "int8.onnx")
    assert cost.cost(integer_model, 64, 64) == cost.cost(float_model, 64, 64)
    assert integer_model.ByteSize() < float_model.ByteSize()


@pytest.mark.parametrize(
    "given",
    [
        {"value": numpy_helper.from_array(np.ones((4, 1, 3, 3), np.float32))},
        {"value_floats": [1.0] * 36},
        {"value_float": 1.0},
        {"value_ints": [1, 2]},
        {"value_int": 3},
        {"value_string": "text"},
    ],
    ids=lambda given: next(iter(given)),
)
def test_what_constants_hold_is_stored_and_counted(given):
    model = graph([helper.make_node("Constant", [], ["c"], "constant", **given), IDENTITY])
    stored = walk.constants_stored(model)
    (kind,) = given
    if kind == "value_string":
        assert stored == model
        return
    assert [n.op_type for n in stored.graph.node] == ["Identity"]
    (tensor,) = stored.graph.initializer
    got, want = numpy_helper.to_array(tensor), given[kind]
    want = numpy_helper.to_array(want) if kind == "value" else np.array(want)
    assert tensor.name == "c"
    assert got.shape == want.shape
    assert np.array_equal(got, want)
    # A number without an axis is one of a formula.
    assert cost.parameters(model) == (want.size if kind in ("value", "value_floats") else 0)


def test_what_sets_an_operator_is_not_learned():
    nodes = [
        helper.make_node("Conv", ["noisy", "w", "b"], ["x"], "conv", pads=[1] * 4),
        helper.make_node("Clip", ["x", "low", "high"], ["y"], "clip"),
        helper.make_node("Resize", ["y", "", "scales"], ["z"], "up", mode="nearest"),
        helper.make_node("MaxPool", ["z"], ["denoised"], "down", kernel_shape=[2, 2], strides=[2, 2]),
    ]
    weights = {"w": np.ones((1, 1, 3, 3), np.float32), "b": np.ones(1, np.float32)}
    settings = {"low": np.float32(0), "high": np.float32(6), "scales": np.float32([1, 1, 2, 2])}
    assert cost.parameters(graph(nodes, weights=weights | settings)) == 10


def test_a_bound_of_a_clip_may_be_infinite_and_a_weight_not(tmp_path):
    nodes = [
        helper.make_node("Conv", ["noisy", "w"], ["x"], "conv"),
        helper.make_node("Clip", ["x", "low", "high"], ["denoised"], "clip"),
    ]
    for high, weight, said in ((np.inf, 1, ""), (np.nan, 1, "'high' has 1 of 1"), (1, np.inf, "'w' has 1 of 1")):
        weights = {"low": np.float32(0), "high": np.float32(high), "w": np.float32([weight]).reshape(1, 1, 1, 1)}
        path = saved(graph(nodes, weights=weights), tmp_path / "net.onnx")
        if said:
            with pytest.raises(InputError, match=said):
                checks.load_onnx(path)
        else:
            checks.load_onnx(path)


def test_shapes_behind_a_group_normalization_are_known():
    nodes = [
        helper.make_node("Conv", ["noisy", "w"], ["x"], "conv", pads=[1] * 4, kernel_shape=[3, 3]),
        helper.make_node("GroupNormalization", ["x", "ones", "ones"], ["y"], "norm", num_groups=2),
        helper.make_node("Conv", ["y", "v"], ["denoised"], "last", kernel_shape=[1, 1]),
    ]
    weights = {
        "w": np.ones((4, 1, 3, 3), np.float32),
        "ones": np.ones(4, np.float32),
        "v": np.ones((1, 4, 1, 1), np.float32),
    }
    model = graph(nodes, weights=weights)
    model.opset_import[0].version = 21
    onnx.checker.check_model(model, full_check=True)
    assert cost.infer_shapes(model, 16, 24)["denoised"] == (1, 1, 16, 24)
    field = receptive_field.receptive_field(model)
    assert (field.halo_px, field.global_nodes) == (1, ("norm",))


def test_a_size_that_does_not_fit_the_graph_has_no_cost(tmp_path):
    with pytest.raises(UnsupportedError, match="61x64"):
        cost.cost(exported(models.create("nano"), tmp_path), 61, 64)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: models.create("nano", {"noise_level": False}), id="nano"),
        pytest.param(lambda: models.create("control", {"noise_level": False}), id="control"),
        pytest.param(lambda: models.create("dncnn"), id="dncnn"),
        pytest.param(Pyramid, id="pyramid"),
        pytest.param(lambda: Resized("nearest"), id="nearest"),
        pytest.param(lambda: Resized("bilinear"), id="bilinear"),
        pytest.param(Framed, id="framed"),
    ],
)
def test_the_halo_is_as_far_as_gradients_reach(tmp_path, make):
    net = make()
    halo = receptive_field.receptive_field(exported(net, tmp_path, positive=True)).halo_px
    size, reach = 2 * (halo // 8 * 8 + 16), 0
    net.double().eval()
    for phase in range(net.stride):
        noisy = torch.full((1, 1, size, size), 1.0, dtype=torch.float64, requires_grad=True)
        at = size // 2 + phase
        noise = noisy - net(noisy)
        noise[0, 0, at, at].backward()
        rows, columns = torch.nonzero(noisy.grad[0, 0], as_tuple=True)
        reach = max(reach, *(int((axis - at).abs().max()) for axis in (rows, columns)))
    assert halo == reach


@pytest.mark.parametrize("factors", [(1, 1), (2, 2), (2, 3), (3, 3), (4, 4)], ids=str)
@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
def test_a_resizing_that_is_understood_is_what_onnx_runtime_does(mode, factors):
    values = np.random.RandomState(0).randn(1, 1, 5, 4).astype(np.float32)
    scales = np.array([1, 1, *factors], np.float32)
    understood = []
    for coordinates, rounding in itertools.product(
        ("half_pixel", "pytorch_half_pixel", "asymmetric", "align_corners"),
        ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil"),
    ):
        attributes = {"mode": mode, "coordinate_transformation_mode": coordinates, "nearest_mode": rounding}
        found = resizing(attributes, scales)
        if found is None:
            continue
        understood.append(coordinates)
        node = helper.make_node("Resize", ["noisy", "", "scales"], ["denoised"], "grow", **attributes)
        expected = (
            values.repeat(found.height, 2).repeat(found.width, 3)
            if found.mode == "nearest"
            else functional.interpolate(torch.from_numpy(values), scale_factor=factors, mode="bilinear").numpy()
        )
        session = ort.InferenceSession(graph([node], weights={"scales": scales}).SerializeToString())
        np.testing.assert_allclose(session.run(None, {"noisy": values})[0], expected, atol=1e-6)
    assert (
        set(understood)
        == {
            "nearest": {"half_pixel", "pytorch_half_pixel", "asymmetric"},
            "linear": {"half_pixel", "pytorch_half_pixel"},
            "cubic": set(),
        }[mode]
    )


class Levelled(nn.Module):
    """A map of the noise level, or of columns, goes through more convolutions than the picture."""

    channels, stride, takes_sigma = 1, 1, True

    def __init__(self, of: str) -> None:
        super().__init__()
        self.of = of
        self.head, self.tail = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 1, 3, padding=1)
        self.level = nn.Sequential(*(nn.Conv2d(n, 8, 3, padding=1) for n in (1, 8, 8, 8)))

    def forward(self, noisy: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        level = torch.ones_like(noisy) * sigma if self.of == "ones" else sigma.expand(-1, -1, *noisy.shape[2:])
        if self.of == "columns":
            level = level * torch.arange(noisy.shape[3]).float().reshape(1, 1, 1, -1)
        if self.of == "borders":
            level = level * functional.avg_pool2d(torch.ones_like(noisy), 5, 1, 2)
        return noisy - self.tail(torch.relu(self.head(noisy) + self.level(level)))


@pytest.mark.parametrize(("of", "halo"), [("level", 5), ("ones", 5), ("borders", 7)])
def test_maps_of_the_noise_level_show_where_the_picture_ends(tmp_path, of, halo):
    torch.manual_seed(0)
    model = exported(Levelled(of).eval(), tmp_path)
    assert receptive_field.receptive_field(model).halo_px == halo
    run, noisy = reference.Reference(model), reference.probe(48, 48, 1, seed=0)
    whole, tile = run(noisy, 0.2)[:, :, 12:36, 12:36], run(np.ascontiguousarray(noisy[:, :, 12:36, 12:36]), 0.2)
    differs = np.abs(whole - tile) > 1e-6
    assert not differs[:, :, halo:-halo, halo:-halo].any()
    assert differs[:, :, 2:-2, 2:-2].any()


def test_what_depends_on_the_place_in_the_picture_has_no_halo(tmp_path):
    with pytest.raises(UnsupportedError, match="depends on the place in the picture"):
        receptive_field.receptive_field(exported(Levelled("columns").eval(), tmp_path))


def test_global_operators_are_named(tmp_path):
    field = receptive_field.receptive_field(exported(models.create("nano", {"se": True}), tmp_path))
    assert len(field.global_nodes) == 1
    assert "attention" in field.global_nodes[0]
    assert receptive_field.receptive_field(exported(models.create("nano"), tmp_path)).global_nodes == ()


def test_the_halo_is_rounded_up_to_the_stride():
    field = receptive_field.ReceptiveField(halo_px=35, global_nodes=(), grid_px=1)
    assert (field.aligned(8), field.aligned(35)) == (40, 35)


def test_a_halo_is_not_aligned_to_less_than_the_networks_own_grid():
    field = receptive_field.ReceptiveField(halo_px=35, global_nodes=(), grid_px=16)
    assert field.aligned(32) == 64
    with pytest.raises(UnsupportedError, match=r"multiples of 8 pixels.*grid of 16; say .* stride = 16"):
        field.aligned(8)


@pytest.mark.parametrize(
    ("nodes", "said"),
    [
        pytest.param(
            [helper.make_node("Resize", ["noisy", "", "scales"], ["denoised"], "grow", mode="cubic")],
            "'grow' (Resize): mode cubic",
            id="cubic",
        ),
        pytest.param(
            [helper.make_node("Slice", ["noisy", "last", "ends", "axes"], ["denoised"], "crop")],
            "'crop' (Slice): it counts from the picture's end",
            id="from the end",
        ),
        pytest.param(
            [helper.make_node("Pad", ["noisy", "computed"], ["denoised"], "frame")],
            "'frame' (Pad): the file does not say where it begins",
            id="computed padding",
        ),
        pytest.param(
            [helper.make_node("Pad", ["noisy", "last"], ["denoised"], "frame", mode="wrap")],
            "'frame' (Pad): mode wrap",
            id="the other side",
        ),
        pytest.param([helper.make_node("Softmax", ["noisy"], ["denoised"], "mix")], "'mix' (Softmax)", id="unknown"),
        pytest.param(
            [helper.make_node("Relu", ["noisy"], ["denoised"], "mine", domain="mine")], "'mine' (Relu)", id="another's"
        ),
        pytest.param(
            [
                helper.make_node("SpaceToDepth", ["noisy"], ["small"], "shrink", blocksize=2),
                helper.make_node("Add", ["small", "noisy"], ["denoised"], "mix"),
            ],
            "'mix' (Add)",
            id="two resolutions",
        ),
        pytest.param(
            [
                helper.make_node(
                    "Conv", ["noisy", "w"], ["denoised"], "auto", auto_pad="SAME_UPPER", kernel_shape=[3, 3]
                )
            ],
            "auto_pad",
            id="automatic padding",
        ),
    ],
)
def test_a_halo_that_is_not_known_is_not_guessed(nodes, said):
    weights = {"scales": np.ones(4, np.float32), "w": np.ones((1, 1, 3, 3), np.float32)}
    weights |= {"last": np.array([-8]), "ends": np.array([2**40]), "axes": np.array([2])}
    with pytest.raises(UnsupportedError) as error:
        receptive_field.receptive_field(graph(nodes, weights=weights))
    assert said in str(error.value)


def test_the_first_and_last_convolutions_are_found_by_the_graph(tmp_path):
    model = exported(models.create("nano"), tmp_path)
    names = [n.name for n in model.graph.node if n.op_type == "Conv"]
    assert walk.first_convolutions(model, "noisy") == (names[0],)
    assert walk.last_convolutions(model, "denoised") == (names[-1],)


def test_a_not_finite_output_agrees_with_nothing():
    ones = np.ones((1, 1, 2, 2), np.float32)
    assert not reference.relative_change(ones * np.nan, ones) <= 1.0
    assert not reference.agreement_db(ones * np.nan, ones) >= 0.0
    assert not reference.relative_change(ones[:, :, :1], ones) <= 1.0
    assert reference.agreement_db(ones * 1.1, ones) == pytest.approx(20.0, abs=1e-4)
