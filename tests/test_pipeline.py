"""The way through, with the real stages on a tiny student: distill, compile, verify."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file

from edgekit import backends, bundle, files, report, run, target, zoo
from edgekit.compress import budget
from edgekit.compress.export import export_onnx
from edgekit.data import sets
from edgekit.data.synthetic import dead_leaves
from edgekit.errors import InputError, IntegrityError, LimitError, ToolMissingError, UnsupportedError
from edgekit.graph.checks import is_quantized
from edgekit.graph.reference import agreement_db
from edgekit.measure import quality
from edgekit.measure.quality import PictureQuality, Protocol, QualityReport
from edgekit.models import weights
from edgekit.pipeline import compile as compiling
from edgekit.pipeline import denoise as denoising
from edgekit.pipeline import distill, int8, networks, pictures, plan, verify, whole
from edgekit.pipeline.golden import golden_pictures, write_golden
from edgekit.recipe import Data, Distillation, Model, Noise, Quantization, Recipe
from edgekit.target import InputShape, Limits

ONNX = dataclasses.replace(target.load("onnx"), limits=Limits(size_mib=8.0, min_integer_macs=0.5))
FLOAT = dataclasses.replace(ONNX, name="onnx-float32", precision="float32", limits=Limits())
QUICK = verify.Settings(seconds=0.3)
STEPS = tiny.training(steps=5)
TEACHER = Model(model="nano")


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return tiny.write_pictures(tmp_path_factory.mktemp("photos") / "pictures")


@pytest.fixture(scope="module")
def recipe(photos) -> Recipe:
    return tiny.recipe(photos, teacher=TEACHER, training=STEPS)


@pytest.fixture(scope="module")
def made(recipe, tmp_path_factory) -> whole.Result:
    """The whole way, once: a random nano that the shipped one taught."""
    folder = tmp_path_factory.mktemp("made") / "run"
    return whole.run_recipe(recipe, [ONNX, FLOAT], folder, settings=QUICK, say=lambda text: None)


@pytest.fixture
def copied(made, tmp_path) -> Path:
    """A copy of the run, to change."""
    return shutil.copytree(made.distilled.folder, tmp_path / "run")


def denoise(path: Path, noisy: np.ndarray, sigma: float) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    given = {"noisy": noisy, "sigma": np.full((1, 1, 1, 1), sigma, np.float32)}
    return session.run(["denoised"], {i.name: given[i.name] for i in session.get_inputs()})[0]


# The whole way


def test_the_whole_way_ends_with_a_verdict_on_every_artifact(made):
    assert [r.target for r in made.reports] == ["onnx", "onnx-float32"]
    for found in made.reports:
        names = {x.name for x in found.limits}
        assert {"student_drop_db", "int8_drop_db", "golden_outputs"} <= names
        assert found.verdict == "pass", found.limits
        written = made.distilled.folder / "bundles" / f"{found.target}.report.json"
        assert json.loads(written.read_text()) == json.loads(json.dumps(found.as_json()))
    assert report.exit_code([r.verdict for r in made.reports]) == 0


def test_the_ledger_has_a_row_for_everything_that_was_measured_and_adds_up(made):
    rows = {row.name: row for row in made.reports[0].rows}
    assert list(rows) == ["noisy input", "teacher FP32", "student FP32", "artifact"]
    assert rows["noisy input"].psnr_mdb < rows["teacher FP32"].psnr_mdb
    assert rows["artifact"].drop_mdb == rows["student FP32"].psnr_mdb - rows["artifact"].psnr_mdb
    assert rows["artifact"].latency_us > 0
    assert rows["teacher FP32"].latency_us > 0
    folder = made.compiled.bundles["onnx"]
    assert rows["artifact"].sha256 == files.sha256(folder / "model.int8.onnx")
    assert rows["artifact"].size_bytes == (folder / "model.int8.onnx").stat().st_size
    assert rows["student FP32"].sha256 == files.sha256(folder / "reference" / "student.fp32.onnx")


def test_the_psnr_of_the_ledger_is_that_of_the_artifacts_own_outputs(made):
    folder = made.compiled.bundles["onnx"]
    found = []
    for clean in sorted((folder / "golden").glob("*.png")):
        noisy = np.fromfile(clean.with_name(f"{clean.stem}.noisy.f32"), "<f4")
        noisy = noisy.reshape(1, 1, 256, 256)
        want = np.asarray(Image.open(clean), np.float64) / 255
        got = denoise(folder / "model.int8.onnx", noisy, 25 / 255)[0, 0]
        found.append(-10 * np.log10(np.mean((got - want) ** 2)))
    artifact = made.reports[0].rows[-1]
    assert len(found) == 2
    assert artifact.psnr_mdb == pytest.approx(1000 * np.mean(found), abs=1)


def test_the_students_onnx_computes_what_its_weights_do(made):
    net = networks.from_run(made.distilled.folder).net
    graph = made.compiled.bundles["onnx"] / "reference" / "student.fp32.onnx"
    noisy = np.random.default_rng(0).random((1, 1, 40, 48), dtype=np.float32)
    want = networks.as_function(net)(noisy, 0.1)
    assert agreement_db(denoise(graph, noisy, 0.1), want) > 90


def test_the_int8_artifact_is_integers_and_the_float_one_is_not(made):
    integer, floating = (made.compiled.bundles[name] / f for name, f in _ARTIFACTS.items())
    assert is_quantized(onnx.load(integer))
    assert not is_quantized(onnx.load(floating))
    manifest = bundle.read(made.compiled.bundles["onnx"])
    assert manifest.built.precision == "int8"
    assert manifest.built.facts["integer_macs_permille"] > 500


_ARTIFACTS = {"onnx": "model.int8.onnx", "onnx-float32": "model.fp32.onnx"}


@pytest.mark.parametrize("name", _ARTIFACTS)
def test_the_chain_of_hashes_leads_from_the_teacher_to_the_artifact(made, name):
    folder = made.distilled.folder
    links = bundle.read(made.compiled.bundles[name]).chain
    kinds = ["teacher", "student", "fused", "onnx", "simplified", *(["int8"] if name == "onnx" else []), "artifact"]
    assert [link.kind for link in links] == kinds
    assert [link.made_from for link in links] == [None, *(link.sha256 for link in links[:-1])]
    known = {
        "teacher": zoo.weights("nano"),
        "student": folder / "02-student" / "student.safetensors",
        "fused": folder / "03-fuse" / "fused.safetensors",
        "onnx": folder / "04-export" / "student.onnx",
        "simplified": folder / "05-simplify" / "student.fp32.onnx",
        "int8": folder / "06-quantize" / "onnxruntime" / "student.int8.onnx",
        "artifact": made.compiled.bundles[name] / _ARTIFACTS[name],
    }
    assert {link.kind: link.sha256 for link in links} == {kind: files.sha256(known[kind]) for kind in kinds}


def test_every_file_of_a_bundle_is_in_its_manifest(made):
    for folder in made.compiled.bundles.values():
        manifest = bundle.read(folder)
        assert {"README.md", "MODEL_CARD.md", "NOTICES.md"} < set(manifest.files)
        assert sum(name.endswith(".denoised.f32") for name in manifest.files) == 2


@pytest.mark.parametrize("name", _ARTIFACTS)
def test_the_pages_of_a_bundle_name_what_is_in_it(made, name):
    folder = made.compiled.bundles[name]
    page = (folder / "README.md").read_text()
    assert _ARTIFACTS[name] in page
    assert ("int8" if name == "onnx" else "float32") in page
    card = (folder / "MODEL_CARD.md").read_text()
    assert "Removes additive white Gaussian noise from gray pictures" in card
    assert "its owner" not in card
    assert all(link.sha256 in card for link in bundle.read(folder).chain)


def test_the_readmes_lines_denoise_a_picture(made, monkeypatch):
    folder = made.compiled.bundles["onnx"]
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    picture = next((folder / "golden").glob("*.png")).stem
    noisy = np.fromfile(folder / "golden" / f"{picture}.noisy.f32", "<f4").reshape(1, 1, 256, 256)
    monkeypatch.chdir(folder)
    given = {"noisy": noisy}
    exec(code, given)
    want = np.fromfile(folder / "golden" / f"{picture}.denoised.f32", "<f4")
    assert agreement_db(given["denoised"].ravel(), want) > 40


# Stages


def test_a_second_run_makes_nothing_anew(made, recipe, copied):
    before = {p: p.stat().st_mtime_ns for p in copied.rglob("*") if p.is_file() and p.name not in _VOLATILE}
    again = whole.run_recipe(recipe, [ONNX, FLOAT], copied, settings=QUICK, say=lambda text: None)
    stages = [s.name for s in run.read_stages(copied)]
    assert sorted(again.compiled.reused) == sorted(stages)
    assert len(stages) == 9
    after = {p: p.stat().st_mtime_ns for p in copied.rglob("*") if p.is_file() and p.name not in _VOLATILE}
    assert {p: t for p, t in after.items() if not p.name.endswith("report.json")} == {
        p: t for p, t in before.items() if not p.name.endswith("report.json")
    }


_VOLATILE = ("lock", "measured.json")


@pytest.fixture
def changed_code(monkeypatch) -> Callable[[str], None]:
    """Return a function that has a module of edgekit count as one whose source is another."""
    source = run.code_sha256

    def change(module: str) -> None:
        def sha256(modules: tuple[str, ...]) -> str:
            counts = any(module == known or module.startswith(f"{known}/") for known in modules)
            return source(modules) + ("changed" if counts else "")

        monkeypatch.setattr(run, "code_sha256", sha256)

    return change


@pytest.mark.parametrize("module", ["data/noise", "graph", "recipe", "report"])
def test_a_bundle_is_made_anew_where_code_behind_its_manifest_or_pages_changed(copied, changed_code, module):
    """A halo, a budget or a golden picture of before would stand in it for good."""
    changed_code(module)
    assert f"bundles/{FLOAT.name}" not in compiling.compile_model(str(copied), [FLOAT]).reused


@pytest.mark.parametrize("module", ["measure/quality", "training"])
def test_a_student_that_other_code_made_or_judged_is_kept_with_a_warning(copied, recipe, changed_code, caplog, module):
    """Its training took hours; whoever wants today's figures deletes it."""
    caplog.set_level(logging.WARNING, logger="edgekit")
    before = run.read_stages(copied)
    changed_code(module)
    distill.distill(recipe, copied)
    assert run.read_stages(copied) == before
    assert f"delete {copied}/02-student to make it again" in caplog.text
    shutil.rmtree(copied / "02-student")
    distill.distill(recipe, copied)
    keys = [{s.name: s.key for s in stages} for stages in (before, run.read_stages(copied))]
    assert keys[0]["student"] != keys[1]["student"]


