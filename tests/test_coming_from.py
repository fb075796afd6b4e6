"""The page on coming from other libraries: its code runs, and where it says that weights are the same, they are.

davda54/sam is not on PyPI. pytorch_optimizer's SAM has its interface, and stands in for it.
"""

from __future__ import annotations

import copy
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bisam
from bisam import ModelOracle, SharpnessAware
from bisam.perturbations import L2, PerGroup
from tests.support import cases

theirs = pytest.importorskip("pytorch_optimizer")

PAGE = (Path(__file__).parent.parent / "docs" / "coming-from.md").read_text()
BLOCKS: dict[str, list[str]] = {
    part.splitlines()[0]: re.findall(r"```python\n(.*?)```", part, re.DOTALL) for part in PAGE.split("\n## ")[1:]
}
SETTINGS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-3}
STEPS = 12


def loader() -> list[tuple[Tensor, Tensor]]:
    return [cases.batch(i) for i in range(STEPS)]


def net() -> nn.Module:
    torch.manual_seed(0)
    return cases.mlp(nn.BatchNorm1d)


@pytest.fixture
def davda54(monkeypatch):
    for name in ("sam", "utility", "utility.bypass_bn"):
        module = ModuleType(name)
        vars(module).update(vars(theirs))
        monkeypatch.setitem(sys.modules, name, module)


def run(code: str, **names: Any) -> dict[str, Any]:
    scope = {"torch": torch, "model": net(), "loader": loader(), "criterion": nn.CrossEntropyLoss(), **names}
    exec(compile(code, "docs/coming-from.md", "exec"), scope)
    return scope


def tolerance(text: str) -> float:
    return float(re.findall(r"the\s+same\s+to\s+(1e-\d+)", text)[0])


