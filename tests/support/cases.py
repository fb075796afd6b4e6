"""Models, batches, optimizers and methods as data, and what tests ask of weights: a new case is one more row."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from math import cos, pi
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

import bisam
from bisam import (
    AESAM,
    ASAM,
    BSAM,
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
    OBF,
    RAPP,
    RSAM,
    SAF,
    SAGM,
    SAM,
    SAMDB,
    SAMON,
    SAMSPS,
    SSAMD,
    SSAMF,
    TSAM,
    WSAM,
    XSAM,
    ABiSAM,
    Accumulated,
    AsyncSAM,
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
    MomentumSAM,
    MultiStepSAM,
    NegLog,
    Only,
    OptSAM,
    Oracle,
    SAMPa,
    StableSAM,
    Tanh,
    Tilted,
    VaSSO,
    Vector,
    WrongClasses,
    ZerothOrder,
    ZSharp,
    momentum_of,
    next_step,
)
from bisam.masks import DropGrow, FisherMask, RandomMask
from bisam.methods.longtail import ClassSAM, Tail
from bisam.perturbations import (
    L2,
    Adaptive,
    Centralised,
    Friendly,
    LossEquated,
    NormLayers,
    PerGroup,
    PerTensor,
    Smoothed,
    ZScore,
)
from bisam.schedules import Cosine, FlipRate, Follow, Linear, Warmup
from tests.support import references

CLASSES = 4


POINTS, LABELS = torch.randn(8, 4, generator=torch.Generator().manual_seed(1)).double(), torch.arange(8) % 3


def linear() -> nn.Module:
    """A model for `POINTS` and `LABELS`."""
    torch.manual_seed(0)
    return nn.Linear(4, 3).double()


class Tied(nn.Module):
    """One matrix as encoder and decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.middle, self.decode = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6, bias=False)
        self.decode.weight = self.encode.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(torch.tanh(self.middle(torch.tanh(self.encode(x)))))[:, :CLASSES]


def mlp(norm: Callable[[int], nn.Module] | None = None) -> nn.Sequential:
    middle = [] if norm is None else [norm(8)]
    return nn.Sequential(nn.Linear(6, 8), *middle, nn.Tanh(), nn.Linear(8, CLASSES)).double()


def normed() -> nn.Sequential:
    return mlp(nn.BatchNorm1d)


class ComplexLinear(nn.Module):
    """With gradients that autograd conjugates lazily; with `real`, its parameters are real and imaginary parts."""

    def __init__(self, inputs: int, outputs: int, real: bool) -> None:
        super().__init__()
        weight, bias = (
            torch.randn(*shape, dtype=torch.cdouble) / inputs**0.5 for shape in ((inputs, outputs), (outputs,))
        )
        self.weight, self.bias = (nn.Parameter(torch.view_as_real(z) if real else z) for z in (weight, bias))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = (p if p.is_complex() else torch.view_as_complex(p) for p in (self.weight, self.bias))
        return x.to(torch.cdouble) @ weight.conj() + bias


class ComplexNorm(ComplexLinear):
    """A normalisation layer by its name; multiplies each channel by a number."""

    def __init__(self, channels: int, real: bool) -> None:
        super().__init__(1, channels, real)
        self.weight = nn.Parameter(self.weight.detach()[0])

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = (p if p.is_complex() else torch.view_as_complex(p) for p in (self.weight, self.bias))
        return x / x.abs().square().mean(1, keepdim=True).sqrt() * weight.conj() + bias


class Squash(nn.Module):
    """Unlike tanh it is bounded for all complex numbers."""

    def forward(self, z: Tensor) -> Tensor:
        return z / (1 + z.abs().square()).sqrt()


class Logits(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return torch.view_as_real(z).sum(-1)


def complex_mlp(*, real: bool = False) -> nn.Sequential:
    """A model of complex parameters, or the same model of their real and imaginary parts."""
    layers = ComplexLinear(6, 8, real), ComplexNorm(8, real), Squash(), ComplexLinear(8, CLASSES, real)
    return nn.Sequential(*layers, Logits())


def convnet() -> nn.Sequential:
    # No bias before a norm: its gradient is rounding noise, which AdamW would blow up to a step of full length.
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)),
        nn.Conv2d(1, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.Tanh(),
        nn.Conv2d(4, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(24, CLASSES),
    ).double()


MODELS: dict[str, Callable[[], nn.Module]] = {"mlp": mlp, "convnet": convnet, "tied": lambda: Tied().double()}

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=5e-3),
    "adamw": partial(torch.optim.AdamW, lr=1e-2, weight_decay=1e-2),
}


def batch(seed: int = 0, n: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 6, generator=generator, dtype=torch.double)
    return x, torch.randint(CLASSES, (n,), generator=generator)


CE = partial(F.cross_entropy, reduction="none")
LOG = partial(references.q, references.phi_log, 1.0)
TANH = partial(references.q, references.phi_tanh(0.1), 10.0)


def rows(batch: tuple[Tensor, Tensor]) -> Tensor:
    """The numbers of the examples, where each batch has the same examples."""
    return torch.arange(len(batch[1]))


