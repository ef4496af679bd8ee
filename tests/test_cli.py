import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import pytest
from conftest import LIMITS, command, tree, write_target
from PIL import Image
from tiny import write_pictures

from edgekit import __version__, models, recipe, target, zoo
from edgekit.cli import cli
from edgekit.data import sets
from edgekit.data.noise import add_gaussian, clipped_uint8
from edgekit.measure import quality
from edgekit.pipeline import baseline, networks
from edgekit.pipeline.golden import golden_pictures

COMMANDS = list(cli.commands)
HEAVY = ("torch", "numpy", "onnx", "onnxruntime", "openvino", "tvm", "coremltools", "pydantic", "ruamel", "rich", "PIL")
HELPS = """
import sys
from edgekit.cli import cli, main
for command in ([], *([name] for name in cli.commands)):
    sys.argv = ["edgekit", *command, "--help"]
    try:
        main()
    except SystemExit as left:
        assert left.code == 0, (command, left.code)
print("loaded:", [name for name in sys.modules if name in {heavy}], file=sys.stderr)
"""


def answer(out: str) -> dict:
    """Return what a command printed, which must be one JSON object with its schema's version."""
    value = json.loads(out)
    assert value["schema_version"] == 1
    return value


def test_help_and_every_commands_help_load_nothing_heavy():
    done = subprocess.run(
        [sys.executable, "-c", HELPS.replace("{heavy}", repr(HEAVY))], capture_output=True, text=True, check=True
    )
    assert done.stderr == "loaded: []\n"
    assert done.stdout.count("Usage: edgekit") == len(COMMANDS) + 1


def test_importing_the_package_loads_nothing_heavy():
    code = f"import sys, edgekit; print([name for name in sys.modules if name in {HEAVY!r}])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout == b"[]\n"


def test_the_commands_come_in_the_order_of_the_way_through(call):
    lines = call("--help").out.splitlines()
    listed = [line.split()[0] for line in lines[lines.index("Commands:") + 1 :]]
    assert listed == COMMANDS
    assert listed[:4] == ["distill", "train", "compile", "verify"]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_commands_help_has_an_example_on_a_line_of_its_own(name, call):
    shown = call(name, "--help")
    assert shown.code == 0
    examples = re.findall(rf"^  (edgekit {name}\b.*)$", shown.out, re.MULTILINE)
    assert examples, shown.out
    assert "\\b" not in shown.out


@pytest.mark.parametrize("name", [n for n in COMMANDS if "recipe_name" in {p.name for p in cli.commands[n].params}])
def test_a_command_that_takes_a_recipe_says_that_it_may_be_a_file(name, call):
    assert "RECIPE is a name of `edgekit recipes`, or a YAML file." in call(name, "--help").out


@pytest.mark.parametrize("name", COMMANDS)
def test_the_examples_of_a_commands_help_can_be_parsed(name):
    found = cli.commands[name]
    assert found.help is not None
    examples = re.findall(rf"^edgekit {name}\b(.*)$", inspect.cleandoc(found.help), re.MULTILINE)
    assert examples
    for example in examples:
        arguments = example.split(">")[0].split()
        found.make_context(name, arguments, resilient_parsing=False).close()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_of_a_command_says_what_it_does(name):
    for parameter in cli.commands[name].params:
        assert not isinstance(parameter, click.Option) or parameter.help


