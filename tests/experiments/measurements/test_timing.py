"""Timing: the interval of a median, the load of other programs, and verdicts. Nothing here depends on the machine."""

from __future__ import annotations

import json
import math
import random
import statistics

import pytest

pytest.importorskip("matplotlib")

from bisam.experiments.measurements import MEASUREMENTS, report, run, timing
from bisam.experiments.measurements.measurement import flat, met, with_interval, with_load
from bisam.experiments.measurements.timing import Load, Ratio, Times, interleaved, interval, own_load, ratio, verdict
from bisam.experiments.runs.files import checksum

QUIET = Load(0.5, 2)
OTHERS = "load of other programs"


@pytest.fixture
def machine(monkeypatch):
    """A machine of two cores whose load average can be set, whose clock stands still, and whose calls take as long."""
    state = {"load": 0.0, "cores": 2, "now": timing._STARTED}
    monkeypatch.setattr(timing.os, "getloadavg", lambda: (state["load"], 0.0, 0.0))
    monkeypatch.setattr(timing.os, "cpu_count", lambda: state["cores"])
    monkeypatch.setattr(timing, "perf_counter", lambda: state["now"])
    monkeypatch.setattr(timing.gc, "collect", lambda: 0)  # which takes long in a process with many modules
    monkeypatch.setattr(timing, "seconds", lambda call, number=1, device=None: timing.BLOCK)
    return state


# The interval


