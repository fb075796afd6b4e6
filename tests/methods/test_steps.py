"""A step of each method: overflows, running statistics, failures, and unusual parameters."""

from __future__ import annotations

import copy
from functools import partial
from itertools import count
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bisam import FunctionalSAM, SharpnessAware, cross_entropy
from bisam.perturbations import L2
from tests.support import cases, references
from tests.support.cases import everything, gradients
from tests.support.runs import STATEFUL, Training, close, each_method, training

# Loss scaling.


@each_method
def test_a_grad_scaler_changes_no_bit(name):
    plain = training(name, dtype=torch.float).step(0, 1, 2, 3)
    scaled = training(name, dtype=torch.float, scaler=torch.amp.GradScaler("cpu", init_scale=1024)).step(0, 1, 2, 3)
    assert (scaled.weights, scaled.memory) == (plain.weights, plain.memory)


def forwards(run: Training, number: int) -> list[bool]:
    """For each forward pass of a step whether its gradient is asked for."""
    seen, run = [], copy.deepcopy(run)
    run.model.register_forward_hook(lambda module, args, out: seen.append(out.requires_grad))
    run.gradients(number)
    return seen


def check_overflow(name: str, before: tuple[int, ...], after: tuple[int, ...], most: int) -> None:
    """Let the gradient of a query overflow between the steps before and after, for each query in turn."""
    number = len(before)
    run = training(name, dtype=torch.float, scaler=torch.amp.GradScaler("cpu", init_scale=1024)).step(*before)
    without = training(name, dtype=torch.float).step(*before)
    state = without.sharp.get_extra_state()
    without.sharp.set_extra_state({**state, "step": state["step"] + 1})  # all that a skipped step is
    without.step(*after)
    for query in [i for i, grad in enumerate(forwards(run, number)) if grad][:most]:
        there, calls = copy.deepcopy(run), count()

        def overflow(module: nn.Module, args: Any, out: Tensor, query=query, calls=calls) -> None:
            if next(calls) == query:
                out.register_hook(lambda g: g * torch.inf)

        handle = there.model.register_forward_hook(overflow)
        there.step(number)
        handle.remove()
        assert there.scaler.get_scale() == 512
        assert (there.weights, there.memory) == (run.weights, run.memory)
        # As the state of `without`: a batch that it has is no part of a larger tensor, which may round otherwise.
        there.sharp.set_extra_state(there.sharp.get_extra_state())
        there.step(*after)
        assert (there.weights, there.memory) == (without.weights, without.memory)
        assert references.flat(there.model).isfinite().all()


@each_method
def test_a_step_that_overflows_is_as_if_it_had_not_been(name):
    check_overflow(name, (0, 1, 2), (4, 5, 6), most=3)


@pytest.mark.parametrize("name", STATEFUL)
def test_a_first_step_that_overflows_is_as_if_it_had_not_been(name):
    check_overflow(name, (), (1, 2), most=2)


# Gradients that are not finite, without a scaler: the loop skips the step.


def check_bad_batch(name: str, before: int, value: float) -> None:
    """A batch with `value` in one entry, after some good ones, is as if it had not been; only the step counts."""
    run = training(name).step(*range(before))
    without = copy.deepcopy(run)  # with the optimizer, which some methods read
    memory, state = run.memory, without.sharp.get_extra_state()
    without.sharp.set_extra_state({**state, "step": state["step"] + 1})
    good = run.batch
    run.batch = lambda number: spoiled(good(number), value)
    run.gradients(before)
    run.batch = good
    assert not all(p.grad.isfinite().all() for p in run.model.parameters())  # so that the loop skips it
    assert (run.memory, run.sharp.get_extra_state()["step"]) == (memory, before + 1)
    for number in range(before + 1, before + 5):
        run.step(number)
        without.step(number)
        assert (gradients(run.model), run.memory) == (gradients(without.model), without.memory)
        assert references.flat(run.model).isfinite().all()


def spoiled(batch: tuple[Tensor, Tensor], value: float) -> tuple[Tensor, Tensor]:
    x, y = batch
    x = x.clone()
    x[2, 1] = value
    return x, y


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@each_method
def test_a_batch_that_is_not_finite_is_as_if_it_had_not_been(name, value):
    check_bad_batch(name, 3, value)


@pytest.mark.parametrize("name", STATEFUL)
def test_a_first_batch_that_is_not_finite_leaves_the_memory_empty(name):
    check_bad_batch(name, 0, torch.nan)


