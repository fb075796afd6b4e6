"""Targets that an objective does not take are refused, and each remedy in the message works as it stands."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bisam
from bisam import SAM, Binary, BiSAM, LowerBound, NegLog, SharpnessAware, Tanh, cross_entropy
from tests.support import cases

OBJECTIVES = {"cross-entropy": cross_entropy, "NegLog": NegLog(), "Tanh": Tanh(), "Binary": Binary()}
BOUNDS = [NegLog(), Tanh(), LowerBound(torch.erf, 2.0)]
each_bound = pytest.mark.parametrize("bound", BOUNDS, ids=lambda bound: type(bound).__name__)

CODE = r"(?:targets|outputs)(?:\.\w+\([^()]*\))*(?: / targets\.sum\([^()]*\))?"
OBJECTIVE = r"bisam\.Binary\(\w+\(\.\.\.\)\)|torch\.nn\.\w+\([^()]*\)|\w+\(\.\.\.\)"
REMEDY = re.compile(
    rf"use (?:(?P<objective>{OBJECTIVE})(?: with (?P<its>{CODE}))?|(?P<code>{CODE}|\(targets \+ 1\) / 2))"
    rf"(?: (?:and|with) (?P<more>{CODE}))?"
)


def remedies(message: str) -> list[dict[str, str | None]]:
    """What a message says to use: an objective, and expressions for outputs and targets."""
    return [found.groupdict() for found in REMEDY.finditer(message)]


def follow(remedy: dict[str, str | None], objective: Any, outputs: Tensor, targets: Tensor) -> Tensor:
    scope = {
        "bisam": bisam,
        "torch": torch,
        **cases.public_names(),
        "outputs": outputs,
        "targets": targets,
    }
    if remedy["objective"]:
        objective = eval(remedy["objective"].replace("(...)", "()"), scope)
    for code in (remedy["its"], remedy["code"], remedy["more"]):
        if code:
            name = "outputs" if code.startswith("outputs") else "targets"
            scope[name] = eval(code, scope)
    return objective(scope["outputs"], scope["targets"])


OUTPUTS = [(4,), (1,), (4, 1), (4, 3), (4, 3, 2, 2), (4, 1, 2, 2), (4, 5, 3)]
TARGETS = [(), (1,), (4,), (4, 1), (4, 3), (4, 5), (4, 2, 2), (4, 1, 2, 2), (4, 3, 2, 2), (4, 2, 2, 3), (4, 5, 3)]
TYPES = [torch.float32, torch.float16, torch.int64, torch.uint8, torch.bool]


def zeros_and_ones(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Labels of two classes, or of several that are present or not, whose rows do not sum to 1; or classes last."""
    if shape == (4, 2, 2, 3):
        return F.one_hot(torch.zeros(4, 2, 2, dtype=torch.long), 3).to(dtype)
    ones = torch.ones(shape)
    return (ones if shape in ((), (1,)) else ones.index_fill(0, torch.tensor([1]), 0)).to(dtype)


def refusal(objective: Any, outputs: Tensor, targets: Tensor) -> str | None:
    try:
        losses = objective(outputs, targets)
    except (TypeError, ValueError) as error:
        return str(error)
    return None if losses.isfinite().all() else "not finite"


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("outputs", OUTPUTS, ids=str)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_each_remedy_in_a_message_works(name, outputs, dtype):
    objective, z = OBJECTIVES[name], torch.zeros(outputs)
    for shape in TARGETS:
        t = zeros_and_ones(shape, dtype)
        if message := refusal(objective, z, t):
            found = remedies(message)
            assert found or str(shape) in message, (shape, message)
            for remedy in found:
                assert refusal(lambda *given, r=remedy: follow(r, objective, *given), z, t) is None, (shape, message)