def test_the_version_is_the_packages(call):
    assert call("--version").out == f"edgekit, version {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["compile", "--tarjet", "x"], "No such option '--tarjet'"),
        (["distil"], "No such command 'distil'"),
        (["denoise"], "Missing argument 'IMAGE'"),
        (["denoise", "x.png", "--sigma", "300"], "300.0 is not in the range 0<=x<=255"),
        (["denoise", "x.png", "--sigma", "nan"], "not a finite number"),
        (["verify", "x", "--seconds", "inf"], "not a finite number"),
        (["verify", "x", "--threads", "0"], "0 is not in the range x>=1"),
        (["schema", "bundle"], "'bundle' is not one of 'recipe', 'target'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_command_line_exits_with_2(call, arguments, told):
    ended = call(*arguments)
    assert (ended.code, ended.out) == (2, "")
    assert told in ended.err
    assert "Traceback" not in ended.err


@pytest.mark.parametrize(
    ("verb", "name"), [*(("targets", n) for n in target.names()), *(("recipes", n) for n in recipe.names())]
)
def test_the_file_of_a_shipped_recipe_or_target_is_a_start_for_ones_own(call, cwd, verb, name):
    (cwd / "mine.yaml").write_text(call(verb, name).out, encoding="utf-8")
    loaded = (target if verb == "targets" else recipe).load("mine.yaml")
    told = answer(call(verb, name, "--json").out)
    assert told.pop("name") == loaded.name == name
    assert told["description"] == loaded.description
    call(verb, name[:-1]).refused(2, f"unknown {verb[:-1]} '{name[:-1]}'; did you mean")
    call(verb, "mine.yaml").refused(2, f"unknown {verb[:-1]} 'mine.yaml'")


@pytest.mark.parametrize("command_name", ["targets", "recipes", "models"])
def test_what_is_shipped_is_listed(command_name, call):
    names = {"targets": target.names(), "recipes": recipe.names(), "models": models.names()}[command_name]
    shown = call(command_name)
    assert (shown.code, shown.err) == (0, "")
    for name in names:
        assert re.search(rf"^ {re.escape(name)} ", shown.out, re.MULTILINE)
    listed = [item["name"] for item in answer(call(command_name, "--json").out)["items"]]
    assert [name for name in listed if name in names] == names
    # Weights of variants stand behind their network.
    variants = set(zoo.names()) - set(names) if command_name == "models" else set()
    assert set(listed) - set(names) == variants


def test_models_tell_what_the_shipped_weights_reach(call):
    items = {item["name"]: item for item in answer(call("models", "--json").out)["items"]}
    assert items["nano"]["parameters"] == 43396
    measured = {m.pictures: m.psnr_mdb for m in zoo.card("nano").measured if m.sigma == 25}
    assert items["nano"]["sigma_25_psnr_mdb"] == measured
    assert "embedded-evaluation" in measured
    assert (items["large"]["shipped"], items["teacher-a"]["shipped"]) == (True, False)
    assert f"{measured['embedded-evaluation'] / 1000:.2f} dB on embedded-evaluation" in call("models").out


def test_doctor_names_every_engine_and_the_command_that_installs_it(call, monkeypatch):
    monkeypatch.setitem(sys.modules, "tvm", None)
    found = {item["name"]: item for item in answer(call("doctor", "--json").out)["items"]}
    assert found["onnxruntime"]["found"] is True
    assert (found["tvm"]["found"], found["tvm"]["fix"]) == (False, "pip install 'edgekit[tvm]'")
    assert "pip install 'edgekit[tvm]'" in call("doctor").out


def test_a_plan_says_what_is_made_and_what_is_to_do(call, tiny, finished):
    assert {s["state"] for s in answer(call("plan", tiny, "--json").out)["items"]} == {"to do"}
    steps = {s["name"]: s for s in answer(call("plan", tiny, "-o", finished, "--json").out)["items"]}
    assert (steps["student"]["state"], steps["fuse"]["state"]) == ("made", "made")
    assert (steps["quantize/onnxruntime"]["state"], steps["bundles/onnx"]["state"]) == ("made", "to do")
    assert "from shipped weights, 3 steps, taught by 'nano'" in steps["student"]["what"]


def test_a_plan_tells_both_limits_of_training_and_of_training_for_int8_only_where_it_may_be(call, tiny):
    def told(*settings: str) -> dict[str, str]:
        steps = answer(call("plan", tiny, *(x for s in settings for x in ("--set", s)), "--json").out)["items"]
        return {s["name"]: s["what"] for s in steps}

    limited = told("training.max_minutes=2.5", "quantization.qat.steps=600")
    assert "weights, 3 steps, at most 2.5 minutes, taught by" in limited["student"]
    assert limited["quantize/onnxruntime"] == "INT8 for onnxruntime, trained with its rounding where it loses too much"
    by_time = told("training.steps=0", "training.max_minutes=2.5", "quantization.qat.steps=0")
    assert "weights, at most 2.5 minutes, taught by" in by_time["student"]
    assert by_time["quantize/onnxruntime"] == "INT8 for onnxruntime"


@pytest.mark.parametrize("command", ["distill", "train"])
def test_a_dry_run_of_training_ends_at_the_student_and_names_the_teacher_only_where_one_teaches(call, tiny, command):
    steps = {s["name"]: s["what"] for s in answer(call(command, tiny, "--dry-run", "--json").out)["items"]}
    assert list(steps) == ["pictures", "student"]
    assert ("taught by" in steps["student"]) == (command == "distill")


def test_a_plan_says_which_target_is_blocked_by_a_missing_engine_and_what_installs_it(call, tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "tvm", None)
    text = (Path(__file__).parent.parent / "targets/android-arm64.yaml").read_text(encoding="utf-8")
    Path("mine.yaml").write_text(text.replace("name: android-arm64", "name: mine"), encoding="utf-8")
    steps = answer(call("plan", tiny, "-t", "android-arm64", "-t", "mine.yaml", "-t", "onnx", "--json").out)["items"]
    states = {s["name"]: s["state"] for s in steps if s["name"].startswith("bundles/")}
    assert states == {"bundles/android-arm64": "blocked", "bundles/mine": "blocked", "bundles/onnx": "to do"}
    Path("mine.yaml").write_text(
        Path("mine.yaml").read_text(encoding="utf-8").replace("width: 352", "width: 350"), encoding="utf-8"
    )
    call("plan", tiny, "-t", "mine.yaml").refused(4, "input 350x352 is not a tile that 'nano' can be compiled for")
    told = [s["name"] for s in steps if s["what"].endswith("; first: pip install 'edgekit[tvm]'")]
    assert told == ["quantize/arm", "bundles/android-arm64", "bundles/mine"]


def test_a_plan_refuses_a_teacher_that_does_not_exist(call, tiny):
    told = "no weights are shipped for 'tacher'; did you mean 'teacher'?"
    call("plan", tiny, "--set", "teacher.model=tacher").refused(2, told)
    assert call("train", tiny, "--set", "teacher.model=tacher", "--dry-run").code == 0


@pytest.mark.parametrize("name", recipe.names())
def test_a_plan_counts_the_student_of_the_recipe_and_names_a_teacher_only_where_there_is_one(call, name):
    steps = {s["name"]: s["what"] for s in answer(call("plan", name, "--json").out)["items"]}
    loaded = recipe.load(name)
    options = dict(loaded.student.options) | {"channels": loaded.data.channels}
    if "channels" not in models.options(loaded.student.model):
        options.pop("channels")
    count = models.parameter_count(models.create(loaded.student.model, options))
    assert f"({count:,} parameters)" in steps["student"]
    assert ("teacher" in steps, "taught by" in steps["student"]) == ((loaded.teacher is not None,) * 2)


def test_a_plan_takes_a_student_that_ships_as_a_variant_and_a_teacher_without_weights_for_none(call, tiny):
    told = ("--set", "student.model=base-v3", "--set", "teacher.weights=random")
    steps = {s["name"]: s["what"] for s in answer(call("plan", tiny, *told, "--json").out)["items"]}
    assert f"train 'base-v3' ({zoo.card('base-v3').parameters:,} parameters)" in steps["student"]
    assert ("teacher" in steps, "taught by" in steps["student"]) == (False, False)


def test_a_plan_lists_the_int8_graph_of_each_engine_once_before_its_first_target(call, tiny):
    targets = [x for name in ("android-arm64", "onnx", "linux-arm64", "ios-arm64") for x in ("-t", name)]
    steps = [s["name"] for s in answer(call("plan", tiny, *targets, "--json").out)["items"]]
    assert steps[steps.index("teacher") + 1 :] == [
        *("quantize/arm", "bundles/android-arm64", "quantize/onnxruntime", "bundles/onnx"),
        *("bundles/linux-arm64", "bundles/ios-arm64"),
    ]


def test_a_plan_refuses_a_tile_that_the_student_does_not_take(call, cwd, tiny):
    path = write_target(cwd / "odd.yaml", "odd", LIMITS["kept"])
    path.write_text(path.read_text().replace("runner:", "input: {height: 20, width: 20}\nrunner:"), encoding="utf-8")
    for arguments in (["plan", tiny], ["run", tiny, "--dry-run"]):
        call(*arguments, "-t", "odd.yaml").refused(4, "input 20x20 is not a tile that 'nano' can be compiled for")


_ARM = "isa: {{triple: aarch64-linux-gnu, cpu: {cpu}, features: [{features}]}}"


@pytest.mark.parametrize(
    ("engine", "precision", "more", "code", "told"),
    [
        ("onnxruntime", "float16", "", 4, "ONNX Runtime's CPU provider has no float16 convolutions"),
        ("onnxruntime", "int8", "runner: {kind: qemu, cpus: [cortex-a76]}", 4, "and the runner is 'qemu'; set 'runner"),
        ("openvino", "float32", "runner: {kind: reference}", 4, "'openvino' runs on this machine alone"),
        ("tvm", "float16", _ARM.format(cpu="generic", features=""), 4, "the engine 'tvm' has no float16 kernels"),
        ("tvm", "int8", "", 4, "has no 'isa'"),
        ("tvm", "int8", "isa: {triple: riscv64-linux-gnu, cpu: generic}", 4, "isa.triple 'riscv64-linux-gnu' is not"),
        ("tvm", "int8", _ARM.format(cpu="cortexa76", features=""), 4, "did you mean 'cortex-a76'?"),
        ("tvm", "int8", _ARM.format(cpu="generic", features="-dotprd"), 4, "did you mean 'dotprod'?"),
        (
            "tvm",
            "int8",
            _ARM.format(cpu="generic", features="dotprod"),
            2,
            "write +NAME to use it, -NAME to do without",
        ),
        ("tvm", "int8", _ARM.format(cpu="generic", features="+sme"), 4, "cannot ask a processor for sme"),
        ("tvm", "int8", "runner: {kind: qemu, cpus: [cortex-a7600]}", 2, "does not know the core 'cortex-a7600'"),
        ("coreml", "int8", "", 4, "the Core ML backend does not do int8"),
        ("coreml", "float16", "runner: {kind: qemu, cpus: [cortex-a76]}", 4, "no emulator runs a Core ML package"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_an_engine_cannot_do_is_refused_before_anything_is_made(
    call, cwd, tiny, engine, precision, more, code, told
):
    lines = ["schema_version: 1", "name: own", "description: x", f"engine: {engine}", f"precision: {precision}", more]
    lines.append("input: {height: 64, width: 64}")
    if "runner" not in more:
        lines.append("runner: {kind: local}")
    elif engine == "tvm":
        lines.append(_ARM.format(cpu="generic", features=""))
    Path("own.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    before = tree(cwd)
    for arguments in (["plan", tiny], ["run", tiny], ["compile", "nano"]):
        call(*arguments, "-t", "own.yaml").refused(code, told)
    assert tree(cwd) == before


@pytest.mark.parametrize("kind", ["recipe", "target"])
def test_the_schema_is_json(kind, call):
    schema = json.loads(call("schema", kind).out)
    assert schema["type"] == "object"
    assert "schema_version" in schema["required"]


@pytest.mark.parametrize(
    ("shell", "line"),
    [("bash", "complete -o nosort -F"), ("zsh", "#compdef edgekit"), ("fish", "complete --no-files --command edgekit")],
)
def test_completion_is_printed_for_a_shell(shell, line, call):
    shown = call("completion", shell)
    assert shown.code == 0
    assert line in shown.out
    assert f"_EDGEKIT_COMPLETE={shell}_complete" in shown.out


def test_completion_completes():
    asked = os.environ | {"_EDGEKIT_COMPLETE": "bash_complete", "COMP_WORDS": "edgekit di", "COMP_CWORD": "1"}
    code = "import sys; sys.argv = ['edgekit']; from edgekit.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], env=asked, capture_output=True, text=True, check=False)
    assert done.stdout == "plain,distill\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["distill", "tiny.yaml"],
        ["train", "tiny.yaml", "-o", "there"],
        ["run", "tiny.yaml", "-t", "onnx"],
        ["compile", "nano", "-t", "onnx"],
    ],
    ids=lambda value: value[0],
)
def test_a_dry_run_writes_nothing(call, cwd, tiny, arguments):
    before = tree(cwd)
    shown = call(*arguments, "--dry-run")
    assert (shown.code, shown.err) == (0, "")
    assert shown.out
    assert answer(call(*arguments, "--dry-run", "--json").out)["items"]
    assert tree(cwd) == before
    assert sorted(p.name for p in cwd.iterdir()) == ["tiny.yaml"]


def test_a_dry_run_refuses_what_the_run_would_refuse(call, tiny):
    call("distill", tiny, "--dry-run", "--set", "student.model=nanoo").refused(
        2, "no weights are shipped for 'nanoo'; did you mean 'nano'?"
    )
    call("compile", "nano", "-t", "onxx", "--dry-run").refused(2, "unknown target 'onxx'; did you mean 'onnx'?")


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("training.steps=0", "training.steps and training.max_minutes are both 0; set one of them"),
        ("training.patch=50", "training.patch is 50, no multiple of the networks' stride 8"),
        ("training.late_patch=50", "training.late_patch is 50, no multiple of the networks' stride 8"),
        ("student.model=dncnn", "training.rounding_from: DnCnn has no INT8 form to be trained for"),
    ],
)
def test_settings_that_no_pictures_make_right_are_refused_before_any_is_read(call, cwd, tiny, setting, told):
    more = ["--set", "student.weights=random", "--set", "training.rounding_from=0.5", "--set", setting]
    call("-q", "distill", tiny, *more, "--set", "data.calibration=none").refused(2, told)
    for arguments in (["distill", tiny, "--dry-run"], ["run", tiny, "--dry-run"], ["plan", tiny]):
        call(*arguments, *more).refused(2, told)


def test_a_dry_run_of_an_onnx_file_asks_for_the_run_that_compiling_would_make(call, cwd, finished):
    shutil.copyfile(finished / "05-simplify/student.fp32.onnx", "my-net.onnx")
    shutil.copytree(finished, "runs/my_net")
    for more in ([], ["--dry-run"]):
        call("compile", "my-net.onnx", "-t", "onnx", *more).refused(2, "runs/my_net: holds another run (")


@pytest.mark.parametrize("command", ["distill", "train"])
def test_an_example_of_a_longer_training_is_not_cut_off(call, command):
    lines = [line.split() for line in call(command, "--help").out.splitlines() if "--set training." in line]
    assert lines
    for _, _, name, *arguments in lines:
        settings = recipe.load(name, tuple(a for a in arguments if a.startswith("training."))).training
        assert (settings.steps > 0) != (settings.max_minutes > 0)


def test_a_dry_run_knows_a_run_from_another_one(call, tiny, finished):
    for way in (["distill", tiny], ["run", tiny, "-t", "onnx"]):
        changed = [*way, "--set", "data.evaluation_pictures=1", "-o", finished, "--dry-run"]
        call(*changed).refused(2, f"{finished}: holds another run (recipe.data.evaluation_pictures is 2")
        anew = answer(call(*changed, "--overwrite", "--json").out)["items"]
        assert {step["state"] for step in anew} == {"to do"}
        assert answer(call(*way, "-o", finished, "--dry-run", "--json").out)["items"][1]["state"] == "made"
    call("train", tiny, "-o", finished, "--dry-run").refused(2, f"{finished}: holds another run (")
    Path("strange").mkdir()
    Path("strange/letter.txt").write_text("dear", encoding="utf-8")
    for way in (["distill", tiny], ["plan", tiny], ["compile", "nano", "-t", "onnx"]):
        more = ["--dry-run"] if way[0] != "plan" else []
        call(*way, "-o", "strange", *more).refused(2, "strange: is not a run folder, and not empty")
    call("compile", "nano", "-t", "onnx", "-o", finished, "--dry-run").refused(2, f"{finished}: holds another run (")
    assert call("compile", "nano", "-t", "onnx", "-o", finished, "--dry-run", "--overwrite").code == 0


def test_a_shipped_name_is_the_shipped_model_where_a_folder_is_called_so_too(call, cwd, leaves):
    Path("nano").mkdir()
    picture = next(leaves.iterdir())
    assert call("denoise", picture, "-m", "nano", "-o", "out.png").code == 0
    call("denoise", picture, "-m", "./nano", "-o", "out.png").refused(2, "nano: is not a run folder")
    manifest = Path("nano/manifest.json")
    manifest.write_text("{}", encoding="utf-8")
    assert call("denoise", picture, "-m", "nano", "-o", "out.png").code == 0
    call("denoise", picture, "-m", "./nano", "-o", "out.png").refused(6, "nano/manifest.json: damaged")
    manifest.unlink()
    settings = ("--set", "quantization.qat.steps=0", "--set", "quantization.change_basis=false")
    for _ in range(2):
        assert call("compile", "nano", "-t", "onnx", "-o", "nano", *settings).code == 0
    call("compile", "./nano", "-t", "onnx", "-o", "nano").refused(2, "-o nano: './nano' keeps its bundles in itself")


def test_distilling_twice_gives_the_same_record_and_reuses_the_second_time(call, tiny):
    first = answer(call("distill", tiny, "-o", "a", "--json").out)
    again = call("distill", tiny, "-o", "b", "--json")
    assert answer(again.out) == first | {"folder": "b"}
    assert "student: re-used" not in again.err
    record = Path("a/run.json").read_bytes()
    assert Path("b/run.json").read_bytes() == record
    reused = call("distill", tiny, "-o", "a", "--json")
    assert "student: re-used" in reused.err
    assert answer(reused.out) == first
    assert Path("a/run.json").read_bytes() == record


def test_quiet_says_nothing_but_the_result(call, tiny):
    shown = call("-q", "distill", tiny)
    assert (shown.code, shown.err) == (0, "")
    assert "runs/tiny: evaluation pictures" in shown.out


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [(["-v"], True), (["--verbose"], True), (["-qv"], True), (["-q"], False), ([], False)],
    ids=lambda value: "".join(value) if isinstance(value, list) else None,
)
def test_an_error_shows_its_traceback_to_whoever_asks_for_more(call, arguments, shown):
    called = call(*arguments, "targets", "abacus")
    assert called.code == 2
    assert ("Traceback" in called.err) == shown


