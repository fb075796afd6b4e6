"""Correlations: known answers, slow twins, and how often intervals and tests are right on simulated runs."""

from __future__ import annotations

import itertools
import math
from statistics import NormalDist

import numpy as np
import pytest

pytest.importorskip("scipy")

from scipy import stats

from bisam.experiments.reports.correlations import (
    correlate,
    estimate,
    kendall,
    permutation_p,
    spearman,
    stronger,
    within,
)

UP = np.arange(6.0)
NAN = math.nan


# One seed


@pytest.mark.parametrize("statistic", [spearman, kendall])
def test_a_perfect_order_is_one_whatever_the_scale(statistic):
    assert statistic(UP, np.exp(UP)) == pytest.approx(1, abs=1e-12)
    assert statistic(UP, -(UP**3)) == pytest.approx(-1, abs=1e-12)


@pytest.mark.parametrize(
    ("statistic", "value"),
    [
        # Ranks of y are 1.5, 1.5, 3, 4: Pearson's correlation of (1, 2, 3, 4) with them is 4.5 / sqrt(5 * 4.5).
        (spearman, 4.5 / math.sqrt(5 * 4.5)),
        # 5 concordant pairs and one tie in y: 5 / sqrt(6 * 5).
        (kendall, 5 / math.sqrt(6 * 5)),
    ],
)
def test_ties_count_as_the_textbook_says(statistic, value):
    assert statistic(np.array([1.0, 2, 3, 4]), np.array([7.0, 7, 8, 9])) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("statistic", [spearman, kendall])
def test_a_correlation_with_a_constant_is_undefined_without_a_warning(statistic):
    assert math.isnan(statistic(UP, np.full(6, 0.1)))
    assert math.isnan(statistic(np.zeros(6), UP))
    assert math.isnan(statistic(UP[:1], UP[:1]))


# Over seeds


def test_correlations_are_computed_for_each_seed_and_averaged():
    measure = np.stack([UP, UP, UP])
    error = np.stack([UP, UP[::-1], np.array([0.0, 1, 2, 3, 5, 4])])
    found = correlate(measure, error, ["a"] * 6)
    assert found.each == pytest.approx([1, -1, 1 - 6 * 2 / (6 * 35)], abs=1e-12)
    assert found.spearman.mean == pytest.approx(found.each.mean(), abs=1e-12)
    assert found.kendall.mean == pytest.approx((1 - 1 + 13 / 15) / 3, abs=1e-12)
    assert found.spearman.seeds == found.kendall.seeds == 3
    assert found.spearman.low < found.spearman.mean < found.spearman.high


def test_a_seed_whose_correlation_is_undefined_does_not_count():
    measure = np.stack([UP, np.ones(6), UP])
    found = correlate(measure, np.stack([UP, UP, UP]), ["a"] * 6)
    assert (found.spearman.mean, found.spearman.seeds) == (pytest.approx(1), 2)
    none = correlate(np.ones((3, 6)), np.stack([UP] * 3), ["a"] * 6)
    assert (none.spearman.seeds, none.kendall.seeds, none.within.seeds) == (0, 0, 0)
    assert all(map(math.isnan, (none.spearman.mean, none.spearman.low, none.within.mean, none.p)))


def test_within_is_the_mean_over_the_groups_of_each_seed():
    groups = ["a", "a", "a", "b", "b", "b", "c"]  # one configuration has no correlation
    measure = np.array([[1.0, 2, 3, 1, 2, 3, 9], [1, 2, 3, 5, 5, 5, 9]])
    error = np.array([[1.0, 2, 3, 3, 1, 2, 0], [3, 2, 1, 1, 2, 3, 0]])
    assert within(measure, error, groups) == pytest.approx([(1 - 1 / 3) / 2, -1], abs=1e-12)
    assert np.isnan(within(np.ones((2, 7)), error, groups)).all()


def test_a_difference_between_methods_is_told_from_one_within_them():
    """Simpson's paradox: methods with the larger measure have the larger error, and within each it is the reverse."""
    methods = [name for name in "abcd" for _ in range(3)]
    measure = np.tile([10.0 * i + j for i in range(4) for j in range(3)], (5, 1))
    error = np.tile([10.0 * i - j for i in range(4) for j in range(3)], (5, 1))
    found = correlate(measure, error, methods)
    assert found.spearman.mean == pytest.approx(1 - 6 * 32 / (12 * 143), abs=1e-12)  # 4 reversed triples: d² is 8 each
    assert found.within.mean == pytest.approx(-1, abs=1e-12)
    assert found.p < 0.001


@pytest.mark.parametrize(
    ("measure", "groups", "message"),
    [
        (np.ones((2, 5)), "aaaaaa", r"same shape .* got \(2, 5\), \(2, 6\) and 6 groups"),
        (np.ones((2, 6)), "aaaaa", "and 5 groups"),
        (np.ones(6), "aaaaaa", r"got \(6,\)"),
        (np.full((2, 6), NAN), "aaaaaa", "measure must be finite, got nan: leave such runs out"),
        (np.full((2, 6), np.inf), "aaaaaa", "measure must be finite, got inf"),
    ],
)
def test_what_cannot_be_correlated_is_refused(measure, groups, message):
    with pytest.raises(ValueError, match=message):
        correlate(measure, np.stack([UP, UP]), list(groups))


# Intervals


