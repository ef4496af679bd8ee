"""Whatever is wrong, a command ends with one line that says what, where and what to do, and with its exit code."""

import contextlib
import json
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import LIMITS, call_process, command, tree, write_target
from PIL import Image
from safetensors.torch import load_file, save_file

from edgekit import backends, models, run, target, zoo
from edgekit.compress import export, quantize
from edgekit.data.synthetic import dead_leaves
from edgekit.errors import InputError, IntegrityError
from edgekit.graph import checks
from edgekit.models import weights
from edgekit.pipeline import denoise as denoising
from edgekit.pipeline import doctor

ROOT = Path(__file__).parent.parent
HOLD = """
import sys
from pathlib import Path
from edgekit import run

with run.open_run(Path(sys.argv[1]), {"recipe": {"name": "tiny"}}):
    print("holding", flush=True)
    sys.stdin.read()
"""
TWO_PLANES = """
import torch

class Net(torch.nn.Sequential):
    def __init__(self):
        super().__init__(torch.nn.Conv2d(2, 2, 3))
"""


class Runs:
    """Something that runs code when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.canary,)


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


# Recipes and settings


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("  steps:", "  stepps:", "tiny.yaml:13: unknown key 'training.stepps'; did you mean 'steps'?"),
        ("  steps: 3", "  steps: few", "tiny.yaml:13: 'training.steps' is 'few'; expected a valid integer"),
        ("  patch: 32", "  steps: 4", "tiny.yaml:15: key 'steps' stands here a second time; remove one"),
    ],
    ids=["unknown key", "wrong type", "duplicate key"],
)
def test_a_wrong_recipe_is_refused_with_its_line(call, tiny, old, new, told):
    edit(tiny, old, new)
    call("distill", tiny).refused(2, told)
    assert not Path("runs").exists()


def test_a_wrong_setting_is_refused(call, tiny):
    call("distill", tiny, "--set", "training.stepps=4").refused(
        2, "--set training.stepps=4: unknown key 'training.stepps'; did you mean 'steps'?"
    )


def test_an_unknown_recipe_target_or_model_is_refused_with_the_nearest(call, cwd):
    call("distill", "quikstart").refused(2, "unknown recipe 'quikstart'; did you mean 'quickstart'?; see: edgekit rec")
    call("compile", "nano", "-t", "linux").refused(2, "unknown target 'linux'; did you mean", "see: edgekit targets")
    call("compile", "nanno", "-t", "onnx").refused(2, "'nanno' is no model", "; did you mean 'nano'?")
    assert tree(cwd) == {}


def test_an_unknown_network_or_option_is_refused_before_anything_is_made(call, tiny):
    call("distill", tiny, "--set", "student.model=nanno").refused(2, "'nanno'; did you mean 'nano'?")
    call("-q", "distill", tiny, "--set", "student.options={activaton: relu}").refused(2, "did you mean 'activation'?")


# Pictures


def damaged(path: Path, how: str) -> None:
    """Write something that is not an 8-bit picture."""
    if how == "16 bit":
        Image.fromarray(np.full((64, 64), 40_000, np.uint16)).save(path)
    elif how == "cut":
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8)).save(path)
        path.write_bytes(path.read_bytes()[:1000])
    else:
        path.write_bytes(b"not a picture")


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("16 bit", "more than 8 bits a channel (mode I;16); convert it to 8 bit"),
        ("cut", "not a readable picture: "),
        ("junk", "not a readable picture: cannot identify image file"),
    ],
)
def test_a_picture_that_cannot_be_used_is_named(call, cwd, leaves, how, told):
    damaged(cwd / "bad.png", how)
    call("denoise", "bad.png").refused(2, f"bad.png: {told}")
    shutil.copytree(leaves, "mine")
    damaged(cwd / "mine/leaves-1.png", how)
    call("-q", "distill", "quickstart", "--set", "data.train=[mine]").refused(2, f"mine/leaves-1.png: {told}")
    assert not (cwd / "bad.denoised.png").exists()


def test_a_picture_that_is_missing_is_named(call, cwd):
    call("denoise", "none.png").refused(2, "none.png: no such picture")
    call("denoise", ".").refused(2, ".: is not a file")


def test_a_picture_is_not_replaced_by_what_is_made_of_it(call, cwd):
    Image.fromarray(dead_leaves(3, 32, 32)[0]).save(cwd / "a.png")
    before = (cwd / "a.png").read_bytes()
    call("denoise", "a.png", "-m", "nano", "-o", "./a.png").refused(2, "a.png: is the noisy picture itself", "-o")
    assert (cwd / "a.png").read_bytes() == before


def test_a_folder_without_pictures_is_named(call, cwd, tiny):
    (cwd / "empty").mkdir()
    (cwd / "empty/notes.txt").write_text("no picture", encoding="utf-8")
    call("-q", "distill", tiny, "--set", "data.train=[empty]").refused(2, "empty: holds no pictures; looked for .bmp")
    call("-q", "distill", tiny, "--set", "data.train=[none]").refused(2, "none: no such folder; give a folder")


def test_calibration_pictures_that_ranges_cannot_be_taken_from_are_named(call, cwd, tiny, leaves):
    for number in range(7):
        (cwd / "few").mkdir(exist_ok=True)
        shutil.copyfile(leaves / f"leaves-{number}.png", cwd / f"few/{number}.png")
    few = ("-q", "distill", tiny, "--set", "data.calibration=few")
    told = ("--set", "data.calibration=few", "--set", f"data.train=[{leaves}]")
    call(*few).refused(2, "few: 7 pictures", "at least 8", "data.calibration=embedded")
    Image.fromarray(np.full((64, 64), 7, np.uint8)).save(cwd / "few/flat.png")
    call(*few).refused(2, "few: 'flat.png' has one value everywhere (1 such of 8)")
    call("-q", "compile", "nano", "-t", "onnx", *told).refused(2, "few: 'flat.png'")
    assert not Path("runs/nano").exists()


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("training.steps=4", "--set training.steps=4: a MODEL is compiled as it is; settings here: data, noise,"),
        ("student.model=base", "--set student.model=base: a MODEL is compiled as it is"),
        ("data.channels=3", "--set data.channels=3: 'nano' takes 1; leave it out"),
        ("budgets.int8_drop=1", "unknown key 'budgets.int8_drop'; did you mean 'int8_drop_db'?"),
        ("budgets.int8_drop_db=-1", "'budgets.int8_drop_db' is -1; expected greater than or equal to 0"),
        ("quantization", "--set quantization: expected NAME=VALUE"),
    ],
)
def test_a_setting_that_compiling_does_not_heed_is_refused(call, cwd, setting, told):
    call("-q", "compile", "nano", "-t", "onnx", "--set", setting).refused(2, told)
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    "setting",
    [
        *("budgets.int8_drop_db=1", "quantization.qat.steps=9", "data.train=[mine]", "teacher.model=control"),
        *("quantization.keep_float=[head]", "data.evaluation_pictures=2", "noise.seed=1"),
    ],
)
def test_a_setting_that_layers_are_measured_without_is_refused(call, cwd, setting):
    told = f"--set {setting}: layers are measured without it; leave it out"
    call("sensitivity", "nano", "--set", setting).refused(2, told)


@pytest.mark.parametrize(
    ("setting", "of"),
    [
        ("data={train: [/nowhere]}", "data.train"),
        ("noise={seed: 1}", "noise.seed"),
        ("quantization={qat: {steps: 0}}", "quantization.qat"),
    ],
)
def test_a_section_that_holds_what_layers_are_measured_without_is_refused(call, cwd, setting, of):
    told = f"--set {setting}: layers are measured without '{of}'; leave that out"
    call("-q", "sensitivity", "nano", "--set", "quantization.equalize=false", "--set", setting).refused(2, told)


def test_layers_of_a_file_of_any_name_are_measured_with_settings(call, cwd, finished):
    shutil.copyfile(finished / "05-simplify/student.fp32.onnx", "my net.onnx")
    told = "nowhere: no such folder"
    call("-q", "sensitivity", "my net.onnx", "--set", "data.calibration=nowhere").refused(2, told)


def test_layers_are_not_measured_in_an_int8_that_was_not_asked_for(call, cwd):
    told = "quantization.mode is dynamic, and layers are measured in static INT8; leave it out"
    call("sensitivity", "nano", "--set", "quantization.mode=dynamic").refused(2, told)
    assert not list(cwd.iterdir())


def test_a_dry_run_refuses_a_wrong_setting(call, cwd):
    told = "unknown key 'budgets.int8_drop'"
    call("compile", "nano", "-t", "onnx", "--dry-run", "--set", "budgets.int8_drop=1").refused(2, told)


def test_a_dry_run_refuses_what_compiling_would(call, cwd, finished):
    call("compile", "nosuch", "--dry-run").refused(2, "'nosuch' is no model with shipped weights")
    call("compile", finished, "--set", "budgets.int8_drop_db=1", "--dry-run").refused(2, "the settings of its recipe")
    call("compile", "base-color", "--set", "data.channels=1", "--dry-run").refused(2, "'base-color' takes 3")
    call("compile", "base-color", "--set", "teacher.model=control", "--dry-run").refused(2, "'control'", "channels")
    call("compile", "nano", "--set", "teacher.weights=t.safetensors", "--dry-run").refused(2, "t.safetensors: no such")
    call("compile", "edgekit.models.plain:DnCnn", "--dry-run").refused(2, "needs its weights")
    call("compile", "-t", "ios-arm64", "--dry-run").refused(2, "the targets name no one student")
    edit(write_target(cwd / "odd.yaml", "odd", LIMITS["kept"]), "runner:", "input: {height: 20, width: 64}\nrunner:")
    onnx_file = finished / "05-simplify/student.fp32.onnx"
    for model in ("nano", finished, onnx_file):
        call("compile", model, "-t", "odd.yaml", "--dry-run").refused(4, "input 64x20 is not a tile", "multiples of 8")
    call("compile", onnx_file, "-t", "ios-arm64", "--dry-run").refused(4, "compiles from torch")
    assert list(tree(cwd)) == ["odd.yaml"]


@pytest.mark.parametrize(
    "arguments",
    [("distill", "student-nano"), ("train", "student-nano"), ("run",), ("plan",), ("compile", "nano")],
    ids=lambda arguments: arguments[0],
)
@pytest.mark.parametrize("setting", ["data.train=[embedded, {}]", "data.calibration={}", "data.evaluation={}"])
def test_a_dry_run_refuses_folders_without_pictures(call, cwd, arguments, setting):
    dry = () if arguments[0] == "plan" else ("--dry-run",)
    (cwd / "empty").mkdir()
    (cwd / "there").mkdir()
    (cwd / "there/a.png").write_bytes(b"no picture, as nothing is read")
    call(*arguments, *dry, "--set", setting.format("nofolder")).refused(2, "nofolder: no such folder; give a folder")
    call(*arguments, *dry, "--set", setting.format("empty")).refused(2, "empty: holds no pictures")
    assert call(*arguments, *dry, "--set", setting.format("there")).code == 0


def test_a_dry_run_of_a_run_asks_for_the_folders_that_its_targets_need(call, cwd, finished):
    shutil.copytree(finished, "mine")
    record = json.loads(Path("mine/run.json").read_text(encoding="utf-8"))
    record["identity"]["recipe"]["data"]["train"] = ["gone"]
    Path("mine/run.json").write_text(json.dumps(record), encoding="utf-8")
    edit(write_target(cwd / "float.yaml", "float", LIMITS["kept"]), "int8", "float32")
    call("compile", "mine", "-t", "onnx", "--dry-run").refused(2, "gone: no such folder")
    assert call("compile", "mine", "-t", "float.yaml", "--dry-run").code == 0


def test_a_dry_run_takes_what_compiling_would(call, cwd, finished):
    for model in ("base-color", finished, finished / "05-simplify/student.fp32.onnx"):
        settings = ("--set", "data.channels=3") if model == "base-color" else ()
        shown = call("compile", model, *settings, "--dry-run")
        assert (shown.code, shown.out, shown.err) == (0, f"would compile {model} for onnx\n", "")
    assert call("-q", "compile", "--dry-run").out == f"would compile {target.load('onnx').student} for onnx\n"
    assert not list(cwd.iterdir())


def test_a_model_is_not_trained_on_what_it_is_judged_on(call, cwd, leaves):
    for name, sizes in (("train", (0, 0)), ("judged", (8, 8))):
        (cwd / name).mkdir()
        picture = dead_leaves(900, 256, 256, 1)[0][sizes[0] :, sizes[1] :]
        Image.fromarray(np.ascontiguousarray(picture)).save(cwd / name / f"{name}.png")
    pictures = [f"data.calibration={leaves}", "data.train=[train]", "data.evaluation=judged"]
    told = call("-q", "compile", "nano", "-t", "onnx", *(x for p in pictures for x in ("--set", p)))
    told.refused(2, "train.png", "judged.png")
    assert not Path("runs").exists()


def test_a_run_has_its_own_settings(call, cwd, finished):
    told = call("-q", "compile", finished, "-t", "onnx", "--set", "budgets.int8_drop_db=1").refused(
        2, "edgekit distill"
    )
    assert "has the settings of its recipe" in told


@pytest.mark.parametrize("known", [True, False], ids=["asked first", "found by writing"])
def test_a_format_that_cannot_hold_the_picture_is_refused(call, cwd, monkeypatch, known):
    if not known:
        monkeypatch.setattr(denoising, "_MOST_PIXELS", {})
    Image.fromarray(np.zeros((8, 16_400), np.uint8)).save(cwd / "wide.png")
    call("denoise", "wide.png", "-o", "x.webp").refused(2, "x.webp: WEBP cannot hold 16400x8 pixels; use .png")
    assert list(tree(cwd)) == ["wide.png"]


def test_a_photograph_that_is_too_wide_for_jpeg_is_refused(call, cwd):
    Image.fromarray(np.zeros((8, 65_504), np.uint8)).save(cwd / "wide.png")
    call("denoise", "wide.png", "-o", "x.jpg").refused(2, "x.jpg: JPEG cannot hold 65504x8 pixels; use .png")


def test_a_result_that_is_no_picture_format_is_refused(call, cwd, leaves):
    call("denoise", leaves / "leaves-1.png", "-o", "x.gif").refused(2, "x.gif: '.gif' is no picture format; use one of")


def test_a_picture_with_damaged_exif_data_is_denoised_without_a_word_of_pillows(cwd):
    gray = Image.fromarray(np.full((40, 40), 99, np.uint8))
    gray.save(cwd / "x.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01")
    ended = call_process("denoise", "x.jpg")
    assert (ended.code, ended.err) == (0, "")


def test_a_large_picture_that_is_cut_is_told_in_one_line(cwd):
    Image.new("1", (9500, 9500)).save(cwd / "x.png")
    (cwd / "x.png").write_bytes((cwd / "x.png").read_bytes()[:-5000])
    call_process("denoise", "x.png").refused(2, "x.png: not a readable picture: image file is truncated")


def test_a_defect_keeps_its_traceback_whatever_words_it_has(call, cwd, monkeypatch):
    def examine():
        raise RuntimeError("out of memory cards")

    monkeypatch.setattr(doctor, "examine", examine)
    with pytest.raises(RuntimeError, match="out of memory cards"):
        call("doctor")


@pytest.mark.parametrize("engine", ["torch", "onnxruntime"])
def test_memory_that_runs_out_is_told(call, cwd, finished, engine, monkeypatch):
    monkeypatch.setattr(denoising, "_AT_ONCE", 4000 * 4000)  # In pieces the file's network would have enough.
    model = "teacher" if engine == "torch" else finished / "05-simplify/student.fp32.onnx"
    Image.fromarray(np.zeros((4000, 4000), np.uint8)).save(cwd / "x.png")
    before = resource.getrlimit(resource.RLIMIT_AS)
    held = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + 2**30, before[1]))
    try:
        ended = call("denoise", "x.png", "-m", model)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    ended.refused(2, "memory ran out; take smaller pictures, a smaller model or more memory")
    assert list(tree(cwd)) == ["x.png"]


# Weights


def net_file(cwd: Path, name: str, net: str = "nano") -> Path:
    """Return a file of weights in one of the formats."""
    values = models.create(net).state_dict()
    if name.endswith(".safetensors"):
        weights.save(values, cwd / name)
    else:
        torch.save(values, cwd / name, _use_new_zipfile_serialization=name != "old.pt")
    return cwd / name


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "old.pt"])
def test_weights_that_are_cut_anywhere_are_damaged(call, cwd, tiny, name):
    whole = net_file(cwd, name).read_bytes()
    for length in (0, 1, 2, 3, 9, 17, 100, 500, len(whole) // 2, len(whole) - 1):
        (cwd / name).write_bytes(whole[:length])
        with pytest.raises(IntegrityError, match="damaged or truncated"):
            weights.read(cwd / name)
    call("-q", "distill", tiny, "--set", f"student.weights={name}").refused(6, f"{name}: damaged or truncated", "again")


@pytest.mark.parametrize("name", ["w.pt", "old.pt"])
def test_a_checkpoint_with_wrong_bytes_anywhere_is_read_or_refused_but_never_crashes(cwd, name):
    whole, net = net_file(cwd, name).read_bytes(), models.create("nano")
    for place in range(0, 4000, 53):
        (cwd / name).write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        with contextlib.suppress(InputError, IntegrityError):
            weights.load_into(net, cwd / name)


@pytest.mark.parametrize("command", ["compile", "lint", "sensitivity"])
@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        ("quantized", "net.onnx: is quantized already; give the float graph that it was made from"),
        ("nan", "values that are NaN or infinite; train again from a checkpoint before"),
    ],
)
def test_an_onnx_file_that_int8_cannot_be_made_from_is_refused_by_its_own_name(call, cwd, command, spoil, told):
    net = models.create("nano").eval()
    path = export.export_onnx(net, channels=1, takes_sigma=True, stride=8, out=cwd / "net.onnx")
    if spoil == "quantized":
        quantize.quantize_dynamic(path, path)
    else:
        model = checks.load_onnx(path)
        weight = model.graph.initializer[0]
        weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight) * np.nan, weight.name))
        onnx.save(model, path)
    arguments = ("-t", "onnx") if command == "compile" else ()
    call("-q", command, "net.onnx", *arguments).refused(2, "net.onnx: ", told)
    assert not Path("runs").exists()


@pytest.mark.parametrize("name", ["w.pt", "w.pth", "w.bin", "w.safetensors"])
@pytest.mark.parametrize(
    "junk", [b"junk, junk and more junk", b'{"a": 1}', bytes(range(256))], ids=["text", "json", "bytes"]
)
def test_junk_instead_of_weights_is_damaged(cwd, name, junk):
    (cwd / name).write_bytes(junk)
    with pytest.raises(IntegrityError, match=rf"{name}: damaged or truncated"):
        weights.read(cwd / name)


@pytest.mark.parametrize("name", ["w.pt", "w.PTH", "w.ckpt", "w.bin", "w.pkl"])
@pytest.mark.parametrize("write", ["torch", "pickle"])
def test_code_in_a_pickle_does_not_run(call, cwd, tiny, name, write):
    canary = cwd / "canary"
    if write == "torch":
        torch.save({"weight": torch.zeros(1), "code": Runs(canary)}, cwd / name)
    else:
        (cwd / name).write_bytes(pickle.dumps(Runs(canary)))
    call("-q", "distill", tiny, "--set", f"student.weights={name}").refused(
        2, f"{name}: holds more than tensors, and loading it could run code; save its state_dict() with safetensors"
    )
    assert not canary.exists()
    torch.load(cwd / name, weights_only=False) if write == "torch" else pickle.loads((cwd / name).read_bytes())  # noqa: S301
    assert canary.exists(), "the file would have run nothing anyway"


def test_code_in_a_pickle_that_is_called_safetensors_does_not_run(cwd):
    (cwd / "w.safetensors").write_bytes(pickle.dumps(Runs(cwd / "canary")))
    with pytest.raises(IntegrityError, match="damaged"):
        weights.read(cwd / "w.safetensors")
    assert not (cwd / "canary").exists()


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ([1, 2], "is not a state_dict"),
        ({1: torch.zeros(1)}, "is not a state_dict"),
        ({"state_dict": {}}, "is not a state_dict; save the network's"),
        (
            {"epoch": 3, "params": {"a": torch.zeros(1)}, "params_ema": {"a": torch.zeros(1)}},
            "holds one under 'params' and one under 'params_ema'; take it out: torch.save(",
        ),
    ],
    ids=["list", "numbers as names", "nothing in it", "nested"],
)
def test_a_checkpoint_that_is_no_state_dict_is_refused(cwd, value, told):
    torch.save(value, cwd / "w.pt")
    with pytest.raises(InputError, match=re.escape(told)):
        weights.read(cwd / "w.pt")


@pytest.mark.parametrize(
    ("renamed", "told"),
    [
        (lambda name: f"module.{name}", "it has them all behind 'module.': save them under names without it"),
        (lambda name: name.removeprefix("0."), "it has them all without '0.': let the class inherit from the network"),
        (
            lambda name: name.replace("weight", "weights"),
            "has no '0.weight'; the nearest there is '0.weights'; these weights are of another architecture or option",
        ),
        (lambda name: f"Q{len(name)}", "has no '0.weight'; these weights are of another architecture or option"),
    ],
    ids=["in front of the file's", "in front of the network's", "another", "nothing alike"],
)
def test_weights_of_other_names_are_refused_with_what_is_nearest(cwd, renamed, told):
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 1, 3))
    save_file({renamed(name): value for name, value in net.state_dict().items()}, cwd / "w.safetensors")
    with pytest.raises(InputError, match=re.escape(told)):
        weights.load_into(net, cwd / "w.safetensors")


@pytest.mark.parametrize(
    ("net", "told"),
    [("small", "is (32, 4, 3, 3), the network has (16, 4, 3, 3); name the matching model"), ("dncnn", "has no '")],
)
def test_weights_of_another_architecture_are_refused_with_the_parameter(call, cwd, tiny, net, told):
    name = net_file(cwd, "w.safetensors", net).name
    call("-q", "distill", tiny, "--set", f"student.weights={name}").refused(2, f"{name}: ", told)


def test_weights_with_one_parameter_too_many_or_not_finite_are_refused(cwd):
    values = dict(models.create("nano").state_dict())
    save_file(values | {"more": torch.zeros(1)}, cwd / "more.safetensors")
    with pytest.raises(InputError, match="'more' has no place in the network"):
        weights.load_into(models.create("nano"), cwd / "more.safetensors")
    first = next(iter(values))
    save_file(values | {first: torch.full_like(values[first], float("nan"))}, cwd / "nan.safetensors")
    with pytest.raises(IntegrityError, match=f"'{first}' holds values that are not finite"):
        weights.load_into(models.create("nano"), cwd / "nan.safetensors")


def test_weights_that_are_missing_are_named(call, cwd, tiny):
    call("-q", "distill", tiny, "--set", "student.weights=none.safetensors").refused(
        2, "none.safetensors: no such file"
    )
    call("compile", "edgekit.models.plain:DnCnn", "-t", "onnx").refused(2, "needs its weights; add --weights FILE")


def test_shipped_weights_whose_bytes_changed_are_refused(cwd, monkeypatch):
    shutil.copy(zoo.weights("nano"), cwd)
    shutil.copy(zoo.weights("nano").with_suffix(".json"), cwd)
    path = cwd / "nano.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    monkeypatch.setattr(zoo, "_FOLDER", cwd)
    with pytest.raises(IntegrityError, match="is not the file that its card describes; reinstall edgekit"):
        zoo.weights("nano")


@pytest.mark.parametrize(
    "arguments", [("compile", "--dry-run"), ("lint",), ("sensitivity", "--engine", "onnxruntime")], ids=lambda a: a[0]
)
@pytest.mark.parametrize("what", ["runs/nosuch", "mine.py", "mine.pth"])
def test_what_is_no_model_is_told_what_would_be_one(call, cwd, arguments, what):
    told = f"'{what}' is no model with shipped weights, no run folder, no ONNX file and no package.module:Class; "
    call(arguments[0], what, *arguments[1:]).refused(2, told)


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("no.such_module:Net", "'no.such_module:Net' cannot be made: ModuleNotFoundError: No module named 'no'"),
        ("edgekit.models.plain:Nothing", "AttributeError: module 'edgekit.models.plain' has no attribute 'Nothing'"),
        ("json:dumps", "'json:dumps' cannot be made: "),
        ("nets/mine.py:Net", "'nets/mine.py:Net' names a file, not a module; give mine:Net, in the file's folder"),
        ("collections:OrderedDict", "'collections:OrderedDict' is a OrderedDict, not a torch.nn.Module"),
    ],
)
def test_a_class_that_is_no_network_is_refused(call, cwd, what, told):
    name = net_file(cwd, "w.safetensors").name
    call("compile", what, "--weights", name, "-t", "onnx").refused(2, told)


@pytest.mark.parametrize(
    ("name", "code", "told"),
    [
        ("broken", "class Net(:\n", "'broken:Net' cannot be made: SyntaxError: "),
        ("leaves0", "import sys\nsys.exit()\n", "'leaves0:Net' cannot be made: SystemExit"),
        ("leaves1", "import sys\nsys.exit(1)\n", "'leaves1:Net' cannot be made: SystemExit: 1"),
        ("raises", "def Net():\n    raise ValueError('no settings')\n", "cannot be made: ValueError: no settings"),
        ("two_planes", TWO_PLANES, "'two_planes:Net' denoises no picture: RuntimeError: "),
        ("uneven", f"{TWO_PLANES}    stride = 1, 2\n", "'uneven:Net' denoises no picture: TypeError: "),
    ],
    ids=["syntax", "exit", "exit with 1", "constructor", "forward", "stride"],
)
@pytest.mark.parametrize("verb", ["lint", "compile"])
def test_what_a_users_own_code_does_is_told_in_one_line(call, cwd, verb, name, code, told):
    (cwd / f"{name}.py").write_text(code, encoding="utf-8")
    save_file({"0.weight": torch.zeros(2, 2, 3, 3), "0.bias": torch.zeros(2)}, cwd / "w.safetensors")
    call("-q", verb, f"{name}:Net", "--weights", "w.safetensors").refused(2, told)
    assert not Path("runs").exists()


def test_an_error_of_edgekits_own_passes_through_a_users_code(call, cwd):
    code = "from edgekit.errors import UnsupportedError\ndef Net():\n    raise UnsupportedError('too new')\n"
    (cwd / "too_new.py").write_text(code, encoding="utf-8")
    assert call("lint", "too_new:Net").refused(4) == "error: too new"


# What another kind of model would heed


@pytest.mark.parametrize("what", ["shipped", "run", "onnx"])
@pytest.mark.parametrize("verb", ["compile", "denoise", "lint", "sensitivity"])
def test_weights_for_what_has_its_own_are_refused(call, cwd, finished, leaves, verb, what):
    model = {"shipped": "nano", "run": finished, "onnx": finished / "05-simplify/student.fp32.onnx"}[what]
    arguments = [leaves / "leaves-1.png", "-m", model] if verb == "denoise" else [model]
    call(verb, *arguments, "--weights", "w.safetensors").refused(2, f"--weights w.safetensors: '{model}' has its own")
    assert not list(cwd.iterdir())


def test_weights_for_no_model_at_all_are_refused(call, cwd):
    call("compile", "--weights", "w.safetensors").refused(
        2, "--weights w.safetensors: the targets' student has its own"
    )


@pytest.mark.parametrize("what", ["run", "onnx", "class"])
def test_an_option_for_what_has_none_is_refused(call, finished, what):
    model = {"run": finished, "onnx": finished / "05-simplify/student.fp32.onnx", "class": "test_lint:Small"}[what]
    call("lint", model, "--option", "activation=hardswish").refused(
        2, f"--option activation: '{model}' is what it is; options are for a name of: edgekit models"
    )


@pytest.mark.parametrize("given", [["-o", "elsewhere"], ["--overwrite"]], ids=["-o", "--overwrite"])
def test_another_folder_for_the_bundles_of_a_run_is_refused(call, cwd, finished, given):
    shutil.copytree(finished, "runs/copy")
    before = tree(cwd)
    told = f"{' '.join(given)}: "
    call("compile", "runs/copy", *given).refused(2, f"{told}'runs/copy' keeps its bundles in itself; leave")
    call("compile", *given).refused(2, f"{told}the newest run keeps its bundles in itself; leave")
    assert tree(cwd) == before


# ONNX files


@pytest.mark.parametrize("verb", ["compile", "denoise"])
def test_junk_instead_of_an_onnx_file_is_refused(call, cwd, leaves, verb):
    (cwd / "x.onnx").write_bytes(b"junk, junk and more junk")
    arguments = (
        ["compile", "x.onnx", "-t", "onnx"]
        if verb == "compile"
        else ["denoise", leaves / "leaves-1.png", "-m", "x.onnx"]
    )
    call(*arguments).refused(2, "x.onnx: is not a whole ONNX model (24 bytes)", "export it again")
    (cwd / "x.onnx").unlink()
    call(*arguments).refused(2, "x.onnx: cannot be read: No such file or directory")


def test_an_onnx_file_that_is_cut_anywhere_is_refused(call, cwd, finished):
    whole = (finished / "05-simplify/student.fp32.onnx").read_bytes()
    for part in range(16):
        (cwd / "x.onnx").write_bytes(whole[: len(whole) * part // 16])
        call("compile", "x.onnx", "-t", "onnx").refused(2, "x.onnx: ")
    assert not Path("runs").exists()


# Engines


MISSING = """
import sys
from edgekit import backends
from edgekit.errors import ToolMissingError

