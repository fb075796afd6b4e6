"""Mixup, CutMix, RandAugment and random erasing: what torchvision does to the images of a run, and with which seeds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("torchvision")

from PIL import Image
from torch.nn.functional import one_hot
from torchvision.transforms import v2

from bisam.experiments import data
from bisam.experiments.data.image_files import Folder
from bisam.experiments.data.image_tensors import Augmentation, Images
from bisam.experiments.data.splits import Data
from bisam.experiments.data.transforms import Transformed
from bisam.experiments.errors import DataError
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs.folder import Run
from bisam.experiments.runs.machine import Machine
from bisam.experiments.training.train import train

MACHINE = Machine(log=())
N, K = 12, 4


def split(**settings) -> Images:
    """Each image has pixels of its own class alone, so that a mixture of images tells the mixture of labels."""
    labels = torch.arange(N) % K
    images = one_hot(labels, K).float()[:, :, None, None].expand(N, K, 16, 16).contiguous()
    return Images(images, labels, **settings)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("settings", [{"mixup": 0.7}, {"cutmix": 1.0}, {"mixup": 0.5, "cutmix": 1.0}])
def test_labels_are_mixed_as_the_images_are(settings):
    """The mean of channel k of an image is its share of class k, by construction."""
    mixed = Transformed(split(), K, **settings)
    batches = [batch for seed in range(8) for batch in mixed.batches(5, seeded(seed))]
    assert {len(labels) for _, labels in batches} == {5, 2}
    for images, labels in batches:
        assert labels.dtype == images.dtype == torch.float32
        assert torch.allclose(images.mean((2, 3)), labels, atol=1e-6)
        assert torch.allclose(labels.sum(1), torch.ones(len(labels)), atol=1e-6)
    # Mixup mixes whole images, CutMix rectangles of them; with both, some batches have the one, some the other.
    mixed = [batch for batch in batches if ((batch[1] > 0.01) & (batch[1] < 0.99)).any()]
    whole = [bool(((images - images[:, :, :1, :1]).abs() < 1e-6).all()) for images, _ in mixed]
    assert any(whole) == ("mixup" in settings)
    assert all(whole) == ("cutmix" not in settings)


def test_mixup_is_that_of_torchvision_with_the_seed_of_the_run():
    images, labels = next(split().batches(N, seeded(3)))
    random = seeded(3)
    own = torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=random)))
    images, labels = next(split().batches(N, random))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**62, (), generator=own)))
        wanted = v2.RandomChoice([v2.MixUp(alpha=0.7, num_classes=K)])(images, labels)
    found = next(Transformed(split(), K, mixup=0.7).batches(N, seeded(3)))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("settings", [{"mixup": 0.7, "erasing": 0.5}, {"cutmix": 1.0}])
def test_batches_depend_on_the_generator_alone(settings):
    mixed = Transformed(split(), K, **settings)

    def drawn(seed):
        return [t for batch in mixed.indexed(5, seeded(seed)) for t in batch]

    torch.manual_seed(1)
    before, one = torch.get_rng_state(), drawn(0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert all(torch.equal(a, b) for a, b in zip(one, drawn(0), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one, drawn(1), strict=True))


def test_ranks_share_the_order_of_the_examples():
    mixed = Transformed(split(), K, mixup=0.7)
    parts = [list(mixed.indexed(6, seeded(), rank, 2)) for rank in range(2)]
    for one, other in zip(*parts, strict=True):
        assert len(one[0]) == len(other[0]) == 3
    together = torch.cat([index for part in parts for index, _, _ in part])
    assert together.sort().values.tolist() == list(range(N))


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_rectangle_is_erased_in_a_share_of_the_images(share):
    images = Images(torch.ones(400, 3, 16, 16), torch.zeros(400, dtype=torch.int64))
    found = torch.cat([x for x, _ in Transformed(images, 2, erasing=share).batches(50, seeded())])
    blank = (found == 0).all(1)
    erased = blank.flatten(1).any(1).double().mean().item()
    assert erased == pytest.approx(share, abs=0.1)
    for one in blank[blank.flatten(1).any(1)]:
        rows, columns = one.any(1), one.any(0)
        assert torch.equal(one, rows[:, None] & columns[None])
        assert 0.01 <= one.double().mean() <= 0.4


def test_labels_stay_labels_without_mixtures():
    images, labels = next(Transformed(split(), K, erasing=1.0).batches(N, seeded()))
    assert labels.dtype == torch.int64
    assert images.shape == (N, K, 16, 16)


def test_each_image_has_random_operations_of_its_own():
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 16, 16), np.uint8))
    same = pixels.expand(64, 3, 16, 16).contiguous()
    images = Images(same, torch.zeros(64, dtype=torch.int64), torch.zeros(3), torch.ones(3), randaugment=9)
    (x, _), (again, _) = (next(images.batches(64, seeded())) for _ in range(2))
    assert torch.equal(x, again)
    assert len({one.numpy().tobytes() for one in x}) > 32
    plain, _ = next(images.unaugmented().batches(64, seeded()))
    assert torch.allclose(plain, same / 255)
    crops = replace(images, augmentation=Augmentation(2))
    assert not torch.equal(next(crops.batches(64, seeded()))[0], x)


def test_files_have_random_operations_that_do_not_depend_on_the_processes(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 20, 3), np.uint8)
    paths = [str(tmp_path / f"{i}.png") for i in range(6)]
    for path in paths:
        Image.fromarray(pixels).save(path)
    plain = Folder(paths, torch.zeros(6, dtype=torch.int64), image_size=16, training=True)
    strong = replace(plain, randaugment=30)
    assert torch.equal(*(next(strong.batches(6, seeded()))[0] for _ in range(2)))
    assert not torch.equal(next(strong.batches(6, seeded()))[0], next(plain.batches(6, seeded()))[0])
    still = next(replace(plain, training=False).batches(6))[0]
    assert torch.equal(next(strong.unaugmented().batches(6))[0], still)


BASE = Recipe(method="bisam_log", model="mlp", epochs=2, batch_size=64, limit=200)


@pytest.mark.parametrize(
    "settings",
    [
        {"mixup": 0.2, "cutmix": 1.0, "erasing": 0.2},
        {"mixup": 0.2, "precision": "64", "label_smoothing": 0.1, "method": "bisam_tanh"},
        {"cutmix": 1.0, "method": "SAM(0.1, ascent=ClassWeighted(NegLog(), 'balanced'))", "noise": 0.2},
        {"mixup": 0.2, "method": "esam", "measured_epochs": 1},
    ],
)
def test_a_resumed_run_with_mixtures_equals_an_uninterrupted_one(tmp_path, settings):
    recipe = replace(BASE, **settings)

    def interrupt(row):
        raise KeyboardInterrupt

    train(whole := Run.under(tmp_path / "whole", recipe), MACHINE)
    run = Run.under(tmp_path / "parts", recipe)
    with pytest.raises(KeyboardInterrupt):
        train(run, MACHINE, interrupt)
    train(run, MACHINE)
    one, other = whole.checkpoint()["sharp"], run.checkpoint()["sharp"]
    tensors = [name for name, value in one.items() if isinstance(value, torch.Tensor)]
    assert all(torch.equal(one[name], other[name]) for name in tensors)
    assert all(0 <= row["train_accuracy"] <= 1 for row in run.metrics())


def test_the_defaults_are_the_data_as_they_were():
    splits = data.load(BASE, MACHINE)
    assert isinstance(splits, Data)
    assert isinstance(splits.train, Images)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mixup": -1.0}, "mixup must be non-negative"),
        ({"cutmix": float("nan")}, "cutmix must be"),
        ({"erasing": 1.5}, r"erasing must be in \[0, 1\], got 1.5"),
        ({"randaugment": 31}, "randaugment must be at most 30"),
        ({"randaugment": -1}, "randaugment must be at least 0"),
        ({"method": "saf", "mixup": 0.2}, "SAF compares the outputs for an example with earlier ones, and mixup"),
    ],
)
def test_a_recipe_refuses_what_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**settings)


def test_digits_and_texts_are_refused(bisam, tmp_path):
    with pytest.raises(DataError, match="randaugment needs images of 8-bit pixels, such as cifar10, and not those of"):
        data.load(replace(BASE, randaugment=9), MACHINE)
    for flags, message in {
        ("--mixup", 0.2, "--dataset", "glue:rte"): "--mixup (needs a dataset of images, got glue:rte)",
        ("--erasing", 0.2, "--dataset", "glue:rte"): "--erasing (needs a dataset of images, got glue:rte)",
        (
            "--randaugment",
            9,
        ): "--randaugment (needs dataset cifar10, cifar100, ",
    }.items():
        code, out, err = bisam("train", *flags, "--out", tmp_path / "out")
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert message in err
