"""Models by name: what they are, what they take, where their weights come from, and how a mistake is answered."""

from __future__ import annotations

import json
import socket
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bisam.experiments.errors import RunWarning
from bisam.experiments.models import networks
from bisam.experiments.models.build import NAMES, Logits, build, statistics, tokenizer

COUNTS = {  # of parameters, for 10 and for 100 classes
    "convnet": (14_746, 17_716),
    "mlp": (17_418, 23_268),
    "resnet8": (75_290, 81_140),
    "resnet20": (269_722, 275_572),
    "resnet32": (464_154, 470_004),
    "resnet44": (658_586, 664_436),
    "resnet56": (853_018, 858_868),
    "wrn28_2": (1_855_578, 1_867_188),
    "wrn28_10": (46_160_474, 46_218_164),
    "wrn28_2_published": (1_467_610, 1_479_220),
    "wrn28_10_published": (36_479_194, 36_536_884),
    "densenet121": (6_956_298, 7_048_548),
    "vgg19_bn": (20_565_834, 20_612_004),
}
LEAST = {"vgg19_bn": 32, "densenet121": 8}  # pixels, of those networks that have a least
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "sat"]

needs_timm = pytest.mark.skipif(find_spec("timm") is None, reason="no timm")
needs_transformers = pytest.mark.skipif(find_spec("transformers") is None, reason="no transformers")


def parameters(name: str, classes: int) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in build(name, classes).parameters())


