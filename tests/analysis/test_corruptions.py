"""Corruptions: closed forms of each, the errors of a loop, and that a seed decides everything."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bisam import SAM, ModelOracle, SharpnessAware, cross_entropy
from bisam.analysis import CORRUPTIONS, corruptions
from bisam.analysis.corruptions import SMALL, Strength
from tests.support import cases
from tests.support.cases import everything

pytest.importorskip("torchvision")
Image = pytest.importorskip("PIL.Image")

MEAN, STD = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.25])


def images(n: int = 6, side: int = 12, channels: int = 3, seed: int = 0) -> Tensor:
    """Smooth random images in [0, 1]."""
    random = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, channels, 4, 4, generator=random)
    return nn.functional.interpolate(coarse, (side, side), mode="bilinear").clamp(0, 1)


def batches() -> list[tuple[Tensor, Tensor]]:
    """Normalised images with labels."""
    random = torch.Generator().manual_seed(9)
    return [
        ((images(n, seed=n) - MEAN.view(3, 1, 1)) / STD.view(3, 1, 1), torch.randint(3, (n,), generator=random))
        for n in (8, 5)
    ]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(500, 3))


def test_each_corruption_grows_with_its_severity_and_stays_in_the_range():
    for side in (12, 96):
        x = images(side=side, n=3)
        for name, corrupt in CORRUPTIONS.items():
            torch.manual_seed(0)
            found = [corrupt(x, severity) for severity in range(1, 6)]
            away = [float((new - x).square().mean().sqrt()) for new in found]
            assert all(new.shape == x.shape and new.dtype == x.dtype for new in found), name
            assert away[0] > 1e-3, name
            if name != "pixelate" or side > SMALL:  # of small images the boxes are shifted by parts of a pixel
                assert away[0] < away[2] < away[4], (name, side, away)
            assert all(0 <= float(new.min()) <= float(new.max()) <= 1 + 1e-6 for new in found), name


def test_closed_forms():
    x = images(channels=1)
    torch.manual_seed(0)
    noise = CORRUPTIONS["gaussian noise"](torch.full((4, 1, 64, 64), 0.5), 5) - 0.5
    assert float(noise.std()) == pytest.approx(0.10, rel=0.03)
    torch.testing.assert_close(CORRUPTIONS["brightness"](x, 5), (1.6 * x).clamp_max(1))
    mean = x.mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(CORRUPTIONS["contrast"](x, 2), (x - mean) * 0.5 + mean)
    point = torch.zeros(1, 1, 33, 33)
    point[0, 0, 16, 16] = 1
    grid = torch.arange(33) - 16.0
    blurred = torch.exp(-(grid[:, None] ** 2 + grid**2) / 2)  # severity 5: a standard deviation of one pixel
    torch.testing.assert_close(CORRUPTIONS["gaussian blur"](point, 5)[0, 0], blurred / blurred.sum(), atol=1e-4, rtol=0)
    halves = CORRUPTIONS["pixelate"](images(side=96), 2)  # 0.5 of large images: boxes of 2x2, in steps of 1/255
    exact = nn.functional.avg_pool2d(images(side=96), 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(halves, exact, atol=1.6 / 255, rtol=0)  # two roundings


def test_elastic_moves_by_its_strength():
    """A ramp shows the displacement along an axis."""
    side = 48
    ramp = (torch.arange(side) / side).expand(40, 1, side, side).contiguous()
    moved = []
    for severity in (2, 4):
        torch.manual_seed(0)
        # Far from the border, outside of which the images are black, and near which the field is stronger.
        moved.append((CORRUPTIONS["elastic"](ramp, severity) - ramp)[:, :, 12:-12, 12:-12])
    assert 0.7 * 0.02 < float(moved[0].square().mean().sqrt()) < 0.02
    torch.testing.assert_close(moved[1], 2 * moved[0], atol=1e-5, rtol=0)
    assert not torch.equal(moved[0][0], moved[0][1])  # each image has a field of its own


def test_jpeg_and_pixelate_are_those_of_the_paper():
    """The two operations on Pillow's images, at the fifth severity of CIFAR-10-C."""
    x = images(n=1, side=32)
    picture = Image.fromarray((x[0] * 255).round().byte().movedim(0, -1).numpy())
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=40)
    boxes = picture.resize((20, 20), Image.BOX).resize((32, 32), Image.BOX)
    for name, exact in (("jpeg", Image.open(file)), ("pixelate", boxes)):
        expected = torch.from_numpy(np.array(exact)).movedim(-1, 0) / 255
        assert torch.equal(CORRUPTIONS[name](x, 5)[0], expected)
        assert not torch.equal(expected, x[0])


def test_strengths_depend_on_the_size():
    strength = Strength((1, 2, 3, 4, 5), (10, 20, 30, 40, 50))
    assert [strength(torch.zeros(1, 1, side, 8), 2) for side in (SMALL, SMALL + 1)] == [2, 20]


def test_the_errors_are_those_of_a_loop():
    model, data = network(), batches()
    known = {"contrast": CORRUPTIONS["contrast"], "blank": lambda x, severity: torch.full_like(x, severity / 5)}
    sharp = SharpnessAware(model, SAM(0.05), cross_entropy)
    found = corruptions(sharp, data, (4, 2), mean=MEAN.tolist(), std=STD.tolist(), kinds=known)
    model.eval()
    scale, shift = STD.view(3, 1, 1), MEAN.view(3, 1, 1)
    for name, corrupt in known.items():
        for k, severity in enumerate((4, 2)):
            wrong, confidence = 0, 0.0
            for x, y in data:
                p = model((corrupt(x * scale + shift, severity) - shift) / scale).detach().softmax(1)
                wrong += int((p.argmax(1) != y).sum())
                confidence += float(p.max(1).values.sum())
            assert found.errors[name][k] == wrong / 13
            assert found.confidences[name][k] == pytest.approx(confidence / 13, rel=1e-4)
    plain = torch.cat([model(x).argmax(1) != y for x, y in data])
    assert found.error == pytest.approx(float(plain.double().mean()))
    assert found.mean_error == pytest.approx(sum(map(sum, found.errors.values())) / 4)
    assert (found.severities, found.size, found.examples) == ((4, 2), (12, 12), 13)
    assert found.forward == pytest.approx(1 + 2 * 2)
    assert len(set(found.errors["contrast"] + found.errors["blank"])) > 1


