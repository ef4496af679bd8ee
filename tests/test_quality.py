import math
from dataclasses import replace

import numpy as np
import pytest
from numpy.lib.stride_tricks import sliding_window_view

from edgekit import models
from edgekit.data import sets
from edgekit.data.sets import Picture, PictureSet
from edgekit.errors import InputError
from edgekit.measure import quality
from edgekit.measure.quality import QualityReport, denoise_tiled, evaluate, nlm, noisy_input, psnr, psnr_drop, ssim


@pytest.fixture
def pictures() -> PictureSet:
    rng = np.random.default_rng(0)
    return PictureSet(
        name="random",
        pictures=tuple(
            Picture(name=f"p{i}", pixels=rng.integers(60, 200, (1, 37 + i, 52), dtype=np.uint8)) for i in range(3)
        ),
    )


def random_picture(*shape: int) -> np.ndarray:
    return np.random.default_rng(5).random(shape, dtype=np.float32)


@pytest.mark.parametrize(("difference", "decibel"), [(0.1, 20), (0.01, 40), (1, 0), (2, -6.0206)])
def test_psnr_of_an_even_error_is_known(difference, decibel):
    want = np.zeros((1, 5, 6), np.float32)
    assert psnr(want + np.float32(difference), want) == pytest.approx(decibel, abs=1e-4)


def test_psnr_counts_the_border_and_what_lies_outside_the_range():
    want = np.zeros((1, 10, 10), np.float32)
    got = want.copy()
    got[0, 0, 0] = -1
    assert psnr(got, want) == pytest.approx(20)


def test_psnr_of_equal_pictures_is_infinite_and_of_nan_minus_infinite():
    picture = random_picture(1, 8, 8)
    assert psnr(picture, picture.copy()) == math.inf
    assert psnr(np.full_like(picture, np.nan), picture) == -math.inf


def test_shapes_that_differ_do_not_compare():
    with pytest.raises(InputError, match=r"\(1, 8, 8\) does not compare with \(1, 8, 9\)"):
        psnr(random_picture(1, 8, 8), random_picture(1, 8, 9))