def is_norm(name: str, p: Tensor) -> bool:
    return p.dim() == 1 and (name.startswith(("1.", "2.", "5.")))  # of `convnet` and of `mlp(norm)`


def is_weight(name: str, p: Tensor) -> bool:
    return not name.endswith("bias")


def is_matrix(name: str, p: Tensor) -> bool:
    return p.dim() > 1


def lr(step: references.Step) -> float:
    return step.optimizer.param_groups[0]["lr"]


BASIC = [SAM(L2(0.5)), BiSAM(0.5), ASAM(0.5), MSAM(3, SAM(L2(0.5)))]
"""Methods with large displacements, for what holds for any step."""

# The family: a method for an optimizer, and its slow twin. Intervals are short, so that few steps see all that happens.

A_MODEL = partial(mlp, nn.LayerNorm)  # with norm layers, for the methods that know them
PLAIN = ("SAM", "BiSAM", "BiSAM-tanh", "ASAM", "ASAM-official", "ABiSAM", "MSAM")
"""Rows of `FAMILY` that are compared with their references on all `MODELS`."""
FAMILY_MODELS = {**MODELS, "mlp": A_MODEL}
B = references.l2(0.1)


def ridge(point: Vector, oracle: Oracle, gamma: float) -> Vector:
    """The proximal operator of 0.35 ||w||^2; smooth, so that Adam does not divide by rounding errors."""
    return point / (1 + 0.7 * gamma)


