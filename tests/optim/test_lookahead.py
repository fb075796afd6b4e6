"""Lookahead: the previewed step is the step, and the wrapper is an optimizer like any other."""

from __future__ import annotations

import copy
import io
import pickle
from functools import partial
from inspect import signature
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau, StepLR

from bisam import Lookahead, ModelOracle, ProximalPoint, Vector, cross_entropy, next_step
from tests.support import cases, references

# The previewed step.

SETTINGS = {
    "sgd": partial(SGD, lr=0.1),
    "momentum": partial(SGD, lr=0.1, momentum=0.9, weight_decay=5e-3),
    "dampening": partial(SGD, lr=0.1, momentum=0.9, dampening=0.4, weight_decay=5e-3, maximize=True),
    "nesterov": partial(SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-3, foreach=True),
    "adam": partial(Adam, lr=1e-2, weight_decay=0.1),
    "adam-maximize": partial(Adam, lr=1e-2, betas=(0.5, 0.9), eps=1e-3, weight_decay=0.1, maximize=True, foreach=True),
    "adam-fused": partial(Adam, lr=1e-2, fused=True),
    "adamw": partial(AdamW, lr=1e-2, weight_decay=0.1),
    "adamw-no-decay": partial(AdamW, lr=1e-2, betas=(0.0, 0.9), weight_decay=0.0, maximize=True),
    "amsgrad": partial(AdamW, lr=1e-2, betas=(0.9, 0.5), amsgrad=True, foreach=True),
    "sgd-tensor": partial(SGD, lr=torch.tensor(0.1, dtype=torch.double), momentum=0.9),
    "adamw-tensor": partial(AdamW, lr=torch.tensor(0.01, dtype=torch.double)),
}


def gradient(model: nn.Module, seed: int, missing: tuple[int, ...] = ()) -> Vector:
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in model.parameters()]
    return Vector([torch.zeros_like(g) if i in missing else g for i, g in enumerate(tensors)], frozenset(missing))


def step(optimizer: torch.optim.Optimizer, model: nn.Module, g: Vector) -> None:
    for i, (p, part) in enumerate(zip(model.parameters(), g, strict=True)):
        p.grad = None if i in g.holes else part.clone()
    optimizer.step()


def check_preview(optimizer: torch.optim.Optimizer, model: nn.Module, g: Vector, tolerance: float = 1e-12) -> Vector:
    before, state = references.flat(model), copy.deepcopy(optimizer.state_dict())
    e = next_step(optimizer)(g, ModelOracle(model, cross_entropy))
    assert torch.equal(references.flat(model), before)
    torch.testing.assert_close(optimizer.state_dict(), state, rtol=0, atol=0)
    step(optimizer, model, g)
    moved = torch.cat([part.reshape(-1) for part in e])
    torch.testing.assert_close(before + moved, references.flat(model), rtol=0, atol=tolerance)
    assert e.holes == g.holes
    return e


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_preview_is_the_step(setting):
    model = cases.mlp(nn.BatchNorm1d)
    optimizer = SETTINGS[setting](model.parameters())
    for i in range(4):  # the first without a state
        assert check_preview(optimizer, model, gradient(model, i)).norm() > 1e-3


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_parameter_without_gradient_is_skipped_and_lags_behind(setting):
    model = cases.mlp(nn.BatchNorm1d)
    optimizer = SETTINGS[setting](model.parameters())
    for i, missing in enumerate([(1, 2), (), (0, 2), (1, 2), (2,), ()]):
        e = check_preview(optimizer, model, gradient(model, i, missing))
        assert all(not e.tensors[j].any() for j in missing)


@pytest.mark.parametrize("setting", SETTINGS)
def test_groups_have_settings_of_their_own_and_what_is_in_none_stays(setting):
    model = cases.mlp(nn.BatchNorm1d)
    first, second, _, *rest = model.parameters()
    stranger = nn.Parameter(torch.zeros(3))
    optimizer = SETTINGS[setting]([{"params": rest, "weight_decay": 0.3}, {"params": [stranger, second, first]}])
    optimizer.param_groups[0]["lr"] = 0.03
    for i in range(3):
        e = check_preview(optimizer, model, gradient(model, i))
        assert [bool(part.any()) for part in e] == [True, True, False, True, True, True]


def test_the_preview_follows_schedules_and_loaded_states():
    model = cases.mlp()
    optimizer = SETTINGS["nesterov"](model.parameters())
    preview, schedule = next_step(optimizer), StepLR(optimizer, 1, 0.1)
    old = copy.deepcopy(optimizer.state_dict())
    e = [preview(gradient(model, 0), ModelOracle(model, cross_entropy)).norm()]
    step(optimizer, model, gradient(model, 1))
    schedule.step()
    e.append(preview(gradient(model, 0), ModelOracle(model, cross_entropy)).norm())
    optimizer.load_state_dict(old)
    check_preview(optimizer, model, gradient(model, 0))
    assert e[1] < 0.5 * e[0]


@pytest.mark.parametrize("setting", ["nesterov", "adam", "amsgrad"])
def test_complex_parameters(setting):
    model = nn.ParameterList([torch.randn(3, dtype=torch.cdouble), torch.randn(2, dtype=torch.double)])
    optimizer = SETTINGS[setting](model.parameters())
    for i in range(3):
        before = [p.detach().clone() for p in model]
        e = next_step(optimizer)(gradient(model, i), ModelOracle(model, cross_entropy))
        step(optimizer, model, gradient(model, i))
        torch.testing.assert_close([a + b for a, b in zip(before, e, strict=True)], list(model), rtol=0, atol=1e-12)


