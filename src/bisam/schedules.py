"""Schedules: a radius that changes over the steps of training, where a constant is not enough.

    >>> from bisam import L2
    >>> from bisam.perturbations import LossEquated
    >>> linear = L2(Linear(0.6, 0.1, steps=10_000))                # from 0.6 down to 0.1, then constant
    >>> warmup = L2(Warmup(0.05, steps=500))                       # from 0 up to 0.05
    >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    >>> gsam = L2(Follow(optimizer, high=0.6, low=0.1))            # follows the learning rate, as in GSAM
    >>> late = LossEquated(Cosine(0.1, 0.0, steps=2_000, begin=8_000))    # constant, then to 0 over 2,000 steps
    >>> flips = L2(FlipRate(0.06))                                 # the radius that flips 6 % of the predictions

A schedule is any callable from a step to a radius. A step is a call of the method that the schedule belongs to: under
gradient accumulation each micro-batch is a step, unless the loss has an argument `accumulation`, and inside
`Every(5, ...)` every fifth of them. The parameter mu of the bounds in `bisam.objectives` may be a schedule too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor

from bisam.validation import describe, non_negative, positive, share, shown, whole

Schedule = Callable[[int], float | Tensor]
"""A function from a step to a value, which is a number or a 0-dimensional tensor."""

Radius = float | Schedule
"""A number or a schedule."""


def at(radius: Radius, step: int) -> float | Tensor:
    """Returns the value of a number or a schedule at a step."""
    value = radius(step) if callable(radius) else radius
    return value.reshape(()) if isinstance(value, Tensor) and value.dim() else value  # a learning rate may be (1,)


def check(name: str, radius: Any) -> None:
    """Checks that a radius is a finite number >= 0 or a schedule that returns one.

    Raises:
        TypeError: it is neither; the message shows the name and the value.
        ValueError: the number, or the first value of the schedule, is negative, not finite, or cannot be computed.
    """
    if isinstance(radius, type):
        raise TypeError(f"{name} is the class {radius.__name__}, not an instance: write {radius.__name__}(...)")
    if not callable(radius):
        return non_negative(name, radius)
    try:
        first: Any = radius(0)
    except TypeError as error:
        raise TypeError(f"{name} must be a number or a schedule, step -> number, got {shown(radius)}") from error
    except ArithmeticError as error:
        raise ValueError(f"{name} has no value at step 0 ({error}), got {shown(radius)}") from error
    if not isinstance(first, Tensor):  # reading a tensor may synchronise with its device
        return non_negative(f"{name} at step 0", first)
    if first.numel() != 1:
        raise ValueError(f"{name} at step 0 must be one number, got {describe(first)}")
    return None


@dataclass(frozen=True)
class Constant:
    """A schedule with the same value at every step.

    Args:
        value: >= 0.

    Raises:
        TypeError: `value` is not a number.
        ValueError: `value` is negative or not finite.
    """

    value: float

    def __post_init__(self) -> None:
        non_negative("value", self.value)

    def __call__(self, step: int) -> float:
        """Returns the value."""
        return self.value


@dataclass(frozen=True)
class Linear:
    """A schedule that changes linearly from `start` to `end` and is constant afterwards.

    Args:
        start: value until step `begin`, >= 0.
        end: value from step `begin + steps` on, >= 0.
        steps: length of the change in steps, >= 1.
        begin: first step of the change, >= 0.

    Raises:
        TypeError: `steps` or `begin` is not an int.
        ValueError: an argument is outside its range.
    """

    start: float
    end: float
    steps: int
    begin: int = 0

    def __post_init__(self) -> None:
        non_negative("start", self.start)
        non_negative("end", self.end)
        whole("steps", self.steps)
        whole("begin", self.begin, least=0)

    def __call__(self, step: int) -> float:
        """Returns the value at a step."""
        way = self._way(min(max((step - self.begin) / self.steps, 0.0), 1.0))
        return self.start * (1 - way) + self.end * way

    def _way(self, time: float) -> float:
        return time


@dataclass(frozen=True)
class Cosine(Linear):
    """A schedule that follows half a cosine from `start` to `end` and is constant afterwards; arguments as `Linear`."""

    def _way(self, time: float) -> float:
        return (1 - math.cos(math.pi * time)) / 2


@dataclass(frozen=True)
class Warmup:
    """A schedule that multiplies a radius by a factor that grows linearly to 1 over the first `steps` steps.

    Args:
        radius: a number or a schedule.
        steps: length of the warm-up, >= 1; the factor is 1 / `steps` at the first step and 1 at step number `steps`.

    Raises:
        TypeError: `radius` is neither a number nor a schedule, or `steps` is not an int.
        ValueError: an argument is outside its range.
    """

    radius: Radius
    steps: int

    def __post_init__(self) -> None:
        check("radius", self.radius)
        whole("steps", self.steps)

    def __call__(self, step: int) -> float | Tensor:
        """Returns the value at a step."""
        return at(self.radius, step) * min(1.0, (step + 1) / self.steps)


@dataclass(frozen=True)
class Follow:
    """A radius that is a linear function of the learning rate of an optimizer (Zhuang et al., 2022).

    radius = low + (high - low) (lr - lr_low) / (lr_high - lr_low), and at least 0. With `low` and `lr_low` 0 it is
    proportional to the learning rate. The schedule of GSAM, https://arxiv.org/abs/2203.08065.

    Args:
        optimizer: the learning rate is that of its first parameter group; any learning-rate scheduler may change it.
        high: radius at `lr_high`, >= 0.
        low: radius at `lr_low`, >= 0.
        lr_high: largest learning rate. Default: the peak that a scheduler has stored in the group (`max_lr` or
            `initial_lr`), else the learning rate at construction.
        lr_low: smallest learning rate.

    Raises:
        TypeError: `optimizer` has no parameter groups.
        ValueError: `high` or `low` is negative, or the learning rates are equal.
    """

    optimizer: Any
    high: float
    low: float = 0.0
    lr_high: float | None = None
    lr_low: float = 0.0
    _first: float = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        non_negative("high", self.high)
        non_negative("low", self.low)
        if not isinstance(getattr(self.optimizer, "param_groups", None), list):
            raise TypeError(f"optimizer must have parameter groups with a learning rate, got {self.optimizer!r}")
        non_negative("lr_low", self.lr_low)
        if self.lr_high is not None:
            non_negative("lr_high", self.lr_high)
        object.__setattr__(self, "_first", float(self._group["lr"]))
        if self._peak == self.lr_low:
            raise ValueError(f"the largest and the smallest learning rate must differ, got {self._peak!r} for both")

    def __call__(self, step: int) -> float | Tensor:
        """Returns the value at the present learning rate."""
        share = (self._group["lr"] - self.lr_low) / (self._peak - self.lr_low)
        radius = self.low + (self.high - self.low) * (share.detach() if isinstance(share, torch.Tensor) else share)
        return radius.clamp_min(0) if isinstance(radius, torch.Tensor) else max(radius, 0.0)  # a warm-up below lr_low

    @property
    def _peak(self) -> float:
        if self.lr_high is not None:
            return self.lr_high
        group = self._group  # read each time: the scheduler may be created after this object
        return float(group.get("max_lr", group.get("initial_lr", self._first)))

    @property
    def _group(self) -> dict[str, Any]:
        return self.optimizer.param_groups[0]


@dataclass(frozen=True)
class FlipRate:
    """A radius that follows the share of the examples whose prediction the ascent step flips: a controller.

    An example is flipped if it is classified correctly at the weights w and wrongly at w + e. A method makes forward
    passes at both points anyway, so that the controller adds no pass. After each step

        rho <- rho exp(gain (1 - rate / target)), within [low, high],

    where `rate` is the share of flipped examples in the step, of all examples that count. The radius therefore rises
    while fewer examples are flipped than `target` and falls while more are. It replaces the choice of a radius by that
    of a rate. This controller is this library's.

    The radius is a part of the state of the method: checkpoints contain it, and a step whose gradient is not finite
    leaves it as it was. All ranks that train the same weights have the same radius, because the rate is that of their
    batches together. In the context `no_sync()` of DistributedDataParallel ranks do not wait for each other: the flips
    are added up, and the radius changes in the next call outside of it. In the context `join()` it does not change.
    Without such a context each micro-batch of gradient accumulation is a step, and changes it.

    It is the radius of an `L2` or `Adaptive`, alone or inside of other perturbations, in `SAM` (also as `BiSAM` and
    `ASAM`), alone or in `RSAM`, `Every` and `During`. Methods that do not compare predictions at w and w + e refuse it,
    and so do `MSAM` and `KSAM`. It needs class labels (int64).

    Args:
        target: share of the examples to be flipped, in (0, 1).
        start: radius at the first step, > 0.
        gain: speed of the change, > 0: a step without flips multiplies the radius by exp(gain). The rate of a single
            batch is noisy; the radius averages it over about 1 / gain steps.
        low: smallest radius, > 0.
        high: largest radius.

    Raises:
        TypeError: an argument is not a number.
        ValueError: an argument is outside its range, or not low <= start <= high.

    Example:
        >>> import torch
        >>> from bisam import SAM, SharpnessAware, cross_entropy
        >>> _ = torch.manual_seed(0)
        >>> x, y = torch.randn(256, 4), torch.arange(256) % 3
        >>> sharp = SharpnessAware(torch.nn.Linear(4, 3), SAM(FlipRate(0.1)), cross_entropy, stats=True)
        >>> for _ in range(100):
        ...     sharp(x, y).backward()    # without an optimizer: the weights stay, the radius changes
        >>> bool(sharp.stats.displacement_norm > 0.1)
        True
    """

    target: float
    start: float = 0.05
    gain: float = 0.05
    low: float = 1e-4
    high: float = 10.0
    stateful: ClassVar[bool] = True

    def __post_init__(self) -> None:
        share("target", self.target, one=False)
        for name in ("start", "gain", "low", "high"):
            positive(name, getattr(self, name))
        if not self.low <= self.start <= self.high:
            raise ValueError(f"start must be between low and high, got {self.start} for [{self.low}, {self.high}]")

    def __call__(self, step: int) -> NoReturn:
        """Refuses: the value does not depend on the step alone.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            f"{self} has no value at a step: its radius depends on the flips of earlier steps. It is the radius of L2 "
            "or Adaptive in SAM, BiSAM or ASAM, as in SAM(L2(FlipRate(0.06))); elsewhere use a number or another "
            "schedule"
        )

    def now(self, state: dict[str, Any]) -> float | Tensor:
        """Returns the radius of the present step.

        Args:
            state: the state of the perturbation, `oracle.state`.

        Raises:
            ValueError: the method has not reported the flips of the last call to `learn`.
        """
        if state.get("waits", False):
            raise ValueError(
                f"{self} has not learned which examples the last step flipped, so that its radius would stay the same: "
                "use it in SAM, BiSAM or ASAM, which compare the predictions at w and w + e"
            )
        state["waits"] = True
        return state.get("rho", self.start)

    def learn(self, state: dict[str, Any], flips: Tensor, over_ranks: Callable[[Tensor], Tensor | None]) -> None:
        """Changes the radius for the next step.

        Args:
            state: the state of the perturbation, `oracle.state`.
            flips: the number of flipped examples and the number of examples that count, (2,).
            over_ranks: returns the mean of a tensor over the ranks that train the same weights, or None if they do not
                wait for each other in this call; see `Oracle.over_ranks`.
        """
        state.pop("waits", None)
        rho = state["rho"] if "rho" in state else flips.new_full((), self.start)
        flips = flips + state["flips"] if "flips" in state else flips
        mean = over_ranks(flips)
        if mean is not None:
            factor = torch.exp(self.gain * (1 - mean[0] / mean[1] / self.target))
            rho = torch.where(mean[1] > 0, (rho * factor).clamp(self.low, self.high), rho)
            flips = torch.zeros_like(flips)
        state["rho"], state["flips"] = rho, flips
