"""`--stats`: means of the statistics of the steps of each epoch, in a file of their own and in the loggers."""

from __future__ import annotations

import csv
import json

import pytest
import torch

from bisam.experiments.errors import RunError
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs.folder import Run
from bisam.experiments.runs.machine import Machine
from bisam.experiments.training import epoch as epochs, loggers
from bisam.experiments.training.train import train
from bisam.statistics import NAMES, StepStats
from tests.experiments.training.test_loggers import tensorboard

SHORT = Recipe(method="bisam_log", noise=0.4, rho=0.4, epochs=3, batch_size=256)
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


@pytest.mark.parametrize("first", [True, False])
def test_a_run_is_resumed_with_or_without_them(tmp_path, first):
    run, whole = Run.under(tmp_path / "a", SHORT), Run.under(tmp_path / "b", SHORT)
    train(whole, STATS)
    with pytest.raises(KeyboardInterrupt):
        train(run, STATS if first else QUIET, stop_after(2))
    train(run, QUIET if first else STATS)
    assert metrics(run) == metrics(whole)
    assert rows(run) == (rows(whole)[:2] if first else rows(whole)[2:])


def test_an_epoch_after_the_checkpoint_is_replaced(tmp_path):
    run, whole = Run.under(tmp_path / "a", SHORT), Run.under(tmp_path / "b", SHORT)
    train(whole, STATS)
    with pytest.raises(KeyboardInterrupt):
        train(run, STATS, stop_after(2))
    text = (whole.folder / "stats.csv").read_text()
    (run.folder / "stats.csv").write_text(text.replace("\n3,", "\n3,9"))  # as after a kill between the two files
    train(run, STATS)
    assert (run.folder / "stats.csv").read_text() == text


@pytest.mark.parametrize(
    "text", ["epoch,ascent_norm\n1,oops\n", "epoch,other\n1,2\n", "ascent_norm\n1\n", "epoch\n1.5\n"]
)
def test_a_damaged_file_is_named_with_the_remedy(tmp_path, text):
    run = Run.under(tmp_path, SHORT)
    with pytest.raises(KeyboardInterrupt):
        train(run, STATS, stop_after(1))
    (run.folder / "stats.csv").write_text(text)
    with pytest.raises(RunError, match=r"stats\.csv is damaged.*delete this file; the run is not affected"):
        train(run, STATS)
    train(run, QUIET)


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


def test_a_logger_drops_nothing_else_if_the_file_is_damaged(tmp_path):
    pytest.importorskip("tensorboard")
    run = Run.under(tmp_path, SHORT)
    with pytest.raises(KeyboardInterrupt):
        train(run, STATS, stop_after(1))
    (run.folder / "stats.csv").write_text("epoch\noops\n")
    board = loggers.FaultTolerantLogger("tensorboard", run.folder, SHORT.to_dict())
    with pytest.warns(UserWarning, match="--log tensorboard failed and is disabled"):
        board.log({"validation": 0.5}, 2)


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
