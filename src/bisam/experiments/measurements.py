"""Measurements: what the paper reports without a training: the time of an epoch and of a loss, and an example.

    folder = run(MEASUREMENTS["table12"], {"rounds": "51"}, Path("runs"))
    print(report(MEASUREMENTS["table12"], folder).markdown)

runs/table12-cpu-1f0c22e9/
    measurement.json  what is measured; the fingerprint of the settings that were changed is in the folder's name
    100-eager.json    the rows of one part, written once it is measured: what was interrupted goes on with the next
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from filelock import FileLock, Timeout
from torch import Tensor, nn

from bisam import NegLog, SharpnessAware, Tanh
from bisam.experiments import models
from bisam.experiments.machine import Machine
from bisam.experiments.names import unknown
from bisam.experiments.recipes import Recipe
from bisam.experiments.runs import RunError, environment, read_json, write
from bisam.experiments.timing import Ratio, conditions, interleaved, ratio, threads
from bisam.objectives import LowerBound

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Settings = Mapping[str, Any]
Row = Mapping[str, Any]
Progress = Callable[[str, int, int], None]
"""`(part, done, total)`: a part is begun, when so many of all are done; at the end once more, with "" for the part."""


@dataclass(frozen=True)
class Measurement:
    """Something to be measured in parts that do not need each other."""

    name: str
    title: str
    note: str
    """How to read the table: Markdown."""
    settings: Settings
    """What may be changed, and the defaults: numbers, whole numbers from 1, or several of them or of words."""
    parts: Callable[[Settings], list[str]]
    """Of settings; ValueError where one is out of its range."""
    measure: Callable[[str, Settings, torch.device], list[dict[str, Any]]]
    """Rows of a part: equal keys, values that JSON has."""
    columns: Mapping[str, Callable[[Row], str]]
    """Of the table: heading, and from a row to the cell."""
    figures: Mapping[str, tuple[str, Callable[[list[Row]], Figure]]] = field(default_factory=dict)
    """By the name of the file, what it shows and how it is drawn."""

    def changed(self, texts: Mapping[str, str]) -> dict[str, Any]:
        """The settings that `texts` change, as values.

        Raises:
            ValueError: a name is unknown, or a value is of the wrong kind or out of its range.
        """
        for name in texts:
            if name not in self.settings:
                raise unknown(f"setting of {self.name}", name, self.settings)
        values = {name: _parsed(name, text, self.settings[name]) for name, text in texts.items()}
        values = {name: value for name, value in values.items() if value != self.settings[name]}
        self.parts({**self.settings, **values})
        return values


@dataclass(frozen=True)
class Report:
    """What a folder holds, to be shown: the table as text and as numbers, and figures by the name of their file."""

    title: str
    header: tuple[str, ...]
    cells: list[tuple[str, ...]]
    rows: list[Row]
    markdown: str
    figures: dict[str, Figure]


def run(
    measurement: Measurement,
    changed: Mapping[str, str],
    root: Path,
    machine: Machine = Machine(),  # noqa: B008
    progress: Progress | None = None,
) -> Path:
    """Measure the parts that are not there yet, and return the folder.

    Args:
        measurement: one of `MEASUREMENTS`.
        changed: settings other than the defaults, as text.
        root: where the folder is or will be.
        machine: its device, of which there can be one.
        progress: told about each part.

    Raises:
        ValueError: a setting or the device is wrong.
        RunError: the folder is in use, damaged, or another measurement's.
        OSError: the disk is full or read-only.
    """
    values = measurement.changed(changed)
    if machine.parallel:
        raise ValueError(f"{measurement.name} is measured on one device: leave --devices and --nodes at 1")
    device = machine.fabric().device
    settings = {**measurement.settings, **values}
    parts = measurement.parts(settings)
    folder = root / _slug(measurement, values, device)
    with _held(folder):
        _claim(folder, measurement, settings, device)
        left = [part for part in parts if _read(folder, part) is None]
        for i, part in enumerate(left, len(parts) - len(left)):
            if progress is not None:
                progress(part, i, len(parts))
            rows = measurement.measure(part, settings, device)
            content = {"part": part, "environment": _environment(device, settings), "rows": rows}
            write(folder / _file(part), json.dumps(content, indent=2, allow_nan=False) + "\n")
    if progress is not None:
        progress("", len(parts), len(parts))
    return folder


def report(measurement: Measurement, place: Path, changed: Mapping[str, str] | None = None) -> Report:
    """What was measured, from files alone.

    Args:
        measurement: one of `MEASUREMENTS`.
        place: a folder that `run` returned; or its root, for the latest one with the default settings, or else the
            latest one.
        changed: of a root, the settings that the one to report was given.

    Raises:
        ValueError: nothing of this measurement is there.
        RunError: a file is damaged.
    """
    folder, settings = _found(measurement, place, changed)
    names = measurement.parts(settings)
    parts = [content for part in names if (content := _read(folder, part)) is not None]
    if not parts:
        raise ValueError(f"no part of {measurement.name} is measured in {folder}: run `bisam run {measurement.name}`")
    rows: list[Row] = [row for content in parts for row in content["rows"]]
    header = tuple(measurement.columns)
    try:
        cells = [tuple(cell(row) for cell in measurement.columns.values()) for row in rows]
        figures = {file: draw(rows) for file, (_, draw) in measurement.figures.items()}
    except (LookupError, TypeError, ValueError) as error:
        raise RunError(
            f"{folder} holds rows that this version cannot read ({error!r}): delete it to measure again"
        ) from error
    missing = len(names) - len(parts)
    lines = [
        f"# {measurement.title}",
        "",
        measurement.note,
        "",
        *(f"| {' | '.join(line)} |" for line in (header, ("---",) * len(header), *cells)),
        "",
        *([f"Not measured yet: {missing} of {len(names)} parts.", ""] if missing else []),
        *(line for file, (what, _) in measurement.figures.items() for line in (f"![{what}]({file})", "")),
        f"Settings: {', '.join(f'{name} {_shown(value)}' for name, value in settings.items())}.",
        "",
        *_provenance(content["environment"] for content in parts),
    ]
    return Report(measurement.title, header, cells, rows, "\n".join(lines) + "\n", figures)


def _parsed(name: str, text: str, default: Any) -> Any:
    """A setting's value, of the kind of its default."""
    if isinstance(default, tuple):
        items = [item.strip() for item in text.split(",")]
        if not all(items):
            raise ValueError(f"setting {name} is empty, or has an empty item: {text!r}")
        return tuple(dict.fromkeys(_parsed(name, item, default[0]) for item in items))
    kind: type = type(default)
    try:
        value = kind(text)
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise ValueError(f"setting {name} must be {what}, got {text!r}") from None
    if kind is int and value < 1:
        raise ValueError(f"setting {name} must be at least 1, got {value}")
    return value


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _slug(measurement: Measurement, changed: Settings, device: torch.device) -> str:
    # Of what differs from the defaults, so that a setting that is added later changes no name.
    text = json.dumps(dict(changed), sort_keys=True)
    return f"{measurement.name}-{device.type}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _file(part: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.]+", "-", part).strip("-.") + ".json"


