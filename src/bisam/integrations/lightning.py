"""Lightning: a callback that records measures of `bisam.analysis` during training.

Requires the package `lightning` or `pytorch_lightning`:

    from bisam.integrations.lightning import AnalysisCallback

    trainer = lightning.Trainer(callbacks=[AnalysisCallback(loader, every=100)])

Training itself needs no integration: the loss is an attribute of the LightningModule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from bisam.analysis.monitor import Monitor
from bisam.loss import SharpnessAware

if TYPE_CHECKING:
    from lightning.pytorch import Callback
else:
    try:
        from lightning.pytorch import Callback
    except ImportError:
        try:
            from pytorch_lightning import Callback
        except ImportError as error:
            raise ImportError("AnalysisCallback needs Lightning: pip install lightning") from error


class AnalysisCallback(Callback):
    """Records measures every few optimizer steps; training is bit-identical to training without it.

    The records are logged by all loggers of the trainer at the number of the optimizer step, and are in
    `trainer.callback_metrics` for other callbacks. Their state is in the checkpoints. In distributed training each rank
    records, and the logged values are those of rank 0: see `Monitor`.

    Args:
        data: see `Monitor`; batches as arguments of the loss.
        *args: further arguments of `Monitor`.
        sharp: the loss, or a function from the LightningModule to it. Default: the one `SharpnessAware` in the module.
        prefix: the beginning of the names in the log. Two callbacks of a trainer need different ones.
        **kwargs: keyword arguments of `Monitor`, for example `every` and `measures`.

    Attributes:
        monitor: the monitor, from the start of training; its `history` has the records.

    Raises when training starts:
        ValueError: the module has no `SharpnessAware`, or several. Other errors are those of `Monitor`.
    """

    monitor: Monitor | None = None

    def __init__(
        self,
        data: Iterable[Any],
        *args: Any,
        sharp: SharpnessAware | Callable[[Any], SharpnessAware] | None = None,
        prefix: str = "analysis/",
        **kwargs: Any,
    ) -> None:
        self._data, self._args, self._kwargs = data, args, kwargs
        self._sharp, self._prefix = sharp, prefix
        self._state: dict[str, Any] = {}

    @property
    def state_key(self) -> str:
        """See `Callback.state_key`."""
        return f"{type(self).__qualname__}({self._prefix})"

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """See `Callback.on_train_start`."""
        sharp = self._found(pl_module)
        if self.monitor is None or self.monitor.sharp is not sharp:
            self.monitor = Monitor(sharp, self._data, *self._args, **self._kwargs)
        if self._state:
            self.monitor.load_state_dict(self._state)
            self._state = {}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """See `Callback.on_train_batch_end`."""
        assert self.monitor is not None
        if (record := self.monitor.step(trainer.global_step)) is None:
            return
        values = {f"{self._prefix}{name}": value for name, value in record.items() if name != "step"}
        for logger in trainer.loggers:  # not pl_module.log, which logs at steps of the trainer's choice
            logger.log_metrics(values, step=trainer.global_step)
        pl_module.log_dict(values, logger=False, on_step=True, on_epoch=False)

    def state_dict(self) -> dict[str, Any]:
        """See `Callback.state_dict`."""
        return dict(self._state) if self.monitor is None else self.monitor.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `Callback.load_state_dict`."""
        self._state = state_dict  # the monitor is made when training starts

    def _found(self, module: Any) -> SharpnessAware:
        if isinstance(self._sharp, SharpnessAware):
            return self._sharp
        if self._sharp is not None:
            return self._sharp(module)
        found = [part for part in cast(nn.Module, module).modules() if isinstance(part, SharpnessAware)]
        if len(found) != 1:
            raise ValueError(
                f"AnalysisCallback looks for the SharpnessAware of {type(module).__name__}, which has {len(found)}: "
                "name it, AnalysisCallback(..., sharp=lambda module: module.sharp)"
            )
        return found[0]
