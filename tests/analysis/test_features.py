"""Feature rank and gradient norm: against numpy on dense matrices, per-example gradients and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bisam import SAM, ModelOracle, SharpnessAware, cross_entropy
from bisam.analysis import feature_rank, gradient_norm
from bisam.analysis.features import Centred
from bisam.objectives import CrossEntropy
from tests.analysis.test_predictions import Table
from tests.analysis.test_sharpness import Bowl, Broken
from tests.support import cases
from tests.support.cases import everything
from tests.support.doubles import ROWS

DATA = [cases.batch(seed, n) for seed, n in enumerate((20, 13, 20))]


def dense(features: Tensor) -> np.ndarray:
    """The singular values of the centred features, by numpy."""
    matrix = features.double().numpy()
    return np.linalg.svd(matrix - matrix.mean(0), compute_uv=False)


def net(width: int = 40) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 9), nn.Tanh(), nn.Linear(9, 4)).double()


@pytest.mark.parametrize("at", [None, "0", "2", "3", "4"])
def test_the_ranks_are_those_of_numpy(at):
    model = net()
    found = feature_rank(ModelOracle(model, cross_entropy), DATA, at)
    layer = 4 if at is None else int(at)
    values = dense(model[:layer](torch.cat([x for x, _ in DATA])).detach())
    np.testing.assert_allclose(found.values, values, rtol=1e-9, atol=1e-12 * values[0])
    squares, shares = values**2, values[values > 0] / values.sum()
    assert found.stable == pytest.approx(squares.sum() / squares[0], rel=1e-10)
    assert found.effective == pytest.approx(math.exp(-(shares * np.log(shares)).sum()), rel=1e-9)
    cumulated = np.cumsum(squares) / squares.sum()
    assert cumulated[found.components - 1] >= 0.99 > (cumulated[found.components - 2] if found.components > 1 else 0)
    assert (found.at, found.rows, found.dimensions, found.examples) == (str(layer), 53, len(values), 53)
    assert found.forward == pytest.approx(1)


@pytest.mark.parametrize(("n", "d"), [(500, 5), (7, 30), (31, 30), (1, 4)])
def test_rows_in_any_order_and_number_give_the_singular_values(n, d):
    """Also small ones beside a large mean, which a sum of squares would lose."""
    torch.manual_seed(0)
    x = torch.randn(n, d).double() * torch.logspace(0, -9, d).double() + 100
    matrix = Centred()
    for part in x.split(11):
        matrix.add(part)
    assert (matrix.rows, matrix.columns) == (n, d)
    assert sum(map(len, matrix._kept)) <= max(3 * (d + 1), 11) + 11
    np.testing.assert_allclose(matrix.singular_values(), dense(x), rtol=1e-4, atol=1e-12)
    assert matrix.variance == pytest.approx(float(x.var(0, correction=0).sum()), rel=1e-9)


def test_a_matrix_of_known_rank_and_one_without_variance():
    """With three orthogonal directions of equal strength all ranks are 3."""
    directions = torch.linalg.qr(torch.randn(6, 3, generator=torch.Generator().manual_seed(0)).double()).Q
    signs = torch.tensor([[1, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0], [0, 0, 1], [0, 0, -1]]).double()
    oracle = ModelOracle(nn.Linear(6, 4).double(), cross_entropy)
    labels = torch.zeros(6, dtype=torch.int64)
    found = feature_rank(oracle, [(signs @ directions.T + 5, labels)])
    assert found.components == 3
    assert (found.stable, found.effective) == (pytest.approx(3), pytest.approx(3, rel=1e-6))
    assert feature_rank(oracle, [(signs @ directions.T, labels)], explained=0.5).components == 2
    same = feature_rank(oracle, [(torch.full((6, 6), 0.1).double(), labels)])
    assert (same.components, same.stable, same.effective, same.values) == (0, 0, 0, (0,) * 6)


class Sequences(nn.Module):
    """Logits (N, K, T) of a linear layer on positions (N, T, d), which is not the last one that is defined."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 4)
        self.convolution = nn.Conv1d(6, 6, 1)
        self.first = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.convolution(self.first(x).mT).mT).mT


