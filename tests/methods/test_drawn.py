"""Displacements that are drawn from a seed: their estimate, and weights that are restored without a copy."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn

from bisam import (
    SAM,
    Every,
    FilterNoise,
    NegLog,
    Only,
    SharpnessAware,
    Tilted,
    Vector,
    ZerothOrder,
    cross_entropy,
)
from bisam.masks import RandomMask
from bisam.perturbations import L2, Adaptive, Friendly, LossEquated, NormLayers, PerGroup, PerTensor
from bisam.schedules import FlipRate
from tests.methods.test_references import check_twin
from tests.support import cases, references
from tests.support.cases import gradients
from tests.support.memory import Peak, Weights
from tests.support.runs import Training

CE, LOG = cases.CE, cases.LOG
REDRAWN = {
    "ZerothOrder": (
        lambda o: ZerothOrder(0.5, restore="redraw"),
        references.zeroth_order(references.l2(0.5), CE, CE),
    ),
    "ZerothOrder-only-signs-log": (
        lambda o: ZerothOrder(
            Only(cases.is_matrix, 0.3), NegLog(), draws=3, noise="rademacher", seed=4, restore="redraw"
        ),
        references.zeroth_order(
            references.only(references.l2(0.3), cases.is_matrix),
            LOG,
            CE,
            3,
            seed=4,
            signs=True,
            rule=cases.is_matrix,
        ),
    ),
    "ZerothOrder-groups": (
        lambda o: ZerothOrder(
            PerGroup([(cases.is_matrix, 0.3), (lambda name, p: True, L2(0.1))]), draws=2, restore="redraw"
        ),
        references.zeroth_order(
            references.per_group(
                [references.l2(0.3), references.l2(0.1)],
                [cases.is_matrix, lambda name, p: not cases.is_matrix(name, p)],
                together=False,
            ),
            CE,
            CE,
            2,
        ),
    ),
    "FilterNoise": (
        lambda o: FilterNoise(0.3, lambda name, p: True, descent=NegLog(), restore="redraw"),
        references.filter_noise(LOG, lambda s: 0.3, lambda name, p: True),
    ),
}
each_redrawn = pytest.mark.parametrize("name", REDRAWN)
both = pytest.mark.parametrize("make", [partial(ZerothOrder, 0.5, draws=2), partial(FilterNoise, 0.3)])


@pytest.mark.parametrize("model", ["mlp", "convnet"])
@each_redrawn
def test_weights_that_are_not_copied_equal_the_slow_twin(name, model):
    check_twin(*REDRAWN[name], cases.FAMILY_MODELS[model](), cases.OPTIMIZERS["sgd"])


@both
def test_a_checkpoint_continues_whatever_the_global_generators_are(make):
    whole = Training(lambda o: Every(2, make())).step(0, 1, 2, 3, 4, 5)
    first = Training(lambda o: Every(2, make())).step(0, 1, 2)
    second = Training(lambda o: Every(2, make())).load(first.saved())
    torch.manual_seed(123)
    second.step(3, 4, 5)
    assert second.weights == whole.weights


@both
def test_the_noise_is_a_function_of_seed_and_step(make):
    def steps(seed: int, general: int) -> list:
        sharp, found = SharpnessAware(cases.linear(), make(seed=seed), cross_entropy), []
        for _ in range(2):
            torch.manual_seed(general)
            sharp.model.zero_grad()
            sharp(cases.POINTS, cases.LABELS).backward()
            found.append(gradients(sharp.model))
        return found

    first = steps(0, 1)
    assert first == steps(0, 2)
    assert first[0] != first[1]
    assert all(a != b for a, b in zip(first, steps(1, 1), strict=True))


@both
def test_no_number_is_drawn_from_the_global_generator(make):
    sharp, state = SharpnessAware(cases.linear(), make(), cross_entropy), torch.get_rng_state()
    sharp(cases.POINTS, cases.LABELS)
    assert torch.equal(torch.get_rng_state(), state)


# The estimate.


@pytest.mark.parametrize("noise", ["gaussian", "rademacher"])
def test_the_estimate_of_many_draws_is_the_gradient(noise):
    model = cases.linear()
    oracle = SharpnessAware(model, ZerothOrder(), cross_entropy).oracle()
    batch = cases.POINTS, cases.LABELS
    e = ZerothOrder(L2(1.0), draws=1000, noise=noise).climb(oracle, batch)
    g = oracle.query(batch).gradient
    assert e.dot(g) / g.norm() > 0.98  # 15 weights: 1 - 15 / 2000


def test_the_adversary_climbs_its_own_objective():
    oracle = SharpnessAware(cases.linear(), ZerothOrder(), cross_entropy).oracle()
    batch = cases.POINTS, cases.LABELS
    e = ZerothOrder(L2(1.0), NegLog(), draws=1000).climb(oracle, batch)
    g, other = (oracle.query(batch, objective).gradient for objective in (NegLog(), None))
    assert e.dot(g) / g.norm() > 0.98 > other.dot(g) / g.norm() / other.norm()


def test_one_draw_climbs():
    sharp = SharpnessAware(cases.linear(), ZerothOrder(0.1), cross_entropy)
    for _ in range(20):
        here = sharp.oracle().query((cases.POINTS, cases.LABELS), grad=False).value
        assert sharp(cases.POINTS, cases.LABELS) > here - 1e-2  # to first order it never falls


def test_an_adversary_without_gradient_is_climbed():
    """A count of errors at the displaced weights, which autograd cannot differentiate."""

    def errors(outputs, targets):
        return (outputs.argmax(1) != targets).double()

    sharp = SharpnessAware(cases.linear(), ZerothOrder(0.5, errors, epsilon=0.3, draws=20), cross_entropy, stats=True)
    sharp(cases.POINTS, cases.LABELS).backward()
    assert sharp.stats.displacement_norm.item() == pytest.approx(0.5)


def test_dropout_does_not_change_the_estimate():
    model = nn.Sequential(nn.Dropout(0.5), cases.linear())
    torch.manual_seed(0)
    oracle, batch = SharpnessAware(model, ZerothOrder(), cross_entropy).oracle(), (cases.POINTS, cases.LABELS)
    first, second = (ZerothOrder(1.0, draws=3).climb(oracle, batch) for _ in range(2))
    assert [t.tolist() for t in first] == [t.tolist() for t in second]


def test_noise_is_drawn_for_the_displaced_part_alone():
    oracle = SharpnessAware(cases.linear(), ZerothOrder(), cross_entropy).oracle()
    method = ZerothOrder(Only(lambda name, p: name == "bias", Adaptive(0.5)), draws=2)
    assert method.climb(oracle, (cases.POINTS, cases.LABELS)).holes == {0}


def test_the_noise_of_a_filter_has_its_share_of_the_length():
    torch.manual_seed(0)
    model = nn.Linear(10_000, 3, bias=False)
    with torch.no_grad():
        model.weight.mul_(torch.tensor([[0.1], [1.0], [10.0]]))
    sharp, seen = SharpnessAware(model, FilterNoise(0.05), cross_entropy), []
    before = model.weight.detach().clone()
    model.register_forward_pre_hook(lambda *_: seen.append(model.weight.detach().clone()))
    sharp(torch.randn(2, 10_000), torch.arange(2))
    ratio = (seen[-1] - before).norm(dim=1) / before.norm(dim=1)
    torch.testing.assert_close(ratio, torch.full((3,), 0.05), rtol=0.05, atol=0)


def test_a_complex_weight_is_two_entries_of_a_filter():
    torch.manual_seed(0)
    model = nn.Linear(10_000, 3, bias=False, dtype=torch.complex64)
    sharp = SharpnessAware(
        model, FilterNoise(0.05), cross_entropy, lambda model, x, y: (model(x + 0j).real, y), stats=True
    )
    sharp(torch.randn(2, 10_000), torch.arange(2)).backward()
    assert (sharp.stats.displacement_norm / model.weight.norm()).item() == pytest.approx(0.05, rel=0.05)


@pytest.mark.parametrize("method", [ZerothOrder(0.5, draws=2), FilterNoise(0.5), FilterNoise(0.5, restore="redraw")])
def test_samples_of_a_step_have_noise_of_their_own(method):
    """As those of a method that draws from the global generators: else each would be the first."""
    values, model = [], cases.mlp()

    def noting(oracle, batch):
        values.append((answer := method(oracle, batch)).value.item())
        return answer

    def note(count, wrapper=noting):
        values.clear()
        SharpnessAware(model, Tilted(count, wrapper), cross_entropy)(*cases.batch())
        return list(values)

    samples, nested, alone = note(3), note(2, Tilted(2, noting)), note(1)
    assert len(set(samples)) == 3
    assert len(set(nested)) == 4
    assert samples == pytest.approx(note(3), abs=1e-12)  # to the rounding of restore="redraw"
    by_itself = method(SharpnessAware(model, SAM(), cross_entropy).oracle(), cases.batch()).value
    assert alone == pytest.approx([by_itself.item()], abs=1e-12)


# Weights that are restored without a copy.


def trained(method, dtype: torch.dtype = torch.float, steps: int = 0) -> tuple[nn.Module, SharpnessAware]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.LayerNorm(30), nn.Linear(30, 4)).to(dtype)
    return model, SharpnessAware(model, method, cross_entropy)


def batch(number: int, dtype: torch.dtype = torch.float):
    torch.manual_seed(number)
    return torch.randn(16, 20, dtype=dtype), torch.randint(4, (16,))


REDRAWING = [
    ZerothOrder(0.5, draws=3, restore="redraw"),
    ZerothOrder(NormLayers(0.5), draws=3, restore="redraw"),
    FilterNoise(0.3, restore="redraw"),
]


@pytest.mark.parametrize("method", REDRAWING)
def test_a_hundred_steps_restore_the_weights_to_a_rounding(method):
    model, sharp = trained(method)
    before = copy.deepcopy(model)
    for number in range(100):
        sharp(*batch(number)).backward()
    for p, q in zip(model.parameters(), before.parameters(), strict=True):
        assert (p - q).abs().max() < 1e-5
    now, then = references.flat(model), references.flat(before)
    assert (now - then).norm() < 1e-6 * then.norm()
    assert references.flat(model).tolist() != references.flat(before).tolist()  # a copy would restore the bits


@pytest.mark.parametrize("restore", ["copy", "redraw"])
@both
def test_a_copy_of_the_weights_is_held_or_not(make, restore):
    model = nn.Sequential(nn.Linear(300, 300, bias=False), nn.Linear(300, 300, bias=False), nn.LayerNorm(300))
    sharp, held, memory = SharpnessAware(model, make(restore=restore), cross_entropy), list[float](), Weights(90_000)
    model.register_forward_pre_hook(lambda *_: held.append(memory.held()))
    with memory:
        sharp(torch.randn(4, 300), torch.randint(300, (4,))).backward()
    assert max(held) - 2 == pytest.approx(2.0 if restore == "copy" else 0.0, abs=0.02)  # 2: the weights


def test_no_second_copy_of_the_weights_is_made_in_forward_passes():
    """Beside the noise of a tensor at a time, the peak is that of the gradient."""
    model = nn.Sequential(*[nn.Linear(200, 200, bias=False) for _ in range(8)])
    oracle = SharpnessAware(model, ZerothOrder(), cross_entropy).oracle()
    peaks = []
    for restore in ("copy", "redraw"):
        method = ZerothOrder(L2(0.1), draws=2, restore=restore)
        with Peak(40_000) as peak:
            method(oracle, (torch.randn(4, 200), torch.randint(200, (4,))))
        peaks.append(peak.peak)
    assert peaks[0] - 8 >= 16  # 8 of the weights themselves
    assert peaks[1] - 8 < 12  # 8 of the gradient


@pytest.mark.parametrize("method", REDRAWING)
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_pass_that_fails_leaves_the_weights_where_they_were(method, error):
    model, sharp = trained(method)
    before = references.flat(model)
    passes = 1 if isinstance(method, FilterNoise) else 7
    for fails in range(passes):
        calls = iter(range(100))

        def fail(*_: object, fails: int = fails, calls=calls) -> None:
            if next(calls) == fails:
                raise error("boom")

        handle = model[1].register_forward_hook(fail)
        with pytest.raises(error, match="boom"):
            sharp(*batch(0))
        handle.remove()
        assert (references.flat(model) - before).abs().max() < 1e-5
    assert sharp(*batch(0)).isfinite()


def test_an_interruption_between_two_tensors_is_undone():
    model, sharp = trained(ZerothOrder(0.5, restore="redraw"))
    sharp(*batch(0))  # the first step runs more passes
    before = references.flat(model)
    oracle = sharp.oracle()
    from bisam.seeded import Seeded

    class Interrupted(Seeded):
        def each(self, like):
            for i, part in super().each(like):
                if i == 3 and self.left:
                    self.left -= 1
                    raise KeyboardInterrupt
                yield i, part

    noise = Interrupted([(0, 1)], [0.1])
    noise.left = 1
    with pytest.raises(KeyboardInterrupt):
        oracle.query(batch(0), at=noise)
    oracle.rollback()
    assert (references.flat(model) - before).abs().max() < 1e-6


@pytest.mark.parametrize("method", REDRAWING)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_batch_that_is_not_finite_leaves_the_weights_finite(method, value):
    model, sharp = trained(method)
    before = references.flat(model)
    x, y = batch(0)
    x[3, 2] = value
    sharp(x, y).backward()
    assert (references.flat(model) - before).abs().max() < 1e-5
    assert not model[0].weight.grad.isfinite().all()  # so that the loop skips the step


@pytest.mark.parametrize("method", REDRAWING)
def test_half_precision_is_refused(method):
    _, sharp = trained(method, torch.bfloat16)
    with pytest.warns(UserWarning, match="bfloat16"), pytest.raises(ValueError, match=r"(?s)bfloat16.*restore='copy'"):
        sharp(*batch(0, torch.bfloat16))


class Replaced(nn.Linear):
    def forward(self, x):
        self.weight.data = torch.renorm(self.weight.data, 2, 0, maxnorm=self.limit)
        return super().forward(x)


class Changed(nn.Linear):
    def forward(self, x):
        if self.limit < 100:
            with torch.no_grad():
                self.weight.clamp_(-self.limit, self.limit)
        return super().forward(x)


@pytest.mark.parametrize("method", [ZerothOrder(0.5, restore="redraw"), FilterNoise(0.3, restore="redraw")])
@pytest.mark.parametrize("layer", [Replaced, Changed])
@pytest.mark.parametrize("later", [False, True])
def test_a_layer_that_changes_its_weights_is_refused(method, layer, later):
    """Subtracting the noise would not restore them: they would move in each step, without a message."""
    model = nn.Sequential(nn.Linear(4, 4), layer(4, 3))
    model[1].limit = 100.0 if later else 0.2
    sharp, (x, y) = SharpnessAware(model, method, cross_entropy), (torch.randn(4, 4), torch.arange(4) % 3)
    if later and layer is Changed:
        sharp(x, y)
    model[1].limit = 0.2
    model(x)
    before = references.flat(model)
    with pytest.raises((ValueError, RuntimeError), match="restore='copy'"):
        sharp(x, y)
    if not (later and layer is Changed):
        assert (references.flat(model) - before).abs().max() < 1e-6


def test_an_embedding_that_limits_its_rows_is_refused_before_it_is_displaced():
    model = nn.Sequential(nn.Embedding(5, 4, max_norm=0.5), nn.Linear(4, 3))
    tokens, y = torch.arange(5), torch.arange(5) % 3
    model(tokens)
    before = references.flat(model)
    sharp = SharpnessAware(model, ZerothOrder(0.5, restore="redraw"), cross_entropy)
    with pytest.raises(ValueError, match=r"(?s)nn\.Embedding\(max_norm=.*restore='copy'"):
        sharp(tokens, y)
    assert torch.equal(references.flat(model), before)
    sharp.method = ZerothOrder(0.5)
    sharp(tokens, y).backward()
    assert torch.equal(references.flat(model), before)


@pytest.mark.parametrize(
    "perturb", [Adaptive(0.5), Friendly(), PerTensor(0.1), RandomMask(0.1), LossEquated(), lambda g, oracle: g]
)
def test_a_displacement_that_cannot_be_drawn_again_is_refused(perturb):
    assert ZerothOrder(perturb).restore == "copy"
    for refused in (perturb, Only(cases.is_matrix, perturb), PerGroup([(cases.is_matrix, perturb)])):
        with pytest.raises(ValueError, match=r"(?s)L2.*restore='copy'"):
            ZerothOrder(refused, restore="redraw")


class Signs(L2):
    def __call__(self, gradient, oracle):
        return Vector([t.sign() * self.rho for t in gradient])


@pytest.mark.parametrize("perturb", [Signs(0.1), Only(cases.is_matrix, Signs(0.1))])
def test_a_subclass_of_a_ball_is_not_taken_for_one(perturb):
    with pytest.raises(ValueError, match=r"(?s)L2.*restore='copy'"):
        ZerothOrder(perturb, restore="redraw")


def test_values_of_an_argument_are_named():
    with pytest.raises(ValueError, match="noise must be 'gaussian' or 'rademacher', got 'uniform'"):
        ZerothOrder(noise="uniform")
    for make in (ZerothOrder, FilterNoise):
        with pytest.raises(ValueError, match="restore must be 'copy' or 'redraw', got None"):
            make(restore=None)


def test_a_radius_that_follows_flips_is_refused():
    with pytest.raises(ValueError, match="FlipRate"):
        SharpnessAware(cases.linear(), ZerothOrder(FlipRate(0.1)), cross_entropy)(cases.POINTS, cases.LABELS)


def test_where_that_selects_nothing_is_refused():
    with pytest.raises(ValueError, match="selects none of the 2"):
        SharpnessAware(cases.linear(), FilterNoise(0.1, lambda name, p: False), cross_entropy)(
            cases.POINTS, cases.LABELS
        )


def test_methods_show_the_call_that_makes_them():
    assert repr(ZerothOrder(0.5, NegLog(), draws=4)) == "ZerothOrder(0.5, ascent=NegLog(), draws=4)"
    assert repr(FilterNoise(0.1, restore="redraw")) == "FilterNoise(sigma=0.1, restore='redraw')"


def test_statistics_have_the_length_of_noise_that_is_not_in_memory():
    lengths = []
    for restore in ("copy", "redraw"):
        sharp = SharpnessAware(cases.linear(), FilterNoise(0.3, restore=restore), cross_entropy, stats=True)
        sharp(cases.POINTS, cases.LABELS)
        lengths.append(sharp.stats.displacement_norm.item())
    assert lengths[0] == pytest.approx(lengths[1], rel=1e-12)
