"""The command: make mutants of the core, run the tests on each, and show which are killed."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.support.commands import Parser

from .mutations import MUTANTS, SUBJECTS, Mutant
from .run import Refused, Result, Runner
from .score import Score, summary


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0 if all are killed, 1 if some survive, 2 if some could not be judged, 130 if interrupted."""
    parser = Parser(
        prog="python -m tests.mutants",
        description="Puts defects into copies of bisam, one at a time, and runs the tests that should find each.",
        epilog="exit codes: 0 all mutants are killed, 1 some survive, 2 wrong arguments, a failing test without any "
        "mutant,\nor a mutant whose snippet is lost, 130 interrupted.\n\n"
        "examples:\n"
        "  python -m tests.mutants --to score.json score.md      # run again, it goes on from score.json\n"
        "  python -m tests.mutants --only l2_sign gsam_sign\n"
        "  python -m tests.mutants --only distributed --jobs 2\n"
        "  python -m tests.mutants --list",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--only", metavar="NAME", action="extend", nargs="+", help="mutants, or subjects of --list")
    parser.add_argument("--jobs", metavar="N", type=int, default=1, help="mutants at a time (default: 1)")
    parser.add_argument(
        "--limit",
        metavar="SECONDS",
        type=float,
        help="what the tests of a mutant may take (default: 120, and 5 times what they take without it)",
    )
    parser.add_argument(
        "--to",
        metavar="PATH",
        type=Path,
        action="extend",
        nargs="+",
        default=[],
        help="write the score there, as .json or .md, after each mutant; a .json of the same source is gone on from",
    )
    parser.add_argument("--list", action="store_true", help="show the mutants and run nothing")
    arguments = parser.parse_args(argv)
    mutants = [mutant for mutant in MUTANTS if not arguments.only or {mutant.name, mutant.subject} & {*arguments.only}]
    for name in arguments.only or ():
        if name not in SUBJECTS and name not in {mutant.name for mutant in mutants}:
            parser.error(f"argument --only: there is no mutant or subject {name!r}: --list shows them")
    if arguments.jobs < 1:
        parser.error(f"argument --jobs: must be at least 1, got {arguments.jobs}")
    if arguments.limit is not None and not arguments.limit > 0:
        parser.error(f"argument --limit: must be positive, got {arguments.limit:g}")
    for path in arguments.to:
        if path.suffix not in (".json", ".md"):
            parser.error(f"argument --to: {str(path)!r} must end with .json or .md")
        if path.is_dir() or not path.parent.is_dir():
            parser.error(f"argument --to: {str(path)!r} is no file in an existing folder")
    if arguments.list:
        show(mutants)
        return 0
    score = Score.here()
    for path in arguments.to:
        if path.suffix == ".json" and path.exists():
            try:
                known = Score.read(path)
            except ValueError as error:
                parser.error(f"argument --to: {error}")
            if known.state == score.state:
                score.results |= known.results
                score.passed |= known.passed
            else:
                say(f"{path} is the score of another state of source and tests: all mutants are run again")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        run(mutants, score, arguments)
    except Refused as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        say(f"interrupted: {summary(result for m in mutants if (result := score.get(m)))}")
        return 130
    results = [result for m in mutants if (result := score.get(m))]
    say(summary(results))
    for mutant in mutants:
        result = score.get(mutant)
        if result and not result.killed:
            say(f"{result.verdict}: {mutant.name}: {mutant.breaks} {result.by}".rstrip())
    return 2 if any(r.verdict in ("lost", "error") for r in results) else 0 if all(r.killed for r in results) else 1


def run(mutants: Sequence[Mutant], score: Score, arguments: argparse.Namespace) -> None:
    """Run what the score does not know yet, and write it as results come."""
    left = [m for m in mutants if (known := score.get(m)) is None or known.verdict in ("lost", "error")]
    done = len(mutants) - len(left)
    if done:
        say(f"{done} of {len(mutants)} are known")
    results = Runner(score.passed, arguments.limit, say).score(left, arguments.jobs)
    for n, (mutant, result) in enumerate(results, done + 1):
        score.put(mutant, result)
        for path in arguments.to:
            score.write(path)
        say(f"{n}/{len(mutants)} {line(mutant, result)}")
    for path in arguments.to:
        score.write(path)


def line(mutant: Mutant, result: Result) -> str:
    """A line of progress."""
    return f"{result.verdict:8} {result.seconds:5.0f} s  {mutant.name}  {result.by}".rstrip()


def show(mutants: Sequence[Mutant]) -> None:
    """The list."""
    for subject in SUBJECTS:
        if chosen := [mutant for mutant in mutants if mutant.subject == subject]:
            print(f"{subject}:", *[f"  {mutant.name}: {mutant.breaks}" for mutant in chosen], sep="\n")


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
