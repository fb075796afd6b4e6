"""Files written by earlier versions load unchanged, and training resumes from them with the same result.

bisam 0.1.0 wrote `data/0.1`, see `data/0.1/make.py`. The files contain names of methods, of their fields and of the
entries of their state. These saved names stay valid even if the classes are renamed.

With the processor and the version of torch that wrote the files, a resumed run is compared bit for bit. Elsewhere torch
may round differently: float64 is then compared to 1e-12, float32 to 1e-5. What is loaded is always compared exactly.
"""

from __future__ import annotations

import csv
import importlib
import json
import pickle
import platform
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as checkpoint
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

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
    next_step,
)
from bisam.integrations.checkpoint import make_room
from bisam.masks import FisherMask, RandomMask
from bisam.perturbations import L2, Adaptive, Friendly, NormLayers, Smoothed, ZScore
from bisam.schedules import Cosine
from tests.support import cases

FILES = Path(__file__).parent / "data" / "0.1"
BEFORE, AFTER = 5, 4  # steps before the files were written, and from then to the weights that they are compared with


def processor() -> str:
    """The same function as in `data/0.1/make.py`."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        found = dict((part.strip() for part in line.split(":", 1)) for line in lines if ":" in line)
        name = f"{found['model name']}, family {found['cpu family']}, model {found['model']}"
    except (OSError, KeyError):
        name = platform.processor()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


MADE = json.loads((FILES / "made.json").read_text())
EXACT = {"torch": torch.__version__, "processor": processor()} == MADE


def same(ours: Any, theirs: Any, tolerance: float = 1e-12, exact: bool = EXACT) -> None:
    """Assert that tensors are equal: exactly on the platform that wrote the files, to a tolerance elsewhere."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0 if exact else tolerance)


def plain(value: Any) -> Any:
    """A value that `==` compares: tensors with type, shape and bits."""
    if isinstance(value, Tensor):
        return value.dtype, value.shape, cases.bits(value)
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, list | tuple) else value


# A loss and its optimizer.


class Network(nn.Module):
    """Two layers around a normalisation, and a parameter that the loss does not reach."""

    def __init__(self, norm: Callable[[int], nn.Module] = nn.BatchNorm1d) -> None:
        super().__init__()
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
    stateful: ClassVar[bool] = True

    def __call__(self, oracle: Oracle, batch: Any) -> Evaluation:
        answer = oracle.query(batch)
        g = answer.gradient
        oracle.state["g"] = g = g if "g" not in oracle.state else oracle.state["g"] * self.rate + g * (1 - self.rate)
        return replace(answer, grad=g)


@dataclass(frozen=True)
class Case:
    """A method, the name that its file has for its state, and how it is trained.

    `rounds`: the method climbs a bound, whose gradient is summed in another order than in the version of the file.
    `changed`: the method gives other results than in the version of the file.
    """

    saved: str | None
    method: Callable[[Optimizer], Any]
    optimizer: Callable[..., Optimizer] = SGD
    norm: Callable[[int], nn.Module] = nn.BatchNorm1d
    weighted: bool = False
    rounds: bool = False
    changed: bool = False

    def made(self) -> tuple[SharpnessAware, Optimizer]:
        model = Network(self.norm)
        optimizer = self.optimizer(model.parameters(), lr=0.1)
        loss = cross_entropy
        if self.weighted:
            loss = nn.CrossEntropyLoss(torch.zeros(3, dtype=torch.double), reduction="none")
        return SharpnessAware(model, self.method(optimizer), loss), optimizer


momentum = partial(SGD, momentum=0.9, weight_decay=5e-3)

