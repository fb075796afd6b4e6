"""The code on the pages: every block runs, here or in the test of its page, and every command is parsed.

A block of "Add it to your loop" finds the names that it does not define (`model`, `loader`, ...) in a stand-in, a
function with the title of the section. Of a diff both sides run. The blocks of other pages run one after another, with
nothing but what they import. `ELSEWHERE` names the pages whose blocks run in a test of their own.
"""

from __future__ import annotations

import ast
import copy
import importlib.util
import re
import shlex
import tomllib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DistributedSampler

import bisam
from bisam import ERM, ESAM, KSAM, MSAM, SAM, BiSAM, NegLog, SharpnessAware
from tests.support import cases, ranks

ROOT = Path(__file__).parent.parent
README, LOOP, COMING = "README.md", "docs/add-to-your-loop.md", "docs/coming-from.md"
FRONT, START, METHODS_PAGE = "docs/index.md", "docs/start.md", "docs/choosing-a-method.md"
RANKS, LARGE = "docs/distributed.md", "docs/fine-tuning.md"
CLASSES = 4


class Block(NamedTuple):
    page: str
    section: str
    language: str
    code: str

    def sides(self) -> list[str]:
        """The code of the block; of a diff the code before and after the change."""
        if self.language != "diff":
            return [self.code]
        lines = self.code.splitlines()
        return ["\n".join(line[2:] for line in lines if line[:1] in kept) for kept in (" -", " +")]


def blocks(page: str) -> list[Block]:
    found: list[Block] = []
    section, language, code = "", "", list[str]()
    for line in (ROOT / page).read_text().splitlines():
        if language and line == "```":
            found.append(Block(page, section, language, "\n".join(code)))
            language, code = "", []
        elif language:
            code.append(line)
        elif line.startswith("```"):
            language = line.removeprefix("```") or "shell"
        elif line.startswith("#"):
            section = line.lstrip("# ")
    return found


BLOCKS = [block for page in (FRONT, LOOP, LARGE) for block in blocks(page) if not block.language.startswith("{")]


# Stand-ins: what a script defines before the block.


def batches(n: int = 1) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(8, 6, generator=generator), torch.randint(CLASSES, (8,), generator=generator)) for _ in range(n)
    ]


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, CLASSES))


def loop() -> dict[str, Any]:
    """A plain loop."""
    model = mlp()
    return {
        "torch": torch,
        "make_model": lambda: model,
        "model": model,
        "loader": batches(),
        "criterion": nn.CrossEntropyLoss(),
        "optimizer": SGD(model.parameters(), lr=0.1, momentum=0.9),
        "device": "cpu",
    }


def numbered() -> dict[str, Any]:
    """A loader that returns the numbers of the examples, three times in an epoch."""
    return {**loop(), "loader": [(torch.arange(8), *batch) for batch in batches(3)], "data": list(range(8))}


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)]), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x))
        return self.head(x)


def distributed() -> dict[str, Any]:
    model = Blocks()
    return {
        **loop(),
        "model": model,
        "local_rank": 0,
        "DistributedDataParallel": lambda module, device_ids: DistributedDataParallel(
            module
        ),  # of devices: on a CPU none
        "fully_shard": fully_shard,
        "DistributedSampler": DistributedSampler,
        "data": list(range(8)),
        "optimizer": SGD(model.parameters(), lr=0.1),
    }


class GPT(nn.Module):
    """A tiny GPT with the interface of nanoGPT's: (logits, loss) with labels, the last position's logits without."""

    def __init__(self, vocabulary: int = 11, width: int = 8, length: int = 6) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mix, self.head = nn.Linear(width, width), nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        h = self.tokens(x) + self.places(torch.arange(x.shape[1]))
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        h = h + self.attention(h, h, h, attn_mask=later, need_weights=False)[0]
        h = h + torch.tanh(self.mix(h))
        if y is None:
            return self.head(h[:, [-1]]), None
        logits = self.head(h)
        return logits, F.cross_entropy(logits.view(-1, logits.shape[-1]), y.view(-1), ignore_index=-1)


def sequences(ignored: int) -> tuple[Tensor, Tensor]:
    """Tokens (8, 6) and their successors, of which some are not to be learned."""
    tokens = torch.randint(11, (8, 7), generator=torch.Generator().manual_seed(1))
    x, y = tokens[:, :-1], tokens[:, 1:].clone()
    y[1, 3:] = y[4, 0] = ignored
    return x, y


