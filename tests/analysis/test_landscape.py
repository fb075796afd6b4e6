"""Landscapes: against losses of models whose weights are moved by hand."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bisam import ModelOracle, NegLog, Vector, cross_entropy
from bisam.analysis import landscape
from bisam.objectives import CrossEntropy
from tests.support import cases
from tests.support.cases import everything

DATA = [cases.batch(0, 16), cases.batch(1, 8)]


def moved(model: nn.Module, steps: list[torch.Tensor]) -> tuple[float, float]:
    """Loss and error with the weights moved by these steps."""
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for p, step in zip(copied.parameters(), steps, strict=True):
            p += step
        x, y = (torch.cat(parts) for parts in zip(*DATA, strict=True))
        z = copied(x)
    return float(F.cross_entropy(z, y)), float((z.argmax(1) != y).double().mean())


def test_a_plane_is_that_of_models_moved_by_hand():
    model = cases.mlp()
    a, b = (Vector([torch.randn_like(p) for p in model.parameters()]) for _ in range(2))
    found = landscape(ModelOracle(model, cross_entropy), DATA, (a, b), extent=0.4, points=4)
    assert found.xs == found.ys == pytest.approx((-0.4, -0.4 / 3, 0.4 / 3, 0.4))
    for j, y in enumerate(found.ys):
        for i, x in enumerate(found.xs):
            loss, error = moved(model, [x * s + y * t for s, t in zip(a, b, strict=True)])
            assert found.loss[j][i] == pytest.approx(loss, rel=1e-12)
            assert found.error[j][i] == pytest.approx(error)
    assert found.examples == 24
    json.dumps(found.to_dict(), allow_nan=False)


def test_a_random_direction_has_the_norms_of_the_filters():
    model = cases.convnet()
    parameters = list(model.parameters())
    oracle = ModelOracle(model, cross_entropy)
    seen: list[Vector] = []
    ask = oracle.ask

    def recording(queries):
        seen.extend(query.at for query in queries if query.at is not None)
        return ask(queries)

    oracle.ask = recording

    landscape(oracle, DATA, points=3, extent=2.0)
    for t, p in zip(seen[-1], parameters, strict=True):
        if p.dim() < 2:
            assert not t.any()
        else:
            torch.testing.assert_close(t.flatten(1).norm(dim=1), 2 * p.detach().flatten(1).norm(dim=1))


def test_the_direction_of_an_objective_is_its_gradient():
    model = cases.mlp()
    x, y = (torch.cat(parts) for parts in zip(*DATA, strict=True))
    grads = torch.autograd.grad(NegLog()(model(x), y).mean(), list(model.parameters()))
    norm = torch.cat([g.flatten() for g in grads]).norm()
    found = landscape(ModelOracle(model, cross_entropy), DATA, NegLog(), extent=0.3, points=3)
    expected = [moved(model, [d * g / norm for g in grads])[0] for d in (-0.3, 0.0, 0.3)]
    assert list(found.loss[0]) == pytest.approx(expected, rel=1e-10)
    assert found.along == ("the gradient of NegLog",)


def test_outputs_without_classes_have_a_loss_and_no_error():
    model = cases.mlp()
    oracle = ModelOracle(model, nn.MSELoss(), forward=lambda m, x, y: (m(x)[:, 0], y.double()))
    found = landscape(oracle, DATA, points=3)
    assert found.error == ()
    assert len(found.loss[0]) == 3


def test_the_error_ignores_the_label_that_the_loss_ignores():
    x, y = DATA[0]
    model, ignored = cases.mlp(), torch.where(torch.arange(len(y)) < 5, 255, y)
    found = landscape(ModelOracle(model, CrossEntropy(255)), [(x, ignored)], points=3)
    wrong = model(x[5:]).argmax(1) != y[5:]
    assert found.error[0][1] == pytest.approx(float(wrong.double().mean()), rel=1e-12)


def test_a_loss_that_is_infinite_far_away_is_none_in_json():
    model = nn.Linear(6, 4).double()
    huge = Vector([torch.full_like(p, 1e308) for p in model.parameters()])
    found = landscape(ModelOracle(model, cross_entropy), DATA, huge, points=3)
    assert None in found.to_dict()["loss"][0]


def test_the_model_is_left_as_it_is():
    model = cases.normed()
    before = everything(model)
    landscape(ModelOracle(model, cross_entropy), DATA, ("random", cross_entropy), points=3, mode="train")
    assert everything(model) == before


@pytest.mark.parametrize(
    ("how", "error", "said"),
    [
        ({"points": 1}, ValueError, "points must be at least 2"),
        ({"extent": 0.0}, ValueError, "extent"),
        ({"along": ()}, ValueError, "along must be one direction or two, got 0"),
        ({"along": 3}, TypeError, "a direction must be 'random', an objective"),
        ({"along": Vector([torch.zeros(2)])}, ValueError, "a direction has 1 tensors, and the model 4 trainable"),
    ],
    ids=cases.named,
)
def test_bad_input_is_one_line(how, error, said):
    with pytest.raises(error, match=said) as raised:
        landscape(ModelOracle(cases.mlp(), cross_entropy), DATA, **how)
    assert "\n" not in str(raised.value)
