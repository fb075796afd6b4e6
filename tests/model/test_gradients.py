"""Loss scaling: a GradScaler changes no bit, and an overflow in any query skips the step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bisam import ASAM, MSAM, SAM, BiSAM, SharpnessAware, Vector, cross_entropy
from bisam.model.gradients import filled
from bisam.perturbations import L2
from bisam.vector import WHOLE
from tests.support import cases
from tests.support.cases import buffers, normed, parameters
from tests.support.doubles import ActingLoss
from tests.support.runs import each_basic_method, grads_of, twins


def scaled_step(model: nn.Module, scaler: torch.amp.GradScaler | None, loss=cross_entropy, method=SAM(L2(0.5))):  # noqa: B008
    sharp = SharpnessAware(model, method, loss, scaler=scaler)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x, y = (t.float() if t.is_floating_point() else t for t in cases.batch())
    for _ in range(3 if loss is cross_entropy else 1):
        value = sharp(x, y)
        if scaler is None:
            value.backward()
            optimizer.step()
        else:
            scaler.scale(value).backward()
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()
    return parameters(model)


@each_basic_method
def test_a_grad_scaler_changes_no_bit(method):
    model, other = twins(lambda: normed().float())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024)
    assert scaled_step(model, scaler, method=method) == scaled_step(other, None, method=method)
    assert buffers(model) == buffers(other)


def test_a_disabled_grad_scaler_changes_no_bit():
    model, other = twins(lambda: normed().float())
    assert scaled_step(model, torch.amp.GradScaler("cpu", enabled=False)) == scaled_step(other, None)


class Overflow(torch.autograd.Function):
    """The identity, whose gradient overflows where it is larger than `limit`, as in float16."""

    @staticmethod
    def forward(ctx: Any, losses: Tensor, limit: float) -> Tensor:
        ctx.limit = limit
        return losses.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        (grad,) = grads
        return torch.where(grad.abs() > ctx.limit, torch.inf, grad), None


def signs(gradient: Vector, oracle) -> Vector:
    """Finite where the gradient is not."""
    return Vector([t.sign() * 0.1 for t in gradient])


@pytest.mark.parametrize("query", [1, 2])
@pytest.mark.parametrize(
    "method",
    [SAM(), BiSAM(), ASAM(0.5), MSAM(4), SAM(signs), MSAM(4, SAM(signs))],
    ids=["SAM", "BiSAM", "ASAM", "MSAM", "signs", "MSAM of signs"],
)
def test_an_overflow_in_any_query_skips_the_step_once(method, query):
    model, calls = normed().float(), iter(range(1, 100))

    def overflow(module, args, outputs):
        return Overflow.apply(outputs, 1.0) if next(calls) == query else outputs

    model.register_forward_hook(overflow)
    scaler, before = torch.amp.GradScaler("cpu", init_scale=1024), parameters(model)
    assert scaled_step(model, scaler, ActingLoss(), method) == before
    assert scaler.get_scale() == 512


def test_an_overflow_of_float16_skips_the_step_until_the_scale_fits():
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = normed().float()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x).half().float()

    model, scaler = Half(), torch.amp.GradScaler("cpu", init_scale=2.0**20)
    skipped, before = 0, parameters(model)
    while scaled_step(model, scaler, ActingLoss()) == before:
        skipped += 1
        assert scaler.get_scale() == 2.0 ** (20 - skipped)
    assert 1 <= skipped <= 6
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("factor", [1024.0, torch.tensor(1024.0)], ids=["float", "tensor"])
def test_scale_may_be_a_function(factor):
    model, other = twins(lambda: cases.mlp().float())
    sharps = [SharpnessAware(model, SAM(), cross_entropy, scaler=lambda: factor)]
    sharps += [SharpnessAware(other, SAM(), cross_entropy)]
    x, y = cases.batch()
    first, second = (grads_of(s(x.float(), y), s.model) for s in sharps)
    assert all(torch.equal(g, h) for g, h in zip(first, second, strict=True))


def test_what_autograd_conjugates_or_negates_lazily_is_computed():
    z = torch.randn(3, dtype=torch.cdouble)
    lazy = [z.conj(), z.conj().imag, z.real.clone()]
    assert [(t.is_conj(), t.is_neg()) for t in lazy] == [(True, False), (False, True), (False, False)]
    gradient = filled(lazy, WHOLE, lambda: Vector(lazy), lambda: ["a", "b", "c"])
    assert not any(t.is_conj() or t.is_neg() for t in gradient)
    assert all(torch.equal(t, g) for t, g in zip(lazy, gradient, strict=True))
    assert gradient.tensors[2] is lazy[2]
