"""Time of a sharpness-aware step relative to its limit, its memory, and the size of its checkpoints.

The limit is the work that every such step needs: two forward-backward passes and one step of the base optimizer.

    python -m benchmarks.step
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytorch_optimizer
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.measure import (
    Parser,
    Ratio,
    bracketed,
    interleaved,
    interval,
    judged,
    load,
    ratio,
    report,
    verdict,
    write,
)
from benchmarks.models import batch_for, mlp, resnet56
from bisam import ASAM, ESAM, SAM, SAMON, BiSAM, Only, SharpnessAware, cross_entropy
from bisam.experiments.runs.machine import keep_freed_memory
from bisam.masks import RandomMask
from bisam.methods import Method

LIMIT = "limit"
RHO = 0.05
SGD = partial(torch.optim.SGD, lr=1e-3, momentum=0.9)

Loss = Callable[[Tensor, Tensor], Tensor]
Step = Callable[[Tensor, Tensor], Any]


@dataclass
class Training:
    """A model in training: its step, which clears the gradients, and the checkpoint content besides the model."""

    step: Step
    checkpoint: Callable[[], Any]


def limit(model: nn.Module, loss: Loss) -> Training:
    base = SGD(model.parameters())

    def step(x: Tensor, y: Tensor) -> None:
        loss(model(x), y).backward()
        base.zero_grad()
        loss(model(x), y).backward()
        base.step()
        base.zero_grad()

    return Training(step, base.state_dict)


def ours(method: Method, model: nn.Module, loss: Loss, *, stats: bool = False) -> Training:
    # Each library gets the loss of its documentation: one per example in bisam, F.cross_entropy elsewhere.
    sharp = SharpnessAware(model, method, loss=cross_entropy if loss is F.cross_entropy else loss, stats=stats)
    base = SGD(model.parameters())

    def step(x: Tensor, y: Tensor) -> None:
        sharp(x, y).backward()
        base.step()
        base.zero_grad()

    return Training(step, lambda: {"base": base.state_dict(), "sharp": sharp.get_extra_state()})


def peer(model: nn.Module, loss: Loss) -> Training:
    optimizer = pytorch_optimizer.SAM(model.parameters(), torch.optim.SGD, rho=RHO, lr=1e-3, momentum=0.9)

    def step(x: Tensor, y: Tensor) -> None:
        loss(model(x), y).backward()
        optimizer.first_step(zero_grad=True)
        loss(model(x), y).backward()
        optimizer.second_step(zero_grad=True)

    return Training(step, optimizer.state_dict)


def two_steps(model: nn.Module, loss: Loss) -> Training:
    """The loop that most repositories share, tensor by tensor. Its optimizer keeps and saves the old weights."""
    base = SGD(model.parameters())
    old: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def climb() -> None:
        parameters = [p for p in model.parameters() if p.grad is not None]
        norm = torch.norm(torch.stack([p.grad.norm(p=2) for p in parameters]), p=2)
        scale = RHO / (norm + 1e-12)
        for p in parameters:
            old[p] = p.data.clone()
            e_w = p.grad * scale
            p.add_(e_w)

    @torch.no_grad()
    def descend() -> None:
        for p in model.parameters():
            if p.grad is not None:
                p.data = old[p]
        base.step()

    def step(x: Tensor, y: Tensor) -> None:
        loss(model(x), y).backward()
        climb()
        base.zero_grad()
        loss(model(x), y).backward()
        descend()
        base.zero_grad()

    return Training(step, lambda: {"base": base.state_dict(), "old": list(old.values())})


CONTESTANTS: dict[str, Callable[[nn.Module, Loss], Training]] = {
    LIMIT: limit,
    "bisam SAM": partial(ours, SAM()),
    "bisam BiSAM (-log)": partial(ours, BiSAM(RHO)),
    "bisam ASAM": partial(ours, ASAM(RHO)),
    "pytorch_optimizer SAM": peer,
    "two-step loop": two_steps,
}


WITH_STATS = {"bisam SAM, stats": partial(ours, SAM(), stats=True)}
"""A step that also records its statistics; its time is compared with SAM's."""


def compiled(make: Callable[[nn.Module, Loss], Training], model: nn.Module, loss: Loss) -> Training:
    """An implementation on a compiled model."""
    model.compile(dynamic=False)
    return make(model, loss)


