"""Monitor: measures of the model during training, at a stated cost and without an effect on the training.

    monitor = Monitor(sharp, batches, every=100)
    print(monitor)                  # 8 forward and 3 backward passes over 256 examples every 100 steps
    for x, y in loader:
        sharp(x, y).backward()
        optimizer.step()
        optimizer.zero_grad()
        monitor.step()
    monitor.plot()

The monitor of a loss is independent of its method: SGD (`ERM()`), SAM and BiSAM are recorded alike and can be compared.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from inspect import signature
from itertools import islice
from types import FunctionType
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from bisam.analysis.calibration import calibration
from bisam.analysis.corruptions import corruptions
from bisam.analysis.curvature import Eigenvalues, Trace
from bisam.analysis.features import feature_rank
from bisam.analysis.flips import Flips, flips
from bisam.analysis.gradients import gradient_norm
from bisam.analysis.margins import margins
from bisam.analysis.samples import Mode, NonFiniteLossError, Result
from bisam.analysis.sharpness import Sharpness, average_sharpness, sharpness
from bisam.analysis.zero_one import ZeroOneSharpness, zero_one_sharpness
from bisam.batches import Batch, mapped, size
from bisam.loss import SharpnessAware
from bisam.model.oracle import ModelOracle
from bisam.model.rng import RandomState
from bisam.objectives import NegLog
from bisam.perturbations import L2, Perturbation, geometry
from bisam.schedules import Radius
from bisam.validation import describe, instance, positive, shown, whole

Measure = Callable[[SharpnessAware, list[Batch]], Any]
"""A function of the loss and the batches; it returns a `Result`, a number, or numbers by names."""

Record = dict[str, float]
"""The number of the step, as "step", and numbers by names."""


def standard(
    perturb: Perturbation | Radius = L2(0.05),  # noqa: B008
    *,
    mode: Mode | None = "eval",
    seed: int = 0,
) -> dict[str, Measure]:
    """Returns the standard measures of a monitor: sharpness by one step of ascent, and flips of SAM and BiSAM.

    Their records have the entries

    * `sharpness`: the rise of the training loss at the point of SAM, with one displacement for all batches
    * `sharpness_loss`: the training loss at the weights
    * `flips/SAM`, `flips/BiSAM`: the share of the examples whose prediction becomes wrong at the displaced weights,
      with a displacement for each batch; SAM climbs the training loss and BiSAM the bound -log
    * `flips_error`: the share of the examples that are predicted wrongly at the weights
    * `flips_cosine/SAM_BiSAM`: the cosine of the two displacements, mean over the batches

    Args:
        perturb: the ball: a radius, `L2`, `Adaptive`, or one of them in `NormLayers` or `Only`.
        mode: "eval" uses running statistics and no dropout, "train" those of each batch.
        seed: seeds the random numbers of forward passes.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is outside its range.
    """
    whole("seed", seed, least=0)
    if mode not in ("eval", "train", None):
        raise ValueError(f"mode must be 'eval', 'train' or None (as the model is), got {mode!r}")
    ball = geometry(perturb)
    settings: dict[str, Any] = {"perturb": ball, "mode": mode, "seed": seed}
    return {
        "sharpness": partial(sharpness, **settings),
        "flips": partial(flips, adversaries={"SAM": None, "BiSAM": NegLog()}, **settings),
    }


@dataclass(frozen=True)
class Cost:
    """The cost of a monitor.

    Attributes:
        forward: number of forward passes over the data for each record.
        backward: number of backward passes over the data for each record.
        examples: number of examples of the data.
        every: number of training steps from record to record.
        unknown: measures that are not included, because their cost is not known before their first record.
    """

    forward: float
    backward: float
    examples: int
    every: int
    unknown: tuple[str, ...] = ()

    def share(self, batch_size: int, gradients: float = 2) -> float:
        """Returns the cost as a share of the cost of training, where a backward pass counts as two forward passes.

        Args:
            batch_size: number of examples in a step of training.
            gradients: number of gradients in a step of training: 1 for SGD, 2 for SAM and BiSAM.

        Raises:
            TypeError: an argument is not a number.
            ValueError: an argument is not positive.
        """
        whole("batch_size", batch_size)
        positive("gradients", gradients)
        return (self.forward + 2 * self.backward) * self.examples / (self.every * 3 * gradients * batch_size)

    def __str__(self) -> str:
        """Returns the cost as a phrase."""
        without = f", without {', '.join(self.unknown)}" if self.unknown else ""
        return (
            f"{self.forward:g} forward and {self.backward:g} backward passes over {self.examples} examples "
            f"every {self.every} steps{without}"
        )


class Monitor:
    """Records measures of a model every few steps of its training.

    Training is bit-identical to training without the monitor: weights, gradients, buffers, modes, random numbers, the
    state of the method and `sharp.clean` are as before a record. Passes run as in the surrounding context, so outside
    of `torch.autocast` they are in the precision of the weights.

    If the loss records the statistics of its steps (`SharpnessAware(..., stats=True)`), those of the last step are in
    the records, as `stats_rise`, `stats_cosine` and so on.

    A record never ends the training. If the loss is not finite, its entries are NaN. A measure that cannot be computed,
    such as flips of a model without classes, is left out of all further records. Each is warned of once.

    In distributed training each rank calls `step`. With FSDP2 or `scope="global"` the records are those of the batches
    of all ranks. Otherwise they are those of the rank's own batches. In these cases, and with DistributedDataParallel
    inside the loss, an error is raised if it would leave other ranks waiting: one in the middle of a pass, such as
    missing memory, or one that only some ranks have. With DistributedDataParallel around the loss, rank 0 may record
    alone.

    Args:
        sharp: the loss of the training loop.
        data: batches, as arguments of the loss; for example a part of the training set without augmentation. They are
            read once and kept.
        perturb: the ball of the standard measures. Default: `L2(0.05)`.
        every: number of steps from record to record.
        measures: other measures by names, for example `{**standard(0.05), "top": partial(eigenvalues, k=1)}`. Default:
            `standard(perturb)`.
        batches: number of batches that are read. Default: all.

    Attributes:
        sharp: the argument `sharp`.
        every: the argument `every`.
        batches: the batches that were read.
        steps: number of steps so far.
        history: the records, oldest first.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is outside its range; `perturb` is given with `measures`; the data has no batches.

    Example:
        >>> import torch
        >>> from bisam import SAM, SharpnessAware, cross_entropy
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(4, 3)
        >>> sharp = SharpnessAware(model, SAM(0.05), cross_entropy)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> data = [(torch.randn(8, 4), torch.randint(3, (8,))) for _ in range(2)]
        >>> monitor = Monitor(sharp, data, every=2)
        >>> print(monitor.cost)
        8 forward and 3 backward passes over 16 examples every 2 steps
        >>> for x, y in data * 2:
        ...     sharp(x, y).backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        ...     record = monitor.step()          # None if none is due
        >>> [record["step"] for record in monitor.history]
        [2, 4]
        >>> list(record)
        ['step', 'sharpness', 'sharpness_loss', 'flips/SAM', 'flips/BiSAM', 'flips_error', 'flips_cosine/SAM_BiSAM']
    """

    def __init__(
        self,
        sharp: SharpnessAware,
        data: Iterable[Any],
        perturb: Perturbation | Radius | None = None,
        *,
        every: int = 100,
        measures: Mapping[str, Measure] | None = None,
        batches: int | None = None,
    ) -> None:
        if not isinstance(cast(Any, sharp), SharpnessAware):
            raise TypeError(
                f"a monitor takes the loss SharpnessAware(model, method, loss), got {type(sharp).__name__}: for a loop "
                "without a method, SharpnessAware(model, ERM(), loss); of a wrapped loss, the loss inside"
            )
        whole("every", every)
        if measures is not None and perturb is not None:
            raise ValueError(
                f"perturb={shown(perturb)} is the ball of the standard measures, and measures= replaces them: pass "
                "measures={**standard(perturb), ...}, or partial(sharpness, perturb=...)"
            )
        if measures is None:
            measures = standard(L2(0.05) if perturb is None else perturb)
        self._costs = _stated(measures)
        self._measures = dict(measures)
        self.sharp, self.every = sharp, every
        self.steps = 0
        self.history: list[Record] = []
        self.batches = _read(data, batches, sharp)
        self._names: dict[str, list[str]] = {}  # of the entries of each measure
        self._warned = False

    @property
    def cost(self) -> Cost:
        """The passes of a record, known before the first one for `sharpness`, `flips` and the like."""
        known = [cost for cost in self._costs.values() if cost is not None]
        return Cost(
            sum(forward for forward, _ in known),
            sum(backward for _, backward in known),
            sum(size(batch) or 1 for batch in self.batches),
            self.every,
            tuple(name for name, cost in self._costs.items() if cost is None),
        )

    def step(self, number: int | None = None) -> Record | None:
        """Counts a step of training, and returns a record if one is due, else None; call it after `optimizer.step()`.

        Args:
            number: number of steps so far, where another object counts them. A record is due if a multiple of `every`
                was reached since the last call. Default: one more.

        Raises:
            TypeError: `number` is not an int.
            ValueError: `number` is negative.
        """
        if number is not None:
            whole("number", number, least=0)
        before, self.steps = self.steps, self.steps + 1 if number is None else number
        return self.record() if self.steps // self.every > before // self.every else None

    def record(self) -> Record | None:
        """Records all measures now, for example before the first step; None if no measure is left."""
        if not self._measures:
            return None
        oracle = self.sharp.oracle()
        record: Record = {"step": self.steps}
        with oracle.random_state().kept(), torch.enable_grad():
            for name in list(self._measures):
                record |= self._measured(name, oracle)
            record |= _of_the_step(self.sharp)
            record |= _of_all_ranks({name: value for name, value in record.items() if name != "step"}, oracle)
        if bad := [name for name, value in record.items() if not math.isfinite(value)]:
            self._warn(f"{bad[0]} is {record[bad[0]]}")
        self.history.append(record)
        return dict(record)

    def state_dict(self) -> dict[str, Any]:
        """Returns the number of steps and the history, as plain containers; save it beside the loss and optimizer."""
        return {"steps": self.steps, "history": copy.deepcopy(self.history)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the result of `state_dict`, so that records continue at the same steps.

        Raises:
            ValueError: the state is not one of a monitor.
        """
        if not isinstance(cast(Any, state), Mapping) or set(state) != {"steps", "history"}:
            raise ValueError(f"the state of a monitor has the entries 'steps' and 'history', got {shown(state)}")
        self.steps, self.history = int(state["steps"]), copy.deepcopy(list(state["history"]))

    def plot(self, names: Iterable[str] | None = None) -> Any:
        """Draws the history, with a panel for each quantity, and returns the list of matplotlib axes.

        Args:
            names: panels, such as "sharpness" or "flips", whose entries share an axis. Default: all.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: there is no record, or no entry of a name.
        """
        from bisam.analysis.plots import panels

        found: dict[str, dict[str, list[tuple[float, float]]]] = {}
        for record in self.history:
            for name, value in record.items():
                if name != "step":
                    panel, _, line = name.partition("/")
                    found.setdefault(panel, {}).setdefault(line, []).append((record["step"], value))
        chosen = list(found) if names is None else list(names)
        if not chosen:
            raise ValueError("there is no record to draw: a monitor records when step() is called `every` times")
        if missing := [name for name in chosen if name not in found]:
            raise ValueError(
                f"there is no entry {missing[0]!r} in the records, which have {', '.join(found) or 'none'}"
            )
        return panels({name.replace("_", " "): found[name] for name in chosen}, "training step")

    def __str__(self) -> str:
        """Returns the cost, in words."""
        return str(self.cost)

    def _measured(self, name: str, oracle: ModelOracle) -> Record:
        """Returns the entries of a measure, none if it cannot be computed."""
        alone = oracle.is_local and oracle.replicas is None  # no other rank waits for this one in the passes
        failure: Exception | None = None
        entries: Record = {}
        try:
            result = self._measures[name](self.sharp, list(self.batches))
            entries = _entries(name, result)
            self._costs[name] = self._costs[name] or _counted(result)
            self._names[name] = list(entries)
        except NonFiniteLossError as error:
            self._warn(str(error))
            entries = dict.fromkeys(self._names.get(name, [name]), math.nan)
        except Exception as error:
            if not (alone or isinstance(error, TypeError | ValueError | ImportError)):
                raise  # in the middle of a pass, where other ranks wait
            failure = error
        if not alone and 0 < (share := _share_of_ranks(failure is not None, oracle)) < 1:
            raise RuntimeError(
                f"the measure {name!r} failed on {share:.0%} of the ranks, and the others would wait for these"
            ) from failure
        if failure is not None:
            del self._measures[name], self._costs[name]
            warnings.warn(
                f"the measure {name!r} is left out of the records, and training goes on: {_one_line(failure)}",
                stacklevel=4,
            )
        return entries

    def _warn(self, what: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"the record of step {self.steps} is not finite, and training goes on: {what}. Later records are not "
                "warned of",
                stacklevel=4,
            )


