"""ProximalPoint: extragradient methods and RAPP in an optimizer, against twins in float64 and the authors' code."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import StepLR

from bisam import RAPP, ExtraGradient, Lookahead, ProximalPoint, SharpnessAware
from tests.methods.test_games import Game, operator, play, saddle

AUTHORS = json.loads((Path(__file__).parents[1] / "data" / "linear_interpolation.json").read_text())


class Moments:
    """Adam's update on one flat vector (Kingma and Ba, 2015)."""

    def __init__(self, lr: float, b1: float, b2: float, eps: float) -> None:
        self.lr, self.b1, self.b2, self.eps, self.t, self.m, self.v = lr, b1, b2, eps, 0, 0.0, 0.0

    def __call__(self, g: Tensor) -> Tensor:
        self.t += 1
        self.m = self.b1 * self.m + (1 - self.b1) * g
        self.v = self.b2 * self.v + (1 - self.b2) * g * g
        return -self.lr * self.m / (1 - self.b1**self.t) / ((self.v / (1 - self.b2**self.t)).sqrt() + self.eps)


def rounds(update: Callable[[Tensor], Tensor], z: Tensor, inner: int, alpha: float, number: int) -> Tensor:
    for _ in range(number):
        w = z
        for _ in range(inner):
            z = w + update(operator(z))
        z = (1 - alpha) * w + alpha * z
    return z


def simultaneous(game: Game, optimizer: torch.optim.Optimizer, steps: int) -> Tensor:
    for _ in range(steps):
        optimizer.zero_grad()
        game().backward()
        optimizer.step()
    return game.point


def start() -> Game:
    torch.manual_seed(0)
    return Game(saddle, torch.randn(5, 1), torch.randn(3))


FORMS = {"ExtraAdam": (2, 1.0), "ExtraAdam+": (2, 0.5), "RAPP with Adam": (3, 0.9), "five": (5, 0.3)}


@pytest.mark.parametrize("betas", [(0.0, 0.9), (0.9, 0.999)])
@pytest.mark.parametrize("form", FORMS)
def test_adam_equals_the_slow_twin(form, betas):
    (inner, alpha), game = FORMS[form], start()
    expected = rounds(Moments(0.05, *betas, 1e-8), game.point, inner, alpha, 12)
    optimizer = ProximalPoint(Adam(game.parameters(), lr=0.05, betas=betas), inner, alpha)
    torch.testing.assert_close(simultaneous(game, optimizer, 12 * inner), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("k", [1, 3])
def test_lookahead_around_extra_adam_equals_the_slow_twin(k):
    game, update = start(), Moments(0.05, 0.5, 0.9, 1e-8)
    z = game.point
    for _ in range(6):
        z = z + 0.4 * (rounds(update, z, 2, 1.0, k) - z)
    optimizer = Lookahead(ProximalPoint(Adam(game.parameters(), lr=0.05, betas=(0.5, 0.9))), k=2 * k, alpha=0.4)
    torch.testing.assert_close(simultaneous(game, optimizer, 12 * k), z, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("inner", "alpha", "method"),
    [(1, 0.5, RAPP(0.2, 1)), (2, 1.0, ExtraGradient(0.2)), (2, 0.5, ExtraGradient(0.2)), (3, 0.9, RAPP(0.2))],
)
def test_with_sgd_it_is_the_method(inner, alpha, method):
    """RAPP as an optimizer and as a method."""
    optimizer = ProximalPoint(SGD((game := start()).parameters(), lr=0.2), inner, alpha)
    other = play(start(), method, lambda p: SGD(p, lr=alpha * 0.2), 10)
    torch.testing.assert_close(simultaneous(game, optimizer, 10 * inner), other, rtol=0, atol=1e-13)


@pytest.mark.parametrize("make", [lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1), lambda p: AdamW(p, lr=0.1)])
def test_one_inner_step_is_the_optimizer_inside(make):
    game, plain = start(), start()
    assert torch.equal(
        simultaneous(game, ProximalPoint(make(game.parameters()), inner=1), 10),
        simultaneous(plain, make(plain.parameters()), 10),
    )


# The authors' code. Its Adam adds eps before the correction of the second moment, so that the fixture has eps = 0.

AUTHORED = {
    "GDA": lambda p, lr: SGD(p, lr=lr),
    "EG": lambda p, lr: ProximalPoint(SGD(p, lr=lr)),
    "EG+": lambda p, lr: ProximalPoint(SGD(p, lr=lr), alpha=0.5),
    "RAPP": lambda p, lr: ProximalPoint(SGD(p, lr=lr), inner=3, alpha=0.9),
    "LA-GDA": lambda p, lr: Lookahead(SGD(p, lr=lr), k=4, alpha=0.5),
    "Adam": lambda p, lr: Adam(p, lr=lr, betas=(0.0, 0.9), eps=0.0),
    "ExtraAdam": lambda p, lr: ProximalPoint(Adam(p, lr=lr, betas=(0.0, 0.9), eps=0.0)),
    "ExtraAdam+": lambda p, lr: ProximalPoint(Adam(p, lr=lr, betas=(0.0, 0.9), eps=0.0), alpha=0.5),
    "LA-Adam": lambda p, lr: Lookahead(Adam(p, lr=lr, betas=(0.0, 0.9), eps=0.0), k=4, alpha=0.5),
    "LA-ExtraAdam": lambda p, lr: Lookahead(ProximalPoint(Adam(p, lr=lr, betas=(0.0, 0.9), eps=0.0)), k=4, alpha=0.5),
}