def bca(values: np.ndarray, count: int = 40_000) -> tuple[float, float]:
    """A slow twin, from the formulas of Efron (1987), with other random numbers."""
    random, n, normal = np.random.default_rng(99), len(values), NormalDist()
    means = np.sort([values[random.integers(0, n, n)].mean() for _ in range(count)])
    share = ((means < values.mean()).mean() + (means <= values.mean()).mean()) / 2
    bias = normal.inv_cdf(share)
    left = np.array([np.delete(values, i).mean() for i in range(n)])
    away = left.mean() - left
    acceleration = (away**3).sum() / (6 * (away**2).sum() ** 1.5)

    def end(level: float) -> float:
        z = bias + normal.inv_cdf(level)
        return float(np.quantile(means, normal.cdf(bias + z / (1 - acceleration * z))))

    return end(0.025), end(0.975)


def test_an_interval_equals_a_slow_twin():
    values = np.random.default_rng(3).exponential(size=12)
    found, (low, high) = estimate(values), bca(values, 10_000)
    width = high - low
    assert found.mean == pytest.approx(values.mean(), abs=1e-12)
    assert found.low == pytest.approx(low, abs=0.03 * width)  # the standard error of both quantiles
    assert found.high == pytest.approx(high, abs=0.03 * width)
    assert high - found.mean > 1.2 * (found.mean - low)  # not symmetric, as a percentile of a skewed mean is


def test_an_interval_is_that_of_its_seed_and_of_finite_values():
    values = np.random.default_rng(4).normal(size=9)
    assert estimate(values) == estimate(values) == estimate(np.insert(values, 3, NAN))
    assert estimate(values) != estimate(values, seed=1)


def test_few_or_equal_values_have_the_interval_that_they_can_have():
    one, equal, none = (estimate(np.array(values)) for values in ([0.5], [0.5, 0.5, 0.5], [NAN, NAN]))
    assert (one.mean, one.seeds) == (0.5, 1)
    assert math.isnan(one.low)
    assert math.isnan(one.high)
    assert not one.excludes_zero
    assert (equal.mean, equal.low, equal.high, equal.seeds) == (0.5, 0.5, 0.5, 3)
    assert math.isnan(none.mean)
    assert none.seeds == 0
    assert [estimate(np.array(values)).excludes_zero for values in ([0.5, 0.5], [-0.5, -0.5], [-0.5, 0.5])] == [
        True,
        True,
        False,
    ]


def test_a_stronger_correlation_is_stronger_in_its_own_direction():
    ours, theirs = np.array([-0.9, -0.8, -0.7]), np.array([0.2, 0.1, 0.3])
    found = stronger(ours, theirs)
    assert found.mean == pytest.approx(0.6, abs=1e-12)
    assert stronger(theirs, ours).mean == pytest.approx(-0.6, abs=1e-12)
    assert stronger(ours, ours) == estimate(np.zeros(3))
    assert stronger(ours, np.array([0.2, NAN, 0.3])).mean == pytest.approx(0.8 - 0.25, abs=1e-12)
    assert stronger(ours, np.full(3, NAN)).seeds == 0


# p values


@pytest.mark.parametrize("seeds", [1, 3])
def test_a_p_value_equals_that_of_all_permutations(seeds):
    random = np.random.default_rng(1)
    measure, error = random.normal(size=(seeds, 5)), random.integers(0, 4, size=(seeds, 5)).astype(float)

    def mean(order) -> float:
        return float(
            np.mean([stats.spearmanr(x, y[list(order)]).statistic for x, y in zip(measure, error, strict=True)])
        )

    values = np.array([mean(order) for order in itertools.permutations(range(5))])
    observed = mean(range(5))
    tails = (values >= observed - 1e-9).mean(), (values <= observed + 1e-9).mean()
    assert permutation_p(measure, error) == pytest.approx(min(1, 2 * min(tails)), abs=1e-12)


def test_the_smallest_p_value_of_many_configurations_is_that_of_the_random_permutations():
    x = np.tile(np.arange(15.0), (4, 1))
    assert permutation_p(x, x) == pytest.approx(2 / 10_000, abs=1e-12)
    assert permutation_p(x, -x) == pytest.approx(2 / 10_000, abs=1e-12)
    assert math.isnan(permutation_p(np.ones((4, 15)), x))


# Simulations


def simulated(random: np.random.Generator, slope: float) -> tuple[np.ndarray, np.ndarray]:
    """10 seeds of 15 configurations whose measure and error share a part, each with noise of its own in every run."""
    configurations = np.arange(15.0) - 7
    measure = configurations + random.normal(0, 4, (10, 15))
    return measure, slope * configurations + random.normal(0, 4, (10, 15))


@pytest.mark.slow
def test_intervals_contain_the_true_mean_about_as_often_as_they_say():
    random = np.random.default_rng(5)
    many = [simulated(random, 0.5) for _ in range(300)]
    true = np.mean([spearman(x, y) for measure, error in many for x, y in zip(measure, error, strict=True)])
    found = [correlate(*runs, ["a"] * 15).spearman for runs in many]
    covered = np.mean([one.low <= true <= one.high for one in found])
    assert 0.85 < covered < 0.97


@pytest.mark.slow
def test_p_values_of_independent_quantities_are_uniform_also_where_seeds_are_many():
    """Configurations have effects on both, which are unrelated: an interval over the seeds would exclude 0."""
    random = np.random.default_rng(6)
    values, excluded = [], []
    for i in range(400):
        effects = random.normal(size=(2, 1, 15))
        measure, error = effects + 0.3 * random.normal(size=(2, 10, 15))
        values.append(permutation_p(measure, error, seed=i))
        excluded.append(estimate(np.array([spearman(x, y) for x, y in zip(measure, error, strict=True)])).excludes_zero)
    assert stats.kstest(values, "uniform").pvalue > 0.01
    assert 0.02 < np.mean(np.array(values) < 0.05) < 0.085
    assert np.mean(excluded) > 0.5  # hence p is not taken from the seeds
