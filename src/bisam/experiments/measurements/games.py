"""RAPP's synthetic figures: trajectories on three games whose solution is surrounded by limit cycles."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from bisam import RAPP, CEGPlus, ExtraGradient, Lookahead, Method, SharpnessAware
from bisam.experiments.errors import unknown
from bisam.experiments.measurements.measurement import Measurement, Row, Settings
from bisam.experiments.studies import papers
from bisam.proximal import Box

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Problem:
    """A game of two players x and y with one number each, in a box around 0.

    Attributes:
        title: name in the literature.
        operator: F, from positions (..., 2) to (f_x, -f_y) (..., 2).
        side: the box is [-side, side] for each player.
        lipschitz: Lipschitz constant of F in the box.
        start: where trajectories begin.
        solution: the stationary point.
    """

    title: str
    operator: Callable[[Tensor], Tensor]
    side: float
    lipschitz: float
    start: tuple[float, float]
    solution: tuple[float, float]


def forsaken(z: Tensor) -> Tensor:
    """F = x (y - 0.45) + phi(x) - phi(y), phi(t) = t^2/4 - t^4/2 + t^6/6 (Hsieh et al., 2021, Example 5.2)."""
    x, y = z.unbind(-1)
    return torch.stack([y - 0.45 + _forsaken_slope(x), 0.0 - x + _forsaken_slope(y)], -1)


def polar(z: Tensor) -> Tensor:
    """F = (psi z_1 - z_2, psi z_2 + z_1), psi = (|z|^2 - 1) (16 |z|^2 - 9)/48 (Pethick et al., 2022, Example 3(iii)).

    Not the gradient of a zero-sum game. The circles with radii 1 and 3/4 are limit cycles of its flow.
    """
    r = z.square().sum(-1, keepdim=True)
    return (r - 1) * (16 * r - 9) / 48 * z + torch.stack([-z[..., 1], z[..., 0]], -1)


def global_forsaken(z: Tensor) -> Tensor:
    """F = x y + phi(x) - phi(y), phi(t) = t^2/3 - t^4/3 + 2 t^6/21 (Pethick et al., 2022, Example 5)."""
    x, y = z.unbind(-1)
    return torch.stack([y + _global_slope(x), 0.0 - x + _global_slope(y)], -1)


def _forsaken_slope(t: Tensor) -> Tensor:
    return t / 2 - 2 * t**3 + t**5


def _global_slope(t: Tensor) -> Tensor:
    return 2 / 3 * t - 4 / 3 * t**3 + 4 / 7 * t**5


# Boxes, Lipschitz constants and starts of the first author's notebooks, https://github.com/LIONS-EPFL/weak-minty-code.
PROBLEMS: dict[str, Problem] = {
    "forsaken": Problem(
        "Forsaken (Hsieh et al., 2021, Ex. 5.2)",
        forsaken,
        3 / 2,
        math.sqrt((993841 + 1089 * math.sqrt(801761)) / 2) / 80,
        (1.0, -0.8),
        (0.07802666873846008, 0.4119338513658209),
    ),
    "polar": Problem(
        "PolarGame (Pethick et al., 2022, Ex. 3(iii))",
        polar,
        11 / 10,
        math.sqrt(73446989617 + 2538096 * math.sqrt(754424929)) / 60000,
        (1.0, 0.5),
        (0.0, 0.0),
    ),
    "global-forsaken": Problem(
        "GlobalForsaken (Pethick et al., 2022, Ex. 5)",
        global_forsaken,
        4 / 3,
        math.sqrt((74125591 + 9409 * math.sqrt(59721901)) / 2) / 2835,
        (1.2, 1.2),
        (0.0, 0.0),
    ),
}


@dataclass(frozen=True)
class Player:
    """How an algorithm plays.

    Attributes:
        method: `(gamma, inner, prox) -> method`.
        optimizer: `(parameters, gamma, settings) -> optimizer`.
        colour: of its lines (Okabe and Ito, 2008).
        width: of its lines, in points.
        pulls: whether only every k-th point is on the trajectory, as with Lookahead.
    """

    method: Callable[[float, int, Box], Method]
    optimizer: Callable[[Any, float, Settings], Optimizer]
    colour: str
    width: float = 1.7
    pulls: bool = False


def _lookahead(optimizer: Optimizer, settings: Settings) -> Lookahead:
    return Lookahead(optimizer, settings["k"], settings["alpha"])


PLAYERS: dict[str, Player] = {
    "GDA": Player(lambda gamma, _, prox: RAPP(gamma, 1, prox), lambda p, gamma, _: SGD(p, lr=gamma), "#7F7F7F", 0.7),
    "EG": Player(lambda gamma, _, prox: ExtraGradient(gamma, prox), lambda p, gamma, _: SGD(p, lr=gamma), "#56B4E9"),
    "CEG+": Player(lambda gamma, _, prox: CEGPlus(gamma, prox), lambda p, gamma, _: SGD(p, lr=gamma / 2), "#0072B2"),
    "RAPP": Player(RAPP, lambda p, gamma, settings: SGD(p, lr=settings["lam"] * gamma), "#D55E00"),
    "LA-GDA": Player(
        lambda gamma, _, prox: RAPP(gamma, 1, prox),
        lambda p, gamma, settings: _lookahead(SGD(p, lr=gamma), settings),
        "#E69F00",
        pulls=True,
    ),
    "LA-EG": Player(
        lambda gamma, _, prox: ExtraGradient(gamma, prox),
        lambda p, gamma, settings: _lookahead(SGD(p, lr=gamma), settings),
        "#009E73",
        pulls=True,
    ),
    "LA-CEG+": Player(
        lambda gamma, _, prox: CEGPlus(gamma, prox),
        lambda p, gamma, settings: _lookahead(SGD(p, lr=gamma / 2), settings),
        "#CC79A7",
        pulls=True,
    ),
}


class Position(nn.Module):
    """The players' position; the value has the operator of the game as its gradient."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.operator, self.evaluations = problem.operator, 0
        self.z = nn.Parameter(torch.tensor(problem.start, dtype=torch.double))

    def forward(self) -> Tensor:
        """Return a scalar whose gradient with respect to z is F(z); it is counted."""
        self.evaluations += 1
        return (self.operator(self.z.detach()) * self.z).sum()


