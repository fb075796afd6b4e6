"""RNG: saves, restores and replaces the state of the random generators that forward passes draw from."""

from __future__ import annotations

import random
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from hashlib import blake2b

import torch
from torch import Tensor

from bisam.batches import Batch


class RandomState:
    """The present state of the random generators of a forward pass: torch's, Python's and, if it is in use, numpy's.

    Args:
        parameters: the parameters of the model, whose devices have generators of their own.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._cpu = torch.get_rng_state()
        devices = {p.device for p in parameters if p.device.type not in ("cpu", "meta")}
        self._others = [(d, torch.get_device_module(d).get_rng_state(d)) for d in devices]
        self._python = random.getstate()
        numpy = sys.modules.get("numpy")
        self._numpy = None if numpy is None else numpy.random.get_state()

    @property
    def tensors(self) -> list[Tensor]:
        """The states of torch's generators, that of the CPU first."""
        return [self._cpu, *(state for _, state in self._others)]

    def restore(self) -> None:
        """Restores the state of the generators."""
        torch.set_rng_state(self._cpu)
        for device, state in self._others:
            torch.get_device_module(device).set_rng_state(state, device)
        random.setstate(self._python)
        if self._numpy is not None:
            sys.modules["numpy"].random.set_state(self._numpy)

    @contextmanager
    def forked(self, *key: int) -> Generator[None]:
        """A context that seeds the generators by `key` and restores their state at its end."""
        seed = int.from_bytes(blake2b(repr(key).encode(), digest_size=8).digest(), "little")
        with self.kept():
            torch.set_rng_state(torch.Generator().manual_seed(seed).get_state())
            for device, _ in self._others:  # not torch.manual_seed, which would seed all devices
                module = torch.get_device_module(device)
                module.set_rng_state(torch.Generator(device).manual_seed(seed).get_state(), device)
            random.seed(seed)
            if self._numpy is not None:
                sys.modules["numpy"].random.seed(seed % 2**32)
            yield

    @contextmanager
    def kept(self) -> Generator[None]:
        """A context at whose end the state of the generators is restored."""
        try:
            yield
        finally:
            self.restore()


class SameNoise:
    """Replays the random state of the first query on a batch in all later queries on it, whatever lies between them.

    Args:
        parameters: the parameters of the model.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = parameters
        self._first: dict[int, tuple[Batch, RandomState]] = {}  # by the identity of the batch, which stays alive

    def begin(self, batch: Batch) -> RandomState | None:
        """Replays the state if an earlier query used the batch, and returns the state to restore after the query."""
        present = RandomState(self._parameters)
        _, first = self._first.setdefault(id(batch), (batch, present))
        if first is present:
            return None
        first.restore()
        return present  # keeps draws between two queries, such as a mask
