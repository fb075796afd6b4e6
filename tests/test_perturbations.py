"""A radius stands for a perturbation wherever one is taken, and normalisation layers are found."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import bisam
from bisam import L2, SAM, SAMON, Adaptive, BiSAM, ModelOracle, NegLog, cross_entropy, masks, perturbations
from bisam.masks import RandomMask
from bisam.perturbations import is_radius
from bisam.schedules import Constant, Cosine, Warmup
from tests.support.doubles import Quadratic

CLASSES = ("SAM", "MultiStepSAM", "GSAM", "WSAM", "CRSAM", "XSAM", "FunctionalSAM", "LookSAM", "SSAMF", "MomentumSAM")
FUNCTIONS = ("BiSAM", "GBiSAM", "FSAM", "VaSSO", "ZSharp", "SAMON", "FisherSAM", "SSAMD", "EBiSAM")
AROUND = [getattr(perturbations, n) for n in ("Friendly", "Smoothed", "ZScore", "NormLayers")] + [
    getattr(masks, n) for n in ("RandomMask", "FisherMask", "DropGrow")
]


def ahead(gradient, oracle):
    return gradient * -0.1


MAKE = {
    **{name: getattr(bisam, name) for name in (*CLASSES, *FUNCTIONS)},
    **{kind.__name__: kind for kind in AROUND},
    "SAMPa": lambda perturb: bisam.SAMPa(perturb, ahead=ahead),
    "AESAM": lambda perturb: bisam.AESAM(perturb, steps=10),
}


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
@pytest.mark.parametrize("radius", [0.3, 1, Cosine(0.3, 0.1, steps=5), Warmup(0.2, steps=3), Constant(0.1)], ids=repr)
def test_a_radius_is_the_ball(make, radius):
    assert make(radius) == make(L2(radius))


@pytest.mark.parametrize("make", [MAKE[name] for name in FUNCTIONS], ids=FUNCTIONS)
def test_a_named_method_takes_any_perturbation(make):
    assert "Adaptive(rho=2.0" in repr(make(Adaptive(2.0)))


def test_esam_keeps_its_mask():
    assert bisam.ESAM(0.1) == bisam.ESAM(RandomMask(L2(0.1), beta=0.6))
    assert bisam.ESAM(L2(0.1)).perturb == L2(0.1)


def test_a_function_of_the_step_is_a_radius_and_one_of_two_arguments_a_perturbation():
    def radius(step):
        return 0.1 if step < 10 else 0.05

    def shortest(gradient, oracle):
        return gradient * 0.0

    assert SAM(radius) == SAM(L2(radius))
    assert SAM(shortest).perturb is shortest
    assert [is_radius(v) for v in (0.1, 2, radius, shortest, L2(0.1), L2, "0.1", None)] == [True] * 3 + [False] * 5


def test_a_bad_radius_is_refused_as_by_the_ball():
    for bad in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="rho must be non-negative and finite"):
            SAM(bad)


def test_a_number_climbs_as_the_ball_does():
    batch = (torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.double),)
    for bound in (SAM(0.5), BiSAM(0.5, bound=None)):
        oracle = Quadratic(2.0, 3.0)
        e = bound.climb(oracle, batch)
        torch.testing.assert_close(e.norm(), torch.tensor(0.5, dtype=torch.double), rtol=1e-12, atol=0)
    assert BiSAM(0.5).ascent == NegLog()


def test_a_subnet_is_no_norm_layer():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.subnet, self.bn1, self.normal = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
            self.layers = nn.ModuleList([nn.LayerNorm(2)])

        def forward(self, x):
            return self.normal(self.layers[0](self.bn1(self.subnet(x))))

    oracle = ModelOracle(Model(), cross_entropy)
    e = SAMON(0.1).climb(oracle, (torch.randn(4, 2), torch.zeros(4, dtype=torch.long)))
    moved = {name for name, t in zip(oracle.names, e, strict=True) if t.abs().max() > 0}
    assert moved <= {"bn1.weight", "bn1.bias", "layers.0.weight", "layers.0.bias"}
    assert "bn1.weight" in moved
    assert "layers.0.weight" in moved
