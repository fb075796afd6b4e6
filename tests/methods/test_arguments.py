"""Wrong arguments of methods and perturbations are named with their value."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from bisam import (
    AESAM,
    ASAM,
    BSAM,
    CRSAM,
    ERM,
    ESAM,
    GAM,
    GNP,
    GSAM,
    KSAM,
    LESAM,
    MSAM,
    RAPP,
    RSAM,
    SAGM,
    SAM,
    SAMON,
    SAMSPS,
    SSAMF,
    TSAM,
    WSAM,
    XSAM,
    ABiSAM,
    Accumulated,
    BilateralSAM,
    Binary,
    BiSAM,
    CEGPlus,
    During,
    EBiSAM,
    EigenSAM,
    Every,
    FilterNoise,
    FisherSAM,
    FunctionalSAM,
    Lookbehind,
    LookSAM,
    LowerBound,
    MomentumSAM,
    MultiStepSAM,
    NegLog,
    SAMPa,
    SharpnessAware,
    Tanh,
    Tilted,
    VaSSO,
    ZerothOrder,
    ZSharp,
    cross_entropy,
)
from bisam.masks import DropGrow, FisherMask, RandomMask
from bisam.perturbations import L2, Adaptive, Centralised, Friendly, NormLayers, PerTensor
from bisam.proximal import L1, Box, Simplex
from tests.support import cases

# Losses that a method cannot use.


def test_functional_sam_refuses_a_loss_with_parameters():
    class Tempered(nn.Module):
        def __init__(self):
            super().__init__()
            self.heat = nn.Parameter(torch.ones((), dtype=torch.double))

        def forward(self, outputs, targets):
            return cross_entropy(outputs * self.heat, targets)

    with pytest.raises(ValueError, match="cannot train the parameters of the loss Tempered"):
        SharpnessAware(cases.mlp(), FunctionalSAM(), Tempered())(*cases.batch())


@pytest.mark.parametrize("method", [KSAM(2), ESAM()], ids=["KSAM", "ESAM"])
def test_choosing_examples_by_flattened_losses_is_refused(method):
    def forward(model, x, y):
        return model(x.flatten(0, 1)), y.flatten()

    x, y = torch.randn(4, 5, 6, dtype=torch.double), torch.zeros(4, 5, dtype=torch.long)
    with pytest.raises(ValueError, match="20 losses for 4 examples"):
        SharpnessAware(cases.mlp(), method, cross_entropy, forward)(x, y)


# Hyper-parameters.


@pytest.mark.parametrize("bad", [-0.1, float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("rho", L2),
        ("rho", Adaptive),
        ("eta", lambda eta: Adaptive(0.5, eta)),
        ("rho", BiSAM),
        ("rho", ASAM),
        ("eta", lambda eta: ASAM(0.5, eta)),
        ("rho", ABiSAM),
        ("eta", lambda eta: ABiSAM(0.5, eta=eta)),
        ("mu", NegLog),
        ("mu", Tanh),
        ("alpha", lambda alpha: Tanh(1.0, alpha)),
        ("mu", lambda mu: LowerBound(torch.tanh, mu)),
    ],
)
def test_a_hyper_parameter_out_of_range_is_named(name, make, bad):
    with pytest.raises(ValueError, match=rf"{name} must be .* finite, got {bad}"):
        make(bad)


@pytest.mark.parametrize("m", [0, -3])
def test_msam_needs_at_least_one_example(m):
    with pytest.raises(ValueError, match=f"at least 1, got {m}"):
        MSAM(m)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((lambda x: x, SAM(), cross_entropy), "model must be a torch.nn.Module, got function"),
        ((nn.Linear, SAM(), cross_entropy), "model must be a torch.nn.Module, got type"),
        ((nn.Linear(1, 1), SAM, cross_entropy), r"method is the class SAM, not an instance: write SAM\(...\)"),
        ((nn.Linear(1, 1), "SAM", cross_entropy), r"method must be SAM\(\), BiSAM\(\) or another .*, got 'SAM'"),
        ((nn.Linear(1, 1), SAM(), nn.CrossEntropyLoss), "loss is the class CrossEntropyLoss, not an instance"),
        ((nn.Linear(1, 1), SAM(), None), "loss must be bisam.cross_entropy or another .*, got None"),
        ((nn.Linear(1, 1), SAM(), cross_entropy, (1, 2)), "forward must be a function .*, got"),
    ],
)
def test_an_argument_of_another_kind_is_named(arguments, message):
    with pytest.raises(TypeError, match=message):
        SharpnessAware(*arguments)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: SAM("0.05"),
            r"perturb must be a radius such as 0.05, or .* got '0.05'",
        ),
        (lambda: SAM(NegLog()), "perturb must be a radius or a perturbation .* got the objective NegLog"),
        (lambda: SAM(Binary()), "perturb must be a radius or a perturbation .* got the objective Binary"),
        (lambda: SAM(True), "rho must be a number, got True"),
        (lambda: LookSAM(None), "perturb must be a radius .* got None"),
        (lambda: SAM(L2), "perturb is the class L2"),
        (lambda: SAM(ascent=NegLog), "ascent is the class NegLog"),
        (lambda: BiSAM(NegLog()), "perturb must be a radius or a perturbation .* got the objective NegLog"),
        (lambda: BiSAM(bound=NegLog), "ascent is the class NegLog"),
        (lambda: MSAM(32, SAM), "method is the class SAM"),
        (lambda: MSAM(4.0), "must be an int, got 4.0"),
        (lambda: MSAM(SAM()), "must be an int"),
        (lambda: L2(True), "rho must be a number, got True"),
        (lambda: NegLog("1"), "mu must be a number, got '1'"),
    ],
)
def test_a_wrong_argument_is_named_where_it_is_given(make, message):
    with pytest.raises(TypeError, match=message):
        make()


@pytest.mark.parametrize("make", [SAM, GSAM, LookSAM, MomentumSAM, MultiStepSAM, WSAM, ESAM])
@pytest.mark.parametrize("name", ["rho", "adaptive", "eta"])
def test_an_argument_of_other_packages_has_a_remedy_that_works(make, name):
    with pytest.raises(TypeError, match=f"{make.__name__} has no argument '{name}': ") as caught:
        make(**{name: 0.1})
    remedies = [part for part in re.findall(r"\w+\(.*?\)+", str(caught.value)) if part.startswith(make.__name__)]
    assert remedies
    for remedy in remedies:
        assert isinstance(eval(remedy, {"L2": L2, "Adaptive": Adaptive, make.__name__: make}), make)


def test_an_unknown_argument_is_named_beside_those_that_there_are():
    with pytest.raises(TypeError, match="GSAM has no argument 'beta': its arguments are perturb, ascent, descent"):
        GSAM(0.1, beta=0.4)  # pyright: ignore[reportCallIssue]


def test_a_subclass_has_arguments_of_its_own():
    class Mine(SAM):
        def __init__(self, *, rho: float, **others: Any) -> None:
            super().__init__(rho, **others)

    assert Mine(rho=0.2, ascent=NegLog()).perturb == L2(0.2)
    assert copy.deepcopy(Mine(rho=0.2)).perturb == L2(0.2)
    with pytest.raises(TypeError, match="unexpected keyword argument 'other'"):
        Mine(rho=0.2, other=1)


# The range of each argument, and losses and models that a method cannot use.

NAN, INF = float("nan"), float("inf")
SHARES = [0.0, -0.1, 1.5, NAN, INF, True, "half", None]  # for (0, 1]
PORTIONS = [-0.1, 1.5, NAN, INF, True, "half", None]  # for [0, 1]
POSITIVE = [0.0, -1.0, NAN, INF, True, "one", None]
AT_LEAST_ZERO = [-1.0, NAN, INF, -INF, True, "one"]
WHOLE = [0, -1, 2.0, NAN, True, "two", 2**63]
OUTSIDE: dict[str, tuple[Callable[[Any], Any], list[Any]]] = {
    "rho": (L2, AT_LEAST_ZERO),
    "eta": (lambda v: Adaptive(0.1, v), [*AT_LEAST_ZERO, None]),
    "sigma": (lambda v: Friendly(sigma=v), [*AT_LEAST_ZERO, None]),
    "lam": (lambda v: Friendly(lam=v), PORTIONS),
    "theta": (lambda v: VaSSO(theta=v), SHARES),
    "rho_max": (lambda v: LESAM(rho_max=v), POSITIVE),
    "sigma, loss": (lambda v: LESAM(v), AT_LEAST_ZERO),
    "beta": (lambda v: RandomMask(beta=v), SHARES),
    "per": (lambda v: RandomMask(per=v), ["layer", None, 3]),
    "keep, z": (lambda v: ZSharp(keep=v), SHARES),
    "keep, Fisher": (lambda v: FisherSAM(keep=v), SHARES),
    "every, Fisher": (lambda v: FisherSAM(every=v), WHOLE),
    "keep, grow": (lambda v: DropGrow(keep=v), SHARES),
    "drop": (lambda v: DropGrow(drop=v), PORTIONS),
    "every, grow": (lambda v: DropGrow(every=v), WHOLE),
    "steps, grow": (lambda v: DropGrow(steps=v), WHOLE),
    "keep, SSAMF": (lambda v: SSAMF(keep=v), SHARES),
    "every, SSAMF": (lambda v: SSAMF(every=v), WHOLE),
    "samples": (lambda v: SSAMF(samples=v), [*WHOLE, 10_001]),
    "steps, climb": (lambda v: MultiStepSAM(steps=v), [*WHOLE, 1001]),
    "gamma, examples": (lambda v: ESAM(gamma=v), SHARES),
    "k, LookSAM": (lambda v: LookSAM(k=v), WHOLE),
    "alpha, LookSAM": (lambda v: LookSAM(alpha=v), [*AT_LEAST_ZERO, None]),
    "steps, AESAM": (lambda v: AESAM(steps=v), WHOLE),
    "first": (lambda v: AESAM(steps=9, first=v), [NAN, INF, True, "one", None]),
    "last": (lambda v: AESAM(steps=9, last=v), [NAN, -INF, True, "one", None]),
    "delta": (lambda v: AESAM(steps=9, delta=v), PORTIONS),
    "momentum": (lambda v: MomentumSAM(momentum=v), [-0.1, 1.0, NAN, INF, True, "half", None]),
    "lam, SAMPa": (lambda v: SAMPa(ahead=L2(0.1), lam=v), PORTIONS),
    "alpha, GSAM": (lambda v: GSAM(alpha=v), [*AT_LEAST_ZERO, None]),
    "gamma, WSAM": (lambda v: WSAM(gamma=v), [-0.1, 1.0, NAN, INF, True, "half", None]),
    "alpha, GNP": (lambda v: GNP(alpha=v), [*AT_LEAST_ZERO, None]),
    "rho, PerTensor": (PerTensor, AT_LEAST_ZERO),
    "alpha, SAGM": (lambda v: SAGM(alpha=v), [*AT_LEAST_ZERO, None]),
    "behind": (lambda v: BilateralSAM(behind=v), [*AT_LEAST_ZERO, None]),
    "steps, Lookbehind": (lambda v: Lookbehind(steps=v), [*WHOLE, 1001]),
    "alpha, Lookbehind": (lambda v: Lookbehind(alpha=v), [v for v in SHARES if v is not None]),
    "beta0": (lambda v: GAM(beta0=v), PORTIONS),
    "beta1, GAM": (lambda v: GAM(beta1=v), PORTIONS),
    "gamma, GAM": (lambda v: GAM(gamma=v), [*AT_LEAST_ZERO, None]),
    "rho, GAM": (lambda v: GAM(climb_norm=v), [v for v in AT_LEAST_ZERO if not isinstance(v, str)]),
    "samples, Tilted": (lambda v: Tilted(v), [*WHOLE, 1001]),
    "tilt": (lambda v: Tilted(tilt=v), [*AT_LEAST_ZERO, None]),
    "sigma, TSAM": (lambda v: TSAM(sigma=v), [*AT_LEAST_ZERO, None]),
    "radius": (lambda v: RSAM(0.1, radius=v), [v for v in POSITIVE if v is not None]),
    "draws": (lambda v: ZerothOrder(draws=v), [*WHOLE, 1001]),
    "epsilon": (lambda v: ZerothOrder(epsilon=v), POSITIVE),
    "seed": (lambda v: ZerothOrder(seed=v), [-1, 2.0, NAN, True, "two", 2**63]),
    "seed, FilterNoise": (lambda v: FilterNoise(seed=v), [-1, 2.0, NAN, True, "two", 2**63]),
    "sigma, FilterNoise": (FilterNoise, [*AT_LEAST_ZERO, None]),
    "alpha, EigenSAM": (lambda v: EigenSAM(alpha=v), [*AT_LEAST_ZERO, None]),
    "every, EigenSAM": (lambda v: EigenSAM(every=v), WHOLE),
    "iterations": (lambda v: EigenSAM(iterations=v), [*WHOLE, 1001]),
    "r": (lambda v: EigenSAM(r=v), POSITIVE),
    "floor": (lambda v: SAMSPS(floor=v), [NAN, INF, True, "one", None]),
    "gamma_b": (lambda v: SAMSPS(gamma_b=v), POSITIVE),
    "weight_decay": (lambda v: SAMSPS(weight_decay=v), [*AT_LEAST_ZERO, None]),
    "gamma, CRSAM": (lambda v: CRSAM(gamma=v), [*AT_LEAST_ZERO, None]),
    "beta, CRSAM": (lambda v: CRSAM(beta=v), [*AT_LEAST_ZERO, None]),
    "rho_max, XSAM": (lambda v: XSAM(rho_max=v), POSITIVE),
    "every, XSAM": (lambda v: XSAM(every=v), WHOLE),
    "alpha, XSAM": (lambda v: XSAM(alpha=v), AT_LEAST_ZERO),
    "examples": (lambda v: BSAM(v), POSITIVE),
    "rho, BSAM": (lambda v: BSAM(10, v), AT_LEAST_ZERO),
    "prior": (lambda v: BSAM(10, prior=v), [*AT_LEAST_ZERO, None]),
    "damping": (lambda v: BSAM(10, damping=v), POSITIVE),
    "beta1": (lambda v: BSAM(10, beta1=v), [-0.1, 1.0, NAN, True, "half", None]),
    "beta2": (lambda v: BSAM(10, beta2=v), [-0.1, 1.0, NAN, True, "half", None]),
    "s": (lambda v: BSAM(10, s=v), POSITIVE),
    "gamma, RAPP": (RAPP, POSITIVE),
    "inner": (lambda v: RAPP(0.1, v), [*WHOLE, 1001]),
    "gamma, CEGPlus": (CEGPlus, POSITIVE),
    "low": (lambda v: Box(v, 1.0), [NAN, 2.0, True, "one", None]),
    "high": (lambda v: Box(0.0, v), [NAN, -2.0, True, "one", None]),
    "weight": (L1, [*AT_LEAST_ZERO, None]),
    "total": (Simplex, POSITIVE),
    "fresh": (lambda v: RAPP(0.1, fresh=v), [1, "yes", None]),
    "m": (MSAM, WHOLE),
    "m, the number": (Accumulated, WHOLE),
    "accumulation": (
        lambda v: SharpnessAware(nn.Linear(2, 2), SAM(), cross_entropy, accumulation=v),
        WHOLE,
    ),
    **{
        name: (lambda v, name=name: SharpnessAware(nn.Linear(2, 2), SAM(), cross_entropy, **{name: v}), [1, "no", None])
        for name in ("same_noise", "in_eval_mode", "stats", "overlap")
    },
    "k, KSAM": (KSAM, WHOLE),
    "sigma, RSAM": (RSAM, [*AT_LEAST_ZERO, None]),
    "k, Every": (Every, WHOLE),
    "start": (lambda v: During(start=v), [-1, 2.0, True, "two", None]),
    "stop": (lambda v: During(start=3, stop=v), [3, 2, 0, 4.0, True, "two"]),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_what_is_outside_its_range_is_named_with_its_value(name):
    make, values = OUTSIDE[name]
    for value in values:
        kinds = TypeError if isinstance(value, str | bool | None) and name != "per" else (TypeError, ValueError)
        with pytest.raises(kinds, match=rf"{name.split(',')[0]}\b.*{repr(value).removesuffix('.0')}"):
            make(value)


CALLABLE: dict[str, Callable[[Any], Any]] = {
    "perturb": SAM,
    "perturb, GSAM": GSAM,
    "perturb, MomentumSAM": MomentumSAM,
    "perturb, Friendly": Friendly,
    "perturb, RandomMask": RandomMask,
    "perturb, Centralised": Centralised,
    "perturb, BilateralSAM": BilateralSAM,
    "ascent": lambda v: SAM(L2(0.1), v),
    "descent": lambda v: MultiStepSAM(L2(0.1), None, v),
    "descent, MomentumSAM": lambda v: MomentumSAM(L2(0.1), v),
    "ascent, BSAM": lambda v: BSAM(10, ascent=v),
    "perturb, ZerothOrder": ZerothOrder,
    "where": lambda v: FilterNoise(where=v),
    "descent, FilterNoise": lambda v: FilterNoise(descent=v),
    "select": lambda v: ESAM(select=v),
    "ahead": lambda v: SAMPa(ahead=v),
    "method, MSAM": lambda v: MSAM(4, v),
    "method, Tilted": lambda v: Tilted(3, v),
    "perturb, GAM": lambda v: GAM(climb_norm=v),
    "method, Accumulated": lambda v: Accumulated(4, v),
    "buffer": lambda v: MomentumSAM(buffer=v),
    "method, KSAM": lambda v: KSAM(4, v),
    "method, RSAM": lambda v: RSAM(0.1, v),
    "method, Every": lambda v: Every(2, v),
    "otherwise, Every": lambda v: Every(2, SAM(), v),
    "method, During": lambda v: During(v),
    "otherwise, During": lambda v: During(SAM(), otherwise=v),
    "prox": lambda v: RAPP(0.1, prox=v),
    "prox, CEGPlus": lambda v: CEGPlus(0.1, v),
}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (name, value)
        for name in CALLABLE
        for value in (0.1, NegLog, "sam")
        if value != 0.1 or not name.startswith("perturb")  # where a number is a radius
    ],
    ids=str,
)
def test_what_cannot_be_called_or_is_a_class_is_named(name, value):
    with pytest.raises(TypeError, match=rf"{name.split(',')[0]}.*({value}|NegLog)"):
        CALLABLE[name](value)


@pytest.mark.parametrize(
    ("method", "inside"),
    [
        (LookSAM(), "LookSAM"),
        (GSAM(Friendly()), "Friendly"),
        (KSAM(2, RSAM(0.1, VaSSO())), "Smoothed"),
        (Every(2, ERM(), MomentumSAM()), "MomentumSAM"),
        (SAM(RandomMask(FisherMask())), "FisherMask"),
        (XSAM(), "XSAM"),
    ],
    ids=lambda v: str(v),
)
def test_msam_asks_whether_to_keep_memories_apart(method, inside):
    with pytest.raises(ValueError, match=rf"(?s){inside}.*separate=True"):
        MSAM(4, method)
    assert MSAM(4, method, separate=True)


@pytest.mark.parametrize("method", [XSAM(alpha=1.0), KSAM(2, EBiSAM()), RSAM(0.1), Every(2), lambda o, b: ERM()(o, b)])
def test_msam_takes_what_has_no_memory(method):
    assert MSAM(4, method)


PER_EXAMPLE = {
    "ESAM": ESAM(L2(0.1)),
    "EBiSAM": EBiSAM(0.1),
    "ESAM, selecting": ESAM(L2(0.1), select=lambda z, y: cross_entropy(z, y).mean()),
    "KSAM": KSAM(3),
    "Every-KSAM": Every(1, RSAM(0.0, KSAM(3))),
}


@pytest.mark.parametrize("method", PER_EXAMPLE.values(), ids=PER_EXAMPLE)
def test_a_scalar_where_one_loss_per_example_is_needed_is_refused(method):
    scalar = cross_entropy if getattr(method, "select", None) else nn.CrossEntropyLoss()
    with pytest.raises(TypeError, match="reduction"):
        SharpnessAware(cases.mlp(), method, scalar)(*cases.batch())


@pytest.mark.parametrize("method", [ESAM(gamma=1.0), GSAM(), MSAM(3), LookSAM(), XSAM(), FunctionalSAM()], ids=str)
def test_a_scalar_loss_is_enough_for_others(method):
    first = SharpnessAware(cases.mlp(), method, nn.CrossEntropyLoss())(*cases.batch())
    assert first.isfinite()


@pytest.mark.parametrize("k", [9, 1000])
def test_more_examples_than_the_batch_has_are_refused(k):
    with pytest.raises(ValueError, match=rf"{k}.*8|8.*{k}"):
        SharpnessAware(cases.mlp(), KSAM(k), cross_entropy)(*cases.batch())


@pytest.mark.parametrize("method", [SAMON(0.1), SAM(NormLayers(Adaptive(0.1))), SAM(Friendly(NormLayers()))], ids=str)
def test_a_model_without_norm_layers_is_refused(method):
    with pytest.raises(ValueError, match="normalisation layer"):
        SharpnessAware(cases.mlp(), method, cross_entropy)(*cases.batch())


def test_functional_sam_needs_one_tensor():
    def forward(model, x, y):
        return {"logits": model(x)}, y

    sharp = SharpnessAware(cases.mlp(), FunctionalSAM(), lambda z, y: cross_entropy(z["logits"], y), forward)
    with pytest.raises(TypeError, match=r"FunctionalSAM.*tensor"):
        sharp(*cases.batch())
