"""Writes the files in this folder. Run with bisam 0.1.0 at commit 65f4a2494dfe; kept to show how they were made.

    python tests/data/0.1/make.py FOLDER

The files are those that a user of bisam 0.1.0 has on disk during training, with the results of uninterrupted runs:

    made.json             versions and the processor
    states/NAME.pt        a loss and its optimizer after 5 steps, `state_dict()`, and the weights after 9
    states/batches.pt     the batches of these 9 steps
    lookahead/            `bisam.Lookahead`: its `state_dict()` and its pickle
    trainer/              a checkpoint of `SharpnessAwareTrainer`: the files that the Trainer needs to resume
    distributed/          a checkpoint of `torch.distributed.checkpoint`, of one process
    experiments/          the output of `bisam run` and `bisam train` with `--out experiments`: finished runs,
                          interrupted runs, a study, a measurement
    uninterrupted/        the same runs without the interruption; `weights.pt` has every n-th entry of each tensor

Later versions of bisam may rename what is imported here. tests/test_earlier_versions.py reads the files with the
current names.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import platform
import shutil
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed.checkpoint as checkpoint
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

import bisam
from bisam import (
    AESAM,
    BSAM,
    CRSAM,
    ERM,
    ESAM,
    FSAM,
    GSAM,
    KSAM,
    MSAM,
    RAPP,
    RSAM,
    SAM,
    SSAMD,
    SSAMF,
    WSAM,
    XSAM,
    During,
    Evaluation,
    Every,
    ExtraGradient,
    FisherSAM,
    FunctionalSAM,
    Lookahead,
    LookSAM,
    MomentumSAM,
    MultiStepSAM,
    NegLog,
    Oracle,
    SAMPa,
    SharpnessAware,
    Tanh,
    VaSSO,
    cross_entropy,
    lookahead,
)
from bisam.masks import FisherMask, RandomMask
from bisam.perturbations import L2, Adaptive, Friendly, NormLayers, Smoothed, ZScore
from bisam.schedules import Cosine

BEFORE, AFTER = 5, 4
"""Steps before and after the files were written."""


class Network(nn.Module):
    """Two layers around a normalisation, 35 weights, and a parameter that the loss does not reach."""

    def __init__(self, norm: Callable[[int], nn.Module] = nn.BatchNorm1d) -> None:
        super().__init__()
        torch.manual_seed(0)
        # No bias before a norm: its gradient is rounding noise, which AdamW would blow up to a step of full length.
        self.layers = nn.Sequential(nn.Linear(3, 4, bias=False), norm(4), nn.Tanh(), nn.Linear(4, 3))
        self.unused = nn.Parameter(torch.ones(2))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@dataclass(frozen=True)
class Mine:
    """A user's method with a memory: the gradient, averaged."""

    rate: float = 0.5
    remembers: ClassVar[bool] = True

    def __call__(self, oracle: Oracle, batch: Any) -> Evaluation:
        answer = oracle.query(batch)
        g = answer.gradient
        oracle.state["g"] = g = g if "g" not in oracle.state else oracle.state["g"] * self.rate + g * (1 - self.rate)
        return replace(answer, grad=g)


@dataclass(frozen=True)
class Case:
    """A method and what it is trained with."""

    method: Callable[[Optimizer], Any]
    optimizer: Callable[..., Optimizer] = SGD
    norm: Callable[[int], nn.Module] = nn.BatchNorm1d
    weighted: bool = False

    def made(self) -> tuple[SharpnessAware, Optimizer]:
        model = Network(self.norm)
        optimizer = self.optimizer(model.parameters(), lr=0.1)
        loss = cross_entropy
        if self.weighted:
            loss = nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 0.5], dtype=torch.double), reduction="none")
        return SharpnessAware(model, self.method(optimizer), loss), optimizer


def momentum(parameters: Any, lr: float) -> SGD:
    return SGD(parameters, lr=lr, momentum=0.9, weight_decay=5e-3)


