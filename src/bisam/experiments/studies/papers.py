"""Papers: the papers whose tables and figures the studies and measurements reproduce."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Paper:
    """A paper."""

    name: str
    """Name of its method."""
    reference: str
    """Authors, conference and year."""
    url: str
    """Its address."""


@dataclass(frozen=True)
class Exhibit:
    """A table, a figure or a comparison of a paper."""

    paper: Paper
    name: str
    """Its name there, as "Table 1", or what it shows where its number is not public."""


BISAM = Paper("BiSAM", "Xie et al., ICML 2024", "https://arxiv.org/abs/2407.12993")
SAMPA = Paper("SAMPa", "Xie, Pethick and Cevher, NeurIPS 2024", "https://arxiv.org/abs/2410.10683")
RAPP = Paper("RAPP", "Pethick, Xie and Cevher, NeurIPS 2023", "https://arxiv.org/abs/2310.13459")

PAPERS = (BISAM, SAMPA, RAPP)
"""In the order of the page of tables."""
