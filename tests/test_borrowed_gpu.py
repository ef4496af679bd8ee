"""scripts/borrowed_gpu.py, as a person runs it, on a CPU and with settings that end in seconds."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from click.testing import CliRunner, Result
from PIL import Image

from edgekit import recipe, zoo
from edgekit.data import sets
from edgekit.data.synthetic import dead_leaves
from edgekit.errors import InputError
from edgekit.files import sha256
from edgekit.models import weights
from edgekit.pipeline import baseline
from edgekit.recipe import Model
from edgekit.run import lock
from edgekit.training import checkpoint, job_file

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts/borrowed_gpu.py"
MISSING_THERE = ("pydantic", "ruamel", "rich", "skimage", "sklearn", "onnx", "onnxruntime", "jinja2", "onnxsim")


borrowed = tiny.script("scripts/borrowed_gpu.py")


@pytest.fixture
def pictures(tmp_path):
    for number in range(5):
        path = tmp_path / {3: "others", 4: "toy"}.get(number, "photos") / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(dead_leaves(number, 200 if number < 4 else 64, 208 if number < 4 else 64)[0]).save(path)
    Image.fromarray(dead_leaves(9, 12, 40)[0]).save(tmp_path / "photos" / "small.png")
    return tmp_path


def script(*arguments: str, before: Path | None = None) -> str:
    """Run the script; return what it says. Modules in the folder `before` take the place of others of that name."""
    path = os.pathsep.join(str(p) for p in (before, ROOT) if p)
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def invoke(*arguments: str) -> Result:
    """Run the script in this process, where its parts can be replaced."""
    return CliRunner().invoke(borrowed.main, arguments)


def prepare(pictures: Path, *more: str) -> str:
    ran = invoke(
        *("prepare", "--pictures", str(pictures / "photos"), "--held-out", str(pictures / "others")),
        *("-e", f"toy={pictures / 'toy'}", "-o", str(pictures / "plan")),
        *("--set", "training.batch=1", "--set", "training.patch=16", "--set", "training.late_patch=16", *more),
    )
    if ran.exception:
        raise ran.exception
    return ran.output


@pytest.fixture
def piece(tmp_path, monkeypatch) -> Callable[..., str]:
    """Train for some seconds, in which no time is kept for the end of the piece; return what is said."""
    monkeypatch.setattr(borrowed, "PACKING_S", 0)

    def train(seconds: float, *more: str, ending_s: float = 240) -> str:
        monkeypatch.setattr(borrowed, "ENDING_S", ending_s)
        folders = ("train", str(tmp_path / "plan"), "--state", str(tmp_path / "state"), "--out", str(tmp_path / "out"))
        ran = invoke(*folders, "--minutes", str((seconds + ending_s) / 60), *("--least-seconds", "0", *more))
        if ran.exception:
            raise ran.exception
        return ran.output

    return train


def test_each_training_can_be_told_its_minutes(pictures):
    prepare(pictures, "--scale", "0.5", "--max-minutes", "nano=3", "--max-minutes", "teacher=2.5")
    plan = {e["name"]: e["minutes"] for e in json.loads((pictures / "plan/plan.json").read_text())["plan"]}
    assert (plan["nano"], plan["teacher"], plan["small"]) == (3, 2.5, 4)


@pytest.mark.parametrize("given", ["nano", "nano=", "nano=0", "nano=inf", "abacus=3", "small-taught=3"])
def test_minutes_are_given_to_a_training_that_is_limited_by_them(pictures, given):
    with pytest.raises(SystemExit):
        prepare(pictures, "--max-minutes", given)
    assert not (pictures / "plan").exists()


@pytest.mark.slow
def test_a_plan_trains_in_pieces_and_its_weights_come_home_as_they_were_measured(pictures, piece, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    # Long enough that a busy machine does not end it in the first piece.
    minutes = ("--max-minutes", "nano=0.1")
    said = prepare(pictures, "--only", "nano", "--only", "small-untaught", "--scale", "0.005", *minutes)
    assert "3 pictures to learn from (1 under 16 pixels left out), 1 held out" in said
    assert "UNTAUGHT, since the teacher is left out: nano\n" in said
    state, out = pictures / "state", pictures / "out"
    ended = json.loads(piece(0.5))
    assert set(ended.values()) == {"not done"}
    assert (state / "nano/checkpoint.safetensors").is_file()
    ended = json.loads(piece(200))
    assert set(ended.values()) == {"done"}
    trained = json.loads((out / "results.json").read_text())["trained"]

    said = script("collect", str(out), "-o", str(pictures / "home"))
    assert "small-untaught: steps, 30 steps" in said
    for name in ("nano", "small-untaught"):
        assert trained[name]["sha256"] == sha256(pictures / "home" / f"{name}.safetensors")
        assert trained[name]["taught"] is False  # the plan's teacher was left out
        assert [m["sigma"] for m in trained[name]["measured"]] == [15, 25, 50]
        assert all(5000 < m["psnr_mdb"] < 50000 for m in trained[name]["measured"])


def test_a_plan_can_begin_as_the_shipped_weights_but_where_trainings_are_compared(pictures, piece, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    prepare(pictures, "--only", "nano", "--only", "small-untaught", "--scale", "0.005", "--from-shipped")
    assert set(json.loads(piece(200)).values()) == {"done"}
    script("collect", str(pictures / "out"), "-o", str(pictures / "home"))
    stages = [
        json.loads((pictures / "home" / f"{n}.trained.json").read_text())["stages"] for n in ("nano", "small-untaught")
    ]
    assert [stage.startswith("began as the weights that were shipped then; ") for stage in stages] == [True, False]
    # A few steps lead nowhere near as far as from one network to another.
    shipped, brought = (weights.read(p) for p in (zoo.weights("nano"), pictures / "home/nano.safetensors"))
    assert all((brought[n] - values).norm() <= 0.1 * values.norm() for n, values in shipped.items() if values.ndim == 4)


def test_the_weights_come_home_from_a_machine_that_cannot_record_a_baseline(pictures):
    prepare(pictures, "--only", "teacher")
    # What a teacher that is done leaves, without the minutes that its training takes.
    teacher, out, home = pictures / "state/teacher", pictures / "out", pictures / "home"
    shipped = tiny.write_weights("teacher", teacher / "teacher.shipped.safetensors")
    outcome = {"sha256": sha256(shipped), "ended_by": "time", "steps": 1, "seconds": 60.0, "taught": False}
    (teacher / "outcome.json").write_text(json.dumps(outcome))
    (teacher / "done").touch()
    bare = pictures / "bare"
    bare.mkdir()
    (bare / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({MISSING_THERE}))\n")
    said = script(
        *("train", str(pictures / "plan"), "--state", str(pictures / "state"), "--out", str(out)), before=bare
    )
    assert "baseline: SKIPPED, the teacher was not timed: " in said
    assert "skimage" in said
    assert json.loads(said.splitlines()[-1]) == {"teacher": "done"}
    assert "teacher: time, 1 steps, {'toy 15': " in script("collect", str(out), "-o", str(home))
    assert sha256(home / "teacher.safetensors") == outcome["sha256"]
    assert not (home / "baseline.json").exists()


def test_a_machine_with_scikit_image_beside_the_least_records_a_baseline(tmp_path):
    missing = [name for name in MISSING_THERE if name != "skimage"]
    code = f"""
