"""Reports: groups, differences, tables, published numbers, pages and figures."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from matplotlib.collections import PathCollection

pytest.importorskip("matplotlib")

from bisam.experiments.recipes.catalogue import METHODS
from bisam.experiments.recipes.presets import CIFAR
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.reports import drawing, figures, legends, pages, tables as report, tuning
from bisam.experiments.reports.comparison import beside
from bisam.experiments.reports.differences import baseline, differences
from bisam.experiments.reports.groups import arranged, grouped, names, places
from bisam.experiments.runs.files import to_csv
from bisam.experiments.runs.folder import Finished, Run, finished as finished_runs
from bisam.experiments.runs.results import BALL
from bisam.experiments.studies import STUDIES, published

SAM = Recipe(method="sam", noise=0.4, rho=0.4, epochs=3)
SGD = replace(SAM, method="sgd", rho=None, epochs=6)
LOG = replace(SAM, method="bisam_log")
NESTED = "KSAM(32, RSAM(0.01, EBiSAM(0.05 + 2 * 0.1)))"
PAPER = replace(CIFAR, method="sam", rho=0.05)


def run(
    recipe: Recipe, score: float = 0.9, metric: str = "accuracy", more: dict[str, float] | None = None, **changes
) -> Finished:
    """A finished run whose numbers are known."""
    time, gradients = changes.pop("time", 2.0), changes.pop("gradients", 2.0)
    rows = [
        {
            "epoch": epoch,
            "train_loss": 2.0 / epoch,
            "flipped": 10.0 * epoch,
            "gradients": gradients,
            "losses": 17,
            "seconds": time,
            "relative_time": time,
            "validation": score - 0.1 / epoch,
        }
        for epoch in range(1, (recipe.epochs or 3) + 1)
    ]
    result = {
        "test_best": score,
        "test_last": score - 0.02,
        "validation_best": score,
        "best_epoch": 1,
        "metric": metric,
        "scores": {"best": {metric: score, **(more or {})}},
        "examples": 1078,
        "seconds_per_epoch": 0.5,
        "relative_time": time,
        "gradients_per_step": gradients,
        "forwards_per_step": 1.0,
        "device": "cpu",
        "finished": "2026-01-02T03:04:05Z",
        "commit": "0123abc",
    }
    return Finished(recipe, {**result, **changes}, rows)


def seeded(recipe: Recipe, *scores: float, **changes) -> list[Finished]:
    """One run for each score."""
    return [run(replace(recipe, seed=seed), score, **changes) for seed, score in enumerate(scores)]


SMALL = [
    *seeded(SGD, 0.60, 0.70, time=1.0, gradients=1.0),
    *seeded(SAM, 0.90, 0.94),
    *seeded(LOG, 0.91, 0.96),
]


def study(datasets=("cifar10", "cifar100"), models=("wrn28_2", "wrn28_10"), noises=(0.0,)) -> list[Finished]:
    base = replace(SAM, batch_size=128)
    return [
        one
        for dataset in datasets
        for model in models
        for noise in noises
        for method in ("sgd", "sam", "bisam_log")
        for one in seeded(
            replace(base, dataset=dataset, model=model, noise=noise, method=method, rho=None if method == "sgd" else 1),
            0.8,
            0.9,
        )
    ]


GLUE = [
    *seeded(replace(SAM, dataset="glue:cola", noise=0.0, rho=0.01), 0.50, 0.54, metric="matthews"),
    *seeded(replace(SAM, dataset="glue:mrpc", noise=0.0), 0.90, 0.92, metric="f1", more={"accuracy": 0.8}),
    *seeded(replace(SAM, dataset="glue:rte", noise=0.0), 0.60, 0.64),
]


# Groups


def test_without_a_study_groups_are_in_the_order_of_data_models_noise_and_methods():
    recipes = [
        Recipe(dataset=dataset, model=model, noise=noise, method=method)
        for dataset in ("digits", "cifar10", "cifar100", "glue:cola", "glue:mrpc", "folder:/a")
        for model in ("resnet20", "resnet56", "resnet110")
        for noise in (0.0, 0.4)
        for method in ("sgd", "sam", "bisam_log", "asam", "KSAM(8)", "KSAM(16)")
    ]
    assert list(grouped(arranged([run(recipe) for recipe in reversed(recipes)]))) == recipes


def test_rows_are_in_the_order_of_the_study_with_the_baseline_first():
    tanh, asam = replace(LOG, method="bisam_tanh"), replace(SAM, method="asam")
    study = [SGD, tanh, SAM, LOG]
    clean = [replace(recipe, noise=0.0) for recipe in study]
    runs = [run(replace(recipe, seed=seed)) for seed in (1, 0) for recipe in (LOG, *clean, SAM, tanh, SGD)]
    assert list(grouped(arranged(runs, [*study, *clean], ("sam",)))) == [
        *(SAM, SGD, tanh, LOG),
        *(replace(recipe, noise=0.0) for recipe in (SAM, SGD, tanh, LOG)),
    ]
    assert list(grouped(arranged(runs, [*clean, *study])))[:4] == clean
    assert [one.recipe.seed for one in arranged(runs, study)[:2]] == [0, 1]
    # Other recipes follow those of their method, and methods that the study does not have come last.
    other = replace(tanh, rho=0.1)
    assert list(grouped(arranged([run(r) for r in (asam, LOG, other, tanh)], study))) == [tanh, other, LOG, asam]


def test_the_first_baseline_that_a_place_has_is_first_there():
    asam, there = replace(SAM, method="asam"), replace(SAM, method="asam", noise=0.0)
    runs = [run(recipe) for recipe in (LOG, asam, SAM, replace(LOG, noise=0.0), there)]
    found = list(grouped(arranged(runs, [LOG, asam, SAM], ("sam", "asam"))))
    assert found == [SAM, LOG, asam, there, replace(LOG, noise=0.0)]


def test_runs_of_a_group_are_in_the_order_of_their_seeds():
    runs = [run(replace(SAM, seed=seed)) for seed in (3, 0, 11)]
    assert [one.recipe.seed for one in grouped(runs)[SAM]] == [0, 3, 11]


def test_names_say_what_tells_recipes_apart_and_no_more():
    other = replace(SAM, noise=0.0, rho=0.1)
    assert list(names([SGD, SAM, LOG, other]).values()) == ["SGD (2× epochs)", "SAM", "BiSAM (-log)", "SAM"]
    assert list(names([replace(SGD, epochs=3), SGD, SAM]).values()) == ["SGD", "SGD (2× epochs)", "SAM"]
    tanh = replace(SAM, method="bisam_tanh")
    several = [SAM, replace(SAM, rho=0.1), tanh, replace(tanh, mu=1.0)]
    assert list(names(several).values()) == [
        "SAM (rho 0.4)",
        "SAM (rho 0.1)",
        "BiSAM (tanh) (mu 10.0)",
        "BiSAM (tanh) (mu 1.0)",
    ]
    assert names([replace(SGD, optimizer="adamw", schedule="linear")]).popitem()[1] == "AdamW"
    assert names([replace(SAM, method=NESTED, rho=None)]).popitem()[1] == NESTED


def test_places_say_what_varies():
    assert list(places([SGD, SAM]).values()) == [""]
    assert list(places([SAM, replace(SAM, noise=0.0)]).values()) == ["label noise 40 %", "label noise 0 %"]
    recipes = [replace(SAM, dataset=data, model=model) for data in ("a", "b") for model in ("c", "d")]
    assert list(places(recipes).values()) == ["a, c", "a, d", "b, c", "b, d"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["rho", "mu", "alpha", "eta"])
def test_a_setting_is_the_one_that_the_method_gets(method, name):
    recipe = Recipe(method=method)
    value = recipe.setting(name)
    if name in recipe.settings:
        assert replace(recipe, **{name: value}).expression == recipe.expression
        assert replace(recipe, **{name: 0.25}).setting(name) == 0.25
    else:
        assert value is None


def test_what_methods_bring_along_are_fields_of_recipes():
    assert {name for entry in METHODS.values() for name in entry.own_fields} <= set(SAM.to_dict())


# Differences


def test_only_seeds_that_both_have_are_paired():
    ours = [run(replace(LOG, seed=seed), score) for seed, score in ((0, 0.5), (2, 0.9), (3, 0.8))]
    theirs = [run(replace(SAM, seed=seed), score) for seed, score in ((1, 0.1), (3, 0.6), (2, 0.8))]
    (one,) = differences(grouped([*ours, *theirs]), ("sam",)).values()
    difference = one.difference
    assert (one.recipe, one.baseline) == (LOG, SAM)
    assert (difference.mean, difference.pairs) == (pytest.approx(0.15), 2)
    assert difference.high - difference.mean == pytest.approx(12.706205 * 0.05, abs=1e-6)


def test_recipes_without_a_seed_in_common_have_no_difference():
    assert differences(grouped([run(LOG), run(replace(SAM, seed=1))]), ("sam",)) == {}


def test_the_baseline_shares_the_setting():
    other = replace(LOG, noise=0.0)
    for field, value in (("dataset", "cifar10"), ("model", "a"), ("batch_size", 32), ("epochs", 4), ("limit", 9)):
        assert baseline(replace(LOG, **{field: value}), [SAM, SGD], ("sam",)) is None
    assert baseline(other, [SAM, SGD], ("sam",)) is None
    assert baseline(LOG, [SAM, SGD, other], ("sam",)) == SAM
    assert baseline(replace(LOG, rho=0.1, mu=2.0), [SAM], ("sam",)) == SAM


def test_sgd_and_bsam_bring_what_may_differ():
    assert baseline(SGD, [SAM, SGD], ("sam",)) == SAM
    bsam = replace(SAM, method="bsam", momentum=0.0, weight_decay=0.0)
    assert baseline(bsam, [SAM, bsam], ("sam",)) == SAM
    assert baseline(replace(LOG, momentum=0.0), [SAM], ("sam",)) is None


def test_of_several_baselines_the_nearest_is_taken_and_of_equals_none():
    near, far = replace(SAM, rho=0.1), replace(SAM, rho=0.2)
    assert baseline(replace(LOG, rho=0.1), [SAM, far, near], ("sam",)) == near
    assert baseline(replace(LOG, rho=0.8), [far, near], ("sam",)) is None
    both = [SGD, replace(SGD, epochs=3)]
    assert baseline(LOG, both, ("sgd",)) == both[1]


def test_the_first_baseline_that_is_there_is_taken():
    asam, nested, within = (
        replace(SAM, method=method, rho=None) for method in ("asam", "MSAM(128)", "MSAM(128, BiSAM())")
    )
    assert baseline(LOG, [asam, LOG], ("sam", "asam")) == asam
    assert baseline(LOG, [asam, SAM], ("sam", "asam")) == SAM
    assert baseline(asam, [asam, SAM], ("sam", "asam")) == SAM
    assert baseline(SAM, [asam, SAM], ("sam", "asam")) is None
    assert baseline(within, [nested, within], ("MSAM(128)",)) == nested
    assert baseline(LOG, [SAM, asam], ()) is None


def test_baselines_may_be_given_by_method():
    asam, abisam = replace(SAM, method="asam"), replace(SAM, method="abisam_log")
    given = {"abisam_log": "asam", "bisam_log": "sam"}
    recipes = [SAM, LOG, asam, abisam]
    assert [baseline(recipe, recipes, given) for recipe in recipes] == [None, SAM, None, asam]


# Tables


def test_the_summary_is_mean_and_standard_deviation_over_seeds():
    sgd, sam, log = report.summary(SMALL)
    assert [row["method"] for row in (sgd, sam, log)] == ["SGD", "SAM", "BiSAM (-log)"]
    assert sgd["test_best_mean"] == pytest.approx(0.65)
    assert sgd["test_best_std"] == pytest.approx(0.0707106781)
    assert sam["test_last_mean"] == pytest.approx(0.90)
    assert (sam["n"], sam["seconds_per_epoch"], sam["rho"], sam["metric"]) == (2, 0.5, 0.4, "accuracy")
    assert (sgd["rho"], sgd["epochs"]) == ("", 6)


def test_differences_are_columns_of_the_csv():
    sgd, sam, log = csv.DictReader(io.StringIO(to_csv(report.summary(SMALL))))
    assert (log["baseline"], log["pairs"]) == ("SAM", "2")
    assert float(log["difference_mean"]) == pytest.approx(0.015)
    assert float(log["difference_high"]) == pytest.approx(0.015 + 12.706205 * 0.005, abs=1e-6)
    assert float(sgd["difference_mean"]) == pytest.approx(-0.27)
    assert (sam["baseline"], sam["pairs"], sam["difference_mean"]) == ("", "0", "nan")


def test_the_table_shows_what_varies():
    assert report.header(report.summary(SMALL)) == (
        *("method", "rho", "epochs", "best val.", "n", "difference", "p (Holm)", "detectable", "gradients", "time"),
    )
    header = report.header(report.summary(study(noises=(0.0, 0.4))))
    assert header[:6] == ("dataset", "model", "noise", "method", "rho", "epochs")
    header = report.header(report.summary(GLUE))
    assert header[:5] == ("dataset", "method", "rho", "epochs", "metric")
    assert "difference" not in header
    several = [run(SAM), run(replace(SAM, batch_size=32)), run(replace(LOG, mu=2.0))]
    header = report.header(report.summary(several))
    assert header[:5] == ("method", "rho", "epochs", "mu", "batch_size")


def test_the_brief_table_is_for_a_terminal():
    rows = report.summary(study())
    assert report.header(rows, brief=True) == (
        *("dataset", "model", "name", "rho", "best val.", "difference", "p (Holm)", "time"),
    )
    assert "rho" not in report.header(report.summary([run(SGD)]), brief=True)
    assert report.cells(report.summary(SMALL)[0], ("name",)) == ("SGD (2× epochs)",)


def test_cells_are_in_per_cent_with_the_interval():
    sgd, sam, log = report.summary(SMALL)
    header = report.header([sgd, sam, log])
    assert report.cells(sam, header) == (
        "SAM",
        "0.4",
        "3",
        "92.00 ± 2.83",
        "2",
        "–",
        "–",
        "–",
        "2 + 1 f",
        "2.00 ± 0.00",
    )
    assert report.cells(log, header)[5] == "+1.50 [−4.85, +7.85] (2)"
    assert report.cells(log, header)[6] == "0.205"  # 0.2048, and 0.0235 of SGD twice
    assert report.cells(log, header)[7] == "8.17 to 16.32"  # spread 0.7071 times 11.55 and 23.08, see significance
    assert report.cells(sgd, header)[1] == "–"


def test_a_single_seed_has_neither_spread_nor_difference():
    rows = report.summary([run(SAM), run(LOG, 0.92)])
    assert report.cells(rows[1], ("best val.", "difference")) == ("92.00", "–")
    assert (rows[1]["pairs"], rows[1]["difference_mean"]) == (1, pytest.approx(0.02))
    text = report.markdown("T", [run(SAM), run(LOG, 0.92)], {})
    assert "Difference:" not in text
    assert "nan" not in text


def test_without_a_baseline_there_is_no_column_and_no_word_of_it():
    text = report.markdown("T", SMALL, {}, baselines=())
    assert "difference" not in text.lower()


def test_an_average_of_weights_has_its_column_where_there_is_one():
    rows = report.summary([*seeded(SAM, 0.5, 0.6, test_ema=0.7), run(LOG)])
    assert "average" in report.header(rows)
    assert [report.cells(row, ("average",)) for row in rows] == [("70.00 ± 0.00",), ("–",)]


def test_the_report_has_numbers_and_where_they_come_from():
    text = report.markdown("Title", SMALL, {"flips.png": "What flips"}, "A [note](b.md).")
    assert text.startswith("# Title\n")
    assert "| SAM | 0.4 | 3 | 92.00 ± 2.83 | 2 | – | – | – | 2 + 1 f | 2.00 ± 0.00 |" in text
    assert "A [note](b.md)." in text
    assert "![What flips](flips.png)" in text
    assert "All runs: dataset digits, model convnet, noise 0.4, batch size 64, learning rate 0.1." in text
    assert "Made 2026-01-02 on" in text
    assert "commit 0123abc" in text


def test_words_say_what_is_decided_after_holm():
    scores = 0.90, 0.94, 0.92, 0.91, 0.93
    runs = [
        *seeded(SAM, *scores),
        *seeded(SGD, *(score - 0.2 - 0.001 * i for i, score in enumerate(scores))),
        *seeded(LOG, *(score + 0.004 + 0.001 * i for i, score in enumerate(scores))),
        *seeded(replace(SAM, method="asam"), *(score + 0.0005 * i for i, score in enumerate(scores))),
        *seeded(replace(SAM, method="bisam_tanh"), *(score + 0.01 * (-1) ** i for i, score in enumerate(scores))),
    ]
    text = report.markdown("T", runs, {})
    assert "minus that of SAM, paired by seed" in text
    assert "paired t test, adjusted over the 4 comparisons of this table" in text
    assert "Decided (2 of 4): SGD (2× epochs) (−20.20), BiSAM (-log) (+0.60)." in text
    assert "Undecided (2 of 4): ASAM (+0.10), BiSAM (tanh). For 1 of these the interval" in text
    both = report.markdown("T", [*runs, *seeded(replace(LOG, noise=0.0), 0.5, 0.6)], {})
    assert "Decided (2 of 4): label noise 40 %: SGD (2× epochs) (−20.20), BiSAM" in both


def test_many_undecided_are_counted_and_not_listed():
    runs = [one for rho in range(1, 15) for one in seeded(replace(LOG, rho=float(rho)), 0.9, 0.95)]
    text = report.markdown("T", [*seeded(SAM, 0.92, 0.91), *runs], {})
    assert "Decided: none of 14. Undecided (14 of 14)." in text


def test_a_page_says_how_to_read_it_and_which_score_is_the_headline():
    text = report.markdown("T", SMALL, {})
    _, _, below = text.partition("\n## How to read this page\n")
    paragraph = next(line for line in below.splitlines() if "The headline score" in line)
    for word in ("95 % interval", "Holm-adjusted p", "Detectable", "The headline score"):
        assert paragraph.count(word) == 1
    assert "is that of the epoch with the best validation score; these runs took the first of several" in paragraph
    known = {"headline": "last", "validation_examples": 270}
    runs = [
        one
        for recipe, ties in ((SAM, 8), (LOG, 3))
        for one in seeded(recipe, 0.90, 0.94, validation_ties=ties, **known)
    ]
    text = report.markdown("T", runs, {})
    assert "is that of the last epoch, because validation has 270 examples (fewer than 2,000); 5.5 epochs have" in text
    assert "the first of several" not in text
    text = report.markdown("T", seeded(SAM, 0.90, 0.94, headline="last", validation_examples=0), {})
    assert "because no example is held out: the validation score is that of the training examples. " in text
    alone = report.markdown("T", [run(SAM)], {})
    assert "How to read" in alone
    assert "detectable" not in alone.lower()
    assert "Holm" not in alone


def test_the_headline_is_shown_and_compared_and_the_other_score_is_in_the_csv():
    last = {"headline": "last", "validation_examples": 270, "validation_ties": 4}
    scores = {"scores": {"best": {"accuracy": 0.9}, "last": {"accuracy": 0.5}}, "test_last": 0.5}
    runs = [
        *seeded(SAM, 0.9, 0.8, **last),
        *(replace(one, result={**one.result, **scores}) for one in seeded(LOG, 0.9, 0.8, **last)),
    ]
    rows = report.summary(runs)
    header = report.header(rows)
    assert "last" in header
    assert "best val." not in header
    assert [report.cells(row, ("last",)) for row in rows] == [("83.00 ± 7.07",), ("50.00 ± 0.00",)]
    assert rows[1]["difference_mean"] == pytest.approx(0.5 - 0.83)
    assert (rows[0]["headline_mean"], rows[0]["test_best_mean"], rows[0]["validation_ties"]) == (
        *(pytest.approx(0.83), pytest.approx(0.85), 4),
    )
    assert report.crossed(grouped(runs))[1]["BiSAM (-log)"] == [[0.5, 0.5]]
    ax = figures.draw("time", runs).axes[0]
    assert ax.get_ylabel() == "test accuracy (%), last epoch"
    labels = figures.draw("accuracy", runs).legends[0].get_texts()
    assert [label.get_text() for label in labels[:2]] == ["last epoch (headline)", "best validation epoch"]
    # Small data sets beside large ones: a column says which score it is.
    large = seeded(replace(SAM, dataset="cifar10"), 0.95, 0.96, headline="best", validation_examples=5000)
    rows = report.summary([*runs, *large])
    assert report.header(rows)[4:6] == ("test", "weights")
    assert [report.cells(row, ("test", "weights")) for row in (rows[0], rows[2])] == [
        ("83.00 ± 7.07", "last"),
        ("95.50 ± 0.71", "best val."),
    ]
    assert "the last epoch where validation has fewer than 2,000 examples, else of the epoch with" in report.markdown(
        "T", [*runs, *large], {}
    )


def test_runs_before_the_rule_keep_their_score_beside_later_ones():
    later = seeded(SAM, 0.90, 0.94, headline="last", validation_examples=270, validation_ties=8)
    earlier = seeded(replace(SAM, version=2), 0.91, 0.93)
    rows = report.summary([*later, *earlier])
    assert [row["headline"] for row in rows] == ["last", "best"]
    assert [report.cells(row, ("test", "weights"))[1] for row in rows] == ["last", "best val."]
    text = report.markdown("T", [*later, *earlier], {})
    assert "that of the last epoch, and in runs of earlier versions of the epoch with the best validation" in text
    assert "because validation has" not in text
    assert "the older runs took the first of several such epochs" in text
    assert "from recipe version 3 on the split" in text
    assert "not the split" in report.markdown("T", earlier, {})


def test_methods_stand_side_by_side_where_there_are_several_places():
    runs = arranged([*seeded(SAM, 0.8, 0.9), *seeded(replace(SAM, noise=0.0), 0.7), *seeded(LOG, 0.8)])
    heads, rows = report.crossed(grouped(runs))
    assert heads == ["label noise 0 %", "label noise 40 %"]
    assert rows == {"SAM": [[0.7], [0.8, 0.9]], "BiSAM (-log)": [[], [0.8]]}
    text = report.markdown("T", runs, {})
    assert "| SAM | 70.00 | 85.00 ± 7.07 |\n| BiSAM (-log) | – | 80.00 |" in text
    assert "Side by side" not in report.markdown("T", SMALL, {})


def test_columns_of_metrics_are_averaged_over_tasks_for_common_seeds():
    heads, rows = report.crossed(grouped(GLUE))
    assert heads == [
        *("glue:cola Matthews correlation", "glue:mrpc F1", "glue:mrpc accuracy", "glue:rte accuracy", "average"),
    ]
    (row,) = rows.values()
    assert row[:4] == [[0.50, 0.54], [0.90, 0.92], [0.8, 0.8], [0.60, 0.64]]
    assert row[4] == pytest.approx([(0.50 + 0.85 + 0.60) / 3, (0.54 + 0.86 + 0.64) / 3])
    _, rows = report.crossed(grouped([*GLUE, run(replace(GLUE[0].recipe, seed=7))]))
    assert len(rows["SAM"][-1]) == 2


def test_of_a_long_tail_the_balanced_accuracy_is_averaged_and_of_text_nothing():
    def scored(dataset, **scores):
        recipe = replace(SAM, dataset=dataset, imbalance=10.0)
        one = run(recipe)
        return replace(one, result={**one.result, "scores": dict.fromkeys(("last", "best", "ema"), scores)})

    tails = [scored(name, balanced=score, many=0.9, few=0.1) for name, score in (("cifar10", 0.5), ("cifar100", 0.3))]
    heads, rows = report.crossed(grouped(tails))
    assert heads[-1] == "average"
    assert rows["SAM"][-1] == [pytest.approx(0.4)]
    texts = [scored("text:pydoc", likelihood=0.3), scored("text:addition", exact_match=0.5, likelihood=0.9)]
    assert "average" not in report.crossed(grouped(texts))[0]


def test_a_score_of_several_metrics_is_in_the_csv():
    rows = {row["dataset"]: row for row in report.summary(GLUE)}
    assert rows["glue:mrpc"]["test_best_accuracy_mean"] == pytest.approx(0.8)
    assert rows["glue:mrpc"]["test_best_f1_mean"] == pytest.approx(0.91)
    assert math.isnan(rows["glue:cola"]["test_best_accuracy_mean"])


def test_each_data_set_has_its_table_where_models_vary_too():
    text = report.markdown("T", study(), {})
    for dataset in ("cifar10", "cifar100"):
        assert f"| {dataset} | wrn28_2 | wrn28_10 | average |" in text


def test_what_run_folders_say_is_not_obeyed():
    hostile = ["a|b", "<script>alert(1)</script>", "![x](http://evil)", "[x](http://evil)", "`*_y_*`", "&lt;", "$x$"]
    runs = [run(replace(SAM, dataset=name, model=f"m{i}", seed=s)) for i, name in enumerate(hostile) for s in (0, 1)]
    runs = [replace(one, result={**one.result, "hardware": "<img src=http://evil>\n# CPU"}) for one in runs]
    page = Page(pages.html(report.markdown("T", runs, {}), {}))
    assert page.tags & {"script", "img", "a", "em", "code"} <= {"script"}
    for name in hostile:
        assert name in page.text
    assert "<img src=http://evil> # CPU" in page.text
    assert page.text.count("alert(1)") == page.text.count("<script>alert(1)</script>")


# The ball


def in_the_ball(recipe: Recipe, *seeds: int, worst: float = 0.5, epochs: int = 4) -> list[Finished]:
    """Runs with two measured epochs."""
    made = [run(replace(recipe, seed=seed, epochs=epochs, measured_epochs=2)) for seed in seeds]
    found = []
    for one in made:
        rows = [dict(row) for row in one.metrics]
        for row in rows:
            at = row["epoch"] % 2 == 0
            row |= dict.fromkeys(BALL, 0.25 if at else math.nan)
            row["ball_worst"] = worst + 0.01 * one.recipe.seed + 0.001 * row["epoch"] if at else math.nan
        found.append(replace(one, metrics=rows))
    return found


def test_the_largest_errors_in_the_ball_are_compared_with_the_baselines():
    runs = in_the_ball(SAM, 0, 1, 2) + in_the_ball(LOG, 0, 1, 2, worst=0.4) + seeded(SGD, 0.5)
    text = report.markdown("T", runs, {"ball.png": "ball"})
    _, _, section = text.partition("## The largest error in the ball, after the last epoch")
    assert "L2 ball of radius 0.05" in section
    assert "on at least 1,000 training examples" in section
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("|")]
    assert rows[0][:5] == ["method", "error at w", "largest error", "n", "difference"]
    assert rows[0][5:] == [
        *("p (Holm)", "detectable"),
        *("flips: sam", "flips: cross-entropy", "flips: log", "flips: tanh"),
        *("cosine: cross-entropy", "cosine: log", "cosine: tanh"),
    ]
    assert rows[2][:8] == ["SAM", "25.00 ± 0.00", "51.40 ± 1.00", "3", "–", "–", "–", "25.00 ± 0.00"]
    assert rows[3][:3] == ["BiSAM (-log)", "25.00 ± 0.00", "41.40 ± 1.00"]
    assert rows[3][4:7] == ["−10.00 all equal (3)", "–", "–"]
    assert rows[3][11:] == ["0.25 ± 0.00"] * 3
    assert len([row for row in rows if row[0].startswith("SGD")]) == 0
    assert "The largest error in the ball" not in report.markdown("T", runs, {})


# Published


def test_published_numbers_name_their_source_and_nothing_recollected():
    for number in published.PUBLISHED:
        assert number.source
        assert number.quantity in published.QUANTITIES
        assert "(" in number.method or any(re.fullmatch(number.method, name) for name in METHODS)
        assert set(number.where) <= set(SAM.to_dict())
        assert "MEM" not in number.source


def test_ours_stands_beside_the_published_number():
    log = replace(PAPER, method="bisam_log")
    runs = [*seeded(PAPER, 0.941, 0.945, time=2.0), *seeded(log, 0.94, 0.95, time=2.2)]
    found = {(one.recipe.method, one.title): (one.text, one.published.text) for one in beside(grouped(runs))}
    assert found["bisam_log", "time of an epoch, relative to SAM's"] == ("1.10 ± 0.00 (2)", "1.30 (30 / 23 s)")
    assert found["sam", "flipped training samples, epoch 100"] == ("1000 ± 0 (2)", "1250 to 1310")
    assert found["bisam_log", "flipped training samples, most in epochs 101 to 200"] == ("2000 ± 0 (2)", "1890")
    assert len(found) == 7
    (one,) = beside(grouped(seeded(replace(PAPER, rho=0.1), 0.941, 0.945)))
    assert (one.title, one.text, one.published.text) == ("validation accuracy at the end (%)", "94.2 ± 0.3 (2)", "94.0")
    text = report.markdown("T", runs, {})
    assert "## Published" in text
    assert "\n1. Xie et al., 2024, figure 2, read off figs/reverse0\\_resnet56.png" in text.replace("0_r", "0\\_r")


def test_a_published_number_is_for_its_own_setting():
    others = {"epochs": 15, "limit": 100, "noise": 0.2, "model": "resnet20", "dataset": "cifar100", "rho": 0.2}
    others |= {"batch_size": 256, "learning_rate": 0.05, "label_smoothing": 0.0, "optimizer": "adamw", "augment": False}
    for name, value in others.items():
        assert beside(grouped([run(replace(PAPER, **{name: value}))])) == []


@pytest.mark.parametrize("changes", [{"mu": 10.0}, {"rho": 0.01}, {"method": "bisam_tanh", "alpha": 1.0}])
def test_published_flips_are_of_the_papers_bounds_and_radius(changes):
    assert all("flipped" in one.title for one in beside(grouped([run(replace(CIFAR, rho=None))])))
    assert len(beside(grouped([run(replace(CIFAR, rho=None))]))) == 3
    assert beside(grouped([run(replace(CIFAR, **changes))])) == []


def test_without_a_published_number_the_report_says_so():
    text = report.markdown("T", SMALL, {})
    assert "no number for these settings was found in a public source" in text
    assert "## Published" not in text


def test_sampa_counts_one_gradient_in_sequence():
    sampa = replace(PAPER, method="sampa")
    runs = [*seeded(PAPER, 0.9), *seeded(sampa, 0.9)]
    found = {one.title: one for one in beside(grouped(runs)) if one.recipe.method == "sampa"}
    one = found["gradients one after another, relative to SAM's"]
    assert (one.text, one.published.text) == ("0.50 (1)", "0.50 (70,400 / 140,800)")
    assert published.in_sequence(replace(SAM, method="looksam"), 1.2) == 1.2


@pytest.mark.parametrize(
    ("method", "number"),
    [
        ("sam", "66.62 ± 0.43"),
        ("MSAM(128, SAM(L2(0.05)))", "66.62 ± 0.43"),
        ("MSAM(128, BiSAM(0.05, NegLog(5.0)))", "66.71 ± 0.21"),
        ("MSAM(128, BiSAM(0.05, Tanh(20.0, 0.1)))", "66.64 ± 0.80"),
    ],
)
def test_the_reply_to_reviewers_is_beside_imagenet(method, number):
    recipe = Recipe(dataset="imagenet", model="torchvision:resnet50", method=method, batch_size=512)
    first, fifth = beside(grouped([run(recipe, 0.7, more={"top5": 0.9})]))
    assert (first.text, first.published.text) == ("70.00 (1)", number)
    assert (fifth.title, fifth.text) == ("top-5 accuracy (%)", "90.00 (1)")
    assert "a third of ImageNet-1K" in first.published.setting


# Pages


class Page(HTMLParser):
    """Tags, attributes and visible text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self._skip = False
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self._skip = tag in ("script", "style")

    def handle_endtag(self, tag):
        self._skip = False

    def handle_data(self, data):
        self.text += "" if self._skip else data


