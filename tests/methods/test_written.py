"""The `repr` of a method: the call that makes it."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from bisam import *  # noqa: F403
from bisam import (
    GSAM,
    KSAM,
    L2,
    SAM,
    ABiSAM,
    Adaptive,
    BiSAM,
    EBiSAM,
    LookSAM,
    NegLog,
    Tanh,
    VaSSO,
    cross_entropy,
)
from bisam.experiments.recipes.catalogue import METHODS
from bisam.experiments.recipes.expressions import build
from bisam.masks import *  # noqa: F403
from bisam.perturbations import *  # noqa: F403
from bisam.schedules import *  # noqa: F403
from bisam.schedules import FlipRate, Linear


@pytest.mark.parametrize(
    ("method", "text"),
    [
        (SAM(), "SAM(0.05)"),
        (SAM(0.1, ascent=cross_entropy), "SAM(0.1, ascent=cross_entropy)"),
        (SAM(Adaptive(2.0)), "SAM(Adaptive(rho=2.0))"),
        (SAM(L2(FlipRate(0.1))), "SAM(FlipRate(target=0.1))"),
        (BiSAM(), "BiSAM(rho=0.05)"),
        (BiSAM(rho=0.1, bound=Tanh(mu=5.0)), "BiSAM(rho=0.1, bound=Tanh(mu=5.0))"),
        (BiSAM(0.1, descent=NegLog(2.0)), "BiSAM(rho=0.1, descent=NegLog(mu=2.0))"),
        (BiSAM(Linear(0.1, 0.2, steps=9)), "BiSAM(rho=Linear(start=0.1, end=0.2, steps=9))"),
        (ABiSAM(2.0, eta=0.01), "ABiSAM(rho=2.0, eta=0.01)"),
        (VaSSO(0.1, theta=0.4), "SAM(Smoothed(0.1, theta=0.4))"),
        (EBiSAM(0.1), "ESAM(RandomMask(0.1), ascent=NegLog())"),
        (GSAM(0.1, alpha=0.3), "GSAM(0.1, alpha=0.3)"),
        (KSAM(32, BiSAM(0.1)), "KSAM(k=32, method=BiSAM(rho=0.1))"),
    ],
)
def test_a_method_is_written_as_a_call(method, text):
    assert repr(method) == text
    assert eval(text) == method


@pytest.mark.parametrize("name", [name for name, one in METHODS.items() if "optimizer" not in one.written()])
def test_each_method_of_the_catalogue_evaluates_back(name):
    method = build(METHODS[name].written(), steps=100, epoch=10, examples=1000)
    assert eval(repr(method)) == method


def test_a_method_of_the_user_shows_its_own_fields():
    @dataclass(frozen=True, repr=False)
    class Mine(LookSAM):
        own: int = 3

    assert repr(Mine(0.1, own=4)) == "Mine(0.1, own=4)"
    assert repr(Mine(0.1)) == "Mine(0.1)"
