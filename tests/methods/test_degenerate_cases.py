"""Degenerate cases of methods are bit-identical to the simpler method."""

from __future__ import annotations

import copy
from math import inf
from typing import Any

import pytest
import torch
from torch import nn

from bisam import (
    AESAM,
    ASAM,
    CRSAM,
    ERM,
    ESAM,
    FSAM,
    GAM,
    GCSAM,
    GNP,
    GSAM,
    KSAM,
    LESAM,
    MESA,
    MSAM,
    RAPP,
    RSAM,
    SAF,
    SAGM,
    SAM,
    SAMON,
    SAMSPS,
    SSAMD,
    SSAMF,
    TSAM,
    WSAM,
    XSAM,
    Accumulated,
    BilateralSAM,
    BiSAM,
    CEGPlus,
    During,
    EBiSAM,
    EigenSAM,
    Every,
    ExtraGradient,
    FilterNoise,
    FisherSAM,
    FocalSAM,
    FunctionalSAM,
    GBiSAM,
    ImbSAM,
    Lookbehind,
    LookSAM,
    LowerBound,
    MomentumSAM,
    MultiStepSAM,
    NegLog,
    SharpnessAware,
    StableSAM,
    Tanh,
    Tilted,
    VaSSO,
    ZerothOrder,
    ZSharp,
    cross_entropy,
)
from bisam.masks import DropGrow, FisherMask, RandomMask
from bisam.methods.longtail import ClassSAM, Tail
from bisam.perturbations import L2, Adaptive, Friendly, PerTensor
from bisam.proximal import L1, Box
from bisam.schedules import Constant, Linear
from tests.support import cases, references
from tests.support.cases import FAMILY_MODELS
from tests.support.runs import close

# ERM, SAM, BiSAM, ASAM and mSAM.


@pytest.mark.parametrize("optimizer", cases.OPTIMIZERS)
@pytest.mark.parametrize("model", cases.MODELS)
def test_erm_is_the_plain_loop(model, optimizer):
    model = cases.MODELS[model]()
    plain, criterion = copy.deepcopy(model), nn.CrossEntropyLoss()
    ours = cases.train(SharpnessAware(model, ERM(), cross_entropy), model, optimizer=optimizer)
    assert ours == cases.train(lambda x, y: criterion(plain(x), y), plain, optimizer=optimizer)


@pytest.mark.parametrize(
    "method",
    [SAM(L2(0.0)), BiSAM(0.0), BiSAM(0.0, Tanh()), ASAM(0.0), SAM(Adaptive(0.0, 0.01, lambda name, w: "w" in name))],
    ids=["SAM", "BiSAM-log", "BiSAM-tanh", "ASAM", "official ASAM"],
)
@pytest.mark.parametrize("model", cases.MODELS)
def test_rho_zero_is_erm(model, method):
    model = cases.MODELS[model]()
    plain = copy.deepcopy(model)
    ours = cases.train(SharpnessAware(model, method, cross_entropy), model)
    assert ours == cases.train(SharpnessAware(plain, ERM(), cross_entropy), plain)


@pytest.mark.parametrize("m", [8, 9, 1000])
@pytest.mark.parametrize("model", cases.MODELS)
def test_msam_of_one_part_is_the_method(model, m):
    model = cases.MODELS[model]()
    plain = copy.deepcopy(model)
    ours = cases.train(SharpnessAware(model, MSAM(m, BiSAM(0.1)), cross_entropy), model)
    assert ours == cases.train(SharpnessAware(plain, BiSAM(0.1), cross_entropy), plain)


def test_msam_counts_uneven_parts_by_their_size():
    model, (x, y) = cases.mlp(), cases.batch(n=10)
    parameters = list(model.parameters())
    sharp = SharpnessAware(model, SAM(L2(0.3)), cross_entropy)
    parts = [slice(0, 4), slice(4, 8), slice(8, 10)]
    losses = [sharp(x[p], y[p]) for p in parts]
    grads = [torch.autograd.grad(loss, parameters) for loss in losses]
    weights = [0.4, 0.4, 0.2]
    expected = [sum(w * g for w, g in zip(weights, same, strict=True)) for same in zip(*grads, strict=True)]

    loss = SharpnessAware(model, MSAM(4, SAM(L2(0.3))), cross_entropy)(x, y)
    close(loss, sum(w * part for w, part in zip(weights, losses, strict=True)), 1e-15)
    for actual, wanted in zip(torch.autograd.grad(loss, parameters), expected, strict=True):
        close(actual, wanted, 1e-15)


