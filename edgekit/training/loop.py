"""The one training loop, for teachers and students.

It needs torch, accelerate, safetensors and numpy only, so that it runs on a borrowed GPU machine; several GPUs or
machines work through `accelerate launch` or `torchrun` without a change.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, broadcast_object_list, gather_object
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils import convert_conv2d_weight_memory_format

from edgekit.errors import EdgekitError, InputError, is_out_of_memory
from edgekit.models import weights
from edgekit.models.denoiser import Denoiser
from edgekit.recipe import Distillation, Training
from edgekit.training import checkpoint, losses, rounding, schedule
from edgekit.training.distill import Learner, Lesson
from edgekit.training.optimizer import Muon
from edgekit.training.patches import SEEDS, PatchBank
from edgekit.training.rounding import Rounding

log = logging.getLogger(__name__)
_LOOK_EVERY = 10
_FELL_DB = 0.1
_LOSSES = {"charbonnier": losses.charbonnier, "mse": losses.mean_squared, "psnr": losses.log_squared}


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training run.

    net: The network to train, with its starting weights. teacher: Learned from if given; never changed.
    pictures: Training pictures, uint8 (c, h, w). sigma: Range of the noise, on the scale of 0 to 255.
    validate: Returns the held-out PSNR in dB of a network. identity: Hash of everything that decides the result.
    names: Of the pictures in their order, for messages; may be left out.
    """

    net: Denoiser
    teacher: Denoiser | None
    pictures: Sequence[NDArray[np.uint8]]
    sigma: tuple[float, float]
    training: Training
    distillation: Distillation
    validate: Callable[[Denoiser], float]
    identity: str
    names: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Moment:
    """What a progress display shows. psnr_db is the last held-out PSNR of the averaged weights, nan before that."""

    step: int
    steps: int
    loss: float
    psnr_db: float
    images_per_second: float
    seconds_left: float
    done: float


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended.

    start_psnr_db, psnr_db: Held-out PSNR of the starting and of the trained weights. kept: Which of them were kept.
    ended_by: `steps`, `time`, or `pause` where the run is not over and goes on from its checkpoint.
    """

    steps: int
    seconds: float
    images: int
    start_psnr_db: float
    psnr_db: float
    kept: str
    ended_by: str


def train(
    job: Job, folder: Path, report: Callable[[Moment], None], *, pause_after_seconds: float = math.inf
) -> tuple[dict[str, Tensor], Outcome]:
    """Return the weights that the run keeps, and how it ended; goes on from a checkpoint in `folder`.

    The same job gives the same weights, bit for bit, on a CPU with the same number of threads and the same versions,
    however often it was interrupted, as long as steps and not time end it.

    Args:
        job: What to train.
        folder: Of the checkpoint. With several processes the main one's counts, for all of them.
        report: Told where training stands.
        pause_after_seconds: Of this sitting; the state is saved then and the average of that moment returned. With
            several processes the main one's counts.

    Raises:
        InputError: The loss or a gradient is not finite (the last checkpoint is from before that), memory ran out, the
            folder holds the checkpoint of another job, another process has one and the main one has not, or has another
            job, the settings never end, or a patch does not fit.
        IntegrityError: The checkpoint is damaged.
    """
    # Accelerate keeps its mixed precision for the whole process; the next run in it may want another.
    accelerator = Accelerator(
        mixed_precision="no", gradient_accumulation_steps=job.training.accumulate, cpu=not torch.cuda.is_available()
    )
    path = folder / "checkpoint.safetensors"
    settings, device = job.training, accelerator.device
    pixels = sum(picture.size for picture in job.pictures)
    with _memory_explained(device, f"{pixels / 1e6:.1f} MB of training pictures", lambda: "take fewer or smaller ones"):
        bank = PatchBank(job.pictures, device)
    patches = f"training.batch={settings.batch} patches of {max(settings.patch, settings.late_patch or 0)} pixels"
    with _memory_explained(device, patches, lambda: _with_less_memory(settings, path)):
        return _train(job, bank, path, report, accelerator, pause_after_seconds)


def _train(
    job: Job,
    bank: PatchBank,
    path: Path,
    report: Callable[[Moment], None],
    accelerator: Accelerator,
    pause_after_seconds: float,
) -> tuple[dict[str, Tensor], Outcome]:
    settings = job.training
    check(settings, [net for net in (job.net, job.teacher) if net is not None], job.pictures, job.names)
    _refuse_other_jobs(job.identity, accelerator)
    learner, optimizer = _learner(job, accelerator.device)
    start = {name: t.detach().clone() for name, t in job.net.state_dict().items()}
    ema = {name: t.clone() for name, t in start.items()}
    images_per_step: int = settings.batch * settings.accumulate * accelerator.num_processes
    position = _resumed(job, path, accelerator, learner, ema, optimizer, images_per_step)
    wrapped, prepared = accelerator.prepare(learner, optimizer)
    run = _Run(job, accelerator, wrapped, prepared, bank, ema)
    clock = _Clock(position.seconds, accelerator)
    # Each process came here at a moment of its own, and none may stop while the others wait for it.
    (pause_after_seconds,) = broadcast_object_list([pause_after_seconds])
    step, seconds, saved_at = position.step, position.seconds, position.seconds
    psnr_db = math.nan
    best = (-math.inf if position.best_psnr_db is None else position.best_psnr_db, position.best_step)

    def images() -> int:
        return position.images + (step - position.step) * images_per_step

    def save() -> None:
        if accelerator.is_main_process:
            now = checkpoint.Position(
                job=job.identity,
                step=step,
                seconds=seconds,
                images=images(),
                best_psnr_db=best[0] if math.isfinite(best[0]) else None,
                best_step=best[1],
            )
            checkpoint.save(path, now, learner, ema, optimizer)

    paused = False
    while not (over := schedule.is_over(settings, step, seconds)) and not paused:
        run.step(step, seconds)
        step += 1
        if step % _LOOK_EVERY == 0 or (settings.steps and step >= settings.steps):
            seconds = clock.seconds()
            loss = run.mean_loss()
            if not math.isfinite(loss):
                kept = f"the last good state is kept in {path}" if path.exists() else "no state was saved yet"
                raise InputError(
                    f"the loss or its gradient is not finite at step {step}; {kept}",
                    remedy=f"lower training.peak_rate, or set training.precision to float32{_going_on(path)}",
                )
            if step % settings.validate_every < _LOOK_EVERY:
                psnr_db = _validate(job, ema)
                best = max(best, (psnr_db, step))
            report(_moment(job, step, seconds, loss, psnr_db, images()))
            paused = seconds - position.seconds >= pause_after_seconds
            if seconds - saved_at >= settings.checkpoint_seconds:
                save()
                saved_at = seconds
    if paused and not over:
        save()
    start_psnr_db, psnr_db = _validate(job, start), _validate(job, ema)
    better = psnr_db > start_psnr_db or not settings.keep_better
    if over and better:
        _warn_of_fall(psnr_db, *max(best, (start_psnr_db, 0)))
    outcome = Outcome(
        steps=step,
        seconds=seconds,
        images=images(),
        start_psnr_db=start_psnr_db,
        psnr_db=psnr_db,
        kept="trained" if better else "start",
        ended_by="pause" if not over else "steps" if settings.steps and step >= settings.steps else "time",
    )
    return (ema if better else start), outcome


def _refuse_other_jobs(identity: str, accelerator: Accelerator) -> None:
    """Raise InputError, in every process, where not all of them have one job."""
    if accelerator.num_processes == 1:
        return
    jobs = gather_object([identity])
    if others := [rank for rank, other in enumerate(jobs) if other != jobs[0]]:
        raise InputError(
            f"process {others[0]} has another job than the main one (other settings, pictures, weights, code or "
            "versions)",
            remedy="start all of them with the same job, options and pictures",
        )


def _learner(job: Job, device: torch.device) -> tuple[Learner, torch.optim.Optimizer]:
    """Return what is trained, on the device, and its optimizer; the teacher goes there too."""
    settings = job.training
    torch.manual_seed(settings.seed % SEEDS)
    learner = Learner(
        job.net,
        job.teacher,
        with_features=job.distillation.feature_weight > 0,
        rounding_bits=settings.rounding_bits if settings.rounding_from < 1 else None,
    )
    _channels_last(learner.to(device)).train()
    if job.teacher is not None:
        _channels_last(job.teacher.to(device)).eval().requires_grad_(False)
    return learner, _optimizer(learner, settings, device)


def _resumed(
    job: Job,
    path: Path,
    accelerator: Accelerator,
    learner: Learner,
    ema: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    images_per_step: int,
) -> checkpoint.Position:
    """Put the checkpoint, where there is one, into what is trained; return where the run stands."""
    saved = _saved(path, accelerator)
    if saved is None:
        return checkpoint.Position(job=job.identity, step=0, seconds=0.0)
    position = checkpoint.load(saved, job.identity, learner, ema, optimizer)
    log.info("going on at step %d", position.step)
    if position.images != position.step * images_per_step:
        log.warning(
            "its steps took %.0f patches each, these take %d: the number of processes is another",
            position.images / position.step,
            images_per_step,
        )
    return position


def _warn_of_fall(psnr_db: float, best_psnr_db: float, best_step: int) -> None:
    """Say so where the weights that a run ends with are worse on held-out pictures than some that it had before."""
    if psnr_db < best_psnr_db - _FELL_DB:
        log.warning(
            "trained weights: %.2f dB on the held-out pictures, %.2f less than %s; lower training.peak_rate",
            psnr_db,
            best_psnr_db - psnr_db,
            f"at step {best_step}" if best_step else "those it began with",
        )


class _Run:
    """The parts of a run that a step needs."""

    def __init__(
        self,
        job: Job,
        accelerator: Accelerator,
        learner: nn.Module,
        optimizer: torch.optim.Optimizer,
        bank: PatchBank,
        ema: dict[str, Tensor],
    ) -> None:
        self._job, self._accelerator, self._learner, self._optimizer = job, accelerator, learner, optimizer
        self._bank = bank
        self._rounding: Rounding | None = accelerator.unwrap_model(learner).rounding
        self._lesson = Lesson(job.teacher, job.distillation)
        self._losses: list[Tensor] = []
        self._norms: list[Tensor] = []
        # One call for all tensors: launching one kernel each costs a GPU more than the arithmetic.
        values = job.net.state_dict()
        floats = [name for name, value in values.items() if value.is_floating_point()]
        self._averages = [ema[name] for name in floats]
        self._values = [values[name] for name in floats]
        self._counters = [(ema[name], value) for name, value in values.items() if name not in set(floats)]

    def step(self, step: int, seconds: float) -> None:
        """Make one optimizer step and move the average."""
        settings, accelerator = self._job.training, self._accelerator
        done = schedule.progress(settings, step, seconds)
        if self._rounding is not None:
            self._rounding.begin(
                step, rounds=lambda at: schedule.progress(settings, at, seconds) >= settings.rounding_from
            )
        for group in self._optimizer.param_groups:
            group["lr"] = schedule.learning_rate(settings, step, done)
        for part in range(settings.accumulate):
            with accelerator.accumulate(self._learner):
                loss = self._loss(step, part, done)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    self._norms.append(accelerator.clip_grad_norm_(self._learner.parameters(), settings.clip_norm))
                self._optimizer.step()
                self._optimizer.zero_grad()
            self._losses.append(loss.detach())
        decay = min(settings.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(self._averages, self._values, 1 - decay)
            for average, value in self._counters:
                average.copy_(value)

    def mean_loss(self) -> float:
        """Return the mean loss since the last call; not finite where a loss or a gradient was not."""
        mean = (torch.stack(self._losses).mean() + 0 * torch.stack(self._norms).sum()).item()
        self._losses.clear()
        self._norms.clear()
        return mean

    def _loss(self, step: int, part: int, done: float) -> Tensor:
        job, settings = self._job, self._job.training
        draw = (step * settings.accumulate + part) * self._accelerator.num_processes + self._accelerator.process_index
        clean, noisy, sigma = self._bank.draw(
            batch=settings.batch,
            patch=schedule.patch_side(settings, done),
            sigma=job.sigma,
            seed=settings.seed * 1_000_003 + draw,
        )
        noisy = noisy.contiguous(memory_format=torch.channels_last)
        weight = schedule.feature_weight(job.distillation.feature_weight, job.distillation.feature_until, done)
        with torch.autocast(noisy.device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
            learned = self._learner(noisy, sigma)
            return self._lesson.loss(
                learned, clean, noisy, sigma, feature_weight=weight, compare=_LOSSES[schedule.loss(settings, done)]
            )


class _Clock:
    """Seconds spent in this run over all sittings, the main process's in every process.

    The learning rate and the end of a run may follow it, in which no two processes may differ.
    """

    def __init__(self, before: float, accelerator: Accelerator) -> None:
        self._before, self._start, self._accelerator = before, time.monotonic(), accelerator

    def seconds(self) -> float:
        mine = self._before + time.monotonic() - self._start
        if self._accelerator.num_processes == 1:
            return mine
        # Whole milliseconds, since not every device has float64.
        agreed = broadcast(torch.tensor([int(1000 * mine)], device=self._accelerator.device))
        return int(agreed.item()) / 1000


def _saved(path: Path, accelerator: Accelerator) -> checkpoint.Saved | None:
    """Return the main process's checkpoint, in every process, or None where there is none.

    The main process alone writes it, and the folder need not be one that the other machines see.
    """
    if accelerator.num_processes == 1:
        return checkpoint.read(path) if path.exists() else None
    there = gather_object([path.exists()])
    if any(there) and not there[0]:
        raise InputError(
            f"{path}: is there for process {there.index(True)}, not for the main one, which would start over",
            remedy="give each machine the rank that it had, copy it to that of rank 0, or delete it to begin anew",
        )
    found: checkpoint.Saved | EdgekitError | None = None
    if there[0] and accelerator.is_main_process:
        try:
            found = checkpoint.read(path)
        except EdgekitError as error:
            found = error
    (found,) = broadcast_object_list([found])
    if isinstance(found, EdgekitError):
        raise found
    return found


def _optimizer(learner: nn.Module, settings: Training, device: torch.device) -> torch.optim.Optimizer:
    fused = device.type == "cuda"
    decay = settings.weight_decay
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(learner.parameters(), lr=settings.peak_rate, weight_decay=decay, fused=fused)
    precision = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    return Muon(learner.parameters(), lr=settings.peak_rate, weight_decay=decay, fused=fused, precision=precision)


def _channels_last(module: nn.Module) -> nn.Module:
    """Return the module with its weights in the layout that convolutions on a CPU and on tensor cores want."""
    made: nn.Module = convert_conv2d_weight_memory_format(module, torch.channels_last)
    return made


def check(
    settings: Training, nets: Sequence[Denoiser], pictures: Sequence[NDArray[np.uint8]], names: Sequence[str] = ()
) -> None:
    """Raise InputError for settings that would stop a run at its end, or never.

    Args:
        settings: Of the run.
        nets: The network and its teacher.
        pictures: Training pictures (c, h, w), at least one.
        names: Of the pictures; without them the message tells the size alone.
    """
    check_settings(settings, nets)
    sides = [min(picture.shape[1:]) for picture in pictures]
    smallest = min(sides)
    named = f" ('{names[sides.index(smallest)]}')" if names else ""
    for name, side in _patches(settings):
        if side > smallest:
            raise InputError(
                f"training.{name} is {side}, and the smallest training picture{named} has a side of {smallest}",
                remedy="set it lower, or remove the picture",
            )


def check_settings(settings: Training, nets: Sequence[Denoiser]) -> None:
    """Raise InputError for settings that no pictures make right; `nets` as in `check`, whose weights do not count."""
    if not settings.steps and not settings.max_minutes:
        raise InputError("training.steps and training.max_minutes are both 0", remedy="set one of them")
    if settings.rounding_from < 1:
        rounding.places(nets[0])
    stride = max(net.stride for net in nets)
    for name, side in _patches(settings):
        if side % stride:
            raise InputError(f"training.{name} is {side}, no multiple of the networks' stride {stride}")


def _patches(settings: Training) -> list[tuple[str, int]]:
    """Return the sides of patches by their settings' names."""
    named = (("patch", settings.patch), ("late_patch", settings.late_patch))
    return [(name, side) for name, side in named if side is not None]


