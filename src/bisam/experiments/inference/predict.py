"""Predict: the most probable classes of image files and of texts, in batches.

for found in predict_images(loaded, ["a.png", "b.jpg"], machine, top=3):
    found.where, found.classes, found.probabilities
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bisam.experiments.data.glue import TASKS, tokenised
from bisam.experiments.data.image_folders import ENDINGS
from bisam.experiments.errors import reason
from bisam.experiments.inference.images import preparation
from bisam.experiments.inference.loaded import Loaded
from bisam.experiments.models.build import tokenizer
from bisam.experiments.runs.machine import Machine
from bisam.experiments.training.epoch import outputs, prepared

TEXTS = (".txt", ".csv")
"""Ends of the names of files of texts."""


@dataclass(frozen=True)
class Predicted:
    """The most probable classes of an example.

    Attributes:
        where: the file, and for a text its line, from 1 on.
        classes: numbers, the most probable class first.
        probabilities: of these classes.
    """

    where: tuple[str, ...]
    classes: list[int]
    probabilities: list[float]


@dataclass(frozen=True)
class Unread:
    """An example that cannot be read, and why."""

    why: str


@dataclass(frozen=True)
class Text:
    """A text, or a pair of them, with its file and line, from 1 on."""

    parts: tuple[str, ...]
    file: str
    line: int


def takes_texts(loaded: Loaded) -> bool:
    """Whether a model takes texts, and not images."""
    return loaded.recipe.dataset.startswith("glue:")


def image_files(places: Iterable[Path]) -> list[Path]:
    """Return files, and the images in folders and below them in the order of their names.

    Raises:
        ValueError: a place does not exist, or a folder has no images.
    """
    found: list[Path] = []
    for place in places:
        if not place.exists():
            raise ValueError(f"{place} does not exist: give image files, or folders of them")
        if not place.is_dir():
            found.append(place)
            continue
        inside = sorted(
            Path(folder, file)
            for folder, _, files in os.walk(place, followlinks=True)
            for file in files
            if file.lower().endswith(ENDINGS) and not file.startswith(".")
        )
        if not inside:
            raise ValueError(f"{place} has no images ({', '.join(ENDINGS)})")
        found += inside
    return found


def texts_in(place: Path, task: str, columns: Sequence[str]) -> list[Text | Unread]:
    """Return the texts in a file: the lines of a .txt, or the rows of columns of a .csv.

    Args:
        place: the file. Empty lines of a .txt are left out; the two texts of a pair are separated by a tab.
        task: of GLUE, of which the model is: some have pairs of texts.
        columns: of a .csv; by default the names of the task's own columns.

    Raises:
        ValueError: the file cannot be read, is no such file, or has no such columns.
    """
    names = TASKS[task].texts
    if place.suffix.lower() not in TEXTS:
        raise ValueError(f"{place}: the model takes texts: give a .txt with a text in each line, or a .csv")
    if columns and len(columns) != len(names):
        raise ValueError(f"--column is given {len(columns)} times, and {task} has {len(names)} texts: {_pairs(names)}")
    if columns and place.suffix.lower() == ".txt":
        raise ValueError(f"{place} has lines and no columns: leave --column out")
    try:
        with open(place, encoding="utf-8-sig", newline="") as file:
            if place.suffix.lower() == ".csv":
                return _rows(place, csv.DictReader(file), tuple(columns) or names)
            lines = file.read().splitlines()
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{place} cannot be read ({reason(error)})") from error
    return [_of_line(place, number, line, names) for number, line in enumerate(lines, 1) if line.strip()]


def predict_images(loaded: Loaded, paths: Sequence[Path], machine: Machine, top: int) -> Iterator[Predicted | Unread]:
    """Yield the classes of image files in their order; those of a batch that cannot be read come after it.

    The images are prepared as the test images of the run: resized, and standardised with the same statistics.

    Args:
        loaded: the model.
        paths: image files.
        machine: device, folder of the data, processes that decode images.
        top: number of classes of each.

    Raises:
        ValueError: the data of the run cannot be loaded, whose statistics its images have.
    """
    recipe, fabric = loaded.recipe, machine.fabric(loaded.recipe.precision)
    how = preparation(recipe, machine)
    model, split = loaded.on(fabric), how.files(paths, processes=machine.loaders).to(fabric.device)
    with torch.inference_mode(), fabric.autocast():
        for numbers, images, messages in split.readable(recipe.batch_size):
            if len(numbers):
                logits = model(prepared(how.enlarged(images), recipe))
                yield from _predicted(logits, [(str(paths[i]),) for i in numbers.tolist()], top)
            yield from map(Unread, messages)


def predict_texts(loaded: Loaded, texts: Sequence[Text], machine: Machine, top: int) -> Iterator[Predicted]:
    """Yield the classes of texts in their order; see `predict_images`.

    Raises:
        ValueError: the tokenizer cannot be loaded.
    """
    recipe, fabric = loaded.recipe, machine.fabric(loaded.recipe.precision)
    words = tokenizer(recipe.model, machine.data_dir)
    split = tokenised(list(zip(*(text.parts for text in texts), strict=True)), words, recipe.max_length)
    model, place = loaded.on(fabric), 0
    with torch.inference_mode(), fabric.autocast():
        for _, logits, labels in outputs(model, split.to(fabric.device), recipe):
            part = texts[place : place + len(labels)]
            yield from _predicted(logits, [(text.file, str(text.line)) for text in part], top)
            place += len(labels)


def _predicted(logits: Tensor, where: Sequence[tuple[str, ...]], top: int) -> Iterator[Predicted]:
    found = logits.float().softmax(1).topk(top, 1)
    for place, classes, values in zip(where, found.indices.tolist(), found.values.tolist(), strict=True):
        yield Predicted(place, classes, values)


def _of_line(place: Path, number: int, line: str, names: Sequence[str]) -> Text | Unread:
    parts = tuple(line.split("\t")) if len(names) > 1 else (line,)
    if len(parts) != len(names):
        return Unread(f"{place}, line {number}: {len(parts)} texts, and the model takes {_pairs(names)}")
    return Text(parts, str(place), number)


def _rows(place: Path, rows: csv.DictReader[Any], columns: Sequence[str]) -> list[Text | Unread]:
    known = list(rows.fieldnames or ())
    if missing := [name for name in columns if name not in known]:
        raise ValueError(
            f"{place} has no column {', '.join(missing)}: name the text's with --column, one of {', '.join(known)}"
        )
    found: list[Text | Unread] = []
    for row in rows:
        parts = tuple(row[name] for name in columns)
        line = rows.line_num
        found.append(
            Unread(f"{place}, line {line}: it has fewer columns than the first line")
            if None in parts
            else Text(parts, str(place), line)
        )
    return found


def _pairs(names: Sequence[str]) -> str:
    return f"{' and '.join(names)}, separated by a tab" if len(names) > 1 else names[0]
