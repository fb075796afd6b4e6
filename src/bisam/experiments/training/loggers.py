"""Loggers: where the metrics of a run go besides its metrics.csv, by the name of the package that takes them.

What a resumed run finds missing there is made up for from metrics.csv: a service that was down or a process that was
killed leaves no gap, and a logger that joins later gets the run from its first epoch.
"""

from __future__ import annotations

import logging
import os
import time
import uuid
import warnings
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock

from bisam.experiments.errors import unknown
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs.folder import Run, write


class Logger(Protocol):
    """What takes metrics."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Metrics of epoch `step`."""
        ...

    def close(self) -> None:
        """Nothing follows."""
        ...


class TensorBoard:
    """Event files in `folder/tensorboard`."""

    def __init__(self, folder: Path, recipe: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self._writer: SummaryWriter | None = None
        self._open, self._folder = SummaryWriter, folder / "tensorboard"
        # What is there is whole up to the checkpoint: an epoch is flushed before it is saved.
        self.epochs = None if any(self._folder.glob("events.*")) else 0

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Scalars of epoch `step`."""
        if self._writer is None:  # what a killed process wrote from this epoch on is to be forgotten
            # Files are read in the order of their names, which begin with the second and go on with the process.
            while any(self._folder.glob(f"events.out.tfevents.{int(time.time())}.*")):
                time.sleep(0.05)
            self._writer = self._open(str(self._folder), purge_step=step)
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Write what is left."""
        if self._writer is not None:
            self._writer.close()


class WandB:
    """A run of Weights & Biases, in the project `WANDB_PROJECT` or bisam; its files are in `folder/wandb`.

    With WANDB_MODE=offline nothing is sent. Each offline part of a resumed run has all epochs up to its end: the last
    one is enough for `wandb sync`.
    """

    def __init__(self, folder: Path, recipe: Mapping[str, Any]) -> None:
        wandb: Any = import_module("wandb")
        *_, study, slug, seed = folder.resolve().parts
        known = folder / "wandb.id"
        if not known.exists():  # chosen anew if the folder is made anew: wandb gives no id twice
            write(known, uuid.uuid4().hex[:12])
        # Else it waits for a network that is gone for days; what was not sent stays in the folder.
        patience = {"finish_timeout": 60} if "finish_timeout" in wandb.Settings.model_fields else {}
        wandb.setup(wandb.Settings(silent=True))  # the session has a say of its own
        try:
            self._run: Any = wandb.init(
                dir=str(folder),
                project=os.environ.get("WANDB_PROJECT") or "bisam",
                id=known.read_text(),
                name=f"{slug}/{seed}"[-128:],
                group=slug[-128:],
                tags=[study[-64:]],
                config=dict(recipe),
                resume="allow",
                reinit="finish_previous",  # of a run that failed in this process; by default it would go on
                settings={"silent": True, "console": "off", **patience},
            )
        except wandb.errors.UsageError as error:
            raise ValueError(f"--log wandb: {error} Without an account, set WANDB_MODE=offline") from error
        self.epochs: int | None = max(0, self._run.step - 1)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """One row of its history; without commit it would keep it until the next."""
        self._run.log(dict(metrics), step=step, commit=True)

    def close(self) -> None:
        """Send what is left and mark the run as finished."""
        self._run.finish()


class MLflow:
    """A run of MLflow, at MLFLOW_TRACKING_URI or in `mlflow.db` beside the study's run folders.

    On a cluster give a server's address: SQLite and network file systems do not go together.
    """

    def __init__(self, folder: Path, recipe: Mapping[str, Any]) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")  # seconds: training waits; by default minutes
        mlflow: Any = import_module("mlflow")
        self._entities, self._error = mlflow.entities, mlflow.exceptions.MlflowException
        study = folder.resolve().parents[1]
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        # Two processes that make the same tables break both.
        with FileLock(study / ".mlflow.lock"), _hushed(), no_litter(Path("mlruns")):
            self._client = mlflow.MlflowClient(uri or f"sqlite:///{study / 'mlflow.db'}")
            run = self._found(folder / "mlflow.id")
            if run is None:
                run = self._client.create_run(
                    self._experiment(None if uri else (study / "mlartifacts").as_uri()),
                    run_name=f"{folder.parent.name}/{folder.name}",
                    tags={"study": study.name, "mlflow.source.name": "bisam"},
                )
                params = [self._entities.Param(k, str(v)) for k, v in recipe.items()]
                self._client.log_batch(run.info.run_id, params=params)
                write(folder / "mlflow.id", run.info.run_id)
        self._id = run.info.run_id
        self.epochs: int | None = int(run.data.metrics.get("epoch", 0))

    def _experiment(self, artifacts: str | None) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "bisam"
        if (found := self._client.get_experiment_by_name(name)) is not None:
            return found.experiment_id
        return self._client.create_experiment(name, artifact_location=artifacts)

    def _found(self, known: Path) -> Any:
        """The run that was begun, unless it was at another place or is deleted."""
        if not known.exists():
            return None
        try:
            run = self._client.get_run(known.read_text())
        except self._error as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        return run if run.info.lifecycle_stage == "active" else None

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Metrics of epoch `step`, and last its number, by which a resumed run knows what is there."""
        now = int(1000 * time.time())
        metric, values = self._entities.Metric, {**metrics, "epoch": step}
        self._client.log_batch(self._id, metrics=[metric(k, float(v), now, step) for k, v in values.items()])

    def close(self) -> None:
        """Mark the run as finished."""
        self._client.set_terminated(self._id)


@contextmanager
def _hushed() -> Generator[None]:
    """Without what libraries log; alembic, which makes the tables, sets levels and handlers of its own."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


@contextmanager
def no_litter(folder: Path) -> Generator[None]:
    """Without an empty folder that appears in the block: MLflow's place for artifacts, wherever the command is run."""
    was_there = folder.exists()
    yield
    if not was_there:
        with suppress(OSError):
            folder.rmdir()


_KINDS: Mapping[str, Any] = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow}
NAMES = tuple(_KINDS)


