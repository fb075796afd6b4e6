"""
Analyse a network
=================

Measures of one trained network and another: how much the loss rises nearby, what an adversary flips, curvature, and
calibration. All take the loss of a training loop and batches, and leave the model as it is.
"""
# sphinx_gallery_thumbnail_path = "_static/gallery/analyse.png"

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

from bisam import ERM, L2, SAM, SharpnessAware, cross_entropy
from bisam.analysis import calibration, eigenvalues, flips, margins, sharpness

torch.set_num_threads(1)
torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
order = torch.randperm(len(images))
x, y = torch.tensor(images, dtype=torch.float32)[order] / 16, torch.tensor(labels)[order]
training = list(zip(x[:1300].split(325), y[:1300].split(325), strict=True))
held_out = [(x[1300:], y[1300:])]


def train(method, epochs):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    sharp = SharpnessAware(model, method, loss=cross_entropy)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(epochs):
        for batch in torch.randperm(1300).split(64):
            sharp(x[batch], y[batch]).backward()
            optimizer.step()
            optimizer.zero_grad()
    return sharp


# %%
# The same measures of two networks
# ---------------------------------
# The radius is the same for both, whatever they were trained with.

networks = {"SGD": train(ERM(), epochs=20), "SAM(0.2)": train(SAM(0.2), epochs=10)}
for name, sharp in networks.items():
    changed = flips(sharp, training, L2(0.2))
    print(name)
    print(f"  rise of the loss within 0.2      {sharpness(sharp, training, L2(0.2), steps=10).rise:.4f}")
    print(f"  largest eigenvalues of the GGN   {eigenvalues(sharp, training, k=2, matrix='ggn').values}")
    print(f"  predictions that one step flips  {changed.flipped}")
    print(f"  expected calibration error       {calibration(sharp, held_out).ece:.4f}")

# %%
# Pictures
# --------
# Each result draws itself into axes.

figure, axes = plt.subplots(2, 2, figsize=(9.5, 7), layout="constrained")
for row, (name, sharp) in zip(axes, networks.items(), strict=True):
    calibration(sharp, held_out).plot(row[0]).set_xlabel(f"confidence of {name} on new images")
    margins(sharp, training).plot(row[1]).set_xlabel(f"margin of {name} on training images")

# %%
# A small curvature is no proof of generalisation: :doc:`/analysis` has a study of which measures rank runs as their
# test error does.
