"""Hidden: the outputs of the frozen layers of a text model, computed once and not in each step.

Frozen layers are in eval mode and their weights stay the same, so their states of a text are the same in each step: a
run that computes them once has the same results, up to the rounding of other padding. Images are augmented, so that the
frozen layers of their networks run in each step.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import replace
from typing import Any

import numpy as np
from lightning_fabric import Fabric
from torch import nn

from bisam.experiments.data.glue import Texts
from bisam.experiments.data.splits import Data
from bisam.experiments.models.frozen import hidden_states, skip_frozen
from bisam.experiments.models.logits import Logits
from bisam.experiments.recipes.recipe import Recipe

LARGEST = 2**31
"""Bytes of the states of a data set that are held in memory; of a larger one, the frozen layers run in each step."""

_AT_ONCE = 64  # texts
_KEPT = 6
_computed = OrderedDict[str, np.ndarray]()
"""States of splits, the last used one at the end: the next run of this process often has the same splits."""


def with_hidden_states(splits: Data, model: nn.Module, recipe: Recipe, fabric: Fabric) -> Data:
    """Return the data with the states of the frozen layers in place of tokens, which `model` takes from then on.

    Data and model are returned as they are if nothing is frozen, if the data are no texts, or if the states would take
    more memory than `LARGEST`.

    Args:
        splits: the data.
        model: of the recipe, in the precision of its weights.
        recipe: of the run.
        fabric: device and autocast.

    Raises:
        ValueError: the layers above the frozen ones of this model need more than their states.
    """
    parts = {name: getattr(splits, name) for name in ("train", "validation", "test")}
    texts = {name: part for name, part in parts.items() if isinstance(part, Texts)}
    if not isinstance(model, Logits) or not has_hidden_states(splits, model, recipe):
        return splits
    model.to(fabric.device)
    with fabric.autocast():
        weights = _digest(model, fabric, recipe.precision)
        found = {name: replace(part, states=_states(part, model, weights, fabric)) for name, part in texts.items()}
        example, _ = next(splits.train.to(fabric.device).batches(2))
        skip_frozen(model, example, recipe.model)
    return replace(splits, **found)


def has_hidden_states(splits: Data, model: nn.Module, recipe: Recipe) -> bool:
    """Whether a run on these data computes the states of its frozen layers once; see `with_hidden_states`."""
    parts = [part for part in (splits.train, splits.validation, splits.test) if isinstance(part, Texts)]
    if recipe.frozen is None or not isinstance(model, Logits) or len(parts) < 3:
        return False
    tokens = sum(int(part.ends[-1]) for part in parts)
    return tokens * _width(model) * next(model.parameters()).element_size() <= LARGEST


def _states(texts: Texts, model: Logits, weights: str, fabric: Fabric) -> np.ndarray:
    """The states of each token of a split (T, width)."""
    digest = hashlib.blake2b(weights.encode(), digest_size=16)
    for array in (*texts.tokens.values(), texts.ends):
        digest.update(np.ascontiguousarray(array).data)
    key = digest.hexdigest()
    if key not in _computed:
        dtype, order = next(model.parameters()).dtype, texts.lengths.argsort(stable=True)
        rows: list[Any] = [None] * len(texts)
        for index, inputs, _ in texts.chosen(order).to(fabric.device).indexed(_AT_ONCE):
            states, mask = hidden_states(model, inputs).to("cpu", dtype), inputs["attention_mask"].bool().cpu()
            for i, state, real in zip(order[index].tolist(), states, mask, strict=True):
                rows[i] = state[real].numpy()
        _computed[key] = np.concatenate(rows)
    _computed.move_to_end(key)
    while len(_computed) > _KEPT:
        _computed.popitem(last=False)
    return _computed[key]


def _digest(model: Logits, fabric: Fabric, precision: str) -> str:
    """A checksum of what the states of a text depend on besides the text."""
    digest = hashlib.blake2b(f"{fabric.device} {precision}".encode(), digest_size=16)
    for name, p in model.named_parameters():
        if not p.requires_grad:
            digest.update(name.encode())
            digest.update(p.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def _width(model: Logits) -> int:
    network: Any = model.network
    return int(network.config.hidden_size)
