"""A training picture that shows what a kept-back one shows is found, whatever was done to it; others are not."""

import dataclasses
import io
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage.feature import match_template

from edgekit.data import overlap, sets
from edgekit.data.overlap import Overlap
from edgekit.data.photos import Pixels
from edgekit.data.sets import Picture, PictureSet
from edgekit.data.synthetic import dead_leaves
from edgekit.errors import InputError

RESEARCH_DATA = Path(os.environ.get("EDGEKIT_RESEARCH_DATA", Path(__file__).parent.parent / "../shared/data"))


@pytest.fixture(scope="module")
def evaluation() -> PictureSet:
    return sets.embedded("evaluation", channels=3)


def jpeg(pixels: Pixels, quality: int) -> Pixels:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


def gamma(pixels: Pixels, power: float) -> Pixels:
    return np.rint(255 * (pixels / 255) ** power).astype(np.uint8)


def noisy(pixels: Pixels, sigma: float) -> Pixels:
    noise = np.random.default_rng(0).normal(0, sigma, pixels.shape)
    return np.clip(np.rint(pixels + noise), 0, 255).astype(np.uint8)


def resized(pixels: Pixels, factor: float) -> Pixels:
    height, width = pixels.shape[:2]
    return np.asarray(Image.fromarray(pixels).resize((round(width * factor), round(height * factor))))


