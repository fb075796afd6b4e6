"""`SharpnessAware.stats`: the statistics by hand, what recording costs, and that it changes nothing."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bisam import (
    ASAM,
    BSAM,
    CRSAM,
    ERM,
    ESAM,
    GNP,
    GSAM,
    KSAM,
    L2,
    MESA,
    MSAM,
    RAPP,
    RSAM,
    SAM,
    SAMDB,
    XSAM,
    Accumulated,
    AsyncSAM,
    BilateralSAM,
    BiSAM,
    Every,
    FilterNoise,
    FunctionalSAM,
    GBiSAM,
    LookSAM,
    ModelOracle,
    MomentumSAM,
    MultiStepSAM,
    NegLog,
    Only,
    OptSAM,
    SAMPa,
    SharpnessAware,
    StableSAM,
    Tanh,
    Tilted,
    ZerothOrder,
    cross_entropy,
    next_step,
    statistics,
    vector,
)
from bisam.masks import RandomMask
from bisam.statistics import NAMES, StatsMean, StepStats
from tests.model.test_oracle import Storages
from tests.support import cases
from tests.support.cases import CE, LOG, TANH, bits
from tests.support.references import Step, flat
from tests.support.runs import each_method

RHO, LR = 0.1, 0.1


# By hand. A twin computes g, e, h and the rise with plain autograd on one flat vector, from the paper.


class Hand:
    """A step by hand: weights, batch and what earlier steps have left behind."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.w, self.left = model, flat(model), dict[str, Any]()
        self.number = -1

    def begin(self, w: Tensor, batch: tuple[Tensor, Tensor]) -> None:
        self.w, self.batch, self.number = w, batch, self.number + 1

    def step(self, batch: Any = None) -> Step:
        return Step(self.model, batch or self.batch, torch.optim.SGD([torch.zeros(1)], lr=LR))

    def grad(self, w: Tensor, loss: Any = CE, batch: Any = None) -> Tensor:
        return self.step(batch).grad(w, loss)

    def losses(self, w: Tensor, batch: Any = None) -> Tensor:
        return self.step(batch).losses(w, CE)

    def noise(self) -> Tensor:
        return torch.cat([n.flatten() for n in self.step().noise()])

    def rise(self, e: Tensor, batch: Any = None) -> Tensor:
        return self.losses(self.w + e, batch).mean() - self.losses(self.w, batch).mean()


Found = dict[str, Tensor]


def found(
    g: Tensor | None, e: Tensor | None, h: Tensor, rise: Tensor | None, part: Tensor | None = None
) -> dict[str, float]:
    values: dict[str, Tensor | None] = {"ascent_norm": None if g is None else g.norm(), "descent_norm": h.norm()}
    values |= {"displacement_norm": None if e is None else e.norm(), "rise": rise}
    if g is not None:
        at = h if part is None else h * part
        values["cosine"] = g @ at / (g.norm() * at.norm())
    return {name: value.item() for name, value in values.items() if value is not None}


def l2(g: Tensor, rho: float = RHO) -> Tensor:
    return rho * g / (g.norm() + 1e-12)


def sam(hand: Hand, ascent: Any = CE, descent: Any = CE) -> dict[str, float]:
    g = hand.grad(hand.w, ascent)
    e = l2(g)
    return found(g, e, hand.grad(hand.w + e, descent), hand.rise(e))


def asam(hand: Hand) -> dict[str, float]:
    g = hand.grad(hand.w)
    e = 0.5 * hand.w.square() * g / ((hand.w.abs() * g).norm() + 1e-12)
    return found(g, e, hand.grad(hand.w + e), hand.rise(e))


def only_weights(hand: Hand) -> dict[str, float]:
    part = hand.step().which(cases.is_weight)
    g = hand.grad(hand.w) * part
    e = l2(g)
    return found(g, e, hand.grad(hand.w + e), hand.rise(e), part)


