"""The ascents of a run: their columns against a twin that uses torch alone, and what the recipe refuses."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import islice

import pytest
import torch
from torch.func import functional_call

from bisam import ModelOracle
from bisam.analysis import flips, zero_one_sharpness
from bisam.experiments import data
from bisam.experiments.analyses.file import read_entries
from bisam.experiments.models.build import build
from bisam.experiments.recipes.recipe import CHOICES, Recipe
from bisam.experiments.runs.folder import Run
from bisam.experiments.runs.machine import Machine
from bisam.experiments.runs.results import ASCENTS, BALL, BY_ASCENT, QUANTITIES
from bisam.experiments.training import ascents, ball, measured
from bisam.experiments.training.optimizers import descent_loss
from bisam.experiments.training.train import train

RECIPE = Recipe(
    method="sam",
    rho=0.3,
    epochs=2,
    batch_size=32,
    limit=96,
    label_smoothing=0.1,
    noise=0.2,
    precision="64",
    measured_epochs=1,
    measured="ascents",
)
MACHINE = Machine(log=())
GAMMA = math.log(math.e - 1)


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    """Few examples, and one step of ascent, which the twin can take."""
    monkeypatch.setattr(ball, "EXAMPLES", 60)
    monkeypatch.setattr(ascents, "STEPS", 1)


def margins(logits, labels):
    return logits - logits.gather(1, labels[:, None])


def smoothed(logits, labels, classes=10, smoothing=0.1):
    """Each wrong class has an equal share of the smoothing."""
    target = torch.full_like(logits, smoothing / (classes - 1)).scatter(1, labels[:, None], 1 - smoothing)
    return -(target * (logits - logits.logsumexp(1, keepdim=True))).sum(1)


TWINS = {
    "cross_entropy": lambda z, y: margins(z, y).exp().sum(1).log(),
    "smoothed": smoothed,
    "tanh": lambda z, y: (10 * (0.1 * margins(z, y)).tanh()).exp().sum(1).log() / 10,
    "log": lambda z, y: (1 - (1 + (GAMMA - margins(z, y)).exp()).log()).exp().sum(1).log(),
    "log_5": lambda z, y: (5 * (1 - (1 + (GAMMA - margins(z, y)).exp()).log())).exp().sum(1).log() / 5,
}


def twin(model, batches):
    """The columns of one step, from gradients of autograd and one flat vector of weights."""
    names, weights = zip(*model.named_parameters(), strict=True)
    sizes = [w.numel() for w in weights]
    flat = torch.cat([w.detach().flatten() for w in weights]).requires_grad_()

    def logits(point, x):
        parts = [part.view(w.shape) for part, w in zip(point.split(sizes), weights, strict=True)]
        return functional_call(model, dict(zip(names, parts, strict=True)), (x,))

    def ascent(objective, some):
        value = torch.cat([objective(logits(flat, x), y) for x, y in some]).mean()
        (g,) = torch.autograd.grad(value, flat)
        return g / g.norm()

    def right(point, some):
        with torch.no_grad():
            return torch.cat([logits(point, x).argmax(1) == y for x, y in some])

    def loss(point, some):
        with torch.no_grad():
            return torch.cat([smoothed(logits(point, x), y) for x, y in some]).mean().item()

    at, n = flat.detach(), sum(len(y) for _, y in batches)
    row = {"ascents_error": 1 - right(at, batches).sum().item() / n}
    for name, objective in TWINS.items():
        lost = near = gained = rise = cosine = 0.0
        for batch in batches:
            e, plain = ascent(objective, [batch]), ascent(TWINS["cross_entropy"], [batch])
            before, after = right(at, [batch]), right(at + 0.2 * e, [batch])
            lost += (before & ~after).sum().item() / n
            gained += (~before & after).sum().item() / n
            near += (before & ~right(at + 0.05 * e, [batch])).sum().item() / n
            rise += (loss(at + 0.2 * e, [batch]) - loss(at, [batch])) * len(batch[1]) / n
            cosine += (e @ plain).item() / len(batches)
        wrong = 1 - right(at + 0.2 * ascent(objective, batches), batches).sum().item() / n
        values = near, lost, gained, rise, cosine, max(wrong, row["ascents_error"])
        row |= {f"{quantity}_by_{name}": value for quantity, value in zip(QUANTITIES, values, strict=True)}
    return row


def test_the_columns_are_those_of_a_twin_at_the_last_weights(tmp_path):
    run = Run.under(tmp_path, replace(RECIPE, rho=0.05, epochs=12))  # until the ascents differ
    train(run, MACHINE)
    first, *_, last = run.metrics()
    assert all(math.isnan(first[name]) for name in BY_ASCENT)
    assert not set(last) & set(BALL)
    splits = data.load(RECIPE, MACHINE)
    model = build("convnet", 10, channels=1).double().eval()
    weights = run.checkpoint()["sharp"]
    model.load_state_dict({k.removeprefix("model."): v for k, v in weights.items() if k.startswith("model.")})
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0))[:64]
    images, labels = next(splits.train.batches(96))
    expected = twin(model, [(images[part].double(), labels[part]) for part in order.split(32)])
    assert {name: last[name] for name in BY_ASCENT} == pytest.approx(expected, rel=1e-9, abs=1e-12)
    counted = [64 * last[f"flips_by_{name}"] for name in ASCENTS]
    assert max(counted) > 5
    assert len(set(counted)) > 2
    assert last["cosine_by_cross_entropy"] == 1.0


def test_a_measured_run_is_the_run_without_to_the_bit_and_resumes(tmp_path):
    recipe = replace(RECIPE, measured_epochs=2)
    plain, whole, parts = (
        Run(tmp_path / name / "seed-0", one)
        for name, one in (("plain", replace(recipe, measured_epochs=0)), ("whole", recipe), ("parts", recipe))
    )

    def stop(row):
        raise KeyboardInterrupt

    train(plain, MACHINE)
    train(whole, MACHINE)
    with pytest.raises(KeyboardInterrupt):
        train(parts, MACHINE, stop)
    train(parts, MACHINE)

    def rows(run, names=()):
        times = ("seconds", "relative_time", *names)
        return [{k: repr(v) for k, v in row.items() if k not in times} for row in run.metrics()]

    assert rows(parts) == rows(whole)
    assert rows(whole, BY_ASCENT) == rows(plain)
    assert all(math.isfinite(row[name]) for row in whole.metrics() for name in BY_ASCENT)
    assert not read_entries(whole.folder)  # they are metrics of the run, and no analysis of a finished one


def test_its_cost_is_what_is_stated(monkeypatch):
    monkeypatch.undo()
    splits = data.load(RECIPE, MACHINE)
    oracle = ModelOracle(build("convnet", 10, channels=1), descent_loss(0.1, 10))
    batches, climbed = list(islice(splits.train.batches(32), 2)), ascents.adversaries(10)
    found = [flips(oracle, batches, 0.1, climbed) for _ in range(2)]
    found += [zero_one_sharpness(oracle, batches, 0.1, climbed, steps=ascents.STEPS)]
    assert sum(one.backward for one in found) == pytest.approx(ascents.GRADIENTS)
    assert sum(one.forward - one.backward for one in found) == pytest.approx(ascents.FORWARDS)
    assert measured.cost(RECIPE) == (25, 18)
    assert ascents.__doc__.count("25 gradients and 18 forward") == 1
    assert measured.cost(replace(RECIPE, measured="ball")) == (ball.GRADIENTS, ball.FORWARDS)


def test_each_ascent_and_quantity_has_a_column():
    assert len(set(BY_ASCENT)) == 1 + len(ASCENTS) * len(QUANTITIES)
    assert set(ascents.adversaries(10)) == set(ASCENTS) == set(TWINS)


def test_unknown_kinds_and_kinds_without_marks_are_one_line(bisam, tmp_path):
    for flags, said in [
        (("--measured", "ascent", "--measured-epochs", 2), "unknown measured 'ascent', did you mean 'ascents'"),
        (("--measured", "ascents"), "--measured (needs measured_epochs above 0, got 0)"),
    ]:
        code, out, err = bisam("train", *flags, "--out", tmp_path / "out")
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert said in err
    assert not (tmp_path / "out").exists()


def test_each_kind_of_the_recipe_is_measured():
    assert set(measured.KINDS) == set(CHOICES["measured"])
