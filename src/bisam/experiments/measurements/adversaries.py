"""Adversaries: the direction of ascent gradients compared with cross-entropy's, and their size by margin.

`COSINES` compares the ascent gradients of several objectives on the same weights and batches with that of the
cross-entropy without label smoothing, at marks of a training run. `LABEL_GRADIENT` has the size of the gradient at the
logit of the label, in closed situations, in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import islice
from math import sqrt
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bisam import L2, ModelOracle, NegLog, SharpnessAware, Tanh, WrongClasses, cross_entropy
from bisam.analysis import flips
from bisam.experiments import data
from bisam.experiments.data.image_tensors import channels
from bisam.experiments.data.splits import batches_of
from bisam.experiments.errors import unknown
from bisam.experiments.measurements.measurement import MACHINE, Measurement, Row, Settings
from bisam.experiments.models.build import build
from bisam.experiments.recipes.recipe import Recipe
from bisam.objectives import Objective
from bisam.validation import non_negative

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SMOOTHING = 0.1
_PLAIN = "cross-entropy"


def _smoothed(outputs: Tensor, targets: Tensor) -> Tensor:
    # As the descent loss of recipes and of the authors' code: the mass is spread over the wrong classes.
    classes = outputs.shape[1]
    return nn.functional.cross_entropy(
        outputs, targets, label_smoothing=_SMOOTHING * classes / (classes - 1), reduction="none"
    )


ASCENTS: Mapping[str, Objective] = {
    "smoothed": _smoothed,
    "tanh": Tanh(),
    "tanh, µ 1": Tanh(mu=1.0),
    "-log": NegLog(),
    "-log, µ 5": NegLog(mu=5.0),
    "-log, no own class": WrongClasses(NegLog()),
}
"""The objectives that are compared with cross-entropy, by their names in the tables."""

_CIFAR: dict[str, Any] = {"dataset": "cifar10:16", "model": "resnet8", "limit": 1024, "augment": False}
TRAINED: Mapping[str, Mapping[str, Any]] = {
    "digits": {},
    "digits, 40 % noise": {"noise": 0.4},
    "CIFAR-10": _CIFAR,
    "CIFAR-10, 40 % noise": {**_CIFAR, "noise": 0.4},
}
"""Recipe fields of each trained network, by name."""


def _recipe(name: str, settings: Settings, seed: int) -> Recipe:
    return Recipe(
        method="sam",
        rho=settings["rho"],
        epochs=max(1, *settings["marks"]),
        label_smoothing=_SMOOTHING,
        seed=seed,
        **TRAINED[name],
    )


def _parts(settings: Settings) -> list[str]:
    for name in settings["trained"]:
        if name not in TRAINED:
            raise unknown("network of setting trained", name, TRAINED)
        _recipe(name, settings, 0)
    non_negative("rho", settings["rho"])
    return [f"{name}, seed {seed}" for name in settings["trained"] for seed in range(settings["seeds"])]


def _measure_cosines(part: str, settings: Settings, device: torch.device) -> list[dict[str, Any]]:
    name, _, number = part.rpartition(", seed ")
    seed, rows = int(number), list[dict[str, Any]]()
    recipe = _recipe(name, settings, seed)
    splits = data.load(recipe, settings[MACHINE])
    train, marks = splits.train.to(device), sorted(set(settings["marks"]))
    batches = -(-settings["examples"] // recipe.batch_size)
    fixed = list(islice(train.unaugmented().batches(recipe.batch_size, _generator(seed)), batches))
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        model = build(recipe.model, splits.classes, channels=channels(splits.test)).to(device)
        optimizer = torch.optim.SGD(
            model.parameters(), recipe.learning_rate, recipe.momentum, weight_decay=recipe.weight_decay
        )
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.length)
        steps = batches_of(len(train), recipe.batch_size)
        method = recipe.build_method(optimizer=optimizer, steps=steps * recipe.length, epoch=steps, examples=len(train))
        sharp = SharpnessAware(model, method, _smoothed)
        for epoch in range(recipe.length + 1):
            if epoch:
                for x, y in train.batches(recipe.batch_size, _generator(seed, epoch)):
                    sharp(x, y).backward()
                    optimizer.step()
                    optimizer.zero_grad()
                scheduler.step()
            if epoch in marks:
                # In train mode, as the ascent of a training step.
                found = flips(
                    ModelOracle(model, _smoothed),
                    fixed,
                    L2(recipe.setting("rho")),
                    {_PLAIN: cross_entropy, **ASCENTS},
                    mode="train",
                )
                row = {"trained": name, "seed": seed, "epoch": epoch, "error": 1 - found.correct / found.examples}
                row |= {f"cosine {one}": found.cosines[_PLAIN][one] for one in ASCENTS}
                row |= {f"flips {one}": count / found.examples for one, count in found.flipped.items()}
                rows.append(row)
    return rows


def _generator(seed: int, epoch: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(1000 * seed + epoch)


def _moments(rows: list[Row], key: str) -> tuple[float, float]:
    """Mean over the seeds, and half of Student's 95 % interval; nan for one seed."""
    from scipy.special import stdtrit  # not at the top: the plan of a study, which imports all measurements, is quick

    values = [row[key] for row in rows]
    n = len(values)
    return fmean(values), float(stdtrit(n - 1, 0.975)) * stdev(values) / sqrt(n) if n > 1 else float("nan")


