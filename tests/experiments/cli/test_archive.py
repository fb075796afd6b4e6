"""`bisam archive`: what it writes, and what the other commands do with it."""

from __future__ import annotations

import json
import re
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote

import pytest

pytest.importorskip("matplotlib")

from bisam.experiments.errors import RunError
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs import files
from bisam.experiments.runs.archive import write_archive
from bisam.experiments.runs.folder import Run
from bisam.experiments.studies import STUDIES
from bisam.statistics import NAMES

OF_STUDY = [recipe for recipe in STUDIES["digits"].recipes(None) if recipe.method in ("sgd", "sam")][:2]
RECIPES = [replace(recipe, seed=seed) for recipe in OF_STUDY for seed in (0, 1)]
REPORT = ["accuracy.png", "report.csv", "report.html", "report.md"]


def write(run: Run, *, finished: bool = True) -> None:
    """A run folder whose numbers are made up."""
    score = 0.9 + 0.01 * run.recipe.seed + 0.02 * run.recipe.is_plain
    rows = [
        {"epoch": epoch, "flipped": 3.0, "validation": score, "train_loss": 1 / epoch}
        for epoch in range(1, run.recipe.length + 1)
    ]
    result = {
        **dict.fromkeys(("test_best", "test_last", "validation_best"), score),
        "best_epoch": 1,
        "diverged": None,
        "device": "cpu",
        **dict.fromkeys(("seconds_per_epoch", "relative_time", "gradients_per_step", "forwards_per_step"), 1.0),
    }
    with run.open():
        writer = run.writer()
        writer.metrics(rows)
        if finished:
            writer.finish(result, rows)


@pytest.fixture
def runs(tmp_path) -> Path:
    for recipe in RECIPES:
        write(Run.under(tmp_path / "runs" / "digits", recipe))
    return tmp_path / "runs"


@pytest.fixture
def archive(runs, bisam) -> Path:
    assert bisam("archive", "digits", "--out", runs)[0] == 0
    return runs / "digits.tar.xz"


def without_links(text: str) -> str:
    """A page without its section on files, which links an archive or run folders."""
    return re.sub(r"\s*(<h2>|## )Files.*?(?=(<p>)?Made )", "", text, flags=re.DOTALL)


def test_the_report_of_an_archive_is_that_of_the_folders_but_for_its_links(runs, archive, tmp_path, bisam):
    folders = bisam("report", "digits", "--out", runs, "--to", tmp_path / "page")
    archived = bisam("report", "digits", "--out", archive, "--to", tmp_path / "other")
    assert folders[0] == archived[0] == 0
    assert folders[1].replace("page", "other") == archived[1]
    assert archived[2] == folders[2]
    for name in REPORT:
        pair = [(tmp_path / place / name).read_bytes() for place in ("page", "other")]
        if name.startswith("report.") and not name.endswith(".csv"):
            first, second = (without_links(one.decode()) for one in pair)
            assert first == second != pair[0].decode()
        else:
            assert pair[0] == pair[1]
    assert "[digits.tar.xz](../runs/digits.tar.xz)" in (tmp_path / "other" / "report.md").read_text()
    links = re.findall(r"\[[0-9]+\]\(([^)]*)\)", (tmp_path / "page" / "report.md").read_text())
    assert len(links) == len(RECIPES)
    assert all((tmp_path / "page" / unquote(link) / "result.json").is_file() for link in links)
    assert bisam("report", "digits", "--out", runs, "--to", tmp_path / "a" / "b" / "c")[0] == 0
    assert "../" not in (tmp_path / "a" / "b" / "c" / "report.md").read_text().partition("## Files")[2]  # far away
    for place in (runs, archive):
        assert bisam("plot", "accuracy", "digits", "--out", place, "--to", tmp_path / f"{place.name}.png")[0] == 0
    assert (tmp_path / "runs.png").read_bytes() == (tmp_path / "digits.tar.xz.png").read_bytes()


