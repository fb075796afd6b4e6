"""SharpnessAwareTrainer: the Trainer of Hugging Face with any sharpness-aware method.

It replaces the Trainer, or goes first among the bases of a class that overrides `compute_loss`:

    from bisam.integrations.transformers import SharpnessAwareTrainer

    trainer = SharpnessAwareTrainer(model, args, train_dataset=data, method=BiSAM(rho=0.05))      # was: Trainer(...)
    trainer = SharpnessAwareTrainer(..., method_of=lambda optimizer: SAMPa(ahead=next_step(optimizer)))
    class Mine(SharpnessAwareTrainer, MyTrainer): ...

The training loss is that of the Trainer, including label smoothing and `compute_loss_func`. A query evaluates its mean
over the items that count in the batch, or in the part of the batch that is queried. The value that is returned to the
Trainer is weighted by its share in the items of all accumulated batches (`num_items_in_batch`), as in the Trainer. So
the loss that a method evaluates has the same scale for any accumulation, and `ERM()` is bit-identical to the Trainer,
except for rounding if tokens are accumulated. Where the model ignores `num_items_in_batch` (T5, classifiers), the
Trainer sums the means of the accumulated batches; here they are weighted by their items too.
"""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import Trainer
from transformers.modeling_outputs import SequenceClassifierOutput

from bisam.deprecated import renamed
from bisam.distributed.placement import Scope
from bisam.integrations.transformers.loss import Costs, Inputs, TrainerLoss, Watched
from bisam.loss import SharpnessAware
from bisam.methods import ERM, Method
from bisam.state import kind
from bisam.statistics import StatsMean
from bisam.validation import instance