def test_a_page_needs_nothing_else(tmp_path):
    drawn = {f"{name}.{kind}": figures.rendered(figures.draw(name, SMALL), kind)
             for name, kind in (("flips", "png"), ("accuracy", "svg"))}  # fmt: skip
    text = report.markdown("A < B", SMALL, dict.fromkeys(drawn, "What & why"), "See [there](../other/report.md).")
    html = pages.html(text, drawn)
    page = Page(html)
    sources = [value for _, name, value in page.attributes if name in ("src", "srcset", "data", "poster")]
    assert len(sources) == 1
    assert sources[0].startswith("data:image/png;base64,")
    assert "svg" in page.tags
    assert [value for tag, name, value in page.attributes if (tag, name) == ("a", "href")] == ["../other/report.html"]
    assert not page.tags & {"link", "iframe", "object", "embed", "base", "form"}
    assert html.count("url(") == html.count("url(#")  # of the page itself
    assert "@import" not in html
    assert "http" not in re.sub(
        "(?i)http-equiv", "", page.text + " ".join(v for _, n, v in page.attributes if n != "src")
    )
    assert "default-src 'none'" in html
    assert "<title>A &lt; B</title>" in html
    assert "prefers-color-scheme: dark" in html
    assert 'name="viewport"' in html
    for cell in ("92.00 ± 2.83", "What & why", "Made 2026-01-02"):
        assert cell in page.text