def _read(data: Iterable[Any], most: int | None, sharp: SharpnessAware) -> list[Batch]:
    """Returns copies of the first batches; random numbers that reading them takes are given back."""
    if most is not None:
        whole("batches", most)
    if not isinstance(cast(Any, data), Iterable):
        raise TypeError(f"data must be batches, such as a list or a DataLoader, got {describe(data)}")
    places = [data, getattr(data, "sampler", None)] if isinstance(data, DataLoader) else []
    own = [g for place in places if isinstance(g := getattr(place, "generator", None), torch.Generator)]
    states = [generator.get_state() for generator in own]
    with RandomState(list(sharp.parameters())).kept():
        batches = [mapped(lambda t: t.detach().clone(), batch) for batch in islice(data, most)]
    for generator, state in zip(own, states, strict=True):
        generator.set_state(state)
    if not batches:
        raise ValueError("the data has no batches; a generator that was read before has none left")
    return batches


def _of_the_step(sharp: SharpnessAware) -> Record:
    """Returns the statistics of the last step, if the loss records them and has made one."""
    try:
        return {f"stats_{name}": value for name, value in sharp.stats.to_dict().items()}
    except RuntimeError:
        return {}


def _share_of_ranks(flag: bool, oracle: ModelOracle) -> float:
    """Returns the share of the ranks whose flag is True, of those that wait for each other in the passes."""
    value = torch.tensor(float(flag), device=oracle.weights.tensors[0].device)
    if oracle.replicas is not None:
        return float(oracle.replicas.mean([value])[0])
    return float(oracle.averaged(value, 1)[0])


