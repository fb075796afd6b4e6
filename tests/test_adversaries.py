"""Adversaries beside those of BiSAM's paper: sums over the wrong classes, output bias forgetting, a mu that moves."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

from bisam import (
    ESAM,
    L2,
    OBF,
    SAM,
    Binary,
    BiSAM,
    Every,
    FunctionalSAM,
    LowerBound,
    NegLog,
    SharpnessAware,
    Tanh,
    WrongClasses,
    cross_entropy,
)
from bisam.schedules import Cosine, Follow, Linear
from tests.support import references
from tests.support.cases import LABELS, POINTS, linear

MUS = [0.3, 1.0, 5.0, 65.0]
MARGINS = [None, 0.5, 3.0]
search = settings(deadline=None, derandomize=True, max_examples=150)


def example(n: int = 5, classes: int = 4, rest: tuple[int, ...] = (), seed: int = 0, scale: float = 3.0):
    g = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(n, classes, *rest, generator=g, dtype=torch.double)
    return logits.requires_grad_(), torch.randint(classes, (n, *rest), generator=g)


def gradient(values: Tensor, inputs: Tensor, **options) -> Tensor:
    weights = torch.linspace(0.5, 1.5, values.numel(), dtype=values.dtype).view(values.shape)
    return torch.autograd.grad((values * weights).sum(), inputs, **options)[0]


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def flattened(function, logits: Tensor, labels: Tensor) -> Tensor:
    """A twin of two dimensions for any shape."""
    rows = logits.movedim(1, -1).reshape(-1, logits.shape[1])
    return function(rows, labels.reshape(-1)).view(labels.shape)


def phi_of(bound: LowerBound):
    return references.phi_log if isinstance(bound, NegLog) else references.phi_tanh(bound.alpha)


# The wrong classes alone.


@given(
    st.sampled_from([NegLog, Tanh]),
    st.sampled_from(MUS),
    st.sampled_from(MARGINS),
    st.integers(2, 5),
    st.sampled_from([(), (2,)]),
    st.integers(0, 10**4),
    st.sampled_from([0.1, 3.0, 20.0]),
)
@search
def test_the_sum_over_wrong_classes_is_its_twin(kind, mu, margin, classes, rest, seed, scale):
    bound = kind(mu)
    logits, labels = example(3, classes, rest, seed, scale)

    def twin(rows: Tensor, y: Tensor) -> Tensor:
        return references.q_wrong(phi_of(bound), mu, margin, rows, y)

    values, expected = WrongClasses(bound, margin)(logits, labels), flattened(twin, logits, labels)
    close(values, expected)
    close(gradient(values, logits), gradient(expected, logits), 1e-10)


@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("mu", [1.0, 5.0])
def test_derivatives_in_closed_form(classes, mu):
    """dQ/df_j = softmax(mu phi(F))_j phi'(F_j) over the wrong classes, and minus their sum at the label."""
    logits, labels = example(classes=classes)
    right = F.one_hot(labels, classes).bool()
    margins = logits.detach() - logits.detach()[right][:, None]
    for bound, slope in (
        (NegLog(mu), 1 / (1 + torch.exp(margins) / (math.e - 1))),
        (Tanh(mu, 0.4), 0.4 / torch.cosh(0.4 * margins) ** 2),
    ):
        rows = (mu * bound.phi(margins)).masked_fill(right, -math.inf).softmax(1) * slope
        expected = rows - right * rows.sum(1, keepdim=True)
        for margin in MARGINS:
            weight = 1 if margin is None else torch.exp(-(-margins[~right].view(5, -1)).amin(1).clamp(min=0) / margin)
            found = torch.autograd.grad(WrongClasses(bound, margin)(logits, labels).sum(), logits)[0]
            close(found, expected * (weight if margin is None else weight[:, None]))


def test_of_two_classes_it_is_phi():
    logits, labels = example(classes=2)
    others = logits.gather(1, 1 - labels[:, None])[:, 0] - logits.gather(1, labels[:, None])[:, 0]
    for bound in (NegLog(5.0), Tanh(2.0)):
        close(WrongClasses(bound)(logits, labels), bound.phi(others))


