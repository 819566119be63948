"""Losses of sparse dictionaries from dense [N, F] matrices in float64, by autograd alone.

Selections are masks without a gradient. A straight-through estimator enters as
(threshold - constant threshold) times its published derivative.
"""

import torch
from torch import Tensor

from gemma_ext.nn.sparse_autoencoder import (
    AbsTopK,
    BatchTopK,
    Gated,
    GroupMax,
    JumpReLU,
    ReLU,
    TopK,
)


class Dense:
    """Everything of a loss as dense tensors; leaves are float64 copies of the parameters."""

    def __init__(self, sae, x: Tensor, *, training: bool = True) -> None:
        self.sae, self.training = sae, training
        self.leaf = {
            name: value.detach().double().requires_grad_() for name, value in sae.named_parameters()
        }
        self.x = x.double().flatten(1)
        centre = self.leaf["decoder_bias"] if sae.subtract_bias else 0.0
        self.p = (self.x - centre) @ self.leaf["encoder"].T + self.leaf["encoder_bias"]
        self.f = self._activate()

    @property
    def norms(self) -> Tensor:
        """[F, M]."""
        return self.leaf["decoder"].unflatten(1, (self.sae.sources, -1)).norm(dim=-1)

    @property
    def scale(self) -> Tensor:
        norms = self.norms.detach()
        return {
            None: torch.ones(len(norms), dtype=torch.float64),
            "sum": norms.sum(-1),
            "joint": norms.norm(dim=-1),
            "mixed": norms.norm(dim=-1) + 0.1 * norms.sum(-1),
        }[self.sae.score_norm]

    def _activate(self) -> Tensor:
        p, activation = self.p, self.sae.activation
        score = p.detach() * self.scale
        match activation:
            case ReLU():
                return p.relu()
            case TopK(k=k, relu=relu):
                f = p * best(score, k)
                return f.relu() if relu else f
            case AbsTopK(k=k):
                return p * best(p.detach().abs() * self.scale, k)
            case GroupMax(k=k):
                groups = p.detach().unflatten(-1, (k, -1))
                return (p * (groups == groups.amax(-1, keepdim=True)).flatten(-2)).relu()
            case BatchTopK(k=k):
                if not self.training:
                    return p * (score > max(0.0, float(self.sae.threshold)))
                total = int(k * len(p))
                return (p * best(score.relu().flatten()[None], total).view(p.shape)).relu()
            case JumpReLU():
                return self._straight_through(p.detach().clone(), "value", p)
            case Gated():
                gate, q = p > 0, p - self.leaf["encoder_bias"]
                m = q * self.leaf["r_mag"].exp() + self.leaf["magnitude_bias"]
                return m.relu() * gate
        raise AssertionError

    def _straight_through(self, constant: Tensor, what: str, p: Tensor) -> Tensor:
        theta, a = self.leaf["threshold"], self.sae.activation
        passes = constant > theta.detach()
        window = ((constant - theta.detach()).abs() < a.bandwidth / 2).double()
        factor = theta.detach() if what == "value" else torch.ones_like(theta)
        slope = factor * window / a.bandwidth
        value = p * passes if what == "value" else passes.double()
        value = value - slope * (theta - theta.detach())
        return value + slope * (p - constant) if a.to_input else value

    def step_counts(self) -> Tensor:
        return self._straight_through(self.p.detach(), "step", self.p).sum(-1)

    def decode(self, f: Tensor, *, bias: bool = True, constant: bool = False) -> Tensor:
        weight, b = self.leaf["decoder"], self.leaf["decoder_bias"]
        if constant:
            weight, b = weight.detach(), b.detach()
        return f @ weight + (b if bias else 0.0)

    def gradients(self, loss: Tensor) -> dict[str, Tensor]:
        found = torch.autograd.grad(loss, list(self.leaf.values()), allow_unused=True)
        return dict(zip(self.leaf, found, strict=True))


def best(score: Tensor, k: int) -> Tensor:
    """Mask of the k best of every row."""
    order = score.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return torch.zeros_like(score).scatter(-1, order, 1.0)


def total_loss(dense: Dense, o, dead=None, warmth=1.0) -> Tensor:
    """The objective `o` from the dense matrices."""
    x, f, sae = dense.x, dense.f, dense.sae
    error = x - dense.decode(f)
    variance = (x - x.mean(0)).square().sum()
    if o.widths:
        weights = o.level_weights or (1.0,) * len(o.widths)
        prefixes = [f * (torch.arange(f.shape[1]) < w) for w in o.widths]
        loss = sum(
            w * (x - dense.decode(part)).square().sum(-1).mean()
            for w, part in zip(weights, prefixes, strict=True)
        )
    elif o.ranks:
        k = sae.activation.k
        masks = [best(dense.p.detach(), level + 1) for level in range(k)]
        loss = sum((x - dense.decode(f * m)).square().sum(-1).mean() for m in masks) / k
    else:
        loss = {
            "squared": error.square().sum(-1).mean(),
            "fvu": error.square().sum() / variance,
            "norm": error.unflatten(1, (sae.sources, -1)).norm(dim=-1).mean(),
        }[o.error]
    norms = dense.norms.sum(-1)
    gate = dense.p.relu() if isinstance(sae.activation, Gated) else f
    loss = loss + warmth * o.l1 * (gate * norms).sum(-1).mean()
    if o.l0 and o.l0_form == "tanh":
        loss = loss + warmth * o.l0 * (o.tanh_scale * f * norms).tanh().sum(-1).mean()
    elif o.l0:
        counts = dense.step_counts()
        if o.l0_form == "quadratic":
            counts = 2 / o.target_l0 * (counts - o.target_l0).square()
        loss = loss + warmth * o.l0 * counts.mean()
    if isinstance(sae.activation, Gated):
        loss = loss + (x - dense.decode(dense.p.relu(), constant=True)).square().sum(-1).mean()
    if o.multi:
        longer = dense.p * best(dense.p.detach() * dense.scale, sae.activation.k * 4)
        wide = (x - dense.decode(longer.relu())).square().sum()
        loss = loss + o.multi * (wide / variance if o.error == "fvu" else wide / len(x))
    if dead is not None and o.auxiliary:
        loss = loss + o.auxiliary * auxiliary(dense, o, error.detach(), variance, dead)
    if dead is not None and o.pre_activation:
        theta = dense.leaf.get("threshold", torch.zeros(len(norms), dtype=torch.float64))
        below = (theta - dense.p).relu() * dead * norms
        loss = loss + o.pre_activation * below.sum(-1).mean()
    return loss


def auxiliary(dense: Dense, o, error: Tensor, variance: Tensor, dead: Tensor) -> Tensor:
    width = error.shape[1]
    wanted = o.auxiliary_k or width // 2
    k = min(wanted, int(dead.sum()))
    score = (dense.p.detach() * dense.scale).masked_fill(~dead, -torch.inf)
    z = dense.p * best(score, k)
    z = z if o.auxiliary_form == "saelens" else z.relu()
    missed = (dense.decode(z, bias=False) - error).square().sum()
    if o.auxiliary_form == "openai":
        return missed / (error - error.mean(0)).square().sum()
    scale = min(1.0, int(dead.sum()) / (width // 2))
    return scale * missed / (variance if o.auxiliary_form == "sparsify" else len(error))
