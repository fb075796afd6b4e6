"""Monitor: its records are those of the functions, at the stated cost, and training does not notice it."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from bisam import (
    ERM,
    L2,
    SAM,
    BiSAM,
    LookSAM,
    ModelOracle,
    NegLog,
    SAMPa,
    SharpnessAware,
    cross_entropy,
    next_step,
)
from bisam.analysis import (
    Monitor,
    average_sharpness,
    calibration,
    corruptions,
    eigenvalues,
    feature_rank,
    flips,
    gradient_norm,
    margins,
    sharpness,
    standard,
    trace,
    zero_one_sharpness,
)
from bisam.schedules import Linear
from bisam.statistics import NAMES as NAMES_OF_STATS
from tests.support import cases, ranks
from tests.support.cases import buffers, parameters
from tests.support.replicas import sharded, whole_weights

np = pytest.importorskip("numpy")

NAMES = ["sharpness", "sharpness_loss", "flips/SAM", "flips/BiSAM", "flips_error", "flips_cosine/SAM_BiSAM"]
DATA = [cases.batch(seed, 16) for seed in (7, 8)]


def plain_sharp(method: Any = SAM(0.1)) -> SharpnessAware:  # noqa: B008
    torch.manual_seed(0)
    return SharpnessAware(cases.mlp(), method, cross_entropy)


# The records


def test_a_record_is_what_the_functions_return():
    sharp = plain_sharp()
    monitor = Monitor(sharp, DATA, 0.7)
    record = monitor.record()
    rise = sharpness(sharp, DATA, 0.7)
    found = flips(sharp, DATA, 0.7, {"SAM": None, "BiSAM": NegLog()})
    assert record == {
        "step": 0,
        "sharpness": rise.rise,
        "sharpness_loss": rise.loss,
        "flips/SAM": found.flipped["SAM"] / 32,
        "flips/BiSAM": found.flipped["BiSAM"] / 32,
        "flips_error": 1 - found.correct / 32,
        "flips_cosine/SAM_BiSAM": found.cosines["SAM"]["BiSAM"],
    }
    assert list(record) == ["step", *NAMES]
    assert record["flips/SAM"] > 0
    assert monitor.history == [record]
    record["sharpness"] = 0  # a copy
    assert monitor.history[0]["sharpness"] > 0


def test_the_default_ball_is_that_of_the_functions():
    sharp = plain_sharp()
    assert (
        Monitor(sharp, DATA).record() == Monitor(sharp, DATA, L2(0.05)).record() != Monitor(sharp, DATA, 0.1).record()
    )


def test_records_are_due_every_few_steps():
    monitor = Monitor(plain_sharp(), DATA, every=3, measures={"one": lambda *_: 1})
    assert [bool(monitor.step()) for _ in range(7)] == [False, False, True, False, False, True, False]
    assert monitor.history == [{"step": 3, "one": 1.0}, {"step": 6, "one": 1.0}]
    numbers = [7, 8, 8, 9, 9, 9, 11, 14, 15, 15, 2, 4]  # of a host: repeated (accumulation), with jumps, and a new run
    due = [number for number in numbers if monitor.step(number)]
    assert due == [9, 14, 15, 4]
    assert monitor.steps == 4


def test_entries_of_other_measures():
    pytest.importorskip("curvlinops")
    pytest.importorskip("scipy")
    sharp = plain_sharp()
    measures = {
        "mean": partial(average_sharpness, perturb=0.5, draws=2),
        "worst": partial(zero_one_sharpness, perturb=0.5, steps=3),
        "top": eigenvalues,
        "tops": partial(eigenvalues, k=2),
        "trace": partial(trace, draws=3),
        "number": lambda sharp, batches: len(batches),
        "tensor": lambda sharp, batches: torch.tensor(0.5),
        "several": lambda sharp, batches: {"a": 1, "b": 2.5},
    }
    record = Monitor(sharp, DATA, measures=measures).record()
    mean, worst = average_sharpness(sharp, DATA, 0.5, draws=2), zero_one_sharpness(sharp, DATA, 0.5, steps=3)
    tops, estimate = eigenvalues(sharp, DATA, k=2), trace(sharp, DATA, draws=3)
    assert record == {
        "step": 0,
        "mean": mean.rise,
        "mean_loss": mean.loss,
        "worst": worst.worst,
        "worst_error": worst.error,
        "top": eigenvalues(sharp, DATA).values[0],
        "tops/1": tops.values[0],
        "tops/2": tops.values[1],
        "trace": estimate.value,
        "trace_error": estimate.error,
        "number": 2.0,
        "tensor": 0.5,
        "several/a": 1.0,
        "several/b": 2.5,
    }


def test_entries_of_any_result_are_its_numbers_without_settings():
    from dataclasses import dataclass

    from bisam.analysis.samples import Result

    @dataclass(frozen=True)
    class Mine(Result):
        value: float
        parts: dict[str, int]
        grid: tuple[float, ...]
        good: bool
        rho: float

    mine = Mine(mode="eval", seed=3, examples=8.0, value=0.5, parts={"a": 2}, grid=(1.0, 2.0), good=True, rho=0.1)
    record = Monitor(plain_sharp(), DATA, measures={"mine": lambda *_: mine}).record()
    assert record == {"step": 0, "mine_value": 0.5, "mine_parts/a": 2.0}


def test_the_statistics_of_the_last_step_are_recorded_where_the_loss_has_them():
    sharp = SharpnessAware(cases.mlp(), SAM(0.1), cross_entropy, stats=True)
    monitor = Monitor(sharp, DATA, measures={"one": lambda *_: 1})
    assert monitor.record() == {"step": 0, "one": 1}  # before the first step
    sharp(*DATA[0])
    expected = {f"stats_{name}": value for name, value in sharp.stats.to_dict().items()}
    assert monitor.record() == {"step": 0, **expected, "one": 1}
    assert expected.keys() == {f"stats_{name}" for name in NAMES_OF_STATS}


def test_the_data_is_read_once_and_copied():
    x, y = cases.batch(3, 16)
    sharp, read = plain_sharp(), []

    def batches():
        for i in range(5):
            read.append(i)
            yield x, y

    monitor = Monitor(sharp, batches(), batches=2)
    first = monitor.record()
    x.mul_(0)
    second = monitor.record()
    assert first == second
    assert read == [0, 1]
    assert monitor.cost.examples == 32


def test_a_radius_that_changes_is_that_of_the_present_step():
    sharp = plain_sharp()
    monitor = Monitor(sharp, DATA, L2(Linear(0.1, 0.5, steps=4)))
    for rho in (0.1, 0.2, 0.3):
        assert monitor.record() == Monitor(sharp, DATA, L2(rho)).record()
        sharp(*DATA[0])


# The cost


def counted(monitor: Monitor) -> tuple[float, float]:
    """The forward passes over the data of one record, and those of them that build a graph for a backward pass."""
    seen: list[tuple[int, bool]] = []

    def hook(_: Any, given: tuple[Tensor, ...]) -> None:
        seen.append((len(given[0]), torch.is_grad_enabled()))

    handle = monitor.sharp.model.register_forward_pre_hook(hook)
    assert monitor.record()
    handle.remove()
    examples = monitor.cost.examples
    return sum(n for n, _ in seen) / examples, sum(n for n, graph in seen if graph) / examples


@pytest.mark.parametrize(
    "measures",
    [
        None,
        {"s": sharpness},
        {"s": partial(sharpness, steps=4, restarts=2)},
        {"s": partial(sharpness, steps=2, m=8)},
        {"m": margins, "r": feature_rank, "g": gradient_norm},
        {"a": partial(average_sharpness, draws=3)},
        {"f": flips},
        {"z": partial(zero_one_sharpness, steps=4)},
        {"z": partial(zero_one_sharpness, adversaries={"a": cross_entropy, "b": [NegLog(), NegLog(4)]}, steps=2)},
        {**standard(0.1), "more": partial(sharpness, steps=3)},
    ],
)
def test_the_stated_cost_is_that_of_a_record(measures):
    monitor = Monitor(plain_sharp(), [cases.batch(1, 16), cases.batch(2, 8)], measures=measures)
    stated = monitor.cost
    assert counted(monitor) == (stated.forward, stated.backward)
    assert monitor.cost == stated
    assert stated.unknown == ()


def test_the_stated_cost_of_predictions():
    pytest.importorskip("torchmetrics")
    pytest.importorskip("torchvision")
    sharp = SharpnessAware(nn.Sequential(nn.Flatten(), nn.Linear(6, 4)).double(), SAM(0.1), cross_entropy)
    images = [(x.sigmoid().view(-1, 1, 2, 3), y) for x, y in DATA]
    darker = partial(corruptions, severities=(2, 5), kinds={"darker": lambda x, severity: x * (1 - severity / 5)})
    for measures, passes in (({"c": calibration}, (1, 0)), ({"d": darker}, (3, 0))):
        monitor = Monitor(sharp, images, measures=measures)
        assert (monitor.cost.forward, monitor.cost.backward) == passes
        assert counted(monitor) == passes


def test_the_cost_of_the_standard_measures():
    monitor = Monitor(plain_sharp(), DATA, every=50)
    cost = monitor.cost
    assert (cost.forward, cost.backward, cost.examples, cost.every) == (8, 3, 32, 50)
    assert str(monitor) == str(cost) == "8 forward and 3 backward passes over 32 examples every 50 steps"
    # 8 forward passes and 3 backward passes of two on 32 examples, in 50 steps of 2 gradients on 16 examples
    assert cost.share(16) == pytest.approx((8 + 2 * 3) * 32 / (50 * 2 * 3 * 16))
    assert cost.share(16, gradients=1) == pytest.approx(2 * cost.share(16))


def test_a_cost_that_is_not_known_is_said_and_counted_by_the_first_record():
    def mine(sharp: SharpnessAware, batches: Any) -> Any:
        return sharpness(sharp, batches, steps=2)

    monitor = Monitor(plain_sharp(), DATA, measures={"s": sharpness, "mine": mine, "other": lambda *_: 0})
    assert monitor.cost.unknown == ("mine", "other")
    assert str(monitor).endswith("every 100 steps, without mine, other")
    forward, backward = counted(monitor)
    assert monitor.cost.unknown == ("other",)
    assert (monitor.cost.forward, monitor.cost.backward) == (pytest.approx(forward), pytest.approx(backward))


# Training does not notice


class Noisy(nn.Module):
    """Dropout and BatchNorm, random numbers of three kinds, a frozen part in eval mode, and a counter of passes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.drop = nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.3)
        self.frozen, self.last = nn.BatchNorm1d(16).eval(), nn.Linear(16, 4)
        self.register_buffer("calls", torch.zeros(()))
        self.mean = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        h = self.frozen(self.drop(torch.tanh(self.norm(self.first(x)))))
        self.mean = 0.9 * self.mean + h.detach().mean()
        if self.training:
            h = h * (1 + 0.1 * random.random()) + 0.1 * float(np.random.rand())
        return self.last(h)


