"""Correlations: whether a measure ranks configurations as their test error does.

A configuration is a recipe without its seed. Runs of one seed share initial weights, label noise and order of batches,
so a rank correlation is computed over the configurations for each seed, and averaged over the seeds:

    found = correlate(sharpness, error, methods)         # arrays (seeds, configurations), and a name for each column
    found.spearman.mean, found.spearman.low, found.p

* An interval is a bootstrap over the seeds (BCa; Efron, 1987, https://doi.org/10.2307/2289144). It says how far the
  mean correlation of these configurations varies with the seeds.
* p belongs to a permutation test over the configurations: their errors are exchanged, in all seeds alike. It says how
  often a measure that is unrelated to the error ranks the configurations as well. Many seeds make the interval short,
  and p stays large where configurations are few.
* A correlation over several methods may be a difference between the methods alone. `within` is the mean of the
  correlations among configurations of one method (the granulated coefficient of Jiang et al., 2020,
  https://arxiv.org/abs/1912.02178).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import nan
from typing import Any

import numpy as np
from scipy import stats

_RESAMPLES = 9_999
_LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """The mean of a value over seeds.

    Attributes:
        mean: the mean; nan if the value is undefined for all seeds.
        low: lower end of the 95 % interval; nan for fewer than two seeds.
        high: its upper end.
        seeds: number of seeds for which the value is defined.
    """

    mean: float
    low: float
    high: float
    seeds: int

    @property
    def excludes_zero(self) -> bool:
        """Whether 0 is outside the interval."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Correlation:
    """How a measure and the error of the same runs are related.

    Attributes:
        spearman: Spearman's rank correlation over all configurations.
        kendall: Kendall's tau-b over all configurations.
        within: mean over the groups of Kendall's tau-b within a group.
        p: two-sided p value of `spearman`, see `permutation_p`; nan if the correlation is undefined.
        each: Spearman's correlation of each seed, (seeds,).
    """

    spearman: Estimate
    kendall: Estimate
    within: Estimate
    p: float
    each: np.ndarray


def correlate(measure: np.ndarray, error: np.ndarray, groups: Sequence[str], seed: int = 0) -> Correlation:
    """Return the rank correlations of two quantities of the same runs.

    Args:
        measure: finite numbers (seeds, configurations).
        error: finite numbers of the same shape.
        groups: for each configuration the name of its group, such as the method.
        seed: of the resampling.

    Raises:
        ValueError: the shapes differ, or a number is not finite.
    """
    _check(measure, error, groups)
    each = by_seed(spearman, measure, error)
    return Correlation(
        spearman=estimate(each, seed),
        kendall=estimate(by_seed(kendall, measure, error), seed),
        within=estimate(within(measure, error, groups), seed),
        p=permutation_p(measure, error, seed),
        each=each,
    )


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Return Spearman's rank correlation of two samples (n,), in which ties have their mean rank; nan if undefined."""
    return _of_varying(stats.spearmanr, x, y)


def kendall(x: np.ndarray, y: np.ndarray) -> float:
    """Return Kendall's tau-b of two samples (n,), which corrects for ties; nan if undefined."""
    return _of_varying(stats.kendalltau, x, y)


def by_seed(statistic: Callable[[np.ndarray, np.ndarray], float], measure: np.ndarray, error: np.ndarray) -> np.ndarray:
    """Return a statistic of each row of two arrays (seeds, configurations), as an array (seeds,)."""
    return np.array([statistic(x, y) for x, y in zip(measure, error, strict=True)])


def within(measure: np.ndarray, error: np.ndarray, groups: Sequence[str]) -> np.ndarray:
    """Return for each seed the mean of Kendall's tau-b within the groups (seeds,); undefined ones do not count."""
    columns = [[i for i, name in enumerate(groups) if name == group] for group in dict.fromkeys(groups)]
    taus = np.array([by_seed(kendall, measure[:, own], error[:, own]) for own in columns])
    known = ~np.isnan(taus)
    count = known.sum(0)
    return np.where(count > 0, np.where(known, taus, 0).sum(0) / np.maximum(count, 1), nan)


