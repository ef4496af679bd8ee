"""recipe -> run folder: the pictures, and the student that is trained from the teacher."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from edgekit import models, run
from edgekit.data import sets
from edgekit.data.sets import PictureSet
from edgekit.files import json_sha256, write_json
from edgekit.measure import quality
from edgekit.measure.quality import Denoise, QualityReport
from edgekit.models.denoiser import Denoiser
from edgekit.pipeline import networks, pictures
from edgekit.pipeline.networks import Network
from edgekit.pipeline.pictures import Pictures
from edgekit.recipe import Noise, Recipe
from edgekit.run import Run, Stage
from edgekit.training import loop, patches
from edgekit.training.loop import Moment

log = logging.getLogger(__name__)
_PACKAGES = ("torch", "accelerate", "safetensors", "numpy", "pillow", "scikit-image", "scikit-learn")
_CODE = ("models", "data", "measure/quality", "training", "recipe", "pipeline/distill")
_WHERE = ("threads", "device")
HARM_MDB = 20
_STATE = "02-student.state"
Progress = Callable[[Moment], None]


@dataclass(frozen=True, kw_only=True)
class Distilled:
    """What a run's student came to, on the evaluation pictures; PSNR in thousandths of a dB, None where nothing ran.

    teacher_refused: Why the student learned from the clean pictures alone; empty when it had a teacher.
    steps: Optimizer steps that were made. steps_asked: By the recipe; 0 where time alone ends the training.
    ended_by: `steps` or `time`.
    kept: `trained`, or `start` when training did not better the starting weights on the held-out pictures.
    harmed: Why the starting weights were kept although the mean got better; else empty.
    """

    folder: Path
    noisy_mdb: int
    nlm_mdb: int
    start_mdb: int | None
    student_mdb: int
    teacher_mdb: int | None
    teacher_refused: str
    steps: int
    steps_asked: int
    ended_by: str
    kept: str
    harmed: str


def silent(moment: Moment) -> None:
    """Show nothing."""


def distill(
    recipe: Recipe,
    folder: str | Path | None = None,
    *,
    overwrite: bool = False,
    progress: Progress = silent,
    alone: bool = False,
) -> Distilled:
    """Train the recipe's student in a run folder and return how good it became; a run goes on where it stopped.

    Args:
        recipe: The recipe.
        folder: The run folder; `runs/<recipe's name>` unless told.
        overwrite: Replace another run that is in the folder.
        progress: Called now and then with where training stands.
        alone: Train without the recipe's teacher.

    Raises:
        InputError: Something of the recipe or the folder is wrong, or the folder is in use.
        IntegrityError: A file of the run, or a checkpoint, changed or is damaged.
    """
    root = run.folder_of(recipe.name, folder)
    with run.open_run(root, identity(recipe, alone=alone), overwrite=overwrite) as opened:
        return train_student(opened, recipe, progress=progress, alone=alone)


def identity(recipe: Recipe, *, alone: bool = False) -> Mapping[str, object]:
    """Return what a run of a recipe is, as its folder records it."""
    return {"recipe": asdict(recipe)} | ({"alone": True} if alone and recipe.teacher else {})


def check_recipe(recipe: Recipe, *, alone: bool = False) -> None:
    """Refuse what cannot be trained, before any picture is read; the weights make no difference.

    Args:
        recipe: The recipe.
        alone: Train without the recipe's teacher.

    Raises:
        InputError: Unknown model or option, a training without an end, a patch that does not suit the networks, or
            rounding for a network that has no INT8 form.
    """
    nets = [networks.architecture(recipe.student, recipe.data.channels)]
    if recipe.teacher and not alone:
        teacher = networks.architecture(recipe.teacher, recipe.data.channels)
        # One with random weights teaches nothing.
        nets += [teacher] if recipe.teacher.weights != "random" else []
    loop.check_settings(recipe.training, nets)


def train_student(opened: Run, recipe: Recipe, *, progress: Progress, alone: bool = False) -> Distilled:
    """Make the stages `pictures` and `student` of an open run; raises as `distill`."""
    check_recipe(recipe, alone=alone)
    taught_by = None if alone else recipe.teacher
    start = networks.from_recipe(recipe.student, recipe.data.channels)
    teacher = networks.from_recipe(taught_by, recipe.data.channels) if taught_by else None
    chosen = pictures.load(recipe.data)
    listed = _list_pictures(opened, chosen)
    inputs = {"pictures": opened.sha256(listed, pictures.LISTING)} | {
        role: n.sha256 for role, n in (("start", start), ("teacher", teacher)) if n is not None
    }
    stage = opened.stage(
        "student",
        number=2,
        inputs=inputs,
        settings={
            key: value
            for key, value in asdict(recipe).items()
            if key in ("student", "noise", "training", "distillation", "data")
        }
        | {"threads": torch.get_num_threads(), "device": "cuda" if torch.cuda.is_available() else "cpu"},
        code=_CODE,
        packages=_PACKAGES,
        work=lambda out: _train(opened, recipe, chosen, start, teacher, inputs, out, progress),
        lasting=_WHERE,
    )
    shutil.rmtree(opened.root / _STATE, ignore_errors=True)
    return _distilled(opened, stage, recipe.training.steps)


def _list_pictures(opened: Run, chosen: Pictures) -> Stage:
    def write(out: Path) -> Mapping[str, object]:
        # In the stage, so that a run that goes on does not look again.
        pictures.refuse_leaks(chosen)
        listed = {
            role: [{"name": f"{found.name}/{p.name}", "sha256": p.sha256} for p in found]
            for role, found in chosen.by_role().items()
        }
        write_json(out / pictures.LISTING, listed)
        return {"train": len(chosen.train), "held_out": len(chosen.held_out), "evaluation": len(chosen.evaluation)}

    return opened.stage(
        "pictures", number=1, inputs=chosen.digests(), settings={}, code=("data",), packages=(), work=write
    )


@dataclass(frozen=True, kw_only=True)
class _Judge:
    """Measures networks by the recipe's noise."""

    noise: Noise

    def report(self, network: Denoiser, on: PictureSet) -> QualityReport:
        """Return the figures of a network."""
        return self._evaluate(networks.as_function(network), on, network.stride)

    def psnr_mdb(self, network: Denoiser, on: PictureSet) -> int:
        """Return the PSNR of a network in thousandths of a dB."""
        return self.report(network, on).psnr_mdb

    def classic_mdb(self, denoise: Denoise, on: PictureSet) -> int:
        """Return the PSNR of what is no network in thousandths of a dB."""
        return self._evaluate(denoise, on).psnr_mdb

    def _evaluate(self, denoise: Denoise, on: PictureSet, stride: int = 8) -> QualityReport:
        return quality.evaluate(denoise, on, sigma255=self.noise.evaluate, seeds=(self.noise.seed,), stride=stride)


