"""Recipes: their text, the names of their folders, and what they refuse."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from bisam import ERM, KSAM, RSAM, EBiSAM
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs.folder import Run
from bisam.experiments.training.train import train

SHORT = Recipe(method="bisam_log", noise=0.4, rho=0.4, epochs=3, batch_size=256)


def test_a_recipe_survives_its_text():
    assert Recipe.from_dict(json.loads(json.dumps(SHORT.to_dict()))) == SHORT


def test_the_folder_name_depends_on_every_field_but_the_seed():
    one = replace(SHORT, method="abisam_tanh")  # which takes them all
    assert replace(one, seed=7).slug == one.slug
    changed: dict[str, Any] = {
        "compile_mode": "max-autotune-no-cudagraphs",
        "method": "abisam_log",
        "model": "other",
        "dataset": "other",
        "weights": "pretrained",
    }
    changed |= {
        "imbalance": 10.0,
        "optimizer": "adamw",
        "schedule": "linear",
        "warmup": 3,
        "precision": "bf16",
        "measured": "ascents",
    }
    one = replace(one, schedule="constant", weights="file.pt")
    assert replace(one, epochs=None, steps=7).slug != one.slug
    for field in fields(Recipe):
        if field.name not in ("seed", "version", "steps"):
            before = getattr(one, field.name)
            value = not before if isinstance(before, bool) else 7 if isinstance(before, int) else 0.25
            value = 7 if field.name in ("limit", "frozen", "train_examples", "patience", "randaugment") else value
            other = replace(one, **{field.name: changed.get(field.name, value)})
            assert other.slug != one.slug, field.name


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0),
        ("batch_size", 0),
        ("noise", 1.0),
        ("noise", -0.1),
        ("rho", -1.0),
        ("rho", float("nan")),
        ("mu", 0.0),
        ("alpha", float("inf")),
        ("learning_rate", 0.0),
        ("momentum", 1.0),
        ("weight_decay", -1e-4),
        ("label_smoothing", 1.0),
        ("seed", -1),
    ],
)
def test_a_recipe_refuses_what_is_out_of_range(field, value):
    with pytest.raises(ValueError, match=f"{field} must be"):
        Recipe(**{field: value})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "adam"}, "unknown method 'adam', did you mean 'asam'"),
        ({"method": "SAM"}, r"write a call, such as SAM\(\)"),
        ({"method": "SAM(L2(0.1)"}, "is no expression"),
        ({"method": "SAM(L3(0.1))"}, "unknown name 'L3'"),
        ({"method": "SAM(L2(-1))"}, r"SAM\(L2\(-1\)\): rho must be non-negative"),
        ({"method": "KSAM(0)"}, "k must be at least 1, got 0"),
        ({"method": "NegLog(1).mu()"}, "neither a number nor a call"),
        ({"method": "SAM(L2(rho))"}, "unknown name 'rho'"),
        ({"method": "SAM(NegLog())"}, "perturb must be a radius or a perturbation"),
        ({"method": "KSAM(32, ERM)"}, r"ERM is no value: write a call, such as ERM\(...\)"),
        ({"method": "SAM(L2(1 / 0))"}, "division by zero"),
        ({"method": "SAM(L2('x' * 10))"}, "'x'\" is no number|is no number"),
        ({"method": "SAM(**L2(0.1))"}, "must name each argument once"),
        ({"method": "SAM(perturb=L2(1), perturb=L2(2))"}, "repeated|once"),
        ({"method": "SAM(L2(" + "-" * 2000 + "1))"}, "at most 1000 characters"),
        (
            {"method": "SAM(rho=0.1)"},
            r"^SAM\(rho=0.1\): SAM has no argument 'rho': it takes perturb, ascent, descent; the "
            r"radius is its perturb, as in SAM\(perturb=0.1\)$",
        ),
        ({"method": "KSAM(16, size=3)"}, "KSAM has no argument 'size': it takes k, method$"),
        ({"method": "ERM(x=1)"}, "ERM has no argument 'x': it takes none$"),
        ({"method": "SAM(*[1])"}, "neither a number"),
        ({"method": "sgd", "rho": 0.1}, "rho is no setting of the method sgd"),
        ({"method": "sam", "mu": 1.0}, "mu is no setting of the method sam: it takes rho"),
        ({"method": "SAM(L2(0.1))", "rho": 0.1}, "written inside"),
    ],
)
def test_a_recipe_refuses_what_is_no_method(settings, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**settings)


def test_a_recipe_takes_any_nest_as_an_expression(tmp_path):
    recipe = replace(SHORT, method="KSAM(32, RSAM(0.01, EBiSAM(0.05 + 2 * 0.1)))", rho=None, epochs=1)
    assert recipe.build_method() == KSAM(32, RSAM(0.01, EBiSAM(0.25)))
    assert recipe.slug.startswith("KSAM-32-RSAM-0.01-EBiSAM-0.05-2-0.1-noise-0.4-")
    result = train(Run.under(tmp_path, recipe))
    assert 0 < result["gradients_per_step"] < 1
    assert result["forwards_per_step"] > 1


def test_an_expression_knows_the_run():
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    follow = Recipe(method="gsam", rho=0.2).build_method(optimizer=optimizer).perturb.rho
    assert (follow.optimizer, follow.high, follow.low) == (optimizer, 0.2, 0.1)
    assert Recipe(method="xsam").build_method(epoch=17).every == 17
    assert Recipe(method="ae_sam").build_method(steps=510).steps == 510
    assert Recipe(method="During(SAM(), start=2000, stop=steps)").method  # steps are not known yet


def test_the_authors_flags_keep_their_own_defaults():
    """Their script passes mu = 1 to both bounds; here tanh keeps the paper's 10 unless told otherwise."""
    tanh = Recipe(method="bisam_tanh").build_method()
    assert (tanh.ascent.mu, tanh.ascent.alpha) == (10.0, 0.1)
    assert Recipe(method="bisam_tanh", mu=1.0).build_method().ascent.mu == 1.0
    assert Recipe(method="bisam_log").build_method().ascent.mu == 1.0
    assert Recipe(method="sgd").build_method() == ERM()


@pytest.mark.parametrize("name", ["rho", "noise", "learning_rate", "clip"])
def test_a_whole_number_is_the_same_recipe_as_the_float(name):
    value = 0 if name == "noise" else 1
    whole, point = (replace(SHORT, **{name: number}) for number in (value, float(value)))
    assert whole == point
    assert whole.slug == point.slug