def trajectory(problem: Problem, player: Player, settings: Settings) -> list[tuple[int, float, float]]:
    """Evaluations of the operator, x and y along the trajectory of an algorithm; positions are projected to the box."""
    gamma, prox, position = settings["step"] / problem.lipschitz, Box(-problem.side, problem.side), Position(problem)
    method = player.method(gamma, settings["inner"], prox)
    optimizer = player.optimizer(position.parameters(), gamma, settings)
    sharp = SharpnessAware(position, method, lambda value, _: value, lambda position: (position(), None))
    every, points = settings["k"] if player.pulls else 1, [(0, *problem.start)]
    while position.evaluations < settings["evaluations"]:
        for _ in range(every):
            optimizer.zero_grad()
            sharp().backward()
            optimizer.step()
        x, y = prox.of(position.z.detach(), gamma).tolist()
        points.append((position.evaluations, x, y))
    return points


def _parts(settings: Settings) -> list[str]:
    for name, known in (("games", PROBLEMS), ("methods", PLAYERS)):
        for value in settings[name]:
            if value not in known:
                raise unknown(name.removesuffix("s"), value, known)
    for name, most in (("step", math.inf), ("lam", 1.0), ("alpha", 1.0)):
        if not 0 < settings[name] <= most or settings[name] == math.inf:
            raise ValueError(f"setting {name} must be in (0, {most:g}], got {settings[name]}")
    return list(settings["games"])


def _measure(part: str, settings: Settings, device: torch.device) -> list[dict[str, Any]]:
    del device  # two numbers
    problem, rows = PROBLEMS[part], list[dict[str, Any]]()
    solution = torch.tensor(problem.solution, dtype=torch.double)
    for name in settings["methods"]:
        for evaluations, x, y in trajectory(problem, PLAYERS[name], settings):
            z = torch.tensor([x, y], dtype=torch.double)
            distance, size = (z - solution).norm().item(), problem.operator(z).norm().item()
            rows.append(
                {"game": part, "method": name, "evaluations": evaluations, "x": x, "y": y}
                | {"distance": distance, "operator": size}
            )
    return rows


def _ends(rows: list[Row]) -> list[Row]:
    """The last row of each trajectory."""
    return list({(row["game"], row["method"]): row for row in rows}.values())


def _grouped(rows: list[Row]) -> dict[str, dict[str, list[Row]]]:
    """The rows of each game and method."""
    groups: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        groups.setdefault(row["game"], {}).setdefault(row["method"], []).append(row)
    return groups


