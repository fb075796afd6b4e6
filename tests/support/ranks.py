"""A few processes that talk by gloo: what each returns comes back, what one raises is raised here, and none hangs."""

from __future__ import annotations

import multiprocessing as mp
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def run(world: int, function: Callable[..., Any], *arguments: Any, seconds: float = 240) -> list[Any]:
    """What `function(*arguments)` returns on each of `world` ranks; it finds the process group in place."""
    with tempfile.TemporaryDirectory() as folder:
        context = mp.get_context("spawn")  # fork is unsafe once torch has threads
        processes = [
            context.Process(target=_rank, args=(rank, world, Path(folder), function, arguments), daemon=True)
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        end = time.monotonic() + seconds
        try:
            for process in processes:
                process.join(max(0.0, end - time.monotonic()))
            late = [rank for rank, process in enumerate(processes) if process.is_alive()]
        finally:
            for process in processes:
                process.kill()
                process.join()
        files = [Path(folder) / str(rank) for rank in range(world)]
        errors = [text for file in files if (text := _text(file.with_suffix(".error")))]
        if errors or late:
            raise RuntimeError("\n".join([*errors, *[f"rank {rank} did not end" for rank in late]]))
        return [torch.load(file, weights_only=False) if file.exists() else None for file in files]


def _text(file: Path) -> str:
    return file.read_text() if file.exists() else ""


def _rank(rank: int, world: int, folder: Path, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    torch.manual_seed(0)
    file = folder / str(rank)
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
        )
        torch.save(function(*arguments), file)
        dist.destroy_process_group()
    except BaseException:
        file.with_suffix(".error").write_text(f"rank {rank}\n{traceback.format_exc()}")
        raise
