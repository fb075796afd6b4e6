"""Lines of a run: log.txt, the command without a terminal, and what a line costs."""

from __future__ import annotations

import io
import re
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("cyclopts")

from bisam.experiments.cli import progress
from bisam.experiments.cli.progress import Display
from bisam.experiments.errors import RunError
from bisam.experiments.recipes.length import RunLength
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs.folder import Run
from bisam.experiments.runs.machine import Machine
from bisam.experiments.training import train as training
from bisam.experiments.training.journal import Journal, counted
from bisam.experiments.training.step_metrics import StepMetrics
from bisam.experiments.training.train import Training, prepare, train

SHORT = Recipe(method="sam", epochs=3, batch_size=64, limit=300)
MACHINE = Machine(log=())
TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  "
EPOCH = TIME + (
    r"epoch (\d)/3: loss [\d.]+, validation [\d.]+ %, learning rate [\d.e-]+, [\d.,e+]+ images/s(?:, [\d.]+ GiB)?, "
    r"[\d.]+ (?:s|min) (left|in all)"
)


class Clock:
    """A clock that stands still unless it is moved."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Loss:
    """Sums with a loss, which count how often it is read."""

    def __init__(self):
        self.read, self.examples = 0, 1

    def totals(self):
        self.read += 1
        return 0.25 * self.examples, self.examples


def test_without_a_terminal_the_command_prints_the_lines_of_log_txt(bisam, tmp_path):
    flags = ("--method", "sam", "--limit", 300, "--batch-size", 64, "--epochs", 3, "--out", tmp_path)
    code, out, err = bisam("train", *flags)
    assert (code, err) == (0, "")
    (log,) = tmp_path.glob("train/*/seed-0/log.txt")
    first, *epochs, last = lines = log.read_text().splitlines()
    assert out.splitlines()[: len(lines)] == lines
    assert re.fullmatch(TIME + r"sam-.* seed 0: 3 epochs on cpu", first)
    found = [re.fullmatch(EPOCH, line) for line in epochs]
    assert [one and one.groups() for one in found] == [("1", "left"), ("2", "left"), ("3", "in all")]
    assert re.fullmatch(
        TIME + r"finished after [\d.]+ (s|min): test best [\d.]+ %, last [\d.]+ %", last
    ) or re.fullmatch(TIME + r"finished after [\d.]+ (s|min): test last [\d.]+ %, best [\d.]+ %", last)
    again = bisam("train", *flags)  # nothing is trained, and nothing is logged
    assert again[0] == 0
    assert log.read_text().splitlines() == lines


def test_a_line_has_the_numbers_of_its_row(tmp_path):
    run, said = Run.under(tmp_path, SHORT), []
    train(run, MACHINE, on_line=said.append)
    for row, line in zip(run.metrics(), said[1:-1], strict=True):
        assert f"loss {row['train_loss']:.4g}, validation {100 * row['validation']:.1f} %" in line
        assert f"learning rate {row['learning_rate']:.4g}," in line
        speed = re.search(r"([\d.,e+]+) images/s", line)
        assert speed
        assert float(speed[1].replace(",", "")) == pytest.approx(300 / row["seconds"], rel=1e-3)


def test_quiet_prints_the_result_alone_and_writes_log_txt(bisam, tmp_path):
    flags = ("--method", "sam", "--limit", 300, "--batch-size", 64, "--epochs", 1, "--out", tmp_path)
    code, out, err = bisam("train", *flags, "--quiet")
    assert (code, err, len(out.splitlines())) == (0, "", 1)
    assert out.startswith("test accuracy")
    (log,) = tmp_path.glob("train/*/seed-0/log.txt")
    assert len(log.read_text().splitlines()) == 3


@pytest.mark.parametrize("command", [("train",), ("run", "digits")])
def test_quiet_and_verbose_exclude_each_other(bisam, command, tmp_path):
    code, out, err = bisam(*command, "--quiet", "--verbose", "--out", tmp_path)
    assert (code, out) == (2, "")
    assert "leave one out" in err


def test_a_resumed_run_appends_to_log_txt(tmp_path):
    run = Run.under(tmp_path, SHORT)

    def stop(row):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(run, MACHINE, on_epoch=stop)
    before = (run.folder / "log.txt").read_text()
    assert before.splitlines()[-1].endswith("  interrupted: the same command resumes after the last completed epoch")
    train(run, MACHINE)
    after = (run.folder / "log.txt").read_text()
    assert after.startswith(before)
    first, *epochs, _ = after.removeprefix(before).splitlines()
    assert first.endswith(" seed 0: 3 epochs on cpu, resumed after epoch 1")
    assert [re.fullmatch(EPOCH, line)[1] for line in epochs] == ["2", "3"]


def test_log_txt_says_why_a_run_failed(tmp_path, monkeypatch):
    run = Run.under(tmp_path, SHORT)

    def broken(*_):
        raise RunError("no such luck")

    monkeypatch.setattr(training, "train_epoch", broken)
    with pytest.raises(RunError):
        train(run, MACHINE)
    assert (run.folder / "log.txt").read_text().splitlines()[-1].endswith("  failed: RunError: no such luck")


def test_a_long_epoch_has_lines_and_reads_the_loss_for_these_alone():
    clock, said, sums = Clock(), [], Loss()
    length = RunLength(epochs=2, steps=200, losses=200, losses_per_epoch=100, steps_per_epoch=100)
    journal = Journal(said.append, length, torch.device("cpu"), every=30.0, clock=clock)
    journal.epoch_begins(1, 0.1)
    for _ in range(100):
        clock.now += 1.0
        journal.batch(torch.zeros(8, 3, 2, 2), sums, 0.05)
    assert sums.read == 3  # after 30, 60 and 90 seconds
    assert [re.search(r"batch (\d+)/100: loss 0.25, learning rate 0.05, 8 images/s", line)[1] for line in said] == [
        *("30", "60", "90")
    ]
    assert said[0].endswith("2.83 min left")  # 170 s: a second for each of 170 losses


def test_a_display_gets_step_metrics_twice_a_second_and_a_logger_after_every_n_losses():
    clock, sums = Clock(), Loss()
    shown, logged, said = [], [], []
    length = RunLength(epochs=2, steps=20, losses=20, losses_per_epoch=10, steps_per_epoch=10)
    journal = Journal(said.append, length, torch.device("cpu"), processes=2, clock=clock, show=shown.append)
    journal.log_steps(logged.append, 3)
    for epoch in (1, 2):
        journal.epoch_begins(epoch, 0.1)
        sums.examples = 0
        for _ in range(10):
            clock.now += 0.25
            sums.examples += 8
            journal.batch(torch.zeros(8, 3, 2, 2), sums, 0.05)
    assert said == []
    # The last batch of an epoch is left to the row of the epoch.
    assert [(point.epoch, point.batch, point.losses) for point in logged] == [
        *((1, batch, batch) for batch in (3, 6, 9)),
        *((2, losses - 10, losses) for losses in (12, 15, 18)),
    ]
    assert [(point.epoch, point.batch) for point in shown] == [
        *((1, batch) for batch in (2, 4, 6, 8)),
        *((2, batch) for batch in (1, 3, 5, 7, 9)),
    ]
    first = shown[0]
    assert (first.epochs, first.batches, first.unit, first.learning_rate) == (2, 10, "images", 0.05)
    assert first.speed == 2 * 8 * 2 / 0.5  # two processes with two batches of eight images in half a second
    assert first.words().startswith("loss 0.25, learning rate 0.05, 64 images/s")
    assert logged[0].scalars().items() >= {"step/loss": 0.25, "step/images_per_second": 64.0}.items()


def test_the_loss_of_logged_step_metrics_is_that_since_the_last_one():
    """The mean of an epoch until now would hide what happened in its last steps."""
    logged, sums = [], Loss()
    length = RunLength(epochs=1, steps=9, losses=9, losses_per_epoch=9, steps_per_epoch=9)
    journal = Journal(lambda _: None, length, torch.device("cpu"), clock=Clock())
    journal.log_steps(logged.append, 2)
    journal.epoch_begins(1, 0.1)
    totals = [(8.0 * batch * batch, 8.0 * batch) for batch in range(1, 10)]  # losses 1, 3, 5, ...
    for each in totals:
        sums.totals = lambda each=each: each
        journal.batch(torch.zeros(8, 2), sums, 0.05)
    assert [point.loss for point in logged] == [2.0, 6.0, 10.0, 14.0]


def test_the_time_left_counts_what_this_process_did():
    """Resumed after 8 of 10 epochs: one epoch took 60 s, so that one minute is left, and not 60 / 9."""
    clock, said = Clock(), []
    length = RunLength(epochs=10, steps=40, losses=40, losses_per_epoch=4, steps_per_epoch=4)
    journal = Journal(said.append, length, torch.device("cpu"), done=8, clock=clock)
    journal.epoch_begins(9, 0.1)
    clock.now += 60.0
    journal.epoch_ends({"train_loss": 0.5, "validation": 0.5, "seconds": 60.0})
    assert said[0].endswith("60 s left")


class Reads(TorchDispatchMode):
    """Counts the operations that make the host wait for the device."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_a_line_of_an_epoch_reads_the_loss_once_and_a_step_never(tmp_path):
    def reads(journal) -> int:
        run = Run.under(tmp_path, SHORT)
        splits, model = prepare(SHORT, MACHINE)
        with run.open(), Reads() as counted_reads:
            one = Training(MACHINE.fabric(), run, MACHINE, splits, model)
            before = counted_reads.count
            one._journal = journal(one)
            one.epoch(1)
        return counted_reads.count - before

    def every(seconds: float):
        return lambda one: Journal(lambda _: None, one._length, torch.device("cpu"), every=seconds)

    without = reads(lambda one: None)
    assert reads(every(1e9)) == without
    # 5 batches, of which the last one has the line of the epoch; a sum and a number for each
    assert reads(every(0.0)) == without + 2 * 4


