"""Equal gradients: the lengths with which runs of different methods compute about the same number of gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from bisam.experiments.recipes.catalogue import PLAIN
from bisam.experiments.recipes.recipe import Recipe

GRADIENTS: Mapping[str, float] = {
    **dict.fromkeys((PLAIN, "ksam", "momentum_sam", "opt_sam", "saf", "mesa"), 1.0),
    **dict.fromkeys(("zeroth_order", "zeroth_order_redrawn", "filter_noise", "filter_noise_redrawn"), 1.0),
    "looksam": 1.2,
    # AE-SAM decides after each step whether the next one takes 1 or 2.
    **dict.fromkeys(("esam", "ebisam", "every", "during", "ae_sam"), 1.5),
    **dict.fromkeys(("gbisam", "multistep_sam", "cr_sam", "bilateral_sam", "lookbehind", "imb_sam", "focal_sam"), 3.0),
    "gam": 4.0,
    **dict.fromkeys(("tsam", "tilted"), 6.0),
}
"""Batch gradients of a step, on average, of the methods of the catalogue for which it is not 2. Forward passes that a
method makes besides are not counted. A test compares them with the counted numbers."""


def at_equal_gradients(recipe: Recipe) -> Recipe:
    """The recipe with the length with which it computes about as many gradients as with 2 in each of its steps."""
    length = max(1, round(2 * recipe.length / GRADIENTS.get(recipe.method, 2.0)))
    return replace(recipe, **{recipe.unit: length})