def nano_gpt() -> dict[str, Any]:
    return {**loop(), "model": GPT(), "loader": [sequences(-1)]}


def hugging_face() -> dict[str, Any]:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0
    )
    x, y = sequences(-100)
    labels = torch.cat([x[:, :1], y[:, :-1]], 1)  # not shifted: the model does
    batch = transformers.BatchEncoding({"input_ids": x, "labels": labels})
    return {**loop(), "model": transformers.GPT2LMHeadModel(config), "loader": [batch]}


def seq2seq() -> dict[str, Any]:
    """T5, with batches that have 40, 12 and 25 labels."""
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        vocab_size=11, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, dropout_rate=0.0, decoder_start_token_id=0
    )
    x, labels = sequences(-100)
    many = []
    for skipped in (1, 4, 3):
        y = labels.clone()
        y[:, :skipped] = -100
        many.append(transformers.BatchEncoding({"input_ids": x.roll(skipped, 1), "labels": y}))
    return {**loop(), "model": transformers.T5ForConditionalGeneration(config), "loader": many}


def trainer(folder: Path) -> dict[str, Any]:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        image_size=4, patch_size=2, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    arguments = transformers.TrainingArguments(
        str(folder), max_steps=2, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True
    )
    data = [{"pixel_values": torch.randn(3, 4, 4), "labels": i % 2} for i in range(16)]
    return {
        "model": transformers.ViTForImageClassification(config),
        "arguments": arguments,
        "args": arguments,
        "data": data,
    }


def lightning() -> dict[str, Any]:
    return {**loop(), "lightning": pytest.importorskip("lightning")}


def accelerated() -> dict[str, Any]:
    accelerate = pytest.importorskip("accelerate")
    for state in (accelerate.state.AcceleratorState, accelerate.state.GradientState, accelerate.state.PartialState):
        state._reset_state()
    names = loop()
    dataset = torch.utils.data.TensorDataset(*(torch.cat(parts) for parts in zip(*batches(), strict=True)))
    return {
        **names,
        "Accelerator": partial(accelerate.Accelerator, cpu=True),
        "loader": torch.utils.data.DataLoader(dataset, batch_size=8),
        "scheduler": torch.optim.lr_scheduler.StepLR(names["optimizer"], 5),
    }


def fabric() -> dict[str, Any]:
    lightning_fabric = pytest.importorskip("lightning_fabric")
    return {**loop(), "fabric": lightning_fabric.Fabric(accelerator="cpu", devices=1)}


def timm() -> dict[str, Any]:
    pytest.importorskip("timm")
    numpy = pytest.importorskip("numpy")
    from timm.data import Mixup
    from timm.loss import SoftTargetCrossEntropy
    from timm.optim import create_optimizer_v2

    numpy.random.seed(0)
    images = [(torch.rand(8, 1, 4, 4), torch.randint(10, (8,)))]
    parts = {
        "Mixup": Mixup,
        "SoftTargetCrossEntropy": SoftTargetCrossEntropy,
        "create_optimizer_v2": create_optimizer_v2,
    }
    return {**loop(), **parts, "model": nn.Sequential(nn.Flatten(), nn.Linear(16, 10)), "loader": images}


class Classifier(nn.Module):
    """What the tasks of timm ask of a model."""

    num_classes, in_chans, pretrained_cfg = CLASSES, 1, MappingProxyType({"mean": (0.5,), "std": (0.5,)})

    def __init__(self) -> None:
        super().__init__()
        self.layers = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def timm_task(half: bool = False) -> dict[str, Any]:
    """`half`: as with `--amp`, else as without."""
    task = pytest.importorskip("timm.task")
    from timm.loss import LabelSmoothingCrossEntropy
    from timm.utils import NativeScaler

    class Task(task.ClassificationTask):
        def prepare_distributed(self, device_ids=None, **options):  # one process: there is nothing to wrap
            return self

    class Plain:
        """Where there is no scaler, train.py does the same without one."""

        def __call__(self, loss, optimizer, clip_grad, parameters):
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, clip_grad)
            optimizer.step()

    model = Classifier()
    return {
        **loop(),
        "ClassificationTask": partial(Task, verbose=False),
        "train_loss_fn": LabelSmoothingCrossEntropy(0.1),
        "loss_scaler": NativeScaler("cpu") if half else Plain(),
        "amp_autocast": partial(torch.autocast, "cpu", torch.float16 if half else torch.bfloat16, enabled=half),
        "model": model,
        "optimizer": SGD(model.parameters(), lr=0.1),
    }


