"""Train the shipped weights on a GPU that is lent for minutes at a time.

Here, where edgekit is installed:

    python scripts/borrowed_gpu.py prepare --pictures photos --held-out others -e set12=DIR -e bsd68=DIR -o gpu

There, with torch, accelerate, safetensors, numpy, Pillow and click, from the root of a checkout; the same command again
goes on exactly where it stopped, as long as the folder of the state is there:

    PYTHONPATH=. python scripts/borrowed_gpu.py train gpu --state /tmp/state --out result --minutes 9

Here again:

    python scripts/borrowed_gpu.py collect result -o weights
    python scripts/ship_weights.py nano weights/nano.safetensors --trained weights/nano.trained.json ...
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import click
import torch
from PIL import Image
from safetensors.torch import save

from edgekit import models
from edgekit.data import overlap, sets
from edgekit.data.photos import list_pictures
from edgekit.data.sets import PictureSet
from edgekit.errors import EdgekitError
from edgekit.files import atomic_file, sha256, write_json
from edgekit.models import weights
from edgekit.recipe import Model
from edgekit.training import __main__ as training
from edgekit.training import job_file

FILE_MIB = 14
SIGMAS, SEEDS = (15, 25, 50), 3
LEAST_SIDE = 192  # the largest patch of the recipes
LEFT_FOR_PACKING_S = 20


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One training of the plan.

    name: Of the weights. wave: Trainings of one wave share the GPU; the next wave begins when all of them are done.
    steps: Where trainings are compared at equal steps; else the rate follows time, over `minutes`.
    taught: By the plan's teacher, if it could be trained. half: Shipped in float16.
    """

    name: str
    recipe: str
    minutes: float
    wave: int
    steps: int = 0
    taught: bool = True
    half: bool = False


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
@click.option("--scale", type=float, default=1.0, help="Multiplies the time and the steps of each training.")
@click.option("--only", multiple=True, metavar="NAME", help="Leave out all other trainings.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
def prepare(
    pictures: Sequence[Path],
    held_out: Path,
    evaluate: Sequence[str],
    overrides: Sequence[str],
    scale: float,
    only: Sequence[str],
    output: Path,
) -> None:
    """Write the plan, the settings as plain JSON, and the pictures into one folder."""
    from edgekit import recipe  # reads YAML, which the borrowed machine cannot

    kept = [e for e in PLAN if not only or e.name in only]
    if unknown := set(only) - {e.name for e in PLAN}:
        raise click.UsageError(f"no training '{min(unknown)}'; known: {', '.join(e.name for e in PLAN)}")
    train, small = _copy(pictures, output / "pictures/train")
    others, _ = _copy([held_out], output / "pictures/held_out", every=60)
    folders = dict(entry.split("=", 1) for entry in evaluate)
    for name, folder in folders.items():
        _copy([Path(folder)], output / "pictures" / name, least=1)
    learned = sets.folder(output / "pictures/train", channels=1)
    kept_back = [sets.folder(output / "pictures" / name, channels=1) for name in ("held_out", *folders)]
    sets.check_disjoint(learned, *kept_back)
    overlap.refuse_overlaps(learned, *kept_back)
    click.echo(f"{train} pictures to learn from ({small} under {LEAST_SIDE} pixels left out), {others} held out")
    for entry in kept:
        made = recipe.load(entry.recipe, tuple(overrides))
        # The teacher's weights are made there; here only its architecture is known.
        teacher = Model(model="teacher", weights=job_file.RANDOM) if entry.taught else None
        job_file.write(replace(made, teacher=teacher), output / "jobs" / entry.name / "job.json")
    plan = [asdict(replace(e, minutes=e.minutes * scale, steps=round(e.steps * scale))) for e in kept]
    write_json(output / "plan.json", {"schema_version": 1, "plan": plan, "evaluate": sorted(folders)})
    size = sum(p.stat().st_size for p in output.rglob("*") if p.is_file())
    click.echo(f"{output}: {size / 2**20:.1f} MiB, {sum(e['minutes'] for e in _longest(plan)):.1f} minutes")


@main.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True))
@click.option("--state", type=click.Path(path_type=Path), required=True, help="Checkpoints; stays on that machine.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="What is brought home.")
@click.option("--minutes", type=float, default=9.0, show_default=True, help="Length of this piece.")
@click.option("--baseline/--no-baseline", default=True, help="Time the trained teacher, too, given scikit-image.")
def train(folder: Path, state: Path, out: Path, minutes: float, baseline: bool) -> None:
    """Go on with the plan for some minutes, and write what there is by then."""
    until = time.monotonic() + 60 * minutes - LEFT_FOR_PACKING_S
    plan, evaluate = _read_plan(folder)
    for wave in sorted({e.wave for e in plan}):
        waiting = [e for e in plan if e.wave == wave and not _ended(state, e)]
        if not waiting:
            continue
        if time.monotonic() >= until:
            break
        started = {e.name: _start(folder, state, e.name, until) for e in waiting}
        for name, process in started.items():
            if process.wait() != 0:
                # The others of the plan are worth having without it.
                (state / name / "failed").touch()
                click.echo(f"{name}: FAILED, left out from now on; its last words are in results.json")
    measured = _evaluate(folder, state, plan, evaluate, until)
    _pack(folder, state, out, plan, measured)  # Before anything that weights need not wait for.
    if baseline and (state / "teacher/done").is_file() and not (state / "baseline.json").exists() and _baseline(state):
        _pack(folder, state, out, plan, measured)
    click.echo(json.dumps({e.name: ("done" if (state / e.name / "done").exists() else "not done") for e in plan}))


@main.command(hidden=True)
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("name")
@click.option("--state", type=click.Path(path_type=Path), required=True)
@click.option("--until", type=float, required=True, help="Of the system's monotonic clock.")
def one(folder: Path, name: str, state: Path, until: float) -> None:
    """Go on with one training up to a moment; `train` starts it in a process of its own."""
    (entry,) = [e for e in _read_plan(folder)[0] if e.name == name]
    job = job_file.read(folder / "jobs" / name / "job.json")
    if entry.steps:
        job = replace(job, training=replace(job.training, steps=entry.steps, max_minutes=0.0))
    else:
        job = training.timed(job, entry.minutes)
    teacher = None
    if job.teacher is not None and (state / "teacher/done").is_file():
        teacher = replace(job.teacher, weights=str(state / "teacher/teacher.shipped.safetensors"))
    job = replace(job, teacher=teacher)
    pictures = folder / "pictures"
    path, outcome = training.train(
        job, [pictures / "train"], pictures / "held_out", state / name, pause_at=until, checked=True
    )
    kind = torch.float16 if entry.half else torch.float32
    shipped = state / name / f"{name}.shipped.safetensors"
    weights.save({n: t.to(kind) for n, t in weights.read(path).items()}, shipped)
    write_json(
        state / name / "outcome.json", asdict(outcome) | {"sha256": sha256(shipped), "taught": teacher is not None}
    )
    if outcome.ended_by != "pause":
        (state / name / "done").touch()


@main.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
def collect(folder: Path, output: Path) -> None:
    """Put the weights together again, each with what a card says of its training."""
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("weights-*.safetensors")):
        tensors |= weights.read(path)
    for name, trained in results["trained"].items():
        path = output / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        own = {n.removeprefix(f"{name}/"): t for n, t in tensors.items() if n.startswith(f"{name}/")}
        weights.save(own, path)
        if sha256(path) != trained["sha256"]:
            raise SystemExit(f"{path}: is not the file that was trained and measured there")
        write_json(output / f"{name}.trained.json", trained)
        found = {f"{m['pictures']} {m['sigma']}": m["psnr_mdb"] / 1000 for m in trained["measured"]}
        click.echo(f"{name}: {trained['ended_by']}, {trained['steps']} steps, {found or 'not measured'}")
    if "baseline" in results:
        write_json(output / "baseline.json", results["baseline"])


