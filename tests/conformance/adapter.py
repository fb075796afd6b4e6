"""Adapter: training with an implementation as its documentation describes. The cases see nothing else of it.

`not_offered` lists, with a reason, the features whose use the implementation does not document; cases that need them
are not applicable. It contains `LOSS` unless the implementation is a loss, whose trainers have a `loss(x, y)`.
`remarks`, by the name of a case, are printed if the case fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]

GRAD_SCALER = "torch.amp.GradScaler"
RHO_PER_GROUP = "a rho per parameter group"
SPARSE = "sparse gradients"
LOSS = "a loss"
FEATURES = (GRAD_SCALER, RHO_PER_GROUP, SPARSE, LOSS)


class Trainer(Protocol):
    model: nn.Module
    optimizer: torch.optim.Optimizer  # the optimizer that a scheduler takes

    def step(self, *parts: Batch) -> Tensor: ...  # one update from a batch in parts; the loss at the weights before it
    def closure(self, batch: Batch) -> Callable[[], Tensor]: ...  # for `optimizer.step(closure)`, as torch has it

    def state_dict(self) -> dict[str, Any]:  # everything that a user saves
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


class Adapter(Protocol):
    name: str
    version: str
    not_offered: Mapping[str, str]
    remarks: ClassVar[Mapping[str, str]] = {}

    def make(
        self,
        model: nn.Module,  # may be a DistributedDataParallel
        loss: Callable[[Tensor, Tensor], Tensor],  # (outputs, targets) -> the mean
        params: Iterable[Any],  # of the base optimizer: parameters, or groups, which may have a rho
        base: type[torch.optim.Optimizer],
        *,
        rho: float,
        adaptive: bool = False,  # ASAM (eta 0)
        scaler: torch.amp.GradScaler | None = None,
        **options: Any,  # of the base optimizer
    ) -> Trainer: ...
