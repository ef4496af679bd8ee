import json
import logging
import re
import sys

import numpy as np
import pytest

from edgekit.compress import budget, placement, quantize, sensitivity
from edgekit.compress.export import export_onnx
from edgekit.compress.simplify import simplify
from edgekit.data.noise import add_gaussian
from edgekit.errors import EdgekitError, InputError, LimitError
from edgekit.graph import checks, walk
from edgekit.graph.reference import Reference, probe
from edgekit.measure.quality import psnr
from edgekit.pipeline import networks
from edgekit.recipe import Budgets, Quantization, int8_drop_db, int8_worst_db

SIGMA = 25 / 255
SETTINGS = Quantization(calibration_pictures=8, change_basis=False)
# Nothing is half a decibel better than float; as good, or a little better, it may be.
IMPOSSIBLE_DB = -0.5


def clean(seed: int) -> np.ndarray:
    """Return smooth waves, the hardest of pictures: rounding has no noise of the network's own to hide in."""
    y, x = np.mgrid[0:48, 0:64]
    return (128 + 60 * np.sin(x / (5 + seed)) + 50 * np.cos(y / 9 - seed))[None].astype(np.uint8)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nano")
    net = networks.shipped("nano").net
    traced = export_onnx(net, channels=1, takes_sigma=True, stride=8, out=folder / "traced.onnx")
    fp32 = simplify(traced, folder / "simple.onnx")
    return quantize.prepare(fp32, [(probe(48, 64, 1, seed=i), SIGMA) for i in range(8)], SETTINGS)


@pytest.fixture(scope="module")
def judge(prepared):
    return budget.Judge(prepared.model, [clean(i) for i in range(3)], (15.0, 50.0), 8)


@pytest.fixture(scope="module", params=["onnxruntime", "openvino"])
def graph(request, prepared):
    where = placement.PLACEMENTS[request.param]
    return where, placement.place(prepared.model, prepared.ranges, where)


def keep(prepared, judge, graph, limit: float, worst: float | None = None) -> budget.Kept:
    where, quantized = graph
    allowed = budget.Budget(mean_db=limit, worst_db=worst)
    return budget.keep(quantized, prepared.model, where, judge, allowed, say=lambda line: None)


def test_a_graph_within_its_budget_stays_as_it_is(prepared, judge, graph):
    kept = keep(prepared, judge, graph, 50.0)
    assert kept.released == ()
    assert kept.model is graph[1]


def test_what_is_rolled_back_is_float_in_the_graph_and_the_budget_holds(prepared, judge, graph):
    before = judge.loss(graph[1])
    limit = before.mean_mdb / 1500
    kept = keep(prepared, judge, graph, limit)
    assert kept.released
    assert judge.loss(kept.model) == kept.loss
    assert kept.loss.mean_mdb <= 1000 * limit < before.mean_mdb
    convolutions = {n.name for n in prepared.model.graph.node if n.op_type == "Conv"}
    in_float = set(walk.float_convolutions(kept.model))
    assert in_float == convolutions & set(kept.released)
    stored = {t.name for t in kept.model.graph.initializer}
    for node in kept.model.graph.node:
        if node.name in in_float:
            assert {node.input[1], node.input[2]} <= stored, "its weights are the float graph's"
    assert checks.is_quantized(kept.model)


def test_no_layer_is_in_float_that_the_budget_does_not_need(prepared, judge, graph):
    where, quantized = graph
    limit = judge.loss(quantized).mean_mdb / 1500
    kept = keep(prepared, judge, graph, limit)
    nodes = {layer.name: layer.nodes for layer in budget.layers(quantized, prepared.model, where, judge)}
    for name in kept.released:
        others = [node for other in kept.released if other != name for node in nodes[other]]
        without = placement.release(quantized, others, where, prepared.model)
        assert judge.loss(without).mean_mdb > 1000 * limit, name


def test_a_limit_for_the_worst_picture_holds_where_the_mean_did_long_before(prepared, judge, graph):
    before = judge.loss(graph[1])
    limit = before.worst_mdb / 1500
    kept = keep(prepared, judge, graph, 50.0, limit)
    assert kept.released
    assert kept.loss.worst_mdb <= 1000 * limit < before.worst_mdb
    with pytest.raises(LimitError, match=r"^int8_worst_db: INT8 loses .* on the worst held-out picture, 0 may be lost"):
        keep(prepared, judge, graph, 50.0, 0.0)