def test_what_is_named_like_an_option_asks_for_nothing(call):
    call("targets", "--", "-v").refused(2, "unknown target '-v'")


@pytest.mark.parametrize(("flags", "code"), [([], 7), (["--allow-unverified"], 0)], ids=["undecided", "allowed"])
def test_a_run_prints_json_and_nothing_else_on_stdout(call, cwd, tiny, flags, code):
    write_target(cwd / "kept.yaml", "kept", LIMITS["kept"])
    ended = call("run", tiny, "--set", "teacher=null", "-t", "kept.yaml", "--json", *flags)
    assert ended.code == code
    result = answer(ended.out)
    assert result["distilled"]["folder"] == "runs/tiny"
    assert [report["verdict"] for report in result["reports"]] == ["incomplete"]
    assert "training: step 3/3" in ended.err
    assert Path("runs/tiny/bundles/kept.report.json").is_file()


def test_compiling_prints_where_the_bundles_are(call, cwd, finished):
    shutil.copytree(finished, "runs/copy")
    write_target(cwd / "kept.yaml", "kept", LIMITS["kept"])
    shown = call("-q", "compile", "-t", "kept.yaml")
    assert (shown.code, shown.err) == (0, "")
    assert shown.out.splitlines()[0] == "kept: runs/copy/bundles/kept"
    result = answer(call("compile", "runs/copy", "-t", "kept.yaml", "--json").out)
    assert result["bundles"] == {"kept": "runs/copy/bundles/kept"}
    assert "bundles/kept" in result["reused"]