def test_a_pages_policy_admits_its_own_script():
    from base64 import b64encode
    from hashlib import sha256

    html = pages.html("# T", {})
    script = re.search("<script>(.*)</script>", html, re.DOTALL)[1]
    assert f"'sha256-{b64encode(sha256(script.encode()).digest()).decode()}'" in html


def test_a_page_shows_html_and_leaves_out_pictures_that_are_not_there():
    page = Page(pages.html("# T <b>x</b>\n\n<script>alert(1)</script>\n\n![gone](http://evil/x.png)", {}))
    assert "alert(1)" in page.text
    assert "b" not in page.tags
    assert "img" not in page.tags
    assert "gone" in page.text


# Figures


FIGURES = [name for name in figures.CAPTIONS if name not in ("ascents", "ball", "grid", "radii")]
VARIED = [run(replace(LOG, mu=mu, rho=rho)) for mu in (0.1, 1.0) for rho in (0.0, 0.1, 0.2)]


@pytest.mark.parametrize(
    ("name", "suffix"), [*((name, "svg") for name in FIGURES), (FIGURES[0], "png"), (FIGURES[0], "pdf")]
)
def test_figures_are_written_and_the_same_each_time(tmp_path, name, suffix):
    first, second = (tmp_path / f"{i}.{suffix}" for i in (1, 2))
    for path in (first, second):
        figures.save(figures.draw(name, SMALL), path)
    assert first.read_bytes()[:4] in (b"\x89PNG", b"<?xm", b"%PDF")
    assert first.read_bytes() == second.read_bytes()
    for stamp in (b"CreationDate", b"<dc:date>"):
        assert stamp not in first.read_bytes()


