import numpy as np
import pytest

from edgekit.data import noise
from edgekit.errors import InputError


@pytest.fixture
def gray() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (1, 40, 56), dtype=np.uint8)


@pytest.fixture
def colour() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (3, 24, 32), dtype=np.uint8)


@pytest.mark.parametrize("sigma255", [0, 15, 25, 50])
@pytest.mark.parametrize("index", [0, 11])
def test_gray_noise_is_that_of_the_published_protocol(gray, sigma255, index):
    height, width = gray.shape[1:]
    drawn = np.random.RandomState(index).randn(height, width) * sigma255 / 255
    noisy = noise.add_gaussian(gray, sigma255, index=index)
    assert noisy.dtype == np.float32
    np.testing.assert_allclose(noisy[0], gray[0] / 255 + drawn, rtol=0, atol=1e-7)


def test_colour_noise_is_drawn_over_height_width_channel(colour):
    drawn = np.random.RandomState(3).randn(24, 32, 3) * 25 / 255
    noisy = noise.add_gaussian(colour, 25, index=3)
    np.testing.assert_allclose(noisy.transpose(1, 2, 0), colour.transpose(1, 2, 0) / 255 + drawn, rtol=0, atol=1e-7)


def test_a_float_picture_gets_the_same_noise(gray):
    as_float = gray.astype(np.float32) / np.float32(255)
    np.testing.assert_allclose(
        noise.add_gaussian(as_float, 25, index=2), noise.add_gaussian(gray, 25, index=2), rtol=0, atol=2e-7
    )


def test_noise_is_not_clipped_and_has_the_asked_strength():
    noisy = noise.add_gaussian(np.full((1, 256, 256), 255, np.uint8), 25, index=0)
    assert noisy.max() > 1.2
    assert noisy.std() * 255 == pytest.approx(25, rel=0.01)
    assert noisy.mean() == pytest.approx(1, abs=0.002)


def test_another_index_or_seed_draws_other_noise(gray):
    drawn = [noise.add_gaussian(gray, 25, index=i, seed=s).tobytes() for i in range(3) for s in range(3)]
    assert len(set(drawn)) == 9
    assert drawn[0] == noise.add_gaussian(gray, 25, index=0, seed=0).tobytes()


def test_a_phone_sees_clipped_whole_levels(gray):
    seen = noise.add("gaussian-uint8", gray, 50, index=0)
    levels = seen * 255
    assert seen.dtype == np.float32
    assert (seen.min(), seen.max()) == (0, 1)
    np.testing.assert_allclose(levels, np.rint(levels), atol=1e-4)
    unclipped = noise.add("gaussian", gray, 50, index=0)
    inside = (unclipped > 0) & (unclipped < 1)
    assert np.abs(seen - unclipped)[inside].max() <= 0.5 / 255 + 1e-6


def test_rounding_to_eight_bits_clips_first():
    levels = noise.clipped_uint8(np.array([-1, 0, 0.4 / 255, 0.6 / 255, 1, 300], np.float32))
    assert levels.tolist() == [0, 0, 0, 1, 255, 255]


@pytest.mark.parametrize("sigma255", [-1, float("nan"), float("inf")])
def test_an_impossible_sigma_is_named(gray, sigma255):
    with pytest.raises(InputError, match=f"sigma {sigma255}"):
        noise.add_gaussian(gray, sigma255, index=0)


@pytest.mark.parametrize(("index", "seed"), [(-1, 0), (0, -1), (0, 5000)])
def test_an_index_or_seed_out_of_range_is_named(gray, index, seed):
    with pytest.raises(InputError, match=f"picture {index} with seed {seed}"):
        noise.add_gaussian(gray, 25, index=index, seed=seed)


def test_a_picture_without_channels_is_refused(gray):
    with pytest.raises(InputError, match=r"\(40, 56\)"):
        noise.add_gaussian(gray[0], 25, index=0)


def test_an_unknown_noise_names_its_neighbour(gray):
    with pytest.raises(InputError, match="unknown noise 'gausian'; did you mean 'gaussian'"):
        noise.add("gausian", gray, 25, index=0)
