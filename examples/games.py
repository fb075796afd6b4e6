"""Two games on which gradient descent-ascent diverges, and methods that converge: a table and a figure."""

import argparse
from pathlib import Path

import matplotlib as mpl
import torch
from torch import nn
from torch.optim import SGD

from bisam import ERM, RAPP, ExtraGradient, Lookahead, SharpnessAware

mpl.use("Agg")
from matplotlib import pyplot as plt

GAMMA, LAM, BUDGET = 0.8, 0.3, 120  # step size, interpolation, gradient evaluations
RHO = -1 / 3  # with L = 1; the paper's condition is rho > -1/(2L)
GAMES = {
    "bilinear: xy": (0.0, 1.0),
    "cohypomonotone: rho = -1/3": (RHO, (1 - RHO**2) ** 0.5),
}
METHODS = {  # name: method, optimizer, steps between plotted points, colour (Okabe and Ito, 2008)
    "GDA": (ERM(), lambda p: SGD(p, lr=GAMMA), 1, "#000000"),
    "EG": (ExtraGradient(GAMMA), lambda p: SGD(p, lr=GAMMA), 1, "#56B4E9"),
    "LA-GDA": (ERM(), lambda p: Lookahead(SGD(p, lr=GAMMA), k=2, alpha=LAM), 2, "#E69F00"),
    "LA-EG": (ExtraGradient(GAMMA), lambda p: Lookahead(SGD(p, lr=GAMMA), k=2, alpha=LAM), 2, "#009E73"),
    "RAPP": (RAPP(GAMMA, inner=3), lambda p: SGD(p, lr=LAM * GAMMA), 1, "#D55E00"),
}


class Game(nn.Module):
    """min over x, max over y of f(x, y) = a/2 x^2 + b xy - a/2 y^2. Solution: 0. Gradient: (f_x, -f_y)."""

    def __init__(self, a: float, b: float) -> None:
        super().__init__()
        self.a, self.b, self.evaluations = a, b, 0
        self.x, self.y = (nn.Parameter(torch.tensor(s, dtype=torch.double)) for s in (1.0, 0.0))

    def forward(self):
        self.evaluations += 1
        return self.f(self.x, self.y.detach()) - self.f(self.x.detach(), self.y)

    def f(self, x, y):
        return self.a / 2 * x**2 + self.b * x * y - self.a / 2 * y**2


def play(game: Game, method, make_optimizer, every: int) -> tuple[list[int], list[tuple[float, float]]]:
    """The numbers of gradient evaluations, and the positions of the players after them."""
    sharp = SharpnessAware(game, method, loss=lambda value, _: value, forward=lambda game: (game(), None))
    optimizer = make_optimizer(game.parameters())
    evaluations, points = [0], [(game.x.item(), game.y.item())]
    while game.evaluations < BUDGET:
        for _ in range(every):
            optimizer.zero_grad()
            sharp().backward()
            optimizer.step()
        evaluations.append(game.evaluations)
        points.append((game.x.item(), game.y.item()))
    return evaluations, points


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--to", type=Path, default=Path(__file__).parent.parent / "docs" / "games.png")
path = parser.parse_args().to
figure, axes = plt.subplots(2, 2, figsize=(9, 7.5), layout="constrained", sharex="row", sharey="row")
print(f"distance to the solution after {BUDGET} gradient evaluations, from 1")
print(" " * 8, *(f"{title:>28}" for title in GAMES))
ends = {name: [] for name in METHODS}
for (title, (a, b)), (above, below) in zip(GAMES.items(), axes.T, strict=True):
    for name, (method, make, every, colour) in METHODS.items():
        evaluations, points = play(Game(a, b), method, make, every)
        distances = [(x**2 + y**2) ** 0.5 for x, y in points]
        above.semilogy(evaluations, distances, color=colour, label=name, linewidth=2)
        below.plot(*zip(*points, strict=True), color=colour, marker=".", linewidth=1)
        ends[name].append(distances[-1])
    above.set(title=title, xlabel="gradient evaluations", xlim=(0, BUDGET), ylim=(1e-5, 1e5))
    below.set(xlabel="x", xlim=(-1.1, 1.6), ylim=(-0.7, 1.3), aspect="equal")
    below.plot(0, 0, "*", color="white", markeredgecolor="black", markersize=12)
    for axis in (above, below):
        axis.grid(alpha=0.3)
for name, distances in ends.items():
    print(f"{name:8}", *(f"{distance:28.2g}" for distance in distances))
axes[0, 0].set_ylabel("distance to the solution")
axes[1, 0].set_ylabel("y")
figure.suptitle(f"One step size for all: gamma = {GAMMA} (L = 1), lam = {LAM}, k = 2, three inner steps of RAPP")
figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(METHODS), frameon=False)
figure.savefig(path, dpi=110)
