"""The suite itself: bisam and the reference pass, each case can fail, and the page agrees with the results."""

from __future__ import annotations

import re
from functools import cache
from importlib.util import find_spec

import pytest
import torch

from . import __main__ as command
from .behaviours import CASES
from .mutants import MUTANTS
from .reference import Looped, adapter as reference
from .runner import OURS, PYTORCH_OPTIMIZER, Result, applicable, attempt, distributed, joined, load, run
from .table import PAGE, verdicts

PASS = Result("pass")
HERE = [case for case in CASES if case.processes == 1]
ELSEWHERE = [case for case in CASES if case.processes > 1]
LOOPS = {name: f"{__package__}.{name}" for name in ("reference:adapter", "mutants:no_ascent", "mutants:alone")}
each_case = pytest.mark.parametrize("case", HERE, ids=lambda case: case.name)


@each_case
def test_ours(case):
    adapter = load(OURS)
    if applicable(adapter, case):
        assert attempt(adapter, case) == PASS
    else:
        assert attempt(adapter, case) != PASS, f"it works: remove {case.needs!r} from not_offered"


@each_case
def test_the_reference(case):
    if applicable(reference, case):
        assert attempt(reference, case) == PASS


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_defect_is_found(mutant):
    cases = [case for case in HERE if case.name in MUTANTS[mutant]]
    assert [case.name for case in cases if attempt(Looped(mutant), case) == PASS] == []


def test_every_case_can_fail():
    assert set().union(*MUTANTS.values()) == {case.name for case in CASES}


def column(name: str) -> tuple[str, dict[str, str]]:
    """Heading of an implementation on the page, and the verdicts below it."""
    return next((heading, rows) for heading, rows in verdicts(PAGE.read_text()).items() if heading.split()[0] == name)


@cache
def theirs_as_on_the_page() -> dict[str, str]:
    """Verdicts of pytorch_optimizer by statement; empty unless the version on the page is installed."""
    if not find_spec("pytorch_optimizer"):
        return {}
    adapter, made_with = load(PYTORCH_OPTIMIZER), re.search(r"torch (\d+\.\d+)\.", PAGE.read_text())
    heading, rows = column(adapter.name)
    same = (
        heading == f"{adapter.name} {adapter.version}" and made_with and torch.__version__.startswith(made_with[0][6:])
    )
    return rows if same else {}


def test_two_processes():
    """Starts two processes once for all cases that need them."""
    page = theirs_as_on_the_page()
    specs = [OURS, *LOOPS.values(), *([PYTORCH_OPTIMIZER] if page else [])]
    results = distributed([(spec, case.name) for spec in specs for case in ELSEWHERE])
    for case in ELSEWHERE:
        assert results[OURS, case.name] == results[LOOPS["reference:adapter"], case.name] == PASS
        assert not page or results[PYTORCH_OPTIMIZER, case.name].verdict == page[case.statement]
    assert results[LOOPS["mutants:no_ascent"], "step_under_ddp"].verdict == "fail"
    assert results[LOOPS["mutants:alone"], "replicas"].verdict == "fail"


def test_both_processes_must_pass(tmp_path):
    assert joined(tmp_path, 0, "a process died") == Result("fail", "a process died")
    (tmp_path / "0.0.json").write_text('{"verdict": "pass", "reason": ""}')
    assert joined(tmp_path, 0, "a process died") == Result("fail", "a process died")
    (tmp_path / "0.1.json").write_text('{"verdict": "fail", "reason": "off by 1"}')
    assert joined(tmp_path, 0, "a process died") == Result("fail", "off by 1")


def test_the_page_has_all_cases_and_our_results():
    adapter = load(OURS)
    expected = {case.statement: "pass" if applicable(adapter, case) else "n/a" for case in CASES}
    assert column("bisam")[1] == expected, "outdated page; run: python -m tests.conformance --to docs/conformance.md"


def test_the_page_has_the_results_of_pytorch_optimizer():
    page = theirs_as_on_the_page()
    if not page:
        pytest.skip("the page was made with another version of it, or of torch")
    results = run([PYTORCH_OPTIMIZER], HERE)[PYTORCH_OPTIMIZER]
    assert {case.statement: results[case.name].verdict for case in HERE} == {
        c.statement: page[c.statement] for c in HERE
    }


def test_what_pytorch_optimizer_does_not_offer_does_not_work():
    pytest.importorskip("pytorch_optimizer")
    adapter = load(PYTORCH_OPTIMIZER)
    cases = [case for case in HERE if not applicable(adapter, case)]
    assert [case.needs for case in cases if attempt(adapter, case) == PASS] == []


def made_up(specs):
    """Results in which the first case fails and the others pass."""
    return {s: {c.name: PASS if i else Result("fail", "off by 1") for i, c in enumerate(CASES)} for s in specs}


def test_the_command_shows_and_writes(tmp_path, capsys, monkeypatch):
    (tmp_path / "somebody.py").write_text(
        f"from {__package__}.reference import Looped as adapter\nadapter = adapter(version='3.1')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(command, "run", made_up)
    command.main(["--adapter", "somebody:adapter", OURS, "--to", str(tmp_path / "page.md")])
    shown, text = capsys.readouterr().out, (tmp_path / "page.md").read_text()
    assert shown.startswith("reference 3.1 | bisam ")
    assert f"fail fail {CASES[0].group}: {CASES[0].statement}\n     reference: off by 1\n" in shown
    assert "1. reference: off by 1.\n2. bisam: off by 1.\n" in text
    rows = verdicts(text)["reference 3.1"]
    assert list(rows) == [case.statement for case in CASES]
    assert list(rows.values()) == ["fail", *["pass"] * (len(CASES) - 1)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--adapter", "no_such_module:adapter"], "'no_such_module:adapter', which should be module:object: No module"),
        (["--adapter", "json:adapter"], "has no attribute 'adapter'"),
        (["--adapter", "json:dumps"], "has no attribute 'name'"),
        (["--adapter", "misspelt:adapter"], r"not_offered has ['GradScaler'], and may have ['torch.amp.GradScaler'"),
        (["--to", "no/such/folder/page.md"], "is no file in an existing folder"),
        (["--adaptor", "x"], "unrecognized arguments"),
    ],
    ids=lambda v: v[1] if isinstance(v, list) else None,
)
def test_mistakes_are_one_line(arguments, message, tmp_path, capsys, monkeypatch):
    (tmp_path / "misspelt.py").write_text(
        "class adapter:\n    name = version = make = ''\n    not_offered = {'GradScaler': 'no'}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SystemExit) as error:
        command.main(arguments)
    said = capsys.readouterr().err
    assert error.value.code == 2
    assert said.count("\n") == 1
    assert message in said
