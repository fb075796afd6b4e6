"""
A schedule for rho
==================

A radius may be any function of the step. Five of them: a constant, one that warms up, one that follows the learning
rate as in GSAM, one that holds the share of predictions that the ascent step flips, and a function of your own.
"""
# sphinx_gallery_thumbnail_path = "_static/gallery/rho_schedule.png"

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

from bisam import L2, SAM, SharpnessAware, cross_entropy
from bisam.schedules import FlipRate, Follow, Warmup

torch.set_num_threads(1)
torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
order = torch.randperm(len(images))
x, y = torch.tensor(images, dtype=torch.float32)[order] / 16, torch.tensor(labels)[order]
x, test_x, y, test_y = x[:1300], x[1300:], y[:1300], y[1300:]
EPOCHS, STEPS = 15, 15 * 21

# %%
# A schedule that needs the optimizer gets it: this is why ``make`` is a function. ``sharp.stats`` records the length
# of each displacement, which for an L2 ball is the radius.

SCHEDULES = {
    "constant": lambda optimizer: 0.2,
    "Warmup": lambda optimizer: Warmup(0.2, steps=STEPS // 3),
    "Follow": lambda optimizer: Follow(optimizer, high=0.2, low=0.02),
    "FlipRate": lambda optimizer: FlipRate(0.06),
    "a function": lambda optimizer: lambda step: 0.2 if step % 42 < 21 else 0.05,
}


def train(make):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    sharp = SharpnessAware(model, SAM(L2(make(optimizer))), loss=cross_entropy, stats=True)
    radii = []
    for _ in range(EPOCHS):
        for batch in torch.randperm(1300).split(64):
            sharp(x[batch], y[batch]).backward()
            optimizer.step()
            optimizer.zero_grad()
            decay.step()
            radii.append(sharp.stats.displacement_norm)
    with torch.no_grad():
        return torch.stack(radii), (model(test_x).argmax(1) == test_y).float().mean().item()


# %%
figure, axis = plt.subplots(figsize=(8, 3.8), layout="constrained")
colours = ("black", "#0072B2", "#D55E00", "#009E73", "#CC79A7")
for (name, make), colour in zip(SCHEDULES.items(), colours, strict=True):
    radii, accuracy = train(make)
    axis.plot(radii, color=colour, label=name)
    print(f"{name:10} radius {radii[0]:.3f} to {radii[-1]:.3f}, test accuracy {100 * accuracy:.1f} %")
axis.set(xlabel="step", ylabel="radius", title="the length of the displacement")
axis.grid(alpha=0.3)
axis.legend()

# %%
# On data without label noise the radius hardly matters, as the accuracies show: see :doc:`/choosing-rho`.
