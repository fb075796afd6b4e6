"""FSDP2: shard the model first; the perturbation is for the whole batch. torchrun --nproc-per-node 2 train_fsdp2.py"""

import os
import tempfile

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from bisam import LookSAM, NegLog, SharpnessAware
from bisam.integrations.checkpoint import make_room

device = "cuda" if torch.cuda.is_available() else "cpu"
if device == "cuda":
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
mesh = init_device_mesh(device, (int(os.environ["WORLD_SIZE"]),))
torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
train = TensorDataset(x[:1300], y[:1300])
loader = DataLoader(train, batch_size=32, sampler=DistributedSampler(train))


def make() -> tuple[nn.Module, SharpnessAware]:
    model = nn.Sequential(nn.Linear(64, 128), nn.LayerNorm(128), nn.ReLU(), nn.Linear(128, 10)).to(device)
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, SharpnessAware(model, LookSAM(0.05, ascent=NegLog()), loss=nn.CrossEntropyLoss(reduction="none"))


model, sharp = make()
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
for epoch in range(12):
    loader.sampler.set_epoch(epoch)
    for inputs, targets in loader:
        loss = sharp(inputs.to(device), targets.to(device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

folder = [tempfile.mkdtemp()]
dist.broadcast_object_list(folder)
checkpoint.save({"sharp": sharp.state_dict()}, checkpoint_id=folder[0])
model, sharp = make()  # on any number of ranks; the state of LookSAM is loaded too
make_room(sharp, folder[0])
checkpoint.load(state := {"sharp": sharp.state_dict()}, checkpoint_id=folder[0])
sharp.load_state_dict(state["sharp"])
outputs = model.eval()(x[1300:].to(device)).cpu()
if dist.get_rank() == 0:
    print(f"test accuracy {(outputs.argmax(1) == y[1300:]).float().mean():.3f}")
dist.destroy_process_group()
