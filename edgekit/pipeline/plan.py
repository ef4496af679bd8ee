"""What a run would do, before it does it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgekit import models, run
from edgekit.errors import InputError
from edgekit.pipeline import doctor
from edgekit.recipe import Recipe
from edgekit.target import Target


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step. state: `made` when the run folder has it (it is re-used if nothing changed), `to do`, or `blocked`."""

    name: str
    what: str
    state: str


def plan(recipe: Recipe, targets: Sequence[Target], folder: Path | None = None) -> list[Step]:
    """Return the steps of a recipe for its targets in their order; nothing is written.

    Raises:
        InputError: Unknown model or option. IntegrityError: The folder's record is damaged.
    """
    made = _made(folder or run.RUNS / recipe.name)
    steps = plan_training(recipe, folder)
    steps += [Step(name=n, what=w, state=_state(n, made)) for n, w in _COMPRESSION]
    found = {finding.name for finding in doctor.examine() if finding.found}
    for target in targets:
        name = f"bundles/{target.name}"
        what = (
            f"{target.engine}, {target.precision}, verified by: {' '.join((target.runner.kind, *target.runner.cpus))}"
        )
        state = _state(name, made) if target.engine in found else "blocked"
        steps.append(Step(name=name, what=what, state=state))
    return steps


def plan_training(recipe: Recipe, folder: Path | None = None, *, alone: bool = False) -> list[Step]:
    """Return the steps up to the trained student, which is where `distill` and `train` end; raises as `plan`.

    Args:
        recipe: What to train.
        folder: The run folder; `runs/<recipe>` unless told.
        alone: Train without the recipe's teacher.
    """
    if recipe.teacher:
        models.options(recipe.teacher.model)
    made = _made(folder or run.RUNS / recipe.name)
    return [
        Step(name="pictures", what=_pictures(recipe), state=_state("pictures", made)),
        Step(name="student", what=_student(recipe, alone), state=_state("student", made)),
    ]


_COMPRESSION = (
    ("fuse", "fold BatchNorm into the convolutions"),
    ("export", "ONNX with dynamic height and width"),
    ("simplify", "onnxsim, checked by outputs"),
    ("teacher", "the FP32 teacher as ONNX, to compare with"),
)


def _student(recipe: Recipe, alone: bool) -> str:
    count = models.parameter_count(models.create(recipe.student.model, recipe.student.options))
    limit = f"{recipe.training.steps} steps" if recipe.training.steps else f"{recipe.training.max_minutes:g} minutes"
    teacher = f", taught by '{recipe.teacher.model}'" if recipe.teacher and not alone else ""
    return (
        f"train '{recipe.student.model}' ({count:,} parameters) from {recipe.student.weights} weights, {limit}{teacher}"
    )


def _pictures(recipe: Recipe) -> str:
    return f"train: {', '.join(recipe.data.train)}; evaluation: {recipe.data.evaluation}"


def _made(root: Path) -> set[str]:
    try:
        return {stage.name for stage in run.read_stages(root, check=False)}
    except InputError:
        return set()


def _state(name: str, made: set[str]) -> str:
    return "made" if name in made else "to do"