def test_a_student_is_judged_with_the_noise_of_its_recipe(photos, tmp_path):
    noise = Noise(train=(5.0, 50.0), seed=3)
    found, _ = distilled(photos, tmp_path / "run", noise=noise, training=tiny.training(steps=2))
    evaluation = sets.folder(photos / "evaluation", channels=1)
    noisy, other = (
        quality.evaluate(quality.noisy_input, evaluation, sigma255=25.0, seeds=(seed,)).psnr_mdb for seed in (3, 0)
    )
    assert found.noisy_mdb == noisy != other


def test_a_training_that_its_time_limit_cut_off_says_so(photos, tmp_path):
    cut = tiny.training(steps=100_000, max_minutes=0.01)
    found, _ = distilled(photos, tmp_path / "run", training=cut)
    assert (found.ended_by, found.steps_asked) == ("time", 100_000)
    assert 0 < found.steps < 100_000


def test_the_teachers_graph_depends_on_the_tools_that_simplify_it(made):
    tools = {s.name: s.tools.items() for s in run.read_stages(made.distilled.folder)}
    assert tools["simplify"] <= tools["teacher"]


def test_another_limit_makes_the_bundle_anew_and_nothing_else(copied):
    stricter = dataclasses.replace(ONNX, limits=Limits(size_mib=1.0))
    again = compiling.compile_model(str(copied), [stricter])
    assert set(again.reused) == {"fuse", "export", "simplify", "quantize/onnxruntime", "teacher"}
    assert bundle.read(again.bundles["onnx"]).target.limits.size_mib == 1.0


def test_a_file_of_a_stage_that_changed_is_refused_by_name(copied):
    path = copied / "05-simplify" / "student.fp32.onnx"
    damaged = path.read_bytes()[:-1] + b"\x00"
    path.unlink()
    path.write_bytes(damaged)
    with pytest.raises(IntegrityError, match=f"{path}: changed since stage 'simplify' wrote it"):
        compiling.compile_model(str(copied), [ONNX])


def test_two_compiles_in_two_folders_give_the_same_bytes(made, recipe, tmp_path):
    second = whole.run_recipe(recipe, [ONNX, FLOAT], tmp_path / "run", settings=QUICK, say=lambda text: None)
    for name, folder in made.compiled.bundles.items():
        assert bundle.hashes(folder) == bundle.hashes(second.compiled.bundles[name])
        assert files.sha256(folder / "manifest.json") == files.sha256(second.compiled.bundles[name] / "manifest.json")
    assert (made.distilled.folder / "run.json").read_bytes() == (tmp_path / "run" / "run.json").read_bytes()


@pytest.mark.backend
def test_two_compiles_for_openvino_give_the_same_bytes(copied, made, tmp_path):
    pytest.importorskip("openvino")
    wanted = target.load("linux-x86_64")
    first = compiling.compile_model(str(copied), [wanted]).bundles[wanted.name]
    other = shutil.copytree(made.distilled.folder, tmp_path / "other")
    second = compiling.compile_model(str(other), [wanted]).bundles[wanted.name]
    assert files.sha256(first) == files.sha256(second)
    assert bundle.read(first).chain[-1].sha256 == bundle.combined_sha256([first / "model.xml", first / "model.bin"])


# Teachers


def distilled(photos: Path, folder: Path, **changes: object) -> tuple[distill.Distilled, Path]:
    return distill.distill(tiny.recipe(photos, **{"training": STEPS, **changes}), folder), folder


def test_a_teacher_that_beats_its_student_teaches_it(made):
    found = made.distilled
    assert found.teacher_refused == ""
    assert found.start_mdb is None
    assert found.teacher_mdb > found.noisy_mdb
    assert found.nlm_mdb > found.noisy_mdb


def test_a_teacher_that_does_not_beat_its_student_is_refused(photos, tmp_path, caplog):
    poor = Model(model="small", weights=str(tiny.write_weights("small", tmp_path / "poor.safetensors")))
    with caplog.at_level(logging.WARNING, logger="edgekit"):
        taught, folder = distilled(photos, tmp_path / "taught", student=Model(model="nano"), teacher=poor)
    assert taught.teacher_refused in caplog.messages
    assert "teacher 'small' is refused: it reaches" in taught.teacher_refused
    assert "its student 'nano' before training" in taught.teacher_refused
    facts = {s.name: s.facts for s in run.read_stages(folder)}["student"]
    assert facts["teacher_refused"] == taught.teacher_refused
    alone, folder_alone = distilled(photos, tmp_path / "alone", student=Model(model="nano"))
    one, other = (load_file(f / "02-student" / networks.WEIGHTS) for f in (folder, folder_alone))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert (taught.student_mdb, taught.start_mdb) == (alone.student_mdb, alone.start_mdb)
    links = bundle.read(compiling.compile_model(str(folder), [FLOAT]).bundles[FLOAT.name]).chain
    assert [(link.kind, link.made_from) for link in links[:2]] == [("teacher", None), ("student", None)]


def test_a_verdict_on_a_bundle_does_not_outlive_it(photos, tmp_path):
    _, folder = distilled(photos, tmp_path / "run", student=Model(model="nano"))
    path = compiling.compile_model(str(folder), [FLOAT]).bundles[FLOAT.name]
    verdict = bundle.report_path(path)
    verdict.write_text("{}", encoding="utf-8")
    compiling.compile_model(str(folder), [FLOAT])
    assert verdict.is_file()
    compiling.compile_model(str(folder), [dataclasses.replace(FLOAT, limits=Limits(size_mib=7.0))])
    assert not verdict.exists()


