"""The training loop of nanoGPT with BiSAM, on the help texts of Python: characters, a GPT of 0.2 million weights.

The model has the interface of nanoGPT's: model(x, y) returns logits (N, T, K) and the loss. `forward` hands the logits
and the labels to the loss, so that the adversary can compare them; the rest of the loop is as it was: accumulation,
clipping, warm-up and cosine, AdamW with weight decay on matrices.

    python examples/nanogpt.py --method bisam
"""

import argparse
import math
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import nn

from bisam import ERM, SAM, BiSAM, NegLog, SharpnessAware

parser = argparse.ArgumentParser()
parser.add_argument("--method", choices=["adamw", "sam", "bisam"], default="bisam")
parser.add_argument("--rho", type=float, default=0.05)
parser.add_argument("--steps", type=int, default=200)
options = parser.parse_args()

length, width, heads, depth, batch, parts, rate, warmup = 64, 64, 4, 3, 8, 2, 3e-3, 20
torch.manual_seed(0)
text = "\n".join(topics[name] for name in sorted(topics))
letters = sorted(set(text))
data = torch.tensor([letters.index(c) for c in text])
split = {"train": data[: int(0.9 * len(data))], "val": data[int(0.9 * len(data)) :]}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width, bias=False) for _ in range(2)])
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, h):
        n, t, _ = h.shape
        q, k, v = self.qkv(self.norms[0](h)).view(n, t, 3 * heads, -1).transpose(1, 2).chunk(3, 1)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + self.out(mixed.transpose(1, 2).reshape(n, t, width))
        return h + self.down(F.gelu(self.up(self.norms[1](h))))


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.token, self.place = nn.Embedding(len(letters), width), nn.Embedding(length, width)
        self.blocks, self.norm = nn.ModuleList([Block() for _ in range(depth)]), nn.LayerNorm(width, bias=False)
        self.head = nn.Linear(width, len(letters), bias=False)
        self.head.weight = self.token.weight
        self.apply(lambda m: nn.init.normal_(m.weight, std=0.02) if isinstance(m, nn.Linear | nn.Embedding) else None)

    def forward(self, x, y=None):
        h = self.token(x) + self.place.weight[: x.shape[1]]
        for block in self.blocks:
            h = block(h)
        logits = self.head(self.norm(h))
        if y is None:
            return logits[:, [-1]], None
        return logits, F.cross_entropy(logits.view(-1, len(letters)), y.reshape(-1), ignore_index=-1)


def get_batch(which):
    starts = torch.randint(len(split[which]) - length, (batch,))
    rows = torch.stack([split[which][i : i + length + 1] for i in starts])
    return rows[:, :-1], rows[:, 1:]


def tokens(model, x, y):
    logits, _ = model(x, y)
    return logits.transpose(1, 2), y  # the classes in dimension 1


def learning_rate(step):
    if step < warmup:
        return rate * (step + 1) / warmup
    return rate * (0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / (options.steps - warmup))))


@torch.no_grad()
def estimate_loss():
    model.eval()
    value = torch.stack([model(*get_batch("val"))[1] for _ in range(50)]).mean()
    model.train()
    return value


model = GPT()
methods = {
    "adamw": ERM(),
    "sam": SAM(options.rho),
    "bisam": BiSAM(options.rho, NegLog(ignore_index=-1)),
}
criterion = nn.CrossEntropyLoss(ignore_index=-1, reduction="none")
sharp = SharpnessAware(model, methods[options.method], loss=criterion, forward=tokens)
matrices = [p for p in model.parameters() if p.dim() > 1]
others = [p for p in model.parameters() if p.dim() < 2]
groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95))

for step in range(options.steps):
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step)
    for _ in range(parts):
        loss = sharp(*get_batch("train")) / parts  # was: model(*get_batch("train"))[1] / parts
        loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if step % 50 == 0:
        print(f"step {step}: training loss {sharp.clean.value:.3f} at the weights, {loss * parts:.3f} displaced")

print(f"validation loss {estimate_loss():.3f}")
