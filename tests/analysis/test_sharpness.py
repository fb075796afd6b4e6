"""Sharpness: closed forms, slow twins, and that the model is left as it is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bisam import (
    ASAM,
    L2,
    SAM,
    Adaptive,
    Evaluation,
    ModelOracle,
    NegLog,
    Only,
    Query,
    SharpnessAware,
    Vector,
    cross_entropy,
)
from bisam.analysis import Normalized, average_sharpness, sharpness
from bisam.analysis.ascent import checkpoints
from bisam.analysis.balls import ball_of
from bisam.perturbations import Friendly, LossEquated, NormLayers
from tests.support import cases
from tests.support.cases import everything
from tests.support.doubles import ROWS, Quadratic

DATA = [cases.batch(seed) for seed in range(3)]


class Bowl(Quadratic):
    """A quadratic whose answers are those of its training loss."""

    def __init__(self, *w: float) -> None:
        super().__init__(*w)
        self.loss = cross_entropy  # never called: the answers are those of the training loss

    def ask(self, queries: Sequence[Query]) -> list[Evaluation]:
        return [replace(answer, objective=queries[i].objective) for i, answer in enumerate(super().ask(queries))]


def quadratic_maximum(a: Tensor, d: Tensor, rho: float) -> float:
    """The largest sum of a_i ((d_i + e_i)^2 - d_i^2) / 2 over ||e|| <= rho, by the secular equation of the boundary."""
    low, high = float(a.max()) + 1e-15, float(a.max()) + float((a * d).norm()) / rho + 1.0
    for _ in range(200):  # e = a d / (lam - a), whose length falls with lam
        lam = (low + high) / 2
        low, high = (lam, high) if float((a * d / (lam - a)).norm()) > rho else (low, lam)
    e = a * d / (lam - a)
    return float((a * ((d + e) ** 2 - d**2) / 2).sum())


@pytest.mark.parametrize("rho", [0.05, 0.5, 3.0])
def test_the_maximum_of_a_quadratic(rho):
    oracle, a = Bowl(0.3, -1.2), ROWS.mean(0)
    exact = quadratic_maximum(a, torch.tensor([0.3, -1.2]).double() - 1, rho)
    found = sharpness(oracle, [(ROWS,)], rho, steps=100, mode=None)
    assert found.rise == pytest.approx(exact, rel=1e-7)
    assert found.rise <= exact * (1 + 1e-12)
    assert sharpness(oracle, [(ROWS,)], rho, mode=None).rise < exact


@pytest.mark.parametrize("perturb", [L2(0.7), Adaptive(0.7), Adaptive(0.7, eta=0.1)], ids=cases.named)
def test_the_maximum_of_logistic_regression(perturb):
    """With one example the loss is monotonic in w x, so that the first step is exact."""
    torch.manual_seed(0)
    model, x = nn.Linear(5, 1, bias=False).double(), torch.randn(1, 5).double()
    oracle = ModelOracle(model, lambda z, _: F.softplus(-z[:, 0]))
    w = model.weight.detach()
    scale = torch.ones_like(w) if isinstance(perturb, L2) else w.abs() + perturb.eta
    exact = F.softplus(-(w @ x.T) + 0.7 * (scale * x).norm()) - F.softplus(-(w @ x.T))
    for steps in (1, 2, 25):
        found = sharpness(oracle, [(x, torch.zeros(1))], perturb, steps=steps)
        assert found.rise == pytest.approx(float(exact), rel=1e-12)
    assert found.loss == pytest.approx(float(F.softplus(-(w @ x.T))), rel=1e-12)
    assert found.rho == 0.7


def test_the_mean_of_a_quadratic_over_the_sphere():
    oracle, rho = Bowl(0.3, -1.2), 0.5
    found = average_sharpness(oracle, [(ROWS,)], rho, draws=4000, mode=None)
    exact = rho**2 / 2 * float(ROWS.mean(0).mean())  # the linear term has the mean 0
    assert abs(found.rise - exact) < 4 * found.std / math.sqrt(4000)


@pytest.mark.parametrize(
    "perturb", [L2(0.3), Adaptive(0.3, eta=0.1), Only(cases.is_weight, Adaptive(0.3))], ids=cases.named
)
def test_one_step_is_that_of_the_method(perturb):
    """The rise under the displacement that training would use, from the public methods."""
    model = cases.mlp()
    batch = DATA[0]
    sharp = SharpnessAware(model, SAM(perturb), cross_entropy)
    found = sharpness(sharp, [batch], perturb, mode="train")
    assert found.rise == pytest.approx(float(sharp(*batch).detach()) - float(sharp.clean.value), rel=1e-12)


def test_more_steps_and_restarts_find_no_less():
    oracle = ModelOracle(cases.mlp(), cross_entropy)
    rises = [sharpness(oracle, DATA, 1.5, steps=k, mode="train").rise for k in (1, 4, 16)]
    more = sharpness(oracle, DATA, 1.5, steps=16, restarts=2, mode="train")
    assert rises[0] < rises[1] < rises[2] <= more.rise
    assert list(more.trace) == sorted(more.trace)
    assert len(more.trace) == 17
    assert more.std > 0


def test_groups_of_examples_have_a_ball_each():
    model = cases.mlp()
    oracle = ModelOracle(model, cross_entropy)
    parts = [(x[i : i + 3], y[i : i + 3]) for x, y in DATA for i in range(0, 8, 3)]
    each = [sharpness(oracle, [part], 0.3).rise for part in parts]
    assert sharpness(oracle, DATA, 0.3, m=3).rise == pytest.approx(fmean(each), rel=1e-12)
    assert sharpness(oracle, DATA, 0.3).rise < fmean(each)


def test_the_mean_is_over_examples_and_not_over_batches():
    oracle, (x, y) = ModelOracle(cases.mlp(), cross_entropy), DATA[0]
    whole, parts = (
        sharpness(oracle, [(x, y)], 0.3, steps=3),
        sharpness(oracle, [(x[:5], y[:5]), (x[5:], y[5:])], 0.3, steps=3),
    )
    assert parts.rise == pytest.approx(whole.rise, rel=1e-12)
    assert parts.loss == pytest.approx(whole.loss, rel=1e-12)


def test_normalised_sharpness_does_not_depend_on_the_scale_of_the_logits():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    x, y = torch.randn(16, 4).double(), torch.randint(3, (16,))

    def measured(scale: float, normalized: bool) -> float:
        loss = ModelOracle(model, cross_entropy, forward=lambda m, x, y: (m(x) * scale, y))
        return sharpness(loss, [(x, y)], 0.2, steps=5, normalized=normalized).rise

    assert measured(7.0, True) == pytest.approx(measured(1.0, True), rel=1e-9)
    assert measured(7.0, False) > 2 * measured(1.0, False)


def test_a_normalised_objective_by_its_formula():
    z, y = torch.randn(6, 4).double(), torch.randint(4, (6,))
    divided = z / ((z - z.mean(1, keepdim=True)) ** 2).mean(1, keepdim=True).sqrt()
    torch.testing.assert_close(Normalized(NegLog())(z, y), NegLog()(divided, y))


@pytest.mark.parametrize("outputs", [torch.zeros(4, 1), torch.zeros(4), {"logits": torch.zeros(4, 2)}], ids=cases.named)
def test_outputs_of_one_class_cannot_be_normalised(outputs):
    with pytest.raises(ValueError, match="K >= 2 classes, got"):
        Normalized(NegLog())(outputs, torch.zeros(4, dtype=torch.long))


@pytest.mark.parametrize("mode", ["eval", "train", None])
@pytest.mark.parametrize("measure", [sharpness, average_sharpness])
def test_the_model_is_left_as_it_is(measure, mode):
    model = cases.normed()
    model[1].train(False)  # a mode of its own
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    modes = [module.training for module in model.modules()]
    before, random = everything(model), torch.get_rng_state()
    measure(ModelOracle(model, cross_entropy), DATA, 0.3, mode=mode)
    assert everything(model) == before
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)


def test_the_modes_differ_and_dropout_is_that_of_the_seed():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 3)).double()
    oracle = ModelOracle(model, cross_entropy)
    x, y = torch.randn(32, 4).double(), torch.randint(3, (32,))

    def loss(**how) -> float:
        return sharpness(oracle, [(x, y)], 0.1, steps=2, **how).rise

    assert loss(mode="train", seed=1) == loss(mode="train", seed=1) != loss(mode="train", seed=2)
    assert loss(mode="eval", seed=1) == loss(mode="eval", seed=2) != loss(mode="train", seed=1)


@pytest.mark.parametrize(("steps", "restarts"), [(1, 0), (5, 0), (3, 2)])
def test_the_passes_are_counted(steps, restarts):
    model, seen, calls = cases.mlp(), [], []
    model.register_forward_hook(lambda *_: calls.append(1))
    found = sharpness(
        ModelOracle(model, cross_entropy), DATA, steps=steps, restarts=restarts, progress=lambda *now: seen.append(now)
    )
    assert len(calls) == len(DATA) * (1 + (steps + 1) * (restarts + 1))
    assert found.forward == pytest.approx(len(calls) / len(DATA))
    assert found.backward == pytest.approx(steps * (restarts + 1))
    assert seen[-1] == (len(calls) * 8, len(calls) * 8)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


def test_a_loss_of_a_training_loop_and_a_loader_are_taken(tmp_path):
    model = cases.mlp()
    sharp = SharpnessAware(model, ASAM(0.5), cross_entropy)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*cases.batch(0, 20)), batch_size=8)
    found = sharpness(sharp, loader, 0.1, NegLog(), steps=2)
    assert found == sharpness(ModelOracle(model, cross_entropy), list(loader), L2(0.1), NegLog(), steps=2)
    assert found.examples == 20
    assert found.to_dict()["ascent"] == repr(NegLog())
    assert found.to_dict()["trace"] == list(found.trace)


def test_a_norm_layer_is_displaced_alone():
    model = cases.normed()
    ball = ball_of(NormLayers(L2(0.5)), ModelOracle(model, cross_entropy))
    displaced = [bool(t.any()) for t in ball.on_the_boundary(torch.Generator().manual_seed(0))]
    assert displaced == [cases.is_norm(name, p) for name, p in model.named_parameters()]
    assert float(ball.on_the_boundary(torch.Generator().manual_seed(0)).norm()) == pytest.approx(0.5)


def test_points_outside_are_projected():
    ball = ball_of(L2(0.5), Quadratic(0.0, 0.0))
    outside, inside = Vector([torch.tensor([3.0, 4.0])]), Vector([torch.tensor([0.3, 0.0])])
    torch.testing.assert_close(ball.inside(outside).tensors[0], torch.tensor([0.3, 0.4]))
    assert torch.equal(ball.inside(inside).tensors[0], inside.tensors[0])


def test_checkpoints_are_those_of_the_paper():
    assert checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert checkpoints(1) == [1]


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([float("nan")]))

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :1] * self.w.expand(4)


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"data": []}, ValueError, "no batches: a generator can be read once"),
        ({"data": (b for b in ())}, ValueError, "no batches"),
        ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
        ({"restarts": -1}, ValueError, "restarts must be at least 0"),
        ({"mode": "test"}, ValueError, "mode must be 'eval', 'train' or None"),
        ({"m": 9}, ValueError, "m=9 is more than the 8 examples of a batch"),
        ({"m": 0}, ValueError, "m must be at least 1"),
        ({"perturb": Friendly(0.1)}, TypeError, "perturb must be a ball: .*, got Friendly"),
        ({"perturb": LossEquated()}, TypeError, "got LossEquated"),
        ({"perturb": -1.0}, ValueError, "rho"),
        ({"perturb": "big"}, TypeError, "perturb must be a radius"),
        ({"ascent": 3}, TypeError, r"ascent must be an objective such as NegLog\(\), got 3"),
        (
            {"source": nn.Linear(1, 1)},
            TypeError,
            r"must be the loss SharpnessAware\(model, ...\) or an oracle .*, got L",
        ),
        ({"source": Bowl(1.0)}, ValueError, "mode='eval' needs a ModelOracle"),
        ({"source": ModelOracle(Broken(), cross_entropy)}, ValueError, "loss of batch 0 is nan at the weights"),
    ],
    ids=cases.named,
)
def test_bad_input_is_one_line(arguments, error, said):
    given = {"source": ModelOracle(cases.mlp(), cross_entropy), "data": DATA, **arguments}
    with pytest.raises(error, match=said) as raised:
        sharpness(given.pop("source"), given.pop("data"), **given)
    assert "\n" not in str(raised.value)
