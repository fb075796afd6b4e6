"""The suite itself: bisam and the reference pass, each case can fail, and the page agrees with the results."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from functools import cache
from importlib.util import find_spec

import pytest
import torch

from tests.support.commands import check_mistake

from . import __main__ as command, runner
from .behaviours import CASES
from .mutants import MUTANTS
from .reference import Looped, adapter as reference
from .runner import OURS, PYTORCH_OPTIMIZER, Result, applicable, attempt, in_processes, joined, load, run
from .table import CAVEATS, COMMAND, INSTRUCTIONS, INTRODUCTION, PAGE, page as written, verdicts

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
    results = in_processes([(spec, case.name) for spec in specs for case in ELSEWHERE], processes=2)
    for case in ELSEWHERE:
        assert results[OURS, case.name] == results[LOOPS["reference:adapter"], case.name] == PASS
        assert not page or results[PYTORCH_OPTIMIZER, case.name].verdict == page[case.statement]
    assert results[LOOPS["mutants:no_ascent"], "step_under_ddp"].verdict == "fail"
    assert results[LOOPS["mutants:alone"], "replicas"].verdict == "fail"


def test_both_processes_must_pass():
    failed, late, dead = Result("fail", "off by 1"), Result("timeout", "not done"), Result("crash", "killed")
    assert joined([PASS]) == joined([PASS, PASS]) == PASS
    assert joined([PASS, failed]) == joined([failed, PASS]) == failed
    assert joined([PASS, late]) == late
    assert joined([late, failed]) == failed, "one waits for the other, which has failed"
    assert joined([failed, dead]) == dead, "one lost the other, which has died"


@pytest.mark.slow
def test_a_case_that_hangs_or_dies_costs_its_verdict_only():
    specs = {name: f"{__package__}.unruly:{name}" for name in ("hangs", "exits")}
    cases = [case for case in HERE if case.name in ("sam_with_sgd", "asam_with_sgd", "adamw")]
    results = run(list(specs.values()), cases, limit=10)
    bad = {name: results[spec].pop("asam_with_sgd") for name, spec in specs.items()}
    assert bad == {
        "hangs": Result("timeout", "not done after 10 s"),
        "exits": Result("crash", "the process exited with 3"),
    }
    assert all(of_one == {"sam_with_sgd": PASS, "adamw": PASS} for of_one in results.values())


def test_processes_that_do_not_start_are_reported(monkeypatch):
    monkeypatch.setattr(runner, "START", 0.0)
    late = Result("timeout", "the processes did not start: not done after 0 s")
    assert run([OURS], HERE[:2]) == {OURS: {case.name: late for case in HERE[:2]}}


@pytest.mark.slow
def test_a_process_that_dies_or_waits_for_the_other_costs_one_verdict_of_two():
    specs = [f"{__package__}.unruly:{name}" for name in ("leaves", "raises")]
    results = run(specs, ELSEWHERE, limit=10)
    assert [results[spec]["replicas"] for spec in specs] == [
        Result("crash", "the process was killed by SIGKILL"),
        Result("fail", "RuntimeError: no average"),
    ]
    assert [results[spec]["step_under_ddp"] for spec in specs] == [PASS, PASS]


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


def test_the_page_has_the_present_text():
    """The page is written by the command; its text is changed in table.py."""
    text = PAGE.read_text()
    assert [part for part in (INTRODUCTION, CAVEATS, INSTRUCTIONS, COMMAND) if part not in text] == []


def made_up(*first: Result, limits: list[float] | None = None):
    """A stand-in for `run`: results in which the first cases have these results and the others pass."""

    def run(specs, limit):
        if limits is not None:
            limits.append(limit)
        results = [*first, *[PASS] * (len(CASES) - len(first))]
        return {spec: {case.name: r for case, r in zip(CASES, results, strict=True)} for spec in specs}

    return run


@pytest.fixture
def somebody(tmp_path, monkeypatch) -> str:
    """An adapter in a module of its own."""
    (tmp_path / "somebody.py").write_text(
        f"from {__package__}.reference import Looped as adapter\nadapter = adapter(version='3.1')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return "somebody:adapter"


def test_the_command_shows_and_writes(somebody, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "run", made_up(Result("fail", "off by 1")))
    assert command.main(["--adapter", somebody, OURS, "--to", str(tmp_path / "page.md")]) == 1
    shown, text = capsys.readouterr().out, (tmp_path / "page.md").read_text()
    assert shown.startswith("reference 3.1 | bisam ")
    assert f"fail fail {CASES[0].group}: {CASES[0].statement}\n     reference: off by 1\n" in shown
    assert "1. reference: off by 1.\n2. bisam: off by 1.\n" in text
    rows = verdicts(text)["reference 3.1"]
    assert list(rows) == [case.statement for case in CASES]
    assert list(rows.values()) == ["fail", *["pass"] * (len(CASES) - 1)]


def test_a_timeout_and_a_crash_are_shown_and_explained(somebody, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "run", made_up(Result("timeout", "not done after 8 s"), Result("crash", "killed")))
    command.main(["--adapter", somebody, "--to", str(tmp_path / "page.md")])
    shown, text = capsys.readouterr().out, (tmp_path / "page.md").read_text()
    assert f"timeout {CASES[0].group}: {CASES[0].statement}\n     reference: not done after 8 s\n" in shown
    assert f"crash   {CASES[1].group}: {CASES[1].statement}\n     reference: killed\n" in shown
    assert f"pass    {CASES[2].group}: {CASES[2].statement}\n" in shown
    assert list(verdicts(text)["reference 3.1"].values())[:3] == ["timeout", "crash", "pass"]
    assert "* timeout: it was not done within the limit.\n* crash: its process died.\n" in text
    assert "* timeout" not in written({somebody: load(somebody)}, made_up()([somebody], 1), "here")


@pytest.mark.parametrize(
    ("first", "code"),
    [
        ([], 0),
        ([Result("n/a", "it is an optimizer")], 0),
        ([Result("fail", "off by 1")], 1),
        ([PASS, Result("timeout", "not done after 8 s")], 1),
        ([Result("crash", "killed")], 1),
    ],
    ids=lambda value: value[-1].verdict if isinstance(value, list) and value else str(value),
)
def test_the_exit_code_says_whether_a_case_failed(first, code, somebody, monkeypatch):
    monkeypatch.setattr(command, "run", made_up(*first))
    assert command.main(["--adapter", somebody]) == code


def test_the_limit_is_a_flag(somebody, monkeypatch):
    limits: list[float] = []
    monkeypatch.setattr(command, "run", made_up(limits=limits))
    command.main(["--adapter", somebody, "--limit", "2.5"])
    command.main(["--adapter", somebody])
    assert limits == [2.5, 120]


def test_an_interrupted_command_says_so_in_one_line(somebody, tmp_path, capsys, monkeypatch):
    def interrupted(specs, limit):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "run", interrupted)
    assert command.main(["--adapter", somebody, "--to", str(tmp_path / "page.md")]) == 130
    assert capsys.readouterr() == ("", "python -m tests.conformance: interrupted\n")
    assert not (tmp_path / "page.md").exists()


def test_help_has_examples_verdicts_and_exit_codes(capsys):
    with pytest.raises(SystemExit) as end:
        command.main(["--help"])
    shown = capsys.readouterr().out
    assert end.value.code == 0
    assert "python -m tests.conformance --adapter mypackage.conformance:adapter --limit 20\n" in shown
    assert re.findall(r"^  (\w+|n/a) +(?:the|it) ", shown, re.MULTILINE) == ["pass", "fail", "timeout", "crash", "n/a"]
    assert re.findall(r"^  (\d+) ", shown, re.MULTILINE) == ["0", "1", "2", "130"]


@pytest.mark.slow
def test_ctrl_c_ends_all_processes(tmp_path):
    """A terminal sends the signal to the command and to the processes that it has started."""
    (tmp_path / "waits.py").write_text(
        f"from {__package__}.unruly import Hangs\nfrom {__package__}.reference import Looped\nimport pathlib\n"
        "class Waits(Hangs):\n"
        "    def step(self, *parts):\n"
        "        if self.adaptive:\n"
        f"            pathlib.Path({str(tmp_path)!r}, 'waits').touch()\n"
        "        return super().step(*parts)\n"
        "adapter = Looped(Waits)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])}
    process = subprocess.Popen(
        [sys.executable, "-m", f"{__package__}", "--adapter", "waits:adapter"],
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        while process.poll() is None and not (tmp_path / "waits").exists():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.1)
        os.killpg(process.pid, signal.SIGINT)
        said = process.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert (process.returncode, *said) == (130, "", "python -m tests.conformance: interrupted\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--adapter", "no_such_module:adapter"], "'no_such_module:adapter', which should be module:object: No module"),
        (["--adapter", "json:adapter"], "has no attribute 'adapter'"),
        (["--adapter", "json:dumps"], "has no attribute 'name'"),
        (["--adapter", "misspelt:adapter"], r"not_offered has ['GradScaler'], and may have ['torch.amp.GradScaler'"),
        (["--adapter", "broken:adapter"], "'broken:adapter', which should be module:object: SyntaxError: "),
        (["--adapter", "stops:adapter"], "'stops:adapter', which should be module:object: SystemExit: no licence"),
        (["--to", "no/such/folder/page.md"], "is no file in an existing folder"),
        (["--limit", "0"], "argument --limit: '0' is no positive number of seconds"),
        (["--limit", "soon"], "argument --limit: 'soon' is no positive number of seconds"),
        (["--limit", "nan"], "argument --limit: 'nan' is no positive number of seconds"),
        (["--adaptor", "x"], "unrecognized arguments"),
    ],
    ids=lambda v: v[1] if isinstance(v, list) else None,
)
def test_mistakes_are_one_line(arguments, message, tmp_path, capsys, monkeypatch):
    (tmp_path / "misspelt.py").write_text(
        "class adapter:\n    name = version = make = ''\n    not_offered = {'GradScaler': 'no'}\n"
    )
    (tmp_path / "broken.py").write_text("adapter = (\n")
    (tmp_path / "stops.py").write_text("import sys\nsys.exit('no licence\\nfor this machine')\n")
    monkeypatch.syspath_prepend(tmp_path)
    check_mistake(command.main, arguments, message, capsys)
