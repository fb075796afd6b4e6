"""AnalysisCallback: records measures of `bisam.analysis` while a `SharpnessAwareTrainer` trains."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

from accelerate.data_loader import DataLoaderStateMixin
from transformers import TrainerCallback

from bisam.analysis.monitor import Monitor, Record
from bisam.integrations.transformers.trainer import SharpnessAwareTrainer


class AnalysisCallback(TrainerCallback):
    """Records measures every few optimizer steps; training is bit-identical to training without it.

    Records go to `Trainer.log`, hence to `trainer.state.log_history`, to checkpoints and to all loggers; a resumed
    training reads its history from there. In distributed training each process records, and the logged values are those
    of the first one: see `Monitor`.

    Flips need classes, as in classification and in language models, where each token with a label counts. For other
    tasks they are left out, with a warning.

        data = trainer.get_eval_dataloader(rows)
        trainer.add_callback(AnalysisCallback(trainer, data, every=100, batches=4))

    Args:
        trainer: the trainer that it is added to.
        data: see `Monitor`; batches of the collator, for example `trainer.get_eval_dataloader(rows)`.
        *args: further arguments of `Monitor`.
        prefix: the beginning of the names in the log. Two callbacks of a trainer need different ones.
        **kwargs: keyword arguments of `Monitor`, for example `every`, `batches` and `measures`.

    Attributes:
        monitor: the monitor, from the beginning of training; its `history` has the records.

    Raises:
        TypeError: `trainer` is no `SharpnessAwareTrainer`.

    Raises when training begins:
        TypeError: see `Monitor`.
        ValueError: see `Monitor`.
    """

    monitor: Monitor | None = None

    def __init__(
        self, trainer: SharpnessAwareTrainer, data: Iterable[Any], *args: Any, prefix: str = "analysis/", **kwargs: Any
    ) -> None:
        if not isinstance(cast(Any, trainer), SharpnessAwareTrainer):
            raise TypeError(
                f"AnalysisCallback needs a SharpnessAwareTrainer, got {type(trainer).__name__}: the plain Trainer is "
                "SharpnessAwareTrainer(..., method=ERM())"
            )
        self._trainer, self._data, self._prefix = trainer, data, prefix
        self._args, self._kwargs = args, kwargs

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See `TrainerCallback.on_train_begin`."""
        self.monitor = Monitor(self._trainer.plain_loss(), self._data, *self._args, **self._kwargs)
        if isinstance(self._data, DataLoaderStateMixin):
            self._data.end()  # else one that was read in part would count as the loader of the training
        logged = [(line["step"], self._own(line)) for line in state.log_history]
        history = [{"step": step, **own} for step, own in logged if own]
        self.monitor.load_state_dict({"steps": state.global_step, "history": history})

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See `TrainerCallback.on_step_end`."""
        assert self.monitor is not None
        if record := self.monitor.step(state.global_step):
            due = control.should_log  # which a log resets: the line of the training loss is still to come
            self._trainer.log({f"{self._prefix}{name}": v for name, v in record.items() if name != "step"})
            self._trainer.control.should_log = control.should_log = due

    def _own(self, line: dict[str, float]) -> Record:
        """Returns the entries of a line of the log that are those of a record."""
        return {n.removeprefix(self._prefix): value for n, value in line.items() if n.startswith(self._prefix)}
