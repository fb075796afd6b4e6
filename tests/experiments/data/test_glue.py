"""GLUE from files and from what the hub gave: every task's layout, and one line for what is wrong with it."""

from __future__ import annotations

import builtins
from pathlib import Path

import pytest
import torch

from bisam.experiments.data.glue import TASKS, glue

datasets = pytest.importorskip("datasets")
transformers = pytest.importorskip("transformers")

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "a", "of", "to", "in", "is", "he", "she", "it", "was"]
WORDS += ["not", "and", "said", ".", ",", "'", "null", *"bcdefg"]
N = 20  # examples that the tests write


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    return transformers.BertTokenizerFast.from_pretrained(folder)


def sentence(i: int) -> str:
    return " ".join(WORDS[5 + (i + j) % (len(WORDS) - 5)] for j in range(1 + i % 5))


def rows(task: str, n: int = N) -> list[list[str]]:
    """Lines of the classic download, the names of the columns first where they are."""
    a, b, label = sentence, (lambda i: sentence(i + 3)), (lambda i: TASKS[task].labels[i % len(TASKS[task].labels)])
    columns = {
        "cola": (None, lambda i: ["gj04", label(i), "", a(i)]),
        "sst2": ("sentence label", lambda i: [a(i), label(i)]),
        "mrpc": ("Quality/#1 ID/#2 ID/#1 String/#2 String", lambda i: [label(i), str(i), str(i), a(i), b(i)]),
        "qqp": ("id qid1 qid2 question1 question2 is_duplicate", lambda i: ["1", "2", "3", a(i), b(i), label(i)]),
        "mnli": (
            "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse sentence1_parse sentence2_parse "
            "sentence1 sentence2 label1 gold_label",
            lambda i: [str(i), "1", "2", "fiction", "( x )", "( y )", "(S x)", "(S y)", a(i), b(i), "?", label(i)],
        ),
        "qnli": ("index question sentence label", lambda i: [str(i), a(i), b(i), label(i)]),
        "rte": ("index sentence1 sentence2 label", lambda i: [str(i), a(i), b(i), label(i)]),
        "wnli": ("index sentence1 sentence2 label", lambda i: [str(i), a(i), b(i), label(i)]),
    }
    header, row = columns[task]
    names = [] if header is None else [header.split("/" if "/" in header else " ")]
    return [*names, *(row(i) for i in range(n))]


def write(path: Path, lines: list[list[str]], end: str = "\n", **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join("\t".join(line) + end for line in lines), newline="", **options)
    return path


def classic(root: Path, task: str) -> Path:
    """The folder of a task."""
    one = TASKS[task]
    for name in one.files[0]:
        write(root / "glue" / one.folder / name, rows(task))
    return root / "glue" / one.folder


def whole(batches) -> list[tuple[tuple[int, ...], ...]]:
    """Each example without its padding, and its label."""
    return [
        (tuple(ids[mask.bool()].tolist()), tuple(types[mask.bool()].tolist()), label)
        for x, y in batches
        for ids, mask, types, label in zip(
            x["input_ids"], x["attention_mask"], x["token_type_ids"], y.tolist(), strict=True
        )
    ]


def encoded(tokenizer, i: int, pair: bool, label: int) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    row = tokenizer(sentence(i), *([sentence(i + 3)] if pair else []))
    return tuple(row["input_ids"]), tuple(row["token_type_ids"]), label


