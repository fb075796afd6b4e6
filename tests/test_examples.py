"""Each example runs, and the twins differ by what the README says."""

from __future__ import annotations

import difflib
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


# They mostly import, and other tests use the same hosts.
LONG = {"train_fsdp2.py", "train_lora.py", "train_timm.py", "train_transformers.py", "train_trl.py"}
LONG |= {"train_accelerate.py", "train_composite.py", "train_ddp.py", "train_fabric.py", "train_lightning.py"}
LONG |= {"train_amp.py", "train_plain.py"}
SCRIPTS = [
    pytest.param(path, id=path.name, marks=[pytest.mark.slow] if path.name in LONG else [])
    for path in sorted(EXAMPLES.glob("train_*.py"))
]


@pytest.mark.parametrize("path", SCRIPTS)
def test_the_example_runs(path):
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]  # torchrun
    command = [sys.executable, *(several if "torchrun" in path.read_text() else []), path]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) > 0.85


def run(name: str, *arguments: str | Path) -> str:
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, *arguments], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def is_a_picture(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


@pytest.mark.slow
def test_the_games_end_as_the_figure_shows(tmp_path):
    rows = [line.split() for line in run("games.py", "--to", tmp_path / "games.png").splitlines()[2:]]
    distance = {name: (float(bilinear), float(cohypomonotone)) for name, bilinear, cohypomonotone in rows}
    assert is_a_picture(tmp_path / "games.png")
    assert {name for name, (d, _) in distance.items() if d < 0.1} == {"EG", "LA-GDA", "LA-EG", "RAPP"}
    assert {name for name, (_, d) in distance.items() if d < 0.1} == {"LA-EG", "RAPP"}
    assert all(d < 0.1 or d > 1e3 for both in distance.values() for d in both)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rapp", "lagda"])
def test_the_gan_trains(tmp_path, method):
    path = tmp_path / "new" / "gan.png"
    words = run("gan.py", "--method", method, "--evaluations", "100", "--to", path).replace(",", "").split()
    assert is_a_picture(path)
    assert 7 < float(words[-5]) < 8
    assert 1.0 <= float(words[-1]) < 8


@pytest.mark.slow
def test_nanogpt_learns_with_each_method():
    """To less than the entropy of single characters, 3.3; a model of pairs of them has 2.4."""
    ends = {method: float(run("nanogpt.py", "--method", method).split()[-1]) for method in ("adamw", "sam", "bisam")}
    assert all(1.5 < value < 2.9 for value in ends.values()), ends
    assert len(set(ends.values())) == 3


def test_the_twins_differ_by_an_import_an_object_and_a_line():
    plain, bisam = ((EXAMPLES / f"train_{name}.py").read_text().splitlines()[1:] for name in ("plain", "bisam"))
    changes = [line for line in difflib.ndiff(plain, bisam) if line[0] in "+-" and line[1:].strip()]
    assert [line[0] for line in changes] == ["+", "+", "-", "+"]


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("train_*.py")), ids=lambda path: path.name)
def test_an_example_is_short(path):
    assert len(path.read_text().splitlines()) < 60


def test_links_in_the_readme_lead_somewhere():
    root = EXAMPLES.parent
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", (root / "README.md").read_text())
    assert len(links) > 5
    assert [link for link in links if not (root / link).exists()] == []
