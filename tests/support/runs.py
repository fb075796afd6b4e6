"""Training runs for tests: a few steps, a model trained by a method of the family, and what they are compared by."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from bisam import SharpnessAware, cross_entropy
from bisam.methods.method import stateful
from tests.support import cases
from tests.support.cases import bits, buffers, parameters

each_basic_method = pytest.mark.parametrize("method", cases.BASIC, ids=["SAM", "BiSAM", "ASAM", "MSAM"])
each_variant = pytest.mark.parametrize("name", cases.FAMILY)
FIRST = {name.partition("-")[0]: name for name in reversed(cases.FAMILY)}
"""The first variant of each method."""
each_method = pytest.mark.parametrize(
    "name", [name if name in FIRST.values() else pytest.param(name, marks=pytest.mark.slow) for name in cases.FAMILY]
)
"""The variants, of which all but the first of a method are slow."""


def close(actual: Any, expected: Any, tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def with_gradients(model: nn.Module) -> nn.Module:
    """As in the middle of accumulation: `.grad` is not empty."""
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    return model


def twins(make: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    """Two models with equal weights."""
    torch.manual_seed(3)
    first = make()
    torch.manual_seed(3)
    return first, make()


def grads_of(loss: Tensor, model: nn.Module) -> list[Tensor]:
    model.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in model.parameters()]


def run_steps(sharp: SharpnessAware, optimizer, steps) -> tuple[Any, ...]:
    for step in steps:
        sharp(*cases.batch(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return parameters(sharp), buffers(sharp)


class Training:
    """A model, its optimizer and a loss; each step draws random numbers of its own, whatever came before."""

    def __init__(
        self,
        make_method: Callable[[torch.optim.Optimizer], Any],
        make_model: Callable[[], nn.Module] = cases.A_MODEL,
        *,
        dtype: torch.dtype = torch.double,
        scaler: torch.amp.GradScaler | None = None,
        lr: float = 0.1,
    ) -> None:
        torch.manual_seed(3)
        self.model, self.dtype = make_model().to(dtype), dtype
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-3)
        self.sharp = SharpnessAware(self.model, make_method(self.optimizer), cross_entropy, scaler=scaler)
        self.scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)

    def batch(self, number: int) -> tuple[Tensor, Tensor]:
        x, y = cases.batch(number)
        return x.to(self.dtype), y

    def gradients(self, number: int) -> Training:
        torch.manual_seed(number)
        self.optimizer.zero_grad()
        self.scaler.scale(self.sharp(*self.batch(number))).backward()
        return self

    def step(self, *numbers: int) -> Training:
        for number in numbers:
            self.gradients(number)
            self.scaler.step(self.optimizer)
            self.scaler.update()
        return self

    def saved(self) -> io.BytesIO:
        file = io.BytesIO()
        torch.save({"sharp": self.sharp.state_dict(), "optimizer": self.optimizer.state_dict()}, file)
        file.seek(0)
        return file

    def load(self, file: io.BytesIO) -> Training:
        saved = torch.load(file, weights_only=True)
        self.sharp.load_state_dict(saved["sharp"])
        self.optimizer.load_state_dict(saved["optimizer"])
        return self

    @property
    def memory(self) -> Any:
        """Bits of what the method remembers."""
        return tree_map(lambda v: bits(v) if isinstance(v, Tensor) else v, self.sharp.get_extra_state()["state"])

    @property
    def weights(self) -> dict[str, Any]:
        return parameters(self.model)


def training(name: str, *args: Any, **kwargs: Any) -> Training:
    return Training(cases.FAMILY[name][0], *args, **kwargs)


STATEFUL = [name for name in cases.FAMILY if stateful(training(name).sharp.method)]
