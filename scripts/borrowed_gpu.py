"""Train the shipped weights on a GPU that is lent for minutes at a time.

Here, where edgekit is installed:

    python scripts/borrowed_gpu.py prepare --pictures photos --held-out others -e set12=DIR -e bsd68=DIR -o gpu

(--from-shipped goes on from the weights that ship, --scale 0.5 takes half the time.) There, with torch, accelerate,
safetensors, numpy, Pillow and click, from the root of a checkout; the same command again goes on exactly where it
stopped, as long as the folder of the state is there:

    PYTHONPATH=. python scripts/borrowed_gpu.py train gpu --state /tmp/state --out result --minutes 9

`result` is written anew after each wave, and holds the weights of every training that has any: those that it ended or
paused with, or, where it died, the averages of its last checkpoint. Here again:

    python scripts/borrowed_gpu.py collect result -o weights
    python scripts/ship_weights.py nano weights/nano.safetensors --trained weights/nano.trained.json ...

with --half for the teacher, and --model and --options for the variants of `base`.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import click
import torch
from PIL import Image
from safetensors.torch import save

from edgekit import models, run, zoo
from edgekit.data import overlap, sets
from edgekit.data.photos import UNREADABLE, list_pictures
from edgekit.data.sets import PictureSet
from edgekit.errors import EdgekitError, InputError, is_out_of_memory
from edgekit.files import atomic_file, sha256, write_json
from edgekit.models import weights
from edgekit.recipe import Model, Recipe
from edgekit.training import __main__ as training
from edgekit.training import checkpoint, job_file, loop, rounding
from edgekit.training.job_file import JobFile

ROOT = Path(__file__).resolve().parents[1]
FILE_MIB = 14
# Beside the checkpoint of a training that nobody teaches.
ALONE = "alone"
SIGMAS, SEEDS = (15, 25, 50), 3
# What the end of a piece takes: the trainings' last words, the files, and the latencies of the teacher.
ENDING_S, PACKING_S, BASELINE_S = 25, 15, 75
TRY_AGAIN = 75  # The exit code of a training that ran out of memory: alone on the GPU it may not.
# What the files or the weights of one training can raise; those of the others come home all the same.
BROKEN = (EdgekitError, OSError, ValueError, KeyError, TypeError, RuntimeError)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One training of the plan.

    name: Of the weights. wave: Trainings of one wave share the GPU; the next wave begins when all of them are done.
    steps: Where trainings are compared at equal steps; else the rate follows time, over `minutes`.
    taught: By the plan's teacher, if it could be trained. half: Shipped in float16.
    from_shipped: Begins as the weights of its name in the zoo, which the checkout has there, and keeps them where what
        it makes of them is no better.
    """

    name: str
    recipe: str
    minutes: float
    wave: int
    steps: int = 0
    taught: bool = True
    half: bool = False
    from_shipped: bool = False


PLAN_FILE = "plan.json"
# In order of priority. The students of a wave run side by side, since one alone leaves most of a large GPU idle.
PLAN = (
    Entry(name="teacher", recipe="teacher-unet", minutes=10, wave=1, taught=False, half=True),
    Entry(name="base", recipe="student-base", minutes=8, wave=2),
    Entry(name="small", recipe="student-small", minutes=8, wave=2),
    Entry(name="nano", recipe="student-nano", minutes=8, wave=2),
    Entry(name="large", recipe="student-large", minutes=8, wave=2),
    Entry(name="base-v3", recipe="student-base-v3", minutes=6, wave=3),
    Entry(name="control", recipe="control-plain", minutes=6, wave=3),
    Entry(name="base-blind", recipe="student-base-blind", minutes=6, wave=3),
    Entry(name="base-color", recipe="student-base-color", minutes=6, wave=3, taught=False),
    # What distillation gains.
    Entry(name="base-untaught", recipe="student-base", minutes=4, wave=4, steps=6000, taught=False),
    Entry(name="small-untaught", recipe="student-small", minutes=4, wave=4, steps=6000, taught=False),
    Entry(name="base-taught", recipe="student-base", minutes=4, wave=4, steps=6000),
    Entry(name="small-taught", recipe="student-small", minutes=4, wave=4, steps=6000),
)


@click.group()
def main() -> None:
    """Train the shipped weights on a borrowed GPU."""