CASES = {
    # Without a memory.
    "ERM": Case(None, lambda o: ERM(), momentum),
    "SAM-Cosine": Case(None, lambda o: SAM(L2(Cosine(0.3, 0.02, steps=8)))),
    "RAPP": Case(None, lambda o: RAPP(0.2)),
    "ExtraGradient": Case(None, lambda o: ExtraGradient(0.2)),
    # Methods that remember.
    "LookSAM": Case("LookSAM", lambda o: LookSAM(L2(0.1), k=3), momentum),
    "LookSAM-weighted": Case("LookSAM", lambda o: LookSAM(L2(0.1), NegLog(), k=3), weighted=True),
    "AESAM": Case("AESAM", lambda o: AESAM(L2(0.3), steps=12)),
    "SSAMF": Case("SSAMF", lambda o: SSAMF(L2(0.1), keep=0.5, every=4, samples=3), norm=nn.LayerNorm),
    "MomentumSAM": Case("MomentumSAM", lambda o: MomentumSAM(L2(0.1)), momentum),
    "SAMPa": Case("SAMPa", lambda o: SAMPa(L2(0.1), ahead=next_step(o)), momentum),
    "SAMPa-log": Case(
        "SAMPa(perturb=Friendly)",
        lambda o: SAMPa(Friendly(L2(0.1)), NegLog(), ahead=next_step(o), lam=0.5),
        AdamW,
        rounds=True,
    ),
    "BSAM": Case("BSAM", lambda o: BSAM(1000, 0.05)),
    "XSAM": Case("XSAM", lambda o: XSAM(L2(0.15), rho_max=0.3, every=4)),
    # Perturbations that remember.
    "FSAM": Case("SAM(perturb=Friendly)", lambda o: FSAM(0.1, lam=0.6)),
    "VaSSO": Case("SAM(perturb=Smoothed)", lambda o: VaSSO(0.1, theta=0.4)),
    "FisherSAM": Case("SAM(perturb=FisherMask)", lambda o: FisherSAM(0.1, keep=0.3, every=4)),
    "SSAMD": Case("SAM(perturb=DropGrow)", lambda o: SSAMD(0.1, keep=0.5, every=3)),
    # Nests of both.
    "KSAM": Case("KSAM(method=LookSAM)", lambda o: KSAM(2, LookSAM(L2(0.1), k=3))),
    "MSAM": Case("MSAM(method=LookSAM)", lambda o: MSAM(4, LookSAM(L2(0.1), k=2), separate=True)),
    "RSAM": Case("RSAM(method=SAM(perturb=Smoothed))", lambda o: RSAM(0.05, VaSSO(0.1))),
    "Every": Case(
        "Every(method=LookSAM, otherwise=SAM(perturb=Friendly))",
        lambda o: Every(2, LookSAM(L2(0.1), k=3), FSAM(0.1)),
    ),
    "During": Case(
        "During(method=LookSAM, otherwise=SAM(perturb=Smoothed))",
        lambda o: During(LookSAM(L2(0.1), k=3), start=2, stop=8, otherwise=VaSSO(0.1, theta=0.4)),
    ),
    "GSAM": Case("GSAM(perturb=Friendly)", lambda o: GSAM(Friendly(L2(0.1)), alpha=0.4)),
    "WSAM": Case(
        "WSAM(perturb=NormLayers(perturb=Smoothed))",
        lambda o: WSAM(NormLayers(Smoothed(L2(0.1), theta=0.4)), gamma=0.8),
    ),
    "CRSAM": Case("CRSAM(perturb=ZScore(perturb=Friendly))", lambda o: CRSAM(ZScore(Friendly(L2(0.1)), keep=0.5))),
    "FunctionalSAM": Case(
        "FunctionalSAM(perturb=FisherMask)", lambda o: FunctionalSAM(FisherMask(L2(0.1), keep=0.3, every=4))
    ),
    "MultiStepSAM": Case("MultiStepSAM(perturb=Friendly)", lambda o: MultiStepSAM(Friendly(L2(0.1)), steps=2)),
    "ESAM": Case(
        "ESAM(perturb=RandomMask(perturb=Friendly))",
        lambda o: ESAM(RandomMask(Friendly(L2(0.1)), beta=0.6), gamma=0.5),
        changed=True,  # it selects the examples above the threshold, without the one at it
    ),
    "nest": Case(
        "KSAM(method=SAM(perturb=RandomMask(perturb=Smoothed(perturb=Friendly))))",
        lambda o: KSAM(6, SAM(RandomMask(Smoothed(Friendly(Adaptive(0.5, 0.01)), theta=0.4)), Tanh())),
        rounds=True,
    ),
    "user": Case("KSAM(method=Mine)", lambda o: KSAM(6, Mine())),
}
STATEFUL = [name for name, case in CASES.items() if case.saved]
each_state = pytest.mark.parametrize("name", CASES)


