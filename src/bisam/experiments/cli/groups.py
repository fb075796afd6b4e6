"""Groups: the headings under which the help of a command shows its flags, and its examples."""

from __future__ import annotations

from collections.abc import Sequence

from cyclopts import Group

DATA = Group("Data", sort_key=1)
MODEL = Group("Model", sort_key=2)
METHOD = Group("Method", sort_key=3)
TRAINING = Group("Optimizer and length", sort_key=4)
RECIPE = Group("Recipe in a file", sort_key=5)
LAUNCH = Group("Runs", sort_key=6)
MACHINE = Group("Machine, data folder and logs", sort_key=7)
OUTPUT = Group("Output", sort_key=8)
AUTHORS = Group("The BiSAM authors' flags", sort_key=9)

_OF_FIELDS = {
    DATA: "dataset noise validation_noise limit train_examples imbalance held_out augment cutout randaugment "
    "erasing mixup cutmix image_size max_length bucket",
    MODEL: "model weights frozen",
    METHOD: "method rho mu alpha eta",
    TRAINING: "epochs steps patience batch_size accumulate optimizer learning_rate schedule warmup cooldown momentum "
    "weight_decay label_smoothing clip ema update_bn seed",
    MACHINE: "precision channels_last compile compile_mode",
    OUTPUT: "measured_epochs measured",
}

OF_FIELD = {field: group for group, fields in _OF_FIELDS.items() for field in fields.split()}
"""The group of each field of a recipe."""


def epilogue(examples: Sequence[str]) -> str:
    """Return the end of a help text: examples, one in a line, as they are pasted."""
    head = "Example:" if len(examples) == 1 else "Examples:"
    return f"{head}\n\n" + "\n".join(f"    {one}" for one in examples)