def seeded(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("task", TASKS)
def test_each_task_in_the_files_of_the_classic_download(tmp_path, tokenizer, task):
    classic(tmp_path, task)
    data = glue(task, tmp_path, tokenizer, 0)
    one = TASKS[task]
    pair = len(one.texts) == 2
    assert (len(data.train), len(data.validation), len(data.test)) == (N - 2, 2, N)
    assert data.classes == len(one.labels) == (3 if task == "mnli" else 2)
    written = [encoded(tokenizer, i, pair, i % data.classes) for i in range(N)]
    assert whole(data.test.batches(3)) == written
    assert sorted(whole(data.train.batches(3)) + whole(data.validation.batches(3))) == sorted(written)
    assert data.train.labels.dtype == torch.int64


@pytest.mark.parametrize("task", TASKS)
def test_each_task_of_the_hub_is_fetched_once(tmp_path, tokenizer, task, monkeypatch):
    one = TASKS[task]
    classes = datasets.Features(
        {name: datasets.Value("string") for name in one.texts} | {"label": datasets.ClassLabel(names=list(one.labels))}
    )
    columns = {name: [sentence(i + 3 * j) for i in range(N)] for j, name in enumerate(one.texts)}
    part = datasets.Dataset.from_dict(columns | {"label": [i % len(one.labels) for i in range(N)]}, features=classes)
    hidden = datasets.Dataset.from_dict(columns | {"label": [-1] * N})
    asked = []

    def load(*names):
        asked.append(names)
        return datasets.DatasetDict({"train": part, one.test: part, "test": hidden})

    monkeypatch.setattr(datasets, "load_dataset", load)
    fetched = glue(task, tmp_path, tokenizer, 0, download=True)
    kept = glue(task, tmp_path, tokenizer, 0)
    assert asked == [("nyu-mll/glue", task)]
    classic(tmp_path / "other", task)
    local = glue(task, tmp_path / "other", tokenizer, 0, download=True)
    for name in ("train", "validation", "test"):
        first, second, third = (whole(getattr(data, name).batches(4)) for data in (fetched, kept, local))
        assert first == second == third
    assert fetched.metrics == local.metrics
    assert [path.name for path in (tmp_path / "glue" / "hub").iterdir() if not path.name.startswith(".")] == [task]


def test_the_seed_draws_the_validation_texts(tmp_path, tokenizer):
    classic(tmp_path, "cola")
    one, again, other = (glue("cola", tmp_path, tokenizer, seed) for seed in (1, 1, 2))
    for part in ("train", "validation", "test"):
        first, second, third = (whole(getattr(d, part).batches(4)) for d in (one, again, other))
        assert first == second
        assert (first == third) == (part == "test")  # the official development set
    mine, theirs = (sorted(whole(d.train.batches(4)) + whole(d.validation.batches(4))) for d in (one, other))
    assert mine == theirs


def test_the_metrics_are_the_tasks_own():
    metrics = {name: task.metrics for name, task in TASKS.items()}
    assert metrics.pop("cola") == ("matthews",)
    assert metrics.pop("mrpc") == metrics.pop("qqp") == ("f1", "accuracy")
    assert set(metrics.values()) == {("accuracy",)}


def test_order_is_drawn_from_the_generator_alone(tmp_path, tokenizer):
    classic(tmp_path, "rte")
    data = glue("rte", tmp_path, tokenizer, 0)
    state = torch.get_rng_state()
    first, again, other = (whole(data.train.batches(4, seeded(seed))) for seed in (1, 1, 2))
    assert first == again != other
    assert sorted(first) == sorted(other) == sorted(whole(data.train.batches(4)))
    assert torch.equal(torch.get_rng_state(), state)


def test_batches_are_padded_to_their_longest(tmp_path, tokenizer):
    classic(tmp_path, "cola")
    data = glue("cola", tmp_path, tokenizer, 0)
    seen = list(data.test.batches(3))
    assert [len(y) for _, y in seen] == [3] * 6 + [2]
    for x, _ in seen:
        assert set(x) == {"input_ids", "attention_mask", "token_type_ids"}
        assert {t.dtype for t in x.values()} == {torch.int64}
        assert len({t.shape for t in x.values()}) == 1
        assert x["attention_mask"].sum(1).max() == x["input_ids"].shape[1]
        assert (x["input_ids"][x["attention_mask"] == 0] == tokenizer.pad_token_id).all()
    assert len({x["input_ids"].shape for x, _ in seen}) > 1


def test_the_tokenizer_says_where_to_pad_and_what_a_model_takes(tmp_path, tokenizer):
    classic(tmp_path, "cola")
    other = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        pad_token="[MASK]",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )
    x, _ = next(glue("cola", tmp_path, other, 0).test.batches(4))
    assert set(x) == {"input_ids", "attention_mask"}
    assert x["attention_mask"].tolist()[0][0] == 0
    assert x["input_ids"][0, 0] == WORDS.index("[MASK]")


