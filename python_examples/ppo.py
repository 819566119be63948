"""Teach a language model a style by proximal policy optimisation.

    python python_examples/ppo.py
    python python_examples/ppo.py --advantage rloo
    python python_examples/ppo.py --model google/gemma-3-270m --lora 8 --dtype bfloat16

Two reward functions judge a continuation of a docstring: the share of its words that are articles,
and the share that are distinct, without which "the the the" would win. The report shows what the
scores cost in divergence from the model before, every diagnostic of PPO, and responses before and
after. An interrupted run goes on where it stopped.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from gemma_ext import pocket
from gemma_ext.ppo import PPOConfig, PPOTrainer, summary, train_policy
from gemma_ext.ppo.opening import open_parts
from gemma_ext.ppo.rewards import Rewards

ARTICLES = {"the", "a", "an"}


def articles(completions: list[str], **columns: object) -> list[float]:
    """Ten times the share of articles among the words."""
    return [
        10 * share(text, lambda words: sum(w in ARTICLES for w in words)) for text in completions
    ]


def distinct(completions: list[str], **columns: object) -> list[float]:
    """The share of distinct words."""
    return [share(text, lambda words: len(set(words))) for text in completions]


def main(
    model: Annotated[str, typer.Option(help="pocket, pocket:small, a folder or a hub id.")] = (
        "pocket"
    ),
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    dtype: Annotated[str, typer.Option(help="Of the weights; 16 bits with --lora.")] = "float32",
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("out/ppo"),
    advantage: Annotated[str, typer.Option(help="gae, rloo, grpo, remax, reinforce++.")] = "gae",
    lora: Annotated[int, typer.Option(min=0, help="Rank of adapters; 0 trains all weights.")] = 0,
    critic: Annotated[
        str, typer.Option(help="shared, adapter or copy; empty for one that shares no weights.")
    ] = "",
    steps: Annotated[int, typer.Option(min=1, help="Batches of responses.")] = 30,
    batch: Annotated[int, typer.Option(min=4, help="Responses of a batch.")] = 64,
    length: Annotated[int, typer.Option(min=1, help="Tokens of a response.")] = 20,
    rate: Annotated[float, typer.Option(help="Learning rate of the policy.")] = 3e-4,
    value_rate: Annotated[float, typer.Option(help="Learning rate of the critic.")] = 3e-3,
    kl: Annotated[float, typer.Option(min=0, help="Weight of the KL to the model before.")] = 0.3,
    seed: Annotated[int, typer.Option(help="Of draws and orders.")] = 0,
) -> None:
    """Train MODEL to write articles."""
    quarter = batch // 4
    config = PPOConfig(
        output_dir=out,
        total_episodes=steps * quarter * 4,
        per_device_train_batch_size=quarter,
        num_mini_batches=4,
        num_ppo_epochs=2,
        num_generations=4 if advantage in ("rloo", "grpo") else 1,
        advantage=advantage,
        response_length=length,
        temperature=1.0,
        learning_rate=rate,
        warmup_ratio=0.1,
        value_learning_rate=value_rate,
        cliprange_value=None,  # scores are of several units
        kl_coef=kl,
        seed=seed,
        save_steps=10,
    )
    parts = open_parts(
        config,
        model=model,
        prompts=prompts(),
        reward=Rewards([articles, distinct], [1.0, 2.0]),
        value=critic or ("adapter" if lora else "copy"),
        lora=lora or None,
        device=device,
        dtype=dtype,
    )
    trainer = PPOTrainer(config, **parts.arguments)
    print(trainer.plan().line())
    done = train_policy(trainer, title=f"PPO of {model}: articles", facts=parts.facts)
    print(f"{summary(done.history)}\n{done.page}")


def prompts(words: int = 6) -> list[str]:
    """The first words of the docstrings that the pocket was not trained on."""
    found = {}
    for document in pocket.documents():
        if document.kind == "prose" and document.split == "heldout":
            for entry in document.text.split("\n\n"):
                split = entry.split()
                if len(split) > 3 * words:
                    found[" ".join(split[:words])] = None
    texts = list(found)
    random.Random(0).shuffle(texts)
    return texts


def share(text: str, count: Callable[[list[str]], int]) -> float:
    """A count of words over their number."""
    words = text.lower().split()
    return count(words) / len(words) if words else 0.0


if __name__ == "__main__":
    typer.run(main)
