"""Compiled models, and models that compute their activations again: the same numbers, and nothing compiled twice."""

from __future__ import annotations

import shutil
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.registry import lookup_backend
from torch.utils.checkpoint import checkpoint

from bisam import ERM, ESAM, GSAM, MSAM, SAM, BiSAM, LookSAM, SharpnessAware, cross_entropy, displaced
from bisam.perturbations import L2
from tests.support import cases
from tests.support.cases import bits, buffers, everything, parameters

# name: the method, and the graphs of its training steps: the batch; for ESAM also without gradient, and a part of it;
# for MSAM the parts, of two sizes.
METHODS = {
    "SAM": (SAM(L2(0.5)), 1),
    "BiSAM": (BiSAM(0.5), 1),
    "GSAM": (GSAM(L2(0.5)), 1),
    "LookSAM": (LookSAM(L2(0.5), k=3), 1),
    "ESAM": (ESAM(), 3),
    "MSAM": (MSAM(3, SAM(L2(0.5))), 2),
}


each_method = pytest.mark.parametrize("method", [method for method, _ in METHODS.values()], ids=METHODS)


class Compiler:
    """A backend that runs what it is given, and counts."""

    graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return lookup_backend("aot_eager")(graph, inputs)


@pytest.fixture
def compiler():
    torch.compiler.reset()
    yield Compiler()
    torch.compiler.reset()


def convnet() -> nn.Module:
    torch.manual_seed(0)
    return cases.convnet()


