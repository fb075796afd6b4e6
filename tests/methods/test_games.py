"""Min-max problems: each method against its closed form or its slow twin, and who finds the solution of which game."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import SGD

from bisam import ERM, RAPP, CEGPlus, ExtraGradient, Lookahead, SharpnessAware
from bisam.proximal import L1, Box, Simplex

Method = Callable[..., object]


class Game(nn.Module):
    """min over x, max over y of f(x, y): a scalar whose gradient is the game's operator (f_x, -f_y)."""

    def __init__(self, f: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> None:
        super().__init__()
        self.f, self.x, self.y = f, nn.Parameter(x.double()), nn.Parameter(y.double())
        self.evaluations = 0

    def forward(self) -> Tensor:
        self.evaluations += 1
        return self.f(self.x, self.y.detach()) - self.f(self.x.detach(), self.y)

    @property
    def point(self) -> Tensor:
        return torch.cat([self.x.detach().reshape(-1), self.y.detach().reshape(-1)])


def play(game: Game, method: Method, make: Callable[..., torch.optim.Optimizer], steps: int) -> Tensor:
    """The players after some steps."""
    sharp = SharpnessAware(game, method, loss=lambda value, _: value, forward=lambda game: (game(), None))
    optimizer = make(game.parameters())
    for _ in range(steps):
        optimizer.zero_grad()
        sharp().backward()
        optimizer.step()
    return game.point


def sgd(lr: float) -> Callable[..., torch.optim.Optimizer]:
    return lambda parameters: SGD(parameters, lr=lr)


def pulled(lr: float, k: int, lam: float) -> Callable[..., torch.optim.Optimizer]:
    return lambda parameters: Lookahead(SGD(parameters, lr=lr), k, lam)


# Linear games: with z = x + iy the operator is multiplication by mu = a - ib, and a round of a method by a number.


def quadratic(a: float, b: float) -> Game:
    return Game(lambda x, y: a / 2 * x**2 + b * x * y - a / 2 * y**2, torch.tensor(1.0), torch.tensor(-0.5))


BILINEAR = 0.0, 1.0
RHO = -1 / 3  # F is RHO-comonotone and L = 1, so that RHO > -1/(2L)
COHYPOMONOTONE = RHO, (1 - RHO**2) ** 0.5
GAMES = {"bilinear": BILINEAR, "cohypomonotone": COHYPOMONOTONE}

# name: the method, its optimizer, steps in a round and gradient evaluations in a step, and what a round multiplies by.
# One step size, one interpolation: gamma = 0.8 < 1/L, lam = 0.3.
METHODS = {
    "GDA": (ERM(), sgd(0.8), 1, 1, lambda mu: 1 - 0.8 * mu),
    "EG": (ExtraGradient(0.8), sgd(0.8), 1, 2, lambda mu: 1 - 0.8 * mu * (1 - 0.8 * mu)),
    "EG+": (ExtraGradient(0.8), sgd(0.24), 1, 2, lambda mu: 1 - 0.24 * mu * (1 - 0.8 * mu)),
    "RAPP": (RAPP(0.8), sgd(0.24), 1, 3, lambda mu: 0.7 + 0.3 * (1 - 0.8 * mu + (0.8 * mu) ** 2 - (0.8 * mu) ** 3)),
    "RAPP-6": (RAPP(0.8, 6), sgd(0.24), 1, 6, lambda mu: 0.7 + 0.3 * sum((-0.8 * mu) ** j for j in range(7))),
    "LA-GDA": (ERM(), pulled(0.8, 2, 0.3), 2, 1, lambda mu: 0.7 + 0.3 * (1 - 0.8 * mu) ** 2),
    "LA-EG": (
        ExtraGradient(0.8),
        pulled(0.8, 2, 0.3),
        2,
        2,
        lambda mu: 0.7 + 0.3 * (1 - 0.8 * mu * (1 - 0.8 * mu)) ** 2,
    ),
}


@pytest.mark.parametrize("game", GAMES)
@pytest.mark.parametrize("method", METHODS)
def test_linear_games_in_closed_form(method, game):
    (a, b), (method, make, steps, cost, factor) = GAMES[game], METHODS[method]
    players = quadratic(a, b)
    x, y = play(players, method, make, 20 * steps).tolist()
    expected = (1 - 0.5j) * factor(np.complex128(a - 1j * b)) ** 20
    assert abs(x + 1j * y - expected) <= 1e-12 * max(1, abs(expected))
    assert players.evaluations == 20 * steps * cost


SOLVED = {  # those that are in neither run away from the solution
    "bilinear": {"EG", "EG+", "RAPP", "RAPP-6", "LA-GDA", "LA-EG"},
    "cohypomonotone": {"EG+", "RAPP", "RAPP-6", "LA-EG"},
}


@pytest.mark.parametrize("game", GAMES)
@pytest.mark.parametrize("method", METHODS)
def test_who_solves_which_game(method, game):
    players = quadratic(*GAMES[game])
    growth = players.point.norm().reciprocal() * play(players, *METHODS[method][:2], 60).norm()
    assert growth < 0.7 if method in SOLVED[game] else growth > 10


@pytest.mark.parametrize("game", GAMES)
@pytest.mark.parametrize("gamma", [1e-3, 1e-2, 0.1, 0.5, 1.0, 2.0])
def test_descent_ascent_runs_away_at_every_step_size(game, gamma):
    start, end = quadratic(*GAMES[game]).point, play(quadratic(*GAMES[game]), ERM(), sgd(gamma), 50)
    assert end.norm() > start.norm()


def test_the_cohypomonotone_game_is_what_it_says():
    game = quadratic(*COHYPOMONOTONE)
    fx, fy = torch.autograd.grad(game(), list(game.parameters()))
    x, y = game.point
    assert (fx * x + fy * y).item() == pytest.approx(RHO * (fx**2 + fy**2).item())
    assert (fx**2 + fy**2).item() == pytest.approx((x**2 + y**2).item())  # L = 1


# Any game: slow twins on one flat vector.

Operator = Callable[[Tensor], Tensor]


def gda(F: Operator, z: Tensor, gamma: float) -> Tensor:
    return z - gamma * F(z)


def eg(F: Operator, z: Tensor, gamma: float) -> Tensor:
    halfway = z - gamma * F(z)
    return z - gamma * F(halfway)


def rapp(F: Operator, anchor: Tensor, gamma: float, lam: float, inner: int) -> Tensor:
    z = anchor
    for _ in range(inner):
        z = anchor - gamma * F(z)
    return (1 - lam) * anchor + lam * z


def la(step: Callable[[Operator, Tensor, float], Tensor], F: Operator, slow: Tensor, gamma: float, k: int, lam: float):
    fast = slow
    for _ in range(k):
        fast = step(F, fast, gamma)
    return (1 - lam) * slow + lam * fast


def saddle(x: Tensor, y: Tensor) -> Tensor:
    """Neither convex nor concave, and players of different shapes."""
    matrix = torch.linspace(-1, 1, 15, dtype=torch.double).view(5, 3)
    return torch.tanh(x.view(-1)) @ matrix @ y + 0.3 * torch.cos(x).sum() - 0.2 * (y**4).sum() + torch.sin(y).sum()


def operator(z: Tensor) -> Tensor:
    x, y = z[:5].clone().requires_grad_(), z[5:].clone().requires_grad_()
    fx, fy = torch.autograd.grad(saddle(x, y), (x, y))
    return torch.cat([fx, -fy])


@pytest.mark.parametrize(
    ("method", "make", "steps", "twin"),
    [
        (ERM(), sgd(0.1), 1, lambda z: gda(operator, z, 0.1)),
        (ExtraGradient(0.1), sgd(0.1), 1, lambda z: eg(operator, z, 0.1)),
        (RAPP(0.2, 1), sgd(0.1), 1, lambda z: rapp(operator, z, 0.2, 0.5, 1)),
        (RAPP(0.2, 4), sgd(0.1), 1, lambda z: rapp(operator, z, 0.2, 0.5, 4)),
        (ERM(), pulled(0.1, 5, 0.5), 5, lambda z: la(gda, operator, z, 0.1, 5, 0.5)),
        (ExtraGradient(0.1), pulled(0.1, 3, 0.7), 3, lambda z: la(eg, operator, z, 0.1, 3, 0.7)),
    ],
    ids=["GDA", "EG", "RAPP-1", "RAPP-4", "LA-GDA", "LA-EG"],
)
def test_any_game_equals_the_slow_twin(method, make, steps, twin):
    game = Game(saddle, torch.randn(5, 1), torch.randn(3))
    z = start = game.point
    for _ in range(10):
        z = twin(z)
    torch.testing.assert_close(play(game, method, make, 10 * steps), z, rtol=0, atol=1e-12)
    assert (z - start).norm() > 0.1


@pytest.mark.parametrize(("method", "same"), [(RAPP(0.2, 1), ERM()), (RAPP(0.2, 2), ExtraGradient(0.2))])
def test_few_inner_steps_are_the_simpler_methods(method, same):
    game = Game(saddle, torch.randn(5, 1), torch.randn(3))
    twin = copy.deepcopy(game)
    assert torch.equal(play(game, method, sgd(0.1), 10), play(twin, same, sgd(0.1), 10))


# Constraints and regularisers.


def resolvent(F: Operator, anchor: Tensor, gamma: float, lam: float, inner: int, prox: Operator) -> Tensor:
    z = anchor
    for _ in range(inner):
        z = prox(anchor - gamma * F(z))
    return (1 - lam) * anchor + lam * z


def ceg_plus(F: Operator, z: Tensor, gamma: float, alpha: float, prox: Operator) -> Tensor:
    """As in the notebooks of https://github.com/LIONS-EPFL/weak-minty-code."""
    hz = z - gamma * F(z)
    bar = prox(hz)
    return z + alpha * (bar - gamma * F(bar) - hz)


def clipped(z: Tensor) -> Tensor:
    return torch.tensor([min(max(t, -0.6), 0.5) for t in z.tolist()], dtype=torch.double)


def halves(z: Tensor) -> Tensor:
    """x in a box, and y shrunk by 0.2 * 0.7."""
    y = [t - 0.14 if t > 0.14 else t + 0.14 if t < -0.14 else 0.0 for t in z[5:].tolist()]
    return torch.cat([clipped(z[:5]), torch.tensor(y, dtype=torch.double)])


def in_ball(z: Tensor) -> Tensor:
    return z / max(1.0, z.norm().item() / 0.8)


BOX = Box(-0.6, 0.5)
NAMED = {"x": BOX, "y": L1(0.7)}
BALL = lambda point, oracle, gamma: point / (point.norm() / 0.8).clamp_min(1.0)  # noqa: E731
CONSTRAINED = {
    "GDA": (RAPP(0.2, 1, BOX), sgd(0.2), 1, lambda z: resolvent(operator, z, 0.2, 1.0, 1, clipped)),
    "EG": (ExtraGradient(0.2, BOX), sgd(0.2), 1, lambda z: resolvent(operator, z, 0.2, 1.0, 2, clipped)),
    "RAPP": (RAPP(0.2, 4, BOX), sgd(0.06), 1, lambda z: resolvent(operator, z, 0.2, 0.3, 4, clipped)),
    "RAPP-named": (RAPP(0.2, 3, NAMED), sgd(0.1), 1, lambda z: resolvent(operator, z, 0.2, 0.5, 3, halves)),
    "RAPP-ball": (RAPP(0.2, 3, BALL), sgd(0.18), 1, lambda z: resolvent(operator, z, 0.2, 0.9, 3, in_ball)),
    "CEG+": (CEGPlus(0.2, BOX), sgd(0.1), 1, lambda z: ceg_plus(operator, z, 0.2, 0.5, clipped)),
    "CEG+-named": (CEGPlus(0.2, NAMED), sgd(0.05), 1, lambda z: ceg_plus(operator, z, 0.2, 0.25, halves)),
    "LA-CEG+": (
        CEGPlus(0.2, BOX),
        pulled(0.1, 3, 0.4),
        3,
        lambda z: la(lambda F, z, gamma: ceg_plus(F, z, gamma, 0.5, clipped), operator, z, 0.2, 3, 0.4),
    ),
    "LA-GDA": (
        RAPP(0.2, 1, BOX),
        pulled(0.2, 4, 0.5),
        4,
        lambda z: la(lambda F, z, gamma: resolvent(F, z, gamma, 1.0, 1, clipped), operator, z, 0.2, 4, 0.5),
    ),
}


@pytest.mark.parametrize("case", CONSTRAINED)
def test_a_constrained_game_equals_the_slow_twin(case):
    method, make, steps, twin = CONSTRAINED[case]
    torch.manual_seed(1)
    game = Game(saddle, torch.randn(5, 1), torch.randn(3))
    z, free = game.point, game.point
    for _ in range(10):
        z, free = twin(z), rapp(operator, free, 0.2, 0.5, 3)
    torch.testing.assert_close(play(game, method, make, 10 * steps), z, rtol=0, atol=1e-12)
    assert (z - free).norm() > 0.1


@pytest.mark.parametrize("method", [RAPP(0.3, 3, BOX), CEGPlus(0.3, BOX), ExtraGradient(0.3, NAMED)], ids=str)
def test_the_gradient_is_the_operator_plus_a_subgradient(method):
    """F(z) + xi with -gamma (F + xi) the step to z' = prox(p): xi is 0 inside, and points outwards on the border."""
    game = Game(saddle, torch.randn(5, 1), torch.randn(3))
    free = copy.deepcopy(game)
    for one, how in ((game, method), (free, RAPP(0.3, method.inner if isinstance(method, RAPP) else 2))):
        SharpnessAware(one, how, lambda value, _: value, lambda game: (game(), None))().backward()
    xi = torch.cat([p.grad.reshape(-1) for p in game.parameters()]) - torch.cat(
        [p.grad.reshape(-1) for p in free.parameters()]
    )
    assert xi.norm() > 0.1
    if isinstance(method, RAPP) and method.prox == BOX:
        start = game.point
        step = start - 0.3 * torch.cat([p.grad.reshape(-1) for p in game.parameters()])
        assert step.min() >= -0.6 - 1e-12
        assert step.max() <= 0.5 + 1e-12


def test_relaxed_steps_stay_in_the_box():
    game = Game(saddle, torch.full((5, 1), 0.5), torch.full((3,), -0.6))
    for _ in range(30):
        play(game, RAPP(0.3, 3, BOX), sgd(0.9 * 0.3), 1)
        assert game.point.min() >= -0.6 - 1e-15
        assert game.point.max() <= 0.5 + 1e-15


@pytest.mark.slow
def test_a_matrix_game_of_mixed_strategies():
    """Rock, paper, scissors, where a won rock counts twice: the solution by hand is (1, 2, 1)/4 for both."""
    payoff = torch.tensor([[0.0, 1.0, -2.0], [-1.0, 0.0, 1.0], [2.0, -1.0, 0.0]], dtype=torch.double)
    for method in (RAPP(0.2, prox=Simplex()), RAPP(0.2, prox={"x": Simplex(), "y": Simplex(1.0)})):
        game = Game(lambda x, y: x @ payoff @ y, torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 1.0]))
        end = play(game, method, sgd(0.9 * 0.2), 2000)
        torch.testing.assert_close(end, torch.tensor([1, 2, 1, 1, 2, 1], dtype=torch.double) / 4, rtol=0, atol=1e-6)


