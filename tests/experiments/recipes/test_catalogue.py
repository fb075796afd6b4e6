"""The catalogue of methods: every expression is one, and costs what its row says, by count."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

import bisam
from bisam import SharpnessAware, cross_entropy
from bisam.experiments import cli
from bisam.experiments.recipes import catalogue, entries
from bisam.experiments.recipes.expressions import VOCABULARY, build, take_steps
from bisam.methods.method import indexed
from tests.support.doubles import Counting
from tests.support.memory import Weights

N, WIDTH = 64, 400
STEPS = defaultdict(lambda: 30, dict.fromkeys(("eigen_sam", "fisher_sam", "mesa", "ssam_f", "xsam"), 120))
"""Steps by method: whole periods of what it does from time to time."""
ENTRIES = {**catalogue.METHODS, **catalogue.GAMES}
each_entry = pytest.mark.parametrize(  # XSAM searches every 400 steps
    "key", [pytest.param(key, marks=pytest.mark.slow) if key in ("bsam", "xsam") else key for key in ENTRIES]
)


def settings(method: Any) -> dict[str, Any]:
    """The hyper-parameters of a nest; the outer ones win."""
    found: dict[str, Any] = {}
    for f in fields(method) if is_dataclass(method) else ():
        value = getattr(method, f.name)
        found = {**settings(value), **found, f.name: value}
    return found


def train(key: str, watch: Callable[[Any], Any]) -> tuple[Any, list[float], float]:
    """The method, and the memory in use in each forward pass and at the end, of a run on nearly one matrix."""
    torch.manual_seed(0)
    steps = STEPS[key]
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), nn.LayerNorm(WIDTH))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    method = build(ENTRIES[key].written(), optimizer=optimizer, steps=steps, epoch=4, examples=N)
    sharp, held, memory = SharpnessAware(model, watch(method), cross_entropy), list[float](), Weights(WIDTH * WIDTH)
    model.register_forward_pre_hook(lambda *_: held.append(memory.held()))
    with memory:
        for _ in range(steps):
            named = {"indices": torch.arange(N)} if indexed(method) else {}
            sharp(torch.randn(N, WIDTH), torch.randint(WIDTH, (N,)), **named).backward()
            optimizer.step()
            optimizer.zero_grad()
        return method, held, memory.held()


def evaluated(formula: str, method: Any, steps: int) -> tuple[float, float]:
    """The least and the most that a formula of the catalogue allows."""
    names = {"steps": steps, **settings(method), "n": N}
    bounds = [eval(part, {"__builtins__": {}}, names) for part in formula.split(" to ")]
    return bounds[0], bounds[-1]


@each_entry
def test_it_takes_the_gradients_forward_passes_and_memory_that_it_claims(key):
    entry, counts = ENTRIES[key], {"gradients": 0.0, "forwards": 0.0, "partial": 0.0}
    method, held, kept = train(key, lambda method: lambda oracle, batch: method(Counting(oracle, counts, N), batch))
    steps = STEPS[key]
    gradients, forwards, partial = (count / steps for count in counts.values())
    first = 1 / steps if key.startswith("sampa") else 0  # its docstring: one more at the first step
    least, most = evaluated(entry.gradients, method, steps)
    assert least - 1e-9 <= gradients - first <= most + 1e-9
    if " to " in entry.gradients:
        assert least < gradients < most  # it does both
    assert evaluated(entry.forwards, method, steps) == pytest.approx((forwards, forwards))
    assert partial <= 1 + 1e-9
    assert (partial > 0.5) == (partial > 0) == entry.partial  # a random part is sometimes all
    assert max(held) - 1 == pytest.approx(entry.memory, abs=0.02)  # 1: the weights
    assert kept - 1 == pytest.approx(entry.kept, abs=0.02)
    assert (entry.kept > 0) <= (entry.state != "")


def test_every_public_method_has_a_row():
    written = " ".join(entry.expression for entry in ENTRIES.values())
    written += " ".join(expression for _, expression, *_ in entries.ADVERSARIES)
    functions = {"Adaptive", "Follow", "L2", "next_step", "cross_entropy", "NegLog", "Tanh", "Binary"}
    public = {name for name in VOCABULARY if name in bisam.__all__} - functions
    assert {name for name in public if f"{name}(" not in written} == set()


@pytest.mark.parametrize("expression", [expression for _, expression, *_ in entries.ADVERSARIES])
def test_an_adversary_costs_what_sam_costs(expression):
    counts = defaultdict(float)
    take_steps(expression, N, 3, lambda method: lambda oracle, batch: method(Counting(oracle, counts, N), batch))
    assert counts == {"gradients": 6.0, "partial": 0.0}


def test_the_page_in_the_docs_is_the_present_one():
    page = Path(__file__).parents[3] / "docs" / "methods.md"
    assert page.read_text() == entries.page(catalogue.METHODS, catalogue.GAMES), (
        "run: bisam methods --to docs/methods.md"
    )


def test_the_command_lists_every_method(capsys, monkeypatch):
    for width in (60, 200):
        monkeypatch.setattr(cli.methods, "console", Console(width=width))
        assert cli.methods.methods() == 0
        text = capsys.readouterr().out
        assert all(word in text for word in ("Kwon", "average", "0.3 to 3"))
        lines = text.splitlines()
        assert {line.split()[0] for line in lines if line.strip()} >= set(catalogue.METHODS)
        assert max(map(len, lines)) <= width


def test_memory_of_masks_is_counted():
    held = Weights(100)
    with held:
        kept = [torch.zeros(100), torch.zeros(100, dtype=torch.bool), torch.zeros(10)]
    assert held.held() == 1.25
    kept.pop(0)
    assert held.held() == 0.25