def same(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return list(left) == list(right) and all(torch.equal(left[name], right[name]) for name in left)


def differing(a: nn.Module, b: nn.Module) -> list[str]:
    left, right = a.state_dict(), b.state_dict()
    assert list(left) == list(right)
    return [name for name in left if left[name].shape != right[name].shape or not torch.equal(left[name], right[name])]


def complaint(*arguments, **options) -> str:
    """The message of the error, which is one line."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - what it says is the test
        build(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """No name of a machine is known, and the caches are empty."""

    def unknown(*_args, **_kwargs):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    if find_spec("huggingface_hub"):
        import huggingface_hub.constants

        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_are_as_many_as_the_papers_networks_have(name):
    assert (parameters(name, 10), parameters(name, 100)) == COUNTS[name]


def test_the_parameters_of_every_network_are_counted():
    assert [*COUNTS] == [name for name in NAMES if ":" not in name and name != "gpt"]  # whose classes are tokens


@pytest.mark.parametrize("name", [name for name in COUNTS if "28_10" not in name])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_become_logits_and_every_parameter_gets_a_gradient(name, channels):
    model = build(name, 7, channels=channels)
    assert model.training
    side = LEAST.get(name, 8) + 1
    logits = model(torch.randn(4, channels, side, side))
    assert logits.shape == (4, 7)
    F.cross_entropy(logits, torch.arange(4)).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@pytest.mark.parametrize("name", COUNTS)
def test_any_image_that_is_large_enough_will_do(name):
    with torch.device("meta"):
        model = build(name, 5).eval()
        least = LEAST.get(name, 1)
        for shape in ((least, least), (32, 32), (64, 96), (33, 47)):
            assert model(torch.empty(2, 3, *shape)).shape == (2, 5)


@pytest.mark.parametrize(("name", "least"), LEAST.items())
def test_an_image_that_is_too_small_is_answered_with_the_least_size(name, least):
    model = build(name, 5).to("meta")
    with pytest.raises(ValueError, match=f"images of {least}x{least - 1} are too small.*needs {least}x{least}"):
        model(torch.empty(2, 3, least, least - 1, device="meta"))


def test_the_stages_of_a_residual_network_halve_the_image_and_double_the_channels():
    model = build("resnet20", 10)
    shapes = []
    for block in model:
        if isinstance(block, networks.ResidualBlock):
            block.register_forward_hook(lambda _m, _inputs, output: shapes.append(tuple(output.shape[1:])))
    model(torch.randn(2, 3, 32, 32))
    assert shapes == [(16, 32, 32)] * 3 + [(32, 16, 16)] * 3 + [(64, 8, 8)] * 3


def test_the_shortcut_without_parameters_takes_every_other_pixel_between_channels_of_zeros():
    x = torch.randn(2, 16, 7, 6)
    shortcut = networks.ResidualBlock(16, 32, 2).shortcut
    y = shortcut(x)
    assert list(shortcut.parameters()) == []
    assert y.shape == (2, 32, 4, 3)
    assert torch.equal(y[:, 8:24], x[:, :, [0, 2, 4, 6]][:, :, :, [0, 2, 4]])
    assert not y[:, :8].any()
    assert not y[:, 24:].any()
    block = networks.ResidualBlock(16, 16)
    assert block.shortcut(x) is x


def test_a_residual_block_that_adds_nothing_is_its_shortcut():
    block = networks.ResidualBlock(4, 8, 2)
    nn.init.zeros_(block.residual[-1].weight)
    x = torch.randn(3, 4, 8, 8)
    assert torch.equal(block(x), block.shortcut(x).relu())


def test_a_preactivation_block_that_adds_nothing_is_the_identity():
    block = networks.PreactivationBlock(4, 4)
    nn.init.zeros_(block.residual[-1].weight)
    x = torch.randn(3, 4, 8, 8)
    before = x.clone()
    assert torch.equal(block(x), before)
    assert torch.equal(x, before)


def test_dropout_of_a_wide_network_lies_between_the_convolutions_and_is_off_by_default():
    model = networks.WideResNet(10, 1, 3, dropout=0.4)
    rates = [m.p for m in model.modules() if isinstance(m, nn.Dropout)]
    assert rates == [0.4] * 3
    x = torch.randn(2, 3, 8, 8)
    assert not torch.equal(model(x), model(x))
    model = networks.WideResNet(10, 1, 3)
    assert torch.equal(model(x), model(x))


def test_a_dense_layer_keeps_its_input_and_adds_to_it():
    x = torch.randn(2, 6, 5, 5)
    y = networks.DenseLayer(6, 4)(x)
    assert y.shape == (2, 10, 5, 5)
    assert torch.equal(y[:, :6], x)


@pytest.mark.parametrize("depth", [2, 21, 57])
def test_a_depth_that_a_residual_network_cannot_have(depth):
    with pytest.raises(ValueError, match=rf"depth must be 6n \+ 2, as 8 or 26, got {depth}"):
        networks.ResNet(depth, 10)
    with pytest.raises(ValueError, match=rf"depth must be 6n \+ 4, as 10 or 28, got {depth}"):
        networks.WideResNet(depth, 2, 10)


def test_the_convnet_is_the_one_of_earlier_results():
    torch.manual_seed(5)
    model = build("convnet", 10, channels=1)
    torch.manual_seed(5)
    layers = []
    for inputs, outputs, stride in ((1, 16, 1), (16, 32, 2), (32, 32, 1)):
        layers.append(nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False))
        layers += [nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
    earlier = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
    assert same(model, earlier)
    assert [type(m) for m in model] == [type(m) for m in earlier]
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(model(x), earlier(x))


@pytest.mark.parametrize("name", ["convnet", "resnet20", "wrn28_2", "densenet121"])
def test_a_seed_decides_the_weights(name):
    torch.manual_seed(3)
    first = build(name, 10)
    torch.manual_seed(3)
    again = build(name, 10)
    other = build(name, 10)
    assert same(first, again)
    assert not same(first, other)


def test_weights_are_drawn_as_he_et_al_2015_draw_them():
    for module in build("wrn28_2", 10).modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            inputs = module.weight[0].numel()
            count = module.weight.numel()
            assert abs(module.weight.var().item() * inputs / 2 - 1) < 6 * (2 / count) ** 0.5
            assert module.bias is None or not module.bias.any()


def test_an_unknown_name_is_answered_with_the_nearest():
    assert complaint("resnet57", 10) == "unknown model 'resnet57', did you mean 'resnet56'? Try bisam list"
    assert complaint("nothing of the kind", 10) == "unknown model 'nothing of the kind': try bisam list"
    assert complaint("tv:resnet50", 10) == "unknown source of models 'tv', available: torchvision, timm, hf"


def test_an_unknown_name_of_torchvision_is_answered_with_the_nearest():
    message = complaint("torchvision:resnet5", 10)
    assert message.startswith("unknown model 'torchvision:resnet5', did you mean 'torchvision:resnet50'")
    assert message.endswith("? Try torchvision.models.list_models()")
    message = complaint("torchvision:nonsense", 10)
    assert message == "unknown model 'torchvision:nonsense': try torchvision.models.list_models()"
    assert "unknown model" in complaint("torchvision:fcos_resnet50_fpn", 10)  # a detector is no classifier


def test_the_statistics_of_torchvisions_weights():
    assert statistics("torchvision:resnet50") == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert statistics("torchvision:efficientnet_v2_l") == ((0.5,) * 3, (0.5,) * 3)
    assert statistics("torchvision:mnasnet0_75") is not None
    assert statistics("resnet20") is None
    with pytest.raises(ValueError, match="did you mean 'torchvision:resnet50'"):
        statistics("torchvision:resnet500")


@needs_timm
@pytest.mark.parametrize("name", ["timm:resnet5", "timm:test_resnet.r160"])
def test_the_statistics_of_an_unknown_name_of_timm_are_refused(name):
    with pytest.raises(ValueError, match=r"^unknown model 'timm:.*did you mean 'timm:(test_)?resnet"):
        statistics(name)


@needs_timm
def test_an_unknown_name_of_timm_is_answered_with_the_nearest():
    message = complaint("timm:resnet5", 10)
    assert message.startswith("unknown model 'timm:resnet5', did you mean 'timm:resnet50")
    assert message.endswith("? Try timm.list_models()")
    assert complaint("timm:nonsense", 10) == "unknown model 'timm:nonsense': try timm.list_models()"
    assert "did you mean 'timm:test_resnet.r160_in1k'" in complaint("timm:test_resnet.r160", 10)


@needs_transformers
@pytest.mark.parametrize("name", ["hf:", "hf:./bert", "hf:/no/folder"])
def test_a_folder_that_is_not_there(name):
    assert (
        complaint(name, 2)
        == f"model {name!r} is neither a local folder nor a name on the hub, such as hf:bert-base-uncased"
    )


@pytest.mark.parametrize(
    ("name", "package"), [("timm:resnet18", "timm"), ("hf:bert", "transformers"), ("torchvision:vgg11", "torchvision")]
)
def test_a_package_that_is_not_there(name, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    assert complaint(name, 10) == f"model {name!r} needs {package}: pip install 'bisam[experiments]'"


def test_a_package_for_reading_weights_that_is_not_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    message = "the file 'w.safetensors' needs safetensors: pip install 'bisam[experiments]'"
    assert complaint("convnet", 10, weights="w.safetensors") == message


def test_torchvision_takes_three_channels():
    assert "accepts images of 3 channels, not of 1" in complaint("torchvision:resnet18", 10, channels=1)


def test_only_models_of_hugging_face_have_a_tokenizer():
    with pytest.raises(ValueError, match="'resnet20' has no tokenizer"):
        tokenizer("resnet20")


@pytest.mark.parametrize("wrapped", ["plain", "module.", "network.", "state_dict"])
def test_weights_from_a_file(tmp_path, wrapped):
    state = build("convnet", 4).state_dict()
    saved = {wrapped + k: v for k, v in state.items()} if wrapped.endswith(".") else state
    torch.save({"state_dict": saved, "epoch": 3} if wrapped == "state_dict" else saved, tmp_path / "w.pt")
    loaded = build("convnet", 4, weights=str(tmp_path / "w.pt")).state_dict()
    assert all(torch.equal(loaded[k], state[k]) for k in state)


def test_weights_from_a_safetensors_file(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model = build("convnet", 4)
    safetensors.save_file(model.state_dict(), tmp_path / "w.safetensors")
    assert same(build("convnet", 4, weights=str(tmp_path / "w.safetensors")), model)
    assert "cannot be read" in complaint("convnet", 4, weights=str(tmp_path / "none.safetensors"))


@pytest.mark.parametrize(("name", "head"), [("resnet20", "14"), ("torchvision:squeezenet1_1", "classifier.1")])
def test_a_head_for_another_number_of_classes_is_a_fresh_one(tmp_path, name, head):
    model = build(name, 6)
    torch.save(model.state_dict(), tmp_path / "w.pt")
    torch.manual_seed(8)
    with pytest.warns(
        RunWarning, match=rf"of 6 classes, and the model has 9: .* the head \({head}.bias, {head}.weight\)"
    ):
        loaded = build(name, 9, weights=str(tmp_path / "w.pt"))
    torch.manual_seed(8)
    fresh = build(name, 9)
    assert differing(loaded, model) == [f"{head}.weight", f"{head}.bias"]
    assert torch.equal(loaded.get_submodule(head).weight, fresh.get_submodule(head).weight)
    assert same(build(name, 6, weights=str(tmp_path / "w.pt")), model)


def test_weights_that_do_not_fit_are_named(tmp_path):
    path = tmp_path / "w.pt"
    start = f"weights {str(path)!r} do not fit 'convnet': "
    state = build("convnet", 10).state_dict()

    def answer(state: dict[str, torch.Tensor]) -> str:
        torch.save(state, path)
        return complaint("convnet", 10, weights=str(path))

    assert answer({k: v for k, v in state.items() if k != "3.weight"}) == start + "missing 3.weight"
    assert answer({**state, "extra": torch.zeros(3)}) == start + "unexpected extra"
    assert answer({**state, "0.weight": torch.zeros(16, 1, 3, 3)}) == (
        start + "of another shape 0.weight (16, 1, 3, 3), not (16, 3, 3, 3)"
    )
    assert answer({"11.weight": torch.zeros(10)}) == (
        start + "missing 0.weight, 1.weight, 1.bias and 13 more; of another shape 11.weight (10,), not (10, 32)"
    )
    # Two layers for two other numbers are no head.
    assert "of another shape" in answer({**state, "11.weight": torch.zeros(7, 32), "11.bias": torch.zeros(8)})


def test_what_is_no_file_of_weights(tmp_path):
    path = tmp_path / "w.pt"
    assert f"weights {str(path)!r} cannot be read (No such file or directory): give the path" in complaint(
        "convnet", 10, weights=str(path)
    )
    path.write_bytes(b"hello, I am no file of tensors")
    assert "not a file of tensors alone" in complaint("convnet", 10, weights=str(path))
    torch.save(build("convnet", 10), path)  # a pickled module: to load it would run it
    refusal = complaint("convnet", 10, weights=str(path))
    assert "not a file of tensors alone (it is damaged, or holds objects other than tensors" in refusal
    assert "weights_only" not in refusal  # torch's advice to run it
    torch.save([torch.zeros(3)], path)
    assert "are not a state dict" in complaint("convnet", 10, weights=str(path))


def test_our_networks_have_no_pretrained_weights():
    assert complaint("resnet56", 10, weights="pretrained") == (
        "model 'resnet56' has no pretrained weights: give a file with weights, or leave --weights out"
    )


def test_real_weights_of_imagenet(data):
    path = data / "weights" / "squeezenet1_1_imagenet_rgb_fp16.pt"
    if not path.is_file():
        pytest.skip(f"no {path}")
    theirs = torch.load(path, weights_only=True)
    full = build("torchvision:squeezenet1_1", 1000, weights=str(path))
    assert all(torch.equal(p, theirs[name].float()) for name, p in full.named_parameters())
    with pytest.warns(RunWarning, match="of 1000 classes"):
        ten = build("torchvision:squeezenet1_1", 10, weights=str(path))
    assert differing(ten, full) == ["classifier.1.weight", "classifier.1.bias"]
    assert ten(torch.randn(2, 3, 64, 64)).shape == (2, 10)


@pytest.mark.parametrize(("name", "head"), [("squeezenet1_1", "classifier.1"), ("mobilenet_v3_small", "classifier.3")])
def test_pretrained_weights_of_torchvision_from_its_cache(name, head, no_network, tmp_path):
    import torchvision

    source = torchvision.models.get_model(name)
    file = torchvision.models.get_model_weights(name).DEFAULT.url.rpartition("/")[2]
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(source.state_dict(), folder / file)
    model = build(f"torchvision:{name}", 1000, weights="pretrained")
    assert same(model, source)
    model = build(f"torchvision:{name}", 7, weights="pretrained")
    assert model.training
    assert differing(model, source) == [f"{head}.weight", f"{head}.bias"]
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 7)


@pytest.mark.parametrize("name", ["googlenet", "shufflenet_v2_x0_5"])
def test_a_random_network_of_torchvision_returns_logits_in_training(name):
    model = build(f"torchvision:{name}", 7)
    assert model.training
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 7)


def test_pretrained_weights_of_torchvision_without_a_network(no_network):
    message = complaint("torchvision:resnet18", 10, weights="pretrained")
    assert message.startswith("the pretrained weights of 'torchvision:resnet18' cannot be loaded (<urlopen error")
    assert message.endswith("give a file of weights, or set TORCH_HOME to a filled cache")


@needs_timm
def test_a_network_of_timm():
    model = build("timm:test_resnet", 7, channels=1)
    assert model.training
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 7)


@needs_timm
def test_pretrained_weights_of_timm_from_the_hubs_cache(no_network, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    source = build("timm:test_resnet", 1000)
    folder = tmp_path / "hub" / "models--timm--test_resnet.r160_in1k"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
    safetensors.save_file(source.state_dict(), folder / "snapshots" / ("0" * 40) / "model.safetensors")
    assert same(build("timm:test_resnet", 1000, weights="pretrained"), source)
    model = build("timm:test_resnet.r160_in1k", 7, weights="pretrained")
    assert differing(model, source) == ["fc.weight", "fc.bias"]


@needs_timm
def test_pretrained_weights_of_timm_without_a_network(no_network, capfd):
    import huggingface_hub.constants

    message = complaint("timm:test_resnet", 10, weights="pretrained")
    assert message.startswith("the pretrained weights of 'timm:test_resnet' cannot be loaded (")
    assert message.endswith("give a file of weights, or set HF_HOME to a filled cache")
    assert "Retrying" not in capfd.readouterr().err
    assert not huggingface_hub.constants.HF_HUB_OFFLINE
    assert "has no pretrained weights" in complaint("timm:botnet50ts_256", 10, weights="pretrained")


@pytest.fixture
def bert(tmp_path) -> Path:
    """A BERT of one layer in a folder: what it is and how it reads, without weights."""
    pytest.importorskip("transformers")
    folder = tmp_path / "bert"
    folder.mkdir()
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = {"model_type": "bert", "vocab_size": len(WORDS), "max_position_embeddings": 16, **sizes}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizerFast"}))
    return folder


def sentences(bert: Path) -> dict[str, torch.Tensor]:
    read = tokenizer(f"hf:{bert}")
    return dict(read(["a cat sat", "a dog"], padding=True, return_tensors="pt"))


def test_a_tokenizer_from_a_folder(bert):
    inputs = sentences(bert)
    assert inputs["input_ids"].tolist() == [[2, 5, 6, 7, 3], [2, 5, 1, 3, 0]]
    assert inputs["attention_mask"].tolist() == [[1] * 5, [1] * 4 + [0]]


def test_a_classifier_of_sentences_from_a_folder(bert, no_network):
    torch.manual_seed(2)
    model = build(f"hf:{bert}", 3)
    assert isinstance(model, Logits)
    assert model.training
    inputs = sentences(bert)
    logits = model(inputs)
    assert logits.shape == (2, 3)
    F.cross_entropy(logits, torch.tensor([0, 2])).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    torch.manual_seed(2)
    assert same(model, build(f"hf:{bert}", 3))
    padded = {name: F.pad(value, (0, 4)) for name, value in inputs.items()}
    model.eval()
    torch.testing.assert_close(model(padded), model(inputs), rtol=1e-4, atol=1e-6)


def test_pretrained_weights_from_a_folder(bert, no_network, caplog, capfd):
    source = build(f"hf:{bert}", 3).to(torch.bfloat16)
    source.network.save_pretrained(bert)
    capfd.readouterr()
    model = build(f"hf:{bert}", 3, weights="pretrained")
    assert same(model, source.float())
    assert model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    model = build(f"hf:{bert}", 5, weights="pretrained")
    assert differing(model, source) == ["network.classifier.weight", "network.classifier.bias"]
    assert model(sentences(bert)).shape == (2, 5)
    assert caplog.text == ""
    assert "classifier" not in capfd.readouterr().err  # no report that the head is fresh


@pytest.mark.parametrize("whole", [True, False])
def test_weights_of_a_classifier_of_sentences_from_a_file(bert, tmp_path, whole):
    source = build(f"hf:{bert}", 3)
    torch.save((source if whole else source.network).state_dict(), tmp_path / "w.pt")
    assert same(build(f"hf:{bert}", 3, weights=str(tmp_path / "w.pt")), source)
    with pytest.warns(RunWarning, match="of 3 classes"):
        other = build(f"hf:{bert}", 4, weights=str(tmp_path / "w.pt"))
    assert differing(other, source) == ["network.classifier.weight", "network.classifier.bias"]


def test_a_folder_without_a_model(tmp_path):
    pytest.importorskip("transformers")
    assert complaint(f"hf:{tmp_path}", 2).startswith(f"model 'hf:{tmp_path}' cannot be loaded (")
    with pytest.raises(ValueError, match=r"the tokenizer of .* cannot be loaded"):
        tokenizer(f"hf:{tmp_path}")


def test_a_folder_without_weights(bert):
    assert "cannot be loaded (Error no file named" in complaint(f"hf:{bert}", 2, weights="pretrained")


@pytest.mark.parametrize("weights", [None, "pretrained"])
def test_a_name_of_the_hub_without_a_network(weights, no_network, capfd):
    pytest.importorskip("transformers")
    message = complaint("hf:nobody/nothing", 2, weights=weights)
    assert message.startswith("model 'hf:nobody/nothing' cannot be loaded (")
    assert message.endswith("give a local folder as hf:FOLDER, or set HF_HOME to a filled cache")
    with pytest.raises(ValueError, match="the tokenizer of 'hf:nobody/nothing' cannot be loaded"):
        tokenizer("hf:nobody/nothing")
    assert "Retrying" not in capfd.readouterr().err