def crop(pixels: Pixels, part: int) -> Pixels:
    """Return one `part`-th of the area, from an odd place."""
    height, width = (round(side / part**0.5) for side in pixels.shape[:2])
    top, left = ((side - of) // 3 | 1 for side, of in zip(pixels.shape[:2], (height, width), strict=True))
    return pixels[top : top + height, left : left + width]


def gray(pixels: Pixels) -> Pixels:
    return np.repeat(np.asarray(Image.fromarray(pixels).convert("L"))[:, :, None], 3, 2)


def inset(pixels: Pixels) -> Pixels:
    """Return the picture inside a larger one of something else."""
    height, width = pixels.shape[:2]
    frame = np.array(resized(gamma(pixels[::-1, ::-1][:100, :100], 0.7), 8))
    frame[101 : 101 + height, 51 : 51 + width] = pixels
    return frame


CHANGES: dict[str, Callable[[Pixels], Pixels]] = {
    "same": lambda p: p,
    "gray": gray,
    "jpeg 20": lambda p: jpeg(p, 20),
    "gamma 2": lambda p: gamma(p, 2),
    "low contrast": lambda p: np.rint(0.4 * p + 70).astype(np.uint8),
    "noise of 10": lambda p: noisy(p, 10),
    "mirrored": lambda p: p[:, ::-1],
    "turned": lambda p: np.rot90(p),
    "turned, mirrored, jpeg 50": lambda p: jpeg(np.rot90(p, 3)[:, ::-1], 50),
    "half of it": lambda p: crop(p, 2),
    "a quarter, mirrored, jpeg 50, gamma": lambda p: gamma(jpeg(crop(p, 4)[:, ::-1], 50), 1.5),
    "an eighth": lambda p: crop(p, 8),
    "resized by 0.6": lambda p: resized(p, 0.6),
    "resized by 0.9, jpeg 50": lambda p: jpeg(resized(p, 0.9), 50),
    "resized by 1.5": lambda p: resized(p, 1.5),
    "a quarter, resized by 0.75": lambda p: resized(crop(p, 4), 0.75),
    "inset": inset,
}


def changed(pictures: PictureSet, change: Callable[[Pixels], Pixels]) -> PictureSet:
    return PictureSet(
        name="mine",
        pictures=tuple(
            Picture(name=f"{p.name}'", pixels=change(p.pixels.transpose(1, 2, 0)).transpose(2, 0, 1).copy())
            for p in pictures
        ),
    )


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_picture_is_found_with_its_origin_and_no_other(name, evaluation):
    found = overlap.find_overlaps(changed(evaluation, CHANGES[name]), evaluation)
    assert [(o.train, o.evaluation) for o in found] == [(f"{p.name}'", p.name) for p in evaluation]


def test_a_whole_picture_is_found_where_only_its_crop_is_kept_back(evaluation):
    kept = changed(evaluation, lambda p: jpeg(crop(p, 4)[::-1], 50))
    found = overlap.find_overlaps(evaluation, kept)
    assert [(o.train, o.evaluation) for o in found] == [(p.name, f"{p.name}'") for p in evaluation]


def test_pictures_that_a_large_one_shows_beside_each_other_are_all_found():
    kept = [dead_leaves(500 + i, 200, 300, 1) for i in range(36)]
    rows = [np.concatenate(kept[first : first + 6], 2) for first in range(0, 36, 6)]
    (large, parts) = (
        PictureSet(name=name, pictures=tuple(Picture(name=str(i), pixels=p) for i, p in enumerate(pixels)))
        for name, pixels in (("large", [np.concatenate(rows, 1)]), ("parts", kept))
    )
    assert [found.evaluation for found in overlap.find_overlaps(large, parts)] == [str(i) for i in range(36)]


def test_the_place_of_a_crop_is_told(evaluation):
    astronaut = dataclasses.replace(evaluation, pictures=evaluation.pictures[:1])
    [found] = overlap.find_overlaps(changed(astronaut, lambda p: p[101:301, 51:351][:, ::-1]), astronaut)
    got, want = found.in_evaluation, overlap.Box(top=101, left=51, bottom=301, right=351)
    assert max(abs(a - b) for a, b in zip(dataclasses.astuple(got), dataclasses.astuple(want), strict=True)) <= 4
    assert found.correlation > 0.95


def test_the_placement_agrees_with_template_matching(evaluation):
    astronaut = dataclasses.replace(evaluation, pictures=evaluation.pictures[:1])
    [found] = overlap.find_overlaps(changed(astronaut, lambda p: p[101:301, 51:351]), astronaut)
    plane = astronaut.pictures[0].pixels[1]
    peak = match_template(plane[60:360, 20:400], plane[101:301, 51:351])
    top, left = np.unravel_index(peak.argmax(), peak.shape)
    assert abs(found.in_evaluation.top - 60 - top) <= 4
    assert abs(found.in_evaluation.left - 20 - left) <= 4


@pytest.mark.slow
def test_the_embedded_sets_do_not_overlap(evaluation):
    train, calibration = sets.embedded("train", channels=3, leaves=2), sets.embedded("calibration", channels=3)
    assert overlap.find_overlaps(train, evaluation) == []
    assert overlap.find_overlaps(train, calibration) == []
    assert overlap.find_overlaps(calibration, evaluation) == []


def test_pictures_without_detail_and_tiny_pictures_do_not_overlap():
    flat = np.full((1, 200, 200), 128, np.uint8)
    ramp = np.broadcast_to(np.arange(200, dtype=np.uint8), (1, 200, 200)).copy()
    stripes = np.broadcast_to(np.arange(200) // 5 % 2 * np.uint8(200), (1, 200, 200)).copy()
    tiny = np.random.default_rng(0).integers(0, 255, (1, 9, 30), np.uint8)
    plain = PictureSet(
        name="plain", pictures=tuple(Picture(name=str(i), pixels=p) for i, p in enumerate((flat, ramp, stripes, tiny)))
    )
    other = PictureSet(name="other", pictures=(Picture(name="turned", pixels=np.rot90(stripes[0])[None].copy()),))
    assert overlap.find_overlaps(plain, other) == []


def test_what_is_found_is_the_same_in_any_company(evaluation):
    mine = changed(evaluation, lambda p: jpeg(crop(p, 2), 50))
    alone = [
        overlap.find_overlaps(dataclasses.replace(mine, pictures=(picture,)), evaluation) for picture in mine.pictures
    ]
    together: list[Overlap] = overlap.find_overlaps(mine, evaluation)
    assert together == [found for part in alone for found in part]


def test_the_refusal_names_both_pictures_the_likeness_and_the_remedy(evaluation):
    mine = changed(evaluation, lambda p: crop(p, 4))
    with pytest.raises(
        InputError, match=r"' of mine \(.* at .*\) shows what is kept back as 's.*' of embedded-eval"
    ) as e:
        overlap.refuse_overlaps(mine, PictureSet(name="nothing", pictures=()), evaluation)
    assert "they correlate by" in str(e.value)
    assert "2 more do the like" in str(e.value)
    assert str(e.value).endswith("take these out of the folder to learn from")


def test_distill_refuses_a_crop_of_an_evaluation_picture(call, cwd, leaves, evaluation):
    (cwd / "mine").mkdir()
    (cwd / "judged").mkdir()
    for file in leaves.iterdir():
        (cwd / "mine" / file.name).write_bytes(file.read_bytes())
    photo = evaluation.pictures[0].pixels.transpose(1, 2, 0)
    Image.fromarray(crop(photo, 4)).save(cwd / "mine/holiday.jpg", quality=80)
    Image.fromarray(photo).save(cwd / "judged/astronaut.png")
    settings = ("--set", "data.train=[mine]", "--set", "data.evaluation=judged")
    call("-q", "distill", "quickstart", *settings).refused(
        2, "'holiday.jpg' of mine-train", "'astronaut.png' of judged"
    )


@pytest.mark.slow
@pytest.mark.skipif(not (RESEARCH_DATA / "train/bsd432").is_dir(), reason="no train/bsd432 in EDGEKIT_RESEARCH_DATA")
def test_photographs_of_other_things_raise_no_alarm():
    kept = sets.folder(RESEARCH_DATA / "test/set12", channels=1)
    learned = sets.folder(RESEARCH_DATA / "train/bsd432", channels=1)
    few = PictureSet(name="bsd432", pictures=learned.pictures[::5])
    assert overlap.find_overlaps(few, kept) == []
