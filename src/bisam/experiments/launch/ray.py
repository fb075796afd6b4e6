"""Ray: independent runs of a study on many machines, as tasks of Ray (extra `cluster`).

The machines share the run folders and the data, which must be on storage that all of them see under the same path. All
machines need the same version of bisam. If the machine or process of a task is lost, a new task resumes the run from
its checkpoint; the operating system has released the lock of the lost one.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
import uuid
import warnings
from collections import Counter
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from bisam import __version__
from bisam.experiments.errors import RunError
from bisam.experiments.launch.outcomes import Done, Outcome, Progress, collect_outcomes
from bisam.experiments.launch.work import train_or_explain
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs.files import write
from bisam.experiments.runs.folder import Run
from bisam.experiments.runs.machine import Machine, ignore_interrupts
from bisam.experiments.studies.study import Analyses


def run_all(
    recipes: Sequence[Recipe],
    root: Path,
    machine: Machine,
    progress: Progress,
    *,
    address: str,
    gpus: float = 0,
    cpus: int = 1,
    retries: int = 3,
    analyses: Analyses | None = None,
) -> list[Outcome]:
    """Run what is not finished yet, each run as a task; return the outcomes in the order of `recipes`.

    Args:
        recipes: the runs.
        root: folder that the run folders are in, on storage that all machines share.
        machine: devices, data and loggers of each run.
        progress: receives completed epochs and runs.
        address: "local" for a cluster of this machine alone, which ends with the study; "auto" for the cluster that
            this machine belongs to; host:port, or ray://host:port from outside of it. An existing connection of this
            process is used.
        gpus: GPUs of each run; a fraction such as 0.25 lets several runs share one.
        cpus: CPUs, and threads, of each run.
        retries: how often a run is restarted after its machine or process was lost.
        analyses: of each run, in its task after it is trained.

    Raises:
        ValueError: ray is not installed, the cluster is not reachable, or the settings contradict each other.
        RunError: the connection to the cluster was lost.
        KeyboardInterrupt: the user stopped it; the tasks are cancelled and finished runs are on disk.
    """
    ray = _imported()
    for name, value in (("cpus", cpus - 1), ("gpus", gpus), ("retries", retries)):
        if value < 0:
            raise ValueError(f"--{name} is too small: {value + (name == 'cpus'):g}")
    machine, root = machine_of_a_task(machine, gpus), root.resolve()
    begin = time.time()

    def run(left: Sequence[Recipe], done: Done) -> None:
        with _connected(ray, address), marker_file(root) as mark:
            check_capacity(ray, cpus, gpus, strict=address == "local")
            task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0)(work)

            def start(recipe: Recipe, again: bool = False) -> Any:
                return task.remote(recipe, root, machine, mark, __version__, cpus, os.getcwd(), again, analyses, begin)

            run_as_tasks(
                ray, {start(recipe): recipe for recipe in left}, start, retries, EpochPoller(root, progress), done
            )

    return collect_outcomes(recipes, root, progress, run, analyses)


def _imported() -> Any:
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray = import_module("ray")  # which replaces the handler in the main thread
        if threading.current_thread() is threading.main_thread() and before is not None:
            signal.signal(signal.SIGTERM, before)
        return ray
    except ModuleNotFoundError:
        raise ValueError("--ray needs ray: pip install 'bisam[cluster]'") from None


def machine_of_a_task(machine: Machine, gpus: float) -> Machine:
    """Return the machine for a task, which sees its GPUs as cuda and has another working folder."""
    if machine.nodes > 1:
        raise ValueError(f"--nodes {machine.nodes} with --ray: a run uses one machine there; use --devices instead")
    if gpus > 1 and gpus != int(gpus):
        raise ValueError(f"--gpus {gpus:g} is neither a whole number nor a fraction of one GPU")
    if not gpus and machine.device != "cpu":
        raise ValueError(f"--device {machine.device} with --ray needs --gpus, the number or fraction of GPUs of a run")
    if gpus and machine.device not in ("cpu", "cuda", "auto"):
        raise ValueError(f"--device {machine.device} with --gpus: Ray assigns the GPUs; leave --device out")
    if gpus and machine.devices > max(1, gpus):
        raise ValueError(f"--devices {machine.devices} need --gpus {machine.devices}, got {gpus:g}")
    return replace(machine, device="cuda" if gpus else "cpu", data_dir=machine.data_dir.absolute())


@contextmanager
def _connected(ray: Any, address: str) -> Generator[None]:
    if ray.is_initialized():
        yield
        return
    if address not in ("local", "auto"):
        _reach(address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    small = {"include_dashboard": False, "object_store_memory": 100 * 2**20} if address == "local" else {}
    try:
        try:
            ray.init(address=address, **quiet, **small)
        except (OSError, RuntimeError) as error:  # not reachable, or of another version
            raise _no_cluster(address, error) from error
        # Lost workers are reported by this module, once and in one line.
        import_module("ray._private.worker").__dict__["_worker_logs_enabled"] = False
        yield
    finally:
        with ignore_interrupts():
            ray.shutdown()


def _reach(address: str) -> None:
    """Check that the address accepts connections: Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"--ray {address!r} is not an address: use local, auto, host:port or ray://host:port")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise _no_cluster(address, error) from error


