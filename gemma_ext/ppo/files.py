"""A trained policy, its critic, and heads of values in files under the names that others read.

OUT/model          the policy (or its adapters) and tokenizer, as transformers and peft load it
OUT/critic         a critic of its own; the head as `score.weight` where its model has one
.../value_head.safetensors   `v_head.summary.weight` and `.bias`
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
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
    folder, model = Path(folder), peft_or_bare(policy)
    _save_model(folder / MODEL, model)
    if rank() == 0:
        tokenizer.save_pretrained(folder / MODEL)
    if critic is None:
        return
    if not isinstance(critic, SeparateCritic):
        if rank() == 0:
            save_value_head(folder / MODEL, critic.head)
        return
    inner = peft_or_bare(critic.model)
    score = getattr(unwrap(inner), "score", None)
    if isinstance(score, nn.Linear) and critic.head.bias is None:
        with torch.no_grad():
            score.weight.copy_(critic.head.weight)
    _save_model(folder / CRITIC, inner)
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


def _save_model(folder: Path, model: Any) -> None:
    """Sharded weights come together first."""
    state = None
    if any(hasattr(p, "full_tensor") for p in model.parameters()):
        state = {
            k: (v.full_tensor() if hasattr(v, "full_tensor") else v).cpu()
            for k, v in model.state_dict().items()
        }
    if rank() == 0:
        with quiet_transformers():
            model.save_pretrained(folder, state_dict=state)


def write_samples(path: Path, before: list[Any], after: list[Any]) -> None:
    """Responses before and after a run."""
    with files.replacing(path) as beside:
        text = json.dumps({"before": before, "after": after}, indent=1, ensure_ascii=False)
        beside.write_text(text + "\n", encoding="utf-8")
