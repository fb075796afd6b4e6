"""Masks of the largest entries, and random masks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st

from bisam import ModelOracle, Vector, cross_entropy
from bisam.masks import RandomMask, top
from bisam.perturbations import L2
from bisam.validation import portion
from tests.support import cases


@settings(deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 20), min_size=4, max_size=12), st.floats(0.01, 1), st.booleans())
def test_the_mask_of_the_largest_holds_the_largest(scores, keep, free):
    flat = torch.tensor(scores).double()
    vector = Vector([flat[:2].clone(), flat[2:].view(1, -1).clone()])
    mask = top(vector, keep, [not free, True])
    inside = torch.cat([m.reshape(-1) for m in mask])
    assert mask.tensors[1].shape == (1, len(scores) - 2)
    if free:
        assert inside[:2].all()
        flat, inside = flat[2:], inside[2:]
    assert inside.sum() == portion(keep, len(flat))
    if not inside.all():
        assert flat[inside].min() >= flat[~inside].max()


def test_a_mask_where_nothing_is_maskable_is_all():
    assert all(m.all() for m in top(Vector([torch.ones(2), torch.ones(())]), 0.1, [False, False]))


@pytest.mark.parametrize("per", ["tensor", "entry"])
def test_random_masks_are_drawn_where_no_device_waits_whatever_the_default_device(per):
    oracle, (x, y) = ModelOracle(cases.mlp(), cross_entropy), cases.batch()
    g = oracle.query((x, y)).gradient
    with torch.device("meta"):  # instead of a GPU
        e = RandomMask(L2(0.1), beta=0.5, per=per)(g, oracle)
    assert {t.device.type for t in e} == {"cpu"}