@contextmanager
def _held(folder: Path) -> Generator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):  # the system drops it when a process is killed
            for leftover in folder.glob(".*.tmp"):
                leftover.unlink(missing_ok=True)
            yield
    except Timeout:
        raise RunError(f"{folder} is in use by another process: let it finish, or give another --out") from None


def _claim(folder: Path, measurement: Measurement, settings: Settings, device: torch.device) -> None:
    path = folder / "measurement.json"
    if (found := read_json(path)) is None:
        identity = {"measurement": measurement.name, "device": device.type, "settings": settings}
        write(path, json.dumps(identity, indent=2) + "\n")
    elif found.get("measurement") != measurement.name or _settings(measurement, path, found) != settings:
        raise RunError(f"{folder} belongs to another measurement: move it away, or give another --out")


def _settings(measurement: Measurement, path: Path, identity: Mapping[str, Any]) -> dict[str, Any]:
    """What `_claim` wrote at `path`; settings that a later version added have their defaults."""
    given = identity.get("settings")
    if not isinstance(given, dict) or set(given) - set(measurement.settings):
        raise RunError(f"{path} is damaged, or of a later version: delete {path.parent} to measure again")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    return {**measurement.settings, **values}


def _read(folder: Path, part: str) -> dict[str, Any] | None:
    """What was written of a part, or None."""
    path = folder / _file(part)
    try:
        content = read_json(path)
        if content is None:
            return None
        if content.get("part") != part:
            raise ValueError(f"it is not of {part}")
        rows, made = content.get("rows"), content.get("environment")
        if not isinstance(made, dict) or not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError("it has no rows, or not where they were made")
    except (ValueError, RunError) as error:
        reason = error.__cause__ or error
        raise RunError(f"{path} is damaged ({reason}): delete it to measure it again; other parts are kept") from error
    return content


