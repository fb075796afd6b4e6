"""Catalogue: the analyses by name.

An analysis is added here, with its measures, its columns in reports and its figure, and is then known to
`bisam analyse`, `bisam report` and `bisam plot`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from math import nan
from typing import TYPE_CHECKING, Any

from bisam import L2, Adaptive
from bisam.analysis import (
    Eigenvalues,
    Flips,
    Landscape,
    Sharpness,
    SpectralDensity,
    Trace,
    ZeroOneSharpness,
    average_sharpness,
    eigenvalues,
    flips,
    landscape,
    sharpness,
    spectral_density,
    trace,
    zero_one_sharpness,
)
from bisam.analysis.samples import Progress, Result
from bisam.experiments.analyses import figures
from bisam.experiments.analyses.settings import Settings
from bisam.experiments.analyses.subject import Subject
from bisam.experiments.errors import unknown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
        read: takes it from the results.
        percent: whether it is a share of 1, which is shown in per cent.
        brief: whether it is shown in the table of a terminal.
    """

    title: str
    read: Callable[[Results], float | None]
    percent: bool = False
    brief: bool = False

    def value(self, results: Results) -> float:
        """Return the number; nan if it is not finite."""
        found = self.read(results)
        return nan if found is None else float(found)


@dataclass(frozen=True)
class Analysis:
    """What is measured together, with the same settings.

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


def _sharpness(title: str, perturb: Callable[[Settings], Any], **how: Callable[[Settings], Any]) -> Measure:
    def call(subject: Subject, settings: Settings, progress: Progress) -> Result:
        values = {name: value(settings) for name, value in how.items()}
        return sharpness(
            subject.oracle, subject.batches, perturb(settings), seed=settings.seed, progress=progress, **values
        )

    return Measure(title, Sharpness, call)


def _ball(settings: Settings) -> Any:
    return L2(settings.radius)


def _steps(settings: Settings) -> int:
    return settings.steps


def _of(call: Callable[..., Result], **how: Any) -> Callable[[Subject, Settings, Progress], Result]:
    """A measure without radius."""
    return lambda subject, settings, progress: call(
        subject.oracle, subject.batches, seed=settings.seed, progress=progress, **how
    )


_SHARPNESS = Analysis(
    "rise of the loss in balls",
    {
        "one": _sharpness("1 step", _ball),
        "many": _sharpness("many steps", _ball, steps=_steps),
        "average": Measure(
            "random directions",
            Sharpness,
            lambda subject, settings, progress: average_sharpness(
                subject.oracle, subject.batches, _ball(settings), seed=settings.seed, progress=progress
            ),
        ),
        "adaptive": _sharpness("ASAM's ball", lambda settings: Adaptive(ADAPTIVE * settings.radius), steps=_steps),
        # The batches may be smaller than the batch size, if there are fewer examples.
        "m": Measure(
            "m-sharpness",
            Sharpness,
            lambda subject, settings, progress: sharpness(
                subject.oracle,
                subject.batches,
                _ball(settings),
                m=min(settings.batch_size, len(subject.split)),
                seed=settings.seed,
                progress=progress,
            ),
        ),
        "normalized": _sharpness("normalised logits", _ball, steps=_steps, normalized=lambda _: True),
    },
    columns=(
        Column("loss", lambda found: found["one"]["loss"]),
        Column("rise, 1 step", lambda found: found["one"]["rise"]),
        Column("rise", lambda found: found["many"]["rise"], brief=True),
        Column("mean rise", lambda found: found["average"]["rise"]),
        Column("rise, adaptive", lambda found: found["adaptive"]["rise"]),
        Column("rise, m", lambda found: found["m"]["rise"]),
        Column("rise, normalised", lambda found: found["normalized"]["rise"]),
    ),
    draw=figures.of_sharpness,
    settings=("rho", "steps"),
)

_ZERO_ONE = Analysis(
    "largest error in a ball",
    {
        "worst": Measure(
            "three adversaries",
            ZeroOneSharpness,
            lambda subject, settings, progress: zero_one_sharpness(
                subject.oracle,
                subject.batches,
                _ball(settings),
                steps=settings.steps,
                seed=settings.seed,
                progress=progress,
            ),
        )
    },
    columns=(
        Column("error", lambda found: found["worst"]["error"], percent=True),
        Column("largest error", lambda found: found["worst"]["worst"], percent=True),
        Column("0-1 rise", lambda found: found["worst"]["worst"] - found["worst"]["error"], percent=True, brief=True),
    ),
    draw=figures.of_zero_one,
    settings=("rho", "steps"),
)


def _flipped(name: str) -> Callable[[Results], float]:
    return lambda found: found["flips"]["flipped"][name] / max(found["flips"]["examples"], 1)


_FLIPS = Analysis(
    "predictions that one step of each adversary changes",
    {
        "flips": Measure(
            "four adversaries",
            Flips,
            lambda subject, settings, progress: flips(
                subject.oracle, subject.batches, _ball(settings), seed=settings.seed, progress=progress
            ),
        )
    },
    columns=(
        Column("flips, SAM", _flipped("loss"), percent=True, brief=True),
        Column("flips, cross-entropy", _flipped("cross-entropy"), percent=True),
        Column("flips, -log", _flipped("-log"), percent=True, brief=True),
        Column("flips, tanh", _flipped("tanh"), percent=True),
        Column("cosine, SAM and -log", lambda found: found["flips"]["cosines"]["loss"]["-log"]),
    ),
    draw=figures.of_flips,
    settings=("rho",),
)

_HESSIAN = Analysis(
    "largest eigenvalues and trace of the Hessian",
    {
        "eigenvalues": Measure("largest eigenvalues", Eigenvalues, _of(eigenvalues, k=3)),
        "trace": Measure("trace", Trace, _of(trace, draws=20)),
    },
    columns=(
        Column("largest eigenvalue", lambda found: found["eigenvalues"]["values"][0], brief=True),
        Column("trace", lambda found: found["trace"]["value"], brief=True),
    ),
    packages=("curvlinops", "scipy"),
)

_SPECTRUM = Analysis(
    "density of the eigenvalues of the Hessian",
    {"density": Measure("spectral density", SpectralDensity, _of(spectral_density, vectors=32))},
    draw=figures.of_spectrum,
    packages=("curvlinops", "scipy"),
    default=False,  # it takes longer than all others together
)

_LANDSCAPE = Analysis(
    "loss and error along directions",
    {
        "random": Measure("a random direction", Landscape, _of(landscape)),
        "ascent": Measure(
            "the direction of SAM's adversary",
            Landscape,
            lambda subject, settings, progress: landscape(
                subject.oracle, subject.batches, subject.oracle.loss, seed=settings.seed, progress=progress
            ),
        ),
        "plane": Measure("two random directions", Landscape, _of(landscape, along=("random", "random"), points=15)),
    },
    draw=figures.of_landscape,
)

ANALYSES: dict[str, Analysis] = {
    "sharpness": _SHARPNESS,
    "zero-one": _ZERO_ONE,
    "flips": _FLIPS,
    "hessian": _HESSIAN,
    "spectrum": _SPECTRUM,
    "landscape": _LANDSCAPE,
}
"""By name, in the order in which they are computed."""

DEFAULT = tuple(name for name, analysis in ANALYSES.items() if analysis.default)
"""What is computed if nothing is named."""


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
