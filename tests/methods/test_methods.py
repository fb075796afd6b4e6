"""Methods: against slow twins on one flat vector, and their degenerate cases bit for bit."""

from __future__ import annotations

import copy
from dataclasses import FrozenInstanceError

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

from bisam import (
    ASAM,
    ERM,
    MSAM,
    SAM,
    BiSAM,
    LowerBound,
    ModelOracle,
    NegLog,
    SharpnessAware,
    Tanh,
    Vector,
    cross_entropy,
)
from bisam.masks import top
from bisam.oracle import Query
from bisam.perturbations import L2, Adaptive
from bisam.validation import portion, share, whole
from tests.support import cases, references


def close(actual, expected, tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("optimizer", cases.OPTIMIZERS)
@pytest.mark.parametrize("model", cases.MODELS)
@pytest.mark.parametrize("method", cases.METHODS)
def test_twenty_steps_equal_the_slow_twin(method, model, optimizer):
    (method, twin), model, make = cases.METHODS[method], cases.MODELS[model](), cases.OPTIMIZERS[optimizer]
    frozen = copy.deepcopy(model)
    w = nn.Parameter(references.flat(model))
    scaled = torch.cat([torch.full((p.numel(),), "weight" in name) for name, p in model.named_parameters()])
    sharp = SharpnessAware(model, method, cross_entropy)
    optimizer, flat_optimizer = make(model.parameters()), make([w])
    for step in range(20):
        x, y = cases.batch(step)
        optimizer.zero_grad()
        sharp(x, y).backward()
        optimizer.step()

        def at(loss, part=slice(None), x=x, y=y):
            return references.gradient(frozen, loss, x[part], y[part])

        w.grad = twin(w.detach(), at, scaled)
        flat_optimizer.step()
    assert (references.flat(model) - references.flat(frozen)).abs().max() > 0.05  # it went somewhere
    close(references.flat(model), w.detach(), 1e-9)


# Degenerate cases.


@pytest.mark.parametrize("optimizer", cases.OPTIMIZERS)
@pytest.mark.parametrize("model", cases.MODELS)
def test_erm_is_the_plain_loop(model, optimizer):
    model = cases.MODELS[model]()
    plain, criterion = copy.deepcopy(model), nn.CrossEntropyLoss()
    ours = cases.train(SharpnessAware(model, ERM(), cross_entropy), model, optimizer=optimizer)
    assert ours == cases.train(lambda x, y: criterion(plain(x), y), plain, optimizer=optimizer)


@pytest.mark.parametrize(
    "method",
    [SAM(L2(0.0)), BiSAM(0.0), BiSAM(0.0, Tanh()), ASAM(0.0), SAM(Adaptive(0.0, 0.01, lambda name, w: "w" in name))],
    ids=["SAM", "BiSAM-log", "BiSAM-tanh", "ASAM", "official ASAM"],
)
@pytest.mark.parametrize("model", cases.MODELS)
def test_rho_zero_is_erm(model, method):
    model = cases.MODELS[model]()
    plain = copy.deepcopy(model)
    ours = cases.train(SharpnessAware(model, method, cross_entropy), model)
    assert ours == cases.train(SharpnessAware(plain, ERM(), cross_entropy), plain)


@pytest.mark.parametrize("m", [8, 9, 1000])
@pytest.mark.parametrize("model", cases.MODELS)
def test_msam_of_one_part_is_the_method(model, m):
    model = cases.MODELS[model]()
    plain = copy.deepcopy(model)
    ours = cases.train(SharpnessAware(model, MSAM(m, BiSAM(0.1)), cross_entropy), model)
    assert ours == cases.train(SharpnessAware(plain, BiSAM(0.1), cross_entropy), plain)


def test_msam_counts_uneven_parts_by_their_size():
    model, (x, y) = cases.mlp(), cases.batch(n=10)
    parameters = list(model.parameters())
    sharp = SharpnessAware(model, SAM(L2(0.3)), cross_entropy)
    parts = [slice(0, 4), slice(4, 8), slice(8, 10)]
    losses = [sharp(x[p], y[p]) for p in parts]
    grads = [torch.autograd.grad(loss, parameters) for loss in losses]
    weights = [0.4, 0.4, 0.2]
    expected = [sum(w * g for w, g in zip(weights, same, strict=True)) for same in zip(*grads, strict=True)]

    loss = SharpnessAware(model, MSAM(4, SAM(L2(0.3))), cross_entropy)(x, y)
    close(loss, sum(w * part for w, part in zip(weights, losses, strict=True)), 1e-15)
    for actual, wanted in zip(torch.autograd.grad(loss, parameters), expected, strict=True):
        close(actual, wanted, 1e-15)


@pytest.mark.parametrize("m", [1, 3, 8])
def test_msam_of_erm_is_erm_without_a_norm(m):
    model, (x, y) = cases.mlp(), cases.batch(n=8)
    actual = torch.autograd.grad(SharpnessAware(model, MSAM(m, ERM()), cross_entropy)(x, y), model.parameters())
    expected = torch.autograd.grad(cross_entropy(model(x), y).mean(), model.parameters())
    for a, e in zip(actual, expected, strict=True):
        close(a, e, 1e-15)


@pytest.mark.parametrize("bound", [NegLog(), NegLog(3.0), Tanh(), Tanh(1.0, 0.5)], ids=str)
def test_sam_with_the_general_bound_is_bisam(bound):
    model = cases.mlp()
    general = copy.deepcopy(model)
    cases.train(SharpnessAware(model, BiSAM(0.3, bound), cross_entropy), model)
    ascent = LowerBound(bound.phi, bound.mu)
    cases.train(SharpnessAware(general, SAM(L2(0.3), ascent=ascent), cross_entropy), general)
    close(references.flat(general), references.flat(model), 1e-9)


def test_bisam_is_not_sam():
    model, batch = cases.mlp(), cases.batch()
    oracle = ModelOracle(model, cross_entropy)
    e, other = BiSAM(0.1).climb(oracle, batch), SAM(L2(0.1)).climb(oracle, batch)
    assert e.dot(other) / (e.norm() * other.norm()) < 0.99


def test_descent_objective_is_the_one_that_is_minimised():
    model, batch = cases.mlp(), cases.batch()
    answer = BiSAM(0.1, descent=NegLog())(ModelOracle(model, cross_entropy), batch)
    expected = SAM(L2(0.1))(ModelOracle(model, NegLog()), batch)
    assert torch.equal(answer.losses, expected.losses)


# The direction of BiSAM.


def displacement(ascent, forward=None):
    torch.manual_seed(1)
    oracle = ModelOracle(cases.mlp(), cross_entropy, forward)
    return torch.cat([t.reshape(-1) for t in SAM(L2(0.05), ascent=ascent).climb(oracle, cases.batch())])


@pytest.mark.parametrize("bound", [NegLog(), Tanh()], ids=str)
@pytest.mark.parametrize("constant", [0.5, 10.0, 1e4])  # not smaller: every SAM adds 1e-12 to the norm
def test_direction_ignores_a_constant_factor(bound, constant):
    close(displacement(lambda z, y: constant * bound(z, y)), displacement(bound), 1e-12)


@pytest.mark.parametrize("bound", [NegLog(), Tanh()], ids=str)
def test_direction_ignores_a_constant_added_to_each_row(bound):
    shift = torch.linspace(-5, 5, 8, dtype=torch.double)[:, None]
    close(displacement(bound, lambda model, x, y: (model(x) + shift, y)), displacement(bound), 1e-12)


@pytest.mark.parametrize("bound", [NegLog(), Tanh()], ids=str)
def test_direction_ignores_the_order_of_the_classes(bound):
    order = torch.tensor([2, 0, 3, 1])
    close(displacement(bound, lambda model, x, y: (model(x)[:, order], order.argsort()[y])), displacement(bound), 1e-12)


# Methods on an oracle without a model.

A = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.double)


