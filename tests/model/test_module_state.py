"""Buffers move once per step, in the pass at the weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bisam import MSAM, SAM, ModelOracle, SharpnessAware, cross_entropy
from bisam.perturbations import L2
from tests.support import cases
from tests.support.cases import BASIC, buffers, everything, normed, parameters
from tests.support.doubles import ActingLoss, throw
from tests.support.runs import each_basic_method, twins


class Replacing(nn.Module):
    """Running statistics that are a new tensor each time."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4).double()
        self.register_buffer("average", torch.zeros(4).double())

    def forward(self, x: Tensor) -> Tensor:
        out = self.linear(x)
        self.average = 0.9 * self.average + 0.1 * out.detach().mean(0)
        return out


class Instance(nn.InstanceNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[:, :, None].expand(-1, -1, 3) * torch.arange(3).double()).sum(2)


WITH_BUFFERS = {
    "BatchNorm": normed,
    "BatchNorm(momentum=None)": lambda: cases.mlp(lambda n: nn.BatchNorm1d(n, momentum=None)),
    "BatchNorm.eval()": lambda: cases.mlp(lambda n: nn.BatchNorm1d(n).eval()),
    "BatchNorm, another in eval()": lambda: nn.Sequential(nn.BatchNorm1d(6).double().eval(), *normed()),
    "InstanceNorm": lambda: cases.mlp(lambda n: Instance(n, track_running_stats=True)),
    "convnet": cases.convnet,
    "spectral_norm": lambda: nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Linear(6, 5).double()), nn.Linear(5, 4).double()
    ),
    "old spectral_norm": lambda: nn.Sequential(
        nn.utils.spectral_norm(nn.Linear(6, 5).double()), nn.Linear(5, 4).double()
    ),
    "replaced by assignment": Replacing,
}


@pytest.mark.parametrize("method", BASIC[:3], ids=["SAM", "BiSAM", "ASAM"])
@pytest.mark.parametrize("make", WITH_BUFFERS.values(), ids=WITH_BUFFERS)
def test_buffers_are_those_of_a_plain_loop(make, method):
    model, plain = twins(make)
    sharp = SharpnessAware(model, method, cross_entropy)
    start = buffers(model)
    for step in range(3):
        sharp(*cases.batch(step))
        plain(cases.batch(step)[0])
        assert buffers(model) == buffers(plain)
    assert (buffers(model) != start) == (make is not WITH_BUFFERS["BatchNorm.eval()"])
    assert parameters(model) == parameters(plain)


@pytest.mark.parametrize("query", [1, 2])
@pytest.mark.parametrize("make", WITH_BUFFERS.values(), ids=WITH_BUFFERS)
def test_buffers_are_as_before_a_failed_call(make, query):
    model = make()
    loss = ActingLoss(query, lambda losses: throw(RuntimeError("boom"))())
    owners = {name: b.data_ptr() for name, b in model.named_buffers()}
    before = everything(model)
    with pytest.raises(RuntimeError, match="boom"):
        SharpnessAware(model, SAM(L2(0.5)), loss)(*cases.batch())
    assert everything(model) == before
    assert {name: b.data_ptr() for name, b in model.named_buffers()} == owners


@each_basic_method
def test_batches_are_counted_once(method):
    model = normed()
    sharp = SharpnessAware(model, method, cross_entropy)
    for step in range(1, 4):
        sharp(*cases.batch(step))
        assert model[1].num_batches_tracked == step * (3 if isinstance(method, MSAM) else 1)


def test_msam_moves_buffers_as_a_plain_loop_over_the_micro_batches():
    model, plain = twins(normed)
    SharpnessAware(model, MSAM(3, SAM(L2(0.5))), cross_entropy)(*cases.batch())
    for x in cases.batch()[0].split(3):
        plain(x)
    assert buffers(model) == buffers(plain)


def test_track_overrides_which_query_moves_buffers():
    model = normed()
    oracle = ModelOracle(model, cross_entropy)
    before = buffers(model)
    g = oracle.query(cases.batch(), track=False).gradient
    assert buffers(model) == before
    oracle.query(cases.batch(), at=g, track=True)
    assert buffers(model) != before


def test_an_oracle_shows_the_buffers_as_they_are_now():
    model = cases.convnet()
    oracle = ModelOracle(model, cross_entropy)
    oracle.query(cases.batch())
    assert [b is c for b, c in zip(oracle.buffers, model.buffers(), strict=True)] == [True] * 6


def test_buffers_of_a_loss_module_are_treated_alike():
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros((), dtype=torch.long))

        def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
            self.calls += 1
            return cross_entropy(outputs, targets)

    sharp = SharpnessAware(cases.mlp(), SAM(), Counting())
    sharp(*cases.batch())
    assert sharp.loss.calls == 1