def estimate(values: np.ndarray, seed: int = 0) -> Estimate:
    """Return the mean of independent values (n,) with a 95 % BCa bootstrap interval; nan values do not count.

    For 10 values of a normal distribution the interval contains the true mean in about 90 % of cases, see the tests:
    bootstrap intervals of few values are too short.

    Args:
        values: one number for each seed.
        seed: of the resampling.
    """
    known = values[~np.isnan(values)]
    if not len(known):
        return Estimate(nan, nan, nan, 0)
    mean = float(known.mean())
    if len(known) < 2:
        return Estimate(mean, nan, nan, 1)
    if not _varies(known):  # all resamples are equal, and BCa is undefined
        return Estimate(mean, mean, mean, len(known))
    found = stats.bootstrap(
        (known,),
        np.mean,
        n_resamples=_RESAMPLES,
        confidence_level=_LEVEL,
        method="BCa",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Estimate(mean, float(found.low), float(found.high), len(known))


def stronger(ours: np.ndarray, theirs: np.ndarray, seed: int = 0) -> Estimate:
    """Return by how much the correlations of one measure are stronger than those of another one, paired by seed.

    Each measure counts in the direction that it has on average, so that a strong negative correlation is strong.

    Args:
        ours: correlations of a measure with the error (seeds,).
        theirs: correlations of another measure (seeds,).
        seed: of the resampling.
    """
    both = ~(np.isnan(ours) | np.isnan(theirs))
    if not both.any():
        return estimate(np.array([]))
    return estimate(_towards(ours[both]) - _towards(theirs[both]), seed)


def permutation_p(measure: np.ndarray, error: np.ndarray, seed: int = 0) -> float:
    """Return the two-sided p value of the mean over seeds of Spearman's correlation.

    Under the null hypothesis the columns of `error` are exchangeable: the error of a configuration, with all its seeds,
    could as well be that of another one. All permutations are tried if there are at most 9,999, else as many random
    ones, which gives p >= 0.0002.

    Args:
        measure: (seeds, configurations).
        error: of the same shape.
        seed: of the random permutations.

    Returns:
        p, or nan if the correlation is undefined for all seeds.
    """
    known = [i for i, (x, y) in enumerate(zip(measure, error, strict=True)) if _varies(x) and _varies(y)]
    if not known:
        return nan
    x, y = (_standardised(values[known]) for values in (measure, error))
    products = x.T @ y / x.size  # entry (i, j): the share of the mean correlation if configuration i has the error of j
    rows = np.arange(len(products))

    def mean_correlation(order: np.ndarray, axis: int = -1) -> np.ndarray:
        return products[rows, order.astype(int)].sum(axis)

    found = stats.permutation_test(
        (rows,),
        mean_correlation,
        permutation_type="pairings",
        vectorized=True,
        n_resamples=_RESAMPLES,
        rng=np.random.default_rng(seed),
    )
    return float(found.pvalue)


def _check(measure: np.ndarray, error: np.ndarray, groups: Sequence[str]) -> None:
    if measure.ndim != 2 or measure.shape != error.shape or measure.shape[1] != len(groups):
        raise ValueError(
            "measure and error must have the same shape (seeds, configurations), with a group for each configuration, "
            f"got {measure.shape}, {error.shape} and {len(groups)} groups"
        )
    for name, values in (("measure", measure), ("error", error)):
        if not np.isfinite(values).all():
            raise ValueError(f"{name} must be finite, got {values[~np.isfinite(values)][0]}: leave such runs out")


def _of_varying(statistic: Callable[..., Any], x: np.ndarray, y: np.ndarray) -> float:
    """A statistic of scipy, which warns of a constant sample."""
    return float(statistic(x, y).statistic) if _varies(x) and _varies(y) else nan


def _varies(values: np.ndarray) -> bool:
    return len(values) > 1 and bool((values != values[0]).any())


def _towards(correlations: np.ndarray) -> np.ndarray:
    """Correlations with the sign that makes their mean positive."""
    return correlations if correlations.mean() >= 0 else -correlations


def _standardised(values: np.ndarray) -> np.ndarray:
    """Ranks of each row, with mean 0 and standard deviation 1."""
    ranks = stats.rankdata(values, axis=1)
    return (ranks - ranks.mean(1, keepdims=True)) / ranks.std(1, keepdims=True)
