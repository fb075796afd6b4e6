"""Presets: the papers' settings, as recipes to start from.

What the facts of the papers do not say is marked [MEM] where it is recollected, and [OURS] where we chose it.
"""

from __future__ import annotations

from dataclasses import fields, replace

from bisam.experiments.errors import unknown
from bisam.experiments.recipes.recipe import Recipe

CIFAR = Recipe(
    dataset="cifar10",
    model="resnet56",
    method="bisam_log",
    rho=0.05,
    epochs=200,
    batch_size=128,
    learning_rate=0.1,
    momentum=0.9,
    weight_decay=5e-4,
    label_smoothing=0.1,
)
"""CIFAR as in Xie et al. (2024), section 4.1; the numbers are the defaults of their code."""

AUTHORS = replace(CIFAR, cutout=True)
"""CIFAR as the BiSAM authors' code does it, which is the paper and Cutout."""

IMAGENET = Recipe(  # epochs, learning rate, batch, micro-batch: [MEM]
    dataset="imagenet",
    model="torchvision:resnet50",
    method="MSAM(128, BiSAM(0.05, NegLog(5.0)))",
    epochs=90,
    batch_size=512,
    learning_rate=0.2,
    momentum=0.9,
    weight_decay=5e-4,
    label_smoothing=0.1,
)
"""ImageNet-1K as in Xie et al. (2024), table 3."""

# Learning rate, batch and steps (500, of which 100 are warm-up): [MEM]. rho, the checkpoint (timm's, with the
# statistics that it was trained with; the paper's is of Wu et al., 2020): [OURS].
VIT = Recipe(
    dataset="flowers",
    model="timm:vit_base_patch16_224",
    weights="pretrained",
    method="bisam_log",
    rho=0.05,
    epochs=63,
    batch_size=128,
    optimizer="adamw",
    learning_rate=1e-4,
    weight_decay=0.0,
    schedule="linear",
    warmup=100,
    clip=1.0,
)
"""Fine-tuning ViT-B/16 as in Xie et al. (2024), table 6."""

BERT = Recipe(  # learning rate, batch, epochs and the radii: [MEM]; weight decay and no warm-up: [OURS]
    dataset="glue:rte",
    model="hf:bert-base-uncased",
    weights="pretrained",
    method="bisam_log",
    rho=0.05,
    epochs=3,
    batch_size=32,
    optimizer="adamw",
    learning_rate=2e-5,
    weight_decay=0.0,
    schedule="linear",
    clip=1.0,
)
"""Fine-tuning BERT-base on GLUE as in Xie et al. (2024), table 7."""

PRESETS = {"paper": CIFAR, "authors": AUTHORS, "imagenet": IMAGENET, "vit": VIT, "bert": BERT}
"""By name."""


def with_preset(arguments: list[str]) -> list[str]:
    """The arguments of `train`, and in place of `--preset NAME` the flags of its fields that were not given.

    Raises:
        ValueError: the name is unknown.
    """
    given = [a.split("=", 1) for a in arguments]
    at = next((i for i, a in enumerate(given) if a[0] == "--preset"), None)
    if arguments[:1] != ["train"] or at is None or (len(given[at]) == 1 and at + 1 == len(arguments)):
        return arguments
    name = given[at][1] if len(given[at]) == 2 else arguments[at + 1]
    if name not in PRESETS:
        raise unknown("preset", name, PRESETS)
    flags = {"--" + a[0].lstrip("-").replace("_", "-").removeprefix("no-") for a in given if a[0].startswith("--")}
    spelt = {"method": {"--optim"}, "learning_rate": {"--lr"}}
    more: list[str] = []
    for field in fields(Recipe):
        value, flag = getattr(PRESETS[name], field.name), "--" + field.name.replace("_", "-")
        if value == field.default or flags & {flag, *spelt.get(field.name, ())}:
            continue
        if field.name in ("rho", "mu", "alpha", "eta") and flags & {"--method", "--optim"}:
            continue  # the method's own
        more += [flag if value else f"--no-{flag[2:]}"] if isinstance(value, bool) else [flag, str(value)]
    return [*arguments, *more]
