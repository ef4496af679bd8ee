"""The integer audit: the share comes from what the engine runs, and the fake-quantized twin of a model fails it."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import conftest
import numpy as np
import onnx
import pytest
import tiny
from conftest import Call
from onnx import helper, numpy_helper

from edgekit import backends, bundle, target
from edgekit.backends import onnxruntime
from edgekit.bundle import Built
from edgekit.compress.export import export_onnx
from edgekit.compress.simplify import simplify
from edgekit.graph import audit as auditing
from edgekit.graph import cost, walk
from edgekit.graph.audit import Executed, Weighted
from edgekit.graph.checks import read_onnx
from edgekit.pipeline import compile as compiling
from edgekit.pipeline import distill, verify
from edgekit.report import Audit, FloatNode
from edgekit.target import Engine, Limits, Target

LEAST = 0.5
ENGINES: list[Engine] = ["onnxruntime", "openvino"]
both_engines = pytest.mark.parametrize("engine", ENGINES)
pytestmark = pytest.mark.backend
pytest.importorskip("openvino", exc_type=ModuleNotFoundError)


def wanted(engine: Engine) -> Target:
    shipped = target.load("onnx" if engine == "onnxruntime" else "linux-x86_64")
    return dataclasses.replace(shipped, name=engine, limits=Limits(min_integer_macs=LEAST))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A run folder with a bundle of a random nano for each engine."""
    folder = tmp_path_factory.mktemp("made")
    recipe = tiny.recipe(tiny.write_pictures(folder / "pictures"), training=tiny.training(steps=5))
    distill.distill(recipe, folder / "run")
    compiling.compile_model(str(folder / "run"), [wanted(engine) for engine in ENGINES])
    return folder / "run"


@pytest.fixture
def run(made, cwd) -> Path:
    """A copy of the run folder, in the empty folder that the test stands in."""
    return shutil.copytree(made, cwd / "run")


def write_target(path: Path, engine: Engine, name: str) -> Path:
    conftest.write_target(path, name, f"min_integer_macs: {LEAST}")
    path.write_text(path.read_text().replace("engine: onnxruntime", f"engine: {engine}"))
    return path


def fake(path: Path, out: Path, *, integer_permille: int) -> Path:
    """Write the twin of a QDQ graph: the same numbers, but weights that were rounded to integers and back.

    The largest nodes are faked first, until the integer share is at most `integer_permille`.
    """
    model = onnx.load(path)
    made_by, stored = walk.producers(model), walk.initializers(model)
    nodes = {node.name: node for node in model.graph.node}
    macs, real = cost.macs_by_node(model, 256, 256), cost.dequantized_weight(model)
    left = sum(macs[name] for name in real)
    for name in sorted(real, key=lambda name: -macs[name]):
        if 1000 * left <= integer_permille * sum(macs.values()):
            break
        dequantize = made_by[nodes[name].input[1]]
        integers, scale = (numpy_helper.to_array(stored[key]).astype(np.float32) for key in dequantize.input[:2])
        floats = (integers * scale.reshape(-1, 1, 1, 1)).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(floats, dequantize.output[0]))
        model.graph.node.remove(dequantize)
        left -= macs[name]
    onnx.save(model, out)
    return out


def fake_quantizer(monkeypatch, engine: Engine, folder: Path, *, integer_permille: int) -> None:
    """Let the engine's door be given the twin of whatever INT8 graph it is given."""
    door = backends.load(engine)
    build = door.build

    def build_twin(source, target, out):
        twin = fake(source.int8_onnx, folder / "twin.onnx", integer_permille=integer_permille)
        return build(dataclasses.replace(source, int8_onnx=twin), target, out)

    monkeypatch.setattr(door, "build", build_twin)


def judged(call: Call, path: Path, *, code: int) -> dict:
    shown = call("-q", "verify", path, "--seconds", "1", "--json", "--allow-unverified")
    assert shown.code == code, shown
    (report,) = json.loads(shown.out)["items"]
    return report


def integer_limit(report: dict) -> dict:
    (limit,) = (x for x in report["limits"] if x["name"] == "min_integer_macs")
    return limit


def built_of(path: Path) -> Built:
    return bundle.read(path).built


def change_built(path: Path, **changes: object) -> None:
    """Replace parts of what the manifest says that compiling found, and take the hashes of the files anew."""
    raw = json.loads((path / bundle.MANIFEST).read_text())
    raw["built"] |= changes
    raw["files"] = bundle.hashes(path)
    (path / bundle.MANIFEST).write_text(json.dumps(raw))


# The verdict


