"""The flags of the BiSAM authors' `train.py` that have another name in `bisam train`, in terms of a recipe.

    bisam train --preset authors --opt bisam_tanh --adaptive True --model wrn282 --dataset cifar100

Source: `args.py` and `utility/setup.py` of github.com/LIONS-EPFL/BiSAM at commit be996e4.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bisam.experiments.cli.flags import AuthorsFlags
from bisam.experiments.data import NAMES as DATA
from bisam.experiments.models.build import NAMES as NETWORKS
from bisam.experiments.recipes.catalogue import METHODS, PLAIN
from bisam.experiments.recipes.presets import AUTHORS, started
from bisam.experiments.recipes.recipe import Recipe

_ADAPTIVE = {"sam": "asam", "bisam_log": "abisam_log", "bisam_tanh": "abisam_tanh"}
_NAMES: dict[str, dict[str, str]] = {
    "method": {"base": PLAIN},
    "model": {"wrn2810": "wrn28_10", "wrn282": "wrn28_2", "vgg19bn": "vgg19_bn"},
}
"""The authors' names of methods and models that have other names here."""
_TRUE, _FALSE = ("true", "1", "yes"), ("false", "0", "no")


def translated(base: Recipe, given: Mapping[str, Any], flags: AuthorsFlags) -> dict[str, Any]:
    """Fields of a recipe and their values, with the authors' flags and names in terms of `Recipe`.

    Args:
        base: the recipe that the flags change.
        given: fields of the recipe that are given as flags.
        flags: the authors' flags.

    Raises:
        ValueError: there is nothing of the kind here; the message names what there is.
    """
    for name in ("depth", "width_factor"):
        if getattr(flags, name) is not None:
            raise ValueError(
                f"--{name} has no effect in the authors' script, whose --model names the network: leave it out, and "
                "give --model wrn28_10, wrn28_2 or another from `bisam list`"
            )
    if flags.dropout:
        raise ValueError(
            f"--dropout {flags.dropout:g}: the networks of --model have no dropout. Leave it out, or train a network "
            "of your own with bisam.SharpnessAware"
        )
    values = {name: _NAMES.get(name, {}).get(value, _in_lower_case(name, value)) for name, value in given.items()}
    if flags.adam:
        if (values.get("optimizer") or "adamw").lower() != "adamw":
            raise ValueError(
                f"--adam is --optimizer adamw, and --optimizer {values['optimizer']} is given: leave one out"
            )
        values["optimizer"] = "adamw"
    return values | _adaptive(started(base, values), values, flags.adaptive)


def _in_lower_case(name: str, value: Any) -> Any:
    """The value of a field with the case of the name that it has here: `SAM`, `CIFAR10:16`; paths keep theirs."""
    known = {"method": METHODS, "dataset": DATA, "model": NETWORKS}.get(name, ())
    if not isinstance(value, str) or value in known:
        return value
    head, colon, rest = value.partition(":")
    lower = head.lower() + colon + (rest.lower() if head.lower() == "glue" else rest)
    return lower if any(one.partition(":")[0] == head.lower() for one in known) else value


def _adaptive(recipe: Recipe, given: Mapping[str, Any], text: str | None) -> dict[str, Any]:
    """The method and radius that `--adaptive` gives to a recipe."""
    if text is None:
        return {}
    if text.lower() not in _TRUE:
        false = " In the authors' script any text means True, also False." if text.lower() in _FALSE else ""
        raise ValueError(f"--adaptive takes True, got {text!r}: leave it out for the methods without it.{false}")
    if recipe.method in _ADAPTIVE.values():
        return {}
    if recipe.method not in _ADAPTIVE:
        raise ValueError(
            f"--adaptive changes {', '.join(_ADAPTIVE)}, and the method is {recipe.method}: for others, write "
            "Adaptive(rho) as the perturbation of an expression"
        )
    return {"method": _ADAPTIVE[recipe.method], "rho": given.get("rho", AUTHORS.rho)}


def notes(recipe: Recipe, flags: AuthorsFlags, in_files: bool) -> list[str]:
    """The notes on accepted flags that have no effect, one line each.

    Args:
        recipe: that is trained.
        flags: the authors' flags.
        in_files: whether its data are images in files.
    """
    found: list[str] = []
    if flags.valid:
        found.append("--valid has no effect, as in the authors' script: validation data are always held out")
    if flags.threads is not None and not in_files:
        found.append(
            f"--threads has no effect on {recipe.dataset}, which is in memory; for images in files it is --loaders"
        )
    return found
