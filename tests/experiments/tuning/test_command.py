"""The command `bisam tune`: its files, its words, and what it refuses."""

from __future__ import annotations

import csv
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

pytest.importorskip("cyclopts")
pytest.importorskip("optuna")

from bisam.experiments.cli import app, tune
from bisam.experiments.recipes.config import read
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.tuning import launch
from tests.test_pages import blocks, commands

FAST = ("tune", "--method", "sam", "--epochs", 2, "--log", "tensorboard")


@pytest.fixture
def here(trained, monkeypatch, tmp_path):
    """The working folder; no data is loaded."""
    monkeypatch.setattr(tune, "_check", lambda recipe, machine: None)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_search_writes_its_report_and_a_recipe_that_train_reads(bisam, here):
    given = ("--noise", 0.4, "--search", "rho=0.05,0.1,2", "--sampler", "grid", "--seeds-per-trial", 2)
    code, out, err = bisam(*FAST, *given, "--workers", 1, "--out", "a b")
    assert (code, err) == (0, "")
    assert "The best of 3 trials (1 diverged) has a validation accuracy of 60.0" in out
    assert "rho 0.1 (trial 1)" in out
    again = "for seed in 2 3 4 5 6; do bisam train --config 'a b/best.toml' --seed $seed; done"
    assert again in out.splitlines()
    folder = here / "a b"
    best = read(folder / "best.toml")
    assert best == replace(Recipe(method="sam", epochs=2, noise=0.4, rho=0.1), seed=2)
    assert bisam("train", "--config", folder / "best.toml", "--save-config", here / "c.json")[0] == 0
    assert read(here / "c.json") == best
    names = {
        "best.toml",
        "history.png",
        "optuna.db",
        "report.html",
        "report.md",
        "settings.png",
        "trials",
        "trials.csv",
    }
    assert {path.name for path in folder.iterdir()} - {".lock"} == names
    page = (folder / "report.md").read_text()
    assert again in page
    assert "too high as an estimate" in page
    assert "diverged: the loss is not finite from epoch 2 on" in page
    rows = list(csv.DictReader((folder / "trials.csv").read_text().splitlines()))
    assert [row["state"] for row in rows] == ["complete", "complete", "diverged"]
    for text in (out, page, (folder / "trials.csv").read_text()):
        assert not re.search(r"test (accuracy|score)|test_", text)


def test_the_same_command_shows_the_same_report_and_another_one_is_refused(bisam, here, trained):
    code, first, _ = bisam(*FAST, "--trials", 2, "--workers", 1)
    assert code == 0
    (folder,) = (here / "runs" / "tune").iterdir()
    assert folder.name.startswith("sam-noise-0-")
    count = len(trained)
    code, second, _ = bisam(*FAST, "--trials", 2, "--workers", 1)
    assert (code, len(trained)) == (0, count)
    assert second.splitlines()[-5:] == first.splitlines()[-5:]
    code, _, err = bisam(*FAST, "--trials", 2, "--search", "rho=0.1:2:log", "--out", folder)
    assert code == 2
    assert "belongs to another search (--search rho is 0.005:1:log there and 0.1:2:log here): give another --out" in err


def test_ctrl_c_is_one_line_that_says_what_goes_on(bisam, here, monkeypatch):
    usual = signal.getsignal(signal.SIGINT)

    def interrupt(self, trial, trials):
        self._see(trials)
        if trial.number == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr("bisam.experiments.cli.progress.TrialsDisplay.ended", interrupt)
    try:
        code, _, err = bisam(*FAST, "--trials", 5, "--workers", 1, "--pruner", "none")
    finally:
        signal.signal(signal.SIGINT, usual)
    assert code == 130
    assert re.fullmatch(
        r"interrupted: 2 of 5 trials are finished \(best [\d.]+ %, trial [01]\); the same .* others\n", err
    )