@pytest.mark.parametrize("n", [6, 7, 8, 9, 15, 31, 51, 101])
def test_the_interval_is_that_of_the_sign_test(n):
    """Twin: the narrowest pair of ordered values that covers the median with 95 %, from the binomial distribution."""
    values = [random.Random(n).lognormvariate(0, 1) for _ in range(n)]
    outside = [sum(math.comb(n, i) for i in range(k)) * 2 / 2**n for k in range(n // 2 + 1)]
    k = max(k for k in range(1, n // 2 + 1) if outside[k] <= 0.05)
    assert interval(values) == (sorted(values)[k - 1], sorted(values)[n - k])


@pytest.mark.parametrize("n", range(1, 6))
def test_fewer_than_six_values_have_no_interval(n):
    assert interval([float(i) for i in range(n)]) == (None, None)


def test_the_interval_covers_the_median_of_a_skewed_distribution():
    """In 200 samples, of which at least 95 % are expected: three standard deviations below that is 0.904."""
    generator = random.Random(0)
    found = [interval([generator.expovariate(math.log(2)) for _ in range(31)]) for _ in range(200)]
    assert statistics.fmean(low <= 1 <= high for low, high in found) > 0.904


# The load


def test_own_threads_add_to_the_load_average_as_the_kernel_counts_them():
    """Twin: the recursion of a load average, every five seconds."""
    average = 0.0
    for step in range(1, 61):
        average = average * math.exp(-5 / 60) + 2 * (1 - math.exp(-5 / 60))
        assert own_load(2, 5 * step) == pytest.approx(average, rel=1e-12)


def test_the_load_of_other_programs_is_without_our_own(machine):
    machine["load"] = 2.5
    assert Load.now(1) == Load(2.5, 2)  # it has only begun
    machine["now"] += 60.0
    assert Load.now(1).highest == pytest.approx(2.5 - (1 - math.exp(-1)), abs=1e-12)
    assert Load.now(0).highest == 2.5
    machine["now"] += 1e4
    assert Load.now(1).highest == pytest.approx(1.5, abs=1e-12)
    assert Load.now(4).highest == 0.0


@pytest.mark.parametrize("error", [OSError, AttributeError])
def test_without_a_load_average_the_load_is_unknown_and_the_interval_decides(machine, monkeypatch, error):
    def fails():
        raise error

    monkeypatch.setattr(timing.os, "getloadavg", fails)
    found = Load.now(1).and_now(1)
    assert found == Load(None, 2)
    assert not found.too_high
    assert verdict(0.9, 0.95, found, 1.0) == "met"


def test_the_limit_is_one_and_a_half_for_each_core_of_the_machine(machine):
    machine["cores"] = 64  # of the whole machine, whose threads the load average counts
    assert Load.now().limit == 96
    assert not Load(3.0, 2).too_high
    assert Load(3.01, 2).too_high


def test_the_load_is_watched_in_each_round(machine, monkeypatch):
    seen = iter([0.5, 0.25, 4.0, 0.5])  # at the beginning, and after each round
    monkeypatch.setattr(timing.os, "getloadavg", lambda: (next(seen), 0.0, 0.0))
    times = interleaved({"a": lambda: None}, 3)
    assert times.load == Load(4.0, 2)
    assert next(seen, None) is None


def test_times_survive_another_process():
    times = Times({"a": [1.0, 2.0]}, QUIET)
    assert Times.from_dict(json.loads(json.dumps(times.to_dict()))) == times


# The verdict


@pytest.mark.parametrize(
    ("low", "high", "load", "at_most", "at_least"),
    [
        (0.9, 1.0, 0.5, "met", "undecided"),
        (0.9, 1.1, 0.5, "undecided", "undecided"),
        (1.0, 1.1, 0.5, "undecided", "met"),
        (1.01, 1.1, 0.5, "missed", "met"),
        (0.8, 0.9, 0.5, "met", "missed"),
        (1.0, 1.0, 0.5, "met", "met"),
        (0.8, 0.9, 3.5, "no verdict under load", "no verdict under load"),
        (0.8, 0.9, 3.0, "met", "missed"),
        (None, None, 0.5, "undecided", "undecided"),
        (None, None, 3.5, "no verdict under load", "no verdict under load"),
    ],
)
def test_a_verdict_needs_the_whole_interval_and_a_quiet_machine(low, high, load, at_most, at_least):
    assert verdict(low, high, Load(load, 2), 1.0) == at_most
    assert verdict(low, high, Load(load, 2), 1.0, at_least=True) == at_least
    one = Ratio(1.0, 0.9, 1.1, 9, 1e-3, low, high, load, 2)
    assert (one.verdict(1.0), one.verdict(1.0, at_least=True)) == (at_most, at_least)


def test_a_median_below_the_bar_is_not_enough():
    times = Times({"a": [1.0] * 9, "b": [0.9, 0.9, 0.9, 0.9, 0.9, 1.1, 1.1, 1.1, 1.1]}, QUIET)
    found = ratio(times, "b", "a")
    assert found.median == 0.9
    assert found.verdict(1.0) == "undecided"


# Measurements


def test_a_ratio_in_a_row_has_its_interval_or_the_quartiles_of_an_older_row():
    found = ratio(Times({"a": [1.0] * 7, "b": [0.7, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99]}, QUIET), "b", "a")
    row = {**flat("to_a", found), **with_load(QUIET)}
    assert with_interval(row, "to_a") == "0.950 [0.700, 0.990]"
    assert with_interval({**row, "to_a_median_low": None, "to_a_median_high": None}, "to_a", 2) == "0.95 [–]"
    assert met(row, "to_a", 1.0) == "met"
    assert met(row, "to_a", 0.98) == "undecided"
    assert met({**row, "load": 3.5}, "to_a", 1.0) == "no verdict under load"
    old = {"to_a": 0.95, "to_a_low": 0.85, "to_a_high": 1.05}
    assert with_interval(old, "to_a", 2) == "0.95 (0.85 to 1.05)"
    assert (met(old, "to_a", 1.0), met(old, "to_a", 0.9)) == ("met", "missed")


def test_only_what_is_timed_is_judged_by_the_load():
    assert {name for name, one in MEASUREMENTS.items() if one.timed} == {"table11", "table12", "sampa-costs"}
    for one in (MEASUREMENTS[name] for name in ("table11", "table12", "sampa-costs")):
        assert "95 % interval" in one.note
        assert "quartiles" not in one.note


SMALL = {"rounds": "6", "batch_size": "4", "classes": "3", "modes": "eager"}


@pytest.mark.parametrize("load", [0.25, 9.0])
def test_the_page_of_a_measurement_shows_interval_load_and_verdict(tmp_path, machine, load):
    machine["load"] = load
    shown = report(MEASUREMENTS["table12"], run(MEASUREMENTS["table12"], SMALL, tmp_path))
    assert {(row["load"], row["cores"]) for row in shown.rows} == {(load, 2)}
    assert f"{OTHERS} at most {load:.1f} (verdicts up to 3)." in shown.markdown
    bisam = next(cells for cells, row in zip(shown.cells, shown.rows, strict=True) if row["loss"] == "BiSAM (-log)")
    said = "met" if load < 3 else "no verdict under load"
    assert bisam[-2:] == (f"1.00 [1.00, 1.00], {said}",) * 2
    assert "earlier version" not in shown.markdown


def test_a_file_of_an_earlier_version_is_shown_with_its_quartiles(tmp_path, machine):
    folder = run(MEASUREMENTS["table12"], SMALL, tmp_path)
    content = json.loads((folder / "3-eager.json").read_text())
    added = ("load", "cores", *(f"{key}_median_{end}" for key in ("to_plain", "to_used") for end in ("low", "high")))
    content["rows"] = [{k: v for k, v in row.items() if k not in added} for row in content["rows"]]
    content["environment"]["load"] = 1.25
    del content["checksum"]
    (folder / "3-eager.json").write_text(json.dumps({**content, "checksum": checksum(content)}))
    shown = report(MEASUREMENTS["table12"], folder)
    assert "Measured by an earlier version" in shown.markdown
    assert OTHERS not in shown.markdown.rpartition("Made ")[2]
    assert ", load 1.2 to 1.2." in shown.markdown
    (cells,) = (cells for cells, row in zip(shown.cells, shown.rows, strict=True) if row["loss"] == "BiSAM (-log)")
    assert " to " in cells[-1]
    assert cells[-1].endswith(("met", "missed"))


def test_the_command_says_at_its_beginning_that_there_will_be_no_verdict(tmp_path, machine, bisam):
    flags = [part for name, value in SMALL.items() for part in ("--set", f"{name}={value}")]
    code, _, err = bisam("run", "table12", *flags, "--out", tmp_path / "quiet")
    assert (code, err) == (0, "")
    machine["load"] = 7.25
    code, _, err = bisam("run", "table12", *flags, "--out", tmp_path / "loaded")
    assert code == 0
    assert len(err.strip().splitlines()) == 1
    assert f"the {OTHERS} is 7.2 on 2 cores" in err
    code, _, err = bisam("run", "figure1", "--out", tmp_path)  # which times nothing
    assert (code, err) == (0, "")
