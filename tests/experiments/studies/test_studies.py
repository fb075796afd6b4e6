"""Every study of the papers end to end, in small: the real loaders on files that the test writes, small networks."""

from __future__ import annotations

import csv
import json
import os
import pickle
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torchvision.datasets import cifar

from bisam import SAM, SAMPa, cross_entropy
from bisam.experiments.cli.study import show_failed
from bisam.experiments.data import load
from bisam.experiments.data.glue import TASKS
from bisam.experiments.errors import DataError, RunError
from bisam.experiments.launch.estimate import queries
from bisam.experiments.launch.outcomes import Outcome
from bisam.experiments.models.build import NETWORKS, statistics
from bisam.experiments.recipes.expressions import build
from bisam.experiments.recipes.presets import PRESETS
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.reports import figures
from bisam.experiments.runs.folder import Run, finished
from bisam.experiments.runs.machine import Machine
from bisam.experiments.studies import STUDIES
from bisam.experiments.studies.finetune import FINETUNE
from bisam.experiments.studies.paper import MODELS, PAPER
from bisam.experiments.studies.sampa import SAMPA, VARIANTS
from bisam.experiments.training import ball
from bisam.experiments.training.train import train
from tests.experiments.data.test_glue import classic
from tests.experiments.data.test_image_folders import classes, flower_root, pet_root  # noqa: F401 - fixtures
from tests.experiments.models.test_build import bert  # noqa: F401 - a fixture


@pytest.fixture
def cifar_root(tmp_path, monkeypatch):
    """CIFAR-10 and CIFAR-100 in the official layout, of random images."""
    random = np.random.default_rng(0)
    for kind, labels, count in ((cifar.CIFAR10, "labels", 10), (cifar.CIFAR100, "fine_labels", 100)):
        folder = tmp_path / kind.base_folder
        folder.mkdir()
        for name, _ in kind.train_list + kind.test_list:
            images = random.integers(0, 256, (40, 3072), dtype=np.uint8)
            (folder / name).write_bytes(pickle.dumps({"data": images, labels: list(random.integers(0, count, 40))}))
        names = {kind.meta["key"]: [str(i) for i in range(count)]}
        (folder / kind.meta["filename"]).write_bytes(pickle.dumps(names))
    monkeypatch.setattr(cifar, "check_integrity", lambda *_: True)  # the official digests are of the official images
    return tmp_path


def test_cifar_at_a_smaller_side(cifar_root):
    """Each pixel is the mean of a block; the statistics, the crops and cutout are those of the smaller images."""
    machine = Machine(data_dir=cifar_root)
    whole, half = (load(Recipe(dataset=name, cutout=True), machine) for name in ("cifar10", "cifar10:16"))
    for part in ("train", "validation", "test"):
        there, here = getattr(whole, part), getattr(half, part)
        assert here.images.shape == (len(there), 3, 16, 16)
        assert torch.equal(here.labels, there.labels)
        blocks = there.images.view(-1, 3, 16, 2, 16, 2).double().mean((3, 5))
        assert (here.images - blocks).abs().max() <= 0.5
    assert (half.train.augmentation.padding, half.train.augmentation.cutout) == (2, 8)
    both = torch.cat([half.train.images, half.validation.images]).double() / 255
    expected = both.mean((0, 2, 3)), both.transpose(0, 1).flatten(1).std(1)
    for found, known in zip(half.train.statistics, expected, strict=True):
        torch.testing.assert_close(torch.tensor(found), known.float())
    for side in (5, 31):
        with pytest.raises(DataError, match=f"images of 32 pixels can be reduced to 4, 8 or 16, got {side}"):
            load(Recipe(dataset=f"cifar10:{side}"), machine)


def checked(folder, root, runs: int, seeds: int = 1) -> list[dict]:
    """The rows of a report, which has all its files."""
    assert len(list(root.glob("*/seed-*/result.json"))) == runs * seeds
    assert {"report.md", "report.csv", "report.html"} <= {path.name for path in folder.iterdir()}
    rows = list(csv.DictReader((folder / "report.csv").read_text().splitlines()))
    assert len(rows) == runs
    assert {row["n"] for row in rows} == {str(seeds)}
    return rows


