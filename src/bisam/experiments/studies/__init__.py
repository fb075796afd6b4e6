"""Studies: named comparisons of runs."""

from __future__ import annotations

from bisam.experiments.studies.local import LOCAL
from bisam.experiments.studies.paper import PAPER
from bisam.experiments.studies.sampa import SAMPA

STUDIES = {study.name: study for study in (*LOCAL, *PAPER, *SAMPA)}
"""The studies by their names; `bisam run` runs these and the measurements."""
