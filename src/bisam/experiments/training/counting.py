"""Counting: the gradients and forward passes that a method asks for, and the outputs of its last answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from bisam import Evaluation, Oracle
from bisam.batches import Batch, size
from bisam.methods import Method
from bisam.oracle import Query, View


class CountedMethod:
    """A method that counts its queries and keeps the model's outputs at the point of its last descent gradient."""

    transparent = True  # the saved state is that of `method`

    def __init__(self, method: Method) -> None:
        self.method = method
        self.outputs = torch.empty(0)
        self.counts = Counter[bool]()
        """Examples in queries with (True) and without (False) gradient."""

    def __call__(self, oracle: Oracle, batch: Batch) -> Evaluation:
        """Call the method and return its answer unchanged."""
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
