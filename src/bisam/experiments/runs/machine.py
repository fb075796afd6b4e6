"""Machine: where and how runs are computed, as opposed to what: nothing here is part of a run's identity."""

from __future__ import annotations

import logging
import multiprocessing as mp
import os
import signal
import threading
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, cast

import torch
from cyclopts import Parameter
from lightning_fabric import Fabric
from lightning_fabric.strategies import DDPStrategy
from torch import nn

from bisam.experiments.errors import unknown

for _name in ("lightning_fabric", "torch.multiprocessing.spawn"):
    logging.getLogger(_name).setLevel(logging.ERROR)  # they advertise and advise, in every process

STRATEGIES = ("auto", "ddp", "fsdp")
PRECISIONS: dict[str, Any] = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed", "64": "64-true"}
"""Recipes' names of precisions, and Fabric's."""


class FullySharded(DDPStrategy):
    """Fabric's processes and collectives, with models that are divided already in place of DistributedDataParallel.

    Fabric's own ModelParallelStrategy cannot spawn processes.
    """

    def __init__(self, start_method: Any) -> None:
        super().__init__(start_method=start_method)
        self._backward_sync_control = cast(Any, _NoControl())

    def setup_module(self, module: nn.Module) -> Any:
        """The same module."""
        return module


class _NoControl:
    """The loss gets each gradient reduced, whatever the loop asks for."""

    def no_backward_sync(self, module: nn.Module, enabled: bool) -> AbstractContextManager[None]:
        return nullcontext()


@dataclass(frozen=True)
class Machine:
    """Devices, folders and loggers of runs.

    Raises:
        ValueError: a value is outside its range.
    """

    device: str = "cpu"
    """Where to compute: cpu, cuda, cuda:1, cuda:2,3 (of two devices), mps, ... or auto."""
    devices: int = 1
    """Processes of one run on a machine, one device each."""
    nodes: int = 1
    """Machines of one run; above 1, start the command on each by torchrun or srun."""
    strategy: str = "auto"
    """How the devices of a run share the work: each with the model (ddp, auto) or with a part of it (fsdp)."""
    data_dir: Path = Path(os.environ.get("BISAM_DATA", "data"))
    """Folder of the data sets."""
    download: bool = False
    """Fetch what is missing there."""
    loaders: int = 0
    """Processes that read and decode images, for data in files."""
    log: Annotated[tuple[str, ...], Parameter(negative="")] = ("tensorboard",)
    """Where metrics go besides metrics.csv: tensorboard, wandb, mlflow."""

    def __post_init__(self) -> None:
        for name, least in (("devices", 1), ("nodes", 1), ("loaders", 0)):
            if (value := getattr(self, name)) < least:
                raise ValueError(f"--{name} must be at least {least}, got {value}")
        if self.strategy not in STRATEGIES:
            raise unknown("strategy", self.strategy, STRATEGIES)
        if ":" in self.device and self.devices != (named := self.device.count(",") + 1):
            raise ValueError(
                f"--device {self.device} names {named}, and --devices is {self.devices}: name as many, or none"
            )
        if self.strategy == "fsdp" and not self.parallel:
            raise ValueError("--strategy fsdp divides a model among devices, and there is 1: give --devices")

    @property
    def slots(self) -> int:
        """How many runs it can compute at a time: by cores, or by GPUs."""
        count = torch.cuda.device_count() if self.device == "cuda" else os.cpu_count() or 1
        return max(1, count // self.devices) if self.device in ("cpu", "cuda") else 1

    def at(self, place: int) -> Machine:
        """The same for the worker at `place`, who gets the next GPUs in turn."""
        if self.device != "cuda":
            return self
        first, count = place % self.slots * self.devices, self.devices
        return replace(self, device=f"cuda:{','.join(map(str, range(first, first + count)))}")

    @property
    def parallel(self) -> bool:
        """Whether a run has several processes."""
        return self.devices * self.nodes > 1

    def fabric(self, precision: str = "32") -> Fabric:
        """Lightning's Fabric for these devices.

        Raises:
            ValueError: the device is unknown or not here, or cannot do the precision.
        """
        kind, _, index = self.device.partition(":")
        if self.nodes > 1 and not {"WORLD_SIZE", "SLURM_NTASKS"} & os.environ.keys():
            raise ValueError(f"--nodes {self.nodes}: start the command on each machine by torchrun or srun")
        if precision == "16" and kind == "cpu":
            raise ValueError("precision 16 is for GPUs: on the CPU use bf16, or give another --device")
        # Spawned on one machine; on several, whoever started the processes has told them who they are.
        strategy = ("ddp" if self.nodes > 1 else "ddp_spawn") if self.parallel else "auto"
        if self.strategy == "fsdp":
            strategy = FullySharded("popen" if self.nodes > 1 else "spawn")
        try:
            devices = [int(one) for one in index.split(",")] if index else self.devices
            return Fabric(
                accelerator=kind,
                devices=devices,
                num_nodes=self.nodes,
                strategy=strategy,
                precision=PRECISIONS[precision],
            )
        except Exception as error:  # each accelerator has its own way to say no
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"device {self.device!r} is unknown or not here: --device takes cpu, cuda, cuda:1, mps, auto ({reason})"
            ) from error


def threads(share: int) -> None:
    """Leave a process its share of the cores, of which there are to be `share`."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // share))


def end_with_parent() -> None:
    """Let this process, which multiprocessing started, not outlive its parent, however that one ends.

    Whoever starts processes in a run calls it first in each: an orphan would go on to write into a folder that is no
    longer locked.
    """
    parent = mp.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


@contextmanager
def deaf() -> Generator[None]:
    """Without Ctrl-C. Processes that start here inherit that: they must not hear it, even while they import."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
