"""The lower bounds of the 0-1 loss against their slow twin, and everything a training loop may do to an objective."""

from __future__ import annotations

import copy
import math
import pickle
import shutil
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from bisam import (
    ESAM,
    KSAM,
    L2,
    MSAM,
    OBF,
    Binary,
    BiSAM,
    LookSAM,
    LowerBound,
    NegLog,
    SharpnessAware,
    Tanh,
    cross_entropy,
    objectives,
)
from bisam.objectives import CrossEntropy, bounds as bounds_module
from tests.support import references
from tests.support.memory import Peak

MUS = [0.3, 1.0, 5.0, 10.0, 64.0, 65.0, 300.0]
ALPHAS = [0.1, 1.0, 7.0]
BOUNDS = [
    NegLog(),
    NegLog(5.0),
    NegLog(65.0),
    Tanh(),
    Tanh(1.0, 2.0),
    Tanh(65.0),
    LowerBound(references.phi_log, 3.0),
]
FAST = [NegLog(), NegLog(5.0), Tanh(), Tanh(64.0, 1.0)]  # closed form
RESTS = [(), (2,), (2, 3)]


def name(bound):
    """As repr, but without addresses, which differ between the workers that collect the tests."""
    return repr(bound).replace(f"phi={getattr(bound, 'phi', None)!r}, ", "")


bounds = pytest.mark.parametrize("bound", BOUNDS, ids=name)
fast = pytest.mark.parametrize("bound", FAST, ids=name)
search = settings(deadline=None, derandomize=True, max_examples=200)


def phi_of(bound):
    return {NegLog: lambda: references.phi_log, Tanh: lambda: references.phi_tanh(bound.alpha)}.get(
        type(bound), lambda: bound.phi
    )()


def twin(bound, logits, labels):
    """`references.q` for any shape and for ignored labels."""
    if logits.dim() == 1:
        return twin(bound, logits[None], labels[None])[0]
    rows, flat = logits.movedim(1, -1).reshape(-1, logits.shape[1]), labels.reshape(-1)
    kept = flat != bound.ignore_index
    values = torch.zeros(len(flat), dtype=logits.dtype)
    if kept.any():
        values = values.masked_scatter(kept, references.q(phi_of(bound), bound.mu, rows[kept], flat[kept]))
    return values.view(labels.shape)


def example(n=4, classes=5, rest=(), seed=0, scale=3.0, dtype=torch.double):
    g = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(n, classes, *rest, generator=g, dtype=torch.double)
    labels = torch.randint(classes, (n, *rest), generator=g)
    return logits.to(dtype).requires_grad_(), labels


