"""Zero-one sharpness and flips: against brute force over the ball, and against loops written by hand."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bisam import L2, SAM, Adaptive, BiSAM, ModelOracle, NegLog, SharpnessAware, Tanh, cross_entropy
from bisam.analysis import ZeroOne, flips, zero_one_sharpness
from bisam.objectives import CrossEntropy
from tests.support import cases
from tests.support.cases import everything

DATA = [cases.batch(seed, 32) for seed in range(3)]


def two_weights() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """A linear classifier of two classes with two weights, and examples of which it has most right."""
    torch.manual_seed(0)
    model = nn.Linear(2, 1, bias=False).double()
    model.weight.data = torch.tensor([[1.0, 0.3]]).double()
    x = torch.randn(80, 2).double()
    y = (x @ torch.tensor([1.0, -0.2]).double() > 0).long()
    return model, [(x[:50], y[:50]), (x[50:], y[50:])]


def stacked(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    z = model(x)[:, 0]
    return torch.stack([torch.zeros_like(z), z], 1), y


def brute_force(model: nn.Module, data: list[tuple[Tensor, Tensor]], rho: float, scale: Tensor) -> float:
    """The largest error over a fine grid of the ball."""
    x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    w, worst = model.weight.detach()[0], 0.0
    for length in torch.linspace(0, rho, 15).tolist():
        for angle in torch.linspace(0, 2 * math.pi, 721).tolist():
            e = scale * length * torch.tensor([math.cos(angle), math.sin(angle)]).double()
            worst = max(worst, float(((x @ (w + e) > 0).long() != y).double().mean()))
    return worst


@pytest.mark.parametrize("rho", [0.1, 0.4, 0.8])
@pytest.mark.parametrize("adaptive", [False, True])
def test_the_largest_error_is_that_of_brute_force(rho, adaptive):
    model, data = two_weights()
    scale = model.weight.detach()[0].abs() if adaptive else torch.ones(2).double()
    exact = brute_force(model, data, rho, scale)
    perturb = Adaptive(rho) if adaptive else L2(rho)
    found = zero_one_sharpness(ModelOracle(model, cross_entropy, stacked), data, perturb, steps=90)
    assert found.error <= found.worst <= exact
    assert found.error < found.worst or rho == 0.1
    assert found.worst >= exact - 1.01 / 80  # at most one example is missed
    assert found.rise == found.worst - found.error


def test_the_first_step_is_that_of_training():
    """With one step of one objective the error is that at the displaced weights of SAM or BiSAM."""
    model, batch = cases.mlp(), cases.batch(3, 64)
    for method, objective in ((SAM(0.7), cross_entropy), (BiSAM(0.7, Tanh()), Tanh())):
        outputs: list[Tensor] = []
        handle = model.register_forward_hook(lambda _, __, out: outputs.append(out.detach()))  # noqa: B023
        SharpnessAware(model, method, cross_entropy)(*batch)
        handle.remove()
        plain, there = [float((out.argmax(1) != batch[1]).double().mean()) for out in outputs[-2:]]
        found = zero_one_sharpness(
            ModelOracle(model, cross_entropy), [batch], 0.7, {"it": objective}, steps=1, mode="train"
        )
        assert (found.error, found.worst) == (pytest.approx(plain), pytest.approx(max(plain, there)))
        assert there > plain


def test_each_adversary_has_a_trace_that_never_falls():
    model = cases.mlp()
    found = zero_one_sharpness(ModelOracle(model, cross_entropy), DATA, 1.0, steps=7)
    assert found.worst == max(found.by.values())
    assert {len(trace) for trace in found.traces.values()} == {8}  # equal numbers of gradients
    for name, trace in found.traces.items():
        assert list(trace) == sorted(trace)
        assert (trace[0], trace[-1]) == (found.error, found.by[name])
    assert found.forward == pytest.approx(1 + 3 * 7 + 7)
    assert found.backward == pytest.approx(3 * 7)
    assert found.to_dict()["adversaries"]["-log"][1] == repr(NegLog(4.0))


def test_the_error_leaves_out_ignored_labels_and_counts_positions():
    z, y = torch.randn(4, 3, 5), torch.randint(3, (4, 5))
    y[0, 2] = y[3, 1] = 7
    wrong = (z.argmax(1) != y).float()
    wrong[0, 2] = wrong[3, 1] = 0
    assert torch.equal(ZeroOne(7)(z, y), wrong)
    assert ZeroOne.like(CrossEntropy(ignore_index=0)).ignore_index == 0
    x, labels = cases.batch(0, 16)
    labels[:6] = 3
    loss = CrossEntropy(ignore_index=3)
    model = cases.mlp()
    found = zero_one_sharpness(ModelOracle(model, loss), [(x, labels)], 0.01, {"ce": loss}, steps=1, mode="train")
    right = (model(x).argmax(1) == labels)[6:]
    counted = labels[6:] != 3
    assert found.examples == int(counted.sum())
    assert found.error == pytest.approx(1 - float(right[counted].double().mean()))


def flipped_by_hand(model: nn.Module, x: Tensor, y: Tensor, loss, rho: float) -> tuple[int, int, Tensor]:
    copied = copy.deepcopy(model)
    grads = torch.autograd.grad(loss(copied(x), y).mean(), list(copied.parameters()))
    before = copied(x).argmax(1) == y
    norm = torch.cat([g.flatten() for g in grads]).norm()
    with torch.no_grad():
        for p, g in zip(copied.parameters(), grads, strict=True):
            p += rho * g / norm
    after = copied(x).argmax(1) == y
    flat = torch.cat([g.flatten() for g in grads]) / norm
    return int((before & ~after).sum()), int((~before & after).sum()), flat


def test_flips_and_cosines_are_those_of_a_loop():
    model = cases.mlp()
    smoothed = torch.nn.CrossEntropyLoss(label_smoothing=0.1, reduction="none")
    adversaries = {"loss": None, "ce": cross_entropy, "-log": NegLog()}
    losses = {"loss": smoothed, "ce": F.cross_entropy, "-log": NegLog()}
    found = flips(ModelOracle(model, smoothed), DATA, 0.6, adversaries, mode="train")
    cosine, total = 0.0, {name: [0, 0] for name in losses}
    for x, y in DATA:
        results = {name: flipped_by_hand(model, x, y, loss, 0.6) for name, loss in losses.items()}
        for name, (flipped, repaired, _) in results.items():
            total[name][0] += flipped
            total[name][1] += repaired
        cosine += float(results["loss"][2] @ results["-log"][2]) / len(DATA)
    assert {name: [found.flipped[name], found.repaired[name]] for name in losses} == total
    assert sum(found.flipped.values()) > 10
    assert found.cosines["loss"]["-log"] == found.cosines["-log"]["loss"] == pytest.approx(cosine, rel=1e-10)
    assert found.cosines["ce"]["ce"] == 1
    assert found.correct == sum(int((model(x).argmax(1) == y).sum()) for x, y in DATA)
    assert (found.forward, found.backward) == (pytest.approx(7), pytest.approx(3))
    assert found.rise["loss"] > 0
    assert found.batches == 3


@pytest.mark.parametrize("measure", [zero_one_sharpness, flips])
def test_the_model_is_left_as_it_is(measure):
    model = cases.normed()
    before, random = everything(model), torch.get_rng_state()
    for mode in ("eval", "train", None):
        measure(ModelOracle(model, cross_entropy), DATA, 0.3, mode=mode)
        assert everything(model) == before
    assert torch.equal(torch.get_rng_state(), random)


def regression(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return model(x)[:, 0], y.double()


def first_logits(outputs: Tensor, targets: Tensor) -> Tensor:
    """A loss that does not notice labels outside the classes."""
    return outputs[:, 0]


def beyond(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return model(x), torch.full_like(y, 4)


@pytest.mark.parametrize("measure", [zero_one_sharpness, flips])
@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"adversaries": {}}, ValueError, r"adversaries is empty: name at least one objective, such as"),
        ({"adversaries": {"it": 3}}, TypeError, r"adversary 'it' must be an objective such as NegLog\(\)"),
        ({"adversaries": {"it": NegLog}}, TypeError, r"adversary 'it' is the class NegLog"),
        ({"data": iter(())}, ValueError, "no batches"),
        ({"perturb": SAM()}, TypeError, "perturb must be a ball"),
        ({"source": ModelOracle(cases.mlp(), nn.MSELoss(), regression)}, ValueError, r"the 0-1 loss compares logits"),
        (
            {"source": ModelOracle(cases.mlp(), first_logits, beyond)},
            ValueError,
            r"labels of 4 classes are 0 to 3, .*, got 4",
        ),
    ],
    ids=cases.named,
)
def test_bad_input_is_one_line(measure, arguments, error, said):
    given = {"source": ModelOracle(cases.mlp(), cross_entropy), "data": DATA, **arguments}
    with pytest.raises(error, match=said) as raised:
        measure(given.pop("source"), given.pop("data"), **given)
    assert "\n" not in str(raised.value)


def test_an_adversary_with_fewer_steps_than_objectives_is_refused():
    with pytest.raises(ValueError, match="steps=2 are fewer than the 3 objectives of an adversary"):
        zero_one_sharpness(ModelOracle(cases.mlp(), cross_entropy), DATA, steps=2)


def test_an_adversary_without_objectives_is_refused():
    with pytest.raises(ValueError, match="adversary 'it' has no objective"):
        zero_one_sharpness(ModelOracle(cases.mlp(), cross_entropy), DATA, adversaries={"it": ()})


def test_flips_count_labels_where_the_loss_is_a_scalar():
    """As in a language model: each position with a label counts, and the loss is the mean over a batch."""
    torch.manual_seed(0)
    model = nn.Linear(6, 4).double()

    def positions(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return model(x).movedim(-1, 1), y

    x, y = torch.randn(8, 5, 6).double(), torch.randint(4, (8, 5))
    y[0, 1:] = y[3, 2] = -100
    found = flips(ModelOracle(model, nn.CrossEntropyLoss(), positions), [(x, y)], 1.0, {"SAM": None})
    before, after = moved(model, x, y, 1.0)
    assert found.examples == int((y != -100).sum()) == 35
    assert found.correct == int(before.sum())
    assert found.flipped["SAM"] == int((before & ~after).sum()) > 0
    assert found.repaired["SAM"] == int((~before & after & (y != -100)).sum())


def moved(model: nn.Module, x: Tensor, y: Tensor, rho: float) -> tuple[Tensor, Tensor]:
    """Where the prediction is that of the label, at the weights and after a step of SAM's adversary."""
    copied = copy.deepcopy(model)
    loss = F.cross_entropy(copied(x).movedim(-1, 1), y)
    grads = torch.autograd.grad(loss, list(copied.parameters()))
    before = copied(x).argmax(-1) == y
    norm = torch.cat([g.flatten() for g in grads]).norm()
    with torch.no_grad():
        for p, g in zip(copied.parameters(), grads, strict=True):
            p += rho * g / norm
    return before, copied(x).argmax(-1) == y


def test_an_error_without_labels_is_refused():
    with pytest.raises(ValueError, match="there are no labels of classes here, as in a regression"):
        ZeroOne()(torch.randn(4, 3), None)
