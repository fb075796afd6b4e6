"""`bisam predict`: image files as the test images of the run, and texts, as CSV."""

from __future__ import annotations

import csv
import io
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("lightning_fabric")

from PIL import Image

from bisam.experiments.data import load as load_data
from bisam.experiments.data.image_tensors import smaller
from bisam.experiments.data.names import class_names
from bisam.experiments.data.splits import Split
from bisam.experiments.inference.images import preparation
from bisam.experiments.inference.loaded import load
from bisam.experiments.inference.predict import predict_images
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs.folder import Run
from bisam.experiments.runs.machine import Machine
from bisam.experiments.training.trained import network, result_of, weights
from tests.experiments.inference.conftest import MACHINE, finished


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def probabilities(run: Run, split: Split, classes: int, channels: int, root: Path | None = None) -> torch.Tensor:
    model = network(run, weights(run, result_of(run), "last"), classes, channels, root).eval()
    with torch.no_grad():
        return torch.cat([model(x).softmax(1) for x, _ in split.batches(run.recipe.batch_size)])


def test_image_files_are_predicted_as_in_the_test_of_the_run(photographed, tmp_path, bisam):
    test = load_data(photographed.recipe, MACHINE).test
    wanted = probabilities(photographed, test, 2, 3)
    code, _, err = bisam("predict", photographed.folder, *test.paths, "--which", "last", "--to", tmp_path / "a.csv")
    assert (code, err) == (0, "")
    found = rows((tmp_path / "a.csv").read_text())
    assert [row["file"] for row in found] == list(test.paths)
    assert [row["label"] for row in found] == [("blue", "red")[k] for k in wanted.argmax(1).tolist()]
    assert [float(row["probability"]) for row in found] == pytest.approx(wanted.amax(1).tolist(), abs=1e-5)
    assert [path.name for path in tmp_path.iterdir()] == ["a.csv"]


def test_digits_are_grey_and_resized(digits, tmp_path, bisam):
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    for i in range(40):
        pixels = (images[i].reshape(8, 8) / 16 * 255).round().astype(np.uint8)
        image = Image.fromarray(pixels).convert("RGB" if i % 2 else "L")
        (image.resize((16, 16)) if i > 35 else image).save(tmp_path / f"{i:02}.png")
    code, out, err = bisam("predict", digits.folder, tmp_path, "--top", 3)
    assert (code, err) == (0, "")
    found = rows(out)
    assert list(found[0]) == ["file", "label", "probability", "label_2", "probability_2", "label_3", "probability_3"]
    assert [Path(row["file"]).name for row in found] == [f"{i:02}.png" for i in range(40)]
    right = np.mean([row["label"] == str(label) for row, label in zip(found, labels[:40], strict=True)])
    assert right >= result_of(digits)["test_last"] - 0.1
    assert all(row["label"] != row["label_2"] != row["label_3"] for row in found)
    assert all(float(row["probability"]) >= float(row["probability_2"]) >= float(row["probability_3"]) for row in found)


@pytest.mark.slow
@pytest.mark.parametrize("dataset", ["cifar10", "cifar10:16", "cifar10:64"])
def test_files_of_cifar_are_prepared_as_its_test_images(dataset, data: Path, tmp_path):
    from torchvision.datasets import CIFAR10

    machine = Machine(data_dir=data, log=())
    recipe = Recipe(dataset=dataset, model="resnet8", method="sgd", epochs=1, limit=64, batch_size=32)
    run = finished(tmp_path, recipe, machine)
    images = torch.from_numpy(CIFAR10(str(data), train=False).data[:20]).movedim(3, 1)
    for i, image in enumerate(smaller(images, 16) if dataset == "cifar10:16" else images):
        Image.fromarray(image.movedim(0, 2).numpy()).save(tmp_path / f"{i}.png")
    paths = [tmp_path / f"{i}.png" for i in range(20)]
    loaded = load(str(run.folder), data, "last")
    found = [one.probabilities[0] for one in predict_images(loaded, paths, machine, 1)]
    split = load_data(recipe, machine).test.first(20)
    assert found == pytest.approx(probabilities(run, split, 10, 3).amax(1).tolist(), abs=1e-5)
    assert preparation(recipe, machine).side == (64 if dataset == "cifar10:64" else None)


def test_a_file_that_cannot_be_read_is_named_and_the_others_are_predicted(photographed, photographs, tmp_path, bisam):
    good = sorted((photographs / "red").iterdir())[:3]
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(next((photographs / "blue").glob("*.jpg")).read_bytes()[:200])
    code, out, err = bisam("predict", photographed.folder, good[0], bad, good[1], cut, good[2])
    assert code == 1
    assert [row["file"] for row in rows(out)] == [str(path) for path in good]
    assert [line.split(" cannot be read")[0] for line in err.splitlines()] == [f"bisam: {bad}", f"bisam: {cut}"]
    code, out, err = bisam("predict", photographed.folder, bad, "--to", tmp_path / "a.csv")
    assert code == 1
    assert "a.csv: 0 images, 1 could not be read" in out
    assert (tmp_path / "a.csv").read_text() == "file,label,probability\n"


