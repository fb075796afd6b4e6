"""GAN: small generative adversarial networks on real images, trained by methods for min-max problems.

The players take turns, and each inner step has a new batch, as in the code of Pethick, Xie and Cevher (2023).
"""

from __future__ import annotations

import base64
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from bisam import Lookahead, ProximalPoint
from bisam.experiments.data.cifar import cifar
from bisam.experiments.data.digits import digits
from bisam.experiments.data.image_tensors import Images
from bisam.experiments.errors import unknown
from bisam.experiments.measurements.frechet import NAMES, Features, distance, enlarged, features
from bisam.experiments.measurements.measurement import Measurement, Row, Settings, values_for
from bisam.experiments.measurements.timing import threads
from bisam.experiments.models.gan import Discriminator, Generator
from bisam.experiments.studies import papers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REAL = "real images"
"""The part that compares held-out images with the training images: the distance of a perfect generator."""
_SHOWN = 10  # samples of a method in the figure
_REFERENCE = 2_000  # training images that others are compared with, at most


@dataclass(frozen=True)
class Trainer:
    """How a method trains.

    Attributes:
        optimizer: `(parameters, learning rate, settings) -> optimizer`, of each player.
        adaptive: whether it is based on Adam, which has its own learning rate.
        colour: of its curve (Okabe and Ito, 2008).
        length: steps of a round, after which the weights are those to evaluate.
    """

    optimizer: Callable[[Any, float, Settings], Optimizer]
    adaptive: bool
    colour: str
    length: Callable[[Settings], int] = lambda settings: 1


def _adam(parameters: Any, lr: float) -> Adam:
    return Adam(parameters, lr=lr, betas=(0.0, 0.9))


def _lookahead(optimizer: Optimizer, settings: Settings) -> Lookahead:
    return Lookahead(optimizer, settings["k"], settings["alpha"])


TRAINERS: dict[str, Trainer] = {
    "GDA": Trainer(lambda p, lr, _: SGD(p, lr=lr), False, "#7F7F7F"),
    "EG": Trainer(lambda p, lr, _: ProximalPoint(SGD(p, lr=lr)), False, "#56B4E9", lambda _: 2),
    "EG+": Trainer(lambda p, lr, _: ProximalPoint(SGD(p, lr=lr), alpha=0.5), False, "#0072B2", lambda _: 2),
    "RAPP": Trainer(
        lambda p, lr, settings: ProximalPoint(SGD(p, lr=lr), settings["inner"], settings["lam"]),
        False,
        "#D55E00",
        lambda settings: settings["inner"],
    ),
    "LA-GDA": Trainer(
        lambda p, lr, settings: _lookahead(SGD(p, lr=lr), settings), False, "#E69F00", lambda settings: settings["k"]
    ),
    "Adam": Trainer(lambda p, lr, _: _adam(p, lr), True, "#000000"),
    "ExtraAdam": Trainer(lambda p, lr, _: ProximalPoint(_adam(p, lr)), True, "#009E73", lambda _: 2),
    "RAPP-Adam": Trainer(
        lambda p, lr, settings: ProximalPoint(_adam(p, lr), settings["inner"], settings["lam"]),
        True,
        "#F0E442",
        lambda settings: settings["inner"],
    ),
    "LA-ExtraAdam": Trainer(
        lambda p, lr, settings: _lookahead(ProximalPoint(_adam(p, lr)), settings),
        True,
        "#CC79A7",
        lambda settings: settings["k"],
    ),
}


def _parts(settings: Settings) -> list[str]:
    kind, _, path = settings["data"].partition(":")
    if (kind, bool(path)) not in {("digits", False), ("cifar10", True)}:
        raise unknown("data", settings["data"], ["digits", "cifar10:PATH"])
    known = [name.partition(":") for name in NAMES]
    kind, _, path = settings["features"].partition(":")
    if not any(kind == name and bool(path) == bool(detail) for name, _, detail in known):
        raise unknown("network of features", settings["features"], NAMES)
    if kind == "convnet" and not settings["data"].startswith("digits"):
        raise ValueError(
            "features=convnet is a network of digits: give a network of photographs, such as "
            "--set features=squeezenet:PATH"
        )
    for method in settings["methods"]:
        if method not in TRAINERS:
            raise unknown("method", method, TRAINERS)
    for method, scale in _scales(settings).items():
        if not 0 < scale < math.inf:
            raise ValueError(f"setting scale must be positive, got {scale} for {method}")
    for name, most in (("lr_g", math.inf), ("lr_d", math.inf), ("lr_adam", math.inf), ("lam", 1.0), ("alpha", 1.0)):
        if not 0 < settings[name] <= most or settings[name] == math.inf:
            raise ValueError(f"setting {name} must be in (0, {most:g}], got {settings[name]}")
    if settings["k"] % 2 and "LA-ExtraAdam" in settings["methods"]:
        raise ValueError(f"setting k must be even for LA-ExtraAdam, got {settings['k']}")
    if settings["samples"] < _SHOWN:
        raise ValueError(f"setting samples must be at least {_SHOWN}, got {settings['samples']}")
    seeds = range(settings["first_seed"], settings["first_seed"] + settings["seeds"])
    return [REAL, *(f"{method}, seed {s}" for s in seeds for method in settings["methods"])]


