"""What BiSAM's adversary climbs, beside cross-entropy: by hand, and a tiny measurement from end to end."""

from __future__ import annotations

import json
import math

import pytest
import torch

pytest.importorskip("matplotlib")

from bisam import cross_entropy
from bisam.experiments.errors import DataError
from bisam.experiments.measurements import MEASUREMENTS, report, run
from bisam.experiments.measurements.adversaries import ASCENTS, TRAINED
from bisam.experiments.models.build import build
from bisam.experiments.runs.machine import Machine

COSINES, LABEL_GRADIENT = MEASUREMENTS["cosines"], MEASUREMENTS["label-gradient"]
TINY = {"trained": "digits", "seeds": "2", "marks": "0,1", "examples": "64"}


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize(("classes", "margin"), [(2, 3.0), (10, 5.0), (10, -5.0), (100, 20.0)])
def test_the_gradient_at_the_label_by_hand(tmp_path, classes, margin):
    """All wrong classes have one logit, so that each derivative is a quotient of a few terms."""
    settings = {"classes": str(classes), "margins": str(margin)}
    (row,) = report(LABEL_GRADIENT, run(LABEL_GRADIENT, settings, tmp_path)).rows
    wrong, gamma = classes - 1, math.log(math.e - 1)
    odds = wrong * math.exp(-margin)
    s, own = sigmoid(-margin - gamma), sigmoid(-gamma)
    soft = math.exp(10 * math.tanh(-0.1 * margin))
    slope = 1 - math.tanh(0.1 * margin) ** 2
    expected = {
        "cross-entropy": odds / (1 + odds),
        "smoothed": abs(0.9 - 1 / (1 + odds)),
        "-log": wrong * s * (1 - s) / (own + wrong * s),
        "-log, µ 5": wrong * s**5 * (1 - s) / (own**5 + wrong * s**5),
        "-log, no own class": 1 - s,
        "tanh": wrong * soft * slope / (1 + wrong * soft),
    }
    assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-9)
    assert row["margin"] == margin


def test_cosines_are_those_of_the_gradients(tmp_path):
    """Before training: against autograd on the network and the batch, both of which the seed draws."""
    from bisam.experiments.data import load
    from bisam.experiments.recipes.recipe import Recipe

    folder = run(COSINES, TINY, tmp_path)
    found = json.loads((folder / "digits-seed-1.json").read_text())["rows"][0]
    splits = load(Recipe(seed=1), Machine())
    torch.manual_seed(1)
    model = build("convnet", 10, channels=1)
    x, y = next(iter(splits.train.batches(64, torch.Generator().manual_seed(1000))))

    def gradient(objective):
        parts = torch.autograd.grad(objective(model(x), y).mean(), list(model.parameters()))
        return torch.cat([part.flatten().double() for part in parts])

    plain = gradient(cross_entropy)
    for name, objective in ASCENTS.items():
        other = gradient(objective)
        cosine = float(plain @ other / (plain.norm() * other.norm()))
        assert found[f"cosine {name}"] == pytest.approx(cosine, abs=1e-5), name
    assert found["error"] == pytest.approx(float((model(x).argmax(1) != y).float().mean()))


def test_cosines_to_a_report(tmp_path):
    folder = run(COSINES, TINY, tmp_path)
    found = report(COSINES, folder)
    assert [(row["seed"], row["epoch"]) for row in found.rows] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [cells[:2] for cells in found.cells] == [("digits", "0"), ("digits", "1")]
    first = [row for row in found.rows if row["epoch"] == 1]
    a, b = (row["cosine -log"] for row in first)
    reach = 12.706204736 * abs(a - b) / 2  # Student's quantile with one degree of freedom, times sd / sqrt(2)
    assert found.cells[1][found.header.index("-log")] == f"{(a + b) / 2:.3f} ± {reach:.3f}"
    assert "cosines.png" in found.figures
    (folder / "digits-seed-1.json").unlink()
    alone = report(COSINES, folder)  # one seed has no interval
    assert "±" not in "".join(cell for cells in alone.cells for cell in cells)
    assert "Not measured yet: 1 of 2 parts." in alone.markdown


def test_it_reads_the_data_folder_that_it_is_given(tmp_path, bisam):
    """And the flag of a measurement that reads none is said to have no effect."""
    changed = {**TINY, "trained": "CIFAR-10"}
    with pytest.raises(DataError, match="cifar10 is missing: give --download, or unpack"):
        run(COSINES, changed, tmp_path, Machine(data_dir=tmp_path))
    flags = [part for name, value in changed.items() for part in ("--set", f"{name}={value}")]
    code, _, err = bisam("run", "cosines", *flags, "--data-dir", tmp_path, "--out", tmp_path / "o")
    assert code == 2
    assert "without effect" not in err
    assert "cifar10 is missing" in err
    code, _, err = bisam("run", "label-gradient", "--data-dir", tmp_path, "--out", tmp_path / "o")
    assert code == 0
    assert "without effect are --data-dir" in err


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("cosines", {"trained": "digit"}, "unknown network of setting trained 'digit', did you mean 'digits'"),
        ("cosines", {"rho": "-1"}, "rho must be"),
        ("cosines", {"marks": "1,-2"}, "setting marks must be at least 0, got -2"),
        ("label-gradient", {"classes": "1"}, "setting classes must be at least 2, got 1"),
    ],
)
def test_a_wrong_setting_is_refused(tmp_path, name, changed, message):
    with pytest.raises(ValueError, match=message):
        run(MEASUREMENTS[name], changed, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_networks_differ_in_noise_and_data():
    assert [fields.get("noise", 0.0) for fields in TRAINED.values()] == [0.0, 0.4] * 2
