"""Targets: checks of what an objective is given; messages name the objective for targets of another kind.

Each remedy in a message works as it stands: the objective that it names accepts the outputs, and the targets in the
form that it names.

    >>> print(mismatch(torch.zeros(4, 1), torch.ones(4), IN_TORCH))    # one logit per example, and a target for each
    this loss compares classes, and outputs of shape (4, 1) have only one: for one logit per label (a binary head), use
    torch.nn.BCEWithLogitsLoss(reduction="none") with targets.unsqueeze(1); for a regression, use
    torch.nn.MSELoss(reduction="none") with targets.unsqueeze(1)
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Elsewhere:
    """The objectives that a message names for targets that are not classes.

    Attributes:
        per_label: an objective for outputs with one logit per label.
        regression: an objective for a regression; None if there is none.
    """

    per_label: str
    regression: str | None = None

    def for_regression(self, form: str) -> str:
        """Returns the advice for a regression, with targets in the form `form`."""
        return NO_REGRESSION if self.regression is None else f"for a regression, use {self.regression} with {form}"


NO_REGRESSION = (
    "a regression has no 0-1 loss: let the adversary climb the training loss, SAM(...) in place of BiSAM(...), or an "
    "objective of your own"
)
IN_TORCH = Elsewhere('torch.nn.BCEWithLogitsLoss(reduction="none")', 'torch.nn.MSELoss(reduction="none")')


def types(outputs: Any, targets: Any) -> int:
    """Returns the number of classes of the outputs.

    Raises:
        TypeError: outputs are not a floating-point tensor with a dimension, or targets are not a real tensor.
    """
    for name, value in (("outputs", outputs), ("targets", targets)):
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{name} must be a tensor, got {type(value).__name__}: take it out of its container in "
                "SharpnessAware's `forward`, which returns (outputs, targets)"
            )
    if not outputs.is_floating_point() or outputs.dim() == 0:
        raise TypeError(
            f"outputs must be floating-point logits (N, ...), got {outputs.dtype} of shape {tuple(outputs.shape)}"
        )
    if targets.is_complex():
        raise TypeError(f"targets must be labels or probabilities, got {targets.dtype}")
    return outputs.shape[1] if outputs.dim() > 1 else outputs.shape[0]


def fits(outputs: Tensor, targets: Tensor) -> bool:
    """Whether targets have the type and shape of class labels or class probabilities for these outputs."""
    if targets.is_floating_point():
        return targets.shape == outputs.shape
    return targets.dtype == torch.int64 and targets.shape == _of_labels(outputs.shape)


def mismatch(outputs: Tensor, targets: Tensor, elsewhere: Elsewhere) -> Exception:
    """Returns the error for targets that do not fit, or for outputs with less than two classes."""
    shape, got, needed, soft = outputs.shape, targets.shape, _of_labels(outputs.shape), targets.is_floating_point()
    classes = shape[min(1, len(shape) - 1)]
    per_label, label = _reshaped(targets, shape), _reshaped(targets, needed)
    cast = "" if targets.dtype == torch.int64 else ".long()"
    says = f"labels for outputs of shape {tuple(shape)} need shape {tuple(needed)}, got {tuple(got)}"
    if classes < 2:
        have = "only one" if classes else "none"
        says = f"this loss compares classes, and outputs of shape {tuple(shape)} have {have}"
    if classes < 2 and not per_label:
        remedy = f"{elsewhere.per_label} takes targets of the shape of the outputs, got {tuple(got)}"
        return ValueError(f"{says}: for one logit per label (a binary head), {remedy}")
    if classes < 2 or (len(shape) == 1 and per_label):
        form = f"{per_label}{'' if soft else '.float()'}"
        regression = f"; {elsewhere.for_regression(form)}" if soft else ""
        remedy = f"for one logit per label (a binary head), use {elsewhere.per_label} with {form}"
        return ValueError(f"{says}: {remedy}{regression}")
    if label == "targets" and not soft:
        return TypeError(f"labels must be int64, got {targets.dtype}: use targets.long()")
    if label == "targets":
        return ValueError(
            f"floating-point targets are class probabilities and need the shape of the outputs, {tuple(shape)}, got "
            f"{tuple(got)}; for labels use targets.long()"
        )
    if label:
        remedy = f"use {label}{cast}"
    elif per_label == "targets":
        remedy = (
            f"for several labels per example, use {elsewhere.per_label} with targets.float(); for one-hot labels, use "
            "targets.long().argmax(1)"
        )
    elif len(shape) > 2 and got == shape[:-1]:
        remedy = "the classes are dimension 1, use outputs.movedim(-1, 1)" + (f" with targets{cast}" if cast else "")
    elif len(shape) > 2 and got == (*needed, classes):
        remedy = "the classes are dimension 1, use targets." + ("movedim(-1, 1)" if soft else "long().argmax(-1)")
    else:
        remedy = "the classes are dimension 1 of the outputs, and class probabilities have the shape of the outputs"
    return ValueError(f"{says}: {remedy}")


def probabilities(targets: Tensor, elsewhere: Elsewhere) -> None:
    """Checks that targets are non-negative and sum to 1 over dimension 1, or over dimension 0 if it is the only one.

    The tolerance of a sum is 0.01, and 0.03 in bfloat16. There is no wait for a device, see `_require`.

    Raises:
        ValueError: they are not.
    """
    p, rounding = targets.detach(), _rounding(targets.dtype)
    near = max(0.01, rounding)
    sums = p.sum(min(1, p.dim() - 1), dtype=torch.promote_types(p.dtype, torch.float32))
    _require(
        (p >= -rounding).all() & ((sums - 1).abs() <= near).all(),
        "floating-point targets are class probabilities, which are non-negative and sum to 1 over the classes: for "
        f"targets in [0, 1] for each label, use {elsewhere.per_label}; {elsewhere.for_regression('targets')}",
        lambda: _no_probabilities(p, sums, near, elsewhere),
    )


def binary(targets: Tensor, bound: str) -> None:
    """Checks that targets are in [0, 1], up to rounding. There is no wait for a device, see `_require`.

    Args:
        targets: labels in int64, or probabilities in a floating-point type.
        bound: the bound to name for class labels.

    Raises:
        ValueError: they are not.
    """
    t = targets.detach()
    soft = t.is_floating_point()
    rounding = _rounding(t.dtype) if soft else 0
    inside = (t >= -rounding) & (t <= 1 + rounding)
    says = "targets of Binary are 0 or 1 for each label, or probabilities in [0, 1]"
    classes = f"the objective for one of K classes per example is {bound}, with K logits for each"

    def explained() -> str:
        bad = t[~inside]
        found = f"{bad.numel()} of {t.numel()} are not, the first is {bad[0].item():.4g}"
        if ((t == 1) | (t == -1)).all():
            remedy = "for labels -1 and 1, use (targets + 1) / 2"
        elif soft:
            remedy = NO_REGRESSION
        else:
            remedy = f"{classes}; to leave labels out, multiply their losses by 0 in an objective of your own"
        return f"{says}, and {found}: {remedy}"

    _require(inside.all(), f"{says}: {classes}; {NO_REGRESSION}", explained)


def same_shape(outputs: Tensor, targets: Tensor, name: str) -> None:
    """Checks that there is one target for each output.

    Args:
        outputs: real numbers.
        targets: real numbers.
        name: the name of the objective.

    Raises:
        ValueError: their shapes differ, which torch would broadcast.
    """
    if targets.shape != outputs.shape:
        expression = _reshaped(targets, outputs.shape)
        remedy = f"use {expression}" if expression else "there must be one target for each output"
        needed, got = tuple(outputs.shape), tuple(targets.shape)
        raise ValueError(f"{name} needs targets of the shape of the outputs, {needed}, got {got}: {remedy}")


def matches(outputs: Tensor, targets: Tensor) -> None:
    """Checks that outputs are similarities (N, N), and targets the items that match the queries, each once.

    There is no wait for a device, see `_require`.

    Raises:
        TypeError: the targets are not int64.
        ValueError: the outputs are no square, or the targets no permutation.
    """
    shape, n = tuple(outputs.shape), outputs.shape[0]
    if shape != (n, n):
        raise ValueError(
            f"Retrieval needs similarities (N, N) of N queries and N items, got {shape}: for one direction, or for "
            "more items than queries, use its bound itself"
        )
    if targets.dtype != torch.int64:
        raise TypeError(f"the targets of Retrieval are int64 numbers of items, torch.arange({n}), got {targets.dtype}")
    if tuple(targets.shape) != (n,):
        raise ValueError(f"Retrieval needs one target for each query, torch.arange({n}), got {tuple(targets.shape)}")
    says = f"targets of Retrieval are the numbers from 0 to N - 1, each once, as torch.arange({n})"
    holds = (targets.sort().values == torch.arange(n, device=targets.device)).all()
    _require(holds, says, lambda: f"{says}, got {targets.tolist() if n <= 8 else 'others'}")


def masks(outputs: Tensor, targets: Tensor) -> None:
    """Checks that outputs are the logits (N, L, d1, ...) of masks, and targets 0 or 1 for each.

    Raises:
        ValueError: the shapes differ or have less than three dimensions, or a target is outside [0, 1].
    """
    if outputs.dim() < 3:
        raise ValueError(
            f"masks have the shape (N, L, d1, ...), got {tuple(outputs.shape)}: use outputs.unsqueeze(1) for one mask"
        )
    if targets.shape != outputs.shape:
        raise binary_mismatch(outputs, targets, "NegLog(...)")
    binary(targets if targets.is_floating_point() else targets.long(), "NegLog(...)")


def binary_mismatch(outputs: Tensor, targets: Tensor, bound: str) -> ValueError:
    """Returns the error for targets of `Binary` that do not have the shape of the outputs."""
    remedy = "there must be one target for each logit"
    if expression := _reshaped(targets, outputs.shape):
        remedy = f"use {expression}"
    elif outputs.dim() > 1 and (expression := _reshaped(targets, _of_labels(outputs.shape))):
        cast = "" if targets.dtype == torch.int64 else ".long()"
        remedy = f"for one of {outputs.shape[1]} classes, use {bound} with {expression}{cast}"
    needed, got = tuple(outputs.shape), tuple(targets.shape)
    return ValueError(f"Binary needs targets of the shape of the outputs, {needed}, got {got}: {remedy}")


def _of_labels(outputs: torch.Size) -> torch.Size:
    return outputs[: len(outputs) > 1] + outputs[2:]


def _reshaped(targets: Tensor, shape: torch.Size) -> str | None:
    """Returns an expression that gives targets this shape, or None if the shapes do not correspond."""
    got = targets.shape
    if got == shape:
        return "targets"
    if len(got) > 1 and got[1] == 1 and got[:1] + got[2:] == shape:
        return "targets.squeeze(1)"
    if len(shape) > 1 and shape[1] == 1 and shape[:1] + shape[2:] == got:
        return "targets.unsqueeze(1)"
    return "targets.squeeze()" if not shape and targets.numel() == 1 else None


def _no_probabilities(p: Tensor, sums: Tensor, near: float, elsewhere: Elsewhere) -> str:
    says = "floating-point targets are class probabilities, which are non-negative and sum to 1 over the classes"
    if p.dim() == 1:
        says = (
            f"outputs and floating-point targets of shape {tuple(p.shape)} are the logits and the class probabilities "
            "of one example; probabilities are non-negative and sum to 1"
        )
    if not p.isfinite().all():
        return f"{says}, and {int((~p.isfinite()).sum())} of {p.numel()} are not finite"
    smallest, largest, rounding, dim = float(p.min()), float(p.max()), _rounding(p.dtype), min(1, p.dim() - 1)
    remedies = [elsewhere.for_regression("targets")]
    if smallest < -rounding:
        found = f"the smallest is {smallest:.3g}"
        remedies.append(f"for the logits of another model, use targets.softmax({dim})")
    else:
        off = sums[(sums - 1).abs() > near]
        found = f"{off.numel()} of {sums.numel()} sums are not 1, the first is {float(off[0]):.3g}"
        if p.dim() > 2 and ((p.sum(-1, dtype=sums.dtype) - 1).abs() <= near).all():
            remedies = ["the classes are dimension 1, use outputs.movedim(-1, 1) and targets.movedim(-1, 1)"]
        elif largest <= 1 + rounding:
            remedies.insert(0, f"for a target in [0, 1] for each label (several, or one), use {elsewhere.per_label}")
        elif (sums > 0).all():
            remedies.append(f"for counts or weights of the classes, use targets / targets.sum({dim}, keepdim=True)")
    return f"{says}, and {found}: {'; '.join(remedies)}"


def _rounding(dtype: torch.dtype) -> float:
    """The tolerance for probabilities of a type, which may have been computed in float32 and converted."""
    return 4 * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)


def _require(valid: Tensor, message: str, explained: Callable[[], str]) -> None:
    """Raises a ValueError if `valid` is False. On a device, a device-side assert fails: to read it would be to wait."""
    if torch.compiler.is_compiling():
        torch._assert_async(valid, message)
    elif valid.is_cpu:
        try:
            holds = bool(valid)
        except RuntimeError:  # under torch.func.vmap, and with fake tensors, there is no value to read
            return
        if not holds:
            raise ValueError(explained())
    else:
        with suppress(NotImplementedError):  # not all devices have asserts
            torch._assert_async(valid, message)
