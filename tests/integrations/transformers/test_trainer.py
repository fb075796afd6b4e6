"""The Trainer of Hugging Face: what it is without a method, what a loop by hand would do, and what it must refuse."""

from __future__ import annotations

import gc
import importlib
import re
import sys
import weakref
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from bisam import (
    BSAM,
    ERM,
    ESAM,
    KSAM,
    LESAM,
    MESA,
    MSAM,
    SAM,
    Binary,
    BiSAM,
    Every,
    FunctionalSAM,
    LookSAM,
    NegLog,
    SAMPa,
    SharpnessAware,
    cross_entropy,
    next_step,
)
from bisam.objectives import ExactMatch, PerExample
from bisam.perturbations import L2
from tests.support import ranks

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytest.importorskip("accelerate")
integration = importlib.import_module("bisam.integrations.transformers.trainer")
BatchEncoding, Trainer, TrainingArguments = (
    transformers.BatchEncoding,
    transformers.Trainer,
    transformers.TrainingArguments,
)
SharpnessAwareTrainer = integration.SharpnessAwareTrainer


class Divides(Trainer):
    """The Trainer for a model that returns a mean whatever the number of items: it would sum the means of batches."""

    loss_is_scaled_for_ga = False


old_name = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # in peft
WORDS, LENGTH, CLASSES = 20, 6, 3
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
BERT = {**SIZES, "vocab_size": WORDS, "num_labels": CLASSES, "max_position_embeddings": 8}


def named(value: object) -> str:
    """The same in every process: functions by their names, not by where they are."""
    return re.sub(r"<function ([\w.<>]+) at 0x[0-9a-f]+>", r"\1", str(value))


@pytest.fixture(autouse=True, scope="module")
def _quick():
    gc.freeze()  # train() begins with a collection: not of all that was imported, each time
    yield
    gc.unfreeze()


def bert(kind: str = "Sequence", drop: float = 0.0, **config):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        **{**BERT, "hidden_dropout_prob": drop, "attention_probs_dropout_prob": drop, **config}
    )
    return getattr(transformers, f"BertFor{kind}Classification")(config)


def llama(drop: float = 0.0):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, vocab_size=WORDS, attention_dropout=drop, pad_token_id=0)
    return transformers.LlamaForCausalLM(config)


def double():
    """A language model in float64 from end to end: Llama's norms, and the usual loss, go on in float32."""
    torch.manual_seed(0)
    config = transformers.GPTNeoXConfig(**SIZES, vocab_size=WORDS, max_position_embeddings=8)
    config.hidden_dropout = config.attention_dropout = 0.0
    model = transformers.GPTNeoXForCausalLM(config).double()
    model.loss_function = next_word
    return model


def next_word(logits, labels, num_items_in_batch=None, **_):
    counted = labels[:, 1:].ne(-100).sum() if num_items_in_batch is None else num_items_in_batch
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum") / counted


def gpt2(drop: float = 0.0):
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=16, n_layer=1, n_head=2, vocab_size=WORDS, n_positions=8, bos_token_id=1, eos_token_id=2
    )
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = drop
    return transformers.GPT2LMHeadModel(config)


def t5(drop: float = 0.0):
    torch.manual_seed(0)
    config = transformers.T5Config(
        d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=WORDS, dropout_rate=drop
    )
    config.decoder_start_token_id = 0
    return transformers.AutoModelForSeq2SeqLM.from_config(config)


def examples(task: str, n: int = 16) -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(1)
    rows = []
    for i in range(n):
        words = torch.randint(1, WORDS, (LENGTH,), generator=draw)
        labels = {
            "sequence": torch.randint(0, CLASSES, (), generator=draw),
            "token": torch.randint(0, CLASSES, (LENGTH,), generator=draw),
            "causal": words.clone(),
            "translation": torch.randint(1, WORDS, (LENGTH,), generator=draw),
            "regression": torch.rand((), generator=draw),
            "several": torch.rand(CLASSES, generator=draw).round(),
        }[task]
        if labels.dim() and task != "several":
            labels[: i % LENGTH] = -100  # an uneven number of tokens counts
        rows.append({"input_ids": words, "attention_mask": torch.ones_like(words), "labels": labels})
    return rows


MODELS = {"sequence": bert, "token": partial(bert, "Token"), "causal": llama, "gpt2": gpt2, "t5": t5}


def made(cls, folder, model, task, *, accumulate=1, **options):
    keywords = {
        name: options.pop(name)
        for name in ("method", "method_of", "scope", "stats", "compute_loss_func", "eval_dataset")
        if name in options
    }
    rows = options.pop("rows", None) or examples(task)
    arguments = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": accumulate,
        "max_steps": 3,
        "logging_steps": 1,
        "learning_rate": 0.01,
        "weight_decay": 0.1,
        "max_grad_norm": 0.5,
        "lr_scheduler_type": "cosine",
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **options,
    }
    return cls(model, TrainingArguments(**arguments), train_dataset=rows, **keywords)


