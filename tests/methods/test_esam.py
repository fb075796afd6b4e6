"""ESAM against its authors' code (dydjw9/Efficient_SAM): the drawn part, the length of the displacement, the examples.

`esam_trajectories.npz` has the results of their `utils/Esam.py`, with the tensors that it drew in each step.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bisam import (
    AESAM,
    CRSAM,
    ESAM,
    FSAM,
    GSAM,
    MSAM,
    RSAM,
    SAM,
    SAMON,
    WSAM,
    ABiSAM,
    BiSAM,
    EBiSAM,
    Evaluation,
    FunctionalSAM,
    LookSAM,
    ModelOracle,
    MultiStepSAM,
    NegLog,
    Only,
    Oracle,
    SharpnessAware,
    Vector,
    cross_entropy,
)
from bisam.masks import DropGrow, FisherMask, RandomMask
from bisam.oracle import Query, View
from bisam.perturbations import L2, Adaptive, Friendly, LossEquated, NormLayers, Smoothed, ZScore, needed
from tests.support import cases
from tests.support.runs import close, grads_of, twins

THEIRS = np.load(Path(__file__).with_name("esam_trajectories.npz"))
META = json.loads(str(THEIRS["meta"]))


class Watched(View):
    """Keeps what is asked."""

    def __init__(self, oracle: Oracle, seen: list[dict[str, Any]]) -> None:
        super().__init__(oracle)
        self.seen = seen

    def ask(self, queries: Sequence[Query]) -> list[Evaluation]:
        for q in queries:
            length = 0.0 if q.at is None else torch.cat([t.flatten() for t in q.at]).norm().item()
            moved = None if q.at is None else [bool(t.any()) for t in q.at]
            self.seen.append(
                {"grad": q.grad, "wrt": q.wrt, "length": length, "moved": moved, "examples": len(q.batch[0])}
            )
        return super().ask(queries)


def watched(method: Any) -> tuple[Any, list[dict[str, Any]]]:
    seen: list[dict[str, Any]] = []
    return lambda oracle, batch: method(Watched(oracle, seen), batch), seen


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Unflatten(1, (1, 4, 4)),
        nn.Conv2d(1, 4, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(64, 5),
    ).double()


@pytest.mark.parametrize("name", META["cases"])
def test_trajectory_of_the_authors_code(name, monkeypatch):
    """To 1e-6: they add 1e-7 to the norm of the gradient."""
    case = META["cases"][name]
    draws = iter([torch.tensor([0.0 if d else 0.999 for d in drawn]) for drawn in case["drawn"]])
    monkeypatch.setattr(torch, "rand", lambda *_, **__: next(draws))
    model = net()
    model.load_state_dict({k[5:]: torch.from_numpy(THEIRS[k]) for k in THEIRS.files if k.startswith("init/")})
    geometry = Adaptive(case["rho"]) if case["adaptive"] else L2(case["rho"])
    method, seen = watched(ESAM(RandomMask(geometry, case["beta"]), gamma=case["gamma"]))
    sharp = SharpnessAware(model, method, cross_entropy)
    optimizer = torch.optim.SGD(model.parameters(), **META["sgd"])
    losses = []
    for x, y in zip(THEIRS["x"], THEIRS["y"], strict=True):
        optimizer.zero_grad()
        loss = sharp(torch.from_numpy(x), torch.from_numpy(y))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    first, last = ([q for q in seen if q["grad"] and (q["moved"] is None) is at_w] for at_w in (True, False))
    assert [list(q["wrt"] or [True] * 6) for q in first] == case["drawn"]
    assert [q["moved"] for q in last] == case["drawn"]
    assert [q["wrt"] for q in last] == [None] * len(last)
    close([q["length"] for q in last], case["lengths"], 1e-6)
    assert [q["examples"] for q in last] == case["selected"]
    close(losses, case["losses"], 1e-6)
    for key, value in model.state_dict().items():
        close(value, torch.from_numpy(THEIRS[f"final/{name}/{key}"]), 1e-6)


def lengths(method: Any, steps: int = 30, make=cases.convnet) -> list[float]:
    """The lengths of the displacements in the last query of each step."""
    method, seen = watched(method)
    torch.manual_seed(0)
    model = make()
    sharp, optimizer = SharpnessAware(model, method, cross_entropy), torch.optim.SGD(model.parameters(), lr=0.1)
    found = []
    for step in range(steps):
        optimizer.zero_grad()
        sharp(*cases.batch(step)).backward()
        optimizer.step()
        found.append(seen[-1]["length"])
    return found


@pytest.mark.parametrize(
    "method",
    [
        ESAM(0.3),
        EBiSAM(0.3),
        ESAM(RandomMask(L2(0.3), beta=0.6, per="entry")),
        SAM(RandomMask(L2(0.3), beta=0.6)),
        GSAM(RandomMask(L2(0.3), beta=0.6)),  # which needs the whole gradient for itself
        SAM(Friendly(RandomMask(L2(0.3), beta=0.6))),
        SAM(Only(cases.is_weight, RandomMask(L2(0.3), beta=0.6))),
        GSAM(Only(cases.is_weight, RandomMask(L2(0.3), beta=0.6))),
        SAM(RandomMask(RandomMask(L2(0.18), beta=0.6), beta=0.6)),  # 0.18 / 0.6 / 0.6
    ],
    ids=cases.named,
)
def test_the_displacement_is_always_of_length_rho_over_beta(method):
    found = lengths(method)
    close(found, [0.3 / 0.6] * len(found), 1e-9)


def test_if_no_tensor_is_drawn_one_is():
    found = lengths(ESAM(RandomMask(L2(1e-7), beta=1e-6)))
    close(found, [0.1] * len(found), 1e-9)
    method, seen = watched(SAM(RandomMask(L2(1e-7), beta=1e-6)))
    torch.manual_seed(0)
    sharp = SharpnessAware(cases.convnet(), method, cross_entropy)
    for step in range(40):
        sharp(*cases.batch(step))
    drawn = [q["wrt"] for q in seen if q["wrt"]]
    assert {sum(wrt) for wrt in drawn} == {1}
    assert len(set(drawn)) > 4  # not always the same


def test_tensors_are_drawn_with_probability_beta_and_independently():
    torch.manual_seed(0)
    oracle = ModelOracle(cases.convnet(), cross_entropy)
    drawn = torch.tensor([needed(RandomMask(L2(0.1), beta=0.3), oracle) for _ in range(4000)]).double()
    assert (drawn.mean(0) - 0.3).abs().max() < 0.04
    assert (drawn.T.cov() - torch.eye(drawn.shape[1]) * 0.21).abs().max() < 0.03


# The examples.


@pytest.mark.parametrize(
    ("gamma", "n", "kept"),
    [(0.5, 8, 3), (0.5, 9, 3), (0.3, 10, 2), (0.5, 2, 1), (0.5, 1, 1), (0.1, 8, 1), (0.98, 8, 6), (0.99, 8, 8)],
)
def test_examples_above_the_threshold_are_selected(gamma, n, kept):
    model, (x, y) = cases.mlp(), cases.batch(0, n)
    method, seen = watched(ESAM(L2(0.5), gamma=gamma))
    SharpnessAware(model, method, cross_entropy)(x, y)
    assert seen[-1]["examples"] == kept
    assert len(seen) == (2 if kept == n > 1 else 3)


def test_the_selected_examples_are_those_above_the_threshold():
    model, (x, y) = cases.mlp(), cases.batch(0, 10)
    ours = grads_of(SharpnessAware(model, ESAM(L2(0.5), gamma=0.6), cross_entropy)(x, y), model)
    oracle = ModelOracle(model, cross_entropy)
    before = oracle.query((x, y))
    e = L2(0.5)(before.gradient, oracle)
    rise = oracle.query((x, y), at=e.clone(), grad=False).losses - before.losses
    above = rise > rise.topk(6).values[-1]
    assert above.sum() == 5
    theirs = oracle.query((x[above], y[above]), at=e).gradient
    assert [cases.bits(g) for g in ours] == [cases.bits(g) for g in theirs]


def test_losses_that_are_not_finite_are_selected():
    """So that they are seen, and the step is left out."""
    x, y = cases.batch(0)
    x[5] = torch.nan
    value = SharpnessAware(cases.mlp(), ESAM(L2(0.5), gamma=0.5), cross_entropy)(x, y)
    assert not value.isfinite()


# Which tensors a perturbation needs.


def first_of(method: Any, make=cases.convnet) -> list[str] | None:
    """The names of the tensors that the first query of a step asks for; None for all."""
    method, seen = watched(method)
    torch.manual_seed(0)
    model = make()
    SharpnessAware(model, method, cross_entropy)(*cases.batch())
    wrt = seen[0]["wrt"]
    return None if wrt is None else [n for (n, _), a in zip(model.named_parameters(), wrt, strict=True) if a]


NORMS = ["2.weight", "2.bias", "5.weight", "5.bias"]
WEIGHTS = ["1.weight", "2.weight", "4.weight", "5.weight", "8.weight"]


def in_head(name: str, parameter: Tensor) -> bool:
    return name.startswith("8.")


@pytest.mark.parametrize(
    ("method", "names"),
    [
        (SAM(0.1), None),
        (SAMON(0.1), NORMS),
        (SAM(NormLayers(Adaptive(0.5)), NegLog()), NORMS),
        (SAM(Only(in_head, 0.1)), ["8.weight", "8.bias"]),
        (SAM(Only(in_head, Friendly(L2(0.1)))), ["8.weight", "8.bias"]),  # it gets no other gradient anyway
        (SAM(Only(in_head, Only(cases.is_weight, 0.1))), ["8.weight"]),
        (SAM(Only(cases.is_weight, NormLayers(0.1))), ["2.weight", "5.weight"]),
        (SAM(ZScore(Only(in_head, LossEquated(0.1)))), ["8.weight", "8.bias"]),
        (MultiStepSAM(NormLayers(0.1)), NORMS),
        (MSAM(4, SAMON(0.1)), NORMS),
        (RSAM(0.01, SAMON(0.1)), NORMS),
        (FunctionalSAM(NormLayers(0.1)), NORMS),
        (FisherMask, None),
        (SAM(DropGrow(Only(in_head, 0.1))), ["8.weight", "8.bias"]),  # its first mask is drawn
        # What needs the whole gradient.
        (FSAM(NormLayers(0.1)), None),
        (SAM(Smoothed(NormLayers(0.1))), None),
        (SAM(RandomMask(Friendly(L2(0.1)))), None),
        (SAM(RandomMask(Only(in_head, Smoothed(L2(0.1))))), ["8.weight", "8.bias"]),
        (SAM(lambda gradient, oracle: gradient * 0.1), None),
        (GSAM(NormLayers(0.1)), None),
        (WSAM(NormLayers(0.1)), None),
        (CRSAM(NormLayers(0.1)), None),
        (LookSAM(NormLayers(0.1)), None),
        (AESAM(NormLayers(0.1), steps=9), None),
        (ABiSAM(0.1), None),
    ],
    ids=cases.named,
)
def test_the_first_query_asks_for_the_gradients_that_the_displacement_needs(method, names):
    method = SAM(FisherMask(NormLayers(0.1))) if method is FisherMask else method  # its mask is that of all
    assert first_of(method) == names


def test_between_updates_a_mask_needs_what_the_perturbation_inside_needs():
    for mask in (FisherMask, DropGrow):
        method, seen = watched(SAM(mask(Only(in_head, 0.1), every=3)))
        sharp = SharpnessAware(cases.convnet(), method, cross_entropy)
        for step in range(7):
            sharp(*cases.batch(step))
        whole = [q["wrt"] is None for q in seen if q["moved"] is None]
        assert whole == [step % 3 == 0 and (mask is FisherMask or step > 0) for step in range(7)]


@pytest.mark.parametrize(
    "method", [AESAM(NormLayers(0.1), NegLog(), steps=9), CRSAM(NormLayers(0.1), NegLog())], ids=cases.named
)
def test_a_second_gradient_for_the_displacement_is_that_of_a_part(method):
    method, seen = watched(method)
    SharpnessAware(cases.convnet(), method, cross_entropy)(*cases.batch())
    assert sorted(q["wrt"] is None for q in seen if q["moved"] is None) == [False, True]


def test_a_choice_of_the_user_is_that_of_the_query():
    """Where the function chooses at random, the displaced parameters are those whose gradient was computed."""
    method, seen = watched(SAM(Only(lambda name, p: bool(torch.rand(()) < 0.5), L2(0.1))))
    torch.manual_seed(1)
    sharp = SharpnessAware(cases.convnet(), method, cross_entropy)
    for step in range(20):
        sharp(*cases.batch(step))
    for first, second in zip(seen[::2], seen[1::2], strict=True):
        assert list(first["wrt"] or [True] * 8) == second["moved"]


@pytest.mark.parametrize("perturb", [RandomMask(L2(0.1)), Only(in_head, 0.1), NormLayers(0.1)], ids=cases.named)
def test_a_choice_is_not_kept_between_steps(perturb):
    sharp = SharpnessAware(cases.convnet(), SAM(perturb), cross_entropy)
    sharp(*cases.batch())
    assert sharp.get_extra_state()["state"] == {}


class Whole:
    """A perturbation that needs the whole gradient."""

    def __init__(self, perturb: Any) -> None:
        self.perturb = perturb

    def __call__(self, gradient: Vector, oracle: Oracle) -> Vector:
        return self.perturb(gradient, oracle)


@pytest.mark.parametrize(
    "perturb",
    [NormLayers(0.3), NormLayers(Adaptive(0.3, 0.01)), Only(in_head, Friendly(L2(0.3))), ZScore(Only(in_head, 0.3))],
    ids=cases.named,
)
@pytest.mark.parametrize("make", [SAM, lambda p: BiSAM(p), lambda p: MultiStepSAM(p, steps=3)])
def test_results_are_those_of_the_whole_gradient_to_the_bit(perturb, make):
    runs = []
    for used, model in zip((perturb, Whole(perturb)), twins(cases.convnet), strict=True):
        runs.append(cases.train(SharpnessAware(model, make(used), cross_entropy), model))
    assert runs[0] == runs[1]
