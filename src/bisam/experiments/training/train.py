"""The training loop: Lightning Fabric around it, a sharpness-aware loss in it.

`model`, `optimizer` and `scheduler` are made and stepped as in any loop; the line `loss = sharp(x, y)` is the method.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from statistics import fmean, median
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException
from torch.optim.swa_utils import AveragedModel

from bisam import SharpnessAware
from bisam.distributed.fsdp import reshard
from bisam.experiments import data
from bisam.experiments.data.image_tensors import Images, channels
from bisam.experiments.data.splits import Data, Split, batches_of
from bisam.experiments.errors import RunError
from bisam.experiments.models.build import build
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs.folder import Row, Run, damaged
from bisam.experiments.runs.machine import Machine, end_with_parent
from bisam.experiments.training.counting import Watch
from bisam.experiments.training.epoch import predictions, train_epoch
from bisam.experiments.training.fsdp import (
    averaging,
    divided,
    is_sharded,
    load_optimizer,
    memories,
    shard,
    share_buffers,
    whole,
)
from bisam.experiments.training.loggers import loggers
from bisam.experiments.training.metrics import scores
from bisam.experiments.training.optimizers import descent_loss, optimizer_of, scaler_of, scheduler_of
from bisam.experiments.training.reference_speed import Pace

OnEpoch = Callable[[Row], None]


def train(run: Run, machine: Machine = Machine(), on_epoch: OnEpoch | None = None) -> dict[str, Any]:  # noqa: B008
    """Train the run's recipe to its end, from where it was interrupted, and return its result.

    Args:
        run: where to read and write; a finished run is not run again.
        machine: where to compute.
        on_epoch: called with each epoch's row of metrics.

    Raises:
        ValueError: the recipe or the device names something that is not here.
        RunError: the folder is damaged, belongs to another recipe or is in use.
        OSError: the disk is full or read-only.
    """
    run.recipe.check_trainable()
    fabric = machine.fabric(run.recipe.precision)
    if machine.nodes > 1:  # whoever started the processes has one of them on each device
        fabric.launch()
        with run.open() if fabric.is_global_zero else nullcontext():
            fabric.barrier()
            return run.result or _train(fabric, run, machine, on_epoch if fabric.is_global_zero else None)
    if machine.devices > 1:
        _fits(run.recipe, data.load(run.recipe, machine), machine)  # what is wrong is said once, here
        with run.open():
            return run.result or _spawned(fabric, run, machine, on_epoch)
    training = _prepared(fabric, run, machine)
    with run.open():
        return run.result or training().to_the_end(on_epoch)


def _prepared(fabric: Fabric, run: Run, machine: Machine) -> Callable[[], Training]:
    splits = data.load(run.recipe, machine)
    _fits(run.recipe, splits, machine)
    torch.manual_seed(run.recipe.seed)
    model = build(run.recipe.model, splits.classes, channels=channels(splits.test), weights=run.recipe.weights)
    probe(model, splits, run.recipe)
    return lambda: Training(fabric, run, machine, splits, model)


def _fits(recipe: Recipe, splits: Data, machine: Machine) -> None:
    """Make sure that a recipe can be trained on its data."""
    most = (splits.classes - 1) / splits.classes
    if recipe.label_smoothing > most:
        raise ValueError(
            f"label_smoothing must be at most {most:.3g} with {splits.classes} classes, got {recipe.label_smoothing}"
        )
    processes = machine.devices * machine.nodes
    if not batches_of(len(splits.train), recipe.batch_size, processes):
        examples = min(recipe.batch_size, len(splits.train))
        raise ValueError(f"batches of {examples} cannot be shared by {processes} devices: give a larger batch_size")


@torch.no_grad()
def probe(model: nn.Module, splits: Data, recipe: Recipe) -> None:
    """Make sure that the model takes the images.

    Raises:
        ValueError: it does not.
    """
    if isinstance(splits.test, Images):
        images = splits.test.images[:2].float()
    elif recipe.dataset.startswith("glue:"):
        return
    else:
        images = torch.zeros(2, 3, recipe.image_size, recipe.image_size)
    try:
        model.eval()(images)
    except Exception as error:  # each network has its own way to say no
        shape, reason = " x ".join(map(str, images.shape[1:])), " ".join(str(error).split())[:200]
        raise ValueError(
            f"model {recipe.model!r} cannot take the images of {recipe.dataset}, {shape}: {reason}"
        ) from error
    model.train()


def _train(fabric: Fabric, run: Run, machine: Machine, on_epoch: OnEpoch | None) -> dict[str, Any]:
    return _prepared(fabric, run, machine)().to_the_end(on_epoch)


def _spawned(fabric: Fabric, run: Run, machine: Machine, on_epoch: OnEpoch | None) -> dict[str, Any]:
    """The same in a process for each device; epochs are told by what the first one writes."""
    over = threading.Event()
    teller = threading.Thread(target=_tell, args=(run, on_epoch, over), daemon=True)
    if on_epoch is not None:
        teller.start()
    try:
        fabric.launch(
            partial(_one_of_many, run, machine, torch.get_num_threads())
        )  # not as arguments, which it would take for data
    except (ProcessRaisedException, ProcessExitedException) as error:
        reason = [line for line in str(error).splitlines() if line.strip()][-1]
        after = ": the same command goes on" if isinstance(error, ProcessExitedException) else ""
        raise RunError(f"a process of {run.folder} failed ({reason}){after}") from error
    finally:
        over.set()
    if on_epoch is not None:
        teller.join()
    assert run.result is not None
    return run.result


def _one_of_many(run: Run, machine: Machine, threads: int, fabric: Fabric) -> None:
    end_with_parent()
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # Ctrl-C is the first process's to report
    torch.set_num_threads(max(1, threads // machine.devices))
    _train(fabric, run, machine, None)


def _tell(run: Run, on_epoch: OnEpoch, over: threading.Event) -> None:
    told, last = 0, False
    while not last:
        last = over.wait(0.5)
        rows = run.metrics()
        for row in rows[told:]:
            on_epoch(row)
        told = max(told, len(rows))


class Training:
    """A run while it is trained: everything that its checkpoint holds."""

    def __init__(self, fabric: Fabric, run: Run, machine: Machine, splits: Data, model: nn.Module) -> None:
        recipe = run.recipe
        self._fabric, self._run, self._machine, self._data, self._recipe = fabric, run, machine, splits, recipe
        self._train, self._validation = (part.to(fabric.device) for part in (splits.train, splits.validation))
        model = fabric._precision.convert_module(model)
        self._model = model.to(memory_format=torch.channels_last) if recipe.channels_last else model
        # Copies come before the model is sharded, which has none, and its optimizer after it.
        self._pace = Pace(fabric, model, self._train, recipe)
        self._average = self._averaged(model)
        shard(model, fabric)
        optimizer = optimizer_of(model, recipe)
        losses = batches_of(len(splits.train), recipe.batch_size, fabric.world_size)
        steps = -(-losses // recipe.accumulate)
        self._scheduler = scheduler_of(optimizer, recipe, steps * recipe.epochs)
        method = recipe.build_method(
            optimizer=optimizer, steps=losses * recipe.epochs, epoch=losses, examples=len(splits.train)
        )
        self._watch = Watch(method)
        if recipe.compile:
            # A graph for each size of batches: one for all, made at the second size, would compute other bits, and a
            # resumed run comes to its sizes in another order.
            model.compile(dynamic=False)
        loss = SharpnessAware(
            model, self._watch, descent_loss(recipe.label_smoothing, splits.classes), scaler=scaler_of(fabric)
        )
        self._sharp, self._optimizer = fabric.setup(loss, optimizer)
        self._history: list[Row] = []
        self._best: dict[str, Any] = {"score": -2.0}  # less than any, also than a correlation
        self._resume()

    def _averaged(self, model: nn.Module) -> AveragedModel | None:
        if self._recipe.ema is None:
            return None
        average = AveragedModel(model, multi_avg_fn=averaging(self._recipe.ema), use_buffers=True)
        shard(average.module, self._fabric)
        return average.to(self._fabric.device)

    def to_the_end(self, on_epoch: OnEpoch | None) -> dict[str, Any]:
        """Train the epochs that are left, test once, and write the result."""
        recipe, fabric = self._recipe, self._fabric
        boards = loggers(self._machine.log, self._run.folder, recipe.to_dict()) if fabric.is_global_zero else []
        for epoch in range(len(self._history) + 1, recipe.epochs + 1):
            row = self.epoch(epoch)
            self._history.append(row)
            for board in boards:
                board.log({k: v for k, v in row.items() if k != "epoch"}, epoch)
            state = self._state()
            if fabric.is_global_zero:
                self._run.save(state, self._history)
            if on_epoch is not None:
                on_epoch(row)
        for board in boards:
            board.close()
        result = self._result()  # with a sharded model all are needed
        if fabric.is_global_zero:
            result = self._run.finish(result)
        return fabric.broadcast(result)  # nobody goes before it is written

    def epoch(self, epoch: int) -> Row:
        """Train one epoch and validate; returns its row of metrics."""
        # An epoch draws the same whether or not it follows a resume; all methods see the same batches.
        seed = self._recipe.seed * 1_000_003 + epoch
        torch.manual_seed(seed + 15_485_863 * self._fabric.global_rank)
        random = torch.Generator().manual_seed(seed)
        row: Row = {"epoch": epoch, "learning_rate": float(self._scheduler.get_last_lr()[0])}
        row |= train_epoch(
            self._fabric, self._sharp, self._watch, self._optimizer, self._train, self._recipe, random, self._after_step
        )
        row["relative_time"] = row["seconds"] / row["losses"] / self._pace.seconds()
        if self._recipe.schedule == "cosine":
            self._scheduler.step()
        share_buffers(self._model, self._fabric)
        row["validation"] = self._score(self._model, self._validation)[0]
        if self._average is not None:
            row["validation_ema"] = self._score(self._average.module, self._validation)[0]
        if row["validation"] > self._best["score"]:
            self._best = {"score": row["validation"], "epoch": epoch, "weights": _copied(self._model)}
        return row

    def _after_step(self) -> None:
        if self._recipe.schedule != "cosine":
            self._scheduler.step()
        if self._average is not None:
            self._average.update_parameters(self._model)

    def _score(self, model: nn.Module, split: Split) -> list[float]:
        """The scores of a data set's metrics, the first of which chooses."""
        metrics = self._data.metrics
        with self._fabric.autocast():
            predicted, labels = predictions(model, split, self._recipe, metrics)
        reshard(model)
        # The first device's: all have to agree which epoch is the best.
        return self._fabric.broadcast(scores(metrics, predicted, labels))

    def _state(self) -> dict[str, Any]:
        """Everything, in one piece on the first device; all of them must ask."""
        first, sharp = self._fabric.is_global_zero, self._sharp.state_dict()
        remembered = memories(sharp[_MEMORY], self._fabric)
        sharp[_MEMORY] = remembered[0]  # once in the file
        state: dict[str, Any] = {
            "sharp": whole(sharp, first),
            "memories": remembered,
            "sharded": is_sharded(self._fabric),
            "optimizer": whole(self._optimizer.state_dict(), first),
            "scheduler": self._scheduler.state_dict(),
            "history": self._history,
            "best": self._best,
        }
        if self._average is not None:
            state["average"] = whole(self._average.state_dict(), first)
        if (scaler := scaler_of(self._fabric)) is not None:
            state["scaler"] = scaler.state_dict()
        return state

    def _resume(self) -> None:
        if (checkpoint := self._run.checkpoint()) is None:
            return
        try:
            remembered, world = checkpoint["memories"], self._fabric.world_size
            if len(remembered) != world:
                raise RunError(
                    f"{self._run.folder} was begun with {len(remembered)} devices, not with {world}: go on with as "
                    "many, or give another --out"
                )
            if (begun := checkpoint.get("sharded", False)) != is_sharded(self._fabric):
                raise RunError(
                    f"{self._run.folder} was begun {'with' if begun else 'without'} --strategy fsdp, which perturbs "
                    "for the whole batch: go on in the same way, or give another --out"
                )
            sharp = {**checkpoint["sharp"], _MEMORY: remembered[self._fabric.global_rank]}
            self._sharp.load_state_dict(divided(sharp, self._sharp.state_dict()))
            load_optimizer(self._optimizer, checkpoint["optimizer"])
            self._scheduler.load_state_dict(checkpoint["scheduler"])
            self._history, self._best = checkpoint["history"], checkpoint["best"]
            if self._average is not None:
                self._average.load_state_dict(divided(checkpoint["average"], self._average.state_dict()))
            if (scaler := scaler_of(self._fabric)) is not None:
                scaler.load_state_dict(checkpoint["scaler"])
        except (LookupError, TypeError, ValueError, RuntimeError) as error:
            raise damaged(self._run.folder / "checkpoint.pt", error) from error

    def _result(self) -> dict[str, Any]:
        test = self._data.test.to(self._fabric.device)  # looked at here for the first time
        history, metrics = self._history, self._data.metrics
        tested = {"last": self._score(self._model, test)}
        if self._average is not None:
            tested["ema"] = self._score(self._average.module, test)
        self._model.load_state_dict(divided(self._best["weights"], self._model.state_dict()))
        tested["best"] = self._score(self._model, test)
        return {
            **{f"test_{when}": values[0] for when, values in tested.items()},
            "validation_best": self._best["score"],
            "best_epoch": self._best["epoch"],
            "metric": metrics[0],
            "scores": {when: dict(zip(metrics, values, strict=True)) for when, values in tested.items()},
            "examples": len(self._data.train),
            "seconds_per_epoch": median(r["seconds"] for r in history),
            "relative_time": median(r["relative_time"] for r in history),
            "gradients_per_step": fmean(r["gradients"] for r in history),
            "forwards_per_step": fmean(r["forwards"] for r in history),
            "device": _named(self._fabric.device),
            "processes": self._fabric.world_size,
        }


_MEMORY = "_extra_state"  # its key in the state of a loss


def _named(device: torch.device) -> str:
    return f"{device}, {torch.cuda.get_device_name(device)}" if device.type == "cuda" else str(device)


def _copied(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().cpu().clone() for k, v in whole(model.state_dict()).items()}