@pytest.mark.parametrize(
    ("mean", "worst", "limit", "over"),
    [(60, 90, None, 10), (60, 190, 0.15, 40), (40, 140, 0.15, -10), (49, 10, 0.15, -1), (50, 150, 0.15, 0)],
)
def test_a_budget_says_by_how_much_it_is_missed(mean, worst, limit, over):
    allowed, loss = budget.Budget(mean_db=0.05, worst_db=limit), budget.Loss(mean_mdb=mean, worst_mdb=worst)
    assert allowed.over_mdb(loss) == pytest.approx(over)
    assert allowed.holds(loss) == (over <= 0)


def test_a_part_of_a_budget_is_that_part_of_both_limits():
    assert budget.Budget(mean_db=0.06, worst_db=0.2).part(0.5) == budget.Budget(mean_db=0.03, worst_db=0.1)
    assert budget.Budget(mean_db=0.06).part(0.5) == budget.Budget(mean_db=0.03)


def test_a_budget_that_cannot_be_kept_exits_with_3_and_says_what_was_reached(prepared, judge, graph):
    told = r"-0.5 may be lost; that is the best reached, .* % of the arithmetic"
    with pytest.raises(LimitError, match=told) as error:
        keep(prepared, judge, graph, IMPOSSIBLE_DB)
    assert isinstance(error.value, EdgekitError)
    assert error.value.exit_code == 3


@pytest.mark.parametrize(
    ("trained", "told"),
    [
        (False, "train with its rounding (quantization.qat.steps), "),
        (True, "more steps (quantization.qat.steps) or on"),
    ],
    ids=["untrained", "trained"],
)
def test_what_was_trained_already_is_not_told_to_train(prepared, judge, graph, trained, told):
    where, quantized = graph
    impossible = budget.Budget(mean_db=IMPOSSIBLE_DB)
    with pytest.raises(LimitError, match=re.escape(told)):
        budget.keep(quantized, prepared.model, where, judge, impossible, trained=trained, say=lambda line: None)


def test_arm_has_no_float_to_go_back_to(prepared, judge):
    where = placement.PLACEMENTS["arm"]
    with pytest.raises(LimitError, match="no single layers in float"):
        keep(prepared, judge, (where, placement.place(prepared.model, prepared.ranges, where)), IMPOSSIBLE_DB)


def test_a_loss_is_the_mean_and_the_worst_over_pictures_and_noise_levels(prepared, judge, graph):
    before, after = Reference(prepared.model), Reference(graph[1])
    lost = []
    for sigma in (15.0, 50.0):
        for index in range(3):
            noisy = add_gaussian(clean(index), sigma, index=index, seed=2)[None]
            one, other = (psnr(run(noisy, sigma / 255)[0], clean(index) / np.float32(255)) for run in (before, after))
            lost.append(one - other)
    found = judge.loss(graph[1])
    assert found.mean_mdb == pytest.approx(1000 * np.mean(lost), abs=1)
    assert found.worst_mdb == pytest.approx(1000 * max(lost), abs=1)
    assert judge.apart_db(graph[1], before, 3) == pytest.approx(max(abs(x) for x in lost), abs=1e-3)


@pytest.mark.parametrize(
    ("better", "worse"), [((60, 10), (70, 10)), ((60, 100), (40, 190)), ((30, 100), (40, 90)), ((-5, 150), (0, 0))]
)
def test_a_loss_is_better_that_misses_its_budget_by_less_then_in_the_mean(better, worse):
    allowed = budget.Budget(mean_db=0.05, worst_db=0.15)
    one, other = (budget.Loss(mean_mdb=mean, worst_mdb=worst) for mean, worst in (better, worse))
    assert allowed.rank(one) < allowed.rank(other)


def test_no_loss_is_measured_without_pictures(prepared):
    with pytest.raises(InputError, match="there are no held-out pictures to measure the loss on"):
        budget.Judge(prepared.model, [], (25.0,), 8)


def test_the_loss_is_that_of_the_pictures(prepared, judge):
    assert judge.loss(prepared.model) == budget.Loss(mean_mdb=0, worst_mdb=0)
    assert judge.distance_udb(prepared.model, 2) == 0