def esam(hand: Hand) -> dict[str, float]:
    drawn = torch.rand(len(list(hand.model.parameters()))) < 0.6
    part = torch.cat([torch.full_like(p, float(d)).flatten() for p, d in zip(hand.model.parameters(), drawn)])  # noqa: B905
    g = hand.grad(hand.w) * part
    e = l2(g) / 0.6
    rises = hand.losses(hand.w + e) - hand.losses(hand.w)
    rows = rises.topk(int(len(rises) * 0.5) - 1).indices.sort().values
    selected = tuple(t[rows] for t in hand.batch)
    return found(g, e, hand.grad(hand.w + e, CE, selected), rises.mean(), part)


def looksam(hand: Hand) -> dict[str, float]:
    g = hand.grad(hand.w)
    if hand.number % 2:
        v = hand.left["v"]
        return found(None, None, g + 0.7 * g.norm() / (v.norm() + 1e-12) * v, None)
    h = hand.grad(hand.w + l2(g))
    hand.left["v"] = h - (h @ g) / (g @ g) * g
    return sam(hand)


def rsam(hand: Hand) -> dict[str, float]:
    noise = hand.noise() * 0.05
    g = hand.grad(hand.w + noise)
    e = noise + l2(g)
    return found(g, e, hand.grad(hand.w + e), None)


def multi_step(hand: Hand) -> dict[str, float]:
    first = l2(hand.grad(hand.w)) / 2
    g = hand.grad(hand.w + first)
    e = first + l2(g) / 2
    return found(g, e, hand.grad(hand.w + e), hand.rise(e))


def msam(hand: Hand) -> dict[str, float]:
    hand.batch = tuple(t[6:] for t in hand.batch)  # the last of 3, 3 and 2
    return sam(hand)


def ksam(hand: Hand) -> dict[str, float]:
    rows = hand.losses(hand.w).topk(5).indices
    hand.batch = tuple(t[rows] for t in hand.batch)
    return sam(hand)


def functional(hand: Hand) -> dict[str, float]:
    g = hand.grad(hand.w)
    e, step = l2(g), hand.step()
    outputs = step.outputs(hand.w).detach().requires_grad_()
    c = torch.autograd.grad(CE(outputs, hand.batch[1]).mean(), outputs)[0]
    w = (hand.w + e).requires_grad_()
    h = torch.autograd.grad((step.outputs(w) * c).sum(), w)[0]
    return found(g, e, h, hand.rise(e))


def bsam(hand: Hand) -> dict[str, float]:
    s = hand.left.get("s", torch.ones_like(hand.w))
    g = hand.grad(hand.w + hand.noise() / (s * 1000).sqrt())
    e = 0.05 * g / s
    delta = 40 / 1000
    hand.left["s"] = s * 0.999 + (s.sqrt() * g.abs() + 0.1 + delta) * (1 - 0.999)
    return found(g, e, hand.grad(hand.w + e), None)


def rapp(hand: Hand) -> dict[str, float]:
    first = -0.2 * hand.grad(hand.w)
    g = hand.grad(hand.w + first)
    e = -0.2 * g
    return found(g, e, hand.grad(hand.w + e), hand.rise(e))


def sampa(hand: Hand) -> dict[str, float]:
    before, y = hand.left.get("before"), hand.left.get("at y")
    g = hand.grad(hand.w) if before is None else y
    e = l2(g)
    h = hand.grad(hand.w + e, CE, before)
    hand.left |= {"before": hand.batch, "at y": hand.grad(hand.w - LR * g)}
    return sam(hand) if before is None else found(None, e, h, None)


def async_sam(hand: Hand) -> dict[str, float]:
    before, hand.left["g"] = hand.left.get("g"), hand.grad(hand.w)
    if before is None:
        return sam(hand)
    return found(None, l2(before), hand.grad(hand.w + l2(before)), hand.rise(l2(before)))


def opt_sam(hand: Hand) -> dict[str, float]:
    e = None if hand.number == 0 else l2(hand.left["h"])
    h = hand.left["h"] = hand.grad(hand.w if e is None else hand.w + e)
    return found(None, e, h, None)