def mixed(logits, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(logits.shape, generator=g, dtype=torch.double).softmax(1).to(logits.dtype)


def gradient(values, *inputs, **options):
    weights = torch.linspace(0.5, 1.5, max(values.numel(), 1), dtype=values.dtype)[: values.numel()]
    grads = torch.autograd.grad((values * weights.view(values.shape)).sum(), inputs, **options)
    return grads[0] if len(inputs) == 1 else grads


def close(actual, expected, tolerance=1e-12):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


# The slow twin


@st.composite
def problems(draw):
    mu = draw(st.sampled_from(MUS))
    options = {"ignore_index": draw(st.sampled_from([-100, 255, 1]))}
    bound = draw(st.sampled_from([NegLog(mu, **options), Tanh(mu, draw(st.sampled_from(ALPHAS)), **options)]))
    n, classes, rest = draw(st.integers(1, 4)), draw(st.integers(2, 6)), draw(st.sampled_from(RESTS))
    logits, labels = example(
        n, classes, rest, draw(st.integers(0, 2**16)), draw(st.sampled_from([0.0, 0.1, 3.0, 30.0]))
    )
    flat = labels.view(-1)
    ignored = draw(st.lists(st.integers(0, len(flat) - 1), max_size=len(flat)))
    flat[ignored] = bound.ignore_index
    return bound, logits, labels


@given(problems())
@search
def test_value_and_gradient_of_the_twin(problem):
    bound, logits, labels = problem
    values, expected = bound(logits, labels), twin(bound, logits, labels)
    assert values.shape == labels.shape
    close(values, expected)
    if expected.requires_grad:
        close(gradient(values, logits), gradient(expected, logits), 1e-10)
    else:  # all are ignored
        same(gradient(values, logits), torch.zeros_like(logits))


@pytest.mark.parametrize("mu", MUS)
def test_any_phi_is_the_twin(mu):
    logits, labels = example()
    bound = LowerBound(torch.erf, mu)
    close(bound(logits, labels), twin(bound, logits, labels))
    close(gradient(bound(logits, labels), logits), gradient(twin(bound, logits, labels), logits), 1e-10)


@bounds
def test_one_example_without_a_batch(bound):
    logits, labels = example(n=1)
    row = logits.detach()[0].requires_grad_()
    close(bound(row, labels[0]), twin(bound, row, labels[0]))
    same(gradient(bound(row, labels[0]), row), gradient(bound(logits, labels), logits)[0])
    p = mixed(logits)
    same(bound(row, p[0]), bound(logits, p)[0])


@bounds
@pytest.mark.parametrize("ignore_index", [-100, 255, 3])
def test_ignored_labels_are_left_out(bound, ignore_index):
    bound = copy.copy(bound)
    object.__setattr__(bound, "ignore_index", ignore_index)
    logits, labels = example(n=6, rest=(2,))
    labels[labels == ignore_index] = 0
    labels[[0, 2, 5], [0, 1, 0]] = ignore_index
    values = bound(logits, labels)
    close(values, twin(bound, logits, labels))
    ignored = labels == ignore_index
    assert (values[ignored] == 0).all()
    assert (gradient(values, logits).movedim(1, -1)[ignored] == 0).all()
    everything = torch.full_like(labels, ignore_index)
    values = bound(logits, everything)
    same(values, torch.zeros_like(values))
    same(gradient(values, logits), torch.zeros_like(logits))


# Class probabilities


@bounds
@pytest.mark.parametrize("rest", RESTS)
def test_probabilities_give_the_expectation_over_labels(bound, rest):
    logits, labels = example(n=3, rest=rest)
    p = mixed(logits).requires_grad_()
    of_label = torch.stack([bound(logits, torch.full_like(labels, k)) for k in range(logits.shape[1])], 1)
    values, expected = bound(logits, p), (p * of_label).sum(1)
    close(values, expected)
    for ours, theirs in zip(gradient(values, logits, p), gradient(expected, logits, p), strict=True):
        close(ours, theirs, 1e-10)
    weights = torch.linspace(0.5, 1.5, values.numel(), dtype=values.dtype).view(values.shape).unsqueeze(1)
    close(gradient(bound(logits, p), p), weights * of_label.detach(), 1e-10)


@bounds
@pytest.mark.parametrize("rest", RESTS)
def test_one_hot_probabilities_are_labels(bound, rest):
    logits, labels = example(rest=rest)
    p = F.one_hot(labels, logits.shape[1]).movedim(-1, 1).double()
    close(bound(logits, p), bound(logits, labels))
    close(gradient(bound(logits, p), logits), gradient(bound(logits, labels), logits))


@bounds
@pytest.mark.parametrize("width", [0, 2, 3])
def test_blocks_of_labels_give_the_whole(bound, width, monkeypatch):
    logits, _ = example(n=3, rest=(2,))
    p = mixed(logits).requires_grad_()
    whole = bound(logits, p)
    expected = gradient(whole, logits, p)
    monkeypatch.setattr("bisam.objectives.bounds._BLOCK", width * logits.numel())
    blocked = bound(logits, p)
    close(blocked, whole)
    for ours, theirs in zip(gradient(blocked, logits, p), expected, strict=True):
        close(ours, theirs)
    with torch.no_grad():
        close(bound(logits, p), whole)


@bounds
@pytest.mark.parametrize("ignore_index", [0, 4])
def test_no_class_is_ignored_among_probabilities(bound, ignore_index):
    """As in torch, whose cross-entropy has no ignore_index for probabilities."""
    logits, _ = example()
    p = mixed(logits)
    ignoring = copy.copy(bound)
    object.__setattr__(ignoring, "ignore_index", ignore_index)
    same(ignoring(logits, p), bound(logits, p))
    same(gradient(ignoring(logits, p), logits), gradient(bound(logits, p), logits))


@bounds
@pytest.mark.parametrize("rest", RESTS)
@pytest.mark.parametrize("soft", [False, True])
def test_an_empty_batch(bound, rest, soft):
    logits, labels = example(n=0, rest=rest)
    q = bound(logits, mixed(logits) if soft else labels)
    assert q.shape == (0, *rest)
    assert gradient(q, logits).shape == logits.shape


# Large vocabularies


@given(problems(), st.integers(1, 12))
@settings(deadline=None, derandomize=True, max_examples=60)
def test_blocks_of_rows_give_the_whole(problem, most):
    """To 1e-14: torch may add the terms of a row in another order."""
    bound, logits, labels = problem
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bisam.objectives.bounds._BLOCK", most)
        values = bound(logits, labels)
        slope = gradient(values, logits)
        again = gradient(bound(logits, labels), logits, create_graph=True).detach()
    close(values, bound(logits, labels), 1e-14)
    close(values, twin(bound, logits, labels))
    close(slope, gradient(bound(logits, labels), logits), 1e-14)
    close(again, slope, 1e-10)


@pytest.mark.parametrize("shape", [(5, 7), (2, 7, 9), (1, 3, 2, 4, 5)], ids=str)
@pytest.mark.parametrize("most", [1, 6, 14, 20, 50, 1000])
@pytest.mark.parametrize("name", ["_BLOCK", "_BLOCK_ON_CPU"])
def test_blocks_have_each_row_once_and_no_more_entries_than_wanted(shape, most, name, monkeypatch):
    monkeypatch.setattr(bounds_module, name, most)
    seen, logits = torch.zeros(shape), torch.zeros(shape)
    for rows, block in bounds_module._blocks(logits):
        seen[block] += 1
        assert torch.equal(seen[block].amin(1), seen[:, 0][rows])
        assert logits[block].numel() <= max(most, shape[1])
    assert (seen == 1).all()


def test_blocks_are_larger_where_the_cache_does_not_count():
    rows, classes = 64, 2**14
    assert len(list(bounds_module._blocks(torch.empty(rows, classes)))) == 4
    assert len(list(bounds_module._blocks(torch.empty(rows, classes, device="meta")))) == 1


@fast
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["classes last", "classes in dimension 1"])
def test_a_large_vocabulary_needs_no_copy_of_the_logits_but_their_gradient(bound, dtype, layout, monkeypatch):
    """Cross-entropy has a tensor of this size after its forward pass, and two more in its backward pass."""
    monkeypatch.setattr("bisam.objectives.bounds._BLOCK", 4096)
    n, length, classes = 4, 16, 1000
    logits, labels = example(n, classes, (length,), dtype=dtype)
    labels.view(-1)[::5] = -100
    leaf = logits.detach().movedim(1, -1).contiguous() if layout == "classes last" else logits.detach()
    leaf.requires_grad_()
    size = logits.element_size() / 4

    def peaks(objective):
        with Peak(leaf.numel()) as memory:
            z = leaf.view_as(leaf)  # which the mode counts
            values = objective(z.movedim(-1, 1) if layout == "classes last" else z, labels)
            forward, memory.peak = memory.peak - size, 0.0
            values.sum().backward()
        grad, leaf.grad = leaf.grad, None
        return forward, memory.peak - size, values, grad

    forward, backward, values, grad = peaks(bound)
    assert (forward, backward) == (0, size)
    assert all(theirs >= least for theirs, least in zip(peaks(CrossEntropy()), (size, 2 * size), strict=False))
    monkeypatch.setattr("bisam.objectives.bounds._BLOCK", 2**24)
    kept = peaks(bound)
    close(values, kept[2], 1e-5)
    close(grad, kept[3], 1e-5 if dtype == torch.float32 else 1e-2)


