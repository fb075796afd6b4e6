"""Corruptions: the error of a classifier of images under noise, blur and other changes of its inputs.

    errors = corruptions(sharp, loader, mean=(0.49, 0.48, 0.45), std=(0.25, 0.24, 0.26))
    errors.mean_error, errors.errors["jpeg"]            # over all; at severities 1 to 5

The corruptions are those of Hendrycks and Dietterich (2019, https://arxiv.org/abs/1903.12261) for which torchvision has
a function, with the strengths of the paper where these have the same meaning. They are computed from the images given:
this is neither CIFAR-10-C nor ImageNet-C, whose files hold 15 corruptions, some of them computed in another way, and
the mean error is not divided by that of AlexNet, as the paper's mCE is. Pass functions of your own for other
corruptions.

torchvision is released with torch. The packages that compute all corruptions of the paper are not kept
(`imagecorruptions`, whose last release of 2020 fails with current scikit-image), or bring OpenCV and scikit-image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from statistics import fmean
from typing import Any, cast

import torch
from torch import Tensor

from bisam.analysis.logits import rows
from bisam.analysis.samples import Mode, Progress, Result, Sample, Source, sampled
from bisam.batches import Batch
from bisam.model.rng import RandomState
from bisam.validation import describe, finite, instance, positive, shown, whole

Corruption = Callable[[Tensor, int], Tensor]
"""A function `(images, severity) -> images` of float32 images (N, C, H, W) in [0, 1] on the CPU; severity 1 to 5."""

Channels = float | Sequence[float] | Tensor
"""A number for each channel, or one for all."""

SMALL = 64
"""The longest side in pixels of images with the strengths of CIFAR-10-C; larger ones have those of ImageNet-C."""


@dataclass(frozen=True)
class Strength:
    """The strengths of a corruption at severities 1 to 5.

    Attributes:
        small: for images of at most `SMALL` pixels.
        large: for larger ones.
    """

    small: tuple[float, float, float, float, float]
    large: tuple[float, float, float, float, float]

    def __call__(self, images: Tensor, severity: int) -> float:
        """Returns the strength for images (N, C, H, W)."""
        return (self.small if max(images.shape[2:]) <= SMALL else self.large)[severity - 1]


_NOISE = Strength((0.04, 0.06, 0.08, 0.09, 0.10), (0.08, 0.12, 0.18, 0.26, 0.38))
_BLUR = Strength((0.4, 0.6, 0.7, 0.8, 1.0), (1.0, 2.0, 3.0, 4.0, 6.0))
_BRIGHTNESS = Strength((0.05, 0.10, 0.15, 0.20, 0.30), (0.1, 0.2, 0.3, 0.4, 0.5))
_CONTRAST = Strength((0.75, 0.5, 0.4, 0.3, 0.15), (0.4, 0.3, 0.2, 0.1, 0.05))
_ELASTIC = Strength((0.01, 0.02, 0.03, 0.04, 0.05), (0.01, 0.02, 0.03, 0.04, 0.05))
_PIXELATE = Strength((0.95, 0.9, 0.85, 0.75, 0.65), (0.6, 0.5, 0.4, 0.3, 0.25))
_JPEG = Strength((80, 65, 58, 50, 40), (25, 18, 15, 10, 7))


def gaussian_noise(images: Tensor, severity: int) -> Tensor:
    """Adds Gaussian noise to each value; the strength is its standard deviation."""
    from torchvision.transforms.v2 import functional

    return functional.gaussian_noise(images, sigma=_NOISE(images, severity))


def gaussian_blur(images: Tensor, severity: int) -> Tensor:
    """Blurs images; the strength is the standard deviation in pixels."""
    return _blurred(images, _BLUR(images, severity))


def brightness(images: Tensor, severity: int) -> Tensor:
    """Multiplies values; the strength is what a value of 1/2 gains (the paper adds it to the value in HSV)."""
    from torchvision.transforms.v2 import functional

    return functional.adjust_brightness(images, 1 + 2 * _BRIGHTNESS(images, severity))


def contrast(images: Tensor, severity: int) -> Tensor:
    """Moves values towards the mean grey of an image; the strength is the share of the difference that is left."""
    from torchvision.transforms.v2 import functional

    return functional.adjust_contrast(images, _CONTRAST(images, severity))


def elastic(images: Tensor, severity: int) -> Tensor:
    """Displaces pixels by smooth random fields, with black outside of the image; the strengths are not the paper's.

    The strength is the root mean square of the displacement of an image along each axis, as a share of its sides. The
    field is smooth over an eighth of the longer side.
    """
    from torchvision.transforms.v2 import functional

    n, _, h, w = images.shape
    field = _blurred(torch.rand(n, 2, h, w) * 2 - 1, max(h, w) / 8)
    field = field / field.square().mean((2, 3), keepdim=True).sqrt()
    field = field * (2 * _ELASTIC(images, severity))  # coordinates of a grid are from -1 to 1
    return torch.stack([functional.elastic(x, e.movedim(0, -1)[None]) for x, e in zip(images, field, strict=True)])


def pixelate(images: Tensor, severity: int) -> Tensor:
    """Averages pixels in boxes; the strength is the number of boxes along a side as a share of the pixels."""
    from torchvision.transforms.v2 import InterpolationMode, functional

    share, box = _PIXELATE(images, severity), InterpolationMode.BOX
    sides = list(images.shape[2:])
    boxes = [max(1, int(side * share)) for side in sides]
    return _by_pillow(images, lambda x: functional.resize(functional.resize(x, boxes, box), sides, box))


def jpeg(images: Tensor, severity: int) -> Tensor:
    """Compresses images; the strength is the quality."""
    from torchvision.transforms.v2 import functional

    quality = int(_JPEG(images, severity))
    return _by_pillow(images, lambda x: functional.jpeg(x, quality))


def _by_pillow(images: Tensor, change: Callable[[Any], Any]) -> Tensor:
    """Applies a function to images of Pillow: torchvision's own JPEG coder is deprecated, and it has no box filter."""
    from torchvision.transforms.v2 import functional

    pictures = [functional.to_pil_image(x) for x in (images * 255).round().to(torch.uint8)]
    return torch.stack([functional.pil_to_tensor(change(x)) for x in pictures]).to(images.dtype) / 255


