"""State of methods: saved, loaded, copied, resumed, and kept through an overflow."""

from __future__ import annotations

import copy
import io
import pickle
import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from bisam import (
    ASAM,
    ERM,
    ESAM,
    FSAM,
    KSAM,
    MSAM,
    RSAM,
    SAM,
    BiSAM,
    Evaluation,
    Every,
    LookSAM,
    Only,
    SharpnessAware,
    Vector,
    cross_entropy,
)
from bisam.methods.method import stateful
from bisam.perturbations import L2, Friendly, Smoothed
from bisam.schedules import Cosine
from bisam.state import check, kind, load, save, settled
from tests.support import cases
from tests.support.cases import bits, normed, parameters
from tests.support.runs import each_basic_method, grads_of, run_steps, twins

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


# Saving and loading.

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


@pytest.mark.parametrize("shapes", [[(3, 2), ()], [(2, 3), (1,)], [(), (2, 3)], [(2, 3)]], ids=str)
def test_the_memory_of_other_parameters_is_not_used(shapes):
    """Also if as many are trained as before, some having been frozen and others not."""
    state = {"deep": {"list": [vector(0)]}}
    check(state, vector(1))
    with pytest.raises(ValueError, match=rf"remembers 2 parameters, and now {len(shapes)} are trained, or others"):
        check(state, Vector([torch.zeros(shape) for shape in shapes]))


def test_training_other_parameters_than_those_remembered_is_refused():
    model = cases.mlp()
    first, last = model[0].weight, model[-1].weight
    last.requires_grad_(False)
    sharp = SharpnessAware(model, FSAM(), cross_entropy)
    sharp(*cases.batch())
    first.requires_grad_(False)
    last.requires_grad_(True)
    with pytest.raises(ValueError, match="frozen, unfrozen or sharded since"):
        sharp(*cases.batch())


# State of another method.


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


G = vector(9)  # a finite gradient


@pytest.fixture(params=[True, False], ids=["on a CPU", "on a device"])
def waits(request, monkeypatch):
    """Whether the condition is read at once, as on a CPU, or not, as on a device, which would have to be waited for."""
    if not request.param:
        monkeypatch.setattr("bisam.state.known", lambda condition: None)
    return request.param


@pytest.mark.parametrize("new", OTHERS.values(), ids=OTHERS)
def test_an_overflow_leaves_the_memory_that_was(new, waits):
    if new:
        assert plain(settled(new, OLD, G, BAD)) in (plain(OLD), plain(merged_holes(OLD, new)))
        assert plain(settled(OLD, {}, G, BAD)) == plain({})
    assert plain(settled(new, OLD, G)) in (plain(new), plain(merged_holes(new or OLD, OLD)))