def weights(model) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def losses(trainer) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def trained(cls, folder, model, task, resume=None, **options):
    trainer = made(cls, folder, model, task, **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def compare(folder, model, task, method, exactly=True, plain=Trainer, **options):
    """A trainer with `method`, after it was found to be what the plain one is."""
    plain = trained(plain, folder / "plain", model(), task, **options)
    trainer = trained(SharpnessAwareTrainer, folder / "sharp", model(), task, method=method, **options)
    assert not torch.equal(weights(trainer.model), weights(model()))
    if exactly:
        assert losses(trainer) == losses(plain)
        assert torch.equal(weights(trainer.model), weights(plain.model))
    else:
        assert losses(trainer) == pytest.approx(losses(plain), rel=1e-6)  # the Trainer adds them up in float32
        torch.testing.assert_close(weights(trainer.model), weights(plain.model), rtol=0, atol=1e-12)
    return trainer


def weighted(outputs, labels, num_items_in_batch=None):
    """A criterion of the user's: some classes weigh more, and items are counted as the Trainer asks."""
    logits = outputs["logits"]
    weight = torch.linspace(1, 2, logits.shape[-1], dtype=logits.dtype)
    value = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), weight=weight, reduction="sum")
    return value / (labels.ne(-100).sum() if num_items_in_batch is None else num_items_in_batch)


# Without a method


@pytest.mark.parametrize(("method", "drop"), [(ERM(), 0.1), (SAM(L2(0.0)), 0.0)], ids=named)
@pytest.mark.parametrize(
    ("model", "task", "options"),
    [
        ("sequence", "sequence", {"accumulate": 2, "plain": Divides}),
        ("sequence", "sequence", {"label_smoothing_factor": 0.1}),
        ("sequence", "sequence", {"compute_loss_func": weighted}),
        ("token", "token", {}),
        ("causal", "causal", {}),
        ("causal", "causal", {"bf16": True}),
        ("gpt2", "causal", {}),
        ("gpt2", "causal", {"bf16": True}),
        ("t5", "translation", {}),
        ("t5", "translation", {"bf16": True}),
        ("causal", "causal", {"label_smoothing_factor": 0.1}),
        ("sequence", "sequence", {"bf16": True, "accumulate": 2, "plain": Divides}),
    ],
    ids=named,
)
def test_without_a_perturbation_it_is_the_trainer_bit_for_bit(tmp_path, model, task, options, method, drop):
    compare(tmp_path, partial(MODELS[model], drop=drop), task, method, **options)


@pytest.mark.parametrize("method", [ERM(), SAM(L2(0.0)), MSAM(1, ERM()), KSAM(4, ERM())], ids=named)
def test_tokens_are_accumulated_as_by_the_trainer(tmp_path, method):
    compare(tmp_path, double, "causal", method, exactly=False, accumulate=3, optim="sgd")


ACCUMULATED = [
    (method, whole)
    for one in (ERM(), SAM(0.3), BiSAM(0.3), BiSAM(0.3, PerExample(NegLog())), BiSAM(0.3, ExactMatch(NegLog())))
    for method, whole in [(one, MSAM(4, one) if one != ERM() else one)]
]


@pytest.mark.parametrize(("method", "whole"), ACCUMULATED, ids=named)
@pytest.mark.parametrize(("model", "task"), [("causal", "causal"), ("gpt2", "causal"), ("t5", "translation")])
def test_accumulated_tokens_are_those_of_one_large_batch(tmp_path, method, whole, model, task):
    """To 1e-8: these models have norms, softmax and the loss in float32. Micro-batches have 4 to 24 tokens."""
    rows = examples(task, 24)
    options = {"rows": rows, "optim": "sgd", "train_sampling_strategy": "sequential", "max_steps": 2}
    options |= {"max_grad_norm": 0.0, "learning_rate": 0.1, "lr_scheduler_type": "constant"}

    def made_of():
        return MODELS[model]().double()

    parts, large = (
        trained(SharpnessAwareTrainer, tmp_path, made_of(), task, method=how, accumulate=n, **options, **size)
        for how, n, size in ((method, 3, {}), (whole, 1, {"per_device_train_batch_size": 12}))
    )
    torch.testing.assert_close(weights(parts.model), weights(large.model), rtol=0, atol=1e-8)
    assert losses(parts) == pytest.approx(losses(large), rel=1e-6)
    assert (weights(parts.model) - weights(made_of())).norm() > 1e-2


@old_name
@pytest.mark.parametrize(("model", "task", "names"), [("causal", "causal", "q_proj"), ("t5", "translation", "q")])
def test_accumulated_tokens_of_adapters(tmp_path, model, task, names):
    def adapted():
        adapters = peft.LoraConfig(r=2, target_modules=[names], init_lora_weights=False)
        return peft.get_peft_model(MODELS[model]().double(), adapters).double()

    options = {"optim": "sgd", "train_sampling_strategy": "sequential", "max_steps": 1, "max_grad_norm": 0.0}
    parts, large = (
        trained(SharpnessAwareTrainer, tmp_path, adapted(), task, method=how, accumulate=n, **options, **size)
        for how, n, size in (
            (BiSAM(0.3), 3, {}),
            (MSAM(4, BiSAM(0.3)), 1, {"per_device_train_batch_size": 12}),
        )
    )
    torch.testing.assert_close(weights(parts.model), weights(large.model), rtol=0, atol=1e-8)
    before = {name: p.detach().clone() for name, p in adapted().named_parameters()}
    moved = {name for name, p in parts.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "lora_" in name}


