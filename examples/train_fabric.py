"""Lightning Fabric: set up and save the loss instead of the model."""

import tempfile
from pathlib import Path

import torch
from lightning_fabric import Fabric
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from bisam import BiSAM, SharpnessAware

torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
loader = DataLoader(TensorDataset(x[:1300], y[:1300]), batch_size=64, shuffle=True)
model = nn.Sequential(nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 10))
criterion = nn.CrossEntropyLoss(label_smoothing=0.1, reduction="none")
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)

fabric = Fabric(devices=1)
sharp, optimizer = fabric.setup(SharpnessAware(model, BiSAM(rho=0.05), loss=criterion), optimizer)
loader = fabric.setup_dataloaders(loader)
path = Path(tempfile.mkdtemp()) / "checkpoint"

for epoch in range(5):
    model.train()
    for inputs, targets in loader:
        loss = sharp(inputs, targets)
        fabric.backward(loss)
        fabric.clip_gradients(sharp, optimizer, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
    # The weights and the state of the method; fabric.load(path, ...) with the same dictionary resumes.
    fabric.save(path, {"sharp": sharp, "optimizer": optimizer, "epoch": epoch})

model.eval()
with torch.no_grad():
    outputs = model(fabric.to_device(x[1300:])).cpu()
fabric.print(f"test accuracy {(outputs.argmax(1) == y[1300:]).float().mean():.3f}")
