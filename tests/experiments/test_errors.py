"""Errors that the command line prints in one line: memory that does not suffice, and files that torch refuses."""

from __future__ import annotations

import errno
import pickle
import warnings

import pytest
import torch

from bisam.experiments.errors import (
    RunWarning,
    is_out_of_memory,
    missing_package,
    reason_not_loaded,
    show_warnings_in_one_line,
    to_find,
    unknown,
)
from bisam.experiments.launch import estimate
from bisam.experiments.launch.work import train_or_explain
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs.machine import Machine
from bisam.experiments.training import train as training
from bisam.experiments.training.checks import check_model

NAMES = ["sam", "bisam_log", "bisam_tanh", "table1", "table2", "table3", "table10"]
ONE = Recipe(method="sam", epochs=1, limit=64)
OUT_OF_MEMORY = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes."),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 4 bytes."),
    RuntimeError("could not create a memory object"),
    RuntimeError("could not create a primitive"),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
    RuntimeError("std::bad_alloc"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
]
OTHER = [
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    OSError(errno.ENOSPC, "No space left on device"),
    ValueError("out of memory"),
    KeyError("memory"),
]
each_of_memory = pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: f"{error}"[:30])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("samm", ", did you mean 'sam'? Try bisam list"),
        ("SAM", ", did you mean 'sam'? Try bisam list"),
        ("bisam", ", did you mean 'bisam_log' or 'bisam_tanh'? Try bisam list"),
        ("table", ", did you mean 'table1', 'table2' or 'table3'? Try bisam list"),
        ("table4", ", did you mean 'table3'? Try bisam list"),
        ("nonsense", ": try bisam list"),
        ("t", ": try bisam list"),
        ("", ": try bisam list"),
    ],
)
def test_of_many_names_the_nearest_are_said_and_what_lists_them(name, words):
    assert str(unknown("kind", name, NAMES, "bisam list")) == f"unknown kind {name!r}{words}"


def test_few_names_are_all_said():
    assert str(unknown("kind", "c", ["a", "b"])) == "unknown kind 'c', available: a, b"
    assert str(unknown("kind", "ab", ["abc", "b"])) == "unknown kind 'ab', did you mean 'abc'? Available: abc, b"
    assert str(unknown("kind", "ab", ["ab_c", "ab_c"])) == "unknown kind 'ab', did you mean 'ab_c'? Available: ab_c"


def test_where_nothing_is_found_the_folder_above_or_below_is_said(tmp_path):
    (tmp_path / "digits").mkdir()
    first = "run `bisam run digits` first, or give the --out of its runs"
    assert to_find("bisam run digits", "digits", tmp_path) == first
    assert to_find("bisam run digits", "digits", tmp_path / "x") == f"{first}; {tmp_path / 'x'} does not exist"
    remedy = f"--out is the folder that the folder digits is in: give --out {tmp_path}"
    assert to_find("bisam run digits", "digits", tmp_path / "digits") == remedy


@each_of_memory
def test_memory_that_does_not_suffice_is_recognised(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize("error", OTHER, ids=repr)
def test_other_errors_are_not_of_the_memory(error):
    assert not is_out_of_memory(error)


def test_what_torch_raises_on_this_machine_is_recognised():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**55, dtype=torch.uint8)
    assert is_out_of_memory(raised.value)


@each_of_memory
def test_a_training_without_memory_is_one_line(bisam, tmp_path, monkeypatch, error):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr(training, "train_epoch", fails)
    code, _, err = bisam("train", "--epochs", 1, "--limit", 64, "--out", tmp_path)
    assert code == 2
    assert err.startswith("bisam: out of memory: a smaller --batch-size needs less (")
    assert len(err.splitlines()) == 1
    outcome = train_or_explain(ONE, tmp_path, Machine(log=()))
    assert outcome.error is not None
    assert outcome.error.startswith("out of memory: fewer runs at a time or a smaller batch_size need less (")
    assert "\n" not in outcome.error


