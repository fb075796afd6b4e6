"""Scales of axes, names at points, and figures as vector graphics."""

from __future__ import annotations

import csv
import re
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from bisam.experiments.recipes.catalogue import METHODS
from bisam.experiments.reports import drawing, figures, labels, scatter, svg
from bisam.experiments.reports.scales import fit_scores, share, widen_scores, widen_values
from tests.experiments.reports.test_reports import LOG, SAM, SMALL, run, seeded


def panels(*lines):
    figure = Figure()
    axes = list(figure.subplots(1, len(lines), squeeze=False).flat)
    for ax, line in zip(axes, lines, strict=True):
        ax.plot(range(len(line)), line)
    return axes


def test_scores_near_100_are_spread_by_their_error_and_still_rise_upward():
    axes = panels([10, 90, 99], [50, 98.0, 99.5])
    assert widen_scores(axes, "y", [[10, 90, 99], [50, 98, 99.5]])
    fit_scores(axes, "y", [[10, 90, 99], [50, 98, 99.5]])
    (low, high), transform = axes[0].get_ylim(), axes[0].transData.transform
    assert low < 10
    assert 99.5 < high < 100
    (_, a), (_, b), (_, c), (_, d) = (transform((0, score)) for score in (90, 99, 99.5, 50))
    assert d < a < b < c
    assert (b - a) / (a - d) == pytest.approx(1 / np.log10(5), rel=1e-6)  # a decade of the error, and a fifth
    ticks = [float(label.get_text()) for label in axes[0].get_yticklabels()]
    assert {50, 90, 99} <= set(ticks)
    assert axes[0].get_ylim() == axes[1].get_ylim()


@pytest.mark.parametrize("scores", [[60, 62, 65], [], [float("nan")], [-5, 99], [101, 20]])
def test_scores_that_are_not_flat_or_no_shares_keep_their_scale(scores):
    axes = panels([60, 62, 65])
    assert not widen_scores(axes, "y", [scores])
    assert axes[0].get_yscale() == "linear"


def test_perfect_scores_have_a_place():
    axes = panels([50, 100])
    assert widen_scores(axes, "y", [[50, 100]])
    fit_scores(axes, "y", [[50, 100]])
    assert np.isfinite(axes[0].transData.transform((1, 100))).all()


@pytest.mark.parametrize(("values", "scale"), [([1, 20], "log"), ([1, 9], "linear"), ([0, 20], "linear")])
def test_values_that_differ_by_a_decade_are_logarithmic(values, scale):
    axes = panels(values)
    assert widen_values(axes, "y", [values]) == (scale == "log")
    assert axes[0].get_yscale() == scale


def test_panels_have_one_scale_or_say_that_they_do_not():
    alike, apart = panels([1, 5], [2, 8]), panels([1, 2], [1, 800])
    share(alike, "y")
    assert alike[0].get_ylim() == alike[1].get_ylim()
    assert "own scale" not in alike[0].get_ylabel()
    share(apart, "y")
    assert apart[0].get_ylim() != apart[1].get_ylim()
    assert all("each panel has its own scale" in ax.get_ylabel() for ax in apart)


@pytest.mark.parametrize("name", ["curves", "flips"])
def test_epochs_begin_at_zero(name):
    assert all(ax.get_xlim()[0] == 0 for ax in figures.draw(name, SMALL).axes)


def test_curves_of_many_settings_show_the_best_of_each_method():
    runs = [run(replace(one, rho=rho), 0.8 + rho) for one in (SAM, LOG) for rho in (0.01, 0.02, 0.03, 0.04, 0.05, 0.1)]
    figure = figures.draw("curves", runs)
    assert "of each method with the setting that validates best" in figure.get_suptitle()
    assert {line.get_label() for line in figure.axes[0].get_lines()} == {"SAM", "BiSAM (-log)"}


def test_titles_say_which_method_ends_best():
    assert figures.draw("accuracy", SMALL).axes[0].get_title() == "highest mean: BiSAM (-log)"
    assert figures.draw("curves", SMALL).axes[0].get_title() == "highest at the end: BiSAM (-log)"
    assert figures.draw("accuracy", [run(SAM)]).axes[0].get_title() == ""
    equal = [run(SAM), run(LOG)]
    assert figures.draw("accuracy", equal).axes[0].get_title() == "highest mean: 2 methods"
    assert figures.draw("curves", equal).axes[0].get_title() == "highest at the end: 2 methods"


# Names at points


def boxes(figure, texts):
    renderer = labels.FigureCanvasAgg(figure).get_renderer()
    for text in texts:
        text.update_positions(renderer)
    return [Text.get_window_extent(text, renderer) for text in texts]  # without the line to the point