@pytest.mark.parametrize(
    ("outputs", "targets", "dtype", "said"),
    [
        # A binary head.
        ((4,), (4,), "float", "one example.*use bisam.Binary(NegLog(...)); a regression has no 0-1 loss"),
        ((4,), (4,), "long", "use bisam.Binary(NegLog(...)) with targets.float()"),
        ((4,), (4,), "bool", "use bisam.Binary(NegLog(...)) with targets.float()"),
        ((4,), (4, 1), "float", "use bisam.Binary(NegLog(...)) with targets.squeeze(1)"),
        ((4,), (4, 1), "long", "use bisam.Binary(NegLog(...)) with targets.squeeze(1).float()"),
        ((4, 1), (4,), "float", "use bisam.Binary(NegLog(...)) with targets.unsqueeze(1)"),
        ((4, 1), (4,), "long", "use bisam.Binary(NegLog(...)) with targets.unsqueeze(1).float()"),
        ((4, 1), (4, 1), "float", "use bisam.Binary(NegLog(...)) with targets; a regression has no 0-1 loss"),
        ((4, 1), (4, 1), "bool", "use bisam.Binary(NegLog(...)) with targets.float()"),
        ((4, 1, 2, 2), (4, 2, 2), "long", "use bisam.Binary(NegLog(...)) with targets.unsqueeze(1).float()"),
        # Several labels per example.
        ((4, 3), (4, 3), "float", "(several, or one), use bisam.Binary(NegLog(...)); a regression has no 0-1 loss"),
        ((4, 3), (4, 3), "long", "use bisam.Binary(NegLog(...)) with targets.float(); for one-hot"),
        ((4, 3), (4, 3), "bool", "use bisam.Binary(NegLog(...)) with targets.float(); for one-hot"),
        ((4, 3, 2, 2), (4, 3, 2, 2), "bool", "use bisam.Binary(NegLog(...)) with targets.float(); for one-hot"),
        # Classes.
        ((4, 3), (4,), "float", "for labels use targets.long()"),
        ((4, 3), (4,), "int", "labels must be int64, got torch.int32: use targets.long()"),
        ((4, 3), (4, 1), "float", "need shape (4,), got (4, 1): use targets.squeeze(1).long()"),
        ((4, 3), (4, 1), "long", "need shape (4,), got (4, 1): use targets.squeeze(1)"),
        ((4, 3, 2, 2), (4, 1, 2, 2), "uint8", "need shape (4, 2, 2), got (4, 1, 2, 2): use targets.squeeze(1).long()"),
        ((4, 5, 3), (4, 5), "long", "the classes are dimension 1, use outputs.movedim(-1, 1)"),
        ((4, 5, 3), (4, 5), "int", "the classes are dimension 1, use outputs.movedim(-1, 1) with targets.long()"),
        ((4, 3, 2, 2), (4, 2, 2, 3), "float", "the classes are dimension 1, use targets.movedim(-1, 1)"),
        ((4, 3, 2, 2), (4, 2, 2, 3), "bool", "the classes are dimension 1, use targets.long().argmax(-1)"),
        ((4, 3), (4, 5), "float", "need shape (4,), got (4, 5): the classes are dimension 1 of the outputs"),
    ],
)
def test_the_remedy_is_the_right_one(outputs, targets, dtype, said):
    t = zeros_and_ones(targets, {"int": torch.int32}.get(dtype) or getattr(torch, dtype))
    with pytest.raises((TypeError, ValueError)) as error:
        NegLog()(torch.zeros(outputs), t)
    first, *rest = said.split(".*")
    message = str(error.value)
    assert first in message
    assert all(part in message for part in rest)


def test_cross_entropy_names_the_losses_of_torch():
    for outputs, targets in (((4,), (4,)), ((4, 1), (4,)), ((4, 3), (4, 3))):
        with pytest.raises(ValueError, match=r'use torch\.nn\.BCEWithLogitsLoss\(reduction="none"\) with targets'):
            cross_entropy(torch.zeros(outputs), zeros_and_ones(targets, torch.int64))
    with pytest.raises(ValueError, match=r'for a regression, use torch\.nn\.MSELoss\(reduction="none"\)'):
        cross_entropy(torch.zeros(4, 1), torch.zeros(4))


# Class probabilities

Z, GOOD = torch.zeros(2, 3), torch.tensor([0.2, 0.3, 0.5])