def test_a_regularised_problem_by_hand():
    """min ||w - b||^2/2 + 0.4 ||w||_1 has the solution that b shrunk by 0.4 is."""
    b = torch.tensor([1.0, 0.3, -0.5, -0.1], dtype=torch.double)
    solution = torch.tensor([0.6, 0.0, -0.1, 0.0], dtype=torch.double)
    for method, lr in ((RAPP(0.5, 10, L1(0.4)), 0.5), (CEGPlus(0.5, L1(0.4)), 0.25)):
        game = Game(lambda x, y: (x - b).square().sum() / 2 + 0 * y.sum(), torch.zeros(4), torch.zeros(1))
        torch.testing.assert_close(play(game, method, sgd(lr), 200)[:4], solution, rtol=0, atol=1e-8)


class Unused(nn.Module):
    """A parameter that the loss does not depend on, beside one that it does."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = (nn.Parameter(torch.tensor([3.0, -3.0], dtype=torch.double)) for _ in range(2))

    def forward(self) -> Tensor:
        return self.used.square().sum()


@pytest.mark.parametrize("make", [RAPP, CEGPlus])
def test_a_parameter_that_the_loss_does_not_use(make):
    """It has a gradient exactly if it is constrained."""
    for prox, expected in (({"used": BOX}, None), ({"unused": BOX}, [2.5, -2.4]), (BOX, [2.5, -2.4])):
        model = Unused()
        sharp = SharpnessAware(model, make(gamma=0.1, prox=prox), lambda value, _: value, lambda model: (model(), None))
        sharp().backward()
        grad = model.unused.grad
        assert grad is None if expected is None else torch.allclose(grad * 0.1, torch.tensor(expected).double())


@pytest.mark.parametrize(
    ("prox", "error", "words"),
    [
        ({"z": BOX}, ValueError, "prox names 'z', and the model has no trainable parameter.*its parameters are x, y"),
        ({"x": BOX, "y": BOX, "": BOX}, ValueError, "prox names ''"),
        ({"x": None}, TypeError, "prox maps names of parameters or modules to operators such as .*'x': None"),
        ({0: BOX}, TypeError, "prox maps names"),
        ({"y": Simplex()}, ValueError, "Simplex needs a parameter with a dimension"),
        (Box, TypeError, "prox is the class Box"),
    ],
    ids=str,
)
def test_a_prox_that_does_not_fit_is_refused(prox, error, words):
    with pytest.raises(error, match=words):
        play(quadratic(0.0, 1.0), RAPP(0.1, prox=prox), sgd(0.1), 1)


def test_two_operators_for_one_parameter_are_refused():
    gan = GAN()
    sharp = SharpnessAware(
        gan,
        RAPP(0.1, prox={"generator": BOX, "generator.0.weight": BOX}),
        lambda value, _: value,
        lambda gan, *batch: (gan(*batch), None),
    )
    with pytest.raises(ValueError, match=r"two operators for parameter 'generator\.0\.weight'"):
        sharp(torch.randn(6, 3).double(), torch.randn(6, 2).double())


# Two networks.


class GAN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)).double()
        self.discriminator = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()

    def forward(self, real: Tensor, noise: Tensor) -> Tensor:
        fake = self.generator(noise)
        frozen = {name: p.detach() for name, p in self.discriminator.named_parameters()}
        fooled = functional_call(self.discriminator, frozen, fake)
        watched = F.softplus(-self.discriminator(real)) + F.softplus(self.discriminator(fake.detach()))
        return (watched + F.softplus(-fooled)).squeeze(1)


def losses(gan: GAN, real: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Losses of the generator and the discriminator, as in a loop with two optimizers."""
    fake = gan.generator(noise)
    told = F.softplus(-gan.discriminator(real)) + F.softplus(gan.discriminator(fake))
    return F.softplus(-gan.discriminator(fake)).mean(), told.mean()


