"""RNG: the state of the random generators that forward passes draw from, to be put back, replayed or replaced."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from hashlib import blake2b

import torch
from torch import Tensor

from bisam.evaluation import Batch


class RandomState:
    """The present state of the random generators that a forward pass draws from, on the CPU and the devices in use.

    Args:
        parameters: the parameters of the model.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._cpu = torch.get_rng_state()
        devices = {p.device for p in parameters if p.device.type not in ("cpu", "meta")}
        self._others = [(d, torch.get_device_module(d).get_rng_state(d)) for d in devices]

    @property
    def tensors(self) -> list[Tensor]:
        """The states of the generators, the CPU's first."""
        return [self._cpu, *(state for _, state in self._others)]

    def restore(self) -> None:
        """Put the generators back."""
        torch.set_rng_state(self._cpu)
        for device, state in self._others:
            torch.get_device_module(device).set_rng_state(state, device)

    @contextmanager
    def forked(self, *key: int) -> Generator[None]:
        """Draw from a stream that `key` seeds, and put the generators back afterwards."""
        seed = int.from_bytes(blake2b(repr(key).encode(), digest_size=8).digest(), "little")
        torch.set_rng_state(torch.Generator().manual_seed(seed).get_state())
        for device, _ in self._others:  # not torch.manual_seed, which would seed all devices
            module = torch.get_device_module(device)
            module.set_rng_state(torch.Generator(device).manual_seed(seed).get_state(), device)
        try:
            yield
        finally:
            self.restore()


class SameNoise:
    """Replays the random state of the first query on a batch in the queries on it that follow.

    Args:
        parameters: the parameters of the model.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = parameters
        self._first: tuple[Batch, RandomState] | None = None

    def begin(self, batch: Batch) -> RandomState | None:
        """Replay the state if the batch was seen before, and return the one to restore after the query."""
        if self._first is not None and self._first[0] is batch:
            present = RandomState(self._parameters)  # what was drawn between two queries, a mask say, stays drawn
            self._first[1].restore()
            return present
        self._first = batch, RandomState(self._parameters)
        return None
