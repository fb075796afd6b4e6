"""Recipes, runs, the training loop, studies, reports and the command line."""

from __future__ import annotations

import csv
import errno
import io
import json
import multiprocessing as mp
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from filelock import FileLock

from bisam import ERM, KSAM, RSAM, SAM, EBiSAM, SharpnessAware, cross_entropy, experiments
from bisam.experiments import data, studies
from bisam.experiments.errors import RunError
from bisam.experiments.launch import processes
from bisam.experiments.models.build import build
from bisam.experiments.recipes.catalogue import METHODS
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs import environment, files
from bisam.experiments.runs.folder import Run, finished
from bisam.experiments.runs.machine import Machine
from bisam.experiments.studies.study import expand
from bisam.experiments.training.counting import CountedMethod
from bisam.experiments.training.train import train
from bisam.perturbations import L2
from tests.support.doubles import Silent

SHORT = Recipe(method="bisam_log", noise=0.4, rho=0.4, epochs=3, batch_size=256)
SGD = replace(SHORT, method="sgd", rho=None)
NO_RHO = {method for method, entry in METHODS.items() if entry.rho is None}


# Recipes


def test_a_recipe_survives_its_text():
    assert Recipe.from_dict(json.loads(json.dumps(SHORT.to_dict()))) == SHORT


def test_the_folder_name_depends_on_every_field_but_the_seed():
    one = replace(SHORT, method="abisam_tanh")  # which takes them all
    assert replace(one, seed=7).slug == one.slug
    changed: dict[str, Any] = {"method": "abisam_log", "model": "other", "dataset": "other", "weights": "pretrained"}
    changed |= {"optimizer": "adamw", "schedule": "linear", "warmup": 3, "precision": "bf16"}
    one = replace(one, schedule="constant")
    assert replace(one, epochs=None, steps=7).slug != one.slug
    for field in fields(Recipe):
        if field.name not in ("seed", "version", "steps"):
            before = getattr(one, field.name)
            value = not before if isinstance(before, bool) else 7 if isinstance(before, int) else 0.25
            value = 7 if field.name == "limit" else value
            other = replace(one, **{field.name: changed.get(field.name, value)})
            assert other.slug != one.slug, field.name


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0),
        ("batch_size", 0),
        ("noise", 1.0),
        ("noise", -0.1),
        ("rho", -1.0),
        ("rho", float("nan")),
        ("mu", 0.0),
        ("alpha", float("inf")),
        ("learning_rate", 0.0),
        ("momentum", 1.0),
        ("weight_decay", -1e-4),
        ("label_smoothing", 1.0),
        ("seed", -1),
    ],
)
def test_a_recipe_refuses_what_is_out_of_range(field, value):
    with pytest.raises(ValueError, match=f"{field} must be"):
        Recipe(**{field: value})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "adam"}, "unknown method 'adam', did you mean 'asam'"),
        ({"method": "SAM"}, r"write a call, such as SAM\(\)"),
        ({"method": "SAM(L2(0.1)"}, "is no expression"),
        ({"method": "SAM(L3(0.1))"}, "unknown name 'L3'"),
        ({"method": "SAM(L2(-1))"}, r"SAM\(L2\(-1\)\): rho must be non-negative"),
        ({"method": "KSAM(0)"}, "k must be at least 1, got 0"),
        ({"method": "NegLog(1).mu()"}, "neither a number nor a call"),
        ({"method": "SAM(L2(rho))"}, "unknown name 'rho'"),
        ({"method": "SAM(NegLog())"}, "perturb must be a radius or a perturbation"),
        ({"method": "KSAM(32, ERM)"}, r"ERM is no value: write a call, such as ERM\(...\)"),
        ({"method": "SAM(L2(1 / 0))"}, "division by zero"),
        ({"method": "SAM(L2('x' * 10))"}, "'x'\" is no number|is no number"),
        ({"method": "SAM(**L2(0.1))"}, "must name each argument once"),
        ({"method": "SAM(perturb=L2(1), perturb=L2(2))"}, "repeated|once"),
        ({"method": "SAM(L2(" + "-" * 2000 + "1))"}, "at most 1000 characters"),
        ({"method": "SAM(rho=0.1)"}, "unexpected keyword"),
        ({"method": "SAM(*[1])"}, "neither a number"),
        ({"method": "sgd", "rho": 0.1}, "rho is no setting of the method sgd"),
        ({"method": "sam", "mu": 1.0}, "mu is no setting of the method sam: it takes rho"),
        ({"method": "SAM(L2(0.1))", "rho": 0.1}, "written inside"),
    ],
)
def test_a_recipe_refuses_what_is_no_method(settings, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**settings)


