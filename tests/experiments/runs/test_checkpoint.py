"""Checkpoints: their checksum, the one before the latest, and what is no checkpoint."""

from __future__ import annotations

import copy
import io
import random
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from bisam.experiments.errors import DamagedError, RunError, RunWarning
from bisam.experiments.runs.checkpoint import (
    CHECKPOINT,
    DAMAGED,
    PREVIOUS,
    content_fault,
    read_checkpoint,
    serialized,
)
from bisam.experiments.runs.folder import Run
from bisam.experiments.training.train import train
from tests.experiments.runs.conftest import MACHINE, RECIPE, flipped

FILES_OF_0_1 = sorted((Path(__file__).parents[2] / "data" / "0.1" / "experiments").glob("*/*/*/checkpoint.pt"))
TIMES = {"seconds_per_epoch", "relative_time", "finished", "metrics", "checksum"}


def ends_as(run: Run, whole: Run) -> bool:
    """Whether weights, method and result are the same to the bit."""
    ours, theirs = (
        torch.utils._pytree.tree_leaves([r.checkpoint()[k] for k in ("sharp", "optimizer")]) for r in (run, whole)
    )
    same = [torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(ours, theirs, strict=True)]
    results = [{k: v for k, v in r.result.items() if k not in TIMES} for r in (run, whole)]
    return all(same) and results[0] == results[1]


# The checksum


def test_a_checkpoint_is_what_torch_and_zip_read(broken):
    path = broken.folder / CHECKPOINT
    assert torch.load(path, weights_only=True)["recipe"] == RECIPE.to_dict()
    assert zipfile.ZipFile(path).comment.startswith(b"bisam checkpoint blake2b ")
    assert content_fault(path.read_bytes()) is None


def test_each_flipped_bit_is_noticed(broken):
    """Of each byte of the archive's directory and the checksum, and of many in front of them."""
    content = (broken.folder / CHECKPOINT).read_bytes()
    chosen = random.Random(0)
    positions = [*range(len(content) - 300, len(content)), *chosen.sample(range(len(content) - 300), 100)]
    for position in positions:
        damaged = bytearray(content)
        damaged[position] ^= 1 << chosen.randrange(8)
        assert content_fault(bytes(damaged)) is not None, position


@pytest.mark.parametrize("length", [0, 1, 21, 22, 50, 100, 0.1, 0.5, 0.9, -1, -64, -89, -150])
def test_a_part_of_a_file_is_noticed(broken, length):
    content = (broken.folder / CHECKPOINT).read_bytes()
    part = content[: int(length * len(content)) if isinstance(length, float) else length]
    assert content_fault(part) is not None


@pytest.mark.parametrize("path", FILES_OF_0_1, ids=lambda path: path.parents[1].name[:20])
def test_the_checksums_of_the_members_are_compared_in_files_of_0_1(tmp_path, path):
    content = path.read_bytes()
    assert content_fault(content) is None
    chosen = random.Random(0)
    for member in zipfile.ZipFile(path).infolist():
        if member.file_size:
            begin = member.header_offset + 30 + sum(struct.unpack_from("<HH", content, member.header_offset + 26))
            damaged = bytearray(content)
            damaged[begin + chosen.randrange(member.file_size)] ^= 1 << chosen.randrange(8)
            assert content_fault(bytes(damaged)) == f"the checksum of {member.filename} differs"
    assert content_fault(content[:-1]) is not None


# The checkpoint before the latest


def test_the_checkpoint_before_is_kept_until_the_run_is_finished(whole, broken):
    epochs = {name: len(read_checkpoint(broken.folder / name)[0]["history"]) for name in (CHECKPOINT, PREVIOUS)}
    assert epochs == {CHECKPOINT: 2, PREVIOUS: 1}
    assert (whole.folder / CHECKPOINT).exists()
    assert not (whole.folder / PREVIOUS).exists()


