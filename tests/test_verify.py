"""The verdict: every limit can be kept, broken and left undecided; it is decided from the bundle alone."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import platform
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny
from onnx import numpy_helper

from edgekit import backends, bundle, report, target, zoo
from edgekit.compress.export import export_onnx
from edgekit.data.sets import Picture, PictureSet
from edgekit.data.synthetic import dead_leaves
from edgekit.errors import IncompleteError, InputError, IntegrityError, ToolMissingError, UnsupportedError
from edgekit.measure import host, quality
from edgekit.measure.latency import Paired
from edgekit.pipeline import baseline, bench, denoise, distill, measurement, networks, verify
from edgekit.pipeline import compile as compiling
from edgekit.pipeline.golden import read_golden
from edgekit.recipe import Model
from edgekit.report import Limit, Report
from edgekit.target import InputShape, Isa, Limits, Runner

ONNX = dataclasses.replace(target.load("onnx"), limits=Limits(size_mib=8.0))
QUICK = verify.Settings(seconds=0.2)
EDGEKIT = [sys.executable, "-c", "from edgekit.cli import main; main()", "-q"]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A bundle of a random nano, with the shipped one as its teacher."""
    folder = tmp_path_factory.mktemp("made")
    photos = tiny.write_pictures(folder / "pictures")
    recipe = tiny.recipe(photos, teacher=Model(model="nano"), training=tiny.training(steps=5))
    distill.distill(recipe, folder / "run")
    return compiling.compile_model(str(folder / "run"), [ONNX]).bundles["onnx"]


@pytest.fixture
def copied(made, tmp_path, monkeypatch) -> Path:
    """A copy of the bundle, in an empty folder that is the current one."""
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(made, tmp_path / "bundle")


def changed(folder: Path, *, manifest: Mapping[str, Mapping[str, object]] | None = None) -> Path:
    """Return the bundle with parts of its manifest replaced, and the hashes of its files taken anew."""
    path = folder / bundle.MANIFEST
    raw = json.loads(path.read_text())
    for part, values in (manifest or {}).items():
        raw[part] |= values
    raw["files"] = bundle.hashes(folder)
    path.write_text(json.dumps(raw))
    return folder


def limits(**asked: float | None) -> dict[str, dict[str, object]]:
    return {"target": {"limits": dataclasses.asdict(Limits(**asked))}}


def judged(folder: Path) -> Report:
    return verify.verify(folder, settings=QUICK)


def only(found: Report, name: str) -> Limit:
    (limit,) = (x for x in found.limits if x.name == name)
    return limit


def exit_code(found: Report, **allow: bool) -> int:
    return report.exit_code([found.verdict], **allow)


# Kept and broken


def test_a_bundle_that_keeps_every_limit_passes(copied):
    asked = limits(speedup_vs_fp32=0.01, size_mib=8.0, min_integer_macs=0.5)
    found = judged(changed(copied, manifest={**asked, "budgets": {"int8_worst_db": 9.0}}))
    assert {x.name: x.verdict for x in found.limits} == dict.fromkeys(
        (
            "student_drop_db",
            "int8_drop_db",
            "int8_worst_db",
            "golden_outputs",
            "size_mib",
            "min_integer_macs",
            "speedup_vs_fp32",
        ),
        "pass",
    )
    assert found.rows[-1].worst_drop_mdb >= found.rows[-1].drop_mdb
    assert (found.verdict, exit_code(found)) == ("pass", 0)
    assert found.speedup["shape"] == (1, 1, 256, 256)
    assert found.speedup["pairs"] >= 8


