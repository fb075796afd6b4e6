"""Finished runs of small models: of digits, of image files, and of texts."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning_fabric")

from PIL import Image

from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs.folder import Run
from bisam.experiments.runs.machine import Machine
from bisam.experiments.training.train import train

MACHINE = Machine(log=())
DIGITS = Recipe(model="mlp", method="sam", epochs=2, batch_size=32, limit=150, ema=0.5, noise=0.2)


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Run:
    return finished(tmp_path_factory.mktemp("digits"), DIGITS)


@pytest.fixture(scope="session")
def photographs(tmp_path_factory) -> Path:
    """Images of two classes, the red and the blue ones, of several sizes and endings."""
    root = tmp_path_factory.mktemp("photographs")
    random = torch.Generator().manual_seed(0)
    for i in range(40):
        name, colour = (("blue", 2), ("red", 0))[i % 2]
        pixels = torch.randint(0, 120, (20 + i % 5, 24, 3), generator=random, dtype=torch.uint8)
        pixels[:, :, colour] += 100
        path = root / name / f"{i:02}.{('png', 'jpg')[i % 3 == 0]}"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels.numpy()).save(path)
    return root


@pytest.fixture(scope="session")
def photographed(photographs, tmp_path_factory) -> Run:
    recipe = Recipe(dataset=f"folder:{photographs}", model="mlp", image_size=16, epochs=2, batch_size=8, method="sam")
    recipe = replace(recipe, model="resnet8", learning_rate=0.02)
    return finished(tmp_path_factory.mktemp("photographed"), recipe)


@pytest.fixture(scope="session")
def root(tmp_path_factory) -> Path:
    """A data folder with two tasks of GLUE, and a small pretrained model."""
    pytest.importorskip("datasets")
    transformers = pytest.importorskip("transformers")
    from tests.experiments.data.test_glue import WORDS, classic

    root = tmp_path_factory.mktemp("root")
    for task in ("cola", "rte"):
        classic(root, task)
    folder = root / "weights" / "small"
    torch.manual_seed(3)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BertConfig(vocab_size=len(WORDS), max_position_embeddings=64, **sizes)
    transformers.BertModel(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizerFast"}))
    return root


def text_recipe(task: str, frozen: int | None) -> Recipe:
    return Recipe(
        dataset=f"glue:{task}",
        model="hf:small",
        weights="pretrained",
        frozen=frozen,
        method="sam",
        epochs=2,
        batch_size=4,
        optimizer="adamw",
        learning_rate=3e-2,
    )


@pytest.fixture(scope="session")
def texts(root, tmp_path_factory) -> dict[str, Run]:
    """Runs by task: CoLA with a frozen layer, RTE without."""
    place, machine = tmp_path_factory.mktemp("texts"), replace(MACHINE, data_dir=root)
    return {task: finished(place, text_recipe(task, frozen), machine) for task, frozen in (("cola", 1), ("rte", None))}


def finished(root: Path, recipe: Recipe, machine: Machine = MACHINE) -> Run:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    run = Run.under(root, recipe)
    train(run, machine)
    return run
