"""Hosts: Lightning, Accelerate, Fabric and DDP train with the loss as it is, as a plain loop does, and resume."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from bisam import GSAM, SAM, BiSAM, EBiSAM, LookSAM, SharpnessAware, cross_entropy
from bisam.perturbations import L2
from tests.support import cases, ranks
from tests.support.cases import buffers, parameters

METHODS = {
    "SAM": SAM(),
    "BiSAM": BiSAM(),
    "GSAM": GSAM(),
    "LookSAM": LookSAM(L2(0.1), k=5),
    "EBiSAM": EBiSAM(gamma=0.9),
}
EPOCHS, PARTS, NORM = 3, 2, 0.5  # micro-batches in a step; the norm that gradients are clipped to

each_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def make(method, scale=None) -> tuple[SharpnessAware, torch.optim.Optimizer, Any]:
    """The loss, the optimizer, and a scheduler that acts in each step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    return SharpnessAware(model, method, cross_entropy, scaler=scale), optimizer, scheduler


def loader() -> DataLoader[tuple[Tensor, ...]]:
    """Six batches. With a generator: a loader without one draws from the one that dropout draws from."""
    x = torch.randn(24, 6, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x, torch.arange(24) % 4), batch_size=4, generator=torch.Generator())


def plain(method, *, half: torch.dtype | None = None, scaler=None, norms: list[Tensor] | None = None) -> Any:
    """A loop with torch alone: bits of weights and buffers at its end."""
    sharp, optimizer, scheduler = make(method, scaler)
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    for epoch in range(EPOCHS):
        torch.manual_seed(epoch)
        for i, (x, y) in enumerate(loader()):
            with torch.autocast("cpu", dtype=half, enabled=half is not None):
                loss = sharp(x, y)
            scaler.scale(loss / PARTS).backward()
            if i % PARTS == PARTS - 1:
                scaler.unscale_(optimizer)
                norm = nn.utils.clip_grad_norm_(sharp.parameters(), NORM)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                scheduler.step()
                if norms is not None:
                    norms.append(norm)
    return parameters(sharp.model), buffers(sharp.model)


def lightning(
    method,
    epochs: int = EPOCHS,
    *,
    half: bool = False,
    scaler=None,
    save: Path | None = None,
    resume: Path | None = None,
    both: bool = False,
) -> Any:
    """`both`: the network is an attribute of the LightningModule too, as it was before it got a sharp loss."""
    pl = pytest.importorskip("lightning")

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            # The scaler is the trainer's, who comes later.
            scale = scaler and (lambda: self.trainer.precision_plugin.scaler.get_scale())
            self.sharp, self.optimizer, self.scheduler = make(method, scale)
            if both:
                self.model = self.sharp.model

        def on_train_epoch_start(self) -> None:
            torch.manual_seed(self.current_epoch)

        def training_step(self, batch, index) -> Tensor:
            return self.sharp(*batch)

        def validation_step(self, batch, index) -> None:
            self.log("loss", self.sharp(*batch))

        def configure_optimizers(self) -> Any:
            return [self.optimizer], [{"scheduler": self.scheduler, "interval": "step"}]

    module = Module()
    trainer = pl.Trainer(
        accelerator="cpu",
        precision="bf16-mixed" if half else None,
        plugins=pl.pytorch.plugins.MixedPrecision("16-mixed", "cpu", scaler) if scaler else None,
        max_epochs=epochs,
        accumulate_grad_batches=PARTS,
        gradient_clip_val=NORM,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader(), loader(), ckpt_path=resume)
    if save:
        trainer.save_checkpoint(save)
    return parameters(module.sharp.model), buffers(module.sharp.model)