def timm_distillation() -> dict[str, Any]:
    task = pytest.importorskip("timm.task")
    student = Classifier()
    distillation = task.LogitDistillationTask(student, Classifier(), nn.CrossEntropyLoss(), verbose=False)
    return {**loop(), "task": distillation, "model": student, "optimizer": SGD(student.parameters(), lr=0.1)}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.value, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.sigmoid(self.query(x)) * self.value(x))


def lora() -> dict[str, Any]:
    peft = pytest.importorskip("peft")
    return {**loop(), "get_peft_model": peft.get_peft_model, "LoraConfig": peft.LoraConfig, "model": Attention()}


def with_norms() -> dict[str, Any]:
    model = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, CLASSES))
    return {**loop(), "model": model, "steps": 10}


def several_labels() -> dict[str, Any]:
    return {**loop(), "nn": nn, "loader": [(x, (x[:, :CLASSES] > 0).float()) for x, _ in batches()]}


def composite() -> dict[str, Any]:
    def both(outputs: Tensor, targets: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(outputs, targets[0], reduction="none") + targets[1].square().mean(1)

    def flips(outputs: Tensor, targets: tuple[Tensor, Tensor]) -> Tensor:
        return NegLog()(outputs, targets[0])

    return {
        **loop(),
        "both": both,
        "flips": flips,
        "penalty": lambda model: sum(p.abs().sum() for p in model.parameters()),
    }


def gan() -> dict[str, Any]:
    generator = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 6))
    discriminator = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1), nn.Flatten(0))
    return {
        "torch": torch,
        "generator": generator,
        "discriminator": discriminator,
        "criterion": nn.BCEWithLogitsLoss(),
        "loader": [(torch.randn(8, 6), torch.randn(8, 3)) for _ in range(1)],
        "labels": torch.cat([torch.ones(8), torch.zeros(8)]),
        "ones": torch.ones(8),
        "optimizer_d": SGD(discriminator.parameters(), lr=0.1),
        "optimizer_g": SGD(generator.parameters(), lr=0.1),
    }


def compiled() -> dict[str, Any]:
    eager = SimpleNamespace(compile=partial(torch.compile, backend="eager"))  # needs no compiler
    return {**loop(), "torch": eager}


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = nn.Sequential(nn.Linear(6, 8), nn.Tanh()), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.block, x, use_reentrant=False))


def equation() -> dict[str, Any]:
    model = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    loader = [(torch.rand(8, 1).double(), torch.rand(8, 1).double())]
    return {"torch": torch, "model": model, "loader": loader, "optimizer": SGD(model.parameters(), lr=0.01)}


def atoms() -> dict[str, Any]:
    """Four at positions (N, 4, 3)."""
    layers = [nn.Flatten(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 1), nn.Flatten(0)]
    model = nn.Sequential(*layers).double()
    loader = [(torch.randn(8, 4, 3).double(), torch.randn(8).double(), torch.randn(8, 4, 3).double())]
    return {"torch": torch, "model": model, "loader": loader, "optimizer": SGD(model.parameters(), lr=0.01)}


def wgan() -> dict[str, Any]:
    critic, generator = (nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, n)) for n in (1, 6))
    loader = [(torch.randn(8, 6), torch.randn(8, 6))]
    names = {"torch": torch, "critic": critic, "generator": generator, "loader": loader}
    return {**names, "optimizer": SGD(critic.parameters(), lr=0.01)}


