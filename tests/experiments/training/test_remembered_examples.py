"""Training with methods that remember examples: a run hands their numbers over, and its checkpoint has their state."""

from __future__ import annotations

import pytest
import torch

from bisam.experiments.data.digits import digits
from bisam.experiments.data.image_tensors import Augmentation, Images, larger
from bisam.experiments.data.splits import Data
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs.folder import Run
from bisam.experiments.runs.machine import Machine
from bisam.experiments.training.train import Training, train

METHODS = (
    "SAF(BiSAM(0.1), epoch=epoch, examples=examples, ago=1, start=0, lam=3.0)",
    "MESA(SAM(0.1), decay=0.9, start=epoch)",
)
MACHINE = Machine(log=())


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


@pytest.mark.parametrize("ranks", [1, 3])
def test_numbers_of_examples_are_those_of_the_split(ranks):
    train_split = digits(seed=0).train.first(100)
    moved = Images(train_split.images, train_split.labels, augmentation=Augmentation())
    for split in (train_split, moved):
        found = []
        for rank in range(ranks):
            numbered = list(split.indexed(32, seeded(), rank, ranks))
            for (index, x, y), (same_x, same_y) in zip(numbered, split.batches(32, seeded(), rank, ranks), strict=True):
                assert torch.equal(x, same_x)
                assert torch.equal(y, same_y)
                assert torch.equal(split.labels[index], y)
                if split.augmentation is None:
                    assert torch.equal(split.images[index], x)
                found += index.tolist()
        assert len(set(found)) == len(found) >= 90


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_ends_as_an_uninterrupted_one(method, tmp_path):
    recipe = Recipe(method=method, epochs=3, batch_size=32, limit=90, learning_rate=0.02)

    def interrupt(row):
        if row["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(Run.under(tmp_path / "a", recipe), MACHINE, interrupt)
    resumed = Run.under(tmp_path / "a", recipe)
    train(resumed, MACHINE)
    whole = Run.under(tmp_path / "b", recipe)
    train(whole, MACHINE)
    timed = ("seconds", "relative_time")
    rows = [[{k: v for k, v in row.items() if k not in timed} for row in run.metrics()] for run in (resumed, whole)]
    assert rows[0] == rows[1]
    assert [row["forwards"] for row in rows[1]] == ([0, 0, 0] if method.startswith("SAF") else [0, 1, 1])


def test_the_outputs_of_every_example_are_recorded(tmp_path, monkeypatch):
    seen = []
    original = Training._test
    monkeypatch.setattr(
        Training, "_test", lambda self: (seen.append(self._state.sharp.state_dict()), original(self))[1]
    )
    train(Run.under(tmp_path, Recipe(method=METHODS[0], epochs=2, batch_size=32, limit=90)), MACHINE)
    state = seen[0]["_extra_state"]["state"]
    assert [epochs.tolist() for epochs in state["epochs"]] == [[0] * 90, [1] * 90]
    assert [outputs.shape for outputs in state["outputs"]] == [(90, 10)] * 2


def test_images_are_enlarged_for_networks_of_another_size():
    images = torch.randint(0, 256, (4, 3, 32, 32), generator=seeded(), dtype=torch.uint8)
    split = Images(images, torch.arange(4), torch.full((3,), 0.5), torch.full((3,), 0.25))
    data = larger(Data(split, split, split, classes=4), 64, ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)))
    for part in (data.train, data.validation, data.test):
        ((x, _),) = part.batches(4)
        assert x.shape == (4, 3, 64, 64)
        torch.testing.assert_close(x[..., 1::2, 1::2].mean(), (images.float() / 255).mean(), rtol=0.01, atol=0)
        assert 0 <= x.min() < x.max() <= 1
    for side in (31, 1025):
        with pytest.raises(ValueError, match=f"32 to 1024 pixels, got {side}"):
            larger(data, side, None)
