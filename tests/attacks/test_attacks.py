"""The attacks find what they look for, and the command says so; `-m slow` runs a short form of each attack."""

from __future__ import annotations

import json
import random
from collections import Counter

import pytest
import torch

from bisam import SAM
from bisam.experiments.runs.environment import environment
from tests.support import cases, ranks
from tests.support.commands import check_mistake

from . import __main__ as command, distributed, interrupts, memory
from .attack import Attack, Finding, Options, summary

# What is planted is found.


def test_an_interrupt_that_leaves_weights_changed_is_found():
    def careless(oracle, batch):
        w = oracle.weights.tensors[0]
        w.add_(1.0)  # a method must not: nothing restores the weights after an interrupt
        answer = oracle.query(batch)
        w.sub_(1.0)
        return answer

    finding = interrupts.attacked("careless", lambda o: careless, 40, random.Random(0))
    assert finding.counts["calls"] == 40
    assert finding.facts.get("weights after one signal", 0) + finding.facts.get("weights after two signals", 0) > 0
    assert "interrupted calls left changed: " in finding.wrong


def test_a_signal_outside_of_the_call_does_nothing():
    timer = interrupts.Timer()
    with timer.installed():
        timer.start(1e-6, None)
        while interrupts.signal.getitimer(interrupts.signal.ITIMER_REAL)[0]:
            pass
    assert timer.raised == 0


def test_memory_that_grows_is_found():
    def leaking(optimizer):
        kept, method = [], SAM()

        def step(oracle, batch):
            answer = method(oracle, batch)
            kept.append(answer.losses)
            return answer

        return step

    names = {"leaking": (leaking, None), "SAM": (cases.FAMILY["SAM"][0], None)}
    found = {f.case: f for f in memory.run(list(names), Options(steps=memory.LEAST), names)}
    assert found["leaking"].facts["tensors"] >= found["leaking"].facts["steps"] > 0
    assert "more live tensors" in found["leaking"].wrong
    assert found["SAM"].wrong == ""


WITHOUT_A_WORD, LATE, CLOSED = (
    ranks.End(),
    ranks.End(late=True),
    ranks.End(error="RuntimeError: Connection closed by peer"),
)


@pytest.mark.parametrize(
    ("ends", "wrong"),
    [
        ([CLOSED, WITHOUT_A_WORD], ""),
        ([WITHOUT_A_WORD, WITHOUT_A_WORD], "rank 0 died without an error"),
        ([LATE, WITHOUT_A_WORD], "rank 0 hangs"),
        ([ranks.End(done=True), WITHOUT_A_WORD], "rank 0 ended as if nothing had happened"),
        ([ranks.End(error="KeyError: 0"), WITHOUT_A_WORD], "rank 0 ended with another error: KeyError: 0"),
    ],
)
def test_ends_of_ranks_are_judged(ends, wrong, tmp_path):
    assert distributed.judged(ends, "killed", tmp_path / "mark")[0] == wrong


def test_a_late_end_is_wrong(tmp_path):
    (tmp_path / "mark").write_text("100")
    (tmp_path / "mark.0").write_text("121.5")
    wrong, facts = distributed.judged([CLOSED, WITHOUT_A_WORD], "killed", tmp_path / "mark")
    assert wrong == "a rank ended 21.5 s after the fault"
    assert facts["seconds"] == 21.5


# The command.


@pytest.fixture
def planted(monkeypatch):
    """Attacks with known findings; says which cases were run."""
    ran = []

    def run(names, options):
        for name in names:
            ran.append((name, options.count))
            yield Finding(name, "weights changed" if name == "bad" else "", Counter({"calls": options.count}))

    monkeypatch.setattr(command, "ATTACKS", {"one": Attack("one", "what", ("good", "good-too", "bad"), run)})
    return ran


@pytest.mark.parametrize(
    ("names", "cases", "code"),
    [
        ([], ["good", "good-too", "bad"], 1),
        (["one/good"], ["good"], 0),
        (["one/goo"], ["good", "good-too"], 0),
        (["one/bad", "one/good"], ["good", "bad"], 1),
    ],
)
def test_the_exit_code_and_the_line_of_an_attack(planted, capsys, names, cases, code):
    assert command.main([*names, "--count", "5"]) == code
    assert planted == [(case, 5) for case in cases]
    shown = capsys.readouterr().out
    assert ("one/bad: weights changed\n" in shown) == (code == 1)
    assert f"one: {len(cases)} cases, {code} wrong, {5 * len(cases)} calls (0 s)\n" in shown