def test_a_search_in_which_nothing_succeeds_says_why(bisam, here, monkeypatch):
    def fails(run, machine, on_epoch):
        raise ValueError("it is broken")

    monkeypatch.setattr(launch, "validate", fails)
    code, _, err = bisam(*FAST, "--workers", 1)
    assert (code, err) == (2, "bisam: trial 0 and 2 more failed: it is broken; the same command tries again\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--trials", 0), "--trials must be at least 1, got 0"),
        (("--seeds-per-trial", 0), "--seeds-per-trial must be at least 1"),
        (("--workers", 0), "--workers must be at least 1"),
        (("--timeout", "soon"), "--timeout: 'soon' is no duration above 0: write seconds, or as in 1h30m"),
        (("--max-time", "1h"), "--timeout is the time after which a search begins no further trial"),
        (("--rho", 0.1, "--search", "rho=0.1:1"), "--rho and --search rho are both given: leave one out"),
        (("--search", "rho=0.1"), "has one value: write a range"),
        (("--search", "cutout=true,false"), "--search cutout (needs dataset cifar10 or cifar100, got digits)"),
        (
            ("--method", "sgd", "--optimizer", "adamw", "--search", "momentum=0.5:0.9"),
            "--search momentum (needs an optimizer with momentum, got adamw",
        ),
        (("--method", "SAM(0.1)"), "what is searched?"),
        (("--method", "SAM(L2({r}))"), "--method has {r}, and no --search: add --search r=0.01:1:log"),
        (("--method", "SAM(L2({r}))", "--search", "r=-1:1"), "rho must be non-negative"),
        (("--method", "sam", "--mu", 3), "mu is no setting of the method sam"),
        (("--devices", 2), "--devices 2: a trial uses one device"),
        (("--config", "nowhere.toml"), "nowhere.toml cannot be read"),
        (("--sampler", "bayes"), "unknown sampler 'bayes'"),
        (("--quiet", "--verbose"), "leave one out"),
        (("--dataset", "digit"), "did you mean 'digits'"),
        (("--dataset", "cifar10", "--data-dir", "nowhere"), "--data-dir nowhere is not there"),
        (("--train-examples", 10**6), "train_examples must be at most"),
        (("--trial", 3), "Did you mean --trials?"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(bisam, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = bisam("tune", *arguments)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert message in err
    assert not list(tmp_path.iterdir())


def test_without_the_extra_the_command_says_what_to_install(bisam, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, err = bisam("tune", "--out", tmp_path / "a")
    assert (code, err) == (2, "bisam: bisam tune needs optuna: pip install 'bisam[tune]'\n")


# The page.

PAGE = "docs/tuning.md"


def test_the_searches_of_the_page_are_searches():
    found = 0
    for block in blocks(PAGE):
        for program, *words in commands(block.code) if block.language == "shell" else []:
            if program != "bisam":
                continue
            command, bound, _ = app.parse_args(words, exit_on_error=False, print_error=False)
            assert command.__name__ == words[0]
            if words[0] == "tune":
                given = bound.arguments
                names = ("search", "sampler", "pruner", "seeds_per_trial")
                defaults = {"search": (), "sampler": "tpe", "pruner": "median", "seeds_per_trial": 1}
                rest = [given.get(name, defaults[name]) for name in names]
                assert tune.described(given["flags"], given.get("preset"), None, *rest).space
                found += 1
    assert found >= 4


def test_the_code_of_the_page_reads_a_search(here, bisam):
    assert bisam(*FAST, "--trials", 2, "--workers", 1, "--out", "runs/tune/noisy")[0] == 0
    (block,) = [block for block in blocks(PAGE) if block.language == "python"]
    names = {}
    exec(compile(block.code, PAGE, "exec"), names)
    names["study"]._storage._backend.engine.dispose()
    assert names["study"].best_value == pytest.approx(max(trial.value for trial in names["study"].trials))


# With processes.

RUN = (
    "--method",
    "sam",
    "--model",
    "mlp",
    "--limit",
    200,
    "--epochs",
    3,
    "--search",
    "rho=0.05,0.2",
    "--sampler",
    "grid",
)


@pytest.mark.slow
def test_a_search_that_is_killed_goes_on_and_its_best_recipe_is_tested(bisam, tmp_path):
    flags = [*map(str, RUN), "--workers", "2", "--out", str(tmp_path / "a")]
    process = subprocess.Popen([sys.executable, "-m", "bisam", "tune", *flags])
    while not list(tmp_path.glob("a/trials/*/seed-0/metrics.csv")):
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    code, out, err = bisam("tune", *flags)
    assert (code, err) == (0, "")
    assert "The best of 2 trials has a validation accuracy of" in out
    assert not list(tmp_path.glob("a/trials/*/*/result.json"))
    assert not list(tmp_path.glob("a/trials/*/*/checkpoint-previous.pt"))
    straight = bisam("tune", *RUN, "--workers", 2, "--out", tmp_path / "b")[1]
    of = re.compile(r"The best of .*")
    assert of.search(out)[0] == of.search(straight)[0]
    code, out, _ = bisam("train", "--config", tmp_path / "a" / "best.toml", "--out", tmp_path)
    assert (code, "test accuracy" in out) == (0, True)


def test_a_search_without_a_complete_trial_has_exit_code_1(bisam, here):
    code, out, err = bisam(*FAST, "--search", "rho=2,3", "--sampler", "grid", "--workers", 1)
    assert (code, err) == (1, "")
    assert "No trial of 2 is complete (2 diverged)." in out
