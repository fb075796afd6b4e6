"""SharpnessAware: training and evaluation, metrics, any batch, mixed precision, and autograd as with any loss."""

from __future__ import annotations

import copy
import pickle
import sys
import warnings
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

import bisam
from bisam import (
    AESAM,
    ASAM,
    ERM,
    FSAM,
    KSAM,
    MSAM,
    RSAM,
    SAM,
    Accumulated,
    BiSAM,
    LookSAM,
    ModelOracle,
    SharpnessAware,
    Vector,
    cross_entropy,
    displaced,
)
from bisam.perturbations import L2
from tests.support import cases
from tests.support.cases import LABELS, POINTS, buffers, everything, gradients, linear, normed, parameters
from tests.support.doubles import at_call, throw
from tests.support.runs import grads_of, twins


def plain(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(model(x), y).mean()


def autograd_grads(loss: Tensor, model: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))


# Training and evaluation.


def test_in_training_it_is_the_loss_at_the_displaced_weights():
    model, batch = normed(), cases.batch()
    base = plain(copy.deepcopy(model), *batch)
    loss = SharpnessAware(model, SAM(L2(0.5)), cross_entropy)(*batch)
    assert loss > base + 0.05
    assert loss.requires_grad


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_it_is_the_plain_loss(context):
    model, batch = normed(), cases.batch()
    twin, sharp = copy.deepcopy(model), SharpnessAware(model, SAM(L2(0.5)), cross_entropy)
    with context():
        loss, expected = sharp(*batch), plain(twin, *batch)
    assert torch.equal(loss, expected)
    assert not loss.requires_grad
    assert buffers(model) == buffers(twin)
    assert sharp(*batch) > expected + 0.05  # and afterwards it trains again


@pytest.mark.parametrize("to_eval", [lambda sharp: sharp.eval(), lambda sharp: sharp.model.eval()])
@pytest.mark.parametrize("to_train", [lambda sharp: sharp.train(), lambda sharp: sharp.model.train()])
def test_the_mode_is_the_model_s_however_it_was_set(to_eval, to_train):
    model, batch = normed(), cases.batch()
    sharp = SharpnessAware(model, SAM(L2(0.5)), cross_entropy)
    before = everything(model)
    to_eval(sharp)
    with pytest.warns(UserWarning, match="eval mode") if sharp.training else nullcontext():
        assert torch.equal(sharp(*batch), plain(model, *batch))
    assert everything(model) == before
    to_train(sharp)
    sharp(*batch)
    assert buffers(model) != before[1]


def test_in_eval_with_gradients_it_is_differentiable_as_a_plain_loss():
    model, (x, y) = normed().eval(), cases.batch()
    x.requires_grad_()
    sharp = SharpnessAware(model, SAM(L2(0.5)), cross_entropy).eval()
    inputs = [x, *model.parameters()]
    actual = torch.autograd.grad(sharp(x, y), inputs, create_graph=True)
    expected = torch.autograd.grad(plain(model, x, y), inputs)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    sum((a**2).sum() for a in actual).backward()  # twice, too
    assert sharp.get_extra_state()["step"] == 0


def test_a_fully_frozen_model_can_be_evaluated():
    model, batch = normed().eval().requires_grad_(False), cases.batch()
    loss = SharpnessAware(model, SAM(), cross_entropy)(*batch)
    assert torch.equal(loss, plain(model, *batch))
    assert not loss.requires_grad


# Metrics at no extra pass.


@pytest.mark.parametrize("method", [ERM(), SAM(L2(0.5)), BiSAM(0.5), ASAM(0.5), MSAM(3, BiSAM(0.5))], ids=str)
def test_clean_is_the_training_loss_and_the_outputs_at_the_weights(method):
    model, (x, y) = cases.mlp(), cases.batch()
    sharp, calls = SharpnessAware(model, method, cross_entropy), []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    sharp(x, y)
    passes, clean = len(calls), sharp.clean
    assert len(calls) == passes == {ERM: 1, SAM: 2, MSAM: 6}[type(method)]
    outputs = model(x).detach()
    close = {"rtol": 0, "atol": 1e-15}
    torch.testing.assert_close(clean.outputs, outputs, **close)
    torch.testing.assert_close(clean.losses, cross_entropy(outputs, y), **close)
    torch.testing.assert_close(clean.value, cross_entropy(outputs, y).mean(), **close)
    assert clean.grad is None
    assert not clean.losses.requires_grad
    assert not clean.outputs.requires_grad


def test_clean_of_an_evaluation_is_that_batch():
    model, (x, y) = cases.mlp(), cases.batch()
    sharp = SharpnessAware(model, BiSAM(), cross_entropy)
    sharp(x, y)
    sharp.eval()
    sharp(x[:3], y[:3])
    assert torch.equal(sharp.clean.outputs, model(x[:3]))
    assert not sharp.clean.outputs.requires_grad