COMPILED: dict[str, Callable[[nn.Module, Loss], Training]] = {
    f"{name}, compiled": partial(compiled, CONTESTANTS[name])
    for name in (LIMIT, "bisam SAM", "bisam BiSAM (-log)", "bisam ASAM")
}
"""Both passes run the compiled model; the vector arithmetic between them is eager."""

OF_A_PART: dict[str, Method] = {
    "bisam SAM, half of the tensors": SAM(RandomMask(RHO, beta=0.5)),
    "bisam ESAM": ESAM(RandomMask(RHO, beta=0.5), gamma=0.5),
}
"""Methods whose first gradient is that of a part of the weights; their time is compared with SAM's."""

TOP = {"bisam SAM, last layer": SAM(Only(lambda name, p: name.startswith("170."), RHO))}


@dataclass(frozen=True)
class Case:
    """A model, its batch size, the bar for a step of bisam's SAM, and methods of `OF_A_PART` for this model."""

    model: Callable[[], nn.Module]
    n: int
    bar: float
    of_a_part: dict[str, Method]

    @property
    def contestants(self) -> dict[str, Callable[[nn.Module, Loss], Training]]:
        """All implementations that are timed."""
        of_a_part = {name: partial(ours, method) for name, method in (OF_A_PART | self.of_a_part).items()}
        return CONTESTANTS | WITH_STATS | of_a_part


CASES = {
    "resnet56": Case(resnet56, 32, 1.03, {"bisam SAM-ON": SAMON(RHO)}),
    "mlp-32": Case(mlp, 32, 1.20, TOP),
    "mlp-128": Case(mlp, 128, 1.20, TOP),
}


def speed(case: Case, repeats: int, *, compile: bool = False) -> list[dict[str, Any]]:
    """One row per implementation, also with compiled models if asked for."""
    torch.manual_seed(0)
    model = case.model()
    x, y = batch_for(model, case.n)
    contestants = case.contestants | (COMPILED if compile else {})
    steps = {
        name: partial(make(copy.deepcopy(model), F.cross_entropy).step, x, y) for name, make in contestants.items()
    }
    times = interleaved(steps, repeats)
    rows: list[dict[str, Any]] = []
    for name in contestants:
        r: Ratio = ratio(times, name, LIMIT)
        bar = case.bar if name == "bisam SAM" else None
        compared = name not in (LIMIT, "bisam SAM", *COMPILED)
        to_sam = ratio(times, name, "bisam SAM") if compared else None
        row = {"contestant": name, **judged(r, bar), "ratio_to_sam": None if to_sam is None else to_sam.median}
        if to_sam is not None:
            row |= {"to_sam_low": to_sam.median_low, "to_sam_high": to_sam.median_high}
        rows.append(row)
    return rows


def to_sam(row: Mapping[str, Any]) -> str:
    """The time of a row relative to SAM's, with the interval; older rows have none."""
    if (found := row.get("ratio_to_sam")) is None:
        return ""
    if "to_sam_low" not in row:
        return f"{found:.3f}"
    return f"{found:.3f} {bracketed(row['to_sam_low'], row['to_sam_high'])}"


@dataclass
class Storages(TorchDispatchMode):
    """Live storages of at least `least` bytes that were created inside the context or added by `add`, and their bytes.

    Attributes:
        least: bytes of a storage that counts.
        peak: the most bytes that were alive at once since `restart`.
    """

    least: int = 0
    peak: int = 0
    seen: dict[int, tuple[StorageWeakRef, int]] = field(default_factory=dict)
    bound: int = 0  # on the bytes that are alive: those of storages that have died since the last look count in it

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            self.add(t)
        if self.bound > self.peak:
            self.peak = max(self.peak, self.nbytes())
        return out

    def add(self, t: Any) -> None:
        if isinstance(t, Tensor) and (size := t.untyped_storage().nbytes()) >= self.least:
            ref = StorageWeakRef(t.untyped_storage())
            if ref.cdata not in self.seen:
                self.seen[ref.cdata] = ref, size
                self.bound += size

    def alive(self) -> int:
        self.seen = {key: found for key, found in self.seen.items() if not found[0].expired()}
        return len(self.seen)

    def nbytes(self) -> int:
        self.alive()
        self.bound = sum(size for _, size in self.seen.values())
        return self.bound

    def restart(self) -> None:
        self.peak = self.nbytes()


