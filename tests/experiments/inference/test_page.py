"""The page on weights: every command and every block of code on it runs."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torchmetrics")
pytest.importorskip("safetensors")

from PIL import Image

from tests.test_pages import ROOT, blocks

PAGE = "docs/weights.md"
BLOCKS = blocks(PAGE)


@pytest.fixture
def here(digits, tmp_path, monkeypatch, bisam):
    """The working folder of a reader: the files that the page names, and RUN as a folder."""
    monkeypatch.chdir(tmp_path)
    assert not (tmp_path / "data").exists()  # digits need none
    shutil.copytree(digits.folder, tmp_path / "RUN")
    (tmp_path / "photographs").mkdir()
    for name in ("one", "two"):
        Image.new("L", (8, 8), len(name)).save(tmp_path / "photographs" / f"{name}.png")
    (tmp_path / "sentences.txt").write_text("he said\nshe was not\n")
    (tmp_path / "reviews.csv").write_text("review,stars\nhe said,1\n")
    return tmp_path


@pytest.fixture
def uploads(monkeypatch) -> list[str]:
    """The repositories to which something was uploaded."""
    found: list[str] = []
    api = SimpleNamespace(
        whoami=lambda: None,
        create_repo=lambda name, **_: f"https://huggingface.co/{name}",
        model_info=lambda _: SimpleNamespace(private=True),
        upload_folder=lambda repo_id, **_: found.append(repo_id),
    )
    monkeypatch.setattr(pytest.importorskip("huggingface_hub"), "HfApi", lambda: api)
    return found


def run_commands(section: str, bisam, *more: object) -> list[tuple[str, str, str]]:
    """Run the commands of a section; return each with its output and errors."""
    (block,) = [block for block in BLOCKS if block.section == section and block.language == "shell"]
    found = []
    for line in block.code.splitlines():
        program, *words = shlex.split(line)
        assert program == "bisam"
        code, out, err = bisam(*words, *more)
        assert code == 0, f"{line}: {err}"
        found.append((line, out, err))
    return found


def run_code(section: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    for block in BLOCKS:
        if (block.section, block.language) == (section, "python"):
            exec(block.code, names)
    return names


def test_every_block_is_run_below():
    assert [(block.section, block.language) for block in BLOCKS] == [
        *[("Export", "shell"), ("Export", "python"), ("Export", "python")],
        ("Publish", "shell"),
        *[("Evaluate", "shell"), ("Evaluate", "python")],
        *[("Predict", "shell"), ("Predict", "text")],
        ("Texts", "shell"),
        ("Start from a run", "shell"),
    ]


@pytest.mark.slow
def test_what_is_exported_is_loaded_evaluated_and_predicted(here, bisam):
    run_commands("Export", bisam)
    names = run_code("Export")
    assert names["logits"].shape == (3, 10)
    evaluated = run_commands("Evaluate", bisam)
    found = json.loads((here / "found.json").read_text())
    assert {"loss", "calibration", "margins", "corruptions", "tta"} <= found.keys()
    accuracies = [re.search(r"accuracy +│ +([\d.]+) %", out)[1] for _, out, _ in evaluated]
    assert accuracies[3] == accuracies[0]  # of the same weights
    assert run_code("Evaluate")["found"].scores == found["scores"]
    predicted = run_commands("Predict", bisam)
    (shown,) = [block.code for block in BLOCKS if block.language == "text"]
    assert re.sub(r",\d,0\.\d+", "", predicted[1][1]).split() == re.sub(r",\d,0\.\d+", "", shown).split()
    assert predicted[2][1].splitlines()[1] == predicted[1][1].splitlines()[1]
    assert (here / "out.csv").read_text().startswith("file,label,probability,label_2,probability_2,label_3,")


def test_it_is_published(here, uploads, bisam):
    run_commands("Publish", bisam)
    assert uploads == ["USER/NAME"]


def test_texts(here, texts, root, bisam):
    shutil.rmtree("RUN")
    shutil.copytree(texts["cola"].folder, "RUN")
    evaluated, *_ = run_commands("Texts", bisam, "--data-dir", root)
    assert "Matthews correlation" in evaluated[1]
    assert (here / "out.csv").read_text().startswith("file,line,label,probability\nreviews.csv,2,")


def test_runs_start_from_a_run(here, bisam):
    assert bisam("export", "RUN", "--to", "model.safetensors")[0] == 0
    run_commands("Start from a run", bisam)
    started = [json.loads(path.read_text())["weights"] for path in here.glob("runs/train/*/seed-0/recipe.json")]
    assert sorted(re.sub("[0-9a-f]{16}", "CHECKSUM", each) for each in started) == [
        "RUN:best@CHECKSUM",
        "RUN:last@CHECKSUM",
        "model.safetensors@CHECKSUM",
    ]


def test_links_of_the_page_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / PAGE).read_text())
    assert links
    assert [link for link in links if not (ROOT / "docs" / link).exists()] == []
    assert "docs/weights.md" in (ROOT / "README.md").read_text()