@pytest.mark.parametrize("seed", range(5))
def test_a_run_with_a_damaged_checkpoint_ends_as_without_the_damage(copied, whole, seed):
    run, chosen = copied("a"), random.Random(seed)
    path = run.folder / CHECKPOINT
    flipped(path, chosen.randrange(path.stat().st_size), chosen.randrange(8))
    bad = path.read_bytes()
    with pytest.warns(RunWarning) as warned:
        train(run, MACHINE)
    (message,) = {str(one.message) for one in warned}
    assert message.startswith(f"{path} is damaged (")
    assert message.endswith(f"), and is now {DAMAGED}: the run resumes from {PREVIOUS}, one epoch earlier")
    assert len(message) - len(str(run.folder)) < 160
    assert "\n" not in message
    assert (run.folder / DAMAGED).read_bytes() == bad
    assert ends_as(run, whole)


def test_no_flipped_bit_changes_what_a_run_resumes_from(copied, broken):
    """At many places; the run resumes from the first epoch, whose checkpoint is whole."""
    run, chosen = copied("a"), random.Random(1)
    path, good = run.folder / CHECKPOINT, (broken.folder / CHECKPOINT).read_bytes()
    for _ in range(60):
        shutil.copy(broken.folder / PREVIOUS, run.folder / PREVIOUS)
        path.write_bytes(good)
        flipped(path, chosen.randrange(len(good)), chosen.randrange(8))
        with pytest.warns(RunWarning), run.open():
            assert len(run.checkpoint()["history"]) == 1


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"garbage"])
def test_a_checkpoint_of_other_content_costs_an_epoch(broken, whole, content):
    (broken.folder / CHECKPOINT).write_bytes(content)
    with pytest.warns(RunWarning, match="one epoch earlier"):
        train(broken, MACHINE)
    assert ends_as(broken, whole)


def test_a_process_that_ended_between_the_two_names_costs_an_epoch(broken, whole):
    (broken.folder / CHECKPOINT).unlink()
    train(broken, MACHINE)
    assert ends_as(broken, whole)


def test_if_both_are_damaged_nothing_is_changed(broken):
    for name in (CHECKPOINT, PREVIOUS):
        flipped(broken.folder / name, 5000)
    before = {path.name: path.read_bytes() for path in broken.folder.iterdir()}
    message = rf"{CHECKPOINT} is damaged \(its checksum differs, and {PREVIOUS} too: its checksum differs\): delete "
    with pytest.raises(RunError, match=message + r"its folder to run it again; other runs are not affected"):
        train(broken, MACHINE)
    assert {path.name: path.read_bytes() for path in broken.folder.iterdir()} == before