def test_a_micro_batch_without_tokens_counts_nothing(tmp_path):
    rows = examples("causal")
    for row in rows[4:8]:
        row["labels"][:] = -100
    options = {"rows": rows, "train_sampling_strategy": "sequential", "optim": "sgd"}
    compare(tmp_path, double, "causal", ERM(), False, accumulate=2, **options)
    trainer = trained(SharpnessAwareTrainer, tmp_path, double(), "causal", method=BiSAM(), accumulate=2, **options)
    assert weights(trainer.model).isfinite().all()


def test_a_criterion_is_accumulated_as_by_the_trainer(tmp_path):
    model = lambda: bert("Token").double()  # noqa: E731
    compare(tmp_path, model, "token", ERM(), False, accumulate=3, optim="sgd", compute_loss_func=weighted)


def test_evaluation_and_prediction_are_the_trainers(tmp_path):
    data = {"eval_dataset": examples("sequence", 8), "label_smoothing_factor": 0.1}
    plain = made(Trainer, tmp_path, bert(), "sequence", **data)
    trainer = made(SharpnessAwareTrainer, tmp_path, bert(), "sequence", method=BiSAM(), **data)
    assert trainer.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]
    there, here = (t.predict(data["eval_dataset"]) for t in (plain, trainer))
    assert (there.predictions == here.predictions).all()
    with torch.no_grad():
        batch = {name: torch.stack([row[name] for row in data["eval_dataset"]]) for name in data["eval_dataset"][0]}
        trainer.model.train()
        assert torch.equal(*(t.compute_loss(trainer.model, dict(batch)) for t in (plain, trainer)))


# Against a loop by hand


def by_hand(model, task, accumulate, rho, *, rise=None, smoothing=0.0, loss=None, steps=2, lr=0.1):
    """BiSAM (-log), each micro-batch by itself, on the examples in their order; in float64."""
    rows = examples(task)
    model = model().train()
    parameters = list(model.parameters())
    shift = 1 if task == "causal" else 0

    def flat(batch):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        logits, labels = logits, batch["labels"]
        if shift:
            logits, labels = logits[:, :-1], labels[:, 1:]
        return logits.reshape(-1, logits.shape[-1])[labels.flatten() != -100], labels[labels != -100]

    def bound(logits, labels):
        margins = logits - logits[torch.arange(len(labels)), labels][:, None]
        return (1 + F.logsigmoid(margins - torch.tensor(torch.e - 1, dtype=torch.float64).log())).logsumexp(1).mean()

    def descent(logits, labels):
        if loss is not None:
            return loss({"logits": logits}, labels)
        return F.cross_entropy(logits, labels, label_smoothing=smoothing)

    for step in range(steps):
        batches = []
        for part in range(accumulate):
            first = 4 * (step * accumulate + part)
            chosen = rows[first : first + 4]
            batches.append({name: torch.stack([row[name] for row in chosen]) for name in chosen[0]})
        counts = [(batch["labels"][..., shift:] if shift else batch["labels"]).ne(-100).sum() for batch in batches]
        total = [torch.zeros_like(p) for p in parameters]
        for batch, count in zip(batches, counts, strict=True):
            g = torch.autograd.grad(bound(*flat(batch)), parameters, allow_unused=True)
            g = [torch.zeros_like(p) if t is None else t for t, p in zip(g, parameters, strict=True)]
            norm = torch.stack([t.norm() for t in g]).norm()
            radius = rho if rise is None else min(float(rise / norm), rho)
            saved = [p.detach().clone() for p in parameters]
            with torch.no_grad():
                for p, t in zip(parameters, g, strict=True):
                    p.add_(t * (radius / norm))
            h = torch.autograd.grad(descent(*flat(batch)), parameters, allow_unused=True)
            with torch.no_grad():
                for p, old, sum_, t in zip(parameters, saved, total, h, strict=True):
                    p.copy_(old)
                    sum_.add_(0 if t is None else t * (count.double() / sum(counts)))
        with torch.no_grad():
            for p, t in zip(parameters, total, strict=True):
                p.sub_(lr * t)
    return weights(model)


@pytest.mark.parametrize(
    ("task", "accumulate", "options", "method"),
    [
        ("sequence", 2, {}, BiSAM(0.3)),
        ("sequence", 2, {"label_smoothing_factor": 0.1}, BiSAM(0.3)),
        ("token", 2, {}, BiSAM(0.3)),
        ("causal", 1, {}, BiSAM(0.3)),
        ("causal", 2, {}, BiSAM(0.3)),
        ("causal", 2, {"label_smoothing_factor": 0.1}, BiSAM(0.3)),
        ("token", 2, {"compute_loss_func": weighted}, BiSAM(0.3)),
        ("causal", 2, {}, LESAM(0.1, rho_max=0.7, ascent=NegLog())),
    ],
    ids=named,
)
def test_bisam_is_a_loop_by_hand(tmp_path, task, accumulate, options, method):
    model = double if task == "causal" else lambda: MODELS[task]().double()
    smoothing = options.get("label_smoothing_factor", 0.0)
    rho, rise = (0.3, None) if method == BiSAM(0.3) else (0.7, 0.1)
    expected = by_hand(
        model, task, accumulate, rho, rise=rise, smoothing=smoothing, loss=options.get("compute_loss_func")
    )
    settings = {"optim": "sgd", "learning_rate": 0.1, "weight_decay": 0.0, "max_grad_norm": 0.0, "max_steps": 2}
    trainer = made(
        SharpnessAwareTrainer,
        tmp_path,
        model(),
        task,
        method=method,
        accumulate=accumulate,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        **settings,
        **options,
    )
    trainer.train()
    near = 1e-6 if smoothing else 1e-12  # the Trainer smooths in float32
    torch.testing.assert_close(weights(trainer.model), expected, rtol=0, atol=near)
    assert (weights(trainer.model) - weights(model())).norm() > 1e-3