def _train(
    opened: Run,
    recipe: Recipe,
    chosen: Pictures,
    start: Network | None,
    teacher: Network | None,
    inputs: Mapping[str, str],
    out: Path,
    progress: Progress,
) -> Mapping[str, object]:
    """Write the student's weights into `out`; return what it came to."""
    torch.manual_seed(recipe.training.seed % patches.SEEDS)
    made = recipe.student
    options = made.options_for(recipe.data.channels)
    net = start.net if start else models.create(made.model, options)
    judge, held_out = _Judge(noise=recipe.noise), sets.middles(chosen.held_out)
    job = _job(recipe, net, chosen.train, inputs, lambda network: judge.psnr_mdb(network, held_out) / 1000)
    loop.check(recipe.training, [net, teacher.net] if teacher else [net], job.pictures, job.names)
    start_mdb = judge.psnr_mdb(start.net, chosen.evaluation) if start else None
    teacher_mdb = judge.psnr_mdb(teacher.net, chosen.evaluation) if teacher else None
    before = judge.report(start.net, held_out) if start else None
    refused = _refusal(teacher, start, before, judge, held_out) if teacher else ""
    if refused:
        log.warning("%s", refused)
    elif teacher:
        job = replace(job, teacher=teacher.net)
    starting = {name: value.clone() for name, value in net.state_dict().items()}
    values, outcome = loop.train(job, opened.root / _STATE, progress)
    kept, harmed = outcome.kept, ""
    if before and kept == "trained" and recipe.training.keep_better:
        _put(values, net)
        if harmed := _harm(before, judge.report(net, held_out)):
            values, kept = starting, "start"
            log.warning("%s", harmed)
    loop.save_weights(values, out / networks.WEIGHTS)
    if start:
        networks.describe(out, start.model, start.options)
    else:
        networks.describe(out, made.model, options)
    _put(values, net)
    opened.measure("training", {"seconds": round(outcome.seconds, 1), "images": outcome.images})
    return {
        "steps": outcome.steps,
        "ended_by": outcome.ended_by,
        "kept": kept,
        "harmed": harmed,
        "held_out_start_mdb": round(1000 * outcome.start_psnr_db),
        "held_out_trained_mdb": round(1000 * outcome.psnr_db),
        "noisy_mdb": judge.classic_mdb(quality.noisy_input, chosen.evaluation),
        "nlm_mdb": judge.classic_mdb(quality.nlm, chosen.evaluation),
        "start_mdb": start_mdb,
        "student_mdb": judge.psnr_mdb(net, chosen.evaluation),
        "teacher_mdb": teacher_mdb,
        "teacher_refused": refused,
    }


