"""A run: its files, interruptions, and folders that are damaged or of another recipe."""

from __future__ import annotations

import csv
import errno
import io
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from filelock import FileLock

from bisam.experiments.errors import RunError
from bisam.experiments.launch import processes
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs import files
from bisam.experiments.runs.folder import Run, finished
from bisam.experiments.runs.machine import Machine
from bisam.experiments.training.train import train
from tests.support.doubles import Silent

SHORT = Recipe(method="bisam_log", noise=0.4, rho=0.4, epochs=3, batch_size=256)
KILLED = """
import os, signal, sys
from pathlib import Path
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs.folder import Run
from bisam.experiments.training.train import train

calls, replace = 0, Path.replace
def replaced(path, target):
    global calls
    calls += target.name == sys.argv[2]
    if calls == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(path, target)
Path.replace = replaced
train(Run.under(Path(sys.argv[1]), Recipe(method="bisam_log", noise=0.4, rho=0.4, epochs=3, batch_size=256)))
"""


@pytest.fixture
def run(tmp_path):
    return Run.under(tmp_path, SHORT)


def weights(run: Run) -> dict:
    return {k: v for k, v in run.checkpoint()["sharp"].items() if isinstance(v, torch.Tensor)}


def same_outcome(a: Run, b: Run) -> bool:
    skip = {"seconds_per_epoch", "relative_time", "finished", "metrics", "checksum"}  # times, and what holds them
    results = [{k: v for k, v in r.result.items() if k not in skip} for r in (a, b)]
    histories = [
        [{k: v for k, v in row.items() if k not in ("seconds", "relative_time")} for row in r.checkpoint()["history"]]
        for r in (a, b)
    ]
    ours, theirs = weights(a), weights(b)
    same = all(torch.equal(ours[k], theirs[k]) for k in ours)
    return results[0] == results[1] and histories[0] == histories[1] and same


def test_a_run_leaves_recipe_metrics_checkpoint_and_result(run):
    result = train(run)
    assert {p.name for p in run.folder.iterdir()} >= {"recipe.json", "metrics.csv", "checkpoint.pt", "result.json"}
    assert not list(run.folder.glob("*.tmp"))
    rows = list(csv.DictReader(io.StringIO((run.folder / "metrics.csv").read_text())))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert 0 <= result["test_last"] <= 1
    assert {"torch", "python", "hardware", "commit", "bisam"} <= result.keys()
    assert run.folder.parent.name == SHORT.slug


def test_a_finished_run_is_not_run_again(run, monkeypatch):
    first = train(run)
    monkeypatch.setattr("bisam.experiments.training.train.train_epoch", lambda *_: pytest.fail("it ran again"))
    assert train(run) == first


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_an_interrupted_run_resumes_to_the_same_bits(tmp_path, stop_after):
    whole, broken = Run.under(tmp_path / "a", SHORT), Run.under(tmp_path / "b", SHORT)
    train(whole)

    def interrupt(row):
        if row["epoch"] == stop_after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(broken, on_epoch=interrupt)
    assert broken.result is None
    train(broken)
    assert same_outcome(whole, broken)


