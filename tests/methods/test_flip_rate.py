"""A radius that follows the share of flipped predictions: what it counts, where it goes, and where it is refused."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bisam import (
    AESAM,
    ASAM,
    BSAM,
    ESAM,
    GSAM,
    KSAM,
    LESAM,
    MSAM,
    RSAM,
    SAM,
    SSAMF,
    AsyncSAM,
    BiSAM,
    Evaluation,
    Every,
    LookSAM,
    ModelOracle,
    MomentumSAM,
    MultiStepSAM,
    NegLog,
    OptSAM,
    Oracle,
    SAMPa,
    SharpnessAware,
    Tanh,
    cross_entropy,
    next_step,
)
from bisam.masks import RandomMask
from bisam.methods.method import data_dependent, stateful
from bisam.perturbations import L2, Adaptive, Friendly, Only
from bisam.schedules import FlipRate, Warmup

RATE = FlipRate(0.1, start=0.2, gain=0.5)


def points(n: int = 512, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Three classes in the plane that overlap."""
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 3
    centres = torch.tensor([[2.0, 0.0], [-1.0, 1.7], [-1.0, -1.7]])
    return centres[y] + torch.randn(n, 2, generator=g), y


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 3))


def radius(sharp: SharpnessAware) -> Tensor:
    (found,) = leaves(sharp.get_extra_state()["state"], "rho")
    return found


def leaves(state, name: str) -> list[Tensor]:
    if not isinstance(state, dict):
        return []
    return [v for k, v in state.items() if k == name] + [leaf for v in state.values() for leaf in leaves(v, name)]


def flipped(model: nn.Module, e: list[Tensor], x: Tensor, y: Tensor) -> float:
    """Counted one by one, with a copy of the model."""
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for p, d in zip(moved.parameters(), e, strict=True):
            p += d
        before, after = model(x).argmax(1).tolist(), moved(x).argmax(1).tolist()
    return sum(b == t != a for b, a, t in zip(before, after, y.tolist(), strict=True)) / len(y)


# What it counts.


@pytest.mark.parametrize(
    ("method", "loss"),
    [(SAM(RATE), cross_entropy), (BiSAM(RATE), NegLog()), (BiSAM(RATE, Tanh()), Tanh())],
    ids=["SAM", "BiSAM", "BiSAM-tanh"],
)
def test_the_radius_moves_by_the_rate_of_the_step(method, loss):
    model, (x, y) = network().double(), points()
    x = x.double()
    sharp = SharpnessAware(model, method, cross_entropy)
    expected = 0.2
    for _ in range(5):
        g = torch.autograd.grad(loss(model(x), y).mean(), [*model.parameters()])
        norm = math.sqrt(sum(float((t**2).sum()) for t in g))
        rate = flipped(model, [expected * t / norm for t in g], x, y)
        sharp(x, y)
        expected *= math.exp(0.5 * (1 - rate / 0.1))
        assert float(radius(sharp)) == pytest.approx(expected, rel=1e-9)


def test_ignored_labels_are_not_counted():
    model, (x, y) = network(), points()
    part, y_part = x[:100], y[:100]
    ignored = torch.cat([y_part, torch.full((412,), -100)])
    rates = []
    for batch in ((part, y_part), (x, ignored)):
        sharp = SharpnessAware(model, SAM(RATE), cross_entropy)
        for _ in range(3):
            sharp(*batch)
        rates.append(radius(sharp))
    torch.testing.assert_close(*rates, rtol=1e-4, atol=0)
    sharp = SharpnessAware(model, SAM(RATE), cross_entropy)
    sharp(x, torch.full_like(y, -100))
    assert radius(sharp) == torch.tensor(0.2)  # nothing to follow


def test_a_loss_that_is_a_scalar_counts_too():
    x, y = points(64)
    radii = []
    for loss in (cross_entropy, nn.CrossEntropyLoss()):
        sharp = SharpnessAware(network(), SAM(RATE), loss)
        for _ in range(3):
            sharp(x, torch.where(torch.arange(64) < 5, -100, y))
        radii.append(radius(sharp))
    torch.testing.assert_close(*radii)


