"""Memory and views: what a method remembers on its way to a file and back, under an overflow, and in its parts."""

from __future__ import annotations

import copy
import io
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from bisam import (
    ASAM,
    CRSAM,
    ERM,
    ESAM,
    FSAM,
    KSAM,
    MSAM,
    RSAM,
    SAM,
    BiSAM,
    EBiSAM,
    Evaluation,
    Every,
    LookSAM,
    ModelOracle,
    NegLog,
    SAMPa,
    SharpnessAware,
    Vector,
    cross_entropy,
)
from bisam.batches import take
from bisam.methods.method import stateful
from bisam.oracle import Query
from bisam.perturbations import L2, Friendly, Smoothed
from bisam.schedules import Cosine
from bisam.state import kind, load, save, settled
from tests.support import cases

PARAMETERS = [nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(()))]


def vector(seed: int, holes: frozenset[int] = frozenset()) -> Vector:
    generator = torch.Generator().manual_seed(seed)
    return Vector([torch.randn(p.shape, generator=generator) for p in PARAMETERS], holes)


def plain(value: Any) -> Any:
    """A value that `==` compares: tensors with type and bits, Vectors with holes."""
    if isinstance(value, Vector):
        return "vector", [plain(t) for t in value], sorted(value.holes)
    if isinstance(value, Tensor):
        return value.dtype, value.shape, cases.bits(value)
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value), [plain(v) for v in value]
    return type(value), value


def through_a_file(state: dict[str, Any]) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# To a file and back.

leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**40), 2**40),
    st.floats(allow_nan=False),
    st.text(max_size=3),
    st.builds(vector, st.integers(0, 9), st.sets(st.integers(0, 1)).map(frozenset)),
    st.builds(
        lambda n, d: torch.arange(n).to(d), st.integers(0, 3), st.sampled_from([torch.half, torch.bool, torch.long])
    ),
)
nests = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=3), inner, min_size=1, max_size=3),
    ),
    max_leaves=6,
)


@settings(deadline=None, derandomize=True)
@given(st.dictionaries(st.text(max_size=3), nests, max_size=3))
def test_a_memory_comes_back_from_a_file_as_it_was(state):
    def filled(value: Any) -> bool:
        return not isinstance(value, dict) or any(filled(v) for v in value.values())

    state = {k: v for k, v in state.items() if filled(v)}
    saved = save(state, FSAM())
    assert plain(load(through_a_file(saved), FSAM(), PARAMETERS)) == plain(state)


def test_what_is_loaded_is_a_copy():
    saved = save({"v": vector(0), "n": torch.ones(2), "list": [torch.ones(1)]}, FSAM())
    before = plain(saved)
    state = load(saved, FSAM(), PARAMETERS)
    for t in (*state["v"], state["n"], state["list"][0]):
        t.zero_()
    assert plain(saved) == before


def test_a_vector_comes_back_in_the_layout_of_the_parameters():
    parameters = [nn.Parameter(torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last))]
    v = Vector([torch.randn(2, 3, 4, 4, dtype=torch.double)])
    (t,) = load(save({"v": v}, FSAM()), FSAM(), parameters)["v"]
    assert torch.equal(t, v.tensors[0])
    assert t.is_contiguous(memory_format=torch.channels_last)


def test_a_slice_of_a_data_set_does_not_bring_the_data_set():
    data = torch.zeros(100_000)
    file = io.BytesIO()
    torch.save(save({"batch": (data[:4], data[4:8].view(2, 2))}, FSAM()), file)
    assert file.tell() < 4000


def test_no_memory_is_saved_without_a_name():
    assert save({}, FSAM()) == save({"perturb": {}, "method": {"perturb": {}}}, FSAM()) == {"method": None, "state": {}}


@pytest.mark.parametrize("change", ["shape", "number", "order"])
def test_a_vector_of_another_model_is_refused(change):
    saved = save({"deep": {"list": [vector(0)]}}, FSAM())
    others = {
        "shape": [nn.Parameter(torch.zeros(3, 2)), PARAMETERS[1]],
        "number": PARAMETERS[:1],
        "order": PARAMETERS[::-1],
    }
    with pytest.raises(ValueError, match="another model"):
        load(saved, FSAM(), others[change])