def test_sam_needs_no_model():
    oracle = cases.Quadratic(2.0, 3.0)
    answer = SAM(L2(0.5))(oracle, (A,))
    g = torch.tensor([2.0, 6.0], dtype=torch.double)
    w = torch.tensor([2.0, 3.0], dtype=torch.double) + 0.5 * g / g.norm()
    close(answer.gradient.tensors[0], A.mean(0) * (w - 1), 1e-12)
    close(answer.value, (A * (w - 1) ** 2).sum(1).mean() / 2, 1e-12)


def test_asam_needs_no_model():
    oracle = cases.Quadratic(2.0, -3.0)
    w, g = torch.tensor([2.0, -3.0], dtype=torch.double), torch.tensor([2.0, -12.0], dtype=torch.double)
    t = w.abs() + 0.1
    e = 0.5 * t**2 * g / (t * g).norm()
    close(ASAM(0.5, 0.1)(oracle, (A,)).gradient.tensors[0], A.mean(0) * (w + e - 1), 1e-12)


def test_msam_needs_no_model():
    oracle = cases.Quadratic(2.0, 3.0)
    first, second = (SAM(L2(0.5))(oracle, (a[None],)).gradient.tensors[0] for a in A)
    close(MSAM(1, SAM(L2(0.5)))(oracle, (A,)).gradient.tensors[0], (first + second) / 2, 1e-12)


