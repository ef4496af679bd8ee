"""A run that is stopped anywhere and started again ends with the bytes of an undisturbed one."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import tiny
import torch

from edgekit import files, run
from edgekit.errors import InputError
from edgekit.pipeline import distill
from edgekit.recipe import Distillation, Model
from edgekit.training import loop
from edgekit.training.loop import Moment

pytestmark = pytest.mark.usefixtures("one_thread")

STUDENT = "02-student/student.safetensors"
COMMAND = [sys.executable, "-c", "from edgekit.cli import main; main()", "-q", "distill"]


class StopError(Exception):
    """Stands for whatever ends a process."""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return tiny.write_pictures(tmp_path_factory.mktemp("resume") / "pictures")


# In one process: every way to train


def stop_at(steps: set[int]) -> Callable[[Moment], None]:
    """Return a progress display that raises the first time that one of these steps is shown."""

    def report(moment: Moment) -> None:
        if moment.step in steps:
            steps.remove(moment.step)
            raise StopError

    return report


TRAININGS = {
    "alone": {},
    "bf16": {"training": tiny.training(steps=60, precision="bf16")},
    "two passes a step": {"training": tiny.training(steps=60, accumulate=2)},
    "batchnorm": {"student": Model(model="nano", weights="random", options={"batchnorm": True, "se": True})},
    "late patches, weight decay": {
        "training": tiny.training(steps=60, late_patch=48, late_from=0.5, weight_decay=0.01, mse_from=0.7)
    },
    "from shipped weights": {"student": Model(model="nano"), "training": tiny.training(steps=60, keep_better=True)},
    "taught": {"teacher": Model(model="nano"), "distillation": Distillation(feature_until=0.8)},
    "taught a blind network": {
        "teacher": Model(model="nano"),
        "student": Model(model="nano", weights="random", options={"noise_level": False}),
    },
}


@pytest.mark.parametrize("changes", TRAININGS.values(), ids=TRAININGS)
def test_a_training_that_was_stopped_three_times_gives_the_same_weights(tmp_path, pictures, changes):
    recipe = tiny.recipe(pictures, **{"training": tiny.training(steps=60), **changes})
    # A checkpoint at every look, so that each sitting begins somewhere else.
    recipe = dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, checkpoint_seconds=1e-9))
    whole = distill.distill(recipe, tmp_path / "whole")
    steps = set(random.Random(len(str(changes))).sample(range(20, 60, 10), 3))
    parts = tmp_path / "parts"
    stopped = 0
    while steps:
        with pytest.raises(StopError):
            distill.distill(recipe, parts, progress=stop_at(steps))
        stopped += 1
    assert stopped == 3
    assert (parts / "02-student.state" / "checkpoint.safetensors").is_file()
    assert not (parts / STUDENT).exists()
    again = distill.distill(recipe, parts)
    assert dataclasses.replace(again, folder=whole.folder) == whole
    assert not whole.teacher_refused
    same(tmp_path / "whole", parts)


def test_a_run_that_is_finished_is_not_trained_again(tmp_path, pictures):
    recipe = tiny.recipe(pictures)
    first = distill.distill(recipe, tmp_path / "run")
    record = (tmp_path / "run" / "run.json").read_bytes()
    assert distill.distill(recipe, tmp_path / "run", progress=stop_at(set(range(1000)))) == first
    assert (tmp_path / "run" / "run.json").read_bytes() == record


def test_a_run_that_is_finished_is_not_trained_again_for_another_number_of_threads(tmp_path, pictures, caplog):
    caplog.set_level(logging.WARNING, logger="edgekit")
    recipe = tiny.recipe(pictures)
    first = distill.distill(recipe, tmp_path / "run")
    torch.set_num_threads(2)
    assert distill.distill(recipe, tmp_path / "run", progress=stop_at(set(range(1000)))) == first
    assert any(text.startswith("student: made with other code, versions, threads or") for text in caplog.messages)


def test_a_run_does_not_go_on_with_another_number_of_threads(tmp_path, pictures):
    recipe = tiny.recipe(pictures, training=tiny.training(steps=30, checkpoint_seconds=1e-9))
    with pytest.raises(StopError):
        distill.distill(recipe, tmp_path / "run", progress=stop_at({20}))
    torch.set_num_threads(2)
    with pytest.raises(InputError, match="is the checkpoint of another run"):
        distill.distill(recipe, tmp_path / "run")


def test_a_run_without_any_checkpoint_starts_over(tmp_path, pictures):
    recipe = tiny.recipe(pictures, training=tiny.training(steps=30, checkpoint_seconds=1000.0))
    with pytest.raises(StopError):
        distill.distill(recipe, tmp_path / "parts", progress=stop_at({20}))
    distill.distill(recipe, tmp_path / "parts")
    distill.distill(recipe, tmp_path / "whole")
    same(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("changed", ["start", "teacher"])
def test_a_run_does_not_go_on_with_other_weights_than_it_began_with(tmp_path, pictures, changed):
    path = tiny.write_weights("nano", tmp_path / "given.safetensors", shrink=1e-3)
    given = Model(model="nano", weights=str(path))
    student, teacher = (given, None) if changed == "start" else (Model(model="nano", weights="random"), given)
    recipe = tiny.recipe(
        pictures, student=student, teacher=teacher, training=tiny.training(steps=30, checkpoint_seconds=1e-9)
    )
    with pytest.raises(StopError):
        distill.distill(recipe, tmp_path / "run", progress=stop_at({20}))
    tiny.write_weights("nano", path, seed=1, shrink=1e-3)
    with pytest.raises(InputError, match=r"is the checkpoint of another run .* delete it to start the training again"):
        distill.distill(recipe, tmp_path / "run")


def test_a_run_does_not_go_on_without_the_teacher_that_it_began_with(tmp_path, pictures):
    recipe = tiny.recipe(
        pictures, teacher=Model(model="nano"), training=tiny.training(steps=30, checkpoint_seconds=1e-9)
    )
    with pytest.raises(StopError):
        distill.distill(recipe, tmp_path / "run", progress=stop_at({20}))
    with pytest.raises(InputError, match=r"holds another run \(alone is None there, True here\)"):
        distill.distill(recipe, tmp_path / "run", alone=True)
    with (
        run.open_run(tmp_path / "run", None) as opened,
        pytest.raises(InputError, match="is the checkpoint of another run"),
    ):
        distill.train_student(opened, recipe, progress=distill.silent, alone=True)


def test_a_run_is_not_continued_with_other_settings(tmp_path, pictures):
    distill.distill(tiny.recipe(pictures), tmp_path / "run")
    other = tiny.recipe(pictures, training=tiny.training(steps=21))
    with pytest.raises(InputError, match=r"training\.steps is 20 there, 21 here"):
        distill.distill(other, tmp_path / "run")
    assert distill.distill(other, tmp_path / "run", overwrite=True).kept == "trained"


@pytest.mark.parametrize("written", [False, True], ids=["before the record", "after the record"])
def test_a_run_that_stops_between_its_result_and_the_next_command_is_made_whole(
    tmp_path, pictures, monkeypatch, written
):
    recipe = tiny.recipe(pictures)
    distill.distill(recipe, tmp_path / "whole")
    write = run.Run._write

    def stop(self: run.Run) -> None:
        if written or "student" not in self.stages():
            write(self)
        if "student" in self.stages():
            raise StopError

    monkeypatch.setattr(run.Run, "_write", stop)
    with pytest.raises(StopError):
        distill.distill(recipe, tmp_path / "parts")
    monkeypatch.undo()
    assert (tmp_path / "parts" / STUDENT).is_file()
    distill.distill(recipe, tmp_path / "parts")
    same(tmp_path / "whole", tmp_path / "parts")


def test_a_run_that_was_killed_while_it_wrote_a_file_of_its_result_goes_on(tmp_path, pictures):
    recipe = tiny.recipe(pictures, training=tiny.training(steps=30, checkpoint_seconds=1e-9))
    with pytest.raises(StopError):
        distill.distill(recipe, tmp_path / "run", progress=stop_at({20}))
    half = tmp_path / "run" / ".02-student.abc.tmp"
    half.mkdir()
    (half / ".student.safetensors.1.tmp").write_bytes(b"half")
    distill.distill(recipe, tmp_path / "run")
    distill.distill(recipe, tmp_path / "whole")
    same(tmp_path / "whole", tmp_path / "run")


def test_time_is_counted_over_all_sittings(tmp_path):
    job = loop.Job(
        net=tiny.network("nano"),
        teacher=None,
        pictures=[torch.zeros(1, 32, 32, dtype=torch.uint8).numpy()],
        sigma=(5.0, 50.0),
        training=tiny.training(steps=0, max_minutes=3 / 60, batch=1),
        distillation=Distillation(),
        validate=lambda net: 0.0,
        identity="job",
    )
    _, paused = loop.train(job, tmp_path, lambda moment: None, pause_after_seconds=0.5)
    assert paused.ended_by == "pause"
    reached: list[float] = []
    _, outcome = loop.train(job, tmp_path, lambda moment: reached.append(moment.done))
    assert reached[0] * 3 > paused.seconds
    assert outcome.seconds >= 3
    assert outcome.ended_by == "time"


# Whole processes, killed


@dataclass(frozen=True, kw_only=True)
class Kill:
    """When a process is killed: a delay after something appears that was not there when it started.

    after: `start`, a new `checkpoint`, or the first file of the `result`.
    delay: Seconds; after `start`, the share of the shortest time that a process took to its first checkpoint.
    """

    after: Literal["start", "checkpoint", "result"]
    delay: float


def kills() -> list[Kill]:
    """Return twenty: while modules and pictures are read, in training, and while the result is written."""
    chance = random.Random(20)
    early = [Kill(after="start", delay=chance.uniform(0, 1)) for _ in range(7)]
    training = [Kill(after="checkpoint", delay=chance.uniform(0, 0.4)) for _ in range(9)]
    mixed = early + training
    chance.shuffle(mixed)
    # These find the training done: the weights and figures are written, the folder renamed, the record made.
    return mixed + [Kill(after="result", delay=delay) for delay in (0, 0.01, 0.03, 0.1)]


@pytest.fixture(scope="module")
def recipe_file(pictures, tmp_path_factory) -> Path:
    recipe = tiny.recipe(
        pictures,
        teacher=Model(model="nano"),
        training=tiny.training(steps=600, batch=2, precision="bf16", checkpoint_seconds=0.1),
    )
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(json.dumps(dataclasses.asdict(recipe)))
    return path


@pytest.mark.slow
def test_a_run_that_was_killed_twenty_times_ends_with_the_bytes_of_an_undisturbed_one(tmp_path, recipe_file):
    began = time.monotonic()
    process = start(recipe_file, tmp_path / "whole")
    wait_for("checkpoint", process, tmp_path / "whole", frozenset())
    until_training = time.monotonic() - began
    finish(process)
    parts, codes = tmp_path / "parts", []
    for kill in kills():
        before = seen(kill.after, parts)
        process = start(recipe_file, parts)
        began = time.monotonic()
        if kill.after == "start":
            time.sleep(kill.delay * until_training)
        else:
            wait_for(kill.after, process, parts, before)
            until_training = min(until_training, time.monotonic() - began)
            time.sleep(kill.delay)
        process.kill()
        _, said = process.communicate()
        # The result is written in an instant: the last two may come too late.
        assert process.returncode == -signal.SIGKILL or (len(codes) >= 18 and process.returncode == 0), said
        codes.append(process.returncode)
    assert len(codes) == 20
    finish(start(recipe_file, parts))
    same(tmp_path / "whole", parts)


@pytest.mark.slow
def test_a_run_that_was_interrupted_says_so_and_keeps_others_out_while_it_goes_on(tmp_path, recipe_file):
    run = tmp_path / "run"
    process = start(recipe_file, run)
    wait_for("checkpoint", process, run, frozenset())
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode == 130, said
    assert said.strip().endswith("interrupted; start the same command again to go on")
    again = start(recipe_file, run)
    wait_for("checkpoint", again, run, seen("checkpoint", run))
    other = start(recipe_file, run)
    _, refused = other.communicate()
    again.kill()
    again.wait()
    assert other.returncode == 2
    assert f"is in use by process {again.pid}" in refused


def start(recipe_file: Path, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, str(recipe_file), "-o", str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> None:
    _, said = process.communicate()
    assert process.returncode == 0, said


def wait_for(what: str, process: subprocess.Popen[str], folder: Path, before: frozenset[str]) -> None:
    """Return as soon as something is there that was not, or the process has ended."""
    while process.poll() is None and not seen(what, folder) - before:
        time.sleep(0.001)


def seen(what: str, folder: Path) -> frozenset[str]:
    """Return what tells one state of a run folder from the next."""
    pattern = {
        "start": "",
        "checkpoint": "02-student.state/checkpoint.safetensors",
        "result": ".02-student.*.tmp/*",
    }[what]
    found = set()
    # A file or a folder that goes meanwhile ends this look; whoever waits looks again.
    with contextlib.suppress(FileNotFoundError):
        for path in folder.glob(pattern) if pattern else ():
            status = path.stat()
            found.add(f"{path} {status.st_ino} {status.st_mtime_ns if what == 'checkpoint' else ''}")
    return frozenset(found)


def same(one: Path, other: Path) -> None:
    """Assert that two runs have the same weights and the same record, and that nothing is left half written."""
    assert files.sha256(one / STUDENT) == files.sha256(other / STUDENT)
    assert (one / "run.json").read_bytes() == (other / "run.json").read_bytes()
    names = {p.relative_to(other).as_posix() for p in other.rglob("*")}
    assert names == {p.relative_to(one).as_posix() for p in one.rglob("*")}
    assert not any(name.endswith(".tmp") for name in names)
