"""The setting that a study of trials chooses: the best mean validation score of the weights that are tested."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.reports.choice import choices, rows, section, validation_score
from bisam.experiments.runs.folder import Finished

SAM = Recipe(method="sam", noise=0.4, epochs=2)
SGD = Recipe(method="sgd", noise=0.4, epochs=4)


def run(recipe: Recipe, seed: int, last: float, best: float | None = None, headline: str = "last") -> Finished:
    recipe = replace(recipe, seed=seed)
    best = last if best is None else best
    result = {"test_best": 0.5, "test_last": 0.5, "validation_best": best, "best_epoch": 1, "headline": headline}
    metrics = [{"epoch": 1, "validation": best}, {"epoch": 2, "validation": last}]
    return Finished(recipe, result, metrics)


def tried(base: Recipe, name: str, scores: dict[float, tuple[float, ...]]) -> list[Finished]:
    return [
        run(replace(base, **{name: value}), seed, score)
        for value, each in scores.items()
        for seed, score in enumerate(each)
    ]


RUNS = [
    *tried(SAM, "rho", {0.4: (0.9, 0.8), 0.1: (0.5, 0.6), 0.2: (0.95, 0.75), 0.8: (0.3, 0.2)}),
    *tried(SGD, "weight_decay", {5e-4: (0.7, 0.7), 5e-3: (0.8, 0.7)}),
]


def test_the_largest_mean_is_chosen_and_of_equal_ones_the_smallest_value():
    """Radius 0.2 and 0.4 have the mean 0.85; the weight decay is chosen as a radius is, for a method without one."""
    sam, sgd = choices(RUNS)
    assert (sam.method, sam.settings, sam.best.values) == ("SAM", ("rho",), (0.2,))
    assert [trial.values for trial in sam.trials] == [(0.1,), (0.2,), (0.4,), (0.8,)]
    assert sam.best.score == pytest.approx(0.85)
    assert not sam.at_an_end
    assert (sgd.method, sgd.settings, sgd.best.values) == ("SGD", ("weight_decay",), (5e-3,))
    assert sgd.at_an_end


def test_the_score_is_of_the_weights_that_are_tested():
    for headline, expected in {"last": 0.6, "best": 0.9}.items():
        assert validation_score(run(SAM, 0, 0.6, 0.9, headline)) == expected
    early = [run(replace(SAM, rho=0.1), 0, 0.5, 0.99), run(replace(SAM, rho=0.2), 0, 0.6, 0.7)]
    assert choices(early)[0].best.values == (0.2,)
    late = [run(r.recipe, 0, r.metrics[1]["validation"], r.result["validation_best"], "best") for r in early]
    assert choices(late)[0].best.values == (0.1,)


def test_places_are_chosen_for_separately_and_a_lone_setting_is_none():
    clean = tried(replace(SAM, noise=0.0), "rho", {0.1: (0.9,), 0.2: (0.8,)})
    found = choices([*RUNS, *clean])
    assert [(one.place.noise, one.method) for one in found] == [(0.4, "SAM"), (0.4, "SGD"), (0.0, "SAM")]
    assert found[2].best.values == (0.1,)
    assert choices([run(SAM, 0, 0.9), run(SAM, 1, 0.8)]) == []
    assert section([run(SAM, 0, 0.9)]) == ""


def test_several_settings_are_chosen_together():
    base = Recipe(method="bisam_tanh", rho=0.05, epochs=2)
    runs = [
        run(replace(base, mu=mu, alpha=alpha), 0, score)
        for mu, alpha, score in ((1.0, 0.1, 0.5), (None, None, 0.9), (10.0, 1.0, 0.7))
    ]
    (one,) = choices(runs)
    assert (one.settings, one.best.values) == (("mu", "alpha"), (10.0, 0.1))  # the defaults of the bound
    assert not one.at_an_end


def test_the_section_says_what_is_at_an_end_or_unfinished():
    text = section(RUNS)
    assert "1 of 2 are at an end of their grid." in text
    assert "| SAM | rho 0.2 | 0.1: 55.00, 0.2: 85.00, 0.4: 85.00, 0.8: 25.00 |  |" in text
    assert "| SGD | weight decay 0.005 | 0.0005: 70.00, 0.005: 75.00 | at an end |" in text
    assert "| SAM | rho 0.2 | 0.1: 55.00, 0.2: 85.00, 0.4: 90.00, 0.8: 25.00 |" not in text
    assert "unfinished" in section(RUNS[:-1])
    assert "All are inside their grids." in section(RUNS[:8])
    found = rows(RUNS)
    assert [row["values"] for row in found if row["chosen"]] == ["0.2", "0.005"]
    assert len(found) == 6