def test_without_a_folder_the_report_is_written_beside_the_archive(archive, tmp_path, bisam):
    there = archive.rename(tmp_path / "of digits.tar.xz")
    assert bisam("report", "digits", "--out", there)[0] == 0
    assert {path.name for path in (tmp_path / "digits").iterdir()} >= set(REPORT)


def test_unfinished_and_damaged_runs_are_left_out_and_counted(runs, tmp_path, bisam):
    for seed in (7, 8):
        write(Run.under(runs / "digits", replace(RECIPES[0], seed=seed)), finished=False)
    write(Run.under(runs / "digits", Recipe(method="asam", epochs=5)), finished=False)  # no run of the study
    (Run.under(runs / "digits", RECIPES[1]).folder / "result.json").write_text("{}")
    (Run.under(runs / "digits", RECIPES[2]).folder / "stats.csv").write_text("epoch,x\n1,2\n")
    (Run.under(runs / "digits", RECIPES[2]).folder / "analysis.json").write_text("{")
    code, out, err = bisam("archive", "digits", "--out", runs, "--to", tmp_path / "a.tar.xz")
    assert code == 0
    assert f"{tmp_path / 'a.tar.xz'}: 3 runs of digits" in out
    assert out.strip().endswith("left out: 2 unfinished, 1 damaged")
    damaged = [line for line in err.splitlines() if " is damaged (" in line]
    assert [line.partition(" is damaged")[0].rpartition("/")[2] for line in damaged] == [
        "result.json",
        "analysis.json",
        "stats.csv",
    ]
    code, _, err = bisam("report", "digits", "--out", tmp_path / "a.tar.xz", "--to", tmp_path / "page")
    assert code == 0
    assert "damaged" not in err
    assert "Left out" not in (tmp_path / "page" / "report.md").read_text()


def test_a_copy_of_a_run_is_not_counted(runs, tmp_path, bisam):
    """A backup beside the original would make n larger and standard deviations smaller."""
    assert bisam("report", "digits", "--out", runs, "--to", tmp_path / "before")[0] == 0
    table = (tmp_path / "before" / "report.csv").read_text()
    one, other = (Run.under(runs / "digits", recipe).folder for recipe in RECIPES[:2])
    copies = [one.parent.with_name("A-backup") / "seed-0", one.with_name("seed-0-old"), one.with_name("seed-7")]
    for copy in copies:
        shutil.copytree(one, copy)
    code, _, err = bisam("report", "digits", "--out", runs, "--to", tmp_path / "after")
    assert code == 0
    skipped = [line for line in err.splitlines() if "a run counts once" in line]
    assert skipped == [
        f"bisam: skipped: {copy} has the recipe and seed of {one}, and a run counts once: move one of them out of "
        f"{runs / 'digits'}"
        for copy in sorted(copies)
    ]
    assert (tmp_path / "after" / "report.csv").read_text() == table
    assert "Left out" not in (tmp_path / "after" / "report.md").read_text()
    assert "A-backup" not in (tmp_path / "after" / "report.md").read_text()
    _, out, _ = bisam("archive", "digits", "--out", runs, "--to", tmp_path / "a.tar.xz")
    assert out.strip().endswith(f"{len(RECIPES)} runs of digits, 2 kB")
    # Archives of earlier versions may have copies.
    folders = [folder.parent for folder in (runs / "digits").glob("*/seed-*/result.json")]
    with pytest.raises(RunError, match=r"no archive was written: \S+seed-0-old is not named as in RECIPE/seed-0"):
        write_archive(tmp_path / "b.tar.xz", runs / "digits", folders)
    folders.remove(one.with_name("seed-0-old"))
    write_archive(tmp_path / "b.tar.xz", runs / "digits", folders)
    code, _, err = bisam("report", "digits", "--out", tmp_path / "b.tar.xz", "--to", tmp_path / "archived")
    assert (code, err.count("a run counts once")) == (0, 2)
    assert f"{tmp_path / 'b.tar.xz'}: digits/A-backup/seed-0 has the recipe" in err
    assert (tmp_path / "archived" / "report.csv").read_text() == table
    # Without the original a copy is the run, and another one of another seed stays what it is.
    shutil.rmtree(one)
    assert bisam("report", "digits", "--out", runs, "--to", tmp_path / "later")[0] == 0
    assert (tmp_path / "later" / "report.csv").read_text() == table
    assert other.is_dir()


