"""Networks as others write and export them: FFDNet, DRUNet and NAFNet as published, norms, shuffles by hand."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import tiny
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

from edgekit import backends, target
from edgekit.backends import Source, openvino_graph
from edgekit.backends.tvm.transposed import without_transposed
from edgekit.compress import quantize
from edgekit.compress.placement import PLACEMENTS, place, release
from edgekit.compress.quantize import Prepared
from edgekit.compress.simplify import simplify
from edgekit.compress.torch_graph import TorchGraph
from edgekit.errors import InputError, IntegrityError, UnsupportedError
from edgekit.files import sha256
from edgekit.graph import checks, cost, walk
from edgekit.graph import lint as rules
from edgekit.graph.checks import DENOISED, NOISY, SIGMA
from edgekit.graph.receptive_field import receptive_field
from edgekit.graph.reference import Reference, agreement_db, probe, relative_change
from edgekit.models import weights
from edgekit.pipeline import compile as compiling
from edgekit.pipeline import denoise as denoising
from edgekit.pipeline import int8, networks
from edgekit.recipe import Quantization

LEVEL = 25 / 255
SETTINGS = Quantization(calibration_pictures=8, change_basis=False)


def conv(inputs: int, outputs: int, *, bias: bool = True, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias, groups=groups)


class FfdNet(nn.Module):
    """As published (github.com/cszn/KAIR): pads to even sides, and crops."""

    channels, stride, takes_sigma = 1, 8, True

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.PixelUnshuffle(2), nn.PixelShuffle(2)
        self.model = nn.Sequential(conv(5, 16), nn.ReLU(), conv(16, 16), nn.ReLU(), conv(16, 4))

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        h, w = x.size()[-2:]
        below, right = int(np.ceil(h / 2) * 2 - h), int(np.ceil(w / 2) * 2 - w)
        x = self.down(nn.ReplicationPad2d((0, right, 0, below))(x))
        x = torch.cat((x, sigma.repeat(1, 1, x.size()[-2], x.size()[-1])), 1)
        return self.up(self.model(x))[..., :h, :w]


class ByHand(nn.Module):
    """FFDNet in colour, with its shuffles as Reshapes and Transposes."""

    channels, stride, takes_sigma = 3, 8, True

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(conv(15, 16), nn.ReLU(), conv(16, 12))

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        n, c, h, w = x.shape
        spread = x.reshape(n, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(n, c * 4, h // 2, w // 2)
        y = self.model(torch.cat([spread, sigma.expand(n, 3, h // 2, w // 2)], 1))
        return x - y.reshape(n, c, 2, 2, h // 2, w // 2).permute(0, 1, 4, 2, 5, 3).reshape(n, c, h, w)


class DruNet(nn.Module):
    """A level of DRUNet: no biases, a noise-level map, a transposed convolution."""

    channels, stride, takes_sigma = 1, 8, True

    def __init__(self) -> None:
        super().__init__()
        self.head, self.down = conv(2, 16, bias=False), nn.Conv2d(16, 24, 2, 2, bias=False)
        self.one, self.two = conv(24, 24, bias=False), conv(24, 24, bias=False)
        self.up, self.tail = nn.ConvTranspose2d(24, 16, 2, 2, bias=False), conv(16, 1, bias=False)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        x = self.head(torch.cat([x, sigma.expand(-1, -1, x.shape[2], x.shape[3])], 1))
        y = self.down(x)
        return self.tail(self.up(y + self.two(F.relu(self.one(y)))) + x)


class LayerNorm2d(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        y = (x - mean) / ((x - mean).pow(2).mean(1, keepdim=True) + 1e-6).sqrt()
        return self.weight.view(1, -1, 1, 1) * y + self.bias.view(1, -1, 1, 1)


class NafNet(nn.Module):
    """A block of NAFNet: pads to a multiple, norms over channels, gates by halves, and crops."""

    channels, stride, takes_sigma = 1, 8, False

    def __init__(self) -> None:
        super().__init__()
        self.intro, self.ending, self.norm = conv(1, 16), conv(16, 1), LayerNorm2d(16)
        self.wide, self.deep, self.narrow = nn.Conv2d(16, 32, 1), conv(32, 32, groups=32), nn.Conv2d(16, 16, 1)
        self.beta = nn.Parameter(torch.full((1, 16, 1, 1), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        padded = F.pad(x, (0, (16 - width % 16) % 16, 0, (16 - height % 16) % 16))
        y = self.intro(padded)
        one, other = self.deep(self.wide(self.norm(y))).chunk(2, 1)
        return (self.ending(y + self.narrow(one * other) * self.beta) + padded)[:, :, :height, :width]


class Body(nn.Module):
    """A picture and what is subtracted from it."""

    channels, stride, takes_sigma = 1, 8, False

    def __init__(self, *body: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)

    def forward(self, x: Tensor) -> Tensor:
        return x - self.body(x)


class Added(Body):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Clipped(Body):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(0, 1)


class Embedded(nn.Module):
    """The noise level by two convolutions of one pixel."""

    channels, stride, takes_sigma = 1, 8, True

    def __init__(self) -> None:
        super().__init__()
        self.head, self.tail = conv(1, 16), conv(16, 1)
        self.embed = nn.Sequential(nn.Conv2d(1, 8, 1), nn.ReLU(), nn.Conv2d(8, 16, 1))

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        return x - self.tail(F.relu(self.head(x) + self.embed(sigma)))


class WithoutBias(nn.Module):
    """Convolutions without biases, whose results several nodes read, one of them in float."""

    channels, stride, takes_sigma = 1, 8, False

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.head, self.tail = conv(1, 16, bias=False), conv(16, 1, bias=False)
        self.one, self.two, self.norm = conv(16, 16, bias=False), conv(16, 16, bias=False), LayerNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(x)
        if self.kind == "norm":
            y = y + self.two(F.relu(self.one(self.norm(y))))
        elif self.kind == "scaled":
            y = y * 0.5 + self.two(F.relu(self.one(y)))
        else:
            z = self.one(F.relu(y))
            y = y + z * torch.sigmoid(self.two(F.adaptive_avg_pool2d(z, 1)))
        return x - self.tail(y)


def seeded(net: nn.Module) -> nn.Module:
    """Give a network small random weights that do not depend on what was made before it."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
            if parameter.ndim == 4 and parameter.numel() > 16:
                fan = parameter[0].numel() if parameter.shape[0] > 1 else parameter.numel()
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.7 / fan**0.5))
    return net.eval()


