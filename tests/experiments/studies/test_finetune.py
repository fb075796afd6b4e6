"""The studies of fine-tuning: their design, and the whole of them in small."""

from __future__ import annotations

import csv
import json
from dataclasses import replace

import pytest

pytest.importorskip("transformers")
pytest.importorskip("datasets")
pytest.importorskip("timm")

import torch
import transformers

from bisam.experiments.launch import processes
from bisam.experiments.launch.outcomes import Outcome
from bisam.experiments.models.build import build
from bisam.experiments.recipes.catalogue import METHODS as CATALOGUE
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs.folder import Run
from bisam.experiments.studies import STUDIES
from bisam.experiments.studies.finetune import FINETUNE, FLOWERS_GRIDS, GRIDS, METHODS, TUNED_TASKS
from bisam.experiments.training.train import train
from tests.experiments.data.test_glue import WORDS, classic
from tests.experiments.data.test_image_folders import classes

NAMES = ("finetune-glue", "finetune-flowers")
GRIDS_OF = {"finetune-glue": GRIDS, "finetune-flowers": FLOWERS_GRIDS}


def tuned(recipe: Recipe) -> float:
    return recipe.weight_decay if recipe.is_plain else recipe.rho


def kind(recipe: Recipe) -> Recipe:
    """A recipe without what is tuned and what tuning holds out."""
    same = {"held_out": None, "rho": None}
    return replace(recipe, **same, weight_decay=0.0)


@pytest.mark.parametrize("name", NAMES)
def test_each_method_has_a_value_from_its_own_grid_of_the_study_that_tunes_it(name):
    study, trials = STUDIES[name], STUDIES[f"{name}-rho"].recipes(None)
    for recipe in study.recipes(None):
        same = [trial for trial in trials if kind(trial) == kind(recipe)]
        assert [tuned(trial) for trial in same] == list(GRIDS_OF[name][recipe.method])
        assert tuned(recipe) in [tuned(trial) for trial in same]


def test_all_have_the_same_budget_of_trials_and_an_extension_is_for_all_of_the_same_grid():
    assert {len(grid) for grid in GRIDS.values()} == {5}
    extended = {method: grid[5:] for method, grid in FLOWERS_GRIDS.items()}
    assert extended == {"sgd": (), "asam": (), **dict.fromkeys(METHODS[1:5], (0.8,))}
    assert {method: grid[:5] for method, grid in FLOWERS_GRIDS.items()} == dict(GRIDS)


@pytest.mark.parametrize("name", NAMES)
def test_all_compute_as_many_gradients_and_differ_in_nothing_else(name):
    for study in (STUDIES[name], STUDIES[f"{name}-rho"]):
        for epochs in (None, 1):
            recipes = study.recipes(epochs)
            work = {one.epochs * float(CATALOGUE[one.method].gradients) for one in recipes}
            assert len(work) == 1
            for dataset in {one.dataset for one in recipes}:
                rest = {replace(kind(one), method="sgd", epochs=1) for one in recipes if one.dataset == dataset}
                assert len(rest) == 1
    assert {one.method for one in STUDIES[name].recipes(None)} == set(METHODS)


def test_tuning_has_seeds_of_its_own():
    for name in NAMES:
        test, tuning = STUDIES[name], STUDIES[f"{name}-rho"]
        seeds = [set(range(one.first_seed, one.first_seed + one.seeds)) for one in (test, tuning)]
        assert not seeds[0] & seeds[1]
        assert test.seeds == 10


def test_the_notes_register_the_comparison():
    for name in NAMES:
        note = STUDIES[name].note
        assert "*Registered before the first run*: the primary comparison is BiSAM (-log) minus SAM" in note


def test_one_comparison_of_each_study_is_the_primary_one():
    for name in NAMES:
        study = STUDIES[name]
        where = study.primary.where
        assert (study.primary.method, study.primary.against) == ("bisam_log", "sam")
        found = [r for r in study.recipes(None) if all(r.setting(key) == value for key, value in where.items())]
        assert [r.method for r in found].count("bisam_log") == 1