FAMILY: dict[str, tuple[Callable[[torch.optim.Optimizer], Any], references.Twin]] = {
    "ERM": (lambda o: ERM(), references.erm(CE)),
    "SAM": (lambda o: SAM(L2(0.1)), references.climbing(B, CE, CE)),
    "SAM-descent": (lambda o: SAM(L2(0.1), Tanh(), NegLog()), references.climbing(B, TANH, LOG)),
    "BiSAM": (lambda o: BiSAM(0.1), references.climbing(B, LOG, CE)),
    # Other adversaries.
    "BiSAM-rising": (
        lambda o: BiSAM(0.1, NegLog(Linear(0.5, 4.0, steps=8, begin=3))),
        references.of_step(
            lambda n: references.climbing(
                B, partial(references.q, references.phi_log, 0.5 + 3.5 * min(max((n - 3) / 8, 0), 1)), CE
            )
        ),
    ),
    "WrongClasses": (
        lambda o: SAM(L2(0.1), WrongClasses(NegLog(2.0), margin=0.7)),
        references.climbing(B, partial(references.q_wrong, references.phi_log, 2.0, 0.7), CE),
    ),
    "OBF": (lambda o: SAM(L2(0.1), OBF(0.8)), references.climbing(B, partial(references.obf, 0.8, 0.25, False), CE)),
    "FlipRate": (
        lambda o: SAM(FlipRate(0.2, start=0.02, gain=0.3, high=0.3)),
        references.flip_rate(references.l2, CE, CE, target=0.2, start=0.02, gain=0.3, high=0.3),
    ),
    "FlipRate-every-friendly-adaptive-log": (
        lambda o: Every(2, SAM(Friendly(Adaptive(FlipRate(0.1, start=0.4, gain=0.5))), NegLog())),
        references.every(
            2,
            references.flip_rate(
                lambda rho: references.friendly(references.adaptive(rho), 1.0, 0.9), LOG, CE, 0.1, 0.4, 0.5, 10.0
            ),
            references.erm(CE),
        ),
    ),
    "MultiStepSAM": (lambda o: MultiStepSAM(L2(0.1), steps=3), references.multi_step(B, CE, CE, 3)),
    "MultiStepSAM-tanh": (lambda o: MultiStepSAM(L2(0.1), Tanh(), NegLog()), references.multi_step(B, TANH, LOG, 2)),
    "MultiStepSAM-adaptive": (
        lambda o: MultiStepSAM(Adaptive(0.5), steps=2),
        references.multi_step(references.adaptive(0.5), CE, CE, 2),
    ),
    "EigenSAM": (lambda o: EigenSAM(L2(0.1), every=4), references.eigen_sam(B, CE, CE, 0.2, 4)),
    "EigenSAM-log": (
        lambda o: EigenSAM(Friendly(Adaptive(0.5)), NegLog(), alpha=1.0, every=3, iterations=2, r=0.05),
        references.eigen_sam(
            references.friendly(references.adaptive(0.5), 1.0, 0.9), LOG, CE, 1.0, 3, iterations=2, r=0.05
        ),
    ),
    "SAMSPS": (lambda o: SAMSPS(floor=0.3, gamma_b=2.0), references.sam_sps(B, CE, CE, 0.3, 2.0, 0.0)),
    "SAMSPS-log": (
        lambda o: SAMSPS(Adaptive(0.5), NegLog(), floor=-1.0, weight_decay=0.02),
        references.sam_sps(references.adaptive(0.5), LOG, CE, -1.0, 1.0, 0.02),
    ),
    # Masks and what else is done to a gradient or a displacement.
    "RandomMask": (
        lambda o: SAM(RandomMask(L2(0.1), beta=0.4)),
        references.climbing(references.random_mask(B, 0.4, "tensor"), CE, CE),
    ),
    "RandomMask-entry": (
        lambda o: SAM(RandomMask(L2(0.1), beta=0.3, per="entry"), ascent=NegLog()),
        references.climbing(references.random_mask(B, 0.3, "entry"), LOG, CE),
    ),
    "RandomMask-friendly": (
        lambda o: SAM(RandomMask(Friendly(Adaptive(0.5)), beta=0.7)),
        references.climbing(
            references.masked_afterwards(references.friendly(references.adaptive(0.5), 1.0, 0.9), 0.7), CE, CE
        ),
    ),
    "Only-RandomMask-adaptive": (
        lambda o: GSAM(Only(is_weight, RandomMask(Adaptive(0.5), beta=0.4)), NegLog()),
        references.gsam(
            references.only(references.random_mask(references.adaptive(0.5), 0.4, "tensor", is_weight), is_weight),
            LOG,
            CE,
            0.4,
        ),
    ),
    "Friendly-RandomMask": (
        lambda o: SAM(Friendly(RandomMask(L2(0.1), beta=0.5))),
        references.climbing(references.friendly(references.random_mask(B, 0.5, "tensor"), 1.0, 0.9), CE, CE),
    ),
    "FSAM": (lambda o: FSAM(0.1, lam=0.6), references.climbing(references.friendly(B, 1.0, 0.6), CE, CE)),
    "FSAM-log": (
        lambda o: FSAM(0.1, sigma=0.5, ascent=NegLog()),
        references.climbing(references.friendly(B, 0.5, 0.9), LOG, CE),
    ),
    "VaSSO": (lambda o: VaSSO(0.1, theta=0.4), references.climbing(references.smoothed(B, 0.4), CE, CE)),
    "VaSSO-tanh": (
        lambda o: VaSSO(0.1, ascent=Tanh()),
        references.climbing(references.smoothed(B, 0.9), TANH, CE),
    ),
    "Smoothed-friendly-adaptive": (
        lambda o: SAM(Smoothed(Friendly(Adaptive(0.5, 0.01), sigma=0.7), theta=0.4)),
        references.climbing(
            references.smoothed(references.friendly(references.adaptive(0.5, 0.01), 0.7, 0.9), 0.4), CE, CE
        ),
    ),
    "ZSharp": (lambda o: ZSharp(0.1, keep=0.3), references.climbing(references.outstanding(B, 0.3), CE, CE)),
    "ZSharp-log": (
        lambda o: ZSharp(0.1, ascent=NegLog()),
        references.climbing(references.outstanding(B, 0.05), LOG, CE),
    ),
    "ZScore-adaptive": (
        lambda o: SAM(ZScore(Adaptive(0.5), keep=0.21)),
        references.climbing(references.outstanding(references.adaptive(0.5), 0.21), CE, CE),
    ),
    "ZSharp-per-tensor": (
        lambda o: ZSharp(PerTensor(0.05), keep=0.2),
        references.climbing(references.outstanding(references.per_tensor(0.05), 0.2), CE, CE),
    ),
    "PerTensor-log": (
        lambda o: SAM(PerTensor(Linear(0.1, 0.02, steps=12)), NegLog()),
        references.of_step(lambda n: references.climbing(references.per_tensor(0.1 - 0.08 * min(n / 12, 1)), LOG, CE)),
    ),
    "GCSAM": (lambda o: GCSAM(0.1), references.climbing(references.centralised(B), CE, CE)),
    "Centralised-adaptive-tanh": (
        lambda o: SAM(Centralised(Adaptive(0.5, 0.01)), Tanh()),
        references.climbing(references.centralised(references.adaptive(0.5, 0.01)), TANH, CE),
    ),
    "SAMON": (lambda o: SAMON(0.1), references.climbing(references.norm_layers(B, is_norm), CE, CE)),
    "SAMON-adaptive-log": (
        lambda o: SAM(NormLayers(Adaptive(0.5, 0.01)), ascent=NegLog()),
        references.climbing(references.norm_layers(references.adaptive(0.5, 0.01), is_norm), LOG, CE),
    ),
    "Only": (lambda o: SAM(Only(is_weight, L2(0.1))), references.climbing(references.only(B, is_weight), CE, CE)),
    "PerGroup": (
        lambda o: SAM(PerGroup([(is_matrix, 0.1), (lambda name, p: True, Friendly(L2(0.05)))])),
        references.climbing(
            references.per_group(
                [B, references.friendly(references.l2(0.05), 1.0, 0.9)],
                [is_matrix, lambda name, p: not is_matrix(name, p)],
                together=False,
            ),
            CE,
            CE,
        ),
    ),
    "PerGroup-all-log": (
        lambda o: GSAM(PerGroup([(is_matrix, Adaptive(0.5)), (lambda name, p: True, L2(0.3))], norm="all"), NegLog()),
        references.gsam(
            references.per_group(
                [references.adaptive(0.5), references.l2(0.3)],
                [is_matrix, lambda name, p: not is_matrix(name, p)],
                together=True,
            ),
            LOG,
            CE,
            0.4,
        ),
    ),
    "Only-smoothed-log": (
        lambda o: LookSAM(Only(is_weight, Smoothed(L2(0.1), theta=0.4)), NegLog(), k=2),
        references.looksam(references.only(references.smoothed(B, 0.4), is_weight), LOG, CE, 2, 0.7),
    ),
    "RandomMask-only-adaptive": (
        lambda o: ESAM(RandomMask(Friendly(Only(is_weight, Adaptive(0.5))), beta=0.7), gamma=0.5),
        references.esam(
            references.masked_afterwards(
                references.friendly(references.only(references.adaptive(0.5), is_weight), 1.0, 0.9), 0.7
            ),
            CE,
            CE,
            CE,
            0.5,
        ),
    ),
    "LESAM": (
        lambda o: LESAM(sigma=0.05, rho_max=0.1),
        references.climbing(references.loss_equated(lambda s: 0.05, 0.1), CE, CE),
    ),
    "LESAM-annealed-log": (
        lambda o: SAM(LossEquated(Cosine(0.1, 0.0, steps=8, begin=10), rho_max=1.0), ascent=NegLog()),
        references.climbing(
            references.loss_equated(lambda s: 0.05 * (1 + cos(pi * min(max(s.number - 10, 0) / 8, 1))), 1.0), LOG, CE
        ),
    ),
    "FisherSAM": (
        lambda o: FisherSAM(0.1, keep=0.3, every=4),
        references.climbing(references.fisher_mask(B, 0.3, 4), CE, CE),
    ),
    "FisherMask-friendly-log": (
        lambda o: SAM(FisherMask(Friendly(L2(0.1)), keep=0.1, every=3), ascent=NegLog()),
        references.climbing(references.fisher_mask(references.friendly(B, 1.0, 0.9), 0.1, 3), LOG, CE),
    ),
    "SSAMF": (
        lambda o: SSAMF(L2(0.1), keep=0.3, every=3, samples=5),
        references.ssamf(B, CE, CE, keep=0.3, every=3, samples=5),
    ),
    "SSAMF-log": (
        lambda o: SSAMF(Friendly(L2(0.1)), NegLog(), keep=0.5, every=4),
        references.ssamf(references.friendly(B, 1.0, 0.9), LOG, CE, keep=0.5, every=4, samples=16),
    ),
    "SSAMF-descent": (
        lambda o: SSAMF(L2(0.1), descent=Tanh(), keep=0.2, every=6, samples=1),
        references.ssamf(B, CE, TANH, keep=0.2, every=6, samples=1),
    ),
    "SSAMD": (
        lambda o: SSAMD(0.1, keep=0.3, every=3),
        references.climbing(references.drop_grow(B, 0.3, 0.5, 3), CE, CE),
    ),
    "DropGrow-settling-log": (
        lambda o: SAM(DropGrow(Friendly(L2(0.1)), keep=0.6, drop=0.3, every=2, steps=20), ascent=NegLog()),
        references.climbing(references.drop_grow(references.friendly(B, 1.0, 0.9), 0.6, 0.3, 2, 20), LOG, CE),
    ),
    # Fewer examples, fewer gradients.
    "ESAM": (
        lambda o: ESAM(RandomMask(L2(0.1), beta=0.6), gamma=0.5),
        references.esam(references.random_mask(B, 0.6, "tensor"), CE, CE, CE, 0.5),
    ),
    "ESAM-entry-tanh": (
        lambda o: ESAM(RandomMask(L2(0.1), beta=0.5, per="entry"), Tanh(), gamma=0.3),
        references.esam(references.random_mask(B, 0.5, "entry"), TANH, CE, CE, 0.3),
    ),
    "EBiSAM": (
        lambda o: EBiSAM(0.1, beta=0.8, gamma=0.4),
        references.esam(references.random_mask(B, 0.8, "tensor"), LOG, CE, CE, 0.4),
    ),
    "EBiSAM-select": (
        lambda o: EBiSAM(0.1, Tanh(), beta=0.8, select=NegLog()),
        references.esam(references.random_mask(B, 0.8, "tensor"), TANH, CE, LOG, 0.5),
    ),
    "KSAM": (lambda o: KSAM(5, SAM(L2(0.1))), references.ksam(CE, 5, references.climbing(B, CE, CE))),
    "LookSAM": (lambda o: LookSAM(L2(0.1), k=3), references.looksam(B, CE, CE, 3, 0.7)),
    "LookSAM-log": (
        lambda o: LookSAM(Friendly(L2(0.1)), NegLog(), k=2, alpha=0.3),
        references.looksam(references.friendly(B, 1.0, 0.9), LOG, CE, 2, 0.3),
    ),
    "AESAM": (
        lambda o: AESAM(L2(0.1), steps=20),
        references.aesam(B, CE, CE, steps=20, first=1.0, last=-1.0, delta=0.9),
    ),
    "AESAM-log": (
        lambda o: AESAM(L2(0.1), NegLog(), steps=30, first=0.5, last=-0.5, delta=0.5),
        references.aesam(B, LOG, CE, steps=30, first=0.5, last=-0.5, delta=0.5),
    ),
    "MomentumSAM": (lambda o: MomentumSAM(L2(0.1)), references.momentum_sam(B, CE, 0.9)),
    "MomentumSAM-log": (
        lambda o: MomentumSAM(Adaptive(0.5), NegLog(), momentum=0.5),
        references.momentum_sam(references.adaptive(0.5), LOG, 0.5),
    ),
    "MomentumSAM-buffer": (
        lambda o: MomentumSAM(L2(0.1), buffer=momentum_of(o)),
        references.momentum_of_optimizer(B, CE),
    ),
    "SAMPa": (lambda o: SAMPa(L2(0.1), ahead=next_step(o)), references.sampa(B, CE, CE, 0.2)),
    "SAMPa-0": (lambda o: SAMPa(L2(0.1), ahead=next_step(o), lam=0.0), references.sampa(B, CE, CE, 0.0)),
    "SAMPa-log": (
        lambda o: SAMPa(Friendly(L2(0.1)), NegLog(), ahead=next_step(o), lam=0.5),
        references.sampa(references.friendly(B, 1.0, 0.9), LOG, CE, 0.5),
    ),
    # Two gradients combined.
    "GSAM": (lambda o: GSAM(L2(0.1)), references.gsam(B, CE, CE, 0.4)),
    "GSAM-follow": (
        lambda o: GSAM(L2(Follow(o, high=0.5, low=0.1, lr_low=1e-4)), alpha=0.3),
        references.gsam(
            references.l2(lambda s: 0.1 + 0.4 * (lr(s) - 1e-4) / (s.memory.setdefault("lr", lr(s)) - 1e-4)), CE, CE, 0.3
        ),
    ),
    "GSAM-warmup": (
        lambda o: GSAM(L2(Warmup(Linear(0.3, 0.1, steps=8, begin=4), steps=6)), NegLog(), Tanh()),
        references.gsam(
            references.l2(lambda s: min((s.number + 1) / 6, 1) * (0.3 - 0.2 * min(max(s.number - 4, 0) / 8, 1))),
            LOG,
            TANH,
            0.4,
        ),
    ),
    "GSAM-friendly": (
        lambda o: GSAM(Friendly(L2(0.1)), NegLog(), alpha=1.0),
        references.gsam(references.friendly(B, 1.0, 0.9), LOG, CE, 1.0),
    ),
    "GBiSAM": (lambda o: GBiSAM(0.1, Tanh(), alpha=0.7), references.gsam(B, TANH, CE, 0.7)),
    "WSAM": (lambda o: WSAM(L2(0.1), gamma=0.8), references.wsam(B, CE, CE, 0.8)),
    "WSAM-log": (lambda o: WSAM(L2(0.1), NegLog(), gamma=0.3), references.wsam(B, LOG, CE, 0.3)),
    "GNP": (lambda o: GNP(0.1, alpha=0.7), references.gnp(B, CE, CE, 0.7)),
    "GNP-log": (
        lambda o: GNP(Friendly(L2(0.1)), 1.6, NegLog()),
        references.gnp(references.friendly(B, 1.0, 0.9), LOG, CE, 1.6),
    ),
    "StableSAM": (lambda o: StableSAM(L2(0.1)), references.stable_sam(B, CE, CE)),
    "StableSAM-log": (
        lambda o: StableSAM(Smoothed(L2(0.1), theta=0.4), NegLog(), Tanh()),
        references.stable_sam(references.smoothed(B, 0.4), LOG, TANH),
    ),
    "SAGM": (lambda o: SAGM(L2(0.1), alpha=0.05), references.sagm(B, CE, CE, 0.05)),
    "SAGM-tanh": (
        lambda o: SAGM(Adaptive(0.5), Tanh(), alpha=0.2),
        references.sagm(references.adaptive(0.5), TANH, CE, 0.2),
    ),
    "BilateralSAM": (lambda o: BilateralSAM(L2(0.1)), references.bilateral_sam(B, CE, CE)),
    "BilateralSAM-follow-log": (
        lambda o: BilateralSAM(Friendly(L2(0.1)), NegLog(), behind=Follow(o, high=1.0, lr_low=1e-4)),
        references.bilateral_sam(
            references.friendly(B, 1.0, 0.9),
            LOG,
            CE,
            lambda s: (lr(s) - 1e-4) / (s.memory.setdefault("lr", lr(s)) - 1e-4),
        ),
    ),
    "Lookbehind": (lambda o: Lookbehind(L2(0.1), steps=3), references.lookbehind(B, CE, CE, 3, 0.5)),
    "Lookbehind-log": (
        lambda o: Lookbehind(Friendly(L2(0.1)), NegLog(), alpha=0.8),
        references.lookbehind(references.friendly(B, 1.0, 0.9), LOG, CE, 2, 0.8),
    ),
    "Lookbehind-adaptive-alpha": (
        lambda o: Lookbehind(Adaptive(0.5), alpha=None),
        references.lookbehind(references.adaptive(0.5), CE, CE, 2, None),
    ),
    "GAM": (lambda o: GAM(L2(0.1), gamma=0.2), references.gam(B, references.l2(0.2), CE, CE, 0.5, 0.6, 0.2)),
    "GAM-log": (
        lambda o: GAM(Friendly(L2(0.1)), NegLog(), climb_norm=Adaptive(0.5), beta0=0.1, beta1=0.2),
        references.gam(
            references.friendly(B, 1.0, 0.9), references.adaptive(0.5), LOG, CE, beta0=0.1, beta1=0.2, gamma=0.03
        ),
    ),
    "CRSAM": (lambda o: CRSAM(), references.crsam(B, CE, CE, 0.1, 0.01)),
    "CRSAM-tanh": (lambda o: CRSAM(L2(0.1), Tanh(), gamma=0.3, beta=0.2), references.crsam(B, TANH, CE, 0.3, 0.2)),
    "XSAM": (lambda o: XSAM(L2(0.5), rho_max=3.0, every=3), references.xsam(references.l2(0.5), CE, CE, 3.0, 3, None)),
    "XSAM-log": (lambda o: XSAM(L2(0.1), NegLog(), alpha=1.3), references.xsam(B, LOG, CE, 0.3, 1, 1.3)),
    "FunctionalSAM": (lambda o: FunctionalSAM(L2(0.1)), references.functional(B, CE, CE)),
    "FunctionalSAM-log": (
        lambda o: FunctionalSAM(L2(0.1), NegLog(), Tanh()),
        references.functional(B, LOG, TANH),
    ),
    "BSAM": (
        lambda o: BSAM(1000, 0.05),
        references.bsam(CE, CE, 1000, 0.05, prior=40, damping=0.1, b1=0.9, b2=0.999),
    ),
    "BSAM-log": (
        lambda o: BSAM(300, 0.1, ascent=NegLog(), prior=10.0, damping=0.3, beta1=0.5, beta2=0.8),
        references.bsam(LOG, CE, 300, 0.1, prior=10, damping=0.3, b1=0.5, b2=0.8),
    ),
    "RAPP": (lambda o: RAPP(0.2), references.rapp(CE, 0.2, 3)),
    "RAPP-ridge": (lambda o: RAPP(0.2, prox=ridge), references.rapp(CE, 0.2, 3, lambda z: z / 1.14)),
    "ExtraGradient": (lambda o: ExtraGradient(0.3), references.rapp(CE, 0.3, 2)),
    "CEGPlus": (lambda o: CEGPlus(0.3, ridge), references.ceg_plus(CE, 0.3, lambda z: z / 1.21)),
    # Long tails.
    "ImbSAM": (
        lambda o: ImbSAM(0.1, tail=[1, 3], weight=2.0),
        references.class_sam(B, CE, [0.0, 2.0, 0.0, 2.0], [1.0, 0.0, 1.0, 0.0]),
    ),
    "FocalSAM": (
        lambda o: FocalSAM(Friendly(L2(0.1)), 2.0, 0.8, counts=[50, 20, 20, 10]),
        references.class_sam(
            references.friendly(B, 1.0, 0.9),
            CE,
            [0.8 * (1 - pi) ** 2 for pi in (0.5, 0.2, 0.2, 0.1)],
            [1 - 0.8 * (1 - pi) ** 2 for pi in (0.5, 0.2, 0.2, 0.1)],
        ),
    ),
    "ClassSAM-log": (
        lambda o: ClassSAM(Adaptive(0.5), NegLog(), Tanh(), weight=Tail([0])),
        references.class_sam(references.adaptive(0.5), TANH, [1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 1.0, 1.0], ascent=LOG),
    ),
    # Noise from a seed.
    "ZerothOrder": (lambda o: ZerothOrder(0.5), references.zeroth_order(references.l2(0.5), CE, CE)),
    "ZerothOrder-only-log": (
        lambda o: ZerothOrder(Only(is_weight, 0.3), NegLog(), draws=3, seed=4),
        references.zeroth_order(references.only(references.l2(0.3), is_weight), LOG, CE, 3, seed=4, rule=is_weight),
    ),
    "ZerothOrder-signs-adaptive-tanh": (
        lambda o: ZerothOrder(Adaptive(0.5), Tanh(), NegLog(), draws=2, epsilon=1e-2, noise="rademacher"),
        references.zeroth_order(references.adaptive(0.5), TANH, LOG, 2, 1e-2, signs=True),
    ),
    "FilterNoise": (
        lambda o: FilterNoise(0.3, seed=2),
        references.filter_noise(CE, lambda s: 0.3, lambda name, p: p.dim() > 1, 2),
    ),
    "FilterNoise-rising-log": (
        lambda o: FilterNoise(Cosine(0.0, 0.5, steps=12), references.biased, descent=NegLog()),
        references.filter_noise(LOG, lambda s: 0.25 * (1 - cos(pi * min(s.number / 12, 1))), references.biased),
    ),
    # Around any method.
    "RSAM": (lambda o: RSAM(0.05, SAM(L2(0.1))), references.rsam(0.05, references.climbing(B, CE, CE))),
    "RSAM-plain-adaptive": (
        lambda o: RSAM(0.1, SAM(Adaptive(0.5)), filters=False),
        references.rsam(0.1, references.climbing(references.adaptive(0.5), CE, CE), filters=False),
    ),
    "RSAM-radius": (
        lambda o: RSAM(0.1, SAM(L2(0.1)), filters=False, radius=0.3),
        references.rsam(0.1, references.climbing(B, CE, CE), filters=False, radius=0.3),
    ),
    "TSAM": (
        lambda o: TSAM(0.1, tilt=5.0, radius=0.3),
        references.tilted(
            3, lambda s: 5.0, references.rsam(1.0, references.valued(B, CE, CE), filters=False, radius=0.3)
        ),
    ),
    "Tilted-friendly-log": (
        lambda o: Tilted(2, RSAM(0.05, SAM(Friendly(L2(0.1)), NegLog())), tilt=Linear(20.0, 0.0, steps=12)),
        references.tilted(
            2,
            lambda s: 20 * (1 - min(s.number / 12, 1)),
            references.rsam(0.05, references.valued(references.friendly(B, 1.0, 0.9), LOG, CE)),
        ),
    ),
    "KSAM-RSAM-EBiSAM": (
        lambda o: KSAM(6, RSAM(0.01, EBiSAM(0.1, beta=0.8))),
        references.ksam(
            CE, 6, references.rsam(0.01, references.esam(references.random_mask(B, 0.8, "tensor"), LOG, CE, CE, 0.5))
        ),
    ),
    "Accumulated": (lambda o: Accumulated(3, SAM(L2(0.1))), references.accumulated(3, references.climbing(B, CE, CE))),
    "Accumulated-GSAM-log": (
        lambda o: Accumulated(5, GSAM(Friendly(L2(0.1)), NegLog())),
        references.accumulated(5, references.gsam(references.friendly(B, 1.0, 0.9), LOG, CE, 0.4)),
    ),
    "MSAM-LookSAM": (
        lambda o: MSAM(3, LookSAM(L2(0.1), k=2), separate=True),
        references.msam(3, references.looksam(B, CE, CE, 2, 0.7)),
    ),
    "Every": (
        lambda o: Every(3, SAM(L2(0.1))),
        references.every(3, references.climbing(B, CE, CE), references.erm(CE)),
    ),
    "Every-LookSAM": (
        lambda o: Every(2, LookSAM(L2(0.1), k=2), BiSAM(0.1)),
        references.every(2, references.looksam(B, CE, CE, 2, 0.7), references.climbing(B, LOG, CE)),
    ),
    "Every-other-LookSAM": (
        lambda o: Every(3, RSAM(0.05, SAM(L2(0.1))), LookSAM(L2(0.1), k=2)),
        references.every(
            3, references.rsam(0.05, references.climbing(B, CE, CE)), references.looksam(B, CE, CE, 2, 0.7)
        ),
    ),
    "Every-two-memories": (
        lambda o: Every(2, VaSSO(0.1), VaSSO(0.2, theta=0.2)),
        references.every(
            2,
            references.climbing(references.smoothed(B, 0.9), CE, CE),
            references.climbing(references.smoothed(references.l2(0.2), 0.2), CE, CE),
        ),
    ),
    "During": (
        lambda o: During(LookSAM(L2(0.1), k=3), start=4, stop=11, otherwise=FisherSAM(0.1, keep=0.3, every=5)),
        references.during(
            references.looksam(B, CE, CE, 3, 0.7), 4, 11, references.climbing(references.fisher_mask(B, 0.3, 5), CE, CE)
        ),
    ),
    # Other objectives, weights and micro-batches for SAM.
    "BiSAM-tanh": (lambda o: BiSAM(0.1, Tanh()), references.climbing(B, TANH, CE)),
    "ASAM": (lambda o: ASAM(0.5), references.climbing(references.adaptive(0.5), CE, CE)),
    "ASAM-official": (
        lambda o: SAM(Adaptive(0.5, eta=0.01, where=lambda name, w: "weight" in name)),
        references.climbing(references.adaptive(0.5, 0.01, lambda name, p: "weight" in name), CE, CE),
    ),
    "ABiSAM": (
        lambda o: ABiSAM(0.5, NegLog(), eta=0.01),
        references.climbing(references.adaptive(0.5, 0.01), LOG, CE),
    ),
    "MSAM": (lambda o: MSAM(3, SAM(L2(0.1))), references.msam(3, references.climbing(B, CE, CE))),
    # The combinations of SAMPa.
    "SAMPa-bisam": (lambda o: SAMPa(L2(0.1), NegLog(), ahead=next_step(o)), references.sampa(B, LOG, CE, 0.2)),
    "SAMPa-asam": (
        lambda o: SAMPa(Adaptive(0.5), ahead=next_step(o)),
        references.sampa(references.adaptive(0.5), CE, CE, 0.2),
    ),
    "SAMPa-on": (
        lambda o: SAMPa(NormLayers(L2(0.1)), ahead=next_step(o)),
        references.sampa(references.norm_layers(B, is_norm), CE, CE, 0.2),
    ),
    "SAMPa-vasso": (
        lambda o: SAMPa(Smoothed(L2(0.1), theta=0.4), Tanh(), ahead=next_step(o), lam=0.1),
        references.sampa(references.smoothed(B, 0.4), TANH, CE, 0.1),
    ),
    "MSAM-SAMPa": (
        lambda o: MSAM(3, SAMPa(L2(0.1), ahead=next_step(o)), separate=True),
        references.msam(3, references.sampa(B, CE, CE, 0.2)),
    ),
    # An ascent gradient of an earlier step or of another batch.
    "OptSAM": (lambda o: OptSAM(L2(0.1)), references.opt_sam(B, CE, CE)),
    "OptSAM-log": (
        lambda o: OptSAM(Friendly(L2(0.1)), NegLog()),
        references.opt_sam(references.friendly(B, 1.0, 0.9), LOG, CE),
    ),
    "AsyncSAM": (lambda o: AsyncSAM(L2(0.1)), references.async_sam(B, CE, CE)),
    "AsyncSAM-log": (
        lambda o: AsyncSAM(Smoothed(L2(0.1), theta=0.4), NegLog(), Tanh()),
        references.async_sam(references.smoothed(B, 0.4), LOG, TANH),
    ),
    "SAMDB": (lambda o: SAMDB(L2(0.1)), references.sam_db(B, CE, CE)),
    "SAMDB-log": (lambda o: SAMDB(Adaptive(0.5), NegLog()), references.sam_db(references.adaptive(0.5), LOG, CE)),
    # A loss that remembers outputs.
    "MESA": (
        lambda o: MESA(lam=2.0, decay=0.7),
        references.mesa(references.erm, CE, 2.0, 5.0, 0.7),
    ),
    "MESA-bisam": (
        lambda o: MESA(BiSAM(0.1), temperature=2.0, decay=0.9, start=3),
        references.mesa(lambda loss: references.climbing(B, LOG, loss), CE, 0.8, 2.0, 0.9, 3),
    ),
    "MESA-functional": (
        lambda o: MESA(FunctionalSAM(L2(0.1), NegLog()), lam=3.0, decay=0.5),
        references.mesa(lambda loss: references.functional(B, LOG, loss), CE, 3.0, 5.0, 0.5),
    ),
    "SAF": (
        lambda o: SAF(epoch=1, examples=8, indices=rows, lam=2.0, ago=2, start=3),
        references.saf(references.erm, CE, 2.0, 5.0, 1, 2, 3),
    ),
    "SAF-SAM": (
        lambda o: SAF(SAM(L2(0.1)), epoch=3, examples=20, indices=rows, temperature=2.0, ago=1, start=0),
        references.saf(lambda loss: references.climbing(B, loss, loss), CE, 0.3, 2.0, 3, 1, 0),
    ),
}