def test_positions_are_rows_of_a_linear_layer():
    torch.manual_seed(0)
    model = Sequences().double()
    x, y = torch.randn(5, 3, 6).double(), torch.randint(4, (5, 3))
    oracle = ModelOracle(model, cross_entropy)
    found = feature_rank(oracle, [(x[:2], y[:2]), (x[2:], y[2:])])
    hidden = model.first(x).detach()
    np.testing.assert_allclose(found.values, dense(model.convolution(hidden.mT).mT.flatten(0, 1).detach()), rtol=1e-9)
    assert (found.at, found.rows, found.dimensions) == ("head", 15, 6)
    flat = feature_rank(oracle, [(x, y)], "convolution")
    np.testing.assert_allclose(flat.values[:4], dense(hidden.mT.flatten(1))[:4], rtol=1e-9)
    assert (flat.rows, flat.dimensions, len(flat.values)) == (5, 18, 5)


def per_example(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The gradients of all examples (N, P)."""
    rows = []
    for i in range(len(x)):
        grads = torch.autograd.grad(cross_entropy(model(x[i : i + 1]), y[i : i + 1]).sum(), list(model.parameters()))
        rows.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(rows)


def test_the_norms_are_those_of_per_example_gradients():
    model = cases.mlp().eval()
    model[-1].bias.data[0] += 3  # a gradient that exceeds its noise
    found = gradient_norm(ModelOracle(model, cross_entropy), DATA)
    each = [per_example(model, x, y).mean(0) for x, y in DATA]
    whole = per_example(model, *(torch.cat(parts) for parts in zip(*DATA, strict=True))).mean(0)
    norms = [float(g.norm()) for g in each]
    assert found.norms == pytest.approx(norms, rel=1e-12)
    assert found.norm == pytest.approx(float(whole.norm()), rel=1e-12)
    sizes = [len(y) for _, y in DATA]
    assert found.mean == pytest.approx(np.average(norms, weights=sizes), rel=1e-12)
    assert found.std == pytest.approx(math.sqrt(1.5 * np.cov(norms, aweights=sizes, ddof=0)), rel=1e-10)
    equal = gradient_norm(ModelOracle(model, cross_entropy), [DATA[0], DATA[2]])
    assert (equal.mean, equal.std) == (pytest.approx(np.mean(equal.norms)), pytest.approx(np.std(equal.norms, ddof=1)))
    between = sum(len(y) * float((g - whole).square().sum()) for g, (_, y) in zip(each, DATA, strict=True)) / 2
    assert found.noise == pytest.approx(between, rel=1e-10)
    assert found.noise_scale == pytest.approx(between / (float(whole.square().sum()) - between / 53), rel=1e-9)
    assert (found.forward, found.backward, found.examples) == (pytest.approx(1), pytest.approx(1), 53)


def test_the_noise_is_that_of_single_examples():
    """Means over random orders of the same examples in batches of unequal size, against the exact covariance."""
    model = cases.mlp().eval()
    x, y = cases.batch(5, 60)
    gradients = per_example(model, x, y)
    trace = float(gradients.var(0, correction=1).sum())
    random, noises = torch.Generator().manual_seed(0), []
    for _ in range(60):
        order = torch.randperm(60, generator=random)
        parts = order.split([4, 10, 6, 12, 8, 20])
        noises.append(gradient_norm(ModelOracle(model, cross_entropy), [(x[i], y[i]) for i in parts]).noise)
    assert abs(np.mean(noises) - trace) < 4 * np.std(noises) / math.sqrt(60)
    assert np.std(noises) / math.sqrt(60) < 0.1 * trace
    single = gradient_norm(ModelOracle(model, cross_entropy), [(x[i : i + 1], y[i : i + 1]) for i in range(60)])
    assert single.noise == pytest.approx(trace, rel=1e-10)


def test_the_noise_scale_is_given_only_where_it_can_be_estimated():
    model = cases.mlp().eval()
    oracle = ModelOracle(model, cross_entropy)
    assert gradient_norm(oracle, DATA[:1]).noise is None
    assert gradient_norm(oracle, DATA[:1]).std == 0
    assert gradient_norm(oracle, DATA, mode="train").noise is None
    x, y = DATA[0]
    opposite = [(torch.zeros_like(x), torch.zeros_like(y)), (torch.zeros_like(x), torch.ones_like(y))]
    lopsided = nn.Linear(6, 2).double()
    for p in lopsided.parameters():
        p.data.zero_()
    found = gradient_norm(ModelOracle(lopsided, cross_entropy), opposite)
    assert found.norm == pytest.approx(0, abs=1e-12)  # two opposite gradients: the norm of their mean is noise
    assert found.noise > 1
    assert found.noise_scale is None


def test_the_gradient_of_a_quadratic_and_of_batches_without_labels():
    oracle = Bowl(0.3, -1.2)
    found = gradient_norm(oracle, [(ROWS[:1],), (ROWS[1:],)], mode=None)
    exact = (ROWS.mean(0) * (torch.tensor([0.3, -1.2], dtype=torch.double) - 1)).norm()
    assert found.norm == pytest.approx(float(exact), rel=1e-12)
    x, y = DATA[0]
    loss, model = CrossEntropy(ignore_index=3), cases.mlp().eval()
    one = gradient_norm(ModelOracle(model, loss), [(x, y), (x, torch.full_like(y, 3))])
    two = gradient_norm(ModelOracle(model, loss), [(x, y)])
    assert (one.norm, one.norms, one.examples) == (pytest.approx(two.norm, rel=1e-12), two.norms, two.examples)
    with pytest.raises(ValueError, match="no loss counts"):
        gradient_norm(ModelOracle(model, loss), [(x, torch.full_like(y, 3))])


@pytest.mark.parametrize("measure", [feature_rank, gradient_norm])
def test_the_model_is_left_as_it_is(measure):
    model = cases.normed()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    sharp = SharpnessAware(model, SAM(0.05), cross_entropy)
    before, random = everything(model), torch.get_rng_state()
    for mode in ("eval", "train", None):
        measure(sharp, DATA, mode=mode)
        assert everything(model) == before
    assert model.training
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(module._forward_hooks for module in model.modules())
    broken = [(x, y + 9) for x, y in DATA]
    with pytest.raises(ValueError, match="label"):
        measure(sharp, broken)
    assert everything(model) == before
    assert not any(module._forward_hooks for module in model.modules())
    seen: list[tuple[int, int]] = []
    measure(sharp, DATA, progress=lambda *now: seen.append(now))
    assert seen == [(20, 53), (33, 53), (53, 53)]


class Changing(nn.Module):
    """Calls another layer last for each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.calls = nn.ModuleList([nn.Linear(6, 4) for _ in range(3)]).double(), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layers[self.calls % 2](x)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"at": "layer4"}, "the model has no module 'layer4'; it has '0', '1', '2'"),
        ({"at": "22"}, "the model has no module '22'; it has '2'"),
        ({"explained": 0.0}, r"explained must be in \(0, 1\]"),
        ({"explained": 2}, r"explained must be in \(0, 1\]"),
        ({"data": []}, "no batches"),
        ({"source": ModelOracle(Table().double(), cross_entropy)}, "the model has no linear layer: name the layer"),
        ({"source": ModelOracle(Changing(), cross_entropy)}, r"is 'layers.\d' in one batch and 'layers.\d' in another"),
        (
            {"source": ModelOracle(Changing(), cross_entropy), "at": "layers.2"},
            "called not 'layers.2': name a layer that it calls",
        ),
        ({"source": Bowl(1.0), "mode": None}, "features are those of a torch module"),
        ({"source": ModelOracle(Broken(), cross_entropy), "at": ""}, "loss of batch 0 is nan at the weights"),
    ],
    ids=cases.named,
)
def test_bad_input_is_one_line(arguments, said):
    given = {"source": ModelOracle(cases.mlp(), cross_entropy), "data": DATA, **arguments}
    with pytest.raises(ValueError, match=said) as raised:
        feature_rank(given.pop("source"), given.pop("data"), **given)
    assert "\n" not in str(raised.value)


def test_features_that_are_no_matrix_are_refused():
    matrix = Centred()
    matrix.add(torch.ones(3, 4))
    with pytest.raises(ValueError, match="have 4 and 5 dimensions in two batches"):
        matrix.add(torch.ones(3, 5))
    with pytest.raises(ValueError, match="features are not finite"):
        matrix.add(torch.full((3, 4), math.inf))
    tokens = ModelOracle(nn.Embedding(9, 4), cross_entropy)
    with pytest.raises(ValueError, match="the first input of '' is no floating-point tensor, got Tensor"):
        feature_rank(tokens, [(torch.tensor([1, 2]), torch.tensor([0, 1]))], "")