@pytest.mark.parametrize("m", [1, 3, 8])
def test_msam_of_erm_is_erm_without_a_norm(m):
    model, (x, y) = cases.mlp(), cases.batch(n=8)
    actual = torch.autograd.grad(SharpnessAware(model, MSAM(m, ERM()), cross_entropy)(x, y), model.parameters())
    expected = torch.autograd.grad(cross_entropy(model(x), y).mean(), model.parameters())
    for a, e in zip(actual, expected, strict=True):
        close(a, e, 1e-15)


@pytest.mark.parametrize("bound", [NegLog(), NegLog(3.0), Tanh(), Tanh(1.0, 0.5)], ids=str)
def test_sam_with_the_general_bound_is_bisam(bound):
    model = cases.mlp()
    general = copy.deepcopy(model)
    cases.train(SharpnessAware(model, BiSAM(0.3, bound), cross_entropy), model)
    ascent = LowerBound(bound.phi, bound.mu)
    cases.train(SharpnessAware(general, SAM(L2(0.3), ascent=ascent), cross_entropy), general)
    close(references.flat(general), references.flat(model), 1e-9)


# All methods.

SAM_ = SAM(L2(0.1))
B = L2(0.1)
SAME: dict[str, tuple[Any, Any]] = {
    "GSAM(alpha=0) is SAM": (GSAM(B, alpha=0.0), SAM_),
    "GBiSAM(alpha=0) is BiSAM": (GBiSAM(0.1, alpha=0.0), BiSAM(0.1)),
    "MultiStepSAM(steps=1) is SAM": (MultiStepSAM(B, steps=1), SAM_),
    "MultiStepSAM(steps=1) of Friendly is FSAM": (MultiStepSAM(Friendly(B), steps=1), FSAM(0.1)),
    "KSAM(k=n) is the method": (KSAM(8, BiSAM(0.1)), BiSAM(0.1)),
    "KSAM(k=n) is the method, with a memory": (KSAM(8, LookSAM(B, k=2)), LookSAM(B, k=2)),
    "MSAM(m=n) is the method, with a memory": (MSAM(8, LookSAM(B, k=2), separate=True), LookSAM(B, k=2)),
    "ESAM(beta=1, gamma=1) is SAM": (ESAM(RandomMask(B, beta=1.0), gamma=1.0), SAM_),
    "ESAM(beta=1, gamma=1), per entry, is SAM": (ESAM(RandomMask(B, beta=1.0, per="entry"), gamma=1.0), SAM_),
    "EBiSAM(beta=1, gamma=1) is BiSAM": (EBiSAM(0.1, beta=1.0, gamma=1.0), BiSAM(0.1)),
    "ESAM of all examples is SAM": (ESAM(B, gamma=0.99), SAM_),  # eight of eight, in their order
    "RandomMask(beta=1) is nothing": (SAM(RandomMask(Adaptive(0.5), beta=1.0)), SAM(Adaptive(0.5))),
    "FisherMask(keep=1) is nothing": (SAM(FisherMask(Adaptive(0.5), keep=1.0, every=2)), SAM(Adaptive(0.5))),
    "FisherSAM(keep=1) is SAM": (FisherSAM(0.1, keep=1.0, every=2), SAM_),
    "SSAMF(keep=1) is SAM": (SSAMF(B, keep=1.0, every=2), SAM_),
    "DropGrow(keep=1) is nothing": (SAM(DropGrow(Adaptive(0.5), keep=1.0, every=2)), SAM(Adaptive(0.5))),
    "SSAMD(keep=1) is SAM": (SSAMD(0.1, keep=1.0, every=2), SAM_),
    "ZSharp(keep=1) is SAM": (ZSharp(0.1, keep=1.0), SAM_),
    "RSAM(sigma=0) is the method": (RSAM(0.0, BiSAM(0.1)), BiSAM(0.1)),
    "RSAM(sigma=0) of RSAM(sigma=0) is the method": (RSAM(0.0, RSAM(0.0, SAM_, filters=False)), SAM_),
    "FSAM(sigma=0) is SAM": (FSAM(0.1, sigma=0.0), SAM_),
    "VaSSO(theta=1) is SAM": (VaSSO(0.1, theta=1.0), SAM_),
    "WSAM(gamma=0.5) is SAM": (WSAM(B, gamma=0.5), SAM_),
    "WSAM(gamma=0) is ERM": (WSAM(B, gamma=0.0), ERM()),
    "GNP(alpha=1) is SAM": (GNP(0.1, alpha=1.0), SAM_),
    "GNP(alpha=0) is ERM": (GNP(0.1, alpha=0.0), ERM()),
    "GNP is WSAM": (GNP(0.1, alpha=3.0), WSAM(B, gamma=0.75)),
    "Lookbehind(steps=1, alpha=1) is SAM": (Lookbehind(B, steps=1, alpha=1.0), SAM_),
    "Lookbehind(0) of one step is ERM": (Lookbehind(L2(0.0), steps=1, alpha=1.0), ERM()),
    "Tilted(1) is the method": (Tilted(1, BiSAM(0.1)), BiSAM(0.1)),
    "SAMSPS with a loss far above its bound is SAM": (SAMSPS(B, floor=-1e9), SAM_),
    "SAMSPS(0) with a loss far above its bound is ERM": (SAMSPS(L2(0.0), floor=-1e9), ERM()),
    "EigenSAM(0) is ERM": (EigenSAM(L2(0.0), every=2), ERM()),
    "Accumulated(m=n) is the method": (Accumulated(8, BiSAM(0.1)), BiSAM(0.1)),
    "Accumulated(m>n) is the method, with a memory": (Accumulated(9, LookSAM(B, k=2)), LookSAM(B, k=2)),
    "Accumulated(m) of MSAM(m) is MSAM(m)": (Accumulated(4, MSAM(4, SAM_)), MSAM(4, SAM_)),
    "LookSAM(k=1) is SAM": (LookSAM(B, k=1), SAM_),
    "LookSAM(alpha=0) is now and then SAM": (LookSAM(B, k=3, alpha=0.0), Every(3, SAM_)),
    "Every(1) is the method": (Every(1, SAM_), SAM_),
    "Every(1) is the method, with a memory": (Every(1, LookSAM(B, k=2)), LookSAM(B, k=2)),
    "Every other is the other": (Every(3, ERM(), ERM()), ERM()),
    "During() is the method": (During(LookSAM(B, k=2)), LookSAM(B, k=2)),
    "During, too late, is the other": (During(SAM_, start=100, otherwise=FSAM(0.1)), FSAM(0.1)),
    "During, over, is the other": (During(SAM_, start=0, stop=1, otherwise=SAM_), SAM_),
    "CRSAM(0, 0) is SAM": (CRSAM(B, gamma=0.0, beta=0.0), SAM_),
    "XSAM(alpha=1) is SAM": (XSAM(B, alpha=1.0), SAM_),
    "AESAM(-1e9) is SAM": (AESAM(B, steps=6, first=-1e9, last=-1e9), SAM_),
    "AESAM(1e9) is SAM once": (AESAM(B, steps=6, first=1e9, last=1e9), During(SAM_, stop=1)),  # no variance at first
    "LESAM(sigma=0) is ERM": (LESAM(0.0), ERM()),
    "ZerothOrder(0) is ERM": (ZerothOrder(0.0, draws=2), ERM()),
    "FilterNoise(0) is ERM": (FilterNoise(0.0), ERM()),
    "FilterNoise that is scheduled to 0 is ERM": (FilterNoise(Linear(0.0, 0.0, steps=3)), ERM()),
    "RAPP(inner=1) is ERM": (RAPP(0.3, inner=1), ERM()),
    "RAPP in a box without bounds is RAPP": (RAPP(0.3, prox=Box(-inf, inf)), RAPP(0.3)),
    "RAPP in a box that is never left is RAPP": (RAPP(0.3, prox=Box(-1e3, 1e3)), RAPP(0.3)),
    "RAPP with L1(0) is RAPP": (RAPP(0.3, prox=L1(0.0)), RAPP(0.3)),
    "RAPP with no names is RAPP": (RAPP(0.3, prox={}), RAPP(0.3)),
    "CEGPlus without prox is ExtraGradient": (CEGPlus(0.3), ExtraGradient(0.3)),
    "CEGPlus with L1(0) is ExtraGradient": (CEGPlus(0.3, L1(0.0)), ExtraGradient(0.3)),
    "MomentumSAM(momentum=0, rho=0) is ERM": (MomentumSAM(L2(0.0), momentum=0.0), ERM()),
    "Constant is a number": (SAM(L2(Constant(0.1))), SAM_),
    "Linear between equals is a number": (SAM(Adaptive(Linear(0.5, 0.5, steps=3))), SAM(Adaptive(0.5))),
    # A radius of 0.
    "MultiStepSAM(0) is ERM": (MultiStepSAM(L2(0.0), steps=3), ERM()),
    "ESAM(0), of all examples, is ERM": (ESAM(RandomMask(L2(0.0)), gamma=1.0), ERM()),
    "FSAM(0) is ERM": (FSAM(0.0), ERM()),
    "VaSSO(0) is ERM": (VaSSO(0.0), ERM()),
    "ZSharp(0) is ERM": (ZSharp(0.0), ERM()),
    "GCSAM(0) is ERM": (GCSAM(0.0), ERM()),
    "PerTensor(0) is ERM": (SAM(PerTensor(0.0)), ERM()),
    "SAGM(0, alpha=0) is ERM": (SAGM(L2(0.0), alpha=0.0), ERM()),
    "FisherSAM(0) is ERM": (FisherSAM(0.0, every=2), ERM()),
    "SSAMF(0) is ERM": (SSAMF(L2(0.0), every=2), ERM()),
    "SSAMD(0) is ERM": (SSAMD(0.0, every=2), ERM()),
    "SAMON(0) is ERM": (SAMON(0.0), ERM()),
    "GSAM(0) is ERM": (GSAM(L2(0.0), alpha=1.0), ERM()),
    "CRSAM(0) is ERM": (CRSAM(L2(0.0), gamma=1.0, beta=1.0), ERM()),
    "LookSAM(0) is ERM": (LookSAM(L2(0.0), k=2), ERM()),
    "LookSAM-log(0) is ERM": (LookSAM(L2(0.0), NegLog(), k=2), ERM()),
    "AESAM(0) is ERM": (AESAM(L2(0.0), steps=6), ERM()),
    "MomentumSAM(0) is ERM": (MomentumSAM(L2(0.0)), ERM()),
    "KSAM(k=n) of SAM(0) is ERM": (KSAM(8, SAM(L2(0.0))), ERM()),
}
NEARLY: dict[str, tuple[Any, Any]] = {
    "XSAM(alpha~1) is SAM": (XSAM(B, alpha=1 - 1e-14), SAM_),
    "LESAM(sigma=1e9) is SAM(L2(rho_max))": (LESAM(1e9, rho_max=0.1), SAM_),
    "WSAM(0) is ERM": (WSAM(L2(0.0)), ERM()),
    "Lookbehind, adaptive, of one step is SAM": (Lookbehind(B, steps=1, alpha=None), SAM_),
    "Tilted of what draws nothing is the method": (Tilted(3, BiSAM(0.1), tilt=7.0), BiSAM(0.1)),
    "TSAM without noise is SAM": (TSAM(0.1, sigma=0.0, tilt=0.0), SAM_),
    "GAM(beta1=1, gamma=0) is SAM": (GAM(B, beta1=1.0, gamma=0.0), SAM_),
    "GAM(0) is ERM": (GAM(L2(0.0)), ERM()),
    "EigenSAM(alpha=0) is SAM": (EigenSAM(B, alpha=0.0, every=2), SAM_),
    "ImbSAM of all classes is SAM": (ImbSAM(0.1, tail=[0, 1, 2, 3]), SAM_),
    "ImbSAM of no example is ERM": (ImbSAM(0.1, tail=[9]), ERM()),
    "FocalSAM(gamma=0) is SAM": (FocalSAM(0.1, gamma=0.0, lam=1.0), SAM_),
    "FocalSAM(lam) is GNP": (FocalSAM(0.1, gamma=0.0, lam=0.7), GNP(0.1, alpha=0.7)),
    "ClassSAM climbs what it is told": (ClassSAM(B, NegLog(), weight=Tail([0, 1, 2, 3])), BiSAM(0.1)),
    "GNP(0) is ERM": (GNP(0.0), ERM()),
    "StableSAM(0) is ERM": (StableSAM(L2(0.0)), ERM()),
    "BilateralSAM(0) is ERM": (BilateralSAM(L2(0.0)), ERM()),
    "SAGM(alpha=0) is GNP(alpha=0.5)": (SAGM(B, alpha=0.0), GNP(0.1, alpha=0.5)),
    "FunctionalSAM(0) is ERM": (FunctionalSAM(L2(0.0)), ERM()),
}