# One stand-in for each block of the section.
HERE: dict[tuple[str, str], list[Callable[[], dict[str, Any]]]] = {
    (FRONT, "bisam"): [loop],
    (LOOP, "A plain loop"): [loop],
    (LOOP, "Mixed precision, clipping, accumulation"): [lambda: {**loop(), "loader": batches(2), "parts": 2}],
    (LOOP, "Averages of weights"): [
        loop,
        lambda: {**loop(), "loader": batches(4), "validation_loss": lambda model: 1.0},
    ],
    (LOOP, "WSAM with a decoupled term"): [loop],
    (LOOP, "Numbered examples (SAF)"): [numbered],
    (LOOP, "Models that compute their own loss"): [nano_gpt, hugging_face, seq2seq],
    (LOOP, "Accelerate"): [accelerated],
    (LOOP, "Fabric"): [fabric],
    (LOOP, "timm"): [timm],
    (LOOP, "timm's train.py"): [timm_task, timm_distillation],
    (LOOP, "LoRA and other adapters"): [lora],
    (LOOP, "A binary head, or several labels per example"): [several_labels],
    (LOOP, "A loss of several parts"): [composite],
    (LOOP, "Losses with derivatives inside"): [equation, atoms, wgan],
    (LOOP, "GANs"): [gan],
    (LOOP, "Models that keep a state"): [loop],
    (LOOP, "torch.compile"): [compiled],
    (LOOP, "Activation checkpointing"): [lambda: {**loop(), "model": Checkpointed()}],
    (LARGE, "Adapters"): [lora],
    (LARGE, "The last layers"): [lambda: {**loop(), "model": Attention()}],
    (LARGE, "Normalisation layers"): [with_norms],
    (LARGE, "Ascent without a gradient"): [with_norms],
    (LARGE, "Noise in place of an adversary"): [with_norms],
}
# Blocks that have a test of their own below.
APART = {
    (LOOP, "DDP"): 1,
    (LOOP, "FSDP2"): 1,
    (LOOP, "SAMPa on pairs of ranks"): 1,
    (LOOP, "Hugging Face Trainer"): 1,
    (LOOP, "TRL"): 1,
    (LOOP, "Lightning"): 1,
    (LARGE, "Noise on the merged weights of LoRA"): 1,
}


# Sections in which the loss before the change is no single value at the weights of one batch, with the reason.
NO_VALUE_BEFORE = {
    "SAMPa on pairs of ranks": "its values are those at another point",
    "A loss of several parts": "its penalty is added outside",
    "GANs": "there are two losses",
    "Ascent without a gradient": "its values are those at the displaced point",
    "Noise in place of an adversary": "its values are those at the random point",
}


def of(page: str, section: str) -> list[Block]:
    return [block for block in BLOCKS if (block.page, block.section) == (page, section)]


def execute(code: str, names: dict[str, Any]) -> dict[str, Any]:
    exec(compile(code, "block", "exec"), names)
    return names


def losses(names: dict[str, Any]) -> list[SharpnessAware]:
    """The sharp losses that a block made, also inside another module."""
    made = [s for m in names.values() if isinstance(m, nn.Module) for s in m.modules() if isinstance(s, SharpnessAware)]
    return list({id(s): s for s in made}.values())


def check(block: Block, stand_in: Callable[[], dict[str, Any]], tolerance: float = 1e-6) -> None:
    """Runs a block. The loss at the weights is the loss of the code before the change."""
    runs = []
    for side in block.sides():
        torch.manual_seed(0)
        runs.append(execute(side, stand_in()))
    made = losses(runs[-1])
    assert made
    for sharp in made:
        assert sharp.get_extra_state()["step"] == len(runs[-1]["loader"])
    if len(runs) == 2 and block.section not in NO_VALUE_BEFORE:
        before = runs[0].get("loss", runs[0].get("_loss")).detach()
        torch.testing.assert_close(made[0].clean.value, before, rtol=tolerance, atol=0, check_dtype=False)


RUN = [
    pytest.param(block, stand_in, id=f"{Path(page).stem}: {section} {i}")
    for (page, section), stand_ins in HERE.items()
    for i, (block, stand_in) in enumerate(zip(of(page, section), stand_ins, strict=False))
]


@pytest.mark.parametrize(("block", "stand_in"), RUN)
def test_the_block_runs(block, stand_in):
    check(block, stand_in)


def in_two_processes() -> None:
    for section in ("DDP", "FSDP2", "SAMPa on pairs of ranks"):
        (block,) = of(LOOP, section)
        check(block, distributed)


def test_the_blocks_of_several_processes_run():
    ranks.run(2, in_two_processes)


def test_the_block_of_the_trainer_runs(tmp_path):
    (block,) = of(LOOP, "Hugging Face Trainer")
    for side in block.sides():
        assert execute(side, trainer(tmp_path))["trainer"].state.global_step == 2


def test_the_block_of_flat_lora_runs():
    (block,) = of(LARGE, "Noise on the merged weights of LoRA")
    before, after = ({**lora(), "steps": 10, "loader": batches(3)} for _ in block.sides())
    for side, names in zip(block.sides(), (before, after), strict=True):
        torch.manual_seed(0)
        execute(side, names)
        assert names["loss"].isfinite()
    assert after["noise"].passes == 3
    assert (before["loss"] - after["loss"]).abs() < 0.1


