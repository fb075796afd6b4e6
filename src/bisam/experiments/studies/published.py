"""Published: numbers of the papers from public sources, and how the same quantity is read from a run.

Numbers that are missing here were not found in a public source, above all the accuracies in the tables of both papers.
No number is recollected, and none is derived except quotients of two numbers of the same source.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from math import nan
from typing import Any

from bisam.experiments.recipes.expressions import is_concurrent
from bisam.experiments.recipes.presets import CIFAR
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs.folder import Finished
from bisam.experiments.runs.results import headline, headline_score


@dataclass(frozen=True)
class Quantity:
    """A published quantity, and how it is read from a run."""

    title: str
    of: Callable[[Finished], float] | None = None
    """Reads the quantity from a run; None if a run does not contain it."""
    digits: int = 2
    relative: bool = False
    """Whether its quotient by SAM's value is compared, because it depends on the hardware or the length of the run."""


def _flips(first: int, last: int) -> Callable[[Finished], float]:
    return lambda run: max((row["flipped"] for row in run.metrics[first - 1 : last]), default=nan)


def _sequence(run: Finished) -> float:
    return sum(in_sequence(run.recipe, row.get("gradients", nan)) * row.get("losses", nan) for row in run.metrics)


def in_sequence(recipe: Recipe, gradients: float) -> float:
    """Gradients of a step that must be computed one after another."""
    return min(gradients, 1.0) if is_concurrent(recipe.expression) else gradients


def _top5(run: Finished) -> float:
    return 100 * run.result.get("scores", {}).get(headline(run.result), {}).get("top5", nan)


QUANTITIES = {
    "epoch": Quantity("time of an epoch", lambda run: run.result["relative_time"], relative=True),
    "run": Quantity("time of the run", lambda run: run.result["relative_time"] * len(run.metrics), relative=True),
    "sequence": Quantity("gradients one after another", _sequence, relative=True),
    "flips_100": Quantity("flipped training samples, epoch 100", _flips(100, 100), digits=0),
    "flips_peak": Quantity("flipped training samples, most in epochs 101 to 200", _flips(101, 200), digits=0),
    "flips_200": Quantity("flipped training samples, epoch 200", _flips(200, 200), digits=0),
    "validation": Quantity(
        "validation accuracy at the end (%)", lambda run: 100 * run.metrics[-1]["validation"], digits=1
    ),
    "top1": Quantity("top-1 accuracy (%)", lambda run: 100 * headline_score(run.result)),
    "top5": Quantity("top-5 accuracy (%)", _top5),
    "loss": Quantity("time of the ascent loss, forward and backward", relative=True),
}


@dataclass(frozen=True)
class Published:
    """A published number.

    Attributes:
        quantity: a key of `QUANTITIES`.
        method: regular expression for the methods of the recipes that it applies to.
        value: the number, or the lower end of a range.
        high: upper end of a range.
        std: standard deviation.
        sam: the number of SAM from the same source, if quotients are compared.
        where: fields of the recipes that it applies to, with their values, including defaults of the method; empty if
            no run measures it.
        setting: further conditions of the measurement.
        source: where the number was published.
    """

    quantity: str
    method: str
    value: float
    high: float | None = None
    std: float | None = None
    sam: float | None = None
    unit: str = ""
    where: Mapping[str, Any] = field(default_factory=dict[str, Any])
    setting: str = ""
    source: str = ""

    @property
    def text(self) -> str:
        """The number as text, with its spread or range."""
        digits = QUANTITIES[self.quantity].digits
        if self.sam is not None:
            return f"{self.value / self.sam:.{digits}f} ({self.value:,g} / {self.sam:,g}{self.unit})"
        ends = [f"{end:.{digits}f}" for end in (self.value, self.high) if end is not None]
        return " to ".join(ends) + ("" if self.std is None else f" ± {self.std:.{digits}f}")


_APPENDIX = "Xie et al., 2024, arXiv 2407.12993, appendix B, tables 11 and 12"
_FLIPS = "Xie et al., 2024, figure 2, read off figs/reverse0_resnet56.png of github.com/LIONS-EPFL/BiSAM"
_REPLY = "the BiSAM authors' reply to reviewers, hackmd.io/@oOkom9RcT0C6_AQaiqBWSw/HJpam3_in"
_SAMPA_TIME = "Xie, Pethick and Cevher, 2024, arXiv 2410.10683, read off the authors' figs/SAMPa_Time.png"
_SAMPA = "Xie, Pethick and Cevher, 2024, arXiv 2410.10683, read off the authors' figures"