IMAGES = ("table1", "table2", "table4", "table5", "table8", "table9", "table10", "figure2", "sampa", "grid")
SAMPA_IMAGES = ("sampa-cifar10", "sampa-cifar100", "sampa-noise", "sampa-variants", "sampa-stale", "sampa-penalty")
RUNS = {"table1": 5, "table2": 5, "table4": 2, "table5": 2, "table8": 25, "table9": 3, "table10": 3}
RUNS |= {"figure2": 4, "sampa": 10, "grid": 43}
RUNS |= {"sampa-cifar10": 5, "sampa-cifar100": 5, "sampa-noise": 20, "sampa-variants": 12}
RUNS |= {"sampa-stale": 6, "sampa-penalty": 6}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*IMAGES, *SAMPA_IMAGES])
def test_a_study_of_cifar_end_to_end(name, cifar_root, here, bisam, monkeypatch):
    monkeypatch.setattr(ball, "STEPS", 3)  # of figure 2, for time
    small = ("--set", "model=convnet", "--set", "limit=32", "--set", "batch_size=16", "--seeds", 1)
    code, out, _ = bisam(
        "run", name, "--epochs", 1, *small, "--data-dir", cifar_root, "--out", cifar_root / "out", "--set", "cutout=yes"
    )
    assert code == 0
    study = STUDIES[name]
    rows = checked(cifar_root / "out" / name, cifar_root / "out" / study.folder, RUNS[name])
    for figure in study.figures:
        assert (cifar_root / "out" / name / f"{figure}.png").exists()
    assert {row["dataset"] for row in rows} == {"cifar100" if name in ("table2", "sampa-cifar100") else "cifar10"}
    first = next((cifar_root / "out" / study.folder).glob("*/seed-*/recipe.json"))
    recipe = Recipe.from_dict(json.loads(first.read_text()))
    assert (recipe.model, recipe.limit, recipe.cutout) == ("convnet", 32, True)
    assert name in out


OF_THEIR_OWN = {"table3", "table6", "table7", "grid-vit", "sampa-imagenet", "sampa-vit", "sampa-glue", "sharpness"}
OF_THEIR_OWN |= {study.name for study in FINETUNE}
"""Studies that other tests run end to end."""


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in STUDIES if name not in {*IMAGES, *SAMPA_IMAGES, *OF_THEIR_OWN}])
def test_every_other_study_end_to_end(name, cifar_root, here, bisam):
    study, out = STUDIES[name], cifar_root / "out"
    changes = ("limit=64", "batch_size=32")  # K-SAM chooses 32 examples
    data = () if {recipe.dataset for recipe in study.recipes(None)} == {"digits"} else ("--data-dir", cifar_root)
    small = [text for change in changes for text in ("--set", change)]
    code, _, err = bisam("run", name, "--epochs", 1, *small, "--seeds", 1, *data, "--out", out)
    assert code == 0, err
    checked(out / name, out / study.folder, len(study.changed(1, changes)))
    for figure in study.figures:
        assert (out / name / f"{figure}.png").exists()


@pytest.mark.slow
def test_figure2_reports_the_largest_error_in_the_ball(data, here, bisam, tmp_path, monkeypatch):
    monkeypatch.setattr(ball, "STEPS", 6)  # for time
    small = [f"--set={change}" for change in ("model=convnet", "limit=64", "batch_size=16", "measured_epochs=2")]
    code, _, _ = bisam("run", "figure2", "--epochs", 2, "--seeds", 1, *small, "--data-dir", data, "--out", tmp_path)
    assert code == 0
    checked(tmp_path / "figure2", tmp_path / "figure2", 4)
    text = (tmp_path / "figure2" / "report.md").read_text()
    assert "![Error at the weights, and the largest error in a ball around them](ball.png)" in text
    _, _, section = text.partition("## The largest error in the ball, after the last epoch")
    section, _, _ = section.partition("\n## ")
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 4
    for line in lines[2:]:
        error, worst = (float(cell.split()[0]) for cell in line[1:3])
        assert 0 < error <= worst <= 100


def test_figure2_has_runs_of_its_own_that_are_those_of_table1_with_measurements():
    mine, shared = STUDIES["figure2"], STUDIES["table1"]
    assert (mine.folder, {recipe.measured_epochs for recipe in mine.recipes(None)}) == ("figure2", {20})
    assert {replace(recipe, measured_epochs=0) for recipe in mine.recipes(None)} < set(shared.recipes(None))


def test_the_tables_take_the_papers_networks():
    for name in ("table1", "table2", "table4", "table5", "table9", "table10", "sampa-cifar10", "sampa-cifar100"):
        assert tuple(dict.fromkeys(recipe.model for recipe in STUDIES[name].recipes(None))) == MODELS
    assert [study.name for study in PAPER] == [
        *(f"table{i}" for i in range(1, 11)),
        "figure2",
        "grid",
        "grid-vit",
    ]
    assert all(study.name.partition("-")[0] == "sampa" for study in SAMPA)


