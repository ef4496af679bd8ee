"""float graph -> INT8 graph for an engine, within the recipe's budget: calibrate, place, train, roll back."""

from __future__ import annotations

import importlib
import logging
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import onnx
import torch

from edgekit import backends
from edgekit.compress import budget, export, placement, qat, quantize
from edgekit.compress.budget import Budget, Judge, Kept, Loss
from edgekit.compress.placement import Placement
from edgekit.compress.quantize import Prepared
from edgekit.compress.ranges import Calibration
from edgekit.data import sets
from edgekit.data.sets import PictureSet
from edgekit.errors import LimitError, UnsupportedError
from edgekit.files import sha256
from edgekit.graph import checks, walk
from edgekit.graph.reference import probe
from edgekit.pipeline import pictures
from edgekit.pipeline.pictures import Pictures
from edgekit.recipe import Noise, Qat, Quantization, Recipe, int8_drop_db, int8_worst_db
from edgekit.run import Run
from edgekit.target import Engine
from edgekit.training.loop import Moment

log = logging.getLogger(__name__)
FILE, EQUALIZED = "student.int8.onnx", "equalized.fp32.onnx"
PLACEMENTS: Mapping[Engine, str] = {"onnxruntime": "onnxruntime", "openvino": "openvino", "tvm": "arm"}
# Share of the budget up to which nothing is trained. What just holds on these pictures is missed on others, and what a
# trunk of 8 bits loses depends on the draw of calibration pictures too; training wins most of both back.
_UNTRAINED: Mapping[Literal["int8", "int16"], float] = {"int8": 0.25, "int16": 0.5}
# What was never trained with any rounding may lose more in training than it wins, where a tenth of the rates wins most
# of it back (docs/qat.md).
_SLOWER = 10
_SIGMAS = (15.0, 25.0, 50.0, 100.0, 200.0)
_MOST_PICTURES = 16
_CHECKED_BLOCKS = 8


@dataclass(frozen=True, kw_only=True)
class Student:
    """A float graph to quantize.

    name: Of the network, for the errors. model: Its own in `edgekit models`, which decides its budget; empty for a
    user's own. stride: Of its input's sides.
    """

    name: str
    model: str
    fp32: Path
    stride: int


@dataclass(frozen=True, kw_only=True)
class Reached:
    """What an INT8 graph loses on the held-out pictures.

    before: All in INT8, before anything was trained or rolled back.
    kept: The graph within its budget.
    trained: Whether it was trained with its rounding.
    """

    before: Loss
    kept: Kept
    trained: bool


def quantized(opened: Run, recipe: Recipe, student: Student, engine: Engine) -> Path:
    """Return the INT8 graph for an engine; makes the stage `quantize/<placement>` of an open run.

    Raises:
        InputError: The graph is quantized already or has NaN weights, or the calibration pictures are too few, constant
            or not finite.
        LimitError: The budget cannot be kept.
        UnsupportedError: Dynamic INT8 for an engine that has none, or an engine without INT8.
    """
    settings = recipe.quantization
    refuse(engine, settings)
    where = placement.PLACEMENTS[PLACEMENTS[engine]]
    checkpoints = opened.root / f"qat-{PLACEMENTS[engine]}"

    def work(out: Path) -> Mapping[str, object]:
        if settings.mode == "dynamic":
            quantize.quantize_dynamic(student.fp32, out / FILE)
            return {}
        listed = opened.stages().get("pictures")
        if listed and any(listed.inputs.get(role) != digest for role, digest in shown.digests().items()):
            # The run's folders hold other pictures than when its student was trained.
            pictures.refuse_leaks(shown)
        try:
            return _static(recipe, shown, student, where, out, checkpoints)
        except LimitError:
            # Its trainings are over, and the same settings come to the same end.
            shutil.rmtree(checkpoints, ignore_errors=True)
            raise

    shown = pictures.load(recipe.data, learns=trains(settings))
    inputs = {"simplified": sha256(student.fp32), "held_out": sets.digest(shown.held_out)}
    if shown.train:
        inputs["train"] = sets.digest(shown.train)
    stage = opened.stage(
        f"quantize/{PLACEMENTS[engine]}",
        number=6,
        inputs=inputs,
        settings=asdict(settings)
        | {
            "stride": student.stride,
            "noise": asdict(recipe.noise),
            "int8_drop_db": int8_drop_db(recipe.budgets, student.model),
            "int8_worst_db": int8_worst_db(recipe.budgets, student.model),
            "threads": torch.get_num_threads() if settings.qat.steps or settings.change_basis else 0,
            "saturates": settings.reduce_range != "always" and quantize.narrowed(where),
        },
        code=(
            "compress",
            "data",
            "graph",
            "measure/quality",
            "pipeline/pictures",
            "pipeline/int8",
            "training",
            "recipe",
        ),
        packages=("onnxruntime", "onnx", "numpy", "torch"),
        work=work,
    )
    # Of any training for this engine that was begun here; till the stage is recorded, a kill costs none of them.
    shutil.rmtree(checkpoints, ignore_errors=True)
    return opened.file(stage, FILE)


