"""Queries, and views of an oracle: parts of a method, shifted weights, queries without tracking."""

from __future__ import annotations

import copy
import pickle
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch

from bisam import ASAM, CRSAM, ERM, RSAM, SAM, Every, ModelOracle, SAMPa, Vector, cross_entropy, next_step
from bisam.oracle import Query
from bisam.perturbations import L2
from bisam.state import load, save
from tests.support import cases, references
from tests.support.doubles import ROWS, Quadratic, Recorder, shift
from tests.support.runs import close

# Views.


def test_a_part_has_a_memory_of_its_own_inside_that_of_the_whole():
    oracle = Recorder(2.0, 3.0)
    oracle.step, oracle.state = 7, {"v": 1}
    first, second = oracle.within("a"), oracle.within("b", step=2)
    first.state["v"], second.state["v"] = 2, 3
    first.within("c").state["v"] = 4
    assert oracle.state == {"v": 1, "a": {"v": 2, "c": {"v": 4}}, "b": {"v": 3}}
    assert (first.step, second.step, first.within("c").step) == (7, 2, 7)
    assert oracle.within("a").state["v"] == 2  # the next time


def test_a_part_does_not_change_what_was_remembered_before():
    """A step that fails goes back to it."""
    oracle = Recorder(2.0, 3.0)
    oracle.state = before = {"a": {"v": 1, "c": {"w": 1}}}
    kept = copy.deepcopy(before)
    oracle.state = dict(oracle.state)  # as a step begins
    part = oracle.within("a")
    part.state["v"] = 2
    part.within("c").state["w"] = 2
    assert before == kept
    assert oracle.state == {"a": {"v": 2, "c": {"w": 2}}}


def test_views_answer_for_the_oracle_below():
    oracle = Recorder(2.0, 3.0)
    for view in (
        oracle.within("a"),
        oracle.without_tracking(),
        oracle.shifted(shift(0, 0)),
        oracle.within("a").without_tracking().within("b"),
    ):
        assert (view.names, view.layers, view.loss) == (["w"], ["LayerNorm"], cross_entropy)
        assert view.parameters is oracle.parameters
        assert view.buffers is oracle.buffers
        assert torch.equal(view.weights.tensors[0], oracle.weights.tensors[0])


class Ranked(Recorder):
    """A rank of three that share a batch; `missing` is how many of the others miss what they have kept."""

    is_local, position = False, "1 of 3"

    def __init__(self, missing: int) -> None:
        super().__init__(2.0, 3.0)
        self.missing, self.reductions = missing, 0

    def averaged(self, value, count):
        self.reductions += 1
        return value / 3 + self.missing / 3, count


def saved_and_loaded(state: dict[str, Any]) -> dict[str, Any]:
    return load(save(state, SAMPa(ahead=next_step)), SAMPa(ahead=next_step), list(cases.mlp().parameters()))


def test_a_rank_finds_what_it_keeps_without_asking_the_others():
    oracle = Ranked(missing=1)
    oracle.within("a").keep("batch", ROWS)
    assert oracle.within("a").kept("batch") is ROWS
    assert oracle.reductions == 0
    assert oracle.kept("batch") is None  # the state of another part
    assert oracle.reductions == 1


@pytest.mark.parametrize("around", [saved_and_loaded, copy.deepcopy, lambda state: pickle.loads(pickle.dumps(state))])
@pytest.mark.parametrize("missing", [0, 1, 2])
def test_what_was_loaded_is_used_if_all_ranks_have_it(around, missing):
    oracle = Ranked(missing)
    oracle.keep("batch", (ROWS, 5))
    oracle.state = around(oracle.state)
    found = oracle.kept("batch")
    assert oracle.reductions == 1
    if missing:
        assert found is None
    else:
        assert torch.equal(found[0], ROWS)
        assert found[1] == 5
    oracle.position = "0 of 3"
    assert oracle.kept("batch") is None  # that of another rank


def test_a_batch_that_an_earlier_version_saved_is_that_of_one_rank():
    for oracle, expected in ((Recorder(2.0), (ROWS,)), (Ranked(missing=0), None)):
        oracle.state = {"batch": (ROWS,)}
        assert oracle.kept("batch") == expected


@pytest.mark.parametrize(
    ("view", "queries"),
    [
        (lambda o: o, [(None, None), ([1, 1], None)]),
        (lambda o: o.within("a"), [(None, None), ([1, 1], None)]),
        (lambda o: o.without_tracking(), [(None, False), ([1, 1], False)]),
        (lambda o: o.shifted(shift(3, 0)), [([3, 0], False), ([4, 1], False)]),
        (lambda o: o.shifted(shift(3, 0), track=True), [([3, 0], True), ([4, 1], False)]),
        (
            lambda o: o.shifted(shift(3, 0), track=True).shifted(shift(0, 2), track=True),
            [([3, 2], True), ([4, 3], False)],
        ),
        (lambda o: o.without_tracking().shifted(shift(3, 0), track=True), [([3, 0], False), ([4, 1], False)]),
        (lambda o: o.shifted(shift(3, 0), track=True).without_tracking(), [([3, 0], False), ([4, 1], False)]),
        (
            lambda o: o.without_tracking().within("a").shifted(shift(3, 0), track=True),
            [([3, 0], False), ([4, 1], False)],
        ),
    ],
)
def test_where_a_view_looks_and_what_moves_statistics(view, queries):
    def tracks(track: bool | None, at: Any) -> bool:
        return at is None if track is None else track

    oracle = Recorder(2.0, 3.0)
    seen = view(oracle)
    seen.query((ROWS,))
    seen.query((ROWS,), at=shift(1, 1))
    expected = [(at, tracks(track, at)) for at, track in queries]
    assert [(at, tracks(track, at)) for at, _, track in oracle.seen] == expected
    oracle.seen.clear()
    oracle.groups.clear()
    seen.ask([Query((ROWS,)), Query((ROWS,), at=shift(1, 1), grad=False)])
    assert [(at, tracks(track, at)) for at, _, track in oracle.seen] == expected
    assert [grad for _, grad, _ in oracle.seen] == [True, False]
    assert oracle.groups == [2]  # one call: a subclass may answer in parallel