@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.parametrize(
    "some",
    [
        study(noises=(0.0, 0.4)),
        GLUE,
        [run(replace(SAM, epochs=1))],
        [run(replace(SAM, method=NESTED, rho=None, dataset="$x$ $\\frac{$")), run(replace(SAM, dataset="a_b^c"))],
    ],
    ids=["panels", "metrics", "single", "hostile"],
)
def test_figures_stand_several_places_metrics_and_names(some, name):
    if figures.usable(name, some):
        assert figures.rendered(figures.draw(name, some))[:4] == b"\x89PNG"


def test_a_title_fits_its_figure():
    place = {"dataset": "folder:flowers102-128", "model": "timm:tf_efficientnet_lite0"}
    figure = figures.draw(
        "accuracy", [one for recipe in (SAM, LOG) for one in seeded(replace(recipe, **place), 0.9, 0.8)]
    )
    figure.draw_without_rendering()
    (title,) = [text for text in figure.texts if "Test score" in text.get_text()]
    box = title.get_window_extent()
    assert 0 <= box.x0 < box.x1 <= figure.bbox.width


def test_the_registry_names_each_figure():
    for name in figures.CAPTIONS:
        assert callable(getattr(figures, name))
    with pytest.raises(ValueError, match="unknown figure 'flip', did you mean 'flips'"):
        figures.draw("flip", SMALL)


