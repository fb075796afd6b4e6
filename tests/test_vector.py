"""Vector: the arithmetic of one flat tensor, structural zeros, and copies to the bit."""

from __future__ import annotations

import copy
import operator
import pickle

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from bisam import Vector, vector
from bisam.distributed.layout import ReplicatedLayout
from tests.support.cases import bits

settings.register_profile("bisam", max_examples=40, deadline=None, derandomize=True)
settings.load_profile("bisam")

SHAPES = st.lists(st.lists(st.integers(0, 3), max_size=3).map(tuple), min_size=1, max_size=5)
SEEDS = st.integers(0, 2**16)
MAGNITUDES = st.sampled_from([1e-6, 1.0, 1e6])


def make(shapes, seed: int, magnitude: float = 1.0, dtype: torch.dtype = torch.double) -> Vector:
    generator = torch.Generator().manual_seed(seed)
    return Vector([(torch.randn(s, generator=generator, dtype=dtype) * magnitude) for s in shapes])


def flat(v: Vector) -> Tensor:
    return torch.cat([t.reshape(-1) for t in v])


def close(actual: Tensor, expected: Tensor, rtol: float = 1e-12, atol: float = 0.0) -> None:
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("operation", [operator.add, operator.sub, operator.mul, operator.truediv])
@given(SHAPES, SEEDS, MAGNITUDES)
def test_arithmetic_of_two_vectors_is_that_of_flat_tensors(operation, shapes, seed, magnitude):
    v, w = make(shapes, seed, magnitude), make(shapes, seed + 1)
    before = bits(flat(v)), bits(flat(w))
    assert torch.equal(flat(operation(v, w)), operation(flat(v), flat(w)))
    assert (bits(flat(v)), bits(flat(w))) == before


@pytest.mark.parametrize("operation", [operator.add, operator.mul, operator.truediv])
@given(SHAPES, SEEDS, st.floats(1e-3, 1e3), st.booleans())
def test_arithmetic_with_a_scalar_is_that_of_flat_tensors(operation, shapes, seed, scalar, as_tensor):
    v, scalar = make(shapes, seed), torch.tensor(scalar, dtype=torch.double) if as_tensor else scalar
    before = bits(flat(v))
    assert torch.equal(flat(operation(v, scalar)), operation(flat(v), scalar))
    assert bits(flat(v)) == before


@given(SHAPES, SEEDS)
def test_functions_of_one_vector_are_those_of_the_flat_tensor(shapes, seed):
    v = make(shapes, seed)
    assert torch.equal(flat(-v), -flat(v))
    assert torch.equal(flat(v.abs()), flat(v).abs())
    assert torch.equal(flat(v.abs().sqrt()), flat(v).abs().sqrt())
    assert torch.equal(flat(3.0 * v), 3.0 * flat(v))
    assert [t.shape for t in v.abs()] == [t.shape for t in v]


@pytest.mark.parametrize("small", [True, False])
@given(SHAPES, SEEDS, MAGNITUDES)
def test_norm_is_that_of_the_flat_tensor_on_either_path(small, shapes, seed, magnitude):
    v = make(shapes, seed, magnitude)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vector, "_is_small_on_cpu", lambda tensors: small)
        norm = v.norm()
    assert norm.shape == ()
    close(norm, flat(v).norm())


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.double, torch.cfloat])
def test_norm_is_real_and_float32_at_least_on_either_path(small, dtype, monkeypatch):
    monkeypatch.setattr(vector, "_is_small_on_cpu", lambda tensors: small)
    v = make([(3,), (), (2, 2)], 0, dtype=dtype)
    wide = {torch.double: torch.double, torch.cfloat: torch.cfloat}.get(dtype, torch.float32)
    close(v.norm(), flat(v).to(wide).norm(), rtol=1e-6)