@pytest.mark.parametrize("lead", [2.0, 5.0, 10.0, 20.0, 80.0])
def test_confident_examples_keep_their_gradient_in_float32(lead):
    """With the label's own class in the sum it vanishes; without it, it tends to 1 for -log."""
    logits, label = torch.zeros(1, 10), torch.tensor([0])
    logits[0, 0] = lead
    logits.requires_grad_()
    inside, outside = (
        -torch.autograd.grad(bound(logits, label).sum(), logits)[0][0, 0].item()
        for bound in (NegLog(), WrongClasses(NegLog()))
    )
    expected = 1 / (1 + math.exp(-lead) / (math.e - 1))
    assert outside == pytest.approx(expected, rel=1e-5)
    assert inside < (10 - 1) * math.exp(-lead) * math.e / (math.e - 1) * 1.01


@given(
    st.integers(2, 6).flatmap(
        lambda k: st.lists(
            st.lists(st.sampled_from([0.0, 1.0, -30.0, 1e4, -1e30, 1e30]) | st.floats(-50, 50), min_size=k, max_size=k),
            min_size=1,
            max_size=4,
        )
    ),
    st.sampled_from(MUS),
    st.sampled_from(MARGINS),
    st.sampled_from([torch.float32, torch.float64]),
)
@search
def test_it_is_a_lower_bound_after_the_logarithm_of_the_wrong_classes(rows, mu, margin, dtype):
    """weight (Q - log(K - 1)/mu) <= 1{wrong}; the value is weight Q."""
    logits = torch.tensor(rows, dtype=dtype, requires_grad=True)
    labels = torch.arange(len(rows)) % logits.shape[1]
    label = logits.gather(1, labels[:, None])
    wrong = (logits > label).any(1).to(dtype)
    for bound in (NegLog(mu), Tanh(mu, 0.5)):
        q, weighted = WrongClasses(bound)(logits, labels), WrongClasses(bound, margin)(logits, labels)
        assert weighted.isfinite().all()
        assert gradient(weighted, logits).isfinite().all()
        assert (q - math.log(logits.shape[1] - 1) / mu <= wrong + 1e-5).all()
        weight = torch.where(q == 0, 1.0, weighted / q)
        assert (weight <= 1 + 1e-5).all()
        assert (weight >= 0).all()
        assert (weighted - weight * math.log(logits.shape[1] - 1) / mu <= wrong + 1e-5).all()
        assert (q <= bound(logits, labels) + 1e-4).all()  # a term less


@pytest.mark.parametrize("margin", MARGINS)
@pytest.mark.parametrize("rest", [(), (2, 3)])
def test_probabilities_are_the_expectation_and_ignored_labels_are_left_out(margin, rest):
    bound = WrongClasses(NegLog(2.0, ignore_index=255), margin)
    logits, labels = example(rest=rest)
    p = torch.rand(logits.shape, dtype=torch.double, generator=torch.Generator().manual_seed(1)).softmax(1)
    each = torch.stack([bound(logits, torch.full_like(labels, k)) for k in range(logits.shape[1])], 1)
    close(bound(logits, p), (p * each).sum(1))
    close(gradient(bound(logits, p), logits), gradient((p * each).sum(1), logits), 1e-10)
    kept = bound(logits, labels)
    labels[0] = 255
    values = bound(logits, labels)
    assert (values[0] == 0).all()
    assert (gradient(values, logits)[0] == 0).all()
    assert torch.equal(values[1:], kept[1:])


def test_labels_that_are_independent_of_each_other():
    """With one logit per label there are two classes, and the bound is phi of the logit."""
    z = torch.tensor([2.0, -1.0, 0.5], dtype=torch.double, requires_grad=True)
    for margin in MARGINS:
        bound = WrongClasses(Tanh(3.0, 0.5), margin)
        values, signs = Binary(bound)(z, torch.tensor([1, 1, 0])), torch.tensor([-1.0, -1.0, 1.0])
        lead = (-signs * z.detach()).clamp(min=0)
        weight = 1.0 if margin is None else torch.exp(-lead / margin)
        close(values, torch.tanh(0.5 * signs * z) * weight)
        close(gradient(values, z), gradient(torch.tanh(0.5 * signs * z) * weight, z))


