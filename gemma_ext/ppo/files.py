"""A trained policy, its critic, and heads of values in files under the names that others read.

OUT/model          the policy and tokenizer, as transformers loads it; adapters of peft each in a
                   folder of their name below it, OUT/model/policy
OUT/critic         a critic of its own; the head as `score.weight` where its model has one
.../value_head.safetensors   `v_head.summary.weight` and `.bias`
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from gemma_ext import files
from gemma_ext.nn._models import unwrap
from gemma_ext.nn.ppo import Critic, SeparateCritic, ValueHead
from gemma_ext.nn.ppo.adapters import peft_or_bare
from gemma_ext.nn.ppo.value import CLASSIFIER, TRL
from gemma_ext.pocket.quiet import quiet_transformers
from gemma_ext.ppo.ranks import rank

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MODEL, CRITIC, HEAD = "model", "critic", "value_head.safetensors"


def save_trained(
    folder: str | Path,
    policy: nn.Module,
    critic: Critic | None,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Writes what a run made; called on every rank, written by the first."""
    folder = Path(folder)
    save_model(folder / MODEL, policy, tokenizer)
    if critic is None:
        return
    if not isinstance(critic, SeparateCritic):
        if rank() == 0:
            save_value_head(folder / MODEL, critic.head)
        return
    score = getattr(unwrap(critic.model), "score", None)
    if isinstance(score, nn.Linear) and (score.bias is None) == (critic.head.bias is None):
        score.load_state_dict(critic.head.state_dict())
    save_model(folder / CRITIC, critic.model)
    if rank() == 0:
        save_value_head(folder / CRITIC, critic.head)


def save_value_head(folder: str | Path, head: ValueHead, *, names: str = "trl") -> None:
    """Writes a head.

    Args:
        names: "trl" for `v_head.summary.weight`, "classifier" for `score.weight`.

    Raises:
        ValueError: another choice, a bias under names that have none.
    """
    prefixes = {"trl": TRL, "classifier": CLASSIFIER}
    if names not in prefixes:
        raise ValueError(f"names: expected trl or classifier, got {names!r}")
    if names == "classifier" and head.bias is not None and bool(head.bias.any()):
        raise ValueError("names: expected a head without a bias for classifier, got one with")
    tensors = head.tensors(prefixes[names])
    if names == "classifier":
        tensors = {k: v for k, v in tensors.items() if k.endswith("weight")}
    files.write_safetensors(Path(folder) / HEAD, tensors)


def load_value_head(folder: str | Path) -> ValueHead:
    """The head in a folder of trl's, of a sequence classification, or written here.

    Raises:
        ValueError: there is none.
    """
    place = Path(folder)
    if not place.is_dir():
        raise ValueError(f"expected a folder, got {folder}")
    found: dict[str, Tensor] = {}
    for path in _weight_files(place):
        found |= _heads(path)
        if found:
            return ValueHead.of(found)
    raise ValueError(f"{folder}: expected {TRL}weight or {CLASSIFIER}weight in a file, got neither")


def _weight_files(folder: Path) -> Iterable[Path]:
    yield from sorted(folder.glob("*.safetensors"), key=lambda path: path.name != HEAD)
    yield from sorted(folder.glob("*.bin"))


def _heads(path: Path) -> dict[str, Tensor]:
    """Tensors of a file that belong to a head."""
    ends = tuple(prefix + name for prefix in (TRL, CLASSIFIER) for name in ("weight", "bias"))
    if path.suffix == ".bin":
        return {k: v for k, v in files.read_pickle(path).items() if k.endswith(ends)}
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return {k: file.get_tensor(k) for k in file.keys() if k.endswith(ends)}  # noqa: SIM118


def save_model(folder: Path, model: nn.Module, tokenizer: Any = None) -> None:
    """Writes a model (or its adapters) as transformers and peft load it, sharded weights whole;
    called on every rank, written by the first.
    """
    model, state = peft_or_bare(model), None
    if any(hasattr(p, "full_tensor") for p in model.parameters()):
        state = {
            k: (v.full_tensor() if hasattr(v, "full_tensor") else v).cpu()
            for k, v in model.state_dict().items()
        }
    if rank() == 0:
        with quiet_transformers():
            model.save_pretrained(folder, state_dict=state)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)


def write_samples(path: Path, before: list[Any], after: list[Any]) -> None:
    """Responses before and after a run; null is the score of one that nobody scored."""

    def told(samples: list[Any]) -> list[Any]:
        return [one if math.isfinite(one["score"]) else {**one, "score": None} for one in samples]

    with files.replacing(path) as beside:
        both = {"before": told(before), "after": told(after)}
        text = json.dumps(both, indent=1, ensure_ascii=False)
        beside.write_text(text + "\n", encoding="utf-8")
