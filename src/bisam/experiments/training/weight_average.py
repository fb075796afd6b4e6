"""Weight average: an exponential moving average of a model's weights (EMA), validated and tested beside the model."""

from __future__ import annotations

from typing import Any

from lightning_fabric import Fabric
from torch import nn
from torch.optim.swa_utils import AveragedModel

from bisam.experiments.training.fsdp import averaging, shard


class WeightAverage:
    """The exponential moving average of a model's weights and buffers.

    Args:
        model: the model to follow; it is copied, and so must not be sharded yet.
        decay: in (0, 1).
        fabric: the devices among which the average is sharded, if the model will be.
    """

    def __init__(self, model: nn.Module, decay: float, fabric: Fabric) -> None:
        self._model = model
        averaged = AveragedModel(model, multi_avg_fn=averaging(decay), use_buffers=True)
        shard(averaged.module, fabric)
        self._averaged = averaged.to(fabric.device)

    @property
    def model(self) -> nn.Module:
        """A model with the averaged weights."""
        return self._averaged.module

    def update(self) -> None:
        """Include the present weights."""
        self._averaged.update_parameters(self._model)

    def state_dict(self) -> dict[str, Any]:
        """The average and the number of updates."""
        return self._averaged.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the result of `state_dict`."""
        self._averaged.load_state_dict(state)