def _scales(settings: Settings) -> dict[str, float]:
    return values_for("scale", settings["scale"], TRAINERS, 1.0)


@cache
def _images(data: str) -> tuple[Tensor, Tensor]:
    """Training images and held-out ones (N, C, 32, 32), with values in [-1, 1]."""
    kind, _, path = data.partition(":")
    found = digits(seed=0) if kind == "digits" else cifar("cifar10", Path(path), augment=False)
    train, held = (cast(Images, split).images for split in (found.train, found.test))
    if kind == "cifar10":
        return train / 127.5 - 1, held / 127.5 - 1
    low, high = train.min(), train.max()
    return tuple(enlarged((x - low) / (high - low) * 2 - 1) for x in (train, held))  # pyright: ignore


@cache
def _reference(data: str, name: str, device: torch.device) -> tuple[Features, tuple[Tensor, Tensor]]:
    """The network of features, and the moments of the training images; once for all parts."""
    network = features(name, device)
    return network, network.moments(_images(data)[0][:_REFERENCE].to(device))


def _measure(part: str, settings: Settings, device: torch.device) -> list[dict[str, Any]]:
    real, held = (images.to(device) for images in _images(settings["data"]))
    with threads(settings["threads"]):
        network, reference = _reference(settings["data"], settings["features"], device)
        size = min(settings["samples"], len(held))  # as many generated as real ones

        def row(method: str, seed: int, gradients: int, images: Tensor, **losses: float | None) -> dict[str, Any]:
            finite = bool(images.isfinite().all())
            return {
                "data": settings["data"].partition(":")[0],
                "features": network.name,
                "method": method,
                "seed": seed,
                "scale": None if method == REAL else _scales(settings)[method],
                "gradients": gradients,
                "distance": distance(reference, network.moments(images)) if finite else None,
                "loss_d": losses.get("loss_d"),
                "loss_g": losses.get("loss_g"),
                "_samples": _packed(images[:_SHOWN]) if finite else "",
            }

        if part == REAL:
            return [row(REAL, 0, 0, held[:size])]
        method, _, seed = part.rpartition(", seed ")
        rows: list[dict[str, Any]] = []
        scale = _scales(settings)[method]
        for gradients, images, loss_d, loss_g in train(TRAINERS[method], real, int(seed), size, settings, scale):
            rows.append(row(method, int(seed), gradients, images, loss_d=loss_d, loss_g=loss_g))
            if rows[-1]["distance"] is None:  # it has diverged
                break
        for earlier in rows[:-1]:
            earlier["_samples"] = ""
        return rows


