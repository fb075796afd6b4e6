"""The callback of the Trainer: records of a monitor in the log and in checkpoints, without an effect on training."""

from __future__ import annotations

import gc
import json
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bisam import ERM, BiSAM, LookSAM, NegLog
from bisam.analysis import flips, sharpness
from bisam.perturbations import L2

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from bisam.integrations.transformers import AnalysisCallback, SharpnessAwareTrainer  # noqa: E402

WORDS, LENGTH, CLASSES = 20, 6, 3
Rows = list[dict[str, Tensor]]


@pytest.fixture(autouse=True, scope="module")
def _quick():
    gc.freeze()  # train() begins with a collection: not of all that was imported, each time
    yield
    gc.unfreeze()


def bert() -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=WORDS,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        num_labels=CLASSES,
        max_position_embeddings=8,
    )
    return transformers.BertForSequenceClassification(config)


def regression() -> Any:
    torch.manual_seed(0)
    model = bert()
    config = model.config
    config.num_labels = 1
    return transformers.BertForSequenceClassification(config)


def gpt2() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=16, n_layer=1, n_head=2, vocab_size=WORDS, n_positions=8, bos_token_id=1, eos_token_id=2
    )
    return transformers.GPT2LMHeadModel(config)


def rows(task: str, n: int, seed: int = 1) -> Rows:
    draw = torch.Generator().manual_seed(seed)
    found: Rows = []
    for i in range(n):
        words = torch.randint(1, 4, (LENGTH,), generator=draw)  # few, so that some predictions are right
        labels = {
            "classes": words[0] % CLASSES,
            "tokens": torch.where(torch.arange(LENGTH) < i % LENGTH, -100, words),  # an uneven number of tokens counts
            "regression": torch.rand((), generator=draw),
        }[task]
        found.append({"input_ids": words, "attention_mask": torch.ones_like(words), "labels": labels})
    return found


MODELS = {"classes": bert, "tokens": gpt2, "regression": regression}


def made(folder: Any, task: str, method: Any, **options: Any) -> SharpnessAwareTrainer:
    arguments = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 4,
        "logging_steps": 1,
        "learning_rate": 0.03,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **options,
    }
    data = {"train_dataset": rows(task, 24), "eval_dataset": rows(task, 12, 2)}
    return SharpnessAwareTrainer(MODELS[task](), transformers.TrainingArguments(**arguments), method=method, **data)


def watched(trainer: SharpnessAwareTrainer, *args: Any, **options: Any) -> AnalysisCallback:
    callback = AnalysisCallback(trainer, trainer.get_eval_dataloader(), *args, **options)
    trainer.add_callback(callback)
    return callback


def logged(trainer: SharpnessAwareTrainer) -> list[dict[str, float]]:
    """The lines of the log of the training itself, without its times."""
    lines = [line for line in trainer.state.log_history if "loss" in line]
    return [{k: v for k, v in line.items() if "second" not in k} for line in lines]


def weights(trainer: SharpnessAwareTrainer) -> Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


@pytest.mark.parametrize(
    ("task", "options"),
    [("classes", {}), ("tokens", {"bf16": True}), ("tokens", {"label_smoothing_factor": 0.1})],
    ids=str,
)
def test_records_are_logged_and_training_does_not_change(tmp_path, task, options):
    trainer = made(tmp_path, task, LookSAM(L2(0.1), k=2, ascent=NegLog()), **options)
    callback = watched(trainer, 10.0, every=2, batches=2)
    trainer.train()
    history = callback.monitor.history
    assert [record["step"] for record in history] == [2, 4]
    lines = [line for line in trainer.state.log_history if "analysis/sharpness" in line]
    for line, record in zip(lines, history, strict=True):
        values = {f"analysis/{name}": value for name, value in record.items() if name != "step"}
        assert line == {"step": record["step"], "epoch": line["epoch"], **values}
    assert history[1]["sharpness"] > 0
    plain = made(tmp_path, task, LookSAM(L2(0.1), k=2, ascent=NegLog()), **options)
    plain.train()
    assert torch.equal(weights(trainer), weights(plain))
    assert logged(trainer) == logged(plain)


