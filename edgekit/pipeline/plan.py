"""What a run would do, before it does it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

from edgekit import backends, bundle, models, run
from edgekit.graph import checks
from edgekit.graph.receptive_field import tile_stride
from edgekit.pipeline import compile as compiling
from edgekit.pipeline import distill, doctor, int8, networks, pictures
from edgekit.recipe import Model, Quantization, Recipe
from edgekit.target import Target


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step. state: `made` when the run folder has it (it is re-used if nothing changed), `to do`, or `blocked`."""

    name: str
    what: str
    state: str


def plan(
    recipe: Recipe, targets: Sequence[Target], folder: str | Path | None = None, *, overwrite: bool = False
) -> list[Step]:
    """Return the steps of a recipe for its targets in their order; nothing is written.

    Args:
        recipe: The recipe.
        targets: What to compile for.
        folder: The run folder; `runs/<recipe>` unless told.
        overwrite: Replace another run that is in the folder.

    Raises:
        InputError: Unknown model or option, a folder of another run, or one without pictures.
        UnsupportedError: A target's tile does not fit the student, or its engine cannot do what it asks for.
        IntegrityError: The folder's record is damaged.
    """
    missing = {finding.name: finding.fix for finding in doctor.examine() if not finding.found}
    for target in targets:
        if target.engine not in missing:
            backends.load(target.engine).check(target)
    compiling.check_recipe(recipe, targets, missing=missing)
    made = _made(recipe, folder, overwrite=overwrite)
    steps = plan_training(recipe, folder, overwrite=overwrite)
    steps += [Step(name=n, what=w, state=_state(n, made)) for n, w in _COMPRESSION]
    if _has_weights(recipe.teacher):
        steps.append(Step(name="teacher", what=_TEACHER, state=_state("teacher", made)))
    named = {step.name: step for step in steps}
    for target in targets:
        for name, what in _of_target(target, recipe.quantization):
            if fix := missing.get(target.engine):
                step = Step(name=name, what=f"{what}; first: {fix}", state="blocked")
            else:
                step = Step(name=name, what=what, state=_state(name, made))
            # Targets of one engine share its INT8 graph.
            named.setdefault(name, step)
    return list(named.values())


def check_model(
    what: str | None,
    targets: Sequence[Target],
    *,
    weights: Path | None = None,
    overrides: Sequence[str] = (),
    folder: Path | None = None,
    overwrite: bool = False,
) -> str:
    """Return the MODEL or run folder that `compile` would compile; nothing is written.

    Raises:
        EdgekitError: As `compile.compile_model` for what it looks at before it makes anything; of the pictures only
            whether their folders hold any.
    """
    what = compiling.chosen(what, targets, weights=weights, overrides=overrides, folder=folder, overwrite=overwrite)
    path, is_run = Path(what), networks.is_run(what)
    if what.endswith(".onnx") and not is_run:
        graph = checks.load_float_onnx(path)
        name = compiling.identifier(path.stem)
        channels, stride = checks.interface(graph, path).channels, tile_stride(graph, path)
        compiling.check_onnx(name, targets)
        model, sha256 = path.name, bundle.combined_sha256(checks.files_of(path))
    else:
        network = networks.named(what, weights)
        name, channels, stride = network.name, network.net.channels, network.net.stride
        model, sha256 = what, network.sha256
    if is_run:
        recipe = compiling.recipe_of(path)
        chooses = any(target.precision == "int8" for target in targets)
        pictures.refuse_absent(recipe.data, chooses=chooses, learns=chooses and int8.trains(recipe.quantization))
    else:
        recipe = compiling.default_recipe(name, channels, overrides)
        pictures.refuse_absent(recipe.data)
        run.holds(run.folder_of(name, folder), compiling.identity(recipe, model, sha256), overwrite=overwrite)
    compiling.check_tiles(name, compiling.tile_step(stride, recipe), targets)
    return what


def plan_training(
    recipe: Recipe, folder: str | Path | None = None, *, alone: bool = False, overwrite: bool = False
) -> list[Step]:
    """Return the steps up to the trained student, which is where `distill` and `train` end; raises as `plan`.

    Args:
        recipe: What to train.
        folder: The run folder; `runs/<recipe>` unless told.
        alone: Train without the recipe's teacher.
        overwrite: Replace another run that is in the folder.
    """
    pictures.refuse_absent(recipe.data)
    distill.check_recipe(recipe, alone=alone)
    made = _made(recipe, folder, alone=alone, overwrite=overwrite)
    return [
        Step(name="pictures", what=_pictures(recipe), state=_state("pictures", made)),
        Step(name="student", what=_student(recipe, alone), state=_state("student", made)),
    ]


_COMPRESSION = (
    ("fuse", "fold BatchNorm into the convolutions"),
    ("export", "ONNX with dynamic height and width"),
    ("simplify", "onnxsim, checked by outputs"),
)
_TEACHER = "the FP32 teacher as ONNX, to compare with"


def _of_target(target: Target, settings: Quantization) -> Iterator[tuple[str, str]]:
    """Give the name of each step of a target, and what it does."""
    if target.precision == "int8" and target.engine in int8.PLACEMENTS:
        trained = ", trained with its rounding where it loses too much" if settings.qat.steps else ""
        yield f"quantize/{int8.PLACEMENTS[target.engine]}", f"INT8 for {target.engine}{trained}"
    runner = " ".join((target.runner.kind, *target.runner.cpus))
    yield f"bundles/{target.name}", f"{target.engine}, {target.precision}, verified by: {runner}"


def _has_weights(teacher: Model | None) -> TypeGuard[Model]:
    """Return whether there is a teacher to learn from and compare with."""
    return teacher is not None and teacher.weights != "random"


def _student(recipe: Recipe, alone: bool) -> str:
    count = models.parameter_count(networks.architecture(recipe.student, recipe.data.channels))
    steps, minutes = recipe.training.steps, recipe.training.max_minutes
    limits = [text for text, limit in ((f"{steps} steps", steps), (f"at most {minutes:g} minutes", minutes)) if limit]
    teacher = f", taught by '{recipe.teacher.model}'" if not alone and _has_weights(recipe.teacher) else ""
    return (
        f"train '{recipe.student.model}' ({count:,} parameters) from {recipe.student.weights} weights, "
        f"{', '.join(limits)}{teacher}"
    )


def _pictures(recipe: Recipe) -> str:
    return f"train: {', '.join(recipe.data.train)}; evaluation: {recipe.data.evaluation}"


def _made(recipe: Recipe, folder: str | Path | None, *, alone: bool = False, overwrite: bool = False) -> set[str]:
    root = run.folder_of(recipe.name, folder)
    if not run.holds(root, distill.identity(recipe, alone=alone), overwrite=overwrite):
        return set()
    return {stage.name for stage in run.read_stages(root, check=False)}


def _state(name: str, made: set[str]) -> str:
    return "made" if name in made else "to do"