def test_pixels_are_counted_as_examples_are():
    torch.manual_seed(0)
    model = nn.Conv2d(2, 3, 1)
    x, y = torch.randn(4, 2, 5, 5), torch.randint(3, (4, 5, 5))
    flat = copy.deepcopy(model)
    sharp, other = (SharpnessAware(m, SAM(RATE), cross_entropy) for m in (model, flat))
    pixels = x.movedim(1, -1).reshape(-1, 2, 1, 1)
    for _ in range(3):
        sharp(x, y)
        other(pixels, y.reshape(-1, 1, 1))
    torch.testing.assert_close(radius(sharp), radius(other))


def test_no_pass_is_added():
    passes = []
    model, batch = network(), points(32)
    model.register_forward_hook(lambda *_: passes.append(1))
    sharp = SharpnessAware(model, SAM(RATE), cross_entropy)
    sharp(*batch)
    passes.clear()
    sharp(*batch).backward()
    assert len(passes) == 2


def test_a_constant_radius_is_the_same_step():
    """With a gain that rounds to no change it is SAM of the start, bit for bit."""
    batch = points(64)
    still, plain = (SharpnessAware(network(), SAM(rho), cross_entropy) for rho in (FlipRate(0.5, 0.1, 1e-30), 0.1))
    for _ in range(3):
        assert torch.equal(still(*batch), plain(*batch))


# Where it goes.


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("SAM", lambda rate: SAM(rate)),
        ("BiSAM", lambda rate: BiSAM(rate, Tanh())),
        ("ASAM", lambda rate: ASAM(rate)),
        ("Friendly", lambda rate: SAM(Friendly(Adaptive(rate), sigma=0.5))),
        ("Only", lambda rate: SAM(Only(lambda name, p: name.endswith("weight"), rate))),
        ("RSAM", lambda rate: RSAM(0.001, SAM(rate))),
    ],
)
@pytest.mark.parametrize(("target", "start"), [(0.05, 1e-3), (0.2, 5.0)])
def test_the_rate_converges_to_its_target(name, make, target, start):
    torch.manual_seed(0)
    model, (x, y) = network(), points()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(50):  # a fitted model, which then stays
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    sharp = SharpnessAware(model, make(FlipRate(target, start, gain=0.1)), cross_entropy)
    for _ in range(200):
        sharp(x, y)
    before = radius(sharp).item()
    for _ in range(50):
        sharp(x, y)
    after = radius(sharp).item()
    assert 1e-3 < after < 9.0  # not at a bound
    assert abs(math.log(after / before) / (50 * 0.1)) < 0.1  # the mean of 1 - rate / target


def test_the_radius_stays_within_its_bounds():
    x, y = points(64)
    for rate, expected in ((FlipRate(0.99, 0.1, 2.0, 0.05, 0.3), 0.3), (FlipRate(1e-6, 0.1, 2.0, 0.05, 0.3), 0.05)):
        sharp = SharpnessAware(network(), SAM(rate), cross_entropy)
        for _ in range(5):
            sharp(x, y)
        assert radius(sharp).item() == pytest.approx(expected)


# State: checkpoints, failures, AMP, accumulation.


def test_a_checkpoint_has_the_radius():
    sharp = SharpnessAware(network(), SAM(RATE), cross_entropy)
    for step in range(4):
        sharp(*points(64, step))
    file = io.BytesIO()
    torch.save(sharp.state_dict(), file)
    file.seek(0)
    resumed = SharpnessAware(network(1), SAM(RATE), cross_entropy)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for step in range(4, 8):
        assert torch.equal(sharp(*points(64, step)), resumed(*points(64, step)))
    assert torch.equal(radius(sharp), radius(resumed))
    assert radius(sharp) != 0.2
    with pytest.raises(ValueError, match=r"memory of SAM.*FlipRate.*method here is SAM"):
        SharpnessAware(network(), SAM(Friendly(0.1)), cross_entropy).load_state_dict(sharp.state_dict())


def test_a_step_that_is_not_finite_leaves_the_radius():
    sharp, (x, y) = SharpnessAware(network(), SAM(RATE), cross_entropy), points(64)
    sharp(x, y)
    before = radius(sharp)
    sharp(x * math.nan, y)
    assert torch.equal(radius(sharp), before)
    with pytest.raises(ValueError, match="label 7"):
        sharp(x, torch.full_like(y, 7))
    assert torch.equal(radius(sharp), before)
    sharp(x, y)
    assert not torch.equal(radius(sharp), before)


