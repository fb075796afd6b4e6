"""Image classifiers of Hugging Face: small ones in a folder, which are trained, exported and loaded again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

import transformers
from PIL import Image

from bisam.experiments import data
from bisam.experiments.models.build import build, statistics
from bisam.experiments.models.files import code_of
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs.folder import Run
from bisam.experiments.runs.machine import Machine
from bisam.experiments.training.train import train

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


@pytest.fixture(scope="module")
def vit(tmp_path_factory) -> Path:
    """A vision transformer of two layers for images of 16 x 16 and 5 classes, with its image processor."""
    folder = tmp_path_factory.mktemp("models") / "vit"
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.ViTConfig(**sizes, image_size=16, patch_size=8, num_labels=5)
    torch.manual_seed(0)
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    size = {"height": 16, "width": 16}
    transformers.ViTImageProcessor(image_mean=MEAN, image_std=STD, size=size).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    root, random = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for name in ("a", "b"):
        (root / name).mkdir()
        for i in range(20):
            Image.fromarray(random.integers(0, 256, (20, 20, 3), np.uint8)).save(root / name / f"{i}.png")
    return root


def recipe(vit: Path, photographs: Path, **settings) -> Recipe:
    shape = {"dataset": f"folder:{photographs}", "model": f"hf:{vit}", "image_size": 16, "batch_size": 8, "epochs": 1}
    return Recipe(**{"method": "bisam_log", "weights": "pretrained", **shape, **settings})


def test_its_logits_are_those_of_the_library(vit):
    model = build(f"hf:{vit}", 5, weights="pretrained").eval()
    images = torch.randn(3, 3, 16, 16)
    own = transformers.AutoModelForImageClassification.from_pretrained(vit).eval()
    assert torch.equal(model(images), own(pixel_values=images).logits)
    fresh = build(f"hf:{vit}", 7, weights="pretrained")
    assert fresh(images).shape == (3, 7)
    assert build(f"hf:{vit}", 2, channels=1)(images[:, :1]).shape == (3, 2)


def test_images_have_the_statistics_of_its_processor(vit, photographs, tmp_path):
    assert statistics(f"hf:{vit}") == (MEAN, STD)
    train_split = data.load(recipe(vit, photographs), Machine()).train
    assert train_split.statistics == (MEAN, STD)
    transformers.ViTForImageClassification.from_pretrained(vit).save_pretrained(tmp_path / "alone")
    assert statistics(f"hf:{tmp_path / 'alone'}") is None


@pytest.mark.parametrize("settings", [{}, {"frozen": 1, "mixup": 0.2}])
def test_a_run_is_trained_exported_and_loaded(vit, photographs, tmp_path, bisam, settings):
    run = Run.under(tmp_path / "runs", recipe(vit, photographs, **settings))
    result = train(run, Machine(log=()))
    assert bisam("export", run.folder, "--to", tmp_path / "out")[0] == 0
    code, out, _ = bisam("evaluate", tmp_path / "out", "--to", tmp_path / "found.json")
    assert code == 0
    assert f"{100 * result['test_last']:.1f}" in out
    read = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert (tuple(processor.image_mean), read.config.num_labels) == (MEAN, 2)
    assert "AutoImageProcessor, AutoModelForImageClassification" in (tmp_path / "out" / "README.md").read_text()


def test_the_code_of_a_folder_names_the_classes_of_the_library(vit):
    text = code_of(build(f"hf:{vit}", 5), f"hf:{vit}", 3, "somewhere")
    assert text.splitlines()[0] == "from transformers import AutoImageProcessor, AutoModelForImageClassification"


def test_what_does_not_fit_is_one_line(vit, photographs):
    with pytest.raises(ValueError, match="accepts images of 3 channels, not of 1"):
        build(f"hf:{vit}", 5, channels=1, weights="pretrained")
    wrong = replace(recipe(vit, photographs), image_size=32)
    with pytest.raises(ValueError, match=r"does not accept the images of folder:.*3 x 32 x 32"):
        train(Run.under(photographs / "runs", wrong), Machine(log=()))
