"""
FSDP2 on two processes
======================

``fully_shard`` splits each weight over the ranks. The loss is created around the sharded model, and the perturbation
is that of the whole batch: two processes with half of the batch each train as one process with all of it.

Real scripts are started by ``torchrun --nproc-per-node 2``; here two processes start from one, on CPUs.
"""
# sphinx_gallery_thumbnail_path = "_static/gallery/fsdp2.png"

import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from bisam import BiSAM, SharpnessAware, cross_entropy

torch.set_num_threads(1)  # before the processes are forked
images, labels = load_digits(return_X_y=True)
x, y = torch.tensor(images, dtype=torch.double) / 16, torch.tensor(labels)
order = torch.randperm(1280, generator=torch.Generator().manual_seed(0))
batches = order.split(64) * 3

# %%
# The loop
# --------
# The only lines about ranks are those that shard the model and take a part of the batch. The loss is the mean over
# the ranks.


def train(shard):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)).double()
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if shard else (0, 1)
    if shard:
        mesh = init_device_mesh("cpu", (ranks,))
        fully_shard(model[0], mesh=mesh)
        fully_shard(model, mesh=mesh)
    sharp = SharpnessAware(model, BiSAM(0.1), loss=cross_entropy)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for batch in batches:
        mine = batch.chunk(ranks)[rank]
        loss = sharp(x[mine], y[mine])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    held = sum((p.to_local() if shard else p).numel() for p in model.parameters())
    return losses, held


def work(rank, folder):
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    torch.save(train(shard=True), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


# %%
with tempfile.TemporaryDirectory() as folder:
    processes.start_processes(work, (folder,), nprocs=2, start_method="fork")
    ranks = [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(2)]
one, weights = train(shard=False)
print(f"one process holds {weights} weights; rank 0 holds {ranks[0][1]}, rank 1 {ranks[1][1]}")
print(f"largest difference of the losses {max(abs(a - b) for a, b in zip(one, ranks[0][0], strict=True)):.1e}")

# %%
figure, axis = plt.subplots(figsize=(7, 3.4), layout="constrained")
axis.plot(one, color="black", linewidth=3, alpha=0.4, label="one process")
axis.plot(ranks[0][0], color="#0072B2", linestyle="--", label="two processes of FSDP2")
axis.set(xlabel="step", ylabel="loss at the displaced weights", yscale="log")
axis.grid(alpha=0.3)
axis.legend()
