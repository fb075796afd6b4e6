"""Many ranks: DistributedDataParallel in both nestings, FSDP2, and a perturbation that is local or global.

`BISAM_STEPS=50 pytest tests/distributed/test_distributed.py` takes as many steps as the documentation speaks of.
"""

from __future__ import annotations

import copy
import os
import pickle
import re
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils._pytree import tree_leaves

from bisam import (
    AESAM,
    ERM,
    ESAM,
    GSAM,
    KSAM,
    MESA,
    MSAM,
    RAPP,
    SAF,
    SAM,
    SSAMF,
    Accumulated,
    BiSAM,
    CEGPlus,
    FunctionalSAM,
    Lookahead,
    ModelOracle,
    MomentumSAM,
    NegLog,
    SharpnessAware,
    cross_entropy,
)
from bisam.batches import take
from bisam.distributed import failures
from bisam.integrations.checkpoint import make_room
from bisam.masks import RandomMask
from bisam.methods import efficient, wrappers
from bisam.perturbations import L2
from bisam.proximal import Box, Simplex
from tests.support import cases, ranks
from tests.support.replicas import distance, identical, nested, network, sharded, whole_weights

STEPS, PART = int(os.environ.get("BISAM_STEPS", "8")), 4
DRAWING = "RandomMask RandomMask-friendly SSAMD ESAM EBiSAM BSAM RSAM TSAM EigenSAM"  # random numbers of their own
DETERMINED = (
    "ERM SAM BiSAM MultiStepSAM-adaptive FSAM VaSSO ZSharp SAMON Only LESAM FisherSAM LookSAM AESAM MomentumSAM SAMPa "
    "GSAM WSAM CRSAM XSAM FunctionalSAM RAPP Every-LookSAM During OptSAM AsyncSAM SAMDB MESA-bisam "
    "ZSharp-per-tensor GCSAM GNP StableSAM-log SAGM-tanh BilateralSAM Lookbehind-adaptive-alpha GAM "
    "SAMSPS-log PerGroup-all-log MomentumSAM-buffer ImbSAM FocalSAM ZerothOrder-signs-adaptive-tanh FilterNoise"
)
METHODS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    name: cases.FAMILY[name][0] for name in f"{DETERMINED} {DRAWING}".split()
}
METHODS["MSAM"] = lambda o: MSAM(2, SAM(L2(0.1)))
METHODS["Accumulated"] = lambda o: Accumulated(2, GSAM(L2(0.1)))
METHODS["RAPP-Simplex"] = lambda o: RAPP(0.2, prox=Simplex(2.0))  # needs whole tensors
METHODS["CEGPlus-Box"] = lambda o: CEGPlus(0.2, Box(-0.1, 0.2))
OF_A_PART = {"ESAM", "EBiSAM", "MSAM"}  # they choose or split the examples of a rank
ALONE = {"SSAMF": cases.FAMILY["SSAMF"][0], "KSAM": lambda o: KSAM(3, SAM(L2(0.1)))}


def numbered(x: Tensor, y: Tensor) -> Tensor:
    """The numbers of the examples of a rank's part of a batch, or of the whole batch."""
    first = dist.get_rank() * PART
    return torch.arange(len(y)) + (first if len(y) == PART else 0)


def saf(optimizer: torch.optim.Optimizer | None = None) -> SAF:
    settings: dict[str, Any] = {"lam": 3.0, "ago": 1, "start": 0, "indices": lambda batch: numbered(*batch)}
    return SAF(BiSAM(0.1), epoch=1, examples=PART * dist.get_world_size(), **settings)


METHODS["SAF"] = saf


def part(step: int, rank: int | None = None) -> tuple[Tensor, ...]:
    """A rank's examples of a batch that all ranks have together."""
    first = (dist.get_rank() if rank is None else rank) * PART
    return tuple(t[first : first + PART] for t in whole(step))


def whole(step: int) -> tuple[Tensor, ...]:
    return cases.batch(step, PART * dist.get_world_size())


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return cases.OPTIMIZERS["sgd"](model.parameters())


def trained(
    model: nn.Module,
    loss: Callable[[torch.optim.Optimizer], Callable[..., Tensor]],
    batch: Callable[[int], Any],
    seed: int = 5,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = lambda model: sgd(model),
) -> tuple[list[Tensor], Tensor]:
    """Whole weights after some steps, and the losses on the way."""
    optimizer, losses = optimizer(model), []
    sharp = loss(optimizer)
    torch.manual_seed(seed)
    for step in range(STEPS):
        optimizer.zero_grad()
        value = sharp(*batch(step))
        value.backward()
        optimizer.step()
        losses.append(value.detach())
    return whole_weights(model), torch.stack(losses)


def replicas(make: Callable[[torch.optim.Optimizer], Any], world: int) -> list[Tensor]:
    """Data-parallel training by hand: each replica has its own loss, part and stream, and gradients are averaged."""
    models = [network() for _ in range(world)]
    optimizers = [sgd(model) for model in models]
    sharps = [
        SharpnessAware(model, make(optimizer), cross_entropy)
        for model, optimizer in zip(models, optimizers, strict=True)
    ]
    streams = [torch.Generator().manual_seed(5 + rank).get_state() for rank in range(world)]
    for step in range(STEPS):
        for rank, sharp in enumerate(sharps):
            torch.set_rng_state(streams[rank])
            optimizers[rank].zero_grad()
            sharp(*part(step, rank)).backward()
            streams[rank] = torch.get_rng_state()
        for same in zip(*[model.parameters() for model in models], strict=True):
            mean = sum(p.grad for p in same) / world
            for p in same:
                p.grad.copy_(mean)
        for optimizer in optimizers:
            optimizer.step()
    return whole_weights(models[0])


def far(ours: tuple[list[Tensor], Tensor], theirs: tuple[list[Tensor], Tensor]) -> dict[str, float]:
    """Returns the differences between weights and losses, empty if there are none."""
    found = {"weights": distance(ours[0], theirs[0]), "losses": (ours[1] - theirs[1]).abs().max().item()}
    found = {name: value for name, value in found.items() if not value < 1e-12}
    return found if identical(ours[0]) else {**found, "replicas differ": 1.0}


def wrong(findings: dict[str, Any]) -> dict[str, Any]:
    return {name: found for name, found in findings.items() if found}


# FSDP2.


def fsdp2_against_one_process() -> dict[str, Any]:
    findings = {}
    for name, make in METHODS.items():
        if name not in OF_A_PART:
            one, many = network(), sharded(network())
            findings[name] = far(
                trained(many, lambda o, m=many, make=make: SharpnessAware(m, make(o), cross_entropy), part),
                trained(one, lambda o, m=one, make=make: SharpnessAware(m, make(o), cross_entropy), whole),
            )
    return wrong(findings)


def test_fsdp2_is_one_process_with_the_whole_batch():
    assert ranks.run(2, fsdp2_against_one_process) == [{}, {}]


