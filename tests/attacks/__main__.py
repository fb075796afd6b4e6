"""The command: run attacks, and show in one line each what they found."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bisam.experiments.runs.files import write
from tests.support.commands import Parser

from . import distributed, interrupts, memory
from .attack import Attack, Finding, Options, page, summary

ATTACKS: dict[str, Attack] = {attack.name: attack for attack in (interrupts.ATTACK, distributed.ATTACK, memory.ATTACK)}


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0 if all is as it must be, 1 if there is a difference, 2 after a mistake, 130 if interrupted."""
    parser = Parser(
        prog="python -m tests.attacks",
        description="Attacks training with bisam, and shows for each attack how many cases are not as they must be.",
        epilog="exit codes: 0 all is as it must be, 1 there are differences, 2 wrong arguments, 130 interrupted.\n\n"
        "examples:\n"
        "  python -m tests.attacks --list\n"
        "  python -m tests.attacks                               # all of them, in 20 to 60 minutes\n"
        "  python -m tests.attacks interrupts --count 1000\n"
        "  python -m tests.attacks memory/SAM memory/BSAM --steps 20000\n"
        "  python -m tests.attacks distributed/2-joins --to found.json   # all cases whose names begin in this way\n"
        "  python -m tests.attacks --to tests/attacks/counts.md",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "names",
        metavar="NAME",
        nargs="*",
        help="an attack, or ATTACK/CASE, where CASE is a case or a beginning of some",
    )
    parser.add_argument("--list", action="store_true", help="show attacks and cases, and run nothing")
    parser.add_argument(
        "--to",
        metavar="PATH",
        type=Path,
        action="extend",
        nargs="+",
        default=[],
        help="also write every finding there, as .json, or the counts, as .md",
    )
    parser.add_argument(
        "--count", metavar="N", type=int, default=Options.count, help="calls of interrupts (%(default)s)"
    )
    parser.add_argument("--steps", metavar="N", type=int, default=Options.steps, help="steps of memory (%(default)s)")
    parser.add_argument("--seed", metavar="N", type=int, default=Options.seed, help="of random moments (%(default)s)")
    arguments = parser.parse_args(argv)
    chosen = {name: cases for name in ATTACKS if (cases := chosen_cases(name, arguments.names))}
    for name in arguments.names:
        attack = name.partition("/")[0]
        if attack not in ATTACKS:
            parser.error(f"there is no attack {attack!r}: --list shows {', '.join(ATTACKS)}")
        if not chosen_cases(attack, [name]):
            parser.error(f"there is no case {name!r}: --list shows them")
    for option, least in (("count", 1), ("steps", memory.LEAST)):
        if (value := getattr(arguments, option)) < least:
            parser.error(f"argument --{option}: must be at least {least}, got {value}")
    for path in arguments.to:
        if path.suffix not in (".json", ".md") or not path.parent.is_dir():
            parser.error(f"argument --to: {str(path)!r} must be a .json or .md file in an existing folder")
    if arguments.list:
        for name, cases in chosen.items():
            print(f"{name}: {ATTACKS[name].what}", *[f"  {name}/{case}" for case in cases], sep="\n")
        return 0
    options, found, code = Options(arguments.count, arguments.steps, arguments.seed), {}, 0
    try:
        for name, cases in chosen.items():
            findings = found[name] = list[Finding]()
            begin = time.monotonic()
            for finding in ATTACKS[name].run(cases, options):
                findings.append(finding)
                if finding.wrong:
                    code = 1
                    print(f"{name}/{finding.case}: {finding.wrong}", flush=True)
            print(summary(ATTACKS[name], findings, time.monotonic() - begin), flush=True)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        code = 130
    for path in arguments.to:
        content = {name: [vars(finding) for finding in findings] for name, findings in found.items()}
        text = json.dumps({"options": vars(options), "found": content}, indent=1) + "\n"
        write(path, text if path.suffix == ".json" else page(found, options, arguments.names))
    return code


def chosen_cases(attack: str, names: Sequence[str]) -> list[str]:
    """The cases of an attack that names choose; all without names."""
    if not names:
        return list(ATTACKS[attack].cases)
    beginnings = [name.partition("/")[2] for name in names if name.partition("/")[0] == attack]
    cases = ATTACKS[attack].cases
    exact = [name for name in beginnings if name in cases]  # SAM alone, not SAM-descent
    return [case for case in cases if case in exact or any(case.startswith(b) for b in beginnings if b not in exact)]


if __name__ == "__main__":
    sys.exit(main())