def merged_holes(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Zeros are zeros by structure where they are in both: nobody waits to know which one it is."""
    return {**old, "v": Vector(old["v"].tensors, old["v"].holes & new["v"].holes)}


@pytest.mark.parametrize("new", OTHERS.values(), ids=OTHERS)
def test_no_overflow_takes_the_new_memory(new, waits):
    assert plain(settled(new, OLD, G, FINE)) in (plain(new), plain(merged_holes(new or OLD, OLD)))
    assert plain(settled(new, {}, G, FINE)) == plain(new)


class Array:
    """As numpy's, `==` answers for each entry."""

    __hash__ = None

    def __eq__(self, other: object) -> Any:
        return torch.ones(2) == 1


@pytest.mark.parametrize("overflow", [FINE, BAD])
def test_what_cannot_be_compared_is_chosen_as_a_whole(overflow, waits):
    """A batch may hold anything."""
    old, new = {"v": vector(0), "batch": Array()}, {"v": vector(1), "batch": Array()}
    assert settled(new, old, G, overflow) is (new if overflow is FINE else old)


def test_a_memory_full_of_nan_is_gone(waits):
    poisoned = tree_map(lambda t: t * float("nan") if isinstance(t, Tensor) else t, {"m": torch.ones(3), "n": 1})
    assert plain(settled(poisoned, {"m": torch.zeros(3), "n": 1}, G, BAD)) == plain({"m": torch.zeros(3), "n": 1})


# Entries that are not finite.

NOT_FINITE = [float("nan"), float("inf"), -float("inf")]


def spoiled(v: Vector, value: float) -> Vector:
    first = v.tensors[0].clone()
    first[1, 2] = value
    return v.like([first, *v.tensors[1:]], v.holes)


@pytest.mark.parametrize("value", NOT_FINITE)
def test_a_gradient_that_is_not_finite_leaves_the_memory_that_was(value, waits):
    assert plain(settled(NEW, OLD, spoiled(G, value))) in (plain(OLD), plain(merged_holes(OLD, NEW)))
    assert plain(settled(NEW, {}, spoiled(G, value))) == plain({})


@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize(
    "bad",
    [
        lambda value: {"v": spoiled(vector(1), value)},
        lambda value: {"part": {"list": [torch.tensor(value)]}},
        lambda value: {"part": {"list": [torch.tensor(value, dtype=torch.cfloat)]}},
        lambda value: {"number": value},
    ],
    ids=["vector", "tensor", "complex tensor", "number"],
)
def test_a_memory_that_would_not_be_finite_stays_as_it_was(bad, value, waits):
    old = {"v": vector(0), "part": {"list": [torch.tensor(1.0)]}, "number": 1.0}
    assert plain(settled({**old, **bad(value)}, old, G)) == plain(old)
    assert plain(settled({**old, **bad(value)}, {}, G)) == plain({})


def test_entries_of_a_batch_and_those_that_were_there_need_not_be_finite(waits):
    mask = torch.tensor([0.0, -torch.inf])
    old = {"v": vector(0), "batch": (mask,), "best": torch.tensor(torch.inf), "other": spoiled(vector(2), torch.inf)}
    new = {**old, "v": vector(1), "batch": (mask * 1,)}
    assert plain(settled(new, old, G)) == plain(new)
    assert plain(settled(new, old, spoiled(G, torch.inf))) == plain(old)


def test_finite_entries_may_have_any_magnitude():
    large = {"v": Vector([torch.full((2, 3), 3e38), torch.tensor(3e38)])}
    assert settled(large, {"v": vector(0)}, large["v"]) is large


@pytest.mark.parametrize(
    "less", [{"v": OLD["v"], "deep": {"list": OLD["deep"]["list"]}}, {**OLD, "deep": {"list": OLD["deep"]["list"][:1]}}]
)
def test_what_a_bad_step_removed_is_there_again(less, waits):
    assert plain(settled(less, OLD, spoiled(G, torch.nan))) == plain(OLD)
    assert plain(settled(less, OLD, G)) == plain(less)


def test_a_mask_is_not_searched_for_nan():
    masks = [{"mask": Vector([torch.full((2, 3), value), torch.tensor(True)])} for value in (True, False)]
    assert settled(*masks, G) is masks[0]


def test_a_step_that_wrote_nothing_is_not_searched(monkeypatch):
    monkeypatch.setattr("bisam.state.finite", lambda vectors: pytest.fail("searched"))
    state = {"v": vector(0), "part": {}}
    assert settled({**state, "more": {}}, state, G)["v"] is state["v"]
    assert settled({}, {}, G) == {}


def test_a_failed_load_of_a_deep_state_leaves_the_old_one():
    run = SharpnessAware(cases.mlp(), FSAM(), cross_entropy)
    run(*cases.batch())
    before = plain(run.get_extra_state())
    other = SharpnessAware(nn.Linear(6, 4).double(), FSAM(), cross_entropy)
    other(*cases.batch())
    with pytest.raises(ValueError, match="another model"):
        run.set_extra_state(other.get_extra_state())
    assert plain(run.get_extra_state()) == before


# Copies and checkpoints.


@dataclass(frozen=True)
class MomentumAscent:
    """A method with a memory: it climbs an average of the ascent gradients, farther in each odd step."""

    rho: float = 0.3
    beta: float = 0.8

    def __call__(self, oracle, batch) -> Evaluation:
        g = oracle.query(batch).gradient
        m = oracle.state.get("m")
        m = g if m is None else m * self.beta + g * (1 - self.beta)
        oracle.state["m"] = m
        oracle.state["more"] = {"norms": [*oracle.state.get("more", {"norms": []})["norms"], m.norm()]}
        return oracle.query(batch, at=L2(self.rho * (1 + oracle.step % 2))(m, oracle))


class OneUnused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.unused, self.net = nn.Linear(2, 2).double(), normed()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@pytest.mark.parametrize("optimizer", cases.OPTIMIZERS)
@pytest.mark.parametrize("method", [SAM(), BiSAM(), ASAM(0.5), MomentumAscent(), MSAM(8, MomentumAscent())], ids=str)
def test_resumed_equals_uninterrupted(method, optimizer):
    make, (model, fresh) = cases.OPTIMIZERS[optimizer], twins(OneUnused)
    sharp = SharpnessAware(model, method, cross_entropy)
    optimizer = make(model.parameters())
    run_steps(sharp, optimizer, range(3))
    file = io.BytesIO()
    torch.save({"sharp": sharp.state_dict(), "optimizer": optimizer.state_dict()}, file)
    whole = run_steps(sharp, optimizer, range(3, 7))

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    nn.init.normal_(fresh.net[0].weight)
    resumed = SharpnessAware(fresh, method, cross_entropy)
    resumed.load_state_dict(saved["sharp"])
    optimizer = make(fresh.parameters())
    optimizer.load_state_dict(saved["optimizer"])
    assert run_steps(resumed, optimizer, range(3, 7)) == whole
    assert resumed.get_extra_state()["step"] == 7


def test_resume_from_the_model_alone_is_exact_for_a_method_without_memory():
    (model, fresh), batch = twins(normed), cases.batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sharp = SharpnessAware(model, BiSAM(), cross_entropy)
    run_steps(sharp, optimizer, range(2))
    fresh.load_state_dict(model.state_dict())
    other = SharpnessAware(fresh, BiSAM(), cross_entropy)
    assert all(
        torch.equal(g, h) for g, h in zip(grads_of(sharp(*batch), model), grads_of(other(*batch), fresh), strict=True)
    )


@pytest.mark.parametrize(
    ("wrap", "place"),
    [(lambda model: model, "sharp.model"), (nn.DataParallel, "sharp.model.module")],
    ids=["model", "in"],
)
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    "make", [normed, lambda: nn.ModuleDict({"model": nn.Linear(2, 2)})], ids=["plain", "named model"]
)
def test_the_weights_of_the_model_alone_are_refused_with_where_to_load_them(make, wrap, place, strict):
    sharp = SharpnessAware(wrap(make()), BiSAM(), cross_entropy)
    with pytest.raises(RuntimeError) as caught:
        sharp.load_state_dict(make().state_dict(), strict=strict)
    assert str(caught.value).startswith(f"these are the weights of the model alone: {place}.load_state_dict(...) loads")
    assert len(str(caught.value)) < 300
    sharp.load_state_dict(sharp.state_dict(), strict=strict)