@pytest.mark.parametrize("channels", [1, 3], ids=["gray", "colour"])
def test_ssim_is_the_formula_of_its_paper(channels):
    want = random_picture(channels, 20, 24)
    got = (want + 0.2 * random_picture(channels, 24, 20).transpose(0, 2, 1)).astype(np.float32)
    ramp = np.exp(-((np.arange(11) - 5.0) ** 2) / (2 * 1.5**2))
    window = np.outer(ramp, ramp) / ramp.sum() ** 2

    def mean(picture: np.ndarray) -> np.ndarray:
        return (sliding_window_view(picture.astype(np.float64), (11, 11), axis=(1, 2)) * window).sum(axis=(3, 4))

    x, y = want.astype(np.float64), got.astype(np.float64)
    mx, my = mean(x), mean(y)
    vx, vy, vxy = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    formula = (2 * mx * my + c1) * (2 * vxy + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    assert ssim(got, want) == pytest.approx(formula.mean(), abs=1e-7)
    assert ssim(want, want) == 1


def test_ssim_of_a_picture_below_its_window_is_refused():
    with pytest.raises(InputError, match="not 10x30"):
        ssim(random_picture(1, 10, 30), random_picture(1, 10, 30))


def test_ssim_of_a_picture_of_one_window_is_taken():
    picture = random_picture(1, quality.SSIM_WINDOW, quality.SSIM_WINDOW)
    assert ssim(picture, picture) == 1


def test_the_noisy_input_scores_the_noise_alone(pictures):
    report = evaluate(noisy_input, pictures, sigma255=25, seeds=(0, 1, 2))
    assert report.psnr_mdb / 1000 == pytest.approx(-20 * math.log10(25 / 255), abs=0.1)
    assert [picture.name for picture in report.pictures] == ["p0", "p1", "p2"]
    assert report.psnr_mdb == round(sum(picture.psnr_mdb for picture in report.pictures) / 3)
    assert report.nonfinite_pixels == 0


def test_the_denoiser_gets_the_padded_noisy_picture_and_its_sigma(pictures):
    seen = []

    def denoise(noisy: np.ndarray, sigma: float) -> np.ndarray:
        seen.append((noisy.shape, noisy.dtype, sigma))
        return noisy

    evaluate(denoise, pictures, sigma255=15, stride=8)
    assert seen == [((1, 1, 40, 56), np.float32, 15 / 255)] * 3


def test_padding_is_cropped_before_scoring(pictures):
    def spoil_padding(noisy: np.ndarray, sigma: float) -> np.ndarray:
        spoiled = noisy.copy()
        spoiled[..., 52:] = 9
        return spoiled

    assert evaluate(spoil_padding, pictures, sigma255=25) == evaluate(noisy_input, pictures, sigma255=25)


def test_a_picture_is_scored_with_the_mean_of_its_seeds(pictures):
    single = [evaluate(noisy_input, pictures, sigma255=25, seeds=(seed,)) for seed in (0, 4)]
    both = evaluate(noisy_input, pictures, sigma255=25, seeds=(0, 4))
    assert single[0].psnr_mdb != single[1].psnr_mdb
    for i in range(3):
        mean = sum(one.pictures[i].psnr_mdb for one in single) / 2
        assert both.pictures[i].psnr_mdb == pytest.approx(mean, abs=1)


@pytest.mark.parametrize("error", [0.0101, 0.0102, 0.0103, 0.0104])
def test_figures_are_rounded_to_the_nearest(pictures, error):
    report = evaluate(lambda noisy, sigma: noisy + np.float32(error), pictures, sigma255=0)
    for figure in (report, *report.pictures):
        assert figure.psnr_mdb == round(-20_000 * math.log10(error))


def test_a_perfect_denoiser_scores_the_ceiling(pictures):
    report = evaluate(noisy_input, pictures, sigma255=0)
    assert (report.psnr_mdb, report.ssim_e5) == (quality.CEILING_MDB, 100_000)


def test_an_eight_bit_output_is_clipped_and_rounded_before_scoring(pictures):
    def far_out(noisy: np.ndarray, sigma: float) -> np.ndarray:
        return np.full_like(noisy, 7)

    as_float = evaluate(far_out, pictures, sigma255=25)
    as_uint8 = evaluate(far_out, pictures, sigma255=25, output="uint8")
    assert as_float.psnr_mdb < -15_000 < 0 < as_uint8.psnr_mdb
    assert (as_float.protocol.output, as_uint8.protocol.output) == ("float32", "uint8")


def test_nan_scores_nothing_and_is_counted(pictures):
    def broken(noisy: np.ndarray, sigma: float) -> np.ndarray:
        spoiled = noisy.copy()
        spoiled[..., 0, 0] = np.nan
        return spoiled

    report = evaluate(broken, pictures, sigma255=25)
    assert (report.psnr_mdb, report.ssim_e5, report.nonfinite_pixels) == (0, 0, 3)


def test_a_denoiser_that_changes_the_shape_is_refused(pictures):
    with pytest.raises(InputError, match=r"p0: the denoiser gave \(1, 1, 20, 28\) for \(1, 1, 40, 56\)"):
        evaluate(lambda noisy, sigma: noisy[..., ::2, ::2], pictures, sigma255=25)


def test_nothing_to_measure_is_refused(pictures):
    with pytest.raises(InputError, match="3 pictures and 0 seeds"):
        evaluate(noisy_input, pictures, sigma255=25, seeds=())
    with pytest.raises(InputError, match="0 pictures"):
        evaluate(noisy_input, PictureSet(name="none", pictures=()), sigma255=25)


def test_clipped_input_is_another_protocol(pictures):
    unclipped = evaluate(noisy_input, pictures, sigma255=50)
    clipped = evaluate(noisy_input, pictures, sigma255=50, noise="gaussian-uint8")
    assert clipped.psnr_mdb > unclipped.psnr_mdb + 100
    with pytest.raises(InputError, match="noise is gaussian in one and gaussian-uint8 in the other"):
        psnr_drop(unclipped, clipped)


def losing(before: QualityReport, *losses: int) -> QualityReport:
    """Return a report whose pictures have lost so many thousandths of a dB."""
    pictures = zip(before.pictures, losses, strict=True)
    return replace(before, pictures=tuple(replace(one, psnr_mdb=one.psnr_mdb - loss) for one, loss in pictures))


def test_a_drop_is_the_exact_difference_within_its_bounds(pictures):
    before = evaluate(noisy_input, pictures, sigma255=25)
    after = replace(losing(before, 100, 200, 600), psnr_mdb=before.psnr_mdb - 300)
    drop = psnr_drop(before, after)
    assert drop.drop_mdb == 300
    assert 100 <= drop.low_mdb < 300 < drop.high_mdb <= 600
    assert psnr_drop(after, before).drop_mdb == -300


def test_the_worst_drop_is_that_of_the_picture_that_loses_most(pictures):
    before = evaluate(noisy_input, pictures, sigma255=25)
    after = losing(before, 100, 600, -200)
    assert quality.worst_drop_mdb(before, after) == 600
    assert quality.worst_drop_mdb(after, before) == 200


def test_the_bound_of_a_drop_is_rounded_outwards(pictures):
    before = evaluate(noisy_input, pictures, sigma255=25)
    after = losing(before, 1, 2, 2)
    # The quarter and three quarters of the resamples' means lie at 4/3 and 2.
    drop = psnr_drop(before, after, confidence=0.5)
    assert (drop.low_mdb, drop.high_mdb) == (1, 2)


@pytest.mark.parametrize("channels", [1, 3], ids=["gray", "colour"])
def test_non_local_means_beats_the_noisy_input_by_far(channels):
    small = sets.centred(sets.embedded("evaluation", channels=channels), 96, 96)
    before = evaluate(noisy_input, small, sigma255=25)
    after = evaluate(nlm, small, sigma255=25)
    assert after.psnr_mdb > before.psnr_mdb + 5000
    assert after.ssim_e5 > before.ssim_e5 + 15_000


def test_non_local_means_smooths_in_proportion_to_the_noise():
    noisy = random_picture(1, 1, 24, 24)
    np.testing.assert_allclose(nlm(noisy / 4, 0.05), nlm(noisy, 0.2) / 4, atol=1e-6)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 50), (37, 8), (321, 481)])
