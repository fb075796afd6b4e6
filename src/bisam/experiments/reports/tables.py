"""Tables of results, computed from run folders only. Each number is a mean ± standard deviation over n seeds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import fields
from math import isnan, nan
from statistics import mean, median, stdev
from typing import Any

from bisam.experiments.recipes.assumptions import Assumption
from bisam.experiments.recipes.catalogue import BASELINE
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.reports.comparison import beside
from bisam.experiments.reports.differences import Baselines, Difference, baseline, differences, paired, student
from bisam.experiments.reports.groups import (
    Groups,
    Place,
    grouped,
    metric,
    names,
    place,
    places,
    title,
    varying,
)
from bisam.experiments.reports.markdown import escaped as escaped, table as _table
from bisam.experiments.reports.marks import Marks
from bisam.experiments.runs.folder import Finished
from bisam.experiments.runs.provenance import RESULT, line, where
from bisam.experiments.runs.results import BALL
from bisam.experiments.studies import LABELS
from bisam.experiments.training.ball import EXAMPLES, RADIUS, STEPS
from bisam.experiments.training.metrics import TITLES

Row = dict[str, Any]

CAPTION = (
    "Test scores times 100 (accuracies in per cent): mean ± standard deviation over n seeds, with the weights of the "
    "epoch with the best validation score (best val.) and with those of the last epoch. The test set was evaluated "
    "once, at the end of each run. Label noise is in the training labels, and in the validation labels of runs with "
    "validation noise only. Seeds vary the initial weights, the noise and the order of the batches, not the split. "
    "Gradients: batch gradients per step, as counted, plus forward passes (f). Time: duration of an epoch "
    "relative to plain training, which was measured between the epochs of the same run. Runs that diverged, with a "
    "loss that is not finite, are part of all means."
)
_FIELDS = {field.name: field.default for field in fields(Recipe) if field.name not in ("method", "seed")}
_PLACE = ("dataset", "model", "noise")
_LENGTH = ("epochs", "steps")
_TESTED = {"test_best": "best val.", "test_last": "last", "test_ema": "average"}
_LISTED = 12  # longer lists are given as counts only
_WORST = "ball_worst"
_NONE = Difference(nan, nan, nan, 0)


def summary(runs: Iterable[Finished], baselines: Baselines = (BASELINE,)) -> list[Row]:
    """One row for each recipe, scores as shares of 1; nan where there is no number.

    Args:
        runs: finished runs.
        baselines: methods to compare with, see `differences.baseline`.
    """
    groups = grouped(runs)
    called, against = names(groups), differences(groups, baselines)
    always = [*_PLACE, "rho", *(unit for unit in _LENGTH if any(recipe.unit == unit for recipe in groups))]
    told = [*always, *(name for name in varying(groups) if name not in (*_PLACE, "rho", *_LENGTH))]
    everything = [run for group in groups.values() for run in group]
    keys = [key for key in (*_TESTED, "validation_best", "relative_time") if any(key in r.result for r in everything)]
    metrics = _metrics(everything)
    rows: list[Row] = []
    for recipe, group in groups.items():
        row: Row = {"name": called[recipe], "method": title(recipe)}
        row |= {name: "" if (value := recipe.setting(name)) is None else value for name in told}
        row["metric"] = metric(group[0])
        for key in keys:
            row |= _moments(key, [run.result[key] for run in group if key in run.result])
        for name in metrics if len(metrics) > 1 else ():
            row |= _moments(f"test_best_{name}", [_scores(run)[name] for run in group if name in _scores(run)])
        row |= _moments("flipped_late", [_late(run) for run in group])
        row["n"] = len(group)
        row["diverged"] = sum(run.diverged is not None for run in group)
        row["gradients_per_step"] = mean(run.result["gradients_per_step"] for run in group)
        row["forwards_per_step"] = mean(run.result["forwards_per_step"] for run in group)
        row["seconds_per_epoch"] = median(run.result["seconds_per_epoch"] for run in group)
        other, difference = against.get(recipe, (None, _NONE))
        row["baseline"] = "" if other is None else called[other]
        row |= {f"difference_{name}": getattr(difference, name) for name in ("mean", "low", "high")}
        row |= {"pairs": difference.pairs, "recipe": recipe.slug}
        rows.append(row)
    return rows


_CELLS: dict[str, Callable[[Row], str]] = {
    "method": lambda row: f"{row['method']}",
    "noise": lambda row: f"{100 * row['noise']:g} %",
    "rho": lambda row: f"{row['rho']}" or "–",
    "metric": lambda row: TITLES.get(row["metric"]) or f"{row['metric']}",
    **{words: lambda row, key=key: _spread(row, key, 100) for key, words in _TESTED.items()},
    "n": lambda row: f"{row['n']}",
    "difference": lambda row: difference(row),
    "gradients": lambda row: (
        f"{row['gradients_per_step']:.3g}"
        + (f" + {row['forwards_per_step']:.2g} f" if row["forwards_per_step"] else "")
    ),
    "time": lambda row: _spread(row, "relative_time", 1),
}


def header(rows: Sequence[Row], brief: bool = False) -> tuple[str, ...]:
    """The columns for these rows of `summary`: data set, model, noise and metric where they vary.

    Args:
        rows: of one report.
        brief: for a terminal: without the columns that the names already tell, and without wide ones.
    """
    several = [name for name in (*_PLACE, "metric") if len({row[name] for row in rows}) > 1]
    settings = [name for name in rows[0] if name in _FIELDS and name not in _PLACE]
    tested = [words for key, words in _TESTED.items() if f"{key}_mean" in rows[0]]
    against = {row["baseline"] for row in rows} - {""}
    found = [*(name for name in several if name != "metric"), "name" if brief else "method"]
    found += ["rho"] if brief and any(row["rho"] != "" for row in rows) else []
    found += [*settings, *(name for name in several if name == "metric"), *tested, "n"] if not brief else tested[:1]
    found += ["diverged"] * any(row["diverged"] for row in rows)
    found += ["baseline"] * (len(against) > 1 and not brief) + ["difference"] * bool(against)
    return (*found, *([] if brief else ["gradients"]), "time")


def cells(row: Row, header: Sequence[str]) -> tuple[str, ...]:
    """The cells of a row of `summary` as text, scores times 100."""
    plain = {name: "–" if row.get(name, "") == "" else f"{row[name]}" for name in header}
    return tuple(_CELLS[name](row) if name in _CELLS else plain[name] for name in header)


def difference(row: Row) -> str:
    """The difference of a row with its interval and number of pairs; a dash if there are fewer than two pairs."""
    return _interval(
        Difference(*[row[f"difference_{part}"] for part in ("mean", "low", "high")], pairs=row["pairs"]), 100
    )


def markdown(
    title: str,
    runs: Sequence[Finished],
    pictures: Mapping[str, str],
    note: str = "",
    baselines: Baselines = (BASELINE,),
    left_out: Sequence[str] = (),
    assumptions: Sequence[Assumption] = (),
    more: Sequence[str] = (),
) -> str:
    """The whole report as Markdown.

    Args:
        title: of the study.
        runs: finished runs, in the order of the table.
        pictures: files beside the report, with their captions.
        note: how to read it, in Markdown.
        baselines: methods to compare with, see `differences.baseline`.
        left_out: files of finished runs that cannot be used, each with the reason.
        assumptions: values that no public source of the paper gives.
        more: further sections, before the published numbers.
    """
    rows, groups = summary(runs, baselines), grouped(runs)
    columns, marks = header(rows), marks_of(runs, assumptions)
    shared = _shared(groups, columns, marks)
    lines = [
        marks.beside(recipe, columns, cells(row, columns), shared) for recipe, row in zip(groups, rows, strict=True)
    ]
    blocks = [
        f"# {title}",
        CAPTION,
        note,
        _setting(shared, marks),
        _table(columns, lines),
        _labels(groups),
        _assumptions(marks),
        _diverged(groups),
        _left_out(left_out),
        _words(groups, baselines),
        _crossed(groups),
        _flips(groups, baselines) if "flips.png" in pictures else "",
        _ball(groups, baselines) if "ball.png" in pictures else "",
        *more,
        _published(groups),
        *(f"![{what}]({file})" for file, what in pictures.items()),
        "\n".join(provenance(runs)),
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _diverged(groups: Groups) -> str:
    """The paragraph on runs whose loss is not finite."""
    found = [(recipe, run) for recipe, group in groups.items() for run in group if run.diverged is not None]
    if not found:
        return ""
    called, titles = names(groups), places(groups)
    listed = [
        escaped(", ".join(part for part in (called[recipe], titles[place(recipe)], f"seed {run.recipe.seed}") if part))
        + f" (epoch {run.diverged})"
        for recipe, run in found[:_LISTED]
    ]
    more = f"; and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
    return (
        f"Diverged: {len(found)} of {sum(map(len, groups.values()))} runs, with the first epoch whose loss is not "
        f"finite: {'; '.join(listed)}{more}. They are part of all means, as the result of their method with that seed. "
        "Their scores of the last epoch are those of weights that are not finite; their scores of the best validation "
        "epoch are of an epoch before, if there is one."
    )


def _left_out(left_out: Sequence[str]) -> str:
    """The paragraph on finished runs that cannot be read."""
    if not left_out:
        return ""
    more = f"; and {len(left_out) - _LISTED} more" if len(left_out) > _LISTED else ""
    return f"Left out, because they are damaged: {'; '.join(map(escaped, left_out[:_LISTED]))}{more}."


def provenance(runs: Sequence[Finished]) -> list[str]:
    """Provenance of the numbers in Markdown: one line for each environment."""
    keys, dates = RESULT, [run.result["finished"] for run in runs]
    made = sorted({tuple(str(run.result.get(key, "unknown")) for key in keys) for run in runs})
    return [escaped(line(where(dict(zip(keys, values, strict=True)), keys), dates)) for values in made]


def crossed(groups: Groups) -> tuple[list[str], dict[str, list[list[float]]]]:
    """Methods against places: the columns' titles, and for each method its scores in each column, by seed.

    There is one column for each data set, model, label noise and metric, and at the end their average where the noise
    is the same in all: first of a place's metrics, then of the places, for the seeds that are in all of them.
    """
    called, titles = names(groups), places(groups)
    metrics = {at: _metrics(run for r, group in groups.items() if place(r) == at for run in group) for at in titles}
    named = len({name for found in metrics.values() for name in found}) > 1
    columns = [(at, name) for at in titles for name in metrics[at]]
    heads = [f"{titles[at]} {TITLES.get(name, name)}".strip() if named else titles[at] for at, name in columns]
    table: dict[str, list[list[float]]] = {}
    for label in dict.fromkeys(called.values()):
        mine = {place(recipe): group for recipe, group in groups.items() if called[recipe] == label}
        scored = [[_scores(run)[name] for run in mine.get(at, ()) if name in _scores(run)] for at, name in columns]
        table[label] = [*scored, _average([mine.get(at, ()) for at in titles])]
    if len({at.noise for at in titles}) > 1 or len(titles) < 2:
        return heads, {label: scored[:-1] for label, scored in table.items()}
    return [*heads, "average"], table


def _average(groups: Sequence[Sequence[Finished]]) -> list[float]:
    by_seed = [{run.recipe.seed: mean(_scores(run).values()) for run in group} for group in groups]
    common = sorted(set.intersection(*(set(scores) for scores in by_seed)))
    return [mean(scores[seed] for scores in by_seed) for seed in common]


def _crossed(groups: Groups) -> str:
    """A table of methods by places, one for each data set if the models vary too."""
    datasets, models = ({getattr(recipe, name) for recipe in groups} for name in ("dataset", "model"))
    each = [groups]
    if len(datasets) > 1 and len(models) > 1:
        order = dict.fromkeys(recipe.dataset for recipe in groups)
        each = [{recipe: group for recipe, group in groups.items() if recipe.dataset == name} for name in order]
    tables: list[str] = []
    for part in each:
        heads, rows = crossed(part)
        written = [(label, *(_written(scores, 100) for scores in row)) for label, row in rows.items()]
        first = next(iter(part)).dataset if len(each) > 1 else "method"
        tables += [_table((first, *heads), written)] if len(heads) > 1 else []
    said = "## Side by side\n\nTest scores with the weights of the epoch with the best validation score."
    return "\n\n".join([said, *tables]) if tables else ""


def _words(groups: Groups, baselines: Baselines) -> str:
    """The paragraph on the column of differences: how they are computed, and which intervals exclude 0."""
    found = {r: (b, d) for r, (b, d) in differences(groups, baselines).items() if d.pairs > 1}
    if not found:
        return ""
    called, titles = names(groups), places(groups)
    against = sorted({called[other] for other, _ in found.values()})
    each: dict[bool, dict[Place, list[str]]] = {True: defaultdict(list), False: defaultdict(list)}
    for recipe, (_, one) in found.items():
        sign = f" ({_signed(100 * one.mean)})" if one.decided else ""
        each[one.decided][place(recipe)].append(escaped(called[recipe]) + sign)

    def listed(decided: bool) -> str:
        parts = [(escaped(titles[at]), ", ".join(each[decided][at])) for at in titles if at in each[decided]]
        return "; ".join(f"{at}: {which}" if at else which for at, which in parts)

    undecided = sum(not one.decided for _, one in found.values())
    to = escaped(against[0]) if len(against) == 1 else "the baseline"
    inside = f": {listed(False)}" if 0 < undecided <= _LISTED else ""
    outside = f": {listed(True)}" if undecided < len(found) else ""
    return (
        f"Difference: “best val.” minus that of {to}, paired by seed: mean, 95 % Student interval and number of pairs. "
        f"For {undecided or 'none'} of {len(found)} comparisons the interval contains 0 (undecided){inside}. For "
        f"{len(found) - undecided or 'none'} of {len(found)} it does not (decided){outside}. The intervals are not "
        f"corrected for multiple comparisons: of {len(found)} such intervals {0.05 * len(found):.2g} are expected to "
        "miss the true difference."
    )


def _flips(groups: Groups, baselines: Baselines) -> str:
    """The section on samples that the perturbation flips late in training, with differences from the baseline."""
    late = {recipe: [_late(run) for run in group] for recipe, group in groups.items()}
    late = {r: values for r, values in late.items() if not r.is_plain and not any(map(isnan, values))}
    called, titles = names(groups), places(groups)
    rows: list[tuple[str, ...]] = []
    for recipe, values in late.items():
        other = baseline(recipe, late, baselines)
        pairs = paired(groups[recipe], groups[other], lambda a, b: _late(a) - _late(b)) if other else []
        one = student(pairs) if pairs else _NONE
        decided = "–" if one.pairs < 2 else "decided" if one.decided else "not decided"
        sizes = [run.result.get("examples", nan) for run in groups[recipe]]  # 0.1 did not always write it
        share = [value / size for value, size in zip(values, sizes, strict=True)]
        cells = (
            called[recipe],
            _written(values, 1),
            _written(share, 100),
            f"{len(values)}",
            _interval(one, 1),
            decided,
        )
        rows.append((titles[place(recipe)], *cells) if len(titles) > 1 else cells)
    if not rows:
        return ""
    columns = ("method", "flipped", "per cent of the samples", "n", "difference", "verdict")
    return (
        "## Samples flipped by the perturbation, late in training\n\nTraining samples that are classified correctly at "
        "w and incorrectly at w + e, per epoch, averaged over the last fifth of the epochs: mean ± standard deviation "
        "over n seeds; difference from the baseline, paired by seed, with its 95 % Student interval and the number of "
        "pairs.\n\n" + _table(("", *columns) if len(titles) > 1 else columns, rows)
    )


def _ball(groups: Groups, baselines: Baselines) -> str:
    """The section on the largest error in a ball after the last epoch, with differences from the baseline."""
    found = {recipe: group for recipe, group in groups.items() if recipe.measured_epochs}
    called, titles = names(groups), places(groups)
    rows: list[tuple[str, ...]] = []
    for recipe, group in found.items():
        other = baseline(recipe, found, baselines)
        pairs = paired(group, groups[other], lambda a, b: _last(a, _WORST) - _last(b, _WORST)) if other else []
        one = student(pairs) if pairs else _NONE
        values = {name: [_last(run, name) for run in group] for name in BALL}
        written = {name: _written(of, 1 if name.startswith("cosine") else 100) for name, of in values.items()}
        cells = called[recipe], written.pop("ball_error"), written.pop(_WORST), f"{len(group)}", _interval(one, 100)
        cells = *cells, *written.values()
        rows.append((titles[place(recipe)], *cells) if len(titles) > 1 else cells)
    if not rows:
        return ""
    columns = ("method", "error at w", "largest error", "n", "difference")
    columns += tuple(name.replace("_", ": ", 1).replace("_", "-") for name in BALL if not name.startswith("ball"))
    said = (
        f"Equation 5 of the paper: the largest 0-1 loss in the L2 ball of radius {RADIUS:g} around the weights w, the "
        f"same for all methods. It is measured on at least {EXAMPLES:,} training examples in whole batches (or on all, "
        "if they are fewer), without augmentation, in eval mode, as the largest error on the ways of three adversaries "
        f"of {STEPS} steps each, and so it is a lower bound. Flips: examples that are correct at w and wrong after one "
        "step of an adversary to that radius, on the same weights and batches for all adversaries. Cosine: of the "
        "displacement of an adversary with that of SAM, which climbs the training loss. Errors and flips are in per "
        "cent of the examples: mean ± standard deviation over n seeds; the difference is that of the largest error "
        "from the baseline, paired by seed, with its 95 % Student interval and the number of pairs."
    )
    table = _table(("", *columns) if len(titles) > 1 else columns, rows)
    return f"## The largest error in the ball, after the last epoch\n\n{said}\n\n{table}"


def _last(run: Finished, name: str) -> float:
    """A metric of the last epoch."""
    return run.metrics[-1].get(name, nan)


def _late(run: Finished) -> float:
    """Flipped samples per epoch, averaged over the last fifth of the epochs."""
    rows = run.metrics[-max(1, len(run.metrics) // 5) :]
    return mean(row["flipped"] for row in rows)


def _published(groups: Groups) -> str:
    found = beside(groups)
    if not found:
        return "Published: no number for these settings was found in a public source."
    called, titles = names(groups), places(groups)
    sources = list(dict.fromkeys(one.published.source for one in found))
    rows = [
        (
            ", ".join(part for part in (called[one.recipe], titles[place(one.recipe)]) if part),
            one.title,
            one.text,
            one.published.text,
            one.published.setting,
            f"{sources.index(one.published.source) + 1}",
        )
        for one in found
    ]
    listed = "\n".join(f"{i}. {escaped(source)}" for i, source in enumerate(sources, 1))
    return (
        "## Published\n\nOur numbers are mean ± standard deviation (n). No other published numbers were found.\n\n"
        + _table(("method", "quantity", "ours", "published", "their setting", "source"), rows)
        + f"\n\n{listed}"
    )


def _shared(groups: Groups, columns: Collection[str], marks: Marks) -> dict[str, Any]:
    """The settings that all recipes share: data, model, those that differ from their defaults, and assumed ones."""
    common = {name: values.pop() for name in _FIELDS if len(values := {getattr(r, name) for r in groups}) == 1}
    told = {"dataset", "model", "batch_size", "learning_rate", *(marks.subjects - {*columns})}
    told |= {
        name for name, value in common.items() if value != _FIELDS[name] and name not in ("rho", "version", *_LENGTH)
    }
    return {name: value for name, value in common.items() if name in told}


def _setting(shared: Mapping[str, Any], marks: Marks) -> str:
    said = {name: escaped(f"{name.replace('_', ' ')} {value}") for name, value in shared.items()}
    words = [f"{text} {marks.shared(name)}".rstrip() for name, text in said.items()]
    return f"All runs: {', '.join(words)}." if words else ""


def marks_of(runs: Iterable[Finished], assumptions: Iterable[Assumption]) -> Marks:
    """The marks of a report: those of the assumptions that concern its runs."""
    return Marks(assumptions, {recipe: len(group) for recipe, group in grouped(runs).items()})


def _labels(groups: Groups) -> str:
    """The paragraph on the expressions behind the labels of a study."""
    found = dict.fromkeys((title(r), r.method) for r in groups if r.method in LABELS and title(r) != r.method)
    return f"{'; '.join(f'{escaped(name)}: `{method}`' for name, method in found)}." if found else ""


def _assumptions(marks: Marks) -> str:
    """The section on the values that no public source gives."""
    if not (rows := marks.rows()):
        return ""
    return f"## Assumed values\n\n{marks.words}\n\n" + _table(("mark", "value", "kind", "what is known"), rows)


def _scores(run: Finished) -> Mapping[str, float]:
    """All test scores with the weights of the best validation epoch, by metric."""
    return run.result.get("scores", {}).get("best") or {metric(run): run.result["test_best"]}


def _metrics(runs: Iterable[Finished]) -> list[str]:
    return list(dict.fromkeys(name for run in runs for name in _scores(run)))


def _moments(key: str, values: Sequence[float]) -> Row:
    spread = stdev(values) if len(values) > 1 and not any(map(isnan, values)) else nan
    return {f"{key}_mean": mean(values) if values else nan, f"{key}_std": spread}


def _spread(row: Row, key: str, unit: float) -> str:
    centre, spread = unit * row[f"{key}_mean"], unit * row[f"{key}_std"]
    return "–" if isnan(centre) else f"{centre:.2f}" if isnan(spread) else f"{centre:.2f} ± {spread:.2f}"


def _interval(one: Difference, unit: float) -> str:
    if one.pairs < 2:
        return "–"
    centre, low, high = (_signed(unit * value) for value in (one.mean, one.low, one.high))
    return f"{centre} [{low}, {high}] ({one.pairs})"


def _written(values: Sequence[float], unit: float) -> str:
    return _spread(_moments("", values), "", unit)


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")
