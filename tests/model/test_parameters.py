"""Frozen, unused, tied and reallocated parameters, and tensors outside the model."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from bisam import ASAM, ERM, FSAM, MSAM, SAM, BiSAM, ModelOracle, SharpnessAware, cross_entropy
from bisam.perturbations import L2, Adaptive
from tests.support import cases
from tests.support.cases import LABELS, POINTS, buffers, everything, gradients, linear, parameters
from tests.support.runs import twins

# Frozen, unused and tied parameters.


class Partial(nn.Module):
    """Two branches; `uses` says for each forward pass whether the second one takes part (stochastic depth)."""

    def __init__(self, *uses: bool) -> None:
        super().__init__()
        self.always, self.sometimes = nn.Linear(6, 4).double(), nn.Linear(6, 4).double()
        self.uses = list(uses)

    def forward(self, x: Tensor) -> Tensor:
        return self.always(x) + (self.sometimes(x) if self.uses.pop(0) else 0)


def test_frozen_parameters_stay_and_get_no_gradient():
    model, plain = twins(cases.mlp)
    model[0].requires_grad_(False)
    sharp = SharpnessAware(model, SAM(L2(0.5)), cross_entropy)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    sharp(*cases.batch()).backward()
    optimizer.step()
    assert [p.grad is None for p in model.parameters()] == [True, True, False, False]
    head = plain[2]  # the same step of a model that is nothing but the head
    x, y = cases.batch()
    z = plain[:2](x).detach()
    SharpnessAware(head, SAM(L2(0.5)), cross_entropy)(z, y).backward()
    torch.optim.SGD(head.parameters(), lr=0.1, weight_decay=0.1).step()
    assert parameters(model[2]) == parameters(head)
    assert parameters(model[0]) == parameters(plain[0])


@pytest.mark.parametrize("method", [SAM(), BiSAM(), ASAM(0.5), ASAM(0.5, 0.1), MSAM(3), ERM()], ids=str)
def test_unused_parameters_keep_no_gradient_and_do_not_decay(method):
    model = Partial(*[False] * 8)
    sharp = SharpnessAware(model, method, cross_entropy)
    before = parameters(model.sometimes)
    sharp(*cases.batch()).backward()
    assert set(gradients(model.sometimes).values()) == {None}
    assert None not in gradients(model.always).values()
    torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1).step()
    assert parameters(model.sometimes) == before


@pytest.mark.parametrize("method", [SAM(), ASAM(0.5, 0.1)], ids=str)
def test_unused_parameters_are_as_if_absent(method):
    model, alone = Partial(False, False), nn.Linear(6, 4).double()
    alone.load_state_dict(model.always.state_dict())
    SharpnessAware(model, method, cross_entropy)(*cases.batch()).backward()
    SharpnessAware(alone, method, cross_entropy)(*cases.batch()).backward()
    for p, q in zip(model.always.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=1e-15)


@pytest.mark.parametrize("ascent", [True, False])
def test_parameters_used_in_one_query_only(ascent):
    """Stochastic depth: perturbed exactly if the ascent used them, a gradient exactly if the descent did."""
    model, (x, y) = Partial(ascent, not ascent), cases.batch()
    twin, tail = copy.deepcopy(model), list(model.sometimes.parameters())
    before = everything(model)
    SharpnessAware(model, SAM(L2(0.5)), cross_entropy)(x, y).backward()
    assert (parameters(model), buffers(model)) == before[:2]
    assert all((p.grad is None) == ascent for p in tail)

    weights = list(twin.parameters())
    g = torch.autograd.grad(cross_entropy(twin(x), y).mean(), weights, allow_unused=True, materialize_grads=True)
    norm = torch.cat([t.reshape(-1) for t in g]).norm()
    with torch.no_grad():
        for p, t in zip(weights, g, strict=True):
            p += 0.5 * t / norm
    cross_entropy(twin(x), y).mean().backward()
    for p, q in zip(model.parameters(), weights, strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=1e-12)


def test_micro_batches_may_use_different_parameters():
    model = Partial(True, False, False, True)  # branch in the ascent of the first part and the descent of the second
    SharpnessAware(model, MSAM(4, SAM()), cross_entropy)(*cases.batch()).backward()
    assert None not in gradients(model).values()


def test_a_loss_of_no_parameter_but_an_input_is_refused_or_has_no_gradient():
    model, (x, y) = cases.mlp(), cases.batch()
    sharp = SharpnessAware(model, SAM(), cross_entropy, lambda model, x, y: (x[:, :4], y))
    with pytest.raises((ValueError, RuntimeError)):
        sharp(x.requires_grad_(), y).backward()


def test_tied_parameters_are_displaced_once():
    model, (x, y) = cases.Tied().double(), cases.batch()
    seen = []
    model.encode.register_forward_hook(lambda *_: seen.append(model.encode.weight.detach().clone()))
    oracle = ModelOracle(model, cross_entropy)
    assert oracle.names == ["encode.weight", "encode.bias", "middle.weight", "middle.bias"]
    e = SAM(L2(0.5)).climb(oracle, (x, y))
    oracle.query((x, y), at=e)
    assert torch.equal(seen[1], seen[0] + e.tensors[0])


def test_weights_are_displaced_in_the_second_query_only():
    model, norms = cases.mlp(), []
    start = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    model.register_forward_pre_hook(
        lambda *_: norms.append((torch.nn.utils.parameters_to_vector(model.parameters()).detach() - start).norm())
    )
    SharpnessAware(model, SAM(L2(0.5)), cross_entropy)(*cases.batch())
    torch.testing.assert_close(torch.stack(norms), torch.tensor([0.0, 0.5]).double(), rtol=0, atol=1e-10)


def test_freezing_parameters_under_a_memory_is_refused():
    model = cases.mlp()
    sharp = SharpnessAware(model, FSAM(), cross_entropy)
    sharp(*cases.batch())
    model[0].requires_grad_(False)
    with pytest.raises(ValueError, match="frozen, unfrozen or sharded since"):
        sharp(*cases.batch())
    model[0].requires_grad_()
    sharp(*cases.batch())


# Tensors outside the model that would not be trained.


def test_inputs_that_need_a_gradient_are_refused():
    sharp = SharpnessAware(linear(), SAM(), cross_entropy)
    with pytest.raises(ValueError, match="needs a gradient, and none would reach it"):
        sharp(nn.Linear(4, 4).double()(POINTS), LABELS)


def test_a_module_outside_the_model_is_refused():
    head = nn.Linear(3, 3).double()
    sharp = SharpnessAware(linear(), SAM(), cross_entropy, forward=lambda model, x, y: (head(model(x)), y))
    with pytest.raises(ValueError, match=r"depends on 2 tensors that need a gradient .*\(3, 3\)"):
        sharp(POINTS, LABELS)


def test_a_function_with_a_parameter_as_loss_is_refused_and_a_module_is_trained():
    temperature = nn.Parameter(torch.ones((), dtype=torch.double))

    class Tempered(nn.Module):
        def __init__(self):
            super().__init__()
            self.temperature = temperature

        def forward(self, outputs, targets):
            return cross_entropy(outputs * self.temperature, targets)

    with pytest.raises(ValueError, match="no parameters of the model"):
        SharpnessAware(linear(), SAM(), lambda z, y: cross_entropy(z * temperature, y))(POINTS, LABELS)
    SharpnessAware(linear(), SAM(), Tempered())(POINTS, LABELS).backward()
    assert temperature.grad is not None


def test_frozen_modules_outside_the_model_are_fine():
    """Freezing is the remedy that the error states for a module that this loss is not to train."""
    teacher = nn.Linear(4, 4).double()
    sharp = SharpnessAware(linear(), SAM(), cross_entropy, forward=lambda model, x, y: (model(teacher(x)), y))
    with pytest.raises(ValueError, match=r"discriminator in the loss of a generator\), call requires_grad_\(False\)"):
        sharp(POINTS, LABELS)
    teacher.requires_grad_(False)
    sharp(POINTS, LABELS).backward()


# Weights that get a new storage in the forward pass.


class MaxNorm(nn.Linear):
    """As in EEG networks: the weights are constrained in the forward pass, by new memory."""

    def forward(self, x):
        self.weight.data = torch.renorm(self.weight.data, 2, 0, maxnorm=100.0)
        return super().forward(x)


@pytest.mark.parametrize("method", [SAM(L2(0.5)), BiSAM(0.5), SAM(Adaptive(0.5)), MSAM(4, SAM(L2(0.5)))])
def test_weights_that_move_to_other_memory_in_the_forward_pass_are_restored(method):
    torch.manual_seed(0)
    model = MaxNorm(4, 3).double()
    plain = nn.Linear(4, 3).double()
    plain.load_state_dict(model.state_dict())
    for m in (model, plain):
        SharpnessAware(m, method, cross_entropy)(POINTS, LABELS).backward()
    assert torch.equal(model.weight, plain.weight)
    torch.testing.assert_close(model.weight.grad, plain.weight.grad, rtol=0, atol=1e-14)
