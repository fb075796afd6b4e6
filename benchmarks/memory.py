"""Memory of a step of fine-tuning with AdamW: the largest number of bytes in live tensors, for a GPT of 1e8 parameters.

The model stands on the meta device: every tensor has its size and no values, so that the numbers are those of any
device whose allocator wastes nothing, and no memory is needed.

    python -m benchmarks.memory
    python -m benchmarks.memory --to docs/fine-tuning.md      # the table of that page
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measure import Parser, at_least, report, write
from benchmarks.step import RHO, Storages
from bisam import SAM, SAMON, FilterNoise, MomentumSAM, Only, SharpnessAware, ZerothOrder, cross_entropy
from bisam.experiments.models.gpt import GPT
from bisam.experiments.runs import files
from bisam.integrations.peft import FlatLoRA
from bisam.methods import Method
from bisam.oracle import Oracle, Query, View

MARKS = "<!-- memory: begin (python -m benchmarks.memory --to {} writes this table) -->", "<!-- memory: end -->"
VOCABULARY, HEADS, SEQUENCES, TOKENS = 16_000, 12, 1, 128


class Passes(View):
    """Counts the gradients and the forward passes besides."""

    def __init__(self, oracle: Oracle, counts: dict[str, int]) -> None:
        super().__init__(oracle)
        self.counts = counts

    def ask(self, queries: Sequence[Query]) -> list[Any]:
        for query in queries:
            self.counts["gradients" if query.grad else "forwards"] += 1
        return super().ask(queries)


def adapters(model: nn.Module) -> nn.Module:
    """LoRA adapters of rank 8 at all linear layers of the blocks."""
    layers = ["attention", "mix", "up", "down"]
    return peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=layers))  # pyright: ignore[reportArgumentType]


def in_block(number: int, name: str, parameter: Tensor) -> bool:
    """Whether a parameter is in a block of the model, or after the last one."""
    return name.startswith((f"blocks.{number}.", "norm.", "head."))


@dataclass(frozen=True)
class Contestant:
    """A method, None for a plain loop, and how it is written."""

    name: str
    method: Method | None
    lora: bool = False
    noise: bool = False


def contestants(layers: int = 12) -> list[Contestant]:
    """Returns the rows of the table."""
    last = partial(in_block, layers - 1)
    return [
        Contestant("plain AdamW", None),
        Contestant("`SAM(0.05)`, `BiSAM(0.05)`", SAM(RHO)),
        Contestant("`MomentumSAM(0.3)`", MomentumSAM(0.3)),
        Contestant("`SAM(Only(in_last_block, 0.05))`", SAM(Only(last, RHO))),
        Contestant("`SAMON(0.5)`", SAMON(0.5)),
        Contestant("`ZerothOrder(0.5)`", ZerothOrder(0.5)),
        Contestant('`ZerothOrder(0.5, restore="redraw")`', ZerothOrder(0.5, restore="redraw")),
        Contestant("`FilterNoise(0.05)`", FilterNoise(0.05)),
        Contestant('`FilterNoise(0.05, restore="redraw")`', FilterNoise(0.05, restore="redraw")),
        Contestant("plain AdamW, LoRA", None, lora=True),
        Contestant("`FlatLoRA(model, 0.05)`, LoRA", None, lora=True, noise=True),
        Contestant("`BiSAM(0.05)`, LoRA", SAM(RHO), lora=True),
        Contestant("`ZerothOrder(0.5)`, LoRA", ZerothOrder(0.5), lora=True),
    ]


def measured(
    contestant: Contestant, layers: int = 12, width: int = 768, vocabulary: int = VOCABULARY
) -> dict[str, Any]:
    """Returns a row: the peak of the third step in bytes, the parameters that are trained, and the passes of a step."""
    counts = {"gradients": 0, "forwards": 0}
    with torch.device("meta"):
        model = GPT(vocabulary, width=width, depth=layers, heads=HEADS)
        x, y = torch.randint(9, (SEQUENCES, TOKENS)), torch.randint(9, (SEQUENCES, TOKENS))
        size = sum(p.nbytes for p in model.parameters())
        model = adapters(model) if contestant.lora else model
        if contestant.noise:
            FlatLoRA(model, RHO)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, foreach=False)  # without copies of all of its state
    method = contestant.method
    sharp = None if method is None else SharpnessAware(model, _counted(method, counts), cross_entropy)
    live = Storages()
    for tensor in (*model.parameters(), x, y):
        live.add(tensor)
    with live:
        for step in range(3):
            if step == 2:  # the first steps also look at the model
                counts.update(gradients=0, forwards=0)
                live.restart()
            loss = F.cross_entropy(model(x), y) if sharp is None else sharp(x, y)
            loss.backward()
            del loss
            optimizer.step()
            optimizer.zero_grad()
    return {
        "method": contestant.name,
        "trained": sum(p.numel() for p in trained),
        "weights_bytes": size,
        "peak_bytes": live.peak,
        **({"gradients": 1, "forwards": 0} if sharp is None else counts),
    }


def _counted(method: Method, counts: dict[str, int]) -> Method:
    return lambda oracle, batch: method(Passes(oracle, counts), batch)


def rows(layers: int = 12, width: int = 768, vocabulary: int = VOCABULARY) -> list[dict[str, Any]]:
    """Returns the rows; each has its memory beyond plain training of the same parameters, in sizes of the weights."""
    found = [measured(contestant, layers, width, vocabulary) for contestant in contestants(layers)]
    plain = {row["trained"]: row["peak_bytes"] for row in found if row["method"].startswith("plain")}
    return [{**row, "beyond": (row["peak_bytes"] - plain[row["trained"]]) / row["weights_bytes"]} for row in found]


def cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the cells of a row."""
    passes = f"{row['gradients']} + {row['forwards']} f" if row["forwards"] else str(row["gradients"])
    beyond = "" if row["method"].startswith("plain") else f"{row['beyond'] + 0.0:+.3f}"
    return row["method"], f"{row['trained']:,}", f"{row['peak_bytes'] / 1e9:.3f}", beyond, passes