def test_the_classes_of_trl_train(tmp_path):
    """With stand-ins for TRL's trainers, which tests/integrations/transformers/test_trl.py trains."""
    transformers = pytest.importorskip("transformers")
    integration = pytest.importorskip("bisam.integrations.transformers")

    class SFTTrainer(transformers.Trainer):
        def compute_loss(self, *args, **kwargs):
            raise AssertionError("the class between does not call it")

    given = {"Trainer": transformers.Trainer, "SharpnessAwareTrainer": integration.SharpnessAwareTrainer}
    (block,) = of(LOOP, "TRL")
    (code,) = block.sides()
    names = execute(code, {**given, "SFTTrainer": SFTTrainer, "DPOTrainer": transformers.Trainer})
    for name in ("SharpnessAwareDPOTrainer", "SharpnessAwareSFTTrainer"):
        made = trainer(tmp_path)
        one = names[name](made["model"], made["arguments"], train_dataset=made["data"], method=BiSAM(0.05))
        one.train()
        assert one.state.log_history[-1]["train_loss"] > 0
        assert one.state.global_step == 2


def test_the_block_of_lightning_runs():
    (block,) = of(LOOP, "Lightning")
    modules = []
    for side in block.sides():
        torch.manual_seed(0)
        modules.append(execute(side, lightning())["Digits"]())
    (batch,) = batches()
    plain = modules[0].training_step(batch, 0)
    modules[1].training_step(batch, 0).backward()
    assert torch.equal(modules[1].sharp.clean.value, plain.detach())
    assert all(p.grad is not None for p in modules[1].model.parameters())


def test_the_scaler_of_timm_scales_the_queries():
    block = of(LOOP, "timm's train.py")[0]
    check(block, partial(timm_task, half=True), tolerance=1e-3)
    names = execute(block.sides()[-1], timm_task(half=True))
    assert names["task"].sharp._scaler is names["loss_scaler"]._scaler


def test_the_loss_of_a_distillation_task_is_its_own():
    block = of(LOOP, "timm's train.py")[1]
    plain, names = timm_distillation(), timm_distillation()
    names["task"].load_state_dict(plain["task"].state_dict())
    execute(block.code, names)
    expected = plain["task"](*plain["loader"][0])["loss"].detach()
    torch.testing.assert_close(names["sharp"].clean.value, expected, rtol=0, atol=0)
    assert all(p.grad is None for p in names["task"].teacher.parameters())


@pytest.mark.parametrize("which", [0, 1])
def test_a_loss_with_derivatives_has_the_gradient_of_sam(which):
    block = of(LOOP, "Losses with derivatives inside")[which]
    names = execute(block.code, [equation, atoms][which]())
    forward, loss = names[["curvature", "energy_and_forces"][which]], [nn.MSELoss(), names.get("errors")][which]
    sharp, model, (batch,) = names["sharp"], names["model"], names["loader"]

    def gradient(e: list[Tensor] | None = None) -> list[Tensor]:
        there = copy.deepcopy(model)
        parameters = list(there.parameters())
        if e is not None:
            with torch.no_grad():
                torch._foreach_add_(parameters, e)
        value = loss(*forward(there, *batch)).mean()
        return list(torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True))

    g = gradient()
    norm = torch.cat([t.flatten() for t in g]).norm()
    expected = gradient([0.05 * t / norm for t in g])
    sharp(*batch).backward()
    for p, h in zip(model.parameters(), expected, strict=True):  # the last bias has no derivative: None here
        torch.testing.assert_close(torch.zeros_like(h) if p.grad is None else p.grad, h, rtol=0, atol=1e-10)
    assert not torch.equal(expected[0], g[0])


def test_a_loss_with_derivatives_is_validated_and_selects_examples():
    block = of(LOOP, "Losses with derivatives inside")[1]
    names = execute(block.code, atoms())
    model, (batch,) = names["model"], names["loader"]
    expected = names["errors"](*names["energy_and_forces"](model, *batch)).mean().detach()
    with torch.no_grad():
        assert torch.equal(names["sharp"](*batch), expected)
    sharp = SharpnessAware(model, ESAM(), loss=names["errors"], forward=names["energy_and_forces"])
    sharp(*batch).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


# Models that compute their own loss: what the diffs use is what the model computes, for every kind of method.


