"""Base optimizers of runs: those of torch, timm and schedulefree, by name, with arguments of their own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from bisam import SAM, SharpnessAware, cross_entropy
from bisam.experiments import data
from bisam.experiments.models.build import build
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.reports.groups import names
from bisam.experiments.runs.folder import Run
from bisam.experiments.runs.machine import Machine
from bisam.experiments.training.optimizers import build_optimizer
from bisam.experiments.training.train import train

MACHINE = Machine(log=())
ONE = Recipe(method="sam", model="mlp", epochs=2, batch_size=64, limit=200, learning_rate=0.01)
FREE = replace(ONE, optimizer="schedulefree:AdamWScheduleFree(warmup_steps=3)", schedule="constant")
ALL = ("RMSprop", "NAdam(betas=(0.9, 0.99))", "Adafactor", "timm:muon", "timm:lion")


def weights(run: Run) -> dict[str, torch.Tensor]:
    return {name: t for name, t in run.checkpoint()["sharp"].items() if isinstance(t, torch.Tensor)}


def by_hand(recipe: Recipe, make) -> dict[str, torch.Tensor]:
    """The weights of a run, from a loop that is written out."""
    splits = data.load(recipe, MACHINE)
    torch.manual_seed(recipe.seed)
    model = build(recipe.model, 10, channels=1)
    optimizer = make(model.parameters())
    sharp = SharpnessAware(model, SAM(0.05), cross_entropy)
    free = hasattr(optimizer, "eval")
    for epoch in range(1, recipe.epochs + 1):
        random = torch.Generator().manual_seed(recipe.seed * 1_000_003 + epoch)
        model.train()
        if free:
            optimizer.train()
        for inputs, labels in splits.train.batches(recipe.batch_size, random):
            optimizer.zero_grad()
            sharp(inputs, labels).backward()
            optimizer.step()
        if free:
            optimizer.eval()
    return model.state_dict()


@pytest.mark.parametrize(
    ("text", "make"),
    [
        (
            "RMSprop(alpha=0.9)",
            lambda p: torch.optim.RMSprop(p, lr=0.01, alpha=0.9, momentum=0.9, weight_decay=5e-4),
        ),
        ("nadam", lambda p: torch.optim.NAdam(p, lr=0.01, weight_decay=5e-4)),
        ("Rprop", lambda p: torch.optim.Rprop(p, lr=0.01)),
    ],
)
def test_a_run_takes_the_steps_of_the_optimizer_with_the_fields_of_the_recipe(tmp_path, text, make):
    recipe = replace(ONE, optimizer=text, schedule="constant")
    train(run := Run.under(tmp_path, recipe), MACHINE)
    wanted = by_hand(recipe, make)
    found = {name.removeprefix("model."): t for name, t in weights(run).items()}
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_schedule_free_run_trains_at_one_point_and_evaluates_another(tmp_path):
    schedulefree = pytest.importorskip("schedulefree")
    train(run := Run.under(tmp_path, FREE), MACHINE)
    wanted = by_hand(FREE, lambda p: schedulefree.AdamWScheduleFree(p, lr=0.01, weight_decay=5e-4, warmup_steps=3))
    found = {name.removeprefix("model."): t for name, t in weights(run).items()}
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("text", [*ALL, FREE.optimizer])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, text):
    if ":" in text:
        pytest.importorskip(text.partition(":")[0])
    recipe = replace(ONE, optimizer=text, schedule="constant" if text == FREE.optimizer else "cosine")

    def interrupt(row):
        raise KeyboardInterrupt

    train(whole := Run.under(tmp_path / "whole", recipe), MACHINE)
    run = Run.under(tmp_path / "parts", recipe)
    with pytest.raises(KeyboardInterrupt):
        train(run, MACHINE, interrupt)
    train(run, MACHINE)
    one, other = weights(whole), weights(run)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_names_of_earlier_recipes_are_those_that_they_have():
    assert Recipe(optimizer="SGD") == Recipe(optimizer="sgd") == Recipe()
    assert Recipe(optimizer="AdamW") == Recipe(optimizer="adamw")
    assert Recipe(optimizer="rmsPROP").optimizer == "RMSprop"
    assert Recipe(optimizer="adam( eps = 1e-7,amsgrad=True )").optimizer == "Adam(amsgrad=True, eps=1e-07)"
    assert Recipe(optimizer="sgd(nesterov=True)").optimizer == "sgd(nesterov=True)"
    kept = Recipe(optimizer="NAdam(betas=(0.9, 0.99))")
    assert Recipe.from_dict(kept.to_dict()) == kept
    assert type(build_optimizer(nn.Linear(2, 2), Recipe())) is torch.optim.SGD


def test_plain_training_has_the_name_of_its_optimizer():
    found = names([Recipe(method="sgd"), Recipe(method="sgd", optimizer="timm:lion"), Recipe(method="sam")])
    assert list(found.values()) == ["SGD", "timm:lion", "SAM"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "adm"}, "unknown optimizer 'adm', did you mean"),
        ({"optimizer": "LBFGS"}, "unknown optimizer 'LBFGS'"),
        ({"optimizer": "SparseAdam"}, "unknown optimizer 'SparseAdam'"),
        ({"optimizer": ""}, "is no name with arguments"),
        ({"optimizer": "Adam(0.9)"}, "is no name with arguments"),
        ({"optimizer": "Adam(**{})"}, "is no name with arguments"),
        ({"optimizer": "torch.optim.Adam"}, "is no name with arguments"),
        ({"optimizer": "Adam(eps=open('x'))"}, "eps must be a number or another literal"),
        ({"optimizer": "Adam(lr=1)"}, "lr is the field learning_rate of the recipe"),
        ({"optimizer": "sgd(momentum=0.5)"}, "momentum is the field momentum of the recipe"),
        ({"optimizer": "Adam(betas=(2, 0.9))"}, "Invalid beta parameter"),
        ({"optimizer": "Adam(alpha=1)"}, "alpha"),
        ({"optimizer": "keras:Adam"}, "other packages are timm, schedulefree"),
        ({"optimizer": "Adam(eps=" + "1" * 600 + ")"}, "at most 500 characters"),
        ({"optimizer": "schedulefree:SGDScheduleFree"}, "give the constant schedule, got 'cosine'"),
    ],
)
def test_a_recipe_refuses_what_is_no_optimizer(settings, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**settings)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("timm:lionn", "unknown optimizer 'timm:lionn', did you mean 'timm:lion'"),
        ("timm:adahessian", "needs second derivatives"),
        ("timm:lion(foo=1)", "unexpected keyword argument 'foo'"),
        ("schedulefree:AdamWScheduleFreeClosure", "unknown optimizer 'schedulefree:AdamWScheduleFreeClosure'"),
    ],
)
def test_optimizers_of_other_packages_are_checked_before_a_run(text, message):
    pytest.importorskip(text.partition(":")[0])
    with pytest.raises(ValueError, match=message):
        replace(ONE, optimizer=text, schedule="constant").check_trainable()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--base-optimizer", "Muon"), "Muon only supports 2D parameters"),
        (("--optimizer", "adm"), "unknown optimizer 'adm'"),
        (
            ("--optimizer", "timm:lion", "--momentum", 0.5),
            "--momentum (needs an optimizer with momentum, got timm",
        ),
        (
            ("--optimizer", "Rprop", "--weight-decay", 0.1),
            "--weight-decay (needs an optimizer with weight decay, ",
        ),
    ],
)
def test_the_command_refuses_in_one_line(bisam, tmp_path, flags, message):
    code, out, err = bisam("train", "--method", "sgd", "--epochs", 1, *flags, "--out", tmp_path)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
