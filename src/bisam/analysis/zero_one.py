"""Zero-one sharpness: the largest error in a ball around the weights, which BiSAM's formulation is about.

Equation 5 of Xie et al. (2024, https://arxiv.org/abs/2407.12993) is min over w of the largest 0-1 loss in a ball. The
0-1 loss has no gradient, so several differentiable adversaries climb, and the largest error on their ways counts:

    >>> import torch
    >>> from bisam import ModelOracle, cross_entropy
    >>> _ = torch.manual_seed(0)
    >>> oracle = ModelOracle(torch.nn.Linear(4, 3), cross_entropy)
    >>> data = [(torch.randn(64, 4), torch.randint(3, (64,)))]
    >>> found = zero_one_sharpness(oracle, data, 0.3)
    >>> found.error <= found.worst == max(found.by.values())
    True
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from bisam.analysis.ascent import Found, climb
from bisam.analysis.balls import ball_of
from bisam.analysis.logits import OfClasses
from bisam.analysis.samples import Mode, Progress, Result, Source, sampled
from bisam.objectives import NegLog, Objective, Tanh, cross_entropy
from bisam.perturbations import L2, Perturbation, geometry
from bisam.schedules import Radius
from bisam.validation import instance, whole

ADVERSARIES: Mapping[str, tuple[Objective, ...]] = {
    "cross-entropy": (cross_entropy,),
    "-log": (NegLog(1.0), NegLog(4.0), NegLog(16.0)),
    "tanh": (Tanh(10.0, 0.1), Tanh(10.0, 0.5), Tanh(10.0, 2.0)),
}
"""The objectives that each adversary climbs, one after another: bounds that come closer to the 0-1 loss."""


@dataclass(frozen=True)
class ZeroOne(OfClasses):
    """The 0-1 loss: 1 where another class than the label has the largest logit. It has no gradient.

    Args:
        ignore_index: label of examples that are ignored; their loss is 0.
    """

    subject: ClassVar[str] = "the 0-1 loss"

    def __call__(self, outputs: Tensor, targets: Tensor | None) -> Tensor:
        """Returns one loss per example, of the shape of `targets`.

        Args:
            outputs: logits (N, K, ...), K >= 2.
            targets: int64 labels (N, ...).

        Raises:
            TypeError: `outputs` or `targets` have the wrong type.
            ValueError: their shapes do not match, K < 2, there are no targets, or a label is outside [0, K) and not
                `ignore_index`.
        """
        labels = self.labels(outputs, targets)
        wrong = outputs.argmax(1) != labels
        return (wrong & (labels != self.ignore_index)).to(torch.promote_types(outputs.dtype, torch.float32))


@dataclass(frozen=True)
class ZeroOneSharpness(Result):
    """The largest error in a ball.

    Attributes:
        error: the error at the weights, in [0, 1].
        worst: the largest error that any adversary found, a lower bound of the largest one.
        by: the largest error that each adversary found.
        traces: for each adversary the largest error after each step, beginning with `error`.
        rho: the radius.
        perturb: the ball, as text.
        adversaries: the objectives of each adversary, as texts.
        steps: number of steps of each adversary.
        mode: the mode of the model; None: as it was.
        seed: the seed of forward passes.
        examples: number of examples that count.
        forward: number of forward passes over all examples.
        backward: number of backward passes over all examples.
    """

    error: float
    worst: float
    by: dict[str, float]
    traces: dict[str, tuple[float, ...]]
    rho: float
    perturb: str
    adversaries: dict[str, tuple[str, ...]]
    steps: int
    forward: float
    backward: float

    @property
    def rise(self) -> float:
        """The largest error minus the error at the weights."""
        return self.worst - self.error

    def plot(self, axes: Any = None) -> Any:
        """Draws the largest error against the steps of each adversary into matplotlib axes, which are returned."""
        from bisam.analysis.plots import traces

        percent = {name: [100 * value for value in trace] for name, trace in self.traces.items()}
        return traces(percent, "largest error (%)", axes)


def zero_one_sharpness(
    source: Source,
    data: Iterable[Any],
    perturb: Perturbation | Radius = L2(0.05),  # noqa: B008
    adversaries: Mapping[str, Objective | Sequence[Objective]] = ADVERSARIES,
    *,
    steps: int = 30,
    mode: Mode | None = "eval",
    seed: int = 0,
    progress: Progress | None = None,
) -> ZeroOneSharpness:
    """Returns the largest error that projected ascent finds in a ball around the weights.

    The first step of each adversary is that of SAM or BiSAM. The objectives of an adversary are climbed one after
    another, each from the point with the largest error so far, and share its steps equally, so that all adversaries
    have the same number of gradients. With A adversaries and n objectives in all it takes A steps + n + 1 forward and
    A steps backward passes over the data. The model is not changed.

    Args:
        source: a `SharpnessAware` loss, or an oracle such as `ModelOracle(model, loss)`.
        data: batches, read once and kept, for example a DataLoader without augmentation.
        perturb: the ball: a radius, `L2`, `Adaptive`, or one of them in `NormLayers` or `Only`.
        adversaries: objectives by names, one or several for each name.
        steps: number of steps of each adversary, at least as many as it has objectives.
        mode: see `sharpness`.
        seed: seeds the random numbers of forward passes.
        progress: see `sharpness`.

    Raises:
        TypeError: an argument has the wrong type, or `perturb` is no ball.
        ValueError: an argument is outside its range, the data is empty, the outputs are no logits of several classes,
            or a loss at the weights is not finite.
    """
    whole("steps", steps)
    if not adversaries:
        raise ValueError("adversaries is empty: name at least one objective, such as {'-log': NegLog()}")
    series = {name: _series(name, objectives) for name, objectives in adversaries.items()}
    if steps < (most := max(map(len, series.values()))):
        raise ValueError(f"steps={steps} are fewer than the {most} objectives of an adversary, which share them")
    ball = geometry(perturb)
    with sampled(source, data, seed=seed, mode=mode, progress=progress) as sample:
        error = ZeroOne.like(sample.oracle.loss)
        sample.passes.expected = 1 + sum(steps + len(objectives) for objectives in series.values())
        inside, plain = ball_of(ball, sample.oracle), sample.answers(objective=error)
        found: dict[str, Found] = {}
        for name, objectives in series.items():
            found[name] = Found(plain.value, None, (plain.value,))
            for i, objective in enumerate(objectives):
                own = steps // len(objectives) + (i < steps % len(objectives))
                found[name] = climb(sample, inside, objective, error, own, found[name])
        return ZeroOneSharpness(
            error=plain.value,
            worst=max(best.measure for best in found.values()),
            by={name: best.measure for name, best in found.items()},
            traces={name: best.trace for name, best in found.items()},
            rho=inside.rho,
            perturb=repr(ball),
            adversaries={name: tuple(map(repr, objectives)) for name, objectives in series.items()},
            steps=steps,
            mode=mode,
            seed=seed,
            examples=plain.count * sample.ranks,
            forward=sample.passes.forward,
            backward=sample.passes.backward,
        )


def _series(name: str, objectives: Objective | Sequence[Objective]) -> tuple[Objective, ...]:
    found = tuple(objectives) if isinstance(objectives, Sequence) else (objectives,)
    if not found:
        raise ValueError(f"adversary {name!r} has no objective")
    for objective in found:
        instance(f"adversary {name!r}", objective, "an objective such as NegLog(), or several of them")
    return found
