"""A few processes that talk by gloo: returns the result or the error of each, and none hangs."""

from __future__ import annotations

import multiprocessing as mp
import os
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PATIENCE = timedelta(seconds=60)
PRELOADED = ["bisam", "torch.distributed.fsdp", "torch.distributed.tensor.parallel", "torch.nn.parallel", __name__]
"""What the server of the ranks imports."""


@dataclass(frozen=True)
class End:
    """How a rank ended: with a value, with the traceback of an error, or, if it was killed or is late, with neither."""

    done: bool = False
    value: Any = None
    error: str = ""
    late: bool = False


def run(
    world: int, function: Callable[..., Any], *arguments: Any, seconds: float = 240, with_group: bool = True
) -> list[Any]:
    """Returns what `function(*arguments)` returns on each of `world` ranks, or raises the errors of all ranks.

    Args:
        world: the number of ranks.
        function: can be pickled; it finds the process group initialised.
        arguments: its arguments.
        seconds: the time after which the ranks are killed.
        with_group: False if the function initialises the process group itself, from the variables of torchrun.
    """
    every = ends(world, function, *arguments, seconds=seconds, with_group=with_group)
    errors = [f"rank {rank}\n{end.error}" for rank, end in enumerate(every) if end.error]
    lost = [rank for rank, end in enumerate(every) if not (end.done or end.error)]
    errors += [f"rank {rank} {'did not end' if every[rank].late else 'ended without a result'}" for rank in lost]
    if errors:
        raise RuntimeError("\n".join(errors))
    return [end.value for end in every]


def ends(
    world: int,
    function: Callable[..., Any],
    *arguments: Any,
    seconds: float = 240,
    with_group: bool = True,
    patience: timedelta = PATIENCE,
) -> list[End]:
    """Returns how each of `world` ranks ended; arguments as those of `run`, and one more.

    Args:
        world: see `run`.
        function: see `run`.
        arguments: see `run`.
        seconds: see `run`.
        with_group: see `run`.
        patience: how long a rank waits in a collective, and at its end for the others.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # outlives all ranks
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # Fork is unsafe once torch has threads. A server imports the modules once for all launches.
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        task = (store.port, folder, function, arguments, with_group, patience, dict(os.environ))
        processes = [context.Process(target=_rank, args=(rank, world, *task), daemon=True) for rank in range(world)]
        for process in processes:
            process.start()
        waiting, deadline = dict(enumerate(processes)), time.monotonic() + seconds
        try:
            while waiting and (left := deadline - time.monotonic()) > 0:
                wait([process.sentinel for process in waiting.values()], left)
                for rank in [rank for rank, process in waiting.items() if not process.is_alive()]:
                    store.set(f"ended {rank}", "")  # also of a rank that was killed
                    del waiting[rank]
        finally:
            for process in processes:
                process.kill()
                process.join()
        return [_end(folder / str(rank), rank in waiting) for rank in range(world)]


def meet(store: dist.Store, rank: int, world: int, patience: timedelta = PATIENCE) -> None:
    """Initialises the process group."""
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=patience)


def _end(file: Path, late: bool) -> End:
    if file.exists():
        return End(done=True, value=torch.load(file, weights_only=False), late=late)
    error = file.with_suffix(".error")
    return End(error=error.read_text() if error.exists() else "", late=late)


def _rank(
    rank: int,
    world: int,
    port: int,
    folder: Path,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    with_group: bool,
    patience: timedelta,
    environment: dict[str, str],
) -> None:
    os.environ.clear()  # that of the server, which is of the first launch
    os.environ |= environment
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    torch.manual_seed(0)
    file, store = folder / str(rank), dist.TCPStore("127.0.0.1", port)
    try:
        if with_group:
            meet(store, rank, world, patience)
        else:
            names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1"}
            os.environ |= {name: str(value) for name, value in names.items()} | {"MASTER_PORT": _free(store, rank)}
        value = function(*arguments)
        torch.save(value, file.with_suffix(".part"))
        file.with_suffix(".part").rename(file)
        store.set(f"ended {rank}", "")
        store.wait([f"ended {other}" for other in range(world)], patience)  # an early exit would break the others
    except BaseException:
        if not file.exists():
            file.with_suffix(".error").write_text(traceback.format_exc())
    os._exit(0)  # torch 2.6 sometimes hangs when it destroys the group


def _free(store: dist.Store, rank: int) -> str:
    """Returns a free port, the same one on all ranks."""
    if rank == 0:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            store.set("port", str(free.getsockname()[1]))
    return store.get("port").decode()
