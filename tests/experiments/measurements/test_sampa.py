"""Measurements of SAMPa's paper: the gradients at its two points, and the costs of the methods that it compares."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from bisam import SAMPa, SharpnessAware, cross_entropy, next_step
from bisam.experiments.measurements import MEASUREMENTS, report, run
from bisam.experiments.measurements.sampa import COMPARED, Compared
from tests.support import cases, references
from tests.support.runs import close


def test_the_gradients_are_those_at_the_weights_and_at_the_point_ahead():
    """y is the end of the last step along the gradient at the y before, on the same batch."""
    model = cases.mlp()
    frozen = copy.deepcopy(model)
    optimizer = cases.OPTIMIZERS["sgd"](model.parameters())
    watched = Compared(SAMPa(0.1, ahead=next_step(optimizer)))
    sharp, gradient, y = SharpnessAware(model, watched, cross_entropy), None, None
    expected = []
    for number in range(5):
        batch = cases.batch(number)
        at = references.flat(model)
        if gradient is None:
            gradient = references.gradient(frozen, cases.CE, *batch)(at)
        else:
            before = references.gradient(frozen, cases.CE, *cases.batch(number - 1))
            gradient, at_x = before(y), before(at)
            expected.append((gradient @ at_x / (gradient.norm() * at_x.norm()), (gradient - at_x).norm()))
        flat = torch.nn.Parameter(at.clone())
        twin = type(optimizer)([flat], **{k: optimizer.defaults[k] for k in ("lr", "momentum", "weight_decay")})
        if optimizer.state:
            buffers = [optimizer.state[p]["momentum_buffer"].flatten() for p in model.parameters()]
            twin.state[flat]["momentum_buffer"] = torch.cat(buffers)
        flat.grad = gradient.clone()
        twin.step()
        y = flat.detach()
        sharp(*batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    for (cosine, distance), ours, far in zip(expected, watched.cosines, watched.distances, strict=True):
        close(ours, cosine, 1e-9)
        close(far, distance, 1e-9)


def test_gradients_to_a_report(tmp_path):
    measurement = MEASUREMENTS["sampa-gradients"]
    folder = run(measurement, {"epochs": "2", "seeds": "2", "batch_size": "256"}, tmp_path)
    found = report(measurement, folder)
    assert [(row["seed"], row["epoch"]) for row in found.rows] == [(0, 1), (0, 2), (1, 1), (1, 2)]
    assert all(-1 <= row["least"] <= row["cosine"] <= 1 + 1e-6 and row["distance"] > 0 for row in found.rows)
    assert "gradients.png" in found.figures
    again = json.loads((folder / "seed-0.json").read_text())["rows"]
    (folder / "seed-0.json").unlink()
    assert run(measurement, {"epochs": "2", "seeds": "2", "batch_size": "256"}, tmp_path) == folder
    assert json.loads((folder / "seed-0.json").read_text())["rows"] == again


def test_costs_to_a_report(tmp_path):
    measurement = MEASUREMENTS["sampa-costs"]
    changed = {"models": "resnet20", "batch_size": "4", "iterations": "2"}
    found = report(measurement, run(measurement, changed, tmp_path))
    assert [row["method"] for row in found.rows] == list(COMPARED)
    by_name = {row["method"]: row for row in found.rows}
    assert by_name["sam"]["to_sam"] == 1
    assert by_name["sgd"]["published"] is None
    assert by_name["sampa"]["published"] == pytest.approx(2340 / 3760)
    assert all(row["bytes"] is None for row in found.rows)