def test_batches_count_in_images_tokens_or_examples():
    assert counted(torch.zeros(8, 3, 4, 4)) == (8, "images")
    assert counted({"input_ids": torch.zeros(8, 16), "attention_mask": torch.zeros(8, 16)}) == (128, "tokens")
    frozen = {"hidden_states": torch.zeros(8, 16, 32), "attention_mask": torch.zeros(8, 16)}
    assert counted(frozen) == (128, "tokens")
    assert counted(torch.zeros(8, 3)) == (8, "examples")


@pytest.fixture
def shown(monkeypatch):
    """The text that a display prints on a terminal with so many columns, or without one."""

    def of(width: int, act, terminal: bool = True, **flags) -> str:
        console = Console(width=width, force_terminal=terminal, record=True)
        monkeypatch.setattr(progress, "console", console)
        with Display([SHORT, replace(SHORT, seed=1)], **flags) as display, console.capture() as captured:
            act(display)
            if terminal:
                console.print(display._bar.get_renderable())
        return captured.get()

    return of


def test_a_study_without_a_terminal_says_who_does_what_and_why_a_run_failed(shown):
    def act(display):
        display.starting(2, 2)
        display.begins(SHORT, 2)
        display.epoch(SHORT, 1, 0.5)
        display.done(SHORT, "the disk is full")
        display.done(replace(SHORT, seed=1), "somewhere is in use", True)

    slug = SHORT.slug
    expected = [
        "starting 2 processes for 2 runs",
        f"worker 2: {slug} seed 0",
        f"0/2 runs: {slug} seed 0 failed: the disk is full",
        f"0/2 runs: {slug} seed 1 in use elsewhere",
    ]
    assert shown(80, act, terminal=False).splitlines() == expected
    spoken = [*expected[:2], f"worker 2: {slug} seed 0: epoch 1/3, validation 50.0 %", *expected[2:]]
    assert shown(80, act, terminal=False, verbose=True).splitlines() == spoken
    assert shown(80, act, terminal=False, quiet=True) == ""