def _found(measurement: Measurement, place: Path, changed: Mapping[str, str] | None) -> tuple[Path, dict[str, Any]]:
    """The folder to report from, and its settings."""
    wanted = {**measurement.settings, **measurement.changed(changed or {})}
    files = [place / "measurement.json", *sorted(place.glob(f"{measurement.name}-*/measurement.json"))]
    found: list[tuple[bool, float, Path, dict[str, Any]]] = []
    for path in files:
        identity = read_json(path)
        if identity is None or identity.get("measurement") != measurement.name:
            continue
        settings = _settings(measurement, path, identity)
        if changed and settings != wanted:
            continue
        latest = max(file.stat().st_mtime for file in path.parent.glob("*.json"))
        found.append((settings == measurement.settings, latest, path.parent, settings))
    if not found:
        raise ValueError(
            f"no {measurement.name} is measured in {place}: run `bisam run {measurement.name}` first, or give its --out"
        )
    *_, folder, settings = max(found, key=lambda entry: entry[:2])
    return folder, settings


def _environment(device: torch.device, settings: Settings) -> dict[str, Any]:
    name = f"{device}, {torch.cuda.get_device_name(device)}" if device.type == "cuda" else str(device)
    made = {**environment(), "device": name, **conditions()}
    return made | {"threads": settings.get("threads", made["threads"])}


def _provenance(made: Iterable[Mapping[str, Any]]) -> list[str]:
    """Where the numbers come from, a line for each place."""
    keys = ("hardware", "device", "threads", "torch", "python", "bisam", "commit")
    places: dict[str, list[Mapping[str, Any]]] = {}
    for one in made:
        places.setdefault(", ".join(f"{key} {one.get(key, 'unknown')}" for key in keys), []).append(one)
    lines: list[str] = []
    for where, group in places.items():
        dates = sorted({str(one.get("date", "unknown"))[:10] for one in group})
        loads = sorted(float(one["load"]) for one in group if one.get("load") is not None)
        load = f", load {loads[0]:.1f} to {loads[-1]:.1f}" if loads else ""
        lines.append(f"Made {' to '.join(dict.fromkeys((dates[0], dates[-1])))} on {where}{load}.")
    return lines


# Table 11: the time of an epoch.

EPOCH = 352
"""Steps of an epoch on the 45,000 training images of CIFAR, in batches of 128."""

PUBLISHED = {
    "densenet121": (58, 64),
    "resnet56": (23, 30),
    "vgg19_bn": (10, 16),
    "wrn28_2": (19, 21),
    "wrn28_10": (65, 71),
}
"""Seconds per epoch on CIFAR-10, of SAM and of BiSAM (Xie et al., 2024, Appendix B)."""

_EPOCH_BAR = 1.01
_TRAINED = {"sgd": "SGD", "sam": "SAM", "bisam_log": "BiSAM (-log)", "bisam_tanh": "BiSAM (tanh)"}


def _epoch_parts(settings: Settings) -> list[str]:
    if settings["classes"] < 2:
        raise ValueError(f"setting classes must be at least 2, got {settings['classes']}")
    for model in settings["models"]:
        source, colon, _ = model.partition(":")
        known = [name for name in models.NAMES if not name.startswith("hf:")]  # they read text
        if (f"{source}:NAME" if colon else model) not in known:
            raise unknown("model of images", model, known)
        _batch_size(settings["batch_size"], model)
    return list(settings["models"])


