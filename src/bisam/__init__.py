"""bisam: sharpness-aware training for PyTorch. SAM, BiSAM and related methods as losses whose parts combine freely."""

from bisam import (
    deprecated as _deprecated,
    masks as masks,
    perturbations as perturbations,
    proximal as proximal,
    schedules as schedules,
)
from bisam.evaluation import Evaluation as Evaluation
from bisam.loss import SharpnessAware as SharpnessAware
from bisam.methods import (
    AESAM as AESAM,
    ASAM as ASAM,
    BSAM as BSAM,
    CRSAM as CRSAM,
    ERM as ERM,
    ESAM as ESAM,
    FSAM as FSAM,
    GSAM as GSAM,
    KSAM as KSAM,
    LESAM as LESAM,
    MESA as MESA,
    MSAM as MSAM,
    RAPP as RAPP,
    RSAM as RSAM,
    SAF as SAF,
    SAM as SAM,
    SAMDB as SAMDB,
    SAMON as SAMON,
    SSAMD as SSAMD,
    SSAMF as SSAMF,
    WSAM as WSAM,
    XSAM as XSAM,
    ABiSAM as ABiSAM,
    AsyncSAM as AsyncSAM,
    BiSAM as BiSAM,
    CEGPlus as CEGPlus,
    During as During,
    EBiSAM as EBiSAM,
    Every as Every,
    ExtraGradient as ExtraGradient,
    FisherSAM as FisherSAM,
    FunctionalSAM as FunctionalSAM,
    GBiSAM as GBiSAM,
    LookSAM as LookSAM,
    Method as Method,
    MomentumSAM as MomentumSAM,
    MultiStepSAM as MultiStepSAM,
    OptSAM as OptSAM,
    SAMPa as SAMPa,
    VaSSO as VaSSO,
    ZSharp as ZSharp,
)
from bisam.model.oracle import ModelOracle as ModelOracle
from bisam.model.passes import displaced as displaced
from bisam.objectives import (
    OBF as OBF,
    Binary as Binary,
    LowerBound as LowerBound,
    NegLog as NegLog,
    Tanh as Tanh,
    WrongClasses as WrongClasses,
    cross_entropy as cross_entropy,
)
from bisam.optim import Lookahead as Lookahead, ProximalPoint as ProximalPoint, next_step as next_step
from bisam.oracle import Oracle as Oracle, Query as Query
from bisam.perturbations import L2 as L2, Adaptive as Adaptive, Only as Only, Perturbation as Perturbation
from bisam.vector import Vector as Vector

__version__ = "0.1.0"

_deprecated.install()


def __getattr__(name: str) -> object:
    return _deprecated.attribute(name)