def trained(method, make_model, dtype=torch.double) -> tuple[Any, nn.Module]:
    torch.manual_seed(3)
    model = make_model().to(dtype)
    sharp = SharpnessAware(model, method, cross_entropy)
    return cases.train(lambda x, y: sharp(x.to(dtype), y), model), model


@pytest.mark.parametrize("model", ["mlp", "convnet"])
@pytest.mark.parametrize("case", SAME)
def test_is_the_same_to_the_bit(case, model):
    first, second = SAME[case]
    assert trained(first, FAMILY_MODELS[model])[0] == trained(second, FAMILY_MODELS[model])[0]


@pytest.mark.parametrize("case", [c for c in SAME if "LookSAM" in c or "GSAM" in c])
def test_is_the_same_to_the_bit_in_float32(case):
    first, second = SAME[case]
    assert trained(first, FAMILY_MODELS["mlp"], torch.float)[0] == trained(second, FAMILY_MODELS["mlp"], torch.float)[0]


@pytest.mark.parametrize("model", ["mlp", "convnet"])
@pytest.mark.parametrize("case", NEARLY)
def test_is_nearly_the_same(case, model):
    (_, first), (_, second) = (trained(method, FAMILY_MODELS[model]) for method in NEARLY[case])
    close(references.flat(first), references.flat(second), 1e-12)