@pytest.mark.parametrize(
    ("view", "expected"),
    [(lambda o: o, True), (lambda o: o.without_tracking(), False), (lambda o: o.shifted(shift(3, 0)), True)],
)
def test_asked_to_move_statistics_a_view_does_unless_it_is_still(view, expected):
    oracle = Recorder(2.0, 3.0)
    view(oracle).query((ROWS,), at=shift(1, 1), track=True)
    assert oracle.seen[0][2] == expected


@pytest.mark.parametrize(
    "around",
    [lambda m: m, lambda m: RSAM(0.1, m), lambda m: Every(1, m), lambda m: RSAM(0.1, Every(1, RSAM(0.1, m)))],
)
def test_what_does_not_depend_on_each_other_is_asked_together_at_any_depth(around):
    oracle = Recorder(2.0, 3.0)
    around(CRSAM())(oracle, (ROWS,))
    assert oracle.groups == [1, 2]
    oracle.groups.clear()
    for _ in range(2):
        around(SAMPa(ahead=lambda g, o: g * -0.1))(oracle, (ROWS,))
    assert oracle.groups == [1, 2, 2]  # at the first step the gradient at the weights comes before


def test_a_displacement_inside_a_random_point_is_added_to_it():
    oracle, centre = Recorder(2.0, 3.0), shift(3.0, 0.0)
    e = SAM(L2(0.5)).climb(Recorder(5.0, 3.0), (ROWS,))
    SAM(L2(0.5))(oracle.shifted(centre), (ROWS,))
    assert [at for at, _, _ in oracle.seen] == [[3.0, 0.0], (centre + e).tensors[0].tolist()]


# Shifted weights, and queries.


def test_shifted_is_the_oracle_of_the_moved_point():
    oracle, moved = Quadratic(2.0, 3.0), Quadratic(2.5, 1.0)
    by = moved.weights - oracle.weights
    shifted = oracle.shifted(by)
    assert torch.equal(shifted.weights.tensors[0], moved.weights.tensors[0])
    for method in (ERM(), SAM(L2(0.5)), ASAM(0.5)):
        close(method(shifted, (ROWS,)).gradient.tensors[0], method(moved, (ROWS,)).gradient.tensors[0], 1e-12)
    twice = shifted.shifted(by * -1)
    close(ERM()(twice, (ROWS,)).gradient.tensors[0], ERM()(oracle, (ROWS,)).gradient.tensors[0], 1e-12)
    assert torch.equal(oracle.weights.tensors[0], torch.tensor([2.0, 3.0]).double())


def test_shifted_shares_state_step_and_names():
    oracle = Quadratic(2.0, 3.0)
    oracle.step = 5
    shifted = oracle.shifted(oracle.weights)
    shifted.state["v"] = 1
    assert (oracle.state, shifted.step, shifted.names) == ({"v": 1}, 5, ["w"])


def test_shifted_model_oracle_leaves_weights_and_statistics():
    model, batch = cases.convnet(), cases.batch()
    before = cases.everything(model)
    oracle = ModelOracle(model, cross_entropy)
    by = oracle.weights * 0.1
    answer = ERM()(oracle.shifted(by), batch)
    assert cases.everything(model) == before
    references.load(model, references.flat(model) * 1.1)
    close(answer.value, cross_entropy(model(batch[0]), batch[1]).mean().detach(), 1e-12)


def test_several_queries_are_answered_in_order():
    oracle = Quadratic(2.0, 3.0)
    e = oracle.weights * 0.1
    plain, displaced, value = oracle.ask([Query((ROWS,)), Query((ROWS,), at=e), Query((ROWS[:1],), grad=False)])
    assert torch.equal(plain.losses, oracle.query((ROWS,)).losses)
    assert torch.equal(displaced.losses, oracle.query((ROWS,), at=e).losses)
    assert value.grad is None
    assert value.losses.shape == (1,)


def test_a_query_is_constant_and_gives_its_displacement_away_once():
    e = Vector([torch.ones(2)])
    query = Query((ROWS,), at=e, track=None)
    with pytest.raises(FrozenInstanceError):
        query.grad = False
    assert query.displaced
    assert not query.tracks
    assert query.take() is e
    assert query.at is None
    assert query.displaced
    assert not query.tracks
    with pytest.raises(RuntimeError, match="taken already"):
        query.take()


def test_a_query_at_the_weights_may_be_asked_again():
    query = Query((ROWS,))
    assert query.take() is None
    assert query.take() is None
    assert query.tracks
    assert not Query((ROWS,), track=False).tracks


def test_a_displaced_query_is_asked_once():
    oracle = Quadratic(2.0, 3.0)
    queries = [Query((ROWS,), at=oracle.weights * 0.1)]
    oracle.ask(queries)
    with pytest.raises(RuntimeError, match="ask with a new Query"):
        oracle.ask(queries)
