"""The previewed step is the step that the optimizer takes, and previewing it changes nothing."""

from __future__ import annotations

import copy
import pickle
import random
import threading
from functools import partial
from inspect import signature
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn, optim
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import StepLR
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from bisam import (
    Lookahead,
    ModelOracle,
    MomentumSAM,
    SAMPa,
    SharpnessAware,
    Vector,
    cross_entropy,
    momentum_of,
    next_step,
)
from tests.support import cases, ranks, references
from tests.support.memory import Weights
from tests.support.replicas import network, sharded

# By a formula.

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


def test_an_optimizer_of_another_model_is_refused():
    model = cases.mlp()
    preview = next_step(SGD(copy.deepcopy(model).parameters()))
    with pytest.raises(ValueError, match="the SGD holds none of the model's parameters"):
        preview(gradient(model, 0), ModelOracle(model, cross_entropy))


# On copies.


class Mine(SGD):
    """A subclass that has a step of its own, and calls the one of its base class."""

    def __init__(self, params, **settings: Any) -> None:
        super().__init__(params, **settings)
        self.calls, self.factor = [0], 0.5

    @torch.no_grad()
    def step(self, closure=None):
        self.calls[0] += 1
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.mul_(self.factor / self.calls[0])  # in place
        super().step(closure)


class Renamed(Adam):
    pass


COPIED = {
    "adadelta": partial(optim.Adadelta, lr=0.5, weight_decay=0.1),
    "adadelta-foreach": partial(optim.Adadelta, lr=0.5, maximize=True, foreach=True),
    "adafactor": partial(optim.Adafactor, lr=0.1, weight_decay=0.1),
    "adagrad": partial(optim.Adagrad, lr=0.1, lr_decay=0.1, initial_accumulator_value=0.1),
    "adagrad-fused": partial(optim.Adagrad, lr=0.1, weight_decay=0.1, fused=True),
    "adamax": partial(optim.Adamax, lr=0.1, weight_decay=0.1),
    "adamax-foreach": partial(optim.Adamax, lr=torch.tensor(0.1), foreach=True),
    "asgd": partial(optim.ASGD, lr=0.1, t0=1.0, weight_decay=0.1),
    "nadam": partial(optim.NAdam, lr=0.1, weight_decay=0.1),
    "nadam-decoupled": partial(optim.NAdam, lr=0.1, weight_decay=0.1, decoupled_weight_decay=True, foreach=True),
    "radam": partial(optim.RAdam, lr=0.1, betas=(0.5, 0.6), weight_decay=0.1),
    "rmsprop": partial(optim.RMSprop, lr=0.01),
    "rmsprop-all": partial(optim.RMSprop, lr=0.01, momentum=0.9, centered=True, weight_decay=0.1, maximize=True),
    "rprop": partial(optim.Rprop, lr=0.1),
    "rprop-foreach": partial(optim.Rprop, lr=0.1, foreach=True),
    "subclass": partial(Mine, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "renamed": partial(Renamed, lr=0.1, amsgrad=True),
}
if hasattr(optim, "Muon"):
    COPIED["muon"] = partial(optim.Muon, lr=0.1, weight_decay=0.1)
BY_FORMULA, REFUSED = {"SGD", "Adam", "AdamW"}, {"LBFGS", "SparseAdam"}


def matrices() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8, bias=False), nn.Tanh(), nn.Linear(8, 4, bias=False)).double()


def model_for(name: str) -> nn.Sequential:
    return matrices() if name == "muon" else cases.mlp(nn.BatchNorm1d)


def preview(optimizer: Optimizer, model: nn.Module, g: Vector) -> Vector:
    return next_step(optimizer)(g, ModelOracle(model, cross_entropy))


def bits(state: Any) -> Any:
    """The state of an optimizer, with its tensors as bytes."""
    if isinstance(state, Tensor):
        return tuple(state.shape), state.dtype, cases.bits(state.detach())
    if isinstance(state, dict):
        return {key: bits(value) for key, value in state.items()}
    return [bits(value) for value in state] if isinstance(state, list | tuple) else state


