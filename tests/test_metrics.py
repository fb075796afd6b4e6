"""Bounds of metrics: each is below its metric up to its constant, finite, differentiable, and an adversary.

A row of `CASES` is an objective, a batch for it, its metric from the definition, and the constant of the bound.
"""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bisam import (
    KSAM,
    OBF,
    SAM,
    Binary,
    BiSAM,
    LowerBound,
    NegLog,
    SharpnessAware,
    Tanh,
    WrongClasses,
    cross_entropy,
    objectives,
)
from bisam.objectives import (
    ClassWeighted,
    CostSensitive,
    ExactMatch,
    Focal,
    IoU,
    Pairwise,
    PerExample,
    Retrieval,
    Tolerance,
    TopK,
    at_step,
)
from bisam.schedules import Linear
from tests.support import cases

BOUNDS = [NegLog(), NegLog(5.0), Tanh(), Tanh(3.0, 0.7), WrongClasses(NegLog(2.0)), WrongClasses(Tanh(5.0, 1.0))]
each_bound = pytest.mark.parametrize("bound", BOUNDS, ids=str)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def gradient(values: Tensor, *inputs: Tensor, **options: Any) -> Tensor:
    weights = torch.linspace(0.5, 1.5, max(values.numel(), 1), dtype=values.dtype)[: values.numel()]
    return torch.autograd.grad((values * weights.view(values.shape)).sum(), inputs, **options)[0]


def constant(bound: LowerBound, alternatives: int) -> float:
    """The constant of the soft maximum over so many alternatives to the right answer."""
    return math.log(alternatives + (not isinstance(bound, WrongClasses))) / bound.mu


# Margins


@each_bound
@pytest.mark.parametrize("rest", [(), (2, 3)])
def test_a_decision_is_a_problem_of_classes_with_the_right_answer_among_them(bound, rest):
    g = torch.Generator().manual_seed(0)
    margins = (3 * torch.randn(5, 4, *rest, generator=g, dtype=torch.double)).requires_grad_()
    classes = torch.cat([torch.zeros(5, 1, *rest, dtype=torch.double), margins], 1)
    values, expected = bound.of_margins(margins), bound(classes, torch.zeros(5, *rest, dtype=torch.long))
    close(values, expected)
    close(gradient(values, margins), gradient(expected, margins))
    assert (values - constant(bound, 4) <= (margins > 0).any(1).double() + 1e-12).all()


@pytest.mark.parametrize("bound", [NegLog(2.0), Tanh(3.0, 0.7)], ids=str)
@pytest.mark.parametrize("alone", [False, True])
def test_derivatives_with_respect_to_margins_in_closed_form(bound, alone):
    """dQ/dF_j = exp(mu phi(F_j)) phi'(F_j) / (1 + sum exp(mu phi)), and without the 1 for the wrong alone."""
    margins = torch.linspace(-9, 9, 12, dtype=torch.double).view(4, 3).requires_grad_()
    slope = 1 - torch.sigmoid(margins - math.log(math.e - 1))
    if isinstance(bound, Tanh):
        slope = bound.alpha / torch.cosh(bound.alpha * margins) ** 2
    terms = (bound.mu * bound.phi(margins)).exp()
    found = torch.autograd.grad((WrongClasses(bound) if alone else bound).of_margins(margins).sum(), margins)[0]
    close(found, terms * slope / (terms.sum(1, keepdim=True) + (not alone)))


# The metrics


@dataclass(frozen=True)
class Case:
    """An objective and its metric.

    Attributes:
        make: the objective around a bound.
        shape: of the outputs of 6 examples.
        targets: drawn for outputs; None: class labels (6, d1, ...).
        metric: of detached outputs and targets, from its definition, of the shape of the losses.
        constant: by how much a bound may be above the metric.
        above: the training loss, `above(outputs, targets) >= metric`.
    """

    make: Callable[[LowerBound], Any]
    shape: tuple[int, ...]
    metric: Callable[[Tensor, Tensor], Tensor]
    constant: Callable[[LowerBound], float]
    above: Callable[[Tensor, Tensor], Tensor]
    targets: Callable[[torch.Generator], Tensor] | None = None

    def batch(self, seed: int = 0, scale: float = 3.0, dtype: torch.dtype = torch.double) -> tuple[Tensor, Tensor]:
        g = torch.Generator().manual_seed(seed)
        outputs = scale * torch.randn(self.shape, generator=g, dtype=torch.double)
        n, classes, *rest = (*self.shape, 2)[: max(2, len(self.shape))]
        targets = self.targets(g) if self.targets else torch.randint(classes, (n, *rest), generator=g)
        return outputs.to(dtype).requires_grad_(), targets


