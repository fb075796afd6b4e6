"""`bisam archive`: the finished runs of a study in one file."""

from __future__ import annotations

from pathlib import Path

from bisam.experiments.cli.folders import check_file
from bisam.experiments.cli.options import Changes, Config, Out, StudyName, with_file
from bisam.experiments.runs.archive import SUFFIX

EXAMPLES = (
    "bisam archive digits",
    "bisam archive digits --out runs --to digits.tar.xz",
    "bisam report digits --out digits.tar.xz",
)


def archive(
    study: StudyName,
    *,
    changes: Changes = (),
    config: Config = None,
    out: Out = Path("runs"),
    to: Path | None = None,
) -> int:
    """Write the finished runs of a study to one compact file, without their checkpoints.

    `bisam report` and `bisam plot` read it in place of the folder. Its runs have no weights: they are finished, and
    cannot be resumed or analysed. Unfinished and damaged runs are left out.

    Args:
        study: Name of the study, see `bisam list`.
        changes: The same values as for `bisam run`.
        config: The same file as for `bisam run`.
        to: File to write, .tar.xz; by default STUDY.tar.xz in the folder of the runs.
    """
    from bisam.experiments.cli.subjects import subject

    chosen, to = subject(study), to or out / f"{study}{SUFFIX}"
    if not to.name.endswith(SUFFIX):
        raise ValueError(f"--to {to}: the name of an archive ends in {SUFFIX}")
    if out.is_file():
        raise ValueError(f"--out {out} is a file: give the folder that the run folders are in")
    check_file(to, f"{study}{SUFFIX}")
    return chosen.archive(with_file(config, changes), out, to)
