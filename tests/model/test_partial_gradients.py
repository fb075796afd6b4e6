"""The gradient of a part of the weights: what is computed, and what is not, by count."""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from bisam import ESAM, SAM, SAMON, Evaluation, ModelOracle, Only, Oracle, SharpnessAware, Vector, cross_entropy
from bisam.masks import RandomMask
from bisam.oracle import Query
from bisam.perturbations import L2
from tests.support import cases
from tests.support.cases import bits, everything
from tests.support.doubles import Counting


class Noted(torch.autograd.Function):
    """The identity; counts its backward calls under a name."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: Counter[str], name: str) -> Tensor:
        ctx.counts, ctx.name = counts, name
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        ctx.counts[ctx.name] += 1
        return grads[0], None, None


class Layers(nn.Module):
    """Three layers that count the gradients of their weights, and of their inputs."""

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self.counts = counts
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(6, 6).double() / 2) for _ in range(3)])
        self.norm = nn.LayerNorm(6).double()

    def forward(self, x: Tensor) -> Tensor:
        for i, w in enumerate(self.weights):
            x = Noted.apply(x, self.counts, f"input {i}") if x.requires_grad else x
            x = torch.tanh(x @ Noted.apply(w, self.counts, f"weight {i}"))
        shift = Noted.apply(self.norm.bias, self.counts, "shift")
        return nn.functional.layer_norm(x, (6,), self.norm.weight, shift)[:, : cases.CLASSES]


def layers() -> tuple[Layers, Counter[str]]:
    torch.manual_seed(0)
    counts = Counter[str]()
    return Layers(counts), counts


@pytest.mark.parametrize("wrt", [w for w in itertools.product([False, True], repeat=5) if any(w)])
def test_no_more_is_computed_than_is_asked_for(wrt):
    model, counts = layers()
    oracle, batch = ModelOracle(model, cross_entropy), cases.batch()
    assert list(oracle.names) == ["weights.0", "weights.1", "weights.2", "norm.weight", "norm.bias"]
    whole = oracle.query(batch).gradient
    assert counts == dict.fromkeys([*(f"weight {i}" for i in range(3)), "input 1", "input 2", "shift"], 1)
    counts.clear()
    part = oracle.query(batch, wrt=wrt).gradient
    asked = {f"weight {i}" for i in range(3) if wrt[i]} | ({"shift"} if wrt[4] else set())
    lowest = min((i for i in range(3) if wrt[i]), default=3)
    assert counts == dict.fromkeys(asked | {f"input {i}" for i in (1, 2) if i > lowest}, 1)
    for w, a, b in zip(wrt, part, whole, strict=True):
        assert bits(a) == bits(b if w else torch.zeros_like(b))
    assert part.holes == {i for i, w in enumerate(wrt) if not w}
    assert oracle.holes == frozenset()  # the loss depends on all
    assert all(p.grad is None for p in model.parameters())


def steps(method: Any, counts: Counter[str], model: nn.Module, number: int = 20) -> list[tuple[Query, Counter[str]]]:
    """The queries of some steps, each with what it computed."""
    seen: list[tuple[Query, Counter[str]]] = []

    class Watched(Counting):
        def ask(self, queries):
            counts.clear()
            answers = super().ask(queries)
            seen.append((queries[0], Counter(counts)))
            return answers

    def watched(oracle: Oracle, batch: Any) -> Evaluation:
        return method(Watched(oracle, Counter(), 8), batch)

    sharp, optimizer = SharpnessAware(model, watched, cross_entropy), torch.optim.SGD(model.parameters(), lr=0.1)
    for i in range(number):
        optimizer.zero_grad()
        sharp(*cases.batch(i)).backward()
        optimizer.step()
    return seen


def test_the_first_pass_of_esam_computes_the_gradients_of_what_is_drawn():
    model, counts = layers()
    seen = steps(ESAM(RandomMask(L2(0.1), beta=0.5)), counts, model)
    computed: Counter[str] = sum([c for _, c in seen[::3]], Counter())
    drawn = [sum(q.wrt is None or q.wrt[i] for q, _ in seen[::3]) for i in range(5)]
    assert [computed[f"weight {i}"] for i in range(3)] == drawn[:3]
    assert all(4 < n < 16 for n in drawn)
    assert 0 < computed["input 1"] == sum(q.wrt is None or q.wrt[0] for q, _ in seen[::3]) < 20
    assert all(not c for _, c in seen[1::3])  # the pass that selects examples
    assert all(len(c) == 6 for _, c in seen[2::3])  # the descent gradient is that of all


@pytest.mark.parametrize(
    ("method", "computed"),
    [
        (SAMON(0.1), {"shift"}),
        (SAM(Only(lambda name, p: name.startswith("norm"), 0.1)), {"shift"}),
        (SAM(Only(lambda name, p: name == "weights.1", 0.1)), {"weight 1", "input 2"}),
    ],
    ids=cases.named,
)
def test_layers_below_the_displaced_ones_are_not_passed_through(method, computed):
    model, counts = layers()
    seen = steps(method, counts, model, 3)
    assert [set(c) for _, c in seen[::2]] == [computed] * 3
    assert all(len(c) == 6 for _, c in seen[1::2])


def test_checkpointed_layers_below_are_not_run_again():
    calls = Counter[int]()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(6, 6).double() for _ in range(3)])

        def run(self, i: int, x: Tensor) -> Tensor:
            calls[i] += 1
            return torch.tanh(self.layers[i](x))

        def forward(self, x: Tensor) -> Tensor:
            for i in range(3):
                x = checkpoint(self.run, i, x, use_reentrant=False)
            return x[:, : cases.CLASSES]

    ModelOracle(Model(), cross_entropy).query(cases.batch(), wrt=[False] * 4 + [True] * 2)
    assert calls == {0: 1, 1: 1, 2: 2}


# Memory.

WIDE = 1100  # with a million weights; the norm of fewer is that of a copy of all


class Storages(TorchDispatchMode):
    """The living storages of the size of a tensor, and not its own, that were made under the mode."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.size, self.own, self.made = tensor.nbytes, tensor.data_ptr(), dict[int, StorageWeakRef]()

    def alive(self) -> int:
        return sum(not ref.expired() for ref in self.made.values())

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, Tensor) and t.untyped_storage().nbytes() == self.size and t.data_ptr() != self.own:
                ref = StorageWeakRef(t.untyped_storage())
                self.made.setdefault(ref.cdata, ref)
        return result


