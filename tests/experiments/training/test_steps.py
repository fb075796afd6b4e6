"""Runs of a number of steps: how many are taken, with which learning rates, and how they are resumed and reported."""

from __future__ import annotations

import importlib
import json
import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

from bisam.experiments import data
from bisam.experiments.cli.progress import Display
from bisam.experiments.data.splits import batches_of
from bisam.experiments.errors import RunError
from bisam.experiments.launch import estimate as estimates
from bisam.experiments.models.build import build
from bisam.experiments.recipes.length import run_length
from bisam.experiments.recipes.presets import PRESETS, started
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.reports import tables
from bisam.experiments.reports.curves import curves
from bisam.experiments.reports.groups import names
from bisam.experiments.runs.folder import Finished, Run, finished
from bisam.experiments.runs.machine import Machine
from bisam.experiments.runs.results import rows_fault
from bisam.experiments.studies import STUDIES
from bisam.experiments.training.epoch import train_epoch
from bisam.experiments.training.optimizers import build_scheduler
from bisam.experiments.training.train import train

MACHINE = Machine(log=())
STEPS = Recipe(method="sgd", steps=12, batch_size=64, limit=300, schedule="linear", warmup=4)
"""5 losses in an epoch, the last with 44 examples: the 12 steps end within the third epoch."""
TIMES = {"seconds", "relative_time", "seconds_per_epoch", "finished", "metrics", "checksum", "recipe"}


def untimed(values):
    return {name: value for name, value in values.items() if name not in TIMES}


def weights(run: Run) -> dict[str, torch.Tensor]:
    return {name: t for name, t in run.checkpoint()["sharp"].items() if isinstance(t, torch.Tensor)}


def same(a: Run, b: Run) -> bool:
    ours, theirs = weights(a), weights(b)
    return all(torch.equal(ours[name], theirs[name]) for name in ours.keys() | theirs.keys())


# The length


@pytest.mark.parametrize("losses", [1, 2, 5, 8])
@pytest.mark.parametrize("accumulate", [1, 2, 3, 9])
@pytest.mark.parametrize("given", [{"steps": count} for count in (1, 2, 7, 8, 30)] + [{"epochs": 3}])
def test_the_length_is_that_of_a_loop_that_counts(losses, accumulate, given):
    recipe = Recipe(**given, accumulate=accumulate)
    length, epoch, steps, total, ended = run_length(recipe, losses), 0, 0, 0, False
    while not ended:
        epoch, trained = epoch + 1, 0
        for i in range(losses):
            trained += 1
            if (i + 1) % accumulate == 0 or i + 1 == losses:
                steps += 1
                if ended := steps == recipe.steps:
                    break
        total += trained
        ended = ended or epoch == recipe.epochs
        assert (length.losses_in(epoch), length.steps_until(epoch)) == (trained, steps)
    assert (length.epochs, length.steps, length.losses) == (epoch, steps, total)
    assert (length.losses_per_epoch, length.steps_per_epoch) == (losses, -(-losses // accumulate))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 3, "steps": 5}, "epochs 3 and steps 5 are both given: leave one out"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"steps": 10**9 + 1}, "steps must be at most 1000000000"),
        ({"steps": 50, "warmup": 50, "schedule": "linear"}, "warmup 50 does not end within the 50 steps of the run"),
        (
            {"steps": 50, "warmup": 41, "schedule": "wsd"},
            "does not end before the cooldown, the last 10 of",
        ),
        ({"cooldown": 0.0, "schedule": "wsd"}, "cooldown must be above 0 and at most 1, got 0.0"),
        ({"cooldown": 1.5, "schedule": "wsd"}, "cooldown must be above 0 and at most 1, got 1.5"),
    ],
)
def test_a_length_that_cannot_be_is_refused(bisam, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**settings)
    flags = [word for name, value in settings.items() for word in (f"--{name}", value)]
    code, out, err = bisam("train", *flags, "--out", tmp_path / "out")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--epochs", 2, "--set", "steps=5"), "epochs 2 and steps 5 are both given: leave one out"),
        (("--set", "epochs=2", "--set", "steps=5"), "epochs 2 and steps 5 are both given: leave one out"),
        (("--set", "steps=0"), "steps must be at least 1, got 0"),
        (("--set", "steps=few"), "--set steps=few: 'few' is not a whole number"),
    ],
)
def test_a_length_that_a_study_cannot_have_is_refused(bisam, tmp_path, arguments, message):
    code, out, err = bisam("run", "digits", *arguments, "--out", tmp_path / "out")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_a_recipe_has_thirty_epochs_unless_it_has_another_length():
    assert (Recipe().epochs, Recipe().steps, Recipe().unit, Recipe().length) == (30, None, "epochs", 30)
    assert (STEPS.epochs, STEPS.steps, STEPS.unit, STEPS.length) == (None, 12, "steps", 12)
    assert Recipe(epochs=30).slug == Recipe().slug
    assert len({STEPS.slug, replace(STEPS, steps=13).slug, replace(STEPS, steps=None).slug}) == 3
    assert Recipe.from_dict(json.loads(json.dumps(STEPS.to_dict()))) == STEPS
    assert (STEPS.times(2).steps, Recipe().times(2).epochs) == (24, 60)


