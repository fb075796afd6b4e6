"""Writes docs/benchmarks.md and docs/scaling.md from the JSON files of the benchmarks.

A section that a page has already is replaced by that of a newer file; other sections stay as they are.

python -m benchmarks.objective --json objective.json
python -m benchmarks.step --json step.json
python -m benchmarks.overhead --json overhead.json
python -m benchmarks.growth --json growth.json
python -m benchmarks.pipeline --json pipeline.json
python -m benchmarks.epoch --json epoch.json
python -m benchmarks.parallel --json parallel.json
python -m benchmarks.scaling --json scaling.json
python -m benchmarks.overlap --json overlap.json
python -m benchmarks.docs objective.json step.json overhead.json growth.json pipeline.json epoch.json
python -m benchmarks.docs parallel.json scaling.json overlap.json --to docs/scaling.md
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import epoch, growth, objective, overlap, parallel, pipeline, scaling
from benchmarks.measure import interval, load
from benchmarks.overhead import needed
from benchmarks.step import LIMIT, to_sam
from bisam.experiments.errors import RunError
from bisam.experiments.runs.files import read_json, write

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"
FIGURE = "growth.svg"
TITLES = {"scaling": "Scaling over processes"}
"""Titles of the pages that are not called Benchmarks."""
INTRODUCTION = """# Benchmarks