def test_a_zero_gradient_gives_a_zero_displacement():
    for method in (SAM(), ASAM(1.0), SAM(Adaptive(1.0, 0.1))):
        assert torch.equal(method.climb(cases.Quadratic(1.0, 1.0), (A,)).tensors[0], torch.zeros(2).double())


def test_shifted_is_the_oracle_of_the_moved_point():
    oracle, moved = cases.Quadratic(2.0, 3.0), cases.Quadratic(2.5, 1.0)
    by = moved.weights - oracle.weights
    shifted = oracle.shifted(by)
    assert torch.equal(shifted.weights.tensors[0], moved.weights.tensors[0])
    for method in (ERM(), SAM(L2(0.5)), ASAM(0.5)):
        close(method(shifted, (A,)).gradient.tensors[0], method(moved, (A,)).gradient.tensors[0], 1e-12)
    twice = shifted.shifted(by * -1)
    close(ERM()(twice, (A,)).gradient.tensors[0], ERM()(oracle, (A,)).gradient.tensors[0], 1e-12)
    assert torch.equal(oracle.weights.tensors[0], torch.tensor([2.0, 3.0]).double())


def test_shifted_shares_state_step_and_names():
    oracle = cases.Quadratic(2.0, 3.0)
    oracle.step = 5
    shifted = oracle.shifted(oracle.weights)
    shifted.state["v"] = 1
    assert (oracle.state, shifted.step, shifted.names) == ({"v": 1}, 5, ["w"])


def test_shifted_model_oracle_leaves_weights_and_statistics():
    model, batch = cases.convnet(), cases.batch()
    before = cases.everything(model)
    oracle = ModelOracle(model, cross_entropy)
    by = oracle.weights * 0.1
    answer = ERM()(oracle.shifted(by), batch)
    assert cases.everything(model) == before
    references.load(model, references.flat(model) * 1.1)
    close(answer.value, cross_entropy(model(batch[0]), batch[1]).mean().detach(), 1e-12)


def test_several_queries_are_answered_in_order():
    oracle = cases.Quadratic(2.0, 3.0)
    e = oracle.weights * 0.1
    plain, displaced, value = oracle.ask([Query((A,)), Query((A,), at=e), Query((A[:1],), grad=False)])
    assert torch.equal(plain.losses, oracle.query((A,)).losses)
    assert torch.equal(displaced.losses, oracle.query((A,), at=e).losses)
    assert value.grad is None
    assert value.losses.shape == (1,)


def test_a_query_is_constant_and_gives_its_displacement_away_once():
    e = Vector([torch.ones(2)])
    query = Query((A,), at=e, track=None)
    with pytest.raises(FrozenInstanceError):
        query.grad = False
    assert query.displaced
    assert not query.tracks
    assert query.take() is e
    assert query.at is None
    assert query.displaced
    assert not query.tracks
    with pytest.raises(RuntimeError, match="taken already"):
        query.take()


def test_a_query_at_the_weights_may_be_asked_again():
    query = Query((A,))
    assert query.take() is None
    assert query.take() is None
    assert query.tracks
    assert not Query((A,), track=False).tracks


def test_a_displaced_query_is_asked_once():
    oracle = cases.Quadratic(2.0, 3.0)
    queries = [Query((A,), at=oracle.weights * 0.1)]
    oracle.ask(queries)
    with pytest.raises(RuntimeError, match="ask with a new Query"):
        oracle.ask(queries)


def test_complex_parameters_climb_as_their_real_and_imaginary_parts():
    z = torch.tensor([1 + 2j, -0.5 + 1j], dtype=torch.cdouble)

    class Complex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(z.clone())

        def forward(self, x: Tensor) -> Tensor:
            w = torch.view_as_real(self.w)
            return (x * w**2).sum((1, 2))

    class Real(Complex):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.view_as_real(z).clone())

        def forward(self, x: Tensor) -> Tensor:
            return (x * self.w**2).sum((1, 2))

    x = torch.rand(3, 2, 2, dtype=torch.double)
    grads = []
    for model in (Complex(), Real()):
        SharpnessAware(model, SAM(L2(0.3)), lambda outputs, targets: outputs)(x, x[:, 0, 0]).backward()
        grads.append(model.w.grad)
    close(torch.view_as_real(grads[0]), grads[1], 1e-12)


# What methods compute with.

entries = st.lists(st.floats(-1e3, 1e3), min_size=3, max_size=3)