def saved_as(name: str) -> dict[str, Any]:
    return torch.load(FILES / "states" / f"{name}.pt", weights_only=True)


def steps(sharp: SharpnessAware, optimizer: Optimizer, count: int = AFTER) -> None:
    """The steps that `make.py` took after it wrote the file."""
    data = torch.load(FILES / "states" / "batches.pt", weights_only=True)
    for i in range(BEFORE, BEFORE + count):
        torch.manual_seed(100 + i)
        optimizer.zero_grad()
        sharp(data["x"][i], data["y"][i]).backward()
        optimizer.step()


def flat(model: nn.Module) -> Tensor:
    """Weights and running statistics as one vector."""
    return torch.cat([t.detach().double().flatten() for t in model.state_dict().values()])


def test_each_case_has_its_file():
    assert {path.stem for path in (FILES / "states").iterdir()} == {*CASES, "batches"}


@each_state
def test_a_state_is_loaded_as_it_was_saved(name):
    saved, (sharp, optimizer) = saved_as(name), CASES[name].made()
    sharp.load_state_dict(saved["sharp"])
    optimizer.load_state_dict(saved["optimizer"])
    assert plain(sharp.state_dict()) == plain(saved["sharp"])
    assert plain(optimizer.state_dict()["state"]) == plain(saved["optimizer"]["state"])
    extra = sharp.get_extra_state()
    assert (extra["step"], extra["method"]) == (BEFORE, CASES[name].saved)


@each_state
def test_training_resumes_from_a_state(name):
    saved, (sharp, optimizer) = saved_as(name), CASES[name].made()
    sharp.load_state_dict(saved["sharp"])
    optimizer.load_state_dict(saved["optimizer"])
    steps(sharp, optimizer)
    if CASES[name].changed:
        assert flat(sharp.model).isfinite().all()
    else:
        same(flat(sharp.model), saved["final"], exact=EXACT and not CASES[name].rounds)


@pytest.mark.parametrize("name", [*STATEFUL, "SAM-Cosine"])
def test_without_the_saved_memory_the_result_differs(name):
    """Otherwise the test above would show nothing."""
    saved, (sharp, optimizer) = saved_as(name), CASES[name].made()
    kept = {"step": BEFORE if CASES[name].saved else 0, "method": None, "state": {}}
    sharp.load_state_dict({**saved["sharp"], "_extra_state": kept})
    optimizer.load_state_dict(saved["optimizer"])
    steps(sharp, optimizer)
    assert (flat(sharp.model) - saved["final"]).abs().max() > 1e-6


@pytest.mark.parametrize("name", STATEFUL)
def test_a_state_of_another_method_is_refused_by_its_saved_name(name):
    other = "LookSAM" if name.startswith("BSAM") else "BSAM"
    sharp, _ = CASES[other].made()
    message = f"the memory of {CASES[name].saved}, and the method here is {other}"
    with pytest.raises(ValueError, match=re.escape(message)):
        sharp.set_extra_state(saved_as(name)["sharp"]["_extra_state"])


# Lookahead.


def test_a_lookahead_is_loaded_as_it_was_saved_and_resumes():
    saved, model = torch.load(FILES / "lookahead" / "state.pt", weights_only=True), Network()
    optimizer = Lookahead(Lookahead(momentum(model.parameters(), lr=0.1), 2, 0.7), 6, 0.4)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    assert plain(optimizer.state_dict()) == plain(saved["optimizer"])
    assert [part["count"] for part in optimizer.state_dict()["lookahead"]] == [5, 1]
    steps(SharpnessAware(model, ERM(), cross_entropy), optimizer)
    same(flat(model), saved["final"])