@each_bound
@pytest.mark.parametrize(
    ("row", "said"),
    [
        ([1.0, 1.0, 0.0], r"1 of 2 sums are not 1, the first is 2: for a target in \[0, 1\] for each label"),
        ([0.0, 0.0, 0.0], r"1 of 2 sums are not 1, the first is 0: for a target in \[0, 1\] for each label"),
        ([0.5, 0.6, 0.0], r"the first is 1.1: for a target in \[0, 1\]"),
        ([3.0, 0.0, 1.0], r"the first is 4: a regression .*use targets / targets.sum\(1, keepdim=True\)"),
        ([1.5, -0.5, 0.0], r"the smallest is -0.5: a regression .*use targets.softmax\(1\)"),
        ([torch.nan, 0.0, 1.0], "1 of 6 are not finite"),
        ([torch.inf, 0.0, 1.0], "1 of 6 are not finite"),
    ],
)
def test_targets_that_are_no_probabilities_are_refused(bound, row, said):
    targets = torch.stack([GOOD, torch.tensor(row)])
    with pytest.raises(ValueError, match=said) as error:
        bound(Z, targets)
    for remedy in remedies(str(error.value)):
        if "LowerBound" not in str(remedy):
            assert follow(remedy, bound, Z, targets).isfinite().all()
    with pytest.raises(ValueError, match="of one example" if targets.isfinite().all() else "finite") as error:
        bound(Z[0], targets[1])
    for remedy in remedies(str(error.value)):
        if "LowerBound" not in str(remedy):
            assert follow(remedy, bound, Z[0], targets[1]).isfinite().all()


def test_probabilities_with_the_classes_last_are_told_apart():
    outputs, targets = torch.zeros(4, 5, 3), GOOD.expand(4, 5, 3)
    with pytest.raises(ValueError, match=r"use outputs.movedim.* and targets.movedim") as error:
        NegLog()(outputs, targets)
    assert "Binary" not in str(error.value)
    (remedy,) = remedies(str(error.value))
    assert follow(remedy, NegLog(), outputs, targets).shape == (4, 5)


@each_bound
@pytest.mark.parametrize(
    ("made", "dtype"),
    [(torch.bfloat16, torch.float32), *[(t, t) for t in (torch.float64, torch.float32, torch.float16, torch.bfloat16)]],
    ids=str,
)
@pytest.mark.parametrize("classes", [2, 3, 10, 1000])
def test_mixed_and_smoothed_targets_of_each_type_pass(bound, made, dtype, classes):
    labels = torch.arange(6) % classes
    smooth = (F.one_hot(labels, classes).to(made) * 0.9 + 0.1 / classes).to(made)
    lam = torch.tensor(0.3, dtype=made)
    for p in (smooth, smooth * lam + smooth.roll(1, 0) * (1 - lam), torch.randn(6, classes).to(made).softmax(1)):
        assert bound(torch.zeros(6, classes, dtype=dtype), p.to(dtype)).isfinite().all()


@each_bound
def test_rounding_is_no_error_and_a_wrong_sum_is(bound):
    assert bound(Z, torch.tensor([[0.333, 0.333, 0.333], [1.0, -1e-7, 1e-7]])).isfinite().all()
    for row in ([0.98, 0.0, 0.0], [1.02, 0.0, 0.0], [1.01, -0.01, 0.0]):
        with pytest.raises(ValueError, match="class probabilities"):
            bound(Z, torch.tensor([row, [1.0, 0.0, 0.0]]))


