"""SWAD averages the weights that the algorithm chooses, and averages of torch do not see displaced weights."""

from __future__ import annotations

import copy
import io
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

from bisam import SAM, SWAD, SharpnessAware, cross_entropy
from tests.support import cases, references


def chosen(losses: list[float], n_s: int, n_e: int, r: float) -> tuple[int | None, int | None, range]:
    """The start and the end by the algorithm, and the validations (from 1) whose segments are averaged."""
    start, end, threshold = None, None, 0.0
    for i in range(1, len(losses) + 1):
        if start is None:
            window = losses[i - n_s : i] if i >= n_s else []
            if window and window[0] == min(window):
                start, threshold = i - n_s + 1, r * (sum(window) / n_s)
        elif threshold < min(losses[max(0, i - n_e) : i]):
            end = i - n_e
            break
    if start is None:
        first = losses.index(min(losses)) + 1
        return None, None, range(first, len(losses) + 1)
    last = end or max(i for i, loss in enumerate(losses, start=1) if i == start or (i > start and loss <= threshold))
    return start, end, range(start, last + 1)


def run(swad: SWAD, model: nn.Module, losses: list[float], lengths: list[int], first: int = 0) -> list[list[Tensor]]:
    """Gives steps and losses to `swad`; returns the weights of each segment."""
    segments = []
    for i, (loss, length) in enumerate(zip(losses, lengths, strict=True)):
        steps = []
        for k in range(length):
            with torch.no_grad():
                for j, p in enumerate(model.parameters()):
                    generator = torch.Generator().manual_seed(1000 * (first + i) + 10 * k + j)
                    p.copy_(torch.randn(p.shape, generator=generator))
            swad.update_parameters(model)
            steps.append(references.flat(model))
        segments.append(steps)
        swad.record(loss)
    return segments


SEQUENCES = range(40)


@pytest.mark.parametrize("n_s", [1, 2, 3])
@pytest.mark.parametrize("extra", [0, 1, 3])
@pytest.mark.parametrize("r", [1.0, 1.2])
def test_the_average_is_that_of_the_algorithm_after_each_validation(n_s, extra, r):
    ended = 0
    for seed in SEQUENCES:
        draw = random.Random(seed)
        losses = [draw.choice([1.0, 1.1, 1.2, 1.3, 1.5, 2.0]) for _ in range(draw.randint(1, 9))]
        losses += [draw.choice([1.1, 2.0, 2.0, 3.0, 3.0, 4.0]) for _ in range(draw.randint(0, 9))]
        lengths = [draw.randint(1, 3) for _ in losses]
        model = nn.Linear(2, 1).double()
        swad, segments = SWAD(model, n_s, n_s + extra, r), []
        for i in range(len(losses)):
            segments += run(swad, model, losses[i : i + 1], lengths[i : i + 1], i)
            start, end, included = chosen(losses[: i + 1], n_s, n_s + extra, r)
            weights = [w for j in included for w in segments[j - 1]]
            mean = torch.stack(weights).mean(0)
            torch.testing.assert_close(references.flat(swad.module), mean, rtol=0, atol=1e-12)
            assert swad.n_averaged == len(weights)
            assert swad.start == (None if start is None else sum(lengths[: start - 1]))
            assert swad.end == (None if end is None else sum(lengths[:end]))
        ended += swad.end is not None
    assert 0 < ended < len(SEQUENCES)


def test_after_the_end_nothing_changes():
    model = nn.Linear(2, 1)
    swad = SWAD(model, 1, 1, 1.0)
    run(swad, model, [1.0, 2.0], [2, 2])
    assert (swad.start, swad.end, swad.record(0.5)) == (0, 2, True)
    before = copy.deepcopy(swad.state_dict())
    run(swad, model, [0.1, 5.0], [1, 1], first=7)
    torch.testing.assert_close(swad.state_dict(), before, rtol=0, atol=0)


def through_a_file(swad: SWAD, model: nn.Module) -> SWAD:
    file = io.BytesIO()
    torch.save(swad.state_dict(), file)
    file.seek(0)
    other = SWAD(model, 2, 3, 1.1)
    other.load_state_dict(torch.load(file, weights_only=True))
    return other


LOSSES, LENGTHS = [3.0, 2.0, 2.1, 2.2, 9.0, 9.0, 2.0, 9.0, 9.0, 9.0, 1.0], [2, 1, 3, 2, 1, 2, 3, 1, 2, 1, 2]


