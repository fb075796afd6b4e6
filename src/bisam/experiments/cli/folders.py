"""Folders: checks of the folders of runs and of data, before anything is loaded or a process is started."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from bisam.experiments.runs.archive import is_archive

if TYPE_CHECKING:
    from bisam.experiments.recipes.recipe import Recipe
    from bisam.experiments.runs.machine import Machine


def check_out(out: Path) -> None:
    """Check that run folders can be made in a folder, before anything is loaded or a process is started.

    Raises:
        ValueError: it is an archive or another file, a file is in its path, or it cannot be written.
    """
    if is_archive(out):
        raise ValueError(
            f"--out {out} is an archive of finished runs, without checkpoints: nothing can be run in it. Give a folder"
        )
    there = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not there.is_dir():
        which = "is a file" if there == out else f"cannot be made: {there} is a file"
        raise ValueError(f"--out {out} {which}. Give a folder for the runs")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"--out {out} cannot be written: no permission for {there}. Give another folder")


def check_data_dir(recipes: Collection[Recipe], machine: Machine) -> None:
    """Check that the folder of the data sets is there, if all of `recipes` have a data set in it.

    What is in it is checked when a run loads its data: a message names the files that are missing. So is a folder, a
    model or weights of a user, which may be elsewhere.

    Raises:
        DataError: there is no data set of a recipe's name.
        ValueError: the folder is not there and nothing is downloaded, or it is a file.
    """
    from bisam.experiments.data import check_name

    for recipe in recipes:
        check_name(recipe.dataset)
    place = machine.data_dir
    if place.is_dir() or any(not recipe.needs_files or recipe.dataset.startswith("folder:") for recipe in recipes):
        return
    if place.exists():
        raise ValueError(f"--data-dir {place} is a file: give the folder that the data sets are in")
    if not machine.download:
        raise ValueError(
            f"--data-dir {place} is not there: give the folder that the data sets are in, or --download those that "
            "can be downloaded"
        )