def accelerate(
    method,
    epochs: int = EPOCHS,
    *,
    half: bool = False,
    save: Path | None = None,
    resume: Path | None = None,
    whole: bool = False,
) -> Any:
    """`whole`: the loss is prepared, and not the model alone. What safetensors cannot hold then goes by torch.save."""
    accelerate = pytest.importorskip("accelerate")
    for state in (accelerate.state.AcceleratorState, accelerate.state.GradientState, accelerate.state.PartialState):
        state._reset_state()
    accelerator = accelerate.Accelerator(
        cpu=True, mixed_precision="bf16" if half else "no", gradient_accumulation_steps=PARTS
    )
    sharp, optimizer, scheduler = make(method)
    if whole:
        sharp, optimizer, scheduler, data = accelerator.prepare(sharp, optimizer, scheduler, loader())
    else:
        model, optimizer, scheduler, data = accelerator.prepare(sharp.model, optimizer, scheduler, loader())
        sharp = SharpnessAware(model, method, cross_entropy)
        accelerator.register_for_checkpointing(sharp)
    if resume:
        accelerator.load_state(resume)
    for epoch in range(EPOCHS - 1 if resume else 0, epochs):
        torch.manual_seed(epoch)
        for x, y in data:
            with accelerator.accumulate(sharp if whole else model):
                accelerator.backward(sharp(x, y))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(sharp.parameters(), NORM)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
    if save:
        accelerator.save_state(save, safe_serialization=not whole)
    return parameters(sharp.model), buffers(sharp.model)


def fabric(
    method,
    epochs: int = EPOCHS,
    *,
    half: bool = False,
    scaler=None,
    save: Path | None = None,
    resume: Path | None = None,
) -> Any:
    lightning_fabric = pytest.importorskip("lightning_fabric")
    fabric = lightning_fabric.Fabric(
        accelerator="cpu",
        devices=1,
        precision="bf16-mixed" if half else None,
        plugins=lightning_fabric.plugins.MixedPrecision("16-mixed", "cpu", scaler) if scaler else None,
    )
    sharp, optimizer, scheduler = make(method, scaler and fabric.strategy.precision.scaler)
    sharp, optimizer = fabric.setup(sharp, optimizer)
    data = fabric.setup_dataloaders(loader())
    state = {"sharp": sharp, "optimizer": optimizer, "scheduler": scheduler, "epoch": 0}
    if resume:
        fabric.load(resume, state)
    for epoch in range(state["epoch"], epochs):
        torch.manual_seed(epoch)
        for i, (x, y) in enumerate(data):
            last = i % PARTS == PARTS - 1
            with fabric.no_backward_sync(sharp, enabled=not last):
                fabric.backward(sharp(x, y) / PARTS)
            if last:
                fabric.clip_gradients(sharp, optimizer, max_norm=NORM, error_if_nonfinite=False)
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
    if save:
        fabric.save(save, {**state, "epoch": epochs})
    return parameters(sharp.module.model), buffers(sharp.module.model)


# Warnings of Lightning that every user of this torch, or of a loader without workers, gets.
quiet = [
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
]
each_host = pytest.mark.parametrize(
    "host",
    [
        pytest.param(lightning, id="lightning", marks=quiet),
        pytest.param(partial(lightning, both=True), id="lightning-both", marks=quiet),
        pytest.param(accelerate, id="accelerate"),
        pytest.param(partial(accelerate, whole=True), id="accelerate-whole"),
        pytest.param(fabric, id="fabric"),
    ],
)


@each_method
@each_host
def test_a_host_trains_to_the_bit_as_a_plain_loop(host, method):
    """Also where it validates between (Lightning): the loss does not move there."""
    norms = []
    assert host(method) == plain(method, norms=norms)
    assert max(norms) > NORM  # or nothing was clipped


@each_method
@each_host
def test_a_host_resumes_to_the_bit(host, method, tmp_path):
    host(method, EPOCHS - 1, save=tmp_path / "saved")
    assert host(method, resume=tmp_path / "saved") == plain(method)


