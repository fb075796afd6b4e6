"""Batches are taken apart and joined, and losses are counted, per example."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bisam import (
    ERM,
    ESAM,
    KSAM,
    MESA,
    MSAM,
    RSAM,
    SAF,
    SAM,
    Accumulated,
    BiSAM,
    EBiSAM,
    Evaluation,
    FunctionalSAM,
    ModelOracle,
    NegLog,
    SharpnessAware,
    Vector,
    cross_entropy,
)
from bisam.batches import take
from bisam.perturbations import L2
from tests.support.cases import LABELS, POINTS, linear


def test_examples_are_taken_from_tensors_at_any_depth():
    x, y, mask = torch.arange(12).view(4, 3), torch.arange(4), torch.ones(4, dtype=torch.bool)
    index = torch.tensor([3, 1])
    a, (b, c), d = take(({"x": x, "mask": mask}, [y, y + 1], (y,)), index)
    assert torch.equal(a["x"], x[[3, 1]])
    assert a["mask"].shape == (2,)
    assert torch.equal(b, y[[3, 1]])
    assert torch.equal(c, b + 1)
    assert isinstance(d, tuple)
    assert torch.equal(d[0], b)


def test_what_is_no_tensor_is_taken_whole_and_sizes_must_agree():
    x = torch.arange(4)
    assert take((x, "text", None, torch.tensor(3.0)), torch.tensor([1]))[1:3] == ("text", None)
    with pytest.raises(ValueError, match=r"4.*3|3.*4"):
        take((x, x[:3]), torch.tensor([0]))


def tokens() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """Sequences of five positions, some of which do not count."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 4)).double()
    x, y = torch.randint(7, (6, 5)), torch.randint(4, (6, 5))
    y[torch.rand(6, 5) < 0.3] = -100
    return model, (x, y)


