"""The flags of the BiSAM authors' script in `bisam train`, every one of their parser."""

from __future__ import annotations

import importlib
import json
import math
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from bisam.experiments.recipes.presets import AUTHORS
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs.machine import Machine

PARSER = json.loads((Path(__file__).parents[2] / "data" / "authors_flags.json").read_text())
"""The flags of their `args.py`, with types and defaults."""


@pytest.fixture
def trained(bisam, monkeypatch, tmp_path):
    """`bisam train` up to the run: (exit code, recipe, machine, errors)."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()

    def call(line: str) -> tuple[int, Recipe | None, Machine | None, str]:
        found: list[Any] = []

        def stopped(run, machine, *_):
            found.append((run.recipe, machine))
            raise KeyboardInterrupt

        monkeypatch.setattr(importlib.import_module("bisam.experiments.training.train"), "train", stopped)
        code, _, errors = bisam("train", "--preset", "authors", *shlex.split(line), "--out", tmp_path / "runs")
        errors = "".join(part for part in errors.splitlines(True) if not part.startswith("interrupted"))
        return code, *(found[0] if found else (None, None)), errors

    return call


RUNS: dict[str, dict[str, Any]] = {
    "": {},
    "--optim sam": {"method": "sam", "rho": None},
    "--opt sam": {"method": "sam", "rho": None},
    "--optim bisam_tanh": {"method": "bisam_tanh", "rho": None},
    "--optim base": {"method": "sgd", "rho": None},
    "--optim base --adam": {"method": "sgd", "rho": None, "optimizer": "adamw"},
    "--adaptive True": {"method": "abisam_log"},
    "--adaptive 1 --rho 0.5": {"method": "abisam_log", "rho": 0.5},
    "--adaptive True --optim sam": {"method": "asam"},
    "--adaptive True --optim bisam_tanh --mu 10 --alpha 0.1": {"method": "abisam_tanh", "mu": 10.0, "alpha": 0.1},
    "--adaptive True --method asam --rho 2": {"method": "asam", "rho": 2.0},
    "--adam": {"optimizer": "adamw"},
    "--adam --optimizer adamw": {"optimizer": "adamw"},
    "--batch_size 64": {"batch_size": 64},
    "--dropout 0": {},
    "--epochs 3": {"epochs": 3},
    "--label_smoothing 0": {"label_smoothing": 0.0},
    "--learning_rate 0.2": {"learning_rate": 0.2},
    "--momentum 0.5": {"momentum": 0.5},
    "--rho 0.1": {"rho": 0.1},
    "--weight_decay 0.1": {"weight_decay": 0.1},
    "--dataset cifar100": {"dataset": "cifar100"},
    "--model densenet121": {"model": "densenet121"},
    "--model resnet56": {},
    "--model vgg19bn": {"model": "vgg19_bn"},
    "--model wrn282": {"model": "wrn28_2"},
    "--model wrn2810": {"model": "wrn28_10"},
    "--mu 1.0": {"mu": 1.0},
    "--alpha 0.2 --optim bisam_tanh": {"method": "bisam_tanh", "rho": None, "alpha": 0.2},
    "--seed 42": {"seed": 42},
}
"""Flags that are accepted, and what they change in the recipe of the preset."""
NOTED = {
    "--valid": "--valid has no effect, as in the authors' script",
    "--threads 4": "--threads has no effect on cifar10, which is in memory; for images in files it is --loaders",
}
"""Flags that are accepted without an effect, and what is said."""
REFUSED = {
    "--depth 28": "leave it out, and give --model wrn28_10",
    "--width_factor 10": "leave it out, and give --model wrn28_10",
    "--dropout 0.3": "--dropout 0.3: the networks of --model have no dropout",
    "--adaptive False": "In the authors' script any text means True, also False",
    "--adaptive perhaps": "--adaptive takes True, got 'perhaps'",
    "--adaptive True --optim base": "--adaptive changes sam, bisam_log, bisam_tanh, and the method is sgd",
    "--adaptive True --method 'KSAM(8)'": "write Adaptive(rho) as the perturbation of an expression",
    "--adam --optimizer sgd": "--adam is --optimizer adamw, and --optimizer sgd is given",
    "--mu 1 --optim sam": "mu is no setting of the method sam",
}
"""Flags for which there is something else here, and what is said."""


@pytest.mark.parametrize("line", RUNS)
def test_a_flag_of_the_authors_is_the_recipe_that_their_script_trains(trained, line):
    code, recipe, _, errors = trained(line)
    assert (code, errors) == (130, "")
    assert recipe == replace(AUTHORS, **RUNS[line])


@pytest.mark.parametrize("line", NOTED)
def test_a_flag_that_changes_nothing_is_accepted_with_a_note(trained, line):
    code, recipe, machine, errors = trained(line)
    assert (code, recipe, machine.loaders) == (130, AUTHORS, 0)
    assert errors.count("\n") == 1
    assert NOTED[line] in errors


@pytest.mark.parametrize("line", REFUSED)
def test_a_flag_without_a_counterpart_is_one_line_that_names_ours(trained, line):
    code, recipe, _, errors = trained(line)
    assert (code, recipe, errors.count("\n")) == (2, None, 1)
    assert REFUSED[line] in errors


def test_threads_are_the_processes_that_read_images_in_files(trained, tmp_path):
    code, _, machine, errors = trained(f"--dataset folder:{tmp_path} --model torchvision:resnet18 --threads 3")
    assert (code, machine.loaders) == (130, 3), errors


def test_no_flag_of_their_parser_is_unknown(trained):
    """Each flag by itself, with its default, and in a line that has them all."""
    lines = {**RUNS, **NOTED, **REFUSED}
    whole: list[str] = []
    for one in PARSER["flags"]:
        flag, default = one["flag"], one["default"]
        assert any(flag in shlex.split(line) for line in lines), f"{flag} is not tested"
        words = [flag] if one["type"] == "store_true" else [flag, str({"bool": True}.get(one["type"], default))]
        code, _, _, errors = trained(shlex.join(words))
        assert code in (2, 130)
        assert "mean" not in errors.lower().replace("means", "")  # "Did you mean"
        assert "nknown" not in errors
        whole += words if flag not in ("--depth", "--width_factor", "--alpha", "--momentum") else []
    code, recipe, _, errors = trained(shlex.join(whole))
    assert code == 130, errors
    assert recipe == replace(AUTHORS, method="abisam_log", optimizer="adamw", mu=1.0, seed=42)


def test_the_preset_has_the_defaults_of_their_parser_but_the_seed():
    theirs = {one["flag"].removeprefix("--"): one["default"] for one in PARSER["flags"]}
    ours = {**AUTHORS.to_dict(), "optim": AUTHORS.method, "mu": AUTHORS.setting("mu"), "adam": False}
    different = {name for name in theirs.keys() & ours.keys() if ours[name] != theirs[name]}
    assert different == {"seed", "alpha"}  # alpha has no effect on the bound -log
    assert Recipe(method="bisam_tanh").setting("alpha") == theirs["alpha"]
    assert (Recipe(method="bisam_tanh").setting("mu"), theirs["mu"]) == (10.0, 1.0)
    assert (AUTHORS.seed, theirs["seed"]) == (0, 42)


@pytest.mark.parametrize(("classes", "constant"), [(10, 0.5448), (100, 0.7846)])
def test_the_authors_cross_entropy_is_smaller_by_the_entropy_of_the_smoothed_label(classes, constant):
    """Their smooth_crossentropy is a Kullback-Leibler divergence; docs/coming-from.md names the constants."""
    smoothing, logits = 0.1, torch.randn(64, classes, dtype=torch.double)
    labels = torch.randint(classes, (64,))
    target = torch.full_like(logits, smoothing / (classes - 1)).scatter_(1, labels[:, None], 1 - smoothing)
    theirs = F.kl_div(logits.log_softmax(1), target, reduction="none").sum(1)
    ours = F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing * classes / (classes - 1))
    wrong = smoothing / (classes - 1)
    entropy = -(1 - smoothing) * math.log(1 - smoothing) - smoothing * math.log(wrong)
    torch.testing.assert_close(ours - theirs, torch.full_like(ours, entropy), rtol=0, atol=1e-12)
    assert entropy == pytest.approx(constant, abs=5e-5)
    page = (Path(__file__).parents[3] / "docs" / "coming-from.md").read_text()
    assert f"{constant}" in page
