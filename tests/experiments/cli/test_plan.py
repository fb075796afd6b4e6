"""`bisam run STUDY --dry-run`: the runs at once, then their times."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from dataclasses import replace

import pytest
from filelock import FileLock

from bisam.experiments.cli.plan import show_runs, show_times
from bisam.experiments.cli.study import StudySubject
from bisam.experiments.cli.subjects import SUBJECTS
from bisam.experiments.launch.estimate import Estimate
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs.folder import Run
from bisam.experiments.runs.machine import Machine
from bisam.experiments.studies import STUDIES
from bisam.experiments.studies.study import Study
from bisam.experiments.training.train import train

SAM = Recipe(method="sam", rho=0.4, epochs=1)
LOG = replace(SAM, method="bisam_log")
estimates = importlib.import_module("bisam.experiments.launch.estimate")

HEAVY = {
    *("datasets", "lightning_fabric", "lightning", "matplotlib", "pandas", "PIL", "ray", "scipy", "sklearn"),
    *("tensorboard", "timm", "torchvision", "transformers", "torch._dynamo", "torch._inductor"),
}
"""Packages that take from a second to many to import."""

AT_FIRST_LINE = """
import sys

class Stopped(BaseException): pass

class Watched:
    encoding = "utf-8"
    def write(self, text):
        if text.strip():
            sys.stderr.write(text.splitlines()[0] + "\\n" + " ".join(set(sys.modules) & set(sys.argv[2].split())))
            raise Stopped
        return len(text)
    def flush(self): pass
    def isatty(self): return False

from bisam.experiments.recipes import expressions
import torch
from torch import nn

def built(*args, **kwargs):
    raise AssertionError("something is built before the first line")

nn.Module.__init__ = torch.optim.Optimizer.__init__ = expressions.take_steps = built
from bisam.experiments import cli
from bisam.experiments.cli import terminal
terminal.console.file = Watched()
study = sys.argv[1].split()
try:
    cli.app(["run", *study, "--dry-run"], exit_on_error=False, print_error=False)
except Stopped:
    sys.exit(0)
