"""LoRA with BiSAM: a network learns the digits, then its adapters learn digits mirrored along the diagonal."""

import tempfile

import torch
from peft import LoraConfig, get_peft_model
from sklearn.datasets import load_digits
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

from bisam import BiSAM
from bisam.integrations.transformers import SharpnessAwareTrainer

torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
upright, mirrored = (
    [{"pixel_values": image, "labels": int(label)} for image, label in zip(images, labels, strict=True)]
    for images in (x, x.transpose(2, 3))
)
model = ViTForImageClassification(
    ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        num_labels=10,
        initializer_range=0.2,
    )
)
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder,
        num_train_epochs=6,
        per_device_train_batch_size=32,
        learning_rate=5e-3,
        lr_scheduler_type="cosine",
        warmup_steps=30,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    Trainer(model, arguments, train_dataset=upright[:1300]).train()
    layers = ["projection", "q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]
    adapted = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=layers))
    trainer = SharpnessAwareTrainer(
        adapted,
        arguments,
        train_dataset=mirrored[:1300],
        eval_dataset=mirrored[1300:],
        compute_metrics=lambda p: {"accuracy": (p.predictions.argmax(1) == p.label_ids).mean()},
        method=BiSAM(rho=0.05),
    )
    print(f"test accuracy before adaptation {trainer.evaluate()['eval_accuracy']:.3f}")
    trainer.train()
    print(f"test accuracy {trainer.evaluate()['eval_accuracy']:.3f}")