def as_others_export(net: nn.Module, path: Path, *, opset: int = 17) -> Path:
    """Return `path`, now the network as torch's exporter writes it by itself."""
    noisy = torch.from_numpy(probe(64, 96, net.channels, seed=0))
    given = (noisy, torch.full((1, 1, 1, 1), LEVEL)) if net.takes_sigma else (noisy,)
    sides = {2: "height", 3: "width"}
    torch.onnx.export(
        net,
        given,
        path,
        dynamo=False,
        opset_version=opset,
        input_names=[NOISY, SIGMA][: len(given)],
        output_names=[DENOISED],
        dynamic_axes={NOISY: sides, DENOISED: sides},
    )
    return path


def simplified(net: nn.Module, folder: Path) -> Path:
    return simplify(as_others_export(seeded(net), folder / "net.onnx"), folder / "simple.onnx")


def prepared(fp32: Path, engine: str, channels: int = 1) -> Prepared:
    pictures = [(probe(48, 64, channels, seed=i), LEVEL) for i in range(8)]
    return quantize.prepare(fp32, pictures, SETTINGS, PLACEMENTS[engine])


def placed(made: Prepared, engine: str) -> onnx.ModelProto:
    return place(made.model, made.ranges, PLACEMENTS[engine], weight_limit=made.weight_limit)


def for_openvino(make: Callable[[], nn.Module], folder: Path) -> tuple[Source, onnx.ModelProto]:
    """Return what OpenVINO compiles of a gray, blind network in INT8, and its graph."""
    fp32 = simplified(make(), folder)
    made = prepared(fp32, "openvino")
    graph = placed(made, "openvino")
    (folder / "int8.onnx").write_bytes(graph.SerializeToString())
    source = Source(
        name="net",
        fp32_onnx=fp32,
        int8_onnx=folder / "int8.onnx",
        module=make,
        takes_sigma=False,
        channels=1,
        stride=8,
        calibration=list(made.pictures),
    )
    return source, graph


PUBLISHED = {"ffdnet": FfdNet, "by hand": ByHand, "drunet": DruNet, "nafnet": NafNet}


