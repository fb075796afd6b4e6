"""Changes: the values of `--set`, as text."""

from __future__ import annotations

from collections.abc import Iterable


def pairs(changes: Iterable[str], example: str) -> dict[str, str]:
    """Names and values of changes "name=value"; hyphens in names become underscores.

    Args:
        changes: the values of `--set`.
        example: a valid change, for the message of the error.

    Raises:
        ValueError: a change has no value.
    """
    found: dict[str, str] = {}
    for change in changes:
        name, equals, value = change.partition("=")
        if not equals:
            raise ValueError(f"--set {change!r} has no value: write it as in --set {example}")
        found[name.strip().replace("-", "_")] = value.strip()
    return found
