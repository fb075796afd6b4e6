"""The family of methods: against slow twins, their degenerate cases, what they remember and what they leave behind."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from functools import partial
from itertools import count
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from bisam import (
    AESAM,
    BSAM,
    CRSAM,
    ERM,
    ESAM,
    FSAM,
    GSAM,
    KSAM,
    LESAM,
    MSAM,
    RAPP,
    RSAM,
    SAM,
    SAMON,
    SSAMD,
    SSAMF,
    WSAM,
    XSAM,
    BiSAM,
    During,
    EBiSAM,
    Every,
    FisherSAM,
    FunctionalSAM,
    GBiSAM,
    LookSAM,
    ModelOracle,
    MomentumSAM,
    MultiStepSAM,
    NegLog,
    SAMPa,
    SharpnessAware,
    Tanh,
    VaSSO,
    ZSharp,
    cross_entropy,
)
from bisam.masks import DropGrow, FisherMask, RandomMask
from bisam.methods.method import stateful
from bisam.perturbations import L2, Adaptive, Friendly, NormLayers
from bisam.schedules import Constant, Linear
from tests.support import cases, references
from tests.support.cases import bits, everything, gradients, parameters

MODELS = {**cases.MODELS, "mlp": cases.A_MODEL}
each_method = pytest.mark.parametrize("name", cases.FAMILY)


def close(actual, expected, tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


# Slow twins.


def check_twin(make_method, twin: references.Twin, model: nn.Module, make_optimizer, steps: int = 20) -> None:
    """Both draw the same random numbers: the generator is seeded before the one and before the other."""
    frozen = copy.deepcopy(model)
    w = nn.Parameter(references.flat(model))
    optimizer, flat_optimizer = make_optimizer(model.parameters()), make_optimizer([w])
    schedulers = [StepLR(o, 7, gamma=0.5) for o in (optimizer, flat_optimizer)]
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


@pytest.mark.parametrize("optimizer", cases.OPTIMIZERS)
@each_method
def test_twenty_steps_equal_the_slow_twin(name, optimizer):
    check_twin(*cases.FAMILY[name], MODELS["mlp"](), cases.OPTIMIZERS[optimizer])


@pytest.mark.parametrize(
    ("name", "model", "optimizer"),
    [
        *[(name, "convnet", "sgd") for name in [*cases.FAMILY][::3]],
        *[(name, "tied", "adamw") for name in [*cases.FAMILY][1::3] if "SAMON" not in name],  # it has no norm layers
    ],
)
def test_twenty_steps_of_other_models_equal_the_slow_twin(name, model, optimizer):
    check_twin(*cases.FAMILY[name], MODELS[model](), cases.OPTIMIZERS[optimizer])


@pytest.mark.parametrize("name", ["SAMPa", "SAMPa-0", "SAMPa-log"])
def test_sampa_looks_ahead_of_nesterov(name):
    nesterov = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=5e-3, nesterov=True)
    # A fresh SGD loads settings too, but is made before it knows them.
    check_twin(*cases.FAMILY[name], MODELS["mlp"](), nesterov)


# Degenerate cases, bit for bit.

SAM_ = SAM(L2(0.1))
B = L2(0.1)
SAME: dict[str, tuple[Any, Any]] = {
    "GSAM(alpha=0) is SAM": (GSAM(B, alpha=0.0), SAM_),
    "GBiSAM(alpha=0) is BiSAM": (GBiSAM(0.1, alpha=0.0), BiSAM(0.1)),
    "MultiStepSAM(steps=1) is SAM": (MultiStepSAM(B, steps=1), SAM_),
    "MultiStepSAM(steps=1) of Friendly is FSAM": (MultiStepSAM(Friendly(B), steps=1), FSAM(0.1)),
    "KSAM(k=n) is the method": (KSAM(8, BiSAM(0.1)), BiSAM(0.1)),
    "KSAM(k=n) is the method, with a memory": (KSAM(8, LookSAM(B, k=2)), LookSAM(B, k=2)),
    "MSAM(m=n) is the method, with a memory": (MSAM(8, LookSAM(B, k=2), separate=True), LookSAM(B, k=2)),
    "ESAM(beta=1, gamma=1) is SAM": (ESAM(RandomMask(B, beta=1.0), gamma=1.0), SAM_),
    "ESAM(beta=1, gamma=1), per entry, is SAM": (ESAM(RandomMask(B, beta=1.0, per="entry"), gamma=1.0), SAM_),
    "EBiSAM(beta=1, gamma=1) is BiSAM": (EBiSAM(0.1, beta=1.0, gamma=1.0), BiSAM(0.1)),
    "ESAM of all examples is SAM": (ESAM(B, gamma=0.99), SAM_),  # eight of eight, in their order
    "RandomMask(beta=1) is nothing": (SAM(RandomMask(Adaptive(0.5), beta=1.0)), SAM(Adaptive(0.5))),
    "FisherMask(keep=1) is nothing": (SAM(FisherMask(Adaptive(0.5), keep=1.0, every=2)), SAM(Adaptive(0.5))),
    "FisherSAM(keep=1) is SAM": (FisherSAM(0.1, keep=1.0, every=2), SAM_),
    "SSAMF(keep=1) is SAM": (SSAMF(B, keep=1.0, every=2), SAM_),
    "DropGrow(keep=1) is nothing": (SAM(DropGrow(Adaptive(0.5), keep=1.0, every=2)), SAM(Adaptive(0.5))),
    "SSAMD(keep=1) is SAM": (SSAMD(0.1, keep=1.0, every=2), SAM_),
    "ZSharp(keep=1) is SAM": (ZSharp(0.1, keep=1.0), SAM_),
    "RSAM(sigma=0) is the method": (RSAM(0.0, BiSAM(0.1)), BiSAM(0.1)),
    "RSAM(sigma=0) of RSAM(sigma=0) is the method": (RSAM(0.0, RSAM(0.0, SAM_, filters=False)), SAM_),
    "FSAM(sigma=0) is SAM": (FSAM(0.1, sigma=0.0), SAM_),
    "VaSSO(theta=1) is SAM": (VaSSO(0.1, theta=1.0), SAM_),
    "WSAM(gamma=0.5) is SAM": (WSAM(B, gamma=0.5), SAM_),
    "WSAM(gamma=0) is ERM": (WSAM(B, gamma=0.0), ERM()),
    "LookSAM(k=1) is SAM": (LookSAM(B, k=1), SAM_),
    "LookSAM(alpha=0) is now and then SAM": (LookSAM(B, k=3, alpha=0.0), Every(3, SAM_)),
    "Every(1) is the method": (Every(1, SAM_), SAM_),
    "Every(1) is the method, with a memory": (Every(1, LookSAM(B, k=2)), LookSAM(B, k=2)),
    "Every other is the other": (Every(3, ERM(), ERM()), ERM()),
    "During() is the method": (During(LookSAM(B, k=2)), LookSAM(B, k=2)),
    "During, too late, is the other": (During(SAM_, start=100, otherwise=FSAM(0.1)), FSAM(0.1)),
    "During, over, is the other": (During(SAM_, start=0, stop=1, otherwise=SAM_), SAM_),
    "CRSAM(0, 0) is SAM": (CRSAM(B, gamma=0.0, beta=0.0), SAM_),
    "XSAM(alpha=1) is SAM": (XSAM(B, alpha=1.0), SAM_),
    "AESAM(-1e9) is SAM": (AESAM(B, steps=6, first=-1e9, last=-1e9), SAM_),
    "AESAM(1e9) is SAM once": (AESAM(B, steps=6, first=1e9, last=1e9), During(SAM_, stop=1)),  # no variance at first
    "LESAM(sigma=0) is ERM": (LESAM(0.0), ERM()),
    "RAPP(inner=1) is ERM": (RAPP(0.3, inner=1), ERM()),
    "MomentumSAM(momentum=0, rho=0) is ERM": (MomentumSAM(L2(0.0), momentum=0.0), ERM()),
    "Constant is a number": (SAM(L2(Constant(0.1))), SAM_),
    "Linear between equals is a number": (SAM(Adaptive(Linear(0.5, 0.5, steps=3))), SAM(Adaptive(0.5))),
    # A radius of 0.
    "MultiStepSAM(0) is ERM": (MultiStepSAM(L2(0.0), steps=3), ERM()),
    "ESAM(0), of all examples, is ERM": (ESAM(RandomMask(L2(0.0)), gamma=1.0), ERM()),
    "FSAM(0) is ERM": (FSAM(0.0), ERM()),
    "VaSSO(0) is ERM": (VaSSO(0.0), ERM()),
    "ZSharp(0) is ERM": (ZSharp(0.0), ERM()),
    "FisherSAM(0) is ERM": (FisherSAM(0.0, every=2), ERM()),
    "SSAMF(0) is ERM": (SSAMF(L2(0.0), every=2), ERM()),
    "SSAMD(0) is ERM": (SSAMD(0.0, every=2), ERM()),
    "SAMON(0) is ERM": (SAMON(0.0), ERM()),
    "GSAM(0) is ERM": (GSAM(L2(0.0), alpha=1.0), ERM()),
    "CRSAM(0) is ERM": (CRSAM(L2(0.0), gamma=1.0, beta=1.0), ERM()),
    "LookSAM(0) is ERM": (LookSAM(L2(0.0), k=2), ERM()),
    "LookSAM-log(0) is ERM": (LookSAM(L2(0.0), NegLog(), k=2), ERM()),
    "AESAM(0) is ERM": (AESAM(L2(0.0), steps=6), ERM()),
    "MomentumSAM(0) is ERM": (MomentumSAM(L2(0.0)), ERM()),
    "KSAM(k=n) of SAM(0) is ERM": (KSAM(8, SAM(L2(0.0))), ERM()),
}
NEARLY: dict[str, tuple[Any, Any]] = {
    "XSAM(alpha~1) is SAM": (XSAM(B, alpha=1 - 1e-14), SAM_),
    "LESAM(sigma=1e9) is SAM(L2(rho_max))": (LESAM(1e9, rho_max=0.1), SAM_),
    "WSAM(0) is ERM": (WSAM(L2(0.0)), ERM()),
    "FunctionalSAM(0) is ERM": (FunctionalSAM(L2(0.0)), ERM()),
}


def trained(method, make_model, dtype=torch.double) -> tuple[Any, nn.Module]:
    torch.manual_seed(3)
    model = make_model().to(dtype)
    sharp = SharpnessAware(model, method, cross_entropy)
    return cases.train(lambda x, y: sharp(x.to(dtype), y), model), model


@pytest.mark.parametrize("model", ["mlp", "convnet"])
@pytest.mark.parametrize("case", SAME)
def test_is_the_same_to_the_bit(case, model):
    first, second = SAME[case]
    assert trained(first, MODELS[model])[0] == trained(second, MODELS[model])[0]


@pytest.mark.parametrize("case", [c for c in SAME if "LookSAM" in c or "GSAM" in c])
def test_is_the_same_to_the_bit_in_float32(case):
    first, second = SAME[case]
    assert trained(first, MODELS["mlp"], torch.float)[0] == trained(second, MODELS["mlp"], torch.float)[0]


@pytest.mark.parametrize("model", ["mlp", "convnet"])
@pytest.mark.parametrize("case", NEARLY)
def test_is_nearly_the_same(case, model):
    (_, first), (_, second) = (trained(method, MODELS[model]) for method in NEARLY[case])
    close(references.flat(first), references.flat(second), 1e-12)


@pytest.mark.parametrize("alpha", [None, 0.0, 0.5, 2.0])
@pytest.mark.parametrize("rho", [0.0, 1e-30, 0.1])
def test_xsam_is_finite(rho, alpha):
    model = trained(XSAM(L2(rho), alpha=alpha, every=2), MODELS["mlp"])[1]
    assert references.flat(model).isfinite().all()


# What training with a method is, for the tests below.


class Training:
    """A model, its optimizer and a loss; each step draws random numbers of its own, whatever came before."""

    def __init__(
        self,
        make_method: Callable[[torch.optim.Optimizer], Any],
        make_model: Callable[[], nn.Module] = cases.A_MODEL,
        *,
        dtype: torch.dtype = torch.double,
        scaler: torch.amp.GradScaler | None = None,
        lr: float = 0.1,
    ) -> None:
        torch.manual_seed(3)
        self.model, self.dtype = make_model().to(dtype), dtype
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-3)
        self.sharp = SharpnessAware(self.model, make_method(self.optimizer), cross_entropy, scaler=scaler)
        self.scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)

    def batch(self, number: int) -> tuple[Tensor, Tensor]:
        x, y = cases.batch(number)
        return x.to(self.dtype), y

    def gradients(self, number: int) -> Training:
        torch.manual_seed(number)
        self.optimizer.zero_grad()
        self.scaler.scale(self.sharp(*self.batch(number))).backward()
        return self

    def step(self, *numbers: int) -> Training:
        for number in numbers:
            self.gradients(number)
            self.scaler.step(self.optimizer)
            self.scaler.update()
        return self

    def saved(self) -> io.BytesIO:
        file = io.BytesIO()
        torch.save({"sharp": self.sharp.state_dict(), "optimizer": self.optimizer.state_dict()}, file)
        file.seek(0)
        return file

    def load(self, file: io.BytesIO) -> Training:
        saved = torch.load(file, weights_only=True)
        self.sharp.load_state_dict(saved["sharp"])
        self.optimizer.load_state_dict(saved["optimizer"])
        return self

    @property
    def memory(self) -> Any:
        """Bits of what the method remembers."""
        return tree_map(lambda v: bits(v) if isinstance(v, Tensor) else v, self.sharp.get_extra_state()["state"])

    @property
    def weights(self) -> dict[str, Any]:
        return parameters(self.model)


def training(name: str, *args: Any, **kwargs: Any) -> Training:
    return Training(cases.FAMILY[name][0], *args, **kwargs)


STATEFUL = [name for name in cases.FAMILY if stateful(training(name).sharp.method)]


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


# Whose memory it is.


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


@pytest.mark.parametrize("name", [n for n in STATEFUL if "XSAM" not in n and "AESAM" not in n])  # they remember numbers
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
        there.step(*after)
        assert (there.weights, there.memory) == (without.weights, without.memory)
        assert references.flat(there.model).isfinite().all()


@each_method
def test_a_step_that_overflows_is_as_if_it_had_not_been(name):
    check_overflow(name, (0, 1, 2), (4, 5, 6), most=3)


@pytest.mark.parametrize("name", STATEFUL)
def test_a_first_step_that_overflows_is_as_if_it_had_not_been(name):
    check_overflow(name, (), (1, 2), most=2)


# What a step leaves behind.

ELSEWHERE = ("RSAM", "BSAM", "MomentumSAM", "MSAM", "Every-other")  # where running statistics move


@each_method
def test_running_statistics_move_once_a_step(name):
    """At the weights, which is where a learning rate of 0 also leaves the point that SAMPa looks at."""
    run = training(name, cases.convnet, lr=0.0)
    plain, weights = copy.deepcopy(run.model), run.weights
    for step in range(1, 5):
        run.step(step)
        plain(run.batch(step)[0])
        assert run.model[2].num_batches_tracked == step * (3 if name.startswith("MSAM") else 1)
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
    ("name", "scaled"), [*[(name, True) for name in cases.FAMILY], *[(name, False) for name in [*cases.FAMILY][::4]]]
)
def test_a_step_waits_for_no_value(name, scaled):
    scaler = torch.amp.GradScaler("cpu") if scaled else None
    run = training(name, dtype=torch.float, scaler=scaler).step(0, 1, 2, 3, 4)  # where all memories begin
    for number in range(5, 9):
        with Waits() as mode:
            run.gradients(number)
        assert mode.all > 20
        assert not mode.seen or name.startswith("AESAM")  # documented
        run.optimizer.step()


# Parameters that take no part, and odd ones.


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


@pytest.mark.parametrize("per", ["tensor", "entry"])
def test_random_masks_are_drawn_where_no_device_waits_whatever_the_default_device(per):
    oracle, (x, y) = ModelOracle(cases.mlp(), cross_entropy), cases.batch()
    g = oracle.query((x, y)).gradient
    with torch.device("meta"):  # instead of a GPU
        e = RandomMask(L2(0.1), beta=0.5, per=per)(g, oracle)
    assert {t.device.type for t in e} == {"cpu"}


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        z = torch.randn(2, 5, 2, dtype=torch.double)
        self.w = nn.Parameter(torch.view_as_complex(z))

    def real(self) -> Tensor:
        return torch.view_as_real(self.w)

    def forward(self, x: Tensor) -> Tensor:
        return (x[:, None, None, :2].tanh() * self.real() ** 2).sum(3).flatten(1)[:, : cases.CLASSES]


class Real(Complex):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.view_as_real(self.w.detach()).clone())

    def real(self) -> Tensor:
        return self.w


LENGTHS = ["SAM", "MultiStepSAM", "FSAM", "VaSSO", "LESAM", "ESAM", "KSAM", "LookSAM", "AESAM", "MomentumSAM", "SAMPa"]
LENGTHS += ["GSAM", "WSAM", "CRSAM", "XSAM", "FunctionalSAM", "RAPP", "Every-LookSAM", "Every-two-memories"]


@pytest.mark.parametrize("name", LENGTHS)  # methods of lengths and inner products, not of single entries
def test_complex_parameters_are_their_real_and_imaginary_parts(name):
    first, second = (training(name, model, dtype=None).step(0, 1, 2, 3) for model in (Complex, Real))
    close(torch.view_as_real(first.model.w.detach()), second.model.w.detach(), 1e-12)


@pytest.mark.parametrize("name", [n for n in cases.FAMILY if "SAMON" not in n])
def test_complex_parameters_stay_finite(name):
    assert torch.view_as_real(training(name, Complex, dtype=None).step(0, 1, 2, 3).model.w).isfinite().all()


# Bad input.

NAN, INF = float("nan"), float("inf")
SHARES = [0.0, -0.1, 1.5, NAN, INF, True, "half", None]  # for (0, 1]
PORTIONS = [-0.1, 1.5, NAN, INF, True, "half", None]  # for [0, 1]
POSITIVE = [0.0, -1.0, NAN, INF, True, "one", None]
AT_LEAST_ZERO = [-1.0, NAN, INF, -INF, True, "one"]
WHOLE = [0, -1, 2.0, NAN, True, "two"]
OUTSIDE: dict[str, tuple[Callable[[Any], Any], list[Any]]] = {
    "rho": (L2, AT_LEAST_ZERO),
    "eta": (lambda v: Adaptive(0.1, v), [*AT_LEAST_ZERO, None]),
    "sigma": (lambda v: Friendly(sigma=v), [*AT_LEAST_ZERO, None]),
    "lam": (lambda v: Friendly(lam=v), PORTIONS),
    "theta": (lambda v: VaSSO(theta=v), SHARES),
    "rho_max": (lambda v: LESAM(rho_max=v), POSITIVE),
    "sigma, loss": (lambda v: LESAM(v), AT_LEAST_ZERO),
    "beta": (lambda v: RandomMask(beta=v), SHARES),
    "per": (lambda v: RandomMask(per=v), ["layer", None, 3]),
    "keep, z": (lambda v: ZSharp(keep=v), SHARES),
    "keep, Fisher": (lambda v: FisherSAM(keep=v), SHARES),
    "every, Fisher": (lambda v: FisherSAM(every=v), WHOLE),
    "keep, grow": (lambda v: DropGrow(keep=v), SHARES),
    "drop": (lambda v: DropGrow(drop=v), PORTIONS),
    "every, grow": (lambda v: DropGrow(every=v), WHOLE),
    "steps, grow": (lambda v: DropGrow(steps=v), WHOLE),
    "keep, SSAMF": (lambda v: SSAMF(keep=v), SHARES),
    "every, SSAMF": (lambda v: SSAMF(every=v), WHOLE),
    "samples": (lambda v: SSAMF(samples=v), WHOLE),
    "steps, climb": (lambda v: MultiStepSAM(steps=v), WHOLE),
    "gamma, examples": (lambda v: ESAM(gamma=v), SHARES),
    "k, LookSAM": (lambda v: LookSAM(k=v), WHOLE),
    "alpha, LookSAM": (lambda v: LookSAM(alpha=v), [*AT_LEAST_ZERO, None]),
    "steps, AESAM": (lambda v: AESAM(steps=v), WHOLE),
    "first": (lambda v: AESAM(steps=9, first=v), [NAN, INF, True, "one", None]),
    "last": (lambda v: AESAM(steps=9, last=v), [NAN, -INF, True, "one", None]),
    "delta": (lambda v: AESAM(steps=9, delta=v), PORTIONS),
    "momentum": (lambda v: MomentumSAM(momentum=v), [-0.1, 1.0, NAN, INF, True, "half", None]),
    "lam, SAMPa": (lambda v: SAMPa(ahead=L2(0.1), lam=v), PORTIONS),
    "alpha, GSAM": (lambda v: GSAM(alpha=v), [*AT_LEAST_ZERO, None]),
    "gamma, WSAM": (lambda v: WSAM(gamma=v), [-0.1, 1.0, NAN, INF, True, "half", None]),
    "gamma, CRSAM": (lambda v: CRSAM(gamma=v), [*AT_LEAST_ZERO, None]),
    "beta, CRSAM": (lambda v: CRSAM(beta=v), [*AT_LEAST_ZERO, None]),
    "rho_max, XSAM": (lambda v: XSAM(rho_max=v), POSITIVE),
    "every, XSAM": (lambda v: XSAM(every=v), WHOLE),
    "alpha, XSAM": (lambda v: XSAM(alpha=v), AT_LEAST_ZERO),
    "examples": (lambda v: BSAM(v), POSITIVE),
    "rho, BSAM": (lambda v: BSAM(10, v), AT_LEAST_ZERO),
    "prior": (lambda v: BSAM(10, prior=v), [*AT_LEAST_ZERO, None]),
    "damping": (lambda v: BSAM(10, damping=v), POSITIVE),
    "beta1": (lambda v: BSAM(10, beta1=v), [-0.1, 1.0, NAN, True, "half", None]),
    "beta2": (lambda v: BSAM(10, beta2=v), [-0.1, 1.0, NAN, True, "half", None]),
    "s": (lambda v: BSAM(10, s=v), POSITIVE),
    "gamma, RAPP": (RAPP, POSITIVE),
    "inner": (lambda v: RAPP(0.1, v), WHOLE),
    "m": (MSAM, WHOLE),
    "k, KSAM": (KSAM, WHOLE),
    "sigma, RSAM": (RSAM, [*AT_LEAST_ZERO, None]),
    "k, Every": (Every, WHOLE),
    "start": (lambda v: During(start=v), [-1, 2.0, True, "two", None]),
    "stop": (lambda v: During(start=3, stop=v), [3, 2, 0, 4.0, True, "two"]),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_what_is_outside_its_range_is_named_with_its_value(name):
    make, values = OUTSIDE[name]
    for value in values:
        kinds = TypeError if isinstance(value, str | bool | None) and name != "per" else (TypeError, ValueError)
        with pytest.raises(kinds, match=rf"{name.split(',')[0]}\b.*{repr(value).removesuffix('.0')}"):
            make(value)


CALLABLE: dict[str, Callable[[Any], Any]] = {
    "perturb": SAM,
    "perturb, GSAM": GSAM,
    "perturb, MomentumSAM": MomentumSAM,
    "perturb, Friendly": Friendly,
    "perturb, RandomMask": RandomMask,
    "ascent": lambda v: SAM(L2(0.1), v),
    "descent": lambda v: MultiStepSAM(L2(0.1), None, v),
    "descent, MomentumSAM": lambda v: MomentumSAM(L2(0.1), v),
    "ascent, BSAM": lambda v: BSAM(10, ascent=v),
    "select": lambda v: ESAM(select=v),
    "ahead": lambda v: SAMPa(ahead=v),
    "method, MSAM": lambda v: MSAM(4, v),
    "method, KSAM": lambda v: KSAM(4, v),
    "method, RSAM": lambda v: RSAM(0.1, v),
    "method, Every": lambda v: Every(2, v),
    "otherwise, Every": lambda v: Every(2, SAM(), v),
    "method, During": lambda v: During(v),
    "otherwise, During": lambda v: During(SAM(), otherwise=v),
}


@pytest.mark.parametrize("value", [0.1, NegLog, "sam"], ids=str)
@pytest.mark.parametrize("name", CALLABLE)
def test_what_cannot_be_called_or_is_a_class_is_named(name, value):
    with pytest.raises(TypeError, match=rf"{name.split(',')[0]}.*({value}|NegLog)"):
        CALLABLE[name](value)


@pytest.mark.parametrize(
    ("method", "inside"),
    [
        (LookSAM(), "LookSAM"),
        (GSAM(Friendly()), "Friendly"),
        (KSAM(2, RSAM(0.1, VaSSO())), "Smoothed"),
        (Every(2, ERM(), MomentumSAM()), "MomentumSAM"),
        (SAM(RandomMask(FisherMask())), "FisherMask"),
        (XSAM(), "XSAM"),
    ],
    ids=lambda v: str(v),
)
def test_msam_asks_whether_to_keep_memories_apart(method, inside):
    with pytest.raises(ValueError, match=rf"(?s){inside}.*separate=True"):
        MSAM(4, method)
    assert MSAM(4, method, separate=True)


@pytest.mark.parametrize("method", [XSAM(alpha=1.0), KSAM(2, EBiSAM()), RSAM(0.1), Every(2), lambda o, b: ERM()(o, b)])
def test_msam_takes_what_has_no_memory(method):
    assert MSAM(4, method)


PER_EXAMPLE = {
    "ESAM": ESAM(L2(0.1)),
    "EBiSAM": EBiSAM(0.1),
    "ESAM, selecting": ESAM(L2(0.1), select=lambda z, y: cross_entropy(z, y).mean()),
    "KSAM": KSAM(3),
    "Every-KSAM": Every(1, RSAM(0.0, KSAM(3))),
}


@pytest.mark.parametrize("method", PER_EXAMPLE.values(), ids=PER_EXAMPLE)
def test_a_scalar_where_one_loss_per_example_is_needed_is_refused(method):
    scalar = cross_entropy if getattr(method, "select", None) else nn.CrossEntropyLoss()
    with pytest.raises(TypeError, match="reduction"):
        SharpnessAware(cases.mlp(), method, scalar)(*cases.batch())


@pytest.mark.parametrize("method", [ESAM(gamma=1.0), GSAM(), MSAM(3), LookSAM(), XSAM(), FunctionalSAM()], ids=str)
def test_a_scalar_loss_is_enough_for_others(method):
    first = SharpnessAware(cases.mlp(), method, nn.CrossEntropyLoss())(*cases.batch())
    assert first.isfinite()


@pytest.mark.parametrize("k", [9, 1000])
def test_more_examples_than_the_batch_has_are_refused(k):
    with pytest.raises(ValueError, match=rf"{k}.*8|8.*{k}"):
        SharpnessAware(cases.mlp(), KSAM(k), cross_entropy)(*cases.batch())


@pytest.mark.parametrize("method", [SAMON(0.1), SAM(NormLayers(Adaptive(0.1))), SAM(Friendly(NormLayers()))], ids=str)
def test_a_model_without_norm_layers_is_refused(method):
    with pytest.raises(ValueError, match="normalisation layer"):
        SharpnessAware(cases.mlp(), method, cross_entropy)(*cases.batch())


def test_functional_sam_needs_one_tensor():
    def forward(model, x, y):
        return {"logits": model(x)}, y

    sharp = SharpnessAware(cases.mlp(), FunctionalSAM(), lambda z, y: cross_entropy(z["logits"], y), forward)
    with pytest.raises(TypeError, match=r"FunctionalSAM.*tensor"):
        sharp(*cases.batch())
