"""The values that no public source gives: data of the studies, and marked in their reports."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

import bisam
from bisam.experiments.recipes.assumptions import AE_SAM, SEEDS, Assumption, Kind
from bisam.experiments.recipes.expressions import contained
from bisam.experiments.recipes.presets import ASSUMED, PRESETS
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.reports import tables
from bisam.experiments.reports.groups import grouped, names, title
from bisam.experiments.reports.marks import Marks
from bisam.experiments.studies import LABELS, STUDIES
from tests.experiments.reports.test_reports import LOG, SAM, SGD, run, seeded

ALL = [(name, one) for name, study in STUDIES.items() for one in study.assumptions]
KINDS = {Kind.RECOLLECTED, Kind.CHOSEN}


@pytest.mark.parametrize(("name", "one"), ALL, ids=[f"{name}-{one.subject}-{one.value}" for name, one in ALL])
def test_an_assumption_concerns_recipes_of_its_study(name, one):
    """So a value that is changed in a study, and not in its assumptions, is noticed."""
    study = STUDIES[name]
    assert any(map(one.concerns, study.recipes(None)))
    assert one.kind in KINDS
    assert one.reason
    if one.subject == SEEDS:
        assert one.value == study.seeds
    if isinstance(one.value, tuple):  # each of the values occurs
        found = {recipe.setting(one.subject) for recipe in study.recipes(None) if one.concerns(recipe)}
        assert found == set(one.value)


@pytest.mark.parametrize("preset", ASSUMED)
def test_the_assumptions_of_a_preset_concern_it(preset):
    without_method = [one for one in ASSUMED[preset] if one.subject not in ("mu", "alpha")]
    assert all(one.concerns(PRESETS[preset]) for one in without_method)


@pytest.mark.parametrize("name", ["sampa", "methods", "methods-rho"])
def test_the_thresholds_of_ae_sam_are_marked(name):
    assert AE_SAM in STUDIES[name].assumptions
    method = Recipe(method="ae_sam").build_method(steps=10)
    assert AE_SAM.value == f"{method.first:g} to {method.last:g}, and {method.delta:g}"


@pytest.mark.parametrize(("name", "preset"), [("imagenet", "imagenet"), ("vit", "vit"), ("glue", "bert")])
def test_what_is_recollected_of_bisams_tables_is_not_called_their_value_in_sampas(name, preset):
    study = STUDIES[f"sampa-{name}"]
    kinds = {
        (one.subject, value): one.kind
        for one in study.assumptions
        for value in (one.value if isinstance(one.value, tuple) else (one.value,))
    }
    recollected = [
        (one.subject, one.value)
        for one in ASSUMED[preset]
        if one.kind == Kind.RECOLLECTED and one.subject in Recipe.__dataclass_fields__
        if any(map(one.concerns, study.recipes(None)))
    ]
    assert len(recollected) >= 2
    assert {kinds[one] for one in recollected} == {Kind.RECOLLECTED}


def test_no_assumption_is_in_a_comment_alone():
    for path in (Path(bisam.__file__).parent / "experiments").rglob("*.py"):
        assert not re.search(r"\[(MEM|OURS)\]", path.read_text()), path


def test_an_assumption_concerns_recipes_that_have_its_value():
    one = Assumption("rho", 0.4, Kind.CHOSEN, "why", {"method": ("sam", "asam")})
    assert one.concerns(SAM)
    assert not one.concerns(replace(SAM, rho=0.1))
    assert not one.concerns(LOG)
    assert Assumption("rho", (0.1, 0.4), Kind.CHOSEN, "why").concerns(LOG)
    assert Assumption("rho", 0.05, Kind.CHOSEN, "why").concerns(replace(SAM, rho=None))  # the default
    assert Assumption("micro-batch", 128, Kind.CHOSEN, "why").concerns(SGD)
    nested = replace(SAM, method="MSAM(128, BiSAM(0.05, Tanh(20.0, 0.1)))", rho=None)
    for name, value in (("rho", 0.05), ("mu", 20.0), ("alpha", 0.1)):
        assert Assumption(name, value, Kind.CHOSEN, "why").concerns(nested)


@pytest.mark.parametrize(
    ("expression", "found"),
    [
        ("SAM()", {"rho": 0.05}),
        ("ESAM(RandomMask(L2(0.1), beta=0.5), gamma=0.5)", {"rho": 0.1}),
        ("EBiSAM(0.2, NegLog(3.0), beta=0.5)", {"rho": 0.2, "mu": 3.0}),
        ("MSAM(128, BiSAM(0.05, Tanh(20.0, 0.1)))", {"rho": 0.05, "mu": 20.0, "alpha": 0.1}),
        ("GBiSAM(0.1, NegLog(2.0), alpha=0.4)", {"rho": 0.1, "mu": 2.0}),  # this alpha is another setting
        ("ABiSAM(2, NegLog(), 0.01)", {"rho": 2.0, "mu": 1.0, "eta": 0.01}),
        ("SAMPa(L2(0.1), ahead=next_step(optimizer))", {"rho": 0.1}),
        ("GSAM(L2(Follow(optimizer, high=0.4, low=0.1)))", {}),  # a schedule
        ("ERM()", {}),
        ("BSAM(4 * examples, 0.02)", {"rho": 0.02}),
    ],
)
def test_the_settings_that_an_expression_contains(expression, found):
    assert contained(expression) == found
    recipe = Recipe(method=expression)
    assert {
        name: value for name in ("rho", "mu", "alpha", "eta") if (value := recipe.setting(name)) is not None
    } == found


def test_an_expression_with_two_radii_has_none():
    assert contained("Every(2, SAM(L2(0.1)), SAM(L2(0.2)))") == {}
    assert contained("Every(2, SAM(L2(0.1)), SAM(L2(0.1)))") == {"rho": 0.1}
    assert contained("SAM(FlipRate(0.06, start=0.1))") == {"rho": 0.06}  # stands in the place of the radius
    assert contained("BiSAM(0.1, WrongClasses(NegLog(2.0), margin=3))") == {"rho": 0.1, "mu": 2.0}
    assert contained("BiSAM(0.1, NegLog(Linear(1, 10, steps)))") == {"rho": 0.1}


# Labels


def test_no_expression_of_a_study_is_without_a_name():
    for study in STUDIES.values():
        for recipe in study.recipes(None):
            assert "(" not in recipe.method or title(recipe) != recipe.method, recipe.method
            assert set(study.labels) <= set(LABELS)
            assert all(LABELS[expression] == label for expression, label in study.labels.items())


def test_names_are_different_where_methods_are():
    for study in STUDIES.values():
        recipes = study.recipes(None)
        called = names(recipes)
        places = {(name, r.dataset, r.model, r.noise, r.imbalance) for r, name in called.items()}
        assert len(places) == len(recipes), study.name


def test_two_methods_with_one_name_are_told_apart():
    theirs = next(expression for expression, label in LABELS.items() if label == "ESAM")
    ours, labelled = replace(SAM, method="esam", rho=0.05), replace(SAM, method=theirs, rho=None)
    assert title(ours) == title(labelled) == "ESAM"
    assert list(names([ours, labelled]).values()) == ["ESAM: esam", f"ESAM: {theirs}"]
    assert list(names([labelled, SAM]).values()) == ["ESAM", "SAM"]


# Marks

SIX = Assumption(SEEDS, 2, Kind.RECOLLECTED, "not public")
RADIUS = Assumption("rho", 0.4, Kind.RECOLLECTED, "the | radius", {"method": "bisam_log"})
RATE = Assumption("learning_rate", 0.1, Kind.CHOSEN, "as elsewhere")
DECAY = Assumption("warmup", 0, Kind.CHOSEN, "none is named")
SELECTION = Assumption("selection by", "cross-entropy", Kind.CHOSEN, "not public", {"method": "bisam_log"})
OTHER = Assumption("rho", 0.7, Kind.CHOSEN, "nobody has it")
RUNS = [*seeded(SGD, 0.6, 0.7), *seeded(SAM, 0.8, 0.9), *seeded(LOG, 0.9)]


def report(*assumptions: Assumption) -> str:
    return tables.markdown("T", RUNS, {}, assumptions=assumptions)


def rows_of(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]


def test_values_are_marked_where_they_stand():
    text = report(OTHER, SIX, RADIUS, RATE, DECAY, SELECTION)
    heads, _, sgd, sam, log = rows_of(text)[:5]
    rho, n = heads.index("rho"), heads.index("n")
    assert [row[n] for row in (sgd, sam, log)] == ["2 [a]", "2 [a]", "1"]  # another number of seeds is the user's own
    assert [row[rho] for row in (sgd, sam, log)] == ["–", "0.4", "0.4 [b]"]
    assert [row[0] for row in (sgd, sam, log)] == ["SGD", "SAM", "BiSAM (-log) [e]"]
    assert "learning rate 0.1 [c]" in text
    assert "warmup 0 [d]" in text  # it has its default, and is named because it is assumed
    _, _, section = text.partition("## Assumed values\n\n")
    assert (
        "recollected: remembered from the paper, and not a claim of it; chosen here: decided by this project."
        in section
    )
    assert "| [a] | seeds 2 | recollected | not public |" in section
    assert "| [b] | rho 0.4 | recollected | the \\| radius |" in section
    assert "| [e] | selection by cross-entropy | chosen here | not public |" in section
    assert "0.7" not in section
    assert text.index("## Assumed values") < text.index("Published")


def test_an_assumption_of_some_rows_is_not_in_the_line_of_all():
    some = replace_where(RATE, {"method": "sam"})
    text = report(some)
    assert "learning rate 0.1," in text or "learning rate 0.1." in text
    _, _, sgd, sam, log = rows_of(text)[:5]
    assert [row[0] for row in (sgd, sam, log)] == ["SGD", "SAM [a]", "BiSAM (-log)"]


def replace_where(one: Assumption, where: dict) -> Assumption:
    return Assumption(one.subject, one.value, one.kind, one.reason, where)


def test_numbers_are_the_same_without_assumptions():
    assert report().replace("\n\n", "\n") == tables.markdown("T", RUNS, {}).replace("\n\n", "\n")
    assert "Assumed" not in report()
    marked = re.sub(r" \[[a-z]\]", "", report(SIX, RADIUS, SELECTION))
    assert rows_of(marked)[:5] == rows_of(report())[:5]


def test_letters_go_on_after_z():
    many = [Assumption(f"thing {i}", i, Kind.CHOSEN, "why") for i in range(30)]
    marks = [mark for mark, *_ in Marks(many, {SAM: 1}).rows()]
    assert (marks[0], marks[25], marks[26], marks[29]) == ("[a]", "[z]", "[aa]", "[ad]")
    assert len(set(marks)) == 30


@pytest.mark.parametrize("name", [name for name, study in STUDIES.items() if study.assumptions])
def test_every_assumption_of_a_study_is_in_its_report_and_every_mark_is_explained(name):
    study = STUDIES[name]
    runs = [run(replace(recipe, seed=seed), 0.5) for recipe in study.recipes(None) for seed in range(study.seeds)]
    text = tables.markdown(study.title, runs, {}, study.note, study.baselines, assumptions=study.assumptions)
    before, _, section = text.partition("## Assumed values\n\n")
    explained = {row[0] for row in rows_of(section) if row[0].startswith("[")}
    used = set(re.findall(r"\[[a-z]{1,2}\]", before))
    assert len(explained) == len(study.assumptions)
    assert used == explained
    for expression in study.labels:
        if any(recipe.method == expression for recipe in study.recipes(None)):
            assert f"{tables.escaped(study.labels[expression])}: `{expression}`" in text
    assert not any("(0.05" in row[0] for row in rows_of(before))  # no raw expression in the table


def test_the_radius_in_an_expression_is_shown():
    study = STUDIES["table10"]
    rows = tables.summary([run(recipe) for recipe in study.recipes(None)], study.baselines)
    assert {row["rho"] for row in rows} == {0.05}
    assert {row["method"] for row in rows} == {"ESAM", "E-BiSAM (-log)", "E-BiSAM (tanh)"}
    assert list(grouped([run(recipe) for recipe in study.recipes(None)])) == study.recipes(None)


def test_the_terminal_shows_the_marks(bisam, tmp_path):
    from bisam.experiments.runs.folder import Run

    for recipe in STUDIES["table4"].recipes(None)[:2]:
        folder = Run.under(tmp_path / "table9", recipe)
        one = run(recipe)
        with folder.open():
            writer = folder.writer()
            writer.save({}, one.metrics)
            writer.finish(one.result, one.metrics)
    code, out, _ = bisam("report", "table4", "--out", tmp_path)
    assert code == 0
    assert "0.1 [a]" in out
    assert "[a] rho 0.1: recollected" in out
    assert "0.1 [a]" in (tmp_path / "table4" / "report.md").read_text()