def test_the_figure_of_the_ball_has_the_measured_epochs_of_each_method():
    runs = in_the_ball(SAM, 0, 1) + in_the_ball(LOG, 0, 1, worst=0.4) + seeded(SGD, 0.5)
    axes = figures.draw("ball", runs).axes
    assert [ax.get_ylabel() for ax in axes] == ["largest error in the ball (%)", "error at the weights (%)"]
    lines = {line.get_label(): line for line in axes[0].get_lines()}
    assert lines.keys() == {"SAM", "BiSAM (-log)"}
    assert lines["SAM"].get_xdata().tolist() == [2, 4]
    assert lines["SAM"].get_ydata() == pytest.approx([50.7, 50.9])


@pytest.mark.parametrize("path", ["figure.jpg", "figure", "figure.png.gz"])
def test_other_formats_are_refused(tmp_path, path):
    with pytest.raises(ValueError, match=r"give a file that ends in \.png, \.pdf or \.svg"):
        figures.save(figures.draw("accuracy", SMALL), tmp_path / path)
    assert not list(tmp_path.iterdir())
    figures.save(figures.draw("accuracy", SMALL), tmp_path / "figure.PNG")


@pytest.mark.parametrize("name", ["flips", "figure2", "radius", "grid", "ball"])
def test_a_figure_without_its_runs_says_so(name):
    plain = seeded(SGD, 0.5)
    assert figures.usable(name, plain) == []
    with pytest.raises(ValueError, match=f"there is no run for {name}"):
        figures.draw(name, plain)
    with pytest.raises(ValueError, match=r"there (is|are) none"):
        getattr(figures, name)(plain)


