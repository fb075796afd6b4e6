"""Results: what is read is checked, whatever the files hold."""

from __future__ import annotations

import json
import random
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from bisam.experiments.errors import DamagedError, RunError
from bisam.experiments.reports import figures, tables
from bisam.experiments.runs.files import checksum, to_csv
from bisam.experiments.runs.folder import Finished, Run, finished
from bisam.experiments.runs.results import first_diverged
from bisam.experiments.training.train import train
from tests.experiments.runs.conftest import MACHINE, flipped

FINISHED_BY_0_1 = sorted((Path(__file__).parents[2] / "data" / "0.1" / "experiments").glob("*/*/*/result.json"))
SUMS = ("recipe", "metrics", "checksum")


def root(run: Run) -> Path:
    return run.folder.parents[1]


def read(run: Run) -> Finished | RunError:
    (one,) = finished(root(run))
    return one


def rewritten(run: Run, **changes: object) -> None:
    """Change entries of the result, as if it had been written with them; ... removes one."""
    path = run.folder / "result.json"
    values = {**json.loads(path.read_text()), **changes}
    values = {name: value for name, value in values.items() if value is not ... and name != "checksum"}
    path.write_text(json.dumps({**values, "checksum": checksum(values)}))


def as_of_0_1(run: Run) -> None:
    """Remove what results of 0.1 do not have, above all the checksums."""
    path = run.folder / "result.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in values.items() if name not in (*SUMS, "diverged")}))


def test_a_finished_run_is_read_as_it_was_written(done):
    run = read(done)
    assert run.recipe == done.recipe
    assert run.result == done.result == json.loads((done.folder / "result.json").read_text())
    assert run.metrics == done.metrics()
    assert run.diverged is None
    assert run.result["diverged"] is None


@pytest.mark.parametrize("path", FINISHED_BY_0_1, ids=lambda path: path.parents[1].name[:20])
def test_a_result_of_0_1_has_no_checksum_and_is_read(path):
    result = json.loads(path.read_text())
    run = next(one for one in finished(path.parents[2]) if isinstance(one, Finished) and one.result == result)
    assert "diverged" not in run.result
    assert run.diverged is None


@pytest.mark.parametrize("name", ["result.json", "metrics.csv"])
@pytest.mark.parametrize("seed", range(3))
def test_each_flipped_bit_of_a_digit_is_noticed(done, name, seed):
    """Also one that leaves a number in its range."""
    path, chosen, unchanged = done.folder / name, random.Random(seed), read(done)
    content = path.read_text()
    noticed = 0
    for found in chosen.sample(list(re.finditer(r"\d", content)), 20):
        path.write_text(content)
        flipped(path, found.start(), chosen.randrange(3))
        one = read(done)
        # The last digits of a number can be beyond the precision of a float.
        assert isinstance(one, DamagedError) or one == unchanged
        noticed += isinstance(one, DamagedError)
    assert noticed > 10


def test_metrics_and_recipe_of_another_run_are_noticed(done):
    rows = done.metrics()
    (done.folder / "metrics.csv").write_text(to_csv([{**row, "flipped": 0.0} for row in rows]))
    assert "metrics.csv is damaged (its checksum differs)" in str(read(done))
    (done.folder / "metrics.csv").write_text(to_csv(rows))
    values = json.loads((done.folder / "recipe.json").read_text())
    (done.folder / "recipe.json").write_text(json.dumps({**values, "batch_size": 33}))
    assert "it belongs to another recipe" in str(read(done))


WRONG = {
    **{name: [None, True, "0.9", [], 1.5, -1.5, 10**400] for name in ("test_best", "test_last", "validation_best")},
    "test_ema": [None, "0.9", 2],
    "best_epoch": [None, True, 1.0, 0, 4, "1", 10**400],
    "validation_ties": [None, True, 1.0, 0, 4, "1"],
    "validation_examples": [None, True, -1, 1.5, "270"],
    "headline": [None, 5, "", "first", ["best"]],
    "diverged": [True, 0, 4, 1.5, "1"],
    "stopped": [None, 1, "", "nan", ["patience"]],
    "message": [None, 5, "", "a\nb", "x" * 1000],
    "metric": [5, None, "", "a\nb", "\ud800", "x" * 1000],
    "scores": [None, 5, [], {"best": 0.9}, {"best": {"accuracy": "high"}}, {"best": {"accuracy": 2}}],
    "examples": [0, -1, 1.5, True, "many"],
    "seconds_per_epoch": [None, -1, 0, "1", True, 1e200, 10**400, {}],
    "relative_time": [None, -0.1, 0.0, []],
    "gradients_per_step": [None, -1, 1e200],
    "forwards_per_step": [None, "0"],
    "finished": [None, 5, "yesterday", "2026-01-02", ""],
    "device": [5, None, "\x1b[31m"],
    "hardware": [["cpu"], "\ud800"],
    "commit": [0],
    "recipe": [5, "other-noise-0-00000000/seed-0", ...],
    "metrics": [5, "0" * 32, "", ...],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, bad in WRONG.items() for value in bad])
def test_an_entry_of_another_type_or_out_of_range_is_named(done, name, value):
    rewritten(done, **{name: value})
    error = read(done)
    assert isinstance(error, DamagedError)
    assert "\n" not in str(error)
    if (name, value) == ("metrics", "0" * 32):
        assert "metrics.csv is damaged (its checksum differs)" in str(error)
    else:
        assert re.search(rf"result.json is damaged \(.*{name}", str(error))


