"""Folders: a run whose folder is deleted, moved or replaced while it trains."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from bisam.experiments.errors import RunError
from bisam.experiments.launch.work import train_or_explain
from bisam.experiments.runs.files import to_csv
from bisam.experiments.runs.folder import Run
from bisam.experiments.runs.machine import Machine
from bisam.experiments.training.train import Training, train
from tests.experiments.runs.conftest import MACHINE, RECIPE

GONE = "was deleted, moved or replaced while the run was in progress: training stopped"


def delete(folder: Path) -> None:
    shutil.rmtree(folder)


def move(folder: Path) -> None:
    folder.rename(folder.with_name("moved"))


def replace(folder: Path) -> None:
    """The folder is deleted, and another process has made it again and trains in it."""
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / ".lock").touch()


def remove_the_lock(folder: Path) -> None:
    (folder / ".lock").unlink()


def make_again(folder: Path) -> None:
    """Like `replace`, with the files of the other process."""
    replace(folder)
    (folder / "checkpoint.pt").write_bytes(b"theirs")


CHANGES = [delete, move, replace, remove_the_lock, make_again]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def run(tmp_path) -> Run:
    return Run.under(tmp_path, RECIPE)


@pytest.mark.parametrize("log", [(), ("tensorboard",)], ids=["", "tensorboard"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("at", [1, 2])
def test_a_folder_that_changes_during_an_epoch_ends_the_run_in_one_line(run, monkeypatch, tmp_path, log, change, at):
    epoch, found = Training.epoch, {}

    def changed(self, number):
        row = epoch(self, number)
        if number == at:
            change(run.folder)
            found.update(files(tmp_path))
        return row

    monkeypatch.setattr(Training, "epoch", changed)
    with pytest.raises(RunError, match=GONE) as raised:
        train(run, Machine(log=log))
    assert "\n" not in str(raised.value)
    assert files(tmp_path) == found  # nothing was written


@pytest.mark.parametrize("change", CHANGES)
def test_a_folder_that_changes_before_the_result_ends_the_run_in_one_line(run, monkeypatch, tmp_path, change):
    test, found = Training._test, {}

    def changed(self):
        result = test(self)
        change(run.folder)
        found.update(files(tmp_path))
        return result

    monkeypatch.setattr(Training, "_test", changed)
    with pytest.raises(RunError, match=GONE):
        train(run, MACHINE)
    assert files(tmp_path) == found


def test_a_folder_that_is_deleted_within_a_write_is_noticed(run):
    with run.open():
        writer = run.writer()
        check = writer.check

        def deleted():
            check()
            shutil.rmtree(run.folder)

        writer.check = deleted
        with pytest.raises(RunError, match=GONE):
            writer.metrics([{"epoch": 1.0}])
    assert not run.folder.exists()


def test_it_is_a_failure_as_others_for_a_study_and_on_the_command_line(run, monkeypatch, tmp_path, bisam):
    epoch = Training.epoch

    def changed(self, number):
        shutil.rmtree(self._run.folder)
        return epoch(self, number)

    monkeypatch.setattr(Training, "epoch", changed)
    outcome = train_or_explain(RECIPE, tmp_path, MACHINE)
    assert outcome.error is not None
    assert GONE in outcome.error
    code, _, err = bisam("train", "--epochs", 1, "--limit", 64, "--out", tmp_path)
    assert code == 2
    assert GONE in err
    assert len(err.strip().splitlines()) == 1


def test_another_run_in_the_same_folder_is_not_disturbed_by_the_end_of_the_first(run, monkeypatch):
    """The lock of the new folder is its own."""
    epoch = Training.epoch

    def changed(self, number):
        monkeypatch.setattr(Training, "epoch", epoch)
        shutil.rmtree(run.folder)
        train(run, MACHINE)
        return epoch(self, number)

    monkeypatch.setattr(Training, "epoch", changed)
    with pytest.raises(RunError, match=GONE):
        train(run, MACHINE)
    assert run.result is not None
    with run.open():
        pass


@pytest.mark.parametrize("damage", ["damaged", "ahead", "missing"])
def test_the_metrics_of_a_resumed_run_are_those_of_the_checkpoint(broken, monkeypatch, damage):
    """Before its first epoch, because loggers read them: they are ahead after a kill between the two files."""
    path = broken.folder / "metrics.csv"
    before, rows = path.read_text(), broken.metrics()
    match damage:
        case "damaged":
            path.write_text("epoch\n\0")
        case "ahead":
            path.write_text(to_csv([*rows, {**rows[-1], "epoch": 3}]))
        case _:
            path.unlink()
    epoch, seen = Training.epoch, []

    def observed(self, number):
        seen.append(path.read_text())
        return epoch(self, number)

    monkeypatch.setattr(Training, "epoch", observed)
    train(broken, MACHINE)
    assert seen == [before]
    assert [row["epoch"] for row in broken.metrics()] == [1, 2, 3]