CASES: dict[str, Case] = {
    # Without a memory.
    "ERM": Case(lambda o: ERM(), momentum),
    "SAM-Cosine": Case(lambda o: SAM(L2(Cosine(0.3, 0.02, steps=8)))),
    "RAPP": Case(lambda o: RAPP(0.2)),
    "ExtraGradient": Case(lambda o: ExtraGradient(0.2)),
    # Methods that remember.
    "LookSAM": Case(lambda o: LookSAM(L2(0.1), k=3), momentum),
    "LookSAM-weighted": Case(lambda o: LookSAM(L2(0.1), NegLog(), k=3), weighted=True),
    "AESAM": Case(lambda o: AESAM(L2(0.3), steps=12)),
    "SSAMF": Case(lambda o: SSAMF(L2(0.1), keep=0.5, every=4, samples=3), norm=nn.LayerNorm),
    "MomentumSAM": Case(lambda o: MomentumSAM(L2(0.1)), momentum),
    "SAMPa": Case(lambda o: SAMPa(L2(0.1), ahead=lookahead(o)), momentum),
    "SAMPa-log": Case(lambda o: SAMPa(Friendly(L2(0.1)), NegLog(), ahead=lookahead(o), lam=0.5), AdamW),
    "BSAM": Case(lambda o: BSAM(1000, 0.05)),
    "XSAM": Case(lambda o: XSAM(L2(0.15), rho_max=0.3, every=4)),
    # Perturbations that remember.
    "FSAM": Case(lambda o: FSAM(0.1, lam=0.6)),
    "VaSSO": Case(lambda o: VaSSO(0.1, theta=0.4)),
    "FisherSAM": Case(lambda o: FisherSAM(0.1, keep=0.3, every=4)),
    "SSAMD": Case(lambda o: SSAMD(0.1, keep=0.5, every=3)),
    # Nests of both.
    "KSAM": Case(lambda o: KSAM(2, LookSAM(L2(0.1), k=3))),
    "MSAM": Case(lambda o: MSAM(4, LookSAM(L2(0.1), k=2), separate=True)),
    "RSAM": Case(lambda o: RSAM(0.05, VaSSO(0.1))),
    "Every": Case(lambda o: Every(2, LookSAM(L2(0.1), k=3), FSAM(0.1))),
    "During": Case(lambda o: During(LookSAM(L2(0.1), k=3), start=2, stop=8, otherwise=VaSSO(0.1, theta=0.4))),
    "GSAM": Case(lambda o: GSAM(Friendly(L2(0.1)), alpha=0.4)),
    "WSAM": Case(lambda o: WSAM(NormLayers(Smoothed(L2(0.1), theta=0.4)), gamma=0.8)),
    "CRSAM": Case(lambda o: CRSAM(ZScore(Friendly(L2(0.1)), keep=0.5))),
    "FunctionalSAM": Case(lambda o: FunctionalSAM(FisherMask(L2(0.1), keep=0.3, every=4))),
    "MultiStepSAM": Case(lambda o: MultiStepSAM(Friendly(L2(0.1)), steps=2)),
    "ESAM": Case(lambda o: ESAM(RandomMask(Friendly(L2(0.1)), beta=0.6), gamma=0.5)),
    "nest": Case(lambda o: KSAM(6, SAM(RandomMask(Smoothed(Friendly(Adaptive(0.5, 0.01)), theta=0.4)), Tanh()))),
    "user": Case(lambda o: KSAM(6, Mine())),
}


def batches() -> dict[str, Tensor]:
    random, steps = torch.Generator().manual_seed(1), BEFORE + AFTER
    x = torch.randn(steps, 8, 3, generator=random, dtype=torch.double)
    return {"x": x, "y": torch.randint(3, (steps, 8), generator=random)}


def steps(sharp: SharpnessAware, optimizer: Optimizer, which: range) -> None:
    data = batches()
    for i in which:
        torch.manual_seed(100 + i)
        optimizer.zero_grad()
        sharp(data["x"][i], data["y"][i]).backward()
        optimizer.step()


def flat(model: nn.Module) -> Tensor:
    """Weights and running statistics as one vector."""
    return torch.cat([t.detach().double().flatten() for t in model.state_dict().values()])


