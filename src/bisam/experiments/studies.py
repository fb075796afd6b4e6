"""Study: a set of recipes times seeds, run in parallel processes with live progress.

Runs are independent. A run that fails is reported and does not stop the others; a study that is interrupted goes on
where it was, by the same command.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from queue import Empty
from typing import Any, Protocol

from bisam.experiments.catalogue import METHODS
from bisam.experiments.machine import Machine, threads
from bisam.experiments.recipes import Recipe
from bisam.experiments.runs import Run, RunError
from bisam.experiments.train import train


@dataclass(frozen=True)
class Study:
    """A named comparison."""

    name: str
    title: str
    recipes: Callable[[int | None], list[Recipe]]
    """From a number of epochs (None: the study's own) to its recipes, in the order of the table."""
    seeds: int
    figures: tuple[str, ...] = ("accuracy", "flips")
    """Names of functions in `figures`."""
    first_seed: int = 0
    note: str = ""
    """What the report says about how to read it."""


def _digits(epochs: int | None) -> list[Recipe]:
    """SGD gets twice the epochs: all methods compute the same number of gradients.

    rho by best validation accuracy at 40 % noise, mean of seeds 100 to 102 (`bisam train --noise 0.4 --rho ...`): SAM's
    from {0.1, 0.2, 0.4, 0.8}, ASAM's from {1, 2, 4, 8}. Both BiSAMs take SAM's, as in the paper.
    """
    each = epochs or 30
    rhos: dict[str, float | None] = {"sgd": None, "sam": 0.4, "bisam_log": 0.4, "bisam_tanh": 0.4, "asam": 4.0}
    return [
        Recipe(method=method, noise=noise, rho=rho, epochs=2 * each if method == "sgd" else each)
        for noise in (0.0, 0.4)
        for method, rho in rhos.items()
    ]


def _cifar10_small(epochs: int | None) -> list[Recipe]:
    """The authors' recipe on a fifth of CIFAR-10 and for 15 epochs, so that two cores do it in hours."""
    each = epochs or 15
    rhos: dict[str, float | None] = {"sgd": None, "sam": 0.05, "bisam_log": 0.05, "bisam_tanh": 0.05, "abisam_log": 0.5}
    return [
        Recipe(
            dataset="cifar10",
            model="resnet20",
            method=method,
            noise=noise,
            rho=rho,
            limit=10_000,
            epochs=2 * each if method == "sgd" else each,
            batch_size=128,
            label_smoothing=0.1,
            precision="bf16",
            channels_last=True,
        )
        for noise in (0.0, 0.4)
        for method, rho in rhos.items()
    ]


_GRID = (0.1, 0.2, 0.4, 0.8)
_GRIDS: dict[str, tuple[float, ...]] = {
    **dict.fromkeys(("asam", "abisam_log", "abisam_tanh"), (1.0, 2.0, 4.0, 8.0)),
    **dict.fromkeys(("fsam", "ssam_d", "sampa"), (0.2, 0.4, 0.8, 1.6)),
    **dict.fromkeys(("zsharp", "every", "during"), (0.4, 0.8, 1.6, 3.2)),
    **dict.fromkeys(("sam_on", "fisher_sam", "ae_sam"), (0.8, 1.6, 3.2, 6.4)),
    "le_sam": (0.1, 0.2, 0.4, 0.8),
    "looksam": (0.025, 0.05, 0.1, 0.2),
    "wsam": (0.0125, 0.025, 0.05, 0.1),
    "momentum_sam": (1.2, 2.4, 4.8, 9.6),
    "bsam": (0.02, 0.05, 0.1, 0.2),
}
"""The radii that are tried, where they are not `_GRID`: four for each method, moved until the best was not the last."""

_RHOS: dict[str, float] = {
    "sam": 0.4,
    "bisam_log": 0.4,
    "bisam_tanh": 0.4,
    "abisam_log": 4.0,
    "abisam_tanh": 4.0,
    "ebisam": 0.4,
    "gbisam": 0.4,
    "asam": 4.0,
    "sam_on": 3.2,
    "fsam": 0.8,
    "vasso": 0.4,
    "zsharp": 0.8,
    "le_sam": 0.4,
    "fisher_sam": 1.6,
    "ssam_f": 0.4,
    "ssam_d": 0.8,
    "multistep_sam": 0.4,
    "gsam": 0.4,
    "wsam": 0.05,
    "cr_sam": 0.4,
    "xsam": 0.4,
    "functional_sam": 0.4,
    "esam": 0.2,
    "ksam": 0.2,
    "looksam": 0.1,
    "ae_sam": 3.2,
    "momentum_sam": 2.4,
    "sampa": 0.8,
    "sampa_0": 0.4,
    "every": 1.6,
    "during": 1.6,
    "msam": 0.4,
    "rsam": 0.2,
    "bsam": 0.05,
}
"""What `bisam run methods-rho` finds: the radius with the best validation accuracy."""


def _one(method: str, rho: float | None, epochs: int) -> Recipe:
    recipe = Recipe(method=method, noise=0.4, rho=rho, epochs=epochs)
    # bSAM brings its own momentum and its own prior.
    return replace(recipe, momentum=0.0, weight_decay=0.0) if method == "bsam" else recipe


def _methods(epochs: int | None) -> list[Recipe]:
    """Every method, with the radius that `_methods_rho` chose for it, and SGD also with twice the epochs."""
    each = epochs or 30
    return [_one("sgd", None, 2 * each)] + [_one(method, _RHOS.get(method), each) for method in METHODS]


def _methods_rho(epochs: int | None) -> list[Recipe]:
    """Every method with four radii; to choose by validation accuracy, on other seeds than those of the comparison."""
    grids = {method: _GRIDS.get(method, _GRID) for method, entry in METHODS.items() if entry.rho is not None}
    return [_one(method, rho, epochs or 30) for method, grid in grids.items() for rho in grid]


STUDIES = {
    "cifar10-small": Study(
        "cifar10-small", "A fifth of CIFAR-10, ResNet-20, with and without label noise", _cifar10_small, seeds=3
    ),
    "digits": Study("digits", "scikit-learn's digits, with and without label noise", _digits, seeds=5),
    "methods": Study(
        "methods",
        "Every method on digits with 40 % label noise",
        _methods,
        seeds=5,
        figures=("time", "accuracy"),
        note="Each radius is the one of four with the best validation accuracy, on other seeds "
        "([methods-rho](../methods-rho/report.md)); all else is equal, also where a method's authors use other "
        "settings. Most differences between methods are smaller than their spread over seeds: one small data set and "
        "five seeds do not rank them. K-SAM descends on the examples with the largest losses, which under label noise "
        "are those with the wrong labels.",
    ),
    "methods-rho": Study(
        "methods-rho",
        "The radius of every method, by validation accuracy",
        _methods_rho,
        3,
        ("radius",),
        first_seed=100,
    ),
}


class Progress(Protocol):
    """What a display must do."""

    def epoch(self, recipe: Recipe, epoch: int, validation: float) -> None:
        """An epoch of a run is over."""
        ...

    def done(self, recipe: Recipe, error: str | None) -> None:
        """A run is over, or failed."""
        ...


@dataclass(frozen=True)
class Outcome:
    """How a run of a study ended."""

    recipe: Recipe
    result: dict[str, Any] | None
    error: str | None = None


def expand(recipes: Sequence[Recipe], seeds: int, first: int = 0) -> list[Recipe]:
    """Recipes times seeds, all recipes of one seed before the next, so that an early look compares like with like."""
    return [replace(recipe, seed=seed) for seed in range(first, first + seeds) for recipe in recipes]


def run_all(recipes: Sequence[Recipe], root: Path, workers: int, machine: Machine, progress: Progress) -> list[Outcome]:
    """Run what is not finished yet, in `workers` processes; outcomes in the order of `recipes`.

    Raises:
        KeyboardInterrupt: the user stopped it; the workers are gone and finished runs are on disk.
    """
    outcomes: dict[Recipe, Outcome] = {}
    for recipe in recipes:
        run = Run.under(root, recipe)
        try:
            if (result := run.result) is not None:
                run.check_recipe()
                outcomes[recipe] = Outcome(recipe, result)
        except RunError as error:
            outcomes[recipe] = Outcome(recipe, None, str(error))
    for recipe, outcome in outcomes.items():
        progress.done(recipe, outcome.error)

    left = [recipe for recipe in recipes if recipe not in outcomes]
    if left:
        for outcome in _in_processes(left, root, min(workers, len(left)), machine, progress):
            outcomes[outcome.recipe] = outcome
            progress.done(outcome.recipe, outcome.error)
    return [outcomes[recipe] for recipe in recipes]


def _in_processes(
    recipes: Sequence[Recipe], root: Path, workers: int, machine: Machine, progress: Progress
) -> Iterator[Outcome]:
    """Outcomes as they come. A process that is killed takes its pool along: a new one gets what was not finished."""
    left, killed = list(recipes), Counter[Recipe]()
    while left:
        events, running = _SPAWN.Queue(), set[Recipe]()
        pool = ProcessPoolExecutor(workers, mp_context=_SPAWN, initializer=_start, initargs=(events, workers))
        with _stopping(pool):
            with _deaf():
                pending = {pool.submit(_work, recipe, root, machine): recipe for recipe in left}
            while pending:
                done, _ = wait(pending, timeout=0.1, return_when=FIRST_COMPLETED)
                for recipe, epoch, validation in _drained(events):
                    running.add(recipe)
                    if epoch:
                        progress.epoch(recipe, epoch, validation)
                suspects = running.copy() or {pending[future] for future in done}
                for future in done:
                    recipe = pending.pop(future)
                    if isinstance(future.exception(), BrokenProcessPool):
                        killed[recipe] += recipe in suspects
                        if killed[recipe] <= 1:
                            continue
                    left.remove(recipe)
                    running.discard(recipe)
                    yield _outcome(recipe, future)
        pool.shutdown()


def _drained(events: Any) -> Iterator[tuple[Recipe, int, float]]:
    try:
        while True:
            yield events.get_nowait()
    except Empty:
        return


@contextmanager
def _stopping(pool: ProcessPoolExecutor) -> Generator[None]:
    """End the pool's processes at once if the block is left by an exception; their runs resume from the last epoch."""
    try:
        yield
    except BaseException:
        with _deaf():  # to a second Ctrl-C
            for process in list((pool._processes or {}).values()):
                process.terminate()
            pool.shutdown(cancel_futures=True)
        raise


@contextmanager
def _deaf() -> Generator[None]:
    """Without Ctrl-C. Processes that start here inherit that: they must not hear it, even while they import."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _outcome(recipe: Recipe, future: Future[dict[str, Any]]) -> Outcome:
    try:
        return Outcome(recipe, future.result())
    except BrokenProcessPool:
        return Outcome(
            recipe, None, "its process was killed twice (out of memory?): the same command goes on from there"
        )
    except (RunError, ValueError) as error:
        return Outcome(recipe, None, str(error))
    except OSError as error:
        return Outcome(recipe, None, f"cannot write under {error.filename or 'its folder'}: {error.strerror or error}")
    except Exception as error:  # a study goes on; the type is what a bug report needs
        return Outcome(recipe, None, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


_SPAWN = mp.get_context("spawn")  # fork is unsafe once torch has threads
_events: Any = None


def _start(events: Any, workers: int) -> None:
    """Set up a worker: its share of the cores, and it does not outlive the parent."""
    global _events
    _events = events
    threads(workers)
    parent = mp.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _work(recipe: Recipe, root: Path, machine: Machine) -> dict[str, Any]:
    last = 0.0
    _events.put((recipe, 0, 0.0))

    def report(row: dict[str, float]) -> None:
        nonlocal last
        if time.monotonic() - last > 0.1 or row["epoch"] == recipe.epochs:
            last = time.monotonic()
            _events.put((recipe, int(row["epoch"]), row["validation"]))

    return train(Run.under(root, recipe), machine, report)
