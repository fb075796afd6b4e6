"""Lookahead is an optimizer like any other."""

from __future__ import annotations

import copy
import io
import pickle
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau, StepLR

from bisam import Lookahead, ProximalPoint, cross_entropy
from tests.support import cases, references

momentum = partial(SGD, lr=0.1, momentum=0.9, weight_decay=5e-3)


def fit(optimizer: torch.optim.Optimizer, model: nn.Module, steps: range, schedule=None) -> None:
    for i in steps:
        optimizer.zero_grad()
        cross_entropy(model(cases.batch(i)[0]), cases.batch(i)[1]).mean().backward()
        optimizer.step()
        if schedule is not None:
            schedule.step(*([0.0] if isinstance(schedule, ReduceLROnPlateau) else []))


@pytest.mark.parametrize("name", cases.OPTIMIZERS)
@pytest.mark.parametrize(("k", "lam"), [(1, 0.3), (3, 0.5), (5, 0.9), (4, 1.0), (100, 0.5)])
def test_every_k_th_step_pulls_back(name, k, lam):
    model = cases.convnet()
    twin = copy.deepcopy(model)
    optimizer, fast = (
        Lookahead(cases.OPTIMIZERS[name](model.parameters()), k, lam),
        cases.OPTIMIZERS[name](twin.parameters()),
    )
    slow = references.flat(twin)
    for i in range(12):
        fit(optimizer, model, range(i, i + 1))
        fit(fast, twin, range(i, i + 1))
        if (i + 1) % k == 0:
            slow = (1 - lam) * slow + lam * references.flat(twin)
            references.load(twin, slow)
        torch.testing.assert_close(references.flat(model), references.flat(twin), rtol=0, atol=1e-12)


SCHEDULES = {
    "step": partial(StepLR, step_size=2, gamma=0.5),
    "one-cycle": partial(OneCycleLR, max_lr=0.1, total_steps=20),
    "plateau": partial(ReduceLROnPlateau, patience=2),
}


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", cases.OPTIMIZERS)
def test_lam_one_is_the_optimizer_inside(name, schedule, k):
    model = cases.convnet()
    plain = copy.deepcopy(model)
    bare = cases.OPTIMIZERS[name](plain.parameters())
    optimizer = Lookahead(cases.OPTIMIZERS[name](model.parameters()), k, alpha=1.0)
    fit(optimizer, model, range(10), SCHEDULES[schedule](optimizer))
    fit(bare, plain, range(10), SCHEDULES[schedule](bare))
    assert cases.parameters(model) == cases.parameters(plain)
    assert optimizer.param_groups[0]["lr"] == bare.param_groups[0]["lr"] != cases.OPTIMIZERS[name].keywords["lr"]


def test_parameters_stay_where_they_are():
    model = cases.mlp()
    places = [p.data_ptr() for p in model.parameters()]
    fit(Lookahead(SGD(model.parameters(), lr=0.1), 2), model, range(5))
    assert [p.data_ptr() for p in model.parameters()] == places


def through_a_file(optimizer, model, make):
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    twin = cases.convnet()
    twin.load_state_dict(saved["model"])
    other = make(twin)
    other.load_state_dict(saved["optimizer"])
    return other, twin


COPIES = {
    "file": through_a_file,
    "deepcopy": lambda optimizer, model, make: copy.deepcopy((optimizer, model)),
    "pickle": lambda optimizer, model, make: pickle.loads(pickle.dumps((optimizer, model))),
}


def nested(model: nn.Module, name: str = "sgd") -> Lookahead:
    return Lookahead(Lookahead(cases.OPTIMIZERS[name](model.parameters()), 2, 0.7), 5, 0.4)


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("at", [0, 2, 3, 4])
@pytest.mark.parametrize(
    "make",
    [
        lambda model: Lookahead(cases.OPTIMIZERS["sgd"](model.parameters()), 3),
        lambda model: Lookahead(cases.OPTIMIZERS["adamw"](model.parameters()), 3),
        nested,
        lambda model: ProximalPoint(cases.OPTIMIZERS["adamw"](model.parameters()), 3, 0.9),
        lambda model: Lookahead(ProximalPoint(Adam(model.parameters(), lr=1e-2, betas=(0.0, 0.9))), 4, 0.4),
    ],
    ids=["sgd", "adamw", "nested", "RAPP-Adam", "LA-ExtraAdam"],
)
def test_a_copy_goes_on_bit_for_bit(make, at, copied):
    model = cases.convnet()
    optimizer = make(model)
    fit(optimizer, model, range(at))
    other, twin = COPIES[copied](optimizer, model, make)
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in twin.parameters()}
    fit(optimizer, model, range(at, 11))
    fit(other, twin, range(at, 11))
    assert cases.parameters(twin) == cases.parameters(model)
    torch.testing.assert_close(other.state_dict(), optimizer.state_dict(), rtol=0, atol=0)


