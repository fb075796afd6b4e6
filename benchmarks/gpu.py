"""All tables of a GPU in one unattended run: step times, launches, waits, CUDA graphs, memory, float16, NCCL.

Each table is for three networks (ResNet-50, ViT-B/16, a GPT with the width and depth of GPT-2 small) in bfloat16, with
the same implementations as `benchmarks.step`. What fails is a line of its table and ends nothing else. A run takes less
than 12 minutes on a recent GPU: the rounds of a table end when its share of the time is over.

    python -m benchmarks.gpu --to gpu.md
    python -m benchmarks.gpu --dry-run --to gpu.md        # tiny networks on the CPU: shows that all tables are written
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from benchmarks.measure import environment, interleaved, interval, ratio
from benchmarks.models import mlp
from benchmarks.step import CONTESTANTS, LIMIT, RHO, SGD, Loss, Training
from bisam import SAM, BiSAM, SharpnessAware, cross_entropy
from bisam.experiments.models.gpt import GPT
from bisam.experiments.runs.files import write
from bisam.methods import Method

MINUTES = 12
"""The time that a run may take."""

Table = tuple[str, Sequence[str], Sequence[Sequence[str]]]
"""A title, the heading and the rows."""


class Autocast(nn.Module):
    """A network whose forward pass is in bfloat16, and its logits in float32."""

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.network, self.kind = network, device.type

    def forward(self, x: Tensor) -> Tensor:
        """Returns the logits."""
        with torch.autocast(self.kind, torch.bfloat16):
            return self.network(x).float()


@dataclass(frozen=True)
class Case:
    """A network and its batch."""

    model: Callable[[], nn.Module]
    batch: Callable[[torch.device], tuple[Tensor, Tensor]]


def images(n: int, size: int, classes: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random images and labels."""
    return torch.randn(n, 3, size, size, device=device), torch.randint(classes, (n,), device=device)


def texts(n: int, length: int, vocabulary: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random tokens and labels."""
    return tuple(torch.randint(vocabulary, (n, length), device=device) for _ in range(2))  # pyright: ignore


def vision(name: str) -> nn.Module:
    """A network of torchvision with random weights."""
    from torchvision import models

    return getattr(models, name)()


CASES: Mapping[str, Case] = {
    "ResNet-50, 64 images": Case(partial(vision, "resnet50"), partial(images, 64, 224, 1000)),
    "ViT-B/16, 64 images": Case(partial(vision, "vit_b_16"), partial(images, 64, 224, 1000)),
    "GPT, 12 blocks of width 768, 8 x 512 tokens": Case(
        partial(GPT, 50257, width=768, depth=12, heads=12), partial(texts, 8, 512, 50257)
    ),
}
TINY: Mapping[str, Case] = {
    "convolution, 2 images": Case(
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 5)),
        partial(images, 2, 8, 5),
    ),
    "GPT, 2 x 6 tokens": Case(partial(GPT, 11, width=8, depth=1, heads=2), partial(texts, 2, 6, 11)),
}
"""The cases of a dry run."""


@dataclass
class Bench:
    """The device and the networks of all tables, and the time that each may take.

    Attributes:
        device: the GPU, or the CPU in a dry run.
        cases: the networks.
        seconds: time that a table may take for a network.
        rounds: most rounds of a table.
    """

    device: torch.device
    cases: Mapping[str, Case]
    seconds: float
    rounds: int

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"

    def model(self, case: Case) -> nn.Module:
        """A network on the device, in bfloat16."""
        torch.manual_seed(0)
        model = case.model()
        return Autocast(model, self.device).to(self.device).train()

    def step(self, make: Callable[[nn.Module, Loss], Training], case: Case) -> Callable[[], Any]:
        """A training step of an implementation on a network of its own."""
        return partial(make(self.model(case), F.cross_entropy).step, *case.batch(self.device))

    def ratios(self, steps: Mapping[str, Callable[[], Any]], reference: str) -> dict[str, list[str]]:
        """The cells of the ratio and its interval, by name."""
        start = perf_counter()
        for step in steps.values():
            step()
        self.wait()
        start = perf_counter()
        for step in steps.values():
            step()
        self.wait()
        one = perf_counter() - start
        times = interleaved(steps, max(2, min(self.rounds, int(self.seconds / max(one, 1e-3)))), self.device)
        found = {name: ratio(times, name, reference) for name in steps}
        return {
            name: [f"{r.seconds * 1e3:.2f}", f"{r.median:.3f}", interval(vars(r)), str(r.rounds)]
            for name, r in found.items()
        }

    def wait(self) -> None:
        """Waits for the device."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)


def _each(bench: Bench, row: Callable[[str, Case], Sequence[Sequence[str]]], width: int) -> list[Sequence[str]]:
    """The rows of all networks; one that fails is a row with its error."""
    rows: list[Sequence[str]] = []
    for name, case in bench.cases.items():
        try:
            rows += row(name, case)
        except Exception as error:  # an unattended run goes on
            told = " ".join(str(error).split())[:120].replace("|", "/")
            rows.append([name, f"failed: {type(error).__name__}: {told}"] + [""] * width)
        if bench.on_gpu:
            torch.cuda.empty_cache()
    return rows


_TIMES = ("network", "implementation", "ms", "ratio to the limit", "95 % interval", "rounds")


def _times(bench: Bench) -> list[Sequence[str]]:
    """The step times of all implementations."""

    def rows(name: str, case: Case) -> list[list[str]]:
        cells = bench.ratios({key: bench.step(make, case) for key, make in CONTESTANTS.items()}, LIMIT)
        return [[name, key, *cells[key]] for key in cells]

    return _each(bench, rows, 4)


def times(bench: Bench) -> Table:
    """Step times of all implementations."""
    return "Step time in bfloat16", _TIMES, _times(bench)


def launches(bench: Bench) -> Table:
    """Kernel launches of a step, and operations of the host that wait for the device."""

    def rows(name: str, case: Case) -> list[list[str]]:
        found: list[list[str]] = []
        for key, make in CONTESTANTS.items():
            step = bench.step(make, case)
            for _ in range(3):
                step()
            bench.wait()
            kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if bench.on_gpu else [])]
            with profile(activities=kinds) as seen:
                step()
            events = {event.key: event.count for event in seen.key_averages()}
            kernels = sum(n for event, n in events.items() if "LaunchKernel" in event)
            operations = sum(n for event, n in events.items() if event.startswith("aten::"))
            found.append([name, key, str(kernels) if bench.on_gpu else "–", str(operations), _waits(bench, step)])
        return found

    heading = ("network", "implementation", "launches", "operations", "waits for the device")
    return "Launches and waits of a step", heading, _each(bench, rows, 3)


