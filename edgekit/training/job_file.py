"""A training run as one folder of plain files, for a machine that has torch and little else.

    python -c "from pathlib import Path; from edgekit import recipe; from edgekit.training import job_file;
    job_file.write(recipe.load('quickstart'), Path('job/job.json'))"
    python -m edgekit.training job/job.json --pictures photos --out result

The second line needs torch, accelerate, safetensors, numpy and Pillow, and this package on the path.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from edgekit import models, zoo
from edgekit.errors import InputError, IntegrityError
from edgekit.files import sha256, write_json
from edgekit.recipe import Distillation, Model, NoiseSettings, Recipe, Training
from edgekit.training import schema

RANDOM = "random"
_KIND = "edgekit-training-job"


@dataclass(frozen=True, kw_only=True)
class JobFile:
    """What `read` returns: the part of a recipe that training needs; weights are `random` or the path of a file."""

    name: str
    channels: Literal[1, 3]
    student: Model
    teacher: Model | None
    noise: NoiseSettings
    training: Training
    distillation: Distillation


def write(recipe: Recipe, path: Path) -> Path:
    """Return `path`, now the recipe's training as JSON; weights are copied beside it, so that the folder can be sent.

    Raises:
        InputError: Unknown model or option, or weights that are not there.
    """
    files: dict[str, str] = {}
    job = JobFile(
        name=recipe.name,
        channels=recipe.data.channels,
        student=_beside(recipe.student, "student", recipe.data.channels, path, files),
        teacher=_beside(recipe.teacher, "teacher", recipe.data.channels, path, files) if recipe.teacher else None,
        noise=recipe.noise,
        training=recipe.training,
        distillation=recipe.distillation,
    )
    write_json(path, {"schema_version": 1, "kind": _KIND, "files": files, **asdict(job)})
    return path


def read(path: Path) -> JobFile:
    """Return the job in a file that `write` made, with the paths of its weights.

    Raises:
        InputError: No such file, it is no job, or a setting in it is wrong, by its name. IntegrityError: Weights are
            missing or changed.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file", remedy="make one: edgekit.training.job_file.write")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if raw.pop("kind") != _KIND or raw.pop("schema_version") != 1:
            raise InputError(f"{path}: is not a training job of this version", remedy="write it again")
        files = dict[str, str](raw.pop("files"))
        job = schema.checked(JobFile, raw)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise InputError(f"{path}: is not a training job: {error}", remedy="write it again") from error
    for name, recorded in files.items():
        if not (path.parent / name).is_file() or sha256(path.parent / name) != recorded:
            raise IntegrityError(f"{path.parent / name}: is missing or changed", remedy="copy the job's folder again")
    return replace(job, student=_placed(job.student, path), teacher=_placed(job.teacher, path) if job.teacher else None)


def _beside(wanted: Model, role: str, channels: int, path: Path, files: dict[str, str]) -> Model:
    """Return a model whose weights are named relative to the job file, and copy them there."""
    options = wanted.options_for(channels)
    resolved = replace(wanted, options=options)
    if wanted.weights == "shipped":
        card = zoo.fitting(wanted.model, options)
        resolved = Model(model=card.model, weights=str(zoo.weights(card.name)), options=card.options)
    if models.create(resolved.model, resolved.options).channels != channels:
        raise InputError(f"'{wanted.model}' does not take {channels} channels")
    if resolved.weights == RANDOM:
        return resolved
    source = Path(resolved.weights)
    if not source.is_file():
        raise InputError(f"{source}: no such file", remedy="name a .safetensors file of weights")
    copy = path.with_name(f"{path.stem}.{role}{source.suffix}")
    copy.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, copy)
    files[copy.name] = sha256(copy)
    return replace(resolved, weights=copy.name)


def _placed(model: Model, path: Path) -> Model:
    return model if model.weights == RANDOM else replace(model, weights=str(path.parent / model.weights))