_BISAM = "bisam_log|bisam_tanh"
_MSAM = r"|MSAM\(\d+, "  # as in the paper; the reply does not say whether its runs used micro-batches
_IMAGENET = {
    "sam": rf"sam{_MSAM}SAM\(.*",
    "bisam_log": rf"bisam_log{_MSAM}BiSAM\(((?!Tanh).)*",
    "bisam_tanh": rf"bisam_tanh{_MSAM}BiSAM\(.*Tanh.*",
}
_RESNET56 = {"dataset": "cifar10", "model": "resnet56"}
_FREE = {
    "method",
    "seed",
    "rho",
    "mu",
    "alpha",
    "eta",
    "cutout",
    "precision",
    "channels_last",
    "compile",
    "ema",
    "version",
}
_AS_THERE = {field.name: getattr(CIFAR, field.name) for field in fields(Recipe) if field.name not in _FREE}
_BOUNDS = {"bisam_log": {"mu": 1.0}, "bisam_tanh": {"mu": 10.0, "alpha": 0.1}}
_BY_SAMPA = {**_AS_THERE, "rho": 0.1}
_BY_DEFAULT = "200 epochs; the radius is not said, 0.1 is the default of their code"
_RESNET50 = {"dataset": "imagenet", "model": "torchvision:resnet50", "noise": 0.0, "limit": None}
_THIRD = "a third of ImageNet-1K, 90 epochs, batch 512, 2 runs"


def _epoch(model: str, sam: float, bisam: float) -> Published:
    where = {"dataset": "cifar10", "model": model}
    return Published(
        "epoch",
        _BISAM,
        bisam,
        sam=sam,
        unit=" s",
        where=where,
        setting="an A100; which BiSAM is not said",
        source=_APPENDIX,
    )


def _loss(framework: str, sam: float, bisam: float) -> Published:
    setting = f"{framework}, batch 128, 100 classes, 10,000 repetitions; which BiSAM is not said"
    return Published("loss", _BISAM, bisam, sam=sam, unit=" s", setting=setting, source=_APPENDIX)


def _flipped(method: str, at_100: tuple[float, float | None], peak: float, at_200: float) -> list[Published]:
    numbers = {"flips_100": at_100, "flips_peak": (peak, None), "flips_200": (at_200, None)}
    where = {**_AS_THERE, "rho": 0.05, **_BOUNDS.get(method, {})}
    setting = "ResNet-56, 200 epochs, the paper's radius and bounds"
    return [
        Published(quantity, method, value, high, where=where, setting=setting, source=_FLIPS)
        for quantity, (value, high) in numbers.items()
    ]


def _imagenet(method: str, top1: tuple[float, float], top5: tuple[float, float]) -> list[Published]:
    return [
        Published(quantity, _IMAGENET[method], value, std=std, where=_RESNET50, setting=_THIRD, source=_REPLY)
        for quantity, (value, std) in {"top1": top1, "top5": top5}.items()
    ]


def _sampa(
    method: str, seconds: float, gradients: float | None, validation: tuple[float, float | None] | None, how: str = ""
) -> list[Published]:
    setting = f"200 epochs{how}"
    found = [
        Published("run", method, seconds, sam=3760, unit=" s", where=_RESNET56, setting=setting, source=_SAMPA_TIME)
    ]
    if validation is not None:
        low, high = validation
        found.append(Published("validation", method, low, high, where=_BY_SAMPA, setting=_BY_DEFAULT, source=_SAMPA))
    if gradients is not None:
        found.append(
            Published("sequence", method, gradients, sam=140_800, where=_RESNET56, setting="200 epochs", source=_SAMPA)
        )
    return found


PUBLISHED: tuple[Published, ...] = (
    _epoch("densenet121", 58, 64),
    _epoch("resnet56", 23, 30),
    _epoch("vgg19_bn", 10, 16),
    _epoch("wrn28_2", 19, 21),
    _epoch("wrn28_10", 65, 71),
    _loss("PyTorch", 2.40, 3.96),
    _loss("TensorFlow", 3.25, 2.34),
    *_flipped("sam", (1250, 1310), 1595, 1220),
    *_flipped("bisam_tanh", (1300, None), 1700, 1505),
    *_flipped("bisam_log", (1480, None), 1890, 1485),
    *_imagenet("sam", (66.62, 0.43), (87.68, 0.25)),
    *_imagenet("bisam_tanh", (66.64, 0.80), (87.68, 0.46)),
    *_imagenet("bisam_log", (66.71, 0.21), (87.75, 0.19)),
    Published("validation", "sam", 94.0, where=_BY_SAMPA, setting=_BY_DEFAULT, source=_SAMPA),
    *_sampa("sampa", 2340, 70_400, (94.4, 94.7), ", SAMPa on two devices"),
    *_sampa("ae_sam", 2480, 92_000, (94.4, 94.7)),
    *_sampa("esam", 3110, None, (94.4, 94.7)),
    *_sampa("looksam", 3300, 84_500, (91.6, None)),
    *_sampa("mesa", 3160, 70_400, (94.4, 94.7)),
    *_sampa("saf", 2050, 70_400, None, "; read as 2,050 to 2,100 s, because its curve is hidden behind others"),
)