def distance(a: nn.Module, b: nn.Module) -> float:
    return max((p - q).abs().max().item() for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("section", ["The loop", "pytorch_optimizer"])
def test_before_and_after_train_the_same_weights(section, davda54):
    code = BLOCKS[section]
    before, after = (run(block) for block in code)
    between = PAGE[PAGE.index(code[0]) : PAGE.index(code[1])]
    assert 0 < distance(before["model"], after["model"]) < tolerance(between)
    assert distance(after["model"], net()) > 0.1
    for name, buffer in after["model"].named_buffers():
        twin = before["model"].get_buffer(name)
        if name.endswith("num_batches_tracked"):
            assert (buffer, twin) == (STEPS, 2 * STEPS)
        else:
            torch.testing.assert_close(buffer, twin, rtol=0, atol=tolerance(between))
    assert after["optimizer"].param_groups[0]["lr"] == before["scheduler"].get_last_lr()[0] < 0.1


def test_a_part_of_the_parameters_trains_the_same(davda54):
    before, after = (run(block) for block in BLOCKS["A part of the parameters"])
    said = tolerance(PAGE[PAGE.index("with `Only`") :])
    assert 0 < distance(before["model"], after["model"]) < said
    assert distance(after["model"], net()) > 0.1
    everything = run(BLOCKS["A part of the parameters"][1].replace("id(p) in held", "True"))
    assert distance(everything["model"], after["model"]) > 1e-3  # it is another method than SAM


def test_what_gsam_returned_is_in_clean():
    before, after = (run(block) for block in BLOCKS["pytorch_optimizer"])
    torch.testing.assert_close(after["sharp"].clean.outputs, before["outputs"].detach(), rtol=0, atol=1e-7)
    torch.testing.assert_close(after["sharp"].clean.value, before["loss"], rtol=0, atol=1e-7)


def test_the_scaled_loop_trains():
    (code,) = BLOCKS["GradScaler"]
    single = [(x.float(), y) for x, y in loader()]
    names = {"device": "cpu", "SAM": bisam.SAM, "L2": L2, "SharpnessAware": SharpnessAware, "loader": single}
    model = net().float()
    scope = run(code, model=model, **names)
    assert distance(model, net().float()) > 0.1
    assert scope["scaler"].get_scale() > 0


def test_a_scaler_cannot_step_theirs():
    model, scaler = net().float(), torch.amp.GradScaler("cpu")
    optimizer = theirs.SAM(model.parameters(), torch.optim.SGD, **SETTINGS)
    x, y = cases.batch()
    scaler.scale(nn.functional.cross_entropy(model(x.float()), y)).backward()
    with pytest.raises(Exception, match="closure"):
        scaler.step(optimizer)


def train_theirs(optimizer: torch.optim.Optimizer, model: nn.Module) -> int:
    """As its docstring says, with a backward pass before each step. How often the closure was called."""
    calls = 0
    for x, y in loader():

        def closure(x=x, y=y) -> Tensor:
            nonlocal calls
            calls += 1
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            return loss

        closure()
        optimizer.step(closure)
    return calls


def train_ours(method: Any, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> nn.Module:
    optimizer = optimizer or torch.optim.SGD(model.parameters(), **SETTINGS)
    sharp = SharpnessAware(model, method, nn.CrossEntropyLoss())
    if getattr(method, "decouple", False):
        optimizer = bisam.Decoupled(optimizer, sharp)
    for x, y in loader():
        sharp(x, y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def twins(make=cases.mlp) -> tuple[nn.Module, nn.Module]:
    model = make()
    return model, copy.deepcopy(model)


ROWS = re.findall(r"^\| `(\w+\(.*?params.*?)` \| `(.*?)`.*? \| ((?:the same|different).*?) \|$", PAGE, re.MULTILINE)


def built(expression: str, module: Any, model: nn.Module, settings: dict[str, float] | None = None) -> Any:
    scope = {**vars(module), "params": model.parameters(), "model": model, "SGD": torch.optim.SGD, "L2": L2}
    return eval(expression, {**scope, "settings": settings or SETTINGS})


def test_all_rows_were_found():
    assert [row[0].split("(")[0] for row in ROWS] == ["SAM", "SAM", "FriendlySAM", "WSAM", "WSAM", "LookSAM", "BSAM"]


@pytest.mark.parametrize(("before", "after", "weights"), ROWS)
def test_each_row_of_pytorch_optimizer_is_as_it_says(before, after, weights):
    model, twin = twins()
    train_theirs(built(before, theirs, model), model)
    apart = distance(model, train_ours(built(after, bisam, twin), twin))
    if weights.startswith("different"):
        assert apart > 1e-2
    else:
        assert apart < tolerance(weights)


def test_decoupled_wsam_is_coupled_wsam_with_plain_sgd():
    (_, after, _), (before, decoupled, _) = [row for row in ROWS if row[0].startswith("WSAM")]
    assert ("decouple" in before, decoupled) == (False, after.replace(")", ", decouple=True)"))
    model, twin = twins()
    train_theirs(built(before, theirs, model, {"lr": 0.1}), model)
    line = re.search(r"\* \*\*WSAM\*\*.*?(?=\n\*)", PAGE, re.DOTALL).group()
    plain = torch.optim.SGD(twin.parameters(), lr=0.1)
    assert distance(model, train_ours(built(after, bisam, twin), twin, plain)) < tolerance(line)


def test_looksam_of_one_tensor_is_the_same_and_theirs_takes_two_passes_at_each_step():
    before, after, _ = next(row for row in ROWS if row[0].startswith("LookSAM"))
    model, twin = twins(lambda: nn.Linear(6, 4, bias=False).double())
    assert train_theirs(built(before.replace("k=10", "k=5"), theirs, model), model) == 2 * STEPS
    line = re.search(r"\* \*\*LookSAM\*\*.*?(?=\n\*)", PAGE, re.DOTALL).group()
    ours = train_ours(built(after.replace("k=10", "k=5"), bisam, twin), twin)
    assert distance(model, ours) < tolerance(line)
    assert (bisam.LookSAM().k, theirs.LookSAM([nn.Parameter(torch.ones(1))], torch.optim.SGD, lr=1.0).k) == (5, 10)


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_a_checkpoint_of_theirs_goes_on_here(base):
    settings = SETTINGS if base is torch.optim.SGD else {"lr": 0.01}
    model, twin = cases.mlp(), cases.mlp()
    optimizer = theirs.SAM(model.parameters(), base, rho=0.05, **settings)
    train_theirs(optimizer, model)
    twin.load_state_dict(model.state_dict())
    state = copy.deepcopy(optimizer.state_dict())
    train_theirs(optimizer, model)
    resumed = base(twin.parameters(), **settings)
    resumed.load_state_dict(state)
    assert distance(model, train_ours(bisam.SAM(L2(0.05)), twin, resumed)) < 1e-8


def test_their_bsam_moves_weights_with_a_learning_rate_of_zero():
    model = cases.mlp()
    start = [p.detach().clone() for p in model.parameters()]
    train_theirs(theirs.BSAM(model.parameters(), num_data=1000, lr=0.0), model)
    assert max((p - q).abs().max().item() for p, q in zip(model.parameters(), start, strict=True)) > 1e-3


def test_a_closure_that_their_step_calls_alone_is_no_sam():
    model, twin = twins()
    optimizer = theirs.SAM(model.parameters(), torch.optim.SGD, rho=0.5, **SETTINGS)
    x, y = cases.batch()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    plain = torch.optim.SGD(twin.parameters(), **SETTINGS)
    nn.functional.cross_entropy(twin(x), y).backward()
    plain.step()
    assert distance(model, twin) == 0


@pytest.mark.parametrize("k", [2, 3])
def test_an_interval_that_ends_with_sam(k):
    expression = re.search(r"interval=k\)` \| `(.*?)`", PAGE)[1]
    model, twin = twins()
    sharps = [SharpnessAware(model, m, nn.CrossEntropyLoss()) for m in (bisam.ERM(), bisam.SAM(L2(0.05)))]
    optimizer = torch.optim.SGD(model.parameters(), **SETTINGS)
    for i, (x, y) in enumerate(loader(), start=1):
        sharps[i % k == 0](x, y).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (
        distance(
            model,
            train_ours(eval(expression, {**cases.public_names(), "L2": L2, "k": k}), twin),
        )
        == 0
    )


def test_the_methods_of_the_authors_code_exist():
    part = PAGE.split("\n## The BiSAM authors' code")[1].split("\n## ")[0]
    ours = re.findall(r"^\| .*? \| `(.*?)`", part, re.MULTILINE)
    scope = {
        **cases.public_names(),
        "L2": L2,
        "torch": torch,
        "rho": 0.05,
        "bound": bisam.Tanh(),
        "K": 10,
    }
    values = [eval(expression, scope) for expression in ours]
    assert [type(value).__name__ for value in values] == [*["SAM"] * 4, "ERM", "type", "CrossEntropyLoss"]
    assert [value.ascent for value in values[:4]] == [None, bisam.NegLog(), bisam.Tanh(), bisam.Tanh()]
    # Smoothing over the wrong classes alone, by its definition.
    z, y = torch.randn(5, 10).double(), torch.arange(5)
    right = nn.functional.one_hot(y, 10).double()
    target = right * 0.9 + (1 - right) * (0.1 / 9)
    torch.testing.assert_close(values[-1](z, y), -(target * z.log_softmax(1)).sum(1), rtol=0, atol=1e-12)


def test_an_optimizer_with_a_part_of_the_model_perturbs_that_part_only():
    """As here with the rest frozen, and other than here with the rest trainable."""
    model, twin = twins()
    other = copy.deepcopy(model)
    train_theirs(theirs.SAM(model[2].parameters(), torch.optim.SGD, rho=0.5, **SETTINGS), model)
    train_ours(bisam.SAM(0.5), other, torch.optim.SGD(other[2].parameters(), **SETTINGS))
    twin[0].requires_grad_(False)
    train_ours(bisam.SAM(0.5), twin, torch.optim.SGD(twin[2].parameters(), **SETTINGS))
    assert distance(model, twin) < 1e-8
    assert distance(model, other) > 1e-3


@pytest.mark.parametrize("bound", [bisam.NegLog(mu=5.0), bisam.Tanh(mu=10.0, alpha=0.1)], ids=str)
def test_the_authors_log_mu_times_the_objective(bound):
    expression = re.search(r"it is\s+`(mu \* .*?)`", PAGE)[1]
    model, (x, y) = cases.mlp(), cases.batch()
    sharp = SharpnessAware(model, bisam.SAM(0.05, ascent=bound), bisam.cross_entropy)
    sharp(x, y)
    logits = model(x).detach()
    logged = torch.stack(
        [(bound.mu * bound.phi(z - z[label])).logsumexp(0) for z, label in zip(logits, y, strict=True)]
    )
    value = eval(expression, {"mu": bound.mu, "sharp": sharp, "bound": bound})
    torch.testing.assert_close(value, logged.mean(), rtol=0, atol=1e-12)
    torch.testing.assert_close(sharp.clean.value, nn.functional.cross_entropy(logits, y), rtol=0, atol=1e-12)


# SAMPa and optax: their arithmetic in a few lines, on the weights as one vector.


def flat(tensors: Any) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


def gradient(model: nn.Module, w: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The gradient at the weights w."""
    there = copy.deepcopy(model)
    nn.utils.vector_to_parameters(w, there.parameters())
    x, y = batch
    return flat(torch.autograd.grad(nn.functional.cross_entropy(there(x), y), list(there.parameters())))


def stepped(w: Tensor, g: Tensor, buffer: Tensor | None) -> tuple[Tensor, Tensor]:
    """A step of SGD with the settings of this file, and the momentum buffer after it."""
    g = g + SETTINGS["weight_decay"] * w
    buffer = g if buffer is None else SETTINGS["momentum"] * buffer + g
    return w - SETTINGS["lr"] * buffer, buffer


def sampa(model: nn.Module, rho: float, lam: float, *, from_zero: bool) -> list[Tensor]:
    """The weights after each step. `from_zero`: the kept gradient starts at zero, as in the authors' code."""
    w, buffer, kept, before, path = flat(model.parameters()), None, None, None, []
    for batch in loader():
        if kept is None and from_zero:
            e, y = torch.zeros_like(w), w
        else:
            kept = gradient(model, w, batch) if kept is None else kept
            e, y = rho * kept / kept.norm(), stepped(w, kept, buffer)[0]
        h, kept = gradient(model, w + e, before or batch), gradient(model, y, batch)
        w, buffer = stepped(w, (1 - lam) * h + lam * kept, buffer)
        before = batch
        path.append(w)
    return path


def test_sampa_starts_as_the_paper_and_the_authors_with_a_plain_step():
    expression = re.search(r"^\| `--rho 0.1 --og 0.2` \| `(.*?)` \|$", PAGE, re.MULTILINE)[1]
    model, twin = twins()
    optimizer = torch.optim.SGD(twin.parameters(), **SETTINGS)
    method = eval(expression, {**cases.public_names(), "optimizer": optimizer})
    train_ours(method, twin, optimizer)
    authors, paper = (sampa(model, 0.1, 0.2, from_zero=zero) for zero in (True, False))
    torch.testing.assert_close(flat(twin.parameters()), paper[-1], rtol=0, atol=1e-9)
    w = flat(model.parameters())
    torch.testing.assert_close(authors[0], stepped(w, gradient(model, w, loader()[0]), None)[0], rtol=0, atol=1e-12)
    assert (authors[0] - paper[0]).abs().max() > 1e-4


def test_the_first_step_of_sampa_costs_one_more_gradient():
    model, calls = cases.mlp(), []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    optimizer = torch.optim.SGD(model.parameters(), **SETTINGS)
    sharp = SharpnessAware(model, bisam.SAMPa(0.1, ahead=bisam.next_step(optimizer)), bisam.cross_entropy)
    counts = []
    for x, y in loader()[:3]:
        calls.clear()
        sharp(x, y)
        counts.append(len(calls))
    assert counts == [3, 2, 2]


def optax_sam(model: nn.Module, rho: float, k: int) -> Tensor:
    """The weights after training with `contrib.sam` in opaque mode: k - 1 steps of length rho, then the optimizer's."""
    w, buffer = flat(model.parameters()), None
    for batch in loader():
        g, there = gradient(model, w, batch), w
        for _ in range(k - 1):
            there = there + rho * g / g.norm()
            g = gradient(model, there, batch)
        w, buffer = stepped(w, g, buffer)
    return w


@pytest.mark.parametrize("k", [2, 3, 4])
def test_several_adversarial_steps_of_optax(k):
    part = PAGE.split("\n## optax")[1].split("\n## ")[0]
    expressions = re.findall(r"^\| .* \| `(.*?)` \|$", part, re.MULTILINE)
    assert len(expressions) == 2
    rho, names = 0.3, {**cases.public_names(), "k": k, "rho": 0.3}
    model = cases.mlp()
    expected = optax_sam(model, rho, k)
    for expression in expressions if k == 2 else expressions[1:]:
        twin = train_ours(eval(expression, names), copy.deepcopy(model))
        assert (flat(twin.parameters()) - expected).abs().max() < tolerance(part)
    with_same_rho = train_ours(bisam.MultiStepSAM(rho, steps=k - 1), copy.deepcopy(model))
    assert ((flat(with_same_rho.parameters()) - expected).abs().max() > 1e-3) == (k > 2)
    length = eval(expressions[1], names).climb(ModelOracle(model, bisam.cross_entropy), cases.batch()).norm()
    assert max(1, 0.9 * (k - 1)) * rho - 1e-12 <= length <= (k - 1) * rho + 1e-12


def test_a_zero_gradient_displaces_nothing():
    model = cases.mlp()
    sharp = SharpnessAware(model, bisam.MultiStepSAM(0.1, steps=2), lambda z, y: 0 * z.sum(1))
    sharp(*cases.batch()).backward()
    assert all(p.grad.eq(0).all() for p in model.parameters())


def test_a_rho_for_each_parameter_group():
    """The groups share one norm, and each has its own radius."""

    def groups(model: nn.Module) -> list[dict[str, Any]]:
        first, *rest = model.parameters()
        return [{"params": [first], "rho": 0.3}, {"params": rest, "rho": 0.05}]

    ours = cases.mlp()
    other = copy.deepcopy(ours)
    before, optimizer = (
        theirs.SAM(groups(other), torch.optim.SGD, **SETTINGS),
        torch.optim.SGD(groups(ours), **SETTINGS),
    )
    sharp, criterion = (
        SharpnessAware(ours, bisam.SAM(PerGroup.of(optimizer)), bisam.cross_entropy),
        nn.CrossEntropyLoss(),
    )
    for x, y in loader():
        criterion(other(x), y).backward()
        before.first_step(zero_grad=True)
        criterion(other(x), y).backward()
        before.second_step(zero_grad=True)
        sharp(x, y).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert distance(ours, other) < 1e-8