def _of_all_ranks(entries: Record, oracle: ModelOracle) -> Record:
    """Returns the means over the ranks that share the batches."""
    if oracle.is_local or not entries:
        return entries
    weight = oracle.weights.tensors[0]
    wide = torch.promote_types(weight.dtype, torch.float32)
    values = torch.tensor([*entries.values()], dtype=wide, device=weight.device)
    return dict(zip(entries, oracle.averaged(values, 1)[0].tolist(), strict=True))


# Entries of results


_SETTINGS = frozenset(["seed", "examples", "batches", "rho", "steps", "draws", "m", "products", "forward", "backward"])
"""Attributes of results that are no measured values."""


def _entries(name: str, result: Any) -> Record:
    """Returns the numbers of a result by names, which begin with that of the measure.

    Raises:
        TypeError: the measure returned something else.
    """
    if isinstance(result, Result):
        found = _measured_values(result)
    elif isinstance(result, Mapping):
        found = {f"/{key}": value for key, value in cast("Mapping[str, Any]", result).items()}
    else:
        found = {"": result}
    values = {key: value for key, value in found.items() if isinstance(value, int | float | Tensor)}
    if not values or (len(values) < len(found) and not isinstance(result, Result)):
        raise TypeError(f"a measure returns numbers, or a result with some, got {describe(result)}")
    return {f"{name}{key}": float(value) for key, value in values.items()}


