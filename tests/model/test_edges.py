"""What would go wrong silently at the edges: wrappers, strangers in the graph, layers that constrain their weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bisam import ERM, MSAM, SAM, BiSAM, LookSAM, NegLog, SharpnessAware, cross_entropy
from bisam.perturbations import L2, Adaptive

X, Y = torch.randn(8, 4, generator=torch.Generator().manual_seed(1)).double(), torch.arange(8) % 3


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(4, 3).double()


# Strangers: leaves that would silently not be trained


def test_inputs_that_need_a_gradient_are_refused():
    sharp = SharpnessAware(linear(), SAM(), cross_entropy)
    with pytest.raises(ValueError, match="needs a gradient, and none would reach it"):
        sharp(nn.Linear(4, 4).double()(X), Y)


def test_a_module_outside_the_model_is_refused():
    head = nn.Linear(3, 3).double()
    sharp = SharpnessAware(linear(), SAM(), cross_entropy, forward=lambda model, x, y: (head(model(x)), y))
    with pytest.raises(ValueError, match=r"depends on 2 tensors that need a gradient .*\(3, 3\)"):
        sharp(X, Y)


def test_a_function_with_a_parameter_as_loss_is_refused_and_a_module_is_trained():
    temperature = nn.Parameter(torch.ones((), dtype=torch.double))

    class Tempered(nn.Module):
        def __init__(self):
            super().__init__()
            self.temperature = temperature

        def forward(self, outputs, targets):
            return cross_entropy(outputs * self.temperature, targets)

    with pytest.raises(ValueError, match="no parameters of the model"):
        SharpnessAware(linear(), SAM(), lambda z, y: cross_entropy(z * temperature, y))(X, Y)
    SharpnessAware(linear(), SAM(), Tempered())(X, Y).backward()
    assert temperature.grad is not None


def test_frozen_modules_outside_the_model_are_fine():
    teacher = nn.Linear(4, 4).double().requires_grad_(False)
    SharpnessAware(linear(), SAM(), cross_entropy, forward=lambda model, x, y: (model(teacher(x)), y))(X, Y).backward()


# Weights that change their memory


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
        SharpnessAware(m, method, cross_entropy)(X, Y).backward()
    assert torch.equal(model.weight, plain.weight)
    torch.testing.assert_close(model.weight.grad, plain.weight.grad, rtol=0, atol=1e-14)


# Ignored labels


@pytest.mark.parametrize("ignored", [slice(0, 3), slice(0, 4), slice(2, 6)])
def test_micro_batches_weigh_what_counts_in_them(ignored):
    y = Y.clone()
    y[ignored] = -100
    values, grads = [], []
    for method in (ERM(), MSAM(4, ERM())):
        model = linear()
        sharp = SharpnessAware(model, method, cross_entropy)
        value = sharp(X, y)
        value.backward()
        values.append(value.detach())
        grads.append(model.weight.grad)
        torch.testing.assert_close(sharp.clean.value, value.detach())
    torch.testing.assert_close(values[0], values[1])
    torch.testing.assert_close(grads[0], grads[1])


def test_a_batch_in_which_nothing_counts_changes_nothing():
    model = linear()
    loss = SharpnessAware(model, MSAM(4, BiSAM()), cross_entropy)(X, torch.full_like(Y, -100))
    loss.backward()
    assert loss == 0
    assert not model.weight.grad.any()


def test_loss_and_bound_must_leave_out_the_same_label():
    loss = nn.CrossEntropyLoss(ignore_index=0, reduction="none")
    with pytest.raises(ValueError, match=r"leaves out label 0, and NegLog.* -100"):
        SharpnessAware(linear(), BiSAM(), loss)(X, Y)
    SharpnessAware(linear(), BiSAM(bound=NegLog(ignore_index=0)), loss)(X, Y).backward()


# clean


def test_clean_is_computed_once():
    calls = []

    def loss(outputs, targets):
        calls.append(1)
        return cross_entropy(outputs, targets)

    sharp = SharpnessAware(linear(), BiSAM(), loss)
    sharp(X, Y)
    before = len(calls)
    first = sharp.clean
    assert sharp.clean is first
    assert len(calls) == before + 1


def test_clean_is_the_same_under_autocast_and_after_it():
    model = linear().float()
    sharp = SharpnessAware(model, BiSAM(), cross_entropy)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sharp(X.float(), Y)
        inside = sharp.clean.losses
        sharp(X.float(), Y)
    assert sharp.clean.losses.dtype == torch.float32
    assert torch.equal(sharp.clean.losses, inside)


# Arguments


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: SAM("0.05"),
            r"perturb must be a radius such as 0.05, or .* got '0.05'",
        ),
        (lambda: SAM(NegLog()), "perturb must be a radius or a perturbation .* got the objective NegLog"),
        (lambda: SAM(True), "rho must be a number, got True"),
        (lambda: LookSAM(None), "perturb must be a radius .* got None"),
        (lambda: SAM(L2), "perturb is the class L2"),
        (lambda: SAM(ascent=NegLog), "ascent is the class NegLog"),
        (lambda: BiSAM(NegLog()), "perturb must be a radius or a perturbation .* got the objective NegLog"),
        (lambda: BiSAM(bound=NegLog), "ascent is the class NegLog"),
        (lambda: MSAM(32, SAM), "method is the class SAM"),
        (lambda: MSAM(4.0), "must be an int, got 4.0"),
        (lambda: MSAM(SAM()), "must be an int"),
        (lambda: L2(True), "rho must be a number, got True"),
        (lambda: NegLog("1"), "mu must be a number, got '1'"),
    ],
)
def test_a_wrong_argument_is_named_where_it_is_given(make, message):
    with pytest.raises(TypeError, match=message):
        make()


def test_a_batch_without_tensors_cannot_be_split():
    with pytest.raises(ValueError, match=r"cannot split a batch of object.*dict\(batch\)"):
        SharpnessAware(linear(), MSAM(4), cross_entropy, forward=lambda model, batch: (model(X), Y))(object())
