"""Studies: named comparisons of runs."""

from __future__ import annotations

from bisam.experiments.studies.adversary import ADVERSARY
from bisam.experiments.studies.finetune import FINETUNE
from bisam.experiments.studies.local import LOCAL
from bisam.experiments.studies.longtail import LONGTAIL
from bisam.experiments.studies.paper import PAPER
from bisam.experiments.studies.radius import RADIUS
from bisam.experiments.studies.recover import RECOVER
from bisam.experiments.studies.sampa import SAMPA
from bisam.experiments.studies.textgen import TEXTGEN

GROUPS = {
    "additional studies": (*LOCAL, *RADIUS, *ADVERSARY, *RECOVER, *LONGTAIL, *FINETUNE, *TEXTGEN),
    "BiSAM (Xie et al., 2024)": PAPER,
    "SAMPa (Xie, Pethick and Cevher, 2024)": SAMPA,
}
"""The studies by where they come from, for `bisam list`."""
STUDIES = {study.name: study for studies in GROUPS.values() for study in studies}
"""The studies by their names; `bisam run` runs these and the measurements."""

LABELS = {expression: label for study in STUDIES.values() for expression, label in study.labels.items()}
"""Names of the expressions that the studies have as methods."""
