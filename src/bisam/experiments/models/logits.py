"""Logits: a classifier of Hugging Face as a function of one argument."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

HIDDEN = "hidden_states"
"""Name of the input that stands in place of tokens where frozen layers are skipped, see `models.frozen`."""


class Logits(nn.Module):
    """A Hugging Face classifier that takes images, or one dict of tensors, and returns logits (N, classes)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    @property
    def takes_images(self) -> bool:
        """Whether its inputs are images, and not tokens."""
        return getattr(self.network, "main_input_name", "") == "pixel_values"

    def forward(self, inputs: Tensor | Mapping[str, Tensor]) -> Tensor:
        """Map images (N, C, H, W), or token ids and masks (N, length) by name, to logits (N, classes)."""
        if isinstance(inputs, Tensor):
            return self.network(pixel_values=inputs).logits
        if HIDDEN in inputs:
            inputs = {"inputs_embeds" if name == HIDDEN else name: value for name, value in inputs.items()}
        return self.network(**inputs).logits