def train(
    trainer: Trainer, real: Tensor, seed: int, samples: int, settings: Settings, scale: float = 1.0
) -> Iterator[tuple[int, Tensor, float | None, float | None]]:
    """Train a generator and a discriminator that take turns.

    Args:
        trainer: the method.
        real: images (N, channels, 32, 32).
        seed: of first weights, batches and noise.
        samples: images that are generated at each evaluation.
        settings: of the study.
        scale: factor of the learning rates.

    Yields:
        Gradient evaluations of each player so far, generated images, and the last losses of discriminator and
        generator; None if they are not finite. The first entry is before training.
    """
    device, batch, noise = real.device, min(settings["batch_size"], len(real)), settings["noise"]
    random = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        generator = Generator(noise, settings["width"], real.shape[1]).to(device)
        discriminator = Discriminator(settings["width"], real.shape[1]).to(device)
    rates = (settings["lr_adam"],) * 2 if trainer.adaptive else (settings["lr_d"], settings["lr_g"])
    rates = tuple(rate * scale for rate in rates)
    players: list[nn.Module] = [discriminator, generator]
    optimizers = [
        trainer.optimizer(player.parameters(), lr, settings) for player, lr in zip(players, rates, strict=True)
    ]
    if isinstance(optimizers[0], Lookahead):
        Lookahead.joint(*cast("list[Lookahead]", optimizers))
    fixed = torch.randn(samples, noise, generator=torch.Generator().manual_seed(1)).to(device)

    def fake() -> Tensor:
        return generator(torch.randn(batch, noise, generator=random).to(device))

    def generated() -> Tensor:
        generator.eval()
        with torch.no_grad():
            images = torch.cat([generator(part) for part in fixed.split(256)])
        generator.train()
        return images

    def step(player: nn.Module, optimizer: Optimizer, loss: Tensor) -> None:
        parameters = list(player.parameters())
        for p, g in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            p.grad = g
        optimizer.step()

    yield 0, generated(), None, None
    due = settings["every"]
    for gradients in range(1, settings["gradients"] + trainer.length(settings)):
        with torch.no_grad():
            images = fake()
        index = torch.randint(len(real), (batch,), generator=random).to(device)
        loss_d = F.relu(1 - discriminator(real[index])).mean() + F.relu(1 + discriminator(images)).mean()
        step(discriminator, optimizers[0], loss_d)
        loss_g = -discriminator(fake()).mean()
        step(generator, optimizers[1], loss_g)
        if gradients >= due and gradients % trainer.length(settings) == 0:
            due = min(gradients + settings["every"], settings["gradients"])
            due = due if gradients < settings["gradients"] else math.inf
            last_d, last_g = (value if math.isfinite(value) else None for value in (loss_d.item(), loss_g.item()))
            yield gradients, generated(), last_d, last_g


def _packed(images: Tensor) -> str:
    return base64.b64encode(((images.cpu() + 1) * 127.5).round().clamp(0, 255).byte().numpy().tobytes()).decode()


def _unpacked(text: str) -> Tensor:
    """Images (10, 32, 32, C), uint8."""
    flat = torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
    return flat.view(_SHOWN, -1, 32, 32).permute(0, 2, 3, 1)


def _runs(rows: list[Row]) -> dict[str, dict[int, list[Row]]]:
    runs: dict[str, dict[int, list[Row]]] = {}
    for row in rows:
        runs.setdefault(row["method"], {}).setdefault(row["seed"], []).append(row)
    return runs


def _summary(rows: list[Row]) -> list[Row]:
    """A row for each method: distances at the end and at best, over its seeds."""
    found: list[Row] = []
    for seeds in _runs(rows).values():
        ends = [run[-1]["distance"] for run in seeds.values()]
        best = [min(d for row in run if (d := row["distance"]) is not None) for run in seeds.values()]
        last = next(iter(seeds.values()))[-1]
        found.append({**last, "seeds": len(seeds), "ends": ends, "best": best})
    return found


def _spread(values: list[float | None]) -> str:
    whole = [value for value in values if value is not None]
    text = "diverged" if not whole else f"{statistics.mean(whole):.2f}"
    text += f" ± {statistics.stdev(whole):.2f}" if len(whole) > 1 else ""
    return text + (f" ({len(values) - len(whole)} diverged)" if 0 < len(whole) < len(values) else "")


