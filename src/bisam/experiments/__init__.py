"""Experiments: recipes, runs, studies and reports on top of the library (extra `experiments`)."""

import sys


def main() -> None:
    """The command `bisam`; without the extra, one line that says what to install."""
    try:
        from bisam.experiments.cli import main as command
    except ModuleNotFoundError as error:
        print(f"bisam: the command needs {error.name}: pip install 'bisam[experiments]'", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    command()