def test_a_pickled_lookahead_resumes(monkeypatch):
    """The pickle contains the module, the class and the attributes by the names of 0.1."""
    monkeypatch.delitem(sys.modules, "bisam.optimizers", raising=False)  # the first import warns
    with pytest.warns(DeprecationWarning, match="bisam.optimizers is now bisam.optim"):
        optimizer = pickle.loads((FILES / "lookahead" / "optimizer.pickle").read_bytes())
    assert isinstance(optimizer, Lookahead)
    assert optimizer.k == 3
    (weights,) = optimizer.param_groups[0]["params"]
    for _ in range(AFTER):
        weights.grad = weights.detach() - 1
        optimizer.step()
    same(weights.detach(), torch.load(FILES / "lookahead" / "final.pt", weights_only=True)["final"])


# torch.distributed.checkpoint and the Trainer.


@pytest.mark.filterwarnings("ignore:torch.distributed is")
@pytest.mark.parametrize("name", ["LookSAM", "SAMPa"])
def test_a_distributed_checkpoint_is_loaded_as_it_was_saved(name):
    sharp, optimizer = CASES[name].made()
    folder = FILES / "distributed" / "checkpoint"
    make_room(sharp, folder, key=name)
    state = {name: sharp.state_dict()}
    checkpoint.load(state, checkpoint_id=folder)
    sharp.load_state_dict(state[name])
    assert plain(sharp.state_dict()) == plain(saved_as(name)["sharp"])
    optimizer.load_state_dict(saved_as(name)["optimizer"])
    steps(sharp, optimizer)
    same(flat(sharp.model), saved_as(name)["final"])


