"""The oracle of a torch module: exact restore after a step, also one that fails, and the cost of a step."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bisam import ASAM, MSAM, SAM, BiSAM, ModelOracle, SharpnessAware, cross_entropy, vector
from bisam.perturbations import L2
from tests.support import cases
from tests.support.cases import BASIC, bits, everything, gradients, normed, parameters
from tests.support.doubles import ActingLoss, at_call, failing, throw
from tests.support.runs import each_basic_method, with_gradients

# Exact restore.


@each_basic_method
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
    [(q, m) for m in BASIC for q in (1, 2, 4) if q < 3 or isinstance(m, MSAM)],
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

    sharp = SharpnessAware(cases.mlp(), method, ActingLoss(2, lambda losses: throw(RuntimeError("boom"))()))
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


@each_basic_method
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


# The cost of a step.


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
        for _ in range(2):  # steps that find out what forward passes change
            sharp(x, y)
        with Operations() as ours:
            sharp(x, y)
        with Operations() as plain:
            for objective in (getattr(method, "ascent", None) or cross_entropy, cross_entropy):
                torch.autograd.grad(objective(model(x), y).mean(), list(model.parameters()))
        added.append(launches(ours) - launches(plain))
    assert added[0] == added[1]
    assert 5 < added[0] < 60


@pytest.mark.parametrize("scaler", [True, False])
@each_basic_method
def test_a_step_waits_for_no_value(method, scaler):
    model = normed().float()
    scaler = torch.amp.GradScaler("cpu") if scaler else None
    sharp = SharpnessAware(model, method, cross_entropy, scaler=scaler, same_noise=True)
    x, y = cases.batch()
    for _ in range(2):  # steps that find out what forward passes change
        sharp(x.float(), y)
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


@pytest.mark.parametrize("method", BASIC[:3], ids=["SAM", "BiSAM", "ASAM"])
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
