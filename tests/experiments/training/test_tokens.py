"""Runs whose targets are tokens: the model, the scores, the sums of an epoch, and what a run writes."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from bisam import SharpnessAware
from bisam.experiments import data
from bisam.experiments.data.splits import IGNORED
from bisam.experiments.models.build import build
from bisam.experiments.models.gpt import GPT, rotated
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs.folder import Run
from bisam.experiments.runs.machine import Machine
from bisam.experiments.training.epoch import predict
from bisam.experiments.training.metrics import TrainingSums, log_likelihoods, ranked, scores
from bisam.experiments.training.train import train

SMALL = Recipe(
    dataset="text:addition",
    model="gpt",
    method="bisam_log",
    rho=0.1,
    train_examples=40,
    limit=50,
    batch_size=16,
    epochs=2,
    optimizer="adamw",
    learning_rate=3e-3,
    clip=1.0,
)
METRICS = ("exact_match", "accuracy", "likelihood")


# The model


def test_a_position_sees_no_later_one():
    torch.manual_seed(0)
    model = GPT(11, width=16, depth=2, heads=2).double()
    tokens = torch.randint(11, (3, 7))
    changed = tokens.clone()
    changed[:, 4:] = (changed[:, 4:] + 1) % 11
    here, there = model(tokens), model(changed)
    assert here.shape == (3, 11, 7)
    torch.testing.assert_close(here[..., :4], there[..., :4], rtol=0, atol=1e-12)
    assert ((here[..., 4:] - there[..., 4:]).abs().amax(1) > 1e-3).all()
    earlier = tokens.roll(1, 1)
    assert (model(earlier)[..., -1] - here[..., -1]).abs().max() > 1e-4  # positions matter


def test_rotary_products_depend_on_the_distance_alone():
    torch.manual_seed(0)
    q, k = (torch.randn(1, 8, dtype=torch.double).expand(6, 8) for _ in range(2))
    products = rotated(q) @ rotated(k).T
    for distance in range(6):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-6)
    assert products[0].unique().numel() == 6
    torch.testing.assert_close(rotated(q).norm(dim=1), q.norm(dim=1), rtol=0, atol=1e-6)


def test_the_size_of_the_network_is_as_stated():
    assert sum(p.numel() for p in build("gpt", 12).parameters()) == 2 * 12 * 96 + 3 * 110_784 + 96


# Scores


def slow(logits, labels):
    """Exact match, accuracy and likelihood, a token at a time."""
    right, matches, logs = [], [], []
    for row, wanted in zip(logits, labels, strict=True):
        found = [
            (int(row[:, t].argmax()) == y, float(row[:, t].log_softmax(0)[y]))
            for t, y in enumerate(wanted)
            if y != IGNORED
        ]
        right += [hit for hit, _ in found]
        logs += [log for _, log in found]
        matches.append(all(hit for hit, _ in found))
    return [sum(matches) / len(matches), sum(right) / len(right), math.exp(sum(logs) / len(logs))]


def test_scores_of_tokens():
    torch.manual_seed(0)
    logits = 3 * torch.randn(30, 4, 3)
    labels = torch.where(torch.rand(30, 3) < 0.7, logits.argmax(1), torch.randint(4, (30, 3)))
    labels[::3, 1] = IGNORED
    found = scores(METRICS, ranked(logits, METRICS), labels, 4, log_likelihoods(logits, labels, METRICS))
    expected = slow(logits, labels.tolist())
    assert found == pytest.approx(expected, abs=1e-6)
    assert 0.1 < found[0] < found[1] < 0.95
    assert log_likelihoods(logits, labels, ("accuracy",)) is None
    row, one = torch.randn(5, 4), torch.randint(4, (5,))  # of classes too
    known = log_likelihoods(row, one, ("likelihood",))
    assert scores(("likelihood",), ranked(row, ()), one, 4, known) == pytest.approx(
        [float((-F.cross_entropy(row, one)).exp())]
    )


def test_an_exact_match_is_what_greedy_generation_gives():
    torch.manual_seed(0)
    splits = data.load(SMALL, Machine())
    model = build("gpt", splits.classes).eval()
    part = splits.test
    generated = part.tokens[:, :6]
    with torch.no_grad():
        for _ in range(3):
            generated = torch.cat([generated, model(generated)[..., -1].argmax(1, keepdim=True)], 1)
    tokens, labels = part.tokens.clone(), part.labels.clone()
    tokens[::2, 6:], labels[::2, 5:] = generated[::2, 6:8], generated[::2, 6:]  # answers that the model gives
    labels[4, -1] = (labels[4, -1] + 1) % 12  # but for its last token
    split = type(part)(tokens, labels)
    wanted = torch.cat([tokens[:, :6], labels[:, 5:]], 1)
    with torch.no_grad():
        predicted, counted, likelihoods = predict(model, split, SMALL, METRICS)
    found = scores(METRICS, predicted, counted, splits.classes, likelihoods)
    assert found[0] == (generated == wanted).all(1).float().mean()
    assert 0.4 < found[0] < 0.6


# An epoch


def test_an_epoch_counts_labels_and_not_positions():
    torch.manual_seed(0)
    splits = data.load(SMALL, Machine())
    model = build("gpt", splits.classes)
    sharp = SharpnessAware(model, SMALL.build_method(), torch.nn.CrossEntropyLoss(reduction="none"))
    sums = TrainingSums(torch.device("cpu"))
    logits, labels = [], []
    for x, y in splits.train.batches(15):
        with torch.no_grad():
            logits.append(model(x))
        labels.append(y)
        sharp(x, y)
        sums.add(sharp.clean, sharp.clean.outputs, y)
    z, y = torch.cat(logits), torch.cat(labels)
    fabric = SimpleNamespace(device="cpu", all_reduce=lambda t, reduce_op: t)
    row = sums.row(fabric, gradients=80, forwards=0)
    assert row["train_loss"] == pytest.approx(float(F.cross_entropy(z, y)), rel=1e-5)
    assert row["train_accuracy"] == pytest.approx(((z.argmax(1) == y).sum() / (3 * 40)).item())
    assert row["gradients"] == 2
    assert row["flipped"] == 0
    assert sums.totals() == pytest.approx((float(F.cross_entropy(z, y)) * 120, 120))


def test_a_run_of_tokens(tmp_path):
    rows = []
    run = Run.under(tmp_path, SMALL)
    result = train(run, Machine(), on_epoch=rows.append)
    assert (result["metric"], result["labels"], result["examples"]) == ("exact_match", 120, 40)
    assert set(result["scores"]["last"]) == set(METRICS)
    assert result["test_last"] == result["scores"]["last"]["exact_match"]
    assert rows[1]["train_loss"] < rows[0]["train_loss"] < math.log(12) + 0.5
    assert rows[0]["gradients"] == 2
    assert 0.05 < result["scores"]["last"]["likelihood"] < 1
    assert Run.under(tmp_path, SMALL).result == result


def test_measurements_of_classes_are_refused(tmp_path):
    recipe = replace(SMALL, measured_epochs=1)
    with pytest.raises(ValueError, match="measured_epochs 1 measure the error of one class for each example"):
        train(Run.under(tmp_path, recipe), Machine())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run."""
    run = Run.under(tmp_path_factory.mktemp("tokens"), replace(SMALL, epochs=1))
    train(run, Machine())
    return run