def test_additions_are_one_by_one_where_the_engine_adds_before_it_rounds(prepared, judge):
    found = {}
    for name in ("onnxruntime", "openvino"):
        where = placement.PLACEMENTS[name]
        quantized = placement.place(prepared.model, prepared.ranges, where)
        names = [layer.name for layer in budget.layers(quantized, prepared.model, where, judge, pictures=1)]
        found[name] = {layer for layer in names if "Conv" not in layer}
    assert {"additions at 1/2", "additions at 1/4"} <= found["onnxruntime"]
    assert {"/encoder.0/encoder.0.1/Add", "/decoder.1/decoder.1.0/Add"} <= found["openvino"]


def test_the_table_names_every_layer_and_every_addition(prepared, judge, tmp_path):
    where = placement.PLACEMENTS["openvino"]
    quantized = placement.place(prepared.model, prepared.ranges, where)
    times = {n.name: 100 for n in prepared.model.graph.node if n.op_type == "Conv"}
    table = sensitivity.sensitivity(quantized, prepared.model, ("openvino", where), judge, times_us=times, pictures=1)
    convolutions = [n.name for n in prepared.model.graph.node if n.op_type == "Conv"]
    assert set(convolutions) <= {row.layer for row in table.rows}
    assert sum(row.macs_permille for row in table.rows) == pytest.approx(1000, abs=20)
    assert {row.time_us for row in table.rows} == {100, None}
    assert all(row.alone_udb > 0 for row in table.rows if row.layer in convolutions)
    additions = [row for row in table.rows if "Conv" not in row.layer]
    assert len(additions) == sum(n.op_type == "Add" for n in prepared.model.graph.node) - 1
    assert sum(row.gain_udb for row in additions) > 0
    assert table.rows == tuple(sorted(table.rows, key=lambda row: -row.gain_udb))
    pytest.importorskip("matplotlib")
    json_file, page, plot = sensitivity.write(table, tmp_path / "out", "nano")
    written = json.loads(json_file.read_text())
    assert (written["rows"][0]["layer"], written["measured"]) == (table.rows[0].layer, {})
    assert all(f"| {row.layer} |" in page.read_text() for row in table.rows)
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_table_is_written_an_older_plot_goes_and_a_line_says_what_to_install(
    tmp_path, monkeypatch, caplog
):
    (tmp_path / "sensitivity.png").write_bytes(b"of other figures")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    row = sensitivity.Sensitivity(layer="first", alone_udb=10, gain_udb=5, macs_permille=1000, time_us=None)
    table = sensitivity.Table(placement="openvino", loss=budget.Loss(mean_mdb=1, worst_mdb=2), rows=(row,))
    with caplog.at_level(logging.WARNING, logger="edgekit"):
        written = sensitivity.write(table, tmp_path, "one")
    assert [path.name for path in written] == ["sensitivity.json", "sensitivity.md"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sensitivity.json", "sensitivity.md"]
    assert "pip install 'edgekit[plot]'" in caplog.text


def test_a_layer_with_an_odd_name_stays_in_its_cell():
    row = sensitivity.Sensitivity(layer="a|b\nc", alone_udb=0, gain_udb=0, macs_permille=1000, time_us=None)
    table = sensitivity.Table(placement="openvino", loss=budget.Loss(mean_mdb=0, worst_mdb=0), rows=(row,))
    assert sensitivity.markdown(table, "mine").splitlines()[-1].startswith("| a\\|b c | +0.0000 |")


@pytest.mark.parametrize(
    ("model", "given", "limit"), [("nano", None, 0.08), ("small", None, 0.08), ("base", None, 0.05), ("nano", 0.2, 0.2)]
)
def test_the_budget_is_the_models_own_unless_the_recipe_has_one(model, given, limit):
    assert int8_drop_db(Budgets(int8_drop_db=given), model) == limit


@pytest.mark.parametrize(
    ("model", "given", "limit"),
    [("base", None, 0.15), ("large", None, 0.15), ("control", None, 0.15), ("base", 0.4, 0.4), ("nano", None, None)],
)
def test_the_worst_picture_of_the_larger_students_has_a_budget_too(model, given, limit):
    assert int8_worst_db(Budgets(int8_worst_db=given), model) == limit
