"""Each method equals its slow reference on one flat vector."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import StepLR

from bisam import SharpnessAware, cross_entropy
from tests.support import cases, references
from tests.support.cases import FAMILY_MODELS
from tests.support.runs import close, each_method, each_variant


def check_twin(
    make_method, twin: references.Twin, model: nn.Module, make_optimizer, steps: int = 20, decay: float = 0.5
) -> None:
    """Both draw the same random numbers: the generator is seeded before the one and before the other."""
    frozen = copy.deepcopy(model)
    w = nn.Parameter(references.flat(model))
    optimizer, flat_optimizer = make_optimizer(model.parameters()), make_optimizer([w])
    schedulers = [StepLR(o, 7, gamma=decay) for o in (optimizer, flat_optimizer)]
    sharp, memory = SharpnessAware(model, make_method(optimizer), cross_entropy), {}
    for number in range(steps):
        optimizer.zero_grad()
        torch.manual_seed(number)
        sharp(*cases.batch(number)).backward()
        torch.manual_seed(number)
        w.grad = twin(w.detach(), references.Step(frozen, cases.batch(number), flat_optimizer, number, memory))
        for o in (optimizer, flat_optimizer, *schedulers):
            o.step()
    assert (references.flat(model) - references.flat(frozen)).abs().max() > 0.02  # it went somewhere
    close(references.flat(model), w.detach(), 1e-9)


@each_variant
def test_twenty_steps_equal_the_slow_twin(name):
    check_twin(*cases.FAMILY[name], FAMILY_MODELS["mlp"](), cases.OPTIMIZERS["sgd"])


@each_method
def test_steps_of_adamw_equal_the_slow_twin(name):
    check_twin(*cases.FAMILY[name], FAMILY_MODELS["mlp"](), cases.OPTIMIZERS["adamw"], steps=10)


NORMED = ("SAMON", "SAMON-adaptive-log", "SAMPa-on")  # they need norm layers, which the tied model does not have


@pytest.mark.parametrize(
    ("name", "model", "optimizer"),
    [
        *[(name, "convnet", "sgd") for name in [*cases.FAMILY][::3]],
        *[(name, "tied", "adamw") for name in [*cases.FAMILY][1::3] if name not in NORMED],
    ],
)
def test_steps_of_other_models_equal_the_slow_twin(name, model, optimizer):
    check_twin(*cases.FAMILY[name], FAMILY_MODELS[model](), cases.OPTIMIZERS[optimizer], steps=10)


@pytest.mark.parametrize("optimizer", cases.OPTIMIZERS)
@pytest.mark.parametrize("model", cases.MODELS)
@pytest.mark.parametrize("name", cases.PLAIN)
def test_twenty_steps_of_each_model_equal_the_slow_twin(name, model, optimizer):
    check_twin(*cases.FAMILY[name], cases.MODELS[model](), cases.OPTIMIZERS[optimizer], decay=1.0)


@each_method
def test_steps_of_complex_weights_equal_the_slow_twin(name):
    check_twin(*cases.FAMILY[name], cases.complex_mlp(), cases.OPTIMIZERS["sgd"], steps=10)


def test_steps_of_sampa_with_adamw_of_complex_weights_equal_the_slow_twin():
    check_twin(*cases.FAMILY["SAMPa"], cases.complex_mlp(), cases.OPTIMIZERS["adamw"], steps=10)


@pytest.mark.parametrize("name", ["SAMPa", "SAMPa-0", "SAMPa-log"])
def test_sampa_looks_ahead_of_nesterov(name):
    nesterov = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=5e-3, nesterov=True)
    # A fresh SGD loads settings too, but is made before it knows them.
    check_twin(*cases.FAMILY[name], FAMILY_MODELS["mlp"](), nesterov)
