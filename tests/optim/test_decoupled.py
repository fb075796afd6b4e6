"""Decoupled applies the sharpness term of WSAM outside of the optimizer, and treats it as `.grad` is treated."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import re
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adam, AdamW
from torch.optim.lr_scheduler import OneCycleLR

from bisam import (
    ERM,
    MSAM,
    WSAM,
    Decoupled,
    Every,
    Lookahead,
    ModelOracle,
    NegLog,
    ProximalPoint,
    SharpnessAware,
    Tilted,
    cross_entropy,
    momentum_of,
    next_step,
)
from tests.support import cases, references

RHO, GAMMA = 0.1, 0.8
WEIGHT = GAMMA / (1 - GAMMA)


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return cases.mlp()


def method(decouple: bool = True, **settings: Any) -> WSAM:
    return WSAM(RHO, gamma=GAMMA, decouple=decouple, **settings)


def loss_of(model: nn.Module, decouple: bool = True, **arguments: Any) -> SharpnessAware:
    return SharpnessAware(model, method(decouple), cross_entropy, **arguments)


def pair(model: nn.Module, name: str = "sgd", **settings: Any) -> tuple[Decoupled, SharpnessAware]:
    sharp = loss_of(model)
    return Decoupled(cases.OPTIMIZERS[name](model.parameters()), sharp, **settings), sharp


def fit(optimizer: Any, sharp: nn.Module, steps: range) -> None:
    for i in steps:
        optimizer.zero_grad()
        sharp(*cases.batch(i)).backward()
        optimizer.step()


def close(a: nn.Module, b: nn.Module, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(references.flat(a), references.flat(b), rtol=0, atol=tolerance)


# Against a twin by hand, and against WSAM in one piece.


def gradient(model: nn.Module, w: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    references.load(model, w)
    loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def sgd_by_hand(lr: float, momentum: float, weight_decay: float) -> Callable[[Tensor, Tensor, int], Tensor]:
    buffer: list[Tensor] = []

    def step(w: Tensor, g: Tensor, t: int) -> Tensor:
        g = g + weight_decay * w
        buffer[:] = [momentum * buffer[0] + g if buffer else g]
        return w - lr * buffer[0]

    return step


def adamw_by_hand(lr: float, weight_decay: float) -> Callable[[Tensor, Tensor, int], Tensor]:
    moments = [torch.zeros(()), torch.zeros(())]

    def step(w: Tensor, g: Tensor, t: int) -> Tensor:
        moments[:] = [0.9 * moments[0] + 0.1 * g, 0.999 * moments[1] + 0.001 * g**2]
        m, v = moments[0] / (1 - 0.9**t), moments[1] / (1 - 0.999**t)
        return w * (1 - lr * weight_decay) - lr * m / (v.sqrt() + 1e-8)

    return step


BY_HAND = {"sgd": (0.1, partial(sgd_by_hand, 0.1, 0.9, 5e-3)), "adamw": (1e-2, partial(adamw_by_hand, 1e-2, 1e-2))}


@pytest.mark.parametrize("name", BY_HAND)
def test_twenty_steps_are_those_of_a_twin_by_hand(name):
    model = mlp()
    twin, (lr, make) = copy.deepcopy(model), BY_HAND[name]
    step = make()
    optimizer, sharp = pair(model, name)
    w = references.flat(twin)
    for t in range(1, 21):
        fit(optimizer, sharp, range(t, t + 1))
        g = gradient(twin, w, cases.batch(t))
        h = gradient(twin, w + RHO * g / g.norm(), cases.batch(t))
        w = step(w, g, t) - lr * WEIGHT * (h - g)
        torch.testing.assert_close(references.flat(model), w, rtol=0, atol=1e-11)
    assert (w - references.flat(mlp())).norm() > 0.1


def test_with_momentum_it_is_not_coupled_wsam():
    model = mlp()
    twin = copy.deepcopy(model)
    fit(*pair(model), range(5))
    fit(cases.OPTIMIZERS["sgd"](twin.parameters()), loss_of(twin, decouple=False), range(5))
    assert (references.flat(model) - references.flat(twin)).norm() > 1e-2


def plain(model: nn.Module, **settings: Any) -> SGD:
    """SGD without momentum, with a learning rate for each tensor."""
    groups = [{"params": [p], "lr": 0.05 * (i + 1)} for i, p in enumerate(model.parameters())]
    return SGD(groups, **{"lr": 0.1, "weight_decay": 1e-2, **settings})


def one_call(optimizer: Any, sharp: nn.Module, i: int) -> None:
    optimizer.zero_grad()
    sharp(*cases.batch(i)).backward()
    optimizer.step()


def accumulated(optimizer: Any, sharp: nn.Module, i: int) -> None:
    optimizer.zero_grad()
    for k in range(3):
        (sharp(*cases.batch(3 * i + k)) / 3).backward()
    optimizer.step()


def in_one_backward(optimizer: Any, sharp: nn.Module, i: int) -> None:
    (sharp(*cases.batch(2 * i)) + 0.5 * sharp(*cases.batch(2 * i + 1))).backward()
    optimizer.step()
    optimizer.zero_grad()


def graph_kept(optimizer: Any, sharp: nn.Module, i: int) -> None:
    optimizer.zero_grad()
    loss = sharp(*cases.batch(i))
    loss.backward(retain_graph=True)
    (0.5 * loss).backward()
    optimizer.step()


def reset_by_the_model(optimizer: Any, sharp: nn.Module, i: int) -> None:
    """The gradient of a step that is left out is dropped by the model, before or after the next forward pass."""
    sharp(*cases.batch(100 + i)).backward()
    if i % 2:
        sharp.zero_grad()
    loss = sharp(*cases.batch(i))
    sharp.zero_grad()
    loss.backward()
    optimizer.step()


def set_to_zero(optimizer: Any, sharp: nn.Module, i: int) -> None:
    sharp(*cases.batch(100 + i)).backward()
    optimizer.zero_grad(set_to_none=False)
    sharp(*cases.batch(i)).backward()
    optimizer.step()


def with_closure(optimizer: Any, sharp: nn.Module, i: int) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = sharp(*cases.batch(i))
        loss.backward()
        return loss

    assert optimizer.step(closure) > 0


def without_some_gradients(optimizer: Any, sharp: nn.Module, i: int) -> None:
    optimizer.zero_grad()
    sharp(*cases.batch(i)).backward()
    next(sharp.parameters()).grad = None
    optimizer.step()


def skipped_and_set_to_zero(optimizer: Any, sharp: nn.Module, i: int) -> None:
    for factor in (float("inf"), 1.0):  # the first step is left out, as by a GradScaler or a loop that looks at it
        sharp.zero_grad(set_to_none=False)
        (factor * sharp(*cases.batch(i))).backward()
    optimizer.step()


def skipped_and_zeroed_by_hand(optimizer: Any, sharp: nn.Module, i: int) -> None:
    for k in (1, 0):
        for p in sharp.parameters():
            if p.grad is not None:
                p.grad.zero_()
        sharp(*cases.batch(2 * i + k)).backward()
    optimizer.step()


def skipped_before_a_plain_loss(optimizer: Any, sharp: nn.Module, i: int) -> None:
    optimizer.zero_grad()
    sharp(*cases.batch(2 * i)).backward()
    optimizer.step()
    for clear in (True, False):
        sharp.zero_grad()
        (float("inf") * sharp(*cases.batch(i))).backward()
        sharp.zero_grad(set_to_none=clear)
        x, y = cases.batch(2 * i + 1)
        cross_entropy(sharp.model(x), y).mean().backward()
        optimizer.step()


def accumulated_with_a_plain_loss(optimizer: Any, sharp: nn.Module, i: int) -> None:
    optimizer.zero_grad()
    sharp(*cases.batch(2 * i)).backward()
    x, y = cases.batch(2 * i + 1)
    cross_entropy(sharp.model(x), y).mean().backward()
    optimizer.step()


def of_some_parameters(optimizer: Any, sharp: nn.Module, i: int) -> None:
    optimizer.zero_grad()
    sharp(*cases.batch(2 * i)).backward()
    sharp(*cases.batch(2 * i + 1)).backward(inputs=[*sharp.parameters()][1:3])
    optimizer.step()


def with_other_memory(optimizer: Any, sharp: nn.Module, i: int) -> None:
    """The weights get another type, and so another node of the graph that stores their gradients."""
    optimizer.zero_grad()
    sharp(*cases.batch(2 * i)).backward()
    for p in sharp.parameters():
        p.grad = None
        p.data = p.data.float()
        p.data = p.data.double()
    for k in (0, 1):
        sharp(*cases.batch(2 * i + k)).backward()
    optimizer.step()


def after_a_failure(optimizer: Any, sharp: nn.Module, i: int) -> None:
    """A backward pass fails before autograd stores a gradient."""

    def fail(_: Tensor) -> None:
        raise KeyboardInterrupt

    optimizer.zero_grad()
    handles = [p.register_hook(fail) for p in sharp.parameters()]
    loss = sharp(*cases.batch(2 * i))
    with pytest.raises(KeyboardInterrupt):
        loss.backward()
    for handle in handles:
        handle.remove()
    x, y = cases.batch(2 * i + 1)
    cross_entropy(sharp.model(x), y).mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    for k, fails in enumerate((False, True, False)):
        handles = [p.register_hook(fail) for p in sharp.parameters() if fails]
        loss = sharp(*cases.batch(2 * i + k))
        with pytest.raises(KeyboardInterrupt) if fails else nullcontext():
            loss.backward()
        for handle in handles:
            handle.remove()
    optimizer.step()


LOOPS = (
    one_call,
    accumulated,
    in_one_backward,
    graph_kept,
    reset_by_the_model,
    set_to_zero,
    with_closure,
    without_some_gradients,
    skipped_and_set_to_zero,
    skipped_and_zeroed_by_hand,
    skipped_before_a_plain_loss,
    accumulated_with_a_plain_loss,
    of_some_parameters,
    with_other_memory,
    after_a_failure,
)


def same_as_coupled(loop: Callable[[Any, nn.Module, int], None], make=plain, wrap=lambda o: o, of=method) -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    sharp = SharpnessAware(model, of(True), cross_entropy)
    coupled = SharpnessAware(twin, of(False), cross_entropy)
    optimizer, bare = wrap(Decoupled(make(model), sharp)), wrap(make(twin))
    schedules = [
        OneCycleLR(o, [0.1] * len(o.param_groups), total_steps=20, cycle_momentum=False) for o in (optimizer, bare)
    ]
    for i in range(6):
        for one, loss, schedule in zip((optimizer, bare), (sharp, coupled), schedules, strict=True):
            loop(one, loss, i)
            schedule.step()
    close(model, twin)
    assert (references.flat(model) - references.flat(mlp())).norm() > 1e-2


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_with_plain_sgd_it_is_coupled_wsam(loop):
    same_as_coupled(loop)


OPTIMIZERS = {
    "maximize": partial(plain, maximize=True),
    "fused": partial(plain, fused=True),
    "a tensor as learning rate": lambda model: SGD(model.parameters(), lr=torch.tensor(0.1, dtype=torch.double)),
    "a tensor of one entry": lambda model: SGD(model.parameters(), lr=torch.tensor([0.1], dtype=torch.double)),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_of_any_kind_of_plain_sgd_too(make):
    same_as_coupled(one_call, make)


METHODS = {
    "another ascent objective": partial(method, ascent=NegLog()),
    "in micro-batches": lambda decouple: MSAM(3, method(decouple)),
    "at every second step": lambda decouple: Every(2, method(decouple), ERM()),
}


@pytest.mark.parametrize("of", METHODS.values(), ids=METHODS)
def test_inside_of_other_methods_too(of):
    same_as_coupled(one_call, of=of)


@pytest.mark.parametrize("wrap", [partial(Lookahead, k=3), ProximalPoint], ids=["Lookahead", "ProximalPoint"])
def test_other_wrappers_go_around_it(wrap):
    same_as_coupled(one_call, wrap=wrap)


def test_two_optimizers_apply_the_terms_of_their_parameters():
    model = mlp()
    twin = copy.deepcopy(model)
    sharp, coupled = loss_of(model), loss_of(twin, decouple=False)
    first, second = [*model.parameters()][:1], [*model.parameters()][1:]
    optimizers = [Decoupled(SGD(first, lr=0.1), sharp), Decoupled(SGD(second, lr=0.2), sharp)]
    bare = SGD([{"params": [p], "lr": 0.2 if i else 0.1} for i, p in enumerate(twin.parameters())])
    for i in range(4):
        sharp(*cases.batch(i)).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    fit(bare, coupled, range(4))
    close(model, twin)


# Scalers, clipping, and steps that are left out.


@pytest.mark.parametrize("unscaled", [False, True], ids=["by-step", "by-hand"])
def test_a_scaler_scales_the_term_too_and_skipped_steps_leave_nothing_behind(unscaled):
    model = mlp()
    twin = copy.deepcopy(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    sharp = loss_of(model, scaler=scaler)
    optimizer = Decoupled(cases.OPTIMIZERS["adamw"](model.parameters()), sharp)
    other, plain_loss = pair(twin, "adamw")
    for i in range(8):
        skipped = i in (2, 5)
        before = cases.parameters(model)
        if i % 2:
            optimizer.zero_grad()
        else:
            model.zero_grad()
        scaler.scale(sharp(*cases.batch(i)) * (float("inf") if skipped else 1.0)).backward()
        if unscaled:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert (cases.parameters(model) == before) == skipped
        if not skipped:
            fit(other, plain_loss, range(i, i + 1))
    assert scaler.get_scale() != 1024.0
    close(model, twin, 1e-10)


def test_a_factor_of_the_loss_is_one_of_the_term():
    model = mlp()
    w = references.flat(model)
    optimizer, sharp = Decoupled(SGD(model.parameters(), lr=1.0), loss := loss_of(model)), loss_of(mlp(), False)
    (0.25 * loss(*cases.batch())).backward()
    optimizer.step()
    sharp(*cases.batch()).backward()
    moved = torch.cat([p.grad.flatten() for p in sharp.parameters()])
    torch.testing.assert_close(references.flat(model), w - 0.25 * moved, rtol=0, atol=1e-12)


def parts() -> tuple[Tensor, Tensor, Tensor]:
    """The weights, the gradient at the weights and the term of the first step of `mlp`."""
    model = mlp()
    w = references.flat(model)
    g = gradient(model, w, cases.batch())
    return w, g, WEIGHT * (gradient(model, w + RHO * g / g.norm(), cases.batch()) - g)


@pytest.mark.parametrize("limit", [None, 0.01, 100.0])
def test_clipping_the_gradient_and_the_norm_of_the_term(limit):
    w, g, d = parts()
    model = mlp()
    sharp = loss_of(model)
    optimizer = Decoupled(SGD(model.parameters(), lr=1.0), sharp, max_norm=limit)
    sharp(*cases.batch()).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    short = d if limit is None else d * min(1.0, limit / d.norm().item())
    assert 0.01 < d.norm() < 100.0
    assert g.norm() > 0.1
    expected = w - g * (0.1 / (g.norm() + 1e-6)) - short
    torch.testing.assert_close(references.flat(model), expected, rtol=0, atol=1e-10)


def test_a_term_that_is_not_finite_makes_the_gradient_say_so():
    model = mlp()
    calls = []

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        calls.append(1)
        return cross_entropy(outputs, targets) * (float("inf") if len(calls) == 2 else 1.0)

    sharp = SharpnessAware(model, method(), loss)
    Decoupled(SGD(model.parameters(), lr=1.0), sharp)  # which is collected
    optimizer = Decoupled(SGD(model.parameters(), lr=1.0), sharp)
    sharp(*cases.batch()).backward()
    assert len(calls) == 2
    assert optimizer.param_groups
    assert all(p.grad.isnan().all() for p in model.parameters())


def test_a_step_that_fails_does_not_apply_the_term():
    model = mlp()
    before = cases.parameters(model)
    sharp = loss_of(model)
    optimizer = Decoupled(SGD(model.parameters(), lr=0.1), sharp)
    sharp(*cases.batch()).backward()

    def closure() -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert cases.parameters(model) == before


def test_a_term_is_applied_once():
    model = mlp()
    sharp = loss_of(model)
    optimizer = Decoupled(SGD(model.parameters(), lr=1.0), sharp)
    sharp(*cases.batch()).backward()
    optimizer.step()
    after, g = references.flat(model), torch.cat([p.grad.flatten() for p in model.parameters()])
    optimizer.step()
    torch.testing.assert_close(references.flat(model), after - g, rtol=0, atol=1e-12)


def test_a_gradient_that_is_not_stored_has_no_term():
    model = mlp()
    optimizer, sharp = pair(model)
    with pytest.raises(RuntimeError, match="call backward"):
        torch.autograd.grad(sharp(*cases.batch()), [*model.parameters()])
    before = cases.parameters(model)
    optimizer.step()
    assert cases.parameters(model) == before


def test_a_term_keeps_nothing_alive():
    optimizer, sharp = pair(mlp())
    sharp(*cases.batch()).backward()
    kept = [weakref.ref(each) for each in (optimizer, sharp, next(sharp.parameters()))]
    del optimizer, sharp
    gc.collect()
    assert [each() for each in kept] == [None] * 3


def test_a_stored_loss_keeps_no_term():
    model = mlp()
    optimizer, sharp = pair(model)
    loss = sharp(*cases.batch())
    loss.backward()
    optimizer.step()
    assert loss.grad_fn.decoupled._vector is None
    with pytest.raises(RuntimeError, match="retain_graph=True"):
        loss.backward()


# State, copies, and other libraries.


def through_a_file(optimizer: Decoupled, sharp: SharpnessAware, name: str) -> tuple[Decoupled, SharpnessAware]:
    file = io.BytesIO()
    torch.save({"sharp": sharp.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other, twin = pair(mlp(), name)
    twin.load_state_dict(saved["sharp"])
    other.load_state_dict(saved["optimizer"])
    return other, twin


COPIES = {
    "file": through_a_file,
    "deepcopy": lambda optimizer, sharp, name: copy.deepcopy((optimizer, sharp)),
    "pickle": lambda optimizer, sharp, name: pickle.loads(pickle.dumps((optimizer, sharp))),
}


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("name", cases.OPTIMIZERS)
def test_a_copy_goes_on_bit_for_bit(name, copied):
    optimizer, sharp = pair(mlp(), name)
    fit(optimizer, sharp, range(3))
    sharp(*cases.batch(9)).backward()  # a copy has no pending term, as it has no .grad
    other, twin = COPIES[copied](optimizer, sharp, name)
    fit(optimizer, sharp, range(3, 8))
    fit(other, twin, range(3, 8))
    assert cases.parameters(twin) == cases.parameters(sharp)
    assert {p.data_ptr() for p in twin.parameters()}.isdisjoint(p.data_ptr() for p in sharp.parameters())
    torch.testing.assert_close(other.state_dict(), optimizer.state_dict(), rtol=0, atol=0)


def test_states_of_bare_optimizers_are_interchangeable():
    optimizer, sharp = pair(mlp())
    fit(optimizer, sharp, range(3))
    bare = cases.OPTIMIZERS["sgd"](sharp.parameters())
    bare.load_state_dict(optimizer.state_dict())
    assert bare.state_dict().keys() == optimizer.state_dict().keys()
    other, _ = pair(sharp.model)
    other.load_state_dict(bare.state_dict())
    torch.testing.assert_close(other.state_dict(), optimizer.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("lost", ["none", "collected", "a copy of the loss", "a pickle of the loss"])
def test_a_term_that_no_optimizer_applies_is_an_error(lost):
    optimizer, sharp = pair(mlp())
    if lost == "none":
        sharp = loss_of(mlp())
    elif lost == "collected":
        del optimizer
        gc.collect()
    else:
        sharp = copy.deepcopy(sharp) if "copy" in lost else pickle.loads(pickle.dumps(sharp))
    before = cases.parameters(sharp)
    with pytest.raises(ValueError, match=re.escape("optimizer = Decoupled(optimizer, sharp)")):
        sharp(*cases.batch())
    with torch.no_grad():
        assert sharp(*cases.batch()) > 0
    assert cases.parameters(sharp) == before


def test_the_settings_are_those_of_the_optimizer_inside():
    model = mlp()
    inside = cases.OPTIMIZERS["adamw"](model.parameters())
    optimizer = Decoupled(inside, loss_of(model), max_norm=1.0)
    assert isinstance(optimizer, torch.optim.Optimizer)
    inside.load_state_dict(inside.state_dict())  # which makes new groups
    optimizer.param_groups[0]["lr"] = 7.0
    assert inside.param_groups[0]["lr"] == 7.0
    assert optimizer.state is inside.state
    assert optimizer.defaults is inside.defaults
    assert repr(optimizer) == f"Decoupled({inside!r}, max_norm=1.0)"


def test_its_next_step_and_momentum_are_those_of_the_optimizer_inside():
    model = mlp()
    optimizer, sharp = pair(model, "adamw")
    fit(optimizer, sharp, range(2))
    oracle = ModelOracle(model, cross_entropy)
    g = oracle.query(cases.batch()).gradient
    for of, arguments in ((next_step, (g, oracle)), (momentum_of, (oracle,))):
        for wrapped in (optimizer, Lookahead(optimizer, k=5)):
            ours, theirs = of(wrapped)(*arguments), of(optimizer.optimizer)(*arguments)
            torch.testing.assert_close(list(ours), list(theirs), rtol=0, atol=1e-15)


def test_in_fabric_and_accelerate():
    fabric = pytest.importorskip("lightning_fabric").Fabric(accelerator="cpu", devices=1)
    accelerator = pytest.importorskip("accelerate").Accelerator(cpu=True)
    runs = []
    for prepare in (None, fabric.setup_optimizers, accelerator.prepare):
        optimizer, sharp = pair(mlp(), "adamw")
        fit(optimizer if prepare is None else prepare(optimizer), sharp, range(4))
        runs.append(cases.parameters(sharp))
    assert runs[0] == runs[1] == runs[2]


@pytest.mark.filterwarnings("ignore")
def test_in_lightning(tmp_path):
    lightning = pytest.importorskip("lightning.pytorch")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.sharp = loss_of(mlp())

        def training_step(self, batch: Any, i: int) -> Tensor:
            return self.sharp(*batch)

        def configure_optimizers(self) -> Any:
            optimizer = Decoupled(cases.OPTIMIZERS["sgd"](self.sharp.parameters()), self.sharp)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]

    module = Module()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=1, default_root_dir=tmp_path, enable_model_summary=False, **quiet
    )
    trainer.fit(module, torch.utils.data.DataLoader([cases.batch(i) for i in range(4)], batch_size=None))
    optimizer, sharp = pair(mlp())
    fit(optimizer, sharp, range(4))
    assert cases.parameters(sharp) == cases.parameters(module.sharp)


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(1))]


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda sharp: Decoupled(SGD, sharp), TypeError, "Decoupled takes an optimizer"),
        (lambda sharp: Decoupled(SGD(parameters()), sharp.model), TypeError, "sharp must be the SharpnessAware loss"),
        (lambda sharp: Decoupled(Lookahead(SGD(parameters())), sharp), TypeError, r"write Lookahead\(Decoupled\("),
        (lambda sharp: Decoupled(ProximalPoint(Adam(parameters())), sharp), TypeError, r"ProximalPoint\(Decoupled\("),
        (lambda sharp: Decoupled(LBFGS(parameters()), sharp), TypeError, "several times"),
        (lambda sharp: Decoupled(SGD(parameters()), sharp, max_norm=0.0), ValueError, "max_norm must be positive"),
        (lambda sharp: Decoupled(SGD(parameters()), sharp, max_norm="1"), TypeError, "max_norm must be a number"),
        (
            lambda sharp: Decoupled(AdamW(parameters()), SharpnessAware(sharp.model, WSAM(0.1), cross_entropy)),
            ValueError,
            r"WSAM\(0.1\) has no term",
        ),
        (lambda sharp: Tilted(2, method()), ValueError, r"use WSAM\(..., decouple=False\)"),
        (lambda sharp: WSAM(0.1, decouple=1), TypeError, "decouple must be True or False, got 1"),
    ],
)
def test_bad_arguments_are_refused(make, error, words):
    with pytest.raises(error, match=words):
        make(loss_of(mlp()))


def test_frameworks_wrap_it_and_not_the_other_way_round():
    fabric = pytest.importorskip("lightning_fabric").Fabric(accelerator="cpu", devices=1)
    wrapped = fabric.setup_optimizers(SGD(parameters()))
    with pytest.raises(TypeError, match="give that to the framework"):
        Decoupled(wrapped, loss_of(mlp()))


def test_an_optimizer_without_learning_rate_is_refused():
    optimizer = SGD(parameters(), lr=0.1)
    del optimizer.param_groups[0]["lr"]
    with pytest.raises(ValueError, match=r"groups \[0\] of SGD have no 'lr'"):
        Decoupled(optimizer, loss_of(mlp()))
