"""Schedules: their values, what they refuse, and that they follow a learning rate."""

from __future__ import annotations

import copy
import pickle
from itertools import pairwise
from math import cos, inf, nan, pi

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR, StepLR

from bisam import SAM, SharpnessAware, cross_entropy, next_step
from bisam.perturbations import L2, Adaptive, LossEquated
from bisam.schedules import Constant, Cosine, Follow, Linear, Warmup, at, check

values = st.floats(0, 1e3)
lengths = st.integers(1, 1000)


def optimizer(lr: float = 0.1, **kwargs) -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=lr, **kwargs)


def tensor_of_a_half(step: int) -> torch.Tensor:
    return torch.tensor(0.5)


# Values.


@settings(deadline=None, derandomize=True)
@given(values, st.integers(0, 10**6))
def test_a_constant_is_constant(value, step):
    assert Constant(value)(step) == at(Constant(value), step) == at(value, step) == value


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Linear(0.6, 0.1, steps=5), [0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.1, 0.1]),
        (Linear(0.0, 0.3, steps=3, begin=2), [0, 0, 0, 0.1, 0.2, 0.3, 0.3, 0.3]),
        (Cosine(0.6, 0.1, steps=4), [0.1 + 0.25 * (1 + cos(pi * t)) for t in (0, 0.25, 0.5, 0.75, 1, 1, 1)]),
        (Cosine(0.2, 0.0, steps=2, begin=1), [0.2, 0.2, 0.1, 0, 0, 0]),
        (Warmup(0.8, steps=4), [0.2, 0.4, 0.6, 0.8, 0.8, 0.8]),
        (Warmup(Linear(1.0, 0.0, steps=4), steps=2), [0.5, 0.75, 0.5, 0.25, 0, 0]),
        (Warmup(tensor_of_a_half, steps=2), [0.25, 0.5]),
    ],
    ids=lambda v: type(v).__name__,
)
def test_values_step_by_step(schedule, expected):
    assert [float(schedule(step)) for step in range(len(expected))] == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("kind", [Linear, Cosine])
@settings(deadline=None, derandomize=True)
@given(start=values, end=values, steps=lengths, begin=st.integers(0, 100))
def test_the_ends_are_exact_and_the_way_between_is_monotone(kind, start, end, steps, begin):
    schedule = kind(start, end, steps, begin)
    way = [schedule(step) for step in range(begin + steps + 3)]
    assert way[: begin + 1] == [start] * (begin + 1)
    assert way[begin + steps :] == [end] * 3
    rounding = 1e-12 * max(start, end) + 1e-300
    assert all(min(start, end) - rounding <= v <= max(start, end) + rounding for v in way)
    assert all((a - b) * (1 if start >= end else -1) >= -rounding for a, b in pairwise(way))