def test_a_loaded_state_is_a_copy():
    model = cases.mlp()
    optimizer = Lookahead(SGD(model.parameters(), lr=0.1), 3)
    fit(optimizer, model, range(2))
    saved = optimizer.state_dict()
    other = Lookahead(SGD(copy.deepcopy(model).parameters(), lr=0.1), 3)
    other.load_state_dict(saved)
    before = copy.deepcopy(saved)
    other._slow[other.param_groups[0]["params"][0]].zero_()
    torch.testing.assert_close(saved, before, rtol=0, atol=0)


def test_states_of_bare_optimizers_are_interchangeable():
    model = cases.mlp()
    bare = momentum(model.parameters())
    fit(bare, model, range(4))
    optimizer = Lookahead(momentum(model.parameters()), 3)
    fit(optimizer, model, range(2))
    optimizer.load_state_dict(bare.state_dict())
    assert optimizer.state_dict()["lookahead"] == [{"count": 0, "slow": {}}]
    torch.testing.assert_close(optimizer.state_dict()["state"], bare.state_dict()["state"], rtol=0, atol=0)
    bare.load_state_dict(optimizer.state_dict())


def test_a_state_of_other_parameters_is_refused_and_changes_nothing():
    model = cases.mlp()
    optimizer = Lookahead(momentum(model.parameters()), 3)
    fit(optimizer, model, range(2))
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="size of optimizer's group"):
        optimizer.load_state_dict(Lookahead(SGD(cases.convnet().parameters())).state_dict())
    torch.testing.assert_close(optimizer.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skips_does_not_count(fused):
    model = cases.mlp()
    optimizer = Lookahead(SGD(model.parameters(), lr=0.1, fused=fused), 2)
    scaler = torch.amp.GradScaler("cpu")
    counts = []
    for i, factor in enumerate([1.0, float("inf"), 1.0, 1.0]):
        optimizer.zero_grad()
        x, y = cases.batch(i)
        scaler.scale(cross_entropy(model(x), y).mean() * factor).backward()
        before = cases.parameters(model)
        scaler.step(optimizer)
        assert (cases.parameters(model) == before) == (factor != 1.0)
        scaler.update()
        counts.append(optimizer.state_dict()["lookahead"][0]["count"])
    assert counts == [1, 1, 0, 1]


def test_a_closure_is_passed_on_and_its_loss_returned():
    w = nn.Parameter(torch.tensor([3.0, -2.0]))
    optimizer = Lookahead(torch.optim.LBFGS([w], lr=0.5, max_iter=2), 2)

    def closure():
        optimizer.zero_grad()
        loss = (w**2).sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(20)]
    assert losses[0] == 13.0
    assert losses[-1] < 1e-3


def test_a_step_that_fails_does_not_count():
    model = cases.mlp()
    optimizer = Lookahead(SGD(model.parameters()), 2)

    def closure():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert optimizer.state_dict()["lookahead"][0]["count"] == 0


def test_hooks_see_the_wrapper():
    model = cases.mlp()
    optimizer, seen = Lookahead(SGD(model.parameters(), lr=0.1), 2), []
    optimizer.register_step_pre_hook(lambda o, *_: seen.append(("before", o)))
    optimizer.register_step_post_hook(lambda o, *_: seen.append(("after", o)))
    optimizer.register_state_dict_pre_hook(lambda o: seen.append(("saving", o)))
    optimizer.register_state_dict_post_hook(lambda o, state: {**state, "note": 1})
    optimizer.register_load_state_dict_pre_hook(lambda o, state: {**state, "lookahead": [{"count": 1, "slow": {}}]})
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append(("loaded", o)))
    fit(optimizer, model, range(2))
    state = optimizer.state_dict()
    assert state["note"] == 1
    optimizer.load_state_dict(state)
    assert [what for what, _ in seen] == ["before", "after", "before", "after", "saving", "loaded"]
    assert all(o is optimizer for _, o in seen)
    assert optimizer._count == 1


