"""The report of a study whose runs have other settings: nothing in it was registered."""

from __future__ import annotations

from dataclasses import replace

from bisam.experiments.cli.study_report import OTHER_SETTINGS, of_runs, report
from bisam.experiments.runs.archive import Source
from bisam.experiments.studies import STUDIES
from tests.experiments.reports.test_reports import run

STUDY = STUDIES["digits"]


def test_runs_of_the_study_test_what_it_has_registered():
    own = [run(replace(recipe, seed=3, version=2), 0.9) for recipe in STUDY.recipes(None)]
    assert of_runs(STUDY, own) is STUDY
    assert of_runs(STUDY, own[:1]) is STUDY


def test_runs_with_other_settings_do_not():
    reported = of_runs(STUDY, [run(recipe, 0.9) for recipe in STUDY.recipes(1)])
    assert reported.registered is None
    assert reported == replace(STUDY, primary=None)


def test_the_report_says_so(tmp_path, capsys):
    runs = [run(recipe, 0.9) for recipe in STUDY.recipes(1)]
    report(STUDY, runs, [], Source(tmp_path, tmp_path), tmp_path / "digits")
    text = (tmp_path / "digits" / "report.md").read_text()
    assert text.split("\n\n")[1].startswith(OTHER_SETTINGS)
    assert "(primary)" not in text
    assert "**Primary comparison**" not in text
    assert "Unfinished" not in text
    assert "Other settings:" in capsys.readouterr().out


def test_a_regret_has_no_optima_of_another_study_then():
    regret = STUDIES["radius-regret"]
    assert regret.regret.optima
    assert not of_runs(regret, [run(recipe, 0.9) for recipe in regret.recipes(1)]).regret.optima
