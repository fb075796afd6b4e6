"""bisam: sharpness-aware training for PyTorch. SAM, BiSAM and related methods as losses whose parts combine freely.

`import bisam` imports no torch; a name is loaded when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from bisam import deprecated as _deprecated

if TYPE_CHECKING:
    from bisam import (
        masks as masks,
        objectives as objectives,
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
        GAM as GAM,
        GCSAM as GCSAM,
        GNP as GNP,
        GSAM as GSAM,
        KSAM as KSAM,
        LESAM as LESAM,
        MESA as MESA,
        MSAM as MSAM,
        RAPP as RAPP,
        RSAM as RSAM,
        SAF as SAF,
        SAGM as SAGM,
        SAM as SAM,
        SAMDB as SAMDB,
        SAMON as SAMON,
        SAMSPS as SAMSPS,
        SSAMD as SSAMD,
        SSAMF as SSAMF,
        TSAM as TSAM,
        WSAM as WSAM,
        XSAM as XSAM,
        ABiSAM as ABiSAM,
        Accumulated as Accumulated,
        AsyncSAM as AsyncSAM,
        BilateralSAM as BilateralSAM,
        BiSAM as BiSAM,
        CEGPlus as CEGPlus,
        During as During,
        EBiSAM as EBiSAM,
        EigenSAM as EigenSAM,
        Every as Every,
        ExtraGradient as ExtraGradient,
        FilterNoise as FilterNoise,
        FisherSAM as FisherSAM,
        FocalSAM as FocalSAM,
        FunctionalSAM as FunctionalSAM,
        GBiSAM as GBiSAM,
        ImbSAM as ImbSAM,
        Lookbehind as Lookbehind,
        LookSAM as LookSAM,
        Method as Method,
        MomentumSAM as MomentumSAM,
        MultiStepSAM as MultiStepSAM,
        OptSAM as OptSAM,
        SAMPa as SAMPa,
        StableSAM as StableSAM,
        Tilted as Tilted,
        VaSSO as VaSSO,
        ZerothOrder as ZerothOrder,
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
    from bisam.optim import (
        SWAD as SWAD,
        Decoupled as Decoupled,
        Lookahead as Lookahead,
        ProximalPoint as ProximalPoint,
        momentum_of as momentum_of,
        next_step as next_step,
    )
    from bisam.oracle import Oracle as Oracle, Query as Query
    from bisam.perturbations import L2 as L2, Adaptive as Adaptive, Only as Only, Perturbation as Perturbation
    from bisam.vector import Vector as Vector

__version__ = "0.1.0"

_NAMES = {
    "bisam.evaluation": "Evaluation",
    "bisam.loss": "SharpnessAware",
    "bisam.methods": (
        "AESAM ASAM BSAM CRSAM ERM ESAM FSAM GAM GCSAM GNP GSAM KSAM LESAM MESA MSAM RAPP RSAM SAF SAGM SAM SAMDB "
        "SAMON SAMSPS SSAMD SSAMF TSAM WSAM XSAM ABiSAM Accumulated AsyncSAM BilateralSAM BiSAM CEGPlus "
        "During EBiSAM EigenSAM Every ExtraGradient FilterNoise FisherSAM FocalSAM FunctionalSAM GBiSAM ImbSAM "
        "Lookbehind LookSAM Method MomentumSAM MultiStepSAM OptSAM SAMPa StableSAM Tilted VaSSO ZerothOrder ZSharp"
    ),
    "bisam.model.oracle": "ModelOracle",
    "bisam.model.passes": "displaced",
    "bisam.objectives": "OBF Binary LowerBound NegLog Tanh WrongClasses cross_entropy",
    "bisam.optim": "SWAD Decoupled Lookahead ProximalPoint momentum_of next_step",
    "bisam.oracle": "Oracle Query",
    "bisam.perturbations": "L2 Adaptive Only Perturbation",
    "bisam.vector": "Vector",
}
"""The public names, by the module that has them; type checkers read the imports above."""
_PUBLIC_MODULES = ("masks", "objectives", "perturbations", "proximal", "schedules")
_MODULES = {
    *_PUBLIC_MODULES,
    *("analysis", "batches", "distributed", "evaluation", "loss", "methods", "model", "optim"),
    *("oracle", "seeded", "state", "statistics", "targets", "validation", "vector"),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = [*_PUBLIC_MODULES, *_HOME]  # pyright: ignore[reportUnsupportedDunderAll]

_deprecated.install()


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return import_module(f"bisam.{name}")  # which makes it an attribute
    if name not in _HOME:
        return _deprecated.attribute(name)
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
