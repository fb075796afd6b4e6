"""Connectivity: against closed forms, and against copies of the model that load interpolated state dicts."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from bisam import SAM, ModelOracle, SharpnessAware, cross_entropy
from bisam.analysis import connectivity
from tests.analysis.test_sharpness import Bowl
from tests.support import cases, ranks
from tests.support.cases import everything

DATA = [cases.batch(0, 16), cases.batch(1, 8)]
TRAINING = [cases.batch(i, 12 + i) for i in range(2, 5)]


def checkpoint(make: Any, seed: int = 1) -> dict[str, Tensor]:
    """The state dict of another model after a few forward passes in train mode."""
    torch.manual_seed(seed)
    model = make()
    for x, _ in TRAINING:
        model(3 * x + seed)
    return copy.deepcopy(model.state_dict())


def loss_and_error(model: nn.Module) -> tuple[float, float]:
    with torch.no_grad():
        z, y = torch.cat([model(x) for x, _ in DATA]), torch.cat([y for _, y in DATA])
    return float(F.cross_entropy(z, y)), float((z.argmax(1) != y).double().mean())


def at(model: nn.Module, others: list[dict[str, Tensor]], shares: list[float]) -> nn.Module:
    """A copy with an interpolated state dict."""
    twin, own = copy.deepcopy(model), model.state_dict()
    state = {
        k: v + sum(a * (other[k] - v) for a, other in zip(shares, others, strict=True)) if v.is_floating_point() else v
        for k, v in own.items()
    }
    twin.load_state_dict(state)
    return twin


class Cap(nn.Module):
    """Its losses are -sum_i (x_i w_i)^2, concave in the weights."""

    def __init__(self, *w: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w, dtype=torch.double))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.w


def test_the_barrier_of_a_quadratic_is_that_of_the_closed_form():
    """On a line of direction d it is the mean of sum_i (x_i d_i)^2 a (1 - a), largest at a = 1/2."""
    x = torch.tensor([[1.0, 2.0], [0.5, -1.0], [3.0, 0.0]], dtype=torch.double)
    data = [(x[:2], torch.zeros(2)), (x[2:], torch.zeros(1))]
    oracle = ModelOracle(Cap(0.3, -1.2), lambda z, y: -(z**2).sum(1))
    found = connectivity(oracle, data, Cap(1.1, 0.4).state_dict(), points=5, beyond=0.5)
    d = torch.tensor([0.8, 1.6], dtype=torch.double)
    assert found.xs == (-0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
    assert found.barrier == pytest.approx(float((x * d).square().sum(1).mean()) / 4, rel=1e-12)
    assert found.distance == pytest.approx([float(d.norm())], rel=1e-12)
    assert (found.error, found.error_barrier, found.statistics) == ((), None, "none")
    assert connectivity(oracle, data, Cap(1.1, 0.4).state_dict(), points=4).barrier < found.barrier  # without 1/2


def test_a_convex_loss_has_no_barrier():
    model = nn.Linear(6, cases.CLASSES).double()
    other = checkpoint(lambda: nn.Linear(6, cases.CLASSES).double())
    assert connectivity(ModelOracle(model, cross_entropy), DATA, other, points=7).barrier == 0


@pytest.mark.parametrize("make", [cases.normed, cases.convnet], ids=["batchnorm", "convnet"])
def test_recomputed_statistics_are_those_of_update_bn(make):
    torch.manual_seed(0)
    model, other = make(), checkpoint(make)
    oracle = ModelOracle(model, cross_entropy)
    found = connectivity(oracle, DATA, other, recalibrate=TRAINING, points=4, beyond=0.4)
    assert len(found.xs) == 6
    for a, loss, error in zip(found.xs, found.loss[0], found.error[0], strict=True):
        twin = at(model, [other], [a])
        update_bn(TRAINING, twin)
        expected = loss_and_error(twin.eval())
        assert (loss, error) == pytest.approx(expected, rel=1e-9)
    ends = found.loss[0][1], found.loss[0][4]
    chord = [(1 - a) * ends[0] + a * ends[1] for a in found.xs]
    rises = [loss - line for loss, line in zip(found.loss[0], chord, strict=True)]
    assert found.barrier == pytest.approx(max(rises[1:5]), rel=1e-12, abs=1e-15)
    assert found.statistics == "recomputed"


@pytest.mark.parametrize(("mode", "recalibrate"), [("train", None), ("eval", "interpolate")])
def test_other_statistics_are_those_that_the_result_names(mode, recalibrate):
    torch.manual_seed(0)
    model, other = cases.convnet(), checkpoint(cases.convnet)
    oracle = ModelOracle(model, cross_entropy)
    found = connectivity(oracle, DATA, other, recalibrate=recalibrate, points=3, mode=mode)
    for a, loss in zip(found.xs, found.loss[0], strict=True):
        twin = at(model, [other], [a]).train(mode == "train")
        assert loss == pytest.approx(loss_and_error(twin)[0], rel=1e-9)
    assert found.statistics == {"train": "of each batch", "eval": "interpolated"}[mode]


def test_a_plane_goes_through_three_checkpoints():
    torch.manual_seed(0)
    model, others = cases.convnet(), [checkpoint(cases.convnet, seed) for seed in (1, 2)]
    oracle = ModelOracle(model, cross_entropy)
    found = connectivity(oracle, DATA, others, recalibrate=TRAINING, points=3, beyond=0.0)
    first, second, third = (
        torch.cat([state[name].flatten() for name, _ in model.named_parameters()])
        for state in (model.state_dict(), *others)
    )
    along = (second - first) / (second - first).norm()
    up = (third - first) - along * along.dot(third - first)
    marks = [[0, 0], [float((second - first).norm()), 0], [float(along.dot(third - first)), float(up.norm())]]
    assert [list(mark) for mark in found.marks] == [pytest.approx(mark, rel=1e-9) for mark in marks]
    assert found.xs[0] == pytest.approx(min(0, marks[2][0]))
    assert found.ys == pytest.approx((0.0, marks[2][1] / 2, marks[2][1]))
    for j, y in enumerate(found.ys):
        for i, x in enumerate(found.xs):
            b = y / marks[2][1]
            twin = at(model, others, [(x - b * marks[2][0]) / marks[1][0], b])
            update_bn(TRAINING, twin)
            assert found.loss[j][i] == pytest.approx(loss_and_error(twin.eval())[0], rel=1e-9)
    assert (found.barrier, found.error_barrier) == (None, None)
    assert found.distance == pytest.approx([float((t - first).norm()) for t in (second, third)], rel=1e-12)
    json.dumps(found.to_dict(), allow_nan=False)


class Scaled(nn.Module):
    """With a buffer that is no running statistic, a counter, and a buffer outside the state dict."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.net = cases.mlp()
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.double))
        self.register_buffer("count", torch.tensor(int(scale)))
        self.register_buffer("outside", torch.tensor(0.5), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * self.scale + self.outside * self.count


def test_other_buffers_are_interpolated_if_they_are_floating_point():
    model, other = Scaled(1.0), checkpoint(lambda: Scaled(3.0))
    found = connectivity(ModelOracle(model, cross_entropy), DATA, other, points=3)
    expected = [loss_and_error(at(model, [other], [a]))[0] for a in found.xs]
    assert list(found.loss[0]) == pytest.approx(expected, rel=1e-9)
    assert float(model.scale) == 1.0


def modes(model: nn.Module) -> list[Any]:
    return [(module.training, getattr(module, "momentum", None)) for module in model.modules()]


def test_the_model_is_left_as_it_is():
    model, other = cases.convnet(), checkpoint(cases.convnet)
    model[5].eval()
    sharp = SharpnessAware(model, SAM(), cross_entropy)
    before, random, set_to = everything(model), torch.get_rng_state(), modes(model)
    connectivity(sharp, DATA, other, recalibrate=TRAINING, points=3)
    assert everything(model) == before
    assert modes(model) == set_to
    assert torch.equal(torch.get_rng_state(), random)


def test_a_graph_that_is_held_meanwhile_stays_valid():
    model = cases.convnet()
    twin = copy.deepcopy(model)
    x, y = DATA[0]
    losses = [cross_entropy(one(x), y).mean() for one in (model, twin)]
    connectivity(ModelOracle(model, cross_entropy), DATA, checkpoint(cases.convnet), recalibrate=TRAINING, points=3)
    for loss in losses:
        loss.backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


class Failing(nn.Module):
    """Fails in one of its passes."""

    def __init__(self, last: int, error: type[BaseException]) -> None:
        super().__init__()
        self.net, self.left, self.error = cases.convnet(), last, error

    def forward(self, x: Tensor) -> Tensor:
        z = self.net(x)
        self.left -= 1
        if self.left == 0:
            raise self.error("stopped")
        return z


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("last", [1, 3, 4, 5, 6, 9])  # in the first pass, in recalibrations, in evaluations
def test_the_model_is_left_as_it_is_after_an_error(last, error):
    model = Failing(last, error)
    other = {f"net.{name}": t for name, t in checkpoint(cases.convnet).items()}
    before, set_to = everything(model), modes(model)
    with pytest.raises(error, match="stopped"):
        connectivity(ModelOracle(model, cross_entropy), DATA, other, recalibrate=TRAINING, points=3)
    assert everything(model) == before
    assert modes(model) == set_to


def test_names_may_differ_by_wrappers():
    model, other = cases.mlp(), checkpoint(cases.mlp)
    found = connectivity(ModelOracle(model, cross_entropy), DATA, other, points=3)
    for wrapped in (
        {f"module.{k}": v for k, v in other.items()},
        {f"module._orig_mod.{k}": v for k, v in other.items()},
    ):
        assert connectivity(ModelOracle(model, cross_entropy), DATA, wrapped, points=3).loss == found.loss


def test_its_passes_are_those_that_it_states():
    seen: list[tuple[int, int]] = []
    oracle, other = ModelOracle(cases.convnet(), cross_entropy), checkpoint(cases.convnet)
    count = {"points": 5, "progress": lambda *now: seen.append(now)}
    connectivity(oracle, DATA, other, recalibrate=TRAINING, **count)
    training = sum(len(y) for _, y in TRAINING)
    assert seen[-1] == (5 * (24 + training) + 24,) * 2
    connectivity(oracle, DATA, [other, checkpoint(cases.convnet, 2)], mode="train", **count)
    assert seen[-1] == ((25 + 1) * 24,) * 2


def lost(name: str) -> dict[str, Tensor]:
    return {k: v for k, v in cases.mlp().state_dict().items() if k != name}


def grown(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: torch.cat([v, v]) for k, v in state.items()}


MLP = cases.mlp().state_dict()


BAD = [
    ({"points": 2}, ValueError, "points must be at least 3, got 2"),
    ({"beyond": -1.0}, ValueError, "beyond must be non-negative and finite, got -1.0"),
    ({"mode": None}, ValueError, "mode must be 'eval' or 'train', got None"),
    ({"other": cases.mlp()}, TypeError, r"other must be a state dict such as model.state_dict\(\), or two of them"),
    ({"other": ()}, TypeError, "or two of them, got none"),
    ({"other": lost("0.bias")}, ValueError, "a checkpoint is not one of this model: it lacks 0.bias$"),
    ({"other": {**MLP, "more": torch.zeros(1)}}, ValueError, "of this model: the model lacks more$"),
    ({"other": grown(MLP)}, ValueError, r"0.weight has shape \(16, 6\) there and \(8, 6\) in the model"),
    ({"recalibrate": DATA}, ValueError, "recalibrate has no effect, leave it out: the model has no running stat"),
    ({"recalibrate": "all"}, ValueError, "recalibrate must be training batches or 'interpolate', got 'all'"),
    ({"data": iter(())}, ValueError, "the data has no batches: a generator can be read once"),
    ({"other": [MLP, MLP]}, ValueError, "the three checkpoints are on a line"),
    ({"other": {k: v / 0 for k, v in MLP.items()}}, ValueError, "a checkpoint has weights that are not finite"),
]


@pytest.mark.parametrize(("how", "error", "said"), BAD, ids=[said for *_, said in BAD])
def test_bad_input_is_one_line(how, error, said):
    torch.manual_seed(5)
    given = {"data": DATA, "other": MLP, **how}
    with pytest.raises(error, match=said) as raised:
        connectivity(ModelOracle(cases.mlp(), cross_entropy), **given)
    assert "\n" not in str(raised.value)


def test_a_checkpoint_whose_loss_is_not_finite_is_refused():
    oracle = ModelOracle(Cap(1.0, 1.0), lambda z, y: -z.log().sum(1))
    data = [(torch.ones(3, 2).double(), torch.zeros(3))]
    with pytest.raises(ValueError, match="the loss is nan at 1 of the line: a checkpoint has diverged"):
        connectivity(oracle, data, Cap(-1.0, 1.0).state_dict())


def test_a_loss_that_is_not_finite_between_is_an_infinite_barrier():
    oracle = ModelOracle(Cap(0.0, 1.0), lambda z, y: -((0.5 - z).square() - 0.1).log().sum(1))
    data = [(torch.ones(3, 2).double(), torch.zeros(3))]
    found = connectivity(oracle, data, Cap(1.0, 1.0).state_dict(), points=5)
    assert found.barrier == float("inf")
    assert found.to_dict()["barrier"] is None
    json.dumps(found.to_dict(), allow_nan=False)


def test_running_statistics_need_a_decision():
    model, other = cases.normed(), checkpoint(cases.normed)
    oracle = ModelOracle(model, cross_entropy)
    with pytest.raises(ValueError, match=r"running statistics \(BatchNorm1d\).*pass recalibrate=training batches, or"):
        connectivity(oracle, DATA, other)
    with pytest.raises(ValueError, match="leave it out: mode='train' uses the statistics of each batch"):
        connectivity(oracle, DATA, other, recalibrate=TRAINING, mode="train")
    with pytest.raises(ValueError, match="the data has no batches"):
        connectivity(oracle, DATA, other, recalibrate=[])


def test_instance_norm_is_not_recomputed():
    def make() -> nn.Module:
        norm = nn.InstanceNorm1d(6, track_running_stats=True)
        return nn.Sequential(nn.Unflatten(1, (6, 1)), nn.Linear(1, 3), norm, nn.Flatten(), nn.Linear(18, 4)).double()

    with pytest.raises(ValueError, match="of InstanceNorm1d cannot be recomputed, only those of BatchNorm"):
        connectivity(ModelOracle(make(), cross_entropy), DATA, make().state_dict(), recalibrate=TRAINING)


def test_frozen_parameters_must_be_equal():
    model, other = cases.mlp(), checkpoint(cases.mlp)
    model[0].bias.requires_grad_(False)
    oracle = ModelOracle(model, cross_entropy)
    with pytest.raises(ValueError, match=r"the frozen parameter 0.bias differs.*call requires_grad_\(True\)"):
        connectivity(oracle, DATA, other)
    found = connectivity(oracle, DATA, {**other, "0.bias": model[0].bias.detach()}, points=3)
    assert len(found.loss[0]) == 3


def test_the_live_state_dict_of_the_model_is_refused():
    model = cases.mlp()
    with pytest.raises(ValueError, match="a state dict refers to the tensors of its model, so copy it"):
        connectivity(ModelOracle(model, cross_entropy), DATA, model.state_dict())


def test_an_oracle_without_a_module_is_refused():
    with pytest.raises(TypeError, match=r"checkpoints are those of a torch module.*got Bowl"):
        connectivity(Bowl(0.3, -1.2), DATA, MLP)


def test_the_plots_name_their_axes():
    pytest.importorskip("matplotlib").use("Agg")
    import matplotlib.pyplot as plt

    oracle, others = ModelOracle(cases.mlp(), cross_entropy), [checkpoint(cases.mlp, seed) for seed in (1, 2)]
    line = connectivity(oracle, DATA, others[0], points=3).plot()
    assert line.get_xlabel() == "from the weights (0) to the other checkpoint (1)"
    assert [axes.get_ylabel() for axes in line.figure.axes] == ["loss", "error (%)"]
    plane = connectivity(oracle, DATA, others, points=3).plot()
    assert {text.get_text() for text in plane.texts} == {"1", "2", "3"}
    plt.close("all")


def under_wrappers() -> dict[str, Any]:
    """Differences of a model under DDP and FSDP2 from the model itself, whose data all ranks have."""
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    def made() -> nn.Module:
        torch.manual_seed(0)
        return cases.convnet()

    others = [checkpoint(cases.convnet, seed) for seed in (1, 2)]
    how: dict[str, Any] = {"recalibrate": TRAINING, "points": 3}
    plain = ModelOracle(made(), cross_entropy)
    expected = [connectivity(plain, DATA, given, **how) for given in (others[0], others)]
    wrong: dict[str, Any] = {}
    for name, wrap in (("DDP", DistributedDataParallel), ("FSDP2", fully_shard)):
        model = wrap(made())
        sharp = SharpnessAware(model, SAM(), cross_entropy)
        before = everything(model) if name == "DDP" else [b.clone() for b in model.buffers()]
        for given, one in zip((others[0], others), expected, strict=True):
            found = connectivity(sharp, DATA, given, **how)
            if [[pytest.approx(row, rel=1e-9) for row in one.loss]] != [[list(row) for row in found.loss]]:
                wrong[f"{name} {len(one.ys)}"] = found.loss, one.loss
        after = everything(model) if name == "DDP" else [b.clone() for b in model.buffers()]
        if name == "DDP" and after != before:
            wrong["DDP, state"] = True
        if name == "FSDP2" and not all(torch.equal(a, b) for a, b in zip(after, before, strict=True)):
            wrong["FSDP2, buffers"] = True
        saved = (
            connectivity(sharp, DATA, copy.deepcopy(wrapped_state(wrap, made())), **how) if name == "FSDP2" else None
        )
        if saved is not None and saved.distance != pytest.approx(distance_of(made()), rel=1e-9):
            wrong["FSDP2, sharded checkpoint"] = saved.distance
    return wrong


def shifted(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in model.parameters():
            p += 0.5
    return model


def wrapped_state(wrap: Any, model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a sharded model, whose tensors are sharded."""
    return wrap(shifted(model)).state_dict()


def distance_of(model: nn.Module) -> list[float]:
    return [0.5 * sum(p.numel() for p in model.parameters()) ** 0.5]


@pytest.mark.slow
def test_wrapped_and_sharded_models_give_the_same():
    assert ranks.run(2, under_wrappers) == [{}, {}]
