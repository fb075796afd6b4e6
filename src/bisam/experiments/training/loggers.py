"""Loggers: TensorBoard, Weights & Biases and MLflow, which get the metrics of a run besides its metrics.csv.

A resumed run logs epochs that are missing there from metrics.csv and stats.csv. So a service that was down or a process
that was killed leaves no gap, and a logger that is added later gets the run from its first epoch. The step metrics
are in no file: a logger that was down does not get them later.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import time
import uuid
import warnings
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from importlib.util import find_spec
from itertools import accumulate
from math import isnan
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock

from bisam.experiments.errors import RunError, RunWarning, unknown
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs.files import write
from bisam.experiments.runs.folder import Row, Run
from bisam.experiments.runs.results import BALL, BY_ASCENT
from bisam.experiments.training.step_metrics import STEP


class Logger(Protocol):
    """Receives the metrics of each epoch, step metrics within the epochs, and the test scores."""

    def log(self, metrics: Mapping[str, float], epoch: int, losses: int) -> None:
        """Log the metrics of an epoch, after so many losses of the run."""
        ...

    def log_step(self, scalars: Mapping[str, float], losses: int) -> None:
        """Log step metrics within an epoch, after so many losses of the run."""
        ...

    def finish(self, scores: Mapping[str, float], epoch: int) -> None:
        """Log the test scores of the finished run and its number of epochs."""
        ...

    def close(self) -> None:
        """Finish the log; nothing follows."""
        ...


class _Events:
    """Event files of TensorBoard in a folder, one for each process that writes.

    TensorBoard reads the files in the order of their names, which begin with a time in seconds, and a later file takes
    the place of what earlier ones have from its first step on. So the name of a new file must be behind all others
    even if the clock went back; `SummaryWriter` would take the clock's time.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._last = folder, 0.0
        self._path: Path | None = None

    @property
    def exist(self) -> bool:
        """Whether a process has written some."""
        return any(self._folder.glob("*tfevents*"))

    def write(self, scalars: Mapping[str, float], step: int, others: Sequence[Any] = (), *, durable: bool) -> None:
        """Write the scalars of a step, and other summaries before them.

        Args:
            scalars: by name.
            step: their place on the axis; it does not fall.
            others: protocol buffers of class Summary.
            durable: whether to wait until they are on the disk.
        """
        proto: Any = import_module("tensorboard.compat.proto.event_pb2")
        summary: Any = import_module("tensorboard.compat.proto.summary_pb2").Summary
        events: list[Any] = []
        if self._path is None:
            self._path = self._new_path()
            start = proto.SessionLog(status=proto.SessionLog.START)
            events.append(proto.Event(file_version="brain.Event:2"))
            events.append(proto.Event(step=step, session_log=start))  # discards what a killed process wrote since
        events += [proto.Event(step=step, summary=other) for other in others]
        values = [summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        events.append(proto.Event(step=step, summary=summary(value=values)))
        with open(self._path, "ab") as file:
            records = import_module("tensorboard.summary.writer.record_writer").RecordWriter(file)
            for event in events:
                self._last = event.wall_time = max(time.time(), self._last)  # in order on the axis of time too
                records.write(event.SerializeToString())
            file.flush()
            if durable:
                os.fsync(file.fileno())

    def _new_path(self) -> Path:
        self._folder.mkdir(exist_ok=True, parents=True)
        files = list(self._folder.glob("*tfevents*"))
        seconds = [int(found[1]) for file in files if (found := re.search(r"tfevents\.(\d+)\.", file.name))]
        first = max([int(time.time()), *(second + 1 for second in seconds)])
        self._last = max([float(first), *(file.stat().st_mtime for file in files)])
        return self._folder / f"events.out.tfevents.{first:010d}.{socket.gethostname()}.{os.getpid()}.0"


class TensorBoard:
    """TensorBoard's files: `folder/tensorboard` has epochs, recipe and test scores, and `steps` in it the step metrics.

    The steps of the former are epochs and those of the latter losses, so TensorBoard shows them as two runs.
    """

    def __init__(self, folder: Path, recipe: Mapping[str, Any]) -> None:
        self._events, self._steps = _Events(folder / "tensorboard"), _Events(folder / "tensorboard" / "steps")
        # Existing files are complete up to the checkpoint: an epoch is written to the disk before it is saved.
        self.epochs = None if self._events.exist else 0
        self._recipe = recipe

    def log(self, metrics: Mapping[str, float], epoch: int, losses: int) -> None:
        """Log the scalars of an epoch."""
        self._events.write(metrics, epoch, durable=True)

    def log_step(self, scalars: Mapping[str, float], losses: int) -> None:
        """Log step metrics."""
        self._steps.write(scalars, losses, durable=False)

    def finish(self, scores: Mapping[str, float], epoch: int) -> None:
        """Log the test scores, and for the tab of hyper-parameters the recipe."""
        hparams: Any = import_module("torch.utils.tensorboard.summary").hparams
        plain = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in self._recipe.items()}
        self._events.write(scores, epoch, hparams(plain, {"validation": 0.0, **scores}), durable=True)

    def close(self) -> None:
        """Do nothing: each epoch is on the disk."""


