"""TRL's trainers with a method, as the page about loops says."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("trl")
pytest.importorskip("datasets")

from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, Trainer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from bisam import ERM, SAM, BiSAM
from bisam.integrations.transformers import SharpnessAwareTrainer
from bisam.perturbations import L2

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]  # of a host's own; it imports for seconds
WORDS = ["<pad>", "<end>", "+", *map(str, range(20))]


class WithLogits(SFTTrainer):
    def compute_loss(self, *args, **kwargs):
        return Trainer.compute_loss(self, *args, **kwargs)


class Sharp(SharpnessAwareTrainer, SFTTrainer):
    pass


class SharpWithLogits(SharpnessAwareTrainer, WithLogits):
    pass


class SharpDPO(SharpnessAwareTrainer, DPOTrainer):
    pass


def tokenizer():
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    backend.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<end>")


def trained(cls, config, rows, folder, **options):
    torch.manual_seed(0)
    special = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    dropout = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=len(WORDS), n_positions=16, n_embd=16, n_layer=1, n_head=2, **special, **dropout)
    )
    arguments = config(
        str(folder),
        max_steps=3,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
    if config is DPOConfig:
        options["ref_model"] = copy.deepcopy(model)
    trainer = cls(model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer(), **options)
    trainer.train()
    return torch.cat([p.detach().flatten() for p in model.parameters()]), trainer.state.log_history


SUMS = [{"prompt": f"{a} + {b} ", "completion": f"{a + b}"} for a in range(5) for b in range(5)]
PAIRS = [
    {"prompt": f"{a} + {b} ", "chosen": f"{a + b}", "rejected": f"{a + b + 1}"} for a in range(5) for b in range(5)
]


def test_fine_tuning_without_a_method_is_theirs(tmp_path):
    theirs, log = trained(SFTTrainer, SFTConfig, SUMS, tmp_path)
    ours, own = trained(Sharp, SFTConfig, SUMS, tmp_path, method=ERM())
    assert torch.equal(ours, theirs)
    assert [line["loss"] for line in own[:3]] == [line["loss"] for line in log[:3]]
    with_logits, _ = trained(SharpWithLogits, SFTConfig, SUMS, tmp_path, method=ERM())
    torch.testing.assert_close(with_logits, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cls", [Sharp, SharpWithLogits])
def test_the_methods(tmp_path, cls):
    plain, _ = trained(cls, SFTConfig, SUMS, tmp_path, method=ERM())
    sam, log = trained(cls, SFTConfig, SUMS, tmp_path, method=SAM(L2(0.1)))
    assert not torch.allclose(sam, plain, atol=1e-4)
    assert log[0]["gradients_per_step"] == 2
    if cls is Sharp:
        with pytest.raises(ValueError, match=r"SFTTrainer\.compute_loss returns have no graph"):
            trained(cls, SFTConfig, SUMS, tmp_path, method=BiSAM(0.1))
    else:
        bisam, _ = trained(cls, SFTConfig, SUMS, tmp_path, method=BiSAM(0.1))
        assert not torch.allclose(bisam, sam, atol=1e-5)


def test_preferences(tmp_path):
    theirs, log = trained(DPOTrainer, DPOConfig, PAIRS, tmp_path)
    ours, own = trained(SharpDPO, DPOConfig, PAIRS, tmp_path, method=ERM())
    assert torch.equal(ours, theirs)
    assert [line["loss"] for line in own[:3]] == [line["loss"] for line in log[:3]]
    sam, of_sam = trained(SharpDPO, DPOConfig, PAIRS, tmp_path, method=SAM(L2(0.1)))
    assert not torch.allclose(sam, theirs, atol=1e-4)
    assert of_sam[0]["gradients_per_step"] == 2
    with pytest.raises(ValueError, match="needs classes"):
        trained(SharpDPO, DPOConfig, PAIRS, tmp_path, method=BiSAM(0.1))
