"""The method table: every row is measured, or says why not, and its figures are those of the files that it names."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny
import torch
from PIL import Image

from edgekit import models, run
from edgekit.backends.onnxruntime import open_onnx
from edgekit.compress import export
from edgekit.data import sets
from edgekit.data.synthetic import dead_leaves
from edgekit.errors import InputError, UnsupportedError
from edgekit.files import sha256
from edgekit.measure import latency, quality
from edgekit.pipeline import compare, comparison, distill, networks
from edgekit.pipeline.compare import Peer, Plan, Settings
from edgekit.pipeline.comparison import Comparison

OWN_TARGET = """\
schema_version: 1
name: own
description: float kernels in tiles of one size
engine: tvm
precision: float32
input: {{height: 96, width: 96}}
isa: {{triple: {triple}, cpu: {cpu}}}
runner: {runner}
limits: {{size_mib: 8.0}}
"""
ONE_THREAD = "on one thread, whatever was asked for"
SETTINGS = Settings(sigmas=(25.0, 15.0), seconds=0.1, without=("bm3d",), dynamic=True)


def write_folder(folder: Path, *, channels: int = 1, seed: int = 1000, side: int = 64) -> Path:
    """Write two pictures that no run of the tests has seen."""
    folder.mkdir(parents=True)
    for number in range(2):
        pixels = dead_leaves(seed + number, side, side + 8, 1 if channels == 1 else 3)
        plane = pixels[0] if channels == 1 else pixels.transpose(1, 2, 0)
        Image.fromarray(np.ascontiguousarray(plane)).save(folder / f"{number}.png")
    return folder


def write_onnx(path: Path, *, channels: int = 1) -> Path:
    """Export a random network with edgekit's interface."""
    torch.manual_seed(0)
    net = models.create("nano", {"channels": channels} if channels != 1 else {}).eval()
    return export.export_onnx(net, channels=channels, takes_sigma=net.takes_sigma, stride=net.stride, out=path)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("clean") / "unseen")


@pytest.fixture(scope="module")
def run_folder(finished, tmp_path_factory) -> Path:
    return Path(shutil.copytree(finished, tmp_path_factory.mktemp("copied") / "tiny-run"))


@pytest.fixture(scope="module")
def planned(run_folder, pictures, tmp_path_factory) -> Plan:
    folder = tmp_path_factory.mktemp("out") / "comparison"
    [peer] = run_folder.glob("05-simplify/student.fp32.onnx")
    return compare.plan(
        [str(run_folder)],
        peers=[Peer(name="same@25", path=peer, sigma255=25.0)],
        pictures=pictures,
        settings=SETTINGS,
        folder=folder,
    )


@pytest.fixture(scope="module")
def compared(planned) -> Comparison:
    return compare.compare(planned)


def row(table: Comparison, name: str, arithmetic: str = "", engine: str = "") -> comparison.Row:
    [found] = [r for r in table.rows if (r.name, r.arithmetic) == (name, arithmetic) and r.engine.startswith(engine)]
    return found


def test_every_planned_row_is_in_the_table_and_all_but_the_one_left_out_were_run(planned, compared):
    assert [(r.name, r.arithmetic, r.engine) for r in compared.rows] == [
        (e.name, e.arithmetic, e.engine) for e in planned.entries
    ]
    assert [(r.name, r.reason) for r in compared.unfinished()] == [("BM3D", "left out on request")]
    assert len([r for r in compared.rows if r.name == "tiny-run"]) == 5


