"""Flops: floating-point operations of runs, counted by torch on the networks themselves.

    counts = Counts.read(Path("docs/tables.json"))
    missing(recipes, counts)                         # recipes whose networks and methods were not counted yet
    counts = counts.with_(recipe)                    # counts one: random weights and inputs, a few examples
    operations(recipe, counts)                       # of the whole run

Only matrix products, convolutions and attention are counted, as in torch.utils.flop_counter; a multiplication with an
addition is two operations.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bisam import Evaluation, Oracle, SharpnessAware, cross_entropy
from bisam.batches import Batch
from bisam.experiments.data import has_tokens
from bisam.experiments.data.long_tail import counts as long_tail_counts
from bisam.experiments.data.splits import batches_of
from bisam.experiments.errors import RunError
from bisam.experiments.models.build import build
from bisam.experiments.models.frozen import freeze, to_train
from bisam.experiments.models.logits import Logits
from bisam.experiments.recipes.catalogue import METHODS
from bisam.experiments.recipes.expressions import take_steps
from bisam.experiments.recipes.length import run_length
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs.files import read_json, write
from bisam.experiments.training.counting import CountedMethod
from bisam.experiments.training.measured import cost, measured_batches
from bisam.methods import Method
from bisam.methods.method import indexed

_PACKAGES = ("torch", "torchvision", "timm", "transformers")
_AT_ONCE = 2e9  # operations of a gradient of the examples that are counted, at most, unless two have more
_AN_EPOCH = 2e11  # operations of an epoch that is counted whole
_SELECTED = 16  # examples at least, for a method that selects some of them
_SAMPLED = 20  # steps on which a method is counted whose steps differ
_DRAWN = 4  # steps on which a method is counted that draws parts of the weights


class Size(NamedTuple):
    """The size of a data set, and the shape of an example."""

    train: int
    validation: int
    test: int
    classes: int
    shape: tuple[int, ...] = ()
    """The shape of an image, or (T,) of tokens. Default: (3, side, side) for files of images, the length for texts."""


_GLUE = {  # examples of the official training and development sets, a tenth of the former held out; classes
    "cola": (8_551, 1_043, 2),
    "sst2": (67_349, 872, 2),
    "mrpc": (3_668, 408, 2),
    "qqp": (363_846, 40_430, 2),
    "mnli": (392_702, 9_815, 3),
    "qnli": (104_743, 5_463, 2),
    "rte": (2_490, 277, 2),
    "wnli": (635, 71, 2),
}
SIZES: Mapping[str, Size] = {
    "digits": Size(1_078, 270, 449, 10, (1, 8, 8)),
    "cifar10": Size(45_000, 5_000, 10_000, 10, (3, 32, 32)),
    "cifar100": Size(45_000, 5_000, 10_000, 100, (3, 32, 32)),
    "imagenet": Size(1_255_544, 25_623, 50_000, 1000),  # about 2 % of 1,281,167 are held out
    "flowers": Size(1_020, 1_020, 6_149, 102),
    "pets": Size(3_312, 368, 3_669, 37),
    "folder:flowers102-128": Size(459, 51, 510, 102),
    "text:pydoc": Size(4_500, 650, 650, 103, (64,)),  # about, for the texts of Python 3.11 in windows of 64
    "text:addition": Size(6_000, 1_500, 2_500, 12, (8,)),  # about: the seed draws pairs of numbers
    **{f"glue:{task}": Size(n - n // 10, n // 10, test, k) for task, (n, test, k) in _GLUE.items()},
}
"""The sizes of the data sets of the studies, by name, as `bisam.experiments.data` splits them."""

_MINILM = {"num_hidden_layers": 6, "hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536}
_CONFIGURATIONS: Mapping[str, tuple[str, Mapping[str, int]]] = {
    "hf:bert-base-uncased": ("BertConfig", {}),
    "hf:minilm-l6-h384": ("BertConfig", _MINILM),
}
"""Networks that transformers builds without their files: the type of the configuration, and what is not its default."""


class Count(NamedTuple):
    """Operations for one example."""

    step: int
    """Operations of a training step, a mean over the examples of a batch and over steps."""
    forward: int
    """Operations of a forward pass."""


@dataclass(frozen=True)
class Counts:
    """Counts by network and method, as a file keeps them."""

    counted: Mapping[str, Count]
    versions: Mapping[str, str]
    """Versions of the packages that have counted."""

    @classmethod
    def read(cls, path: Path) -> Counts:
        """Return the counts in a file; none if there is no file.

        Raises:
            RunError: the file is damaged.
        """
        content = read_json(path)
        if content is None:
            return cls({}, {})
        try:
            return cls({key: Count(**value) for key, value in content["operations"].items()}, content["versions"])
        except (AttributeError, KeyError, TypeError) as error:
            raise RunError(f"{path} is damaged ({error!r}): delete it to count again") from error

    def write(self, path: Path) -> None:
        """Write the counts to a file, atomically."""
        counted = {name: {"step": one.step, "forward": one.forward} for name, one in sorted(self.counted.items())}
        write(path, json.dumps({"versions": dict(self.versions), "operations": counted}, indent=1) + "\n")

    def having(self, recipe: Recipe) -> Counts:
        """Return these counts and that of the network and method of `recipe`, which takes seconds to minutes.

        Raises:
            ValueError: a package is missing, or the network cannot be built.
        """
        return Counts({**self.counted, key(recipe): count(recipe)}, _versions())

    def of(self, recipes: Iterable[Recipe]) -> Counts:
        """Return the counts that `recipes` need, without others."""
        keys = {key(recipe) for recipe in recipes if is_known(recipe)}
        return replace(self, counted={name: one for name, one in self.counted.items() if name in keys})


def key(recipe: Recipe) -> str:
    """Return what decides the count: network, shape of an example, classes, batch size and method."""
    size, method = size_of(recipe.dataset), recipe.method
    expression = METHODS[method].written() if method in METHODS else method  # a radius costs nothing
    shape = "x".join(map(str, _shape(recipe)))
    network = recipe.model.partition(".")[0]  # without timm's tag of the pretrained weights
    frozen = "" if recipe.frozen is None else f" with {recipe.frozen} layers frozen"
    return f"{network}{frozen}, {shape}, {size.classes} classes, batches of {recipe.batch_size}, {expression}"


def is_known(recipe: Recipe) -> bool:
    """Whether the size of the recipe's data set is known."""
    try:
        size_of(recipe.dataset)
    except KeyError:
        return False
    return True


