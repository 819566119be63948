"""A chat model of a few thousand parameters, pairs of answers and a judge who knows their words."""

from __future__ import annotations

from pathlib import Path

import tiny_gemma
import torch

from gemma_ext.lm import HuggingFaceModel
from gemma_ext.papers.personality import Judge, Pair

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>\n{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<reply>\n{% endif %}"
)
QUESTIONS = ("How was it?", "What is a tent?", "Do you mind the rain at all?", "Who is in?")
HIGH = ("Splendid! It was fun.", "Splendid! A house for a night.", "Splendid! I sing.", "Splendid!")
LOW = ("Alas. It was long.", "Alas. A sack that leaks.", "Alas. I weep.", "Alas.")


def pairs(trait: str = "extraversion", low: str = "introversion") -> list[Pair]:
    return [
        Pair(question, "camping", trait, trait, up, low, down)
        for question, up, down in zip(QUESTIONS, HIGH, LOW, strict=True)
    ]


def chat_model(folder: Path) -> HuggingFaceModel:
    """Far from uniform, so that greedy text depends on the state."""
    base = tiny_gemma.base(folder, [*QUESTIONS, *HIGH, *LOW, "Question: Answer (extraversion):"])
    lm = HuggingFaceModel.load(base, dtype=torch.float32, show_progress=False)
    lm.text.tokenizer.chat_template = TEMPLATE
    with torch.no_grad():
        for parameter in lm.model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    return lm


def judge(words: dict[str, str]) -> Judge:
    """The first label whose word is in the text, else "none"; a text with letters is clean."""

    def label(text: str) -> str:
        return next((name for name, word in words.items() if word in text), "none")

    return Judge(
        lambda texts: [label(text) for text in texts],
        {name: name for name in words},
        lambda texts: [any(character.isalpha() for character in text) for text in texts],
    )
