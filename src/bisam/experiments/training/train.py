"""Train: one run, from its recipe to its result.

`train` loads the data, builds the model and calls `Training`, which trains epoch by epoch, writes a checkpoint after
each, and tests once at the end; `validate` leaves the test out. The loop over the batches is `train_epoch` in epoch.py.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from math import isfinite
from statistics import fmean, median
from typing import Any, cast

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from bisam import SharpnessAware
from bisam.distributed.fsdp import reshard
from bisam.experiments import data
from bisam.experiments.data.image_tensors import channels
from bisam.experiments.data.splits import IGNORED, Data, Split, batches_of
from bisam.experiments.errors import OutOfTimeError, RunError, StoppedError
from bisam.experiments.models.build import build
from bisam.experiments.models.frozen import with_frozen, without_frozen
from bisam.experiments.recipes.length import run_length
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs.checkpoint import CHECKPOINT
from bisam.experiments.runs.files import damaged
from bisam.experiments.runs.folder import Result, Row, Run
from bisam.experiments.runs.machine import Machine, keep_freed_memory
from bisam.experiments.runs.results import (
    Stopped,
    Validated,
    first_diverged,
    headline_for,
    since_better,
    words_of_divergence,
)
from bisam.experiments.runs.signals import delayed
from bisam.experiments.training.batch_norm import update_statistics
from bisam.experiments.training.checks import check_data, check_model
from bisam.experiments.training.counting import CountedMethod
from bisam.experiments.training.devices import OnEpoch, train_in_processes
from bisam.experiments.training.epoch import predict, train_epoch
from bisam.experiments.training.fsdp import divided, shard, share_buffers, whole
from bisam.experiments.training.hidden import with_hidden_states
from bisam.experiments.training.journal import Journal, OnLine
from bisam.experiments.training.loggers import Logger, loggers
from bisam.experiments.training.measured import Measured
from bisam.experiments.training.metrics import TrainingSums, scores, stats_row
from bisam.experiments.training.optimizers import (
    advances_by_epoch,
    build_optimizer,
    build_scheduler,
    descent_loss,
    grad_scaler,
)
from bisam.experiments.training.reference_speed import LatestSpeed, ReferenceSpeed
from bisam.experiments.training.state import RunState
from bisam.experiments.training.step_metrics import OnStepMetrics, StepMetrics
from bisam.experiments.training.weight_average import WeightAverage
from bisam.state import StateError
from bisam.statistics import StatsMean


def train(
    run: Run,
    machine: Machine = Machine(),  # noqa: B008
    on_epoch: OnEpoch | None = None,
    on_line: OnLine | None = None,
    on_step_metrics: OnStepMetrics | None = None,
) -> Result:
    """Train a run to its end and return its result; an interrupted run resumes after its last completed epoch.

    A run whose loss is not finite says so in its result (`diverged`), and ends then unless `Machine.stop_on_nan` is
    False. With `Recipe.patience` a run ends before its last epoch too. Its result says why (`stopped`).

    Args:
        run: folder and recipe; a finished run is not run again.
        machine: where to compute.
        on_epoch: called with the row of metrics of each epoch.
        on_line: called with each line of log.txt.
        on_step_metrics: called twice a second within an epoch, if the run is in one process.

    Raises:
        ValueError: the recipe or the device names something that is unknown or not installed.
        RunError: the folder is damaged, belongs to another recipe or is in use, or it is deleted or replaced during
            training.
        OutOfTimeError: `Machine.max_time` is over before the run has ended.
        OSError: the disk is full or read-only.

    Warns:
        RunWarning: the latest checkpoint is damaged, and the run resumes from the one before.
    """
    start = time.monotonic()
    run.recipe.check_trainable()
    fabric = machine.fabric(run.recipe.precision)
    if machine.nodes > 1:  # torchrun or srun has started a process for each device
        fabric.launch()
        with run.open() if fabric.is_global_zero else nullcontext():
            fabric.barrier()
            first = fabric.is_global_zero
            rest = machine.later(time.monotonic() - start)
            return run.result or in_time(run, _train_here(fabric, run, rest, on_epoch if first else None, on_line))
    if machine.devices > 1:
        check_data(run.recipe, data.load(run.recipe, machine), machine)  # here, so that an error is reported once
        with run.open():
            rest = machine.later(time.monotonic() - start)
            return run.result or in_time(run, train_in_processes(_train_here, fabric, run, rest, on_epoch, on_line))
    splits, model = prepare(run.recipe, machine)
    with run.open():
        rest = machine.later(time.monotonic() - start)
        return run.result or in_time(
            run, Training(fabric, run, rest, splits, model).train(on_epoch, on_line, on_step_metrics)
        )


def in_time(run: Run, result: Result | None) -> Result:
    """Return the result of a run.

    Raises:
        OutOfTimeError: there is none.
    """
    if result is None:
        raise _out_of_time(run)
    return result


def _out_of_time(run: Run) -> OutOfTimeError:
    return OutOfTimeError(f"{run.folder}: --max-time is over; the same command resumes after its last epoch")


def validate(
    run: Run,
    machine: Machine = Machine(),  # noqa: B008
    on_epoch: OnEpoch | None = None,
    on_line: OnLine | None = None,
) -> Validated:
    """Train a run to its end as `train` does, in this process, and return its validation score.

    The run is not tested, so that a choice by its score cannot depend on test examples. It has no result.json: `train`
    tests the weights in its checkpoint and finishes it.

    Args:
        run: folder and recipe.
        machine: where to compute, on one device.
        on_epoch: as for `train`; an error that it raises, such as `StoppedError`, ends the run after this epoch.
        on_line: as for `train`.

    Raises:
        ValueError: as for `train`; or there are several devices, or no validation examples.
        RunError: as for `train`; or the run is finished and its checkpoint is missing.
        OutOfTimeError: as for `train`.
        OSError: the disk is full or read-only.
    """
    start, recipe = time.monotonic(), run.recipe
    recipe.check_trainable()
    if machine.parallel:
        raise ValueError(f"a run without a test uses one device, got {machine.devices * machine.nodes}")
    if recipe.held_out == 0:
        raise ValueError("held_out 0 leaves no validation examples: the score would be that of the training examples")
    fabric = machine.fabric(recipe.precision)
    splits, model = prepare(recipe, machine)
    with run.open():
        if run.result is not None and run.checkpoint() is None:
            raise RunError(f"{run.folder} is finished and has no checkpoint.pt: delete the folder to train it again")
        rest = machine.later(time.monotonic() - start)
        validated = Training(fabric, run, rest, splits, model).validate(on_epoch, on_line)
    if validated is None:
        raise _out_of_time(run)
    return validated


def _train_here(
    fabric: Fabric, run: Run, machine: Machine, on_epoch: OnEpoch | None = None, on_line: OnLine | None = None
) -> Result | None:
    """Train in this process, one of the run's; the folder is held already."""
    return Training(fabric, run, machine, *prepare(run.recipe, machine)).train(on_epoch, on_line)