def test_padding_reflects_and_cropping_takes_it_back(height, width):
    picture = random_picture(1, 1, height, width)
    padded = quality.pad_to_multiple(picture, 8)
    assert padded.shape[-2] % 8 == padded.shape[-1] % 8 == 0
    assert padded.shape[-2] < height + 8
    np.testing.assert_array_equal(quality.crop(padded, height, width), picture)
    if width > 8 and width % 8:
        np.testing.assert_array_equal(padded[..., :height, width], picture[..., width - 2])


def integer_picture(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 99, (1, 1, height, width)).astype(np.float32)


def cross_of(reach: int):
    """Return a filter that sees `reach` pixels each way, zeros outside; exact, for it adds whole numbers."""

    def denoise(noisy: np.ndarray, sigma: float) -> np.ndarray:
        around = np.pad(noisy, [(0, 0), (0, 0), (reach, reach), (reach, reach)])
        height, width = noisy.shape[-2:]
        total = np.zeros_like(noisy)
        for place in range(2 * reach + 1):
            weight = np.float32(place + 1)
            total += weight * around[..., place : place + height, reach : reach + width]
            total += weight * around[..., reach : reach + height, place : place + width]
        return total

    return denoise


def stamp(noisy: np.ndarray, sigma: float) -> np.ndarray:
    """Add each pixel's place within its 8x8 cell: a tile that starts off the stride shows."""
    rows, columns = np.indices(noisy.shape[-2:]) % 8
    return noisy + (rows * 8 + columns).astype(np.float32)


