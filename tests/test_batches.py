"""Batches: containers of every kind are split, chosen from, joined and detached; what cannot be is refused."""

from __future__ import annotations

from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import register_pytree_node

from bisam import ESAM, KSAM, MSAM, SAM, SSAMF, SharpnessAware, cross_entropy
from bisam.batches import Keywords, handed, is_empty, leaves, mapped, size, split, take, tensors
from tests.support import cases

X, Y = torch.arange(20.0).view(10, 2), torch.arange(10)


class Mode(Enum):
    TRAIN = 1


@dataclass
class Point:
    x: Tensor
    name: str = "p"
    rest: dict = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Fixed:
    x: Tensor


class Node:
    def __init__(self, x: Tensor) -> None:
        self.x = x


register_pytree_node(Node, lambda node: ([node.x], None), lambda values, _: Node(*values))
Named = namedtuple("Named", "x y")
NESTS = {
    "tuple": (X, Y),
    "dict": {"x": X, "y": Y},
    "ordered": OrderedDict(x=X, y=Y),
    "user": UserDict(x=X, y=Y),
    "keywords": (X, Keywords(y=Y)),
    "named": Named(X, Y),
    "dataclass": Point(X, rest={"y": Y}),
    "frozen": [Fixed(X), Fixed(Y)],
    "registered": {"deep": [(Node(X), None), Node(Y)]},
    "settings": (X, Y, 3, "text", Mode.TRAIN, torch.float32, None, torch.tensor(2.0), len),
}


@pytest.mark.parametrize("nest", NESTS.values(), ids=NESTS)
def test_a_nest_is_split_and_chosen_from(nest):
    assert size(nest) == 10
    parts = split(nest, 4)
    assert [size(part) for part in parts] == [4, 4, 2]
    assert all(type(part) is type(nest) for part in parts)
    for i, whole in enumerate(t for t in tensors(nest) if t.dim()):
        assert torch.equal(torch.cat([[t for t in tensors(part) if t.dim()][i] for part in parts]), whole)
    chosen = take(nest, torch.tensor([7, 2]))
    assert [t.flatten()[0].item() for t in tensors(chosen)[:2]] == [14, 7]
    others = [leaf for leaf in leaves(nest) if not isinstance(leaf, Tensor)]
    assert [leaf for leaf in leaves(parts[1]) if not isinstance(leaf, Tensor)] == others
    assert split(nest, 10)[0] is nest


@pytest.mark.parametrize("nest", NESTS.values(), ids=NESTS)
def test_a_nest_is_handed_over_in_new_containers(nest):
    given = handed(nest)
    assert type(given) is type(nest)
    assert all(a is b for a, b in zip(leaves(given), leaves(nest), strict=True))
    if not isinstance(nest, tuple):
        assert given is not nest


def test_tensors_are_mapped():
    doubled = mapped(lambda t: t * 2, NESTS["registered"])
    assert torch.equal(doubled["deep"][0][0].x, X * 2)
    assert doubled["deep"][0][1] is None


@pytest.mark.parametrize(
    ("batch", "examples", "empty"),
    [
        ((X, Y), 10, False),
        ((), None, False),
        ((torch.zeros(0, 3), torch.zeros(0)), 0, True),
        ((torch.zeros(0, 4), X), None, False),
        ((torch.tensor(1.0),), None, False),
        ({"boxes": torch.zeros(0, 4), "image": X, "scale": torch.tensor(1.0)}, None, False),
        ("text", None, False),
    ],
)
def test_the_size_of_a_batch(batch, examples, empty):
    assert size(batch) == examples
    assert is_empty(batch) == empty


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((X, torch.zeros(3)), r"whose tensors have \[3, 10\] examples"),
        ((X, np.zeros(10)), "a ndarray, which may have a part for each example"),
        ((X, Mode), None),
        ((X, object()), "a object, which may have a part"),
        ((X, ["a"] * 10), r"a list of 10 str, which may be one for each of the 10 examples"),
        ((X, {"ids": list(range(10))}), "a list of 10 int"),
        ((X, ["a"] * 3), None),
        ((), "a batch of nothing"),
        ((1, "a"), "a batch of int, str"),
    ],
)
def test_what_cannot_be_split_is_refused(batch, message):
    if message is None:
        assert len(split(batch, 5)) == 2
        return
    for act in (lambda: split(batch, 5), lambda: take(batch, torch.tensor([0]))):
        with pytest.raises(ValueError, match=message):
            act()


