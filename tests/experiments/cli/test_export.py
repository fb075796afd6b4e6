"""`bisam export`: files and folders that other programs read, each with the outputs of the run's model."""

from __future__ import annotations

import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")

from bisam.experiments import data
from bisam.experiments.data.image_tensors import channels
from bisam.experiments.models.build import build
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs import files
from bisam.experiments.runs.folder import Run
from bisam.experiments.runs.machine import Machine
from bisam.experiments.training.train import train
from bisam.experiments.training.trained import network, result_of, weights
from tests.experiments.data.test_glue import WORDS, classic

MACHINE = Machine(log=())
RECIPE = Recipe(method="bisam_log", epochs=2, batch_size=32, limit=96, ema=0.5)
TIMM = Recipe(model="timm:test_efficientnet", method="sam", epochs=1, batch_size=16, limit=32)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[str, Run]:
    root = tmp_path_factory.mktemp("trained")
    runs = {recipe.model: Run.under(root, recipe) for recipe in (RECIPE, TIMM)}
    for run in runs.values():
        train(run, MACHINE)
    return runs


@pytest.fixture
def run(trained) -> Run:
    return trained["convnet"]


def images(run: Run) -> torch.Tensor:
    return next(iter(data.load(run.recipe, MACHINE).test.batches(5)))[0]


def model_of(run: Run, which: str) -> torch.nn.Module:
    state = weights(run, result_of(run), which)
    return network(run, state, 10, 1, None).eval()


@pytest.mark.parametrize("which", ["best", "last", "ema"])
@pytest.mark.parametrize("name", ["a.safetensors", "a.pt", "a.pth"])
def test_a_state_dict_is_that_of_the_run(name, which, run, tmp_path, bisam):
    code, out, _ = bisam("export", run.folder, "--to", tmp_path / name, "--which", which)
    assert code == 0
    assert str(tmp_path / name) in out
    if name.endswith(".safetensors"):
        found = pytest.importorskip("safetensors.torch").load_file(tmp_path / name)
    else:
        found = torch.load(tmp_path / name, weights_only=True)
    wanted = weights(run, result_of(run), which)
    assert list(found) == list(wanted) or set(found) == set(wanted)
    assert all(torch.equal(found[key], value) for key, value in wanted.items())
    plain = build("convnet", 10, channels=1, weights=str(tmp_path / name), new_head=False).eval()  # as --weights does
    x = images(run)
    assert torch.equal(plain(x), model_of(run, which)(x))
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt", "a.pt2", "folder"])
def test_a_full_disk_is_one_line_and_leaves_nothing(name, run, tmp_path, bisam, monkeypatch):
    """Torch's own writer of files raises no error of the system, or ends the process."""

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    monkeypatch.setattr(files, "_sync_folder", lambda _: None)
    code, out, err = bisam("export", run.folder, "--to", tmp_path / name)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "No space left on device. Free space, or write elsewhere (--out or --to)" in err
    assert list(tmp_path.iterdir()) == []


def test_safetensors_say_what_they_are(run, tmp_path, bisam):
    safetensors = pytest.importorskip("safetensors")
    _, out, _ = bisam("export", run.folder, "--to", tmp_path / "a.safetensors")
    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as file:
        facts = json.loads(file.metadata()["bisam"])
    result = result_of(run)
    assert Recipe.from_dict(facts["recipe"]) == RECIPE
    assert facts["weights"] == result["headline"] == "last"  # validation is small
    assert facts["scores"] == {"accuracy": result["test_last"]}
    assert f"weights of the last epoch, accuracy {result['test_last']:.4f}" in " ".join(out.split())


@pytest.mark.parametrize("size", [1, 5])
def test_a_program_needs_no_code_of_the_model(size, run, tmp_path, bisam):
    assert bisam("export", run.folder, "--to", tmp_path / "a.pt2")[0] == 0
    program = torch.export.load(tmp_path / "a.pt2").module()
    x = images(run)[:size]
    torch.testing.assert_close(program(x), model_of(run, "last")(x), rtol=1e-5, atol=1e-6)


