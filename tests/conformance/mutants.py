"""Mutants: the reference with one defect each, seen in public code, and the cases that must detect it.

Together they fail every case, because a case that cannot fail tests nothing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .reference import Looped, Reference, trainable


class NoAscent(Reference):
    """Runs the second pass at the weights too."""

    def displacements(self, weights, g):
        return [torch.zeros_like(w) for w in weights]


class Unsteady(Reference):
    """Divides by a norm of zero, and displaces weights even with rho 0."""

    def displacements(self, weights, g):
        norm = torch.cat([t.reshape(-1) for t in g]).norm()
        return [(self.rho + 1e-3) * t / norm for t in g]


class InPlace(Reference):
    """Runs both passes on the model itself and restores by subtraction: the loop of most repositories."""

    def sam(self, x, y):
        weights = trainable(self.model)
        loss = self.criterion(self.model(x), y)
        g = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
        e = self.displacements(weights, [t.to_dense() for t in g])
        with torch.no_grad():
            torch._foreach_add_(weights, e)
        h = torch.autograd.grad(self.criterion(self.model(x), y), weights, allow_unused=True)
        with torch.no_grad():
            torch._foreach_sub_(weights, e)
        return loss.detach(), dict(zip(weights, h, strict=True))


class Rebinding(Reference):
    """Restores with `p.data = old`."""

    def step(self, *parts):
        for p in trainable(self.model):
            p.data = p.data.clone()
        return super().step(*parts)


class Stale(Reference):
    """Restores the weights of an older step, and replaces missing gradients by zeros."""

    def sam(self, x, y):
        loss, gradients = super().sam(x, y)
        old = self.__dict__.setdefault("old", {})
        with torch.no_grad():
            for p, h in gradients.items():
                old.setdefault(p, p.clone())
                p.copy_(old[p])
                gradients[p] = torch.zeros_like(p) if h is None else h
        return loss, gradients


class TrainMode(Reference):
    """Sets the mode of the whole model, and runs it once more to log the loss."""

    def step(self, *parts):
        self.model.train()
        for x, _ in parts:
            self.model(x)
        return super().step(*parts)


class Forgetful(Reference):
    """Omits the state of the base optimizer."""

    def state_dict(self):
        return {"model": self.model.state_dict()}

    def load_state_dict(self, state):
        self.model.load_state_dict(state["model"])


class Deaf(Reference):
    """Keeps the initial learning rate of the base optimizer, and shares the optimizer between copies."""

    def step(self, *parts):
        for group in self.optimizer.param_groups:
            group["lr"] = self.optimizer.defaults["lr"]
        return super().step(*parts)

    def __deepcopy__(self, memo):
        return self


class Unscaled(Reference):
    """Does not call the step of the scaler."""

    def step(self, *parts):
        loss = self.backward(*parts)
        self.optimizer.step()
        return loss


class Alone(Reference):
    """Does not average over replicas."""

    def average(self, gradients):
        pass


class NotSharp(Reference):
    """Returns the plain loss, and a different one in eval mode."""

    def loss(self, x, y):
        return F.cross_entropy(self.model(x), y) * (1 if self.model.training and torch.is_grad_enabled() else 2)


MUTANTS: dict[type[Reference], set[str]] = {
    NoAscent: {
        *("sam_with_sgd", "sam_with_momentum_and_decay", "asam_with_sgd", "adamw", "tied_weights", "frozen_weights"),
        *("torch_closure", "add_param_group", "rho_per_group", "sparse_gradients", "autocast", "accumulation"),
        "step_under_ddp",
    },
    Unsteady: {"rho_zero", "zero_gradient"},
    InPlace: {
        *("restore_in_float32", "restore_in_bfloat16", "an_exception_in_the_second_pass"),
        *("not_finite_in_the_first_pass", "not_finite_in_the_second_pass"),
        *("batch_norm", "batches_tracked", "cumulative_batch_norm", "instance_norm", "spectral_norm"),
    },
    Rebinding: {"storage"},
    Stale: {"used_in_the_first_pass_only", "used_in_the_second_pass_only"},
    TrainMode: {"batch_norm_in_eval_mode", "loss_at_the_weights"},
    Forgetful: {"resume_with_momentum", "resume_with_adamw"},
    Deaf: {"learning_rate_after_loading", "step_lr", "one_cycle_lr", "reduce_on_plateau", "deep_copy"},
    Unscaled: {"grad_scaler", "overflow_in_the_first_pass", "overflow_in_the_second_pass"},
    Alone: {"replicas"},
    NotSharp: {"a_sum_of_losses", "accumulation_by_backward", "plain_in_eval_mode"},
}

no_ascent, alone = Looped(NoAscent), Looped(Alone)  # module attributes, for other processes