def test_a_length_replaces_that_of_a_preset():
    assert (started(PRESETS["paper"], {"steps": 7}).steps, started(PRESETS["paper"], {"steps": 7}).epochs) == (7, None)
    assert (started(PRESETS["vit"], {"epochs": 7}).steps, started(PRESETS["vit"], {"epochs": 7}).epochs) == (None, 7)
    assert (started(PRESETS["vit"], {}).steps, PRESETS["vit"].warmup) == (500, 100)


def test_a_study_gets_its_steps_and_sgd_twice_as_many():
    for study in ("digits", "table1", "table8"):
        changed = STUDIES[study].changed(None, ["steps=50"])
        assert {recipe.epochs for recipe in changed} == {None}
        assert {recipe.steps for recipe in changed if recipe.is_plain} == {100}
        assert {recipe.steps for recipe in changed if not recipe.is_plain} == {50}
    assert {r.steps for r in STUDIES["sampa"].changed(None, ["steps=50"])} == {50}
    changed = STUDIES["table6"].changed(None, ["steps=50", "warmup=10"])
    assert {(recipe.steps, recipe.warmup) for recipe in changed} == {(50, 10)}
    with pytest.raises(ValueError, match="warmup 100 does not end within the 50 steps of the run: make it shorter"):
        STUDIES["table6"].changed(None, ["steps=50"])


# Training


@pytest.fixture
def rates(monkeypatch):
    """The learning rate at each step of the optimizer of a run."""
    module, found = importlib.import_module("bisam.experiments.training.train"), []
    original = module.build_optimizer

    def watched(model, recipe):
        optimizer = original(model, recipe)
        optimizer.register_step_pre_hook(lambda one, *_: found.append(one.param_groups[0]["lr"]))
        return optimizer

    monkeypatch.setattr(module, "build_optimizer", watched)
    return found


def rising(step: int, warmup: int) -> float:
    return min(1.0, (step + 1) / warmup) if warmup else 1.0


@pytest.mark.parametrize(
    ("schedule", "warmup", "factor"),
    [
        ("linear", 4, lambda step: rising(step, 4) if step < 4 else 1 - (step - 4) / 8),
        ("linear", 0, lambda step: 1 - step / 12),
        ("constant", 4, lambda step: rising(step, 4)),
        ("wsd", 4, lambda step: min(rising(step, 4), (12 - step) / 2)),
        ("wsd", 0, lambda step: min(1.0, (12 - step) / 2)),
        ("cosine", 0, lambda step: math.cos(math.pi * step / 24) ** 2),
    ],
)
def test_each_step_has_its_learning_rate(tmp_path, rates, schedule, warmup, factor):
    recipe = replace(STEPS, schedule=schedule, warmup=warmup, learning_rate=0.05)
    train(run := Run.under(tmp_path, recipe), MACHINE)
    assert rates == pytest.approx([0.05 * factor(step) for step in range(12)], rel=1e-12)
    assert [row["learning_rate"] for row in run.metrics()] == pytest.approx([rates[0], rates[5], rates[10]])


