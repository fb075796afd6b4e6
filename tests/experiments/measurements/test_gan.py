"""The GAN study: networks, the Frechet distance, training by each method, and the report."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

pytest.importorskip("matplotlib")

from bisam.experiments.measurements import MEASUREMENTS, report, run
from bisam.experiments.measurements.frechet import Features, distance, features
from bisam.experiments.measurements.gan import REAL, TRAINERS, curves, samples, train
from bisam.experiments.models.gan import Discriminator, Generator

GAN = MEASUREMENTS["gan"]
TINY = {**GAN.settings, "gradients": 8, "every": 4, "width": 4, "noise": 5, "batch_size": 6, "k": 4, "samples": 10}
CPU = torch.device("cpu")


# Networks


def test_the_networks_have_the_size_of_the_authors():
    """Parameters of `ResNetGenerator(128, 256)` and `ResNetDiscriminator(True, 128)` in their code, by count."""
    sizes = [sum(p.numel() for p in net.parameters()) for net in (Generator(128, 256, 3), Discriminator(128, 3))]
    assert sizes == [4_079_363, 1_053_825]


@pytest.mark.parametrize("channels", [1, 3])
def test_the_networks_make_and_judge_images_of_32_pixels(channels):
    images = Generator(5, 4, channels)(torch.randn(6, 5))
    assert images.shape == (6, channels, 32, 32)
    assert images.abs().max() < 1
    assert Discriminator(4, channels)(images).shape == (6,)


def test_every_weight_of_the_discriminator_has_norm_one():
    net = Discriminator(4, 3)
    for _ in range(200):  # power iterations
        net(torch.zeros(2, 3, 32, 32))
    layers = [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(layers) == 11
    for layer in layers:
        assert parametrize.is_parametrized(layer, "weight")
        assert torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() == pytest.approx(1, abs=1e-3)


# The distance


def moments(n: int, seed: int, d: int = 4) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.double)
    return Features("", lambda x: x).moments(x @ torch.diag(torch.arange(1.0, d + 1).double()) + seed)


def test_the_distance_by_a_square_root_of_matrices():
    linalg = pytest.importorskip("scipy.linalg")
    (m, a), (n, b) = moments(50, 1), moments(60, 2)
    root = linalg.sqrtm((a @ b).numpy()).real.trace()
    expected = (m - n).square().sum() + a.trace() + b.trace() - 2 * root
    assert distance((m, a), (n, b)) == pytest.approx(expected.item(), rel=1e-9)
    assert distance((n, b), (m, a)) == pytest.approx(expected.item(), rel=1e-9)


def test_distances_by_hand():
    one = torch.ones(1).double(), torch.tensor([[4.0]]).double()
    assert distance(one, (torch.tensor([3.0]).double(), torch.tensor([[9.0]]).double())) == pytest.approx(4 + 1)
    assert distance(moments(50, 1), moments(50, 1)) == pytest.approx(0, abs=1e-9)
    few = moments(3, 1)  # a singular covariance
    assert distance(few, few) == pytest.approx(0, abs=1e-6)


def test_covariances_are_those_of_numpy():
    x = torch.randn(300, 3, generator=torch.Generator().manual_seed(0)).double()
    mean, covariance = Features("", lambda x: x * 2).moments(x)
    centred = 2 * (x - x.mean(0))
    torch.testing.assert_close(mean, 2 * x.mean(0))
    torch.testing.assert_close(covariance, centred.T @ centred / 299)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("convent", "unknown network of features 'convent', did you mean 'convnet'"),
        ("squeezenet", "unknown network of features 'squeezenet'"),
        ("squeezenet:/nowhere.pt", "weights of SqueezeNet 1.1 cannot be loaded from /nowhere.pt"),
    ],
)
def test_features_that_cannot_be_had_are_named(name, message):
    with pytest.raises(ValueError, match=message):
        features(name, CPU)


def test_squeezenet_with_weights_from_a_file(tmp_path):
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    network = models.squeezenet1_1()
    torch.save({k: v.half() for k, v in network.state_dict().items()}, tmp_path / "w.pt")
    network.load_state_dict({k: v.half().float() for k, v in network.state_dict().items()})
    network.eval()
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    large = nn.functional.interpolate(x / 2 + 0.5, scale_factor=3, mode="bilinear")
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    inputs = {
        "squeezenet": (large - mean) / std,
        "squeezenet-caffe": large * 255 - torch.tensor([123.0, 117.0, 104.0]).view(3, 1, 1),
    }
    for kind, given in inputs.items():
        found = features(f"{kind}:{tmp_path / 'w.pt'}", CPU)
        assert found.name == f"SqueezeNet 1.1 ({kind})"
        torch.testing.assert_close(found.of(x), network.features(given).mean((2, 3)), rtol=1e-3, atol=1e-3)
        assert found.of(x[:, :1]).shape == (2, 512)  # grey images too
    (tmp_path / "w.pt").write_text("no weights")
    with pytest.raises(ValueError, match="cannot be loaded"):
        features(f"squeezenet:{tmp_path / 'w.pt'}", CPU)


class FakeInception(nn.Module):
    def __init__(self, name: str, wanted: list[str], path: str) -> None:
        super().__init__()
        assert (name, wanted, path) == ("inception-v3-compat", ["2048"], "weights.pth")

    def forward(self, images: Tensor) -> tuple[Tensor]:
        assert (images.dtype, images.shape[1]) == (torch.uint8, 3)
        return (images.flatten(1)[:, :2].double(),)


def test_only_inception_is_called_fid(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", SimpleNamespace())
    monkeypatch.setitem(
        sys.modules,
        "torch_fidelity.feature_extractor_inceptionv3",
        SimpleNamespace(FeatureExtractorInceptionV3=FakeInception),
    )
    found = features("inception:weights.pth", CPU)
    assert found.name.startswith("FID")
    assert found.of(torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1).expand(2, 1, 4, 4)).tolist() == [[0, 0], [255, 255]]
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(ValueError, match=r"needs torch-fidelity: pip install torch-fidelity"):
        features("inception:weights.pth", CPU)


# Training

IMAGES = torch.rand(20, 1, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def final(name: str, seed: int = 0, **changed) -> Tensor:
    return list(train(TRAINERS[name], IMAGES, seed, 10, {**TINY, **changed}))[-1][1]


@pytest.mark.parametrize("name", TRAINERS)
def test_each_method_trains_and_is_evaluated_after_whole_rounds(name):
    entries = list(train(TRAINERS[name], IMAGES, 0, 10, TINY))
    length = TRAINERS[name].length(TINY)
    counts = [count for count, *_ in entries]
    assert counts[0] == 0
    assert all(count % length == 0 for count in counts)
    assert 8 <= counts[-1] < 8 + length
    first, last = entries[0][1], entries[-1][1]
    assert (first - last).abs().max() > 1e-4
    assert all(loss is not None for _, _, *losses in entries[1:] for loss in losses)
    assert torch.equal(final(name), last)  # the same seed
    assert not torch.equal(final(name, 1), last)


def test_rapp_with_one_inner_step_and_lookahead_of_one_are_gda():
    gda = final("GDA")
    assert torch.equal(final("RAPP", inner=1, lam=1.0), gda)
    assert torch.equal(final("LA-GDA", k=1, alpha=1.0), gda)
    assert not torch.equal(final("RAPP", inner=2, lam=1.0), gda)
    assert torch.equal(final("RAPP", inner=2, lam=1.0), final("EG"))
    assert torch.equal(final("RAPP-Adam", inner=2, lam=1.0), final("ExtraAdam"))
    assert not torch.equal(final("Adam"), final("ExtraAdam"))


def test_training_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    final("GDA")
    assert torch.equal(torch.rand(3), expected)


# The study

SMALL = {"methods": "GDA,RAPP,LA-ExtraAdam", "seeds": "2", "gradients": "4", "every": "2", "k": "2"}
SMALL |= {"width": "4", "noise": "5", "batch_size": "6", "samples": "20"}


@pytest.mark.slow
def test_a_small_study_and_its_report(tmp_path):
    folder = run(GAN, SMALL, tmp_path)
    shown = report(GAN, folder)
    assert [cells[0] for cells in shown.cells] == [REAL, "GDA", "RAPP", "LA-ExtraAdam"]
    assert [cells[1] for cells in shown.cells] == ["–", "2", "2", "2"]
    ends = {row["method"]: row["distance"] for row in shown.rows}
    assert ends[REAL] < min(value for name, value in ends.items() if name != REAL)
    assert not [key for row in shown.rows for key in row if key.startswith("_")]
    accuracy = float(shown.rows[0]["features"].rpartition(" ")[2])
    assert accuracy > 0.95
    assert "FID" not in "".join(cell for cells in shown.cells for cell in cells)
    assert len(shown.figures["samples.png"].axes) == 4


@pytest.mark.slow
def test_a_small_study_of_photographs(tmp_path, data):
    weights = data / "weights" / "squeezenet1_1_imagenet_rgb_fp16.pt"
    changed = {"data": f"cifar10:{data}", "features": f"squeezenet-caffe:{weights}", "seeds": "1", "methods": "GDA,EG"}
    shown = report(GAN, run(GAN, {**SMALL, **changed}, tmp_path))
    assert [cells[0] for cells in shown.cells] == [REAL, "GDA", "EG"]
    assert {row["features"] for row in shown.rows} == {"SqueezeNet 1.1 (squeezenet-caffe)"}
    ends = {row["method"]: row["distance"] for row in shown.rows}
    assert ends[REAL] < min(ends["GDA"], ends["EG"])


def row(method: str, seed: int, gradients: int, value: float | None) -> dict:
    images = "" if value is None else "AAAA" * (10 * 32 * 32 // 3) + "AA=="
    return {"data": "digits", "features": "f", "method": method, "seed": seed, "scale": 1.0, "gradients": gradients} | {
        "distance": value, "loss_d": None, "loss_g": None, "_samples": images,
    }  # fmt: skip


def test_a_run_that_diverges_is_said_to_diverge():
    rows = [row(REAL, 0, 0, 0.1), row("GDA", 0, 0, 9.0), row("GDA", 0, 60, None), row("GDA", 1, 0, 9.0)]
    rows += [row("GDA", 1, 60, 7.0), row("EG", 0, 0, 9.0), row("EG", 0, 60, None)]
    assert GAN.tabled is not None
    cells = {line["method"]: [cell(line) for cell in GAN.columns.values()] for line in GAN.tabled(rows)}
    assert cells["GDA"][4:6] == ["7.00 (1 diverged)", "8.00 ± 1.41"]
    assert cells["EG"][4] == "diverged"
    assert len(samples(rows).axes) == 3
    assert len(curves(rows).axes[0].lines) == 3


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"data": "digit"}, "unknown data 'digit', did you mean 'digits'"),
        ({"data": "cifar10"}, "unknown data 'cifar10'"),
        ({"data": "cifar10:x"}, "features=convnet is a network of digits"),
        ({"features": "inception"}, "unknown network of features 'inception'"),
        ({"methods": "RAAP"}, "unknown method 'RAAP', did you mean 'RAPP'"),
        ({"lam": "0"}, "setting lam must be in"),
        ({"lr_g": "inf"}, "setting lr_g must be in"),
        ({"k": "5"}, "setting k must be even for LA-ExtraAdam, got 5"),
        ({"samples": "9"}, "setting samples must be at least 10, got 9"),
    ],
)
def test_wrong_settings_are_named(tmp_path, changed, message):
    with pytest.raises(ValueError, match=message):
        run(GAN, changed, tmp_path)
    assert not list(tmp_path.iterdir())


def test_missing_images_are_named(tmp_path):
    changed = {"data": f"cifar10:{tmp_path / 'none'}", "features": f"squeezenet:{tmp_path / 'w.pt'}"}
    with pytest.raises(ValueError, match="cifar10 is missing"):
        run(GAN, changed, tmp_path / "out")
