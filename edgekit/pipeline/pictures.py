"""The three sets of pictures that a recipe names, none of which shares a picture with another."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path

from edgekit.data import overlap, sets
from edgekit.data.noise import add_gaussian
from edgekit.data.photos import list_pictures
from edgekit.data.sets import PictureSet, Shares, Split
from edgekit.errors import InputError, IntegrityError
from edgekit.measure.quality import SSIM_WINDOW, Array, pad_to_multiple
from edgekit.recipe import LEAST_CALIBRATION_PICTURES, Data, Noise
from edgekit.run import Run

log = logging.getLogger(__name__)
EMBEDDED = "embedded"
LISTING = "pictures.json"
_LEARNED_FROM = ("train", "held_out")
_CALIBRATION_SIGMAS = (5.0, 15.0, 25.0, 40.0, 50.0, 75.0, 100.0, 150.0, 200.0)


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """train is learned from, empty where nothing is; held_out chooses weights and ranges; evaluation does neither.

    kept_back: All pictures that `evaluation` is the beginning of: a figure may be taken on any of them one day.
    """

    train: PictureSet
    held_out: PictureSet
    evaluation: PictureSet
    kept_back: PictureSet

    def digests(self) -> dict[str, str]:
        """Return the hash of each set, by its role."""
        return {role: sets.digest(pictures) for role, pictures in self.by_role().items()}

    def by_role(self) -> dict[str, PictureSet]:
        """Return the sets that hold pictures by their role; two may have one name, as folders of the same name have."""
        roles = {
            "train": self.train,
            "held_out": self.held_out,
            "evaluation": self.evaluation,
            "kept_back": self.kept_back,
        }
        return {role: pictures for role, pictures in roles.items() if pictures}


def load(data: Data, *, learns: bool = True) -> Pictures:
    """Return the recipe's pictures; `refuse_leaks` looks further than for equal ones.

    Args:
        data: Where they lie.
        learns: Whether anything is learned from them; else the pictures to learn from are not read.

    Raises:
        InputError: A folder is missing or empty, a picture cannot be read, or one picture is in two sets; fewer than 8
            pictures are left to choose weights and ranges on, or one of those is constant; one that a figure is taken
            on is too small for it.
    """
    train = _train(data) if learns else PictureSet(name="nothing", pictures=())
    kept_back = _kept_back(data)
    chosen = Pictures(train=train, held_out=held_out(data), evaluation=_first(kept_back, data), kept_back=kept_back)
    for judged in (chosen.held_out, chosen.evaluation):
        refuse_small(judged)
    sets.check_disjoint(chosen.train, chosen.held_out, kept_back)
    return chosen


def refuse_absent(data: Data, *, chooses: bool = True, learns: bool = True) -> None:
    """Refuse a folder that is not there or holds no picture, before any picture is read.

    Args:
        data: Where the pictures lie.
        chooses: Whether ranges or weights are chosen on any.
        learns: Whether anything is learned from any.

    Raises:
        InputError: There is such a folder.
    """
    chosen_on = (data.calibration or data.train[0],) if chooses else ()
    for source in dict.fromkeys((*(data.train if learns else ()), *chosen_on, data.evaluation)):
        if source != EMBEDDED:
            list_pictures(Path(source))


def refuse_small(judged: PictureSet) -> None:
    """Raise InputError where no figure can be taken on a picture, since SSIM has no window in it."""
    for picture in judged:
        _, height, width = picture.pixels.shape
        if min(height, width) < SSIM_WINDOW:
            raise InputError(
                f"'{picture.name}' of {judged.name} is {height}x{width} pixels; SSIM needs {SSIM_WINDOW} a side",
                remedy="take it out of the folder, or put a larger one in its place",
            )


def refuse_leaks(chosen: Pictures) -> None:
    """Raise InputError where what is learned or chosen from shows what a figure is taken on, if only a part of it."""
    overlap.refuse_overlaps(chosen.train, chosen.kept_back, chosen.held_out)
    overlap.refuse_overlaps(chosen.held_out, chosen.kept_back)


def refuse_seen(opened: Run, data: Data, judged: PictureSet) -> None:
    """Refuse to judge a run's student by pictures that it learned from, or was chosen by.

    Where `judged` is what the run listed when it was trained, that was looked at then. Where it is not, equal pictures
    are looked for in the run's own list, and parts of pictures as far as the folders still hold what was learned from.

    Args:
        opened: The run; one that trained nothing is let be.
        data: Where its pictures lie.
        judged: Whole pictures, before any crop.

    Raises:
        InputError: There is such a picture, and both are named; or the list is of a training that did not end.
        IntegrityError: The run's list is gone.
    """
    stages = opened.stages()
    listed, student = stages.get("pictures"), stages.get("student")
    if listed is None:
        return
    if student is not None and student.inputs.get("pictures") != opened.sha256(listed, LISTING):
        raise InputError(
            f"{opened.root}: its student learned from other pictures than it lists by now, and is not trained anew yet",
            remedy="start the same edgekit distill again",
        )
    if sets.digest(judged) in [digest for role, digest in listed.inputs.items() if role not in _LEARNED_FROM]:
        return
    known = learned_from(opened.file(listed, LISTING))
    for picture in judged:
        if name := known.get(picture.sha256):
            raise InputError(
                f"{opened.root}: its student learned from '{name}', which is '{picture.name}' of {judged.name}",
                remedy="take it out of data.evaluation; a figure is taken on pictures that the student has not seen",
            )
    refuse_shown(data, _kept_back(data))
    refuse_small(judged)


def refuse_shown(data: Data, judged: PictureSet) -> None:
    """Raise InputError where what is learned or chosen from shows one of these pictures, if only a part of it.

    A folder that is gone, or holds nothing to learn from any more, is left out.
    """
    for read in (_train, held_out):
        try:
            shown = read(data)
        except InputError as error:
            log.info("parts of %s are not looked for there: %s", judged.name, error)
            continue
        overlap.refuse_overlaps(shown, judged)


def learned_from(path: Path) -> dict[str, str]:
    """Return sha256 -> name of what a run's student learned from or was chosen by.

    Args:
        path: The list of its pictures.

    Raises:
        IntegrityError: It is gone. InputError: It is of another version of edgekit.
    """
    if not path.is_file():
        raise IntegrityError(
            f"{path}: is missing, and says which pictures the student learned from",
            remedy="restore it, or start the run again in another folder",
        )
    listing = json.loads(path.read_text(encoding="utf-8"))
    if not set(_LEARNED_FROM) <= set(listing):
        raise InputError(
            f"{path}: was written by another version of edgekit",
            remedy="start the run again in another folder; or evaluate on the pictures of then",
        )
    return {picture["sha256"]: picture["name"] for role in _LEARNED_FROM for picture in listing[role]}


def held_out(data: Data) -> PictureSet:
    """Return the pictures that weights and ranges are chosen on; raises as `load`."""
    if data.calibration is None:
        found = _part(data, data.train[0], "calibration")
    elif data.calibration == EMBEDDED:
        found = sets.embedded("calibration", channels=data.channels)
    else:
        found = sets.folder(Path(data.calibration), channels=data.channels)
    if len(found) < LEAST_CALIBRATION_PICTURES:
        raise InputError(
            f"{found.name}: {len(found)} pictures to choose ranges and weights on; "
            f"at least {LEAST_CALIBRATION_PICTURES} are needed",
            remedy=f"name a folder of more with data.calibration, or data.calibration={EMBEDDED}",
        )
    if flat := [p.name for p in found if p.pixels.min() == p.pixels.max()]:
        raise InputError(
            f"{found.name}: '{flat[0]}' has one value everywhere ({len(flat)} such of {len(found)})",
            remedy="take such pictures out; ranges and weights are chosen on photographs",
        )
    return found


def evaluation(data: Data) -> PictureSet:
    """Return the first `evaluation_pictures` of the pictures that nothing is chosen on; raises as `load`."""
    return _first(_kept_back(data), data)


def noisy_samples(pictures: PictureSet, noise: Noise, *, count: int, stride: int) -> list[tuple[Array, float]]:
    """Return `count` noisy pictures (1, c, h, w) with their sigma on the scale [0, 1].

    The noise levels are spread over the range that the network was trained for, with the evaluated one among them, and
    follow each other, so that every level meets several pictures; pictures come again with other noise when
    they are fewer than `count`.
    """
    levels = noise.levels(_CALIBRATION_SIGMAS)
    samples = []
    for i in range(count):
        sigma255 = levels[i % len(levels)]
        picture = pictures.pictures[i % len(pictures)]
        noisy = add_gaussian(picture.pixels, sigma255, index=i, seed=1)
        samples.append((pad_to_multiple(noisy[None], stride), sigma255 / 255))
    return samples


def _kept_back(data: Data) -> PictureSet:
    if data.evaluation in data.train:
        return _part(data, data.evaluation, "evaluation")
    if data.evaluation == EMBEDDED:
        return sets.embedded("evaluation", channels=data.channels)
    return sets.folder(Path(data.evaluation), channels=data.channels)


def _first(found: PictureSet, data: Data) -> PictureSet:
    return PictureSet(name=found.name, pictures=found.pictures[: data.evaluation_pictures])


def _train(data: Data) -> PictureSet:
    parts = [_part(data, source, "train") for source in data.train]
    return PictureSet(name="+".join(p.name for p in parts), pictures=tuple(p for part in parts for p in part))


def _part(data: Data, source: str, split: Split) -> PictureSet:
    """Return a split of a source; a folder gives up only the splits that nothing else provides.

    What is chosen on comes from the first source alone, so only that one does without it for training.
    """
    if source == EMBEDDED:
        return sets.embedded(split, channels=data.channels)
    calibration = 15 if data.calibration is None and source == data.train[0] else 0
    evaluation = 15 if data.evaluation == source else 0
    shares = Shares(train=100 - calibration - evaluation, calibration=calibration, evaluation=evaluation)
    return sets.folder(Path(source), channels=data.channels, split=split, shares=shares)
