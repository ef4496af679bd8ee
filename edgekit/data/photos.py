"""Pictures read from files, as 8-bit pixels."""

from __future__ import annotations

import struct
import warnings
import zlib
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps

from edgekit.errors import InputError

Channels: TypeAlias = Literal[1, 3]
Pixels: TypeAlias = NDArray[np.uint8]

EXTENSIONS = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
EIGHT_BIT_MODES = frozenset(
    {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"}
)
_BITS_PER_SAMPLE = 258  # a tag of TIFF
# What Pillow raises for a file that is cut short, damaged, or no picture; SyntaxError is its word for a broken PNG.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


def read_picture(path: Path, channels: Channels) -> Pixels:
    """Return the picture in a file, uint8 (h, w, channels), upright.

    A gray file read as gray keeps its values; colour becomes gray by ITU-R 601-2 luma, as Pillow's mode L computes it
    ((19595 R + 38470 G + 7471 B + 32768) >> 16). A gray file read as colour has three equal channels. EXIF orientation
    is applied, an alpha channel is dropped, colour profiles are ignored, and of several frames the first is read.

    Args:
        path: A file in any format that Pillow reads; `EXTENSIONS` are those that folders are searched for.
        channels: 1 for gray, 3 for RGB.

    Raises:
        InputError: The file is missing, damaged, no picture, or has more than 8 bits a channel.
    """
    try:
        # Whatever Pillow finds odd in a file that it reads (its EXIF data, or that it is large) is no error here.
        with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
            _refuse_deep(path, image)
            # Pillow maps a transparent palette to colours only by way of RGBA.
            opaque = image.convert("RGBA") if "transparency" in image.info else image
            upright = ImageOps.exif_transpose(opaque)
            pixels = np.array(upright.convert("L" if channels == 1 else "RGB"), dtype=np.uint8)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such picture") from error
    except UNREADABLE as error:
        raise InputError(
            f"{path}: not a readable picture: {error}", remedy="replace the file, or take it out of the folder"
        ) from error
    return pixels.reshape(*pixels.shape[:2], channels)


def has_colour(path: Path) -> bool:
    """Return whether any pixel of the picture in a file is not gray; raises as `read_picture`."""
    pixels = read_picture(path, 3)
    return bool((pixels != pixels[..., :1]).any())


def list_pictures(folder: Path) -> tuple[Path, ...]:
    """Return the picture files directly inside a folder, sorted by name.

    The order is that of the names' code points, on every machine: the noise of a picture hangs on its place.

    Raises:
        InputError: The folder is missing, is no folder, or holds no file with one of `EXTENSIONS`, or one whose name
            is not UTF-8 (names stand in records and on pages), or a link that leads nowhere.
    """
    if not folder.is_dir():
        state = "is not a folder" if folder.exists() else "no such folder"
        raise InputError(f"{folder}: {state}", remedy="give a folder that holds pictures")
    found = [path for path in folder.iterdir() if _looks_like_picture(path)]
    if not found:
        raise InputError(f"{folder}: holds no pictures", remedy=f"looked for {', '.join(EXTENSIONS)}")
    for path in found:
        if not path.exists():
            raise InputError(f"{path}: a link that leads nowhere", remedy="mount what it leads to, or remove it")
        try:
            path.name.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{folder}: the name {path.name!a} is not UTF-8", remedy="rename the file") from error
    return tuple(sorted(found, key=lambda path: path.name))


def _refuse_deep(path: Path, image: ImageFile.ImageFile) -> None:
    """Raise InputError where Pillow would cut 16-bit channels to 8 bits, or knows no 8-bit form."""
    # A 16-bit RGB file has the mode RGB. The raw mode of its tiles ("RGB;16B") tells, in a TIFF of separate planes its
    # tag alone, and in a PPM the largest value, which stands behind the raw mode.
    bits = getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, (8,))
    largest = [n for tile in image.tile if image.format == "PPM" for n in tile.args or () if isinstance(n, int)]
    deep = max((*bits, 0)) > 8 or max((*largest, 0)) > 255 or any(";16" in str(tile) for tile in image.tile)
    if image.mode not in EIGHT_BIT_MODES or deep:
        raise InputError(
            f"{path}: more than 8 bits a channel (mode {image.mode})",
            remedy="convert it to 8 bit, as with: magick in.png -depth 8 out.png",
        )


def _looks_like_picture(path: Path) -> bool:
    """Return whether the name is a picture's; files such as macOS's '._photo.jpg' are not."""
    return path.suffix.lower() in EXTENSIONS and not path.name.startswith(".") and (path.is_file() or not path.exists())
