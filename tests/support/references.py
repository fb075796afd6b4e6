"""Slow twins: each method again in a few lines on one flat vector, written from the paper and not from the library."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from math import ceil, cos, e as euler, exp, inf, log, pi
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

Grad = Callable[[Tensor], Tensor]  # gradient at a flat point
Loss = Callable[[Tensor, Tensor], Tensor]  # outputs and labels to one loss per example
Climb = Callable[[Tensor, Tensor, "Step"], Tensor]  # gradient, weights and step to a displacement
Twin = Callable[[Tensor, "Step"], Tensor]  # weights and step to a gradient


def q(phi: Callable[[Tensor], Tensor], mu: float, logits: Tensor, labels: Tensor) -> Tensor:
    """Xie et al., 2024, Lemma 3.1, with its sums written out."""
    right = logits.gather(1, labels[:, None])[:, 0]
    return sum(torch.exp(mu * phi(logits[:, j] - right)) for j in range(logits.shape[1])).log() / mu


def phi_log(x: Tensor) -> Tensor:
    return 1 - torch.log1p(torch.exp(log(euler - 1) - x))


def phi_tanh(alpha: float) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.tanh(alpha * x)


def q_wrong(phi: Callable[[Tensor], Tensor], mu: float, margin: float | None, logits: Tensor, labels: Tensor) -> Tensor:
    """The same sum over the wrong classes alone, example by example, times a weight of the margin."""
    values = []
    for row, y in zip(logits, labels.tolist(), strict=True):
        wrong = [row[j] for j in range(len(row)) if j != y]
        terms = [mu * phi(z - row[y]) for z in wrong]
        top = max(term.item() for term in terms)  # exp of it may be 0
        value = (top + torch.stack([torch.exp(term - top) for term in terms]).sum().log()) / mu
        lead = row[y].item() - max(z.item() for z in wrong)
        values.append(value if margin is None else value * exp(-max(lead, 0.0) / margin))
    return torch.stack(values)


def obf(gamma: float, lam: float, sigmoid: bool, logits: Tensor, labels: Tensor) -> Tensor:
    """Vani et al., 2024: a linear function of the logits whose gradient is that of the authors' code, as a formula."""
    k = logits.shape[1]
    p = (torch.sigmoid(logits) if sigmoid else logits.exp() / logits.exp().sum(1, keepdim=True)).detach()
    right = torch.eye(k, dtype=logits.dtype)[labels]
    alpha = gamma * ((1 - lam / p) / (1 - lam)).clamp(min=0)[right > 0][:, None]
    return ((1 / k - alpha * p - (1 - alpha) * right) * logits).sum(1)


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def load(model: nn.Module, w: Tensor) -> None:
    with torch.no_grad():
        for p, part in zip(model.parameters(), w.split([p.numel() for p in model.parameters()]), strict=True):
            p.copy_(part.view_as(p))


