"""Training pictures that show what a kept-back picture shows: the same, a part of it, turned, resized or recompressed.

Two pictures overlap when both of these find the same place:

1. Points. Blobs of the band-passed picture (extrema of a difference of Gaussians, as in Lowe, "Distinctive image
   features from scale-invariant keypoints", 2004), each with the 8x8 samples around it, of mean 0 and length 1, laid
   into one of its eight orientations by its first moments, and whitened. Some of them have to agree on one placement of
   one picture over the other.
2. Pixels. Where that placement lays one picture over the other, their correlation, after both are band-passed and
   brought to an even local contrast.

The work is done at half the resolution and down to a quarter, which is what lets recompressed and resized pictures be
found. It needs numpy and Pillow, and the result depends on the pictures alone. docs/protocol.md says what is found.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise, product
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edgekit.data.photos import Pixels
from edgekit.data.sets import Picture, PictureSet
from edgekit.errors import InputError

log = logging.getLogger(__name__)
Plane: TypeAlias = NDArray[np.float32]
Whole: TypeAlias = NDArray[np.intp]
Flags: TypeAlias = NDArray[np.bool_]
Places: TypeAlias = NDArray[np.float64]

CORRELATION = 0.6
CORRELATION_OF_MANY = 0.5
# From half the resolution down to a quarter, in steps that the descriptors bridge (they bear 15 %).
_FACTORS = tuple(0.5 * 2 ** (-step / 3) for step in range(4))
# Samples at -7, -5 ... 7 pixels of the level: symmetric, so that a turned picture gives the same samples turned.
_REACH = 7
_OFFSETS = np.arange(-_REACH, _REACH + 1, 2)
_MARGIN = _REACH + 2
# Of a level of a picture. A training picture that is larger than those of the measured rates has more, in proportion to
# its pixels, up to four times as many: the time goes with them.
_MOST_POINTS = 512
_USUAL_PIXELS = 640 * 480
_MOST_TIMES = 4
_FAINTEST = np.float32(0.6)
_AMBIGUOUS = 0.12
# At this likeness two thirds of the true points match, and about three pairs by chance in two photographs.
_DIMENSIONS = 24
_ALIKE = np.float32(0.8)
_MATCHES = 3
_MOST_MATCHES = 48
# No chance placement in 54,000 pairs of photographs had more than half as many and a correlation above 0.4.
_MANY_MATCHES = 12
# Of the points where the pictures lie over each other; true placements keep 0.2 and more, chance ones below 0.1.
_LEAST_SHARE = 0.1
_SCALE_ERROR = 1.2
# Pixels of the level, and part of the smaller picture.
_LEAST_AREA = 400
_LEAST_PART = 0.05
# Of 1 - correlation beside the placement: true ones had up to 0.45, those of stripes and edges from 0.6.
_FALL_OFF = 0.5
_BATCH = 16
_BLOCK = 2048
_QUIET_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True)
class Box:
    """A part of a picture in pixels, without the row `bottom` and the column `right`."""

    top: int
    left: int
    bottom: int
    right: int

    def __str__(self) -> str:
        return f"{self.bottom - self.top}x{self.right - self.left} at {self.top},{self.left}"


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """Two pictures of which one shows what the other shows.

    train, evaluation: Their names. in_train, in_evaluation: The box around the shared part in each.
    correlation: Of the shared parts, band-passed: `CORRELATION_OF_MANY` to 1.
    """

    train: str
    evaluation: str
    in_train: Box
    in_evaluation: Box
    correlation: float


@dataclass(frozen=True, kw_only=True, eq=False)
class _Points:
    """Points of one or several pictures, n of them.

    shapes: (n, d) descriptors of length 1. places: (n, 2) rows and columns in pixels of the picture.
    poses: (n,) which of the eight orientations was laid upright, an index of `_turns`.
    bright: (n,) whether it is brighter than around it. owners: (n,) the picture's place in its set.
    levels: (n,) index of `_FACTORS`.
    """

    shapes: Plane
    places: Plane
    poses: Whole
    bright: Flags
    owners: Whole
    levels: Whole

    def __len__(self) -> int:
        return len(self.shapes)

    def chosen(self, which: Flags) -> _Points:
        return _Points(
            shapes=self.shapes[which],
            places=self.places[which],
            poses=self.poses[which],
            bright=self.bright[which],
            owners=self.owners[which],
            levels=self.levels[which],
        )


@dataclass(frozen=True, kw_only=True)
class _Placement:
    """Where a kept-back picture lies in a training picture: place = scale * turn @ its place + shift.

    turn: Index of `_turns`. levels: The levels of the training and of the kept-back picture that look alike.
    matches: How many points agree.
    """

    turn: int
    scale: float
    shift: tuple[float, float]
    levels: tuple[int, int]
    matches: int


def find_overlaps(train: PictureSet, evaluation: PictureSet) -> list[Overlap]:
    """Return the pairs of pictures that share a part, in the order of the training set.

    Found are equal pictures, crops either way and pictures that share a part, also where one of them was mirrored,
    turned by quarters, made gray, changed in brightness or contrast, recompressed, or resized by half to double.
    Parts below about 80x80 pixels, and parts without detail, are not; docs/protocol.md has the measured rates.
    """
    most = _MOST_POINTS
    kept = _stacked([p for i, picture in enumerate(evaluation) for p in _points(picture, i, most, ambiguous=True)])
    if not len(kept):
        return []
    whitening = _whitening(kept.shapes)
    kept = _whitened(kept, whitening)
    found: list[Overlap] = []
    began = told = time.monotonic()
    for first in range(0, len(train), _BATCH):
        batch = train.pictures[first : first + _BATCH]
        parts = (_points(picture, i, _most_learned(picture), ambiguous=False) for i, picture in enumerate(batch))
        points = _stacked([p for levels in parts for p in levels])
        found += _overlaps(batch, evaluation.pictures, _whitened(points, whitening), kept)
        if time.monotonic() - told > _QUIET_SECONDS:
            told = time.monotonic()
            done = first + len(batch)
            left = (told - began) * (len(train) - done) / done
            log.info("compared %d of %d pictures with %s, %.0f s left", done, len(train), evaluation.name, left)
    return found


def refuse_overlaps(train: PictureSet, *kept: PictureSet) -> None:
    """Raise InputError where a training picture shows what a picture of a kept-back set shows.

    It names the two pictures that are most alike, and a few more of the training pictures. The remedy is the same
    where one folder was divided and holds a scene twice: with one of the two gone, nothing leaks.
    """
    for other in kept:
        if overlaps := find_overlaps(train, other):
            worst = max(overlaps, key=lambda o: o.correlation)
            rest = list(dict.fromkeys(o.train for o in overlaps if o.train != worst.train))
            more = f"; {len(rest)} more do the like, such as {', '.join(map(repr, rest[:3]))}" if rest else ""
            raise InputError(
                f"'{worst.train}' of {train.name} ({worst.in_train}) shows what is kept back as '{worst.evaluation}' "
                f"of {other.name} ({worst.in_evaluation}): they correlate by {worst.correlation:.2f}{more}",
                remedy=f"take {'these' if rest else 'this'} out of the folder to learn from",
            )


def _gray(pixels: Pixels) -> Plane:
    """Return the picture (c, h, w) as gray (h, w), 0 to 255, by the luma of `photos.read_picture`."""
    if len(pixels) == 1:
        return np.asarray(pixels[0], np.float32)
    red, green, blue = np.asarray(pixels, np.float32)
    return np.asarray(0.299 * red + 0.587 * green + 0.114 * blue, np.float32)


def _resized(gray: Plane, factor: float) -> Plane:
    """Return the picture at a factor below 1; pixels that do not fill a pixel of the result are dropped."""
    height, width = (int(side * factor) for side in gray.shape)
    if not height or not width:
        return np.zeros((0, 0), np.float32)
    box = (0, 0, width / factor, height / factor)
    return np.array(Image.fromarray(gray).resize((width, height), Image.Resampling.BILINEAR, box=box), np.float32)


@cache
def _kernel(sigma: float) -> Plane:
    reach = math.ceil(2.5 * sigma)
    weights = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * sigma * sigma))
    return np.asarray(weights / weights.sum(), np.float32)


def _blurred(plane: Plane, sigma: float) -> Plane:
    kernel = _kernel(sigma)
    reach = len(kernel) // 2
    for _ in range(2):
        rows = len(plane)
        padded = np.pad(plane, ((reach, reach), (0, 0)), mode="edge")
        total = kernel[reach] * plane
        for i in range(reach):
            total += kernel[i] * (padded[i : i + rows] + padded[2 * reach - i : 2 * reach - i + rows])
        plane = total.T
    return plane


def _largest_around(plane: Plane, reach: int) -> Plane:
    """Return the largest value of the square around each pixel, `reach` to each side."""
    for _ in range(2):
        rows = len(plane)
        padded = np.pad(plane, ((reach, reach), (0, 0)), mode="edge")
        largest = padded[:rows].copy()
        for i in range(1, 2 * reach + 1):
            np.maximum(largest, padded[i : i + rows], out=largest)
        plane = largest.T
    return plane


def _most_learned(picture: Picture) -> int:
    """Return how many points a level of a training picture may have."""
    times = math.prod(picture.pixels.shape[1:]) / _USUAL_PIXELS
    return round(_MOST_POINTS * min(max(times, 1.0), _MOST_TIMES))


def _points(picture: Picture, owner: int, most: int, *, ambiguous: bool) -> Iterator[_Points]:
    """Yield at most `most` points of each level; with `ambiguous`, those that noise may turn come in both poses."""
    gray = _gray(picture.pixels)
    for level, factor in enumerate(_FACTORS):
        resized = _resized(gray, factor)
        if min(resized.shape) > 2 * _MARGIN:
            yield _points_of_level(resized, owner, level, most, ambiguous=ambiguous)


def _points_of_level(plane: Plane, owner: int, level: int, most: int, *, ambiguous: bool) -> _Points:
    fine, middle, coarse = (_blurred(plane, sigma) for sigma in (1.0, 2.0, 4.0))
    blobs = fine - middle
    rows, columns = _peaks(np.abs(blobs), most)
    around = rows[:, None, None] + _OFFSETS[:, None], columns[:, None, None] + _OFFSETS
    patches = (fine - coarse)[around]
    bright = blobs[rows, columns] > 0
    down, right = (patches * _OFFSETS[:, None]).sum((1, 2)), (patches * _OFFSETS).sum((1, 2))
    poses = (right < 0) + 2 * (down < 0) + 4 * (np.abs(down) > np.abs(right))
    which = np.arange(len(rows))
    if ambiguous:
        margins = np.stack((np.abs(right), np.abs(down), np.abs(np.abs(down) - np.abs(right)) / math.sqrt(2)))
        weak = np.flatnonzero(margins.min(0) < _AMBIGUOUS * np.hypot(down, right))
        poses = np.concatenate((poses, poses[weak] ^ (1 << margins.argmin(0)[weak])))
        which = np.concatenate((which, weak))
    flat = patches.reshape(-1, _OFFSETS.size**2)[which]
    upright = np.take_along_axis(flat, _orders()[poses], 1)
    return _Points(
        shapes=_normalised(upright - upright.mean(1, keepdims=True)) * np.where(bright, 1, -1)[which, None],
        places=((np.stack((rows, columns), 1)[which] + 0.5) / _FACTORS[level] - 0.5).astype(np.float32),
        poses=poses,
        bright=bright[which],
        owners=np.full(len(which), owner),
        levels=np.full(len(which), level),
    )


def _peaks(strength: Plane, most: int) -> tuple[Whole, Whole]:
    """Return places of the `most` strongest peaks, each the strongest for 4 pixels around, in reading order."""
    peaks = (strength == _largest_around(strength, 4)) & (strength > _FAINTEST)
    inside = np.zeros_like(peaks)
    inside[_MARGIN:-_MARGIN, _MARGIN:-_MARGIN] = True
    rows, columns = np.nonzero(peaks & inside)
    strongest = np.sort(np.argsort(-strength[rows, columns], kind="stable")[:most])
    return rows[strongest], columns[strongest]


@cache
def _turns() -> NDArray[np.float64]:
    """Return the eight matrices (8, 2, 2) that lay a pose upright, for (row, column).

    Bit 0 of the index mirrors columns, bit 1 rows, and then bit 2 swaps the two.
    """
    matrices = []
    for pose in range(8):
        mirror = np.diag([-1.0 if pose & 2 else 1.0, -1.0 if pose & 1 else 1.0])
        matrices.append(mirror[::-1] if pose & 4 else mirror)
    return np.stack(matrices)


@cache
def _orders() -> Whole:
    """Return, for each of the eight poses, the order of samples (8, 64) that lays it upright."""
    samples = np.arange(_OFFSETS.size**2).reshape(_OFFSETS.size, -1)
    orders = []
    for pose in range(8):
        mirrored = samples[:: -1 if pose & 2 else 1, :: -1 if pose & 1 else 1]
        orders.append((mirrored.T if pose & 4 else mirrored).ravel())
    return np.stack(orders)


@cache
def _turn_between() -> Whole:
    """Return (8, 8): the turn that takes a kept-back point's pose (second index) to a training point's (first)."""
    turns = _turns()
    between = np.swapaxes(turns, 1, 2)[:, None] @ turns[None]
    return np.asarray((between[:, :, None] == turns).all((3, 4)).argmax(2))


def _normalised(shapes: Plane) -> Plane:
    normal: Plane = shapes / (np.linalg.norm(shapes, axis=1, keepdims=True) + np.float32(1e-6))
    return normal


def _stacked(parts: Sequence[_Points]) -> _Points:
    width = _OFFSETS.size**2
    empty = np.zeros(0, np.intp)
    none = _Points(
        shapes=np.zeros((0, width), np.float32),
        places=np.zeros((0, 2), np.float32),
        poses=empty,
        bright=empty > 0,
        owners=empty,
        levels=empty,
    )
    parts = [none, *parts]
    return _Points(
        shapes=np.concatenate([p.shapes for p in parts]),
        places=np.concatenate([p.places for p in parts]),
        poses=np.concatenate([p.poses for p in parts]),
        bright=np.concatenate([p.bright for p in parts]),
        owners=np.concatenate([p.owners for p in parts]),
        levels=np.concatenate([p.levels for p in parts]),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Whitening:
    """What all blobs have in common, to be taken away; without it every blob looks like every other."""

    mean: Plane
    matrix: Plane


def _whitening(shapes: Plane) -> _Whitening:
    mean = shapes.mean(0)
    centred = (shapes - mean).astype(np.float64)
    values, vectors = np.linalg.eigh(centred.T @ centred / len(shapes))
    values, vectors = values[::-1][:_DIMENSIONS], vectors[:, ::-1][:, :_DIMENSIONS]
    weights = 1 / np.sqrt(np.maximum(values, 0) + 0.03 * values[0] + 1e-6)
    return _Whitening(mean=mean, matrix=np.asarray(vectors * weights, np.float32))


def _whitened(points: _Points, whitening: _Whitening) -> _Points:
    return _Points(
        shapes=_normalised(np.asarray((points.shapes - whitening.mean) @ whitening.matrix, np.float32)),
        places=points.places,
        poses=points.poses,
        bright=points.bright,
        owners=points.owners,
        levels=points.levels,
    )


def _overlaps(
    train: Sequence[Picture], evaluation: Sequence[Picture], points: _Points, kept: _Points
) -> Iterator[Overlap]:
    placements: dict[tuple[int, int], list[_Placement]] = {}
    for pair, placement in _placements(points, kept):
        placements.setdefault(pair, []).append(placement)
    for (one, other), proposed in sorted(placements.items(), key=lambda item: item[0]):
        likeliest = sorted(proposed, key=lambda p: -p.matches)[:3]
        overlaps = [_laid_over(train[one], evaluation[other], placement) for placement in likeliest]
        if confirmed := [o for o in overlaps if o is not None]:
            yield max(confirmed, key=lambda o: o.correlation)


def _placements(points: _Points, kept: _Points) -> Iterator[tuple[tuple[int, int], _Placement]]:
    """Yield (place of the training picture, place of the other), placement, where enough matches agree."""
    ours, theirs, alike = _matches(points, kept)
    turns = _turn_between()[points.poses[ours], kept.poses[theirs]]
    columns = (points.owners[ours], kept.owners[theirs], points.levels[ours], kept.levels[theirs], turns)
    order = np.lexsort((-alike, *columns[::-1]))
    keys = np.stack(columns, 1)[order]
    edges = np.flatnonzero((keys[1:] != keys[:-1]).any(1)) + 1
    sizes: dict[int, list[int]] = {}
    for start, end in pairwise((0, *edges.tolist(), len(keys))):
        if end - start >= _MATCHES:
            sizes.setdefault(min(end - start, _MOST_MATCHES), []).append(start)
    ours_at, theirs_at = _slices(points), _slices(kept)
    for size, starts in sizes.items():
        which = order[np.array(starts)[:, None] + np.arange(size)]
        groups = keys[starts]
        here, there = (p.places[i].astype(np.float64) for p, i in ((points, ours[which]), (kept, theirs[which])))
        there = np.einsum("gij,gnj->gni", _turns()[groups[:, 4]], there)
        for group in np.flatnonzero(_may_agree(here, there, groups[:, 2:4])):
            one, other, our_level, their_level, turn = (int(key) for key in groups[group])
            placement = _agreed(here[group], there[group], turn, (our_level, their_level))
            if placement is None:
                continue
            shared = _shared_points(
                placement, points.places[ours_at[one, our_level]], kept.places[theirs_at[other, their_level]]
            )
            if placement.matches >= _LEAST_SHARE * shared:
                yield (one, other), placement


def _may_agree(ours: Places, theirs: Places, levels: Whole) -> Flags:
    """Return which groups of matches (g, n, 2) have as many pairs that agree as `_MATCHES` matches make.

    It costs a hundredth of `_agreed`, and nearly all groups of chance matches end here.
    """
    first, second = _pairs(ours.shape[1])
    factors = np.array(_FACTORS)
    nominal = (factors[levels[:, 1]] / factors[levels[:, 0]])[:, None]
    span, goal = theirs[:, second] - theirs[:, first], ours[:, second] - ours[:, first]
    scales = (span * goal).sum(2) / np.maximum((span**2).sum(2), 1)
    scales = np.clip(scales, nominal / _SCALE_ERROR, nominal * _SCALE_ERROR)
    errors = np.abs(goal - scales[:, :, None] * span).max(2)
    agreeing = errors < 2 * _tolerance(factors[levels[:, :1]])
    enough: Flags = agreeing.sum(1) >= math.comb(_MATCHES, 2)
    return enough


def _tolerance(factor: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return how far a place may be off, in pixels of the training picture: two of the level's."""
    return 2 / factor