def memory(make: Callable[[nn.Module, Loss], Training], width: int = 512) -> dict[str, int]:
    """Weight-sized storages at the second loss and after the step, including the weights themselves.

    The momentum of the base optimizer is not counted: it is the same for all implementations, and does not exist before
    the first step ends.
    """
    torch.manual_seed(0)
    model = nn.Linear(width, width, bias=False)
    x, y = torch.randn(4, width), torch.randint(width, (4,))
    at_loss: list[int] = []
    storages = Storages(least=model.weight.nbytes)
    storages.add(model.weight)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        at_loss.append(storages.alive())
        return F.cross_entropy(outputs, targets)

    training = make(model, loss)
    with storages:
        training.step(x, y)
    momentum = 1
    return {"at_second_loss": at_loss[-1], "between_steps": storages.alive() - momentum}


def saved_bytes(content: Any) -> int:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.tell()


def sizes(make: Callable[[nn.Module, Loss], Training], width: int = 512) -> int:
    """Bytes of a checkpoint without the model."""
    torch.manual_seed(0)
    model = nn.Linear(width, width, bias=False)
    training = make(model, F.cross_entropy)
    training.step(torch.randn(4, width), torch.randint(width, (4,)))
    return saved_bytes(training.checkpoint())


def footprints() -> list[dict[str, Any]]:
    """Memory and checkpoint size, one row per implementation."""
    base = sizes(limit)
    rows: list[dict[str, Any]] = []
    for name, make in (CONTESTANTS | WITH_STATS).items():
        row: dict[str, Any] = {"contestant": name, **memory(make), "checkpoint_bytes": sizes(make)}
        row["checkpoint_ratio"] = row["checkpoint_bytes"] / base
        bar = 3 if name in WITH_STATS else 2  # the ascent gradient is kept for the cosine
        row["passed"] = row["at_second_loss"] <= bar and row["between_steps"] <= 1 if name.startswith("bisam") else None
        rows.append(row)
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(
        "benchmarks.step",
        "Time of a training step relative to two forward-backward passes and one step of SGD with momentum; memory and "
        "checkpoint size.",
        "  python -m benchmarks.step\n"
        "  python -m benchmarks.step --models mlp-32 mlp-128 --repeats 101 --json step.json",
        repeats=31,
    )
    parser.add_argument("--models", nargs="+", choices=list(CASES), default=list(CASES), help="default: all")
    parser.add_argument(
        "--keep-memory",
        action="store_true",
        help="make glibc keep freed memory, to avoid the page faults of returning and requesting it",
    )
    parser.add_argument("--compile", action="store_true", help="also with torch.compile, which takes minutes at first")
    arguments = parser.parse_args(argv)
    if arguments.keep_memory and not keep_freed_memory():
        parser.error("argument --keep-memory: the C library is not glibc")
    parser.begin(arguments.threads)

    rows: list[dict[str, Any]] = []
    for name in arguments.models:
        case = CASES[name]
        measured = speed(case, arguments.repeats, compile=arguments.compile)
        own = [{"model": name, "batch": case.n, **row} for row in measured]
        rows += own
        report(
            f"Step time relative to the limit: {name}, batch {case.n}",
            {
                "implementation": lambda r: r["contestant"],
                "time": lambda r: f"{r['seconds'] * 1e3:.2f} ms",
                "ratio": lambda r: f"{r['median']:.3f}",
                "95 % interval": interval,
                "time / SAM's": to_sam,
                "verdict": verdict,
            },
            own,
            [load(own)],
        )
    footprint = footprints()
    report(
        "Live weight-sized storages, and checkpoint size relative to the base optimizer's",
        {
            "implementation": lambda r: r["contestant"],
            "at the second loss": lambda r: str(r["at_second_loss"]),
            "between steps": lambda r: str(r["between_steps"]),
            "checkpoint": lambda r: f"{r['checkpoint_ratio']:.3f}",
            "verdict": lambda r: "" if r["passed"] is None else "[green]pass[/]" if r["passed"] else "[red]fail[/]",
        },
        footprint,
        ["Bars: 2 at the second loss (3 with statistics) and 1 between steps. Momentum is not counted."],
    )
    if arguments.json:
        settings = {"repeats": arguments.repeats, "keep_memory": arguments.keep_memory}
        write(arguments.json, "step", settings, {"rows": rows, "footprint": footprint})


if __name__ == "__main__":
    main()
