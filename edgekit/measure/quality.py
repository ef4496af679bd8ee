"""Picture quality by one protocol, written down with every figure: docs/protocol.md."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from skimage.metrics import structural_similarity
from skimage.restoration import denoise_nl_means

from edgekit.data import noise as noises
from edgekit.data.noise import Noise
from edgekit.data.sets import PictureSet, digest
from edgekit.errors import InputError
from edgekit.measure.statistics import paired_difference

Array: TypeAlias = NDArray[np.float32]
Denoise: TypeAlias = Callable[[Array, float], Array]
"""Takes noisy (1, c, h, w) and the noise's standard deviation on the scale [0, 1]; returns (1, c, h, w)."""
Output: TypeAlias = Literal["float32", "uint8"]

# Figures are stored as whole numbers, which infinity is not: equal pictures count as 100 dB.
CEILING_MDB = 100_000
SSIM_WINDOW = 11


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How a figure was measured; two figures compare only where these are equal.

    pictures_sha256: `sets.digest` of the pictures.
    seeds: Draws of noise that each picture was measured with; its figure is their mean.
    stride: The picture was padded by reflection, at the right and the bottom, to a multiple of this, and cropped after.
    output: Whether what came out was scored as it is, or clipped and rounded to 8 bits first.
    """

    pictures: str
    pictures_sha256: str
    noise: Noise
    sigma255: float
    seeds: tuple[int, ...]
    stride: int
    output: Output


@dataclass(frozen=True, kw_only=True)
class PictureQuality:
    """One picture's PSNR in thousandths of a dB and SSIM in hundred-thousandths."""

    name: str
    psnr_mdb: int
    ssim_e5: int


@dataclass(frozen=True, kw_only=True)
class QualityReport:
    """The figures of one denoiser.

    psnr_mdb: Mean of the pictures' PSNR in thousandths of a dB; ssim_e5: mean SSIM in hundred-thousandths.
    nonfinite_pixels: NaN and infinite values that came out, over all pictures and seeds; a picture with any of them
        counts as 0 dB and SSIM 0 for that seed.
    """

    protocol: Protocol
    pictures: tuple[PictureQuality, ...]
    psnr_mdb: int
    ssim_e5: int
    nonfinite_pixels: int


@dataclass(frozen=True, kw_only=True)
class Drop:
    """PSNR lost from one report to another, in thousandths of a dB; a loss is positive."""

    drop_mdb: int
    low_mdb: int
    high_mdb: int
    confidence: float


def psnr(got: NDArray[np.floating], want: NDArray[np.floating]) -> float:
    """Return the peak signal-to-noise ratio in dB, for a peak of 1.0, over all pixels and channels; inf where equal.

    No border is cropped and nothing is clipped or rounded. Minus infinity where `got` is not finite.

    Raises:
        InputError: The shapes differ.
    """
    _require_same_shape(got, want)
    error = float(np.mean(np.square(got.astype(np.float64) - want.astype(np.float64))))
    if error == 0:
        return math.inf
    return -10 * math.log10(error) if math.isfinite(error) else -math.inf


def ssim(got: NDArray[np.floating], want: NDArray[np.floating]) -> float:
    """Return the structural similarity of two pictures (c, h, w) in [0, 1]: the mean over channels.

    Gaussian window of 11x11 with sigma 1.5, population covariance, the mean over places where the window lies inside
    the picture (Wang et al., "Image quality assessment", 2004).

    Raises:
        InputError: The shapes differ, or a side is below 11 pixels.
    """
    _require_same_shape(got, want)
    if min(want.shape[-2:]) < SSIM_WINDOW:
        raise InputError(f"SSIM needs {SSIM_WINDOW} pixels a side, not {want.shape[-2]}x{want.shape[-1]}")
    return float(
        structural_similarity(
            want.astype(np.float64),
            got.astype(np.float64),
            data_range=1.0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            channel_axis=0,
        )
    )