def _over_seeds(rows: list[Row]) -> list[Row]:
    """A row for each network and mark: means over the seeds, with intervals."""
    marks = dict.fromkeys((row["trained"], row["epoch"]) for row in rows)
    found: list[Row] = []
    for name, epoch in marks:
        group = [row for row in rows if (row["trained"], row["epoch"]) == (name, epoch)]
        one: dict[str, Any] = {"trained": name, "epoch": epoch, "n": len(group)}
        for key in ("error", *(f"cosine {ascent}" for ascent in ASCENTS)):
            one[key], one[f"{key} ±"] = _moments(group, key)
        found.append(one)
    return found


def _cell(row: Row, key: str, unit: float, digits: int) -> str:
    centre, reach = unit * row[key], unit * row[f"{key} ±"]
    return f"{centre:.{digits}f}" + ("" if reach != reach else f" ± {reach:.{digits}f}")


def _drawn(rows: list[Row]) -> Figure:
    from matplotlib.figure import Figure

    table = _over_seeds(rows)
    names = list(dict.fromkeys(row["trained"] for row in table))
    figure = Figure((3.1 * len(names) + 1.6, 3.4), layout="constrained")
    axes: Any = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for ax, name in zip(axes, names, strict=True):
        of_name = [row for row in table if row["trained"] == name]
        places = range(len(of_name))
        for (ascent, colour), marker in zip(_COLOURS.items(), "os^vDP", strict=True):
            key = f"cosine {ascent}"
            centres, reaches = ([row[k] for row in of_name] for k in (key, f"{key} ±"))
            ax.errorbar(places, centres, reaches, color=colour, marker=marker, ms=4, lw=1.3, capsize=2, label=ascent)
        ax.set_xticks(list(places), [str(row["epoch"]) for row in of_name])
        ax.set_title(name, fontsize=10)
        ax.set_xlabel("epoch")
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("cosine to the ascent of cross-entropy")
    axes[0].set_ylim(top=1.03)  # intervals of few seeds are beyond
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=9)
    return figure


_COLOURS = dict(zip(ASCENTS, ("#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7"), strict=True))


def _answer(rows: list[Row]) -> str:
    ends: dict[str, Row] = {}
    for row in _over_seeds(rows):
        if row["trained"] not in ends or row["epoch"] > ends[row["trained"]]["epoch"]:
            ends[row["trained"]] = row
    said = "; ".join(f"{name}: {_cell(row, 'cosine -log', 1, 3)} (n = {row['n']})" for name, row in ends.items())
    return f"The cosine of -log's ascent gradient to that of cross-entropy at the last mark, without a test: {said}."


COSINES = Measurement(
    name="cosines",
    title="The direction that BiSAM's adversary climbs, beside that of cross-entropy",
    note=(
        "The cosine between the ascent gradient of an objective and that of the cross-entropy without label smoothing, "
        "on the same weights and the same batches of 64 training examples (with the labels that are trained on, in "
        "train mode, as in a training step): mean over the batches, then over n seeds, ± half of Student's 95 % "
        "interval. The networks are trained by SAM with radius 0.05 and label smoothing 0.1, and measured after the "
        "epochs in the second column; *error* is the share of the examples that are misclassified there. *smoothed* is "
        "the cross-entropy with label smoothing 0.1, the ascent of SAM in the BiSAM authors' recipe; *tanh* has the "
        "paper's µ 10 and α 0.1, *-log* its µ 1; *no own class* leaves the label's class out of the sum of Q, which is "
        "neither the paper's objective nor its code. CIFAR-10 is 1,024 images at 16 x 16 pixels with a ResNet-8. A "
        "cosine of 1 means that an adversary of a given radius makes the same step as SAM (CE ascent)."
    ),
    settings={
        "trained": tuple(TRAINED),
        "marks": (0, 1, 3, 10, 30),
        "examples": 512,
        "rho": 0.05,
        "seeds": 5,
    },
    parts=_parts,
    measure=_measure_cosines,
    answer=_answer,
    reads_data=True,
    tabled=_over_seeds,
    columns={
        "network": lambda row: row["trained"],
        "epoch": lambda row: str(row["epoch"]),
        "error, %": partial(_cell, key="error", unit=100, digits=1),
        **{name: partial(_cell, key=f"cosine {name}", unit=1, digits=3) for name in ASCENTS},
        "n": lambda row: str(row["n"]),
    },
    figures={"cosines.png": ("Cosines to the ascent gradient of cross-entropy during training", _drawn)},
)