def test_clean_of_inference_mode_can_be_read_outside():
    sharp = SharpnessAware(cases.mlp(), BiSAM(), cross_entropy)
    with torch.inference_mode():
        value = sharp(*cases.batch())
    assert torch.equal(sharp.clean.value, value)


@pytest.mark.parametrize("method", [SAM(), BiSAM(), MSAM(3)], ids=str)
def test_clean_leaves_ignored_targets_out_of_the_value(method):
    model, (x, y) = cases.mlp(), cases.batch()
    y[[0, 4, 7]] = -100
    sharp = SharpnessAware(model, method, cross_entropy)
    sharp(x, y)
    if not isinstance(method, MSAM):  # whose parts count by their size
        torch.testing.assert_close(sharp.clean.value, nn.functional.cross_entropy(model(x), y), rtol=0, atol=1e-15)
    assert sharp.clean.losses[[0, 4, 7]].tolist() == [0, 0, 0]


class OfSequences(nn.CrossEntropyLoss):
    """One loss for each sequence, of a class that has an `ignore_index` for its labels."""

    def __init__(self) -> None:
        super().__init__(reduction="none")

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return super().forward(input, target).sum(1) / (target != self.ignore_index).sum(1)


def sequences() -> tuple[nn.Module, Tensor, Tensor]:
    """A model of tokens, and a batch with other numbers of labels in each of its sequences."""
    torch.manual_seed(0)
    x, y = torch.randn(8, 6, 5).double(), torch.randint(4, (8, 5))
    for i in range(8):
        y[i, 1 + i // 2 :] = -100
    return nn.Conv1d(6, 4, 1).double(), x, y


@pytest.mark.parametrize("method", [ERM(), SAM(L2(0.5)), Accumulated(3, SAM(L2(0.5))), KSAM(8, ERM())], ids=str)
def test_a_loss_of_sequences_is_averaged_over_the_sequences(method):
    """It has fewer values than labels, so that the number of those that count does not divide it."""
    results = []
    for loss in (OfSequences(), lambda outputs, targets: OfSequences()(outputs, targets)):
        model, x, y = sequences()
        sharp = SharpnessAware(model, method, loss)
        value = sharp(x, y)
        value.backward()
        results.append((value.detach(), sharp.clean.value, *[p.grad for p in model.parameters()]))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-14)
    model, x, y = sequences()
    torch.testing.assert_close(results[0][1], OfSequences()(model(x), y).mean().detach(), rtol=0, atol=1e-14)


def test_losses_of_rows_of_pixels_are_averaged_over_rows():
    """One loss for each row (N, H), of labels (N, H, W)."""

    class OfRows(nn.CrossEntropyLoss):
        def forward(self, input: Tensor, target: Tensor) -> Tensor:
            return super().forward(input, target).mean(2)

    model, x = nn.Conv2d(3, 4, 1).double(), torch.randn(2, 3, 5, 6).double()
    y, loss = torch.randint(4, (2, 5, 6)), OfRows(reduction="none")
    y[0, 1] = -100
    clean = ModelOracle(model, loss).query((x, y))
    torch.testing.assert_close(clean.value, loss(model(x), y).mean().detach(), rtol=0, atol=1e-15)
    torch.testing.assert_close(clean.per_example, loss(model(x), y).mean(1).detach(), rtol=0, atol=1e-15)


MEANS = {
    "CrossEntropyLoss": (nn.CrossEntropyLoss(), nn.Identity()),
    "cross_entropy": (nn.functional.cross_entropy, nn.Identity()),
    "NLLLoss": (nn.NLLLoss(), nn.LogSoftmax(1)),
    "nll_loss": (nn.functional.nll_loss, nn.LogSoftmax(1)),
}
"""Means over the labels that are not ignored, and the layer before them."""


@pytest.mark.parametrize("name", MEANS)
def test_parts_of_a_mean_over_labels_count_as_many_as_they_have(name):
    loss, last = MEANS[name]
    results = []
    for method in (SAM(L2(0.5)), Accumulated(3, SAM(L2(0.5)))):
        model, x, y = sequences()
        sharp = SharpnessAware(nn.Sequential(model, last), method, loss)
        value = sharp(x, y)
        value.backward()
        results.append((value.detach(), sharp.clean.value, *[p.grad for p in model.parameters()]))
        assert float(sharp.clean.count) == int((y != -100).sum())
    for whole, parts in zip(*results, strict=True):
        torch.testing.assert_close(parts, whole, rtol=0, atol=1e-14)
    model, x, y = sequences()
    oracle = ModelOracle(nn.Sequential(model, last), lambda outputs, targets: loss(outputs, targets))
    assert oracle.query((x, y)).under(loss).count == (y != -100).sum()  # also of an answer with another objective