def of_each_part(scores: Tensor, k: int, batch: Any) -> Any:
    """The largest scores of each rank's examples, as a rank finds them."""
    world = dist.get_world_size()
    index = scores.view(world, -1).topk(k // world).indices + torch.arange(world)[:, None] * (len(scores) // world)
    return take(batch, index.flatten().sort().values)


def in_turn(step: int) -> tuple[Tensor, ...]:
    """The whole batch, first the first micro-batch of each rank, then the second."""
    parts = [part(step, rank) for rank in range(dist.get_world_size())]
    return tuple(torch.cat([t[i : i + 2] for i in (0, 2) for t in same]) for same in zip(*parts, strict=True))


def choosing_under_fsdp2() -> dict[str, Any]:
    mask = RandomMask(L2(0.1), beta=0.6)
    rows = {
        "ESAM": (ESAM(mask), ESAM(mask), whole),
        "KSAM": (KSAM(2, SAM(L2(0.1))), KSAM(4, SAM(L2(0.1))), whole),
        "MSAM": (MSAM(2, SAM(L2(0.1))), MSAM(4, SAM(L2(0.1))), in_turn),
    }
    findings = {}
    for name, (ours, theirs, batch) in rows.items():
        one, many = network(), sharded(network())
        sharded_run = trained(many, lambda o, m=many, ours=ours: SharpnessAware(m, ours, cross_entropy), part)
        with pytest.MonkeyPatch.context() as patch:
            for module in (efficient, wrappers):
                patch.setattr(module, "largest", of_each_part)
            plain = trained(one, lambda o, m=one, theirs=theirs: SharpnessAware(m, theirs, cross_entropy), batch)
        findings[name] = far(sharded_run, plain)
    return wrong(findings)


def test_under_fsdp2_each_rank_chooses_and_splits_its_own_examples():
    assert ranks.run(2, choosing_under_fsdp2) == [{}, {}]


# Outputs that are remembered, and the average of running statistics.


def swapped(step: int) -> dict[str, Any]:
    """The part of the batch whose numbers another rank had in the step before."""
    world, rank = dist.get_world_size(), dist.get_rank()
    index = torch.arange(PART * world).roll(step * PART).split(PART)[rank]
    x, y = whole(step)
    return {"x": x[index], "y": y[index], "indices": index}


def outputs_of_another_rank(scope: str) -> dict[str, Any]:
    def forward(model: nn.Module, *, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return model(x), y

    count, runs = PART * dist.get_world_size(), list[Any]()
    method = SAF(SAM(0.1), epoch=1, examples=count, lam=3.0, ago=1, start=0)
    for scoped in (scope, None):
        model = network()
        sharp = SharpnessAware(model, method, cross_entropy, forward, scope=scoped)
        optimizer = sgd(model)
        for step in range(4):
            x, y = whole(step)
            batch = {"x": x, "y": y, "indices": torch.arange(count)} if scoped is None else swapped(step)
            sharp(**batch).backward()
            if scoped == "local":
                for p in model.parameters():
                    dist.all_reduce(p.grad)
                    p.grad /= dist.get_world_size()
            optimizer.step()
            optimizer.zero_grad()
        runs.append((whole_weights(model), sharp.get_extra_state()["state"]))
    (ours, state), (theirs, other) = runs
    same = all(torch.equal(a, b) for a, b in zip(state["epochs"], other["epochs"], strict=True))
    return {"far": distance(ours, theirs) > 1e-12, "recorded": same}


def test_with_global_scope_all_ranks_remember_the_outputs_of_all():
    assert ranks.run(2, outputs_of_another_rank, "global") == [{"far": False, "recorded": True}] * 2


def test_with_local_scope_a_rank_knows_its_own_outputs_only():
    assert ranks.run(2, outputs_of_another_rank, "local") == [{"far": True, "recorded": False}] * 2


def uneven_sizes() -> list[float]:
    from bisam.distributed.peers import Peers

    mine = torch.arange(3.0 + dist.get_rank())[:, None] + 10 * dist.get_rank()
    peers = Peers.of([], [torch.zeros(1)])
    assert peers is not None
    return peers.gathered(mine).flatten().tolist()


def test_values_of_ranks_with_different_numbers_of_examples_are_gathered():
    assert ranks.run(2, uneven_sizes) == [[0.0, 1.0, 2.0, 10.0, 11.0, 12.0, 13.0]] * 2


def broadcast_buffers() -> dict[str, Any]:
    """The buffers of the first rank are broadcast once a step, in the first pass that is not one of the average."""
    found = []
    for method in (ERM(), MESA(lam=0.0, decay=0.5)):
        torch.manual_seed(1)
        model = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, cases.CLASSES)).double()
        sharp, optimizer = SharpnessAware(DDP(model), method, cross_entropy), sgd(model)
        for step in range(4):
            sharp(*part(step)).backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append([b.double() for b in model.buffers()])
    return {} if distance(*found) < 1e-12 else {"far": distance(*found)}


def test_a_pass_of_the_average_broadcasts_no_buffers():
    assert ranks.run(2, broadcast_buffers) == [{}, {}]


# DistributedDataParallel.


def ddp_against_msam(order: str) -> dict[str, Any]:
    findings, rank = {}, dist.get_rank()
    for name, make in {**METHODS, **ALONE}.items():
        model = network()
        weights, _ = trained(model, lambda o, m=model, make=make: nested(order, m, make(o)), part, seed=5 + rank)
        findings[name] = {} if identical(weights) else {"replicas differ": 1.0}
        if name in DRAWING.split():
            expected = replicas(make, dist.get_world_size())
        else:
            one = network()
            expected, _ = trained(
                one,
                lambda o, m=one, make=make: SharpnessAware(m, MSAM(PART, make(o), separate=True), cross_entropy),
                whole,
            )
        if not (off := distance(weights, expected)) < 1e-12:
            findings[name]["weights"] = off
    return wrong(findings)


@pytest.mark.parametrize("order", ["inside", pytest.param("outside", marks=pytest.mark.slow)])
def test_ddp_is_msam_with_a_memory_for_each_part(order):
    assert ranks.run(2, ddp_against_msam, order) == [{}, {}]


def global_against_one_process() -> dict[str, Any]:
    findings, rank = {}, dist.get_rank()
    for i, (name, make) in enumerate(METHODS.items()):
        if name not in OF_A_PART:
            order = ("inside", "outside")[i % 2]
            one, many = network(), network()
            findings[name] = far(
                trained(
                    many,
                    lambda o, m=many, make=make, order=order: nested(order, m, make(o), scope="global"),
                    part,
                    seed=5 + rank,  # the first rank's stream is the one that counts
                ),
                trained(one, lambda o, m=one, make=make: SharpnessAware(m, make(o), cross_entropy), whole),
            )
    return wrong(findings)


def test_a_global_perturbation_under_ddp_is_that_of_the_whole_batch():
    assert ranks.run(2, global_against_one_process) == [{}, {}]


