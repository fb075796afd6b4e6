"""The public surface: names, signatures, documentation, and what an import costs."""

from __future__ import annotations

import ast
import copy
import importlib
import inspect
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import bisam
from bisam import masks, objectives, perturbations, proximal, schedules

NAMES = {
    "ABiSAM",
    "Accumulated",
    "AESAM",
    "ASAM",
    "AsyncSAM",
    "BiSAM",
    "Binary",
    "BilateralSAM",
    "BSAM",
    "CEGPlus",
    "cross_entropy",
    "CRSAM",
    "Decoupled",
    "displaced",
    "During",
    "EBiSAM",
    "EigenSAM",
    "ERM",
    "ESAM",
    "Evaluation",
    "Every",
    "ExtraGradient",
    "FilterNoise",
    "FisherSAM",
    "FocalSAM",
    "FSAM",
    "FunctionalSAM",
    "GAM",
    "GBiSAM",
    "GCSAM",
    "GNP",
    "GSAM",
    "ImbSAM",
    "KSAM",
    "LESAM",
    "Lookahead",
    "Lookbehind",
    "next_step",
    "Method",
    "Perturbation",
    "L2",
    "Adaptive",
    "LookSAM",
    "LowerBound",
    "MESA",
    "ModelOracle",
    "momentum_of",
    "MomentumSAM",
    "MSAM",
    "MultiStepSAM",
    "NegLog",
    "OBF",
    "Only",
    "OptSAM",
    "Oracle",
    "ProximalPoint",
    "RAPP",
    "RSAM",
    "SAF",
    "SAGM",
    "SAM",
    "SAMDB",
    "Query",
    "SAMON",
    "SAMPa",
    "SAMSPS",
    "SharpnessAware",
    "SSAMD",
    "StableSAM",
    "SSAMF",
    "SWAD",
    "Tanh",
    "Tilted",
    "TSAM",
    "VaSSO",
    "Vector",
    "WrongClasses",
    "WSAM",
    "XSAM",
    "ZerothOrder",
    "ZSharp",
}
MODULES = {
    perturbations: "Adaptive Centralised Friendly L2 LossEquated NormLayers Only PerGroup PerTensor Smoothed ZScore",
    objectives: "ClassWeighted CostSensitive ExactMatch Focal IoU Pairwise PerExample Retrieval Tolerance TopK",
    masks: "DropGrow FisherMask RandomMask",
    proximal: "Box L1 Simplex",
    schedules: "Constant Cosine FlipRate Follow Linear Warmup",
}
IN_MODULES = [getattr(module, name) for module, names in MODULES.items() for name in names.split()]
TYPES = {"Method", "Perturbation"}  # of functions: they have no signature of their own
PUBLIC = [getattr(bisam, name) for name in sorted(NAMES - TYPES)] + IN_MODULES
CORE = [
    "batches",
    "deprecated",
    "distributed.ddp",
    "distributed.failures",
    "distributed.fsdp",
    "distributed.layout",
    "distributed.peers",
    "distributed.placement",
    "evaluation",
    "loss",
    "masks",
    "methods.bayesian",
    "methods.combined",
    "methods.drawn",
    "methods.efficient",
    "methods.games",
    "methods.longtail",
    "methods.method",
    "methods.sam",
    "methods.stale",
    "methods.trajectory",
    "methods.wrappers",
    "methods.written",
    "model.capture",
    "model.compatibility",
    "model.displacement",
    "model.eval_mode",
    "model.gradients",
    "model.inputs",
    "model.module_state",
    "model.oracle",
    "model.parameters",
    "model.passes",
    "model.rng",
    "model.running_statistics",
    "model.saved_tensors",
    "objectives.bounds",
    "objectives.classes",
    "objectives.forgetting",
    "objectives.objective",
    "objectives.positions",
    "objectives.scores",
    "optim.copies",
    "optim.decoupled",
    "optim.lookahead",
    "optim.preview",
    "optim.swad",
    "optim.wrapper",
    "oracle",
    "perturbations",
    "proximal",
    "schedules",
    "seeded",
    "state",
    "statistics",
    "targets",
    "validation",
    "vector",
]


