"""Cases: one behaviour that users rely on each. The docstring is the statement that the table prints.

A case gets an adapter, trains small models with it, and raises if the statement does not hold. Most cases compare with
the reference after the same actions, in float64 to seven digits, or compare bits with an earlier state. A case names
the feature that it needs, and is not applicable to implementations that do not offer it. Only a loss can express the
`LOSS` cases.
"""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau, StepLR

from .adapter import GRAD_SCALER, LOSS, RHO_PER_GROUP, SPARSE, Adapter, Batch, Trainer
from .reference import adapter as reference

RHO = 0.5
TOLERANCE = 1e-7


@dataclass(frozen=True)
class Case:
    group: str
    check: Callable[[Adapter], None]
    needs: str | None = None
    processes: int = 1

    @property
    def name(self) -> str:
        return self.check.__name__

    @property
    def statement(self) -> str:
        return " ".join((self.check.__doc__ or "").split())


CASES: list[Case] = []


def case(group: str, needs: str | None = None, processes: int = 1) -> Callable[[Callable[[Adapter], None]], Any]:
    def add(check: Callable[[Adapter], None]) -> Callable[[Adapter], None]:
        CASES.append(Case(group, check, needs, processes))
        return check

    return add


# Models, batches, trainers.


def mlp(*middle: nn.Module, dtype: torch.dtype = torch.double) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), *middle, nn.Tanh(), nn.Linear(8, 4)).to(dtype)


def batch(seed: int = 0, n: int = 8, dtype: torch.dtype = torch.double) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 6, generator=generator, dtype=torch.double).to(dtype)
    return x, torch.randint(4, (n,), generator=generator)


def halves(whole: Batch) -> list[Batch]:
    return list(zip(*[t.chunk(2) for t in whole], strict=True))


def make(adapter: Adapter, model: nn.Module, **changes: Any) -> Trainer:
    """SAM with SGD by default; `changes` override the arguments."""
    arguments = {"loss": F.cross_entropy, "params": list(model.parameters()), "base": SGD, "rho": RHO, "lr": 0.1}
    return adapter.make(model, **{**arguments, **changes})