def refuse(engine: Engine, settings: Quantization) -> None:
    """Raise UnsupportedError for an engine that has no INT8, none of this mode, or no layers in float."""
    if engine not in PLACEMENTS:
        raise UnsupportedError(f"edgekit has no INT8 for the engine '{engine}'", remedy="set the target's precision")
    if settings.mode == "dynamic" and engine != "onnxruntime":
        raise UnsupportedError(
            f"dynamic INT8 is ONNX Runtime's alone, not the engine's '{engine}'",
            remedy="set quantization.mode=static",
        )
    if settings.keep_float and settings.mode == "dynamic":
        raise UnsupportedError(
            f"quantization.keep_float is [{', '.join(settings.keep_float)}], and dynamic INT8 has no float layers",
            remedy="leave it out, or set quantization.mode=static",
        )
    if settings.keep_float and not placement.PLACEMENTS[PLACEMENTS[engine]].floats:
        raise UnsupportedError(
            f"quantization.keep_float is [{', '.join(settings.keep_float)}], and edgekit's own kernels have no float "
            "layers",
            remedy="leave it out, or set the target's precision to float32",
        )


def trains(settings: Quantization) -> bool:
    """Return whether graphs are trained with their rounding where they lose too much."""
    return settings.mode == "static" and settings.qat.steps > 0


def levels(noise: Noise) -> tuple[float, ...]:
    """Return the noise levels that a loss is measured at, on the scale of 0 to 255."""
    return tuple(sorted(set(noise.levels(_SIGMAS))))


