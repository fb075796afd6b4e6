"""Commands: what the command lines under `tests` share, and how their mistakes are tested."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, with exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def check_mistake(main: Callable[[list[str]], Any], arguments: list[str], message: str, capsys: Any) -> None:
    """Checks that `main(arguments)` prints one line with `message` and exits with code 2."""
    code = None
    try:
        main(arguments)
    except SystemExit as error:
        code = error.code
    said = capsys.readouterr().err
    assert code == 2
    assert said.count("\n") == 1
    assert message in said
