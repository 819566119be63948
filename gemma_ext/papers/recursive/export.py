"""A recursive folder as the vanilla one it equals."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from gemma_ext.nn.recursive import Plan
from gemma_ext.nn.recursive.parts import ADAPTER, EXIT_HEAD, LORA, lora_key
from gemma_ext.papers.recursive.folders import (
    SHARD_BYTES,
    Advance,
    Pieces,
    Source,
    beside,
    copy_companions,
    fill,
    write_config,
)
from gemma_ext.souping.engine.files.checkpoint import open_checkpoint


def export_folder(
    source: str | Path,
    out: str | Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    advance: Advance = lambda count: None,
) -> Path:
    """Writes a recursive model as the vanilla one it equals: W_l = W' + B_l A_l.

    Args:
        source: folder of the recursive model; out: of the vanilla one, as in `convert_folder`.

    Returns:
        the folder, which transformers loads without us.

    Raises:
        ValueError: the source is not recursive or not whole, has prefixes or a head for exits,
            or `out` is taken.
    """
    src = Source.open(source)
    if getattr(src.config, "recursive", None) is None:
        raise ValueError(f"source: expected a recursive model, got {source}")
    plan = Plan.from_dict(src.config.recursive)
    if plan.prefix:
        raise ValueError(f"source: expected no prefixes to merge, got {plan.prefix} at each depth")
    if (src.folder / EXIT_HEAD).exists():
        raise ValueError(f"source: expected no head for exits, got {src.folder / EXIT_HEAD}")
    inner = f"{src.layers}."
    adapter = open_checkpoint(src.folder / LORA / ADAPTER).tensors if plan.ranks else {}
    rest = [key for key in src.tensors.tensors if not key.startswith(inner)]
    layout = {key: src.info(key) for key in rest}
    for depth, s in enumerate(plan.stored_of_depth):
        for name in src.names:
            layout[f"{inner}{depth}.{name}"] = src.info(f"{inner}{s}.{name}")

    def outside() -> Pieces:
        return ((key, src.read(key)) for key in rest)

    def inside(depth: int) -> Pieces:
        for name in src.names:
            weight = src.read(f"{inner}{plan.stored_of_depth[depth]}.{name}")
            keys = [lora_key(src.layers, depth, name.removesuffix(".weight"), f) for f in "AB"]
            if keys[0] in adapter:
                a, b = (dataclasses.replace(adapter[key]).whole for key in keys)
                wide = torch.promote_types(weight.dtype, torch.float32)
                weight = (weight.to(wide) + b.to(wide) @ a.to(wide)).to(weight.dtype)
            yield f"{inner}{depth}.{name}", weight

    with beside(Path(out), (plan, shard_bytes, src.fingerprint())) as folder:
        copy_companions(src.folder, folder)
        del src.config.recursive
        write_config(src.config, folder, None)
        parts = [("rest", outside()), *((f"{d}", inside(d)) for d in range(plan.layers))]
        fill(folder, [(folder, layout, shard_bytes)], parts, advance)
    return Path(out)