def test_a_recipe_takes_any_nest_as_an_expression(tmp_path):
    recipe = replace(SHORT, method="KSAM(32, RSAM(0.01, EBiSAM(0.05 + 2 * 0.1)))", rho=None, epochs=1)
    assert recipe.build_method() == KSAM(32, RSAM(0.01, EBiSAM(0.25)))
    assert recipe.slug.startswith("KSAM-32-RSAM-0.01-EBiSAM-0.05-2-0.1-noise-0.4-")
    result = train(Run.under(tmp_path, recipe))
    assert 0 < result["gradients_per_step"] < 1
    assert result["forwards_per_step"] > 1


def test_an_expression_knows_the_run():
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    follow = Recipe(method="gsam", rho=0.2).build_method(optimizer=optimizer).perturb.rho
    assert (follow.optimizer, follow.high, follow.low) == (optimizer, 0.2, 0.1)
    assert Recipe(method="xsam").build_method(epoch=17).every == 17
    assert Recipe(method="ae_sam").build_method(steps=510).steps == 510
    assert Recipe(method="During(SAM(), start=2000, stop=steps)").method  # steps are not known yet


@pytest.mark.parametrize(("method", "gradients"), [("sgd", 1.0), ("sam", 2.0), ("esam", 1.5), ("looksam", 1.2)])
def test_a_run_counts_its_gradients(tmp_path, method, gradients):
    recipe = replace(SHORT, method=method, rho=None, epochs=5, batch_size=216)  # 5 steps an epoch, the last one smaller
    assert train(Run.under(tmp_path, recipe))["gradients_per_step"] == pytest.approx(gradients, abs=0.02)


def test_the_authors_flags_keep_their_own_defaults():
    """Their script passes mu = 1 to both bounds; here tanh keeps the paper's 10 unless told otherwise."""
    tanh = Recipe(method="bisam_tanh").build_method()
    assert (tanh.ascent.mu, tanh.ascent.alpha) == (10.0, 0.1)
    assert Recipe(method="bisam_tanh", mu=1.0).build_method().ascent.mu == 1.0
    assert Recipe(method="bisam_log").build_method().ascent.mu == 1.0
    assert Recipe(method="sgd").build_method() == ERM()


# Data