@pytest.fixture(scope="module")
def crowded():
    """A report.csv with all methods, of which most are close together."""
    random = np.random.default_rng(3)
    times = np.where(np.arange(len(METHODS)) % 3 == 0, random.uniform(1, 3, len(METHODS)), 1.9)
    return [
        {
            "method": entry.name,
            "epochs": 30,
            "metric": "accuracy",
            "noise": 0.4,
            "headline": "last",
            "headline_mean": random.normal(0.93, 0.006),
            "headline_std": 0.01,
            "relative_time_mean": time + random.normal(0, 0.02),
            "relative_time_std": 0.03,
            "n": 5,
        }
        for entry, time in zip(METHODS.values(), times, strict=True)
    ]


def written(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_each_name_is_at_its_point_once_and_covers_no_other(crowded, tmp_path):
    figure = scatter.of_rows(written(tmp_path / "report.csv", crowded))
    texts = [text for ax in figure.axes for text in ax.texts]
    assert sorted(text.get_text() for text in texts) == sorted(entry.name for entry in METHODS.values())
    assert len(figure.axes) == 2  # the crowd is enlarged
    for ax in figure.axes:
        found = boxes(figure, ax.texts)
        frame = ax.get_window_extent()
        assert not [(a, b) for i, a in enumerate(found) for b in found[:i] if a.overlaps(b)]
        for text, box in zip(ax.texts, found, strict=True):
            anchor = ax.transData.transform(text.xy)
            assert not box.contains(*anchor)
            assert np.hypot(*(np.clip(anchor, (box.x0, box.y0), (box.x1, box.y1)) - anchor)) < 100
            assert frame.contains(box.x0, box.y0)


@pytest.mark.parametrize(
    "content", ["", "a,b\n1,2\n", "method,n\nSAM,3\n", "\xff\xfe", "method,test_last_mean\nSAM,x\n"]
)
def test_a_file_that_is_no_report_is_named(tmp_path, content, bisam):
    path = tmp_path / "report.csv"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=r"is no report\.csv of a study with times"):
        scatter.of_rows(path)
    code, _, errors = bisam("plot", "time", path, "--to", tmp_path / "a.png")
    assert code == 2
    assert "no report.csv" in errors
    assert "Traceback" not in errors


def test_only_times_are_drawn_from_a_file(bisam, tmp_path):
    code, _, errors = bisam("plot", "accuracy", tmp_path / "report.csv")
    assert code == 2
    assert "only time is drawn" in errors


def test_a_file_of_several_settings_is_refused(crowded, tmp_path):
    rows = [*crowded, {**crowded[0], "noise": 0.0}]
    with pytest.raises(ValueError, match="rows of 2 settings"):
        scatter.of_rows(written(tmp_path / "report.csv", rows))


# Vector graphics


def test_points_have_titles_in_svg_and_only_there(tmp_path):
    figure = figures.draw("accuracy", SMALL)
    text = drawing.rendered(figure, "svg").decode()
    assert "<title>SAM, best validation epoch\nmean 92 ± 2.828\nseed 0: 90\nseed 1: 94</title>" in text
    assert "hover-" not in text
    assert b"hover" not in drawing.rendered(figure, "png")


def test_a_figure_of_a_page_has_its_colours_and_ids_and_loads_nothing():
    text = svg.inline(drawing.rendered(figures.draw("flips", SMALL), "svg").decode(), "f7-", 'a "b" <c>')
    assert text.startswith('<svg viewBox="0 0 ')
    assert 'aria-label="a &quot;b&quot; &lt;c&gt;"' in text
    assert "var(--ink)" in text
    assert "var(--paper)" in text
    rest = re.sub(r"var\(--c[0-9a-f]{6}, #[0-9a-f]{6}\)", "", text)
    assert not re.search(r"#[0-9a-f]{6}\b(?!\))|<style|<metadata|http", re.sub(r'(href="|url\()#[^")]*', "", rest))
    ids, used = set(re.findall(r'\bid="([^"]*)"', text)), set(re.findall(r'(?:url\(|href=")#([^")]*)', text))
    assert used <= ids
    assert all(name.startswith("f7-") for name in ids)


def test_names_in_a_figure_are_no_markup():
    odd = "</title><script>alert(1)</script>"
    text = drawing.rendered(figures.draw("accuracy", seeded(replace(SAM, dataset="x", method="sam"), 0.1, 0.2)), "svg")
    assert b"<script" not in text
    figure = Figure()
    svg.spot(figure.subplots(), 1.0, 2.0, odd + ' "&')
    assert b"<script" not in drawing.rendered(figure, "svg")
    title = b"<title>&lt;/title&gt;&lt;script&gt;alert(1)&lt;/script&gt; &quot;&amp;</title>"
    assert title in drawing.rendered(figure, "svg")
