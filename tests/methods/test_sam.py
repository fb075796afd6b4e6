"""SAM, ASAM, BiSAM and mSAM in closed form, and the direction of BiSAM."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bisam import ASAM, MSAM, SAM, BiSAM, EigenSAM, ModelOracle, NegLog, SharpnessAware, Tanh, cross_entropy
from bisam.perturbations import L2, Adaptive
from tests.support import cases, references
from tests.support.doubles import ROWS, Quadratic
from tests.support.runs import close

# Ascent and descent objectives.


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


def test_sam_needs_no_model():
    oracle = Quadratic(2.0, 3.0)
    answer = SAM(L2(0.5))(oracle, (ROWS,))
    g = torch.tensor([2.0, 6.0], dtype=torch.double)
    w = torch.tensor([2.0, 3.0], dtype=torch.double) + 0.5 * g / g.norm()
    close(answer.gradient.tensors[0], ROWS.mean(0) * (w - 1), 1e-12)
    close(answer.value, (ROWS * (w - 1) ** 2).sum(1).mean() / 2, 1e-12)


def test_asam_needs_no_model():
    oracle = Quadratic(2.0, -3.0)
    w, g = torch.tensor([2.0, -3.0], dtype=torch.double), torch.tensor([2.0, -12.0], dtype=torch.double)
    t = w.abs() + 0.1
    e = 0.5 * t**2 * g / (t * g).norm()
    close(ASAM(0.5, 0.1)(oracle, (ROWS,)).gradient.tensors[0], ROWS.mean(0) * (w + e - 1), 1e-12)


def test_msam_needs_no_model():
    oracle = Quadratic(2.0, 3.0)
    first, second = (SAM(L2(0.5))(oracle, (a[None],)).gradient.tensors[0] for a in ROWS)
    close(MSAM(1, SAM(L2(0.5)))(oracle, (ROWS,)).gradient.tensors[0], (first + second) / 2, 1e-12)


def test_a_zero_gradient_gives_a_zero_displacement():
    for method in (SAM(), ASAM(1.0), SAM(Adaptive(1.0, 0.1))):
        assert torch.equal(method.climb(Quadratic(1.0, 1.0), (ROWS,)).tensors[0], torch.zeros(2).double())


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


def test_eigen_sam_finds_the_top_eigenvector_of_the_hessian():
    torch.manual_seed(0)
    model, (x, y) = cases.mlp(), cases.batch(0)
    oracle = ModelOracle(model, cross_entropy)
    EigenSAM(0.1, iterations=60, r=1e-3).climb(oracle, (x, y))
    v = torch.cat([t.flatten() for t in oracle.state["v"]])
    shapes = {name: p.shape for name, p in model.named_parameters()}

    def loss(w: Tensor) -> Tensor:
        parts = w.split([shape.numel() for shape in shapes.values()])
        weights = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
        return cross_entropy(torch.func.functional_call(model, weights, x), y).mean()

    values, vectors = torch.linalg.eigh(torch.autograd.functional.hessian(loss, references.flat(model)))
    assert values[-1] > 1.05 * values[:-1].abs().max()
    close(v.norm(), torch.ones((), dtype=torch.double), 1e-9)
    assert (vectors[:, -1] @ v).abs() > 0.999


def test_an_eigenvector_that_was_zero_is_estimated_again():
    """The loss of w x is linear where w x < 0, with a Hessian of zero, and (w x)^2 elsewhere."""
    model = nn.Linear(2, 1, bias=False).double()
    nn.init.ones_(model.weight)
    oracle = ModelOracle(model, lambda outputs, _: torch.where(outputs < 0, outputs, outputs**2).sum(1))
    x = torch.tensor([[3.0, 1.0]], dtype=torch.double)
    method = EigenSAM(0.05, every=1)
    method.climb(oracle, (-x, x))
    assert not oracle.state["v"].norm()
    method.climb(oracle, (x, x))
    close(oracle.state["v"].tensors[0].abs(), x / x.norm(), 1e-9)
