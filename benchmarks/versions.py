"""How long this tree takes relative to another tree of bisam, an earlier commit for example: steps and objectives.

Each tree runs in processes of its own with its own `benchmarks.step` and `benchmarks.objective`; two processes take
turns, call by call, so that both see the same state of the machine, and a pair of neighbouring calls gives one ratio.
The layout of its memory makes a process faster or slower for its whole life (the bounds at 1024 x 32000 by a quarter),
so the pairs of a row are spread over several processes, and the interval resamples the processes: the pairs of one
process are not independent, as the interval of the other benchmarks assumes.

    git worktree add ../before COMMIT
    python -m benchmarks.versions ../before
"""

from __future__ import annotations

import os
import random
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import objective, step
from benchmarks.measure import Load, Parser, at_least, interval as interval_of, load as load_of, report, verdict, write
from bisam.experiments.measurements.timing import verdict as verdict_of

HERE = Path(__file__).resolve().parent.parent
STEPS = [name for name in step.CONTESTANTS if name.startswith("bisam")]
OBJECTIVES = list(objective.BARS)
BAR = 1.01  # a row is missed, and this tree slower, if its whole interval is above

_PREAMBLE = """
import sys, time, torch
import torch.nn.functional as F
torch.set_num_threads(int(sys.argv[1]))
torch.manual_seed(0)
"""
_LOOP = """
print("ready", flush=True)
for line in sys.stdin:
    began = time.perf_counter()
    for _ in range(int(line)):
        call()
    print(time.perf_counter() - began, flush=True)
"""
OF_STEP = f"""{_PREAMBLE}
import benchmarks.step as step
from benchmarks.models import batch_for
case = step.CASES[sys.argv[2]]
model = case.model()
batch = batch_for(model, case.n)
run = step.CONTESTANTS[sys.argv[3]](model, F.cross_entropy).step
call = lambda: run(*batch)
{_LOOP}"""
OF_OBJECTIVE = f"""{_PREAMBLE}
import benchmarks.objective as objective
n, classes = objective.size(sys.argv[2])
logits, labels = torch.randn(n, classes, requires_grad=True), torch.randint(classes, (n,))
loss = objective.CONTESTANTS[sys.argv[3]]
call = lambda: objective.forward_backward(loss, logits, labels)
{_LOOP}"""


@dataclass(frozen=True)
class Case:
    """One row: a program that makes one call when asked, its two arguments, and the calls that are timed as one."""

    program: str
    of: str
    name: str
    calls: int


class Tree:
    """One tree's process, which makes calls whenever it is asked."""

    def __init__(self, folder: Path, threads: int, case: Case) -> None:
        path = os.pathsep.join([str(folder / "src"), str(folder)])
        command = [sys.executable, "-c", case.program, str(threads), case.of, case.name]
        self._calls = case.calls
        self._process = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._ask, self._answer = self._process.stdin, self._process.stdout
        if self._answer.readline().strip() != "ready":
            self.close()
            raise RuntimeError(f"{folder} has no benchmarks that this one knows, or {case.name} ({case.of}) failed")

    def seconds(self) -> float:
        """Seconds of one call, the mean of those that are timed as one."""
        self._ask.write(f"{self._calls}\n")
        self._ask.flush()
        return float(self._answer.readline()) / self._calls

    def close(self) -> None:
        self._ask.close()
        self._process.wait()
        self._answer.close()


def paired(
    before: Tree, after: Tree, pairs: int, warm_up: int, load: Load, busy: int
) -> tuple[list[tuple[float, float]], Load]:
    """Seconds of both trees' calls, and the load of other programs; which one begins a pair alternates.

    Args:
        before: the other tree.
        after: this tree.
        pairs: their number.
        warm_up: calls of each before the pairs.
        load: the highest one so far.
        busy: threads that compute at a time.
    """
    for tree in (before, after):
        for _ in range(warm_up):
            tree.seconds()
    times: list[tuple[float, float]] = []
    for i in range(pairs):
        if i % 2:
            later = after.seconds()
            times.append((before.seconds(), later))
        else:
            times.append((before.seconds(), after.seconds()))
        load = load.and_now(busy)
    return times, load


