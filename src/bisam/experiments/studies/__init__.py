"""Studies: which runs are compared, by name."""

from __future__ import annotations

from bisam.experiments.studies.local import OURS
from bisam.experiments.studies.paper import PAPER

STUDIES = {study.name: study for study in (*OURS, *PAPER)}
"""What `bisam run` runs, besides the measurements."""
