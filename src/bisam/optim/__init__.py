"""Optim: the next step of an optimizer before it is taken, and the Lookahead optimizer."""

from bisam.optim.lookahead import Lookahead as Lookahead
from bisam.optim.preview import next_step as next_step
