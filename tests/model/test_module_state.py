"""The state of a module moves once per step, in the pass at the weights."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bisam import (
    BSAM,
    ESAM,
    GSAM,
    KSAM,
    MSAM,
    RSAM,
    SAM,
    BiSAM,
    Evaluation,
    ModelOracle,
    MomentumSAM,
    NegLog,
    Oracle,
    Query,
    SAMPa,
    SharpnessAware,
    Vector,
    cross_entropy,
    displaced,
    next_step,
)
from bisam.perturbations import L2
from tests.model.test_oracle import Storages
from tests.support import cases
from tests.support.cases import BASIC, bits, buffers, everything, normed, parameters
from tests.support.doubles import ActingLoss, throw
from tests.support.runs import each_basic_method, twins


class Replacing(nn.Module):
    """Running statistics that are a new tensor each time."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4).double()
        self.register_buffer("average", torch.zeros(4).double())

    def forward(self, x: Tensor) -> Tensor:
        out = self.linear(x)
        self.average = 0.9 * self.average + 0.1 * out.detach().mean(0)
        return out


class Instance(nn.InstanceNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[:, :, None].expand(-1, -1, 3) * torch.arange(3).double()).sum(2)


WITH_BUFFERS = {
    "BatchNorm": normed,
    "BatchNorm(momentum=None)": lambda: cases.mlp(lambda n: nn.BatchNorm1d(n, momentum=None)),
    "BatchNorm.eval()": lambda: cases.mlp(lambda n: nn.BatchNorm1d(n).eval()),
    "BatchNorm, another in eval()": lambda: nn.Sequential(nn.BatchNorm1d(6).double().eval(), *normed()),
    "InstanceNorm": lambda: cases.mlp(lambda n: Instance(n, track_running_stats=True)),
    "convnet": cases.convnet,
    "spectral_norm": lambda: nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Linear(6, 5).double()), nn.Linear(5, 4).double()
    ),
    "old spectral_norm": lambda: nn.Sequential(
        nn.utils.spectral_norm(nn.Linear(6, 5).double()), nn.Linear(5, 4).double()
    ),
    "replaced by assignment": Replacing,
}


@pytest.mark.parametrize("method", BASIC[:3], ids=["SAM", "BiSAM", "ASAM"])
@pytest.mark.parametrize("make", WITH_BUFFERS.values(), ids=WITH_BUFFERS)
def test_buffers_are_those_of_a_plain_loop(make, method):
    model, plain = twins(make)
    sharp = SharpnessAware(model, method, cross_entropy)
    start = buffers(model)
    for step in range(3):
        sharp(*cases.batch(step))
        plain(cases.batch(step)[0])
        assert buffers(model) == buffers(plain)
    assert (buffers(model) != start) == (make is not WITH_BUFFERS["BatchNorm.eval()"])
    assert parameters(model) == parameters(plain)


@pytest.mark.parametrize("query", [1, 2])
@pytest.mark.parametrize("make", WITH_BUFFERS.values(), ids=WITH_BUFFERS)
def test_buffers_are_as_before_a_failed_call(make, query):
    model = make()
    loss = ActingLoss(query, lambda losses: throw(RuntimeError("boom"))())
    owners = {name: b.data_ptr() for name, b in model.named_buffers()}
    before = everything(model)
    with pytest.raises(RuntimeError, match="boom"):
        SharpnessAware(model, SAM(L2(0.5)), loss)(*cases.batch())
    assert everything(model) == before
    assert {name: b.data_ptr() for name, b in model.named_buffers()} == owners


@each_basic_method
def test_batches_are_counted_once(method):
    model = normed()
    sharp = SharpnessAware(model, method, cross_entropy)
    for step in range(1, 4):
        sharp(*cases.batch(step))
        assert model[1].num_batches_tracked == step * (3 if isinstance(method, MSAM) else 1)


def test_msam_moves_buffers_as_a_plain_loop_over_the_micro_batches():
    model, plain = twins(normed)
    SharpnessAware(model, MSAM(3, SAM(L2(0.5))), cross_entropy)(*cases.batch())
    for x in cases.batch()[0].split(3):
        plain(x)
    assert buffers(model) == buffers(plain)


def test_track_overrides_which_query_moves_buffers():
    model = normed()
    oracle = ModelOracle(model, cross_entropy)
    before = buffers(model)
    g = oracle.query(cases.batch(), track=False).gradient
    assert buffers(model) == before
    oracle.query(cases.batch(), at=g, track=True)
    assert buffers(model) != before