sys.exit("nothing was printed")
"""


def at_first_line(tmp_path, *studies: str) -> dict[str, tuple[str, set[str]]]:
    """For each study the first line of its plan, and the heavy packages that are imported by then."""
    running = {
        study: subprocess.Popen(
            [sys.executable, "-c", AT_FIRST_LINE, f"{study} --out {tmp_path}", " ".join(HEAVY)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "BISAM_DATA": str(tmp_path / "none")},
        )
        for study in studies
    }
    found = {}
    for study, process in running.items():
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
        first, _, imported = errors.partition("\n")
        found[study] = first, set(imported.split())
    return found


@pytest.mark.parametrize("name", ["table5"])
def test_nothing_is_built_or_imported_before_the_first_line(tmp_path, name):
    """Counted work, not seconds: no module, optimizer or step of a method, and none of the heavy packages."""
    ((first, imported),) = at_first_line(tmp_path, name).values()
    columns = ["dataset", "model", "method", "rho", "noise", "epochs", "runs", "left"]
    analysed = ["analyses", "left"] if STUDIES[name].analyses else []
    assert first.split() == columns + analysed
    assert imported == set()
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDIES)
def test_nothing_is_built_or_imported_before_the_first_line_of_any_study(tmp_path, name):
    test_nothing_is_built_or_imported_before_the_first_line(tmp_path, name)


@pytest.mark.parametrize("name", STUDIES)
def test_the_plan_of_every_study_needs_no_data_and_builds_nothing(bisam, tmp_path, monkeypatch, name):
    def built(*_):
        raise AssertionError("an estimate was made")

    monkeypatch.setattr(estimates, "estimate", built)
    code, out, err = bisam("run", name, "--dry-run", "--no-estimate", "--data-dir", tmp_path, "--out", tmp_path / "o")
    datasets = list(dict.fromkeys(recipe.dataset for recipe in STUDIES[name].recipes(None)))
    if {dataset.partition(":")[0] for dataset in datasets} <= {"digits", "text"}:
        assert (code, out) == (2, "")
        assert f"--data-dir (needs a dataset or weights in that folder, got {datasets[0]}" in err
        code, out, err = bisam("run", name, "--dry-run", "--no-estimate", "--out", tmp_path / "o")
    study = STUDIES[name]
    runs = len(study.recipes(None)) * study.seeds
    assert (code, err) == (0, "")
    analyses = "" if study.analyses is None else f", and the analyses of {runs}"
    assert out.endswith(f"{runs} of {runs} runs of {name} are left{analyses}\n")
    assert not list(tmp_path.iterdir())


def test_runs_are_printed_before_the_first_estimate_and_times_one_by_one(bisam, tmp_path, monkeypatch, capsys):
    printed: list[str] = []

    def estimated(recipe, machine):
        printed.append(capsys.readouterr().out)
        return Estimate(2.0, 60.0 * len(printed))

    monkeypatch.setattr(estimates, "estimate", estimated)
    train(Run.under(tmp_path / "digits", replace(SAM, noise=0.4)))
    code, out, _ = bisam("run", "digits", "--epochs", 1, "--seeds", 1, "--workers", 3, "--dry-run", "--out", tmp_path)
    assert code == 0
    assert len(printed) == 9  # the finished run needs no estimate
    assert printed[0].count("1 of 1") == 9
    assert printed[0].count("0 of 1") == 1
    assert printed[1] == "label noise 0 %, SGD (2× epochs): 2 gradients per step, 1 run: 60 s\n"
    assert printed[2] == "label noise 0 %, SAM: 2 gradients per step, 1 run: 2 min\n"
    assert out.splitlines()[-1] == "9 of 10 runs of digits are left, about 15 min in 3 processes"


def test_a_missing_estimate_is_said_once_and_the_others_go_on(monkeypatch, capsys):
    costs = {SAM: Estimate(2.0, None, "there are no digits"), LOG: Estimate(1.0, 3.0)}
    monkeypatch.setattr(estimates, "estimate", lambda recipe, _: costs[replace(recipe, noise=0.0)])
    assert show_times({SAM: 1, replace(SAM, noise=0.2): 2, LOG: 2}, Machine()) is None
    captured = capsys.readouterr()
    assert captured.err == "bisam: no estimate: there are no digits\n"
    assert "2 runs: ?" in captured.out
    assert "BiSAM (-log): 1 gradient per step, 2 runs: 6 s" in captured.out
    assert show_times({LOG: 2}, Machine()) == 6.0


def test_a_finished_study_is_not_measured(bisam, tmp_path, monkeypatch):
    monkeypatch.setattr(estimates, "estimate", lambda *_: 1 / 0)
    for recipe in STUDIES["digits"].changed(1, ("limit=64",)):
        train(Run.under(tmp_path / "digits", recipe))
    arguments = ("run", "digits", "--epochs", 1, "--set", "limit=64", "--seeds", 1, "--dry-run", "--out", tmp_path)
    code, out, err = bisam(*arguments)
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == "0 of 10 runs of digits are left"


def test_a_damaged_run_is_left_and_named(tmp_path, capsys):
    run = Run.under(tmp_path, SAM)
    run.folder.mkdir(parents=True)
    (run.folder / "result.json").write_text("{")
    assert show_runs([SAM], tmp_path) == ({SAM: 1}, 0)
    assert "result.json is damaged" in capsys.readouterr().err
    with FileLock(run.folder / ".lock"):  # another process trains: it is left
        assert show_runs([LOG], tmp_path) == ({LOG: 1}, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--device", "tpu9"), "device 'tpu9' is unknown or not available"),
        (("--set", "model=x"), "unknown model 'x'"),
        (("--set", "dataset=x", "--no-estimate"), "unknown dataset 'x'"),
        (("--set", "dataset=folder:nowhere"), "no estimate: "),
    ],
)
def test_what_cannot_be_measured_is_one_line(bisam, tmp_path, arguments, message):
    code, out, err = bisam("run", "digits", "--seeds", 1, "--dry-run", *arguments, "--out", tmp_path)
    assert "runs left" in out
    assert err.count("\n") == 1
    assert message in err
    assert code == (0 if message.startswith("no estimate") else 2)  # a folder may be made later


def test_a_method_that_cannot_take_the_batches_is_said_after_the_runs(bisam, tmp_path, monkeypatch):
    one = Study("one", "One", lambda _: [Recipe(method="KSAM(8)")], seeds=1)
    monkeypatch.setitem(SUBJECTS, "one", StudySubject(one))
    code, out, err = bisam("run", "one", "--set", "batch_size=4", "--dry-run", "--out", tmp_path)
    assert (code, err.count("\n")) == (2, 1)
    assert "KSAM(8)" in out
    assert "k is 8, and the batch has only 4" in err


# Settings in a file

PLAN = ("run", "digits", "--seeds", 1, "--dry-run", "--no-estimate")


@pytest.mark.parametrize("name", ["a.toml", "a.json"])
def test_a_file_changes_the_recipes_as_set_does(bisam, tmp_path, name):
    setting = ("--limit", 96, "--epochs", 3, "--noise", 0.2, "--model", "mlp")
    bisam("train", "--method", "sam", "--rho", 0.1, *setting, "--save-config", tmp_path / name)
    code, planned, err = bisam(*PLAN, "--config", tmp_path / name)
    assert code == 0
    assert err == f"bisam: {tmp_path / name}: without effect is method, rho, seed, of which a study has its own\n"
    changes = ("limit=96", "noise=0.2", "model=mlp", "momentum=0.9", "weight_decay=0.0005")
    sets = [part for change in changes for part in ("--set", change)]
    assert planned == bisam(*PLAN, *sets, "--epochs", 3)[1]
    for given in (("--epochs", 2), ("--set", "epochs=2")):
        assert bisam(*PLAN, "--config", tmp_path / name, *given)[1] == bisam(*PLAN, *sets, "--epochs", 2)[1]


def test_runs_of_a_file_are_found_by_the_same_file(bisam, tmp_path):
    file, out = tmp_path / "short.toml", tmp_path / "runs"
    file.write_text("epochs = 1\nlimit = 96\n")
    (recipe,) = [one for one in STUDIES["digits"].changed(1, ["limit=96"]) if (one.method, one.noise) == ("sam", 0)]
    train(Run.under(out / "digits", recipe), Machine(log=()))
    assert "9 of 10 runs of digits are left" in bisam(*PLAN, "--config", file, "--out", out)[1]
    for command in (("report",), ("archive",), ("plot", "curves")):
        to = ("--to", tmp_path / "a.png") if command[0] == "plot" else ()
        code, _, err = bisam(*command, "digits", "--config", file, "--out", out, *to)
        assert (code, err) == (0, "")


def test_a_file_that_is_no_setting_is_one_line(bisam, tmp_path):
    file = tmp_path / "a.toml"
    for content, message in (
        ("epoch = 1", f"{file}: unknown field of a recipe 'epoch', did you mean 'epochs'? Try bisam train --help"),
        ("[machine]\ndevice = 'cpu'", f"{file}: unknown field of a recipe 'machine': try bisam train --help"),
        ("schedule = 'steps'", "unknown schedule 'steps', available: "),
        ("limit = 'many'", f"{file}: limit: 'many' is not a whole number"),
    ):
        file.write_text(content)
        code, _, err = bisam(*PLAN, "--config", file)
        assert (code, err.count("\n")) == (2, 1)
        assert message in err
    assert "without effect are --config" in bisam("run", "figure1", "--dry-run", "--config", file)[2]
