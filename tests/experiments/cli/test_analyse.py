"""`bisam analyse`, and what it leaves in reports and figures."""

from __future__ import annotations

import inspect
import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bisam.experiments.analyses import catalogue
from bisam.experiments.cli.analyse import analyse, found_under
from bisam.experiments.models.build import build
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs.folder import Run
from bisam.experiments.runs.machine import Machine
from bisam.experiments.training.train import train

RECIPE = Recipe(method="sam", noise=0.4, rho=0.4, epochs=1, batch_size=32, limit=64)
FEW = ("--examples", 32, "--steps", 3, "--batch-size", 16)
QUICK = ("--what", "flips", "--examples", 32, "--batch-size", 16)


@pytest.fixture(scope="module")
def _trained(tmp_path_factory) -> Path:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("trained")
    for seed in (0, 1):
        train(Run.under(root, replace(RECIPE, seed=seed)), Machine(log=()))
    return root


@pytest.fixture
def out(_trained, tmp_path) -> Path:
    """A folder `runs` with two runs of the study digits."""
    shutil.copytree(_trained, tmp_path / "runs" / "digits")
    return tmp_path / "runs"


def of(out: Path, seed: int) -> Path:
    return Run.under(out / "digits", replace(RECIPE, seed=seed)).folder


def test_several_runs_get_a_file_figures_and_a_table(bisam, out):
    code, said, err = bisam("analyse", out / "digits", "--what", "flips,sharpness", *FEW)
    assert (code, err) == (0, "")
    assert "rho 0.05, 3 steps" in " ".join(said.split())
    for seed in (0, 1):
        assert f"{of(out, seed)}/: analysis.json, analysis/sharpness-rho-0.05-steps-3-" in said
        content = json.loads((of(out, seed) / "analysis.json").read_text())
        assert [entry["analysis"] for entry in content["entries"]] == ["sharpness", "flips"]
        files = sorted(path.name for path in (of(out, seed) / "analysis").iterdir())
        assert len(files) == 2
        assert all(name.endswith("-examples-32-batch-size-16-weights-last.png") for name in files)
    assert "seed-0" in said
    assert "seed-1" in said


def test_one_run_is_shown_with_all_numbers_and_a_second_call_computes_nothing(bisam, out, monkeypatch):
    code, said, _ = bisam("analyse", of(out, 0), *QUICK, "--rho", "0.1,0.2")
    assert code == 0
    for name in ("flips, SAM (rho 0.1)", "flips, SAM (rho 0.2)", "cosine, SAM and -log (rho 0.2)"):
        assert name in said
    written = (of(out, 0) / "analysis.json").read_bytes()
    figures = {path: path.stat().st_mtime_ns for path in (of(out, 0) / "analysis").iterdir()}
    monkeypatch.setattr("bisam.experiments.analyses.run.of_run", lambda *_: pytest.fail("computed again"))
    assert bisam("analyse", of(out, 0), *QUICK, "--rho", "0.1,0.2") == (0, said, "")
    assert (of(out, 0) / "analysis.json").read_bytes() == written
    assert {path: path.stat().st_mtime_ns for path in figures} == figures


def test_a_run_that_cannot_be_analysed_is_named_and_the_others_go_on(bisam, out):
    (of(out, 0) / "checkpoint.pt").unlink()
    code, said, err = bisam("analyse", out, *QUICK)
    assert (code, err.count("\n")) == (1, 1)
    assert f"{of(out, 0)} has no checkpoint.pt" in err
    assert f"{of(out, 1)}/: analysis.json" in said
    (of(out, 1) / "checkpoint.pt").unlink()
    (of(out, 1) / "analysis.json").write_text("{")
    code, said, err = bisam("analyse", of(out, 0), of(out, 1), *QUICK)
    assert (code, said, err.count("\n")) == (2, "", 2)
    assert "analysis.json is damaged" in err


