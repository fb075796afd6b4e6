"""Flips: the predictions that adversaries change at equal radius, on the same weights and batches.

A flip is an example that is predicted correctly at the weights and wrongly at the displaced weights, as in figure 2 of
Xie et al. (2024, https://arxiv.org/abs/2407.12993). The figure compares flips of models that were trained by different
methods; here all adversaries displace the same model:

    >>> import torch
    >>> from bisam import ModelOracle, cross_entropy
    >>> _ = torch.manual_seed(0)
    >>> oracle = ModelOracle(torch.nn.Linear(4, 3), cross_entropy)
    >>> data = [(torch.randn(32, 4), torch.randint(3, (32,))) for _ in range(4)]
    >>> found = flips(oracle, data, 0.3, {"SAM": cross_entropy, "BiSAM": NegLog()})
    >>> found.correct, found.flipped
    (50, {'SAM': 14, 'BiSAM': 21})
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import torch

from bisam.analysis.balls import ball_of
from bisam.analysis.samples import Mode, Progress, Result, Source, cosine, sampled, unit
from bisam.analysis.zero_one import ZeroOne
from bisam.objectives import NegLog, Objective, Tanh, cross_entropy
from bisam.perturbations import L2, Perturbation, geometry
from bisam.schedules import Radius
from bisam.validation import instance
from bisam.vector import Vector

ADVERSARIES: Mapping[str, Objective | None] = {
    "loss": None,
    "cross-entropy": cross_entropy,
    "-log": NegLog(),
    "tanh": Tanh(),
}
"""The adversaries of SAM, of SAM that climbs cross-entropy without label smoothing, and of BiSAM. None: the loss."""


@dataclass(frozen=True)
class Flips(Result):
    """The predictions that each adversary changes, at equal radius.

    Attributes:
        correct: number of examples that are predicted correctly at the weights.
        flipped: for each adversary the number of them that are predicted wrongly at its displaced weights.
        repaired: for each adversary the number of other examples that are predicted correctly there.
        rise: for each adversary the mean rise of the training loss.
        cosines: for each pair of adversaries the cosine of their displacements, mean over the batches.
        rho: the radius.
        perturb: the ball, as text.
        adversaries: the objective of each adversary, as text.
        mode: the mode of the model; None: as it was.
        seed: the seed of forward passes.
        examples: number of labels that count, for example of the tokens of a language model.
        batches: number of batches, each with a displacement of its own.
        forward: number of forward passes over all examples.
        backward: number of backward passes over all examples.
    """

    correct: int
    flipped: dict[str, int]
    repaired: dict[str, int]
    rise: dict[str, float]
    cosines: dict[str, dict[str, float]]
    rho: float
    perturb: str
    adversaries: dict[str, str]
    batches: int
    forward: float
    backward: float

    def plot(self, axes: Any = None) -> Any:
        """Draws the flips of each adversary into matplotlib axes, which are returned."""
        from bisam.analysis.plots import bars

        return bars(self.flipped, "examples that flip", axes)


def flips(
    source: Source,
    data: Iterable[Any],
    perturb: Perturbation | Radius = L2(0.05),  # noqa: B008
    adversaries: Mapping[str, Objective | None] = ADVERSARIES,
    *,
    mode: Mode | None = "eval",
    seed: int = 0,
    progress: Progress | None = None,
) -> Flips:
    """Returns the flips of one step of each adversary at the same radius, and the cosines of their displacements.

    Each batch has a displacement of its own, as in training. With n adversaries it takes 2 n + 1 forward and n backward
    passes over the data. The model is not changed.

    Args:
        source: a `SharpnessAware` loss, or an oracle such as `ModelOracle(model, loss)`.
        data: batches, read once and kept, for example a DataLoader without augmentation.
        perturb: the ball: a radius, `L2`, `Adaptive`, or one of them in `NormLayers` or `Only`.
        adversaries: objectives by names; None is the training loss.
        mode: see `sharpness`.
        seed: seeds the random numbers of forward passes.
        progress: see `sharpness`.

    Raises:
        TypeError: an argument has the wrong type, or `perturb` is no ball.
        ValueError: `adversaries` or the data is empty, the outputs are no logits of several classes, or a loss at the
            weights is not finite.
    """
    if not adversaries:
        raise ValueError("adversaries is empty: name at least one objective, such as {'-log': NegLog()}")
    for name, objective in adversaries.items():
        if objective is not None:
            instance(f"adversary {name!r}", objective, "an objective such as NegLog(), or None for the training loss")
    ball, names = geometry(perturb), list(adversaries)
    with sampled(source, data, seed=seed, mode=mode, progress=progress) as sample:
        loss, error = sample.oracle.loss, ZeroOne.like(sample.oracle.loss)
        sample.passes.expected = 1 + 2 * len(names)
        rises: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
        cosines: dict[str, dict[str, list[float]]] = {a: {b: [] for b in names} for a in names}
        counted = torch.zeros(2 + 2 * len(names), dtype=torch.int64)  # labels, correct, each flipped and repaired
        weights = 0.0
        for i, batch in enumerate(sample.batches):
            one = replace(sample, batches=[batch], first=i)
            inside = ball_of(ball, one.oracle)
            (plain,) = one.answers(objective=loss).parts
            wrong, labels = plain.under(error).losses.bool(), plain.targets
            counts = labels != error.ignore_index
            weights += float(plain.count)
            changes = [counts, ~wrong & counts]
            directions: dict[str, Vector] = {}
            for name, objective in adversaries.items():
                gradient, _ = one.gradient(None, objective, inside.wrt)
                e = inside.displacement(unit(inside.ascent(gradient)) * inside.rho)
                (there,) = one.answers(e, loss).parts
                now = there.under(error).losses.bool()
                changes += [now & ~wrong & counts, ~now & wrong & counts]
                rises[name].append((float(there.value - plain.value), float(plain.count)))
                for other, direction in directions.items():
                    cosines[name][other].append(float(cosine(e, direction)))
                directions[name] = e
            counted += torch.stack([change.sum() for change in changes]).cpu()
        examples, correct, *changed = sample.oracle.gathered(counted[None]).sum(0).tolist()  # of all ranks
        for a in names:
            for b in names:
                cosines[b][a] = cosines[b][a] or cosines[a][b]
        return Flips(
            correct=correct,
            flipped=dict(zip(names, changed[::2], strict=True)),
            repaired=dict(zip(names, changed[1::2], strict=True)),
            rise={name: sum(r * n for r, n in of) / max(weights, 1) for name, of in rises.items()},
            cosines={a: {b: 1.0 if a == b else fmean(cosines[a][b]) for b in names} for a in names},
            rho=ball_of(ball, sample.oracle).rho,
            perturb=repr(ball),
            adversaries={name: repr(objective or loss) for name, objective in adversaries.items()},
            mode=mode,
            seed=seed,
            examples=float(examples),
            batches=len(sample.batches),
            forward=sample.passes.forward,
            backward=sample.passes.backward,
        )