@pytest.mark.parametrize("small", [True, False])
def test_norm_of_half_precision_neither_overflows_nor_rounds(small, monkeypatch):
    monkeypatch.setattr(vector, "_is_small_on_cpu", lambda tensors: small)
    v = Vector([torch.full((4000,), 300.0, dtype=torch.float16), torch.full((1,), 1.0, dtype=torch.float16)])
    close(v.norm(), torch.tensor((4000 * 300.0**2 + 1) ** 0.5), rtol=1e-6)


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("other", [torch.float32, torch.double, torch.cfloat])
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_norm_of_mixed_types(small, half, other, monkeypatch):
    monkeypatch.setattr(vector, "_is_small_on_cpu", lambda tensors: small)
    v = Vector([torch.full((2,), 3.0, dtype=half), torch.full((1,), 4.0, dtype=other)])
    close(v.norm().double(), torch.tensor(34.0).double().sqrt(), rtol=1e-6)


# The range of float32: squares of gradients of 1e21 exceed it, and those of 1e-25 vanish.


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("layout", [vector.WHOLE, ReplicatedLayout(None)], ids=["whole", "replicated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.cfloat])
@pytest.mark.parametrize("magnitude", [1e-36, 1e-25, 1e-18, 1e-12, 1.0, 1e12, 1e18, 1e21, 1e37])
def test_norm_is_exact_in_the_whole_range(small, layout, dtype, magnitude, monkeypatch):
    monkeypatch.setattr(vector, "_is_small_on_cpu", lambda tensors: small)
    v = Vector([t.to(dtype) for t in make([(3,), (), (2, 2), (0,)], 0, magnitude)], layout=layout)
    wide = torch.cdouble if dtype.is_complex else torch.double
    assert v.norm().dtype == torch.float32
    close(v.norm().double(), flat(v).to(wide).norm(), rtol=1e-6)


@pytest.mark.parametrize("small", [True, False])
def test_norm_of_entries_of_all_magnitudes(small, monkeypatch):
    monkeypatch.setattr(vector, "_is_small_on_cpu", lambda tensors: small)
    v = Vector([torch.tensor([3e30, 1e-30]), torch.zeros(2), torch.tensor([[4e30, 1.0]])])
    close(v.norm(), torch.tensor(5e30), rtol=1e-6)


@pytest.mark.parametrize("small", [True, False])
def test_norm_is_infinite_only_where_it_exceeds_its_type(small, monkeypatch):
    monkeypatch.setattr(vector, "_is_small_on_cpu", lambda tensors: small)
    assert Vector([torch.full((2,), 2e38)]).norm().isfinite()
    assert Vector([torch.full((4,), 2e38)]).norm() == torch.inf


@pytest.mark.parametrize("small", [True, False])
@given(SHAPES, SEEDS, st.sampled_from([1e-10, 1e-3, 1.0, 1e6, 1e15]))
def test_in_the_ordinary_range_norm_has_the_bits_of_one_sum(small, shapes, seed, magnitude):
    v = make(shapes, seed, magnitude, torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vector, "_is_small_on_cpu", lambda tensors: small)
        parts = flat(v) if small else torch.stack([t.norm() for t in v])
        assert bits(v.norm()) == bits(torch.linalg.vector_norm(parts))


def test_norm_on_a_device_without_values_has_its_type():
    half = Vector([torch.empty(3, dtype=torch.half, device="meta"), torch.empty(2, device="meta")])
    assert half.norm().dtype == torch.float32
    assert Vector([torch.empty(3, dtype=torch.cdouble, device="meta")]).norm().dtype == torch.double


@pytest.mark.parametrize("magnitude", [1e-36, 1e-25, 1e-18, 1.0, 1e18, 1e21, 1e36])
@pytest.mark.parametrize("other", [1e-36, 1e-25, 1e-18, 1.0, 1e18, 1e21, 1e36])
def test_the_part_along_a_vector_is_exact_in_the_whole_range(magnitude, other):
    v, along = make([(3,), (2,)], 0, dtype=torch.float32), make([(3,), (2,)], 1, dtype=torch.float32)
    close(flat((v * magnitude).onto(along * other)) / magnitude, flat(v.onto(along)), rtol=1e-5, atol=1e-7)


@given(SHAPES, SEEDS, MAGNITUDES)
def test_in_the_ordinary_range_the_part_along_a_vector_has_the_bits_of_its_formula(shapes, seed, magnitude):
    v, along = (make(shapes, seed + i, magnitude, torch.float32) for i in range(2))
    squared = along.dot(along).clamp_min(torch.finfo(torch.float32).tiny)
    assert bits(flat(v.onto(along))) == bits(flat(along * (v.dot(along) / squared)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.double])
@pytest.mark.parametrize("number", [1e-37, 0.75, 1.0, 1.5, 2.0, 1e21, 3.4e38])
def test_a_power_of_two_is_near_the_number(number, dtype):
    power = vector.power_of_two(torch.tensor(number, dtype=dtype))
    assert power.dtype == dtype
    assert number / 2 < power <= number
    assert torch.frexp(power).mantissa == 0.5


def test_the_power_of_two_of_no_size_is_one():
    assert [vector.power_of_two(torch.tensor(n)).item() for n in (0.0, torch.inf, torch.nan)] == [1.0] * 3


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_finite_says_so_for_all_entries_of_all_vectors(value):
    vectors = [make([(3,), (), (2, 2)], i, 1e37, torch.float32) for i in range(3)]
    assert vector.finite(vectors) == 0
    assert vector.finite([Vector([torch.full((9,), 3e38)])]) == 0  # although its norm is not finite in its type
    for v in vectors:
        v.tensors[2][1, 0] = value
        assert vector.finite(vectors).isnan()
        v.tensors[2][1, 0] = 1


def test_a_condition_is_known_without_waiting_for_a_device():
    assert [vector.known(torch.tensor(value)) for value in (True, False)] == [True, False]
    assert vector.known(torch.tensor(True, device="meta")) is None


def test_small_is_decided_by_size_device_and_type():
    assert vector._is_small_on_cpu([torch.empty(2**20)])
    assert not vector._is_small_on_cpu([torch.empty(2**20), torch.empty(1)])
    assert not vector._is_small_on_cpu([torch.nn.Parameter(torch.empty(1))])
    assert not vector._is_small_on_cpu([torch.empty(1, device="meta")])


@given(SHAPES, SEEDS, MAGNITUDES)
def test_dot_is_that_of_the_flat_tensors(shapes, seed, magnitude):
    v, w = make(shapes, seed, magnitude), make(shapes, seed + 1)
    dot = v.dot(w)
    assert dot.shape == ()
    close(dot, flat(v) @ flat(w), atol=1e-12 * magnitude)
    close(v.dot(v), flat(v).norm() ** 2)


def test_dot_of_complex_vectors_is_the_real_part():
    v, w = make([(3,), (2, 2)], 0, dtype=torch.cdouble), make([(3,), (2, 2)], 1, dtype=torch.cdouble)
    close(v.dot(w), torch.vdot(flat(v), flat(w)).real)
    close(v.dot(v), v.norm() ** 2)


def test_dot_of_half_precision_sums_in_float32():
    v = Vector([torch.full((4000,), 16.0, dtype=torch.float16)])
    close(v.dot(v), torch.tensor(4000 * 256.0))
    close(v.dot(-v), torch.tensor(-4000 * 256.0))


@pytest.mark.parametrize("value", [1e-6, 6e4])
def test_products_of_half_precision_are_in_range(value):
    v = Vector([torch.full((3,), value, dtype=torch.float16), torch.ones(1)])
    exact = v.tensors[0].double()
    close(v.dot(v).double(), (exact**2).sum() + 1, rtol=1e-6)
    along = v.onto(v)
    assert along.tensors[0].dtype == torch.float16
    assert torch.equal(flat(along), flat(v))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_norm_and_dot_show_what_is_not_finite(bad):
    v = Vector([torch.tensor([1.0, bad]), torch.ones(1)])
    assert not v.norm().isfinite()
    assert not v.dot(Vector([torch.ones(2), torch.ones(1)])).isfinite()


# Structural zeros.


def holed(*holes: int) -> Vector:
    return Vector([torch.zeros(2) if i in holes else torch.full((2,), i + 1.0) for i in range(3)], frozenset(holes))


@pytest.mark.parametrize(
    ("result", "holes"),
    [
        (lambda: holed(0, 1) + holed(1, 2), {1}),
        (lambda: holed(0, 1) - holed(1, 2), {1}),
        (lambda: holed(0, 1) * holed(1, 2), {0, 1, 2}),
        (lambda: holed(0, 1) / holed(), {0, 1}),
        (lambda: holed() / (holed(1) + 1.0), set()),
        (lambda: holed(0, 1) + 1.0, set()),
        (lambda: holed(0, 1) * 2.0, {0, 1}),
        (lambda: 2.0 * holed(0, 1), {0, 1}),
        (lambda: holed(0, 1) / 2.0, {0, 1}),
        (lambda: -holed(0, 1), {0, 1}),
        (lambda: holed(0, 1).abs(), {0, 1}),
        (lambda: holed(0, 1).sqrt(), {0, 1}),
        (lambda: holed(0, 1).clone(), {0, 1}),
        (lambda: holed(0, 1).where([True, False, True], holed(2)), {0}),
        (lambda: holed(0, 1).where([False, True, False], holed(2)), {1, 2}),
    ],
)
def test_holes_are_where_the_result_is_zero_by_structure(result, holes):
    v = result()
    assert v.holes == holes
    assert all(not v.tensors[i].any() for i in holes)


def test_a_hole_divided_by_a_hole_is_not_a_zero():
    """0/0: either the position is no hole any more, or it holds zeros."""
    v = holed(0, 1) / holed(1, 2)
    assert all(torch.equal(v.tensors[i], torch.zeros(2)) for i in v.holes)


class Weighted(vector.Layout):
    """Sums as if tensor `i` were on 2^i ranks: what belongs to which tensor matters."""

    def total(self, parts: Tensor) -> Tensor:
        return (parts * 2.0 ** torch.arange(len(parts))).sum()


@pytest.mark.parametrize("layout", [vector.WHOLE, Weighted()])
@pytest.mark.parametrize("dtype", [torch.double, torch.float32, torch.half, torch.cdouble])
@pytest.mark.parametrize("size", [5, 300_000], ids=["small", "large"])
def test_arithmetic_with_structural_zeros_is_that_with_zeros(layout, dtype, size):
    v, w = (Vector(make([(size,), (2, size), (3,), (size,)], seed).tensors, layout=layout) for seed in (0, 1))
    v, w = (x.like([t.to(dtype) for t in x]) for x in (v, w))
    a, b = v.confined([True, False, True, False]), w.confined([True, True, False, False])
    assert (a.holes, b.holes) == ({1, 3}, {2, 3})
    full, other = (x.like([t.clone() for t in x]) for x in (a, b))
    assert (a.norm(), a.dot(b), b.dot(w)) == (full.norm(), full.dot(other), other.dot(w))
    for operation in (
        lambda x, y: x + y,
        lambda x, y: x - y,
        lambda x, y: x * y,
        lambda x, y: y * x,
        lambda x, y: x * 0.5 - y / 3.0,
        lambda x, y: w - x,
        lambda x, y: x + w,
        lambda x, y: x * w,
        lambda x, y: x / w,
        lambda x, y: x + 1.0,
        lambda x, y: -x,
        lambda x, y: x.abs() + y.abs(),
        lambda x, y: x.clone(),
        lambda x, y: x.onto(y),
        lambda x, y: w.onto(x),
        lambda x, y: x.confined([False, True, True, False]),
    ):
        ours, theirs = operation(a, b), operation(full, other)
        assert [t.dtype for t in ours] == [t.dtype for t in theirs]
        assert all(torch.equal(s, t) for s, t in zip(ours, theirs, strict=True))  # 0 and -0 are equal
        assert ours.layout is layout


def test_a_vector_of_structural_zeros_has_no_length():
    v = holed().confined([False] * 3)
    assert v.holes == {0, 1, 2}
    assert (v.norm(), v.dot(v), v.dot(holed())) == (0, 0, 0)
    assert all(torch.equal(t, torch.zeros(2)) for x in (v, v + v, v * 2.0, v - v, v.abs(), v.clone()) for t in x)
    assert [t.tolist() for t in v + holed()] == [t.tolist() for t in holed()]


def test_zeros_of_a_confined_vector_take_the_memory_of_one_number():
    v = make([(8, 6), (8,), (4, 8)], 0)
    confined = v.confined([False, True, False])
    assert [t.untyped_storage().nbytes() for t in confined][::2] == [8, 8]
    assert confined.tensors[1] is v.tensors[1]
    assert v.confined([True] * 3) is v
    assert [t.shape for t in confined] == [t.shape for t in v]


@pytest.mark.parametrize("mask", [[], [True, False], [False] * 4])
def test_confined_refuses_a_mask_of_another_length(mask):
    with pytest.raises(ValueError, match=f"a vector of 3 tensors must have as many values, got {len(mask)}"):
        holed().confined(mask)


# Copies and choices.

SPECIAL = [float("nan"), -float("nan"), -0.0, 0.0, 5e-324, float("inf"), -float("inf"), 1e-310]


@pytest.mark.parametrize("dtype", [torch.double, torch.float32, torch.bfloat16, torch.float16])
def test_clone_is_exact_to_the_bit(dtype):
    subnormal = torch.tensor([1, 2, 3], dtype=torch.int16).view(torch.bfloat16)  # also bit patterns of no float64
    v = Vector([torch.tensor(SPECIAL, dtype=torch.double).to(dtype), subnormal, torch.zeros(0), torch.tensor(2)])
    copy = v.clone()
    assert [bits(t) for t in copy] == [bits(t) for t in v]
    assert [t.dtype for t in copy] == [t.dtype for t in v]
    for a, b in zip(v, copy, strict=True):
        assert a.numel() == 0 or a.data_ptr() != b.data_ptr()


def test_clone_keeps_the_memory_format():
    t = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    assert Vector([t]).clone().tensors[0].stride() == t.stride()


def test_where_takes_whole_tensors_and_copies_nothing():
    v, w = holed(), holed() * 10.0
    chosen = v.where([True, False, True], w)
    assert [a is b for a, b in zip(chosen, [v.tensors[0], w.tensors[1], v.tensors[2]], strict=True)] == [True] * 3


def test_where_refuses_a_mask_of_another_length():
    with pytest.raises(ValueError, match="zip"):
        holed().where([True, False], holed())


def test_a_vector_has_a_length_and_a_short_repr():
    v = Vector([torch.zeros(2, 3), torch.zeros(())])
    assert len(v) == len(list(v)) == 2
    assert repr(v) == "Vector(2 tensors, 7 entries)"


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda v: pickle.loads(pickle.dumps(v))])
def test_a_copy_of_a_whole_vector_is_whole(copied):
    v = make([(8, 6), (8,), (4, 8)], 0)
    assert copied(v).layout is vector.WHOLE
    assert torch.equal(copied(v).norm(), v.norm())


# Projections.

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
    close(along, (flat @ direction / length) * direction / length, rtol=0, atol=1e-9)
    close((flat - along) @ direction / length, torch.tensor(0.0).double(), rtol=0, atol=1e-9)


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
