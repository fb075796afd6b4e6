"""LoRA: noise on merged weights, and perturbations of adapters and of other parts of a model."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from bisam import SAM, BiSAM, FilterNoise, Only, SharpnessAware, Vector, ZerothOrder, cross_entropy
from bisam.perturbations import NormLayers
from bisam.schedules import Cosine
from bisam.seeded import Seeded
from tests.support import references
from tests.support.cases import bits, parameters
from tests.support.memory import Peak

pytest.importorskip("peft")

import peft

from bisam.integrations.peft import FlatLoRA


def adapted(width: int = 6) -> nn.Module:
    """LoRA around the linear layers of a small network, with B that is not 0."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, width), nn.LayerNorm(width), nn.Tanh(), nn.Linear(width, 3, bias=False)).double()
    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=["0", "3"], init_lora_weights=False)
    return peft.get_peft_model(model, config).double().train()


def batch(n: int = 8):
    torch.manual_seed(1)
    return torch.randn(n, 5).double(), torch.randint(3, (n,))


def by_hand(model: nn.Module, sigma: float, seed: int, number: int) -> list[list[float]]:
    """The gradients of the adapters, where the noise of each layer is added to its frozen weights beforehand."""
    moved = copy.deepcopy(model)
    layers = [layer for layer in moved.modules() if hasattr(layer, "base_layer")]
    for i, layer in enumerate(layers):
        w = layer.base_layer.weight
        merged = w + 4.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight  # lora_alpha / r
        z = references.drawn_like(w, references.generator_of(seed, number, i))
        rows = [sigma / len(row) ** 0.5 * row.norm() * noise for row, noise in zip(merged, z, strict=True)]
        w.data += torch.stack(rows).detach()
    return grads(moved)


def grads(model: nn.Module) -> list[list[float]]:
    model.zero_grad()
    x, y = batch()
    cross_entropy(model(x), y).mean().backward()
    return [p.grad.tolist() for p in model.parameters() if p.requires_grad]


def test_a_pass_is_that_with_noise_on_the_merged_weights():
    model = adapted()
    frozen = copy.deepcopy(model)
    noise = FlatLoRA(model, sigma=Cosine(0.0, 0.5, steps=3), seed=7)
    for number, sigma in enumerate((0.0, 0.125, 0.375, 0.5)):
        torch.testing.assert_close(grads(model), by_hand(frozen, sigma, 7, number), rtol=0, atol=1e-12)
    assert noise.passes == 4
    assert parameters(model) == parameters(frozen)  # no weight has moved


def test_no_noise_in_eval_mode_and_after_removal():
    model, (x, _) = adapted(), batch()
    expected = model.eval()(x)
    noise = FlatLoRA(model, 0.5)
    assert torch.equal(model(x), expected)
    assert not torch.equal(model.train()(x), expected)
    with model.disable_adapter():
        assert torch.equal(model(x), model.eval()(x))
    model.train()
    noise.remove()
    assert torch.equal(model(x), expected)
    assert "forward" not in vars(noise._layers[0].base_layer)


def test_a_repeated_pass_of_checkpointing_has_the_same_noise():
    model, (x, y) = adapted(), batch()
    noise = FlatLoRA(model, 0.5)
    plain = grads(model)
    noise.passes = 0
    model.zero_grad()
    cross_entropy(checkpoint(model, x, use_reentrant=False), y).mean().backward()
    assert noise.passes == 1
    assert [p.grad.tolist() for p in model.parameters() if p.requires_grad] == plain
    noise.passes, inner = 0, model.base_model.model
    model.zero_grad()
    inner[3].forward = lambda x, forward=inner[3].forward: checkpoint(forward, x, use_reentrant=False)
    cross_entropy(model(x), y).mean().backward()
    assert [p.grad.tolist() for p in model.parameters() if p.requires_grad] == plain


def test_a_pass_without_gradients_before_a_repeated_one_leaves_its_noise():
    """As that of a reference model, between the pass and the backward pass of the policy."""
    model, (x, y) = adapted(), batch()
    noise, inner = FlatLoRA(model, 0.5), model.base_model.model
    plain = grads(model)
    noise.passes = 0
    model.zero_grad()
    inner[3].forward = lambda x, forward=inner[3].forward: checkpoint(forward, x, use_reentrant=False)
    loss = cross_entropy(model(x), y).mean()
    with torch.no_grad(), model.disable_adapter():
        model(x)
    loss.backward()
    assert [p.grad.tolist() for p in model.parameters() if p.requires_grad] == plain


def test_a_layer_without_the_active_adapter_has_noise_on_its_own_weights():
    model, (x, _) = adapted(), batch()
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["3"]))
    model.set_adapter("other")
    noise, layer = FlatLoRA(model, 0.5, seed=7), model.base_model.model[0]
    model(x)
    weight = layer.base_layer.weight
    scale = torch.linalg.vector_norm(weight, dim=1, keepdim=True) / weight.shape[1] ** 0.5
    e = Seeded([(7, 0, 0)], scales=[0.5 * scale]).vector(Vector([weight.data])).tensors[0]
    torch.testing.assert_close(layer(x), nn.functional.linear(x, weight + e, layer.base_layer.bias))
    noise.remove()