def evaluate(
    denoise: Denoise,
    pictures: PictureSet,
    *,
    sigma255: float,
    seeds: tuple[int, ...] = (0,),
    stride: int = 8,
    noise: Noise = "gaussian",
    output: Output = "float32",
) -> QualityReport:
    """Return the PSNR and SSIM of a denoiser on a set of pictures.

    Args:
        denoise: Called with each noisy picture (1, c, h, w), h and w multiples of `stride`, and sigma255 / 255.
        pictures: What is made noisy, and what the result is compared with.
        sigma255: Standard deviation of the noise on the scale 0..255.
        seeds: Draws of the noise. Take three or more before claiming a difference below 0.05 dB.
        stride: Of the denoiser.
        noise: Unclipped, or clipped and rounded to 8 bits as a phone's camera gives it.
        output: Score what comes out as it is, or as an 8-bit picture.

    Raises:
        InputError: No pictures or no seeds, a wrong sigma, or a denoiser whose result has another shape.
    """
    if not pictures.pictures or not seeds:
        raise InputError(f"{pictures.name}: nothing to measure with {len(pictures)} pictures and {len(seeds)} seeds")
    protocol = Protocol(
        pictures=pictures.name,
        pictures_sha256=digest(pictures),
        noise=noise,
        sigma255=sigma255,
        seeds=seeds,
        stride=stride,
        output=output,
    )
    scores = np.array(list(_scores(denoise, pictures, protocol))).reshape(len(pictures), len(seeds), 3)
    psnr_mdb, ssim_e5 = np.rint(scores[:, :, :2].mean(axis=1) * (1000, 100_000)).astype(int).T
    return QualityReport(
        protocol=protocol,
        pictures=tuple(
            PictureQuality(name=picture.name, psnr_mdb=int(psnr_mdb[i]), ssim_e5=int(ssim_e5[i]))
            for i, picture in enumerate(pictures)
        ),
        psnr_mdb=round(float(psnr_mdb.mean())),
        ssim_e5=round(float(ssim_e5.mean())),
        nonfinite_pixels=int(scores[:, :, 2].sum()),
    )


def worst_drop_mdb(before: QualityReport, after: QualityReport) -> int:
    """Return the PSNR that the picture loses that loses most, in thousandths of a dB, between reports on one set."""
    return max(b.psnr_mdb - a.psnr_mdb for b, a in zip(before.pictures, after.pictures, strict=True))


def psnr_drop(before: QualityReport, after: QualityReport, *, confidence: float = 0.95, seed: int = 0) -> Drop:
    """Return how much PSNR is lost from `before` to `after`, with the paired bootstrap interval over the pictures.

    `drop_mdb` is the exact difference of the two reports, so that the drops of a chain add up.

    Raises:
        InputError: The two were measured by different protocols; names the first thing that differs.
    """
    ours, theirs = asdict(before.protocol), asdict(after.protocol)
    for name, value in ours.items():
        if theirs[name] != value:
            raise InputError(
                f"two protocols do not compare: {name} is {value} in one and {theirs[name]} in the other",
                remedy="measure both with the same settings",
            )
    found = paired_difference(
        [picture.psnr_mdb for picture in before.pictures],
        [picture.psnr_mdb for picture in after.pictures],
        confidence=confidence,
        seed=seed,
    )
    return Drop(
        drop_mdb=before.psnr_mdb - after.psnr_mdb,
        low_mdb=math.floor(found.low),
        high_mdb=math.ceil(found.high),
        confidence=confidence,
    )


def noisy_input(noisy: Array, sigma: float) -> Array:
    """Return the noisy picture itself: the row that a denoiser must beat first."""
    return noisy


def nlm(noisy: Array, sigma: float) -> Array:
    """Return the picture denoised by non-local means (Buades, Coll and Morel, 2005), scikit-image's: (1, c, h, w).

    Patches of 7x7 searched in 21x21, h = 0.6 sigma, sigma known, fast mode: of nine settings the best at sigma 15 and
    25 on the embedded calibration photographs.
    """
    denoised = denoise_nl_means(
        noisy[0].transpose(1, 2, 0).astype(np.float64),
        patch_size=7,
        patch_distance=10,
        h=0.6 * sigma,
        sigma=sigma,
        fast_mode=True,
        channel_axis=-1,
    )
    # scikit-image drops the axis of a single channel.
    picture = denoised.reshape(*noisy.shape[-2:], -1).transpose(2, 0, 1)
    return np.ascontiguousarray(picture[None], dtype=np.float32)


def pad_to_multiple(noisy: Array, multiple: int) -> Array:
    """Return (..., h, w) padded by reflection, at the bottom and the right, to multiples of `multiple`."""
    height, width = noisy.shape[-2:]
    return _pad_to(noisy, height + -height % multiple, width + -width % multiple)


def crop(padded: Array, height: int, width: int) -> Array:
    """Return the top left (..., height, width): what `pad_to_multiple` was given."""
    return padded[..., :height, :width]


