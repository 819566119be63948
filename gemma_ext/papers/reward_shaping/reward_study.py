"""How reward models of one budget take to a bias of their data: BT, Reg, ODIN, WARM.

Pairs are drawn from the policy before training, cut to random lengths. The better one by gold is
preferred, but where lengths differ most, the longer one: a bias that has nothing to do with gold.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gemma_ext.papers.reward_shaping.losses import pearson
from gemma_ext.papers.reward_shaping.planted import Planted
from gemma_ext.papers.reward_shaping.references import References
from gemma_ext.papers.reward_shaping.reward_model import RewardModel, from_causal
from gemma_ext.papers.reward_shaping.training import Pair, RewardTraining, train_reward_model
from gemma_ext.papers.reward_shaping.warm import warm

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MEMBERS = 3  # of WARM; the study has five
TRIES = 200  # draws for each pair, before responses count as all alike


def biased_pairs(
    rows: Sequence[References], planted: Planted, count: int, seed: int, bias: float = 0.25
) -> list[Pair]:
    """Pairs with a preference by gold; the share `bias` of them by length.

    Raises:
        ValueError: too few responses differ.
    """
    rng = random.Random(seed)
    found: list[Pair] = []
    for _ in range(TRIES * count):
        row = rng.choice(rows)
        a, b = (_cut(text, rng) for text in rng.sample(row.completions, 2))
        by_length = rng.random() < bias
        worth = [float(len(t.split())) if by_length else planted.gold(t) for t in (a, b)]
        if worth[0] != worth[1]:
            found.append(Pair(row.prompt, *((a, b) if worth[0] > worth[1] else (b, a))))
        if len(found) == count:
            return found
    raise ValueError(f"rows: expected responses that differ, got {len(found)} of {count} pairs")


def compare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[References],
    planted: Planted,
    folder: Path,
    *,
    steps: int = 60,
    batch: int = 16,
    learning_rate: float = 3e-4,
    seed: int = 0,
    show_progress: bool = True,
) -> list[dict[str, Any]]:
    """A row for each kind: accuracy by gold on pairs without bias, correlations, spread.

    Attributes of a row: "accuracy"; "length", Pearson's of score and words over single responses;
    "gold", the same of score and gold; "spread", the standard deviation of scores.
    """
    half, first = len(rows) // 2, MEMBERS * seed  # no member is in the average of two seeds
    test = biased_pairs(rows[half:], planted, 200, seed + 100, bias=0.0)

    def trained(kind: str, at: int, rate: float) -> PreTrainedModel:
        pairs = biased_pairs(rows[:half], planted, steps * batch, first + at)
        made = from_causal(model, heads=2 if kind == "odin" else 1, seed=first + at)
        config = RewardTraining(
            kind=kind, learning_rate=rate, batch=batch, steps=steps, seed=first + at
        )
        train_reward_model(
            made, tokenizer, pairs, config, out=folder / kind, show_progress=show_progress
        )
        return made

    members = [trained("bt", at, learning_rate * (1 - 0.2 * at)) for at in range(MEMBERS)]
    models = {
        "Bradley-Terry": members[0],
        "Reg": trained("reg", 0, learning_rate),
        "ODIN, quality": trained("odin", 0, learning_rate),
        f"WARM of {MEMBERS}": warm(members),
    }
    return [
        {"model": name, **_row(made, tokenizer, test, planted)} for name, made in models.items()
    ]


def _row(
    model: PreTrainedModel, tokenizer: Any, test: Sequence[Pair], planted: Planted
) -> dict[str, float]:
    score = RewardModel(model, tokenizer)
    prompts = [pair.prompt for pair in test] * 2
    texts = [pair.chosen for pair in test] + [pair.rejected for pair in test]
    found = score(prompts, texts).double()
    chosen, rejected = found.chunk(2)
    words = torch.tensor([float(len(text.split())) for text in texts]).double()
    gold = torch.tensor([planted.gold(text) for text in texts]).double()
    return {
        "accuracy": float((chosen > rejected).double().mean()),
        "length": float(pearson(found, words)),
        "gold": float(pearson(found, gold)),
        "spread": float(found.std()),
    }


def _cut(text: str, rng: random.Random) -> str:
    words = text.split(" ")
    return " ".join(words[: rng.randint(3, max(3, len(words)))])