def test_the_combinations_of_sampa_are_the_variants_with_sampa():
    """Each is a variant whose perturbation, ascent and micro-batches are those of the method alone."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    for name, alone, together in VARIANTS:
        one, two = (build(text, optimizer=optimizer) for text in (alone, together))
        if name == "mSAM":
            assert one.m == two.m
            one, two = one.method, two.method
        assert (type(two), two.lam) == (SAMPa, 0.2)
        assert (one.perturb, one.ascent) == (two.perturb, two.ascent)
    assert len({one.ascent for one in (build(alone) for _, alone, _ in VARIANTS) if isinstance(one, SAM)}) == 2


def test_table8_has_the_networks_of_both_papers_with_clean_validation_labels():
    recipes = STUDIES["table8"].recipes(None)
    assert tuple(dict.fromkeys(recipe.model for recipe in recipes)) == ("resnet32", *MODELS)
    for model in ("resnet32", *MODELS):
        of_model = [recipe for recipe in recipes if recipe.model == model]
        assert len(of_model) == 25
        assert {recipe.rho for recipe in of_model if recipe.noise == 0.8} == {None, 0.01}
        assert {recipe.rho for recipe in of_model if recipe.noise != 0.8} == {None, 0.05}
    assert {recipe.validation_noise for recipe in recipes} == {False}
    assert "validation labels" in STUDIES["table8"].note
    noisy = STUDIES["table8"].changed(None, ["validation_noise=true", "model=resnet32"])
    assert {(recipe.model, recipe.validation_noise) for recipe in noisy} == {("resnet32", True)}
    assert len(noisy) == 25


@pytest.mark.parametrize("name", ["table1", "table2", "table8", "figure2"])
def test_the_control_is_beside_sam_where_labels_are_smoothed(name):
    """It is SAM in all but the loss that it climbs, which has no label smoothing."""
    recipes = STUDIES[name].recipes(None)
    assert {recipe.label_smoothing for recipe in recipes} == {0.1}
    control, sam = ([r for r in recipes if r.method == method] for method in ("sam_ce", "sam"))
    assert [replace(recipe, method="sam") for recipe in control] == sam
    assert control[0].build_method() == replace(sam[0].build_method(), ascent=cross_entropy)


@pytest.mark.parametrize("name", ["table6", "table7", "grid-vit", "digits", "methods"])
def test_the_control_is_left_out_where_it_would_be_sam(name):
    recipes = STUDIES[name].recipes(None)
    assert {recipe.label_smoothing for recipe in recipes} == {0.0}
    assert "sam_ce" not in {recipe.method for recipe in recipes}
    if name in ("table6", "table7"):
        assert "Labels are not smoothed" in STUDIES[name].note


@pytest.mark.parametrize("name", ["table3", "table4", "table5", "table9", "table10"])
def test_a_note_says_what_differs_where_there_is_no_control(name):
    assert {recipe.label_smoothing for recipe in STUDIES[name].recipes(None)} == {0.1}
    assert "two things differ" in STUDIES[name].note


def test_the_grid_has_radii_of_the_adaptive_methods():
    """Appendix A.1: the paper takes another radius than 0.5, here 0.1."""
    recipes = STUDIES["grid"].recipes(None)
    for method in ("asam", "abisam_log", "abisam_tanh"):
        radii = {recipe.rho for recipe in recipes if recipe.method == method}
        assert radii == {0.02, 0.05, 0.1, 0.2, 0.5, 1.0}
    assert {recipe.model for recipe in recipes} == {"resnet56"}
    assert {recipe.rho for recipe in STUDIES["table9"].recipes(None)} == {0.1}


def test_the_vit_is_tuned_on_other_seeds_and_for_each_data_set():
    tuned, table = STUDIES["grid-vit"], STUDIES["table6"]
    seeds = [set(range(one.first_seed, one.first_seed + one.seeds)) for one in (tuned, table)]
    assert not seeds[0] & seeds[1]
    for dataset in ("flowers", "pets"):
        recipes = [recipe for recipe in tuned.recipes(None) if recipe.dataset == dataset]
        found = {(r.method, r.setting("mu"), r.setting("alpha")) for r in recipes}
        decades = (0.1, 1.0, 10.0, 100.0)
        log = {("bisam_log", mu, None) for mu in decades}
        assert found == log | {("bisam_tanh", mu, alpha) for mu in decades for alpha in (0.01, 0.1, 1.0)}
        assert len(recipes) == 16
        # The settings of the table are among them, and all else is equal.
        assert {r for r in table.recipes(None) if r.dataset == dataset and r.method.startswith("bisam")} < set(recipes)


def test_table6_fine_tunes_the_papers_checkpoint_for_500_steps():
    for study in ("table6", "grid-vit"):
        for recipe in STUDIES[study].recipes(None):
            assert (recipe.model, recipe.weights) == ("timm:vit_base_patch16_224.orig_in21k", "pretrained")
            assert (recipe.steps, recipe.epochs, recipe.warmup, recipe.schedule) == (500, None, 100, "linear")
    short = STUDIES["table6"].recipes(3)
    assert {(recipe.steps, recipe.epochs, recipe.warmup) for recipe in short} == {(None, 3, 0)}
    assert {recipe.warmup for recipe in STUDIES["table6"].recipes(20)} == {100}


def test_the_checkpoint_of_table6_is_known_to_timm():
    """Google's weights, which were trained on images of mean and standard deviation 0.5, and have no head."""
    timm = pytest.importorskip("timm")
    name = PRESETS["vit"].model.removeprefix("timm:")
    assert name in timm.list_pretrained("vit_base_patch16_224.*")
    assert statistics(f"timm:{name}") == ((0.5,) * 3, (0.5,) * 3)
    config = timm.get_pretrained_cfg(name)
    assert (config.hf_hub_id, config.num_classes, config.input_size) == (f"timm/{name}", 0, (3, 224, 224))
    assert (
        timm.get_pretrained_cfg("vit_base_patch16_224").tag == "augreg2_in21k_ft_in1k"
    )  # the default, not the paper's


