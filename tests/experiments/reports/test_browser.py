"""Pages in a real browser: widths of a phone and a desk, dark and light, sorting, and values at the points."""

from __future__ import annotations

import re

import pytest

from bisam.experiments.reports import figures, pages, tables as report
from tests.experiments.reports.test_reports import Page, study
from tests.support import browser as browsers

RUNS = study(("digits",), ("convnet",), (0.0, 0.4))
NAMES = ("accuracy", "flips")


@pytest.fixture(scope="module")
def browser():
    with browsers.started() as found:
        yield found


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    drawn = {f"{name}.png": figures.rendered(figures.draw(name, RUNS), "svg") for name in NAMES}
    text = report.markdown("A study", RUNS, {name: f"Figure {name}" for name in drawn}, files="[n](report.csv)")
    file = tmp_path_factory.mktemp("page") / "report.html"
    file.write_text(pages.html(text, drawn))
    return file


def opened(browser, path, width, scheme):
    """A tab with the page, and a list that gets its errors."""
    tab = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    errors: list[str] = []
    tab.on("console", lambda message: errors.append(message.text) if message.type in ("error", "warning") else None)
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.on("request", lambda request: errors.append(request.url) if not request.url.startswith("file:") else None)
    tab.goto(path.as_uri())
    return tab, errors


def brightness(colour: str) -> float:
    return sum(int(part) for part in re.findall(r"\d+", colour)[:3]) / 3


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1280])
def test_a_page_fits_its_screen_and_has_the_colours_of_the_scheme(browser, path, tmp_path, width, scheme):
    tab, errors = opened(browser, path, width, scheme)
    sizes = tab.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert sizes == [width, width]  # tables and figures scroll in their boxes
    paper = brightness(tab.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert paper > 200 if scheme == "light" else paper < 60
    ink = brightness(tab.evaluate("getComputedStyle(document.querySelector('svg text')).fill"))
    assert abs(ink - paper) > 150
    behind = brightness(tab.evaluate("getComputedStyle(document.querySelector('svg path')).fill"))
    assert abs(behind - paper) < 1  # of the figure
    tab.screenshot(path=tmp_path / "page.png", full_page=True)
    assert (tmp_path / "page.png").stat().st_size > 20_000
    assert errors == []
    tab.close()


def test_numbers_are_aligned_to_the_right_and_names_to_the_left(browser, path):
    tab, _ = opened(browser, path, 1280, "light")
    cells = tab.evaluate(
        """[...document.querySelectorAll('table')[0].tBodies[0].rows[0].cells].map(cell =>
           [cell.textContent, getComputedStyle(cell).textAlign])"""
    )
    heads = tab.evaluate(
        "[...document.querySelectorAll('table')[0].tHead.rows[0].cells].map(c => getComputedStyle(c).textAlign)"
    )
    assert dict(cells)["SGD"] == "left"
    assert [align for text, align in cells if " ± " in text] == ["right"] * 2
    assert [align for _, align in cells] == heads
    tab.close()


def test_a_click_on_a_header_sorts_the_rows(browser, path):
    tab, errors = opened(browser, path, 1280, "light")
    heads = tab.locator("table").first.locator("th button")
    i = heads.all_text_contents().index("method")
    column = f"[...document.querySelectorAll('table')[0].tBodies[0].rows].map(row => row.cells[{i}].textContent)"
    before = tab.evaluate(column)
    heads.nth(i).click()
    assert tab.evaluate(column) == sorted(before) != before
    assert errors == []
    tab.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_point_shows_its_seeds(browser, path, scheme):
    tab, errors = opened(browser, path, 1280, scheme)
    tip = tab.locator(".tip")
    assert not tip.is_visible()
    spot = tab.locator("svg .hover").first
    spot.scroll_into_view_if_needed()
    box = spot.bounding_box()
    tab.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    assert tip.is_visible()
    assert re.search(r"mean [0-9.]+ ± [0-9.]+\nseed 0: [0-9.]+\nseed 1: [0-9.]+", tip.text_content())
    tab.mouse.move(5, 5)
    assert not tip.is_visible()
    assert errors == []
    tab.close()


def test_figures_of_one_page_do_not_share_ids(path):
    ids = [value for _, name, value in Page(path.read_text()).attributes if name == "id"]
    assert len(ids) == len(set(ids)) > 100