# The gradient of a part of the weights.

PARTS = [
    [name.startswith(begin) for name, _ in network().named_parameters()] for begin in ("3.2", "1.", "3.0.w", "0.b")
] + [[i % 3 == 1 for i in range(8)], [i % 3 != 1 for i in range(8)], [False] * 8]


def parts_of_the_gradient(around: Callable[[nn.Module], nn.Module], scope: Any, exchanged: list[int]) -> dict[str, Any]:
    """A gradient of a part is that part of the gradient of all; nothing below is computed, nothing else exchanged."""
    model, calls, findings = network(), [], {}

    def note(*of: Any) -> None:
        if of[-1].requires_grad:
            of[-1].register_hook(lambda _: calls.append(1))

    model[0].register_forward_hook(note)
    model = around(model)
    oracle = ModelOracle(model, cross_entropy, scope=scope)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    e = oracle.query(part(0)).gradient * 0.1
    for step, wrt in enumerate(PARTS):
        for at in (None, e.clone()):
            whole = oracle.query(part(step), at=None if at is None else at.clone(), track=False).gradient
            exchanged.clear(), calls.clear()
            answer = oracle.query(part(step), at=at, track=False, wrt=wrt).gradient
            size = sum(t.numel() for t, ask in zip(answer, wrt, strict=True) if ask)
            found = {
                "values": any(not torch.equal(a, b) for a, b in zip(answer, whole.confined(wrt), strict=True)),
                "holes": answer.holes != {i for i, ask in enumerate(wrt) if not ask},
                "passed through": bool(calls) != any(wrt[:2]),
                "exchanged": scope == "global" and sum(exchanged) != size + len(wrt) + 2,
            }
            findings |= {f"part {step}, displaced: {at is not None}, {name}": 1 for name, bad in found.items() if bad}
    if not all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters()):
        findings["what was in .grad"] = "changed"
    return findings


def parts_under_every_placement() -> dict[str, Any]:
    exchanged: list[int] = []
    reduce = dist.all_reduce

    def counted(tensor: Tensor, *arguments: Any, **keywords: Any) -> Any:
        exchanged.append(tensor.numel())
        return reduce(tensor, *arguments, **keywords)

    def gathered_for_long(model: nn.Sequential) -> nn.Sequential:
        return fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)), reshard_after_forward=False)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", counted)
        return wrong(
            {
                name: parts_of_the_gradient(around, scope, exchanged)
                for name, around, scope in (
                    ("DDP", DDP, None),
                    ("DDP, global", DDP, "global"),
                    ("global", lambda model: model, "global"),
                    ("FSDP2", sharded, None),
                    ("FSDP2, one group", gathered_for_long, None),
                    ("tensor parallelism", tensor_parallel, None),
                )
            }
        )


def test_a_part_of_the_gradient_is_computed_and_exchanged_under_every_placement():
    assert ranks.run(2, parts_under_every_placement) == [{}, {}]


class Branches(nn.Module):
    """A layer that nobody uses, and one that is used by turns, or not either."""

    def __init__(self, turns: int) -> None:
        super().__init__()
        self.turns = turns
        self.body, self.unused, self.other = network(), nn.Linear(3, 3).double(), nn.Linear(6, 6).double()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.body(self.other(x) if self.turns and self.calls % self.turns == 1 else x)


def gradients_of(loss: Callable[..., Tensor], model: nn.Module, step: int, rank: int) -> list[Tensor | None]:
    model.zero_grad()
    loss(*part(step, rank)).backward()
    return [p.grad for p in model.parameters()]


def unused(order: str) -> dict[str, Any]:
    """Gradients are the means of those of two replicas by hand; what no replica used in a step has none."""
    torch.manual_seed(1)
    model = Branches(turns=3 if order == "outside" else 0)
    copies = [copy.deepcopy(model) for _ in range(2)]
    method, findings = GSAM(L2(0.1)), {}
    if order == "inside":
        sharp: Any = SharpnessAware(DDP(model, find_unused_parameters=True), method, cross_entropy)
    else:
        sharp = DDP(SharpnessAware(model, method, cross_entropy), find_unused_parameters=True)
    alone = [SharpnessAware(one, method, cross_entropy) for one in copies]
    for step in range(6):
        ours = gradients_of(sharp, model, step, dist.get_rank())
        theirs = [gradients_of(loss, one, step, r) for r, (loss, one) in enumerate(zip(alone, copies, strict=True))]
        for (name, _), g, *both in zip(model.named_parameters(), ours, *theirs, strict=True):
            expected = None if both[0] is None else (both[0] + both[1]) / 2
            if (g is None) != (expected is None) or (g is not None and not torch.allclose(g, expected, 0, 1e-12)):
                findings[f"{order}, step {step}, {name}"] = "differs"
    return findings


def static() -> dict[str, Any]:
    one, two = network(), network()
    plain = DDP(SharpnessAware(one, SAM(L2(0.1)), cross_entropy))
    still = DDP(SharpnessAware(two, SAM(L2(0.1)), cross_entropy), static_graph=True)
    return far(trained(two, lambda o: still, part), trained(one, lambda o: plain, part))


