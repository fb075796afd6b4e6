"""Parallel: the independent queries of a method, answered by two processes at once.

SAMPa is made for it (Xie et al., 2024): of its two gradients each process of a pair takes one, both get both, and a
step takes about as long as one of plain training. The numbers are those of one process:

    # torchrun --nproc-per-node 2 train.py
    sampler = DistributedSampler(data, num_replicas=replicas(), rank=replica())
    sharp = SharpnessAware(model, InPairs(SAMPa(ahead=next_step(optimizer))), cross_entropy)

Ranks 0 and 1 are a pair, so are 2 and 3, and so on; a pair is to its data and weights what one process is. Of several
pairs each perturbs for its own part of the data, and DistributedDataParallel around the loss averages over them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor

from bisam.evaluation import Batch, Evaluation
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
from bisam.validation import instance


@dataclass(frozen=True)
class InPairs:
    """Any method, its independent queries answered by two ranks at once: SAMPa's two, or CRSAM's two displaced ones.

    All else both ranks do alike, so that weights and memory are the same on both, and those of the method alone, bit
    for bit where the hardware computes the same bits twice; a checkpoint of one rank is one of both. Make it the
    outermost method. All ranks of the process group take part.

    Running statistics move on the even rank, as in the method alone, and are copied to the odd one. `clean` is filled
    where the query at the weights was made: of SAMPa on even ranks only, and it raises RuntimeError on odd ones. An
    answer that came from the other rank has losses and gradient, but no outputs and no targets.

    Forward passes draw from streams of their own, seeded by `torch.initial_seed()`, the pair and the step: dropout
    masks differ from those of one process, and the user's generators are left as they were. What a method draws itself,
    a random mask say, comes from the user's generators, which must then agree on both ranks.

    At the first step, and ever more rarely after it (2nd, 4th, 8th, ...), the ranks make sure that they have the same
    weights, memory and batch, which waits for the device. Beside each exchange their hosts tell each other what they
    have asked for, and whether it failed, which does not.

    Args:
        method: what is done.

    Raises:
        TypeError: `method` is no method.

    Called, it raises:
        TypeError: the oracle is not that of a module.
        ValueError: there is no process group of an even number of ranks; it is inside another InPairs; the model has a
            wrapper that must be around the loss; the ranks of a pair differ in weights, memory, batch or generators.
        RuntimeError: the other rank failed or is gone. As after any error, the weights are as before the step.
    """

    method: Method
    transparent: ClassVar[bool] = True

    def __post_init__(self) -> None:
        instance("method", self.method, "SAMPa(ahead=next_step(optimizer)) or another (oracle, batch) -> Evaluation")

    def __call__(self, oracle: Oracle, batch: Batch) -> Evaluation:
        """The method's queries; of those that are independent each rank asks its own."""
        below = _model_oracle(oracle)
        pair = own_pair()
        if not below.parameters:
            return self.method(oracle, batch)  # which refuses
        pair.begin(below, oracle, batch)
        return self.method(_Shared(oracle, below, pair), batch)


def replicas() -> int:
    """Number of pairs: in how many parts the data is, `num_replicas` of a DistributedSampler.

    Raises:
        ValueError: there is no process group of an even number of ranks.
    """
    return rank_and_size()[1] // 2


def replica() -> int:
    """Number of this rank's pair: which part of the data is its own, `rank` of a DistributedSampler.

    Raises:
        ValueError: there is no process group of an even number of ranks.
    """
    return rank_and_size()[0] // 2


class _Shared(View):
    """An oracle whose independent queries are asked by the ranks of a pair in parts."""

    def __init__(self, oracle: Oracle, below: ModelOracle, pair: Pair) -> None:
        super().__init__(oracle)
        self._below, self._pair = below, pair
        self._exchanges, self._batches = 0, list[Batch]()
        self._before = below.random_state().tensors
        _ = below.module_buffers.untouched  # what a failed step goes back to, also if the other rank moves them first

    def ask(self, queries: Sequence[Query]) -> list[Evaluation]:
        """See `Oracle.ask`; several are divided between the ranks, a single one is asked by both.

        Then the answer of the even rank counts.
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
        except Exception as error:
            with suppress(RuntimeError):  # if the other one is gone, the error here is the one to see
                pair.swap(Note(place, error=f"{type(error).__name__}: {error}"[:1000]))
            raise
        generators = self._below.random_state().tensors
        drawn = ["" if torch.equal(a, b) else digest(b) for a, b in zip(self._before, generators, strict=True)]
        buffers = list(self.buffers) if moving else []
        note = Note(
            place,
            shapes,
            drawn,
            digest([(b.shape, b.dtype) for b in buffers]),
            [None if answer is None else Form.of(answer) for answer in own],
        )
        theirs: Note = pair.swap(note)
        pair.check(note, theirs)
        forms = [(note, theirs)[(member or 0) != pair.member].forms[i] for i, member in enumerate(members)]
        return self._exchanged(own, members, cast("list[Form]", forms), objectives, buffers)

    def _asked(self, query: Query, here: bool) -> Evaluation | None:
        """The answer to a query, from a stream of random numbers that is its own, if it is asked here."""
        batch = query.batch
        same = (i for i, known in enumerate(self._batches) if known is batch)
        number = next(same, len(self._batches)) if self._below.same_noise else len(self._batches)
        self._batches.append(batch)
        if not here:
            query.take()  # its memory is free meanwhile
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
        """All answers, and buffers as the even rank has them; takes its own ones out of the list."""
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
            answers.append(form.answer(parts, answer, objective))
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
                buffer.data.copy_(part)  # .data: the graph of another loss may hold it
        for i, answer in enumerate(answers):
            if (members[i] or 0) != member and answer.grad is not None:
                self._below.note_overflow(answer.grad)  # also an overflow on the other rank skips the step
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
    """Who asks which query: those at the weights the even one, whose `clean` they fill; the others even it out."""
    members = [0 if query.tracks else None for query in queries]
    load = [members.count(0), 0]
    for i, member in enumerate(members):
        if member is None:
            members[i] = 0 if load[0] <= load[1] else 1
            load[members[i] or 0] += 1
    return cast("list[int]", members)