@pytest.mark.parametrize("method", [MSAM(4), KSAM(4), ESAM(), SSAMF()], ids=str)
def test_a_refused_batch_is_refused_before_anything_is_computed(method):
    model, passes = cases.normed(), []
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    sharp = SharpnessAware(model, method, cross_entropy, lambda m, x, y, names: (m(x), y))
    with pytest.raises(ValueError, match="a list of 8 str"):
        sharp(*cases.batch(), ["name"] * 8)
    assert not passes


@dataclass
class Output:
    logits: Tensor
    hidden: list[Tensor]
    attentions: None = None


class Wrapped(nn.Module):
    def __init__(self, wrap) -> None:
        super().__init__()
        self.linear, self.wrap = nn.Linear(6, 4).double(), wrap

    def forward(self, x: Tensor):
        out = self.linear(x)
        return self.wrap(out)


WRAPS = {
    "dataclass": (lambda out: Output(out, [out * 2]), lambda o: o.logits, lambda o: o.hidden[0]),
    "dict": (lambda out: {"logits": out, "hidden": out * 2}, lambda o: o["logits"], lambda o: o["hidden"]),
    "user": (lambda out: UserDict(a=out, b=out * 2), lambda o: o["a"], lambda o: o["b"]),
    "named": (lambda out: Named(out, out * 2), lambda o: o.x, lambda o: o.y),
    "registered": (lambda out: (out, Node(out * 2)), lambda o: o[0], lambda o: o[1].x),
}


@pytest.mark.parametrize("method", [SAM(), MSAM(3), MSAM(3, KSAM(2)), KSAM(5)], ids=str)
@pytest.mark.parametrize(("wrap", "logits", "hidden"), WRAPS.values(), ids=WRAPS)
def test_outputs_of_every_kind_are_joined_and_detached(wrap, logits, hidden, method):
    model = Wrapped(wrap)
    x, y = cases.batch()
    sharp = SharpnessAware(model, method, lambda o, t: cross_entropy(logits(o), t))
    sharp(x, y)
    clean = sharp.clean
    assert not any(t.requires_grad for t in tensors(clean.outputs))
    torch.testing.assert_close(logits(clean.outputs), model.linear(x).detach())
    torch.testing.assert_close(hidden(clean.outputs), 2 * model.linear(x).detach())
    assert len(clean.losses) == 8
    assert type(clean.outputs) is type(wrap(x))


def test_targets_are_detached_too():
    teacher = nn.Linear(6, 4).double()
    sharp = SharpnessAware(
        cases.mlp(), SAM(), lambda o, t: (o - t.detach()).pow(2).mean(1), lambda m, x: (m(x), teacher(x))
    )
    sharp(cases.batch()[0])
    assert not sharp.clean.targets.requires_grad


def test_where_inputs_disagree_the_targets_or_outputs_tell_the_number_of_examples():
    boxes = {"boxes": torch.zeros(0, 4), "image": torch.randn(2, 3, 8, 8)}
    model = nn.Conv2d(3, 1, 3)
    for target, forward in (
        (None, lambda m, b: (m(b["image"]), None)),
        (torch.ones(2), lambda m, b: (m(b["image"]), torch.ones(2))),
    ):
        sharp = SharpnessAware(model, SAM(), lambda out, t: out.sigmoid().mean(), forward)
        sharp(boxes).backward()
        assert sharp.clean.count == 2, target
