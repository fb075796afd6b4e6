"""Supervised fine-tuning with TRL and BiSAM: a small causal language model learns to name the largest of four numbers.

TRL computes its loss without building the logits, and then computes them again without a graph. BiSAM climbs a bound of
the token error, which needs the logits: so the loss is that of the Trainer, which is the same number.
"""

import random
import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, Trainer
from trl import SFTConfig, SFTTrainer

from bisam import BiSAM
from bisam.integrations.transformers import SharpnessAwareTrainer


class WithLogits(SFTTrainer):
    """TRL's trainer with the loss and the logits of the Trainer."""

    def compute_loss(self, *args, **kwargs):
        return Trainer.compute_loss(self, *args, **kwargs)


class SharpnessAwareSFTTrainer(SharpnessAwareTrainer, WithLogits):
    """TRL's trainer with a method."""


words = ["<pad>", "<end>", "largest", *map(str, range(10))]
backend = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
backend.pre_tokenizer = Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<end>")
draw = random.Random(0)
numbers = [draw.choices(range(10), k=4) for _ in range(2200)]
rows = [{"prompt": f"{' '.join(map(str, four))} largest ", "completion": str(max(four))} for four in numbers]

torch.manual_seed(0)
size = {"vocab_size": len(words), "n_positions": 16, "n_embd": 48, "n_layer": 2, "n_head": 4}
model = GPT2LMHeadModel(GPT2Config(**size, bos_token_id=1, eos_token_id=1, pad_token_id=0))
schedule = {"num_train_epochs": 3, "learning_rate": 5e-3, "lr_scheduler_type": "cosine", "warmup_steps": 20}
batches = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 2}
quiet = {"logging_steps": 60, "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
with tempfile.TemporaryDirectory() as folder:
    arguments = SFTConfig(folder, **schedule, **batches, **quiet, use_cpu=True, bf16=False)
    data = Dataset.from_list(rows[:2000])
    SharpnessAwareSFTTrainer(
        model, arguments, train_dataset=data, processing_class=tokenizer, method=BiSAM(0.05)
    ).train()

model.eval()
correct = 0
for row in rows[2000:]:
    answer = model.generate(**tokenizer(row["prompt"], return_tensors="pt"), max_new_tokens=1, do_sample=False)
    correct += tokenizer.decode(answer[0, -1:]) == row["completion"]
print(f"test accuracy {correct / 200:.3f}")
