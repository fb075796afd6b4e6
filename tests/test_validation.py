"""Checks of numbers that arguments must satisfy."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, settings, strategies as st

from bisam.validation import MOST_QUERIES, finite, non_negative, number, portion, positive, share, shown, whole


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


HUGE = [10**400, -(10**400), 10**5000, Fraction(10**400, 3)]


@pytest.mark.parametrize("value", HUGE, ids=["400", "-400", "5000", "fraction"])
@pytest.mark.parametrize("check", [number, finite, non_negative, positive, share])
def test_a_number_that_no_float_holds_is_named(check, value):
    with pytest.raises(ValueError, match=r"^rho must be within ±1.8e308, got (an integer of \d+ bits|Fraction)"):
        check("rho", value)


@pytest.mark.parametrize("value", [2**63, 10**400, 10**5000], ids=["63", "400", "5000"])
def test_a_whole_number_beyond_int64_is_named(value):
    with pytest.raises(ValueError, match=r"^k must be at most 9223372036854775807, got "):
        whole("k", value)
    whole("k", 2**63 - 1)


def test_a_whole_number_beyond_its_bound_is_named():
    whole("steps", MOST_QUERIES, most=MOST_QUERIES)
    with pytest.raises(ValueError, match=r"^steps must be at most 1000, got 1001$"):
        whole("steps", MOST_QUERIES + 1, most=MOST_QUERIES)


def test_a_value_in_a_message_is_short():
    class Unwritable:
        def __repr__(self) -> str:
            raise RuntimeError

    assert shown(0.5) == "0.5"
    assert shown(10**5000) == "an integer of 16610 bits"
    assert len(shown("x" * 10_000)) == 200
    assert shown(Unwritable()) == "an object of Unwritable"
