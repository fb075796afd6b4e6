"""timm: its model, optimizer and scheduler factories, and mixup. The adversary uses the mixed labels too."""

import timm
import torch
from sklearn.datasets import load_digits
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch.utils.data import DataLoader, TensorDataset

from bisam import BiSAM, SharpnessAware

EPOCHS = 8
torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
x, y = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels)
loader = DataLoader(TensorDataset(x[:1300], y[:1300]), batch_size=50, shuffle=True)
model = timm.create_model("resnet18", in_chans=1, num_classes=10, layers=(1, 1, 1, 1), channels=(16, 32, 64, 128))
mixup = Mixup(mixup_alpha=0.2, cutmix_alpha=0.2, label_smoothing=0.1, num_classes=10)  # turns labels into probabilities
sharp = SharpnessAware(model, BiSAM(rho=0.05), loss=SoftTargetCrossEntropy())
optimizer = create_optimizer_v2(model, opt="sgd", lr=0.1, weight_decay=5e-4)
scheduler, _ = create_scheduler_v2(optimizer, sched="cosine", num_epochs=EPOCHS, warmup_epochs=1, warmup_lr=0.01)

for epoch in range(EPOCHS):
    model.train()
    scheduler.step(epoch)
    for inputs, targets in loader:
        loss = sharp(*mixup(inputs, targets))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

model.eval()
with torch.no_grad():
    print(f"test accuracy {(model(x[1300:]).argmax(1) == y[1300:]).float().mean():.3f}")
