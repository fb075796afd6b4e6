"""Models, batches and losses that are not supported are refused by name, and nothing changes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bisam import MSAM, SAM, BiSAM, NegLog, SAMPa, SharpnessAware, cross_entropy
from tests.support import cases
from tests.support.cases import LABELS, POINTS, buffers, everything, linear, normed, parameters

X, Y = cases.batch()


def sparse() -> nn.Module:
    return nn.Sequential(nn.Embedding(10, 8, sparse=True).double(), *normed()[1:])


REFUSED = {
    # name: model, method, loss, forward, batch, error, message
    "targets of another shape": (normed, None, cross_entropy, None, (X, Y[:3]), ValueError, r"need shape \(8,\)"),
    "targets with a dimension too many": (normed, None, cross_entropy, None, (X, Y[:, None]), ValueError, "shape"),
    "labels as float": (normed, None, cross_entropy, None, (X, Y.double()), ValueError, "class probabilities"),
    "labels as int32": (normed, None, cross_entropy, None, (X, Y.int()), TypeError, "int64"),
    "labels as a list": (normed, None, cross_entropy, None, (X, Y.tolist()), TypeError, "targets must be a tensor"),
    "label too large": (normed, None, cross_entropy, None, (X, Y + 2), ValueError, r"label \d is outside \[0, 4\)"),
    "label negative": (normed, None, cross_entropy, None, (X, Y - 1), ValueError, "label -1 is outside"),
    "loss of another shape": (normed, None, lambda o, t: o, None, (X, Y), ValueError, r"returned shape \(8, 4\)"),
    "loss of another length": (normed, None, lambda o, t: o[:5, 0], None, (X, Y), ValueError, r"returned shape \(5,\)"),
    "loss that is a number": (normed, None, lambda o, t: 1.0, None, (X, Y), TypeError, "must return .*, got float"),
    "loss that is a tuple": (normed, None, lambda o, t: (o, o), None, (X, Y), TypeError, "a tuple of 2"),
    "loss that is an accuracy": (normed, None, lambda o, t: o.argmax(1) == t, None, (X, Y), TypeError, "torch.bool"),
    "loss detached": (normed, None, lambda o, t: o.sum(1).detach(), None, (X, Y), ValueError, "does not depend"),
    "nothing trainable": (
        lambda: normed().requires_grad_(False),
        None,
        cross_entropy,
        None,
        (X, Y),
        ValueError,
        "Sequential has no trainable parameter",
    ),
    "nothing trainable, and a method that looks for its state first": (
        lambda: normed().requires_grad_(False),
        SAMPa(ahead=lambda g, oracle: g),
        cross_entropy,
        None,
        (X, Y),
        ValueError,
        "Sequential has no trainable parameter",
    ),
    "sparse gradient": (
        sparse,
        None,
        cross_entropy,
        None,
        (Y, Y),
        ValueError,
        r"gradient of 0.weight is sparse .* sparse=False",
    ),
    "empty batch": (normed, None, cross_entropy, None, (X[:0], Y[:0]), ValueError, "batch is empty"),
    "empty batch in a dict": (
        normed,
        None,
        cross_entropy,
        lambda model, b: (model(b["x"]), b["y"]),
        ({"x": X[:0], "y": Y[:0]},),
        ValueError,
        "batch is empty",
    ),
    "one argument": (normed, None, cross_entropy, None, (X,), TypeError, r"as in sharp\(x, y\), got 1 argument"),
    "no argument": (normed, None, cross_entropy, None, (), TypeError, r"as in sharp\(x, y\), got 0 argument"),
    "forward returning outputs only": (
        normed,
        None,
        cross_entropy,
        lambda model, x, y: model(x),
        (X, Y),
        TypeError,
        r"must return a pair \(outputs, targets\), got a tensor of shape \(8, 4\)",
    ),
    "forward returning three": (
        normed,
        None,
        cross_entropy,
        lambda model, x, y: (model(x), y, None),
        (X, Y),
        TypeError,
        "got a tuple of 3",
    ),
    "outputs in a container": (
        normed,
        None,
        cross_entropy,
        lambda model, x, y: ({"logits": model(x)}, y),
        (X, Y),
        TypeError,
        "outputs must be a tensor, got dict",
    ),
    "tensors of several lengths": (
        normed,
        MSAM(3),
        cross_entropy,
        lambda model, x, weight, y: (model(x), y),
        (X, torch.ones(5), Y),
        ValueError,
        r"\[5, 8\] examples",
    ),
    "method returning a tensor": (
        normed,
        lambda oracle, batch: oracle.query(batch).value,
        cross_entropy,
        None,
        (X, Y),
        (TypeError, AttributeError),
        None,
    ),
    "method without a gradient": (
        normed,
        lambda oracle, batch: oracle.query(batch, grad=False),
        cross_entropy,
        None,
        (X, Y),
        AssertionError,
        "grad=False",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_call_names_the_mistake_and_leaves_nothing(case):
    make, method, loss, forward, batch, error, message = REFUSED[case]
    model = make()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    sharp, before = SharpnessAware(model, method or SAM(), loss, forward), everything(model)
    with pytest.raises(error, match=message):
        sharp(*batch)
    assert everything(model) == before
    assert sharp.get_extra_state() == {"step": 0, "method": None, "state": {}}


@pytest.mark.parametrize("case", ["targets of another shape", "label too large", "loss of another shape"])
@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad])
def test_a_refused_evaluation_leaves_nothing(case, context):
    make, _, loss, forward, batch, error, message = REFUSED[case]
    model = make()
    sharp, before = SharpnessAware(model, SAM(), loss, forward), everything(model)
    sharp.train(context is torch.no_grad)  # in training mode running statistics move under no_grad, too
    with context(), pytest.raises(error, match=message):
        sharp(*batch)
    assert everything(model) == before


def test_bisam_names_a_wrong_label_too():
    model = normed()
    before = everything(model)
    with pytest.raises(ValueError, match="is outside"):
        SharpnessAware(model, BiSAM(), cross_entropy)(X, Y + 2)
    assert everything(model) == before


def test_a_bound_of_one_class_says_what_to_do():
    with pytest.raises(ValueError, match=r"have only one.*use bisam.Binary"):
        SharpnessAware(nn.Linear(6, 1).double(), BiSAM(), cross_entropy)(X, torch.zeros(8, dtype=torch.long))


def test_training_continues_after_a_refusal_as_if_it_had_not_been():
    (first, second), calls = (normed(), normed()), [0, 1]
    second.load_state_dict(first.state_dict())
    for model, refusals in zip((first, second), calls, strict=True):
        sharp = SharpnessAware(model, BiSAM(), cross_entropy)
        for _ in range(refusals):
            with pytest.raises(ValueError, match="shape"):
                sharp(X, Y[:3])
        cases.train(sharp, model)
    assert (parameters(first), buffers(first)) == (parameters(second), buffers(second))


def test_a_loss_inside_its_own_model_is_refused():
    model = cases.mlp()
    model.sharp = SharpnessAware(model, SAM(), cross_entropy)
    with pytest.raises(ValueError, match="the loss is a part of the model that it trains"):
        model.sharp(*cases.batch())


def test_loss_and_bound_must_leave_out_the_same_label():
    loss = nn.CrossEntropyLoss(ignore_index=0, reduction="none")
    with pytest.raises(ValueError, match=r"leaves out label 0, and NegLog.* -100"):
        SharpnessAware(linear(), BiSAM(), loss)(POINTS, LABELS)
    SharpnessAware(linear(), BiSAM(bound=NegLog(ignore_index=0)), loss)(POINTS, LABELS).backward()


def test_parameters_that_deepspeed_partitions_are_refused():
    model = linear()
    model.weight.ds_id = 0  # as ZeRO-3 marks the parameters that it takes away between two passes
    with pytest.raises(ValueError, match="ZeRO-3"):
        SharpnessAware(model, SAM(), cross_entropy)(POINTS, LABELS)


class GradSampleModule(nn.Module):
    """Named as that of Opacus, which wraps a model."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._module = module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._module(x)