def lines(ax) -> dict[str, tuple[list[float], list[float]]]:
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in ax.get_lines()}


def test_flips_are_counts_by_epoch_and_shares_and_not_of_sgd():
    (ax,) = figures.draw("flips", SMALL).axes
    assert lines(ax)["SAM"] == ([1, 2, 3], [10.0, 20.0, 30.0])
    assert set(lines(ax)) == {"SAM", "BiSAM (-log)"}
    (share,) = ax.child_axes
    assert share.get_ylabel() == "% of the training set"
    assert share._functions[0](107.8) == pytest.approx(10.0)


def test_flips_leave_out_methods_that_descend_on_a_part_of_the_batch():
    esam = seeded(replace(SAM, method="esam"), 0.9, 0.91)
    for one in esam:
        for row in one.metrics:
            row["flipped"] = math.nan
    figure = figures.draw("flips", [*SMALL, *esam])
    assert "ESAM" not in lines(figure.axes[0])
    assert "without ESAM: part of their batch is left out" in figure.get_suptitle()


def test_shares_need_one_size_of_the_training_set():
    (ax,) = figures.draw("flips", [run(SAM), run(replace(LOG, limit=9), examples=9)]).axes
    assert not ax.child_axes


def test_curves_are_means_with_bands_of_a_standard_deviation():
    score, loss = figures.draw("curves", SMALL).axes
    assert lines(score)["SAM"][1] == pytest.approx([82.0, 87.0, 92.0 - 10 / 3])
    assert lines(loss)["SAM"][1] == pytest.approx([2.0, 1.0, 2 / 3])
    bands = [one for one in score.collections if not isinstance(one, PathCollection)]
    assert len(bands) == 3
    assert score.get_ylabel() == "validation accuracy (%),\nlog scale of the error"
    low, high = bands[1].get_paths()[0].vertices[[1, -2]][:, 1]
    assert (high - low) / 2 == pytest.approx(100 * 0.02 * math.sqrt(2), abs=1e-6)
    alone = figures.draw("curves", [run(SAM)]).axes[0].collections
    assert all(isinstance(one, PathCollection) for one in alone)


def test_gradients_are_counted_in_sequence_and_all():
    counted, timed = figures.draw("gradients", [*SMALL, *seeded(replace(SAM, method="sampa"), 0.9, 0.95)]).axes
    assert lines(counted)["SAM"][0] == [34, 68, 102]
    assert lines(counted)["SGD (2× epochs)"][0] == [17, 34, 51, 68, 85, 102]
    assert lines(counted)["SAMPa-0.2"][0] == [17, 34, 51]
    assert lines(counted)["SAMPa-0.2, all gradients"][0] == [34, 68, 102]
    assert lines(timed)["SAMPa-0.2"][0] == [2, 4, 6]
    assert "SAMPa's two at once count as one" in counted.get_xlabel()
    assert "seconds" in timed.get_xlabel()


def test_the_radius_points_at_what_failed():
    runs = [one for rho, score in ((0.1, 0.9), (0.2, 0.95), (0.4, 0.2)) for one in seeded(replace(SAM, rho=rho), score)]
    (ax,) = figures.draw("radius", runs).axes
    failed = [line for line in ax.get_lines() if line.get_marker() == "v"]
    assert [list(line.get_xdata()) for line in failed] == [[0.4]]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0.1", "0.2", "0.4"]


def test_the_radius_shows_a_score_where_it_is_if_the_axis_reaches_it():
    wide = seeded(replace(SAM, rho=0.1), 0.9, 0.1)  # its error bar makes room for what would else be far below
    runs = [*wide, *(one for rho, score in ((0.2, 0.62), (0.4, 0.2)) for one in seeded(replace(SAM, rho=rho), score))]
    (ax,) = figures.draw("radius", runs).axes
    failed = [line for line in ax.get_lines() if line.get_marker() == "v"]
    assert [list(line.get_xdata()) for line in failed] == [[]]
    line = max(ax.get_lines(), key=lambda line: len(line.get_xdata()))
    assert list(line.get_ydata()) == pytest.approx([100 * score - 10 / 3 for score in (0.5, 0.62, 0.2)], abs=4)