def momentum_sam(hand: Hand) -> dict[str, float]:
    v = hand.left.get("v")
    e = None if v is None else -l2(v)
    h = hand.grad(hand.w if e is None else hand.w + e)
    hand.left["v"] = h if v is None else 0.9 * v + h
    return found(None, e, h, None)


def sam_db(hand: Hand) -> dict[str, float]:
    before, hand.left["batch"] = hand.left.get("batch"), hand.batch
    g = hand.grad(hand.w, CE, before)
    e = l2(g)
    return found(g, e, hand.grad(hand.w + e), hand.rise(e) if before is None else None)


def erm(hand: Hand) -> dict[str, float]:
    return found(None, None, hand.grad(hand.w), None)


Make = Callable[[torch.optim.Optimizer], Any]
HANDS: dict[str, tuple[Make, Callable[[Hand], dict[str, float]]]] = {
    "ERM": (lambda o: ERM(), erm),
    "SAM": (lambda o: SAM(L2(RHO)), sam),
    "BiSAM": (lambda o: BiSAM(RHO), partial(sam, ascent=LOG)),
    "SAM-descent": (lambda o: SAM(L2(RHO), Tanh(), NegLog()), partial(sam, ascent=TANH, descent=LOG)),
    "ASAM": (lambda o: ASAM(0.5), asam),
    "Only": (lambda o: SAM(Only(cases.is_weight, L2(RHO))), only_weights),
    "ESAM": (lambda o: ESAM(RandomMask(L2(RHO), beta=0.6), gamma=0.5), esam),
    "GSAM": (lambda o: GSAM(L2(RHO)), sam),
    "GBiSAM": (lambda o: GBiSAM(RHO), partial(sam, ascent=LOG)),
    "LookSAM": (lambda o: LookSAM(L2(RHO), k=2), looksam),
    "GNP": (lambda o: GNP(RHO), sam),
    "StableSAM-log": (lambda o: StableSAM(L2(RHO), NegLog()), partial(sam, ascent=LOG)),
    "BilateralSAM": (lambda o: BilateralSAM(L2(RHO)), sam),
    "CRSAM": (lambda o: CRSAM(L2(RHO)), sam),
    "CRSAM-log": (lambda o: CRSAM(L2(RHO), NegLog()), partial(sam, ascent=LOG)),
    "XSAM": (lambda o: XSAM(L2(RHO), every=2), sam),
    "FunctionalSAM": (lambda o: FunctionalSAM(L2(RHO)), functional),
    "MultiStepSAM": (lambda o: MultiStepSAM(L2(RHO), steps=2), multi_step),
    "RAPP": (lambda o: RAPP(0.2), rapp),
    "BSAM": (lambda o: BSAM(1000, 0.05), bsam),
    "SAMPa": (lambda o: SAMPa(L2(RHO), ahead=next_step(o)), sampa),
    "AsyncSAM": (lambda o: AsyncSAM(L2(RHO)), async_sam),
    "OptSAM": (lambda o: OptSAM(L2(RHO)), opt_sam),
    "MomentumSAM": (lambda o: MomentumSAM(L2(RHO)), momentum_sam),
    "SAMDB": (lambda o: SAMDB(L2(RHO)), sam_db),
    "RSAM": (lambda o: RSAM(0.05, SAM(L2(RHO)), filters=False), rsam),
    "MSAM": (lambda o: MSAM(3, SAM(L2(RHO))), msam),
    "KSAM": (lambda o: KSAM(5, SAM(L2(RHO))), ksam),
    "Every": (lambda o: Every(2, SAM(L2(RHO))), lambda hand: erm(hand) if hand.number % 2 else sam(hand)),
}