class Surviving:
    """The logger `name`, which training survives: where it fails it is left out, with one warning.

    Raises:
        ValueError: the user's settings of it are wrong.
    """

    def __init__(self, name: str, folder: Path, recipe: Mapping[str, Any]) -> None:
        self._name, self._run = name, Run(folder, Recipe.from_dict(dict(recipe)))
        self._logger: Any = None
        self._last: int | None = None
        try:
            self._logger = _KINDS[name](folder, recipe)
            self._last = self._logger.epochs
        except ValueError:
            raise
        except Exception as error:  # each package has its own way to say that the network is down
            self._drop(error)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Metrics of epoch `step`, and of those before that are not there."""
        if self._logger is None:
            return
        try:
            if self._last is not None and self._last < step - 1:
                for row in self._run.metrics():
                    if self._last < row["epoch"] < step:
                        self._logger.log({k: v for k, v in row.items() if k != "epoch"}, int(row["epoch"]))
            if self._last is None or self._last < step:
                self._logger.log(metrics, step)
            self._last = step
        except Exception as error:
            self._drop(error)

    def close(self) -> None:
        """Nothing follows."""
        if self._logger is None:
            return
        try:
            self._logger.close()
        except Exception as error:
            self._drop(error)

    def _drop(self, error: Exception) -> None:
        self._logger = None
        reason = " ".join(str(error).split())[:300]
        warnings.warn(
            f"--log {self._name} failed and is left out of {self._run.folder}: {type(error).__name__}: {reason}",
            RuntimeWarning,
            stacklevel=3,
        )


def check(names: Sequence[str]) -> None:
    """Make sure that there are such loggers.

    Raises:
        ValueError: a name is unknown, or its package is not installed.
    """
    for name in names:
        if name not in NAMES:
            raise unknown("logger", name, NAMES)
        if find_spec(name) is None:
            raise ValueError(f"--log {name} needs {name}: pip install {name}")


def loggers(names: Sequence[str], folder: Path, recipe: Mapping[str, Any]) -> list[Logger]:
    """The loggers by name for the run in `folder`.

    Raises:
        ValueError: a name is unknown, its package is not installed, or the user's settings of it are wrong.
    """
    check(names)
    return [Surviving(name, folder, recipe) for name in dict.fromkeys(names)]
