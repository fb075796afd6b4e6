"""The page of tables: every exhibit with its command, cost and results, and up to date."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from bisam.experiments.cli import tables
from bisam.experiments.launch.flops import Counts, missing
from bisam.experiments.measurements import MEASUREMENTS
from bisam.experiments.recipes.presets import CIFAR
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.reports.overview import ASSUMED, Throughput, page
from bisam.experiments.studies import STUDIES
from bisam.experiments.studies.paper import PAPER
from bisam.experiments.studies.papers import BISAM, RAPP, Exhibit
from bisam.experiments.studies.study import Study

DOCS = Path(__file__).parents[3] / "docs"
checkout = pytest.mark.skipif(not (DOCS / "tables.md").is_file(), reason="needs a checkout")


@checkout
def test_the_page_is_up_to_date():
    counts = Counts.read(DOCS / "tables.json")
    assert missing(tables.needed(), counts) == [], "run bisam tables --to docs/tables.md"
    assert (DOCS / "tables.md").read_text() == tables.written(DOCS, counts), "run bisam tables --to docs/tables.md"


@checkout
def test_its_links_lead_somewhere():
    links = re.findall(r"\]\(([^)]+)\)", (DOCS / "tables.md").read_text())
    assert [link for link in links if not link.startswith("https://") and not (DOCS / link).is_file()] == []
    assert len(links) > 10


def test_every_table_and_figure_of_bisam_is_there():
    shown = [one.exhibit.name for one in (*PAPER, *MEASUREMENTS.values()) if one.exhibit and one.exhibit.paper is BISAM]
    assert sorted(shown) == sorted({*shown})
    assert {*shown} >= {*(f"Table {i}" for i in range(1, 13)), "Figure 1", "Figure 2", "Appendix A.1"}


def test_every_study_of_a_paper_names_its_exhibit():
    assert [study.name for study in PAPER if study.exhibit is None] == []


def made(studies, docs: Path, **speeds: float) -> str:
    def cost(recipe: Recipe) -> float:
        return {"sgd": 1e15, "sam": 2e15}[recipe.method]

    return page(studies, [MEASUREMENTS["table12"]], cost, Throughput(speeds), {"torch": "2.x"}, docs)


def rows(text: str) -> dict[str, list[str]]:
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {row[0]: row for row in cells}


def test_a_new_study_appears_with_its_cost(tmp_path):
    recipes = [replace(CIFAR, method=method, rho=None, epochs=1) for method in ("sgd", "sam")]
    study = Study("new", "Figure 7: something", lambda epochs: recipes, seeds=3, exhibit=Exhibit(RAPP, "Figure 7"))
    text = made([study], tmp_path, resnet56=1e12)
    assert rows(text)["**Figure 7**: something"][1:] == [
        "`bisam run new --data-dir DATA`",
        "CIFAR-10",
        "2 x 3",
        "9.0 · 10¹⁵",
        "2.5",
        "not yet",
    ]
    assert "## RAPP\n\n[Pethick, Xie and Cevher, NeurIPS 2023](https://arxiv.org/abs/2310.13459)." in text
    assert rows(text)["**Table 12**: Time of an ascent loss, relative to cross-entropy"][3:6] == [
        "a measurement",
        "–",
        "–",
    ]


def test_results_are_linked(tmp_path):
    for place in ("reproduction/table12", "mine"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "report.md").write_text("")
    mine = Study("mine", "Mine", lambda epochs: [Recipe(method="sgd", dataset="digits")], seeds=1)
    text = made([mine], tmp_path)
    assert "[table12](reproduction/table12/report.md) |" in text
    assert rows(text)["Mine"][-1] == "[mine](mine/report.md)"


def test_a_cost_that_is_not_known_is_a_question(tmp_path):
    study = Study("odd", "Odd", lambda epochs: [Recipe(method="asam")], seeds=1)
    assert rows(made([study], tmp_path))["Odd"][4:6] == ["?", "?"]


def test_numbered_tables_come_first(tmp_path):
    names = ("Figure 2", "Table of 100 things", "Table 10", "Tables 2 and 3")
    studies = [Study(n, f"RAPP's table: {n}!", lambda _: [], 1, exhibit=Exhibit(RAPP, n)) for n in names]
    shown = [name for name in rows(made(studies, tmp_path)) if name.startswith("**") and name.endswith("!")]
    assert shown == [f"**{n}**: {n}!" for n in ("Tables 2 and 3", "Table 10", "Figure 2", "Table of 100 things")]


def test_throughput_of_published_epochs():
    seen = []

    def cost(recipe: Recipe) -> float:
        seen.append((recipe.model, recipe.epochs, recipe.method))
        return 23e12

    speeds = Throughput.published(cost, replace(CIFAR, method="sam"))
    assert speeds.known["resnet56"] == 1e12  # 23 s
    assert speeds.of("resnet20") == 1e12
    assert speeds.of("timm:vit_base_patch16_224") == ASSUMED
    assert {(epochs, method) for _, epochs, method in seen} == {(1, "sam")}


@checkout
def test_the_command_writes_the_page_again(tmp_path, monkeypatch, capsys):
    shutil.copy(DOCS / "tables.json", tmp_path)
    assert tables.tables(to=tmp_path / "tables.md") == 0
    text = (tmp_path / "tables.md").read_text()
    assert "not yet" in text
    assert all(f"`bisam run {name}" in text for name in (*STUDIES, *MEASUREMENTS))
    assert (tmp_path / "tables.json").read_text() == (DOCS / "tables.json").read_text()
