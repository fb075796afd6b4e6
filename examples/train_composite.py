"""A loss of several parts: classification plus reconstruction, and a penalty on the weights added outside."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from bisam import SAM, NegLog, SharpnessAware


class Autoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU())
        self.decoder, self.head = nn.Linear(128, 64), nn.Linear(128, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.encoder(x)
        return self.head(z), self.decoder(z)


def both(outputs: tuple[Tensor, Tensor], targets: tuple[Tensor, Tensor]) -> Tensor:
    """The loss that is minimised, one value per example."""
    (logits, picture), (labels, inputs) = outputs, targets
    return F.cross_entropy(logits, labels, reduction="none") + (picture - inputs).square().mean(1)


def flips(outputs: tuple[Tensor, Tensor], targets: tuple[Tensor, Tensor]) -> Tensor:
    """The objective that the adversary maximises: classification alone, with a bound of BiSAM."""
    return NegLog()(outputs[0], targets[0])


torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
loader = DataLoader(TensorDataset(x[:1300], y[:1300]), batch_size=64, shuffle=True)
model = Autoencoder()
sharp = SharpnessAware(
    model,
    SAM(0.05, ascent=flips),
    loss=both,
    forward=lambda model, inputs, labels: (model(inputs), (labels, inputs)),
)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

for _ in range(5):
    model.train()
    for inputs, targets in loader:
        penalty = sum(p.abs().sum() for p in model.parameters())  # at the weights: the penalty is not perturbed
        loss = sharp(inputs, targets) + 1e-5 * penalty
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

model.eval()
with torch.no_grad():
    print(f"test accuracy {(model(x[1300:])[0].argmax(1) == y[1300:]).float().mean():.3f}")