def test_scaled_gradients_that_overflow_leave_the_radius():
    scale = [2.0**10]
    sharp = SharpnessAware(network(), SAM(RATE), cross_entropy, scaler=lambda: scale[0])
    plain = SharpnessAware(network(), SAM(RATE), cross_entropy)
    x, y = points(64)
    for loss in (sharp, plain):
        loss(x, y)
    torch.testing.assert_close(radius(sharp), radius(plain))
    scale[0] = math.inf
    sharp(x, y)
    torch.testing.assert_close(radius(sharp), radius(plain))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_predictions_are_those_of_the_model(dtype):
    sharp, (x, y) = SharpnessAware(network(), SAM(RATE), cross_entropy), points()
    for _ in range(3):
        with torch.autocast("cpu", dtype):
            loss = sharp(x, y)
        loss.backward()
    assert radius(sharp).dtype == torch.float32
    full = SharpnessAware(network(), SAM(RATE), cross_entropy)
    for _ in range(3):
        full(x, y)
    assert radius(sharp).item() == pytest.approx(radius(full).item(), rel=0.2)


def test_each_micro_batch_is_a_step():
    x, y = points(64)
    accumulated, single = (SharpnessAware(network(), SAM(RATE), cross_entropy) for _ in range(2))
    for part in (slice(0, 32), slice(32, 64)):
        (accumulated(x[part], y[part]) / 2).backward()
        single(x[part], y[part])
    assert accumulated.get_extra_state()["step"] == 2
    assert torch.equal(radius(accumulated), radius(single))


def test_every_counts_the_steps_of_its_method():
    x, y = points(64)
    sharp, alone = (SharpnessAware(network(), m, cross_entropy) for m in (Every(3, SAM(RATE)), SAM(RATE)))
    for step in range(6):
        sharp(x, y)
        if step % 3 == 0:
            alone(x, y)
        assert torch.equal(radius(sharp), radius(alone))


# Where it is refused.

WITHOUT_FLIPS = [
    lambda o: GSAM(RATE),
    lambda o: LookSAM(RATE),
    lambda o: SSAMF(RATE),
    lambda o: ESAM(RATE),
    lambda o: ESAM(RandomMask(RATE)),
    lambda o: MultiStepSAM(RATE),
    lambda o: MomentumSAM(RATE),
    lambda o: OptSAM(RATE),
    lambda o: AsyncSAM(RATE),
    lambda o: SAMPa(RATE, ahead=next_step(o)),
    lambda o: Every(2, GSAM(RATE)),
    lambda o: RSAM(0.1, LookSAM(Friendly(RATE))),
]


@pytest.mark.parametrize("make", WITHOUT_FLIPS)
def test_methods_that_compare_no_predictions_refuse_it(make):
    model = network()
    method = make(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="a FlipRate follows the predictions that the ascent step flips"):
        SharpnessAware(model, method, cross_entropy)(*points(16))


class Watched:
    """Passes everything on to the method inside."""

    transparent = True

    def __init__(self, method) -> None:
        self.method = method

    def __call__(self, oracle: Oracle, batch: tuple[Tensor, Tensor]) -> Evaluation:
        return self.method(oracle, batch)


def test_a_transparent_wrapper_hides_nothing():
    assert stateful(Watched(SAM(RATE))) == "FlipRate"
    assert data_dependent(Watched(AESAM(steps=10))) == "AESAM"
    SharpnessAware(network(), Watched(SAM(RATE)), cross_entropy)(*points(16))
    with pytest.raises(ValueError, match="a FlipRate follows"):
        SharpnessAware(network(), Watched(GSAM(RATE)), cross_entropy)(*points(16))


def test_wrappers_that_split_or_choose_examples_refuse_it():
    for make in (lambda: MSAM(4, SAM(RATE)), lambda: MSAM(4, SAM(RATE), separate=True), lambda: KSAM(4, SAM(RATE))):
        with pytest.raises(ValueError, match="a FlipRate inside of"):
            make()