@pytest.mark.parametrize(("warmup", "cooldown"), [(0, 0.3), (5, 0.3), (20, 0.5), (0, 1.0), (3, 0.001)])
def test_wsd_is_the_schedule_of_transformers(warmup, cooldown):
    """That begins its warm-up at 0 and not at the first share of it: the rates are compared from its end on."""
    schedule = pytest.importorskip("transformers.optimization").get_wsd_schedule
    recipe = Recipe(method="sgd", steps=40, schedule="wsd", warmup=warmup, cooldown=cooldown)
    decay = max(1, round(40 * cooldown))
    optimizers = [torch.optim.SGD([torch.zeros(1)], 0.1) for _ in range(2)]
    others = {"num_training_steps": 40, "decay_type": "linear"}
    ours, theirs = build_scheduler(optimizers[0], recipe, 40), schedule(optimizers[1], warmup, decay, **others)
    for step in range(41):
        if step >= warmup:
            assert ours.get_last_lr() == pytest.approx(theirs.get_last_lr(), rel=1e-12, abs=1e-15), step
        for optimizer, one in zip(optimizers, (ours, theirs), strict=True):
            optimizer.step()
            one.step()


@pytest.mark.parametrize(
    ("steps", "accumulate", "step", "losses"),
    [
        (12, 1, [5, 10, 12], [5, 5, 2]),
        (10, 1, [5, 10], [5, 5]),
        (3, 1, [3], [3]),
        (4, 2, [3, 4], [5, 2]),  # 3 steps in an epoch, of 2, 2 and 1 losses
        (6, 2, [3, 6], [5, 5]),
        (1, 9, [1], [5]),
    ],
)
def test_a_run_ends_with_its_last_step(tmp_path, rates, steps, accumulate, step, losses):
    recipe = replace(STEPS, steps=steps, accumulate=accumulate, warmup=0)
    result = train(run := Run.under(tmp_path, recipe), MACHINE)
    rows = run.metrics()
    assert len(rates) == steps
    assert [row["epoch"] for row in rows] == list(range(1, len(step) + 1))
    assert [row["step"] for row in rows] == step
    assert [row["losses"] for row in rows] == losses
    assert run.result == result
    assert [one.result for one in finished(tmp_path)] == [result]