def prepare(recipe: Recipe, machine: Machine) -> tuple[Data, nn.Module]:
    """Load the data of a recipe and build its model from its seed, on the CPU and in training mode.

    Raises:
        ValueError: data, model, optimizer and recipe do not fit together.
    """
    splits = data.load(recipe, machine)
    check_data(recipe, splits, machine)
    torch.manual_seed(recipe.seed)
    model = build(
        recipe.model,
        splits.classes,
        channels=channels(splits.test),
        weights=recipe.weights,
        frozen=recipe.frozen,
        root=machine.data_dir,
    )
    check_model(model, splits, recipe)
    build_optimizer(model, recipe)  # refuses what it does not train before the folder of the run is made
    return splits, model


class Training:
    """A run in progress: its parts are built, and its state is restored from the checkpoint if there is one."""

    def __init__(self, fabric: Fabric, run: Run, machine: Machine, splits: Data, model: nn.Module) -> None:
        recipe = run.recipe
        self._start, self._longest = time.monotonic(), 0.0  # seconds of an epoch
        model = fabric._precision.convert_module(model)
        splits = with_hidden_states(splits, model, recipe, fabric)
        self._fabric, self._run, self._machine, self._data, self._recipe = fabric, run, machine, splits, recipe
        self._train, self._validation = (part.to(fabric.device) for part in (splits.train, splits.validation))
        self._model = model.to(memory_format=torch.channels_last) if recipe.channels_last else model
        # A sharded model cannot be copied: both copies are made before, and the optimizer after it is sharded.
        self._reference_speed, self._latest_speed = ReferenceSpeed(fabric, model, self._train, recipe), LatestSpeed()
        average = None if recipe.ema is None else WeightAverage(model, recipe.ema, fabric)
        shard(model, fabric)
        optimizer = build_optimizer(model, recipe)
        length = run_length(recipe, batches_of(len(splits.train), recipe.batch_size, fabric.world_size))
        self._length = length
        scheduler = build_scheduler(optimizer, recipe, length.steps)
        method = recipe.build_method(
            optimizer=optimizer, steps=length.losses, epoch=length.losses_per_epoch, examples=len(splits.train)
        )
        self._method = CountedMethod(method)
        if recipe.compile:
            # One graph for each batch size. A dynamic graph is made when the second size comes, and rounds differently
            # from a static one; a resumed run meets the sizes in another order.
            model.compile(dynamic=False, mode=recipe.compile_mode)
        descent = descent_loss(recipe.label_smoothing, splits.classes)
        self._measured = None
        if recipe.measured_epochs:
            self._measured = Measured(fabric, model, descent, self._train, splits.classes, recipe)
        loss = SharpnessAware(model, self._method, descent, scaler=grad_scaler(fabric), stats=machine.stats)
        sharp, optimizer = fabric.setup(loss, optimizer)
        self._state = RunState(fabric, sharp, optimizer, scheduler, average)
        self._writer = run.writer() if fabric.is_global_zero else None
        if (checkpoint := run.checkpoint()) is not None:
            self._state.restore(checkpoint, run.folder)
            if self._writer is not None:
                self._writer.metrics(self._state.history)
        # Of an epoch after the checkpoint there is a row if the process was killed between the two files.
        earlier = run.stats() if machine.stats and self._writer is not None else []
        self._stats = [row for row in earlier if row["epoch"] <= len(self._state.history)]
        self._mean: StatsMean | None = None  # of the steps of the last epoch
        self._journal: Journal | None = None  # in the first process, while `train` runs
        self._boards: Sequence[Logger] = ()  # the same

    def train(
        self, on_epoch: OnEpoch | None, on_line: OnLine | None = None, on_step_metrics: OnStepMetrics | None = None
    ) -> Result | None:
        """Train the remaining epochs, test, and write the result; log.txt tells how it ended.

        Returns:
            The result, or None if the time is over before the last epoch.
        """
        with self._in_journal(on_line, on_step_metrics) as journal:
            if not self._train_epochs(on_epoch):
                if journal is not None:
                    journal.out_of_time()
                return None
            result = self._finish()
            if journal is not None:
                journal.finished({which: result[f"test_{which}"] for which in result.get("scores", {})})
        return result

    def validate(self, on_epoch: OnEpoch | None, on_line: OnLine | None = None) -> Validated | None:
        """Train the remaining epochs, and return the validation score without a test; log.txt tells how it ended.

        Returns:
            The score, or None if the time is over before the last epoch.
        """
        with self._in_journal(on_line, None) as journal:
            try:
                whole = self._train_epochs(on_epoch)
            except StoppedError:
                self._close_boards()  # this process goes on to other runs
                raise
            if not whole:
                if journal is not None:
                    journal.out_of_time()
                return None
            self._close_boards()
            validated = self._validated()
            if journal is not None:
                if (why := self._stopped()) is not None:
                    journal.say(f"training ends early, after epoch {len(self._state.history)}: {why}")
                journal.validated(validated.score)
        return validated

    @contextmanager
    def _in_journal(self, on_line: OnLine | None, on_step_metrics: OnStepMetrics | None) -> Generator[Journal | None]:
        """Write the begin of the run, and the reason if it fails, into log.txt; the block gets the journal."""
        if (writer := self._writer) is None:
            yield None
            return

        def write(line: str) -> None:
            writer.log(line)
            if on_line is not None:
                on_line(line)

        fabric, recipe = self._fabric, self._recipe
        done = len(self._state.history)
        journal = Journal(write, self._length, fabric.device, fabric.world_size, done, show=on_step_metrics)
        self._journal = journal
        journal.begin(recipe.slug, recipe.seed, device_name(fabric.device))
        try:
            yield journal
        except BaseException as error:
            with suppress(OSError, RunError):  # the folder may be the reason
                journal.failed(error)
            raise

    def _close_boards(self) -> None:
        for board in self._boards:
            board.close()

    def _train_epochs(self, on_epoch: OnEpoch | None) -> bool:
        """Train the remaining epochs; return False if the time is over before the last of them."""
        fabric, state, writer = self._fabric, self._state, self._writer
        if fabric.device.type == "cpu":
            keep_freed_memory()
        boards = [] if writer is None else loggers(self._machine.log, self._run.folder, self._recipe.to_dict())
        self._boards = boards
        if self._journal is not None and boards and self._machine.log_every:

            def log_step(metrics: StepMetrics) -> None:
                for board in boards:
                    board.log_step(metrics.scalars(), metrics.losses)

            self._journal.log_steps(log_step, self._machine.log_every)
        while self._stopped() is None and len(state.history) < self._length.epochs:
            epoch, began = len(state.history) + 1, time.monotonic()
            if self._is_out_of_time(began):
                self._close_boards()
                return False
            try:
                row = self.epoch(epoch)
            except StateError as error:
                raise damaged(self._run.folder / CHECKPOINT, error) from error
            state.history.append(row)
            stats = {} if self._mean is None else stats_row(self._mean, fabric)
            if writer is not None:
                writer.check()  # before the loggers, which create their folders
            for board in boards:
                board.log({**row, **stats}, epoch, int(sum(past["losses"] for past in state.history)))
            checkpoint = state.gather()  # in all processes, because tensors may be sharded
            if writer is not None:
                if stats:
                    self._stats.append({"epoch": epoch, **stats})
                    writer.stats(self._stats)
                with delayed():
                    writer.save(checkpoint, state.history)
            if self._journal is not None:
                self._journal.epoch_ends(row)
                if first_diverged(state.history) == epoch:
                    self._journal.say(words_of_divergence(self._recipe, state.history, epoch))
            if on_epoch is not None:
                on_epoch(row)
            self._longest = max(self._longest, time.monotonic() - began)
        return True

    def _finish(self) -> Result:
        """Test, and write the result."""
        fabric, state, writer = self._fabric, self._state, self._writer
        result = self._test()  # in all processes, because tensors may be sharded
        for board in self._boards:
            board.finish({f"test_{which}": result[f"test_{which}"] for which in result["scores"]}, len(state.history))
            board.close()
        if self._journal is not None and "stopped" in result:
            why = "--stop-on-nan" if result["stopped"] == "diverged" else result["message"]
            self._journal.say(f"training ends early, after epoch {len(state.history)}: {why}")
        if writer is not None:
            with delayed():
                result = writer.finish(result, state.history)
        return cast(Result, fabric.broadcast(result))  # no process ends before the result is written

    def _stopped(self) -> Stopped | None:
        """Why the run ends after the epochs until now, which are not all; all processes must call it."""
        history = self._state.history
        if not history:
            return None
        finite = isfinite(history[-1]["train_loss"])
        if not finite and history[-1]["losses"] < self._length.losses_in(len(history)):  # its last epoch was cut short
            return "diverged"
        if len(history) == self._length.epochs:
            return None
        if self._machine.stop_on_nan and not finite and self._is_broken():
            return "diverged"
        patience = self._recipe.patience
        return "patience" if patience is not None and since_better(history) >= patience else None

    def _is_out_of_time(self, now: float) -> bool:
        """Whether another epoch would not fit into the time; the first process decides, and all must call it.

        The first epoch of a process always fits, so that each call goes on.
        """
        if (most := self._machine.max_time) is None:
            return False
        return self._fabric.broadcast(self._longest > 0 and now - self._start + self._longest > most)

    def _is_hopeless(self, sums: TrainingSums) -> bool:
        """Whether neither the loss of the epoch until now nor the weights are finite; all processes must call it."""
        return not sums.is_finite(self._fabric) and self._is_broken()

    def _is_broken(self) -> bool:
        """Whether a parameter or a buffer is not finite in any of the processes, which must all call it.

        Not every loss that is infinite breaks the weights: a gradient scaler leaves such a step out.
        """
        broken = torch.tensor(float(not _is_finite(self._model)), device=self._fabric.device)
        return bool(cast(Tensor, self._fabric.all_reduce(broken, reduce_op="sum")) > 0)

    def epoch(self, epoch: int) -> Row:
        """Train and validate one epoch, numbered from 1, and return its row of metrics."""
        recipe, state = self._recipe, self._state
        self._mean = StatsMean() if self._machine.stats else None
        # The seed depends on the epoch alone: a resumed run draws the same, and all methods get the same batches.
        seed = recipe.seed * 1_000_003 + epoch
        torch.manual_seed(seed + 15_485_863 * self._fabric.global_rank)
        random = torch.Generator().manual_seed(seed)
        by_epoch = advances_by_epoch(recipe)
        row: Row = {"epoch": epoch, "learning_rate": float(state.scheduler.get_last_lr()[0])}
        if recipe.steps is not None:
            row["step"] = self._length.steps_until(epoch)
        if self._journal is not None:
            self._journal.epoch_begins(epoch, row["learning_rate"])
        row |= train_epoch(
            self._fabric,
            state.sharp,
            self._method,
            state.optimizer,
            self._train,
            recipe,
            random,
            None if by_epoch else state.scheduler,
            state.average,
            self._length.losses_in(epoch),
            self._mean,
            self._journal,
            self._is_hopeless if self._machine.stop_on_nan else None,
        )
        if recipe.steps is not None:  # fewer if the epoch was cut short
            steps = (epoch - 1) * self._length.steps_per_epoch + -(-int(row["losses"]) // recipe.accumulate)
            row["step"] = min(row["step"], steps)
        losses = int(row["losses"])
        plain = self._latest_speed.after(losses, self._reference_speed.seconds_per_loss)
        row["relative_time"] = row["seconds"] / losses / plain
        if by_epoch:
            state.scheduler.step()
        share_buffers(self._model, self._fabric)
        if recipe.update_bn:
            averaged = self._model if state.average is None else state.average.model
            update_statistics(averaged, self._train, recipe, self._fabric, seed)
            reshard(averaged)
        row["validation"] = self._scores(self._model, self._validation)[0]
        if state.average is not None:
            row["validation_ema"] = self._scores(state.average.model, self._validation)[0]
        if self._is_best(row["validation"]):
            state.best = {"score": row["validation"], "epoch": epoch, "weights": _weights_on_cpu(self._model)}
        if self._measured is not None:
            row |= self._measured.row(epoch, self._length.epochs)
        return row

    def _is_best(self, score: float) -> bool:
        """Whether the epoch that ends with this validation score is the best until now: of equal ones the latest is.

        A few hundred validation examples have few distinct scores, so that ties are the rule, and the first of them is
        the least trained. An epoch whose weights are not finite takes no tie: it scores as a constant prediction does.
        All processes must call it.
        """
        best = self._state.best["score"]
        return score > best or (score == best and _is_finite(self._model))

    def _scores(self, model: nn.Module, split: Split) -> list[float]:
        """Return the scores for the metrics of the data set; the first metric selects the best epoch."""
        metrics = self._data.metrics
        with self._fabric.autocast():
            found = predict(model, split, self._recipe, metrics)
        reshard(model)
        # The first process decides: all have to agree on the best epoch.
        predicted, labels, likelihood = found
        return self._fabric.broadcast(scores(metrics, predicted, labels, self._data.classes, likelihood))

    def _validated(self) -> Validated:
        """Return the validation score of the weights whose test score would be the headline."""
        history, examples = self._state.history, validation_examples(self._recipe, self._data)
        which, epoch = headline_for(examples), len(history)
        if which == "best":
            epoch = self._state.best["epoch"]
        return Validated(
            score=history[epoch - 1]["validation"],
            epoch=epoch,
            headline=which,
            diverged=self._diverged(),
            metric=self._data.metrics[0],
            examples=examples,
            seconds=sum(row["seconds"] for row in history),
        )

    def _diverged(self) -> int | None:
        """The first epoch whose loss, or whose last weights, are not finite; all processes must call it."""
        # A last step that makes the weights infinite has no loss after it, in which it would be seen.
        history = self._state.history
        return first_diverged(history) or (None if _is_finite(self._model) else len(history))

    def _test(self) -> dict[str, Any]:
        """Test the last weights, their average and the best weights; return the result of the run."""
        test = self._data.test.to(self._fabric.device)  # the test data is used here and nowhere else
        state, stopped = self._state, self._stopped()
        tested = {"last": self._scores(self._model, test)}
        diverged = self._diverged()
        if state.average is not None:
            tested["ema"] = self._scores(state.average.model, test)
        best_weights = divided(state.best["weights"], self._model.state_dict())
        self._model.load_state_dict(with_frozen(best_weights, self._model))
        tested["best"] = self._scores(self._model, test)
        return summary(self._recipe, self._data, state.history, tested, state.best, diverged, stopped) | {
            "device": device_name(self._fabric.device),
            "processes": self._fabric.world_size,
        }


def summary(
    recipe: Recipe,
    splits: Data,
    history: Sequence[Row],
    tested: Mapping[str, Sequence[float]],
    best: Mapping[str, Any],
    diverged: int | None,
    stopped: Stopped | None,
) -> dict[str, Any]:
    """Return the result of a run, without its device.

    Args:
        recipe: of the run.
        splits: its data.
        history: rows of metrics of all epochs.
        tested: by weights (best, last, ema), the test scores for the metrics of the data.
        best: score and epoch of the best validation epoch.
        diverged: the first epoch whose loss, or whose last weights, are not finite.
        stopped: why the run ended before its last epoch.
    """
    message = None if diverged is None else words_of_divergence(recipe, history, diverged)
    if message is None and stopped is not None:
        epochs = since_better(history)
        message = (
            f"validation has not improved for {epochs} epoch{'s' if epochs > 1 else ''} (--patience {recipe.patience})"
        )
    held_out = validation_examples(recipe, splits)
    # An epoch that is cut short counts less.
    losses = [r["losses"] for r in history]
    weights = None if recipe.steps is None and len(set(losses)) == 1 else losses
    return {
        **{f"test_{which}": values[0] for which, values in tested.items()},
        "validation_best": best["score"],
        "validation_ties": sum(row["validation"] == best["score"] for row in history),
        "validation_examples": held_out,
        "headline": headline_for(held_out),
        "best_epoch": best["epoch"],
        "diverged": diverged,
        **({} if stopped is None else {"stopped": stopped}),
        **({} if message is None else {"message": message}),
        "metric": splits.metrics[0],
        "scores": {which: dict(zip(splits.metrics, values, strict=True)) for which, values in tested.items()},
        "examples": len(splits.train),
        **({} if splits.train.labels.dim() == 1 else {"labels": int((splits.train.labels != IGNORED).sum())}),
        "seconds_per_epoch": median(r["seconds"] for r in history),
        "relative_time": median(r["relative_time"] for r in history),
        "gradients_per_step": fmean([r["gradients"] for r in history], weights),
        "forwards_per_step": fmean([r["forwards"] for r in history], weights),
    }


def validation_examples(recipe: Recipe, splits: Data) -> int:
    """Return the number of validation examples; 0 if they are training examples."""
    return 0 if recipe.held_out == 0 else len(splits.validation)


def device_name(device: torch.device) -> str:
    """Return the name of a device in results."""
    return f"{device}, {torch.cuda.get_device_name(device)}" if device.type == "cuda" else str(device)


def _is_finite(model: nn.Module) -> bool:
    """Whether all parameters and buffers are finite; all processes must call it."""
    return all(bool(t.isfinite().all()) for t in whole(model.state_dict()).values() if t.is_floating_point())


def _weights_on_cpu(model: nn.Module) -> dict[str, Tensor]:
    state = without_frozen(model.state_dict(), model)
    return {k: v.detach().cpu().clone() for k, v in whole(state).items()}