def test_zeros_of_what_was_not_asked_for_take_no_memory():
    """Neither in the gradient nor in the displacement, nor on the way."""
    model = nn.Sequential(nn.Linear(WIDE, WIDE, bias=False), nn.Linear(WIDE, cases.CLASSES))
    batch = torch.randn(4, WIDE), torch.arange(4)
    oracle, storages = ModelOracle(model, cross_entropy), Storages(model[0].weight)
    with storages:
        g = oracle.query(batch, wrt=[False, True, True]).gradient
        e = L2(0.1)(g, oracle)
        others = [e + e, e - e, e * e, -e, e / 2.0, e * 2.0, e.abs(), e.clone(), e.onto(g), e.where([True] * 3, g)]
        e.norm(), e.dot(g)
        assert storages.made == {}
        assert {v.tensors[0].shape for v in [g, e, *others]} == {model[0].weight.shape}
        assert {v.holes for v in [g, e, *others]} == {frozenset({0})}
        del others
        whole = oracle.query(batch, at=e).gradient
        assert storages.alive() == 1  # its gradient of the first layer
        del whole


def test_layers_that_are_not_displaced_cost_no_additional_memory():
    """Not even the copy from which displaced weights are restored."""
    model = nn.Sequential(nn.Linear(WIDE, WIDE, bias=False), nn.LayerNorm(WIDE))
    storages, alive = Storages(model[0].weight), []
    model.register_forward_pre_hook(lambda *_: alive.append(storages.alive()))
    with storages:
        SharpnessAware(model, SAMON(0.1), cross_entropy)(torch.randn(4, WIDE), torch.arange(4)).backward()
    assert alive == [0, 0]


class Shrinking(nn.Linear):
    """Its forward pass changes its weights."""

    def forward(self, x):
        with torch.no_grad():
            self.weight.mul_(0.5)
        return super().forward(x)


def test_weights_that_a_pass_changes_are_restored_where_they_are_not_displaced():
    model = nn.Sequential(Shrinking(4, 4), nn.Linear(4, 3))
    sharp, before = SharpnessAware(model, SAM(Only(in_head, 0.1)), cross_entropy), model[0].weight.detach().clone()
    for step in (1, 2):
        sharp(torch.randn(8, 4), torch.arange(8) % 3)
        assert torch.equal(model[0].weight, before * 0.5**step)  # as one pass at the weights does


def in_head(name, parameter):
    return name.startswith("1.")


# What else a query keeps to.


def test_a_query_leaves_the_model_as_it_was():
    model, batch = cases.convnet(), cases.batch()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    calls = []
    for p in model.parameters():
        p.register_hook(calls.append)
    oracle = ModelOracle(model, cross_entropy)
    before, wrt = everything(model), [i % 2 == 0 for i in range(len(oracle.weights))]
    e = oracle.query(batch, track=False, wrt=wrt).gradient
    whole = oracle.query(batch, at=e.clone(), track=False).gradient
    part = oracle.query(batch, at=e, wrt=wrt).gradient
    assert everything(model) == before
    assert not calls
    assert [bits(t) for t in part] == [bits(t) for t in whole.confined(wrt)]


