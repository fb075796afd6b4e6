"""Whole training runs of the public implementations (davda54/sam, the BiSAM authors' code) in float64, to 1e-9."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from bisam import NegLog, SharpnessAware, Tanh
from bisam.methods import SAM
from bisam.perturbations import L2, Adaptive

BOUNDS = {"ce": None, "log": NegLog(1.0), "tanh10": Tanh(10.0, 0.1), "tanh1": Tanh(1.0, 0.1)}


def net(classes: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, classes),
    ).double()


GOLDEN = np.load(Path(__file__).with_name("golden_trajectories.npz"))
META = json.loads(str(GOLDEN["meta"]))


@pytest.mark.parametrize("name", META["methods"])
def test_trajectory_of_the_public_implementation(name):
    case = META["methods"][name]
    model = net(META["classes"])
    model.load_state_dict({k[5:]: torch.from_numpy(GOLDEN[k]) for k in GOLDEN.files if k.startswith("init/")})
    perturb = Adaptive(case["rho"]) if case["adaptive"] else L2(case["rho"])
    spread = 0.1 * META["classes"] / (META["classes"] - 1)
    sharp = SharpnessAware(
        model,
        SAM(perturb, ascent=BOUNDS[case["ascent"]]),
        loss=nn.CrossEntropyLoss(label_smoothing=spread, reduction="none"),
    )
    assert META["optimizer"] == "SGD"
    optimizer = torch.optim.SGD(model.parameters(), **META["optimizer_kwargs"])

    for x, y in zip(GOLDEN["x"], GOLDEN["y"], strict=True):
        sharp(torch.from_numpy(x), torch.from_numpy(y)).backward()
        optimizer.step()
        optimizer.zero_grad()

    final = {k.removeprefix(f"final/{name}/"): GOLDEN[k] for k in GOLDEN.files if k.startswith(f"final/{name}/")}
    assert final.keys() == model.state_dict().keys()
    for key, value in model.state_dict().items():
        if not key.endswith("num_batches_tracked"):  # the public helper counts both passes
            torch.testing.assert_close(value, torch.from_numpy(final[key]), rtol=0, atol=1e-9, msg=key)
    assert model[1].num_batches_tracked == META["steps"]
