"""The score: results by mutant with where they were made, as JSON to go on from and as a page to read."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path

from .mutations import MUTANTS, Mutant
from .run import ROOT, Result, sources


@dataclass
class Score:
    """Results of one state of source and tests.

    Attributes:
        state: a digest of the source and the tests.
        where: the commit, the date and the versions.
        results: by the mutant's name and a digest of its snippets.
        passed: seconds of the tests that the unmutated source passes.
    """

    state: str
    where: dict[str, str]
    results: dict[str, Result] = field(default_factory=dict[str, Result])
    passed: dict[str, float] = field(default_factory=dict[str, float])

    @classmethod
    def here(cls) -> Score:
        """None yet, of source and tests as they are."""
        own = Path(__file__).parent
        tests = sorted(path for path in (ROOT / "tests").rglob("*.py") if own not in path.parents)
        texts = [*sources().values(), *[path.read_text(encoding="utf-8") for path in tests]]
        return cls(digest(texts), where())

    @classmethod
    def read(cls, path: Path) -> Score:
        """What `write` wrote.

        Raises:
            ValueError: the file is something else.
        """
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
            results = {key: Result(**result) for key, result in saved["results"].items()}
            return cls(saved["state"], saved["where"], results, saved["passed"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{str(path)!r} has no score of mutants: {error!r}") from error

    def get(self, mutant: Mutant) -> Result | None:
        """The verdict on a mutant, if there is one."""
        return self.results.get(_key(mutant))

    def put(self, mutant: Mutant, result: Result) -> None:
        """Add one."""
        self.results[_key(mutant)] = result

    def write(self, path: Path) -> None:
        """Write JSON or Markdown, by the file's name; atomically."""
        text = json.dumps(asdict(self), indent=1) + "\n" if path.suffix == ".json" else self.page()
        unfinished = path.with_name(path.name + ".unfinished")
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)

    def page(self) -> str:
        """The score as Markdown, in the order of the list."""
        results = [(mutant, result) for mutant in MUTANTS if (result := self.get(mutant))]
        killers = Counter(result.by.split("::")[0] for _, result in results if result.verdict == "killed")
        lines = [
            "# Mutants of the core",
            "",
            "Made by `python -m tests.mutants --to tests/mutants/score.md`. Each mutant is bisam with one defect, and "
            "it is killed if a test fails.",
            "Tests are run up to the first failure, those of the mutant's subject first: the table names one of the "
            "tests that find it.",
            "",
            ", ".join(f"{name} {value}" for name, value in self.where.items()) + ".",
            "",
            f"**{summary(result for _, result in results)}**",
            "",
        ]
        if len(results) < len(MUTANTS):
            lines += [f"Not run: {len(MUTANTS) - len(results)} of {len(MUTANTS)}.", ""]
        lines += ["| tests | killed |", "|---|---|", *[f"| {file} | {n} |" for file, n in killers.most_common()], ""]
        lines += ["| mutant | defect | verdict | by | seconds |", "|---|---|---|---|---|"]
        lines += [
            f"| {m.name} | {_cell(m.breaks)} | {r.verdict} | {_cell(r.by)} | {r.seconds:.0f} |" for m, r in results
        ]
        return "\n".join(lines) + "\n"


def summary(results: Iterable[Result]) -> str:
    """How many are killed, and what became of the others."""
    verdicts = Counter(result.verdict for result in results)
    killed = verdicts.pop("killed", 0) + verdicts["time-out"]
    others = [f"{n} by time-out" for n in [verdicts.pop("time-out", 0)] if n]
    others += [f"{n} {verdict}" for verdict, n in sorted(verdicts.items()) if n]
    total = killed + verdicts.total()
    return f"{killed} of {total} mutants are killed" + (f" ({', '.join(others)})." if others else ".")


def digest(texts: Iterable[str]) -> str:
    """The same for the same texts."""
    return blake2b(repr(list(texts)).encode(), digest_size=16).hexdigest()


def where() -> dict[str, str]:
    """The commit, the date and the versions."""
    commit = _git("rev-parse", "--short=12", "HEAD") or "unknown"
    changed = "" if not _git("status", "--porcelain", "--", "src", "tests") else " with uncommitted changes"
    return {
        "commit": commit + changed,
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "Python": platform.python_version(),
        "torch": version("torch"),
        "pytest": version("pytest"),
        platform.system(): f"{platform.machine()} with {os.cpu_count()} cores",
    }


def _git(*arguments: str) -> str:
    try:
        run = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return run.stdout.strip()


def _key(mutant: Mutant) -> str:
    return f"{mutant.name} {digest(text for edit in mutant.edits for text in edit)}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