def check_bits(optimizer: Any, model: nn.Module, g: Vector) -> Vector:
    """The previewed step is the difference that the optimizer then makes, and changes nothing before."""
    parameters = list(model.parameters())
    before, versions = [p.detach().clone() for p in parameters], [p._version for p in parameters]
    grads, given, state = [p.grad for p in parameters], cases.bits(torch.cat([t.reshape(-1) for t in g])), None
    state = bits(optimizer.state_dict())
    e = preview(optimizer, model, g)
    assert bits(optimizer.state_dict()) == state
    assert [p._version for p in parameters] == versions
    assert all(p.grad is grad for p, grad in zip(parameters, grads, strict=True))
    assert cases.bits(torch.cat([t.reshape(-1) for t in g])) == given
    step(optimizer, model, g)
    for w, p, part in zip(before, parameters, e, strict=True):
        assert bits(part) == bits(p.detach() - w)
    return e


def test_every_optimizer_of_torch_is_known():
    names = {n for n, v in vars(optim).items() if isinstance(v, type) and issubclass(v, Optimizer)} - {"Optimizer"}
    tested = {make.func.__name__ for make in COPIED.values()} & names
    assert names == tested | BY_FORMULA | REFUSED


@pytest.mark.parametrize("name", COPIED)
def test_a_step_on_copies_is_the_step_bit_for_bit(name):
    model = model_for(name)
    optimizer = COPIED[name](model.parameters())
    for i in range(5):
        assert check_bits(optimizer, model, gradient(model, i)).norm() > 1e-4


@pytest.mark.parametrize("name", COPIED)
def test_on_copies_a_parameter_without_gradient_is_skipped(name):
    model = model_for(name)
    last = len(list(model.parameters())) - 1
    optimizer = COPIED[name](model.parameters())
    for i, missing in enumerate([(1,), (), (0,), (last,), ()]):
        e = check_bits(optimizer, model, gradient(model, i, missing))
        assert e.holes == {*missing}
        assert not any(e.tensors[j].any() for j in missing)


@pytest.mark.parametrize("name", COPIED)
def test_on_copies_groups_have_their_own_settings(name):
    model = model_for(name)
    first, *rest = model.parameters()
    optimizer = COPIED[name]([{"params": rest, "lr": 0.03}, {"params": [first]}])
    for i in range(3):
        check_bits(optimizer, model, gradient(model, i))


@pytest.mark.parametrize("name", ["adadelta", "adagrad", "adamax", "nadam", "radam", "rmsprop-all", "rprop", "asgd"])
def test_on_copies_of_complex_parameters(name):
    model = nn.ParameterList([torch.randn(3, dtype=torch.cdouble), torch.randn(2, dtype=torch.double)])
    optimizer = COPIED[name](model.parameters())
    for i in range(3):
        check_bits(optimizer, model, gradient(model, i))


@pytest.mark.parametrize("name", ["adafactor", "adagrad", "rmsprop"])
def test_on_copies_of_bfloat16(name):
    model = nn.ParameterList([torch.randn(4, 3), torch.randn(3)]).bfloat16()
    optimizer = COPIED[name](model.parameters())
    for i in range(3):
        assert {part.dtype for part in check_bits(optimizer, model, gradient(model, i))} == {torch.bfloat16}


def test_copies_of_sgd_and_adam_agree_with_the_formulas():
    for name, make in SETTINGS.items():
        twin = type(make.func.__name__, (make.func,), {})  # a subclass has no formula
        model = cases.mlp()
        optimizer, other = make(model.parameters()), partial(twin, **make.keywords)(model.parameters())
        for i in range(3):
            e, on_copies = preview(optimizer, model, gradient(model, i)), preview(other, model, gradient(model, i))
            torch.testing.assert_close(list(e), list(on_copies), rtol=0, atol=1e-12, msg=name)
            step(optimizer, model, gradient(model, i))
            other.load_state_dict(optimizer.state_dict())


PEERS = {
    "Lion": {"lr": 0.01, "weight_decay": 0.1},
    "Muon": {"lr": 0.01},
    "SOAP": {"lr": 0.01},
    "Prodigy": {"lr": 1.0},
    "ScheduleFreeRAdam": {"lr": 0.1},
    "Lamb": {"lr": 0.01},
    "AdEMAMix": {"lr": 0.01},
    "Adan": {"lr": 0.01},
    "Ranger21": {"lr": 0.01, "num_iterations": 20},
}


@pytest.mark.parametrize("name", PEERS)
def test_optimizers_of_another_package(name):
    peers = pytest.importorskip("pytorch_optimizer")
    model = matrices()
    groups = [{"params": [*model.parameters()], **({"use_muon": True} if name == "Muon" else {})}]
    optimizer = getattr(peers, name)(groups, **PEERS[name])
    getattr(optimizer, "train", int)()
    for i in range(4):
        attributes = {key: bits(value) for key, value in vars(optimizer).items() if isinstance(value, int | float)}
        check_bits(optimizer, model, gradient(model, i))
        assert attributes.keys() <= vars(optimizer).keys()