@each_of_memory
def test_it_is_not_taken_for_a_model_that_does_not_fit_or_a_wrong_method(monkeypatch, error):
    class Large(torch.nn.Module):
        def forward(self, x):
            raise error

    splits = training.data.load(ONE, Machine())
    with pytest.raises(type(error)):
        check_model(Large(), splits, ONE)


def test_an_estimate_without_memory_says_so(monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("could not create a memory object")

    monkeypatch.setattr(estimate, "_measured", fails)
    assert "does not fit into the memory of this machine" in estimate.estimate(ONE, Machine()).problem
    monkeypatch.setattr(estimate, "_measured", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        estimate.estimate(ONE, Machine())


@pytest.mark.parametrize("command", [("list",), ("methods",)])
def test_a_command_without_memory_is_one_line(bisam, monkeypatch, command):
    def fails(*_, **__):
        raise MemoryError

    monkeypatch.setattr("bisam.experiments.cli.terminal.console.print", fails)
    code, _, err = bisam(*command)
    assert code == 2
    assert err == "bisam: out of memory (MemoryError): finished runs are unchanged\n"


# Files that torch refuses


def test_torchs_advice_to_run_the_code_in_a_file_is_not_repeated(tmp_path):
    torch.save(tmp_path, tmp_path / "x.pt")
    with pytest.raises(pickle.UnpicklingError, match="weights_only") as raised:
        torch.load(tmp_path / "x.pt", weights_only=True)
    assert "weights_only" not in reason_not_loaded(raised.value)
    assert reason_not_loaded(ValueError("it is short")) == "it is short"


# Warnings


def test_a_warning_about_a_run_is_one_line_and_others_are_unchanged(capsys, monkeypatch):
    usual = warnings.formatwarning
    monkeypatch.setattr(warnings, "formatwarning", usual)  # restored after the test
    show_warnings_in_one_line()
    assert warnings.formatwarning(RunWarning("two\nlines"), RunWarning, "a.py", 3) == "bisam: two lines\n"
    assert "a.py:3: UserWarning: other" in warnings.formatwarning(UserWarning("other"), UserWarning, "a.py", 3)


# Packages that are not installed


@pytest.mark.parametrize(
    ("package", "remedy"),
    [
        *(("matplotlib.pyplot", '"bisam[experiments]"'), ("sklearn", '"bisam[experiments]"')),
        *(("PIL.Image", '"bisam[experiments]"'), ("ray", '"bisam[cluster]"'), ("wandb", '"bisam[loggers]"')),
        *(("curvlinops", '"bisam[analysis]"'), ("onnx", '"bisam[onnx]"'), ("unheard_of", "unheard-of")),
    ],
)
def test_a_package_that_is_not_installed_is_one_line_of_the_command(bisam, monkeypatch, package, remedy):
    def fails(*_, **__):
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)

    monkeypatch.setattr("bisam.experiments.cli.terminal.console.print", fails)
    code, _, err = bisam("list")
    assert (code, err) == (2, f"bisam: {package.partition('.')[0]} is not installed: pip install {remedy}\n")


def test_a_missing_part_of_bisam_is_no_missing_package():
    assert missing_package(ModuleNotFoundError("No module named 'bisam.x'", name="bisam.x")) is None
    assert missing_package(ImportError("cannot import name 'x'")) is None
    told = ImportError('plots need matplotlib: pip install "bisam[analysis]"')
    assert missing_package(told) == str(told)


def test_a_run_without_a_package_is_one_line(tmp_path, monkeypatch):
    def fails(*_, **__):
        raise ModuleNotFoundError("No module named 'timm'", name="timm")

    monkeypatch.setattr(training, "prepare", fails)
    outcome = train_or_explain(ONE, tmp_path, Machine(log=()))
    assert outcome.error == 'timm is not installed: pip install "bisam[experiments]"'
