"""Table 11: the time of an epoch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bisam import SharpnessAware
from bisam.experiments.errors import unknown
from bisam.experiments.measurements.measurement import (
    READING,
    Measurement,
    Row,
    Settings,
    flat,
    met,
    values_for,
    verdicts,
    with_interval,
    with_load,
)
from bisam.experiments.measurements.timing import interleaved, ratio, threads
from bisam.experiments.models.build import NAMES, build
from bisam.experiments.recipes.catalogue import PLAIN
from bisam.experiments.recipes.presets import CIFAR
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.studies import published
from bisam.experiments.studies.papers import BISAM, Exhibit

if TYPE_CHECKING:
    pass

EPOCH = 352
"""Steps of an epoch on the 45,000 training images of CIFAR, in batches of 128."""

PUBLISHED = {one.where["model"]: (one.sam, one.value) for one in published.PUBLISHED if one.quantity == "epoch"}
"""Seconds per epoch on CIFAR-10, of SAM and of BiSAM (Xie et al., 2024, Appendix B)."""

_EPOCH_BAR = 1.01
_TRAINED = {"sgd": "SGD", "sam": "SAM", "bisam_log": "BiSAM (-log)", "bisam_tanh": "BiSAM (tanh)"}


def _epoch_parts(settings: Settings) -> list[str]:
    if settings["classes"] < 2:
        raise ValueError(f"setting classes must be at least 2, got {settings['classes']}")
    for model in settings["models"]:
        source, colon, _ = model.partition(":")
        known = [name for name in NAMES if not name.startswith("hf:")]  # they read text
        if (f"{source}:NAME" if colon else model) not in known:
            raise unknown("model of images", model, known)
    _batch_sizes(settings)
    return list(settings["models"])


def _batch_sizes(settings: Settings) -> dict[str, int]:
    known = dict.fromkeys([*settings["models"], *PUBLISHED])
    return values_for("batch_size", settings["batch_size"], known, 128)


def _measure_epoch(part: str, settings: Settings, device: torch.device) -> list[dict[str, Any]]:
    """All methods train one model in turn: the weights and their place in memory are the same for each."""
    n, classes = _batch_sizes(settings)[part], settings["classes"]
    with threads(settings["threads"]), torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        model = build(part, classes).to(device)
        x = torch.randn(n, 3, 32, 32).to(device)
        y = torch.randint(classes, (n,)).to(device)
        # A small rate, so that random labels do not make it diverge; it does not affect the time of a step.
        optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9, weight_decay=5e-4)

        def step(sharp: SharpnessAware) -> None:
            sharp(x, y).backward()
            optimizer.step()
            optimizer.zero_grad()

        steps: dict[str, Callable[[], None]] = {}
        for name in _TRAINED:
            method = Recipe(method=name, rho=None if name == PLAIN else 0.05).build_method()
            loss = nn.CrossEntropyLoss(label_smoothing=0.1, reduction="none")
            steps[name] = partial(step, SharpnessAware(model, method, loss=loss))
        times = interleaved(steps, settings["iterations"], device)
    row: dict[str, Any] = {"model": part, "batch_size": n, "classes": classes, "iterations": settings["iterations"]}
    row |= {f"{name}_seconds": EPOCH * ratio(times, name, "sam").seconds for name in _TRAINED}
    for name, reference in (("sam", "sgd"), ("bisam_log", "sam"), ("bisam_tanh", "sam")):
        row |= flat(f"{name}_to_{reference}", ratio(times, name, reference))
    sam, bisam = PUBLISHED.get(part, (None, None))
    row |= with_load(times.load)
    return [{**row, "published_sam_seconds": sam, "published_bisam_seconds": bisam}]


def _batch(row: Row) -> str:
    """The batch size, with the paper's where it is another."""
    own, paper = row["batch_size"], CIFAR.batch_size
    return f"{own}" if own == paper else f"{own} (paper: {paper})"


def _published(row: Row) -> str:
    sam, bisam = row["published_sam_seconds"], row["published_bisam_seconds"]
    return "–" if sam is None else f"{sam} → {bisam} s ({bisam / sam:.2f})"


def _answer(rows: list[Row]) -> str:
    keys = [f"{name}_to_sam" for name in ("bisam_log", "bisam_tanh")]
    ratios = [row[key] for row in rows for key in keys]
    results = [met(row, key, _EPOCH_BAR) for row in rows for key in keys]
    return (
        f"A step of BiSAM takes {min(ratios):.3f} to {max(ratios):.3f} times as long as one of SAM (medians of "
        f"{len(rows)} networks and both bounds); the bar of {_EPOCH_BAR}: {verdicts(results)}."
    )


TABLE_11 = Measurement(
    name="table11",
    title="Time of an epoch",
    note=(
        f"Seconds are {EPOCH} times the median time of a step on random images of 32x32, with the batch size of the "
        "row; with 128 this is an epoch of CIFAR without data loading and evaluation. The ratios are more reliable: "
        "all methods train the same model in turn, one step each, and a ratio is the median over the iterations, "
        f"{READING}. The bar for BiSAM relative to SAM is {_EPOCH_BAR}. The published column gives the "
        "seconds of SAM and BiSAM and their ratio (Xie et al., 2024, Appendix B, CIFAR-10, A100). A smaller batch "
        "increases the share of the loss in the step, if anything."
    ),
    exhibit=Exhibit(BISAM, "Table 11"),
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
    answer=_answer,
    columns={
        "model": lambda row: row["model"],
        "batch": _batch,
        **{f"{title}, s": lambda row, name=name: f"{row[f'{name}_seconds']:.3g}" for name, title in _TRAINED.items()},
        "SAM / SGD": lambda row: with_interval(row, "sam_to_sgd", 2),
        **{
            f"{_TRAINED[name]} / SAM": lambda row, name=name: with_interval(row, f"{name}_to_sam")
            for name in ("bisam_log", "bisam_tanh")
        },
        f"at most {_EPOCH_BAR}": lambda row: ", ".join(
            met(row, f"{name}_to_sam", _EPOCH_BAR) for name in ("bisam_log", "bisam_tanh")
        ),
        "published": _published,
    },
    timed=True,
)
