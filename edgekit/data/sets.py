"""Sets of pictures for training, calibration and evaluation, of which no two share a picture."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np

from edgekit.data.photos import Channels, Pixels, list_pictures, read_picture
from edgekit.data.synthetic import dead_leaves
from edgekit.errors import InputError, ToolMissingError

Split: TypeAlias = Literal["train", "calibration", "evaluation"]
# A side of what ranges and weights are chosen on, in pixels.
MOST_CHOSEN_ON = 512


@dataclass(frozen=True, kw_only=True, eq=False)
class Picture:
    """One picture.

    pixels: uint8 (c, h, w); the picture owns the array, and makes it read-only.
    sha256: of shape and pixels; two pictures with one hash are the same picture, whatever they are called.
    """

    name: str
    pixels: Pixels
    sha256: str = field(init=False)

    def __post_init__(self) -> None:
        self.pixels.setflags(write=False)
        hashed = hashlib.sha256(repr(self.pixels.shape).encode())
        hashed.update(self.pixels.tobytes())
        object.__setattr__(self, "sha256", hashed.hexdigest())


@dataclass(frozen=True, kw_only=True, eq=False)
class PictureSet:
    """Named pictures in an order that matters: a picture's place picks its noise."""

    name: str
    pictures: tuple[Picture, ...]

    def __len__(self) -> int:
        return len(self.pictures)

    def __iter__(self) -> Iterator[Picture]:
        return iter(self.pictures)


@dataclass(frozen=True, kw_only=True)
class Shares:
    """How a folder is divided, in percent; together 100."""

    train: int = 70
    calibration: int = 15
    evaluation: int = 15

    def __post_init__(self) -> None:
        parts = (self.train, self.calibration, self.evaluation)
        if min(parts) < 0 or sum(parts) != 100:
            raise InputError(f"shares {parts} do not divide a folder", remedy="give three numbers that make 100")


@dataclass(frozen=True, kw_only=True)
class _Photo:
    """A photograph inside an installed package, with its path from the package's folder."""

    package: Literal["skimage", "sklearn"]
    path: str
    colour: bool

    @property
    def name(self) -> str:
        return f"{self.package}/{Path(self.path).stem}"


def _skimage(file: str, *, colour: bool) -> _Photo:
    return _Photo(package="skimage", path=f"data/{file}", colour=colour)


def _sklearn(file: str) -> _Photo:
    return _Photo(package="sklearn", path=f"datasets/images/{file}", colour=True)


# All of these lie inside the wheels of scikit-image 0.24 to 0.26 and of scikit-learn, and no other of their pictures is
# fetched. What is measured or calibrated is PNG, whose pixels do not depend on a JPEG decoder. Left out for want of a
# stated licence: stereo_motorcycle; as too noisy to learn from: hubble_deep_field, cell.
_EVALUATION = (
    _skimage("astronaut.png", colour=True),
    _skimage("camera.png", colour=False),
    _skimage("chelsea.png", colour=True),
    _skimage("coffee.png", colour=True),
)
_CALIBRATION = (
    _skimage("brick.png", colour=False),
    _skimage("coins.png", colour=False),
    _skimage("ihc.png", colour=True),
)
_TRAIN = (
    _skimage("clock_motion.png", colour=False),
    _skimage("grass.png", colour=False),
    _skimage("gravel.png", colour=False),
    _skimage("page.png", colour=False),
    _skimage("retina.jpg", colour=True),
    _skimage("rocket.jpg", colour=True),
)
_TRAIN_WHERE_INSTALLED = (_sklearn("china.jpg"), _sklearn("flower.jpg"))

TILE = 256
CALIBRATION_PICTURES = 16
TRAIN_LEAVES = 64
# Far apart, so that no count of training pictures reaches the seeds of the calibration pictures.
FIRST_SEED: dict[Split, int] = {"train": 0, "calibration": 1_000_000_000}


def embedded(split: Split, *, channels: Channels = 1, leaves: int = TRAIN_LEAVES) -> PictureSet:
    """Return a set that needs no files of the user's and no download.

    evaluation: four photographs from scikit-image's wheel (three in colour), as they are.
    calibration: 16 pictures of 256x256, tiles of other photographs from there, the rest dead leaves.
    train: the remaining photographs, those of scikit-learn where it is installed, and dead leaves of 256x256; each
        picture is named, so that the set says what it holds.

    Gray photographs are left out of the sets in colour. The three splits share no photograph and no seed.

    Args:
        split: Which of the three.
        channels: 1 for gray, 3 for colour.
        leaves: How many dead-leaves pictures the training set gets, each about 0.2 s the first time in a
            process; the others ignore it.

    Raises:
        InputError: A photograph is missing from its package, or cannot be read.
        ToolMissingError: scikit-image is not installed.
    """
    if split == "evaluation":
        pictures = tuple(_photographs(_EVALUATION, channels))
    elif split == "calibration":
        tiles = tuple(tile for photo in _photographs(_CALIBRATION, channels) for tile in _tiles(photo))
        pictures = tiles + _leaves(split, CALIBRATION_PICTURES - len(tiles), channels)
    else:
        extra = _TRAIN_WHERE_INSTALLED if importlib.util.find_spec("sklearn") else ()
        pictures = tuple(_photographs(_TRAIN + extra, channels)) + _leaves(split, leaves, channels)
    return PictureSet(name=f"embedded-{split}", pictures=pictures)


