"""Weights of classes for methods of long tails."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bisam import FocalSAM, ImbSAM, SharpnessAware, cross_entropy
from bisam.methods.longtail import ClassSAM, Shares, Tail
from bisam.objectives import CrossEntropy
from tests.support import cases
from tests.support.runs import close, grads_of

LABELS = torch.tensor([0, 0, 0, 1, 2, 0, 1, 0])


def test_weights_are_those_of_the_labels():
    assert Tail([2, 1], weight=2.0)(LABELS).tolist() == [0, 0, 0, 2, 2, 0, 2, 0]
    close(
        Shares(2.0, 0.5)(LABELS[3:6]), torch.full((3,), 0.5 * (2 / 3) ** 2, dtype=torch.double), 1e-12
    )  # each class a third of these
    shares = Shares(1.0, 1.0, counts=[6, 3, 1])(LABELS)
    close(shares, torch.tensor([0.4, 0.4, 0.4, 0.7, 0.9, 0.4, 0.7, 0.4], dtype=torch.double), 1e-12)


@pytest.mark.parametrize("ignore_index", [-100, 255])
@pytest.mark.parametrize("counts", [None, [4, 3, 2, 1]])
def test_ignored_labels_count_in_neither_part(counts, ignore_index):
    model, (x, y), loss = cases.mlp(), cases.batch(), CrossEntropy(ignore_index)
    method = FocalSAM(0.1, counts=counts)
    kept = grads_of(SharpnessAware(model, method, loss)(x[:6], y[:6]), model)
    ignored = grads_of(
        SharpnessAware(model, method, loss)(x, torch.cat([y[:6], y.new_full((2,), ignore_index)])), model
    )
    close(ignored, kept, 1e-12)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 1.5, 2.0])
def test_more_ignored_labels_than_others_leave_the_loss_finite(gamma):
    model, (x, y) = cases.mlp(), cases.batch()
    sharp = SharpnessAware(model, FocalSAM(0.1, gamma), cross_entropy)
    kept = sharp(x[:2], y[:2])
    close(sharp(x, torch.cat([y[:2], y.new_full((len(x) - 2,), -100)])), kept, 1e-12)


def test_shares_of_a_map_of_labels_need_no_table_of_pairs():
    labels = torch.arange(2).repeat(4, 100_000).transpose(0, 1)  # a table of pairs would have 6.4e11 entries
    close(Shares()(labels), torch.full(labels.shape, 0.5, dtype=torch.double), 1e-12)


def test_the_reported_loss_is_the_sum_of_both_parts():
    model, (x, y) = cases.mlp(), cases.batch()
    sharp = SharpnessAware(model, ImbSAM(1e-9, tail=[0, 2]), cross_entropy)
    close(sharp(x, y), cross_entropy(model(x), y).mean(), 1e-7)
    close(sharp.clean.value, cross_entropy(model(x), y).mean().detach(), 1e-12)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ImbSAM(0.1, tail=[]), ValueError, r"tail must be a list of classes, as in \[7, 8, 9\], got \[\]"),
        (lambda: ImbSAM(0.1, tail="ab"), ValueError, "tail must be a list of classes"),
        (lambda: ImbSAM(0.1, tail=[-1]), ValueError, "a class of tail must be at least 0, got -1"),
        (lambda: ImbSAM(0.1, tail=[1.5]), TypeError, "a class of tail must be an int, got 1.5"),
        (lambda: ImbSAM(0.1, tail=[1], weight=-1.0), ValueError, "weight must be .*-1.0"),
        (lambda: ImbSAM("a", tail=[1]), TypeError, "perturb must be a radius"),
        (lambda: FocalSAM(gamma=-1.0), ValueError, "gamma must be .*-1.0"),
        (lambda: FocalSAM(lam=None), TypeError, "lam must be a number"),
        (lambda: FocalSAM(counts=[1, -2]), ValueError, "the count of class 1 must be .*-2"),
        (lambda: FocalSAM(counts=[0, 0]), ValueError, "counts must be the numbers of examples"),
        (lambda: FocalSAM(counts={0: 4, 1: 2}), ValueError, "counts must be numbers in a list.*got {0: 4, 1: 2}"),
        (lambda: FocalSAM(counts=3), ValueError, "counts must be numbers in a list.*got 3"),
        (lambda: FocalSAM(counts=torch.tensor([4, 2])), TypeError, r"counts.tolist\(\)"),
        (lambda: ClassSAM(weight=3), TypeError, "weight must be a function from labels"),
        (lambda: ClassSAM(weight=Tail([1]), plain=3), TypeError, "plain must be a function from labels"),
    ],
)
def test_wrong_arguments_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_what_has_no_weights_is_refused():
    model, (x, y) = cases.mlp(), cases.batch()
    with pytest.raises(TypeError, match="weights of classes need class labels"):
        SharpnessAware(model, ImbSAM(0.1, tail=[1]), cross_entropy)(x, torch.softmax(model(x), 1).detach())
    with pytest.raises(TypeError, match=r'one loss for each of the labels \(8,\), got \(\): .*reduction="none"'):
        SharpnessAware(model, ImbSAM(0.1, tail=[1]), nn.CrossEntropyLoss())(x, y)
    with pytest.raises(ValueError, match="there are counts of 2 classes, and a label is 3"):
        SharpnessAware(model, FocalSAM(counts=[1, 2]), cross_entropy)(x, torch.full_like(y, 3))
