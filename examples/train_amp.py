"""Mixed precision, accumulation and clipping: scale the loss as usual, and pass the scaler to the loss."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from bisam import BiSAM, SharpnessAware

PARTS = 2  # micro-batches per step
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
x, y = torch.tensor(images, dtype=torch.float32, device=device) / 16, torch.tensor(labels, device=device)
loader = DataLoader(TensorDataset(x[:1300], y[:1300]), batch_size=32, shuffle=True, drop_last=True)
model = nn.Sequential(nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 10)).to(device)
criterion = nn.CrossEntropyLoss(label_smoothing=0.1, reduction="none")
scaler = torch.amp.GradScaler(device)
sharp = SharpnessAware(model, BiSAM(rho=0.05), loss=criterion, scaler=scaler)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)

for _ in range(5):
    model.train()
    for i, (inputs, targets) in enumerate(loader, start=1):
        with torch.autocast(device, dtype=torch.float16):
            loss = sharp(inputs, targets)  # each micro-batch has its own perturbation
        scaler.scale(loss / PARTS).backward()
        if i % PARTS == 0:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # clips the sharpness-aware gradient
            scaler.step(optimizer)  # skipped if any gradient overflowed, also in an inner query
            scaler.update()
            optimizer.zero_grad()

model.eval()
with torch.no_grad(), torch.autocast(device, dtype=torch.float16):
    print(f"test accuracy {(model(x[1300:]).argmax(1) == y[1300:]).float().mean():.3f}")