`python -m benchmarks.docs` writes this page from the results of `benchmarks.objective`, `benchmarks.step`,
`benchmarks.overhead`, `benchmarks.growth`, `benchmarks.pipeline`, `benchmarks.epoch`, `benchmarks.parallel`,
`benchmarks.scaling` and `benchmarks.overlap`. The measured variants take turns within each round, so that anything that
slows the machine slows all of them. Each number is the median over the rounds of the ratio to the reference, with its
95 % interval (of the sign test); the interval tells how exact the run is, not how other processes or machines differ. A
bar is met if the whole interval meets it, missed if no part of it does, and undecided otherwise. If the load of other
programs was above 1.5 per core, there is no verdict. Sections that were measured before bisam recorded this have
quartiles instead, and their verdict is that of the median alone. Absolute times are omitted because they mean little on
a shared machine.
"""


def section(content: Mapping[str, Any]) -> list[str]:
    """Markdown of the results of one benchmark."""
    made, others = dict(content["environment"]), ""
    if any("load" in row for row in content["rows"]):
        del made["load"]  # that of the whole machine at the end
        others = f"; {load(content['rows'])}"
    environment = ", ".join(f"{k} {v}" for k, v in made.items() if v is not None)
    settings = ", ".join(f"{k} {v}" for k, v in content["settings"].items())
    return [*_MAKERS[content["benchmark"]](content), "", f"{environment}; {settings}{others}.", ""]


def _objective(content: Mapping[str, Any]) -> list[str]:
    rows = [
        (
            f"{r['size'][0]} x {r['size'][1]}",
            r["contestant"],
            *_ratio(r),
            objective.against_plain(r),
            objective.counts(r),
        )
        for r in content["rows"]
        if r["contestant"] != objective.REFERENCE
    ]
    title = "## Forward and backward pass of an objective, relative to cross-entropy with label smoothing 0.1"
    heading = (
        *("examples x classes", "objective", "ratio", "95 % interval", "bar"),
        *("to unsmoothed cross-entropy", "operators, passes over the logits"),
    )
    return [
        f"{title}{_threads(content)}",
        "",
        "In eager mode each operator is a kernel of its own. Torch has fused kernels for unsmoothed cross-entropy, "
        "in seven operators, and none for a bound: what a bound takes beyond it is the time of its operators "
        "where the batch is small, and of their passes over a tensor of the size of the logits where it is larger. The "
        "largest are taken in blocks that the cache of a CPU holds, twice, so that there more passes take less time. "
        "`torch.compile` fuses a bound too ([table 12](reproduction/table12/report.md)).",
        "",
        *_table(heading, rows),
    ]


def _step(content: Mapping[str, Any]) -> list[str]:
    rows = [
        (f"{r['model']}, batch {r['batch']}", r["contestant"], *_ratio(r), to_sam(r))
        for r in content["rows"]
        if r["contestant"] != LIMIT
    ]
    kept = [
        (r["contestant"], str(r["at_second_loss"]), str(r["between_steps"]), f"{r['checkpoint_ratio']:.3f}")
        for r in content["footprint"]
    ]
    allocator = ", with an allocator that keeps freed memory" if content["settings"]["keep_memory"] else ""
    title = "## Training step, relative to two forward-backward passes and one optimizer step"
    return [
        f"{title}{_threads(content)}{allocator}",
        "",
        *_table(("model", "implementation", "ratio", "95 % interval", "bar", "time / SAM's"), rows),
        "",
        "Live weight-sized storages (bars: 2 at the second loss, 3 with statistics, 1 between steps; momentum is not "
        "counted) and checkpoint size relative to the base optimizer's. The limit is two forward-backward passes and "
        "one optimizer step:",
        "",
        *_table(("implementation", "at the second loss", "between steps", "checkpoint"), kept),
    ]


def _overhead(content: Mapping[str, Any]) -> list[str]:
    rows = [(f"{r['model']}, batch {r['batch']}", r["contestant"], needed(r), *_ratio(r)[:2]) for r in content["rows"]]
    title = "## Methods other than SAM, relative to the passes and optimizer steps that they need"
    return [f"{title}{_threads(content)}", "", *_table(("model", "method", "needs", "ratio", "95 % interval"), rows)]


def _growth(content: Mapping[str, Any]) -> list[str]:
    title = "## Training step of SAM against the number of parameters and of tensors, relative to the same limit"
    return [
        f"{title}{_threads(content)}",
        "",
        f"![Time relative to the limit, against parameters and tensors]({FIGURE})",
        "",
        "Layers without biases and batches of 32: each weight is used once for an example, so that a pass costs little "
        "for each weight, and the arithmetic with vectors of the size of the weights shows most. A convolution uses a "
        "weight at every place of an image, and there is almost no overhead (above). Of networks that do not fit in "
        "memory, only the operators are counted: those that compute something, in a step after the first two, beyond "
        "the operators of the limit.",
        "",
        *_table(growth.HEADING, [growth.cells(row) for row in content["rows"]]),
    ]


def _pipeline(content: Mapping[str, Any]) -> list[str]:
    rows = [
        (pipeline.augmentation(r), r["contestant"], *_ratio(r))
        for r in content["rows"]
        if r["contestant"] != pipeline.REFERENCE
    ]
    title = "## Augmented images per second, relative to torchvision transforms applied image by image"
    return [
        f"{title}{_threads(content)}",
        "",
        *_table(("augmentation", "pipeline", "ratio", "95 % interval", "bar"), rows),
    ]


def _epoch(content: Mapping[str, Any]) -> list[str]:
    rows = [
        (r["whole"], r["part"], epoch.percent(r), "" if r["bar"] is None else f"{r['bar']:g}: {r['verdict']}")
        for r in content["rows"]
    ]
    title = f"## Shares of the time of an epoch of bisam train{_threads(content)}"
    return [title, "", *_table(("of", "part", "share", "bar"), rows)]


def _parallel(content: Mapping[str, Any]) -> list[str]:
    rows = [
        (f"{r['model']}, batch {r['batch']}", r["contestant"], *_ratio(r))
        for r in content["rows"]
        if r["contestant"] != parallel.REFERENCE
    ]
    title = f"## SAMPa on a pair of processes: speed relative to SAM on one process{_threads(content)}"
    limit = (
        f"The limit is *{parallel.LIMIT}*: each process takes a step of SGD and nothing is exchanged. It is below 2 "
        "where two processes on one machine slow each other down."
    )
    return [title, "", limit, "", *_table(("model", "implementation", "ratio", "95 % interval", "bar"), rows)]


def _scaling(content: Mapping[str, Any]) -> list[str]:
    rows = [
        (
            f"{r['model']}, batch {r['batch']}",
            r["method"],
            r["contestant"],
            *_ratio({**r, "passed": None})[:2],
            str(r["reductions"]),
        )
        for r in content["rows"]
        if r["contestant"] != scaling.ALONE
    ]
    title = f"## Step time on two processes of DistributedDataParallel, relative to one process{_threads(content)}"
    heading = ("model, batch per process", "method", "nesting", "ratio", "95 % interval", "all-reduces per step")
    return [title, "", *_table(heading, rows)]


def _overlap(content: Mapping[str, Any]) -> list[str]:
    rows = [
        (f"{r['model']}, batch {r['batch']}", f"{r['link']:g}", r["contestant"], *_ratio(r)[:2], overlap.saved(r))
        for r in content["rows"]
        if r["contestant"] != overlap.REFERENCE
    ]
    heading = ("model, batch per process", "link", "step", "ratio", "95 % interval", "hidden")
    return [
        f"## Step time with a slow link, relative to a step of SAM without it{_threads(content)}",
        "",
        "Two processes; the link carries a whole gradient in that many times of a plain step (ERM), one bucket after "
        "the other, and uses no core. *Hidden* is the share of the time of the link that `overlap=True` saves.",
        "",
        *_table(heading, rows),
    ]


def _stacked(content: Mapping[str, Any]) -> list[str]:
    rows = [(r["contestant"], f"{r['runs_per_minute']:.1f}", *_ratio(r)) for r in content["rows"] if r["size"] > 1]
    heading = ("training", "runs per minute", "ratio", "95 % interval", "bar")
    title = "## Runs per minute of seeds that are trained in a stack, relative to runs of their own"
    return [f"{title}{_threads(content)}", "", *_table(heading, rows)]


_MAKERS: dict[str, Callable[[Mapping[str, Any]], list[str]]] = {
    "objective": _objective,
    "step": _step,
    "overhead": _overhead,
    "growth": _growth,
    "pipeline": _pipeline,
    "epoch": _epoch,
    "parallel": _parallel,
    "scaling": _scaling,
    "overlap": _overlap,
    "stacked": _stacked,
}


def _threads(content: Mapping[str, Any]) -> str:
    threads = content["environment"]["threads"]
    return f" ({threads} thread{'s' if threads > 1 else ''})"


def _ratio(row: Mapping[str, Any]) -> tuple[str, str, str]:
    if "skipped" in row:
        return f"not run: one call takes about {row['expected_seconds']:.0f} s", "", ""
    if "median_low" not in row:  # an older file
        bar = "" if row["passed"] is None else f"{row['bar']:g}: {'met' if row['passed'] else 'missed'}"
        return f"{row['median']:.3f}", f"quartiles {row['low']:.3f} to {row['high']:.3f}", bar
    bar = "" if row.get("verdict") is None else f"{row['bar']:g}: {row['verdict']}"
    return f"{row['median']:.3f}", interval(row), bar


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (heading, ["---"] * len(heading), *rows)]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.docs", description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="+", type=Path, help="JSON files of the benchmarks")
    parser.add_argument("--to", type=Path, default=PAGE, help="page to write (default: docs/benchmarks.md)")
    arguments = parser.parse_args(argv)
    made: dict[str, list[str]] = {}
    for path in arguments.results:
        try:
            content = read_json(path)
            if content is None or content.get("benchmark") not in _MAKERS:
                raise RunError(f"{path} is not what a benchmark's --json writes")
        except RunError as error:
            sys.exit(f"{parser.prog}: {error}")
        text = "\n".join(section(content)).rstrip()
        made.setdefault(_title(text), []).append(text)
        if content["benchmark"] == "growth":
            growth.draw(content["rows"], arguments.to.with_name(FIGURE))
    sections: list[str] = []
    for text in _present(arguments.to):
        title = _title(text)
        sections += made.get(title, [text])
        if title in made:
            made[title] = []  # of several sections with this title, they are in the place of the first
    sections += [text for texts in made.values() for text in texts]
    introduction = INTRODUCTION.replace("# Benchmarks", f"# {TITLES.get(arguments.to.stem, 'Benchmarks')}", 1)
    write(arguments.to, "\n\n".join([introduction.rstrip(), *sections]) + "\n")


def _present(page: Path) -> list[str]:
    """The sections of a page that exists."""
    if not page.is_file():
        return []
    return [f"## {text.rstrip()}" for text in page.read_text(encoding="utf-8").split("\n## ")[1:]]


def _title(text: str) -> str:
    return text.partition("\n")[0]


if __name__ == "__main__":
    main()