def test_a_narrow_bar_keeps_count_and_time_and_drops_the_news(shown):
    def act(display):
        display.epoch(SHORT, 2, 0.5)

    assert "50.0 % valid." in shown(140, act)
    narrow = shown(60, act)
    assert "valid." not in narrow
    for part in ("0/2 runs", "2/6", "epochs", "0:00:0", "left"):
        assert part in narrow


def test_a_bar_within_the_epoch_is_below_that_of_the_run(shown):
    point = StepMetrics(2, 3, 7, 20, 27, 0.25, 0.05, 64.0, "images", 2**30)

    def within(display):
        display.step(point)

    def after(display):
        display.step(point)
        display.advanced(SHORT, 2, 0.5)

    lines = [line for line in shown(140, within).splitlines() if line.strip()]
    assert "epoch 2" in lines[-1]
    assert "7/20" in lines[-1]
    assert "loss 0.25, learning rate 0.05, 64 images/s, 1.00 GiB" in lines[-1]
    assert "20/20" in shown(140, after)
    narrow = shown(60, within)
    assert "7/20" in narrow
    assert "loss" not in narrow


def test_ctrl_c_while_a_bar_starts_leaves_the_terminal_as_it_was(monkeypatch):
    console = Console(file=io.StringIO(), width=60, force_terminal=True)
    monkeypatch.setattr(progress, "console", console)
    display = Display([SHORT])
    refresh, calls = display._bar.live.refresh, []

    def interrupted():
        refresh()
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(display._bar.live, "refresh", interrupted)
    with pytest.raises(KeyboardInterrupt), display:
        pass
    assert console.file.getvalue().endswith("\n\x1b[?25h")