def whole(denoise, noisy: np.ndarray, tile_height: int, tile_width: int) -> np.ndarray:
    """Return what the denoiser makes of the padded picture in one piece."""
    height, width = noisy.shape[-2:]
    below, right = max(-height % 8, tile_height - height), max(-width % 8, tile_width - width)
    return denoise(np.pad(noisy, [(0, 0), (0, 0), (0, below), (0, right)], mode="reflect"), 0.1)[..., :height, :width]


SIZES = [(64, 64), (64, 96), (65, 63), (5, 9), (200, 40), (131, 257), (72, 64), (1, 300)]


@pytest.mark.parametrize(("height", "width"), SIZES, ids=str)
@pytest.mark.parametrize("denoise", [noisy_input, cross_of(7), cross_of(8), stamp], ids=["identity", "7", "8", "stamp"])
def test_tiles_make_exactly_the_whole(denoise, height, width):
    noisy = integer_picture(height, width)
    tiled = denoise_tiled(denoise, noisy, 0.1, tile_height=64, tile_width=48, halo=8)
    np.testing.assert_array_equal(tiled, whole(denoise, noisy, 64, 48))


def test_a_halo_below_the_reach_shows():
    noisy = integer_picture(131, 257)
    tiled = denoise_tiled(cross_of(9), noisy, 0.1, tile_height=64, tile_width=64, halo=8)
    assert (tiled != whole(cross_of(9), noisy, 64, 64)).any()


def test_every_tile_has_the_artifacts_own_shape():
    shapes = []

    def fixed(noisy: np.ndarray, sigma: float) -> np.ndarray:
        shapes.append((noisy.shape, noisy.flags.c_contiguous, sigma))
        return noisy

    denoise_tiled(fixed, random_picture(1, 3, 100, 70), 0.2, tile_height=64, tile_width=48, halo=8)
    assert set(shapes) == {((1, 3, 64, 48), True, 0.2)}
    assert len(shapes) == 2 * 2


@pytest.mark.parametrize(
    ("tile", "halo", "message"),
    [(60, 8, "tile height 60"), (64, 4, "halo 4"), (64, -8, "halo -8"), (64, 32, "nothing left inside a halo of 32")],
)
def test_tiles_that_cannot_work_are_refused(tile, halo, message):
    with pytest.raises(InputError, match=message):
        denoise_tiled(noisy_input, random_picture(1, 1, 80, 80), 0.1, tile_height=tile, tile_width=64, halo=halo)


def test_a_picture_of_one_tile_needs_no_room_for_a_halo():
    noisy = integer_picture(64, 64)
    tiled = denoise_tiled(cross_of(32), noisy, 0.1, tile_height=64, tile_width=64, halo=32)
    np.testing.assert_array_equal(tiled, cross_of(32)(noisy, 0.1))


def test_what_looks_at_one_pixel_alone_needs_no_halo():
    noisy = integer_picture(80, 100)
    tiled = denoise_tiled(stamp, noisy, 0.1, tile_height=64, tile_width=64, halo=0)
    np.testing.assert_array_equal(tiled, whole(stamp, noisy, 64, 64))


def test_a_student_in_tiles_gives_the_picture_of_the_whole():
    import torch

    torch.manual_seed(0)
    student = models.create("nano").eval()

    def denoise(noisy: np.ndarray, sigma: float) -> np.ndarray:
        with torch.inference_mode():
            level = torch.full((1, 1, 1, 1), sigma)
            return student(torch.from_numpy(noisy), level).numpy()

    noisy = random_picture(1, 1, 320, 200)
    tiled = denoise_tiled(denoise, noisy, 0.1, tile_height=192, tile_width=192, halo=72)
    np.testing.assert_allclose(tiled, whole(denoise, noisy, 192, 192), rtol=0, atol=2e-6)