def _measured_values(result: Result) -> dict[str, Any]:
    match result:
        case Sharpness():
            return {"": result.rise, "_loss": result.loss}
        case Flips():
            labels, names = max(result.examples, 1), list(result.flipped)
            pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
            return {
                **{f"/{name}": flipped / labels for name, flipped in result.flipped.items()},
                "_error": 1 - result.correct / labels,
                **{f"_cosine/{a}_{b}": result.cosines[a][b] for a, b in pairs},
            }
        case ZeroOneSharpness():
            return {"": result.worst, "_error": result.error}
        case Eigenvalues(values=(value,)):
            return {"": value}
        case Eigenvalues():
            return {f"/{i}": value for i, value in enumerate(result.values, 1)}
        case Trace():
            return {"": result.value, "_error": result.error}
        case _:
            return _numbers_of(result)


def _numbers_of(result: Result) -> dict[str, Any]:
    """Returns the numbers among the attributes of any result, and those in mappings, without settings."""
    found: dict[str, Any] = {}
    for key, value in vars(result).items():
        inside = cast("dict[str, Any]", value).items() if isinstance(value, dict) else ()
        for part, number in [("", value), *[(f"/{part}", number) for part, number in inside]]:
            if key not in _SETTINGS and isinstance(number, int | float) and not isinstance(number, bool):
                found[f"_{key}{part}"] = number
    return found