def test_other_state_dicts_are_left_to_torch():
    sharp = SharpnessAware(nn.Linear(2, 2), BiSAM(), cross_entropy)
    with pytest.raises(RuntimeError, match="Missing key"):
        sharp.load_state_dict({"other.weight": torch.ones(2, 2)})
    assert sharp.load_state_dict({}, strict=False).missing_keys
    sharp.load_state_dict({f"model.{name}": t for name, t in nn.Linear(2, 2).state_dict().items()}, strict=False)


def test_a_loaded_state_is_a_copy_with_its_holes():
    sharp = SharpnessAware(OneUnused(), MomentumAscent(), cross_entropy)
    sharp(*cases.batch())
    state = sharp.state_dict()
    assert state["_extra_state"]["state"]["m"]["holes"] == [0, 1]
    other = SharpnessAware(OneUnused(), MomentumAscent(), cross_entropy)
    other.load_state_dict(state)
    first = state["_extra_state"]["state"]["m"]["__vector__"][2]
    expected = bits(first)
    first.zero_()
    state = other.state_dict()["_extra_state"]["state"]["m"]
    assert bits(state["__vector__"][2]) == expected
    assert state["holes"] == [0, 1]


def test_structural_zeros_are_saved_with_memory_for_each_entry():
    """A checkpoint is loaded into these tensors in place; the method itself keeps one number for all of them."""
    sharp = SharpnessAware(cases.mlp(), SAM(Only(lambda name, p: name == "2.bias", Friendly(L2(0.1)))), cross_entropy)
    sharp(*cases.batch())
    (m,) = tree_leaves(sharp._memory.state, is_leaf=lambda leaf: isinstance(leaf, Vector))
    assert m.holes == {0, 1, 2}
    assert [t.untyped_storage().nbytes() for t in m] == [8, 8, 8, m.tensors[3].nbytes]
    saved = sharp.state_dict()
    zeros = saved["_extra_state"]["state"]["perturb"]["perturb"]["m"]["__vector__"]
    for t in zeros:
        t.add_(0)  # in place
    other = SharpnessAware(cases.mlp(), sharp.method, cross_entropy)
    other.load_state_dict(saved)
    assert plain(tree_leaves(other._memory.state, is_leaf=lambda leaf: isinstance(leaf, Vector))) == plain([m])


