"""One training of a causal LM in float32 whose head gets its gradients from a maker."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from step_model import head_of
from torch import Tensor, nn

import gemma_ext
from gemma_ext.bench.filtering import Gradients, Rule, gradients, large_blocks

WARMUP = 20  # steps
FLOOR = 0.05  # of the peak learning rate, where the cosine ends
TAU = 2.0**-8
COARSE_TAU = 2.0**-5
CUT_CE_EPS = 2.0**-12

# of e [N, D], c [V, D], labels [N], softcap and a seed: the loss and the head's gradients
Maker = Callable[[Tensor, Tensor, Tensor, float | None, int], tuple[float, Gradients]]


@dataclass(frozen=True)
class Task:
    """What all trainings of a comparison share.

    Attributes:
        build: a fresh model in float32 from a seed.
        train, heldout: [W, T + 1] windows, every id but the first a target.
        rare: ids of the vocabulary that are rarest in the text.
        rate: peak learning rate of AdamW.
        batch: windows per step.
    """

    name: str
    build: Callable[[int], nn.Module]
    train: Tensor
    heldout: Tensor
    rare: Tensor
    rate: float
    batch: int


@dataclass
class Run:
    """A training with one seed.

    Attributes:
        losses, kept: of every step.
        heldout: mean loss of the held-out windows after the last.
        rare_norm, rare_along: at the first and the last step, the classifier's gradient in the rows
            of the rarest tokens beside the exact one of the same weights: ratio of the norms, and
            the share of the exact one that is there, <g, exact> / <exact, exact>.
    """

    losses: list[float] = field(default_factory=list)
    kept: list[float] = field(default_factory=list)
    heldout: float = math.nan
    rare_norm: list[float] = field(default_factory=list)
    rare_along: list[float] = field(default_factory=list)


def by_loss(dtype: torch.dtype = torch.float32, **options: object) -> Maker:
    """`gemma_ext.linear_cross_entropy` on hidden states and weights in a dtype."""

    def make(e, c, labels, softcap, seed):
        e, c = (x.detach().to(dtype).requires_grad_() for x in (e, c))
        out = gemma_ext.linear_cross_entropy(
            e, c, labels, softcap=softcap, return_stats=True, filter_seed=seed, **options
        )
        out.loss.backward()
        found = Gradients(e.grad.float(), c.grad.float(), float(out.stats.kept_fraction))
        return out.loss.item(), found

    return make


def by_rule(rule: Rule) -> Maker:
    """A rule by its formula; the loss itself is exact."""

    def make(e, c, labels, softcap, seed):
        e, c = e.detach(), c.detach()
        loss = gemma_ext.linear_cross_entropy(e, c, labels, softcap=softcap, impl="exact")
        return loss.item(), gradients(e, c, labels, softcap, rule)

    return make


EXACT = by_loss(impl="exact")
MAKERS = {
    "exact": EXACT,
    "sampled": by_loss(impl="cce", filter_eps=TAU),
    "coarse": by_loss(impl="cce", filter_eps=COARSE_TAU),
    "cut-ce": by_rule(large_blocks(CUT_CE_EPS)),
    "exact-bf16": by_loss(torch.bfloat16, impl="exact"),
    "auto-bf16": by_loss(torch.bfloat16),
}


def train(task: Task, make: Maker, steps: int, seed: int) -> Run:
    """The seed is that of the weights, of the order of the windows and of the draws."""
    model = task.build(seed).train()
    head, run = head_of(model), Run()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=task.rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, steps))
    for step, windows in enumerate(batches(task, steps, seed)):
        hidden, labels = hidden_and_labels(model, windows)
        loss, found = make(hidden, head.weight, labels, head.softcap, seed)
        run.losses.append(loss)
        run.kept.append(found.kept)
        if step in (0, steps - 1):
            exact = EXACT(hidden, head.weight, labels, head.softcap, seed)[1]
            compare_rare(run, found.dc[task.rare], exact.dc[task.rare])
            del exact
        hidden.backward(found.de)
        head.weight.grad = found.dc if head.weight.grad is None else head.weight.grad.add_(found.dc)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    run.heldout = heldout_loss(model, task)
    return run


def hidden_and_labels(model: nn.Module, windows: Tensor) -> tuple[Tensor, Tensor]:
    hidden = model.base_model(input_ids=windows[:, :-1], use_cache=False).last_hidden_state
    return hidden.flatten(0, 1), windows[:, 1:].flatten()


@torch.no_grad()
def heldout_loss(model: nn.Module, task: Task) -> float:
    """Exact mean loss of the held-out windows."""
    model.eval()
    head, total = head_of(model), 0.0
    for windows in task.heldout.split(task.batch):
        hidden, labels = hidden_and_labels(model, windows)
        total += gemma_ext.linear_cross_entropy(
            hidden, head.weight, labels, softcap=head.softcap, impl="exact", reduction="sum"
        ).item()
    return total / task.heldout[:, 1:].numel()


def compare_rare(run: Run, found: Tensor, exact: Tensor) -> None:
    run.rare_norm.append((found.norm() / exact.norm()).item())
    run.rare_along.append(((found * exact).sum() / exact.square().sum()).item())


def batches(task: Task, steps: int, seed: int) -> Iterator[Tensor]:
    """[batch, T + 1] windows for every step, in an order of their own in every epoch."""
    generator = torch.Generator().manual_seed(seed)
    count, wanted = len(task.train), steps * task.batch
    epochs = math.ceil(wanted / count)
    order = torch.cat([torch.randperm(count, generator=generator) for _ in range(epochs)])
    return iter(task.train[order[:wanted]].split(task.batch))


def rate(step: int, steps: int) -> float:
    """Warm-up and cosine, as a share of the peak."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return min((step + 1) / WARMUP, FLOOR + (1 - FLOOR) * cosine)


def rarest(ids: Tensor, vocab: int) -> Tensor:
    """Ids that a stream has no more often than a quarter of the vocabulary's rarest."""
    counts = torch.bincount(ids.flatten(), minlength=vocab)
    return (counts <= counts.kthvalue(max(1, vocab // 4)).values).nonzero()[:, 0]