def test_the_noisy_row_has_the_psnr_of_its_noise_and_no_latency(compared):
    noisy = row(compared, "noisy")
    assert noisy.figure(25).psnr_mdb == pytest.approx(20_170, abs=100)
    assert noisy.figure(15).psnr_mdb == pytest.approx(24_610, abs=100)
    assert noisy.latency_us is None
    assert row(compared, "NLM").figure(25).psnr_mdb > noisy.figure(25).psnr_mdb + 3000


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_a_float_row_has_the_figures_of_the_network_in_torch(compared, run_folder, pictures, engine):
    network = networks.from_run(run_folder)
    found = row(compared, "tiny-run", "float32", engine)
    for sigma255 in (15.0, 25.0):
        want = quality.evaluate(networks.as_function(network.net), sets.folder(pictures, channels=1), sigma255=sigma255)
        assert found.figure(sigma255).psnr_mdb == pytest.approx(want.psnr_mdb, abs=2)
        assert found.figure(sigma255).ssim_e5 == pytest.approx(want.ssim_e5, abs=10)
    assert found.parameters == models.parameter_count(network.net)


def test_an_int8_row_has_the_figures_of_the_bundles_artifact(compared, run_folder, pictures):
    artifact = run_folder / "bundles/onnx/model.int8.onnx"
    found = row(compared, "tiny-run", "int8", "onnxruntime")
    want = quality.evaluate(open_onnx(artifact, 1), sets.folder(pictures, channels=1), sigma255=25)
    assert found.figure(25).psnr_mdb == want.psnr_mdb
    assert (found.sha256, found.size_bytes) == (sha256(artifact), artifact.stat().st_size)
    assert found.integer_macs_permille > 500
    assert found.figure(25).psnr_mdb != row(compared, "tiny-run", "float32", "onnxruntime").figure(25).psnr_mdb


def test_a_row_of_dynamic_int8_is_measured_on_request_in_integers_and_says_what_it_is(compared, run_folder, tmp_path):
    found = row(compared, "tiny-run", "int8-dynamic", "onnxruntime")
    assert found.integer_macs_permille == 1000
    assert found.figure(25).psnr_mdb != row(compared, "tiny-run", "int8", "onnxruntime").figure(25).psnr_mdb
    assert found.figure(25).psnr_mdb == pytest.approx(
        row(compared, "tiny-run", "float32", "onnxruntime").figure(25).psnr_mdb, abs=1000
    )
    assert "| dynamic INT8 (100.0 % of MACs) |" in comparison.markdown(compared)
    unasked = compare.plan([str(run_folder)], settings=Settings(), folder=tmp_path / "out")
    assert "int8-dynamic" not in {e.arithmetic for e in unasked.entries}


@pytest.mark.backend
def test_the_openvino_int8_row_is_openvinos_own_artifact(compared, run_folder):
    found = row(compared, "tiny-run", "int8", "openvino")
    files = [run_folder / "bundles/linux-x86_64" / name for name in ("model.xml", "model.bin")]
    assert found.size_bytes == sum(file.stat().st_size for file in files)
    assert found.figure(25).psnr_mdb == pytest.approx(
        row(compared, "tiny-run", "float32", "openvino").figure(25).psnr_mdb, abs=3000
    )


@pytest.mark.backend
def test_a_target_of_its_own_has_a_row_of_its_artifact_cut_into_tiles_and_timed(run_folder, call, cwd):
    (cwd / "own.yaml").write_text(OWN_TARGET.format(triple="x86_64-linux-gnu", cpu="x86-64-v3", runner="{kind: local}"))
    record = compared_for(call, run_folder, write_folder(cwd / "wide", side=128), "own.yaml", "--threads", "2")
    [found] = [r for r in record["rows"] if r["target"]]
    [same] = [r for r in record["rows"] if r["arithmetic"] == "float32" and r["engine"].startswith("onnxruntime")]
    assert (found["target"], found["arithmetic"]) == ("own", "float32")
    assert (ONE_THREAD in found["notes"], ONE_THREAD in same["notes"]) == (True, False)
    # Of 136x128 pixels: tiles of 96 whose seams are not seen.
    assert found["figures"][0]["psnr_mdb"] == pytest.approx(same["figures"][0]["psnr_mdb"], abs=1)
    assert found["latency_us"] > 0
    library = next((run_folder / "bundles/own").rglob("*.so"))
    assert found["size_bytes"] == library.stat().st_size
    assert "(own) |" in (cwd / "out/table.md").read_text(encoding="utf-8")