@pytest.mark.slow
def test_the_damage_is_one_line_on_the_command_line(copied, tmp_path):
    (run := copied("a")).folder.parents[1].rename(tmp_path / "train")
    folder = tmp_path / "train" / run.folder.parent.name / run.folder.name
    flipped(folder / CHECKPOINT, 5000)
    code = "import sys; from bisam.experiments import main; sys.argv = ['bisam', *sys.argv[1:]]; main()"
    fields = [("method", RECIPE.method), ("noise", "0.4"), ("epochs", "3"), ("batch-size", "32"), ("limit", "96")]
    flags = [word for name, value in fields for word in (f"--{name}", value)]
    command = [sys.executable, "-c", code, "train", *flags, "--out", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    message = (
        f"bisam: {folder / CHECKPOINT} is damaged (its checksum differs), and is now {DAMAGED}: the run resumes from "
    )
    assert ended.returncode == 0
    assert ended.stderr == f"{message}{PREVIOUS}, one epoch earlier\n"


# What is no checkpoint of the run


def changed(run: Run, change) -> None:
    """Write a checkpoint with a correct checksum and another state."""
    state = run.checkpoint()
    change(state)
    (run.folder / CHECKPOINT).write_bytes(serialized(state, RECIPE))


def put(*keys):
    """A change of the entry at `keys`: the last one is its new value."""
    *path, last, value = keys

    def change(state):
        for key in path:
            state = state[key]
        state[last] = value

    return change


CHANGES = {
    "no history": lambda state: state.pop("history"),
    "empty history": put("history", []),
    "history of another type": put("history", {"epoch": 1}),
    "history of texts": put("history", ["epoch"]),
    "history with a text": put("history", 0, "validation", "high"),
    "history with a bool": put("history", 0, "seconds", True),
    "history with a huge number": put("history", 0, "seconds", 10**400),
    "history with a time that is no time": put("history", 1, "seconds", 1e200),
    "history with an infinite time": put("history", 1, "relative_time", float("inf")),
    "history with another column": put("history", 1, "more", 1.0),
    "history without a column": lambda state: [row.pop("forwards") for row in state["history"]],
    "history in another order": lambda state: state["history"].reverse(),
    "history that is too long": lambda state: state["history"].extend(copy.deepcopy(state["history"])),
    "no best": put("best", {}),
    "best of another type": put("best", 5),
    "best with a text": put("best", "score", "high"),
    "best that is not finite": put("best", "score", float("nan")),
    "best of no epoch": put("best", "epoch", 3),
    "best with other weights": put("best", "weights", {"a": 1}),
    "best without weights": put("best", "weights", None),
    "no memories": put("memories", []),
    "memories of another type": put("memories", {"step": 1}),
    "memory of another type": put("memories", 0, 5),
    "memory with a negative step": put("memories", 0, "step", -1),
    "memory with a text as step": put("memories", 0, "step", "one"),
    "memory with a state of another type": put("memories", 0, "state", [1]),
    "memory with another name": put("memories", 0, "method", 7),
    "memory with broken tensors": put("memories", 0, "state", {"v": {"__vector__": "x", "holes": []}}),
    "memory with other tensors": put("memories", 0, "state", {"v": {"__vector__": [torch.zeros(1)], "holes": []}}),
    "memory with a number for tensors": lambda state: state["memories"][0].update(step=7, state={"v": 5}),
    "sharp of another type": put("sharp", None),
    "sharp without a tensor": lambda state: state["sharp"].popitem(),
    "sharp with a number": put("sharp", "model.extra", 1),
    "sharded of another type": put("sharded", "no"),
    "optimizer of another type": put("optimizer", []),
    "optimizer without groups": lambda state: state["optimizer"].pop("param_groups"),
    "optimizer with a text as rate": put("optimizer", "param_groups", 0, "lr", "fast"),
    "optimizer with other shapes": put("optimizer", "state", 0, "momentum_buffer", torch.zeros(7)),
    "optimizer with another index": put("optimizer", "state", 999, {"momentum_buffer": torch.zeros(7)}),
    "scheduler of another type": put("scheduler", 3),
    "scheduler with a text": put("scheduler", "last_epoch", "two"),
    "recipe of another type": None,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_state_of_another_form_is_refused_in_one_line(broken, change):
    if CHANGES[change] is None:
        state, buffer = {**broken.checkpoint(), "recipe": 5}, io.BytesIO()
        torch.save(state, buffer)
        (broken.folder / CHECKPOINT).write_bytes(buffer.getvalue())
    else:
        changed(broken, CHANGES[change])
    with pytest.raises(DamagedError, match=rf"{CHECKPOINT} is damaged \(.+\): delete .+ to run it again") as raised:
        train(broken, MACHINE)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value).replace(f"{broken.folder}/", "")) <= 200
    assert broken.result is None


def test_a_file_with_code_is_refused_without_advice_to_run_it(broken):
    buffer = io.BytesIO()
    torch.save({"recipe": RECIPE.to_dict(), "sharp": Path("x")}, buffer)
    (broken.folder / CHECKPOINT).write_bytes(buffer.getvalue())
    with pytest.raises(
        DamagedError, match="objects other than tensors, numbers, texts and containers of these"
    ) as raised:
        train(broken, MACHINE)
    assert "weights_only" not in str(raised.value)
