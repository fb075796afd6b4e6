"""Counting: the gradients and forward passes that a method takes, and its last answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from bisam import Evaluation, Oracle
from bisam.batches import Batch, size
from bisam.methods import Method
from bisam.oracle import Query, View


class Watch:
    """A method, what it costs, and what the model answered where it took the last descent gradient."""

    transparent = True  # what is remembered is the method's

    def __init__(self, method: Method) -> None:
        self.method = method
        self.outputs = torch.empty(0)
        self.counts = Counter[bool]()
        """Examples in queries with and without gradient."""

    def __call__(self, oracle: Oracle, batch: Batch) -> Evaluation:
        """As the method, with one look at its answer."""
        answer = self.method(_Counted(oracle, self.counts), batch)
        self.outputs = answer.outputs
        return answer


class _Counted(View):
    def __init__(self, oracle: Oracle, counts: Counter[bool]) -> None:
        super().__init__(oracle)
        self._counts = counts

    def ask(self, queries: Sequence[Query]) -> list[Evaluation]:
        for query in queries:
            self._counts[query.grad] += size(query.batch) or 1
        return super().ask(queries)