class SharpnessAwareTrainer(Trainer):
    """`transformers.Trainer` with a sharpness-aware training loss; evaluation and prediction are those of the Trainer.

    Gradient accumulation is by items, such as tokens, and each micro-batch has its own perturbation: several are as
    `MSAM` on one large batch. Clipping, mixed precision and DDP are those of the Trainer. A checkpoint contains the
    state of the method for each process, as `sharpness_aware_RANK.pt`, and is resumed with it. The log has the average
    costs since its previous line: `gradients_per_step` and `forwards_per_step` (gradients and additional forward
    passes, in units of whole batches, per micro-batch) and `seconds_per_query`.

    Methods that climb a bound of the 0-1 loss need classes: int64 labels, and logits with the classes in the last
    dimension. `Binary` is the bound for `problem_type="multi_label_classification"`. In causal language models each
    token counts separately, with the next label; methods that select examples select whole sequences. The loss of the
    Trainer is a scalar, so losses per example are cross-entropy with the label smoothing of the Trainer, or
    `compute_loss_func` of each example. The same holds for `sharp.clean` if the adversary climbs another objective.

    Args:
        *args: the arguments of `Trainer`.
        method: `SAM()`, `BiSAM()` or another callable `(oracle, batch) -> Evaluation`.
        method_of: a function from the optimizer, which the Trainer creates, to the method; replaces `method`.
        scope: see `SharpnessAware`.
        stats: whether the log also has the statistics of the steps (`SharpnessAware.stats`), averaged since its
            previous line: those of the process that logs, with the names of `bisam.statistics.StepStats`.
        **kwargs: the keyword arguments of `Trainer`.

    Raises:
        TypeError: neither or both of `method` and `method_of` are given, or one has the wrong type.
        ValueError: the arguments request a setup that is not supported: several devices in one process, DeepSpeed,
            FSDP1, re-entrant checkpointing.

    Raises in training:
        ValueError: the method needs classes and the task has none; the checkpoint belongs to another method or another
            number of processes.
        RuntimeError: a subclass computes its loss without calling `compute_loss` of this class.
    """

    @renamed(perturbation="scope")
    def __init__(
        self,
        *args: Any,
        method: Method | None = None,
        method_of: Callable[[Optimizer], Method] | None = None,
        scope: Scope | None = None,
        stats: bool = False,
        **kwargs: Any,
    ) -> None:
        if (method is None) == (method_of is None):
            raise TypeError(
                "give SharpnessAwareTrainer a method=, such as method=BiSAM(rho=0.05), or for one that needs the "
                "optimizer method_of=lambda optimizer: SAMPa(ahead=next_step(optimizer)), and not both"
            )
        if method is not None:
            instance("method", method, "SAM(), BiSAM() or another (oracle, batch) -> Evaluation")
        if method_of is not None:
            instance("method_of", method_of, "a function from the optimizer to the method")
            if is_dataclass(method_of):
                raise TypeError(f"method_of is the method {method_of!r}, and no function that makes one: use method=")
        self._method, self._method_of = method, method_of
        self._scope: Scope | None = scope
        self._stats = StatsMean() if stats else None
        self._sharp: SharpnessAware | None = None
        self._sharp_of: nn.Module | None = None
        self._losses = 0
        self._costs = Costs()
        super().__init__(*args, **kwargs)
        if not hasattr(self, "_loss_shifts_labels"):
            raise ImportError('SharpnessAwareTrainer needs a newer transformers: pip install -U "bisam[transformers]"')
        _refuse(self)
        self._own = TrainerLoss(self, super().compute_loss)

    @property
    def sharp(self) -> SharpnessAware:
        """The sharpness-aware loss; `sharp.clean` has losses and logits at the unperturbed weights in the last step."""
        if self._sharp is None or self._sharp_of is not self.model:
            self._sharp = SharpnessAware(
                cast(nn.Module, self.model),
                Watched(self._made(), self._own, self._costs),
                self._own,
                self._own.forward,
                scaler=getattr(self.accelerator, "scaler", None),
                scope=self._scope,
                stats=self._stats is not None,
            )
            self._sharp_of = self.model
        return self._sharp

    def plain_loss(self) -> SharpnessAware:
        """Returns the loss of the Trainer without a method, for `bisam.analysis`; it shares no state with training.

        It takes batches of the collator, and is the mean over the items that count in a batch.

            trainer.train()
            sharpness(trainer.plain_loss(), trainer.get_eval_dataloader(), L2(0.05))
        """
        own = TrainerLoss(self, super().compute_loss)
        return SharpnessAware(cast(nn.Module, self.model_wrapped), ERM(), own, own.forward, scope=self._scope)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """See `Trainer.compute_loss`: returns the sharpness-aware loss in training, else the plain loss.

        In training the outputs are those at the unperturbed weights, and contain the logits only.
        """
        if not (model.training and torch.is_grad_enabled()):
            return super().compute_loss(
                model, cast(Inputs, inputs), return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
        sharp, batch = self.sharp, dict(inputs)
        if not self._losses or sharp.model is not model:
            sharp.model = model
            _without_input_gradients(model)
        self._losses += 1
        self._own.whole = num_items_in_batch
        loss = sharp(batch)
        if self._stats is not None:
            self._stats.add(sharp.stats)
        share = self._own.share(batch, loss.dtype)
        loss = loss if share is None else loss * share
        return (loss, self._outputs(loss)) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """See `Trainer.training_step`."""
        before = self._losses
        loss = super().training_step(*args, **kwargs)
        if self._losses == before:
            raise RuntimeError(
                f"{type(self).__name__} trained past the method: what overrides compute_loss without calling super() "
                "must come after, class Mine(SharpnessAwareTrainer, MyTrainer)"
            )
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """See `Trainer.log`."""
        if "loss" in logs:
            logs.update(self._costs.since_last())
            if self._stats is not None:
                logs.update(self._stats.to_dict())
                self._stats = StatsMean()
        super().log(logs, *args, **kwargs)

    def _made(self) -> Method:
        if self._method is not None:
            return self._method
        if self.optimizer is None:
            self.create_optimizer()
        made = cast("Callable[[Optimizer], Method]", self._method_of)(cast(Optimizer, self.optimizer))
        instance("method_of's method", made, "SAM(), BiSAM() or another (oracle, batch) -> Evaluation")
        return made

    def _outputs(self, loss: Tensor) -> SequenceClassifierOutput:
        clean = self.sharp.clean
        logits = clean.outputs if clean.targets is None else clean.outputs.movedim(1, -1)
        return SequenceClassifierOutput(loss=cast(Any, loss.detach()), logits=logits)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        os.makedirs(output_dir, exist_ok=True)  # this process may run before the one that saves the model
        rank, processes = self.args.process_index, self.args.world_size
        state = {"processes": processes, "sharp": self.sharp.get_extra_state()}
        path = _memory(output_dir, rank)
        unfinished = path.with_suffix(".unfinished")
        torch.save(state, unfinished)
        unfinished.replace(path)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._remember(resume_from_checkpoint)  # first: a state that does not match must leave the weights unchanged
        super()._load_from_checkpoint(resume_from_checkpoint, cast(Any, model))

    def _remember(self, checkpoint: str) -> None:
        paths = [path for rank in (self.args.process_index, 0) if (path := _memory(checkpoint, rank)).is_file()]
        if not paths:
            warnings.warn(
                f"{checkpoint} has no {_memory('', 0)}: it was not saved by a SharpnessAwareTrainer, or with "
                "save_only_model=True, so the method begins with an empty memory at its step 0",
                stacklevel=2,
            )
            return
        try:
            saved = torch.load(paths[0], map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:  # whose message proposes to run the code that is in the file
            raise ValueError(
                f"{paths[0]} is damaged, or holds objects other than tensors, numbers, texts and containers of these: "
                "resume from another checkpoint, or remove this file to begin with an empty memory"
            ) from None
        there, here = saved["processes"], self.args.world_size
        if there != here and saved["sharp"]["state"]:
            raise ValueError(
                f"{checkpoint} was saved by {there} process(es), and here are {here}: what {kind(self.sharp.method)} "
                f"remembers belongs to one process and its part of the batch. Resume with {there}, or remove "
                f"{_memory('', '*')} from the checkpoint to begin with an empty memory"
            )
        self.sharp.set_extra_state(saved["sharp"])


def _refuse(trainer: Trainer) -> None:
    """Raises an error for setups that are not supported."""
    args, plugin = trainer.args, getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if args.n_gpu > 1:
        raise ValueError(
            f"the Trainer would use {args.n_gpu} devices in one process (nn.DataParallel), where replicas cannot be "
            "perturbed: start one process for each with torchrun or accelerate launch, or show it one device, "
            "CUDA_VISIBLE_DEVICES=0"
        )
    if trainer.is_deepspeed_enabled:
        raise ValueError(
            "SharpnessAwareTrainer does not support DeepSpeed: ZeRO-3 frees parameters between two passes, and other "
            "stages scale losses differently. Train with DDP or FSDP2"
        )
    if trainer.is_fsdp_xla_enabled or (plugin is not None and getattr(plugin, "fsdp_version", 1) != 2):
        raise ValueError(
            'FSDP1 flattens the parameters that a perturbation moves: use FSDP2, fsdp_config={"version": 2}'
        )
    options = args.gradient_checkpointing_kwargs
    if args.gradient_checkpointing and isinstance(options, dict) and options.get("use_reentrant"):
        raise ValueError(
            "re-entrant activation checkpointing does not work with torch.autograd.grad: set "
            'activation_checkpointing_kwargs={"use_reentrant": False}'
        )


def _without_input_gradients(model: nn.Module) -> None:
    """Disables gradients of frozen embeddings' outputs, which re-entrant checkpointing needs and no parameter does."""
    for module in model.modules():
        if getattr(module, "_require_grads_hooks", None):
            cast(Any, module).disable_input_require_grads()


def _memory(folder: str, rank: int | str) -> Path:
    return Path(folder) / f"sharpness_aware_{rank}.pt"
