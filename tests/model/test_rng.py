"""Random numbers: fresh in each query, or the same ones with same_noise."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bisam import ERM, MSAM, SAM, Accumulated, ModelOracle, MultiStepSAM, SharpnessAware, cross_entropy
from bisam.perturbations import L2
from tests.support import cases
from tests.support.cases import bits
from tests.support.runs import twins


def dropout_net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 32), nn.Dropout(0.5), nn.Linear(32, 4), nn.Dropout(0.1)).double()


def masks(sharp: SharpnessAware) -> list[Tensor]:
    seen = []
    handle = sharp.model[1].register_forward_hook(lambda m, x, out: seen.append(out.detach() == 0))
    sharp(*cases.batch())
    handle.remove()
    return seen


def test_same_noise_replays_the_masks_within_a_step_only():
    sharp = SharpnessAware(dropout_net(), SAM(), cross_entropy, same_noise=True)
    (first, second), (third, _) = masks(sharp), masks(sharp)
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


@pytest.mark.parametrize("source", [lambda: np.random.rand(), lambda: random.random()], ids=["numpy", "python"])  # noqa: NPY002
@pytest.mark.parametrize("same", [True, False])
def test_same_noise_replays_other_generators_too(source, same):
    seen = []

    class Masked(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(source())
            return super().forward(x)

    sharp = SharpnessAware(Masked(6, 4).double(), MSAM(4), cross_entropy, same_noise=same)
    sharp(*cases.batch())
    assert (seen[0] == seen[1], seen[2] == seen[3]) == (same, same)
    assert seen[0] != seen[2]


def test_a_fork_seeds_and_restores_all_generators():
    oracle, draws = ModelOracle(cases.mlp(), cross_entropy), []
    for _ in range(2):
        before = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
        with oracle.fork(3, 4):
            draws.append((random.random(), np.random.rand(), torch.rand(()).item()))  # noqa: NPY002
        assert (random.getstate(), np.random.get_state()[1].tolist()) == before  # noqa: NPY002
    assert draws[0] == draws[1]


def test_noise_is_fresh_by_default():
    first, second = masks(SharpnessAware(dropout_net(), SAM(), cross_entropy))
    assert not torch.equal(first, second)


def test_same_noise_replays_per_micro_batch():
    seen = masks(SharpnessAware(dropout_net(), MSAM(4), cross_entropy, same_noise=True))
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[2], seen[3])
    assert not torch.equal(seen[0], seen[2])


@pytest.mark.parametrize("queries", [2, 3])
def test_same_noise_replays_the_masks_of_each_part_of_an_accumulated_batch(queries):
    """A query of the whole batch comes between two queries on the same part."""
    method = Accumulated(4, MultiStepSAM(0.1, steps=queries - 1))
    seen = masks(SharpnessAware(dropout_net(), method, cross_entropy, same_noise=True))
    parts = len(seen) // queries
    assert parts > 1
    for i, mask in enumerate(seen):
        assert torch.equal(mask, seen[i % parts])
    assert not torch.equal(seen[0], seen[1])


def test_same_noise_replays_the_masks_of_batches_that_take_turns():
    def method(oracle, batch):
        other = tuple(t.flip(0) for t in batch)
        answers = [oracle.query(b) for b in (batch, other, batch, other)]
        return answers[0]

    seen = masks(SharpnessAware(dropout_net(), method, cross_entropy, same_noise=True))
    assert torch.equal(seen[0], seen[2])
    assert torch.equal(seen[1], seen[3])
    assert not torch.equal(seen[0], seen[1])


def test_same_noise_with_rho_zero_is_erm_to_the_random_state():
    results = []
    for method in (SAM(L2(0.0)), ERM()):
        model, _ = twins(dropout_net)
        sharp = SharpnessAware(model, method, cross_entropy, same_noise=True)
        torch.manual_seed(7)
        results.append((cases.train(sharp, model), bits(torch.get_rng_state())))
    assert results[0] == results[1]


@pytest.mark.parametrize("dropout", [False, True])
def test_same_noise_leaves_what_a_perturbation_draws_alone(dropout):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5 if dropout else 0.0), nn.Linear(8, cases.CLASSES)).double()
    drawn = []

    def method(oracle, batch):
        g = oracle.query(batch).gradient
        drawn.append(tuple(torch.rand(8).lt(0.5).tolist()))
        return oracle.query(batch, at=g * 0.01)

    sharp = SharpnessAware(model, method, cross_entropy, same_noise=True)
    batch = cases.batch()
    for _ in range(8):
        sharp(*batch)
    assert len(set(drawn)) > 6
