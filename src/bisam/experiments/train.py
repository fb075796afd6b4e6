"""The training loop: Lightning Fabric around it, a sharpness-aware loss in it.

`model`, `optimizer` and `scheduler` are made and stepped as in any loop; the line `loss = sharp(x, y)` is the method.
"""

from __future__ import annotations

import copy
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from statistics import fmean, median
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.loggers import TensorBoardLogger
from torch import Tensor, nn

from bisam import ERM, Evaluation, Oracle, SharpnessAware, Vector
from bisam.evaluation import Batch, size
from bisam.experiments import data, models
from bisam.experiments.data import Split
from bisam.experiments.recipes import Recipe
from bisam.experiments.runs import Row, Run, damaged
from bisam.methods import Method
from bisam.objectives import Objective
from bisam.oracle import View

OnEpoch = Callable[[Row], None]


def train(run: Run, device: str = "cpu", on_epoch: OnEpoch | None = None) -> dict[str, Any]:
    """Train the run's recipe to its end, from where it was interrupted, and return its result.

    Args:
        run: where to read and write; a finished run is not run again.
        device: cpu, cuda, cuda:1, mps, ... or auto.
        on_epoch: called with each epoch's row of metrics.

    Raises:
        ValueError: the recipe or the device names something that is not here.
        RunError: the folder is damaged, belongs to another recipe or is in use.
        OSError: the disk is full or read-only.
    """
    recipe = run.recipe
    fabric = _fabric(device)
    splits = data.load(recipe.dataset, recipe.noise, recipe.seed)
    torch.manual_seed(recipe.seed)
    model = models.build(recipe.model, splits.classes)
    with run.open():
        if run.result is not None:
            return run.result
        training, validation = splits.train.to(fabric.device), splits.validation.to(fabric.device)
        optimizer = torch.optim.SGD(
            model.parameters(), recipe.learning_rate, momentum=recipe.momentum, weight_decay=recipe.weight_decay
        )
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.epochs)
        epoch_steps = -(-len(training) // recipe.batch_size)
        method = recipe.build_method(
            optimizer=optimizer, steps=epoch_steps * recipe.epochs, epoch=epoch_steps, examples=len(training)
        )
        watch, pace = Watch(method), Pace(fabric, model, training, recipe)
        sharp = SharpnessAware(model, watch, loss=_descent_loss(recipe.label_smoothing, splits.classes))
        sharp, optimizer = fabric.setup(sharp, optimizer)

        history: list[Row] = []
        best: dict[str, Any] = {"accuracy": -1.0}
        if (checkpoint := run.checkpoint()) is not None:
            try:
                sharp.load_state_dict(checkpoint["sharp"])
                optimizer.load_state_dict(checkpoint["optimizer"])
                scheduler.load_state_dict(checkpoint["scheduler"])
                history, best = checkpoint["history"], checkpoint["best"]
            except (LookupError, TypeError, ValueError, RuntimeError) as error:
                raise damaged(run.folder / "checkpoint.pt", error) from error

        board = TensorBoardLogger(run.folder, name="tensorboard", version="")
        for epoch in range(len(history) + 1, recipe.epochs + 1):
            # An epoch draws the same whether or not it follows a resume.
            torch.manual_seed(recipe.seed * 1_000_003 + epoch)
            row: Row = {"epoch": epoch, "learning_rate": float(scheduler.get_last_lr()[0])}
            row |= train_epoch(fabric, sharp, watch, optimizer, training, recipe.batch_size)
            row["relative_time"] = row["seconds"] / (epoch_steps * pace.seconds())
            scheduler.step()
            row["validation_accuracy"] = accuracy(model, validation)
            if row["validation_accuracy"] > best["accuracy"]:
                weights = {k: v.detach().cpu().clone() for k, v in model.state_dict().items()}
                best = {"accuracy": row["validation_accuracy"], "epoch": epoch, "weights": weights}
            history.append(row)
            board.log_metrics({k: v for k, v in row.items() if k != "epoch"}, step=epoch)
            run.save(
                {
                    "sharp": sharp.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "scheduler": scheduler.state_dict(),
                    "history": history,
                    "best": best,
                },
                history,
            )
            if on_epoch is not None:
                on_epoch(row)
        board.finalize("success")

        test = splits.test.to(fabric.device)  # looked at here for the first time
        last = accuracy(model, test)
        model.load_state_dict(best["weights"])
        return run.finish(
            {
                "test_accuracy_best": accuracy(model, test),
                "test_accuracy_last": last,
                "validation_accuracy_best": best["accuracy"],
                "best_epoch": best["epoch"],
                "seconds_per_epoch": median(r["seconds"] for r in history),
                "relative_time": median(r["relative_time"] for r in history),
                "gradients_per_step": fmean(r["gradients"] for r in history),
                "forwards_per_step": fmean(r["forwards"] for r in history),
                "device": str(fabric.device),
            }
        )


def train_epoch(fabric: Fabric, sharp: Any, watch: Watch, optimizer: Any, split: Split, batch_size: int) -> Row:
    """One pass over `split`: what anybody's loop looks like, and counts for the metrics."""
    sharp.train()
    start = time.perf_counter()
    losses, correct, flipped = (torch.zeros((), device=fabric.device) for _ in range(3))
    watch.counts.clear()
    for x, y in split.batches(batch_size, shuffle=True):
        loss = sharp(x, y)
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()

        clean = sharp.clean  # at w, from the pass that the method made anyway
        right = clean.outputs.argmax(1) == y
        losses += clean.value * len(y)
        correct += right.sum()
        if len(watch.outputs) == len(y):
            flipped += (right & (watch.outputs.argmax(1) != y)).sum()
        else:
            flipped += float("nan")  # the method descended on a part of the batch
    n = len(split)
    return {
        "train_loss": losses.item() / n,
        "train_accuracy": correct.item() / n,
        "flipped": flipped.item(),
        "gradients": watch.counts[True] / n,
        "forwards": watch.counts[False] / n,
        "seconds": time.perf_counter() - start,
    }


@torch.no_grad()
def accuracy(model: nn.Module, split: Split) -> float:
    """Share of `split` that `model` classifies correctly."""
    model.eval()
    correct = sum((model(x).argmax(1) == y).sum() for x, y in split.batches(512))
    assert isinstance(correct, Tensor)
    return correct.item() / len(split)


class Watch:
    """A method, what it costs, and what the model answered where it took the last descent gradient."""

    def __init__(self, method: Method) -> None:
        self.method = method
        self.outputs = torch.empty(0)
        self.counts = Counter[bool]()
        """Examples in queries with and without gradient."""

    def __call__(self, oracle: Oracle, batch: Batch) -> Evaluation:
        """As the method, with one look at its answer."""
        answer = self.method(_Counted(oracle, self.counts), batch)
        self.outputs = answer.outputs
        return answer


class _Counted(View):
    def __init__(self, oracle: Oracle, counts: Counter[bool]) -> None:
        super().__init__(oracle)
        self._counts = counts

    def query(
        self,
        batch: Batch,
        objective: Objective | None = None,
        *,
        at: Vector | None = None,
        grad: bool = True,
        track: bool | None = None,
    ) -> Evaluation:
        self._counts[grad] += size(batch) or 1
        given, at = [at], None  # not held through the forward pass, see Oracle.query
        return super().query(batch, objective, at=given.pop(), grad=grad, track=track)

    def together(self, *queries: Mapping[str, Any]) -> list[Evaluation]:
        for query in queries:
            self._counts[query.get("grad", True)] += size(query["batch"]) or 1
        return super().together(*queries)


class Pace:
    """Plain training beside the run, on a copy of its model: of noisy times, a ratio of neighbours is the least so."""

    def __init__(self, fabric: Fabric, model: nn.Module, split: Split, recipe: Recipe) -> None:
        copied = copy.deepcopy(model)
        self._watch, self._fabric, self._batch_size = Watch(ERM()), fabric, recipe.batch_size
        self._split = Split(*(part[: _PACE * recipe.batch_size] for part in (split.images, split.labels)))
        loss = SharpnessAware(copied, self._watch, nn.CrossEntropyLoss(reduction="none"))
        optimizer = torch.optim.SGD(copied.parameters(), recipe.learning_rate, momentum=0.9, weight_decay=5e-4)
        self._sharp, self._optimizer = fabric.setup(loss, optimizer)

    def seconds(self) -> float:
        """Seconds per step, now."""
        device = self._fabric.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            row = train_epoch(self._fabric, self._sharp, self._watch, self._optimizer, self._split, self._batch_size)
        return row["seconds"] / -(-len(self._split) // self._batch_size)


_PACE = 8  # steps beside each epoch


def _descent_loss(smoothing: float, classes: int) -> nn.Module:
    # The authors spread the smoothing over the wrong classes, torch over all: the same thing with another constant.
    return nn.CrossEntropyLoss(label_smoothing=smoothing * classes / (classes - 1), reduction="none")


def check_device(device: str) -> None:
    """Make sure that runs can be placed on `device`.

    Raises:
        ValueError: it is unknown, or not here.
    """
    _fabric(device)


def _fabric(device: str) -> Fabric:
    logging.getLogger("lightning_fabric").setLevel(logging.ERROR)  # it advertises and advises on stdout
    kind, _, index = device.partition(":")
    try:
        return Fabric(accelerator=kind, devices=[int(index)] if index else 1)
    except Exception as error:  # each accelerator has its own way to say no
        raise ValueError(
            f"device {device!r} is unknown or not available here: --device takes cpu, cuda, cuda:1, mps or auto"
        ) from error
