"""The loss of the Trainer as an objective, and the costs of its queries."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from bisam.batches import Batch, size
from bisam.evaluation import Evaluation
from bisam.methods import Method
from bisam.objectives import Binary, Objective, OfClasses, innermost
from bisam.oracle import Oracle, Query, View

Inputs = dict[str, Any]
"""A batch of the Trainer's collator."""


class TrainerLoss:
    """The loss of the Trainer as an objective: a scalar, the mean over the items that count in the queried batch.

    It is computed in `forward`, where the model is run, and stored with the logits.
    """

    ignore_index = -100

    def __init__(self, trainer: Any, compute: Callable[..., Any]) -> None:
        self._trainer, self._compute = trainer, compute
        self.asked: Objective | None = None  # the objective of the query that runs the model
        self.is_local = True  # whether an answer is for the batch of this process, not a mean over all processes
        self.counted: Tensor | None = None  # number of items in the last query
        self.whole: Tensor | int | None = None  # number of items in all accumulated batches

    def __call__(self, outputs: Tensor, targets: Tensor | None) -> Tensor:
        """Returns the loss that is stored with these logits, or computes that of logits without one."""
        own = outputs.own if isinstance(outputs, _Logits) else None
        return self._anew(outputs, targets) if own is None else own

    def per_example(self, outputs: Tensor, targets: Tensor | None) -> Tensor:
        """Returns one loss for each example."""
        targets = _classes(targets, "choosing examples")
        if self._trainer.compute_loss_func is not None:
            return torch.stack([self._anew(outputs[i : i + 1], targets[i : i + 1]) for i in range(len(targets))])
        losses, counted = self._crossed(outputs, targets)
        return losses.flatten(1).sum(1) / counted.flatten(1).sum(1).clamp_min(1) if losses.dim() > 1 else losses

    def forward(self, model: nn.Module, inputs: Inputs) -> tuple[Any, Any]:
        """Returns logits (N, K, ...) with their loss, and labels (N, ...), which are None if there are no classes.

        For `Binary` the labels are those of the logits, (N, L).
        """
        self.counted = self.items(inputs)
        items = self.whole if self.counted is None else self.counted
        with self._for_itself():
            loss, outputs = self._compute(model, dict(inputs), return_outputs=True, num_items_in_batch=items)
        logits, targets = self._laid_out(inputs, outputs)
        asked = innermost(self.asked)
        if isinstance(asked, OfClasses):
            _classes(targets, repr(self.asked))
        if isinstance(asked, OfClasses | Binary) and logits is not None and loss.requires_grad > logits.requires_grad:
            raise ValueError(
                f"{self.asked!r} needs the logits that the loss is computed from, and those that "
                f"{self._compute.__qualname__} returns have no graph, as with TRL's fused head: put a class between "
                "whose compute_loss is `return Trainer.compute_loss(self, *args, **kwargs)`"
            )
        if isinstance(asked, Binary):
            targets = _labels(inputs, logits)
        logits = loss.detach() if logits is None else logits if targets is None else logits.movedim(-1, 1)
        known = logits.as_subclass(_Logits)
        # Bounds do not use it, and its graph holds copies of the logits.
        known.own = None if isinstance(asked, OfClasses | Binary) else loss
        return known, targets

    def items(self, inputs: Inputs) -> Tensor | None:
        """Returns the number of items that count in a batch, as the Trainer counts them; None if it does not count."""
        if self.whole is None or not isinstance(inputs.get("labels"), Tensor):
            return None
        labels: Tensor = inputs["labels"]
        if isinstance(shifted := inputs.get("shift_labels"), Tensor):
            labels = shifted
        elif self._trainer._loss_shifts_labels:
            labels = labels[..., 1:]
        count = labels.ne(-100).sum(dtype=torch.float32)
        if not self.is_local and self._processes > 1:
            # The mean of the processes' losses is then the mean over all of their items.
            count = cast(Tensor, self._trainer.accelerator.reduce(count, reduction="mean"))
        return torch.where(count == 0, 1.0, count)

    def share(self, inputs: Inputs, dtype: torch.dtype) -> Tensor | int | None:
        """Returns the factor of the mean over a batch for the Trainer, which sums its losses; None is 1.

        It is the share of the batch in the items of all accumulated batches. The model need not know their number: a
        loss that ignores `num_items_in_batch`, as that of T5, is a mean over the batch too, and the Trainer, which
        leaves the division to it, would sum means.
        """
        if self.whole is None or getattr(self._trainer, "loss_is_scaled_for_ga", None) is False:
            return None  # the Trainer divides by the number of accumulated batches
        items = self.items(inputs)
        if items is not None:
            return items.to(torch.promote_types(dtype, torch.float32)) * self._processes / self.whole
        return None if self._processes == 1 else self._processes

    @property
    def _processes(self) -> int:
        """The factor by which the Trainer multiplies a loss that is averaged over the items of all processes."""
        trainer = self._trainer
        counts = trainer.model_accepts_loss_kwargs or trainer.compute_loss_func is not None
        if not (counts and trainer.args.average_tokens_across_devices):
            return 1
        return trainer.accelerator.num_processes // trainer.get_tp_size()

    @contextmanager
    def _for_itself(self) -> Generator[None]:
        """A context without the Trainer's factor for an average over all processes."""
        args = self._trainer.args
        kept, args.average_tokens_across_devices = args.average_tokens_across_devices, False
        try:
            yield
        finally:
            args.average_tokens_across_devices = kept

    def _laid_out(self, inputs: Inputs, outputs: Any) -> tuple[Any, Tensor | None]:
        """Returns the logits of the model, and labels for all dimensions but the last, if these are classes."""
        if isinstance(outputs, dict):
            logits = cast(Inputs, outputs).get("logits")
        else:
            logits = next((o for o in outputs if isinstance(o, Tensor) and o.dim()), None)
        logits = logits if isinstance(logits, Tensor) else None
        labels = inputs.get("labels")
        if logits is None or not isinstance(labels, Tensor) or labels.dtype != torch.int64 or logits.shape[-1] < 2:
            return logits, None
        if logits.dim() == 2:
            labels = labels.flatten()
        elif self._shifts:
            shifted = inputs.get("shift_labels")
            labels = F.pad(labels[..., 1:], (0, 1), value=-100) if shifted is None else shifted
        return logits, labels.to(logits.device) if labels.shape == logits.shape[:-1] else None

    @property
    def _shifts(self) -> bool:
        """Whether position t of the logits is compared with label t + 1."""
        inner: Any = self._trainer.accelerator.unwrap_model(cast(nn.Module, self._trainer.model))
        inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
        known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
        return self._trainer._loss_shifts_labels or any(c.__name__ in known for c in type(inner).__mro__)

    def _anew(self, outputs: Tensor, targets: Tensor | None) -> Tensor:
        """Computes the loss of logits that were stored without one."""
        targets = _classes(targets, "the loss of logits that were kept")
        loss = self._trainer.compute_loss_func
        if loss is None:
            losses, counted = self._crossed(outputs, targets)
            return losses.sum() / counted.sum().clamp_min(1)
        labels = F.pad(targets[..., :-1], (1, 0), value=-100) if targets.dim() > 1 and self._shifts else targets
        logits = SequenceClassifierOutput(logits=cast(Any, outputs.movedim(1, -1)))
        return loss(logits, labels, num_items_in_batch=targets.ne(-100).sum(dtype=torch.float32).clamp_min(1))

    def _crossed(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        if targets.is_floating_point():  # labels that are independent of each other
            return F.binary_cross_entropy_with_logits(outputs, targets, reduction="none"), torch.ones_like(targets)
        smoother = self._trainer.label_smoother
        smoothing = 0.0 if smoother is None else smoother.epsilon
        return F.cross_entropy(outputs, targets, reduction="none", label_smoothing=smoothing), targets.ne(-100)


class _Logits(Tensor):
    """Logits with the loss that was computed from them; results of operations on them are plain tensors."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]
    own: Tensor | None = None


def _classes(targets: Tensor | None, purpose: str) -> Tensor:
    if targets is None:
        raise ValueError(
            f"{purpose} needs classes, and this task has none (int64 `labels`, and `logits` with the classes last, as "
            "in classification and language models): for regression or several labels at once use a method that climbs "
            "the training loss on whole batches, such as SAM(), or for several labels BiSAM(bound=Binary())"
        )
    return targets


def _labels(inputs: Inputs, logits: Tensor | None) -> Tensor:
    labels = inputs.get("labels")
    if logits is None or not isinstance(labels, Tensor) or labels.shape != logits.shape:
        raise ValueError(
            "Binary needs one label for each logit, and this task has others: floating-point `labels` of the shape of "
            'the logits, as with problem_type="multi_label_classification". For classes, use NegLog() or Tanh(); for a '
            "regression, SAM()"
        )
    return labels.to(logits.device)


@dataclass(frozen=True, eq=False, repr=False)
class Watched:
    """A method whose queries are counted, and whose objectives are passed to the training loss."""

    method: Method
    own: TrainerLoss
    costs: Costs
    transparent: ClassVar[bool] = True  # to `bisam.state.kind`

    def __repr__(self) -> str:
        return repr(self.method)

    def __call__(self, oracle: Oracle, batch: Batch) -> Evaluation:
        """Makes the queries of the method."""
        self.own.is_local = oracle.is_local
        self.costs.steps += 1
        return self.method(_Queries(oracle, self.own, self.costs, size(batch) or 1), batch)


class _Queries(View):
    """The oracle of one step, with counters."""

    def __init__(self, oracle: Oracle, own: TrainerLoss, costs: Costs, examples: int) -> None:
        super().__init__(oracle)
        self._own, self._costs, self._examples = own, costs, examples

    def ask(self, queries: Sequence[Query]) -> list[Evaluation]:
        """See `Oracle.ask`."""
        return [self._watched(query) for query in queries]

    def _watched(self, query: Query) -> Evaluation:
        self._own.asked = query.objective
        with self._costs.query((size(query.batch) or 1) / self._examples, query.grad):
            (answer,) = super().ask([query])
        # The mean is over items, of which an example may have several, so the weight among other parts is their number.
        objective = getattr(answer.objective, "loss", answer.objective)  # that inside the loss of SAF or MESA
        items = self._own.counted if objective is self._own else None
        return answer if items is None else replace(answer, count=items)


class Costs:
    """The costs of the steps since the last line of the log."""

    def __init__(self) -> None:
        self.steps = self._queries = 0
        self._batches = {True: 0.0, False: 0.0}
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def query(self, share: float, grad: bool) -> Generator[None]:
        """Counts a query on a share of the batch."""
        on_device = torch.cuda.is_available() and torch.cuda.is_initialized()
        began = time.perf_counter()
        events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        if on_device:  # queries are queued on the device: the clock of the CPU would measure the queueing
            events[0].record()
        yield
        if on_device:
            events[1].record()
            self._events.append(events)
        else:
            self._seconds += time.perf_counter() - began
        self._queries += 1
        self._batches[grad] += share

    def since_last(self) -> dict[str, float]:
        """Returns the averages since its last call."""
        if not self._queries:
            return {}
        if self._events:
            self._events[-1][1].synchronize()  # the Trainer has already synchronised for the loss of these steps
        seconds = self._seconds + sum(first.elapsed_time(last) for first, last in self._events) / 1000
        averages = {
            "gradients_per_step": self._batches[True] / self.steps,
            "forwards_per_step": self._batches[False] / self.steps,
            "seconds_per_query": seconds / self._queries,
        }
        self.__init__()
        return averages
