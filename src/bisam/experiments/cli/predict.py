"""`bisam predict`: the most probable classes of image files or texts, as CSV."""

from __future__ import annotations

import csv
import io
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from bisam.experiments.cli.flags import Whole
from bisam.experiments.cli.folders import check_file
from bisam.experiments.cli.groups import MACHINE
from bisam.experiments.cli.options import DatasetName, DeviceFlags, ModelName, Quiet
from bisam.experiments.cli.progress import MeasuringDisplay
from bisam.experiments.cli.terminal import console, errors
from bisam.experiments.errors import DataError
from bisam.experiments.runs.files import write

if TYPE_CHECKING:
    from bisam.experiments.inference.loaded import Loaded
    from bisam.experiments.inference.predict import Predicted, Text, Unread

EXAMPLES = (
    "bisam predict RUN photo.jpg photos --top 3 --to out.csv",
    "bisam predict RUN sentences.txt",
    "bisam predict RUN reviews.csv --column review",
)


def predict(
    model_or_run: Annotated[str, Parameter(name="RUN")],
    files: Annotated[tuple[Path, ...], Parameter(name="FILES", negative="")],
    /,
    *,
    top: Whole = 1,
    column: Annotated[tuple[str, ...], Parameter(negative="")] = (),
    to: Path | None = None,
    which: str | None = None,
    model: ModelName | None = None,
    dataset: DatasetName | None = None,
    config: Path | None = None,
    where: Annotated[DeviceFlags, Parameter(name="*", group=MACHINE)] = DeviceFlags(),  # noqa: B008
    quiet: Quiet = False,
) -> int:
    """Write the most probable classes of images or texts as CSV: file, (line of the file,) label, probability.

    Images are prepared as the test images of the run. A file that cannot be read is named, the others are predicted,
    and the exit code is 1.

    Args:
        model_or_run: Folder of a finished run, a folder that bisam export wrote, or a file of weights.
        files: Image files, or folders of them; for a model of texts .txt files with a text in each line (two, with a
            tab between them, for a task of pairs), or .csv files.
        top: Number of classes of each; those after the first one are label_2, probability_2, ...
        column: Column of a .csv with the texts; twice for pairs. By default the name of GLUE's own.
        to: CSV file to write, by default the standard output.
        which: Weights of a run: best, last or ema; by default those whose test score reports show.
        model: Model of a file of weights, see `bisam list`; files of bisam export but .pt have it inside.
        dataset: Data set of a file of weights, whose images are prepared in the same way, and whose classes have names.
        config: Recipe of a file of weights, TOML or JSON.
    """
    from bisam.experiments.data import has_tokens
    from bisam.experiments.inference.loaded import load
    from bisam.experiments.inference.predict import image_files, predict_images, predict_texts, takes_texts
    from bisam.experiments.recipes.config import read

    if not files:
        raise ValueError("nothing to predict: give image files, folders of them, or files of texts")
    if to is not None:
        check_file(to, "out.csv")
    machine = where.machine()  # fails here if the device is missing
    loaded = load(model_or_run, where.data_dir, which, model, dataset, None if config is None else read(config))
    if has_tokens(loaded.recipe.dataset):
        raise ValueError(
            f"{model_or_run} predicts the next token, and this command classifies images and texts: its scores on the "
            "test set are in result.json"
        )
    if not 1 <= top <= loaded.classes:
        raise ValueError(f"--top must be from 1 to {loaded.classes}, the classes of the model, got {top}")
    if takes_texts(loaded):
        texts, unread = _texts(files, loaded, column)
        total, unit, places = len(texts), "texts", ("file", "line")
        found: Iterator[Predicted | Unread] = predict_texts(loaded, texts, machine, top) if texts else iter(())
    else:
        if column:
            raise ValueError("--column is one of a file of texts, and the model takes images: leave it out")
        paths, unread = image_files(files), list[str]()
        total, unit, places = len(paths), "images", ("file",)
        found = predict_images(loaded, paths, machine, top)
    for why in unread:
        errors.print(f"bisam: {why}")
    names = _names(loaded, where.data_dir)
    try:
        table = _Table(places, top, names, None if to is None else io.StringIO())
        with MeasuringDisplay(1, unit, quiet=quiet or to is None) as display:
            display.run()
            for done, one in enumerate(found, 1):
                if why := table.add(one):
                    unread.append(why)
                    errors.print(f"bisam: {why}")
                display.measure(unit, done, total)
        table.flush()
    except BrokenPipeError:  # the reader of the output has enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    if to is not None:
        write(to, table.text)
        more = f", {len(unread)} could not be read" if unread else ""
        console.print(f"{to}: {table.rows:,} {unit}{more}", soft_wrap=True, highlight=False)
    return 1 if unread else 0


class _Table:
    """The rows of the CSV, written at once to the standard output, or kept."""

    def __init__(self, places: Sequence[str], top: int, names: Sequence[str], kept: io.StringIO | None) -> None:
        self._names, self._kept, self._out, self.rows = names, kept, kept or sys.stdout, 0
        self._writer = csv.writer(self._out, lineterminator="\n")
        ends = ["", *(f"_{place}" for place in range(2, top + 1))]
        self._writer.writerow([*places, *(f"{name}{end}" for end in ends for name in ("label", "probability"))])

    def add(self, one: Predicted | Unread) -> str | None:
        """Write a row, or return why there is none."""
        from bisam.experiments.inference.predict import Unread

        if isinstance(one, Unread):
            return one.why
        ranks = zip(one.classes, one.probabilities, strict=True)
        self._writer.writerow([*one.where, *(cell for k, p in ranks for cell in (self._label(k), f"{p:.6f}"))])
        self.rows += 1
        return None

    def flush(self) -> None:
        self._out.flush()

    @property
    def text(self) -> str:
        """The whole CSV, if it was kept."""
        return "" if self._kept is None else self._kept.getvalue()

    def _label(self, number: int) -> str:
        return self._names[number] if number < len(self._names) else str(number)


def _texts(files: Iterable[Path], loaded: Loaded, columns: Sequence[str]) -> tuple[list[Text], list[str]]:
    """The texts of all files, and why others cannot be read."""
    from bisam.experiments.inference.predict import Text, texts_in

    task = loaded.recipe.dataset.partition(":")[2]
    parts = [part for file in files for part in texts_in(file, task, columns)]
    return [part for part in parts if isinstance(part, Text)], [p.why for p in parts if not isinstance(p, Text)]


def _names(loaded: Loaded, root: Path) -> list[str]:
    """Names of the classes; [] and a line where they are not known."""
    from bisam.experiments.data import names_of

    try:
        names = names_of(loaded.recipe.dataset, root)
    except DataError as error:
        errors.print(f"bisam: labels are numbers of classes: {error}")
        return []
    return names if len(names) == loaded.classes else []