def test_other_places_of_a_radius_refuse_it():
    for make in (lambda: LESAM(RATE), lambda: Warmup(RATE, 5), lambda: NegLog(RATE), lambda: BSAM(10, RATE)):
        with pytest.raises(TypeError, match="must be a number"):
            make()
    with pytest.raises(TypeError, match="has no value at a step"):
        RATE(0)


def test_a_method_of_the_user_that_reports_no_flips_is_named():
    perturb = L2(RATE)

    def mine(oracle: Oracle, batch: tuple[Tensor, Tensor]) -> Evaluation:
        g = oracle.query(batch).gradient
        return oracle.query(batch, at=perturb(g, oracle))

    sharp = SharpnessAware(network(), mine, cross_entropy)
    sharp(*points(16))
    with pytest.raises(ValueError, match="has not learned which examples the last step flipped"):
        sharp(*points(16))


class Derived(SAM):
    """Inherits the step, and so the flips."""


def test_a_subclass_that_changes_nothing_is_sam():
    sharp, plain = (SharpnessAware(network(), kind(RATE), cross_entropy) for kind in (Derived, SAM))
    for _ in range(3):
        assert torch.equal(sharp(*points(32)), plain(*points(32)))


@pytest.mark.parametrize(
    ("targets", "loss", "kind", "said"),
    [
        (lambda y: F.one_hot(y, 3).float(), nn.CrossEntropyLoss(), TypeError, "class labels"),
        (lambda y: F.one_hot(y, 3).float(), nn.BCEWithLogitsLoss(), TypeError, "class labels"),
    ],
)
def test_it_needs_class_labels(targets, loss, kind, said):
    x, y = points(16)
    with pytest.raises(kind, match=said):
        SharpnessAware(network(), SAM(RATE), loss)(x, targets(y))


@pytest.mark.parametrize(
    ("arguments", "kind", "said"),
    [
        ((0.0,), ValueError, "target must be in"),
        ((1.0,), ValueError, "target must be in"),
        (("0.1",), TypeError, "target must be a number"),
        ((0.1, 0.0), ValueError, "start must be positive"),
        ((0.1, 0.1, -1.0), ValueError, "gain must be positive"),
        ((0.1, 0.1, math.inf), ValueError, "gain must be positive"),
        ((0.1, 0.1, 0.1, 0.2), ValueError, r"start must be between low and high, got 0.1 for \[0.2, 10.0\]"),
        ((0.1, 11.0), ValueError, "start must be between low and high"),
    ],
)
def test_a_bad_argument_is_named(arguments, kind, said):
    with pytest.raises(kind, match=said):
        FlipRate(*arguments)


# Which predictions are right.


def test_predictions_are_compared_with_labels():
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 2.0], [0.0, 3.0, 1.0]])
    answer = Evaluation(torch.zeros(3), outputs=logits, targets=torch.tensor([0, 1, -100]))
    assert answer.correct.tolist() == [True, False, False]
    one = Evaluation(torch.zeros(()), outputs=logits[0], targets=torch.tensor(0))
    assert one.correct.item()
    padding = Evaluation(
        torch.zeros(3), outputs=logits, targets=torch.tensor([0, 1, 1]), objective=NegLog(ignore_index=0)
    )
    assert padding.correct.tolist() == [False, False, True]  # the first label is ignored, and is a class


@pytest.mark.parametrize(
    ("outputs", "targets", "kind", "said"),
    [
        (None, torch.tensor([0]), TypeError, "another rank has answered"),
        ((torch.zeros(1, 3),), torch.tensor([0]), TypeError, "outputs must be a tensor, got tuple"),
        (torch.zeros(1, 3), torch.zeros(1, 3), TypeError, r"class labels \(int64\), got targets of torch.float32"),
        (torch.zeros(2, 3), torch.tensor([0]), ValueError, "need shape"),
    ],
)
def test_what_has_no_prediction_is_named(outputs, targets, kind, said):
    with pytest.raises(kind, match=said):
        _ = Evaluation(torch.zeros(1), outputs=outputs, targets=targets).correct


def test_an_oracle_alone_has_one_rank():
    values = torch.tensor([1.0, 2.0])
    assert ModelOracle(network(), cross_entropy).over_ranks(values) is values