def test_a_model_is_compiled_with_the_settings_that_it_is_told(call, cwd, leaves):
    """Its own pictures and budget: what the bundle records is what was told, and a looser budget trains nothing."""
    told = ["data.calibration=" + str(leaves), "budgets.int8_drop_db=9.5", "quantization.keep_float=[head]"]
    told += ["quantization.calibration_pictures=8", "quantization.change_basis=false"]
    settings = [part for setting in told for part in ("--set", setting)]
    done = call("compile", "nano", "-t", "onnx", "-o", "mine", *settings)
    assert done.code == 0, done.err
    assert "training it with its rounding" not in done.err
    kept = json.loads(Path("mine/run.json").read_text(encoding="utf-8"))["identity"]["recipe"]
    assert (kept["data"]["calibration"], kept["budgets"]["int8_drop_db"]) == (str(leaves), 9.5)
    audit = answer(call("compile", "mine", "-t", "onnx", "--json").out)["audits"]["onnx"]
    assert 900 < audit["integer_macs_permille"] < 1000


@pytest.mark.parametrize("name", ["nano", "base"])
def test_a_file_that_is_called_like_a_shipped_model_does_not_get_its_int8_budget(call, cwd, finished, name):
    shutil.copyfile(finished / "05-simplify/student.fp32.onnx", f"{name}.onnx")
    kept = write_target(cwd / "kept.yaml", "kept", LIMITS["kept"])
    kept.write_text(kept.read_text(encoding="utf-8").replace("int8", "float32"), encoding="utf-8")
    assert call("-q", "compile", f"{name}.onnx", "-t", "kept.yaml", "--set", "teacher=null").code == 0
    limits = answer(call("-q", "verify", "--seconds", "1", "--json").out)["items"][0]["limits"]
    assert [x["limit"] for x in limits if x["name"].startswith("int8_")] == ["at most 0.050 dB"]


