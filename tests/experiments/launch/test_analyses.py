"""Analyses of a study: after each run, in its process, resumed and reported as runs are."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from bisam.experiments.analyses.file import ANALYSIS, read_entries
from bisam.experiments.launch import processes, work
from bisam.experiments.launch.outcomes import collect_outcomes, lacking
from bisam.experiments.launch.work import train_or_explain
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs.folder import Run
from bisam.experiments.runs.machine import Machine
from bisam.experiments.studies.study import Analyses
from bisam.experiments.training.train import train
from tests.support.doubles import Silent

SAM = Recipe(method="sam", rho=0.4, epochs=1, limit=32, batch_size=32)
SGD = replace(SAM, method="sgd", rho=None)
SETTINGS = {"steps": 2, "batch_size": 16, "weights": "last"}
BOTH = Analyses(
    what={"sharpness": {}, "flips": {"examples": 16}},
    settings=SETTINGS,
    measures={"rise": "rise", "flips, -log": "flips"},
    primary="rise",
    control="flips",
    shown=("rise",),
)
QUIET = Machine(log=())


def written(root, recipe: Recipe) -> list[str]:
    return [entry["analysis"] for entry in read_entries(Run.under(root, recipe).folder)]


@pytest.mark.slow
def test_runs_are_analysed_in_their_process_and_only_once(tmp_path):
    train(Run.under(tmp_path, SAM), QUIET)  # before the study had analyses
    progress = Silent()
    ended = processes.run_all([SAM, SGD], tmp_path, 2, QUIET, progress, BOTH)
    assert [(outcome.recipe, outcome.error) for outcome in ended] == [(SAM, None), (SGD, None)]
    assert progress.ended == {SAM: None, SGD: None}
    assert [recipe for recipe, _ in progress.epochs] == [SGD]
    assert written(tmp_path, SAM) == written(tmp_path, SGD) == ["sharpness", "flips"]
    assert [entry["settings"]["examples"] for entry in read_entries(Run.under(tmp_path, SAM).folder)] == [2000, 16]
    of_sam = [(measure, completed) for recipe, measure, completed in progress.measures if recipe == SAM]
    assert of_sam[0] == ("sharpness: 1 step", 0)
    assert of_sam[-1] == ("flips: four adversaries", 1)
    assert len(of_sam) == len(set(of_sam))
    before = {path: path.read_bytes() for path in tmp_path.rglob(ANALYSIS)}
    again = Silent()
    processes.run_all([SAM, SGD], tmp_path, 2, QUIET, again, BOTH)
    assert (again.measures, again.ended) == ([], {SAM: None, SGD: None})
    assert {path: path.read_bytes() for path in tmp_path.rglob(ANALYSIS)} == before


def test_an_interruption_costs_one_analysis(tmp_path):
    def interrupt(measure, completed):
        if completed == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_or_explain(SAM, tmp_path, QUIET, None, BOTH, interrupt)
    run = Run.under(tmp_path, SAM)
    (kept,) = read_entries(run.folder)
    assert lacking(run, run.result, BOTH) == ["flips"]
    begun: list[str] = []
    outcome = train_or_explain(SAM, tmp_path, QUIET, None, BOTH, lambda measure, _: begun.append(measure))
    assert (outcome.error, begun) == (None, ["flips: four adversaries"])
    assert read_entries(run.folder)[0] == kept
    assert lacking(run, run.result, BOTH) == []


def test_other_settings_and_weights_are_lacking(tmp_path):
    train_or_explain(SAM, tmp_path, QUIET, None, replace(BOTH, what={"flips": {}}))
    run = Run.under(tmp_path, SAM)
    only = replace(BOTH, what={"flips": {}})
    assert lacking(run, run.result, only) == []
    assert lacking(run, run.result, None) == []
    assert lacking(run, run.result, replace(only, settings={**SETTINGS, "rho": (0.1,)})) == ["flips"]
    assert lacking(run, {**run.result, "test_last": 0.0}, only) == ["flips"]  # trained again


def test_a_diverged_run_has_no_analyses_and_is_no_failure(tmp_path):
    diverging = replace(SGD, learning_rate=1e30, epochs=2)
    outcome = train_or_explain(diverging, tmp_path, QUIET, None, BOTH)
    assert outcome.error is None
    assert outcome.result["diverged"] is not None
    assert written(tmp_path, diverging) == []
    known = collect_outcomes([diverging], tmp_path, Silent(), lambda *_: pytest.fail("it ran again"), BOTH)
    assert known[0].error is None


@pytest.mark.parametrize(
    ("device", "devices", "strategy", "first"),
    [("cpu", 1, "auto", "cpu"), ("cpu", 2, "fsdp", "cpu"), ("cuda:2,3", 2, "ddp", "cuda:2")],
)
def test_a_run_on_several_devices_is_analysed_on_the_first_one(tmp_path, monkeypatch, device, devices, strategy, first):
    train(Run.under(tmp_path, SAM), QUIET)
    used: list[Machine] = []
    monkeypatch.setattr(work, "train", lambda run, *_: run.result)
    monkeypatch.setattr(work, "analyse", lambda folder, names, settings, machine, report: used.append(machine))
    machine = Machine(device=device, devices=devices, strategy=strategy, log=())
    assert train_or_explain(SAM, tmp_path, machine, None, BOTH).error is None
    assert [(one.device, one.devices, one.strategy) for one in used] == [(first, 1, "auto")] * 2


def test_a_failed_analysis_is_one_line_and_the_run_is_kept(tmp_path):
    too_wide = replace(BOTH, settings={**SETTINGS, "weights": "ema"})
    outcome = train_or_explain(SAM, tmp_path, QUIET, None, too_wide)
    assert outcome.result["test_last"] == Run.under(tmp_path, SAM).result["test_last"]
    assert "its analysis: " in outcome.error
    assert "has no average of the weights (--ema)" in outcome.error
    assert "\n" not in outcome.error


def test_a_damaged_file_is_said_and_the_others_go_on(tmp_path):
    train_or_explain(SAM, tmp_path, QUIET, None, BOTH)
    path = Run.under(tmp_path, SAM).folder / ANALYSIS
    path.write_text(json.dumps({**json.loads(path.read_text()), "checksum": "0" * 32}))
    ran = []

    def run(left, done):
        ran.extend(left)
        for recipe in left:
            done(train_or_explain(recipe, tmp_path, QUIET, None, BOTH))

    ended = collect_outcomes([SAM, SGD], tmp_path, Silent(), run, BOTH)
    assert ran == [SGD]
    assert f"{path} is damaged (its checksum differs)" in ended[0].error
    assert ended[1].error is None
