"""The command line: help, mistakes, and a study from end to end."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys

import pytest

from bisam import experiments

AUTHORS = ("train", "--optim", "bisam_log", "--rho", "0.05", "--epochs", "200", "--learning_rate", "0.1")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "digit"), "did you mean 'digits'"),
        (("run",), "bisam run needs STUDY: try bisam run --help"),
        (("plot",), "bisam plot needs FIGURE: try bisam plot --help"),
        (("tables",), "parameter --to requires an argument"),
        (("run", "digits", "--set", "model=convnt"), "unknown model 'convnt', did you mean 'convnet'? Try bisam list"),
        (("run", "digits", "--seeds", "0"), "--seeds must be at least 1, got 0"),
        (("run", "digits", "--seeds", "1000000000"), "--seeds must be at most 10,000, got 1000000000"),
        (("run", "digits", "--ray", "local", "--gpus", "nan"), "--gpus must be at least 0 and finite, got nan"),
        (("run", "digits", "--seeds", "many"), "--seeds: 'many' is not a whole number"),
        (("run", "digits", "--seeds", "1.5"), "--seeds: '1.5' is not a whole number"),
        (("train", "--epochs", "1.5"), "--epochs: '1.5' is not a whole number"),
        (("run", "digits", "--seed", "3"), "Did you mean --seeds?"),
        (("run", "digits", "--device", "tpu9"), "--device takes"),
        (("report", "digits", "--out", "nowhere"), "no finished run of digits in nowhere"),
        (("train", "--optim", "samm"), "did you mean 'sam'?"),
        (("train", "--method", "SAM(L2(0.1)"), "is no expression"),
        (("train", "--rho", "-1"), "rho must be non-negative"),
        (("train", "extra"), "unexpected argument 'extra': try bisam train --help"),
        (("bogus",), "Try bisam --help"),
        (("train", "--out", ""), "--out is empty: give a value, or leave it out"),
        (("report", "digits", "--to="), "--to is empty"),
        (("evaluate", ""), "the argument after evaluate is empty"),
        (("run", "digits", "--set", "epochs=1", "--set", "epochs=2"), "--set epochs is given twice, as 1 and 2"),
        (("run", "digits", "--set", "batch-size=8", "--set", "batch_size=8"), "--set batch_size is given twice"),
        (("report", "table11", "--set", "threads=1", "--set", "threads=2"), "--set threads is given twice"),
        (
            ("run", "digits", "--set", "epochs=1", "--epochs", "2"),
            "--epochs 2 and --set epochs=1 are both given: leave one out",
        ),
        (
            (*AUTHORS, "--model", "resnet56", "--dataset", "cifar10", "--data-dir", "nowhere"),
            "--data-dir nowhere is not there",
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


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--method", "bisam"), "unknown method 'bisam', did you mean 'bisam_log' or 'bisam_tanh'?"),
        (("--resume",), "Unknown option: --resume. The same command resumes an interrupted run by itself"),
        (("--foo", 3), "Unknown option: --foo."),
        (("--epoch", 3), "Unknown option: --epoch. Did you mean --epochs?"),
        (("--method", "SAM(("), "'SAM((' is no expression ('(' was never closed): write it as in"),
        (("--lr", "1e300"), "learning_rate must be at most 3.4e+38"),
    ],
)
def test_a_slip_is_one_line_that_helps(given, message, bisam):
    code, _, err = bisam("train", *given)
    assert code == 2
    assert f"bisam: {message}" in " ".join(err.split())
    assert "frozen?" not in err


def test_names_of_flags_have_any_case_and_paths_keep_theirs(bisam, tmp_path):
    for given, found in (
        (("--method", "SAM", "--dataset", "CIFAR10:16", "--model", "ResNet8"), ("sam", "cifar10:16", "resnet8")),
        (("--method", "SAM(0.1)", "--dataset", "Folder:My/Images"), ("SAM(0.1)", "folder:My/Images", "convnet")),
        (("--dataset", "GLUE:CoLA", "--model", "HF:Mine/Bert"), ("bisam_log", "glue:cola", "hf:Mine/Bert")),
    ):
        assert bisam("train", *given, "--save-config", tmp_path / "a.json")[0] == 0
        saved = json.loads((tmp_path / "a.json").read_text())
        assert (saved["method"], saved["dataset"], saved["model"]) == found


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "Free space"),
        (errno.EROFS, "cannot be written there"),
        (errno.EISDIR, "Something else has its name"),
        (errno.EMFILE, "Raise the limit"),
        (errno.ETIMEDOUT, "does not answer"),
        (errno.EIO, "error. Finished runs are unchanged"),
    ],
)
def test_an_error_of_the_system_is_named_for_what_it_is(number, remedy, bisam, tmp_path, monkeypatch):
    def fails(*_, **__):
        raise OSError(number, os.strerror(number), str(tmp_path))

    monkeypatch.setattr("bisam.experiments.runs.files.make_folders", fails)
    code, _, err = bisam("train", "--save-config", tmp_path / "a.json")
    said = " ".join(err.split())
    assert code == 2
    assert remedy in said
    assert said.startswith(f"bisam: {tmp_path}: {os.strerror(number)}. ")


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_what_the_output_cannot_show_does_not_end_a_command(encoding, bisam, tmp_path, monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr("sys.stdout", out)
    folder = tmp_path / "\u2264 \udcff"  # a letter that code pages do not have, and a byte that is no UTF-8
    try:
        folder.mkdir()
    except (OSError, UnicodeError):
        folder = tmp_path
    assert bisam("train", "--save-config", folder / "a.toml")[0] == 0
    assert bisam("report", "figure1", "--out", folder)[0] == 0
    assert (folder / "figure1" / "report.md").is_file()
    assert bisam("methods")[0] == 0
    out.flush()
    assert b"bisam train --config" in out.buffer.getvalue()


def test_an_empty_variable_for_the_data_is_as_none():
    code = "from bisam.experiments.runs.machine import Machine; print(Machine().data_dir)"
    found = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "BISAM_DATA": ""}, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "data"


def test_a_place_that_cannot_be_written_is_one_line(bisam, tmp_path):
    (tmp_path / "train").write_text("")  # in the place of the folder of the runs
    code, _, err = bisam("train", "--epochs", 1, "--out", tmp_path)
    assert code == 2
    assert "Not a directory. Something else has its name: move it away" in " ".join(err.split())
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


@pytest.mark.slow
def test_a_short_digits_study_end_to_end(bisam, tmp_path):
    code, out, err = bisam("run", "digits", "--seeds", "1", "--epochs", "1", "--workers", "2", "--out", tmp_path)
    assert (code, err) == (0, "")
    assert "10/10 runs" in out
    assert len(list(tmp_path.glob("digits/*/seed-0/result.json"))) == 10
    assert (tmp_path / "digits" / "accuracy.png").stat().st_size > 10_000
    assert (tmp_path / "digits" / "flips.png").stat().st_size > 10_000


def test_a_path_is_printed_as_it_is(bisam, tmp_path):
    out = tmp_path / "a [b] :b: [/c]"
    code, said, _ = bisam("train", "--save-config", out / "a.toml")
    assert (code, said) == (0, f"{out}/a.toml: bisam train --config '{out}/a.toml'\n")
    (out / ":b:").touch()
    code, _, err = bisam("train", "--out", out / ":b:")
    assert (code, err) == (2, f"bisam: --out {out}/:b: is a file. Give a folder for the runs\n")


FAST = ("train", "--method", "sam", "--epochs", 2, "--limit", 96, "--log", "tensorboard")


def test_a_run_that_diverges_has_exit_code_1_then_and_later(bisam, tmp_path):
    for _ in range(2):
        code, out, err = bisam(*FAST, "--learning-rate", 1e30, "--out", tmp_path)
        assert code == 1
        assert "test accuracy" in out
        assert "ended early: loss is nan since epoch 1: a smaller --learning-rate or --rho" in err


@pytest.mark.parametrize(("rank", "prints"), [("0", True), ("3", False)])
def test_of_the_processes_of_several_nodes_the_main_one_prints(bisam, tmp_path, monkeypatch, rank, prints):
    bisam(*FAST, "--out", tmp_path)
    monkeypatch.setenv("RANK", rank)
    code, out, err = bisam(*FAST, "--nodes", 2, "--out", tmp_path)
    assert (code, err) == (0, "")
    assert ("test accuracy" in out) == prints
    code, _, err = bisam(*FAST, "--nodes", 2, "--rho", 2, "--log", "nonsense", "--out", tmp_path)
    assert code == 2
    assert "unknown logger 'nonsense'" in err
