"""Parallel: a method in a pair of processes is the method in one, and a rank that fails takes the other one along."""

from __future__ import annotations

import copy
import os
import signal
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils._pytree import tree_leaves
from torch.utils.data import DistributedSampler

from bisam import (
    CRSAM,
    ERM,
    MSAM,
    RSAM,
    SAM,
    Evaluation,
    NegLog,
    SAMPa,
    SharpnessAware,
    Vector,
    cross_entropy,
    next_step,
)
from bisam.integrations.pairs import InPairs, method as parallel, pair as pairs, replica, replicas
from bisam.masks import RandomMask
from bisam.oracle import Oracle, Query
from bisam.perturbations import L2
from tests.support import cases, doubles, ranks
from tests.support.cases import FAMILY, OPTIMIZERS, bits, buffers, parameters


@pytest.fixture(autouse=True)
def _alone():
    """No test leaves a process group behind."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


# Training, as a loop does it


@dataclass
class Run:
    """A model in training, and what it showed on the way."""

    model: nn.Module
    sharp: nn.Module
    optimizer: torch.optim.Optimizer
    losses: list[Any] = field(default_factory=list)

    def step(self, *batch: Tensor) -> Run:
        self.optimizer.zero_grad()
        loss = self.sharp(*batch)
        loss.backward()
        self.optimizer.step()
        self.losses.append((loss.dtype, bits(loss)))
        return self

    def steps(self, number: int, dtype: torch.dtype = torch.double, begin: int = 0) -> Run:
        for i in range(begin, begin + number):
            x, y = cases.batch(i)
            self.step(x.to(dtype), y)
        return self

    @property
    def everything(self) -> tuple[Any, ...]:
        state = self.sharp.state_dict()["_extra_state"] if isinstance(self.sharp, SharpnessAware) else {}
        state = {k: v for k, v in state.items() if k != "method"}
        remembered = [bits(leaf) if isinstance(leaf, Tensor) else leaf for leaf in tree_leaves(state)]
        moments = [bits(leaf) for leaf in tree_leaves(self.optimizer.state_dict()) if isinstance(leaf, Tensor)]
        return parameters(self.model), buffers(self.model), self.losses, remembered, moments


def running(
    method: Callable[[torch.optim.Optimizer], Any],
    model: Callable[[], nn.Module] = cases.mlp,
    optimizer: str = "sgd",
    around: Callable[[Any], Any] = InPairs,
    **options: Any,
) -> Run:
    torch.manual_seed(1)
    made = model()
    steps = OPTIMIZERS[optimizer](made.parameters())
    return Run(made, SharpnessAware(made, around(method(steps)), options.pop("loss", cross_entropy), **options), steps)


def alone(method: Any) -> Any:
    return method


def sampa(**options: Any) -> Callable[[torch.optim.Optimizer], SAMPa]:
    return lambda optimizer: SAMPa(ahead=next_step(optimizer), **options)


def same_on_both(value: Any) -> None:
    both = [None, None]
    dist.all_gather_object(both, value)
    assert both[0] == both[1]


@contextmanager
def refused(kind: type[BaseException], *words: str):
    """An error with these words, which leaves everything as it was."""
    with pytest.raises(kind) as error:
        yield
    for word in words:
        assert word in str(error.value), str(error.value)


# Two ranks


def the_numbers_are_those_of_one_process(rank: int) -> None:
    for i, (dtype, model, method) in enumerate(
        (dtype, model, method)
        for dtype in (torch.double, torch.float)
        for model in (cases.mlp, cases.convnet)
        for method in (sampa(lam=0.0), sampa(lam=0.2), sampa(ascent=NegLog()))
    ):
        optimizer = ("sgd", "adamw")[(i + i // 3) % 2]
        runs = [running(method, lambda: model().to(dtype), optimizer, around) for around in (InPairs, alone)]  # noqa: B023
        pair, one = (run.steps(30, dtype).everything for run in runs)
        assert pair == one, i
        same_on_both(pair)
        for answer in ("outputs", "targets", "losses", "value"):
            if rank == 0:
                assert torch.equal(*(getattr(run.sharp.clean, answer) for run in runs))
        if rank == 1:
            with pytest.raises(RuntimeError, match="nothing was evaluated at the weights"):
                _ = runs[0].sharp.clean


def every_method_is_the_same_in_a_pair(rank: int) -> None:
    own = {
        "RSAM-CRSAM": lambda o: RSAM(0.05, CRSAM()),
        "SAMPa-mask": lambda o: SAMPa(RandomMask(L2(0.1), beta=0.5, per="entry"), ahead=next_step(o)),
        "MSAM-SAMPa": lambda o: MSAM(3, SAMPa(ahead=next_step(o)), separate=True),
    }
    for name, method in {**{name: make for name, (make, _) in FAMILY.items()}, **own}.items():
        ends = []
        for around in (InPairs, alone):
            run = running(method, cases.A_MODEL, around=around)
            torch.manual_seed(2)  # of the masks
            ends.append((run.steps(4).everything, bits(torch.get_rng_state())))
        assert ends[0] == ends[1], name
        same_on_both(ends[0])


class Odd(nn.Module):
    """Buffers of many types, one of which is another tensor after each forward pass; and memory in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1).double().to(memory_format=torch.channels_last)
        self.head, self.unused = nn.Linear(24, 4).double(), nn.Linear(2, 2)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("flag", torch.zeros(3, dtype=torch.bool))
        self.register_buffer("mean", torch.zeros(4, dtype=torch.bfloat16))
        self.register_buffer("last", torch.zeros(2, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        z = torch.tanh(self.conv(x.view(-1, 1, 2, 3)))
        with torch.no_grad():
            self.seen += 1
            self.flag.logical_not_()
            self.mean.lerp_(z.mean((0, 2, 3)).to(torch.bfloat16), 0.5)
            self.last = self.last * 0.5 + z.mean()
        return self.head(z.flatten(1))


def buffers_of_any_type_and_unused_parameters_are_as_in_one_process(rank: int) -> None:
    runs = [running(sampa(), Odd, around=around).steps(5) for around in (InPairs, alone)]
    assert runs[0].everything == runs[1].everything
    assert int(runs[0].model.seen) == 5
    assert runs[0].model.unused.weight.grad is None
    assert runs[0].model.conv.weight.grad.is_contiguous(memory_format=torch.channels_last)
    runs = [running(sampa(), Branching, around=around).steps(8) for around in (InPairs, alone)]
    assert runs[0].everything == runs[1].everything
    used = [run.model.used for run in runs]
    assert {True, False} == set(used[1])


class Branching(nn.Module):
    """Uses other parameters for other batches."""

    def __init__(self) -> None:
        super().__init__()
        self.branches, self.used = nn.ModuleList(nn.Linear(6, 4).double() for _ in range(2)), []

    def forward(self, x: Tensor) -> Tensor:
        self.used.append(bool(x.sum() > 0))
        return self.branches[self.used[-1]](x)


class Following(nn.Module):
    """A frozen layer follows a trained one in the forward pass, as a momentum encoder does."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.slow = nn.Linear(6, 4).double(), nn.Linear(6, 4).double().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.slow.weight.lerp_(self.linear.weight, 0.1)
        return self.linear(x) + self.slow(x)


class Growing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Linear(6, 4).double()
        self.register_buffer("seen", torch.zeros(0))

    def forward(self, x: Tensor) -> Tensor:
        self.seen = torch.cat([self.seen, x.new_zeros(1).float()])
        return self.inside(x)


class Dropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside, self.masks = nn.Linear(6, 4).double(), []

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.rand_like(x) < 0.5
        self.masks.append(bits(mask))
        return self.inside(x * mask)


def forward_passes_draw_from_streams_of_their_own(rank: int) -> None:
    torch.manual_seed(3)
    run, before = running(lambda o: CRSAM(), Dropout), torch.get_rng_state()
    run.steps(3)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.initial_seed() == 1
    masks: list[Any] = [None, None]
    dist.all_gather_object(masks, run.model.masks)
    first, second = masks
    assert first[0::2] == second[0::2]  # the gradient at the weights: both ask, and see the same mask
    different = {str(mask) for mask in first + second}
    assert len(different) == 3 * 3  # any two of one step, and any two steps, see different ones
    same_on_both(run.everything)
    run = running(lambda o: CRSAM(), Dropout, same_noise=True).steps(3)
    dist.all_gather_object(masks, run.model.masks)
    assert masks[0] == masks[1]
    assert len({str(mask) for mask in masks[0]}) == 3
    assert all(a == b for a, b in zip(masks[0][0::2], masks[0][1::2], strict=True))


def pairs_resume_and_go_on_as_one_process(rank: int, folder: Path) -> None:
    path = folder / "checkpoint.pt"
    for method in (sampa(), sampa(ascent=NegLog(), lam=0.5)):
        whole, run = running(method, cases.convnet).steps(20), running(method, cases.convnet).steps(10)
        if rank == 0:
            torch.save({"sharp": run.sharp.state_dict(), "optimizer": run.optimizer.state_dict()}, path)
        dist.barrier()
        saved = torch.load(path, weights_only=True)
        dist.barrier()
        resumed = running(method, cases.convnet)
        resumed.sharp.load_state_dict(saved["sharp"])
        resumed.optimizer.load_state_dict(saved["optimizer"])
        resumed.losses = run.losses[:]
        assert resumed.steps(10, begin=10).everything == whole.everything


def an_overflow_on_one_rank_counts_on_both(rank: int) -> None:
    for late in (False, True):
        ends = []
        for around in (InPairs, alone):
            run = running(sampa(), around=around, scaler=lambda: 1e300).steps(3)
            x, y = cases.batch(3)
            large, small = (x * 1e30, y), (x, y)
            run.sharp(*(large if late else small))
            before, memory = run.everything[3], run.sharp._memory.state
            loss = run.sharp(*(small if late else large))  # one of the two gradients overflows
            run.optimizer.zero_grad()
            loss.backward()
            grads = [p.grad.isfinite().all().item() for p in run.model.parameters()]
            ends.append((grads, before == run.everything[3], len(memory)))
        assert ends[0] == ends[1]
        same_on_both(ends[0])
        assert not any(ends[0][0])


def differences_between_the_ranks_are_said(rank: int) -> None:
    def unchanged(run: Run, *batch: Tensor) -> None:
        run.step(*batch)

    x, y = cases.batch(0)
    run = running(sampa(), cases.convnet)
    untouched = copy.deepcopy(run).everything
    with refused(
        ValueError, "ranks 0 and 1", "different batches", f"(8, 6), (8,)] on rank {rank}", "DistributedSampler"
    ):
        run.step(x + rank, y)
    with refused(ValueError, "different batches", f"({8 - rank}, 6)", "num_replicas=replicas(), rank=replica()"):
        run.step(x[rank:], y[rank:])
    assert run.everything == untouched
    assert run.steps(5).everything == running(sampa(), cases.convnet, around=alone).steps(5).everything

    before = run.everything
    with refused(ValueError, "batches of different shapes", "DistributedSampler"):
        run.step(x[rank:], y[rank:])
    assert run.everything == before
    assert run.steps(2, begin=5).everything == running(sampa(), cases.convnet, around=alone).steps(7).everything

    other = running(sampa())
    with torch.no_grad():
        other.model[0].weight += rank
    untouched = copy.deepcopy(other).everything
    with refused(ValueError, "different weights or buffers", "same seed", "DistributedDataParallel(sharp)"):
        other.steps(1)
    assert other.everything == untouched
    other = running(sampa(), cases.convnet)
    other.model[2].running_mean += rank
    with refused(ValueError, "different weights or buffers"):
        other.steps(1)
    other = running(sampa())
    if rank:
        other.sharp._memory.step = 3
    with refused(ValueError, "different memories of the method", "same checkpoint"):
        other.steps(1)

    growing = running(sampa(), Growing)
    with refused(ValueError, "buffers other shapes", "without InPairs"):
        growing.steps(1)
    assert growing.model.seen.shape == (0,)

    following = running(sampa(), Following)
    untouched = following.everything
    with refused(ValueError, "change frozen parameters (Linear.weight)", "without InPairs"):
        following.steps(1)
    assert following.everything == untouched

    masked = running(lambda o: SAMPa(RandomMask(L2(0.1)), ahead=next_step(o)))
    untouched = copy.deepcopy(masked).everything
    torch.manual_seed(rank)
    with refused(ValueError, "draws random numbers", "torch.manual_seed"):
        masked.steps(1)
    assert masked.everything == untouched
    torch.manual_seed(rank)  # no harm where the method draws nothing
    assert run.steps(1, begin=7).everything == running(sampa(), cases.convnet, around=alone).steps(8).everything
    torch.manual_seed(0)

    drifting = running(sampa())
    for i in range(7):
        drifting.steps(1, begin=i)
        if rank and i == 4:
            with torch.no_grad():
                drifting.model[0].weight += 1
    with refused(ValueError, "different weights or buffers", "call 8"):
        drifting.steps(1)


@dataclass
class Failing:
    """The loss, but for an error on one rank when it is told so."""

    now: bool = False

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if self.now:
            raise ArithmeticError("a bad batch")
        return cross_entropy(outputs, targets)


def an_error_on_one_rank_ends_the_step_on_both(rank: int) -> None:
    for culprit in (0, 1):
        for method in (sampa(), sampa(ascent=NegLog()), lambda o: CRSAM(), lambda o: SAM(L2(0.1))):
            loss = Failing()
            run = running(method, cases.convnet, loss=loss).steps(3)
            before = run.everything
            loss.now = rank == culprit
            start = time.monotonic()
            if rank == culprit:
                with refused(ArithmeticError, "a bad batch"):
                    run.steps(1, begin=3)
            else:
                with refused(RuntimeError, f"rank {culprit}", f"rank {rank}", "ArithmeticError: a bad batch"):
                    run.steps(1, begin=3)
            assert time.monotonic() - start < 20
            loss.now = False
            assert run.everything == before
            whole = running(method, cases.convnet, around=alone).steps(5)
            assert run.steps(2, begin=3).everything == whole.everything  # both left out the batch, and go on


def a_rank_that_goes_on_alone_is_found_out(rank: int) -> None:
    def method(oracle: Oracle, batch: Any) -> Evaluation:
        if failing[0]:
            raise ArithmeticError("between two queries")
        return inner(oracle, batch)

    failing, run = [False], running(lambda o: method)
    inner = SAMPa(ahead=next_step(run.optimizer))
    run.steps(4)
    before = run.everything
    if rank == 0:
        failing[0] = True
        with refused(ArithmeticError):
            run.steps(1, begin=4)
        failing[0] = False
    with refused(RuntimeError, "are at different ones", "left out a batch"):
        run.steps(1, begin=4 + (rank == 0))
    assert run.everything == before


def wrappers_that_cannot_be_inside_are_refused(rank: int) -> None:
    inside = running(sampa())
    sharp = SharpnessAware(DDP(inside.model), inside.sharp.method, cross_entropy)
    with refused(ValueError, "DistributedDataParallel(SharpnessAware(model, ...))"):
        sharp(*cases.batch())
    with refused(ValueError, "scope='global'", "DistributedDataParallel(SharpnessAware(model, ...))"):
        running(sampa(), scope="global").steps(1)
    with refused(ValueError, "InPairs is inside of another InPairs"):
        running(lambda o: InPairs(sampa()(o))).steps(1)
    with refused(ValueError, "no trainable parameter"):
        run = running(sampa())
        run.model.requires_grad_(False)
        run.steps(1)
    with refused(TypeError, "the oracle of a module", "got Quadratic"):
        InPairs(SAM())(doubles.Quadratic(1.0), (torch.ones(2, 1),))


def the_all_reduces_of_a_step_are_those_of_plain_training(rank: int) -> None:
    def calls(method: Any, inside: bool, steps: int = 3) -> int:
        torch.manual_seed(1)
        model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(20)]).double()
        wrap = lambda module: DDP(module, bucket_cap_mb=0.1)  # noqa: E731
        ddp = wrap(model if inside else SharpnessAware(model, method, cross_entropy))
        sharp = SharpnessAware(ddp, method, cross_entropy) if inside else ddp
        counted = [0]

        def hook(state, bucket):  # DistributedDataParallel reads annotations, and knows no strings
            counted[0] += 1
            work = dist.all_reduce(bucket.buffer().div_(2), async_op=True)
            return work.get_future().then(lambda future: future.value()[0])

        ddp.register_comm_hook(None, hook)
        for i in range(steps):
            x = torch.randn(4, 64, dtype=torch.double, generator=torch.Generator().manual_seed(i))
            sharp(x, torch.tensor([0, 1, 2, 3])).backward()
        return counted[0]

    for inside in (True, False):
        plain = calls(ERM(), inside)
        assert plain >= 3 * 2
        assert [calls(method, inside) for method in (SAM(), CRSAM(), MSAM(2, SAM()))] == [plain] * 3
    assert calls(InPairs(CRSAM()), inside=False) == plain


def a_loss_outlives_its_process_group(rank: int) -> None:
    run = running(sampa()).steps(3)
    pair, store = pairs._pairs[dist.group.WORLD], dist.distributed_c10d._get_default_store()
    assert pair.host is pair.device
    dist.barrier()
    dist.destroy_process_group()
    ranks.meet(dist.PrefixStore("again", store), rank, 2)
    assert run.steps(3, begin=3).everything == running(sampa(), around=alone).steps(6).everything
    assert pairs._pairs[dist.group.WORLD] is not pair


TWO = [
    the_numbers_are_those_of_one_process,
    every_method_is_the_same_in_a_pair,
    buffers_of_any_type_and_unused_parameters_are_as_in_one_process,
    forward_passes_draw_from_streams_of_their_own,
    an_overflow_on_one_rank_counts_on_both,
    differences_between_the_ranks_are_said,
    an_error_on_one_rank_ends_the_step_on_both,
    a_loss_outlives_its_process_group,
    wrappers_that_cannot_be_inside_are_refused,
    the_all_reduces_of_a_step_are_those_of_plain_training,
    a_rank_that_goes_on_alone_is_found_out,  # which ends what the pair can do
]


def two(folder: Path) -> None:
    rank = dist.get_rank()
    (folder / "times.txt").write_text("")
    pairs_resume_and_go_on_as_one_process(rank, folder)
    for check in TWO:
        start = time.monotonic()
        check(rank)
        with (folder / "times.txt").open("a") as file:
            file.write(f"{rank} {check.__name__} {time.monotonic() - start:.1f}\n")
        dist.barrier()


def test_two_ranks(tmp_path):
    ranks.run(2, two, tmp_path, seconds=240)


# Two pairs


def four() -> None:
    rank = dist.get_rank()
    assert (replicas(), replica()) == (2, rank // 2)
    data = list(range(32))
    part = list(DistributedSampler(data, num_replicas=replicas(), rank=replica(), shuffle=False))
    assert part == list(range(rank // 2, 32, 2))
    for optimizer, method in (("sgd", sampa()), ("adamw", sampa(ascent=NegLog(), lam=0.5))):
        run = running(method, cases.A_MODEL, optimizer)
        if rank == 3:
            with torch.no_grad():
                run.model[0].weight += 1  # DistributedDataParallel sends those of rank 0
        run.sharp = DDP(run.sharp)
        one = running(lambda o: MSAM(4, method(o), separate=True), cases.A_MODEL, optimizer, alone)  # noqa: B023
        for i in range(30):
            x, y = cases.batch(i)
            mine = slice(4 * replica(), 4 * replica() + 4)
            run.step(x[mine], y[mine])
            one.step(x, y)
        weights: list[Any] = [None] * 4
        dist.all_gather_object(weights, parameters(run.model))
        assert all(other == weights[0] for other in weights)
        losses: list[Any] = [None] * 4
        dist.all_gather_object(losses, run.losses)
        assert losses[0] == losses[1] != losses[2] == losses[3]
        for ours, theirs in zip(run.model.parameters(), one.model.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.slow
def test_two_pairs_are_two_replicas():
    ranks.run(4, four, seconds=120)


# A rank that dies


@dataclass
class Deadly:
    """The loss, until this process is killed by it."""

    now: bool = False

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if self.now:
            os.kill(os.getpid(), signal.SIGKILL)
        return cross_entropy(outputs, targets)


def killed() -> None:
    rank = dist.get_rank()
    loss = Deadly()
    run = running(sampa(), cases.convnet, loss=loss).steps(5)
    before, loss.now = run.everything, rank == 1
    start = time.monotonic()
    with refused(RuntimeError, "rank 1", "is gone or does not answer"):
        run.steps(1, begin=5)
    assert time.monotonic() - start < 20
    assert run.everything == before


def test_a_rank_whose_other_one_was_killed_ends_with_an_error():
    assert ranks.ends(2, killed, seconds=120) == [ranks.End(done=True), ranks.End()]


# In one process


def test_a_pair_needs_two_processes():
    run = running(sampa())
    before = run.everything
    for call in (lambda: run.steps(1), replicas, replica):
        with refused(ValueError, "there is no process group", "torchrun --nproc-per-node 2", "without InPairs"):
            call()
    ranks.meet(dist.HashStore(), 0, 1)
    for call in (lambda: run.steps(1), replicas, replica):
        with refused(ValueError, "of 1 one is left over", "torchrun --nproc-per-node 2", "without InPairs"):
            call()
    assert run.everything == before
    run.sharp.eval()
    assert run.sharp(*cases.batch()).isfinite()


def test_a_wrong_argument_is_named_where_it_is_given():
    with pytest.raises(TypeError, match="method is the class SAM, not an instance"):
        InPairs(SAM)
    with pytest.raises(TypeError, match=r"method must be SAMPa\(ahead=next_step\(optimizer\)\) or another"):
        InPairs(0.05)


@pytest.mark.parametrize(
    ("tracked", "members"),
    [
        ((False, True), [1, 0]),  # SAMPa
        ((False, True, False), [1, 0, 0]),  # with another ascent
        ((True, False), [0, 1]),
        ((False, False), [0, 1]),  # CRSAM
        ((True, True, False, False, False), [0, 0, 1, 1, 0]),
        ((False,) * 4, [0, 1, 0, 1]),
    ],
)
def test_the_even_rank_asks_what_moves_running_statistics(tracked, members):
    assert parallel._members([Query((), track=track) for track in tracked]) == members
    assert parallel._members([Query((), at=None if track else Vector([torch.ones(1)])) for track in tracked]) == members


def test_memory_that_is_sent_has_the_layout_of_what_it_is_sent_for():
    templates = [
        torch.zeros((), dtype=torch.bool),
        torch.zeros(3, dtype=torch.float64),
        torch.zeros(0),
        torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.zeros(4, 6, dtype=torch.bfloat16)[:, ::2].t(),
        torch.zeros(2, dtype=torch.complex128),
    ]
    message, parts = pairs.message_like(templates, torch.device("cpu"))
    for part, template in zip(parts, templates, strict=True):
        assert (part.shape, part.dtype) == (template.shape, template.dtype)
        assert part.stride() == torch.empty_like(template).stride()
        part.copy_(torch.rand(part.shape) * 100)
    copied, views = pairs.message_like(templates, torch.device("cpu"))
    copied.copy_(message)
    assert all(torch.equal(a, b) for a, b in zip(parts, views, strict=True))


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        (torch.ones(2), torch.ones(2), True),
        (torch.zeros(2), torch.zeros(2) * -1, False),
        (torch.ones(4), torch.ones(2, 2), False),
        (torch.ones(2), torch.ones(2).double(), False),
        (torch.arange(6).view(2, 3).t(), torch.arange(6).view(2, 3).t().contiguous(), True),
        ({"x": [1, "a", None]}, {"x": [1, "a", None]}, True),
        ({"x": [1, "a"]}, {"x": [1, "b"]}, False),
        (object(), object(), True),  # nothing is known of it
        (torch.eye(2).to_sparse(), torch.eye(2).to_sparse(), True),
        (torch.zeros(0), torch.zeros(0), True),
    ],
)
def test_digests_are_of_bits(a, b, same):
    assert (pairs.digest((a,)) == pairs.digest((b,))) == same