def test_the_same_error_of_several_runs_is_one_line(bisam, out):
    code, _, err = bisam("analyse", out, "--what", "zero-one", "--steps", 2, "--examples", 32)
    assert (code, err.count("\n")) == (2, 1)
    assert "and 1 more: zero-one: steps=2 are fewer than the 3 objectives" in err


def test_an_analysis_that_cannot_be_made_is_named_and_the_others_are_saved(bisam, out):
    code, said, err = bisam("analyse", of(out, 0), "--what", "sharpness,zero-one,flips", "--steps", 2, *FEW[:2])
    assert (code, err.count("\n")) == (1, 1)
    assert f"{of(out, 0)}: zero-one: steps=2 are fewer than the 3 objectives" in err
    assert [e["analysis"] for e in json.loads((of(out, 0) / "analysis.json").read_text())["entries"]] == [
        "sharpness",
        "flips",
    ]
    assert "analysis.json, analysis/sharpness" in said


def test_an_interruption_is_one_line_and_what_is_measured_stays(bisam, out, monkeypatch):
    flips = catalogue.ANALYSES["flips"]

    def interrupted(*_):
        raise KeyboardInterrupt

    stops = replace(flips, measures={"flips": replace(flips.measures["flips"], call=interrupted)})
    monkeypatch.setitem(catalogue.ANALYSES, "flips", stops)
    code, _, err = bisam("analyse", out, "--what", "flips,zero-one", *FEW)
    assert (code, err) == (130, "interrupted: finished analyses are saved; the same command resumes after them\n")
    assert [e["analysis"] for e in json.loads((of(out, 0) / "analysis.json").read_text())["entries"]] == ["zero-one"]
    assert not (of(out, 1) / "analysis.json").exists()


@pytest.mark.parametrize("swallowed", ["as another error", "whole"])
def test_ctrl_c_is_noticed_where_torch_makes_another_error_of_it(bisam, out, monkeypatch, swallowed):
    flips = catalogue.ANALYSES["flips"]

    def interrupted(subject, settings, progress):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            if swallowed != "whole":
                raise RuntimeError("The following operation failed in the TorchScript interpreter") from None
        progress(1, 2)
        pytest.fail("not interrupted")

    stops = replace(flips, measures={"flips": replace(flips.measures["flips"], call=interrupted)})
    monkeypatch.setitem(catalogue.ANALYSES, "flips", stops)
    before = signal.getsignal(signal.SIGINT)
    code, _, err = bisam("analyse", out, *QUICK)
    signal.signal(signal.SIGINT, before)
    assert (code, err.count("\n")) == (130, 1)
    assert not (of(out, 0) / "analysis.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "nothing to analyse: give run folders, such as runs/digits, or a file with --weights"),
        (("nowhere",), "nowhere does not exist: give a run folder"),
        (("digits",), "digits does not exist: did you mean runs/digits?"),
        (("empty",), "empty has no run folder, which has a recipe.json"),
        (("runs", "--what", "sharpnes"), "unknown analysis 'sharpnes', did you mean 'sharpness'?"),
        (("runs", "--what", ","), "no analysis is named"),
        (("runs", "--rho", "0.1,x"), "--rho 0.1,x: 'x' is not a number"),
        (("runs", "--rho", "0"), "rho must be positive"),
        (("runs", "--what", "landscape", "--rho", "0.1"), "landscape has no rho: leave --rho out"),
        (("runs", "--what", "flips", "--steps", 3), "flips has no steps: leave --steps out"),
        (("runs", "--split", "tst"), "unknown split 'tst', did you mean 'test'?"),
        (("runs", "--examples", "0"), "examples must be at least 1, got 0"),
        (("runs", "--weights", "bst"), "unknown weights of a run 'bst', did you mean 'best'?"),
        (("runs", "--weights", "file.pt"), "--weights file.pt is a file: give it without run folders"),
        (("runs", "--model", "resnet20"), "the folder of a run says what it is: leave --model out"),
        (
            ("runs", "--data-dir", "data"),
            "leave out: --data-dir (needs a dataset or weights in that folder",
        ),
        (("file.pt",), "file.pt is a file: give the folder of a run"),
        (("--weights", "file.pt"), "--weights file.pt is a file of weights: give --model, --dataset, --out too"),
        (("--weights", "file.pt", "--model", "resnet20", "--dataset", "digits"), "give --out too"),
    ],
)
def test_a_mistake_is_one_line(bisam, out, monkeypatch, arguments, message):
    monkeypatch.chdir(out.parent)
    Path("empty").mkdir()
    Path("file.pt").touch()
    code, said, err = bisam("analyse", *arguments)
    assert (code, said, err.count("\n")) == (2, "", 1)
    assert message in err
    assert not list(out.rglob("analysis.json"))


