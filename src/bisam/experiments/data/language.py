"""Language: data sets of tokens without a download, for models that predict the next token.

data = language("pydoc", seed=0, max_length=64)      # the help texts of Python, characters
data = language("addition", seed=0)                  # "12+34=640": the digits of the sum, the lowest first

The seed draws the split. Their metrics are scores of which the larger is the better: accuracy of the tokens (one minus
the token error), likelihood, exp(-loss) of a token, and for addition the exact match of the whole answer.
"""

from __future__ import annotations

from functools import cache
from itertools import combinations_with_replacement

import torch
from torch import Tensor

from bisam.experiments.data.sequences import Sequences, windows
from bisam.experiments.data.splits import IGNORED, Data, drawn

LANGUAGES = {
    "pydoc": "the help texts of Python (pydoc_data.topics), characters, in windows of max_length",
    "addition": "sums of two numbers below 100, of which the digits are predicted",
}
"""The data sets, with a short description of each."""
SYMBOLS = "0123456789+="
"""The tokens of addition."""
_ANSWER = 3  # digits
_PART = 0.1  # of the characters, which the test and the validation part have at least
_PAIRS = (0.6, 0.75)  # of the pairs, after which the training and the validation part end


def language(name: str, seed: int, max_length: int = 128) -> Data:
    """Load a data set of tokens.

    Args:
        name: a key of `LANGUAGES`.
        seed: draws the split.
        max_length: positions of a window of text; addition has 8.
    """
    return _pydoc(seed, max_length) if name == "pydoc" else _addition(seed)


def encoded(text: str, symbols: str) -> Tensor:
    """Return the places of the characters of a text among `symbols` (n,), int64."""
    place = {symbol: i for i, symbol in enumerate(symbols)}
    return torch.tensor([place[symbol] for symbol in text], dtype=torch.int64)


def decoded(tokens: Tensor, symbols: str) -> str:
    """Return the text of tokens (n,)."""
    return "".join(symbols[i] for i in tokens.tolist())


@cache
def documents() -> tuple[str, ...]:
    """Return the help texts, the longest first, in which each paragraph is kept where it comes first.

    Many topics are sections of others, so that a split by topics would test on training text. The texts are those of
    the Python that runs.
    """
    from pydoc_data.topics import topics

    seen, found = set[str](), list[str]()
    for text in sorted(topics.values(), key=lambda text: (-len(text), text)):
        kept = list[str]()
        for paragraph in text.split("\n\n"):
            words = " ".join(paragraph.split())
            if words and words not in seen:
                seen.add(words)
                kept.append(paragraph.strip("\n"))
        if kept:
            found.append("\n\n".join(kept) + "\n")
    return tuple(found)


def _pydoc(seed: int, length: int) -> Data:
    """Split the texts by documents: a tenth of the characters or more for the test, and as much for validation."""
    texts = documents()
    symbols = "".join(sorted(set("".join(texts))))
    wanted = _PART * sum(map(len, texts))
    test, validation, train = list[Tensor](), list[Tensor](), list[Tensor]()
    for i in drawn(len(texts), seed).tolist():
        part = next((part for part in (test, validation) if sum(map(len, part)) < wanted), train)
        part.append(encoded(texts[i], symbols))
    parts = (windows(part, length) for part in (train, validation, test))
    return Data(*parts, classes=len(symbols), metrics=("likelihood", "accuracy"))


def _addition(seed: int) -> Data:
    """Split the pairs of numbers; a + b and b + a are in the same part."""
    pairs = list(combinations_with_replacement(range(100), 2))
    order = [pairs[i] for i in drawn(len(pairs), seed).tolist()]
    first, second = (round(share * len(order)) for share in _PAIRS)
    train, validation, test = (_problems(part) for part in (order[:first], order[first:second], order[second:]))
    return Data(train, validation, test, len(SYMBOLS), metrics=("exact_match", "accuracy", "likelihood"))


def _problems(pairs: list[tuple[int, int]]) -> Sequences:
    both = [pair for a, b in pairs for pair in ([(a, b)] if a == b else [(a, b), (b, a)])]
    rows = torch.stack([encoded(problem(a, b), SYMBOLS) for a, b in both])
    labels = rows[:, 1:].clone()
    labels[:, :-_ANSWER] = IGNORED
    return Sequences(rows[:, :-1].contiguous(), labels)


def problem(a: int, b: int) -> str:
    """Return a sum of numbers below 100 as text, such as "12+34=640": the digits of the answer from the lowest."""
    return f"{a:02d}+{b:02d}={f'{a + b:0{_ANSWER}d}'[::-1]}"