def curves(rows: list[Row]) -> Figure:
    """Distance against gradient evaluations: the mean over the seeds, and the range."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    ax = figure.subplots()
    for method, seeds in _runs(rows).items():
        if method == REAL:
            ax.axhline(seeds[0][0]["distance"], color="black", linestyle=":", label=f"{REAL}, held out")
            continue
        points: dict[int, list[float]] = {}
        for run in seeds.values():
            for row in run:
                if row["distance"] is not None:
                    points.setdefault(row["gradients"], []).append(row["distance"])
        x = sorted(points)
        colour = TRAINERS[method].colour
        ax.plot(x, [statistics.mean(points[g]) for g in x], color=colour, label=method, linewidth=1.8)
        ax.fill_between(x, [min(points[g]) for g in x], [max(points[g]) for g in x], color=colour, alpha=0.15)
    ax.set(xlabel="gradient evaluations of each player", ylabel="Fréchet distance", yscale="log")
    ax.set_title(f"Distance of the generated images to the training images\n{rows[0]['features']}", fontsize=10)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8, ncols=2)
    return figure


def samples(rows: list[Row]) -> Figure:
    """Images of each method at the end of its first seed, below real ones."""
    from matplotlib.figure import Figure

    shown = {method: seeds[min(seeds)][-1]["_samples"] for method, seeds in _runs(rows).items()}
    figure = Figure(figsize=(_SHOWN * 0.72 + 1.3, len(shown) * 0.74), layout="constrained")
    axes = figure.subplots(len(shown), 1, squeeze=False)[:, 0]
    for ax, (method, text) in zip(axes, shown.items(), strict=True):
        ax.set(xticks=[], yticks=[])
        ax.set_ylabel(method, rotation=0, ha="right", va="center", fontsize=9)
        if text:
            strip = torch.cat(list(_unpacked(text)), 1)
            ax.imshow(strip.squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=255)
        else:
            ax.text(0.5, 0.5, "diverged", ha="center", va="center")
    return figure


def _answer(rows: list[Row]) -> str:
    found = [row for row in _summary(rows) if row["method"] != REAL]
    ordered = sorted(found, key=_at_the_end)
    listed = ", ".join(f"{row['method']} {_spread(row['ends'])}" for row in ordered)
    n = max((row["seeds"] for row in found), default=0)
    return f"Fréchet distance at the end, nearest first, mean ± standard deviation of {n} seeds, untested: {listed}."


def _at_the_end(row: Row) -> tuple[int, float]:
    """For sorting: methods that diverged last, the others by their distance."""
    whole = [value for value in row["ends"] if value is not None]
    return len(row["ends"]) - len(whole), statistics.mean(whole) if whole else float("inf")


GAN = Measurement(
    name="gan",
    exhibit=papers.Exhibit(papers.RAPP, "Tables of GANs"),
    title="Small GANs on real images, trained by methods for min-max problems",
    summary="GANs trained by GDA, extragradient, RAPP and Lookahead, on digits or CIFAR-10",
    note=(
        "A ResNet generator and discriminator with spectral normalisation and the hinge loss, as in the images of "
        "Pethick, Xie and Cevher (2023), but narrow and trained for a few hundred steps: these numbers are not "
        "comparable with the paper's. The discriminator steps first, then the generator, and each inner step has new "
        "batches. The budget counts gradient evaluations of each player. The Fréchet distance compares `samples` "
        "images (fewer if fewer are held out) with the training images; the row of real images compares held-out ones. "
        "It is not the FID unless its features are named so. The base learning rates of methods with SGD are those of "
        "the authors' README (0.02 and 0.1); that of Adam, alpha and k are this package's choice. `scale` multiplies "
        "the learning rates of all methods, or of one (`EG=0.3`). Its defaults are for digits: for each method the "
        "factor among 0.1, 0.3, 1 and 3, and 10, 30 or 0.03 where the best one was at an end, with the smallest "
        "distance after 300 gradients with seed 100, which is not one of the study. EG was best with 0.03, and no "
        "better there than an untrained generator. Mean ± standard deviation over the seeds."
    ),
    settings={
        "data": "digits",
        "features": "convnet",
        "methods": ("GDA", "EG", "RAPP", "LA-GDA", "Adam", "ExtraAdam", "LA-ExtraAdam"),
        "seeds": 3,
        "first_seed": 0,
        "gradients": 600,
        "every": 60,
        "samples": 1000,
        "width": 16,
        "noise": 64,
        "batch_size": 32,
        "lr_g": 0.02,
        "lr_d": 0.1,
        "lr_adam": 5e-4,
        "scale": ("EG=0.03", "Adam=10", "ExtraAdam=3", "LA-ExtraAdam=3"),
        "inner": 3,
        "lam": 0.9,
        "k": 10,
        "alpha": 0.5,
        "threads": 1,
    },
    parts=_parts,
    measure=_measure,
    answer=_answer,
    columns={
        "method": lambda row: row["method"],
        "seeds": lambda row: "–" if row["method"] == REAL else str(row["seeds"]),
        "scale": lambda row: "–" if row["scale"] is None else f"{row['scale']:g}",
        "gradients": lambda row: "–" if row["method"] == REAL else str(row["gradients"]),
        "distance at the end": lambda row: _spread(row["ends"]),
        "best": lambda row: _spread(row["best"]),
        "features": lambda row: row["features"],
    },
    tabled=_summary,
    figures={
        "curves.png": ("Fréchet distance against gradient evaluations: mean and range over the seeds", curves),
        "samples.png": ("Images at the end of the first seed, below real ones", samples),
    },
)
