"""SAF and MESA: the authors' training loops, the batches that a method divides, and what is remembered of examples."""

from __future__ import annotations

import copy
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bisam import (
    ERM,
    ESAM,
    GSAM,
    KSAM,
    MESA,
    MSAM,
    SAF,
    SAM,
    BiSAM,
    FunctionalSAM,
    Query,
    SAMPa,
    SharpnessAware,
    cross_entropy,
    next_step,
)
from bisam.masks import RandomMask
from bisam.perturbations import L2
from tests.methods.test_references import check_twin
from tests.support import cases, references
from tests.support.cases import bits, buffers, gradients, parameters, rows
from tests.support.runs import Training, close

# The authors' code.

GOLDEN = np.load(Path(__file__).with_name("golden_trajectory_loss.npz"))
META = json.loads(str(GOLDEN["meta"]))
X, Y = (torch.from_numpy(GOLDEN[name]) for name in "xy")


def network() -> nn.Sequential:
    layers = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    model = nn.Sequential(*layers, nn.Dropout(0.0), nn.Linear(4, META["classes"])).double()
    model.load_state_dict({k[5:]: torch.from_numpy(GOLDEN[k]) for k in GOLDEN.files if k.startswith("init/")})
    return model


@pytest.mark.parametrize("name", ["mesa", "saf"])
def test_training_equals_that_of_the_authors_code(name):
    """Seven epochs of their loops (see the fixture's `meta`) with batch norm and label smoothing, in float64."""
    steps, common = len(X) // META["batch"], {"lam": META["reinforce"], "temperature": META["temperature"]}
    common["start"] = (META["kl_start_epoch"] + 1) * steps  # they compare the number of the epoch by >
    method = {
        "mesa": MESA(decay=META["decay"], **common),
        "saf": SAF(epoch=steps, examples=len(X), ago=META["minus_epoch"], **common),
    }[name]
    model = network()
    loss = nn.CrossEntropyLoss(label_smoothing=META["smoothing"], reduction="none")
    sharp = SharpnessAware(model, method, loss)
    optimizer = torch.optim.SGD(model.parameters(), **META["optimizer_kwargs"])
    means = []
    for order in torch.from_numpy(GOLDEN["orders"]):
        values = []
        for i in order.split(META["batch"]):
            value = sharp(X[i], Y[i], indices=i)
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
            values.append(value.item())
        means.append(sum(values) / len(values))
    close(torch.tensor(means, dtype=torch.double), torch.from_numpy(GOLDEN[f"{name}/losses"]), 1e-9)
    for key, value in model.state_dict().items():
        close(value, torch.from_numpy(GOLDEN[f"{name}/final/{key}"]), 1e-9)


# Methods inside that divide, repeat or replace the batch.


def by_hand(weights: Tensor, past: Tensor) -> Tensor:
    """The gradient of the loss with the term, lam 2 and T 5, at the weights of a linear model of `DATA`."""
    w = weights.detach().requires_grad_()
    loss = references.with_term(cases.CE, past, 2.0, 5.0)
    return torch.autograd.grad(loss(DATA[0] @ w.T, DATA[1]).mean(), w)[0]


DATA = cases.batch(3, 8)


def primed(method: Any, **settings: Any) -> tuple[nn.Linear, SharpnessAware, Tensor]:
    """A linear model after a step that has recorded `past`; the weights have changed since."""
    torch.manual_seed(0)
    model = nn.Linear(6, cases.CLASSES, bias=False).double()
    saf = SAF(method, epoch=1, examples=8, indices=settings.pop("indices", rows), lam=2.0, ago=1, start=0)
    sharp = SharpnessAware(model, saf, cross_entropy)
    sharp(*DATA)
    past = (DATA[0] @ model.weight.T).detach()
    with torch.no_grad():
        model.weight += torch.randn_like(model.weight)
    return model, sharp, past


def gradient_of(sharp: SharpnessAware, model: nn.Linear) -> Tensor:
    model.zero_grad()
    sharp(*DATA).backward()
    return model.weight.grad