for engine in backends.DOORS:
    module = "coremltools" if engine == "coreml" else engine
    sys.modules[module] = None
    try:
        backends.load(engine)
    except ToolMissingError as error:
        print(engine, error.exit_code, error)
    del sys.modules[module]
"""


def test_every_engine_that_is_not_installed_is_told_with_the_command_that_installs_it():
    done = subprocess.run([sys.executable, "-c", MISSING], capture_output=True, text=True, check=True)
    told = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert told.keys() == backends.DOORS.keys()
    for engine, line in told.items():
        module = "coremltools" if engine == "coreml" else engine
        assert line.startswith(
            f"5 the engine '{engine}' needs the package '{module}', which is not installed; run: pip"
        )
        assert line.endswith(f"'edgekit[{backends.EXTRAS.get(engine, 'all')}]'")


def shim(folder: Path, module: str, body: str) -> Path:
    """Return a folder for the import path, in which a module does not load."""
    folder.mkdir()
    (folder / f"{module}.py").write_text(body, encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (
            "raise ModuleNotFoundError(\"No module named 'tvm'\", name='tvm')",
            "the engine 'tvm' needs the package 'tvm', which is not installed; run: pip install 'edgekit[tvm]'",
        ),
        (
            "raise OSError('libtvm.so: undefined symbol')",
            "the engine 'tvm' is installed but does not load: libtvm.so: undefined symbol; reinstall it: "
            "pip uninstall --yes apache-tvm && pip install 'edgekit[tvm]'",
        ),
    ],
    ids=["missing", "broken"],
)
def test_a_command_whose_engine_does_not_load_ends_before_it_makes_anything(cwd, body, told):
    path = shim(cwd / "shim", "tvm", body)
    ended = call_process("compile", "nano", "-t", "onnx", "-t", "android-arm64", python_path=path)
    ended.refused(5, told)
    assert not Path("runs").exists()


def test_float16_for_android_is_unsupported(call, cwd, finished):
    shutil.copytree(finished, "run")
    text = (ROOT / "targets/android-arm64.yaml").read_text(encoding="utf-8")
    text = text.replace("precision: int8", "precision: float16").replace("  min_integer_macs: 0.95\n", "")
    (cwd / "half.yaml").write_text(text, encoding="utf-8")
    call("-q", "compile", "run", "-t", "half.yaml").refused(4, "float16")


@pytest.mark.parametrize("what", ["run", "nano", "run/05-simplify/student.fp32.onnx"])
@pytest.mark.parametrize(
    ("tile", "told"),
    [("250", ("input 250x250 is not a tile that", "to multiples of 8")), ("8", ("8x8 is too small to be verified",))],
)
def test_a_tile_that_is_not_taken_is_refused_before_anything_is_made(call, cwd, finished, what, tile, told):
    shutil.copytree(finished, "run")
    before = tree(cwd)
    call("-q", "compile", what, "-t", "android-arm64", "--tile", tile).refused(4, *told)
    # A run says in its lock who held it last.
    assert {**tree(cwd), "run/lock": b""} == {**before, "run/lock": b""}


def test_a_tile_that_the_teacher_beside_it_does_not_take_is_refused(call, cwd):
    refused = call("-q", "compile", "control", "-t", "linux-arm64", "--tile", "100")
    refused.refused(4, "input 100x100 is not a tile that 'control'", "to multiples of 8")
    assert list(cwd.iterdir()) == []


def test_a_dry_run_asks_a_runs_own_recipe_which_tiles_it_takes(call, cwd):
    """Without a teacher a tile need not be one of the teacher's."""
    file = write_target(cwd / "odd.yaml", "odd", LIMITS["kept"])
    edit(file, "precision: int8", "precision: float32\ninput: {height: 60, width: 60}")
    assert call("-q", "compile", "control", "-t", "odd.yaml", "-o", "r", "--set", "teacher=null").code == 0
    assert call("-q", "compile", "r", "-t", "odd.yaml", "--dry-run").out == "would compile r for odd\n"