HEADING = ("method", "trained", "peak, GB", "beyond plain, weights", "gradients")


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """Returns the table in Markdown."""
    lines = [HEADING, ("---", "---:", "---:", "---:", "---"), *[cells(row) for row in found]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def written(page: str, path: str, found: Sequence[Mapping[str, Any]]) -> str:
    """Returns a page with the table between its marks.

    Raises:
        ValueError: the page has no marks.
    """
    begin, end = (mark.format(path) for mark in MARKS)
    if begin not in page or end not in page:
        raise ValueError(f"{path} has no place for the table: write {begin} and {end} there")
    return f"{page[: page.index(begin)]}{begin}\n{table(found)}\n{page[page.index(end) :]}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(
        "benchmarks.memory",
        "Largest number of bytes in live tensors in a step, on the meta device.",
        "  python -m benchmarks.memory --json memory.json\n  python -m benchmarks.memory --to docs/fine-tuning.md",
        repeats=1,
    )
    number = at_least(1)
    parser.add_argument("--layers", type=number, default=12, help="blocks of the model (default: %(default)s)")
    parser.add_argument("--width", type=number, default=768, help=f"a multiple of {2 * HEADS} (default: %(default)s)")
    parser.add_argument("--vocabulary", type=number, default=VOCABULARY, help="default: %(default)s")
    parser.add_argument("--to", metavar="PAGE", help="write the table into this page, between its marks")
    arguments = parser.parse_args(argv)
    if arguments.width % (2 * HEADS):
        parser.error(f"argument --width: must be a multiple of {2 * HEADS}, got {arguments.width}")
    torch.set_num_threads(arguments.threads)
    size = {"layers": arguments.layers, "width": arguments.width, "vocabulary": arguments.vocabulary}
    found = rows(**size)
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        heading: partial(lambda i, row: cells(row)[i], i) for i, heading in enumerate(HEADING)
    }
    report("Peak memory of a step of AdamW, in bytes of live tensors", columns, found)
    if arguments.to:
        page = Path(arguments.to)
        try:
            files.write(page, written(page.read_text(), arguments.to, found))
        except (OSError, ValueError) as error:
            parser.error(str(error))
    if arguments.json:
        write(arguments.json, "memory", size, {"rows": found})


if __name__ == "__main__":
    main()
