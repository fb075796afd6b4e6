"""Loggers: where the metrics of a run go besides its metrics.csv."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from bisam.experiments.names import unknown

NAMES = ("tensorboard", "wandb", "mlflow")


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

    def __init__(self, folder: Path) -> None:
        from lightning_fabric.loggers import TensorBoardLogger

        self._board = TensorBoardLogger(folder, name="tensorboard", version="")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Scalars of epoch `step`."""
        self._board.log_metrics(dict(metrics), step)

    def close(self) -> None:
        """Write what is left."""
        self._board.finalize("success")


def loggers(names: Sequence[str], folder: Path, recipe: Mapping[str, Any]) -> list[Logger]:
    """The loggers by name for the run in `folder`.

    Raises:
        ValueError: a name is unknown, or its package is not installed.
    """
    return [_logger(name, folder, recipe) for name in names]


def _logger(name: str, folder: Path, recipe: Mapping[str, Any]) -> Logger:
    if name == "tensorboard":
        return TensorBoard(folder)
    raise unknown("logger", name, NAMES)