@fast
def test_large_vocabularies_under_autocast_and_without_gradient(bound, monkeypatch):
    logits, labels = example(6, 5, (3,), dtype=torch.float32)
    labels[1] = -100
    expected = bound(logits, labels)
    monkeypatch.setattr("bisam.objectives.bounds._BLOCK", 8)
    with torch.no_grad():
        close(bound(logits, labels), expected.detach(), 1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = bound(logits.bfloat16(), labels)
    assert half.dtype == torch.float32
    close(half, expected, 0.1)
    labels[2, 1] = 5
    with pytest.raises(ValueError, match=r"label 5 is outside \[0, 5\)"):
        bound(logits, labels)


def test_logits_that_are_split_over_ranks_are_taken_whole(monkeypatch):
    monkeypatch.setattr("bisam.objectives.bounds._BLOCK", 8)
    logits, labels = example(dtype=torch.float32)
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        split, where = (distribute_tensor(t.detach(), mesh, [Shard(0)]) for t in (logits, labels))
        values = NegLog()(split.requires_grad_(), where)
        values.sum().backward()
        close(values.full_tensor().detach(), NegLog()(logits, labels).detach(), 1e-6)
        assert isinstance(split.grad, DTensor)
    finally:
        distributed.destroy_process_group()


# The bound

HUGE = [0.0, 1.0, -1.0, 1e-3, 30.0, -30.0, 1e4, -1e4, 1e30, -1e30]


@given(
    st.integers(2, 6).flatmap(
        lambda k: st.lists(
            st.lists(st.sampled_from(HUGE) | st.floats(-50, 50, width=32), min_size=k, max_size=k),
            max_size=5,
            min_size=1,
        )
    ),
    st.sampled_from(MUS),
    st.sampled_from(ALPHAS),
    st.sampled_from([torch.float32, torch.float64]),
)
@search
def test_never_above_the_0_1_loss_and_always_finite(rows, mu, alpha, dtype):
    logits = torch.tensor(rows, dtype=dtype, requires_grad=True)
    labels = torch.arange(len(rows)) % logits.shape[1]
    wrong = (logits > logits.gather(1, labels[:, None])).any(1).to(dtype)
    for bound in (NegLog(mu), Tanh(mu, alpha)):
        q = bound(logits, labels)
        assert q.isfinite().all()
        assert (q - math.log(logits.shape[1]) / mu <= wrong + 1e-5).all()
        assert gradient(q, logits).isfinite().all()


@pytest.mark.parametrize("bound", [NegLog(), *[Tanh(alpha=alpha) for alpha in ALPHAS]], ids=name)
def test_phi_is_below_the_step(bound):
    x = torch.cat([torch.linspace(-40, 40, 4001, dtype=torch.double), torch.tensor(HUGE, dtype=torch.double)])
    assert (bound.phi(x) <= (x > 0).double() + 1e-15).all()
    assert bound.phi(torch.zeros(())) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("mu", MUS)
@pytest.mark.parametrize("height", [1e4, 1e30])
@pytest.mark.parametrize("kind", [NegLog, Tanh])
def test_saturated_logits_stay_finite(kind, mu, height):
    logits = height * torch.eye(3).repeat(2, 1) - height * torch.eye(3).roll(1, 0).repeat(2, 1)
    logits.requires_grad_()
    for labels in (torch.arange(6) % 3, (torch.arange(6) + 1) % 3):
        for targets in (labels, F.one_hot(labels, 3).float()):
            q = kind(mu)(logits, targets)
            assert q.isfinite().all()
            assert gradient(q, logits).isfinite().all()


@bounds
@pytest.mark.parametrize("soft", [False, True])
def test_a_constant_added_to_a_row_changes_nothing(bound, soft):
    logits, labels = example()
    targets = mixed(logits) if soft else labels
    moved = (logits.detach() + torch.tensor([[1.0], [-7.0], [100.0], [0.1]])).requires_grad_()
    close(bound(moved, targets), bound(logits, targets), 1e-11)
    close(gradient(bound(moved, targets), moved), gradient(bound(logits, targets), logits), 1e-11)
    close(gradient(bound(logits, targets), logits).sum(1), torch.zeros(4, dtype=torch.double))


@bounds
@pytest.mark.parametrize("soft", [False, True])
def test_classes_permute(bound, soft):
    logits, labels = example()
    order = torch.tensor([3, 0, 4, 1, 2])
    targets = mixed(logits) if soft else labels
    reordered = targets[:, order] if soft else order.argsort()[labels]
    turned = logits.detach()[:, order].requires_grad_()
    close(bound(turned, reordered), bound(logits, targets))
    close(gradient(bound(turned, reordered), turned), gradient(bound(logits, targets), logits)[:, order], 1e-11)


# Precision, and what belongs to the caller


@bounds
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_reduced_in_float32(bound, soft, dtype):
    logits, labels = example(dtype=dtype)
    wide = logits.detach().float().requires_grad_()
    targets = mixed(logits) if soft else labels
    q, expected = bound(logits, targets), bound(wide, targets)
    assert q.dtype == torch.float32
    same(q, expected)
    g = gradient(q, logits)
    assert g.dtype == dtype
    same(g, gradient(expected, wide).to(dtype))


def confident(classes, rest=(), margins=(2, 4, 8, 12, 16, 20, 30, 40, 60)):
    """Float32 logits in which the label leads by each margin, and the labels."""
    g = torch.Generator().manual_seed(0)
    logits = -torch.rand(len(margins), classes, *rest, generator=g)
    labels = torch.randint(classes, (len(margins), *rest), generator=g)
    logits.scatter_(1, (labels.unsqueeze(1) + 1) % classes, 0.0)  # the largest of the others
    lead = torch.tensor(margins, dtype=torch.float32).view(-1, *[1] * (len(rest) + 1)).expand(-1, 1, *rest)
    return logits.scatter_(1, labels.unsqueeze(1), lead).requires_grad_(), labels


def label_gradient(bound, logits, labels):
    """dQ/df_y in float64: minus the sum over the other classes, and no difference of large terms."""
    index = labels.unsqueeze(1)
    wide = logits.detach().double()
    margins = wide - wide.gather(1, index)
    if isinstance(bound, Tanh):
        slope = bound.alpha / torch.cosh(bound.alpha * margins) ** 2
    else:
        slope = 1 / (1 + torch.exp(margins) / (math.e - 1))
    terms = (bound.mu * phi_of(bound)(margins)).softmax(1) * slope
    return -terms.scatter(1, index, 0.0).sum(1)


CONFIDENT = [NegLog(), NegLog(5.0), NegLog(0.3), Tanh(), Tanh(1.0, 1.0), Tanh(65.0), LowerBound(NegLog().phi, 2.0)]


@pytest.mark.parametrize("bound", CONFIDENT, ids=name)
@pytest.mark.parametrize("classes", [2, 10])
@pytest.mark.parametrize("rest", [(), (2,)])
@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("kind", ["labels", "probabilities", "ignored"])
def test_confident_examples_have_accurate_gradients_in_float32(bound, classes, rest, create_graph, kind):
    """To 2e-5 relative, up to the margin at which the gradient or an exponential leaves the range of float32."""
    logits, labels = confident(classes, rest)
    expected, targets = label_gradient(bound, logits, labels), labels
    if kind == "probabilities":
        targets = F.one_hot(labels, classes).movedim(-1, 1).float()
    if kind == "ignored":
        targets = labels.clone()
        targets[1::2] = -100
        expected[1::2] = 0
    g = torch.autograd.grad(bound(logits, targets).sum(), logits, create_graph=create_graph)[0].detach()
    torch.testing.assert_close(g.gather(1, labels.unsqueeze(1)).squeeze(1).double(), expected, rtol=2e-5, atol=1e-34)
    others = g.scatter(1, labels.unsqueeze(1), 0.0).sum(1)
    torch.testing.assert_close(g.gather(1, labels.unsqueeze(1)).squeeze(1), -others, rtol=1e-6, atol=0)


def test_neg_log_climbs_confident_examples_in_proportion_to_cross_entropy():
    """Q contains the label's own class, so its gradient vanishes with that of cross-entropy, times e/(e - 1)."""
    logits, labels = confident(10, margins=(16, 20, 30))
    q, ce = (torch.autograd.grad(f(logits, labels).sum(), logits)[0] for f in (NegLog(), cross_entropy))
    others = torch.ones_like(q).scatter(1, labels.unsqueeze(1), 0.0).bool()
    ratio = q[others] / ce[others]
    torch.testing.assert_close(ratio, torch.full_like(ratio, math.e / (math.e - 1)), rtol=1e-5, atol=0)
    assert (q[others] < 1e-6).all()


def test_q_is_a_lower_bound_only_after_its_constant_is_subtracted():
    logits, labels = torch.tensor([[0.0, -1.0, -1.0]]), torch.tensor([0])  # classified correctly
    for bound in (NegLog(), Tanh()):
        assert 0 < bound(logits, labels) < math.log(3) / bound.mu


LAYOUTS = {
    "plain": ((4, 5), lambda t: t),
    "transposed": ((5, 4), lambda t: t.t()),
    "strided": ((4, 10), lambda t: t[:, ::2]),
    "expanded": ((1, 5), lambda t: t.expand(4, 5)),
}


@bounds
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_the_callers_logits_are_never_changed(bound, soft, layout, requires_grad):
    shape, view = LAYOUTS[layout]
    base = 3 * torch.randn(shape)
    before, version = base.clone(), base._version
    base.requires_grad_(requires_grad)
    logits = view(base)
    targets = mixed(logits.detach()) if soft else torch.tensor([0, 4, 2, 2])
    kept = targets.clone()
    q = bound(logits, targets)
    dense = view(before).clone().requires_grad_()
    expected = bound(dense, targets)
    close(q, expected, 1e-6)
    if requires_grad:
        actual, reference = torch.autograd.grad(q.sum(), logits)[0], torch.autograd.grad(expected.sum(), dense)[0]
        close(actual, reference, 1e-6)
    same(base.detach(), before)
    same(targets, kept)
    assert base._version == version


@bounds
def test_a_head_that_saves_its_output_trains(bound):
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh())
    x, y = torch.randn(32, 3), torch.randint(5, (32,))
    sharp = SharpnessAware(model, BiSAM(bound=bound), loss=cross_entropy)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = sharp(x, y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


# Autograd and compilers


@bounds
@pytest.mark.parametrize("soft", [False, True])
def test_first_and_second_derivatives(bound, soft):
    logits, labels = example(n=2, classes=3, scale=1.0)
    if soft:
        inputs = logits, mixed(logits).requires_grad_()
        assert torch.autograd.gradcheck(bound, inputs)
        assert torch.autograd.gradgradcheck(bound, inputs)
    else:
        assert torch.autograd.gradcheck(lambda z: bound(z, labels), logits)
        assert torch.autograd.gradgradcheck(lambda z: bound(z, labels), logits)


@fast
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("rest", RESTS)
def test_double_backward_is_that_of_the_general_bound(bound, soft, rest):
    logits, labels = example(rest=rest, scale=1.0)
    targets = mixed(logits) if soft else labels.view(-1).index_fill(0, torch.tensor([1]), -100).view(labels.shape)
    second = []
    for objective in (bound, LowerBound(phi_of(bound), bound.mu)):
        first = gradient(objective(logits, targets), logits, create_graph=True)
        second.append((first.detach(), torch.autograd.grad((first**2).sum(), logits)[0]))
    for ours, theirs in zip(*second, strict=True):
        close(ours, theirs, 1e-10)


@fast
def test_backward_twice_through_a_retained_graph(bound):
    logits, labels = example()
    q = bound(logits, labels)
    first = gradient(q, logits, retain_graph=True)
    same(gradient(q, logits), first)


def compiled(bound, logits, targets, backend):
    torch.compiler.reset()
    call = torch.compile(bound.__call__, fullgraph=True, backend=backend)
    try:
        q = call(logits, targets)
        return q, gradient(q, logits)
    finally:
        torch.compiler.reset()


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("bound", [NegLog(), NegLog(5.0), Tanh(), Tanh(65.0)], ids=name)
def test_compiles_to_one_graph(bound, soft):
    logits, labels = example(dtype=torch.float32)
    targets = mixed(logits) if soft else labels
    q, g = compiled(bound, logits, targets, "aot_eager")
    close(q, bound(logits, targets), 1e-6)
    close(g, gradient(bound(logits, targets), logits), 1e-6)


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("soft", [False, True])
def test_compiles_to_machine_code(soft):
    logits, labels = example(dtype=torch.float32)
    targets = mixed(logits) if soft else labels
    q, g = compiled(NegLog(), logits, targets, "inductor")
    close(q, NegLog()(logits, targets), 1e-6)
    close(g, gradient(NegLog()(logits, targets), logits), 1e-6)


@fast
def test_without_gradient(bound):
    logits, labels = example()
    with torch.no_grad():
        q = bound(logits, labels)
    assert not q.requires_grad
    same(q, bound(logits, labels).detach())
    with torch.inference_mode():
        same(bound(logits, labels), q)


@bounds
def test_under_autocast(bound):
    model, x, y = nn.Linear(3, 5), torch.randn(4, 3), torch.tensor([0, 1, 2, 4])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(x)
        q = bound(logits, y)
    assert (logits.dtype, q.dtype) == (torch.bfloat16, torch.float32)
    same(q, bound(logits, y))
    q.mean().backward()
    assert model.weight.grad.isfinite().all()


# Mean and cross-entropy


@pytest.mark.parametrize("rest", RESTS)
@pytest.mark.parametrize("ignored", [0, 2, None], ids=["none", "some", "all"])
@pytest.mark.parametrize("ignore_index", [-100, 255])
def test_mean_is_that_of_torch(rest, ignored, ignore_index):
    logits, labels = example(rest=rest)
    labels.view(-1)[:ignored] = ignore_index
    expected = F.cross_entropy(logits, labels, ignore_index=ignore_index).nan_to_num()  # 0 where no label counts
    for loss in (CrossEntropy(ignore_index), nn.CrossEntropyLoss(ignore_index=ignore_index, reduction="none")):
        value = mean(loss(logits, labels), labels, loss)
        torch.testing.assert_close(value, expected)
        if ignored is not None:
            close(gradient(value, logits), gradient(F.cross_entropy(logits, labels, ignore_index=ignore_index), logits))


def mean(losses, targets, loss):
    return objectives.mean(losses, objectives.count(losses, targets, loss))


def test_mean_of_what_has_no_labels():
    losses = torch.tensor([1.0, 3.0])
    same(mean(losses.sum(), None, cross_entropy), torch.tensor(4.0))
    same(mean(losses, torch.full((2, 3), -100.0), cross_entropy), torch.tensor(2.0))
    same(mean(losses, torch.tensor([-100, 0]), lambda outputs, targets: losses), torch.tensor(2.0))
    same(mean(losses, None, cross_entropy), torch.tensor(2.0))


@pytest.mark.parametrize("rest", RESTS)
@pytest.mark.parametrize("soft", [False, True])
def test_cross_entropy_is_torchs(rest, soft):
    logits, labels = example(rest=rest)
    labels.view(-1)[0] = -100
    targets = mixed(logits) if soft else labels
    same(cross_entropy(logits, targets), F.cross_entropy(logits, targets, reduction="none"))
    row = logits[(0, slice(None), *[0] * len(rest))]
    same(cross_entropy(row, torch.tensor(2)), F.cross_entropy(row, torch.tensor(2), reduction="none"))


# One logit per label


@st.composite
def label_problems(draw):
    mu = draw(st.sampled_from(MUS))
    bound = draw(
        st.sampled_from([NegLog(mu), Tanh(mu, draw(st.sampled_from(ALPHAS))), LowerBound(references.phi_log, mu)])
    )
    shape = draw(st.sampled_from([(1,), (5,), (4, 1), (3, 4), (2, 3, 2), (2, 1, 2, 2)]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    z = draw(st.sampled_from([0.0, 0.1, 3.0, 30.0])) * torch.randn(shape, generator=g, dtype=torch.double)
    return bound, z.requires_grad_(), torch.randint(2, shape, generator=g), torch.rand(shape, generator=g).double()


@given(label_problems())
@search
def test_a_label_is_a_problem_of_two_classes(problem):
    bound, z, labels, p = problem
    two = torch.stack([torch.zeros_like(z), z], 1)
    expected = bound(two, labels)
    slope = gradient(expected, z, retain_graph=True)
    for dtype in (torch.int64, torch.uint8, torch.bool, torch.float64, torch.float32):
        q = Binary(bound)(z, labels.to(dtype))
        assert q.shape == z.shape
        close(q, expected)
        close(gradient(q, z), slope)
    zero, one = bound(two, torch.zeros_like(labels)), bound(two, torch.ones_like(labels))
    q, mean_of_labels = Binary(bound)(z, p), (1 - p) * zero + p * one
    close(q, mean_of_labels)
    close(gradient(q, z), gradient(mean_of_labels, z))


@given(
    st.lists(st.sampled_from(HUGE) | st.floats(-50, 50, width=32), min_size=1, max_size=8),
    st.sampled_from(MUS),
    st.sampled_from(ALPHAS),
    st.sampled_from([torch.float32, torch.float64]),
)
@search
def test_a_label_is_bounded_by_its_0_1_loss(values, mu, alpha, dtype):
    z = torch.tensor(values, dtype=dtype, requires_grad=True)
    for label in (0.0, 1.0):
        wrong = (z > 0 if label == 0 else z < 0).to(dtype)
        for bound in (NegLog(mu), Tanh(mu, alpha)):
            q = Binary(bound)(z, torch.full_like(z, label))
            assert q.isfinite().all()
            assert (q - math.log(2) / mu <= wrong + 1e-5).all()
            g = gradient(q, z)
            assert g.isfinite().all()
            assert (g >= 0 if label == 0 else g <= 0).all()


@fast
@pytest.mark.parametrize("soft", [False, True])
def test_derivatives_with_one_logit_per_label(bound, soft):
    z = torch.randn(3, 4, dtype=torch.double, generator=torch.Generator().manual_seed(0)).requires_grad_()
    if soft:
        p = torch.linspace(0.1, 0.9, 12, dtype=torch.double).view(3, 4).requires_grad_()
        assert torch.autograd.gradcheck(Binary(bound), (z, p))
        assert torch.autograd.gradgradcheck(Binary(bound), (z, p))
    else:
        labels = torch.arange(12).view(3, 4) % 2
        assert torch.autograd.gradcheck(lambda z: Binary(bound)(z, labels), z)
        assert torch.autograd.gradgradcheck(lambda z: Binary(bound)(z, labels), z)


@pytest.mark.parametrize("bound", CONFIDENT, ids=name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64], ids=str)
def test_confident_labels_have_accurate_gradients_in_float32(bound, dtype):
    z = torch.tensor([2.0, 8, 16, 20, 30, 60, -2, -8, -16, -20, -30, -60], requires_grad=True)
    labels = (z > 0).long()
    expected = label_gradient(bound, torch.stack([torch.zeros_like(z), z], 1), labels) * (2 * labels - 1)
    g = torch.autograd.grad(Binary(bound)(z, labels.to(dtype)).sum(), z)[0]
    torch.testing.assert_close(g.double(), expected, rtol=2e-5, atol=1e-34)


@fast
@pytest.mark.parametrize("height", [1e2, 1e4])
@pytest.mark.parametrize("create_graph", [False, True])
def test_saturated_labels_have_finite_derivatives(bound, height, create_graph):
    z = torch.tensor([height, -height], requires_grad=True)
    for targets in (torch.tensor([0.0, 0.0]), torch.tensor([1.0, 1.0]), torch.tensor([0.1, 0.9])):
        q = Binary(bound)(z, targets)
        g = torch.autograd.grad(q.sum(), z, create_graph=create_graph)[0]
        assert q.isfinite().all()
        assert g.isfinite().all()
        if create_graph:
            assert torch.autograd.grad(g.sum(), z)[0].isfinite().all()


@fast
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_labels_of_half_precision_logits_are_reduced_in_float32(bound, dtype):
    z = torch.randn(4, 3).to(dtype).requires_grad_()
    wide = z.detach().float().requires_grad_()
    for targets in (torch.tensor([0.0, 1.0, 1.0]).expand(4, 3), torch.tensor([0.1, 0.9, 0.3]).expand(4, 3)):
        q, expected = Binary(bound)(z, targets.to(dtype)), Binary(bound)(wide, targets.to(dtype).float())
        assert q.dtype == torch.float32
        same(q, expected)
        g = gradient(q, z)
        assert g.dtype == dtype
        same(g, gradient(expected, wide).to(dtype))


@fast
def test_labels_of_any_layout_and_of_empty_batches(bound):
    base, targets = torch.randn(3, 4), torch.randint(2, (3, 4))
    before, view = base.clone(), base.t().requires_grad_()
    for t in (targets.t(), targets.t().float()):
        same(Binary(bound)(view, t), Binary(bound)(view.contiguous(), t.contiguous()))
    same(base, before)
    for shape in ((0,), (0, 3), (2, 0), (0, 1, 4, 4)):
        for dtype in (torch.float32, torch.bool):
            z = torch.zeros(shape, requires_grad=True)
            q = Binary(bound)(z, torch.zeros(shape, dtype=dtype))
            assert q.shape == gradient(q, z).shape == shape


def test_no_label_is_ignored():
    z, labels = torch.tensor([0.3, -0.7]), torch.tensor([1, 0])
    for ignored in (0, 1, -100):
        same(Binary(NegLog(ignore_index=ignored))(z, labels), Binary()(z, labels))
        same(Binary(NegLog(ignore_index=ignored))(z, labels.float()), Binary()(z, labels))
    assert not hasattr(Binary(), "ignore_index")


@pytest.mark.parametrize(
    "targets", [torch.tensor([[1.0, 0.0, 1.0]] * 4), torch.tensor([[1, 0, 1]] * 4)], ids=["float", "int"]
)
def test_labels_compile_to_one_graph(targets):
    z = torch.randn(4, 3, requires_grad=True)
    q, g = compiled(Binary(), z, targets, "aot_eager")
    close(q, Binary()(z, targets), 1e-6)
    close(g, gradient(Binary()(z, targets), z), 1e-6)


@pytest.mark.parametrize(
    ("bound", "said"),
    [
        (NegLog, r"bound is the class NegLog, not an instance: write NegLog\(...\)"),
        (cross_entropy, r"bound must be a LowerBound such as NegLog\(\) or Tanh\(\), got CrossEntropy"),
        (Binary(), r"bound must be a LowerBound .*, got Binary\(bound=NegLog"),
        (0.05, "bound must be a LowerBound .*, got 0.05"),
    ],
    ids=str,
)
def test_binary_takes_a_bound(bound, said):
    with pytest.raises(TypeError, match=said):
        Binary(bound)


# Training with one logit per label


def network(labels):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, labels)).double()


