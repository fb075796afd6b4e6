"""Random numbers: fresh in each query, or the same ones with same_noise."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bisam import ERM, MSAM, SAM, SharpnessAware, cross_entropy
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


def test_noise_is_fresh_by_default():
    first, second = masks(SharpnessAware(dropout_net(), SAM(), cross_entropy))
    assert not torch.equal(first, second)


def test_same_noise_replays_per_micro_batch():
    seen = masks(SharpnessAware(dropout_net(), MSAM(4), cross_entropy, same_noise=True))
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[2], seen[3])
    assert not torch.equal(seen[0], seen[2])


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
