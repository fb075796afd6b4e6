"""Methods: the algorithms of the papers. A method chooses its queries and combines their gradients.

A method is a value, `(oracle, batch) -> Evaluation`. It returns the loss to report and the gradient to descend. It does
no I/O, does not access the model, and stores nothing in itself: the state that it keeps between steps is in
`oracle.state`, so two losses may use the same object. The letters are those of the papers: g is the ascent gradient, h
the descent gradient, e the displacement.

    >>> from bisam import GSAM, KSAM, RSAM, SAM, EBiSAM, L2, Tanh
    >>> from bisam.perturbations import Friendly
    >>> tanh = SAM(L2(0.1), ascent=Tanh())                # the adversary climbs a bound of the 0-1 loss: BiSAM (tanh)
    >>> friendly = GSAM(Friendly(L2(0.05)), alpha=0.4)    # any perturbation
    >>> nested = KSAM(64, RSAM(0.01, EBiSAM()))           # any nest of wrappers
"""

from bisam.methods.bayesian import BSAM as BSAM
from bisam.methods.combined import (
    CRSAM as CRSAM,
    GAM as GAM,
    GNP as GNP,
    GSAM as GSAM,
    SAGM as SAGM,
    WSAM as WSAM,
    XSAM as XSAM,
    BilateralSAM as BilateralSAM,
    FunctionalSAM as FunctionalSAM,
    GBiSAM as GBiSAM,
    Lookbehind as Lookbehind,
    StableSAM as StableSAM,
)
from bisam.methods.drawn import FilterNoise as FilterNoise, ZerothOrder as ZerothOrder
from bisam.methods.efficient import (
    AESAM as AESAM,
    ESAM as ESAM,
    SSAMF as SSAMF,
    EBiSAM as EBiSAM,
    LookSAM as LookSAM,
    MomentumSAM as MomentumSAM,
    SAMPa as SAMPa,
)
from bisam.methods.games import RAPP as RAPP, CEGPlus as CEGPlus, ExtraGradient as ExtraGradient
from bisam.methods.longtail import FocalSAM as FocalSAM, ImbSAM as ImbSAM
from bisam.methods.method import Method as Method
from bisam.methods.sam import (
    ASAM as ASAM,
    ERM as ERM,
    FSAM as FSAM,
    GCSAM as GCSAM,
    LESAM as LESAM,
    SAM as SAM,
    SAMON as SAMON,
    SAMSPS as SAMSPS,
    SSAMD as SSAMD,
    ABiSAM as ABiSAM,
    BiSAM as BiSAM,
    EigenSAM as EigenSAM,
    FisherSAM as FisherSAM,
    MultiStepSAM as MultiStepSAM,
    VaSSO as VaSSO,
    ZSharp as ZSharp,
)
from bisam.methods.stale import SAMDB as SAMDB, AsyncSAM as AsyncSAM, OptSAM as OptSAM
from bisam.methods.trajectory import MESA as MESA, SAF as SAF
from bisam.methods.wrappers import (
    KSAM as KSAM,
    MSAM as MSAM,
    RSAM as RSAM,
    TSAM as TSAM,
    Accumulated as Accumulated,
    During as During,
    Every as Every,
    Tilted as Tilted,
)