def test_micro_batches_keep_their_outputs():
    model, sharp, past = primed(MSAM(3, ERM()))
    close(gradient_of(sharp, model), by_hand(model.weight, past), 1e-12)


def test_chosen_examples_keep_their_outputs():
    model, sharp, past = primed(KSAM(5, ERM()))
    losses = references.with_term(cases.CE, past, 2.0, 5.0)(DATA[0] @ model.weight.T, DATA[1])
    hardest = losses.topk(5).indices
    w = model.weight.detach().requires_grad_()
    loss = references.with_term(cases.CE, past[hardest], 2.0, 5.0)(DATA[0][hardest] @ w.T, DATA[1][hardest])
    close(gradient_of(sharp, model), torch.autograd.grad(loss.mean(), w)[0], 1e-12)


def test_esam_selects_by_the_loss_with_the_term():
    model, sharp, past = primed(ESAM(RandomMask(L2(0.5), beta=1.0), gamma=0.5))
    loss = references.with_term(cases.CE, past, 2.0, 5.0)
    w = model.weight.detach()
    g = by_hand(w, past)
    there = w + 0.5 * g / g.norm()
    rise = loss(DATA[0] @ there.T, DATA[1]) - loss(DATA[0] @ w.T, DATA[1])
    top = rise.topk(3).indices  # those above the fourth
    at = there.requires_grad_()
    chosen = references.with_term(cases.CE, past[top], 2.0, 5.0)(DATA[0][top] @ at.T, DATA[1][top]).mean()
    close(gradient_of(sharp, model), torch.autograd.grad(chosen, at)[0], 1e-12)


def test_the_adversary_of_bisam_knows_no_term():
    model, sharp, past = primed(BiSAM(0.5))
    w = model.weight.detach().requires_grad_()
    g = torch.autograd.grad(cases.LOG(DATA[0] @ w.T, DATA[1]).mean(), w)[0]
    close(gradient_of(sharp, model), by_hand(w + 0.5 * g / g.norm(), past), 1e-12)


def test_functional_sam_inside_refuses_a_loss_that_is_trained():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()).double())

        def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return cross_entropy(outputs * self.scale, targets)

    torch.manual_seed(0)
    sharp = SharpnessAware(nn.Linear(6, cases.CLASSES).double(), MESA(FunctionalSAM(0.1)), Scaled())
    with pytest.raises(ValueError, match="cannot train the parameters of the loss Scaled"):
        sharp(*DATA)


def test_sampa_inside_keeps_the_outputs_of_the_batch_before():
    optimizers: list[Any] = []

    def make(optimizer: torch.optim.Optimizer) -> Any:
        optimizers.append(optimizer)
        return MESA(SAMPa(L2(0.1), ahead=next_step(optimizer)), lam=2.0, decay=0.7)

    sampa = references.sampa

    def twin(w: Tensor, s: references.Step) -> Tensor:
        """The term of a batch is that of its own step: the loss of the batch before is with its own outputs."""
        v = s.memory["v"] = 0.7 * s.memory.get("v", w) + 0.3 * w
        losses = s.memory.setdefault("losses", {})
        losses[id(s.batch)] = references.with_term(cases.CE, s.outputs(v).detach(), 2.0, 5.0)
        s.memory.setdefault("alive", []).append(s.batch)

        def loss(outputs: Tensor, labels: Tensor) -> Tensor:
            batch = next(b for b in s.memory["alive"] if b[1] is labels)
            return losses[id(batch)](outputs, labels)

        return sampa(cases.B, loss, loss, 0.2)(w, s.part("method"))

    check_twin(make, twin, cases.FAMILY_MODELS["mlp"](), cases.OPTIMIZERS["sgd"], steps=8)


