"""The flags of each command, frozen: a changed flag is a decision, and this test shows it."""

from __future__ import annotations

import difflib
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("cyclopts")

from bisam.experiments.cli import app, given_flags
from bisam.experiments.cli.idle import CONDITIONS, KINDS, refuse_idle
from bisam.experiments.data import NAMES
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs.machine import Machine

FROZEN = Path(__file__).parent / "flags.txt"
UPDATE = "BISAM_UPDATE_FLAGS=1 python -m pytest -n 0 tests/test_flags.py"
COMMANDS = [name for name in app if not name.startswith("-")]


def kind(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint)


def listed(command: str) -> list[str]:
    """A line for each flag of a command: its spellings, type and default."""
    lines = []
    for argument in app[command].assemble_argument_collection(parse_docstring=False):
        if argument.children or not argument.parse:  # a dataclass, whose fields are flags; or filled in by `main`
            continue
        default = argument.field_info.default
        if argument.name == "--data-dir":  # the environment may set another
            default = Path("data")
        required = default is argument.field_info.empty
        value = "required" if required else f"= {str(default) if isinstance(default, Path) else repr(default)}"
        lines.append(f"  {', '.join(argument.names)}: {kind(argument.hint)} {value}")
    return lines


def test_the_flags_of_each_command_are_those_that_are_frozen():
    found = "\n".join(line for name in COMMANDS for line in (f"bisam {name}", *listed(name))) + "\n"
    if os.environ.get("BISAM_UPDATE_FLAGS"):
        FROZEN.write_text(found)
    changed = difflib.unified_diff(FROZEN.read_text().splitlines(), found.splitlines(), "frozen", "found", lineterm="")
    if difference := "\n".join(changed):
        pytest.fail(f"flags have changed; if that is intended, run `{UPDATE}` and commit the file:\n{difference}")


def test_given_flags_are_those_on_the_command_line_in_one_spelling():
    arguments = ["train", "--optim", "sam", "--learning_rate=0.1", "--no-augment", "--data-dir", "--odd", "--log", "x"]
    assert given_flags(arguments) == {"method", "learning_rate", "augment", "data_dir", "log"}
    assert given_flags(["run", "digits", "--set", "epochs=1", "--dry-run"]) == {"set", "dry_run"}
    assert given_flags(["list"]) == frozenset()


ALWAYS = {
    "dataset",
    "model",
    "weights",
    "method",
    "noise",
    "limit",
    "train_examples",
    "imbalance",
    "epochs",
    "steps",
    "batch_size",
    "accumulate",
}
ALWAYS |= {"optimizer", "learning_rate", "schedule", "label_smoothing", "clip", "ema", "precision"}
ALWAYS |= {
    "compile",
    "measured_epochs",
    "seed",
    "device",
    "devices",
    "nodes",
    "log",
    "log_every",
    "stats",
    "stop_on_nan",
    "max_time",
}
REFUSED_BY_RECIPE = {"rho", "mu", "alpha", "eta", "warmup"}


def test_each_field_has_an_effect_always_or_under_a_condition():
    assert {field.name for kind in (Recipe, Machine) for field in fields(kind)} - {"version"} == {
        *ALWAYS,
        *REFUSED_BY_RECIPE,
        *CONDITIONS,
    }


BERT = ("--dataset", "glue:rte", "--model", "hf:bert-base-uncased")
CIFAR = ("--dataset", "cifar10")
FILES = ("--dataset", "flowers")


