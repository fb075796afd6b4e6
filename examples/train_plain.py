"""A plain training loop on scikit-learn's digits. Compare it with train_bisam.py."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
loader = DataLoader(TensorDataset(x[:1300], y[:1300]), batch_size=64, shuffle=True)
model = nn.Sequential(nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 10))
criterion = nn.CrossEntropyLoss(label_smoothing=0.1, reduction="none")
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)

for _ in range(5):
    model.train()
    for inputs, targets in loader:
        loss = criterion(model(inputs), targets).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

model.eval()
with torch.no_grad():
    print(f"test accuracy {(model(x[1300:]).argmax(1) == y[1300:]).float().mean():.3f}")