def ahead(logits: Tensor, labels: Tensor) -> Tensor:
    """How many classes score higher than the label."""
    return (logits > logits.gather(1, labels.unsqueeze(1))).sum(1)


def bce(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.binary_cross_entropy_with_logits(outputs, targets.to(outputs.dtype), reduction="none")


def tokens(g: torch.Generator) -> Tensor:
    """Labels of sequences of different lengths; one is empty."""
    lengths = torch.tensor([3, 1, 0, 2, 3, 1])
    return torch.randint(4, (6, 3), generator=g).masked_fill(torch.arange(3) >= lengths[:, None], -100)


def balance(labels: Tensor) -> Tensor:
    """For each label the weight with which all classes of the batch count the same."""
    each = labels.flatten().tolist()
    weights = [len(each) / len({*each}) / each.count(y) for y in each]
    return torch.tensor(weights, dtype=torch.double).view(labels.shape)


def disorder(scores: list[float], relevance: list[float]) -> Tensor:
    """The share of pairs in the wrong order."""
    pairs = [(i, j) for i in range(4) for j in range(4) if relevance[i] > relevance[j]]
    wrong = sum(scores[j] > scores[i] for i, j in pairs)
    return torch.tensor(wrong / max(len(pairs), 1), dtype=torch.double)


def jaccard(predicted: Tensor, labels: Tensor) -> Tensor:
    """The mean Jaccard loss of the classes of an image; -100 is not labelled, and -2 is no class."""
    pixels = [
        pair for pair in zip(predicted.flatten().tolist(), labels.flatten().tolist(), strict=True) if pair[1] > -100
    ]
    losses = []
    for k in {y for _, y in pixels} - {-2}:
        union, both = sum(k in pair for pair in pixels), sum(pair == (k, k) for pair in pixels)
        losses.append(1 - both / union)
    return torch.tensor(sum(losses) / max(len(losses), 1), dtype=torch.double)


COSTS = ((0, 1, 0.5, 1), (2, 0, 0, 0.25), (5, 4, 0, 4), (0, 0, 0.5, 0))
CASES = {
    "top-1": Case(
        lambda bound: TopK(1, bound),
        (6, 4),
        lambda z, y: (ahead(z, y) >= 1).double(),
        lambda bound: constant(bound, 3),
        lambda z, y: cross_entropy(z, y) / math.log(2),
    ),
    "top-3": Case(
        lambda bound: TopK(3, bound),
        (6, 5, 2),
        lambda z, y: (ahead(z, y) >= 3).double(),
        lambda bound: constant(bound, 2),
        lambda z, y: cross_entropy(z, y) / math.log(4),
    ),
    "ordinal": Case(
        lambda bound: CostSensitive("ordinal", bound),
        (6, 4, 2),
        lambda z, y: (z.argmax(1) - y).abs().double(),
        lambda bound: sum(constant(bound, n) for n in (1, 2, 3)),
        lambda z, y: 3 * cross_entropy(z, y) / math.log(2),
    ),
    "costs": Case(
        lambda bound: CostSensitive(COSTS, bound),
        (6, 4),
        lambda z, y: torch.tensor(COSTS, dtype=z.dtype)[y, z.argmax(1)],
        lambda bound: 5 * constant(bound, 3),
        lambda z, y: 5 * cross_entropy(z, y) / math.log(2),
    ),
    "weighted": Case(
        lambda bound: ClassWeighted(bound, (1, 0, 3, 0.5)),
        (6, 4),
        lambda z, y: torch.tensor([1, 0, 3, 0.5])[y] * (ahead(z, y) > 0).double(),
        lambda bound: 3 * constant(bound, 3),
        lambda z, y: 3 * cross_entropy(z, y) / math.log(2),
    ),
    "balanced": Case(
        lambda bound: ClassWeighted(bound, "balanced"),
        (6, 4, 2),
        lambda z, y: balance(y) * (ahead(z, y) > 0).double(),
        lambda bound: 12 * constant(bound, 3),
        lambda z, y: ClassWeighted(cross_entropy)(z, y) / math.log(2),
    ),
    "tolerance": Case(
        lambda bound: Tolerance(2.0, bound),
        (6, 2),
        lambda z, y: ((z - y).abs() > 2).double(),
        lambda bound: constant(bound, 2),
        lambda z, y: ((z - y) / 2) ** 2,
        lambda g: torch.randn(6, 2, generator=g),
    ),
    "ranking": Case(
        Pairwise,
        (6, 4),
        lambda z, y: torch.stack([disorder(*each) for each in zip(z.tolist(), y.tolist(), strict=True)]),
        lambda bound: constant(bound, 1),
        lambda z, y: Pairwise(LowerBound(nn.functional.softplus, 1.0))(z, y) / math.log(2),
        lambda g: torch.randint(3, (6, 4), generator=g).float(),
    ),
    "retrieval": Case(
        Retrieval,
        (6, 6),
        lambda z, y: ((ahead(z, y) > 0).double() + (ahead(z.T, y.argsort()) > 0).double()[y]) / 2,
        lambda bound: constant(bound, 5),
        lambda z, y: Retrieval(cross_entropy)(z, y) / math.log(2),
        lambda g: torch.randperm(6, generator=g),
    ),
    "jaccard": Case(
        IoU,
        (6, 3, 2, 3),
        lambda z, y: torch.stack([jaccard(*each) for each in zip(z.argmax(1), y, strict=True)]),
        lambda bound: constant(bound, 1),
        lambda z, y: 6 * cross_entropy(z, y).flatten(1).sum(1) / math.log(2),
        lambda g: torch.randint(3, (6, 2, 3), generator=g).where(torch.rand(6, 2, 3, generator=g) > 0.2, -100),
    ),
    "masks": Case(
        lambda bound: IoU(Binary(bound)),
        (6, 1, 5),
        lambda z, y: torch.stack([jaccard((a > 0)[0].long() - 2, b[0] - 2) for a, b in zip(z, y, strict=True)]),
        lambda bound: constant(bound, 1),
        lambda z, y: 5 * bce(z, y).flatten(1).sum(1) / math.log(2),
        lambda g: torch.randint(2, (6, 1, 5), generator=g),
    ),
    "subset": Case(
        lambda bound: ExactMatch(Binary(bound)),
        (6, 3),
        lambda z, y: ((z > 0) != (y > 0.5)).any(1).double(),
        lambda bound: constant(bound, 1) + math.log(3) / bound.mu,
        lambda z, y: bce(z, y).sum(1) / math.log(2),
        lambda g: torch.randint(2, (6, 3), generator=g).float(),
    ),
    "hamming": Case(
        lambda bound: PerExample(Binary(bound)),
        (6, 3),
        lambda z, y: ((z > 0) != (y > 0.5)).double().mean(1),
        lambda bound: constant(bound, 1),
        lambda z, y: PerExample(bce)(z, y) / math.log(2),
        lambda g: torch.randint(2, (6, 3), generator=g).float(),
    ),
    "sequences": Case(
        ExactMatch,
        (6, 4, 3),
        lambda z, y: ((z.argmax(1) != y) & (y >= 0)).any(1).double(),
        lambda bound: constant(bound, 3) + math.log(3) / bound.mu,
        lambda z, y: cross_entropy(z, y).sum(1) / math.log(2),
        lambda g: tokens(g),
    ),
    "tokens": Case(
        PerExample,
        (6, 4, 3),
        lambda z, y: ((z.argmax(1) != y) & (y >= 0)).sum(1) / (y >= 0).sum(1).double().clamp(min=1),
        lambda bound: constant(bound, 3),
        lambda z, y: PerExample(cross_entropy)(z, y) / math.log(2),
        lambda g: tokens(g),
    ),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
SEEDS = range(20)


@each_case
@each_bound
def test_it_is_below_its_metric_up_to_its_constant_and_the_training_loss_is_above(case, bound):
    reached = set[float]()
    for seed in SEEDS:
        for scale in (0.3, 3.0, 30.0):
            outputs, targets = case.batch(seed, scale)
            metric = case.metric(outputs.detach(), targets)
            values = case.make(bound)(outputs, targets)
            assert values.shape == metric.shape
            assert (values <= metric + case.constant(bound) + 1e-9).all()
            assert (case.above(outputs, targets) >= metric - 1e-9).all()
            reached |= {*metric.flatten().tolist()}
    assert len(reached) > 1  # not only right answers


def step(x: Tensor) -> Tensor:
    return (x > 0).to(x.dtype)


@each_case
def test_with_the_step_for_phi_it_is_the_metric_up_to_its_constant(case):
    for bound in (LowerBound(step, 60.0), WrongClasses(LowerBound(step, 60.0))):
        for seed in SEEDS:
            outputs, targets = case.batch(seed)
            metric, values = case.metric(outputs.detach(), targets), case.make(bound)(outputs, targets)
            assert (values >= metric - 1e-9).all()
            assert (values <= metric + case.constant(bound) + 1e-9).all()


@each_case
@each_bound
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_outputs_of_any_size_are_finite(case, bound, dtype):
    for seed in SEEDS[:5]:
        outputs, targets = case.batch(seed, dtype=dtype)
        sign = outputs.detach().sign()
        for height in (0.0, 1.0, 1e4):
            outputs = (height * sign).requires_grad_()
            values = case.make(bound)(outputs, targets)
            assert values.isfinite().all()
            assert gradient(values, outputs).isfinite().all()


@each_case
@each_bound
def test_derivatives(case, bound):
    outputs, targets = case.batch(scale=1.0)
    assert torch.autograd.gradcheck(lambda z: case.make(bound)(z, targets), outputs)


@each_case
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_reduced_in_float32(case, dtype):
    outputs, targets = case.batch(dtype=dtype)
    wide = outputs.detach().float().requires_grad_()
    values, expected = case.make(NegLog())(outputs, targets), case.make(NegLog())(wide, targets)
    assert values.dtype == torch.float32
    assert torch.equal(values, expected)
    assert torch.equal(gradient(values, outputs), gradient(expected, wide).to(dtype))


@each_case
def test_the_callers_outputs_are_not_changed(case):
    outputs, targets = case.batch()
    before, kept = outputs.detach().clone(), targets.clone()
    gradient(case.make(NegLog())(outputs, targets), outputs)
    assert torch.equal(outputs.detach(), before)
    assert torch.equal(targets, kept)


@each_case
def test_are_values(case):
    objective = case.make(Tanh(2.0, 0.3))
    again = pickle.loads(pickle.dumps(objective))
    scope = {**cases.public_names(), **vars(objectives)}
    assert again == eval(repr(objective), scope) == copy.deepcopy(objective) == objective
    assert hash(again) == hash(objective)
    assert objective != case.make(NegLog())
    outputs, targets = case.batch()
    assert torch.equal(again(outputs, targets), objective(outputs, targets))


@each_case
def test_a_schedule_of_the_bound_is_followed(case):
    rising = case.make(NegLog(Linear(1.0, 4.0, steps=3)))
    assert at_step(rising, 2) == case.make(NegLog(3.0))
    constant = case.make(NegLog())
    assert at_step(constant, 2) is constant
    with pytest.raises(TypeError, match="is a schedule"):
        rising(*case.batch())


@each_case
@pytest.mark.parametrize("bound", [NegLog(), WrongClasses(Tanh())], ids=str)
def test_it_is_the_adversary_of_sam(case, bound):
    """The gradient is that of the training loss at w + rho g/||g||, where g is the gradient of the bound's mean."""
    outputs, targets = case.batch()
    torch.manual_seed(0)
    model = nn.Linear(5, outputs[0].numel(), dtype=torch.double)
    x = torch.randn(len(outputs), 5, dtype=torch.double)

    def forward(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        return model(x).view_as(outputs), targets

    objective = case.make(bound)
    SharpnessAware(model, SAM(0.1, ascent=objective), case.above, forward)(x).backward()
    found, weights = [p.grad for p in model.parameters()], [*model.parameters()]
    g = torch.autograd.grad(objective(*forward(model, x)).mean(), weights)
    norm = sum(t.square().sum() for t in g).sqrt()
    assert norm > 0
    climbed = copy.deepcopy(model)
    for w, t in zip(climbed.parameters(), g, strict=True):
        w.data += 0.1 * t / norm
    expected = torch.autograd.grad(case.above(*forward(climbed, x)).mean(), [*climbed.parameters()])
    for ours, theirs in zip(found, expected, strict=True):
        close(ours, theirs, 1e-9)
    assert objective(*forward(climbed, x)).mean() > objective(*forward(model, x)).mean()
    assert BiSAM(0.1, objective) == SAM(0.1, ascent=objective)


@each_case
def test_it_compiles_to_one_graph(case):
    torch.compiler.reset()
    outputs, targets = case.batch(dtype=torch.float32)
    objective = case.make(NegLog())
    found = torch.compile(objective.__call__, fullgraph=True, backend="aot_eager")(outputs, targets)
    expected = objective(outputs, targets)
    close(found, expected, 1e-6)
    close(gradient(found, outputs), gradient(expected, outputs), 1e-6)
    torch.compiler.reset()


@each_case
@pytest.mark.parametrize(("outputs", "said"), [([0.0], "must be a tensor"), (torch.zeros(2, 3).long(), "floating")])
def test_outputs_of_another_type_are_refused(case, outputs, said):
    with pytest.raises(TypeError, match=said):
        case.make(NegLog())(outputs, case.batch()[1])


@each_case
def test_a_bound_is_needed(case):
    for other in (NegLog, 0.1):
        with pytest.raises(TypeError, match="bound"):
            case.make(other)


# Top-k


@each_bound
def test_with_one_prediction_it_is_the_bound_itself(bound):
    outputs, labels = CASES["top-1"].batch()
    p = outputs.detach().softmax(1)
    close(TopK(1, bound)(outputs, labels), bound(outputs, labels))
    close(gradient(TopK(1, bound)(outputs, labels), outputs), gradient(bound(outputs, labels), outputs))
    close(TopK(1, bound)(outputs, p), bound(outputs, p))


def test_the_first_wrong_classes_have_no_gradient():
    outputs = torch.tensor([[3.0, 1.0, 2.0, 0.0, 0.5]], requires_grad=True)
    slope = gradient(TopK(3)(outputs, torch.tensor([1])), outputs)
    assert (slope[0] != 0).tolist() == [False, True, False, True, True]
    labels = torch.tensor([255])
    assert TopK(3, NegLog(ignore_index=255))(outputs, labels).item() == 0


def test_a_top_k_error_needs_more_classes():
    for k, kind in ((0, ValueError), (1.0, TypeError)):
        with pytest.raises(kind, match="k must be"):
            TopK(k)
    with pytest.raises(ValueError, match="the top-5 error of 5 classes is always 0: k must be less"):
        TopK(5)(torch.zeros(2, 5), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"label 7 is outside \[0, 5\)"):
        TopK(2)(torch.zeros(2, 5), torch.tensor([0, 7]))
    with pytest.raises(ValueError, match=r"use bisam.Binary\(NegLog\(...\)\)"):
        TopK(2)(torch.zeros(2, 1), torch.zeros(2, 1))
    with pytest.raises(TypeError, match=r"WrongClasses goes inside of others, as in TopK\(5, WrongClasses\(\)\)"):
        WrongClasses(TopK(2))


# Costs


@each_bound
@pytest.mark.parametrize("classes", [2, 4])
def test_where_all_errors_cost_1_it_is_the_bound_itself(bound, classes):
    outputs, labels = Case(CostSensitive, (6, classes), ahead, math.log, ahead).batch()
    unit = CostSensitive((1 - torch.eye(classes)).tolist(), bound)
    close(unit(outputs, labels), bound(outputs, labels))
    close(gradient(unit(outputs, labels), outputs), gradient(bound(outputs, labels), outputs), 1e-11)
    p = outputs.detach().softmax(1)
    close(unit(outputs, p), bound(outputs, p))


def test_costs_are_a_square_of_numbers_with_a_diagonal_of_zeros():
    for costs, kind, said in (
        ([[0, 1], [1]], ValueError, r"costs must be K rows of K numbers, got rows of \[2, 1\]"),
        ([], ValueError, "costs must be K rows"),
        ([[0, -1], [1, 0]], ValueError, "the cost of prediction 1 for label 0 must be non-negative and finite, got -1"),
        ([[0, 1], [1, 2]], ValueError, "the cost of prediction 1 for label 1 must be 0, got 2"),
        ([[0, "1"], [1, 0]], TypeError, "the cost of prediction 1 for label 0 must be a number"),
        ("nominal", ValueError, "costs must be rows of numbers or \"ordinal\", got 'nominal'"),
    ):
        with pytest.raises(kind, match=said):
            CostSensitive(costs)
    with pytest.raises(ValueError, match="the costs are those of 4 classes, and the outputs have 3"):
        CostSensitive(COSTS)(torch.zeros(2, 3), torch.tensor([0, 1]))
    assert CostSensitive(COSTS, NegLog(ignore_index=9))(torch.zeros(1, 4), torch.tensor([9])).item() == 0


# Positions


@pytest.mark.parametrize("make", [PerExample, ExactMatch])
def test_positions_that_are_ignored_do_not_count(make):
    outputs, labels = CASES["tokens"].batch()
    values = make(NegLog())(outputs, labels)
    slope = gradient(values, outputs)
    for i in range(6):
        kept = labels[i] >= 0
        if kept.any():
            alone = outputs.detach()[i : i + 1, :, kept]
            close(values[i : i + 1], make(NegLog())(alone, labels[i : i + 1, kept]))
    assert values[2] == 0
    assert ((slope != 0).any(1) == (labels >= 0)).all()


def test_an_example_with_one_decision_is_that_decision():
    z, y = torch.randn(4, 3), torch.tensor([0, 2, 1, 1])
    for make in (PerExample, ExactMatch):
        assert torch.equal(make(NegLog())(z, y), NegLog()(z, y))
        assert torch.equal(make(NegLog())(z[0], y[0]), NegLog()(z[0], y[0]))
        assert torch.equal(make(Binary())(z[:, 0], y[:] % 2), Binary()(z[:, 0], y % 2))
        close(make(Binary())(z[:, :1], y[:, None] % 2), Binary()(z[:, 0], y % 2), 1e-6)


def test_all_examples_count_the_same_in_training():
    """The mean over a batch is over its sequences, not over its tokens; methods that choose examples take them too."""
    _, labels = CASES["tokens"].batch()
    model = nn.Linear(5, 12, dtype=torch.double)
    x = torch.randn(6, 5, dtype=torch.double)

    def forward(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return model(x).view(-1, 4, 3), y

    sharp = SharpnessAware(model, KSAM(2, BiSAM(0.1, PerExample())), PerExample(cross_entropy), forward)
    sharp(x, labels).backward()
    with torch.no_grad():
        close(sharp.eval()(x, labels), PerExample(cross_entropy)(*forward(model, x, labels)).mean())
    assert model.weight.grad.isfinite().all()


@pytest.mark.parametrize("make", [PerExample, ExactMatch])
@pytest.mark.parametrize("bound", [Binary(), NegLog()])
def test_examples_without_positions_have_no_loss(make, bound):
    shape = (3, 0) if isinstance(bound, Binary) else (3, 5, 0)
    logits, labels = torch.zeros(shape, requires_grad=True), torch.zeros(3, 0, dtype=torch.long)
    losses = make(bound)(logits, labels)
    torch.testing.assert_close(losses, torch.zeros(3))
    losses.sum().backward()
    assert logits.grad is not None
    assert make(bound)(torch.zeros(0, *shape[1:-1], 4), torch.zeros(0, 4, dtype=torch.long)).shape == (0,)


def test_a_loss_for_each_position_is_needed():
    with pytest.raises(ValueError, match=r'CrossEntropyLoss\(\) returned a scalar, .*: use reduction="none"'):
        PerExample(nn.CrossEntropyLoss())(torch.zeros(2, 3, 4), torch.zeros(2, 4, dtype=torch.long))
    for other in (cross_entropy, PerExample()):
        for make in (ExactMatch, IoU):
            with pytest.raises(TypeError, match=r"bound must be a LowerBound such as NegLog\(\), or Binary\(\), got"):
                make(other)
    with pytest.raises(ValueError, match="targets of Binary are 0 or 1 for each label"):
        ExactMatch(Binary())(torch.zeros(2, 3), torch.full((2, 3), 2))


# Class weights


def test_the_balanced_mean_is_that_over_the_classes():
    outputs, labels = CASES["balanced"].batch()
    labels[0] = -100
    for objective in (NegLog(), cross_entropy, OBF(), TopK(2)):
        each = objective(outputs, labels)
        of_classes = torch.stack([each[labels == k].mean() for k in labels.unique().tolist() if k >= 0])
        values = ClassWeighted(objective)(outputs, labels)
        close(values.sum() / (labels >= 0).sum(), of_classes.mean())
        assert (values[0] == 0).all()


def test_focal_weights_are_less_for_frequent_classes():
    outputs, labels = torch.randn(4, 3), torch.tensor([0, 2, 0, 0])
    values = ClassWeighted(NegLog(), Focal(2.0))(outputs, labels)
    close(values, NegLog()(outputs, labels) * torch.tensor([0.25, 0.75, 0.25, 0.25]) ** 2, 1e-6)
    assert torch.equal(ClassWeighted(NegLog(), Focal(0))(outputs, labels), NegLog()(outputs, labels))


@pytest.mark.parametrize("weights", ["balanced", Focal(1.5), (1, 0, 3, 0.5)], ids=str)
@pytest.mark.parametrize("bound", [NegLog(), cross_entropy, OBF(), TopK(2)], ids=str)
def test_weights_of_probabilities_are_those_of_their_classes(weights, bound):
    outputs, labels = CASES["weighted"].batch()
    objective = ClassWeighted(bound, weights)
    hard = nn.functional.one_hot(labels, 4).double()
    close(objective(outputs, hard), objective(outputs, labels))
    p = 0.7 * hard + 0.3 * hard.roll(1, 0)
    each = torch.stack([bound(outputs, torch.full_like(labels, k)) for k in range(4)], 1)
    n = p.sum(0)
    w = {"balanced": 6 / (n > 0).sum() / n.clamp(min=1e-9), Focal(1.5): (1 - n / 6) ** 1.5}.get(weights)
    w = torch.tensor(weights).double() if w is None else w
    close(objective(outputs, p), (p * w * each).sum(1))


def test_an_empty_or_ignored_batch_has_no_weighted_loss():
    for weights in ("balanced", Focal(1.0), (1, 2, 3)):
        for n in (0, 2):
            outputs = torch.zeros(n, 3, requires_grad=True)
            values = ClassWeighted(NegLog(), weights)(outputs, torch.full((n,), -100))
            assert torch.equal(values, torch.zeros(n))
            assert gradient(values, outputs).isfinite().all()


def test_weights_are_numbers_of_classes():
    for weights, kind, said in (
        ("balance", ValueError, "weights must be numbers, \"balanced\" or Focal\\(gamma\\), got 'balance'"),
        ((), ValueError, "weights must be numbers"),
        ((1, -2), ValueError, "the weight of class 1 must be non-negative and finite, got -2"),
        ((1, "2"), TypeError, "the weight of class 1 must be a number, got '2'"),
        (Focal, ValueError, "weights must be numbers"),
        ({1: 1.0, 0: 5.0}, ValueError, "weights must be numbers in a list"),
    ):
        with pytest.raises(kind, match=said):
            ClassWeighted(NegLog(), weights)
    with pytest.raises(ValueError, match="gamma must be non-negative and finite, got -1"):
        Focal(-1)
    with pytest.raises(ValueError, match="there are weights for 2 classes, and the outputs have 3"):
        ClassWeighted(NegLog(), (1, 2))(torch.zeros(2, 3), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"label 3 is outside \[0, 3\)"):
        ClassWeighted()(torch.zeros(2, 3), torch.tensor([0, 3]))
    with pytest.raises(TypeError, match="bound must be an objective of classes such as NegLog"):
        ClassWeighted(Binary())
    with pytest.raises(TypeError, match="got the objective ClassWeighted"):
        SAM(ClassWeighted())


# Numbers, ranks and matches


def test_a_residual_counts_in_units_of_the_tolerance():
    outputs = torch.tensor([1.0, -4.0, 2.5], dtype=torch.double, requires_grad=True)
    values, scaled = Tolerance(0.1)(0.1 * outputs, torch.zeros(3)), Tolerance(1)(outputs, torch.zeros(3).long())
    close(values, scaled)
    x = torch.tensor([[0.0, -2.0], [-5.0, 3.0], [1.5, -3.5]], dtype=torch.double)
    close(scaled, NegLog().of_margins(x))
    assert (
        gradient(Tolerance(1.0)(outputs, outputs.detach()), outputs).abs().max() < 1e-15
    )  # nothing is too high or low


def test_one_list_and_lists_without_a_pair():
    scores, relevance = torch.randn(4), torch.tensor([1, 0, 0, 1])
    close(Pairwise()(scores, relevance), Pairwise()(scores[None], relevance[None])[0], 1e-6)
    tied = torch.randn(2, 3, requires_grad=True)
    values = Pairwise()(tied, torch.ones(2, 3))
    assert torch.equal(values, torch.zeros(2))
    assert torch.equal(gradient(values, tied), torch.zeros(2, 3))


def test_a_pair_is_a_label_of_the_difference():
    better, worse = torch.randn(5), torch.randn(5)
    pairs = Pairwise(Tanh())(torch.stack([better, worse], 1), torch.tensor([[1, 0]] * 5))
    close(pairs, Binary(Tanh())(better - worse, torch.ones(5)), 1e-6)


def test_matches_in_both_directions_are_the_loss_of_clip():
    s = torch.randn(5, 5)
    expected = (cross_entropy(s, torch.arange(5)) + cross_entropy(s.T, torch.arange(5))) / 2
    close(Retrieval(cross_entropy)(s, torch.arange(5)), expected, 1e-6)
    order = torch.tensor([2, 0, 1, 4, 3])
    close(Retrieval(cross_entropy)(s[:, order.argsort()], order), expected, 1e-6)
    assert Retrieval(TopK(2))(s, order).shape == (5,)


@pytest.mark.parametrize(
    ("objective", "outputs", "targets", "kind", "said"),
    [
        (
            Tolerance(1.0),
            (4, 1),
            torch.zeros(4),
            ValueError,
            r"Tolerance needs .*\(4, 1\), got \(4,\): use targets.un",
        ),
        (Pairwise(), (4,), torch.zeros(4, 1), ValueError, r"Pairwise needs .* use targets.squeeze\(1\)"),
        (Pairwise(), (4, 2), torch.zeros(2), ValueError, "there must be one target for each output"),
        (Pairwise(), (4, 2, 2), torch.zeros(4, 2, 2), ValueError, r"scores \(N, L\) or \(L,\), got \(4, 2, 2\)"),
        (Retrieval(), (4, 5), torch.arange(4), ValueError, r"similarities \(N, N\) .*got \(4, 5\)"),
        (Retrieval(), (4, 4), torch.arange(3), ValueError, r"one target for each query, torch.arange\(4\), got \(3,\)"),
        (
            Retrieval(),
            (4, 4),
            torch.zeros(4),
            TypeError,
            r"int64 numbers of items, torch.arange\(4\), got torch.float32",
        ),
        (Retrieval(), (4, 4), torch.tensor([0, 1, 1, 3]), ValueError, r"each once, .*got \[0, 1, 1, 3\]"),
        (Retrieval(), (4, 4), torch.tensor([0, 1, 2, 4]), ValueError, r"from 0 to N - 1, each once"),
    ],
)
def test_targets_of_another_kind_are_refused(objective, outputs, targets, kind, said):
    with pytest.raises(kind, match=said):
        objective(torch.zeros(outputs), targets)


def test_a_tolerance_is_positive():
    with pytest.raises(ValueError, match="epsilon must be positive and finite, got 0"):
        Tolerance(0)


# Segmentation


def test_pixels_without_a_label_have_no_gradient_and_images_without_any_no_loss():
    outputs, labels = CASES["jaccard"].batch()
    labels[3] = -100
    values = IoU()(outputs, labels)
    slope = gradient(values, outputs)
    assert values[3] == 0
    assert ((slope != 0).any(1) <= (labels >= 0)).all()
    kept = labels[0] >= 0
    close(IoU()(outputs[:1, :, kept], labels[:1, kept]), values[:1])


def test_targets_that_are_no_labels_of_pixels_are_refused():
    z = torch.zeros(2, 3, 4)
    for bound, outputs, targets, said in (
        (NegLog(), z, z.softmax(1), "IoU needs int64 labels"),
        (NegLog(), z[..., 0], torch.tensor([0, 1]), "IoU needs int64 labels"),
        (NegLog(), z, torch.full((2, 4), 3), r"label 3 is outside \[0, 3\)"),
        (NegLog(), z, torch.zeros(2, 3, dtype=torch.long), "labels for outputs of shape"),
        (NegLog(), z[:, :1], z[:, :1], r"use bisam.objectives.IoU\(Binary\(...\)\)"),
        (Binary(), z, torch.zeros(2, 4), "Binary needs targets of the shape of the outputs"),
        (Binary(), z, z + 2, "targets of Binary are 0 or 1"),
        (Binary(), z[:, 0], z[:, 0], r"masks have the shape \(N, L, d1, ...\)"),
    ):
        with pytest.raises(ValueError, match=said):
            IoU(bound)(outputs, targets)
