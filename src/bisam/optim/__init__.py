"""Optim: `next_step`, which computes the next step of an optimizer in advance, wrappers of optimizers, and SWAD."""

from bisam.optim.decoupled import Decoupled as Decoupled
from bisam.optim.lookahead import Lookahead as Lookahead, ProximalPoint as ProximalPoint
from bisam.optim.preview import momentum_of as momentum_of, next_step as next_step
from bisam.optim.swad import SWAD as SWAD
