"""Writes docs/conformance.md: one row per case, one column per implementation, and remarks on failures."""

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

`python -m tests.conformance --to docs/conformance.md` writes this page. Each row is a behaviour that users of
sharpness-aware training rely on. Each implementation is used as its documentation describes.

* pass: the implementation behaves as stated.
* fail: it does not, or it raised an error; the remark describes the result.
* n/a: the row needs a feature whose use the implementation does not document: GradScaler, a rho for each parameter
  group, sparse gradients, or being a loss. This describes its scope and is not a defect.
"""

NOT_DONE = {
    "timeout": "* timeout: it was not done within the limit.",
    "crash": "* crash: its process died.",
}
"""Verdicts that are explained if they occur."""

CAVEATS = """## Fairness

The authors of bisam chose the rows, from problems that users of SAM repositories report. It is no surprise that bisam
passes them: each row is a case that bisam had to handle. Three properties support the suite:

* A loop of the plain formula ([reference.py](../tests/conformance/reference.py)), which is not a loss, passes every row
  except the group "loss only", which only a loss can express.
* For each row there is a loop with a known defect that fails it ([mutants.py](../tests/conformance/mutants.py)).
* Where more than one meaning is accepted (a batch in parts, several processes), each accepted meaning passes.

The rows are not equally important, and the number of passes means nothing: some rows matter to everybody, some to few.
The suite does not cover speed, memory, accuracy, GPUs, FSDP or tensor parallelism. Corrections are welcome, especially
corrections of an adapter.
"""

INSTRUCTIONS = """## Run the suite on your own implementation

Write an adapter whose `make` returns a trainer with `model`, `optimizer`, `step` and `closure`
([adapter.py](../tests/conformance/adapter.py) has the types). This is the adapter of pytorch_optimizer:
"""

COMMAND = """Then run, in a checkout of bisam with `pip install -e ".[dev]"`:

```
python -m tests.conformance --adapter mypackage.conformance:adapter
```

`--limit SECONDS` bounds the time of a case; a case that hangs or dies does not stop the others. The exit code is 1 if a
case failed, timed out or crashed. `--help` lists the flags, the verdicts and the exit codes.
"""


def page(adapters: Mapping[str, Adapter], results: Mapping[str, Mapping[str, Result]], where: str) -> str:
    """Markdown of the results by adapter and case; `where` describes the environment of the measurement."""
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
    found = {result.verdict for of_one in results.values() for result in of_one.values()}
    more = "".join(f"{text}\n" for verdict, text in NOT_DONE.items() if verdict in found)
    code = EXAMPLE.read_text().partition('"""\n\n')[2].replace("from .adapter", f"from {ADAPTER}")
    return "\n".join(
        [
            *(INTRODUCTION + more, *table, "", f"{where}.", ""),
            *("Remarks:", "", *(f"{i}. {remark}" for i, remark in enumerate(remarks, 1)), ""),
            *("How each implementation was used:", "", *used, ""),
            *(CAVEATS, INSTRUCTIONS, "```python", code.rstrip(), "```", "", COMMAND.rstrip(), ""),
        ]
    )


def _documented(adapter: Adapter) -> str:
    return " ".join((sys.modules[type(adapter).__module__].__doc__ or "").split())


def verdicts(text: str) -> dict[str, dict[str, str]]:
    """Parse a page: for each "name version" in its heading, the verdict on each statement."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    heading, _, *rows = lines
    return {
        name: {row[1]: row[column].partition(" (")[0] for row in rows}
        for column, name in enumerate(heading)
        if column > 1
    }
