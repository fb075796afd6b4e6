"""Measurements of SAMPa's paper: the gradients at its two points, and memory and time of the methods it compares with.

Source: Xie, Pethick and Cevher, 2024, https://arxiv.org/abs/2410.10683.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bisam import Evaluation, LookSAM, Oracle, SAMPa, SharpnessAware, next_step
from bisam.batches import Batch
from bisam.experiments import data
from bisam.experiments.data.image_tensors import channels
from bisam.experiments.measurements.measurement import (
    MACHINE,
    READING,
    Measurement,
    Row,
    Settings,
    flat,
    with_interval,
    with_load,
)
from bisam.experiments.measurements.timing import interleaved, ratio, threads, turns
from bisam.experiments.models.build import build
from bisam.experiments.recipes.assumptions import AE_SAM
from bisam.experiments.recipes.catalogue import METHODS
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.studies import papers, published
from bisam.experiments.studies.papers import Exhibit
from bisam.methods.method import indexed
from bisam.validation import share
from bisam.vector import TINY

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PAPER = "Xie, Pethick and Cevher, 2024, https://arxiv.org/abs/2410.10683"


class Compared:
    """SAMPa, and at each step the gradients of the same batch at the weights x and at the point y ahead of them.

    Both belong to the end of the previous step, whose y the method keeps the gradient of. The comparison costs one more
    gradient per step.

    Args:
        method: the method.

    Attributes:
        cosines: cosine of the two gradients at each step.
        distances: norm of their difference.
    """

    transparent = True

    def __init__(self, method: SAMPa) -> None:
        self.method = method
        self.cosines, self.distances = list[Tensor](), list[Tensor]()

    def __call__(self, oracle: Oracle, batch: Batch) -> Evaluation:
        """Calls the method, and returns its answer unchanged."""
        if (before := oracle.kept("batch")) is not None:
            at_y = oracle.state["gradients"][0]
            at_x = oracle.query(before, track=False).gradient
            self.cosines.append(at_x.dot(at_y) / (at_x.norm() * at_y.norm() + TINY))
            self.distances.append((at_x - at_y).norm())
        return self.method(oracle, batch)


def _recipe(settings: Settings, seed: int) -> Recipe:
    named: dict[str, Any] = {name: settings[name] for name in ("epochs", "batch_size", "learning_rate", "rho")}
    return Recipe(dataset=settings["dataset"], model=settings["model"], method="sampa", seed=seed, **named)


def _seeds(settings: Settings) -> list[str]:
    share("lam", settings["lam"], zero=True)
    _recipe(settings, 0)
    return [f"seed-{seed}" for seed in range(settings["seeds"])]


def _measure_gradients(part: str, settings: Settings, device: torch.device) -> list[dict[str, Any]]:
    seed = int(part.removeprefix("seed-"))
    recipe, epochs = _recipe(settings, seed), int(settings["epochs"])
    splits = data.load(recipe, settings[MACHINE])
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        model = build(recipe.model, splits.classes, channels=channels(splits.test)).to(device)
        optimizer = torch.optim.SGD(model.parameters(), recipe.learning_rate, 0.9, weight_decay=recipe.weight_decay)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
        watched = Compared(SAMPa(settings["rho"], ahead=next_step(optimizer), lam=settings["lam"]))
        sharp = SharpnessAware(model, watched, nn.CrossEntropyLoss(reduction="none"))
        train, rows = splits.train.to(device), list[dict[str, Any]]()
        for epoch in range(1, epochs + 1):
            watched.cosines.clear()
            watched.distances.clear()
            for x, y in train.batches(recipe.batch_size, torch.Generator().manual_seed(1000 * seed + epoch)):
                sharp(x, y).backward()
                optimizer.step()
                optimizer.zero_grad()
            scheduler.step()
            cosines, distances = (torch.stack(values) for values in (watched.cosines, watched.distances))
            mean, least, far = cosines.mean().item(), cosines.min().item(), distances.mean().item()
            rows.append({"seed": seed, "epoch": epoch, "cosine": mean, "least": least, "distance": far})
    return rows


def _drawn(rows: list[Row]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure((9, 3.2), layout="constrained")
    axes: Any = figure.subplots(1, 2)
    for seed in sorted({row["seed"] for row in rows}):
        of_seed = [row for row in rows if row["seed"] == seed]
        epochs = [row["epoch"] for row in of_seed]
        for ax, name in zip(axes, ("cosine", "distance"), strict=True):
            ax.plot(epochs, [row[name] for row in of_seed], label=f"seed {seed}", linewidth=1.4)
            ax.set_xlim(left=0)
    for ax, label in zip(axes, ("cosine of the gradients at x and y", "norm of their difference"), strict=True):
        ax.set_xlabel("epoch")
        ax.set_ylabel(label)
        ax.grid(alpha=0.3)
    distances = [row["distance"] for row in rows]
    if min(distances) > 0 and max(distances) > 10 * min(distances):
        axes[1].set_yscale("log")
    axes[0].legend()
    figure.suptitle("The gradients at x and at y: their angle and their distance in each epoch", fontsize=10.5)
    return figure


def _answer(rows: list[Row]) -> str:
    means, n = [row["cosine"] for row in rows], len({row["seed"] for row in rows})
    return (
        f"The mean cosine of the two gradients is between {min(means):.3f} and {max(means):.3f} in every epoch of {n} "
        f"seeds, and that of a single step at least {min(row['least'] for row in rows):.3f}; nothing is tested."
    )


GRADIENTS = Measurement(
    name="sampa-gradients",
    title="SAMPa: the gradients at x and at y",
    note=(
        "SAMPa climbs along the gradient at y, the point to which the optimizer would move along the previous "
        "gradient, in place of the gradient at the weights x. For each step of a training run the two gradients of the "
        f"same batch are compared: their cosine and the norm of their difference. The paper ({_PAPER}) has cosines "
        "above 0.99 "
        "for ResNet-56 on CIFAR-10, according to a public summary. The defaults here are a small network on digits; "
        "`--set dataset=cifar10 --set model=resnet56 --set batch_size=128 --set epochs=200` is the paper's, with the "
        "data in `--data-dir`."
    ),
    settings={
        "dataset": "digits",
        "model": "convnet",
        "epochs": 15,
        "batch_size": 64,
        "learning_rate": 0.1,
        "rho": 0.1,
        "lam": 0.2,
        "seeds": 3,
    },
    parts=_seeds,
    measure=_measure_gradients,
    answer=_answer,
    reads_data=True,
    columns={
        "seed": lambda row: str(row["seed"]),
        "epoch": lambda row: str(row["epoch"]),
        "cosine, mean": lambda row: f"{row['cosine']:.4f}",
        "cosine, least": lambda row: f"{row['least']:.4f}",
        "distance, mean": lambda row: f"{row['distance']:.3g}",
    },
    figures={"gradients.png": ("The gradients at x and y by epoch", _drawn)},
    exhibit=Exhibit(papers.SAMPA, "Figure of both gradients"),
)

_EXAMPLES, _EPOCH = 45_000, 352  # of CIFAR, in batches of 128
COMPARED = {
    **dict.fromkeys(("sgd", "sam", "sampa", "looksam", "ae_sam", "esam"), ""),
    # With the term from the start, which the authors begin after some epochs.
    "saf": f"SAF(epoch=1, examples={_EXAMPLES}, start=0)",
    "mesa": "MESA()",
}
"""The methods of the paper's figure, and what is measured where that is not the catalogue's expression."""

_TIMES = {one.method: one.value / one.sam for one in published.PUBLISHED if one.quantity == "run" and one.sam}


def _measure_costs(part: str, settings: Settings, device: torch.device) -> list[dict[str, Any]]:
    """All methods train one model in turn. Memory is that of each method alone."""
    with threads(settings["threads"]), torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        model = build(part, settings["classes"]).to(device)
        n = settings["batch_size"]
        x, y = torch.randn(n, 3, 32, 32).to(device), torch.randint(settings["classes"], (n,)).to(device)
        # A small rate, so that random labels do not make it diverge; it does not affect the time of a step.
        optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9, weight_decay=5e-4)

        def training(name: str) -> Callable[[], None]:
            recipe = Recipe(method=COMPARED[name] or name)
            method = recipe.build_method(optimizer=optimizer, steps=200 * _EPOCH, epoch=_EPOCH, examples=_EXAMPLES)
            loss = nn.CrossEntropyLoss(label_smoothing=0.1, reduction="none")
            sharp, named = SharpnessAware(model, method, loss), dict[str, Any]()
            if indexed(method):
                named["indices"] = torch.arange(n)

            def step() -> None:
                sharp(x, y, **named).backward()
                optimizer.step()
                optimizer.zero_grad()

            return step

        memory = {name: _peak(training(name), device) for name in COMPARED}
        steps = {name: training(name) for name in COMPARED}
        # Every fifth step of LookSAM costs more than the others.
        times = turns(interleaved(steps, settings["iterations"], device), LookSAM().k)
    return [
        {
            "model": part,
            "method": name,
            "seconds": ratio(times, name, "sam").seconds,
            **flat("to_sam", ratio(times, name, "sam")),
            **with_load(times.load),
            "bytes": memory[name],
            "published": _TIMES.get(name),
        }
        for name in COMPARED
    ]


def _peak(step: Callable[[], None], device: torch.device) -> int | None:
    """Largest memory that tensors take in some steps on a CUDA device, in bytes; None elsewhere: torch has no count."""
    if device.type != "cuda":
        return None
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    for _ in range(4):
        step()
    return torch.cuda.max_memory_allocated(device)


def _cost(row: Row, what: str) -> str:
    return getattr(METHODS[row["method"]], what)


def _costs(rows: list[Row]) -> str:
    said: list[str] = []
    for model in dict.fromkeys(row["model"] for row in rows):
        ratios = [
            f"{_cost(row, 'name')} {row['to_sam']:.2f}"
            for row in sorted(rows, key=lambda row: row["to_sam"])
            if row["model"] == model and row["method"] != "sam"
        ]
        said.append(f"{model}: {', '.join(ratios)}")
    return f"Time of a step relative to SAM on one device, medians: {'; '.join(said)}."


COSTS = Measurement(
    name="sampa-costs",
    title="Time and memory of a step: the methods that SAMPa is compared with",
    note=(
        "All methods train the same model in turn on random images of 32x32, one step each; a ratio is the median over "
        f"turns of five steps, {READING}. One device computes both gradients of SAMPa, so its step takes as "
        "long as one of SAM; the published ratio is that of two devices. The published column is the time of a run of "
        "200 epochs of ResNet-56 on CIFAR-10 relative to SAM, read off the authors' figure "
        f"({_PAPER}). SAF and MESA are measured with their term. AE-SAM decides by {AE_SAM.subject} ({AE_SAM.value}), "
        "which are recollected. Memory is the largest that tensors take in some steps of a method alone on a CUDA "
        "device, with the model, the optimizer and the batch."
    ),
    settings={"models": ("resnet56",), "batch_size": 128, "classes": 10, "iterations": 45, "threads": 1},
    parts=lambda settings: list(settings["models"]),
    measure=_measure_costs,
    answer=_costs,
    columns={
        "model": lambda row: row["model"],
        "method": lambda row: _cost(row, "name"),
        "gradients": partial(_cost, what="cost"),
        "seconds of a step": lambda row: f"{row['seconds']:.3g}",
        "to SAM": lambda row: with_interval(row, "to_sam", 2),
        "published": lambda row: "–" if row["published"] is None else f"{row['published']:.2f}",
        "memory, MiB": lambda row: "–" if row["bytes"] is None else f"{row['bytes'] / 2**20:.0f}",
    },
    exhibit=Exhibit(papers.SAMPA, "Tables of time and memory"),
    timed=True,
)