def _matches(points: _Points, kept: _Points) -> tuple[Whole, Whole, Plane]:
    """Return indices of the training points and of the kept-back points that look alike, and how much."""
    ours, theirs, alike = [np.zeros(0, np.intp)], [np.zeros(0, np.intp)], [np.zeros(0, np.float32)]
    for bright in (False, True):
        # Two reduced levels stand in the same ratio as a reduced one and the full one.
        for full in (True, False):
            left = np.flatnonzero((points.bright == bright) & ((points.levels == 0) == full))
            right = np.flatnonzero((kept.bright == bright) & ((kept.levels == 0) | full))
            for start in range(0, len(right), _BLOCK):
                block = right[start : start + _BLOCK]
                for first in range(0, len(left), _BLOCK // 8):
                    rows = left[first : first + _BLOCK // 8]
                    likeness = points.shapes[rows] @ kept.shapes[block].T
                    found = np.flatnonzero(likeness > _ALIKE)
                    ours.append(rows[found // len(block)])
                    theirs.append(block[found % len(block)])
                    alike.append(likeness.ravel()[found])
    return np.concatenate(ours), np.concatenate(theirs), np.concatenate(alike)


def _agreed(ours: Places, theirs: Places, turn: int, levels: tuple[int, int]) -> _Placement | None:
    """Return the placement that most of the matched places agree on; None where fewer than `_MATCHES` do.

    Tried are the placements of one match at the levels' own scale, and of two matches at the scale they span.

    Args:
        ours: (n, 2) in the training picture.
        theirs: (n, 2) in the other, turned.
        turn: How they were turned.
        levels: Of the training picture and the other.
    """
    nominal = _FACTORS[levels[1]] / _FACTORS[levels[0]]
    first, second = _pairs(len(ours))
    span = theirs[second] - theirs[first]
    length = (span**2).sum(1)
    scales = (span * (ours[second] - ours[first])).sum(1) / np.maximum(length, 1)
    usable = (length > 16**2) & (scales < nominal * _SCALE_ERROR) & (scales > nominal / _SCALE_ERROR)
    scales = np.concatenate((np.full(len(ours), nominal), scales[usable]))
    anchors = np.concatenate((np.arange(len(ours)), first[usable]))
    shifts = ours[anchors] - scales[:, None] * theirs[anchors]
    errors = np.abs(ours - scales[:, None, None] * theirs - shifts[:, None]).max(2)
    agreeing = errors < _tolerance(np.array(_FACTORS[levels[0]]))
    votes = agreeing.sum(1)
    best = int(votes.argmax())
    inside = agreeing[best]
    # One point may match several of a repeating pattern, and a kept-back point comes twice where its pose is in doubt.
    matches = min(len(set(map(tuple, places[inside].tolist()))) for places in (ours, theirs))
    if matches < _MATCHES:
        return None
    shift = (ours[inside] - scales[best] * theirs[inside]).mean(0)
    return _Placement(
        turn=turn,
        scale=float(scales[best]),
        shift=(float(shift[0]), float(shift[1])),
        levels=levels,
        matches=matches,
    )


@cache
def _pairs(count: int) -> tuple[Whole, Whole]:
    first, second = np.triu_indices(count, 1)
    return first, second


def _slices(points: _Points) -> dict[tuple[int, int], slice]:
    """Return where the points of each (owner, level) lie; they come in that order."""
    keys = np.stack((points.owners, points.levels), 1)
    edges = np.flatnonzero((keys[1:] != keys[:-1]).any(1)) + 1
    parts = pairwise((0, *edges.tolist(), len(keys)))
    return {(int(keys[start, 0]), int(keys[start, 1])): slice(start, end) for start, end in parts if end > start}


def _shared_points(placement: _Placement, ours: Plane, theirs: Plane) -> int:
    """Return how many points the sparser picture has where the placement lays the boxes around the points together."""
    turned = placement.scale * theirs @ _turns()[placement.turn].T + placement.shift
    low, high = np.maximum(ours.min(0), turned.min(0)), np.minimum(ours.max(0), turned.max(0))
    inside = (places[((places >= low) & (places <= high)).all(1)] for places in (ours, turned))
    return min(len(set(map(tuple, places.tolist()))) for places in inside)


def _laid_over(train: Picture, kept: Picture, placement: _Placement) -> Overlap | None:
    """Return the overlap of two pictures by a placement; None where the pixels do not bear it out."""
    ours, theirs = (_FACTORS[level] for level in placement.levels)
    plane, other = _resized(_gray(train.pixels), ours), _resized(_gray(kept.pixels), theirs)
    here = np.indices(plane.shape).astype(np.float64)
    back = _turns()[placement.turn].T / placement.scale
    pixels = (here + 0.5) / ours - 0.5 - np.array(placement.shift)[:, None, None]
    there = (np.tensordot(back, pixels, 1) + 0.5) * theirs - 0.5
    limits = np.array(other.shape)[:, None, None] - 1
    inside: Flags = np.all((there >= 0) & (there <= limits), axis=0)
    smaller = min(plane.size, other.size * (placement.scale * ours / theirs) ** 2)
    if inside.sum() < max(_LEAST_AREA, _LEAST_PART * smaller):
        return None
    window = _window(inside)
    warped = _sampled(other, np.clip(there, 0, limits)[:, *window])
    correlation = _correlation(_evened(plane[window]), _evened(warped), inside[window], placement.matches)
    if correlation is None:
        return None
    return Overlap(
        train=train.name,
        evaluation=kept.name,
        in_train=_box(here[:, inside], ours, train),
        in_evaluation=_box(there[:, inside], theirs, kept),
        correlation=round(correlation, 4),
    )


def _window(inside: Flags) -> tuple[slice, slice]:
    """Return the smallest rectangle around what is set."""
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)


def _sampled(plane: Plane, places: Places) -> Plane:
    """Return the values at places (2, h, w) inside the plane, between pixels linearly."""
    low = np.minimum(places.astype(np.intp), np.array(plane.shape)[:, None, None] - 2)
    down, right = (places - low).astype(np.float32)
    row, column = low
    upper = plane[row, column] * (1 - right) + plane[row, column + 1] * right
    lower = plane[row + 1, column] * (1 - right) + plane[row + 1, column + 1] * right
    between: Plane = upper * (1 - down) + lower * down
    return between


def _evened(plane: Plane) -> Plane:
    """Return the plane band-passed and of even local contrast, so that one strong edge does not outweigh the rest."""
    band = _blurred(plane, 1.0) - _blurred(plane, 4.0)
    # Gray levels: below it, what differs is noise and compression.
    faint = np.float32(2.0)
    even: Plane = band / np.sqrt(_blurred(band * band, 4.0) + faint * faint)
    return even


def _correlation(one: Plane, other: Plane, inside: Flags, matches: int) -> float | None:
    """Return the correlation of two planes, within one pixel of where they lie; None where chance may have made it.

    The less detail they share, the more has to correlate. Where few points matched, it also has to fall off at the
    shifts around, which it does not where both pictures show stripes or an edge.
    """
    near = product((-1, 0, 1), (-1, 0, 1))
    correlation, down, right = max((_shifted_correlation(one, other, inside, d, r), d, r) for d, r in near)
    detail = min(float((plane[inside] ** 2).sum()) for plane in (one, other))
    if matches >= _MANY_MATCHES and correlation >= CORRELATION_OF_MANY:
        return correlation
    if correlation < CORRELATION or correlation < 0.5 + 8 / math.sqrt(max(detail, 1)):
        return None
    around = max(
        _shifted_correlation(one, other, inside, down + step * vertical, right + step * horizontal)
        for step in (6, 10)
        for vertical, horizontal in product((-1, 0, 1), repeat=2)
        if vertical or horizontal
    )
    return correlation if 1 - correlation <= _FALL_OFF * (1 - around) else None


def _shifted_correlation(one: Plane, other: Plane, inside: Flags, down: int, right: int) -> float:
    """Return the correlation of two planes where both are inside, with the other moved down and right."""
    height, width = one.shape
    here = slice(max(down, 0), height + min(down, 0)), slice(max(right, 0), width + min(right, 0))
    there = slice(max(-down, 0), height + min(-down, 0)), slice(max(-right, 0), width + min(-right, 0))
    both = inside[here] & inside[there]
    if not both.any():
        return 0.0
    a, b = one[here][both], other[there][both]
    a, b = a - a.mean(), b - b.mean()
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b) + 1e-6))


def _box(places: Places, factor: float, picture: Picture) -> Box:
    """Return the box around places (2, n) of a level, in pixels of the picture."""
    low, high = places.min(1) / factor, (places.max(1) + 1) / factor
    height, width = picture.pixels.shape[1:]
    return Box(
        top=max(round(low[0]), 0),
        left=max(round(low[1]), 0),
        bottom=min(round(high[0]), height),
        right=min(round(high[1]), width),
    )