def pieces(values: list[float]) -> Vector:
    t = torch.tensor(values, dtype=torch.double)
    return Vector([t[:1].reshape(()), t[1:]])


def joined(v: Vector) -> Tensor:
    return torch.cat([t.reshape(-1) for t in v])


@settings(deadline=None, derandomize=True)
@given(entries, entries)
def test_the_part_along_another_vector_is_its_projection(a, b):
    v, other = pieces(a), pieces(b)
    flat, direction = joined(v), joined(other)
    length = direction.norm()
    if length < 1e-6:
        return
    along = joined(v.onto(other))
    close(along, (flat @ direction / length) * direction / length, 1e-9)
    close((flat - along) @ direction / length, torch.tensor(0.0).double(), 1e-9)


def test_the_part_along_zero_is_zero_and_along_itself_is_all():
    v, zero = pieces([1.0, -2.0, 3.0]), pieces([0.0, 0.0, 0.0])
    assert (
        joined(v.onto(zero)).tolist() == joined(zero.onto(v)).tolist() == joined(zero.onto(zero)).tolist() == [0.0] * 3
    )
    assert torch.equal(joined(v.onto(v)), joined(v))


def test_the_part_along_a_vector_has_its_holes_and_its_type():
    v = Vector([torch.ones(2).half(), torch.zeros(2).half()], frozenset({1}))
    other = Vector([torch.zeros(2).half(), torch.ones(2).half()], frozenset({0}))
    assert v.onto(other).holes == {0}
    assert all(t.dtype == torch.half for t in v.onto(other))


@settings(deadline=None, derandomize=True)
@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(1, n), st.just(n))))
def test_a_portion_of_n_is_exact_where_the_share_is_a_fraction_of_n(k_n):
    k, n = k_n
    assert portion(k / n, n) == k
    assert portion(float(f"{k / n:.15g}"), n) == k


@settings(deadline=None, derandomize=True)
@given(st.floats(0, 1, exclude_min=True), st.integers(1, 10**9))
def test_a_portion_is_rounded_up_and_never_nothing(share, n):
    k = portion(share, n)
    assert 1 <= k <= n
    assert k - 1 < share * n <= k * (1 + 1e-9)


@pytest.mark.parametrize(
    ("share", "n", "expected"), [(0.07, 100, 7), (0.29, 100, 29), (1e-9, 8, 1), (1.0, 7, 7), (0.5, 7, 4)]
)
def test_portions(share, n, expected):
    assert portion(share, n) == expected


@settings(deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 20), min_size=4, max_size=12), st.floats(0.01, 1), st.booleans())
def test_the_mask_of_the_largest_holds_the_largest(scores, keep, free):
    flat = torch.tensor(scores).double()
    vector = Vector([flat[:2].clone(), flat[2:].view(1, -1).clone()])
    mask = top(vector, keep, [not free, True])
    inside = torch.cat([m.reshape(-1) for m in mask])
    assert mask.tensors[1].shape == (1, len(scores) - 2)
    if free:
        assert inside[:2].all()
        flat, inside = flat[2:], inside[2:]
    assert inside.sum() == portion(keep, len(flat))
    if not inside.all():
        assert flat[inside].min() >= flat[~inside].max()


def test_a_mask_where_nothing_is_maskable_is_all():
    assert all(m.all() for m in top(Vector([torch.ones(2), torch.ones(())]), 0.1, [False, False]))


@pytest.mark.parametrize("value", [1, 5, 10**9])
def test_whole_numbers_are_taken(value):
    whole("k", value)
    whole("k", 0, least=0)


@pytest.mark.parametrize(
    ("value", "error"), [(0, ValueError), (-3, ValueError), (2.0, TypeError), (True, TypeError), ("2", TypeError)]
)
def test_other_numbers_are_not_whole(value, error):
    with pytest.raises(error, match=rf"k .*{value!r}"):
        whole("k", value)


@pytest.mark.parametrize(
    ("value", "zero"), [(1e-9, False), (0.5, False), (1, False), (1.0, True), (0, True), (0.0, True)]
)
def test_shares_are_taken(value, zero):
    share("keep", value, zero=zero)


@pytest.mark.parametrize("value", [0, 0.0, -0.1, 1.1, float("nan"), float("inf"), True, "0.5", None])
def test_what_is_no_share_is_named(value):
    with pytest.raises((TypeError, ValueError), match=rf"keep .*{value!r}"):
        share("keep", value)
    if value != 0:
        with pytest.raises((TypeError, ValueError), match=rf"keep .*{value!r}"):
            share("keep", value, zero=True)
