"""Training from one file of settings: `python -m edgekit.training JOB.json --pictures DIR --out DIR`.

It writes `<model>.safetensors` and `log.jsonl`; the same command started again goes on where it stopped. On several
GPUs: `accelerate launch -m edgekit.training JOB.json ...`.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState

from edgekit import models, run
from edgekit.data import overlap, sets
from edgekit.data.noise import add_gaussian
from edgekit.data.photos import Channels
from edgekit.data.sets import PictureSet, Shares, Split
from edgekit.errors import INTERRUPTED, EdgekitError, InputError
from edgekit.files import atomic_file, json_sha256, sha256, storage_errors
from edgekit.models import weights
from edgekit.models.denoiser import Denoiser
from edgekit.recipe import Model
from edgekit.training import job_file, loop
from edgekit.training.job_file import JobFile
from edgekit.training.patches import SEEDS

log = logging.getLogger("edgekit.training")
_LOOKED = "looked-through.sha256"
_WITHOUT_HELD_OUT = Shares(train=85, calibration=15, evaluation=0)


def main(arguments: list[str] | None = None) -> int:
    """Train what the command line says, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m edgekit.training", description="Train from one file of settings.")
    parser.add_argument("job", type=Path, help="JSON that edgekit.training.job_file.write made")
    parser.add_argument("--pictures", type=Path, nargs="+", required=True, help="folders to learn from")
    parser.add_argument("--held-out", type=Path, help="folder to choose weights on [default: 15 %% of the first]")
    parser.add_argument(
        "--kept-out",
        type=Path,
        nargs="+",
        default=(),
        help="folders for figures; pictures that show theirs are refused",
    )
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder of the result")
    parser.add_argument("--max-minutes", type=float, help="train so long; the learning rate then follows time")
    parser.add_argument("--pause-after", type=float, default=math.inf, help="minutes of this sitting")
    given = parser.parse_args(arguments)
    level = logging.INFO if _is_main_process() else logging.ERROR
    logging.basicConfig(stream=sys.stdout, format="%(message)s", level=logging.WARNING, force=True)
    log.setLevel(level)
    try:
        job = job_file.read(given.job)
        if given.max_minutes is not None:
            job = timed(job, given.max_minutes)
        path, outcome = train(
            job,
            given.pictures,
            given.held_out,
            given.out,
            kept_out=given.kept_out,
            pause_at=time.monotonic() + 60 * given.pause_after,
        )
    except EdgekitError as error:
        log.error("error: %s", error)
        return error.exit_code
    except KeyboardInterrupt:
        log.error("interrupted; start the same command again to go on")
        return INTERRUPTED
    log.info("%s%s", path, " (paused; the same command goes on)" if outcome.ended_by == "pause" else "")
    return 0


def timed(job: JobFile, minutes: float) -> JobFile:
    """Return the job with a limit of time instead of steps.

    Raises:
        InputError: The limit is none that a training reaches.
    """
    if not 0 < minutes < math.inf:
        raise InputError(f"training cannot last {minutes:g} minutes", remedy="give a positive number of minutes")
    return replace(job, training=replace(job.training, steps=0, max_minutes=minutes))


def train(
    job: JobFile,
    folders: Sequence[Path],
    held_out: Path | None,
    out: Path,
    *,
    kept_out: Sequence[Path] = (),
    pause_at: float = math.inf,
    checked: bool = False,
) -> tuple[Path, loop.Outcome]:
    """Train a job; return the file of its weights, float32, and how training ended.

    Args:
        job: The job.
        folders: Pictures to learn from; without `held_out`, 15 % of the first are held out.
        held_out: Pictures whose PSNR is followed, and decides when the job says `keep_better`.
        out: Where the weights, `log.jsonl` and the checkpoint go.
        kept_out: Pictures that figures will be taken on: nothing that is learned or chosen from may show a part of one.
        checked: Whether the pictures were looked through for leaks already; `kept_out` is not looked at then.
        pause_at: Moment of the monotonic clock; the weights are the average of then, and the same call goes on.

    Raises:
        InputError: Something of the job or the pictures is wrong, the loss is not finite, or `out` is in use, full or
            cannot be written. IntegrityError: A damaged file.
    """
    channels: Channels = 1 if job.channels == 1 else 3
    # Without others, what is held out is a part of the first folder.
    first: Split | None = None if held_out else "train"
    learned = [
        sets.folder(folder, channels=channels, split=None if number else first, shares=_WITHOUT_HELD_OUT)
        for number, folder in enumerate(folders)
    ]
    kept_back = (
        sets.folder(held_out, channels=channels)
        if held_out
        else sets.folder(folders[0], channels=channels, split="calibration", shares=_WITHOUT_HELD_OUT)
    )
    for chosen in learned:
        sets.check_disjoint(chosen, kept_back)
    with storage_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        # The main process alone writes there, and the others may see the same folder.
        with run.lock(out) if _is_main_process() else nullcontext():
            if not checked and _is_main_process():
                _look_once(learned, kept_back, [sets.folder(folder, channels=channels) for folder in kept_out], out)
            return _train(job, learned, kept_back, out, pause_at=pause_at)


