"""Residual trunks in another basis: the same function, fewer dB lost in INT8."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import pytest
import tiny
import torch
from onnx import numpy_helper

from edgekit import models
from edgekit.compress import basis, export, quantize
from edgekit.compress.basis import other_bases, trunks
from edgekit.compress.export import export_onnx
from edgekit.compress.placement import PLACEMENTS
from edgekit.compress.simplify import simplify
from edgekit.graph import checks, walk
from edgekit.graph.reference import Reference, probe, relative_change
from edgekit.pipeline import networks
from edgekit.recipe import Quantization

SIGMA = 25 / 255
PICTURES = [(probe(48, 64, 1, seed=i), SIGMA) for i in range(8)]
SETTINGS = Quantization(calibration_pictures=8)


def exported(net, folder):
    planes = getattr(net, "channels", 1)
    path = export_onnx(
        net.eval(), channels=planes, takes_sigma=net.takes_sigma, stride=net.stride, out=folder / "a.onnx"
    )
    return simplify(path, folder / "simple.onnx")


@pytest.fixture(scope="module")
def nano(tmp_path_factory):
    return exported(networks.shipped("nano").net, tmp_path_factory.mktemp("nano"))


def moved(model: onnx.ModelProto, changed: onnx.ModelProto, channels: int = 1) -> float:
    """Return by how much the output of a picture that nothing was learned from differs."""
    noisy = probe(64, 48, channels, seed=30)
    return relative_change(Reference(changed)(noisy, 40 / 255), Reference(model)(noisy, 40 / 255))


def descents(steps: int) -> tuple[basis.Descent, ...]:
    return tuple(dataclasses.replace(descent, steps=steps) for descent in basis.DESCENTS)


def weights(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {name: numpy_helper.to_array(tensor) for name, tensor in walk.initializers(model).items()}


def test_a_student_has_one_trunk_for_each_level(nano):
    found = trunks(checks.load_onnx(nano))
    assert sorted(trunk.channels for trunk in found) == [16, 32, 48]
    top = next(trunk for trunk in found if trunk.channels == 16)
    # What becomes the top level's planes when it is moved has four for each channel.
    assert sorted(set(top.planes.values())) == [1, 4]
    assert {"/level/Add_output_0", "/level/Mul_output_0", "/Add_1_output_0"} <= top.planes.keys()
    # What passes a ReLU is in none, nor is the picture or what is taken from it.
    assert not any("act" in name or "expand" in name or "tail" in name for trunk in found for name in trunk.planes)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("nano", {}),
        ("nano", {"channels": 3}),
        ("nano", {"noise_level": False}),
        ("base", {"activation": "hardswish", "se": True}),
        ("small", {"batchnorm": True}),
        ("control", {}),
        ("dncnn", {}),
    ],
    ids=["nano", "colour", "blind", "h-swish and SE", "BatchNorm", "plain", "dncnn"],
)
def test_the_function_stays_the_same(name, options, tmp_path, monkeypatch):
    monkeypatch.setattr(basis, "DESCENTS", descents(20))
    torch.manual_seed(0)
    net = models.create(name, options)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model = checks.load_onnx(exported(net, tmp_path))
    pictures = [(probe(48, 64, net.channels, seed=i), SIGMA) for i in range(2)]
    before = model.SerializeToString(deterministic=True)
    others = other_bases(model, pictures)
    assert model.SerializeToString(deterministic=True) == before
    assert len(others) == (2 if trunks(model) else 0)
    for changed in others:
        assert moved(model, changed, net.channels) < 1e-4
        assert any(not np.array_equal(a, weights(changed)[n]) for n, a in weights(model).items())


def test_a_unet_whose_maps_all_pass_a_relu_stays_as_it_is(tmp_path):
    model = checks.load_onnx(exported(tiny.unet(), tmp_path))
    assert other_bases(model, PICTURES) == ()


def test_a_trunk_that_something_else_reads_keeps_its_basis(nano):
    model = checks.load_onnx(nano)
    addition = next(n for n in model.graph.node if n.name == "/encoder.1/encoder.1.0/Add")
    model.graph.node.append(onnx.helper.make_node("Sigmoid", [addition.output[0]], ["gate"], "gate"))
    assert sorted(trunk.channels for trunk in trunks(model)) == [16, 48]


def test_a_graph_that_cannot_be_followed_stays_as_it_is_and_says_so(nano, caplog):
    model = checks.load_onnx(nano)
    relu = next(n for n in model.graph.node if n.op_type == "Relu")
    relu.op_type = "Softsign"
    with caplog.at_level("INFO", logger="edgekit"):
        assert other_bases(model, PICTURES) == ()
    assert "residual trunks keep their basis: node" in caplog.text
    assert "Softsign" in caplog.text


def test_a_graph_whose_operators_are_followed_with_other_settings_only_stays_as_it_is(tmp_path, caplog):
    class Aligned(torch.nn.Module):
        channels, takes_sigma, stride = 1, False, 8

        def __init__(self) -> None:
            super().__init__()
            self.head, self.coarse = torch.nn.Conv2d(1, 8, 3, padding=1), torch.nn.Conv2d(1, 8, 2, 2)
            self.tail = torch.nn.Conv2d(8, 1, 3, padding=1)

        def forward(self, noisy):
            coarse = self.coarse(noisy)
            large = torch.nn.functional.interpolate(coarse, scale_factor=2, mode="bilinear", align_corners=True)
            return noisy - self.tail(self.head(noisy) + large)

    model = checks.load_onnx(exported(Aligned(), tmp_path))
    assert trunks(model)
    with caplog.at_level("INFO", logger="edgekit"):
        assert other_bases(model, PICTURES) == ()
    assert "residual trunks keep their basis: node" in caplog.text


def test_a_trunk_that_an_embedding_of_the_noise_level_is_added_to_gets_another_basis(tmp_path, monkeypatch):
    class Embedded(torch.nn.Module):
        channels, takes_sigma, stride = 1, True, 8

        def __init__(self) -> None:
            super().__init__()
            self.head, self.level = torch.nn.Conv2d(1, 8, 3, padding=1), torch.nn.Conv2d(1, 8, 1)
            self.tail = torch.nn.Conv2d(8, 1, 3, padding=1)

        def forward(self, noisy, sigma):
            return noisy - self.tail(self.head(noisy) + self.level(sigma))

    monkeypatch.setattr(basis, "DESCENTS", descents(5))
    torch.manual_seed(0)
    model = checks.load_onnx(exported(Embedded(), tmp_path))
    (changed, _) = other_bases(model, PICTURES)
    assert moved(model, changed) < 1e-4


def test_a_graph_with_constants_among_its_nodes_gets_another_basis(nano, monkeypatch):
    monkeypatch.setattr(basis, "DESCENTS", descents(1))
    model = checks.load_onnx(nano)
    half = numpy_helper.from_array(np.float32(0.5))
    model.graph.node.insert(0, onnx.helper.make_node("Constant", [], ["half"], "half", value=half))
    assert len(other_bases(model, PICTURES[:1])) == len(basis.DESCENTS)


def test_equal_inputs_give_equal_bytes(nano, monkeypatch):
    monkeypatch.setattr(basis, "DESCENTS", descents(10))
    model = checks.load_onnx(nano)

    def written() -> list[bytes]:
        return [m.SerializeToString(deterministic=True) for m in other_bases(model, PICTURES)]

    one, remembered = written(), written()
    monkeypatch.setattr(basis, "_LEARNED", {})
    other = written()
    assert one == remembered == other
    assert one[0] != one[1]


def test_what_was_learned_is_not_learned_again(nano, monkeypatch):
    monkeypatch.setattr(basis, "DESCENTS", descents(1))
    monkeypatch.setattr(basis, "_LEARNED", {})
    learn, asked = basis._learned, []
    monkeypatch.setattr(basis, "_learned", lambda *given: asked.append(given) or learn(*given))
    model, other = checks.load_onnx(nano), checks.load_onnx(nano)
    other.graph.initializer[0].CopyFrom(
        numpy_helper.from_array(2 * numpy_helper.to_array(other.graph.initializer[0]), other.graph.initializer[0].name)
    )
    brighter = [(PICTURES[0][0] + np.float32(0.1), SIGMA)]
    others = [
        (model, PICTURES),
        (other, PICTURES),
        (model, PICTURES[:1]),
        (model, brighter),
        (model, [(brighter[0][0], 2 * SIGMA)]),
    ]
    for given in others:
        first, again = other_bases(*given), other_bases(*given)
        assert [m.SerializeToString(deterministic=True) for m in first] == [
            m.SerializeToString(deterministic=True) for m in again
        ]
    assert len(asked) == len(others)
    monkeypatch.setattr(basis, "DESCENTS", descents(2))
    other_bases(model, PICTURES)
    assert len(asked) == len(others) + 1


def test_a_channel_of_zeros_does_no_harm(tmp_path, monkeypatch):
    monkeypatch.setattr(basis, "DESCENTS", descents(20))
    net = networks.shipped("nano").net
    with torch.no_grad():
        for part in (net.head[0], net.up[1][0], *(b.project[0] for s in (net.encoder[0], net.decoder[1]) for b in s)):
            part.weight[:1] = 0
            part.bias[:1] = 0
        net.up[1][0].weight[:4] = 0
        net.up[1][0].bias[:4] = 0
        net.level.weight[:, 0] = 0
    model = checks.load_onnx(exported(net, tmp_path))
    others = other_bases(model, PICTURES)
    assert len(others) == len(basis.DESCENTS)
    for changed in others:
        assert all(np.isfinite(values).all() for values in weights(changed).values())
        assert moved(model, changed) < 1e-4


def test_a_basis_that_changes_the_function_is_not_taken(nano, monkeypatch, caplog):
    monkeypatch.setattr(basis, "DESCENTS", descents(1))
    monkeypatch.setattr(basis, "MOST_CHANGE", 1e-12)
    model = checks.load_onnx(nano)
    with caplog.at_level("INFO", logger="edgekit"):
        assert other_bases(model, PICTURES) == ()
    assert "a basis of residual trunks moved the output by" in caplog.text


@pytest.mark.parametrize("where", ["onnxruntime", "openvino"])
def test_the_basis_that_agrees_best_in_int8_is_taken(nano, tmp_path, where):
    def agreement(fp32, change):
        settings = dataclasses.replace(SETTINGS, equalize=False, change_basis=change)
        placement = PLACEMENTS[where]
        return quantize.quantize_static(
            fp32, PICTURES, tmp_path / "int8.onnx", settings, placement=placement
        ).agreement_millidb

    others = [tmp_path / "first.onnx", tmp_path / "second.onnx"]
    for model, path in zip(other_bases(checks.load_onnx(nano), PICTURES), others, strict=True):
        export.write(model, path)
    alone = [agreement(path, change=False) for path in (nano, *others)]
    # Against the graph as it was, not the one in the other basis: the two differ by roundings of float.
    assert agreement(nano, change=True) == pytest.approx(max(alone), abs=20)
    assert len(set(alone)) == 3


@pytest.mark.parametrize("where", ["onnxruntime", "openvino"])
def test_it_brings_int8_closer_to_the_float_graph(nano, tmp_path, where):
    agreements = [
        quantize.quantize_static(
            nano,
            PICTURES,
            tmp_path / "int8.onnx",
            dataclasses.replace(SETTINGS, change_basis=change),
            placement=PLACEMENTS[where],
        ).agreement_millidb
        for change in (False, True)
    ]
    assert agreements[1] > agreements[0] + 1000


def test_a_trunk_of_16_bits_keeps_its_basis(nano):
    plain, changed = (
        quantize.prepare(nano, PICTURES, dataclasses.replace(SETTINGS, change_basis=change), PLACEMENTS["arm"])
        for change in (False, True)
    )
    assert plain.model == changed.model