def test_a_student_that_kept_its_starting_weights_is_not_made_from_its_teacher(photos, tmp_path):
    spoilt = tiny.training(steps=5, peak_rate=0.5, keep_better=True)
    found, folder = distilled(
        photos, tmp_path / "run", student=Model(model="nano"), teacher=Model(model="small"), training=spoilt
    )
    assert (found.teacher_refused, found.kept) == ("", "start")
    links = bundle.read(compiling.compile_model(str(folder), [FLOAT]).bundles[FLOAT.name]).chain
    assert (links[1].sha256, links[1].made_from) == (files.sha256(zoo.weights("nano")), None)


def test_a_student_is_made_from_the_teacher_that_taught_it_and_not_from_todays(photos, tmp_path):
    path = tmp_path / "teacher.safetensors"
    shutil.copyfile(zoo.weights("nano"), path)
    _, folder = distilled(photos, tmp_path / "run", teacher=Model(model="nano", weights=str(path)))
    made_from = []
    for _ in range(2):
        links = bundle.read(compiling.compile_model(str(folder), [FLOAT]).bundles[FLOAT.name]).chain
        assert (links[0].kind, links[0].sha256) == ("teacher", files.sha256(path))
        made_from.append(links[1].made_from)
        tiny.write_weights("nano", path)
    assert made_from == [files.sha256(zoo.weights("nano")), None]


def test_a_teacher_that_does_not_beat_the_noise_is_refused(photos, tmp_path):
    poor = Model(model="nano", weights=str(tiny.write_weights("nano", tmp_path / "poor.safetensors")))
    found, _ = distilled(photos, tmp_path / "run", teacher=poor)
    assert "is refused: it reaches" in found.teacher_refused
    assert "the noisy input" in found.teacher_refused


def test_a_teacher_leaves_its_mark_on_the_student(made, photos, tmp_path):
    alone, folder = distilled(photos, tmp_path / "alone")
    assert alone.teacher_mdb is None
    one, other = (load_file(f / "02-student" / networks.WEIGHTS) for f in (made.distilled.folder, folder))
    assert not torch.equal(one["tail.weight"], other["tail.weight"])


def test_training_alone_ignores_the_recipes_teacher(recipe, photos, tmp_path):
    distill.distill(recipe, tmp_path / "alone", alone=True)
    _, without = distilled(photos, tmp_path / "without")
    name = "02-student/student.safetensors"
    assert files.sha256(tmp_path / "alone" / name) == files.sha256(without / name)


def test_training_alone_does_not_replace_a_student_that_was_taught(recipe, tmp_path):
    distill.distill(recipe, tmp_path / "run")
    before = files.sha256(tmp_path / "run" / "02-student" / networks.WEIGHTS)
    with pytest.raises(InputError, match=r"holds another run \(alone is None there, True here\)"):
        distill.distill(recipe, tmp_path / "run", alone=True)
    assert files.sha256(tmp_path / "run" / "02-student" / networks.WEIGHTS) == before


def test_a_network_of_other_channels_than_the_data_is_refused(photos, tmp_path):
    wanted = tiny.recipe(photos, student=Model(model="nano"), data=Data(train=(str(photos / "train"),), channels=3))
    with pytest.raises(InputError, match=r"'nano' were trained with channels=1, not 3"):
        distill.distill(wanted, tmp_path / "run")
    gray = tiny.recipe(photos, student=Model(model="base-color"))
    with pytest.raises(InputError, match=r"'base-color' takes 3 channels, data\.channels is 1"):
        distill.distill(gray, tmp_path / "run")


def test_a_network_without_weights_that_takes_other_channels_than_the_data_is_refused(photos, tmp_path):
    wrong = tiny.recipe(photos, student=Model(model="nano", weights="random", options={"channels": 3}))
    with pytest.raises(InputError, match=r"'nano' takes 3 channels, data\.channels is 1; set data.channels, and leave"):
        distill.distill(wrong, tmp_path / "run")
    with pytest.raises(InputError, match=r"'nano' takes 3 channels, data\.channels is 1"):
        plan.plan_training(wrong)


# Students


def test_a_student_with_batchnorm_goes_the_whole_way(photos, tmp_path):
    student = Model(
        model="nano", weights="random", options={"batchnorm": True, "activation": "hardswish", "noise_level": False}
    )
    # Real statistics: enough steps for them to leave their start.
    recipe = tiny.recipe(photos, student=student, training=tiny.training(steps=60), teacher=TEACHER)
    made = whole.run_recipe(recipe, [ONNX], tmp_path / "run", settings=QUICK, say=lambda text: None)
    assert made.reports[0].verdict == "pass", made.reports[0].limits
    trained = load_file(tmp_path / "run" / "02-student" / networks.WEIGHTS)
    variances = torch.cat([v for name, v in trained.items() if name.endswith("running_var")])
    assert (variances - 1).abs().mean() > 0.1
    facts = {s.name: s.facts for s in run.read_stages(tmp_path / "run")}
    assert facts["fuse"]["batchnorms_folded"] == sum(name.endswith("running_var") for name in trained)
    for graph in (tmp_path / "run").rglob("*.onnx"):
        assert "BatchNormalization" not in {node.op_type for node in onnx.load(graph).graph.node}
    noisy = np.random.default_rng(0).random((1, 1, 64, 64), dtype=np.float32)
    want = networks.as_function(networks.from_run(tmp_path / "run").net)(noisy, 0.0)
    graph = made.compiled.bundles["onnx"] / "reference" / "student.fp32.onnx"
    assert agreement_db(denoise(graph, noisy, 0.0), want) > 80
    assert bundle.read(made.compiled.bundles["onnx"]).model.takes_sigma is False


def test_a_colour_student_goes_the_whole_way_and_lacks_a_teacher(tmp_path):
    colour = tiny.write_pictures(tmp_path / "pictures", channels=3)
    recipe = tiny.recipe(colour, channels=3, training=STEPS)
    made = whole.run_recipe(recipe, [ONNX], tmp_path / "run", settings=QUICK, say=lambda text: None)
    (found,) = made.reports
    verdicts = {x.name: x.verdict for x in found.limits}
    assert verdicts.pop("student_drop_db") == "incomplete"
    assert set(verdicts.values()) == {"pass"}
    assert bundle.read(made.compiled.bundles["onnx"]).model.channels == 3
    assert [row.name for row in found.rows] == ["noisy input", "student FP32", "artifact"]


def test_the_student_of_an_unfinished_run_is_not_compiled(recipe, tmp_path):
    with run.open_run(tmp_path / "run", {"recipe": dataclasses.asdict(recipe)}):
        pass
    with pytest.raises(InputError, match="its student is not finished; start the same edgekit distill again"):
        compiling.compile_model(str(tmp_path / "run"), [ONNX])


def test_the_engine_is_asked_for_before_anything_is_made(recipe, tmp_path, monkeypatch):
    monkeypatch.setitem(backends.DOORS, "tvm", "no_such_package.door")
    with pytest.raises(ToolMissingError, match=r"the engine 'tvm' needs .* run: pip install 'edgekit\[tvm\]'"):
        whole.run_recipe(recipe, [target.load("android-arm64")], tmp_path / "run", say=lambda text: None)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("width", "told"),
    [
        (20, r"input 20x64 is not a tile that 'nano' can be compiled for; .* of 8"),
        (8, r"input 8x64 is too small to be verified; SSIM needs 11 pixels a side"),
    ],
)
def test_a_tile_that_the_student_does_not_take_is_refused_before_any_training(recipe, tmp_path, width, told):
    tile = dataclasses.replace(ONNX, input=InputShape(height=64, width=width))
    with pytest.raises(UnsupportedError, match=told):
        whole.run_recipe(recipe, [tile], tmp_path / "run", say=lambda text: None)
    assert not (tmp_path / "run").exists()


