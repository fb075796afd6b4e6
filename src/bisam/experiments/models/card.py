"""Card: the README.md of an exported model: how it was trained, with which result, and how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from bisam.experiments.recipes.recipe import Recipe

WHICH = {
    "best": "weights of the best validation epoch",
    "last": "weights of the last epoch",
    "ema": "average of the weights",
}
"""The weights of a run, in words."""

_SHOWN = (
    *("method", "rho", "mu", "alpha", "eta", "dataset", "model", "weights", "frozen", "seed", "noise", "imbalance"),
    *(
        "epochs",
        "steps",
        "batch_size",
        "optimizer",
        "learning_rate",
        "schedule",
        "weight_decay",
        "label_smoothing",
        "ema",
    ),
)
_QUIET = {"noise": 0.0, "imbalance": 1.0, "label_smoothing": 0.0}
"""Fields that say nothing with these values."""
_TASKS = {"glue": "text-classification", "text": "text-generation"}
_LIBRARIES = {"hf": "transformers", "timm": "timm"}


def card(recipe: Recipe, facts: Mapping[str, Any], code: str) -> str:
    """Return the model card, in Markdown with the metadata of Hugging Face.

    Args:
        recipe: of the run.
        facts: `weights` (one of `WHICH`), `scores` by metric, `finished`, and versions of the run's result.
        code: Python that loads the model.
    """
    values = {name: recipe.setting(name) for name in _SHOWN}
    fields = {k: v for k, v in values.items() if v is not None and _QUIET.get(k) != v}
    made = ", ".join(f"{key} {facts[key]}" for key in ("bisam", "commit", "torch", "python") if key in facts)
    task = _TASKS.get(recipe.dataset.partition(":")[0], "image-classification")
    written = [] if recipe.expression == recipe.method else [f"* expression: `{recipe.expression}`"]
    return "\n".join(
        (
            "---",
            f"library_name: {_LIBRARIES.get(recipe.model.partition(':')[0], 'pytorch')}",
            f"pipeline_tag: {task}",
            "tags: [sharpness-aware-minimization, bisam]",
            "---",
            "",
            f"# {recipe.model} on {recipe.dataset}, trained with {recipe.method}",
            "",
            *(f"* {key}: {value}" for key, value in fields.items()),
            *written,
            f"* {WHICH[facts['weights']]}",
            *(f"* test {name} {score:.4f}" for name, score in facts["scores"].items()),
            f"* trained with {made}, finished {facts['finished']}",
            "",
            "The scores are those of one run with this seed. `recipe.json` has all fields: `bisam train --config "
            "recipe.json` trains the model again.",
            "",
            "## How to load",
            "",
            _how(recipe, facts),
            "",
            "```python",
            code,
            "```",
            "",
        )
    )


def _how(recipe: Recipe, facts: Mapping[str, Any]) -> str:
    """A paragraph on what the model takes."""
    if recipe.dataset.startswith("text:"):
        tokens = "the places of characters in `bisam.experiments.data.language.SYMBOLS`"
        if recipe.dataset == "text:pydoc":
            tokens = (
                f"the places of characters among those of the help texts of Python {facts.get('python', '')}, sorted"
            )
        return f"It takes tokens (N, T), {tokens}, and returns logits (N, classes, T) of the token after each."
    if recipe.dataset.startswith("glue:"):
        takes = f"It takes texts of at most {recipe.max_length} tokens"
    else:
        takes = f"It takes images as they are prepared for testing on {recipe.dataset}: resized and standardised"
    return f"{takes}, and returns logits. `bisam predict FOLDER FILES` prepares files and names the classes."


def without_places(recipe: Recipe) -> dict[str, Any]:
    """Return the fields of a recipe without the folders of this machine: of absolute paths the last part alone."""
    values = recipe.to_dict()
    for name in ("dataset", "model", "weights"):
        kind, colon, detail = (values[name] or "").partition(":") if name != "weights" else ("", "", values[name] or "")
        if PurePath(detail).is_absolute() or detail.startswith("~"):
            values[name] = f"{kind}{colon}{PurePath(detail).name}"
    return values