def label_batch(labels, n=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, generator=g).double(), torch.randint(2, (n, labels), generator=g).double()


def bce(z, y):
    return -(y * torch.log(torch.sigmoid(z)) + (1 - y) * torch.log(torch.sigmoid(-z)))


def q_of_labels(bound, z, y):
    """The bound of each label, from the slow twin of two classes."""
    two = torch.stack([torch.zeros_like(z), z], -1).view(-1, 2)
    return references.q(phi_of(bound), bound.mu, two, y.long().view(-1)).view(z.shape)


def grads_at(model, loss, e=None):
    """The gradient of a loss with the weights displaced by `e`."""
    weights = list(model.parameters())
    for w, d in zip(weights, e or [0] * len(weights), strict=True):
        w.data += d
    grads = torch.autograd.grad(loss(), weights)
    for w, d in zip(weights, e or [0] * len(weights), strict=True):
        w.data -= d
    return list(grads)


def climb(model, bound, rho, x, y):
    g = grads_at(model, lambda: q_of_labels(bound, model(x), y).mean())
    norm = sum((t**2).sum() for t in g).sqrt()
    return [rho * t / norm for t in g]


def sam(model, bound, rho, x, y, part=slice(None)):
    """SAM on a flat batch, in a few lines of its own: `part` of the examples is descended on."""
    e = climb(model, bound, rho, x, y)
    return grads_at(model, lambda: bce(model(x[part]), y[part]).mean(), e)