@pytest.mark.parametrize("name", HANDS)
def test_the_statistics_are_those_by_hand(name):
    make, twin = HANDS[name]
    model = cases.A_MODEL()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    sharp = SharpnessAware(model, make(optimizer), cross_entropy, stats=True)
    hand = Hand(copy.deepcopy(model))
    for i in range(4):
        hand.begin(flat(model), cases.batch(i))
        torch.manual_seed(i)
        loss = sharp(*cases.batch(i))
        torch.manual_seed(i)
        expected = twin(hand)
        assert sharp.stats.to_dict() == pytest.approx(expected, rel=1e-12, abs=1e-14)
        assert list(sharp.stats.to_dict()) == [n for n in NAMES if n in expected]
        for value in sharp.stats.known().values():
            assert (value.dim(), value.dtype, value.requires_grad) == (0, torch.double, False)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_the_rise_is_that_of_the_loss_without_the_term_of_a_wrapper():
    """At the first step the average is the model: the term is 0 at the weights with its gradient, not at w + e."""
    found = []
    for method in (SAM(L2(0.5)), MESA(SAM(L2(0.5)), lam=100.0)):
        torch.manual_seed(0)
        sharp = SharpnessAware(cases.mlp(), method, cross_entropy, stats=True)
        loss = sharp(*cases.batch())
        found.append((sharp.stats.to_dict()["rise"], loss.item()))
    (plain, below), (wrapped, above) = found
    assert wrapped == pytest.approx(plain, rel=1e-12)
    assert above > below + 0.01


def test_the_cosine_of_tiny_and_huge_gradients():
    """Products of their entries are out of the range of float32."""
    for scale in (1e-24, 1e24):
        sharp = SharpnessAware(
            nn.Linear(6, 4), SAM(L2(0.05)), lambda o, t, scale=scale: cross_entropy(o, t) * scale, stats=True
        )
        x, y = cases.batch()
        sharp(x.float(), y)
        assert 0.9 < sharp.stats.cosine < 1
        assert sharp.stats.ascent_norm > 0


def test_a_gradient_of_zero_has_no_direction():
    sharp = SharpnessAware(cases.mlp(), SAM(), lambda o, t: o.sum(1) * 0, stats=True)
    sharp(*cases.batch())
    assert sharp.stats.to_dict() == pytest.approx(
        {"ascent_norm": 0, "descent_norm": 0, "displacement_norm": 0, "rise": 0, "cosine": float("nan")}, nan_ok=True
    )


def test_an_overflow_is_reported_as_it_is():
    seen: list[int] = []

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        seen.append(1)
        return cross_entropy(outputs, targets) * (float("inf") if len(seen) % 2 == 0 else 1.0)

    sharp = SharpnessAware(cases.mlp(), SAM(), loss, scaler=lambda: 2.0**10, stats=True)
    sharp(*cases.batch())
    found = sharp.stats.to_dict()
    assert (found["descent_norm"] != found["descent_norm"], found["rise"]) == (True, float("inf"))
    assert found["ascent_norm"] > 0


def test_gradients_are_without_the_factor_of_the_scaler():
    found = []
    for scaler in (None, lambda: 2.0**10):
        torch.manual_seed(0)
        sharp = SharpnessAware(cases.mlp(), BiSAM(), cross_entropy, scaler=scaler, stats=True)
        sharp(*cases.batch())
        found.append(sharp.stats.to_dict())
    assert found[0] == found[1]


def test_statistics_of_half_precision_are_in_float32():
    sharp = SharpnessAware(cases.mlp().bfloat16(), BiSAM(0.5), cross_entropy, stats=True)
    x, y = cases.batch()
    with pytest.warns(UserWarning, match="bfloat16"):
        sharp(x.bfloat16(), y)
    assert {value.dtype for value in sharp.stats.known().values()} == {torch.float32}
    assert 0.4 < sharp.stats.displacement_norm < 0.6
    assert 0 < sharp.stats.cosine <= 1


def test_complex_weights_are_their_real_and_imaginary_parts():
    found = []
    for real in (False, True):
        torch.manual_seed(0)
        sharp = SharpnessAware(cases.complex_mlp(real=real), SAM(L2(0.3)), cross_entropy, stats=True)
        sharp(*cases.batch())
        found.append(sharp.stats.to_dict())
    assert found[0] == pytest.approx(found[1], rel=1e-12)


# It changes nothing.