def loader(**options: Any) -> DataLoader[tuple[Tensor, ...]]:
    x = torch.randn(24, 6, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x, torch.arange(24) % 4), batch_size=8, shuffle=True, **options)


def trained(
    make: Callable[[torch.optim.Optimizer], Any],
    watch: Callable[[SharpnessAware], Monitor] | None,
    dtype: torch.dtype | None = None,
) -> list[Any]:
    """All that a training can notice, after each step."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    model = Noisy()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sharp = SharpnessAware(model, make(optimizer), cross_entropy, stats=True)
    model.train()
    model.frozen.eval()
    monitor = None if watch is None else watch(sharp)
    seen: list[Any] = []
    data = loader(generator=torch.Generator().manual_seed(3)) if dtype is None else loader()
    for _ in range(2):
        for x, y in data:
            with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
                loss = sharp(x, y)
                loss.backward()
                optimizer.step()
                if monitor is not None:  # in the context, where a record could reach the cache of autocast
                    assert monitor.step() is not None
            seen += [loss.detach(), sharp.clean.value, sharp.clean.outputs, torch.get_rng_state(), random.random()]
            seen += [np.random.rand(), *[p.grad.clone() for p in model.parameters() if p.grad is not None], model.mean]
            seen += [sharp.stats.to_dict()]
            seen += [[m.training for m in model.modules()], parameters(model), buffers(model), sharp.get_extra_state()]
            optimizer.zero_grad()
    return seen


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


METHODS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "ERM": lambda _: ERM(),
    "SAM": lambda _: SAM(0.1),
    "BiSAM": lambda _: BiSAM(0.1),
    "LookSAM": lambda _: LookSAM(L2(0.1), k=2),
    "SAMPa": lambda optimizer: SAMPa(ahead=next_step(optimizer)),
}


def drawing(sharp: SharpnessAware, batches: Any) -> float:
    """A measure that takes random numbers of all kinds."""
    return float(torch.rand(())) + random.random() + float(np.random.rand())


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_training_is_bit_identical_with_a_monitor(method, dtype):
    measures = {**standard(0.3), "train": partial(sharpness, mode="train"), "mine": drawing}

    def watch(sharp: SharpnessAware) -> Monitor:
        return Monitor(sharp, loader(), every=1, measures=measures)

    assert same(trained(method, watch, dtype), trained(method, None, dtype))


def test_reading_a_part_of_the_training_loader_does_not_change_its_order():
    data = loader(generator=torch.Generator().manual_seed(3))
    sharp, before = plain_sharp(), data.generator.get_state()
    state = torch.get_rng_state()
    Monitor(sharp, data, batches=1)
    assert torch.equal(data.generator.get_state(), before)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_measure_that_fails_or_is_interrupted_leaves_no_trace():
    sharp, calls = plain_sharp(), []

    def fails(sharp: SharpnessAware, batches: Any) -> float:
        def forward(_: Any, __: Any, out: Tensor) -> None:
            calls.append(out)
            if len(calls) == 3:
                raise error

        handle = sharp.model.register_forward_hook(forward)
        try:
            return sharpness(sharp, batches).rise
        finally:
            handle.remove()

    before, state = parameters(sharp.model), torch.get_rng_state()
    error: BaseException = KeyboardInterrupt()
    monitor = Monitor(sharp, DATA, measures={"fails": fails, "one": lambda *_: 1})
    with pytest.raises(KeyboardInterrupt):
        monitor.record()
    assert monitor.history == []
    calls.clear()
    error = RuntimeError("out of\nmemory")
    with pytest.warns(UserWarning, match="measure 'fails' is left out .*RuntimeError: out of memory"):
        assert monitor.record() == {"step": 0, "one": 1.0}
    assert monitor.record() == {"step": 0, "one": 1.0}  # without a second warning
    assert (parameters(sharp.model), torch.equal(torch.get_rng_state(), state)) == (before, True)
    assert sharp.model.training


# Saved and resumed


def test_a_resumed_run_goes_on_with_the_same_steps_and_history(tmp_path):
    def run(sharp: SharpnessAware, monitor: Monitor, first: int, last: int) -> None:
        optimizer = torch.optim.SGD(sharp.parameters(), lr=0.1)
        for step in range(first, last):
            sharp(*cases.batch(step, 16)).backward()
            optimizer.step()
            optimizer.zero_grad()
            monitor.step()

    whole = plain_sharp()
    expected = Monitor(whole, DATA, every=4)
    run(whole, expected, 0, 12)
    part = plain_sharp()
    monitor = Monitor(part, DATA, every=4)
    run(part, monitor, 0, 6)
    torch.save({"sharp": part.state_dict(), "monitor": monitor.state_dict()}, tmp_path / "saved")
    saved = torch.load(tmp_path / "saved", weights_only=True)
    again = plain_sharp()
    resumed = Monitor(again, DATA, every=4)
    again.load_state_dict(saved["sharp"])
    resumed.load_state_dict(saved["monitor"])
    run(again, resumed, 6, 12)
    assert [record["step"] for record in expected.history] == [4, 8, 12]
    assert resumed.history == expected.history
    assert resumed.steps == 12


@pytest.mark.parametrize("state", [{}, [], {"steps": 3}, {"steps": 3, "history": [], "more": 1}])
def test_a_state_of_something_else_is_refused(state):
    with pytest.raises(ValueError, match="the state of a monitor has the entries 'steps' and 'history'"):
        Monitor(plain_sharp(), DATA).load_state_dict(state)


# What cannot be measured


def test_a_loss_that_is_not_finite_is_recorded_and_does_not_end_training():
    sharp = plain_sharp()
    monitor = Monitor(sharp, DATA, every=1)
    good = monitor.step()
    weight = next(sharp.model.parameters()).data
    kept = weight.clone()
    weight[0, 0] = math.nan
    with pytest.warns(UserWarning, match="the record of step 2 is not finite, and training goes on: the loss of batch"):
        record = monitor.step()
    assert list(record) == ["step", *NAMES]
    assert all(math.isnan(record[name]) for name in NAMES)
    assert math.isnan(monitor.step()["flips/SAM"])  # one warning is enough
    weight.copy_(kept)
    assert monitor.step() == {**good, "step": 4}
    bad = Monitor(sharp, [(torch.full((4, 6), math.inf).double(), torch.zeros(4).long())])
    with pytest.warns(UserWarning, match="is not finite"):
        assert bad.record().keys() == {"step", "sharpness", "flips"}


def test_a_rise_that_is_not_finite_is_recorded():
    monitor = Monitor(plain_sharp(), DATA, measures={"mine": lambda *_: math.inf})
    with pytest.warns(UserWarning, match="mine is inf"):
        assert monitor.record() == {"step": 0, "mine": math.inf}


def test_a_model_without_classes_is_told_once():
    torch.manual_seed(0)
    sharp = SharpnessAware(nn.Linear(6, 1), SAM(0.1), nn.MSELoss(reduction="none"))
    monitor = Monitor(sharp, [(torch.randn(8, 6), torch.randn(8, 1))], every=1)
    with pytest.warns(UserWarning, match="the measure 'flips' is left out of the records, .*: the 0-1 loss compares"):
        record = monitor.step()
    assert record.keys() == {"step", "sharpness", "sharpness_loss"}
    assert monitor.step() == {**record, "step": 2}
    assert (monitor.cost.forward, monitor.cost.backward) == (3, 1)
    sharp = SharpnessAware(nn.Linear(6, 1), SAM(0.1), lambda own, _: own, lambda model, x: (model(x)[:, 0], None))
    with pytest.warns(
        UserWarning, match="the 0-1 loss compares logits with labels, and there are no labels of classes"
    ):
        Monitor(sharp, [torch.randn(8, 6)]).record()


def test_no_measure_left():
    monitor = Monitor(plain_sharp(), DATA, every=1, measures={"list": lambda *_: [1, 2]})
    with pytest.warns(UserWarning, match="a measure returns numbers, or a result with some, got list"):
        assert monitor.step() == {"step": 1}
    assert monitor.step() is None
    assert monitor.cost.forward == 0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"sharp": nn.Linear(2, 2)},
            TypeError,
            "takes the loss SharpnessAware.*got Linear: for a loop without a method",
        ),
        ({"sharp": ModelOracle(cases.mlp(), cross_entropy)}, TypeError, "got ModelOracle"),
        ({"data": []}, ValueError, "the data has no batches"),
        ({"data": 5}, TypeError, "data must be batches, such as a list or a DataLoader, got int"),
        ({"measures": [sharpness]}, TypeError, "measures must be functions by names"),
        ({"every": 0}, ValueError, "every must be at least 1, got 0"),
        ({"every": 2.5}, TypeError, "every must be an int, got 2.5"),
        ({"batches": 0}, ValueError, "batches must be at least 1, got 0"),
        ({"perturb": -1}, ValueError, "-1"),
        ({"perturb": "0.05"}, TypeError, "0.05"),
        ({"measures": {}}, ValueError, "measures is empty"),
        ({"measures": {"step": sharpness}}, ValueError, "another name"),
        ({"measures": {"a": 3}}, TypeError, "measure 'a' must be a function .*got 3"),
        ({"measures": {"a": partial(sharpness, stepz=3)}}, TypeError, "measure 'a': .*'stepz'"),
        (
            {"measures": {"a": sharpness}, "perturb": 0.1},
            ValueError,
            "perturb=0.1 is the ball of the standard measures",
        ),
    ],
)
def test_bad_input_is_refused_at_once(change, error, message):
    arguments = {"sharp": plain_sharp(), "data": DATA, **change}
    with pytest.raises(error, match=message):
        Monitor(arguments.pop("sharp"), arguments.pop("data"), **arguments)


def test_bad_settings_of_the_standard_measures_and_of_a_cost():
    with pytest.raises(ValueError, match="mode must be"):
        standard(mode="test")
    with pytest.raises(TypeError, match="seed must be an int"):
        standard(seed=1.5)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        Monitor(plain_sharp(), DATA).cost.share(0)
    with pytest.raises(ValueError, match="gradients must be positive"):
        Monitor(plain_sharp(), DATA).cost.share(8, gradients=0)
    with pytest.raises(ValueError, match="number must be at least 0"):
        Monitor(plain_sharp(), DATA).step(-1)


def test_a_generator_that_was_read_is_refused():
    data = (batch for batch in DATA)
    Monitor(plain_sharp(), data)
    with pytest.raises(ValueError, match="a generator that was read before has none left"):
        Monitor(plain_sharp(), data)


# Pictures


def test_the_plot_has_a_panel_for_each_quantity():
    pytest.importorskip("matplotlib").use("Agg")
    import matplotlib.pyplot as plt

    sharp = plain_sharp()
    monitor = Monitor(sharp, DATA, 0.5, every=1)
    with pytest.raises(ValueError, match="no record to draw"):
        monitor.plot()
    records = [monitor.step() for _ in range(3)]
    axes = monitor.plot()
    assert [one.get_ylabel() for one in axes] == ["sharpness", "sharpness loss", "flips", "flips error", "flips cosine"]
    assert axes[-1].get_xlabel() == "training step"
    lines = axes[2].get_lines()
    assert [line.get_label() for line in lines] == ["SAM", "BiSAM"]
    assert list(lines[1].get_xdata()) == [1, 2, 3]
    assert list(lines[1].get_ydata()) == [record["flips/BiSAM"] for record in records]
    assert len(monitor.plot(["flips"])) == 1
    with pytest.raises(ValueError, match="no entry 'flip' in the records, which have sharpness"):
        monitor.plot(["flip"])
    plt.close("all")


# Several ranks


def watched(make: Callable[[], tuple[nn.Module, SharpnessAware]], measures: Any, data: Any) -> tuple[list[Tensor], Any]:
    """Weights and buffers of a training after each step, and the history of its monitor."""
    seen: list[Tensor] = []
    model, sharp = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = None if measures is None else Monitor(sharp, data, every=2, measures=measures)
    torch.manual_seed(5)
    for step in range(4):
        optimizer.zero_grad()
        outer = model if isinstance(model, DistributedDataParallel) and model.module is sharp else sharp
        first = 4 * dist.get_rank()
        outer(*[t[first : first + 4] for t in cases.batch(step, 8)]).backward()
        optimizer.step()
        if monitor is not None:
            monitor.step()
        seen += [t.clone() for t in (*whole_weights(model), *model.buffers())]
    return seen, [] if monitor is None else monitor.history


def plain_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 4)).double()


def normed_and_noisy() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 4)).double()


def replicas_inside() -> tuple[nn.Module, SharpnessAware]:
    model = DistributedDataParallel(normed_and_noisy())
    return model, SharpnessAware(model, SAM(0.1), cross_entropy)


def replicas_outside() -> tuple[nn.Module, SharpnessAware]:
    sharp = SharpnessAware(normed_and_noisy(), SAM(0.1), cross_entropy)
    return DistributedDataParallel(sharp), sharp


def fully_sharded() -> tuple[nn.Module, SharpnessAware]:
    model = sharded(plain_net())
    return model, SharpnessAware(model, SAM(0.1), cross_entropy)


def replicated() -> tuple[nn.Module, SharpnessAware]:
    model = plain_net()
    return model, SharpnessAware(model, SAM(0.1), cross_entropy, scope="global")


def on_two_ranks() -> dict[str, Any]:
    rank, found = dist.get_rank(), {}
    part = [tuple(t[8 * rank : 8 * rank + 8] for t in batch) for batch in DATA]
    measures = {**standard(0.7), "mean": partial(average_sharpness, draws=2), "rank": lambda *_: rank}
    for make in (replicas_inside, replicas_outside, fully_sharded, replicated):
        with_it, history = watched(make, measures, part)
        without, _ = watched(make, None, part)
        found[make.__name__] = (all(map(torch.equal, with_it, without)), history)
    # Rank 0 alone may record where no passes communicate.
    _, sharp = replicas_outside()
    if rank == 0:
        assert Monitor(sharp, part).record()
    # An error is raised where other ranks would go on without this one.
    _, sharp = fully_sharded()
    try:
        Monitor(sharp, part, measures={"fails": lambda *_: [][0]}).record()
    except IndexError:
        found["raised"] = True

    # What all ranks cannot compute is left out. What one rank cannot compute is an error on all of them.
    def on_rank(failing: set[int]) -> float:
        if rank in failing:
            raise ValueError("no classes")
        return 1.0

    for make in (replicas_inside, fully_sharded):
        _, sharp = make()
        both = Monitor(sharp, part, measures={"fails": lambda *_: on_rank({0, 1}), "one": lambda *_: 1})
        with pytest.warns(UserWarning, match="the measure 'fails' is left out .*: no classes"):
            assert both.record() == {"step": 0, "one": 1}
        with pytest.raises(RuntimeError, match="the measure 'fails' failed on 50% of the ranks"):
            Monitor(sharp, part, measures={"fails": lambda *_: on_rank({1})}).record()
    bad = [(x * math.nan, y) if rank else (x, y) for x, y in part]
    _, sharp = replicas_inside()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found["bad"] = Monitor(sharp, bad).record()
    found["counts"] = flips(fully_sharded()[1], part, 3.0, {"SAM": None}).to_dict()
    return found


def test_two_ranks():
    first, second = ranks.run(2, on_two_ranks)
    for name in ("replicas_inside", "replicas_outside", "fully_sharded", "replicated"):
        assert first[name][0], name
        assert second[name][0], name
        assert [record["step"] for record in first[name][1]] == [2, 4]
    assert first["raised"]
    assert all(map(math.isfinite, first["bad"].values()))
    assert math.isnan(second["bad"]["flips"])
    for name in ("replicas_inside", "replicas_outside"):  # each rank has its own batches
        assert [record["rank"] for record in (first[name][1][0], second[name][1][0])] == [0, 1]
        assert first[name][1][0]["sharpness"] != second[name][1][0]["sharpness"]
    model = plain_net()
    sharp = SharpnessAware(model, SAM(0.1), cross_entropy)
    counts = flips(sharp, DATA, 3.0, {"SAM": None})
    for name in ("examples", "correct", "flipped", "repaired"):
        assert first["counts"][name] == second["counts"][name] == getattr(counts, name)
    assert counts.flipped["SAM"] > 0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = Monitor(sharp, DATA, every=2, measures={**standard(0.7), "mean": partial(average_sharpness, draws=2)})
    for step in range(4):
        optimizer.zero_grad()
        sharp(*cases.batch(step, 8)).backward()
        optimizer.step()
        monitor.step()
    for name in ("fully_sharded", "replicated"):  # the records of one process on all batches
        assert first[name][1] == second[name][1]
        for found, expected in zip(first[name][1], monitor.history, strict=True):
            assert found == pytest.approx({**expected, "rank": 0.5}, rel=1e-9, abs=1e-12)
