"""Curvature: against the dense Hessian and closed forms."""

from __future__ import annotations

from statistics import fmean, stdev
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("curvlinops")
pytest.importorskip("bisam.analysis.operators")  # loads torch's forward mode, which warns when it is first used

from bisam import SAM, ModelOracle, NegLog, SharpnessAware, cross_entropy
from bisam.analysis import eigenvalues, spectral_density, trace
from bisam.objectives import CrossEntropy
from tests.analysis.test_sharpness import Bowl
from tests.support import cases
from tests.support.cases import everything
from tests.support.doubles import ROWS

DATA = [cases.batch(0, 16), cases.batch(1, 8)]


def dense(model: nn.Module, loss: Any, gauss_newton: bool = False) -> Tensor:
    """The Hessian of the mean loss over `DATA`, by torch.func on the flat weights."""
    names, shapes = zip(*[(n, p.shape) for n, p in model.named_parameters()], strict=True)
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    x, y = (torch.cat(parts) for parts in zip(*DATA, strict=True))

    def outputs(w: Tensor) -> Tensor:
        parts = w.split([s.numel() for s in shapes])
        named = {n: p.view(s) for n, p, s in zip(names, parts, shapes, strict=True)}
        return torch.func.functional_call(model, named, (x,))

    if not gauss_newton:
        return torch.func.hessian(lambda w: loss(outputs(w), y).mean())(flat)
    jacobian = torch.func.jacrev(outputs)(flat).flatten(0, 1)
    inner = torch.func.hessian(lambda z: loss(z.view(len(y), -1), y).mean())(outputs(flat).flatten())
    return jacobian.T @ inner @ jacobian


@pytest.mark.parametrize(("by", "tolerance"), [("curvlinops", 1e-9), ("differences", 1e-6)])
def test_the_eigenvalues_are_those_of_the_dense_hessian(by, tolerance):
    model = cases.mlp().eval()
    exact = torch.linalg.eigvalsh(dense(model, cross_entropy)).flip(0)
    found = eigenvalues(ModelOracle(model, cross_entropy), DATA, k=4, by=by, tolerance=1e-10)
    torch.testing.assert_close(torch.tensor(found.values, dtype=torch.double), exact[:4], rtol=tolerance, atol=0)
    assert found.by == by
    assert found.products > 4
    assert found.examples == 24


def test_the_gauss_newton_matrix_is_the_dense_one():
    model = cases.mlp().eval()
    exact = torch.linalg.eigvalsh(dense(model, cross_entropy, gauss_newton=True)).flip(0)
    found = eigenvalues(ModelOracle(model, cross_entropy), DATA, k=3, matrix="ggn", tolerance=1e-10)
    torch.testing.assert_close(torch.tensor(found.values, dtype=torch.double), exact[:3], rtol=1e-9, atol=0)


def fisher(model: nn.Module, empirical: bool, loss: Any = cross_entropy) -> Tensor:
    """The mean of outer products of per-example gradients, with the labels of the data or those of the model."""
    weights, total = list(model.parameters()), 0.0
    for x, y in zip(*(torch.cat(parts) for parts in zip(*DATA, strict=True)), strict=True):
        z = model(x[None])
        for label, p in [(y, 1.0)] if empirical else list(enumerate(z.softmax(1)[0].tolist())):
            grads = torch.autograd.grad(loss(z, torch.as_tensor(label)[None]).sum(), weights, retain_graph=True)
            g = torch.cat([one.flatten() for one in grads])
            total = total + p * torch.outer(g, g)
    return total / 24


SMOOTH = nn.CrossEntropyLoss(label_smoothing=0.2, reduction="none")