@pytest.mark.parametrize("method", [SAM(), MSAM(4)], ids=str)
def test_clean_of_a_scalar_loss_is_a_scalar(method):
    model, (x, y) = cases.mlp(), cases.batch()
    sharp = SharpnessAware(model, method, nn.CrossEntropyLoss())
    sharp(x, y)
    torch.testing.assert_close(sharp.clean.losses, plain(model, x, y).detach(), rtol=0, atol=1e-15)


def test_clean_joins_nested_outputs():
    model, (x, y) = cases.mlp(), cases.batch()
    sharp = SharpnessAware(
        model,
        MSAM(3),
        lambda outputs, targets: cross_entropy(outputs["logits"], targets["y"]),
        lambda model, x, y: ({"logits": model(x), "aux": (x, "name")}, {"y": y}),
    )
    sharp(x, y)
    assert sharp.clean.outputs["logits"].shape == (8, 4)
    assert torch.equal(sharp.clean.outputs["aux"][0], x)
    assert sharp.clean.outputs["aux"][1] == "name"


def test_clean_before_a_call_says_so():
    with pytest.raises(RuntimeError, match="calling the loss on a batch"):
        _ = SharpnessAware(cases.mlp(), SAM(), cross_entropy).clean


def test_clean_of_a_method_that_never_queried_the_weights_says_so():
    def method(oracle, batch):
        return oracle.query(batch, at=oracle.weights * 0.1)

    sharp = SharpnessAware(cases.mlp(), method, cross_entropy)
    sharp(*cases.batch())
    with pytest.raises(RuntimeError, match="nothing was evaluated at the weights"):
        _ = sharp.clean


# Batches and losses of any kind.


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = cases.mlp()

    def forward(self, a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
        return self.net(a + scale * b)


@pytest.mark.parametrize("method", [SAM(L2(0.5)), BiSAM(0.5), MSAM(3)], ids=str)
def test_any_batch_goes_through_forward(method):
    model, (x, y) = TwoInputs(), cases.batch()
    b = x.flip(0)
    ways = [
        (None, (x, b, y)),
        (
            lambda model, batch: (model(**batch["inputs"]), batch["labels"]),
            ({"inputs": {"a": x, "b": b}, "labels": y},),
        ),
        (lambda model, pair, y: (model(*pair), y), ([x, b], y)),
        (lambda model, y, x, b: (model(x, b), y), (y, x, b)),
    ]
    results = []
    for forward, batch in ways:
        results.append(autograd_grads(SharpnessAware(model, method, cross_entropy, forward)(*batch), model))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_outputs_may_be_a_tuple():
    model, (x, y) = cases.mlp(), cases.batch()
    sharp = SharpnessAware(
        model,
        SAM(L2(0.5)),
        lambda outputs, targets: cross_entropy(outputs[0], targets) + 0.1 * outputs[1].abs().sum(1),
        lambda model, x, y: ((model(x), model[:1](x)), y),
    )
    loss = sharp(x, y)
    assert loss.requires_grad
    assert [tuple(o.shape) for o in sharp.clean.outputs] == [(8, 4), (8, 8)]


def test_a_forward_may_take_no_batch():
    """Full-batch training, where the closure has the data."""
    model, (x, y) = cases.mlp(), cases.batch()
    loss = SharpnessAware(model, SAM(L2(0.5)), cross_entropy, lambda model: (model(x), y))()
    assert torch.equal(loss, SharpnessAware(model, SAM(L2(0.5)), cross_entropy)(x, y))


def test_a_scalar_loss_is_taken_by_methods_that_need_no_more():
    model, (x, y) = cases.mlp(), cases.batch()
    for method in (ERM(), SAM(L2(0.5)), BiSAM(0.5), ASAM(0.5), MSAM(4)):
        actual = autograd_grads(SharpnessAware(model, method, nn.CrossEntropyLoss())(x, y), model)
        expected = autograd_grads(SharpnessAware(model, method, cross_entropy)(x, y), model)
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=0, atol=1e-15)


