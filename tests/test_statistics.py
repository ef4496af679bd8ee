import tracemalloc

import numpy as np
import pytest

from edgekit.errors import InputError
from edgekit.measure import statistics
from edgekit.measure.statistics import Interval, median_interval, paired_difference, sign_test_interval


def mean_interval(values: list[float], **asked: float) -> Interval:
    """Return the mean of values and its interval: what is lost from them to zero."""
    return paired_difference(values, [0.0] * len(values), **asked)


@pytest.fixture
def values() -> list[float]:
    return np.random.default_rng(0).exponential(size=60).tolist()


@pytest.mark.parametrize("interval", [mean_interval, median_interval], ids=["mean", "median"])
def test_the_same_seed_gives_the_same_interval_and_another_seed_another(values, interval):
    assert interval(values, seed=3) == interval(values, seed=3)
    assert interval(values, seed=3) != interval(values, seed=4)


@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("at_once", [1, 1000, 10**9])
def test_an_interval_is_the_same_however_much_is_drawn_at_once(values, monkeypatch, at_once, block):
    whole = median_interval(values, block=block)
    monkeypatch.setattr(statistics, "_AT_ONCE", at_once)
    assert median_interval(values, block=block) == whole


def test_many_values_take_no_more_memory_than_few():
    tracemalloc.start()
    try:
        median_interval(np.arange(20_000.0).tolist(), block=27)
        assert tracemalloc.get_traced_memory()[1] < 100 * 2**20
    finally:
        tracemalloc.stop()


def test_estimates_are_the_mean_and_the_median(values):
    assert mean_interval(values).estimate == pytest.approx(np.mean(values))
    assert median_interval(values).estimate == sign_test_interval(values).estimate == np.median(values)


def test_the_interval_of_a_mean_is_that_of_theory_for_normal_values():
    values = np.random.default_rng(1).standard_normal(400)
    found = mean_interval(values.tolist())
    half = 1.96 * values.std(ddof=1) / 20
    assert found.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.1 * half)


@pytest.mark.parametrize(
    ("interval", "true"), [(mean_interval, 1), (median_interval, np.log(2))], ids=["mean", "median"]
)
def test_nineteen_of_twenty_intervals_hold_the_true_value(interval, true):
    rng = np.random.default_rng(2)
    found = [interval(rng.exponential(size=40).tolist(), seed=trial) for trial in range(200)]
    held = sum(one.low <= true <= one.high for one in found)
    assert 0.89 * 200 <= held <= 0.99 * 200


@pytest.mark.parametrize(
    ("count", "confidence", "outside"),
    [(1, 0.95, 0), (5, 0.95, 0), (8, 0.95, 0), (9, 0.95, 1), (24, 0.95, 6), (100, 0.95, 39), (24, 0.99, 5)],
)
def test_the_interval_of_the_sign_test_is_that_of_its_table(count, confidence, outside):
    values = np.random.default_rng(2).permutation(count).astype(float)
    found = sign_test_interval(values.tolist(), confidence=confidence)
    assert (found.low, found.high) == (outside, count - 1 - outside)
    assert found.estimate == (count - 1) / 2


def test_more_confidence_makes_the_interval_wider(values):
    narrow, wide = mean_interval(values, confidence=0.8), mean_interval(values, confidence=0.99)
    assert wide.low < narrow.low < narrow.estimate < narrow.high < wide.high


def test_blocks_widen_the_interval_of_values_that_resemble_their_neighbours():
    drift = np.repeat(np.random.default_rng(3).standard_normal(15), 8).tolist()
    single, blocks = median_interval(drift), median_interval(drift, block=8)
    assert blocks.high - blocks.low > 1.5 * (single.high - single.low)


def test_a_small_steady_drop_shows_among_pictures_that_differ_much():
    rng = np.random.default_rng(4)
    before = rng.normal(30, 3, size=12)
    after = before - 0.05 - rng.normal(0, 0.01, size=12)
    found = paired_difference(before.tolist(), after.tolist())
    assert found.low > 0.03
    assert found.high < 0.07
    alone = mean_interval(after.tolist())
    assert alone.high - alone.low > 1


def test_equal_values_leave_no_doubt():
    found = mean_interval([2.0, 2.0, 2.0])
    assert (found.low, found.estimate, found.high) == (2, 2, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mean_interval([]), "no values"),
        (lambda: mean_interval([1.0, float("nan")]), "not finite: nan"),
        (lambda: mean_interval([1.0], confidence=95), "confidence 95"),
        (lambda: mean_interval([1.0], confidence=1), "confidence 1 "),
        (lambda: mean_interval([1.0], confidence=0), "confidence 0 "),
        (lambda: sign_test_interval([1.0], confidence=95), "confidence 95"),
        (lambda: median_interval([1.0, 2.0], block=3), "blocks of 3 .* 2 values"),
        (lambda: paired_difference([1.0], [1.0, 2.0]), "1 and 2 values"),
    ],
    ids=["none", "nan", "confidence", "certainty", "no confidence", "confidence of the sign test", "block", "pairs"],
)
def test_what_has_no_interval_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()
