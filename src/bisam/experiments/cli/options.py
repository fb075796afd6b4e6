"""Flags that several commands share, and the flags of `bisam run`."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from bisam.experiments.cli import completion
from bisam.experiments.cli.flags import Whole
from bisam.experiments.cli.groups import MACHINE, OUTPUT, RECIPE
from bisam.experiments.recipes.changes import pairs
from bisam.experiments.runs.machine import Machine

Out = Annotated[Path, Parameter(group=OUTPUT, help="Folder that the run folders are in.")]
In = Annotated[
    Path, Parameter(name="--out", group=OUTPUT, help="Folder that the run folders are in, or an archive of them.")
]
Changes = Annotated[
    tuple[str, ...],
    Parameter(
        name="--set",
        negative="",
        help="Change a field of all recipes, as in --set epochs=1. The fields are the flags of bisam train.",
    ),
]
Config = Annotated[
    Path | None,
    Parameter(
        group=RECIPE,
        help="A file of fields to change in all recipes, TOML or JSON, such as the recipe.json of a run. Its method "
        "with its settings, and its seed, are left out; --set and --epochs take precedence.",
    ),
]
StudyName = Annotated[str, Parameter(completer=completion.studies)]
Quiet = Annotated[
    bool, Parameter(negative="", group=OUTPUT, help="Show no progress: only results, errors and warnings.")
]
Verbose = Annotated[
    bool, Parameter(negative="", group=OUTPUT, help="Show a line for each epoch, above the bar if there is one.")
]
MachineFlags = Annotated[Machine, Parameter(name="*", group=MACHINE)]
Given = Annotated[frozenset[str], Parameter(parse=False)]
"""Names of the flags on the command line, as in `data_dir`; `main` fills them in."""


DatasetName = Annotated[str, Parameter(completer=completion.datasets)]
ModelName = Annotated[str, Parameter(completer=completion.models)]


@dataclass(frozen=True)
class DeviceFlags:
    """Where `bisam evaluate` and `bisam predict` compute, and read data."""

    device: str = "cpu"
    """Device: cpu, cuda, cuda:1, mps, ... or auto."""
    data_dir: Path = Machine().data_dir
    """Folder of the data sets. The environment variable BISAM_DATA sets the default."""
    download: Annotated[bool, Parameter(negative="")] = False
    """Download a data set that is needed and missing in the data folder."""
    loaders: Whole = 0
    """Processes that read and decode image files."""

    def machine(self) -> Machine:
        """Return the machine.

        Raises:
            ValueError: the device is missing.
        """
        machine = Machine(
            device=self.device, data_dir=self.data_dir, download=self.download, loaders=self.loaders, log=()
        )
        machine.fabric()
        return machine


_MOST = 10**4
"""Largest number of seeds, workers and runs of a stack: a slip of the hand would fill the memory without a message."""


@dataclass(frozen=True)
class Launch:
    """How `bisam run` runs a study or a measurement.

    Raises:
        ValueError: a number is out of range.
    """

    changes: Changes = ()
    """Fields of its recipes to change; with other values the runs are separate from the study's own."""
    config: Config = None
    seeds: Whole | None = None
    """Seeds per recipe; by default the study's own number."""
    epochs: Whole | None = None
    """Epochs per run, of which SGD has twice as many where the study says so; by default the study's own number."""
    workers: Whole | None = None
    """Runs at a time, each in a process; by default one per core, or per GPU with --device cuda."""
    stack: Whole | None = None
    """Number of seeds of a recipe that are trained at once, as one batched model: for small networks (model mlp)."""
    ray: str | None = None
    """Run on a Ray cluster instead: local, auto or its address."""
    gpus: float = 0
    """GPUs of each run on the cluster; 0.25 puts four runs on one GPU."""
    cpus: Whole = 1
    """CPUs of each run on the cluster."""
    retries: Whole = 3
    """How often a run is restarted on the cluster after its worker was lost."""
    dry_run: Annotated[bool, Parameter(negative="")] = False
    """Run nothing: show the runs, and then an estimate of their times from a few measured steps."""
    estimate: bool = True
    """Whether --dry-run measures times, which loads the data."""

    quiet: Quiet = False
    verbose: Verbose = False

    def __post_init__(self) -> None:
        refuse_contradiction(self.quiet, self.verbose)
        for name in ("seeds", "epochs", "workers", "stack"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"--{name} must be at least 1, got {value}")
            if value is not None and value > _MOST and name != "epochs":
                raise ValueError(f"--{name} must be at most {_MOST:,}, got {value}")
        for name, least in (("gpus", 0), ("cpus", 1), ("retries", 0)):
            if not least <= (value := getattr(self, name)) < inf:
                raise ValueError(f"--{name} must be at least {least} and finite, got {value}")


def with_file(config: Path | None, changes: tuple[str, ...], epochs: int | None = None) -> tuple[str, ...]:
    """Return the changes of a file and of `--set`, which takes precedence.

    If `--set` or `--epochs` changes the length, neither `epochs` nor `steps` of the file is used.

    Raises:
        ValueError: the file or one of its fields is refused.
    """
    if config is None:
        return changes
    from bisam.experiments.recipes.config import changes as of_file  # not at the top: it needs torch

    given = pairs(changes, "epochs=1").keys()
    if epochs is not None or given & {"epochs", "steps"}:
        given |= {"epochs", "steps"}
    texts, _ = of_file(config)
    return *(text for text in texts if text.partition("=")[0] not in given), *changes


def refuse_contradiction(quiet: bool, verbose: bool) -> None:
    """Refuse to be both quiet and verbose.

    Raises:
        ValueError: both are given.
    """
    if quiet and verbose:
        raise ValueError("--quiet shows no progress and --verbose shows more of it: leave one out")


def flag(name: str) -> str:
    """A flag as it is typed: `--data-dir` for `data_dir`."""
    return f"--{name.replace('_', '-')}"