class GradSampleModuleFastGradientClipping(GradSampleModule):
    """A subclass, as Opacus has several."""


@pytest.mark.parametrize("wrap", [GradSampleModule, GradSampleModuleFastGradientClipping])
def test_wrappers_for_per_sample_gradients_are_refused_by_name(wrap):
    with pytest.raises(ValueError, match=r"^GradSampleModule.*differentially private training, as in Opacus"):
        SharpnessAware(wrap(linear()), SAM(), cross_entropy)(POINTS, LABELS)


def test_parameters_with_per_sample_gradients_are_refused():
    model = linear()
    model.weight.grad_sample = None  # as hooks without a wrapper leave it
    with pytest.raises(ValueError, match="per-sample gradients"):
        SharpnessAware(model, SAM(), cross_entropy)(POINTS, LABELS)


def test_a_lazy_module_is_refused_until_it_has_run():
    model = nn.Sequential(nn.LazyLinear(5), nn.Linear(5, 4)).double()
    sharp = SharpnessAware(model, SAM(), cross_entropy)
    with pytest.raises(ValueError, match=r"2 parameters have no shape yet \(model.0.weight, model.0.bias\)"):
        sharp(X, Y)
    with torch.no_grad():
        model(X)
    sharp(X, Y).backward()


def test_lazily_conjugated_parameters_are_refused():
    model = linear()
    model.phase = nn.Parameter(torch.ones(2, dtype=torch.cdouble).conj())
    with pytest.raises(ValueError, match=r"1 parameters are conjugated lazily.*resolve_conj"):
        SharpnessAware(model, SAM(), cross_entropy)(POINTS, LABELS)
