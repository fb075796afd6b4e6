"""Compiled models: the mode of the recipe reaches torch.compile, wherever a run compiles a model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from bisam.experiments.inference.loaded import load
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs.folder import Run
from bisam.experiments.runs.machine import Machine
from bisam.experiments.training.train import train

MACHINE = Machine(log=())
ONE = Recipe(method="sam", model="mlp", epochs=1, batch_size=64, limit=128, precision="64")
TUNED = replace(ONE, compile=True, compile_mode="max-autotune-no-cudagraphs")


@pytest.mark.parametrize("recipe", [replace(ONE, compile=True), TUNED])
def test_the_mode_is_passed_on(tmp_path, monkeypatch, recipe):
    given = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **settings: given.append(settings))
    train(run := Run.under(tmp_path, recipe), MACHINE)
    load(str(run.folder), tmp_path).on(MACHINE.fabric("64"))
    assert given == [{"dynamic": False, "mode": recipe.compile_mode}] * 3  # the run, its reference speed, its end


@pytest.mark.slow
def test_a_tuned_run_equals_one_that_is_not_compiled(tmp_path):
    found = []
    for recipe in (ONE, TUNED):
        train(run := Run.under(tmp_path, recipe), MACHINE)
        found.append({k: v for k, v in run.checkpoint()["sharp"].items() if isinstance(v, torch.Tensor)})
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-9, atol=1e-9)


def test_modes_with_cuda_graphs_are_refused():
    with pytest.raises(ValueError, match="unknown compile_mode 'reduce-overhead'"):
        Recipe(compile=True, compile_mode="reduce-overhead")
