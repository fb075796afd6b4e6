"""The command line, a file a command: `bisam run`, `train`, `analyse`, `export`, `report`, `list` and others.

run, report, ...          work on a subject of `subjects.py`: a study (`study.py`) or a measurement (`measurement.py`)
study_report.py           the report of a study: tables on the terminal, and files
train                     trains one recipe
tune                      searches for the settings of a recipe
analyse                   measures finished runs, or the weights in a file
export                    writes the weights of a finished run for other programs
evaluate                  tests a trained model, of a run or in a file
predict                   writes the most probable classes of a user's files
methods                   shows the catalogue of methods
tables                    writes the page of the tables and figures of the papers
options.py, flags.py      flags that commands share, and those that are fields of a recipe
groups.py                 the headings of a command's help
completion.py             the names that the shell completes
idle.py                   refuses flags that have no effect
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import Any

from cyclopts import App, CycloptsError, MissingArgumentError, UnknownOptionError
from cyclopts.exceptions import UnknownCommandError, UnusedCliTokensError

from bisam import __version__
from bisam.experiments.cli import (
    analyse,
    archive,
    evaluate,
    export,
    list as listing,
    methods,
    plot,
    predict,
    report,
    run,
    tables,
    train,
    tune,
)
from bisam.experiments.cli.groups import epilogue
from bisam.experiments.cli.terminal import errors, escape_what_cannot_be_shown
from bisam.experiments.errors import (
    RunError,
    is_out_of_memory,
    missing_package,
    of_system,
    reason,
    show_warnings_in_one_line,
)
from bisam.experiments.runs.signals import exit_code, past_tense, terminable

app = App(
    name="bisam",
    version=__version__,
    help="Sharpness-aware training: run the studies, train one recipe, report from run folders.",
    help_epilogue="Start with:  bisam run digits",
)
app.command(run.run, help_epilogue=epilogue(run.EXAMPLES))
app.command(train.train, help_epilogue=epilogue(train.EXAMPLES))
app.command(tune.tune, help_epilogue=epilogue(tune.EXAMPLES))
app.command(analyse.analyse, help_epilogue=epilogue(analyse.EXAMPLES))
app.command(listing.list_all, name="list", help_epilogue=epilogue(listing.EXAMPLES))
app.command(methods.methods, help_epilogue=epilogue(methods.EXAMPLES))
app.command(tables.tables, help_epilogue=epilogue(tables.EXAMPLES))
app.command(report.report, help_epilogue=epilogue(report.EXAMPLES))
app.command(plot.plot, help_epilogue=epilogue(plot.EXAMPLES))
app.command(archive.archive, help_epilogue=epilogue(archive.EXAMPLES))
app.command(export.export, help_epilogue=epilogue(export.EXAMPLES))
app.command(evaluate.evaluate, help_epilogue=epilogue(evaluate.EXAMPLES))
app.command(predict.predict, help_epilogue=epilogue(predict.EXAMPLES))
app.register_install_completion_command(help="Install the completion of commands, flags and names for your shell.")


def main() -> None:
    """Entry point: a user's mistake is one line and exit code 2, Ctrl-C exit code 130, SIGTERM exit code 143."""
    show_warnings_in_one_line()
    escape_what_cannot_be_shown()
    try:
        with terminable():
            code = _called(sys.argv[1:])
    except CycloptsError as error:
        errors.print(f"bisam: {_of_parser(error)}")
        sys.exit(2)
    except (RunError, ValueError) as error:
        errors.print(f"bisam: {' '.join(str(error).split())}")
        sys.exit(2)
    except Exception as error:
        if is_out_of_memory(error):
            message = f"out of memory ({reason(error)}): finished runs are unchanged"
        elif (missing := missing_package(error)) is not None:
            message = missing
        elif isinstance(error, OSError):
            message = of_system(error)
        else:
            raise
        errors.print(f"bisam: {message}")
        sys.exit(2)
    except KeyboardInterrupt as error:
        errors.print(past_tense(error))
        sys.exit(exit_code(error))
    sys.exit(code if isinstance(code, int) else 0)


def _of_parser(error: CycloptsError) -> str:
    """The parser's message on one line, with a remedy where it has none."""
    message, command = " ".join(str(error).split()), " ".join(("bisam", *(error.command_chain or ())))
    match error:
        case UnknownOptionError():
            return _without_nonsense(error)
        case UnknownCommandError():
            return f"{message} Try bisam --help"
        case UnusedCliTokensError(unused_tokens=[first, *_]):
            return f"unexpected argument {first!r}: try {command} --help"
        case MissingArgumentError(keyword=None, argument=argument) if argument and argument.field_info.is_positional:
            return f"{command} needs {argument.name.removeprefix('--').upper()}: try {command} --help"
        case _:
            return message


def _without_nonsense(error: UnknownOptionError) -> str:
    """The parser's message, without the nearest flag if that has little in common with the given one.

    The parser counts the dashes of both among the letters that they have in common.
    """
    message = " ".join(str(error).split())
    if (error.token.keyword or error.token.value) == "--resume":
        return "Unknown option: --resume. The same command resumes an interrupted run by itself"
    head, suggestion, near = message.partition(" Did you mean --")
    given = head.rpartition("--")[2].rstrip(".")
    alike = SequenceMatcher(None, given, near.rstrip("?")).ratio() >= 0.6
    return message if alike or not suggestion else head


def _called(arguments: list[str]) -> Any:
    _refuse_empty(arguments)
    command, bound, unparsed = app.parse_args(arguments, exit_on_error=False, print_error=False)
    own: dict[str, Any] = {"given": given_flags(arguments)} if "given" in unparsed else {}
    return command(*bound.args, **bound.kwargs, **own)


def _refuse_empty(arguments: Sequence[str]) -> None:
    """Refuse an empty value, as that of a variable of the shell that is not set: a path would be the present folder.

    Raises:
        ValueError: there is one; the message names its flag.
    """
    if arguments[:1] == ["__complete"]:  # of a shell, where the last word may be empty still
        return
    for before, one in zip(("", *arguments), arguments, strict=False):
        name, equals, value = one.partition("=")
        if one and not (one.startswith("--") and equals and not value):
            continue
        what = name if one else before if before.startswith("-") else f"the argument after {before or 'bisam'}"
        raise ValueError(f"{what} is empty: give a value, or leave it out (is a variable of the shell not set?)")


def given_flags(arguments: Sequence[str]) -> frozenset[str]:
    """Names of the flags among the arguments, in one spelling: `data_dir` for `--data-dir=data`."""
    _, apps, tokens = app.parse_commands(arguments)
    known, found = apps[-1].assemble_argument_collection(parse_docstring=False), set[str]()
    for token in tokens:
        if token.startswith("--"):
            try:
                argument, *_ = known.match(token.partition("=")[0])
            except ValueError:  # a value that begins with dashes
                continue
            found.add(argument.name.removeprefix("--").replace("-", "_"))
    return frozenset(found)
