"""Margins and calibration: against loops written by hand, numpy and torchmetrics."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bisam import SAM, BiSAM, ModelOracle, SharpnessAware, cross_entropy
from bisam.analysis import Calibration, calibration, margins, zero_one_sharpness
from bisam.analysis.samples import Result
from bisam.objectives import CrossEntropy
from tests.analysis.test_sharpness import Broken
from tests.support import cases
from tests.support.cases import everything

DATA = [cases.batch(0, 40), cases.batch(1, 25)]


def outputs(model: nn.Module) -> tuple[Tensor, Tensor]:
    """The logits and labels of `DATA`, in eval mode."""
    x, y = (torch.cat(parts) for parts in zip(*DATA, strict=True))
    with torch.no_grad():
        return model.eval()(x), y


def margins_by_hand(logits: Tensor, labels: Tensor) -> list[float]:
    found = []
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        found.append(row[label] - max(value for k, value in enumerate(row) if k != label))
    return found


def test_margins_are_those_of_a_loop():
    model = cases.mlp()
    logits, labels = outputs(model)
    values = margins_by_hand(logits, labels)
    found = margins(ModelOracle(model, cross_entropy), DATA)
    assert found.mean == pytest.approx(np.mean(values), rel=1e-12)
    assert found.std == pytest.approx(np.std(values), rel=1e-12)
    np.testing.assert_allclose(found.quantiles, np.percentile(values, range(101)), rtol=1e-12)
    assert found.median == pytest.approx(np.median(values), rel=1e-12)
    assert found.error == sum(value <= 0 for value in values) / 65
    assert found.error == pytest.approx(zero_one_sharpness(ModelOracle(model, cross_entropy), DATA, 0.0).error)
    assert (found.ties, found.examples, found.normalized, found.at) == (0, 65, None, None)
    assert found.forward == pytest.approx(1)


class Table(nn.Module):
    """Logits that are read from the inputs, times a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, logits: Tensor) -> Tensor:
        return logits * self.scale


