"""Studies: named comparisons of runs."""

from __future__ import annotations

from bisam.experiments.studies.local import LOCAL
from bisam.experiments.studies.paper import PAPER

STUDIES = {study.name: study for study in (*LOCAL, *PAPER)}
"""The studies by their names; `bisam run` runs these and the measurements."""

LABELS = {expression: label for study in STUDIES.values() for expression, label in study.labels.items()}
"""Names of the expressions that the studies have as methods."""