def test_the_public_names_are_these():
    assert {name for name in bisam.__all__ if not isinstance(getattr(bisam, name), ModuleType)} == NAMES
    assert set(bisam.__all__) <= set(dir(bisam))
    assert (bisam.perturbations, bisam.masks, bisam.schedules) == (perturbations, masks, schedules)
    assert (bisam.objectives, bisam.proximal) == (objectives, proximal)


def test_type_checkers_read_the_names_that_are_loaded_when_they_are_used():
    (block,) = (node for node in ast.parse(Path(bisam.__file__).read_text()).body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    for_checkers = {alias.asname: node.module for node in imports for alias in node.names}
    assert {*for_checkers} == {*bisam.__all__}
    for name, module in for_checkers.items():
        assert getattr(bisam, name) is getattr(importlib.import_module(module), name)


SAM = "SAM(0.05)"


QUERY = "*, at=None, grad=True, track=None, wrt=None, last=False"


@pytest.mark.parametrize(
    ("function", "signature"),
    [
        (
            bisam.SharpnessAware,
            "(model, method, loss, forward=None, *, scaler=None, same_noise=False, scope=None, in_eval_mode=False, "
            "stats=False, accumulation=1, overlap=False)",
        ),
        (bisam.ERM, "()"),
        (bisam.SAM, "(perturb=L2(rho=0.05), ascent=None, descent=None)"),
        (bisam.BiSAM, "(rho=0.05, bound=NegLog(mu=1.0, ignore_index=-100), descent=None)"),
        (bisam.ASAM, "(rho, eta=0.0, ascent=None)"),
        (bisam.ABiSAM, "(rho, bound=NegLog(mu=1.0, ignore_index=-100), eta=0.0)"),
        (bisam.MSAM, f"(m, method={SAM}, separate=False)"),
        (bisam.LowerBound, "(phi, mu, *, ignore_index=-100)"),
        (bisam.NegLog, "(mu=1.0, *, ignore_index=-100)"),
        (bisam.Tanh, "(mu=10.0, alpha=0.1, *, ignore_index=-100)"),
        (bisam.Binary, "(bound=NegLog(mu=1.0, ignore_index=-100))"),
        (bisam.WrongClasses, "(bound=NegLog(mu=1.0, ignore_index=-100), margin=None)"),
        (bisam.OBF, "(gamma=1.0, lam=None, sigmoid=False, *, ignore_index=-100)"),
        (schedules.FlipRate, "(target, start=0.05, gain=0.05, low=0.0001, high=10.0)"),
        (bisam.cross_entropy, "(outputs, targets)"),
        (perturbations.L2, "(rho)"),
        (perturbations.Adaptive, "(rho, eta=0.0, where=None)"),
        (bisam.Vector, "(tensors, holes=frozenset(), layout=WHOLE)"),
        (
            bisam.Evaluation,
            "(losses, grad=None, outputs=None, value=None, count=None, targets=None, objective=None, decoupled=None, "
            "versions=None)",
        ),
        (
            bisam.ModelOracle,
            "(model, loss, forward=None, *, scaler=None, same_noise=False, scope=None, step=0, state=None, "
            "overlap=False, findings=None)",
        ),
        (bisam.Oracle.query, f"(self, batch, objective=None, {QUERY})"),
        (bisam.ModelOracle.query, f"(self, batch, objective=None, {QUERY})"),
    ],
)
def test_signatures(function, signature):
    found = inspect.signature(function)
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in found.parameters.values()]
    assert str(found.replace(parameters=bare, return_annotation=inspect.Signature.empty)) == signature


@pytest.mark.parametrize("public", PUBLIC, ids=lambda public: getattr(public, "__name__", str(public)))
def test_everything_public_is_documented_and_typed(public):
    assert inspect.getdoc(public)
    members = vars(public).items() if isinstance(public, type) else ()
    for name, member in members:
        if not name.startswith("_") and (inspect.isfunction(member) or isinstance(member, property)):
            assert inspect.getdoc(getattr(public, name)), name
    for parameter in inspect.signature(public).parameters.values():
        assert parameter.annotation is not inspect.Parameter.empty, parameter


