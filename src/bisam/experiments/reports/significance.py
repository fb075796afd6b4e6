"""Significance: Student's test of paired differences, Holm's adjustment, and the difference that n pairs can show.

    one = student([0.4, 0.1, 0.7, 0.3])
    one.mean, one.low, one.high, one.p     # 95 % interval, two-sided p value
    one.detectable(level=0.05)             # the true mean that 80 % of such samples would show
    holm([one.p, 0.03, 0.2])               # adjusted for their number

A comparison is decided if its adjusted p value is below `ALPHA`, whatever its interval says: an interval stands for one
comparison and not for a page of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import isfinite, isnan, nan, sqrt
from statistics import mean, stdev
from typing import TypeVar

from scipy.special import nctdtrinc, stdtr, stdtrit

ALPHA = 0.05
"""Level of the tests; intervals are of 1 - ALPHA."""
POWER = 0.8
"""Probability with which a detectable difference is found."""
_EQUAL = 1e-9  # relative spread below which differences are equal but for rounding


@dataclass(frozen=True)
class Difference:
    """A mean over pairs, with Student's interval and test; nan where there is no test, see `student`.

    Attributes:
        mean: of the differences.
        low: lower end of the 95 % interval.
        high: its upper end.
        pairs: number of differences.
        p: two-sided p value of the hypothesis that the true mean is 0, not adjusted.
        spread: standard deviation of the differences; 0 if they are equal.
    """

    mean: float
    low: float
    high: float
    pairs: int
    p: float = nan
    spread: float = nan

    @property
    def excludes_zero(self) -> bool:
        """Whether 0 is outside the interval. This decides nothing where there are other comparisons."""
        return self.low > 0 or self.high < 0

    def detectable(self, level: float = ALPHA) -> float:
        """The smallest true difference that this many pairs of this spread show with probability `POWER`.

        Args:
            level: of the two-sided test, for instance ALPHA / m for the first step of Holm's procedure with m
                comparisons.
        """
        return nan if isnan(self.p) else self.spread * detectable_effect(self.pairs, level)


@dataclass(frozen=True, kw_only=True)
class Tested:
    """A difference that is tested among others, the base of the comparisons of a report.

    Attributes:
        difference: of the pairs.
        adjusted: p, adjusted over the family (Holm); nan if there is no test.
        family: number of comparisons in the family, those without a test included.
        primary: whether the study has registered it.
        registered: number of pairs that the study has registered, 0 for none. With fewer nothing is decided: a study
            that stops when it looks decided is wrong more often than its p values say.
    """

    difference: Difference
    adjusted: float = nan
    family: int = 1
    primary: bool = False
    registered: int = 0

    @property
    def interim(self) -> bool:
        """Whether there are fewer pairs than were registered."""
        return self.difference.pairs < self.registered

    @property
    def decided(self) -> bool:
        """Whether the adjusted p is below `ALPHA`, with all registered pairs."""
        return self.adjusted < ALPHA and not self.interim

    @property
    def detectable(self) -> tuple[float, float]:
        """The smallest true difference that this n shows: in a test by itself, and at the first step of Holm's."""
        return self.difference.detectable(), self.difference.detectable(ALPHA / self.family)


T = TypeVar("T", bound=Tested)


def adjusted(comparisons: Iterable[T], family: Callable[[T], Hashable] = lambda one: one.primary) -> list[T]:
    """The comparisons with adjusted p values, in the same order.

    One without a test, as where all differences are equal, counts as one that is not rejected: the number of
    comparisons must not depend on their results.

    Args:
        comparisons: all of them.
        family: those with the same value are adjusted together; by default the primary ones, and all others.
    """
    found = list(comparisons)
    families: dict[Hashable, list[int]] = defaultdict(list)
    for i, one in enumerate(found):
        families[family(one)].append(i)
    for members in families.values():
        values = [found[i].difference.p for i in members]
        for i, p, value in zip(members, holm([1.0 if isnan(v) else v for v in values]), values, strict=True):
            found[i] = replace(found[i], adjusted=nan if isnan(value) else p, family=len(members))
    return found


def student(values: Sequence[float]) -> Difference:
    """The mean of one or more differences, with Student's interval and t test.

    There is no test, and so no interval, for a single difference; for equal ones, whose spread says nothing about how
    far the next one would be (test scores have few digits, and two or three runs easily agree); and if one is not
    finite, as after a divergence.
    """
    n = len(values)
    if not all(map(isfinite, values)):
        return Difference(nan, nan, nan, n)
    centre = mean(values)
    if n < 2:
        return Difference(centre, nan, nan, n)
    if max(values) - min(values) <= _EQUAL * max(*map(abs, values), 1e-3):
        return Difference(centre, nan, nan, n, spread=0.0)
    spread = stdev(values)
    error = spread / sqrt(n)
    reach = float(stdtrit(n - 1, 1 - ALPHA / 2)) * error
    p = 2 * float(stdtr(n - 1, -abs(centre) / error))
    return Difference(centre, centre - reach, centre + reach, n, p, spread)


@lru_cache(maxsize=1024)
def detectable_effect(pairs: int, level: float = ALPHA, power: float = POWER) -> float:
    """The smallest true mean, in standard deviations of the differences, that a two-sided t test finds.

    The test statistic has a noncentral t distribution. To find the mean in the wrong direction does not count, which is
    less than 1e-5 of the power.

    Args:
        pairs: number of differences, at least 2.
        level: of the test.
        power: probability of finding it.

    Raises:
        ValueError: there are fewer than two pairs, or a probability is not in (0, 1).
    """
    if pairs < 2:
        raise ValueError(f"a t test needs at least 2 pairs, got {pairs}")
    for name, value in (("level", level), ("power", power)):
        if not 0 < value < 1:
            raise ValueError(f"{name} must be in (0, 1), got {value}")
    critical = stdtrit(pairs - 1, 1 - level / 2)
    return float(nctdtrinc(pairs - 1, 1 - power, critical)) / sqrt(pairs)


def holm(values: Sequence[float]) -> list[float]:
    """P values adjusted for their number (Holm, 1979, https://www.jstor.org/stable/4615733).

    The probability of any adjusted value below 0.05 is at most 5 % if all null hypotheses are true. Values that are nan
    stay so, and do not count: give 1 for a test that is to count although it has no result.
    """
    order = sorted((i for i, p in enumerate(values) if not isnan(p)), key=lambda i: values[i])
    adjusted, largest = [nan] * len(values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * values[i]))
        adjusted[i] = largest
    return adjusted
