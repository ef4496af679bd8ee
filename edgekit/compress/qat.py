"""Quantization-aware training: a graph with QDQ pairs learns to be the float graph that it was made from."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgekit import run
from edgekit.compress.budget import Budget, Judge, Loss
from edgekit.compress.export import write
from edgekit.compress.torch_graph import TorchGraph, WeightQuantizer, lowest
from edgekit.errors import InputError, IntegrityError
from edgekit.files import atomic_file, json_sha256, sha256
from edgekit.graph import cost
from edgekit.graph.checks import DENOISED, interface, is_quantized, load_onnx
from edgekit.recipe import Qat, Training
from edgekit.training import checkpoint, schedule
from edgekit.training.loop import Moment
from edgekit.training.losses import feature_distance
from edgekit.training.patches import PatchBank

Array: TypeAlias = NDArray[np.float32]
Pictures: TypeAlias = Sequence[NDArray[np.uint8]]
Range: TypeAlias = tuple[float, float]

# A multiple of the strides of all our networks; that of others may be larger.
STRIDE = 16
_LOOK_EVERY = 10
_FITTED = 16
_WARMUP_PART = 20
_FINAL_RATE = 0.01
# Below this the error of a denoiser hardly falls with the noise.
_LEAST_SIGMA = 5 / 255
_NOISE_EXPONENT = 1.5
_CHECKED = 2
_MOST_APART_DB = 0.1


@dataclass(frozen=True, kw_only=True)
class QatReport:
    """What was done.

    onnx: The QDQ graph that was written. kept: Whether it is the `trained` one or the one of the `start`.
    steps: Optimizer steps. before, after: What the starting and the trained graph lose, both in ONNX Runtime.
    """

    onnx: Path
    kept: Literal["trained", "start"]
    steps: int
    before: Loss
    after: Loss


def finetune(
    *,
    qdq: Path,
    fp32: Path,
    pictures: Pictures,
    judge: Judge,
    limit: Budget,
    sigma: tuple[float, float],
    settings: Qat,
    out: Path,
    folder: Path,
    report: Callable[[Moment], None],
) -> QatReport:
    """Return the report on `out`, now the graph with QDQ pairs after training; goes on from a checkpoint in `folder`.

    First each range of activations is narrowed to where it rounds best, since the largest value makes it too wide. Then
    weights, biases, scales and zero points are learned with the rounding in place (Jacob et al., 2018; step sizes as in
    Esser et al., "Learned Step Size Quantization", 2020); the float graph is the teacher. `out` has the nodes, names
    and types of `qdq` and other numbers; biases are stored in the scale of their convolution's sums. Where the trained
    graph is no better than the one of the start, `out` is the bytes of `qdq`.

    Equal inputs give equal bytes on the same versions, processor and number of threads, however often the training was
    interrupted.

    Args:
        qdq: The graph to train, as `quantize_static` writes it; layers that it leaves in float are trained in float.
        fp32: The float graph that it was made from. It stays as it is, and is the teacher.
        pictures: To learn from, uint8 (c, h, w).
        judge: Measures what is lost, on pictures that nothing is learned from.
        limit: Which of two losses is the better one: the one that misses it by less, then the smaller mean.
        sigma: Range of the noise to learn from, on the scale of 0 to 255.
        settings: The recipe's.
        out: Where the file goes.
        folder: Where the checkpoint is kept.
        report: Called every ten steps; `psnr_db` is not a number, as the loss is measured at the end only.

    Raises:
        InputError: A graph is no denoiser, the two have different inputs, one is quantized and should not be (or the
            reverse), a patch does not suit the pictures, there are no steps, the checkpoint is of another training, or
            the loss is not finite; the last checkpoint is from before that.
        UnsupportedError: An operator that is not followed; names it and its node.
        IntegrityError: A damaged checkpoint, or ONNX Runtime computes something else than was trained.
    """
    integer, floating = _read(qdq, fp32)
    bank = PatchBank(pictures, torch.device("cpu"))
    stride = max(STRIDE, cost.stride(floating, fp32))
    _check(settings, stride, bank.smallest_side)
    student, teacher = TorchGraph(integer), TorchGraph(floating).requires_grad_(False)
    take_float_weights(student, teacher)
    _fit_ranges(student, bank, sigma, settings)
    known_by = identity(qdq, fp32, pictures, sigma, settings)
    lesson = _Lesson(teacher, settings, lowest(floating, set(student.made()) & set(teacher.made())))
    average = _train(student, lesson, bank, sigma, settings, folder / "checkpoint.safetensors", known_by, report)
    student.load_state_dict(average, strict=False)
    written = student.written()
    _check_same(student, written, judge, out)
    before, after = judge.loss(integer), judge.loss(written)
    better = limit.rank(after) < limit.rank(before)
    if better:
        write(written, out)
    else:
        with atomic_file(out) as temporary:
            temporary.write_bytes(qdq.read_bytes())
    return QatReport(onnx=out, kept="trained" if better else "start", steps=settings.steps, before=before, after=after)


def identity(qdq: Path, fp32: Path, pictures: Pictures, sigma: tuple[float, float], settings: Qat) -> str:
    """Return the hash of all that decides what `finetune`, whose arguments these are, comes to."""
    return json_sha256(
        [
            sha256(qdq),
            sha256(fp32),
            [hashlib.sha256(p.tobytes()).hexdigest() for p in pictures],
            list(sigma),
            asdict(settings),
            run.code_sha256(("compress", "graph", "training", "recipe", "data")),
            torch.__version__,
            torch.get_num_threads(),
        ]
    )


@torch.no_grad()
def take_float_weights(student: TorchGraph, teacher: TorchGraph) -> None:
    """Start from the float weights where they round to the stored integers; else from what the integers stand for.

    They do not where the quantizer changed the weights, to equalize layers for instance. Biases are always the stored
    ones, since the quantizer may have corrected them.
    """
    originals = teacher.weights()
    for name, part in student.weights().items():
        original = originals.get(name)
        if not isinstance(part, WeightQuantizer) or original is None or original.values.shape != part.values.shape:
            continue
        stored, integers = part.values.clone(), part.integers()
        part.values.copy_(original.values)
        if (part.integers() - integers).abs().max() > 1:
            part.values.copy_(stored)


def _fit_ranges(student: TorchGraph, bank: PatchBank, sigma: Range, settings: Qat) -> None:
    _, noisy, level = bank.draw(
        batch=_FITTED, patch=settings.patch, sigma=sigma, seed=settings.seed * 1_000_003 + settings.steps
    )
    student.fit_ranges(noisy, level, _weight(level))


def _weight(sigma: Tensor) -> Tensor:
    """Return how much squared errors count.

    That of a denoiser grows about as sigma does, so that an exponent of 1 would make this about dB. INT8's own error
    hardly grows at all and takes most from the least noisy pictures: more than 1 wins there what others can spare
    (docs/qat.md).
    """
    return (sigma + _LEAST_SIGMA) ** -_NOISE_EXPONENT


class _Lesson:
    """The loss of a batch: against the float graph's pictures, the clean ones, and the float graph's features."""

    def __init__(self, teacher: TorchGraph, settings: Qat, feature: str | None) -> None:
        self._teacher, self._settings = teacher, settings
        self._wanted = (DENOISED, *([feature] if feature is not None and settings.feature_weight else []))

    def loss(self, student: TorchGraph, clean: Tensor, noisy: Tensor, sigma: Tensor) -> Tensor:
        """Return the loss, a scalar, for (n, c, h, w) pictures with noise of the levels (n, 1, 1, 1)."""
        got = student.tensors(noisy, sigma, self._wanted)
        with torch.no_grad():
            want = self._teacher.tensors(noisy, sigma, self._wanted)
        weight = _weight(sigma)
        share = self._settings.teacher_share
        total = share * ((got[DENOISED] - want[DENOISED]).square() * weight).mean()
        if share < 1:
            total = total + (1 - share) * ((got[DENOISED] - clean).square() * weight).mean()
        for name in self._wanted[1:]:
            total = total + self._settings.feature_weight * feature_distance(got[name], want[name])
        return total


def _train(
    student: TorchGraph,
    lesson: _Lesson,
    bank: PatchBank,
    sigma: tuple[float, float],
    settings: Qat,
    path: Path,
    identity: str,
    report: Callable[[Moment], None],
) -> dict[str, Tensor]:
    """Return the moving average of the parameters by name; the checkpoint at `path` is gone on from, and written."""
    optimizer = torch.optim.Adam([{"params": student.values()}, {"params": student.scales()}], lr=settings.rate)
    average = {name: p.detach().clone() for name, p in student.named_parameters()}
    position = checkpoint.Position(job=identity, step=0, seconds=0.0)
    if path.exists():
        position = checkpoint.restore(path, identity, student, average, optimizer)
    started = saved = time.monotonic()
    losses: list[float] = []
    for step in range(position.step, settings.steps):
        _set_rates(optimizer, settings, step)
        clean, noisy, level = bank.draw(
            batch=settings.batch, patch=settings.patch, sigma=sigma, seed=settings.seed * 1_000_003 + step
        )
        loss = lesson.loss(student, clean, noisy, level)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        decay = min(settings.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            for mean, parameter in zip(average.values(), student.parameters(), strict=True):
                mean.lerp_(parameter, 1 - decay)
        losses.append(loss.item())
        if (step + 1) % _LOOK_EVERY and step + 1 < settings.steps:
            continue
        now = time.monotonic()
        _check_finite(student, losses, step + 1, path)
        seconds = position.seconds + now - started
        report(_moment(settings, step + 1, sum(losses) / len(losses), seconds))
        losses.clear()
        if now - saved >= settings.checkpoint_seconds:
            at = checkpoint.Position(job=identity, step=step + 1, seconds=seconds)
            checkpoint.save(path, at, student, average, optimizer)
            saved = time.monotonic()
    return average


def _set_rates(optimizer: torch.optim.Optimizer, settings: Qat, step: int) -> None:
    """Set the rates of a step: a short warm-up, then a cosine."""
    shape = Training(
        steps=settings.steps, peak_rate=1.0, final_rate=_FINAL_RATE, warmup_steps=settings.steps // _WARMUP_PART
    )
    height = schedule.learning_rate(shape, step, schedule.progress(shape, step, 0.0))
    for group, rate in zip(optimizer.param_groups, (settings.rate, settings.scale_rate), strict=True):
        group["lr"] = rate * height


def _moment(settings: Qat, step: int, loss: float, seconds: float) -> Moment:
    done = step / settings.steps
    return Moment(
        step=step,
        steps=settings.steps,
        loss=loss,
        psnr_db=math.nan,
        images_per_second=step * settings.batch / max(seconds, 1e-9),
        seconds_left=seconds / done * (1 - done),
        done=done,
    )


def _read(qdq: Path, fp32: Path) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    integer, floating = load_onnx(qdq), load_onnx(fp32)
    if not is_quantized(integer):
        raise InputError(f"{qdq}: has no quantized operator", remedy="quantize it first")
    if is_quantized(floating):
        raise InputError(f"{fp32}: is quantized", remedy=f"give the float graph that {qdq} was made from")
    ours, theirs = interface(integer, qdq), interface(floating, fp32)
    if (ours.channels, ours.takes_sigma) != (theirs.channels, theirs.takes_sigma):
        raise InputError(
            f"{qdq}: takes other inputs than {fp32}", remedy="give the float graph that the quantized one was made from"
        )
    return integer, floating


def _check(settings: Qat, stride: int, smallest_side: int) -> None:
    if not settings.steps:
        raise InputError("quantization.qat.steps is 0", remedy="set it to 1000 or more")
    if settings.patch % stride:
        raise InputError(f"quantization.qat.patch is {settings.patch}, no multiple of {stride}")
    if settings.patch > smallest_side:
        raise InputError(
            f"quantization.qat.patch is {settings.patch}, and the smallest training picture has a side of "
            f"{smallest_side}",
            remedy="set it lower, or remove the picture",
        )


def _check_finite(student: TorchGraph, losses: Sequence[float], step: int, path: Path) -> None:
    if math.isfinite(sum(losses)) and all(torch.isfinite(p).all() for p in student.parameters()):
        return
    kept = f"the last good state is kept in {path}" if path.exists() else "no state was saved yet"
    raise InputError(
        f"the loss or a weight is not finite at step {step} of quantization-aware training; {kept}",
        remedy="lower quantization.qat.rate",
    )


def _check_same(student: TorchGraph, written: onnx.ModelProto, judge: Judge, out: Path) -> None:
    """Raise IntegrityError where ONNX Runtime computes other pictures than those that were trained."""

    def denoise(noisy: Array, level: float) -> Array:
        with torch.no_grad():
            found: Array = student(torch.from_numpy(noisy), torch.full((1, 1, 1, 1), level)).numpy()
        return found

    # Roundings that fall the other way move a picture by less than this; a saturated sum moves it by more.
    apart = judge.apart_db(written, denoise, _CHECKED)
    if not apart <= _MOST_APART_DB:
        raise IntegrityError(
            f"{out}: in ONNX Runtime the trained graph is {apart:.2f} dB away from what was trained",
            remedy="set quantization.qat.steps=0, and report the processor and ONNX Runtime's version",
        )