def quantization(folder: Path) -> dict[str, object]:
    """Return what a run says about its INT8 graph for ONNX Runtime."""
    stages = json.loads((folder / "run.json").read_text(encoding="utf-8"))["stages"]
    return next(stage["facts"] for stage in stages if stage["name"] == "quantize/onnxruntime")


def test_int8_is_trained_from_half_of_its_budget_on(call, cwd):
    """What just holds on the held-out pictures is missed on others."""
    photos = write_pictures(cwd / "photos")
    told = [f"data.train=[{photos / 'train'}]", f"data.calibration={photos / 'held_out'}"]
    told += ["quantization.calibration_pictures=8", "quantization.change_basis=false", "quantization.qat.steps=2"]
    settings = [part for setting in told for part in ("--set", setting)]
    assert call("compile", "nano", "-t", "onnx", "-o", "loose", *settings, "--set", "budgets.int8_drop_db=9").code == 0
    loss_mdb = quantization(Path("loose"))["loss_before_mdb"]
    assert loss_mdb > 10
    assert quantization(Path("loose"))["trained"] is False
    budget = f"budgets.int8_drop_db={1.5 * loss_mdb / 1000}"
    done = call("compile", "nano", "-t", "onnx", "-o", "tight", *settings, "--set", budget)
    assert done.code == 0, done.err
    told = f"int8_drop_db: INT8 loses {loss_mdb / 1000:.3f} dB on the held-out pictures, "
    assert told in done.err
    assert "may be lost before any training: training it with its rounding" in done.err
    assert "once more" not in done.err
    assert "it learns from patches of 64 pixels, not 96: a training picture has a side of 64" in done.err
    assert quantization(Path("tight"))["trained"] is True
    assert not list(Path("tight").glob("qat-*")), "checkpoints of a training that is done"
    Path("tight/qat-onnxruntime/left").mkdir(parents=True)
    Path("tight/qat-arm").mkdir()
    assert call("compile", "nano", "-t", "onnx", "-o", "tight", *settings, "--set", budget).code == 0
    assert [p.name for p in Path("tight").glob("qat-*")] == ["qat-arm"], "checkpoints of a training that is to go on"


