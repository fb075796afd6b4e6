"""InPairs: two processes answer the independent queries of a method in parallel.

SAMPa was designed for this (Xie et al., 2024): each process of a pair computes one of its two gradients and receives
the other, and a step takes about as long as one of plain training. The results are those of one process:

    # torchrun --nproc-per-node 2 train.py
    sampler = DistributedSampler(data, num_replicas=replicas(), rank=replica())
    sharp = SharpnessAware(model, InPairs(SAMPa(ahead=next_step(optimizer))), cross_entropy)

Ranks 0 and 1 are a pair, ranks 2 and 3 are a pair, and so on; data and weights of a pair are those of one process. With
several pairs, each perturbs for its own part of the data, and DistributedDataParallel around the loss averages over
them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor

from bisam.batches import Batch
from bisam.evaluation import Evaluation
from bisam.integrations.pairs.pair import (
    Form,
    Note,
    Pair,
    digest,
    message_like,
    own_pair,
    rank_and_size,
    shapes_of,
)
from bisam.methods import Method
from bisam.model.oracle import ModelOracle
from bisam.objectives import Objective
from bisam.oracle import Oracle, Query, View
from bisam.statistics import observed_above
from bisam.validation import instance


@dataclass(frozen=True)
class InPairs:
    """Wraps a method so that two ranks answer its independent queries in parallel (both of SAMPa, two of CR-SAM).

    Both ranks compute everything else identically, so weights and state are the same on both. They are also those of
    the method without InPairs, bit for bit if the hardware is deterministic, so a checkpoint of one rank is valid for
    both. InPairs must be the outermost method. All ranks of the process group take part.

    Running statistics and other buffers are updated on the even rank, as without InPairs, and copied to the odd rank;
    hidden states in plain attributes of modules are not. `clean` is available on the rank that made the query at the
    weights: for SAMPa on even ranks only; on odd ranks it raises RuntimeError. An answer from the other rank has losses
    and gradient, but no outputs and no targets.

    Forward passes draw from their own generators, seeded by `torch.initial_seed()`, the pair and the step: dropout
    masks differ from those of one process, and the user's generators do not change. Random numbers that a method draws
    itself, for example a mask, come from the user's generators, which must have the same state on both ranks.

    At the steps 1, 2, 4, 8, ... the ranks check that they have the same weights, state and batch, which synchronises
    with the device. At each exchange the processes also exchange a description of their queries, and any error, without
    synchronising with the device.

    Args:
        method: the method whose queries are distributed.

    Raises:
        TypeError: `method` is not a method.

    Raises when called:
        TypeError: the oracle is not that of a module.
        ValueError: there is no process group with an even number of ranks; InPairs is inside another InPairs; the model
            has a wrapper that must be around the loss, or changes frozen parameters in its forward pass; the ranks of
            a pair differ in weights, state, batch or generators.
        RuntimeError: the other rank failed or does not respond. As after any error, the weights are as before the step.
    """

    method: Method
    transparent: ClassVar[bool] = True

    def __post_init__(self) -> None:
        instance("method", self.method, "SAMPa(ahead=next_step(optimizer)) or another (oracle, batch) -> Evaluation")

    def __call__(self, oracle: Oracle, batch: Batch) -> Evaluation:
        """Makes the queries of the method; each rank answers its share of the independent ones."""
        below = _model_oracle(oracle)
        pair = own_pair()
        if not below.parameters:
            return self.method(oracle, batch)  # which raises the error
        pair.begin(below, oracle, batch)
        # Both ranks record all queries, not their own ones only.
        return self.method(observed_above(_Shared(oracle, below, pair)), batch)


def replicas() -> int:
    """Returns the number of pairs, which is `num_replicas` of a DistributedSampler.

    Raises:
        ValueError: there is no process group with an even number of ranks.
    """
    return rank_and_size()[1] // 2


def replica() -> int:
    """Returns the number of this rank's pair, which is `rank` of a DistributedSampler.

    Raises:
        ValueError: there is no process group with an even number of ranks.
    """
    return rank_and_size()[0] // 2


class _Shared(View):
    """An oracle whose independent queries are distributed over the ranks of a pair."""

    def __init__(self, oracle: Oracle, below: ModelOracle, pair: Pair) -> None:
        super().__init__(oracle)
        self._below, self._pair = below, pair
        self._exchanges, self._batches = 0, list[Batch]()
        self._before = below.random_state().tensors
        below.module_state.begin()  # saved for a failed step, before the other rank changes buffers

    def ask(self, queries: Sequence[Query]) -> list[Evaluation]:
        """See `Oracle.ask`. Several queries are distributed over the ranks; both ranks answer a single query.

        In the latter case the answer of the even rank is used.
        """
        members: Sequence[int | None] = _members(queries) if len(queries) > 1 else [None] * len(queries)
        pair, objectives = self._pair, [query.objective or self.loss for query in queries]
        shapes, moving = [shapes_of(query.batch) for query in queries], any(query.tracks for query in queries)
        self._exchanges += 1
        place = pair.calls, self._exchanges, self.step, len(queries)
        own: list[Evaluation | None] = []
        try:
            for query, member in zip(queries, members, strict=True):
                own.append(self._asked(query, member in (None, pair.member)))
            if moved := self._below.module_state.moved_parameters:
                raise ValueError(
                    f"forward passes change frozen parameters ({', '.join(moved[:3])}), as a momentum encoder does, "
                    "and the ranks of a pair would differ in them: use the method alone, without InPairs"
                )
        except Exception as error:
            with suppress(RuntimeError):  # if the other rank does not respond, raise the error of this rank
                pair.swap(Note(place, error=f"{type(error).__name__}: {error}"[:1000]))
            raise
        generators = self._below.random_state().tensors
        drawn = ["" if torch.equal(a, b) else digest(b) for a, b in zip(self._before, generators, strict=True)]
        buffers = list(self.buffers) if moving else []
        note = Note(
            place,
            shapes,
            drawn,
            digest(str([(*b.shape, b.dtype) for b in buffers])),
            [None if answer is None else Form.of(answer) for answer in own],
        )
        theirs: Note = pair.swap(note)
        pair.check(note, theirs)
        forms = [(note, theirs)[(member or 0) != pair.member].forms[i] for i, member in enumerate(members)]
        return self._exchanged(own, members, cast("list[Form]", forms), objectives, buffers)

    def _asked(self, query: Query, here: bool) -> Evaluation | None:
        """Answers a query, with its own stream of random numbers, if this rank has to; else returns None."""
        batch = query.batch
        same = (i for i, known in enumerate(self._batches) if known is batch)
        number = next(same, len(self._batches)) if self._below.same_noise else len(self._batches)
        self._batches.append(batch)
        if not here:
            query.take()  # frees its memory
            return None
        with self._below.fork(torch.initial_seed(), self._pair.rank // 2, self.step, number):
            return super().ask([query])[0]

    def _exchanged(
        self,
        own: list[Evaluation | None],
        members: Sequence[int | None],
        forms: Sequence[Form],
        objectives: Sequence[Objective],
        buffers: list[Tensor],
    ) -> list[Evaluation]:
        """Returns all answers, and copies the buffers of the even rank; removes its own answers from the list."""
        member, device = self._pair.member, self.weights.tensors[0].device
        away, here = list[Tensor](), list[Tensor]()
        answers = list[Evaluation]()
        for i, (form, objective) in enumerate(zip(forms, objectives, strict=True)):
            answer, mine = own[i], (members[i] or 0) == member
            own[i] = None
            message, parts = message_like(form.templates(self.parameters), device)
            (away if mine else here).append(message)
            if mine and answer is not None:
                torch._foreach_copy_(parts, form.parts(answer))
            answers.append(form.answer(parts, answer, objective, self.parameters))
            del answer  # its gradient is in the message
        parts = list[Tensor]()
        if buffers:
            message, parts = message_like(buffers, device)
            (here if member else away).append(message)
            if not member:
                torch._foreach_copy_(parts, buffers)
        self._pair.exchange(away, here)
        if member:
            for buffer, part in zip(buffers, parts, strict=True):
                buffer.data.copy_(part)  # .data: the graph of another loss may hold the buffer
        for i, answer in enumerate(answers):
            if (members[i] or 0) != member and answer.grad is not None:
                self._below.note_overflow(answer.grad)  # an overflow on the other rank skips the step too
        return answers


def _model_oracle(oracle: Oracle) -> ModelOracle:
    while isinstance(oracle, View):
        if isinstance(oracle, _Shared):
            raise ValueError("InPairs is inside of another InPairs, and a pair shares a step once: leave out one")
        oracle = oracle.below
    if not isinstance(oracle, ModelOracle):
        raise TypeError(
            f"InPairs needs the oracle of a module, as SharpnessAware makes it, got {type(oracle).__name__}"
        )
    return oracle


def _members(queries: Sequence[Query]) -> list[int]:
    """Assigns queries to ranks: those at the weights to the even rank, to fill its `clean`, the others for balance."""
    members = [0 if query.tracks else None for query in queries]
    load = [members.count(0), 0]
    for i, member in enumerate(members):
        if member is None:
            members[i] = 0 if load[0] <= load[1] else 1
            load[members[i] or 0] += 1
    return cast("list[int]", members)