def test_an_oracle_shows_the_buffers_as_they_are_now():
    model = cases.convnet()
    oracle = ModelOracle(model, cross_entropy)
    oracle.query(cases.batch())
    assert [b is c for b, c in zip(oracle.buffers, model.buffers(), strict=True)] == [True] * 6


def test_buffers_of_a_loss_module_are_treated_alike():
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros((), dtype=torch.long))

        def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
            self.calls += 1
            return cross_entropy(outputs, targets)

    sharp = SharpnessAware(cases.mlp(), SAM(), Counting())
    sharp(*cases.batch())
    assert sharp.loss.calls == 1


# The contract of `bisam.model.module_state`, held against an oracle that copies the whole model for each query.


class SlowOracle(Oracle):
    """Each query runs a deep copy of the model, in the state that the contract states."""

    def __init__(self, model: nn.Module, step: int, state: dict[str, Any]) -> None:
        self.model, self.step, self.state, self.loss = model, step, state, cross_entropy
        self.saw: nn.Module | None = None

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    @property
    def weights(self) -> Vector:
        return Vector([p.detach().clone() for p in self.parameters])

    @property
    def names(self) -> list[str]:
        return [name for name, p in self.model.named_parameters() if p.requires_grad]

    layers = names

    def next_part(self) -> None:
        self.saw = None

    def ask(self, queries) -> list[Evaluation]:
        return [self.answer(query) for query in queries]

    def answer(self, query: Query) -> Evaluation:
        at, begin = query.take(), self.model
        if not query.tracks and self.saw is not None:
            begin = self.saw
        run = copied(begin)
        own = [p for p in run.parameters() if p.requires_grad]
        for i, (p, w) in enumerate(zip(own, self.weights, strict=True)):
            p.data.copy_(w if at is None else w + at.tensors[i])
        x, y = query.batch
        outputs = run(x)
        losses = (query.objective or cross_entropy)(outputs, y)
        grad = torch.autograd.grad(losses.mean(), own) if query.grad else None
        if query.tracks:
            self.saw, weights = self.model, self.weights
            self.model = copied(run)
            for p, w in zip(self.parameters, weights, strict=True):
                p.data.copy_(w)
        return Evaluation(losses.detach(), None if grad is None else Vector(grad), outputs.detach())


def copied(model: nn.Module) -> nn.Module:
    for module in model.modules():  # a graph cannot be copied
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                vars(module)[name] = value.detach()
    return copy.deepcopy(model)


MIX = {
    "in place": lambda m, new: m.c.mul_(0.7).add_(new, alpha=0.3),
    "data in place": lambda m, new: m.c.data.mul_(0.7).add_(new, alpha=0.3),
    "assigned": lambda m, new: hold(m, 0.7 * m.c + 0.3 * new),
    "data assigned": lambda m, new: setattr(m.c, "data", 0.7 * m.c + 0.3 * new),
    "both": lambda m, new: hold(m, m.c.mul_(0.7) + 0.3 * new),
}
HOLD = {
    "buffer": lambda m, t: m.register_buffer("c", t),
    "frozen parameter": lambda m, t: setattr(m, "c", nn.Parameter(t, requires_grad=False)),
    "attribute": lambda m, t: setattr(m, "c", t),
}


def hold(module: nn.Module, tensor: Tensor) -> None:
    if "c" in module._parameters:
        tensor = nn.Parameter(tensor.detach(), requires_grad=False)
    module.c = tensor


class Centred(nn.Module):
    """A layer that reads an average of its outputs and then moves it."""

    def __init__(self, holder: str, mix: str) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4).double()
        HOLD[holder](self, torch.zeros(4).double())
        self.mix = mix

    def forward(self, x: Tensor) -> Tensor:
        out = self.linear(x)
        centred = out - 2 * self.c
        with torch.no_grad():
            MIX[self.mix](self, out.mean(0))
        return centred.tanh() * 3


