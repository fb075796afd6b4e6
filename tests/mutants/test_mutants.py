"""The list of mutants fits the source, and what the command says of a mutant is what its tests say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar

import pytest

from tests.support.commands import check_mistake

from . import __main__ as command, run as running
from .mutations import FOLDERS, MUTANTS, SUBJECTS, TESTS, Mutant
from .run import ROOT, Refused, Result, Runner, mutated, sources
from .score import Score, summary

FILES = sources()
SIGN = next(mutant for mutant in MUTANTS if mutant.name == "dot_adds_the_losses")


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_fits_the_source(mutant):
    changed = mutated(mutant, FILES)
    assert changed != {path: FILES[path] for path in changed}
    for path, text in changed.items():
        compile(text, path, "exec")


def test_the_list():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 40
    assert {mutant.subject for mutant in MUTANTS} == {*SUBJECTS}
    assert not {mutant.name for mutant in MUTANTS} & {*SUBJECTS}
    assert [mutant.name for mutant in MUTANTS if mutant.breaks[-1] != "." or "\n" in mutant.breaks] == []
    assert {test for tests in SUBJECTS.values() for test in tests} <= {*TESTS}
    assert [test for test in TESTS if not (ROOT / test).exists()] == []
    files = {str(path.relative_to(ROOT)) for folder in FOLDERS for path in (ROOT / folder).rglob("test_*.py")}
    assert files <= {*TESTS}


def test_a_snippet_must_be_there_once():
    for before, said in (("no such code", "0 times in any file"), ("import annotations", f"{len(FILES)} times in")):
        with pytest.raises(ValueError, match=said):
            mutated(Mutant("vector", "x", "X.", before, ""), dict.fromkeys(FILES, "from __future__ import annotations"))


def test_several_edits_of_one_file():
    mutant = Mutant("vector", "x", "X.", "a = 1", "a = 2", also=(("b = 1", "b = 2"),))
    assert mutated(mutant, {Path("x.py"): "a = 1\nb = 1\n"}) == {Path("x.py"): "a = 2\nb = 2\n"}


@pytest.fixture
def tests(tmp_path, monkeypatch):
    """One file of tests in place of those of the core."""

    def put(text: str) -> str:
        file = tmp_path / "test_one.py"
        file.write_text(text)
        monkeypatch.setattr(running, "TESTS", (str(file),))
        monkeypatch.setattr(running, "SUBJECTS", {"vector": (str(file),)})
        return str(file)

    return put


DOT = "from bisam import Vector\nimport torch\n\n"
DOT += "def test_dot():\n    v = Vector([torch.tensor([1.0, -2.0])])\n    assert v.dot(Vector([torch.ones(2)])) == -1\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "verdict", "by"),
    [
        (DOT, "killed", "::test_dot"),
        ("def test_nothing():\n    pass\n", "survived", ""),
    ],
    ids=["killed", "survived"],
)
def test_a_verdict(tests, text, verdict, by):
    tests(text)
    said = []
    ((mutant, result),) = Runner({}, None, said.append).score([SIGN], jobs=1)
    assert mutant is SIGN
    assert result.verdict == verdict
    assert result.by.endswith(by)
    assert len(said) == 1
    assert said[0].startswith("unmutated: ")


@pytest.mark.slow
def test_the_end_of_a_limit_is_shown(tests):
    file = tests("import time\n\ndef test_long():\n    time.sleep(100)\n")
    ((_, result),) = Runner({file: 0.0}, 1.0, print).score([SIGN], jobs=1)
    assert (result.verdict, result.by, result.killed) == ("time-out", "no end after 1 s", True)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "verdict"), [("SIGTERM", "error"), ("SIGKILL", "error"), ("SIGABRT", "killed")])
def test_an_end_from_outside_is_no_verdict(tests, number, verdict):
    file = tests(f"import os, signal\n\ndef test_end():\n    os.kill(os.getpid(), signal.{number})\n")
    ((_, result),) = Runner({file: 0.0}, None, print).score([SIGN], jobs=1)
    assert (result.verdict, result.by) == (verdict, f"the process died of {number}")


@pytest.mark.slow
def test_tests_that_fail_without_a_mutant_are_refused(tests):
    tests("def test_wrong():\n    assert False\n")
    with pytest.raises(Refused, match=r"does not pass ::test_wrong \(killed\)"):
        list(Runner({}, None, print).score([SIGN], jobs=1))


@pytest.mark.slow
def test_another_copy_of_bisam_is_an_error(tests, monkeypatch):
    # As a test that puts another source first would do.
    file = tests(f"import sys\nsys.path.insert(0, {str(ROOT / 'src')!r})\n{DOT}")
    ((_, result),) = Runner({file: 0.0}, None, print).score([SIGN], jobs=1)
    assert result.verdict == "error"
    assert "pytest ended with 64: " in result.by


def test_a_lost_mutant_is_not_killed(tests):
    file = tests("")
    lost = Mutant("vector", "x", "X.", "no such code", "")
    ((_, result),) = Runner({file: 0.0}, None, print).score([lost], jobs=1)
    assert (result.verdict, result.killed) == ("lost", False)


class Judged:
    """A runner that knows its results."""

    results: ClassVar[dict[str, Result]] = {}

    def __init__(self, passed, limit, say):
        self.passed = passed

    def score(self, mutants, jobs):
        self.passed["tests/test_vector.py"] = 1.0
        for mutant in mutants:
            if (result := self.results.get(mutant.name)) is None:
                raise KeyboardInterrupt
            yield mutant, result


@pytest.fixture
def judged(monkeypatch):
    monkeypatch.setattr(command, "Runner", Judged)
    monkeypatch.setattr(command.signal, "signal", lambda *_: None)

    def put(**results: Result):
        monkeypatch.setattr(Judged, "results", results)

    return put


KILLED, SURVIVED, LOST = (
    Result("killed", "tests/test_vector.py::test_a", 2.0),
    Result("survived"),
    Result("lost", "why"),
)


@pytest.mark.parametrize(("result", "code"), [(KILLED, 0), (SURVIVED, 1), (LOST, 2)])
def test_exit_codes(judged, capsys, result, code):
    judged(l2_sign=KILLED, gsam_sign=result)
    assert command.main(["--only", "l2_sign", "gsam_sign"]) == code
    shown = capsys.readouterr().out
    assert f"{2 if result.killed else 1} of 2 mutants are killed" in shown
    assert (f"{result.verdict}: gsam_sign: GSAM widens the gap" in shown) == (not result.killed)


def test_it_goes_on_where_it_was_interrupted(judged, tmp_path, capsys):
    to = ["--only", "l2_sign", "gsam_sign", "--to", str(tmp_path / "score.json"), str(tmp_path / "score.md")]
    judged(l2_sign=KILLED)
    assert command.main(to) == 130
    assert "interrupted: 1 of 1 mutants are killed." in capsys.readouterr().out
    assert json.loads((tmp_path / "score.json").read_text())["passed"] == {"tests/test_vector.py": 1.0}
    assert "| l2_sign | SAM descends in place of climbing. | killed |" in (tmp_path / "score.md").read_text()
    judged(gsam_sign=SURVIVED)
    assert command.main(to) == 1
    shown, page = capsys.readouterr().out, (tmp_path / "score.md").read_text()
    assert shown.startswith("1 of 2 are known\n2/2 survived ")
    assert "**1 of 2 mutants are killed (1 survived).**" in page
    assert "| tests/test_vector.py | 1 |" in page


def test_the_score_of_another_state_is_not_gone_on_from(judged, tmp_path, capsys):
    path = tmp_path / "score.json"
    other = Score("another", {})
    other.put(next(m for m in MUTANTS if m.name == "l2_sign"), SURVIVED)
    other.write(path)
    judged(l2_sign=KILLED)
    assert command.main(["--only", "l2_sign", "--to", str(path)]) == 0
    assert "is the score of another state" in capsys.readouterr().out


def test_a_summary():
    results = [KILLED, Result("time-out"), SURVIVED, SURVIVED, LOST]
    assert summary(results) == "2 of 5 mutants are killed (1 by time-out, 1 lost, 2 survived)."


def test_the_list_is_shown(capsys):
    assert command.main(["--list", "--only", "games"]) == 0
    assert capsys.readouterr().out.startswith("games:\n  proximal_sign: RAPP's inner steps")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "no_such_mutant"], "there is no mutant or subject 'no_such_mutant': --list shows them"),
        (["--jobs", "0"], "argument --jobs: must be at least 1, got 0"),
        (["--jobs", "x"], "invalid int value: 'x'"),
        (["--limit", "0"], "argument --limit: must be positive, got 0"),
        (["--to", "score.txt"], "'score.txt' must end with .json or .md"),
        (["--to", "no/such/folder/score.md"], "is no file in an existing folder"),
        (["--job", "1"], "unrecognized arguments"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else None,
)
def test_mistakes_are_one_line(arguments, message, capsys):
    check_mistake(command.main, arguments, message, capsys)


def test_a_file_that_is_no_score(tmp_path, capsys):
    (tmp_path / "score.json").write_text("[1]")
    with pytest.raises(SystemExit, match="2"):
        command.main(["--to", str(tmp_path / "score.json")])
    assert "has no score of mutants" in capsys.readouterr().err
