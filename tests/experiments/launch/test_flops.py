"""Counted operations: by hand for a small network, and the numbers that are known of large ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

pytest.importorskip("matplotlib")

from bisam.experiments import data
from bisam.experiments.errors import RunError
from bisam.experiments.launch import flops
from bisam.experiments.launch.flops import Count, Counts, count, key, missing, operations
from bisam.experiments.models.build import build
from bisam.experiments.recipes.presets import BERT, CIFAR, VIT
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs.machine import Machine
from bisam.experiments.studies import STUDIES

DIGITS = Recipe(method="sgd")


def by_hand() -> tuple[int, int]:
    """Operations of a forward pass of the digits' network for an example, and of its first layer."""
    each: list[int] = []

    def record(layer: nn.Module, _: object, out: torch.Tensor) -> None:
        per_output = layer.in_features if isinstance(layer, nn.Linear) else layer.weight[0].numel()
        each.append(2 * out[0].numel() * per_output)

    model = build("convnet", 10, channels=1).eval()
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(record)
    model(torch.randn(1, 1, 8, 8))
    return sum(each), each[0]


def test_a_plain_step_by_hand():
    forward, first = by_hand()
    # A layer's weights and its inputs each have a gradient, but for the inputs of the first layer.
    assert count(DIGITS) == Count(3 * forward - first, forward)


def test_methods_cost_what_they_ask_for():
    (plain, forward), epoch = count(DIGITS), 17
    for method, expected in {
        "sam": 2 * plain,
        "bisam_log": 2 * plain,
        "looksam": (1 + 4 / epoch) * plain,  # steps 0, 5, 10 and 15
        "sampa": (2 + 1 / epoch) * plain,
        "KSAM(32)": forward + 2 * plain / 2,
        "mesa": plain + forward,
        "saf": plain,
    }.items():
        assert count(replace(DIGITS, method=method)).step == pytest.approx(expected, rel=1e-6), method


def test_a_count_leaves_the_random_state_and_repeats():
    state = torch.get_rng_state()
    assert count(replace(DIGITS, method="esam")) == count(replace(DIGITS, method="esam"))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "multiplications"),
    [  # as papers and timm's tables give them
        (CIFAR, 0.1255e9),
        (replace(CIFAR, model="resnet32"), 0.0695e9),
        (VIT, 17.6e9),
        (replace(BERT, max_length=128), 11.2e9),
    ],
    ids=lambda value: getattr(value, "model", None),
)
def test_known_networks(recipe, multiplications):
    assert count(replace(recipe, method="sgd", rho=None)).forward == pytest.approx(2 * multiplications, rel=0.02)


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("SAM(0.1)", (2, 1, 1)),
        ("Every(3, SAM(0.1))", (2, 0, 20)),
        ("EBiSAM(0.1)", (16, 0, 4)),
        ("KSAM(4)", (16, 1, 1)),
        ("LESAM(0.1)", (2, 1, 1)),
    ],
)
def test_steps_that_are_counted(expression, expected):
    recipe = replace(CIFAR, method=expression, rho=None)
    assert flops._plan(recipe, gradient=1e10, epoch=352) == expected


def test_operations_of_a_run():
    counts = Counts({key(DIGITS): Count(100, 7)}, {})
    assert operations(replace(DIGITS, epochs=3), counts) == 3 * (100 * 1078 + 7 * 270) + 7 * 449
    assert operations(replace(DIGITS, epochs=3, limit=50), counts) == 3 * (100 * 50 + 7 * 50) + 7 * 50
    steps = replace(DIGITS, epochs=None, steps=20)  # 17 steps are an epoch, the other 3 have 64 examples
    assert operations(steps, counts) == 100 * (1078 + 3 * 64) + 2 * 7 * 270 + 7 * 449
    measured = replace(DIGITS, epochs=3, measured_epochs=2)  # 16 batches of 64; a backward pass counts as two forward
    passes = 3 * (3 * 30 + 4) + 7 + 1 + 4 + 1
    assert operations(measured, counts) == operations(replace(DIGITS, epochs=3), counts) + 2 * 1024 * passes * 7
    few = replace(measured, limit=50, epochs=1, measured_epochs=20)
    assert operations(few, counts) == operations(replace(few, measured_epochs=0), counts) + 50 * passes * 7
    with pytest.raises(KeyError):
        operations(replace(DIGITS, method="sam"), counts)


def test_the_key_has_no_radius_and_no_bound_of_a_named_method():
    recipe = Recipe(method="bisam_tanh")
    assert key(recipe) == key(replace(recipe, rho=0.3, mu=2.0, alpha=0.5, seed=3, epochs=2, noise=0.4))
    others = [replace(recipe, method="sam"), replace(recipe, batch_size=32), replace(CIFAR, method="bisam_tanh")]
    assert len({key(other) for other in (recipe, *others, replace(others[2], dataset="cifar100"))}) == 5


def test_counts_in_a_file(tmp_path):
    path = tmp_path / "counts.json"
    assert Counts.read(path) == Counts({}, {})
    recipes = [DIGITS, replace(DIGITS, rho=None, epochs=2), replace(DIGITS, method="sam"), Recipe(dataset="folder:x")]
    assert missing(recipes, Counts.read(path)) == [recipes[1], recipes[2]]
    counts = Counts.read(path).having(DIGITS)
    assert counts.versions["torch"] == torch.__version__.partition("+")[0]
    counts.write(path)
    assert Counts.read(path) == counts
    assert missing(recipes, counts) == [recipes[2]]
    assert counts.of([recipes[2]]).counted == {}
    for content in ("{", "[]", '{"operations": {}}', '{"operations": {"a": {"step": 1}}, "versions": {}}'):
        path.write_text(content)
        with pytest.raises(RunError, match=r"counts\.json"):
            Counts.read(path)


def test_the_sizes_are_those_of_the_data_sets():
    splits = data.load(DIGITS, Machine())
    assert flops.SIZES["digits"][:4] == (*(len(getattr(splits, n)) for n in ("train", "validation", "test")), 10)
    assert {f"glue:{task}" for task in data.TASKS} <= {*flops.SIZES}
    assert flops.size_of("cifar100:224") == flops.Size(45_000, 5_000, 10_000, 100, (3, 224, 224))
    for study in STUDIES.values():
        assert all(flops.is_known(recipe) for recipe in study.recipes(None)), study.name
