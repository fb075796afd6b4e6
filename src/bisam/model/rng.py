"""Noise: the random state that forward passes draw from, to be put back or replayed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class RandomState:
    """The state of the random generators that a forward pass draws from: the CPU's and the parameters' devices'."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._cpu = torch.get_rng_state()
        devices = {p.device for p in parameters if p.device.type not in ("cpu", "meta")}
        self._others = [(d, torch.get_device_module(d).get_rng_state(d)) for d in devices]

    def restore(self) -> None:
        """Put the generators back."""
        torch.set_rng_state(self._cpu)
        for device, state in self._others:
            torch.get_device_module(device).set_rng_state(state, device)