def denoise_tiled(
    denoise: Denoise, noisy: Array, sigma: float, *, tile_height: int, tile_width: int, halo: int, stride: int = 8
) -> Array:
    """Return a picture of any size denoised by an artifact that takes one size only, shaped as `noisy` (1, c, h, w).

    The picture is padded by reflection to a multiple of the stride, and to the tile where it is smaller. Tiles overlap
    by two halos and start at multiples of the stride; each gives what lies a halo or more from its cut edges. A tile at
    the picture's edge ends there, so that the artifact meets the same border as when it is given the whole picture. So
    the result is that of the padded picture in one piece, if no output depends on an input farther away than the halo.

    Args:
        denoise: Takes (1, c, tile_height, tile_width) and sigma.
        noisy: The picture.
        sigma: Standard deviation of the noise on the scale [0, 1].
        tile_height: Pixels, a multiple of the stride.
        tile_width: Pixels, a multiple of the stride.
        halo: Pixels, a multiple of the stride, at least the reach of the network's receptive field to one side.
        stride: Of the network.

    Raises:
        InputError: Sizes that are no multiples of the stride, or a halo that leaves nothing of the tile.
    """
    for name, value in (("tile height", tile_height), ("tile width", tile_width), ("halo", halo)):
        if value < 0 or value % stride:
            raise InputError(f"the {name} {value} is no multiple of the stride {stride}")
    height, width = noisy.shape[-2:]
    padded = _pad_to(noisy, max(height + -height % stride, tile_height), max(width + -width % stride, tile_width))
    denoised = np.empty_like(padded)
    for rows in _spans(padded.shape[-2], tile_height, halo):
        for columns in _spans(padded.shape[-1], tile_width, halo):
            tile = np.ascontiguousarray(padded[..., rows.tile, columns.tile])
            got = denoise(tile, sigma)
            _require_same_shape(got, tile)
            denoised[..., rows.kept, columns.kept] = got[..., rows.kept_of_tile, columns.kept_of_tile]
    return crop(denoised, height, width)


@dataclass(frozen=True, kw_only=True)
class _Span:
    """Where a tile lies along one axis, and which part of it is kept: `kept` in the picture is `kept_of_tile` in it."""

    tile: slice
    kept: slice

    @property
    def kept_of_tile(self) -> slice:
        return slice(self.kept.start - self.tile.start, self.kept.stop - self.tile.start)


def _spans(length: int, tile: int, halo: int) -> list[_Span]:
    """Return the tiles that cover an axis of `length` >= `tile` pixels; the kept parts meet without gap or overlap."""
    step = tile - 2 * halo
    if length > tile and step <= 0:
        raise InputError(
            f"a tile of {tile} pixels has nothing left inside a halo of {halo}",
            remedy=f"take tiles of more than {2 * halo} pixels",
        )
    starts = [*range(0, length - tile, step), length - tile] if length > tile else [0]
    cuts = [0, *(start + halo for start in starts[1:]), length]
    return [_Span(tile=slice(start, start + tile), kept=slice(cuts[i], cuts[i + 1])) for i, start in enumerate(starts)]


def _scores(denoise: Denoise, pictures: PictureSet, protocol: Protocol) -> Iterator[tuple[float, float, int]]:
    """Yield PSNR in dB, SSIM and the count of values that are not finite, for each picture and each seed of it."""
    for index, picture in enumerate(pictures):
        want = picture.pixels.astype(np.float32) / np.float32(255)
        for seed in protocol.seeds:
            noisy = noises.add(protocol.noise, picture.pixels, protocol.sigma255, index=index, seed=seed)
            got = _denoised(denoise, noisy, protocol, picture.name)
            if nonfinite := int(np.count_nonzero(~np.isfinite(got))):
                yield 0.0, 0.0, nonfinite
                continue
            if protocol.output == "uint8":
                got = noises.clipped_uint8(got).astype(np.float32) / np.float32(255)
            yield min(psnr(got, want), CEILING_MDB / 1000), ssim(got, want), 0


def _denoised(denoise: Denoise, noisy: Array, protocol: Protocol, name: str) -> Array:
    padded = pad_to_multiple(noisy[None], protocol.stride)
    denoised = denoise(padded, protocol.sigma255 / 255)
    if denoised.shape != padded.shape:
        raise InputError(f"{name}: the denoiser gave {denoised.shape} for {padded.shape}")
    picture: Array = crop(denoised, *noisy.shape[-2:])[0]
    return picture


def _pad_to(noisy: Array, height: int, width: int) -> Array:
    """Return (..., h, w) padded by reflection at the bottom and the right; a small picture is reflected repeatedly."""
    below, right = height - noisy.shape[-2], width - noisy.shape[-1]
    padded: Array = np.pad(noisy, [(0, 0)] * (noisy.ndim - 2) + [(0, below), (0, right)], mode="reflect")
    return padded


def _require_same_shape(got: NDArray[np.floating], want: NDArray[np.floating]) -> None:
    if got.shape != want.shape:
        raise InputError(f"shape {got.shape} does not compare with {want.shape}")