@pytest.mark.parametrize("change", ["frozen", "other shapes"])
def test_the_state_of_another_model_is_refused(change):
    sharp = SharpnessAware(cases.mlp(), MomentumAscent(), cross_entropy)
    sharp(*cases.batch())
    model = cases.mlp()
    if change == "frozen":
        model[0].requires_grad_(False)
    else:
        model[0] = nn.Linear(6, 7).double()
    with pytest.raises(ValueError, match="another model"):
        SharpnessAware(model, MomentumAscent(), cross_entropy).set_extra_state(sharp.get_extra_state())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda sharp: pickle.loads(pickle.dumps(sharp))])
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("method", [SAM(), BiSAM(), MomentumAscent()], ids=str)
def test_a_copy_goes_on_by_itself(method, steps, copied):
    sharp = SharpnessAware(OneUnused(), method, cross_entropy)
    run_steps(sharp, torch.optim.SGD(sharp.parameters(), lr=0.1), range(steps))
    other = copied(sharp)
    before = parameters(sharp)
    assert parameters(other) == before
    results = run_steps(other, torch.optim.SGD(other.parameters(), lr=0.1), range(steps, 4))
    assert parameters(sharp) == before != results[0]
    assert run_steps(sharp, torch.optim.SGD(sharp.parameters(), lr=0.1), range(steps, 4)) == results


def test_a_copy_leaves_the_last_outputs_behind():
    sharp = SharpnessAware(cases.mlp(), SAM(), cross_entropy)
    sharp(*cases.batch())
    with pytest.raises(RuntimeError, match="yet"):
        _ = copy.deepcopy(sharp).clean
    assert sharp.clean.losses.shape == (8,)


def test_one_method_in_two_losses_shares_nothing():
    method = MomentumAscent()
    sharps = [SharpnessAware(model, method, cross_entropy) for model in twins(cases.mlp)]
    alone = SharpnessAware(twins(cases.mlp)[0], MomentumAscent(), cross_entropy)
    optimizers = [torch.optim.SGD(s.parameters(), lr=0.1) for s in (*sharps, alone)]
    for step in range(3):
        result = run_steps(sharps[0], optimizers[0], [step])
        run_steps(sharps[1], optimizers[1], [step + 10])
        assert run_steps(alone, optimizers[2], [step]) == result
    assert not hasattr(method, "__dict__") or set(vars(method)) == {"rho", "beta"}


@each_basic_method
def test_a_checkpoint_grows_by_keys_only(method):
    model = nn.Linear(6, 1000)
    sharp = SharpnessAware(model, method, cross_entropy)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x, y = cases.batch()
    sharp(x.float(), y).backward()
    optimizer.step()

    def size(**parts) -> int:
        file = io.BytesIO()
        torch.save({name: part.state_dict() for name, part in parts.items()}, file)
        return file.tell()

    plain = size(model=model, optimizer=optimizer)
    assert 0 < size(model=model, optimizer=optimizer, sharp=sharp) - plain < 600
    assert size(sharp=sharp, optimizer=optimizer) - plain < 600
