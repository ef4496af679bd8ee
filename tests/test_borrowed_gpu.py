"""scripts/borrowed_gpu.py, as a person runs it, on a CPU and with settings that end in seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from PIL import Image

from edgekit.data.synthetic import dead_leaves
from edgekit.files import sha256

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts/borrowed_gpu.py"
MISSING_THERE = ("pydantic", "ruamel", "rich", "skimage", "sklearn", "onnx", "onnxruntime", "jinja2", "onnxsim")


@pytest.fixture
def pictures(tmp_path):
    for number in range(5):
        path = tmp_path / {3: "others", 4: "toy"}.get(number, "photos") / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(dead_leaves(number, 200 if number < 4 else 64, 208 if number < 4 else 64)[0]).save(path)
    Image.fromarray(dead_leaves(9, 48, 40)[0]).save(tmp_path / "photos" / "small.png")
    return tmp_path


def script(*arguments: str, before: Path | None = None) -> str:
    """Run the script; return what it says. Modules in the folder `before` take the place of others of that name."""
    path = os.pathsep.join(str(p) for p in (before, ROOT) if p)
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def prepare(pictures: Path, *more: str) -> str:
    return script(
        *("prepare", "--pictures", str(pictures / "photos"), "--held-out", str(pictures / "others")),
        *("-e", f"toy={pictures / 'toy'}", "-o", str(pictures / "plan")),
        *("--set", "training.batch=1", "--set", "training.patch=16", "--set", "training.late_patch=16", *more),
    )


@pytest.mark.slow
def test_a_plan_trains_in_pieces_and_its_weights_come_home_as_they_were_measured(pictures):
    said = prepare(pictures, "--only", "nano", "--only", "small-untaught", "--scale", "0.005")
    assert "3 pictures to learn from (1 under 192 pixels left out), 1 held out" in said
    state, out = pictures / "state", pictures / "out"
    train = ("train", str(pictures / "plan"), "--state", str(state), "--out", str(out), "--minutes")
    ended = json.loads(script(*train, "0.35"))  # all but a second of it is kept for packing
    assert set(ended.values()) == {"not done"}
    assert (state / "nano/checkpoint.safetensors").is_file()
    for _ in range(6):
        ended = json.loads(script(*train, "0.6"))
        trained = json.loads((out / "results.json").read_text())["trained"]
        if set(ended.values()) == {"done"} and all(entry["measured"] for entry in trained.values()):
            break
    assert set(ended.values()) == {"done"}

    said = script("collect", str(out), "-o", str(pictures / "home"))
    assert "small-untaught: steps, 30 steps" in said
    for name in ("nano", "small-untaught"):
        told = json.loads((pictures / "home" / f"{name}.trained.json").read_text())
        assert told["sha256"] == sha256(pictures / "home" / f"{name}.safetensors")
        assert told["taught"] is False  # the plan's teacher was left out
        assert [m["sigma"] for m in told["measured"]] == [15, 25, 50]
        assert all(5000 < m["psnr_mdb"] < 50000 for m in told["measured"])


def test_the_weights_come_home_from_a_machine_that_cannot_record_a_baseline(pictures):
    prepare(pictures, "--only", "teacher")
    # What a teacher that is done leaves, without the minutes that its training takes.
    teacher, out, home = pictures / "state/teacher", pictures / "out", pictures / "home"
    shipped = tiny.write_weights("teacher", teacher / "teacher.shipped.safetensors")
    outcome = {"sha256": sha256(shipped), "ended_by": "time", "steps": 1}
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


def test_a_training_that_fails_is_told_of_and_the_others_go_on(pictures):
    prepare(pictures, "--only", "nano", "--only", "base-color", "--scale", "0.005")
    (pictures / "plan/jobs/nano/job.json").write_text("{}")
    out = pictures / "out"
    said = script(
        *("train", str(pictures / "plan"), "--state", str(pictures / "state"), "--out", str(out)), "--minutes", "0.9"
    )
    assert "nano: FAILED" in said
    results = json.loads((out / "results.json").read_text())
    assert "is not a training job" in results["logs"]["nano"]["said"][-1]
    assert results["trained"]["base-color"]["ended_by"] in ("time", "pause")


def test_weights_that_changed_on_the_way_are_refused(pictures):
    out = pictures / "out"
    out.mkdir()
    trained = {"nano": {"sha256": "0" * 64, "measured": [], "ended_by": "time", "steps": 1}}
    (out / "results.json").write_text(json.dumps({"trained": trained}))
    ran = subprocess.run(
        [sys.executable, str(SCRIPT), "collect", str(out), "-o", str(pictures / "home")],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert ran.returncode != 0
    assert "is not the file that was trained and measured there" in ran.stderr
