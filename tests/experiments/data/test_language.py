"""Data sets of tokens: text in windows, addition, and what a recipe may say of them."""

from __future__ import annotations

import re

import pytest
import torch

from bisam.experiments import data
from bisam.experiments.data.language import SYMBOLS, decoded, documents, encoded, language, problem
from bisam.experiments.data.sequences import Sequences, windows
from bisam.experiments.data.splits import IGNORED, Data
from bisam.experiments.errors import DataError
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs.machine import Machine

PARTS = ("train", "validation", "test")


def parts(d: Data) -> list[Sequences]:
    return [getattr(d, part) for part in PARTS]


def test_no_paragraph_is_in_two_documents():
    paragraphs = [" ".join(p.split()) for text in documents() for p in text.split("\n\n")]
    assert len(paragraphs) == len(set(paragraphs)) > 1000
    assert sum(map(len, documents())) > 200_000


def test_windows_have_each_character_once_as_a_label():
    text = encoded("01234567890+=", SYMBOLS)
    split = windows([text, text[:1], text[:4]], 5)
    assert split.tokens.shape == split.labels.shape == (4, 5)
    assert [decoded(row[row != IGNORED], SYMBOLS) for row in split.labels] == ["12345", "67890", "+=", "123"]
    assert [decoded(row, SYMBOLS) for row in split.tokens] == ["01234", "56789", "0+000", "01200"]
    assert len(windows([text[:1]], 5)) == 0


@pytest.mark.parametrize("seed", [0, 1])
def test_text_is_split_by_documents(seed):
    d = language("pydoc", seed, 50)
    symbols = "".join(sorted(set("".join(documents()))))
    texts = ["".join(decoded(row[row != IGNORED], symbols) for row in part.labels) for part in parts(d)]
    for text in documents():
        inside = [text[1:] in found for found in texts]
        assert sum(inside) == 1 or len(text) < 200  # a short one may be a part of another
    total = sum(len(text) - 1 for text in documents())
    assert sum(map(len, texts)) == total
    assert all(len(text) > 0.09 * total for text in texts[1:])
    assert len(texts[0]) > 0.4 * total
    assert d.classes == len(symbols)
    assert not torch.equal(language("pydoc", seed + 1, 50).test.tokens[:5], d.test.tokens[:5])


def test_sums_are_split_without_overlap_also_of_their_mirrors():
    d = language("addition", 3)
    seen = list[set[frozenset[str]]]()
    for part in parts(d):
        assert part.tokens.shape[1] == 8
        assert (part.labels[:, :5] == IGNORED).all()
        assert torch.equal(part.labels[:, 5:-1], part.tokens[:, 6:])
        for row, labels in zip(part.tokens, part.labels, strict=True):
            text = decoded(row[:6], SYMBOLS) + decoded(labels[5:], SYMBOLS)
            a, b, answer = re.fullmatch(r"(\d\d)\+(\d\d)=(\d{3})", text).groups()
            assert int(answer[::-1]) == int(a) + int(b)
        seen.append({frozenset(decoded(row[:5], SYMBOLS).split("+")) for row in part.tokens})
    assert not seen[0] & seen[1] | seen[0] & seen[2] | seen[1] & seen[2]
    assert sum(map(len, seen)) == 5050
    assert sum(map(len, parts(d))) == 10_000
    assert problem(12, 34) == "12+34=640"


def test_a_recipe_takes_parts_of_them():
    recipe = Recipe(dataset="text:addition", model="gpt", train_examples=7, limit=20, seed=2)
    d = data.load(recipe, Machine())
    assert [len(part) for part in parts(d)] == [7, 20, 20]
    (x, y), *_ = d.train.batches(4, torch.Generator().manual_seed(0))
    assert x.shape == y.shape == (4, 8)
    index, x, y = next(d.train.indexed(4, torch.Generator().manual_seed(0)))
    assert torch.equal(d.train.tokens[index], x)
    assert torch.equal(d.train.labels[index], y)
    assert data.load(Recipe(dataset="text:pydoc", model="gpt", max_length=9), Machine()).train.tokens.shape[1] == 9


def test_what_makes_no_sense_for_tokens_is_refused():
    with pytest.raises(DataError, match=r"noise 0.4 is about the class of an example, and text:addition has tokens"):
        data.load(Recipe(dataset="text:addition", model="gpt", noise=0.4), Machine())
    with pytest.raises(DataError, match=r"imbalance 10 is about the class of an example, and text:addition has tokens"):
        data.load(Recipe(dataset="text:addition", model="gpt", imbalance=10), Machine())
    for change in ({"mixup": 0.2}, {"cutmix": 1.0}, {"erasing": 0.1}, {"randaugment": 2}):
        with pytest.raises(DataError, match="randaugment, erasing, mixup and cutmix change images, and text:addition"):
            data.load(Recipe(dataset="text:addition", model="gpt", **change), Machine())
    with pytest.raises(DataError, match=r"dataset 'text:adition'.*text:addition"):
        data.load(Recipe(dataset="text:adition", model="gpt"), Machine())
    some, none = torch.zeros(2, 3, dtype=torch.int64), torch.full((2, 3), IGNORED)
    with pytest.raises(ValueError, match="no label of the test part of the data counts"):
        Data(Sequences(some, some), Sequences(some, some), Sequences(some, none), classes=2)
    with pytest.raises(ValueError, match="label 5 in the validation part is outside the 2 classes"):
        Data(Sequences(some, some), Sequences(some, some + 5), Sequences(some, some), classes=2)