@pytest.mark.parametrize(
    ("idle", "where", "message"),
    [
        (("--augment",), FILES, "--augment (needs dataset cifar10 or cifar100, got flowers)"),
        (("--no-augment",), (), "--augment (needs dataset cifar10 or cifar100, got digits)"),
        (("--cutout",), (), "--cutout (needs dataset cifar10 or cifar100, got digits)"),
        (("--image-size", 96), CIFAR, "--image-size (needs dataset imagenet, flowers, pets or folder:PATH, got"),
        (("--image_size=224",), (), "--image-size (needs dataset imagenet"),
        (("--max-length", 64), CIFAR, "--max-length (needs dataset glue:TASK or text:pydoc, got cifar10)"),
        (("--channels-last",), BERT, "--channels-last (needs a dataset of images, got glue:rte)"),
        (("--momentum", 0.5), ("--optimizer", "adamw"), "--momentum (needs an optimizer with momentum, got adamw)"),
        (("--validation-noise",), (), "--validation-noise (needs noise above 0, got 0)"),
        (("--momentum", 0.5), ("--preset", "vit"), "--momentum (needs an optimizer with momentum, got adamw)"),
        (("--strategy", "ddp"), (), "--strategy (needs several --devices, got 1)"),
        (("--data-dir", "data"), (), "--data-dir (needs a dataset or weights in that folder, got digits)"),
        (
            ("--data-dir", "data"),
            ("--dataset", "folder:/mine"),
            "--data-dir (needs a dataset or weights in that folder",
        ),
        (("--bucket", 4), CIFAR, "--bucket (needs dataset glue:TASK, got cifar10)"),
        (
            ("--held-out", 0.2),
            CIFAR,
            "--held-out (needs dataset imagenet, pets, folder:PATH or glue:TASK, got",
        ),
        (("--frozen", 1, "--weights", "w.pt"), (), "--frozen (needs model hf:NAME or timm:NAME, got convnet)"),
        (("--frozen", 1), BERT, "frozen 1 keeps layers at random weights: give --weights, or leave it out"),
        (("--download",), (), "--download (needs dataset cifar10, cifar100, flowers, pets or glue:TASK, got digits)"),
        (("--download",), ("--dataset", "imagenet"), "glue:TASK, got imagenet)"),
        (("--loaders", 2), CIFAR, "--loaders (needs dataset imagenet, flowers, pets or folder:PATH, got cifar10)"),
        (("--cutout", "--image-size", 96), (), "--cutout (needs dataset cifar10 or cifar100, got digits), --image-"),
        (("--rho", 0.1), ("--method", "sgd"), "rho is no setting of the method sgd"),
        (("--mu", 1), ("--method", "sam"), "mu is no setting of the method sam"),
        (("--alpha", 1), ("--method", "bisam_log"), "alpha is no setting of the method bisam_log"),
        (("--eta", 1), ("--method", "sam"), "eta is no setting of the method sam"),
        (("--patience", 30), (), "--patience (needs patience below the epochs, got 30 of 30)"),
        (("--update-bn",), (), "--update-bn (needs ema, or a schedule-free optimizer, got sgd)"),
        (("--compile-mode", "default"), (), "--compile-mode (needs compile, got no compile)"),
        (("--cooldown", 0.1), (), "--cooldown (needs schedule wsd, got cosine)"),
        (("--warmup", 9), (), "warmup 9 needs the linear, constant or wsd schedule"),
    ],
)
def test_a_flag_without_effect_is_refused_by_name(bisam, tmp_path, idle, where, message):
    code, out, err = bisam("train", *where, *idle, "--out", tmp_path / "out")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("digits", "--set", "image_size=96"), "--set image_size (needs dataset imagenet"),
        (("digits", "--set", "image-size=96"), "--set image_size (needs dataset imagenet"),
        (("table1", "--set", "validation_noise=yes"), "--set validation_noise (needs noise above 0, got 0)"),
        (("digits", "--loaders", 2), "--loaders (needs dataset imagenet"),
        (("table7", "--set", "momentum=0.5"), "--set momentum (needs an optimizer with momentum, got adamw)"),
        (("table1", "--set", "max_length=9"), "--set max_length (needs dataset glue:TASK or text:pydoc, got cifar10)"),
        (("digits", "--cpus", 1), "without --ray there is no cluster: leave --cpus out"),
        (("digits", "--ray", "local", "--workers", 2), "leave --workers out"),
        (("digits", "--no-estimate"), "without --dry-run nothing is estimated: leave --estimate out"),
    ],
)
def test_a_flag_without_effect_on_a_study_is_refused_by_name(bisam, tmp_path, arguments, message):
    code, out, err = bisam("run", *arguments, "--out", tmp_path / "out")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("table11", "--data-dir", "x"), "table11 trains nothing: without effect are --data-dir"),
        (("table12", "--epochs", 1, "--workers", 2), "table12 trains nothing: without effect are --epochs, --workers"),
        (("example", "--log", "wandb", "--seeds", 1), "example trains nothing: without effect are --log, --seeds"),
        (("figure1", "--device", "cpu"), "figure1 is drawn from formulas: without effect are --device"),
        (("example", "--device", "cpu", "--no-estimate"), ""),
    ],
)
def test_a_measurement_takes_the_flags_of_studies_and_says_which_have_no_effect(bisam, tmp_path, arguments, message):
    code, out, err = bisam("run", *arguments, "--dry-run", "--out", tmp_path / "out")
    assert code == 0
    assert err == (f"bisam: {message}\n" if message else "")
    assert f"{arguments[0]} has " in out
    assert not (tmp_path / "out").exists()


def test_a_wrong_setting_of_a_measurement_is_one_line_and_no_note(bisam):
    code, out, err = bisam("run", "table12", "--set", "round=3", "--seeds", 1, "--dry-run")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "unknown setting of table12 'round', did you mean 'rounds'" in err


@pytest.mark.parametrize("name", CONDITIONS)
def test_each_condition_holds_somewhere(name):
    recipes = [
        Recipe(dataset=dataset, noise=0.1, measured_epochs=1)
        for dataset in ("digits", "cifar10", "imagenet", "folder:a", "glue:rte")
    ]
    recipes += [
        Recipe(model="hf:bert-base-uncased"),
        Recipe(patience=5),
        Recipe(schedule="wsd"),
        Recipe(ema=0.9, compile=True),
    ]
    refuse_idle(recipes, Machine(), frozenset({name}))
    with pytest.raises(ValueError, match="without effect, leave out: "):
        refuse_idle(
            [
                Recipe(
                    dataset="glue:rte" if name in ("channels_last", "erasing", "mixup", "cutmix") else "digits",
                    optimizer="Rprop",
                )
            ],
            Machine(strategy="ddp"),
            frozenset({name}),
        )


def test_settings_of_presets_and_unknown_data_sets_are_not_refused():
    refuse_idle([Recipe(cutout=True, image_size=96)], Machine(), frozenset({"dataset"}))
    refuse_idle(
        [Recipe(dataset="digit", noise=0.1, measured_epochs=1)],
        Machine(),
        frozenset(CONDITIONS) - {"strategy", "frozen", "patience", "cooldown", "update_bn", "compile_mode"},
    )


def test_every_kind_of_data_set_is_known():
    assert {name.partition(":")[0] for name in NAMES} == KINDS