def test_onnx(run, tmp_path, bisam):
    reference = pytest.importorskip("onnx.reference")
    pytest.importorskip("onnxscript")
    assert bisam("export", run.folder, "--to", tmp_path / "a.onnx")[0] == 0
    session = reference.ReferenceEvaluator(str(tmp_path / "a.onnx"))
    x = images(run)
    (found,) = session.run(None, {session.input_names[0]: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model_of(run, "last")(x), rtol=1e-4, atol=1e-5)
    assert [path.name for path in tmp_path.iterdir()] == ["a.onnx"]


def code_of(folder: Path) -> dict:
    """What the code on the model card leaves behind."""
    card = (folder / "README.md").read_text()
    found: dict = {}
    exec(card.split("```python\n")[1].split("```")[0], found)
    return found


@pytest.mark.parametrize("name", ["convnet", "timm:test_efficientnet"])
def test_the_code_of_the_card_loads_the_folder(name, trained, tmp_path, bisam):
    run, folder = trained[name], tmp_path / "exported"
    folder.mkdir()
    assert bisam("export", run.folder, "--to", folder)[0] == 0
    model, x = code_of(folder)["model"].eval(), images(run)
    assert torch.equal(model(x), model_of(run, "last")(x))
    assert Recipe.from_dict(json.loads((folder / "recipe.json").read_text())) == run.recipe
    card = (folder / "README.md").read_text()
    assert f"* method: {run.recipe.method}\n* rho: 0.05" in card
    assert f"* test accuracy {result_of(run)['test_last']:.4f}" in card
    assert [path.name for path in tmp_path.iterdir()] == ["exported"]


def test_timm_reads_the_file_too(trained, tmp_path, bisam):
    timm = pytest.importorskip("timm")
    run = trained["timm:test_efficientnet"]
    assert bisam("export", run.folder, "--to", tmp_path / "a.safetensors")[0] == 0
    model = timm.create_model(
        "test_efficientnet", num_classes=10, in_chans=1, checkpoint_path=str(tmp_path / "a.safetensors")
    )
    x = images(run)
    assert torch.equal(model.eval()(x), model_of(run, "last")(x))


@pytest.mark.parametrize("frozen", [None, 1])
def test_transformers_reads_the_folder(frozen, tmp_path, bisam):
    transformers = pytest.importorskip("transformers")
    classic(tmp_path, "sst2")
    folder = tmp_path / "weights" / "tiny"
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BertConfig(vocab_size=len(WORDS), max_position_embeddings=64, **sizes)
    transformers.BertModel(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizerFast"}))
    recipe = Recipe(
        dataset="glue:sst2", model="hf:tiny", weights="pretrained", frozen=frozen, method="sam", epochs=1, batch_size=4
    )
    machine = replace(MACHINE, data_dir=tmp_path)
    run = Run.under(tmp_path / "runs", recipe)
    train(run, machine)
    code, _, err = bisam("export", run.folder, "--to", tmp_path / "exported", "--data-dir", tmp_path)
    assert code == 0, err
    found = code_of(tmp_path / "exported")
    inputs = found["tokenizer"](["a good film", "bad"], return_tensors="pt", padding=True)
    model = network(run, weights(run, result_of(run), "last"), 2, 3, tmp_path).eval()
    assert torch.equal(found["model"].eval()(**inputs).logits, model(inputs))
    code, _, err = bisam("export", run.folder, "--to", tmp_path / "a.onnx", "--data-dir", tmp_path)
    assert code == 2
    assert "export a model of texts to a folder" in " ".join(err.split())
    assert not (tmp_path / "a.onnx").exists()


def test_channels_are_known_without_the_images():
    for recipe in (RECIPE, replace(RECIPE, model="mlp")):
        assert data.channels_of(recipe) == channels(data.load(recipe, MACHINE).test)
    assert data.channels_of(replace(RECIPE, dataset="cifar10:16")) == 3


def test_what_cannot_be_exported_is_one_line_and_leaves_nothing(run, tmp_path, bisam):
    unfinished = tmp_path / "unfinished"
    shutil.copytree(run.folder, unfinished)
    (unfinished / "result.json").unlink()
    bare = tmp_path / "bare"
    shutil.copytree(run.folder, bare)
    (bare / "checkpoint.pt").unlink()
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("mine")
    (tmp_path / "folder.pt").mkdir()
    to = tmp_path / "a.pt"
    for given, message in [
        ((tmp_path / "nowhere", "--to", to), "nowhere is no run folder, which has a recipe.json: give the folder of a"),
        ((tmp_path, "--to", to), "has 2 runs: give one, such as"),
        ((unfinished, "--to", to), "is not finished: the command that started the run resumes it"),
        ((bare, "--to", to), "has no checkpoint.pt, as copies of results without weights"),
        ((run.folder, "--to", to, "--which", "bset"), "unknown weights of a run 'bset', did you mean 'best'"),
        ((run.folder, "--to", full), "exists: give a new folder, or a file such as"),
        ((run.folder, "--to", tmp_path / "folder.pt"), "is a folder, and its name that of a file"),
        ((run.folder, "--to", tmp_path / "model.onx"), "a file ends in .safetensors, .pt, .pth, .pt2 or .onnx"),
    ]:
        code, _, err = bisam("export", *given)
        assert code == 2
        assert message in " ".join(err.split())
        assert not to.exists()
    assert [path.name for path in full.iterdir()] == ["mine.txt"]


def test_a_failure_keeps_the_earlier_file(run, tmp_path, bisam, monkeypatch):
    to = tmp_path / "a.pt"
    to.write_bytes(b"earlier")

    def fails(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fails)
    assert bisam("export", run.folder, "--to", to)[0] == 2
    assert to.read_bytes() == b"earlier"
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]
