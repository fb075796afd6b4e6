"""Runs whose model is divided among devices: as one process, to the bit after an interruption, in one file."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.utils._pytree import tree_flatten

from bisam.experiments.errors import RunError
from bisam.experiments.models.build import NETWORKS
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs.folder import Run
from bisam.experiments.runs.machine import Machine
from bisam.experiments.training import ball
from bisam.experiments.training.fsdp import blocks, gathered_memories
from bisam.experiments.training.train import Training, train
from tests.support import ranks

MANY = Machine(log=(), nodes=2, strategy="fsdp")


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(self.norm(x)).tanh()


def network(classes: int, channels: int) -> nn.Sequential:
    """Two ranks share it unevenly, and it has no statistics of batches, which are of a rank's part."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 13), Block(13), Block(13), nn.Linear(13, classes))


def recipe(**fields: Any) -> Recipe:
    return Recipe(**{"model": "plain", "epochs": 3, "batch_size": 64, "limit": 128, "precision": "64", **fields})


STEPS = 3  # of ascent in the ball: each is a pass that waits for the other rank
RECIPES = [
    recipe(method="looksam", rho=0.4),
    recipe(
        method="momentum_sam",
        rho=0.4,
        ema=0.9,
        optimizer="adamw",
        schedule="linear",
        warmup=2,
        learning_rate=0.01,
        accumulate=2,
        clip=0.5,
        channels_last=True,
    ),
]


def measuring(epochs: int) -> list[Recipe]:
    return [RECIPES[0], replace(RECIPES[1], measured_epochs=epochs)]


def each_keeps_its_own(rank: int) -> bool:
    """The state of each rank, gathered, has what that rank keeps for itself under that rank's key."""
    part = DTensor.from_local(torch.full((1,), float(rank)), init_device_mesh("cpu", (2,)), [Shard(0)])
    own = {"batch": {f"{rank} of 2": torch.tensor(rank)}, "v": part, "holes": [rank]}
    memories = gathered_memories(own, SimpleNamespace(world_size=2))
    return all(
        list(memory["batch"]) == [f"{r} of 2"]
        and (int(memory["batch"][f"{r} of 2"]), memory["v"].tolist(), memory["holes"]) == (r, [0.0, 1.0], [r])
        for r, memory in enumerate(memories)
    )


def on_this_node(root: Path, measured: int) -> list[str]:
    """Runs as torchrun starts them, one of them interrupted after each of its epochs; and what is refused."""
    rank = torch.distributed.get_rank()
    names = {"RANK": rank, "GROUP_RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 1}
    os.environ |= {name: str(value) for name, value in names.items()} | {"TORCHELASTIC_RUN_ID": "none"}
    NETWORKS["plain"], ball.STEPS = (network, ""), STEPS
    assert each_keeps_its_own(rank)
    recipes = measuring(measured)
    for each in recipes:
        assert train(Run.under(root / "whole", each), MANY)["metric"] == "accuracy"  # on every rank
    said, broken, epoch = [], Run.under(root / "broken", recipes[1]), Training.epoch
    for last in (1, 2):

        def interrupted(self: Training, number: int, last: int = last) -> Any:
            if number > last:
                raise InterruptedError
            return epoch(self, number)

        Training.epoch = interrupted
        with pytest.raises(InterruptedError):
            train(broken, MANY)
    Training.epoch = epoch
    try:
        train(broken, Machine(log=(), nodes=2))
    except RunError as error:
        said.append(str(error))
    train(broken, MANY)
    return said


def parts(run: Run) -> tuple[list[Any], Any]:
    """The content of a checkpoint without times and environment, and its structure."""
    checkpoint = run.checkpoint()
    assert checkpoint is not None
    del checkpoint["sharded"]
    checkpoint["memories"] = checkpoint["memories"][-1]
    for row in checkpoint["history"]:
        del row["seconds"], row["relative_time"]
    return tree_flatten(checkpoint)


@pytest.mark.parametrize("measured", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_a_sharded_run_is_that_of_one_process_also_after_interruptions(tmp_path, monkeypatch, measured):
    monkeypatch.setattr(ball, "STEPS", STEPS)
    said = ranks.run(2, on_this_node, tmp_path, measured)
    assert all("was started with --strategy fsdp, which perturbs for the whole batch" in each[0] for each in said)
    monkeypatch.setitem(NETWORKS, "plain", (network, ""))
    recipes = measuring(measured)
    for each in recipes:
        one, many = Run.under(tmp_path / "one", each), Run.under(tmp_path / "whole", each)
        alone, together = train(one, Machine(log=())), many.result
        assert together is not None
        assert (alone["processes"], together["processes"]) == (1, 2)
        assert {k: v for k, v in alone.items() if k.startswith("test")} == {
            k: v for k, v in together.items() if k.startswith("test")
        }
        (ours, form), (theirs, expected) = parts(many), parts(one)
        assert form == expected
        for a, b in zip(ours, theirs, strict=True):
            if isinstance(a, Tensor):
                alike = torch.allclose(a, b, rtol=0, atol=1e-12)
            else:  # the sums of an epoch are in float32
                alike = a == pytest.approx(b, rel=1e-6) if isinstance(b, float) else a == b
            assert alike, (a, b)
    whole, broken = (parts(Run.under(tmp_path / name, recipes[1])) for name in ("whole", "broken"))
    assert whole[1] == broken[1]
    assert all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(whole[0], broken[0], strict=True))


@pytest.mark.slow
def test_a_sharded_run_by_the_command(bisam, tmp_path):
    """With running statistics, which are the first device's."""
    arguments = ("--method", "sam", "--rho", 0.4, "--epochs", 1, "--batch-size", 128, "--limit", 256)
    code, _, err = bisam("train", *arguments, "--devices", 2, "--strategy", "fsdp", "--out", tmp_path)
    assert code == 0, err
    (checkpoint,) = (torch.load(path, weights_only=True) for path in tmp_path.rglob("checkpoint.pt"))
    best = checkpoint["best"]["weights"]
    assert all(torch.equal(best[name], checkpoint["sharp"][f"model.{name}"]) for name in best)
    assert all(type(tensor) is Tensor for tensor in best.values())


class Owner(nn.Module):
    """Takes the weights of its parts without calling them."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([Block(3), Block(3)])
        self.attention = nn.MultiheadAttention(4, 2)


def test_blocks_are_members_of_lists_and_sequences():
    stages = nn.Sequential(nn.Linear(3, 3), nn.Sequential(Block(3), nn.ReLU()), nn.Sequential(Block(3), Block(3)))
    assert set(blocks(stages)) == {stages[1][0], *stages[2]}
    owner = Owner()
    assert set(blocks(owner)) == set(owner.parts)
    assert list(blocks(nn.ModuleList([nn.Linear(3, 3), owner]))) == [owner]
    assert list(blocks(nn.Linear(3, 3))) == []


def test_a_block_whose_weights_are_tied_to_another_stays_in_one_piece_with_it():
    model = nn.Sequential(Block(3), Block(3), Block(3))
    model[2].linear.weight = model[0].linear.weight
    assert list(blocks(model)) == [model[1]]
