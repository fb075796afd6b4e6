"""Accelerate: prepare the model as usual, then create the loss around the prepared model."""

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from bisam import BiSAM, SharpnessAware

torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
loader = DataLoader(TensorDataset(x[:1300], y[:1300]), batch_size=32, shuffle=True)
model = nn.Sequential(nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=6 * 21)

accelerator = Accelerator(gradient_accumulation_steps=2)
model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)
criterion = nn.CrossEntropyLoss(label_smoothing=0.1, reduction="none")
sharp = SharpnessAware(model, BiSAM(rho=0.05), loss=criterion, scaler=accelerator.scaler)  # None except with float16
accelerator.register_for_checkpointing(sharp)  # save_state then includes the state of the method

for _ in range(6):
    model.train()
    for inputs, targets in loader:
        with accelerator.accumulate(model):
            accelerator.backward(sharp(inputs, targets))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()

model.eval()
with torch.no_grad():
    outputs = model(x[1300:].to(accelerator.device)).cpu()
accelerator.print(f"test accuracy {(outputs.argmax(1) == y[1300:]).float().mean():.3f}")
