"""On an accelerator: the numbers of the CPU, the same noise in every query, float16, graphs, memory, checkpoints.

Skipped where there is none. What a CPU can of it runs with `BISAM_TEST_DEVICE=cpu pytest tests/test_accelerator.py`.
"""

from __future__ import annotations

import io
import os
import tempfile
from copy import deepcopy
from math import isfinite
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

from bisam import ERM, SAM, Binary, BiSAM, NegLog, SharpnessAware, Tanh, Vector, cross_entropy
from bisam.perturbations import L2
from tests.support import cases


def chosen() -> torch.device | None:
    if name := os.environ.get("BISAM_TEST_DEVICE"):
        return torch.device(name)
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None


FOUND = chosen()
DEVICE = FOUND or torch.device("cpu")
pytestmark = pytest.mark.skipif(FOUND is None, reason="no accelerator")
needs_double = pytest.mark.skipif(DEVICE.type == "mps", reason="no float64 there")
only_cuda = pytest.mark.skipif(DEVICE.type != "cuda", reason="CUDA only")

DRAWING = ("RandomMask", "DropGrow", "SSAM", "ESAM", "EBiSAM", "BSAM", "RSAM", "KSAM-RSAM", "Every-other")
"""Each device has random numbers of its own."""
METHODS = [name for name in cases.FAMILY if not name.startswith(DRAWING)]


def trained(
    make: Any, device: torch.device, model: nn.Module | None = None, steps: int = 4, **options: Any
) -> dict[str, Tensor]:
    """Weights and buffers, on the CPU, after a plain loop on `device`."""
    torch.manual_seed(0)
    model = (cases.convnet() if model is None else model).to(device)
    dtype = next(model.parameters()).dtype
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-3)
    sharp = SharpnessAware(model, make(optimizer), cross_entropy, **options)
    for i in range(steps):
        x, y = cases.batch(i)
        optimizer.zero_grad()
        sharp(x.to(device, dtype), y.to(device)).backward()
        optimizer.step()
    return {name: value.detach().cpu() for name, value in model.state_dict().items()}


def close(ours: dict[str, Tensor], theirs: dict[str, Tensor], **tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], **tolerance)


@needs_double
@pytest.mark.parametrize("name", METHODS)
def test_a_method_trains_as_on_the_cpu(name):
    make, _ = cases.FAMILY[name]
    close(trained(make, DEVICE), trained(make, torch.device("cpu")), rtol=0, atol=1e-9)


@needs_double
@pytest.mark.parametrize("rest", [(), (3, 2)])
@pytest.mark.parametrize("bound", [NegLog(), NegLog(5.0), NegLog(65.0), Tanh(), Tanh(65.0)], ids=str)
@pytest.mark.parametrize("ignored", [False, True])
def test_bounds_and_their_gradients_are_those_of_the_cpu(bound, rest, ignored):
    logits, labels = torch.randn(6, 5, *rest, dtype=torch.double), torch.randint(5, (6, *rest))
    if ignored:
        labels[::2] = -100
    found = []
    for device in (DEVICE, torch.device("cpu")):
        x = logits.to(device, copy=True).requires_grad_()
        values = bound(x, labels.to(device))
        values.sum().backward()
        assert x.grad is not None
        found.append((values.detach().cpu(), x.grad.cpu()))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@needs_double