def states(folder: Path) -> None:
    folder.mkdir()
    torch.save(batches(), folder / "batches.pt")
    for name, case in CASES.items():
        sharp, optimizer = case.made()
        steps(sharp, optimizer, range(BEFORE))
        saved = {"sharp": sharp.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(saved, folder / f"{name}.pt")
        steps(sharp, optimizer, range(BEFORE, BEFORE + AFTER))
        saved = torch.load(folder / f"{name}.pt", weights_only=True)
        torch.save({**saved, "final": flat(sharp.model)}, folder / f"{name}.pt")


def lookaheads(folder: Path) -> None:
    folder.mkdir()
    # Saved between two pulls of both.
    model = Network()
    optimizer = Lookahead(Lookahead(momentum(model.parameters(), lr=0.1), k=2, lam=0.7), k=6, lam=0.4)
    sharp = SharpnessAware(model, ERM(), cross_entropy)
    steps(sharp, optimizer, range(BEFORE))
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(saved, folder / "state.pt")
    saved = torch.load(folder / "state.pt", weights_only=True)
    steps(sharp, optimizer, range(BEFORE, BEFORE + AFTER))
    torch.save({**saved, "final": flat(model)}, folder / "state.pt")

    # On the half square of the distance to 1.
    weights = nn.Parameter(torch.arange(3, dtype=torch.double))
    optimizer = Lookahead(SGD([weights], lr=0.1, momentum=0.9), k=3, lam=0.25)
    for _ in range(BEFORE):
        weights.grad = weights.detach() - 1
        optimizer.step()
    (folder / "optimizer.pickle").write_bytes(pickle.dumps(optimizer, protocol=4))
    for _ in range(AFTER):
        weights.grad = weights.detach() - 1
        optimizer.step()
    torch.save({"final": weights.detach()}, folder / "final.pt")


class Classifier(Network):
    """The network as the Trainer wants it."""

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.layers(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def trainer(folder: Path) -> None:
    from transformers import TrainingArguments

    from bisam.integrations.transformers import SharpnessAwareTrainer

    data = batches()
    rows = [{"x": x, "labels": y} for x, y in zip(data["x"].flatten(0, 1), data["y"].flatten(), strict=True)]
    folder.mkdir()
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=8,
        max_steps=BEFORE + AFTER,
        save_steps=BEFORE,
        learning_rate=0.1,
        optim="sgd",
        lr_scheduler_type="cosine",
        train_sampling_strategy="sequential",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    made = SharpnessAwareTrainer(Classifier(), arguments, train_dataset=rows, method=LookSAM(L2(0.1), k=3))
    made.train()
    needed = ("model.safetensors", "optimizer.pt", "scheduler.pt", "sharpness_aware_0.pt", "trainer_state.json")
    for path in (folder / f"checkpoint-{BEFORE}").iterdir():
        if path.name not in needed:
            path.unlink()
    shutil.rmtree(folder / f"checkpoint-{BEFORE + AFTER}", ignore_errors=True)
    torch.save({"final": flat(made.model)}, folder / "final.pt")


def distributed(folder: Path) -> None:
    folder.mkdir()
    losses = {name: CASES[name].made() for name in ("LookSAM", "SAMPa")}
    for sharp, optimizer in losses.values():
        steps(sharp, optimizer, range(BEFORE))
    # Into the present folder: the path becomes a part of the checkpoint.
    here = Path.cwd()
    os.chdir(folder)
    with warnings.catch_warnings(action="ignore"):  # that there is one process
        state = {name: sharp.state_dict() for name, (sharp, _) in losses.items()}
        checkpoint.save(state, checkpoint_id="checkpoint", no_dist=True)
    os.chdir(here)


EXPRESSIONS = (
    "SAMPa(L2(0.1), ahead=lookahead(optimizer), lam=0.1)",
    "GSAM(Friendly(L2(Follow(optimizer, high=0.4, low=0.1)), sigma=0.5, lam=0.8), ascent=Tanh(10.0, 0.1), alpha=0.3)",
    "During(KSAM(8, FSAM(0.1)), start=steps // 2, otherwise=RSAM(0.01, MultiStepSAM(L2(0.1), steps=2)))",
    "MSAM(8, XSAM(L2(Warmup(0.15, 10)), every=epoch), separate=1)",
    "ESAM(RandomMask(L2(0.05), beta=0.5), gamma=0.5, select=cross_entropy)",
    "Every(2, SAM(ZScore(NormLayers(LossEquated(Cosine(0.1, 0.0, steps=steps))), keep=0.5)), AESAM(steps=8))",
    "BSAM(4 * examples, 0.05, prior=2e-3 * examples)",
)


def experiments(folder: Path, whole: Path) -> None:
    from bisam.experiments.machine import Machine
    from bisam.experiments.train import train

    from bisam.experiments import main
    from bisam.experiments.recipes import Recipe
    from bisam.experiments.runs import Run

    quiet = Machine(log=())

    def interrupt(row: dict[str, float]) -> None:
        raise KeyboardInterrupt

    small = Recipe(noise=0.4, limit=64, batch_size=16)
    # In double precision, with a mask of booleans and without momentum, so that the checkpoint is small.
    double = replace(
        small,
        seed=1,
        batch_size=8,
        method="SSAMD(0.4, keep=0.5, every=3, steps=steps)",
        epochs=3,
        momentum=0.0,
        precision="64",
        label_smoothing=0.1,
    )
    # With momentum and LookSAM's gradient, which have the size of the weights.
    # Its first epoch is its best, so the tested weights come from the checkpoint.
    single = replace(small, batch_size=8, method="looksam", rho=0.1, epochs=3, schedule="linear", warmup=3, clip=5.0)
    for recipe in (double, single):
        run, other = Run.under(folder / "train", recipe), Run.under(whole, recipe)
        with contextlib.suppress(KeyboardInterrupt):
            train(run, quiet, interrupt)
        train(other, quiet)
        torch.save({"final": thinned(other.checkpoint()["sharp"])}, other.folder / "weights.pt")
        (other.folder / "checkpoint.pt").unlink()
    assert other.result["best_epoch"] == 1
    finished = [
        replace(small, method="bisam_tanh", rho=0.2, mu=5.0, seed=1, epochs=2, accumulate=2, ema=0.9),
        replace(small, method="sampa"),
        replace(small, method="asam", rho=2, eta=0.01, weight_decay=1e-3, limit=None, batch_size=256),
        *(replace(small, method=expression) for expression in EXPRESSIONS),
    ]
    for recipe in finished:
        run = Run.under(folder / "train", replace(recipe, epochs=min(recipe.epochs, 2)))
        train(run, quiet)
        (run.folder / "checkpoint.pt").unlink()

    changes = ("dataset=digits", "model=convnet", "epochs=1", "limit=64")
    sets = [word for change in changes for word in ("--set", change)]
    command(main, "run", "table10", *sets, "--seeds", 1, "--workers", 1, "--log", "tensorboard", "--out", folder)
    command(main, "run", "example", "--out", folder)
    command(main, "run", "example", "--set", "classes=3,20", "--set", "deltas=0.01", "--out", folder)
    for path in [*folder.rglob("*"), *whole.rglob("*")]:
        large = path.name == "checkpoint.pt" and path.with_name("result.json").exists()
        if large or path.name == ".lock" or path.suffix == ".png" or path.stem == "report":
            path.unlink()
    for path in [*folder.rglob("tensorboard")]:
        shutil.rmtree(path)


def command(main: Callable[[], Any], *words: Any) -> None:
    sys.argv = ["bisam", *map(str, words)]
    with contextlib.suppress(SystemExit):
        main()


def thinned(state: dict[str, Any]) -> dict[str, Tensor]:
    """About 400 entries of each tensor, evenly spaced."""
    tensors = {name: t for name, t in state.items() if isinstance(t, Tensor)}
    return {name: t.flatten()[:: 1 + t.numel() // 400].clone() for name, t in tensors.items()}


def processor() -> str:
    """The kind of the processor, and the instructions that torch uses of it: with both the same, bits are the same."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        found = dict((part.strip() for part in line.split(":", 1)) for line in lines if ":" in line)
        name = f"{found['model name']}, family {found['cpu family']}, model {found['model']}"
    except (OSError, KeyError):
        name = platform.processor()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def main() -> None:
    assert bisam.__version__ == "0.1.0"
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    root = Path(sys.argv[1]).absolute()
    root.mkdir(parents=True, exist_ok=True)
    states(root / "states")
    lookaheads(root / "lookahead")
    trainer(root / "trainer")
    distributed(root / "distributed")
    experiments(root / "experiments", root / "uninterrupted")
    (root / "made.json").write_text(json.dumps({"torch": torch.__version__, "processor": processor()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
