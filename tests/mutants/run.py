"""Running the tests on a copy of bisam, with a mutant in it or with none."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from .guard import COPY, FOUND
from .mutations import SUBJECTS, TESTS, Mutant

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "bisam"
PYTEST = ("-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "-p", "tests.mutants.guard", "-p", "no:cacheprovider")
PYTEST += ("-n", "0", "-x", "-q", "--no-header")


class Refused(Exception):
    """No score can be told, in one line."""


@dataclass(frozen=True)
class Result:
    """The fate of a mutant.

    Attributes:
        verdict: "killed", "time-out" (killed by the limit of a test or of the run), "survived", "lost" (a snippet is
            not there exactly once) or "error" (the tests did not run).
        by: the test that failed, or why there is no verdict.
        seconds: how long the tests ran.
    """

    verdict: str
    by: str = ""
    seconds: float = 0.0

    @property
    def killed(self) -> bool:
        return self.verdict in ("killed", "time-out")


def sources(source: Path = SOURCE) -> dict[Path, str]:
    """The files that mutants are looked for in, by their path in bisam."""
    paths = [path.relative_to(source) for path in sorted(source.rglob("*.py"))]
    return {path: (source / path).read_text(encoding="utf-8") for path in paths if path.parts[0] != "experiments"}


def mutated(mutant: Mutant, files: Mapping[Path, str]) -> dict[Path, str]:
    """The files that the mutant changes.

    Raises:
        ValueError: a snippet is not there exactly once.
    """
    changed: dict[Path, str] = {}
    for before, after in mutant.edits:
        places = [path for path, text in files.items() for _ in range(text.count(before))]
        if len(places) != 1:
            where = ", ".join(map(str, dict.fromkeys(places))) or "any file"
            raise ValueError(f"{before!r} is {len(places)} times in {where}, and must be there once")
        (path,) = places
        changed[path] = changed.get(path, files[path]).replace(before, after)
    return changed


class Runner:
    """Runs tests on copies of bisam; what it started ends with it.

    Args:
        passed: tests that the unmutated copy is known to pass, and in how many seconds; more are added.
        limit: seconds that the tests of one mutant may take; None is what follows from the unmutated copy.
        say: called with each line of progress.
    """

    def __init__(self, passed: dict[str, float], limit: float | None, say: Callable[[str], None]) -> None:
        self._passed, self._limit, self._say = passed, limit, say
        self._baseline = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._stopped = False
        self._files = sources()

    def score(self, mutants: Sequence[Mutant], jobs: int) -> Iterator[tuple[Mutant, Result]]:
        """Results as they come.

        Raises:
            Refused: the unmutated copy fails a test.
        """
        self.baseline(list(dict.fromkeys(test for mutant in mutants for test in SUBJECTS[mutant.subject])))
        with ThreadPoolExecutor(jobs) as pool:
            pending = {pool.submit(self.result, mutant): mutant for mutant in mutants}
            try:
                for done in as_completed(pending):
                    yield pending[done], done.result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
                self.stop()

    def baseline(self, tests: Sequence[str]) -> None:
        """Make sure that the unmutated copy passes these tests; those that it has passed are not run again.

        Raises:
            Refused: it fails one.
        """
        with self._baseline:
            for test in tests:
                if test in self._passed:
                    continue
                with copied(self._files, {}) as copy:
                    result = self._run(copy, [test], None)
                if result.verdict != "survived":
                    raise Refused(f"the source as it is does not pass {result.by or test} ({result.verdict}): no score")
                self._passed[test] = result.seconds
                self._say(f"unmutated: {test} passes in {result.seconds:.0f} s")

    def result(self, mutant: Mutant) -> Result:
        """Runs the tests of a mutant's subject, then all others, and returns its fate."""
        try:
            changed = mutated(mutant, self._files)
        except ValueError as error:
            return Result("lost", str(error))
        first = SUBJECTS[mutant.subject]
        rest, seconds, result = [test for test in TESTS if test not in first], 0.0, Result("error")
        with copied(self._files, changed) as copy:
            for tests in filter(None, (first, rest)):
                self.baseline(tests)
                limit = self._limit or 120 + 5 * sum(self._passed[test] for test in tests)
                result = self._run(copy, tests, limit)
                seconds += result.seconds
                if result.verdict != "survived":
                    break
        return Result(result.verdict, result.by, seconds)

    def stop(self) -> None:
        """End the tests that are running."""
        self._stopped = True
        for process in list(self._running):
            _kill(process)

    def _run(self, copy: Path, tests: Sequence[str], limit: float | None) -> Result:
        if self._stopped:
            return Result("error", "stopped")
        found = copy.with_name("found.json")
        path = os.pathsep.join([str(copy.parent), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "PYTHONPATH": path, COPY: str(copy), FOUND: str(found)}
        began = time.monotonic()
        log = copy.with_name("log.txt")
        with log.open("w") as output:  # not a pipe, which a process that a test has left behind would keep open
            process = subprocess.Popen(
                [sys.executable, *PYTEST, *tests],
                cwd=ROOT,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that processes that a test has started can be ended with it
            )
        self._running.add(process)
        late = False
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            late = True
        finally:
            _kill(process)
            process.wait()
            self._running.discard(process)
        seconds = time.monotonic() - began
        if self._stopped:
            return Result("error", "stopped", seconds)
        if late:
            return Result("time-out", f"no end after {limit:.0f} s", seconds)
        known = json.loads(found.read_text()) if found.exists() else None
        if known and process.returncode in (1, 2):  # 2: a file of tests could not be imported
            return Result("time-out" if known["timeout"] else "killed", known["test"], seconds)
        if process.returncode == 0:
            return Result("survived", seconds=seconds)
        if process.returncode < 0:
            # A crash is the mutant's; an end from outside (out of memory, a shutdown) says nothing of it.
            crash = -process.returncode not in (signal.SIGINT, signal.SIGKILL, signal.SIGTERM)
            name = signal.Signals(-process.returncode).name
            return Result("killed" if crash else "error", f"the process died of {name}", seconds)
        last = (log.read_text(errors="replace").strip() or "no output").splitlines()[-1]
        return Result("error", f"pytest ended with {process.returncode}: {last}", seconds)


@contextmanager
def copied(files: Mapping[Path, str], changed: Mapping[Path, str]) -> Iterator[Path]:
    """A copy of bisam with some files changed; `files` must be those of the source, for it may change meanwhile."""
    with tempfile.TemporaryDirectory(prefix="bisam-mutant-", ignore_cleanup_errors=True) as folder:
        copy = Path(folder).resolve() / "bisam"
        shutil.copytree(SOURCE, copy, ignore=shutil.ignore_patterns("__pycache__"))
        for path, text in {**files, **changed}.items():
            (copy / path).write_text(text, encoding="utf-8")
        yield copy


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a process and those that it has started."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
