"""The parts of a report in Markdown that need care: text that is escaped, and tables whose numbers are aligned."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from urllib.parse import quote

_NUMBER = re.compile(r"(?:< ?|> ?)?[+−-]?\d+(?:[.,]\d+)*(?:e[+−-]?\d+)?(?![-\w.])[^:;]*")
_NONE = re.compile(r"|–|not finite.*")


def escaped(text: str) -> str:
    """Text escaped for Markdown, on one line, also inside a table."""
    text = re.sub(r"\s+", " ", text)
    return re.sub(r"[\\`*<>|~&$]|(?<=\])\(|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\\g<0>", text)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells, which are escaped; see `aligned`."""
    return aligned([escaped(cell) for cell in header], [[escaped(cell) for cell in line] for line in rows])


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells that are Markdown; a column whose cells all are numbers is aligned to the right.

    A number may have a unit, a spread, an interval or words behind it; a dash stands for a missing one.
    """
    rule = ["---:" if _numbers([line[i] for line in rows]) else "---" for i in range(len(header))]
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *rows))


def link(text: str, target: str) -> str:
    """A link to a file, whose text is escaped; in a path all but the slashes and letters is quoted."""
    return f"[{escaped(text)}]({quote(target)})"


def _numbers(cells: Sequence[str]) -> bool:
    found = [cell.replace("\\", "").replace("**", "") for cell in cells]
    known = [cell for cell in found if not _NONE.fullmatch(cell)]
    return bool(known) and all(_NUMBER.fullmatch(cell) for cell in known)