def test_the_lookahead_of_another_package():
    peers = pytest.importorskip("pytorch_optimizer")
    model = matrices()
    optimizer = peers.Lookahead(peers.Lion(model.parameters(), lr=0.01), k=3, alpha=0.5)
    for i in range(7):
        check_bits(optimizer, model, gradient(model, i))


@pytest.mark.parametrize("name", ["SGDScheduleFree", "AdamWScheduleFree", "RAdamScheduleFree"])
@pytest.mark.parametrize("foreach", [False, True])
def test_schedule_free(name, foreach):
    kind = getattr(pytest.importorskip("schedulefree"), name)
    model = cases.mlp()
    settings = {} if name == "RAdamScheduleFree" else {"warmup_steps": 3}
    optimizer = kind(model.parameters(), lr=0.1, weight_decay=0.1, foreach=foreach, **settings)
    with pytest.raises(Exception, match="not in train mode") as error:
        preview(optimizer, model, gradient(model, 0))
    assert error.value.__notes__ == [f"next_step has taken a step of {name} on copies, to know it in advance"]
    optimizer.train()
    for i in range(5):
        check_bits(optimizer, model, gradient(model, i))


def test_a_wrapper_that_is_no_optimizer():
    schedulefree = pytest.importorskip("schedulefree")
    model = cases.mlp()
    optimizer = schedulefree.ScheduleFreeWrapper(Mine(model.parameters(), lr=0.01), momentum=0.9)
    optimizer.train()
    for i in range(5):
        check_bits(optimizer, model, gradient(model, i))


# What is left as it was.


class Noisy(Optimizer):
    """Draws from all generators, has one of its own, and keeps a state by identity."""

    def __init__(self, params) -> None:
        super().__init__(params, {"lr": 0.1})
        self.own, self.by_id, self.stop = torch.Generator().manual_seed(3), {}, False

    @torch.no_grad()
    def step(self) -> None:
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                noise = torch.rand_like(p) + torch.rand(p.shape, generator=self.own, dtype=p.dtype)
                kept = self.by_id[id(p)] = self.by_id.get(id(p), 0) + 1
                drawn = random.random() + np.random.random()  # noqa: NPY002
                p.sub_(p.grad * noise * drawn * kept)
                if self.stop:
                    raise KeyboardInterrupt


def generators() -> list[Any]:
    return [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]  # noqa: NPY002


def test_random_generators_are_left_as_they_were():
    model = cases.mlp()
    optimizer = Noisy(model.parameters())
    for i in range(3):
        before, own = generators(), optimizer.own.get_state().tolist()
        preview(optimizer, model, gradient(model, i))
        assert generators() == before
        assert optimizer.own.get_state().tolist() == own
        check_bits(optimizer, model, gradient(model, i))
        assert generators() != before
        assert optimizer.own.get_state().tolist() != own


def test_an_interrupted_preview_leaves_everything_as_it_was():
    model = cases.mlp()
    optimizer, calls = Noisy(model.parameters()), []
    step(optimizer, model, gradient(model, 0))
    optimizer.stop = True
    before = generators(), cases.parameters(model), dict(optimizer.by_id), bits(optimizer.state_dict())
    hook = register_optimizer_step_pre_hook(lambda *_: calls.append("global"))
    with pytest.raises(KeyboardInterrupt):
        preview(optimizer, model, gradient(model, 1))
    assert (generators(), cases.parameters(model), optimizer.by_id, bits(optimizer.state_dict())) == before
    optimizer.stop = False
    assert calls == []
    step(optimizer, model, gradient(model, 1))
    assert calls == ["global"]
    hook.remove()


@pytest.mark.parametrize("name", ["rmsprop", "subclass"])
def test_hooks_do_not_run(name):
    model, calls = cases.mlp(), []
    optimizer = COPIED[name](model.parameters())
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    hooks = [
        register_optimizer_step_pre_hook(lambda *_: calls.append("before all")),
        register_optimizer_step_post_hook(lambda *_: calls.append("after all")),
    ]
    try:
        preview(optimizer, model, gradient(model, 0))
        assert calls == []
        step(optimizer, model, gradient(model, 0))
        assert {*calls} == {"before", "after", "before all", "after all"}
    finally:
        for hook in hooks:
            hook.remove()


