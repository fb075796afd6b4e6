"""The names of bisam 0.1 work, and warn. Delete with `bisam.deprecated`."""

from __future__ import annotations

import copy
import importlib
import pickle
import sys
import warnings

import pytest
import torch
from torch.optim import SGD

import bisam
from bisam import MSAM, SAM, Lookahead, ModelOracle, Query, SharpnessAware, cross_entropy, deprecated
from bisam.methods.method import stateful
from tests.support import cases, doubles


def test_a_public_name():
    with pytest.warns(DeprecationWarning, match=r"bisam.lookahead is now bisam.next_step; .* gone in bisam 0.3"):
        from bisam import lookahead
    assert lookahead is bisam.next_step
    with pytest.raises(AttributeError, match="no attribute 'lokahead'"):
        _ = bisam.lokahead


@pytest.mark.parametrize(
    ("make", "old", "new"),
    [
        (lambda **old: SharpnessAware(cases.mlp(), SAM(), cross_entropy, **old), {"scale": lambda: 2.0}, "scaler="),
        (lambda **old: SharpnessAware(cases.mlp(), SAM(), cross_entropy, **old), {"perturbation": "local"}, "scope="),
        (lambda **old: ModelOracle(cases.mlp(), cross_entropy, **old), {"scale": lambda: 2.0}, "scaler="),
        (lambda **old: ModelOracle(cases.mlp(), cross_entropy, **old), {"perturbation": "local"}, "scope="),
        (lambda **old: Lookahead(SGD(cases.mlp().parameters(), lr=0.1), **old), {"lam": 0.25}, "alpha="),
    ],
)
def test_arguments(make, old, new):
    with pytest.warns(DeprecationWarning, match=new) as warned:
        make(**old)
    assert warned[0].filename == __file__
    with pytest.raises(TypeError, match="are the same argument"):
        make(**old, **{new[:-1]: next(iter(old.values()))})


def test_an_old_argument_has_its_effect():
    model = cases.mlp()
    new = SharpnessAware(copy.deepcopy(model), SAM(), cross_entropy, scaler=lambda: torch.tensor(float("inf")))
    with pytest.warns(DeprecationWarning, match="scaler="):
        old = SharpnessAware(model, SAM(), cross_entropy, scale=lambda: torch.tensor(float("inf")))
    for sharp in (new, old):
        sharp(*cases.batch()).backward()
        assert all(p.grad.isnan().all() for p in sharp.parameters() if p.grad is not None)


def test_attributes():
    optimizer, oracle = Lookahead(SGD(cases.mlp().parameters(), lr=0.1), alpha=0.25), doubles.Quadratic(2.0, 3.0)
    one = torch.ones(())
    for value, match in (
        (lambda: optimizer.lam == 0.25, "Lookahead.alpha"),
        (lambda: oracle.alone, "Oracle.is_local"),
        (lambda: oracle.within("a").alone, "Oracle.is_local"),
        (lambda: isinstance(oracle.still(), bisam.Oracle), "without_tracking"),
        (lambda: oracle.weights.agreed(one) is one, "from_first_rank"),
        (lambda: len(oracle.weights.drawn(torch.zeros_like)) == 1, "Vector.random"),
    ):
        with pytest.warns(DeprecationWarning, match=match):
            assert value()


def test_together():
    oracle, a = doubles.Quadratic(2.0, 3.0), torch.ones(1, 2).double()
    with pytest.warns(DeprecationWarning, match=r"Oracle.ask\(\[Query"):
        (old,) = oracle.together({"batch": (a,), "at": oracle.weights * 0.1})
    (new,) = oracle.ask([Query((a,), at=oracle.weights * 0.1)])
    assert torch.equal(old.losses, new.losses)


def test_a_method_that_says_it_remembers_is_stateful():
    class Mine:
        remembers = True

        def __call__(self, oracle, batch):
            return oracle.query(batch)

    assert stateful(Mine()) == "Mine"
    with pytest.raises(ValueError, match="share what Mine remembers"):
        MSAM(2, Mine())


@pytest.mark.parametrize("old", deprecated.MODULES)
def test_modules(old, monkeypatch):
    if old.startswith("bisam.integrations.trainer"):
        pytest.importorskip("transformers")
    monkeypatch.delitem(sys.modules, old, raising=False)
    new = importlib.import_module(deprecated.MODULES[old])
    with pytest.warns(DeprecationWarning, match=f"{old} is now {deprecated.MODULES[old]}"):
        module = importlib.import_module(old)
    name = next(n for n in vars(new) if not n.startswith("_") and n != "annotations")
    assert getattr(module, name) is getattr(new, name)
    monkeypatch.delitem(sys.modules, old)


def test_a_pickled_method_of_0_1_is_found_by_its_old_module():
    text = pickle.dumps(bisam.LookSAM(0.1), protocol=0).replace(b"bisam.methods.efficient", b"bisam.methods.saving")
    sys.modules.pop("bisam.methods.saving", None)
    with pytest.warns(DeprecationWarning, match="bisam.methods.efficient"):
        assert pickle.loads(text) == bisam.LookSAM(0.1)


def test_a_pickled_lookahead_of_0_1_keeps_its_lam():
    optimizer = Lookahead(SGD(cases.mlp().parameters(), lr=0.1), k=3, alpha=0.25)
    state = optimizer.__getstate__()
    state["lam"] = state.pop("alpha")
    again = Lookahead.__new__(Lookahead)
    again.__setstate__(state)
    assert (again.k, again.alpha) == (3, 0.25)


def test_new_names_warn_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sharp = SharpnessAware(cases.mlp(), SAM(0.1), cross_entropy, scope="local")
        sharp(*cases.batch()).backward()