@pytest.mark.parametrize("task", ["classes", "tokens"])
def test_the_loss_of_a_record_is_that_of_an_evaluation_and_flips_count_labels(tmp_path, task):
    trainer = made(tmp_path, task, BiSAM(0.1))
    callback = watched(trainer, 10.0, every=4)
    trainer.train()
    record = callback.monitor.history[-1]
    model, batches = trainer.model.eval(), list(trainer.get_eval_dataloader())
    values, right, flipped, labels = [], 0, 0, 0
    for batch in batches:
        shift = task == "tokens"
        logits = lambda: model(**batch).logits[:, :-1] if shift else model(**batch).logits  # noqa: B023, E731
        y = batch["labels"][:, 1:] if shift else batch["labels"]
        loss = model(**batch).loss
        values.append(float(loss.detach()))
        parameters = list(model.parameters())
        grads = torch.autograd.grad(loss, parameters, allow_unused=True)
        grads = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)]
        norm = torch.stack([g.norm() for g in grads]).norm()
        before = logits().argmax(-1) == y
        saved = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            for p, g in zip(parameters, grads, strict=True):
                p += g * (10.0 / norm)
            after = logits().argmax(-1) == y
            for p, old in zip(parameters, saved, strict=True):
                p.copy_(old)
        labels += int((y != -100).sum())
        right += int(before.sum())
        flipped += int((before & ~after).sum())
    assert record["sharpness_loss"] == pytest.approx(sum(values) / len(values), rel=1e-5)
    assert record["flips_error"] == pytest.approx(1 - right / labels)
    assert record["flips/SAM"] == pytest.approx(flipped / labels)
    assert flipped > 0
    if task == "classes":
        assert record["sharpness_loss"] == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-5)


def test_a_resumed_training_has_the_same_records(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    whole = made(tmp_path / "whole", "classes", BiSAM(0.1), **settings)
    expected = watched(whole, every=2)
    whole.train()
    again = made(tmp_path / "again", "classes", BiSAM(0.1), **settings)
    callback = watched(again, every=2)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert [record["step"] for record in expected.monitor.history] == [2, 4, 6]
    assert callback.monitor.history == expected.monitor.history
    assert torch.equal(weights(again), weights(whole))


def test_a_task_without_classes_is_told_once_and_trained(tmp_path):
    trainer = made(tmp_path, "regression", ERM())
    callback = watched(trainer, every=1)
    with pytest.warns(UserWarning, match="'flips' is left out .*: the 0-1 loss compares logits with labels"):
        trainer.train()
    assert [record["step"] for record in callback.monitor.history] == [1, 2, 3, 4]
    assert callback.monitor.history[-1].keys() == {"step", "sharpness", "sharpness_loss"}


def test_a_model_that_diverges_is_trained_to_the_end(tmp_path):
    trainer = made(tmp_path, "classes", ERM(), save_strategy="steps", save_steps=4)
    callback = watched(trainer, every=2)
    with torch.no_grad():
        trainer.model.classifier.weight[0, 0] = math.nan
    with pytest.warns(UserWarning, match="the record of step 2 is not finite"):
        trainer.train()
    assert math.isnan(callback.monitor.history[-1]["sharpness"])
    saved = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert saved["global_step"] == 4


def test_the_plain_loss_is_analysed_after_training(tmp_path):
    trainer = made(tmp_path, "classes", BiSAM(0.1))
    trainer.train()
    data = list(trainer.get_eval_dataloader())
    loss = trainer.plain_loss()
    rise = sharpness(loss, data, 0.3)
    model = trainer.model.eval()
    with torch.no_grad():
        plain = sum(float(F.cross_entropy(model(**b).logits, b["labels"])) for b in data) / len(data)
    assert rise.loss == pytest.approx(plain, rel=1e-6)
    assert rise.rise > 0
    found = flips(loss, data, 0.3)
    assert found.examples == 12


def test_another_trainer_is_refused(tmp_path):
    plain = transformers.Trainer(bert(), transformers.TrainingArguments(str(tmp_path), report_to="none", use_cpu=True))
    with pytest.raises(TypeError, match="AnalysisCallback needs a SharpnessAwareTrainer, got Trainer"):
        AnalysisCallback(plain, [])
    trainer = made(tmp_path, "classes", ERM())
    trainer.add_callback(AnalysisCallback(trainer, []))
    with pytest.raises(ValueError, match="the data has no batches"):
        trainer.train()