# Whose memory.


@pytest.mark.parametrize(
    ("method", "name"),
    [
        (ERM(), "ERM"),
        (LookSAM(k=7), "LookSAM"),
        (LookSAM(ASAM(2.0).perturb), "LookSAM"),
        (BiSAM(0.1), "SAM"),
        (KSAM(4, FSAM()), "KSAM(method=SAM(perturb=Friendly))"),
        (Every(3, LookSAM(), ERM()), "Every(method=LookSAM)"),
        (Every(3, ERM(), LookSAM()), "Every(otherwise=LookSAM)"),
        (cross_entropy.__call__, "CrossEntropy.__call__"),
    ],
    ids=str,
)
def test_a_method_is_named_by_its_classes(method, name):
    assert kind(method) == name


@pytest.mark.parametrize(
    ("saved", "here"),
    [
        (FSAM(), LookSAM()),
        (KSAM(4, FSAM()), FSAM()),
        (Every(2, FSAM(), ERM()), Every(2, ERM(), FSAM())),
        (SAM(Friendly(Smoothed())), SAM(Smoothed(Friendly()))),
    ],
)
def test_the_memory_of_another_method_is_refused_by_both_names(saved, here):
    with pytest.raises(ValueError, match=re.escape(f"memory of {kind(saved)}, and the method here is {kind(here)}: ")):
        load(save({"m": vector(0)}, saved), here, PARAMETERS)


def test_the_numbers_of_a_schedule_are_numbers():
    saved = save({"v": vector(0)}, LookSAM(L2(Cosine(0.2, 0.1, steps=9)), k=3))
    assert "v" in load(saved, LookSAM(L2(Cosine(0.1, 0.0, steps=5))), PARAMETERS)


def test_a_memory_from_before_methods_were_named_is_taken():
    saved = save({"m": vector(0)}, FSAM())
    del saved["method"]
    assert plain(load(saved, FSAM(), PARAMETERS)) == plain({"m": vector(0)})


@pytest.mark.parametrize(
    ("method", "name"),
    [
        (SAM(), None),
        (ESAM(), None),
        (lambda oracle, batch: None, None),
        (FSAM(), "Friendly"),
        (KSAM(3, RSAM(0.1, LookSAM())), "LookSAM"),
        (Every(2, ERM(), MSAM(2, FSAM(), separate=True)), "Friendly"),
    ],
)
def test_what_remembers_is_found_at_any_depth(method, name):
    assert stateful(method) == name


# Overflows.

FINE, BAD = torch.tensor(0.0), torch.tensor(float("nan"))
OLD = {"v": vector(0, frozenset({1})), "deep": {"list": [torch.tensor(1.0), 5]}, "batch": (torch.arange(3), "x")}
NEW = {"v": vector(1, frozenset({0, 1})), "deep": {"list": [torch.tensor(2.0), 5]}, "batch": (torch.arange(3) + 1, "x")}
OTHERS = {
    "new": NEW,
    "another number": {**NEW, "deep": {"list": [torch.tensor(2.0), 6]}},
    "another shape": {**NEW, "batch": (torch.arange(4), "x")},
    "another type": {**NEW, "batch": (torch.arange(3.0), "x")},
    "another structure": {**NEW, "more": 1},
    "less": {"v": NEW["v"]},
    "nothing": {},
}


@pytest.mark.parametrize("new", OTHERS.values(), ids=OTHERS)
def test_an_overflow_leaves_the_memory_that_was(new):
    if new:
        assert plain(settled(new, OLD, BAD)) in (plain(OLD), plain(merged_holes(OLD, new)))
        assert plain(settled(OLD, {}, BAD)) == plain({})
    assert plain(settled(new, OLD, None)) == plain(new)