class Classifier(Network):
    """The network as the Trainer wants it."""

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.layers(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def test_a_checkpoint_of_the_trainer_resumes(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    integration = importlib.import_module("bisam.integrations.transformers")
    folder = shutil.copytree(FILES / "trainer" / "checkpoint-5", tmp_path / "checkpoint-5")
    data = torch.load(FILES / "states" / "batches.pt", weights_only=True)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=8,
        max_steps=BEFORE + AFTER,
        save_strategy="no",
        learning_rate=0.1,
        optim="sgd",
        lr_scheduler_type="cosine",
        train_sampling_strategy="sequential",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = integration.SharpnessAwareTrainer(
        Classifier(),
        arguments,
        train_dataset=[
            {"x": x, "labels": y} for x, y in zip(data["x"].flatten(0, 1), data["y"].flatten(), strict=True)
        ],
        method=LookSAM(L2(0.1), k=3),
    )
    trainer.train(resume_from_checkpoint=str(folder))
    assert trainer.sharp.get_extra_state()["step"] == BEFORE + AFTER
    same(flat(trainer.model), torch.load(FILES / "trainer" / "final.pt", weights_only=True)["final"])


# Run folders.

EXPERIMENTS = FILES / "experiments"
FINISHED = sorted(path.parent for path in EXPERIMENTS.glob("*/*/seed-*/result.json"))
INTERRUPTED = sorted(path.parent for path in EXPERIMENTS.glob("*/*/seed-*/checkpoint.pt"))
TIMES = {"seconds", "relative_time", "seconds_per_epoch"}
WHERE = {"bisam", "torch", "python", "hardware", "commit", "finished"}


@pytest.fixture
def training():
    """The functions that read and train runs, or skip if their dependencies are not installed."""
    for name in ("cyclopts", "lightning_fabric", "sklearn"):
        pytest.importorskip(name)
    names = ("folder.Run", "folder.finished", "folder.read_recipe", "machine.Machine", "checkpoint.serialized")
    parts = [("runs." + module, name) for module, name in (n.split(".") for n in names)] + [
        ("training.train", "train"),
        ("errors", "RunError"),
    ]
    return SimpleNamespace(
        **{name: getattr(importlib.import_module(f"bisam.experiments.{module}"), name) for module, name in parts}
    )


def is_changed(folder: Path) -> bool:
    """Whether the second version of recipes gave another result: those of ESAM. The third one changed all."""
    return bool(re.search(r"\bE(Bi)?SAM\(", json.loads((folder / "recipe.json").read_text())["method"]))


def data_of_0_1(recipe: Any, _: Any) -> Any:
    """The split of digits before the third version of recipes: the same for every seed, and the first with a limit."""
    data, images, splits = (
        importlib.import_module(f"bisam.experiments.data{name}") for name in ("", ".image_tensors", ".splits")
    )
    pixels, classes = importlib.import_module("sklearn.datasets").load_digits(return_X_y=True)
    order = np.random.default_rng(42).permutation(1797)
    x, y = torch.from_numpy(pixels[order]).float().view(-1, 1, 8, 8), torch.from_numpy(classes[order]).long()
    x = (x - x[:1078].mean()) / x[:1078].std()
    ends = ((0, 1078), (1078, 1348), (1348, 1797))
    train, *others = (images.Images(x[a:b], y[a:b]).first(recipe.limit or 1797) for a, b in ends)
    noisy = data.symmetric_noise(train.labels, recipe.noise, 10, recipe.seed)
    return splits.Data(train.relabelled(noisy), *others, classes=10)


def of_version_3(training: Any, run: Any, root: Path) -> Any:
    """The same interrupted run, as if the third version of recipes had begun it: earlier ones are not trained."""
    latest = training.Run.under(root, replace(run.recipe, version=3))
    latest.folder.mkdir(parents=True)
    (latest.folder / "recipe.json").write_text(json.dumps(latest.recipe.to_dict()))
    (latest.folder / "checkpoint.pt").write_bytes(training.serialized(run.checkpoint(), latest.recipe))
    return latest


def named(folder: Path) -> str:
    return folder.parent.name


def rows(folder: Path) -> list[dict[str, float]]:
    """The rows of a run's metrics.csv."""
    with (folder / "metrics.csv").open() as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def agree(ours: dict[str, Any], theirs: dict[str, Any], rel: float = 0.0, absolute: float = 0.0) -> None:
    """Assert that the values of `theirs` are the same in `ours`, except times and provenance."""
    for name in theirs.keys() - TIMES - WHERE:
        value = theirs[name]
        if isinstance(value, dict):
            agree(ours[name], value, rel, absolute)
        else:
            expected = value if isinstance(value, str) else pytest.approx(value, rel=rel, abs=absolute, nan_ok=True)
            assert ours[name] == expected, name


@pytest.mark.parametrize("folder", FINISHED, ids=named)
def test_a_finished_run_is_read(training, folder):
    recipe, root = training.read_recipe(folder), folder.parents[1]
    written, result = (json.loads((folder / f"{name}.json").read_text()) for name in ("recipe", "result"))
    assert {name: getattr(recipe, name) for name in written} == written
    assert recipe.version == (1 if is_changed(folder) else 2)
    assert training.Run.under(root, recipe).folder == folder  # otherwise the same command would start a new run
    (run,) = (one for one in training.finished(root) if one.recipe == recipe)
    assert run.result == result
    for ours, theirs in zip(run.metrics, rows(folder), strict=True):
        agree(ours, theirs)
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    assert callable(recipe.build_method(optimizer=optimizer, steps=8, epoch=4, examples=64))


@pytest.mark.parametrize("folder", [*FINISHED, *INTERRUPTED], ids=named)
def test_a_run_is_neither_run_again_nor_resumed(training, folder, tmp_path):
    """Its result would be mixed: other examples, and another rule by which its best epoch is chosen."""
    recipe = training.read_recipe(folder)
    run = training.Run.under(tmp_path, recipe)
    shutil.copytree(folder, run.folder)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()}
    version = 1 if is_changed(folder) else 2
    with pytest.raises(training.RunError, match=f"the recipe has version {version}, and this bisam trains version 3 "):
        training.train(run, training.Machine(log=()))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()} == before