# Run folders and bundles


def test_a_folder_of_another_run_is_refused_and_replaced_when_told(call, tiny):
    assert call("-q", "distill", tiny, "-o", "r").code == 0
    before = tree(Path("r"))
    other = ["-q", "distill", tiny, "-o", "r", "--set", "training.steps=2"]
    call(*other).refused(
        2, "r: holds another run (recipe.training.steps is 3 there, 2 here); choose another folder with -o, or replace"
    )
    assert tree(Path("r")) | {"lock": b""} == before | {"lock": b""}
    assert call(*other, "--overwrite").code == 0
    assert run.read_identity(Path("r"))["recipe"]["training"]["steps"] == 2


def test_a_folder_that_another_process_holds_is_refused_with_its_number(call, cwd, tiny):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, "r"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "holding\n"
        call("distill", tiny, "-o", "r").refused(2, f"r: is in use by process {process.pid}", "wait for it, or choose")
        process.communicate("")


def test_a_file_of_a_run_that_changed_is_refused_by_every_command_that_reads_it(call, cwd, tiny, finished, leaves):
    shutil.copytree(finished, "run")
    path = cwd / "run/02-student/student.safetensors"
    values = load_file(path)
    save_file({name: 2 * value for name, value in values.items()}, path)
    told = "02-student/student.safetensors: changed since stage 'student' wrote it; restore it, or delete"
    edit(tiny, "pictures", "pictures")
    for arguments in (
        ["distill", tiny, "-o", "run"],
        ["compile", "run", "-t", "onnx"],
        ["denoise", leaves / "leaves-1.png", "-m", "run", "-o", "out.png"],
        ["baseline", "run"],
    ):
        call("-q", *arguments).refused(6, told)
    assert not Path("out.png").exists()


