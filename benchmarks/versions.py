"""How long a step of this tree takes relative to a step of another tree of bisam, an earlier commit for example.

Each tree runs in processes of its own with its own `benchmarks.step`; two processes take turns, step by step, so that
both see the same state of the machine, and a pair of neighbouring steps gives one ratio. The layout of its memory makes
a process faster or slower for its whole life, so the pairs of a row are spread over several processes.

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
from pathlib import Path
from typing import Any

from benchmarks.measure import Parser, at_least, report, verdict, write
from benchmarks.step import CASES, CONTESTANTS

HERE = Path(__file__).resolve().parent.parent
OURS = [name for name in CONTESTANTS if name.startswith("bisam")]
BAR = 1.01  # for the lower end of the interval: above it a step has become slower

WORKER = """
import sys, time, torch
import torch.nn.functional as F
import benchmarks.step as step
from benchmarks.models import batch_for
torch.set_num_threads(int(sys.argv[1]))
torch.manual_seed(0)
case = step.CASES[sys.argv[2]]
model = case.model()
batch = batch_for(model, case.n)
run = step.CONTESTANTS[sys.argv[3]](model, F.cross_entropy).step
print("ready", flush=True)
for _ in sys.stdin:
    began = time.perf_counter()
    run(*batch)
    print(time.perf_counter() - began, flush=True)
"""


class Tree:
    """One tree's process, which takes a step whenever it is asked."""

    def __init__(self, folder: Path, threads: int, model: str, contestant: str) -> None:
        path = os.pathsep.join([str(folder / "src"), str(folder)])
        command = [sys.executable, "-c", WORKER, str(threads), model, contestant]
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
            raise RuntimeError(f"{folder} has no benchmarks.step that this benchmark knows, or {contestant} failed")

    def step(self) -> float:
        """Seconds of one step."""
        self._ask.write("\n")
        self._ask.flush()
        return float(self._answer.readline())

    def close(self) -> None:
        self._ask.close()
        self._process.wait()


def paired(before: Tree, after: Tree, pairs: int, warm_up: int) -> tuple[list[float], list[float]]:
    """Seconds of both trees' steps; which one begins a pair alternates."""
    for tree in (before, after):
        for _ in range(warm_up):
            tree.step()
    first, second = list[float](), list[float]()
    for i in range(pairs):
        if i % 2:
            second.append(after.step())
            first.append(before.step())
        else:
            first.append(before.step())
            second.append(after.step())
    return first, second


def interval(values: Sequence[float], draws: int = 4000) -> tuple[float, float, float]:
    """The median and its 95 % interval, by the bootstrap of the percentiles."""
    generator = random.Random(0)
    medians = sorted(statistics.median(generator.choices(values, k=len(values))) for _ in range(draws))
    return statistics.median(values), medians[round(0.025 * draws)], medians[round(0.975 * draws) - 1]


def row(
    folder: Path, model: str, contestant: str, pairs: int, processes: int, threads: int, inner: int
) -> dict[str, Any]:
    """The ratio of the steps of one contestant; a small model takes several steps for each time that is measured."""
    first, second = list[float](), list[float]()
    for i in range(processes):
        before, after = (Tree(tree, threads, model, contestant) for tree in (folder, HERE))
        try:
            own = pairs // processes + (i < pairs % processes)
            times = paired(before, after, own * inner, warm_up=3)
        finally:
            before.close()
            after.close()
        first, second = first + times[0], second + times[1]
    sums = [[sum(times[i : i + inner]) for i in range(0, len(times), inner)] for times in (first, second)]
    median, low, high = interval([b / a for a, b in zip(*sums, strict=True)])
    seconds = [statistics.median(times) for times in (first, second)]  # of single steps
    return {
        "model": model,
        "step": contestant,
        "pairs": pairs,
        "before": seconds[0],
        "after": seconds[1],
        "median": median,
        "low": low,
        "high": high,
        "bar": BAR,
        "passed": low <= BAR,
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(
        "benchmarks.versions",
        "Time of a training step of this tree relative to another tree of bisam, interleaved.",
        "  git worktree add ../before v0.1.0\n"
        "  python -m benchmarks.versions ../before\n"
        "  python -m benchmarks.versions ../before --models mlp-32 --repeats 101 --json versions.json",
        repeats=61,
    )
    parser.add_argument("before", type=Path, help="folder of the other tree, with src/ and benchmarks/ in it")
    parser.add_argument("--models", nargs="+", choices=list(CASES), default=list(CASES), help="default: all")
    parser.add_argument("--steps", nargs="+", choices=OURS, default=OURS, help="default: all")
    parser.add_argument("--processes", type=at_least(1), default=5, help="of each tree in a row (default: %(default)s)")
    arguments = parser.parse_args(argv)
    if not (arguments.before / "benchmarks" / "step.py").is_file():
        parser.error(
            f"argument before: {str(arguments.before)!r} has no benchmarks/step.py: give the root of a checkout"
        )
    other, pairs, threads = arguments.before.resolve(), arguments.repeats, arguments.threads
    rows = [
        row(other, model, name, pairs, arguments.processes, threads, inner=1 if "resnet" in model else 5)
        for model in arguments.models
        for name in arguments.steps
    ]
    report(
        "A step of this tree relative to the other one",
        {
            "model": lambda r: r["model"],
            "step": lambda r: r["step"],
            "before": lambda r: f"{r['before'] * 1e3:.2f} ms",
            "after": lambda r: f"{r['after'] * 1e3:.2f} ms",
            "ratio": lambda r: f"{r['median']:.3f} [{r['low']:.3f}, {r['high']:.3f}]",
            "verdict": verdict,
        },
        rows,
        [f"{arguments.repeats} pairs a row; the bar is for the lower end of the 95 % interval of the median ratio."],
    )
    if arguments.json:
        write(
            arguments.json, "versions", {"repeats": arguments.repeats, "processes": arguments.processes}, {"rows": rows}
        )


if __name__ == "__main__":
    main()