METHODS = {
    "ERM": ERM(),
    "SAM": SAM(0.05),
    "BiSAM": BiSAM(0.05, NegLog(ignore_index=-1)),
    "ESAM": ESAM(),
    "KSAM": KSAM(4),
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_language_model_trains_with_methods_that_compare_labels_or_choose_sequences(method):
    names = execute(of(LOOP, "Models that compute their own loss")[0].sides()[1], nano_gpt())
    model, (batch,) = names["model"], names["loader"]
    sharp = SharpnessAware(model, method, loss=names["criterion"], forward=names["tokens"])
    model.zero_grad()
    sharp(*batch).backward()
    assert sharp.clean.per_example.shape == (8,)
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("method", [ERM(), BiSAM(0.05)], ids=str)
def test_tokens_are_accumulated_as_the_page_says(method):
    names = execute(of(LOOP, "Models that compute their own loss")[2].sides()[1], seq2seq())
    model, parts = names["model"].double(), names["loader"]
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    counts = [(part["labels"] != -100).sum() for part in parts]
    gradients = []
    for how, batches_, weights in (
        (method, parts, [count / sum(counts) for count in counts]),
        (MSAM(8, method), [whole], [1.0]),
    ):
        sharp = SharpnessAware(model, how, loss=names["cross_entropy"], forward=names["tokens"])
        model.zero_grad()
        for batch, weight in zip(batches_, weights, strict=True):
            (sharp(dict(batch)) * weight).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for g, h in zip(*gradients, strict=True):
        torch.testing.assert_close(g, h, rtol=0, atol=1e-8)  # T5's norms go on in float32


@pytest.mark.parametrize("method", [ERM(), SAM(0.05)], ids=str)
def test_a_model_that_gives_only_its_loss_trains_as_with_its_logits(method):
    names = execute(of(LOOP, "Models that compute their own loss")[0].sides()[1], nano_gpt())
    text = (ROOT / LOOP).read_text()
    spelled = re.search(
        r"`forward=(lambda model, x, y: \(model\(x, y\)\[1\], None\))`\s+and\s+`loss=(lambda.*?)`", text
    )
    forward, loss = (eval(function) for function in spelled.groups())
    model, (batch,) = names["model"].double(), names["loader"]
    gradients = []
    for arguments in ({"loss": names["criterion"], "forward": names["tokens"]}, {"loss": loss, "forward": forward}):
        model.zero_grad()
        SharpnessAware(model, method, **arguments)(*batch).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for g, h in zip(*gradients, strict=True):
        torch.testing.assert_close(g, h, rtol=0, atol=1e-12)


# GANs.


def test_each_player_of_a_gan_perturbs_and_trains_itself_alone():
    names = execute(of(LOOP, "GANs")[0].sides()[1], gan())
    generator, discriminator, ((real, noise),) = names["generator"], names["discriminator"], names["loader"]
    counted = int(discriminator[1].num_batches_tracked)
    discriminator.requires_grad_(False)
    seen = []
    for player in (generator, discriminator):
        player.register_forward_pre_hook(lambda m, _: seen.append([p.detach().clone() for p in m.parameters()]))
    names["sharp_g"](noise, names["ones"]).backward()
    g_first, d_first, g_second, d_second = seen
    assert not torch.equal(g_first[0], g_second[0])
    assert all(torch.equal(p, q) for p, q in zip(d_first, d_second, strict=True))
    assert all(p.grad is None for p in discriminator.parameters())
    assert any(p.grad.any() for p in generator.parameters())
    assert int(discriminator[1].num_batches_tracked) == counted + 1
    discriminator.requires_grad_(True)
    names["sharp_d"](torch.cat([real, generator(noise).detach()]), names["labels"]).backward()
    assert all(p.grad is not None for p in discriminator.parameters())


# The other pages.


@pytest.fixture
def alone():
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def python(page: str, apart: str = "") -> list[Block]:
    return [block for block in blocks(page) if block.language == "python" and block.section != apart]


# Pages whose blocks run one after another, with a section that has a test of its own.
WHOLE = {README: "", START: "Options in short", "docs/tasks.md": "", "docs/how-it-works.md": ""}


@pytest.mark.parametrize("page", WHOLE)
def test_the_blocks_of_the_page_run_as_they_are(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in python(page, WHOLE[page]):
        execute(block.code, names)
    made = losses(names)
    assert made
    assert all(sharp.get_extra_state()["step"] for sharp in made)
    if page in (README, START):
        assert float(re.findall(r"accuracy on new examples (.*)", capsys.readouterr().out)[0]) > 0.9


def test_the_first_run_is_the_same_in_the_readme_and_on_the_page():
    readme, start = (python(page)[0].code for page in (README, START))
    without_comments = [re.sub(r"  # .*", "", code) for code in (readme, start)]
    assert without_comments[0] == without_comments[1]


def test_the_combined_methods_are_methods():
    (block,) = python(METHODS_PAGE)
    model, batch = mlp(), [torch.cat(parts) for parts in zip(*batches(8), strict=True)]
    optimizer = SGD(model.parameters(), lr=0.1)
    names = {
        **cases.public_names(),
        "optimizer": optimizer,
        "late": 1,
        "Friendly": bisam.perturbations.Friendly,
    }
    names["is_head"] = lambda name, parameter: name.startswith("2.")
    expressions = [ast.unparse(statement) for statement in ast.parse(block.code).body]
    assert len(expressions) == len(block.code.splitlines())
    for expression in expressions:
        method = eval(expression, {**names, "Follow": bisam.schedules.Follow})
        sharp = SharpnessAware(model, method, bisam.cross_entropy)
        for _ in range(2):
            sharp(*batch).backward()
        assert all(p.grad.isfinite().all() for p in model.parameters()), expression


def test_the_options_in_short_train(alone, tmp_path):
    """Each assignment to `sharp` is a loss that takes a step, except for InPairs, which needs two processes."""
    of_ranks = [block.code for block in python(RANKS)]
    (block,) = [block for block in python(START) if block.section == WHOLE[START]]
    names = {
        **cases.public_names(),
        **trainer(tmp_path / "trainer"),
        "torch": torch,
        "path": tmp_path / "saved",
    }
    from bisam.integrations.pairs import InPairs
    from bisam.integrations.transformers import SharpnessAwareTrainer

    vision, (x, y) = names["model"], batches()[0]
    names |= {
        "DistributedDataParallel": DistributedDataParallel,
        "fully_shard": fully_shard,
        "InPairs": InPairs,
        "SharpnessAwareTrainer": SharpnessAwareTrainer,
        "scaler": torch.amp.GradScaler("cpu"),
        "x": x,
        "y": y,
        "micro_batches": [(x, y)],
    }
    trained = 0
    for statement in ast.parse("\n".join([*of_ranks, block.code])).body:
        code = ast.unparse(statement)
        model = names["model"] = vision if "Trainer(" in code else mlp()
        names["optimizer"] = SGD(model.parameters(), lr=0.1)
        execute(code, names)
        if code.startswith("sharp = ") and "InPairs" not in code:
            names["sharp"](*([{"inputs": {"input": x}, "labels": y}] if "inputs" in code else (x, y))).backward()
            trained += 1
    assert trained == 7
    assert (tmp_path / "saved").exists()


# Commands.


PAGES = [README, "CONTRIBUTING.md", *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").glob("*.md")))]
COMMANDS = [(page, block.code) for page in PAGES for block in blocks(page) if block.language == "shell"]


def commands(code: str) -> list[list[str]]:
    """The words of each command of a shell block, without comments."""
    lines = [line for line in code.splitlines() if line.strip()]
    return [shlex.split(command, comments=True) for line in lines for command in line.split("&&")]


@pytest.mark.parametrize(("page", "code"), COMMANDS, ids=[page for page, _ in COMMANDS])
def test_the_commands_of_the_pages_are_accepted(page, code):
    """They are read and not run: studies take hours."""
    cli = pytest.importorskip("bisam.experiments.cli")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for program, *words in commands(code):
        while "=" in program:  # a variable of the environment
            program, *words = words
        if program == "bisam":
            command, bound, _ = cli.app.parse_args(words, exit_on_error=False, print_error=False)
            assert command.__name__.startswith(words[0]), words
            assert bound is not None
        elif program == "pip":
            named = re.fullmatch(r"(?:\.|\./bisam)(?:\[(\w+)\])?", words[-1])
            assert named, words
            assert named[1] is None or named[1] in extras
        elif program == "python":
            assert words[0] == "-m"
            assert importlib.util.find_spec(words[1]), words
        elif program == "bash":
            assert (ROOT / words[0]).exists()
        else:
            assert program in ("pytest", "pre-commit", "git", "sphinx-build"), program


def test_no_page_installs_a_name_that_is_not_on_an_index():
    for page in {*PAGES} - {"CONTRIBUTING.md"}:  # which says when this changes
        assert not re.search(r"pip install \"?bisam(?! @)", (ROOT / page).read_text()), page


# All blocks.


def test_every_block_runs():
    found: dict[tuple[str, str], int] = {}
    for block in BLOCKS:
        found[block.page, block.section] = found.get((block.page, block.section), 0) + 1
    assert found == {key: len(stand_ins) for key, stand_ins in HERE.items()} | APART


ELSEWHERE = {
    COMING: "tests/test_coming_from.py",
    METHODS_PAGE: "tests/test_pages.py",
    RANKS: "tests/test_pages.py",
    "docs/analysis.md": "tests/analysis/test_page.py",
    "docs/choosing-rho.md": "tests/test_pages.py",
    "docs/conformance.md": "tests/conformance/table.py",
    "docs/games.md": "tests/methods/test_games.py",
    "docs/weights.md": "tests/experiments/inference/test_page.py",
    "docs/tuning.md": "tests/experiments/tuning/test_command.py",
}


def test_the_blocks_of_every_page_run_in_some_test():
    with_code = {page for page in PAGES if any(b.language in ("python", "py", "diff") for b in blocks(page))}
    assert with_code == {FRONT, LOOP, LARGE, *WHOLE, *ELSEWHERE}
    for page, test in ELSEWHERE.items():
        assert Path(page).stem in (ROOT / test).read_text()


# A diff adds an object and changes a line; these change more.
LONGER = {
    "SAMPa on pairs of ranks": 3,
    "Models that compute their own loss": 6,
    "WSAM with a decoupled term": 3,
    "Fabric": 3,
    "timm's train.py": 4,
    "GANs": 6,
    "The last layers": 3,
}


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "diff"], ids=lambda b: b.section)
def test_a_diff_is_short(block):
    changed = [line for line in block.code.splitlines() if line.startswith("+") and " import " not in line]
    assert 1 <= len(changed) <= LONGER.get(block.section, 2)


def test_links_of_the_page_lead_somewhere():
    page = (ROOT / LOOP).read_text()
    links = re.findall(r"\]\(([^)#]+)\)", page)
    assert [link for link in links if not (ROOT / "docs" / link).exists()] == []
    assert set(re.findall(r"\]\(#([^)]+)\)", page)) == anchors(LOOP)


def anchors(page: str) -> set[str]:
    titles = re.findall(r"^##+ (.*)$", (ROOT / page).read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_links_between_pages_lead_somewhere(page):
    for link, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)]+))?\)", (ROOT / page).read_text()):
        there = (ROOT / page).parent / link if link else ROOT / page
        assert there.exists(), link
        assert not anchor or there.suffix != ".md" or anchor in anchors(str(there.relative_to(ROOT))), (link, anchor)