def _blurred(images: Tensor, sigma: float) -> Tensor:
    from torchvision.transforms.v2 import functional

    # The border is a reflection, which must be smaller than the image.
    sizes = [2 * min(side - 1, max(1, round(4 * sigma))) + 1 for side in (images.shape[3], images.shape[2])]
    return functional.gaussian_blur(images, sizes, [sigma, sigma])


CORRUPTIONS: Mapping[str, Corruption] = {
    "gaussian noise": gaussian_noise,
    "gaussian blur": gaussian_blur,
    "brightness": brightness,
    "contrast": contrast,
    "elastic": elastic,
    "pixelate": pixelate,
    "jpeg": jpeg,
}
"""The corruptions by name."""


@dataclass(frozen=True)
class Corruptions(Result):
    """The error under corruptions of the images.

    Attributes:
        error: the error on the images as they are, in [0, 1].
        confidence: the mean probability of the predicted class on them.
        errors: for each corruption the error at each severity.
        confidences: for each corruption the mean probability of the predicted class at each severity.
        severities: the severities.
        size: height and width of the images in pixels, which the strengths depend on (`Strength`).
        mean_error: the mean of all `errors`.
        mode: see `Result`.
        seed: the seed of the corruptions, and of forward passes.
        examples: number of labels that count.
        forward: number of forward passes over all examples.
    """

    error: float
    confidence: float
    errors: dict[str, tuple[float, ...]]
    confidences: dict[str, tuple[float, ...]]
    severities: tuple[int, ...]
    size: tuple[int, int]
    mean_error: float
    forward: float

    def plot(self, axes: Any = None) -> Any:
        """Draws the error against the severity of each corruption into matplotlib axes, which are returned."""
        from bisam.analysis.plots import severities

        return severities(self.severities, self.errors, self.error, "error", axes)