@pytest.mark.parametrize("copied", [through_a_file, lambda swad, model: copy.deepcopy(swad)], ids=["file", "deepcopy"])
@pytest.mark.parametrize("at", range(len(LOSSES)))
def test_a_copy_goes_on_bit_for_bit(at, copied):
    model = nn.Linear(2, 1)
    swad = SWAD(model, 2, 3, 1.1)
    run(swad, model, LOSSES[:at], LENGTHS[:at])
    swad.update_parameters(model)  # in the middle of a segment
    other = copied(swad, model)
    theirs = {p.data_ptr() for p in [*other.parameters(), *other._rest.tensors]}
    assert theirs.isdisjoint(p.data_ptr() for p in [*swad.parameters(), *swad._rest.tensors])
    for one in (swad, other):
        run(one, model, LOSSES[at:], LENGTHS[at:], at)
    assert swad.end is not None
    torch.testing.assert_close(other.state_dict(), swad.state_dict(), rtol=0, atol=0)


def test_a_loaded_state_is_a_copy():
    model = nn.Linear(2, 1)
    swad = SWAD(model, 3, 3)
    run(swad, model, [1.0, 2.0], [1, 1])
    swad.update_parameters(model)
    saved = swad.state_dict()
    before = copy.deepcopy(saved)
    other = SWAD(model, 3, 3)
    other.load_state_dict(saved)
    run(other, model, [3.0, 4.0, 0.1], [1, 1, 1], first=3)
    torch.testing.assert_close(saved, before, rtol=0, atol=0)


def test_it_is_kept_on_a_device_and_in_the_type_of_the_model():
    model = nn.Linear(2, 1).to(torch.bfloat16)
    swad = SWAD(model, device="cpu")
    run(swad, model, [1.0], [3])
    assert {(p.device.type, p.dtype) for p in swad.parameters()} == {("cpu", torch.bfloat16)}
    assert isinstance(swad, AveragedModel)
    assert swad(torch.ones(1, 2, dtype=torch.bfloat16)).shape == (1, 1)


@pytest.mark.filterwarnings("ignore:ComplexHalf support")
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.complex32])
def test_the_average_of_many_steps_in_half_precision_moves(kind):
    model, steps = nn.Module(), 600
    model.weight = nn.Parameter(torch.zeros(1, 1, dtype=kind))
    swad, seen = SWAD(model, 2, 2), list[complex]()
    for step in range(steps):
        model.weight.data.fill_(1 + step / steps)
        seen.append(model.weight.item())
        swad.update_parameters(model)
        if step % 2:  # segments that are too many too
            swad.record(1.0)
            swad = through_a_file(swad, model) if step == 301 else swad
    mean = sum(seen) / steps
    assert swad.n_averaged == steps
    assert swad.module.weight.dtype is kind
    assert swad.module.weight.item() == pytest.approx(mean, rel=4e-3)  # a rounding of bfloat16


def test_weights_of_integer_types_are_those_of_the_model():
    model = nn.Linear(2, 1)
    model.codes = nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False)
    swad, weights = SWAD(model, 1, 1), list[Tensor]()
    for step in range(4):
        model.weight.data.fill_(step)
        model.codes.data.fill_(step)
        weights.append(model.weight.detach().clone())
        swad.update_parameters(model)
        swad.record(1.0)
    torch.testing.assert_close(swad.module.weight.detach(), torch.stack(weights).mean(0))
    assert swad.module.codes.tolist() == [3, 3, 3]


@pytest.mark.parametrize("at", range(len(LOSSES)))
def test_it_can_be_moved_between_two_steps(at):
    model = nn.Linear(2, 1).double()
    swad = SWAD(model, 2, 3, 1.1)
    run(swad, model, LOSSES[:at], LENGTHS[:at])
    swad.update_parameters(model)
    other = copy.deepcopy(swad).float()
    for one in (swad, other):
        run(one, model, LOSSES[at:], LENGTHS[at:], at)
    assert (other.start, other.end) == (swad.start, swad.end)
    assert {p.dtype for p in other.parameters()} == {torch.float32}
    torch.testing.assert_close(references.flat(other.module).double(), references.flat(swad.module), rtol=0, atol=1e-6)


def test_a_state_is_that_of_its_moment():
    model = nn.Linear(2, 1)
    swad = SWAD(model, 3, 3)
    run(swad, model, [1.0, 2.0], [1, 1])
    losses = swad.state_dict()["_extra_state"]["_losses"]
    run(swad, model, [1.5], [1], first=2)
    assert losses == [1.0, 2.0]


def test_a_smaller_patience_than_that_of_a_loaded_state_ends_too():
    model = nn.Linear(2, 1)
    swad = SWAD(model, 5, 5)
    run(swad, model, [1.0, 2.0, 2.0, 2.0], [1, 1, 1, 1])
    other = SWAD(model, 2, 2, 1.0)
    other.load_state_dict(swad.state_dict())
    run(other, model, [2.0, 9.0, 9.0], [1, 1, 1], first=4)
    assert (other.start, other.end is not None) == (0, True)


