"""What a model is hardened with: behaviours and targets, safe answers, useful conversations.

Behaviours and targets are read by `evaluation.harmbench`.
"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_ext.papers.continuous_at.prompts import Encoder, Row

if TYPE_CHECKING:
    from gemma_ext.papers.continuous_at.evaluation.harmbench import Behavior

UTILITY_CHARACTERS = 768  # of a user's message; longer ones are left out


@dataclass(frozen=True)
class Pair:
    """The two answers to one request, whose prompts are the same tokens.

    Raises:
        ValueError: two prompts.
    """

    harmful: Row
    safe: Row

    def __post_init__(self) -> None:
        if self.harmful.prompt != self.safe.prompt or self.harmful.free != self.safe.free:
            raise ValueError("safe: expected the prompt of the harmful row, got another one")


def read_refusals(path: str | Path, column: str | None = None) -> list[str]:
    """Safe answers of a CSV file.

    Args:
        column: None for the first.

    Raises:
        ValueError: no such column, or nothing in it.
    """
    rows = _table(path)
    name = column or (next(iter(rows[0])) if rows else None)
    found = [row[name] for row in rows if row.get(name)]
    if not found:
        raise ValueError(f"{path}: expected answers in column {name}, got none")
    return found


def read_utility(path: str | Path, characters: int = UTILITY_CHARACTERS) -> list[tuple[str, str]]:
    """(request, answer): the first turn of each conversation of a JSON-lines file.

    A line has `messages` as UltraChat has them, [{"role": "user", "content": ...}, {"role":
    "assistant", ...}, ...], possibly behind a system message.

    Args:
        characters: a request of as many or more is left out.

    Raises:
        ValueError: a line without messages.
    """
    found = []
    with Path(path).open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            value = json.loads(line)
            turns = value.get("messages") if isinstance(value, dict) else None
            if not isinstance(turns, list):
                raise ValueError(f"{path}:{number}: expected messages, got none")
            pair = _first_turn(turns)
            if pair is not None and len(pair[0]) < characters:
                found.append(pair)
    return found


def pairs(
    encoder: Encoder,
    behaviours: Sequence[Behavior],
    targets: Mapping[str, Sequence[str]],
    refusals: Sequence[str],
    *,
    close: bool = True,
    seed: int = 0,
) -> list[Pair]:
    """Each behaviour with each of its targets, and a safe answer.

    Args:
        targets: by BehaviorID.
        refusals: one is for all; of several each pair draws one.
        close: safe answers end with <eos>; targets, which are beginnings, never do.

    Raises:
        ValueError: a behaviour without targets, no refusals.
    """
    if not refusals:
        raise ValueError("refusals: expected at least one, got none")
    drawn = random.Random(seed)
    found = []
    for behaviour in behaviours:
        if not targets.get(behaviour.id):
            raise ValueError(f"targets: expected some for {behaviour.id}, got none")
        prompt = encoder.ask(behaviour.request)
        for target in targets[behaviour.id]:
            safe = encoder.answer(drawn.choice(refusals), close=close)
            found.append(
                Pair(
                    encoder.row(prompt, encoder.answer(target)),
                    encoder.row(prompt, safe),
                )
            )
    return found


def utility_rows(encoder: Encoder, conversations: Sequence[tuple[str, str]]) -> list[Row]:
    """Rows of (request, answer), each answer closed by <eos>."""
    return [
        encoder.row(encoder.ask(request), encoder.answer(answer, close=True))
        for request, answer in conversations
    ]


class Mixture:
    """Samples of a step: each is adversarial with probability p, else useful.

    A step's samples are a function of the seed and the step's number.

    Args:
        p: 0.125 in the paper for UL; 1 for IPO.

    Raises:
        ValueError: p outside [0, 1], or nothing to draw from.
    """

    def __init__(
        self, adversarial: Sequence[Pair], utility: Sequence[Row], p: float, seed: int = 0
    ) -> None:
        if not 0 <= p <= 1:
            raise ValueError(f"p: expected a probability, got {p}")
        for name, rows, share in (("adversarial", adversarial, p), ("utility", utility, 1 - p)):
            if share > 0 and not rows:
                raise ValueError(f"{name}: expected rows to draw from, got none")
        self.adversarial, self.utility, self.p, self.seed = adversarial, utility, p, seed

    def draw(self, step: int, batch: int) -> tuple[list[Pair], list[Row]]:
        """`batch` samples, in two lists."""
        drawn = random.Random(f"{self.seed} {step}")
        adversarial = sum(drawn.random() < self.p for _ in range(batch))
        return (
            drawn.choices(self.adversarial, k=adversarial) if adversarial else [],
            drawn.choices(self.utility, k=batch - adversarial) if adversarial < batch else [],
        )


def _table(path: str | Path) -> list[dict[str, str]]:
    with Path(path).open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def _first_turn(turns: Sequence[Mapping[str, Any]]) -> tuple[str, str] | None:
    spoken: Iterator[Mapping[str, Any]] = (x for x in turns if x.get("role") != "system")
    user, assistant = next(spoken, None), next(spoken, None)
    if not user or not assistant or assistant.get("role") != "assistant":
        return None
    return str(user["content"]), str(assistant["content"])