def test_without_the_data_set_labels_are_numbers(photographed, photographs, tmp_path, bisam):
    moved = tmp_path / "moved"
    shutil.copytree(photographed.folder, moved)
    text = (moved / "recipe.json").read_text().replace(str(photographs), "/nowhere")
    (moved / "recipe.json").write_text(text)
    folder = tmp_path / "model"
    assert bisam("export", photographed.folder, "--to", folder)[0] == 0
    (folder / "recipe.json").write_text(text)
    code, out, err = bisam("predict", folder, photographs / "red")
    assert code == 0
    assert {row["label"] for row in rows(out)} <= {"0", "1"}
    assert err.startswith("bisam: labels are numbers of classes: /nowhere cannot be read")


@pytest.mark.parametrize("task", ["cola", "rte"])
def test_texts_are_predicted_as_in_the_test_of_the_run(task, texts, root, tmp_path, bisam):
    from bisam.experiments.data.glue import TASKS

    machine, run, one = replace(MACHINE, data_dir=root), texts[task], TASKS[task]
    lines = (root / "glue" / one.folder / "dev.tsv").read_text().splitlines()
    cells = [line.split("\t") for line in lines]
    sentences = [(row[3],) for row in cells] if task == "cola" else [tuple(row[1:3]) for row in cells[1:]]
    test = load_data(run.recipe, machine).test
    wanted = probabilities(run, test, 2, 3, root)
    (tmp_path / "a.txt").write_text("\n" + "\n\n".join("\t".join(pair) for pair in sentences) + "\n")
    with open(tmp_path / "a.csv", "w", newline="") as file:
        csv.writer(file).writerows([["id", *one.texts], *([i, *pair] for i, pair in enumerate(sentences))])
    for name, step in (("a.txt", 2), ("a.csv", 1)):
        code, out, err = bisam("predict", run.folder, tmp_path / name, "--which", "last", "--data-dir", root)
        assert (code, err) == (0, "")
        found = rows(out)
        assert [row["line"] for row in found] == [str(2 + step * i) for i in range(len(sentences))]
        assert [row["label"] for row in found] == [one.labels[k] for k in wanted.argmax(1).tolist()]
        assert [float(row["probability"]) for row in found] == pytest.approx(wanted.amax(1).tolist(), abs=1e-5)


def test_columns_of_texts(texts, root, tmp_path, bisam):
    path = tmp_path / "a.csv"
    path.write_text('review,stars\n"he said, not",1\nthe,2\n')
    cola, rte = texts["cola"].folder, texts["rte"].folder
    code, out, _ = bisam("predict", cola, path, "--column", "review", "--data-dir", root)
    assert code == 0
    assert [row["line"] for row in rows(out)] == ["2", "3"]
    assert bisam("predict", rte, path, "--column", "review", "--column", "stars", "--data-dir", root)[0] == 0
    (tmp_path / "odd.csv").write_text("sentence1,sentence2\na,b\nc\n")
    (tmp_path / "odd.txt").write_text("a\tb\nc\n")
    for name, line in (("odd.csv", 3), ("odd.txt", 2)):
        code, out, err = bisam("predict", rte, tmp_path / name, "--data-dir", root)
        assert (code, len(rows(out))) == (1, 1)
        assert f"{name}, line {line}: " in err
    (tmp_path / "latin.txt").write_bytes(b"\xff")
    for given, message in [
        ((cola, path), "has no column sentence: name the text's with --column, one of review, stars"),
        ((rte, path, "--column", "review"), "--column is given 1 times, and rte has 2 texts"),
        ((cola, tmp_path / "odd.txt", "--column", "a"), "odd.txt has lines and no columns: leave --column out"),
        ((cola, tmp_path / "a.png"), "the model takes texts: give a .txt with a text in each line, or a .csv"),
        ((cola, tmp_path / "none.txt"), "none.txt cannot be read (No such file or directory)"),
        ((cola, tmp_path / "latin.txt"), "latin.txt cannot be read ("),
    ]:
        code, out, err = bisam("predict", *given, "--data-dir", root)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert message in err


def test_what_cannot_be_predicted_is_one_line(digits, tmp_path, bisam):
    (tmp_path / "empty").mkdir()
    for given, message in [
        ((digits.folder, tmp_path / "none.png"), "none.png does not exist: give image files, or folders of them"),
        ((digits.folder, tmp_path / "empty"), "empty has no images (.jpg, .jpeg, "),
        ((digits.folder, tmp_path / "empty", "--top", 11), "--top must be from 1 to 10, the classes of the model"),
        ((digits.folder, tmp_path / "empty", "--top", 0), "--top must be from 1 to 10"),
        ((digits.folder, tmp_path / "empty", "--column", "a"), "--column is one of a file of texts"),
        ((digits.folder, tmp_path / "empty", "--to", tmp_path), "is a folder: give a file, such as"),
        ((digits.folder,), "FILES"),
    ]:
        code, out, err = bisam("predict", *given)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert message in err


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="pipes of POSIX")
def test_a_reader_that_has_enough_is_no_error(digits, tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    program = [sys.executable, "-m", "bisam", "predict", str(digits.folder), *[str(tmp_path / "a.png")] * 400]
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == ""


def test_the_names_of_classes_are_those_of_the_data(photographs, tmp_path, data: Path):
    assert class_names(f"folder:{photographs}", photographs, tmp_path) == ["blue", "red"]
    shutil.copytree(photographs, tmp_path / "parts" / "train")
    assert class_names("folder:parts", tmp_path / "parts", tmp_path) == ["blue", "red"]
    assert class_names("glue:rte", tmp_path, tmp_path) == ["entailment", "not_entailment"]
    if (data / "cifar-10-batches-py").is_dir():
        assert class_names("cifar10", data, data)[3] == "cat"
