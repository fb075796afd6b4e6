"""`bisam evaluate`: the scores of the run's own test, and measures of `bisam.analysis` on the same predictions."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch

pytest.importorskip("torchmetrics")

from bisam import ModelOracle, cross_entropy
from bisam.analysis import calibration, corruptions, margins
from bisam.experiments import data
from bisam.experiments.errors import RunWarning
from bisam.experiments.inference import evaluate as module
from bisam.experiments.inference.evaluate import evaluate
from bisam.experiments.inference.loaded import load
from bisam.experiments.models.build import build
from bisam.experiments.models.files import write_state
from bisam.experiments.runs.folder import Run
from bisam.experiments.training.trained import network, result_of, weights
from tests.experiments.inference.conftest import MACHINE, finished


def plain(run: Run, which: str = "last", classes: int = 10, channels: int = 1) -> torch.nn.Module:
    return network(run, weights(run, result_of(run), which), classes, channels, None).eval()


def test_rows(run: Run) -> list:
    return list(data.load(run.recipe, MACHINE).test.batches(64))


test_rows.__test__ = False


@pytest.mark.parametrize("which", ["best", "last", "ema"])
def test_the_scores_are_those_of_the_result(which, digits, tmp_path, bisam):
    code, out, err = bisam("evaluate", digits.folder, "--which", which, "--to", tmp_path / "a.json")
    assert (code, err) == (0, "")
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["scores"]["accuracy"] == result_of(digits)["scores"][which]["accuracy"]
    assert f"{100 * found['scores']['accuracy']:.2f} %" in out
    assert (found["weights"], found["split"], found["examples"]) == (which, "test", 150)
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("precision", ["bf16", "64"])
@pytest.mark.parametrize("layout", [True, False])
def test_the_scores_are_those_of_the_result_in_other_precisions(precision, layout, digits, tmp_path):
    recipe = replace(digits.recipe, model="convnet", precision=precision, channels_last=layout, epochs=1)
    run = finished(tmp_path, recipe)
    for which, scores in result_of(run)["scores"].items():
        assert evaluate(load(str(run.folder), tmp_path, which)).scores["accuracy"] == scores["accuracy"]


@pytest.mark.parametrize("task", ["cola", "rte"])
@pytest.mark.parametrize("which", ["best", "last"])
def test_the_scores_of_texts_are_those_of_the_result(task, which, texts, root):
    run = texts[task]
    found = evaluate(load(str(run.folder), root, which), replace(MACHINE, data_dir=root))
    wanted = result_of(run)["scores"][which]
    assert set(wanted) == {"matthews" if task == "cola" else "accuracy"}
    assert {name: found.scores[name] for name in wanted} == wanted
    assert "accuracy" in found.scores
    assert "top5" not in found.scores


def test_image_files(photographed, tmp_path):
    found = evaluate(load(str(photographed.folder), tmp_path, "best"))
    assert found.scores == result_of(photographed)["scores"]["best"]


def test_the_measures_are_those_of_the_library_on_the_model(digits):
    found = evaluate(load(str(digits.folder), MACHINE.data_dir, "last"))
    oracle, rows = ModelOracle(plain(digits), cross_entropy), test_rows(digits)
    wanted = calibration(oracle, rows)
    assert found.plain.calibration.ece == pytest.approx(wanted.ece, abs=1e-6)
    assert found.plain.loss == pytest.approx(wanted.nll, abs=1e-6)
    assert found.plain.margins.median == pytest.approx(margins(oracle, rows).median, abs=1e-5)
    logits = torch.cat([plain(digits)(x) for x, _ in rows])
    labels = torch.cat([y for _, y in rows])
    top5 = (logits.argsort(1, descending=True)[:, :5] == labels[:, None]).any(1).double().mean()
    assert found.scores["top5"] == pytest.approx(float(top5))


def test_corruptions_are_those_of_the_library(digits):
    statistics = data.load(digits.recipe, MACHINE).test.statistics
    mean, std = statistics
    rows = list(data.load(digits.recipe, MACHINE).test.batches(256))
    wanted = corruptions(ModelOracle(plain(digits), cross_entropy), rows, mean=mean, std=std)
    found = evaluate(load(str(digits.folder), MACHINE.data_dir, "last"), corrupted=True)
    assert found.corruptions.errors == wanted.errors
    assert found.corruptions.error == pytest.approx(1 - found.scores["accuracy"])


def test_augmentation_is_the_mean_of_the_probabilities_of_two_views(digits):
    found = evaluate(load(str(digits.folder), MACHINE.data_dir, "last"), tta=True)
    model, right, loss = plain(digits), 0, 0.0
    with torch.no_grad():
        for x, y in test_rows(digits):
            p = (model(x).double().softmax(1) + model(x.flip(3)).double().softmax(1)) / 2
            right += int((p.argmax(1) == y).sum())
            loss -= float(p.gather(1, y[:, None]).log().sum())
    assert found.tta.scores["accuracy"] == right / found.examples
    assert found.tta.loss == pytest.approx(loss / found.examples, abs=1e-6)
    assert found.tta.loss != found.plain.loss


@pytest.mark.parametrize("split", ["train", "validation"])
def test_other_splits(split, digits):
    found = evaluate(load(str(digits.folder), MACHINE.data_dir), split=split)
    part = getattr(data.load(digits.recipe, MACHINE), split)  # of the training part with its label noise
    right = sum(int((plain(digits)(x).argmax(1) == y).sum()) for x, y in part.batches(64))
    assert (found.examples, found.scores["accuracy"]) == (len(part), right / len(part))


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors", "folder"])
def test_an_exported_model_is_the_run(name, digits, tmp_path, bisam):
    assert bisam("export", digits.folder, "--to", tmp_path / name)[0] == 0
    more = ("--model", "mlp", "--config", digits.folder / "recipe.json") if name == "a.pt" else ()
    code, _, err = bisam("evaluate", tmp_path / name, *more, "--to", tmp_path / "a.json")
    assert (code, err) == (0, "")
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["scores"]["accuracy"] == result_of(digits)["test_last"]
    assert found["weights"] == "file"


@pytest.mark.parametrize("name", ["convnet", "resnet8", "torchvision:resnet18", "timm:test_vit"])
@pytest.mark.parametrize("file", ["a.pt", "a.safetensors"])
def test_the_classes_of_a_file_are_those_of_its_head(name, file, tmp_path):
    """Whose weights are not the last ones in the order of their names."""
    model = build(name, 7)
    write_state(model, tmp_path / file, {})
    loaded = load(str(tmp_path / file), tmp_path, model=name, dataset="cifar10")
    assert loaded.classes == 7
    found = loaded.model.state_dict()
    assert all(torch.equal(found[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("task", ["cola", "rte"])
def test_an_exported_folder_of_a_text_model_needs_no_other_files_of_it(task, texts, root, tmp_path, bisam):
    run = texts[task]
    assert bisam("export", run.folder, "--to", tmp_path / "model", "--data-dir", root)[0] == 0
    for name in ("config.json", "README.md", "tokenizer_config.json"):
        text = (
            (tmp_path / "model" / name).read_text().replace(str(tmp_path), "")
        )  # the card has the place of the folder
        assert str(root) not in text
    here = tmp_path / "here"
    shutil.copytree(root / "glue", here / "glue")
    code, _, err = bisam("evaluate", tmp_path / "model", "--data-dir", here, "--to", tmp_path / "a.json")
    assert code == 0, err
    found = json.loads((tmp_path / "a.json").read_text())["scores"]
    for metric, score in result_of(run)["scores"]["last"].items():
        assert found[metric] == pytest.approx(score, abs=1e-6)


def test_another_data_set_is_prepared_as_that_of_the_run(photographed, photographs, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(photographs, copy)
    loaded = load(str(photographed.folder), tmp_path, "last")
    own, other = (evaluate(loaded, dataset=dataset) for dataset in (None, f"folder:{copy}"))
    assert own.scores == other.scores
    assert own.plain.loss == pytest.approx(other.plain.loss, abs=1e-6)


def test_a_data_set_with_other_classes_is_refused(digits, photographs, bisam):
    code, _, err = bisam("evaluate", digits.folder, "--dataset", f"folder:{photographs}")
    assert code == 2
    assert f"folder:{photographs} has 2 classes, and the model 10" in err


def test_classes_in_another_order_are_refused_and_other_names_are_told(photographed, photographs, tmp_path, bisam):
    """Labels and predictions are compared by number: scores of other classes would be numbers without a meaning."""
    for name, new in (("moved", ("red", "white")), ("renamed", ("cold", "warm"))):
        shutil.copytree(photographs, tmp_path / name)
        for number, old in enumerate(("red", "blue") if name == "moved" else ("blue", "red")):
            (tmp_path / name / old).rename(tmp_path / name / f"{new[number]}.new")
        for one in new:
            (tmp_path / name / f"{one}.new").rename(tmp_path / name / one)
    code, out, err = bisam("evaluate", photographed.folder, "--dataset", f"folder:{tmp_path / 'moved'}")
    assert (code, out) == (2, "")
    assert f"red is class 1 of the model and class 0 of folder:{tmp_path / 'moved'}, and the scores are " in err
    told = "have other names than those of .* are taken for those with the same number: cold for blue$"
    with pytest.warns(RunWarning, match=told):
        code, _, _ = bisam("evaluate", photographed.folder, "--dataset", f"folder:{tmp_path / 'renamed'}")
    assert code == 0


def test_a_result_that_differs_is_told(digits, tmp_path, bisam, monkeypatch):
    usual = module.scores
    monkeypatch.setattr(module, "scores", lambda *given: [score / 2 for score in usual(*given)])
    code, _, err = bisam("evaluate", digits.folder)
    assert code == 0
    assert "result.json has accuracy 0." in err
    assert "(that was on cpu, with torch" in err


def test_mirror_images_that_training_did_not_have_are_told(digits, photographed, bisam):
    assert "was trained without mirror images" in bisam("evaluate", digits.folder, "--tta")[2]
    code, out, err = bisam("evaluate", photographed.folder, "--tta")
    assert (code, err) == (0, "")
    assert "with mirror images" in out


def test_what_cannot_be_evaluated_is_one_line(digits, texts, root, tmp_path, bisam):
    file = tmp_path / "w.pt"
    torch.save(plain(digits).state_dict(), file)
    unfinished = tmp_path / "unfinished"
    shutil.copytree(digits.folder, unfinished)
    (unfinished / "result.json").unlink()
    cola = texts["cola"].folder
    for given, message in [
        ((tmp_path / "nowhere",), "nowhere does not exist: give the folder of a finished run, or a file of weights"),
        ((unfinished,), "is not finished: the command that started the run resumes it"),
        ((file,), "w.pt has weights alone: give --model and --dataset too, or a recipe with --config"),
        ((file, "--model", "mlp"), "give --dataset too"),
        ((file, "--model", "convnet", "--dataset", "digits"), "do not fit 'convnet'"),
        ((file, "--which", "last"), "--which last chooses among the weights of a run, and"),
        ((digits.folder, "--model", "mlp"), "the folder of a run says what its model is: leave --model mlp out"),
        ((digits.folder, "--which", "bset"), "unknown weights of a run 'bset', did you mean 'best'"),
        ((f"{digits.folder}:bset",), "unknown weights of a run 'bset', did you mean 'best'"),
        ((digits.folder, "--split", "tset"), "unknown split 'tset', did you mean 'test'"),
        ((digits.folder, "--device", "gpu"), "device 'gpu' is unknown or not available"),
        ((digits.folder, "--to", tmp_path), "is a folder: give a file, such as"),
        ((cola, "--tta", "--data-dir", root), "--tta mirrors images, and glue:cola has texts: leave it out"),
        ((cola, "--corruptions", "--data-dir", root), "--corruptions are those of images, and glue:cola has texts"),
    ]:
        code, out, err = bisam("evaluate", *given)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert message in err


def test_weights_can_be_chosen_in_both_ways(digits, bisam):
    first, second = bisam("evaluate", f"{digits.folder}:ema"), bisam("evaluate", digits.folder, "--which", "ema")
    assert first[0] == second[0] == 0
    assert first[1].splitlines()[:8] == second[1].splitlines()[:8]
    assert bisam("evaluate", f"{digits.folder}:ema", "--which", "last")[0] == 2
