"""`bisam methods`: the catalogue of methods, on the terminal or as a page."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table
from rich.text import Text

from bisam.experiments.cli.folders import check_file
from bisam.experiments.cli.terminal import console
from bisam.experiments.runs.files import write

EXAMPLES = (
    "bisam methods",
    "bisam methods --to docs/methods.md",
)


def methods(*, to: Path | None = None) -> int:
    """List the methods: expression, cost, and recommended radius of each.

    Args:
        to: Markdown file to write, with the references, instead of the table on the terminal.
    """
    from bisam.experiments.recipes import catalogue, entries

    if to is not None:
        check_file(to, "methods.md")
        write(to, entries.page(catalogue.METHODS, catalogue.GAMES))
        console.print(f"{to}", soft_wrap=True)
        return 0
    wide = console.width >= 130  # else source, state and radius are below the expression
    table = Table(box=None, pad_edge=False, header_style="bold", caption=entries.CAPTION, caption_justify="left")
    table.add_column("--method", no_wrap=True)
    table.add_column("expression", overflow="fold", min_width=30)
    for header in ("gradients", "memory", *(("state", "source", "set rho to") if wide else ())):
        table.add_column(header, overflow="fold")
    for key, entry in {**catalogue.METHODS, **catalogue.GAMES}.items():
        more = (entry.state or "–", entry.reference or "–", entry.advice or "–")
        expression = Text(entry.written())
        if not wide:
            labels = ("state: {}", "{}", "rho: {}")
            below = [label.format(text) for label, text in zip(labels, more, strict=True) if text != "–"]
            expression.append(f"\n{'; '.join(below)}" if below else "", style="dim")
        table.add_row(key, expression, entry.cost, f"{entry.memory:g}", *(more if wide else ()))
    console.print(table)
    return 0