def test_a_bundle_that_changed_is_refused_by_every_command_that_reads_it(call, cwd, finished, leaves):
    shutil.copytree(finished / "bundles/kept", "kept")
    (cwd / "kept/README.md").write_text("x", encoding="utf-8")
    call("verify", "kept").refused(6, "kept/README.md: changed; restore the bundle, or compile it again")
    call("denoise", leaves / "leaves-1.png", "-m", "kept").refused(6, "kept/README.md: changed")


def test_what_is_no_run_and_no_bundle_is_refused(call, cwd):
    (cwd / "empty").mkdir()
    call("verify", "empty").refused(2, "empty: is neither a bundle nor a run with bundles; make one: edgekit compile")
    call("compile", "empty", "-t", "onnx").refused(2, "empty: is not a run folder (it has no run.json)")
    call("verify").refused(2, "there is no run in 'runs/'; start one: edgekit distill")
    call("compile", "-t", "ios-arm64").refused(2, "there is no run in 'runs/', and the targets name no one student")
    assert tree(cwd) == {}


def test_a_home_folder_is_not_taken_for_a_run_folder(call, cwd, tiny):
    (cwd / "home").mkdir()
    (cwd / "home/.letter.tmp").write_text("mine", encoding="utf-8")
    (cwd / "home/letter").write_text("mine", encoding="utf-8")
    before = tree(cwd)
    call("distill", tiny, "-o", "home", "--overwrite").refused(2, "home: is not a run folder, and not empty")
    assert tree(cwd) == before