def _waits(bench: Bench, step: Callable[[], Any]) -> str:
    """How often a step waits for the device, as torch reports it."""
    if not bench.on_gpu:
        return "–"
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return str(sum("synchroniz" in str(w.message) for w in seen))


def memory(bench: Bench) -> Table:
    """Peaks of allocated memory."""

    def rows(name: str, case: Case) -> list[list[str]]:
        peaks: dict[str, float] = {}
        for key, make in CONTESTANTS.items():
            step = bench.step(make, case)
            for _ in range(2):
                step()
            bench.wait()
            if bench.on_gpu:
                torch.cuda.reset_peak_memory_stats(bench.device)
                step()
                bench.wait()
                peaks[key] = torch.cuda.max_memory_allocated(bench.device) / 2**20
            del step
        return [
            [name, key, *([f"{peaks[key]:.0f}", f"{peaks[key] / peaks[LIMIT]:.3f}"] if peaks else ["–", "–"])]
            for key in CONTESTANTS
        ]

    return "Peak memory of a step", ("network", "implementation", "MiB", "ratio to the limit"), _each(bench, rows, 2)


METHODS: Mapping[str, Method] = {"SAM": SAM(RHO), "BiSAM (-log)": BiSAM(RHO)}


def graphs(bench: Bench) -> Table:
    """A whole step as a CUDA graph, against the same step in eager mode."""

    def rows(name: str, case: Case) -> list[list[str]]:
        found: list[list[str]] = []
        for key, method in METHODS.items():
            if not bench.on_gpu:
                found.append([name, key, *["–"] * 4])
                continue
            sharp = SharpnessAware(bench.model(case), method, cross_entropy)
            optimizer, batch = SGD(sharp.parameters()), case.batch(bench.device)

            def step(
                sharp: nn.Module = sharp,
                optimizer: torch.optim.Optimizer = optimizer,
                batch: tuple[Tensor, Tensor] = batch,
            ) -> None:
                optimizer.zero_grad(set_to_none=False)
                sharp(*batch).backward()
                optimizer.step()

            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    step()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
            cells = bench.ratios({"eager": step, "graph": graph.replay}, "eager")
            found.append([name, key, *cells["graph"]])
        return found

    heading = ("network", "method", "ms", "ratio to eager mode", "95 % interval", "rounds")
    return "A step as one CUDA graph", heading, _each(bench, rows, 4)