@both_engines
def test_an_integer_model_keeps_the_limit_by_the_engines_account(run, call, engine):
    report = judged(call, run / "bundles" / engine, code=0)
    limit = integer_limit(report)
    assert limit["verdict"] == "pass"
    assert limit["measured"] == f"{report['audit']['integer_macs_permille'] / 10:.1f} %"
    assert report["audit"]["integer_macs_permille"] > 700
    assert limit["reason"].startswith({"onnxruntime": "ONNX Runtime ", "openvino": "OpenVINO "}[engine])
    assert ", here" in limit["reason"]


@both_engines
def test_the_fake_quantized_twin_fails_the_verdict(run, call, cwd, monkeypatch, engine):
    fake_quantizer(monkeypatch, engine, cwd, integer_permille=300)
    yaml = write_target(cwd / "twin.yaml", engine, "twin")
    assert call("-q", "compile", run, "-t", yaml).code == 0
    report = judged(call, run / "bundles" / "twin", code=3)
    limit = integer_limit(report)
    assert (limit["verdict"], report["verdict"]) == ("fail", "fail")
    assert 0 < report["audit"]["integer_macs_permille"] <= 300
    assert {x["name"] for x in report["limits"] if x["verdict"] == "fail"} == {"min_integer_macs"}
    assert report["audit"]["float_nodes"][0]["name"] in limit["reason"]


@both_engines
def test_the_twin_that_is_all_fake_is_not_even_compiled(run, call, cwd, monkeypatch, engine):
    fake_quantizer(monkeypatch, engine, cwd, integer_permille=0)
    yaml = write_target(cwd / "twin.yaml", engine, "twin")
    call("-q", "compile", run, "-t", yaml).refused(4, "integers")


@both_engines
def test_what_the_manifest_claims_does_not_help_the_twin(run, call, cwd, monkeypatch, engine):
    fake_quantizer(monkeypatch, engine, cwd, integer_permille=300)
    yaml = write_target(cwd / "twin.yaml", engine, "twin")
    assert call("-q", "compile", run, "-t", yaml).code == 0
    claim = Audit(integer_macs_permille=1000, how="a claim")
    change_built(
        run / "bundles" / "twin",
        facts={"integer_macs_permille": 1000},
        audit=json.loads(json.dumps(dataclasses.asdict(claim))),
    )
    limit = integer_limit(judged(call, run / "bundles" / "twin", code=3))
    assert limit["verdict"] == "fail"
    assert "(100.0 % where it was compiled)" in limit["reason"]


def test_an_engine_that_is_not_here_leaves_what_was_recorded_and_says_so(run, monkeypatch):
    path = run / "bundles" / "openvino"
    recorded = built_of(path).audit
    assert recorded is not None
    monkeypatch.setitem(verify.backends.DOORS, "openvino", "no_such_package.door")
    found = verify.verify(path)
    (limit,) = (x for x in found.limits if x.name == "min_integer_macs")
    assert (limit.verdict, limit.measured) == ("pass", f"{recorded.integer_macs_permille / 10:.1f} %")
    assert "as recorded when it was compiled; not counted here: the engine 'openvino'" in limit.reason

    change_built(path, audit=None, facts={})
    found = verify.verify(path)
    (limit,) = (x for x in found.limits if x.name == "min_integer_macs")
    assert (limit.verdict, limit.measured, found.audit) == ("incomplete", "not run", None)
    assert "not counted: the engine 'openvino'" in limit.reason


def test_a_share_just_below_the_limit_fails():
    share = Audit(integer_macs_permille=949, how="")
    assert verify._integer_limit(0.95, share).verdict == "fail"
    assert verify._integer_limit(0.95, dataclasses.replace(share, integer_macs_permille=950)).verdict == "pass"
    assert verify._integer_limit(0.9494, share).verdict == "fail"


@pytest.mark.parametrize("name", ["onnx", "linux-x86_64"])
def test_the_shipped_int8_targets_ask_for_integers(name):
    assert (target.load(name).limits.min_integer_macs or 0) >= 0.5


# What compiling records and tells


@both_engines
def test_compiling_records_the_account_and_tells_it(run, call, engine):
    path = run / "bundles" / engine
    built = built_of(path)
    assert built.audit is not None
    assert built.facts["integer_macs_permille"] == built.audit.integer_macs_permille
    told = call("-q", "compile", run, "-t", write_target(run.parent / "again.yaml", engine, "again"))
    for line in built.audit.lines():
        assert f"  {line}\n" in told.out
        assert f"- {line}\n" in (path / "README.md").read_text()
    answered = call("-q", "compile", run, "-t", run.parent / "again.yaml", "--json").out
    share = json.loads(answered)["audits"]["again"]["integer_macs_permille"]
    assert share == built.audit.integer_macs_permille