def steps(sharp: SharpnessAware, model: nn.Module, numbers: range) -> Any:
    torch.manual_seed(numbers.start)
    optimizer = cases.OPTIMIZERS["sgd"](model.parameters())
    for i in numbers:
        sharp(*cases.batch(i)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return parameters(model), buffers(model)


def training(sharp: SharpnessAware, model: nn.Module, count=lambda: 0) -> tuple[list[Any], list[int]]:
    """A step, more, an evaluation and more steps: what each gave, and the count after it."""

    def evaluation() -> Any:
        model.eval()
        with torch.no_grad():
            value = sharp(*cases.batch(9))
        model.train()
        return bits(value)

    parts = [partial(steps, sharp, model, numbers) for numbers in (range(1), range(1, 4), range(4, 7))]
    parts.insert(2, evaluation)
    done = [(part(), count()) for part in parts]
    return [result for result, _ in done], [n for _, n in done]


# Compiled models


@pytest.mark.parametrize("in_place", [False, True], ids=["torch.compile(model)", "model.compile()"])
@pytest.mark.parametrize(("method", "graphs"), METHODS.values(), ids=METHODS)
def test_a_compiled_model_trains_to_the_bit_and_compiles_in_the_first_step_only(method, graphs, in_place, compiler):
    model, plain = convnet(), convnet()
    if in_place:
        model.compile(backend=compiler)
    sharp = SharpnessAware(model if in_place else torch.compile(model, backend=compiler), method, cross_entropy)
    results, counts = training(sharp, model, lambda: compiler.graphs)
    assert results == training(SharpnessAware(plain, method, cross_entropy), plain)[0]
    assert counts == [graphs, graphs, graphs + 1, graphs + 1]


def test_batches_of_other_sizes_compile_once_more(compiler):
    model = convnet()
    sharp = SharpnessAware(torch.compile(model, backend=compiler), SAM(), cross_entropy)
    for n in (8, 5, 7, 6, 8):
        sharp(*cases.batch(0, n)).backward()
    assert compiler.graphs == 2


def test_a_compiled_model_in_eval_mode_has_the_plain_loss_with_its_gradient(compiler):
    model = convnet().eval()
    sharp = SharpnessAware(torch.compile(model, backend=compiler), SAM(L2(0.5)), cross_entropy).eval()
    values = [sharp(*cases.batch()), cross_entropy(model(cases.batch()[0]), cases.batch()[1]).mean()]
    assert bits(values[0]) == bits(values[1])
    grads = [torch.autograd.grad(value, list(model.parameters())) for value in values]
    assert [bits(g) for g in grads[0]] == [bits(g) for g in grads[1]]


@pytest.mark.parametrize("scale", [2.0**10, 2.0**20], ids=["fits", "overflows"])
@pytest.mark.parametrize(("method", "graphs"), [METHODS[name] for name in ("BiSAM", "ESAM")], ids=["BiSAM", "ESAM"])
def test_a_compiled_model_in_float16_with_a_grad_scaler_trains_to_the_bit(method, graphs, scale, compiler):
    results = []
    for backend in (compiler, None):
        model, scaler = convnet().float(), torch.amp.GradScaler("cpu", init_scale=scale)
        optimizer = cases.OPTIMIZERS["sgd"](model.parameters())
        callable_model = torch.compile(model, backend=backend) if backend else model
        sharp = SharpnessAware(callable_model, method, cross_entropy, scaler=scaler)
        torch.manual_seed(0)
        for i in range(5):
            x, y = cases.batch(i)
            with torch.autocast("cpu", dtype=torch.float16):
                loss = sharp(x.float(), y)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert (scaler.get_scale() < scale) == (scale > 2.0**10)  # steps were skipped
        results.append((parameters(model), buffers(model), scaler.get_scale()))
    assert results[0] == results[1]
    assert results[0][0] != parameters(convnet().float())
    assert compiler.graphs == graphs


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler")
def test_machine_code_trains_as_python():
    torch.compiler.reset()
    model, plain = convnet(), convnet()
    steps(SharpnessAware(torch.compile(model), BiSAM(0.5), cross_entropy), model, range(4))
    steps(SharpnessAware(plain, BiSAM(0.5), cross_entropy), plain, range(4))
    torch.compiler.reset()
    for ours, theirs in zip(model.state_dict().values(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


# Activation checkpointing


class Recomputing(nn.Module):
    """A block in the middle whose activations are computed again in the backward pass."""

    def __init__(self, *middle: nn.Module, reentrant: bool | None = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, cases.CLASSES)
        self.block = nn.Sequential(nn.Linear(8, 8), *middle, nn.Tanh(), nn.Linear(8, 8))
        self.reentrant = reentrant
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        z = self.first(x)
        again = self.training and self.reentrant is not None
        return self.last(checkpoint(self.block, z, use_reentrant=self.reentrant) if again else self.block(z))


def trained(model: nn.Module, step) -> Any:
    torch.manual_seed(1)
    return cases.train(step, model)


@pytest.mark.parametrize(
    "middle", [nn.Identity, lambda: nn.Dropout(0.3), lambda: nn.LayerNorm(8)], ids=["plain", "dropout", "norm"]
)
@each_method
def test_computing_activations_again_changes_no_bit(method, middle):
    results = []
    for reentrant in (False, None):
        model, calls = Recomputing(middle(), reentrant=reentrant), []
        model.block[0].register_forward_hook(lambda *_, calls=calls: calls.append(1))
        results.append((trained(model, SharpnessAware(model, method, cross_entropy)), len(calls)))
    (first, often), (second, seldom) = results
    assert first == second
    assert often > seldom  # or nothing was computed again


def normed(reentrant: bool | None = False) -> nn.Module:
    return Recomputing(nn.BatchNorm1d(8), nn.Dropout(0.3), reentrant=reentrant)


@each_method
def test_with_batch_norm_weights_are_the_same_and_statistics_move_as_in_a_plain_loop(method):
    """Torch moves them in each forward pass, so twice: training makes no use of them, evaluation does."""
    model, plain = normed(), normed()
    parts = [slice(0, 3), slice(3, 6), slice(6, 8)] if isinstance(method, MSAM) else [slice(0, 8)]
    sharp = SharpnessAware(model, method, cross_entropy)
    for i in range(3):
        x, y = cases.batch(i)
        sharp(x, y)
        for part in parts:
            cross_entropy(plain(x[part]), y[part]).mean().backward()
        assert buffers(model) == buffers(plain)
        assert model.block[1].num_batches_tracked == 2 * len(parts) * (i + 1)
    once = normed(reentrant=None)
    model = normed()
    weights, statistics = trained(model, SharpnessAware(model, method, cross_entropy))
    expected = trained(once, SharpnessAware(once, method, cross_entropy))
    assert weights == expected[0]
    assert statistics != expected[1]


def test_the_plain_method_computes_again_as_a_plain_loop():
    model, plain = normed(), normed()
    expected = trained(plain, lambda x, y: cross_entropy(plain(x), y).mean())
    assert trained(model, SharpnessAware(model, ERM(), cross_entropy)) == expected


@pytest.mark.parametrize("method", [ERM(), SAM(), MSAM(3)], ids=str)
def test_reentrant_checkpointing_is_refused_and_leaves_nothing(method):
    model = Recomputing(nn.BatchNorm1d(8), reentrant=True)
    before = everything(model)
    with pytest.raises((RuntimeError, ValueError), match="use_reentrant=False"):
        SharpnessAware(model, method, cross_entropy)(*cases.batch())
    assert everything(model) == before


def test_a_compiled_model_may_compute_its_activations_again(compiler):
    model, plain = Recomputing(), Recomputing(reentrant=None)
    compiled = SharpnessAware(torch.compile(model, backend=compiler), BiSAM(0.5), cross_entropy)
    assert trained(model, compiled) == trained(plain, SharpnessAware(plain, BiSAM(0.5), cross_entropy))
    assert compiler.graphs >= 1


def test_a_compiled_model_is_told_which_pass_it_is():
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 4).double()
            self.register_buffer("batches", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if not displaced():
                self.batches = self.batches + 1
            return self.linear(x)

    model = Counting()
    sharp = SharpnessAware(torch.compile(model, backend="eager"), SAM(), cross_entropy)
    for step in range(4):
        sharp(*cases.batch(step)).backward()
    assert model.batches == 4