def trained_with(method, labels, loss, reference, steps=5):
    """Largest difference of the weights, after some steps, from those of a reference gradient."""
    model, twin = network(labels), network(labels)
    sharp = SharpnessAware(model, method, loss)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.3, momentum=0.9) for m in (model, twin)]
    for step in range(steps):
        x, y = label_batch(labels, seed=step)
        optimizers[0].zero_grad()
        sharp(x, y).backward()
        for w, g in zip(twin.parameters(), reference(twin, x, y), strict=True):
            w.grad = g
        for optimizer in optimizers:
            optimizer.step()
    start = network(labels)
    assert all((a - b).abs().max() > 1e-2 for a, b in zip(model.parameters(), start.parameters(), strict=True))
    return max((a - b).abs().max() for a, b in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("labels", [1, 3])
@pytest.mark.parametrize("bound", [NegLog(), Tanh(), LowerBound(references.phi_log, 2.0)], ids=name)
def test_training_on_labels_is_sam_against_their_bound(bound, labels, reduction):
    loss = nn.BCEWithLogitsLoss(reduction=reduction)
    assert trained_with(BiSAM(0.3, Binary(bound)), labels, loss, lambda *of: sam(of[0], bound, 0.3, *of[1:])) < 1e-10


def test_methods_that_take_examples_take_the_mean_over_their_labels():
    bound, loss = NegLog(), nn.BCEWithLogitsLoss(reduction="none")
    method = BiSAM(0.3, Binary(bound))

    def hardest(model, x, y):
        rows = bce(model(x), y).mean(1).topk(3).indices
        return sam(model, bound, 0.3, x[rows], y[rows])

    def parts(model, x, y):  # of 3, 3 and 2 examples
        grads = [(len(a), sam(model, bound, 0.3, a, b)) for a, b in zip(x.split(3), y.split(3), strict=True)]
        return [sum(n * g[i] for n, g in grads) / len(x) for i in range(len(grads[0][1]))]

    def risen(model, x, y):
        e, before = climb(model, bound, 0.3, x, y), bce(model(x), y).mean(1)
        displaced = copy.deepcopy(model)
        for w, d in zip(displaced.parameters(), e, strict=True):
            w.data += d
        return sam(model, bound, 0.3, x, y, (bce(displaced(x), y).mean(1) - before).topk(3).indices)

    for made, reference in (
        (KSAM(3, method), hardest),
        (MSAM(3, method), parts),
        (ESAM(L2(0.3), ascent=Binary(bound), gamma=0.5), risen),
        (LookSAM(L2(0.3), ascent=Binary(bound), k=1), lambda *of: sam(of[0], bound, 0.3, *of[1:])),
    ):
        assert trained_with(made, 3, loss, reference) < 1e-10, made


@pytest.mark.parametrize("method", [KSAM(3, BiSAM(0.3, Binary())), ESAM(ascent=Binary())], ids=str)
def test_methods_that_take_examples_name_the_remedy_for_a_mean_over_labels(method):
    model = network(3)
    with pytest.raises(TypeError, match=r'pass your criterion with reduction="none"'):
        SharpnessAware(model, method, nn.BCEWithLogitsLoss())(*label_batch(3))
    SharpnessAware(model, method, nn.BCEWithLogitsLoss(reduction="none"))(*label_batch(3)).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    "method", [BiSAM(0.3, Binary()), ESAM(ascent=Binary()), MSAM(4, BiSAM(0.3, Binary(Tanh())))], ids=str
)
def test_a_binary_head_trains(method):
    torch.manual_seed(0)
    head = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1), nn.Flatten(0))  # logits (N,)
    x = torch.randn(64, 4)
    y = (x[:, 0] > 0).float()
    sharp = SharpnessAware(head, method, nn.BCEWithLogitsLoss(reduction="none"))
    optimizer = torch.optim.SGD(head.parameters(), lr=1.0)
    for _ in range(60):
        optimizer.zero_grad()
        sharp(x, y).backward()
        optimizer.step()
    assert sharp.clean.losses.shape == (64,)
    assert ((sharp.clean.outputs > 0) == (y > 0)).float().mean() > 0.9