@pytest.mark.emulated
@pytest.mark.backend
def test_an_emulated_target_has_a_row_without_a_latency(run_folder, pictures, call, cwd):
    runner = "{kind: qemu, cpus: [cortex-a53]}"
    (cwd / "own.yaml").write_text(OWN_TARGET.format(triple="aarch64-linux-gnu", cpu="cortex-a53", runner=runner))
    [found] = [r for r in compared_for(call, run_folder, pictures, "own.yaml")["rows"] if r["target"]]
    assert found["figures"]
    assert found["latency_us"] is found["speedup"] is None
    assert "by qemu cortex-a53 (emulated), whose time is no latency" in found["notes"]


def compared_for(call, run_folder, pictures, target, *options) -> dict[str, object]:
    """Return the record of a comparison of the run's student for one target."""
    called = call(
        *("compare", run_folder, "-t", target, "--pictures", pictures, "--seconds", "0.1", "-o", "out"),
        *("--without", "bm3d", "--without", "nlm", *options),
    )
    assert called.code == 0, called.err
    return json.loads(Path("out/comparison.json").read_text(encoding="utf-8"))


def test_a_peer_for_one_noise_level_is_measured_there_alone(compared):
    peer, same = row(compared, "same@25", "float32"), row(compared, "tiny-run", "float32", "onnxruntime")
    assert [f.sigma255 for f in peer.figures] == [25.0]
    assert peer.figure(25) == same.figure(25)
    assert (peer.parameters, peer.macs_256, peer.sha256) == (same.parameters, same.macs_256, same.sha256)


def test_every_network_and_nlm_is_timed_by_turns_with_the_reference(compared):
    assert compared.reference.startswith("tiny-run, FP32, onnxruntime")
    timed = [r for r in compared.rows if r.latency_us is not None]
    assert {r.name for r in timed} == {"NLM", "same@25", "tiny-run"}
    for found in timed:
        assert found.speedup.pairs >= compared.pairs
        assert found.speedup.low_e3 <= found.speedup.ratio_e3 <= found.speedup.high_e3
    reference = row(compared, "tiny-run", "float32", "onnxruntime")
    assert 500 < reference.speedup.ratio_e3 < 2000
    assert row(compared, "NLM").slowdown.ratio_e3 > 2000


def test_a_row_that_cannot_be_run_says_why_and_the_others_are_measured(planned):
    def refuse() -> compare.Program:
        raise UnsupportedError("this engine has no such operator")

    noisy, nlm = (e for e in planned.entries if e.name in ("noisy", "NLM"))
    table = compare.compare(dataclasses.replace(planned, entries=(noisy, dataclasses.replace(nlm, open=refuse))))
    assert [(r.name, r.reason) for r in table.rows] == [("noisy", ""), ("NLM", "this engine has no such operator")]
    assert row(table, "noisy").figures
    assert (table.reference, row(table, "NLM").figures) == ("", ())
    page = comparison.markdown(table)
    assert "- **NLM, scikit-image" in page
    assert "this engine has no such operator" in page


@pytest.mark.parametrize(
    ("error", "told"),
    [(MemoryError(), "memory ran out"), (UnsupportedError("too large for it"), "too large for it")],
    ids=["memory", "size"],
)
def test_a_row_that_fails_while_it_is_timed_does_not_take_the_others_with_it(planned, error, told):
    def denoise(noisy: np.ndarray, sigma: float) -> np.ndarray:
        if noisy.shape[-1] == compare._SIDE:
            raise error
        return noisy

    noisy, nlm = (e for e in planned.entries if e.name in ("noisy", "NLM"))
    failing = dataclasses.replace(nlm, name="failing", rank=None, open=lambda: compare.Program(denoise=denoise))
    table = compare.compare(dataclasses.replace(planned, entries=(noisy, nlm, failing)))
    assert [(r.name, r.reason) for r in table.rows] == [("noisy", ""), ("NLM", ""), ("failing", told)]
    assert row(table, "NLM").latency_us is not None