def _batch_size(entries: tuple[str, ...], model: str) -> int:
    """Of `model`: "128" is for all, "wrn28_10=8" for one."""
    sizes: dict[str, int] = {}
    for entry in entries:
        name, _, text = entry.rpartition("=")
        sizes[name] = _parsed("batch_size", text, 128)
    return sizes.get(model, sizes.get("", 128))


def _measure_epoch(part: str, settings: Settings, device: torch.device) -> list[dict[str, Any]]:
    """All methods train one model in turn, so that they meet the same weights, at the same place in memory."""
    n, classes = _batch_size(settings["batch_size"], part), settings["classes"]
    with threads(settings["threads"]), torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        model = models.build(part, classes).to(device)
        x = torch.randn(n, 3, 32, 32).to(device)
        y = torch.randint(classes, (n,)).to(device)
        # So slow that nothing diverges on labels without a pattern; a step takes as long as with any other rate.
        optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9, weight_decay=5e-4)

        def step(sharp: SharpnessAware) -> None:
            sharp(x, y).backward()
            optimizer.step()
            optimizer.zero_grad()

        steps: dict[str, Callable[[], None]] = {}
        for name in _TRAINED:
            method = Recipe(method=name, rho=None if name == "sgd" else 0.05).build_method()
            loss = nn.CrossEntropyLoss(label_smoothing=0.1, reduction="none")
            steps[name] = partial(step, SharpnessAware(model, method, loss=loss))
        times = interleaved(steps, settings["iterations"], device)
    row: dict[str, Any] = {"model": part, "batch_size": n, "classes": classes, "iterations": settings["iterations"]}
    row |= {f"{name}_seconds": EPOCH * ratio(times, name, "sam").seconds for name in _TRAINED}
    for name, reference in (("sam", "sgd"), ("bisam_log", "sam"), ("bisam_tanh", "sam")):
        row |= _flat(f"{name}_to_{reference}", ratio(times, name, reference))
    sam, bisam = PUBLISHED.get(part, (None, None))
    return [{**row, "published_sam_seconds": sam, "published_bisam_seconds": bisam}]


def _flat(key: str, r: Ratio) -> dict[str, float]:
    return {key: r.median, f"{key}_low": r.low, f"{key}_high": r.high}


def _with_quartiles(row: Row, key: str, digits: int = 3) -> str:
    return f"{row[key]:.{digits}f} ({row[f'{key}_low']:.{digits}f} to {row[f'{key}_high']:.{digits}f})"


def _published(row: Row) -> str:
    sam, bisam = row["published_sam_seconds"], row["published_bisam_seconds"]
    return "–" if sam is None else f"{sam} → {bisam} s ({bisam / sam:.2f})"


def _met(value: float, bar: float) -> str:
    return "met" if value <= bar else "missed"


TABLE_11 = Measurement(
    name="table11",
    title="The time of an epoch",
    note=(
        f"Seconds are {EPOCH} times the median step on random images of 32x32 with the batch of the row; with 128 that "
        "is an epoch of CIFAR, without reading data and testing. The ratios are safer: all methods train the same "
        "model in turn, one step each, and a ratio is the median over the iterations, with the quartiles. The bar for "
        f"BiSAM relative to SAM is {_EPOCH_BAR}. Published are the seconds of SAM and of BiSAM and their ratio (Xie et "
        "al., 2024, Appendix B, CIFAR-10, A100). With a smaller batch the loss has a larger share of the step, if "
        "anything."
    ),
    settings={
        "models": tuple(PUBLISHED),
        "iterations": 24,
        # On 128 images a step of SAM takes a core 30 seconds with DenseNet-121, and two minutes with WRN-28-10.
        "batch_size": ("128", "densenet121=32", "wrn28_10=8"),
        "classes": 10,
        "threads": 1,
    },
    parts=_epoch_parts,
    measure=_measure_epoch,
    columns={
        "model": lambda row: row["model"],
        "batch": lambda row: str(row["batch_size"]),
        **{f"{title}, s": lambda row, name=name: f"{row[f'{name}_seconds']:.3g}" for name, title in _TRAINED.items()},
        "SAM / SGD": lambda row: _with_quartiles(row, "sam_to_sgd", 2),
        **{
            f"{_TRAINED[name]} / SAM": lambda row, name=name: _with_quartiles(row, f"{name}_to_sam")
            for name in ("bisam_log", "bisam_tanh")
        },
        f"at most {_EPOCH_BAR}": lambda row: ", ".join(
            _met(row[f"{name}_to_sam"], _EPOCH_BAR) for name in ("bisam_log", "bisam_tanh")
        ),
        "published": _published,
    },
)