def test_every_module_and_public_function_of_the_core_is_documented():
    for name in CORE:
        module = importlib.import_module(f"bisam.{name}")
        assert module.__doc__
        for member, value in vars(module).items():
            ours = getattr(value, "__module__", "") == module.__name__ and callable(value)
            if ours and not member.startswith("_"):
                assert inspect.getdoc(value), f"{name}.{member}"


def test_the_core_is_these_files():
    root = Path(bisam.__file__).parent
    files = {file.relative_to(root) for file in root.rglob("*.py") if file.name not in ("__init__.py", "__main__.py")}
    roofs = {"analysis", "integrations", "experiments"}
    assert {".".join(f.with_suffix("").parts) for f in files if f.parts[0] not in roofs} == set(CORE)


@pytest.mark.parametrize(
    "method", [bisam.ERM(), bisam.SAM(), bisam.BiSAM(), bisam.MSAM(4), bisam.NegLog(), bisam.Tanh(), bisam.Binary()]
)
def test_methods_and_bounds_are_frozen_values(method):
    assert copy.deepcopy(method) == method
    assert hash(copy.deepcopy(method)) == hash(method)
    with pytest.raises(AttributeError):
        method.mu = 3.0


def test_defaults_are_those_of_the_papers():
    assert bisam.BiSAM() == bisam.SAM(perturbations.L2(0.05), ascent=bisam.NegLog(1.0))
    assert bisam.ASAM(0.5) == bisam.SAM(perturbations.Adaptive(0.5))
    assert bisam.ABiSAM(0.5) == bisam.SAM(perturbations.Adaptive(0.5), ascent=bisam.NegLog(1.0))
    assert bisam.NegLog(2.0) != bisam.NegLog() != bisam.Tanh()


def test_an_import_loads_no_torch_and_a_name_is_loaded_when_it_is_used():
    code = "import sys, bisam; assert not {'torch', 'numpy'} & {*sys.modules}; bisam.SAM; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    with pytest.raises(AttributeError, match="no attribute 'Sam'"):
        _ = bisam.Sam


def test_the_names_load_torch_and_no_extra():
    code = "import sys, torch; before = set(sys.modules); from bisam import *; print(*(set(sys.modules) - before))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout
    roots = {name.split(".")[0] for name in loaded.split()}
    assert "bisam" in roots
    extras = {
        "lightning_fabric",
        "lightning",
        "sklearn",
        "scipy",
        "matplotlib",
        "rich",
        "tyro",
        "torchvision",
        "filelock",
    }
    assert not roots & extras
    assert not {name for name in loaded.split() if name.startswith(("bisam.experiments", "bisam.integrations"))}
    assert "numpy" not in roots


def code(node: ast.AST, source: list[str]) -> int:
    """Lines of code of a class or function: no docstrings, comments and blanks, and no settings and their checks."""
    skip = set()
    for part in ast.walk(node):
        if isinstance(part, ast.ClassDef | ast.FunctionDef) and ast.get_docstring(part) is not None:
            skip |= set(range(part.body[0].lineno, part.body[0].end_lineno + 1))
        if isinstance(part, ast.AnnAssign) and part in getattr(node, "body", ()):
            skip |= set(range(part.lineno, part.end_lineno + 1))
        if isinstance(part, ast.FunctionDef) and part.name == "__post_init__":
            skip |= set(range(part.lineno, part.end_lineno + 1))
    lines = [source[i - 1].strip() for i in range(node.lineno, node.end_lineno + 1) if i not in skip]
    return sum(bool(line) and not line.startswith("#") for line in lines)


@pytest.mark.parametrize("path", sorted(Path(bisam.methods.__file__).parent.glob("*.py")), ids=lambda path: path.name)
def test_a_method_is_short(path):
    text = path.read_text()
    classes = [node for node in ast.parse(text).body if isinstance(node, ast.ClassDef | ast.FunctionDef)]
    lengths = {node.name: code(node, text.splitlines()) for node in classes}
    assert {name: lines for name, lines in lengths.items() if lines > 16} == {}  # 15, and the line that names it
