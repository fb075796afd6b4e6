"""All queries of a step see the batch that was given, and a batch that cannot be given twice is refused."""

from __future__ import annotations

from collections import UserDict, namedtuple
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import register_pytree_node

from bisam import ERM, ESAM, KSAM, MSAM, SAM, Accumulated, BiSAM, SAMPa, SharpnessAware, cross_entropy, next_step
from bisam.perturbations import L2
from tests.support import cases
from tests.support.runs import grads_of, twins

X, Y = cases.batch()


class InPlace(nn.Module):
    """A model that changes its input."""

    def __init__(self, change) -> None:
        super().__init__()
        self.linear, self.change = nn.Linear(6, 4).double(), change

    def forward(self, x: Tensor) -> Tensor:
        self.change(x)
        return self.linear(x)


CHANGES = {
    "in place": lambda x: x.sub_(1),
    "by data": lambda x: x.data.mul_(2),
    "by numpy": lambda x: np.multiply(x.numpy(), 2, out=x.numpy()),
    "by a view": lambda x: x[0].zero_(),
}
SEVERAL = [SAM(L2(0.5)), BiSAM(0.5), MSAM(4), KSAM(4), ESAM(0.5)]
SEVERAL += [Accumulated(4, SAM(0.5)), Accumulated(2, KSAM(4, ERM())), MSAM(6, Accumulated(4, SAM(0.5)))]


@pytest.mark.parametrize("method", SEVERAL, ids=str)
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_an_input_that_the_model_changes_is_named(change, method):
    sharp = SharpnessAware(InPlace(change), method, cross_entropy)
    with pytest.raises(ValueError, match=r"changed tensor 0 of the batch in place.*\(., 6\).*x = x.clone\(\)"):
        sharp(X.clone(), Y)


@pytest.mark.parametrize(
    "method", [ERM(), MSAM(4, ERM()), Accumulated(4, ERM()), Accumulated(2, MSAM(4, ERM()))], ids=str
)
def test_with_one_query_a_model_may_change_its_input(method):
    sharp = SharpnessAware(InPlace(CHANGES["in place"]), method, cross_entropy)
    sharp(X.clone(), Y)
    sharp(X.clone(), Y)


