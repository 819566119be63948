"""How many pages of keys and values fit where a model computes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PAGE = 16  # tokens
_MEMINFO = Path("/proc/meminfo")
_GROUP = Path("/sys/fs/cgroup")  # what a container may use


def pages_for(model: PreTrainedModel, share: float) -> int:
    """Pages of 16 tokens that fit into a share of the free memory, at all depths of a model.

    Raises:
        ValueError: a share outside (0, 1), or one without room for a page.
    """
    if not 0 < share < 1:
        raise ValueError(f"kv_memory: expected a share in (0, 1), got {share}")
    page, free = page_bytes(model), free_memory(model.device)
    if share * free < page:
        raise ValueError(
            f"kv_memory: expected room for a page of {page} bytes, got {share} of {free}"
        )
    return int(share * free / page)


def page_bytes(model: PreTrainedModel) -> int:
    """Of a page at all depths."""
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return PAGE * config.num_hidden_layers * 2 * heads * size * model.dtype.itemsize


def check_sizes(model: PreTrainedModel, states: int, pages: int) -> None:
    """Raises a ValueError where that many hidden states, or pages, are more than the free memory;
    a system that promises more than it has would end the process later."""
    wide = torch.promote_types(model.dtype, torch.float32)
    free = free_memory(model.device)
    for name, what, count, each in (
        ("requests", "hidden states", states, model.config.hidden_size * wide.itemsize),
        ("pages", "pages", pages, page_bytes(model)),
    ):
        if count * each > free:
            raise ValueError(
                f"{name}: expected {what} that fit into the {free} bytes that are free, "
                f"got {count} of {each} bytes"
            )


def free_memory(device: torch.device) -> int:
    """Bytes that can still be had: of a card, or of this machine or container."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if _MEMINFO.exists():  # pages of files that can be dropped count as free there
        (line,) = (x for x in _MEMINFO.read_text().splitlines() if x.startswith("MemAvailable:"))
        free = int(line.split()[1]) * 1024
    most, used = _GROUP / "memory.max", _GROUP / "memory.current"
    if most.exists() and (limit := most.read_text().strip()) != "max":
        free = min(free, int(limit) - int(used.read_text()))
    return free