def folder(path: Path, *, channels: Channels, split: Split | None = None, shares: Shares | None = None) -> PictureSet:
    """Return the pictures of a folder, sorted by name: all of them, or those of one of three disjoint splits.

    A split is chosen by a hash of the file's name without its ending, so that it stays the same when pictures come or
    go, and `a.png` and `a.jpg` fall together. Call `check_disjoint` on the splits: a picture may have two names.

    Args:
        path: The folder; its subfolders are not looked into.
        channels: 1 for gray, 3 for colour; files are converted as `photos.read_picture` says.
        split: None to take the whole folder.
        shares: How the folder is divided; 70, 15 and 15 % unless told.

    Raises:
        InputError: The folder is missing or holds no pictures, a picture cannot be read, or the split is empty.
    """
    found = list_pictures(path)
    chosen = [file for file in found if split is None or _split_of(file, shares or Shares()) == split]
    if not chosen:
        raise InputError(
            f"{path}: none of its {len(found)} pictures falls into the split '{split}'",
            remedy="add pictures, or give a folder for each of train, calibration and evaluation",
        )
    name = path.resolve().name if split is None else f"{path.resolve().name}-{split}"
    pictures: list[Picture] = []
    refused: list[tuple[str, InputError]] = []
    for file in chosen:
        try:
            pictures.append(_read(file, file.name, channels))
        except InputError as error:
            refused.append((file.name, error))
    if refused:
        # All at once: who has hundreds of pictures would else start anew for each.
        (_, first), *others = refused
        names = ", ".join([name for name, _ in others[:20]] + ["..."] * (len(others) > 20))
        raise InputError(str(first), remedy=f"{len(others)} more there cannot be taken: {names}" if others else None)
    return PictureSet(name=name, pictures=tuple(pictures))


def digest(pictures: PictureSet) -> str:
    """Return the sha256 of the pictures in their order; names do not count."""
    return hashlib.sha256("\n".join(picture.sha256 for picture in pictures).encode()).hexdigest()


def centred(pictures: PictureSet, height: int, width: int) -> PictureSet:
    """Return the middle of each picture, (c, height, width); a smaller one is first continued by its mirror image."""
    return PictureSet(
        name=f"{pictures.name}-{height}x{width}",
        pictures=tuple(_middle(picture, height, width) for picture in pictures),
    )


def middles(pictures: PictureSet, most: int = MOST_CHOSEN_ON) -> PictureSet:
    """Return the pictures as they are, but of those that are larger the middle, at most `most` pixels a side."""

    def middle(picture: Picture) -> Picture:
        height, width = (min(side, most) for side in picture.pixels.shape[1:])
        return picture if (height, width) == picture.pixels.shape[1:] else _middle(picture, height, width)

    return PictureSet(name=pictures.name, pictures=tuple(middle(picture) for picture in pictures))


def check_disjoint(*sets: PictureSet) -> None:
    """Raise InputError, naming both pictures, where two of the sets hold the same pixels."""
    for one, other in combinations(sets, 2):
        known = {picture.sha256: picture for picture in one}
        for picture in other:
            if twin := known.get(picture.sha256):
                raise InputError(
                    f"'{twin.name}' of {one.name} and '{picture.name}' of {other.name} are the same picture",
                    remedy="take it out of one of the two",
                )


def _photographs(photos: tuple[_Photo, ...], channels: Channels) -> Iterator[Picture]:
    for photo in photos:
        if photo.colour or channels == 1:
            yield _read(_package_folder(photo.package) / photo.path, photo.name, channels)


def _package_folder(package: str) -> Path:
    """Return the folder of an installed package, without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ToolMissingError(
            f"the embedded pictures lie in the package '{package}', which is not installed",
            remedy="run: pip install scikit-image, or name a folder of your own pictures",
        )
    return Path(spec.submodule_search_locations[0])


def _read(file: Path, name: str, channels: Channels) -> Picture:
    return Picture(name=name, pixels=read_picture(file, channels).transpose(2, 0, 1).copy())


def _tiles(picture: Picture) -> Iterator[Picture]:
    """Yield the whole tiles of a picture, row by row; what is left at the right and the bottom is dropped."""
    _, height, width = picture.pixels.shape
    for top in range(0, height - TILE + 1, TILE):
        for left in range(0, width - TILE + 1, TILE):
            tile = picture.pixels[:, top : top + TILE, left : left + TILE].copy()
            yield Picture(name=f"{picture.name}@{top},{left}", pixels=tile)


def _middle(picture: Picture, height: int, width: int) -> Picture:
    below, right = (max(0, want - have) for want, have in zip((height, width), picture.pixels.shape[1:], strict=True))
    pixels = np.pad(picture.pixels, ((0, 0), (0, below), (0, right)), mode="symmetric")
    top, left = (pixels.shape[1] - height) // 2, (pixels.shape[2] - width) // 2
    return Picture(name=picture.name, pixels=pixels[:, top : top + height, left : left + width].copy())


def _leaves(split: Split, count: int, channels: Channels) -> tuple[Picture, ...]:
    seeds = range(FIRST_SEED[split], FIRST_SEED[split] + count)
    return tuple(_leaf_picture(seed, channels) for seed in seeds)


@functools.cache
def _leaf_picture(seed: int, channels: Channels) -> Picture:
    """Return a picture that is made once a process: a run and each INT8 graph of it ask for the same 64."""
    return Picture(name=f"dead-leaves/{seed}", pixels=dead_leaves(seed, TILE, TILE, channels))


def _split_of(file: Path, shares: Shares) -> Split:
    # Some file systems decompose accented letters and some fold case: the same file must fall into the same split.
    stem = unicodedata.normalize("NFC", file.stem).casefold()
    place = int.from_bytes(hashlib.sha256(stem.encode()).digest()[:8], "big") % 100
    if place < shares.train:
        return "train"
    return "calibration" if place < shares.train + shares.calibration else "evaluation"
