"""Runs that start from the weights of another run or of a file, which are a part of their identity."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning_fabric")

from bisam.experiments.errors import RunError, RunWarning
from bisam.experiments.models.build import build
from bisam.experiments.models.initial import pinned, read, source
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs.folder import Run
from bisam.experiments.runs.machine import Machine
from bisam.experiments.training.train import prepare, train
from bisam.experiments.training.trained import network, result_of, weights

MACHINE = Machine(log=())
RECIPE = Recipe(model="mlp", method="sgd", epochs=2, batch_size=32, limit=64, ema=0.5)
QUICK = ("--model", "mlp", "--method", "sgd", "--epochs", 1, "--limit", 32, "--quiet")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Run:
    run = Run.under(tmp_path_factory.mktemp("trained"), RECIPE)
    train(run, MACHINE)
    return run


@pytest.fixture
def run(trained, tmp_path) -> Run:
    """A copy, which a test may change."""
    return Run(Path(shutil.copytree(trained.folder, tmp_path / "pretrained")), trained.recipe)


def with_other_weights(run: Run) -> None:
    """Train the run again, from another seed, and claim that it is the same."""
    other = Run.under(run.folder.parent / "other", replace(run.recipe, seed=5))
    train(other, MACHINE)
    shutil.rmtree(run.folder)
    shutil.copytree(other.folder, run.folder)


@pytest.mark.parametrize("which", ["best", "last", "ema"])
def test_a_run_starts_with_the_weights_of_another_one(which, run):
    recipe = replace(RECIPE, weights=f"{run.folder}:{which}", seed=7)
    _, model = prepare(recipe, MACHINE)
    wanted = weights(run, result_of(run), which)
    assert all(torch.equal(value, wanted[name]) for name, value in model.state_dict().items())
    assert pinned(recipe.weights, None).startswith(f"{run.folder}:{which}@")


def test_the_best_weights_are_the_default(run):
    assert pinned(str(run.folder), None) == pinned(f"{run.folder}/", None) == pinned(f"{run.folder}:best", None)
    assert pinned(str(run.folder), None) != pinned(f"{run.folder}:last", None)


def test_a_checksum_is_that_of_the_tensors(tmp_path):
    model = build("mlp", 3, channels=1)
    state = model.state_dict()
    torch.save(state, tmp_path / "a.pt")
    torch.save({"state_dict": dict(reversed(state.items()))}, tmp_path / "b.pt")
    first, second = (read(str(tmp_path / name), None).checksum for name in ("a.pt", "b.pt"))
    assert first == second
    next(iter(state.values())).view(-1)[5] += 1e-6
    torch.save(state, tmp_path / "b.pt")
    assert read(str(tmp_path / "b.pt"), None).checksum != first


def test_the_same_command_goes_on_with_the_same_weights_and_not_with_changed_ones(run, tmp_path, bisam):
    command = ("train", *QUICK, "--weights", run.folder, "--out", tmp_path / "out")
    assert bisam(*command)[0] == 0
    (first,) = (tmp_path / "out" / "train").iterdir()
    assert bisam(*command)[0] == 0
    assert list((tmp_path / "out" / "train").iterdir()) == [first]
    finished = (first / "seed-0" / "result.json").read_bytes()
    with_other_weights(run)
    code, _, err = bisam("train", "--config", first / "seed-0" / "recipe.json", "--out", tmp_path / "out", "--quiet")
    assert code == 2
    assert f"the weights of {run.folder}:best have changed: their checksum is" in err
    assert bisam(*command)[0] == 0  # a run of its own
    assert len(list((tmp_path / "out" / "train").iterdir())) == 2
    assert (first / "seed-0" / "result.json").read_bytes() == finished


def test_a_changed_file_is_another_recipe_and_a_run_of_an_earlier_version_is_resumed_with_a_line(tmp_path, bisam):
    path = tmp_path / "w.pt"
    torch.save(build("mlp", 10, channels=1).state_dict(), path)
    command = ("train", *QUICK, "--weights", path, "--out", tmp_path / "out")
    for _ in range(2):
        code, _, err = bisam(*command)
        assert (code, err) == (0, "")
        torch.save(build("mlp", 10, channels=1).state_dict(), path)
    folders = list((tmp_path / "out" / "train").iterdir())
    assert len(folders) == 2
    recipe = Recipe.from_dict(json.loads((folders[0] / "seed-0" / "recipe.json").read_text()))
    earlier = Run.under(tmp_path / "out" / "train", replace(recipe, weights=str(path)))
    train(earlier, MACHINE)
    code, _, err = bisam(*command)
    assert code == 0
    assert f"{earlier.folder} is of an earlier version, and its recipe has no checksum of {path}: it is resumed" in err
    assert len(list((tmp_path / "out" / "train").iterdir())) == 3


def test_all_but_the_head_is_kept_for_another_number_of_classes(run):
    with pytest.warns(RunWarning, match=r"of 10 classes, and the model has 4: all but the head \(.*\) are kept"):
        model = build("mlp", 4, channels=1, weights=str(run.folder))
    own, theirs = model.state_dict(), weights(run, result_of(run), "best")
    assert sum(torch.equal(own[name], value) for name, value in theirs.items()) == len(own) - 2


def test_a_study_has_the_checksum_too(run, tmp_path, bisam):
    from bisam.experiments.cli.study import _pinned

    assert _pinned((f"weights={run.folder}", "epochs=1"), tmp_path) == (
        "epochs=1",
        f"weights={pinned(str(run.folder), None)}",
    )
    assert _pinned(("weights=none",), tmp_path) == ("weights=none",)
    code, _, err = bisam("run", "digits", "--set", "weights=nowhere.pt", "--out", tmp_path / "out")
    assert code == 2
    assert "weights 'nowhere.pt' cannot be read" in err


def test_frozen_layers_of_a_run_are_those_that_it_started_with(tmp_path):
    pytest.importorskip("timm")
    name = "timm:test_efficientnet"
    first = build(name, 10, channels=1)
    torch.save(first.state_dict(), tmp_path / "w.pt")
    recipe = Recipe(
        model=name, weights=str(tmp_path / "w.pt"), frozen=1, method="sgd", epochs=1, batch_size=16, limit=16
    )
    run = Run.under(tmp_path / "runs", recipe)
    train(run, MACHINE)
    model = build(name, 10, channels=1, weights=str(run.folder))
    wanted = network(run, weights(run, result_of(run), "best"), 10, 1, None).state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in model.state_dict().items())
    assert torch.equal(model.conv_stem.weight, first.conv_stem.weight)
    before = pinned(str(run.folder), None)
    torch.save(build(name, 10, channels=1).state_dict(), tmp_path / "w.pt")
    assert pinned(str(run.folder), None) != before


def test_names_that_look_like_a_choice_are_those_of_files_where_they_exist(tmp_path):
    odd = tmp_path / "w.pt:best@0123456789abcdef"
    odd.write_bytes(b"")
    assert source(str(odd), None).place == odd
    found = source(str(tmp_path / "run:ema@0123456789abcdef"), None)
    assert (found.place, found.which, found.checksum) == (tmp_path / "run", "ema", "0123456789abcdef")


def test_what_cannot_be_started_with_is_named(run, tmp_path):
    torch.save({}, tmp_path / "w.pt")
    (tmp_path / "empty").mkdir()
    for given, message in [
        (f"{tmp_path}/w.pt:last", "w.pt is no run folder, of which :last is a choice"),
        (f"{tmp_path}/none:last", "none is no run folder, of which :last is a choice"),
        (str(tmp_path / "empty"), "has neither a recipe.json nor a model.safetensors"),
        (str(tmp_path), "has 1 runs: give one, as"),
        (str(run.folder / "checkpoint.pt"), f"checkpoint.pt holds a whole run: give its folder, {run.folder}"),
    ]:
        with pytest.raises(ValueError, match=message):
            read(given, None)
    with pytest.raises(ValueError, match="unknown weights of a run 'bset', did you mean 'best'"):
        read(f"{run.folder}:bset", None)
    (run.folder / "result.json").unlink()
    with pytest.raises(RunError, match="is not finished: the command that started the run resumes it"):
        read(str(run.folder), None)


def test_weights_that_are_here_need_no_folder_of_data_sets(run, tmp_path, bisam, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for given in ("./pretrained", "./pretrained:last", f"{run.folder}:best@0123456789abcdef", "pretrained"):
        code, _, err = bisam("train", *QUICK, "--data-dir", "absent", "--weights", given)
        assert code == 2
        assert "without effect, leave out: --data-dir" in err
    code, _, err = bisam("train", *QUICK, "--data-dir", "absent", "--weights", "absent.pt")
    assert code == 2
    assert "weights 'absent.pt' cannot be read" in err