@pytest.mark.parametrize("name", STATEFUL)
def test_on_a_device_a_batch_that_is_not_finite_is_as_if_it_had_not_been(name, as_on_a_device):
    check_bad_batch(name, 3, torch.nan)


@pytest.fixture
def as_on_a_device(monkeypatch):
    """No condition is read at once."""
    monkeypatch.setattr("bisam.state.known", lambda condition: None)


# Gradients whose squares exceed the range of float32.

HOMOGENEOUS = (
    "ERM SAM MultiStepSAM ASAM ASAM-official MSAM RandomMask-friendly FSAM VaSSO ZSharp SAMON Only FisherSAM SSAMF "
    "SSAMD ESAM KSAM LookSAM AESAM MomentumSAM SAMPa GSAM GSAM-friendly WSAM CRSAM XSAM FunctionalSAM RSAM "
    "GNP StableSAM BilateralSAM GCSAM ZSharp-per-tensor Lookbehind Lookbehind-adaptive-alpha GAM RSAM-radius "
    "MSAM-LookSAM Every-LookSAM Every-two-memories During"
)
"""Methods whose gradient is k times as large if the loss is."""


@pytest.mark.parametrize("name", HOMOGENEOUS.split())
def test_a_loss_of_any_magnitude_has_the_same_displacements(name):
    """A power of two, so that all that is in range has the same bits."""

    def steps(factor: float) -> list[Tensor]:
        run, grads = training(name, dtype=torch.float, lr=0.0), []
        run.sharp.loss = lambda outputs, targets: cross_entropy(outputs, targets) * factor
        for number in range(6):
            run.gradients(number)
            grads.append(torch.cat([p.grad.double().flatten() for p in run.model.parameters()]) / factor)
        return grads

    for large, usual in zip(steps(2.0**70), steps(1.0), strict=True):
        assert (large - usual).norm() < 1e-5 * usual.norm()


# Effects of a step.

ELSEWHERE = (
    "RSAM",
    "TSAM",
    "Tilted",
    "BSAM",
    "MomentumSAM",
    "MSAM",
    "Accumulated",
    "Every-other",
    "OptSAM",
    "SAMDB",
    "ZerothOrder",
    "FilterNoise",
)  # where running statistics move


@each_method
def test_running_statistics_move_once_a_step(name):
    """At the weights, which is where a learning rate of 0 also leaves the point that SAMPa looks at."""
    run = training(name, cases.convnet, lr=0.0)
    plain, weights = copy.deepcopy(run.model), run.weights
    for step in range(1, 5):
        run.step(step)
        plain(run.batch(step)[0])
        parts = 3 if name.startswith(("MSAM", "Accumulated")) else 1
        assert run.model[2].num_batches_tracked == step * (2 if name == "Accumulated-GSAM-log" else parts)
    assert run.weights == weights
    assert (cases.buffers(run.model) == cases.buffers(plain)) == (not name.startswith(ELSEWHERE))


@each_method
def test_a_step_that_fails_leaves_nothing(name):
    run = training(name, cases.convnet).step(0, 1)
    before = everything(run.model), run.memory, run.sharp.get_extra_state()["step"]
    for n in range(len(forwards(run, 2))):
        calls = count()

        def fail(*args: Any, n=n, calls=calls) -> None:
            if next(calls) == n:
                raise RuntimeError("boom")

        handle = run.model[4].register_forward_hook(fail)  # after a norm has moved
        torch.manual_seed(2)
        with pytest.raises(RuntimeError, match="boom"):
            run.sharp(*run.batch(2))
        handle.remove()
        assert (everything(run.model), run.memory, run.sharp.get_extra_state()["step"]) == before
    untroubled = training(name, cases.convnet).step(0, 1, 2)
    run.step(2)
    assert (run.weights, run.memory) == (untroubled.weights, untroubled.memory)


class Waits(TorchDispatchMode):
    """Counts what waits for a value of a device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen, self.all = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.all += 1
        masked = function is torch.ops.aten.index.Tensor and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        )
        names = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select"}
        if masked or str(function).split(".")[1] in names:
            self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("name", "scaled"), [*[(name, False) for name in cases.FAMILY], *[(name, True) for name in [*cases.FAMILY][::4]]]
)
@pytest.mark.usefixtures("as_on_a_device")
def test_a_step_waits_for_no_value(name, scaled):
    scaler = torch.amp.GradScaler("cpu") if scaled else None
    run = training(name, dtype=torch.float, scaler=scaler).step(0, 1, 2, 3, 4)  # where all memories begin
    for number in range(5, 9):
        with Waits() as mode:
            run.gradients(number)
        assert mode.all > 20
        assert not mode.seen or name.startswith("AESAM")  # documented
        run.optimizer.step()


# Unused and unusual parameters.


class Unused(nn.Module):
    """A model with a frozen parameter, and a layer that is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.unused, self.net = nn.Linear(3, 2).double(), cases.A_MODEL()
        self.net[0].bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@each_method