def seeded(model: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(3)
    return model()


def train(trainer: Trainer, steps: Iterable[int] = range(3)) -> None:
    for seed in steps:
        trainer.step(batch(seed))


def bits(tensors: Iterable[Tensor]) -> list[Any]:
    """The bytes of the tensors, so that NaN equals itself in comparisons."""
    return [t.detach().clone().reshape(-1).view(torch.uint8).tolist() for t in tensors]


def weights(model: nn.Module) -> list[Any]:
    return bits(model.parameters())


def close(actual: Iterable[Tensor], expected: Iterable[Tensor], what: str = "weights", to: float = TOLERANCE) -> None:
    difference = 0.0
    for a, b in zip(actual, expected, strict=True):
        assert a.isfinite().all(), f"{what} are not finite"
        difference = max(difference, (a - b).abs().max().item())
    assert difference <= to, f"{what} are off by {difference:.1g}"


def agree(
    adapter: Adapter,
    model: Callable[[], nn.Module] = mlp,
    actions: Callable[[Trainer], Any] = train,
    to: float = TOLERANCE,
    **changes: Any,
) -> None:
    """Assert that the same actions give the weights of the reference."""
    trained: list[list[Tensor]] = []
    for implementation in (adapter, reference):
        trainer = make(implementation, seeded(model), **changes)
        actions(trainer)
        trained.append([p.detach() for p in trainer.model.parameters()])
    close(*trained, to=to)


# Numerics.


class Quadratic(nn.Module):
    """f(w) = sum_i a_i w_i^2 / 2, independent of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.double))

    def forward(self, x: Tensor) -> Tensor:
        return (torch.tensor([1.0, 4.0, 9.0], dtype=torch.double) * self.weight**2).sum() / 2 + 0 * x.sum()


def value(outputs: Tensor, targets: Tensor) -> Tensor:
    return outputs


def steps_on_a_quadratic(adapter: Adapter, *expected: tuple[float, ...], **changes: Any) -> None:
    model = Quadratic()
    trainer = make(adapter, model, loss=value, **changes)
    for row in expected:
        trainer.step(batch())
        close([model.weight.detach()], [torch.tensor(row, dtype=torch.double)])


@case("numerics")
def sam_with_sgd(adapter: Adapter) -> None:
    """Two steps of SAM with SGD on a quadratic give the known values to seven digits."""
    first, second = (0.899458469639, -1.182671028446, 0.028068020377), (0.808579972028, -0.689981586205, 0.000449394423)
    steps_on_a_quadratic(adapter, first, second, rho=0.05)


@case("numerics")
def sam_with_momentum_and_decay(adapter: Adapter) -> None:
    """Three steps with momentum and weight decay give the known values; the ascent excludes weight decay."""
    steps_on_a_quadratic(
        adapter,
        (0.898458469639, -1.180671028446, 0.027568020377),
        (0.715393572846, 0.049795625591, -0.424778938038),
        (0.477461940489, 1.136224668333, -0.404991043586),
        rho=0.05,
        momentum=0.9,
        weight_decay=0.01,
    )


@case("numerics")
def asam_with_sgd(adapter: Adapter) -> None:
    """Two steps of ASAM (eta 0) on a quadratic give the known values to seven digits."""
    first, second = (0.896911358059, -0.804653831569, 0.018727500349), (0.793917529259, -0.329104910565, 0.001862941244)
    steps_on_a_quadratic(adapter, first, second, rho=0.5, adaptive=True)


@case("numerics")
def adamw(adapter: Adapter) -> None:
    """A network trained with AdamW as the base optimizer has the same weights as the reference."""
    agree(adapter, base=AdamW, lr=1e-2, weight_decay=0.1)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(6, 6).double(), nn.Linear(6, 6).double()
        self.decode.weight = self.encode.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(torch.tanh(self.encode(x)))[:, :4]


@case("numerics")
def tied_weights(adapter: Adapter) -> None:
    """A matrix that two layers share is displaced once."""
    agree(adapter, Tied)


@case("numerics")
def frozen_weights(adapter: Adapter) -> None:
    """Frozen parameters are excluded from the norm, the step and the weight decay."""

    def half_frozen() -> nn.Module:
        model = mlp()
        model[0].requires_grad_(False)
        return model

    agree(adapter, half_frozen, weight_decay=0.1)


@case("numerics")
def rho_zero(adapter: Adapter) -> None:
    """With rho 0 the weights are bit-identical to those of the base optimizer alone."""
    model, plain = seeded(mlp), seeded(mlp)
    train(make(adapter, model, rho=0.0, base=AdamW))
    optimizer = AdamW(plain.parameters(), lr=0.1)
    for seed in range(3):
        x, y = batch(seed)
        optimizer.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        optimizer.step()
    assert weights(model) == weights(plain), "weights are not those of the base optimizer"


@case("numerics")
def zero_gradient(adapter: Adapter) -> None:
    """A zero gradient leaves the weights unchanged and produces no NaN."""
    model = seeded(mlp)
    before = weights(model)
    make(adapter, model, loss=lambda outputs, targets: 0 * F.cross_entropy(outputs, targets)).step(batch())
    assert weights(model) == before, "weights moved"


# Exact restore.


def two_hundred_steps_of_length_zero(adapter: Adapter, dtype: torch.dtype) -> None:
    model = seeded(lambda: mlp(dtype=dtype))
    before = weights(model)
    trainer = make(adapter, model, lr=0.0)
    for seed in range(200):
        trainer.step(batch(seed, dtype=dtype))
    assert weights(model) == before, "weights moved"


@case("restore")
def restore_in_float32(adapter: Adapter) -> None:
    """200 steps at learning rate 0 leave float32 weights bit-identical."""
    two_hundred_steps_of_length_zero(adapter, torch.float32)


@case("restore")
def restore_in_bfloat16(adapter: Adapter) -> None:
    """200 steps at learning rate 0 leave bfloat16 weights bit-identical."""
    two_hundred_steps_of_length_zero(adapter, torch.bfloat16)


class Branches(nn.Module):
    """Two branches; `used` says for each forward pass whether the second one is used (stochastic depth)."""

    def __init__(self, *used: bool) -> None:
        super().__init__()
        self.always, self.sometimes = nn.Linear(6, 4).double(), nn.Linear(6, 4).double()
        passes = iter(used)
        self.next_used = lambda: next(passes)  # copies of the module share it

    def forward(self, x: Tensor) -> Tensor:
        return self.always(x) + (self.sometimes(x) if self.next_used() else 0)


@case("restore")
def used_in_the_first_pass_only(adapter: Adapter) -> None:
    """A parameter used only in the first pass (stochastic depth) is restored and neither updated nor decayed."""
    agree(adapter, lambda: Branches(True, False, True, False), lambda t: train(t, range(2)), weight_decay=0.1)


@case("restore")
def used_in_the_second_pass_only(adapter: Adapter) -> None:
    """A parameter used only in the second pass is updated from its current value, also if the user has changed it."""

    def actions(trainer: Trainer) -> None:
        train(trainer, [0])
        with torch.no_grad():
            for p in trainer.model.parameters():
                p.mul_(1.5)
        train(trainer, [1])

    agree(adapter, lambda: Branches(True, True, False, True), actions)


def at_pass(k: int, model: nn.Module, act: Callable[[Tensor], Tensor]) -> None:
    """Apply `act` to the outputs of the k-th forward pass from now on."""
    count = iter(range(1, 1000))
    model.register_forward_hook(lambda module, args, outputs: act(outputs) if next(count) == k else outputs)


@case("restore")
def an_exception_in_the_second_pass(adapter: Adapter) -> None:
    """After an exception in the second pass (also KeyboardInterrupt), the weights are those before the step."""
    for error in (RuntimeError, KeyboardInterrupt):

        def fail(outputs: Tensor, error: type[BaseException] = error) -> Tensor:
            raise error

        model = seeded(mlp)
        before = weights(model)
        at_pass(2, model, fail)
        with suppress(error):
            make(adapter, model).step(batch())
            raise AssertionError("the exception did not arrive")
        assert weights(model) == before, f"the weights stay displaced after {error.__name__}"


class Careful(SGD):
    """SGD that skips steps with non-finite gradients."""

    def step(self, closure: Any = None) -> Any:
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        return super().step(closure) if all(g.isfinite().all() for g in gradients) else None


def not_finite_in(adapter: Adapter, k: int) -> None:
    model, other = seeded(mlp), seeded(mlp)
    before = weights(model)
    trainer = make(adapter, model, base=Careful)
    at_pass(k, model, lambda outputs: outputs * torch.nan)
    train(trainer, [0])
    assert weights(model) == before, "weights are not as before"
    train(trainer, [1])
    expected = make(reference, other)
    train(expected, [1])
    close(model.parameters(), other.parameters())


@case("restore")
def not_finite_in_the_first_pass(adapter: Adapter) -> None:
    """After NaN in the first pass, if the base optimizer skips the step, training continues as without that batch."""
    not_finite_in(adapter, 1)


@case("restore")
def not_finite_in_the_second_pass(adapter: Adapter) -> None:
    """After NaN in the second pass, if the base optimizer skips the step, training continues as without that batch."""
    not_finite_in(adapter, 2)


@case("restore")
def storage(adapter: Adapter) -> None:
    """The weights keep their storage: weights that are views of a flat vector remain views."""
    model = seeded(mlp)
    flat = nn.utils.parameters_to_vector(model.parameters()).detach()
    nn.utils.vector_to_parameters(flat, model.parameters())
    addresses = [p.data_ptr() for p in model.parameters()]
    train(make(adapter, model))
    assert [p.data_ptr() for p in model.parameters()] == addresses, "the weights are new tensors after a step"
    assert torch.equal(flat, nn.utils.parameters_to_vector(model.parameters())), "the flat vector did not follow"


# Buffers.


def buffers_of_a_plain_loop(adapter: Adapter, model: Callable[[], nn.Module], suffix: str = "") -> None:
    """Compare buffers whose names end in `suffix` after steps at learning rate 0 with those of a plain forward loop."""
    trained, plain = seeded(model), seeded(model)
    train(make(adapter, trained, lr=0.0))
    for seed in range(3):
        plain(batch(seed)[0])
    for (name, actual), expected in zip(trained.named_buffers(), plain.buffers(), strict=True):
        if name.endswith(suffix):
            after = f"after three steps, the values of {name.split('.')[-1]}"
            close([actual.double()], [expected.double()], after)


@case("buffers")
def batch_norm(adapter: Adapter) -> None:
    """BatchNorm's running mean and variance equal those of a plain loop: they are updated once per step."""
    buffers_of_a_plain_loop(adapter, lambda: mlp(nn.BatchNorm1d(8)), "mean")
    buffers_of_a_plain_loop(adapter, lambda: mlp(nn.BatchNorm1d(8)), "var")


@case("buffers")
def batches_tracked(adapter: Adapter) -> None:
    """BatchNorm's num_batches_tracked counts a step once."""
    buffers_of_a_plain_loop(adapter, lambda: mlp(nn.BatchNorm1d(8)), "num_batches_tracked")


@case("buffers")
def cumulative_batch_norm(adapter: Adapter) -> None:
    """With momentum=None, BatchNorm's running mean is the average over the steps."""
    buffers_of_a_plain_loop(adapter, lambda: mlp(nn.BatchNorm1d(8, momentum=None)), "mean")


@case("buffers")
def batch_norm_in_eval_mode(adapter: Adapter) -> None:
    """A BatchNorm layer in eval mode inside a model in training mode keeps its statistics."""
    buffers_of_a_plain_loop(adapter, lambda: mlp(nn.BatchNorm1d(8).eval()))


class Instances(nn.InstanceNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[:, :, None] * torch.arange(3, dtype=x.dtype)).sum(2)


@case("buffers")
def instance_norm(adapter: Adapter) -> None:
    """InstanceNorm's running mean equals that of a plain loop."""
    buffers_of_a_plain_loop(adapter, lambda: mlp(Instances(8, track_running_stats=True)), "mean")


@case("buffers")
def spectral_norm(adapter: Adapter) -> None:
    """spectral_norm's vectors take one power iteration per step."""
    buffers_of_a_plain_loop(adapter, lambda: mlp(nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))))