def test_sgd_has_twice_the_epochs_where_gradients_are_to_be_equal():
    for name in ("table1", "table2", "table8", "cifar10-small", "digits"):
        for epochs in (None, 3):
            by_method = {recipe.method: recipe.epochs for recipe in STUDIES[name].recipes(epochs)}
            assert by_method["sgd"] == 2 * by_method["sam"] == 2 * by_method["bisam_log"]


def test_table3_on_image_folders(tmp_path, here, bisam):
    for part, count in (("train", 30), ("val", 4)):
        classes(tmp_path / "imagenet" / part, n01=count, n02=count)
    small = ("model=torchvision:squeezenet1_1", "image_size=32", "limit=16", "batch_size=8")
    changes = [text for change in small for text in ("--set", change)]
    code, _, err = bisam(
        "run", "table3", "--epochs", 1, *changes, "--seeds", 1, "--data-dir", tmp_path, "--out", tmp_path / "o"
    )
    assert code == 0, err
    rows = checked(tmp_path / "o" / "table3", tmp_path / "o" / "table3", 3)
    assert [float(row["test_best_top5_mean"]) for row in rows] == [1.0] * 3  # there are two classes
    assert "top-5 accuracy" in (tmp_path / "o" / "table3" / "report.md").read_text()


@pytest.mark.slow
def test_sampas_imagenet_on_image_folders(tmp_path, here, bisam):
    for part, count in (("train", 30), ("val", 4)):
        classes(tmp_path / "imagenet" / part, n01=count, n02=count)
    small = ("model=torchvision:squeezenet1_1", "image_size=32", "limit=16", "batch_size=8")
    changes = [text for change in small for text in ("--set", change)]
    out = tmp_path / "o"
    code, _, err = bisam(
        "run", "sampa-imagenet", "--epochs", 1, *changes, "--seeds", 1, "--data-dir", tmp_path, "--out", out
    )
    assert code == 0, err
    checked(out / "sampa-imagenet", out / "sampa-imagenet", 2)


@pytest.mark.slow
def test_sampas_vit_on_enlarged_images(cifar_root, here, bisam):
    pytest.importorskip("timm")
    small = ("model=timm:test_vit", "weights=none", "dataset=cifar10:160", "limit=4", "batch_size=2")
    changes = [text for change in small for text in ("--set", change)]
    out = cifar_root / "o"
    code, _, err = bisam(
        "run", "sampa-vit", "--epochs", 1, *changes, "--seeds", 1, "--data-dir", cifar_root, "--out", out
    )
    assert code == 0, err
    rows = checked(out / "sampa-vit", out / "sampa-vit", 2)
    assert {row["dataset"] for row in rows} == {"cifar10:160"}