def test_a_method_of_one_thread_says_so_where_more_were_asked_for(run_folder, pictures, tmp_path):
    settings = dataclasses.replace(SETTINGS, threads=2, without=("bm3d",))
    asked = compare.plan([str(run_folder)], targets=[], pictures=pictures, settings=settings, folder=tmp_path)
    nlm = next(e for e in asked.entries if e.name == "NLM")
    assert nlm.open().notes == (ONE_THREAD,)


def test_the_page_has_every_row_with_as_many_cells_as_its_header(compared):
    page = comparison.markdown(dataclasses.replace(compared, rows=(*compared.rows, piped(compared))))
    lines = [line.replace("\\|", "") for line in page.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(compared.rows) + 1
    assert {line.count("|") for line in lines} == {len(comparison.header(compared.sigmas)) + 1}
    for text in ("RandomState", "1 thread", compared.pictures[0].sha256, "onnxruntime", "left out on request"):
        assert text in page


@pytest.mark.parametrize(
    ("times_us", "shown"),
    [((3000, 1000), "3.00x (3.00x to 3.00x)"), ((1, 600), "1/600 (1/600 to 1/600)")],
    ids=["faster", "far slower"],
)
def test_a_speed_is_a_multiple_or_a_fraction_of_the_references(compared, times_us, shown):
    a_us, b_us = times_us
    fast = latency.ratio_with_bound(latency.Paired(a_us=(a_us,) * 6, b_us=(b_us,) * 6))
    slow = latency.ratio_with_bound(latency.Paired(a_us=(b_us,) * 6, b_us=(a_us,) * 6))
    found = dataclasses.replace(compared.rows[0], speedup=fast, slowdown=slow)
    place = comparison.header([25.0]).index("speed")
    assert comparison.cells(found, [25.0])[place] == shown
    assert comparison.cells(found, [25.0], brief=True)[place] == shown.split(" ")[0]


def piped(table: Comparison) -> comparison.Row:
    """Return a row whose name would end its cell."""
    return dataclasses.replace(table.rows[0], name="a|b")


def test_the_files_hold_the_table_and_the_plot(compared, tmp_path):
    written = comparison.write(compared, tmp_path)
    record = json.loads(written.record.read_text(encoding="utf-8"))
    assert record["kind"] == "edgekit-comparison"
    assert [r["name"] for r in record["rows"]] == [r.name for r in compared.rows]
    assert record["host"]["packages"]["onnxruntime"]
    assert written.table.read_text(encoding="utf-8") == comparison.markdown(compared)
    with Image.open(written.plot) as image:
        drawn = np.asarray(image.convert("RGB"))
    # FP32 is drawn in blue, INT8 in orange, the rest in gray: all three are there.
    for colour in ((31, 119, 180), (255, 127, 14), (127, 127, 127)):
        assert (np.abs(drawn.astype(int) - colour).max(axis=-1) < 8).any(), colour
    assert sorted(p.name for p in tmp_path.iterdir()) == ["comparison.json", "plot.png", "table.md"]


def test_without_matplotlib_there_is_no_plot_an_older_one_goes_and_the_page_says_what_to_install(
    compared, tmp_path, monkeypatch
):
    (tmp_path / "plot.png").write_bytes(b"of other figures")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    written = comparison.write(compared, tmp_path)
    assert written.plot is None
    assert not (tmp_path / "plot.png").exists()
    assert "pip install 'edgekit[plot]'" in written.no_plot
    assert "pip install 'edgekit[plot]'" in written.table.read_text(encoding="utf-8")


def test_bm3d_that_is_not_installed_is_a_row_with_the_reason_and_the_licence(planned, pictures, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "bm3d", None)
    found = compare.plan(["nano"], pictures=pictures, settings=Settings(), folder=tmp_path / "out")
    [entry] = [e for e in found.entries if e.name == "BM3D"]
    assert "pip install 'edgekit[bm3d]'" in entry.reason
    assert "non-commercial" in entry.reason
    [line] = [r for r in compare.compare(dataclasses.replace(found, entries=(entry,))).rows if r.name == "BM3D"]
    assert line.reason == entry.reason


@pytest.mark.parametrize("channels", [1, 3], ids=["gray", "colour"])
def test_bm3d_denoises_and_names_its_licence(channels, tmp_path):
    pytest.importorskip("bm3d", reason="bm3d is not installed: its licence allows non-commercial use only")
    chosen = sets.folder(write_folder(tmp_path / "clean", channels=channels, side=32), channels=channels)
    chosen = sets.PictureSet(name="one", pictures=chosen.pictures[:1])
    [bm3d] = [e for e in compare._classics(chosen, Settings()) if e.name == "BM3D"]
    program = bm3d.open()
    noisy = quality.evaluate(quality.noisy_input, chosen, sigma255=25)
    assert quality.evaluate(program.denoise, chosen, sigma255=25).psnr_mdb > noisy.psnr_mdb + 2000
    assert any("non-commercial" in note for note in program.notes)


@pytest.mark.backend
def test_an_engine_that_is_not_installed_is_rows_with_what_to_install(run_folder, pictures, monkeypatch, tmp_path):
    monkeypatch.delitem(sys.modules, "edgekit.backends.openvino", raising=False)
    monkeypatch.setitem(sys.modules, "openvino", None)
    found = compare.plan([str(run_folder)], pictures=pictures, settings=SETTINGS, folder=tmp_path / "out")
    reasons = [e.reason for e in found.entries if e.engine.startswith("openvino")]
    assert len(reasons) == 2
    assert all("pip install 'edgekit[openvino]'" in reason for reason in reasons)


def test_gray_networks_meet_gray_pictures_and_colour_networks_colour_ones(tmp_path):
    folder = write_folder(tmp_path / "clean", channels=3)
    gray, colour = write_onnx(tmp_path / "gray.onnx"), write_onnx(tmp_path / "colour.onnx", channels=3)
    peers = [Peer(name="gray", path=gray), Peer(name="colour", path=colour)]
    settings = Settings(seconds=0.1, without=("bm3d", "nlm"))
    planned = compare.plan(["nano"], peers=peers, pictures=folder, settings=settings, folder=tmp_path / "out")
    entries = tuple(e for e in planned.entries if e.name != "nano")
    table = compare.compare(dataclasses.replace(planned, entries=entries))
    assert [(p.name, p.channels) for p in table.pictures] == [("clean", 1), ("clean in colour", 3)]
    on = {"clean": "gray", "clean in colour": "colour"}
    assert [r.name for r in table.rows] == ["noisy", "NLM", "BM3D"] * 2 + ["gray", "colour"]
    for found in table.rows[-2:]:
        assert on[found.pictures] == found.name
        assert found.figures
    assert comparison.markdown(table).count("| noisy |") == 2


def test_the_default_is_all_shipped_weights_on_the_embedded_pictures_the_teacher_in_fp32_alone(tmp_path):
    planned = compare.plan([], settings=Settings(), folder=tmp_path / "out")
    assert {e.pictures.name for e in planned.entries} == {"embedded-evaluation"}
    named = [(e.name, e.arithmetic) for e in planned.entries if e.arithmetic and e.engine.startswith("onnxruntime")]
    assert named[0] == ("teacher", "float32")
    assert ("teacher", "int8") not in named
    assert {("nano", "float32"), ("nano", "int8")} <= set(named)
    [first] = [e for e in planned.entries if e.rank == 0]
    assert (first.name, first.engine.split(" ")[0]) == ("teacher", "onnxruntime")
    assert not (tmp_path / "out").exists()


def test_a_dry_run_names_every_row_and_writes_nothing(call, cwd, pictures):
    called = call("compare", "nano", "--pictures", pictures, "--without", "bm3d", "--dry-run", "--json")
    assert called.code == 0, called.err
    items = {i["row"]: i["state"] for i in json.loads(called.out)["items"]}
    assert len(items) == 7
    assert items["noisy"] == "to do"
    assert [state for name, state in items.items() if name.startswith("BM3D")] == ["left out on request"]
    assert list(cwd.iterdir()) == []


def test_the_command_prints_the_table_and_writes_the_files(call, cwd, pictures, run_folder):
    called = call(
        "compare", run_folder, "--pictures", pictures, "--without", "bm3d", "--without", "nlm", "--seconds", "0.1"
    )
    assert called.code == 0, called.err
    assert "tiny-run" in called.out
    assert "not run: NLM" in called.out
    made = ["comparison.json", "models", "plot.png", "table.md"]
    assert sorted(p.name for p in (cwd / "comparison").iterdir()) == made


def test_pictures_that_a_run_learned_from_are_refused(call, cwd, run_folder, leaves):
    call("compare", run_folder, "--pictures", leaves).refused(2, "learned from 'leaves-", "not seen")


def test_pictures_that_a_run_chose_its_weights_by_are_refused_whatever_their_folder_is_called(call, cwd):
    pictures = tiny.write_pictures(cwd / "set")
    recipe = tiny.recipe(pictures, data=tiny.like_named(pictures), training=tiny.training(steps=2))
    distill.distill(recipe, cwd / "run")
    for seen in ("train", "held_out"):
        call("compare", "run", "--pictures", pictures / seen / "images", "--dry-run").refused(2, "learned from 'images")
    assert call("compare", "run", "--pictures", pictures / "evaluation" / "images", "--dry-run").code == 0


def test_pictures_of_which_a_run_learned_from_a_part_are_refused_while_its_folder_shows_it(call, cwd):
    pictures = tiny.write_pictures(cwd / "set")
    (cwd / "large").mkdir()
    large = dead_leaves(97, 256, 256)[0]
    Image.fromarray(large).save(cwd / "large" / "whole.png")
    Image.fromarray(large[40:240, 40:240].copy()).save(pictures / "train" / "crop.png")
    distill.distill(tiny.recipe(pictures, training=tiny.training(steps=2)), cwd / "run")
    said = call("compare", "run", "--pictures", cwd / "large", "--dry-run").refused(2, "'crop.png' of train")
    assert "shows what is kept back as 'whole.png' of large" in said
    shutil.rmtree(pictures / "train")
    gone = call("compare", "run", "--pictures", cwd / "large", "--dry-run")
    assert gone.code == 0
    assert "parts of large are not looked for there" in gone.err


def test_a_folder_that_another_comparison_is_made_in_is_refused_and_its_table_kept(cwd, call):
    (cwd / "made/models").mkdir(parents=True)
    (cwd / "made/table.md").write_text("figures", encoding="utf-8")
    with run.lock(cwd / "made/models"):
        call("compare", "nano", "-o", "made", "--without", "nlm").refused(2, "made/models: is in use by process", "-o")
    assert (cwd / "made/table.md").read_text(encoding="utf-8") == "figures"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("nano", "--pictures", "empty"), 2, ("empty", "holds no pictures")),
        (("nano", "--pictures", "missing"), 2, ("missing", "no such folder")),
        (("nano", "--pictures", "small"), 2, ("0.png", "8x16", "SSIM needs 11")),
        (("nanoo",), 2, ("nanoo", "did you mean 'nano'")),
        (("nano", "nano"), 2, ("two models are called 'nano'",)),
        (("nano", "--peer", "DnCNN"), 2, ("DnCNN", "NAME=FILE.onnx")),
        (("nano", "--peer", "DnCNN@x=net.onnx"), 2, ("'x' is no noise level",)),
        (("nano", "--peer", "DnCNN@nan=net.onnx"), 2, ("'nan' is no noise level",)),
        (("nano", "--peer", "DnCNN@300=net.onnx"), 2, ("'300' is no noise level", "up to 255")),
        (("nano", "--peer", "DnCNN@50=net.onnx"), 2, ("noise level 50", "--sigma 50")),
        (("nano", "--peer", "a=missing.onnx"), 2, ("missing.onnx",)),
        (("nano", "--peer", "a=text.onnx"), 2, ("text.onnx", "not a whole ONNX model")),
        (("nano", "--peer", "a=other.onnx"), 2, ("other.onnx", "'image'", "'noisy'")),
        (("nano", "--peer", "NLM=net.onnx"), 2, ("two models are called 'NLM'",)),
        (("nano", "-o", "text.onnx"), 2, ("text.onnx", "-o")),
        (("nano", "-t", "onnxx"), 2, ("onnxx", "did you mean 'onnx'")),
        (("nano", "-t", "skew.yaml"), 4, ("60x60 is not a tile that 'nano'", "multiples of 8")),
        (("net.onnx", "-t", "ios-arm64"), 4, ("compiles from torch", "net.onnx")),
    ],
    ids=[
        *("empty folder", "no folder", "small picture", "unknown model", "one model twice", "peer without a file"),
        *("level no number", "level not a finite one", "level too high", "level not measured", "missing file"),
        *("no ONNX", "other interface", "taken name", "output is a file", "unknown target", "tile of another stride"),
        "ONNX for Core ML",
    ],
)
def test_bad_input_is_refused_before_anything_is_run(call, cwd, arguments, code, words):
    (cwd / "empty").mkdir()
    write_folder(cwd / "small", side=8)
    (cwd / "text.onnx").write_text("no network", encoding="utf-8")
    skew = OWN_TARGET.replace("96", "60").format(triple="x86_64-linux-gnu", cpu="x86-64-v3", runner="{kind: local}")
    (cwd / "skew.yaml").write_text(skew, encoding="utf-8")
    model = onnx.load(write_onnx(cwd / "net.onnx"))
    for node in model.graph.node:
        node.input[:] = ["image" if name == "noisy" else name for name in node.input]
    model.graph.input[0].name = "image"
    onnx.save(model, cwd / "other.onnx")
    call("compare", *arguments).refused(code, *words)
    assert not (cwd / "comparison").exists()