def _job(
    recipe: Recipe,
    net: Denoiser,
    train: PictureSet,
    inputs: Mapping[str, str],
    validate: Callable[[Denoiser], float],
) -> loop.Job:
    """Return the training of a network without a teacher; its identity has the teacher in `inputs`, if there is one."""
    return loop.Job(
        net=net,
        teacher=None,
        pictures=[p.pixels for p in train],
        names=[f"{train.name}/{p.name}" for p in train],
        sigma=recipe.noise.train,
        training=recipe.training,
        distillation=recipe.distillation,
        validate=validate,
        identity=json_sha256(
            [
                asdict(recipe),
                inputs,
                run.code_sha256(_CODE),
                run.versions(_PACKAGES),
                torch.get_num_threads(),
                torch.cuda.is_available(),
            ]
        ),
    )


def _put(values: Mapping[str, Tensor], net: Denoiser) -> None:
    """Give a network these weights, to be looked at on the CPU."""
    net.load_state_dict(values)
    net.to("cpu").eval()


def _harm(before: QualityReport, after: QualityReport) -> str:
    """Return which held-out picture training harmed most, and by how much; empty when none lost more than `HARM_MDB`.

    A better mean alone does not do: fine-tuning on few pictures gains on those of its own kind and loses on others.
    """
    pairs = zip(before.pictures, after.pictures, strict=True)
    loss_mdb, name = max((old.psnr_mdb - new.psnr_mdb, old.name) for old, new in pairs)
    if loss_mdb <= HARM_MDB:
        return ""
    return (
        f"training made the held-out picture '{name}' worse by {loss_mdb / 1000:.3f} dB (the mean went from "
        f"{before.psnr_mdb / 1000:.3f} to {after.psnr_mdb / 1000:.3f} dB); the starting weights are kept"
    )


def _refusal(
    teacher: Network, start: Network | None, before: QualityReport | None, judge: _Judge, held_out: PictureSet
) -> str:
    """Return why the teacher cannot teach this student; empty when it can.

    It has to beat the student's starting weights on the held-out pictures, or the noisy input where they are random.
    """
    rival_mdb = before.psnr_mdb if before else judge.classic_mdb(quality.noisy_input, held_out)
    its_mdb = judge.psnr_mdb(teacher.net, held_out)
    if its_mdb > rival_mdb:
        return ""
    rival = f"its student '{start.name}' before training" if start else "the noisy input"
    return (
        f"teacher '{teacher.name}' is refused: it reaches {its_mdb / 1000:.2f} dB on the held-out pictures, {rival} "
        f"{rival_mdb / 1000:.2f} dB; the student learns from the clean pictures alone"
    )


def _distilled(opened: Run, stage: Stage, steps_asked: int) -> Distilled:
    facts = stage.facts
    return Distilled(
        folder=opened.root,
        noisy_mdb=_whole(facts["noisy_mdb"]),
        nlm_mdb=_whole(facts["nlm_mdb"]),
        start_mdb=_maybe(facts["start_mdb"]),
        student_mdb=_whole(facts["student_mdb"]),
        teacher_mdb=_maybe(facts["teacher_mdb"]),
        teacher_refused=str(facts["teacher_refused"]),
        steps=_whole(facts["steps"]),
        steps_asked=steps_asked,
        ended_by=str(facts["ended_by"]),
        kept=str(facts["kept"]),
        harmed=str(facts["harmed"]),
    )


def _whole(value: object) -> int:
    assert isinstance(value, int)
    return value


def _maybe(value: object) -> int | None:
    return None if value is None else _whole(value)