def test_the_radius_shows_all_scores_if_most_are_far_below_the_best():
    runs = [one for rho, score in ((0.1, 0.9), (0.2, 0.3), (0.4, 0.2)) for one in seeded(replace(SAM, rho=rho), score)]
    (ax,) = figures.draw("radius", runs).axes
    assert ax.get_ylim()[0] < 20  # the score of the last epoch at 0.4
    assert not [line for line in ax.get_lines() if line.get_marker() == "v" and len(line.get_xdata())]


@pytest.mark.parametrize(
    ("least", "count", "angle"),
    [(0.1, 8, 0), (0.1, 9, 90), (0.025, 7, 0), (0.025, 8, 90), (0.00625, 5, 0), (0.00625, 6, 90)],
)
def test_labels_that_would_overlap_are_upright(least, count, angle):
    recipes = [replace(SAM, method=m, rho=least * 2**i) for i in range(count) for m in ("sam", "bisam_log", "vasso")]
    figure = figures.draw("radius", [one for recipe in recipes for one in seeded(recipe, 0.9)])
    figure.draw_without_rendering()
    for ax in figure.axes:
        assert {label.get_rotation() for label in ax.get_xticklabels()} == {angle}
        boxes = [label.get_window_extent() for label in ax.get_xticklabels()]
        assert all(left.x1 <= right.x0 for left, right in pairwise(boxes))


def test_radii_have_a_row_for_each_metric():
    texts = {"dataset": "text:addition", "model": "gpt"}
    asam = replace(SAM, method="asam", rho=2.0)
    scores = ((SAM, 0.9), (replace(SAM, rho=0.4), 0.8), (asam, 0.7), (replace(SAM, **texts), 0.05))
    runs = [one for recipe, score in scores for one in seeded(recipe, score)]
    for one in runs[-len(seeded(SAM, 0.9)) :]:
        one.result["metric"] = "exact_match"
    sam, other, text, empty = figures.draw("radius", runs).axes
    assert (sam.get_ylabel(), text.get_ylabel()) == ("accuracy (%)", "exact match (%)")
    assert (sam.get_title(), other.get_title(), text.get_title()) == ("SAM", "ASAM", "SAM")
    assert sam.get_ylim() == other.get_ylim() != text.get_ylim()
    assert not empty.axison


def test_the_grid_has_a_line_for_each_value_of_the_other_settings():
    rho, mu = figures.draw("grid", VARIED).axes
    assert (rho.get_xlabel(), mu.get_xlabel()) == ("rho", "mu")
    labels = [text.get_text() for text in rho.get_legend().get_texts()]
    assert labels == ["BiSAM (-log), mu 0.1", "BiSAM (-log), mu 1"]
    assert len(mu.get_legend().get_texts()) == 3
    assert tuning.varied(SMALL) == []


def test_the_grids_of_the_paper_are_drawn_in_a_row_for_each_data_set():
    rho, _, _ = figures.draw("grid", [run(recipe) for recipe in STUDIES["grid"].recipes(3)]).axes
    drawn = {box.get_label(): list(box.lines[0].get_xdata()) for box in rho.containers}
    for name in ("ASAM", "A-BiSAM (-log)", "A-BiSAM (tanh)"):
        assert drawn[name] == [0.02, 0.05, 0.1, 0.2, 0.5, 1.0]
    axes = figures.draw("grid", [run(recipe) for recipe in STUDIES["grid-vit"].recipes(3)]).axes
    shown = [(ax.get_subplotspec().rowspan.start, ax.get_title(), ax.get_xlabel()) for ax in axes]
    assert shown == [(0, "flowers", "mu"), (0, "flowers", "alpha"), (1, "pets", "mu"), (1, "pets", "alpha")]


def test_the_metric_and_its_unit_are_on_the_axis():
    labels = [ax.get_xlabel() for ax in figures.draw("accuracy", GLUE).axes]
    assert [label.splitlines()[0] for label in labels] == [
        "test Matthews correlation × 100",
        "test F1 × 100",
        "test accuracy (%)",
    ]


@pytest.fixture(scope="module")
def many() -> list[Finished]:
    """Every method, all in about the same place."""
    recipes = [replace(SAM, method=method, rho=METHODS[method].rho) for method in METHODS]
    return [one for recipe in recipes for one in seeded(recipe, 0.90, 0.91)]


def test_many_methods_are_ranked_and_named(many):
    (ax,) = figures.draw("time", many).axes  # they are all in one place: there is no crowd among others
    assert sorted(text.get_text() for text in ax.texts) == sorted(entry.name for entry in METHODS.values())
    labels = [text.get_text() for text in figures.draw("accuracy", many).axes[0].get_yticklabels()]
    assert sorted(labels) == sorted(entry.name for entry in METHODS.values())


def test_many_methods_are_in_a_panel_for_each_family_with_sam(many):
    axes = figures.draw("curves", many).axes[::2]
    families = {entry.family for entry in METHODS.values()}
    assert len(axes) == len(families)
    assert all("SAM" in lines(ax) for ax in axes)
    assert {label for ax in axes for label in lines(ax)} == {entry.name for entry in METHODS.values()}
    drawn = [ax for ax in figures.draw("flips", many).axes if ax.get_title()]
    assert len(drawn) == len(families) - 1  # of SAM alone there is no panel


@pytest.mark.parametrize("count", [5, 12, len(METHODS)])
def test_lines_on_one_panel_are_told_apart(count):
    called = names([Recipe(method=method) for method in list(METHODS)[:count]])
    styles = drawing.styles(called)
    assert set(styles) == set(called.values())
    assert len(set(styles.values())) == len(styles)
    assert styles["SAM"].colour == drawing.BLACK


def test_a_panel_starts_where_the_first_epochs_are_over():
    score, _ = figures.draw("curves", [run(replace(SAM, epochs=100))]).axes
    assert score.get_ylim()[0] > 85


def test_long_names_are_cut_to_a_few_lines():
    assert drawing.plain("a $b$ c") == r"a \$b\$ c"
    text = drawing.plain(" ".join(["word"] * 100), 20)
    assert len(text.splitlines()) == 4
    assert text.endswith("…")


# Runs that diverged


DIVERGED = [*seeded(SAM, 0.90, 0.94), *seeded(LOG, 0.91), run(replace(LOG, seed=1), 0.1, diverged=2)]


def test_runs_that_diverged_are_counted_named_and_part_of_the_means():
    sam, log = report.summary(DIVERGED)
    assert (sam["diverged"], sam["n"]) == (0, 2)
    assert (log["diverged"], log["n"]) == (1, 2)
    assert log["test_best_mean"] == pytest.approx((0.91 + 0.1) / 2)
    text = report.markdown("T", DIVERGED, {})
    called = report.escaped(names(grouped(DIVERGED))[LOG])
    assert f"Diverged: 1 of 4 runs, with the first epoch whose loss is not finite: {called}, seed 1 (epoch 2). " in text
    assert "are part of all means" in text
    heads, _, first, second = [line.split(" | ") for line in text.splitlines() if line.startswith("|")][:4]
    column = heads.index("diverged")
    assert [first[column], second[column]] == ["0", "1"]
    assert "diverged" in report.header([sam, log], brief=True)
    assert "diverged" in to_csv([sam, log]).splitlines()[0]


