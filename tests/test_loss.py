"""SharpnessAware as users meet it: modes, metrics, batches of any kind, and what it refuses."""

from __future__ import annotations

import copy
import warnings
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from bisam import (
    ASAM,
    ERM,
    MSAM,
    SAM,
    ABiSAM,
    BiSAM,
    Evaluation,
    LowerBound,
    ModelOracle,
    NegLog,
    SharpnessAware,
    Tanh,
    Vector,
    cross_entropy,
)
from bisam.perturbations import L2, Adaptive
from tests.support import cases
from tests.support.cases import buffers, everything, gradients, parameters


def normed() -> nn.Sequential:
    return cases.mlp(nn.BatchNorm1d)


def plain(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(model(x), y).mean()


def grads_of(loss: Tensor, model: nn.Module) -> list[Tensor]:
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
    assert torch.equal(sharp(*batch), plain(model, *batch))
    assert everything(model) == before
    to_train(sharp)
    sharp(*batch)
    assert buffers(model) != before[1]


def test_in_eval_with_gradients_it_is_differentiable_as_a_plain_loss():
    model, (x, y) = normed().eval(), cases.batch()
    x.requires_grad_()
    sharp = SharpnessAware(model, SAM(L2(0.5)), cross_entropy)
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
        results.append(grads_of(SharpnessAware(model, method, cross_entropy, forward)(*batch), model))
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
        actual = grads_of(SharpnessAware(model, method, nn.CrossEntropyLoss())(x, y), model)
        expected = grads_of(SharpnessAware(model, method, cross_entropy)(x, y), model)
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
    for a, e in zip(grads_of(actual, model), grads_of(expected, model), strict=True):
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
    for g, e in zip(grads_of(loss, model), grads_of(exact, model), strict=True):
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


# What is refused.


@pytest.mark.parametrize("bad", [-0.1, float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("rho", L2),
        ("rho", Adaptive),
        ("eta", lambda eta: Adaptive(0.5, eta)),
        ("rho", BiSAM),
        ("rho", ASAM),
        ("eta", lambda eta: ASAM(0.5, eta)),
        ("rho", ABiSAM),
        ("eta", lambda eta: ABiSAM(0.5, eta=eta)),
        ("mu", NegLog),
        ("mu", Tanh),
        ("alpha", lambda alpha: Tanh(1.0, alpha)),
        ("mu", lambda mu: LowerBound(torch.tanh, mu)),
    ],
)
def test_a_hyper_parameter_out_of_range_is_named(name, make, bad):
    with pytest.raises(ValueError, match=rf"{name} must be .* finite, got {bad}"):
        make(bad)


@pytest.mark.parametrize("m", [0, -3])
def test_msam_needs_at_least_one_example(m):
    with pytest.raises(ValueError, match=f"at least 1, got {m}"):
        MSAM(m)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((lambda x: x, SAM(), cross_entropy), "model must be a torch.nn.Module, got function"),
        ((nn.Linear, SAM(), cross_entropy), "model must be a torch.nn.Module, got type"),
        ((nn.Linear(1, 1), SAM, cross_entropy), r"method is the class SAM, not an instance: write SAM\(...\)"),
        ((nn.Linear(1, 1), "SAM", cross_entropy), r"method must be SAM\(\), BiSAM\(\) or another .*, got 'SAM'"),
        ((nn.Linear(1, 1), SAM(), nn.CrossEntropyLoss), "loss is the class CrossEntropyLoss, not an instance"),
        ((nn.Linear(1, 1), SAM(), None), "loss must be bisam.cross_entropy or another .*, got None"),
        ((nn.Linear(1, 1), SAM(), cross_entropy, (1, 2)), "forward must be a function .*, got"),
    ],
)
def test_an_argument_of_another_kind_is_named(arguments, message):
    with pytest.raises(TypeError, match=message):
        SharpnessAware(*arguments)


@pytest.mark.parametrize("scale", [1024.0, torch.amp.GradScaler])
def test_a_scale_of_another_kind_is_named(scale):
    with pytest.raises(TypeError, match="scale"):
        SharpnessAware(cases.mlp(), SAM(), cross_entropy, scaler=scale)


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
    model.train(context is torch.no_grad)  # in training mode running statistics move under no_grad, too
    sharp, before = SharpnessAware(model, SAM(), loss, forward), everything(model)
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
    with pytest.raises(ValueError, match=r"torch\.stack"):
        SharpnessAware(nn.Linear(6, 1).double(), BiSAM(), cross_entropy)(X, torch.zeros(8, dtype=torch.long))


def test_print_shows_the_method():
    assert "method=SAM(perturb=L2(rho=0.05)" in repr(SharpnessAware(cases.mlp(), SAM(), cross_entropy))


def test_an_evaluation_s_value_is_the_mean_unless_given():
    losses = torch.tensor([1.0, 3.0])
    assert Evaluation(losses).value == 2
    assert Evaluation(losses, value=torch.tensor(5.0)).value == 5
    with pytest.raises(AssertionError, match="grad=False"):
        _ = Evaluation(losses).gradient
    g = Vector([losses])
    assert Evaluation(losses, g).gradient is g
    assert Evaluation(losses).per_example is losses


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