class Seen(nn.Module):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.given = nn.Linear(3, 3), []

    def forward(self, x: Tensor) -> Tensor:
        self.given.append(x.clone())
        return self.linear(x.mean((2, 3)))


def given(**settings) -> list[Tensor]:
    """All images that a model is given."""
    model = Seen()
    corruptions(ModelOracle(model, cross_entropy), batches(), mean=MEAN, std=STD, **settings)
    return model.given


def test_a_seed_decides_the_corruptions():
    kinds = {name: CORRUPTIONS[name] for name in ("elastic", "gaussian noise")}
    one, two, other = (given(seed=seed, kinds=kinds) for seed in (0, 0, 1))
    assert all(map(torch.equal, one, two))
    assert not any(map(torch.equal, one[2:], other[2:]))
    alone = given(severities=(3,), kinds={"gaussian noise": CORRUPTIONS["gaussian noise"]})
    number = 2 + 2 * 5 + 2 * 2  # after the images themselves, five severities of elastic and two of noise
    assert all(map(torch.equal, alone[2:], one[number : number + 2]))
    first, second = batches()
    torch.testing.assert_close(one[0], first[0], rtol=0, atol=0)
    torch.testing.assert_close(one[1], second[0], rtol=0, atol=0)


def test_images_of_one_channel_and_in_the_unit_interval():
    x = images(channels=1, side=8)
    torch.manual_seed(0)
    oracle = ModelOracle(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), cross_entropy)
    found = corruptions(oracle, [(x, torch.randint(3, (6,)))], (1, 5))
    assert set(found.errors) == set(CORRUPTIONS)
    assert found.forward == pytest.approx(1 + 7 * 2)
    assert found.to_dict()["severities"] == [1, 5]
    half = ModelOracle(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).bfloat16(), cross_entropy)
    assert corruptions(half, [(x.bfloat16(), torch.randint(3, (6,)))], (1,)).examples == 6


def test_the_model_is_left_as_it_is():
    model = network()
    sharp = SharpnessAware(model, SAM(0.05), cross_entropy)
    before, random = everything(model), torch.get_rng_state()
    for mode in ("eval", "train", None):
        corruptions(sharp, batches(), (2,), mean=MEAN, std=STD, mode=mode)
        assert everything(model) == before
    assert model.training
    assert torch.equal(torch.get_rng_state(), random)
    seen: list[tuple[int, int]] = []
    corruptions(sharp, batches(), (2,), mean=MEAN, std=STD, progress=lambda *now: seen.append(now))
    assert seen[-1] == (8 * 13, 8 * 13)
    assert len(seen) == 8 * 2


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"data": iter(())}, ValueError, "no batches"),
        ({"severities": ()}, ValueError, "severities must be different numbers from 1 to 5, at least one"),
        ({"severities": 3}, TypeError, r"severities must be several numbers, such as \(1, 3, 5\), got 3"),
        ({"severities": (1, 1)}, ValueError, "severities must be different numbers"),
        ({"severities": (0,)}, ValueError, "a severity must be at least 1, got 0"),
        ({"severities": (6,)}, ValueError, "a severity must be at most 5, got 6"),
        ({"severities": ("high",)}, TypeError, "a severity must be an int, got 'high'"),
        ({"kinds": {}}, ValueError, "kinds is empty"),
        ({"kinds": {"it": 3}}, TypeError, "corruption 'it' must be a function"),
        ({"kinds": {"it": lambda x, s: x[:, :1]}}, ValueError, "corruption 'it' must return finite images of shape"),
        ({"kinds": {"it": lambda x, s: x * math.nan}}, ValueError, "corruption 'it' must return finite images"),
        ({"kinds": {"it": lambda x, s: None}}, TypeError, "corruption 'it' must return images, got NoneType"),
        (
            {"mean": 0.0, "std": 1.0},
            ValueError,
            r"in \[0, 1\], and those of batch 0 are from -\d.*: pass mean=",
        ),
        ({"mean": (0.1, 0.2)}, ValueError, "mean has 2 values, and the images have 3 channels"),
        ({"std": (0.2, 0.3, 0.0)}, ValueError, "std must be positive"),
        ({"std": "much"}, TypeError, "std must be a number"),
        ({"mean": ()}, ValueError, "mean is empty"),
        (
            {"data": [cases.batch()]},
            ValueError,
            r"images \(N, C, H, W\), and that of batch 0 is a tensor",
        ),
        ({"data": [({"x": 1}, cases.batch()[1])]}, ValueError, "that of batch 0 is dict"),
        ({"data": [(batches()[0][0] * math.nan, batches()[0][1])]}, ValueError, "are from nan to nan"),
    ],
    ids=cases.named,
)
def test_bad_input_is_one_line(arguments, error, said):
    settings = {"data": batches(), "mean": MEAN, "std": STD, **arguments}
    with pytest.raises(error, match=said) as raised:
        corruptions(ModelOracle(network(), cross_entropy), settings.pop("data"), **settings)
    assert "\n" not in str(raised.value)
