"""Passes: whether the present forward pass is an additional one of a method.

A method runs several forward passes per step. The model's tensors are restored after all but one of them (see
`bisam.model.module_state`); what is not a tensor, such as a counter, a list or a metric in another object, cannot be.
A forward pass that changes such a state asks first:

    def forward(self, x):
        out = self.network(x)
        if not bisam.displaced():
            self.calls += 1
        return out
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

_displaced = False  # not a context variable: checkpointed layers run again in threads of autograd


def displaced() -> bool:
    """Returns whether the present forward pass is an additional one of a method, whose effects are to be undone.

    It is False in the one pass of a step that updates running statistics, in evaluation and outside of
    `SharpnessAware`, and True in all other passes: those at displaced weights, and additional ones at the weights. With
    methods that make no query at the weights themselves (`RSAM`, `BSAM`, ...), it is False in the pass that stands in
    for it.

    Use it to guard effects that are no tensors of the model: counters, lists, metrics, logging. All threads of a
    process share the answer.

    Example:
        >>> import torch, bisam
        >>> class Counting(torch.nn.Linear):
        ...     calls = 0
        ...     def forward(self, x):
        ...         if not bisam.displaced():
        ...             self.calls += 1
        ...         return super().forward(x)
        >>> model = Counting(4, 3)
        >>> sharp = bisam.SharpnessAware(model, bisam.SAM(0.05), bisam.cross_entropy)
        >>> sharp(torch.randn(8, 4), torch.randint(3, (8,))).backward()    # two passes
        >>> model.calls
        1
    """
    return _displaced


@contextmanager
def marked(additional: bool) -> Generator[None]:
    """A context in which `displaced()` returns `additional`."""
    was = _displaced
    mark(additional)
    try:
        yield
    finally:
        mark(was)


def mark(additional: bool) -> None:
    """Sets what `displaced()` returns."""
    global _displaced
    _displaced = additional
