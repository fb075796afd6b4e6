"""GLUE: sentences and pairs of sentences, tokenised once and padded in each batch, from files or from the hub.

data = glue("rte", Path("data"), AutoTokenizer.from_pretrained("bert-base-uncased"), seed=0)
for inputs, y in data.train.batches(32, generator):
    model(**inputs)
"""

from __future__ import annotations

import glob as patterns
import os
import tempfile
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from bisam.experiments.data.splits import Data, drawn, shares, without_index
from bisam.experiments.errors import reason, unknown
from bisam.experiments.models.logits import HIDDEN

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CPU = torch.device("cpu")


@dataclass(frozen=True, eq=False)
class Texts:
    """A split of tokenised texts and their labels (N,).

    Attributes:
        tokens: input_ids, and token_type_ids if the tokenizer returns them, of all texts concatenated: Python lists
            would take ten times the memory.
        ends: start of each text in the tokens, and the end of the last (N + 1,).
        labels: classes.
        tokenizer: pads the batches, on its own padding side.
        device: of the batches.
        bucket: batches in a bucket of texts that are sorted by length, see `shares`.
        states: what the batches contain in place of tokens: a state of each token (T, width), which the frozen layers
            of a model return. They are padded with zeros on the right.
    """

    tokens: Mapping[str, np.ndarray]
    ends: np.ndarray
    labels: Tensor
    tokenizer: PreTrainedTokenizerBase
    device: torch.device = _CPU
    bucket: int = 1
    states: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> Tensor:
        """Tokens of each text (N,)."""
        return torch.from_numpy(np.diff(self.ends))

    @property
    def statistics(self) -> None:
        """None: texts are no images."""
        return None

    def to(self, device: torch.device) -> Texts:
        """Return the split with its batches on `device`."""
        return replace(self, device=device)

    def first(self, count: int) -> Texts:
        """Return the first `count` examples."""
        return replace(self, ends=self.ends[: count + 1], labels=self.labels[:count])

    def chosen(self, index: Tensor) -> Texts:
        """Return the examples with these numbers (n,), in this order."""
        texts = [slice(*self.ends[i : i + 2]) for i in index.tolist()]
        tokens = {name: np.concatenate([flat[text] for text in texts]) for name, flat in self.tokens.items()}
        states = None if self.states is None else np.concatenate([self.states[text] for text in texts])
        ends = np.cumsum([0, *(text.stop - text.start for text in texts)])
        return replace(self, tokens=tokens, ends=ends, labels=self.labels[index], states=states)

    def by_length(self) -> Texts:
        """Return the same examples, the shortest first: batches that are read in order have little padding."""
        return self.chosen(self.lengths.argsort(stable=True))

    def relabelled(self, labels: Tensor) -> Texts:
        """Return the split with other labels (N,)."""
        return replace(self, labels=labels)

    def unaugmented(self) -> Texts:
        """Return the split itself: texts are not augmented."""
        return self

    def batches(
        self, size: int, generator: torch.Generator | None = None, rank: int = 0, ranks: int = 1
    ) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Return an iterator over keyword arguments of a Hugging Face model, each (n, length), and labels (n,).

        The length is that of the longest text in the batch. If there are `states`, they are in place of tokens,
        (n, length, width). See `Split.batches`.
        """
        return without_index(self.indexed(size, generator, rank, ranks))

    def indexed(
        self, size: int, generator: torch.Generator | None = None, rank: int = 0, ranks: int = 1
    ) -> Iterator[tuple[Tensor, dict[str, Tensor], Tensor]]:
        """Yield numbers (n,), and what `batches` yields; see `Split.indexed`."""
        lengths = self.lengths
        for index in shares(len(self), size, generator, rank, ranks, lengths, self.bucket):
            texts = [slice(*self.ends[i : i + 2]) for i in index.tolist()]
            padded = self._tokens(texts) if self.states is None else _padded(self.states, texts, lengths[index])
            inputs = {name: tensor.to(self.device) for name, tensor in padded.items()}
            yield index, inputs, self.labels[index].to(self.device)

    def _tokens(self, texts: Sequence[slice]) -> Mapping[str, Tensor]:
        rows = {name: [flat[text].tolist() for text in texts] for name, flat in self.tokens.items()}
        return self.tokenizer.pad(rows, return_attention_mask=True, return_tensors="pt")


def _padded(states: np.ndarray, texts: Sequence[slice], lengths: Tensor) -> dict[str, Tensor]:
    rows = pad_sequence([torch.from_numpy(states[text]) for text in texts], batch_first=True)
    return {HIDDEN: rows, "attention_mask": (torch.arange(rows.shape[1]) < lengths[:, None]).long()}


@dataclass(frozen=True)
class Task:
    """A task of GLUE: its layout in the files of the official download and on the hub, and its metrics."""

    folder: str
    """Folder in the official download."""
    texts: tuple[str, ...]
    """Columns of the sentences on the hub."""
    columns: tuple[str, ...] = ()
    """Columns of the sentences in the files, if they differ from those on the hub."""
    label: str = "label"
    """Column of the label in the files."""
    labels: tuple[str, ...] = ("0", "1")
    """Labels in the files, by class."""
    headless: tuple[str, ...] = ()
    """Columns of files without a header."""
    files: tuple[tuple[str, str], ...] = (("train.tsv", "dev.tsv"),)
    """Names of the training and the test file; of several pairs, the first that exists is used."""
    test: str = "validation"
    """Name of the test split on the hub."""
    metrics: tuple[str, ...] = ("accuracy",)
    """Metrics; the first selects the best epoch."""
    cut: int = 0
    """Maximal number of truncated lines in the official file; they are skipped, as on the hub."""


_SENTENCES, _ENTAILS = ("sentence1", "sentence2"), ("entailment", "not_entailment")
TASKS = {
    "cola": Task("CoLA", ("sentence",), headless=("source", "label", "mark", "sentence"), metrics=("matthews",)),
    "sst2": Task("SST-2", ("sentence",), headless=("sentence", "label")),
    "mrpc": Task(
        "MRPC",
        _SENTENCES,
        columns=("#1 String", "#2 String"),
        label="Quality",
        files=(("train.tsv", "dev.tsv"), ("msr_paraphrase_train.txt", "msr_paraphrase_test.txt")),
        metrics=("f1", "accuracy"),
    ),
    "qqp": Task("QQP", ("question1", "question2"), label="is_duplicate", metrics=("f1", "accuracy"), cut=10),
    "mnli": Task(
        "MNLI",
        ("premise", "hypothesis"),
        columns=_SENTENCES,
        label="gold_label",
        labels=("entailment", "neutral", "contradiction"),
        files=(("train.tsv", "dev_matched.tsv"),),
        test="validation_matched",
    ),
    "qnli": Task("QNLI", ("question", "sentence"), labels=_ENTAILS),
    "rte": Task("RTE", _SENTENCES, labels=_ENTAILS),
    "wnli": Task("WNLI", _SENTENCES),
}
"""The classification tasks of GLUE, by name: all but STS-B. The only list of them."""


def glue(
    task: str,
    root: Path,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    max_length: int = 128,
    download: bool = False,
    held_out: float | None = None,
) -> Data:
    """Load a task of GLUE (Wang et al., 2019, https://arxiv.org/abs/1804.07461).

    The test split is the official development set (for MNLI the matched one), because the official test labels are not
    published. 10 % of the official training set are held out for validation.

    Args:
        task: a key of `TASKS`.
        root: folder with the official download in `glue/CoLA`, `glue/MRPC`, ...; downloads from the hub are kept in
            `glue/hub`.
        tokenizer: the tokenizer of the model.
        seed: draws the held-out texts.
        max_length: tokens of a text or a pair, including special tokens; longer ones are truncated.
        download: whether to download missing data from the hub, https://huggingface.co/datasets/nyu-mll/glue.
        held_out: share of the training set that is held out for validation, by default 10 %. 0: none; then the
            validation split is the training set.

    Raises:
        ValueError: the task is unknown, its data is missing or damaged, or the tokenizer has no padding token.
    """
    if task not in TASKS:
        raise unknown("GLUE task", task, TASKS)
    one = TASKS[task]
    special = tokenizer.num_special_tokens_to_add(pair=len(one.texts) == 2)
    if max_length < special + len(one.texts):
        raise ValueError(f"max_length must be at least {special + len(one.texts)} for {task}, got {max_length}")
    if tokenizer.pad_token_id is None:
        raise ValueError(f"{type(tokenizer).__name__} has no token to pad with: set tokenizer.pad_token")
    place = root / "glue" / one.folder
    training, test = _local(place, one) if place.is_dir() else _from_hub(task, root, download)
    n = len(training.labels)
    order = drawn(n, seed).numpy()
    held = n // 10 if held_out is None else round(held_out * n)
    if not held and held_out != 0:
        raise ValueError(f"of the {n} texts of {task} none is held out: give a larger --held-out, or 0 to train all")
    parts = (training.of(order[held:]), training.of(order[: held or n]), test)
    return Data(
        *(_tokenised(part, tokenizer, max_length) for part in parts), classes=len(one.labels), metrics=one.metrics
    )


@dataclass(frozen=True)
class _Table:
    """Columns of sentences, and their labels."""

    texts: list[list[str]]
    labels: np.ndarray = field(repr=False)

    def of(self, rows: np.ndarray) -> _Table:
        return _Table([[column[i] for i in rows] for column in self.texts], self.labels[rows])


def tokenised(columns: Sequence[Sequence[str]], tokenizer: Any, max_length: int = 128) -> Texts:
    """Return texts of a user, with labels 0.

    Args:
        columns: the texts; for a task of pairs two columns of equal length.
        tokenizer: the tokenizer of the model.
        max_length: see `glue`.
    """
    labels = np.zeros(len(columns[0]), np.int64)
    return _tokenised(_Table([list(column) for column in columns], labels), tokenizer, max_length)


def _tokenised(table: _Table, tokenizer: Any, max_length: int, at_once: int = 1000) -> Texts:
    flat: dict[str, list[np.ndarray]] = {}
    lengths: list[int] = []
    for start in range(0, len(table.labels), at_once):
        sentences = [column[start : start + at_once] for column in table.texts]
        rows = tokenizer(*sentences, truncation=True, max_length=max_length, return_attention_mask=False)
        for name, values in rows.items():
            flat.setdefault(name, []).append(np.fromiter(chain.from_iterable(values), np.int32))
        lengths += map(len, rows["input_ids"])
    tokens = {name: np.concatenate(chunks) for name, chunks in flat.items()}
    return Texts(tokens, np.cumsum([0, *lengths]), torch.from_numpy(table.labels), tokenizer)


def _local(place: Path, task: Task) -> tuple[_Table, _Table]:
    """Read the training and the test split from the files of the official download."""
    for pair in task.files:
        if all((place / name).is_file() for name in pair):
            with tempfile.TemporaryDirectory() as cache:  # not the user's cache: the files are small
                train, test = (_read(place / name, task, cache) for name in pair)
            return train, test
    names = ", or ".join(" and ".join(pair) for pair in task.files)
    raise ValueError(f"{place} has no {names}: put them there, or delete the folder and give --download")


def _read(path: Path, task: Task, cache: str) -> _Table:
    datasets = _datasets()
    names, header, lines = _lines(path, task)
    sentences = task.columns or task.texts
    wanted = (*sentences, task.label)
    with _no_bars(datasets):
        try:
            rows = datasets.Dataset.from_csv(
                patterns.escape(str(path)),
                features=datasets.Features({name: datasets.Value("string") for name in names if name in wanted}),
                cache_dir=cache,
                keep_in_memory=True,
                delimiter="\t",
                quoting=3,  # a quotation mark is a character like any other
                header=header,
                names=names,
                usecols=wanted,
                na_filter=False,  # the text "null" is not a missing value
                skip_blank_lines=False,
                encoding="utf-8-sig",
            )[:]
        except Exception as error:  # pandas, pyarrow and datasets each have their own types
            raise ValueError(f"{path} cannot be read ({reason(error)}): replace it") from error
    first = 1 if header is None else 2
    kept = {name: [rows[name][line - first] for line in lines] for name in wanted}
    classes = {name: i for i, name in enumerate(task.labels)}
    for line, label in zip(lines, kept[task.label], strict=True):
        if label not in classes:
            raise ValueError(f"{path}, line {line}: label {label!r} is not one of {', '.join(classes)}: fix the line")
    labels = np.array([classes[label] for label in kept[task.label]], np.int64)
    return _Table([kept[name] for name in sentences], labels)


def _lines(path: Path, task: Task) -> tuple[list[str], int | None, list[int]]:
    """Return the columns of a file, the line of its header or None, and the numbers of the lines with an example.

    Raises:
        ValueError: a column is missing, or a line has another number of columns.
    """
    wanted = (*(task.columns or task.texts), task.label)
    good, cut = list[int](), list[tuple[int, int]]()
    try:
        with open(path, encoding="utf-8-sig") as file:
            names = file.readline().rstrip("\n").split("\t")
            header = 0 if set(wanted) <= set(names) else None
            if header is None:
                missing = ", ".join(name for name in wanted if name not in names)
                if len(names) != len(task.headless):
                    raise ValueError(f"{path}, line 1: no column {missing}: use the file of GLUE's official download")
                names = list(task.headless)
                file.seek(0)
            for number, line in enumerate(file, 1 if header is None else 2):
                fields = line.count("\t") + 1
                if fields == len(names):
                    good.append(number)
                elif line.strip(" \n"):
                    cut.append((number, fields))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({reason(error)}): replace it") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({reason(error)}): replace it") from error
    for number, fields in cut:
        if fields > len(names) or len(cut) > task.cut:
            raise ValueError(f"{path}, line {number}: {fields} fields instead of {len(names)}: fix the line")
    if not good:
        raise ValueError(f"{path} has no examples: replace it")
    return names, header, good


def _from_hub(task: str, root: Path, download: bool) -> tuple[_Table, _Table]:
    """Load the training and the test split, downloaded once and kept."""
    datasets = _datasets()
    one, place = TASKS[task], root / "glue" / "hub" / task
    local = f"{' and '.join(one.files[0])} of https://gluebenchmark.com/tasks into {root / 'glue' / one.folder}"
    if not place.is_dir():
        if not download:
            raise ValueError(
                f"GLUE's {task} is missing: give --download, or put {local} "
                "(or set --data-dir to the folder that contains glue)"
            )
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(place.parent / f".{task}.lock"):  # only one of the processes of a study downloads it
                if not place.is_dir():
                    whole = datasets.load_dataset("nyu-mll/glue", task)
                    with tempfile.TemporaryDirectory(dir=place.parent) as unfinished:
                        whole.save_to_disk(os.path.join(unfinished, task))
                        os.rename(os.path.join(unfinished, task), place)
        except Exception as error:  # the hub, its cache and the disk each have their own types
            raise ValueError(
                f"GLUE's {task} could not be downloaded ({reason(error)}): put {local} yourself"
            ) from error
    try:
        kept = datasets.load_from_disk(str(place))
        train, test = (_of_hub(f"{place}, {part}", kept[part][:], one) for part in ("train", one.test))
    except (OSError, LookupError) as error:
        raise ValueError(f"{place} is damaged ({reason(error)}): delete it and give --download") from error
    return train, test


def _of_hub(where: str, rows: dict[str, Sequence[Any]], task: Task) -> _Table:
    labels = np.array(rows["label"], np.int64)
    wrong = np.flatnonzero((labels < 0) | (labels >= len(task.labels)))
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(
            f"{where}, row {row}: label {labels[row]} is outside 0 to {len(task.labels) - 1}: download it again"
        )
    return _Table([list(rows[name]) for name in task.texts], labels)


@contextmanager
def _no_bars(datasets: Any) -> Generator[None]:
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"GLUE needs the package {error.name}: pip install 'bisam[experiments]'") from error
    return datasets