@pytest.mark.parametrize(("ranks", "size", "lost"), [(2, 4, 0), (2, 5, 4), (3, 4, 6)])
def test_ranks_share_batches(tmp_path, tokenizer, ranks, size, lost):
    classic(tmp_path, "rte")
    train = glue("rte", tmp_path, tokenizer, 0).train
    parts = [list(train.batches(size, seeded(), rank, ranks)) for rank in range(ranks)]
    shared = [example for part in parts for example in whole(part)]
    everything = whole(train.batches(size, seeded()))
    assert len(shared) == len(train) - lost
    assert len({tuple(len(y) for _, y in part) for part in parts}) == 1
    for example in shared:
        everything.remove(example)  # none comes twice
    assert len(everything) == lost


def test_first_relabelled_and_to(tmp_path, tokenizer):
    classic(tmp_path, "rte")
    test = glue("rte", tmp_path, tokenizer, 0).test
    assert test.statistics is None
    assert len(test.first(7)) == 7
    assert whole(test.first(7).batches(4)) == whole(test.batches(7))[:7]
    assert len(test.first(100)) == N
    some = test.chosen(torch.tensor([3, 17, 8]))
    assert len(some) == 3
    assert whole(some.batches(2)) == [whole(test.batches(7))[i] for i in (3, 17, 8)]
    assert test.unaugmented() is test
    noisy = test.relabelled(1 - test.labels)
    assert torch.cat([y for _, y in noisy.batches(4)]).tolist() == (1 - test.labels).tolist()
    x, y = next(test.to(torch.device("meta")).batches(4))
    assert {t.device.type for t in (*x.values(), y)} == {"meta"}


def test_texts_are_cut_to_max_length(tmp_path, tokenizer):
    classic(tmp_path, "rte")
    data = glue("rte", tmp_path, tokenizer, 0, max_length=6)
    lengths = {len(ids) for ids, _, _ in whole(data.test.batches(4))}
    assert lengths == {6}
    for ids, _, _ in whole(data.test.batches(4)):
        assert ids[-1] == WORDS.index("[SEP]")


def test_a_model_takes_the_inputs(tmp_path, tokenizer):
    classic(tmp_path, "mnli")
    data = glue("mnli", tmp_path, tokenizer, 0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS),
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        num_labels=data.classes,
    )
    model = transformers.BertForSequenceClassification(config)
    x, y = next(data.train.batches(5, seeded()))
    assert torch.nn.functional.cross_entropy(model(**x).logits, y).isfinite()


def test_files_as_they_are_found(tmp_path, tokenizer):
    # The MSR's own files: byte order mark, CRLF, quotation marks that never end.
    lines = rows("mrpc")
    lines[1][3] = '" the null'
    lines[2][4] = "null"
    folder = tmp_path / "glue" / "MRPC"
    for name in TASKS["mrpc"].files[1]:
        write(folder / name, lines, "\r\n", encoding="utf-8-sig")
    examples = whole(glue("mrpc", tmp_path, tokenizer, 0).test.batches(4))
    assert len(examples) == N
    assert examples[0][0] == tuple(tokenizer('" the null', sentence(3))["input_ids"])
    assert examples[1][0] == tuple(tokenizer(sentence(1), "null")["input_ids"])

    # SST-2 without names of columns; blank lines, and none at the end.
    for name in ("train.tsv", "dev.tsv"):
        path = write(tmp_path / "glue" / "SST-2" / name, rows("sst2")[1:])
        path.write_text(path.read_text().replace("\n", "\n\n", 1) + "\n \n")
    assert whole(glue("sst2", tmp_path, tokenizer, 0).test.batches(4)) == [
        encoded(tokenizer, i, False, i % 2) for i in range(N)
    ]