class Acting(nn.Module):
    """A linear layer with a state of some kind."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4).double()
        self.start()

    def start(self) -> None: ...

    def act(self, out: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.linear(x))


class BufferOfNone(Acting):
    def start(self):
        self.register_buffer("c", None)

    def act(self, out):
        now = out.detach().mean(0)
        self.c = now if self.c is None else 0.7 * self.c + 0.3 * now
        return out - self.c


class NewBuffer(Acting):
    def act(self, out):
        now = out.detach().mean(0)
        if "c" in self._buffers:
            self.c = 0.7 * self.c + 0.3 * now
        else:
            self.register_buffer("c", now)
        return out - self.c


class NumberAtFirst(Acting):
    def start(self):
        self.c = 0.0

    def act(self, out):
        self.c = 0.7 * self.c + 0.3 * out.detach().mean(0)
        return out - self.c


class Goes(Acting):
    """A buffer that is there in every second step only."""

    def start(self):
        self.register_buffer("c", torch.ones(4).double())

    def act(self, out):
        if "c" in self._buffers:
            out = out - self.c
            del self.c
        else:
            self.register_buffer("c", out.detach().mean(0))
        return out


class Grows(Acting):
    """A queue that grows, by `.data` and by assignment."""

    def start(self):
        self.register_buffer("queue", torch.ones(1, 4).double())
        self.register_buffer("other", torch.ones(1, 4).double())

    def act(self, out):
        new = out.detach()[:2]
        result = out - self.queue.mean(0) + self.other.mean(0)
        self.queue.data = torch.cat([self.queue, new])
        self.other = torch.cat([self.other, 2 * new])
        return result


class Expanded(Acting):
    """A buffer that is an expanded view of an average, and one that never moves."""

    def start(self):
        self.register_buffer("c", torch.zeros(4).double().expand(8, 4))
        self.register_buffer("fixed", torch.arange(4.0).double().expand(8, 4), persistent=False)

    def act(self, out):
        result = out - self.c[: len(out)] + self.fixed[: len(out)]
        self.c = (0.7 * self.c[0] + 0.3 * out.detach().mean(0)).expand(8, 4)
        return result


class Late(Acting):
    """Begins to move in the fourth pass of a plain loop."""

    def start(self):
        self.wide = nn.Sequential(nn.Linear(4, 64), nn.Linear(64, 4)).double()
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("c", torch.zeros(4).double())

    def act(self, out):
        result = self.wide(out) - self.c
        self.seen += 1
        if self.seen >= 3:
            self.c.mul_(0.7).add_(out.detach().mean(0), alpha=0.3)
        return result


class Recurrent(Acting):
    """A recurrent layer that carries its state from batch to batch in a buffer."""

    def start(self):
        self.cell = nn.GRUCell(4, 4).double()
        self.register_buffer("h", torch.zeros(8, 4).double())

    def act(self, out):
        h = self.cell(out, self.h[: len(out)])
        self.h = torch.cat([h.detach(), self.h[len(out) :]])
        return h * 4


class Momentum(Acting):
    """The average of another encoder's weights is moved in the forward pass, as in MoCo."""

    def start(self):
        self.keys = nn.Linear(6, 4).double().requires_grad_(False)

    def forward(self, x):
        with torch.no_grad():
            for a, b in zip(self.keys.parameters(), self.linear.parameters(), strict=True):
                a.data = a.data * 0.7 + b.data * 0.3
        return self.linear(x) - self.keys(x)


STATEFUL = {
    **{
        f"{h}, {m}": partial(Centred, h, m) for h in HOLD for m in MIX if (h, m) != ("frozen parameter", "with a graph")
    },
    **{
        kind.__name__: kind
        for kind in (BufferOfNone, NewBuffer, NumberAtFirst, Goes, Grows, Expanded, Late, Recurrent, Momentum)
    },
}
QUERIES = {
    "SAM": SAM(L2(0.5)),
    "BiSAM": BiSAM(0.5),
    "three queries": GSAM(L2(0.5), ascent=NegLog()),  # the first of which does not track
    "micro-batches": MSAM(4, GSAM(L2(0.5), ascent=NegLog())),
    "momentum": MomentumSAM(L2(0.5)),
    "smoothed": RSAM(0.1, SAM(L2(0.5))),  # none is at the weights
    "hardest": KSAM(8, SAM(L2(0.5))),
}


@pytest.mark.parametrize("method", QUERIES.values(), ids=QUERIES)
@pytest.mark.parametrize("make", STATEFUL.values(), ids=STATEFUL)
def test_passes_begin_and_leave_the_state_as_copies_of_the_model_do(make, method):
    torch.manual_seed(0)
    model = make()
    slow, memory = copied(model), {}
    sharp = SharpnessAware(model, method, cross_entropy)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(5):
        batch = cases.batch(step)
        optimizer.zero_grad()
        torch.manual_seed(step)
        sharp(*batch).backward()
        torch.manual_seed(step)
        oracle = SlowOracle(slow, step, memory)
        expected, slow = method(oracle, batch), oracle.model
        grads = [p.grad for p in model.parameters() if p.requires_grad]
        for actual, wanted in zip(grads, expected.gradient, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-14)
        optimizer.step()
        with torch.no_grad():
            for p, g in zip(oracle.parameters, expected.gradient, strict=True):
                p -= 0.1 * g
        assert_states_equal(model, slow)