@pytest.mark.parametrize("inner", [ERM(), SAM(0.1), GSAM(0.1), FunctionalSAM(0.1), MSAM(3, BiSAM(0.1))], ids=str)
@pytest.mark.parametrize("wrap", [partial(MESA, lam=0.0), partial(SAF, epoch=1, examples=8, indices=rows, start=10**6)])
@pytest.mark.parametrize("model", ["convnet", "mlp"])
def test_without_the_term_it_is_the_method(wrap, inner, model):
    trained = []
    for method in (inner, wrap(inner)):
        torch.manual_seed(5)
        network = cases.MODELS[model]()
        trained.append(cases.train(SharpnessAware(network, method, cross_entropy), network))
    (weights, moved), (others, others_moved) = trained
    assert moved == others_moved
    if isinstance(wrap, partial) and wrap.func is SAF:
        assert weights == others
    else:  # 0 times the term is added
        for name in weights:
            one, other = (torch.tensor(w[name], dtype=torch.uint8).view(torch.double) for w in (weights, others))
            close(one, other, 1e-12)


# The average of the weights is run in eval mode.


def test_the_average_is_run_in_eval_mode_and_leaves_no_trace():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, cases.CLASSES)).double()
    model[1].eval()  # frozen by the user
    modes, seen = [m.training for m in model.modules()], []
    model[1].register_forward_pre_hook(lambda m, args: seen.append((m.training, bits(m.running_mean))))
    model[2].register_forward_pre_hook(lambda m, args: seen.append(m.training))
    sharp = SharpnessAware(model, MESA(decay=0.5), cross_entropy)
    first = buffers(model)
    sharp(*cases.batch(1)).backward()  # the first pass of training is one at the weights
    seen.clear()
    sharp(*cases.batch()).backward()
    assert seen[:2] == [(False, first["1.running_mean"]), False]
    assert seen[3] is True
    assert [m.training for m in model.modules()] == modes
    assert buffers(model) == first


def test_the_averages_of_running_statistics_are_those_of_the_average():
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, cases.CLASSES)).double()
    seen: list[Tensor] = []
    hook = lambda m, args: None if m.training else seen.append(m.running_mean.clone())  # noqa: E731
    model[0].register_forward_pre_hook(hook)
    sharp, expected, average = SharpnessAware(model, MESA(decay=0.75), cross_entropy), [], None
    for number in range(4):
        now = model[0].running_mean.clone()
        average = now if average is None else 0.75 * average + 0.25 * now
        expected.append(average)
        sharp(*cases.batch(number)).backward()
    close(torch.stack(seen), torch.stack(expected), 1e-15)


def test_a_batch_that_is_not_finite_does_not_stay_in_the_average():
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, cases.CLASSES)).double()
    sharp = SharpnessAware(model, MESA(decay=0.75), cross_entropy)
    sharp(*cases.batch(0)).backward()
    x, y = cases.batch(1)
    sharp(x * torch.nan, y).backward()
    model.zero_grad()
    loss = sharp(*cases.batch(2))
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_a_failure_in_eval_mode_restores_modes_and_buffers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, cases.CLASSES)).double()
    sharp = SharpnessAware(model, MESA(decay=0.5), cross_entropy)
    sharp(*cases.batch(0)).backward()
    before, weights = buffers(model), parameters(model)

    def fail(module: nn.Module, args: Any) -> None:
        if not module.training:
            raise RuntimeError("boom")

    model[2].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="boom"):
        sharp(*cases.batch(1))
    assert all(m.training for m in model.modules())
    assert (buffers(model), parameters(model)) == (before, weights)


def test_a_query_in_eval_mode_by_hand():
    from bisam import ModelOracle

    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, cases.CLASSES)).double()
    oracle = ModelOracle(model, cross_entropy)
    values = [b + 1 if b.is_floating_point() else b for b in model.buffers()]
    query = Query(cases.batch(), grad=False, buffers=values)
    assert not query.tracks
    assert not Query(cases.batch(), track=True, buffers=values).tracks
    there = copy.deepcopy(model).eval()
    for buffer, value in zip(there.buffers(), values, strict=True):
        buffer.copy_(value)
    close(oracle.ask([query])[0].outputs, there(cases.batch()[0]).detach(), 0)
    with pytest.raises(ValueError, match="has 1 buffers, and the model 3"):
        oracle.ask([Query(cases.batch(), buffers=values[:1])])