@pytest.mark.parametrize("bound", [WrongClasses(NegLog()), WrongClasses(Tanh(), 2.0), OBF(), OBF(0.3, sigmoid=True)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_reduced_in_float32(bound, dtype):
    logits, labels = example()
    narrow = logits.detach().to(dtype).requires_grad_()
    wide = narrow.detach().float().requires_grad_()
    assert bound(narrow, labels).dtype == torch.float32
    assert torch.equal(bound(narrow, labels), bound(wide, labels))
    assert torch.equal(gradient(bound(narrow, labels), narrow), gradient(bound(wide, labels), wide).to(dtype))


@pytest.mark.parametrize("bound", [NegLog, cross_entropy, Binary(), WrongClasses(), OBF(), 0.1], ids=str)
def test_wrong_classes_takes_a_bound(bound):
    with pytest.raises(TypeError, match="bound"):
        WrongClasses(bound)


@pytest.mark.parametrize("margin", [0, -1.0, math.nan, math.inf])
def test_a_margin_is_positive(margin):
    with pytest.raises(ValueError, match=f"margin must be positive and finite, got {margin!r}"):
        WrongClasses(NegLog(), margin)


# Output bias forgetting.


@given(
    st.floats(0, 1),
    st.none() | st.floats(0, 0.9),
    st.booleans(),
    st.integers(2, 5),
    st.sampled_from([(), (2,)]),
    st.integers(0, 10**4),
    st.sampled_from([0.1, 3.0, 20.0]),
)
@search
def test_the_gradient_is_that_of_the_authors_formula(gamma, lam, sigmoid, classes, rest, seed, scale):
    logits, labels = example(3, classes, rest, seed, scale)
    values = OBF(gamma, lam, sigmoid)(logits, labels)

    def twin(rows: Tensor, y: Tensor) -> Tensor:
        return references.obf(gamma, 1 / classes if lam is None else lam, sigmoid, rows, y)

    close(gradient(values, logits), gradient(flattened(twin, logits, labels), logits), 1e-9)


@pytest.mark.parametrize("sigmoid", [False, True])
def test_the_value_is_the_difference_of_two_cross_entropies(sigmoid):
    logits, labels = example()
    right = F.one_hot(labels, 4).double()

    def ce(targets: Tensor) -> Tensor:
        if sigmoid:
            return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(1)
        return F.cross_entropy(logits, targets, reduction="none")

    p = (logits.sigmoid() if sigmoid else logits.softmax(1)).detach()[right > 0]
    alpha = 0.7 * (1 - 0.1 / p).clamp(min=0) / 0.9
    close(OBF(0.7, 0.1, sigmoid)(logits, labels), (1 - alpha) * ce(right) - ce(torch.full_like(right, 0.25)))


def test_without_gamma_the_gradient_does_not_depend_on_the_prediction():
    logits, labels = example(scale=20.0)
    expected = 0.25 - F.one_hot(labels, 4).double()
    found = torch.autograd.grad(OBF(0.0)(logits, labels).sum(), logits)[0]
    close(found, expected)


def test_sigmoids_are_accurate_where_they_are_close_to_1():
    logits, labels = torch.tensor([[20.5, 0.0], [-20.5, 25.0]], dtype=torch.double, requires_grad=True), LABELS[:2] % 2
    expected = references.obf(1.0, 0.5, True, logits, labels)
    close(gradient(OBF(sigmoid=True)(logits, labels), logits), gradient(expected, logits), 1e-13)


@pytest.mark.parametrize("height", [1e3, 1e30])
@pytest.mark.parametrize("lam", [None, 0.0, 1e-6])
@pytest.mark.parametrize("sigmoid", [False, True])
def test_saturated_predictions_stay_finite(height, lam, sigmoid):
    logits = (height * torch.tensor([[1.0, -1.0, 0.0], [-1.0, 1.0, 0.0]])).requires_grad_()
    values = OBF(1.0, lam, sigmoid)(logits, torch.tensor([0, 0]))
    assert values.isfinite().all()
    assert gradient(values, logits).isfinite().all()


@pytest.mark.parametrize("rest", [(), (2, 3)])
def test_forgetting_takes_probabilities_and_leaves_out_ignored_labels(rest):
    objective = OBF(0.6, 0.2)
    logits, labels = example(rest=rest)
    p = torch.rand(logits.shape, dtype=torch.double, generator=torch.Generator().manual_seed(1)).softmax(1)
    each = torch.stack([objective(logits, torch.full_like(labels, k)) for k in range(4)], 1)
    close(objective(logits, p), (p * each).sum(1))
    close(gradient(objective(logits, p), logits), gradient((p * each).sum(1), logits))
    one = logits.detach().movedim(1, -1).reshape(-1, 4)[0]
    close(objective(one, labels.reshape(-1)[0]), objective(logits, labels).reshape(-1)[0].detach())
    labels[0] = -100
    values = objective(logits, labels)
    assert (values[0] == 0).all()
    assert (gradient(values, logits)[0] == 0).all()


@pytest.mark.parametrize(("name", "value"), [("gamma", -0.1), ("gamma", 1.1), ("lam", 1.0), ("lam", -1e-3)])
def test_shares_of_forgetting_are_in_their_range(name, value):
    with pytest.raises(ValueError, match=f"{name} must be in .*got {value}"):
        OBF(**{name: value})
    with pytest.raises(ValueError, match="label 4 is outside"):
        OBF()(torch.zeros(1, 4), torch.tensor([4]))
    with pytest.raises(ValueError, match="compares classes"):
        OBF()(torch.zeros(2, 1), torch.tensor([0, 0]))


@pytest.mark.parametrize(
    "objective",
    [WrongClasses(), WrongClasses(Tanh(3.0, 0.2, ignore_index=7), 1.5), OBF(), OBF(0.5, 0.1, ignore_index=3)],
    ids=str,
)
def test_are_values(objective):
    again = pickle.loads(pickle.dumps(objective))
    assert again == eval(repr(objective)) == copy.deepcopy(objective) == objective
    assert hash(again) == hash(objective)
    logits, labels = example()
    assert torch.equal(again(logits, labels), objective(logits, labels))
    assert OBF() != OBF(0.5) != OBF(0.5, ignore_index=3)
    assert WrongClasses(NegLog()) != WrongClasses(NegLog(2.0)) != WrongClasses(NegLog(2.0), 1.0) != NegLog(2.0)


def test_an_objective_is_no_perturbation():
    with pytest.raises(TypeError, match="got the objective OBF"):
        SAM(OBF())


# A mu that moves.


def called(method, loss=cross_entropy, steps: int = 4, learning_rate: float = 0.0) -> list[Tensor]:
    """The gradients of steps on the same batch, with the same weights unless there is a learning rate."""
    sharp, grads = SharpnessAware(linear(), method, loss), []
    for _ in range(steps):
        sharp.zero_grad()
        sharp(POINTS, LABELS).backward()
        grads.append(sharp.model.weight.grad.clone())
    return grads


RISING = Linear(1.0, 4.0, steps=3)


@pytest.mark.parametrize(
    "make",
    [
        lambda mu: BiSAM(0.5, NegLog(mu)),
        lambda mu: BiSAM(0.5, Tanh(mu, 0.3)),
        lambda mu: SAM(0.5, ascent=WrongClasses(Tanh(mu, 0.3), 2.0)),
        lambda mu: SAM(0.5, ascent=LowerBound(torch.erf, mu)),
        lambda mu: SAM(0.5, descent=NegLog(mu)),
        lambda mu: FunctionalSAM(L2(0.5), descent=NegLog(mu)),
        lambda mu: ESAM(L2(0.5), select=NegLog(mu)),
    ],
)
def test_each_step_has_the_mu_of_its_number(make):
    torch.manual_seed(0)
    found = called(make(RISING))
    torch.manual_seed(0)
    for step, grad in enumerate(found):
        state = torch.get_rng_state()  # of ESAM's mask
        torch.set_rng_state(state)
        expected = called(make(1.0 + step), steps=1)[0]
        if "ESAM" not in repr(make(1.0)):
            assert torch.equal(grad, expected)
    if "ESAM" not in repr(make(1.0)):
        assert not torch.equal(found[0], found[3])


def test_a_step_is_a_call_of_the_part_of_the_method():
    found = called(Every(2, BiSAM(0.5, NegLog(RISING)), BiSAM(0.5, Tanh(RISING))), steps=6)
    for step, grad in enumerate(found):
        bound = NegLog(1.0 + step // 2) if step % 2 == 0 else Tanh(1.0 + step // 2)
        assert torch.equal(grad, called(BiSAM(0.5, bound), steps=1)[0])


def test_a_resumed_run_continues_its_schedule():
    first = SharpnessAware(linear(), BiSAM(0.5, NegLog(RISING)), cross_entropy)
    for _ in range(2):
        first(POINTS, LABELS)
    second = SharpnessAware(linear(), BiSAM(0.5, NegLog(RISING)), cross_entropy)
    second.load_state_dict(first.state_dict())
    assert torch.equal(second(POINTS, LABELS), first(POINTS, LABELS))
    assert not torch.equal(second(POINTS, LABELS), SharpnessAware(linear(), BiSAM(0.5), cross_entropy)(POINTS, LABELS))


def test_mu_may_follow_the_learning_rate_and_labels_may_be_independent():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.2)
    bound = NegLog(Follow(optimizer, high=1.0, low=9.0))
    optimizer.param_groups[0]["lr"] = 0.1
    assert bound.at_step(7) == NegLog(5.0)
    assert Binary(bound).at_step(7) == Binary(NegLog(5.0))
    assert WrongClasses(bound, 2.0).at_step(7) == WrongClasses(NegLog(5.0), 2.0)
    assert NegLog(lambda step: torch.tensor(2.0 + step)).at_step(1) == NegLog(3.0)
    for constant in (NegLog(2.0), Binary(), WrongClasses(Tanh())):
        assert constant.at_step(3) is constant


@pytest.mark.parametrize("objective", [NegLog(RISING), Tanh(RISING), WrongClasses(NegLog(RISING), 1.0)])
@pytest.mark.parametrize("soft", [False, True])
def test_without_a_step_a_schedule_has_no_value(objective, soft):
    logits, labels = example()
    with pytest.raises(TypeError, match=r"mu of .* is a schedule, .*at_step\(step\)"):
        objective(logits, F.one_hot(labels, 4).double() if soft else labels)
    assert torch.equal(objective.at_step(1)(logits, labels), objective.at_step(1)(logits, labels))


def test_a_training_loss_is_the_same_in_each_step():
    with pytest.raises(ValueError, match="the training loss has a schedule"):
        SharpnessAware(linear(), SAM(), NegLog(RISING))


@pytest.mark.parametrize(
    ("mu", "kind", "said"),
    [
        (Linear, TypeError, "mu is the class Linear"),
        (Linear(0.0, 1.0, 5), ValueError, "mu at step 0 must be positive and finite, got 0.0"),
        (lambda: 1.0, TypeError, "mu must be a number or a schedule"),
        (lambda step: "1", TypeError, "mu at step 0 must be a number"),
    ],
)
def test_a_bad_schedule_is_named(mu, kind, said):
    for make in (NegLog, Tanh, lambda mu: LowerBound(torch.tanh, mu)):
        with pytest.raises(kind, match=said):
            make(mu)


def test_a_schedule_that_reaches_zero_is_named_at_its_step():
    with pytest.raises(ValueError, match=r"mu at step 5 must be positive and finite, got 0\.0"):
        NegLog(Cosine(1.0, 0.0, 5)).at_step(5)
