"""Methods whose displacement is drawn from a seed and needs no gradient: ZerothOrder and FilterNoise.

A step of each computes one gradient. The noise is a function of the argument `seed` and of the step, and in `Tilted` of
the sample: it does not depend on the state of the global generators, continues after a checkpoint as in an
uninterrupted run, and is the same on all ranks.

With `restore="redraw"` no copy of the weights is kept while they are displaced, so that the memory of a step is that of
plain training: the noise is drawn again and subtracted. This is the only place where the library restores weights to a
rounding, and not bit for bit: a hundred steps of either method change the weights of an MLP in float32 by less than
1e-6 of their length (a test) besides the steps of the optimizer. It is refused for weights in half precision and for
sharded weights, and where a layer changes its weights in the forward pass, as `nn.Embedding(max_norm=...)` does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from bisam import schedules
from bisam.batches import Batch
from bisam.evaluation import Evaluation
from bisam.methods.sam import SAM
from bisam.methods.written import Written
from bisam.objectives import Objective
from bisam.oracle import Oracle, Query
from bisam.perturbations import L2, NormLayers, Only, PerGroup
from bisam.schedules import Radius
from bisam.seeded import Kind, Seeded
from bisam.validation import MOST_QUERIES, instance, positive, whole
from bisam.vector import Vector, widened

Restore = Literal["copy", "redraw"]
"""How displaced weights are restored: from a copy, bit for bit, or by subtracting noise that is drawn again."""


@dataclass(frozen=True, repr=False)
class ZerothOrder(SAM):
    """SAM along an estimate of the ascent gradient from forward passes alone, as in MeZO (Malladi et al., 2023).

    Source of the estimate: https://arxiv.org/abs/2305.17333. For noise z it is

        g = (L(w + epsilon z) - L(w - epsilon z)) / (2 epsilon) z,

    averaged over `draws` of z, where L is the objective of the adversary. It needs values of L only, which need not be
    differentiable. Its displacement is that of `perturb`; the gradient that is descended is exact. The combination of
    the estimate with SAM is this library's. A step makes 2 `draws` forward passes and one query of a gradient.

    With one draw the displacement of `L2` is rho z/||z||, with the sign for which L rises. Its cosine with the gradient
    is about 1/sqrt(d) for d displaced weights, so that the rise of the loss is that fraction of SAM's: use it for few
    weights (adapters, the last layers, `Only`), more draws, or a larger radius.

    As in the authors' code the forward passes are in eval mode: without dropout, whose noise would exceed the
    difference, and with running statistics as constants. Running statistics are updated at the displaced point. Noise
    is drawn for the part of the weights that `perturb` displaces.

    In data-parallel training all ranks draw the same noise. Where each rank answers for its own batch, each has its own
    L, as in SAM; where answers are means over ranks (`scope="global"`, FSDP2), L and the displacement are the same on
    all ranks.

    Args:
        perturb: see `SAM`; it is applied to the estimate.
        ascent: see `SAM`; it may have no gradient.
        descent: see `SAM`.
        draws: number of draws, from 1 to 1,000.
        epsilon: standard deviation of an entry of the displacements in the difference, > 0; the authors use 1e-3.
        noise: "gaussian", as the authors, or "rademacher", entries of 1 and -1. A complex weight is two entries.
        seed: seed of the noise, >= 0.
        restore: "copy" restores the weights from a copy, bit for bit. "redraw" keeps no copy and draws the noise again,
            which restores them to a rounding (see `bisam.methods.drawn`); `perturb` must be an `L2` ball, also in
            `Only`, `NormLayers` or `PerGroup`. A difference of losses that is not finite then displaces nothing,
            because weights that have become NaN could not be restored.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is outside its range, or `perturb` does not permit `restore="redraw"`.

    Raises when called:
        ValueError: `restore` is "redraw", and the weights are sharded or in half precision, or a layer changes its
            weights in the forward pass.
        RuntimeError: the same, where only a later pass changes weights.

    Example:
        >>> import torch
        >>> from bisam import NegLog, SharpnessAware, ZerothOrder, cross_entropy
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(4, 3)
        >>> method = ZerothOrder(0.05, ascent=NegLog(), draws=4, restore="redraw")    # BiSAM's adversary
        >>> sharp = SharpnessAware(model, method, cross_entropy, stats=True)
        >>> sharp(torch.randn(8, 4), torch.randint(3, (8,))).backward()
        >>> sharp.stats.displacement_norm
        tensor(0.0500)
    """

    draws: int = 1
    epsilon: float = 1e-3
    noise: Kind = "gaussian"
    seed: int = 0
    restore: Restore = "copy"

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("draws", self.draws, most=MOST_QUERIES)
        positive("epsilon", self.epsilon)
        _one_of("noise", self.noise, ("gaussian", "rademacher"))
        whole("seed", self.seed, least=0)
        _one_of("restore", self.restore, ("copy", "redraw"))
        if self.restore == "redraw" and not _is_radial(self.perturb):
            raise ValueError(
                "restore='redraw' needs a displacement that is a multiple of the noise in each tensor: use an L2 ball, "
                f"alone or in Only, NormLayers or PerGroup, or restore='copy', got {self.perturb!r}"
            )

    def __call__(self, oracle: Oracle, batch: Batch) -> Evaluation:
        """Makes 2 `draws` queries without a gradient, and one at w + e."""
        return oracle.query(batch, self.descent, at=self._displacement(oracle, batch), track=True, last=True)

    def climb(self, oracle: Oracle, batch: Batch) -> Vector:
        """Returns the displacement; makes 2 `draws` queries without a gradient."""
        e = self._displacement(oracle, batch)
        return e.vector(oracle.weights) if isinstance(e, Seeded) else e

    def _displacement(self, oracle: Oracle, batch: Batch) -> Vector | Seeded:
        part, keys = self.part(oracle), [(self.seed, oracle.step, k, *oracle.draws) for k in range(self.draws)]
        scales = None if part is None else [1.0 if inside else None for inside in part]
        draws = [Seeded([key], None, scales, self.noise) for key in keys]
        slopes = [_slope(oracle, batch, self.ascent, z, self.epsilon, self.restore) / self.draws for z in draws]
        g = Seeded(keys, slopes, scales, self.noise)
        if self.restore == "copy":
            return self.displacement(g.vector(oracle.weights), oracle)
        return _radial(g, oracle, self.displacement)


def _slope(
    oracle: Oracle, batch: Batch, objective: Objective | None, z: Seeded, epsilon: float, restore: Restore
) -> Tensor:
    """Returns (L(w + epsilon z) - L(w - epsilon z)) / (2 epsilon)."""
    values = list[Tensor]()
    for factor in (epsilon, -epsilon):  # one query after the other, so that one displacement is in memory
        at = z.times(factor) if restore == "redraw" else z.times(factor).vector(oracle.weights)
        query = Query(batch, objective, at, grad=False, buffers=oracle.buffers)
        del at  # the query owns it
        values.append(widened(oracle.ask([query])[0].value))
    slope = (values[0] - values[1]) / (2 * epsilon)
    return _finite(slope) if restore == "redraw" else slope


def _radial(g: Seeded, oracle: Oracle, displacement: Callable[[Vector, Oracle], Vector]) -> Seeded:
    """Returns the displacement of a radial perturbation for a gradient that is not in memory."""
    lengths = g.lengths(oracle.weights)  # of each tensor: a gradient with the same norms, and an entry for each tensor
    e = displacement(lengths, oracle)
    ratios = [_finite((a / b)[0]) for a, b in zip(e.tensors, lengths.tensors, strict=True)]
    return g.scaled([None if i in e.holes else ratio for i, ratio in enumerate(ratios)])


def _is_radial(perturb: Any) -> bool:
    """Whether a displacement is the gradient times a number in each tensor, which norms of tensors determine."""
    kind = type(perturb)  # not those of a subclass, which may be any function of the gradient
    if kind is PerGroup:
        return all(_is_radial(inner) for _, inner in perturb.groups)
    return _is_radial(perturb.perturb) if kind in (Only, NormLayers) else kind is L2


@dataclass(frozen=True, repr=False)
class FilterNoise(Written):
    """The gradient at a random point, whose noise is in proportion to the norm of each filter (Li et al., 2024).

    The noise of Flat-LoRA, https://arxiv.org/abs/2409.14396, on the weights that are trained. The gradient is that at
    w + e, where an entry of filter i of n entries (a complex weight is two) has

        e_ij = sigma / sqrt(n) ||w_i|| z_ij,    z_ij ~ N(0, 1),

    so that the noise of a filter is about sigma times as long as the filter, whatever its size. A filter is what
    belongs to one index of the first dimension. A step makes one query. As in the authors' code `sigma` rises from 0
    along a cosine: `FilterNoise(Cosine(0.0, 0.05, steps=steps))`.

    The authors add the noise to the frozen weights merged with the adapters, W + BA, and train A and B:
    `bisam.integrations.peft.FlatLoRA` does that. The noise of this method on adapters alone is another one. `RSAM` has
    noise of another scale around any method.

    All ranks of data-parallel training draw the same noise. Running statistics are updated at the random point.

    Args:
        sigma: length of the noise in units of the norm of each filter, >= 0, a number or a schedule; the authors use
            0.05. With 0 it is plain training.
        where: `(name, parameter) -> bool`, selects the parameters that the noise is added to. Default: all of two or
            more dimensions. A tensor of fewer dimensions is one filter.
        descent: objective that is minimised at w + e. Default: the training loss.
        seed: see `ZerothOrder`.
        restore: see `ZerothOrder`; any geometry permits "redraw".

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is outside its range.

    Raises when called:
        ValueError: `where` selects no trainable parameter; or `restore` is "redraw", and its conditions do not hold,
            see `ZerothOrder`.
        RuntimeError: see `ZerothOrder`.
    """

    sigma: Radius = 0.05
    where: Callable[[str, Tensor], bool] | None = None
    descent: Objective | None = field(default=None, kw_only=True)
    seed: int = field(default=0, kw_only=True)
    restore: Restore = field(default="copy", kw_only=True)

    def __post_init__(self) -> None:
        schedules.check("sigma", self.sigma)
        if self.where is not None:
            instance("where", self.where, "a function (name, parameter) -> bool")
        if self.descent is not None:
            instance("descent", self.descent, "an objective such as NegLog()")
        whole("seed", self.seed, least=0)
        _one_of("restore", self.restore, ("copy", "redraw"))

    def __call__(self, oracle: Oracle, batch: Batch) -> Evaluation:
        """Makes one query, at the random point."""
        sigma = schedules.at(self.sigma, oracle.step)
        if isinstance(sigma, float | int) and sigma == 0:
            return oracle.query(batch, self.descent, last=True)
        noise = _filter_noise(oracle, self.where or _is_matrix, sigma, self.seed)
        at = noise if self.restore == "redraw" else noise.vector(oracle.weights)
        queries, at = [Query(batch, self.descent, at, track=True, last=True)], None  # the query owns the displacement
        return oracle.ask(queries)[0]


def _is_matrix(name: str, parameter: Tensor) -> bool:
    return parameter.dim() > 1


def _filter_noise(oracle: Oracle, where: Callable[[str, Tensor], bool], sigma: float | Tensor, seed: int) -> Seeded:
    chosen = [bool(where(name, p)) for name, p in zip(oracle.names, oracle.parameters, strict=True)]
    if not any(chosen):
        raise ValueError(
            "FilterNoise adds noise to the parameters that where= selects, by default those of two or more dimensions, "
            f"and it selects none of the {len(chosen)} that are trained: select some by name"
        )
    scales = [_scale(oracle.weights, i) * sigma if inside else None for i, inside in enumerate(chosen)]
    return Seeded([(seed, oracle.step, *oracle.draws)], scales=scales)


def _scale(w: Vector, i: int) -> Tensor:
    """Returns the root mean square of the entries of each filter of tensor `i`, in a shape that broadcasts to it."""
    whole = w.layout.whole(i, w.tensors[i])
    filters = tuple(range(1, whole.dim())) if whole.dim() > 1 else None
    numbers = torch.view_as_real(whole) if whole.is_complex() else whole  # a complex weight is two entries
    entries = numbers.numel() // max(whole.shape[0], 1) if filters else numbers.numel()
    scale = torch.linalg.vector_norm(whole, dim=filters, keepdim=True) / max(entries, 1) ** 0.5
    return w.layout.part(i, scale.expand(whole.shape)) if w.layout.sharded else scale


def _finite(number: Tensor) -> Tensor:
    """Returns a number, or 0 if it is not finite: weights that become NaN cannot be restored by subtraction."""
    return torch.where(number.isfinite(), number, 0.0)


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be {' or '.join(map(repr, allowed))}, got {value!r}")
