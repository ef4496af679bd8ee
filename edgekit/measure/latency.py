"""Latency of two programs against each other, and whether their ratio keeps a limit.

A machine's speed drifts with its heat and its neighbours. So the two run by turns in one process, and what is compared
is each run with its own neighbour.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypeAlias

from edgekit.errors import InputError
from edgekit.measure.statistics import median_interval, sign_test_interval

Decision: TypeAlias = Literal["pass", "fail", "inconclusive"]

WARM_UP_RUNS = 3
# With fewer, no 95 % interval of a median exists: 5 values all lie on one side of it with a chance of 6 %.
LEAST_PAIRS = 6


@dataclass(frozen=True, kw_only=True)
class Paired:
    """Run times in microseconds; `a_us[i]` and `b_us[i]` were measured one after the other."""

    a_us: tuple[int, ...]
    b_us: tuple[int, ...]

    @property
    def a_median_us(self) -> int:
        """Median time of the first program."""
        return round(statistics.median(self.a_us))

    @property
    def b_median_us(self) -> int:
        """Median time of the second program."""
        return round(statistics.median(self.b_us))


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """How many times longer the first program takes than the second, in thousandths, with the bounds of its interval.

    The bounds are rounded outwards.
    """

    ratio_e3: int
    low_e3: int
    high_e3: int
    confidence: float
    pairs: int


def interleave(
    a: Callable[[], None],
    b: Callable[[], None],
    *,
    min_pairs: int,
    max_seconds: float,
    clock_ns: Callable[[], int] = time.perf_counter_ns,
) -> Paired:
    """Return the run times of `a` and `b`, measured by turns: a b, b a, a b, ...

    Both are warmed up first. Pairs go on until `max_seconds` have passed, and never fewer than `min_pairs`: the count
    does not depend on what was measured, which would bend the interval. The order swaps with each pair, so that
    neither always runs in the other's wake. Python's garbage collection is off meanwhile.

    Args:
        a: Runs the first program once.
        b: Runs the second program once.
        min_pairs: At least 6.
        max_seconds: Time after which no further pair is begun, without the warm-up.
        clock_ns: Returns the time in nanoseconds.

    Raises:
        InputError: Fewer than 6 pairs asked for.
    """
    if min_pairs < LEAST_PAIRS:
        raise InputError(f"{min_pairs} pairs bound nothing", remedy=f"measure {LEAST_PAIRS} or more")
    for _ in range(WARM_UP_RUNS):
        a()
        b()
    a_us: list[int] = []
    b_us: list[int] = []
    with _without_garbage_collection():
        end_ns = clock_ns() + round(max_seconds * 1e9)
        while len(a_us) < min_pairs or clock_ns() < end_ns:
            turns = [(a, a_us), (b, b_us)]
            for run, times_us in turns if len(a_us) % 2 == 0 else reversed(turns):
                times_us.append(_time_us(run, clock_ns))
    return Paired(a_us=tuple(a_us), b_us=tuple(b_us))


def ratio_with_bound(paired: Paired, *, confidence: float = 0.95, seed: int = 0) -> Ratio:
    """Return the median of `a / b` over the pairs, with the wider of its bootstrap's and its sign test's bounds.

    Neighbouring pairs are drawn together in blocks of the cube root of their number, for they are alike. Of few pairs
    that alone is too narrow: of 8 its 95 % hold the true ratio 85 times of 100.

    Raises:
        InputError: Fewer than 6 pairs, or a confidence that is not between 0 and 1.
    """
    if len(paired.a_us) < LEAST_PAIRS:
        raise InputError(f"{len(paired.a_us)} pairs bound nothing", remedy=f"measure {LEAST_PAIRS} or more")
    ratios = [a / b for a, b in zip(paired.a_us, paired.b_us, strict=True)]
    block = round(len(ratios) ** (1 / 3))
    found = median_interval(ratios, block=block, confidence=confidence, seed=seed)
    least = sign_test_interval(ratios, confidence=confidence)
    return Ratio(
        ratio_e3=round(found.estimate * 1000),
        low_e3=math.floor(min(found.low, least.low) * 1000),
        high_e3=math.ceil(max(found.high, least.high) * 1000),
        confidence=confidence,
        pairs=len(ratios),
    )


def decide(ratio: Ratio, limit: float) -> Decision:
    """Return whether the ratio reaches the limit: `inconclusive` where its interval holds the limit.

    Args:
        ratio: Time of the reference over time of the artifact: the speed-up.
        limit: The least speed-up that passes, as 4.0.
    """
    # A thousand times 16.1 is more than 16100 in binary floating point.
    limit_e3 = round(1000 * limit, 6)
    if ratio.low_e3 >= limit_e3:
        return "pass"
    return "fail" if ratio.high_e3 < limit_e3 else "inconclusive"


def _time_us(run: Callable[[], None], clock_ns: Callable[[], int]) -> int:
    start_ns = clock_ns()
    run()
    # A run below half a microsecond still took some time, and times are divided by.
    return max(round((clock_ns() - start_ns) / 1000), 1)


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