@contextmanager
def _memory_explained(device: torch.device, what: str, remedy: Callable[[], str]) -> Iterator[None]:
    """Turn an error of memory that ran out into an InputError that says with what, and which settings need less."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not (isinstance(error, torch.OutOfMemoryError) or is_out_of_memory(error)):
            raise
        raise InputError(f"out of memory on {device} with {what}", remedy=remedy()) from error


def _with_less_memory(settings: Training, path: Path) -> str:
    """Return which settings make the same step in less memory, as far as there are any."""
    patches = settings.batch * settings.accumulate
    fewer = next((b for b in range(settings.batch // 2, 0, -1) if patches % b == 0), 0)
    if not fewer:
        return f"set training.patch and training.late_patch lower{_going_on(path)}"
    proposal = f"--set training.batch={fewer} --set training.accumulate={patches // fewer}"
    return f"{proposal} makes the same step in less memory{_going_on(path)}"


def _going_on(path: Path) -> str:
    """Return how to begin with the averages of a checkpoint, if there is one, where settings have to change."""
    return f", in another folder (-o), from here on with --set student.weights={path}" if path.exists() else ""


def _moment(job: Job, step: int, seconds: float, loss: float, psnr_db: float, images: int) -> Moment:
    settings = job.training
    done = schedule.progress(settings, step, seconds)
    left = seconds / max(done, 1e-9) * (1 - done)
    if settings.max_minutes:
        left = min(left, 60 * settings.max_minutes - seconds)
    return Moment(
        step=step,
        steps=settings.steps,
        loss=loss,
        psnr_db=psnr_db,
        images_per_second=images / max(seconds, 1e-9),
        seconds_left=max(0.0, left),
        done=done,
    )


def _validate(job: Job, values: dict[str, Tensor]) -> float:
    """Return the held-out PSNR of a network with these weights; the weights under training are put back."""
    trained = {name: t.clone() for name, t in job.net.state_dict().items()}
    job.net.load_state_dict(values)
    job.net.eval()
    with torch.no_grad():
        psnr_db = job.validate(job.net)
    job.net.train()
    job.net.load_state_dict(trained)
    return psnr_db


def save_weights(values: dict[str, Tensor], path: Path) -> None:
    """Write the weights that a run keeps."""
    weights.save({name: t.float() if t.is_floating_point() else t for name, t in values.items()}, path)
