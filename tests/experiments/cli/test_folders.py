"""The folders of runs and data are checked first, and a finished command loads nothing that trains."""

from __future__ import annotations

import os

import pytest

pytest.importorskip("lightning_fabric")

from bisam.experiments.launch.work import train_or_explain
from bisam.experiments.runs.machine import Machine
from bisam.experiments.studies import STUDIES
from bisam.experiments.studies.study import expand
from tests.experiments.cli.test_start import loaded

CHANGES = ("limit=64", "batch_size=32")


def refused(bisam, *arguments: str) -> str:
    code, _, err = bisam(*arguments)
    assert code == 2
    (line,) = err.splitlines()
    return line


@pytest.mark.parametrize("command", [("train",), ("run", "digits")])
def test_an_output_folder_that_cannot_be_is_refused_at_once(command, tmp_path, bisam):
    (tmp_path / "file").write_text("")
    message = refused(bisam, *command, "--out", str(tmp_path / "file"))
    assert f"--out {tmp_path / 'file'} is a file" in message
    message = refused(bisam, *command, "--out", str(tmp_path / "file" / "runs"))
    assert f"cannot be made: {tmp_path / 'file'} is a file" in message
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("command", "flag", "name"),
    [
        (("report", "digits"), "--to", "page"),
        (("plot", "figure1"), "--to", "a.png"),
        (("archive", "digits"), "--to", "a.tar.xz"),
        (("methods",), "--to", "a.md"),
        (("tables",), "--to", "a.md"),
        (("evaluate", "gone.pt", "--model", "mlp", "--dataset", "digits"), "--to", "a.json"),
        (("predict", "gone.pt", "a.png", "--model", "mlp", "--dataset", "digits"), "--to", "a.csv"),
        (("analyse", "--weights", "gone.pt", "--model", "mlp", "--dataset", "digits"), "--out", "folder"),
        (("train",), "--save-config", "a.toml"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_place_for_results_that_cannot_be_is_refused_before_they_are_computed(command, flag, name, tmp_path, bisam):
    (tmp_path / "file").write_text("")
    message = refused(bisam, *command, flag, str(tmp_path / "file" / name))
    assert message.startswith(f"bisam: {flag} {tmp_path / 'file' / name} cannot be ")
    assert f"{tmp_path / 'file'} is a file" in message
    if flag == "--to" and name != "page" and not name.endswith((".png", ".xz")):
        (tmp_path / name).mkdir()
        assert f"{tmp_path / name} is a folder: give a file" in refused(bisam, *command, flag, str(tmp_path / name))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser may write everywhere")
def test_an_output_folder_without_permission_is_refused_at_once(tmp_path, bisam):
    tmp_path.chmod(0o500)
    assert "no permission" in refused(bisam, "train", "--out", str(tmp_path / "runs"))


def test_permission_is_asked_of_the_folder_that_is_there(tmp_path, bisam, monkeypatch):
    asked: list[object] = []

    def denied(path: object, _: int) -> bool:
        asked.append(path)
        return False

    monkeypatch.setattr(os, "access", denied)
    message = refused(bisam, "train", "--out", str(tmp_path / "new" / "runs"))
    assert f"no permission for {tmp_path}" in message
    assert asked == [tmp_path]


@pytest.mark.parametrize("command", [("train", "--dataset", "cifar10"), ("run", "table1", "--workers", "2")])
def test_a_folder_of_data_that_is_not_there_is_refused_before_a_process_starts(command, tmp_path, bisam):
    gone = str(tmp_path / "gone")
    message = refused(bisam, *command, "--data-dir", gone, "--out", str(tmp_path / "runs"))
    assert f"--data-dir {gone} is not there" in message
    assert "--download" in message
    (tmp_path / "file").write_text("")
    message = refused(bisam, *command, "--data-dir", str(tmp_path / "file"), "--out", str(tmp_path / "runs"))
    assert "is a file" in message
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("command", ["train", "tune"])
@pytest.mark.parametrize(
    ("name", "meant"),
    [("digit", "digits"), ("cifar01", "cifar10"), ("cifar10:small", "cifar10"), ("glue:sst", "glue:sst2")],
)
def test_a_misspelt_data_set_is_named_before_the_folder_of_data(command, name, meant, tmp_path, bisam):
    folders = ("--data-dir", str(tmp_path / "gone"), "--out", str(tmp_path / "runs"))
    message = refused(bisam, command, "--dataset", name, *folders)
    assert f"unknown dataset {name!r}, did you mean {meant!r}?" in message


def test_a_data_set_that_needs_no_folder_needs_none(tmp_path, bisam, monkeypatch):
    monkeypatch.chdir(tmp_path)  # there is no folder data here
    assert bisam("train", "--epochs", "1", "--limit", "64", "--quiet")[0] == 0


def test_a_finished_run_and_a_finished_study_load_nothing_that_trains(tmp_path, bisam):
    train = ("train", "--epochs", "1", "--limit", "64", "--out", str(tmp_path), "--quiet")
    code, first, _ = bisam(*train)
    study = STUDIES["digits"]
    for recipe in expand(study.changed(1, CHANGES), 1, study.first_seed):
        assert train_or_explain(recipe, tmp_path / study.folder, Machine(log=())).error is None
    changes = [part for change in CHANGES for part in ("--set", change)]
    study = ("run", "digits", "--seeds", "1", "--epochs", "1", *changes, "--out", str(tmp_path), "--quiet")
    codes, slow, _ = loaded(train, study)
    assert codes == ["0", "0"]
    assert "lightning_fabric" not in slow
    code, again, _ = bisam(*train)
    assert (code, again) == (0, "finished before: nothing is left to train\n" + first)