def corruptions(
    source: Source,
    data: Iterable[Any],
    severities: Sequence[int] = (1, 2, 3, 4, 5),
    *,
    mean: Channels = 0.0,
    std: Channels = 1.0,
    kinds: Mapping[str, Corruption] = CORRUPTIONS,
    mode: Mode | None = "eval",
    seed: int = 0,
    progress: Progress | None = None,
) -> Corruptions:
    """Returns the error of a classifier under corruptions of its images. The model is not changed.

    With k corruptions and s severities it takes k s + 1 forward passes over the data. The images are corrupted on the
    CPU, one batch at a time, so that the results of a seed are the same on all devices.

    Args:
        source: a `SharpnessAware` loss, or an oracle such as `ModelOracle(model, loss)`.
        data: batches whose first argument is float images (N, C, H, W), read once and kept. Pass a loader without
            augmentation.
        severities: numbers from 1 to 5.
        mean: `mean` and `std` are those that the images are normalised with, so that `images * std + mean` is in
            [0, 1]; one number for each channel, or one for all. Default: the images are in [0, 1] themselves.
        std: see `mean`.
        kinds: corruptions by name. Those of `CORRUPTIONS` take images of 1 or 3 channels.
        mode: see `sharpness`.
        seed: seeds the corruptions and the random numbers of forward passes. The random numbers of a corruption depend
            on its name, the severity and the number of the batch, and not on what else is asked for.
        progress: see `sharpness`.

    Raises:
        ImportError: the extra `analysis` is not installed.
        TypeError: an argument has the wrong type.
        ValueError: an argument is outside its range, the data is empty or has no such images, the outputs are no logits
            of several classes, a label is outside the classes, or a loss is not finite.
    """
    chosen = _severities(severities)
    if not kinds:
        raise ValueError("kinds is empty: name at least one corruption, such as {'jpeg': CORRUPTIONS['jpeg']}")
    for name, corruption in kinds.items():
        instance(f"corruption {name!r}", corruption, "a function (images, severity) -> images")
    if find_spec("torchvision") is None and any(kind in CORRUPTIONS.values() for kind in kinds.values()):
        raise ImportError('corruptions need torchvision: pip install "bisam[analysis]"')
    with sampled(source, data, seed=seed, mode=mode, progress=progress) as sample:
        scale = _Normalization(mean, std)
        sample.passes.expected = 1 + len(kinds) * len(chosen)
        sizes = [scale.images(batch, i).shape[2:] for i, batch in enumerate(sample.batches)]  # checks all of them first
        plain, found = _predictions(sample), dict[str, list[_Predictions]]()
        for name, corruption in kinds.items():
            batches = [_Corrupted(sample, scale, name, corruption, severity) for severity in chosen]
            found[name] = [_predictions(replace(sample, batches=corrupted)) for corrupted in batches]
        errors = {name: tuple(each.error for each in series) for name, series in found.items()}
        return Corruptions(
            mode=mode,
            seed=seed,
            examples=plain.examples,
            error=plain.error,
            confidence=plain.confidence,
            errors=errors,
            confidences={name: tuple(each.confidence for each in series) for name, series in found.items()},
            severities=chosen,
            size=(sizes[0][0], sizes[0][1]),
            mean_error=fmean(error for series in errors.values() for error in series),
            forward=sample.passes.forward,
        )


@dataclass(frozen=True)
class _Predictions:
    examples: float
    error: float
    confidence: float


def _predictions(sample: Sample) -> _Predictions:
    n, wrong, confidence = 0, 0, 0.0
    for batch in rows(sample):
        predicted = batch.logits.argmax(1)
        wrong += int((predicted != batch.labels).sum())
        confidence += float(batch.logits.softmax(1).gather(1, predicted[:, None]).sum())
        n += len(batch.labels)
    return _Predictions(float(n), wrong / n, confidence / n)


