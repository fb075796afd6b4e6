"""State of each method: resumed, copied, shared, and refused where it belongs to another method or model."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from bisam import AESAM, BSAM, FSAM, KSAM, MSAM, SAM, XSAM, Every, LookSAM, SharpnessAware, Tanh, cross_entropy
from bisam.perturbations import L2
from tests.support import cases, references
from tests.support.cases import bits, parameters
from tests.support.runs import STATEFUL, Training, each_method, training


@each_method
def test_what_has_a_memory_says_so(name):
    assert bool(training(name).step(0, 1, 2, 3, 4, 5).memory) == (name in STATEFUL)


# Resumed, copied, shared.


@each_method
def test_resumed_equals_uninterrupted(name):
    whole = training(name).step(0, 1, 2)
    file = whole.saved()
    whole.step(3, 4, 5)
    resumed = training(name)
    nn.init.normal_(resumed.model[0].weight)
    resumed.load(file).step(3, 4, 5)
    assert (resumed.weights, resumed.memory) == (whole.weights, whole.memory)


@pytest.mark.parametrize("name", ["ESAM", "RSAM", "BSAM", "SSAMD", "KSAM-RSAM-EBiSAM"])
def test_resumed_with_the_random_state_equals_uninterrupted(name):
    """As a training loop does, which seeds once."""
    results = []
    for resume in (True, False):
        run = training(name)
        for number in range(6):
            if resume and number == 3:
                state, run = torch.get_rng_state(), training(name).load(run.saved())
                torch.set_rng_state(state)
            run.optimizer.zero_grad()
            run.sharp(*run.batch(number)).backward()
            run.optimizer.step()
        results.append((run.weights, run.memory, bits(torch.get_rng_state())))
    assert results[0] == results[1]


@each_method
def test_a_copy_goes_on_by_itself(name):
    run = training(name).step(0, 1, 2)
    other = copy.deepcopy(run)  # with the optimizer, which some methods read
    before = run.weights, run.memory
    result = other.step(3, 4, 5)
    assert (run.weights, run.memory) == before != (result.weights, result.memory)
    run.step(3, 4, 5)
    assert (run.weights, run.memory) == (result.weights, result.memory)


@each_method
def test_one_method_in_two_losses_shares_nothing(name):
    models = [cases.A_MODEL(), cases.A_MODEL()]
    twins = copy.deepcopy(models)

    def optimizer(*modules: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for m in modules for p in m.parameters()], lr=0.1, momentum=0.9)

    both = optimizer(*models)
    method = cases.FAMILY[name][0](both)
    sharps = [SharpnessAware(model, method, cross_entropy) for model in models]
    alone = [optimizer(twin) for twin in twins]
    lone = [SharpnessAware(t, cases.FAMILY[name][0](o), cross_entropy) for t, o in zip(twins, alone, strict=True)]
    for step in range(4):
        for losses in (sharps, lone):
            for i, sharp in enumerate(losses):
                torch.manual_seed(step)
                sharp(*cases.batch(10 * i + step)).backward()
        for o in (both, *alone):
            o.step()
            o.zero_grad()
    assert [parameters(m) for m in models] == [parameters(t) for t in twins]


# State of another method, model or setting.


@pytest.mark.parametrize("name", STATEFUL)
def test_the_memory_of_another_method_is_refused(name):
    saved = training(name).step(0, 1).sharp.state_dict()
    other = "LookSAM" if name.startswith("BSAM") else "BSAM"
    run = training(other).step(5, 6)
    before = run.weights, run.memory
    with pytest.raises(
        ValueError, match=f"(?s){type(training(name).sharp.method).__name__}.*{other}.*load the weights alone"
    ):
        run.sharp.set_extra_state(saved["_extra_state"])
    with pytest.raises(ValueError, match="the same method"):
        SharpnessAware(cases.A_MODEL(), SAM(), cross_entropy).set_extra_state(saved["_extra_state"])
    assert (run.weights, run.memory) == before
    untouched = training(other).step(5, 6, 7)
    assert run.step(7).weights == untouched.weights


@pytest.mark.parametrize("name", STATEFUL)
def test_a_refused_state_leaves_the_weights(name):
    saved = training(name).step(0, 1).sharp.state_dict()
    run = training("LookSAM" if name.startswith("BSAM") else "BSAM").step(5, 6)
    before = run.weights, run.memory
    with pytest.raises((ValueError, RuntimeError), match="the same method"):
        run.sharp.load_state_dict(saved)
    assert (run.weights, run.memory) == before


@pytest.mark.parametrize(
    "name", [n for n in STATEFUL if not n.startswith(("XSAM", "AESAM", "SAF", "SAMDB")) and n != "FlipRate"]
)  # no weights
def test_the_memory_of_another_model_is_refused(name):
    saved = training(name).step(0, 1).sharp.get_extra_state()
    run = training(name, lambda: cases.mlp(lambda n: nn.Sequential(nn.LayerNorm(n), nn.Linear(n, n)))).step(5)
    before = run.weights, run.memory
    with pytest.raises(ValueError, match="another model"):
        run.sharp.set_extra_state(saved)
    assert (run.weights, run.memory) == before


@each_method
def test_no_memory_loads_anywhere(name):
    state = SharpnessAware(cases.A_MODEL(), SAM(), cross_entropy).get_extra_state()
    run = training(name).step(0)
    run.sharp.set_extra_state(state)
    assert run.memory == {}
    assert references.flat(run.step(1).model).isfinite().all()


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        (LookSAM(L2(0.1), k=2, alpha=0.3), LookSAM(L2(0.5), k=7)),
        (FSAM(0.1), FSAM(0.2, sigma=0.5, lam=0.1)),
        (KSAM(4, FSAM(0.1)), KSAM(6, FSAM(0.2))),
        (Every(2, LookSAM(), FSAM()), Every(3, LookSAM(k=3), FSAM(0.3))),
        (BSAM(1000), BSAM(2000, 0.05, prior=1.0)),
        (FSAM(0.1, ascent=Tanh()), FSAM(0.1, ascent=Tanh(1.0))),
        (MSAM(4, FSAM(), separate=True), MSAM(2, FSAM(), separate=True)),
        (XSAM(rho_max=0.3), XSAM(rho_max=0.5, every=5)),
    ],
    ids=lambda m: type(m).__name__,
)
def test_the_memory_of_other_numbers_loads(saved, loaded):
    run = Training(lambda o: saved).step(0, 1)
    other = Training(lambda o: loaded)
    other.sharp.load_state_dict(run.sharp.state_dict())
    assert other.memory == run.memory != {}
    assert references.flat(other.step(2, 3).model).isfinite().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_aesam_takes_the_same_sam_steps_after_a_batch_that_is_not_finite(value):
    """A statistic that is NaN would make every later step a plain one."""
    taken = []
    for bad in (False, True):
        torch.manual_seed(0)
        model, passes = cases.mlp(), []
        model.register_forward_pre_hook(lambda *_, passes=passes: passes.append(1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        sharp = SharpnessAware(model, AESAM(L2(0.1), steps=1, first=0.5, last=0.5), cross_entropy)
        counts = []
        for step in range(30):
            x, y = cases.batch(step)
            if bad and step == 4:
                sharp(x * value, y).backward()  # and the loop skips the optimizer's step
            optimizer.zero_grad()
            passes.clear()
            sharp(x, y).backward()
            optimizer.step()
            counts.append(len(passes))
        taken.append(counts)
    assert taken[0] == taken[1]
    assert 3 <= taken[0][5:].count(2) <= 22
