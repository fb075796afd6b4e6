"""Stacks: seeds that are trained at once equal runs of their own, and what does not fit is refused."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from bisam import Evaluation, ModelOracle, NegLog, cross_entropy
from bisam.experiments.launch.stacks import Job, jobs, seconds
from bisam.experiments.launch.work import train_stack_or_explain
from bisam.experiments.models.build import build
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs.folder import Run, finished
from bisam.experiments.runs.machine import Machine
from bisam.experiments.training.stacked import train as stacked
from bisam.experiments.training.stacked.checks import misfits
from bisam.experiments.training.stacked.network import Stack
from bisam.experiments.training.stacked.oracle import StackedOracle, StackedVector
from bisam.experiments.training.train import Training, train

MACHINE = Machine(log=())
BASE = Recipe(model="mlp", noise=0.4, label_smoothing=0.1, epochs=3, limit=170)
"""Three batches in an epoch, of 64, 64 and 42 examples."""
SEEDS = (0, 1, 7)
TIMES = {"seconds", "relative_time", "seconds_per_epoch", "finished", "metrics", "checksum"}


def seeds(recipe, numbers=SEEDS):
    return [replace(recipe, seed=seed) for seed in numbers]


def untimed(values):
    return {name: value for name, value in values.items() if name not in TIMES}


def trained_alone(recipe, folder, monkeypatch):
    """The result, the metrics, and the last and the best state of a run of its own."""
    kept = []
    original = Training._test

    def test(self):
        kept.append({name: tensor.clone() for name, tensor in self._model.state_dict().items()})
        return original(self)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "_test", test)
        run = Run.under(folder, recipe)
        result = train(run, MACHINE)
    return result, run.metrics(), kept[0], run.checkpoint()["best"]["weights"]


METHODS = {
    "sgd": {},
    "sam": {"rho": 0.5},
    "sam_ce": {"rho": 0.5},
    "bisam_log": {"rho": 0.5},
    "bisam_tanh": {"rho": 0.5},
    "asam": {"rho": 2.0},
    "abisam_log": {"rho": 2.0, "eta": 0.01},
    "SAM(L2(Linear(0.5, 0.1, steps=6)), ascent=NegLog(mu=80))": {},
    "BiSAM(0.5, NegLog(Linear(1, 10, steps=6)))": {},
}


IN_SINGLE = ("sgd", "bisam_log", "asam")


@pytest.mark.parametrize(
    ("method", "precision", "tolerance"),
    [(method, "64", 1e-11) for method in METHODS] + [(method, "32", 2e-5) for method in IN_SINGLE],
    ids=lambda value: str(value).partition("(")[0],
)
def test_a_seed_of_a_stack_is_a_run_of_its_own(tmp_path, monkeypatch, method, precision, tolerance):
    recipe = replace(BASE, method=method, precision=precision, **METHODS[method])
    training = stacked.StackTraining(seeds(recipe), MACHINE)
    last = []
    original = training._test
    monkeypatch.setattr(
        training, "_test", lambda: last.append({k: t.clone() for k, t in training._stack.state().items()}) or original()
    )
    found = training.train()
    best = training._stack.state()
    for i, one in enumerate(seeds(recipe)):
        result, rows, own_last, own_best = trained_alone(one, tmp_path, monkeypatch)
        for name, tensor in own_last.items():
            torch.testing.assert_close(last[0][name][i], tensor, rtol=0, atol=tolerance)
            torch.testing.assert_close(best[name][i], own_best[name], rtol=0, atol=tolerance)
        ours, our_rows = found[i]
        for ours_row, row in zip(our_rows, rows, strict=True):
            assert list(ours_row) == list(row)
            # The sum of the losses of an epoch is kept in float32 in both.
            assert untimed(ours_row) == pytest.approx(untimed(row), rel=1e-5 if precision == "32" else 1e-6, abs=0)
        assert untimed(ours) == {k: v for k, v in untimed(result).items() if k in ours} | {"stacked": len(SEEDS)}
        assert result.keys() - ours.keys() == {"bisam", "torch", "python", "hardware", "commit", "recipe"} | (
            {"finished", "metrics", "checksum"}
        )


def test_a_run_of_steps_with_another_schedule_is_one_of_its_own(tmp_path, monkeypatch):
    recipe = replace(BASE, method="sam", rho=0.5, precision="64", epochs=None, steps=8, schedule="linear", warmup=2)
    for one, (ours, rows) in zip(seeds(recipe), stacked.StackTraining(seeds(recipe), MACHINE).train(), strict=True):
        result, own_rows, *_ = trained_alone(one, tmp_path, monkeypatch)
        assert [untimed(row) for row in rows] == [pytest.approx(untimed(row), rel=1e-6) for row in own_rows]
        assert (ours["test_last"], ours["test_best"]) == (result["test_last"], result["test_best"])


def test_larger_images_are_pooled_as_by_a_network_of_its_own():
    torch.manual_seed(0)
    models = [build("mlp", 10).eval() for _ in range(2)]
    images = torch.randn(2, 5, 3, 17, 16)
    found = Stack(models).predict_logits(images)
    for model, own, logits in zip(models, images, found, strict=True):
        torch.testing.assert_close(logits, model(own), rtol=0, atol=1e-5)


def test_seeds_do_not_share_weights_data_or_noise():
    training = stacked.StackTraining(seeds(BASE), MACHINE)
    weight = training._stack.weights[0]
    assert not torch.equal(weight[0], weight[1])
    labels = [split.labels for split in training._train]
    assert not torch.equal(labels[0], labels[1])


def test_augmented_batches_are_those_of_runs_of_their_own(monkeypatch):
    """Augmentation draws from the generator between the batches, so that an epoch cannot be drawn as one batch."""
    from bisam.experiments.data.image_tensors import Augmentation

    training = stacked.StackTraining(seeds(BASE), MACHINE)
    training._train = [replace(split, augmentation=Augmentation(padding=1)) for split in training._train]

    def generators():
        return [torch.Generator().manual_seed(seed) for seed in SEEDS]

    batches = list(training._batches(generators()))
    for i, (split, random) in enumerate(zip(training._train, generators(), strict=True)):
        own = list(split.batches(BASE.batch_size, random))
        for (x, y), (inputs, labels) in zip(own, batches, strict=True):
            assert torch.equal(inputs.unflatten(0, (3, -1))[i], x)
            assert torch.equal(labels.view(3, -1)[i], y)


def test_a_seed_that_diverges_changes_nothing_in_the_others(tmp_path):
    recipe = replace(BASE, method="sam", rho=0.5)
    alone = stacked.StackTraining(seeds(recipe), MACHINE).train()
    training = stacked.StackTraining(seeds(recipe), MACHINE)
    with torch.no_grad():
        training._stack.weights[2][1].fill_(math.inf)
    found = training.train()
    assert [result["diverged"] for result, _ in found] == [None, 1, None]
    assert [result.get("stopped") for result, _ in found] == [None, "diverged", None]
    assert math.isnan(found[1][1][-1]["train_loss"])
    assert [len(rows) for _, rows in found] == [recipe.length, 1, recipe.length]
    for i in (0, 2):
        assert untimed(found[i][0]) == untimed(alone[i][0])
        assert [untimed(row) for row in found[i][1]] == [untimed(row) for row in alone[i][1]]


# The parts


def test_norms_are_one_for_each_network_and_survive_squares_out_of_range():
    tensors = [torch.tensor([[3.0, 0.0], [1e30, 0.0], [1e-30, 0.0]]), torch.tensor([[4.0], [1e30], [0.0]])]
    vector = StackedVector(tensors)
    torch.testing.assert_close(vector.norm(), torch.tensor([5.0, 2**0.5 * 1e30, 1e-30]))
    scaled = vector * torch.tensor([2.0, 0.0, 1.0])
    assert isinstance(scaled, StackedVector)
    assert torch.equal(scaled.tensors[1], torch.tensor([[8.0], [0.0], [0.0]]))
    for result in (vector + vector, vector - vector, vector * vector, vector.abs(), 2.0 * vector, vector + 0.1):
        assert isinstance(result, StackedVector)


@pytest.mark.parametrize("objective", [None, cross_entropy, NegLog()])
@pytest.mark.parametrize("displaced", [False, True])
def test_answers_are_those_of_an_oracle_for_each_network(objective, displaced):
    torch.manual_seed(0)
    models = [build("mlp", 10, channels=1).double() for _ in range(3)]
    inputs, labels = torch.randn(3, 9, 1, 8, 8, dtype=torch.double), torch.randint(10, (3, 9))
    loss = nn.CrossEntropyLoss(label_smoothing=0.1, reduction="none")
    oracle = StackedOracle(stack := Stack(models), loss)
    at = oracle.weights * 0.1 if displaced else None
    answer = oracle.query((inputs.flatten(0, 1), labels.flatten()), objective, at=at)
    for i, model in enumerate(models):
        one = ModelOracle(model, loss)
        own: Evaluation = one.query((inputs[i], labels[i]), objective, at=one.weights * 0.1 if displaced else None)
        torch.testing.assert_close(answer.outputs.unflatten(0, (3, 9))[i], own.outputs, rtol=0, atol=1e-12)
        torch.testing.assert_close(answer.value[i], own.value, rtol=0, atol=1e-12)
        for ours, theirs in zip(answer.gradient, own.gradient, strict=True):
            torch.testing.assert_close(ours[i], theirs, rtol=0, atol=1e-12)
        for name, buffer in model.named_buffers():
            torch.testing.assert_close(stack.buffers[name][i], buffer, rtol=0, atol=1e-12)
    assert not any(weight.requires_grad for weight in oracle.weights)


# What fits


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"method": "gsam"}, "method gsam"),
        ({"method": "SAM(Friendly(L2(0.1)))", "rho": None}, "method SAM(Friendly(L2(0.1)))"),
        ({"method": "SAM(FlipRate(0.06))"}, "method SAM(FlipRate(0.06))"),  # one rate would follow the flips of all
        ({"optimizer": "adamw"}, "optimizer adamw"),
        ({"precision": "bf16"}, "precision bf16"),
        ({"model": "convnet"}, "model convnet"),
        ({"model": "timm:vit_base_patch16_224"}, "model timm:vit_base_patch16_224"),
        ({"dataset": "flowers"}, "dataset flowers"),
        ({"ema": 0.9}, "ema 0.9"),
        ({"update_bn": True}, "update_bn True"),
        ({"clip": 1.0}, "clip 1.0"),
        ({"mixup": 0.2}, "mixup 0.2"),
        ({"randaugment": 9}, "randaugment 9"),
        ({"accumulate": 2}, "accumulate 2"),
        ({"measured_epochs": 1}, "measured_epochs 1"),
    ],
)
def test_what_does_not_fit_is_named(changes, fault):
    assert misfits(replace(BASE, **{"method": "sam", **changes}), MACHINE) == [fault]


@pytest.mark.parametrize("name", ["mlp", "convnet", "resnet20", "vgg19_bn"])
def test_networks_with_other_layers_are_refused(name):
    if name == "mlp":
        assert misfits(replace(BASE, model=name), MACHINE) == []
    else:
        with pytest.raises(ValueError, match=r"it has|it is no sequence"):
            Stack([build(name, 10, channels=1)])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("digits",), "--stack does not train model convnet; it trains sgd, sam, sam_ce,"),
        (("radius", "--set", "optimizer=adamw"), "--stack does not train optimizer adamw; it trains"),
        (("radius", "--ray", "local"), "with --ray each run is a task: leave --stack out"),
        (("radius", "--log", "wandb"), "a stack writes metrics.csv and no other log: leave --log out"),
        (("sharpness", "--set", "model=mlp"), "--stack keeps no weights, which the analyses of sharpness need"),
    ],
)
def test_the_command_refuses_in_one_line(bisam, tmp_path, flags, message):
    code, out, err = bisam("run", *flags, "--stack", 4, "--out", tmp_path / "out")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert not (tmp_path / "out").exists()


# Folders and jobs


def test_runs_are_shared_evenly_and_finished_or_begun_ones_stay_out(tmp_path):
    a, b = replace(BASE, method="sam", rho=0.1), replace(BASE, method="sam", rho=0.2)
    recipes = [one for seed in range(7) for one in (replace(a, seed=seed), replace(b, seed=seed))]
    begun = Run.under(tmp_path, recipes[0])
    begun.folder.mkdir(parents=True)
    (begun.folder / "checkpoint.pt").touch()
    found = jobs(recipes, tmp_path, 4)
    assert [(len(job.recipes), job.stacked) for job in found] == [
        (3, True),
        (4, True),
        (3, True),
        (3, True),
        (1, False),
    ]
    assert found[-1] == Job((recipes[0],))
    assert {recipe for job in found for recipe in job.recipes} == set(recipes)
    assert all(len({replace(recipe, seed=0) for recipe in job.recipes}) == 1 for job in found)
    assert jobs(recipes[:2], tmp_path, None) == [Job((recipe,)) for recipe in recipes[:2]]


def test_a_stack_leaves_ordinary_folders_and_trains_no_finished_seed_again(tmp_path, monkeypatch):
    recipe = replace(BASE, method="sam", rho=0.5)
    first = train_stack_or_explain(seeds(recipe), tmp_path, MACHINE)
    runs = list(finished(tmp_path))
    assert [run.recipe for run in runs] == seeds(recipe)
    assert [run.result["stacked"] for run in runs] == [3, 3, 3]
    assert {path.name for path in (tmp_path / recipe.slug / "seed-7").iterdir()} == {
        *("recipe.json", "metrics.csv", "result.json", ".lock")
    }
    trained = []
    original = stacked.StackTraining.__init__
    monkeypatch.setattr(
        stacked.StackTraining,
        "__init__",
        lambda self, recipes, machine: trained.extend(recipes) or original(self, recipes, machine),
    )
    again = train_stack_or_explain(seeds(recipe, (*SEEDS, 9)), tmp_path, MACHINE)
    assert trained == [replace(recipe, seed=9)]
    assert again[:3] == first
    assert again[3].result["stacked"] == 1


def test_a_folder_in_use_costs_the_others_nothing(tmp_path):
    recipe = replace(BASE, method="sam", rho=0.5, epochs=1)
    with Run.under(tmp_path, replace(recipe, seed=1)).open():
        outcomes = train_stack_or_explain(seeds(recipe), tmp_path, MACHINE)
    assert [outcome.error is None for outcome in outcomes] == [True, False, True]
    assert "is in use by another process" in outcomes[1].error


def test_data_of_different_sizes_are_refused(monkeypatch):
    original = stacked.prepare

    def prepare(recipe, machine):
        data, model = original(recipe, machine)
        return (replace(data, test=data.test.first(10)) if recipe.seed == 7 else data), model

    monkeypatch.setattr(stacked, "prepare", prepare)
    with pytest.raises(ValueError, match="--stack needs data of one size, and the test parts of the seeds have 10 to "):
        stacked.StackTraining(seeds(BASE), MACHINE)


def test_the_estimate_grows_with_the_gradients_and_the_runs():
    machine = replace(MACHINE)
    plain, sam = replace(BASE, method="sgd"), replace(BASE, method="sam")
    one = seconds(plain, machine, 3, 3)
    assert one < seconds(sam, machine, 3, 3)
    assert seconds(plain, machine, 6, 3) == pytest.approx(2 * one)


@pytest.mark.slow
def test_the_command_trains_stacks_in_processes_and_reports_them(bisam, tmp_path):
    flags = ("radius", "--stack", 2, "--workers", 1, "--seeds", 3, "--epochs", 1, "--set", "limit=70")
    code, _, err = bisam("run", *flags, "--out", tmp_path)
    assert (code, err) == (0, "")
    runs = list(finished(tmp_path / "radius"))
    assert len(runs) == 3 * 116
    assert {run.result["stacked"] for run in runs} == {1, 2}
    page = (tmp_path / "radius" / "report.md").read_text()
    assert "## The regret of a radius that is too large" in page
    assert (tmp_path / "radius" / "radii.png").exists()
    assert (tmp_path / "radius" / "regret.csv").exists()
    code, _, err = bisam("run", *flags, "--out", tmp_path)  # nothing is left
    assert (code, err) == (0, "")
