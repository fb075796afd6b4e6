"""GPT: a small transformer that predicts the next token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GPT(nn.Module):
    """A decoder of pre-normalised blocks (Radford et al., 2019), with rotary positions and no biases.

    It takes tokens (N, T) and returns logits (N, classes, T), in the dtype of its weights: those at a position depend
    on the tokens up to it. There is no largest length (rotary positions: Su et al., 2021,
    https://arxiv.org/abs/2104.09864). Weights are normal with standard deviation 0.02, divided by sqrt(2 depth) where a
    block adds to its input, and drawn from torch's global generator.

    Args:
        classes: size of the vocabulary.
        width: of the states, a multiple of 2 `heads`.
        depth: number of blocks. One of width 96 has 110,784 weights.
        heads: of the attention.
    """

    def __init__(self, classes: int, *, width: int = 96, depth: int = 3, heads: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(classes, width)
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width, bias=False)
        self.head = nn.Linear(width, classes, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        for block in self.blocks:
            assert isinstance(block, Block)
            for last in (block.mix, block.down):
                nn.init.normal_(last.weight, std=0.02 / (2 * depth) ** 0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """(N, T) to (N, classes, T)."""
        states = self.embedding(tokens)
        for block in self.blocks:
            states = block(states)
        return self.head(self.norm(states)).transpose(1, 2)


class Block(nn.Module):
    """Causal self-attention and two layers with four times the width, each added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.norm_mlp = (nn.LayerNorm(width, bias=False) for _ in range(2))
        self.attention = nn.Linear(width, 3 * width, bias=False)
        self.mix = nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, states: Tensor) -> Tensor:
        """(N, T, width) to (N, T, width)."""
        n, length, width = states.shape
        each = self.attention(self.norm(states)).view(n, length, 3, self.heads, -1)
        queries, keys, values = each.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(rotated(queries), rotated(keys), values, is_causal=True)
        states = states + self.mix(mixed.transpose(1, 2).reshape(n, length, width))
        return states + self.down(F.gelu(self.up(self.norm_mlp(states))))


def rotated(states: Tensor) -> Tensor:
    """Return states (..., T, width) whose halves are rotated by angles that grow with the position."""
    *_, length, width = states.shape
    exponents = torch.arange(width // 2, device=states.device) / (width // 2)
    angles = torch.arange(length, device=states.device)[:, None] / 10000**exponents
    cos, sin = angles.cos().to(states.dtype), angles.sin().to(states.dtype)
    x, y = states.chunk(2, -1)
    return torch.cat([x * cos - y * sin, x * sin + y * cos], -1)
