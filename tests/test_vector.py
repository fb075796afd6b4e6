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


def test_the_layout_of_ordinary_tensors_is_the_same_object_in_a_copy():
    v = Vector([torch.ones(2)])
    assert copy.deepcopy(v).layout is v.layout is pickle.loads(pickle.dumps(v)).layout


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