def test_statistics_are_kept(runs, tmp_path, bisam):
    run = Run.under(runs / "digits", RECIPES[2])
    with run.open():
        run.writer().stats([{"epoch": 1, **dict.fromkeys(NAMES, 0.5)}])
    assert bisam("archive", "digits", "--out", runs, "--to", tmp_path / "a.tar.xz")[0] == 0
    with tarfile.open(tmp_path / "a.tar.xz") as tar:
        (kept,) = (tar.extractfile(one).read() for one in tar if one.name.endswith("stats.csv"))
    assert kept == (run.folder / "stats.csv").read_bytes()


def test_equal_runs_give_an_equal_archive(runs, archive, bisam):
    before = archive.read_bytes()
    assert bisam("archive", "digits", "--out", runs)[0] == 0
    assert archive.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("run", "digits", "--out", "A"),
            "is an archive of finished runs, without checkpoints: nothing can be run in it",
        ),
        (("run", "digits", "--dry-run", "--out", "A"), "without checkpoints: nothing can be run in it"),
        (("run", "figure1", "--out", "A"), "nothing can be run in it"),
        (("train", "--out", "A"), "nothing can be run in it"),
        (("analyse", "A"), "without their weights: there is nothing to measure"),
        (("plot", "landscape", "A"), "is an archive of runs: unpack it with tar"),
        (("plot", "curves", "A"), "write `bisam plot curves STUDY --out"),
        (("archive", "digits", "--out", "A"), "is a file: give the folder"),
        (
            ("archive", "digits", "--out", "nowhere"),
            "no finished run of digits in nowhere: run `bisam run digits` first",
        ),
        (("archive", "digits", "--to", "digits.zip"), "the name of an archive ends in .tar.xz"),
        (("archive", "table12"), "table12 trains nothing"),
        (("archive", "digit"), "did you mean 'digits'"),
        (("report", "cifar10-small", "--out", "A"), "digits.tar.xz: it has runs in digits"),
        (("report", "digits", "--out", "B"), "is damaged ("),
        (("plot", "curves", "digits", "--out", "B"), "is damaged ("),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(archive, tmp_path, bisam, arguments, message):
    broken = tmp_path / "broken.tar.xz"
    broken.write_bytes(archive.read_bytes()[:-9])
    before = archive.read_bytes()
    code, out, err = bisam(*({"A": archive, "B": broken}.get(one, one) for one in arguments))
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert out == ""
    assert archive.read_bytes() == before


@pytest.mark.parametrize("name", ["result.json", "metrics.csv", "recipe.json", "analysis.json"])
def test_a_damaged_run_in_an_archive_is_the_archives_damage(runs, tmp_path, bisam, name):
    """As if the files had been changed before they were packed: an archive is read as a whole or not at all."""
    folder = Run.under(runs / "digits", RECIPES[1]).folder
    (folder / name).write_text("[")
    write_archive(tmp_path / "a.tar.xz", runs / "digits", [folder])
    code, out, err = bisam("report", "digits", "--out", tmp_path / "a.tar.xz", "--to", tmp_path / "page")
    assert (code, out) == (2, "")
    assert f"a.tar.xz is damaged (digits/{RECIPES[1].slug}/seed-1/{name}: " in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "page").exists()


def test_an_archive_is_written_as_a_whole_or_not_at_all(runs, archive, monkeypatch, bisam):
    before = archive.read_bytes()
    result = Run.under(runs / "digits", RECIPES[0]).folder / "result.json"
    result.write_text(json.dumps(json.loads(result.read_text()), indent=8))

    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "fsync", interrupted)
    code, _, err = bisam("archive", "digits", "--out", runs)
    assert (code, err) == (130, "interrupted\n")
    assert archive.read_bytes() == before
    assert [path.name for path in runs.iterdir() if path.suffix == ".tmp"] == []
