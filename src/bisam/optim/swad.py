"""SWAD: an average of the weights of all steps in a range that validation losses choose (Cha et al., 2021).

    swad = SWAD(model)
    for step, (x, y) in enumerate(loader, start=1):
        ...                                     # the training step
        swad.update_parameters(model)
        if step % 100 == 0 and swad.record(validation_loss(model)):
            break                               # the losses have risen: the average is complete
    torch.optim.swa_utils.update_bn(loader, swad)

It is an `AveragedModel` of `torch.optim.swa_utils`, which has SWA and exponential moving averages too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from bisam.validation import describe, finite, non_negative, shown, whole


@dataclass
class _Mean:
    """The mean of the weights of some steps, in the types of `_wide`; of integers it is the last value."""

    tensors: list[Tensor] = field(default_factory=list[Tensor])
    steps: int = 0

    def include(self, tensors: Sequence[Tensor], steps: int = 1) -> None:
        """Includes the mean of further steps."""
        self.steps += steps
        if not self.tensors:
            self.tensors = [t.to(_wide(t), copy=True) for t in tensors]
            return
        new = [t.to(mine.dtype) for mine, t in zip(self.tensors, tensors, strict=True)]
        numbers = [i for i, t in enumerate(new) if self.steps > steps and (t.is_floating_point() or t.is_complex())]
        others = sorted({*range(len(new))} - {*numbers})
        if others:
            torch._foreach_copy_([self.tensors[i] for i in others], [new[i] for i in others])
        if numbers:
            torch._foreach_lerp_([self.tensors[i] for i in numbers], [new[i] for i in numbers], steps / self.steps)

    def follow(self, weights: Sequence[Tensor]) -> None:
        """Moves the mean to the devices and types of the weights, which may have been moved since."""
        self.tensors = [t.to(w.device, _wide(w)) for t, w in zip(self.tensors, weights, strict=False)]


def _wide(t: Tensor) -> torch.dtype:
    """The type of a mean of a tensor: in half precision it would stay at its value after some hundred steps."""
    if t.dtype is torch.complex32:
        return torch.complex64
    return torch.float32 if t.is_floating_point() and t.dtype.itemsize < 4 else t.dtype


class SWAD(AveragedModel):
    """SWAD: dense averaging of weights between a start and an end that are aware of overfitting (Cha et al., 2021).

    Source: https://arxiv.org/abs/2102.08604. The rule is that of the paper's algorithm, which was known from
    descriptions; the authors' code (https://github.com/khanrc/swad, domainbed/swad.py) was read in copies of it. The
    weights after each step of the optimizer count. Validations divide the steps into segments, each of which ends with
    a validation. With the losses E_1, E_2, ... of the validations:

    * The average starts with the segment of validation s, the first whose loss is the smallest of E_s, ...,
      E_(s + N_s - 1). The threshold is r times the mean of these N_s losses.
    * It ends before the first N_e validations in a row whose losses are above the threshold.

    After each validation `module` has the average so far. Until the start is found, that begins with the segment of the
    smallest loss so far. Segments above the threshold are left out until a loss at or below the threshold follows, and
    so are the steps since the last validation. If training ends with losses above the threshold, before the end is
    found, the paper includes their segments, and the authors' code leaves them out, as here. That code gives segments
    equal weights, whatever their steps, and can count a segment twice.

    Besides `module` it keeps up to N_s copies of the weights until the start is found, and one from then on. Averages
    of weights in half precision are computed in float32, and need another copy. Buffers, and weights of integer types,
    are those of the model: call `torch.optim.swa_utils.update_bn(loader, swad)` at the end if it has batch
    normalisation. Give the model itself, not the `SharpnessAware` loss around it. Under DistributedDataParallel, give
    the model inside, and the same losses on all ranks. A model under FSDP2 cannot be copied.

    Args:
        model: the model; it is copied.
        optimum_patience: N_s, number of validations of which the first must have the smallest loss, >= 1.
        overfit_patience: N_e, number of validations above the threshold that end the average, >= N_s.
        tolerance: r, the threshold relative to the mean loss, >= 1; the authors' commands have 1.3, and 1.2 for one of
            five data sets.
        device: where the averages are kept, for example "cpu". Default: with the model.

    Attributes:
        module: the model with the averaged weights.
        n_averaged: number of steps in the average.
        start: number of steps before the average; None until the start is found.
        end: number of steps up to the end of the average; None until the end is found.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is outside its range.

    Example:
        >>> import torch
        >>> from bisam import SWAD
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> swad = SWAD(model, optimum_patience=2, overfit_patience=2, tolerance=1.2)
        >>> for step, loss in enumerate([3.0, 1.0, 1.1, 1.0, 2.0, 3.0], start=1):
        ...     _ = model.weight.data.fill_(step)    # in place of a training step
        ...     swad.update_parameters(model)
        ...     if swad.record(loss):
        ...         break
        >>> swad.start, swad.end, swad.module.weight.item()    # the mean of 2, 3 and 4
        (1, 4, 3.0)
    """

    def __init__(
        self,
        model: nn.Module,
        optimum_patience: int = 3,
        overfit_patience: int = 6,
        tolerance: float = 1.3,
        device: torch.device | str | None = None,
    ) -> None:
        _check_module(model)
        whole("optimum_patience", optimum_patience)
        whole("overfit_patience", overfit_patience)
        finite("tolerance", tolerance)
        if overfit_patience < optimum_patience:
            raise ValueError(
                f"overfit_patience must be at least optimum_patience, which is {optimum_patience}, got "
                f"{overfit_patience}"
            )
        if tolerance < 1:
            raise ValueError(
                f"tolerance is the threshold relative to the mean loss and must be at least 1, got {tolerance}: write "
                "1.3 for losses that may be 30 % larger"
            )
        super().__init__(model, None if device is None else torch.device(device))
        self.optimum_patience, self.overfit_patience, self.tolerance = optimum_patience, overfit_patience, tolerance
        self.start: int | None = None
        self.end: int | None = None
        self._steps = self._recorded = 0  # all steps, and those up to the last validation
        # Before the start: the segments from the smallest loss on, of which the first becomes the start.
        self._losses, self._segments = list[float](), list[_Mean]()
        # The steps that are in none of these and not in the average: since the last validation and, after the start, of
        # the validations above the threshold before it.
        self._rest, self._above, self._threshold = _Mean(), 0, 0.0
        self._exact: list[Tensor] | None = None  # the average of weights in half precision; None: that of `module`

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Takes the weights of a step into account; without effect after the end.

        Args:
            model: the model, after a step of its optimizer.

        Raises:
            TypeError: it is not a module.
            ValueError: it has other parameters or buffers than the model of the constructor.
        """
        _check_module(model)
        if self.end is not None:
            return
        own, new = self._weights(), [p.detach() for p in model.parameters()]
        ours, buffers = [*self.module.buffers()], [*model.buffers()]
        for kind, mine, theirs in (("parameters", own, new), ("buffers", ours, buffers)):
            if [t.shape for t in mine] != [t.shape for t in theirs]:
                raise ValueError(
                    f"the {kind} are not those of the model that SWAD was made of: give it the same model, also where "
                    "that was wrapped or got other layers since"
                )
        self._rest.follow(own)
        self._rest.include([p.to(mine.device, _wide(mine)) for mine, p in zip(own, new, strict=True)])
        for mine, buffer in zip(ours, buffers, strict=True):
            mine.copy_(buffer)
        self._steps += 1

    @torch.no_grad()
    def record(self, loss: float | Tensor) -> bool:
        """Takes the validation loss of the present weights into account; without effect after the end.

        Args:
            loss: the loss, >= 0, of the model and not of the average.

        Returns:
            Whether the end is found, so that training can stop.

        Raises:
            TypeError: the loss is not a number.
            ValueError: the loss is negative or not finite, or has several entries.
            RuntimeError: there was no step since the last validation.
        """
        if isinstance(loss, Tensor):
            if loss.numel() != 1:
                raise ValueError(f"the validation loss must be one number, got {describe(loss)}: take the mean")
            loss = loss.item()
        non_negative("the validation loss", loss)
        if self.end is not None:
            return True
        if self._steps == self._recorded:
            raise RuntimeError(
                "there was no step since the last validation loss: call update_parameters(model) after each step of "
                "the optimizer, and record(loss) after some of them"
            )
        self._recorded = self._steps
        for mean in (self._rest, *self._segments):
            mean.follow(self._weights())
        if self.start is None:
            self._search(loss)
        else:
            self._continue(loss)
        return self.end is not None

    def get_extra_state(self) -> dict[str, Any]:
        """Returns the losses, counts and averages besides `module`, as tensors and plain containers."""
        return {
            **{name: getattr(self, name) for name in _PLAIN},
            "_losses": [*self._losses],
            "exact": self._exact,
            "segments": [(mean.tensors, mean.steps) for mean in self._segments],
            "rest": (self._rest.tensors, self._rest.steps),
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restores the result of `get_extra_state`; called by `load_state_dict`."""
        for name in _PLAIN:
            setattr(self, name, state[name])
        self._losses = list(self._losses)
        self._segments = [self._copied(*mean) for mean in state["segments"]]
        self._rest = self._copied(*state["rest"])
        exact = state.get("exact")  # not in states of earlier versions
        self._exact = None if exact is None else [t.clone() for t in exact]

    def _search(self, loss: float) -> None:
        """Takes a segment into account before the start is found."""
        if self._losses and loss < self._losses[0]:  # then none of these is the start
            self._losses, self._segments = [], []
        self._losses.append(loss)
        self._segments.append(self._rest)
        self._rest, last = _Mean(), len(self._losses)
        if last >= self.optimum_patience:  # more, if a state was loaded that another patience has made
            self.start = self._steps - sum(mean.steps for mean in self._segments)
            self._threshold = self.tolerance * (sum(self._losses) / last)
            last = 1 + max(i for i, one in enumerate(self._losses) if i == 0 or one <= self._threshold)
            self._above = len(self._losses) - last
        self._average(self._segments[:last])
        if self.start is not None:
            for mean in self._segments[last:]:
                self._rest.include(mean.tensors, mean.steps)
            self._losses, self._segments = [], []

    def _continue(self, loss: float) -> None:
        """Takes a segment into account after the start is found."""
        if loss <= self._threshold:
            self._average([_Mean(self._averages(), int(self.n_averaged)), self._rest])
            self._rest, self._above = _Mean(), 0
            return
        self._above += 1
        if self.start is not None and self._above >= self.overfit_patience:
            self.end, self._rest = self.start + int(self.n_averaged), _Mean()

    def _average(self, means: Sequence[_Mean]) -> None:
        """Sets the average to that of the steps of all means."""
        total = _Mean(self._averages())
        for mean in means:
            total.include(mean.tensors, mean.steps)
        for mine, exact in zip(self._weights(), total.tensors, strict=True):
            if mine.dtype is not exact.dtype:
                mine.copy_(exact)
        self.n_averaged.fill_(total.steps)

    def _weights(self) -> list[Tensor]:
        return [p.detach() for p in self.module.parameters()]

    def _averages(self) -> list[Tensor]:
        """Returns the average before it is rounded: the weights of `module`, and others for those in half precision."""
        weights = self._weights()
        half = [w for w in weights if _wide(w) is not w.dtype]
        exact = half if self._exact is None or len(self._exact) != len(half) else self._exact
        self._exact = [t.to(w.device, _wide(w)) for t, w in zip(exact, half, strict=True)] or None
        rest = iter(self._exact or [])
        return [w if _wide(w) is w.dtype else next(rest) for w in weights]

    def _copied(self, tensors: Sequence[Tensor], steps: int) -> _Mean:
        pairs = zip(self._weights(), tensors, strict=False)
        return _Mean([t.to(mine.device, _wide(mine), copy=True) for mine, t in pairs], steps)


def _check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"SWAD averages the weights of a torch.nn.Module, got {shown(model)}")


_PLAIN = ("start", "end", "_steps", "_recorded", "_losses", "_above", "_threshold")