def _copy(folders: Sequence[Path], out: Path, *, every: int = 1, least: int = LEAST_SIDE) -> tuple[int, int]:
    """Copy pictures into one folder; return how many, and how many were too small."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    copied = small = 0
    for folder in folders:
        for path in list_pictures(folder)[::every]:
            with Image.open(path) as picture:
                if min(picture.size) < least:
                    small += 1
                    continue
            shutil.copyfile(path, out / f"{folder.name}-{path.name}")
            copied += 1
    return copied, small


def _read_plan(folder: Path) -> tuple[list[Entry], list[str]]:
    raw = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    return [Entry(**e) for e in raw["plan"]], raw["evaluate"]


def _longest(plan: Sequence[Mapping[str, float]]) -> list[Mapping[str, float]]:
    """Return the longest training of each wave."""
    waves = sorted({e["wave"] for e in plan})
    return [max((e for e in plan if e["wave"] == wave), key=lambda e: e["minutes"]) for wave in waves]


def _ended(state: Path, entry: Entry) -> bool:
    return any((state / entry.name / mark).exists() for mark in ("done", "failed"))


def _start(folder: Path, state: Path, name: str, until: float) -> subprocess.Popen[bytes]:
    (state / name).mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, "one", str(folder), name, "--state", str(state), "--until", f"{until:.1f}"]
    with (state / name / "said.txt").open("ab") as said:
        return subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)


def _evaluate(
    folder: Path, state: Path, plan: Sequence[Entry], names: Sequence[str], until: float
) -> dict[str, list[Mapping[str, str | int]]]:
    """Return what each finished training reaches on each set; what there is no time for is left to the next piece."""
    measured: dict[str, list[Mapping[str, str | int]]] = {}
    for entry in plan:
        path = state / entry.name / "measured.json"
        if (state / entry.name / "done").is_file() and not path.exists() and time.monotonic() < until:
            shipped = state / entry.name / f"{entry.name}.shipped.safetensors"
            write_json(path, {"measured": _measure(folder, entry.name, shipped, names)})
        if path.exists():
            measured[entry.name] = json.loads(path.read_text(encoding="utf-8"))["measured"]
    return measured


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


def _baseline(state: Path) -> bool:
    """Record the teacher's latency and PSNR on this machine, on the very file that will be shipped.

    It takes scikit-image, which training does not: without it there is no record, and False comes back.
    """
    try:
        from edgekit.pipeline import baseline, networks
    except ImportError as error:
        click.echo(f"baseline: SKIPPED, the teacher was not timed: {error}")
        return False

    path = state / "teacher/teacher.shipped.safetensors"
    net = models.create("teacher")
    weights.load_into(net, path)
    network = networks.Network(
        name="teacher", model="teacher", net=net.eval(), options={}, weights=path, sha256=sha256(path)
    )
    record = baseline.measure(network, [sets.embedded("evaluation")], seconds=3.0)
    baseline.write(record, state / "baseline.json")
    return True


def _pack(folder: Path, state: Path, out: Path, plan: Sequence[Entry], measured: Mapping[str, object]) -> None:
    """Write all weights into files of at most `FILE_MIB`, and everything else into one more."""
    out.mkdir(parents=True, exist_ok=True)
    trained: dict[str, object] = {}
    parts: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for entry in plan:
        path = state / entry.name / f"{entry.name}.shipped.safetensors"
        if not path.is_file():
            continue
        outcome = json.loads((state / entry.name / "outcome.json").read_text(encoding="utf-8"))
        job = json.loads((folder / "jobs" / entry.name / "job.json").read_text(encoding="utf-8"))
        trained[entry.name] = outcome | {"measured": measured.get(entry.name, []), "job": job}
        for name, tensor in weights.read(path).items():
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
    results["trained"] = trained
    results["logs"] = {e.name: _log(state / e.name) for e in plan}
    if (state / "baseline.json").is_file():
        results["baseline"] = json.loads((state / "baseline.json").read_text(encoding="utf-8"))
    write_json(out / "results.json", results)


def _log(folder: Path) -> Mapping[str, object]:
    """Return the curve of a training, thinned, and the last lines that it said."""
    curve = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines() if (folder / "log.jsonl").exists() else []
    said = (folder / "said.txt").read_text(errors="replace").splitlines() if (folder / "said.txt").exists() else []
    return {"curve": [json.loads(line) for line in curve[:: max(1, len(curve) // 200)]], "said": said[-5:]}


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


if __name__ == "__main__":
    try:
        main()
    except EdgekitError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
