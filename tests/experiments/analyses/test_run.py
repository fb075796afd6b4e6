"""Analyses of runs: what is measured, what is kept, and what is refused."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from math import isnan
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors.torch import save_file

from bisam import L2, ModelOracle
from bisam.analysis import average_sharpness, flips, sharpness
from bisam.experiments import data
from bisam.experiments.analyses import catalogue
from bisam.experiments.analyses.file import ANALYSIS, as_text, read_entries
from bisam.experiments.analyses.run import analyse, analyse_weights, missing, numbers
from bisam.experiments.analyses.settings import Settings
from bisam.experiments.errors import DamagedError, RunError
from bisam.experiments.models.build import build
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs.folder import Run
from bisam.experiments.runs.results import with_checksums
from bisam.experiments.training.optimizers import descent_loss
from tests.experiments.analyses.conftest import FEW, MACHINE, RECIPE


class Watch:
    """Counts what is computed, and interrupts the measure whose title contains a text."""

    def __init__(self, stop: str = "-") -> None:
        self.titles: list[str] = []
        self._stop = stop

    def __call__(self, title: str, done: int, total: int) -> None:
        assert 0 < done <= total
        if title not in self.titles:
            self.titles.append(title)
        if self._stop in title:
            raise KeyboardInterrupt

    @property
    def analyses(self) -> list[str]:
        return list(dict.fromkeys(title.partition(":")[0] for title in self.titles))


def twin(run: Run, weights: str, settings: Settings) -> tuple[ModelOracle, list]:
    """The model and its examples, from the files and the data set alone."""
    state = torch.load(run.folder / "checkpoint.pt", weights_only=True)
    model = build("convnet", 10, channels=1)
    if weights == "best":
        model.load_state_dict(state["best"]["weights"])
    else:
        part, prefix = {"last": ("sharp", "model."), "ema": ("average", "module.")}[weights]
        model.load_state_dict({k[len(prefix) :]: v for k, v in state[part].items() if k.startswith(prefix)})
    train = data.load(RECIPE, MACHINE).train
    chosen = torch.randperm(96, generator=torch.Generator().manual_seed(settings.seed))[: settings.examples].sort()[0]
    x, y = train.images[chosen], train.labels[chosen]
    n = settings.batch_size
    batches = [(x[i : i + n], y[i : i + n]) for i in range(0, len(x), n)]
    return ModelOracle(model, descent_loss(0.1, 10)), batches


@pytest.mark.parametrize("weights", ["best", "last", "ema"])
def test_it_measures_the_weights_of_the_run_on_its_own_examples(run, weights):
    settings = replace(FEW, weights=weights, seed=3)
    found = analyse(run.folder, ["sharpness", "flips"], settings, MACHINE)
    oracle, batches = twin(run, weights, settings)
    rise, flipped = found["entries"][0]["results"], found["entries"][1]["results"]
    assert rise["many"] == sharpness(oracle, batches, L2(0.05), steps=3, seed=3).to_dict()
    assert rise["average"] == average_sharpness(oracle, batches, L2(0.05), seed=3).to_dict()
    assert rise["m"] == sharpness(oracle, batches, L2(0.05), m=16, seed=3).to_dict()
    assert flipped["flips"] == flips(oracle, batches, L2(0.05), seed=3).to_dict()
    assert rise["many"]["examples"] == 40
    values = numbers(found, ["sharpness", "flips"], settings)
    assert values["rise"] == rise["many"]["rise"]
    assert values["flips, SAM"] == flipped["flips"]["flipped"]["loss"] / 40


def test_the_labels_are_those_of_the_run_and_other_splits_are_clean(run):
    train, test = (
        analyse(run.folder, ["flips"], replace(FEW, split=split, examples=2000), MACHINE)["entries"][-1]["results"]
        for split in ("train", "test")
    )
    assert (train["flips"]["examples"], test["flips"]["examples"]) == (96, 96)
    assert train != test


def test_what_is_there_is_kept_and_an_interruption_loses_one_analysis(run):
    first = Watch(stop="flips")
    with pytest.raises(KeyboardInterrupt):
        analyse(run.folder, ["zero-one", "flips", "sharpness"], FEW, MACHINE, first)
    assert first.analyses == ["sharpness", "zero-one", "flips"]
    saved = (run.folder / ANALYSIS).read_bytes()
    second, third = Watch(), Watch()
    found = analyse(run.folder, ["zero-one", "flips", "sharpness"], FEW, MACHINE, second)
    assert second.analyses == ["flips"]
    assert found["entries"][:2] == json.loads(saved)["entries"]
    assert analyse(run.folder, ["zero-one", "flips", "sharpness"], FEW, MACHINE, third) == found
    assert third.titles == []
    assert json.loads((run.folder / ANALYSIS).read_text()) == found
    assert not list(run.folder.glob(".*.tmp"))


def change(run: Run, **values) -> None:
    """Change values of a result."""
    result = {k: v for k, v in run.result.items() if k not in ("recipe", "metrics", "checksum")}
    changed = with_checksums({**result, **values}, run.recipe, run.metrics())
    (run.folder / "result.json").write_text(json.dumps(changed))


@pytest.mark.parametrize("weights", ["best", "last"])
def test_the_weights_are_those_whose_test_score_is_the_headline(run, weights):
    """By default; the entry has them by name, so that it is found again."""
    change(run, headline=weights)
    found, expected = (
        analyse(run.folder, ["flips"], settings, MACHINE)["entries"]
        for settings in (FEW, replace(FEW, weights=weights))
    )
    assert found == expected
    assert found[0]["settings"]["weights"] == weights
    assert not missing(run.folder, run.result, {"flips": FEW})
    assert missing(run.folder, run.result, {"flips": replace(FEW, weights="ema")}) == ["flips"]


def test_a_changed_setting_computes_again_and_keeps_the_other(run):
    analyse(run.folder, ["flips"], FEW, MACHINE)
    for changed in ({"rho": (0.1,)}, {"examples": 39}, {"seed": 1}, {"batch_size": 17}, {"weights": "best"}):
        watch = Watch()
        found = analyse(run.folder, ["flips"], replace(FEW, **changed), MACHINE, watch)
        assert watch.analyses == ["flips"], changed
    assert len(found["entries"]) == 6
    watch = Watch()
    analyse(run.folder, ["flips"], replace(FEW, steps=9), MACHINE, watch)  # they have no steps
    assert watch.titles == []


def test_an_analysis_without_radius_is_made_once():
    several = replace(FEW, rho=(0.3, 0.4))
    hessian = catalogue.ANALYSES["hessian"].settings
    assert [one.relevant(hessian) for one in several.each(hessian)] == [FEW.relevant(hessian)]
    assert "rho" not in FEW.relevant(hessian)
    assert len(several.each(catalogue.ANALYSES["flips"].settings)) == 2


def test_several_radii_are_entries_of_their_own(run):
    found = analyse(run.folder, ["flips"], replace(FEW, rho=(0.05, 0.2)), MACHINE)
    assert [entry["settings"]["rho"] for entry in found["entries"]] == [0.05, 0.2]
    assert [entry["results"]["flips"]["rho"] for entry in found["entries"]] == [0.05, 0.2]


def trained_again(run: Run) -> None:
    """The result of the same recipe at another time."""
    change(run, finished="2030-01-01T00:00:00Z")


def test_the_analysis_of_other_weights_is_not_used(run):
    analyse(run.folder, ["flips", "zero-one"], FEW, MACHINE)
    trained_again(run)
    watch = Watch()
    found = analyse(run.folder, ["flips"], FEW, MACHINE, watch)
    assert watch.analyses == ["flips"]
    assert [entry["analysis"] for entry in found["entries"]] == ["flips"]


def test_another_version_of_an_analysis_is_computed_again_and_unknown_ones_are_kept(run, monkeypatch):
    analyse(run.folder, ["flips", "zero-one"], FEW, MACHINE)
    later = replace(catalogue.ANALYSES["flips"], version=2)
    monkeypatch.setitem(catalogue.ANALYSES, "flips", later)
    watch = Watch()
    assert [e["version"] for e in analyse(run.folder, ["flips"], FEW, MACHINE, watch)["entries"]] == [1, 2]
    assert watch.analyses == ["flips"]
    entries = read_entries(run.folder)
    entries[0]["analysis"] = "of a later bisam"
    (run.folder / ANALYSIS).write_text(as_text(entries))
    found = analyse(run.folder, ["flips"], replace(FEW, seed=1), MACHINE)["entries"]
    assert [entry["analysis"] for entry in found] == ["of a later bisam", "flips", "flips"]


def test_a_number_that_is_not_finite_is_null(run, monkeypatch):
    analysis = catalogue.ANALYSES["flips"]
    measure = analysis.measures["flips"]

    def infinite(*args):
        found = measure.call(*args)
        return replace(found, rho=float("inf"), cosines={"loss": {"-log": float("nan")}})

    changed = replace(analysis, measures={"flips": replace(measure, call=infinite)})
    monkeypatch.setitem(catalogue.ANALYSES, "flips", changed)
    found = analyse(run.folder, ["flips"], FEW, MACHINE)
    assert found["entries"][0]["results"]["flips"]["rho"] is None
    assert isnan(numbers(found, ["flips"], FEW.of(run.result))["cosine, SAM and -log"])
    (entry,) = read_entries(run.folder)
    restored = changed.restored(entry["results"])["flips"]
    assert isnan(restored.rho)
    assert isnan(restored.cosines["loss"]["-log"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "Expecting property name"),
        ("[]", "it is not an object"),
        ("{}", "its checksum differs"),
        ('{"version": 9}', "has version 9, and this bisam knows version 1"),
        (None, "its checksum differs"),
    ],
)
def test_a_damaged_file_is_one_line_and_is_not_replaced(run, content, message):
    path = run.folder / ANALYSIS
    if content is None:
        analyse(run.folder, ["flips"], FEW, MACHINE)
        content = path.read_text().replace('"seconds"', '"second"')
    path.write_text(content)
    with pytest.raises(RunError, match=message) as error:
        analyse(run.folder, ["flips"], FEW, MACHINE)
    assert "\n" not in str(error.value)
    if isinstance(error.value, DamagedError):
        assert "delete this file, and `bisam analyse` computes it again" in str(error.value)
    assert path.read_text() == content


def refused(run: Run, message: str, settings: Settings = FEW) -> None:
    before = sorted(run.folder.iterdir()) if run.folder.exists() else None
    with pytest.raises((RunError, ValueError), match=message) as error:
        analyse(run.folder, ["flips"], settings, MACHINE)
    assert "\n" not in str(error.value)
    assert not (run.folder / ANALYSIS).exists()
    if before is None:
        assert not run.folder.exists()


def test_what_cannot_be_analysed_is_one_line(copied, tmp_path):
    refused(Run(tmp_path / "nothing", RECIPE), "is no run folder: it has no recipe.json")
    run = copied("unfinished")
    (run.folder / "result.json").unlink()
    refused(run, "is not finished: the command that started the run resumes it")
    run = copied("compact")
    (run.folder / "checkpoint.pt").unlink()
    refused(run, "has no checkpoint.pt, as copies of results without weights")
    run = copied("damaged")
    content = bytearray((run.folder / "checkpoint.pt").read_bytes())
    content[1000] ^= 1
    (run.folder / "checkpoint.pt").write_bytes(content)
    refused(run, "its checksum differs")
    run = copied("locked")
    with FileLock(run.folder / ".lock"):
        refused(run, "is in use by another process")
    refused(copied("file"), "are not those of a run: use analyse_weights", replace(FEW, weights="file"))


def test_a_run_that_diverged_is_refused(run):
    change(run, diverged=2)
    refused(run, "diverged: its loss is not finite from epoch 2 on")


def test_a_checkpoint_of_another_end_of_the_run_is_refused(run, tmp_path):
    from bisam.experiments.runs.checkpoint import serialized

    state = run.checkpoint()
    state["history"] = [*state["history"][:-1], {**state["history"][-1], "seconds": 1.5}]
    (run.folder / "checkpoint.pt").write_bytes(serialized(state, RECIPE))
    refused(run, "checkpoint.pt is not that of the end of the run")


def test_weights_of_an_average_that_is_not_there_are_refused(tmp_path):
    from bisam.experiments.training.train import train

    run = Run.under(tmp_path, replace(RECIPE, ema=None, epochs=1, limit=32))
    train(run, MACHINE)
    refused(run, "has no average of the weights", replace(FEW, weights="ema"))


def test_the_global_generator_and_the_run_are_left_alone(run):
    before = {path: path.read_bytes() for path in run.folder.iterdir() if path.is_file()}
    state = torch.get_rng_state()
    analyse(run.folder, ["flips"], FEW, MACHINE)
    assert torch.equal(torch.get_rng_state(), state)
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_the_weights_of_a_file(tmp_path, suffix):
    torch.manual_seed(1)
    model, path, out = build("convnet", 10, channels=1), tmp_path / f"model{suffix}", tmp_path / "out"
    (torch.save if suffix == ".pt" else save_file)(model.state_dict(), path)
    recipe, watch = Recipe(limit=64), Watch()
    found = analyse_weights(path, recipe, out, ["flips"], FEW, MACHINE, watch)
    (entry,) = found["entries"]
    train = data.load(recipe, MACHINE).train
    chosen = torch.randperm(64, generator=torch.Generator().manual_seed(0))[:40].sort().values
    batches = [(train.images[i], train.labels[i]) for i in chosen.split(16)]
    assert entry["results"]["flips"] == flips(ModelOracle(model, descent_loss(0, 10)), batches, L2(0.05)).to_dict()
    assert entry["settings"]["weights"] == "file"
    again = Watch()
    assert analyse_weights(path, recipe, out, ["flips"], FEW, MACHINE, again) == found
    assert again.titles == []
    model.get_parameter(next(name for name, _ in model.named_parameters())).data.mul_(2)
    (torch.save if suffix == ".pt" else save_file)(model.state_dict(), path)
    assert len(analyse_weights(path, recipe, out, ["flips"], FEW, MACHINE, again)["entries"]) == 1
    assert again.analyses == ["flips"]


def test_weights_that_do_not_fit_are_one_line(tmp_path, run):
    path, out = tmp_path / "model.pt", tmp_path / "out"
    with pytest.raises(ValueError, match="cannot be read"):
        analyse_weights(path, Recipe(), out, ["flips"], FEW, MACHINE)
    torch.save(build("convnet", 7, channels=1).state_dict(), path)  # a head for 7 classes is not replaced by a new one
    with pytest.raises(ValueError, match="do not fit 'convnet': of another shape"):
        analyse_weights(path, Recipe(limit=64), out, ["flips"], FEW, MACHINE)
    with pytest.raises(RunError, match="is the folder of a run"):
        analyse_weights(path, Recipe(), run.folder, ["flips"], FEW, MACHINE)


def test_a_run_in_float64_is_analysed_in_float64(tmp_path):
    from bisam.experiments.training.train import train

    run = Run.under(tmp_path, replace(RECIPE, precision="64", epochs=1, limit=32))
    train(run, MACHINE)
    rise = analyse(run.folder, ["sharpness"], replace(FEW, rho=(1e-9,)), MACHINE)["entries"][0]["results"]
    assert 0 < rise["one"]["rise"] < 1e-7  # which float32 does not resolve


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rho": ()}, "rho has no radius"),
        ({"rho": (0.0,)}, "rho must be positive"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"examples": 0}, "examples must be at least 1"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"split": "tests"}, "unknown split 'tests', did you mean 'test'"),
        ({"weights": "lst"}, "unknown weights of a run 'lst', did you mean 'last'"),
    ],
)
def test_settings_out_of_range_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Settings(**values)


def test_names_of_analyses():
    assert catalogue.known(["flips", "sharpness", "flips"]) == ["sharpness", "flips"]
    with pytest.raises(ValueError, match="unknown analysis 'flip', did you mean 'flips'"):
        catalogue.known(["flip"])
    with pytest.raises(ValueError, match="no analysis is named"):
        catalogue.known([])


def test_a_missing_package_is_named_before_anything_is_computed(monkeypatch):
    monkeypatch.setattr(catalogue, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'hessian needs curvlinops: pip install "bisam\[analysis\]"'):
        catalogue.known(["sharpness", "hessian"])


def test_titles_of_columns_are_unique():
    titles = [column.title for analysis in catalogue.ANALYSES.values() for column in analysis.columns]
    assert len(titles) == len(set(titles))


def test_the_code_of_the_page_runs(run, capsys):
    page = Path(__file__).parents[3] / "docs" / "analysis.md"
    (block,) = re.findall(r"```py\n(.*?)```", page.read_text(), re.DOTALL)
    exec(block.replace("weights=", "examples=40, steps=3, batch_size=16, weights="), {"folder": run.folder})
    assert float(capsys.readouterr().out) > 0


@pytest.mark.slow
def test_each_analysis_measures_and_draws_a_run(run):
    pytest.importorskip("curvlinops")
    from bisam.experiments.reports.drawing import rendered

    found = analyse(run.folder, list(catalogue.ANALYSES), FEW, MACHINE)
    assert [entry["analysis"] for entry in found["entries"]] == list(catalogue.ANALYSES)
    for entry in found["entries"]:
        analysis = catalogue.ANALYSES[entry["analysis"]]
        numbers = analysis.numbers(entry["results"])
        # A noise scale beyond the number of examples is none.
        assert {title for title, value in numbers.items() if isnan(value)} <= {"noise scale"}
        restored = analysis.restored(entry["results"])
        assert {name: result.to_dict() for name, result in restored.items()} == entry["results"]
        if analysis.draw is not None:
            figure = analysis.draw(restored)
            assert figure.get_figwidth() == 3.4
            assert rendered(figure).startswith(b"\x89PNG")
