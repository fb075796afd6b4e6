"""Table 12: the time of an ascent loss."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from bisam import NegLog, Tanh
from bisam.experiments.errors import unknown
from bisam.experiments.measurements.measurement import (
    READING,
    Measurement,
    Row,
    Settings,
    flat,
    met,
    verdicts,
    with_interval,
    with_load,
)
from bisam.experiments.measurements.timing import interleaved, ratio, threads
from bisam.experiments.studies.papers import BISAM, Exhibit
from bisam.objectives import LowerBound

Loss = Callable[[Tensor, Tensor], Tensor]


def row_by_row(bound: LowerBound, logits: Tensor, labels: Tensor) -> Tensor:
    """The loss of the authors' public code: a Python loop over the batch that shifts each row by its label's logit."""
    margins = logits.clone()
    for i, label in enumerate(labels.tolist()):
        margins[i].sub_(margins[i, label].clone())
    mu = cast(float, bound.mu)  # no schedule
    return torch.logsumexp(mu * bound.phi(margins), 1) / mu


_NEG_LOG, _TANH = NegLog(), Tanh()
_smoothed = partial(F.cross_entropy, label_smoothing=0.1, reduction="none")
_PLAIN, _USED = "cross-entropy", "cross-entropy as SAM climbs it in training"
# Each a function with its own code object: the compiler caches by code object.
LOSSES: dict[str, Loss] = {
    _PLAIN: lambda logits, labels: F.cross_entropy(logits, labels),
    _USED: lambda logits, labels: _smoothed(logits, labels).mean(),
    "BiSAM (-log)": lambda logits, labels: _NEG_LOG(logits, labels).mean(),
    "BiSAM (tanh)": lambda logits, labels: _TANH(logits, labels).mean(),
    "BiSAM (-log), row by row": lambda logits, labels: row_by_row(_NEG_LOG, logits, labels).mean(),
    "BiSAM (tanh), row by row": lambda logits, labels: row_by_row(_TANH, logits, labels).mean(),
}
_MODES = ("eager", "compiled")
_FRAMEWORKS = ("torch", "tensorflow")
_LOSS_BAR = 1.0
_BARRED = ("BiSAM (-log)", "BiSAM (tanh)")


def _loss_parts(settings: Settings) -> list[str]:
    for classes in settings["classes"]:
        if classes < 2:
            raise ValueError(f"setting classes must be at least 2, got {classes}")
    for mode in settings["modes"]:
        if mode not in _MODES:
            raise unknown("mode", mode, _MODES)
    for framework in settings["frameworks"]:
        if framework not in _FRAMEWORKS:
            raise unknown("framework", framework, _FRAMEWORKS)
    return [f"{classes}-{mode}" for classes in settings["classes"] for mode in settings["modes"]]


def _measure_loss(part: str, settings: Settings, device: torch.device) -> list[dict[str, Any]]:
    classes, mode = part.split("-")
    n, compiled = settings["batch_size"], mode == "compiled"
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(n, int(classes), generator=random).to(device).requires_grad_()
    labels = torch.randint(int(classes), (n,), generator=random).to(device)

    contestants: dict[tuple[str, str], Callable[[], Any]] = {}
    with threads(settings["threads"]):
        if "torch" in settings["frameworks"]:
            contestants |= {("torch", k): call for k, call in _torch_gradients(logits, labels, compiled).items()}
        if "tensorflow" in settings["frameworks"]:
            # Not at the top: TensorFlow is an extra of its own.
            from bisam.experiments.measurements.tensorflow_losses import gradients

            if device.type != "cpu":
                raise ValueError("TensorFlow is timed on the CPU: leave --device out, or give --set frameworks=torch")
            names = (_PLAIN, _USED, *_BARRED)
            made = gradients(logits, labels, names, compiled=compiled, threads=settings["threads"])
            contestants |= {("tensorflow", k): call for k, call in made.items()}
        try:
            times = interleaved({" ".join(k): call for k, call in contestants.items()}, settings["rounds"], device)
        except RuntimeError as error:
            if not compiled:
                raise
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(f"the losses cannot be compiled here ({reason}): give --set modes=eager") from error
    shared = {"classes": int(classes), "batch_size": n, "mode": mode, "rounds": settings["rounds"]}
    return [
        {
            **shared,
            "framework": framework,
            "version": import_module(framework).__version__,
            "loss": name,
            "seconds": ratio(times, f"{framework} {name}", f"{framework} {_PLAIN}").seconds,
            **flat("to_plain", ratio(times, f"{framework} {name}", f"{framework} {_PLAIN}")),
            **flat("to_used", ratio(times, f"{framework} {name}", f"{framework} {_USED}")),
            **with_load(times.load),
        }
        for framework, name in contestants
    ]


def _torch_gradients(logits: Tensor, labels: Tensor, compiled: bool) -> dict[str, Callable[[], Tensor]]:
    def gradient(loss: Loss) -> Tensor:
        return torch.autograd.grad(loss(logits, labels), logits)[0]

    losses = LOSSES
    if compiled:
        torch.compiler.reset()
        # Without the loops, which would be unrolled for these labels only.
        losses = {k: torch.compile(loss, dynamic=False) for k, loss in LOSSES.items() if "row by row" not in k}
    return {k: partial(gradient, loss) for k, loss in losses.items()}


def _framework(row: Row) -> str:
    """The version too, unless it is that of torch, which stands below the table."""
    framework = row.get("framework", "torch")  # older rows have none
    return framework if framework == "torch" else f"{framework} {row['version']}"


def _against(row: Row, key: str) -> str:
    ours = row.get("framework", "torch") == "torch" and row["loss"] in _BARRED
    verdict = f", {met(row, key, _LOSS_BAR)}" if ours else ""
    return with_interval(row, key, 2) + verdict


def _answer(rows: list[Row]) -> str:
    ours = [row for row in rows if row.get("framework", "torch") == "torch" and row["loss"] in _BARRED]
    if not ours:
        return "No bound of BiSAM is measured in torch yet, and the bar is for these."
    said: list[str] = []
    for key, name in (("to_used", "the ascent loss of SAM in training"), ("to_plain", "plain cross-entropy")):
        ratios = [row[key] for row in ours]
        results = verdicts([met(row, key, _LOSS_BAR) for row in ours])
        said.append(f"{min(ratios):.2f} to {max(ratios):.2f} times as long as {name} (bar {_LOSS_BAR:g}: {results})")
    return f"In torch the bounds of BiSAM take {' and '.join(said)}."


TABLE_12 = Measurement(
    name="table12",
    title="Time of an ascent loss, relative to cross-entropy",
    note=(
        "Forward and backward pass of the mean loss of a batch of random logits. The losses take turns within each "
        "round; a ratio is that to `F.cross_entropy(logits, labels)`, or to the ascent loss of SAM in the training "
        "loop, which is the mean of per-example cross-entropies with label "
        f"smoothing 0.1, both in the same framework and mode: the median over the rounds, {READING}. "
        f"The bar for BiSAM is {_LOSS_BAR:g}. Row by row is the "
        "loop over the batch of the authors' public code; it is not compiled. Published for 100 classes and 10,000 "
        "repetitions: 3.96 s against 2.40 s of cross-entropy in PyTorch (1.65) and 2.34 s against 3.25 s in TensorFlow "
        "(0.72) (Xie et al., 2024, Appendix B). `--set frameworks=torch,tensorflow` (extra `tensorflow`) times the "
        "same losses in TensorFlow, eagerly and compiled with XLA (`tf.function(jit_compile=True)`), in the same "
        "rounds."
    ),
    exhibit=Exhibit(BISAM, "Table 12"),
    settings={
        "classes": (100, 10),
        "batch_size": 128,
        "modes": _MODES,
        "rounds": 201,
        "threads": 1,
        "frameworks": ("torch",),
    },
    parts=_loss_parts,
    measure=_measure_loss,
    answer=_answer,
    columns={
        "classes": lambda row: str(row["classes"]),
        "mode": lambda row: row["mode"],
        "framework": _framework,
        "loss": lambda row: row["loss"],
        "µs": lambda row: f"{1e6 * row['seconds']:.3g}",
        "to cross-entropy": lambda row: _against(row, "to_plain"),
        "to SAM's ascent loss": lambda row: _against(row, "to_used"),
    },
    timed=True,
)
