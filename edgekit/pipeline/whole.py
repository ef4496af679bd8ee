"""recipe -> verdict in one call."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgekit import bundle, run
from edgekit.pipeline import compile as compiling
from edgekit.pipeline import distill, networks, verify
from edgekit.pipeline.compile import Compiled
from edgekit.pipeline.distill import Distilled, Progress
from edgekit.recipe import Recipe
from edgekit.report import Report
from edgekit.target import Target

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Result:
    """Everything that a run made."""

    distilled: Distilled
    compiled: Compiled
    reports: tuple[Report, ...]


def run_recipe(
    recipe: Recipe,
    targets: Sequence[Target],
    folder: str | Path | None = None,
    *,
    overwrite: bool = False,
    settings: verify.Settings | None = None,
    progress: Progress = distill.silent,
    say: verify.Say = log.info,
) -> Result:
    """Distil the recipe's student, compile it for each target and verify every artifact.

    Args:
        recipe: The recipe.
        targets: What to compile for.
        folder: The run folder; `runs/<recipe's name>` unless told.
        overwrite: Replace another run that is in the folder.
        settings: How latency is measured.
        progress: Called now and then with where training stands.
        say: Told what is being verified.

    Raises:
        EdgekitError: As `distill.distill`, `compile.compile_model` and `verify.verify`.
    """
    compiling.check_targets(targets)
    compiling.check_recipe(recipe, targets)
    root = run.folder_of(recipe.name, folder)
    with run.open_run(root, distill.identity(recipe), overwrite=overwrite) as opened:
        distilled = distill.train_student(opened, recipe, progress=progress)
        compiled = compiling.compile_student(opened, recipe, networks.from_run(root), targets)
        reports = []
        for path in compiled.bundles.values():
            report = verify.verify(path, settings=settings, say=say)
            verify.write(report, bundle.report_path(path))
            reports.append(report)
    return Result(distilled=distilled, compiled=compiled, reports=tuple(reports))