@pytest.mark.parametrize("setting", ["nesterov", "amsgrad"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_keeps_its_type(setting, dtype):
    model = nn.ParameterList([torch.randn(4, 3), torch.tensor(0.7)]).to(dtype)
    optimizer = SETTINGS[setting](model.parameters())
    for i in range(3):
        e = check_preview(optimizer, model, gradient(model, i), {torch.float32: 1e-6, torch.bfloat16: 3e-2}[dtype])
        assert {part.dtype for part in e} == {dtype}


@pytest.mark.parametrize("flag", ["capturable", "fused"])
@pytest.mark.parametrize("setting", ["nesterov", "amsgrad"])
def test_nothing_waits_for_a_device(setting, flag):
    model = nn.Linear(3, 2, device="meta")  # whose entries cannot be read
    optimizer = SETTINGS[setting](model.parameters())
    optimizer.param_groups[0].update({"lr": torch.empty(1, device="meta"), flag: True})
    weight = next(model.parameters())  # the bias has no state yet
    names = ("momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    optimizer.state[weight] = {name: torch.empty_like(weight) for name in names}
    optimizer.state[weight]["step"] = torch.empty((), device="meta")
    g = Vector([torch.empty_like(p) for p in model.parameters()])
    assert [e.shape for e in next_step(optimizer)(g, ModelOracle(model, cross_entropy))] == [(2, 3), (2,)]


@pytest.mark.skipif("decoupled_weight_decay" not in signature(Adam).parameters, reason="this torch has AdamW alone")
def test_adam_with_decoupled_weight_decay():
    model = cases.mlp()
    optimizer = Adam(model.parameters(), lr=1e-2, weight_decay=0.3, decoupled_weight_decay=True)
    for i in range(3):
        check_preview(optimizer, model, gradient(model, i))


def test_a_copy_previews_the_copied_model():
    model = cases.mlp()
    optimizer = SETTINGS["momentum"](model.parameters())
    step(optimizer, model, gradient(model, 0))
    expected = next_step(optimizer)(gradient(model, 1), ModelOracle(model, cross_entropy))
    pair = model, next_step(optimizer)
    copies = [copy.deepcopy(pair), pickle.loads(pickle.dumps(pair))]
    step(optimizer, model, gradient(model, 2))
    for twin, preview in copies:
        e = preview(gradient(twin, 1), ModelOracle(twin, cross_entropy))
        assert [cases.bits(a) for a in e] == [cases.bits(b) for b in expected]
        assert repr(preview) == "next_step(SGD)"


def test_what_lightning_and_accelerate_wrap_is_unwrapped():
    fabric = pytest.importorskip("lightning_fabric").Fabric(accelerator="cpu", devices=1)
    optimizer = SGD(cases.mlp().parameters(), lr=0.1)
    AcceleratedOptimizer = type("AcceleratedOptimizer", (torch.optim.Optimizer,), {"__init__": lambda self: None})
    accelerated = AcceleratedOptimizer()
    accelerated.optimizer = fabric.setup_optimizers(optimizer)
    assert next_step(accelerated) == next_step(optimizer)


class Mine(SGD):
    pass


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: torch.optim.RMSprop(p), "not of RMSprop: train with one of these"),
        (lambda p: Mine(p), "SGD, Adam and AdamW, not of Mine"),
        (lambda p: Lookahead(SGD(p)), "not of Lookahead"),
        (lambda p: SGD, "the optimizer of the training loop, got <class"),
        (lambda p: None, "the optimizer of the training loop, got None"),
        (lambda p: SimpleNamespace(optimizer=SGD(p)), "the optimizer of the training loop, got namespace"),
    ],
)
def test_an_optimizer_whose_step_is_not_known_is_refused(make, words):
    with pytest.raises(TypeError, match=words):
        next_step(make([nn.Parameter(torch.zeros(2))]))


def test_an_optimizer_of_another_model_is_refused():
    model = cases.mlp()
    preview = next_step(SGD(copy.deepcopy(model).parameters()))
    with pytest.raises(ValueError, match="the SGD holds none of the model's parameters"):
        preview(gradient(model, 0), ModelOracle(model, cross_entropy))


# The optimizer.


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
    bare = SETTINGS["momentum"](model.parameters())
    fit(bare, model, range(4))
    optimizer = Lookahead(SETTINGS["momentum"](model.parameters()), 3)
    fit(optimizer, model, range(2))
    optimizer.load_state_dict(bare.state_dict())
    assert optimizer.state_dict()["lookahead"] == [{"count": 0, "slow": {}}]
    torch.testing.assert_close(optimizer.state_dict()["state"], bare.state_dict()["state"], rtol=0, atol=0)
    bare.load_state_dict(optimizer.state_dict())


def test_a_state_of_other_parameters_is_refused_and_changes_nothing():
    model = cases.mlp()
    optimizer = Lookahead(SETTINGS["momentum"](model.parameters()), 3)
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
    inside = SETTINGS["momentum"](cases.mlp().parameters())
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
    bare = Lookahead(SETTINGS["momentum"](plain.parameters()), 3)
    fit(bare, plain, range(7))
    model, optimizer = fabric.setup(model, Lookahead(SETTINGS["momentum"](model.parameters()), 3))
    fit(optimizer, model, range(7))
    assert cases.bits(references.flat(model)) == cases.bits(references.flat(plain))
    torch.testing.assert_close(optimizer.state_dict(), bare.state_dict(), rtol=0, atol=0)


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