import sys
sys.modules.update(dict.fromkeys({missing}))
from pathlib import Path
from edgekit.data import sets
from edgekit.pipeline import baseline, networks
record = baseline.measure(networks.shipped("nano"), [sets.embedded("evaluation")], shapes=((64, 64),), seconds=0.01)
baseline.write(record, Path(sys.argv[1]))
"""
    ran = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "baseline.json")],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert ran.returncode == 0, ran.stderr
    assert baseline.read(tmp_path / "baseline.json").teacher == "nano"


def test_a_training_that_fails_is_told_of_and_the_others_go_on(pictures, piece, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    prepare(pictures, "--only", "nano", "--only", "base-color", "--scale", "0.005")
    (pictures / "plan/jobs/nano/job.json").write_text("{}")
    said = piece(200)
    assert "nano: FAILED" in said
    results = json.loads((pictures / "out" / "results.json").read_text())
    assert "is not a training job" in results["logs"]["nano"]["said"][-1]
    assert results["trained"]["base-color"]["ended_by"] == "time"


@pytest.mark.parametrize(
    "error", ["torch.OutOfMemoryError('CUDA out of memory')", "RuntimeError('CUDA error: out of memory')"]
)
def test_a_training_that_runs_out_of_memory_asks_for_another_try(pictures, error):
    prepare(pictures, "--only", "nano")
    bare = pictures / "bare"
    bare.mkdir()
    (bare / "sitecustomize.py").write_text(
        "import torch\nfrom edgekit.training import loop\n"
        f"def step(self, step, seconds):\n    raise {error}\n"
        "loop._Run.step = step\n"
    )
    command = [sys.executable, str(SCRIPT), "one", str(pictures / "plan"), "nano", "--state", str(pictures / "state")]
    environment = os.environ | {"PYTHONPATH": f"{bare}:{ROOT}"}
    ran = subprocess.run([*command, "--until", "1e9"], capture_output=True, text=True, env=environment, check=False)
    assert "out of memory" in ran.stderr
    assert ran.returncode == borrowed.TRY_AGAIN


def test_settings_that_a_training_would_be_refused_for_there_are_refused_here(pictures):
    with pytest.raises(InputError, match=r"nano: training\.patch is 20, no multiple of the networks' stride 8"):
        prepare(pictures, "--only", "nano", "--set", "training.patch=20")


def test_a_network_without_an_int8_form_is_trained_in_float_where_the_others_are_rounded(pictures):
    said = prepare(pictures, "--only", "teacher", "--only", "nano", "--set", "training.rounding_from=0.5")
    assert "teacher-unet: trained without training.rounding_from, as its network has no INT8 form\n" in said
    jobs = {name: job_file.read(pictures / "plan" / "jobs" / name / "job.json") for name in ("teacher", "nano")}
    assert {name: job.training.rounding_from for name, job in jobs.items()} == {"teacher": 1.0, "nano": 0.5}


def test_a_picture_that_cannot_be_read_is_named(pictures):
    (pictures / "photos" / "broken.jpg").write_text("no picture")
    with pytest.raises(InputError, match=r"photos/broken.jpg: not a readable picture: .*; take it out of there"):
        prepare(pictures, "--only", "nano")


def test_the_number_of_steps_is_the_plans(pictures):
    assert "UNTAUGHT" in prepare(pictures, "--only", "nano", "--set", "training.steps=0")


def test_no_picture_that_a_card_tells_of_is_learned_from_or_chosen_by(pictures):
    camera = next(p for p in sets.embedded("evaluation") if p.name == "skimage/camera").pixels[0]
    Image.fromarray(camera[:300, 100:400]).save(pictures / "photos" / "part.png")
    with pytest.raises(InputError, match=r"photos-part.png' of train .* as 'skimage/camera' of embedded-evaluation"):
        prepare(pictures, "--only", "nano")
    (pictures / "photos" / "part.png").unlink()
    Image.fromarray(camera[:300, 100:400]).save(pictures / "others" / "0.png")
    with pytest.raises(InputError, match=r"others-0.png' of held_out .* as 'skimage/camera' of embedded-evaluation"):
        prepare(pictures, "--only", "nano")


def test_a_training_that_began_without_its_teacher_ends_without_it(pictures):
    prepare(pictures, "--only", "teacher", "--only", "nano", "--max-minutes", "nano=0.05")
    state = pictures / "state"
    (state / "teacher").mkdir(parents=True)
    (state / "teacher" / "failed").touch()

    def go_on(until: float) -> bool:
        ran = invoke("one", str(pictures / "plan"), "nano", "--state", str(state), "--until", str(until))
        assert ran.exception is None, ran.exception
        return bool(json.loads((state / "nano" / "outcome.json").read_text())["taught"])

    assert not go_on(time.monotonic())
    assert not (state / "nano" / "done").exists()
    # As where its `failed` was deleted, and it was tried again.
    (state / "teacher" / "failed").unlink()
    tiny.write_weights("teacher", state / "teacher" / "teacher.shipped.safetensors")
    (state / "teacher" / "done").touch()
    assert not go_on(time.monotonic() + 60)
    assert (state / "nano" / "done").exists()
    shutil.rmtree(state / "nano")
    assert go_on(time.monotonic())


def test_only_pictures_that_every_recipe_can_cut_its_patches_from_are_taken(pictures):
    with pytest.raises(InputError, match=r"none of the 4 pictures has sides of 256 pixels, the largest patch"):
        prepare(pictures, "--only", "nano", "--set", "training.late_patch=256")
    Image.fromarray(dead_leaves(11, 256, 256)[0]).save(pictures / "photos" / "large.png")
    said = prepare(pictures, "--only", "nano", "--set", "training.late_patch=256")
    assert "1 pictures to learn from (4 under 256 pixels left out)" in said


@pytest.mark.parametrize(
    ("given", "said"),
    [("toy", "'toy' is not NAME=DIR"), ("=toy", "is not NAME=DIR"), ("train=toy", "'train' is taken")],
)
def test_a_set_to_measure_on_needs_a_name_of_its_own(pictures, given, said):
    ran = invoke(
        *("prepare", "--pictures", str(pictures / "photos"), "--held-out", str(pictures / "others")),
        *("-e", given, "-o", str(pictures / "plan")),
    )
    assert ran.exit_code == 2
    assert said in ran.output


def test_pictures_of_one_name_in_folders_of_one_name_are_all_taken(pictures):
    more = pictures / "more" / "photos"
    more.mkdir(parents=True)
    Image.fromarray(dead_leaves(12, 200, 208)[0]).save(more / "0.png")
    assert "4 pictures to learn from" in prepare(pictures, "--only", "nano", "--pictures", str(more))
    assert len(list((pictures / "plan/pictures/train").iterdir())) == 4


def test_another_plan_in_a_folder_replaces_the_one_before(pictures):
    prepare(pictures, "--only", "nano", "--only", "control")
    first, *others = sorted((pictures / "plan/pictures/train").iterdir())
    (pictures / "photos" / first.name.removeprefix("0-photos-")).unlink()
    prepare(pictures, "--only", "nano")
    assert [path.name for path in (pictures / "plan/jobs").iterdir()] == ["nano"]
    assert sorted((pictures / "plan/pictures/train").iterdir()) == others


def test_a_folder_of_something_else_is_not_made_a_plan_of(pictures):
    photos = Path(shutil.copytree(pictures / "photos", pictures / "plan/pictures/train"))
    with pytest.raises(InputError, match=r"plan: holds something else than a plan; name a folder that is not there"):
        prepare(pictures, "--only", "nano")
    assert sorted(p.name for p in photos.iterdir()) == sorted(p.name for p in (pictures / "photos").iterdir())
    shutil.rmtree(photos)
    (pictures / "plan/pictures").rmdir()
    prepare(pictures, "--only", "nano")


def test_what_travels_has_to_fit_beside_the_checkout(pictures):
    said = prepare(pictures, "--only", "nano")
    assert "MiB of the checkout, of 64 MiB that may travel" in said
    with pytest.raises(InputError, match=r"MiB of the checkout, of 1 MiB that may travel; give fewer"):
        prepare(pictures, "--only", "nano", "--limit-mib", "1")


# With other processes in place of the trainings


def write_plan(folder: Path, *names: str) -> None:
    """Write a plan without pictures, which nothing can be trained or measured with."""
    plan = [e for e in borrowed.PLAN if e.name in names]
    for entry in plan:
        teacher = Model(model="teacher", weights=job_file.RANDOM) if entry.taught else None
        made = dataclasses.replace(recipe.load(entry.recipe), teacher=teacher)
        job_file.write(made, folder / "jobs" / entry.name / "job.json")
    record = {"plan": [dataclasses.asdict(e) for e in plan], "evaluate": [], "pictures": "3 photographs (photos)"}
    (folder / "plan.json").write_text(json.dumps(record))


def write_checkpoint(state: Path, name: str, *, step: int) -> dict[str, torch.Tensor]:
    """Write what a training leaves on its way; return the averages in it."""
    net = tiny.network(name, seed=step)
    averages = {key: value + 1 for key, value in net.state_dict().items()}
    position = checkpoint.Position(job="job", step=step, seconds=90.0)
    (state / name).mkdir(parents=True, exist_ok=True)
    optimizer = torch.optim.AdamW(net.parameters())
    checkpoint.save(state / name / "checkpoint.safetensors", position, net, averages, optimizer)
    return averages


def write_done(state: Path, name: str, *, model: str | None = None, seed: int = 0) -> str:
    """Write what a training leaves that is done; return the hash of its weights."""
    shipped = tiny.write_weights(model or name, state / name / f"{name}.shipped.safetensors", seed=seed)
    outcome = {"sha256": sha256(shipped), "ended_by": "time", "steps": 1000, "seconds": 474.0, "taught": False}
    (state / name / "outcome.json").write_text(json.dumps(outcome))
    (state / name / "done").touch()
    return sha256(shipped)


def instead(monkeypatch, scripts: dict[str, list[str]], seen: Callable[[str, float], None] = lambda name, until: None):
    """Let shell scripts, one for each start, take the place of the trainings."""

    def start(folder: Path, state: Path, name: str, until: float) -> subprocess.Popen[bytes]:
        (state / name).mkdir(parents=True, exist_ok=True)
        seen(name, until)
        return subprocess.Popen(["sh", "-c", scripts[name].pop(0)])

    monkeypatch.setattr(borrowed, "_start", start)


def collected(tmp_path: Path) -> dict[str, dict[str, object]]:
    """Bring home what there is; return what a card says of each training whose weights came."""
    ran = invoke("collect", str(tmp_path / "out"), "-o", str(tmp_path / "home"))
    assert ran.exit_code == 0, ran.output
    return {p.stem: json.loads(p.with_suffix(".trained.json").read_text()) for p in (tmp_path / "home").glob("*.saf*")}


def test_a_training_that_hangs_is_stopped_and_what_it_had_comes_home(tmp_path, piece, monkeypatch):
    write_plan(tmp_path / "plan", "nano", "small")
    averages = write_checkpoint(tmp_path / "state", "nano", step=700)
    scripts = {"nano": ["exec sleep 300"], "small": ["exit 0"]}
    instead(monkeypatch, scripts)
    began = time.monotonic()
    said = piece(1, ending_s=1)
    assert time.monotonic() - began < 60
    assert "nano: HANGS, stopped" in said
    assert not (tmp_path / "state/nano/failed").exists()
    assert collected(tmp_path)["nano"]["steps"] == 700
    home = weights.read(tmp_path / "home/nano.safetensors")
    assert all(torch.equal(home[name], value) for name, value in averages.items())
    scripts["nano"] = ["exit 0"]
    instead(monkeypatch, scripts | {"small": ["exit 0"]})
    assert "HANGS" not in piece(1)


@pytest.mark.parametrize(
    ("scripts", "failed"),
    [
        (["kill -9 $$", "kill -9 $$"], True),
        (["kill -9 $$", "exit 0"], False),
        ([f"exit {borrowed.TRY_AGAIN}", "exit 1"], True),
        (["exit 2"], True),
    ],
    ids=["killed twice", "killed once", "no memory, then a defect", "explained"],
)
def test_what_a_training_had_when_it_died_comes_home(tmp_path, piece, monkeypatch, scripts, failed):
    write_plan(tmp_path / "plan", "nano", "small")
    averages = write_checkpoint(tmp_path / "state", "nano", step=700)
    left = {"nano": scripts, "small": ["exit 0"]}
    instead(monkeypatch, left)
    said = piece(30)
    assert left == {"nano": [], "small": []}
    assert (tmp_path / "state/nano/failed").exists() is failed
    assert ("nano: FAILED" in said) is failed
    card = collected(tmp_path)["nano"]
    assert (card["steps"], card["minutes"]) == (700, 1.5)
    assert "ended by: failed; patches of 184 from 80% of the run on; the averages of its last checkpoint" in str(
        card["stages"]
    )
    home = weights.read(tmp_path / "home/nano.safetensors")
    assert all(torch.equal(home[name], value) for name, value in averages.items())


def test_a_checkpoint_comes_home_only_where_it_is_the_latest_of_its_training(tmp_path, piece, monkeypatch):
    write_plan(tmp_path / "plan", "nano", "small", "large")
    state = tmp_path / "state"
    kept = {name: write_done(state, name) for name in ("nano", "small", "large")}
    for name, step in (("nano", 700), ("small", 700), ("large", 2000)):
        write_checkpoint(state, name, step=step)
        if name != "nano":
            (state / name / "done").unlink()
    instead(monkeypatch, {"small": ["exit 2"], "large": ["exit 2"]})
    piece(30)
    assert {name: card["steps"] for name, card in collected(tmp_path).items()} == {
        "nano": 1000,
        "small": 1000,
        "large": 2000,
    }
    same = {name: sha256(tmp_path / "home" / f"{name}.safetensors") == kept[name] for name in kept}
    assert same == {"nano": True, "small": True, "large": False}


def test_what_a_wave_trained_is_there_before_the_next_begins(tmp_path, piece, monkeypatch):
    write_plan(tmp_path / "plan", "nano", "control")
    there: dict[str, bool] = {}
    write_checkpoint(tmp_path / "state", "nano", step=700)
    instead(
        monkeypatch,
        {"nano": ["exit 0"], "control": ["exit 0"]},
        lambda name, until: there.update({name: (tmp_path / "out/results.json").exists()}),
    )
    piece(30)
    assert there == {"nano": False, "control": True}


def test_weights_are_packed_before_they_are_measured(tmp_path, piece, monkeypatch):
    write_plan(tmp_path / "plan", "nano")
    write_done(tmp_path / "state", "nano")

    def stop(*arguments: object) -> None:
        raise KeyError

    monkeypatch.setattr(borrowed, "_evaluate", stop)
    with pytest.raises(KeyError):
        piece(30)
    assert collected(tmp_path)["nano"]["steps"] == 1000


def half_a_line(own: Path) -> None:
    (own / "log.jsonl").write_text('{"step": 10}\n{"step": 2')


def no_outcome(own: Path) -> None:
    (own / "outcome.json").unlink()


def half_an_outcome(own: Path) -> None:
    (own / "outcome.json").write_text((own / "outcome.json").read_text()[:30])


def outcome_of_other_weights(own: Path) -> None:
    tiny.write_weights("nano", own / "nano.shipped.safetensors", seed=5)


def half_a_measurement(own: Path) -> None:
    (own / "measured.json").write_text('{"measured": [{')


def infinite_weights(own: Path) -> None:
    path = own / "nano.shipped.safetensors"
    values = weights.read(path)
    values["tail.bias"][0] = math.inf
    weights.save(values, path)


def half_the_weights(own: Path) -> None:
    path = own / "nano.shipped.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


def half_a_checkpoint(own: Path) -> None:
    (own / "done").unlink()
    (own / "failed").touch()
    (own / "checkpoint.safetensors").write_bytes(b"half")


DAMAGES = (
    half_a_line,
    no_outcome,
    half_an_outcome,
    outcome_of_other_weights,
    half_a_measurement,
    infinite_weights,
    half_the_weights,
    half_a_checkpoint,
)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_one_bad_file_costs_no_other_training_its_weights(tmp_path, piece, damage):
    write_plan(tmp_path / "plan", "nano", "small")
    write_done(tmp_path / "state", "nano")
    small = write_done(tmp_path / "state", "small")
    damage(tmp_path / "state" / "nano")
    said = piece(30)
    assert set(collected(tmp_path)) == ({"small"} if damage is half_the_weights else {"nano", "small"})
    assert sha256(tmp_path / "home/small.safetensors") == small
    assert ("nano: NOT MEASURED" in said) is (damage in (infinite_weights, half_the_weights))
    assert (tmp_path / "state/small/measured.json").is_file()


def test_no_wave_begins_without_time_for_it(tmp_path, piece, monkeypatch):
    write_plan(tmp_path / "plan", "nano")
    instead(monkeypatch, {})
    told, ended = piece(59, "--least-seconds", "60").splitlines()
    assert re.fullmatch(r"nano: NO TIME, 5\d s are left to train in", told)
    assert json.loads(ended) == {"nano": "not done"}
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("held", ["state", "state/nano"], ids=["another start", "a training that outlived its start"])
def test_a_training_that_another_start_is_still_at_is_refused_and_not_given_up(tmp_path, piece, monkeypatch, held):
    write_plan(tmp_path / "plan", "nano")
    instead(monkeypatch, {})
    (tmp_path / held).mkdir(parents=True)
    with lock(tmp_path / held), pytest.raises(InputError, match=f"{held}: is in use by process {os.getpid()}"):
        piece(60)
    assert not list((tmp_path / "state").rglob("failed"))


@pytest.mark.parametrize("content", [None, "no JSON", "[]", '{"plan": [{"name": "nano"}]}'])
def test_a_folder_that_is_none_of_the_scripts_own_is_told_in_one_line(tmp_path, piece, content):
    (tmp_path / "plan").mkdir()
    for name in ("plan.json", "results.json") if content else ():
        (tmp_path / "plan" / name).write_text(content)
    with pytest.raises(InputError, match=r"plan/plan.json: is no plan: .*; name the folder that `prepare` made"):
        piece(60)
    if content is None or content == "no JSON":
        with pytest.raises(InputError, match=r"plan: holds no results.json that can be read; name the --out of"):
            raise invoke("collect", str(tmp_path / "plan"), "-o", str(tmp_path / "home")).exception


def test_nothing_is_measured_when_the_time_is_over(tmp_path, piece):
    write_plan(tmp_path / "plan", "nano")
    write_done(tmp_path / "state", "nano")
    piece(-1)
    assert not (tmp_path / "state/nano/measured.json").exists()
    piece(30)
    assert (tmp_path / "state/nano/measured.json").exists()


@pytest.mark.parametrize("asked", [True, False], ids=["asked for", "not asked for"])
def test_time_is_kept_for_the_baseline_until_it_is_there(tmp_path, piece, monkeypatch, asked):
    write_plan(tmp_path / "plan", "teacher", "nano")
    left: dict[str, float] = {}
    taken: list[float] = []

    def seen(name: str, until: float) -> None:
        left[name] = until - time.monotonic()
        if name == "teacher":
            write_done(tmp_path / "state", "teacher")

    def child(name: str, *arguments: str, seconds: float) -> None:
        assert name == "baseline"
        taken.append(seconds)

    instead(monkeypatch, {"teacher": ["exit 0"], "nano": ["exit 0"]}, seen)
    monkeypatch.setattr(borrowed, "_child", child)
    piece(100, *(() if asked else ("--no-baseline",)))
    assert left["teacher"] == pytest.approx(100 - (borrowed.BASELINE_S if asked else 0), abs=5)
    assert left["nano"] == pytest.approx(100, abs=10)
    assert taken == ([pytest.approx(2 * borrowed.BASELINE_S)] if asked else [])


def test_a_baseline_that_hangs_is_stopped(tmp_path, monkeypatch, capsys):
    (tmp_path / "slow.py").write_text("import time\ntime.sleep(300)\n")
    monkeypatch.setattr(borrowed, "__file__", str(tmp_path / "slow.py"))
    borrowed._child("baseline", seconds=0.5)
    assert "baseline: STOPPED" in capsys.readouterr().out


def test_what_comes_home_is_what_a_card_and_the_tables_want(tmp_path, piece, monkeypatch):
    write_plan(tmp_path / "plan", "nano", "small", "base-color")
    for name in ("nano", "small"):
        write_done(tmp_path / "state", name)
    piece(30)
    told = collected(tmp_path)["nano"]
    assert told["pictures"] == "3 photographs (photos), gray"
    assert told["noise"] == "Gaussian, sigma 0 to 55, noise-level map"
    assert told["device"] == "CPU, shared with 1 other trainings"
    assert (told["minutes"], told["seed"], told["teacher"]) == (7.9, 0, "none")

    there = tmp_path / "zoo"
    there.mkdir()
    monkeypatch.setattr(zoo, "__file__", str(there / "__init__.py"))
    monkeypatch.setattr(zoo, "_FOLDER", there)
    ship, tables = (tiny.script(f"scripts/{name}.py") for name in ("ship_weights", "readme_tables"))
    monkeypatch.setattr(ship, "evaluation_sets", lambda research, channels: [])
    home = tmp_path / "home"
    monkeypatch.setattr(
        sys, "argv", ["", "nano", str(home / "nano.safetensors"), "--trained", str(home / "nano.trained.json")]
    )
    ship.main()
    assert zoo.card("nano").trained == told
    assert "7.9 min, CPU, shared with 1 other trainings |" in tables.zoo_table()
    for name in zoo.names():
        assert {"pictures", "noise", "teacher", "seed"} <= set(zoo.card(name).trained)


def test_weights_are_not_shipped_with_a_card_that_says_too_little(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(zoo, "__file__", str(tmp_path / "__init__.py"))
    (tmp_path / "trained.json").write_text('{"device": "CPU", "minutes": 3, "noise": "", "pictures": "", "seed": 0}')
    ship = tiny.script("scripts/ship_weights.py")
    path = tiny.write_weights("nano", tmp_path / "given" / "weights.safetensors")
    monkeypatch.setattr(sys, "argv", ["", "nano", str(path), "--trained", str(tmp_path / "trained.json")])
    with pytest.raises(SystemExit, match="2"):
        ship.main()
    assert "trained.json: does not say teacher" in capsys.readouterr().err
    assert not (tmp_path / "nano.safetensors").exists()


def test_weights_that_changed_on_the_way_are_refused_and_the_others_are_not(tmp_path, piece):
    write_plan(tmp_path / "plan", "nano", "small")
    for name in ("nano", "small"):
        write_done(tmp_path / "state", name)
    piece(30)
    out = tmp_path / "out"
    results = json.loads((out / "results.json").read_text())
    results["trained"]["nano"]["sha256"] = "0" * 64
    (out / "results.json").write_text(json.dumps(results))
    (out / "weights-2.safetensors").write_bytes(b"half")
    ran = subprocess.run(
        [sys.executable, str(SCRIPT), "collect", str(out), "-o", str(tmp_path / "home")],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert ran.returncode != 0
    assert "is not the file that was trained and measured there" in ran.stderr
    assert "nano.safetensors" in ran.stderr
    assert "weights-2.safetensors: damaged" in ran.stdout
    assert [p.name for p in (tmp_path / "home").glob("*.safetensors")] == ["small.safetensors"]