@pytest.mark.parametrize(
    ("matrix", "loss", "dense_loss"),
    [
        ("fisher", cross_entropy, cross_entropy),
        ("fisher", SMOOTH, cross_entropy),  # the labels of a Fisher matrix are the model's own
        ("fisher", nn.CrossEntropyLoss(), cross_entropy),
        ("empirical-fisher", cross_entropy, cross_entropy),
        ("empirical-fisher", SMOOTH, SMOOTH),
        ("empirical-fisher", nn.CrossEntropyLoss(label_smoothing=0.2), SMOOTH),
    ],
    ids=cases.named,
)
def test_a_fisher_matrix_is_that_of_gradients_of_single_examples(matrix, loss, dense_loss):
    model = cases.mlp().eval()
    exact = fisher(model, matrix != "fisher", dense_loss)
    found = eigenvalues(ModelOracle(model, loss), DATA, k=3, matrix=matrix, tolerance=1e-10)
    values = torch.linalg.eigvalsh(exact).flip(0)[:3]
    torch.testing.assert_close(torch.tensor(found.values, dtype=torch.double), values, rtol=1e-8, atol=0)
    assert (found.matrix, found.by) == (matrix, "curvlinops")
    estimate = trace(ModelOracle(model, loss), DATA, matrix=matrix, draws=50)
    assert abs(estimate.value - float(exact.trace())) < 4 * estimate.error


@pytest.mark.parametrize(
    ("loss", "matrix", "said"),
    [
        (
            nn.CrossEntropyLoss(weight=torch.ones(4).double()),
            "fisher",
            "CrossEntropyLoss is not the cross-entropy of lo",
        ),
        (
            nn.MultiMarginLoss(),
            "fisher",
            "MultiMarginLoss is not the cross-entropy of logits without weights: matrix='ggn' can serve",
        ),
        (
            nn.CrossEntropyLoss(weight=torch.ones(4).double()),
            "empirical-fisher",
            "TypeError: the loss is not one number",
        ),
        (NegLog(), "empirical-fisher", "not the empirical Fisher matrix, and curvlinops cannot serve here"),
    ],
    ids=cases.named,
)
def test_a_fisher_matrix_that_cannot_be_had_is_refused_by_name(loss, matrix, said):
    with pytest.raises(ValueError, match=said) as raised:
        trace(ModelOracle(cases.mlp(), loss), DATA, matrix=matrix)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("by", ["curvlinops", "differences"])
@pytest.mark.parametrize("loss", [cross_entropy, SMOOTH], ids=["plain", "smoothed"])
def test_the_eigenvalues_of_a_convnet_with_normalisation_are_those_of_the_dense_hessian(loss, by):
    model = cases.convnet()
    for x, _ in DATA:
        model(3 * x + 1)
    model.eval()
    exact = torch.linalg.eigvalsh(dense(model, loss)).flip(0)
    oracle = ModelOracle(model.train(), loss)  # eval mode is the default of the measure
    found = eigenvalues(oracle, DATA, k=3, by=by, tolerance=1e-10)
    torch.testing.assert_close(torch.tensor(found.values, dtype=torch.double), exact[:3], rtol=1e-6, atol=0)


@pytest.mark.parametrize(("by", "tolerance"), [("curvlinops", 1e-4), ("differences", 1e-2)])
def test_the_eigenvalues_in_float32(by, tolerance):
    model = cases.convnet().eval()
    exact = torch.linalg.eigvalsh(dense(model, cross_entropy)).flip(0)
    single = [(x.float(), y) for x, y in DATA]
    found = eigenvalues(ModelOracle(model.float(), cross_entropy), single, k=3, by=by)
    assert list(found.values) == pytest.approx(exact[:3].tolist(), rel=tolerance)


def test_a_quadratic_has_its_own_eigenvalues_and_trace():
    oracle, a = Bowl(0.3, -1.2), ROWS.mean(0)
    found = eigenvalues(oracle, [(ROWS,)], k=2, mode=None)
    assert found.values == pytest.approx(sorted(a.tolist(), reverse=True), rel=1e-9)
    assert found.by == "differences"
    assert trace(oracle, [(ROWS,)], draws=2, mode=None).value == pytest.approx(float(a.sum()), rel=1e-9)


