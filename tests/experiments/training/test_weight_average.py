"""Averaged weights: the statistics of their batch normalisation, and runs that are resumed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from bisam.experiments import data
from bisam.experiments.models.build import build
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs.folder import Run
from bisam.experiments.runs.machine import Machine
from bisam.experiments.training.checks import check_model
from bisam.experiments.training.train import train

MACHINE = Machine(log=())
ONE = Recipe(method="sam", model="mlp", epochs=2, batch_size=64, limit=200, ema=0.8, update_bn=True, precision="64")
FREE = replace(ONE, ema=None, optimizer="schedulefree:SGDScheduleFree", schedule="constant")


def below(prefix: str, state) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}


def statistics(recipe: Recipe, state: dict[str, torch.Tensor], epoch: int) -> dict[str, torch.Tensor]:
    """Means over the batches of an epoch of each layer's mean and unbiased variance, at given weights."""
    model = build(recipe.model, 10, channels=1).double()
    model.load_state_dict(state)
    random = torch.Generator().manual_seed(recipe.seed * 1_000_003 + epoch)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.BatchNorm1d)}
    seen = {name: [] for name in layers}
    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs, name=name: seen[name].append(inputs[0]))
        for name, layer in layers.items()
    ]
    with torch.no_grad():
        for inputs, _ in data.load(recipe, MACHINE).train.batches(recipe.batch_size, random):
            model.train()(inputs.double())
    assert hooks
    found = {}
    for name, batches in seen.items():
        found[f"{name}.running_mean"] = torch.stack([x.mean(0) for x in batches]).mean(0)
        found[f"{name}.running_var"] = torch.stack([x.var(0) for x in batches]).mean(0)
    return found


@pytest.mark.parametrize("recipe", [ONE, FREE], ids=["ema", "schedule-free"])
def test_statistics_are_those_of_the_averaged_weights(tmp_path, recipe):
    if recipe is FREE:
        pytest.importorskip("schedulefree")
    train(run := Run.under(tmp_path, recipe), MACHINE)
    checkpoint = run.checkpoint()
    state = below("module.", checkpoint["average"]) if recipe is ONE else below("model.", checkpoint["sharp"])
    wanted = statistics(recipe, state, epoch=2)
    assert len(wanted) == 4
    for name, value in wanted.items():
        torch.testing.assert_close(state[name], value, rtol=1e-12, atol=1e-12)


def test_the_weights_are_the_same_with_and_without_new_statistics(tmp_path):
    runs = [Run.under(tmp_path, replace(ONE, update_bn=given)) for given in (False, True)]
    for run in runs:
        train(run, MACHINE)
    old, new = (run.checkpoint() for run in runs)
    assert all(torch.equal(value, new["sharp"][name]) for name, value in below("", old["sharp"]).items()
               if isinstance(value, torch.Tensor))  # fmt: skip
    old, new = (below("module.", one["average"]) for one in (old, new))
    different = {name for name in old if not torch.equal(old[name], new[name])}
    assert {name.rpartition(".")[2] for name in different} <= {"running_mean", "running_var", "num_batches_tracked"}
    assert len(different) >= 4


@pytest.mark.parametrize("recipe", [ONE, FREE], ids=["ema", "schedule-free"])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, recipe):
    if recipe is FREE:
        pytest.importorskip("schedulefree")

    def interrupt(row):
        raise KeyboardInterrupt

    train(whole := Run.under(tmp_path / "whole", recipe), MACHINE)
    run = Run.under(tmp_path / "parts", recipe)
    with pytest.raises(KeyboardInterrupt):
        train(run, MACHINE, interrupt)
    train(run, MACHINE)
    for part in ("sharp", "average"):
        one, other = (r.checkpoint().get(part, {}) for r in (whole, run))
        tensors = [name for name, value in one.items() if isinstance(value, torch.Tensor)]
        assert all(torch.equal(one[name], other[name]) for name in tensors)
    assert [row["validation"] for row in whole.metrics()] == [row["validation"] for row in run.metrics()]


def test_what_has_no_statistics_is_refused():
    with pytest.raises(ValueError, match="update_bn would change the statistics of frozen layers"):
        replace(ONE, frozen=1, weights="pretrained")
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.LayerNorm(10))
    with pytest.raises(ValueError, match="model 'mlp' has no batch normalisation to update: leave update_bn out"):
        check_model(model, data.load(ONE, MACHINE), ONE)
    check_model(model, data.load(ONE, MACHINE), replace(ONE, update_bn=False))
