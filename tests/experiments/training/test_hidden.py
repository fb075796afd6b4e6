"""Runs with frozen layers: their states are computed once, and the run is the same as if they ran in each step."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("datasets")
pytest.importorskip("transformers")

import transformers

from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs.folder import Run
from bisam.experiments.runs.machine import Machine
from bisam.experiments.training import hidden
from bisam.experiments.training.train import train
from tests.experiments.data.test_glue import WORDS, classic

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with data and, in its folder of weights, a pretrained model."""
    root = tmp_path_factory.mktemp("root")
    classic(root, "sst2")
    folder = root / "weights" / "small"
    torch.manual_seed(3)
    config = transformers.BertConfig(vocab_size=len(WORDS), max_position_embeddings=16, **SIZES)
    transformers.BertModel(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizerFast"}))
    return root


@pytest.fixture(autouse=True)
def _forgotten():
    hidden._computed.clear()


RECIPE = Recipe(
    dataset="glue:sst2",
    model="hf:small",
    weights="pretrained",
    frozen=1,
    bucket=2,
    max_length=12,
    method="sam",
    rho=0.1,
    epochs=3,
    batch_size=4,
    optimizer="adamw",
    learning_rate=1e-2,
    label_smoothing=0.1,
    precision="64",
)


def trained(recipe: Recipe, root, place) -> tuple[Run, dict]:
    run = Run.under(place, recipe)
    return run, train(run, Machine(data_dir=root, log=()))


def rows(run: Run) -> list[dict]:
    times = {"seconds", "relative_time"}
    return [{name: value for name, value in row.items() if name not in times} for row in run.metrics()]


def test_states_that_are_computed_once_give_the_run_in_which_the_frozen_layers_run_in_each_step(
    root, tmp_path, monkeypatch
):
    once, _ = trained(RECIPE, root, tmp_path / "once")
    assert len(hidden._computed) == 3
    monkeypatch.setattr(hidden, "LARGEST", 0)
    hidden._computed.clear()
    each, _ = trained(RECIPE, root, tmp_path / "each")
    assert not hidden._computed
    for one, other in zip(rows(once), rows(each), strict=True):
        assert one == pytest.approx(other, abs=1e-9)
    a, b = (run.checkpoint()["sharp"] for run in (once, each))
    assert set(a) == set(b)
    for name, value in a.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(value, b[name], atol=1e-8, rtol=1e-8)


def test_the_next_run_has_the_states_of_the_one_before_and_other_weights_have_their_own(root, tmp_path, monkeypatch):
    trained(replace(RECIPE, epochs=1), root, tmp_path)
    calls = []
    compute = hidden.hidden_states
    monkeypatch.setattr(hidden, "hidden_states", lambda *of: calls.append(1) or compute(*of))
    trained(replace(RECIPE, epochs=1, rho=0.2), root, tmp_path)
    assert not calls
    trained(replace(RECIPE, epochs=1, frozen=2), root, tmp_path)
    assert calls
    assert len(hidden._computed) == 6


def test_frozen_weights_are_not_in_the_checkpoint_and_an_interrupted_run_resumes_to_the_same_bits(root, tmp_path):
    whole, result = trained(RECIPE, root, tmp_path / "whole")
    names = [name for name, value in whole.checkpoint()["sharp"].items() if isinstance(value, torch.Tensor)]
    assert any("layer.1." in name for name in names)
    assert not any("layer.0." in name or "word_embeddings" in name for name in names)

    class Interrupt(Exception):
        pass

    def stop(row):
        if row["epoch"] == 2:
            raise Interrupt

    run = Run.under(tmp_path / "parts", RECIPE)
    with pytest.raises(Interrupt):
        train(run, Machine(data_dir=root, log=()), stop)
    hidden._computed.clear()
    again = train(run, Machine(data_dir=root, log=()))
    assert rows(run) == rows(whole)
    assert again["scores"] == result["scores"]
    for one, other in zip(run.checkpoint()["sharp"].items(), whole.checkpoint()["sharp"].items(), strict=True):
        assert one[0] == other[0]
        assert not isinstance(one[1], torch.Tensor) or torch.equal(one[1], other[1])


def test_frozen_layers_need_weights():
    with pytest.raises(ValueError, match="frozen 1 keeps layers at random weights: give --weights, or leave it out"):
        replace(RECIPE, weights=None)


def test_a_model_that_is_nowhere_is_one_line(root, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"put it into .*/weights/absent \(or set --data-dir\)") as caught:
        trained(replace(RECIPE, model="hf:absent"), root, tmp_path)
    assert "\n" not in str(caught.value)