@pytest.mark.parametrize("name", AUTHORED)
def test_players_that_take_turns_equal_the_authors_code(name):
    """One optimizer for each player; y steps first, and x sees it."""
    case = AUTHORS["trajectories"][name]
    x, y = (torch.tensor(AUTHORS[player], dtype=torch.double) for player in "xy")
    game = Game(saddle, x.view(5, 1), y)
    optimizers = [(game.y, AUTHORED[name]([game.y], case["lr_y"])), (game.x, AUTHORED[name]([game.x], case["lr_x"]))]
    if name in AUTHORS["pulls"]:
        Lookahead.joint(*[optimizer for _, optimizer in optimizers])
    for expected in case["points"]:
        for _ in range(case["steps"]):
            for player, optimizer in optimizers:
                (player.grad,) = torch.autograd.grad(game(), player)
                optimizer.step()
        torch.testing.assert_close(game.point, torch.tensor(expected, dtype=torch.double), rtol=0, atol=1e-12)


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("kind", [Lookahead, ProximalPoint])
def test_joint_players_move_back_together(kind, copied):
    game = start()
    optimizers = [kind(SGD([p], lr=0.1), 3, 0.5) for p in (game.y, game.x)]
    Lookahead.joint(*optimizers)
    if copied:
        game, optimizers = copy.deepcopy((game, optimizers))
    players, z = (game.y, game.x), game.point
    fast = z
    for step in range(9):
        for i in (0, 1):  # y first
            mine = slice(5, 8) if i == 0 else slice(0, 5)
            begin = z if kind is ProximalPoint else fast
            fast = fast.clone()
            fast[mine] = (begin - 0.1 * operator(fast))[mine]
            (players[i].grad,) = torch.autograd.grad(game(), players[i])
            optimizers[i].step()
        if step % 3 == 2:
            z = fast = 0.5 * z + 0.5 * fast
        torch.testing.assert_close(game.point, fast, rtol=0, atol=1e-14)


def test_joint_takes_optimizers_that_move_back():
    w = nn.Parameter(torch.zeros(1))
    with pytest.raises(TypeError, match="joint takes Lookahead or ProximalPoint optimizers, got SGD"):
        Lookahead.joint(Lookahead(SGD([w], lr=0.1)), SGD([w], lr=0.1))


# An optimizer like any other; copies and checkpoints are in test_lookahead.py.


def test_a_closure_is_evaluated_at_z():
    game, plain = start(), start()
    optimizer = ProximalPoint(SGD(game.parameters(), lr=0.2), inner=3)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = game()
        value.backward()
        return value

    losses = [optimizer.step(closure).item() for _ in range(6)]
    expected = simultaneous(plain, ProximalPoint(SGD(plain.parameters(), lr=0.2), inner=3), 6)
    assert torch.equal(game.point, expected)
    assert len(losses) == 6


def test_weight_decay_is_that_of_w():
    w = nn.Parameter(torch.ones(1, dtype=torch.double))
    optimizer = ProximalPoint(SGD([w], lr=0.1, weight_decay=0.5))
    for _ in range(2):
        w.grad = w.detach().clone()
        optimizer.step()
    z = 1 - 0.1 * (1 + 0.5 * 1)
    assert w.item() == pytest.approx(1 - 0.1 * (z + 0.5 * 1), abs=1e-15)


def test_schedules_and_groups():
    game = start()
    optimizer = ProximalPoint(SGD([{"params": [game.x]}, {"params": [game.y], "lr": 0.05}], lr=0.2))
    schedule = StepLR(optimizer, 2, 0.5)
    z, lr = game.point, torch.tensor([0.2] * 5 + [0.05] * 3, dtype=torch.double)
    for _ in range(3):
        z = z - lr * operator(z - lr * operator(z))
        lr = lr / 2
    for _ in range(6):
        simultaneous(game, optimizer, 1)
        schedule.step()
    torch.testing.assert_close(game.point, z, rtol=0, atol=1e-14)


def test_inside_a_loss_with_a_method():
    """A stochastic ascent for a robust GAN, say: the optimizer takes any gradient."""
    game = start()
    optimizer = ProximalPoint(SGD(game.parameters(), lr=0.1))
    sharp = SharpnessAware(game, RAPP(0.1, 1), lambda value, _: value, lambda game: (game(), None))
    plain = start()
    for _ in range(4):
        optimizer.zero_grad()
        sharp().backward()
        optimizer.step()
    expected = simultaneous(plain, ProximalPoint(SGD(plain.parameters(), lr=0.1)), 4)
    assert torch.equal(game.point, expected)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"inner": 0}, ValueError, "inner must be at least 1, got 0"),
        ({"inner": 2.0}, TypeError, "inner must be an int, got 2.0"),
        ({"alpha": 0.0}, ValueError, r"alpha must be in \(0, 1\], got 0.0"),
        ({"alpha": 1.5}, ValueError, r"alpha must be in \(0, 1\], got 1.5"),
        ({"optimizer": Adam}, TypeError, "ProximalPoint takes an optimizer"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, words):
    with pytest.raises(error, match=words):
        ProximalPoint(**{"optimizer": SGD([nn.Parameter(torch.zeros(1))]), **arguments})


@pytest.mark.parametrize("k", [1, 3, 5])
def test_lookahead_does_not_interrupt_inner_steps(k):
    with pytest.raises(ValueError, match=f"k must be a multiple of the 2 steps of the ProximalPoint inside, got {k}"):
        Lookahead(ProximalPoint(SGD([nn.Parameter(torch.zeros(1))])), k)


def test_it_names_itself():
    optimizer = ProximalPoint(inside := SGD([nn.Parameter(torch.zeros(1))]), 3, 0.9)
    assert repr(optimizer) == f"ProximalPoint({inside!r}, inner=3, alpha=0.9)"
    assert (optimizer.inner, optimizer.alpha) == (3, 0.9)
