"""The help of a command: flags in groups and examples that can be pasted; and the completion of names."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

pytest.importorskip("cyclopts")

from bisam.experiments.cli.flags import NO_FLAG
from bisam.experiments.cli.groups import OF_FIELD
from bisam.experiments.recipes.fields import Fields
from tests.experiments.cli.test_start import COMMANDS, loaded


def test_each_field_of_a_recipe_is_in_a_group():
    assert set(OF_FIELD) == set(Fields.__dataclass_fields__) - NO_FLAG


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_ends_with_examples_one_in_a_line(command, bisam, monkeypatch):
    monkeypatch.setenv("COLUMNS", "150")
    code, out, _ = bisam(command, "--help")
    assert code == 0
    head, *examples = [line.strip() for line in out[out.rindex("Example") :].splitlines() if line.strip()]
    assert head in ("Example:", "Examples:")
    assert examples[0].startswith(f"bisam {command}")
    assert all(example.startswith("bisam ") for example in examples)


def test_the_help_of_train_has_its_flags_in_groups(bisam, monkeypatch):
    monkeypatch.setenv("COLUMNS", "150")
    _, out, _ = bisam("train", "--help")
    headings = ("Data", "Model", "Method", "Optimizer and length", "Recipe in a file", "Machine", "Output")
    places = [out.index(f"─ {heading}") for heading in headings]
    assert places == sorted(places)
    assert places[2] < out.index("--rho") < places[3] < out.index("--epochs") < places[4]


def completed(*words: str) -> list[str]:
    """What the shell is offered, as its script asks for it."""
    command = [sys.executable, "-m", "bisam", "__complete", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return [line.partition("\t")[0] for line in done.stdout.splitlines() if not line.startswith("\x1f")]


@pytest.mark.parametrize(
    ("words", "some", "none"),
    [
        (("run", ""), {"digits", "table1", "figure1"}, {"sam"}),
        (("train", "--method", ""), {"sam", "bisam_log"}, {"digits"}),
        (("train", "--dataset", ""), {"digits", "glue:rte"}, {"folder:PATH", "cifar10:SIDE"}),
        (("train", "--model", ""), {"convnet", "resnet20"}, {"timm:NAME"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_names_are_completed(words, some, none):
    names = set(completed(*words))
    assert some <= names
    assert not none & names


def test_completing_imports_no_torch():
    codes, slow, _ = loaded(("__complete", "run", ""), ("__complete", "train", "--method", ""))
    assert slow == ""
    assert codes == ["0", "0"]


def test_the_help_of_plot_has_every_figure_of_a_study(bisam):
    from bisam.experiments.reports import figures, predictor_plot

    said = " ".join(re.sub(r"[│\n]", " ", bisam("plot", "--help")[1]).split())
    for name in (*figures.CAPTIONS, predictor_plot.NAME):
        assert f" {name}," in said or f" {name};" in said, name