def test_ties_are_counted():
    logits = torch.tensor([[2.0, 2.0, 0.0], [2.0, 2.0, 0.0], [3.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
    labels = torch.tensor([0, 1, 0, 0])
    found = margins(ModelOracle(Table(), cross_entropy), [(logits, labels)])
    assert (found.error, found.ties, found.quantiles[0], found.quantiles[100]) == (0.75, 0.5, -1.0, 2.0)
    assert (logits.argmax(1) != labels).double().mean() == 0.5  # between error - ties and error
    equal = [(torch.full((2, 3), 5.0), labels[:2])]
    assert margins(ModelOracle(Table(), cross_entropy), equal, normalized="logits").quantiles == (0.0,) * 101


def test_margins_of_normalised_logits_do_not_depend_on_their_scale():
    model = cases.mlp()
    logits, labels = outputs(model)
    values = margins_by_hand(logits / logits.std(1, keepdim=True, correction=0), labels)
    found = margins(ModelOracle(model, cross_entropy), DATA, normalized="logits")
    np.testing.assert_allclose(found.quantiles, np.percentile(values, range(101)), rtol=1e-12)
    for p in model[-1].parameters():
        p.data *= 7
    again = margins(ModelOracle(model, cross_entropy), DATA, normalized="logits")
    np.testing.assert_allclose(again.quantiles, found.quantiles, rtol=1e-12)


def test_margins_normalised_by_features_are_distances_to_the_boundary():
    """Moving the features by the distance against the gradient of the margin makes a tie (Elsayed et al., 2018)."""
    model = cases.mlp()
    labels = outputs(model)[1].tolist()
    features, last = model[:2](torch.cat([x for x, _ in DATA])).detach(), model[2]
    spread = math.sqrt(features.var(0, correction=0).sum())
    values = []
    for feature, y in zip(features, labels, strict=True):
        x = feature.clone().requires_grad_()
        z = last(x)
        j = max(set(range(cases.CLASSES)) - {y}, key=z.tolist().__getitem__)
        (slope,) = torch.autograd.grad(z[y] - z[j], x)
        distance = (z[y] - z[j]).item() / slope.norm().item()
        moved = last(feature - distance * slope / slope.norm()).detach()
        assert float(moved[y] - moved[j]) == pytest.approx(0, abs=1e-12)
        values.append(distance / spread)
    found = margins(ModelOracle(model, cross_entropy), DATA, normalized="features")
    np.testing.assert_allclose(found.quantiles, np.percentile(values, range(101)), rtol=1e-9)
    assert found.at == "2"


def test_margins_normalised_by_features_do_not_depend_on_the_scale_of_a_layer():
    model = cases.mlp()
    model[1] = nn.ReLU()
    model[2].bias.data.zero_()
    one = margins(ModelOracle(model, cross_entropy), DATA, normalized="features")
    for layer, factor in ((0, 3), (2, 5)):
        for p in model[layer].parameters():
            p.data *= factor
    two = margins(ModelOracle(model, cross_entropy), DATA, normalized="features")
    np.testing.assert_allclose(two.quantiles, one.quantiles, rtol=1e-9)
    assert margins(ModelOracle(model, cross_entropy), DATA).std > 10 * one.std


def test_margins_by_features_are_refused_where_logits_come_from_elsewhere():
    model = nn.Sequential(cases.mlp(), nn.Tanh())
    with pytest.raises(ValueError, match=r"not the outputs of the last linear layer, '0.2'"):
        margins(ModelOracle(model, cross_entropy), DATA, normalized="features")
    with pytest.raises(ValueError, match="no linear layer"):
        margins(ModelOracle(Table().double(), cross_entropy), DATA, normalized="features")


def test_calibration_is_that_of_a_loop_and_of_torchmetrics():
    functional = pytest.importorskip("torchmetrics.functional.classification")
    pytest.importorskip("matplotlib").use("Agg")
    model = cases.mlp()
    for p in model.parameters():
        p.data *= 3  # confidences in all bins
    logits, labels = outputs(model)
    p = logits.softmax(1)
    for bins in (1, 4, 15):
        found = calibration(ModelOracle(model, cross_entropy), DATA, bins=bins)
        members: list[list[tuple[float, bool]]] = [[] for _ in range(bins)]
        for row, label in zip(p, labels, strict=True):
            confidence = float(row.max())
            members[int(confidence * bins)].append((confidence, bool(row.argmax() == label)))
        assert found.counts == tuple(map(len, members))
        means = [[np.mean([float(m[i]) for m in each]) if each else math.nan for each in members] for i in (0, 1)]
        for mine, exact in zip((found.confidences, found.accuracies), means, strict=True):
            assert mine == pytest.approx(exact, rel=1e-12, nan_ok=True)
        gaps = [(n, abs(c - a)) for n, c, a in zip(found.counts, *means, strict=True) if n]
        assert found.ece == pytest.approx(sum(n * gap for n, gap in gaps) / 65, abs=1e-6)
        assert found.mce == pytest.approx(max(gap for _, gap in gaps), abs=1e-6)
        theirs = functional.multiclass_calibration_error(p, labels, num_classes=4, n_bins=bins)
        assert found.ece == pytest.approx(float(theirs), abs=1e-7)
    onehot = nn.functional.one_hot(labels, 4)
    assert found.brier == pytest.approx(float((p - onehot).square().sum(1).mean()), rel=1e-12)
    assert found.nll == pytest.approx(float(nn.functional.cross_entropy(logits, labels)), rel=1e-12)
    assert found.error == pytest.approx(float((logits.argmax(1) != labels).double().mean()), rel=1e-12)
    assert found.confidence == pytest.approx(float(p.max(1).values.mean()), rel=1e-12)
    assert len([n for n in found.counts if n]) > 5
    assert found.forward == pytest.approx(1)
    assert 0 in found.counts
    again = Calibration.from_dict(json.loads(json.dumps(found.to_dict())))
    assert again.confidences == pytest.approx(found.confidences, rel=0, nan_ok=True)
    assert again.plot().get_xlabel() == "confidence"


def test_a_confidence_of_one_is_in_the_last_bin():
    pytest.importorskip("torchmetrics")
    logits = torch.tensor([[200.0, 0.0], [200.0, 0.0], [3.5, 0.0], [3.5, 0.0]])
    labels = torch.tensor([0, 1, 0, 0])
    found = calibration(ModelOracle(Table(), cross_entropy), [(logits, labels)], bins=10)
    assert found.counts == (0,) * 9 + (4,)
    assert found.accuracies[9] == 0.75
    assert found.ece == pytest.approx(found.confidence - 0.75, abs=1e-6)


def test_logits_in_the_unit_interval_are_no_probabilities():
    """Torchmetrics would take such outputs for probabilities."""
    pytest.importorskip("torchmetrics")
    logits, labels = torch.tensor([[0.9, 0.1], [0.2, 0.8]]), torch.tensor([0, 1])
    found = calibration(ModelOracle(Table(), cross_entropy), [(logits, labels)], bins=1)
    p = logits.softmax(1).max(1).values.mean()
    assert found.ece == pytest.approx(1 - float(p), abs=1e-6)


def numbers(value: Any) -> list[float]:
    """All numbers of a result, in order."""
    if isinstance(value, Result):
        return [number for part in value.to_dict().values() for number in numbers(part)]
    if isinstance(value, list):
        return [number for part in value for number in numbers(part)]
    return [value] if isinstance(value, int | float) else []  # not None, as the means of empty bins are


def test_ignored_labels_and_positions():
    """Sequences (N, K, T) have a row for each position whose label counts."""
    pytest.importorskip("torchmetrics")
    torch.manual_seed(0)
    z, y = torch.randn(6, 3, 5).double(), torch.randint(3, (6, 5))
    y[0, 2] = y[3, 1] = y[5] = 7
    kept = y.flatten() != 7
    flat = z.movedim(1, 2).reshape(-1, 3)[kept], y.flatten()[kept]
    loss, model = CrossEntropy(ignore_index=7), Table().double()
    parts = [(z[:4], y[:4]), (z[4:5], y[4:5]), (z[5:], y[5:])]  # no label of the last batch counts
    for measure in (margins, calibration):
        found, exact = (measure(ModelOracle(model, loss), data) for data in (parts, [flat]))
        assert found.examples == int(kept.sum()) == 23
        assert numbers(found) == pytest.approx(numbers(exact), rel=1e-12)
    with pytest.raises(ValueError, match="no label counts: all of them are 7"):
        margins(ModelOracle(model, loss), parts[2:])


@pytest.mark.parametrize("measure", [margins, calibration])
def test_the_model_is_left_as_it_is(measure):
    if measure is calibration:
        pytest.importorskip("torchmetrics")
    model = cases.normed()
    sharp = SharpnessAware(model, BiSAM(0.05), cross_entropy)
    before, random = everything(model), torch.get_rng_state()
    for mode in ("eval", "train", None):
        measure(sharp, DATA, mode=mode)
        assert everything(model) == before
    assert model.training
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(module._forward_hooks for module in model.modules())
    seen: list[tuple[int, int]] = []
    measure(sharp, DATA, progress=lambda *now: seen.append(now))
    assert seen == [(40, 65), (65, 65)]


def regression(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return model(x)[:, 0], y.double()


def test_a_smoothed_loss_and_dropout_and_half_precision_work():
    pytest.importorskip("torchmetrics")
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 4)).to(torch.bfloat16)
    data = [(x.to(torch.bfloat16), y) for x, y in DATA]
    sharp = SharpnessAware(model, SAM(0.05), nn.CrossEntropyLoss(label_smoothing=0.1))
    assert margins(sharp, data, normalized="features").examples == 65
    one, two, other = (margins(sharp, data, mode="train", seed=seed).mean for seed in (0, 0, 1))
    assert one == two != other
    found = calibration(sharp, data)
    assert 0 < found.ece < 1
    labels = torch.cat([y for _, y in data])
    logits = torch.cat([model.eval()(x).detach() for x, _ in data]).float()
    assert found.nll == pytest.approx(float(nn.functional.cross_entropy(logits, labels)), rel=1e-6)


@pytest.mark.parametrize("measure", [margins, calibration])
@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"data": iter(())}, ValueError, "no batches"),
        ({"mode": "test"}, ValueError, "mode must be"),
        ({"source": ModelOracle(cases.mlp(), nn.MSELoss(), regression)}, ValueError, r"compares logits \(N, K, ...\)"),
        ({"source": ModelOracle(nn.Linear(6, 1).double(), cross_entropy)}, ValueError, "of K >= 2 classes"),
        ({"data": [(DATA[0][0], torch.rand(40, 4).double())]}, ValueError, "with int64 labels .* torch.float64"),
        ({"data": [(DATA[0][0], DATA[0][1] + 3)]}, ValueError, "labels of 4 classes are 0 to 3, or -100 .*, got"),
        ({"data": [(DATA[0][0], DATA[0][1] - 4)]}, ValueError, "got -"),
        ({"data": [(DATA[0][0] * math.nan, DATA[0][1])]}, ValueError, "loss of batch 0 is nan"),
        ({"source": ModelOracle(Broken(), cross_entropy)}, ValueError, "loss of batch 0 is nan at the weights"),
    ],
    ids=cases.named,
)
def test_bad_input_is_one_line(measure, arguments, error, said):
    if measure is calibration:
        pytest.importorskip("torchmetrics")
    given = {"source": ModelOracle(cases.mlp(), cross_entropy), "data": DATA, **arguments}
    with pytest.raises(error, match=said) as raised:
        measure(given.pop("source"), given.pop("data"), **given)
    assert "\n" not in str(raised.value)


def test_settings_outside_their_range_are_refused():
    oracle = ModelOracle(cases.mlp(), cross_entropy)
    with pytest.raises(ValueError, match="normalized must be 'logits', 'features' or None, got 'layers'"):
        margins(oracle, DATA, normalized="layers")
    with pytest.raises(ValueError, match="bins must be at least 1, got 0"):
        calibration(oracle, DATA, bins=0)
    infinite = [(torch.tensor([[0.0, -math.inf], [0.0, 1.0]]), torch.tensor([0, 1]))]
    with pytest.raises(ValueError, match="a margin is not finite: a logit is infinite"):
        margins(ModelOracle(Table(), cross_entropy), infinite)
