"""Strategies of Fabric that Lightning does not have. All processes that use Fabric import this file: it quiets it."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

from lightning_fabric.strategies import DDPStrategy
from torch import nn

for _name in ("lightning_fabric", "torch.multiprocessing.spawn"):  # after the import, which sets the level
    logging.getLogger(_name).setLevel(logging.ERROR)  # else each process prints advice and advertisements


class FullySharded(DDPStrategy):
    """Fabric strategy for models that are sharded before `fabric.setup`: DDP's processes without its wrapper.

    Fabric's own ModelParallelStrategy cannot spawn processes.
    """

    def __init__(self, start_method: Any) -> None:
        super().__init__(start_method=start_method)
        self._backward_sync_control = cast(Any, _NoSyncControl())

    def setup_module(self, module: nn.Module) -> Any:
        """Return the module unchanged."""
        return module


class _NoSyncControl:
    """Ignores requests to skip the reduction of gradients: the loss needs each gradient reduced."""

    def no_backward_sync(self, module: nn.Module, enabled: bool) -> AbstractContextManager[None]:
        return nullcontext()