def test_a_graph_that_is_trained_for_its_worst_picture_is_said_to_be(call, cwd):
    photos = write_pictures(cwd / "photos")
    told = [f"data.train=[{photos / 'train'}]", f"data.calibration={photos / 'held_out'}"]
    told += ["quantization.calibration_pictures=8", "quantization.change_basis=false", "quantization.qat.steps=2"]
    told += ["budgets.int8_drop_db=9", "budgets.int8_worst_db=0.2"]
    done = call("compile", "nano", "-t", "onnx", *[part for setting in told for part in ("--set", setting)])
    assert done.code == 0, done.err
    assert "int8_worst_db: INT8 loses " in done.err
    assert "on the worst held-out picture, 0.05 may be lost before any training: training it with its" in done.err
    assert quantization(Path("runs/nano"))["worst_loss_mdb"] <= 200


@pytest.mark.parametrize(
    ("name", "flags", "code", "verdict"),
    [
        ("kept", [], 0, "pass"),
        ("broken", [], 3, "fail"),
        ("undecided", [], 7, "incomplete"),
        ("undecided", ["--allow-unverified"], 0, "incomplete"),
        ("broken", ["--allow-unverified"], 3, "fail"),
    ],
    ids=["pass", "fail", "incomplete", "incomplete but allowed", "a failure is never allowed"],
)
def test_the_exit_code_is_the_verdict(call, cwd, finished, name, flags, code, verdict):
    shutil.copytree(finished / "bundles" / name, name)
    ended = call("-q", "verify", name, "--seconds", "1", "-o", "report.json", "--json", *flags)
    assert (ended.code, ended.err) == (code, "")
    [report] = answer(ended.out)["items"]
    assert report["verdict"] == verdict
    assert json.loads((cwd / "report.json").read_text(encoding="utf-8")) == report