def test_a_step_that_a_scheduler_counts_is_not_counted():
    model = cases.mlp()
    optimizer = COPIED["rmsprop"](model.parameters())
    schedule = StepLR(optimizer, 1, 0.1)  # it sets a method `step` on the optimizer, which notes that it was called
    before = {name: value for name, value in vars(optimizer).items() if isinstance(value, int)}
    preview(optimizer, model, gradient(model, 0))
    assert {name: value for name, value in vars(optimizer).items() if isinstance(value, int)} == before
    e = [check_bits(optimizer, model, gradient(model, 0)).norm()]
    schedule.step()
    e.append(check_bits(optimizer, model, gradient(model, 0)).norm())
    assert e[1] < 0.5 * e[0]


class DecaysAll(Optimizer):
    """Moves parameters without a gradient too."""

    def __init__(self, params) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self) -> None:
        for p in self.param_groups[0]["params"]:
            p.mul_(0.9)


def test_what_moves_without_a_gradient_is_no_hole():
    model = cases.mlp()
    e = check_bits(DecaysAll(model.parameters()), model, gradient(model, 0, missing=(1, 2)))
    assert e.holes == frozenset()
    assert all(part.any() for part in e)


def test_parameters_that_are_not_in_the_model_take_no_memory_and_stay():
    memory = Weights(500 * 500)
    with memory:
        model, stranger = cases.mlp(), nn.Parameter(torch.ones(500, 500))
        optimizer = COPIED["rmsprop"]([stranger, *model.parameters()])
        stranger.grad = torch.ones(500, 500)
        step(optimizer, model, gradient(model, 0))
        before = len(memory.born)
        assert len(preview(optimizer, model, gradient(model, 1))) == 4
        assert len(memory.born) == before > 0
    stranger.grad = None
    check_bits(optimizer, model, gradient(model, 1))
    with pytest.raises(RuntimeError, match="single memory location"):
        preview(DecaysAll([stranger, *model.parameters()]), model, gradient(model, 0))


class Watched(optim.RMSprop):
    held: list[float]  # of the class: attributes of the optimizer are copied
    memory: Weights

    @torch.no_grad()
    def step(self, closure=None) -> None:
        self.held.append(self.memory.held())
        super().step(closure)


def test_the_memory_of_the_copies_is_what_the_docstring_says():
    n = 300
    memory = Watched.memory = Weights(n * n)
    with memory:
        model = nn.Linear(n, n, bias=False)
        optimizer, g = Watched(model.parameters(), momentum=0.9), Vector([torch.ones(n, n)])
        Watched.held = []
        step(optimizer, model, g)
        before = memory.held()
        e = preview(optimizer, model, g)
        assert memory.held() - before == pytest.approx(1)  # the displacement
    assert Watched.held[1] - before == pytest.approx(1 + 1 + 2)  # weights, gradient, and two tensors of state
    assert e.norm() > 0


# Around other optimizers.


@pytest.mark.parametrize("inside", ["rmsprop", "sgd"])
@pytest.mark.parametrize("wrapped", [1, 2])
def test_the_next_step_of_lookahead_pulls_every_k_th_time(inside, wrapped):
    model, stranger = cases.mlp(), nn.Parameter(torch.ones(3))
    optimizer: Any = {**COPIED, **SETTINGS}[inside]([stranger, *model.parameters()])
    for k in (3, 2)[:wrapped]:
        optimizer = Lookahead(optimizer, k, 0.3)
    for i, missing in enumerate([(), (1,), (), (0, 2), (), (1,), ()]):
        before, state = references.flat(model), bits(optimizer.state_dict())
        e = preview(optimizer, model, gradient(model, i, missing))
        assert bits(optimizer.state_dict()) == state
        step(optimizer, model, gradient(model, i, missing))
        moved = torch.cat([part.reshape(-1) for part in e])
        torch.testing.assert_close(before + moved, references.flat(model), rtol=0, atol=1e-12)
        assert e.holes <= {*missing}
        if (i + 1) % 3:
            assert wrapped == 2 or e.holes == {*missing}


def test_lookahead_sees_weights_that_were_changed_since_its_last_pull():
    model = cases.mlp()
    optimizer = Lookahead(COPIED["rmsprop"](model.parameters()), 1, 0.5)
    step(optimizer, model, gradient(model, 0))
    with torch.no_grad():
        next(model.parameters()).fill_(3.0)
    before, e = references.flat(model), preview(optimizer, model, gradient(model, 1))
    step(optimizer, model, gradient(model, 1))
    moved = torch.cat([part.reshape(-1) for part in e])
    torch.testing.assert_close(before + moved, references.flat(model), rtol=0, atol=1e-12)


