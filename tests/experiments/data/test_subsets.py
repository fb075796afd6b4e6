"""What is trained and what is held out: shares, numbers of examples, and batches of texts of similar length."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("datasets")

from bisam.experiments import data
from bisam.experiments.data.splits import batches_of, shares
from bisam.experiments.errors import DataError
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs.machine import Machine
from tests.experiments.data.test_glue import TASKS, WORDS, N, rows, whole, write
from tests.experiments.data.test_image_folders import classes

LENGTHS = torch.tensor([5, 1, 9, 3, 7, 2, 8, 4, 6, 3, 9, 1, 5])


def seeded(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def bucketed(seed: int, bucket: int, size: int = 2, **more) -> list[list[int]]:
    return [part.tolist() for part in shares(len(LENGTHS), size, seeded(seed), lengths=LENGTHS, bucket=bucket, **more)]


def test_a_bucket_is_a_random_part_sorted_by_length_in_batches_of_random_order():
    """Against the definition, on numbers drawn by the same generator."""
    size, bucket, random = 2, 3, seeded(5)
    order, expected = torch.randperm(len(LENGTHS), generator=random).tolist(), []
    while order:
        part, order = sorted(order[: size * bucket], key=lambda i: LENGTHS[i]), order[size * bucket :]
        batches = [part[i : i + size] for i in range(0, len(part), size)]
        expected += [batches[i] for i in torch.randperm(len(batches), generator=random).tolist()]
    assert bucketed(5, bucket) == expected


@pytest.mark.parametrize("bucket", [1, 2, 5, 100])
def test_buckets_have_each_example_once_and_as_many_batches(bucket):
    batches = bucketed(2, bucket)
    assert Counter(i for batch in batches for i in batch) == Counter(range(len(LENGTHS)))
    assert len(batches) == batches_of(len(LENGTHS), 2)
    assert batches == bucketed(2, bucket) != bucketed(3, bucket)


def test_ranks_share_the_same_buckets():
    both = [bucketed(4, 3, size=4, rank=rank, ranks=2) for rank in (0, 1)]
    whole_batches = bucketed(4, 3, size=4)
    for a, b, batch in zip(*both, [batch for batch in whole_batches if len(batch) > 1], strict=True):
        assert {*a, *b} <= {*batch}
        assert len(a) == len(b)


def test_without_buckets_or_without_a_generator_the_order_is_as_before():
    plain = [part.tolist() for part in shares(len(LENGTHS), 2, seeded(6))]
    assert bucketed(6, 1) == plain
    fixed = [part.tolist() for part in shares(len(LENGTHS), 2, lengths=LENGTHS, bucket=3)]
    assert fixed == [part.tolist() for part in torch.arange(len(LENGTHS)).split(2)]


TEXTS = 60


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("root")
    for name, count in zip(TASKS["sst2"].files[0], (TEXTS, N), strict=True):
        write(root / "glue" / TASKS["sst2"].folder / name, rows("sst2", count))
    folder = root / "weights" / "small"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "vocab_size": len(WORDS)}))
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizerFast"}))
    return root


def loaded(root: Path, **fields):
    recipe = Recipe(dataset="glue:sst2", model="hf:small", **fields)
    return data.load(recipe, Machine(data_dir=root))


def test_texts_in_buckets_are_the_same_texts_with_less_padding(root):
    plain, sorted_ = (loaded(root, bucket=bucket) for bucket in (1, 4))
    for part in ("train", "validation", "test"):
        a, b = (getattr(one, part) for one in (plain, sorted_))
        assert sorted(whole(a.batches(4, seeded()))) == sorted(whole(b.batches(4, seeded())))

    def tokens(batches) -> int:
        return sum(x["input_ids"].numel() for x, _ in batches)

    assert tokens(sorted_.train.batches(4, seeded())) < tokens(plain.train.batches(4, seeded()))
    lengths = sorted_.test.lengths.tolist()
    assert lengths == sorted(lengths)
    for x, _ in sorted_.train.batches(4, seeded()):
        lengths = x["attention_mask"].sum(1)
        assert torch.equal(x["attention_mask"].bool(), torch.arange(x["input_ids"].shape[1]) < lengths[:, None])
        assert x["input_ids"].shape[1] == lengths.max()


def test_the_seed_draws_a_number_of_training_examples_and_leaves_the_others_complete(root):
    every = loaded(root, seed=3)
    few, again, other = (loaded(root, seed=seed, train_examples=20) for seed in (3, 3, 4))
    assert len(few.train) == len(other.train) == 20
    assert whole(few.train.batches(20)) == whole(again.train.batches(20)) != whole(other.train.batches(20))
    assert Counter(whole(few.train.batches(20))) <= Counter(whole(every.train.batches(20)))
    for part in ("validation", "test"):
        assert whole(getattr(few, part).batches(9)) == whole(getattr(every, part).batches(9))
    with pytest.raises(DataError, match="train_examples must be at most 54, the training examples, got 55"):
        loaded(root, train_examples=55)


def test_a_share_that_holds_out_no_text_is_refused(root):
    """Else the training texts would be the validation texts, and the result would say that they are not."""
    with pytest.raises(ValueError, match=r"of the 60 texts of .* none is held out: give a larger --held-out"):
        loaded(root, held_out=0.001)


@pytest.mark.parametrize(("share", "held"), [(None, 6), (0.1, 6), (0.5, 30), (0.0, 60)])
def test_a_share_of_texts_is_held_out(root, share, held):
    parts = loaded(root, held_out=share)
    assert len(parts.validation) == held
    both = whole(parts.train.batches(9)) + (whole(parts.validation.batches(9)) if share != 0 else [])
    assert Counter(both) == Counter(whole(loaded(root, held_out=0.0).train.batches(9)))
    if share == 0:
        assert whole(parts.validation.batches(9)) == whole(parts.train.batches(9))


def images(root: Path, **fields):
    return data.load(Recipe(dataset="folder:mine", image_size=8, **fields), Machine(data_dir=root))


@pytest.fixture
def photographs(tmp_path) -> Path:
    """A folder beside the data sets, with five images of each class for training and two for the test."""
    classes(tmp_path / "mine" / "train", a=5, b=5, c=5)
    classes(tmp_path / "mine" / "test", a=2, b=2, c=2)
    return tmp_path


@pytest.mark.parametrize(("share", "held"), [(0.2, 1), (0.4, 2), (0.6, 3), (0.8, 4)])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_share_of_the_images_of_each_class_is_held_out(photographs, share, held, seed):
    parts = images(photographs, held_out=share, seed=seed)
    assert Counter(parts.validation.labels.tolist()) == dict.fromkeys(range(3), held)
    assert Counter(parts.train.labels.tolist()) == dict.fromkeys(range(3), 5 - held)
    assert not {*parts.train.paths} & {*parts.validation.paths}
    assert (parts.train.training, parts.validation.training, len(parts.test)) == (True, False, 6)


def test_without_held_out_images_all_are_trained_and_validated(photographs):
    parts = images(photographs, held_out=0.0)
    assert {*parts.train.paths} == {*parts.validation.paths}
    assert (len(parts.train), len(parts.validation), len(parts.test)) == (15, 15, 6)
    assert (parts.train.training, parts.validation.training) == (True, False)


def test_a_share_is_taken_after_the_test_images_where_there_is_one_folder(tmp_path):
    classes(tmp_path / "mine", a=10, b=10)
    parts = images(tmp_path, held_out=0.5)
    assert [len(getattr(parts, name)) for name in ("train", "validation", "test")] == [9, 9, 2]
    every = [path for name in ("train", "validation", "test") for path in getattr(parts, name).paths]
    assert len(set(every)) == 20


def test_a_folder_with_validation_images_holds_none_out(photographs):
    classes(photographs / "mine" / "val", a=1, b=1, c=1)
    with pytest.raises(DataError, match="has val for validation, from which nothing is held out"):
        images(photographs, held_out=0.2)
    assert len(images(photographs).validation) == 3


def test_a_folder_here_comes_before_that_of_the_data_sets(photographs, tmp_path_factory, monkeypatch):
    here = tmp_path_factory.mktemp("here")
    classes(here / "mine" / "train", x=3, y=3)
    classes(here / "mine" / "test", x=1, y=1)
    monkeypatch.chdir(here)
    assert images(photographs, held_out=0.0).classes == 2
    monkeypatch.chdir(photographs.parent)
    assert images(photographs, held_out=0.0).classes == 3


def test_shares_outside_their_range_are_refused():
    for share in (-0.1, 1.0):
        with pytest.raises(ValueError, match=r"held_out must be in \[0, 1\), got"):
            Recipe(held_out=share)
    assert replace(Recipe(), held_out=0).held_out == 0.0