def _no_cluster(address: str, error: BaseException) -> ValueError:
    reason = " ".join(str(error).split())[:200]
    cause: BaseException | None = error
    while cause is not None:
        if "auth" in str(cause).lower() and "token" in str(cause).lower():
            return ValueError(f"--ray {address} requires a token ({reason}): set RAY_AUTH_MODE=token")
        cause = cause.__cause__ or cause.__context__
    return ValueError(
        f"--ray {address}: cluster not reachable ({reason}): start one with `ray start --head`, or use local"
    )


def check_capacity(ray: Any, cpus: int, gpus: float, *, strict: bool) -> None:
    """Warn, or with `strict` raise an error, if no machine of the cluster can run a task."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if any(node.get("CPU", 0) >= cpus and node.get("GPU", 0) >= gpus for node in nodes):
        return
    wanted = f"no machine of the cluster has {cpus} CPUs" + (f" and {gpus:g} GPUs" if gpus else "")
    if strict:
        raise ValueError(f"{wanted}: give smaller --cpus or --gpus")
    warnings.warn(f"{wanted}: the runs wait for such a machine to join", RuntimeWarning, stacklevel=2)


@contextmanager
def marker_file(root: Path) -> Generator[Path]:
    """Create a file by which a worker checks that it sees the same `root`."""
    mark = root / f".ray-{uuid.uuid4().hex}"
    write(mark, "")
    try:
        yield mark
    finally:
        mark.unlink(missing_ok=True)


class EpochPoller:
    """Reports the epochs that appear in the run folders."""

    def __init__(self, root: Path, progress: Progress) -> None:
        self._root, self._progress = root, progress
        self._seen: dict[Recipe, float] = {}
        self._next = 0.0

    def poll(self, recipes: Iterable[Recipe]) -> None:
        """Look at the folders of these recipes, at most once a second."""
        if time.monotonic() < self._next:
            return
        for recipe in recipes:
            run = Run.under(self._root, recipe)
            with suppress(OSError, RunError):  # not started yet; or damaged, which the run itself reports
                if (changed := (run.folder / "metrics.csv").stat().st_mtime) == self._seen.get(recipe):
                    continue
                self._seen[recipe] = changed
                for row in run.metrics()[-1:]:
                    self._progress.epoch(recipe, recipe.completed(row), row["validation"])
        self._next = time.monotonic() + 1


def run_as_tasks(ray: Any, tasks: dict[Any, Recipe], start: Any, retries: int, poller: EpochPoller, done: Done) -> None:
    """Wait for tasks, and restart lost ones, each at most `retries` times."""
    # Not with Ray's own retries, which never end when memory is short.
    lost = Counter[Recipe]()
    try:
        while tasks:
            ready, _ = ray.wait(list(tasks), timeout=1)
            poller.poll(tasks.values())
            for task in ready:
                recipe = tasks.pop(task)
                try:
                    outcome = ray.get(task)
                except (
                    ray.exceptions.RayTaskError
                ) as error:  # before training started, for example if bisam is not installed
                    outcome = Outcome(recipe, None, _last_line(error))
                except ray.exceptions.RayError as error:
                    lost[recipe] += 1
                    if lost[recipe] <= retries:
                        tasks[start(recipe, True)] = recipe
                        continue
                    outcome = Outcome(recipe, None, _lost(error, lost[recipe], ray))
                done(outcome)
    except (ray.exceptions.RayError, ConnectionError) as error:
        raise RunError(
            f"the connection to the Ray cluster was lost ({_last_line(error)}): the same command resumes"
        ) from error
    finally:
        with ignore_interrupts(), suppress(Exception):  # a second Ctrl-C; and the cluster may be unreachable
            for task in tasks:
                ray.cancel(task, force=True)
            if tasks:
                ray.wait(list(tasks), num_returns=len(tasks), timeout=10)


def _lost(error: Exception, times: int, ray: Any) -> str:
    remedy = "the same command resumes after its last epoch"
    if isinstance(error, ray.exceptions.OutOfMemoryError):
        return f"its machine was short of memory {times} times: give each run more --cpus; {remedy}"
    return f"its worker was lost {times} times ({type(error).__name__}; short of memory?): {remedy}"


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[-1][:300]


def work(
    recipe: Recipe,
    root: Path,
    machine: Machine,
    mark: Path,
    version: str,
    cpus: int,
    folder: str,
    again: bool,
    analyses: Analyses | None = None,
    begin: float = 0.0,
) -> Outcome:
    """Train and analyse one run in a Ray worker; `begin` is the start of the study on the system's clock."""
    if machine.max_time is not None:
        if time.time() - begin > machine.max_time:
            return Outcome(recipe, None, out_of_time=True)
        machine = machine.later(time.time() - begin)
    here = socket.gethostname()
    if version != __version__:
        return Outcome(
            recipe, None, f"{here} has bisam {__version__}, this machine {version}: install the same version on all"
        )
    if not _sees(mark):
        return Outcome(recipe, None, f"{here} does not see {root}: give an --out on storage that all machines share")
    with suppress(OSError):  # the base of relative paths in the recipe
        os.chdir(folder)
    torch.set_num_threads(cpus)
    if again:
        # A file server needs a minute or two to release the lock of a lost machine.
        with suppress(Timeout), FileLock(Run.under(root, recipe).folder / ".lock", timeout=LEASE):
            pass
    return train_or_explain(recipe, root, machine, analyses=analyses)


LEASE = 150.0
"""Seconds after which a file server has released the lock of a lost machine."""


def _sees(mark: Path) -> bool:
    for _ in range(10):  # a network file system may cache for a while that the file did not exist
        if mark.exists():
            return True
        time.sleep(0.5)
    return False