def statistics(order: str) -> dict[str, Any]:
    """Running statistics are those of a plain loop, which broadcasts the first rank's before each step."""
    models = [cases.convnet() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model, method in zip(models, (None, SAM(L2(0.0))), strict=True):
        wrapped = DDP(model) if method is None else nested(order, model, method)
        optimizer = sgd(model)
        for step in range(4):
            x, y = part(step)
            optimizer.zero_grad()
            (F.cross_entropy(wrapped(x), y) if method is None else wrapped(x, y)).backward()
            optimizer.step()
    return {} if cases.buffers(models[0]) == cases.buffers(models[1]) else {"differ": 1}


def cut(step: int, rank: int) -> tuple[Tensor, ...]:
    """A part of another size on each rank."""
    return tuple(t[: PART - 2 * rank] for t in part(step, rank))


def passes_that_differ(make: Callable[[], Any], batch: Callable[..., Any]) -> dict[str, Any]:
    """Ranks with different numbers of forward passes train as in the nesting in which no pass waits for another rank.

    The model broadcasts buffers in its forward pass, once a step as in the other nesting.
    """
    passes, begun, runs, rank = [], [], {}, dist.get_rank()

    def begin(step: int) -> tuple[Tensor, ...]:
        begun.append(float(len(passes)))
        return batch(step, rank=rank)

    for order in ("inside", "outside"):
        torch.manual_seed(1)
        model = cases.convnet()
        model.register_forward_pre_hook(lambda *_: passes.append(1))
        weights, losses = trained(model, lambda o, m=model, order=order: nested(order, m, make()), begin)
        runs[order] = weights, losses, cases.buffers(model)
    if identical([torch.tensor(begun)]):
        return {"passes": "the ranks have as many in each step: the case tests nothing"}
    # The first rank's buffers, because those of the others are broadcast over before the next step.
    same = runs["inside"][2] == runs["outside"][2] or rank > 0
    return far(runs["inside"][:2], runs["outside"][:2]) | ({} if same else {"buffers": "differ"})


def joined() -> dict[str, float]:
    """With join, a rank without further batches adds zero gradients, and gets the final model at the end."""
    model, steps = network(), 3
    sharp, optimizer = DDP(SharpnessAware(model, SAM(L2(0.1)), cross_entropy)), sgd(model)
    with sharp.join():
        for step in range(steps - dist.get_rank()):
            optimizer.zero_grad()
            sharp(*part(step)).backward()
            optimizer.step()
    one = network()
    alone, optimizer = SharpnessAware(one, SAM(L2(0.1)), cross_entropy), sgd(one)
    for step in range(steps):
        optimizer.zero_grad()
        for rank in range(2):
            if step < steps - rank:
                (alone(*part(step, rank)) / 2).backward()
        optimizer.step()
    off = distance(whole_weights(model), whole_weights(one))
    return {} if off < 1e-12 else {"off": off}


def joins(order: str, **arguments: Any) -> Callable[..., Tensor]:
    """The loss in the context of a join, which the first batch is refused in, also after a step without it."""
    sharp = nested(order, cases.convnet(), SAM(), **arguments)
    sharp(*part(0)).backward()

    def call(*batch: Any) -> Tensor:
        with (sharp if order == "outside" else sharp.model).join():
            return sharp(*batch)

    return call


class Synchronous(nn.SyncBatchNorm):
    """SyncBatchNorm that also runs on a CPU, without communication: nothing waits in a test of what is refused."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, training=True)


def with_sync(method: Any, batch: Callable[..., Any] = part, **arguments: Any) -> Callable[..., Tensor]:
    model = cases.mlp(lambda n: Synchronous(n).double())
    sharp = SharpnessAware(model, method, cross_entropy, **arguments)  # on a CPU, DDP accepts no SyncBatchNorm
    return lambda *_: sharp(*batch(0, dist.get_rank()))


def unused_by_all(order: str) -> dict[str, Any]:
    """Parameters that no rank uses get no gradient, so an optimizer leaves them unchanged."""
    model = Branches(turns=0)
    arguments = {"scope": "global"}
    if order == "inside":
        sharp: Any = SharpnessAware(DDP(model, find_unused_parameters=True), SAM(), cross_entropy, **arguments)
    else:
        sharp = DDP(SharpnessAware(model, SAM(), cross_entropy, **arguments), find_unused_parameters=True)
    for step in range(3):
        sharp(*part(step)).backward()
    return {name: "used" for name, p in model.named_parameters() if (p.grad is None) == name.startswith("body")}


def overflown() -> dict[str, Any]:
    """An infinite gradient on one rank: all forget the step."""
    model = network()

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        bad = float("inf") if sharp.get_extra_state()["step"] == 2 and dist.get_rank() else 1.0
        return cross_entropy(outputs, targets) * bad

    sharp = SharpnessAware(model, MomentumSAM(), loss, scaler=lambda: 8.0, scope="global")
    values = [sharp(*part(step)).item() for step in range(4)]
    fine = all(t.isfinite().all() for t in memory_of(sharp)) and values[3] < 10
    return {} if fine else {"values": values}


def copied() -> dict[str, Any]:
    model = network()
    sharp = SharpnessAware(model, METHODS["LookSAM"](None), cross_entropy, scope="global")
    sharp(*part(0))
    other = copy.deepcopy(sharp)
    pickle.dumps(other._memory)
    return {} if torch.equal(sharp(*part(1)), other(*part(1))) else {"differ": 1}


def mode() -> dict[str, Any]:
    """The mode is that of the user's own module, also where a wrapper has another one."""
    model, (x, y) = network(), part(0)
    sharp = SharpnessAware(DDP(model), SAM(L2(0.5)), cross_entropy)
    model.eval()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*the model is in eval mode")
        return {} if torch.equal(sharp(x, y), cross_entropy(model(x), y).mean()) else {"differs": 1}


class Tabled(nn.Module):
    """A buffer that is read and never moves, and a count of the passes."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.calls = network(), 0
        self.register_buffer("table", torch.ones(6).double())

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.body(x * self.table)


def passes_of_the_first_step() -> dict[str, Any]:
    """The first rank's buffers are written into those of the others, which is no state that a layer initialises."""
    model = Tabled()
    SharpnessAware(DDP(model), SAM(L2(0.1)), cross_entropy)(*part(0))
    return {} if model.calls == 2 else {"passes": model.calls}


def used_by_one() -> dict[str, Any]:
    """A parameter that one rank alone uses has the mean gradient on all ranks."""
    model, first = Branches(turns=0), dist.get_rank() == 0
    model.turns = 1 if first else 0
    model.forward = lambda x: model.body(model.other(x) if first else x)  # pyright: ignore
    sharp = SharpnessAware(model, SAM(L2(0.0)), cross_entropy, scope="global")
    sharp(*part(0)).backward()
    (expected,) = torch.autograd.grad(
        cross_entropy(model.body(model.other(part(0, 0)[0])), part(0, 0)[1]).mean(), [model.other.weight]
    )
    grad = model.other.weight.grad
    return {} if grad is not None and torch.allclose(grad, expected / 2, 0, 1e-12) else {"gradient": str(grad)}


def ddp_otherwise() -> dict[str, Any]:
    def by_turns() -> SharpnessAware:
        return SharpnessAware(DDP(Branches(turns=2), find_unused_parameters=True), GSAM(), cross_entropy)

    def still() -> SharpnessAware:
        return SharpnessAware(DDP(network(), static_graph=True), SAM(), cross_entropy)

    decides = AESAM(L2(0.1), steps=9, first=-1.0, last=-1.0, delta=0.5)
    return wrong(
        {
            **{f"unused parameters, {order}": unused(order) for order in ("inside", "outside")},
            **{f"running statistics, {order}": statistics(order) for order in ("inside", "outside")},
            "parameters by turns, inside": refused(by_turns, "use different parameters in different queries"),
            **{f"unused parameters, {order}, global": unused_by_all(order) for order in ("inside", "outside")},
            "passes of the first step": passes_of_the_first_step(),
            "a parameter that one rank alone uses, global": used_by_one(),
            "an overflow on one rank, global": overflown(),
            "a copy of what is remembered, global": copied(),
            "evaluation": mode(),
            "static graph, outside": static(),
            "static graph, inside": refused(still, "static_graph=True) inside the loss would never average"),
            "replicas that decide": passes_that_differ(lambda: KSAM(3, decides), part),
            "uneven micro-batches": passes_that_differ(lambda: MSAM(2, SAM(L2(0.1))), cut),
            "uneven single examples": passes_that_differ(lambda: SSAMF(L2(0.1), every=2), cut),
            "join, outside": joined(),
            "join, inside": refused(lambda: joins("inside"), "DistributedDataParallel(SharpnessAware(model, ...)), wh"),
            "join, inside, global": refused(lambda: joins("inside", scope="global"), "takes part in one forward pass"),
            "join, global": refused(lambda: joins("outside", scope="global"), 'with scope="global" each query waits'),
            "SyncBatchNorm, decides": refused(lambda: with_sync(KSAM(3, AESAM(steps=9))), "with AESAM replicas may"),
            "SyncBatchNorm, decide together": {} if with_sync(AESAM(steps=9), scope="global")() > 0 else {"loss": 0},
            "SyncBatchNorm, MSAM": refused(lambda: with_sync(MSAM(2), cut), "ranks differ in micro-batches (1 to 2)"),
            "SyncBatchNorm, SSAMF": refused(lambda: with_sync(SSAMF(), cut), "differ in single examples (2 to 4)"),
            "SyncBatchNorm, even": {} if with_sync(MSAM(2))() > 0 else {"loss": 0},
        }
    )


def test_data_parallel_models_of_every_kind():
    assert ranks.run(2, ddp_otherwise) == [{}, {}]


def dies(wrapper: str) -> None:
    model = sharded(network()) if wrapper == "fsdp2" else network()
    arguments = {"scope": "global"} if wrapper == "global" else {}
    sharp: Any = SharpnessAware(model, SAM(L2(0.1)), cross_entropy, **arguments)
    sharp = DDP(sharp) if wrapper != "fsdp2" else sharp
    for step in range(100):
        if step == 3 and dist.get_rank() == 1:
            os._exit(7)
        sharp(*part(step)).backward()


@pytest.mark.parametrize("wrapper", ["outside", "fsdp2", pytest.param("global", marks=pytest.mark.slow)])
def test_where_a_rank_dies_the_others_end_with_an_error(wrapper):
    with pytest.raises(RuntimeError, match=r"^rank 0\n(?s:.*)(closed|reset) by peer"):
        ranks.run(2, dies, wrapper, seconds=60)


def goes_on(wrapper: str) -> None:
    """The second query of the second step fails on the last rank, which catches the error and goes on."""
    failures.LIMIT, calls = 1.0, [0]

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        calls[0] += 1
        if calls[0] == 4 and dist.get_rank() == 1:
            raise ArithmeticError("boom")
        return cross_entropy(outputs, targets)

    model = sharded(network()) if wrapper == "fsdp2" else network()
    sharp: Any = SharpnessAware(model, SAM(L2(0.1)), loss, scope=None if wrapper == "fsdp2" else "global")
    sharp = DDP(sharp) if wrapper == "outside" else sharp
    for step in range(10):
        with suppress(ArithmeticError):
            sharp(*part(step)).backward()


@pytest.mark.parametrize("wrapper", ["fsdp2", "outside", pytest.param("global", marks=pytest.mark.slow)])
def test_a_rank_that_goes_on_after_its_own_error_is_stopped_with_an_error(wrapper):
    # Without it the other rank's process is aborted by the backend: it receives tensors of another size.
    first, second = ranks.ends(2, goes_on, wrapper, seconds=60)
    assert "a step failed on rank 1 (ArithmeticError: boom) and not on rank 0, which waits for it" in second.error
    assert re.search("(closed|reset) by peer", first.error)


# Other kinds of sharded models.


def mixed(method: Any) -> list[Tensor]:
    model, policy = network().float(), MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in (model[0], model[3], model):
        fully_shard(module, mesh=mesh, mp_policy=policy)
    optimizer = sgd(model)
    sharp = None if method is None else SharpnessAware(model, method, cross_entropy)
    for step in range(6):
        x, y = part(step)
        optimizer.zero_grad()
        (F.cross_entropy(model(x.float()), y) if sharp is None else sharp(x.float(), y)).backward()
        optimizer.step()
    return whole_weights(model)


def accumulated(method: Any, *, asked: bool) -> tuple[list[Tensor], int]:
    """Two batches a step, without reduction for the first one if so asked, and evaluations between the steps."""
    model = sharded(network())
    sharp, optimizer, calls = SharpnessAware(model, method, cross_entropy), sgd(model), []
    next(model.parameters()).register_post_accumulate_grad_hook(calls.append)
    for step in range(4):
        optimizer.zero_grad()
        for half in range(2):
            model.set_requires_gradient_sync(not asked or half == 1)
            (sharp(*part(2 * step + half)) / 2).backward()
        optimizer.step()
        model.eval()
        with torch.no_grad():
            model(part(9)[0])  # after which the outermost parameters stay gathered
        model.train()
    return whole_weights(model), len(calls)


def broken(where: str) -> list[Tensor]:
    """A step whose second query fails once, tried again with gradients of another batch in place."""
    model, armed, queries = sharded(network()), [bool(where)], [0]
    optimizer = sgd(model)

    def fail(*_: Any) -> None:
        if armed[0] and queries[0] == 8:  # the second one of the second step's second call
            armed[0] = False
            raise RuntimeError("boom")

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        if where == "loss":
            fail()
        return cross_entropy(outputs, targets)

    model.register_forward_pre_hook(lambda *_: queries.__setitem__(0, queries[0] + 1))
    if where == "forward":
        model[3][0].register_forward_pre_hook(fail)
    sharp = SharpnessAware(model, SAM(L2(0.1)), loss)
    for step in range(5):
        optimizer.zero_grad()
        sharp(*part(step + 7)).backward()
        try:
            value = sharp(*part(step))
        except RuntimeError:
            value = sharp(*part(step))
        value.backward()
        optimizer.step()
    assert armed == [False]
    return whole_weights(model)


def like_one_process(
    name: str,
    shard: Callable[[nn.Sequential], object],
    batch: Any = part,
    optimizer: Any = sgd,
    build: Callable[[], nn.Sequential] = network,
) -> dict[str, float]:
    make, one, many = METHODS[name], build(), build()
    shard(many)
    return far(
        trained(many, lambda o: SharpnessAware(many, make(o), cross_entropy), batch, optimizer=optimizer),
        trained(one, lambda o: SharpnessAware(one, make(o), cross_entropy), whole, optimizer=optimizer),
    )


def pending() -> SharpnessAware:
    model = sharded(network())
    model.set_requires_gradient_sync(False)
    F.cross_entropy(model(part(0)[0]), part(0)[1]).backward()
    model.set_requires_gradient_sync(True)
    return SharpnessAware(model, SAM(), cross_entropy)


def kept_back() -> SharpnessAware:
    model = sharded(network())
    if not hasattr(model, "set_manual_backward_finalization"):  # before torch 2.15
        raise ValueError("set_manual_backward_finalization(True) keeps gradients back")
    model.set_manual_backward_finalization(True)
    return SharpnessAware(model, SAM(), cross_entropy)


def ahead() -> dict[str, float]:
    """Weights that were gathered ahead are not those of a first query that is displaced."""
    values = []
    for early in (False, True):
        model = sharded(network())
        sharp = SharpnessAware(model, MomentumSAM(L2(1.0)), cross_entropy)
        for step in range(3):
            if early:
                model.unshard(async_op=True)
            values.append(sharp(*part(step)).item())
    return {} if values[:3] == values[3:] else {"values": values[3] - values[0]}


def uneven_counts() -> dict[str, float]:
    """FunctionalSAM at radius 0 is ERM, also where ranks leave out different numbers of labels."""
    x, y = part(0)
    y = torch.where(torch.arange(PART) < 1 + 2 * dist.get_rank(), y, -100)
    grads = []
    for method in (ERM(), FunctionalSAM(L2(0.0)), FunctionalSAM(L2(0.0), NegLog())):
        model = sharded(network())
        value = SharpnessAware(model, method, cross_entropy)(x, y)
        value.backward()
        grads.append([value.detach(), *(p.grad.full_tensor() for p in model.parameters())])
    off = max(distance(grads[0], other) for other in grads[1:])
    return {} if off < 1e-12 else {"off": off}


def own_clean() -> dict[str, float]:
    """`clean` is for the rank's own batch, whatever the adversary climbs: one rank alone may read it."""
    model, (x, y) = sharded(network()), part(0)
    own, found = F.cross_entropy(network()(x), y), {}
    for name, method in (("SAM", SAM()), ("BiSAM", BiSAM())):
        sharp = SharpnessAware(model, method, cross_entropy)
        sharp(x, y)
        if not abs(sharp.clean.value - own) < 1e-12:
            found[name] = float(sharp.clean.value - own)
    return found


def large_gradients() -> dict[str, float]:
    """The squares of their entries exceed the range of float32."""
    grads = []
    for model, batch in ((sharded(network().float()), part(0)), (network().float(), whole(0))):
        sharp = SharpnessAware(model, SAM(L2(0.5)), lambda outputs, targets: cross_entropy(outputs, targets) * 2.0**70)
        sharp(batch[0].float(), batch[1]).backward()
        grads.append([p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in model.parameters()])
    far = distance(*grads) / 2.0**70
    return {} if far < 1e-6 else {"gradients": far}


def complex_weights() -> dict[str, Any]:
    def weights(name: str, model: nn.Module, batch: Callable[[int], Any]) -> list[Tensor]:
        make, _ = cases.FAMILY[name]
        return trained(model, lambda o: SharpnessAware(model, make(o), cross_entropy), batch)[0]

    found = {}
    for name in ("GSAM", "ASAM", "LookSAM"):
        one = cases.complex_mlp()
        several = fully_shard(copy.deepcopy(one), mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        apart = distance(weights(name, several, part), weights(name, one, whole))
        found |= {} if apart < 1e-12 else {name: apart}
    return found


def inference() -> dict[str, float]:
    model, (x, y) = sharded(network()), part(0)
    sharp = SharpnessAware(model, SAM(), cross_entropy)
    with torch.inference_mode():
        off = float(sharp(x, y) - F.cross_entropy(network()(x), y))
    return {} if abs(off) < 1e-12 else {"off": off}


def adapters() -> dict[str, float]:
    """A sharded model that is frozen, with ordinary parameters that are trained: their gradients are averaged here."""
    grads = []
    for many in (False, True):
        model = network()
        for p in model.parameters():
            p.requires_grad_(False)
        model.append(nn.Linear(cases.CLASSES, cases.CLASSES).double())
        torch.nn.init.eye_(model[-1].weight)
        model[-1].bias.data.zero_()
        if many:
            mesh = init_device_mesh("cpu", (dist.get_world_size(),))
            fully_shard(model, mesh=mesh, ignored_params=set(model[-1].parameters()))
        sharp = SharpnessAware(model, SAM(L2(0.1)), cross_entropy, scope="global" if many else None)
        sharp(*(part if many else whole)(0)).backward()
        grads.append([p.grad for p in model[-1].parameters()])
    off = distance(*grads)
    return {} if off < 1e-12 else {"off": off}


def tensor_parallel(model: nn.Sequential) -> nn.Sequential:
    """Two layers in parts; norm layers and what else is not in the plan are ordinary tensors, the same everywhere."""
    plan = {"0": ColwiseParallel(output_layouts=Replicate()), "3.2": RowwiseParallel(input_layouts=Replicate())}
    return parallelize_module(model, init_device_mesh("cpu", (dist.get_world_size(),)), plan)


def refused(build: Callable[[], Callable[..., Tensor]], message: str) -> dict[str, str]:
    try:
        sharp = build()
        sharp(*part(0))
    except ValueError as error:
        return {} if message in str(error) else {"said": str(error)}
    return {"said": "nothing"}


def sharded_otherwise() -> dict[str, Any]:
    world = dist.get_world_size()
    plain, erm, still = mixed(None), mixed(ERM()), mixed(SAM(L2(0.0)))
    (once, hooks), (twice, again) = (accumulated(SAM(L2(0.1)), asked=asked) for asked in (False, True))

    def by_columns(model: nn.Sequential) -> object:
        return fully_shard(
            model,
            mesh=init_device_mesh("cpu", (world,)),
            shard_placement_fn=lambda p: Shard(1) if p.dim() > 1 and p.shape[1] % world == 0 else None,
        )

    def replicated(model: nn.Sequential) -> object:
        return fully_shard(model, mesh=init_device_mesh("cpu", (world, 1), mesh_dim_names=("replicas", "shards")))

    def partly() -> SharpnessAware:
        model = network()
        fully_shard(model[0], mesh=init_device_mesh("cpu", (world,)))
        return SharpnessAware(model, SAM(), cross_entropy)

    def around() -> nn.Module:
        return fully_shard(SharpnessAware(network(), SAM(), cross_entropy), mesh=init_device_mesh("cpu", (world,)))

    def lonely(method: Any, **arguments: Any) -> Callable[[], SharpnessAware]:
        return lambda: SharpnessAware(sharded(network()), method, cross_entropy, **arguments)

    def parallel_and_global() -> SharpnessAware:
        return SharpnessAware(tensor_parallel(network()), SAM(), cross_entropy, scope="global")

    return wrong(
        {
            "mixed precision is that of a plain loop": distance(plain, erm) + distance(plain, still),
            "accumulation": distance(once, twice) + abs(hooks - 8) + abs(again - 8),
            "a failing forward pass": distance(broken(""), broken("forward")),
            "a failing loss": distance(broken(""), broken("loss")),
            "sharded by columns": like_one_process("RSAM", by_columns),
            "replicas of shards": like_one_process("GSAM", replicated),
            **{
                f"tensor parallelism, {name}": like_one_process(name, tensor_parallel, whole)
                for name in ("GSAM", "ZSharp", "SSAMD", "LookSAM")
            },
            "in part": refused(partly, "6 trainable parameters are not sharded (model.1.weight,"),
            "accumulated before": refused(pending, "gradients of another loss were not reduced yet"),
            "kept back": refused(kept_back, "set_manual_backward_finalization(True) keeps gradients back"),
            "asked for ahead": ahead(),
            "uneven counts": uneven_counts(),
            "its own clean loss": own_clean(),
            "Lookahead": like_one_process("SAM", sharded, optimizer=lambda m: Lookahead(sgd(m), k=3)),
            "large gradients": large_gradients(),
            "complex weights": complex_weights(),
            "inference mode": inference(),
            "adapters beside a sharded model": adapters(),
            "around the loss": refused(around, "fully_shard the model, not the loss"),
            "local": refused(lonely(SAM(), scope="local"), 'scope="local" needs the gradient of each rank'),
            "single examples": refused(lonely(SSAMF()), "use FisherSAM"),
            "tensor parallelism, global": refused(parallel_and_global, "different parts of one tensor"),
        }
    )


def test_sharded_models_of_every_kind():
    assert ranks.run(2, sharded_otherwise) == [{}, {}]


def in_two_dimensions() -> dict[str, Any]:
    """Four ranks: tensor parallelism inside of FSDP2, and replicas of shards that were seeded differently."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))

    def even() -> nn.Sequential:
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, cases.CLASSES)).double()

    def both(model: nn.Sequential) -> object:
        plan = {"0": ColwiseParallel(output_layouts=Replicate()), "3": RowwiseParallel(input_layouts=Replicate())}
        parallelize_module(model, mesh["tensor"], plan)
        return fully_shard(model, mesh=mesh["data"])

    def batch(step: int) -> tuple[Tensor, ...]:
        first = 2 * PART * mesh["data"].get_local_rank()
        return tuple(t[first : first + 2 * PART] for t in whole(step))

    model = network()
    fully_shard(model, mesh=mesh)
    sharp = SharpnessAware(model, METHODS["SSAMD"](None), cross_entropy)
    torch.manual_seed(dist.get_rank())
    sharp(*part(0))
    masks = [t.double() for t in memory_of(sharp)]
    return wrong(
        {
            **{name: like_one_process(name, both, batch, build=even) for name in ("GSAM", "LookSAM")},
            "masks": {} if identical(masks) else {"differ": 1.0},
        }
    )


@pytest.mark.slow
def test_two_dimensions_of_ranks():
    assert ranks.run(4, in_two_dimensions) == [{}] * 4


def uneven() -> dict[str, str]:
    """Ranks with a different number of micro-batches would wait for each other."""
    model = network()
    sharp = SharpnessAware(model, MSAM(2, SAM(L2(0.1))), cross_entropy, scope="global")
    before = [p.detach().clone() for p in model.parameters()]
    x, y = part(0)
    cut = 4 - 2 * dist.get_rank()
    try:
        sharp(x[:cut], y[:cut])
    except ValueError as error:
        intact = distance(before, list(model.parameters())) == 0
        return {} if "ranks differ in micro-batches (1 to 2)" in str(error) and intact else {"said": str(error)}
    return {"said": "nothing"}


def test_ranks_with_uneven_batches_end_with_an_error():
    assert ranks.run(2, uneven) == [{}, {}]


# A batch with NaN on one rank, in a loop that skips steps whose gradient is not finite.

REMEMBERING = ("FSAM", "AESAM", "SAMPa", "LookSAM", "MomentumSAM")


class Rooted(nn.Module):
    """A network with a parameter whose second entry, the part of rank 1, has the gradient NaN if `factor` is 0."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.root, self.factor = network(), nn.Parameter(torch.ones(2).double()), 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + (self.root * torch.tensor([1.0, self.factor])).sqrt().sum()


def skipping(name: str, make: Callable[[], nn.Module], bad: str | None, ddp: str = "", **arguments: Any) -> Any:
    """Gradients after the step 3, which is bad, or left out if `bad` is None; and the memory that it changed."""
    model = make()
    optimizer = sgd(model)
    loss = SharpnessAware(
        DDP(model) if ddp == "inside" else model, METHODS[name](optimizer), cross_entropy, **arguments
    )
    sharp = DDP(loss) if ddp == "around" else loss
    grads, changed = [], False
    for step in range(8):
        if step == 3 and bad is None:
            state = loss.get_extra_state()
            loss.set_extra_state({**state, "step": step + 1})
            continue
        x, y = part(step)
        if step == 3:
            before = memory_of(loss)
            x = x * torch.nan if bad == "batch" and dist.get_rank() == 1 else x
            model.factor = 0.0 if bad == "entry" else 1.0
        optimizer.zero_grad()
        sharp(x, y).backward()
        model.factor = 1.0
        local = [p.grad.to_local() if hasattr(p.grad, "to_local") else p.grad for p in model.parameters()]
        finite = torch.tensor([float(all(g.isfinite().all() for g in local))])
        dist.all_reduce(finite, dist.ReduceOp.MIN)
        if step == 3:
            changed = not all(torch.equal(a, b) for a, b in zip(before, memory_of(loss), strict=True))
            assert not finite
            continue
        assert finite, f"step {step}"
        grads += [
            p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad.clone() for p in model.parameters()
        ]
        optimizer.step()
    return grads, changed


def after_a_bad_step() -> dict[str, Any]:
    def fsdp2() -> nn.Module:
        return sharded(network())

    def entry() -> nn.Module:
        model = Rooted()
        return fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))

    def differences(name: str, make: Callable[[], nn.Module], bad: str, **arguments: Any) -> str:
        grads, changed = skipping(name, make, bad, **arguments)
        expected, _ = skipping(name, make, None, **arguments)
        same = all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))
        return "" if same and not changed else f"gradients the same: {same}, memory changed: {changed}"

    shared = {"ddp": "around", "scope": "global"}
    return wrong(
        {
            **{f"{name}, FSDP2": differences(name, fsdp2, "batch") for name in REMEMBERING},
            **{f"{name}, FSDP2, one entry": differences(name, entry, "entry") for name in REMEMBERING},
            **{f"{name}, global": differences(name, network, "batch", **shared) for name in REMEMBERING},
            **{
                f"{name}, local, {ddp}": differences(name, network, "batch", ddp=ddp)
                for name in REMEMBERING
                for ddp in ("around", "inside")
            },
        }
    )