def test_findings_are_written(planted, tmp_path):
    path = tmp_path / "found.json"
    assert command.main(["one", "--to", str(path)]) == 1
    content = json.loads(path.read_text())
    assert content["options"] == {"count": 20_000, "steps": 6_000, "seed": 0}
    assert content["found"]["one"][2] == {
        "case": "bad",
        "wrong": "weights changed",
        "counts": {"calls": 20_000},
        "facts": {},
    }


def test_the_page_has_the_counts_and_where_they_come_from(planted, tmp_path):
    path = tmp_path / "counts.md"
    assert command.main(["--count", "7", "--to", str(path)]) == 1
    text = path.read_text()
    assert "| one | 3 | 21 calls | 1 |\n" in text
    assert "--count 7 --steps 6000 --seed 0" in text
    assert all(f"{name} {value}" in text for name, value in environment().items())


def test_an_interrupt_of_the_command_keeps_what_was_found(planted, monkeypatch, tmp_path, capsys):
    def run(names, options):
        yield Finding("good")
        raise KeyboardInterrupt

    monkeypatch.setitem(command.ATTACKS, "one", Attack("one", "what", ("good", "bad"), run))
    assert command.main(["--to", str(tmp_path / "found.json")]) == 130
    assert capsys.readouterr().out == "interrupted\n"
    assert [f["case"] for f in json.loads((tmp_path / "found.json").read_text())["found"]["one"]] == ["good"]


def test_the_list(capsys):
    assert command.main(["--list", "memory/MSAM", "distributed/2-killed-fsdp2"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "distributed: ranks that die, fail, run out of batches, or have uneven ones"
    assert "  distributed/2-killed-fsdp2-SAMPa" in shown
    assert shown[-2:] == ["memory: memory is flat over thousands of steps", "  memory/MSAM"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["interupts"], "there is no attack 'interupts': --list shows interrupts, distributed, memory"),
        (["memory/NoSuchMethod"], "there is no case 'memory/NoSuchMethod': --list shows them"),
        (["--count", "0"], "argument --count: must be at least 1, got 0"),
        (["--steps", "10"], "argument --steps: must be at least 120, got 10"),
        (["--steps", "x"], "invalid int value: 'x'"),
        (["--to", "found.txt"], "'found.txt' must be a .json or .md file in an existing folder"),
        (["--to", "no/such/folder/found.json"], "must be a .json or .md file in an existing folder"),
        (["--cou", "1"], "unrecognized arguments"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else None,
)
def test_mistakes_are_one_line(arguments, message, capsys):
    check_mistake(command.main, arguments, message, capsys)


def test_a_summary_adds_counts():
    attack = Attack("one", "what", (), lambda names, options: iter(()))
    findings = [Finding("a", "", Counter(calls=1000, hooks=1)), Finding("b", "wrong", Counter(calls=500))]
    assert summary(attack, findings, 2.4) == "one: 2 cases, 1 wrong, 1,500 calls, 1 hooks (2 s)"


def test_the_attacks_cover_what_they_are_for():
    assert len(set(interrupts.METHODS)) == len(interrupts.METHODS) >= 8
    assert {*interrupts.METHODS} <= {*cases.FAMILY}
    assert command.ATTACKS["memory"].cases == tuple(cases.FAMILY)
    every = distributed.CASES.values()
    for method in distributed.METHODS:
        overlap = ["overlap"] if method in distributed.OVERLAPPING else []
        assert {c.nesting for c in every if (c.world, c.fault, c.method) == (2, "killed", method)} == {
            *distributed.NESTINGS,
            *overlap,
        }
    assert {c.world for c in every} == {2, 4}
    assert len({c.name for c in every}) == len(distributed.CASES)


# Short forms of the attacks.


def wrong(attack: Attack, names=None, **options: int) -> dict[str, str]:
    return {f.case: f.wrong for f in attack.run(names or attack.cases, Options(**options)) if f.wrong}


@pytest.mark.slow
def test_interrupts():
    assert wrong(interrupts.ATTACK, count=1_000) == {}
    assert torch.is_grad_enabled()


@pytest.mark.slow
def test_memory():
    assert wrong(memory.ATTACK, steps=240) == {}


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault", ["killed", "error", "caught", "empty", "uneven", "counts", "joins", "bfloat16", "resumed"]
)
def test_distributed(fault):
    """All that is quick: of the faults that need a launch of ranks for each method, SAM alone."""
    chosen = [
        c.name
        for c in distributed.CASES.values()
        if (c.world, c.fault) == (2, fault) and (c.method == "SAM" or fault not in distributed.ENDING)
    ]
    assert chosen
    assert wrong(distributed.ATTACK, chosen) == {}
