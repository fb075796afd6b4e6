"""Checks of numbers that arguments must satisfy."""

from __future__ import annotations

import pytest
from hypothesis import given, settings, strategies as st

from bisam.validation import portion, share, whole


@settings(deadline=None, derandomize=True)
@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(1, n), st.just(n))))
def test_a_portion_of_n_is_exact_where_the_share_is_a_fraction_of_n(k_n):
    k, n = k_n
    assert portion(k / n, n) == k
    assert portion(float(f"{k / n:.15g}"), n) == k


@settings(deadline=None, derandomize=True)
@given(st.floats(0, 1, exclude_min=True), st.integers(1, 10**9))
def test_a_portion_is_rounded_up_and_never_nothing(share, n):
    k = portion(share, n)
    assert 1 <= k <= n
    assert k - 1 < share * n <= k * (1 + 1e-9)


@pytest.mark.parametrize(
    ("share", "n", "expected"), [(0.07, 100, 7), (0.29, 100, 29), (1e-9, 8, 1), (1.0, 7, 7), (0.5, 7, 4)]
)
def test_portions(share, n, expected):
    assert portion(share, n) == expected


@pytest.mark.parametrize("value", [1, 5, 10**9])
def test_whole_numbers_are_taken(value):
    whole("k", value)
    whole("k", 0, least=0)


@pytest.mark.parametrize(
    ("value", "error"), [(0, ValueError), (-3, ValueError), (2.0, TypeError), (True, TypeError), ("2", TypeError)]
)
def test_other_numbers_are_not_whole(value, error):
    with pytest.raises(error, match=rf"k .*{value!r}"):
        whole("k", value)


@pytest.mark.parametrize(
    ("value", "zero"), [(1e-9, False), (0.5, False), (1, False), (1.0, True), (0, True), (0.0, True)]
)
def test_shares_are_taken(value, zero):
    share("keep", value, zero=zero)


@pytest.mark.parametrize("value", [0, 0.0, -0.1, 1.1, float("nan"), float("inf"), True, "0.5", None])
def test_what_is_no_share_is_named(value):
    with pytest.raises((TypeError, ValueError), match=rf"keep .*{value!r}"):
        share("keep", value)
    if value != 0:
        with pytest.raises((TypeError, ValueError), match=rf"keep .*{value!r}"):
            share("keep", value, zero=True)