# The outputs of examples.


def stepped(sharp: SharpnessAware, model: nn.Module, index: list[int], number: int) -> dict[str, Any]:
    x, y = cases.batch(number, len(index))
    model.zero_grad()
    sharp(x, y, indices=torch.tensor(index)).backward()
    return gradients(model)


def saf_and_plain(**settings: Any) -> list[tuple[SharpnessAware, nn.Module]]:
    found = []
    for method in (SAF(examples=6, lam=5.0, start=0, **settings), ERM()):
        torch.manual_seed(0)
        model = nn.Linear(6, cases.CLASSES).double()
        found.append((SharpnessAware(model, method, cross_entropy), model))
    return found


def test_an_example_without_earlier_outputs_gets_no_term():
    (saf, model), (plain, other) = saf_and_plain(epoch=2, ago=1)
    for number, index in enumerate(([0, 1], [2, 3], [4, 5])):  # 0 to 3 in the first epoch
        assert stepped(saf, model, index, number) == stepped(plain, other, index, number)
    mixed = stepped(saf, model, [4, 0], 3)  # 4 in this epoch only
    assert mixed != stepped(plain, other, [4, 0], 3)
    state = saf.get_extra_state()["state"]
    assert [epochs.tolist() for epochs in state["epochs"]] == [[0, 0, 0, 0, -1, -1], [1, -1, -1, -1, 1, 1]]
    assert [t.shape for t in state["outputs"]] == [(6, cases.CLASSES)] * 2
    # In epoch 3 the outputs of epoch 2 count; nothing was recorded in it for these.
    saf.set_extra_state({**saf.get_extra_state(), "step": 6})
    assert stepped(saf, model, [2, 0], 9) == stepped(plain, other, [2, 0], 9)


def test_an_example_that_comes_twice_in_an_epoch_is_compared_twice():
    (saf, model), (plain, other) = saf_and_plain(epoch=2, ago=1)
    for number in range(2):
        stepped(saf, model, [0, 1], number)
    for number in (2, 3):
        with torch.no_grad():
            model.weight += 0.1
            other.weight.copy_(model.weight)
        assert stepped(saf, model, [0, 1], number) != stepped(plain, other, [0, 1], number)


def test_indices_are_left_out_where_no_method_needs_them():
    (saf, model), (plain, _) = saf_and_plain(epoch=2, ago=1)
    x, y = cases.batch()
    loss = plain(x, y, indices=torch.arange(8))
    assert loss == plain(x, y)
    with torch.no_grad():
        assert saf(x, y, indices=torch.arange(8)) == saf(x, y) == cross_entropy(model(x), y).mean()


