"""Counting: the gradients and forward passes that a method asks for, and the outputs of its last answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch

from bisam import Evaluation, Oracle, Vector
from bisam.evaluation import Batch, size
from bisam.methods import Method
from bisam.objectives import Objective
from bisam.oracle import View


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

    def query(
        self,
        batch: Batch,
        objective: Objective | None = None,
        *,
        at: Vector | None = None,
        grad: bool = True,
        track: bool | None = None,
    ) -> Evaluation:
        self._counts[grad] += size(batch) or 1
        given, at = [at], None  # not held through the forward pass, see Oracle.query
        return super().query(batch, objective, at=given.pop(), grad=grad, track=track)

    def together(self, *queries: Mapping[str, Any]) -> list[Evaluation]:
        for query in queries:
            self._counts[query.get("grad", True)] += size(query["batch"]) or 1
        return super().together(*queries)