# The state that a call must leave behind.


def public_names() -> dict[str, Any]:
    """The public objects of bisam by name, to evaluate text that names them; `vars(bisam)` has those in use only."""
    return {name: getattr(bisam, name) for name in bisam.__all__}


def named(value: Any) -> str:
    """The text of a parameter of a test, the same in every process: no addresses, sets in order, shapes of tensors."""
    if isinstance(value, set | frozenset):
        value = sorted(value)
    with_shapes = tree_map_only(Tensor, lambda t: f"{t.dtype}{list(t.shape)}", value)
    return re.sub(r" at 0x[0-9a-f]+", "", str(with_shapes))


def bits(tensor: Tensor | None) -> list[int] | None:
    """The bits of a tensor: unlike with torch.equal, NaN equals itself and -0.0 differs from 0.0."""
    return None if tensor is None else tensor.detach().clone().reshape(-1).view(torch.uint8).tolist()


def parameters(model: nn.Module) -> dict[str, Any]:
    return {name: bits(p) for name, p in model.named_parameters()}


def buffers(model: nn.Module) -> dict[str, Any]:
    return {name: bits(b) for name, b in model.named_buffers()}


def gradients(model: nn.Module) -> dict[str, Any]:
    return {name: bits(p.grad) for name, p in model.named_parameters()}


def everything(model: nn.Module) -> tuple[Any, ...]:
    return parameters(model), buffers(model), gradients(model), [p.data_ptr() for p in model.parameters()]


def train(step: Callable[[Tensor, Tensor], Tensor], model: nn.Module, steps: int = 6, optimizer: str = "sgd") -> Any:
    """Bits of weights and buffers after a plain training loop with `step` as the loss."""
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    for i in range(steps):
        optimizer.zero_grad()
        step(*batch(i)).backward()
        optimizer.step()
    return parameters(model), buffers(model)