# With factors that make them comparable.
_SIZED: Mapping[str, tuple[Callable[[Tensor, Tensor], Tensor], float]] = {
    _PLAIN: (cross_entropy, 1.0),
    "smoothed": (_smoothed, 1.0),
    "tanh": (Tanh(), 1 / Tanh.alpha),
    "-log": (NegLog(), 1.0),
    "-log, µ 5": (NegLog(mu=5.0), 1.0),
    "-log, no own class": (WrongClasses(NegLog()), 1.0),
}


def _measure_label_gradient(part: str, settings: Settings, device: torch.device) -> list[dict[str, Any]]:
    del device  # exact values, not times
    rows, classes = list[dict[str, Any]](), int(part)
    for margin in settings["margins"]:
        row: dict[str, Any] = {"classes": classes, "margin": margin}
        for name, (objective, scale) in _SIZED.items():
            logits = torch.zeros(1, classes, dtype=torch.float64)
            logits[0, 0] = margin
            logits.requires_grad_()
            (gradient,) = torch.autograd.grad(objective(logits, torch.tensor([0])).sum(), logits)
            row[name] = scale * abs(float(gradient[0, 0]))
        rows.append(row)
    return rows


def _class_parts(settings: Settings) -> list[str]:
    for classes in settings["classes"]:
        if classes < 2:
            raise ValueError(f"setting classes must be at least 2, got {classes}")
    return [str(classes) for classes in settings["classes"]]


def _vanishing(rows: list[Row]) -> str:
    most = max(rows, key=lambda row: row["margin"])
    least = min(rows, key=lambda row: row["margin"])
    named = {_PLAIN: _PLAIN, "10 tanh": "tanh", "-log": "-log", "-log without the own class": "-log, no own class"}
    sizes = ", ".join(f"{name} {most[key]:.2g}" for name, key in named.items())
    return (
        f"On a confident correct example (margin {most['margin']:g}) the derivative is {sizes}; on a confident error "
        f"(margin {least['margin']:g}) that of -log is {least['-log']:.2g}, and cross-entropy's {least[_PLAIN]:.2g}: "
        "exact values, without a test."
    )


LABEL_GRADIENT = Measurement(
    name="label-gradient",
    title="How much of a gradient BiSAM's adversary has for an example, by its margin",
    note=(
        "The size of the derivative by the logit of the label, |dQ/df_y|, for an example whose logit exceeds those of "
        "all wrong classes, which are equal, by the margin (negative: it is misclassified). tanh is multiplied by "
        "1/α = 10, which makes it cross-entropy for small logits. Cross-entropy, tanh and -log vanish for confident "
        "correct examples: the label's own class is in the sum of Q, as in the paper and in the authors' code. -log "
        "also vanishes for confident errors, where cross-entropy is largest. With label smoothing (0.1) cross-entropy "
        "does not vanish: beyond a margin of about 4 it lowers the logit of the label. Without the label's class in "
        "the sum of Q the derivative would not vanish for correct examples, as that of the bound φ of a single margin "
        "does not. Exact values in float64."
    ),
    settings={"classes": (10,), "margins": (-10.0, -5.0, -2.0, 0.0, 2.0, 5.0, 10.0, 20.0)},
    parts=_class_parts,
    measure=_measure_label_gradient,
    answer=_vanishing,
    columns={
        "K": lambda row: str(row["classes"]),
        "margin": lambda row: f"{row['margin']:g}",
        **{("10 tanh" if name == "tanh" else name): lambda row, key=name: f"{row[key]:.2g}" for name in _SIZED},
    },
)