def test_parameters_added_on_the_way_are_pulled_from_their_first_step():
    first, second = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimizer = Lookahead(SGD([first], lr=1.0), 3, 0.5)
    first.grad, second.grad = torch.ones(1), torch.ones(1)
    optimizer.step()
    optimizer.add_param_group({"params": [second], "lr": 10.0})
    optimizer.step()
    optimizer.step()
    assert (first.item(), second.item()) == (-1.5, -10.0)


def test_weights_that_were_changed_between_rounds_are_what_the_next_starts_from():
    w = nn.Parameter(torch.zeros(1))
    optimizer = Lookahead(SGD([w], lr=1.0), 2, 0.5)
    w.grad = torch.ones(1)
    optimizer.step()
    optimizer.step()
    assert w.item() == -1.0
    w.data.fill_(10.0)  # a checkpoint, say
    optimizer.step()
    optimizer.step()
    assert w.item() == 9.0


def test_the_settings_are_those_of_the_optimizer_inside():
    inside = momentum(cases.mlp().parameters())
    optimizer = Lookahead(inside)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert (optimizer.k, optimizer.alpha) == (5, 0.5)
    inside.load_state_dict({**inside.state_dict(), "state": {}})  # which makes new groups
    optimizer.param_groups[0]["lr"] = 7.0
    assert inside.param_groups[0]["lr"] == 7.0
    assert optimizer.state is inside.state
    assert optimizer.defaults is inside.defaults
    assert repr(optimizer) == f"Lookahead({inside!r}, k=5, alpha=0.5)"


def test_in_fabric():
    fabric = pytest.importorskip("lightning_fabric").Fabric(accelerator="cpu", devices=1)
    model = cases.mlp()
    plain = copy.deepcopy(model)
    bare = Lookahead(momentum(plain.parameters()), 3)
    fit(bare, plain, range(7))
    model, optimizer = fabric.setup(model, Lookahead(momentum(model.parameters()), 3))
    fit(optimizer, model, range(7))
    assert cases.bits(references.flat(model)) == cases.bits(references.flat(plain))
    torch.testing.assert_close(optimizer.state_dict(), bare.state_dict(), rtol=0, atol=0)


@pytest.fixture
def accelerator():
    """One that accumulates gradients, in a state that all of a process share."""
    accelerate = pytest.importorskip("accelerate")
    yield accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    for state in (accelerate.state.AcceleratorState, accelerate.state.GradientState, accelerate.state.PartialState):
        state._reset_state()


@pytest.mark.parametrize("wrap", [Lookahead, ProximalPoint])
def test_frameworks_wrap_it_and_not_the_other_way_round(wrap, accelerator):
    """Accelerate takes no step while gradients accumulate: its calls are no steps that can be counted."""
    model = cases.mlp()
    inside = momentum(model.parameters())
    with pytest.raises(TypeError, match=f"AcceleratedOptimizer may skip a step .*, which {wrap.__name__} would take"):
        wrap(accelerator.prepare(inside))
    optimizer = accelerator.prepare(wrap(momentum(model.parameters()), 2))
    for i in range(3):
        with accelerator.accumulate(model):
            accelerator.backward(cross_entropy(model(cases.batch(i)[0]), cases.batch(i)[1]).mean())
            optimizer.step()
    assert optimizer.state_dict()["lookahead"][0]["count"] == 1


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"k": 0}, ValueError, "k must be at least 1, got 0"),
        ({"k": 2.0}, TypeError, "k must be an int, got 2.0"),
        ({"alpha": 0.0}, ValueError, r"alpha must be in \(0, 1\], got 0.0"),
        ({"alpha": 1.5}, ValueError, r"alpha must be in \(0, 1\], got 1.5"),
        ({"alpha": float("nan")}, ValueError, "got nan"),
        ({"alpha": "half"}, TypeError, "alpha must be a number, got 'half'"),
        ({"optimizer": SGD}, TypeError, "Lookahead takes an optimizer"),
        ({"optimizer": [nn.Parameter(torch.zeros(1))]}, TypeError, "Lookahead takes an optimizer"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, words):
    with pytest.raises(error, match=words):
        Lookahead(**{"optimizer": SGD([nn.Parameter(torch.zeros(1))]), **arguments})