def test_verifying_a_run_verifies_all_its_bundles_and_the_worst_counts(call, cwd, finished):
    shutil.copytree(finished, "run")
    ended = call("-q", "verify", "run", "--seconds", "1")
    assert ended.code == 3
    for name, verdict in (("kept", "pass"), ("broken", "fail"), ("undecided", "incomplete")):
        assert f"\n{name}: {verdict}\n" in ended.out
        assert (cwd / f"run/bundles/{name}.report.json").is_file()
    call("verify", "run", "-o", "report.json").refused(2, "-o report.json: there are 3 bundles", "name one bundle")


@pytest.mark.parametrize("model", ["bundle", "run", "onnx", "shipped"])
def test_a_picture_is_denoised_by_whatever_model_is_named(call, cwd, finished, leaves, model):
    what = {
        "bundle": finished / "bundles/kept",
        "run": finished,
        "onnx": finished / "05-simplify/student.fp32.onnx",
        "shipped": "nano",
    }[model]
    picture = leaves / "leaves-1.png"
    pixels = np.asarray(Image.open(picture))[None]
    net = (networks.shipped("nano") if model == "shipped" else networks.from_run(finished)).net
    for flags, sigma in ((["--sigma", "15", "--add-noise"], 15.0), ([], 25.0)):
        shown = call("-q", "denoise", picture, "-m", what, *flags, "-o", cwd / "out.png")
        assert (shown.code, shown.out, shown.err) == (0, f"{cwd}/out.png\n", "")
        noisy = add_gaussian(pixels, sigma, index=0) if flags else pixels / np.float32(255)
        padded = quality.pad_to_multiple(noisy[None], net.stride)
        wanted = clipped_uint8(quality.crop(networks.as_function(net)(padded, sigma / 255), *pixels.shape[1:])[0])
        written = np.asarray(Image.open(cwd / "out.png")).astype(int)
        # Of the bundle it is INT8.
        assert np.abs(written - wanted[0]).mean() < (2.0 if model == "bundle" else 0.01)
        assert np.abs(wanted[0].astype(int) - noisy[0] * 255).mean() > 2.5
    told = answer(call("denoise", picture, "-m", what, "-o", cwd / "out.png", "--json").out)
    how = {"bundle": "onnxruntime (native)", "run": "torch", "onnx": "onnxruntime", "shipped": "torch"}[model]
    assert told == {"schema_version": 1, "output": f"{cwd}/out.png", "how": how}


def test_a_picture_in_colour_that_becomes_gray_is_said_to_and_a_gray_one_is_not(call, cwd):
    gray = np.full((16, 16, 3), 90, np.uint8)
    Image.fromarray(gray).save(cwd / "gray.png")
    Image.fromarray(gray + np.array([0, 0, 1], np.uint8)).save(cwd / "colour.png")
    note = "note: 'nano' is for gray, so the result is gray; for colour: -m base-color\n"
    done = call("denoise", "colour.png")
    assert (done.code, done.out, done.err) == (0, "colour.denoised.png\n", note)
    assert Image.open("colour.denoised.png").mode == "L"
    assert call("denoise", "gray.png").err == ""
    assert call("denoise", "colour.png", "-m", "base-color").err == ""
    assert call("-q", "denoise", "colour.png").err == ""
    assert "-m base-color" in call("denoise", "--help").out


