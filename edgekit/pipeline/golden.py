"""Golden pictures: the clean pictures in a bundle, their noise, and what the artifact made of them when compiled.

A bundle's folder `golden` has for each NAME of the manifest `NAME.png`, `NAME.noisy.f32` and, where something could run
the artifact, `NAME.denoised.f32`: little-endian float32, planes of rows.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from edgekit.backends import Session
from edgekit.data import noise, sets
from edgekit.data.sets import Picture, PictureSet
from edgekit.errors import IntegrityError
from edgekit.graph.reference import agreement_db
from edgekit.measure.quality import Array
from edgekit.recipe import Noise
from edgekit.target import Target

# Of the golden pictures, and of whatever else is looked at, where a target takes pictures of any size.
GOLDEN_SIDE = 256
# Far below what another kind of processor changes in the last bits, far above what another network gives.
GOLDEN_DB = 40.0
# Of the 255 bytes that file systems take; ".denoised.f32" follows it, and what tells those apart that begin alike.
_LONGEST_NAME = 200


def golden_pictures(evaluation: PictureSet, target: Target) -> PictureSet:
    """Return the middle of each evaluation picture, in the target's input shape, or 256x256 where it takes any."""
    crops = sets.centred(evaluation, target.input.height or GOLDEN_SIDE, target.input.width or GOLDEN_SIDE)
    named = tuple(Picture(name=_file_name(p.name), pixels=p.pixels) for p in crops)
    return PictureSet(name=crops.name, pictures=named)


def _file_name(picture: str) -> str:
    """Return a picture's name as one that files can begin with: without folders, and cut where it is too long."""
    name = picture.replace("/", "-").encode()
    if len(name) <= _LONGEST_NAME:
        return name.decode()
    return f"{name[:_LONGEST_NAME].decode(errors='ignore')}-{hashlib.sha256(name).hexdigest()[:8]}"


def read_golden(bundle: Path, name: str, files: Sequence[str]) -> PictureSet:
    """Return the clean pictures of a bundle, in the order of `files`, as a set of that name."""
    found = []
    for file in files:
        pixels = np.asarray(Image.open(bundle / "golden" / f"{file}.png"))
        pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
        found.append(Picture(name=file, pixels=pixels.copy()))
    return PictureSet(name=name, pictures=tuple(found))


def write_golden(bundle: Path, golden: PictureSet, settings: Noise, session: Session | None) -> None:
    """Write the pictures clean, noisy and, by a session of the artifact if there is one, denoised."""
    folder = bundle / "golden"
    folder.mkdir()
    for index, picture in enumerate(golden):
        plane = picture.pixels[0] if len(picture.pixels) == 1 else picture.pixels.transpose(1, 2, 0)
        Image.fromarray(plane).save(folder / f"{picture.name}.png")
        noisy = noise.add_gaussian(picture.pixels, settings.evaluate, index=index, seed=settings.seed)
        noisy.astype("<f4").tofile(folder / f"{picture.name}.noisy.f32")
        if session is not None:
            denoised = session(noisy[None], settings.evaluate / 255)
            denoised.astype("<f4").tofile(folder / f"{picture.name}.denoised.f32")


def golden_agreement_db(bundle: Path, golden: PictureSet, outputs: Sequence[Array]) -> float | None:
    """Return the least agreement of outputs with a bundle's golden ones; None where the bundle has none.

    Args:
        bundle: The bundle.
        golden: Its pictures.
        outputs: One for each, of the first seed. One with a NaN agrees by 0 dB.

    Raises:
        IntegrityError: A golden output has another size.
    """
    files = [bundle / "golden" / f"{picture.name}.denoised.f32" for picture in golden]
    if not all(file.is_file() for file in files):
        return None
    found = []
    for file, output in zip(files, outputs, strict=True):
        recorded = np.fromfile(file, "<f4")
        if recorded.size != output.size:
            raise IntegrityError(f"{file}: holds {recorded.size} numbers, not {output.size}")
        agreement = agreement_db(output.ravel(), recorded)
        found.append(0.0 if math.isnan(agreement) else agreement)
    return min(found)
