"""The space of a search: what `--search` accepts, and the defaults of the methods."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("cyclopts")

from bisam.experiments.recipes.catalogue import METHODS
from bisam.experiments.recipes.config import read, text
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.tuning.search import Search
from bisam.experiments.tuning.space import Choices, Range, default_space, filled, parse, placeholders


@pytest.mark.parametrize(
    ("typed", "found"),
    [
        ("rho=0.01:1:log", Range(0.01, 1.0, log=True)),
        ("weight-decay=0:1e-3", Range(0.0, 1e-3)),
        ("momentum=0.5:0.95:0.2", Range(0.5, 0.9, step=0.2)),
        ("batch_size=16:100:16", Range(16, 96, step=16, whole=True)),
        ("rho=0.05,0.1, 0.2", Choices((0.05, 0.1, 0.2))),
        ("clip=none,1,5", Choices((None, 1.0, 5.0))),
        ("augment=yes,no", Choices((True, False))),
        ("schedule=cosine,linear", Choices(("cosine", "linear"))),
        ("epochs=5:20:log", Range(5, 20, log=True, whole=True)),
    ],
)
def test_a_range_or_choices_are_read_and_written(typed, found):
    ((name, dimension),) = parse([typed]).items()
    assert dimension == found
    assert parse([f"{name}={dimension}"]) == {name: dimension}


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("rho", "--search 'rho' has no value: write it as in --search rho=0.01:1:log"),
        ("rho=", "--search rho= has an empty value"),
        ("rho=0.1", "has one value: write a range"),
        ("rho=0.1,0.1", "has a value twice"),
        ("rho=a:b", "'a' is not a number"),
        ("rho=0.1:", "'' is not a number"),
        ("rho=0.01:1:lag", "'lag' is not a number"),
        ("rho=1:0.01:log", "is empty: its first number must be below the second"),
        ("rho=0:1:log", "a logarithmic range begins above 0"),
        ("rho=0.1:1:2", "the step must be above 0 and at most 0.9"),
        ("rho=0.1:1:log:3", "has too many parts"),
        ("rho=nan:1", "'nan' is not a finite number"),
        ("rho=0.1,inf", "'inf' is not a finite number"),
        ("batch_size=16.5:32", "'16.5' is not a whole number"),
        ("epochs=1,two", "'two' is not a whole number"),
        ("schedule=1:2", "is a range, and schedule is no number"),
        ("rh0=1:2", "unknown setting to search 'rh0', did you mean 'rho'"),
        ("noise=0:0.4", "--search noise is refused: it decides what is learned or measured"),
        ("dataset=digits,pets", "--search dataset is refused"),
        ("seed=1:9", "--seeds-per-trial says how many seeds"),
        ("method=sam,sgd", "give each method a search of its own"),
    ],
)
def test_what_is_no_range_is_refused_in_one_line(typed, message):
    with pytest.raises(ValueError, match=r"^[^\n]*$") as refused:
        parse([typed])
    assert message in str(refused.value)


def test_arguments_of_an_expression_are_searched_by_the_name_in_braces():
    method = "KSAM({k}, RSAM({sigma}, SAM(L2({r}))))"
    space = parse(["k=8:64", "sigma=0.001:0.1:log", "r=0.05,0.1"], placeholders(method))
    assert (space["k"].whole, space["sigma"].whole, space["r"].values) == (True, False, (0.05, 0.1))
    assert filled(method, {"k": 16, "sigma": 1e-05, "r": 0.1}) == "KSAM(16, RSAM(1e-05, SAM(L2(0.1))))"
    with pytest.raises(ValueError, match=r"--method has \{sigma\}, and no --search"):
        parse(["k=8:64"], placeholders(method))
    for wrong in ("SAM(L2({}))", "SAM(L2({r:g}))", "SAM(L2({r!r}))", "SAM(L2({r))", "SAM(L2({0}))"):
        with pytest.raises(ValueError, match="--method"):
            placeholders(wrong)


def test_the_default_space_of_every_method_can_be_trained():
    for name, entry in METHODS.items():
        base = Recipe(method=name)
        for grid in (False, True):
            space = default_space(base, grid)
            search = Search(base, space, sampler="grid" if grid else "tpe")  # checks both ends
            assert set(space) == {"rho" if entry.rho is not None else "weight_decay"}, name
            if entry.rho is not None:
                assert entry.rho in space["rho"], name
            assert (search.first is None) == grid, name
    assert 0.05 in default_space(Recipe(method="sgd", optimizer="adamw"), False)["weight_decay"]
    with pytest.raises(ValueError, match="what is searched"):
        default_space(Recipe(method="SAM(0.1)"), False)


def test_values_have_few_digits_and_stay_in_the_range():
    assert Range(0.01, 1, log=True).value(0.123456) == 0.1235
    assert Range(0.12341, 1).value(0.12341) == 0.12341
    assert Range(0, 0.99999).value(0.99999) == 0.99999
    assert Range(0.1, 1.0, step=0.3).grid == (0.1, 0.4, 0.7, 1.0)
    assert Range(1, 3, whole=True).grid == (1, 2, 3)
    assert Range(0.1, 1.0).grid is None


@pytest.mark.parametrize(
    ("base", "texts", "options", "message"),
    [
        ({"method": "sgd"}, ["rho=0.1:1"], {}, "--search rho=0.1:1: rho is no setting of the method sgd"),
        ({}, ["momentum=0.5:1"], {}, "--search momentum=0.5:1: momentum must be in [0, 1), got 1.0"),
        ({}, ["warmup=0:9"], {}, "needs the linear, constant or wsd schedule"),
        ({}, ["rho=0.1:1"], {"sampler": "grid"}, "--search rho=0.1:1 is a range without a step: write choices"),
        ({}, ["epochs=1:9"], {}, "trials of different lengths cannot be compared after an epoch: add --pruner none"),
        ({}, ["rho=0.1:1"], {"sampler": "tpo"}, "unknown sampler 'tpo', did you mean 'tpe'"),
        ({}, ["rho=0.1:1"], {"pruner": "mean"}, "unknown pruner 'mean'"),
        ({"held_out": 0.0}, ["rho=0.1:1"], {}, "--held-out 0 leaves no validation examples"),
    ],
)
def test_a_search_that_cannot_run_is_refused(base, texts, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Search(Recipe(**base), parse(texts), **options)


def test_the_recipe_of_a_trial_goes_through_a_file_unchanged(tmp_path):
    base = Recipe(method="bisam_tanh", noise=0.4, seed=7, epochs=None, steps=90)
    search = Search(base, parse(["rho=0.01:1:log", "alpha=0.05:0.5", "clip=none,1"]), seeds=3)
    recipe = search.recipe({"rho": 0.1234, "alpha": 0.2, "clip": None})
    assert (recipe.rho, recipe.alpha, recipe.clip, recipe.noise, recipe.steps) == (0.1234, 0.2, None, 0.4, 90)
    assert [run.seed for run in search.runs({"rho": 0.1, "alpha": 0.2, "clip": None})] == [7, 8, 9]
    assert search.fresh_seed == 10
    for name in ("a.toml", "a.json"):
        (tmp_path / name).write_text(text(recipe, tmp_path / name))
        assert read(tmp_path / name) == recipe