def test_the_radius_of_the_page_on_rho_rises():
    names: dict[str, Any] = {}
    (block,) = [block for block in blocks("docs/choosing-rho.md") if block.language == "python"]
    exec(block.code, names)
    assert [names["method"].perturb.rho(step) for step in (0, 500, 1000, 2000)] == [0.0, 0.05, 0.1, 0.1]


def test_the_accuracies_of_the_page_on_rho_are_those_of_the_study():
    """The rows of the table: for each method the scores at half, 1, 1.4 and 2 times its best radius."""
    lines = (ROOT / "docs" / "choosing-rho.md").read_text().splitlines()
    shown = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if re.match(r"\| \d+ % \|", line)]
    study = (ROOT / "docs" / "reproduction" / "radius-regret" / "report.md").read_text()
    assert len(shown) == 4
    for noise, method, *scores in shown:
        name, _, best = method.rpartition(", ")
        for factor, score in zip((0.5, 1, 1.4, 2), scores, strict=True):
            assert f"| {noise} | {name} | {float(best) * factor:.4g} | 30 | {score} ±" in study


INTERVAL = r"\[[+−][\d.]+, [+−][\d.]+\]"
IN_WORDS = {
    page: text
    for page in [*PAGES, "docs/reproduction/README.md"]
    if re.search(INTERVAL, text := " ".join((ROOT / page).read_text().split()))
}


@pytest.mark.parametrize("page", IN_WORDS)
def test_the_intervals_of_a_page_are_those_of_a_report(page):
    """A value with its interval, such as "−1.15 points [−1.60, −0.70]", stands so in the report of a study."""
    reports = "".join(path.read_text() for path in (ROOT / "docs" / "reproduction").glob("*/report.md"))
    unit = r"(?: points(?: of the likelihood of a (?:test )?token)?| % of the examples)?"
    found = re.findall(rf"([+−][\d.]+){unit} ({INTERVAL})", IN_WORDS[page])
    assert len(found) == len(re.findall(INTERVAL, IN_WORDS[page]))
    assert [one for one in found if " ".join(one) not in reports] == []


def test_the_readme_is_read_to_its_end():
    assert len((ROOT / README).read_text().splitlines()) < 120