def size_of(dataset: str) -> Size:
    """Return the size of a data set; `cifar10:224` is CIFAR-10 with images of 224 pixels.

    Raises:
        KeyError: it is not known.
    """
    name, _, side = dataset.partition(":")
    if side.isdecimal():
        return Size(*SIZES[name][:4], shape=(3, int(side), int(side)))
    return SIZES[dataset]


def missing(recipes: Iterable[Recipe], counts: Counts) -> list[Recipe]:
    """Return one recipe for each count that is missing."""
    wanted = {key(recipe): recipe for recipe in recipes if is_known(recipe)}
    return [recipe for name, recipe in wanted.items() if name not in counts.counted]


def operations(recipe: Recipe, counts: Counts) -> float:
    """Return the operations of a run: its training steps, and a forward pass of the other examples.

    The validation set is evaluated in each epoch, the test set once; a backward pass of a measured epoch counts as
    two forward passes.

    Raises:
        KeyError: the network and method were not counted.
    """
    size, one = size_of(recipe.dataset), counts.counted[key(recipe)]
    train, validation, test = size[:3]
    if recipe.held_out is not None:
        train, validation = _divided(train + validation, recipe.held_out)
    train, validation, test = (min(n, recipe.limit or n) for n in (train, validation, test))  # as `data.load` does
    if recipe.imbalance > 1:  # nearly: the classes of a data set seldom have the same numbers of examples
        train = sum(long_tail_counts([train // size.classes] * size.classes, recipe.imbalance))
    train = min(train, recipe.train_examples or train)
    length = run_length(recipe, batches_of(train, recipe.batch_size))
    trained = (length.epochs - 1) * train + min(train, length.losses_in(length.epochs) * recipe.batch_size)
    measured = min(measured_batches(recipe, train) * recipe.batch_size, train)
    gradients, forwards = cost(recipe)
    passes = min(recipe.measured_epochs, length.epochs) * measured * (3 * gradients + forwards)
    return one.step * trained + one.forward * (length.epochs * validation + test + passes)


def _divided(examples: int, share: float) -> tuple[int, int]:
    """Return the training and the validation examples; the latter are all, if none is held out."""
    held = round(share * examples)
    return examples - held, held or examples


def count(recipe: Recipe) -> Count:
    """Count the operations for an example of `recipe`'s network and method.

    It is the count of the second step. If the steps of the method differ, or if it draws parts of the weights, it is
    the mean of some steps; for a small network it is the mean of an epoch. SAF and MESA begin after some epochs: they
    are counted as they run from then on.

    Raises:
        ValueError: a package is missing, or the network cannot be built.
    """
    size = size_of(recipe.dataset)
    with torch.random.fork_rng([]), sdpa_kernel(SDPBackend.MATH):
        torch.manual_seed(0)
        model = _network(recipe, size.classes)
        inputs, labels = _batch(recipe, 2)
        model.eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(inputs)
        forward = counter.get_total_flops() // 2
        to_train(model)
        epoch = -(-size.train // recipe.batch_size)
        examples, first, steps = _plan(recipe, 3 * forward, epoch)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
        if _begins_late(recipe):
            epoch = 1  # so that the first step that is counted is after their start
        names = {"optimizer": optimizer, "steps": first + steps, "epoch": epoch, "examples": size.train}
        sharp = SharpnessAware(model, recipe.build_method(**names), cross_entropy)
        total = 0
        for step in range(first + steps):
            inputs, labels = _batch(recipe, examples)
            numbered = {"indices": torch.arange(examples)} if indexed(sharp.method) else {}
            optimizer.zero_grad()
            with FlopCounterMode(display=False) as counter:
                sharp(inputs, labels, **numbered).backward()
            optimizer.step()
            total += counter.get_total_flops() if step >= first else 0
    return Count(round(total / (steps * examples)), forward)


def _plan(recipe: Recipe, gradient: float, epoch: int) -> tuple[int, int, int]:
    """Return the examples in a batch that is counted, the first step that is counted, and the number of steps.

    Args:
        recipe: the recipe.
        gradient: operations of a gradient of an example.
        epoch: steps of an epoch.
    """
    if _begins_late(recipe):
        return min(recipe.batch_size, max(2, int(_AT_ONCE / gradient))), _SAMPLED, 1
    if gradient * epoch * recipe.batch_size < _AN_EPOCH:
        return recipe.batch_size, 0, epoch
    draws = re.search(r"\b(RandomMask|EBiSAM)\(", recipe.expression)
    selects = re.search(r"\b(ESAM|EBiSAM|KSAM)\(", recipe.expression)
    examples = min(recipe.batch_size, max(_SELECTED if selects else 2, int(_AT_ONCE / gradient)))
    if draws:
        return examples, 0, _DRAWN
    return (examples, 0, _SAMPLED) if _differ(recipe.expression) else (examples, 1, 1)


def _begins_late(recipe: Recipe) -> bool:
    return re.search(r"\b(SAF|MESA)\(", recipe.expression) is not None


def _shape(recipe: Recipe) -> tuple[int, ...]:
    if recipe.dataset.startswith("glue:"):
        return (recipe.max_length,)
    if recipe.dataset == "text:pydoc":
        return (recipe.max_length,)
    return size_of(recipe.dataset).shape or (3, recipe.image_size, recipe.image_size)


def _network(recipe: Recipe, classes: int) -> nn.Module:
    if recipe.model in _CONFIGURATIONS:
        import transformers

        kind, sizes = _CONFIGURATIONS[recipe.model]
        config = getattr(transformers, kind)(num_labels=classes, **sizes)
        model = Logits(transformers.AutoModelForSequenceClassification.from_config(config)).train()
        if recipe.frozen is not None:
            freeze(model, recipe.model, recipe.frozen)
        return model
    channels = _shape(recipe)[0] if len(_shape(recipe)) == 3 else 3
    return build(recipe.model, classes, channels=channels, frozen=recipe.frozen)


def _batch(recipe: Recipe, examples: int) -> tuple[Any, Tensor]:
    """Return random inputs and labels."""
    shape, classes = _shape(recipe), size_of(recipe.dataset).classes
    if has_tokens(recipe.dataset):
        return torch.randint(classes, (examples, *shape)), torch.randint(classes, (examples, *shape))
    labels = torch.randint(classes, (examples,))
    if len(shape) == 3:
        return torch.randn(examples, *shape), labels
    tokens = torch.randint(1000, (examples, *shape))
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}, labels


class _Recorder(CountedMethod):
    """Records the counts after each step."""

    def __init__(self, method: Method) -> None:
        super().__init__(method)
        self.after: list[tuple[int, int]] = []

    def __call__(self, oracle: Oracle, batch: Batch) -> Evaluation:
        answer = super().__call__(oracle, batch)
        self.after.append((self.counts[True], self.counts[False]))
        return answer


@cache
def _differ(expression: str) -> bool:
    """Whether steps after the first differ in their queries."""
    recorders: list[_Recorder] = []

    def record(method: Method) -> Method:
        recorders.append(_Recorder(method))
        return recorders[0]

    take_steps(expression, 8, _SAMPLED, record, total=_SAMPLED)
    after = recorders[0].after
    return len({(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(after)}) > 1


def _versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