def by_position(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return model(x).transpose(1, 2), y


def test_another_objective_on_the_same_outputs_is_a_query_without_a_forward_pass():
    model, batch = tokens()
    oracle = ModelOracle(model, cross_entropy, by_position)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    seen = oracle.query(batch)
    for objective in (NegLog(), lambda z, y: cross_entropy(z, y).sum() / 2):
        under, asked = seen.under(objective), oracle.query(batch, objective, grad=False)
        assert torch.equal(under.losses, asked.losses)
        assert torch.equal(under.value, asked.value)
        assert under.grad is None
        assert under.objective is objective
    assert len(calls) == 3


def test_losses_of_positions_are_those_of_their_examples():
    losses = torch.arange(12.0).view(2, 3, 2)
    assert Evaluation(losses).per_example.tolist() == [2.5, 8.5]
    assert Evaluation(losses[:, 0, 0]).per_example.tolist() == [0.0, 6.0]
    with pytest.raises(TypeError, match="scalar"):
        _ = Evaluation(losses.mean()).per_example


def test_positions_that_do_not_count_do_not_make_an_example_easier():
    model, (x, y) = tokens()
    seen = ModelOracle(model, cross_entropy, by_position).query((x, y))
    counted = (y != -100).sum(1)
    torch.testing.assert_close(seen.per_example, seen.losses.sum(1) / counted.clamp_min(1), rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    "method", [KSAM(2, SAM()), ESAM(L2(0.05)), EBiSAM(beta=1.0), KSAM(3, RSAM(0.01, EBiSAM()))], ids=str
)
def test_methods_that_choose_examples_choose_sequences(method):
    model, batch = tokens()
    sharp = SharpnessAware(model, method, cross_entropy, by_position)
    loss = sharp(*batch)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_ksam_of_sequences_takes_the_hardest():
    model, (x, y) = tokens()
    losses = ModelOracle(model, cross_entropy, by_position).query((x, y)).per_example
    rows = losses.topk(2).indices
    first = SharpnessAware(model, KSAM(2, ERM()), cross_entropy, by_position)(x, y)
    expected = cross_entropy(*by_position(model, x[rows], y[rows])).sum() / (y[rows] != -100).sum()
    torch.testing.assert_close(first, expected, rtol=0, atol=1e-12)


def test_an_evaluation_s_value_is_the_mean_unless_given():
    losses = torch.tensor([1.0, 3.0])
    assert Evaluation(losses).value == 2
    assert Evaluation(losses, value=torch.tensor(5.0)).value == 5
    with pytest.raises(AssertionError, match="grad=False"):
        _ = Evaluation(losses).gradient
    g = Vector([losses])
    assert Evaluation(losses, g).gradient is g
    assert Evaluation(losses).per_example is losses


# Ignored labels.


@pytest.mark.parametrize("ignored", [slice(0, 3), slice(0, 4), slice(2, 6)])
def test_micro_batches_weigh_what_counts_in_them(ignored):
    y = LABELS.clone()
    y[ignored] = -100
    values, grads = [], []
    for method in (ERM(), MSAM(4, ERM())):
        model = linear()
        sharp = SharpnessAware(model, method, cross_entropy)
        value = sharp(POINTS, y)
        value.backward()
        values.append(value.detach())
        grads.append(model.weight.grad)
        torch.testing.assert_close(sharp.clean.value, value.detach())
    torch.testing.assert_close(values[0], values[1])
    torch.testing.assert_close(grads[0], grads[1])


def test_a_batch_in_which_nothing_counts_changes_nothing():
    model = linear()
    loss = SharpnessAware(model, MSAM(4, BiSAM()), cross_entropy)(POINTS, torch.full_like(LABELS, -100))
    loss.backward()
    assert loss == 0
    assert not model.weight.grad.any()


def test_a_batch_without_tensors_cannot_be_split():
    with pytest.raises(ValueError, match=r"cannot split a batch of object.*dict\(batch\)"):
        SharpnessAware(linear(), MSAM(4), cross_entropy, forward=lambda model, batch: (model(POINTS), LABELS))(object())


def halved(outputs: Tensor, targets: Tensor) -> Tensor:
    """A loss that changes the outputs."""
    outputs.div_(2)
    return nn.functional.cross_entropy(outputs, targets, reduction="none")


CHANGED = r"outputs of the model were changed in place after the forward pass.*outputs = outputs.clone\(\)"


def test_a_loss_that_changes_the_outputs_is_evaluated_once():
    answer = ModelOracle(linear(), NegLog()).query((POINTS, LABELS))
    expected = nn.functional.cross_entropy(answer.outputs / 2, LABELS)
    torch.testing.assert_close(answer.under(halved).value, expected, rtol=0, atol=1e-15)
    for objective in (halved, cross_entropy):
        with pytest.raises(ValueError, match=CHANGED):
            answer.under(objective)
    with pytest.raises(ValueError, match=CHANGED):
        answer.correct  # noqa: B018


@pytest.mark.parametrize("method", [SAM(L2(0.5)), MSAM(4), Accumulated(4, SAM(L2(0.5)))], ids=str)
def test_outputs_that_a_loss_has_changed_are_known_where_parts_are_joined(method):
    sharp = SharpnessAware(linear(), method, halved)
    sharp(POINTS, LABELS)
    assert sharp.clean.value.isfinite()
    with pytest.raises(ValueError, match=CHANGED):
        sharp.clean.under(cross_entropy)
    with pytest.raises(ValueError, match=CHANGED):
        sharp.clean.correct  # noqa: B018


@pytest.mark.parametrize("method", [SAM(L2(0.5)), BiSAM(0.5), MSAM(4), KSAM(4)], ids=str)
def test_a_loss_that_changes_the_outputs_trains_as_one_that_does_not(method):
    results = []
    for loss in (halved, lambda outputs, targets: halved(outputs.clone(), targets)):
        torch.manual_seed(0)
        model = linear()
        sharp = SharpnessAware(model, method, loss)
        for _ in range(2):
            model.zero_grad()
            (value := sharp(POINTS, LABELS)).backward()
        results.append((value.detach(), *[p.grad for p in model.parameters()]))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


NOT_ONCE = [
    (ESAM(0.5, ascent=NegLog()), False),
    (FunctionalSAM(0.5), False),
    (BiSAM(0.5), True),
    (MESA(), False),
    (SAF(epoch=1, examples=8, indices=lambda batch: torch.arange(8)), False),
]


@pytest.mark.parametrize(("method", "stats"), NOT_ONCE)
def test_outputs_that_a_loss_has_changed_are_not_used_again(method, stats):
    sharp = SharpnessAware(linear(), method, halved, stats=stats)

    def twice() -> None:
        sharp(POINTS, LABELS)
        sharp.clean  # noqa: B018

    with pytest.raises(ValueError, match=CHANGED):
        twice()


def test_outputs_that_the_loss_takes_apart_are_not_used_again():
    def popped(outputs: dict[str, Tensor], targets: Tensor) -> Tensor:
        return cross_entropy(outputs.pop("logits"), targets)

    oracle = ModelOracle(linear(), popped, lambda model, x, y: ({"logits": model(x), "x": x}, y))
    with pytest.raises(ValueError, match=CHANGED):
        oracle.query((POINTS, LABELS)).under(lambda outputs, targets: outputs["x"].sum())
