"""ModelOracle and SharpnessAware: what a step leaves behind, and that it is a loss like any other."""

from __future__ import annotations

import copy
import io
import pickle
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bisam import (
    ASAM,
    ERM,
    ESAM,
    FSAM,
    KSAM,
    MSAM,
    SAM,
    SAMON,
    BiSAM,
    Evaluation,
    FunctionalSAM,
    ModelOracle,
    SharpnessAware,
    Vector,
    cross_entropy,
    vector,
)
from bisam.perturbations import L2
from tests.support import cases
from tests.support.cases import bits, buffers, everything, gradients, parameters

METHODS = [SAM(L2(0.5)), BiSAM(0.5), ASAM(0.5), MSAM(3, SAM(L2(0.5)))]
each_method = pytest.mark.parametrize("method", METHODS, ids=["SAM", "BiSAM", "ASAM", "MSAM"])


def normed() -> nn.Sequential:
    return cases.mlp(nn.BatchNorm1d)


def with_gradients(model: nn.Module) -> nn.Module:
    """As in the middle of accumulation: `.grad` is not empty."""
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    return model


def at_call(k: int, action):
    """A hook that acts on the k-th call."""
    calls = iter(range(1, 100))
    return lambda *_: action() if next(calls) == k else None


def throw(error: BaseException):
    def action() -> None:
        raise error

    return action


class Loss:
    """Cross-entropy that runs `action` in its k-th call."""

    def __init__(self, k: int = 0, action=lambda losses: losses) -> None:
        self.k, self.action, self.calls = k, action, 0

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.calls += 1
        losses = cross_entropy(outputs, targets)
        return self.action(losses) if self.calls == self.k else losses


def failing(objective, check):
    def call(outputs: Tensor, targets: Tensor) -> Tensor:
        check()
        return objective(outputs, targets)

    return call


# Exact restore.


@each_method
@pytest.mark.parametrize("model", cases.MODELS)
def test_a_call_changes_no_weight_and_no_gradient(model, method):
    model = with_gradients(cases.MODELS[model]())
    weights, _, grads, addresses = everything(model)
    SharpnessAware(model, method, cross_entropy)(*cases.batch())
    after = everything(model)
    assert (after[0], after[2], after[3]) == (weights, grads, addresses)


def test_a_call_fills_no_gradient():
    model = cases.mlp()
    SharpnessAware(model, SAM(), cross_entropy)(*cases.batch())
    assert set(gradients(model).values()) == {None}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["forward", "loss"])
@pytest.mark.parametrize(
    ("query", "method"),
    [(q, m) for m in METHODS for q in (1, 2, 4) if q < 3 or isinstance(m, MSAM)],
    ids=str,
)
def test_a_call_that_fails_leaves_nothing(query, method, where, error):
    model, calls = with_gradients(normed()), at_call(query, throw(error("boom")))
    if where == "forward":
        model[2].register_forward_hook(calls)  # after the norm has moved
        sharp = SharpnessAware(model, method, cross_entropy)
    else:
        objective = failing(cross_entropy, calls)
        ascent = getattr(method, "ascent", None)
        method = replace(method, ascent=failing(ascent, calls)) if ascent else method
        sharp = SharpnessAware(model, method, objective)
    before = everything(model)
    with pytest.raises(error, match="boom"):
        sharp(*cases.batch())
    assert everything(model) == before
    assert sharp.get_extra_state()["step"] == 0
    sharp(*cases.batch())  # and the next one succeeds
    assert sharp.get_extra_state()["step"] == 1


@pytest.mark.parametrize("where", ["backward", "perturbation", "method"])
def test_a_call_that_fails_elsewhere_leaves_nothing(where):
    model = with_gradients(normed())
    if where == "backward":
        act = at_call(2, throw(RuntimeError("boom")))
        model.register_forward_hook(lambda m, x, out: out.register_hook(act) and None)
        method = SAM()
    elif where == "perturbation":
        method = SAM(lambda g, oracle: throw(RuntimeError("boom"))())
    else:

        def method(oracle, batch):
            SAM()(oracle, batch)
            raise RuntimeError("boom")

    before = everything(model)
    with pytest.raises(RuntimeError, match="boom"):
        SharpnessAware(model, method, cross_entropy)(*cases.batch())
    assert everything(model) == before


def test_a_failed_step_does_not_count_for_the_method():
    def method(oracle, batch):
        oracle.state["n"] = oracle.state.get("n", 0) + 1
        return SAM()(oracle, batch)

    sharp = SharpnessAware(cases.mlp(), method, Loss(2, lambda losses: throw(RuntimeError("boom"))()))
    with pytest.raises(RuntimeError, match="boom"):
        sharp(*cases.batch())
    sharp(*cases.batch())
    state = sharp.get_extra_state()
    assert (state["step"], state["state"]) == (1, {"n": 1})


@pytest.mark.parametrize("displaced", [False, True])
def test_a_query_that_fails_leaves_nothing(displaced):
    """Also outside a step, where nobody rolls back."""
    model = with_gradients(normed())
    oracle, before = ModelOracle(model, failing(cross_entropy, throw(RuntimeError("boom")))), everything(model)
    with pytest.raises(RuntimeError, match="boom"):
        oracle.query(cases.batch(), at=oracle.weights * 0.1 if displaced else None, track=True)
    assert everything(model) == before


