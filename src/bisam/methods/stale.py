"""Methods whose ascent gradient does not wait for the present batch: OptSAM, AsyncSAM and SAM-db.

They are baselines of SAMPa (Xie et al., 2024, https://arxiv.org/abs/2410.10683). SAM computes its ascent gradient at
the weights, on the batch of the step, before it computes its descent gradient. Here the ascent gradient is

* of OptSAM, the gradient that the previous step descended: one gradient per step;
* of AsyncSAM, that at the weights of the previous step, on its batch: two gradients that are independent of each other;
* of SAM-db, that at the weights, on the batch of the previous step: two gradients, one after the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bisam.batches import Batch
from bisam.evaluation import Evaluation
from bisam.methods.sam import SAM, looks
from bisam.oracle import Oracle, Query


@dataclass(frozen=True, repr=False)
class OptSAM(SAM):
    """OptSAM: SAM along the gradient that the previous step descended, with one gradient per step (Xie et al., 2024).

    Source: https://arxiv.org/abs/2410.10683, where it is the baseline that reuses gradients, as optimistic gradient
    descent does, and is worse than SGD. The first step is plain. Running statistics are updated at the displaced point,
    because there is no query at the weights.

    Args:
        perturb: see `SAM`.
        ascent: see `SAM`; another objective than `descent` costs one more query.
        descent: see `SAM`.

    Raises:
        TypeError: an argument has the wrong type.
    """

    stateful: ClassVar[bool] = True

    def __call__(self, oracle: Oracle, batch: Batch) -> Evaluation:
        """Makes one query (two independent ones if `ascent` and `descent` differ)."""
        state = oracle.state
        e = self.displacement(state["g"], oracle) if "g" in state else None
        queries = looks(self, batch, e, track=True)
        del e  # the queries own it
        answer, *others = oracle.ask(queries)
        state["g"] = (others or [answer])[0].gradient
        return answer


@dataclass(frozen=True, repr=False)
class AsyncSAM(SAM):
    """AsyncSAM: SAM along the gradient at the weights of the previous step, on its batch (Jo et al., 2025).

    Source: https://arxiv.org/abs/2503.11147, with a delay of one step. The two gradients of a step are independent, so
    that two devices can compute them at once. The authors compute the ascent gradient on a smaller batch where its
    device is slower; here both batches are the same. The first step is one of SAM.

    Args:
        perturb: see `SAM`.
        ascent: see `SAM`.
        descent: see `SAM`.

    Raises:
        TypeError: an argument has the wrong type.
    """

    stateful: ClassVar[bool] = True
    concurrent: ClassVar[bool] = True

    def __call__(self, oracle: Oracle, batch: Batch) -> Evaluation:
        """Makes two queries, which are independent of each other except in the first step."""
        state = oracle.state
        if "g" not in state:
            state["g"] = oracle.query(batch, self.ascent).gradient
            return oracle.query(batch, self.descent, at=self.displacement(state["g"], oracle))
        late = Query(batch, self.descent, self.displacement(state["g"], oracle))
        answer, look = oracle.ask([late, Query(batch, self.ascent)])
        state["g"] = look.gradient
        return answer


@dataclass(frozen=True, repr=False)
class SAMDB(SAM):
    """SAM-db: SAM whose ascent gradient is computed on another batch than its descent gradient (Xie et al., 2024).

    Source: https://arxiv.org/abs/2410.10683. The ascent batch is that of the previous step; the first step is one of
    SAM. Running statistics are updated at the displaced point, where the present batch is seen. The method keeps a
    reference to the previous batch and not a copy, as `SAMPa` does.

    Args:
        perturb: see `SAM`.
        ascent: see `SAM`.
        descent: see `SAM`.

    Raises:
        TypeError: an argument has the wrong type.
    """

    stateful: ClassVar[bool] = True

    def __call__(self, oracle: Oracle, batch: Batch) -> Evaluation:
        """Makes two queries."""
        before = oracle.kept("batch") or batch
        e = self.displacement(oracle.query(before, self.ascent, track=False).gradient, oracle)
        query = Query(batch, self.descent, e, track=True)
        del e  # the query owns it
        answer = oracle.ask([query])[0]
        oracle.keep("batch", batch)
        return answer