def judge_of(recipe: Recipe, fp32: Path, stride: int, *, exact: bool) -> Judge:
    """Return what measures the loss of INT8 graphs: up to 16 held-out pictures at the noise levels of `levels`.

    Of large pictures it is the middle: every map of a graph, and more, is held in memory for a picture.
    """
    found = sets.middles(pictures.held_out(recipe.data))
    chosen = found.pictures[:: -(-len(found) // _MOST_PICTURES)]
    return Judge(checks.load_onnx(fp32), [p.pixels for p in chosen], levels(recipe.noise), stride, exact=exact)


def calibration(recipe: Recipe, stride: int) -> Calibration:
    """Return the noisy pictures that ranges are taken from, their noise levels spread over the recipe's."""
    return pictures.noisy_samples(
        sets.middles(pictures.held_out(recipe.data)),
        recipe.noise,
        count=recipe.quantization.calibration_pictures,
        stride=stride,
    )


def _static(
    recipe: Recipe, shown: Pictures, student: Student, where: Placement, out: Path, checkpoints: Path
) -> Mapping[str, object]:
    prepared = quantize.prepare(student.fp32, calibration(recipe, student.stride), recipe.quantization, where)
    if not where.floats:
        _check_kernels(quantize.placed(prepared, where, recipe.quantization), student, out)
    reached = within_budget(prepared, recipe, shown, student, where, out, checkpoints=checkpoints)
    report = quantize.written(reached.kept.model, prepared, student.fp32, out / FILE)
    return {
        "loss_before_mdb": reached.before.mean_mdb,
        "loss_mdb": reached.kept.loss.mean_mdb,
        "worst_loss_mdb": reached.kept.loss.worst_mdb,
        "trained": reached.trained,
        "released": reached.kept.released,
        "integer_nodes": report.integer_nodes,
        "float_nodes": report.float_nodes,
        "integer_macs_permille": report.integer_macs_permille,
        "agreement_millidb": report.agreement_millidb,
        "weight_bits": prepared.weight_limit.bit_length() + 1,
    }


def check_kernels(student: Student, channels: int, settings: Quantization, folder: Path) -> None:
    """Refuse a float graph that our own integer kernels do not take, whatever its weights; writes into `folder`.

    Raises:
        UnsupportedError: Something in it has no integer kernel; the message names it.
    """
    side, where = _CHECKED_BLOCKS * student.stride, placement.PLACEMENTS[PLACEMENTS["tvm"]]
    noise = [(probe(side, side, channels, seed=i), 25 / 255) for i in range(settings.calibration_pictures)]
    prepared = quantize.prepare(student.fp32, noise, replace(settings, change_basis=False), where)
    _check_kernels(quantize.placed(prepared, where, settings), student, folder)


def _check_kernels(graph: onnx.ModelProto, student: Student, out: Path) -> None:
    """Refuse what has no integer kernel where an engine has nothing else, before anything is trained."""
    export.write(graph, file := out / f"{student.name}.int8.onnx")
    channels, side = checks.interface(graph, file).channels, _CHECKED_BLOCKS * student.stride
    importlib.import_module(backends.DOORS["tvm"]).check_int8(file, channels=channels, side=side)
    file.unlink()


def within_budget(
    prepared: Prepared,
    recipe: Recipe,
    shown: Pictures,
    student: Student,
    where: Placement,
    out: Path,
    *,
    checkpoints: Path,
) -> Reached:
    """Return the INT8 graph that keeps the recipe's budget: placed, trained if need be, layers rolled back if need be.

    Args:
        prepared: The student's graph, ranges and calibration pictures.
        recipe: Its data, noise, budgets and settings.
        shown: The recipe's pictures.
        student: What was prepared.
        where: The engine's placement.
        out: Folder that gets the graphs on the way.
        checkpoints: Folder of what an interrupted training goes on from; it may go when the graph is kept.

    Raises:
        LimitError: The budget cannot be kept.
    """
    export.write(prepared.model, out / EQUALIZED)
    judge = judge_of(recipe, student.fp32, student.stride, exact=prepared.exact)
    limit = Budget(
        mean_db=int8_drop_db(recipe.budgets, student.model),
        worst_db=int8_worst_db(recipe.budgets, student.model),
    )
    graph = quantize.placed(prepared, where, recipe.quantization)
    before = judge.loss(graph)
    untrained = limit.part(_UNTRAINED[where.trunk])
    trained = bool(recipe.quantization.qat.steps) and not untrained.holds(before)
    if trained:
        log.info("%s before any training: training it with its rounding", untrained.missed(before))
        try:
            begun = ends_in_float(graph, prepared, where)
            settings = _fitting(recipe.quantization.qat, shown.train, student.stride)
            graph = _trained(begun, recipe, settings, shown, judge, limit, out, checkpoints)
        except UnsupportedError as error:
            log.warning("it is not trained, and layers go back to float where it loses too much: %s", error)
            trained = False
    kept = budget.keep(graph, prepared.model, where, judge, limit, trained=trained, say=log.info)
    return Reached(before=before, kept=kept, trained=trained)


def ends_in_float(graph: onnx.ModelProto, prepared: Prepared, where: Placement) -> onnx.ModelProto:
    """Return the graph with its ends in float where the engine would round what they give, as far as they are small.

    The error of the last convolution, and of the addition before it, would reach the picture whole; what the first one
    gives would be rounded before the noise level is added to it and again after that. No training brings that back, and
    in float it costs next to no time (docs/int8-inside.md).
    """
    if not where.results:
        return graph
    model = prepared.model
    tail = quantize.kept_float(model, frozenset({"tail"}))
    for part in ((*tail, *_added_for(model, tail)), quantize.kept_float(model, frozenset({"head"}))):
        released = placement.release(graph, part, where, model)
        if budget.integer_macs_permille(released) >= budget.MOSTLY_INTEGER_PERMILLE:
            graph = released
    return graph


def _added_for(model: onnx.ModelProto, convolutions: Collection[str]) -> tuple[str, ...]:
    """Return the names of the additions that only these convolutions read."""
    readers = walk.consumers(model)
    return tuple(
        node.name
        for node in model.graph.node
        if node.op_type == "Add" and {r.name for r in readers.get(node.output[0], [])}.issubset(convolutions)
    )


def _trained(
    graph: onnx.ModelProto,
    recipe: Recipe,
    told: Qat,
    shown: Pictures,
    judge: Judge,
    limit: Budget,
    out: Path,
    checkpoints: Path,
) -> onnx.ModelProto:
    """Return the graph after training with its rounding, and after one more at lower rates where that is not enough.

    An interrupted training goes on from its checkpoint, and so does the one before it, to the same graph.

    Raises:
        UnsupportedError: An operator that training does not follow.
    """
    untrained, trained = out / "untrained.int8.onnx", out / "trained.int8.onnx"
    slower = replace(told, rate=told.rate / _SLOWER, scale_rate=told.scale_rate / _SLOWER)
    learned_from = _pixels(shown.train)
    for settings in (told, slower):
        if settings is slower:
            log.info("INT8 still loses too much: training it once more, at a tenth of the rates")
        export.write(graph, untrained)
        # By all that decides it: the checkpoint of another training, as by another edgekit, is in no one's way.
        known_by = qat.identity(untrained, out / EQUALIZED, learned_from, recipe.noise.train, settings)
        folder = checkpoints / known_by[:12]
        folder.mkdir(parents=True, exist_ok=True)
        report = qat.finetune(
            qdq=untrained,
            fp32=out / EQUALIZED,
            pictures=learned_from,
            judge=judge,
            limit=limit,
            sigma=recipe.noise.train,
            settings=settings,
            out=trained,
            folder=folder,
            report=_log_every(100),
        )
        graph = checks.load_onnx(trained)
        if limit.holds(report.after if report.kept == "trained" else report.before):
            break
    return graph


def _fitting(told: Qat, train: PictureSet, stride: int) -> Qat:
    """Return the settings with patches that the smallest picture holds; it was found good enough to learn from."""
    smallest, step = min(min(picture.pixels.shape[1:]) for picture in train), max(qat.STRIDE, stride)
    fits = smallest // step * step
    if not 0 < fits < told.patch:
        return told
    log.info(
        "it learns from patches of %d pixels, not %d: a training picture has a side of %d", fits, told.patch, smallest
    )
    return replace(told, patch=fits)


def _pixels(found: PictureSet) -> list[budget.Picture]:
    return [p.pixels for p in found]


def _log_every(steps: int) -> Callable[[Moment], None]:
    def report(moment: Moment) -> None:
        if moment.step % steps == 0 or moment.step == moment.steps:
            log.info("step %d of %d, loss %.3g", moment.step, moment.steps, moment.loss)

    return report
