"""Batched augmentation is, in distribution, what the transforms of torchvision do to one image after another."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

pytest.importorskip("torchvision")

from PIL import Image
from scipy.stats import chisquare
from torch.nn.functional import interpolate
from torchvision import transforms

from bisam.experiments.data.digits import digits
from bisam.experiments.data.image_tensors import Augmentation, Images, larger, smaller
from bisam.experiments.data.splits import Data

H, W, PADDING = 7, 6, 4  # more than the padding, so that every crop has pixels in it and is like no other
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
DRAWS = 162 * 40


def picture():
    """An image (H, W, 3), all of whose values differ, and none is black."""
    return np.random.default_rng(0).permutation(np.arange(1, 256))[: H * W * 3].reshape(H, W, 3).astype(np.uint8)


def key(image):
    """A standardised image (3, H, W) as bytes: the pixels that it was made of."""
    pixels = (image * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]) * 255
    return pixels.round().to(torch.uint8).numpy().tobytes()


def every_outcome():
    """All crops and mirrored crops, written down."""
    padded = np.zeros((H + 2 * PADDING, W + 2 * PADDING, 3), np.uint8)
    padded[PADDING : PADDING + H, PADDING : PADDING + W] = picture()
    crops = [padded[top : top + H, left : left + W] for top in range(9) for left in range(9)]
    return {np.ascontiguousarray(c.transpose(2, 0, 1)).tobytes() for crop in crops for c in (crop, crop[:, ::-1])}


def in_batches(augmentation, n, normalise=True):
    """So many images out of the batches, in batches of which the last is smaller."""
    x = torch.from_numpy(picture()).permute(2, 0, 1).expand(n, 3, H, W).contiguous()
    statistics = (torch.tensor(MEAN), torch.tensor(STD)) if normalise else (None, None)
    split = Images(x, torch.zeros(n, dtype=torch.int64), *statistics, augmentation)
    return torch.cat([x for x, _ in split.batches(1000, torch.Generator().manual_seed(0))])


def one_by_one(n):
    change = transforms.Compose(
        [
            transforms.RandomCrop((H, W), padding=PADDING),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    image = Image.fromarray(picture())
    return torch.stack([change(image) for _ in range(n)])


@pytest.mark.parametrize("pipeline", [lambda: in_batches(Augmentation(), DRAWS), lambda: one_by_one(DRAWS)])
def test_every_crop_and_flip_is_as_likely_as_every_other(pipeline):
    outcomes = every_outcome()
    assert len(outcomes) == 162
    counts = Counter(map(key, pipeline()))
    assert counts.keys() == outcomes
    assert chisquare(list(counts.values())).pvalue > 0.001


def test_images_of_a_batch_are_drawn_independently():
    """A crop says nothing about the next one: of nine kinds of outcomes, every pair is as likely as every other."""
    x = in_batches(Augmentation(), DRAWS)
    outcomes = {outcome: i for i, outcome in enumerate(sorted(every_outcome()))}
    numbers = np.array([outcomes[key(image)] for image in x]) % 9
    pairs = Counter(zip(numbers[::2].tolist(), numbers[1::2].tolist(), strict=True))
    assert chisquare([pairs[a, b] for a in range(9) for b in range(9)]).pvalue > 0.001


def test_without_flips_there_are_crops_only():
    assert len(set(map(key, in_batches(Augmentation(flip=False), DRAWS)))) == 81
    assert len(set(map(key, in_batches(Augmentation(padding=0), 100)))) == 2


def blanked(image):
    """Where (H, W) a standardised image is the grey of zero, as a rectangle (top, bottom, left, right), or None."""
    rows, columns = (torch.nonzero((image == 0).all(0).any(i))[:, 0] for i in (1, 0))
    return None if not len(rows) else (int(rows[0]), int(rows[-1]), int(columns[0]), int(columns[-1]))


def cut_one_by_one(n, size):
    """Rectangles that a slow Cutout blanks: a square whose middle is anywhere in the image; in half of the images."""
    random = np.random.default_rng(0)
    for _ in range(n):
        if random.random() < 0.5:
            yield None
            continue
        middle = random.integers(0, H), random.integers(0, W)
        inside = [
            [i for i in range(side) if m - size // 2 <= i < m + size // 2]
            for side, m in zip((H, W), middle, strict=True)
        ]
        (top, *_, bottom), (left, *_, right) = inside
        yield top, bottom, left, right


def test_cutout_blanks_what_it_blanks_image_by_image():
    n, size = 4000, 4
    ours = Counter(map(blanked, in_batches(Augmentation(padding=0, flip=False, cutout=size), n)))
    slow = Counter(cut_one_by_one(n, size))
    assert len(ours) == H * W + 1
    assert ours.keys() == slow.keys()
    for counts in (ours, slow):
        expected = {k: n / 2 if k is None else n / 2 / (H * W) for k in counts}
        assert chisquare(list(counts.values()), list(expected.values())).pvalue > 0.001


def test_what_is_not_cut_out_is_as_it_was():
    whole, cut = in_batches(None, 50), in_batches(Augmentation(padding=0, flip=False, cutout=4), 50)
    assert torch.equal(cut[cut != 0], whole[cut != 0])
    assert torch.equal(whole[0], whole[1])


def test_standardised_as_torchvision_does_it():
    """All 256 values in all channels."""
    values = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    theirs = transforms.Normalize(MEAN, STD)(transforms.ToTensor()(Image.fromarray(values)))
    split = Images(
        torch.from_numpy(values).permute(2, 0, 1)[None], torch.zeros(1, dtype=torch.int64), torch.tensor(MEAN),
        torch.tensor(STD),
    )  # fmt: skip
    ((ours, _),) = split.batches(1)
    torch.testing.assert_close(ours[0], theirs, rtol=0, atol=1e-6)


def test_the_statistics_undo_the_standardisation():
    pixels = torch.from_numpy(picture()).permute(2, 0, 1)[None]
    split = Images(pixels, torch.zeros(1, dtype=torch.int64), torch.tensor(MEAN), torch.tensor(STD))
    for part in (split, larger(Data(split, split, split, 1), 12, (MEAN[::-1], STD[::-1])).test):
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in part.statistics)
        ((x, _),) = part.batches(1)
        expected = interpolate(pixels.float(), size=x.shape[2:], mode="bilinear") / 255
        torch.testing.assert_close(x * std + mean, expected, rtol=0, atol=1e-6)
    assert Images(pixels.float(), torch.zeros(1, dtype=torch.int64)).statistics is None
    mean, std = digits(seed=0).test.statistics
    images = torch.cat([x for x, _ in digits(seed=0).test.batches(100)]) * std[0] + mean[0]
    torch.testing.assert_close(images * 16, (images * 16).round(), rtol=0, atol=1e-4)
    assert (round(float(images.min() * 16)), round(float(images.max() * 16))) == (0, 16)


@pytest.mark.parametrize("side", [4, 8, 16, 32])
def test_smaller_images_have_the_mean_of_each_block(side):
    images = np.random.default_rng(0).integers(0, 256, (3, 2, 32, 32), dtype=np.uint8)
    block = 32 // side
    expected = images.reshape(3, 2, side, block, side, block).mean((3, 5)).round()
    reduced = smaller(torch.from_numpy(images), side)
    assert reduced.dtype == torch.uint8
    assert np.array_equal(reduced.numpy(), expected)


def test_the_images_of_the_data_set_stay_as_they_are():
    x = torch.randint(256, (5, 3, 8, 8), dtype=torch.uint8)
    floats = x.float()
    for images in (x, floats):
        before = images.clone()
        split = Images(images, torch.zeros(5, dtype=torch.int64), torch.ones(3), torch.ones(3), Augmentation(cutout=4))
        for batch, _ in split.batches(2, torch.Generator().manual_seed(0)):
            batch.zero_()
        assert torch.equal(images, before)


def test_chosen_images_without_augmentation():
    images, labels = torch.arange(5 * 12, dtype=torch.uint8).view(5, 3, 2, 2), torch.arange(5)
    split = Images(images, labels, torch.tensor(MEAN), torch.tensor(STD), Augmentation())
    plain = Images(images, labels, torch.tensor(MEAN), torch.tensor(STD))
    x, y = next(split.unaugmented().chosen(torch.tensor([3, 1])).batches(8))
    (all_of_them, _) = next(plain.batches(8))
    assert y.tolist() == [3, 1]
    assert torch.equal(x, all_of_them[[3, 1]])
