"""
Fine-tuning with LoRA
=====================

A small vision transformer learns the digits. Then adapters (LoRA, by PEFT) teach it the same digits mirrored, with
and without BiSAM. Frozen weights are neither displaced nor copied, so rho is a radius in the space of the adapters.
"""
# sphinx_gallery_thumbnail_path = "_static/gallery/finetune_lora.png"

import copy
import warnings

import matplotlib.pyplot as plt
import torch
from peft import LoraConfig, get_peft_model
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy as mean_cross_entropy
from transformers import ViTConfig, ViTForImageClassification

from bisam import ERM, BiSAM, SharpnessAware, cross_entropy

warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
torch.set_num_threads(1)
torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
order = torch.randperm(len(images))
upright, y = torch.tensor(images, dtype=torch.float32)[order].view(-1, 1, 8, 8) / 8 - 1, torch.tensor(labels)[order]
mirrored = upright.transpose(2, 3)
base = ViTForImageClassification(
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


def accuracy(model, x, y):
    model.eval()
    with torch.no_grad():
        found = model(x).logits.argmax(1)
    model.train()
    return (found == y).float().mean().item()


# %%
# The pretrained model
# --------------------
# In place of a download: some epochs on upright digits.

optimizer = torch.optim.AdamW(base.parameters(), lr=3e-3)
base.train()
for _ in range(6):
    for batch in torch.randperm(1300).split(32):
        mean_cross_entropy(base(upright[batch]).logits, y[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()
print(
    f"upright {accuracy(base, upright[1300:], y[1300:]):.3f}, mirrored {accuracy(base, mirrored[1300:], y[1300:]):.3f}"
)

# %%
# The adapters
# ------------
# ``forward`` says what the model returns. A language model of Hugging Face needs ``SharpnessAwareTrainer`` in place
# of a loop, or this loop with its own batches.

LAYERS = ["projection", "q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]


def finetune(method):
    torch.manual_seed(1)
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=8, lora_alpha=16, target_modules=LAYERS))
    sharp = SharpnessAware(model, method, loss=cross_entropy, forward=lambda model, x, y: (model(x).logits, y))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    curve = [accuracy(model, mirrored[1300:], y[1300:])]
    for _ in range(6):
        for batch in torch.randperm(1300).split(32):
            sharp(mirrored[batch], y[batch]).backward()
            optimizer.step()
            optimizer.zero_grad()
        curve.append(accuracy(model, mirrored[1300:], y[1300:]))
    model.print_trainable_parameters()
    return curve


# %%
figure, axis = plt.subplots(figsize=(7, 3.6), layout="constrained")
for method, name, colour in ((ERM(), "AdamW", "black"), (BiSAM(0.05), "AdamW and BiSAM(0.05)", "#0072B2")):
    curve = finetune(method)
    axis.plot(range(7), [100 * value for value in curve], marker="o", color=colour, label=name)
    print(f"{name}: test accuracy {100 * curve[-1]:.1f} %")
axis.set(xlabel="epoch of the adapters", ylabel="accuracy on mirrored digits (%)")
axis.grid(alpha=0.3)
axis.legend()

# %%
# One seed of a small model, with clean labels: no difference is to be expected, and BiSAM costs two passes where
# AdamW costs one.