@pytest.mark.parametrize("bound", [NegLog(), NegLog(65.0), Tanh()], ids=str)
def test_bounds_of_labels_and_probabilities_are_those_of_the_cpu_and_read_no_value(bound):
    z, p = torch.randn(6, 5, dtype=torch.double), torch.rand(6, 5, dtype=torch.double)
    for objective, targets in ((Binary(bound), p), (Binary(bound), p.round().long()), (bound, p.softmax(1))):
        found = []
        for device in (DEVICE, torch.device("cpu")):
            x, t = z.to(device, copy=True).requires_grad_(), targets.to(device)
            mode = torch.cuda.get_sync_debug_mode() if DEVICE.type == "cuda" else 0
            try:
                if DEVICE.type == "cuda":
                    torch.cuda.set_sync_debug_mode("error")
                values = objective(x, t)
            finally:
                if DEVICE.type == "cuda":
                    torch.cuda.set_sync_debug_mode(mode)
            values.sum().backward()
            found.append((values.detach().cpu(), x.grad.cpu()))
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@needs_double
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.cfloat])
@pytest.mark.parametrize("magnitude", [1e-25, 1e-12, 1.0, 1e12, 1e21, 1e36])
def test_norms_and_projections_are_exact_in_the_whole_range_of_float32(magnitude, dtype):
    vectors = [Vector([(torch.randn(9, 7) * magnitude).to(DEVICE, dtype) for _ in range(3)]) for _ in range(2)]
    wide = [torch.cat([t.cpu().to(torch.cdouble).flatten() for t in v]) for v in vectors]
    torch.testing.assert_close(vectors[0].norm().cpu().double(), wide[0].norm(), rtol=1e-6, atol=0)
    along = torch.vdot(wide[1], wide[0]).real / wide[1].norm() ** 2 * wide[1]
    found = torch.cat([t.cpu().to(torch.cdouble).flatten() for t in vectors[0].onto(vectors[1])])
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found / magnitude, along / magnitude, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["FSAM", "VaSSO", "AESAM", "MomentumSAM", "LookSAM", "SAMPa", "FisherSAM", "BSAM"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_batch_that_is_not_finite_leaves_the_state_of_the_device(name, value):
    model = cases.A_MODEL().float().to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sharp = SharpnessAware(model, cases.FAMILY[name][0](optimizer), cross_entropy)

    def gradients(step: int, factor: float = 1.0) -> Tensor:
        x, y = (t.to(DEVICE) for t in ((cases.batch(step)[0] * factor).float(), cases.batch(step)[1]))
        optimizer.zero_grad()
        if DEVICE.type == "cuda" and name != "AESAM" and step > 1:
            torch.cuda.set_sync_debug_mode("error")
        try:
            sharp(x, y).backward()
        finally:
            if DEVICE.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
        return torch.cat([p.grad.cpu().flatten() for p in model.parameters() if p.grad is not None])

    def state() -> list[Tensor]:
        return [t.cpu() for t in tree_leaves(sharp.get_extra_state()["state"]) if isinstance(t, Tensor)]

    for step in range(3):
        assert gradients(step).isfinite().all()
        optimizer.step()
    before = state()
    assert not gradients(3, value).isfinite().all()
    assert all(torch.equal(a, b) for a, b in zip(state(), before, strict=True))
    assert gradients(4).isfinite().all()


def dropout() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 64), nn.Dropout(0.5), nn.ReLU(), nn.Linear(64, cases.CLASSES), nn.Dropout(0.1))


def test_same_noise_replays_the_masks_of_the_device():
    results = []
    for method in (SAM(L2(0.0)), ERM()):
        torch.manual_seed(3)
        results.append(trained(lambda _, m=method: m, DEVICE, dropout(), same_noise=True))
    close(*results, rtol=0, atol=0)


def test_noise_is_fresh_by_default():
    results = []
    for method in (SAM(L2(0.0)), ERM()):
        torch.manual_seed(3)
        results.append(trained(lambda _, m=method: m, DEVICE, dropout()))
    assert any(not torch.equal(value, results[1][name]) for name, value in results[0].items())


def test_float16_skips_the_steps_that_overflow_and_trains_after_them():
    model = nn.Sequential(nn.Linear(6, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, cases.CLASSES)).to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**30, growth_interval=1000)
    sharp = SharpnessAware(model, BiSAM(0.1), cross_entropy, scaler=scaler)
    x, y = (t.to(DEVICE) for t in cases.batch(n=64))
    losses, skipped = [], 0
    for _ in range(60):
        before, scale = {k: v.clone() for k, v in model.named_parameters()}, scaler.get_scale()
        optimizer.zero_grad()
        with torch.autocast(DEVICE.type, torch.float16):
            loss = sharp(x.float(), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
        same = all(torch.equal(before[k], v) for k, v in model.named_parameters())
        assert same == (scaler.get_scale() < scale)
        skipped += same
    assert 0 < skipped < 30
    assert all(torch.isfinite(p).all() for p in model.parameters())
    finite = [loss for loss in losses if isfinite(loss)]
    assert len(finite) >= 60 - skipped
    assert finite[-1] < 0.9 * finite[0]


def test_bfloat16_by_autocast_is_displaced_in_every_query():
    gradients = []
    for method in (BiSAM(2.0), ERM()):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, cases.CLASSES)).to(DEVICE)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            x, y = cases.batch()
            loss = SharpnessAware(model, method, cross_entropy)(x.float().to(DEVICE), y.to(DEVICE))
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert (gradients[0] - gradients[1]).norm() > 0.05 * gradients[1].norm()  # a stale cache of casts would make it ERM


@pytest.mark.parametrize("mode", ["default", pytest.param("reduce-overhead", marks=only_cuda)])
def test_a_compiled_model_trains_as_the_plain_one(mode):
    torch.compiler.reset()
    results = []
    for compiled in (False, True):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, cases.CLASSES)).to(DEVICE)
        if compiled:
            model.compile(mode=mode)
        results.append(trained(lambda _: BiSAM(0.1), DEVICE, model))
    close(*results, rtol=1e-4, atol=1e-5)


