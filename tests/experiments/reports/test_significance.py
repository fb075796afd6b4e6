"""Significance: Student's interval and test, Holm's adjustment, and detectable differences."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import integrate, stats

from bisam.experiments.reports.significance import ALPHA, Difference, detectable_effect, holm, student

NAN = math.nan

# Student


@pytest.mark.parametrize(
    ("values", "reach"),
    [
        ([1.0, 2.0, 3.0], 4.302653 * 1.0 / math.sqrt(3)),  # from a table of Student's distribution
        ([0.0, 1.0], 12.706205 * math.sqrt(0.5) / math.sqrt(2)),
        ([1.0, 1.0, 2.0, 2.0, 3.0, 3.0], 2.570582 * math.sqrt(0.8) / math.sqrt(6)),
    ],
)
def test_the_interval_is_students(values, reach):
    found = student(values)
    centre = sum(values) / len(values)
    assert (found.mean, found.pairs) == (pytest.approx(centre), len(values))
    assert (found.low, found.high) == (pytest.approx(centre - reach, abs=1e-6), pytest.approx(centre + reach, abs=1e-6))


@pytest.mark.parametrize("n", [2, 3, 10, 60])
@pytest.mark.parametrize("shift", [0.0, 0.4, -5.0])
def test_the_test_equals_that_of_scipy_for_pairs(n, shift):
    random = np.random.default_rng(n)
    ours, theirs = random.normal(shift, 1, n), random.normal(0, 2, n)
    found, expected = student([*(ours - theirs)]), stats.ttest_rel(ours, theirs)
    interval = expected.confidence_interval(0.95)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-12)
    assert (found.low, found.high) == (pytest.approx(interval.low, rel=1e-12), pytest.approx(interval.high, rel=1e-12))
    assert found.spread == pytest.approx(np.std(ours - theirs, ddof=1), rel=1e-12)
    assert found.excludes_zero == (found.p < 0.05)


@pytest.mark.parametrize(
    ("values", "mean", "spread"),
    [
        ([1.0], 1.0, NAN),
        ([0.0, 0.0], 0.0, 0.0),
        ([2.0, 2.0, 2.0], 2.0, 0.0),
        ([0.9 - 0.8, 0.8 - 0.7, 0.7 - 0.6], 0.1, 0.0),  # equal but for rounding: t would be 1e16
        ([1e-17, -2e-17, 0.0], 0.0, 0.0),
        ([0.1, NAN], NAN, NAN),
        ([math.inf, 0.1, 0.2], NAN, NAN),
    ],
)
def test_without_a_spread_there_is_neither_interval_nor_test(values, mean, spread):
    found = student(values)
    assert found.pairs == len(values)
    assert [found.mean, found.spread] == [
        pytest.approx(mean, abs=1e-12, nan_ok=True),
        pytest.approx(spread, abs=1e-12, nan_ok=True),
    ]
    assert all(math.isnan(value) for value in (found.low, found.high, found.p, found.detectable()))
    assert not found.excludes_zero


def test_small_differences_of_large_scores_keep_their_test():
    """A step of a score is 1 / (number of test examples), far above rounding."""
    values = [0.9731 - 0.9730, 0.9733 - 0.9730, 0.9730 - 0.9730]
    assert student(values).p == pytest.approx(stats.ttest_1samp(values, 0).pvalue, rel=1e-6)


# Holm


@pytest.mark.parametrize(
    ("values", "adjusted"),
    [
        ([0.01, 0.02, 0.03, 0.04, 0.05], [0.05, 0.08, 0.09, 0.09, 0.09]),  # p.adjust(..., "holm") of R
        (  # multipletests(..., method="holm") of statsmodels 0.15
            [0.0099, 0.0117, 0.0434, 0.9, 0.4, 0.6, 1e-9, 1e-4],
            [0.0594, 0.0594, 0.1736, 1, 1, 1, 8e-9, 7e-4],
        ),
        ([0.04, 0.01], [0.04, 0.02]),
        ([0.9, 0.8, 0.0], [1.0, 1.0, 0.0]),
        ([0.01, NAN, 0.03], [0.02, NAN, 0.03]),
        ([0.2], [0.2]),
        ([], []),
    ],
)
def test_adjusted_values_are_holms(values, adjusted):
    assert holm(values) == pytest.approx(adjusted, abs=1e-12, nan_ok=True)


def test_adjusted_values_reject_as_holms_procedure_does():
    """Step by step: the smallest p against 0.05 / m, the next one against 0.05 / (m - 1), until one is larger."""
    random = np.random.default_rng(0)
    for _ in range(50):
        values = list(random.uniform(size=6) ** 4)
        rejected = set()
        for rank, i in enumerate(sorted(range(6), key=values.__getitem__)):
            if values[i] > 0.05 / (6 - rank):
                break
            rejected.add(i)
        assert {i for i, p in enumerate(holm(values)) if p <= 0.05} == rejected


# Detectable differences


@pytest.mark.parametrize(
    ("pairs", "level", "effect"),
    [  # TTestPower().solve_power(nobs=pairs, alpha=level, power=0.8) of statsmodels 0.15
        (2, 0.05, 11.549889754978167),
        (2, 0.00625, 92.30562552933294),
        (3, 0.05, 3.264043552819638),
        (5, 0.05, 1.6819970833232674),
        (5, 0.00625, 2.976452483424143),
        (10, 0.05, 0.9960019107624178),
        (10, 0.00625, 1.434445729749674),
        (20, 0.05, 0.6604416544380312),
        (20, 0.00625, 0.8881648855810367),
        (60, 0.05, 0.36770432031149547),
        (60, 0.00625, 0.47684242561296375),
        (90, 0.05, 0.2985471371034407),
        (90, 0.00625, 0.3850575094948056),
    ],
)
def test_the_detectable_effect_is_that_of_statsmodels(pairs, level, effect):
    assert detectable_effect(pairs, level) == pytest.approx(effect, rel=1e-5)


@pytest.mark.parametrize("family", [1, 8, 26, 150])
@pytest.mark.parametrize("pairs", [2, 3, 4, 10, 60, 300])
def test_the_detectable_effect_is_found_with_the_power(pairs, family):
    """Power by integration over the distribution of the standard deviation, without the noncentral t."""
    df, level = pairs - 1, ALPHA / family
    critical, shift = stats.t.isf(level / 2, df), detectable_effect(pairs, level) * math.sqrt(pairs)

    def share(scaled: float) -> float:
        return stats.norm.sf(critical * scaled / math.sqrt(df) - shift) * stats.chi.pdf(scaled, df)

    middle = shift * math.sqrt(df) / critical
    power, _ = integrate.quad(share, 0, 4 * math.sqrt(df) + 8, points=[middle], limit=500)
    assert power == pytest.approx(0.8, abs=1e-4)


def test_a_detectable_difference_grows_with_spread_and_level():
    one = student([0.0, 1.0, 2.0, 5.0])
    assert one.detectable() == pytest.approx(one.spread * detectable_effect(4))
    assert one.detectable(0.05 / 8) > one.detectable() > student([0.0, 0.1, 0.2, 0.5]).detectable()
    assert math.isnan(Difference(1.0, NAN, NAN, 1).detectable())


@pytest.mark.parametrize(
    ("arguments", "match"),
    [((1,), "at least 2 pairs, got 1"), ((3, 0.0), r"level must be in \(0, 1\), got 0"), ((3, 0.05, 1), "power must")],
)
def test_what_has_no_power_is_refused(arguments, match):
    with pytest.raises(ValueError, match=match):
        detectable_effect(*arguments)


# Simulations


@pytest.mark.slow
@pytest.mark.parametrize("pairs", [3, 10, 60])
def test_a_detectable_difference_is_found_in_four_of_five_studies(pairs):
    random = np.random.default_rng(pairs)
    spread, n = 1.7, 4000
    true = spread * detectable_effect(pairs)
    found = np.mean([student([*random.normal(true, spread, pairs)]).p < ALPHA for _ in range(n)])
    assert abs(found - 0.8) < 4 * math.sqrt(0.8 * 0.2 / n)


@pytest.mark.slow
def test_holm_keeps_the_error_of_a_page_where_the_intervals_do_not():
    """Eight comparisons with one baseline, as on a page: no method differs from it."""
    random, n, pages, uncorrected = np.random.default_rng(8), 3000, 0, 0
    for _ in range(n):
        scores = random.normal(size=(9, 10)) + random.normal(size=10)
        each = [student([*(scores[i] - scores[0])]) for i in range(1, 9)]
        pages += min(holm([one.p for one in each])) < ALPHA
        uncorrected += any(one.excludes_zero for one in each)
    assert pages / n < 0.05 + 3 * math.sqrt(0.05 * 0.95 / n)
    assert uncorrected / n > 0.15