BROKEN = {
    "student_drop_db": {"budgets": {"student_drop_db": -40.0}},
    "int8_drop_db": {"budgets": {"int8_drop_db": 0.0}},
    "int8_worst_db": {"budgets": {"int8_drop_db": 50.0, "int8_worst_db": 0.0}},
    "speedup_vs_fp32": limits(speedup_vs_fp32=1e6),
    "size_mib": limits(size_mib=1e-3),
    "peak_memory_mib": {**limits(peak_memory_mib=63.5), "built": {"facts": {"arena_bytes": 64 * 2**20}}},
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_limit_that_is_broken_fails_the_bundle(copied, name):
    if name in ("int8_drop_db", "int8_worst_db"):
        _offset_artifact(copied, -0.5)
    found = judged(changed(copied, manifest=BROKEN[name]))
    assert {x.verdict for x in found.limits if x.name == name} == {"fail"}
    assert (found.verdict, exit_code(found), exit_code(found, allow_unverified=True)) == ("fail", 3, 3)
    assert all(x.verdict == "pass" for x in found.limits if x.name not in (name, "golden_outputs"))


def test_budgets_that_ask_nothing_of_the_student_have_no_such_limit(copied):
    found = judged(changed(copied, manifest={"budgets": {"student_drop_db": None}}))
    assert found.verdict == "pass"
    assert "student_drop_db" not in {limit.name for limit in found.limits}


def _offset_artifact(folder: Path, offset: float) -> None:
    """Let the artifact add a number to every pixel that it gives."""
    path = folder / "model.int8.onnx"
    model = onnx.load(path)
    _offset(model, offset)
    path.unlink()
    onnx.save(model, path)


def _offset(model: onnx.ModelProto, offset: float) -> None:
    (last,) = (node for node in model.graph.node if "denoised" in node.output)
    last.output[0] = "before_offset"
    model.graph.initializer.append(numpy_helper.from_array(np.float32(offset), "offset"))
    model.graph.node.append(onnx.helper.make_node("Add", ["before_offset", "offset"], ["denoised"], "offset"))


@pytest.mark.parametrize("wrong_at", [15, 50])
def test_an_artifact_that_loses_too_much_at_another_noise_level_fails(copied, wrong_at):
    path = copied / "model.int8.onnx"
    model = onnx.load(path)
    _offset(model, 5.0)
    (added,) = (node for node in model.graph.node if node.name == "offset")
    added.input[1] = "offset_there"
    bounds = [np.float32((wrong_at + side) / 255) for side in (-1, 1)]
    model.graph.initializer.extend(numpy_helper.from_array(b, n) for b, n in zip(bounds, ("low", "high"), strict=True))
    nodes = [
        onnx.helper.make_node("Greater", ["sigma", "low"], ["above"]),
        onnx.helper.make_node("Less", ["sigma", "high"], ["below"]),
        onnx.helper.make_node("And", ["above", "below"], ["there"]),
        onnx.helper.make_node("Cast", ["there"], ["share"], to=onnx.TensorProto.FLOAT),
        onnx.helper.make_node("Mul", ["share", "offset"], ["offset_there"]),
    ]
    for node in nodes:
        model.graph.node.insert(len(model.graph.node) - 1, node)
    path.unlink()
    onnx.save(model, path)
    found = judged(changed(copied, manifest={"budgets": {"int8_drop_db": 5.0, "int8_worst_db": 9.0}}))
    verdicts = {(x.name, "noise levels 15, 25, 50" in x.reason): x.verdict for x in found.limits if "int8_" in x.name}
    assert verdicts == {
        ("int8_drop_db", False): "pass",
        ("int8_drop_db", True): "fail",
        ("int8_worst_db", False): "pass",
        ("int8_worst_db", True): "fail",
    }
    assert found.verdict == "fail"


def test_a_bundle_that_names_no_noise_levels_is_judged_at_its_own(copied):
    raw = json.loads((copied / bundle.MANIFEST).read_text())
    assert raw["protocol"].pop("levels") == [15.0, 25.0, 50.0]
    (copied / bundle.MANIFEST).write_text(json.dumps(raw))
    assert only(judged(copied), "int8_drop_db").reason == "onnxruntime (native)"


@pytest.mark.parametrize("limit_db", [1.001, 1.003])
def test_a_drop_that_is_the_limit_keeps_it(copied, made, tmp_path, timed, limit_db):
    """A thousand times 1.001 is less than 1001 in binary floating point."""
    most_mdb = round(1000 * limit_db)
    assert 1000 * limit_db < most_mdb
    changed(copied, manifest={"budgets": {"student_drop_db": limit_db, "int8_drop_db": limit_db}})
    student = next(row for row in judged(copied).rows if row.name == "student FP32")
    golden = timed.quality.pictures_sha256
    for more, verdict in ((0, "pass"), (1, "fail")):
        lost = dataclasses.replace(timed.quality, psnr_mdb=student.psnr_mdb - most_mdb - more)
        record(tmp_path, made, quality={golden: student.psnr_mdb + most_mdb + more})
        found = verify.verify(copied, settings=QUICK, records=[kept(tmp_path, timed, quality=lost)])
        device = next(x for x in found.limits if x.name == "int8_drop_db" and x.reason.startswith(timed.name))
        assert (only(found, "student_drop_db").verdict, device.verdict) == (verdict, verdict)


def test_an_artifact_that_gives_other_pictures_than_it_was_packed_with_fails(copied):
    for file in (copied / "golden").glob("*.denoised.f32"):
        values = np.fromfile(file, "<f4")
        # 34 dB from the recorded picture.
        (values + 0.02).astype("<f4").tofile(file)
    limit = only(judged(changed(copied)), "golden_outputs")
    assert (limit.verdict, limit.limit, limit.measured) == ("fail", "at least 40 dB alike", "34.0 dB")


def test_one_picture_that_differs_is_enough(copied):
    file = sorted((copied / "golden").glob("*.denoised.f32"))[-1]
    np.full(256 * 256, np.nan, "<f4").tofile(file)
    assert only(judged(changed(copied)), "golden_outputs").verdict == "fail"


def test_the_last_bits_of_another_processor_do_not_fail(copied):
    for file in (copied / "golden").glob("*.denoised.f32"):
        values = np.fromfile(file, "<f4")
        (values + np.random.default_rng(0).normal(0, 0.001, values.shape)).astype("<f4").tofile(file)
    limit = only(judged(changed(copied)), "golden_outputs")
    assert (limit.verdict, limit.measured) == ("pass", "60.0 dB")


@pytest.mark.parametrize(("bits", "saturates", "said"), [(8, True, True), (8, False, False), (7, True, False)])
def test_sums_that_saturate_on_this_processor_are_said(copied, monkeypatch, bits, saturates, said):
    monkeypatch.setattr(host, "sums_saturate", lambda: saturates)
    built = json.loads((copied / bundle.MANIFEST).read_text())["built"]
    found = judged(changed(copied, manifest={"built": {"facts": built["facts"] | {"weight_bits": bits}}}))
    assert any("sums saturate here" in note for note in found.notes) == said


def test_what_must_be_known_of_the_artifact_is_shown(copied, call):
    manifest = json.loads((copied / bundle.MANIFEST).read_text())
    (weights,) = manifest["built"]["notes"]
    assert f"note: {weights}" in call("-q", "verify", copied, "--seconds", "1").out.splitlines()


def test_a_golden_output_of_another_size_is_refused_by_name(copied):
    file = min((copied / "golden").glob("*.denoised.f32"))
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(IntegrityError, match=f"{file}: holds 65535 numbers, not 65536"):
        judged(changed(copied))


def test_an_artifact_that_gives_nan_fails_on_its_quality(copied):
    _offset_artifact(copied, np.nan)
    found = judged(changed(copied))
    assert found.rows[-1].psnr_mdb == 0
    assert {x.verdict for x in found.limits if x.name == "int8_drop_db"} == {"fail"}
    assert only(found, "golden_outputs").verdict == "fail"


# Undecided


def _without_golden(folder: Path) -> None:
    for file in (folder / "golden").glob("*.denoised.f32"):
        file.unlink()


def _without_teacher(folder: Path) -> None:
    (folder / "reference" / "teacher.fp32.onnx").unlink()


UNDECIDED = {
    "no golden outputs": (
        _without_golden,
        {},
        {"golden_outputs": "the bundle records no outputs; compile it where it can be run"},
    ),
    "no teacher": (
        _without_teacher,
        limits(speedup_vs_fp32=1.0),
        dict.fromkeys(
            ("student_drop_db", "speedup_vs_fp32"),
            "the bundle holds no teacher; name one with teacher.model where it is compiled",
        ),
    ),
    "memory that nobody counts": (
        lambda folder: None,
        limits(peak_memory_mib=64.0),
        {"peak_memory_mib": "not measured for this engine"},
    ),
}


@pytest.mark.parametrize(("prepare", "asked", "undecided"), UNDECIDED.values(), ids=UNDECIDED)
def test_what_could_not_be_decided_is_incomplete(copied, prepare, asked, undecided):
    prepare(copied)
    found = judged(changed(copied, manifest=asked))
    assert {x.name: x.reason for x in found.limits if x.verdict == "incomplete"} == undecided
    assert {x.verdict for x in found.limits if x.name not in undecided} == {"pass"}
    assert (found.verdict, exit_code(found), exit_code(found, allow_unverified=True)) == ("incomplete", 7, 0)


def test_a_failure_outweighs_what_could_not_be_decided(copied):
    _without_golden(copied)
    found = judged(changed(copied, manifest=limits(size_mib=1e-3)))
    assert (found.verdict, exit_code(found, allow_unverified=True)) == ("fail", 3)


@pytest.mark.parametrize(
    ("ratios", "verdict"),
    [([2.0] * 8, "pass"), ([0.5] * 8, "fail"), ([0.5, 0.6, 0.7, 0.9, 1.1, 1.3, 1.4, 1.5], "incomplete")],
    ids=["above", "below", "around"],
)
def test_a_speed_up_that_may_lie_on_either_side_of_the_limit_is_not_decided(copied, monkeypatch, ratios, verdict):
    def interleave(teacher, artifact, *, min_pairs, max_seconds):
        teacher()
        artifact()
        return Paired(a_us=tuple(round(1000 * r) for r in ratios), b_us=(1000,) * len(ratios))

    monkeypatch.setattr(verify.latency, "interleave", interleave)
    found = judged(changed(copied, manifest=limits(speedup_vs_fp32=1.0)))
    limit = only(found, "speedup_vs_fp32")
    assert limit.verdict == verdict
    assert ("inconclusive" in limit.reason) == (verdict == "incomplete")
    assert exit_code(found) == {"pass": 0, "fail": 3, "incomplete": 7}[verdict]


def test_the_teachers_row_says_which_engine_timed_it(made, tmp_path):
    pytest.importorskip("openvino")
    run = shutil.copytree(made.parents[1], tmp_path / "run")
    floats = dataclasses.replace(target.load("linux-x86_64"), name="floats", precision="float32")
    for path, how in ((made, "onnxruntime (native)"), (None, "onnxruntime (native), timed in openvino")):
        found = judged(path or compiling.compile_model(str(run), [floats]).bundles["floats"])
        teacher = next(row for row in found.rows if row.name == "teacher FP32")
        assert (teacher.how, teacher.latency_us > 0) == (how, True)


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_a_picture_that_an_engine_does_not_take_is_told_by_its_size(tmp_path, engine):
    pytest.importorskip(engine)
    path = export_onnx(tiny.Deep().eval(), channels=1, takes_sigma=False, stride=16, out=tmp_path / "deep.onnx")
    session = backends.load_onnx(engine).open_onnx(path, threads=1)
    assert session(np.zeros((1, 1, 32, 48), np.float32), 0.1).shape == (1, 1, 32, 48)
    told = r"deep\.onnx: .* cannot run it on a picture of 40x24: .*; give a picture whose sides it takes"
    with pytest.raises(InputError, match=told):
        session(np.zeros((1, 1, 24, 40), np.float32), 0.1)


@pytest.mark.parametrize(
    ("ratio", "verdict", "measured"),
    [
        (9.97, "fail", "9.97x (9.97 to 9.97)"),
        (10.0, "pass", "10.0x (10.0 to 10.0)"),
        (10.004, "pass", "10.004x (10.004 to 10.004)"),
        (12.34, "pass", "12.3x (12.3 to 12.3)"),
    ],
)
def test_a_speed_up_beside_its_limit_is_not_shown_as_the_limit(ratio, verdict, measured):
    paired = Paired(a_us=(round(1000 * ratio),) * 8, b_us=(1000,) * 8)
    timing = verify._Timing(
        paired=paired,
        ratio=verify.latency.ratio_with_bound(paired),
        engine="onnxruntime",
        shape=(1, 1, 256, 256),
        threads=1,
    )
    asked = dataclasses.replace(ONNX, limits=Limits(speedup_vs_fp32=10.0))
    limit = verify._speed_limit(asked, timing, ["native"], "")
    assert (limit.verdict, limit.measured) == (verdict, measured)


def test_a_size_beside_its_limit_is_not_shown_as_the_limit(copied):
    size_mib = (copied / "model.int8.onnx").stat().st_size / 2**20
    for limit_mib, verdict in ((size_mib - 1e-5, "fail"), (size_mib + 1e-5, "pass")):
        limit = only(judged(changed(copied, manifest=limits(size_mib=limit_mib))), "size_mib")
        shown = float(limit.measured.removesuffix(" MiB"))
        assert (limit.verdict, shown > limit_mib) == (verdict, verdict == "fail")


def test_a_figure_that_is_its_limit_keeps_it():
    for found, verdict in ((64.0, "pass"), (np.nextafter(64.0, 65.0), "fail")):
        assert verify._at_most("peak_memory_mib", 64.0, found, "MiB", "").verdict == verdict
    for agreement, verdict in ((40.0, "pass"), (np.nextafter(40.0, 0.0), "fail"), (0.0, "fail"), (np.inf, "pass")):
        (limit,) = verify._golden_limits([("here", agreement)], "")
        assert limit.verdict == verdict


@pytest.mark.parametrize(
    ("engine", "threads", "said"),
    [
        ("openvino", 1, "openvino, 1 thread"),
        ("openvino", 2, "openvino, 2 threads"),
        ("tvm", 1, "onnxruntime, 1 thread"),
        ("tvm", 2, "onnxruntime, 2 threads of the teacher alone"),
    ],
)
def test_a_speed_up_says_whose_threads_were_counted(engine, threads, said):
    """A library is run by its caller's thread alone, whatever --threads says."""
    paired = Paired(a_us=(4000,) * 8, b_us=(1000,) * 8)
    timing = verify._Timing(
        paired=paired,
        ratio=verify.latency.ratio_with_bound(paired),
        engine=said.partition(",")[0],
        shape=(1, 1, 256, 256),
        threads=threads,
    )
    asked = dataclasses.replace(ONNX, engine=engine, limits=Limits(speedup_vs_fp32=2.0))
    assert verify._speed_limit(asked, timing, ["native"], "").reason == f"8 interleaved pairs, {said}"


def test_an_engine_that_is_not_installed_leaves_the_artifact_undecided(copied, monkeypatch):
    monkeypatch.setitem(verify.backends.DOORS, "openvino", "no_such_package.door")
    # The manifest of an OpenVINO bundle differs in these two places; nothing of the artifact is opened.
    asked = {"target": {**limits(speedup_vs_fp32=1.0)["target"], "engine": "openvino"}}
    found = judged(changed(copied, manifest=asked))
    undecided = {x.name for x in found.limits if x.verdict == "incomplete"}
    assert undecided == {"int8_drop_db", "golden_outputs", "speedup_vs_fp32"}
    assert all("pip install 'edgekit[openvino]'" in x.reason for x in found.limits if x.name in undecided)
    assert only(found, "student_drop_db").verdict == "pass"
    assert exit_code(found) == 7


@pytest.mark.emulated
@pytest.mark.slow
def test_an_arm64_library_is_judged_under_qemu_and_undecided_without_it(made, tmp_path, monkeypatch):
    pytest.importorskip("tvm")
    run = shutil.copytree(made.parents[1], tmp_path / "run")
    small = dataclasses.replace(target.load("android-arm64"), input=InputShape(height=64, width=64))
    folder = compiling.compile_model(str(run), [small]).bundles["android-arm64"]
    found = judged(folder)
    verdicts = {(x.name, x.reason): x.verdict for x in found.limits}
    for cpu in small.runner.cpus:
        assert verdicts["int8_drop_db", f"qemu {cpu} (emulated)"] == "pass"
        assert verdicts["golden_outputs", f"qemu {cpu} (emulated)"] == "pass"
    assert {x.name for x in found.limits if x.verdict == "incomplete"} == {"runs_on_target"}
    assert "emulated time is not latency" in only(found, "runs_on_target").reason
    assert all(row.latency_us is None for row in found.rows)
    assert exit_code(found) == 7

    assert only(found, "peak_memory_mib").verdict == "pass"
    shutil.copytree(folder, tmp_path / "small")
    less = judged(changed(tmp_path / "small", manifest=limits(peak_memory_mib=0.01)))
    assert only(less, "peak_memory_mib").verdict == "fail"
    assert exit_code(less) == 3

    monkeypatch.setenv("PATH", str(tmp_path))
    without = judged(folder)
    undecided = {x.name: x.reason for x in without.limits if x.verdict == "incomplete"}
    assert set(undecided) == {"int8_drop_db", "golden_outputs", "runs_on_target"}
    assert all("is on the PATH; install QEMU" in reason for reason in undecided.values())


@pytest.mark.emulated
@pytest.mark.slow
def test_a_bundle_that_nothing_could_run_is_made_again_where_something_can(made, tmp_path, monkeypatch):
    pytest.importorskip("tvm")
    run = shutil.copytree(made.parents[1], tmp_path / "run")
    android = dataclasses.replace(
        target.load("android-arm64"),
        precision="float32",
        input=InputShape(height=64, width=64),
        runner=Runner(kind="qemu", cpus=("cortex-a53",)),
        limits=Limits(),
    )

    def compiled() -> tuple[bool, int]:
        found = compiling.compile_model(str(run), [android])
        outputs = list((found.bundles[android.name] / "golden").glob("*.denoised.f32"))
        return f"bundles/{android.name}" in found.reused, len(outputs)

    with monkeypatch.context() as without_qemu:
        without_qemu.setenv("PATH", str(tmp_path))
        assert compiled() == (False, 0)
        assert compiled() == (True, 0)
    reused, outputs = compiled()
    assert (reused, outputs > 0) == (False, True)
    assert compiled() == (True, outputs)


@pytest.mark.backend
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the library is made for x86 processors")
def test_a_library_for_another_processor_is_delivered_and_undecided_here(made, tmp_path, monkeypatch):
    pytest.importorskip("tvm")
    processor = importlib.import_module("edgekit.backends.tvm.processor")
    # Bit 16 of leaf 1's ECX is reserved, so no processor sets it.
    lacking = {name: (first | 1 << 16, *rest) for name, (first, *rest) in processor._BITS["x86_64"].items()}
    monkeypatch.setitem(processor._BITS, "x86_64", lacking)
    other = dataclasses.replace(
        target.load("linux-x86_64-vnni"),
        precision="float32",
        input=InputShape(height=64, width=64),
        isa=Isa(triple="x86_64-linux-gnu", cpu="x86-64-v2"),
        limits=Limits(speedup_vs_fp32=1.0, peak_memory_mib=64.0),
    )
    run = shutil.copytree(made.parents[1], tmp_path / "run")
    folder = compiling.compile_model(str(run), [other]).bundles[other.name]
    assert not list((folder / "golden").glob("*.denoised.f32"))
    assert "lacks some of the instructions" in bundle.read(folder).protocol.golden_outputs

    found = judged(folder)
    undecided = {x.name: x.reason for x in found.limits if x.verdict == "incomplete"}
    assert set(undecided) == {"int8_drop_db", "golden_outputs", "speedup_vs_fp32"}
    assert all("cannot be run here: this processor lacks some of" in reason for reason in undecided.values())
    assert only(found, "peak_memory_mib").verdict == "pass"
    assert exit_code(found) == 7
    with pytest.raises(IncompleteError, match="cannot be run here: this processor lacks some of"):
        denoise.open_model(str(folder))


@pytest.mark.backend
@pytest.mark.skipif(sys.platform == "darwin", reason="a Mac runs Core ML itself")
def test_a_core_ml_package_is_evaluated_off_a_mac_and_its_engine_undecided(made, tmp_path):
    pytest.importorskip("coremltools")
    run = shutil.copytree(made.parents[1], tmp_path / "run")
    small = dataclasses.replace(target.load("ios-arm64"), input=InputShape(height=64, width=64))
    folder = compiling.compile_model(str(run), [small]).bundles["ios-arm64"]
    found = judged(folder)
    artifact = next(row for row in found.rows if row.name == "artifact")
    package = folder / bundle.read(folder).built.files["artifact"]
    assert package.is_dir()
    assert artifact.size_bytes == sum(p.stat().st_size for p in package.rglob("*") if p.is_file()) > 50_000
    with pytest.raises(UnsupportedError, match=r"'ios-arm64' is only evaluated here \(reference\), not run"):
        bench.bench(folder, "local", settings=bench.Settings(warm_up=0, runs=1, seconds=0))
    assert {x.name for x in found.limits if x.verdict == "incomplete"} == {"runs_on_target"}
    assert only(found, "runs_on_target").reason == ("evaluated without its engine here; the engine itself was not run")
    assert only(found, "int8_drop_db").verdict == "pass"
    assert exit_code(found) == 7


# What a device took


@pytest.fixture(scope="module")
def timed(made) -> measurement.Measurement:
    """What `edgekit bench` measured of the bundle on this machine."""
    return bench.bench(made, "local", settings=bench.Settings(warm_up=0, runs=3, seconds=0, threads=2))


def kept(folder: Path, measured: measurement.Measurement, name: str = "record.json", **changes: object) -> Path:
    return measurement.write(dataclasses.replace(measured, **changes), folder / name)


@pytest.mark.parametrize(("most_ms", "verdict"), [(1e6, "pass"), (1e-3, "fail")])
def test_a_record_of_the_artifact_decides_the_limit_of_its_latency(copied, tmp_path, timed, most_ms, verdict):
    changed(copied, manifest=limits(megapixel_ms=most_ms))
    assert only(judged(copied), "megapixel_ms").reason == (
        "no device was measured: edgekit bench BUNDLE --device DEVICE"
    )
    found = verify.verify(copied, settings=QUICK, records=[kept(tmp_path, timed)])
    limit = only(found, "megapixel_ms")
    assert timed.latency is not None
    assert timed.latency.megapixel is not None
    assert limit.verdict == found.verdict == verdict
    assert limit.measured == f"{timed.latency.megapixel.p50_us / 1000:.2f} ms"
    assert limit.reason == f"{timed.name}, local (native), median of 3 pictures of 256x256, 2 threads"
    (device,) = found.devices
    assert (device.record, device.call, device.threads) == ("record.json", timed.latency.call, 2)
    assert found.as_json()["devices"] == (dataclasses.asdict(device),)


def test_the_pictures_of_a_device_are_judged_like_those_made_here(copied, tmp_path, timed):
    slow = dataclasses.replace(timed.quality, psnr_mdb=timed.quality.psnr_mdb - 11_000, agreement_mdb=30_000)
    files = [kept(tmp_path, timed), kept(tmp_path, timed, "other.json", quality=slow)]
    found = verify.verify(copied, settings=QUICK, records=files)
    here, same, other = (row for row in found.rows if row.name == "artifact")
    assert (same.psnr_mdb, same.drop_mdb) == (here.psnr_mdb, here.drop_mdb)
    assert other.drop_mdb == here.drop_mdb + 11_000
    assert [(x.verdict, x.measured) for x in found.limits if x.name == "golden_outputs"] == [
        ("pass", "equal"),
        ("pass", "equal"),
        ("fail", "30.0 dB"),
    ]
    assert [x.verdict for x in found.limits if x.name == "int8_drop_db"] == ["pass", "pass", "fail", "pass"]


def test_one_seed_of_several_says_nothing_of_their_mean(copied, tmp_path, timed):
    changed(copied, manifest={"protocol": {"seeds": [0, 1]}})
    found = verify.verify(copied, settings=QUICK, records=[kept(tmp_path, timed)])
    here, there, _ = (x for x in found.limits if x.name == "int8_drop_db")
    assert (here.verdict, there.verdict) == ("pass", "incomplete")
    assert there.reason.endswith("its pictures are of one seed of several")
    assert [x.measured for x in found.limits if x.name == "golden_outputs"] == ["equal", "equal"]


def test_a_device_that_timed_no_larger_picture_says_nothing_of_a_megapixel(copied, tmp_path, timed):
    changed(copied, manifest=limits(megapixel_ms=1e6))
    alone = dataclasses.replace(timed.latency, megapixel=None)
    limit = only(verify.verify(copied, settings=QUICK, records=[kept(tmp_path, timed, latency=alone)]), "megapixel_ms")
    assert (limit.verdict, limit.measured) == ("incomplete", "not run")
    assert limit.reason.endswith("no picture larger than a tile was timed")


def test_pictures_with_other_noise_are_not_timed(copied):
    noisy = copied / "golden" / "0.png.noisy.f32"
    (np.fromfile(noisy, "<f4") + np.float32(0.01)).tofile(noisy)
    with pytest.raises(IntegrityError, match="golden: a noisy picture is not what the protocol makes"):
        bench.bench(changed(copied), "local", settings=bench.Settings(warm_up=0, runs=1, seconds=0))


def test_the_teacher_and_the_artifact_are_timed_with_the_threads_that_were_asked_for(copied, monkeypatch):
    door, seen = backends.load("onnxruntime"), []

    def spied(name):
        real = getattr(door, name)

        def spy(*given, **how):
            seen.append((name, how.get("threads", given[-1])))
            return real(*given, **how)

        return spy

    for name in ("open_session", "open_onnx"):
        monkeypatch.setattr(door, name, spied(name))
    verify.verify(copied, settings=dataclasses.replace(QUICK, threads=3))
    assert seen.count(("open_session", 3)) == 1
    # The artifact (by its session), the teacher and the FP32 self; the rows of quality are no figures of time.
    assert seen.count(("open_onnx", 3)) == 3


EMULATED = {"qemu": {"device": "qemu"}, "emulated": {"level": "emulated"}, "no latency": {"latency": None}}


@pytest.mark.parametrize("changes", EMULATED.values(), ids=EMULATED)
def test_emulated_time_decides_nothing_and_says_why(copied, tmp_path, timed, changes):
    changed(copied, manifest=limits(megapixel_ms=1e6))
    found = verify.verify(copied, settings=QUICK, records=[kept(tmp_path, timed, **changes)])
    assert (found.devices, found.verdict) == ((), "incomplete")
    assert found.refused[0].endswith("was emulated, and emulated time is not latency")
    assert only(found, "megapixel_ms").reason.endswith(found.refused[0])


def test_a_record_with_hidden_features_decides_nothing_and_says_why(copied, tmp_path, timed):
    changed(copied, manifest=limits(megapixel_ms=1e6))
    file = kept(tmp_path, timed, hidden=("asimddp", "i8mm"))
    found = verify.verify(copied, settings=QUICK, records=[file])
    assert (found.devices, found.verdict) == ((), "incomplete")
    why = f"record.json: asimddp, i8mm was hidden from the library: it is not what {timed.name} does"
    assert found.refused == (why,)
    assert only(found, "megapixel_ms").reason.endswith(why)


def test_a_record_is_of_the_noise_that_its_bundle_has(made, copied, tmp_path, timed):
    """Another seed of the noise changes the golden pictures, and no byte of the artifact."""
    run = shutil.copytree(made.parents[1], tmp_path / "run")
    recipe = json.loads((run / "run.json").read_text())
    recipe["identity"]["recipe"]["noise"]["seed"] = 1
    (run / "run.json").write_text(json.dumps(recipe))
    again = compiling.compile_model(str(run), [ONNX]).bundles["onnx"]
    assert (again / "model.int8.onnx").read_bytes() == (copied / "model.int8.onnx").read_bytes()
    there = bench.bench(again, "local", settings=bench.Settings(warm_up=0, runs=1, seconds=0))
    (device,) = verify.verify(again, settings=QUICK, records=[kept(tmp_path, there)]).devices
    assert device.psnr_mdb == there.quality.psnr_mdb != timed.quality.psnr_mdb
    for folder, measured in ((again, timed), (copied, there)):
        with pytest.raises(IntegrityError, match="was measured on other golden pictures"):
            verify.verify(folder, settings=QUICK, records=[kept(tmp_path, measured)])


def test_a_device_decides_where_the_artifact_cannot_be_run_here(copied, tmp_path, timed, monkeypatch):
    def open_session(*given: object, **how: object) -> None:
        raise ToolMissingError("no QEMU here")

    monkeypatch.setattr(backends.load("onnxruntime"), "open_session", open_session)
    alone = judged(copied)
    assert {only(alone, name).verdict for name in ("int8_drop_db", "golden_outputs")} == {"incomplete"}
    assert "no QEMU here" in only(alone, "golden_outputs").reason
    kept(tmp_path, timed, "bundle.bench.phone.json")
    found = judged(changed(copied, manifest={"budgets": {"int8_worst_db": 0.5}}))
    worst = only(found, "int8_worst_db")
    assert (worst.verdict, worst.reason) == ("incomplete", "no QEMU here")
    for name in ("int8_drop_db", "golden_outputs"):
        assert (only(found, name).verdict, only(found, name).reason) == ("pass", found.devices[0].how())


def test_a_record_from_before_hidden_features_were_told_is_read(tmp_path, timed):
    file = kept(tmp_path, timed)
    raw = json.loads(file.read_text())
    del raw["hidden"], raw["quality"]["seed"]
    file.write_text(json.dumps(raw))
    assert measurement.read(file) == timed


def test_bench_writes_beside_the_bundle_and_verify_finds_it(copied, call):
    shown = call("bench", "bundle", "--device", "local", "--runs", "2", "--seconds", "0")
    (file,) = Path().glob("bundle.bench.local-*.json")
    assert file.name in shown.out
    shown = call("-q", "verify", "bundle", "--seconds", "1")
    assert shown.code == 0
    assert "a megapixel of 256x256" in shown.out
    assert f"{measurement.read(file).name}, local (native)" in " ".join(shown.out.split())
    written = json.loads(Path("bundle.report.json").read_text())
    assert [device["record"] for device in written["devices"]] == [file.name]


def test_a_record_beside_the_bundle_of_what_was_compiled_before_is_not_counted(copied, tmp_path, timed):
    file = kept(tmp_path, timed, "bundle.bench.old.json", artifact_sha256="0" * 64)
    found = judged(copied)
    assert (found.verdict, found.devices) == ("pass", ())
    (why,) = found.refused
    assert why.startswith(f"{file.name}: was measured of another artifact (000000000000, here ")


@pytest.mark.parametrize("name", ["cut short", "another file", "old", "empty"])
def test_a_record_beside_the_bundle_that_is_none_decides_nothing(copied, name):
    content, _, words = BAD_RECORDS[name]
    Path("bundle.bench.old.json").write_text(content)
    found = judged(copied)
    assert (found.verdict, found.devices) == ("pass", ())
    (why,) = found.refused
    assert why.startswith("bundle.bench.old.json: ")
    assert words in why
    assert str(copied.parent) not in why


FOREIGN = {
    "another artifact": {"artifact_sha256": "0" * 64},
    "other pictures": {"quality": {"pictures_sha256": "0" * 64}},
    "another noise": {"quality": {"sigma255": 15.0}},
    "another seed of it": {"quality": {"seed": 1}},
}


@pytest.mark.parametrize("changes", FOREIGN.values(), ids=FOREIGN)
def test_a_record_of_something_else_is_refused(copied, call, timed, changes):
    if "quality" in changes:
        changes = {"quality": dataclasses.replace(timed.quality, **changes["quality"])}
    kept(copied.parent, timed, **changes)
    call("-q", "verify", "bundle", "--bench", "record.json").refused(6, "record.json: was measured o", "edgekit bench")
    assert not Path("bundle.report.json").exists()


BAD_RECORDS = {
    "missing": (None, 2, "no such file; make one: edgekit bench"),
    "cut short": ("{", 6, "is not a record of edgekit bench"),
    "a list": ("[1]", 6, "is not a record of edgekit bench"),
    "another file": ('{"schema_version": 1, "kind": "edgekit-baseline"}', 2, "its kind is 'edgekit-baseline'"),
    "old": ('{"schema_version": 1, "kind": "edgekit-device-measurement"}', 2, "(schema 1, not 2)"),
    "empty": ('{"schema_version": 2, "kind": "edgekit-device-measurement"}', 6, "'target'"),
    "text for a time": ({"latency": {"first_us": "fast"}}, 6, "'latency.first_us'"),
    "an unknown key": ({"latency": {"p50": 1}}, 6, "'latency.p50'"),
}


@pytest.mark.parametrize(("content", "code", "words"), BAD_RECORDS.values(), ids=BAD_RECORDS)
def test_a_record_that_is_none_is_refused_by_name(copied, call, timed, content, code, words):
    if isinstance(content, dict):
        raw = json.loads(json.dumps(timed.as_json()))
        raw["latency"] |= content["latency"]
        content = json.dumps(raw)
    if content is not None:
        Path("record.json").write_text(content)
    call("-q", "verify", "bundle", "--bench", "record.json").refused(code, "record.json", words)


def test_a_record_is_of_one_bundle(made, tmp_path, call, timed):
    run = shutil.copytree(made.parents[1], tmp_path / "run")
    shutil.copytree(run / "bundles" / "onnx", run / "bundles" / "again")
    file = kept(tmp_path, timed)
    call("-q", "verify", run, "--bench", file).refused(2, "there are 2 bundles", "name the one it is of")


def test_a_record_survives_its_file(tmp_path, timed):
    assert measurement.read(kept(tmp_path, timed)) == timed


# From the bundle alone


def test_a_bundle_is_verified_where_nothing_else_of_the_run_is(copied, made):
    """`copied` stands in another folder than the run, and the current folder holds nothing else."""
    assert made.parents[1] not in copied.parents
    assert [p.name for p in Path.cwd().iterdir()] == ["bundle"]
    before = bundle.hashes(copied)
    found = judged(copied)
    assert found.verdict == "pass"
    assert bundle.hashes(copied) == before
    assert bundle.report_path(copied) == copied.parent / "bundle.report.json"


@pytest.mark.parametrize(("seeds", "draws"), [([0], ""), ([0, 1], ", 2 draws")])
def test_the_ledger_says_what_its_psnr_was_measured_on(copied, call, seeds, draws):
    changed(copied, manifest={"protocol": {"seeds": seeds, "sigma255": 15.0}})
    shown = " ".join(call("-q", "verify", "bundle", "--seconds", "1").out.split())
    assert f"noisy input 2 golden pictures, noise level 15{draws} 24." in shown


def test_pictures_are_judged_on_identical_noise_every_time(copied):
    one, other = judged(copied), judged(copied)
    assert [r.psnr_mdb for r in one.rows] == [r.psnr_mdb for r in other.rows]
    assert [r.ssim_e5 for r in one.rows] == [r.ssim_e5 for r in other.rows]


@pytest.mark.parametrize(
    "name",
    ["model.int8.onnx", "reference/teacher.fp32.onnx", "golden/0.png.png", "README.md", "golden/0.png.denoised.f32"],
)
def test_a_changed_file_is_refused_by_name(copied, name):
    path = copied / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.unlink()
    path.write_bytes(content)
    with pytest.raises(IntegrityError, match=f"{path}: changed"):
        judged(copied)


def test_a_missing_or_added_file_is_refused_by_name(copied):
    (copied / "extra.txt").write_text("")
    with pytest.raises(IntegrityError, match=r"extra\.txt: is not in the manifest"):
        judged(copied)
    (copied / "extra.txt").unlink()
    (copied / "README.md").unlink()
    with pytest.raises(IntegrityError, match=r"README\.md: is missing"):
        judged(copied)


@pytest.mark.parametrize("named", ["bundle", "run"])
def test_no_verdict_is_left_beside_a_bundle_that_changed(made, tmp_path, named, cwd, call):
    run = shutil.copytree(made.parents[1], tmp_path / "run")
    folder = run / "bundles" / made.name
    report = verify.write(judged(folder), bundle.report_path(folder))
    (folder / "README.md").write_text("")
    found = call("verify", str(folder if named == "bundle" else run))
    assert found.code == IntegrityError.exit_code
    assert f"{report}: removed, for the bundle cannot be verified any more" in found.err
    assert f"{folder / 'README.md'}: changed" in found.err
    assert not report.exists()


def test_no_verdict_is_given_on_a_bundle_that_was_compiled_anew_meanwhile(copied, monkeypatch):
    measured = verify._time

    def meanwhile(*arguments):
        found = measured(*arguments)
        changed(copied, manifest={"protocol": {"sigma255": 15.0}})
        return found

    monkeypatch.setattr(verify, "_time", meanwhile)
    with pytest.raises(InputError, match="bundle: was compiled anew while it was verified; verify it again"):
        judged(copied)


def test_a_device_is_timed_with_what_was_there_when_it_began(copied, monkeypatch):
    manifest = bundle.read(copied)
    ran = bench._run_session

    def meanwhile(*arguments):
        found = ran(*arguments)
        _offset_artifact(copied, 1e-4)
        changed(copied)
        return found

    monkeypatch.setattr(bench, "_run_session", meanwhile)
    found = bench.bench(copied, "local", settings=bench.Settings(warm_up=0, runs=1, seconds=0))
    assert found.artifact_sha256 == manifest.chain[-1].sha256


@pytest.mark.skipif(sys.platform != "linux", reason="a file that not even root can read")
def test_what_cannot_be_read_decides_nothing_and_leaves_no_verdict(copied):
    baselines = Path("results/baselines")
    baselines.mkdir(parents=True)
    for unreadable in (Path("bundle.bench.old.json"), baselines / "stray.json"):
        unreadable.symlink_to("/proc/self/mem")
    found = judged(copied)
    assert found.verdict == "pass"
    assert [why.partition(": ")[0] for why in found.refused] == [
        "bundle.bench.old.json",
        "results/baselines/stray.json",
    ]
    written = verify.write(found, bundle.report_path(copied))
    (copied / "README.md").unlink()
    (copied / "README.md").symlink_to("/proc/self/mem")
    with pytest.raises(OSError, match="Input/output error"):
        judged(copied)
    assert not written.exists()


def test_a_limit_of_the_wrong_type_is_refused_by_name(copied):
    with pytest.raises(IntegrityError, match="size_mib"):
        judged(changed(copied, manifest={"target": {"limits": {"size_mib": "small"}}}))


def test_a_run_folder_stands_for_all_its_bundles(made, tmp_path):
    assert verify.bundles_of(made.parents[1]) == [made]
    assert verify.bundles_of(made) == [made]
    with pytest.raises(InputError, match="is neither a bundle nor a run with bundles"):
        verify.bundles_of(tmp_path)


def test_a_bundle_that_is_not_finished_is_none(made, tmp_path):
    shutil.copytree(made, tmp_path / "bundles" / ".onnx.abc.tmp")
    with pytest.raises(InputError, match="is neither a bundle nor a run with bundles"):
        verify.bundles_of(tmp_path)
    finished = shutil.copytree(made, tmp_path / "bundles" / "onnx")
    assert verify.bundles_of(tmp_path) == [finished]


def test_all_pictures_of_a_fixed_tile_are_timed_in_its_shape(made, tmp_path):
    run = shutil.copytree(made.parents[1], tmp_path / "run")
    tile = dataclasses.replace(ONNX, name="tile", input=InputShape(height=64, width=96))
    found = judged(compiling.compile_model(str(run), [tile]).bundles["tile"])
    assert found.speedup["shape"] == (1, 1, 64, 96)
    assert found.verdict == "pass"


def test_the_command_exits_with_the_verdict_from_another_folder(copied, tmp_path):
    changed(copied, manifest=limits(peak_memory_mib=64.0))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = subprocess.run(
        [*EDGEKIT, "verify", "../bundle", "--seconds", "1", "--json"],
        cwd=elsewhere,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 7, done.stderr
    assert json.loads(done.stdout)["items"][0]["verdict"] == "incomplete"
    assert json.loads((tmp_path / "bundle.report.json").read_text())["verdict"] == "incomplete"
    assert not list(elsewhere.iterdir())


# The recorded teacher


def record(folder: Path, made: Path, **changes: object) -> baseline.Baseline:
    """Write a record of the bundle's teacher into results/baselines, with a PSNR of 90 dB on the bundle's pictures."""
    manifest = bundle.read(made)
    golden = read_golden(made, "golden", manifest.protocol.files)
    made_up = baseline.Baseline(
        teacher="nano",
        teacher_sha256=manifest.chain[0].sha256,
        device="Some GPU",
        driver="1",
        threads=0,
        latencies=(
            baseline.Latency(
                height=256, width=256, arithmetic="float32", median_us=700, p10_us=690, p90_us=720, runs=100
            ),
        ),
        sigma255=25.0,
        quality={baseline.sets.digest(golden): 90_000},
        protocol="a test",
        packages={},
        date="2026-01-01T00:00:00Z",
    )
    kept = dataclasses.replace(made_up, **changes)
    baseline.write(kept, folder / "results" / "baselines" / f"{kept.date[:4]}.json")
    return kept


def test_a_recorded_figure_of_the_same_teacher_on_the_same_pictures_decides(copied, made):
    record(Path.cwd(), made)
    found = judged(copied)
    limit = only(found, "student_drop_db")
    assert (limit.verdict, limit.reason) == ("fail", "teacher on Some GPU")
    student = next(r for r in found.rows if r.name == "student FP32")
    assert limit.measured == f"{(90_000 - student.psnr_mdb) / 1000:+.3f} dB"
    assert [(b.device, b.median_us) for b in found.baselines] == [("Some GPU", 700)]


@pytest.mark.parametrize(("threads", "said"), [(0, ""), (1, ", 1 thread"), (2, ", 2 threads")])
def test_a_recorded_latency_says_what_ran_the_teacher(copied, made, call, threads, said):
    record(Path.cwd(), made, device="Some chip", threads=threads)
    shown = " ".join(call("-q", "verify", "bundle", "--seconds", "1").out.split())
    assert f"nano FP32 PyTorch on Some chip{said}, 256x256, recorded 2026-01-01 0.70" in shown


def test_the_newest_record_decides(copied, made):
    record(Path.cwd(), made, date="2027-01-01T00:00:00Z", device="New GPU")
    record(Path.cwd(), made)
    assert only(judged(copied), "student_drop_db").reason == "teacher on New GPU"


@pytest.mark.parametrize(
    "changes",
    [{"teacher_sha256": "0" * 64}, {"quality": {"0" * 64: 90_000}}, {"sigma255": 15.0}],
    ids=["another teacher", "other pictures", "another noise"],
)
def test_a_record_of_something_else_is_printed_and_decides_nothing(copied, made, changes):
    record(Path.cwd(), made, **changes)
    found = judged(copied)
    assert (only(found, "student_drop_db").verdict, only(found, "student_drop_db").reason) == (
        "pass",
        "teacher measured here",
    )
    assert len(found.baselines) == 1


def test_a_record_of_seed_0_says_nothing_of_a_bundle_with_another_seed(copied, made):
    record(Path.cwd(), made)
    found = judged(changed(copied, manifest={"protocol": {"seeds": [1]}}))
    assert only(found, "student_drop_db").reason == "teacher measured here"


# Baselines


@pytest.fixture(scope="module")
def ran_on() -> list[tuple[int, ...]]:
    """Return the shapes that the network of `measured` ran on, in their order."""
    return []


@pytest.fixture(scope="module")
def measured(ran_on) -> tuple[baseline.Baseline, PictureSet]:
    pictures = PictureSet(
        name="two", pictures=tuple(Picture(name=str(s), pixels=dead_leaves(s, 40, 56)) for s in (1, 2))
    )
    nano = networks.shipped("nano")
    # What is timed is a copy of the network, which keeps its hooks.
    nano.net.register_forward_pre_hook(lambda net, given: ran_on.append(tuple(given[0].shape)))
    return baseline.measure(nano, [pictures], shapes=((32, 32), (64, 96)), seconds=0.05, sigma255=15.0), pictures


def test_a_baseline_times_every_shape_and_records_its_quality(measured, ran_on):
    found, pictures = measured
    shapes = {(x.height, x.width) for x in found.latencies}
    assert shapes == {(32, 32), (64, 96)}
    for latency in found.latencies:
        assert 0 < latency.p10_us <= latency.median_us <= latency.p90_us
        assert latency.runs >= 5
    ran = Counter(ran_on)
    warm_up = 3
    assert all(ran[1, 1, x.height, x.width] == warm_up + x.runs for x in found.latencies)
    want = quality.evaluate(
        networks.as_function(networks.shipped("nano").net), pictures, sigma255=15.0, stride=8
    ).psnr_mdb
    assert found.psnr_mdb(pictures, 15.0) == pytest.approx(want, abs=2)
    assert found.psnr_mdb(pictures, 25.0) is None
    assert found.psnr_mdb(PictureSet(name="one", pictures=pictures.pictures[:1]), 15.0) is None
    assert found.teacher_sha256 == zoo.card("nano").sha256


def test_a_baseline_survives_its_file(measured, tmp_path, monkeypatch):
    found, _ = measured
    path = baseline.write(found, tmp_path / "b.json")
    assert baseline.read(path) == found
    monkeypatch.chdir(tmp_path)
    by_default = baseline.write(dataclasses.replace(found, device="Some GPU (R) 5"))
    assert by_default == Path("results/baselines/nano-some-gpu-r-5.json")
    assert baseline.recorded().records == (dataclasses.replace(found, device="Some GPU (R) 5"),)


def test_a_device_whose_name_has_a_slash_has_its_record_where_verify_looks(measured, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = dataclasses.replace(measured[0], device="AMD Ryzen 7 7840HS w/ Radeon 780M Graphics")
    assert baseline.write(found) == Path("results/baselines/nano-amd-ryzen-7-7840hs-w-radeon-780m-graphics.json")
    assert baseline.recorded().records == (found,)


def test_a_runs_record_does_not_replace_that_of_the_shipped_weights(measured, tmp_path, monkeypatch):
    found, _ = measured
    monkeypatch.chdir(tmp_path)
    own = dataclasses.replace(found, teacher_sha256="ab" * 32, device="GPU")
    paths = [baseline.write(record) for record in (dataclasses.replace(found, device="GPU"), own)]
    assert [path.name for path in paths] == ["nano-gpu.json", "nano-abababababab-gpu.json"]
    assert {b.teacher_sha256 for b in baseline.recorded().records} == {found.teacher_sha256, own.teacher_sha256}
    assert baseline.write(dataclasses.replace(own, teacher="mine")).name == "mine-abababababab-gpu.json"


def test_records_come_oldest_first_whatever_their_files_are_called(measured, tmp_path):
    found, _ = measured
    for name, year in (("a", 2028), ("b", 2026), ("c", 2027)):
        baseline.write(dataclasses.replace(found, date=f"{year}-01-01T00:00:00Z"), tmp_path / f"{name}.json")
    assert [b.date[:4] for b in baseline.recorded(tmp_path).records] == ["2026", "2027", "2028"]
    assert baseline.recorded(tmp_path / "nowhere") == baseline.Recorded(records=(), refused=())


NO_RECORDS = {
    "cut": ("{", "is not a baseline record"),
    "list": ("[]", "is not a baseline record"),
    "empty": ("{}", "is not a baseline record"),
    "another kind": ('{"schema_version": 1, "kind": "edgekit-report"}', "is not a baseline record"),
    "another version": ('{"schema_version": 2, "kind": "edgekit-baseline"}', "was written by another version"),
    "nothing in it": ('{"schema_version": 1, "kind": "edgekit-baseline"}', "'teacher': "),
}


@pytest.mark.parametrize(("content", "told"), NO_RECORDS.values(), ids=NO_RECORDS)
def test_a_file_that_is_no_record_is_refused_by_name(tmp_path, content, told):
    path = tmp_path / "b.json"
    path.write_text(content)
    with pytest.raises((InputError, IntegrityError), match=f"{path}: {told}"):
        baseline.read(path)
    (why,) = baseline.recorded(tmp_path).refused
    assert why.startswith(f"{path}: {told}")


def test_a_figure_of_the_wrong_type_is_refused_by_name(measured, tmp_path):
    path = baseline.write(measured[0], tmp_path / "b.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quality": ["30 dB"]}))
    with pytest.raises(IntegrityError, match="'quality': "):
        baseline.read(path)


def test_a_stray_file_among_the_baselines_is_told_and_ends_nothing(copied, made):
    record(Path.cwd(), made)
    (Path.cwd() / "results" / "baselines" / "stray.json").write_text("{}")
    found = judged(copied)
    assert only(found, "student_drop_db").reason == "teacher on Some GPU"
    (why,) = found.refused
    assert why.startswith("results/baselines/stray.json: is not a baseline record")


def test_a_record_that_is_missing_is_refused_by_name(tmp_path):
    with pytest.raises(InputError, match=r"no\.json: no such file; make one: edgekit baseline"):
        baseline.read(tmp_path / "no.json")