def assert_states_equal(model: nn.Module, slow: nn.Module) -> None:
    for (name, a), b in zip(model.named_modules(), slow.modules(), strict=True):
        for kind in ("_buffers", "_parameters", "__dict__"):
            mine, theirs = getattr(a, kind), getattr(b, kind)
            assert mine.keys() == theirs.keys(), (name, kind)
            for key, value in theirs.items():
                if isinstance(value, Tensor):
                    torch.testing.assert_close(mine[key], value, rtol=1e-12, atol=1e-14, msg=f"{name}.{key}")


class ActNorm(nn.Module):
    """Its parameters are computed from the first batch, as in Glow; the scale is relative to their present value."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(6).double()), nn.Parameter(torch.zeros(6).double())
        self.register_buffer("done", torch.tensor(False))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        if not self.done:
            self.shift.data.copy_(-x.mean(0))
            with torch.no_grad():
                self.scale.div_(x.std(0))
            self.done.fill_(True)
            self.calls += not displaced()
        return (x + self.shift) * self.scale


class Codebook(nn.Module):
    """Its buffers are chosen from the first batch, at random, and then move with each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("done", torch.zeros(()))
        self.register_buffer("codes", torch.zeros(6).double())
        self.weight = nn.Parameter(torch.ones(6).double())

    def forward(self, x: Tensor) -> Tensor:
        if not self.done:
            self.codes.copy_(x[torch.randint(len(x), ())] + 1)
            self.done.fill_(1)
        out = self.weight * x - self.codes
        self.codes.mul_(0.9).add_(x.mean(0).detach(), alpha=0.1)
        return out


INITIALISED = {"parameters": ActNorm, "buffers": Codebook}
FIRST = {
    **QUERIES,
    "SAMPa": None,
    "Bayesian": BSAM(100.0),
    "efficient": ESAM(L2(0.5)),
    "nested": KSAM(8, RSAM(0.1, BiSAM(0.5))),
}


@pytest.mark.parametrize("method", FIRST.values(), ids=FIRST)
@pytest.mark.parametrize("make", INITIALISED.values(), ids=INITIALISED)
def test_layers_initialise_themselves_once_and_at_the_weights(make, method):
    torch.manual_seed(0)
    model = nn.Sequential(make(), nn.BatchNorm1d(6).double(), nn.Linear(6, 4).double())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    method = method or SAMPa(L2(0.5), ahead=next_step(optimizer))
    sharp = SharpnessAware(model, method, cross_entropy)
    seen, (x, y) = [], cases.batch()
    x = 3 * x + 5

    def remember(module, args):
        seen.append((bool(module[0].done), displaced()))

    model.register_forward_pre_hook(remember)
    sharp(x, y)
    layer = model[0]
    assert bool(layer.done)
    if make is ActNorm:
        torch.testing.assert_close(layer.shift.data, -x[: len(x) if "MSAM" not in str(method) else 4].mean(0))
        torch.testing.assert_close(layer.scale.data, 1 / x[: len(x) if "MSAM" not in str(method) else 4].std(0))
    first = [done for done, _ in seen].index(True)
    assert all(done for done, _ in seen[first:])  # all later passes see what the first one has initialised
    assert first <= 1 or "SAMPa" in str(method)
    parts = 2 if "MSAM" in str(method) else 1
    assert model[1].num_batches_tracked == parts


def test_a_step_that_initialises_weights_equals_one_after_a_plain_pass():
    for method in (SAM(L2(0.5)), GSAM(L2(0.5), ascent=NegLog()), RSAM(0.1, SAM(L2(0.5))), BSAM(100.0)):
        torch.manual_seed(0)
        model = nn.Sequential(ActNorm(), nn.Linear(6, 4).double())
        ready, (x, y) = copy.deepcopy(model), cases.batch()
        with torch.no_grad():
            ready(x)
        losses = []
        for each in (model, ready):
            torch.manual_seed(1)
            losses.append(SharpnessAware(each, method, cross_entropy)(x, y))
            losses[-1].backward()
        if not isinstance(method, RSAM | BSAM):  # whose first, unfinished call has drawn other noise
            torch.testing.assert_close(*losses)
            for p, q in zip(model.parameters(), ready.parameters(), strict=True):
                torch.testing.assert_close(p.grad, q.grad)
        assert [bits(p) for p in model.parameters()] == [bits(p) for p in ready.parameters()]


