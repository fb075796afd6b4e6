"""Ranks that share a batch find what one process finds on the whole batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from bisam import ModelOracle, cross_entropy
from bisam.analysis import (
    average_sharpness,
    corruptions,
    feature_rank,
    flips,
    gradient_norm,
    landscape,
    margins,
    sharpness,
    zero_one_sharpness,
)
from tests.analysis.test_predictions import numbers
from tests.support import cases, ranks

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="no torch.distributed")

WHOLE = [cases.batch(0, 40), cases.batch(1, 26)]


def images() -> list[tuple[Any, Any]]:
    return [(x.sigmoid().view(-1, 1, 2, 3), y) for x, y in WHOLE]


def darker(x: Any, severity: int) -> Any:
    return x * (1 - severity / 5)


def found(oracle: ModelOracle, data: Any, pictures: Any, sharded: bool) -> dict[str, list[float]]:
    results = {
        "margins": margins(oracle, data),
        "normalized": margins(oracle, data, normalized="logits"),
        "rank": feature_rank(oracle, data),
        "gradient": gradient_norm(oracle, data),
        "sharpness": sharpness(oracle, data, 0.3, steps=8, restarts=1, normalized=True),
        "average": average_sharpness(oracle, data, 0.3, draws=3),
        "zero-one": zero_one_sharpness(oracle, data, 0.3, steps=9),
        "flips": flips(oracle, data, 0.3),
        "landscape": landscape(oracle, data, (cross_entropy, "random"), points=3),
    }
    if not sharded:
        flat = ModelOracle(nn.Sequential(nn.Flatten(), oracle.model), cross_entropy, scope="global")
        results["corruptions"] = corruptions(flat, pictures, (2, 5), kinds={"darker": darker})
        results["features"] = margins(oracle, data, normalized="features")
    return {name: numbers(result) for name, result in results.items()}


def on_a_rank(sharded: bool) -> dict[str, list[float]]:
    """This rank has every other example of each batch."""
    data, pictures = ([(x[dist.get_rank() :: 2], y[dist.get_rank() :: 2]) for x, y in of] for of in (WHOLE, images()))
    model = cases.mlp()
    oracle = ModelOracle(fully_shard(model) if sharded else model, cross_entropy, scope=None if sharded else "global")
    result = found(oracle, data, pictures, sharded)
    if sharded:
        with pytest.raises(ValueError, match="the weights are sharded over ranks"):
            margins(oracle, data, normalized="features")
    return result


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True])
def test_two_ranks_find_what_one_process_finds(sharded):
    exact = found(ModelOracle(cases.mlp(), cross_entropy), WHOLE, images(), sharded)
    for result in ranks.run(2, on_a_rank, sharded):
        assert result.keys() == exact.keys()
        for name, values in exact.items():
            assert result[name] == pytest.approx(values, rel=1e-9), name
