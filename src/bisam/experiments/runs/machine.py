"""Machine: devices, folders and loggers of a run. None of it is part of the recipe, which identifies the run."""

from __future__ import annotations

import ctypes
import multiprocessing as mp
import os
import signal
import sys
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter, Token

from bisam.experiments.errors import unknown
from bisam.experiments.runs.durations import seconds

if TYPE_CHECKING:
    from lightning_fabric import Fabric


def _seconds(type_: Any, tokens: Sequence[Token]) -> float:
    """The value of a flag as seconds."""
    return seconds(tokens[0].value)


STRATEGIES = ("auto", "ddp", "fsdp")
PRECISIONS: dict[str, Any] = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed", "64": "64-true"}
"""Names of precisions in recipes, and in Fabric."""


@dataclass(frozen=True)
class Machine:
    """Devices, folders and loggers of runs.

    Raises:
        ValueError: a value is outside its range.
    """

    device: str = "cpu"
    """Device: cpu, cuda, cuda:1, cuda:2,3 (two devices), mps, ... or auto."""
    devices: int = 1
    """Devices of one run on a machine, with one process for each."""
    nodes: int = 1
    """Machines of one run; if more than 1, start the command on each with torchrun or srun."""
    strategy: str = "auto"
    """How a run uses several devices: each holds the model (ddp, auto) or a shard of it (fsdp)."""
    data_dir: Path = Path(os.environ.get("BISAM_DATA") or "data")
    """Folder of the data sets. The environment variable BISAM_DATA sets the default."""
    download: bool = False
    """Download data sets that are missing in the data folder."""
    loaders: int = 0
    """Processes that read and decode image files."""
    log: Annotated[tuple[str, ...], Parameter(negative="")] = ("tensorboard",)
    """Loggers of the metrics, besides metrics.csv: tensorboard, wandb, mlflow."""
    log_every: int = 50
    """Log loss, learning rate and speed within an epoch too, after every so many batches; 0: the metrics of epochs
    alone."""
    stats: bool = False
    """Record statistics of the training steps, their means over an epoch in stats.csv and in the loggers."""
    stop_on_nan: bool = True
    """End a run before its last epoch when its loss and weights are no longer finite, because they stay so."""
    max_time: Annotated[float | None, Parameter(converter=_seconds)] = None
    """Time after which training stops, in seconds or as in 1h30m: before an epoch that would not fit. What is trained
    is saved, and the same command resumes. Each run trains at least one epoch."""

    def __post_init__(self) -> None:
        for name, least in (("devices", 1), ("nodes", 1), ("loaders", 0), ("log_every", 0)):
            if (value := getattr(self, name)) < least:
                raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
        if self.max_time is not None and not 0 < self.max_time < inf:
            raise ValueError(f"--max-time must be above 0, got {self.max_time}")
        if self.strategy not in STRATEGIES:
            raise unknown("strategy", self.strategy, STRATEGIES)
        if ":" in self.device and self.devices != (named := self.device.count(",") + 1):
            raise ValueError(
                f"--device {self.device} names {named} devices, and --devices is {self.devices}: make them equal, "
                f"or give a --device without numbers"
            )
        if self.strategy == "fsdp" and not self.parallel:
            raise ValueError("--strategy fsdp shards a model over several devices, and there is 1: give --devices")

    @property
    def slots(self) -> int:
        """Number of runs that fit at a time, by the number of cores or GPUs."""
        if self.device == "cuda":
            import torch  # not at the top: the flags of the commands are fields of this class

            count = torch.cuda.device_count()
        else:
            count = cores()
        return max(1, count // self.devices) if self.device in ("cpu", "cuda") else 1

    def at(self, place: int) -> Machine:
        """Return the machine for the worker with number `place`: workers get the GPUs in turn."""
        if self.device != "cuda":
            return self
        first, count = place % self.slots * self.devices, self.devices
        return replace(self, device=f"cuda:{','.join(map(str, range(first, first + count)))}")

    def later(self, seconds: float) -> Machine:
        """Return the machine after so many seconds of its time; with none left a run trains one epoch."""
        return self if self.max_time is None else replace(self, max_time=max(self.max_time - seconds, 1e-3))

    @property
    def parallel(self) -> bool:
        """Whether a run has several devices."""
        return self.devices * self.nodes > 1

    @property
    def is_main_process(self) -> bool:
        """Whether this process prints the results of a run: of the processes of several nodes, that of rank 0."""
        rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"  # of torchrun, which srun may start
        return self.nodes == 1 or rank == "0"

    def fabric(self, precision: str = "32") -> Fabric:
        """Return Lightning's Fabric for these devices.

        Raises:
            ValueError: the device is unknown or not available, or does not support the precision.
        """
        from lightning_fabric import Fabric  # not at the top: the commands that run nothing do without

        from bisam.experiments.runs.strategies import FullySharded

        kind, _, index = self.device.partition(":")
        if self.nodes > 1 and not {"WORLD_SIZE", "SLURM_NTASKS"} & os.environ.keys():
            raise ValueError(f"--nodes {self.nodes}: start the command on each machine with torchrun or srun")
        if precision == "16" and kind == "cpu":
            raise ValueError("precision 16 needs a GPU: use bf16 on the CPU, or give another --device")
        # On one machine processes are spawned; on several, torchrun or srun has started them.
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
        except Exception as error:  # each accelerator raises another type of error
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"device {self.device!r} is unknown or not available: --device takes cpu, cuda, cuda:1, mps, auto "
                f"({reason})"
            ) from error


def cores() -> int:
    """Return the number of cores that this process may use, which `taskset` and job schedulers limit.

    More threads than that would wait for each other: in the barriers of oneDNN they spin.
    """
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def threads(share: int) -> None:
    """Limit the threads of this process to the cores divided by the number `share` of processes."""
    import torch

    torch.set_num_threads(max(1, cores() // share))


def keep_freed_memory() -> bool:
    """Make malloc keep freed memory from now on, because the tensors of the next step have the same sizes.

    By default glibc returns large blocks to the system, and allocating them again costs a page fault for each page. The
    memory of the process then stays at its peak. Returns False if the C library is not glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    trim_threshold, mmap_threshold = -1, -3
    return mallopt is not None and bool(mallopt(trim_threshold, 2**31 - 1) and mallopt(mmap_threshold, 2**25))


def end_with_parent() -> None:
    """End this process, which multiprocessing started, as soon as its parent ends for any reason.

    Each process of a run calls it first. An orphan would continue to write into a folder that is no longer locked.
    """
    parent = mp.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


@contextmanager
def ignore_interrupts() -> Generator[None]:
    """Ignore Ctrl-C in the block. Processes that start in the block ignore it too, from their first import on."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