# Costs


def _stated(measures: Mapping[str, Measure]) -> dict[str, tuple[float, float] | None]:
    """Returns the forward and backward passes of each measure, None where they are not known in advance.

    Raises:
        TypeError: there is no mapping of measures; a measure is no function, or is a partial one with keywords that its
            function does not have.
        ValueError: there is no measure, or "step" is one's name.
    """
    if not isinstance(cast(Any, measures), Mapping):
        raise TypeError(f"measures must be functions by names, such as {{'top': eigenvalues}}, got {shown(measures)}")
    if not measures:
        raise ValueError("measures is empty: name at least one, such as {'sharpness': sharpness}")
    for name, measure in measures.items():
        instance(f"measure {name!r}", measure, "a function (sharp, batches) -> Result or number")
        if name == "step":
            raise ValueError("'step' is the number of the step in a record: give the measure another name")
    return {name: _passes(name, measure) for name, measure in measures.items()}


def _passes(name: str, measure: Measure) -> tuple[float, float] | None:
    function, keywords = (measure.func, measure.keywords) if isinstance(measure, partial) else (measure, {})
    formula = _PASSES.get(function) if isinstance(function, FunctionType) else None
    if formula is None or (isinstance(measure, partial) and measure.args):
        return None
    try:
        settings = signature(function).bind(None, None, **keywords)
    except TypeError as error:
        raise TypeError(f"measure {name!r}: {error}") from None
    settings.apply_defaults()
    return formula(settings.arguments)


def _of_zero_one(given: dict[str, Any]) -> tuple[float, float]:
    adversaries: Mapping[str, Any] = given["adversaries"]
    objectives = sum(1 if callable(each) else len(each) for each in adversaries.values())
    steps = len(adversaries) * given["steps"]
    return steps + objectives + 1, steps


_PASSES: dict[Any, Callable[[dict[str, Any]], tuple[float, float]]] = {
    sharpness: lambda given: (
        (given["steps"] + 1) * (given["restarts"] + 1) + 1,
        given["steps"] * (given["restarts"] + 1),
    ),
    average_sharpness: lambda given: (given["draws"] + 1, 0),
    flips: lambda given: (2 * len(given["adversaries"]) + 1, len(given["adversaries"])),
    zero_one_sharpness: _of_zero_one,
    margins: lambda _: (1, 0),
    calibration: lambda _: (1, 0),
    feature_rank: lambda _: (1, 0),
    gradient_norm: lambda _: (1, 1),
    corruptions: lambda given: (len(given["kinds"]) * len(given["severities"]) + 1, 0),
}
"""The forward and backward passes of functions with these arguments."""


def _counted(result: Any) -> tuple[float, float] | None:
    """Returns the passes that a result has counted."""
    forward = getattr(result, "forward", None)
    return (forward, getattr(result, "backward", 0.0)) if isinstance(forward, float) else None


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, ValueError | TypeError) and text else f"{type(error).__name__}: {text}"