@pytest.mark.parametrize(
    ("file", "call", "kept"),
    [
        ("checkpoint.pt", 2, 1),
        pytest.param("metrics.csv", 2, 1, marks=pytest.mark.slow),
        pytest.param("checkpoint.pt", 3, 2, marks=pytest.mark.slow),
        pytest.param("metrics.csv", 3, 2, marks=pytest.mark.slow),
        pytest.param("result.json", 1, 3, marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_resumes_to_the_same_bits(tmp_path, file, call, kept):
    """Killed with a file written but not yet in its place."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = subprocess.run([sys.executable, "-c", KILLED, tmp_path, file, str(call)], env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    broken, whole = Run.under(tmp_path, SHORT), Run.under(tmp_path / "whole", SHORT)
    assert broken.result is None
    assert len(broken.checkpoint()["history"]) == kept
    assert list(broken.folder.glob(".*.tmp"))
    train(broken)
    assert not list(broken.folder.glob(".*.tmp"))
    train(whole)
    assert same_outcome(whole, broken)
    metrics = [[row["flipped"] for row in next(finished(root)).metrics] for root in (tmp_path, tmp_path / "whole")]
    assert metrics[0] == metrics[1]
    assert len(metrics[0]) == SHORT.epochs


def test_a_run_in_use_is_refused(run):
    run.folder.mkdir(parents=True)
    with FileLock(run.folder / ".lock"), pytest.raises(RunError, match="in use by another process"):
        train(run)


def test_a_folder_of_another_recipe_is_refused_and_left_alone(run):
    train(run)
    other = Run(run.folder, replace(SHORT, rho=0.1))
    before = (run.folder / "result.json").read_bytes()
    with pytest.raises(RunError, match=r"another recipe \(rho=0\.4 there, 0\.1 here\)"):
        train(other)
    assert (run.folder / "result.json").read_bytes() == before


@pytest.mark.parametrize("name", ["recipe.json", "result.json", "checkpoint.pt"])
@pytest.mark.parametrize("content", [b"", b"\x00garbage", b"[1]"])
def test_a_damaged_folder_is_named(run, name, content):
    train(run)
    if name == "checkpoint.pt":
        (run.folder / "result.json").unlink()
    (run.folder / name).write_bytes(content)
    with pytest.raises(RunError, match=rf"{name} is damaged .*delete .*other runs are not affected"):
        train(run)


def test_a_full_disk_leaves_the_last_epoch(run, monkeypatch):
    def full(path, mode):
        file = open(path, mode)  # noqa: SIM115
        if path.name.startswith(".checkpoint") and run.checkpoint() is not None:
            file.write(b"a part")
            file.close()
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return file

    monkeypatch.setattr(files, "open", full, raising=False)
    with pytest.raises(OSError, match="No space left"):
        train(run)
    assert len(run.checkpoint()["history"]) == 1
    assert not list(run.folder.glob(".*.tmp"))
    monkeypatch.undo()
    train(run)
    assert run.result is not None


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path):
    theirs, ours = Run.under(tmp_path, SHORT), Run.under(tmp_path, replace(SHORT, method="sam", rho=0.1))
    train(theirs)
    ours.folder.mkdir(parents=True)
    shutil.copy(theirs.folder / "checkpoint.pt", ours.folder)
    with pytest.raises(
        RunError, match=r"checkpoint.pt belongs to another recipe \(method='bisam_log' there, 'sam' here"
    ):
        train(ours)
    assert ours.result is None


def test_a_result_in_another_recipes_folder_is_not_taken_for_its_own(tmp_path):
    train(Run.under(tmp_path, SHORT))
    other = replace(SHORT, rho=0.1)
    Run.under(tmp_path, SHORT).folder.parent.rename(tmp_path / other.slug)
    (outcome,) = processes.run_all([other], tmp_path, workers=1, machine=Machine(), progress=Silent())
    assert "belongs to another recipe" in outcome.error


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler")
def test_a_compiled_run_resumes_to_the_same_bits(tmp_path):
    """In a fresh process, whose first batch is another than in the one that was interrupted."""
    recipe = replace(SHORT, compile=True, epochs=2, batch_size=64, limit=150)
    code = (
        "import sys; from pathlib import Path; from bisam.experiments.recipes.recipe import Recipe; "
        "from bisam.experiments.runs.folder import Run; from bisam.experiments.training.train import train\n"
        "class Stop(Exception): pass\n"
        "def each(row):\n"
        "    if row['epoch'] == int(sys.argv[2]): raise Stop\n"
        f"try: train(Run.under(Path(sys.argv[1]), {recipe!r}), on_epoch=each)\n"
        "except Stop: pass\n"
    )
    for name, last in (("a", 9), ("b", 1), ("b", 9)):
        subprocess.run([sys.executable, "-c", code, tmp_path / name, str(last)], check=True)
    assert same_outcome(Run.under(tmp_path / "a", recipe), Run.under(tmp_path / "b", recipe))