def test_a_displacement_with_structural_zeros_is_that_with_zeros():
    model, batch = cases.convnet(), cases.batch()
    oracle = ModelOracle(model, cross_entropy)
    e = oracle.query(batch).gradient.confined([i % 3 == 0 for i in range(len(oracle.weights))])
    full = Vector([t.clone() for t in e])
    first, second = (oracle.query(batch, at=at).gradient for at in (e, full))
    assert [bits(t) for t in first] == [bits(t) for t in second]


@pytest.mark.parametrize("wrt", [[True], [True] * 9, []])
def test_one_answer_is_needed_for_each_parameter(wrt):
    oracle = ModelOracle(cases.mlp(), cross_entropy)
    with pytest.raises(ValueError, match=rf"wrt has {len(wrt)} values, and the model 4 trainable parameters"):
        oracle.query(cases.batch(), wrt=wrt)


def test_all_is_the_default_and_nothing_needs_no_graph():
    assert Query(()).wrt is None
    assert Query((), wrt=[1, 0]).wrt == (True, False)
    model, batch = cases.convnet(), cases.batch()
    modes = []
    model.register_forward_pre_hook(lambda *_: modes.append(torch.is_grad_enabled()))
    oracle = ModelOracle(model, cross_entropy)
    nothing = oracle.query(batch, wrt=[False] * 8)
    assert modes == [False]
    assert nothing.gradient.holes == set(range(8))
    assert nothing.gradient.norm() == nothing.gradient.dot(nothing.gradient) == 0
    assert [bits(t) for t in nothing.gradient * 2.0] == [bits(torch.zeros_like(p)) for p in model.parameters()]
    whole = oracle.query(batch, at=nothing.gradient)
    close = oracle.query(batch)
    assert bits(whole.value) == bits(close.value)


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.unused, self.net = nn.Linear(3, 2).double(), cases.mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def test_holes_of_the_loss_are_those_of_what_was_asked_for():
    oracle = ModelOracle(Unused(), cross_entropy)
    answer = oracle.query(cases.batch(), wrt=[True, False, True, False, True, False])
    assert answer.gradient.holes == {0, 1, 3, 5}
    assert oracle.holes == {0}
    nothing = oracle.query(cases.batch(), wrt=[True, True, False, False, False, False])
    assert nothing.gradient.norm() == 0
    assert oracle.holes == {0, 1}


def test_a_method_that_descends_on_a_part_leaves_the_others_without_a_gradient():
    """As parameters that do not require one."""
    model = cases.mlp()

    def method(oracle: Oracle, batch: Any) -> Evaluation:
        return oracle.query(batch, wrt=[n.startswith("2.") for n in oracle.names])

    SharpnessAware(model, method, cross_entropy)(*cases.batch()).backward()
    frozen = copy.deepcopy(model)
    frozen.zero_grad()
    frozen[0].requires_grad_(False)
    cross_entropy(frozen(cases.batch()[0]), cases.batch()[1]).mean().backward()
    assert [p.grad is None for p in model.parameters()] == [True, True, False, False]
    assert [bits(p.grad) for p in model[2].parameters()] == [bits(p.grad) for p in frozen[2].parameters()]


@pytest.mark.parametrize("wrt", [None, [True, False, True, False], [False, True, False, True]])
def test_an_overflow_is_noticed_where_it_was_computed(wrt):
    """A loss that is scaled too much; the gradient of the first weight is zero, and does not overflow."""
    model = cases.mlp().float()
    x, y = cases.batch()
    oracle = ModelOracle(model, cross_entropy, scaler=lambda: 3e38)
    oracle.query((torch.zeros_like(x).float(), y), at=None, wrt=[True, False, False, False])
    assert oracle.overflow == 0
    oracle = ModelOracle(model, lambda z, y: cross_entropy(z, y) * 1e3, scaler=lambda: 3e38)
    oracle.query((x.float(), y), wrt=wrt)
    assert oracle.overflow.isnan()


def test_the_first_pass_finds_tensors_that_would_not_be_trained():
    other = nn.Parameter(torch.ones(()).double())
    sharp = SharpnessAware(cases.normed(), SAMON(0.1), lambda z, y: cross_entropy(z * other, y))
    with pytest.raises(ValueError, match="are no parameters of the model"):
        sharp(*cases.batch())


@pytest.mark.parametrize("name", ["shifted", "within", "without_tracking"])
def test_views_pass_the_part_on(name):
    oracle = ModelOracle(cases.mlp(), cross_entropy)
    zero = oracle.weights.confined([False] * 4)
    view = {"shifted": lambda: oracle.shifted(zero), "within": lambda: oracle.within("a")}.get(
        name, oracle.without_tracking
    )()
    assert view.query(cases.batch(), wrt=[True, False, False, True]).gradient.holes == {1, 2}
    e = oracle.query(cases.batch()).gradient
    assert view.query(cases.batch(), at=e, wrt=[True, False, False, True]).gradient.holes == {1, 2}