def test_the_weights_of_cross_entropy_are_those_of_torch():
    """Torch accepts soft targets of any sum, as weights."""
    targets = torch.tensor([[2.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    assert torch.equal(cross_entropy(Z, targets), F.cross_entropy(Z, targets, reduction="none"))


# Targets of Binary


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (torch.tensor([0.0, 2.0, 1.0]), "1 of 3 are not, the first is 2: a regression has no 0-1 loss"),
        (torch.tensor([0.0, -0.5, 1.0]), "the first is -0.5: a regression has no 0-1 loss"),
        (torch.tensor([0.0, torch.nan, 1.0]), "the first is nan"),
        (torch.tensor([0, 2, 1]), r"the first is 2: the objective for one of K classes per example is NegLog\(...\)"),
        (torch.tensor([0, -100, 1]), "the first is -100: .*to leave labels out"),
        (torch.tensor([0, 255, 1], dtype=torch.uint8), "the first is 255: .*to leave labels out"),
        (torch.tensor([1, -1, 1]), r"the first is -1: for labels -1 and 1, use \(targets \+ 1\) / 2"),
        (torch.tensor([1.0, -1.0, 1.0]), r"for labels -1 and 1, use \(targets \+ 1\) / 2"),
    ],
    ids=str,
)
def test_targets_outside_0_and_1_are_refused(targets, said):
    with pytest.raises(ValueError, match=said) as error:
        Binary()(torch.zeros(3), targets)
    for remedy in remedies(str(error.value)):
        assert follow(remedy, Binary(), torch.zeros(3), targets).isfinite().all()


# Without reading a value


class Elsewhere(Tensor):
    """A tensor on the CPU that says it is on a device, and counts how often a value is read."""

    reads = 0

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function in (Tensor.__bool__, Tensor.item, Tensor.__float__, Tensor.__int__):
            cls.reads += 1
        if function == Tensor.is_cpu.__get__:
            return False
        return super().__torch_function__(function, types, args, kwargs or {})


@pytest.mark.parametrize(
    ("objective", "good", "bad"),
    [
        (NegLog(), [[0.5, 0.5]], [[1.0, 1.0]]),
        (Tanh(), [[0.5, 0.5]], [[1.0, 1.0]]),
        (Binary(), [[1.0, 0.0]], [[1.0, 3.0]]),
        (Binary(), [[1, 0]], [[1, 3]]),
    ],
    ids=str,
)
def test_on_a_device_an_assert_fails_and_nothing_is_read(objective, good, bad):
    Elsewhere.reads = 0
    outputs = torch.zeros(1, 2)
    losses = objective(outputs, torch.tensor(good).as_subclass(Elsewhere))
    with pytest.raises(RuntimeError, match="0-1 loss"):  # torch._assert_async, which on the CPU raises at once
        objective(outputs, torch.tensor(bad).as_subclass(Elsewhere))
    assert Elsewhere.reads == 0
    torch.testing.assert_close(losses.as_subclass(Tensor), objective(outputs, torch.tensor(good)))


def test_a_device_without_asserts_is_not_checked(monkeypatch):
    def missing(*_: Any) -> None:
        raise NotImplementedError

    monkeypatch.setattr(torch, "_assert_async", missing)
    assert NegLog()(torch.zeros(1, 2), torch.ones(1, 2).as_subclass(Elsewhere)).isfinite().all()


@pytest.mark.parametrize(
    ("objective", "good", "bad"),
    [(NegLog(), [[0.5, 0.5]], [[1.0, 1.0]]), (Binary(), [[1.0, 0.0]], [[1.0, 3.0]]), (Binary(), [[1, 0]], [[1, 3]])],
    ids=str,
)
def test_a_compiled_objective_checks_in_one_graph(objective, good, bad):
    torch.compiler.reset()
    compiled = torch.compile(objective.__call__, fullgraph=True, backend="aot_eager")
    outputs = torch.randn(1, 2)
    torch.testing.assert_close(compiled(outputs, torch.tensor(good)), objective(outputs, torch.tensor(good)))
    with pytest.raises(RuntimeError, match="0-1 loss"):
        compiled(outputs, torch.tensor(bad))
    torch.compiler.reset()


def test_under_vmap_there_is_no_value_to_check():
    bound = LowerBound(torch.erf, 2.0)
    outputs, targets = torch.randn(2, 4, 3), torch.rand(2, 4, 3).softmax(2)
    expected = torch.stack([bound(z, p) for z, p in zip(outputs, targets, strict=True)])
    torch.testing.assert_close(torch.func.vmap(bound)(outputs, targets), expected)


# In training


@pytest.mark.parametrize(
    ("outputs", "loss", "targets", "remedy"),
    [
        (3, nn.BCEWithLogitsLoss(), [[1.0, 1.0, 0.0]] * 8, BiSAM(0.05, Binary())),
        (1, nn.BCEWithLogitsLoss(), [[1.0]] * 8, BiSAM(0.05, Binary())),
        (2, nn.MSELoss(), [[0.3, -1.0]] * 8, SAM(0.05)),
        (1, nn.MSELoss(), [[0.3]] * 8, SAM(0.05)),
        (2, nn.L1Loss(), [[30.0, 1.0]] * 8, SAM(0.05)),
    ],
)
def test_the_adversary_is_refused_and_the_remedy_trains(outputs, loss, targets, remedy):
    model, x, y = nn.Linear(4, outputs), torch.randn(8, 4), torch.tensor(targets)
    named = r"use bisam.Binary\(" if remedy != SAM(0.05) else r"climb the training loss, SAM\(...\) in place of BiSAM"
    with pytest.raises(ValueError, match=named):
        SharpnessAware(model, BiSAM(0.05), loss)(x, y)
    SharpnessAware(model, remedy, loss)(x, y).backward()
    assert model.weight.grad.isfinite().all()