@pytest.mark.parametrize("way", ["file", "class"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_networks_become_int8(tmp_path, name, way):
    net = seeded(PUBLISHED[name]())
    if way == "file":
        fp32 = simplify(as_others_export(net, tmp_path / "net.onnx"), tmp_path / "simple.onnx")
    else:
        foreign = networks.Foreign(net, channels=net.channels, stride=net.stride, takes_sigma=net.takes_sigma)
        fp32 = compiling.float_graph(foreign, tmp_path)
    model = checks.load_onnx(fp32)
    noisy = probe(72, 56, net.channels, seed=9)
    with torch.no_grad():
        want = net(*[torch.from_numpy(noisy), torch.full((1, 1, 1, 1), LEVEL)][: 1 + net.takes_sigma]).numpy()
    assert relative_change(Reference(model)(noisy, LEVEL), want) < 1e-4
    assert (cost.stride(model, fp32), cost.cost(model, 256, 256).macs > 10**7) == (8, True)
    rules.lint(model)
    for engine in ("onnxruntime", "openvino"):
        made = prepared(fp32, engine, net.channels)
        graph = placed(made, engine)
        assert agreement_db(Reference(graph, exact=True)(noisy, LEVEL), want) > 35
        whole = [n.name for n in graph.graph.node if n.op_type in ("Conv", "Add")]
        free = release(graph, whole, PLACEMENTS[engine], made.model)
        # What was rounded between the parts of a concatenation stays so.
        assert agreement_db(Reference(free, exact=True)(noisy, LEVEL), want) > (
            80 if name in ("drunet", "nafnet") else 55
        )


@pytest.mark.parametrize("name", ["by hand", "drunet"])
def test_those_with_maps_of_the_noise_level_are_integer_networks_for_phones(tmp_path, name):
    pytest.importorskip("tvm")
    from edgekit.backends.tvm import integer, qdq, reference

    net = seeded(PUBLISHED[name]())
    graph = placed(prepared(simplified(net, tmp_path), "arm", net.channels), "arm")
    onnx.save(graph, tmp_path / "int8.onnx")
    network = qdq.read(tmp_path / "int8.onnx", channels=net.channels, height=72, width=56)
    maps = [operator for operator in network.operators if isinstance(operator, integer.Quantize)]
    assert [operator.places.count(None) for operator in maps] == [{"by hand": 3, "drunet": 1}[name]]
    noisy = probe(72, 56, net.channels, seed=9)
    for level in (5 / 255, LEVEL, 50 / 255):
        with torch.no_grad():
            want = net(torch.from_numpy(noisy), torch.full((1, 1, 1, 1), level)).numpy()
        got = reference.run(network, noisy, level)
        assert agreement_db(got, want) > 40
        assert agreement_db(got, Reference(graph, exact=True)(noisy, level)) > 50


@pytest.mark.parametrize("name", PUBLISHED)
def test_training_with_the_rounding_follows_them(tmp_path, name):
    """Files are written for one picture, and trained on several with a noise level each."""
    net = PUBLISHED[name]()
    graph = placed(prepared(simplified(net, tmp_path), "openvino", net.channels), "openvino")
    noisy = np.concatenate([probe(48, 64, net.channels, seed=seed) for seed in range(3)])
    levels = np.array([5, 25, 50], np.float32) / 255
    with torch.no_grad():
        got = TorchGraph(graph)(torch.from_numpy(noisy), torch.from_numpy(levels).reshape(3, 1, 1, 1)).numpy()
    run = Reference(graph, exact=True)
    want = np.concatenate([run(noisy[i : i + 1], float(level)) for i, level in enumerate(levels)])
    assert agreement_db(got, want) > 75


@pytest.mark.parametrize(("name", "halo"), [("ffdnet", 7), ("by hand", 5), ("drunet", 7), ("nafnet", 3)])
def test_how_far_they_look_is_known(tmp_path, name, halo):
    """The convolutions of 3x3 at half the size reach two pixels each, and the two pixels of a shuffle one more."""
    field = receptive_field(checks.load_onnx(simplified(PUBLISHED[name](), tmp_path)))
    assert (field.halo_px, field.global_nodes) == (halo, ())


def padding_itself(kind: str, *, step: int) -> onnx.ModelProto:
    """Return a network whose operators find their borders by themselves: down by `step`, up again, and cropped."""
    random = np.random.default_rng(0)
    shapes = {"a": (8, 1, 4, 4), "b": (8, 8, 3, 3), "c": (step * step, 8, 3, 3)}
    stored = {name: (random.standard_normal(shape) / 9).astype(np.float32) for name, shape in shapes.items()}
    stored |= {"from": np.array([0, 0]), "axes": np.array([2, 3])}
    make, size = helper.make_node, [1, 1, "h", "w"]
    nodes = [
        make("Conv", [NOISY, "a"], ["x"], "first", auto_pad=kind, kernel_shape=[4, 4]),
        make("Conv", ["x", "b"], ["y"], "down", auto_pad=kind, kernel_shape=[3, 3], strides=[step, step]),
        make("MaxPool", ["y"], ["z"], "pool", auto_pad=kind, kernel_shape=[2, 2]),
        make("Conv", ["z", "c"], ["small"], "last", auto_pad=kind, kernel_shape=[3, 3]),
        make("DepthToSpace", ["small"], ["large"], "up", blocksize=step, mode="CRD"),
        make("Shape", [NOISY], ["size"], "size", start=2),
        make("Slice", ["large", "from", "size", "axes"], ["noise"], "crop"),
        make("Sub", [NOISY, "noise"], [DENOISED], "sub"),
    ]
    given, got = (helper.make_tensor_value_info(name, TensorProto.FLOAT, size) for name in (NOISY, DENOISED))
    constants = [numpy_helper.from_array(values, name) for name, values in stored.items()]
    graph = helper.make_graph(nodes, "padding itself", [given], [got], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("kind", ["SAME_UPPER", "SAME_LOWER"])
def test_borders_that_operators_find_by_themselves_are_written_down(tmp_path, kind):
    onnx.save(padding_itself(kind, step=2), tmp_path / "net.onnx")
    model = checks.load_onnx(simplify(tmp_path / "net.onnx", tmp_path / "simple.onnx"))
    pads = {node.name: walk.attribute(node, "pads") for node in model.graph.node}
    one, two = ([0, 0, 1, 1], [1, 1, 2, 2]) if kind == "SAME_UPPER" else ([1, 1, 0, 0], [2, 2, 1, 1])
    assert [pads[name] for name in ("first", "down", "pool", "last")] == [two, one, one, [1] * 4]
    assert receptive_field(model).halo_px == 8
    noisy = probe(72, 56, 1, seed=9)
    want = Reference(checks.load_onnx(tmp_path / "net.onnx"))(noisy, LEVEL)
    assert relative_change(Reference(model)(noisy, LEVEL), want) < 1e-5
    with torch.no_grad():
        followed = TorchGraph(model)(torch.from_numpy(noisy), torch.full((1, 1, 1, 1), LEVEL)).numpy()
    assert relative_change(followed, want) < 1e-5


def test_a_border_that_depends_on_the_picture_stays_with_its_operator(tmp_path):
    onnx.save(padding_itself("SAME_UPPER", step=3), tmp_path / "net.onnx")
    model = checks.load_onnx(simplify(tmp_path / "net.onnx", tmp_path / "simple.onnx"))
    automatic = {node.name for node in model.graph.node if walk.attribute(node, "auto_pad") is not None}
    assert automatic == {"down"}


class Factorised(nn.Module):
    """A block of ERFNet: 3x1 behind 1x3, in a trunk whose values have either sign."""

    channels, stride, takes_sigma = 1, 8, False

    def __init__(self) -> None:
        super().__init__()
        self.head, self.tail = conv(1, 16), conv(16, 1)
        self.down = nn.ModuleList(nn.Conv2d(16, 16, (3, 1), padding=(1, 0)) for _ in range(2))
        self.along = nn.ModuleList(nn.Conv2d(16, 16, (1, 3), padding=(0, 1)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(x)
        for down, along in zip(self.down, self.along, strict=True):
            y = y + along(F.relu(down(y)))
        return x - self.tail(y)


def test_openvino_computes_the_borders_of_windows_of_one_column(tmp_path):
    pytest.importorskip("openvino")
    source, graph = for_openvino(Factorised, tmp_path)
    door, wanted = backends.load("openvino"), target.load("linux-x86_64")
    built = door.build(source, wanted, tmp_path / "built")
    ((_, session),) = door.open_session(tmp_path / "built", built, wanted)
    noisy = probe(72, 56, 1, seed=9)
    assert agreement_db(session(noisy, LEVEL), Reference(graph, exact=True)(noisy, LEVEL)) > 50


class Reordered(nn.Module):
    """Channels in an order of its own, which is not its own inverse."""

    channels, stride, takes_sigma = 1, 8, False

    def __init__(self) -> None:
        super().__init__()
        self.head, self.body, self.tail = conv(1, 16), conv(16, 16), conv(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.head(x))[:, [*range(1, 16), 0]]
        return x - self.tail(torch.tanh(self.body(y)))


class Averaged(nn.Module):
    """Pixels in [-1, 1], of which an average is taken that counts the border."""

    channels, stride, takes_sigma = 1, 8, False

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(3, 1, padding=1)
        self.head, self.body, self.tail = conv(1, 16), conv(16, 16), conv(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x - self.tail(F.relu(self.body(F.relu(self.head(self.pool(2 * x - 1))))))


@pytest.mark.parametrize("make", [Reordered, Averaged])
def test_openvino_computes_what_it_would_move_or_fold_wrongly(tmp_path, make):
    pytest.importorskip("openvino")
    source, graph = for_openvino(make, tmp_path)
    door, noisy = backends.load("openvino"), probe(72, 56, 1, seed=9)
    for precision, expected, least_db in (("float32", checks.load_onnx(source.fp32_onnx), 100), ("int8", graph, 60)):
        wanted = dataclasses.replace(target.load("linux-x86_64"), precision=precision)
        built = door.build(source, wanted, tmp_path / precision)
        ((_, session),) = door.open_session(tmp_path / precision, built, wanted)
        assert agreement_db(session(noisy, LEVEL), Reference(expected, exact=True)(noisy, LEVEL)) > least_db


class Milesial(nn.Module):
    """A UNet that takes any size: what is sampled up is padded to the size of what it meets (github.com/milesial)."""

    channels, stride, takes_sigma = 1, 8, False

    def __init__(self) -> None:
        super().__init__()
        self.levels = nn.ModuleList([conv(1, 8), *(conv(8, 8) for _ in range(4))])
        self.up = nn.ModuleList(nn.ConvTranspose2d(8, 8, 2, 2) for _ in range(4))
        self.tail = conv(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        maps = [F.relu(self.levels[0](x))]
        for level in self.levels[1:]:
            maps.append(F.relu(level(F.max_pool2d(maps[-1], 2))))
        y = maps.pop()
        for up in self.up:
            wide, there = up(y), maps.pop()
            down, right = there.size(2) - wide.size(2), there.size(3) - wide.size(3)
            y = there + F.pad(wide, (right // 2, right - right // 2, down // 2, down - down // 2))
        return x - self.tail(y)


def test_pieces_of_a_picture_start_on_the_networks_own_grid(tmp_path, monkeypatch):
    path = as_others_export(seeded(Milesial()), tmp_path / "net.onnx")
    opened = denoising.open_model(path)
    assert (cost.stride(checks.load_onnx(path), path), opened.stride) == (8, 16)
    noisy = probe(312, 328, 1, seed=3)
    whole = opened(noisy, LEVEL)
    monkeypatch.setattr(denoising, "_AT_ONCE", 1)
    monkeypatch.setattr(denoising, "_PIECE", 40)
    assert opened.reach() < 150
    assert relative_change(opened(noisy, LEVEL), whole) < 1e-5


def test_a_class_whose_own_grid_is_coarser_than_its_stride_has_no_halo(tmp_path):
    net = networks.Foreign(seeded(Milesial()), channels=1, stride=8, takes_sigma=False)
    field, why = compiling._receptive_field(checks.load_onnx(compiling.float_graph(net, tmp_path)), 8)
    assert field is None
    assert "grid of 16" in why


class InPlace(Body):
    """Its input is another after it."""

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2).sub_(1)
        return (x - self.body(x) + 1) / 2


class ByKeyword(Body):
    def forward(self, x: Tensor) -> Tensor:
        head, norm, tail = self.body
        return x - tail(norm(input=head(x)))


@pytest.mark.parametrize("kind", [InPlace, ByKeyword])
def test_python_that_is_seldom_written_is_carried_over(tmp_path, kind):
    norm = nn.BatchNorm2d(8)
    nn.init.uniform_(norm.running_mean)
    net = seeded(kind(conv(1, 8), norm, conv(8, 1)))
    fp32 = compiling.float_graph(networks.Foreign(net, channels=1, stride=8, takes_sigma=False), tmp_path)
    noisy = probe(40, 48, 1, seed=3)
    with torch.no_grad():
        want = net(torch.tensor(noisy)).numpy()
    assert relative_change(Reference(checks.load_onnx(fp32))(noisy, LEVEL), want) < 1e-5
    before = noisy.copy()
    networks.as_function(networks.Foreign(net, channels=1, stride=8, takes_sigma=False))(noisy, LEVEL)
    assert np.array_equal(noisy, before)


def test_a_norm_that_was_exported_for_training_is_refused(tmp_path):
    net = seeded(Body(conv(1, 8), nn.BatchNorm2d(8), conv(8, 1)))
    path = as_others_export(net, tmp_path / "net.onnx")
    simplify(path, tmp_path / "simple.onnx")
    noisy, modes = torch.from_numpy(probe(64, 96, 1, seed=0)), torch.onnx.TrainingMode
    torch.onnx.export(
        net.train(),
        (noisy,),
        path,
        dynamo=False,
        training=modes.TRAINING,
        input_names=[NOISY],
        output_names=[DENOISED],
        dynamic_axes={name: {2: "height", 3: "width"} for name in (NOISY, DENOISED)},
    )
    with pytest.raises(UnsupportedError, match=r"BatchNormalization\) was exported for training.*net\.eval\(\)"):
        simplify(path, tmp_path / "simple.onnx")


class ToMultiple(nn.Module):
    """Pads to a multiple, and crops; in between it shows a picture upside down, which takes all of it as well."""

    channels, stride, takes_sigma = 1, 8, False

    def __init__(self, multiple: int, stride: int = 8) -> None:
        super().__init__()
        self.multiple, self.stride = multiple, stride
        self.down, self.up = nn.Conv2d(1, 8, 2, 2), nn.ConvTranspose2d(8, 1, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        padded = F.pad(x, (0, -w % self.multiple, 0, -h % self.multiple), mode="replicate")
        maps = torch.flip(F.relu(self.down(padded)), (2,))
        return (padded - self.up(torch.flip(maps, (2,))))[..., :h, :w]


@pytest.mark.parametrize(
    ("way", "multiple", "stride", "idle"),
    [
        # The stride of a file is the least that it takes.
        *(("file", 4, 8, True), ("file", 16, 8, False)),
        *(("class", 4, 8, True), ("class", 16, 16, True), ("class", 16, 8, False), ("class", 4, 2, False)),
    ],
)
def test_padding_to_a_multiple_is_left_out_where_sides_are_multiples(tmp_path, way, multiple, stride, idle):
    net = seeded(ToMultiple(multiple, stride))
    if way == "file":
        fp32 = simplify(as_others_export(net, tmp_path / "net.onnx"), tmp_path / "simple.onnx")
    else:
        fp32 = compiling.float_graph(networks.Foreign(net, channels=1, stride=stride, takes_sigma=False), tmp_path)
    model = checks.load_onnx(fp32)
    counts = checks.op_counts(model)
    # The two that turn a map upside down stay.
    assert (counts.get("Pad", 0), counts["Slice"]) == ((0, 2) if idle else (1, 4))
    for height, width in ((stride * 5, stride * 3), (stride * 4, stride * 7)):
        noisy = probe(height, width, 1, seed=3)
        with torch.no_grad():
            want = net(torch.from_numpy(noisy)).numpy()
        assert relative_change(Reference(model)(noisy, LEVEL), want) < 1e-5


@pytest.mark.parametrize("name", ["ffdnet", "by hand"])
def test_shuffles_have_their_names(tmp_path, name):
    counts = checks.op_counts(checks.load_onnx(simplified(PUBLISHED[name](), tmp_path)))
    assert (counts["SpaceToDepth"], counts["DepthToSpace"]) == (1, 1)
    assert not {"Reshape", "Transpose", "Squeeze"} & counts.keys()


def test_what_only_looks_like_a_shuffle_stays(tmp_path):
    class Swapped(Body):
        def forward(self, x: Tensor) -> Tensor:
            y = self.body(x)
            n, c, h, w = y.shape
            rows = y.reshape(n, c, h // 2, 2, w // 2, 2).permute(0, 1, 5, 3, 2, 4)
            return x - F.pixel_shuffle(rows.reshape(n, c * 4, h // 2, w // 2), 2)

    model = checks.load_onnx(simplified(Swapped(conv(1, 1)), tmp_path))
    assert checks.op_counts(model)["Transpose"] == 1


@pytest.mark.parametrize("norm", [nn.InstanceNorm2d(16, affine=True), nn.GroupNorm(4, 16)], ids=["instance", "group"])
def test_a_norm_over_the_picture_does_not_hide_what_is_before_it(tmp_path, norm):
    field = receptive_field(checks.load_onnx(simplified(Body(conv(1, 16), norm, nn.ReLU(), conv(16, 1)), tmp_path)))
    assert (field.halo_px, len(field.global_nodes)) == (2, 1)


@pytest.mark.parametrize("kind", ["norm", "scaled", "gated"])
def test_openvino_takes_convolutions_without_a_bias(tmp_path, monkeypatch, kind):
    pytest.importorskip("openvino")
    source, graph = for_openvino(lambda: WithoutBias(kind), tmp_path)
    door, wanted = backends.load("openvino"), target.load("linux-x86_64")
    built = door.build(source, wanted, tmp_path / "built")
    ((_, session),) = door.open_session(tmp_path / "built", built, wanted)
    noisy = probe(72, 56, 1, seed=9)
    assert agreement_db(session(noisy, LEVEL), Reference(graph, exact=True)(noisy, LEVEL)) > 50
    monkeypatch.setattr(openvino_graph, "with_biases", lambda model: model)
    with pytest.raises(IntegrityError, match=r"the artifact is \d+\.\d dB from (its INT8|the float) graph"):
        door.build(source, wanted, tmp_path / "wrong")


def test_a_bias_of_next_to_nothing_changes_nothing(tmp_path):
    graph = placed(prepared(simplified(WithoutBias("scaled"), tmp_path), "openvino"), "openvino")
    changed = openvino_graph.with_biases(graph)
    without = [n.name for n in graph.graph.node if n.op_type == "Conv" and len(n.input) == 2]
    assert [n.name for n in changed.graph.node if n.op_type == "Conv" and len(n.input) == 3] == without
    assert len(without) == 4
    noisy = probe(72, 56, 1, seed=9)
    same = Reference(changed, exact=True)(noisy, LEVEL), Reference(graph, exact=True)(noisy, LEVEL)
    assert np.array_equal(*same)


def test_a_bias_of_zeros_is_replaced_and_another_kept(tmp_path):
    net = Body(conv(1, 16), nn.ReLU(), conv(16, 1))
    seeded(net)
    nn.init.zeros_(net.body[0].bias)
    fp32 = simplify(as_others_export(net, tmp_path / "net.onnx"), tmp_path / "simple.onnx")
    graph = placed(prepared(fp32, "openvino"), "openvino")
    stored = walk.initializers(changed := openvino_graph.with_biases(graph))
    first, last = (numpy_helper.to_array(stored[n.input[2]]) for n in changed.graph.node if n.op_type == "Conv")
    assert (first > 0).all()
    assert (first < 1e-19).all()
    assert np.array_equal(last, net.body[2].bias.detach().numpy())


def named_alike(model: onnx.ModelProto, kind: str, suffixes: tuple[str, ...]) -> onnx.ModelProto:
    """Return the graph with what each node of a kind reads named behind its result, as MXNet exports it."""
    model = walk.copied(model)
    stored, renamed = walk.initializers(model), {}
    for node in (n for n in model.graph.node if n.op_type == kind):
        for name, suffix in zip(node.input[1:], suffixes, strict=False):
            if name in stored:
                renamed[name] = f"{node.output[0]}_{suffix}"
    assert renamed
    for node in model.graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
    for tensor in model.graph.initializer:
        tensor.name = renamed.get(tensor.name, tensor.name)
    return model


def test_what_is_added_to_a_graph_has_a_name_that_nothing_else_has(tmp_path):
    noisy = probe(72, 56, 1, seed=9)
    net = Body(conv(1, 16), nn.ReLU(), nn.Conv2d(16, 16, 2, 2), nn.ConvTranspose2d(16, 1, 2, 2))
    seeded(net)
    nn.init.zeros_(net.body[0].bias)
    fp32 = simplify(as_others_export(net, tmp_path / "net.onnx"), tmp_path / "simple.onnx")
    spread = named_alike(onnx.load(fp32), "ConvTranspose", ("weights", "bias"))
    biased = named_alike(placed(prepared(fp32, "openvino"), "openvino"), "Conv", ("weights", "bias"))
    for graph, change in ((spread, without_transposed), (biased, openvino_graph.with_biases)):
        changed = change(graph)
        onnx.checker.check_model(changed)
        stored = [tensor.name for tensor in changed.graph.initializer]
        assert len(set(stored)) == len(stored) > len(graph.graph.initializer)
        alike = agreement_db(Reference(changed, exact=True)(noisy, LEVEL), Reference(graph, exact=True)(noisy, LEVEL))
        assert alike > 100


def test_a_clip_at_the_end_loses_nothing(tmp_path):
    noisy, pictures = probe(72, 56, 1, seed=9), []
    for kind in (Body, Clipped):
        (folder := tmp_path / kind.__name__).mkdir()
        fp32 = simplified(kind(conv(1, 16), nn.ReLU(), conv(16, 16), nn.ReLU(), conv(16, 1)), folder)
        graph = placed(prepared(fp32, "openvino"), "openvino")
        pictures.append(np.clip(Reference(graph, exact=True)(noisy, LEVEL), 0, 1))
    assert np.array_equal(*pictures)


def test_a_network_that_adds_at_the_end_goes_back_to_float(tmp_path):
    made = prepared(simplified(Added(conv(1, 16), nn.ReLU(), conv(16, 1)), tmp_path), "onnxruntime")
    graph = placed(made, "onnxruntime")
    names = [n.name for n in graph.graph.node if n.op_type == "Conv"]
    free = release(graph, names, PLACEMENTS["onnxruntime"], made.model)
    noisy = probe(72, 56, 1, seed=9)
    assert agreement_db(Reference(free)(noisy, LEVEL), Reference(made.model)(noisy, LEVEL)) > 100


def test_what_embeds_the_noise_level_keeps_its_picture_when_channels_are_equalized(tmp_path):
    fp32 = simplified(Embedded(), tmp_path)
    noisy = probe(72, 56, 1, seed=9)
    equalized = prepared(fp32, "onnxruntime").model
    assert relative_change(Reference(equalized)(noisy, LEVEL), Reference(checks.load_onnx(fp32))(noisy, LEVEL)) < 1e-5


def test_a_cubic_resize_is_not_called_integer(tmp_path):
    up = nn.Upsample(scale_factor=2, mode="bicubic")
    net = Body(nn.Conv2d(1, 16, 3, 2, 1), nn.ReLU(), conv(16, 16), up, conv(16, 16), nn.ReLU(), conv(16, 1))
    made = prepared(simplified(net, tmp_path), "onnxruntime")
    graph = placed(made, "onnxruntime")
    resize = next(n for n in graph.graph.node if n.op_type == "Resize")
    convolutions = {n.name for n in graph.graph.node if n.op_type == "Conv"} - {*walk.float_convolutions(graph)}
    assert walk.producers(graph)[resize.input[0]].op_type != "QuantizeLinear"
    (tmp_path / "int8.onnx").write_bytes(graph.SerializeToString())
    found = backends.load("onnxruntime").audit_file(tmp_path / "int8.onnx")
    assert found.integer_macs_permille == cost.integer_permille(graph, frozenset(convolutions))


@pytest.mark.parametrize(("opset", "operator"), [(9, "Upsample"), (10, "Resize")])
def test_an_upsample_of_an_old_opset_stays_what_it_was(tmp_path, opset, operator):
    up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)
    net = seeded(Body(nn.Conv2d(1, 16, 3, 2, 1), nn.ReLU(), up, conv(16, 1)))
    path = as_others_export(net, tmp_path / "old.onnx", opset=opset)
    assert checks.op_counts(onnx.load(path))[operator] == 1
    model = checks.load_onnx(simplify(path, tmp_path / "simple.onnx"))
    noisy = probe(72, 56, 1, seed=9)
    assert relative_change(Reference(model)(noisy, LEVEL), Reference(onnx.load(path))(noisy, LEVEL)) < 1e-6


@pytest.mark.parametrize("kind", ["SAME_UPPER", "SAME_LOWER"])
@pytest.mark.parametrize("side", [3, 4])
def test_the_crop_of_a_transposed_convolution_is_written_down(tmp_path, kind, side):
    up = nn.ConvTranspose2d(16, 16, 2, 2, bias=False)
    path = as_others_export(seeded(Body(nn.Conv2d(1, 16, 3, 2, 1), nn.ReLU(), up, conv(16, 1))), tmp_path / "net.onnx")
    model = onnx.load(path)
    (node,) = (n for n in model.graph.node if n.op_type == "ConvTranspose")
    window = np.random.default_rng(0).standard_normal((16, 16, side, side)).astype(np.float32) / 16
    walk.initializers(model)[node.input[1]].CopyFrom(numpy_helper.from_array(window, node.input[1]))
    del node.attribute[:]
    given = {"auto_pad": kind, "kernel_shape": [side, side], "strides": [2, 2]}
    node.attribute.extend(helper.make_attribute(name, value) for name, value in given.items())
    onnx.save(model, path)
    simple = checks.load_onnx(simplify(path, tmp_path / "simple.onnx"))
    (made,) = (n for n in simple.graph.node if n.op_type == "ConvTranspose")
    odd = [0, 0, 1, 1] if kind == "SAME_UPPER" else [1, 1, 0, 0]
    assert walk.attribute(made, "pads") == (odd if side == 3 else [1] * 4)
    assert receptive_field(simple).halo_px > 0


def test_a_bias_that_is_named_as_none_is_none(tmp_path):
    path = as_others_export(seeded(Added(conv(1, 16, bias=False), nn.ReLU(), conv(16, 1))), tmp_path / "net.onnx")
    model = onnx.load(path)
    next(n for n in model.graph.node if n.op_type == "Conv").input.append("")
    onnx.save(model, path)
    simple = simplify(path, tmp_path / "simple.onnx")
    pictures = [(probe(48, 64, 1, seed=i), LEVEL) for i in range(8)]
    made = quantize.quantize_static(simple, pictures, tmp_path / "int8.onnx", SETTINGS)
    assert len(made.integer_nodes) == 2


def test_a_shuffle_that_nothing_reads_does_no_harm(tmp_path):
    class Unread(Body):
        channels = 3

        def forward(self, x: Tensor) -> Tensor:
            n, c, h, w = x.shape
            rows = x.reshape(n, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(n, c * 4, h // 2, w // 2)
            return x - self.body(x) + 0 * F.pixel_shuffle(rows, 2)

    model = onnx.load(as_others_export(seeded(Unread(conv(3, 3))), tmp_path / "net.onnx"))
    unread = next(n for n in model.graph.node if n.op_type == "DepthToSpace")
    read = next(n for n in model.graph.node if unread.output[0] in n.input)
    read.input[list(read.input).index(unread.output[0])] = NOISY
    model.graph.node.remove(unread)
    onnx.save(model, tmp_path / "unread.onnx")
    simplify(tmp_path / "unread.onnx", tmp_path / "simple.onnx")


def test_a_network_in_float16_is_refused_by_name(tmp_path):
    half = [numpy_helper.from_array(np.ones((1, 1, 1, 1), np.float16), "w")]
    nodes = [
        helper.make_node("Cast", [NOISY], ["half"], "down", to=TensorProto.FLOAT16),
        helper.make_node("Conv", ["half", "w"], ["halves"], "same"),
        helper.make_node("Cast", ["halves"], [DENOISED], "up", to=TensorProto.FLOAT),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 1, "h", "w"]) for name in (NOISY, DENOISED)]
    model = helper.make_model(
        helper.make_graph(nodes, "half", ends[:1], ends[1:], half), opset_imports=[helper.make_opsetid("", 17)]
    )
    model.ir_version = 8
    (tmp_path / "half.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(UnsupportedError, match=r"half\.onnx: node 'same' \(Conv\) computes in float16; export"):
        simplify(tmp_path / "half.onnx", tmp_path / "simple.onnx")


def test_a_graph_that_gives_more_planes_than_it_says_is_refused(tmp_path):
    nodes = [helper.make_node("Concat", [NOISY, NOISY], [DENOISED], "twice", axis=1)]
    ends = [
        helper.make_tensor_value_info(NOISY, TensorProto.FLOAT, [1, 1, "h", "w"]),
        helper.make_tensor_value_info(DENOISED, TensorProto.FLOAT, ["n", "c", "h", "w"]),
    ]
    model = helper.make_model(
        helper.make_graph(nodes, "twice", ends[:1], ends[1:]), opset_imports=[helper.make_opsetid("", 17)]
    )
    model.ir_version = 8
    (tmp_path / "twice.onnx").write_bytes(model.SerializeToString())
    with pytest.raises((InputError, UnsupportedError), match=r"channels|must be equal"):
        simplify(tmp_path / "twice.onnx", tmp_path / "simple.onnx")


NORMED = {
    "weight norm": lambda: parametrizations.weight_norm(conv(1, 8)),
    "spectral norm": lambda: parametrizations.spectral_norm(conv(1, 8)),
    "old weight norm": lambda: weight_norm(conv(1, 8)),
    "old spectral norm": lambda: spectral_norm(conv(1, 8)),
}


class Normed(Body):
    kind = ""

    def __init__(self) -> None:
        super().__init__(NORMED[self.kind](), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 1))


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("kind", NORMED)
def test_weights_that_are_computed_from_others_become_plain_ones(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(Normed, "kind", kind)
    torch.manual_seed(0)
    net = Normed()
    net(torch.from_numpy(probe(64, 96, 1, seed=0)))
    weights.save(net.state_dict(), tmp_path / "net.safetensors")
    network = networks.from_class(f"{__name__}:Normed", tmp_path / "net.safetensors")
    noisy = probe(72, 56, 1, seed=9)
    with torch.no_grad():
        want = net.eval()(torch.from_numpy(noisy)).numpy()
    model = checks.load_onnx(compiling.float_graph(network.net, tmp_path))
    assert relative_change(Reference(model)(noisy, LEVEL), want) < 1e-4
    assert set(checks.op_counts(model)) == {"Conv", "Relu", "Sub"}


def test_weights_that_were_trained_elsewhere_are_taken_by_the_lines_of_the_docs(tmp_path, monkeypatch):
    docs = Path(__file__).parents[1] / "docs/training.md"
    (lines,) = re.findall(r"```python\n(.*?)```", docs.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "trained.py").write_text(lines)
    monkeypatch.chdir(tmp_path)
    network = networks.from_class("trained:Net", tiny.write_weights("base", tmp_path / "base.safetensors"))
    assert (network.net.channels, network.net.takes_sigma, network.net.stride) == (1, True, 8)


MY_NET = """
import torch
from torch import nn


class MyNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(2, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 1, 3, padding=1)
        )

    def forward(self, x, level):
        return self.body(torch.cat([x, level], 1))
"""


@pytest.mark.parametrize("blind", [False, True], ids=["told", "blind"])
def test_a_network_of_another_convention_is_taken_by_the_lines_of_the_readme(tmp_path, monkeypatch, call, blind):
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    (lines,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    if blind:
        lines = lines.replace("def forward(self, noisy, sigma)", "def forward(self, noisy)").replace("255 * sigma", "L")
        lines += "\n\nimport torch\n\nL = torch.full((1, 1, 1, 1), 25.0)\n"
    name = f"theirs_{blind}"
    (tmp_path / f"{name}.py").write_text(MY_NET, encoding="utf-8")
    (tmp_path / f"adapter_{blind}.py").write_text(lines.replace("from mynet", f"from {name}"), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    torch.manual_seed(0)
    theirs = importlib.import_module(name).MyNet()
    weights.save(theirs.state_dict(), tmp_path / "mynet.safetensors")
    made = networks.from_class(f"adapter_{blind}:Net", tmp_path / "mynet.safetensors")
    assert (made.net.channels, made.net.stride, made.net.takes_sigma) == (1, 8, not blind)
    noisy = torch.from_numpy(probe(32, 48, 1, seed=0))
    with torch.no_grad():
        want = noisy - theirs.eval()(2 * noisy - 1, torch.full_like(noisy, 25)) / 2
        assert torch.allclose(made.net(noisy, None if blind else torch.full((1, 1, 1, 1), LEVEL)), want, atol=1e-5)
    told = ["teacher=null", "noise.train=[0, 15]", "noise.evaluate=10", "quantization.calibration_pictures=8"]
    told += ["budgets.int8_drop_db=90", "quantization.change_basis=false"]
    settings = [part for setting in told for part in ("--set", setting)]
    done = call(
        "compile", f"adapter_{blind}:Net", "--weights", "mynet.safetensors", "-t", "onnx", "-o", "run", *settings
    )
    assert done.code == 0, done.err
    assert int8.levels(compiling.recipe_of(tmp_path / "run").noise) == (10.0, 15.0)
    card = (tmp_path / "run/bundles/onnx/MODEL_CARD.md").read_text(encoding="utf-8")
    assert "Measured here on white Gaussian noise; what it was trained for, its owner knows.\n" in card
    assert "Removes" not in card


class Mapped(nn.Module):
    """A network that takes a map of the noise level on 0 to 255."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(2, 16), nn.ReLU(), conv(16, 1))

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        return x - self.body(torch.cat([x, level / 255], 1))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_onnx_file_of_another_convention_is_taken_after_the_lines_of_the_docs(tmp_path, monkeypatch, call):
    docs = Path(__file__).parents[1] / "docs/models.md"
    (lines,) = re.findall(r"```python\n(.*?)```", docs.read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    noisy, level = torch.from_numpy(probe(32, 48, 1, seed=0)), torch.full((1, 1, 32, 48), 25.0)
    torch.onnx.export(
        net := Mapped().eval(),
        (noisy, level),
        "theirs.onnx",
        input_names=["input", "level"],
        output_names=["output"],
        dynamic_axes={name: {2: "h", 3: "w"} for name in ("input", "level", "output")},
        dynamo=False,
    )
    call("compile", "theirs.onnx", "--dry-run").refused(2, "rename them when you export, or in the file (docs/models")
    exec(lines, {})
    made = checks.load_float_onnx(tmp_path / "mynet.onnx")
    assert checks.interface(made, tmp_path / "mynet.onnx").takes_sigma
    with torch.no_grad():
        assert relative_change(Reference(made)(noisy.numpy(), LEVEL), net(noisy, level).numpy()) < 1e-5
    told = ["teacher=null", "quantization.calibration_pictures=8", "budgets.int8_drop_db=90"]
    settings = [part for setting in told for part in ("--set", setting)]
    assert call("compile", "mynet.onnx", "-t", "onnx", *settings).code == 0


def test_the_weights_of_a_norm_are_no_channel_gate_and_a_norm_over_channels_no_global_one(tmp_path):
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(16)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    class Mean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x.permute(0, 2, 3, 1)
            return (y - y.mean(-1, keepdim=True)).permute(0, 3, 1, 2)

    for number, norm in enumerate((LayerNorm2d(16), Last(), Mean())):
        (tmp_path / str(number)).mkdir()
        fp32 = simplified(Body(conv(1, 16), norm, conv(16, 1)), tmp_path / str(number))
        found = {finding.rule for finding in rules.lint(checks.load_onnx(fp32))}
        assert not {"squeeze_excite", "global_operator"} & found


def test_lint_and_sensitivity_take_what_compile_takes(tmp_path, call):
    file = as_others_export(seeded(Added(conv(1, 16), nn.ReLU(), conv(16, 1))), tmp_path / "old.onnx", opset=11)
    assert "full_resolution" in call("lint", file, "--json").out
    made = call("sensitivity", file, "--engine", "onnxruntime", "-o", tmp_path / "table")
    assert made.code == 0
    measured = json.loads((tmp_path / "table" / "sensitivity.json").read_text())["measured"]
    assert measured["weights_sha256"] == sha256(file)
    assert measured["host"]["packages"]["onnxruntime"] == onnxruntime.__version__
    assert "sigma 15, 25, 50" in measured["protocol"]


@pytest.mark.backend
def test_what_has_no_integer_kernel_is_refused_before_anything_is_trained(tmp_path, monkeypatch, call):
    pytest.importorskip("tvm")
    monkeypatch.setattr(int8.qat, "finetune", lambda **given: pytest.fail("it is trained"))
    net = Body(conv(1, 16), nn.LeakyReLU(), conv(16, 16), nn.ReLU(), conv(16, 1))
    path = as_others_export(seeded(net), tmp_path / "leaky.onnx")
    made = call("compile", path, "-t", "linux-arm64", "-o", tmp_path / "run", "--set", "budgets.int8_drop_db=0.001")
    assert made.code == 4
    assert "leaky.int8.onnx: LeakyRelu" in made.err


def test_a_shipped_model_without_integer_kernels_is_refused_by_its_own_name(tmp_path, call):
    """Not by that of `base`, whose budget it follows."""
    pytest.importorskip("tvm")
    told = call(
        "compile", "base-v3", "-t", "linux-arm64", "-o", tmp_path / "run", "--set", "quantization.equalize=false"
    )
    assert told.code == 4
    assert "base-v3.int8.onnx: HardSwish" in told.err


class Twofold(Body):
    def __init__(self) -> None:
        super().__init__(conv(1, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x - self.body(x), x


class Halved(Twofold):
    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.body(x), 2)


class Dozen(Twofold):
    stride = 12


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (Twofold, r"gives a tuple for a picture \(1, 1, 64, 64\)"),
        (Halved, r"gives \(1, 1, 32, 32\) for a picture \(1, 1, 64, 64\)"),
        (Dozen, r"has a stride of 12; set it to one of \(1, 2, 4, 8, 16, 32\)"),
    ],
)
def test_a_class_that_gives_no_picture_or_has_an_odd_stride_is_refused(kind, told):
    with pytest.raises(InputError, match=told):
        networks.untrained(f"{__name__}:{kind.__name__}")


class _Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = conv(1, 1)


class Blind(_Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class WithASetting(_Plain):
    def forward(self, x: Tensor, strength: float = 1.0, *more: Tensor, features: bool = False) -> Tensor:
        return x - strength * self.conv(x)


class Told(_Plain):
    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        return x - level * self.conv(x)


class ToldIfKnown(_Plain):
    def forward(self, x: Tensor, sigma: Tensor | None = None) -> Tensor:
        return self.conv(x) if sigma is None else x - sigma * self.conv(x)


@pytest.mark.parametrize(("kind", "told"), [(Blind, False), (WithASetting, False), (Told, True), (ToldIfKnown, True)])
def test_the_noise_level_goes_to_a_network_that_asks_for_it_and_no_other(kind, told):
    assert networks.untrained(f"{__name__}:{kind.__name__}").takes_sigma is told