@pytest.mark.parametrize("folder", INTERRUPTED, ids=named)
def test_an_interrupted_run_resumes_to_the_result_of_an_uninterrupted_run(training, folder, tmp_path, monkeypatch):
    """The state in its checkpoint, on the examples that it was trained on."""
    recipe = training.read_recipe(folder)
    monkeypatch.setattr("bisam.experiments.data.load", data_of_0_1)
    whole = FILES / "uninterrupted" / folder.relative_to(folder.parents[1])
    run = of_version_3(training, training.Run(folder, recipe), tmp_path)
    begun = run.checkpoint()
    assert [row["epoch"] for row in begun["history"]] == [1]
    training.train(run, training.Machine(log=()))
    ended = run.checkpoint()
    assert ended["history"][0] == begun["history"][0]  # resumed, not started again

    tolerance = 1e-12 if recipe.precision == "64" else 1e-5
    kept = torch.load(whole / "weights.pt", weights_only=True)["final"]
    weights = {name: t for name, t in ended["sharp"].items() if isinstance(t, Tensor)}
    assert weights.keys() == kept.keys()
    for name, theirs in kept.items():
        same(weights[name].flatten()[:: 1 + weights[name].numel() // 400], theirs, tolerance)

    tolerances = () if EXACT else (1e-5, 2 / recipe.limit)  # two examples
    for ours, theirs in zip(rows(run.folder), rows(whole), strict=True):
        agree(ours, theirs, *tolerances)
    agree(run.result, json.loads((whole / "result.json").read_text()), *tolerances)


def test_the_report_of_a_study_is_that_of_its_runs(bisam, tmp_path):
    changes = ("dataset=digits", "model=convnet", "epochs=1", "limit=64")
    sets = [word for change in changes for word in ("--set", change)]
    code, _, errors = bisam("report", "table10", *sets, "--out", EXPERIMENTS, "--to", tmp_path)
    assert code == 0
    assert errors.startswith("bisam: 3 of 3 runs have recipe version 1, whose results are not those of version 3: ")
    results = [json.loads(path.read_text()) for path in (EXPERIMENTS / "table10").glob("*/seed-*/result.json")]
    with (tmp_path / "report.csv").open() as file:
        reported = sorted(float(row["test_best_mean"]) for row in csv.DictReader(file))
    assert reported == sorted(result["test_best"] for result in results)
    assert len(reported) == 3


@pytest.mark.parametrize("changed", [{}, {"classes": "3,20", "deltas": "0.01"}], ids=["standard", "changed"])
def test_a_measurement_is_reported_and_its_missing_part_measured(changed, tmp_path):
    pytest.importorskip("matplotlib")
    measurements = pytest.importorskip("bisam.experiments.measurements")
    example = measurements.MEASUREMENTS["example"]
    (folder,) = (
        path.parent
        for path in EXPERIMENTS.glob("example-*/measurement.json")
        if (len(json.loads(path.read_text())["settings"]["deltas"]) == 1) == bool(changed)
    )
    parts = {path.name: json.loads(path.read_text()) for path in folder.glob("[0-9]*.json")}
    read = measurements.report(example, EXPERIMENTS, changed)
    assert sorted(read.rows, key=str) == sorted((row for part in parts.values() for row in part["rows"]), key=str)

    copied = shutil.copytree(folder, tmp_path / folder.name)
    (copied / "20.json" if changed else copied / "1000.json").unlink()
    measured = []
    assert measurements.run(example, changed, tmp_path, progress=lambda part, *_: measured.append(part)) == copied
    assert measured == ["20" if changed else "1000", ""]
    for ours, theirs in zip(measurements.report(example, copied).rows, read.rows, strict=True):
        agree(ours, theirs, rel=1e-12, absolute=1e-12)