def test_a_target_whose_name_leads_out_of_the_run_is_refused(call, cwd, finished):
    shutil.copytree(finished, "run")
    write_target(cwd / "mine.yaml", "../../home", "size_mib: 8.0")
    (cwd / "home").mkdir()
    (cwd / "home/letter").write_text("mine", encoding="utf-8")
    call("-q", "compile", "run", "-t", "mine.yaml").refused(2, "mine.yaml:2: 'name' is '../../home'")
    assert tree(cwd / "home") == {"letter": b"mine"}


# Disks


def test_a_place_that_cannot_be_written_to_is_refused(call, cwd, tiny, leaves):
    (cwd / "file").write_text("mine", encoding="utf-8")
    call("distill", tiny, "-o", "file/run").refused(2, "file/run: cannot be written: Not a directory", "-o")
    call("distill", tiny, "-o", "n" * 300).refused(2, "cannot be written: File name too long")
    call("denoise", leaves / "leaves-1.png", "-o", "file/out.png").refused(2, "file/out.png: cannot be written")
    (cwd / "out.png").mkdir()
    call("denoise", leaves / "leaves-1.png", "-o", "out.png").refused(2, "out.png: cannot be written: Is a directory")


def test_a_place_that_takes_no_files_is_refused_before_anything_is_measured(call, cwd, tiny, finished, leaves):
    picture, bundle = leaves / "leaves-1.png", finished / "bundles/kept"
    (cwd / "folder").mkdir()
    os.mkfifo(cwd / "pipe")
    os.mkfifo(cwd / "pipe.png")
    for place, told in (("/proc/x", "cannot be written"), ("", "Is a directory"), ("pipe", "is a device or a pipe")):
        call("verify", bundle, "-o", place).refused(2, told)
        call("bench", bundle, "--device", "local", "-o", place).refused(2, told)
        call("baseline", "nano", "-o", place).refused(2, told)
    call("denoise", picture, "-o", "/proc/x.png").refused(2, "/proc/x.png: cannot be written: ", "-o")
    call("denoise", picture, "-o", "pipe.png").refused(2, "pipe.png: is a device or a pipe; name a file")
    call("sensitivity", "nano", "-o", "/proc/x").refused(2, "/proc/x/sensitivity.json: cannot be written: ", "-o")
    call("compare", "nano", "-o", "/proc/x").refused(2, "/proc/x: cannot be written: ", "-o")
    call("distill", tiny, "-o", "/proc/x").refused(2, "/proc/x: cannot be written: ", "-o")
    call("compile", "nano", "-o", "/proc/x/run").refused(2, "/proc/x/run: cannot be written: ", "-o")
    assert (cwd / "pipe").is_fifo()
    assert sorted(p.name for p in cwd.iterdir()) == ["folder", "pipe", "pipe.png", "tiny.yaml"]