# Table 12: the time of an ascent loss.

Loss = Callable[[Tensor, Tensor], Tensor]


def row_by_row(bound: LowerBound, logits: Tensor, labels: Tensor) -> Tensor:
    """What the authors' public code does for a batch: a Python loop that shifts each row by its label's logit."""
    margins = logits.clone()
    for i, label in enumerate(labels.tolist()):
        margins[i].sub_(margins[i, label].clone())
    return torch.logsumexp(bound.mu * bound.phi(margins), 1) / bound.mu


_NEG_LOG, _TANH = NegLog(), Tanh()
_smoothed = partial(F.cross_entropy, label_smoothing=0.1, reduction="none")
_PLAIN, _USED = "cross-entropy", "cross-entropy as SAM climbs it in training"
# Functions with code of their own: the compiler keeps what it has compiled by code, and tries them in their order.
_LOSSES: dict[str, Loss] = {
    _PLAIN: lambda logits, labels: F.cross_entropy(logits, labels),
    _USED: lambda logits, labels: _smoothed(logits, labels).mean(),
    "BiSAM (-log)": lambda logits, labels: _NEG_LOG(logits, labels).mean(),
    "BiSAM (tanh)": lambda logits, labels: _TANH(logits, labels).mean(),
    "BiSAM (-log), row by row": lambda logits, labels: row_by_row(_NEG_LOG, logits, labels).mean(),
    "BiSAM (tanh), row by row": lambda logits, labels: row_by_row(_TANH, logits, labels).mean(),
}
_MODES = ("eager", "compiled")
_LOSS_BAR = 1.0
_BARRED = ("BiSAM (-log)", "BiSAM (tanh)")


def _loss_parts(settings: Settings) -> list[str]:
    for classes in settings["classes"]:
        if classes < 2:
            raise ValueError(f"setting classes must be at least 2, got {classes}")
    for mode in settings["modes"]:
        if mode not in _MODES:
            raise unknown("mode", mode, _MODES)
    return [f"{classes}-{mode}" for classes in settings["classes"] for mode in settings["modes"]]


def _measure_loss(part: str, settings: Settings, device: torch.device) -> list[dict[str, Any]]:
    classes, mode = part.split("-")
    n, compiled = settings["batch_size"], mode == "compiled"
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(n, int(classes), generator=random).to(device).requires_grad_()
    labels = torch.randint(int(classes), (n,), generator=random).to(device)

    def gradient(loss: Loss) -> Tensor:
        return torch.autograd.grad(loss(logits, labels), logits)[0]

    with threads(settings["threads"]):
        losses = _LOSSES
        if compiled:
            torch.compiler.reset()
            # Not the loops, which it would unroll for these labels only.
            losses = {k: torch.compile(loss, dynamic=False) for k, loss in _LOSSES.items() if "row by row" not in k}
        try:
            times = interleaved({k: partial(gradient, loss) for k, loss in losses.items()}, settings["rounds"], device)
        except RuntimeError as error:
            if not compiled:
                raise
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(f"torch.compile does not work here ({reason}): give --set modes=eager") from error
    shared = {"classes": int(classes), "batch_size": n, "mode": mode, "rounds": settings["rounds"]}
    return [
        {
            **shared,
            "loss": name,
            "seconds": ratio(times, name, _PLAIN).seconds,
            **_flat("to_plain", ratio(times, name, _PLAIN)),
            **_flat("to_used", ratio(times, name, _USED)),
        }
        for name in losses
    ]


def _against(row: Row, key: str) -> str:
    verdict = f", {_met(row[key], _LOSS_BAR)}" if row["loss"] in _BARRED else ""
    return _with_quartiles(row, key, 2) + verdict