def test_other_keyword_arguments_are_kept():
    torch.manual_seed(0)
    model = nn.Linear(6, cases.CLASSES).double()

    def forward(model: nn.Module, *, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return model(x), y

    sharp = SharpnessAware(model, SAF(epoch=1, examples=8), cross_entropy, forward)
    x, y = cases.batch()
    close(sharp(x=x, y=y, indices=torch.arange(8)), cross_entropy(model(x), y).mean(), 1e-15)


@pytest.mark.parametrize(
    ("indices", "error", "message"),
    [
        (None, TypeError, r"sharp\(x, y, indices=i\)"),
        ([0, 1], TypeError, "must be a tensor of integers, got list"),
        (torch.zeros(2), TypeError, "got a tensor of shape .* torch.float32"),
        (torch.tensor([0]), ValueError, r"shape \(1,\) for 2 examples"),
        (torch.tensor([0, 6]), ValueError, r"index 6 is not the number of an example, 0 to 5 with SAF\(examples=6\)"),
        (torch.tensor([0, -1]), ValueError, "index -1 is not the number"),
    ],
)
@pytest.mark.parametrize("steps", [0, 3])
def test_wrong_indices_are_refused(indices, error, message, steps):
    (saf, model), _ = saf_and_plain(epoch=1, ago=1)
    for number in range(steps):
        stepped(saf, model, [0, 1], number)
    before = str(dict(saf.get_extra_state()))
    named = {} if indices is None else {"indices": indices}
    with pytest.raises(error, match=message):
        saf(*cases.batch(9, 2), **named)
    assert str(dict(saf.get_extra_state())) == before


def test_other_outputs_are_refused():
    torch.manual_seed(0)
    model = nn.Linear(6, cases.CLASSES).double()
    sharp = SharpnessAware(model, SAF(epoch=1, examples=8, indices=rows), cross_entropy, lambda m, x, y: (m(x), y))
    sharp(*cases.batch()).backward()
    other = SharpnessAware(nn.Linear(6, 9).double(), SAF(epoch=1, examples=8, indices=rows), cross_entropy)
    other.set_extra_state(sharp.get_extra_state())
    with pytest.raises(ValueError, match=r"remembers outputs of shape \(8, 4\), and now .* shape \(9,\)"):
        other(*cases.batch())
    for method in (MESA(), SAF(epoch=1, examples=8, indices=lambda batch: torch.arange(8))):
        bad = SharpnessAware(
            model, method, lambda outputs, targets: outputs["z"].sum(), lambda m, x, y: ({"z": m(x)}, y)
        )
        with pytest.raises(TypeError, match=r"logits \(N, K, ...\), and the outputs of the model are dict"):
            bad(*cases.batch())


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: SAF(epoch=0, examples=8), ValueError, "epoch must be at least 1"),
        (lambda: SAF(epoch=1, examples=2.0), TypeError, "examples must be an int"),
        (lambda: SAF(epoch=1, examples=8, ago=0), ValueError, "ago must be at least 1"),
        (lambda: SAF(epoch=1, examples=8, start=-1), ValueError, "start must be at least 0"),
        (lambda: SAF(epoch=1, examples=8, indices=3), TypeError, "indices must be a function"),
        (lambda: SAF(SAM, epoch=1, examples=8), TypeError, "the class SAM"),
        (lambda: SAF(epoch=1, examples=8, lam=-1), ValueError, "lam must be non-negative"),
        (lambda: MESA(temperature=0.0), ValueError, "temperature must be positive"),
        (lambda: MESA(decay=1.0), ValueError, r"decay must be in \[0, 1\)"),
        (lambda: MESA(start=0.5), TypeError, "start must be an int"),
        (lambda: MESA(method=None), TypeError, "method must be"),
    ],
)
def test_arguments_are_checked(make, error, message):
    with pytest.raises(error, match=message):
        make()


# Losses.


def term_of(loss: Any, outputs: Tensor, targets: Tensor, past: Tensor) -> Tensor:
    """The difference that the term makes to the loss, through the public interface."""
    torch.manual_seed(0)
    outputs = outputs.double()
    shift = nn.Parameter(torch.zeros(()).double())
    model = nn.Module()
    model.shift = shift
    state = {"now": past.double()}
    saf = SAF(epoch=1, examples=len(outputs), indices=rows_of, lam=2.0, ago=1, start=0)
    sharp = SharpnessAware(model, saf, loss, lambda m, x, y: (state["now"] + m.shift, y))
    x = torch.zeros(len(outputs), 1)
    sharp(x, targets)
    state["now"] = outputs
    return sharp(x, targets) - SharpnessAware(model, ERM(), loss, lambda m, x, y: (outputs + m.shift, y))(x, targets)


def rows_of(batch: tuple[Tensor, ...]) -> Tensor:
    return torch.arange(len(batch[0]))


def kl(past: Tensor, now: Tensor) -> Tensor:
    p, q = (F.softmax(z.double() / 5, 1) for z in (past, now))
    return 50 * (p * (p.log() - q.log())).sum(1)


GEN = torch.Generator().manual_seed(0)
NOW, PAST, LABELS = torch.randn(4, 3, generator=GEN), torch.randn(4, 3, generator=GEN), torch.tensor([0, 1, -100, 2])