@pytest.mark.parametrize("verb", [["verify"], ["bench", "--device", "local"]], ids=["verify", "bench"])
def test_a_result_inside_the_bundle_that_it_is_about_is_refused(call, cwd, finished, verb):
    shutil.copytree(finished / "bundles/kept", "kept")
    before = tree(cwd)
    for place in ("kept/manifest.json", "kept/reference/../new.json"):
        call(*verb, "kept", "-o", place).refused(2, f"{place}: lies in the bundle kept, which is never written to")
    assert tree(cwd) == before


@pytest.fixture
def small_disk(cwd: Path) -> Iterator[Path]:
    """Give a file system of its own with 100 KiB."""
    disk = cwd / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(disk)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_ends_the_run_and_the_same_command_goes_on(call, cwd, tiny, small_disk):
    arguments = ["-q", "distill", tiny, "-o", "disk/run"]
    call(*arguments).refused(2, "disk/run/", "no space is left on the disk", "free some and start the same command")
    assert not list((cwd / "disk/run").rglob("*.tmp"))
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    ended = call(*arguments)
    assert (ended.code, ended.err) == (0, "")
    assert [s.name for s in run.read_stages(cwd / "disk/run")] == ["pictures", "student"]


@pytest.fixture
def small_files() -> Iterator[Callable[[int], None]]:
    """Give a function that limits how large a file may become, in bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_that_may_not_grow_is_told_like_a_full_disk(call, cwd, tiny, small_files):
    arguments = ["-q", "distill", tiny, "-o", "r"]
    small_files(50_000)
    ended = call(*arguments)
    small_files(resource.RLIM_INFINITY)
    ended.refused(2, "r/", "no space is left on the disk", "free some and start the same command again")
    assert not list((cwd / "r").rglob("*.tmp"))
    assert call(*arguments).code == 0


@pytest.mark.parametrize("what", ["safetensors", "numpy", "picture", "text"])
def test_a_full_disk_is_told_whoever_writes(cwd, small_files, what):
    from edgekit.files import atomic_file, write_json

    pixels = np.random.default_rng(0).integers(0, 255, (300, 300), np.uint8)

    def write(path: Path) -> None:
        if what == "safetensors":
            weights.save({"w": torch.zeros(90_000)}, path)
        elif what == "text":
            write_json(path, {"text": "x" * 90_000})
        else:
            with atomic_file(path) as temporary:
                pixels.tofile(temporary) if what == "numpy" else Image.fromarray(pixels).save(temporary, format="PNG")

    (cwd / "out").write_text("before", encoding="utf-8")
    small_files(50_000)
    try:
        with pytest.raises(InputError, match="out: no space is left on the disk"):
            write(cwd / "out")
    finally:
        small_files(resource.RLIM_INFINITY)
    assert tree(cwd) == {"out": b"before"}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_an_output_that_takes_nothing_is_told():
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(command("targets"), stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: no space is left on the disk; free some and start the same command again\n"


# Interruptions


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_an_interrupted_command_ends_with_its_code_and_one_line_and_goes_on_when_repeated(cwd, tiny, number, code):
    settings = [f"--set=training.{s}" for s in ("steps=60", "checkpoint_seconds=0.01")]
    with subprocess.Popen(
        command("distill", tiny, *settings), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        until = time.monotonic() + 120
        while not (saved := list(cwd.glob("runs/tiny/*/checkpoint.safetensors"))) and time.monotonic() < until:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(number)
        out, err = process.communicate()
    assert process.returncode == code
    assert out == ""
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if line]
    assert lines[-1] == "interrupted; start the same command again to go on"
    assert all(tells_progress(line) for line in lines[:-1]), err
    assert saved[0].is_file()
    assert not list((cwd / "runs").rglob("*.tmp"))
    ended = call_process("distill", tiny, *settings)
    assert ended.code == 0, ended.err
    assert "going on at step " in ended.err


def tells_progress(line: str) -> bool:
    """Return whether a line is one of those that tell of progress."""
    return line.startswith(("pictures ...", "student ...", "training: step", "teacher 'nano' is refused"))