@pytest.mark.slow
def test_sampas_glue_on_every_task(tmp_path, bert, here, bisam):  # noqa: F811
    pytest.importorskip("datasets")
    for task in TASKS:
        classic(tmp_path, task)
    small = (f"model=hf:{bert}", "weights=none", "limit=8", "batch_size=4", "max_length=16")
    changes = [text for change in small for text in ("--set", change)]
    out = tmp_path / "o"
    code, _, err = bisam(
        "run", "sampa-glue", "--epochs", 1, *changes, "--seeds", 1, "--data-dir", tmp_path, "--out", out
    )
    assert code == 0, err
    checked(out / "sampa-glue", out / "sampa-glue", 4 * len(TASKS))


@pytest.mark.slow
def test_table6_on_flowers_and_pets(flower_root, pet_root, here, bisam):  # noqa: F811
    pytest.importorskip("timm")
    assert flower_root == pet_root
    small = ("model=timm:test_vit", "weights=none", "image_size=160", "limit=4", "batch_size=2")
    changes = [text for change in small for text in ("--set", change)]
    out = flower_root / "o"
    changes += ["--set", "steps=3", "--set", "warmup=1"]  # 2 steps are an epoch
    code, _, err = bisam("run", "table6", *changes, "--seeds", 1, "--data-dir", flower_root, "--out", out)
    assert code == 0, err
    rows = checked(out / "table6", out / "table6", 8)
    assert {row["method"] for row in rows} == {"AdamW", "SAM", "BiSAM (-log)", "BiSAM (tanh)"}
    assert {row["steps"] for row in rows} == {"3"}
    for run in finished(out / "table6"):
        assert [row["step"] for row in run.metrics] == [2, 3]


@pytest.mark.slow
def test_grid_vit_on_flowers_and_pets(flower_root, pet_root, here, bisam):  # noqa: F811
    pytest.importorskip("timm")
    assert flower_root == pet_root
    small = ("model=timm:test_vit", "weights=none", "image_size=160", "limit=4", "batch_size=2", "steps=3", "warmup=1")
    changes = [text for change in small for text in ("--set", change)]
    out = flower_root / "o"
    code, _, err = bisam("run", "grid-vit", *changes, "--seeds", 1, "--data-dir", flower_root, "--out", out)
    assert code == 0, err
    rows = checked(out / "grid-vit", out / "grid-vit", 32)
    assert {(row["dataset"], row["method"]) for row in rows} == {
        (dataset, method) for dataset in ("flowers", "pets") for method in ("BiSAM (-log)", "BiSAM (tanh)")
    }
    assert {run.recipe.seed for run in finished(out / "grid-vit")} == {100}
    axes = figures.draw("grid", list(finished(out / "grid-vit"))).axes
    assert [(ax.get_title(), ax.get_xlabel()) for ax in axes if ax.get_title()] == [
        (dataset, name) for dataset in ("flowers", "pets") for name in ("mu", "alpha")
    ]


@pytest.mark.slow
def test_table8_on_all_networks(cifar_root, here, bisam, monkeypatch):
    """Each name builds the same small network."""
    for name in ("resnet32", *MODELS):
        monkeypatch.setitem(NETWORKS, name, NETWORKS["convnet"])
    small = ("--epochs", 1, "--set", "limit=8", "--set", "batch_size=4", "--set", "noise=0.4", "--seeds", 1)
    out = cifar_root / "out"
    noisy = ("--set", "validation_noise=true")
    code, _, err = bisam("run", "table8", *small, *noisy, "--data-dir", cifar_root, "--out", out)
    assert code == 0, err
    rows = checked(
        out / "table8", out / "table8", 6 * 9
    )  # SGD, and SAM, the control and BiSAM with the radii of both noises
    assert {row["model"] for row in rows} == {"resnet32", *MODELS}
    text = (out / "table8" / "report.md").read_text()
    assert "validation noise True" in text
    assert "Side by side" in text


@pytest.mark.slow
def test_table7_on_every_task(tmp_path, bert, here, bisam):  # noqa: F811
    pytest.importorskip("datasets")
    for task in TASKS:
        classic(tmp_path, task)
    small = (f"model=hf:{bert}", "weights=none", "limit=8", "batch_size=4", "max_length=16")
    changes = [text for change in small for text in ("--set", change)]
    out = tmp_path / "o"
    code, _, err = bisam("run", "table7", "--epochs", 1, *changes, "--seeds", 1, "--data-dir", tmp_path, "--out", out)
    assert code == 0, err
    rows = checked(out / "table7", out / "table7", 24)
    assert {row["metric"] for row in rows if row["dataset"] == "glue:cola"} == {"matthews"}
    assert {row["metric"] for row in rows if row["dataset"] == "glue:mrpc"} == {"f1"}
    text = (out / "table7" / "report.md").read_text()
    assert "Matthews" in text