def test_a_subclass_of_lookahead_is_copied():
    model = cases.mlp()
    optimizer = type("Ours", (Lookahead,), {})(COPIED["rmsprop"](model.parameters()), 2, 0.5)
    for i in range(5):
        check_bits(optimizer, model, gradient(model, i))


def test_what_accelerate_wraps():
    accelerate = pytest.importorskip("accelerate")
    model = cases.mlp()
    bare = COPIED["rmsprop"](model.parameters())
    optimizer = accelerate.Accelerator(cpu=True).prepare(bare)
    assert optimizer is not bare
    for i in range(3):
        before = [p.detach().clone() for p in model.parameters()]
        e = preview(optimizer, model, gradient(model, i))
        step(optimizer, model, gradient(model, i))
        assert [bits(part) for part in e] == [
            bits(p.detach() - w) for p, w in zip(model.parameters(), before, strict=True)
        ]


def test_two_optimizers_of_one_model_are_added():
    model = cases.mlp()
    weights, biases = ([p for p in model.parameters() if p.dim() == d] for d in (2, 1))
    one, other = COPIED["adafactor"](weights), SETTINGS["adamw"](biases)
    g, oracle = gradient(model, 0), ModelOracle(model, cross_entropy)
    e = next_step(one)(g, oracle) + next_step(other)(g, oracle)
    before = references.flat(model)
    for i, p in enumerate(model.parameters()):
        p.grad = g.tensors[i].clone()
    one.step()
    other.step()
    moved = torch.cat([part.reshape(-1) for part in e])
    torch.testing.assert_close(before + moved, references.flat(model), rtol=0, atol=1e-12)


def test_sampa_with_another_optimizer_looks_where_it_will_go():
    """SAMPa-1 with a constant direction: its gradient is the one at the end of the previous step."""
    model = cases.mlp()
    optimizer = COPIED["rmsprop"](model.parameters())
    sharp = SharpnessAware(model, SAMPa(0.1, ahead=next_step(optimizer), lam=1.0), cross_entropy)
    (x, y), previous = cases.batch(0), list[Tensor]()
    for i in range(4):
        optimizer.zero_grad()
        twin, later = copy.deepcopy((model, optimizer))
        sharp(x, y).backward()
        if i:
            for p, grad in zip(twin.parameters(), previous, strict=True):
                p.grad = grad
            later.step()
            later.zero_grad()
            cross_entropy(twin(x), y).mean().backward()
            for p, q in zip(model.parameters(), twin.parameters(), strict=True):
                torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=1e-12)
        previous = [p.grad.clone() for p in model.parameters()]
        optimizer.step()


# Refusals.


def refusing(name: str) -> Optimizer:
    optimizer = COPIED["rmsprop"]([nn.Parameter(torch.zeros(2))])
    setattr(optimizer, name, threading.Lock())
    return optimizer


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: optim.LBFGS(p), "that of LBFGS needs closure: use another optimizer, or write the displacement"),
        (lambda p: Lookahead(optim.LBFGS(p)), "that of LBFGS needs closure"),
        (lambda p: optim.SparseAdam(p), "no sparse gradients, and SparseAdam needs them: use another optimizer"),
        (lambda p: SGD, "the optimizer of the training loop, got <class"),
        (lambda p: None, "the optimizer of the training loop, got None"),
        (lambda p: nn.Linear(1, 1), "the optimizer of the training loop, got Linear"),
        (lambda p: SimpleNamespace(optimizer=SGD(p)), "the optimizer of the training loop, got namespace"),
    ],
)
def test_an_optimizer_whose_step_cannot_be_known_is_refused(make, words):
    with pytest.raises(TypeError, match=words):
        next_step(make([nn.Parameter(torch.zeros(2))]))


def test_an_attribute_that_cannot_be_copied_is_named():
    model = cases.mlp()
    optimizer = COPIED["rmsprop"](model.parameters())
    optimizer.lock = threading.Lock()
    with pytest.raises(TypeError, match=r"copy of the RMSprop, whose attribute 'lock' cannot be copied \(.*lock"):
        preview(optimizer, model, gradient(model, 0))


# Sharded.