def test_cut_lines_of_the_official_qqp_are_left_out(tmp_path, tokenizer):
    folder = classic(tmp_path, "qqp")
    lines = rows("qqp")
    write(folder / "dev.tsv", [*lines[:5], ["7", "8", "9", "the a", '"of'], ["", "to in", "0"], *lines[5:]])
    examples = whole(glue("qqp", tmp_path, tokenizer, 0).test.batches(4))
    assert examples == [encoded(tokenizer, i, True, i % 2) for i in range(N)]
    write(folder / "dev.tsv", [*lines, *[["cut"]] * 11])
    with pytest.raises(ValueError, match=r"dev\.tsv, line 22: 1 fields instead of 6: fix the line$"):
        glue("qqp", tmp_path, tokenizer, 0)


def test_a_path_may_have_brackets(tmp_path, tokenizer):
    classic(tmp_path / "a[1]*", "wnli")
    assert len(glue("wnli", tmp_path / "a[1]*", tokenizer, 0).test) == N


def replaced(line: int, text: str):
    def change(path: Path) -> None:
        lines = path.read_text().split("\n")
        lines[line - 1] = text
        path.write_text("\n".join(lines))

    return change


REFUSED = {
    "label": (
        "rte",
        replaced(5, "3\ta\tb\tmaybe"),
        r"PATH, line 5: label 'maybe' is not one of entailment, .*",
    ),
    "label of no name": (
        "cola",
        replaced(1, "gj04\t2\t\ta"),
        r"PATH, line 1: label '2' is not one of 0, 1: fix the line",
    ),
    "few fields": ("rte", replaced(7, "5\ta\tentailment"), r"PATH, line 7: 3 fields instead of 4: fix the line"),
    "many fields": ("cola", replaced(20, "gj04\t1\t\ta\tb"), r"PATH, line 20: 5 fields instead of 4: fix the line"),
    "many fields of qqp": ("qqp", replaced(2, "\t" * 6), r"PATH, line 2: 7 fields instead of 6: fix the line"),
    "column": (
        "rte",
        replaced(1, "index\tsentence1\tsentence2"),
        r"PATH, line 1: no column label: use the file of .*",
    ),
    "columns": (
        "mrpc",
        replaced(1, "a\tb"),
        r"PATH, line 1: no column #1 String, #2 String, Quality: use the file .*",
    ),
    "nothing": ("rte", lambda path: path.write_text(""), r"PATH, line 1: no column sentence1, sentence2, label: .*"),
    "no examples": ("rte", lambda path: write(path, rows("rte")[:1]), r"PATH has no examples: replace it"),
    "no text": ("rte", lambda path: path.write_bytes(b"\xff\xfe\x00"), r"PATH is not UTF-8 \(.*\): replace it"),
    "a folder": (
        "rte",
        lambda path: (path.unlink(), path.mkdir()),
        r"FOLDER has no train\.tsv and dev\.tsv: put them .*",
    ),
    "no file": (
        "mrpc",
        lambda path: path.unlink(),
        r"FOLDER has no train\.tsv and dev\.tsv, or msr_paraphrase_train.*",
    ),
    "only one pair's": (
        "mnli",
        lambda path: path.unlink(),
        r"FOLDER has no train\.tsv and dev_matched\.tsv: put them .*",
    ),
}


@pytest.mark.parametrize(("task", "change", "line"), REFUSED.values(), ids=REFUSED)
def test_files_that_are_wrong_are_refused_in_one_line(tmp_path, tokenizer, task, change, line):
    folder = classic(tmp_path, task)
    path = folder / "train.tsv"
    change(path)
    with pytest.raises(ValueError, match=f"^{line.replace('PATH', str(path)).replace('FOLDER', str(folder))}$"):
        glue(task, tmp_path, tokenizer, 0)


