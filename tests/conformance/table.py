"""The page docs/conformance.md: a row for each case, a column for each implementation, and what failed how."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from .adapter import Adapter
from .behaviours import CASES
from .runner import Result

PAGE = Path(__file__).parents[2] / "docs" / "conformance.md"
EXAMPLE = Path(__file__).with_name("pytorch_optimizer_sam.py")
ADAPTER = "tests.conformance.adapter"

INTRODUCTION = """# Conformance

Made by `python -m tests.conformance --to docs/conformance.md`. Each row is a behaviour that users of sharpness-aware
training rely on, run on each implementation as its documentation says to use it.

* pass: the behaviour is as stated.
* fail: it is not, or an error was raised; the remark says what was found.
* n/a: it needs one of four features (GradScaler, a rho for each parameter group, sparse gradients, being a loss) that
  the implementation documents no way to use. This says what is offered, and not that something is wrong.
"""

CAVEATS = """## How fair it is

The authors of bisam chose the rows, from what users of SAM repositories report. That bisam passes them is no surprise:
a row is there because we had to get it right. What can be said for the suite:

* A loop of the plain formula ([reference.py](../tests/conformance/reference.py)), which is no loss, passes every row
  but those under "only a loss", which only a loss can express.
* For each row there is a loop with a known defect that fails it ([mutants.py](../tests/conformance/mutants.py)).
* Where more than one meaning is accepted (a batch in parts, several processes), each of them passes.

The rows do not weigh alike, and a count of passes means nothing: some matter to everybody, some to few. Speed, memory
and accuracy are not in it, nor are GPUs, FSDP and tensor parallelism. Corrections are welcome, of an adapter above all.
"""

INSTRUCTIONS = """## Put yours to it

Write an adapter: a `make` that returns a trainer with `model`, `optimizer`, `step` and `closure`
([adapter.py](../tests/conformance/adapter.py) has the types). This one is pytorch_optimizer's:
"""

COMMAND = """Then, from a checkout of bisam with `pip install -e ".[dev]"`:

```
python -m tests.conformance --adapter mypackage.conformance:adapter
```
"""


def page(adapters: Mapping[str, Adapter], results: Mapping[str, Mapping[str, Result]], where: str) -> str:
    """The Markdown of results by adapter and case; `where` says on what they were made."""
    remarks: list[str] = []

    def cell(spec: str, name: str) -> str:
        adapter, result = adapters[spec], results[spec][name]
        if not result.reason:
            return result.verdict
        more = getattr(adapter, "remarks", {}).get(name) if result.verdict == "fail" else None
        remark = f"{adapter.name}: {result.reason}{f'; {more}' if more else ''}."
        if remark not in remarks:
            remarks.append(remark)
        return f"{result.verdict} ({remarks.index(remark) + 1})"

    rows = [(case.group, case.statement, *(cell(spec, case.name) for spec in adapters)) for case in CASES]
    heading = ("", "behaviour", *(f"{a.name} {a.version}" for a in adapters.values()))
    table = [f"| {' | '.join(cells)} |" for cells in (heading, ["---"] * len(heading), *rows)]
    used = [f"* {a.name}: {_documented(a)}" for a in adapters.values()]
    code = EXAMPLE.read_text().partition('"""\n\n')[2].replace("from .adapter", f"from {ADAPTER}")
    return "\n".join(
        [
            *(INTRODUCTION, *table, "", f"{where}.", ""),
            *("Remarks:", "", *(f"{i}. {remark}" for i, remark in enumerate(remarks, 1)), ""),
            *("How each was used:", "", *used, ""),
            *(CAVEATS, INSTRUCTIONS, "```python", code.rstrip(), "```", "", COMMAND.rstrip(), ""),
        ]
    )


def _documented(adapter: Adapter) -> str:
    return " ".join((sys.modules[type(adapter).__module__].__doc__ or "").split())


def verdicts(text: str) -> dict[str, dict[str, str]]:
    """Of a page: for each "name version" in its heading, the verdict on each statement."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    heading, _, *rows = lines
    return {
        name: {row[1]: row[column].partition(" (")[0] for row in rows}
        for column, name in enumerate(heading)
        if column > 1
    }