@settings(deadline=None, derandomize=True)
@given(st.floats(1e-3, 1e3), lengths)
def test_a_warm_up_ends_with_the_radius_and_never_begins_with_zero(radius, steps):
    schedule = Warmup(radius, steps)
    assert schedule(0) == pytest.approx(radius / steps)
    assert 0 < schedule(0) <= schedule(steps // 2) <= schedule(steps - 1) == schedule(10**6) == radius


# Following a learning rate.


def test_a_radius_follows_on_a_straight_line():
    o = optimizer(lr=1.6)
    rho = Follow(o, high=0.04, low=0.02, lr_low=0.016)
    for rate, expected in [(1.6, 0.04), (0.016, 0.02), (0.808, 0.03)]:
        o.param_groups[0]["lr"] = rate
        assert rho(7) == pytest.approx(expected)


def test_with_nothing_lowest_it_is_proportional():
    o = optimizer(lr=0.1)
    rho = Follow(o, high=0.5)
    o.param_groups[0]["lr"] = 0.03
    assert rho(0) == pytest.approx(0.15)


@pytest.mark.parametrize(
    ("scheduler", "peak"),
    [
        (lambda o: StepLR(o, 2), 0.1),
        (lambda o: CosineAnnealingLR(o, 5), 0.1),
        (lambda o: LambdaLR(o, lambda n: min((n + 1) / 3, 1)), 0.1),  # a warm-up, at whose start Follow is made
        (lambda o: OneCycleLR(o, max_lr=0.4, total_steps=6), 0.4),
    ],
    ids=["StepLR", "CosineAnnealingLR", "warm-up", "OneCycleLR"],
)
def test_the_radius_is_highest_at_the_peak_of_a_scheduler(scheduler, peak):
    o = optimizer(lr=0.1)
    scheduler = scheduler(o)
    rho = Follow(o, high=0.8)
    for step in range(5):
        assert rho(step) == pytest.approx(0.8 * o.param_groups[0]["lr"] / peak)
        o.step()
        scheduler.step()


def test_a_resumed_radius_follows_the_peak_that_was():
    """The optimizer that is loaded is made before Follow, or after it."""
    o = optimizer(lr=0.1)
    scheduler = StepLR(o, 1, gamma=0.5)
    before = Follow(o, high=0.8)
    o.step()
    scheduler.step()
    fresh = optimizer(lr=0.1)
    StepLR(fresh, 1, gamma=0.5)
    early = Follow(fresh, high=0.8)
    fresh.load_state_dict(o.state_dict())
    assert before(1) == early(1) == Follow(fresh, high=0.8)(1) == pytest.approx(0.4)


def test_a_learning_rate_below_the_lowest_gives_no_negative_radius():
    """A warm-up may begin there, and minus a radius would be a descent."""
    o = optimizer(lr=1.0)
    rho = Follow(o, high=0.6, low=0.1, lr_low=0.5)
    o.param_groups[0]["lr"] = 0.0
    assert rho(0) >= 0


@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_learning_rate_may_be_a_tensor(shape):
    o = optimizer(lr=torch.full(shape, 0.1, dtype=torch.double))
    rho = Follow(o, high=0.5, low=0.1)
    o.param_groups[0]["lr"].fill_(0.05)
    assert float(rho(0)) == pytest.approx(0.3)
    models = [nn.Linear(3, 4).double() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    x, y = torch.randn(5, 3).double(), torch.arange(5) % 4
    values = [SharpnessAware(m, SAM(r), cross_entropy)(x, y) for m, r in zip(models, (rho, 0.3), strict=True)]
    torch.testing.assert_close(values[0], values[1])


def test_a_schedule_of_several_numbers_is_refused():
    with pytest.raises(ValueError, match=r"rho at step 0 must be one number, got a tensor of shape \(2,\)"):
        L2(lambda step: torch.ones(2))


def test_a_radius_may_be_a_tensor_of_the_step():
    model = nn.Linear(3, 4).double()
    sharp = SharpnessAware(model, SAM(L2(lambda step: torch.tensor(0.1 * (step + 1)))), cross_entropy)
    x, y = torch.randn(5, 3).double(), torch.arange(5) % 4
    first, second = sharp(x, y), sharp(x, y)
    assert second > first


def test_a_follower_can_be_copied_with_its_optimizer():
    o = optimizer(lr=0.2)
    rho = Follow(o, high=0.5)
    other, copied = copy.deepcopy((o, rho))
    other.param_groups[0]["lr"] = 0.1
    assert (rho(0), copied(0)) == (pytest.approx(0.5), pytest.approx(0.25))


@pytest.mark.parametrize(
    "schedule", [Constant(0.1), Linear(0.1, 0.2, 3), Cosine(0.1, 0.2, 3, 1), Warmup(0.1, 3)], ids=str
)
def test_schedules_are_values(schedule):
    assert pickle.loads(pickle.dumps(schedule)) == copy.deepcopy(schedule) == schedule
    assert len({schedule, copy.deepcopy(schedule)}) == 1


# Bad input.


@pytest.mark.parametrize("value", [-0.1, nan, inf])
@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("value", Constant),
        ("start", lambda v: Linear(v, 0.1, 5)),
        ("end", lambda v: Cosine(0.1, v, 5)),
        ("radius", lambda v: Warmup(v, 5)),
        ("radius", lambda v: Warmup(lambda step: v, 5)),
        ("high", lambda v: Follow(optimizer(), v)),
        ("low", lambda v: Follow(optimizer(), 0.1, v)),
        ("rho", lambda v: L2(lambda step: v)),
        ("lr_high", lambda v: Follow(optimizer(), 0.1, lr_high=v)),
        ("lr_low", lambda v: Follow(optimizer(), 0.1, lr_low=v)),
        ("rho", lambda v: Adaptive(lambda step: v)),
        ("sigma", lambda v: LossEquated(lambda step: v)),
        ("r", lambda v: check("r", v)),
    ],
)
def test_values_outside_their_range_are_named(name, make, value):
    with pytest.raises(ValueError, match=rf"{name}.*{value}"):
        make(value)


@pytest.mark.parametrize("value", ["0.1", True, [0.1], Constant], ids=str)
@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("value", Constant),
        ("start", lambda v: Linear(v, 0.1, 5)),
        ("radius", lambda v: Warmup(v, 5)),
        ("rho", L2),
        ("sigma", LossEquated),
        ("high", lambda v: Follow(optimizer(), v)),
        ("lr_low", lambda v: Follow(optimizer(), 0.1, lr_low=v)),
    ],
)
def test_what_is_no_radius_is_named(name, make, value):
    with pytest.raises(TypeError, match=name):
        make(value)


@pytest.mark.parametrize(("name", "make"), [("steps", lambda n: Linear(1, 0, n)), ("steps", lambda n: Warmup(0.1, n))])
@pytest.mark.parametrize("value", [0, -1, 2.0, True, None, "3"])
def test_lengths_are_whole_and_positive(name, make, value):
    with pytest.raises((TypeError, ValueError), match=name):
        make(value)


@pytest.mark.parametrize("value", [-1, 2.0, True, None])
def test_a_begin_is_whole_and_not_negative(value):
    with pytest.raises((TypeError, ValueError), match="begin"):
        Cosine(0.1, 0.2, 5, value)


@pytest.mark.parametrize("value", [None, 0.1, torch.optim.SGD, nn.Linear(2, 2), next_step(optimizer())], ids=str)
def test_what_has_no_learning_rate_cannot_be_followed(value):
    with pytest.raises(TypeError, match="optimizer"):
        Follow(value, high=0.1)


@pytest.mark.parametrize(("high", "low"), [(None, 0.1), (0.1, 0.1), (0.0, 0.0)])
def test_equal_learning_rates_are_refused(high, low):
    with pytest.raises(ValueError, match=r"lr_high|lr_low|learning rate"):
        Follow(optimizer(lr=0.1), high=0.5, lr_high=high, lr_low=low)


def test_follow_knows_the_peak_of_a_scheduler_that_is_made_later():
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    follow = Follow(optimizer, high=0.2)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=10)
    optimizer.param_groups[0]["lr"] = 1.0
    assert follow(0) == pytest.approx(0.2)