class Grouped(optim.RMSprop):
    """Has what a distributed optimizer has."""

    def __init__(self, params, mesh: Any, **settings: Any) -> None:
        super().__init__(params, **settings)
        self.mesh, self.group = mesh, mesh.get_group()


def on_shards(name: str) -> list[str]:
    model = sharded(network())
    mesh = next(model.parameters()).device_mesh
    make = {"grouped": partial(Grouped, mesh=mesh, lr=0.01, momentum=0.9)}.get(name) or {**COPIED, **SETTINGS}[name]
    # torch has no strategy for a Muon step on a matrix of one row.
    parameters = [p for p in model.parameters() if name != "muon" or (p.dim() == 2 and min(p.shape) > 1)]
    optimizer, wrong = make(parameters), []
    for i in range(3):
        generator = torch.Generator().manual_seed(i)
        whole = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in model.parameters()]
        oracle = ModelOracle(model, cross_entropy)
        g = oracle.weights.part(Vector(whole))
        state = bits([t.to_local() for t in tensors(optimizer)])
        e = next_step(optimizer)(g, oracle)
        if bits([t.to_local() for t in tensors(optimizer)]) != state:
            wrong.append(f"step {i}: the state has changed")
        before = [p.to_local().clone() for p in model.parameters()]
        for j, (p, part) in enumerate(zip(model.parameters(), g, strict=True)):
            p.grad = oracle.weights.layout.wrapped(j, part.clone())
        optimizer.step()
        for w, p, part in zip(before, model.parameters(), e, strict=True):
            exact = name in COPIED or name == "grouped"
            moved = p.to_local().detach() - w
            if not (bits(part) == bits(moved) if exact else torch.allclose(part, moved, rtol=0, atol=1e-12)):
                wrong.append(f"step {i}: {(part - moved).abs().max()}")
    return wrong


def tensors(optimizer: Optimizer) -> list[Any]:
    return [t for state in optimizer.state.values() for t in state.values() if hasattr(t, "to_local")]


def several_on_shards(names: list[str]) -> dict[str, list[str]]:
    return {name: wrong for name in names if (wrong := on_shards(name))}


def test_under_fsdp2_the_copies_are_sharded_as_the_weights_are():
    names = ["rmsprop-all", "adagrad", "nadam", "grouped", "adam", *(["muon"] if "muon" in COPIED else [])]
    assert ranks.run(2, several_on_shards, names) == [{}, {}]


# The momentum of an optimizer.


def test_a_momentum_is_that_of_the_optimizer():
    sgd = partial(SGD, lr=0.1, momentum=0.9)
    for key, make in (
        ("momentum_buffer", sgd),
        ("momentum_buffer", lambda p: Lookahead(sgd(p), k=2)),
        ("exp_avg", AdamW),
    ):
        model = cases.mlp()
        optimizer = make(list(model.parameters())[:-1])
        oracle, read = ModelOracle(model, cross_entropy), momentum_of(optimizer)
        assert read(oracle) is None
        assert not optimizer.state
        cross_entropy(model(cases.batch()[0]), cases.batch()[1]).mean().backward()
        optimizer.step()
        v = read(oracle)
        assert v.holes == {3}
        held = optimizer.param_groups[0]["params"]
        assert [cases.bits(t) for t in v.tensors[:-1]] == [cases.bits(optimizer.state[p][key]) for p in held]


@pytest.mark.parametrize("make", [partial(SGD, lr=0.1), optim.Adagrad])
def test_an_optimizer_without_momentum_is_refused(make):
    model = cases.mlp()
    optimizer = make(model.parameters())
    sharp = SharpnessAware(model, MomentumSAM(buffer=momentum_of(optimizer)), cross_entropy)
    with pytest.raises(ValueError, match=r"keeps no momentum .* MomentumSAM\(momentum=...\)"):
        sharp(*cases.batch())


def test_the_momentum_of_an_optimizer_of_another_model_is_refused():
    optimizer = SGD(cases.mlp().parameters(), lr=0.1, momentum=0.9)
    sharp = SharpnessAware(cases.mlp(), MomentumSAM(buffer=momentum_of(optimizer)), cross_entropy)
    with pytest.raises(ValueError, match=r"SGD holds none of the model's parameters.* momentum_of"):
        sharp(*cases.batch())


def test_the_momentum_of_what_is_no_optimizer_is_refused():
    with pytest.raises(TypeError, match=r"momentum_of takes the optimizer .* got 3"):
        momentum_of(3)
