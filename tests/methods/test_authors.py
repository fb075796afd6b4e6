"""Methods against the code of their authors: the weights after ten steps of SGD on a small network.

`authors_weights.npz` has the batches, the initial weights, and the weights that the code of the repositories in its
entry `meta` has trained, at the commits that it names. The code of Bilateral SAM was mended in one place: it subtracts
the displacement behind from the saved weights themselves, so that each step begins there, which the paper does not say.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from bisam import GAM, SAGM, SAMSPS, TSAM, BilateralSAM, FocalSAM, ImbSAM, Lookbehind, SharpnessAware, cross_entropy
from bisam.perturbations import L2
from tests.support.runs import close

THEIRS = np.load(Path(__file__).with_name("authors_weights.npz"))
META = json.loads(str(THEIRS["meta"]))
METHODS: dict[str, tuple[Any, float]] = {  # with the tolerance
    "BilateralSAM": (BilateralSAM(0.1, behind=0.5), 1e-9),
    "SAGM": (SAGM(0.1, alpha=0.05), 1e-9),
    "GAM": (GAM(0.05, climb_norm=L2(0.2), beta0=0.3, beta1=0.6, gamma=0.2), 1e-9),
    "Lookbehind": (Lookbehind(0.1, steps=3, alpha=0.4), 1e-9),
    "Lookbehind-adaptive": (Lookbehind(0.1, steps=3, alpha=None), 1e-9),
    "SAMSPS": (SAMSPS(0.1, floor=0.5, gamma_b=1.5, weight_decay=0.01), 1e-6),  # they compute the step in float32
    "ImbSAM": (ImbSAM(0.1, tail=[1, 3], weight=2.0), 1e-9),
    "FocalSAM": (FocalSAM(0.1, gamma=2.0, lam=0.5, counts=[50, 20, 20, 10]), 1e-9),
    "TSAM": (TSAM(0.1, tilt=5.0, radius=0.5), 1e-6),  # they compute the weights in float32
}


@pytest.mark.parametrize("name", METHODS)
def test_the_weights_are_those_of_the_authors_code(name):
    method, tolerance = METHODS[name]
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    model.load_state_dict({key: torch.from_numpy(THEIRS[f"init/{key}"]) for key in model.state_dict()})
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0 if name == "SAMSPS" else META["lr"])
    sharp = SharpnessAware(model, method, cross_entropy)
    for step, (x, y) in enumerate(zip(THEIRS["x"], THEIRS["y"], strict=True)):
        torch.manual_seed(step)
        optimizer.zero_grad()
        sharp(torch.from_numpy(x), torch.from_numpy(y)).backward()
        optimizer.step()
    for key, value in model.state_dict().items():
        close(value, torch.from_numpy(THEIRS[f"final/{name}/{key}"]), tolerance)
        assert (value - before[key]).abs().max() > 0.01