def test_unused_and_frozen_parameters_keep_no_gradient(name):
    run = training(name, Unused)
    before = run.weights
    for number in range(4):
        run.gradients(number)
        missing = {n for n, g in gradients(run.model).items() if g is None}
        assert missing == {"unused.weight", "unused.bias", "net.0.bias"}
        run.optimizer.step()
    assert {n for n, w in run.weights.items() if w == before[n]} == missing


class Odd(nn.Module):
    """Parameters of no and of one dimension, one of them without entries."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.norm_shift = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.randn(cases.CLASSES))
        self.empty = nn.Parameter(torch.zeros(0, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x[:, : cases.CLASSES] * self.scale + self.norm_shift + self.empty.sum()


@each_method
def test_odd_shapes_are_shapes(name):
    run = training(name, Odd).step(0, 1, 2, 3)
    assert references.flat(run.model).isfinite().all()
    assert run.model.scale.shape == ()


@each_method
def test_a_batch_of_one(name):
    run = training(name)
    for number in range(4):
        x, y = cases.batch(number, n=1)
        run.optimizer.zero_grad()
        if name.startswith("KSAM"):
            with pytest.raises(ValueError, match="batch"):
                run.sharp(x, y)
        else:
            run.sharp(x, y).backward()
            run.optimizer.step()
    assert references.flat(run.model).isfinite().all()


ENTRIES = (
    "ASAM ASAM-official ABiSAM MultiStepSAM-adaptive MomentumSAM-log Smoothed-friendly-adaptive SAMON-adaptive-log "
    "RandomMask-entry RandomMask-friendly ESAM-entry-tanh ZSharp ZSharp-log ZSharp-per-tensor ZScore-adaptive "
    "GCSAM Centralised-adaptive-tanh SAGM-tanh Lookbehind-adaptive-alpha GAM-log Tilted-friendly-log TSAM RSAM-radius "
    "EigenSAM EigenSAM-log SAMSPS-log PerGroup PerGroup-all-log ClassSAM-log FisherSAM "
    "FisherMask-friendly-log SSAMF SSAMF-log SSAMF-descent SSAMD DropGrow-settling-log During BSAM BSAM-log RSAM "
    "RSAM-plain-adaptive KSAM-RSAM-EBiSAM Every-other-LookSAM RandomMask-only-adaptive Only-RandomMask-adaptive "
    "SAMPa-asam SAMDB-log FlipRate-every-friendly-adaptive-log ZerothOrder-signs-adaptive-tanh FilterNoise "
    "FilterNoise-rising-log"
)
"""Methods that treat single entries, of which a complex number is one; test_references.py has their formulas."""


@pytest.mark.parametrize("name", [name for name in cases.FAMILY if name not in ENTRIES.split()])
def test_complex_weights_are_their_real_and_imaginary_parts(name):
    first, second = (
        training(name, partial(cases.complex_mlp, real=real), dtype=None).step(0, 1, 2, 3) for real in (False, True)
    )
    for z, parts in zip(first.model.parameters(), second.model.parameters(), strict=True):
        close(torch.view_as_real(z.detach()), parts.detach(), 1e-12)


class ComplexOutputs(nn.Module):
    def __init__(self, *, real: bool) -> None:
        super().__init__()
        self.layer, self.real = cases.ComplexLinear(6, cases.CLASSES, False), real

    def forward(self, x: Tensor) -> Tensor:
        z = self.layer(x)
        return torch.view_as_real(z) if self.real else z


def test_functional_sam_takes_complex_outputs_as_pairs():
    grads = []
    for real in (False, True):
        torch.manual_seed(0)
        model = ComplexOutputs(real=real)

        def loss(outputs: Tensor, targets: Tensor) -> Tensor:
            parts = torch.view_as_real(outputs) if outputs.is_complex() else outputs
            return cross_entropy(parts[..., 0] ** 2 + parts[..., 1], targets)

        SharpnessAware(model, FunctionalSAM(L2(0.5)), loss)(*cases.batch()).backward()
        grads.append(model.layer.weight.grad.resolve_conj())
    close(*grads, 1e-12)
