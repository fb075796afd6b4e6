"""A radius stands for a perturbation wherever one is taken, and normalisation layers are found."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import fields, is_dataclass

import pytest
import torch
from torch import Tensor, nn

import bisam
from bisam import (
    L2,
    MSAM,
    SAM,
    SAMON,
    Adaptive,
    BiSAM,
    ModelOracle,
    NegLog,
    Only,
    SharpnessAware,
    Vector,
    cross_entropy,
    masks,
    perturbations,
)
from bisam.masks import RandomMask
from bisam.perturbations import Friendly, PerGroup, is_radius, needed
from bisam.schedules import Constant, Cosine, FlipRate, Warmup
from tests.support import cases
from tests.support.cases import bits
from tests.support.doubles import Quadratic
from tests.support.runs import close, grads_of, twins

CLASSES = ("SAM", "MultiStepSAM", "GSAM", "WSAM", "CRSAM", "XSAM", "FunctionalSAM", "LookSAM", "SSAMF", "MomentumSAM")
FUNCTIONS = ("BiSAM", "GBiSAM", "FSAM", "VaSSO", "ZSharp", "SAMON", "FisherSAM", "SSAMD", "EBiSAM")
AROUND = [getattr(perturbations, n) for n in ("Friendly", "Smoothed", "ZScore", "NormLayers")] + [
    getattr(masks, n) for n in ("RandomMask", "FisherMask", "DropGrow")
]


def ahead(gradient, oracle):
    return gradient * -0.1


def named(name, parameter):
    return "weight" in name


MAKE = {
    **{name: getattr(bisam, name) for name in (*CLASSES, *FUNCTIONS)},
    **{kind.__name__: kind for kind in AROUND},
    "Only": lambda perturb: Only(named, perturb),
    "SAMPa": lambda perturb: bisam.SAMPa(perturb, ahead=ahead),
    "AESAM": lambda perturb: bisam.AESAM(perturb, steps=10),
}


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
@pytest.mark.parametrize("radius", [0.3, 1, Cosine(0.3, 0.1, steps=5), Warmup(0.2, steps=3), Constant(0.1)], ids=repr)
def test_a_radius_is_the_ball(make, radius):
    assert make(radius) == make(L2(radius))


def parts(value):
    """A value and all that its fields hold."""
    inner = [getattr(value, field.name) for field in fields(value)] if is_dataclass(value) else []
    return [value, *(part for one in inner for part in parts(one))]


@pytest.mark.parametrize("make", [MAKE[name] for name in FUNCTIONS], ids=FUNCTIONS)
def test_a_named_method_takes_any_perturbation(make):
    made = make(Adaptive(2.0))
    assert Adaptive(2.0) in parts(made)
    assert L2(2.0) not in parts(made)


def test_esam_keeps_its_mask():
    assert bisam.ESAM(0.1) == bisam.ESAM(RandomMask(L2(0.1), beta=0.6))
    assert bisam.ESAM(L2(0.1)).perturb == L2(0.1)


def test_a_function_of_the_step_is_a_radius_and_one_of_two_arguments_a_perturbation():
    def radius(step):
        return 0.1 if step < 10 else 0.05

    def shortest(gradient, oracle):
        return gradient * 0.0

    assert SAM(radius) == SAM(L2(radius))
    assert SAM(shortest).perturb is shortest
    assert [is_radius(v) for v in (0.1, 2, radius, shortest, L2(0.1), L2, "0.1", None)] == [True] * 3 + [False] * 5


def test_a_bad_radius_is_refused_as_by_the_ball():
    for bad in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="rho must be non-negative and finite"):
            SAM(bad)


def test_a_number_climbs_as_the_ball_does():
    batch = (torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.double),)
    for bound in (SAM(0.5), BiSAM(0.5, bound=None)):
        oracle = Quadratic(2.0, 3.0)
        e = bound.climb(oracle, batch)
        torch.testing.assert_close(e.norm(), torch.tensor(0.5, dtype=torch.double), rtol=1e-12, atol=0)
    assert BiSAM(0.5).ascent == NegLog()


def test_a_subnet_is_no_norm_layer():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.subnet, self.bn1, self.normal = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
            self.layers = nn.ModuleList([nn.LayerNorm(2)])

        def forward(self, x):
            return self.normal(self.layers[0](self.bn1(self.subnet(x))))

    oracle = ModelOracle(Model(), cross_entropy)
    e = SAMON(0.1).climb(oracle, (torch.randn(4, 2), torch.zeros(4, dtype=torch.long)))
    moved = {name for name, t in zip(oracle.names, e, strict=True) if t.abs().max() > 0}
    assert moved <= {"bn1.weight", "bn1.bias", "layers.0.weight", "layers.0.bias"}
    assert "bn1.weight" in moved
    assert "layers.0.weight" in moved


# Only.


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(6, 5).double(), nn.Linear(5, cases.CLASSES).double()

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)))


def test_only_is_sam_of_a_model_whose_other_parameters_are_frozen():
    """As SAM of the ports on an optimizer that holds the head."""
    model, twin = twins(Block)
    grads = grads_of(SharpnessAware(model, SAM(Only(in_head, L2(0.5))), cross_entropy)(*cases.batch()), model)
    twin.body.requires_grad_(False)
    SharpnessAware(twin, SAM(L2(0.5)), cross_entropy)(*cases.batch()).backward()
    assert [bits(g) for g in grads[2:]] == [bits(p.grad) for p in twin.head.parameters()]
    assert all(g.any() for g in grads[:2])  # the others are trained too


def in_head(name, parameter):
    return name.startswith("head")


def test_only_with_all_selected_is_the_inner_perturbation():
    for inner in (L2(0.5), Adaptive(0.5, eta=0.1), Friendly(L2(0.3)), RandomMask(L2(0.1), beta=0.5)):
        runs = []
        for perturb in (inner, Only(lambda name, p: True, inner)):
            torch.manual_seed(0)
            model = Block()
            runs.append(cases.train(SharpnessAware(model, SAM(perturb), cross_entropy), model))
        assert runs[0] == runs[1]


def test_only_is_the_norm_layers_where_these_are_selected():
    runs = []
    for perturb in (perturbations.NormLayers(0.3), Only(cases.is_norm, 0.3)):
        torch.manual_seed(0)
        model = cases.convnet()
        runs.append(cases.train(SharpnessAware(model, SAM(perturb), cross_entropy), model))
    assert runs[0] == runs[1]


@pytest.mark.parametrize(
    "perturb",
    [lambda perturb: Only(in_head, perturb), lambda perturb: perturbations.NormLayers(perturb)],
    ids=["Only", "NormLayers"],
)
def test_no_other_parameter_is_displaced_whatever_the_inner_perturbation_does(perturb):
    model = nn.ModuleDict({"head": nn.LayerNorm(3), "body": nn.Linear(3, 3)})

    def everywhere(gradient, oracle):
        return gradient * 0.0 + 1.0

    gradient = Vector([torch.full_like(p, torch.inf) for p in model.parameters()])
    e = perturb(everywhere)(Vector([torch.ones_like(p) for p in model.parameters()]), ModelOracle(model, cross_entropy))
    assert [t.flatten()[0].item() for t in e] == [1.0, 1.0, 0.0, 0.0]
    e = perturb(L2(1.0))(gradient, ModelOracle(model, cross_entropy))
    assert [t.isfinite().all().item() for t in e] == [False, False, True, True]


def test_where_is_asked_for_each_parameter_in_each_step():
    """With the parameter itself, so that it may be looked up in an optimizer."""
    model = Block()
    optimizer = torch.optim.SGD(model.head.parameters(), lr=0.1)
    held, asked = {id(p) for p in optimizer.param_groups[0]["params"]}, []

    def where(name, parameter):
        asked.append(name)
        return id(parameter) in held

    sharp = SharpnessAware(model, bisam.RSAM(0.1, SAM(Only(where, L2(0.5)))), cross_entropy)
    for _ in range(2):
        sharp(*cases.batch())
    assert asked == [name for name, _ in model.named_parameters()] * 2


def test_only_names_parameters_if_it_selects_none():
    sharp = SharpnessAware(Block(), SAM(Only(lambda name, p: name.startswith("top"), L2(0.5))), cross_entropy)
    with pytest.raises(ValueError, match=r"none of the 4 .* \(body.weight, body.bias, head.weight, \.\.\.\)"):
        sharp(*cases.batch())


@pytest.mark.parametrize("where", ["head", None, {"head"}, Block])
def test_only_takes_a_function(where):
    with pytest.raises(TypeError, match="where"):
        Only(where, L2(0.1))


# A perturbation for each group.


def by_hand(gradient: Vector, radii: Sequence[float], *, together: bool) -> list[Tensor]:
    """Returns the groups of a linear layer: its weights, and its bias."""
    norm = torch.cat([t.flatten() for t in gradient]).norm()
    return [rho * t / (norm if together else t.norm()) for rho, t in zip(radii, gradient, strict=True)]


@pytest.mark.parametrize("norm", ["group", "all"])
def test_parameter_groups_of_an_optimizer_have_their_own_radius(norm):
    model, batch = cases.linear(), (cases.POINTS, cases.LABELS)
    groups = [{"params": [model.bias], "rho": 0.5}, {"params": [model.weight], "rho": 0.1}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    oracle = ModelOracle(model, cross_entropy)
    g = oracle.query(batch).gradient
    perturb = PerGroup.of(optimizer, norm=norm)
    close(perturb(g, oracle).tensors, by_hand(g, (0.1, 0.5), together=norm == "all"), 1e-10)
    optimizer.param_groups[1]["rho"] = 0.3
    close(perturb(g, oracle).tensors, by_hand(g, (0.3, 0.5), together=norm == "all"), 1e-10)


def test_equal_groups_with_one_norm_are_one_perturbation():
    runs = []
    for make in (lambda o: L2(0.3), lambda o: PerGroup.of(o)):
        torch.manual_seed(0)
        model = cases.convnet()
        params = [{"params": [p], "rho": 0.3} for p in model.parameters()]
        sharp = SharpnessAware(model, SAM(make(torch.optim.SGD(params, lr=0.1))), cross_entropy)
        runs.append(cases.train(sharp, model))
    assert runs[0] == runs[1]


def test_only_the_gradients_of_the_groups_are_asked_for():
    oracle = ModelOracle(cases.linear(), cross_entropy)
    for norm in ("group", "all"):
        head = PerGroup([(lambda name, p: name == "bias", 0.1)], norm=norm)
        assert needed(head, oracle) == (False, True)
        oracle.state.clear()
    assert needed(PerGroup([(cases.is_weight, Friendly(L2(0.1)))]), oracle) == (True, False)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: PerGroup([]), ValueError, r"groups must be pairs .* got \[\]"),
        (lambda: PerGroup(None), ValueError, "groups must be pairs .* got None"),
        (lambda: PerGroup([L2(0.1)]), ValueError, r"groups must be pairs .* got \[L2"),
        (lambda: PerGroup([(cases.is_weight, 0.1, 0.2)]), ValueError, r"a group must be a pair .*0\.2"),
        (lambda: PerGroup([(3, 0.1)]), TypeError, "where must be a function"),
        (lambda: Adaptive(0.1, where=3), TypeError, "where must be a function .* got 3"),
        (lambda: PerGroup([(cases.is_weight, "0.1")]), TypeError, "perturb must be a radius"),
        (lambda: PerGroup([(cases.is_weight, -0.1)]), ValueError, "rho must be .*-0.1"),
        (lambda: PerGroup([(cases.is_weight, FlipRate(0.1))]), ValueError, "FlipRate"),
        (lambda: PerGroup([(cases.is_weight, Friendly(Adaptive(FlipRate(0.1))))]), ValueError, "FlipRate"),
        (lambda: PerGroup([(cases.is_weight, 0.1)], norm="max"), ValueError, "'max'"),
        (lambda: PerGroup.of(3), TypeError, "parameter groups .* got 3"),
        (lambda: PerGroup.of(torch.optim.SGD([torch.zeros(1)], lr=0.1)), ValueError, "group 0 of the SGD has no rad"),
    ],
)
def test_wrong_groups_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_group_without_parameters_is_refused():
    sharp = SharpnessAware(
        cases.linear(), SAM(PerGroup([(lambda n, p: True, 0.1), (cases.is_weight, 0.2)])), cross_entropy
    )
    with pytest.raises(ValueError, match="group 1 of PerGroup has none of the 2 parameters"):
        sharp(cases.POINTS, cases.LABELS)


def test_an_optimizer_of_another_model_is_refused():
    model = cases.linear()
    optimizer = torch.optim.SGD([{"params": cases.linear().parameters(), "rho": 0.1}], lr=0.1)
    with pytest.raises(ValueError, match="an optimizer that holds none of the 2 parameters"):
        SharpnessAware(model, SAM(PerGroup.of(optimizer)), cross_entropy)(cases.POINTS, cases.LABELS)


def test_a_copy_of_a_loss_has_the_groups_of_its_own_model():
    model = cases.linear()
    optimizer = torch.optim.SGD([{"params": model.parameters(), "rho": 0.1}], lr=0.1)
    sharp = SharpnessAware(model, SAM(PerGroup.of(optimizer)), cross_entropy)
    assert copy.deepcopy(sharp)(cases.POINTS, cases.LABELS) == sharp(cases.POINTS, cases.LABELS)


def test_the_memory_of_a_group_is_a_memory():
    with pytest.raises(ValueError, match="Friendly"):
        MSAM(4, SAM(PerGroup([(cases.is_weight, Friendly(L2(0.1)))])))
