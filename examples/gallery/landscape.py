"""
A landscape of the loss
=======================

The loss around the weights of two networks: one trained by SGD, one by SAM. All directions are normalised by filters,
so that the scale of the weights does not matter (Li et al., 2018).
"""
# sphinx_gallery_thumbnail_path = "_static/gallery/landscape.png"

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

from bisam import ERM, SAM, SharpnessAware, cross_entropy
from bisam.analysis import landscape

torch.set_num_threads(1)
images, labels = load_digits(return_X_y=True)
x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
loader = list(zip(x[:1300].split(325), y[:1300].split(325), strict=True))


def train(method, epochs):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    sharp = SharpnessAware(model, method, loss=cross_entropy)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(epochs):
        for batch in torch.randperm(1300).split(64):
            sharp(x[batch], y[batch]).backward()
            optimizer.step()
            optimizer.zero_grad()
    return sharp


networks = {"SGD": train(ERM(), epochs=20), "SAM(0.2)": train(SAM(0.2), epochs=10)}

# %%
# Along a line
# ------------
# A random direction says little: the loss rises slowly along most of them. The direction that the adversary takes,
# the gradient, is another one.

figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharey=True)
for axis, direction in zip(axes, ("random", cross_entropy), strict=True):
    for (name, sharp), colour in zip(networks.items(), ("black", "#0072B2"), strict=True):
        line = landscape(sharp, loader, direction, points=21)
        axis.semilogy(line.xs, line.loss[0], color=colour, label=name)
    axis.set(title="a random direction" if direction == "random" else "the gradient", xlabel="distance")
    axis.grid(alpha=0.3)
axes[0].set_ylabel("training loss")
axes[0].legend()

# %%
# On a plane
# ----------
# The plane that two directions span, with contours of the loss.

plane = landscape(networks["SGD"], loader, ("random", cross_entropy), points=15)
plane.plot()