def _look_once(learned: Sequence[PictureSet], kept_back: PictureSet, kept_out: Sequence[PictureSet], out: Path) -> None:
    """Refuse leaks; a run that goes on with the same pictures, of which `out` keeps a hash, does not look again."""
    digests = [[sets.digest(s) for s in group] for group in (learned, (kept_back,), kept_out)]
    path, found = out / _LOOKED, json_sha256(digests)
    if path.is_file() and path.read_bytes() == found.encode():
        return
    _refuse_leaks(learned, kept_back, kept_out)
    with atomic_file(path) as temporary:
        temporary.write_text(found, encoding="utf-8")


def _refuse_leaks(learned: Sequence[PictureSet], kept_back: PictureSet, kept_out: Sequence[PictureSet]) -> None:
    for chosen in (*learned, kept_back):
        for other in kept_out:
            sets.check_disjoint(chosen, other)  # small pictures that are equal are not found by what they show
    for chosen in learned:
        overlap.refuse_overlaps(chosen, kept_back, *kept_out)
    overlap.refuse_overlaps(kept_back, *kept_out)


def _train(
    job: JobFile, learned: Sequence[PictureSet], kept_back: PictureSet, out: Path, *, pause_at: float
) -> tuple[Path, loop.Outcome]:
    main_process, judged = _is_main_process(), sets.middles(kept_back)
    torch.manual_seed(job.training.seed % SEEDS)

    def report(moment: loop.Moment) -> None:
        if not main_process:
            return
        figures = {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in asdict(moment).items()}
        with (out / "log.jsonl").open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(figures) + "\n")
        log.info(
            "step %d, loss %.5f, %s%.0f images/s, %.0f s left",
            moment.step,
            moment.loss,
            "" if math.isnan(moment.psnr_db) else f"held out {moment.psnr_db:.3f} dB, ",
            moment.images_per_second,
            moment.seconds_left,
        )

    values, outcome = loop.train(
        loop.Job(
            net=_network(job.student),
            # As in a recipe, a teacher with random weights is none.
            teacher=_network(job.teacher).eval() if job.teacher and job.teacher.weights != job_file.RANDOM else None,
            pictures=[p.pixels for s in learned for p in s],
            names=[f"{s.name}/{p.name}" for s in learned for p in s],
            sigma=job.noise.train,
            training=job.training,
            distillation=job.distillation,
            validate=lambda net: psnr_db(net, judged, job.noise.evaluate, seed=job.noise.seed),
            identity=json_sha256(
                [
                    asdict(_by_bytes(job)),
                    [sets.digest(s) for s in (*learned, kept_back)],
                    run.code_sha256(("models", "training", "recipe", "data")),
                ]
            ),
        ),
        out,
        report,
        pause_after_seconds=pause_at - time.monotonic(),
    )
    result = out / f"{job.student.model}.safetensors"
    if main_process:
        loop.save_weights(values, result)
        with (out / "log.jsonl").open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(asdict(outcome)) + "\n")
    return result, outcome


def _by_bytes(job: JobFile) -> JobFile:
    """Return the job with its weights named by their hashes, so that it is the same wherever its folder lies."""

    def named(model: Model) -> Model:
        return model if model.weights == job_file.RANDOM else replace(model, weights=sha256(Path(model.weights)))

    return replace(job, student=named(job.student), teacher=named(job.teacher) if job.teacher else None)


def psnr_db(net: Denoiser, pictures: PictureSet, sigma255: float, *, seed: int = 0) -> float:
    """Return the mean PSNR in dB by docs/protocol.md, without scikit-image; 0 dB where it is not finite."""
    device = next(net.parameters()).device
    found = []
    for index, picture in enumerate(pictures):
        _, height, width = picture.pixels.shape
        noisy = add_gaussian(picture.pixels, sigma255, index=index, seed=seed)
        padded = np.pad(noisy, ((0, 0), (0, -height % net.stride), (0, -width % net.stride)), mode="reflect")
        level = torch.full((1, 1, 1, 1), sigma255 / 255, device=device) if net.takes_sigma else None
        with torch.no_grad():
            denoised = net(torch.from_numpy(padded[None]).to(device), level)[0, :, :height, :width].double().cpu()
        error = float((denoised - torch.from_numpy(picture.pixels / 255)).square().mean())
        found.append(-10 * math.log10(max(error, 1e-10)) if math.isfinite(error) else 0.0)
    return sum(found) / len(found)


def _network(wanted: Model) -> Denoiser:
    net = models.create(wanted.model, wanted.options)
    if wanted.weights != job_file.RANDOM:
        weights.load_into(net, Path(wanted.weights))
    return net


def _is_main_process() -> bool:
    found: bool = PartialState(cpu=not torch.cuda.is_available()).is_main_process
    return found


if __name__ == "__main__":
    sys.exit(main())