@each_method
@pytest.mark.parametrize("query", [1, 2])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_leaves_the_weights(method, query, value):
    model, calls = cases.mlp(), iter(range(1, 100))
    before = everything(model)
    model.register_forward_hook(lambda m, x, out: out * value if next(calls) == query else out)
    answers = []
    SharpnessAware(model, lambda o, b: answers.append(method(o, b)) or answers[0], cross_entropy)(*cases.batch())
    assert not answers[0].gradient.norm().isfinite()
    assert everything(model) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_hundred_steps_of_length_zero_move_no_weight(dtype):
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 4)).to(dtype)
    sharp = SharpnessAware(model, SAM(L2(0.5)), cross_entropy)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    before = parameters(model)
    x, y = cases.batch()
    for step in range(200):
        expected = step == 0 and dtype == torch.bfloat16
        with pytest.warns(UserWarning, match="bfloat16 parameters") if expected else nullcontext():
            loss = sharp(x.to(dtype), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert parameters(model) == before


def test_flat_views_of_the_weights_stay_views():
    model = cases.mlp()
    flat = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    torch.nn.utils.vector_to_parameters(flat, model.parameters())  # each parameter is a view of flat now
    before = bits(flat), everything(model)
    loss = SharpnessAware(model, SAM(), cross_entropy)(*cases.batch())
    assert (bits(flat), everything(model)) == before
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert torch.equal(flat, torch.nn.utils.parameters_to_vector(model.parameters()))
    assert bits(flat) != before[0]


# Buffers move once per step, in the clean pass.


class Replacing(nn.Module):
    """Running statistics that are a new tensor each time."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4).double()
        self.register_buffer("average", torch.zeros(4).double())

    def forward(self, x: Tensor) -> Tensor:
        out = self.linear(x)
        self.average = 0.9 * self.average + 0.1 * out.detach().mean(0)
        return out


class Instance(nn.InstanceNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[:, :, None].expand(-1, -1, 3) * torch.arange(3).double()).sum(2)


STATEFUL = {
    "BatchNorm": normed,
    "BatchNorm(momentum=None)": lambda: cases.mlp(lambda n: nn.BatchNorm1d(n, momentum=None)),
    "BatchNorm.eval()": lambda: cases.mlp(lambda n: nn.BatchNorm1d(n).eval()),
    "BatchNorm, another in eval()": lambda: nn.Sequential(nn.BatchNorm1d(6).double().eval(), *normed()),
    "InstanceNorm": lambda: cases.mlp(lambda n: Instance(n, track_running_stats=True)),
    "convnet": cases.convnet,
    "spectral_norm": lambda: nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Linear(6, 5).double()), nn.Linear(5, 4).double()
    ),
    "old spectral_norm": lambda: nn.Sequential(
        nn.utils.spectral_norm(nn.Linear(6, 5).double()), nn.Linear(5, 4).double()
    ),
    "replaced by assignment": Replacing,
}


def pair(make) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(3)
    first = make()
    torch.manual_seed(3)
    return first, make()


@pytest.mark.parametrize("method", METHODS[:3], ids=["SAM", "BiSAM", "ASAM"])
@pytest.mark.parametrize("make", STATEFUL.values(), ids=STATEFUL)
def test_buffers_are_those_of_a_plain_loop(make, method):
    model, plain = pair(make)
    sharp = SharpnessAware(model, method, cross_entropy)
    start = buffers(model)
    for step in range(3):
        sharp(*cases.batch(step))
        plain(cases.batch(step)[0])
        assert buffers(model) == buffers(plain)
    assert (buffers(model) != start) == (make is not STATEFUL["BatchNorm.eval()"])
    assert parameters(model) == parameters(plain)


@pytest.mark.parametrize("query", [1, 2])
@pytest.mark.parametrize("make", STATEFUL.values(), ids=STATEFUL)
def test_buffers_are_as_before_a_failed_call(make, query):
    model = make()
    loss = Loss(query, lambda losses: throw(RuntimeError("boom"))())
    owners = {name: b.data_ptr() for name, b in model.named_buffers()}
    before = everything(model)
    with pytest.raises(RuntimeError, match="boom"):
        SharpnessAware(model, SAM(L2(0.5)), loss)(*cases.batch())
    assert everything(model) == before
    assert {name: b.data_ptr() for name, b in model.named_buffers()} == owners


@each_method
def test_batches_are_counted_once(method):
    model = normed()
    sharp = SharpnessAware(model, method, cross_entropy)
    for step in range(1, 4):
        sharp(*cases.batch(step))
        assert model[1].num_batches_tracked == step * (3 if isinstance(method, MSAM) else 1)


def test_msam_moves_buffers_as_a_plain_loop_over_the_micro_batches():
    model, plain = pair(normed)
    SharpnessAware(model, MSAM(3, SAM(L2(0.5))), cross_entropy)(*cases.batch())
    for x in cases.batch()[0].split(3):
        plain(x)
    assert buffers(model) == buffers(plain)


def test_track_overrides_which_query_moves_buffers():
    model = normed()
    oracle = ModelOracle(model, cross_entropy)
    before = buffers(model)
    g = oracle.query(cases.batch(), track=False).gradient
    assert buffers(model) == before
    oracle.query(cases.batch(), at=g, track=True)
    assert buffers(model) != before


def test_an_oracle_shows_the_buffers_as_they_are_now():
    model = cases.convnet()
    oracle = ModelOracle(model, cross_entropy)
    oracle.query(cases.batch())
    assert [b is c for b, c in zip(oracle.buffers, model.buffers(), strict=True)] == [True] * 6


def test_buffers_of_a_loss_module_are_treated_alike():
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros((), dtype=torch.long))

        def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
            self.calls += 1
            return cross_entropy(outputs, targets)

    sharp = SharpnessAware(cases.mlp(), SAM(), Counting())
    sharp(*cases.batch())
    assert sharp.loss.calls == 1


# Which parameters take part.


class Partial(nn.Module):
    """Two branches; `uses` says for each forward pass whether the second one takes part (stochastic depth)."""

    def __init__(self, *uses: bool) -> None:
        super().__init__()
        self.always, self.sometimes = nn.Linear(6, 4).double(), nn.Linear(6, 4).double()
        self.uses = list(uses)

    def forward(self, x: Tensor) -> Tensor:
        return self.always(x) + (self.sometimes(x) if self.uses.pop(0) else 0)


def test_frozen_parameters_stay_and_get_no_gradient():
    model, plain = pair(cases.mlp)
    model[0].requires_grad_(False)
    sharp = SharpnessAware(model, SAM(L2(0.5)), cross_entropy)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    sharp(*cases.batch()).backward()
    optimizer.step()
    assert [p.grad is None for p in model.parameters()] == [True, True, False, False]
    head = plain[2]  # the same step of a model that is nothing but the head
    x, y = cases.batch()
    z = plain[:2](x).detach()
    SharpnessAware(head, SAM(L2(0.5)), cross_entropy)(z, y).backward()
    torch.optim.SGD(head.parameters(), lr=0.1, weight_decay=0.1).step()
    assert parameters(model[2]) == parameters(head)
    assert parameters(model[0]) == parameters(plain[0])


@pytest.mark.parametrize("method", [SAM(), BiSAM(), ASAM(0.5), ASAM(0.5, 0.1), MSAM(3), ERM()], ids=str)
def test_unused_parameters_keep_no_gradient_and_do_not_decay(method):
    model = Partial(*[False] * 8)
    sharp = SharpnessAware(model, method, cross_entropy)
    before = parameters(model.sometimes)
    sharp(*cases.batch()).backward()
    assert set(gradients(model.sometimes).values()) == {None}
    assert None not in gradients(model.always).values()
    torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1).step()
    assert parameters(model.sometimes) == before


@pytest.mark.parametrize("method", [SAM(), ASAM(0.5, 0.1)], ids=str)
def test_unused_parameters_are_as_if_absent(method):
    model, alone = Partial(False, False), nn.Linear(6, 4).double()
    alone.load_state_dict(model.always.state_dict())
    SharpnessAware(model, method, cross_entropy)(*cases.batch()).backward()
    SharpnessAware(alone, method, cross_entropy)(*cases.batch()).backward()
    for p, q in zip(model.always.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=1e-15)


@pytest.mark.parametrize("ascent", [True, False])
def test_parameters_used_in_one_query_only(ascent):
    """Stochastic depth: perturbed exactly if the ascent used them, a gradient exactly if the descent did."""
    model, (x, y) = Partial(ascent, not ascent), cases.batch()
    twin, tail = copy.deepcopy(model), list(model.sometimes.parameters())
    before = everything(model)
    SharpnessAware(model, SAM(L2(0.5)), cross_entropy)(x, y).backward()
    assert (parameters(model), buffers(model)) == before[:2]
    assert all((p.grad is None) == ascent for p in tail)

    weights = list(twin.parameters())
    g = torch.autograd.grad(cross_entropy(twin(x), y).mean(), weights, allow_unused=True, materialize_grads=True)
    norm = torch.cat([t.reshape(-1) for t in g]).norm()
    with torch.no_grad():
        for p, t in zip(weights, g, strict=True):
            p += 0.5 * t / norm
    cross_entropy(twin(x), y).mean().backward()
    for p, q in zip(model.parameters(), weights, strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=1e-12)


def test_micro_batches_may_use_different_parameters():
    model = Partial(True, False, False, True)  # branch in the ascent of the first part and the descent of the second
    SharpnessAware(model, MSAM(4, SAM()), cross_entropy)(*cases.batch()).backward()
    assert None not in gradients(model).values()


def test_a_loss_of_no_parameter_but_an_input_is_refused_or_has_no_gradient():
    model, (x, y) = cases.mlp(), cases.batch()
    sharp = SharpnessAware(model, SAM(), cross_entropy, lambda model, x, y: (x[:, :4], y))
    with pytest.raises((ValueError, RuntimeError)):
        sharp(x.requires_grad_(), y).backward()


def test_tied_parameters_are_displaced_once():
    model, (x, y) = cases.Tied().double(), cases.batch()
    seen = []
    model.encode.register_forward_hook(lambda *_: seen.append(model.encode.weight.detach().clone()))
    oracle = ModelOracle(model, cross_entropy)
    assert oracle.names == ["encode.weight", "encode.bias", "middle.weight", "middle.bias"]
    e = SAM(L2(0.5)).climb(oracle, (x, y))
    oracle.query((x, y), at=e)
    assert torch.equal(seen[1], seen[0] + e.tensors[0])


def test_weights_are_displaced_in_the_second_query_only():
    model, norms = cases.mlp(), []
    start = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    model.register_forward_pre_hook(
        lambda *_: norms.append((torch.nn.utils.parameters_to_vector(model.parameters()).detach() - start).norm())
    )
    SharpnessAware(model, SAM(L2(0.5)), cross_entropy)(*cases.batch())
    torch.testing.assert_close(torch.stack(norms), torch.tensor([0.0, 0.5]).double(), rtol=0, atol=1e-10)


# A loss like any other.


def grads_of(loss: Tensor, model: nn.Module) -> list[Tensor]:
    model.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("first", ["sharp", "plain"])
@pytest.mark.parametrize("model", cases.MODELS)
def test_sum_with_a_plain_loss_in_any_order(model, first):
    model, (x, y) = cases.MODELS[model](), cases.batch()
    sharp = SharpnessAware(model, SAM(L2(0.5)), cross_entropy)
    terms = {"sharp": lambda: sharp(x, y), "plain": lambda: 0.5 * cross_entropy(model(x), y).mean()}
    expected = [a + b for a, b in zip(*[grads_of(terms[t](), model) for t in terms], strict=True)]
    order = [first, *(terms.keys() - {first})]
    losses = [terms[t]() for t in order]
    for actual, wanted in zip(grads_of(losses[0] + losses[1], model), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-15)


def test_sum_of_two_sharp_losses_in_any_order():
    model, (x, y) = cases.mlp(), cases.batch()
    a, b = SharpnessAware(model, SAM(L2(0.5)), cross_entropy), SharpnessAware(model, ASAM(0.5), cross_entropy)
    expected = [2 * g - h for g, h in zip(grads_of(a(x, y), model), grads_of(b(x, y), model), strict=True)]
    for actual in (grads_of(2 * a(x, y) - b(x, y), model), grads_of(-b(x, y) + a(x, y) * 2, model)):
        for g, wanted in zip(actual, expected, strict=True):
            torch.testing.assert_close(g, wanted, rtol=0, atol=1e-15)


def test_accumulation_is_msam():
    model, (x, y) = cases.mlp(), cases.batch()
    expected = grads_of(SharpnessAware(model, MSAM(2, BiSAM(0.5)), cross_entropy)(x, y), model)
    sharp = SharpnessAware(model, BiSAM(0.5), cross_entropy)
    model.zero_grad()
    for xs, ys in zip(x.split(2), y.split(2), strict=True):
        (sharp(xs, ys) / 4).backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), expected, strict=True))


def test_backward_twice_with_retain_graph_doubles_and_without_raises():
    model = cases.mlp()
    sharp = SharpnessAware(model, SAM(), cross_entropy)
    once = grads_of(sharp(*cases.batch()), model)
    model.zero_grad()
    loss = sharp(*cases.batch())
    loss.backward(retain_graph=True)
    loss.backward()
    assert all(torch.equal(p.grad, 2 * g) for p, g in zip(model.parameters(), once, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize(
    ("function", "message"),
    [(lambda loss: loss, "does not require grad"), (lambda loss: loss**2, "once_differentiable")],
)
def test_double_backward_is_refused(function, message):
    model = cases.mlp()
    loss = function(SharpnessAware(model, SAM(), cross_entropy)(*cases.batch()))
    grads = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    with pytest.raises(RuntimeError, match=message):
        sum((g**2).sum() for g in grads).backward()
    assert set(gradients(model).values()) == {None}


def test_the_loss_is_a_scalar_whose_later_change_in_place_is_legal():
    model = cases.mlp()
    sharp = SharpnessAware(model, SAM(), cross_entropy)
    once = grads_of(sharp(*cases.batch()), model)
    loss = sharp(*cases.batch())
    assert loss.shape == ()
    assert loss.requires_grad
    loss *= 2
    assert all(torch.equal(g, 2 * h) for g, h in zip(grads_of(loss, model), once, strict=True))


def test_clipping_acts_on_the_sharp_gradient():
    model = cases.mlp()
    once = grads_of(SharpnessAware(model, SAM(), cross_entropy)(*cases.batch()), model)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    assert torch.equal(norm, torch.nn.utils.get_total_norm(once))
    torch.testing.assert_close(
        torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item(), 0.01, rtol=1e-3, atol=0
    )


@pytest.mark.parametrize("scheduler", ["StepLR", "OneCycleLR", "ReduceLROnPlateau"])
def test_schedulers_run_without_a_warning(scheduler):
    model = cases.mlp()
    sharp = SharpnessAware(model, SAM(), cross_entropy)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    lr = torch.optim.lr_scheduler
    scheduler = {
        "StepLR": lambda: lr.StepLR(optimizer, 2),
        "OneCycleLR": lambda: lr.OneCycleLR(optimizer, 0.1, total_steps=6),
        "ReduceLROnPlateau": lambda: lr.ReduceLROnPlateau(optimizer, patience=0),
    }[scheduler]()
    rates = set()
    for _ in range(5):
        loss = sharp(*cases.batch())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step(*([1.0] if isinstance(scheduler, lr.ReduceLROnPlateau) else []))
        rates.add(optimizer.param_groups[0]["lr"])
    assert len(rates) > 1


def test_a_tensor_hook_acts_once_on_the_final_gradient():
    model = cases.mlp()
    sharp = SharpnessAware(model, SAM(L2(0.5)), cross_entropy)
    expected = grads_of(sharp(*cases.batch()), model)
    calls = []
    handle = model[0].weight.register_hook(lambda g: calls.append(g.clone()) or g * 10)
    actual = grads_of(sharp(*cases.batch()), model)
    assert [torch.equal(g, expected[0]) for g in calls] == [True]
    assert torch.equal(actual[0], expected[0] * 10)
    assert all(torch.equal(a, e) for a, e in zip(actual[1:], expected[1:], strict=True))
    handle.remove()
    assert torch.equal(grads_of(sharp(*cases.batch()), model)[0], expected[0])
    assert len(calls) == 1


def test_tensor_hooks_survive_a_failure():
    model, calls = cases.mlp(), []
    model[0].weight.register_hook(lambda g: calls.append(1))
    model.register_forward_hook(lambda m, x, out: out.register_hook(at_call(1, throw(RuntimeError("boom")))) and None)
    with pytest.raises(RuntimeError, match="boom"):
        SharpnessAware(model, SAM(), cross_entropy)(*cases.batch())
    assert calls == []
    model[0].weight.sum().backward()
    assert calls == [1]


def test_post_accumulate_hooks_fire_once():
    model, calls = cases.mlp(), Counter()
    names = {p: name for name, p in model.named_parameters()}
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: calls.update([names[p]]))
    loss = SharpnessAware(model, SAM(), cross_entropy)(*cases.batch())
    assert not calls
    loss.backward()
    assert calls == dict.fromkeys(names.values(), 1)


@pytest.mark.parametrize(("method", "queries"), [(ERM(), 1), (SAM(), 2), (BiSAM(), 2), (MSAM(3), 6)], ids=str)
def test_forward_hooks_fire_per_query(method, queries):
    model, calls = cases.mlp(), []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    SharpnessAware(model, method, cross_entropy)(*cases.batch())
    assert len(calls) == queries


# Copies and checkpoints.


@dataclass(frozen=True)
class MomentumAscent:
    """A method with a memory: it climbs an average of the ascent gradients, farther in each odd step."""

    rho: float = 0.3
    beta: float = 0.8

    def __call__(self, oracle, batch) -> Evaluation:
        g = oracle.query(batch).gradient
        m = oracle.state.get("m")
        m = g if m is None else m * self.beta + g * (1 - self.beta)
        oracle.state["m"] = m
        oracle.state["more"] = {"norms": [*oracle.state.get("more", {"norms": []})["norms"], m.norm()]}
        return oracle.query(batch, at=L2(self.rho * (1 + oracle.step % 2))(m, oracle))


class OneUnused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.unused, self.net = nn.Linear(2, 2).double(), normed()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def run(sharp: SharpnessAware, optimizer, steps) -> tuple[Any, ...]:
    for step in steps:
        sharp(*cases.batch(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return parameters(sharp), buffers(sharp)


@pytest.mark.parametrize("optimizer", cases.OPTIMIZERS)
@pytest.mark.parametrize("method", [SAM(), BiSAM(), ASAM(0.5), MomentumAscent(), MSAM(8, MomentumAscent())], ids=str)
def test_resumed_equals_uninterrupted(method, optimizer):
    make, (model, fresh) = cases.OPTIMIZERS[optimizer], pair(OneUnused)
    sharp = SharpnessAware(model, method, cross_entropy)
    optimizer = make(model.parameters())
    run(sharp, optimizer, range(3))
    file = io.BytesIO()
    torch.save({"sharp": sharp.state_dict(), "optimizer": optimizer.state_dict()}, file)
    whole = run(sharp, optimizer, range(3, 7))

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    nn.init.normal_(fresh.net[0].weight)
    resumed = SharpnessAware(fresh, method, cross_entropy)
    resumed.load_state_dict(saved["sharp"])
    optimizer = make(fresh.parameters())
    optimizer.load_state_dict(saved["optimizer"])
    assert run(resumed, optimizer, range(3, 7)) == whole
    assert resumed.get_extra_state()["step"] == 7


def test_resume_from_the_model_alone_is_exact_for_a_method_without_memory():
    (model, fresh), batch = pair(normed), cases.batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sharp = SharpnessAware(model, BiSAM(), cross_entropy)
    run(sharp, optimizer, range(2))
    fresh.load_state_dict(model.state_dict())
    other = SharpnessAware(fresh, BiSAM(), cross_entropy)
    assert all(
        torch.equal(g, h) for g, h in zip(grads_of(sharp(*batch), model), grads_of(other(*batch), fresh), strict=True)
    )


def test_a_loaded_state_is_a_copy_with_its_holes():
    sharp = SharpnessAware(OneUnused(), MomentumAscent(), cross_entropy)
    sharp(*cases.batch())
    state = sharp.state_dict()
    assert state["_extra_state"]["state"]["m"]["holes"] == [0, 1]
    other = SharpnessAware(OneUnused(), MomentumAscent(), cross_entropy)
    other.load_state_dict(state)
    first = state["_extra_state"]["state"]["m"]["__vector__"][2]
    expected = bits(first)
    first.zero_()
    state = other.state_dict()["_extra_state"]["state"]["m"]
    assert bits(state["__vector__"][2]) == expected
    assert state["holes"] == [0, 1]


@pytest.mark.parametrize("change", ["frozen", "other shapes"])
def test_the_state_of_another_model_is_refused(change):
    sharp = SharpnessAware(cases.mlp(), MomentumAscent(), cross_entropy)
    sharp(*cases.batch())
    model = cases.mlp()
    if change == "frozen":
        model[0].requires_grad_(False)
    else:
        model[0] = nn.Linear(6, 7).double()
    with pytest.raises(ValueError, match="another model"):
        SharpnessAware(model, MomentumAscent(), cross_entropy).set_extra_state(sharp.get_extra_state())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda sharp: pickle.loads(pickle.dumps(sharp))])
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("method", [SAM(), BiSAM(), MomentumAscent()], ids=str)
def test_a_copy_goes_on_by_itself(method, steps, copied):
    sharp = SharpnessAware(OneUnused(), method, cross_entropy)
    run(sharp, torch.optim.SGD(sharp.parameters(), lr=0.1), range(steps))
    other = copied(sharp)
    before = parameters(sharp)
    assert parameters(other) == before
    results = run(other, torch.optim.SGD(other.parameters(), lr=0.1), range(steps, 4))
    assert parameters(sharp) == before != results[0]
    assert run(sharp, torch.optim.SGD(sharp.parameters(), lr=0.1), range(steps, 4)) == results


def test_a_copy_leaves_the_last_outputs_behind():
    sharp = SharpnessAware(cases.mlp(), SAM(), cross_entropy)
    sharp(*cases.batch())
    with pytest.raises(RuntimeError, match="yet"):
        _ = copy.deepcopy(sharp).clean
    assert sharp.clean.losses.shape == (8,)


def test_one_method_in_two_losses_shares_nothing():
    method = MomentumAscent()
    sharps = [SharpnessAware(model, method, cross_entropy) for model in pair(cases.mlp)]
    alone = SharpnessAware(pair(cases.mlp)[0], MomentumAscent(), cross_entropy)
    optimizers = [torch.optim.SGD(s.parameters(), lr=0.1) for s in (*sharps, alone)]
    for step in range(3):
        result = run(sharps[0], optimizers[0], [step])
        run(sharps[1], optimizers[1], [step + 10])
        assert run(alone, optimizers[2], [step]) == result
    assert not hasattr(method, "__dict__") or set(vars(method)) == {"rho", "beta"}


@each_method
def test_a_checkpoint_grows_by_keys_only(method):
    model = nn.Linear(6, 1000)
    sharp = SharpnessAware(model, method, cross_entropy)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x, y = cases.batch()
    sharp(x.float(), y).backward()
    optimizer.step()

    def size(**parts) -> int:
        file = io.BytesIO()
        torch.save({name: part.state_dict() for name, part in parts.items()}, file)
        return file.tell()

    plain = size(model=model, optimizer=optimizer)
    assert 0 < size(model=model, optimizer=optimizer, sharp=sharp) - plain < 600
    assert size(sharp=sharp, optimizer=optimizer) - plain < 600


# Loss scaling.


def scaled_step(model: nn.Module, scaler: torch.amp.GradScaler | None, loss=cross_entropy, method=SAM(L2(0.5))):  # noqa: B008
    sharp = SharpnessAware(model, method, loss, scaler=scaler)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x, y = (t.float() if t.is_floating_point() else t for t in cases.batch())
    for _ in range(3 if loss is cross_entropy else 1):
        value = sharp(x, y)
        if scaler is None:
            value.backward()
            optimizer.step()
        else:
            scaler.scale(value).backward()
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()
    return parameters(model)


@each_method
def test_a_grad_scaler_changes_no_bit(method):
    model, other = pair(lambda: normed().float())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024)
    assert scaled_step(model, scaler, method=method) == scaled_step(other, None, method=method)
    assert buffers(model) == buffers(other)


def test_a_disabled_grad_scaler_changes_no_bit():
    model, other = pair(lambda: normed().float())
    assert scaled_step(model, torch.amp.GradScaler("cpu", enabled=False)) == scaled_step(other, None)


class Overflow(torch.autograd.Function):
    """The identity, whose gradient overflows where it is larger than `limit`, as in float16."""

    @staticmethod
    def forward(ctx: Any, losses: Tensor, limit: float) -> Tensor:
        ctx.limit = limit
        return losses.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        (grad,) = grads
        return torch.where(grad.abs() > ctx.limit, torch.inf, grad), None


def signs(gradient: Vector, oracle) -> Vector:
    """Finite where the gradient is not."""
    return Vector([t.sign() * 0.1 for t in gradient])


@pytest.mark.parametrize("query", [1, 2])
@pytest.mark.parametrize(
    "method",
    [SAM(), BiSAM(), ASAM(0.5), MSAM(4), SAM(signs), MSAM(4, SAM(signs))],
    ids=["SAM", "BiSAM", "ASAM", "MSAM", "signs", "MSAM of signs"],
)
def test_an_overflow_in_any_query_skips_the_step_once(method, query):
    model, calls = normed().float(), iter(range(1, 100))

    def overflow(module, args, outputs):
        return Overflow.apply(outputs, 1.0) if next(calls) == query else outputs

    model.register_forward_hook(overflow)
    scaler, before = torch.amp.GradScaler("cpu", init_scale=1024), parameters(model)
    assert scaled_step(model, scaler, Loss(), method) == before
    assert scaler.get_scale() == 512


def test_an_overflow_of_float16_skips_the_step_until_the_scale_fits():
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = normed().float()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x).half().float()

    model, scaler = Half(), torch.amp.GradScaler("cpu", init_scale=2.0**20)
    skipped, before = 0, parameters(model)
    while scaled_step(model, scaler, Loss()) == before:
        skipped += 1
        assert scaler.get_scale() == 2.0 ** (20 - skipped)
    assert 1 <= skipped <= 6
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("factor", [1024.0, torch.tensor(1024.0)], ids=["float", "tensor"])
def test_scale_may_be_a_function(factor):
    model, other = pair(lambda: cases.mlp().float())
    sharps = [SharpnessAware(model, SAM(), cross_entropy, scaler=lambda: factor)]
    sharps += [SharpnessAware(other, SAM(), cross_entropy)]
    x, y = cases.batch()
    first, second = (grads_of(s(x.float(), y), s.model) for s in sharps)
    assert all(torch.equal(g, h) for g, h in zip(first, second, strict=True))


# Noise.


def dropout_net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 32), nn.Dropout(0.5), nn.Linear(32, 4), nn.Dropout(0.1)).double()


def masks(sharp: SharpnessAware) -> list[Tensor]:
    seen = []
    handle = sharp.model[1].register_forward_hook(lambda m, x, out: seen.append(out.detach() == 0))
    sharp(*cases.batch())
    handle.remove()
    return seen


def test_same_noise_replays_the_masks_within_a_step_only():
    sharp = SharpnessAware(dropout_net(), SAM(), cross_entropy, same_noise=True)
    (first, second), (third, _) = masks(sharp), masks(sharp)
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


def test_noise_is_fresh_by_default():
    first, second = masks(SharpnessAware(dropout_net(), SAM(), cross_entropy))
    assert not torch.equal(first, second)


def test_same_noise_replays_per_micro_batch():
    seen = masks(SharpnessAware(dropout_net(), MSAM(4), cross_entropy, same_noise=True))
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[2], seen[3])
    assert not torch.equal(seen[0], seen[2])


def test_same_noise_with_rho_zero_is_erm_to_the_random_state():
    results = []
    for method in (SAM(L2(0.0)), ERM()):
        model, _ = pair(dropout_net)
        sharp = SharpnessAware(model, method, cross_entropy, same_noise=True)
        torch.manual_seed(7)
        results.append((cases.train(sharp, model), bits(torch.get_rng_state())))
    assert results[0] == results[1]


# What a step costs.


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        masked = function is torch.ops.aten.index.Tensor and any(
            t.dtype == torch.bool for t in args[1] if t is not None
        )
        self.names["aten.masked_select" if masked else str(function)] += 1
        return function(*args, **(kwargs or {}))


VIEWS = {"detach", "view", "_unsafe_view", "alias", "t", "transpose", "unsqueeze", "squeeze", "expand", "slice"}
# Before torch 2.12 there is no _foreach_clone: a copy is a call a tensor.
COPIES = set() if hasattr(torch, "_foreach_clone") else {"clone"}


def launches(mode: Operations) -> int:
    return sum(n for name, n in mode.names.items() if name.split(".")[1] not in VIEWS | COPIES)


def residual(depth: int) -> nn.Module:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return x + torch.relu(self.norm(self.conv(x)))

    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 3, 1), *[Block() for _ in range(depth)], nn.Flatten(), nn.Linear(18, 4)
    )


def deep(depth: int) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 6), *[nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(depth)])


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("make", [deep, residual])
@pytest.mark.parametrize("method", [SAM(), BiSAM(), ASAM(0.5), ASAM(0.5, 0.1)], ids=str)
def test_a_step_adds_the_same_number_of_operations_at_any_depth(method, make, small, monkeypatch):
    """Over the same queries, each forward and backward in a plain loop."""
    monkeypatch.setattr(vector, "_is_small_on_cpu", lambda tensors: small)
    added = []
    for depth in (5, 40):
        model, (x, y) = make(depth), cases.batch()
        x, y = x.float(), y % 4
        sharp = SharpnessAware(model, method, cross_entropy)
        with Operations() as ours:
            sharp(x, y)
        with Operations() as plain:
            for objective in (getattr(method, "ascent", None) or cross_entropy, cross_entropy):
                torch.autograd.grad(objective(model(x), y).mean(), list(model.parameters()))
        added.append(launches(ours) - launches(plain))
    assert added[0] == added[1]
    assert 5 < added[0] < 60


@pytest.mark.parametrize("scaler", [True, False])
@each_method
def test_a_step_waits_for_no_value(method, scaler):
    model = normed().float()
    scaler = torch.amp.GradScaler("cpu") if scaler else None
    sharp = SharpnessAware(model, method, cross_entropy, scaler=scaler, same_noise=True)
    x, y = cases.batch()
    with Operations() as mode:
        loss = sharp(x.float(), y)
        (loss if scaler is None else scaler.scale(loss)).backward()
        _ = sharp.clean
    assert mode.names["aten.add.Tensor"] + mode.names["aten._foreach_add_.List"] > 0  # the mode sees the step
    waits = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select"}  # losses[mask], too
    assert not {name for name in mode.names if name.split(".")[1] in waits}


class Storages(TorchDispatchMode):
    """Storages of `size` bytes that were born under the mode, by weak reference."""

    def __init__(self, size: int, *known: Tensor) -> None:
        super().__init__()
        self.size, self.seen = size, {}
        for t in known:
            self.add(t)

    def add(self, t: Tensor) -> None:
        if t.untyped_storage().nbytes() == self.size:
            ref = StorageWeakRef(t.untyped_storage())
            self.seen.setdefault(ref.cdata, ref)

    def alive(self) -> int:
        return sum(not ref.expired() for ref in self.seen.values())

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, Tensor):
                self.add(t)
        return result


@pytest.mark.parametrize("method", METHODS[:3], ids=["SAM", "BiSAM", "ASAM"])
def test_memory_is_weights_and_saved_weights_in_the_second_forward(method):
    model, counts = nn.Linear(300, 300, bias=False), []
    x, y = torch.randn(4, 300), torch.zeros(4, dtype=torch.long)
    storages = Storages(model.weight.untyped_storage().nbytes(), model.weight)

    def counted(objective):
        def call(outputs: Tensor, targets: Tensor) -> Tensor:
            counts.append(storages.alive())
            return objective(outputs, targets)

        return call

    ascent = counted(method.ascent) if method.ascent else None
    sharp = SharpnessAware(model, SAM(method.perturb, ascent), counted(cross_entropy))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with storages:
        for _ in range(3):
            loss = sharp(x, y)
            assert storages.alive() == 2  # weights, gradient
            loss.backward()
            assert storages.alive() == 2  # freed by backward, though the loss is kept
            optimizer.step()
            optimizer.zero_grad()
            assert storages.alive() == 1
    assert counts == [1, 2] * 3


def test_nothing_of_the_last_batch_lives_through_the_next_one():
    model, alive = cases.mlp(), []
    sharp = SharpnessAware(model, SAM(), cross_entropy)
    sharp(*cases.batch())
    outputs = StorageWeakRef(sharp.clean.outputs.untyped_storage())
    assert not outputs.expired()
    model.register_forward_pre_hook(lambda *_: alive.append(not outputs.expired()))
    sharp(*cases.batch())
    assert alive == [False, False]


@pytest.mark.parametrize("dropout", [False, True])
def test_same_noise_leaves_what_a_perturbation_draws_alone(dropout):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5 if dropout else 0.0), nn.Linear(8, cases.CLASSES)).double()
    drawn = []

    def method(oracle, batch):
        g = oracle.query(batch).gradient
        drawn.append(tuple(torch.rand(8).lt(0.5).tolist()))
        return oracle.query(batch, at=g * 0.01)

    sharp = SharpnessAware(model, method, cross_entropy, same_noise=True)
    batch = cases.batch()
    for _ in range(8):
        sharp(*batch)
    assert len(set(drawn)) > 6


def test_freezing_parameters_under_a_memory_is_refused():
    model = cases.mlp()
    sharp = SharpnessAware(model, FSAM(), cross_entropy)
    sharp(*cases.batch())
    model[0].requires_grad_(False)
    with pytest.raises(ValueError, match="frozen, unfrozen or sharded since"):
        sharp(*cases.batch())
    model[0].requires_grad_()
    sharp(*cases.batch())


def test_functional_sam_refuses_a_loss_with_parameters():
    class Tempered(nn.Module):
        def __init__(self):
            super().__init__()
            self.heat = nn.Parameter(torch.ones((), dtype=torch.double))

        def forward(self, outputs, targets):
            return cross_entropy(outputs * self.heat, targets)

    with pytest.raises(ValueError, match="cannot train the parameters of the loss Tempered"):
        SharpnessAware(cases.mlp(), FunctionalSAM(), Tempered())(*cases.batch())


@pytest.mark.parametrize("method", [KSAM(2), ESAM()], ids=["KSAM", "ESAM"])
def test_choosing_examples_by_flattened_losses_is_refused(method):
    def forward(model, x, y):
        return model(x.flatten(0, 1)), y.flatten()

    x, y = torch.randn(4, 5, 6, dtype=torch.double), torch.zeros(4, 5, dtype=torch.long)
    with pytest.raises(ValueError, match="20 losses for 4 examples"):
        SharpnessAware(cases.mlp(), method, cross_entropy, forward)(x, y)


def test_a_subnet_is_no_norm_layer():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.subnet, self.bn1, self.normal = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
            self.layers = nn.ModuleList([nn.LayerNorm(2)])

        def forward(self, x):
            return self.normal(self.layers[0](self.bn1(self.subnet(x))))

    oracle = ModelOracle(Model(), cross_entropy)
    e = SAMON(0.1).climb(oracle, (torch.randn(4, 2), torch.zeros(4, dtype=torch.long)))
    moved = {name for name, t in zip(oracle.names, e, strict=True) if t.abs().max() > 0}
    assert moved <= {"bn1.weight", "bn1.bias", "layers.0.weight", "layers.0.bias"}
    assert "bn1.weight" in moved
    assert "layers.0.weight" in moved