def interval(groups: Sequence[Sequence[float]], draws: int = 4000) -> tuple[float, float, float]:
    """The median of all values and its 95 % interval, by the percentiles of a bootstrap of the groups.

    The values of a group share a process, so they are no independent sample; groups are.
    """
    generator = random.Random(0)
    medians = sorted(
        statistics.median([value for group in generator.choices(groups, k=len(groups)) for value in group])
        for _ in range(draws)
    )
    everything = statistics.median([value for group in groups for value in group])
    return everything, medians[round(0.025 * draws)], medians[round(0.975 * draws) - 1]


def row(folder: Path, case: Case, pairs: int, processes: int, threads: int) -> dict[str, Any]:
    """The ratio of this tree's time to that of the tree in `folder`."""
    groups: list[list[tuple[float, float]]] = []
    load = Load.now(threads)
    for i in range(processes):
        own = pairs // processes + (i < pairs % processes)
        if own == 0:
            break
        before, after = (Tree(tree, threads, case) for tree in (folder, HERE))
        try:
            times, load = paired(before, after, own, 3, load, threads)
            groups.append(times)
        finally:
            before.close()
            after.close()
    median, low, high = interval([[after / before for before, after in group] for group in groups])
    seconds = [statistics.median([pair[side] for group in groups for pair in group]) for side in (0, 1)]
    return {
        "of": case.of,
        "name": case.name,
        "pairs": pairs,
        "processes": len(groups),
        "before": seconds[0],
        "after": seconds[1],
        "median": median,
        "median_low": low,
        "median_high": high,
        "load": load.highest,
        "cores": load.cores,
        "bar": BAR,
        "verdict": verdict_of(low, high, load, BAR),
    }


def cases(models: Sequence[str], steps: Sequence[str], sizes: Sequence[tuple[int, int]]) -> list[Case]:
    """The rows. A short call is repeated, so that the messages between the processes do not count."""
    found = [Case(OF_STEP, model, name, 1 if "resnet" in model else 5) for model in models for name in steps]
    for n, classes in sizes:
        calls = max(1, 2**18 // (n * classes))
        found += [Case(OF_OBJECTIVE, f"{n}x{classes}", name, calls) for name in OBJECTIVES]
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(
        "benchmarks.versions",
        "Time of a training step, and of a bound's forward and backward pass, of this tree relative to another tree of "
        "bisam, interleaved.",
        "  git worktree add ../before v0.1.0\n"
        "  python -m benchmarks.versions ../before\n"
        "  python -m benchmarks.versions ../before --models mlp-32 --sizes --repeats 101 --json versions.json",
        repeats=64,
    )
    parser.add_argument("before", type=Path, help="folder of the other tree, with src/ and benchmarks/ in it")
    parser.add_argument("--models", nargs="*", choices=list(step.CASES), default=list(step.CASES), help="default: all")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS, help="default: all")
    parser.add_argument(
        "--sizes",
        type=objective.size,
        nargs="*",
        default=objective.SIZES,
        metavar="NxK",
        help="examples x classes for the bounds; nothing after it: none (default: those of benchmarks.objective)",
    )
    parser.add_argument("--processes", type=at_least(2), default=8, help="of each tree in a row (default: %(default)s)")
    arguments = parser.parse_args(argv)
    if not (arguments.before / "benchmarks" / "step.py").is_file():
        parser.error(
            f"argument before: {str(arguments.before)!r} has no benchmarks/step.py: give the root of a checkout"
        )
    other, pairs, threads = arguments.before.resolve(), arguments.repeats, arguments.threads
    parser.begin(threads)
    rows: list[dict[str, Any]] = []
    for case in cases(arguments.models, arguments.steps, arguments.sizes):
        rows.append(row(other, case, pairs, arguments.processes, threads))
        print(f"{case.of} {case.name}: {rows[-1]['median']:.3f}", file=sys.stderr, flush=True)
    report(
        "Time of this tree relative to the other one",
        {
            "of": lambda r: r["of"],
            "what": lambda r: r["name"],
            "before": lambda r: f"{r['before'] * 1e3:.3f} ms",
            "after": lambda r: f"{r['after'] * 1e3:.3f} ms",
            "ratio": lambda r: f"{r['median']:.3f}",
            "95 % interval": interval_of,
            "verdict": verdict,
        },
        rows,
        [
            f"{pairs} pairs a row in {arguments.processes} processes of each tree; the interval of the median ratio is "
            "by a bootstrap of the processes. A row that misses the bar has become slower.",
            load_of(rows),
        ],
    )
    if arguments.json:
        settings = {"repeats": pairs, "processes": arguments.processes}
        write(arguments.json, "versions", settings, {"rows": rows})


if __name__ == "__main__":
    main()