class WandB:
    """A run of Weights & Biases, in the project `WANDB_PROJECT` or bisam; its files are in `folder/wandb`.

    Its steps are the losses of the run, and those of the epochs are shown over the number of the epoch.

    With WANDB_MODE=offline nothing is sent. Each offline part of a resumed run has all epochs up to its end, so it is
    enough to `wandb sync` the last part.
    """

    def __init__(self, folder: Path, recipe: Mapping[str, Any]) -> None:
        wandb: Any = import_module("wandb")
        *_, study, slug, seed = folder.resolve().parts
        known = folder / "wandb.id"
        if not known.exists():  # a new id for a new folder: wandb does not reuse ids
            write(known, uuid.uuid4().hex[:12])
        # By default it waits for days if the network is down; metrics that were not sent stay in the folder.
        patience = {"finish_timeout": 60} if "finish_timeout" in wandb.Settings.model_fields else {}
        wandb.setup(wandb.Settings(silent=True))  # the session has its own setting
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
                reinit="finish_previous",  # a failed run of this process would be continued by default
                settings={"silent": True, "console": "off", **patience},
            )
        except wandb.errors.UsageError as error:
            raise ValueError(f"--log wandb: {error} Without an account, set WANDB_MODE=offline") from error
        self._run.define_metric("*", step_metric="epoch")
        self._run.define_metric(f"{STEP}*", step_metric="losses")
        self._done = max(0, self._run.step - 1)
        rows = Run(folder, Recipe.from_dict(dict(recipe))).metrics()
        self.epochs: int | None = sum(until <= self._done for until in accumulate(row["losses"] for row in rows))

    def log(self, metrics: Mapping[str, float], epoch: int, losses: int) -> None:
        """Log the metrics of an epoch."""
        self._send({**metrics, "epoch": epoch}, losses)

    def log_step(self, scalars: Mapping[str, float], losses: int) -> None:
        """Log step metrics."""
        self._send({**scalars, "losses": losses}, losses)

    def _send(self, row: Mapping[str, float], losses: int) -> None:
        """Log one row, if it is not there; without `commit` it would be held back until the next row."""
        if losses > self._done:
            self._run.log(dict(row), step=losses, commit=True)
            self._done = losses

    def finish(self, scores: Mapping[str, float], epoch: int) -> None:
        """Put the test scores into the summary of the run."""
        self._run.summary.update(dict(scores))

    def close(self) -> None:
        """Send the remaining metrics and mark the run as finished."""
        self._run.finish()


class MLflow:
    """A run of MLflow, at MLFLOW_TRACKING_URI or in `mlflow.db` beside the study's run folders.

    On a cluster use the address of a server: SQLite does not work on network file systems.
    """

    def __init__(self, folder: Path, recipe: Mapping[str, Any]) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault(
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3"
        )  # fail after seconds, because training waits; by default after minutes
        mlflow: Any = import_module("mlflow")
        self._entities, self._error = mlflow.entities, mlflow.exceptions.MlflowException
        study = folder.resolve().parents[1]
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        # Two processes that create the tables at the same time fail.
        with FileLock(study / ".mlflow.lock"), _without_logging(), without_empty_folder(Path("mlruns")):
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
        self._losses = int(run.data.metrics.get(f"{STEP}losses", 0))

    def _experiment(self, artifacts: str | None) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "bisam"
        if (found := self._client.get_experiment_by_name(name)) is not None:
            return found.experiment_id
        return self._client.create_experiment(name, artifact_location=artifacts)

    def _found(self, known: Path) -> Any:
        """Return the run that was started earlier, unless it is on another server or deleted."""
        if not known.exists():
            return None
        try:
            run = self._client.get_run(known.read_text())
        except self._error as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        return run if run.info.lifecycle_stage == "active" else None

    def log(self, metrics: Mapping[str, float], epoch: int, losses: int) -> None:
        """Log the metrics of an epoch, and last its number, from which a resumed run knows the logged epochs."""
        self._send({**metrics, "epoch": epoch}, epoch)

    def log_step(self, scalars: Mapping[str, float], losses: int) -> None:
        """Log step metrics that are not there, and last the number of their loss."""
        if losses > self._losses:
            self._send({**scalars, f"{STEP}losses": losses}, losses)
            self._losses = losses

    def finish(self, scores: Mapping[str, float], epoch: int) -> None:
        """Log the test scores."""
        self._send(scores, epoch)

    def _send(self, values: Mapping[str, float], step: int) -> None:
        now, metric = int(1000 * time.time()), self._entities.Metric
        self._client.log_batch(self._id, metrics=[metric(k, float(v), now, step) for k, v in values.items()])

    def close(self) -> None:
        """Mark the run as finished."""
        self._client.set_terminated(self._id)


