"""Running statistics: recomputes those of BatchNorm at displaced weights, and restores all buffers afterwards."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from bisam.model.eval_mode import in_mode
from bisam.model.oracle import ModelOracle

RECOMPUTED = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
"""The layers whose running statistics can be recomputed."""


def layers_of(model: nn.Module) -> list[nn.Module]:
    """Returns the layers of a model that have running statistics."""
    return [module for module in model.modules() if isinstance(getattr(module, "running_mean", None), Tensor)]


@contextmanager
def buffers_as(oracle: ModelOracle, changes: Iterable[tuple[Tensor, Tensor]]) -> Generator[None]:
    """A context in which some buffers of a model have other contents; all buffers are restored at its end.

    Args:
        oracle: the oracle of the model.
        changes: buffers with their contents.
    """
    # .data: the graph of another loss may hold a buffer, and would detect the change, which is undone.
    before = [(buffer, buffer.data.clone()) for _, buffer in oracle.model.named_buffers()]
    try:
        for buffer, content in changes:
            buffer.data.copy_(content)
        yield
    finally:
        oracle.rollback()  # tensors that forward passes have replaced
        for buffer, content in before:
            buffer.data.copy_(content)


@contextmanager
def recomputing(oracle: ModelOracle, layers: Sequence[Any]) -> Generator[None]:
    """A context in train mode, after which running statistics are the averages over the tracked passes inside it.

    It does what `torch.optim.swa_utils.update_bn` does around its passes.

    Args:
        oracle: the oracle of the model.
        layers: layers of the types in `RECOMPUTED`.
    """
    momenta = [layer.momentum for layer in layers]
    try:
        for layer in layers:
            for buffer, value in ((layer.running_mean, 0), (layer.running_var, 1), (layer.num_batches_tracked, 0)):
                buffer.data.fill_(value)  # as reset_running_stats(), which the graph of another loss would detect
            layer.momentum = None  # the cumulative average
        with in_mode(oracle.model, True):
            yield
    finally:
        oracle.seen.clear()
        oracle.next_part()  # other passes begin with the new statistics
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
