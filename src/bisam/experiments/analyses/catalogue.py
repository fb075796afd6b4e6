"""Catalogue: the analyses by name.

An analysis is added here, with its measures, its columns in reports and its figure, and is then known to
`bisam analyse`, `bisam report` and `bisam plot`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from math import nan
from typing import TYPE_CHECKING, Any, cast

from bisam import L2, Adaptive
from bisam.analysis import (
    Calibration,
    Corruptions,
    Eigenvalues,
    FeatureRank,
    Flips,
    GradientNorm,
    Landscape,
    Margins,
    Sharpness,
    SpectralDensity,
    Trace,
    ZeroOneSharpness,
    average_sharpness,
    calibration,
    corruptions,
    eigenvalues,
    feature_rank,
    flips,
    gradient_norm,
    landscape,
    margins,
    sharpness,
    spectral_density,
    trace,
    zero_one_sharpness,
)
from bisam.analysis.samples import Progress, Result
from bisam.experiments.analyses import figures
from bisam.experiments.analyses.settings import Settings
from bisam.experiments.errors import unknown
from bisam.objectives import Objective

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from bisam.experiments.analyses.subject import Subject

DRAWS = 20
"""Random directions and random vectors of an average."""

ADAPTIVE = 10
"""Radius of ASAM's ball in units of rho: the ratio of the defaults of Kwon et al. (2021), 0.5 for SAM's 0.05."""

Results = Mapping[str, Mapping[str, Any]]
"""The results of an analysis by name, as `to_dict` gave them."""


@dataclass(frozen=True)
class Measure:
    """One of the results of an analysis.

    Attributes:
        title: what is measured, for the display of progress.
        kind: the type of the result.
        call: computes it; the settings have one radius.
    """

    title: str
    kind: type[Result]
    call: Callable[[Subject, Settings, Progress], Result]


@dataclass(frozen=True)
class Column:
    """A number of an analysis in reports.

    Attributes:
        title: head of the column; unique among all analyses.
        read: takes it from the results, in which numbers that are not finite are nan.
        about: what it is, for the report.
        percent: whether it is a share of 1, which is shown in per cent.
        brief: whether it is shown in the table of a terminal.
    """

    title: str
    read: Callable[[Results], float]
    about: str = ""
    percent: bool = False
    brief: bool = False

    def value(self, results: Results) -> float:
        """Return the number; nan if it is not finite."""
        return float(self.read(_with_nan(results)))


def _with_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _with_nan(part) for key, part in cast("Mapping[str, Any]", value).items()}
    if isinstance(value, list):
        return [_with_nan(part) for part in cast("list[Any]", value)]
    return nan if value is None else value


@dataclass(frozen=True)
class Analysis:
    """A set of measures that are computed together, with the same settings.

    Attributes:
        title: what it is.
        measures: the results by name, in the order in which they are computed.
        columns: its numbers in reports.
        draw: draws its figure from the results; None if it has none.
        settings: names of the settings that it has besides the shared ones: rho, steps.
        packages: packages that it imports, from the extra `analysis`.
        default: whether `bisam analyse` computes it if no analysis is named.
        version: raised by a change that gives other results with the same settings; older ones are computed again.
    """

    title: str
    measures: Mapping[str, Measure]
    columns: tuple[Column, ...] = ()
    draw: Callable[[Mapping[str, Any]], Figure] | None = None
    settings: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    default: bool = True
    version: int = 1

    def restored(self, results: Results) -> dict[str, Result]:
        """Return the results from what their `to_dict` gave.

        Raises:
            ValueError: they are not those of this analysis.
        """
        if results.keys() != self.measures.keys():
            raise ValueError(f"results are {', '.join(results)}, not {', '.join(self.measures)}")
        return {name: self.measures[name].kind.from_dict(values) for name, values in results.items()}

    def numbers(self, results: Results) -> dict[str, float]:
        """Return the numbers of its columns by their titles; nan where one is not finite."""
        return {column.title: column.value(results) for column in self.columns}


_Value = Callable[["Subject", Settings], Any]


def _measure(title: str, kind: type[Result], call: Callable[..., Any], **how: _Value) -> Measure:
    """A measure by a function of `bisam.analysis`, with arguments that depend on the subject and the settings."""

    def measured(subject: Subject, settings: Settings, progress: Progress) -> Result:
        values = {name: value(subject, settings) for name, value in how.items()}
        return call(subject.oracle, subject.batches, seed=settings.seed, progress=progress, **values)

    return Measure(title, kind, measured)


def _always(value: Any) -> _Value:
    return lambda subject, settings: value


def _ball(subject: Subject, settings: Settings) -> L2:
    return L2(settings.radius)


def _asam(subject: Subject, settings: Settings) -> Adaptive:
    return Adaptive(ADAPTIVE * settings.radius)


def _steps(subject: Subject, settings: Settings) -> int:
    return settings.steps


def _batch(subject: Subject, settings: Settings) -> int:
    return min(settings.batch_size, len(subject.split))


def _loss(subject: Subject, settings: Settings) -> Objective:
    return subject.oracle.loss


def _at(*keys: str | int) -> Callable[[Results], float]:
    """The number at a place in the results."""

    def read(found: Results) -> float:
        value: Any = found
        for key in keys:
            value = value[key]
        return value

    return read


_SHARPNESS = Analysis(
    "rise of the loss in balls",
    {
        "one": _measure("1 step", Sharpness, sharpness, perturb=_ball),
        "many": _measure("many steps", Sharpness, sharpness, perturb=_ball, steps=_steps),
        "average": _measure("random directions", Sharpness, average_sharpness, perturb=_ball, draws=_always(DRAWS)),
        "adaptive": _measure("ASAM's ball", Sharpness, sharpness, perturb=_asam, steps=_steps),
        "m": _measure("m-sharpness", Sharpness, sharpness, perturb=_ball, m=_batch),
        "normalized": _measure(
            "normalised logits", Sharpness, sharpness, perturb=_ball, steps=_steps, normalized=_always(True)
        ),
    },
    columns=(
        Column("loss", _at("one", "loss"), "the descent loss at the weights"),
        Column("rise, 1 step", _at("one", "rise"), "the rise of the loss after one step of SAM to the radius"),
        Column(
            "rise",
            _at("many", "rise"),
            "the largest rise of the loss in the ball that projected ascent finds",
            brief=True,
        ),
        Column(
            "mean rise", _at("average", "rise"), f"the mean rise of the loss in {DRAWS} random directions at the radius"
        ),
        Column(
            "rise, adaptive",
            _at("adaptive", "rise"),
            f"the same as rise, in ASAM's ball of {ADAPTIVE} times the radius",
        ),
        Column(
            "rise, m",
            _at("m", "rise"),
            "the rise after one step, where each batch has a ball of its own: the mean over the batches",
        ),
        Column(
            "rise, normalised",
            _at("normalized", "rise"),
            "the same as rise, for the loss of logits that are divided by their standard deviation",
        ),
    ),
    draw=figures.of_sharpness,
    settings=("rho", "steps"),
)

_ZERO_ONE = Analysis(
    "largest error in a ball",
    {"worst": _measure("three adversaries", ZeroOneSharpness, zero_one_sharpness, perturb=_ball, steps=_steps)},
    columns=(
        Column("error", _at("worst", "error"), "the share of the examples that are classified wrongly", percent=True),
        Column(
            "largest error",
            _at("worst", "worst"),
            "the largest error in the ball that three adversaries find, a lower bound of the largest one",
            percent=True,
        ),
        Column(
            "0-1 rise",
            lambda found: found["worst"]["worst"] - found["worst"]["error"],
            "the largest error minus the error",
            percent=True,
            brief=True,
        ),
    ),
    draw=figures.of_zero_one,
    settings=("rho", "steps"),
)


def _flipped(name: str) -> Callable[[Results], float]:
    return lambda found: found["flips"]["flipped"][name] / max(found["flips"]["examples"], 1)


_FLIPS = Analysis(
    "predictions that one step of each adversary changes",
    {"flips": _measure("four adversaries", Flips, flips, perturb=_ball)},
    columns=(
        Column(
            "flips, SAM",
            _flipped("loss"),
            "the share of the examples that are correct, and wrong after one step to the radius along the gradient of "
            "the descent loss; each batch has a step of its own",
            percent=True,
            brief=True,
        ),
        Column(
            "flips, cross-entropy",
            _flipped("cross-entropy"),
            "the same along the gradient of cross-entropy without label smoothing",
            percent=True,
        ),
        Column("flips, -log", _flipped("-log"), "the same along that of BiSAM (-log)", percent=True, brief=True),
        Column("flips, tanh", _flipped("tanh"), "the same along that of BiSAM (tanh)", percent=True),
        Column(
            "cosine, SAM and -log",
            _at("flips", "cosines", "loss", "-log"),
            "the cosine of the angle between the steps of both",
        ),
    ),
    draw=figures.of_flips,
    settings=("rho",),
)

_HESSIAN = Analysis(
    "largest eigenvalues and trace of the Hessian",
    {
        "eigenvalues": _measure("largest eigenvalues", Eigenvalues, eigenvalues, k=_always(3)),
        "trace": _measure("trace", Trace, trace, draws=_always(DRAWS)),
    },
    columns=(
        Column("largest eigenvalue", _at("eigenvalues", "values", 0), "of the Hessian of the descent loss", brief=True),
        Column(
            "trace",
            _at("trace", "value"),
            f"of the Hessian of the descent loss, estimated with {DRAWS} random vectors",
            brief=True,
        ),
    ),
    packages=("curvlinops", "scipy"),
)

_SPECTRUM = Analysis(
    "density of the eigenvalues of the Hessian",
    {"density": _measure("spectral density", SpectralDensity, spectral_density, vectors=_always(32))},
    draw=figures.of_spectrum,
    packages=("curvlinops", "scipy"),
    default=False,  # it takes longer than all others together
)

_LANDSCAPE = Analysis(
    "loss and error along directions",
    {
        "random": _measure("a random direction", Landscape, landscape),
        "ascent": _measure("the direction of SAM's adversary", Landscape, landscape, along=_loss),
        "plane": _measure(
            "two random directions", Landscape, landscape, along=_always(("random", "random")), points=_always(15)
        ),
    },
    draw=figures.of_landscape,
)

_MARGINS = Analysis(
    "margins between the label and the largest other logit",
    {
        "plain": _measure("margins", Margins, margins),
        "normalized": _measure("margins of normalised logits", Margins, margins, normalized=_always("logits")),
    },
    columns=(
        Column(
            "median margin",
            _at("plain", "quantiles", 50),
            "the median of the logit of the label minus the largest other logit",
            brief=True,
        ),
        Column(
            "10th percentile of margins", _at("plain", "quantiles", 10), "a tenth of the examples have a smaller margin"
        ),
        Column(
            "median margin, normalised",
            _at("normalized", "quantiles", 50),
            "the same as median margin, of logits that are divided by their standard deviation",
        ),
        Column(
            "10th percentile of margins, normalised", _at("normalized", "quantiles", 10), "the same for these logits"
        ),
    ),
    draw=figures.of_all,
)

_FEATURE_MARGINS = Analysis(
    "distances to the decision boundary among the features of the last layer",
    {"features": _measure("margins of features", Margins, margins, normalized=_always("features"))},
    columns=(
        Column(
            "median margin, features",
            _at("features", "quantiles", 50),
            "the median distance to the decision boundary among the inputs of the last layer, divided by their spread",
            brief=True,
        ),
    ),
    draw=figures.of_all,
    default=False,  # the last layer must be linear
)

_CALIBRATION = Analysis(
    "calibration of the confidence",
    {"calibration": _measure("calibration", Calibration, calibration)},
    columns=(
        Column(
            "ECE",
            _at("calibration", "ece"),
            "the expected calibration error, in 15 bins of the confidence",
            percent=True,
            brief=True,
        ),
        Column("MCE", _at("calibration", "mce"), "the largest calibration error of a bin", percent=True),
        Column(
            "Brier score",
            _at("calibration", "brier"),
            "the mean of the sum over the classes of squared errors of the probabilities, in [0, 2]",
        ),
        Column("NLL", _at("calibration", "nll"), "the mean negative log-likelihood of the labels, in nats"),
        Column(
            "confidence", _at("calibration", "confidence"), "the mean probability of the predicted class", percent=True
        ),
    ),
    draw=figures.of_all,
    packages=("torchmetrics",),
)

_RANK = Analysis(
    "rank of the features of the last layer",
    {"rank": _measure("feature rank", FeatureRank, feature_rank)},
    columns=(
        Column(
            "feature rank",
            _at("rank", "components"),
            "the number of principal components that explain 99 % of the variance of the inputs of the last layer",
            brief=True,
        ),
        Column(
            "stable rank",
            _at("rank", "stable"),
            "the sum of the squared singular values of these inputs divided by the largest one",
        ),
        Column("effective rank", _at("rank", "effective"), "the exponential of the entropy of these singular values"),
    ),
    draw=figures.of_all,
)


def _gradients(subject: Subject, settings: Settings, progress: Progress) -> Result:
    batches = subject.shuffled(settings.batch_size, settings.seed)  # the noise scale takes them as random samples
    return gradient_norm(subject.oracle, batches, seed=settings.seed, progress=progress)


_GRADIENT = Analysis(
    "norms of gradients, and the noise scale",
    {"gradient": Measure("gradients", GradientNorm, _gradients)},
    columns=(
        Column(
            "gradient norm",
            _at("gradient", "norm"),
            "the norm of the gradient of the mean loss of all examples",
            brief=True,
        ),
        Column(
            "gradient norm of batches", _at("gradient", "mean"), "the mean of the norms of the gradients of batches"
        ),
        Column(
            "noise scale",
            _at("gradient", "noise_scale"),
            "the batch size beyond which larger batches save few steps; not given above the number of examples",
        ),
    ),
    draw=figures.of_all,
)


def _statistics(subject: Subject) -> tuple[Sequence[float], Sequence[float]]:
    if (statistics := subject.split.statistics) is None:
        raise ValueError(f"corruptions are those of images, and {subject.recipe.dataset!r} has none: leave them out")
    return statistics


_CORRUPTIONS = Analysis(
    "error under corruptions of images",
    {
        "corruptions": _measure(
            "corruptions of images",
            Corruptions,
            corruptions,
            mean=lambda subject, settings: _statistics(subject)[0],
            std=lambda subject, settings: _statistics(subject)[1],
        )
    },
    columns=(
        Column(
            "mean error, corrupted",
            _at("corruptions", "mean_error"),
            "the mean error under seven corruptions at five severities; it is no result on CIFAR-10-C",
            percent=True,
            brief=True,
        ),
    ),
    draw=figures.of_all,
    packages=("torchvision",),
    default=False,  # of images only, in 36 forward passes
)

ANALYSES: dict[str, Analysis] = {
    "sharpness": _SHARPNESS,
    "zero-one": _ZERO_ONE,
    "flips": _FLIPS,
    "hessian": _HESSIAN,
    "spectrum": _SPECTRUM,
    "landscape": _LANDSCAPE,
    "margins": _MARGINS,
    "feature-margins": _FEATURE_MARGINS,
    "calibration": _CALIBRATION,
    "rank": _RANK,
    "gradient": _GRADIENT,
    "corruptions": _CORRUPTIONS,
}
"""By name, in the order in which they are computed."""

DEFAULT = tuple(name for name, analysis in ANALYSES.items() if analysis.default)
"""The analyses that `bisam analyse` computes if none is named."""


def known(names: Iterable[str]) -> list[str]:
    """Return names of analyses, each once, in the order of `ANALYSES`.

    Raises:
        ValueError: a name is unknown, there is none, or a package that an analysis needs is not installed.
    """
    wanted = list(names)
    for name in wanted:
        if name not in ANALYSES:
            raise unknown("analysis", name, ANALYSES)
    if not wanted:
        raise ValueError(f"no analysis is named: give some of {', '.join(ANALYSES)}")
    if absent := [(name, package) for name in wanted for package in _absent(ANALYSES[name].packages)]:
        name, package = absent[0]
        raise ValueError(f'{name} needs {package}: pip install "bisam[analysis]"')
    return [name for name in ANALYSES if name in wanted]


def _absent(packages: Sequence[str]) -> list[str]:
    return [package for package in packages if find_spec(package) is None]
