"""Folders: checks of the folders of runs and of data, before anything is loaded or a process is started."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
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
    check_folder(out, "--out", "Give a folder for the runs")


def check_folder(folder: Path, flag: str = "--to", remedy: str = "Give a folder") -> None:
    """Check that files can be written to a folder, which need not exist, before anything is computed for them.

    Args:
        folder: what the user named.
        flag: with which the user named it, for the message.
        remedy: for the same message.

    Raises:
        ValueError: a file is there or in its path, or it cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{flag} {folder} is a file. {remedy}")
    _check_place((folder, *folder.absolute().parents), f"{flag} {folder}", remedy)


def check_file(file: Path, example: str, flag: str = "--to") -> None:
    """Check that a file can be written, before anything is computed for it; one that is there may be replaced.

    Args:
        file: what the user named.
        example: name of such a file, for the message.
        flag: with which the user named it, for the same message.

    Raises:
        ValueError: it is a folder, a file is in its path, or its folder cannot be written.
    """
    if file.is_dir():
        raise ValueError(f"{flag} {file} is a folder: give a file, such as {file / example}")
    _check_place(file.absolute().parents, f"{flag} {file}", "Give another place")


def _check_place(folders: Iterable[Path], said: str, remedy: str) -> None:
    """Check that the first of these folders that exists is one, and can be written."""
    there = next(path for path in folders if path.exists())
    if not there.is_dir():
        raise ValueError(f"{said} cannot be made: {there} is a file. {remedy}")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{said} cannot be written: no permission for {there}. {remedy}")


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