def test_a_checkpoint_of_the_device_goes_on_elsewhere():
    make, _ = cases.FAMILY["LookSAM"]

    def parts(device: torch.device) -> tuple[Any, Any]:
        torch.manual_seed(0)
        model = cases.mlp().to(device, torch.float32)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return SharpnessAware(model, make(optimizer), cross_entropy), optimizer

    def step(sharp: Any, optimizer: Any, device: torch.device, i: int) -> None:
        x, y = cases.batch(i)
        optimizer.zero_grad()
        sharp(x.to(device, torch.float32), y.to(device)).backward()
        optimizer.step()

    here, there = parts(DEVICE), parts(torch.device("cpu"))
    for i in range(4):
        step(*here, DEVICE, i)
    file = io.BytesIO()
    torch.save({"sharp": here[0].state_dict(), "optimizer": here[1].state_dict()}, file)
    file.seek(0)
    state = torch.load(file, map_location="cpu", weights_only=True)
    there[0].load_state_dict(state["sharp"])
    there[1].load_state_dict(state["optimizer"])
    for i in range(4, 8):
        step(*here, DEVICE, i)
        step(*there, torch.device("cpu"), i)
    moved = {name: value.cpu() for name, value in here[0].model.state_dict().items()}
    close(moved, there[0].model.state_dict(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["SAM", "BiSAM", "RandomMask", "GBiSAM"])
def test_statistics_are_those_of_the_cpu(name):
    if name.startswith(DRAWING) and DEVICE.type != "cpu":
        pytest.skip("random numbers of its own")
    found = []
    for device in (DEVICE, torch.device("cpu")):
        torch.manual_seed(0)
        model = cases.A_MODEL().float().to(device)
        method = cases.FAMILY[name][0](torch.optim.SGD(model.parameters(), lr=0.1))
        sharp = SharpnessAware(model, method, cross_entropy, stats=True)
        x, y = cases.batch()
        sharp(x.float().to(device), y.to(device))
        found.append(sharp.stats.to_dict())
        assert all(value.device.type == device.type for value in sharp.stats.known().values())
    assert found[0] == pytest.approx(found[1], rel=1e-3, abs=1e-5)


@only_cuda
@pytest.mark.parametrize("method", [SAM(), BiSAM()], ids=["SAM", "BiSAM"])
@pytest.mark.parametrize("stats", [False, True])
def test_a_step_holds_two_tensors_a_weight_more_than_plain_training(method, stats):
    """Three with statistics."""

    def peak(method: Any, stats: bool = False) -> int:
        torch.manual_seed(0)
        model = nn.Sequential(*(layer for _ in range(8) for layer in (nn.Linear(1024, 1024), nn.ReLU()))).to(DEVICE)
        sharp = SharpnessAware(model, method, cross_entropy, stats=stats)
        x, y = torch.randn(4, 1024, device=DEVICE), torch.randint(1024, (4,), device=DEVICE)
        for _ in range(3):
            torch.cuda.reset_peak_memory_stats()
            sharp(x, y).backward()
            model.zero_grad()
        return torch.cuda.max_memory_allocated()

    weights = 8 * 1024 * 1025 * 4
    assert peak(method, stats) < peak(ERM()) + (3.1 if stats else 2.1) * weights


@only_cuda
@pytest.mark.parametrize("stats", [False, True])
def test_a_step_waits_for_nothing(stats):
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, cases.CLASSES)).to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sharp = SharpnessAware(model, BiSAM(0.1), cross_entropy, stats=stats)
    x, y = (t.to(DEVICE) for t in cases.batch())
    x = x.float()

    def step() -> None:
        sharp(x, y).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@only_cuda
def test_ddp_with_nccl_and_synchronised_batch_normalisation_on_one_device():
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("nccl", init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            alone = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, cases.CLASSES)).to(DEVICE)
            inside = nn.SyncBatchNorm.convert_sync_batchnorm(deepcopy(alone))
            losses = [
                SharpnessAware(alone, BiSAM(0.1), cross_entropy),
                SharpnessAware(DistributedDataParallel(inside), BiSAM(0.1), cross_entropy),
            ]
            for sharp in losses:
                optimizer = torch.optim.SGD(sharp.parameters(), lr=0.1)
                for i in range(3):
                    x, y = cases.batch(i)
                    optimizer.zero_grad()
                    sharp(x.float().to(DEVICE), y.to(DEVICE)).backward()
                    optimizer.step()
            close(dict(alone.state_dict()), dict(inside.state_dict()), rtol=1e-4, atol=1e-5)
        finally:
            dist.destroy_process_group()
