"""Proximal operators: each is the minimiser that it claims to be."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import pytest
import torch
from torch import Tensor, nn

from bisam import ModelOracle, Vector
from bisam.proximal import L1, Box, Separable, Simplex, proximal

GAMMA = 0.3


def costs(prox: Separable, z: Tensor, point: Tensor) -> Tensor:
    """g(z) + ||z - point||^2/(2 gamma), from the definitions of g; z is (N, n)."""
    distance = (z - point).abs().square().sum(-1) / (2 * GAMMA)
    match prox:
        case Box():
            return distance + torch.where((z < prox.low) | (z > prox.high), inf, 0.0).sum(-1)
        case L1():
            return distance + prox.weight * z.abs().sum(-1)
        case Simplex():
            feasible = (z >= 0).all(-1) & ((z.sum(-1) - prox.total).abs() < 1e-9)
            return distance + torch.where(feasible, 0.0, inf)
    raise AssertionError


CASES = [Box(-0.5, 0.8), Box(-inf, 0.1), Box(0.2, 0.2), L1(0.0), L1(1.5), Simplex(), Simplex(2.5)]


@pytest.mark.parametrize("prox", CASES, ids=str)
def test_it_is_the_minimiser(prox):
    random = torch.Generator().manual_seed(0)
    for _ in range(20):
        point = torch.randn(4, generator=random, dtype=torch.double) * 2
        z = prox.of(point, GAMMA)
        others = z + torch.randn(2000, 4, generator=random, dtype=torch.double) * 0.3
        if isinstance(prox, Box):
            others = others.clamp(prox.low, prox.high)
        if isinstance(prox, Simplex):
            others = torch.rand(2000, 4, generator=random, dtype=torch.double).log().neg()
            others = prox.total * others / others.sum(-1, keepdim=True)
        least = costs(prox, z[None], point)
        assert least.isfinite()
        assert (costs(prox, others, point) >= least - 1e-12).all()


def threshold(v: list[float], total: float) -> float:
    """The shift of the projection on the simplex, by bisection."""
    low, high = min(v) - total, max(v)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(max(t - middle, 0) for t in v) > total else (low, middle)
    return low


@pytest.mark.parametrize("n", [1, 2, 7, 40])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_the_projection_on_the_simplex_by_bisection(n, scale):
    v = torch.randn(5, n, generator=torch.Generator().manual_seed(n), dtype=torch.double) * scale
    found = Simplex(1.7).of(v, GAMMA)
    expected = [[max(t - threshold(row, 1.7), 0) for t in row] for row in v.tolist()]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.double), rtol=1e-12, atol=1e-12 * scale)
    torch.testing.assert_close(found.sum(-1), torch.full((5,), 1.7, dtype=torch.double))


def test_complex_entries_keep_their_phase():
    z = torch.randn(6, dtype=torch.cdouble, generator=torch.Generator().manual_seed(0))
    found = L1(2.0).of(torch.cat([z, torch.zeros(1)]), GAMMA)
    expected = [t / abs(t) * max(abs(t) - 0.6, 0) for t in z.tolist()]
    torch.testing.assert_close(found, torch.tensor([*expected, 0.0], dtype=torch.cdouble))
    for prox in (Box(-1, 1), Simplex()):
        with pytest.raises(TypeError, match=r"compares entries, and a parameter is complex \(torch.complex128\)"):
            prox.of(z, GAMMA)


@pytest.mark.parametrize("prox", [Box(-0.1, 0.1), L1(0.1), Simplex()], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_type_stays_and_the_operand_too(prox, dtype):
    tensor = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = tensor.clone()
    found = prox.of(tensor, GAMMA)
    assert (found.dtype, found.shape) == (dtype, tensor.shape)
    assert torch.equal(tensor, before)
    assert not torch.equal(found, before)


@pytest.mark.parametrize("prox", [Box(-0.1, 0.1), L1(0.1), Simplex()], ids=str)
def test_a_nan_is_not_hidden(prox):
    assert prox.of(torch.tensor([0.5, float("nan"), 0.2]), GAMMA).isnan().any()


@dataclass(frozen=True)
class Nearest(Separable):
    """An operator of a user: integers."""

    def of(self, tensor: Tensor, gamma: float) -> Tensor:
        return tensor.round()


def test_names_of_parameters_and_modules():
    model = nn.ModuleDict({"one": nn.Linear(2, 2), "onerous": nn.Linear(2, 2), "two": nn.Linear(2, 2)})
    point = Vector([p.detach() * 10 for p in model.parameters()])
    prox = proximal({"one": Box(-1, 1), "two.bias": Nearest()})
    assert prox is not None
    found = prox(point, ModelOracle(model, nn.MSELoss()), GAMMA)
    for i, (name, _) in enumerate(model.named_parameters()):
        t = point.tensors[i]
        expected = t.clamp(-1, 1) if name.startswith("one.") else t.round() if name == "two.bias" else t
        assert torch.equal(found.tensors[i], expected), name
    assert hash(prox) == hash(proximal({"one": Box(-1, 1), "two.bias": Nearest()}))
    assert prox == proximal({"one": Box(-1, 1), "two.bias": Nearest()}) != proximal({"one": Box(-1, 1)})
