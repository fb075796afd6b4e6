"""The benchmarks run, and write what they say; how fast anything is, is their business and not a test's."""

from __future__ import annotations

import copy
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

pytest.importorskip("pytorch_optimizer")
pytest.importorskip("rich")
pytest.importorskip("torchvision")

from benchmarks import (
    docs,
    epoch,
    gpu,
    growth,
    measure,
    memory,
    models,
    objective,
    overhead,
    overlap,
    parallel,
    pipeline,
    scaling,
    stacked,
    step,
    versions,
)
from benchmarks.operators import Operators
from bisam import SharpnessAware, cross_entropy
from bisam.experiments.measurements import timing
from bisam.oracle import View

TIMED = (objective, step, overhead, growth, memory, pipeline, epoch, parallel, scaling, overlap, stacked)
MAINS = [module.main for module in TIMED]
RATIO = {"median", "low", "high", "rounds", "seconds", "median_low", "median_high", "load", "cores", "bar", "verdict"}
QUIET = timing.Load(0.25, 2)
LOADED = timing.Load(7.5, 2)


def written(path):
    content = json.loads(path.read_text())
    environment = content["environment"]
    assert {"hardware", "threads", "commit", "python", "bisam", "pytorch_optimizer"} <= environment.keys()
    assert environment["torch"] == torch.__version__
    assert environment["threads"] == 1
    return content