@contextmanager
def _without_logging() -> Generator[None]:
    """Suppress log messages in the block; alembic, which creates the tables, sets its own levels and handlers."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


@contextmanager
def without_empty_folder(folder: Path) -> Generator[None]:
    """Delete an empty folder that appears in the block: MLflow creates one for artifacts in the current folder."""
    was_there = folder.exists()
    yield
    if not was_there:
        with suppress(OSError):
            folder.rmdir()


_KINDS: Mapping[str, Any] = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow}
NAMES = tuple(_KINDS)


def _told(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return a row without the number of its epoch, and without the columns that are measured at some epochs only."""
    return {k: v for k, v in metrics.items() if k != "epoch" and not (k in (*BALL, *BY_ASCENT) and isnan(v))}


class FaultTolerantLogger:
    """The logger `name`, whose failure does not stop training: it is disabled with one warning.

    Raises:
        ValueError: the user's settings of the logger are wrong.
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
        except Exception as error:  # each package raises another type of error if the network is down
            self._drop(error)

    def log(self, metrics: Mapping[str, float], epoch: int, losses: int) -> None:
        """Log the metrics of an epoch, and before it of the epochs that are missing."""
        with self._tolerant() as logger:
            if logger is None:
                return
            if self._last is not None and self._last < epoch - 1:
                stats, until = self._stats(), 0
                for row in self._run.metrics():
                    until += int(row["losses"])
                    if self._last < row["epoch"] < epoch:
                        complete = {**row, **stats.get(row["epoch"], {})}
                        logger.log(_told(complete), int(row["epoch"]), until)
            if self._last is None or self._last < epoch:
                logger.log(_told(metrics), epoch, losses)
            self._last = epoch

    def log_step(self, scalars: Mapping[str, float], losses: int) -> None:
        """Log step metrics within an epoch, after so many losses of the run."""
        with self._tolerant() as logger:
            if logger is not None:
                logger.log_step(scalars, losses)

    def finish(self, scores: Mapping[str, float], epoch: int) -> None:
        """Log the test scores of the finished run and its number of epochs."""
        with self._tolerant() as logger:
            if logger is not None:
                logger.finish(scores, epoch)

    @contextmanager
    def _tolerant(self) -> Generator[Logger | None]:
        """Yield the logger, or None if it is disabled; a failure in the block disables it."""
        try:
            yield self._logger
        except Exception as error:
            self._drop(error)

    def _stats(self) -> dict[float, Row]:
        """Return the statistics by epoch; none if the file is damaged, which only a run that records them needs."""
        try:
            return {row["epoch"]: row for row in self._run.stats()}
        except RunError:
            return {}

    def close(self) -> None:
        """Finish the log; nothing follows."""
        with self._tolerant() as logger:
            if logger is not None:
                logger.close()

    def _drop(self, error: Exception) -> None:
        self._logger = None
        reason = " ".join(str(error).split())[:300]
        warnings.warn(
            f"--log {self._name} failed and is disabled for {self._run.folder}: {type(error).__name__}: {reason}",
            RunWarning,
            stacklevel=3,
        )


def check(names: Sequence[str]) -> None:
    """Check that the loggers are available.

    Raises:
        ValueError: a name is unknown, or its package is not installed.
    """
    for name in names:
        if name not in NAMES:
            raise unknown("logger", name, NAMES)
        if find_spec(name) is None:
            raise ValueError(f"--log {name} needs {name}: pip install {name}")


def loggers(names: Sequence[str], folder: Path, recipe: Mapping[str, Any]) -> list[Logger]:
    """Return the loggers by name for the run in `folder`.

    Raises:
        ValueError: a name is unknown, its package is not installed, or the user's settings of a logger are wrong.
    """
    check(names)
    return [FaultTolerantLogger(name, folder, recipe) for name in dict.fromkeys(names)]