def test_the_weights_of_a_file(bisam, tmp_path):
    path, folder = tmp_path / "model.pt", tmp_path / "found"
    torch.save(build("convnet", 10, channels=1).state_dict(), path)
    where = ("--weights", path, "--model", "convnet", "--dataset", "digits", "--out", folder)
    code, said, err = bisam("analyse", *where, *QUICK)
    assert (code, err) == (0, "")
    assert "with the weights of a file" in " ".join(said.split())
    assert (folder / "analysis" / "flips-rho-0.05-examples-32-batch-size-16.png").is_file()
    code, said, _ = bisam("plot", "flips", folder, "--to", tmp_path / "flips.svg")
    assert (code, said) == (0, f"{tmp_path / 'flips.svg'}\n")
    code, _, err = bisam("analyse", *where[:-3], "digit", *where[-2:], *QUICK)
    assert code == 2
    assert "unknown dataset 'digit', did you mean 'digits'?" in err


def test_folders_are_found_once_and_in_order(out):
    assert found_under(out) == found_under(out / "digits") == sorted([of(out, 0), of(out, 1)])
    assert found_under(of(out, 1)) == [of(out, 1)]


def test_a_report_has_the_analyses(bisam, out):
    bisam("analyse", of(out, 0), *QUICK)
    changes = ("--set", "epochs=1", "--set", "batch_size=32", "--set", "limit=64")
    code, said, err = bisam("report", "digits", *changes, "--out", out)
    assert (code, err) == (0, "")
    assert f"{out / 'digits'}/: report.md, report.csv, flips.csv, analysis.csv, report.html" in said
    text = (out / "digits" / "report.md").read_text()
    assert "## Analysis" in text
    assert "for 1 of 2 finished runs" in text
    assert f"`bisam analyse {out / 'digits'}` measures the other 1." in text
    assert "flips, SAM" in (out / "digits" / "report.html").read_text()
    assert "flips, SAM" in (out / "digits" / "analysis.csv").read_text()
    (of(out, 0) / "analysis.json").write_text("{}")
    code, _, err = bisam("report", "digits", *changes, "--out", out)
    assert (code, err.count("\n")) == (0, 1)
    assert "skipped: " in err


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_a_figure_of_an_analysis(bisam, out, suffix):
    to = out.parent / f"flips.{suffix}"
    code, _, err = bisam("plot", "flips", of(out, 0), "--to", to)
    assert (code, err.count("\n")) == (2, 1)
    assert f"has no flips: measure it with `bisam analyse {of(out, 0)} --what flips`" in err
    bisam("analyse", of(out, 0), *QUICK)
    assert bisam("plot", "flips", of(out, 0), "--to", to) == (0, f"{to}\n", "")
    assert to.stat().st_size > 1000


def test_a_figure_of_an_analysis_needs_a_run(bisam):
    code, _, err = bisam("plot", "landscape")
    assert (code, err) == (
        2,
        "bisam: landscape shows an analysis of a run. Give its folder too: bisam plot landscape RUN\n",
    )


def test_the_help_names_all_analyses():
    text = " ".join(inspect.getdoc(analyse).split())
    assert f"Analyses, with commas: {', '.join(catalogue.ANALYSES)}." in text
    *others, last = [name for name in catalogue.ANALYSES if name not in catalogue.DEFAULT]
    assert f"By default all but {', '.join(others)} and {last}." in text