class Noisy(nn.Module):
    """A loss that draws random numbers, and changes a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.calls += 1
        return cross_entropy(outputs * (1 + 0.1 * torch.rand(())), targets) + self.calls * 0.01


def trained(make: Make, *, stats: bool, loss: Any = cross_entropy, steps: int = 4) -> tuple[Any, ...]:
    """Everything that training leaves: bits of losses, weights, gradients, buffers, states and the generator."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, cases.CLASSES)
    ).double()
    optimizer = cases.OPTIMIZERS["sgd"](model.parameters())
    sharp = SharpnessAware(model, make(optimizer), loss, stats=stats)
    losses = []
    for i in range(steps):
        optimizer.zero_grad()
        losses.append(sharp(*cases.batch(i)))
        losses[-1].backward()
        optimizer.step()
    state = [bits(t) if isinstance(t, Tensor) else t for t in tree_leaves(sharp.get_extra_state())]
    clean = bits(sharp.clean.value)
    return [bits(v) for v in losses], cases.everything(sharp)[:3], state, clean, bits(torch.get_rng_state())


@each_method
def test_a_step_that_is_recorded_is_the_same_to_the_bit(name):
    make, _ = cases.FAMILY[name]
    assert trained(make, stats=True) == trained(make, stats=False)


@pytest.mark.filterwarnings("ignore:a forward pass changed calls in place for the first time")
@pytest.mark.parametrize("name", ["SAM", "BiSAM", "SAM-descent", "MSAM", "CRSAM-tanh"])
def test_a_loss_with_a_state_of_its_own_is_not_called_once_more(name):
    make, _ = cases.FAMILY[name]
    assert trained(make, stats=True, loss=Noisy()) == trained(make, stats=False, loss=Noisy())


def test_a_state_that_a_method_assigns_is_kept():
    def counting(oracle: Any, batch: Any) -> Any:
        oracle.state = {"calls": oracle.state.get("calls", 0) + 1}
        return oracle.query(batch)

    sharp = SharpnessAware(cases.mlp(), counting, cross_entropy, stats=True)
    for i in range(3):
        sharp(*cases.batch(i))
    assert sharp.get_extra_state()["state"] == {"calls": 3}


# What it costs.


