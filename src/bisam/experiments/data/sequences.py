"""Sequences: splits of token sequences whose labels are tokens too, one for each position."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from bisam.experiments.data.splits import IGNORED, shares, without_index

_CPU = torch.device("cpu")


@dataclass(frozen=True, eq=False)
class Sequences:
    """A split of sequences (N, T), with a label for each position.

    Attributes:
        tokens: inputs (N, T), int64.
        labels: the token that follows each position (N, T); `IGNORED` where it does not count, as in a prompt or after
            the end of a text.
        device: of the batches.
    """

    tokens: Tensor
    labels: Tensor
    device: torch.device = _CPU

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def statistics(self) -> None:
        """None: tokens are no images."""
        return None

    def to(self, device: torch.device) -> Sequences:
        """Return the split with its batches on `device`."""
        return replace(self, device=device)

    def first(self, count: int) -> Sequences:
        """Return the first `count` examples."""
        return replace(self, tokens=self.tokens[:count], labels=self.labels[:count])

    def chosen(self, index: Tensor) -> Sequences:
        """Return the examples with these numbers (n,), in this order."""
        return replace(self, tokens=self.tokens[index], labels=self.labels[index])

    def relabelled(self, labels: Tensor) -> Sequences:
        """Return the split with other labels (N, T)."""
        return replace(self, labels=labels)

    def unaugmented(self) -> Sequences:
        """Return the split itself: tokens are not augmented."""
        return self

    def batches(
        self, size: int, generator: torch.Generator | None = None, rank: int = 0, ranks: int = 1
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Return an iterator over tokens and labels, both (n, T); see `Split.batches`."""
        return without_index(self.indexed(size, generator, rank, ranks))

    def indexed(
        self, size: int, generator: torch.Generator | None = None, rank: int = 0, ranks: int = 1
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield numbers (n,), and what `batches` yields; see `Split.indexed`."""
        for index in shares(len(self), size, generator, rank, ranks):
            yield index, self.tokens[index].to(self.device), self.labels[index].to(self.device)


def windows(texts: list[Tensor], length: int) -> Sequences:
    """Return the texts in windows of `length` positions; the last one of a text is filled up, which does not count.

    Args:
        texts: tokens of each text (n,), int64. Windows do not reach over their ends.
        length: positions T of a window, each with the token that follows it as its label.
    """
    tokens, labels = [torch.zeros(0, length, dtype=torch.int64)], [torch.zeros(0, length, dtype=torch.int64)]
    for text in texts:
        missing = -(len(text) - 1) % length
        tokens.append(F.pad(text[:-1], (0, missing)).view(-1, length))
        labels.append(F.pad(text[1:], (0, missing), value=IGNORED).view(-1, length))
    return Sequences(torch.cat(tokens), torch.cat(labels))