# --set


def test_a_change_is_another_identity():
    study = STUDIES["digits"]
    ours, theirs = study.changed(None, ()), study.changed(None, ("weight_decay=0",))
    assert not {r.slug for r in ours} & {r.slug for r in theirs}
    assert {r.weight_decay for r in theirs} == {0.0}


def test_a_setting_is_changed_where_a_method_has_it():
    changed = STUDIES["digits"].changed(2, ("mu=5",))
    assert {r.method: r.mu for r in changed} == {
        "sgd": None,
        "sam": None,
        "bisam_log": 5,
        "bisam_tanh": 5,
        "asam": None,
    }
    assert {r.method: r.epochs for r in changed}["sgd"] == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("epoch=1", "unknown field 'epoch', did you mean 'epochs'"),
        ("epochs", "has no value: write it as in --set epochs=1"),
        ("epochs=many", "'many' is not a whole number"),
        ("epochs=0", "epochs must be at least 1, got 0"),
        ("cutout=perhaps", "'perhaps' is not true or false"),
        ("learning_rate=fast", "'fast' is not a number"),
        ("optimizer=lion", "unknown optimizer 'lion'"),
        ("seed=3", "--seeds says how many"),
        ("method=sam", "bisam train --method"),
        ("eta=0.1", ""),
    ],
)
def test_a_change_that_is_none_is_refused(bisam, tmp_path, change, message):
    study = "table3" if change.startswith("eta") else "digits"
    message = message or "no method of table3 has eta as a setting"
    code, _, err = bisam("run", study, "--set", change, "--out", tmp_path)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


# Plans, presets, plots


def test_a_dry_run_says_what_is_left_and_runs_nothing(bisam, tmp_path):
    train(Run.under(tmp_path / "digits", Recipe(method="sam", rho=0.4, epochs=1)))
    before = sorted(tmp_path.rglob("*"))
    code, out, err = bisam("run", "digits", "--epochs", 1, "--seeds", 2, "--dry-run", "--out", tmp_path)
    assert (code, err) == (0, "")
    assert "19 of 20 runs of digits are left" in out
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_a_study_without_its_data_starts_nothing(bisam, tmp_path):
    code, out, err = bisam(
        "run", "table2", "--seeds", 1, "--workers", 1, "--data-dir", tmp_path, "--out", tmp_path / "o"
    )
    assert code == 2
    assert " done" not in out
    assert "seed 0 and 24 more did not start: cifar100 is missing: give --download" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "o").exists()


def test_failures_are_said_once_each_and_tell_the_exit_code(capsys):
    good, bad = Outcome(Recipe(), {}), Outcome(Recipe(seed=1), None, "it broke")
    lacking = [Outcome(Recipe(dataset="pets", seed=seed), None, "there are no pets", started=False) for seed in (0, 1)]
    diverged = Outcome(Recipe(seed=2), {"diverged": 1})
    assert show_failed([good]) == show_failed([good, diverged]) == 0
    assert show_failed([diverged]) == 1
    assert show_failed(lacking) == 2
    assert show_failed([good, *lacking]) == show_failed([bad]) == 1
    capsys.readouterr()
    show_failed([lacking[0], bad, lacking[1], good])
    said = " ".join(capsys.readouterr().err.split())
    assert f"bisam: {bad.recipe.slug}, seed 1 failed: it broke" in said
    assert f"bisam: {lacking[0].recipe.slug}, seed 0 and 1 more did not start: there are no pets" in said


def test_a_dry_run_without_the_data_says_so(bisam, tmp_path):
    code, out, err = bisam("run", "table1", "--dry-run", "--data-dir", tmp_path)
    assert code == 0
    assert "150 of 150 runs of table1 are left, about ?" in out
    assert "cifar10 is missing: give --download" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("kind", ["images", "files"])