def scaled(bench: Bench) -> Table:
    """float16 with a GradScaler: its time, and a step that overflows."""

    def rows(name: str, case: Case) -> list[list[str]]:
        model, (x, y) = case.model().to(bench.device).train(), case.batch(bench.device)
        scaler = torch.amp.GradScaler(bench.device.type, init_scale=2.0**10)
        sharp = SharpnessAware(model, SAM(RHO), cross_entropy, scaler=scaler)
        optimizer = SGD(model.parameters())

        def step() -> None:
            optimizer.zero_grad()
            with torch.autocast(bench.device.type, torch.float16):
                loss = sharp(x, y)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()

        for _ in range(3):
            step()
        before = [p.detach().clone() for p in model.parameters()]
        scaler.update(2.0**120)
        step()
        same = all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        smaller = scaler.get_scale() < 2.0**120
        scaler.update(2.0**10)
        start = perf_counter()
        step()
        bench.wait()
        milliseconds = f"{(perf_counter() - start) * 1e3:.2f}"
        return [[name, milliseconds, "yes" if same else "no", "yes" if smaller else "no"]]

    heading = ("network", "ms", "an overflow leaves the weights unchanged", "and lowers the scale")
    return "SAM in float16 with a GradScaler", heading, _each(bench, rows, 2)


def one_device(bench: Bench) -> Table:
    """DistributedDataParallel over NCCL (gloo in a dry run) with a single process."""

    def rows(name: str, case: Case) -> list[list[str]]:
        def training(nesting: str) -> Callable[[], Any]:
            model: nn.Module = bench.model(case)
            if nesting == "inside":
                model = DistributedDataParallel(model)
            sharp: nn.Module = SharpnessAware(model, SAM(RHO), cross_entropy)
            if nesting == "outside":
                sharp = DistributedDataParallel(sharp)
            optimizer, batch = SGD(sharp.parameters()), case.batch(bench.device)

            def step() -> None:
                sharp(*batch).backward()
                optimizer.step()
                optimizer.zero_grad()

            return step

        cells = bench.ratios({nesting: training(nesting) for nesting in ("without", "inside", "outside")}, "without")
        return [[name, nesting, *cells[nesting]] for nesting in cells]

    with _group(bench):
        found = _each(bench, rows, 4)
    heading = ("network", "DistributedDataParallel", "ms", "ratio to none", "95 % interval", "rounds")
    return f"SAM on one device of {'NCCL' if bench.on_gpu else 'gloo'}", heading, found


@contextmanager
def _group(bench: Bench) -> Generator[None]:
    """A context with a process group of this process alone."""
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(
            "nccl" if bench.on_gpu else "gloo", init_method=f"file://{folder}/store", rank=0, world_size=1
        )
        try:
            yield
        finally:
            dist.destroy_process_group()


def small(bench: Bench) -> Table:
    """86 small layers, where a step is bound by launches."""
    layers = 86 if bench.on_gpu else 3
    case = Case(partial(mlp, layers), lambda device: (torch.randn(32, 16).to(device), torch.arange(32).to(device) % 16))
    cases = {f"{layers} x Linear(16, 16), 32 examples": case}
    return "Many small layers", _TIMES, _times(replace(bench, cases=cases))


TABLES: Sequence[Callable[[Bench], Table]] = (times, small, launches, memory, graphs, scaled, one_device)


def page(bench: Bench, say: Callable[[str], None]) -> str:
    """The page of all tables."""
    made = ", ".join(f"{key} {value}" for key, value in environment().items() if value is not None)
    gpu = f"GPU {torch.cuda.get_device_name(bench.device)}, CUDA {torch.version.cuda}, " if bench.on_gpu else ""
    lines = ["# Benchmarks on a GPU", "", "`python -m benchmarks.gpu` writes this page."]
    if not bench.on_gpu:
        lines += ["", "**A dry run with tiny networks on a CPU: its numbers mean nothing.**"]
    for make in TABLES:
        start = perf_counter()
        title, heading, rows = make(bench)
        say(f"{title}: {perf_counter() - start:.0f} s")
        lines += ["", f"## {title}", ""]
        lines += [f"| {' | '.join(cells)} |" for cells in (heading, ["---"] * len(heading), *rows)]
    return "\n".join([*lines, "", f"{gpu}{made}.", ""])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--to", type=Path, required=True, metavar="PAGE.md", help="Markdown file to write")
    parser.add_argument("--dry-run", action="store_true", help="tiny networks on the CPU, two rounds")
    arguments = parser.parse_args(argv)
    if not (arguments.dry_run or torch.cuda.is_available()):
        parser.exit(2, f"{parser.prog}: there is no CUDA device here; --dry-run shows the tables on a CPU\n")
    if not arguments.to.parent.is_dir() or not os.access(arguments.to.parent, os.W_OK) or arguments.to.is_dir():
        parser.exit(2, f"{parser.prog}: --to {arguments.to} is no file in a folder that can be written\n")
    if arguments.dry_run:
        bench = Bench(torch.device("cpu"), TINY, 0.0, 2)
    else:
        # Half of the time for rounds: the other half makes networks and warms them up.
        bench = Bench(torch.device("cuda"), CASES, MINUTES * 60 / 2 / (len(CASES) * len(TABLES)), 61)
    write(arguments.to, page(bench, partial(print, file=sys.stderr)))


if __name__ == "__main__":
    main()