def merged_holes(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Zeros are zeros by structure where they are in both: nobody waits to know which one it is."""
    return {**old, "v": Vector(old["v"].tensors, old["v"].holes & new["v"].holes)}


@pytest.mark.parametrize("new", OTHERS.values(), ids=OTHERS)
def test_no_overflow_takes_the_new_memory(new):
    assert plain(settled(new, OLD, FINE)) in (plain(new), plain(merged_holes(new or OLD, OLD)))
    assert plain(settled(new, {}, FINE)) == plain(new)


class Array:
    """As numpy's, `==` answers for each entry."""

    __hash__ = None

    def __eq__(self, other: object) -> Any:
        return torch.ones(2) == 1


@pytest.mark.parametrize("overflow", [FINE, BAD])
def test_what_cannot_be_compared_is_chosen_as_a_whole(overflow):
    """A batch may hold anything."""
    old, new = {"v": vector(0), "batch": Array()}, {"v": vector(1), "batch": Array()}
    assert settled(new, old, overflow) is (new if overflow is FINE else old)


def test_a_memory_full_of_nan_is_gone():
    poisoned = tree_map(lambda t: t * float("nan") if isinstance(t, Tensor) else t, {"m": torch.ones(3), "n": 1})
    assert plain(settled(poisoned, {"m": torch.zeros(3), "n": 1}, BAD)) == plain({"m": torch.zeros(3), "n": 1})


# Parts of a method, and other centres.

A = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.double)


class Recorder(cases.Quadratic):
    """A fake oracle that notes what reaches it, and answers."""

    def __init__(self, *w: float) -> None:
        super().__init__(*w)
        self.seen: list[tuple[Any, ...]] = []
        self.groups: list[int] = []
        self.layers, self.loss = ["LayerNorm"], cross_entropy
        self.parameters = [nn.Parameter(self.weights.tensors[0])]

    def ask(self, queries):
        self.groups.append(len(queries))
        self.seen += [(None if q.at is None else q.at.tensors[0].tolist(), q.grad, q.track) for q in queries]
        return super().ask(queries)


def shift(*values: float) -> Vector:
    return Vector([torch.tensor(values, dtype=torch.double)])


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
    seen.query((A,))
    seen.query((A,), at=shift(1, 1))
    expected = [(at, tracks(track, at)) for at, track in queries]
    assert [(at, tracks(track, at)) for at, _, track in oracle.seen] == expected
    oracle.seen.clear()
    oracle.groups.clear()
    seen.ask([Query((A,)), Query((A,), at=shift(1, 1), grad=False)])
    assert [(at, tracks(track, at)) for at, _, track in oracle.seen] == expected
    assert [grad for _, grad, _ in oracle.seen] == [True, False]
    assert oracle.groups == [2]  # one call: a subclass may answer in parallel


@pytest.mark.parametrize(
    ("view", "expected"),
    [(lambda o: o, True), (lambda o: o.without_tracking(), False), (lambda o: o.shifted(shift(3, 0)), True)],
)
def test_asked_to_move_statistics_a_view_does_unless_it_is_still(view, expected):
    oracle = Recorder(2.0, 3.0)
    view(oracle).query((A,), at=shift(1, 1), track=True)
    assert oracle.seen[0][2] == expected


@pytest.mark.parametrize(
    "around",
    [lambda m: m, lambda m: RSAM(0.1, m), lambda m: Every(1, m), lambda m: RSAM(0.1, Every(1, RSAM(0.1, m)))],
)
def test_what_does_not_depend_on_each_other_is_asked_together_at_any_depth(around):
    oracle = Recorder(2.0, 3.0)
    around(CRSAM())(oracle, (A,))
    assert oracle.groups == [1, 2]
    oracle.groups.clear()
    for _ in range(2):
        around(SAMPa(ahead=lambda g, o: g * -0.1))(oracle, (A,))
    assert oracle.groups == [1, 2, 2]  # at the first step the gradient at the weights comes before


def test_a_displacement_inside_a_random_point_is_added_to_it():
    oracle, centre = Recorder(2.0, 3.0), shift(3.0, 0.0)
    e = SAM(L2(0.5)).climb(Recorder(5.0, 3.0), (A,))
    SAM(L2(0.5))(oracle.shifted(centre), (A,))
    assert [at for at, _, _ in oracle.seen] == [[3.0, 0.0], (centre + e).tensors[0].tolist()]


