"""The study of measures of sharpness: its design, and the whole of it in small, from training to the report."""

from __future__ import annotations

import csv
from dataclasses import replace

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("curvlinops")

from bisam.experiments.analyses.catalogue import ANALYSES, known
from bisam.experiments.analyses.file import ANALYSIS, read_entries
from bisam.experiments.analyses.settings import Settings
from bisam.experiments.launch.work import train_or_explain
from bisam.experiments.reports import predictors
from bisam.experiments.reports.analyses import read
from bisam.experiments.runs.folder import finished
from bisam.experiments.runs.machine import Machine
from bisam.experiments.studies import STUDIES
from bisam.experiments.studies.study import expand

STUDY = STUDIES["sharpness"]
MEASURED = STUDY.analyses
assert MEASURED is not None


def test_each_method_has_three_settings_at_each_level_of_noise():
    recipes = STUDY.recipes(None)
    for noise in (0.0, 0.4):
        here = [recipe for recipe in recipes if recipe.noise == noise]
        assert len(here) == 15
        for method in ("sam", "bisam_log", "bisam_tanh", "asam"):
            tuned = 4.0 if method == "asam" else 0.4  # those of digits when the study was registered
            assert [r.rho for r in here if r.method == method] == [tuned / 2, tuned, 2 * tuned]
        plain = [r for r in here if r.is_plain]
        assert [r.learning_rate for r in plain] == [0.03, 0.1, 0.3]
        assert {r.epochs for r in plain} == {60}
        assert {r.epochs for r in here if not r.is_plain} == {30}
    assert "over 15 configurations, mean over 10 seeds" in STUDY.note
    assert STUDY.seeds == 10


def test_its_seeds_are_those_of_no_study_that_chose_its_settings():
    seeds = set(range(STUDY.first_seed, STUDY.first_seed + STUDY.seeds))
    others = [study for study in STUDIES.values() if study is not STUDY]
    assert not any(seeds & set(range(one.first_seed, one.first_seed + one.seeds)) for one in others)


def test_its_measures_are_numbers_of_its_analyses():
    columns = {column.title for name in MEASURED.what for column in ANALYSES[name].columns}
    assert set(MEASURED.measures) <= columns
    named = list(MEASURED.measures.values())
    assert len(set(named)) == len(named)
    assert {MEASURED.primary, MEASURED.control, *MEASURED.shown} <= set(named)
    assert MEASURED.measures["loss"] == MEASURED.control
    assert MEASURED.measures["rise"] == MEASURED.primary


@pytest.mark.parametrize("name", MEASURED.what)
def test_its_measures_are_of_the_last_weights_and_of_one_radius_as_the_note_says(name):
    settings = Settings(**MEASURED.settings_of(name))
    assert (settings.rho, settings.steps, settings.weights, settings.split) == ((0.05,), 20, "last", "train")
    assert settings.examples >= 1078 or name == "hessian"  # all training examples
    assert "L2 ball of radius 0.05" in STUDY.note
    assert "20 steps of projected ascent" in STUDY.note


def test_runs_are_measured_from_their_folders(tmp_path):
    """Two runs of three are analysed; the file of one of them is then damaged."""
    small = [replace(r, epochs=1, limit=16, batch_size=16, seed=0) for r in STUDY.recipes(None)[:2]]
    few = replace(MEASURED, what={"flips": {}}, measures={"flips, -log": "flips"}, primary="flips", control="flips")
    machine = Machine(log=())
    for recipe, analyses in ((small[0], few), (small[1], few), (replace(small[0], seed=1), None)):
        assert train_or_explain(recipe, tmp_path, machine, None, analyses).error is None
    runs = list(finished(tmp_path))

    def measured(analyses):
        return predictors.measured(runs, read(runs)[0], analyses)

    found, lacking = measured(few)
    assert {one.run.recipe for one in found} == set(small)
    assert all(0 <= one.values["flips"] <= 1 for one in found)
    assert lacking == [f"{small[0].slug}, seed 1"]
    other = replace(few, settings={**few.settings, "rho": (0.1,)})
    assert measured(other)[0] == []
    path = next(one for one in runs if one.recipe == small[1]).folder / ANALYSIS
    path.write_text("{")
    found, lacking = measured(few)
    assert [one.run.recipe for one in found] == [small[0]]
    assert set(lacking) == {f"{small[0].slug}, seed 1", f"{small[1].slug}, seed 0"}