# Values


@pytest.mark.parametrize(
    "bound", [NegLog(), NegLog(5.0, ignore_index=3), Tanh(), Tanh(2.0, 0.3), Binary(Tanh()), CrossEntropy(7)]
)
def test_are_values(bound):
    again = pickle.loads(pickle.dumps(bound))
    assert again == bound
    assert hash(again) == hash(bound)
    assert eval(repr(bound)) == bound
    assert copy.deepcopy(bound) == bound
    if isinstance(bound, LowerBound):
        logits, labels = example()
        same(again(logits, labels), bound(logits, labels))


def test_differ_by_their_parameters():
    distinct = [
        NegLog(),
        NegLog(2.0),
        NegLog(ignore_index=0),
        Tanh(1.0),
        Tanh(1.0, 1.0),
        Tanh(),
        CrossEntropy(),
        Binary(),
        Binary(Tanh()),
    ]
    assert len(set(distinct)) == len(distinct)
    assert LowerBound(torch.erf, 1.0) == LowerBound(torch.erf, 1.0) != LowerBound(torch.tanh, 1.0)
    with pytest.raises(AttributeError):
        NegLog().mu = 2.0


# Mistakes


@pytest.mark.parametrize("bad", [0, 0.0, -1.0, math.nan, math.inf, -math.inf])
def test_a_parameter_that_is_not_positive_is_refused(bad):
    for make in (lambda: NegLog(bad), lambda: Tanh(bad), lambda: LowerBound(torch.tanh, bad)):
        with pytest.raises(ValueError, match=f"mu must be positive and finite, got {bad!r}"):
            make()
    with pytest.raises(ValueError, match=f"alpha must be positive and finite, got {bad!r}"):
        Tanh(alpha=bad)