def test_a_run_equals_a_loop_written_by_hand(tmp_path):
    recipe = replace(STEPS, precision="64", momentum=0.9, weight_decay=1e-3)
    train(run := Run.under(tmp_path, recipe), MACHINE)
    splits = data.load(recipe, MACHINE)
    torch.manual_seed(recipe.seed)
    model = build("convnet", 10, channels=1).double().train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-3)
    step = 0
    for epoch in (1, 2, 3):
        order = torch.randperm(300, generator=torch.Generator().manual_seed(epoch))
        for index in order.split(64):
            if step == 12:
                break
            optimizer.param_groups[0]["lr"] = 0.1 * ((step + 1) / 4 if step < 4 else (12 - step) / 8)
            optimizer.zero_grad()
            cross_entropy(model(splits.train.images[index].double()), splits.train.labels[index]).backward()
            optimizer.step()
            step += 1
    ours = {name.partition(".")[2]: t for name, t in weights(run).items()}
    assert ours.keys() == model.state_dict().keys()
    for name, theirs in model.state_dict().items():
        torch.testing.assert_close(ours[name], theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("method", ["bisam_log", "sampa"])
def test_whole_epochs_of_steps_are_a_run_of_epochs(tmp_path, method):
    steps = Run.under(tmp_path, replace(STEPS, method=method, steps=10))
    epochs = Run.under(tmp_path, replace(steps.recipe, steps=None, epochs=2))
    results = [untimed(train(run, MACHINE)) for run in (steps, epochs)]
    assert results[0] == results[1]
    assert same(steps, epochs)
    ours, theirs = ([untimed(row) for row in run.metrics()] for run in (steps, epochs))
    assert [row.pop("step") for row in ours] == [5, 10]
    assert ours == theirs


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_an_interrupted_run_resumes_to_the_same_bits(tmp_path, stop_after, schedule):
    recipe = replace(
        STEPS, method="LookSAM(L2(0.1), k=3)", steps=11, accumulate=2, schedule=schedule, warmup=0, limit=500
    )
    whole, broken = Run.under(tmp_path / "a", recipe), Run.under(tmp_path / "b", recipe)
    train(whole, MACHINE)

    def interrupt(row):
        if row["epoch"] == stop_after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(broken, MACHINE, interrupt)
    assert broken.result is None
    assert [row["step"] for row in broken.checkpoint()["history"]] == [4, 8, 11][:stop_after]
    train(broken, MACHINE)
    assert untimed(whole.result) == untimed(broken.result)
    assert same(whole, broken)
    assert [untimed(row) for row in whole.metrics()] == [untimed(row) for row in broken.metrics()]


def test_an_expression_knows_the_steps_of_the_run(tmp_path):
    """Half of the 12 steps have one gradient, the others two; the short last epoch counts as its 2 steps."""
    recipe = replace(STEPS, method="During(SAM(0.05), start=steps // 2)", batch_size=60)
    result = train(run := Run.under(tmp_path, recipe), MACHINE)
    assert [row["gradients"] for row in run.metrics()] == pytest.approx([1.0, 1.8, 2.0])
    assert result["gradients_per_step"] == pytest.approx(1.5)


def test_an_expression_knows_a_whole_epoch_also_in_a_shorter_run(tmp_path, monkeypatch):
    told, original = [], Recipe.build_method

    def build_method(self, **names):
        told.append({name: value for name, value in names.items() if name != "optimizer"})
        return original(self, **names)

    monkeypatch.setattr(Recipe, "build_method", build_method)
    train(Run.under(tmp_path, replace(STEPS, steps=3, warmup=0)), MACHINE)
    assert told == [{"steps": 3, "epoch": 5, "examples": 300}]


def test_a_part_of_an_epoch_asks_for_no_batch_after_it(tmp_path, monkeypatch):
    asked = []

    class Counted:
        def __init__(self, split):
            self.split = split

        def __len__(self):
            return len(self.split)

        def indexed(self, *arguments):
            for batch in self.split.indexed(*arguments):
                asked.append(batch)
                yield batch

    module = importlib.import_module("bisam.experiments.training.train")
    monkeypatch.setattr(
        module,
        "train_epoch",
        lambda *given: train_epoch(*given[:4], Counted(given[4]), *given[5:]),
    )
    train(Run.under(tmp_path, replace(STEPS, steps=3, warmup=0)), MACHINE)
    assert len(asked) == 3


@pytest.mark.slow
def test_several_devices_end_with_the_same_step(tmp_path):
    rows = []
    result = train(run := Run.under(tmp_path, replace(STEPS, method="bisam_log")), Machine(devices=2), rows.append)
    assert result["processes"] == 2
    assert [row["step"] for row in rows] == [5, 10, 12]
    assert run.metrics() == rows


# Files, progress, estimates and reports

ROW = {"epoch": 1, "step": 5, "validation": 0.5, "flipped": 1.0}


@pytest.mark.parametrize(
    ("rows", "fault"),
    [
        ([ROW, {**ROW, "epoch": 2, "step": 12}], None),
        ([ROW, {**ROW, "epoch": 2, "step": 13}], "step of epoch 2 is not between 6 and 12: 13"),
        ([ROW, {**ROW, "epoch": 2, "step": 5}], "step of epoch 2 is not between 6 and 12: 5"),
        ([{**ROW, "step": 0}], "step of epoch 1 is not between 1 and 12: 0"),
        ([{**ROW, "step": 4.5}], "step of epoch 1 is not between 1 and 12: 4.5"),
        ([{name: value for name, value in ROW.items() if name != "step"}], "epoch 1 has no step"),
    ],
)
def test_metrics_with_other_steps_are_noticed(rows, fault):
    assert rows_fault(rows, STEPS) == fault


def test_a_result_with_missing_steps_is_noticed(tmp_path):
    train(run := Run.under(tmp_path, replace(STEPS, steps=7)), MACHINE)
    path = run.folder / "metrics.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    (error,) = finished(tmp_path)
    assert isinstance(error, RunError)
    assert "metrics.csv is damaged (it does not have the 7 steps of the recipe)" in str(error)


@pytest.mark.parametrize(
    ("recipes", "unit", "total"),
    [
        ([STEPS, replace(STEPS, seed=1)], "steps", 24),
        ([Recipe(), Recipe(seed=1)], "epochs", 60),
        ([Recipe(), STEPS], "epochs and steps", 42),
    ],
)
def test_the_bar_counts_in_the_unit_of_the_recipes(recipes, unit, total):
    display = Display(recipes)
    (task,) = display._bar.tasks
    assert task.fields["unit"] == unit
    assert (task.total, task.completed) == (total, 0)
    display.epoch(recipes[-1], 5, 0.5)
    assert task.completed == 5
    display.epoch(recipes[-1], 3, 0.5)  # late news
    assert task.completed == 5
    for recipe in recipes:
        display.done(recipe, None)
    assert task.completed == total


def test_the_command_trains_for_steps(bisam, tmp_path):
    flags = ("--method", "sam", "--limit", 300, "--batch-size", 64)
    code, out, err = bisam("train", *flags, "--steps", 7, "--out", tmp_path)
    assert (code, err) == (0, "")
    assert "test accuracy" in out
    (run,) = finished(tmp_path / "train")
    assert (run.recipe.steps, run.metrics[-1]["step"]) == (7, 7)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_estimate_is_of_the_steps(monkeypatch, accumulate):
    """With a second a step and 0.5 seconds until the first batch, 1,000 training and 256 validation examples."""
    monkeypatch.setattr(estimates, "_measured", lambda *_: (1.0, 0.5, 0.0, 1000, 256))
    recipe = Recipe(method="sam", batch_size=64, accumulate=accumulate, steps=20)
    assert batches_of(1000, 64) == 16
    epochs, losses = (2, 20) if accumulate == 1 else (3, 40)
    each, measured = 256 / 64 / 3 + 2 * 0.5, 2 * (8 + 0.5)  # validation and reading; reference steps and theirs
    assert estimates.estimate(recipe, MACHINE).seconds == pytest.approx(2 * losses + epochs * each + measured)


def test_a_plan_tells_the_steps(bisam, tmp_path):
    code, out, _ = bisam("run", "table6", "--dry-run", "--seeds", 1, "--data-dir", tmp_path, "--out", tmp_path)
    assert code == 0
    assert out.count("500 steps") == 8
    assert "8 of 8 runs of table6 are left" in out


def test_a_report_of_steps(bisam, tmp_path):
    changes = ("steps=3", "limit=96")
    for recipe in STUDIES["digits"].changed(None, changes):
        train(Run.under(tmp_path / "digits", recipe), MACHINE)
    code, _, err = bisam("report", "digits", *(f"--set={change}" for change in changes), "--out", tmp_path)
    assert (code, err) == (0, "")
    text = (tmp_path / "digits" / "report.md").read_text()
    assert "| steps |" in text
    assert "epochs |" not in text
    runs = list(finished(tmp_path / "digits"))
    called = set(names([run.recipe for run in runs]).values())
    assert called == {"SGD (2× steps)", "SAM", "BiSAM (-log)", "BiSAM (tanh)", "ASAM"}
    rows = tables.summary(runs)
    assert {row["name"]: row["steps"] for row in rows}["SGD (2× steps)"] == 6
    assert all("epochs" not in row for row in rows)


def test_runs_in_epochs_and_in_steps_are_told_apart():
    called = names([replace(STEPS, method=method) for method in ("sgd", "sam")] + [Recipe(method="sam", limit=300)])
    plain, *sam = called.values()
    assert plain == "SGD"
    assert "steps 12" in sam[0]
    assert "epochs 30" in sam[1]
    assert not any("epochs None" in name or "steps None" in name for name in sam)


def test_curves_of_runs_with_different_numbers_of_epochs():
    """On devices that share small batches, an epoch can have a step less."""

    def run(seed: int, epochs: int) -> Finished:
        rows = [{"epoch": e, "validation": 0.5, "train_loss": 1.0, "flipped": 1.0} for e in range(1, epochs + 1)]
        return Finished(replace(STEPS, method="sam", seed=seed), {"test_best": 0.5}, rows)

    score, _ = curves([run(0, 3), run(1, 4)]).axes
    (line,) = score.get_lines()
    assert list(line.get_xdata()) == [1, 2, 3]
