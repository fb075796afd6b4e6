"""Marks: letters in a report that point from values to the assumptions behind them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from string import ascii_lowercase
from typing import Any, cast

from bisam.experiments.recipes.assumptions import SEEDS, Assumption, Kind
from bisam.experiments.recipes.recipe import Recipe

_KINDS = {
    Kind.RECOLLECTED: "recollected: remembered from the paper, and not a claim of it",
    Kind.CHOSEN: "chosen here: decided by this project",
}


class Marks:
    """A letter for each assumption that concerns a recipe of a report.

    Args:
        assumptions: of the study.
        seeds: number of runs of each recipe; a number that the user has chosen is no assumption of the study.
    """

    def __init__(self, assumptions: Iterable[Assumption], seeds: Mapping[Recipe, int]) -> None:
        found = {
            one: [r for r, n in seeds.items() if one.concerns(r) and (one.subject != SEEDS or one.value == n)]
            for one in assumptions
        }
        self._recipes = {one: recipes for one, recipes in found.items() if recipes}
        self._marks = {one: f"[{_letters(i)}]" for i, one in enumerate(self._recipes)}
        self._everywhere = {one for one, recipes in self._recipes.items() if len(recipes) == len(seeds)}

    def shared(self, subject: str) -> str:
        """The marks of a value that all recipes have, or ""."""
        return "".join(mark for one, mark in self._marks.items() if one.subject == subject and one in self._everywhere)

    @property
    def subjects(self) -> set[str]:
        """The subjects of the assumptions that concern all recipes."""
        return {one.subject for one in self._everywhere}

    def beside(
        self, recipe: Recipe, columns: Sequence[str], cells: Sequence[str], told: Collection[str] = ()
    ) -> tuple[str, ...]:
        """The cells of a row with the marks of its values: beside the value if it has a column, else beside the method.

        Args:
            recipe: of the row.
            columns: headings of the table.
            cells: text of the row.
            told: subjects of values that all recipes have and that are marked elsewhere.
        """
        marks = dict.fromkeys(columns, "")
        name = next((column for column in columns if column in ("method", "name")), columns[0])
        for one, mark in self._marks.items():
            column = "n" if one.subject == SEEDS else one.subject
            elsewhere = column not in marks and one.subject in told and one in self._everywhere
            if recipe in self._recipes[one] and not elsewhere:
                marks[column if column in marks else name] += mark
        return tuple(f"{cell} {marks[column]}".rstrip() for column, cell in zip(columns, cells, strict=True))

    def rows(self) -> list[tuple[str, str, str, str]]:
        """For each assumption its mark, its subject with the value, its kind and its reason."""
        return [
            (mark, f"{one.subject.replace('_', ' ')} {_shown(one.value)}", str(one.kind), one.reason)
            for one, mark in self._marks.items()
        ]

    @property
    def words(self) -> str:
        """The sentence that explains the kinds, or "" without assumptions."""
        kinds = [words for kind, words in _KINDS.items() if any(one.kind == kind for one in self._marks)]
        return f"Values that no public source of the paper gives are marked; {'; '.join(kinds)}." if kinds else ""


def _letters(number: int) -> str:
    """One of a, b, ..., z, aa, ab, ... for 0, 1, ..."""
    before, letter = divmod(number, len(ascii_lowercase))
    return (_letters(before - 1) if before else "") + ascii_lowercase[letter]


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(_shown, cast("tuple[Any, ...]", value)))
    return f"{value:g}" if isinstance(value, float) else str(value)
