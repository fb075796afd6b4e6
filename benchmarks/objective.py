"""Time of the forward and backward pass of a lower bound of the 0-1 loss, relative to cross-entropy.

In eager mode each operator is a kernel of its own, and torch has a fused one for cross-entropy without smoothing alone.
So the operators of each loss are counted too, and how often they pass over a tensor of the size of the logits: what a
bound takes beyond that loss is due to them.

python -m benchmarks.objective
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import (
    Parser,
    bracketed,
    interleaved,
    interval,
    judged,
    load,
    ratio,
    report,
    seconds,
    verdict,
    write,
)
from benchmarks.operators import Operators
from bisam import NegLog, Tanh
from bisam.experiments.measurements.losses import Loss, row_by_row

REFERENCE, PLAIN = "cross-entropy", "unsmoothed cross-entropy"
SIZES = [(128, 10), (128, 100), (512, 1000), (1024, 32000)]
BARS = {"NegLog": 1.0, "Tanh": 1.2}
PATIENCE = 3.0  # seconds per call; slower implementations are skipped

CONTESTANTS: dict[str, Loss] = {
    REFERENCE: partial(F.cross_entropy, label_smoothing=0.1),
    PLAIN: F.cross_entropy,
    "NegLog": NegLog(),
    "Tanh": Tanh(),
    "NegLog, row by row": partial(row_by_row, NegLog()),
    "Tanh, row by row": partial(row_by_row, Tanh()),
}


def forward_backward(loss: Loss, logits: Tensor, labels: Tensor) -> Tensor:
    """The gradient of the mean loss."""
    return torch.autograd.grad(loss(logits, labels).mean(), logits)[0]


def counted(loss: Loss, n: int, classes: int) -> dict[str, Any]:
    """The operators of a forward and backward pass, and the passes over the logits (n, classes) that they make."""
    logits, labels = torch.zeros(n, classes, requires_grad=True), torch.zeros(n, dtype=torch.long)
    with Operators(least=n + 1) as found:
        forward_backward(loss, logits, labels)
    return {"operators": found.count, "passes": found.entries / logits.numel()}


def expected_seconds(loss: Loss, logits: Tensor, labels: Tensor) -> float:
    """Estimate from a part of the batch. Quadratic: each in-place step of the loop copies the gradient of all rows."""
    part = max(1, len(logits) // 16)
    head = logits.detach()[:part].clone().requires_grad_()
    call = partial(forward_backward, loss, head, labels[:part])
    return min(seconds(call) for _ in range(3)) * (len(logits) / part) ** 2


def size(text: str) -> tuple[int, int]:
    """Parse examples x classes, as in 128x10."""
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(p.isdecimal() for p in parts) or int(parts[0]) < 1 or int(parts[1]) < 2:
        raise argparse.ArgumentTypeError(f"must be examples x classes, as in 128x10, got {text!r}")
    return int(parts[0]), int(parts[1])


def against_plain(row: Mapping[str, Any]) -> str:
    """The time of a row relative to cross-entropy without smoothing, with the interval; older rows have none."""
    if "to_plain" not in row:
        return ""
    return f"{row['to_plain']:.3f} {bracketed(row['to_plain_low'], row['to_plain_high'])}"


def counts(row: Mapping[str, Any]) -> str:
    """The operators of a row and their passes over the logits, if they were counted."""
    return f"{row['operators']}, {row['passes']:.1f}" if "operators" in row else ""


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(
        "benchmarks.objective",
        "Time of a bound's forward and backward pass relative to F.cross_entropy(label_smoothing=0.1), on the CPU.",
        "  python -m benchmarks.objective\n"
        "  python -m benchmarks.objective --sizes 128x10 64x1000 --repeats 201 --threads 2 --json objective.json",
        repeats=51,
    )
    parser.add_argument("--sizes", type=size, nargs="+", default=SIZES, metavar="NxK", help="default: the four above")
    parser.epilog = f"default sizes: {' '.join(f'{n}x{k}' for n, k in SIZES)}\n\n{parser.epilog}"
    arguments = parser.parse_args(argv)
    parser.begin(arguments.threads)
    torch.manual_seed(0)

    rows = []
    for n, classes in arguments.sizes:
        logits, labels = torch.randn(n, classes, requires_grad=True), torch.randint(classes, (n,))
        calls, skipped = {}, {}
        for name, loss in CONTESTANTS.items():
            if "row" in name and (expected := expected_seconds(loss, logits, labels)) > PATIENCE:
                skipped[name] = expected
            else:
                calls[name] = partial(forward_backward, loss, logits, labels)
        times = interleaved(calls, arguments.repeats)
        for name in CONTESTANTS:
            row = {"size": [n, classes], "contestant": name}
            if name in skipped:
                rows.append(row | {"skipped": True, "expected_seconds": skipped[name]})
                continue
            plain = ratio(times, name, PLAIN)
            to_plain = {"to_plain": plain.median, "to_plain_low": plain.median_low, "to_plain_high": plain.median_high}
            numbers = {} if "row" in name else counted(CONTESTANTS[name], n, classes)
            rows.append(row | judged(ratio(times, name, REFERENCE), BARS.get(name)) | to_plain | numbers)

    report(
        "Forward and backward, relative to F.cross_entropy(label_smoothing=0.1)",
        {
            "size": lambda r: f"{r['size'][0]} x {r['size'][1]}",
            "objective": lambda r: r["contestant"],
            "time": lambda r: "skipped" if "skipped" in r else f"{r['seconds'] * 1e6:,.0f} µs",
            "ratio": lambda r: (
                f"one call takes ~{r['expected_seconds']:.0f} s" if "skipped" in r else f"{r['median']:.2f}"
            ),
            "95 % interval": lambda r: "" if "skipped" in r else interval(r, 2),
            "to unsmoothed": lambda r: "" if "skipped" in r else f"{r['to_plain']:.2f}",
            "operators, passes": counts,
            "verdict": lambda r: "" if "skipped" in r else verdict(r),
        },
        rows,
        [load(rows)],
    )
    if arguments.json:
        write(arguments.json, "objective", {"repeats": arguments.repeats}, {"rows": rows})


if __name__ == "__main__":
    main()