def test_tuning_of_flowers_holds_out_two_of_five_and_the_comparison_none():
    assert {one.held_out for one in STUDIES["finetune-flowers-rho"].recipes(None)} == {0.4}
    assert {one.held_out for one in STUDIES["finetune-flowers"].recipes(None)} == {0.0}


def test_tuning_of_another_task_is_one_setting():
    recipes = STUDIES["finetune-glue-rho"].changed(None, ["dataset=glue:mrpc"])
    assert len(recipes) == sum(map(len, GRIDS.values()))
    assert {one.dataset for one in recipes} == {"glue:mrpc"}


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Data and weights as the studies want them, in small; runs are in this process."""
    for task in ("sst2", "cola"):
        classic(tmp_path, task)
    folder = tmp_path / "weights" / "minilm-l6-h384"
    sizes = {"hidden_size": 16, "num_hidden_layers": 6, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BertConfig(vocab_size=len(WORDS), max_position_embeddings=64, **sizes)
    transformers.BertModel(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizerFast"}))
    for part in ("train", "test"):
        classes(tmp_path / "flowers102-128" / part, a=5, b=5, c=5)
    (tmp_path / "weights" / "tf_efficientnet_lite0").mkdir()
    torch.save(build("timm:test_efficientnet", 9).state_dict(), tmp_path / "weights" / "small.pt")

    def run_all(recipes, root, workers, machine, progress, analyses=None, stack=None):
        return [Outcome(recipe, train(Run.under(root, recipe), machine)) for recipe in recipes]

    monkeypatch.setattr(processes, "run_all", run_all)
    return tmp_path


GLUE = ("train_examples=8", "batch_size=4", "warmup=0")
FLOWERS = ("model=timm:test_efficientnet", "weights=small.pt", "image_size=32", "batch_size=9", "frozen=1", "warmup=0")
SMALL = {"finetune-glue": GLUE, "finetune-flowers": FLOWERS}
new_head = pytest.mark.filterwarnings("ignore:weights 'small.pt@.*' are those of 9 classes, and the model has 3")


@pytest.mark.slow
@new_head
@pytest.mark.parametrize("name", NAMES)
def test_a_study_of_fine_tuning_end_to_end(name, root, bisam):
    changes = [f"--set={change}" for change in SMALL[name]]
    code, _, _ = bisam("run", name, "--epochs", 1, "--seeds", 2, *changes, "--data-dir", root, "--out", root / "out")
    assert code == 0
    page = root / "out" / name
    rows = list(csv.DictReader((page / "report.csv").read_text().splitlines()))
    assert len(rows) == len(STUDIES[name].recipes(None))
    assert {row["n"] for row in rows} == {"2"}
    compared = [row for row in rows if row["method"] != "SAM"]
    assert {row["pairs"] for row in compared} == {"2"}  # also AdamW, with its own length and weight decay
    results = [json.loads(path.read_text()) for path in page.glob("*/seed-*/result.json")]
    assert len(results) == 2 * len(rows)
    assert {result["headline"] for result in results} == {"last"}
    assert {result["validation_examples"] for result in results} == ({2} if name == "finetune-glue" else {0})
    assert "Registered before the first run" in (page / "report.md").read_text()


@pytest.mark.slow
@new_head
@pytest.mark.parametrize("name", NAMES)
def test_its_settings_are_chosen_end_to_end(name, root, bisam):
    changes = [f"--set={change}" for change in SMALL[name]]
    tuning, out = f"{name}-rho", root / "out"
    code, _, err = bisam("run", tuning, "--epochs", 1, "--seeds", 1, *changes, "--data-dir", root, "--out", out)
    assert code == 0, err
    rows = list(csv.DictReader((out / tuning / "report.csv").read_text().splitlines()))
    assert len(rows) == len(STUDIES[tuning].recipes(None))
    assert "nan" not in {row["validation_best_mean"] for row in rows}
    chosen = list(csv.DictReader((out / tuning / "choices.csv").read_text().splitlines()))
    tasks = len(TUNED_TASKS) if name == "finetune-glue" else 1
    assert [row["chosen"] for row in chosen].count("True") == tasks * len(METHODS)


def test_the_studies_are_listed():
    assert [study.name for study in FINETUNE] == [*(f"{name}{end}" for name in NAMES for end in ("", "-rho"))]