def test_an_exported_folder_says_that_it_takes_tokens(tmp_path, trained, bisam):
    assert bisam("export", trained.folder, "--to", tmp_path / "model")[0] == 0
    card = (tmp_path / "model" / "README.md").read_text()
    assert "pipeline_tag: text-generation" in card
    assert "It takes tokens (N, T), the places of characters in `bisam.experiments.data.language.SYMBOLS`" in card
    assert "image" not in card


@pytest.mark.slow  # torch.export takes seconds
def test_an_exported_program_takes_tokens_of_any_length(tmp_path, trained, bisam):
    assert bisam("export", trained.folder, "--to", tmp_path / "model.pt2")[0] == 0
    program = torch.export.load(tmp_path / "model.pt2").module()
    tokens = torch.randint(12, (3, 20))
    assert program(tokens).shape == (3, 12, 20)
    torch.testing.assert_close(program(tokens)[..., :5], program(tokens[:, :5]), atol=1e-5, rtol=1e-4)


def test_commands_for_classifiers_refuse_a_run_of_tokens(tmp_path, trained, bisam):
    run = trained
    image = tmp_path / "a.png"
    image.write_bytes(b"")
    for command, said in (
        (("evaluate", run.folder), "text:addition has tokens, and these measures are those of one class"),
        (("predict", run.folder, image), "predicts the next token, and this command classifies images and texts"),
    ):
        code, _, err = bisam(*command)
        assert (code, err.count("\n")) == (2, 1)
        assert said in err


@pytest.mark.parametrize(
    ("model", "dataset", "said"),
    [
        ("convnet", "text:addition", "model 'convnet' does not accept the tokens of text:addition, 8"),
        ("gpt", "digits", "model 'gpt' does not accept the images of digits"),
    ],
)
def test_a_model_for_other_data_is_refused(tmp_path, model, dataset, said):
    recipe = Recipe(dataset=dataset, model=model, epochs=1)
    with pytest.raises(ValueError, match=said):
        train(Run.under(tmp_path, recipe), Machine())
