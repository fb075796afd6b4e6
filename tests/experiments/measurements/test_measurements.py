"""Measurements: tiny ones from end to end, what they keep and refuse, and the example by hand."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock

pytest.importorskip("matplotlib")

from bisam import NegLog, Tanh
from bisam.experiments.errors import RunError
from bisam.experiments.measurements import MEASUREMENTS, Measurement, epochs, losses, report, run
from bisam.experiments.measurements.example import option_a, option_b
from bisam.experiments.measurements.losses import row_by_row
from bisam.experiments.measurements.measurement import values_for
from bisam.experiments.runs.files import to_csv
from bisam.experiments.runs.machine import Machine

FIGURE_1, EXAMPLE, TABLE_11, TABLE_12 = (MEASUREMENTS[name] for name in ("figure1", "example", "table11", "table12"))
TINY = {"models": "resnet20", "iterations": "2", "batch_size": "4"}


def counted(parts, fails=None):
    """A measurement of nothing: its rows say how many parts were measured before."""
    measured = []

    def measure(part, settings, device):
        if part == fails:
            raise KeyboardInterrupt
        measured.append(part)
        return [{"part": part, "size": settings["size"], "at": len(measured)}]

    columns = {name: lambda row, name=name: str(row[name]) for name in ("part", "size", "at")}
    settings = {"size": 1, "rate": 0.5, "names": ("a", "b")}
    return Measurement("count", "Counted", "A note.", settings, lambda _: list(parts), measure, columns), measured


def test_all_have_what_a_report_needs():
    assert " ".join(MEASUREMENTS) == (
        "figure1 example label-gradient cosines table11 table12 rapp-figures gan sampa-costs sampa-gradients"
    )
    for name, measurement in MEASUREMENTS.items():
        assert measurement.name == name
        assert measurement.drawn_only == (name == "figure1")
        assert measurement.title
        assert measurement.note


# The folder of a measurement


def test_a_finished_part_is_not_measured_again(tmp_path):
    broken, first = counted(["a", "b", "c"], fails="c")
    with pytest.raises(KeyboardInterrupt):
        run(broken, {}, tmp_path)
    assert first == ["a", "b"]
    (folder,) = tmp_path.iterdir()
    assert "Not measured yet: 1 of 3 parts." in report(broken, folder).markdown

    whole, second = counted(["a", "b", "c"])
    seen = []
    assert run(whole, {}, tmp_path, progress=lambda *news: seen.append(news)) == folder
    assert second == ["c"]
    assert seen == [("c", 2, 3), ("", 3, 3)]
    assert [row["at"] for row in report(whole, folder).rows] == [1, 2, 1]
    assert "Not measured" not in report(whole, folder).markdown
    assert sorted(path.name for path in folder.iterdir() if path.name != ".lock") == [
        "a.json", "b.json", "c.json", "measurement.json",
    ]  # fmt: skip


def test_other_settings_are_another_folder(tmp_path):
    measurement, _ = counted(["a"])
    standard = run(measurement, {}, tmp_path)
    assert standard.name == "count-cpu-44136fa3"
    assert run(measurement, {"size": "1", "rate": "5e-1", "names": "a,b"}, tmp_path) == standard
    others = {run(measurement, {"size": size}, tmp_path) for size in ("2", "3")}
    assert len(others | {standard}) == 3
    later = replace(measurement, settings={**measurement.settings, "new": 7})
    assert run(later, {}, tmp_path) == standard


def test_the_report_of_a_root_is_of_the_default_settings_if_they_are_there(tmp_path):
    measurement, _ = counted(["a"])
    with pytest.raises(ValueError, match=r"no count is measured in .*: run `bisam run count` first"):
        report(measurement, tmp_path)
    run(measurement, {"size": "2"}, tmp_path)
    assert report(measurement, tmp_path).rows[0]["size"] == 2
    run(measurement, {}, tmp_path)
    run(measurement, {"size": "3"}, tmp_path)
    assert report(measurement, tmp_path).rows[0]["size"] == 1


def test_a_changed_default_is_not_mixed_with_what_was_measured(tmp_path):
    measurement, _ = counted(["a"])
    run(measurement, {}, tmp_path)
    changed = replace(measurement, settings={**measurement.settings, "size": 5})
    with pytest.raises(RunError, match="belongs to another measurement"):
        run(changed, {}, tmp_path)


def test_one_process_at_a_time(tmp_path):
    measurement, _ = counted(["a"])
    folder = run(measurement, {}, tmp_path)
    with FileLock(folder / ".lock"), pytest.raises(RunError, match="in use by another process"):
        run(measurement, {}, tmp_path)


def test_leftovers_of_a_killed_process_are_removed(tmp_path):
    measurement, _ = counted(["a"])
    folder = run(measurement, {}, tmp_path)
    (folder / ".a.json.123.tmp").write_text("{")
    run(measurement, {}, tmp_path)
    assert not list(folder.glob("*.tmp"))


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"part": "b"}', '{"part": "a", "rows": [1]}'])
def test_a_damaged_part_is_named(tmp_path, content):
    measurement, measured = counted(["a", "b"])
    folder = run(measurement, {}, tmp_path)
    (folder / "a.json").write_text(content)
    with pytest.raises(RunError, match=r"a\.json is damaged \(.+\): delete it"):
        run(measurement, {}, tmp_path)
    with pytest.raises(RunError, match=r"a\.json is damaged"):
        report(measurement, folder)
    (folder / "a.json").unlink()
    run(measurement, {}, tmp_path)
    assert measured == ["a", "b", "a"]


@pytest.mark.parametrize("content", ["{", '{"measurement": "count"}', '{"measurement": "count", "settings": {"x": 1}}'])
def test_a_damaged_folder_is_named(tmp_path, content):
    measurement, _ = counted(["a"])
    folder = run(measurement, {}, tmp_path)
    (folder / "measurement.json").write_text(content)
    for use in (lambda: run(measurement, {}, tmp_path), lambda: report(measurement, folder)):
        with pytest.raises(RunError, match=r"measurement\.json is damaged"):
            use()


def test_a_number_that_changed_on_the_disk_is_noticed(tmp_path):
    measurement, _ = counted(["a"])
    folder = run(measurement, {"size": "4"}, tmp_path)
    text = (folder / "a.json").read_text()
    assert '"size": 4' in text
    (folder / "a.json").write_text(text.replace('"size": 4', '"size": 5'))
    with pytest.raises(RunError, match=r"a\.json is damaged \(its checksum differs\): delete it to measure it again"):
        report(measurement, folder)
    content = json.loads(text)
    del content["checksum"]  # as bisam 0.1 wrote it
    (folder / "a.json").write_text(json.dumps(content))
    assert report(measurement, folder).rows == [{"part": "a", "size": 4, "at": 1}]


WRONG = [
    {"size": "1"},
    {"size": 1.5},
    {"size": True},
    {"rate": "0.5"},
    {"names": "ab"},
    {"names": []},
    {"names": [1]},
    5,
]


@pytest.mark.parametrize("settings", WRONG, ids=str)
def test_settings_of_another_type_are_named(tmp_path, settings):
    measurement, _ = counted(["a"])
    folder = run(measurement, {}, tmp_path)
    identity = json.loads((folder / "measurement.json").read_text())
    (folder / "measurement.json").write_text(json.dumps(identity | {"settings": settings}))
    with pytest.raises(RunError, match=r"measurement\.json is damaged, or of a later version: delete"):
        report(measurement, folder)


@pytest.mark.parametrize("made", [{"load": "high"}, {"load": [1]}, {"date": None}, {"load": 10**400}], ids=str)
def test_a_place_that_cannot_be_read_is_one_line_or_unknown(tmp_path, made):
    measurement, _ = counted(["a"])
    folder = run(measurement, {}, tmp_path)
    content = json.loads((folder / "a.json").read_text())
    del content["checksum"]
    (folder / "a.json").write_text(json.dumps({**content, "environment": {**content["environment"], **made}}))
    if "date" in made:
        assert "None" in report(measurement, folder).markdown
    else:
        with pytest.raises(RunError, match="holds rows that this version cannot read"):
            report(measurement, folder)


def test_one_damaged_folder_does_not_stop_the_report_of_another(tmp_path):
    measurement, _ = counted(["a"])
    good, bad = run(measurement, {}, tmp_path), run(measurement, {"size": "4"}, tmp_path)
    (bad / "measurement.json").write_text("{")
    assert report(measurement, tmp_path).rows[0]["size"] == 1
    (good / "measurement.json").write_text("[")
    with pytest.raises(RunError, match=r"measurement\.json is damaged"):
        report(measurement, tmp_path)


def test_rows_of_another_version_are_refused(tmp_path):
    measurement, _ = counted(["a"])
    folder = run(measurement, {}, tmp_path)
    content = json.loads((folder / "a.json").read_text())
    content["rows"] = [{"part": "a"}]
    del content["checksum"]
    (folder / "a.json").write_text(json.dumps(content))
    with pytest.raises(RunError, match="this version cannot read"):
        report(measurement, folder)


# Refusals


@pytest.mark.parametrize(
    ("measurement", "changed", "message"),
    [
        (TABLE_11, {"iteration": "2"}, "unknown setting of table11 'iteration', did you mean 'iterations'"),
        (TABLE_11, {"iterations": "many"}, "iterations must be a whole number, got 'many'"),
        (TABLE_11, {"iterations": "1.5"}, "iterations must be a whole number"),
        (TABLE_11, {"iterations": "0"}, "iterations must be at least 1, got 0"),
        (TABLE_11, {"models": ""}, "models is empty"),
        (TABLE_11, {"models": "resnet20,,wrn28_2"}, "has an empty item"),
        (TABLE_11, {"models": "resnet65"}, "unknown model of images 'resnet65', did you mean 'resnet56'"),
        (TABLE_11, {"models": "hf:bert-base-uncased"}, "unknown model of images"),
        (TABLE_11, {"models": "nowhere:resnet50"}, "unknown model of images"),
        (TABLE_11, {"batch_size": "large"}, "batch_size must be a whole number"),
        (TABLE_11, {"batch_size": "128,resnet56=x"}, "batch_size must be a whole number, got 'x'"),
        (TABLE_11, {"classes": "1"}, "classes must be at least 2"),
        (TABLE_12, {"modes": "eagre"}, "unknown mode 'eagre', did you mean 'eager'"),
        (TABLE_12, {"classes": "10,1"}, "classes must be at least 2"),
        (TABLE_12, {"frameworks": "torch,tensor"}, "unknown framework 'tensor', did you mean 'tensorflow'"),
        (EXAMPLE, {"deltas": "0.1,half"}, "deltas must be a number, got 'half'"),
        (EXAMPLE, {"deltas": "0.5"}, "deltas must be in"),
        (EXAMPLE, {"deltas": "nan"}, "deltas must be in"),
        (EXAMPLE, {"classes": "1"}, "classes must be at least 2"),
    ],
)
def test_a_wrong_setting_is_one_line_and_no_folder(tmp_path, measurement, changed, message):
    with pytest.raises(ValueError, match=message) as refused:
        run(measurement, changed, tmp_path)
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_a_measurement_takes_one_device(tmp_path):
    measurement, _ = counted(["a"])
    with pytest.raises(ValueError, match="one device"):
        run(measurement, {}, tmp_path, Machine(devices=2))
    with pytest.raises(ValueError, match="abacus"):
        run(measurement, {}, tmp_path, Machine(device="abacus"))


# Table 11


def test_table_11(tmp_path):
    state = torch.get_rng_state()
    folder = run(TABLE_11, TINY, tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == 1
    shown = report(TABLE_11, folder)
    (row,) = shown.rows
    assert (row["model"], row["batch_size"], row["iterations"]) == ("resnet20", 4, 2)
    for key in ("sam_to_sgd", "bisam_log_to_sam", "bisam_tanh_to_sam"):
        assert 0 < row[f"{key}_low"] <= row[key] <= row[f"{key}_high"]
    assert row["sgd_seconds"] > 0
    (cells,) = shown.cells
    assert cells[:2] == ("resnet20", "4 (paper: 128)")
    assert TABLE_11.columns["batch"]({**row, "batch_size": 128}) == "128"
    assert cells[-1] == "–"
    assert f"| {' | '.join(cells)} |" in shown.markdown
    assert "Settings: models resnet20, iterations 2, batch_size 4, classes 10, threads 1." in shown.markdown
    assert f"torch {torch.__version__}" in shown.markdown
    assert to_csv(shown.rows).startswith("model,batch_size,classes,iterations,sgd_seconds")


def test_a_setting_may_have_a_value_for_each_key():
    known = ("resnet56", "wrn28_10")
    assert values_for("batch_size", TABLE_11.settings["batch_size"], (*known, "densenet121"), 1) == {
        "resnet56": 128,
        "wrn28_10": 8,
        "densenet121": 32,
    }
    assert values_for("batch_size", ("4",), known, 1) == dict.fromkeys(known, 4)
    assert values_for("scale", ("wrn28_10=0.5",), known, 1.0) == {"resnet56": 1.0, "wrn28_10": 0.5}


@pytest.mark.parametrize(
    ("measurement", "name", "text", "message"),
    [
        ("table11", "batch_size", "128,wrn28=8", "key of setting batch_size"),
        ("table11", "batch_size", "wrn28_10=many", "must be a whole number, got 'many'"),
        ("gan", "scale", "EGG=2", "EG"),
        ("gan", "scale", "EG=0", "scale must be positive, got 0.0 for EG"),
        ("gan", "first_seed", "-1", "first_seed must be at least 0, got -1"),
    ],
)
def test_a_value_for_a_wrong_key_is_refused(measurement, name, text, message):
    one = MEASUREMENTS[measurement]
    with pytest.raises(ValueError, match=message):
        one.parts({**one.settings, **one.changed({name: text})})


def test_what_was_published_is_beside_the_ratios():
    row = dict.fromkeys(("published_sam_seconds", "published_bisam_seconds"))
    for model, (sam, bisam) in epochs.PUBLISHED.items():
        assert model in TABLE_11.settings["models"]
        row |= {"published_sam_seconds": sam, "published_bisam_seconds": bisam}
        assert TABLE_11.columns["published"](row).startswith(f"{sam} → {bisam} s (1.")


# Table 12


def test_table_12(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda loss, dynamic: loss)
    folder = run(TABLE_12, {"rounds": "2", "batch_size": "4", "classes": "3"}, tmp_path)
    shown = report(TABLE_12, folder)
    eager, compiled = ([row for row in shown.rows if row["mode"] == mode] for mode in ("eager", "compiled"))
    assert [row["loss"] for row in eager] == list(losses.LOSSES)
    assert [row["loss"] for row in compiled] == list(losses.LOSSES)[:4]
    for row in shown.rows:
        assert row["to_plain"] == 1 or row["loss"] != "cross-entropy"
        barred = row["loss"] in ("BiSAM (-log)", "BiSAM (tanh)")
        cell = TABLE_12.columns["to cross-entropy"](row)
        assert cell.endswith(("undecided", "no verdict under load")) == barred  # two rounds have no interval
        assert "[–]" in cell


def test_without_a_compiler_it_says_what_to_give(tmp_path, monkeypatch):
    def fails(loss, dynamic):
        def call(logits, labels):
            raise RuntimeError("no compiler here\nfor many reasons")

        return call

    monkeypatch.setattr(torch, "compile", fails)
    with pytest.raises(ValueError, match=r"\(no compiler here\): give --set modes=eager"):
        run(TABLE_12, {"rounds": "1", "batch_size": "4", "classes": "3"}, tmp_path)
    assert {row["mode"] for row in report(TABLE_12, tmp_path).rows} == {"eager"}


with_tensorflow = pytest.mark.skipif(find_spec("tensorflow") is None, reason="without TensorFlow")


@with_tensorflow
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("classes", [10, 100])
def test_the_losses_in_tensorflow_are_ours(classes, compiled):
    from bisam.experiments.measurements.tensorflow_losses import gradients

    random = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(128, classes, generator=random)).requires_grad_()
    labels = torch.randint(classes, (128,), generator=random)
    names = tuple(losses.LOSSES)[:4]
    for name, call in gradients(logits, labels, names, compiled=compiled, threads=1).items():
        (ours,) = torch.autograd.grad(losses.LOSSES[name](logits, labels), logits)
        torch.testing.assert_close(torch.from_numpy(call().numpy()), ours, rtol=0, atol=1e-6, msg=name)


@with_tensorflow
def test_table_12_in_both_frameworks(tmp_path):
    small = {"rounds": "2", "batch_size": "4", "classes": "3", "modes": "eager", "frameworks": "torch,tensorflow"}
    shown = report(TABLE_12, run(TABLE_12, small, tmp_path))
    assert [(row["framework"], row["loss"]) for row in shown.rows] == [
        *(("torch", name) for name in losses.LOSSES),
        *(("tensorflow", name) for name in tuple(losses.LOSSES)[:4]),
    ]
    assert {row["to_plain"] for row in shown.rows if row["loss"] == "cross-entropy"} == {1}
    assert all(row["seconds"] > 0 for row in shown.rows)
    assert [cells[2].partition(" ")[0] for cells in shown.cells] == [row["framework"] for row in shown.rows]
    assert all(
        cells[-1].endswith("]")
        for cells, row in zip(shown.cells, shown.rows, strict=True)
        if row["framework"] != "torch"
    )


@pytest.mark.parametrize("frameworks", ["tensorflow", "torch,tensorflow"])
def test_without_tensorflow_it_says_what_to_install(tmp_path, monkeypatch, frameworks):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    small = {"rounds": "1", "batch_size": "4", "classes": "3", "modes": "eager", "frameworks": frameworks}
    with pytest.raises(ValueError, match=r"pip install 'bisam\[experiments,tensorflow\]', or give --set fr") as error:
        run(TABLE_12, small, tmp_path)
    assert "\n" not in str(error.value)


def test_rows_without_a_framework_are_of_torch():
    assert TABLE_12.columns["framework"]({"mode": "eager"}) == "torch"


def test_the_timed_losses_are_what_their_names_say():
    logits, labels = torch.randn(5, 4, dtype=torch.double, requires_grad=True), torch.tensor([0, 1, 2, 3, 0])
    of = {name: loss(logits, labels) for name, loss in losses.LOSSES.items()}
    assert all(value.dim() == 0 for value in of.values())
    for bound, name in ((NegLog(), "BiSAM (-log)"), (Tanh(), "BiSAM (tanh)")):
        torch.testing.assert_close(of[name], bound(logits, labels).mean())
        torch.testing.assert_close(of[f"{name}, row by row"], of[name])
        torch.testing.assert_close(row_by_row(bound, logits, labels), bound(logits, labels))
    assert len({loss.__code__ for loss in losses.LOSSES.values()}) == len(of)  # type: ignore[attr-defined]


# The example


@pytest.mark.parametrize("classes", [2, 10, 1000])
@pytest.mark.parametrize("delta", [0.1, 0.001])
def test_the_options_are_probabilities_right_and_wrong(classes, delta):
    a, b = option_a(classes, delta), option_b(classes, delta)
    for scores in (a, b):
        assert scores.shape == (classes,)
        assert scores.min() >= 0
        assert math.isclose(scores.sum(), 1)
    assert a.argmax() == 0
    assert b.argmax() == 1


def test_the_example_by_hand(tmp_path):
    folder = run(EXAMPLE, {"classes": "10", "deltas": "0.1"}, tmp_path)
    (row,) = report(EXAMPLE, folder).rows
    expected = {
        "error_a": 0,
        "error_b": 1,
        "cross_entropy_a": -math.log(0.2),
        "cross_entropy_b": -math.log(0.4),
        "tanh_a": 0,
        "tanh_b": math.tanh(0.1 * 0.2),
        "log_a": 0,
        "log_b": 1 - math.log(1 + (math.e - 1) * math.exp(-0.2)),
        "tanh_soft_a": math.log((1 + 9 * math.exp(10 * math.tanh(-0.1 * (0.1 + 0.1 / 9)))) / 10) / 10,
        "tanh_soft_b": math.log(
            (1 + math.exp(10 * math.tanh(0.1 * 0.2)) + 8 * math.exp(10 * math.tanh(-0.1 * 0.4))) / 10
        )
        / 10,
    }
    for name, value in expected.items():
        assert math.isclose(row[name], value, rel_tol=1e-12, abs_tol=1e-15), name
    picks = ("error", "cross_entropy", "tanh", "log", "tanh_soft", "log_soft")
    assert [row[f"{name}_picks"] for name in picks] == ["B", "A", "B", "B", "A", "A"]
    assert (row["tanh_mu"], row["log_mu"]) == (100, 100)


def test_the_example_as_section_2_2_argues(tmp_path):
    """Cross-entropy grows without bound for A and leads there; a lower bound of the 0-1 loss leads to B."""
    shown = report(EXAMPLE, run(EXAMPLE, {}, tmp_path))
    assert len(shown.rows) == 12
    for row in shown.rows:
        assert (row["error_a"], row["error_b"]) == (0, 1)
        assert row["cross_entropy_picks"] == "A"
        assert row["cross_entropy_b"] < 1
        assert (row["tanh_picks"], row["log_picks"]) == ("B", "B")
        for name in ("tanh", "log", "tanh_soft", "log_soft"):
            assert row[f"{name}_a"] <= row["error_a"]
            assert row[f"{name}_b"] <= row["error_b"]
    finest = [row["cross_entropy_a"] for row in shown.rows if row["delta"] == 0.001]
    assert finest == sorted(finest)
    assert finest[-1] > 6.8
    assert "![Cross-entropy and the lower bounds of both options](example.png)" in shown.markdown
    left, right = shown.figures["example.png"].axes
    assert [len(ax.lines) for ax in (left, right)] == [2, 4]


# Figure 1


def test_a_drawing_is_reported_without_a_folder_of_parts(tmp_path):
    assert run(FIGURE_1, {}, tmp_path) == tmp_path / "figure1"
    shown = report(FIGURE_1, tmp_path)
    assert (shown.header, shown.rows) == ((), [])
    committed = Path(__file__).parents[3] / "docs" / "reproduction" / "figure1" / "report.md"
    assert shown.markdown == committed.read_text()
    assert not list(tmp_path.iterdir())


def test_figure_1_is_below_and_above_the_0_1_loss(tmp_path):
    (ax,) = report(FIGURE_1, tmp_path).figures["figure1.png"].axes
    found = {line.get_label().split(":")[0]: np.array(line.get_data()) for line in ax.get_lines()}
    step = (found["BiSAM (-log)"][0] > 0).astype(float)
    for label in ("BiSAM (-log)", "BiSAM (tanh)"):
        assert (found[label][1] <= step + 1e-12).all()
    for label in ("hinge", "cross-entropy"):
        assert (found[label][1] >= step - 1e-12).all()
    assert found["BiSAM (tanh)"][1][-1] == pytest.approx(math.tanh(3))
    assert found["BiSAM (-log)"][1][0] == pytest.approx(1 - math.log(1 + (math.e - 1) * math.exp(3)))
    assert found["cross-entropy"][1][-1] == pytest.approx(math.log2(1 + math.exp(3)))
    assert ax.get_xlim() == (-3, 3)