Z, Y = torch.zeros(4, 3), torch.zeros(4, dtype=torch.long)
MISTAKES = [
    (Z, Y.float(), ValueError, r"floating-point targets are class probabilities.*\(4, 3\), got \(4,\).*targets.long"),
    (Z, torch.zeros(4, 2), ValueError, r"got \(4, 2\)"),
    (Z, Y.int(), TypeError, r"labels must be int64, got torch.int32: use targets.long\(\)"),
    (Z, Y.bool(), TypeError, "got torch.bool"),
    (Z, Y[:3], ValueError, r"labels for outputs of shape \(4, 3\) need shape \(4,\), got \(3,\)"),
    (Z, Y[:, None], ValueError, r"got \(4, 1\)"),
    (Z[..., None], Y, ValueError, r"need shape \(4, 1\), got \(4,\)"),
    (Z[0], Y[:1], ValueError, r"outputs of shape \(3,\) need shape \(\), got \(1,\)"),
    (Z[0], Y[:3], ValueError, r"outputs of shape \(3,\) need shape \(\), got \(3,\)"),
    (Z, torch.tensor([0, 3, 1, 7]), ValueError, r"label 3 is outside \[0, 3\): 2 of 4 labels are"),
    (Z, torch.tensor([0, -100, -1, 2]), ValueError, r"label -1 is outside \[0, 3\): 1 of 4 labels are"),
    (Z[0], torch.tensor(5), ValueError, r"label 5 is outside \[0, 3\): 1 of 1 labels are"),
    ((Z,), Y, TypeError, "outputs must be a tensor, got tuple"),
    (Z, [0, 1, 2, 0], TypeError, "targets must be a tensor, got list"),
    (Z.long(), Y, TypeError, r"outputs must be floating-point logits .*got torch.int64"),
    (torch.tensor(1.0), torch.tensor(0), TypeError, r"outputs must be floating-point logits .*shape \(\)"),
]