# The method's view


def whole(rows) -> dict[str, torch.Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def laid_out(task):
    def forward(model, batch):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        if task == "causal":
            return logits[:, :-1].movedim(-1, 1), batch["labels"][:, 1:]
        return (logits.movedim(-1, 1) if task == "token" else logits), batch["labels"]

    return forward


def gradient(model, loss) -> torch.Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat(
        [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in model.parameters()]
    )


@pytest.mark.parametrize("task", ["sequence", "token", "causal"])
@pytest.mark.parametrize(
    "method",
    [
        KSAM(2, ERM()),
        KSAM(3, BiSAM(0.3)),
        ESAM(gamma=0.25),
        ESAM(gamma=0.5, ascent=NegLog()),
        ESAM(gamma=0.5, ascent=NegLog(), select=cross_entropy),
        MSAM(3, BiSAM(0.3)),
        MSAM(2, KSAM(1, SAM())),
        FunctionalSAM(L2(0.3)),
        SAM(L2(0.3), descent=cross_entropy),
    ],
    ids=named,
)
def test_it_sees_what_it_would_see_without_the_trainer(tmp_path, task, method):
    model = double() if task == "causal" else MODELS[task]().double()
    trainer = made(SharpnessAwareTrainer, tmp_path, model, task, method=method)
    batch = whole(examples(task, 8))
    counted = (batch["labels"][..., 1:] if task == "causal" else batch["labels"]).ne(-100).sum()
    model.train()
    values = []
    for loss in (
        lambda: trainer.compute_loss(model, BatchEncoding(batch), num_items_in_batch=counted),
        lambda: SharpnessAware(model, method, cross_entropy, laid_out(task))(batch),
    ):
        torch.manual_seed(0)
        values.append((value := loss(), gradient(model, value)))
    for here, there in zip(*values, strict=True):
        torch.testing.assert_close(here, there, rtol=1e-12, atol=1e-13)
    assert values[0][1].norm() > 0.01


def test_an_adversary_keeps_no_graph_of_the_training_loss(tmp_path):
    """In a language model that would be two more tensors of the size of the logits."""
    made_of, alive = [], []

    def criterion(outputs, labels, num_items_in_batch=None):
        loss = F.cross_entropy(outputs["logits"], labels)
        made_of.append(weakref.ref(loss))
        return loss

    class Bound(NegLog):
        def __call__(self, outputs, targets):
            alive.append(made_of[-1]() is not None)
            return super().__call__(outputs, targets)

    method = SAM(L2(0.3), ascent=Bound())
    trained(SharpnessAwareTrainer, tmp_path, bert(), "sequence", method=method, compute_loss_func=criterion)
    assert alive == 3 * [False]


def test_examples_are_chosen_by_the_criterion_of_the_user(tmp_path):
    def rare(outputs, labels, num_items_in_batch=None):  # a loss that only the first class has
        logits = outputs["logits"]
        weight = torch.tensor([1.0, 0.0, 0.0], dtype=logits.dtype)
        return F.cross_entropy(logits, labels, weight=weight, reduction="sum") / len(labels)

    chosen = []

    def spy(oracle, batch):
        chosen.append(batch[0]["labels"])
        return ERM()(oracle, batch)

    model, batch = bert(), whole(examples("sequence", 8))
    batch["labels"] = torch.tensor([1, 2, 0, 1, 2, 0, 1, 2])
    trainer = made(SharpnessAwareTrainer, tmp_path, model, "sequence", method=KSAM(2, spy), compute_loss_func=rare)
    trainer.compute_loss(model.train(), batch)
    assert chosen[0].tolist() == [0, 0]


def test_an_objective_of_a_scalar_may_say_the_loss_of_each_example():
    class Mean:
        def __call__(self, outputs, targets):
            return self.per_example(outputs, targets).mean()

        def per_example(self, outputs, targets):
            assert not torch.is_grad_enabled() or outputs.requires_grad
            return (outputs.squeeze(1) - targets) ** 2

    model = torch.nn.Linear(3, 1)
    x, y = torch.randn(8, 3), torch.randn(8)
    seen = []

    def spy(oracle, batch):
        seen.append(batch[1])
        return ERM()(oracle, batch)

    sharp = SharpnessAware(model, KSAM(3, spy), Mean())
    sharp(x, y)
    hardest = ((model(x).squeeze(1) - y) ** 2).topk(3).indices.sort().values
    assert torch.equal(seen[0], y[hardest])
    assert sharp.clean.per_example.shape == (8,)
    with pytest.raises(TypeError, match="per_example"):
        SharpnessAware(model, KSAM(3), lambda outputs, targets: outputs.mean())(x, y)


class WithoutLogits(Trainer):
    """As TRL's SFTTrainer: its loss needs no logits, and it computes them again for who asks."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        if not return_outputs:
            return loss
        with torch.no_grad():
            return loss, model(**inputs)


class OfThem(SharpnessAwareTrainer, WithoutLogits):
    """A trainer whose bounds have no graph."""


@pytest.mark.parametrize("method", [BiSAM(0.3), SAM(L2(0.3), ascent=NegLog())], ids=named)
def test_a_bound_of_logits_without_a_graph_is_refused(tmp_path, method):
    trainer = made(OfThem, tmp_path, gpt2(), "causal", method=method)
    with pytest.raises(ValueError, match=r"WithoutLogits\.compute_loss returns have no graph.*Trainer\.compute_loss"):
        trainer.train()


@pytest.mark.parametrize("method", [ERM(), SAM(L2(0.3))], ids=named)
def test_the_training_loss_needs_no_logits(tmp_path, method):
    ours = trained(OfThem, tmp_path / "ours", gpt2(), "causal", method=method)
    theirs = trained(SharpnessAwareTrainer, tmp_path / "theirs", gpt2(), "causal", method=method)
    assert torch.equal(weights(ours.model), weights(theirs.model))


def test_the_loss_has_the_same_scale_whatever_is_accumulated(tmp_path):
    seen = []

    def spy(oracle, batch):
        seen.append(oracle.query(batch).value)
        return ERM()(oracle, batch)

    model, batch = llama().train(), whole(examples("causal", 8))
    trainer = made(SharpnessAwareTrainer, tmp_path, model, "causal", method=spy)
    for items in (None, 40, torch.tensor(400.0), torch.tensor(7)):
        trainer.compute_loss(model, dict(batch), num_items_in_batch=items)
    torch.testing.assert_close(torch.stack(seen), seen[0].expand(4))


def test_what_was_seen_at_the_weights_is_at_hand(tmp_path):
    model, batch = bert("Token"), whole(examples("token", 8))
    trainer = made(SharpnessAwareTrainer, tmp_path, model, "token", method=BiSAM(0.3), label_smoothing_factor=0.1)
    plain = model.train()(**batch)
    loss, outputs = trainer.compute_loss(model, dict(batch), return_outputs=True)
    assert torch.equal(outputs.logits, plain.logits)
    assert outputs.loss == loss
    clean = trainer.sharp.clean
    flat = plain.logits.flatten(0, 1), batch["labels"].flatten()
    torch.testing.assert_close(clean.value, F.cross_entropy(*flat, label_smoothing=0.1))
    assert clean.per_example.shape == (8,)
    assert loss > clean.value


def test_a_criterion_is_what_was_seen_at_the_weights(tmp_path):
    model, batch = gpt2(), whole(examples("causal", 8))
    trainer = made(
        SharpnessAwareTrainer,
        tmp_path,
        model,
        "causal",
        method=BiSAM(),
        compute_loss_func=lambda o, y, **_: right(o, y),
    )

    def right(outputs, labels):
        return F.cross_entropy(outputs["logits"][:, :-1].flatten(0, 1), labels[:, 1:].flatten()) * 3

    model.train()
    trainer.compute_loss(model, dict(batch))
    torch.testing.assert_close(trainer.sharp.clean.value, right(model(**batch), batch["labels"]))


@pytest.mark.parametrize("task", ["regression", "several"])
def test_without_classes_the_models_own_loss_is_what_is_climbed(tmp_path, task):
    config = {"num_labels": 1} if task == "regression" else {"problem_type": "multi_label_classification"}
    compare(tmp_path, partial(bert, **config), task, SAM(L2(0.0)), plain=Divides, accumulate=2)
    trained(SharpnessAwareTrainer, tmp_path, bert(**config), task, method=SAM(L2(0.1)))
    for method in (BiSAM(), BiSAM(bound=PerExample()), KSAM(2), FunctionalSAM(), SAM(descent=cross_entropy)):
        model = bert(**config)
        before = weights(model)
        with pytest.raises(ValueError, match=r"classes.*use a method that climbs the training loss.*SAM\(\)"):
            trained(SharpnessAwareTrainer, tmp_path, model, task, method=method)
        assert torch.equal(weights(model), before)


def test_the_bound_of_several_labels_is_climbed(tmp_path):
    several = partial(bert, problem_type="multi_label_classification")
    compare(tmp_path, several, "several", BiSAM(0.0, Binary()), plain=Divides, accumulate=2)
    ends = []
    for method in (SAM(L2(0.1)), BiSAM(0.1, Binary()), BiSAM(0.1, ExactMatch(Binary()))):
        trainer = trained(SharpnessAwareTrainer, tmp_path, several(), "several", method=method)
        ends.append(weights(trainer.model))
    assert all(not torch.equal(ends[i], ends[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    batch = trainer.data_collator(examples("several", 4))
    trainer.model.train()
    trainer.compute_loss(trainer.model, dict(batch))
    clean = trainer.sharp.clean
    expected = F.binary_cross_entropy_with_logits(trainer.model(**batch).logits, batch["labels"])
    torch.testing.assert_close(clean.value, expected)
    for task, config in (("regression", {"num_labels": 1}), ("sequence", {})):
        with pytest.raises(ValueError, match="Binary needs one label for each logit"):
            trained(SharpnessAwareTrainer, tmp_path, bert(**config), task, method=BiSAM(0.1, Binary()))


# Other duties of the Trainer


@old_name
def test_adapters_alone_are_trained(tmp_path):
    def model():
        return peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.0))

    frozen = {name: p.detach().clone() for name, p in model().named_parameters() if not p.requires_grad}
    compare(tmp_path, model, "causal", SAM(L2(0.0)))
    trainer = made(SharpnessAwareTrainer, tmp_path, model(), "causal", method=BiSAM(), max_steps=2)
    trainer.train()
    now = dict(trainer.model.named_parameters())
    assert all(torch.equal(now[name], p) for name, p in frozen.items())
    assert len(frozen) < len(now)
    again = made(
        SharpnessAwareTrainer, tmp_path, model(), "causal", method=BiSAM(), max_steps=2, activation_checkpointing=True
    )
    again.train()
    assert torch.equal(weights(again.model), weights(trainer.model))


def test_activation_checkpointing_changes_nothing(tmp_path):
    options = {"method": BiSAM(0.3), "accumulate": 2}
    ends = [
        weights(
            trained(SharpnessAwareTrainer, tmp_path, llama(), "causal", activation_checkpointing=on, **options).model
        )
        for on in (False, True)
    ]
    assert torch.equal(*ends)


def test_a_scaler_is_told_to_the_loss(tmp_path):
    """As with fp16=True, which needs a device: a power of two changes no bit, and an overflow skips the step."""

    class Scaler(torch.amp.GradScaler):
        scaled = 0

        def scale(self, outputs):
            self.scaled += 1
            return super().scale(outputs)

    def large(outputs, labels, num_items_in_batch=None):
        return F.cross_entropy(outputs["logits"], labels) * 256

    ends = {}
    for scale in (None, 2.0**10, 2.0**126):
        options = {"method": LookSAM(L2(0.3)), "compute_loss_func": large, "max_grad_norm": 0.0}
        trainer = made(SharpnessAwareTrainer, tmp_path, bert(), "sequence", **options)
        if scale is not None:
            trainer.accelerator.scaler = scaler = Scaler("cpu", init_scale=scale)
        trainer.train()
        ends[scale] = weights(trainer.model)
        assert scale != 2.0**10 or scaler.scaled == 3 + (2 + 1 + 1)  # the losses, and the queries inside
    assert torch.equal(ends[None], ends[2.0**10])
    assert torch.equal(ends[2.0**126], weights(bert()))
    assert scaler.get_scale() == 2.0**123


@pytest.mark.parametrize(
    ("method", "gradients", "forwards"),
    [
        ({"method": ERM()}, 1, 0),
        ({"method": SAM()}, 2, 0),
        ({"method": MSAM(1, SAM())}, 2, 0),
        ({"method": KSAM(1, SAM())}, 0.5, 1),
        ({"method": Every(2, SAM())}, 1.5, 0),
        ({"method_of": lambda optimizer: SAMPa(ahead=next_step(optimizer), ascent=NegLog())}, 3, 0),
    ],
    ids=named,
)
def test_the_log_says_what_steps_cost(tmp_path, method, gradients, forwards):
    options = {"accumulate": 2, "max_steps": 4, "logging_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    trainer = trained(
        SharpnessAwareTrainer, tmp_path, bert(), "sequence", eval_dataset=examples("sequence"), **method, **options
    )
    lines = [line for line in trainer.state.log_history if "loss" in line]
    costs = [(line["gradients_per_step"], line["forwards_per_step"]) for line in lines]
    first = 0.5 if "method_of" in method else 0  # the first step of SAMPa, one of four here, has two queries more
    assert costs == [(gradients + first, forwards), (gradients, forwards)]
    assert all(0 < line["seconds_per_query"] < 1 for line in lines)
    others = [line for line in trainer.state.log_history if "loss" not in line]
    assert len(others) == 3
    assert not any("gradients_per_step" in line for line in others)


@pytest.mark.parametrize("task", ["sequence", "causal"])
def test_the_log_has_the_statistics_of_the_steps_since_its_last_line(tmp_path, task, monkeypatch):
    each, statistics = [], importlib.import_module("bisam.statistics")

    class Mean(statistics.StatsMean):
        def add(self, stats):
            each.append(stats.to_dict())
            super().add(stats)

    monkeypatch.setattr(integration, "StatsMean", Mean)
    options = {"accumulate": 2, "max_steps": 4, "logging_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    options |= {"method": BiSAM(0.1), "eval_dataset": examples(task)}
    trainers = [
        trained(SharpnessAwareTrainer, tmp_path / str(stats), MODELS[task](), task, stats=stats, **options)
        for stats in (True, False)
    ]
    assert torch.equal(*[weights(trainer.model) for trainer in trainers])
    lines, plain = ([line for line in t.state.log_history if "loss" in line] for t in trainers)
    assert len(each) == 8
    for line, steps in zip(lines, (each[:4], each[4:]), strict=True):
        for name in statistics.NAMES:
            assert line[name] == pytest.approx(sum(step[name] for step in steps) / 4, rel=1e-5)
        assert line["displacement_norm"] == pytest.approx(0.1, rel=1e-4)
    assert not any(set(statistics.NAMES) & set(line) for line in plain)
    assert not any(set(statistics.NAMES) & set(line) for line in trainers[0].state.log_history if "loss" not in line)


def test_a_loss_of_ones_own_is_inside(tmp_path):
    class Mine(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs.pop("labels")
            outputs = model(**inputs)
            loss = F.cross_entropy(outputs.logits, labels, weight=torch.tensor([1.0, 2.0, 3.0]))
            return (loss, outputs) if return_outputs else loss

    class Sharp(SharpnessAwareTrainer, Mine):
        pass

    class Wrong(SharpnessAwareTrainer):
        compute_loss = Mine.compute_loss

    ends = [trained(cls, tmp_path, bert(), "sequence", **k) for cls, k in ((Mine, {}), (Sharp, {"method": ERM()}))]
    assert torch.equal(*[weights(trainer.model) for trainer in ends])
    with pytest.raises(RuntimeError, match=r"class Mine\(SharpnessAwareTrainer, MyTrainer\)"):
        trained(Wrong, tmp_path, bert(), "sequence", method=SAM())


# Checkpoints

METHODS = {
    "looksam": {"method": LookSAM(L2(0.3), k=2)},
    "sampa": {"method_of": lambda optimizer: SAMPa(ahead=next_step(optimizer))},
    "every": {"method": Every(2, BiSAM(0.3))},
    "bsam": {"method": BSAM(64, 0.01)},
    "mesa": {"method": MESA(BiSAM(0.3), decay=0.9)},
}
SAVED = {"save_strategy": "steps", "save_steps": 3, "max_steps": 5, "accumulate": 2}


@pytest.mark.parametrize("name", METHODS)
def test_a_resumed_run_ends_as_if_nothing_had_happened(tmp_path, name):
    model = partial(bert, drop=0.1)
    straight = trained(SharpnessAwareTrainer, tmp_path, model(), "sequence", **METHODS[name], **SAVED)
    checkpoint = tmp_path / "checkpoint-3"
    resumed = trained(
        SharpnessAwareTrainer, tmp_path / "on", model(), "sequence", str(checkpoint), **METHODS[name], **SAVED
    )
    assert losses(resumed) == losses(straight)
    assert torch.equal(weights(resumed.model), weights(straight.model))
    assert [path.name for path in checkpoint.glob("sharpness_aware*")] == ["sharpness_aware_0.pt"]
    saved = torch.load(checkpoint / "sharpness_aware_0.pt", weights_only=True)["sharp"]
    assert saved["step"] == 6
    assert bool(saved["state"]) == (name != "every")


@old_name
def test_adapters_resume(tmp_path):
    def model():
        torch.manual_seed(0)
        return peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.1))

    options = {"method": LookSAM(L2(0.3), k=2), **SAVED}
    straight = trained(SharpnessAwareTrainer, tmp_path, model(), "causal", **options)
    resumed = trained(
        SharpnessAwareTrainer, tmp_path / "on", model(), "causal", str(tmp_path / "checkpoint-3"), **options
    )
    assert torch.equal(weights(resumed.model), weights(straight.model))


def test_a_checkpoint_that_does_not_fit_leaves_the_weights(tmp_path):
    trained(SharpnessAwareTrainer, tmp_path, bert(), "sequence", method=LookSAM(), **SAVED)
    checkpoint = tmp_path / "checkpoint-3"
    memory = checkpoint / "sharpness_aware_0.pt"

    def resume(**method):
        model = bert()
        before = weights(model)
        trainer = made(SharpnessAwareTrainer, tmp_path / "on", model, "sequence", **method, **SAVED)
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint))
        except ValueError:
            assert torch.equal(weights(model), before)
            raise

    for method in ({"method": BSAM(64, 0.01)}, METHODS["sampa"]):
        with pytest.raises(ValueError, match=r"the memory of LookSAM, and the method here is (BSAM|SAMPa)"):
            resume(**method)
    saved = torch.load(memory, weights_only=True)
    torch.save({**saved, "processes": 2}, memory)
    with pytest.raises(ValueError, match=r"saved by 2 process\(es\), and here are 1: what LookSAM remembers"):
        resume(method=LookSAM())
    torch.save({**saved, "processes": tmp_path}, memory)  # an object that torch would have to run code for
    with pytest.raises(ValueError, match="is damaged, or holds objects other than tensors") as raised:
        resume(method=LookSAM())
    assert "weights_only" not in str(raised.value)
    memory.unlink()
    with pytest.warns(UserWarning, match="begins with an empty memory"):
        resume(method=LookSAM())


def test_a_memory_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    trainer = made(SharpnessAwareTrainer, tmp_path, bert(), "sequence", method=LookSAM())
    trainer.train()
    save = torch.save

    def break_off(state, path, **options):
        if isinstance(state, dict) and "sharp" in state:
            Path(path).write_bytes(b"half")
            raise OSError("disk full")
        save(state, path, **options)

    monkeypatch.setattr(torch, "save", break_off)
    with pytest.raises(OSError, match="disk full"):
        trainer._save_checkpoint(trainer.model, None)
    assert not list(tmp_path.rglob("sharpness_aware_*.pt"))


# Two processes

TOGETHER = {"accumulate": 2, "optim": "sgd", "train_sampling_strategy": "sequential", "max_steps": 2}


def replicas(folder: str) -> dict[str, torch.Tensor]:
    gc.freeze()
    options = {"ddp_backend": "gloo", "per_device_train_batch_size": 2, **TOGETHER}
    run = partial(trained, folder=Path(folder), task="causal", **options)
    ends = {
        "bisam": run(SharpnessAwareTrainer, model=double(), method=BiSAM(0.3)),
        "global": run(SharpnessAwareTrainer, model=double(), method=SAM(L2(0.3)), scope="global"),
        "alone": run(SharpnessAwareTrainer, model=double(), method=ERM(), average_tokens_across_devices=False),
        "plain alone": run(Trainer, model=double(), average_tokens_across_devices=False),
        "bert": run(SharpnessAwareTrainer, model=bert().double(), task="sequence", method=ERM()),
        "plain bert": run(Divides, model=bert().double(), task="sequence", average_tokens_across_devices=False),
    }
    looks = {"method": LookSAM(L2(0.3), k=4), **options, **SAVED, "max_steps": 4}
    ends["straight"] = trained(SharpnessAwareTrainer, Path(folder), llama(), "causal", **looks)
    checkpoint = f"{folder}/checkpoint-3"
    ends["resumed"] = trained(SharpnessAwareTrainer, Path(folder) / "on", llama(), "causal", checkpoint, **looks)
    return {name: weights(trainer.model) for name, trainer in ends.items()}


def test_replicas_perturb_on_their_part_of_the_batch(tmp_path):
    first, second = ranks.run(2, replicas, str(tmp_path), with_group=False)
    assert all(torch.equal(first[name], second[name]) for name in first)
    single, whole = (
        trained(SharpnessAwareTrainer, tmp_path, double(), "causal", method=method, **TOGETHER)
        for method in (MSAM(2, BiSAM(0.3)), SAM(L2(0.3)))
    )
    close = partial(torch.testing.assert_close, rtol=0, atol=1e-12)
    close(first["bisam"], weights(single.model))
    close(first["global"], weights(whole.model))
    close(first["alone"], first["plain alone"])
    assert torch.equal(first["bert"], first["plain bert"])
    assert torch.equal(first["straight"], first["resumed"])
    memories = [torch.load(tmp_path / "checkpoint-3" / f"sharpness_aware_{i}.pt", weights_only=True) for i in range(2)]
    v = [memory["sharp"]["state"]["v"]["__vector__"][0] for memory in memories]
    assert not torch.equal(*v)


# Refusals


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({}, "give SharpnessAwareTrainer a method="),
        ({"method": SAM(), "method_of": SAMPa}, "not both"),
        ({"method": SAM}, r"method is the class SAM, not an instance: write SAM\(...\)"),
        ({"method": "sam"}, r"method must be SAM\(\), BiSAM\(\) or another .*, got 'sam'"),
        ({"method_of": SAMPa}, "method_of is the class SAMPa"),
        ({"method_of": SAM()}, r"method_of is the method SAM\(.*, and no function that makes one: use method="),
    ],
    ids=named,
)
def test_a_method_that_is_none_is_refused_at_once(tmp_path, method, message):
    with pytest.raises(TypeError, match=message):
        made(SharpnessAwareTrainer, tmp_path, bert(), "sequence", **method)


def test_a_function_that_makes_no_method_is_refused(tmp_path):
    with pytest.raises(TypeError, match="method_of's method must be SAM"):
        trained(SharpnessAwareTrainer, tmp_path, bert(), "sequence", method_of=lambda optimizer: None)


def test_several_devices_in_one_process_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    with pytest.raises(ValueError, match=r"2 devices in one process \(nn.DataParallel\).*torchrun"):
        made(SharpnessAwareTrainer, tmp_path, bert(), "sequence", method=SAM())


def test_reentrant_checkpointing_is_refused(tmp_path):
    reentrant = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(ValueError, match=r'activation_checkpointing_kwargs=\{"use_reentrant": False\}'):
        made(SharpnessAwareTrainer, tmp_path, bert(), "sequence", method=SAM(), **reentrant)


@pytest.mark.parametrize(
    ("deepspeed", "version", "message"),
    [(True, None, "DeepSpeed.*FSDP2"), (False, 1, "FSDP1.*version"), (False, 2, None)],
)
def test_wrappers_that_hide_parameters_are_refused(deepspeed, version, message):
    state = SimpleNamespace(fsdp_plugin=version and SimpleNamespace(fsdp_version=version))
    arguments = SimpleNamespace(n_gpu=1, gradient_checkpointing=False, gradient_checkpointing_kwargs=None)
    trainer = SimpleNamespace(
        args=arguments,
        accelerator=SimpleNamespace(state=state),
        is_deepspeed_enabled=deepspeed,
        is_fsdp_xla_enabled=False,
    )
    if message is None:
        integration._refuse(trainer)
        return
    with pytest.raises(ValueError, match=message):
        integration._refuse(trainer)


def test_an_old_transformers_is_refused(tmp_path, monkeypatch):
    begin = Trainer.__init__

    def old(self, *args, **kwargs):
        begin(self, *args, **kwargs)
        del self._loss_shifts_labels

    monkeypatch.setattr(Trainer, "__init__", old)
    with pytest.raises(ImportError, match="needs a newer transformers"):
        made(SharpnessAwareTrainer, tmp_path, bert(), "sequence", method=SAM())


def test_without_transformers_the_import_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    for module in [name for name in sys.modules if name.startswith("bisam.integrations.transformers")]:
        monkeypatch.delitem(sys.modules, module)
    with pytest.raises(ImportError, match=r'needs transformers: pip install "bisam\[transformers\]"'):
        importlib.import_module("bisam.integrations.transformers")