def test_a_picture_in_colour_keeps_its_planes_in_their_order(call, cwd):
    pixels = np.stack([np.full((40, 48), value, np.uint8) for value in (200, 120, 40)], axis=-1)
    pixels[::2, ::3] += 9
    Image.fromarray(pixels).save(cwd / "colour.png")
    assert call("-q", "denoise", "colour.png", "-m", "base-color", "-o", "out.png").code == 0
    written = np.asarray(Image.open(cwd / "out.png")).astype(int)
    assert np.abs(written - pixels).mean(axis=(0, 1)).max() < 5


def test_train_learns_from_the_clean_pictures_alone(call, cwd, tiny):
    taught = {}
    for command_name in ("distill", "train"):
        done = call("-q", command_name, tiny, "--set", "teacher.model=nano", "-o", command_name)
        assert done.code == 0, done.err
        stages = json.loads(Path(command_name, "run.json").read_text(encoding="utf-8"))["stages"]
        taught[command_name] = next("teacher" in stage["inputs"] for stage in stages if stage["name"] == "student")
    assert taught == {"distill": True, "train": False}


def test_a_baseline_is_recorded_on_the_pictures_that_verdicts_are_on(call, cwd):
    done = call("-q", "baseline", "nano", "--seconds", "0.1", "--json")
    assert done.code == 0, done.err
    [path] = (cwd / "results/baselines").glob("nano-*.json")
    record = baseline.read(path)
    card = next(m for m in zoo.card("nano").measured if (m.pictures, m.sigma) == ("embedded-evaluation", 25))
    evaluation = sets.embedded("evaluation", channels=1)
    assert record.psnr_mdb(evaluation, 25.0) == pytest.approx(card.psnr_mdb, abs=30)
    for name in target.names():
        assert record.psnr_mdb(golden_pictures(evaluation, target.load(name)), 25.0) is not None
    assert {(x.height, x.width) for x in record.latencies} >= {(256, 256), (512, 512)}


def test_what_nobody_reads_ends_the_command_quietly_and_not_with_0():
    reading, writing = os.pipe()
    os.close(reading)
    with subprocess.Popen(command("schema", "recipe"), stdout=writing, stderr=subprocess.PIPE, text=True) as process:
        os.close(writing)
        _, err = process.communicate()
    assert (process.returncode, err) == (141, "")


def test_a_table_that_nobody_reads_ends_the_command_quietly_and_not_with_0():
    reading, writing = os.pipe()
    os.close(reading)
    with subprocess.Popen(command("targets"), stdout=writing, stderr=subprocess.PIPE, text=True) as process:
        os.close(writing)
        _, err = process.communicate()
    assert (process.returncode, err) == (141, "")


def test_a_terminal_that_knows_no_unicode_gets_ascii():
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command("targets"), env=environment, capture_output=True, text=True, check=True)
    assert "android-arm64" in done.stdout
    assert done.stdout.isascii()


def test_a_pictures_name_is_shown_with_its_brackets(capsys):
    from edgekit import display
    from edgekit.pipeline.distill import Distilled

    harmed = "scan[bold].png lost 3 dB, so the starting weights were kept"
    psnr = {"noisy_mdb": 20_000, "nlm_mdb": 27_000, "start_mdb": 30_000, "student_mdb": 30_000, "teacher_mdb": None}
    ended = {"steps": 400, "steps_asked": 400, "ended_by": "steps"}
    result = Distilled(folder=Path("runs/mine"), teacher_refused="", kept="start", harmed=harmed, **psnr, **ended)
    display.print_distilled(result)
    assert f"note: {harmed}" in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("steps_asked", "ended_by", "noted"), [(2000, "time", True), (0, "time", False), (120, "steps", False)]
)
def test_a_training_that_the_clock_cut_off_is_shown_so(capsys, steps_asked, ended_by, noted):
    from edgekit import display
    from edgekit.pipeline.distill import Distilled

    psnr = {"noisy_mdb": 20_000, "nlm_mdb": 27_000, "start_mdb": None, "student_mdb": 30_000, "teacher_mdb": None}
    ended = {"steps": 120, "steps_asked": steps_asked, "ended_by": ended_by}
    result = Distilled(folder=Path("r"), teacher_refused="", kept="trained", harmed="", **psnr, **ended)
    display.print_distilled(result)
    told = "note: the time limit ended training after 120 of 2000 steps, at a rate that had not fallen to its end; "
    assert (told in capsys.readouterr().out) is noted