@each_host
def test_a_host_in_bfloat16_is_a_plain_loop_under_autocast(host):
    expected = plain(BiSAM(), half=torch.bfloat16)
    assert host(BiSAM(), half=True) == expected != plain(BiSAM())


@pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler.step:UserWarning")  # as the first step is skipped
@pytest.mark.parametrize("host", [pytest.param(lightning, marks=quiet), fabric])
@pytest.mark.parametrize("method", [BiSAM(), LookSAM(L2(0.1), k=5)], ids=["BiSAM", "LookSAM"])
def test_a_host_in_float16_is_a_plain_loop_with_its_scaler(host, method):
    ours, theirs = (torch.amp.GradScaler("cpu", init_scale=2.0**24) for _ in range(2))
    assert host(method, scaler=theirs) == plain(method, half=torch.float16, scaler=ours)
    assert ours.get_scale() == theirs.get_scale() < 2.0**24  # steps were skipped


def test_adapters_alone_are_displaced_and_trained():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    layers = OrderedDict(first=nn.Linear(6, 16), act=nn.Tanh(), last=nn.Linear(16, 4))
    model = peft.get_peft_model(nn.Sequential(layers), peft.LoraConfig(r=2, target_modules=["first", "last"]))
    seen: list[dict[str, Any]] = []
    model.register_forward_pre_hook(lambda *_: seen.append(parameters(model)))
    sharp = SharpnessAware(model, LookSAM(L2(0.5), k=2), cross_entropy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    for x, y in loader():
        sharp(x, y).backward()
        optimizer.step()
        optimizer.zero_grad()
    first, displaced, second = seen[:3]
    assert len(seen) == 9
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name in first if first[name] != displaced[name]} <= trained
    assert {name for name in first if first[name] != seen[-1][name]} == trained
    assert first != displaced
    assert first != second


# DDP: accumulation without synchronisation


def micro_batches() -> list[tuple[Tensor, Tensor]]:
    return [cases.batch(i, 4) for i in range(8)]


def distributed() -> tuple[list[Any], list[Tensor]]:
    rank, weights, early = torch.distributed.get_rank(), [], []
    for inside, method in itertools.product([True, False], [SAM(L2(0.5)), BiSAM(0.5)]):
        torch.manual_seed(0)
        model = cases.mlp()
        if inside:
            wrapper = DistributedDataParallel(model)
            sharp = SharpnessAware(wrapper, method, cross_entropy)
        else:
            sharp = wrapper = DistributedDataParallel(SharpnessAware(model, method, cross_entropy))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        own = micro_batches()[rank::2]
        for first, last in zip(own[::2], own[1::2], strict=True):
            with wrapper.no_sync():
                (sharp(*first) / PARTS).backward()
            early.append(model[0].weight.grad.clone())
            (sharp(*last) / PARTS).backward()
            nn.utils.clip_grad_norm_(model.parameters(), NORM)
            optimizer.step()
            optimizer.zero_grad()
        weights.append(list(model.parameters()))
    return weights, early


def test_replicas_that_accumulate_are_one_process_that_does():
    results = ranks.run(2, distributed)
    expected = []
    for method in (SAM(L2(0.5)), BiSAM(0.5)):
        torch.manual_seed(0)
        model = cases.mlp()
        sharp = SharpnessAware(model, method, cross_entropy)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for i, (x, y) in enumerate(micro_batches()):
            (sharp(x, y) / 4).backward()
            if i % 4 == 3:
                nn.utils.clip_grad_norm_(model.parameters(), NORM)
                optimizer.step()
                optimizer.zero_grad()
        expected.append(list(model.parameters()))
    for weights, _ in results:
        for actual, wanted in zip(weights, expected * 2, strict=True):
            for p, q in zip(actual, wanted, strict=True):
                torch.testing.assert_close(p, q, rtol=0, atol=1e-12)
    assert not any(torch.equal(g, h) for g, h in zip(results[0][1], results[1][1], strict=True))