def gradient(model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Grad:
    """The gradient of the mean loss as a function of one flat vector; buffers are constants of the batch."""
    names = [n for n, _ in model.named_parameters()]
    shapes = [p.shape for p in model.parameters()]
    buffers = {n: b.clone() for n, b in model.named_buffers()}

    def at(w: Tensor) -> Tensor:
        w = w.detach().requires_grad_()
        parts = w.split([s.numel() for s in shapes])
        weights = {n: p.view(s) for n, p, s in zip(names, parts, shapes, strict=True)}
        copies = {n: b.clone() for n, b in buffers.items()}
        return torch.autograd.grad(loss(functional_call(model, {**weights, **copies}, x), y).mean(), w)[
            0
        ].resolve_conj()

    return at


# The family. A twin maps weights to the gradient that an optimizer gets; a climber maps a gradient to a displacement.


@dataclass
class Step:
    """A training step as a slow twin sees it; random numbers are the global generator's, one tensor per parameter."""

    model: nn.Module  # never trained: its shapes, names and buffers
    batch: tuple[Tensor, Tensor]
    optimizer: torch.optim.Optimizer  # of the flat weights
    number: int = 0
    memory: dict[str, Any] = field(default_factory=dict)
    micro: int | None = None  # a gradient is the mean over micro-batches of so many examples

    def grad(self, w: Tensor, loss: Loss, batch: tuple[Tensor, Tensor] | None = None) -> Tensor:
        x, y = batch or self.batch
        if self.micro is None:
            return gradient(self.model, loss, x, y)(w)
        parts = zip(x.split(self.micro), y.split(self.micro), strict=True)
        return sum(len(a) * gradient(self.model, loss, a, b)(w) for a, b in parts) / len(x)

    def losses(self, w: Tensor, loss: Loss) -> Tensor:
        return loss(self.outputs(w), self.batch[1])

    def outputs(self, w: Tensor) -> Tensor:
        names = [n for n, _ in self.model.named_parameters()]
        copies = {n: b.clone() for n, b in self.model.named_buffers()}
        return functional_call(self.model, dict(zip(names, self.parts(w), strict=True)) | copies, self.batch[0])

    def parts(self, w: Tensor) -> list[Tensor]:
        shapes = [p.shape for p in self.model.parameters()]
        return [part.view(s) for part, s in zip(w.split([s.numel() for s in shapes]), shapes, strict=True)]

    def which(self, rule: Callable[[str, Tensor], bool]) -> Tensor:
        """1 in the entries of the parameters that the rule of name and shape takes, else 0."""
        return join([torch.full_like(p.abs(), float(rule(name, p))) for name, p in self.model.named_parameters()])

    def noise(self) -> list[Tensor]:
        return [torch.randn(p.shape, dtype=p.dtype) for p in self.model.parameters()]

    def part(self, name: str, number: int | None = None) -> Step:
        """For a twin inside another: the same step with a memory of its own."""
        number = self.number if number is None else number
        return replace(self, number=number, memory=self.memory.setdefault(name, {}))

    def on(self, rows: Tensor) -> Step:
        return replace(self, batch=(self.batch[0][rows], self.batch[1][rows]))


def join(parts: list[Tensor]) -> Tensor:
    return torch.cat([p.reshape(-1) for p in parts])


def inner(a: Tensor, b: Tensor) -> Tensor:
    """The inner product of the real and imaginary parts."""
    return (a.conj() * b).real.sum()


def unit(v: Tensor) -> Tensor:
    return v / v.norm()


def share(keep: float, n: int) -> int:
    return ceil(keep * n - 1e-9)


def largest(scores: Tensor, k: int) -> Tensor:
    """1 at the k largest scores, else 0."""
    return torch.zeros_like(scores).index_fill(0, scores.argsort(descending=True)[:k], 1.0)


def biased(name: str, p: Tensor) -> bool:
    return p.dim() < 2  # in the models of the tests: biases and norm layers


# Climbers.


def l2(rho: float | Callable[[Step], float]) -> Climb:
    return lambda g, w, s: (rho(s) if callable(rho) else rho) * unit(g)


def adaptive(rho: float, eta: float = 0.0, where: Callable[[str, Tensor], bool] = lambda name, p: True) -> Climb:
    def climber(g: Tensor, w: Tensor, s: Step) -> Tensor:
        t = torch.where(s.which(where) > 0, w.abs() + eta, 1.0)
        return rho * t**2 * g / (t * g).norm()

    return climber


def loss_equated(sigma: Callable[[Step], float], rho_max: float) -> Climb:
    return lambda g, w, s: min(sigma(s) / g.norm(), rho_max) * unit(g)


def friendly(climb: Climb, sigma: float, lam: float) -> Climb:
    def climber(g: Tensor, w: Tensor, s: Step) -> Tensor:
        d = g - sigma * s.memory["m"] if "m" in s.memory else g
        s.memory["m"] = lam * s.memory.get("m", g) + (1 - lam) * g
        return climb(d, w, s.part("inner"))

    return climber


def smoothed(climb: Climb, theta: float) -> Climb:
    def climber(g: Tensor, w: Tensor, s: Step) -> Tensor:
        s.memory["d"] = (1 - theta) * s.memory.get("d", g) + theta * g
        return climb(s.memory["d"], w, s.part("inner"))

    return climber


def outstanding(climb: Climb, keep: float) -> Climb:
    def filtered(g: Tensor) -> Tensor:
        if g.dim() < 2:
            return g
        z = ((g - g.mean()) / g.std()).abs().reshape(-1)
        return largest(z, share(keep, g.numel())).view_as(g) * g

    return lambda g, w, s: climb(join([filtered(p) for p in s.parts(g)]), w, s)


def per_tensor(rho: float) -> Climb:
    return lambda g, w, s: join([rho * p / p.norm() if p.norm() > 0 else p for p in s.parts(g)])


def centralised(climb: Climb) -> Climb:
    """Yong et al., 2020: each row of a matrix minus its mean; a kernel is a matrix with a row for each channel."""

    def centred(g: Tensor) -> Tensor:
        if g.dim() < 2:
            return g
        rows = g.reshape(len(g), -1)
        return (rows - rows.sum(1, keepdim=True) / rows.shape[1]).view_as(g)

    return lambda g, w, s: climb(join([centred(p) for p in s.parts(g)]), w, s)


def norm_layers(climb: Climb, rule: Callable[[str, Tensor], bool]) -> Climb:
    return lambda g, w, s: climb(s.which(rule) * g, w, s)


def per_group(climbs: list[Climb], rules: list[Callable[[str, Tensor], bool]], *, together: bool) -> Climb:
    """The rules exclude each other."""

    def climber(g: Tensor, w: Tensor, s: Step) -> Tensor:
        masks = [s.which(rule) for rule in rules]
        whole = sum(masks) * g
        e = torch.zeros_like(g)
        for i, (climb, mask) in enumerate(zip(climbs, masks, strict=True)):
            e = e + mask * climb(whole if together else mask * g, w, s.part(f"group {i}"))
        return e

    return climber


def only(climb: Climb, rule: Callable[[str, Tensor], bool]) -> Climb:
    return lambda g, w, s: s.which(rule) * climb(s.which(rule) * g, w, s.part("inner"))


def drawn(beta: float, per: str, s: Step, w: Tensor, rule: Callable[[str, Tensor], bool] | None = None) -> Tensor:
    """1 in the entries of a random part, else 0; of the tensors that the rule takes, one is drawn at least."""
    parts = s.parts(w.abs())
    if per == "entry":
        return join([torch.ones_like(p) * (torch.rand(p.shape) < beta) for p in parts])
    draws = torch.rand(len(parts))
    if rule is not None:
        draws = torch.where(torch.tensor([rule(n, p) for n, p in s.model.named_parameters()]), draws, 2.0)
    chosen = draws < beta if (draws < beta).any() else draws == draws.min()
    return join([torch.ones_like(p) * c for p, c in zip(parts, chosen, strict=True)])


def random_mask(climb: Climb, beta: float, per: str, rule: Callable[[str, Tensor], bool] | None = None) -> Climb:
    def climber(g: Tensor, w: Tensor, s: Step) -> Tensor:
        mask = drawn(beta, per, s, w, rule)
        return mask * climb(mask * g, w, s.part("inner")) / beta

    return climber


def masked_afterwards(climb: Climb, beta: float) -> Climb:
    """The random mask of a perturbation that needs the whole gradient."""

    def climber(g: Tensor, w: Tensor, s: Step) -> Tensor:
        e, parts = climb(g, w, s.part("inner")), s.parts(g)
        draws = torch.rand(len(parts))
        return e / beta * join([torch.ones_like(p) * (u < beta) for p, u in zip(parts, draws, strict=True)])

    return climber


def fisher_mask(climb: Climb, keep: float, every: int) -> Climb:
    def climber(g: Tensor, w: Tensor, s: Step) -> Tensor:
        free = s.which(biased)
        if s.number % every == 0:
            s.memory["mask"] = free + largest(
                torch.where(free > 0, -1, g.abs() ** 2), share(keep, int((1 - free).sum()))
            )
        return s.memory["mask"] * climb(g, w, s.part("inner"))

    return climber


def drop_grow(climb: Climb, keep: float, drop: float, every: int, steps: int | None = None) -> Climb:
    def climber(g: Tensor, w: Tensor, s: Step) -> Tensor:
        n = share(keep, len(g))
        if s.number % every == 0:
            noise, mask = (
                join([torch.rand(p.shape) for p in s.parts(g)]),
                s.memory.get("mask", torch.zeros_like(g.abs())),
            )
            dropped = n if s.number == 0 else int(n * drop * (1 + cos(pi * s.number / (steps or inf))) / 2)
            kept = largest(torch.where(mask > 0, g.abs(), -1), n - dropped)
            s.memory["mask"] = kept + largest(torch.where(mask > 0, -1, noise), dropped)
        return s.memory["mask"] * climb(g, w, s.part("inner"))

    return climber


# Twins.


def erm(loss: Loss) -> Twin:
    return lambda w, s: s.grad(w, loss)


def climbing(climb: Climb, ascent: Loss, descent: Loss) -> Twin:
    return lambda w, s: s.grad(w + climb(s.grad(w, ascent), w, s), descent)


def of_step(make: Callable[[int], Twin]) -> Twin:
    """A twin that depends on the number of the step."""
    return lambda w, s: make(s.number)(w, s)


def flip_rate(
    climb: Callable[[float], Climb], ascent: Loss, descent: Loss, target: float, start: float, gain: float, high: float
) -> Twin:
    """A radius that is multiplied after each step, and predictions that are compared one by one."""

    def twin(w: Tensor, s: Step) -> Tensor:
        rho = s.memory.setdefault("rho", start)
        at = w + climb(rho)(s.grad(w, ascent), w, s.part("climb"))
        there, here = (s.outputs(v).argmax(1).tolist() for v in (at, w))
        flipped = [a == y != b for a, b, y in zip(here, there, s.batch[1].tolist(), strict=True)]
        s.memory["rho"] = min(high, rho * exp(gain * (1 - sum(flipped) / len(flipped) / target)))
        return s.grad(at, descent)

    return twin


def multi_step(climb: Climb, ascent: Loss, descent: Loss, n: int) -> Twin:
    def twin(w: Tensor, s: Step) -> Tensor:
        e = torch.zeros_like(w)
        for i in range(n):
            e = e + climb(s.grad(w + e, ascent), w, s.part(str(i))) / n
        return s.grad(w + e, descent)

    return twin


def eigen_sam(
    climb: Climb, ascent: Loss, descent: Loss, alpha: float, every: int, iterations: int = 5, r: float = 0.01
) -> Twin:
    """Differences of gradients of the model in eval mode, with the running statistics of the training so far."""

    def twin(w: Tensor, s: Step) -> Tensor:
        g = s.grad(w, ascent)
        still = copy.deepcopy(s.model)
        for name, b in still.named_buffers():
            b.copy_(s.memory.get("buffers", {}).get(name, b))
        load(still, w)
        still(s.batch[0])
        s.memory["buffers"] = {n: b.clone() for n, b in still.named_buffers()}
        if s.number % every == 0:
            v, slope = s.memory.get("v", None), gradient(still.eval(), descent, *s.batch)
            v = join(s.noise()) if v is None else v
            for _ in range(iterations):
                v = unit(slope(w + r * unit(v)) - slope(w - r * unit(v)))
            s.memory["v"] = v
        v = s.memory["v"]
        up = v - inner(v, unit(g)) * unit(g)
        d = unit(g) + alpha * torch.sign(inner(g, v)) * up
        return s.grad(w + d.norm() * climb(g.norm() * d, w, s.part("inner")), descent)

    return twin


def sam_sps(climb: Climb, ascent: Loss, descent: Loss, floor: float, most: float, decay: float) -> Twin:
    def twin(w: Tensor, s: Step) -> Tensor:
        e = climb(s.grad(w, ascent), w, s)
        h, value = s.grad(w + e, descent), s.losses(w + e, descent).mean()
        gamma = max(value - floor - inner(h, e), 0.0) / inner(h, h)
        return min(gamma, most) * (h + decay * w)

    return twin


def esam(climb: Climb, ascent: Loss, descent: Loss, select: Loss, gamma: float) -> Twin:
    def twin(w: Tensor, s: Step) -> Tensor:
        e = climb(s.grad(w, ascent), w, s)
        rise = s.losses(w + e, select) - s.losses(w, select)
        above = max(1, int(gamma * len(rise)) - 1)  # the threshold is the value after these
        return s.on(rise.topk(above).indices).grad(w + e, descent)

    return twin


def gsam(climb: Climb, ascent: Loss, descent: Loss, alpha: float) -> Twin:
    def twin(w: Tensor, s: Step) -> Tensor:
        g, h = s.grad(w, descent), climbing(climb, ascent, descent)(w, s)
        return h - alpha * (g - inner(g, h) / inner(h, h) * h)

    return twin


def wsam(climb: Climb, ascent: Loss, descent: Loss, gamma: float) -> Twin:
    def twin(w: Tensor, s: Step) -> Tensor:
        g, h = s.grad(w, descent), climbing(climb, ascent, descent)(w, s)
        return g + gamma / (1 - gamma) * (h - g)

    return twin


def gnp(climb: Climb, ascent: Loss, descent: Loss, alpha: float) -> Twin:
    """Zhao et al., 2022, eq. 11."""
    return lambda w, s: (1 - alpha) * s.grad(w, descent) + alpha * climbing(climb, ascent, descent)(w, s)


def stable_sam(climb: Climb, ascent: Loss, descent: Loss) -> Twin:
    return lambda w, s: s.grad(w, descent).norm() * unit(climbing(climb, ascent, descent)(w, s))


def sagm(climb: Climb, ascent: Loss, descent: Loss, alpha: float) -> Twin:
    def twin(w: Tensor, s: Step) -> Tensor:
        g = s.grad(w, descent)
        e = climb(s.grad(w, ascent), w, s)
        return (g + s.grad(w + e - alpha * g, descent)) / 2

    return twin


def bilateral_sam(climb: Climb, ascent: Loss, descent: Loss, behind: Callable[[Step], float] = lambda s: 1.0) -> Twin:
    def twin(w: Tensor, s: Step) -> Tensor:
        e = climb(s.grad(w, ascent), w, s)
        most, least = s.grad(w + e, descent), s.grad(w - behind(s) * e, descent)
        return most + s.grad(w, descent) - most.norm() * unit(least)

    return twin


def lookbehind(climb: Climb, ascent: Loss, descent: Loss, k: int, alpha: float | None) -> Twin:
    """Fast weights that take a step of length 1 for each ascent step, and slow ones that follow a part of the way."""

    def twin(w: Tensor, s: Step) -> Tensor:
        at, fast, first = w, w, None
        for _ in range(k):
            at = at + climb(s.grad(at, ascent), w, s)
            fast = fast - s.grad(at, descent)
            first = fast if first is None else first
        if alpha is not None:
            return w - (w + alpha * (fast - w))
        shares = []
        for a, b in zip(s.parts(first - w), s.parts(fast - w), strict=True):
            cosine = inner(a.reshape(-1), b.reshape(-1)) / (a.norm() * b.norm()) if b.norm() > 0 else 0.0
            shares.append((1 + cosine) / 2 * torch.ones_like(a))
        return w - (w + join(shares) * (fast - w))

    return twin


def gam(climb: Climb, outer: Climb, ascent: Loss, descent: Loss, beta0: float, beta1: float, gamma: float) -> Twin:
    def twin(w: Tensor, s: Step) -> Tensor:
        inside = s.part("inner")
        e = climb(s.grad(w, ascent), w, inside)
        up = w + outer(s.grad(w + e, ascent) - s.grad(w, ascent), w, s.part("outer"))
        g = [s.grad(v, descent) for v in (w, w + e, up, up + climb(s.grad(up, ascent), w, inside))]
        m, n = g[0] + (1 - beta0) * g[2], beta1 * g[1] + (1 - beta1) * g[3]
        return n - gamma * (m - inner(m, n) / inner(n, n) * n)

    return twin


def of_classes(weights: list[float], loss: Loss) -> Loss:
    def weighted(outputs: Tensor, labels: Tensor) -> Tensor:
        return torch.stack(
            [weights[y] * value for y, value in zip(labels.tolist(), loss(outputs, labels), strict=True)]
        )

    return weighted


def class_sam(
    climb: Climb, descent: Loss, weights: list[float], plain: list[float], ascent: Loss | None = None
) -> Twin:
    sharp, rest = of_classes(weights, descent), of_classes(plain, descent)

    def twin(w: Tensor, s: Step) -> Tensor:
        return s.grad(w, rest) + s.grad(w + climb(s.grad(w, ascent or sharp), w, s), sharp)

    return twin


def crsam(climb: Climb, ascent: Loss, descent: Loss, gamma: float, beta: float) -> Twin:
    def twin(w: Tensor, s: Step) -> Tensor:
        e = climb(s.grad(w, ascent), w, s)
        g, plus, minus = s.grad(w, descent), s.grad(w + e, descent), s.grad(w - e, descent)
        return plus + gamma * (plus + minus - 2 * g) + beta * (plus - minus)

    return twin


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    angle = inner(a, b).acos()
    return ((1 - t) * angle).sin() / angle.sin() * a + (t * angle).sin() / angle.sin() * b


def xsam(climb: Climb, ascent: Loss, descent: Loss, rho_max: float, every: int, alpha: float | None) -> Twin:
    def twin(w: Tensor, s: Step) -> Tensor:
        e = climb(s.grad(w, ascent), w, s)
        h = s.grad(w + e, descent)
        ways = [slerp(unit(e), unit(h), t / 10) for t in range(21)]
        if alpha is None and s.number % every == 0:
            s.memory["best"] = torch.stack([s.losses(w + rho_max * v, descent).mean() for v in ways]).argmax()
        return h.norm() * (ways[s.memory["best"]] if alpha is None else slerp(unit(e), unit(h), alpha))

    return twin


def functional(climb: Climb, ascent: Loss, descent: Loss) -> Twin:
    def twin(w: Tensor, s: Step) -> Tensor:
        logits = s.outputs(w).detach().requires_grad_()
        c = torch.autograd.grad(descent(logits, s.batch[1]).mean(), logits)[0]
        at = (w + climb(s.grad(w, ascent), w, s)).detach().requires_grad_()
        return torch.autograd.grad(s.outputs(at), at, c)[0]

    return twin


def looksam(climb: Climb, ascent: Loss, descent: Loss, k: int, alpha: float) -> Twin:
    def twin(w: Tensor, s: Step) -> Tensor:
        g = s.grad(w, descent)
        if s.number % k:
            return g + alpha * g.norm() * unit(s.memory["v"])
        h = climbing(climb, ascent, descent)(w, s)
        s.memory["v"] = h - inner(h, g) / inner(g, g) * g
        return h

    return twin


def aesam(climb: Climb, ascent: Loss, descent: Loss, steps: int, first: float, last: float, delta: float) -> Twin:
    def twin(w: Tensor, s: Step) -> Tensor:
        g = s.grad(w, descent)
        square = inner(g, g)
        mu = s.memory["mu"] = delta * s.memory.get("mu", square) + (1 - delta) * square
        var = s.memory["var"] = delta * s.memory.get("var", 0) + (1 - delta) * (square - mu) ** 2
        c = s.number / steps * last + (1 - s.number / steps) * first
        large = square >= mu + c * var**0.5
        s.memory.setdefault("decisions", []).append(bool(large))
        return climbing(climb, ascent, descent)(w, s) if large else g

    return twin


def ssamf(climb: Climb, ascent: Loss, descent: Loss, keep: float, every: int, samples: int) -> Twin:
    def twin(w: Tensor, s: Step) -> Tensor:
        if s.number % every == 0:
            singles = [s.on(torch.tensor([i])).grad(w, descent) for i in range(min(samples, len(s.batch[0])))]
            s.memory["mask"] = largest(torch.stack(singles).abs().square().mean(0), share(keep, len(w)))
        return s.grad(w + s.memory["mask"] * climb(s.grad(w, ascent), w, s.part("inner")), descent)

    return twin


def momentum_sam(climb: Climb, descent: Loss, momentum: float) -> Twin:
    def twin(w: Tensor, s: Step) -> Tensor:
        v = s.memory.get("v")
        h = s.grad(w if v is None else w + climb(-v, w, s), descent)
        s.memory["v"] = h if v is None else momentum * v + h
        return h

    return twin


def momentum_of_optimizer(climb: Climb, descent: Loss) -> Twin:
    def twin(w: Tensor, s: Step) -> Tensor:
        (state,) = s.optimizer.state.values() if s.optimizer.state else ({},)
        v = state.get("momentum_buffer", state.get("exp_avg"))
        return s.grad(w if v is None else w + climb(-v, w, s), descent)

    return twin


def sampa(climb: Climb, ascent: Loss, descent: Loss, lam: float) -> Twin:
    def stepped(w: Tensor, g: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
        y = nn.Parameter(w.clone())
        twin = type(optimizer)([y])
        twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        y.grad = g.clone()
        twin.step()
        return y.detach()

    def twin(w: Tensor, s: Step) -> Tensor:
        before, slope, up = s.memory.get("y", (s.batch, s.grad(w, descent), s.grad(w, ascent)))
        y = stepped(w, slope, s.optimizer)
        h = s.grad(w + climb(up, w, s.part("inner")), descent, before)
        s.memory["y"] = s.batch, s.grad(y, descent), s.grad(y, ascent)
        return (1 - lam) * h + lam * s.memory["y"][1]

    return twin


def opt_sam(climb: Climb, ascent: Loss, descent: Loss) -> Twin:
    def twin(w: Tensor, s: Step) -> Tensor:
        there = w + climb(s.memory["g"], w, s.part("inner")) if "g" in s.memory else w
        s.memory["g"] = s.grad(there, ascent)
        return s.grad(there, descent)

    return twin


def async_sam(climb: Climb, ascent: Loss, descent: Loss) -> Twin:
    def twin(w: Tensor, s: Step) -> Tensor:
        now = s.grad(w, ascent)
        stale, s.memory["g"] = s.memory.get("g", now), now
        return s.grad(w + climb(stale, w, s.part("inner")), descent)

    return twin


def sam_db(climb: Climb, ascent: Loss, descent: Loss) -> Twin:
    def twin(w: Tensor, s: Step) -> Tensor:
        before, s.memory["batch"] = s.memory.get("batch", s.batch), s.batch
        return s.grad(w + climb(s.grad(w, ascent, before), w, s.part("inner")), descent)

    return twin


def bsam(ascent: Loss, descent: Loss, n: float, rho: float, prior: float, damping: float, b1: float, b2: float) -> Twin:
    def twin(w: Tensor, s: Step) -> Tensor:
        m, v = s.memory.get("m", torch.zeros_like(w)), s.memory.get("s", torch.ones_like(w.abs()))
        theta = w + join(s.noise()) / (n * v).sqrt()
        g, delta = s.grad(theta, descent), prior / n
        h = s.grad(w + rho * s.grad(theta, ascent) / v, descent)
        s.memory["m"] = b1 * m + (1 - b1) * (h + delta * w)
        s.memory["s"] = b2 * v + (1 - b2) * (v.sqrt() * g.abs() + damping + delta)
        return s.memory["m"] / v

    return twin


def rapp(loss: Loss, gamma: float, inner: int, prox: Callable[[Tensor], Tensor] = lambda z: z) -> Twin:
    def twin(w: Tensor, s: Step) -> Tensor:
        z = w
        for _ in range(inner):
            z = prox(w - gamma * s.grad(z, loss))
        return (w - z) / gamma

    return twin


def ceg_plus(loss: Loss, gamma: float, prox: Callable[[Tensor], Tensor]) -> Twin:
    def twin(w: Tensor, s: Step) -> Tensor:
        hw = w - gamma * s.grad(w, loss)
        z = prox(hw)
        return (hw - (z - gamma * s.grad(z, loss))) / gamma

    return twin


# Twins around twins.


def with_term(loss: Loss, past: Tensor, lam: float, t: float) -> Loss:
    """Du et al., 2022: L + lam T^2 KL(past || present), with the sum over the classes written out."""

    def total(outputs: Tensor, labels: Tensor) -> Tensor:
        p, q = (torch.exp(z / t) / torch.exp(z / t).sum(1, keepdim=True) for z in (past, outputs))
        return loss(outputs, labels) + lam * t**2 * (p * (p / q).log()).sum(1)

    return total


def mesa(make: Callable[[Loss], Twin], loss: Loss, lam: float, t: float, decay: float, start: int = 0) -> Twin:
    """The average model has averages of the weights and of the running statistics, and is in eval mode."""

    def mixed(a: Tensor, b: Tensor) -> Tensor:
        return decay * a + (1 - decay) * b if b.dtype.is_floating_point or b.is_complex() else b

    def outer(w: Tensor, s: Step) -> Tensor:
        names = [n for n, _ in s.model.named_parameters()]
        buffers = s.memory.get("buffers", {n: b.clone() for n, b in s.model.named_buffers()})
        v, averaged = s.memory.get("average", (w, buffers))
        v, averaged = mixed(v, w), {n: mixed(averaged[n], b) for n, b in buffers.items()}
        s.memory["average"] = v.clone(), {n: b.clone() for n, b in averaged.items()}
        there = dict(zip(names, s.parts(v), strict=True)) | averaged
        past = functional_call(copy.deepcopy(s.model).eval(), there, s.batch[0])
        s.memory["buffers"] = {n: b.clone() for n, b in buffers.items()}
        functional_call(s.model, dict(zip(names, s.parts(w), strict=True)) | s.memory["buffers"], s.batch[0])
        return make(loss if s.number < start else with_term(loss, past, lam, t))(w, s.part("method"))

    return outer


def saf(make: Callable[[Loss], Twin], loss: Loss, lam: float, t: float, epoch: int, ago: int, start: int) -> Twin:
    """All batches have the same examples."""

    def outer(w: Tensor, s: Step) -> Tensor:
        number, seen = s.number // epoch, s.memory.setdefault("seen", {})
        known = s.number >= start and number - ago in seen
        total = with_term(loss, seen[number - ago], lam, t) if known else loss
        seen[number] = s.outputs(w).detach()
        return make(total)(w, s.part("method"))

    return outer


def accumulated(m: int, twin: Twin) -> Twin:
    return lambda w, s: twin(w, replace(s, micro=m))


def msam(m: int, twin: Twin) -> Twin:
    def outer(w: Tensor, s: Step) -> Tensor:
        parts = torch.arange(len(s.batch[0])).split(m)
        return sum(len(p) * twin(w, s.part(str(p[0])).on(p)) for p in parts) / len(s.batch[0])

    return outer


def ksam(loss: Loss, k: int, twin: Twin) -> Twin:
    return lambda w, s: twin(w, s.on(s.losses(w, loss).topk(k).indices))


def rsam(sigma: float, twin: Twin, filters: bool = True, radius: float = inf) -> Twin:
    def scale(p: Tensor) -> Tensor:
        return p.norm() if p.dim() < 2 else p.flatten(1).norm(dim=1).view(-1, *[1] * (p.dim() - 1))

    def outer(w: Tensor, s: Step) -> Tensor:
        noise = [n * scale(p) if filters else n for n, p in zip(s.noise(), s.parts(w), strict=True)]
        noise = sigma * join(noise)
        return twin(w + min(1.0, radius / noise.norm().item()) * noise, s)

    return outer


def generator_of(*key: int) -> torch.Generator:
    number = int.from_bytes(blake2b(repr(key).encode(), digest_size=8).digest(), "little")
    return torch.Generator().manual_seed(number)


def drawn_like(p: Tensor, generator: torch.Generator, *, signs: bool = False) -> Tensor:
    """Noise of the shape of a tensor; a complex number is two entries."""
    shape, dtype = torch.view_as_real(p).shape if p.is_complex() else p.shape, p.abs().dtype
    if signs:
        z = 2.0 * torch.randint(0, 2, shape, dtype=dtype, generator=generator) - 1
    else:
        z = torch.randn(shape, dtype=dtype, generator=generator)
    return torch.view_as_complex(z) if p.is_complex() else z


def zeroth_order(
    climb: Climb,
    ascent: Loss,
    descent: Loss,
    draws: int = 1,
    epsilon: float = 1e-3,
    seed: int = 0,
    *,
    signs: bool = False,
    rule: Callable[[str, Tensor], bool] = lambda name, p: True,
) -> Twin:
    """Malladi et al., 2023: central differences along noise, in eval mode with the running statistics until now."""

    def outer(w: Tensor, s: Step) -> Tensor:
        still = copy.deepcopy(s.model)
        for name, b in still.named_buffers():
            b.copy_(s.memory.get("buffers", {}).get(name, b))
        still.eval()
        values, g = replace(s, model=still), torch.zeros_like(w)
        for k in range(draws):
            generator, parts = generator_of(seed, s.number, k), []
            for name, p in s.model.named_parameters():
                parts.append(drawn_like(p, generator, signs=signs) if rule(name, p) else torch.zeros_like(p))
            z = join(parts)
            rise = values.losses(w + epsilon * z, ascent).mean() - values.losses(w - epsilon * z, ascent).mean()
            g = g + rise / (2 * epsilon) * z / draws
        e = climb(g, w, s)
        load(still.train(), w + e)
        still(s.batch[0])  # running statistics move at the displaced point
        s.memory["buffers"] = {n: b.clone() for n, b in still.named_buffers()}
        return s.grad(w + e, descent)

    return outer


def filter_noise(
    descent: Loss, sigma: Callable[[Step], float], rule: Callable[[str, Tensor], bool], seed: int = 0
) -> Twin:
    """Li et al., 2024: the standard deviation in a row of n real numbers is sigma / sqrt(n) times its norm."""

    def outer(w: Tensor, s: Step) -> Tensor:
        parts, generator = [], generator_of(seed, s.number)
        for (name, _), p in zip(s.model.named_parameters(), s.parts(w), strict=True):
            if not rule(name, p):
                parts.append(torch.zeros_like(p))
                continue
            z = drawn_like(p, generator)
            rows = [(p, z)] if p.dim() < 2 else [*zip(p, z, strict=True)]
            each = 2 if p.is_complex() else 1
            parts.append(join([sigma(s) / (each * row.numel()) ** 0.5 * row.norm() * noise for row, noise in rows]))
        return s.grad(w + join(parts), descent)

    return outer


def tilted(samples: int, tilt: Callable[[Step], float], twin: Callable[[Tensor, Step], tuple[Tensor, Tensor]]) -> Twin:
    """Li et al., 2024: a softmax of the losses; `twin` gives the point of the loss, and the gradient."""

    def outer(w: Tensor, s: Step) -> Tensor:
        found = [twin(w, s.part(f"sample {i}")) for i in range(samples)]
        weights = torch.softmax(torch.stack([tilt(s) * value for value, _ in found]), 0)
        return sum(p * h for p, (_, h) in zip(weights, found, strict=True))

    return outer


def valued(climb: Climb, ascent: Loss, descent: Loss) -> Callable[[Tensor, Step], tuple[Tensor, Tensor]]:
    """SAM, with the loss at the end of the ascent."""

    def pair(w: Tensor, s: Step) -> tuple[Tensor, Tensor]:
        at = w + climb(s.grad(w, ascent), w, s)
        return s.losses(at, descent).mean(), s.grad(at, descent)

    return pair


def every(k: int, twin: Twin, otherwise: Twin) -> Twin:
    def outer(w: Tensor, s: Step) -> Tensor:
        n, rest = divmod(s.number, k)
        return otherwise(w, s.part("otherwise", s.number - n - 1)) if rest else twin(w, s.part("method", n))

    return outer


def during(twin: Twin, start: int, stop: int, otherwise: Twin) -> Twin:
    def outer(w: Tensor, s: Step) -> Tensor:
        if start <= s.number < stop:
            return twin(w, s.part("method", s.number - start))
        return otherwise(w, s.part("otherwise", s.number - (stop - start) * (s.number >= stop)))

    return outer
