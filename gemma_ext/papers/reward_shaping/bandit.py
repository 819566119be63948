"""Reward hacking in the smallest world: 64 actions, a softmax policy, exact natural gradients.

    J(theta) = sum_a pi(a) S(a) - beta KL(pi || pi_0),    optimum pi_0 exp(S / beta) / Z
    theta += rate (S - beta log(pi / pi_0)), a step of constant divergence as PPO's are

Proxy and gold agree but for a few rare actions, which the proxy pays and gold does not. Shaping S
is what differs between runs; nothing is drawn but the world itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gemma_ext.papers.reward_shaping.running import Running
from gemma_ext.papers.reward_shaping.shaper import RewardShaper
from gemma_ext.papers.reward_shaping.shaping import Shaping


@dataclass(frozen=True)
class World:
    """One prompt, A actions.

    Attributes:
        gold: [A] what the actions are worth.
        proxy: [A] what the reward model says.
        start: [A] probabilities of the policy before training.
        references: [M] proxy rewards of draws from it.
    """

    gold: Tensor
    proxy: Tensor
    start: Tensor
    references: Tensor


@dataclass(frozen=True)
class Path:
    """What training did, step by step [S].

    Attributes:
        gold, proxy, shaped: expected rewards under the policy.
        kl: from the start, in nats.
        variance: of the shaped reward under the policy, which is what a critic cannot explain.
    """

    gold: list[float]
    proxy: list[float]
    shaped: list[float]
    kl: list[float]
    variance: list[float]


def world(
    arms: int = 64, *, exploits: int = 4, error: float = 12.0, references: int = 10, seed: int = 0
) -> World:
    """Gold rewards are standard normal, and likelier actions are no better.

    Args:
        exploits: actions that the proxy overrates, 1e-4 as likely as the others, of gold -2.
        error: what the proxy adds to gold there.
        references: M draws from the policy before training.
    """
    if not 0 < exploits < arms:
        raise ValueError(f"exploits: expected between 1 and {arms - 1}, got {exploits}")
    generator = torch.Generator().manual_seed(seed)
    gold = torch.randn(arms, generator=generator, dtype=torch.float64)
    rare = torch.arange(arms) < exploits
    gold[rare] = -2.0
    proxy = torch.where(rare, gold + error, gold)
    start = torch.where(rare, 1e-4, 1.0).double()
    start /= start.sum()
    drawn = torch.multinomial(start, references, replacement=True, generator=generator)
    return World(gold, proxy, start, proxy[drawn])


def optimum(world: World, shaped: Tensor, beta: float) -> Tensor:
    """pi_0 exp(S / beta) / Z [A]."""
    return (world.start.log() + shaped / beta).softmax(0)


def train(
    world: World,
    shaping: Shaping | str,
    *,
    beta: float = 0.05,
    steps: int = 1000,
    rate: float = 0.1,
    batch: int = 40,
) -> tuple[Path, Tensor, Tensor]:
    """Natural gradient ascent on J.

    Args:
        rate: of ascent on theta.
        batch: draws that a step stands for in running statistics, which get the exact moments of
            the proxy under the policy; every action has been seen from the start.

    Returns:
        The path, the policy before training first; the last policy [A]; the last S [A].

    Raises:
        ValueError: more than one rule with statistics.
    """
    shaper = RewardShaper(shaping).eval()
    running = shaper.shaping.running
    if len(running) > 1:
        raise ValueError(f"shaping: expected one rule with statistics, got {', '.join(running)}")
    references = world.references.expand(len(world.proxy), -1)
    lengths = torch.zeros_like(world.proxy)
    theta, rows = world.start.log(), []
    low, high = (float(x) for x in world.proxy.aminmax())
    seen = Running()
    for step in range(steps + 1):
        pi = theta.softmax(0)
        mean = float(pi @ world.proxy)
        squares = batch * float(pi @ (world.proxy - mean) ** 2)
        seen = seen.merged(Running(batch, mean, squares, low, high))
        shaper.load_state_dict({rule: seen.state_dict() for rule in running})
        shaped = shaper(world.proxy, references, lengths=lengths)
        ratio = pi.log() - world.start.log()
        value = pi @ shaped
        rows.append((pi @ world.gold, mean, value, pi @ ratio, pi @ (shaped - value) ** 2))
        if step < steps:
            theta = theta + rate * (shaped - beta * ratio)
            theta = theta - theta.logsumexp(0)
    return Path(*torch.tensor(rows, dtype=torch.float64).T.tolist()), theta.softmax(0), shaped
