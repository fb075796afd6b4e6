"""Studies: those there are, by name."""

from __future__ import annotations

from bisam.experiments.ours import OURS
from bisam.experiments.paper import PAPER

STUDIES = {study.name: study for study in (*OURS, *PAPER)}
"""What `bisam run` runs, besides the measurements."""