def test_a_batch_that_is_not_finite_on_one_rank_is_forgotten_by_all():
    assert ranks.run(2, after_a_bad_step) == [{}, {}]


def uneven_calls() -> dict[str, str]:
    """Contexts in which some replicas make no call, so that a method with a state must not wait for them."""
    found: dict[str, str] = {}
    for nesting in ("around", "inside"):
        model = network()
        ddp = DDP(model) if nesting == "inside" else None
        loss = SharpnessAware(ddp or model, METHODS["FSAM"](sgd(model)), cross_entropy)
        sharp = ddp or DDP(loss)
        call = loss if nesting == "inside" else sharp
        with sharp.no_sync():
            for step in range(1 + 2 * dist.get_rank()):
                call(*part(step)).backward()
        call(*part(9)).backward()
        expected = 2 + 2 * dist.get_rank()
        if (steps := loss.get_extra_state()["step"]) != expected:
            found[f"no_sync, {nesting}"] = f"{steps} steps, not {expected}"
    model = network()
    loss = SharpnessAware(model, METHODS["FSAM"](sgd(model)), cross_entropy)
    sharp = DDP(loss)
    with sharp.join():
        for step in range(1 + dist.get_rank()):
            sharp(*part(step)).backward()
    if (steps := loss.get_extra_state()["step"]) != 1 + dist.get_rank():
        found["join"] = f"{steps} steps"
    return found