@pytest.mark.parametrize("name", ["test_best", "test_last", "validation_best", "best_epoch", "finished"])
def test_a_missing_entry_is_named(done, name):
    rewritten(done, **{name: ...})
    assert f"it has no {name}" in str(read(done))


def test_the_remedy_keeps_the_training(done):
    """The damaged result is made again from the checkpoint, without an epoch."""
    before = done.result
    (path := done.folder / "result.json").write_text("{")
    assert str(read(done)).endswith(
        "delete this file, and the same command writes it again from the checkpoint; other runs are not affected"
    )
    path.unlink()
    epochs = []
    train(done, MACHINE, epochs.append)
    assert epochs == []
    assert {k for k, v in done.result.items() if v != before[k]} <= {"finished", "checksum"}
    (path := done.folder / "recipe.json").write_text("{")
    with pytest.raises(RunError, match=r"delete this file, and the same command writes it again"):
        train(done, MACHINE)
    path.unlink()
    assert train(done, MACHINE) == done.result


def test_without_a_checkpoint_the_run_is_to_be_run_again(done):
    (done.folder / "checkpoint.pt").unlink()
    (done.folder / "result.json").write_text("{")
    assert ": delete its folder to run it again; other runs are not affected" in str(read(done))


# Whatever the files hold


def mutated(content: bytes, chosen: random.Random) -> bytes:
    """The content with a few changes: flipped bits, a part that is missing or repeated, other words in its place."""
    for _ in range(chosen.randint(1, 3)):
        at = chosen.randrange(len(content) + 1)
        end = min(len(content), at + chosen.randint(0, 30))
        words = [
            b"",
            b"NaN",
            b"1e400",
            b"-1",
            b"null",
            b"true",
            b'"',
            b"[[",
            b"}",
            b",",
            b"\n",
            b"\0",
            b"\xff",
            b"9" * 40,
        ]
        words += [content[at:end] * 2, bytes(byte ^ (1 << chosen.randrange(8)) for byte in content[at:end])]
        content = content[:at] + chosen.choice(words) + content[end:]
    return content


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)


def reported(run: Run) -> None:
    """Read the runs; one that is read can be reported and drawn, and an error is one line."""
    runs = list(finished(root(run)))
    assert len(runs) == 1
    for one in runs:
        if isinstance(one, Finished):
            tables.markdown("title", [one], {"flips.png": "flips"}).encode()
            for name in ("accuracy", "time"):
                figures.draw(name, [one])
        else:
            assert "\n" not in str(one)
            assert "damaged" in str(one) or "version" in str(one)


@pytest.mark.parametrize("name", ["result.json", "recipe.json", "metrics.csv"])
@pytest.mark.parametrize("old", [False, True], ids=["new", "0.1"])
def test_any_content_is_read_or_refused_in_one_line(done, name, old):
    if old:
        as_of_0_1(done)
    path, chosen = done.folder / name, random.Random(f"{name} {old}")
    content = path.read_bytes()
    for _ in range(60):
        path.write_bytes(mutated(content, chosen))
        reported(done)


@settings(deadline=None, derandomize=True, max_examples=80, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(["result.json", "recipe.json"]), st.integers(0, 40), VALUES)
def test_any_value_of_an_entry_is_read_or_refused_in_one_line(done, name, index, value):
    as_of_0_1(done)
    path = done.folder / name
    content = path.read_text()
    values = json.loads(content)
    values[list(values)[index % len(values)]] = value
    path.write_text(json.dumps(values))
    reported(done)
    path.write_text(content)


def test_a_recipe_that_is_missing_is_written_again_by_the_same_command(done):
    (done.folder / "recipe.json").unlink()
    assert str(read(done)).endswith(
        "recipe.json is damaged (it is missing): the same command writes it again; other runs are not affected"
    )
    assert train(done, MACHINE) == done.result
    assert isinstance(read(done), Finished)


@pytest.mark.parametrize("name", ["result.json", "recipe.json", "metrics.csv"])
def test_a_folder_in_the_place_of_a_file_is_named(done, name):
    (done.folder / name).unlink()
    (done.folder / name).mkdir()
    assert f"{name} is damaged (Is a directory)" in str(read(done))


def test_one_damaged_run_does_not_stop_the_report_of_the_others(done, tmp_path):
    study = tmp_path / "runs" / "digits"
    good, bad = (Run.under(study, replace(done.recipe, seed=seed)) for seed in (0, 1))
    shutil.copytree(done.folder, good.folder)
    shutil.copytree(done.folder, bad.folder)
    (bad.folder / "result.json").write_text('{"test_best": 1e400}')
    runs = list(finished(study))
    assert isinstance(runs[0], Finished)
    assert isinstance(runs[1], DamagedError)
    text = tables.markdown("title", runs[:1], {}, left_out=["a|b/result.json (it is not an object)"])
    assert r"Left out, because they are damaged: a\|b/result.json (it is not an object)." in text


def test_the_first_epoch_without_a_finite_loss_is_found():
    rows = [{"epoch": float(epoch), "train_loss": loss} for epoch, loss in enumerate((2.0, float("inf"), 1.0), 1)]
    assert first_diverged(rows) == 2
    assert first_diverged(rows[:1]) is None