def test_a_bias_is_trained_on_one_example_too():
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(4, 3)), peft.LoraConfig(r=2, target_modules=["0"], bias="lora_only")
    ).train()
    FlatLoRA(model, 0.1)
    model(torch.randn(4)).sum().backward()
    assert model.base_model.model[0].base_layer.bias.grad.tolist() == [1, 1, 1]


def test_weights_that_are_trained_later_and_a_second_noise_are_refused():
    model, (x, _) = adapted(), batch()
    noise, base = FlatLoRA(model, 0.5), model.base_model.model[0].base_layer
    with pytest.raises(ValueError, match=r"remove\(\) first"):
        FlatLoRA(model, 0.1)
    base.weight.requires_grad_()
    with pytest.raises(ValueError, match="FilterNoise"):  # they would have no gradient
        model(x)
    base.weight.requires_grad_(False)
    noise.remove()
    FlatLoRA(model, 0.1).remove()
    base.forward = hooked = lambda x: nn.Linear.forward(base, x)
    FlatLoRA(model, 0.1).remove()
    assert base.forward is hooked


def test_the_noise_of_one_layer_at_a_time_is_in_memory():
    model = peft.get_peft_model(
        nn.Sequential(*[nn.Linear(200, 200, bias=False) for _ in range(8)]),
        peft.LoraConfig(r=2, target_modules=[str(i) for i in range(8)]),
    ).train()
    FlatLoRA(model)
    with Peak(40_000) as peak:
        cross_entropy(model(torch.randn(4, 200)), torch.randint(200, (4,))).mean().backward()
    assert peak.peak < 5  # layers: noise, scaled noise, their sum


def test_it_goes_with_a_sharpness_aware_loss():
    model = adapted()
    before = parameters(model)
    noise, sharp = FlatLoRA(model, 0.1), SharpnessAware(model, BiSAM(0.05), cross_entropy)
    sharp(*batch()).backward()
    assert parameters(model) == before
    assert noise.passes >= 2


def test_models_without_frozen_lora_layers_are_refused():
    with pytest.raises(ValueError, match="get_peft_model"):
        FlatLoRA(nn.Linear(2, 2))
    model = adapted()
    model.base_model.model[0].base_layer.weight.requires_grad_()
    with pytest.raises(ValueError, match="FilterNoise"):
        FlatLoRA(model)
    with pytest.raises(ValueError, match="sigma"):
        FlatLoRA(adapted(), -1.0)
    with pytest.raises(TypeError, match="model must be a PEFT model"):
        FlatLoRA("model")


# Perturbations of a part of a model, in one line each.

PARTS = {
    "adapters": (SAM(0.1), lambda name: "lora_" in name),
    "one adapter": (SAM(Only(lambda name, p: "lora_B" in name, 0.1)), lambda name: "lora_B" in name),
    "zeroth order": (ZerothOrder(0.1), lambda name: "lora_" in name),
    "noise": (FilterNoise(0.1), lambda name: "lora_" in name),
}


@pytest.mark.parametrize("part", PARTS)
def test_frozen_weights_are_neither_displaced_nor_copied(part):
    method, inside = PARTS[part]
    model = adapted(200)
    sharp, before, seen = SharpnessAware(model, method, cross_entropy), parameters(model), []
    sharp(*batch())
    model.register_forward_pre_hook(lambda *_: seen.append(parameters(model)))
    with Peak(400) as peak:  # the linear layers have 1,000 and 600 frozen entries, their adapters 1,216 in all
        sharp(*batch())
    moved = {name for name in before if seen[-1][name] != before[name]}
    assert moved == {name for name in before if inside(name)}
    assert parameters(model) == before
    assert peak.peak < 100


HEADS = {
    "last layer": Only(lambda name, p: name.startswith("3."), 0.1),
    "norm layers": NormLayers(0.1),
}


@pytest.mark.parametrize("part", HEADS)
def test_a_part_of_a_model_is_displaced_and_copied_alone(part):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 200), nn.LayerNorm(200), nn.Tanh(), nn.Linear(200, 3)).double()
    sharp, seen = SharpnessAware(model, SAM(HEADS[part]), cross_entropy), []
    model.register_forward_pre_hook(lambda *_: seen.append({name: bits(p) for name, p in model.named_parameters()}))
    sharp(*batch()).backward()
    moved = {name for name, value in seen[-1].items() if value != seen[0][name]}
    assert moved == ({"3.weight", "3.bias"} if part == "last layer" else {"1.weight", "1.bias"})
    assert all(p.grad is not None for p in model.parameters())  # all are trained