def test_each_loss_reaches_its_own_player_only():
    gan, batch = GAN(), (torch.randn(6, 3).double(), torch.randn(6, 2).double())
    generator, discriminator = losses(gan, *batch)
    expected = [
        *torch.autograd.grad(generator, list(gan.generator.parameters()), retain_graph=True),
        *torch.autograd.grad(discriminator, list(gan.discriminator.parameters())),
    ]
    sharp = SharpnessAware(gan, ERM(), lambda value, _: value, lambda gan, *batch: (gan(*batch), None))
    sharp(*batch).backward()
    torch.testing.assert_close([p.grad for p in gan.parameters()], expected, rtol=0, atol=1e-14)


def test_a_gan_by_rapp_equals_a_loop_by_hand():
    gan = GAN()
    twin = copy.deepcopy(gan)
    sharp = SharpnessAware(gan, RAPP(0.3), lambda value, _: value, lambda gan, *batch: (gan(*batch), None))
    optimizer = SGD(gan.parameters(), lr=0.15)
    players = list(twin.generator.parameters()), list(twin.discriminator.parameters())
    for step in range(10):
        generator = torch.Generator().manual_seed(step)
        batch = [torch.randn(6, n, generator=generator, dtype=torch.double) for n in (3, 2)]
        optimizer.zero_grad()
        sharp(*batch).backward()
        optimizer.step()
        anchor = [p.detach().clone() for player in players for p in player]
        for _ in range(3):
            both = losses(twin, *batch)
            pairs = zip(both, players, strict=True)
            g = [g for loss, player in pairs for g in torch.autograd.grad(loss, player, retain_graph=True)]
            with torch.no_grad():
                for p, w, part in zip([*players[0], *players[1]], anchor, g, strict=True):
                    p.copy_(w - 0.3 * part)
        with torch.no_grad():
            for p, w in zip([*players[0], *players[1]], anchor, strict=True):
                p.copy_(0.5 * w + 0.5 * p)
    torch.testing.assert_close(list(gan.parameters()), list(twin.parameters()), rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", [RAPP(0.3, 3, fresh=True), ExtraGradient(0.3, fresh=True)], ids=str)
def test_fresh_batches_equal_a_loop_by_hand(method):
    torch.manual_seed(0)
    gan = GAN()
    twin = copy.deepcopy(gan)
    sharp = SharpnessAware(gan, method, lambda value, _: value, lambda gan, *batch: (gan(*batch), None))
    optimizer, players = SGD(gan.parameters(), lr=0.15), list(twin.parameters())
    for _ in range(5):
        batches = [[torch.randn(6, n, dtype=torch.double) for n in (3, 2)] for _ in range(method.inner)]
        optimizer.zero_grad()
        sharp(*batches).backward()
        optimizer.step()
        anchor = [p.detach().clone() for p in players]
        for batch in batches:
            g = torch.autograd.grad(twin(*batch).mean(), players)
            with torch.no_grad():
                for p, w, part in zip(players, anchor, g, strict=True):
                    p.copy_(w - 0.3 * part)
        with torch.no_grad():
            for p, w in zip(players, anchor, strict=True):
                p.copy_(0.5 * w + 0.5 * p)
    torch.testing.assert_close(players, list(gan.parameters()), rtol=0, atol=1e-12)


def test_the_same_batch_thrice_is_one_batch():
    batch, found = (torch.randn(6, 3).double(), torch.randn(6, 2).double()), []
    gans = [GAN()]
    gans.append(copy.deepcopy(gans[0]))
    for gan, method, batches in zip(gans, (RAPP(0.3), RAPP(0.3, fresh=True)), (batch, [batch] * 3), strict=True):
        sharp = SharpnessAware(gan, method, lambda value, _: value, lambda gan, *batch: (gan(*batch), None))
        sharp(*batches).backward()
        found.append([p.grad for p in gan.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("number", [0, 1, 2, 4])
def test_another_number_of_fresh_batches_is_refused(number):
    gan, batch = GAN(), (torch.randn(6, 3).double(), torch.randn(6, 2).double())
    sharp = SharpnessAware(gan, RAPP(0.3, fresh=True), lambda value, _: value, lambda gan, *batch: (gan(*batch), None))
    before = [p.clone() for p in gan.parameters()]
    with pytest.raises(ValueError, match=rf"call the loss with 3 batches, as in sharp\(\*batches\), got {number}"):
        sharp(*[batch] * number)
    assert all(torch.equal(a, b) for a, b in zip(before, gan.parameters(), strict=True))


def test_the_code_of_the_page_runs():
    page = (Path(__file__).parents[2] / "docs" / "games.md").read_text()
    found, names = re.findall(r"```python\n(.*?)```", page, re.DOTALL), {}
    assert len(found) == 4
    for code in found:
        exec(compile(code, "docs/games.md", "exec"), names)
    for player in names["game"].parameters():
        torch.testing.assert_close(player.data, torch.tensor([0.25, 0.5, 0.25]), rtol=0, atol=1e-3)
