"""`--stats`: means of the statistics of the steps of each epoch, in a file of their own and in the loggers."""

from __future__ import annotations

import csv
import json
import shutil

import pytest
import torch

from bisam.experiments.errors import RunError
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs.folder import Run
from bisam.experiments.runs.machine import Machine
from bisam.experiments.training import epoch as epochs
from bisam.experiments.training.train import train
from bisam.statistics import NAMES, StepStats
from tests.experiments.training.test_loggers import tensorboard

SHORT = Recipe(method="bisam_log", noise=0.4, rho=0.4, epochs=3, batch_size=256, limit=512)
QUIET, STATS = Machine(log=()), Machine(log=(), stats=True)
TIMES = {"seconds", "relative_time"}


def rows(run: Run, name: str = "stats.csv") -> list[dict[str, str]]:
    return list(csv.DictReader((run.folder / name).read_text().splitlines()))


def stop_after(last: int):
    def interrupt(row):
        if row["epoch"] == last:
            raise KeyboardInterrupt

    return interrupt


def metrics(run: Run) -> list[dict[str, float]]:
    return [{k: v for k, v in row.items() if k not in TIMES} for row in run.metrics()]


def test_a_run_has_the_means_of_its_steps_and_the_same_metrics(tmp_path, monkeypatch):
    each: list[StepStats] = []

    class Mean(epochs.StatsMean):
        def add(self, stats):
            each.append(stats)
            super().add(stats)

    monkeypatch.setattr("bisam.experiments.training.train.StatsMean", Mean)
    run, plain = Run.under(tmp_path / "a", SHORT), Run.under(tmp_path / "b", SHORT)
    train(run, STATS)
    train(plain, QUIET)
    assert metrics(run) == metrics(plain)
    assert run.metrics()[0].keys() == plain.metrics()[0].keys()
    assert not (plain.folder / "stats.csv").exists()
    assert plain.stats() == []
    found = run.stats()
    assert [row["epoch"] for row in found] == [1, 2, 3]
    steps = len(each) // 3
    for row in found:
        own = each[steps * int(row["epoch"] - 1) : steps * int(row["epoch"])]
        for name in NAMES:
            expected = torch.stack([getattr(stats, name).double() for stats in own]).mean().item()
            assert row[name] == pytest.approx(expected, rel=1e-5)
        assert row["displacement_norm"] == pytest.approx(0.4, rel=1e-5)
    a, b = run.checkpoint(), plain.checkpoint()
    for name, weight in a["sharp"].items():
        assert not isinstance(weight, torch.Tensor) or torch.equal(weight, b["sharp"][name])


def test_a_statistic_that_the_method_does_not_know_is_an_empty_cell(tmp_path):
    run = Run.under(tmp_path, Recipe(method="sgd", epochs=1, batch_size=256))
    train(run, STATS)
    (row,) = rows(run)
    assert list(row) == ["epoch", *NAMES]
    assert {name for name, value in row.items() if value} == {"epoch", "descent_norm"}
    assert run.stats()[0].keys() == {"epoch", "descent_norm"}


def test_a_run_is_resumed_with_or_without_them(tmp_path):
    whole, first, last = (Run.under(tmp_path / name, SHORT) for name in ("whole", "first", "last"))
    train(whole, STATS)
    text = (whole.folder / "stats.csv").read_text()
    for run, machine, other in ((first, STATS, QUIET), (last, QUIET, STATS)):
        with pytest.raises(KeyboardInterrupt):
            train(run, machine, stop_after(2))
        if run is first:  # as after a kill between this file and the checkpoint
            (run.folder / "stats.csv").write_text(text.replace("\n3,", "\n3,9"))
            shutil.copytree(run.folder, tmp_path / "killed" / run.folder.parent.name / run.folder.name)
        train(run, other)
        assert metrics(run) == metrics(whole)
    assert rows(first)[:2] == rows(whole)[:2]
    assert rows(last) == rows(whole)[2:]
    killed = Run.under(tmp_path / "killed", SHORT)
    train(killed, STATS)
    assert (killed.folder / "stats.csv").read_text() == text


DAMAGED = ["epoch,ascent_norm\n1,oops\n", "epoch,other\n1,2\n", "ascent_norm\n1\n", "epoch\n1.5\n", "\x00\n"]


def test_a_damaged_file_is_named_with_the_remedy_and_stops_no_run_without_it(tmp_path):
    run = Run.under(tmp_path, SHORT)
    with pytest.raises(KeyboardInterrupt):
        train(run, STATS, stop_after(1))
    for text in DAMAGED:
        (run.folder / "stats.csv").write_text(text)
        with pytest.raises(RunError, match=r"stats\.csv is damaged.*delete this file; the run is not affected"):
            train(run, STATS)
    pytest.importorskip("tensorboard")
    train(run, Machine(log=("tensorboard",)))
    assert [step for step, _ in tensorboard(run)["validation"]] == [1, 2, 3]


def test_loggers_get_them_and_the_epochs_that_they_have_missed(tmp_path):
    pytest.importorskip("tensorboard")
    run = Run.under(tmp_path, SHORT)
    with pytest.raises(KeyboardInterrupt):
        train(run, STATS, stop_after(2))
    train(run, Machine(log=("tensorboard",), stats=True))
    found = tensorboard(run)
    for name in NAMES:
        assert [(step, pytest.approx(value, rel=1e-6)) for step, value in found[name]] == [
            (int(row["epoch"]), row[name]) for row in run.stats()
        ]
    assert len(found["validation"]) == 3


def test_the_command_records_them(bisam, tmp_path):
    code, _, errors = bisam(
        *("train", "--method", "sam", "--epochs", 1, "--batch-size", 256, "--stats", "--log", "tensorboard"),
        *("--out", tmp_path),
    )
    assert (code, errors) == (0, "")
    (path,) = tmp_path.glob("train/*/seed-0/stats.csv")
    (row,) = csv.DictReader(path.read_text().splitlines())
    assert float(row["displacement_norm"]) == pytest.approx(0.05, rel=1e-4)
    recipe = json.loads((path.parent / "recipe.json").read_text())
    assert "stats" not in recipe


@pytest.mark.slow
def test_two_processes_have_the_mean_over_both(tmp_path):
    run = Run.under(tmp_path, Recipe(method="sam", epochs=1, batch_size=256))
    train(run, Machine(log=(), devices=2, stats=True))
    (row,) = run.stats()
    assert row["displacement_norm"] == pytest.approx(0.05, rel=1e-4)
    assert row.keys() == {"epoch", *NAMES}