def test_what_the_csv_reader_refuses_is_one_line_too(tmp_path, tokenizer, monkeypatch):
    folder = classic(tmp_path, "rte")

    def fail(*args, **kwargs):
        raise RuntimeError("one\ntwo")

    monkeypatch.setattr(datasets.Dataset, "from_csv", fail)
    with pytest.raises(ValueError, match=rf"^{folder}/train\.tsv cannot be read \(one two\): replace it$"):
        glue("rte", tmp_path, tokenizer, 0)


def test_missing_data_and_failed_downloads_say_what_to_do(tmp_path, tokenizer, monkeypatch):
    remedy = r"train\.tsv and dev\.tsv of https://gluebenchmark\.com/tasks into .*/glue/QNLI"
    with pytest.raises(ValueError, match=rf"^GLUE's qnli is missing: give --download, or put {remedy} \(or"):
        glue("qnli", tmp_path, tokenizer, 0)

    def fail(*args):
        raise ConnectionError("Couldn't reach\n'nyu-mll/glue' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    line = rf"GLUE's qnli could not be downloaded \(Couldn't reach 'nyu-mll/glue' on the Hub\): put {remedy} yourself"
    with pytest.raises(ValueError, match=f"^{line}$"):
        glue("qnli", tmp_path, tokenizer, 0, download=True)
    place = tmp_path / "glue" / "hub" / "qnli"
    place.mkdir()
    with pytest.raises(ValueError, match=rf"^{place} is damaged \(.*\): delete it and give --download$"):
        glue("qnli", tmp_path, tokenizer, 0)


def test_a_label_of_the_hub_outside_the_classes_is_refused(tmp_path, tokenizer, monkeypatch):
    part = datasets.Dataset.from_dict({"sentence": ["a"] * N, "label": [0, 1, -1] + [0] * (N - 3)})
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *_: datasets.DatasetDict({"train": part, "validation": part, "test": part})
    )
    with pytest.raises(ValueError, match=r"/hub/sst2, train, row 2: label -1 is outside 0 to 1: "):
        glue("sst2", tmp_path, tokenizer, 0, download=True)


def test_tasks_and_tokenizers_that_do_not_fit(tmp_path, tokenizer, monkeypatch):
    with pytest.raises(ValueError, match=r"unknown GLUE task 'sst-2', did you mean 'sst2'\?"):
        glue("sst-2", tmp_path, tokenizer, 0)
    with pytest.raises(ValueError, match="max_length must be at least 5 for rte, got 4"):
        glue("rte", tmp_path, tokenizer, 0, max_length=4)
    bare = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match=r"has no token to pad with: set tokenizer\.pad_token"):
        glue("rte", tmp_path, bare, 0)


def test_without_the_package_one_line_says_what_to_install(tmp_path, tokenizer, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "datasets":
            raise ModuleNotFoundError("No module named 'datasets'", name="datasets")
        return real(name, *args, **kwargs)

    classic(tmp_path, "rte")
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"^GLUE needs the package datasets: pip install 'bisam\[experiments\]'$"):
        glue("rte", tmp_path, tokenizer, 0)


REAL = {"cola": (8551, 1043), "sst2": (6920, 872), "mrpc": (4076, 1725), "rte": (2490, 277), "wnli": (635, 71)}


@pytest.mark.parametrize("task", TASKS)
def test_real_data(data, tokenizer, task):
    if not (data / "glue" / TASKS[task].folder).is_dir():
        pytest.skip(f"no {task}")
    real = glue(task, data, tokenizer, 0, max_length=64)
    assert (len(real.train) + len(real.validation), len(real.test)) == REAL[task]
    assert len(real.validation) == REAL[task][0] // 10
    for split in (real.train, real.validation, real.test):
        assert 0.1 < split.labels.float().mean() < 0.9
    x, y = next(real.train.batches(32, seeded()))
    assert x["input_ids"].shape == x["token_type_ids"].shape
    assert x["input_ids"].shape[1] <= 64
    assert len(y) == 32
