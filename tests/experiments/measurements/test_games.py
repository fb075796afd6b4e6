"""RAPP's synthetic figures: the games are those of the literature, and the trajectories those of the algorithms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("matplotlib")

from bisam.experiments.measurements import MEASUREMENTS, report, run
from bisam.experiments.measurements.games import PLAYERS, PROBLEMS, trajectory

RAPP_FIGURES = MEASUREMENTS["rapp-figures"]


def of_saddle(f) -> Tensor:
    """The operator of a zero-sum game at some points, by autograd."""

    def at(z: Tensor) -> Tensor:
        z = z.clone().requires_grad_()
        (g,) = torch.autograd.grad(f(z[..., 0], z[..., 1]).sum(), z)
        return g * torch.tensor([1.0, -1.0])

    return at


def phi(t: Tensor) -> Tensor:
    return t**2 / 4 - t**4 / 2 + t**6 / 6


def global_phi(t: Tensor) -> Tensor:
    return 2 * t**6 / 21 - t**4 / 3 + t**2 / 3


def psi(x: Tensor, y: Tensor) -> Tensor:
    return x / 3 / 16 * (-1 + x**2 + y**2) * (-9 + 16 * x**2 + 16 * y**2)


OPERATORS = {
    "forsaken": of_saddle(lambda x, y: x * (y - 0.45) + phi(x) - phi(y)),
    "polar": lambda z: torch.stack([psi(z[..., 0], z[..., 1]) - z[..., 1], psi(z[..., 1], z[..., 0]) + z[..., 0]], -1),
    "global-forsaken": of_saddle(lambda x, y: x * y + global_phi(x) - global_phi(y)),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_games_are_those_of_the_papers(name):
    problem = PROBLEMS[name]
    z = (torch.rand(50, 2, dtype=torch.double) * 2 - 1) * problem.side
    torch.testing.assert_close(problem.operator(z), OPERATORS[name](z), rtol=0, atol=1e-12)
    assert problem.operator(torch.tensor(problem.solution, dtype=torch.double)).norm() < 1e-12
    assert max(map(abs, problem.start)) <= problem.side
    grid = torch.linspace(-problem.side, problem.side, 121, dtype=torch.double)
    points = torch.cartesian_prod(grid, grid)
    jacobian = torch.func.vmap(torch.func.jacrev(problem.operator))(points)
    assert torch.linalg.matrix_norm(jacobian, 2).max().item() == pytest.approx(problem.lipschitz, rel=1e-3)


def projected(z: Tensor, side: float) -> Tensor:
    return z.clamp(-side, side)


@pytest.mark.parametrize("name", PLAYERS)
@pytest.mark.parametrize("game", PROBLEMS)
def test_trajectories_by_hand(game, name):
    problem, settings = PROBLEMS[game], {**RAPP_FIGURES.settings, "evaluations": 60, "k": 5}
    gamma, side, F = 1 / problem.lipschitz, problem.side, problem.operator
    z = torch.tensor(problem.start, dtype=torch.double)
    points, evaluations = [(0, *z.tolist())], 0

    def once(z: Tensor) -> tuple[Tensor, int]:
        if name.endswith("GDA"):
            return projected(z - gamma * F(z), side), 1
        if name.endswith("CEG+"):
            bar = projected(z - gamma * F(z), side)
            return z + 0.5 * ((bar - gamma * F(bar)) - (z - gamma * F(z))), 2
        bar = z
        for _ in range(inner := 2 if name.endswith("EG") else 3):
            bar = projected(z - gamma * F(bar), side)
        return (z + 0.5 * (bar - z) if name == "RAPP" else bar), inner

    while evaluations < 60:
        slow = z
        for _ in range(5 if name.startswith("LA") else 1):
            z, cost = once(z)
            evaluations += cost
        z = slow + 0.2 * (z - slow) if name.startswith("LA") else z
        points.append((evaluations, *projected(z, side).tolist()))
    found = trajectory(problem, PLAYERS[name], settings)
    found, points = (torch.tensor(one, dtype=torch.double) for one in (found, points))
    torch.testing.assert_close(found, points, rtol=0, atol=1e-10)


@pytest.mark.slow
def test_the_default_settings_tell_the_methods_apart(tmp_path):
    ends = {(row["game"], row["method"]): row["distance"] for row in report(
        RAPP_FIGURES, run(RAPP_FIGURES, {}, tmp_path)
    ).rows}  # fmt: skip
    solved = {key for key, distance in ends.items() if distance < 0.2}
    assert {game for game, method in solved if method == "LA-CEG+"} == set(PROBLEMS)
    assert {game for game, method in solved if method == "RAPP"} == {"polar", "global-forsaken"}
    assert {game for game, method in solved if method == "LA-GDA"} == {"forsaken", "polar"}
    assert not {game for game, method in solved if method == "GDA"}


def test_a_small_run_and_its_report(tmp_path):
    folder = run(RAPP_FIGURES, {"evaluations": "12", "methods": "GDA,RAPP,LA-CEG+", "k": "2"}, tmp_path)
    shown = report(RAPP_FIGURES, folder)
    assert [cell[:2] for cell in shown.cells] == [(g, m) for g in PROBLEMS for m in ("GDA", "RAPP", "LA-CEG+")]
    assert len(shown.rows) == 3 * (13 + 5 + 4)
    assert [len(figure.axes) for figure in shown.figures.values()] == [3, 3]
    assert "trajectories.png" in shown.markdown
    assert "not found in a public source" in shown.markdown


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"games": "forsake"}, "unknown game 'forsake', did you mean 'forsaken'"),
        ({"methods": "LA-GAD"}, "unknown method 'LA-GAD', did you mean 'LA-GDA'"),
        ({"step": "0"}, r"setting step must be in \(0, inf\], got 0.0"),
        ({"step": "nan"}, "setting step must be in"),
        ({"step": "inf"}, "setting step must be in"),
        ({"lam": "1.1"}, r"setting lam must be in \(0, 1\], got 1.1"),
        ({"alpha": "-1"}, "setting alpha must be in"),
        ({"inner": "0"}, "inner must be at least 1"),
        ({"k": "1.5"}, "k must be a whole number"),
    ],
)
def test_wrong_settings_are_named(tmp_path, changed, message):
    with pytest.raises(ValueError, match=message):
        run(RAPP_FIGURES, changed, tmp_path)
    assert not list(tmp_path.iterdir())
