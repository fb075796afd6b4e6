"""`bisam export --push-to-hub`, with an object in place of the hub that records what it is asked for."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("lightning_fabric")
pytest.importorskip("huggingface_hub")

import huggingface_hub

from bisam.experiments.models.card import without_places
from bisam.experiments.models.hub import Hub
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs.folder import Run
from bisam.experiments.runs.machine import Machine
from bisam.experiments.training.train import train
from bisam.experiments.training.trained import result_of

RECIPE = Recipe(model="mlp", method="bisam_log", rho=0.1, epochs=1, batch_size=32, limit=64)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    run = Run.under(tmp_path_factory.mktemp("trained"), RECIPE)
    train(run, Machine(log=()))
    return run


@pytest.fixture
def hub(monkeypatch, tmp_path) -> SimpleNamespace:
    """Records calls, keeps a copy of what is uploaded, and fails in a function with an error of the test."""
    seen = SimpleNamespace(calls=[], files=tmp_path / "uploaded", private=True, errors={})

    class Api:
        def __getattr__(self, name):
            def call(*arguments, **named):
                seen.calls.append((name, arguments, named))
                if name in seen.errors:
                    raise seen.errors[name]
                if name == "upload_folder":
                    shutil.copytree(named["folder_path"], seen.files)
                url = "https://huggingface.co/me/digits"
                return {"create_repo": url, "model_info": SimpleNamespace(private=seen.private)}.get(name)

            return call

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return seen


def test_the_folder_is_uploaded_in_one_commit(run, hub, tmp_path, bisam):
    code, out, err = bisam("export", run.folder, "--push-to-hub", "me/digits")
    assert (code, err) == (0, "")
    assert "https://huggingface.co/me/digits: mlp on digits, weights of the last epoch" in " ".join(out.split())
    assert [name for name, _, _ in hub.calls] == ["whoami", "create_repo", "upload_folder"]
    _, arguments, named = hub.calls[1]
    assert (arguments, named) == (("me/digits",), {"private": None, "exist_ok": True})
    assert hub.calls[2][2]["repo_id"] == "me/digits"
    assert not Path(hub.calls[2][2]["folder_path"]).exists()
    assert {path.name for path in hub.files.iterdir()} == {"README.md", "recipe.json", "model.safetensors"}
    assert Recipe.from_dict(json.loads((hub.files / "recipe.json").read_text())) == RECIPE
    card, result = (hub.files / "README.md").read_text(), result_of(run)
    for line in (
        "library_name: pytorch",
        "pipeline_tag: image-classification",
        "* method: bisam_log",
        "* rho: 0.1",
        "* dataset: digits",
        f"* expression: `{RECIPE.expression}`",
        f"* test accuracy {result['test_last']:.4f}",
        f"bisam {result['bisam']}, commit {result['commit']}, torch {result['torch']}",
        'load_file(hf_hub_download("me/digits", "model.safetensors"))',
    ):
        assert line in card


def test_a_private_repository_is_private_or_nothing_is_uploaded(run, hub, bisam):
    assert bisam("export", run.folder, "--push-to-hub", "me/digits", "--private")[0] == 0
    assert hub.calls[1][2] == {"private": True, "exist_ok": True}
    hub.calls.clear()
    hub.private = False
    code, _, err = bisam("export", run.folder, "--push-to-hub", "me/digits", "--private")
    assert code == 2
    assert "me/digits exists and is public: nothing was uploaded" in err
    assert [name for name, _, _ in hub.calls] == ["whoami", "create_repo", "model_info"]


def test_a_folder_can_be_written_too(run, hub, tmp_path, bisam):
    code, out, _ = bisam("export", run.folder, "--push-to-hub", "me/digits", "--to", tmp_path / "here")
    assert code == 0
    assert str(tmp_path / "here") in out
    assert 'load_file("' + str(tmp_path / "here") in (tmp_path / "here" / "README.md").read_text()


@pytest.mark.parametrize("function", ["whoami", "create_repo", "upload_folder"])
@pytest.mark.parametrize(
    "error",
    [
        huggingface_hub.errors.LocalTokenNotFoundError("Token is required, but no token found.\nTo log in, run ..."),
        OSError(101, "Network is unreachable"),
        RuntimeError(""),
    ],
    ids=["token", "network", "silent"],
)
def test_without_a_token_or_a_network_it_is_one_line(function, error, run, hub, bisam):
    hub.errors[function] = error
    code, out, err = bisam("export", run.folder, "--push-to-hub", "me/digits")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "me/digits cannot be pushed to the hub (" in err
    assert "log in with `hf auth login` or set HF_TOKEN" in err
    assert hub.calls[-1][0] == function


def test_what_is_no_request_is_one_line_and_asks_the_hub_nothing(run, hub, tmp_path, bisam):
    for given, message in [
        ((), "nowhere to write: give --to, such as --to model.safetensors, or --push-to-hub USER/NAME"),
        (("--push-to-hub", "digits"), "--push-to-hub digits is no name of a repository: write it as USER/NAME"),
        (("--push-to-hub", "a/b/c"), "is no name of a repository"),
        (("--push-to-hub", "me/d", "--to", tmp_path / "a.pt"), "the hub gets a folder: leave --to"),
        (("--private", "--to", tmp_path / "a.pt"), "--private is a property of a repository on the hub"),
        (("--push-to-hub", "me/d", "--which", "ema"), "has no average of the weights (--ema)"),
    ]:
        code, _, err = bisam("export", run.folder, *given)
        assert (code, err.count("\n")) == (2, 1)
        assert message in " ".join(err.split())
        assert hub.calls == []
    assert list(tmp_path.iterdir()) == []


def test_without_the_package_it_is_one_line(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"needs huggingface_hub: pip install 'bisam\[hub\]'"):
        Hub("me/digits")


def test_folders_of_this_machine_are_not_published():
    recipe = Recipe(
        dataset="folder:/home/me/flowers", model="hf:~/models/small", weights="/home/me/w.pt@0123456789abcdef"
    )
    shown = without_places(recipe)
    assert (shown["dataset"], shown["model"], shown["weights"]) == (
        "folder:flowers",
        "hf:small",
        "w.pt@0123456789abcdef",
    )
    for unchanged in (RECIPE, replace(RECIPE, weights="runs/a:best@0123456789abcdef", dataset="cifar10:16")):
        assert without_places(unchanged) == unchanged.to_dict()