BUDGETS = {"nano": (0.08, None), "base": (0.05, 0.15)}


@pytest.mark.parametrize(("name", "wanted"), BUDGETS.items(), ids=BUDGETS)
def test_a_shipped_model_has_the_budgets_of_its_own(tmp_path, name, wanted):
    made = compiling.compile_model(name, [FLOAT], overrides=["teacher=null"], folder=tmp_path / "run")
    budgets = bundle.read(made.bundles[FLOAT.name]).budgets
    assert (budgets.int8_drop_db, budgets.int8_worst_db) == wanted


@pytest.mark.parametrize(("name", "wanted"), BUDGETS.items(), ids=BUDGETS)
def test_a_shipped_model_is_quantized_within_the_budgets_of_its_own(photos, tmp_path, monkeypatch, name, wanted):
    def keep(*given: object, **how: object) -> None:
        limits = [value for value in given if isinstance(value, budget.Budget)]
        raise LimitError(f"within {limits}")

    monkeypatch.setattr(budget, "keep", keep)
    told = ["teacher=null", "quantization.change_basis=false", "quantization.qat.steps=0"]
    told.append(f"data.calibration={photos / 'held_out'}")
    allowed = budget.Budget(mean_db=wanted[0], worst_db=wanted[1])
    with pytest.raises(LimitError, match=re.escape(f"within [{allowed}]")):
        compiling.compile_model(name, [ONNX], overrides=told, folder=tmp_path / "run")