def test_the_mean_of_the_term_is_added_to_a_mean():
    expected = kl(PAST, NOW).mean()
    labels = LABELS.clamp_min(0)
    for loss in (cross_entropy, nn.CrossEntropyLoss(), nn.CrossEntropyLoss(label_smoothing=0.1, reduction="none")):
        close(term_of(loss, NOW, labels, PAST), expected, 1e-12)
    soft = F.softmax(PAST.double() * 3, 1)
    close(term_of(cross_entropy, NOW, soft, PAST), expected, 1e-12)


def test_ignored_examples_get_no_term():
    expected = kl(PAST, NOW)[LABELS >= 0].mean()
    for loss in (cross_entropy, nn.CrossEntropyLoss()):
        close(term_of(loss, NOW, LABELS, PAST), expected, 1e-12)


def test_maps_are_compared_by_position():
    now, past = (torch.randn(2, 3, 2, 2, generator=GEN) for _ in range(2))
    labels = torch.randint(3, (2, 2, 2), generator=GEN)
    labels[0, 0, 0] = -100
    close(term_of(cross_entropy, now, labels, past), kl(past, now)[labels >= 0].mean(), 1e-12)
    per_image = lambda outputs, targets: F.cross_entropy(outputs, targets, reduction="none").mean((1, 2))  # noqa: E731
    close(term_of(per_image, now, labels.clamp_min(0), past), kl(past, now).mean(), 1e-12)


def test_losses_of_several_labels_each_get_the_term_of_their_example():
    several = nn.BCEWithLogitsLoss(reduction="none")
    close(term_of(several, NOW, torch.ones(4, 3).double(), PAST), kl(PAST, NOW).mean(), 1e-12)


def test_half_precision_is_compared_in_float32():
    torch.manual_seed(0)
    model = nn.Linear(6, cases.CLASSES)
    x, y = cases.batch()
    sharp = SharpnessAware(model, SAF(epoch=1, examples=8, indices=rows, lam=2.0, ago=1, start=0), cross_entropy)
    with torch.autocast("cpu", torch.bfloat16):
        sharp(x.float(), y)
        past = model(x.float()).detach()
        with torch.no_grad():
            model.weight += 0.3
        loss = sharp(x.float(), y)
        now = model(x.float())
    assert sharp.get_extra_state()["state"]["outputs"][0].dtype == torch.bfloat16
    expected = cross_entropy(now.float(), y).mean().double() + kl(past.float(), now.float()).mean()
    close(loss.double(), expected, 1e-5)


# Resumed in the middle of an epoch.


def test_a_resumed_run_remembers_the_outputs():
    def make(optimizer: torch.optim.Optimizer) -> Any:
        return SAF(BiSAM(0.1), epoch=3, examples=8, indices=rows, ago=1, start=0, lam=3.0)

    whole = Training(make).step(0, 1, 2, 3)
    resumed = Training(make).load(whole.saved())
    whole.step(4, 5, 6, 7)
    resumed.step(4, 5, 6, 7)
    assert (resumed.weights, resumed.memory) == (whole.weights, whole.memory)
    assert (whole.sharp.clean.value - cross_entropy(whole.sharp.clean.outputs, whole.batch(7)[1]).mean()).abs() == 0


def test_a_run_that_resumes_with_a_pass_of_the_average_moves_running_statistics_once():
    """Batch norm changes them without a new version, and what moves is not known yet in a new process."""

    def make(optimizer: torch.optim.Optimizer) -> Any:
        return MESA(SAM(L2(0.1)), decay=0.9, start=2)

    whole = Training(make, cases.convnet).step(0, 1, 2)
    resumed = Training(make, cases.convnet).load(whole.saved())
    whole.step(3, 4)
    resumed.step(3, 4)
    assert (resumed.weights, resumed.memory) == (whole.weights, whole.memory)
    assert buffers(resumed.model) == buffers(whole.model)
