"""Models of transformers with their tokenizers; one sentence where there is none."""

from __future__ import annotations

from typing import Any


def read_pretrained(auto: Any, name: str, wanted: str, **options: Any) -> tuple[Any, Any]:
    """A model and its tokenizer.

    Args:
        auto: class of transformers that reads the model, such as `AutoModelForCausalLM`.
        name: a folder, or a name on the hub.
        wanted: the begin of the sentence: the argument, and what was expected.
        options: of `from_pretrained` of the model.

    Raises:
        ValueError: nothing of that name, or something that cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        return auto.from_pretrained(name, **options), AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{wanted}, got {name}: {reason}") from error