def test_a_network_of_two_planes_is_refused(tmp_path):
    net = torch.nn.Conv2d(2, 2, 3, padding=1).eval()
    path = export_onnx(net, channels=2, takes_sigma=False, stride=8, out=tmp_path / "two.onnx")
    with pytest.raises(InputError, match="'two' takes 2 channels; edgekit compiles networks for 1 or 3"):
        compiling.compile_model(str(path), [FLOAT], folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def report_of(*psnr_mdb: int) -> QualityReport:
    """Return figures of pictures that are called by their place."""
    found = tuple(PictureQuality(name=str(i), psnr_mdb=x, ssim_e5=0) for i, x in enumerate(psnr_mdb))
    protocol = Protocol(
        pictures="x",
        pictures_sha256="0" * 64,
        noise="gaussian",
        sigma255=25.0,
        seeds=(0,),
        stride=8,
        output="float32",
    )
    mean = sum(psnr_mdb) // len(psnr_mdb)
    return QualityReport(protocol=protocol, pictures=found, psnr_mdb=mean, ssim_e5=0, nonfinite_pixels=0)


def test_weights_that_harm_one_picture_more_than_little_are_told_though_the_mean_rose():
    before = report_of(30_000, 31_000, 32_000)
    assert distill._harm(before, report_of(30_500, 31_000 - distill.HARM_MDB, 33_000)) == ""
    harm = distill._harm(before, report_of(30_500, 31_000 - distill.HARM_MDB - 1, 33_000))
    assert harm.startswith("training made the held-out picture '1' worse by 0.021 dB (the mean went from 31.000 to 31.")


def test_int8_looks_at_the_middle_of_large_pictures(recipe, tmp_path):
    """All maps of a picture are held in memory at once, about a GiB for each megapixel of nano."""
    rows = np.arange(8 * 600).reshape(8, 600, 1) % 251
    for index, plane in enumerate(np.broadcast_to(rows, (8, 600, 700)).astype(np.uint8)):
        Image.fromarray(plane if index else plane[:40, :90]).save(tmp_path / f"{index}.png")
    data = dataclasses.replace(recipe.data, calibration=str(tmp_path))
    shown = int8.calibration(dataclasses.replace(recipe, data=data), 8)
    assert {noisy.shape for noisy, _ in shown} == {(1, 1, 40, 96), (1, 1, 512, 512)}
    whole = pictures.held_out(data)
    large = whole.pictures[1].pixels
    (middle,) = sets.middles(sets.PictureSet(name="one", pictures=whole.pictures[1:2]))
    assert large.shape == (1, 600, 700)
    assert np.array_equal(middle.pixels, large[:, 44:556, 94:606])


V3 = Model(model="nano", weights="random", options={"activation": "hardswish"})


@pytest.mark.parametrize(
    ("name", "changes", "told"),
    [
        ("linux-x86_64", {"quantization": Quantization(mode="dynamic")}, r"dynamic INT8 is ONNX Runtime's alone"),
        ("android-arm64", {"quantization": Quantization(keep_float=("head",))}, r"keep_float is \[head\], and edgekit"),
        ("android-arm64", {"student": V3}, r"HardSwish .* is not computed in integers"),
    ],
    ids=["no such INT8", "no float layers", "no such kernel"],
)
def test_what_cannot_be_compiled_is_refused_before_any_training(recipe, tmp_path, name, changes, told):
    wanted = [target.load(name)]
    pytest.importorskip({"openvino": "openvino", "tvm": "tvm"}[wanted[0].engine])
    changed = dataclasses.replace(recipe, **changes)
    with pytest.raises(UnsupportedError, match=told):
        whole.run_recipe(changed, wanted, tmp_path / "run", say=lambda text: None)
    with pytest.raises(UnsupportedError, match=told):
        plan.plan(changed, wanted, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# A user's own networks


class Colour(torch.nn.Module):
    """A user's network: colour, blind, three convolutions."""

    channels, stride = 3, 1

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.second = torch.nn.Conv2d(8, 8, 3, padding=1)
        self.last = torch.nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, noisy: torch.Tensor) -> torch.Tensor:
        return noisy - self.last(torch.relu(self.second(torch.relu(self.first(noisy)))))


@pytest.fixture(scope="module")
def own_weights(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("own") / "colour.safetensors"
    weights.save(Colour().state_dict(), path)
    return path


@pytest.fixture(scope="module")
def own(own_weights, tmp_path_factory) -> compiling.Compiled:
    folder = tmp_path_factory.mktemp("own") / "run"
    return compiling.compile_model("test_pipeline:Colour", [FLOAT], weights=own_weights, folder=folder)


def test_a_users_class_is_compiled_with_its_weights(own, own_weights):
    folder = own.bundles[FLOAT.name]
    net = Colour()
    weights.load_into(net, own_weights)
    noisy = np.random.default_rng(0).random((1, 3, 48, 40), dtype=np.float32)
    with torch.no_grad():
        want = net(torch.from_numpy(noisy)).numpy()
    assert agreement_db(denoise(folder / "model.fp32.onnx", noisy, 0.0), want) > 90
    links = bundle.read(folder).chain
    assert [link.kind for link in links] == ["student", "fused", "onnx", "simplified", "artifact"]
    assert links[0].sha256 == files.sha256(own_weights)
    assert [link.made_from for link in links] == [None, *(link.sha256 for link in links[:-1])]


@pytest.mark.slow
def test_a_users_onnx_file_is_quantized_and_compiled(own, tmp_path):
    path = tmp_path / "my-net.onnx"
    shutil.copyfile(own.bundles[FLOAT.name] / "model.fp32.onnx", path)
    compiled = compiling.compile_model(str(path), [ONNX], folder=tmp_path / "run")
    folder = compiled.bundles["onnx"]
    manifest = bundle.read(folder)
    assert [link.kind for link in manifest.chain] == ["onnx", "simplified", "int8", "artifact"]
    assert manifest.chain[0].sha256 == files.sha256(path)
    assert manifest.chain[-1].sha256 == files.sha256(folder / "model.int8.onnx")
    assert (manifest.model.name, manifest.model.channels) == ("my_net", 3)
    noisy = np.random.default_rng(0).random((1, 3, 48, 40), dtype=np.float32)
    assert agreement_db(denoise(folder / "model.int8.onnx", noisy, 0.0), denoise(path, noisy, 0.0)) > 30
    again = compiling.compile_model(str(path), [ONNX], folder=tmp_path / "run")
    assert set(again.reused) == {"simplify", "quantize/onnxruntime", "bundles/onnx"}


class Sloped(Colour):
    """The same weights, and a slope that is not among them."""

    slope = 0.0

    def forward(self, noisy: torch.Tensor) -> torch.Tensor:
        return noisy - self.last(torch.nn.functional.leaky_relu(self.first(noisy), self.slope))


def test_a_users_class_that_changed_is_compiled_anew_from_the_same_weights(own_weights, tmp_path, monkeypatch):
    def compiled() -> compiling.Compiled:
        return compiling.compile_model("test_pipeline:Sloped", [FLOAT], weights=own_weights, folder=tmp_path / "run")

    made = compiled()
    artifact = made.bundles[FLOAT.name] / "model.fp32.onnx"
    before = artifact.read_bytes()
    assert set(compiled().reused) == {"fuse", "export", "simplify", f"bundles/{FLOAT.name}"}
    monkeypatch.setattr(Sloped, "slope", 0.5)
    assert compiled().reused == ()
    assert artifact.read_bytes() != before


def test_an_onnx_file_is_another_when_the_weights_beside_it_are(own, tmp_path):
    path = tmp_path / "net.onnx"
    model = onnx.load(own.bundles[FLOAT.name] / "model.fp32.onnx")

    def write(factor: float) -> bytes:
        one = model.graph.initializer[0]
        one.CopyFrom(onnx.numpy_helper.from_array(factor * onnx.numpy_helper.to_array(one), one.name))
        copy = onnx.ModelProto.FromString(model.SerializeToString())
        (tmp_path / "net.data").unlink(missing_ok=True)
        onnx.save(copy, path, save_as_external_data=True, location="net.data", size_threshold=0)
        return path.read_bytes()

    def compiled(**how: bool) -> compiling.Compiled:
        return compiling.compile_model(str(path), [FLOAT], folder=tmp_path / "run", **how)

    before = write(1.0)
    artifact = compiled().bundles[FLOAT.name] / "model.fp32.onnx"
    weights_before = artifact.read_bytes()
    assert set(compiled().reused) == {"simplify", f"bundles/{FLOAT.name}"}
    assert write(0.5) == before
    with pytest.raises(InputError, match=r"holds another run \(compiles\.sha256 is"):
        compiled()
    assert compiled(overwrite=True).reused == ()
    assert artifact.read_bytes() != weights_before


def test_an_onnx_file_of_any_name_and_stride_is_compiled_and_takes_any_picture(tmp_path):
    net = tiny.Deep().eval()
    path = export_onnx(net, channels=1, takes_sigma=False, stride=16, out=tmp_path / "1 my net (1).onnx")
    folder = compiling.compile_model(str(path), [FLOAT], folder=tmp_path / "run").bundles[FLOAT.name]
    manifest = bundle.read(folder)
    assert (manifest.model.name, manifest.model.stride) == ("1_my_net__1_", 16)
    noisy = np.random.default_rng(0).random((1, 1, 72, 40), dtype=np.float32)
    for what in (folder, path):
        assert denoising.open_model(str(what))(noisy, 0.1).shape == noisy.shape


class Mixed(Colour):
    """An operator that edgekit does not know the reach of."""

    def forward(self, noisy: torch.Tensor) -> torch.Tensor:
        return noisy - self.last(torch.softmax(self.first(noisy), 1))


def test_a_network_whose_reach_is_not_known_is_compiled_for_pictures_in_one_piece(own_weights, tmp_path):
    tiled = dataclasses.replace(FLOAT, name="tiled", input=InputShape(height=48, width=48))
    compiled = compiling.compile_model(
        "test_pipeline:Mixed", [FLOAT, tiled], weights=own_weights, folder=tmp_path / "run"
    )
    for folder in compiled.bundles.values():
        assert bundle.read(folder).model.halo_px is None
        assert "(Softmax): how far it looks is not known" in (folder / "README.md").read_text(encoding="utf-8")
    noisy = np.random.default_rng(0).random((1, 3, 60, 44), dtype=np.float32)
    whole_one = denoising.open_model(str(compiled.bundles[FLOAT.name]))(noisy, 0.1)
    tile = denoising.open_model(str(compiled.bundles["tiled"]))
    assert whole_one.shape == noisy.shape
    assert tile(noisy[..., :40, :], 0.1).shape == (1, 3, 40, 44)
    with pytest.raises(InputError, match="halo"):
        tile(noisy, 0.1)


@pytest.fixture
def in_pieces(monkeypatch) -> Callable[[str], tuple[list[tuple[int, ...]], float]]:
    """Denoise a picture that is large here, and return the shapes of its pieces and the largest error."""
    monkeypatch.setattr(denoising, "_AT_ONCE", 100 * 100)
    monkeypatch.setattr(denoising, "_PIECE", 40)
    noisy = np.random.default_rng(0).random((1, 1, 197, 135), dtype=np.float32)

    def found(what: str) -> tuple[list[tuple[int, ...]], float]:
        opened, shapes = denoising.open_model(what), list[tuple[int, ...]]()

        def denoise(piece, sigma):
            shapes.append(piece.shape[2:])
            return opened.denoise(piece, sigma)

        whole = dataclasses.replace(opened, reach=None)(noisy, 0.1)
        pieces = dataclasses.replace(opened, denoise=denoise)(noisy, 0.1)
        return shapes, float(np.abs(pieces - whole).max())

    return found


def test_a_large_picture_is_denoised_in_pieces_that_give_the_same(in_pieces, tmp_path):
    net = networks.shipped("nano").net
    export_onnx(net, channels=1, takes_sigma=True, stride=net.stride, out=tmp_path / "mine.onnx")
    bundle_of_nano = compiling.compile_model("nano", [FLOAT], folder=tmp_path / "run").bundles[FLOAT.name]
    for what in ("nano", str(tmp_path / "mine.onnx"), str(bundle_of_nano)):
        shapes, error = in_pieces(what)
        # A halo of 40 pixels on each side of 40.
        assert shapes == [(120, 120)] * 6
        assert error < 1e-6


def test_a_picture_that_has_to_be_looked_at_whole_is_not_cut(in_pieces, tmp_path):
    dynamic = ["quantization.mode=dynamic", "teacher=null"]
    made = compiling.compile_model("nano", [ONNX], folder=tmp_path / "run", overrides=dynamic).bundles[ONNX.name]
    # Its channels are weighted by means over all pixels; ranges are taken from all pixels.
    for what in ("base-v3", str(made)):
        assert in_pieces(what) == ([(200, 136)], 0.0)


def test_int8_that_training_does_not_follow_is_made_without_it(own_weights, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(int8, "_UNTRAINED", {"int8": -1e6, "int16": -1e6})  # So that there is a loss to train away.
    overrides = ["budgets.int8_drop_db=10.0", "data.evaluation_pictures=1", "teacher=null"]
    with caplog.at_level(logging.WARNING, logger="edgekit"):
        compiled = compiling.compile_model(
            "test_pipeline:Mixed", [ONNX], weights=own_weights, folder=tmp_path / "run", overrides=overrides
        )
    assert any("(Softmax): an operator, which quantization-aware training does not" in told for told in caplog.messages)
    made = next(s for s in run.read_stages(compiled.folder) if s.name == "quantize/onnxruntime")
    assert made.facts["trained"] is False
    assert made.facts["integer_macs_permille"] > 500
    assert not list(compiled.folder.glob("qat-*"))


def test_int8_is_trained_once_more_at_lower_rates_where_that_was_not_enough(photos, tmp_path, monkeypatch, caplog):
    """Whoever stops the second training, or what comes after it, goes on to the same graph."""
    told = ["budgets.int8_drop_db=0.001", "teacher=null", "quantization.change_basis=false"]
    told += [
        f"quantization.qat.{setting}" for setting in ("steps=4", "patch=32", "rate=0.2", "checkpoint_seconds=1e-9")
    ]
    told += [f"data.train=[{photos}/train]", f"data.calibration={photos}/held_out", "data.evaluation_pictures=1"]
    train, rates = int8.qat.finetune, list[float]()

    def compiled(name: str) -> tuple[str, bytes]:
        try:
            compiling.compile_model("nano", [ONNX], folder=tmp_path / name, overrides=told)
        except LimitError as error:
            return str(error), b""
        return "", next((tmp_path / name).rglob("student.int8.onnx")).read_bytes()

    def counted(**given):
        rates.append(given["settings"].rate)
        return train(**given)

    def stopped(**given):
        if rates:
            raise KeyboardInterrupt
        return counted(**given)

    def interrupted(*given, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr(int8.qat, "finetune", counted)
    with caplog.at_level(logging.INFO, logger="edgekit"):
        whole_way = compiled("whole")
    assert rates == [0.2, pytest.approx(0.02)]
    assert "INT8 still loses too much: training it once more, at a tenth of the rates" in caplog.messages
    rates.clear()
    monkeypatch.setattr(int8.qat, "finetune", stopped)
    with pytest.raises(KeyboardInterrupt):
        compiled("parts")
    assert len(list((tmp_path / "parts").glob("qat-onnxruntime/*"))) == 2
    monkeypatch.setattr(int8.qat, "finetune", train)
    keep = int8.budget.keep
    monkeypatch.setattr(int8.budget, "keep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compiled("parts")
    monkeypatch.setattr(int8.budget, "keep", keep)
    assert len(list((tmp_path / "parts").glob("qat-onnxruntime/*"))) == 2
    rates.clear()
    monkeypatch.setattr(int8.qat, "finetune", counted)
    assert compiled("parts") == whole_way
    assert rates == [0.2, pytest.approx(0.02)]
    assert not list((tmp_path / "parts").glob("qat-*"))


def test_bundles_of_a_student_that_was_trained_anew_are_not_verified_for_it(copied, recipe):
    assert [folder.name for folder in verify.bundles_of(copied)] == ["onnx", "onnx-float32"]
    with run.open_run(copied, None) as opened:
        distill.train_student(opened, recipe, progress=distill.silent, alone=True)
    with pytest.raises(InputError, match=r"bundles/onnx: was compiled from another student .* --target onnx"):
        verify.bundles_of(copied)
    compiling.compile_model(str(copied), [ONNX, FLOAT])
    assert [folder.name for folder in verify.bundles_of(copied)] == ["onnx", "onnx-float32"]


def test_two_targets_of_one_name_are_refused_unless_they_are_the_same(copied):
    other = dataclasses.replace(FLOAT, limits=Limits(size_mib=1.0))
    with pytest.raises(InputError, match="two different targets are called 'onnx-float32'"):
        compiling.compile_model(str(copied), [FLOAT, other])
    assert list(compiling.compile_model(str(copied), [FLOAT, FLOAT]).bundles) == [FLOAT.name]


class GivesNoise(Colour):
    """A network of another convention: it gives the noise and not the picture."""

    def forward(self, noisy: torch.Tensor) -> torch.Tensor:
        return noisy - super().forward(noisy)


def test_a_network_that_makes_pictures_worse_is_told_by_compile_and_verify(own_weights, own, tmp_path, caplog):
    name, folder = "test_pipeline:GivesNoise", tmp_path / "run"
    with caplog.at_level(logging.WARNING, logger="edgekit"):
        made = compiling.compile_model(name, [FLOAT], weights=own_weights, folder=folder)
    said = r"'givesnoise' makes pictures worse in FP32: [45]\.\d\d dB from 20\.\d\d at noise level 25; does it give"
    assert re.search(said, caplog.text)
    notes = verify.verify(made.bundles[FLOAT.name], settings=verify.Settings(seconds=0.1)).notes
    assert re.search(said, notes[0])


def test_a_class_in_the_current_folder_is_found(tmp_path, monkeypatch, own_weights):
    (tmp_path / "my_colour_net.py").write_text("from test_pipeline import Colour\n\nclass Mine(Colour):\n    pass\n")
    monkeypatch.chdir(tmp_path)
    assert networks.from_class("my_colour_net:Mine", own_weights).net.channels == 3


@pytest.mark.parametrize(
    ("name", "with_weights", "said"),
    [
        ("test_pipeline:Colour", False, "needs its weights; add --weights FILE.safetensors"),
        ("test_pipeline:Color", True, "cannot be made: .*no attribute 'Color'"),
        (":Colour", True, "':Colour' names no class; give package.module:Class"),
        ("test_pipeline:", True, "'test_pipeline:' names no class; give package.module:Class"),
        ("no_such_module:Net", True, "cannot be made: ModuleNotFoundError: No module named 'no_such_module'"),
        ("test_pipeline:TEACHER", True, "cannot be made: .*not callable"),
        ("pathlib:Path", True, "is a PosixPath, not a torch.nn.Module"),
        ("torch.nn:Identity", True, "'first.bias' has no place in the network"),
    ],
    ids=[
        "no weights",
        "no such class",
        "no module",
        "no name",
        "no such module",
        "no class",
        "no network",
        "other weights",
    ],
)
def test_a_class_that_cannot_be_used_is_refused(own_weights, name, with_weights, said):
    with pytest.raises(InputError, match=said):
        networks.from_class(name, own_weights if with_weights else None)


def test_an_onnx_file_does_not_serve_a_target_that_compiles_from_torch(own, tmp_path, monkeypatch):
    pytest.importorskip("coremltools")
    path = shutil.copyfile(own.bundles[FLOAT.name] / "model.fp32.onnx", tmp_path / "net.onnx")
    with pytest.raises(UnsupportedError, match="'ios-arm64' compiles from torch, and 'net' is an ONNX file"):
        compiling.compile_model(str(path), [FLOAT, target.load("ios-arm64")], folder=tmp_path / "run")
    assert not (tmp_path / "run").exists(), "nothing is made for the other target before"


@pytest.mark.parametrize("what", ["nanno", "no/such/folder", "missing.onnx"])
def test_a_model_that_is_not_there_is_refused_by_name(tmp_path, monkeypatch, what):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=what):
        compiling.compile_model(what, [FLOAT])
    assert not (tmp_path / "runs").exists()


# Pictures


def test_one_folder_in_all_places_is_divided_and_shares_no_picture(tmp_path):
    source = tmp_path / "many"
    source.mkdir()
    for seed in range(80):
        Image.fromarray(dead_leaves(seed, 32, 32)[0]).save(source / f"{seed}.png")
    chosen = pictures.load(Data(train=(str(source),), evaluation=str(source), evaluation_pictures=80))
    hashes = [{p.sha256 for p in s} for s in (chosen.train, chosen.held_out, chosen.evaluation)]
    assert all(hashes)
    assert sum(map(len, hashes)) == len(set.union(*hashes)) == 80


def test_folders_of_one_name_are_told_apart(tmp_path):
    data = tiny.like_named(tiny.write_pictures(tmp_path / "set"))
    before = pictures.load(data).digests()
    assert len(set(before.values())) == 3
    Image.fromarray(dead_leaves(99, 64, 64)[0]).save(tmp_path / "set" / "held_out" / "images" / "0.png")
    after = pictures.load(data).digests()
    assert {role for role in before if before[role] != after[role]} == {"held_out"}


def test_pictures_that_came_into_a_runs_folder_later_are_looked_at_before_int8_is_trained_on_them(photos, tmp_path):
    mine = Path(shutil.copytree(photos, tmp_path / "mine"))
    recipe = tiny.recipe(mine, training=STEPS)
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, evaluation="embedded"))
    distill.distill(recipe, tmp_path / "run")
    compiling.compile_model(str(tmp_path / "run"), [ONNX])
    assert "quantize/onnxruntime" in compiling.compile_model(str(tmp_path / "run"), [ONNX]).reused
    Image.fromarray(dead_leaves(98, 64, 64)[0]).save(mine / "train" / "later.png")
    assert "quantize/onnxruntime" not in compiling.compile_model(str(tmp_path / "run"), [ONNX]).reused
    evaluated = pictures.load(recipe.data).evaluation.pictures[0].pixels[0]
    Image.fromarray(evaluated[100:356, 120:376].copy()).save(mine / "train" / "crop.png")
    with pytest.raises(InputError, match=r"crop\.png"):
        compiling.compile_model(str(tmp_path / "run"), [ONNX])


def test_pictures_to_choose_on_that_came_later_are_looked_at_where_int8_is_not_trained_too(photos, tmp_path):
    mine = Path(shutil.copytree(photos, tmp_path / "mine"))
    large = dead_leaves(95, 256, 256)[0]
    Image.fromarray(large).save(mine / "evaluation" / "0.png")
    recipe = tiny.recipe(mine, training=STEPS)
    untrained = dataclasses.replace(recipe.quantization, qat=dataclasses.replace(recipe.quantization.qat, steps=0))
    distill.distill(dataclasses.replace(recipe, quantization=untrained), tmp_path / "run")
    shutil.rmtree(mine / "train")
    assert set(compiling.compile_model(str(tmp_path / "run"), [ONNX]).bundles) == {ONNX.name}
    Image.fromarray(large[40:240, 40:240].copy()).save(mine / "held_out" / "crop.png")
    with pytest.raises(InputError, match=r"'crop.png' of held_out.* shows what is kept back as '0.png' of evaluation"):
        compiling.compile_model(str(tmp_path / "run"), [ONNX])
    shutil.copyfile(mine / "evaluation" / "1.png", mine / "held_out" / "crop.png")
    with pytest.raises(InputError, match=r"'crop.png' of held_out and '1.png' of evaluation are the same picture"):
        compiling.compile_model(str(tmp_path / "run"), [ONNX])


@pytest.fixture
def own_evaluation(photos, tmp_path) -> tuple[Path, Recipe]:
    """A trained run in `run`, and its recipe, whose folders lie in `mine`."""
    mine = Path(shutil.copytree(photos, tmp_path / "mine"))
    recipe = tiny.recipe(mine, training=STEPS)
    distill.distill(recipe, tmp_path / "run")
    return mine, recipe


@pytest.mark.parametrize("seen", ["train", "held_out"])
@pytest.mark.parametrize("wanted", [FLOAT, ONNX], ids=["float32", "int8"])
def test_a_student_is_not_judged_by_a_picture_that_it_learned_from(own_evaluation, tmp_path, seen, wanted):
    mine, _ = own_evaluation
    shutil.copyfile(mine / seen / "5.png", mine / "evaluation" / "0.png")
    if seen == "train":
        (mine / seen / "5.png").unlink()
    with pytest.raises(InputError, match=r"run: its student learned from '.*/5.png', which is '0.png' of evaluation"):
        compiling.compile_model(str(tmp_path / "run"), [wanted])
    assert not (tmp_path / "run" / "bundles").exists()


def test_a_student_is_not_judged_by_a_part_of_what_it_learned_from(photos, tmp_path):
    mine = Path(shutil.copytree(photos, tmp_path / "mine"))
    large = dead_leaves(97, 256, 256)[0]
    Image.fromarray(large).save(mine / "train" / "large.png")
    distill.distill(tiny.recipe(mine, training=STEPS), tmp_path / "run")
    Image.fromarray(large[40:240, 40:240].copy()).save(mine / "evaluation" / "0.png")
    with pytest.raises(InputError, match=r"'large.png' of train.* shows what is kept back as '0.png' of evaluation"):
        compiling.compile_model(str(tmp_path / "run"), [FLOAT])


def test_a_student_may_be_judged_by_other_pictures_than_when_it_was_trained(own_evaluation, tmp_path):
    mine, _ = own_evaluation
    Image.fromarray(dead_leaves(96, 64, 64)[0]).save(mine / "evaluation" / "0.png")
    assert set(compiling.compile_model(str(tmp_path / "run"), [FLOAT]).bundles) == {FLOAT.name}
    shutil.rmtree(tmp_path / "run" / "01-pictures")
    with pytest.raises(IntegrityError, match=r"pictures.json: is missing, and says which pictures"):
        compiling.compile_model(str(tmp_path / "run"), [FLOAT])


def test_the_training_pictures_may_be_gone_where_the_evaluation_pictures_are_those_of_then(own_evaluation, tmp_path):
    mine, _ = own_evaluation
    shutil.rmtree(mine / "train")
    shutil.rmtree(tmp_path / "run" / "01-pictures")
    assert set(compiling.compile_model(str(tmp_path / "run"), [FLOAT]).bundles) == {FLOAT.name}


def test_where_the_training_pictures_are_gone_other_evaluation_pictures_are_looked_for_in_the_list_alone(
    own_evaluation, tmp_path, caplog
):
    mine, _ = own_evaluation
    learned = (mine / "train" / "5.png").read_bytes()
    shutil.rmtree(mine / "train")
    Image.fromarray(dead_leaves(96, 64, 64)[0]).save(mine / "evaluation" / "0.png")
    with caplog.at_level("INFO", logger="edgekit"):
        assert set(compiling.compile_model(str(tmp_path / "run"), [FLOAT]).bundles) == {FLOAT.name}
    assert "parts of evaluation are not looked for there" in caplog.text
    (mine / "evaluation" / "0.png").write_bytes(learned)
    with pytest.raises(InputError, match=r"its student learned from '.*/5.png', which is '0.png' of evaluation"):
        compiling.compile_model(str(tmp_path / "run"), [FLOAT])


def test_a_student_is_not_judged_by_the_list_of_a_training_that_did_not_end(own_evaluation, tmp_path, monkeypatch):
    mine, recipe = own_evaluation
    (mine / "train" / "5.png").rename(mine / "evaluation" / "0.png")

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(distill.loop, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        distill.distill(recipe, tmp_path / "run")
    with pytest.raises(InputError, match="learned from other pictures than it lists by now, and is not trained anew"):
        compiling.compile_model(str(tmp_path / "run"), [FLOAT])


def test_a_list_of_pictures_that_an_older_edgekit_wrote_is_refused_by_name(own_evaluation, tmp_path):
    mine, _ = own_evaluation
    listing, record = tmp_path / "run" / "01-pictures" / "pictures.json", tmp_path / "run" / "run.json"
    before = files.sha256(listing)
    listing.write_text('{"train": {"5.png": "0123"}}')
    # Of the student's inputs as well.
    record.write_text(record.read_text().replace(before, files.sha256(listing)))
    assert set(compiling.compile_model(str(tmp_path / "run"), [FLOAT]).bundles) == {FLOAT.name}
    Image.fromarray(dead_leaves(96, 64, 64)[0]).save(mine / "evaluation" / "0.png")
    with pytest.raises(InputError, match=r"pictures.json: was written by another version of edgekit"):
        compiling.compile_model(str(tmp_path / "run"), [FLOAT])


@pytest.mark.parametrize("judged", ["held_out", "evaluation"])
def test_a_picture_that_is_too_small_for_a_figure_is_named_before_anything_is_trained(photos, tmp_path, judged):
    mine = Path(shutil.copytree(photos, tmp_path / "mine"))
    Image.fromarray(dead_leaves(96, 64, 64)[0][:10].copy()).save(mine / judged / "1.png")
    with pytest.raises(InputError, match=rf"'1.png' of {judged} is 10x64 pixels; SSIM needs 11 a side; take it out"):
        distill.distill(tiny.recipe(mine, training=STEPS), tmp_path / "run")
    assert not (tmp_path / "run" / "02-student.state").exists()
    Image.fromarray(dead_leaves(96, 64, 64)[0][:11].copy()).save(mine / judged / "1.png")
    distill.distill(tiny.recipe(mine, training=STEPS), tmp_path / "run")


def test_every_picture_of_every_folder_is_used(tmp_path):
    for seed in range(120):
        (tmp_path / ("first" if seed < 80 else "second")).mkdir(exist_ok=True)
        folder = tmp_path / ("first" if seed < 80 else "second")
        Image.fromarray(dead_leaves(seed, 32, 32)[0]).save(folder / f"{seed}.png")
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    alone = pictures.load(Data(train=(first,)))
    both = pictures.load(Data(train=(first, second)))
    assert sets.digest(both.held_out) == sets.digest(alone.held_out)
    assert (len(alone.train) + len(alone.held_out), len(both.train)) == (80, len(alone.train) + 40)
    judged = pictures.load(Data(train=(first, second), evaluation=second, evaluation_pictures=40))
    assert sets.digest(judged.held_out) == sets.digest(alone.held_out)
    assert len(judged.train) + len(judged.held_out) + len(judged.evaluation) == 120


def test_a_patch_that_does_not_fit_is_mended_in_the_same_folder(photos, tmp_path):
    with pytest.raises(InputError, match="is 20, no multiple of the networks' stride 8"):
        distilled(photos, tmp_path / "run", training=tiny.training(steps=5, patch=20))
    distilled(photos, tmp_path / "run", training=tiny.training(steps=5, patch=16))
    with pytest.raises(InputError, match="holds another run"):
        distilled(photos, tmp_path / "run", training=tiny.training(steps=5, patch=24))


def test_a_picture_in_two_sets_is_refused(photos, tmp_path):
    mixed = shutil.copytree(photos / "train", tmp_path / "mixed")
    shutil.copyfile(photos / "evaluation" / "0.png", mixed / "again.png")
    data = Data(train=(str(mixed),), calibration=str(photos / "held_out"), evaluation=str(photos / "evaluation"))
    with pytest.raises(InputError, match=r"'again.png' of mixed\S* and '0.png' of evaluation are the same picture"):
        pictures.load(data)


def test_pictures_behind_the_first_that_are_evaluated_are_kept_back_too(photos, tmp_path):
    mine = Path(shutil.copytree(photos, tmp_path / "mine"))
    large = dead_leaves(94, 256, 256)[0]
    Image.fromarray(large).save(mine / "evaluation" / "z.png")
    data = dataclasses.replace(tiny.recipe(mine).data, evaluation_pictures=1)
    assert len(pictures.load(data).evaluation) == 1
    Image.fromarray(large[40:240, 40:240].copy()).save(mine / "train" / "crop.png")
    with pytest.raises(InputError, match=r"'crop.png' of train.* shows what is kept back as 'z.png' of evaluation"):
        distill.distill(dataclasses.replace(tiny.recipe(mine, training=STEPS), data=data), tmp_path / "run")
    shutil.copyfile(mine / "evaluation" / "z.png", mine / "train" / "again.png")
    with pytest.raises(InputError, match=r"'again.png' of train\S* and 'z.png' of evaluation are the same picture"):
        pictures.load(data)


def test_calibration_meets_the_levels_that_the_network_was_trained_for(photos):
    held_out = pictures.held_out(tiny.recipe(photos).data)
    samples = pictures.noisy_samples(held_out, Noise(train=(10.0, 30.0), evaluate=25.0), count=9, stride=16)
    assert {round(255 * sigma) for _, sigma in samples} == {15, 25}
    assert {noisy.shape for noisy, _ in samples} == {(1, 1, 64, 64)}
    for noisy, sigma in samples:
        clean = [p.pixels / 255 for p in held_out]
        assert min(np.std(noisy[0] - c) for c in clean) == pytest.approx(sigma, rel=0.05)
    assert len({noisy.tobytes() for noisy, _ in samples}) == 9


@pytest.mark.parametrize(
    ("train", "evaluate", "calibrated", "judged"),
    [
        ((0, 55), 25, (5, 15, 25, 40, 50, 25), (15, 25, 50)),
        ((0, 100), 25, (5, 15, 25, 40, 50, 75, 100, 25), (15, 25, 50, 100)),
        ((60, 130), 80, (75, 100, 80, 130), (80, 100, 130)),
        ((15, 15), 15, (15, 15), (15,)),
        ((0, 20), 10, (5, 15, 10, 20), (10, 15, 20)),
    ],
)
def test_int8_is_looked_at_with_all_noise_that_a_network_is_for(photos, train, evaluate, calibrated, judged):
    noise = Noise(train=train, evaluate=evaluate)
    samples = pictures.noisy_samples(
        pictures.evaluation(tiny.recipe(photos).data), noise, count=len(calibrated), stride=8
    )
    assert tuple(round(255 * sigma) for _, sigma in samples) == calibrated
    assert int8.levels(noise) == judged


def test_golden_files_of_long_names_can_be_written_and_told_apart(photos, tmp_path):
    (picture, *_) = pictures.evaluation(tiny.recipe(photos).data)
    alike = [dataclasses.replace(picture, name=chr(0x68EE) * 79 + ending) for ending in ("a.png", "b.png")]
    found = golden_pictures(sets.PictureSet(name="long", pictures=tuple(alike)), target.load("onnx"))
    assert len({p.name for p in found}) == 2
    write_golden(tmp_path, found, Noise(), lambda noisy, sigma: noisy)
    assert len(list((tmp_path / "golden").iterdir())) == 6


def test_golden_pictures_have_the_targets_shape(photos):
    evaluation = pictures.evaluation(tiny.recipe(photos).data)
    tile = dataclasses.replace(ONNX, input=InputShape(height=32, width=128))
    golden = golden_pictures(evaluation, tile)
    assert [p.pixels.shape for p in golden] == [(1, 32, 128)] * 2
    rows = evaluation.pictures[0].pixels[0, 16:48]
    assert np.array_equal(golden.pictures[0].pixels[0], np.concatenate([rows, rows[:, ::-1]], axis=1))


@pytest.mark.parametrize(
    "changes",
    [
        {"quantization": Quantization(calibration_pictures=8, change_basis=False, method="minmax")},
        {"quantization": Quantization(calibration_pictures=8, change_basis=False, keep_float=("head",))},
        {"distillation": Distillation(output_weight=0.9)},
    ],
    ids=["another calibration", "the head in float", "another distillation"],
)
def test_settings_of_a_recipe_reach_the_artifact(made, photos, tmp_path, changes):
    recipe = tiny.recipe(photos, teacher=TEACHER, training=STEPS, **changes)
    distill.distill(recipe, tmp_path / "run")
    folder = compiling.compile_model(str(tmp_path / "run"), [ONNX]).bundles["onnx"]
    assert files.sha256(folder / "model.int8.onnx") != files.sha256(made.compiled.bundles["onnx"] / "model.int8.onnx")


# Without a name


def test_where_there_is_no_run_the_targets_student_is_compiled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = compiling.compile_model(None, [dataclasses.replace(FLOAT, student="nano")])
    assert made.folder == Path("runs/nano")
    again = compiling.compile_model(None, [dataclasses.replace(FLOAT, student="small")])
    assert (again.folder, again.bundles) == (made.folder, made.bundles)


@pytest.mark.parametrize("students", [("nano", "small"), ("nano", None), (None, None)], ids=str)
def test_targets_of_different_students_or_none_need_a_name(tmp_path, monkeypatch, students):
    monkeypatch.chdir(tmp_path)
    targets = [dataclasses.replace(FLOAT, name=f"t{i}", student=student) for i, student in enumerate(students)]
    with pytest.raises(InputError, match=f"name no one student .t0: {students[0] or 'none'}, t1"):
        compiling.compile_model(None, targets)
    assert not any(tmp_path.iterdir())


# Again


def test_the_run_folder_of_a_shipped_model_is_compiled_like_any_other(tmp_path):
    folder = tmp_path / "run"
    quick = ["quantization.calibration_pictures=8", "quantization.qat.steps=2", "budgets.int8_drop_db=9.0"]
    compiling.compile_model("nano", [FLOAT], folder=folder, overrides=quick)
    again = compiling.compile_model(str(folder), [ONNX])
    assert set(again.bundles) == {ONNX.name}
    assert {"fuse", "export", "simplify", "teacher"} <= set(again.reused)
    chain = [link.sha256 for link in bundle.read(again.bundles[ONNX.name]).chain if link.kind == "student"]
    assert chain == [zoo.card("nano").sha256]


def test_a_run_folder_without_its_network_says_so(own):
    with pytest.raises(InputError, match="holds bundles of a network, not the network; name the network itself"):
        compiling.compile_model(str(own.folder), [FLOAT])
