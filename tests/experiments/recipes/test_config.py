"""Recipes in files of TOML and JSON: what is read, what is written, and what is refused."""

from __future__ import annotations

import json
import tomllib
from dataclasses import replace

import pytest

pytest.importorskip("tomli_w")

from bisam.experiments.errors import RunError
from bisam.experiments.recipes.config import changes, read, text
from bisam.experiments.recipes.entries import SETTINGS
from bisam.experiments.recipes.presets import PRESETS
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.studies.study import Study

RECIPES = {
    **PRESETS,
    "default": Recipe(),
    "expression": Recipe(method='SAM(L2(0.1), ascent=cross_entropy)', rho=None, limit=7),
    "steps": Recipe(steps=11, ema=0.5, precision="64"),
    "unusual": Recipe(dataset='folder:with "quotes" \\ and ü', model="timm:test_vit"),
    "old": replace(Recipe(), version=1),
}  # fmt: skip


@pytest.mark.parametrize("name", ["a.toml", "a.json"])
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_written_recipe_is_read_as_the_same(recipe, name, tmp_path):
    path = tmp_path / name
    path.write_text(text(recipe, path), encoding="utf-8")
    assert read(path) == recipe
    assert read(path).slug == recipe.slug


def test_fields_that_are_left_out_have_their_defaults(tmp_path):
    (tmp_path / "a.toml").write_text('method = "bisam_log"\nrho = 1\nsteps = 5\n')
    (tmp_path / "a.json").write_text('{"method": "bisam_log", "rho": 1, "steps": 5}')
    for path in (tmp_path / "a.toml", tmp_path / "a.json"):
        assert read(path) == Recipe(method="bisam_log", rho=1.0, steps=5)
    (tmp_path / "empty.toml").write_text("# nothing\n")
    assert read(tmp_path / "empty.toml") == Recipe()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.yaml", b"rho: 1", r"a\.yaml: the name of a recipe's file ends in \.toml or \.json"),
        ("none.toml", None, r"none\.toml cannot be read: No such file"),
        ("a.toml", b"rho = = 1", r"a\.toml is no TOML: .*line 1"),
        ("a.json", b"{", r"a\.json is no JSON: "),
        ("a.json", b"[1]", r"a\.json has no fields of a recipe"),
        ("a.toml", b"rhoo = 1", r"a\.toml: unknown field of a recipe 'rhoo', did you mean 'rho'"),
        ("a.toml", b"rho = [1]", r"a\.toml: rho must be one value, got \[1\]"),
        ("a.toml", b'rho = "x"', r"a\.toml: rho must be a number, got 'x'"),
        ("a.toml", b"epochs = 1\nsteps = 1", r"a\.toml: epochs 1 and steps 1 are both given"),
        ("a.json", b'{"epochs": 1, "epochs": 2}', r"a\.json is no JSON: epochs is given twice, as 1 and 2"),
        ("a.json", b"[" * 100_000, r"a\.json is nested too deeply"),
        ("a.json", b'{"version": "x"}', r"a\.json: version must be a whole number, got 'x'"),
        ("a.toml", b"\xff", r"a\.toml is no text in UTF-8"),
    ],
)
def test_what_is_no_recipe_is_refused_by_name(name, content, message, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as refused:
        read(tmp_path / name)
    assert str(refused.value).count(str(tmp_path)) == 1
    if b"epochs = 1\nsteps" not in (content or b"") and content != b'rho = "x"':  # which a study may leave out
        with pytest.raises(ValueError, match=message):
            changes(tmp_path / name)


def test_a_mark_of_the_encoding_is_no_content(tmp_path):
    for name, content in (("a.toml", "limit = 7\n"), ("a.json", '{"limit": 7}')):
        (tmp_path / name).write_text(content, encoding="utf-8-sig")
        assert read(tmp_path / name) == Recipe(limit=7)
        assert changes(tmp_path / name) == (("limit=7",), ())


def test_a_study_refuses_the_recipe_of_a_later_version_as_a_run_does(tmp_path):
    (tmp_path / "a.json").write_text('{"version": 99, "limit": 7}')
    for reads in (read, changes):
        with pytest.raises(RunError, match="the recipe has version 99"):
            reads(tmp_path / "a.json")


# The command


def test_a_saved_config_and_the_recipe_of_a_run_train_the_same(tmp_path, bisam):
    saved = tmp_path / "a.toml"
    given = ("--method", "bisam_log", "--epochs", 1, "--limit", 64)
    assert bisam("train", *given, "--save-config", saved)[0] == 0
    assert tomllib.loads(saved.read_text())["method"] == "bisam_log"
    assert not (tmp_path / "runs").exists()
    assert bisam("train", "--config", saved, "--out", tmp_path / "runs")[0] == 0
    (of_run,) = (tmp_path / "runs").rglob("recipe.json")
    assert read(of_run) == Recipe(method="bisam_log", epochs=1, limit=64)
    code, out, _ = bisam("train", "--config", of_run, "--seed", 1, "--out", tmp_path / "runs")
    assert code == 0
    assert "seed-1" in "".join(out.split())
    assert {json.loads(path.read_text())["seed"] for path in (tmp_path / "runs").rglob("recipe.json")} == {0, 1}


def test_a_method_on_the_command_line_comes_with_its_own_settings(tmp_path, bisam):
    (tmp_path / "a.toml").write_text('method = "bisam_tanh"\nrho = 0.4\nmu = 3\nalpha = 0.2\nepochs = 5\n')
    saved = tmp_path / "b.json"
    assert bisam("train", "--config", tmp_path / "a.toml", "--method", "sam", "--save-config", saved)[0] == 0
    assert read(saved) == Recipe(method="sam", epochs=5)


def test_two_recipes_to_start_from_are_one_too_many(tmp_path, bisam):
    code, _, err = bisam("train", "--preset", "vit", "--config", tmp_path / "a.toml")
    assert code == 2
    assert "are both a recipe to start from: leave one out" in " ".join(err.split())


@pytest.mark.parametrize("name", ["a.toml", "a.json"])
@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES.values() if "(" not in recipe.method])
def test_a_written_recipe_is_the_setting_of_a_study(recipe, name, tmp_path):
    path = tmp_path / name
    path.write_text(text(recipe, path), encoding="utf-8")
    found, left_out = changes(path)
    study = Study("one", "", lambda epochs: [Recipe(method="sam", rho=0.3, epochs=epochs or 5)], 1)
    (made,) = study.changed(None, found)
    assert made == replace(recipe, method="sam", rho=0.3, mu=None, alpha=None, eta=None, seed=0, version=made.version)
    assert left_out == ("method", *(n for n in SETTINGS if getattr(recipe, n) is not None), "seed")


def test_a_setting_without_its_method_is_a_change(tmp_path):
    (tmp_path / "a.toml").write_text("rho = 0.5\nlimit = 96\ncutout = false\nweights = 'none'\n")
    assert changes(tmp_path / "a.toml") == (("rho=0.5", "limit=96", "cutout=False", "weights=none"), ())
    (tmp_path / "a.toml").write_text("epochs = 1.5\n")
    with pytest.raises(ValueError, match=r"a\.toml: epochs: '1\.5' is not a whole number"):
        changes(tmp_path / "a.toml")