# Batches and what is known of their losses.


def test_examples_are_taken_from_tensors_at_any_depth():
    x, y, mask = torch.arange(12).view(4, 3), torch.arange(4), torch.ones(4, dtype=torch.bool)
    index = torch.tensor([3, 1])
    a, (b, c), d = take(({"x": x, "mask": mask}, [y, y + 1], (y,)), index)
    assert torch.equal(a["x"], x[[3, 1]])
    assert a["mask"].shape == (2,)
    assert torch.equal(b, y[[3, 1]])
    assert torch.equal(c, b + 1)
    assert isinstance(d, tuple)
    assert torch.equal(d[0], b)


def test_what_is_no_tensor_is_taken_whole_and_sizes_must_agree():
    x = torch.arange(4)
    assert take((x, "text", None, torch.tensor(3.0)), torch.tensor([1]))[1:3] == ("text", None)
    with pytest.raises(ValueError, match=r"4.*3|3.*4"):
        take((x, x[:3]), torch.tensor([0]))


def tokens() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """Sequences of five positions, some of which do not count."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 4)).double()
    x, y = torch.randint(7, (6, 5)), torch.randint(4, (6, 5))
    y[torch.rand(6, 5) < 0.3] = -100
    return model, (x, y)


def by_position(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return model(x).transpose(1, 2), y


def test_another_objective_on_the_same_outputs_is_a_query_without_a_forward_pass():
    model, batch = tokens()
    oracle = ModelOracle(model, cross_entropy, by_position)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    seen = oracle.query(batch)
    for objective in (NegLog(), lambda z, y: cross_entropy(z, y).sum() / 2):
        under, asked = seen.under(objective), oracle.query(batch, objective, grad=False)
        assert torch.equal(under.losses, asked.losses)
        assert torch.equal(under.value, asked.value)
        assert under.grad is None
        assert under.objective is objective
    assert len(calls) == 3


def test_losses_of_positions_are_those_of_their_examples():
    losses = torch.arange(12.0).view(2, 3, 2)
    assert Evaluation(losses).per_example.tolist() == [2.5, 8.5]
    assert Evaluation(losses[:, 0, 0]).per_example.tolist() == [0.0, 6.0]
    with pytest.raises(TypeError, match="scalar"):
        _ = Evaluation(losses.mean()).per_example


def test_positions_that_do_not_count_do_not_make_an_example_easier():
    model, (x, y) = tokens()
    seen = ModelOracle(model, cross_entropy, by_position).query((x, y))
    counted = (y != -100).sum(1)
    torch.testing.assert_close(seen.per_example, seen.losses.sum(1) / counted.clamp_min(1), rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    "method", [KSAM(2, SAM()), ESAM(L2(0.05)), EBiSAM(beta=1.0), KSAM(3, RSAM(0.01, EBiSAM()))], ids=str
)
def test_methods_that_choose_examples_choose_sequences(method):
    model, batch = tokens()
    sharp = SharpnessAware(model, method, cross_entropy, by_position)
    loss = sharp(*batch)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_ksam_of_sequences_takes_the_hardest():
    model, (x, y) = tokens()
    losses = ModelOracle(model, cross_entropy, by_position).query((x, y)).per_example
    rows = losses.topk(2).indices
    first = SharpnessAware(model, KSAM(2, ERM()), cross_entropy, by_position)(x, y)
    expected = cross_entropy(*by_position(model, x[rows], y[rows])).sum() / (y[rows] != -100).sum()
    torch.testing.assert_close(first, expected, rtol=0, atol=1e-12)


def test_a_failed_load_of_a_deep_state_leaves_the_old_one():
    run = SharpnessAware(cases.mlp(), FSAM(), cross_entropy)
    run(*cases.batch())
    before = plain(run.get_extra_state())
    other = SharpnessAware(nn.Linear(6, 4).double(), FSAM(), cross_entropy)
    other(*cases.batch())
    with pytest.raises(ValueError, match="another model"):
        run.set_extra_state(other.get_extra_state())
    assert plain(run.get_extra_state()) == before