def test_the_model_of_the_paper():
    assert sum(p.numel() for p in models.resnet56().parameters()) == 853_018
    assert sum(p.numel() for p in models.resnet56(100).parameters()) == 858_868
    assert models.resnet56()(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_the_model_of_small_tensors():
    parameters = list(models.mlp().parameters())
    assert len(parameters) == 172
    assert sum(p.numel() for p in parameters) == 86 * (16 * 16 + 16)
    assert models.mlp()(torch.randn(2, 16)).shape == (2, 16)


@pytest.mark.parametrize("model", [models.resnet56, models.mlp])
def test_a_batch_fits_the_model(model):
    m = model()
    x, y = models.batch_for(m, 2)
    assert m(x).shape[0] == len(y) == 2
    assert y.max() < m(x).shape[1]


def test_objective(tmp_path, capsys):
    path = tmp_path / "objective.json"
    objective.main(["--sizes", "8x4", "16x3", "--repeats", "2", "--threads", "1", "--json", str(path)])
    content = written(path)
    assert [(r["size"], r["contestant"]) for r in content["rows"]] == [
        (s, c) for s in ([8, 4], [16, 3]) for c in objective.CONTESTANTS
    ]
    assert all(r.keys() >= RATIO for r in content["rows"])
    shown = capsys.readouterr().out
    assert "16 x 3" in shown
    assert "NegLog" in shown
    assert "(bar 1)" in shown
    assert [p.name for p in tmp_path.iterdir()] == ["objective.json"]


def test_operators_and_passes_of_an_objective():
    def work(name, n, classes):
        found = objective.counted(objective.CONTESTANTS[name], n, classes)
        return found["operators"], found["passes"]

    for size in ((128, 10), (512, 100)):
        assert work(objective.PLAIN, *size) == (7, 6)
        assert work("NegLog", *size) <= (16, 10)
        assert work("Tanh", *size) <= (20, 18)
    with Operators(least=20) as found:
        x = torch.ones(4, 5)
        (x + x[:1].expand(4, 5)).mul_(2).gather(1, torch.zeros(4, 1, dtype=torch.long)).sum()
    assert (found.count, found.entries) == (6, 20 * (1 + 3 + 2))


def test_objective_leaves_out_what_takes_too_long(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(objective, "PATIENCE", 0.0)
    objective.main(["--sizes", "8x4", "--repeats", "2", "--threads", "1", "--json", str(tmp_path / "o.json")])
    assert "skipped" in capsys.readouterr().out
    rows = {r["contestant"]: r for r in written(tmp_path / "o.json")["rows"]}
    assert rows["NegLog, row by row"]["skipped"]
    assert "skipped" not in rows["NegLog"]


def test_the_loop_over_rows_is_the_objective():
    z, y = torch.randn(6, 4, dtype=torch.double, requires_grad=True), torch.tensor([0, 1, 2, 3, 0, 1])
    for name in ("NegLog", "Tanh"):
        slow, ours = objective.CONTESTANTS[f"{name}, row by row"], objective.CONTESTANTS[name]
        torch.testing.assert_close(slow(z, y), ours(z, y))
        torch.testing.assert_close(objective.forward_backward(slow, z, y), objective.forward_backward(ours, z, y))


def test_step(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(timing, "BLOCK", 0.0)
    path = tmp_path / "step.json"
    step.main(["--models", "mlp-32", "--repeats", "2", "--threads", "1", "--json", str(path)])
    content = written(path)
    names = list(step.CASES["mlp-32"].contestants)
    assert [r["contestant"] for r in content["rows"]] == names
    assert [r["contestant"] for r in content["rows"] if r["ratio_to_sam"]] == [
        name for name in names if name not in (step.LIMIT, "bisam SAM")
    ]
    assert all(r.keys() >= RATIO | {"model", "batch", "ratio_to_sam"} for r in content["rows"])
    ours = [r for r in content["footprint"] if r["contestant"].startswith("bisam")]
    assert len(ours) == 4
    for row in ours:
        assert (row["at_second_loss"], row["between_steps"]) == (3 if "stats" in row["contestant"] else 2, 1)
        assert row["checkpoint_ratio"] < 1.01
    shown = capsys.readouterr().out
    assert "time / SAM's" in shown
    assert "checkpoint" in shown


def test_step_with_compiled_passes(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "BLOCK", 0.0)
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, dynamic: compiled.append((len(module), dynamic)))
    path = tmp_path / "step.json"
    step.main(["--models", "mlp-32", "--repeats", "1", "--compile", "--json", str(path)])
    rows = {r["contestant"]: r for r in written(path)["rows"]}
    assert [name for name in rows if "compiled" in name] == list(step.COMPILED)
    assert compiled == [(171, False)] * 4
    assert not any(rows[name]["ratio_to_sam"] for name in step.COMPILED)


def test_overhead(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(timing, "BLOCK", 0.0)
    path = tmp_path / "overhead.json"
    overhead.main(["--models", "mlp-32", "--repeats", "2", "--json", str(path)])
    content = written(path)
    assert [r["contestant"] for r in content["rows"]] == list(overhead.CYCLES)
    assert all(r.keys() >= RATIO | {"model", "batch", "passes", "steps"} for r in content["rows"])
    assert "6 passes, 5 steps" in capsys.readouterr().out
    assert "| LookSAM, 5 steps | 6 passes, 5 steps |" in "\n".join(docs.section(content))


def test_growth(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(timing, "BLOCK", 0.0)
    path, page = tmp_path / "growth.json", tmp_path / "page.md"
    sizes = ["--parameters", "800", "1000000000", "--tensors", "3", "20", "--most", "10000"]
    growth.main([*sizes, "--repeats", "2", "--json", str(path)])
    content = written(path)
    assert [(r["grows"], r["parameters"], r["tensors"]) for r in content["rows"]] == [
        ("parameters", 800, 8),
        ("parameters", 999_939_200, 8),
        ("tensors", 768, 3),
        ("tensors", 5120, 20),
    ]
    assert [r.keys() >= RATIO for r in content["rows"]] == [True, False, True, True]
    assert "not measured" in capsys.readouterr().out
    docs.main([str(path), "--to", str(page)])
    assert "| 999,939,200 | 8 | not measured |" in page.read_text()
    drawn = (tmp_path / "growth.svg").read_bytes()
    docs.main([str(path), "--to", str(page)])
    assert (tmp_path / "growth.svg").read_bytes() == drawn
    assert f"]({docs.FIGURE})" in page.read_text()


def test_growth_of_nothing_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        growth.main(["--parameters", "--tensors"])
    assert "nothing to measure" in capsys.readouterr().err


def test_the_overhead_is_a_number_of_operators_that_does_not_grow():
    counts = {growth.operators(size) for size in growth.sizes((10**5, 10**9), (10, 100))}
    assert len(counts) == 1
    assert 10 < counts.pop() < 30


def test_operators_that_compute_something_are_counted():
    with growth.Operators() as counted:
        x = torch.ones(2, 2)  # one
        x.view(4).detach()
        x + 1  # two
        x @ x.T  # three; its transpose is a view
    assert counted.count == 3


@pytest.mark.parametrize("name", overhead.CYCLES)
def test_a_cycle_does_as_much_as_its_limit(name):
    model, cycle = models.mlp(3), overhead.CYCLES[name]
    x, y = models.batch_for(model, 8)

    def counted(make):
        batches, steps = Counter(), [0]
        own = copy.deepcopy(model)

        def note(module, inputs, outputs):
            batches["forward"] += len(outputs) / 8
            if outputs.requires_grad:
                outputs.register_hook(lambda grad: batches.update(backward=len(grad) / 8))

        own.register_forward_hook(note)
        call = make(cycle, own, x, y)
        call()  # a method may need more in its first cycle
        batches.clear()
        handle = register_optimizer_step_post_hook(lambda *_: steps.__setitem__(0, steps[0] + 1))
        call()
        handle.remove()
        return batches["forward"], batches["backward"], steps[0]

    assert counted(overhead.cycle_of) == counted(overhead.limit_of)
    assert counted(overhead.limit_of) == (
        cycle.passes_of(8) + cycle.forwards,
        cycle.passes_of(8),
        cycle.steps,
    )


def test_pipeline(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(timing, "BLOCK", 0.0)
    path = tmp_path / "pipeline.json"
    pipeline.main(["--images", "6", "--batch-size", "4", "--repeats", "2", "--threads", "1", "--json", str(path)])
    content = written(path)
    assert [(r["cutout"], r["contestant"]) for r in content["rows"]] == [
        (cutout, name) for cutout in (0, 16) for name in (pipeline.REFERENCE, pipeline.OURS)
    ]
    assert all(r.keys() >= RATIO for r in content["rows"])
    assert {row["bar"] for row in content["rows"][1::2]} == {pipeline.BAR}
    assert {row["verdict"] for row in content["rows"][::2]} == {None}
    assert "(bar 10)" in capsys.readouterr().out


def test_the_shares_of_an_epoch(tmp_path, capsys):
    path, page = tmp_path / "epoch.json", tmp_path / "page.md"
    epoch.main(["--dataset", "digits", "--model", "mlp", "--repeats", "2", "--json", str(path)])
    rows = written(path)["rows"]
    for whole, first in (("training epoch", epoch.STEP), ("epoch", epoch.TRAINING)):
        parts = {r["part"]: r["share"] for r in rows if r["whole"] == whole}
        assert sum(parts.values()) == pytest.approx(1)
        assert min(parts.values()) > 0
        assert max(parts, key=parts.__getitem__) == first
    assert [r["part"] for r in rows if r["bar"] is not None] == [epoch.STEP]
    assert "training epoch" in capsys.readouterr().out
    docs.main([str(path), "--to", str(page)])
    assert f"| epoch | {epoch.VALIDATION} |" in page.read_text()


def test_an_epoch_of_unknown_data_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        epoch.main(["--dataset", "cifra10"])
    assert "'cifra10'" in capsys.readouterr().err


def test_stacked(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(timing, "BLOCK", 0.0)
    path = tmp_path / "stacked.json"
    stacked.main(["--stacks", "2", "3", "--epochs", "1", "--repeats", "2", "--json", str(path)])
    content = written(path)
    assert [row["size"] for row in content["rows"]] == [1, 2, 3]
    assert all(row.keys() >= RATIO for row in content["rows"])
    assert content["rows"][0]["median"] == 1.0
    assert [row["verdict"] for row in content["rows"][:2]] == [None, None]
    assert "(bar 3)" in capsys.readouterr().out


def test_the_tables_of_a_gpu_are_all_written_without_one(tmp_path, monkeypatch):
    def fails(device):
        raise MemoryError("out of | memory")

    broken = gpu.Case(gpu.TINY["GPT, 2 x 6 tokens"].model, fails)
    monkeypatch.setattr(timing, "BLOCK", 0.0)
    monkeypatch.setattr(gpu, "TINY", {"tiny": gpu.TINY["convolution, 2 images"], "broken": broken})
    gpu.main(["--dry-run", "--to", str(tmp_path / "gpu.md")])
    page = (tmp_path / "gpu.md").read_text()
    assert page.count("\n## ") == len(gpu.TABLES)
    # "Many small layers" has a network of its own, and CUDA graphs are not made here.
    assert page.count("| broken | failed: MemoryError: out of / memory |") == len(gpu.TABLES) - 2
    assert "| tiny | 0" not in page
    tables = [block.splitlines() for block in page.split("\n\n") if block.startswith("|")]
    assert all(len({line.count("|") for line in table}) == 1 for table in tables)
    scaled = next(table for table in tables if "overflow" in table[0])
    assert scaled[2].endswith("| yes | yes |")


def test_without_a_gpu_the_benchmark_names_the_dry_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as error:
        gpu.main(["--to", str(tmp_path / "gpu.md")])
    assert error.value.code == 2
    assert "--dry-run" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_both_pipelines_give_an_epoch_of_the_same_kind():
    images, labels = np.random.default_rng(0).integers(0, 256, (10, 32, 32, 3), dtype=np.uint8), list(range(10))
    for cutout in (0, 16):
        for batches in (
            pipeline.per_image(images, labels, 4, cutout),
            pipeline.in_batches(images, labels, 4, cutout)(),
        ):
            inputs, targets = zip(*batches, strict=True)
            assert [x.shape for x in inputs] == [(4, 3, 32, 32), (4, 3, 32, 32), (2, 3, 32, 32)]
            assert {x.dtype for x in inputs} == {torch.float32}
            assert torch.cat(targets).sort().values.tolist() == labels


@pytest.mark.parametrize("name", step.CONTESTANTS)
def test_every_contestant_trains(name):
    model = torch.nn.Linear(3, 3).double()
    before = model.weight.detach().clone()
    training = step.CONTESTANTS[name](model, torch.nn.functional.cross_entropy)
    x, y = torch.randn(4, 3, dtype=torch.double), torch.tensor([0, 1, 2, 0])
    training.step(x, y)
    assert not torch.equal(model.weight, before)
    assert all(p.grad is None for p in model.parameters())
    assert step.saved_bytes(training.checkpoint()) > 0


@pytest.mark.parametrize("name", step.CASES)
def test_methods_of_a_part_ask_for_a_part(name):
    case, asked = step.CASES[name], {}

    class Asked(View):
        def ask(self, queries):
            asked.setdefault(method, queries[0].wrt)
            return super().ask(queries)

    torch.manual_seed(0)
    model = case.model()
    x, y = models.batch_for(model, 4)
    for method in (step.OF_A_PART | case.of_a_part).values():
        SharpnessAware(model, lambda o, b: method(Asked(o), b), cross_entropy)(x, y)  # noqa: B023
    assert len(asked) == 3
    assert all(wrt is not None and 0 < sum(wrt) < len(wrt) for wrt in asked.values())


def test_the_peers_take_the_same_step():
    x, y = torch.randn(4, 3, dtype=torch.double), torch.tensor([0, 1, 2, 0])
    ends = []
    for name in ("bisam SAM", "pytorch_optimizer SAM", "two-step loop"):
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 3).double()
        training = step.CONTESTANTS[name](model, torch.nn.functional.cross_entropy)
        for _ in range(3):
            training.step(x, y)
        ends.append(model.weight.detach())
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=1e-8)
    torch.testing.assert_close(ends[0], ends[2], rtol=0, atol=1e-12)


def test_a_time_begins_and_ends_with_a_device_that_is_done(monkeypatch):
    events = []
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: events.append(device.type))
    monkeypatch.setattr(timing, "perf_counter", lambda: events.append("clock") or 0.0)
    assert measure.seconds(lambda: events.append("call"), 2, torch.device("cuda")) == 0
    assert events == ["cuda", "clock", "call", "call", "cuda", "clock"]


@pytest.mark.parametrize(("block", "calls"), [(0.0, 2 + 4), (10.0, 3 + 4 * 10)])
def test_a_call_that_takes_a_turn_is_not_waited_for_a_third_time_to_get_warm(block, calls, monkeypatch):
    monkeypatch.setattr(timing, "BLOCK", block)
    monkeypatch.setattr(timing, "perf_counter", iter(range(100)).__next__)
    monkeypatch.setattr(timing.os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    monkeypatch.setattr(timing, "own_load", lambda busy, elapsed: 0.0)
    called = []
    assert len(measure.interleaved({"a": lambda: called.append(1)}, 4).seconds["a"]) == 4
    assert len(called) == calls


def test_ratios_are_taken_round_by_round():
    times = timing.Times({"a": [1.0, 10.0, 2.0], "b": [2.0, 20.0, 5.0]}, QUIET)
    r = measure.ratio(times, "b", "a")
    assert (r.median, r.low, r.high, r.rounds, r.seconds) == (2.0, 2.0, 2.25, 3, 5.0)
    assert (r.median_low, r.median_high, r.load, r.cores) == (None, None, 0.25, 2)
    assert measure.ratio(timing.Times({"a": [2.0], "b": [3.0]}, QUIET), "b", "a").low == 1.5
    seven = timing.Times({"a": [1.0] * 7, "b": [7.0, 1.0, 6.0, 2.0, 5.0, 3.0, 4.0]}, QUIET)
    assert str(measure.ratio(seven, "b", "a")) == "4.000 [1.000, 7.000]"


@pytest.mark.parametrize("main", MAINS)
@pytest.mark.parametrize(
    "argv",
    [
        ["--repeats", "0"],
        ["--repeats", "many"],
        ["--threads", "-1"],
        ["--json", "/nowhere/at/all.json"],
        ["--sizes", "128"],
        ["--sizes", "4x1"],
        ["--models", "vgg"],
        ["--batch-size", "0"],
        ["--frobnicate"],
    ],
)
def test_a_mistake_in_a_flag_is_one_line(main, argv, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert argv[0] in captured.err


@pytest.mark.parametrize("main", MAINS)
def test_help_has_examples(main, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    assert "examples:\n  python -m benchmarks." in capsys.readouterr().out


def in_no_process(work, name, repeats):
    """The results of two processes."""
    each = [f"{m}, {n}" for m in scaling.METHODS for n in (scaling.ALONE, scaling.OUTSIDE, scaling.INSIDE)]
    times = timing.Times({k: [1.0 + i] for i, k in enumerate(each)}, QUIET)
    return {"times": times.to_dict(), "reductions": dict.fromkeys(each, 1)}


def test_overlap(tmp_path, monkeypatch, capsys):
    def faster(work, name, share, repeats):
        seconds = {key: [1.0] * repeats for key in overlap.CONTESTANTS}
        seconds |= {"SAM": [1.5] * repeats, "SAM, overlap": [1.1] * repeats, "ERM": [2.0] * repeats}
        return timing.Times(seconds, QUIET).to_dict()

    monkeypatch.setattr(overlap, "in_two", faster)
    path, page = tmp_path / "overlap.json", tmp_path / "page.md"
    overlap.main(["--models", "mlp-128", "--links", "0.5", "1", "--repeats", "8", "--json", str(path)])
    rows = written(path)["rows"]
    hidden = {(r["link"], r["contestant"]): r["hidden"] for r in rows if r["hidden"] is not None}
    assert hidden == {
        (link, name): pytest.approx(share)
        for link in (0.5, 1.0)
        for name, share in (("SAM, overlap", 0.8), ("ERM, overlap", 1.0))
    }
    docs.main([str(path), "--to", str(page)])
    assert "| 0.5 | SAM, overlap | 1.100 | [1.100, 1.100] | 0.80 |" in page.read_text()
    with pytest.raises(SystemExit, match="2"):
        overlap.main(["--links", "0"])
    assert "--links: must be positive" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_with_a_slow_link():
    rows = overlap.rows("mlp-128", 0.5, 3)
    assert [r["contestant"] for r in rows] == list(overlap.CONTESTANTS)
    assert all(r["median"] > 0 for r in rows)


@pytest.mark.slow
def test_the_page_has_every_row_and_where_it_comes_from(tmp_path, monkeypatch):
    monkeypatch.setattr(scaling, "in_two", in_no_process)
    paths = [tmp_path / f"{name}.json" for name in ("objective", "step", "pipeline", "parallel", "scaling")]
    objective.main(["--sizes", "8x4", "--repeats", "2", "--json", str(paths[0])])
    step.main(["--models", "mlp-32", "--repeats", "1", "--json", str(paths[1])])
    pipeline.main(["--images", "4", "--repeats", "1", "--json", str(paths[2])])
    for several, path in zip((parallel, scaling), paths[3:], strict=True):
        several.main(["--models", "mlp-128", "--repeats", "1", "--threads", "1", "--json", str(path)])
    references = (objective.REFERENCE, step.LIMIT, pipeline.REFERENCE, parallel.REFERENCE, scaling.ALONE)
    docs.main([*map(str, paths), "--to", str(tmp_path / "page.md")])
    page = (tmp_path / "page.md").read_text()
    for path in paths:
        content = json.loads(path.read_text())
        assert f"commit {content['environment']['commit']}" in page
        for row in content["rows"]:
            shown = f"| {row['contestant']} | {row['median']:.3f} |" in page
            assert shown != (row["contestant"] in references)


def objective_file(path, row):
    environment = {"commit": "abc", "threads": 1, "load": 1.25}
    content = {"benchmark": "objective", "environment": environment, "settings": {"repeats": 9}}
    path.write_text(json.dumps({**content, "rows": [{"size": [8, 4], "contestant": "NegLog", **row}]}))
    docs.main([str(path), "--to", str(path.with_suffix(".md"))])
    return path.with_suffix(".md").read_text()


def test_a_page_keeps_the_sections_of_other_benchmarks(tmp_path):
    row = {"median": 0.742, "low": 0.7, "high": 0.8, "rounds": 9, "seconds": 1e-4, "bar": 1.0, "passed": True}
    page, others = tmp_path / "o.md", "## Others\n\n| a |\n\nend.\n\n## Others\n\n| b |\n"
    page.write_text(f"# Old\n\nOld words.\n\n{others}")
    first = objective_file(tmp_path / "o.json", row)
    assert first.startswith(f"{docs.INTRODUCTION}\n{others}\n## Forward and")
    second = objective_file(tmp_path / "o.json", {**row, "median": 0.5})
    assert second == first.replace("0.742", "0.500")


def test_the_page_of_scaling_has_a_title_of_its_own(tmp_path):
    row = {"median": 0.742, "low": 0.7, "high": 0.8, "rounds": 9, "seconds": 1e-4, "bar": 1.0, "passed": True}
    assert objective_file(tmp_path / "scaling.json", row).startswith("# Scaling over processes\n\n`python -m")


def test_new_sections_take_the_place_of_all_that_have_their_title(tmp_path):
    page, path = tmp_path / "o.md", tmp_path / "o.json"
    row = {"median": 0.742, "low": 0.7, "high": 0.8, "rounds": 9, "seconds": 1e-4, "bar": 1.0, "passed": True}
    made = objective_file(path, row)
    title = next(line for line in made.splitlines() if line.startswith("## "))
    page.write_text(f"{made}\n## Others\n\n{title}\n\nformer rows\n")
    docs.main([str(path), str(path), "--to", str(page)])
    text = page.read_text()
    assert (text.count(title), text.count("0.742"), text.count("former rows")) == (2, 2, 0)
    assert text.endswith("\n\n## Others\n")


def test_the_page_still_shows_files_without_intervals(tmp_path):
    row = {"median": 0.742, "low": 0.715, "high": 0.766, "rounds": 9, "seconds": 1e-4, "bar": 1.0, "passed": True}
    page = objective_file(tmp_path / "o.json", row)
    assert "| 8 x 4 | NegLog | 0.742 | quartiles 0.715 to 0.766 | 1: met |" in page
    assert "commit abc, threads 1, load 1.25; repeats 9." in page
    missed = objective_file(tmp_path / "o.json", {**row, "passed": False})
    assert "| 1: missed |" in missed
    assert step.to_sam({"ratio_to_sam": 1.0078}) == "1.008"


def test_the_page_shows_interval_load_and_verdict(tmp_path):
    for load, said in ((QUIET, "undecided"), (LOADED, "no verdict under load"), (timing.Load(None, 2), "undecided")):
        times = timing.Times({"a": [1.0] * 7, "b": [0.7, 0.8, 0.9, 0.95, 0.97, 0.98, 1.1]}, load)
        page = objective_file(tmp_path / "o.json", measure.judged(timing.ratio(times, "b", "a"), 1.0))
        assert f"| 8 x 4 | NegLog | 0.950 | [0.700, 1.100] | 1: {said} |" in page
        known = "unknown" if load.highest is None else f"at most {load.highest:.1f} (verdicts up to 3)"
        assert f"commit abc, threads 1; repeats 9; load of other programs {known}." in page


def test_a_benchmark_says_at_its_beginning_that_there_will_be_no_verdict(tmp_path, capsys, monkeypatch):
    average = [0.0]
    monkeypatch.setattr(timing.gc, "collect", lambda: 0)  # which takes long in a process with many modules
    monkeypatch.setattr(timing, "BLOCK", 0.0)
    monkeypatch.setattr(timing.os, "getloadavg", lambda: (average[0], 0.0, 0.0))
    monkeypatch.setattr(timing.os, "cpu_count", lambda: 2)
    arguments = ["--sizes", "8x4", "--repeats", "6", "--json", str(tmp_path / "o.json")]
    objective.main(arguments)
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "no verdict" not in captured.out
    average[0] = 8.0
    objective.main(arguments)
    captured = capsys.readouterr()
    assert "load of other programs is 8.0 on 2 cores" in captured.err
    assert "no verdict while it is above 3" in captured.err
    assert captured.out.count("no verdict under load") == 2
    rows = written(tmp_path / "o.json")["rows"]
    assert {row["verdict"] for row in rows if row["bar"]} == {"no verdict under load"}
    assert all(row["median_low"] <= row["median"] <= row["median_high"] for row in rows)


@pytest.mark.parametrize("content", ["", "{}", "[]"])
def test_the_page_refuses_what_no_benchmark_wrote(tmp_path, content):
    (tmp_path / "other.json").write_text(content)
    with pytest.raises(SystemExit, match=r"other\.json is"):
        docs.main([str(tmp_path / "other.json"), "--to", str(tmp_path / "page.md")])
    assert not (tmp_path / "page.md").exists()


def test_calls_that_differ_in_cost_are_compared_turn_by_turn():
    times = timing.Times({"looks": [5.0, 1.0, 3.0, 7.0, 9.0], "plain": [2.0, 2.0, 2.0, 2.0, 1.0]}, LOADED)
    assert timing.turns(times, 2) == timing.Times({"looks": [3.0, 5.0], "plain": [2.0, 2.0]}, LOADED)
    assert timing.turns(times, 9).seconds == {"looks": [5.0], "plain": [1.8]}
    assert timing.turns(times, 1) == times


def test_the_interval_of_groups_is_that_of_a_bootstrap_of_the_groups():
    """Values of a group are alike: the interval is as wide as if each group were one value."""
    alike = [[value] * 50 for value in (0.9, 1.0, 1.1, 1.2)]
    assert versions.interval(alike) == versions.interval([[value] for value in (0.9, 1.0, 1.1, 1.2)])
    median, low, high = versions.interval(alike)
    assert low < median < high
    assert versions.interval([[1.0, 1.0]] * 3) == (1.0, 1.0, 1.0)


def test_the_rows_of_versions_are_those_that_were_asked_for():
    found = versions.cases(["mlp-32", "resnet56"], ["bisam SAM"], [(128, 10), (1024, 32000)])
    assert [(case.of, case.name, case.calls) for case in found] == [
        ("mlp-32", "bisam SAM", 5),
        ("resnet56", "bisam SAM", 1),
        ("128x10", "NegLog", 204),
        ("128x10", "Tanh", 204),
        ("1024x32000", "NegLog", 1),
        ("1024x32000", "Tanh", 1),
    ]
    assert versions.cases([], versions.STEPS, []) == []


@pytest.mark.slow
def test_a_tree_is_compared_with_itself(tmp_path, capsys):
    path = tmp_path / "versions.json"
    versions.main(
        [str(versions.HERE), "--models", "--sizes", "16x3", "--repeats", "4", "--processes", "2", "--json", str(path)]
    )
    rows = written(path)["rows"]
    assert [(row["of"], row["name"], row["pairs"], row["processes"]) for row in rows] == [
        ("16x3", "NegLog", 4, 2),
        ("16x3", "Tanh", 4, 2),
    ]
    assert all(row["median_low"] <= row["median"] <= row["median_high"] for row in rows)
    assert all(row["verdict"] in ("met", "missed", "undecided", "no verdict under load") for row in rows)


def test_a_folder_without_benchmarks_is_refused_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        versions.main([str(tmp_path)])
    assert ended.value.code == 2
    assert "has no benchmarks/step.py: give the root of a checkout" in capsys.readouterr().err


def test_memory_of_a_tiny_model(tmp_path, capsys):
    page = tmp_path / "page.md"
    begin, end = (mark.format(page) for mark in memory.MARKS)
    page.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    small = ["--layers", "2", "--width", "48", "--vocabulary", "60"]
    memory.main([*small, "--to", str(page), "--json", str(tmp_path / "memory.json")])
    rows = {row["method"]: row for row in written(tmp_path / "memory.json")["rows"]}
    weights = rows["plain AdamW"]["weights_bytes"]
    assert weights == 4 * sum(p.numel() for p in memory.GPT(60, width=48, depth=2, heads=12).parameters())
    assert rows["plain AdamW"]["peak_bytes"] > 4 * weights  # weights, gradient, two averages
    copied, redrawn = rows["`ZerothOrder(0.5)`"], rows['`ZerothOrder(0.5, restore="redraw")`']
    assert copied["peak_bytes"] - redrawn["peak_bytes"] == pytest.approx(weights, rel=0.1)
    assert (redrawn["gradients"], redrawn["forwards"]) == (1, 2)
    assert rows["`SAMON(0.5)`"]["peak_bytes"] < rows["`SAM(0.05)`, `BiSAM(0.05)`"]["peak_bytes"]
    assert rows["`BiSAM(0.05)`, LoRA"]["trained"] < rows["plain AdamW"]["trained"]
    text = page.read_text()
    assert text.startswith(f"before\n{begin}\n| method |")
    assert text.endswith(f"|\n{end}\nafter\n")
    assert "old" not in text
    assert "FilterNoise" in capsys.readouterr().out


def test_a_page_without_a_place_for_the_table_is_refused(tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.md"
    page.write_text("no place")
    monkeypatch.setattr(memory, "rows", lambda **size: [])
    with pytest.raises(SystemExit) as error:
        memory.main(["--to", str(page)])
    assert error.value.code == 2
    assert "no place for the table" in capsys.readouterr().err


@pytest.mark.slow
def test_the_table_of_the_page_is_the_present_one():
    page = Path(__file__).parents[1] / "docs" / "fine-tuning.md"
    assert page.read_text() == memory.written(page.read_text(), "docs/fine-tuning.md", memory.rows())
