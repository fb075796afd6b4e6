"""Attacks: named cases, and a finding for each of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bisam.experiments.runs.environment import environment


@dataclass(frozen=True)
class Options:
    """The arguments of the command that attacks use.

    Attributes:
        count: the number of calls of `interrupts`, over all its cases.
        steps: the number of steps of `memory`, in each case.
        seed: the seed of random moments.
    """

    count: int = 20_000
    steps: int = 6_000
    seed: int = 0


@dataclass(frozen=True)
class Finding:
    """The result of a case.

    Attributes:
        case: the name of the case.
        wrong: what is not as it must be, in words; empty if nothing is.
        counts: events of the case by kind; those of several cases are added up.
        facts: measurements of the case.
    """

    case: str
    wrong: str = ""
    counts: Counter[str] = field(default_factory=Counter[str])
    facts: dict[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class Attack:
    """An attack.

    Attributes:
        name: its name at the command line.
        what: what it does, in one line.
        cases: the names of its cases.
        run: runs cases and yields a finding for each.
    """

    name: str
    what: str
    cases: Sequence[str]
    run: Callable[[Sequence[str], Options], Iterator[Finding]]


def summary(attack: Attack, findings: Sequence[Finding], seconds: float) -> str:
    """The line of an attack: how many cases, how many are wrong, and the counts."""
    return f"{attack.name}: {len(findings)} cases, {_wrong(findings)} wrong{_counts(findings)} ({seconds:.0f} s)"


def page(found: Mapping[str, Sequence[Finding]], options: Options, names: Sequence[str] = ()) -> str:
    """The counts of attacks in Markdown, with the command, the versions, the hardware and the commit."""
    given = " ".join([*names, *[f"--{name} {value}" for name, value in vars(options).items()]])
    made = ", ".join(f"{name} {value}" for name, value in environment().items())
    rows = [
        f"| {name} | {len(findings)} | {_counts(findings).removeprefix(', ')} | {_wrong(findings)} |"
        for name, findings in found.items()
    ]
    head = f"# Counts of the attacks\n\nWritten by `python -m tests.attacks {given} --to PATH`.\n\n{made}.\n"
    return "\n".join([head, "| attack | cases | counts | wrong |", "|---|---|---|---|", *rows, ""])


def _wrong(findings: Sequence[Finding]) -> int:
    return sum(bool(f.wrong) for f in findings)


def _counts(findings: Sequence[Finding]) -> str:
    counts = sum((f.counts for f in findings), Counter[str]())
    return "".join(f", {n:,} {kind}" for kind, n in counts.items())