# Checkpoints and copies.


def resumed_is_uninterrupted(adapter: Adapter, **changes: Any) -> None:
    whole = make(adapter, seeded(mlp), **changes)
    train(whole)
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    train(whole, range(3, 6))

    file.seek(0)
    resumed = make(adapter, mlp(), **changes)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    train(resumed, range(3, 6))
    close(resumed.model.parameters(), whole.model.parameters(), to=0.0)


@case("resume")
def resume_with_momentum(adapter: Adapter) -> None:
    """Training resumed from `state_dict()` is bit-identical to uninterrupted training, with SGD and momentum."""
    resumed_is_uninterrupted(adapter, momentum=0.9)


@case("resume")
def resume_with_adamw(adapter: Adapter) -> None:
    """Training resumed from `state_dict()` is bit-identical to uninterrupted training, with AdamW."""
    resumed_is_uninterrupted(adapter, base=AdamW, lr=1e-2)


@case("resume")
def learning_rate_after_loading(adapter: Adapter) -> None:
    """The base optimizer uses a learning rate that is set after loading."""

    def actions(trainer: Trainer) -> None:
        train(trainer, [0])
        trainer.load_state_dict(copy.deepcopy(trainer.state_dict()))
        trainer.optimizer.param_groups[0]["lr"] = 0.01
        train(trainer, [1])

    agree(adapter, actions=actions, momentum=0.9)


