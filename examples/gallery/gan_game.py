"""
A GAN as a game
===============

A generator and a discriminator in one module, whose output is the sum of two losses; each reaches the weights of one
player only. RAPP takes the gradient of this game at an approximate proximal point (Pethick et al., 2023).
"""
# sphinx_gallery_thumbnail_path = "_static/gallery/gan_game.png"

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.func import functional_call

from bisam import RAPP, SharpnessAware

torch.set_num_threads(1)
torch.manual_seed(0)
real = torch.tensor(load_digits(return_X_y=True)[0], dtype=torch.float32) / 16

# %%
# The game
# --------
# The discriminator is frozen in the generator's part by detached weights, and the images are detached in its own
# part.


class GAN(nn.Module):
    def __init__(self):
        super().__init__()
        self.generator = nn.Sequential(
            *(nn.Linear(16, 128), nn.BatchNorm1d(128), nn.ReLU()),
            *(nn.Linear(128, 128), nn.BatchNorm1d(128), nn.ReLU()),
            *(nn.Linear(128, 64), nn.Sigmoid()),
        )
        self.discriminator = nn.Sequential(
            nn.Linear(64, 128), nn.LeakyReLU(0.2), nn.Linear(128, 128), nn.LeakyReLU(0.2), nn.Linear(128, 1)
        )

    def forward(self, images, noise):
        fake = self.generator(noise)
        judged = self.discriminator(torch.cat([images, fake.detach()]))
        frozen = {name: p.detach() for name, p in self.discriminator.named_parameters()}
        fooled = functional_call(self.discriminator, frozen, fake)
        return F.softplus(-judged[: len(images)]) + F.softplus(judged[len(images) :]) + F.softplus(-fooled)


# %%
# Training
# --------
# The loop is that of any loss. With the learning rate lam gamma, SGD makes the relaxed step of RAPP.

gan, gamma, lam = GAN(), 0.2, 0.9
sharp = SharpnessAware(
    gan, RAPP(gamma, inner=3), loss=lambda losses, _: losses, forward=lambda gan, *b: (gan(*b), None)
)
optimizer = torch.optim.SGD(gan.parameters(), lr=lam * gamma)
noise, shown = torch.randn(64, 16), {}
for step in range(1, 1501):
    sharp(real[torch.randint(len(real), (64,))], torch.randn(64, 16)).backward()
    optimizer.step()
    optimizer.zero_grad()
    if step in (100, 500, 1500):
        gan.eval()
        with torch.no_grad():
            shown[f"step {step}"] = gan.generator(noise)
        gan.train()

# %%
figure, axes = plt.subplots(1, 4, figsize=(10, 2.9), layout="constrained")
for axis, (title, some) in zip(axes, {**shown, "real": real[:64]}.items(), strict=True):
    tiles = F.pad(some.view(8, 8, 8, 8), (1, 1, 1, 1)).transpose(1, 2).reshape(80, 80)
    axis.imshow(tiles, cmap="gray_r", vmin=0, vmax=1)
    axis.set(title=title, xticks=[], yticks=[])

# %%
# ``examples/gan.py`` trains longer, with other methods, and scores the images; :doc:`/games` has all combinations.
