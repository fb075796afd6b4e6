"""Optim: the next step of an optimizer before it is taken, and the Lookahead optimizer."""

from bisam.optim.preview import Lookahead as Lookahead, lookahead as lookahead
