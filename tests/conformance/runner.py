"""Runner: runs cases on adapters in processes of its own, so that a case that hangs or dies costs its verdict only.

results = run(["tests.conformance.ours:adapter"])       # {"tests.conformance.ours:adapter": {case: Result}}
"""

from __future__ import annotations

import importlib
import os
import signal
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection, wait

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from .adapter import FEATURES, Adapter
from .behaviours import CASES, Case

OURS = f"{__package__}.ours:adapter"
PYTORCH_OPTIMIZER = f"{__package__}.pytorch_optimizer_sam:adapter"
HOST = "127.0.0.1"
LIMIT = 120.0  # seconds for a case
START = 120.0  # seconds until the processes have imported torch and found each other
TROUBLE = ("fail", "timeout", "crash")

Pair = tuple[str, str]
"""`module:object` of an adapter, and the name of a case."""


@dataclass(frozen=True)
class Result:
    verdict: str  # pass, n/a, or one of TROUBLE
    reason: str = ""
    raised: bool = field(default=False, compare=False)  # ended early: another process may wait for this one


def load(spec: str) -> Adapter:
    """The adapter at `module:object`.

    Raises:
        ValueError: it does not exist, its module raises an error, or it declares an unknown feature.
    """
    module, _, name = spec.partition(":")
    try:
        adapter: Adapter = getattr(importlib.import_module(module), name or "adapter")
        described = adapter.name, adapter.version, adapter.make, dict(adapter.not_offered)
    except (Exception, SystemExit) as error:  # a module may raise anything
        kind = "" if isinstance(error, ImportError | AttributeError) else f"{type(error).__name__}: "
        raise ValueError(f"no adapter at {spec!r}, which should be module:object: {kind}{_line(error)}") from error
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
            return Result("fail", f"{type(error).__name__}: {_line(error)}", raised=True)
    return Result("pass")


def _line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:120]


def applicable(adapter: Adapter, case: Case) -> bool:
    return case.needs is None or case.needs not in adapter.not_offered


def run(specs: Sequence[str], cases: Sequence[Case] = CASES, limit: float = LIMIT) -> dict[str, dict[str, Result]]:
    """Results by `module:object` of the adapter and name of the case; `limit` is in seconds for each case."""
    results: dict[str, dict[str, Result]] = {spec: {} for spec in specs}
    todo: dict[int, list[Pair]] = {}
    for spec in specs:
        adapter = load(spec)
        for case in cases:
            if applicable(adapter, case):
                todo.setdefault(case.processes, []).append((spec, case.name))
            else:
                results[spec][case.name] = Result("n/a", adapter.not_offered[case.needs or ""])
    for processes, pairs in todo.items():
        for (spec, name), result in in_processes(pairs, processes, limit).items():
            results[spec][name] = result
    return results


def in_processes(pairs: Sequence[Pair], processes: int, limit: float = LIMIT) -> dict[Pair, Result]:
    """Results of applicable cases, from processes that are always terminated.

    The processes run one pair after the other. New ones continue after a pair that hangs or dies, and after an error
    in one of several processes, because the others may wait for it.
    """
    results: list[Result] = []
    while len(results) < len(pairs):
        results += _until_trouble(pairs[len(results) :], processes, limit)
    return dict(zip(pairs, results, strict=True))


def _until_trouble(pairs: Sequence[Pair], processes: int, limit: float) -> list[Result]:
    """Results of the first pairs, up to one after which the processes cannot go on."""
    context = mp.get_context("spawn")
    store = dist.TCPStore(HOST, 0, is_master=True, wait_for_workers=False)  # in this process, so that it outlives them
    pipes = [context.Pipe(duplex=False) for _ in range(processes)]
    workers = [
        context.Process(target=_worker, args=(rank, processes, store.port, pairs, sender), daemon=True)
        for rank, (_, sender) in enumerate(pipes)
    ]
    receivers, results = [receiver for receiver, _ in pipes], list[Result]()
    try:
        for worker in workers:
            worker.start()
        for _, sender in pipes:
            sender.close()  # the end of a process is then the end of its pipe
        started = joined(_answers(workers, receivers, START))
        if started.verdict != "pass":
            return [Result(started.verdict, f"the processes did not start: {started.reason}")] * len(pairs)
        for _ in pairs:
            answers = _answers(workers, receivers, limit)
            results.append(joined(answers))
            if any(a.verdict in ("timeout", "crash") or (a.raised and processes > 1) for a in answers):
                break
        return results
    finally:
        for worker in workers:
            worker.kill()
            worker.join()


def _answers(workers: Sequence[mp.Process], receivers: Sequence[Connection], limit: float) -> list[Result]:
    """The next result of each process; a timeout or a crash if there is none."""
    deadline = time.monotonic() + limit
    waiting = dict(zip(receivers, workers, strict=True))
    answers: list[Result] = []
    while waiting and (left := deadline - time.monotonic()) > 0:
        for receiver in wait(list(waiting), left):
            worker = waiting.pop(receiver)
            try:
                answers.append(receiver.recv())
            except (EOFError, OSError):
                worker.join()
                return [*answers, Result("crash", _end(worker.exitcode or 0))]  # the others may wait for this one
    return answers + [Result("timeout", f"not done after {limit:g} s")] * len(waiting)


def _end(code: int) -> str:
    return f"the process was killed by {signal.Signals(-code).name}" if code < 0 else f"the process exited with {code}"


def joined(answers: Sequence[Result]) -> Result:
    """The result of a case from those of its processes: what is most telling if they do not all pass."""
    return next(a for verdict in ("crash", "fail", "timeout", "pass") for a in answers if a.verdict == verdict)


def _worker(rank: int, processes: int, port: int, pairs: Sequence[Pair], sender: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes, and the first one ends the others
    torch.set_num_threads(1)
    store, timeout = dist.TCPStore(HOST, port), timedelta(seconds=30)
    if processes > 1:
        dist.init_process_group("gloo", store=store, rank=rank, world_size=processes, timeout=timeout)
    by_name, adapters = {case.name: case for case in CASES}, {spec: load(spec) for spec, _ in pairs}
    weight = torch.nn.Parameter(torch.zeros(()))
    weight.grad = torch.zeros(())
    torch.optim.SGD([weight], lr=0.1).step()  # imports parts of torch that take seconds
    sender.send(Result("pass"))
    for spec, name in pairs:
        sender.send(attempt(adapters[spec], by_name[name]))
    store.set(f"done {rank}", "")
    store.wait([f"done {other}" for other in range(processes)], timeout)
    os._exit(0)  # torch 2.6 sometimes hangs when it destroys the group
