"""Growth of the overhead of SAM's step with the number of parameters and with the number of tensors.

The overhead is what a step takes beyond two forward-backward passes and one step of SGD. A network has weights of one
size: eight of them, of growing width, or a growing number of width 16. Networks that do not fit in memory stand on the
meta device, where operators are counted and nothing is computed.

    python -m benchmarks.growth
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from torch import Tensor, nn

from benchmarks.measure import Parser, at_least, interleaved, interval, judged, load, ratio, report, write
from benchmarks.models import batch_for
from benchmarks.operators import Operators
from benchmarks.step import CONTESTANTS, LIMIT

PARAMETERS = (10**5, 10**6, 10**7, 10**8, 10**9)
TENSORS = (10, 100, 1000, 10_000)
EXAMPLES = 32
CONTESTANT = "bisam SAM"


class Residual(nn.Module):
    """Layers x + relu(x) W without biases, whose weights are so small that thousands of layers keep their scale."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        scale = 1 / math.sqrt(width * layers)
        self.weights = nn.ParameterList([nn.Parameter(scale * torch.randn(width, width)) for _ in range(layers)])

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.weights:
            x = x + F.relu(x) @ weight
        return x


@dataclass(frozen=True)
class Size:
    """A network, by the number and the width of its weights.

    Attributes:
        grows: what grows along its axis.
        tensors: number of weights.
        width: of each, so that it has width x width parameters.
    """

    grows: str
    tensors: int
    width: int

    @property
    def parameters(self) -> int:
        """Number of all parameters."""
        return self.tensors * self.width**2


def sizes(parameters: Sequence[int], tensors: Sequence[int]) -> list[Size]:
    """Returns the networks of both axes."""
    return [
        *[Size("parameters", 8, max(round(math.sqrt(n / 8)), 1)) for n in parameters],
        *[Size("tensors", n, 16) for n in tensors],
    ]


def operators(size: Size) -> int:
    """Returns how many operators a later step of SAM has beyond those of its limit, on the meta device."""
    counts: list[int] = []
    for name in (CONTESTANT, LIMIT):
        with torch.device("meta"):
            model = Residual(size.tensors, size.width)
            x, y = batch_for(model, 4)
        training = CONTESTANTS[name](model, F.cross_entropy)
        for _ in range(2):  # the first steps also look at the model
            training.step(x, y)
        with Operators() as counted:
            training.step(x, y)
        counts.append(counted.count)
    return counts[0] - counts[1]


def measured(size: Size, repeats: int) -> dict[str, Any]:
    """Returns the entries of a row that are measured: the ratio, and the time for each tensor in microseconds."""
    torch.manual_seed(0)
    model = Residual(size.tensors, size.width)
    x, y = batch_for(model, EXAMPLES)
    steps = {
        name: partial(CONTESTANTS[name](copy.deepcopy(model), F.cross_entropy).step, x, y)
        for name in (CONTESTANT, LIMIT)
    }
    found = ratio(interleaved(steps, repeats), CONTESTANT, LIMIT)
    overhead = found.seconds * (1 - 1 / found.median)
    return {**judged(found, None), "microseconds_per_tensor": 1e6 * overhead / size.tensors}


def rows(chosen: Sequence[Size], repeats: int, most: int) -> list[dict[str, Any]]:
    """Returns a row for each network; those with more than `most` parameters are counted and not measured."""
    return [
        {
            **vars(size),
            "parameters": size.parameters,
            "operators": operators(size),
            **(measured(size, repeats) if size.parameters <= most else {}),
        }
        for size in chosen
    ]


def cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the cells of a row."""
    times = ("not measured", "", "")
    if "median" in row:
        times = (f"{row['median']:.3f}", interval(row), f"{row['microseconds_per_tensor']:.2f}")
    return f"{row['parameters']:,}", f"{row['tensors']:,}", *times, str(row["operators"])


HEADING = ("parameters", "tensors", "ratio", "95 % interval", "µs per tensor", "operators")


def draw(content: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Writes the figure (SVG): the ratio against the parameters and against the tensors."""
    figure = Figure(figsize=(8, 3), layout="constrained")
    for axes, grows in zip(figure.subplots(1, 2, sharey=True), ("parameters", "tensors"), strict=True):
        own = [row for row in content if row["grows"] == grows and "median" in row]
        middle, low, high = (
            [row["median"] if row[key] is None else row[key] for row in own]  # a few rounds have no interval
            for key in ("median", "median_low", "median_high")
        )
        below = [at - to for at, to in zip(middle, low, strict=True)]
        above = [to - at for at, to in zip(middle, high, strict=True)]
        axes.errorbar([row[grows] for row in own], middle, (below, above), fmt="o-", color="#0072B2", capsize=3)
        axes.axhline(1, color="0.6", linewidth=1)
        axes.set(xscale="log", xlabel=grows)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    figure.axes[0].set_ylabel("time / limit")
    with rc_context({"svg.hashsalt": "growth"}):  # the same bytes each time
        figure.savefig(path, metadata={"Date": None})


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(
        "benchmarks.growth",
        "Overhead of SAM's step against the number of parameters and of tensors.",
        "  python -m benchmarks.growth --json growth.json\n"
        "  python -m benchmarks.growth --parameters 100000 --tensors 10 10000 --repeats 101",
        repeats=31,
    )
    number = at_least(1)
    parser.add_argument("--parameters", type=number, nargs="*", default=PARAMETERS, metavar="N", help="default: to 1e9")
    parser.add_argument("--tensors", type=number, nargs="*", default=TENSORS, metavar="N", help="default: to 10,000")
    parser.add_argument(
        "--most", type=number, default=2 * 10**8, metavar="N", help="parameters that are measured (default: 2e8)"
    )
    arguments = parser.parse_args(argv)
    if not (chosen := sizes(arguments.parameters, arguments.tensors)):
        parser.error("nothing to measure: give --parameters or --tensors")
    parser.begin(arguments.threads)

    found = rows(chosen, arguments.repeats, arguments.most)
    columns = {heading: partial(lambda i, row: cells(row)[i], i) for i, heading in enumerate(HEADING)}
    report("Step time of SAM relative to the limit", columns, found, [load(found)])
    if arguments.json:
        write(arguments.json, "growth", {"repeats": arguments.repeats}, {"rows": found})


if __name__ == "__main__":
    main()
