"""The command starts at once: what reads no data and trains nothing imports no torch; Ctrl-C ends it in one line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

pytest.importorskip("cyclopts")

SLOW = ("torch", "lightning_fabric", "torchvision", "numpy", "matplotlib", "optuna")
COMMANDS = (
    "run",
    "train",
    "analyse",
    "list",
    "methods",
    "tables",
    "report",
    "plot",
    "archive",
    "export",
    "evaluate",
    "predict",
    "tune",
)

LOADED = f"""
import atexit, sys
atexit.register(lambda: print("loaded:", *[name for name in {SLOW!r} if name in sys.modules]))
from bisam.experiments import main
for arguments in {{calls!r}}:
    sys.argv = ["bisam", *arguments]
    try:
        main()
    except SystemExit as end:
        print("code:", end.code)
"""


def loaded(*calls: tuple[str, ...]) -> tuple[list[str], str, str]:
    """Exit codes of the calls, one after another in a new process; the slow packages that it imported; its errors."""
    done = subprocess.run(
        [sys.executable, "-c", LOADED.format(calls=calls)], capture_output=True, text=True, timeout=120, check=True
    )
    lines = done.stdout.splitlines()
    codes = [line.removeprefix("code: ") for line in lines if line.startswith("code: ")]
    return codes, lines[-1].removeprefix("loaded:").strip(), done.stderr


def test_version_and_help_of_every_command_import_no_torch():
    calls = [("--version",), ("--help",), *((name, "--help") for name in COMMANDS)]
    codes, slow, _ = loaded(*calls)
    assert (codes, slow) == (["0"] * len(calls), "")


def test_the_list_imports_no_torch():
    assert loaded(("list",)) == (["0"], "", "")


def test_the_commands_above_are_all():
    from bisam.experiments.cli import app

    assert {name for name in app if not name.startswith("-")} == set(COMMANDS)


def test_a_misspelt_command_or_flag_imports_no_torch():
    calls = [("trian",), *((name, "--bogus", "1") for name in COMMANDS), ("train", "--epochs", "1.5"), ("run",)]
    codes, slow, errors = loaded(*calls)
    assert (codes, slow) == (["2"] * len(calls), "")
    assert len(errors.splitlines()) == len(calls)
    assert 'Did you mean "train"?' in errors


def test_a_command_that_needs_torch_is_seen_to_import_it():
    """Else the tests above could not fail."""
    codes, slow, _ = loaded(("methods",))
    assert codes == ["0"]
    assert "torch" in slow.split()


def test_the_package_is_the_command():
    def says(*program: str) -> str:
        return subprocess.run([sys.executable, *program], capture_output=True, text=True, check=True).stdout

    import bisam

    assert says("-m", "bisam", "--version").strip() == bisam.__version__


INTERRUPTED = """
import builtins, os, signal, sys
usual = builtins.__import__
def imported(name, *rest):
    if name == {name!r}:
        builtins.__import__ = usual
        {how}
    return usual(name, *rest)
builtins.__import__ = imported
from bisam.experiments import main
sys.argv = ["bisam", *{arguments!r}]
{call}
"""
KILL = "os.kill(os.getpid(), signal.SIGINT)"


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize(
    ("name", "how", "call"),
    [
        ("cyclopts", KILL, "main()"),
        # Code that catches all exceptions, as some packages do around their imports, cannot lose it.
        ("cyclopts", f"\n        try:\n            {KILL}\n        except BaseException:\n            pass", "main()"),
        ("torch", KILL, "main()"),
        ("torch", f"exec({KILL!r})", "main()"),  # CPython would end with the signal
        ("nothing", "pass", f"try:\n    main()\nfinally:\n    {KILL}"),  # while the interpreter ends
    ],
    ids=["parser", "parser-caught", "torch", "torch-exec", "end"],
)
def test_ctrl_c_is_one_line_and_exit_code_130(name, how, call):
    code = INTERRUPTED.format(name=name, how=how, call=call, arguments=["methods"])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert (done.returncode, done.stderr) == (130, "interrupted\n")