def test_a_network_that_cannot_take_the_images_is_said_in_one_line(bisam, tmp_path, kind):
    pytest.importorskip("timm")
    files = ("--set", f"dataset=folder:{classes(tmp_path / 'mine', cat=20, dog=20)}", "--set", "image_size=32")
    changes = ("--set", "model=timm:vit_tiny_patch16_224", *(files if kind == "files" else ()))
    code, out, err = bisam("run", "digits", "--seeds", 1, "--dry-run", *changes)
    assert (code, err.count("\n")) == (0, 1)
    assert "no estimate: model 'timm:vit_tiny_patch16_224' does not accept the images of" in err
    flags = [text.replace("image_size", "image-size").split("=", 1) for text in changes[1::2]]
    given = [part for name, value in flags for part in (f"--{name}", value)]
    code, out, err = bisam("train", *given, "--epochs", 1, "--out", tmp_path / "o")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "does not accept the images of" in err
    assert not list((tmp_path / "o").rglob("recipe.json"))


def test_a_preset_is_where_flags_start_from(bisam, cifar_root):
    arguments = ("--model=convnet", "--limit", 16, "--epochs=1", "--no-cutout", "--lr", 0.05)
    code, _, err = bisam(
        "train", "--preset", "authors", *arguments, "--data-dir", cifar_root, "--out", cifar_root / "out"
    )
    assert code == 0, err
    (path,) = (cifar_root / "out").rglob("recipe.json")
    recipe = Recipe.from_dict(json.loads(path.read_text()))
    assert (recipe.dataset, recipe.batch_size, recipe.label_smoothing) == ("cifar10", 128, 0.1)
    assert (recipe.model, recipe.epochs, recipe.cutout, recipe.learning_rate) == ("convnet", 1, False, 0.05)
    assert PRESETS["authors"].cutout
    assert not PRESETS["paper"].cutout