class Operations(TorchDispatchMode):
    """Counts operations, and the launches among them: `detach` and views launch nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))

    @property
    def launches(self) -> int:
        free = "detach", "view", "unbind", "alias", "expand"
        return sum(n for name, n in self.counts.items() if not name.split(".")[1].startswith(free))


@pytest.mark.parametrize("method", [ERM(), SAM(), BiSAM(), MSAM(3), ESAM(RandomMask(0.1, beta=1.0))], ids=str)
def test_without_statistics_a_step_is_the_method_and_a_copy_of_its_value(method):
    def counted(step: Callable[[], Any]) -> Counter[str]:
        with Operations() as operations:
            step()
        return operations.counts

    model, batch = cases.mlp(), cases.batch()
    sharp = SharpnessAware(model, method, cross_entropy)
    for _ in range(4):  # past the steps that find out what moves
        sharp(*batch)
    expected = counted(lambda: method(ModelOracle(model, cross_entropy, step=5), batch)) + Counter(
        {"aten.clone.default": 1}
    )
    assert counted(lambda: sharp(*batch)) == expected
    more = SharpnessAware(model, method, cross_entropy, stats=True)
    for _ in range(4):
        more(*batch)
    assert counted(lambda: more(*batch)).total() > expected.total()


def passes(method: Any, stats: bool) -> int:
    model = cases.mlp()
    calls: list[int] = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    SharpnessAware(model, method, cross_entropy, stats=stats)(*cases.batch())
    return len(calls)


@pytest.mark.parametrize("method", [ERM(), BiSAM(), MSAM(3, BiSAM()), CRSAM(ascent=NegLog()), XSAM()], ids=str)
def test_it_needs_no_pass(method):
    assert passes(method, stats=True) == passes(method, stats=False)


class Peak(Storages):
    """The largest number of live storages after an operation."""

    most = 0

    def __torch_dispatch__(self, *arguments: Any, **keywords: Any) -> Any:
        out = super().__torch_dispatch__(*arguments, **keywords)
        self.most = max(self.most, self.alive())
        return out


@pytest.mark.parametrize(
    ("method", "second", "more"),
    [(ERM(), None, 0), (SAM(), 2, 1), (BiSAM(), 2, 1), (MSAM(2, SAM()), 3, 1), (GSAM(), 3, 0)],
    ids=str,
)
def test_the_ascent_gradient_is_kept_for_the_descent_pass_and_nothing_after_it(method, second, more):
    """Weight-sized storages at the end of each forward pass, as benchmarks.step counts them, and between the steps."""
    found = {}
    for stats in (False, True):
        model, in_passes = nn.Linear(64, 64, bias=False), []
        storages = Storages(model.weight.untyped_storage().nbytes(), model.weight)
        model.register_forward_hook(lambda *_: in_passes.append(storages.alive()))  # noqa: B023
        sharp = SharpnessAware(model, method, cross_entropy, stats=stats)
        with storages:
            sharp(torch.randn(4, 64), torch.randint(64, (4,))).backward()
            model.weight.grad = None
        found[stats] = in_passes, storages.alive()
    (plain, after), (recorded, after_too) = found[False], found[True]
    assert after_too == after == 1
    if second is not None:
        assert plain[-1] == second
    assert recorded[-1] == plain[-1] + more
    assert max(a - b for a, b in zip(recorded, plain, strict=True)) == more


def test_the_cosine_needs_memory_for_a_few_tensors_at_a_time(monkeypatch):
    monkeypatch.setattr(statistics, "_SMALL", 0)
    most = {}
    for stats in (False, True):
        model = nn.Sequential(*[nn.Linear(64, 64, bias=False) for _ in range(12)])
        storages = Peak(64 * 64 * 4, *model.parameters())
        sharp = SharpnessAware(model, SAM(), cross_entropy, stats=stats)
        with storages:
            sharp(torch.randn(4, 64), torch.randint(64, (4,))).backward()
        most[stats] = storages.most
    assert most[True] - most[False] <= 12  # the ascent gradient; the products fit where the saved weights were


@pytest.mark.parametrize("method", [SAM(), BiSAM(), ASAM(0.5), SAM(Only(cases.is_weight, 0.1))], ids=cases.named)
def test_it_adds_the_same_number_of_operations_at_any_depth(method, monkeypatch):
    monkeypatch.setattr(vector, "_is_small_on_cpu", lambda tensors: False)  # where zeros of holes are copied
    added = []
    for depth in (5, 40):
        model, counts = nn.Sequential(*[nn.Linear(6, 6) for _ in range(depth)]), []
        for stats in (False, True):
            sharp = SharpnessAware(model, method, cross_entropy, stats=stats)
            x, y = cases.batch()
            for _ in range(4):
                sharp(x.float(), y)
            with Operations() as operations:
                sharp(x.float(), y)
            counts.append(operations.launches)
        added.append(counts[1] - counts[0])
    assert added[0] == added[1]
    assert 5 < added[0] < 60


@pytest.mark.parametrize("name", ["SAM", "BiSAM", "GBiSAM", "Only", "LookSAM", "SAMPa", "MSAM"])
def test_recording_waits_for_no_value(name):
    model = cases.A_MODEL()
    sharp = SharpnessAware(
        model, HANDS[name][0](torch.optim.SGD(model.parameters(), lr=LR)), cross_entropy, stats=True, scaler=lambda: 2.0
    )
    mean = StatsMean()
    for i in range(6):
        with Operations() as operations:
            sharp(*cases.batch(i))
            mean.add(sharp.stats)
        waits = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select"}
        if i > 2:  # past the steps that find out what forward passes change, and in which a state begins
            assert not {operation for operation in operations.counts if operation.split(".")[1] in waits}


def test_tensors_are_grouped_by_their_sizes(monkeypatch):
    assert statistics._groups([0, 1, 2], [5, 6, 7]) == [[0, 1, 2]]
    monkeypatch.setattr(statistics, "_SMALL", 10)
    assert statistics._groups([3, 4, 6, 7, 9], [4, 6, 1, 99, 2]) == [[3, 4], [6], [7], [9]]
    assert statistics._groups([], []) == []
    monkeypatch.setattr(statistics, "_SMALL", 0)
    groups = statistics._groups(list(range(1000)), [1] * 1000)
    assert [i for group in groups for i in group] == list(range(1000))
    assert len(groups) <= 17


# When there are some.


def test_statistics_must_be_switched_on():
    sharp = SharpnessAware(cases.mlp(), SAM(), cross_entropy)
    sharp(*cases.batch())
    with pytest.raises(RuntimeError, match=r"SharpnessAware\(\.\.\., stats=True\)"):
        _ = sharp.stats


def test_before_the_first_step_there_are_none():
    sharp = SharpnessAware(cases.mlp(), SAM(), cross_entropy, stats=True)
    with pytest.raises(RuntimeError, match=r"there are no statistics yet: a training step"):
        _ = sharp.stats
    with torch.no_grad():
        sharp(*cases.batch())
    with pytest.raises(RuntimeError, match="no statistics yet"):
        _ = sharp.stats


def test_an_evaluation_and_a_call_that_fails_leave_those_of_the_last_step():
    sharp = SharpnessAware(cases.mlp(), SAM(), cross_entropy, stats=True)
    sharp(*cases.batch())
    before = sharp.stats
    with torch.no_grad():
        sharp(*cases.batch(1))
    sharp.eval()
    sharp(*cases.batch(2))
    sharp.train()
    assert sharp.stats is before
    handle = sharp.model.register_forward_hook(
        lambda *_: 1 / 0 if bool(sharp.model[0].weight.ne(weight).any()) else None
    )
    weight = sharp.model[0].weight.detach().clone()
    with pytest.raises(ZeroDivisionError):  # at the displaced weights
        sharp(*cases.batch(3))
    assert sharp.stats is before
    handle.remove()
    sharp(*cases.batch(3))
    assert sharp.stats is not before
    assert isinstance(before.cosine, Tensor)


def test_they_are_those_of_the_last_micro_batch():
    model = cases.mlp()
    sharp = SharpnessAware(model, SAM(), cross_entropy, stats=True)
    for i in range(2):
        (sharp(*cases.batch(i)) / 2).backward()
    found = sharp.stats.to_dict()
    other = SharpnessAware(model, SAM(), cross_entropy, stats=True)
    other(*cases.batch(1))
    assert found == other.stats.to_dict()


@pytest.mark.parametrize("method", [SAM(0.5), BiSAM(0.5), MultiStepSAM(0.5, steps=2), GSAM(0.5)], ids=str)
@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: Every(1, m), lambda m: MSAM(8, m)])
def test_those_of_accumulated_queries_are_of_the_whole_batch(method, wrap):
    model, found = cases.mlp(), []
    for each in (wrap(method), wrap(Accumulated(3, method)), Tilted(2, Accumulated(3, method))):
        sharp = SharpnessAware(model, each, cross_entropy, stats=True)
        sharp(*cases.batch(8)).backward()
        found.append(sharp.stats.to_dict())
    assert set(found[0]) == {"ascent_norm", "descent_norm", "displacement_norm", "rise", "cosine"}
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-6)


@pytest.mark.parametrize("method", [FilterNoise(0.5), ZerothOrder(0.5)], ids=str)
@pytest.mark.parametrize("wrap", [lambda m: MSAM(3, m), lambda m: Tilted(2, m), lambda m: Tilted(2, Tilted(2, m))])
def test_the_gradient_of_another_micro_batch_or_sample_is_not_that_of_an_ascent(method, wrap):
    sharp = SharpnessAware(cases.mlp(), wrap(method), cross_entropy, stats=True)
    sharp(*cases.batch(8)).backward()
    assert set(sharp.stats.to_dict()) == {"descent_norm", "displacement_norm"}


def test_a_model_in_eval_mode_that_trains_has_statistics():
    sharp = SharpnessAware(cases.normed(), SAM(), cross_entropy, in_eval_mode=True, stats=True)
    sharp.train()
    sharp.model.eval()
    sharp(*cases.batch())
    assert sharp.stats.to_dict().keys() == set(NAMES)


def test_copies_pickles_and_checkpoints_have_none():
    sharp = SharpnessAware(cases.mlp(), LookSAM(), cross_entropy, stats=True)
    plain = SharpnessAware(copy.deepcopy(sharp.model), LookSAM(), cross_entropy)
    for one in (sharp, plain):
        one(*cases.batch())
    for other in (copy.deepcopy(sharp), pickle.loads(pickle.dumps(sharp))):
        with pytest.raises(RuntimeError, match="no statistics yet"):
            _ = other.stats
        other(*cases.batch(1))
        assert other.stats.descent_norm > 0
    assert len(tree_leaves(sharp.state_dict())) == len(tree_leaves(plain.state_dict()))
    plain.load_state_dict(sharp.state_dict())


def test_a_pickle_of_an_earlier_version_records_nothing():
    sharp = SharpnessAware(cases.mlp(), SAM(), cross_entropy)
    del sharp.__dict__["_records"]
    earlier = {name: value for name, value in sharp._memory.__getstate__().items() if name != "stats"}
    sharp._memory.__setstate__(earlier)
    sharp(*cases.batch())
    with pytest.raises(RuntimeError, match="stats=True"):
        _ = sharp.stats


def test_a_lazy_weight_that_the_first_step_initialises():
    class Initialised(nn.Linear):
        ready = False

        def forward(self, x: Tensor) -> Tensor:
            if not self.ready:
                self.ready = True
                self.weight.data.mul_(3.0)
            return super().forward(x)

    found = []
    for stats in (True, False):
        torch.manual_seed(0)
        model = Initialised(6, 4).double()
        sharp = SharpnessAware(model, RSAM(0.1, SAM(L2(0.5))), cross_entropy, stats=stats)
        sharp(*cases.batch()).backward()
        found.append(cases.everything(model)[:3])
        if stats:
            assert sharp.stats.to_dict().keys() == {"ascent_norm", "descent_norm", "displacement_norm", "cosine"}
    assert found[0] == found[1]


@pytest.mark.slow
def test_a_compiled_model_has_the_statistics_of_the_model():
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = cases.mlp()
        if compiled:
            model.compile(backend="aot_eager")
        sharp = SharpnessAware(model, BiSAM(0.1), cross_entropy, stats=True)
        sharp(*cases.batch()).backward()
        found.append(sharp.stats.to_dict())
    assert found[0] == pytest.approx(found[1], rel=1e-9)


# Means.


def test_a_mean_is_over_the_steps_that_have_the_statistic():
    sharp = SharpnessAware(cases.mlp(), LookSAM(k=2), cross_entropy, stats=True)
    mean, each = StatsMean(), []
    for i in range(4):
        sharp(*cases.batch(i))
        mean.add(sharp.stats)
        each.append(sharp.stats.to_dict())
    expected = {name: [one[name] for one in each if name in one] for name in NAMES}
    assert {name: len(values) for name, values in expected.items()} == {
        n: 4 if n == "descent_norm" else 2 for n in NAMES
    }
    assert mean.to_dict() == pytest.approx({name: sum(v) / len(v) for name, v in expected.items()}, rel=1e-12)
    assert StatsMean().to_dict() == StepStats().to_dict() == {}


def test_a_mean_leaves_out_what_is_not_finite():
    mean = StatsMean()
    for norm, cosine in ((1.0, float("nan")), (float("inf"), float("nan")), (float("nan"), float("nan")), (4.0, None)):
        mean.add(StepStats(descent_norm=torch.tensor(norm), cosine=None if cosine is None else torch.tensor(cosine)))
    assert mean.to_dict() == pytest.approx({"descent_norm": 2.5, "cosine": float("nan")}, nan_ok=True)
    assert mean.steps == {"descent_norm": 4, "cosine": 3}