def hardest_half(oracle, batch):
    x, y = batch
    losses = oracle.query(batch, grad=False).per_example
    top = losses.topk(len(losses) // 2).indices
    return SAM()(oracle, (x[top], y[top]))


def test_a_scalar_loss_is_refused_by_a_method_that_selects_examples():
    model, batch = cases.mlp(), cases.batch()
    SharpnessAware(model, hardest_half, nn.CrossEntropyLoss(reduction="none"))(*batch).backward()
    with pytest.raises(TypeError, match='reduction="none"'):
        SharpnessAware(model, hardest_half, nn.CrossEntropyLoss())(*batch)


@pytest.mark.parametrize(
    "loss",
    [
        cross_entropy,
        nn.CrossEntropyLoss(reduction="none"),
        nn.CrossEntropyLoss(ignore_index=2, reduction="none"),
        nn.CrossEntropyLoss(label_smoothing=0.1, reduction="none"),
        nn.NLLLoss(ignore_index=1, reduction="none"),
    ],
    ids=str,
)
@pytest.mark.parametrize("training", [True, False])
def test_ignored_targets_count_as_in_torch_s_mean(loss, training):
    model, (x, y) = cases.mlp().train(training), cases.batch()
    ignored = loss.ignore_index
    y[[1, 5]] = ignored
    reduced = copy.deepcopy(loss) if isinstance(loss, nn.Module) else nn.CrossEntropyLoss()
    reduced.reduction = "mean"
    expected = reduced(model(x), y)
    actual = SharpnessAware(model, ERM(), loss)(x, y)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-15)
    for a, e in zip(autograd_grads(actual, model), autograd_grads(expected, model), strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=1e-15)
    # and the displaced loss is that of the rest of the batch
    keep = y != ignored
    if training:
        sam = [SharpnessAware(model, SAM(L2(0.5)), loss)(x[m], y[m]) for m in (slice(None), keep)]
        torch.testing.assert_close(*sam, rtol=0, atol=1e-14)


