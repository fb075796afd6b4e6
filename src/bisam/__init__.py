"""bisam: sharpness-aware training as a loss (SAM, ASAM, mSAM, BiSAM)."""

from bisam import perturbations as perturbations
from bisam.evaluation import Evaluation as Evaluation
from bisam.loss import SharpnessAware as SharpnessAware
from bisam.methods import (
    ASAM as ASAM,
    ERM as ERM,
    MSAM as MSAM,
    SAM as SAM,
    ABiSAM as ABiSAM,
    BiSAM as BiSAM,
)
from bisam.objectives import (
    LowerBound as LowerBound,
    NegLog as NegLog,
    Tanh as Tanh,
    cross_entropy as cross_entropy,
)
from bisam.oracle import ModelOracle as ModelOracle, Oracle as Oracle
from bisam.vector import Vector as Vector

__version__ = "0.1.0"
