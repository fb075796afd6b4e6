"""
The 0-1 adversary
=================

SAM's adversary climbs the training loss, BiSAM's a bound of the 0-1 loss: it looks for weights at which *predictions*
are wrong. Here both displace the same trained network by the same distance, and we count what changes.
"""
# sphinx_gallery_thumbnail_path = "_static/gallery/adversary.png"

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

from bisam import ERM, L2, NegLog, SharpnessAware, Tanh, cross_entropy
from bisam.analysis import flips, zero_one_sharpness

torch.set_num_threads(1)
torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
sharp = SharpnessAware(model, ERM(), loss=cross_entropy)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
for _ in range(5):
    for batch in torch.randperm(1300).split(64):
        sharp(x[batch], y[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()

# %%
# What one step changes
# ---------------------
# ``flips`` displaces the network once for each batch, as training does, and counts predictions that change.

loader = list(zip(x[:1300].split(130), y[:1300].split(130), strict=True))
adversaries = {"training loss (SAM)": cross_entropy, "-log (BiSAM)": NegLog(), "tanh (BiSAM)": Tanh()}
changed = flips(sharp, loader, L2(0.4), adversaries)
print(f"of {changed.correct} correct predictions", changed.flipped, "are wrong after the step")

# %%
# The largest error in the ball
# -----------------------------
# With more steps each adversary climbs to the worst point that it finds. The error there is a lower bound of the
# largest error in the ball of radius rho: the adversary that finds the largest one is the strongest at this radius.

radii = (0.1, 0.2, 0.4, 0.8, 1.2)
worst = [zero_one_sharpness(sharp, loader, L2(rho), adversaries, steps=10) for rho in radii]
figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.6), layout="constrained")
changed.plot(axes[0])
for name, colour in zip(adversaries, ("black", "#0072B2", "#D55E00"), strict=True):
    axes[1].plot(radii, [100 * found.by[name] for found in worst], marker="o", color=colour, label=name)
axes[1].axhline(100 * worst[0].error, linestyle=":", color="black", label="at the weights")
axes[1].set(xlabel="radius rho", ylabel="error (%)", title="the largest error that ten steps find")
axes[1].grid(alpha=0.3)
axes[1].legend()

# %%
# One network, seed and data set: which adversary is stronger depends on all of them. ``bisam run adversary`` asks
# five adversaries during a whole training run.
