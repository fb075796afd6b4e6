"""A small generative adversarial network on scikit-learn's digits, trained as a game of two players."""

import argparse
from pathlib import Path

import matplotlib as mpl
import torch
import torch.nn.functional as F
from rich.progress import track
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import SGD, Adam

from bisam import ERM, RAPP, ExtraGradient, Lookahead, ProximalPoint, SharpnessAware

mpl.use("Agg")
from matplotlib import pyplot as plt

GAMMA, LAM, BATCH, NOISE = 0.2, 0.9, 64, 16
METHODS = {  # method, optimizer, gradient evaluations per step
    "gda": (ERM(), lambda p: SGD(p, lr=GAMMA), 1),
    "eg": (ExtraGradient(0.03), lambda p: SGD(p, lr=0.03), 2),  # diverges here from 0.1 on
    "lagda": (ERM(), lambda p: Lookahead(SGD(p, lr=GAMMA), k=5, alpha=0.5), 1),
    "rapp": (RAPP(GAMMA, inner=3), lambda p: SGD(p, lr=LAM * GAMMA), 3),
    "extraadam": (ERM(), lambda p: ProximalPoint(Adam(p, lr=1e-3, betas=(0.0, 0.9))), 1),  # new batches
}


class GAN(nn.Module):
    """Both players in one module. The output is the sum of two losses; each reaches the weights of one player only."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(
            *(nn.Linear(NOISE, 128), nn.BatchNorm1d(128), nn.ReLU()),
            *(nn.Linear(128, 128), nn.BatchNorm1d(128), nn.ReLU()),
            *(nn.Linear(128, 64), nn.Sigmoid()),
        )
        self.discriminator = nn.Sequential(
            nn.Linear(64, 128), nn.LeakyReLU(0.2), nn.Linear(128, 128), nn.LeakyReLU(0.2), nn.Linear(128, 1)
        )

    def forward(self, real: Tensor, noise: Tensor) -> Tensor:
        fake = self.generator(noise)
        judged = self.discriminator(torch.cat([real, fake.detach()]))
        frozen = {name: p.detach() for name, p in self.discriminator.named_parameters()}
        fooled = functional_call(self.discriminator, frozen, fake)
        return F.softplus(-judged[: len(real)]) + F.softplus(judged[len(real) :]) + F.softplus(-fooled)


def score(images: Tensor) -> float:
    """Inception score, 1 to 10: high if a classifier is sure of each digit and sees all ten equally often."""
    p = torch.tensor(classifier.predict_proba(images.numpy()))
    return (p * (p / p.mean(0)).log()).sum(1).mean().exp().item()


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--method", choices=METHODS, default="rapp")
parser.add_argument("--evaluations", type=int, default=9000, help="gradient evaluations, the same for every method")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--to", type=Path, default=Path("runs/gan.png"))
arguments = parser.parse_args()
method, make_optimizer, cost = METHODS[arguments.method]

torch.set_num_threads(1)  # more threads slow down networks this small
torch.manual_seed(arguments.seed)
images, digits = load_digits(return_X_y=True)
classifier = LogisticRegression(max_iter=5000).fit(images / 16, digits)
real = torch.tensor(images, dtype=torch.float32) / 16
gan = GAN()
sharp = SharpnessAware(gan, method, loss=lambda losses, _: losses, forward=lambda gan, *batch: (gan(*batch), None))
optimizer = make_optimizer(gan.parameters())
for _ in track(range(arguments.evaluations // cost), description=arguments.method):
    optimizer.zero_grad()
    sharp(real[torch.randint(len(real), (BATCH,))], torch.randn(BATCH, NOISE)).backward()
    optimizer.step()

with torch.no_grad():
    fake = gan.eval().generator(torch.randn(len(real), NOISE))
figure, axes = plt.subplots(1, 2, figsize=(9, 4.8), layout="constrained")
for axis, title, some in zip(axes, ("real", f"generated ({arguments.method})"), (real, fake), strict=True):
    tiles = F.pad(some[:64].view(8, 8, 8, 8), (1, 1, 1, 1)).transpose(1, 2).reshape(80, 80)
    axis.imshow(tiles, cmap="gray_r", vmin=0, vmax=1, interpolation="bicubic")
    axis.set(title=f"{title}: score {score(some):.2f}", xticks=[], yticks=[])
arguments.to.parent.mkdir(parents=True, exist_ok=True)
figure.savefig(arguments.to, dpi=110)
print(f"score of real digits {score(real):.2f}, of generated ones {score(fake):.2f}")
