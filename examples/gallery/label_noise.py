"""
Label noise
===========

40 % of the training labels of scikit-learn's digits are wrong. A network that minimises the loss at its weights
learns them by heart; one that minimises the loss at the worst nearby weights, much less so. All methods compute the
same number of gradients: plain training has twice the epochs.
"""
# sphinx_gallery_thumbnail_path = "_static/gallery/label_noise.png"

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

from bisam import ERM, SAM, BiSAM, SharpnessAware

torch.set_num_threads(1)

# %%
# The data
# --------
# 1,300 images to train on, of which 40 % get the label of another class, and 497 with correct labels to test on.

torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
order = torch.randperm(len(images))
x, y = torch.tensor(images, dtype=torch.float32)[order] / 16, torch.tensor(labels)[order]
x, test_x, y, test_y = x[:1300], x[1300:], y[:1300], y[1300:]
noisy = torch.where(torch.rand(1300) < 0.4, (y + torch.randint(1, 10, (1300,))) % 10, y)

# %%
# Training
# --------
# The loop is the same for all methods. ``ERM()`` is plain training, so that ``sharp`` serves for it too.


def train(method, epochs):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(64, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 10))
    sharp = SharpnessAware(model, method, loss=nn.CrossEntropyLoss(label_smoothing=0.1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    accuracies = []
    for _ in range(epochs):
        model.train()
        for batch in torch.randperm(1300).split(64):
            sharp(x[batch], noisy[batch]).backward()
            optimizer.step()
            optimizer.zero_grad()
        schedule.step()
        model.eval()
        with torch.no_grad():
            found = model(test_x).argmax(1), model(x).argmax(1)
        accuracies.append(((found[0] == test_y).float().mean().item(), (found[1] == noisy).float().mean().item()))
    return torch.tensor(accuracies)


runs = {
    "SGD": train(ERM(), epochs=40),
    "SAM(0.8)": train(SAM(0.8), epochs=20),
    "BiSAM(0.8)": train(BiSAM(0.8), epochs=20),
}

# %%
# The result
# ----------
# SGD fits the wrong labels, on the right, and its test accuracy falls as it does. This is one seed of one small
# network; the study of ``bisam run radius`` (:doc:`/reproduction/radius/report`) has twelve seeds, and a weight decay
# for SGD that is tuned.

figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
for (name, curve), colour in zip(runs.items(), ("black", "#0072B2", "#D55E00"), strict=True):
    gradients = torch.linspace(0, 40, len(curve) + 1)[1:]
    for axis, column in zip(axes, curve.T, strict=True):
        axis.plot(gradients, 100 * column, label=name, color=colour)
    print(f"{name:10} test accuracy {100 * curve[-1, 0]:.1f} %, fits {100 * curve[-1, 1]:.1f} % of the noisy labels")
axes[0].set(title="correct labels of the test set", ylabel="accuracy (%)")
axes[1].set(title="noisy labels of the training set")
for axis in axes:
    axis.set(xlabel="epochs of gradients")
    axis.grid(alpha=0.3)
axes[0].legend()
