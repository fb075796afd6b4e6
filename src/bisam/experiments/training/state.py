"""State: everything that a run needs to resume, gathered for its checkpoint and restored from it.

The names in the checkpoint, and its file, are described in `bisam.experiments.runs.checkpoint`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from lightning_fabric import Fabric
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from bisam.experiments.errors import RunError, is_out_of_memory
from bisam.experiments.models.frozen import with_frozen, without_frozen
from bisam.experiments.runs.checkpoint import CHECKPOINT
from bisam.experiments.runs.files import damaged
from bisam.experiments.runs.folder import Row
from bisam.experiments.training.fsdp import (
    divided,
    gathered_memories,
    is_sharded,
    load_optimizer,
    whole,
)
from bisam.experiments.training.optimizers import grad_scaler
from bisam.experiments.training.weight_average import WeightAverage

_OF_SHAPE = {"momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}
"""Names of an optimizer's tensors that have the shape of their parameter; Adafactor has others, of rows and columns."""
_METHOD_STATE = "_extra_state"  # torch's name of `get_extra_state` in a state_dict


def _no_best() -> dict[str, Any]:
    return {"score": -2.0}  # below any score, also below any correlation


@dataclass
class RunState:
    """The state of a run between two epochs."""

    fabric: Fabric
    sharp: Any
    """The `SharpnessAware` loss with model and method, as `fabric.setup` returned it."""
    optimizer: Any
    """The base optimizer, as `fabric.setup` returned it."""
    scheduler: LRScheduler
    average: WeightAverage | None
    history: list[Row] = field(default_factory=list[Row])
    """Rows of metrics of the completed epochs."""
    best: dict[str, Any] = field(default_factory=_no_best)
    """Validation score, number and weights of the best epoch."""

    def gather(self) -> dict[str, Any]:
        """Return the state with unsharded tensors on the CPU, complete on the first process.

        All processes must call it: sharded tensors are gathered by collectives.
        """
        first, sharp = self.fabric.is_global_zero, without_frozen(self.sharp.state_dict(), self.sharp.module)
        memories = gathered_memories(sharp[_METHOD_STATE], self.fabric)
        sharp[_METHOD_STATE] = memories[0]  # the same object, so that the file has it once
        state: dict[str, Any] = {
            "sharp": whole(sharp, first),
            "memories": memories,
            "sharded": is_sharded(self.fabric),
            "optimizer": whole(self.optimizer.state_dict(), first),
            "scheduler": self.scheduler.state_dict(),
            "history": self.history,
            "best": self.best,
        }
        if self.average is not None:
            state["average"] = whole(self.average.state_dict(), first)
        if (scaler := grad_scaler(self.fabric)) is not None:
            state["scaler"] = scaler.state_dict()
        return state

    def restore(self, checkpoint: dict[str, Any], folder: Path) -> None:
        """Restore the result of `gather`.

        Args:
            checkpoint: from the file.
            folder: of the run, for messages.

        Raises:
            RunError: the checkpoint was written with another number of devices or another strategy, or it is damaged.
        """
        try:
            memories, processes = checkpoint["memories"], self.fabric.world_size
            if len(memories) != processes:
                raise RunError(
                    f"{folder} was started with {len(memories)} devices, not with {processes}: "
                    f"resume with {len(memories)}, or give another --out"
                )
            if (sharded := checkpoint.get("sharded", False)) != is_sharded(self.fabric):
                raise RunError(
                    f"{folder} was started {'with' if sharded else 'without'} --strategy fsdp, which perturbs for the "
                    "whole batch: resume it in the same way, or give another --out"
                )
            sharp = {**checkpoint["sharp"], _METHOD_STATE: memories[self.fabric.global_rank]}
            self.sharp.load_state_dict(with_frozen(divided(sharp, self.sharp.state_dict()), self.sharp.module))
            _check_form(
                "optimizer", checkpoint["optimizer"]["param_groups"], self.optimizer.state_dict()["param_groups"]
            )
            self._check_shapes(checkpoint["optimizer"]["state"])
            load_optimizer(self.optimizer, checkpoint["optimizer"])
            _check_form("scheduler", checkpoint["scheduler"], self.scheduler.state_dict())
            self.scheduler.load_state_dict(checkpoint["scheduler"])
            self.history, self.best = checkpoint["history"], checkpoint["best"]
            if self.average is not None:
                self.average.load_state_dict(divided(checkpoint["average"], self.average.state_dict()))
            if (scaler := grad_scaler(self.fabric)) is not None:
                scaler.load_state_dict(checkpoint["scaler"])
        except RunError:
            raise
        except Exception as error:  # torch and the methods raise errors of many types for a state of another form
            if is_out_of_memory(error):
                raise
            raise damaged(folder / CHECKPOINT, error) from error

    def _check_shapes(self, states: dict[int, dict[str, Any]]) -> None:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for i, state in states.items():
            for name, value in state.items():
                if name in _OF_SHAPE and isinstance(value, Tensor) and value.shape != parameters[i].shape:
                    raise ValueError(
                        f"{name} of parameter {i} has shape {tuple(value.shape)}, not {tuple(parameters[i].shape)}"
                    )


def _check_form(name: str, found: Any, own: Any) -> None:
    """Check that a saved state has the form of the own one: torch takes any, and fails in a later step.

    Entries that only one of them has are left to torch, whose versions differ in them.

    Raises:
        ValueError: it has another form; the message names the place.
    """
    if isinstance(own, dict) and isinstance(found, dict):
        theirs = cast("dict[Any, Any]", found)
        for key, value in cast("dict[Any, Any]", own).items():
            if key in theirs:
                _check_form(f"{name}.{key}", theirs[key], value)
    elif isinstance(own, list | tuple) and isinstance(found, list | tuple):
        ours, others = list(cast("list[Any]", own)), list(cast("list[Any]", found))
        if len(ours) != len(others):
            raise ValueError(f"{name} has {len(others)} entries, not {len(ours)}")
        for i, (value, other) in enumerate(zip(ours, others, strict=True)):
            _check_form(f"{name}.{i}", other, value)
    elif not (_is_number(own) and _is_number(found)) and type(own) is not type(found):
        raise ValueError(f"{name} is a {type(found).__name__}, not a {type(own).__name__}")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)