@pytest.mark.parametrize("by", ["curvlinops", "differences"])
def test_the_trace_is_within_its_error(by):
    model = cases.mlp().eval()
    found = trace(ModelOracle(model, cross_entropy), DATA, draws=200, by=by)
    assert abs(found.value - float(dense(model, cross_entropy).trace())) < 4 * found.error
    assert found.error < 0.2 * found.value
    assert found.products == len(found.values) == 200
    assert (found.value, found.error) == pytest.approx((fmean(found.values), stdev(found.values) / 200**0.5), rel=1e-12)


def test_the_trace_is_drawn_around_its_mean():
    pytest.importorskip("matplotlib").use("Agg")
    axes = trace(ModelOracle(cases.mlp().eval(), cross_entropy), DATA, draws=4).plot()
    assert axes.get_ylabel() == "estimate of the trace"
    points, mean = axes.lines
    assert fmean(points.get_ydata()) == pytest.approx(mean.get_ydata()[0], rel=1e-12)


def test_the_density_is_that_of_the_dense_hessian():
    """Its integral is 1 and its mean the mean of the eigenvalues."""
    model = cases.mlp().eval()
    values = torch.linalg.eigvalsh(dense(model, cross_entropy))
    found = spectral_density(ModelOracle(model, cross_entropy), DATA, vectors=40, draws=10)
    grid, density = torch.tensor(found.grid).double(), torch.tensor(found.density).double()
    total = torch.trapezoid(density, grid)
    assert float(total) == pytest.approx(1, abs=0.02)
    spread = float(values.max() - values.min())
    assert float(torch.trapezoid(density * grid, grid)) == pytest.approx(float(values.mean()), abs=0.02 * spread)
    assert len(found.to_dict()["grid"]) == 512


def test_the_density_of_a_singular_matrix_is_cheap():
    """Most eigenvalues of a Gauss-Newton matrix are 0, where a relative tolerance is never reached."""
    model = cases.mlp().eval()
    values = torch.linalg.eigvalsh(dense(model, cross_entropy, gauss_newton=True))
    found = spectral_density(ModelOracle(model, cross_entropy), DATA, vectors=20, draws=2, matrix="ggn")
    assert found.products < 20 * 2 + 60
    assert found.grid[0] < 0 < float(values.max()) < found.grid[-1]
    assert float(torch.trapezoid(torch.tensor(found.density), torch.tensor(found.grid))) == pytest.approx(1, abs=0.05)


def test_the_density_of_a_concave_loss_has_both_ends():
    model = cases.mlp().eval()
    values = torch.linalg.eigvalsh(dense(model, lambda z, y: -cross_entropy(z, y)))
    oracle = ModelOracle(model, lambda z, y: -cross_entropy(z, y))
    found = spectral_density(oracle, DATA, vectors=20, draws=1)
    assert found.grid[0] < float(values.min()) < float(values.max()) < found.grid[-1]


class Dictionary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = cases.mlp()

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.net(inputs["x"])


def test_what_curvlinops_cannot_serve_is_computed_by_differences():
    model = cases.mlp().eval()
    expected = eigenvalues(ModelOracle(model, cross_entropy), DATA, k=2).values
    wrapped = Dictionary()
    wrapped.net.load_state_dict(model.state_dict())
    named = [({"x": x}, y) for x, y in DATA]
    own = ModelOracle(model, cross_entropy, forward=lambda m, x, y: (m(x), y))
    ignoring = [(torch.cat([x, x[:2]]), torch.cat([y, torch.tensor([-100, -100])])) for x, y in DATA]
    for oracle, data in (
        (ModelOracle(wrapped, cross_entropy), named),
        (own, DATA),
        (ModelOracle(model, CrossEntropy()), ignoring),
    ):
        found = eigenvalues(oracle, data, k=2)
        assert found.by == "differences"
        assert found.values == pytest.approx(expected, rel=1e-4)
    assert eigenvalues(ModelOracle(model, NegLog()), DATA).by == "differences"  # its gradient is written by hand


