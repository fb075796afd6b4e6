"""Exact numbers of the field's implementations (float64), and what any implementation must satisfy."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from bisam import ASAM, SAM, NegLog, SharpnessAware, Tanh
from bisam.perturbations import L2, Adaptive

A = torch.tensor([1.0, 4.0, 9.0], dtype=torch.double)
W0 = (1.0, -2.0, 0.5)


class Quadratic(nn.Module):
    """f(w) = sum_i a_i w_i^2 / 2, whatever the input."""

    def __init__(self, name: str = "weight") -> None:
        super().__init__()
        self.register_parameter(name, nn.Parameter(torch.tensor(W0, dtype=torch.double)))

    def forward(self, x):
        (w,) = self.parameters()
        return (A * w**2).sum() / 2 + 0 * x


def value(outputs, targets):
    return outputs


@pytest.mark.parametrize(
    ("method", "optimizer", "expected"),
    [
        (
            SAM(L2(0.05)),
            {"lr": 0.1},
            [(0.899458469639, -1.182671028446, 0.028068020377), (0.808579972028, -0.689981586205, 0.000449394423)],
        ),
        (
            SAM(L2(0.05)),
            {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01},
            [
                (0.898458469639, -1.180671028446, 0.027568020377),
                (0.715393572846, 0.049795625591, -0.424778938038),
                (0.477461940489, 1.136224668333, -0.404991043586),
            ],
        ),
        (
            ASAM(0.5, 0.0),
            {"lr": 0.1},
            [(0.896911358059, -0.804653831569, 0.018727500349), (0.793917529259, -0.329104910565, 0.001862941244)],
        ),
    ],
)
def test_steps_on_a_quadratic(method, optimizer, expected):
    model = Quadratic()
    sharp = SharpnessAware(model, method, loss=value)
    optimizer = torch.optim.SGD(model.parameters(), **optimizer)
    for row in expected:
        optimizer.zero_grad()
        sharp(torch.zeros(()), None).backward()
        optimizer.step()
        torch.testing.assert_close(model.weight.detach(), torch.tensor(row, dtype=torch.double), rtol=0, atol=1e-11)


def test_official_asam_leaves_a_bias_to_sam():
    model = Quadratic("bias")
    method = SAM(Adaptive(0.5, eta=0.01, where=lambda name, w: "weight" in name))
    SharpnessAware(model, method, loss=value)(torch.zeros(()), None).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    expected = torch.tensor([0.894584696389, -1.026710284456, -0.169319796235], dtype=torch.double)
    torch.testing.assert_close(model.bias.detach(), expected, rtol=0, atol=1e-11)


Z = torch.tensor([[2.0, 1.0, 0.0], [0.5, -1.0, 3.0]], dtype=torch.double)
Y = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("bound", "expected"),
    [
        (Tanh(10.0, 0.1), (0.410808989367, 3.914228034965)),
        (Tanh(1.0, 0.1), (1.002842802244, 1.287233272935)),
        (NegLog(1.0), (0.517492375165, 1.722815060098)),
        (NegLog(5.0), (0.025293480565, 5.05880848945)),
    ],
)
def test_the_authors_values(bound, expected):
    """Their code leaves out the factor 1/mu of the paper."""
    ours = bound.mu * bound(Z, Y)
    torch.testing.assert_close(ours, torch.tensor(expected, dtype=torch.double), rtol=0, atol=2e-8)


@pytest.mark.parametrize("mu", [1.0, 3.0, 10.0])
@pytest.mark.parametrize("bound", [NegLog, Tanh])
def test_equal_logits_give_log_k_over_mu(bound, mu):
    q = bound(mu)(torch.full((2, 3), 7.0, dtype=torch.double), Y)
    torch.testing.assert_close(q, torch.full((2,), math.log(3) / mu, dtype=torch.double))


def test_phi_of_the_log_bound():
    phi = NegLog().phi
    x = torch.tensor([0.0, math.inf, -20.0], dtype=torch.double)
    expected = torch.tensor([0.0, 1.0, -19.541325], dtype=torch.double)
    torch.testing.assert_close(phi(x), expected, rtol=0, atol=1e-6)