@pytest.mark.parametrize(("outputs", "targets", "kind", "message"), MISTAKES)
@pytest.mark.parametrize("objective", [cross_entropy, NegLog(), NegLog(65.0), Tanh()], ids=name)
def test_a_mistake_is_named(objective, outputs, targets, kind, message):
    with pytest.raises(kind, match=message):
        objective(outputs, targets)


@bounds
def test_one_class_is_refused(bound):
    for outputs, targets in ((Z[:, :1], Y), (Z[:, :1], Z[:, :1]), (Z[0, :1], Y[0])):
        with pytest.raises(ValueError, match=r"compares classes, and outputs of shape .* have only one: .*Binary\("):
            bound(outputs, targets)


@pytest.mark.parametrize("make", [NegLog, Tanh, CrossEntropy, OBF, partial(LowerBound, torch.tanh, 1.0)])
@pytest.mark.parametrize("bad", ["a", 1.5, None, True])
def test_a_label_that_is_ignored_is_a_whole_number(make, bad):
    with pytest.raises(TypeError, match=f"ignore_index must be an int, got {bad!r}"):
        make(ignore_index=bad)


def test_phi_is_a_function():
    with pytest.raises(TypeError, match="phi must be a function from a tensor to one of the same shape, got 3"):
        LowerBound(3, 1.0)
