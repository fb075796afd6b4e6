"""The gallery: each example runs by itself, draws, and shows what its text says."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

GALLERY = Path(__file__).parent.parent / "examples" / "gallery"
SCRIPTS = sorted(GALLERY.glob("*.py"))
NEEDS = {"finetune_lora": ("peft", "transformers"), "analyse": ("curvlinops", "torchmetrics")}


def numbers(pattern: str, text: str) -> list[float]:
    return [float(found) for found in re.findall(pattern, text)]


def label_noise(said: str) -> bool:
    sgd, *others = numbers(r"test accuracy ([\d.]+)", said)
    return all(sgd + 10 < other for other in others)


def fine_tuned(said: str) -> bool:
    (before,) = numbers(r"mirrored ([\d.]+)", said)
    return before < 0.5 and all(after > 85 for after in numbers(r"test accuracy ([\d.]+) %", said))


def analysed(said: str) -> bool:
    return said.count("expected calibration error") == 2


def two_processes(said: str) -> bool:
    (difference,) = numbers(r"losses (.*)", said)
    return "holds 9610 weights; rank 0 holds 4805, rank 1 4805" in said and difference < 1e-10


def tuned(said: str) -> bool:
    return numbers(r"rho ([\d.]+):", said)[0] in (0.4, 0.8) and numbers(r"accuracy ([\d.]+)", said)[0] > 85


def trained(least: float) -> Callable[[str], bool]:
    def check(said: str) -> bool:
        scores = numbers(r"test accuracy ([\d.]+)", said)
        return len(scores) >= 4 and all(score > least for score in scores)

    return check


SHOWS: dict[str, Callable[[str], bool]] = {
    "label_noise": label_noise,
    "adversary": lambda said: "are wrong after the step" in said,
    "analyse": analysed,
    "finetune_lora": fine_tuned,
    "fsdp2": two_processes,
    "gan_game": lambda said: said == "",
    "landscape": lambda said: said == "",
    "own_method": trained(0.9),
    "rho_schedule": trained(90),
    "tune": tuned,
}


def test_the_gallery_has_ten_examples():
    assert {path.stem for path in SCRIPTS} == set(SHOWS)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_an_example_has_a_title_a_picture_and_no_download(path):
    text = path.read_text()
    title, line, *_ = (ast.get_docstring(ast.parse(text)) or "").splitlines()
    assert set(line) == {"="}
    assert len(line) == len(title)
    assert "plt.subplots(" in text
    thumbnail = f"_static/gallery/{path.stem}.png"
    assert f'# sphinx_gallery_thumbnail_path = "{thumbnail}"' in text
    assert (GALLERY.parent.parent / "docs" / thumbnail).stat().st_size < 30_000
    assert "http" not in text
    assert len(text.splitlines()) <= 120


@pytest.mark.slow
@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_an_example_shows_what_it_says(path, tmp_path):
    for package in NEEDS.get(path.stem, ()):
        pytest.importorskip(package)
    environment = {**os.environ, "MPLBACKEND": "Agg"}
    command = [sys.executable, path]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=280, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert SHOWS[path.stem](done.stdout), done.stdout
    assert list(tmp_path.iterdir()) == []