@pytest.mark.parametrize("loss", [lambda z, y: F.cross_entropy(z, y, reduction="none"), cross_entropy, F.cross_entropy])
@pytest.mark.parametrize("kind", ["lengths", "ignored", "equal"])
def test_each_label_counts_the_same_in_sequences(kind, loss):
    """Curvlinops weights a batch with its number of examples, and so serves if all of them have as many labels."""
    model = nn.Conv1d(6, 4, 1).double()
    lengths = (2, 5) if kind == "lengths" else (3, 3)
    data = [(torch.randn(4, 6, n).double(), torch.randint(4, (4, n))) for n in lengths]
    if kind == "ignored":
        data[0][1][:3] = -100
        loss = cross_entropy if loss is not F.cross_entropy else loss
    parts = [(z.movedim(1, -1).flatten(0, 1), y.flatten()) for z, y in data]
    x, y = (torch.cat(of) for of in zip(*parts, strict=True))

    def mean(w: Tensor, b: Tensor) -> Tensor:
        return F.cross_entropy(x @ w[..., 0].T + b, y)

    blocks = torch.autograd.functional.hessian(mean, (model.weight.detach(), model.bias.detach()))
    rows = [torch.cat([part.reshape(n, -1) for part in row], 1) for row, n in zip(blocks, (24, 4), strict=True)]
    found = eigenvalues(ModelOracle(model, loss), data, k=3, tolerance=1e-10)
    assert found.values == pytest.approx(torch.linalg.eigvalsh(torch.cat(rows)).flip(0)[:3].tolist(), rel=1e-5)
    assert found.by == ("curvlinops" if kind == "equal" else "differences")


@pytest.mark.parametrize("by", ["curvlinops", "differences"])
def test_the_model_is_left_as_it_is(by):
    model = cases.normed()
    sharp = SharpnessAware(model, SAM(), cross_entropy)
    before, random = everything(model), torch.get_rng_state()
    eigenvalues(sharp, DATA, by=by)
    trace(sharp, DATA, draws=2, by=by)
    spectral_density(sharp, DATA, vectors=3, draws=1, by=by)
    assert everything(model) == before
    assert model.training
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"k": 0}, "k must be at least 1"),
        ({"k": 10_000}, "k=10000 eigenvalues are more than the"),
        ({"matrix": "kfac"}, "matrix must be 'hessian', 'ggn', 'fisher', 'empirical-fisher', got 'kfac'"),
        ({"by": "magic"}, "by must be 'curvlinops', 'differences' or None"),
        ({"tolerance": 0.0}, "tolerance"),
        ({"matrix": "ggn", "by": "differences"}, "the Hessian only, not the Gauss-Newton matrix"),
        ({"matrix": "fisher", "by": "differences"}, "the Hessian only, not the Fisher matrix"),
    ],
    ids=str,
)
def test_bad_input_is_one_line(how, said):
    with pytest.raises(ValueError, match=said) as raised:
        eigenvalues(ModelOracle(cases.mlp(), cross_entropy), DATA, **how)
    assert "\n" not in str(raised.value)


def test_exact_products_that_cannot_be_had_are_refused_by_name():
    own = ModelOracle(cases.mlp(), cross_entropy, forward=lambda m, x, y: (m(x), y))
    with pytest.raises(ValueError, match=r"exact products here \(the loss has a forward= of its own\): pass by="):
        eigenvalues(own, DATA, by="curvlinops")
    with pytest.raises(ValueError, match="Gauss-Newton matrix, and curvlinops cannot serve here"):
        eigenvalues(own, DATA, matrix="ggn")