class _Normalization:
    """The mean and standard deviation of the channels, by which images are normalised."""

    def __init__(self, mean: Channels, std: Channels) -> None:
        self._mean, self._std = (_channels(name, value) for name, value in (("mean", mean), ("std", std)))
        for value in self._std.flatten().tolist():
            positive("std", value)

    def images(self, batch: Batch, number: int) -> Tensor:
        """Returns the images of a batch in [0, 1], float32, on the CPU.

        Raises:
            ValueError: the first argument of the batch is no image tensor, or its values are in another range.
        """
        x = batch[0]
        if not isinstance(x, Tensor) or x.dim() != 4 or not x.is_floating_point():
            raise ValueError(
                "the first argument of a batch must be floating-point images (N, C, H, W), and that of batch "
                f"{number} is {describe(x)}"
            )
        for name, value in (("mean", self._mean), ("std", self._std)):
            if len(value) not in (1, x.shape[1]):
                raise ValueError(f"{name} has {len(value)} values, and the images have {x.shape[1]} channels")
        images = x.detach().cpu().float() * self._std + self._mean
        low, high = (float(end) for end in images.aminmax()) if images.numel() else (0.0, 0.0)
        if not (low >= -_TOLERANCE and high <= 1 + _TOLERANCE):
            raise ValueError(
                f"images * std + mean must be in [0, 1], and those of batch {number} are from {low:.3g} to {high:.3g}: "
                "pass mean= and std= of the normalisation of the data"
            )
        return images.clamp(0, 1)

    def inverse(self, images: Tensor) -> Tensor:
        """Returns images in [0, 1] as the model takes them."""
        return (images - self._mean) / self._std


class _Corrupted(Sequence[Batch]):
    """Batches with corrupted images, each of which is computed when it is read."""

    def __init__(self, sample: Sample, scale: _Normalization, name: str, corruption: Corruption, severity: int) -> None:
        self._sample, self._scale, self._name = sample, scale, name
        self._corruption, self._severity = corruption, severity

    def __len__(self) -> int:
        return len(self._sample.batches)

    def __getitem__(self, number: Any) -> Any:
        """Returns a batch with corrupted images, in the type and on the device of the images that were given.

        Raises:
            TypeError: the corruption does not return a tensor.
            ValueError: it returns another shape, or values that are not finite.
        """
        batch = cast(Batch, self._sample.batches[number])
        images, name = self._scale.images(batch, number), self._name
        with RandomState([]).forked(self._sample.seed, self._severity, number, *name.encode()), torch.no_grad():
            new = cast(Any, self._corruption(images, self._severity))
        if not isinstance(new, Tensor):
            raise TypeError(f"corruption {name!r} must return images, got {describe(new)}")
        if new.shape != images.shape or not bool(new.isfinite().all()):
            raise ValueError(
                f"corruption {name!r} must return finite images of shape {tuple(images.shape)}, got {describe(new)}"
            )
        return self._scale.inverse(new.float().clamp(0, 1)).to(batch[0]), *batch[1:]


_TOLERANCE = 0.02
"""Normalised images in half precision and rounded statistics leave [0, 1] by a little."""


def _channels(name: str, value: Channels) -> Tensor:
    plain: Any = value.tolist() if isinstance(value, Tensor) else value
    values: list[Any] = list(plain) if isinstance(plain, Iterable) else [plain]
    for each in values:
        finite(name, each)
    if not values:
        raise ValueError(f"{name} is empty: give a number for each channel, or one for all")
    return torch.tensor(values, dtype=torch.float32).view(-1, 1, 1)


def _severities(severities: Sequence[int]) -> tuple[int, ...]:
    if not isinstance(cast(Any, severities), Iterable):
        raise TypeError(f"severities must be several numbers, such as (1, 3, 5), got {shown(severities)}")
    chosen = tuple(severities)
    for severity in chosen:
        whole("a severity", severity, most=5)
    if not chosen or len(set(chosen)) < len(chosen):
        raise ValueError(f"severities must be different numbers from 1 to 5, at least one, got {chosen}")
    return chosen