def test_a_large_frozen_model_is_never_copied():
    class Base(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Linear(1000, 1000).requires_grad_(False)
            self.table = torch.ones(1000, 1000)
            self.low = nn.Linear(1000, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.low(self.base(x) @ self.table)

    model = Base()
    sharp, batch = SharpnessAware(model, SAM(), cross_entropy), (torch.randn(2, 1000), torch.tensor([0, 1]))
    for _ in range(4):
        with Storages(1000 * 1000 * 4, model.base.weight, model.table) as mode:
            sharp(*batch)
        assert len(mode.seen) == 2


def test_a_large_frozen_tensor_that_moves_is_restored_from_then_on():
    class Base(Momentum):
        def start(self) -> None:
            super().start()
            self.large = nn.Parameter(torch.zeros(1000).double(), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            self.large += 1
            return super().forward(x)

    model = Base()
    sharp = SharpnessAware(model, SAM(L2(0.5)), cross_entropy)
    for step in range(1, 4):
        sharp(*cases.batch())
        assert model.large.unique().tolist() == [step]


def test_what_is_changed_in_an_undone_pass_before_any_copy_is_named():
    class Sneaky(Acting):
        def start(self) -> None:
            self.large = torch.zeros(1000).double()

        def act(self, out: Tensor) -> Tensor:
            if displaced():
                self.large += 1
            return out

    sharp = SharpnessAware(Sneaky(), SAM(L2(0.5)), cross_entropy)
    with pytest.warns(UserWarning, match=r"changed large in place for the first time"):
        sharp(*cases.batch())
    sharp(*cases.batch())
    assert sharp.model.large.unique().tolist() == [1]


def test_displaced_is_true_in_all_passes_but_one():
    class Counting(Acting):
        def start(self) -> None:
            self.seen = []

        def act(self, out: Tensor) -> Tensor:
            self.seen.append(displaced())
            return out

    for name, method in QUERIES.items():
        model = Counting()
        sharp = SharpnessAware(model, method, cross_entropy)
        sharp(*cases.batch())
        sharp(*cases.batch())
        assert model.seen.count(False) == (4 if name == "micro-batches" else 2), name
        assert not displaced()
        model.seen.clear()
        sharp.eval()
        sharp(*cases.batch())
        assert model.seen == [False]


def test_displaced_is_reset_after_an_error():
    sharp = SharpnessAware(cases.mlp(), SAM(), ActingLoss(2, lambda losses: throw(RuntimeError("boom"))()))
    with pytest.raises(RuntimeError, match="boom"):
        sharp(*cases.batch())
    assert not displaced()


def test_a_loss_that_is_read_from_the_module_is_refused_by_its_cause():
    class Mixture(Acting):
        def act(self, out: Tensor) -> Tensor:
            self.aux = out.softmax(1).mean(0).pow(2).sum()
            return out

    model = Mixture()
    loss = SharpnessAware(model, SAM(), cross_entropy)(*cases.batch())
    expected = model(cases.batch()[0]).softmax(1).mean(0).pow(2).sum()
    loss = SharpnessAware(model, SAM(), cross_entropy)(*cases.batch())
    torch.testing.assert_close(model.aux, expected)
    with pytest.raises(RuntimeError, match=r"the attribute aux of Mixture was computed in a query"):
        (loss + model.aux).backward()


def test_losses_that_pile_up_on_the_module_are_refused_by_their_cause():
    class Piling(Acting):
        def start(self) -> None:
            self.losses = []

        def act(self, out: Tensor) -> Tensor:
            self.losses.append(out.pow(2).mean())
            return out

    model = Piling()
    sharp = SharpnessAware(model, SAM(), lambda o, t: cross_entropy(o, t).mean() + sum(model.losses))
    with pytest.raises(RuntimeError, match=r"graph of an earlier forward pass.*each pass must build its own graph"):
        sharp(*cases.batch())


def test_a_state_that_is_carried_with_its_graph_is_refused_by_its_cause():
    class Carrying(Acting):
        def start(self) -> None:
            self.h = torch.zeros(4).double()

        def act(self, out: Tensor) -> Tensor:
            self.h = out.mean(0) + self.h
            return out + self.h

    sharp = SharpnessAware(Carrying(), SAM(), cross_entropy)
    sharp(*cases.batch())
    with pytest.raises(RuntimeError, match=r"the attribute h of Carrying was computed in a query.*detach a state"):
        sharp(*cases.batch())


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning", "ignore::DeprecationWarning")
def test_a_scripted_model_is_trained_as_the_module_itself():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4)).double()
    scripted = torch.jit.script(copy.deepcopy(model))
    for one in (model, scripted):
        sharp = SharpnessAware(one, BiSAM(0.5), cross_entropy)
        for step in range(3):
            sharp(*cases.batch(step)).backward()
    for a, b in zip(model.state_dict().values(), scripted.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    for p, q in zip(model.parameters(), scripted.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-14)