def trajectories(rows: list[Row]) -> Figure:
    """Trajectories over the field -F, one panel for each game."""
    from matplotlib.figure import Figure

    groups = _grouped(rows)
    figure = Figure(figsize=(3.7 * len(groups), 4.4), layout="constrained")
    for ax, (game, methods) in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups.items(), strict=True):
        problem = PROBLEMS[game]
        _field(ax, problem)
        for method, points in methods.items():
            player = PLAYERS[method]
            ax.plot([p["x"] for p in points], [p["y"] for p in points], **_line(player), label=method)
            end = points[-1]
            ax.plot(end["x"], end["y"], "o", color=player.colour, markersize=5, zorder=4)
        ax.plot(*problem.start, "s", color="black", markersize=6, zorder=5)
        ax.plot(*problem.solution, "*", color="white", markeredgecolor="black", markersize=13, zorder=6)
        ax.set_title(problem.title, fontsize=9)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=8, frameon=False)
    return figure


def distances(rows: list[Row]) -> Figure:
    """Distance to the solution against evaluations of the operator, one panel for each game."""
    from matplotlib.figure import Figure

    groups = _grouped(rows)
    figure = Figure(figsize=(3.7 * len(groups), 3.6), layout="constrained")
    axes = figure.subplots(1, len(groups), squeeze=False, sharey=True)[0]
    for ax, (game, methods) in zip(axes, groups.items(), strict=True):
        for method, points in methods.items():
            shown = [max(p["distance"], 1e-8) for p in points]
            ax.semilogy([p["evaluations"] for p in points], shown, **_line(PLAYERS[method]), label=method)
        ax.set_xlabel("evaluations of F")
        ax.set_title(PROBLEMS[game].title, fontsize=9)
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("distance to the solution")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=8, frameon=False)
    return figure


def _field(ax: Axes, problem: Problem) -> None:
    side = problem.side
    grid = torch.linspace(-side, side, 81, dtype=torch.double)
    y, x = torch.meshgrid(grid, grid, indexing="ij")
    f = -problem.operator(torch.stack([x, y], -1))
    ax.streamplot(
        grid.numpy(), grid.numpy(), f[..., 0].numpy(), f[..., 1].numpy(), color="#C8C8C8", density=1.1, linewidth=0.7
    )
    ax.set(xlim=(-side, side), ylim=(-side, side), aspect="equal", xlabel="x", ylabel="y")
    ax.locator_params(nbins=7)


def _line(player: Player) -> dict[str, Any]:
    return {"color": player.colour, "linewidth": player.width, "zorder": 3}


def _answer(rows: list[Row]) -> str:
    ends = _ends(rows)
    said: list[str] = []
    for game in dict.fromkeys(row["game"] for row in ends):
        near = [row["method"] for row in ends if row["game"] == game and row["distance"] < _NEAR]
        said.append(f"{game}: {', '.join(near) or 'none'}")
    return f"Methods that end nearer than {_NEAR:g} to the solution, {'; '.join(said)}: exact, without a test."


_NEAR = 0.01


RAPP_FIGURES = Measurement(
    name="rapp-figures",
    exhibit=papers.Exhibit(papers.RAPP, "Figures 2 and 3"),
    title="RAPP, Lookahead and extragradient on three games with limit cycles",
    summary="RAPP's synthetic examples: trajectories on three games (Figures 2 and 3 of Pethick et al., 2023)",
    note=(
        "Trajectories on the three games of the synthetic figures of Pethick, Xie and Cevher (2023), in float64. Each "
        "player holds one number in a box, and every method projects. L is the Lipschitz constant of the operator F in "
        "the box; it, the boxes and the starts are those of the notebooks for Pethick et al. (2022). The step size is "
        "`step`/L for all methods. It and the other settings, lam and the `inner` steps of RAPP, alpha and the k steps "
        "of Lookahead (LA), are this package's choice: the paper's were not found in a public source. EG projects both "
        "half steps; CEG+ projects the first and takes half of the second step. The budget counts evaluations of F."
    ),
    settings={
        "games": tuple(PROBLEMS),
        "methods": tuple(PLAYERS),
        "evaluations": 2400,
        "step": 1.0,
        "lam": 0.5,
        "inner": 3,
        "alpha": 0.2,
        "k": 20,
    },
    parts=_parts,
    measure=_measure,
    answer=_answer,
    columns={
        "game": lambda row: row["game"],
        "method": lambda row: row["method"],
        "evaluations": lambda row: str(row["evaluations"]),
        "x": lambda row: f"{row['x']:.4f}",
        "y": lambda row: f"{row['y']:.4f}",
        "distance": lambda row: f"{row['distance']:.2g}",
        "norm of F": lambda row: f"{row['operator']:.2g}",
    },
    tabled=_ends,
    figures={
        "trajectories.png": ("Trajectories over the field -F: square start, star solution", trajectories),
        "distances.png": ("Distance to the solution against evaluations of F", distances),
    },
)
