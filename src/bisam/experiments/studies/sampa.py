"""Sampa: the tables and figures of SAMPa's paper that train networks (Xie, Pethick and Cevher, 2024).

Source: https://arxiv.org/abs/2410.10683. What is compared in which table is known from public summaries, the recipe of
CIFAR from the authors' code (github.com/LIONS-EPFL/SAMPa). Values that neither gives are the `assumptions` of the
studies. The radius is one of them: a table of radii was not found, and 0.1, the default of the code, is taken for all
methods of CIFAR.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from bisam.experiments.recipes.assumptions import AE_SAM, SEEDS, Assumption, Kind
from bisam.experiments.recipes.catalogue import BASELINE, METHODS, PLAIN
from bisam.experiments.recipes.presets import BERT, CIFAR, IMAGENET, VIT
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.studies import papers
from bisam.experiments.studies.paper import MODELS
from bisam.experiments.studies.papers import Exhibit
from bisam.experiments.studies.study import Study

_THREE = 3
_RHO = 0.1
_FOUR = (PLAIN, "sam", "sampa_0", "sampa")
SAMPA_LANGUAGE = "SAMPa(L2({rho}), ahead=next_step(optimizer), lam=0.1)"
"""SAMPa-0.1, which the paper uses for language."""


def _sampa(perturb: str, ascent: str = "") -> str:
    """SAMPa-0.2 with another perturbation and adversary."""
    return f"SAMPa({perturb}, {ascent}ahead=next_step(optimizer), lam=0.2)"


VARIANTS: tuple[tuple[str, str, str], ...] = (
    ("SAM", "SAM(L2(0.1))", _sampa("L2(0.1)")),
    ("mSAM", "MSAM(32, SAM(L2(0.1)))", f"MSAM(32, {_sampa('L2(0.1)')}, separate=True)"),
    ("ASAM", "SAM(Adaptive(2.0))", _sampa("Adaptive(2.0)")),
    ("SAM-ON", "SAM(NormLayers(L2(0.5)))", _sampa("NormLayers(L2(0.5))")),
    ("VaSSO", "SAM(Smoothed(L2(0.1), 0.9))", _sampa("Smoothed(L2(0.1), 0.9)")),
    ("BiSAM (-log)", "SAM(L2(0.1), NegLog(1.0))", _sampa("L2(0.1)", "NegLog(1.0), ")),
)
"""Variants of SAM that SAMPa is combined with: name, method alone, and the two together."""

_PENALTY = "WSAM(L2(0.1), gamma=0.8 / 1.8)"
_TASK_RADII = {"cola": 0.01, "rte": 0.005}
_LABELS = {
    **{alone: name for name, alone, _ in VARIANTS},
    **{together: f"SAMPa-0.2 with {name}" for name, _, together in VARIANTS},
    **{SAMPA_LANGUAGE.format(rho=rho): "SAMPa-0.1" for rho in (0.05, *_TASK_RADII.values())},
    _PENALTY: "gradient penalty",
}


def _with(base: Recipe, method: str, rho: float = _RHO) -> Recipe:
    """`base` with a method of the catalogue, or an expression."""
    takes = method in METHODS and "rho" in METHODS[method].settings
    return replace(base, method=method, rho=rho if takes else None)


def _networks(dataset: str, epochs: int | None) -> list[Recipe]:
    base = replace(CIFAR, dataset=dataset, epochs=epochs or 200)
    recipes: list[Recipe] = []
    for model in MODELS:
        one = replace(base, model=model)
        twice = replace(one, epochs=2 * one.length)  # SAMPa-0.2 has both in the table
        recipes += [_with(twice if method == PLAIN else one, method) for method in _FOUR] + [_with(twice, "sampa")]
    return recipes


def _efficiency(epochs: int | None) -> list[Recipe]:
    methods = (PLAIN, "sam", "sampa_0", "sampa", "bisam_log", "looksam", "ae_sam", "esam", "saf", "mesa")
    return [_with(replace(CIFAR, epochs=epochs or 200), method) for method in methods]


def _imagenet(epochs: int | None) -> list[Recipe]:
    base = replace(IMAGENET, epochs=epochs or 90)
    return [_with(base, method, 0.05) for method in ("sam", "sampa")]


def _vit(epochs: int | None) -> list[Recipe]:
    # AdamW and 10 epochs are the paper's.
    base = replace(VIT, steps=None, epochs=epochs or 10, warmup=0)
    bases = [replace(base, dataset=f"{name}:224") for name in ("cifar10", "cifar100")]
    return [_with(base, method, 0.05) for base in bases for method in ("sam", "sampa")]


def _glue(epochs: int | None) -> list[Recipe]:
    from bisam.experiments.data.glue import TASKS  # not at the top: other studies do not need it

    tiny = ("mrpc", "wnli")
    recipes: list[Recipe] = []
    for task in TASKS:
        base = replace(BERT, dataset=f"glue:{task}", epochs=epochs or (5 if task in tiny else 3))
        rho = _TASK_RADII.get(task, 0.05)
        methods = (PLAIN, "sam", "sampa_0", SAMPA_LANGUAGE.format(rho=rho))
        recipes += [_with(base, method, rho) for method in methods]
    return recipes


def _noise(epochs: int | None) -> list[Recipe]:
    base = replace(CIFAR, model="resnet32", epochs=epochs or 200)
    bases = [replace(base, noise=noise) for noise in (0.0, 0.2, 0.4, 0.6, 0.8)]
    return [_with(base, method) for base in bases for method in _FOUR]


def _variants(epochs: int | None) -> list[Recipe]:
    base = replace(CIFAR, epochs=epochs or 200)
    return [_with(base, method) for _, alone, together in VARIANTS for method in (alone, together)]


def _stale(epochs: int | None) -> list[Recipe]:
    # The networks are those of SAM-db's table.
    base = replace(CIFAR, epochs=epochs or 200)
    methods = (PLAIN, "sam", "opt_sam", "sam_db", "async_sam", "sampa")
    return [_with(replace(base, model=model), m) for model in ("resnet56", "wrn28_2", "vgg19_bn") for m in methods]


def _penalty(epochs: int | None) -> list[Recipe]:
    # A penalty on the gradient norm (Zhao et al., 2022) mixes both gradients, as WSAM with gamma = a / (1 + a) does:
    # (1 - a) g + a h, with a = 0.8. SAMPa-0.2 weights its gradients by 0.8 and 0.2.
    base = replace(CIFAR, epochs=epochs or 200)
    methods = ("sam", "sampa", _PENALTY)
    return [_with(replace(base, noise=noise), method) for noise in (0.0, 0.8) for method in methods]


_UNKNOWN = "the paper's value is not public"
_RADIUS = Assumption("rho", _RHO, Kind.CHOSEN, "the default of the authors' code; the paper's radii are not public")
_DOUBLED = Assumption("epochs", 400, Kind.RECOLLECTED, "of SGD: twice the others'", {"method": PLAIN})


def _added(why: str, *methods: str) -> Assumption:
    return Assumption("method", methods, Kind.CHOSEN, f"added: {why}")


_TABLES = "the value of the BiSAM paper's table; this paper's is not public"
_RECOLLECTED = "recollected for the BiSAM paper's table; neither paper's value is public"
_HERE = "as in this package's study of the BiSAM paper's table; neither paper's value is public"


def _assumed(why: str, kind: Kind, **values: object) -> tuple[Assumption, ...]:
    return tuple(Assumption(name, value, kind, why) for name, value in values.items())


def _study(
    name: str,
    exhibit: str,
    title: str,
    recipes: Callable[[int | None], list[Recipe]],
    note: str = "",
    figures: tuple[str, ...] = ("accuracy",),
    baselines: tuple[str, ...] = (BASELINE,),
    assumptions: tuple[Assumption, ...] = (),
) -> Study:
    source = "Xie, Pethick and Cevher, 2024, https://arxiv.org/abs/2410.10683."
    note = f"{source} {note}".strip()
    shown = Exhibit(papers.SAMPA, exhibit)
    return Study(
        name,
        title,
        recipes,
        _THREE,
        figures,
        note=note,
        baselines=baselines,
        labels=_LABELS,
        assumptions=(Assumption(SEEDS, _THREE, Kind.CHOSEN, _UNKNOWN), *assumptions),
        exhibit=shown,
    )


_TWICE = (
    "SGD, and SAMPa-0.2 in its second row, have twice the epochs: then a run has as many gradients in sequence as SAM."
)

SAMPA = (
    _study(
        "sampa",
        "Figure of efficiency",
        "SAMPa's comparison: accuracy against gradients and seconds, ResNet-56 on CIFAR-10",
        _efficiency,
        "All have the same number of epochs. SAF and MESA keep the authors' settings, whose average of the weights "
        "reaches over thousands of steps.",
        ("gradients", "accuracy"),
        assumptions=(
            _RADIUS,
            _added("not in the authors' figure", "sampa_0", "bisam_log"),
            Assumption(
                "other settings",
                "the catalogue's",
                Kind.CHOSEN,
                "those of each method's public code; the settings of this paper are not public",
                {"method": ("looksam", "esam", "saf", "mesa")},
            ),
            AE_SAM,
        ),
    ),
    _study(
        "sampa-cifar10",
        "Table 1",
        "SAMPa's table: CIFAR-10, five networks",
        lambda e: _networks("cifar10", e),
        _TWICE,
        assumptions=(_RADIUS, _DOUBLED),
    ),
    _study(
        "sampa-cifar100",
        "Table 2",
        "SAMPa's table: CIFAR-100, five networks",
        lambda e: _networks("cifar100", e),
        _TWICE,
        assumptions=(_RADIUS, _DOUBLED),
    ),
    _study(
        "sampa-imagenet",
        "Table of ImageNet-1K",
        "SAMPa's table: ImageNet-1K, ResNet-50",
        _imagenet,
        assumptions=(
            *_assumed(_RECOLLECTED, Kind.RECOLLECTED, epochs=90, learning_rate=0.2, batch_size=512, rho=0.05),
            *_assumed(_UNKNOWN, Kind.CHOSEN, model="torchvision:resnet50"),
        ),
    ),
    _study(
        "sampa-vit",
        "Table of ViT-B/16",
        "SAMPa's table: ViT-B/16 fine-tuned on CIFAR-10 and CIFAR-100",
        _vit,
        assumptions=(
            *_assumed(_RECOLLECTED, Kind.RECOLLECTED, learning_rate=1e-4, batch_size=128),
            *_assumed(_TABLES, Kind.CHOSEN, weight_decay=0.0, clip=1.0),
            *_assumed(_HERE, Kind.CHOSEN, rho=0.05),
            *_assumed(_UNKNOWN, Kind.CHOSEN, warmup=0),
        ),
    ),
    _study(
        "sampa-glue",
        "Table of GLUE",
        "SAMPa's table: BERT-base fine-tuned on GLUE",
        _glue,
        "The test is the official development set; a tenth of the training part is held out to choose the epoch. "
        "STS-B, a regression, is left out.",
        assumptions=(
            *_assumed(_RECOLLECTED, Kind.RECOLLECTED, epochs=(3, 5), learning_rate=2e-5, batch_size=32),
            *_assumed(_RECOLLECTED, Kind.RECOLLECTED, rho=(0.05, 0.01, 0.005)),
            *_assumed(_TABLES, Kind.CHOSEN, clip=1.0),
            *_assumed(_HERE, Kind.CHOSEN, weight_decay=0.0, warmup=0),
        ),
    ),
    _study(
        "sampa-noise",
        "Table of label noise",
        "SAMPa's table: CIFAR-10 with label noise, ResNet-32",
        _noise,
        assumptions=(_RADIUS,),
    ),
    _study(
        "sampa-variants",
        "Table of variants",
        "SAMPa's table: combined with other variants of SAM, ResNet-56 on CIFAR-10",
        _variants,
        "Each variant is compared with SAM; the row after it is the variant with SAMPa-0.2.",
        baselines=(VARIANTS[0][1],),
        assumptions=(
            _RADIUS,
            Assumption(
                "variants",
                ", ".join(name for name, *_ in VARIANTS[1:]),
                Kind.RECOLLECTED,
                "which variants the table has is not public",
            ),
            Assumption("rho", 2.0, Kind.CHOSEN, "of ASAM: larger than SAM's, as its authors' is"),
            Assumption("rho", 0.5, Kind.CHOSEN, "of SAM-ON: larger than SAM's, as its authors' is"),
            Assumption("micro-batch", 32, Kind.CHOSEN, _UNKNOWN, {"method": VARIANTS[1][1:]}),
        ),
    ),
    _study(
        "sampa-stale",
        "Tables of OptSAM and SAM-db",
        "SAMPa's tables: OptSAM and SAM-db on CIFAR-10, three networks",
        _stale,
        assumptions=(_RADIUS, _added("in neither table", "async_sam")),
    ),
    _study(
        "sampa-penalty",
        "Table of the gradient penalty",
        "SAMPa's table: a penalty on the gradient norm, ResNet-56 on CIFAR-10",
        _penalty,
        assumptions=(
            _RADIUS,
            Assumption(
                "weight of the penalty",
                0.8,
                Kind.RECOLLECTED,
                "the value of Zhao et al. (2022)",
                {"method": _PENALTY},
            ),
        ),
    ),
)
"""In the order of the paper, after its figure."""
