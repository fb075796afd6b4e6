"""Frozen layers: which weights they are, how they run, and that what they return is enough for the layers above."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("timm")

import transformers

from bisam import SAM, SharpnessAware, cross_entropy
from bisam.experiments.models.build import build
from bisam.experiments.models.frozen import freeze, hidden_states, skip_frozen, to_train, with_frozen, without_frozen
from bisam.experiments.models.logits import HIDDEN, Logits

LAYERS = 3
SIZES = {"hidden_size": 16, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "intermediate_size": 32}
CNN = "timm:test_efficientnet"


def bert(layers: int | None = None) -> Logits:
    config = transformers.BertConfig(vocab_size=30, max_position_embeddings=12, num_labels=3, **SIZES)
    model = Logits(transformers.AutoModelForSequenceClassification.from_config(config)).double().train()
    if layers is not None:
        freeze(model, "hf:bert", layers)
    return model


def sentences() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Five sentences of different lengths, padded on the right."""
    lengths = torch.tensor([7, 3, 5, 2, 7])
    mask = (torch.arange(7) < lengths[:, None]).long()
    tokens = torch.randint(1, 30, (5, 7)) * mask
    return {"input_ids": tokens, "attention_mask": mask, "token_type_ids": torch.zeros_like(tokens)}, lengths % 3


def trained(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("layers", range(LAYERS + 1))
def test_the_embeddings_and_the_lower_layers_of_a_text_model_are_frozen(layers):
    model = bert(layers)
    below = ("network.bert.embeddings", *(f"network.bert.encoder.layer.{i}." for i in range(layers)))
    every = {name for name, _ in model.named_parameters()}
    assert trained(model) == {name for name in every if not name.startswith(below)}


def test_the_stem_and_the_lower_stages_of_an_image_model_are_frozen():
    for layers in (0, 2):
        model = build(CNN, 5, frozen=layers)
        below = ("conv_stem", "bn1", *(f"blocks.{i}." for i in range(layers)))
        every = {name for name, _ in model.named_parameters()}
        assert trained(model) == {name for name in every if not name.startswith(below)}
        assert not trained(model) >= every


@pytest.mark.parametrize(
    ("name", "layers", "message"),
    [
        (
            "convnet",
            1,
            "frozen layers need an encoder of Hugging Face, such as BERT, or a model of timm, and not 'convnet'",
        ),
        (CNN, 99, f"frozen must be at most [0-9]+, the number of layers of '{CNN}', got 99"),
    ],
)
def test_a_model_without_such_layers_is_refused(name, layers, message):
    with pytest.raises(ValueError, match=message):
        build(name, 5, frozen=layers)


def test_a_text_model_without_such_layers_is_refused():
    with pytest.raises(ValueError, match=f"frozen must be at most {LAYERS}, the number of layers of 'hf:bert', got 4"):
        bert(LAYERS + 1)
    config = transformers.GPT2Config(vocab_size=30, n_embd=16, n_layer=2, n_head=2, num_labels=3, pad_token_id=0)
    model = Logits(transformers.AutoModelForSequenceClassification.from_config(config))
    with pytest.raises(ValueError, match=r"frozen layers need an encoder of Hugging Face.* not 'hf:gpt2'"):
        freeze(model, "hf:gpt2", 1)


def test_frozen_parts_are_in_eval_mode_and_the_others_in_training_mode():
    model = bert(1)
    to_train(model)
    base = model.network.bert
    assert (base.embeddings.training, base.encoder.layer[0].training) == (False, False)
    assert not base.encoder.layer[0].output.dropout.training
    assert (model.training, base.encoder.layer[1].training, base.pooler.training) == (True, True, True)
    assert base.encoder.layer[1].output.dropout.training


def test_a_step_changes_neither_frozen_weights_nor_their_running_statistics():
    torch.manual_seed(1)
    model = build(CNN, 5, frozen=1)
    before = copy.deepcopy(model.state_dict())
    to_train(model)
    sharp = SharpnessAware(model, SAM(0.1), cross_entropy)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    sharp(torch.randn(4, 3, 32, 32), torch.randint(5, (4,))).backward()
    optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert not any(name.startswith(("conv_stem", "bn1.", "blocks.0.")) for name in changed)
    assert {"bn2.running_mean", "classifier.weight"} <= changed


@pytest.mark.parametrize("layers", range(LAYERS + 1))
def test_the_layers_above_give_the_same_logits_and_gradients_from_states_as_from_tokens(layers):
    whole = bert(layers).eval()
    upper = copy.deepcopy(whole)
    inputs, labels = sentences()
    states = hidden_states(upper, inputs)
    skip_frozen(upper, inputs, "hf:bert")
    logits, found = whole(inputs), upper({HIDDEN: states, "attention_mask": inputs["attention_mask"]})
    torch.testing.assert_close(found, logits, atol=1e-12, rtol=1e-12)
    for one in (logits, found):
        cross_entropy(one, labels).mean().backward()
    for (name, p), q in zip(whole.named_parameters(), upper.parameters(), strict=True):
        if p.requires_grad:
            torch.testing.assert_close(q.grad, p.grad, atol=1e-12, rtol=1e-9, msg=name)
        else:
            assert (p.grad, q.grad) == (None, None)
    # What stands at padded places has no effect.
    padded = states.masked_fill(~inputs["attention_mask"].bool()[..., None], 7.0)
    again = upper({HIDDEN: padded, "attention_mask": inputs["attention_mask"]})
    torch.testing.assert_close(again, logits, atol=1e-12, rtol=1e-12)


def test_a_network_whose_upper_layers_use_the_tokens_too_is_refused():
    model = bert(1)
    inputs, _ = sentences()
    network = model.network.forward

    def forward(input_ids=None, **more):
        output = network(input_ids=input_ids, **more)
        output.logits = output.logits + (0 if input_ids is None else 1)
        return output

    model.network.forward = forward
    with pytest.raises(ValueError, match="and not 'hf:odd': leave --frozen out"):
        skip_frozen(model, inputs, "hf:odd")


def test_a_state_without_frozen_weights_is_completed_by_the_models_own():
    model = bert(2)
    state = without_frozen(model.state_dict(), model)
    assert trained(model) <= set(state)
    assert not any(name.startswith("network.bert.embeddings.word") for name in state)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(p.requires_grad)
    model.load_state_dict(with_frozen(state, model))
    assert all(torch.equal(model.state_dict()[name], state[name]) for name in state)
    complete = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    assert with_frozen(complete, model) == complete
