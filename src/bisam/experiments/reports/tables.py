"""Tables of results, computed from run folders only. Each number is a mean ± standard deviation over n seeds."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import fields
from functools import partial
from math import isnan, nan
from statistics import mean, median, stdev
from typing import Any

from bisam.experiments.markdown import escaped as escaped, table as _table
from bisam.experiments.recipes.assumptions import Assumption
from bisam.experiments.recipes.catalogue import BASELINE
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.reports import legends
from bisam.experiments.reports.answer import Wanted, answer as answer_of
from bisam.experiments.reports.cells import NOTHING, cells_of, detectable, interval, probability, spread
from bisam.experiments.reports.comparison import beside
from bisam.experiments.reports.differences import (
    Baselines,
    Difference,
    columns,
    compare,
    differences,
    primary_comparisons,
    score,
)
from bisam.experiments.reports.flips import flips, section as flips_section
from bisam.experiments.reports.groups import (
    Groups,
    grouped,
    metric,
    names,
    place,
    places,
    title,
    varying,
)
from bisam.experiments.reports.marks import Marks
from bisam.experiments.reports.significance import adjusted
from bisam.experiments.runs.folder import Finished
from bisam.experiments.runs.provenance import RESULT, line, where
from bisam.experiments.runs.results import BALL, TITLES, headline
from bisam.experiments.studies import LABELS
from bisam.experiments.studies.study import Primary
from bisam.experiments.training.ball import EXAMPLES, RADIUS, STEPS

Row = dict[str, Any]

_FIELDS = {field.name: field.default for field in fields(Recipe) if field.name not in ("method", "seed")}
_PLACE = ("dataset", "model", "noise")
_LENGTH = ("epochs", "steps")
_TESTED = {"test_best": "best val.", "test_last": "last", "test_ema": "average"}
_LISTED = 12  # longer lists are given as counts only
_WORST = "ball_worst"


def summary(runs: Iterable[Finished], baselines: Baselines = (BASELINE,), primary: Primary | None = None) -> list[Row]:
    """One row for each recipe, scores as shares of 1; nan where there is no number.

    Args:
        runs: finished runs.
        baselines: methods to compare with, see `differences.baseline`.
        primary: the registered comparison of the study.
    """
    groups = grouped(runs)
    called, against = names(groups), differences(groups, baselines, primary)
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
        row["headline"] = headline(group[0].result)
        row |= _moments("headline", [score(run) for run in group])
        for name in metrics if len(metrics) > 1 else ():
            for key, scores in (("test_best", partial(_scores, when="best")), ("headline", _scores)):
                row |= _moments(f"{key}_{name}", [scores(run)[name] for run in group if name in scores(run)])
        for key in ("validation_ties", "validation_examples"):
            known = [value for run in group if (value := run.result.get(key)) is not None]
            row[key] = mean(known) if known else nan
        row |= _moments("flipped_late", [_late(run) for run in group])
        row["n"] = len(group)
        row["diverged"] = sum(run.diverged is not None for run in group)
        row["gradients_per_step"] = mean(run.result["gradients_per_step"] for run in group)
        row["forwards_per_step"] = mean(run.result["forwards_per_step"] for run in group)
        row["seconds_per_epoch"] = median(run.result["seconds_per_epoch"] for run in group)
        one = against.get(recipe)
        row["baseline"] = "" if one is None else called[one.baseline]
        row |= columns(one) | {"interim": one is not None and one.interim, "recipe": recipe.slug}
        rows.append(row)
    return rows


_CELLS: dict[str, Callable[[Row], str]] = {
    "method": lambda row: f"{row['method']}",
    "noise": lambda row: f"{100 * row['noise']:g} %",
    "rho": lambda row: f"{row['rho']}" or "–",
    "metric": lambda row: TITLES.get(row["metric"]) or f"{row['metric']}",
    **{words: lambda row, key=key: _spread(row, key, 100) for key, words in _TESTED.items()},
    "test": lambda row: _spread(row, "headline", 100),
    "weights": lambda row: legends.WEIGHTS[row["headline"]],
    "n": lambda row: f"{row['n']}",
    "difference": lambda row: difference(row),
    "p (Holm)": lambda row: probability(row["p_holm"]) + " (primary)" * row["primary"] + " (interim)" * row["interim"],
    "detectable": lambda row: detectable((row["detectable"], row["detectable_holm"]), 100),
    "gradients": lambda row: (
        f"{row['gradients_per_step']:.3g}"
        + (f" + {row['forwards_per_step']:.2g} f" if row["forwards_per_step"] else "")
    ),
    "time": lambda row: _spread(row, "relative_time", 1),
}


def header(rows: Sequence[Row], brief: bool = False) -> tuple[str, ...]:
    """The columns for these rows of `summary`: data set, model, noise and metric where they vary; the headline score.

    The headline has the name of its weights. If rows differ in it, a column beside the score says which it is.

    Args:
        rows: of one report.
        brief: for a terminal: without the columns that the names already tell, and without wide ones.
    """
    several = [name for name in (*_PLACE, "metric") if len({row[name] for row in rows}) > 1]
    settings = [name for name in rows[0] if name in _FIELDS and name not in _PLACE]
    which = list(dict.fromkeys(row["headline"] for row in rows))
    tested = [legends.WEIGHTS[which[0]]] if len(which) == 1 else ["test", "weights"]
    tested += ["average"] * ("test_ema_mean" in rows[0])
    against = {row["baseline"] for row in rows} - {""}
    found = [*(name for name in several if name != "metric"), "name" if brief else "method"]
    found += ["rho"] if brief and any(row["rho"] != "" for row in rows) else []
    found += [*settings, *(name for name in several if name == "metric"), *tested, "n"] if not brief else tested[:1]
    found += ["diverged"] * any(row["diverged"] for row in rows)
    found += ["baseline"] * (len(against) > 1 and not brief)
    found += ["difference", "p (Holm)"] * bool(against) + ["detectable"] * (bool(against) and not brief)
    return (*found, *([] if brief else ["gradients"]), "time")


def cells(row: Row, header: Sequence[str]) -> tuple[str, ...]:
    """The cells of a row of `summary` as text, scores times 100."""
    plain = {name: "–" if row.get(name, "") == "" else f"{row[name]}" for name in header}
    return tuple(_CELLS[name](row) if name in _CELLS else plain[name] for name in header)


def difference(row: Row) -> str:
    """The difference of a row with its interval and number of pairs; a dash if there are fewer than two pairs."""
    return interval(
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
    primary: Primary | None = None,
    files: str = "",
    answer: str = "",
) -> str:
    """The whole report as Markdown: its answer, the first figure, the table, and then what explains them.

    Args:
        title: of the study.
        runs: finished runs, in the order of the table.
        pictures: files beside the report, with their captions; the first is shown above the table.
        note: how to read it, in Markdown.
        baselines: methods to compare with, see `differences.baseline`.
        left_out: files of finished runs that cannot be used, each with the reason.
        assumptions: values that no public source of the paper gives.
        more: further sections, before the published numbers.
        primary: the registered comparison of the study.
        files: the section on the files of the report and the runs.
        answer: the first paragraph; by default `opening` of these runs.
    """
    rows, groups = summary(runs, baselines, primary), grouped(runs)
    heads, marks = header(rows), marks_of(runs, assumptions)
    shared = _shared(groups, heads, marks)
    lines = [marks.beside(recipe, heads, cells(row, heads), shared) for recipe, row in zip(groups, rows, strict=True)]
    compared, registered = differences(groups, baselines, primary), primary_comparisons(groups, primary)
    called, titles = names(groups), places(groups)
    shown = [f"![{what}]({file})" for file, what in pictures.items()]
    blocks = [
        f"# {title}",
        answer or opening(runs, baselines, primary),
        legends.older(groups),
        *shown[:1],
        _table(heads, lines),
        _setting(shared, marks),
        _diverged(groups),
        _early(groups),
        _left_out(left_out),
        _labels(groups),
        legends.primary(primary, registered, called, titles),
        legends.words(compared, called, titles),
        f"## What was compared\n\n{note}" if note else "",
        "## How to read this page",
        legends.caption(runs),
        legends.reading(runs, compared.values()),
        _assumptions(marks),
        _crossed(groups),
        flips_section(flips(groups, baselines)),
        _ball(groups, baselines) if "ball.png" in pictures else "",
        *more,
        _published(groups),
        "\n\n".join(["## More figures", *shown[1:]]) if shown[1:] else "",
        files,
        "\n".join(provenance(runs)),
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def opening(
    runs: Sequence[Finished],
    baselines: Baselines = (BASELINE,),
    primary: Primary | None = None,
    answers: Sequence[str] = (),
    wanted: Wanted | None = None,
    *,
    tunes: bool = False,
) -> str:
    """The first paragraph of a report, in Markdown: which differences are decided; see `answer`.

    Args:
        runs: finished runs.
        baselines: methods to compare with, see `differences.baseline`.
        primary: the registered comparison of the study.
        answers: sentences of the other sections on what they have found.
        wanted: the runs of the finished study.
        tunes: whether the study chooses settings, so that its answer is the choice and not the differences.
    """
    groups = grouped(runs)
    compared = {} if tunes and answers else differences(groups, baselines, primary)
    found = primary_comparisons(groups, primary)
    return answer_of(groups, names(groups), places(groups), primary, found, compared, answers, wanted)


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
    ended = sum(run.result.get("stopped") == "diverged" for _, run in found)
    last = f" {'All' if ended == len(found) else ended} of them ended there." if ended else ""
    return (
        f"Diverged: {len(found)} of {sum(map(len, groups.values()))} runs, with the first epoch whose loss is not "
        f"finite: {'; '.join(listed)}{more}. They are part of all means, as the result of their method with that seed. "
        "Their scores of the last epoch are those of weights that are not finite; their scores of the best validation "
        f"epoch are of an epoch before, if there is one.{last}"
    )


def brief_of_diverged(runs: Iterable[Finished]) -> str:
    """One line on the runs that diverged, by the rows that they are in; empty if none did."""
    groups = grouped(runs)
    counts = {recipe: sum(run.diverged is not None for run in group) for recipe, group in groups.items()}
    if not any(counts.values()):
        return ""
    called, titles = names(groups), places(groups)
    cells = [
        f"{', '.join(part for part in (called[recipe], titles[place(recipe)]) if part)} ({count} of {len(group)})"
        for (recipe, group), count in zip(groups.items(), counts.values(), strict=True)
        if count
    ]
    more = f" and {len(cells) - _LISTED} more" if len(cells) > _LISTED else ""
    first = next(run for group in groups.values() for run in group if run.diverged is not None)
    message = first.result.get("message", f"the loss is not finite since epoch {first.diverged}")
    count = f"{sum(counts.values())} of {sum(map(len, groups.values()))} runs diverged"
    return f"{count}, and are part of the means: {'; '.join(cells[:_LISTED])}{more}. The first one: {message}"


def _early(groups: Groups) -> str:
    """The paragraph on runs that ended because validation did not improve."""
    found = [run for group in groups.values() for run in group if run.result.get("stopped") == "patience"]
    if not found:
        return ""
    epochs = sorted(len(run.metrics) for run in found)
    span = f"{epochs[0]}" if epochs[0] == epochs[-1] else f"{epochs[0]} to {epochs[-1]}"
    return (
        f"Early stopping: {len(found)} of {sum(map(len, groups.values()))} runs ended after {span} epochs, because "
        "validation had not improved for as many epochs as their patience. Scores of the last epoch are of that epoch."
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

    There is one column for each data set, model, label noise, imbalance and metric, and at the end their average where
    noise and imbalance are the same in all: first of a place's metrics, then of the places, for the seeds that are in
    all of them. Of a long tail it is the balanced accuracy alone that is averaged, of which the others are parts. A
    likelihood has no average with other scores.
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
    likely = any("likelihood" in found for found in metrics.values())
    if likely or len({(at.noise, at.imbalance) for at in titles}) > 1 or len(titles) < 2:
        return heads, {label: scored[:-1] for label, scored in table.items()}
    return [*heads, "average"], table


def _average(groups: Sequence[Sequence[Finished]]) -> list[float]:
    by_seed = [{run.recipe.seed: _mean(_scores(run)) for run in group} for group in groups]
    common = sorted(set.intersection(*(set(scores) for scores in by_seed)))
    return [mean(scores[seed] for scores in by_seed) for seed in common]


def _mean(scores: Mapping[str, float]) -> float:
    return scores["balanced"] if "balanced" in scores else mean(scores.values())


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
        written = [(label, *(spread(scores, 100) for scores in row)) for label, row in rows.items()]
        first = next(iter(part)).dataset if len(each) > 1 else "method"
        tables += [_table((first, *heads), written)] if len(heads) > 1 else []
    weights = legends.of_weights([run for group in groups.values() for run in group])
    said = f"## Side by side\n\nTest scores with the weights of {weights}."
    return "\n\n".join([said, *tables]) if tables else ""


def _ball(groups: Groups, baselines: Baselines) -> str:
    """The section on the largest error in a ball after the last epoch, with differences from the baseline."""
    found = {recipe: group for recipe, group in groups.items() if recipe.measured_epochs}
    called, titles = names(groups), places(groups)
    rows: list[tuple[str, ...]] = []
    compared = {one.recipe: one for one in adjusted([*compare(found, baselines, partial(_last, name=_WORST)).values()])}
    for recipe, group in found.items():
        values = {name: [_last(run, name) for run in group] for name in BALL}
        written = {name: spread(of, 1 if name.startswith("cosine") else 100) for name, of in values.items()}
        cells = called[recipe], written.pop("ball_error"), written.pop(_WORST), f"{len(group)}"
        cells = *cells, *cells_of(compared.get(recipe), 100), *written.values()
        rows.append((titles[place(recipe)], *cells) if len(titles) > 1 else cells)
    if not rows:
        return ""
    heads = ("method", "error at w", "largest error", "n", "difference", "p (Holm)", "detectable")
    heads += tuple(name.replace("_", ": ", 1).replace("_", "-") for name in BALL if not name.startswith("ball"))
    said = (
        f"Equation 5 of the paper: the largest 0-1 loss in the L2 ball of radius {RADIUS:g} around the weights w, the "
        f"same for all methods. It is measured on at least {EXAMPLES:,} training examples in whole batches (or on all, "
        "if they are fewer), without augmentation, in eval mode, as the largest error on the ways of three adversaries "
        f"of {STEPS} steps each, and so it is a lower bound. Flips: examples that are correct at w and wrong after one "
        "step of an adversary to that radius, on the same weights and batches for all adversaries. Cosine: of the "
        "displacement of an adversary with that of SAM, which climbs the training loss. Errors and flips are in per "
        "cent of the examples: mean ± standard deviation over n seeds; the difference is that of the largest error "
        "from the baseline, paired by seed, and its p is adjusted over the comparisons of this table."
    )
    table = _table(("", *heads) if len(titles) > 1 else heads, rows)
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


def _scores(run: Finished, when: str = "") -> Mapping[str, float]:
    """All test scores of the headline, or of other weights, by metric."""
    when = when or headline(run.result)
    return run.result.get("scores", {}).get(when) or {metric(run): run.result[f"test_{when}"]}


def _metrics(runs: Iterable[Finished]) -> list[str]:
    return list(dict.fromkeys(name for run in runs for name in _scores(run)))


def _moments(key: str, values: Sequence[float]) -> Row:
    spread = stdev(values) if len(values) > 1 and not any(map(isnan, values)) else nan
    return {f"{key}_mean": mean(values) if values else nan, f"{key}_std": spread}


def _spread(row: Row, key: str, unit: float) -> str:
    centre, width = unit * row[f"{key}_mean"], unit * row[f"{key}_std"]
    return NOTHING if isnan(centre) else f"{centre:.2f}" if isnan(width) else f"{centre:.2f} ± {width:.2f}"
