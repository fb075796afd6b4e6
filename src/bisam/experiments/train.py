"""The training loop: Lightning Fabric around it, a sharpness-aware loss in it.

`model`, `optimizer` and `scheduler` are made and stepped as in any loop; the line `loss = sharp(x, y)` is the method.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.loggers import TensorBoardLogger
from torch import Tensor, nn

from bisam import Evaluation, Oracle, SharpnessAware
from bisam.evaluation import Batch
from bisam.experiments import data, models
from bisam.experiments.data import Split
from bisam.experiments.runs import Row, Run, damaged
from bisam.methods import Method

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
        watch = Watch(recipe.build_method())
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
                "device": str(fabric.device),
            }
        )


def train_epoch(fabric: Fabric, sharp: Any, watch: Watch, optimizer: Any, split: Split, batch_size: int) -> Row:
    """One pass over `split`: what anybody's loop looks like, and counts for the metrics."""
    sharp.train()
    start = time.perf_counter()
    losses, correct, flipped = (torch.zeros((), device=fabric.device) for _ in range(3))
    for x, y in split.batches(batch_size, shuffle=True):
        loss = sharp(x, y)
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()

        clean = sharp.clean  # at w, from the pass that the method made anyway
        right = clean.outputs.argmax(1) == y
        losses += clean.value * len(y)
        correct += right.sum()
        flipped += (right & (watch.outputs.argmax(1) != y)).sum()
    n = len(split)
    return {
        "train_loss": losses.item() / n,
        "train_accuracy": correct.item() / n,
        "flipped": flipped.item(),
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
    """A method, and what the model answered where it took the last descent gradient (figure 2 of the BiSAM paper)."""

    def __init__(self, method: Method) -> None:
        self.method = method
        self.outputs = torch.empty(0)

    def __call__(self, oracle: Oracle, batch: Batch) -> Evaluation:
        """As the method, with one look at its answer."""
        answer = self.method(oracle, batch)
        self.outputs = answer.outputs
        return answer


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
