"""The answer that opens a report, and the order of what follows it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bisam.experiments.markdown import aligned, link, table
from bisam.experiments.reports import tables as report
from bisam.experiments.reports.answer import Wanted
from bisam.experiments.studies.study import Primary
from tests.experiments.reports.test_reports import LOG, SAM, SGD, SMALL, run, seeded

SCORES = 0.90, 0.94, 0.92, 0.91, 0.93
ABOVE = [*seeded(SAM, *SCORES), *seeded(LOG, *(score + 0.004 + 0.001 * i for i, score in enumerate(SCORES)))]
BELOW = seeded(SGD, *(score - 0.2 - 0.001 * i for i, score in enumerate(SCORES)))
AROUND = [*seeded(SAM, *SCORES), *seeded(LOG, *(score + 0.01 * (-1) ** i for i, score in enumerate(SCORES)))]
REGISTERED = Primary("-log against SAM", "bisam_log", seeds=range(5))


def answered(runs, **options) -> str:
    return report.opening(runs, **options)


@pytest.mark.parametrize(
    ("runs", "options", "said"),
    [
        ([*ABOVE, *BELOW], {}, "**Decided** after Holm are 2 of the 2 differences from SAM, in points: "
         "SGD (2× epochs) −20.20, BiSAM (-log) +0.60."),
        (ABOVE, {}, "**Decided:** the difference from SAM, BiSAM (-log) +0.60."),
        (AROUND, {}, "**Undecided:** the difference from SAM is not decided after Holm; 5 pairs would show true "
         "differences of 1.84 points with 80 % power, one test alone."),
        ([*AROUND, *seeded(SGD, *(score + 0.02 * (-1) ** i for i, score in enumerate(SCORES)))], {},
         "**Undecided:** none of the 2 differences from SAM is decided after Holm; 5 pairs would show true differences "
         "of 1.84 to 3.69 points with 80 % power, one test alone, and of 2.25 to 4.49 at Holm's strictest step."),
        (ABOVE, {"primary": REGISTERED}, "The registered comparison: BiSAM (-log) minus SAM is +0.60 [+0.40, +0.80] "
         "(5) points: **decided**, p = 0.001."),
        (AROUND, {"primary": REGISTERED}, "The registered comparison: BiSAM (-log) minus SAM is +0.20 [−1.16, +1.56] "
         "(5) points: **undecided**, p = 0.704; this n would show a true difference of 1.84 points with 80 % power."),
        ([*AROUND, *BELOW], {"primary": REGISTERED}, "**undecided**, p = 0.704; this n would show a true difference of "
         "1.84 points with 80 % power. **Decided:** the difference from SAM, SGD (2× epochs) −20.20."),
        (ABOVE, {"primary": replace(REGISTERED, seeds=range(20))}, "The registered comparison: **interim** "
         "(BiSAM (-log) minus SAM): 5 of 20 registered pairs are there, so nothing is decided."),
        (seeded(SAM, *SCORES), {"primary": REGISTERED}, "**No answer yet** to the registered comparison, -log against "
         "SAM: no seed has both of its runs."),
        (ABOVE, {"wanted": Wanted(2, 20)}, "**Unfinished:** 10 of the study's 40 runs are there. **Decided:**"),
        (ABOVE, {"wanted": Wanted(2, 5)}, "**Decided:** the difference"),
        (seeded(SAM, *SCORES), {}, "**No comparison:** SAM alone, with a test score of 92.00 ± 1.58."),
        ([*seeded(SAM, 0.9), *seeded(replace(SAM, rho=0.2), 0.91)], {}, "**No comparison:** 2 settings of SAM; the "
         "highest mean test score, untested, is 91.00 (SAM (rho 0.2))."),
        ([*seeded(SGD, 0.9), *seeded(LOG, 0.91)], {}, "**No comparison:** no method shares a setting and a seed with "
         "a baseline; the highest mean test score, untested, is 91.00 (BiSAM (-log))."),
        ([run(SAM), run(LOG)], {}, "**No test** of the difference from SAM: a test needs at least two seeds."),
        ([*seeded(SAM, 0.9, 0.9), *seeded(LOG, 0.9, 0.9)], {}, "**No test** of the difference from SAM: the pairs do "
         "not differ, or are not finite."),
        (AROUND, {"answers": ["Chosen: 0.1."], "tunes": True}, "Chosen: 0.1."),
        (AROUND, {"answers": ["Regret."]}, "Regret. **Undecided:**"),
    ],
)  # fmt: skip
def test_a_report_opens_with_what_is_decided(runs, options, said):
    assert said in answered(runs, **options)


def test_many_decided_differences_are_counted_and_the_largest_named():
    methods = ["asam", "bisam_tanh", "bisam_log", "abisam_log", "abisam_tanh", "gsam", "esam", "sampa"]
    runs = seeded(SAM, *SCORES)
    for k, method in enumerate(methods, 1):
        runs += seeded(replace(SAM, method=method), *(s + 0.01 * k + 1e-4 * i for i, s in enumerate(SCORES)))
    said = answered(runs)
    assert said.startswith("**Decided** after Holm are 8 of the 8 differences from SAM, in points: SAMPa")
    assert said.endswith(", and 2 smaller ones.")


def test_the_answer_is_followed_by_the_figure_and_that_by_the_table():
    text = report.markdown("T", SMALL, {"a.png": "First", "b.png": "Second"}, "A note.")
    places = [text.index(part) for part in ("**Undecided", "![First](a.png)", "| method |", "A note.", "![Second]")]
    assert places == sorted(places)


def test_columns_of_numbers_are_aligned_to_the_right():
    cells = [
        ("SAM", "66.10 ± 1.46", "–", "< 0.001", "2 + 1 f", "0 %", "0-1 sharpness", "0.1: 93.00, 0.2: 94.10", "1e-05"),
        ("8", "–", "+1.21 [−0.81, +3.24] (3)", "0.026 (primary)", "1", "40 %", "20-step", "0.1: 92.00", "**3**"),
        ("9", "–", "not finite (2)", "–", "1", "40 %", "5", "0.1: 92.00", "4"),
    ]
    rule = table([""] * 9, cells).splitlines()[1]
    assert rule == "| --- | ---: | ---: | ---: | ---: | ---: | --- | --- | ---: |"
    assert aligned(["a"], []) == "| a |\n| --- |"
    assert table(["n"], [["–"]]).splitlines()[1] == "| --- |"


def test_links_quote_what_a_path_may_have():
    assert link("a_ [b]", "x (1)/ä.csv") == "[a\\_ [b]](x%20%281%29/%C3%A4.csv)"