# With SharpnessAware.


def norm_net() -> nn.Module:
    torch.manual_seed(0)
    return cases.mlp(nn.BatchNorm1d)


def statistics_by_hand(model: nn.Module, inputs: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The means over batches of the mean and the variance of the first layer's outputs."""
    first = model[0]
    outputs = [first(x).detach() for x in inputs]
    return torch.stack([o.mean(0) for o in outputs]).mean(0), torch.stack([o.var(0) for o in outputs]).mean(0)


def ema(averages: list[Tensor], w: Tensor) -> Tensor:
    return w if not averages else 0.9 * averages[-1] + 0.1 * w


def test_averages_of_torch_see_the_weights_after_each_step_and_update_bn_works():
    model = norm_net()
    sharp = SharpnessAware(model, SAM(5.0), cross_entropy)  # displaced weights would be far away
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    schedule = SWALR(optimizer, swa_lr=0.02, anneal_epochs=2)
    swa, swad = AveragedModel(model), SWAD(model, 1, 1)
    smooth = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=False)
    seen, averages = list[Tensor](), list[Tensor]()
    for i in range(6):
        optimizer.zero_grad()
        sharp(*cases.batch(i)).backward()
        optimizer.step()
        schedule.step()
        for average in (swa, smooth, swad):
            average.update_parameters(model)
        seen.append(references.flat(model))
        averages.append(ema(averages, seen[-1]))
    swad.record(1.0)
    inputs = [cases.batch(i)[0] for i in range(3)]
    before = cases.parameters(model), cases.buffers(model)
    for average, expected in (
        (swa, torch.stack(seen).mean(0)),
        (swad, torch.stack(seen).mean(0)),
        (smooth, averages[-1]),
    ):
        torch.testing.assert_close(references.flat(average.module), expected, rtol=0, atol=1e-12)
        update_bn([(x, None) for x in inputs], average)
        mean, variance = statistics_by_hand(average.module, inputs)
        norm = average.module[1]
        torch.testing.assert_close(norm.running_mean, mean, rtol=0, atol=1e-12)
        torch.testing.assert_close(norm.running_var, variance, rtol=0, atol=1e-12)
        assert average.training
        assert average.module[1].momentum == 0.1
    assert (cases.parameters(model), cases.buffers(model)) == before
    sharp(*cases.batch(9)).backward()  # training goes on


def with_buffer(model: nn.Module) -> nn.Module:
    model.register_buffer("more", torch.zeros(1))
    return model


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda m, s: SWAD(m, 0), ValueError, "optimum_patience must be at least 1, got 0"),
        (lambda m, s: SWAD(m, 2.0), TypeError, "optimum_patience must be an int, got 2.0"),
        (lambda m, s: SWAD(m, 3, 2), ValueError, "at least optimum_patience, which is 3, got 2"),
        (lambda m, s: SWAD(m, tolerance=0.3), ValueError, "must be at least 1, got 0.3: write 1.3"),
        (lambda m, s: SWAD(m, tolerance=float("nan")), ValueError, "tolerance must be finite, got nan"),
        (lambda m, s: s.record(float("nan")), ValueError, "the validation loss must be non-negative and finite"),
        (lambda m, s: s.record(torch.tensor(-1.0)), ValueError, "got -1.0"),
        (lambda m, s: s.record(torch.ones(2)), ValueError, r"must be one number, got a tensor of shape \(2,\)"),
        (lambda m, s: s.record("low"), TypeError, "the validation loss must be a number, got 'low'"),
        (lambda m, s: s.record(1.0), RuntimeError, "no step since the last validation loss"),
        (lambda m, s: s.update_parameters(nn.Linear(3, 1)), ValueError, "not those of the model"),
        (lambda m, s: s.update_parameters(nn.Linear(2, 1, bias=False)), ValueError, "not those of the model"),
        (lambda m, s: s.update_parameters(with_buffer(m)), ValueError, "the buffers are not those of the model"),
        (lambda m, s: s.update_parameters(m.weight), TypeError, "of a torch.nn.Module, got Parameter"),
        (lambda m, s: SWAD(m.parameters()), TypeError, "of a torch.nn.Module, got <generator"),
    ],
)
def test_bad_arguments_are_refused_and_change_nothing(call: Any, error, words):
    model = nn.Linear(2, 1)
    swad = SWAD(model)
    before = copy.deepcopy(swad.state_dict())
    with pytest.raises(error, match=words):
        call(model, swad)
    torch.testing.assert_close(swad.state_dict(), before, rtol=0, atol=0)