def test_replicas_with_a_state_may_differ_in_their_calls_where_torch_allows_it():
    assert ranks.run(2, uneven_calls) == [{}, {}]


# Checkpoints.


def remembering(method: str, folder: str) -> Any:
    """Some steps, saved; weights and memory as they are then, and the weights some steps later."""
    model = sharded(network())
    optimizer = sgd(model)
    sharp = SharpnessAware(model, METHODS[method](optimizer), cross_entropy)
    for step in range(4):
        optimizer.zero_grad()
        sharp(*part(step)).backward()
        optimizer.step()
    checkpoint.save({"sharp": sharp.state_dict()}, checkpoint_id=folder)
    return whole_weights(model), memory_of(sharp)


def restored(method: str, folder: str) -> Any:
    """The same from the checkpoint, with as many ranks as there are now; and what is said without room for it."""
    torch.manual_seed(3)
    model = sharded(network()) if dist.get_world_size() > 1 else network()
    sharp = SharpnessAware(model, METHODS[method](sgd(model)), cross_entropy)
    said = ""
    for room in (False, True):
        if room:
            make_room(sharp, folder)
        state = {"sharp": sharp.state_dict()}
        checkpoint.load(state, checkpoint_id=folder)
        try:
            sharp.load_state_dict(state["sharp"])
        except ValueError as error:
            said = str(error)
    return whole_weights(model), memory_of(sharp), said, sharp.get_extra_state()["step"]


