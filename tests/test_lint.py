"""`edgekit lint`: what it finds, on the networks it is about."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn
from torch.nn import functional

from edgekit import target
from edgekit.cli import cli
from edgekit.errors import InputError
from edgekit.graph import lint as rules
from edgekit.models.mobile import MobileUnet
from edgekit.pipeline import lint


def found(what: str, **options: bool | int | str) -> dict[str, rules.Finding]:
    return {finding.rule: finding for finding in lint.lint(what, options=options)}


class Small(MobileUnet):
    """A student of 16 channels, to be spoiled in one way each."""

    def __init__(self, widths: tuple[int, int, int] = (16, 16, 16)) -> None:
        super().__init__(widths=widths, encoder=(1, 1, 1), decoder=(1, 1), expansion=2)


class Odd(Small):
    def __init__(self) -> None:
        super().__init__((20, 16, 16))


class Transposed(Small):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.ConvTranspose2d(16, 16, 2, stride=2) for _ in range(2))


class _Resized(Small):
    mode = ""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Upsample(scale_factor=2, mode=self.mode) for _ in range(2))


class Nearest(_Resized):
    mode = "nearest"


class Bilinear(_Resized):
    mode = "bilinear"


class Bicubic(_Resized):
    mode = "bicubic"


class Leaky(Small):
    def __init__(self) -> None:
        super().__init__()
        self.encoder[0][0].act1 = nn.LeakyReLU()


class FullSize(nn.Module):
    """Convolutions at the picture's own resolution."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 1, 3, padding=1))

    def forward(self, noisy: Tensor) -> Tensor:
        return noisy - self.body(noisy)


@pytest.mark.parametrize("name", ["nano", "small", "base", "control"])
def test_what_we_ship_for_integers_has_nothing_to_find(name):
    assert lint.lint(name) == []


@pytest.mark.parametrize(
    ("what", "rule"),
    [
        ("Odd", "channels"),
        ("Transposed", "transposed_convolution"),
        ("Bicubic", "resize_cubic"),
        ("Leaky", "leaky_activation"),
        ("FullSize", "full_resolution"),
    ],
)
def test_each_rule_finds_its_own_and_nothing_else(what, rule):
    finding = found(f"test_lint:{what}")
    assert list(finding) == [rule]
    assert finding[rule].where


@pytest.mark.parametrize(
    ("mix", "kind"),
    [
        (lambda x: x / x.pow(2).sum((2, 3), keepdim=True).sqrt(), "ReduceSum"),
        (lambda x: functional.normalize(x, dim=-1), "ReduceL2"),
        (lambda x: x - x.amin((2, 3), keepdim=True), "ReduceMin"),
        (lambda x: x + (x.flatten(2) @ x.flatten(2).transpose(1, 2))[..., None].mean(2, keepdim=True), "MatMul"),
    ],
    ids=["sum", "norm", "least", "attention between channels"],
)
def test_what_looks_at_the_whole_picture_is_named(tmp_path, mix, kind):
    class Mixed(FullSize):
        def forward(self, noisy: Tensor) -> Tensor:
            return noisy - self.body[2](mix(self.body[0](noisy)))

    path = tmp_path / "mixed.onnx"
    sides = {name: {2: "height", 3: "width"} for name in ("noisy", "denoised")}
    torch.onnx.export(
        Mixed(),
        (torch.rand(1, 1, 64, 96),),
        path,
        dynamo=False,
        input_names=["noisy"],
        output_names=["denoised"],
        dynamic_axes=sides,
    )
    (finding,) = (f for f in lint.lint(str(path)) if f.rule == "global_operator")
    assert kind in finding.what


@pytest.mark.parametrize(("what", "mode"), [("Nearest", "resize_nearest"), ("Bilinear", "resize_linear")])
def test_what_was_measured_to_cost_nothing_is_not_found(what, mode):
    engines = json.loads(rules.COSTS.read_text())["figures"][mode]["engines"]
    assert all(row[kind] < 1.05 for row in engines.values() for kind in ("fp32", "int8"))
    assert found(f"test_lint:{what}") == {}


def test_the_nodes_and_sizes_of_a_literal_mobilenet_v3_are_named():
    finding = found("base", activation="hardswish", se=True)
    assert set(finding) == {"smooth_activation", "squeeze_excite", "global_operator"}
    assert "20 element-wise HardSwish, up to 64x64" in finding["smooth_activation"].what
    assert len(finding["squeeze_excite"].where) == 4
    assert "32x32" in finding["squeeze_excite"].what


def test_every_finding_of_a_shipped_option_or_rule_was_measured():
    measured = json.loads(rules.COSTS.read_text())["figures"]
    assert set(measured) >= {
        *("smooth_activation", "squeeze_excite", "channels", "transposed_convolution", "leaky_activation"),
        *("resize_cubic", "full_resolution"),
    }
    cost = found("base", activation="hardswish")["smooth_activation"].cost
    for engine, row in measured["smooth_activation"]["engines"].items():
        assert f"{engine} FP32 x{row['fp32']:.2f}, INT8 x{row['int8']:.2f}" in cost


def test_a_float_target_does_not_mind_what_only_integers_mind():
    options = {"activation": "hardswish", "se": True}
    kept = lint.lint("base", target.load("ios-arm64"), options=options)
    assert [finding.rule for finding in kept] == ["global_operator"]
    assert len(lint.lint("base", target.load("onnx"), options=options)) == 3


def test_an_option_changes_a_variant_too():
    assert "smooth_activation" in found("base-color", activation="hardswish")


def test_the_command_tells_and_ends_well():
    ran = CliRunner().invoke(cli, ["lint", "base", "--option", "activation=hardswish", "--json"])
    assert ran.exit_code == 0, ran.output
    assert "smooth_activation" in ran.stdout
    ran = CliRunner().invoke(cli, ["lint", "nano", "-t", "onnx"])
    assert ran.stdout == "nano: nothing found that would hurt on onnx\n"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["lint", "bsae"], "did you mean 'base'"),
        (["lint", "base", "--option", "activatoin=relu"], "did you mean 'activation'"),
        (["lint", "base", "--option", "activation"], "--option activation: expected NAME=VALUE"),
        (["lint", "base", "--option", "se=[1]"], "expected true, false, a whole number or text"),
        (["lint", "nowhere.onnx"], "nowhere.onnx: "),
        (["lint", "test_lint:Nothing"], "no attribute 'Nothing'"),
    ],
)
def test_what_cannot_be_looked_at_is_told(arguments, told):
    ran = CliRunner().invoke(cli, arguments)
    assert isinstance(ran.exception, InputError)
    assert told in str(ran.exception)


def test_a_graph_that_is_quantized_already_is_refused(tmp_path):
    import onnx
    from onnx import TensorProto, helper

    shape = [1, 1, "h", "w"]
    picture = helper.make_tensor_value_info("noisy", TensorProto.FLOAT, shape)
    result = helper.make_tensor_value_info("denoised", TensorProto.FLOAT, shape)
    nodes = [
        helper.make_node("QuantizeLinear", ["noisy", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["denoised"]),
    ]
    values = [helper.make_tensor("scale", TensorProto.FLOAT, [], [0.1]), helper.make_tensor("zero", 2, [], [0])]
    graph = helper.make_graph(nodes, "g", [picture], [result], values)
    path = tmp_path / "q.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), path)
    with pytest.raises(InputError, match="is quantized already"):
        lint.lint(str(path))


def test_a_class_needs_no_weights():
    torch.manual_seed(0)
    assert lint.lint("test_lint:Small") == []