OF_EXAMPLES = {"FunctionalSAM": FunctionalSAM(B), "MESA": MESA(BiSAM(0.1), lam=3.0), "GSAM": GSAM(B)}
"""Methods, some of whose objectives know the examples of a batch."""


@pytest.mark.parametrize("m", [1, 2, 3])
@pytest.mark.parametrize("name", OF_EXAMPLES)
def test_micro_batches_of_one_perturbation_are_the_whole_batch(name, m):
    method = OF_EXAMPLES[name]
    (_, whole), (_, parts) = (trained(one, FAMILY_MODELS["mlp"]) for one in (method, Accumulated(m, method)))
    close(references.flat(parts), references.flat(whole), 1e-12)


def test_micro_batches_of_saf_are_the_whole_batch():
    models = []
    for wrap in (lambda method: method, lambda method: Accumulated(3, method)):
        torch.manual_seed(3)
        model = FAMILY_MODELS["mlp"]()
        method = SAF(epoch=1, examples=8, ago=1, start=0, lam=3.0, indices=lambda batch: torch.arange(len(batch[1])))
        cases.train(SharpnessAware(model, wrap(method), cross_entropy), model)
        models.append(references.flat(model))
    close(models[1], models[0], 1e-12)


@pytest.mark.parametrize("alpha", [None, 0.0, 0.5, 2.0])
@pytest.mark.parametrize("rho", [0.0, 1e-30, 0.1])
def test_xsam_is_finite(rho, alpha):
    model = trained(XSAM(L2(rho), alpha=alpha, every=2), FAMILY_MODELS["mlp"])[1]
    assert references.flat(model).isfinite().all()