def test_digits_are_split_without_overlap_and_scaled_by_the_training_part():
    d = data.load(Recipe(), Machine())
    assert [len(part) for part in (d.train, d.validation, d.test)] == [1078, 270, 449]
    torch.testing.assert_close(d.train.images.mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(d.train.images.std(), torch.tensor(1.0), atol=1e-5, rtol=0)


@pytest.mark.parametrize("rate", [0.0, 0.4, 0.99])
def test_label_noise_moves_exactly_its_share_to_other_classes(rate):
    labels = torch.arange(1000) % 10
    noisy = data.symmetric_noise(labels, rate, 10, seed=3)
    assert (noisy != labels).sum() == round(rate * 1000)
    assert noisy.min() >= 0
    assert noisy.max() <= 9
    assert torch.equal(noisy, data.symmetric_noise(labels, rate, 10, seed=3))


def test_noise_is_on_the_training_labels_only():
    clean, noisy = data.load(Recipe(seed=1), Machine()), data.load(Recipe(noise=0.4, seed=1), Machine())
    assert not torch.equal(clean.train.labels, noisy.train.labels)
    for part in ("validation", "test"):
        assert torch.equal(getattr(clean, part).labels, getattr(noisy, part).labels)


@pytest.mark.parametrize("rate", [0.4, 0.8])
def test_noise_is_on_the_validation_labels_where_it_is_asked_for(rate):
    recipe = Recipe(noise=rate, seed=1)
    clean, noisy = data.load(recipe, Machine()), data.load(replace(recipe, validation_noise=True), Machine())
    assert torch.equal(clean.train.labels, noisy.train.labels)
    assert torch.equal(clean.test.labels, noisy.test.labels)
    other = clean.validation.labels != noisy.validation.labels
    assert other.sum() == round(rate * len(other))
    assert noisy.validation.labels.unique().numel() == 10
    again = data.load(replace(recipe, validation_noise=True, seed=2), Machine()).validation.labels
    assert not torch.equal(noisy.validation.labels, again)
    # Other random numbers than those of the training labels: independent of which of them are noisy.
    among = clean.validation.relabelled(clean.train.labels[: len(other)])
    same = data.symmetric_noise(among.labels, rate, 10, 1) != among.labels
    assert not torch.equal(same, other)


def test_noise_on_the_validation_labels_is_what_epochs_are_chosen_by(tmp_path):
    recipe = replace(SHORT, method="sgd", rho=None, epochs=1, validation_noise=True)
    (noisy, clean) = (train(Run.under(tmp_path, one)) for one in (recipe, replace(recipe, validation_noise=False)))
    assert noisy["test_best"] == clean["test_best"]
    assert noisy["validation_best"] < clean["validation_best"]


def test_batches_cover_the_split_once():
    split = data.load(Recipe(), Machine()).validation
    seen = torch.cat([x for x, _ in split.batches(64, torch.Generator())])
    assert len(seen) == len(split)
    assert torch.equal(seen.sum(0).round(decimals=2), split.images.sum(0).round(decimals=2))


# Runs


@pytest.fixture
def run(tmp_path):
    return Run.under(tmp_path, SHORT)


def weights(run: Run) -> dict:
    return {k: v for k, v in run.checkpoint()["sharp"].items() if isinstance(v, torch.Tensor)}


def same_outcome(a: Run, b: Run) -> bool:
    skip = {"seconds_per_epoch", "relative_time", "finished", "metrics", "checksum"}  # times, and what holds them
    results = [{k: v for k, v in r.result.items() if k not in skip} for r in (a, b)]
    histories = [
        [{k: v for k, v in row.items() if k not in ("seconds", "relative_time")} for row in r.checkpoint()["history"]]
        for r in (a, b)
    ]
    ours, theirs = weights(a), weights(b)
    same = all(torch.equal(ours[k], theirs[k]) for k in ours)
    return results[0] == results[1] and histories[0] == histories[1] and same


def test_a_run_leaves_recipe_metrics_checkpoint_and_result(run):
    result = train(run)
    assert {p.name for p in run.folder.iterdir()} >= {"recipe.json", "metrics.csv", "checkpoint.pt", "result.json"}
    assert not list(run.folder.glob("*.tmp"))
    rows = list(csv.DictReader(io.StringIO((run.folder / "metrics.csv").read_text())))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert 0 <= result["test_last"] <= 1
    assert {"torch", "python", "hardware", "commit", "bisam"} <= result.keys()
    assert run.folder.parent.name == SHORT.slug


def test_a_finished_run_is_not_run_again(run, monkeypatch):
    first = train(run)
    monkeypatch.setattr("bisam.experiments.training.train.train_epoch", lambda *_: pytest.fail("it ran again"))
    assert train(run) == first


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_an_interrupted_run_resumes_to_the_same_bits(tmp_path, stop_after):
    whole, broken = Run.under(tmp_path / "a", SHORT), Run.under(tmp_path / "b", SHORT)
    train(whole)

    def interrupt(row):
        if row["epoch"] == stop_after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(broken, on_epoch=interrupt)
    assert broken.result is None
    train(broken)
    assert same_outcome(whole, broken)


KILLED = """
import os, signal, sys
from pathlib import Path
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs.folder import Run
from bisam.experiments.training.train import train

calls, replace = 0, Path.replace
def replaced(path, target):
    global calls
    calls += target.name == sys.argv[2]
    if calls == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(path, target)
Path.replace = replaced
train(Run.under(Path(sys.argv[1]), Recipe(method="bisam_log", noise=0.4, rho=0.4, epochs=3, batch_size=256)))
"""


@pytest.mark.parametrize(
    ("file", "call", "kept"),
    [
        ("checkpoint.pt", 2, 1),
        pytest.param("metrics.csv", 2, 1, marks=pytest.mark.slow),
        pytest.param("checkpoint.pt", 3, 2, marks=pytest.mark.slow),
        pytest.param("metrics.csv", 3, 2, marks=pytest.mark.slow),
        ("result.json", 1, 3),
    ],
)
def test_a_killed_run_resumes_to_the_same_bits(tmp_path, file, call, kept):
    """Killed with a file written but not yet in its place."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = subprocess.run([sys.executable, "-c", KILLED, tmp_path, file, str(call)], env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    broken, whole = Run.under(tmp_path, SHORT), Run.under(tmp_path / "whole", SHORT)
    assert broken.result is None
    assert len(broken.checkpoint()["history"]) == kept
    assert list(broken.folder.glob(".*.tmp"))
    train(broken)
    assert not list(broken.folder.glob(".*.tmp"))
    train(whole)
    assert same_outcome(whole, broken)
    metrics = [[row["flipped"] for row in next(finished(root)).metrics] for root in (tmp_path, tmp_path / "whole")]
    assert metrics[0] == metrics[1]
    assert len(metrics[0]) == SHORT.epochs


def test_a_run_in_use_is_refused(run):
    run.folder.mkdir(parents=True)
    with FileLock(run.folder / ".lock"), pytest.raises(RunError, match="in use by another process"):
        train(run)


def test_a_folder_of_another_recipe_is_refused_and_left_alone(run):
    train(run)
    other = Run(run.folder, replace(SHORT, rho=0.1))
    before = (run.folder / "result.json").read_bytes()
    with pytest.raises(RunError, match=r"another recipe \(rho=0\.4 there, 0\.1 here\)"):
        train(other)
    assert (run.folder / "result.json").read_bytes() == before


@pytest.mark.parametrize("name", ["recipe.json", "result.json", "checkpoint.pt"])
@pytest.mark.parametrize("content", [b"", b"\x00garbage", b"[1]"])
def test_a_damaged_folder_is_named(run, name, content):
    train(run)
    if name == "checkpoint.pt":
        (run.folder / "result.json").unlink()
    (run.folder / name).write_bytes(content)
    with pytest.raises(RunError, match=rf"{name} is damaged .*delete .*other runs are not affected"):
        train(run)


def test_a_full_disk_leaves_the_last_epoch(run, monkeypatch):
    def full(path, mode):
        file = open(path, mode)  # noqa: SIM115
        if path.name.startswith(".checkpoint") and run.checkpoint() is not None:
            file.write(b"a part")
            file.close()
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return file

    monkeypatch.setattr(files, "open", full, raising=False)
    with pytest.raises(OSError, match="No space left"):
        train(run)
    assert len(run.checkpoint()["history"]) == 1
    assert not list(run.folder.glob(".*.tmp"))
    monkeypatch.undo()
    train(run)
    assert run.result is not None


# The training loop


def test_flipped_samples_are_right_at_w_and_wrong_at_w_plus_e():
    d = data.load(Recipe(), Machine())
    model = build("convnet", 10, channels=1)
    watch = CountedMethod(SAM(L2(2.0)))
    sharp = SharpnessAware(model, watch, cross_entropy)
    x, y = d.train.images[:256], d.train.labels[:256]
    sharp(x, y)
    plain = build("convnet", 10, channels=1)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(sharp.clean.outputs, plain.train()(x).detach())
    assert not torch.equal(watch.outputs, sharp.clean.outputs)
    still = CountedMethod(ERM())
    sharp = SharpnessAware(model, still, cross_entropy)
    sharp(x, y)
    assert torch.equal(still.outputs, sharp.clean.outputs)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (replace(SHORT, dataset="cifar10"), "cifar10 is missing: give --download, or unpack"),
        (replace(SHORT, dataset="digit"), "did you mean 'digits'"),
        (replace(SHORT, model="resnet57"), "unknown model 'resnet57', did you mean 'resnet56'"),
    ],
)
def test_what_is_not_here_is_named(tmp_path, recipe, message):
    with pytest.raises(ValueError, match=message):
        train(Run.under(tmp_path, recipe), Machine(data_dir=tmp_path / "empty"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("device", ["tpu9", "cuda:x", "cuda:97", ""])
def test_an_unknown_device_is_named(tmp_path, device):
    with pytest.raises(ValueError, match="--device takes"):
        train(Run.under(tmp_path, SHORT), Machine(device))


# Studies


def test_a_study_keeps_finished_runs_reports_failures_and_goes_on(tmp_path):
    recipes = [replace(recipe, epochs=1) for recipe in (SGD, replace(SHORT, method="sam"), SHORT)]
    done, damaged, fresh = (Run.under(tmp_path, recipe) for recipe in recipes)
    kept = train(done)
    damaged.folder.mkdir(parents=True)
    (damaged.folder / "checkpoint.pt").write_bytes(b"garbage")
    progress = Silent()
    outcomes = processes.run_all(recipes, tmp_path, workers=2, machine=Machine(), progress=progress)
    assert [outcome.recipe for outcome in outcomes] == recipes
    assert outcomes[0].result == kept
    assert "checkpoint.pt is damaged" in outcomes[1].error
    assert outcomes[2].result == fresh.result
    assert set(progress.ended) == set(recipes)
    assert (recipes[2], 1) in progress.epochs
    assert (recipes[0], 1) not in progress.epochs


@pytest.mark.slow
def test_a_killed_worker_costs_no_run(tmp_path):
    recipes = [replace(recipe, epochs=30, batch_size=64) for recipe in (SGD, replace(SHORT, method="sam"), SHORT)]

    class Killer(Silent):
        def epoch(self, recipe, epoch, validation):
            if not self.epochs:
                mp.active_children()[0].kill()
            super().epoch(recipe, epoch, validation)

    progress = Killer()
    outcomes = processes.run_all(recipes, tmp_path, workers=2, machine=Machine(), progress=progress)
    assert [(outcome.recipe, outcome.error) for outcome in outcomes] == [(recipe, None) for recipe in recipes]
    assert len(list(finished(tmp_path))) == 3


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path):
    theirs, ours = Run.under(tmp_path, SHORT), Run.under(tmp_path, replace(SHORT, method="sam", rho=0.1))
    train(theirs)
    ours.folder.mkdir(parents=True)
    shutil.copy(theirs.folder / "checkpoint.pt", ours.folder)
    with pytest.raises(
        RunError, match=r"checkpoint.pt belongs to another recipe \(method='bisam_log' there, 'sam' here"
    ):
        train(ours)
    assert ours.result is None


def test_a_result_in_another_recipes_folder_is_not_taken_for_its_own(tmp_path):
    train(Run.under(tmp_path, SHORT))
    other = replace(SHORT, rho=0.1)
    Run.under(tmp_path, SHORT).folder.parent.rename(tmp_path / other.slug)
    (outcome,) = processes.run_all([other], tmp_path, workers=1, machine=Machine(), progress=Silent())
    assert "belongs to another recipe" in outcome.error


@pytest.mark.parametrize("name", ["rho", "noise", "learning_rate", "clip"])
def test_a_whole_number_is_the_same_recipe_as_the_float(name):
    value = 0 if name == "noise" else 1
    whole, point = (replace(SHORT, **{name: number}) for number in (value, float(value)))
    assert whole == point
    assert whole.slug == point.slug


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler")
def test_a_compiled_run_resumes_to_the_same_bits(tmp_path):
    """In a fresh process, whose first batch is another than in the one that was interrupted."""
    recipe = replace(SHORT, compile=True, epochs=2, batch_size=64, limit=150)
    code = (
        "import sys; from pathlib import Path; from bisam.experiments.recipes.recipe import Recipe; "
        "from bisam.experiments.runs.folder import Run; from bisam.experiments.training.train import train\n"
        "class Stop(Exception): pass\n"
        "def each(row):\n"
        "    if row['epoch'] == int(sys.argv[2]): raise Stop\n"
        f"try: train(Run.under(Path(sys.argv[1]), {recipe!r}), on_epoch=each)\n"
        "except Stop: pass\n"
    )
    for name, last in (("a", 9), ("b", 1), ("b", 9)):
        subprocess.run([sys.executable, "-c", code, tmp_path / name, str(last)], check=True)
    assert same_outcome(Run.under(tmp_path / "a", recipe), Run.under(tmp_path / "b", recipe))


def test_the_digits_study_is_what_it_says():
    study = studies.STUDIES["digits"]
    recipes = study.recipes(None)
    assert study.seeds == 5
    assert {(r.method, r.noise) for r in recipes} == {
        (method, noise) for method in ("sgd", "sam", "bisam_log", "bisam_tanh", "asam") for noise in (0.0, 0.4)
    }
    assert len({r.epochs for r in recipes if r.method != "sgd"}) == 1
    assert all(r.epochs == 2 * recipes[1].epochs for r in recipes if r.method == "sgd")
    assert len(expand(recipes, 5)) == len(set(expand(recipes, 5))) == 50


# Reports


def test_the_methods_study_runs_every_method():
    recipes = studies.STUDIES["methods"].recipes(None)
    assert {recipe.method for recipe in recipes} == set(METHODS)
    assert all(recipe.rho is not None for recipe in recipes if recipe.method not in NO_RHO)
    trials = studies.STUDIES["methods-rho"].recipes(None)
    assert all(any(same == recipe for same in trials) for recipe in recipes if recipe.method not in NO_RHO)


def test_the_commit_is_this_projects_or_unknown(tmp_path, monkeypatch):
    """A copy inside another project's repository must not claim that project's commit."""
    package = tmp_path / "venv" / "bisam" / "experiments" / "runs"
    package.mkdir(parents=True)
    for command in (
        ["init", "-q"],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "x", "--allow-empty"],
    ):
        subprocess.run(["git", "-C", tmp_path, *command], check=True)
    monkeypatch.setattr(environment, "__file__", str(package / "environment.py"))
    assert environment.commit() == "unknown"


# The command line


AUTHORS = ("train", "--optim", "bisam_log", "--rho", "0.05", "--epochs", "200", "--learning_rate", "0.1")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "digit"), "did you mean 'digits'"),
        (("run",), "requires an argument"),
        (("run", "digits", "--seeds", "0"), "--seeds must be at least 1, got 0"),
        (("run", "digits", "--seeds", "many"), "--seeds: 'many' is not a whole number"),
        (("run", "digits", "--seeds", "1.5"), "--seeds: '1.5' is not a whole number"),
        (("train", "--epochs", "1.5"), "--epochs: '1.5' is not a whole number"),
        (("run", "digits", "--seed", "3"), "Did you mean --seeds?"),
        (("run", "digits", "--device", "tpu9"), "--device takes"),
        (("report", "digits", "--out", "nowhere"), "no finished run of digits in nowhere"),
        (("train", "--optim", "samm"), "did you mean 'sam'?"),
        (("train", "--method", "SAM(L2(0.1)"), "is no expression"),
        (("train", "--rho", "-1"), "rho must be non-negative"),
        (("train", "extra"), "extra"),
        (("bogus",), "Available commands"),
        (
            (*AUTHORS, "--model", "resnet56", "--dataset", "cifar10", "--data-dir", "nowhere"),
            "cifar10 is missing",
        ),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(bisam, arguments, message):
    code, out, err = bisam(*arguments)
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert out == ""


def test_without_the_extra_the_command_says_what_to_install(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "bisam.experiments.cli", raising=False)
    monkeypatch.setitem(sys.modules, "cyclopts", None)
    with pytest.raises(SystemExit) as stop:
        experiments.main()
    assert stop.value.code == 2
    assert capsys.readouterr().err == "bisam: the command needs cyclopts: pip install 'bisam[experiments]'\n"


def test_a_place_that_cannot_be_written_is_one_line(bisam, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = bisam("train", "--epochs", 1, "--out", tmp_path / "file")
    assert code == 2
    assert "cannot write" in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize("command", ["run", "train", "list", "report"])
def test_every_command_has_help_with_an_example(bisam, command):
    code, out, _ = bisam(command, "--help")
    assert code == 0
    assert f"bisam {command}" in out.split("xample", 1)[1]


def test_train_and_list_run(bisam, tmp_path):
    code, out, _ = bisam(
        "train", "--optim", "bisam_log", "--rho", "0.05", "--learning_rate", "0.1", "--epochs", "1", "--out", tmp_path
    )
    assert code == 0
    assert "test accuracy" in out
    assert len(list(tmp_path.glob("train/bisam_log-noise-0-*/seed-0/result.json"))) == 1
    code, out, _ = bisam("list")
    assert code == 0
    assert "digits" in out


def test_a_short_digits_study_end_to_end(bisam, tmp_path):
    code, out, err = bisam("run", "digits", "--seeds", "1", "--epochs", "1", "--workers", "2", "--out", tmp_path)
    assert (code, err) == (0, "")
    assert "10/10 runs" in out
    assert len(list(tmp_path.glob("digits/*/seed-0/result.json"))) == 10
    assert (tmp_path / "digits" / "accuracy.png").stat().st_size > 10_000
    assert (tmp_path / "digits" / "flips.png").stat().st_size > 10_000