class Temperature(nn.Module):
    """A loss with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.log_t = nn.Parameter(torch.tensor(0.3, dtype=torch.double))

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(outputs / self.log_t.exp(), targets) + self.log_t


def test_a_loss_with_parameters_is_trained_and_displaced():
    model, loss, (x, y) = cases.mlp(), Temperature(), cases.batch()
    names = [name for name, _ in model.named_parameters()]
    assert list(ModelOracle(model, loss).names) == [*names, "loss.log_t"]

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.loss = copy.deepcopy(model), copy.deepcopy(loss)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.loss(self.model(x), y)

    both, sharp = Both(), SharpnessAware(model, SAM(L2(0.5)), loss)
    assert [name for name, _ in sharp.named_parameters()] == [f"model.{n}" for n in names] + ["loss.log_t"]
    sharp(x, y).backward()
    SharpnessAware(both, SAM(L2(0.5)), lambda losses, y: losses, forward=lambda both, x, y: (both(x, y), y))(
        x, y
    ).backward()
    assert torch.equal(loss.log_t.grad, both.loss.log_t.grad)
    assert gradients(model) == gradients(both.model)
    assert loss.log_t == 0.3


def test_a_method_with_memory_resumes_with_a_loss_that_has_parameters():
    def method(oracle, batch):
        oracle.state["w"] = oracle.weights.clone()
        return oracle.query(batch)

    sharp = SharpnessAware(cases.mlp(), method, Temperature())
    sharp(*cases.batch())
    other = SharpnessAware(cases.mlp(), method, Temperature())
    other.load_state_dict(sharp.state_dict())
    assert other.get_extra_state()["state"]["w"]["__vector__"][-1] == 0.3


# Mixed precision.


@pytest.mark.parametrize("method", [ERM(), SAM(L2(0.5)), BiSAM(0.5), ASAM(0.5), MSAM(4, SAM(L2(0.5)))], ids=str)
@pytest.mark.parametrize("outside", [True, False])
def test_autocast_is_that_of_each_query(method, outside):
    """Around the step or inside the model, where nothing can be kept from one query to the next."""
    torch.manual_seed(1)
    model, (x, y) = cases.mlp().float(), cases.batch()
    x = x.float()

    def forward(model, x, y):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(x), y

    sharp = SharpnessAware(model, method, cross_entropy)
    with torch.autocast("cpu", dtype=torch.bfloat16) if outside else nullcontext():
        loss = sharp(x, y) if outside else SharpnessAware(model, method, cross_entropy, forward)(x, y)
    exact = SharpnessAware(model, method, cross_entropy)(x, y)
    torch.testing.assert_close(loss.float(), exact, rtol=0.02, atol=0)
    for g, e in zip(autograd_grads(loss, model), autograd_grads(exact, model), strict=True):
        assert g.dtype == torch.float32
        assert (g - e).norm() < 0.1 * e.norm()
    if outside:
        assert sharp.clean.outputs.dtype == torch.bfloat16


def test_autocast_after_a_step_sees_the_restored_weights():
    model, (x, y) = cases.mlp().float(), cases.batch()
    x = x.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sharp = SharpnessAware(model, SAM(L2(5.0)), cross_entropy)
        sharp(x, y)
        assert torch.equal(model(x), expected)


def test_autocast_after_a_query_without_gradient_still_has_one():
    model, (x, y) = cases.mlp().float(), cases.batch()

    def method(oracle, batch):
        oracle.query(batch, grad=False, track=False)
        return oracle.query(batch)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        SharpnessAware(model, method, cross_entropy)(x.float(), y).backward()
    assert None not in gradients(model).values()


def test_half_precision_parameters_warn_once():
    model, (x, y) = cases.mlp().bfloat16(), cases.batch()
    sharp = SharpnessAware(model, SAM(), cross_entropy)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            sharp(x.bfloat16(), y)
    assert [str(w.message).split(":")[0] for w in caught] == ["the model has torch.bfloat16 parameters"]
    assert "autocast" in str(caught[0].message)


# Refusals.


@pytest.mark.parametrize("scale", [1024.0, torch.amp.GradScaler])
def test_a_scale_of_another_kind_is_named(scale):
    with pytest.raises(TypeError, match="scale"):
        SharpnessAware(cases.mlp(), SAM(), cross_entropy, scaler=scale)


def test_print_shows_the_method():
    assert "method=SAM(0.05)" in repr(SharpnessAware(cases.mlp(), SAM(), cross_entropy))


# A loss like any other.


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


KEEPS = {
    "the evaluation": lambda answer: answer,
    "the vector": lambda answer: answer.gradient,
    "one tensor": lambda answer: answer.gradient.tensors[-1],
    "views": lambda answer: [t.view(-1) for t in answer.gradient.tensors],
}


@pytest.mark.parametrize("what", KEEPS)
@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_a_gradient_that_a_method_keeps_is_not_multiplied(factor, what):
    kept, tensors, before = [], [], []

    def method(oracle, batch):
        answer = SAM()(oracle, batch)
        kept.append(KEEPS[what](answer))
        before.extend(t.clone() for t in answer.gradient.tensors)
        return answer

    model = cases.mlp()
    (factor * SharpnessAware(model, method, cross_entropy)(*cases.batch())).backward()
    (one,) = kept
    match what:
        case "one tensor":
            tensors, before = [one], before[-1:]
        case "views":
            tensors = [t.view_as(b) for t, b in zip(one, before, strict=True)]
        case _:
            tensors = getattr(one, "gradient", one).tensors
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


def test_a_factor_of_the_loss_needs_no_second_gradient_and_keeps_what_another_backward_pass_needs():
    method = Kept()
    model = cases.mlp()
    sharp = SharpnessAware(model, method, cross_entropy)
    once = grads_of(sharp(*cases.batch()), model)
    model.zero_grad(set_to_none=True)
    (sharp(*cases.batch()) / 4).backward()
    assert [p.grad.data_ptr() for p in model.parameters()] == method.places
    assert all(torch.equal(4 * p.grad, g) for p, g in zip(model.parameters(), once, strict=True))
    model.zero_grad(set_to_none=True)
    loss = sharp(*cases.batch()) / 4
    loss.backward(retain_graph=True)
    assert all(torch.equal(4 * p.grad, g) for p, g in zip(model.parameters(), once, strict=True))
    loss.backward()
    assert all(torch.equal(2 * p.grad, g) for p, g in zip(model.parameters(), once, strict=True))


class Summed(nn.Module):
    """A model with a bias whose gradient is expanded from one number."""

    def __init__(self):
        super().__init__()
        self.layer, self.shift = nn.Linear(4, 3), nn.Parameter(torch.randn(2, 5))

    def forward(self, x):
        return self.layer(x) + self.shift.sum() * torch.arange(3)


@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0])
def test_an_expanded_gradient_is_multiplied(factor):
    model, batch = Summed(), (torch.randn(8, 4), torch.arange(8) % 3)
    sharp = SharpnessAware(model, ERM(), cross_entropy)
    assert set(sharp.oracle().query(batch).gradient.tensors[0].stride()) == {0}
    expected = grads_of(factor * nn.functional.cross_entropy(model(batch[0]), batch[1]), model)
    model.zero_grad()
    for g, wanted in zip(grads_of(factor * sharp(*batch), model), expected, strict=True):
        torch.testing.assert_close(g, wanted)


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_gradients_of_a_retained_graph_are_the_callers(factor):
    model = cases.mlp()
    once = grads_of(SharpnessAware(model, SAM(), cross_entropy)(*cases.batch()), model)
    loss, parameters = factor * SharpnessAware(model, SAM(), cross_entropy)(*cases.batch()), list(model.parameters())
    for p in (parameters, parameters[:1]):
        for g in torch.autograd.grad(loss, p, retain_graph=True):
            g.zero_()
    for g, wanted in zip(torch.autograd.grad(loss, parameters), once, strict=True):
        torch.testing.assert_close(g, factor * wanted)


class Kept:
    """SAM that notes where its gradient is, and keeps it or not."""

    def __init__(self, keeps=lambda oracle, gradient: None):
        self.keeps, self.places = keeps, []

    def __call__(self, oracle, batch):
        answer = SAM(0.5)(oracle, batch)
        self.places = [t.data_ptr() for t in answer.gradient]
        self.keeps(oracle, answer.gradient)
        return answer


def test_backward_copies_no_gradient():
    model, method = cases.mlp(), Kept()
    SharpnessAware(model, method, cross_entropy)(*cases.batch()).backward()
    assert [p.grad.data_ptr() for p in model.parameters()] == method.places


def test_a_factor_or_an_earlier_gradient_does():
    model, method = cases.mlp(), Kept()
    sharp = SharpnessAware(model, method, cross_entropy)
    once = grads_of(sharp(*cases.batch()), model)
    model.zero_grad()
    (sharp(*cases.batch()) / 4).backward()
    assert all(torch.equal(p.grad, g / 4) for p, g in zip(model.parameters(), once, strict=True))
    sharp(*cases.batch()).backward()
    assert all(torch.equal(p.grad, g / 4 + g) for p, g in zip(model.parameters(), once, strict=True))


def _in_the_state(oracle, gradient):
    oracle.state["g"] = gradient


def _as_views_in_a_part_of_the_state(oracle, gradient):
    oracle.within("part").state["g"] = gradient.like([t.detach() for t in gradient])


HELD = []


@pytest.mark.parametrize(
    "keeps",
    [_in_the_state, _as_views_in_a_part_of_the_state, lambda _, gradient: HELD.append(gradient)],
    ids=["state", "views", "elsewhere"],
)
def test_a_gradient_that_something_keeps_is_not_changed_by_the_loop(keeps):
    model, method = cases.mlp(), Kept(keeps)
    sharp = SharpnessAware(model, method, cross_entropy)
    sharp(*cases.batch()).backward()
    kept = HELD[-1] if HELD else next(leaf for leaf in tree_leaves(sharp._memory.state) if isinstance(leaf, Vector))
    before = [t.clone() for t in kept]
    for p in model.parameters():
        p.grad.zero_()
    assert all(torch.equal(t, b) and b.any() for t, b in zip(kept, before, strict=True))
    HELD.clear()


def test_a_method_that_returns_the_weights_as_its_gradient_does_not_share_them():
    def decay(oracle, batch):
        return replace(oracle.query(batch), grad=oracle.weights)

    model = cases.mlp()
    before = [p.detach().clone() for p in model.parameters()]
    SharpnessAware(model, decay, cross_entropy)(*cases.batch()).backward()
    for p in model.parameters():
        p.grad.zero_()
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_the_gradient_of_a_retained_graph_is_not_changed_by_the_loop():
    model = cases.mlp()
    sharp = SharpnessAware(model, SAM(), cross_entropy)
    once = grads_of(sharp(*cases.batch()), model)
    model.zero_grad()
    loss = sharp(*cases.batch())
    loss.backward(retain_graph=True)
    for p in model.parameters():
        p.grad.zero_()
    loss.backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), once, strict=True))


@pytest.mark.parametrize("function", [lambda loss: loss, lambda loss: loss**2, lambda loss: 2 * loss + 1])
@pytest.mark.parametrize(
    "differentiate",
    [
        lambda loss, model: torch.autograd.grad(loss, list(model.parameters()), create_graph=True),
        lambda loss, model: loss.backward(create_graph=True),
    ],
    ids=["grad", "backward"],
)
def test_a_graph_of_the_gradient_is_refused_where_it_is_asked_for(function, differentiate):
    model = cases.mlp()
    loss = function(SharpnessAware(model, SAM(), cross_entropy)(*cases.batch()))
    with pytest.raises(RuntimeError, match=r"differentiated once.*constant.*inside `forward` or `loss`"):
        differentiate(loss, model)
    assert set(gradients(model).values()) == {None}


def test_a_loss_whose_graph_was_refused_can_still_be_differentiated():
    model = cases.mlp()
    sharp = SharpnessAware(model, SAM(), cross_entropy)
    once = grads_of(sharp(*cases.batch()), model)
    model.zero_grad()
    loss = sharp(*cases.batch())
    with pytest.raises(RuntimeError, match="differentiated once"):
        loss.backward(create_graph=True)
    assert all(torch.equal(g, h) for g, h in zip(grads_of(loss, model), once, strict=True))


def test_the_gradient_of_the_loss_has_no_graph_inside_a_backward_pass_either():
    """As in re-entrant checkpointing, which enables gradients in a backward pass to run a forward pass."""
    model = cases.mlp()
    sharp = SharpnessAware(model, SAM(), cross_entropy)

    class Again(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, factor):
            with torch.enable_grad():
                sharp(*cases.batch()).backward()
            return factor

    Again.apply(torch.ones((), requires_grad=True)).backward()
    grads = [p.grad for p in model.parameters()]
    assert not any(g.requires_grad for g in grads)
    model.zero_grad()
    assert all(torch.equal(g, h) for g, h in zip(grads, grads_of(sharp(*cases.batch()), model), strict=True))


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


# Clean values are computed once, and under autocast.


def test_clean_is_computed_once():
    calls = []

    def loss(outputs, targets):
        calls.append(1)
        return cross_entropy(outputs, targets)

    sharp = SharpnessAware(linear(), BiSAM(), loss)
    sharp(POINTS, LABELS)
    before = len(calls)
    first = sharp.clean
    assert sharp.clean is first
    assert len(calls) == before + 1


def test_clean_is_the_same_under_autocast_and_after_it():
    model = linear().float()
    sharp = SharpnessAware(model, BiSAM(), cross_entropy)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sharp(POINTS.float(), LABELS)
        inside = sharp.clean.losses
        sharp(POINTS.float(), LABELS)
    assert sharp.clean.losses.dtype == torch.float32
    assert torch.equal(sharp.clean.losses, inside)


# The model in eval mode.


def test_a_step_with_the_model_in_eval_mode_is_warned_of_once():
    model, batch = normed().eval(), cases.batch()
    sharp = SharpnessAware(model, SAM(L2(0.5)), cross_entropy)
    with pytest.warns(UserWarning, match=r"eval mode.*model.train\(\).*in_eval_mode=True"):
        assert torch.equal(sharp(*batch), plain(model, *batch))
    sharp(*batch)  # pytest turns a second warning into an error


@pytest.mark.parametrize(
    "evaluate",
    [
        lambda sharp, batch: sharp.eval()(*batch),
        lambda sharp, batch: torch.no_grad()(sharp)(*batch),
        lambda sharp, batch: torch.inference_mode()(sharp)(*batch),
    ],
    ids=["sharp.eval()", "no_grad", "inference_mode"],
)
def test_an_evaluation_is_silent(evaluate):
    model = normed().eval()
    sharp = SharpnessAware(model, SAM(L2(0.5)), cross_entropy)
    assert torch.equal(evaluate(sharp, cases.batch()), plain(model, *cases.batch()))


def test_erm_in_eval_mode_is_the_plain_loss_that_was_asked_for():
    model = normed().eval()
    assert torch.equal(SharpnessAware(model, ERM(), cross_entropy)(*cases.batch()), plain(model, *cases.batch()))


def test_in_eval_mode_the_method_trains_with_frozen_statistics():
    model, twin = twins(lambda: normed().eval())
    before = buffers(model)
    sharp = SharpnessAware(model, SAM(L2(0.5)), cross_entropy, in_eval_mode=True)
    parts = nn.Sequential(*[part.eval() for part in twin])  # itself in training mode, all layers in eval mode
    other = SharpnessAware(parts, SAM(L2(0.5)), cross_entropy)
    value, expected = sharp(*cases.batch()), other(*cases.batch())
    assert torch.equal(value, expected)
    assert value > plain(model, *cases.batch())
    for g, e in zip(autograd_grads(value, model), autograd_grads(expected, parts), strict=True):
        assert torch.equal(g, e)
    assert buffers(model) == before
    sharp.eval()
    assert torch.equal(sharp(*cases.batch()), plain(model, *cases.batch()))


# Averages of the state dict of the loss itself.


def timm_average(sharp):
    from timm.utils import ModelEmaV2

    ModelEmaV2(sharp).update(sharp)


def timm_newer_average(sharp):
    from timm.utils import ModelEmaV3

    ModelEmaV3(sharp).update(sharp)


def average_by_dtype(sharp):
    other = copy.deepcopy(sharp).state_dict()
    for name, value in other.items():
        if value.dtype.is_floating_point:
            value *= 0.9
            value += 0.1 * sharp.state_dict()[name].detach()


def average_by_copy(sharp):
    for value, other in zip(copy.deepcopy(sharp).state_dict().values(), sharp.state_dict().values(), strict=True):
        value.copy_(0.9 * value + 0.1 * other)


def average_by_lerp(sharp):
    for value, other in zip(copy.deepcopy(sharp).state_dict().values(), sharp.state_dict().values(), strict=True):
        value.lerp_(other, 0.1)


AVERAGES = [average_by_dtype, average_by_copy, average_by_lerp, timm_average, timm_newer_average]


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("method", [SAM(), LookSAM()], ids=str)
def test_an_average_of_the_loss_module_works_or_names_the_model(average, method):
    if "timm" in average.__name__:
        pytest.importorskip("timm")
    sharp = SharpnessAware(cases.mlp(), method, cross_entropy)
    sharp(*cases.batch())
    try:
        average(sharp)
    except TypeError as error:
        assert "sharp.model" in str(error)  # noqa: PT017 - some averages work
    else:
        assert average is timm_newer_average  # which takes entries that it can calculate with only


def test_torch_s_average_of_the_loss_module_works():
    sharp = SharpnessAware(cases.mlp(), LookSAM(), cross_entropy)
    sharp(*cases.batch())
    average = torch.optim.swa_utils.AveragedModel(sharp, use_buffers=True)
    average.update_parameters(sharp)
    assert parameters(average.module.model) == parameters(sharp.model)


def test_the_extra_state_is_saved_as_plain_containers(tmp_path):
    sharp = SharpnessAware(cases.mlp(), LookSAM(), cross_entropy)
    sharp(*cases.batch())
    torch.save(sharp.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    other = SharpnessAware(cases.mlp(), LookSAM(), cross_entropy)
    other.load_state_dict(state)
    assert other.get_extra_state()["step"] == 1
    assert not hasattr(sharp.get_extra_state(), "dtype")
    assert getattr(sharp.get_extra_state(), "shape", None) is None
    assert isinstance(copy.deepcopy(sharp.get_extra_state()), dict)
    mapped = tree_map_only(Tensor, lambda t: t * 0, sharp.get_extra_state())  # as whoever gathers tensors does
    assert not any(t.any() for t in tree_leaves(mapped) if isinstance(t, Tensor))
    assert sum(isinstance(t, Tensor) for t in tree_leaves(mapped)) == 4


@pytest.mark.parametrize(
    ("method", "state"),
    [
        (LookSAM(), {"v": 5}),
        (AESAM(steps=9), {"mu": "text"}),
        (FSAM(0.1), {"perturb": {"m": "text"}}),
        (lambda oracle, batch: oracle.query(batch, at=oracle.state["old"]), {"new": 1}),
    ],
    ids=["another type", "a text", "another type in a part", "a function"],
)
def test_a_loaded_state_that_the_method_cannot_use_is_named_as_the_cause(method, state):
    sharp = SharpnessAware(cases.mlp(), method, cross_entropy)
    sharp.load_state_dict({**sharp.state_dict(), "_extra_state": {"step": 1, "method": None, "state": state}})
    before = parameters(sharp.model)
    with pytest.raises(ValueError, match=r"with the state that was loaded \((Attribute|Key|Type)Error: ") as e:
        sharp(*cases.batch())
    assert "begin with an empty state" in str(e.value)
    assert parameters(sharp.model) == before
    assert sharp.get_extra_state()["step"] == 1


def test_an_error_after_the_first_step_with_a_loaded_state_is_not_blamed_on_it():
    def fails(oracle, batch):
        oracle.state["n"] = oracle.state.get("n", 0) + 1
        if oracle.state["n"] > 2:
            raise KeyError("later")
        return oracle.query(batch)

    sharp = SharpnessAware(cases.mlp(), fails, cross_entropy)
    sharp(*cases.batch())
    sharp.load_state_dict(sharp.state_dict())
    sharp(*cases.batch())
    with pytest.raises(KeyError, match="later"):
        sharp(*cases.batch())


# A call that is interrupted.


class Interrupt(KeyboardInterrupt):
    pass


@pytest.mark.parametrize("method", [SAM(L2(0.5)), BiSAM(0.5), LookSAM(), MSAM(4), RSAM(0.1)], ids=str)
def test_a_call_that_is_interrupted_anywhere_leaves_all_as_it_was(method):
    interrupted(method)


def test_a_call_that_records_statistics_is_interrupted_anywhere():
    interrupted(BiSAM(0.5), stats=True)


def interrupted(method, stats=False):
    """At each line of bisam in turn."""
    model = normed()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
        p.register_hook(lambda g: g)
    sharp = SharpnessAware(model, method, cross_entropy, stats=stats)
    sharp(*cases.batch(1)).backward()
    found = sharp.stats if stats else None
    inside = str(Path(bisam.__file__).parent)

    def state():
        hooks = [list(p._backward_hooks) for p in model.parameters()]
        return everything(model), pickle.dumps(sharp.get_extra_state()), hooks, torch.is_grad_enabled(), displaced()

    before, at, done = state(), 0, False
    while not done:
        at += 7
        count = 0

        def trace(frame, event, argument):
            nonlocal count
            if inside in frame.f_code.co_filename and event == "line":
                count += 1
                if count == at:  # noqa: B023
                    raise Interrupt
            return trace

        sys.settrace(trace)
        try:
            sharp(*cases.batch(2))
            done = True
        except Interrupt:
            pass
        finally:
            sys.settrace(None)
        if not done:
            assert state() == before, f"at line event {at}"
            assert found is None or sharp.stats is found
    assert at > 300


@pytest.mark.parametrize("k", [1, 3])
def test_schedules_count_steps_of_the_optimizer(k):
    radii: list[int] = []
    seen, method = [], bisam.Every(2, SAM(L2(lambda step: radii.append(step) or 0.1)))
    radii.clear()  # the check of the radius asks for the first value
    sharp = SharpnessAware(linear(), method, cross_entropy, accumulation=k)
    for _ in range(5 * k):
        sharp(POINTS, LABELS)
        seen.append(sharp.oracle().step)
    assert radii == [turn for turn in range(3) for _ in range(k)]  # at steps 0, 2 and 4 of the optimizer
    assert seen == [(number + 1) // k for number in range(5 * k)]
    assert sharp.get_extra_state()["step"] == 5 * k
