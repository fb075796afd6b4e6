"""
A method of your own in 15 lines
================================

A method is a function of an oracle and a batch. This one looks for a bad point without an ascent gradient: it draws a
few random displacements and descends from the one with the largest loss. It costs forward passes and one gradient.
"""
# sphinx_gallery_thumbnail_path = "_static/gallery/own_method.png"

from dataclasses import dataclass

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

from bisam import ERM, SAM, Every, SharpnessAware, cross_entropy

torch.set_num_threads(1)

# %%
# The method
# ----------
# ``oracle.weights.random`` draws a vector that all ranks share if they share their parameters, so the method works
# under DistributedDataParallel and FSDP2 as it is. A frozen dataclass is a value: two of them with equal settings are
# equal.


@dataclass(frozen=True)
class WorstOfSome:
    rho: float = 0.05
    draws: int = 3

    def direction(self, oracle):
        noise = oracle.weights.random(torch.randn_like)
        return noise * (self.rho / noise.norm())

    def __call__(self, oracle, batch):
        drawn = [self.direction(oracle) for _ in range(self.draws)]
        losses = [oracle.query(batch, at=e.clone(), grad=False).value for e in drawn]
        return oracle.query(batch, at=drawn[int(torch.stack(losses).argmax())])


# %%
# Training with it
# ----------------
# It combines with the wrappers of the library.

images, labels = load_digits(return_X_y=True)
torch.manual_seed(0)
order = torch.randperm(len(images))
x, y = torch.tensor(images, dtype=torch.float32)[order] / 16, torch.tensor(labels)[order]
methods = {
    "ERM": ERM(),
    "SAM": SAM(0.2),
    "worst of three": WorstOfSome(0.2),
    "every second step": Every(2, WorstOfSome(0.2)),
}
figure, axis = plt.subplots(figsize=(8, 3.8), layout="constrained")
for (name, method), colour in zip(methods.items(), ("black", "#0072B2", "#D55E00", "#009E73"), strict=True):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    sharp = SharpnessAware(model, method, loss=cross_entropy)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    rises = []
    for _ in range(8):
        for batch in torch.randperm(1300).split(64):
            loss = sharp(x[batch], y[batch])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                rises.append(loss - sharp(x[batch], y[batch]))
    smooth = torch.stack(rises).unfold(0, 21, 1).mean(1)
    axis.plot(smooth, color=colour, label=name)
    with torch.no_grad():
        print(f"{name:18} test accuracy {(model(x[1300:]).argmax(1) == y[1300:]).float().mean():.3f}")
axis.set(xlabel="step", ylabel="loss of the step", title="the loss that the step saw, minus the loss after it")
axis.grid(alpha=0.3)
axis.legend()

# %%
# A random direction rarely rises: that is why SAM pays for a gradient.