def memory_of(sharp: SharpnessAware) -> list[Tensor]:
    leaves = [leaf for leaf in tree_leaves(sharp.get_extra_state()["state"]) if isinstance(leaf, Tensor)]
    return [t.full_tensor() if hasattr(t, "full_tensor") else t for t in leaves]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["LookSAM", "FisherSAM"])
def test_a_memory_is_restored_by_another_number_of_ranks(method, tmp_path):
    weights, memory = ranks.run(2, remembering, method, str(tmp_path))[0]
    assert memory
    for world in (3,) if method == "LookSAM" else (1, 2):
        for got, remembered, said, step in ranks.run(world, restored, method, str(tmp_path)):
            assert all(torch.equal(a, b) for a, b in zip(got + remembered, weights + memory, strict=True))
            assert "make_room(sharp, checkpoint)" in said
            assert step == 4


def interrupted(method: str, folder: str, wrapper: str) -> Any:
    """A run that saves after four steps, ends, and goes on with what is loaded: the weights some steps later.

    Without a checkpoint at `folder` the run is saved there and not interrupted.
    """
    torch.manual_seed(1)
    load, kind = os.path.exists(folder), METHODS[method]
    dist.barrier()
    model = sharded(network()) if wrapper == "fsdp2" else network()
    optimizer = sgd(model)
    sharp = SharpnessAware(model, kind(optimizer), cross_entropy, scope=None if wrapper == "fsdp2" else "global")
    outer = DDP(sharp) if wrapper == "global" else sharp
    if load:
        make_room(sharp, folder)
        state = {"sharp": sharp.state_dict(), "optimizer": get_optimizer_state_dict(sharp, optimizer)}
        checkpoint.load(state, checkpoint_id=folder)
        sharp.load_state_dict(state["sharp"])
        set_optimizer_state_dict(sharp, optimizer, state["optimizer"])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for step in range(4 if load else 0, 8):
            optimizer.zero_grad()
            outer(*part(step)).backward()
            optimizer.step()
            if step == 3:
                saved = {"sharp": sharp.state_dict(), "optimizer": get_optimizer_state_dict(sharp, optimizer)}
                checkpoint.save(saved, checkpoint_id=folder)
    return whole_weights(model), [str(w.message) for w in said if "SAMPa" in str(w.message)]


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", ["fsdp2", "global"])
def test_what_a_rank_keeps_for_itself_is_restored_on_that_rank(wrapper, tmp_path):
    folder = str(tmp_path / "saved")
    expected = ranks.run(2, interrupted, "SAMPa", folder, wrapper)
    for (weights, warned), (loaded, warned_again) in zip(
        expected, ranks.run(2, interrupted, "SAMPa", folder, wrapper), strict=True
    ):
        assert all(torch.equal(a, b) for a, b in zip(weights, loaded, strict=True))
        assert warned == warned_again == []
    ((loaded, warned),) = ranks.run(1, interrupted, "SAMPa", folder, wrapper)
    assert ["without the batch of this rank" in text for text in warned] == [True]
    assert all(t.isfinite().all() for t in loaded)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_room_is_made_for_the_loss_that_is_named(tmp_path):
    model = network()
    losses = {name: SharpnessAware(model, METHODS["LookSAM"](None), cross_entropy) for name in ("a", "b")}
    for name, sharp in losses.items():
        for step in range(1 + (name == "b")):
            sharp(*cases.batch(step))
    checkpoint.save({name: sharp.state_dict() for name, sharp in losses.items()}, checkpoint_id=tmp_path, no_dist=True)
    new = SharpnessAware(model, METHODS["LookSAM"](None), cross_entropy)
    with pytest.raises(ValueError, match=r"losses at \['a._extra_state', 'b._extra_state'\], give key="):
        make_room(new, tmp_path)
    with pytest.raises(ValueError, match="got 'c'"):
        make_room(new, tmp_path, key="c")
    make_room(new, tmp_path, key="b")
    state = {"b": new.state_dict()}
    checkpoint.load(state, checkpoint_id=tmp_path, no_dist=True)
    new.load_state_dict(state["b"])
    assert new.get_extra_state()["step"] == 2
    assert all(torch.equal(a, b) for a, b in zip(memory_of(new), memory_of(losses["b"]), strict=True))
    other = SharpnessAware(model, METHODS["FisherSAM"](None), cross_entropy)
    make_room(other, tmp_path, key="a")
    state = {"a": other.state_dict()}
    checkpoint.load(state, checkpoint_id=tmp_path, no_dist=True)
    with pytest.raises(ValueError, match="the memory of LookSAM, and the method here is SAM"):
        other.load_state_dict(state["a"])
