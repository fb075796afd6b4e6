"""Optim: `next_step`, which computes the next step of an optimizer in advance, and the Lookahead optimizer."""

from bisam.optim.lookahead import Lookahead as Lookahead
from bisam.optim.preview import next_step as next_step