TABLE_12 = Measurement(
    name="table12",
    title="The time of an ascent loss, relative to cross-entropy",
    note=(
        "Forward and backward pass of the mean loss of a batch of random logits. Losses run in turn within each round; "
        "a ratio is the median over the rounds, with the quartiles: to `F.cross_entropy(logits, labels)`, and to what "
        "the ascent of SAM computes in the training loop, the mean of cross-entropies per example with label smoothing "
        f"0.1, both in the same mode. The bar for BiSAM is {_LOSS_BAR:g}. Row by row is the loop over the batch of the "
        "authors' public code; it is not compiled. Published for 100 classes: 3.96 s to 2.40 s of cross-entropy in "
        "PyTorch (1.65) and 2.34 s to 3.25 s in TensorFlow (0.72), for 10,000 repetitions (Xie et al., 2024, "
        "Appendix B)."
    ),
    settings={"classes": (100, 10), "batch_size": 128, "modes": _MODES, "rounds": 201, "threads": 1},
    parts=_loss_parts,
    measure=_measure_loss,
    columns={
        "classes": lambda row: str(row["classes"]),
        "mode": lambda row: row["mode"],
        "loss": lambda row: row["loss"],
        "µs": lambda row: f"{1e6 * row['seconds']:.3g}",
        "to cross-entropy": lambda row: _against(row, "to_plain"),
        "to SAM's ascent loss": lambda row: _against(row, "to_used"),
    },
)


# The example of Section 2.2: an adversary that climbs an upper bound looks for the wrong thing.


def option_a(classes: int, delta: float) -> Tensor:
    """Scores (K,) that are right by a hair: 1/K + delta for the label 0, equal parts of the rest for the others."""
    scores = torch.full((classes,), 1 / classes - delta / (classes - 1), dtype=torch.float64)
    scores[0] = 1 / classes + delta
    return scores


def option_b(classes: int, delta: float) -> Tensor:
    """Scores (K,) that are wrong by a hair: 1/2 - delta for the label 0, and the rest for another class."""
    scores = torch.zeros(classes, dtype=torch.float64)
    scores[0], scores[1] = 0.5 - delta, 0.5 + delta
    return scores


_BOUNDS: dict[str, LowerBound] = {"tanh": _TANH, "log": _NEG_LOG}


def _example_parts(settings: Settings) -> list[str]:
    for classes in settings["classes"]:
        if classes < 2:
            raise ValueError(f"setting classes must be at least 2, got {classes}")
    for delta in settings["deltas"]:
        if not 1e-6 <= delta < 0.5:
            raise ValueError(f"setting deltas must be in [1e-6, 0.5), got {delta}")
    return [str(classes) for classes in settings["classes"]]


def _measure_example(part: str, settings: Settings, device: torch.device) -> list[dict[str, Any]]:
    del device  # numbers, not times
    rows: list[dict[str, Any]] = []
    for delta in settings["deltas"]:
        scores = torch.stack([option(int(part), delta) for option in (option_a, option_b)])
        labels = torch.zeros(2, dtype=torch.int64)
        row: dict[str, Any] = {"classes": int(part), "delta": delta}
        row |= _options("error", (scores.argmax(1) != labels).double())
        row |= _options("cross_entropy", -scores[:, 0].log())
        for name, bound in _BOUNDS.items():
            row |= _options(name, bound.phi(scores - scores[:, :1]).amax(1))
            row |= _options(f"{name}_soft", bound(scores, labels) - math.log(int(part)) / bound.mu)
            row[f"{name}_mu"] = _mu_for_b(bound, scores, labels)
        rows.append(row)
    return rows


def _options(name: str, values: Tensor) -> dict[str, Any]:
    a, b = values.tolist()
    return {f"{name}_a": a, f"{name}_b": b, f"{name}_picks": "A" if a > b else "B"}


def _mu_for_b(bound: LowerBound, scores: Tensor, labels: Tensor) -> float:
    """The least power of ten as mu with which the soft maximum over the classes is larger for B."""
    mu = 1.0
    while (q := LowerBound(bound.phi, mu)(scores, labels))[0] >= q[1]:
        mu *= 10
    return mu