def test_an_unknown_preset_is_one_line(bisam):
    code, _, err = bisam("train", "--preset", "author")
    assert code == 2
    assert "did you mean 'authors'" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("plot", "figure3"), "unknown figure 'figure3', did you mean 'figure"),
        (("plot", "flips"), "Name the study too"),
        (("plot", "figure1", "--to", "figure1.gif"), ".png, .pdf or .svg"),
        (("plot", "figure2"), "no finished run of figure2 in runs"),
        (("plot", "table12"), "table12"),
    ],
)
def test_a_plot_that_cannot_be_is_one_line(bisam, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, _, err = bisam(*arguments)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("ending", ["png", "pdf", "svg"])
def test_figure1_needs_no_runs(bisam, tmp_path, ending):
    code, _, _ = bisam("plot", "figure1", "--to", tmp_path / f"one.{ending}")
    assert code == 0
    assert (tmp_path / f"one.{ending}").stat().st_size > 1000
    assert bisam("run", "figure1", "--out", tmp_path)[0] == 0
    assert (tmp_path / "figure1" / "report.html").exists()


KILLED = """
import os, random, shutil, signal, sys, time
from dataclasses import replace
from pathlib import Path
import torch
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs.folder import Run
from bisam.experiments.errors import RunError
from bisam.experiments.training.train import train

torch.set_num_threads(1)
root, method, more = Path(sys.argv[1]), sys.argv[2], eval(sys.argv[3])
recipe = Recipe(method=method, noise=0.4, epochs=12, batch_size=128, **more)

def child(folder):
    pid = os.fork()
    if not pid:
        train(Run.under(folder, recipe))
        os._exit(0)
    return pid

start = time.monotonic()
assert os.waitpid(child(root / "whole"), 0)[1] == 0
whole = time.monotonic() - start
random.seed(7)
kills = 0
while kills < 10:
    pid = child(root / "broken")
    time.sleep(random.uniform(0.01, 0.12) * whole)
    os.kill(pid, signal.SIGKILL)
    if os.waitpid(pid, 0)[1] == signal.SIGKILL:
        kills += 1
    else:
        shutil.rmtree(root / "broken")  # it had finished: once more from the start
assert os.waitpid(child(root / "broken"), 0)[1] == 0
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "more"),
    [
        pytest.param("bisam_log", {"rho": 0.4}, marks=pytest.mark.slow),
        (
            "GSAM(Friendly(L2(0.4)), ascent=NegLog())",
            {
                "ema": 0.9,
                "optimizer": "adamw",
                "schedule": "linear",
                "warmup": 5,
                "learning_rate": 0.01,
                "accumulate": 2,
                "clip": 1.0,
                "precision": "bf16",
            },
        ),
    ],
    ids=["sgd", "everything"],
)
def test_a_run_killed_at_ten_random_moments_equals_the_uninterrupted_one(tmp_path, method, more):
    command = [sys.executable, "-c", KILLED, str(tmp_path), method, repr(more)]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True)
    whole, broken = (
        torch.load(next((tmp_path / name).rglob("checkpoint.pt")), weights_only=True) for name in ("whole", "broken")
    )
    timed = ("seconds", "relative_time")
    for rows in (whole["history"], broken["history"]):
        for row in rows:
            assert all(row.pop(name) > 0 for name in timed)
    left, right = (torch.utils._pytree.tree_flatten(state) for state in (whole, broken))
    assert left[1] == right[1]
    for a, b in zip(left[0], right[0], strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b or (a != a and b != b)


@pytest.mark.slow
def test_what_each_device_remembers_is_saved_for_each(tmp_path):
    """Momentum-SAM's average is of the device's own part of the batches."""
    run = Run.under(tmp_path, Recipe(method="momentum_sam", rho=0.4, epochs=1, batch_size=256))
    train(run, Machine(devices=2))
    memories = run.checkpoint()["memories"]
    assert len(memories) == 2
    tensors = [torch.utils._pytree.tree_leaves(memory) for memory in memories]
    assert any(not torch.equal(a, b) for a, b in zip(*tensors, strict=True) if isinstance(a, torch.Tensor))
    (run.folder / "result.json").unlink()
    with pytest.raises(RunError, match="started with 2 devices, not with 1: resume with 2"):
        train(run)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "figure1", "--set", "a=1", "--epochs", 3), "figure1 has no settings: leave --set a=1 out"),
        (("run", "digits", "--gpus", 2), "without --ray there is no cluster: leave --gpus out"),
        (("run", "digits", "--nodes", 2), "each run of a study is on one machine; on many machines use --ray"),
        (("train", "--nodes", 2), "with torchrun or srun"),
        (("train", "--strategy", "fsdp"), "shards a model over several devices, and there is 1: give --devices"),
        (("train", "--device", "cuda:1", "--devices", 2), "names 1 devices, and --devices is 2: make them equal"),
        (("train", "--device", "cuda:1,2"), "names 2 devices, and --devices is 1"),
        (("train", "--seed", 99999999999999), "seed must be in [0, 2^32), got 99999999999999"),
        (("train", "--no-augment", "--cutout"), "cutout is a part of the augmentation"),
        (("train", "--label-smoothing", 0.95), "label_smoothing must be at most 0.9 with 10 classes"),
        (("train", "--batch-size", 1, "--devices", 2), "batches of 1 cannot be shared by 2 devices"),
        (("train", "--model", "vgg19_bn"), "vgg19_bn"),
        (("train", "--log", "tensorbord"), "did you mean 'tensorboard'"),
    ],
)
def test_what_has_no_effect_or_cannot_be_is_one_line(bisam, tmp_path, arguments, message):
    code, _, err = bisam(*arguments, "--out", tmp_path / "out")
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_several_devices_share_the_batches(tmp_path):
    """Two processes, each with half of every batch."""
    recipe = Recipe(method="bisam_log", rho=0.4, epochs=4, batch_size=128, precision="64")
    rows = []
    result = train(Run.under(tmp_path / "two", recipe), Machine(devices=2), rows.append)
    assert result["processes"] == 2
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    assert 0.3 < result["test_last"] <= 1
    assert torch.load(next((tmp_path / "two").rglob("checkpoint.pt")), weights_only=True)["history"] == rows


def test_workers_take_the_gpus_in_turn(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    machine = Machine(device="cuda")
    assert machine.slots == 4
    assert [machine.at(place).device for place in (0, 3, 5)] == ["cuda:0", "cuda:3", "cuda:1"]
    both = Machine(device="cuda", devices=2)
    assert both.slots == 2
    assert [both.at(place).device for place in (0, 1, 2)] == ["cuda:0,1", "cuda:2,3", "cuda:0,1"]
    assert both.at(1).devices == 2
    assert Machine(device="cuda:1").slots == Machine(device="cuda:1,3", devices=2).slots == 1
    monkeypatch.setattr("bisam.experiments.runs.machine.cores", lambda: 6)
    assert (Machine().slots, Machine(devices=4).slots, Machine().at(2)) == (6, 1, Machine())


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("ERM()", (1, 0)),
        ("SAM()", (2, 0)),
        ("LookSAM(k=5)", (1.2, 0)),
        ("KSAM(16, SAM())", (1, 1)),
        ("Every(2)", (1.5, 0)),
    ],
)
def test_an_estimate_counts_gradients_and_forward_passes(method, expected):
    assert queries(method, 32) == pytest.approx(expected)