@case("resume")
def deep_copy(adapter: Adapter) -> None:
    """A deep copy of model and optimizer together trains independently, as with torch's optimizers."""
    trainer = make(adapter, seeded(mlp), momentum=0.9)
    train(trainer, [0])
    other, before = copy.deepcopy(trainer), weights(trainer.model)
    train(other, [1])
    assert weights(trainer.model) == before, "the copy moves the original's weights"
    train(trainer, [1])
    close(other.model.parameters(), trainer.model.parameters(), to=0.0)


# Use as a torch optimizer.


@case("optimizer")
def torch_closure(adapter: Adapter) -> None:
    """`optimizer.step(closure)` alone, with a closure as torch specifies it, is a sharpness-aware step."""

    def actions(trainer: Trainer) -> None:
        for seed in range(3):
            trainer.optimizer.step(trainer.closure(batch(seed)))

    agree(adapter, actions=actions)


@case("optimizer")
def add_param_group(adapter: Adapter) -> None:
    """Parameters that `add_param_group` adds during training are displaced and trained."""

    def actions(trainer: Trainer) -> None:
        train(trainer, [0])
        trainer.model.append(nn.Linear(4, 4).double())
        trainer.optimizer.add_param_group({"params": list(trainer.model[-1].parameters())})
        train(trainer, [1, 2])

    agree(adapter, actions=actions, momentum=0.9)


def scheduled(adapter: Adapter, scheduler: Callable[[torch.optim.Optimizer], Any], *metrics: float) -> None:
    def actions(trainer: Trainer) -> None:
        schedule = scheduler(trainer.optimizer)
        for seed in range(4):
            trainer.step(batch(seed))
            schedule.step(*metrics)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        agree(adapter, actions=actions, momentum=0.9)


