"""What a run counts, and what it does not find."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bisam import ERM, SAM, SharpnessAware, cross_entropy
from bisam.experiments import data
from bisam.experiments.models.build import build
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs.folder import Run
from bisam.experiments.runs.machine import Machine
from bisam.experiments.training.counting import CountedMethod
from bisam.experiments.training.train import train
from bisam.perturbations import L2

SHORT = Recipe(method="bisam_log", noise=0.4, rho=0.4, epochs=3, batch_size=256)


@pytest.mark.parametrize(("method", "gradients"), [("sgd", 1.0), ("sam", 2.0), ("esam", 1.5), ("looksam", 1.2)])
def test_a_run_counts_its_gradients(tmp_path, method, gradients):
    recipe = replace(SHORT, method=method, rho=None, epochs=5, batch_size=216)  # 5 steps an epoch, the last one smaller
    assert train(Run.under(tmp_path, recipe))["gradients_per_step"] == pytest.approx(gradients, abs=0.02)


def test_flipped_samples_are_right_at_w_and_wrong_at_w_plus_e():
    d = data.load(Recipe(), Machine())
    model = build("convnet", 10, channels=1)
    watch = CountedMethod(SAM(L2(2.0)))
    sharp = SharpnessAware(model, watch, cross_entropy)
    x, y = d.train.images[:256], d.train.labels[:256]
    sharp(x, y)
    plain = build("convnet", 10, channels=1)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(sharp.clean.outputs, plain.train()(x).detach())
    assert not torch.equal(watch.outputs, sharp.clean.outputs)
    still = CountedMethod(ERM())
    sharp = SharpnessAware(model, still, cross_entropy)
    sharp(x, y)
    assert torch.equal(still.outputs, sharp.clean.outputs)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (replace(SHORT, dataset="cifar10"), "cifar10 is missing: give --download, or unpack"),
        (replace(SHORT, dataset="digit"), "did you mean 'digits'"),
        (replace(SHORT, model="resnet57"), "unknown model 'resnet57', did you mean 'resnet56'"),
    ],
)
def test_what_is_not_here_is_named(tmp_path, recipe, message):
    with pytest.raises(ValueError, match=message):
        train(Run.under(tmp_path, recipe), Machine(data_dir=tmp_path / "empty"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("device", ["tpu9", "cuda:x", "cuda:97", ""])
def test_an_unknown_device_is_named(tmp_path, device):
    with pytest.raises(ValueError, match="--device takes"):
        train(Run.under(tmp_path, SHORT), Machine(device))
