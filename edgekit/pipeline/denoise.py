"""One picture through a model or an artifact."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from PIL import Image

from edgekit import backends, bundle
from edgekit.data import noise, photos
from edgekit.errors import InputError, UnsupportedError
from edgekit.files import atomic_file
from edgekit.graph import checks
from edgekit.graph.receptive_field import receptive_field, tile_stride
from edgekit.measure import quality
from edgekit.measure.quality import Array, Denoise
from edgekit.pipeline import compile as compiling
from edgekit.pipeline import networks

_FORMATS = {
    ".png": "PNG",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".bmp": "BMP",
    ".webp": "WEBP",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
}
_MOST_PIXELS = {"WEBP": 16_383, "JPEG": 65_500}  # of a side
# A picture of more pixels is denoised in pieces that each give this side of it, so that memory does not grow with it.
_AT_ONCE, _PIECE = 2048 * 2048, 1024


@dataclass(frozen=True, kw_only=True)
class Opened:
    """Something that denoises.

    level: `native`, `emulated`, or `reference`, as of a session (`backends.Session`); others are no latency.
    tile, halo: Of an artifact that takes one input size only; None for any size.
    one_piece: Why a picture larger than the tile is refused; empty where it is cut into tiles.
    reach: Of what takes any size: returns the halo of the pieces of a large picture, a multiple of the stride; None
        where pieces would not give the same as the whole.
    """

    denoise: Denoise
    channels: int
    stride: int
    how: str
    level: backends.Level = "native"
    tile: tuple[int, int] | None = None
    halo: int = 0
    one_piece: str = ""
    reach: Callable[[], int | None] | None = None

    def __call__(self, noisy: Array, sigma: float) -> Array:
        """Return a picture (1, c, h, w) of any size denoised.

        Raises:
            InputError: It is no such picture in float32; or it is larger than a tile, and cannot be cut into tiles.
        """
        if noisy.ndim != 4 or noisy.shape[:2] != (1, self.channels) or not noisy.size or noisy.dtype != np.float32:
            raise InputError(
                f"a picture is given as {noisy.shape} in {noisy.dtype}, not as (1, {self.channels}, h, w) in float32",
                remedy="give one at a time, in [0, 1] plus noise: noisy.astype(np.float32), bytes divided by 255",
            )
        if self.tile is not None:
            height, width = self.tile
            if self.one_piece and (noisy.shape[2] > height or noisy.shape[3] > width):
                raise InputError(
                    f"the picture is {noisy.shape[3]}x{noisy.shape[2]}, larger than the tile {width}x{height}, and "
                    f"cannot be cut into tiles, since no halo is known: {self.one_piece}",
                    remedy="compile with a tile as large as the picture (--tile), or for an engine that has none",
                )
            return quality.denoise_tiled(
                self.denoise, noisy, sigma, tile_height=height, tile_width=width, halo=self.halo, stride=self.stride
            )
        padded = quality.pad_to_multiple(noisy, self.stride)
        halo = self.reach() if self.reach is not None and padded[0, 0].size > _AT_ONCE else None
        if halo is None:
            return quality.crop(self.denoise(padded, sigma), *noisy.shape[-2:])
        most = _PIECE // self.stride * self.stride + 2 * halo
        height, width = (min(most, side) for side in padded.shape[-2:])
        return quality.denoise_tiled(
            self.denoise, noisy, sigma, tile_height=height, tile_width=width, halo=halo, stride=self.stride
        )


def open_model(what: str | Path, *, weights: str | Path | None = None, threads: int = 2) -> Opened:
    """Return a bundle, run folder, shipped model, ONNX file or torch class, ready to denoise.

    Raises:
        InputError: Nothing of that name, or weights for what has its own.
        ToolMissingError: The bundle's engine or runner is not there.
    """
    what, weights = str(what), None if weights is None else Path(weights)
    networks.refuse_ignored(what, weights=weights)
    path = Path(what)
    if networks.is_run(what) and (path / bundle.MANIFEST).is_file():
        return _open_bundle(path, threads)
    if what.endswith(".onnx"):
        model = checks.load_onnx(path)
        channels, stride = checks.interface(model, path).channels, tile_stride(model, path)
        session = backends.load_onnx("onnxruntime").open_onnx(path, threads=threads)
        return Opened(
            denoise=session,
            channels=channels,
            stride=stride,
            how="onnxruntime",
            reach=lambda: _reach(lambda: compiling.simplified(path), stride),
        )
    net = networks.named(what, weights).net
    return Opened(
        denoise=networks.as_function(net),
        channels=net.channels,
        stride=net.stride,
        how="torch",
        reach=lambda: _reach(lambda: compiling.float_model(net), net.stride),
    )


def denoise_file(
    opened: Opened, source: str | Path, to: str | Path, *, sigma255: float, add_noise: bool = False
) -> Path:
    """Denoise a picture file, and return where the result lies, 8 bits a channel.

    Args:
        opened: What denoises.
        source: The picture.
        to: The result; its ending names the format.
        sigma255: Standard deviation of the noise on the scale 0 to 255.
        add_noise: Add this noise (seed 0) to the picture first, to see the effect on a clean one.

    Raises:
        InputError: The picture cannot be read, the ending names no format, or its format cannot hold the picture.
    """
    source, to = Path(source), Path(to)
    if (form := _FORMATS.get(to.suffix.lower())) is None:
        raise InputError(f"{to}: '{to.suffix}' is no picture format", remedy=f"use one of {', '.join(_FORMATS)}")
    channels: photos.Channels = 1 if opened.channels == 1 else 3
    pixels = photos.read_picture(source, channels).transpose(2, 0, 1)
    height, width = pixels.shape[1:]
    too_large = InputError(f"{to}: {form} cannot hold {width}x{height} pixels", remedy="use .png")
    if max(height, width) > _MOST_PIXELS.get(form, max(height, width)):
        raise too_large
    noisy = noise.add_gaussian(pixels, sigma255, index=0) if add_noise else pixels.astype(np.float32) / np.float32(255)
    denoised = noise.clipped_uint8(opened(np.ascontiguousarray(noisy[None]), sigma255 / 255))[0]
    plane = denoised[0] if channels == 1 else denoised.transpose(1, 2, 0)
    with atomic_file(to) as temporary:
        try:
            Image.fromarray(plane).save(temporary, format=form)
        except ValueError as error:
            raise too_large from error
    return to


def _reach(read: Callable[[], onnx.ModelProto], stride: int) -> int | None:
    """Return the halo of a graph in whole strides; None where it is not known, or something looks at the whole."""
    try:
        field = receptive_field(read())
        return None if field.global_nodes else field.aligned(stride)
    except UnsupportedError:
        return None


def _open_bundle(path: Path, threads: int) -> Opened:
    manifest = bundle.read(path)
    target, built, model = manifest.target, manifest.built, manifest.model
    label, session = backends.load(target.engine).open_session(path, built, target, threads=threads)[0]
    height, width = target.input.height, target.input.width
    tile = (height, width) if height is not None and width is not None else None

    def reach() -> int | None:
        if model.halo_px is None or model.global_ops:
            return None
        # Dynamic INT8 takes its ranges from all of the picture.
        artifact = path / built.files["artifact"]
        dynamic = target.engine == "onnxruntime" and "DynamicQuantizeLinear" in checks.op_counts(
            checks.load_onnx(artifact)
        )
        return None if dynamic else manifest.halo(0, 0)

    return Opened(
        denoise=session,
        channels=model.channels,
        stride=model.stride,
        how=f"{label} ({session.level})",
        level=session.level,
        tile=tile,
        halo=manifest.halo(*tile) if tile else 0,
        one_piece=model.halo_unknown if model.halo_px is None else "",
        reach=reach,
    )