@case("optimizer")
def step_lr(adapter: Adapter) -> None:
    """StepLR works on the base optimizer without a warning."""
    scheduled(adapter, lambda optimizer: StepLR(optimizer, 2))


@case("optimizer")
def one_cycle_lr(adapter: Adapter) -> None:
    """OneCycleLR, which also changes the momentum, works on the base optimizer without a warning."""
    scheduled(adapter, lambda optimizer: OneCycleLR(optimizer, 0.2, total_steps=6))


@case("optimizer")
def reduce_on_plateau(adapter: Adapter) -> None:
    """ReduceLROnPlateau works on the base optimizer without a warning."""
    scheduled(adapter, lambda optimizer: ReduceLROnPlateau(optimizer, patience=0), 1.0)


@case("optimizer")
def loss_at_the_weights(adapter: Adapter) -> None:
    """The loss at the weights before the step is available for logging without a third forward pass."""
    model, passes = seeded(mlp), []
    trainer, (x, y) = make(adapter, model), batch()
    expected = F.cross_entropy(model(x), y).detach()
    model.register_forward_hook(lambda *_: passes.append(1))
    close([torch.as_tensor(trainer.step((x, y)))], [expected], "losses")
    assert len(passes) <= 2, f"a step has {len(passes)} forward passes"


@case("optimizer", needs=RHO_PER_GROUP)
def rho_per_group(adapter: Adapter) -> None:
    """Each parameter group may have its own rho."""
    trained = []
    for implementation in (adapter, reference):
        model = seeded(mlp)
        groups = [{"params": list(model[i].parameters()), "rho": rho} for i, rho in ((0, 0.5), (2, 0.1))]
        train(make(implementation, model, params=groups))
        trained.append(model.parameters())
    close(*trained)


@case("optimizer", needs=SPARSE)
def sparse_gradients(adapter: Adapter) -> None:
    """An embedding with sparse gradients is displaced and trained."""
    tokens = torch.tensor([[0, 2, 2], [4, 1, 0]]), torch.tensor([0, 3])
    agree(
        adapter,
        lambda: nn.Sequential(nn.Embedding(6, 2, sparse=True), nn.Flatten(), nn.Linear(6, 4)).double(),
        lambda trainer: trainer.step(tokens),
    )


# Mixed precision.