def test_the_batch_before_last_is_checked_too():
    model = InPlace(CHANGES["in place"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sharp = SharpnessAware(model, SAMPa(L2(0.5), ahead=next_step(optimizer)), cross_entropy)
    with pytest.raises(ValueError, match="changed tensor 0 of the batch in place"):
        sharp(X.clone(), Y)


def test_a_tensor_in_a_nest_is_named_by_its_place():
    model = nn.Linear(6, 4).double()

    def forward(model, batch):
        batch["more"][1].zero_()
        return model(batch["x"]), batch["y"]

    sharp = SharpnessAware(model, SAM(), cross_entropy, forward)
    with pytest.raises(ValueError, match=r"changed tensor 3 of the batch.*\(8,\) and type torch.float32"):
        sharp({"x": X, "y": Y, "more": [torch.ones(3), torch.ones(8)]})


@dataclass
class Data:
    x: Tensor
    y: Tensor
    kind: str = "train"


@dataclass(frozen=True)
class Frozen:
    x: Tensor
    y: Tensor


class Registered:
    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y


register_pytree_node(Registered, lambda r: ([r.x, r.y], None), lambda values, _: Registered(*values))
Named = namedtuple("Named", "x y")
KINDS: dict[str, Any] = {
    "dict": lambda: {"x": X, "y": Y},
    "UserDict": lambda: UserDict(x=X, y=Y),
    "list": lambda: [X, Y],
    "named tuple": lambda: Named(X, Y),
    "dataclass": lambda: Data(X, Y),
    "frozen dataclass": lambda: Frozen(X, Y),
    "registered": lambda: Registered(X, Y),
    "nested": lambda: {"inner": [Data(X, Y)]},
}


def elements(batch: Any) -> tuple[Tensor, Tensor]:
    """The inputs and targets of a batch, which are taken out of it where that is possible."""
    if "inner" in batch if isinstance(batch, dict) else False:
        batch = batch.pop("inner").pop()
    if isinstance(batch, dict | UserDict):
        return batch.pop("x"), batch.pop("y")
    if isinstance(batch, list):
        return batch.pop(0), batch.pop(0)
    x, y = batch.x, batch.y
    if isinstance(batch, Data | Registered):
        batch.x = batch.y = None
    return x, y


def forward(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    x, y = elements(batch)
    return model(x), y


@pytest.mark.parametrize("method", [SAM(L2(0.5)), MSAM(3, SAM(L2(0.5))), KSAM(5), ESAM(0.5)], ids=str)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_forward_pass_may_use_up_the_containers_of_a_batch(kind, method):
    model, twin = twins(cases.mlp)
    batch = kind()
    losses = []
    for each, loss in ((model, SharpnessAware(model, method, cross_entropy, forward)), (twin, None)):
        torch.manual_seed(0)
        loss = loss or SharpnessAware(each, method, cross_entropy)
        losses.append(loss(batch) if each is model else loss(X, Y))
    assert torch.equal(*losses)
    for g, e in zip(grads_of(losses[0], model), grads_of(losses[1], twin), strict=True):
        assert torch.equal(g, e)
    x, y = elements(batch)  # nothing was taken out of the batch itself
    assert x is X
    assert y is Y


def test_an_iterator_is_refused():
    for iterator in (iter([X, Y]), (t for t in (X, Y)), map(torch.neg, [X, Y]), zip([X], [Y], strict=True)):
        sharp = SharpnessAware(nn.Linear(6, 4).double(), SAM(), cross_entropy, lambda m, batch: (m(next(batch)), Y))
        with pytest.raises(TypeError, match=r"iterator that only one of the passes.*pass a list"):
            sharp(iterator)


def test_other_objects_are_handed_over_as_they_are():
    class Settings:
        scale = 2.0

    settings, given = Settings(), []

    def forward(model, x, y, settings, array):
        given.append((settings, array))
        array *= 2
        return model(x * settings.scale), y

    sharp = SharpnessAware(nn.Linear(6, 4).double(), SAM(), cross_entropy, forward)
    array = np.ones(3)
    sharp(X, Y, settings, array)
    assert [s is settings for s, _ in given] == [True, True]
    assert [a.tolist() for _, a in given] == [[2.0] * 3] * 2  # each pass got a copy of the array
    assert array.tolist() == [1.0] * 3


# Losses with derivatives inside.


def residual(model: nn.Module, t: Tensor) -> tuple[Tensor, None]:
    t = t.detach().requires_grad_()
    u = model(t)
    return torch.autograd.grad(u.sum(), t, create_graph=True)[0] + u, None


def in_place(model: nn.Module, t: Tensor) -> tuple[Tensor, None]:
    t.requires_grad_()
    u = model(t)
    return torch.autograd.grad(u.sum(), t, create_graph=True)[0] + u, None


def squares(outputs: Tensor, _: Any) -> Tensor:
    return outputs.pow(2).mean(1)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)).double()


def by_hand(model: nn.Module, forward: Any, t: Tensor, rho: float) -> list[Tensor]:
    """SAM's gradient of the mean of the squares."""
    parameters = list(model.parameters())
    g = torch.autograd.grad(squares(*forward(model, t)).mean(), parameters)
    norm = torch.stack([one.pow(2).sum() for one in g]).sum().sqrt()
    with torch.no_grad():
        kept = [p.clone() for p in parameters]
        for p, one in zip(parameters, g, strict=True):
            p += rho * one / norm
    h = torch.autograd.grad(squares(*forward(model, t)).mean(), parameters)
    with torch.no_grad():
        for p, w in zip(parameters, kept, strict=True):
            p.copy_(w)
    return list(h)


@pytest.mark.parametrize("make", [residual, in_place], ids=["another leaf", "requires_grad_"])
def test_a_physics_informed_loss_trains(make):
    model, t = network(), torch.rand(8, 2).double()
    sharp = SharpnessAware(model, SAM(L2(0.3)), squares, make)
    for _ in range(4):  # the same tensor in each step, as with collocation points
        expected = by_hand(model, residual, t, 0.3)
        model.zero_grad()
        sharp(t).backward()
        for p, e in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(p.grad, e, rtol=1e-10, atol=1e-12)
        assert not t.requires_grad


@pytest.mark.parametrize("method", [ESAM(0.3), KSAM(4), MSAM(4, KSAM(2)), KSAM(4, ESAM(0.3))], ids=str)
def test_methods_with_passes_without_a_gradient_train_it_too(method):
    sharp = SharpnessAware(network(), method, squares, residual)
    for _ in range(3):
        assert sharp(torch.rand(8, 2).double()).isfinite()


def test_forces_in_the_loss_and_a_gradient_penalty_train():
    model, x = network(), torch.rand(8, 2).double()

    def penalty(outputs: Any, _: Any) -> Tensor:
        inputs, values = outputs
        (g,) = torch.autograd.grad(values.sum(), inputs, create_graph=True)
        return values.mean(1) + 10 * (g.norm(dim=1) - 1) ** 2

    def forward(model: nn.Module, x: Tensor) -> Any:
        inputs = (0.5 * x + 0.5 * x.flip(0)).requires_grad_()  # as WGAN-GP interpolates
        return (inputs, model(inputs)), None

    sharp = SharpnessAware(model, SAM(L2(0.3)), penalty, forward)
    for _ in range(3):
        sharp(x).backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in [model[0].weight, model[2].weight])


@pytest.mark.parametrize("method", [SAM(), ERM()], ids=str)
def test_a_tensor_outside_of_the_model_is_still_not_forgotten(method):
    temperature = torch.ones((), dtype=torch.float64, requires_grad=True)  # no Parameter: found by its second graph
    sharp = SharpnessAware(cases.mlp(), method, lambda o, t: cross_entropy(o * temperature, t))
    if isinstance(method, ERM):
        sharp(X, Y)
    with pytest.raises(ValueError, match=r"depends on 1 tensors that need a gradient"):
        sharp(X, Y)


def test_a_batch_that_needs_a_gradient_is_refused_with_both_remedies():
    t = torch.rand(8, 2).double().requires_grad_()
    sharp = SharpnessAware(network(), SAM(), squares, lambda m, t: (m(t), None))
    with pytest.raises(ValueError, match=r"needs a gradient.*x.detach\(\).requires_grad_\(\) inside `forward`"):
        sharp(t)


def test_keyword_batches():
    model, twin = twins(cases.mlp)
    losses = []
    for method in (SAM(L2(0.5)), MSAM(3), KSAM(5)):
        named = SharpnessAware(model, method, cross_entropy, lambda m, x, *, labels: (m(x), labels))
        losses = [named(x=X, labels=Y), SharpnessAware(twin, method, cross_entropy)(X, Y), named(X, labels=Y)]
        assert torch.equal(losses[0], losses[1])
        assert torch.equal(losses[2], losses[1])
    with pytest.raises(TypeError, match=r"keyword arguments \(x, labels\).*forward="):
        SharpnessAware(model, SAM(), cross_entropy)(x=X, labels=Y)
    named.eval()
    torch.testing.assert_close(named(x=X, labels=Y), cross_entropy(model(X), Y).mean())