def test_a_diverged_run_is_there_without_measures(tmp_path):
    diverging = replace(STUDY.recipes(None)[0], learning_rate=1e30, epochs=2, limit=16)
    assert train_or_explain(diverging, tmp_path, Machine(log=()), None, MEASURED).error is None
    found, lacking = predictors.measured(list(finished(tmp_path)), {}, MEASURED)
    assert [(one.run.diverged is not None, one.values, lacking) for one in found] == [(True, {}, [])]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_study_in_small_from_training_to_the_report(bisam, tmp_path):
    small = ("--set", "noise=0.4", "--set", "limit=64", "--epochs", 2, "--seeds", 2, "--workers", 2, "--out", tmp_path)
    code, out, err = bisam("run", "sharpness", *small, "--dry-run", "--no-estimate")
    assert (code, err) == (0, "")
    assert "30 of 30 runs of sharpness are left, and the analyses of 30" in out
    code, out, err = bisam("run", "sharpness", *small)
    assert (code, err) == (0, "")
    assert "30/30 runs" in out
    folders = [path.parent for path in tmp_path.glob("sharpness/*/seed-*/result.json")]
    assert len(folders) == 30
    assert all([entry["analysis"] for entry in read_entries(folder)] == known(MEASURED.what) for folder in folders)
    report = tmp_path / "sharpness"
    written = {"report.md", "report.csv", "report.html", "accuracy.png", "predictors.png"}
    assert written | {"measures.csv", "correlations.csv"} <= {path.name for path in report.iterdir()}
    rows = list(csv.DictReader((report / "measures.csv").read_text().splitlines()))
    assert len(rows) == 30
    assert {row["seed"] for row in rows} == {"200", "201"}
    assert {*MEASURED.measures.values(), "test_error"} <= rows[0].keys()
    correlations = list(csv.DictReader((report / "correlations.csv").read_text().splitlines()))
    assert [row["measure"] for row in correlations if row["kind"] == "primary"] == [MEASURED.primary]
    assert {(row["seeds"], row["configurations"]) for row in correlations} == {("2", "15")}
    text = (report / "report.md").read_text()
    assert f"| {MEASURED.primary} (primary) | " in text
    assert "*Interim*: 2 of the 10 seeds that were fixed before the first run" in text
    assert "nan" not in text
    before = {folder: (folder / ANALYSIS).read_bytes() for folder in folders}
    (folders[0] / ANALYSIS).unlink()
    code, out, _ = bisam("run", "sharpness", *small, "--dry-run", "--no-estimate")
    assert "0 of 30 runs of sharpness are left, and the analyses of 1" in out
    assert bisam("run", "sharpness", *small)[0] == 0  # that one only
    assert {folder for folder in folders if (folder / ANALYSIS).read_bytes() != before[folder]} == {folders[0]}
    changes = ("--set", "noise=0.4", "--set", "limit=64", "--set", "epochs=2", "--out", tmp_path)
    code, _, err = bisam("plot", "predictors", "sharpness", *changes, "--to", tmp_path / "p.pdf")
    assert (code, err) == (0, "")
    assert (tmp_path / "p.pdf").read_bytes().startswith(b"%PDF")
    assert bisam("report", "sharpness", *changes, "--to", tmp_path / "page")[0] == 0
    page = (tmp_path / "page" / "report.md").read_text()
    assert page.replace("](../sharpness/", "](") == text  # links lead to the runs from where the page is


def test_the_figure_of_a_study_without_analyses_is_refused_in_one_line(bisam, tmp_path):
    recipe = expand(STUDIES["digits"].changed(1, []), 1)[0]
    assert train_or_explain(recipe, tmp_path / "digits", Machine(log=())).error is None
    code, _, err = bisam("plot", "predictors", "digits", "--set", "epochs=1", "--out", tmp_path)
    assert code == 2
    assert err.count("\n") == 1
    assert "predictors shows the analyses of a study, and digits has none" in err