class Autocast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(dtype=torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.net(x).float()


@case("AMP")
def autocast(adapter: Adapter) -> None:
    """A model under bfloat16 autocast trains its float32 weights, up to bfloat16 rounding."""

    def actions(trainer: Trainer) -> None:
        trainer.step(batch(dtype=torch.float32))

    agree(adapter, Autocast, actions, to=2e-3)


@case("AMP", needs=GRAD_SCALER)
def grad_scaler(adapter: Adapter) -> None:
    """The update with a GradScaler equals the update without one."""
    trained = []
    for scaler in (torch.amp.GradScaler("cpu", init_scale=1024.0), None):
        model = seeded(lambda: mlp(dtype=torch.float32))
        trainer = make(adapter if scaler else reference, model, scaler=scaler, momentum=0.9)
        for seed in range(3):
            trainer.step(batch(seed, dtype=torch.float32))
        trained.append(model.parameters())
    close(*trained, to=1e-5)


def overflow_in(adapter: Adapter, k: int) -> None:
    model = seeded(lambda: mlp(dtype=torch.float32))
    scaler, before = torch.amp.GradScaler("cpu", init_scale=1024.0), weights(model)

    def overflow(outputs: Tensor) -> Tensor:
        outputs.register_hook(lambda gradient: gradient * torch.inf)
        return outputs

    trainer = make(adapter, model, scaler=scaler)
    at_pass(k, model, overflow)
    trainer.step(batch(dtype=torch.float32))
    assert weights(model) == before, "the step was not skipped"
    assert scaler.get_scale() == 512.0, f"the scale went from 1024 to {scaler.get_scale():g}"
    trainer.step(batch(dtype=torch.float32))
    assert weights(model) != before, "the next step was skipped too"
    assert all(p.isfinite().all() for p in model.parameters()), "weights are not finite"


@case("AMP", needs=GRAD_SCALER)
def overflow_in_the_first_pass(adapter: Adapter) -> None:
    """If gradients overflow in the first pass, the step is skipped and the scale is halved once."""
    overflow_in(adapter, 1)


@case("AMP", needs=GRAD_SCALER)
def overflow_in_the_second_pass(adapter: Adapter) -> None:
    """If gradients overflow in the second pass, the step is skipped and the scale is halved once."""
    overflow_in(adapter, 2)


# Batches in parts.


def either(actual: nn.Module, *meanings: nn.Module) -> None:
    """Assert that the weights equal those of one of the accepted meanings."""
    gaps = [
        max((a - b).abs().max().item() for a, b in zip(actual.parameters(), m.parameters(), strict=True))
        for m in meanings
    ]
    assert min(gaps) <= TOLERANCE, f"weights are off by {min(gaps):.1g}"


def meanings_of(parts: list[Batch]) -> list[nn.Module]:
    """Models after one step of SAM on the whole batch, and of the mean of SAM over its parts (m-sharpness)."""
    trainers = [make(reference, seeded(mlp)) for _ in range(2)]
    trainers[0].step(tuple(torch.cat(t) for t in zip(*parts, strict=True)))
    trainers[1].step(*parts)
    return [t.model for t in trainers]


@case("accumulation")
def accumulation(adapter: Adapter) -> None:
    """A step on a batch in two parts equals SAM on the whole batch, or the mean of SAM over the parts (m-sharpness)."""
    parts = halves(batch())
    trainer = make(adapter, seeded(mlp))
    trainer.step(*parts)
    either(trainer.model, *meanings_of(parts))


def parallel() -> nn.Module:
    return nn.parallel.DistributedDataParallel(seeded(mlp))


@case("DDP", processes=2)
def replicas(adapter: Adapter) -> None:
    """Under DistributedDataParallel with two processes, the replicas are bit-identical after three steps."""
    model = parallel()
    trainer = make(adapter, model, momentum=0.9)
    for seed in range(3):
        trainer.step(halves(batch(seed))[dist.get_rank()])
    mine = nn.utils.parameters_to_vector(model.parameters()).detach()
    everyone = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(everyone, mine)
    assert torch.equal(*everyone), f"replicas are {(everyone[0] - everyone[1]).abs().max():.1g} apart"


@case("DDP", processes=2)
def step_under_ddp(adapter: Adapter) -> None:
    """A step under DistributedDataParallel equals SAM on the whole batch, or the mean of SAM over the replicas."""
    model, parts = parallel(), halves(batch())
    make(adapter, model).step(parts[dist.get_rank()])
    either(model, *meanings_of(parts))


# Losses only.


def gradients(model: nn.Module, backward: Callable[[], Any]) -> list[Tensor]:
    model.zero_grad()
    backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@case("loss only", needs=LOSS)
def a_sum_of_losses(adapter: Adapter) -> None:
    """The loss plus a penalty has the sum of both gradients; that of the penalty is taken at the weights themselves."""
    model, (x, y) = seeded(mlp), batch()

    def penalty() -> Tensor:
        return 0.1 * nn.utils.parameters_to_vector(model.parameters()).pow(2).sum()

    expected = make(reference, seeded(mlp))
    plain = gradients(model, lambda: penalty().backward())
    trainer: Any = make(adapter, model)
    actual = gradients(model, lambda: (trainer.loss(x, y) + penalty()).backward())
    sharp = gradients(expected.model, expected.closure((x, y)))
    close(actual, [g + h for g, h in zip(plain, sharp, strict=True)], "gradients")


@case("loss only", needs=LOSS)
def accumulation_by_backward(adapter: Adapter) -> None:
    """`(loss / n).backward()` on n parts, freed one by one, gives the mean of SAM over the parts (m-sharpness)."""
    model, parts = seeded(mlp), halves(batch())
    trainer: Any = make(adapter, model)
    for part in parts:
        (trainer.loss(*part) / 2).backward()
    trainer.optimizer.step()
    close(model.parameters(), meanings_of(parts)[1].parameters())


@case("loss only", needs=LOSS)
def plain_in_eval_mode(adapter: Adapter) -> None:
    """In eval mode and under no_grad the loss is the plain loss, so validation needs no separate function."""
    model, (x, y) = seeded(lambda: mlp(nn.BatchNorm1d(8))), batch()
    trainer: Any = make(adapter, model)
    with torch.no_grad():
        in_training = trainer.loss(x, y)
        close([in_training], [F.cross_entropy(copy.deepcopy(model)(x), y)], "losses")
    model.eval()
    close([trainer.loss(x, y).detach()], [F.cross_entropy(model(x), y).detach()], "losses")