def _example_figure(rows: list[Row]) -> Figure:
    """Both options as each adversary sees them."""
    from matplotlib.figure import Figure

    rows = sorted(rows, key=lambda row: (row["classes"], row["delta"]))
    classes, deltas = (sorted({row[key] for row in rows}) for key in ("classes", "delta"))
    figure = Figure(figsize=(10.4, 4.0), layout="constrained")
    left, right = figure.subplots(1, 2)
    style: dict[str, Any] = {"marker": "o", "markersize": 4}
    for option, colour, name in (("a", "#E69F00", "A, right"), ("b", "#0072B2", "B, wrong")):
        of_classes = [row for row in rows if row["delta"] == deltas[0]]
        of_delta = [row for row in rows if row["classes"] == classes[-1]]
        left.plot(
            [row["classes"] for row in of_classes],
            [row[f"cross_entropy_{option}"] for row in of_classes],
            color=colour,
            label=name,
            **style,
        )
        for bound, line, written in (("log", "-", "-log"), ("tanh", "--", "tanh")):
            right.plot(
                [row["delta"] for row in of_delta],
                [row[f"{bound}_{option}"] for row in of_delta],
                line,
                color=colour,
                label=f"{name} ({written})",
                **style,
            )
    left.set(xscale="log", xlabel="classes K", ylabel="cross-entropy", ylim=(0, None))
    left.set_title(f"An upper bound of the 0-1 loss (δ = {deltas[0]:g})", fontsize=11)
    right.set(xscale="log", xlabel="δ", ylabel="largest φ over the classes")
    right.set_yscale("symlog", linthresh=1e-4)
    right.set_ylim(-3e-5, None)
    right.set_title(f"A lower bound of it (K = {classes[-1]})", fontsize=11)
    for ax in (left, right):
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    return figure


EXAMPLE = Measurement(
    name="example",
    title="What the adversary looks for: the example of Section 2.2",
    note=(
        "The adversary chooses between two vectors of scores (probabilities here) for an example of class 1: "
        "A = (1/K + δ, 1/K - δ/(K-1), ...) is classified right, B = (1/2 - δ, 1/2 + δ, 0, ...) is wrong. It should "
        "find the error. Cross-entropy (CE) soon has it pick A, where it is -log(1/K + δ), which grows without bound "
        "as K grows and δ falls. The lower bound of the 0-1 loss, the largest φ(F) over the classes, has it pick B: it "
        "is φ(0) = 0 for A and φ(2δ) > 0 for B (tanh with slope 0.1, -log). That is the argument. What the algorithm "
        "climbs is a soft maximum over the classes, which cannot tell apart what differs by less than about log(K)/µ, "
        "and in A all K classes are near the label: with the paper's µ (10 for tanh, 1 for -log) it picks what the "
        "column says. The last column is the least power of ten as µ with which it picks B. Exact values in float64."
    ),
    settings={"classes": (10, 100, 1000, 10000), "deltas": (0.1, 0.01, 0.001)},
    parts=_example_parts,
    measure=_measure_example,
    columns={
        "K": lambda row: str(row["classes"]),
        "δ": lambda row: f"{row['delta']:g}",
        "CE of A": lambda row: f"{row['cross_entropy_a']:.3f}",
        "CE of B": lambda row: f"{row['cross_entropy_b']:.3f}",
        "CE picks": lambda row: row["cross_entropy_picks"],
        **{
            f"{written} {what}": lambda row, key=f"{name}_{option}": f"{row[key]:.2g}"
            for name, written in (("tanh", "tanh"), ("log", "-log"))
            for option, what in (("a", "of A"), ("b", "of B"))
        },
        "bounds pick": lambda row: ", ".join(row[f"{name}_picks"] for name in _BOUNDS),
        "soft with the paper's µ": lambda row: ", ".join(row[f"{name}_soft_picks"] for name in _BOUNDS),
        "µ for B": lambda row: ", ".join(f"{row[f'{name}_mu']:g}" for name in _BOUNDS),
    },
    figures={"example.png": ("Cross-entropy and the lower bounds of both options", _example_figure)},
)

MEASUREMENTS = {measurement.name: measurement for measurement in (EXAMPLE, TABLE_11, TABLE_12)}
"""By name."""