def ended_early(one, **entries):
    return replace(one, result={**one.result, **entries})


def test_a_report_says_how_many_ended_where_they_diverged():
    *others, last = DIVERGED
    text = report.markdown("T", [*others, ended_early(last, stopped="diverged")], {})
    assert "if there is one. All of them ended there." in text
    assert "ended there" not in report.markdown("T", DIVERGED, {})


def test_the_terminal_names_the_rows_with_runs_that_diverged():
    called = names(grouped(DIVERGED))[LOG]
    *others, last = DIVERGED
    words = "1 of 4 runs diverged, and are part of the means"
    assert report.brief_of_diverged(DIVERGED) == (
        f"{words}: {called} (1 of 2). The first one: the loss is not finite since epoch 2"
    )
    told = [*others, ended_early(last, message="loss is nan since epoch 2: a smaller --learning-rate or --rho")]
    assert report.brief_of_diverged(told).endswith("one: loss is nan since epoch 2: a smaller --learning-rate or --rho")
    noisy = [*told, run(replace(SAM, noise=0.2), 0.1, diverged=1)]
    assert "label noise 20 % (1 of 1)" in report.brief_of_diverged(noisy)
    assert report.brief_of_diverged(SMALL) == ""


def test_a_report_says_which_runs_ended_for_want_of_better_scores():
    early = [ended_early(one, stopped="patience") for one in DIVERGED[:2]]
    epochs = len(early[0].metrics)
    text = report.markdown("T", [*early, *DIVERGED[2:]], {})
    assert f"Early stopping: 2 of 4 runs ended after {epochs} epochs, because validation had not improved" in text
    assert "Early stopping" not in report.markdown("T", DIVERGED, {})


def test_a_report_without_such_runs_has_no_column_of_them():
    rows = report.summary(SMALL)
    assert "diverged" not in report.header(rows)
    assert "Diverged" not in report.markdown("T", SMALL, {})


def test_a_long_list_of_runs_that_diverged_is_cut():
    many = [run(replace(SAM, seed=seed), 0.1, diverged=1) for seed in range(15)]
    text = report.markdown("T", many, {})
    assert "Diverged: 15 of 15 runs" in text
    assert "seed 11 (epoch 1); and 3 more. They are" in text


@pytest.mark.parametrize("name", ["accuracy", "curves", "flips", "gradients", "time", "radius"])
def test_figures_say_how_many_runs_diverged(name):
    title = figures.draw(name, DIVERGED).get_suptitle()
    assert "1 of 4 runs diverged" in " ".join(title.split())
    assert "diverged" not in figures.draw(name, SMALL).get_suptitle()


def test_results_of_0_1_tell_it_by_their_metrics():
    one = run(SAM)
    assert one.diverged is None
    one.metrics[1]["train_loss"] = math.nan
    assert one.diverged == 2
    assert "Diverged: 1 of 1 runs" in report.markdown("T", [one], {})


# The command


@pytest.fixture
def finished(tmp_path):
    """Run folders of two recipes."""
    root = tmp_path / "runs"
    for one in SMALL[:4]:
        folder = Run.under(root / "digits", one.recipe)
        with folder.open():
            writer = folder.writer()
            writer.save({}, one.metrics)
            writer.finish(one.result, one.metrics)
    return root


def test_report_command_writes_markdown_csv_page_and_figures(finished, tmp_path, bisam):
    code, _, _ = bisam("report", "digits", "--out", finished, "--to", tmp_path / "elsewhere")
    assert code == 0
    made = {p.name for p in (tmp_path / "elsewhere").iterdir()}
    assert made == {"report.md", "report.csv", "flips.csv", "report.html", "accuracy.png", "flips.png", "curves.png"}
    rows = list(csv.DictReader(io.StringIO((tmp_path / "elsewhere" / "report.csv").read_text())))
    assert [row["method"] for row in rows] == ["SAM", "SGD"]


@pytest.mark.parametrize(
    ("file", "content"), [("result.json", "{}"), ("metrics.csv", "epoch\n1\n"), ("recipe.json", "[")]
)
def test_a_damaged_run_is_named_and_the_others_are_reported(finished, tmp_path, bisam, file, content):
    folder = Run.under(finished / "digits", replace(SAM, seed=1)).folder
    (folder / file).write_text(content)
    code, _, err = bisam("report", "digits", "--out", finished, "--to", tmp_path / "elsewhere")
    assert code == 0
    assert f"{file} is damaged" in err
    text = (tmp_path / "elsewhere" / "report.md").read_text()
    assert f"Left out, because they are damaged: {folder.parent.name}/seed-1/{file} (" in text
    assert f"{tmp_path}" not in text
    assert "| SGD |" in text
    assert "| SAM |" in text


def test_a_report_of_sgd_alone_has_no_figure_of_flips(finished, tmp_path, bisam):
    shutil.rmtree(finished / "digits" / SAM.slug)
    code, _, _ = bisam("report", "digits", "--out", finished, "--to", tmp_path / "elsewhere")
    assert code == 0
    made = {p.name for p in (tmp_path / "elsewhere").iterdir()}
    assert made == {"report.md", "report.csv", "report.html", "accuracy.png", "curves.png"}
    assert "flips" not in (tmp_path / "elsewhere" / "report.md").read_text()


def test_the_caption_says_that_seeds_draw_a_long_tail():
    tail = "and, of a long tail, the examples that are left"
    assert tail not in legends.caption([run(SAM)])
    assert tail in legends.caption([run(replace(SAM, imbalance=10.0))])


def test_the_caption_says_which_times_are_those_of_stacks():
    alone, stacked = run(SAM), run(replace(SAM, seed=1))
    stacked.result["stacked"] = 12
    assert "stack" not in legends.caption([alone])
    assert "; the runs were trained in stacks of 12 seeds at once, and" in legends.caption([stacked])
    assert "; some of the runs were trained in stacks of 12 seeds at once, and" in legends.caption([alone, stacked])


def test_run_folders_before_metrics_were_named_are_reported(finished):
    unknown_then = ("metric", "scores", "examples", "recipe", "metrics", "checksum")
    for path in finished.glob("digits/*/*/result.json"):
        old = json.loads(path.read_text())
        path.write_text(json.dumps({key: old[key] for key in old if key not in unknown_then}))
    for path in finished.glob("digits/*/*/metrics.csv"):
        rows = list(csv.DictReader(io.StringIO(path.read_text())))
        path.write_text(to_csv([{key: row[key] for key in ("epoch", "validation", "flipped")} for row in rows]))
    found = [one for one in finished_runs(finished / "digits") if isinstance(one, Finished)]
    assert len(found) == 4
    assert report.markdown("T", found, {})
    for name in FIGURES:
        assert figures.rendered(figures.draw(name, found))