@pytest.mark.parametrize("option", ["nan", "0", "256", "-1"])
def test_a_noise_level_outside_0_to_255_is_refused(call, cwd, option):
    assert call("compare", "--sigma", option).code == 2


def test_a_figure_is_the_mean_over_the_draws_that_were_asked_for(pictures, tmp_path):
    settings = Settings(sigmas=(25.0,), seeds=2, without=("nlm", "bm3d"))
    planned = compare.plan(["nano"], pictures=pictures, settings=settings, folder=tmp_path)
    entry = next(entry for entry in planned.entries if entry.name == "noisy")
    found = compare._figure(entry, entry.open(), 25.0, settings)
    one, two = (
        quality.evaluate(quality.noisy_input, entry.pictures, sigma255=25.0, seeds=seeds) for seeds in ((0,), (0, 1))
    )
    assert found.psnr_mdb == two.psnr_mdb != one.psnr_mdb


def test_settings_are_checked_without_the_command_line_too(pictures, tmp_path):
    wrong = {
        "with 0 noise levels": Settings(sigmas=()),
        "and 0 seeds": Settings(seeds=0),
        "noise level 0 is not between": Settings(sigmas=(0.0,)),
        "no method 'dct'": Settings(without=("dct",)),
    }
    for told, settings in wrong.items():
        with pytest.raises(InputError, match=told):
            compare.plan(["nano"], pictures=pictures, settings=settings, folder=tmp_path)
