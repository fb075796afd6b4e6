"""DistributedDataParallel: each replica perturbs for its part of the batch. torchrun --nproc-per-node 2 train_ddp.py"""

import os

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from bisam import BiSAM, SharpnessAware

cuda = torch.cuda.is_available()
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
if cuda:
    torch.cuda.set_device(device)
dist.init_process_group("nccl" if cuda else "gloo")
torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
train = TensorDataset(x[:1300], y[:1300])
sampler = DistributedSampler(train)
loader = DataLoader(train, batch_size=64 // dist.get_world_size(), sampler=sampler)
model = nn.Sequential(nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 10)).to(device)
model = DistributedDataParallel(model)
criterion = nn.CrossEntropyLoss(label_smoothing=0.1, reduction="none")
# scope="global" would perturb for the whole batch, at the cost of one more reduction in each query.
sharp = SharpnessAware(model, BiSAM(rho=0.05), loss=criterion)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)

for epoch in range(5):
    sampler.set_epoch(epoch)
    model.train()
    for inputs, targets in loader:
        loss = sharp(inputs.to(device), targets.to(device))
        loss.backward()  # the only reduction of the step
        optimizer.step()
        optimizer.zero_grad()

model.eval()
if dist.get_rank() == 0:
    with torch.no_grad():
        outputs = model.module(x[1300:].to(device)).cpu()
    print(f"test accuracy {(outputs.argmax(1) == y[1300:]).float().mean():.3f}")
dist.destroy_process_group()
