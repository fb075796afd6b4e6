"""Runner: runs cases on adapters, in this process and in two processes that communicate over gloo.

results = run(["tests.conformance.ours:adapter"])       # {"tests.conformance.ours:adapter": {case: Result}}
"""

from __future__ import annotations

import importlib
import json
import os
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from .adapter import FEATURES, Adapter
from .behaviours import CASES, Case

OURS = f"{__package__}.ours:adapter"
PYTORCH_OPTIMIZER = f"{__package__}.pytorch_optimizer_sam:adapter"
HOST = "127.0.0.1"
PATIENCE = 120  # seconds for the cases that need two processes


@dataclass(frozen=True)
class Result:
    verdict: str  # pass, fail or n/a
    reason: str = ""


def load(spec: str) -> Adapter:
    """The adapter at `module:object`.

    Raises:
        ValueError: it does not exist, its implementation cannot be imported, or it declares an unknown feature.
    """
    module, _, name = spec.partition(":")
    try:
        adapter: Adapter = getattr(importlib.import_module(module), name or "adapter")
        described = adapter.name, adapter.version, adapter.make, dict(adapter.not_offered)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"no adapter at {spec!r}, which should be module:object: {error}") from error
    if unknown := described[-1].keys() - set(FEATURES):
        raise ValueError(f"{spec}: not_offered has {sorted(unknown)}, and may have {list(FEATURES)}")
    return adapter


def attempt(adapter: Adapter, case: Case) -> Result:
    """Run the case, applicable or not."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        try:
            case.check(adapter)
        except AssertionError as error:
            return Result("fail", _line(error))
        except Exception as error:
            return Result("fail", f"{type(error).__name__}: {_line(error)}")
    return Result("pass")


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:120]


def applicable(adapter: Adapter, case: Case) -> bool:
    return case.needs is None or case.needs not in adapter.not_offered


def run(specs: Sequence[str], cases: Sequence[Case] = CASES) -> dict[str, dict[str, Result]]:
    """Results by `module:object` of the adapter and name of the case."""
    results: dict[str, dict[str, Result]] = {}
    for spec in specs:
        adapter, results[spec] = load(spec), {}
        for case in cases:
            if not applicable(adapter, case):
                results[spec][case.name] = Result("n/a", adapter.not_offered[case.needs or ""])
            elif case.processes == 1:
                results[spec][case.name] = attempt(adapter, case)
        elsewhere = distributed([(spec, case.name) for case in cases if case.processes > 1])
        results[spec] |= {name: result for (_, name), result in elsewhere.items()}
    return results


def distributed(pairs: Sequence[tuple[str, str]]) -> dict[tuple[str, str], Result]:
    """Results of (adapter, case), from two processes that are always terminated.

    Both processes run all pairs, so an error in one pair may make later pairs fail too.
    """
    if not pairs:
        return {}
    store = dist.TCPStore(HOST, 0, is_master=True, wait_for_workers=False)  # in this process, so that it outlives both
    with TemporaryDirectory() as folder:
        context = mp.spawn(_process, (store.port, pairs, folder), nprocs=2, join=False)
        deadline, missing = time.monotonic() + PATIENCE, f"not done after {PATIENCE} s"
        try:
            while not context.join(timeout=1.0) and time.monotonic() < deadline:
                pass
        except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
            missing = str(error).strip().rpartition("\n")[2]
        finally:
            for process in context.processes:
                process.kill()
                process.join()
        return {pair: joined(Path(folder), i, missing) for i, pair in enumerate(pairs)}


def _process(rank: int, port: int, pairs: Sequence[tuple[str, str]], folder: str) -> None:
    torch.set_num_threads(1)
    store, timeout = dist.TCPStore(HOST, port), timedelta(seconds=30)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timeout)
    by_name = {case.name: case for case in CASES}
    for i, (spec, name) in enumerate(pairs):
        result = attempt(load(spec), by_name[name])
        Path(folder, f"{i}.{rank}.json").write_text(json.dumps(vars(result)))
    store.set(f"done {rank}", "")
    store.wait([f"done {1 - rank}"], timeout)
    os._exit(0)  # torch 2.6 sometimes hangs when it destroys the group


def joined(folder: Path, i: int, missing: str) -> Result:
    """Pass if both processes pass, else the first failure."""
    paths = [folder / f"{i}.{rank}.json" for rank in (0, 1)]
    each = [Result(**json.loads(p.read_text())) if p.exists() else Result("fail", missing) for p in paths]
    return next((result for result in each if result.verdict != "pass"), each[0])