@both_engines
def test_the_nodes_in_float_and_the_integers_make_up_the_whole(run, engine):
    path = run / "bundles" / engine
    found = backends.load(engine).audit(path, built_of(path), wanted(engine))
    in_float = [node.macs_permille for node in found.float_nodes]
    assert in_float == sorted(in_float, reverse=True)
    assert found.integer_macs_permille + sum(in_float) == pytest.approx(1000, abs=1 + len(in_float))
    names = {node.name for node in read_onnx(path / "reference" / "student.fp32.onnx").graph.node}
    assert {node.name for node in found.float_nodes} <= names


def test_both_engines_agree_on_what_is_faked(made, tmp_path):
    twin = fake(made / "bundles" / "onnxruntime" / "model.int8.onnx", tmp_path / "twin.onnx", integer_permille=300)
    faked = set(cost.macs_by_node(read_onnx(twin), 256, 256)) - set(cost.dequantized_weight(read_onnx(twin)))
    assert {node.name for node in onnxruntime.audit_file(twin).float_nodes} == faked
    other = openvino_audit(twin)
    assert {node.name for node in other.float_nodes} == faked
    assert "Subtract" in other.float_ops_between


def openvino_audit(path: Path) -> Audit:
    from edgekit.backends import openvino
    from edgekit.backends.openvino_audit import audit

    return audit(openvino._read(path), openvino.open_onnx(path, 1).compiled)


@pytest.mark.parametrize("name", ["nano", "control"])
def test_openvino_counts_the_multiply_accumulates_that_the_onnx_graph_has(name, tmp_path):
    net = tiny.network(name)
    raw = export_onnx(
        net, channels=net.channels, takes_sigma=net.takes_sigma, stride=net.stride, out=tmp_path / "raw.onnx"
    )
    same_counts(simplify(raw, tmp_path / "simplified.onnx"))


def test_openvino_counts_every_kind_of_product_as_the_onnx_graph_does(tmp_path):
    rng = np.random.default_rng(0)
    shapes = {"rows": (256, 256), "group": (6, 2, 3, 3), "up": (6, 4, 2, 2), "up_group": (4, 3, 2, 2), "bias": (6,)}
    shapes["last"] = (4, 6, 3, 3)
    nodes = [
        helper.make_node("MatMul", ["noisy", "rows"], ["a"], "/rows/MatMul"),
        helper.make_node("Conv", ["a", "group"], ["b"], "/group/Conv", group=2, pads=[1, 1, 1, 1]),
        helper.make_node("ConvTranspose", ["b", "up"], ["c"], "/up/ConvTranspose", strides=[2, 2]),
        helper.make_node("ConvTranspose", ["c", "up_group", "bias"], ["d"], "/up_group/CT", strides=[2, 2], group=2),
        helper.make_node("Conv", ["d", "last"], ["e"], "/last/Conv", strides=[4, 4], pads=[1, 1, 1, 1]),
        helper.make_node("Tanh", ["e"], ["denoised"], "/Tanh"),
    ]
    weights = {name: rng.random(shape, np.float32) for name, shape in shapes.items()}
    path = write_graph(tmp_path / "kinds.onnx", nodes, weights, channels=4)
    same_counts(path)


def same_counts(path: Path) -> None:
    """Compare both engines' accounts of a float graph with its nodes."""
    model = read_onnx(path)
    macs = cost.macs_by_node(model, 256, 256)
    shares = {name: round(1000 * count / sum(macs.values())) for name, count in macs.items()}
    for found in (openvino_audit(path), onnxruntime.audit_file(path)):
        assert {node.name: node.macs_permille for node in found.float_nodes} == shares
        assert (found.integer_macs_permille, found.float_ops_between) == (0, {})