@main.command()
@click.option("--pictures", type=click.Path(path_type=Path, exists=True), multiple=True, required=True)
@click.option("--held-out", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("-e", "--evaluate", multiple=True, metavar="NAME=DIR", help="Gray sets that the weights are measured on.")
@click.option("--set", "overrides", multiple=True, metavar="NAME=VALUE", help="Change a setting of every recipe.")
@click.option("--scale", type=click.FloatRange(min=0, min_open=True), default=1.0, help="Of all times and steps.")
@click.option("--max-minutes", "limits", multiple=True, metavar="NAME=MINUTES", help="Of one training, unscaled.")
@click.option("--only", multiple=True, metavar="NAME", help="Leave out all other trainings.")
@click.option(
    "--from-shipped",
    is_flag=True,
    help="Begin as the shipped weights, but where trainings are compared at equal steps.",
)
@click.option("--limit-mib", type=float, default=64, show_default=True, help="Most that travels, with the checkout.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
def prepare(
    pictures: Sequence[Path],
    held_out: Path,
    evaluate: Sequence[str],
    overrides: Sequence[str],
    scale: float,
    limits: Sequence[str],
    only: Sequence[str],
    from_shipped: bool,
    limit_mib: float,
    output: Path,
) -> None:
    """Write the plan, the settings as plain JSON, and the pictures into one folder."""
    from edgekit import recipe  # reads YAML, which the borrowed machine cannot

    kept = [e for e in PLAN if not only or e.name in only]
    if unknown := set(only) - {e.name for e in PLAN}:
        raise click.UsageError(f"no training '{min(unknown)}'; known: {', '.join(e.name for e in PLAN)}")
    folders, minutes = _named(evaluate), _limits(limits, kept)
    made = {e.name: recipe.load(e.recipe, tuple(overrides)) for e in kept}
    least = max(_largest_patch(m) for m in made.values())
    _clear(output)
    train, small = _copy(pictures, output / "pictures/train", least=least)
    if not train:
        raise InputError(
            f"none of the {small} pictures has sides of {least} pixels, the largest patch of the recipes",
            remedy="give larger pictures, or --set training.patch and --set training.late_patch lower",
        )
    others, _ = _copy([held_out], output / "pictures/held_out", every=60)
    for name, folder in folders.items():
        _copy([folder], output / "pictures" / name)
    learned = sets.folder(output / "pictures/train", channels=1)
    held_out_there = sets.folder(output / "pictures/held_out", channels=1)
    # The embedded ones stand on every card.
    judged = [sets.embedded("evaluation"), *(sets.folder(output / "pictures" / name, channels=1) for name in folders)]
    for other in judged:
        sets.check_disjoint(learned, held_out_there, other)
    overlap.refuse_overlaps(learned, held_out_there, *judged)
    overlap.refuse_overlaps(held_out_there, *judged)
    click.echo(f"{train} pictures to learn from ({small} under {least} pixels left out), {others} held out")
    for entry in kept:
        # The teacher's weights are made there; here only its architecture is known.
        teacher = Model(model="teacher", weights=job_file.RANDOM) if entry.taught else None
        job_file.write(replace(_in_float(made[entry.name]), teacher=teacher), output / "jobs" / entry.name / "job.json")
    if "teacher" not in made and (alone := [e.name for e in kept if e.taught]):
        click.echo(f"UNTAUGHT, since the teacher is left out: {', '.join(alone)}")
    planned = [
        replace(
            e,
            minutes=minutes.get(e.name, e.minutes * scale),
            steps=round(e.steps * scale),
            from_shipped=from_shipped and not e.steps,
        )
        for e in kept
    ]
    for entry in planned:
        _check_settings(output, entry, learned)
    plan = [asdict(e) for e in planned]
    about = f"{train} photographs ({', '.join(folder.resolve().name for folder in pictures)})"
    record = {"schema_version": 1, "plan": plan, "evaluate": sorted(folders), "pictures": about}
    write_json(output / PLAN_FILE, record)
    click.echo(f"{output}: {sum(e['minutes'] for e in _longest(plan)):.1f} minutes")
    _check_size(output, limit_mib)


@main.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True))
@click.option("--state", type=click.Path(path_type=Path), required=True, help="Checkpoints; stays on that machine.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="What is brought home.")
@click.option("--minutes", type=float, default=9.0, show_default=True, help="Length of this piece.")
@click.option("--least-seconds", type=float, default=60.0, show_default=True, help="Start no wave with less time left.")
@click.option(
    "--baseline/--no-baseline",
    default=True,
    help=f"Time the trained teacher, too, given scikit-image; {BASELINE_S} s of a piece are kept for it until it is.",
)
def train(folder: Path, state: Path, out: Path, minutes: float, least_seconds: float, baseline: bool) -> None:
    """Go on with the plan for some minutes, and write what there is by then."""
    ends = time.monotonic() + 60 * minutes
    plan = _read_plan(folder)
    owed, began = baseline and _lacks_baseline(state, plan), False
    for wave in sorted({e.wave for e in plan}):
        until = ends - ENDING_S - PACKING_S - (BASELINE_S if owed else 0)
        waiting = [e for e in plan if e.wave == wave and not _ended(state, e)]
        left = until - time.monotonic()
        if waiting and left >= least_seconds:
            _train_together(folder, state, waiting, until, least_seconds)
            _pack(folder, state, out, plan)
            began = True
        elif waiting and not began:
            click.echo(f"{', '.join(e.name for e in waiting)}: NO TIME, {max(0.0, left):.0f} s are left to train in")
        if owed and (state / "teacher/done").is_file():
            # Between two waves, when nothing else is on the GPU.
            seconds = min(2 * BASELINE_S, ends - PACKING_S - time.monotonic())
            _child("baseline", "--state", str(state), seconds=seconds)
            _pack(folder, state, out, plan)
            owed = False
    _pack(folder, state, out, plan)  # Before anything that weights need not wait for.
    _evaluate(folder, state, plan, until)
    _pack(folder, state, out, plan)
    click.echo(json.dumps({e.name: ("done" if (state / e.name / "done").exists() else "not done") for e in plan}))


@main.command(hidden=True)
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("name")
@click.option("--state", type=click.Path(path_type=Path), required=True)
@click.option("--until", type=float, required=True, help="Of the system's monotonic clock.")
def one(folder: Path, name: str, state: Path, until: float) -> None:
    """Go on with one training up to a moment; `train` starts it in a process of its own."""
    (entry,) = [e for e in _read_plan(folder) if e.name == name]
    job = _read_job(folder, entry)
    alone = state / name / ALONE
    if not (state / name / "checkpoint.safetensors").exists():
        # What began without the teacher ends without it, also where that is tried again in between.
        alone.unlink(missing_ok=True)
        if not _taught(state, entry):
            alone.parent.mkdir(parents=True, exist_ok=True)
            alone.touch()
    teacher = None
    if job.teacher is not None and _taught(state, entry):
        teacher = replace(job.teacher, weights=str(_shipped(state, "teacher")))
    job = replace(job, teacher=teacher)
    if entry.from_shipped:
        begun = replace(job.student, weights=str(zoo.weights(name)))
        job = replace(job, student=begun, training=replace(job.training, keep_better=True))
    pictures = folder / "pictures"
    path, outcome = training.train(
        job, [pictures / "train"], pictures / "held_out", state / name, pause_at=until, checked=True
    )
    _ship(state, entry, weights.read(path), asdict(outcome))
    if outcome.ended_by != "pause":
        (state / name / "done").touch()


@main.command(hidden=True)
@click.option("--state", type=click.Path(path_type=Path), required=True)
def baseline(state: Path) -> None:
    """Record the teacher's latency and PSNR on this machine, on the very file that will be shipped.

    It takes scikit-image, which training does not: without it there is no record.
    """
    try:
        from edgekit.pipeline import baseline, networks
    except ImportError as error:
        click.echo(f"baseline: SKIPPED, the teacher was not timed: {error}")
        return

    path = _shipped(state, "teacher")
    net = models.create("teacher")
    weights.load_into(net, path)
    network = networks.Network(
        name="teacher", model="teacher", net=net.eval(), options={}, weights=path, sha256=sha256(path)
    )
    record = baseline.measure(network, [sets.embedded("evaluation")], seconds=3.0)
    baseline.write(record, state / "baseline.json")


@main.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
def collect(folder: Path, output: Path) -> None:
    """Put the weights together again, each with what a card says of its training."""
    if not (results := _read(folder / "results.json")):
        raise InputError(f"{folder}: holds no results.json that can be read", remedy="name the --out of `train`")
    tensors: dict[str, torch.Tensor] = {}
    for part in sorted(folder.glob("weights-*.safetensors")):
        try:
            tensors |= weights.read(part)
        except EdgekitError as error:
            click.echo(f"LEFT OUT: {error}")
    refused = []
    for name, trained in results["trained"].items():
        path = output / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        own = {n.removeprefix(f"{name}/"): t for n, t in tensors.items() if n.startswith(f"{name}/")}
        weights.save(own, path)
        if sha256(path) != trained["sha256"]:
            path.unlink()
            refused.append(str(path))
            continue
        try:
            write_json(output / f"{name}.trained.json", _card(trained, results))
        except BROKEN as error:
            click.echo(f"{name}: NO CARD: {error!r}")
        found = {f"{m['pictures']} {m['sigma']}": m["psnr_mdb"] / 1000 for m in trained["measured"]}
        click.echo(f"{name}: {trained['ended_by']}, {trained['steps']} steps, {found or 'not measured'}")
    if "baseline" in results:
        write_json(output / "baseline.json", results["baseline"])
    if refused:
        raise SystemExit(f"{', '.join(refused)}: is not the file that was trained and measured there")


def _card(trained: Mapping[str, Any], results: Mapping[str, Any]) -> dict[str, str | int | float]:
    """Return what the card of shipped weights says of a training, as scripts/ship_weights.py takes it."""
    job = trained["job"]
    settings = job["training"]
    student = models.create(job["student"]["model"], job["student"]["options"])
    low, high = job["noise"]["train"]
    minutes = round(trained["seconds"] / 60, 1)
    loss = "PSNR"
    if settings["loss"] == "charbonnier":
        loss = f"Charbonnier, from {settings['mse_from']:.0%} of the run on mean squared error"
    stages = f"{trained['steps']:,} steps in {minutes} minutes, ended by: {trained['ended_by']}"
    if trained.get("from_shipped"):
        stages = f"began as the weights that were shipped then; {stages}"
    if trained.get("kept") == "start":
        stages += "; what it began with was kept, as nothing better came of it"
    if settings["late_patch"] is not None:
        stages += f"; patches of {settings['late_patch']} from {settings['late_from']:.0%} of the run on"
    if settings["rounding_from"] < 1:
        stages += f"; rounded to INT8 from {settings['rounding_from']:.0%} of the run on"
    if trained["ended_by"] == "failed":
        stages += "; the averages of its last checkpoint"
    beside = f", shared with {trained['beside']} other trainings" if trained["beside"] else ""
    return {
        "batch": settings["batch"] * settings["accumulate"],
        "device": f"{results['device']}{beside}",
        "ema": settings["ema"],
        "loss": loss,
        "minutes": minutes,
        "noise": f"Gaussian, sigma {low:g} to {high:g}, {'noise-level map' if student.takes_sigma else 'not told'}",
        "optimizer": {"muon": "Muon", "adamw": "AdamW"}[settings["optimizer"]],
        "patch": settings["patch"],
        "peak_rate": settings["peak_rate"],
        "pictures": f"{results['pictures']}, {'gray' if job['channels'] == 1 else 'in colour'}",
        "precision": settings["precision"],
        "seed": settings["seed"],
        "stages": stages,
        "steps": trained["steps"],
        "teacher": "the teacher of the same plan" if trained["taught"] else "none",
    }


def _named(evaluate: Sequence[str]) -> dict[str, Path]:
    """Return the folders that are measured on, by name."""
    folders: dict[str, Path] = {}
    for given in evaluate:
        name, _, folder = given.partition("=")
        if not name or not folder:
            raise click.BadParameter(f"'{given}' is not NAME=DIR", param_hint="-e")
        if name in ("train", "held_out", *folders):
            raise click.BadParameter(f"'{name}' is taken; call it otherwise", param_hint="-e")
        folders[name] = Path(folder)
    return folders


def _limits(given: Sequence[str], plan: Sequence[Entry]) -> dict[str, float]:
    """Return the minutes of the trainings that are told theirs, by name."""
    timed, minutes = {e.name for e in plan if not e.steps}, dict[str, float]()
    for text in given:
        name, _, number = text.partition("=")
        try:
            minutes[name] = float(number)
        except ValueError:
            minutes[name] = 0
        if name not in timed or not 0 < minutes[name] < math.inf:
            raise click.BadParameter(
                f"'{text}' is not NAME=MINUTES; names here: {', '.join(sorted(timed))}", param_hint="--max-minutes"
            )
    return minutes


def _largest_patch(recipe: Recipe) -> int:
    return max(recipe.training.patch, recipe.training.late_patch or 0)


def _check_size(output: Path, limit_mib: float) -> None:
    """Say how much travels, and refuse what does not fit beside the files of the checkout."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split("\0")
    tracked = sum((ROOT / name).stat().st_size for name in listed if (ROOT / name).is_file()) / 2**20
    mine = sum(p.stat().st_size for p in output.rglob("*") if p.is_file()) / 2**20
    said = f"{output}: {mine:.1f} MiB, and {tracked:.1f} MiB of the checkout, of {limit_mib:g} MiB that may travel"
    if mine + tracked > limit_mib:
        raise InputError(said, remedy="give fewer or smaller pictures, or raise --limit-mib")
    click.echo(said)


def _clear(output: Path) -> None:
    """Take the folder for a plan, which is there at once, if only as the beginning of one; remove an earlier one."""
    if output.exists() and not (output / PLAN_FILE).exists() and any(output.iterdir()):
        raise InputError(f"{output}: holds something else than a plan", remedy="name a folder that is not there yet")
    for made in ("pictures", "jobs"):
        shutil.rmtree(output / made, ignore_errors=True)
    write_json(output / PLAN_FILE, {})


def _copy(folders: Sequence[Path], out: Path, *, every: int = 1, least: int = 1) -> tuple[int, int]:
    """Copy pictures into one new folder; return how many, and how many were too small."""
    out.mkdir(parents=True)
    copied = small = 0
    for number, folder in enumerate(folders):
        for path in list_pictures(folder)[::every]:
            try:
                with Image.open(path) as picture:
                    too_small = min(picture.size) < least
            except UNREADABLE as error:
                raise InputError(f"{path}: not a readable picture: {error}", remedy="take it out of there") from error
            if too_small:
                small += 1
                continue
            # Two folders may have one name, and pictures of one name.
            shutil.copyfile(path, out / f"{number}-{folder.name}-{path.name}")
            copied += 1
    return copied, small


def _in_float(made: Recipe) -> Recipe:
    """Return the recipe without the rounding of INT8 where its network, as the teacher, has no such form."""
    if made.training.rounding_from == 1 or rounding.has_form(models.create(made.student.model, made.student.options)):
        return made
    click.echo(f"{made.name}: trained without training.rounding_from, as its network has no INT8 form")
    return replace(made, training=replace(made.training, rounding_from=1.0))


def _read_plan(folder: Path) -> list[Entry]:
    path = folder / PLAN_FILE
    try:
        return [Entry(**e) for e in json.loads(path.read_text(encoding="utf-8"))["plan"]]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path}: is no plan: {error}", remedy="name the folder that `prepare` made") from error


def _read_job(folder: Path, entry: Entry) -> JobFile:
    """Return a training's job with the end that the plan gives it."""
    job = job_file.read(folder / "jobs" / entry.name / "job.json")
    if entry.steps:
        return replace(job, training=replace(job.training, steps=entry.steps, max_minutes=0.0))
    return training.timed(job, entry.minutes)


def _check_settings(folder: Path, entry: Entry, learned: PictureSet) -> None:
    """Refuse here what a training would be refused for there, in the minutes that are lent."""
    job = _read_job(folder, entry)
    nets = [models.create(m.model, m.options) for m in (job.student, job.teacher) if m]
    try:
        loop.check(job.training, nets, [p.pixels for p in learned], [p.name for p in learned])
    except InputError as error:
        raise InputError(f"{entry.name}: {error}") from error


def _read(path: Path) -> dict[str, Any]:
    """Return what a JSON file holds; nothing where it is missing, or was cut short when its process died."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def _longest(plan: Sequence[Mapping[str, float]]) -> list[Mapping[str, float]]:
    """Return the longest training of each wave."""
    waves = sorted({e["wave"] for e in plan})
    return [max((e for e in plan if e["wave"] == wave), key=lambda e: e["minutes"]) for wave in waves]


def _ended(state: Path, entry: Entry) -> bool:
    return any((state / entry.name / mark).exists() for mark in ("done", "failed"))


def _shipped(state: Path, name: str) -> Path:
    return state / name / f"{name}.shipped.safetensors"


def _taught(state: Path, entry: Entry) -> bool:
    return entry.taught and (state / "teacher/done").is_file() and not (state / entry.name / ALONE).exists()


def _lacks_baseline(state: Path, plan: Sequence[Entry]) -> bool:
    teacher = any(e.name == "teacher" for e in plan) and not (state / "teacher/failed").exists()
    return teacher and not (state / "baseline.json").exists()


def _train_together(folder: Path, state: Path, entries: Sequence[Entry], until: float, least_seconds: float) -> None:
    """Train side by side until a moment, and once more, alone, what died on the way.

    Raises:
        InputError: Another start of this trains in the state's folder, or a training that outlived its own.
    """
    with _held(state):
        for entry in entries:
            with _held(state / entry.name):
                pass
        started = {e.name: _start(folder, state, e.name, until) for e in entries}
        for name in [name for name, process in started.items() if _died(state, name, process, until)]:
            if until - time.monotonic() < least_seconds:
                click.echo(f"{name}: DIED, and has no time left in this piece")
                continue
            click.echo(f"{name}: DIED, tried again alone")
            if _died(state, name, _start(folder, state, name, until), until):
                _fail(state, name)


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with run.lock(folder):
        yield


def _start(folder: Path, state: Path, name: str, until: float) -> subprocess.Popen[bytes]:
    command = [sys.executable, __file__, "one", str(folder), name, "--state", str(state), "--until", f"{until:.1f}"]
    with (state / name / "said.txt").open("ab") as said:
        return subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)


def _died(state: Path, name: str, process: subprocess.Popen[bytes], until: float) -> bool:
    """Wait for a training; return whether it died of something that it may not meet again."""
    code = _wait(process, until + ENDING_S - time.monotonic())
    if code is None:
        click.echo(f"{name}: HANGS, stopped; it goes on from its last checkpoint in the next piece")
        return False
    # 1 is a defect or an error that nobody explained, and less than 0 a signal.
    if 1 < code < TRY_AGAIN:
        _fail(state, name)
        return False
    return code != 0


def _fail(state: Path, name: str) -> None:
    # The others of the plan are worth having without it.
    (state / name / "failed").touch()
    click.echo(f"{name}: FAILED, left out from now on; its last words are in results.json")


def _child(*arguments: str, seconds: float) -> None:
    """Run another command of this script, and stop it when the time is over."""
    if _wait(subprocess.Popen([sys.executable, __file__, *arguments]), seconds) is None:
        click.echo(f"{arguments[0]}: STOPPED after {seconds:.0f} seconds")


def _wait(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    """Return the exit code of a process, None where it had to be killed."""
    try:
        return process.wait(timeout=max(0.0, seconds))
    except subprocess.TimeoutExpired:
        process.kill()
        # What hangs in the driver of the GPU may not even die.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=3)
        return None


def _ship(state: Path, entry: Entry, tensors: Mapping[str, torch.Tensor], outcome: Mapping[str, object]) -> None:
    """Write a training's weights as they are shipped, and how it ended."""
    kind = torch.float16 if entry.half else torch.float32
    path = _shipped(state, entry.name)
    weights.save({n: t.to(kind) for n, t in tensors.items()}, path)
    record = dict(outcome) | {"sha256": sha256(path), "taught": _taught(state, entry)}
    write_json(state / entry.name / "outcome.json", record)


def _outcome(state: Path, name: str) -> dict[str, Any]:
    """Return how a training ended; what was killed before it could tell of its weights has failed."""
    found, hashed = _read(state / name / "outcome.json"), sha256(_shipped(state, name))
    if found.get("sha256") == hashed:
        return found
    return {"ended_by": "failed", "steps": 0, "seconds": 0.0, "taught": False, "sha256": hashed}


def _rescue(state: Path, entry: Entry) -> None:
    """Ship the averages of a training's checkpoint, where it died and that is the latest of it."""
    path = state / entry.name / "checkpoint.safetensors"
    if (state / entry.name / "done").exists() or not path.is_file():
        return
    saved = checkpoint.read(path)
    if _shipped(state, entry.name).is_file() and saved.position.step <= _outcome(state, entry.name)["steps"]:
        return
    averages = weights.averages(saved.tensors)
    ended = {"ended_by": "failed", "steps": saved.position.step, "seconds": saved.position.seconds}
    _ship(state, entry, averages, ended)


def _evaluate(folder: Path, state: Path, plan: Sequence[Entry], until: float) -> None:
    """Measure what each finished training reaches; what there is no time for is left to the next piece."""
    names = json.loads((folder / PLAN_FILE).read_text(encoding="utf-8"))["evaluate"]
    for entry in plan:
        path = state / entry.name / "measured.json"
        if not (state / entry.name / "done").is_file() or "measured" in _read(path) or time.monotonic() >= until:
            continue
        try:
            write_json(path, {"measured": _measure(folder, entry.name, _shipped(state, entry.name), names)})
        except BROKEN as error:
            click.echo(f"{entry.name}: NOT MEASURED: {error}")


def _measure(folder: Path, name: str, path: Path, names: Sequence[str]) -> list[Mapping[str, str | int]]:
    job = job_file.read(folder / "jobs" / name / "job.json")
    if job.channels != 1:
        return []  # the sets are gray; scripts/ship_weights.py measures colour
    net = models.create(job.student.model, job.student.options)
    weights.load_into(net, path)
    net.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    found: list[Mapping[str, str | int]] = []
    for chosen in names:
        pictures: PictureSet = sets.folder(folder / "pictures" / chosen, channels=1)
        for sigma in SIGMAS:
            psnr = [training.psnr_db(net, pictures, sigma, seed=seed) for seed in range(SEEDS)]
            found.append(
                {"pictures": chosen, "sigma": sigma, "seeds": SEEDS, "psnr_mdb": round(1000 * sum(psnr) / SEEDS)}
            )
    return found


def _pack(folder: Path, state: Path, out: Path, plan: Sequence[Entry]) -> None:
    """Write all weights into files of at most `FILE_MIB`, and everything else into one more."""
    out.mkdir(parents=True, exist_ok=True)
    trained: dict[str, object] = {}
    parts: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for entry in plan:
        try:
            with contextlib.suppress(EdgekitError):  # A damaged checkpoint; what was shipped before may be good.
                _rescue(state, entry)
            if not _shipped(state, entry.name).is_file():
                continue
            tensors = weights.read(_shipped(state, entry.name))
            trained[entry.name] = _record(folder, state, plan, entry)
        except BROKEN as error:
            click.echo(f"{entry.name}: NOT PACKED: {error}")
            continue
        for name, tensor in tensors.items():
            bytes_ = tensor.numel() * tensor.element_size()
            if size + bytes_ > FILE_MIB * 2**20:
                parts.append({})
                size = 0
            parts[-1][f"{entry.name}/{name}"] = tensor
            size += bytes_
    for number, part in enumerate(parts, 1):
        with atomic_file(out / f"weights-{number}.safetensors") as temporary:
            temporary.write_bytes(save(part))
    results: dict[str, object] = {"schema_version": 1, "device": _device(), "torch": torch.__version__}
    results["pictures"] = _read(folder / PLAN_FILE).get("pictures", "photographs")
    results["trained"] = trained
    results["logs"] = {e.name: _log(state / e.name) for e in plan}
    if record := _read(state / "baseline.json"):
        results["baseline"] = record
    write_json(out / "results.json", results)


def _record(folder: Path, state: Path, plan: Sequence[Entry], entry: Entry) -> dict[str, object]:
    """Return how a training ended, what it reached, and all that its card says of it."""
    return _outcome(state, entry.name) | {
        "measured": _read(state / entry.name / "measured.json").get("measured", []),
        "beside": sum(e.wave == entry.wave for e in plan) - 1,
        "job": _read(folder / "jobs" / entry.name / "job.json"),
        "from_shipped": entry.from_shipped,
    }


def _log(folder: Path) -> Mapping[str, object]:
    """Return the curve of a training, thinned, and the last lines that it said."""
    curve, said = (
        path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
        for path in (folder / "log.jsonl", folder / "said.txt")
    )
    moments = []
    for line in curve[:: max(1, len(curve) // 200)]:
        with contextlib.suppress(ValueError):  # Half a line, of a training that died while it wrote.
            moments.append(json.loads(line))
    return {"curve": moments, "said": said[-5:]}


@cache
def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


if __name__ == "__main__":
    try:
        main()
    except EdgekitError as error:
        click.echo(f"error: {error}", err=True)
        out_of_memory = isinstance(error.__cause__, Exception) and is_out_of_memory(error.__cause__)
        sys.exit(TRY_AGAIN if out_of_memory else error.exit_code)
