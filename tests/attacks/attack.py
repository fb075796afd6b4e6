"""What an attack is: named cases, and a finding for each of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any


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
    """What an attack found in a case.

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
        events: what `counts` counts, as a noun in the plural.
    """

    name: str
    what: str
    cases: Sequence[str]
    run: Callable[[Sequence[str], Options], Iterator[Finding]]


def summary(attack: Attack, findings: Sequence[Finding], seconds: float) -> str:
    """The line of an attack: how many cases, how many are wrong, and the counts."""
    wrong, counts = sum(bool(f.wrong) for f in findings), sum((f.counts for f in findings), Counter[str]())
    shown = "".join(f", {n:,} {kind}" for kind, n in counts.items())
    return f"{attack.name}: {len(findings)} cases, {wrong} wrong{shown} ({seconds:.0f} s)"