def write_graph(path: Path, nodes: list[onnx.NodeProto], values: Mapping[str, np.ndarray], *, channels: int) -> Path:
    shape = [1, channels, "h", "w"]
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("noisy", onnx.TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("denoised", onnx.TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


# How ONNX Runtime is read


def test_weights_that_onnx_runtime_quantizes_by_itself_count(made, tmp_path):
    """Float weights and biases between QDQ pairs become integers in its optimizer, under names of its own."""
    path = made / "bundles" / "onnxruntime" / "model.int8.onnx"
    twin = onnx.load(fake(path, tmp_path / "twin.onnx", integer_permille=0))
    made_by, stored = walk.producers(twin), walk.initializers(twin)
    for node in list(twin.graph.node):
        bias = made_by.get(node.input[2]) if node.op_type == "Conv" and len(node.input) > 2 else None
        if bias is not None:
            integers, scale = (numpy_helper.to_array(stored[key]).astype(np.float32) for key in bias.input[:2])
            twin.graph.initializer.append(numpy_helper.from_array(integers * scale, bias.output[0]))
            twin.graph.node.remove(bias)
    onnx.save(twin, tmp_path / "bias.onnx")
    assert onnxruntime.audit_file(tmp_path / "bias.onnx") == onnxruntime.audit_file(path)


def _shared_weight(path: Path) -> Path:
    """Write a graph of two convolutions that read one dequantized weight; only the first has quantizers around it."""
    rng = np.random.default_rng(0)
    stored: Mapping[str, np.ndarray] = {
        "scale": np.float32(0.01),
        "zero": np.uint8(128),
        "w": rng.integers(-127, 127, (8, 8, 3, 3)).astype(np.int8),
        "w_scale": np.full(8, 0.001, np.float32),
        "w_zero": np.zeros(8, np.int8),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["noisy", "scale", "zero"], ["q"], "q"),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["x"], "dq"),
        helper.make_node("DequantizeLinear", ["w", "w_scale", "w_zero"], ["weight"], "weight_dq", axis=0),
        helper.make_node("Conv", ["x", "weight"], ["a"], "first", pads=[1, 1, 1, 1]),
        helper.make_node("QuantizeLinear", ["a", "scale", "zero"], ["a_q"], "a_q"),
        helper.make_node("DequantizeLinear", ["a_q", "scale", "zero"], ["b"], "a_dq"),
        helper.make_node("Tanh", ["b"], ["c"], "tanh"),
        helper.make_node("Conv", ["c", "weight"], ["denoised"], "second", pads=[1, 1, 1, 1]),
    ]
    return write_graph(path, nodes, stored, channels=8)


def test_a_weight_that_two_nodes_share_counts_for_the_one_that_reads_it_as_integers(tmp_path):
    found = onnxruntime.audit_file(_shared_weight(tmp_path / "shared.onnx"))
    assert found.integer_macs_permille == 500
    assert found.float_nodes == (FloatNode(name="second", op="Conv", macs_permille=500),)


# The account itself


def node(op: str, arithmetic: auditing.Arithmetic, source: str, result: str, *, multiplies: bool = False) -> Executed:
    return Executed(
        op=op, arithmetic=arithmetic, multiplies=multiplies, inputs=tuple(source.split()), outputs=(result,)
    )


def test_only_what_lies_between_integer_products_is_counted():
    plan = [
        # A product in float, or what else an engine does in integers, is no integer product.
        node("Conv", "float", "noisy", "wide", multiplies=True),
        node("Add", "float", "wide noisy", "sum"),
        node("Transpose", "integer", "sum", "turned"),
        node("Mul", "float", "turned", "a"),
        node("Conv", "integer", "a", "b", multiplies=True),
        node("Dequantize", "float", "b", "c"),
        node("Add", "float", "c noisy", "d"),
        node("Add", "float", "d noisy", "e"),
        node("Transpose", "integer", "e", "f"),
        node("Conv", "float", "f", "g", multiplies=True),
        node("Conv", "integer", "g", "h", multiplies=True),
        node("Add", "float", "h noisy", "denoised"),
        node("Tanh", "float", "c", "unread"),
    ]
    assert auditing.float_between(plan) == {"Add": 2, "Dequantize": 1}


def test_the_share_is_rounded_down_and_the_largest_are_named_first():
    weighted = [
        Weighted(name="head", op="Conv", macs=2, integer=False),
        Weighted(name="body", op="Conv", macs=9000, integer=True),
        Weighted(name="neck", op="Conv", macs=494, integer=True),
        Weighted(name="tail", op="Conv", macs=504, integer=False),
    ]
    found = auditing.audit(weighted, [], "by hand")
    assert found.integer_macs_permille == 949
    assert found.lines() == [
        "94.9 % of the multiply-accumulates in integers (by hand)",
        "in float: tail 5.0 %, head 0.0 %",
    ]
    assert (
        dataclasses.replace(found, float_nodes=found.float_nodes * 3).in_float(2)
        == "tail 5.0 %, head 0.0 %, 4 others 10.0 %"
    )


def test_the_account_needs_no_engine_to_be_read():
    code = (
        "import sys, edgekit.report, edgekit.graph.audit; "
        "print(sorted({'openvino', 'onnxruntime', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
