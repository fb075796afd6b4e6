"""Studies: named comparisons of runs."""

from __future__ import annotations

from bisam.experiments.studies.local import OURS
from bisam.experiments.studies.paper import PAPER

STUDIES = {study.name: study for study in (*OURS, *PAPER)}
"""The studies by their names; `bisam run` runs these and the measurements."""
