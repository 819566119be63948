"""Conversion from folder to folder, one tied linear at a time."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from gemma_ext.nn.recursive import Plan
from gemma_ext.nn.recursive.parts import LORA, PREFIX, lora_key, write_adapter_config, write_tensors
from gemma_ext.nn.recursive.prefix import initial_prefixes
from gemma_ext.papers.recursive.conversion import stored_layer
from gemma_ext.papers.recursive.folders import (
    SHARD_BYTES,
    Advance,
    Group,
    Layout,
    Pieces,
    Source,
    beside,
    copy_companions,
    fill,
    write_config,
)
from gemma_ext.papers.recursive.recipe import Recipe


def convert_folder(
    source: str | Path,
    out: str | Path,
    recipe: Recipe,
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    advance: Advance = lambda count: None,
) -> Path:
    """Converts a model on disk; no more than the tensors of one tied linear are in memory.

    Args:
        source: folder of a vanilla model.
        out: of the recursive one, for `nn.recursive.load`; must not exist yet, or be empty. It is
            filled beside its place and renamed.
        recipe: how.
        dtype: of stored layers and matrices; the source's by default.
        shard_bytes: most bytes in a file.
        advance: called with the number of tensors written.

    Returns:
        the folder.

    Raises:
        ValueError: a source that is recursive or not whole, a recipe that does not fit, or an
            `out` that is taken.
    """
    src = Source.open(source)
    if getattr(src.config, "recursive", None) is not None:
        raise ValueError(f"source: expected a vanilla model, got the recursive one in {source}")
    plan = recipe.plan(src.config.get_text_config().num_hidden_layers, src.sizes)
    inner = f"{src.layers}."
    base, lora = _layouts(src, plan, dtype)

    def outside() -> Pieces:
        for key in base:
            if not key.startswith(inner):
                tensor = src.read(key)
                yield key, tensor if dtype is None else tensor.to(dtype)

    def inside(stored: int) -> Pieces:
        def read(layer: int, name: str) -> Tensor:
            return src.read(f"{inner}{layer}.{name}")

        return stored_layer(stored, plan, recipe, src.names, src.layers, read, dtype)

    identity = (recipe, plan, str(dtype), shard_bytes, src.fingerprint())
    with beside(Path(out), identity) as folder:
        copy_companions(src.folder, folder)
        src.config.recursive = plan.to_dict()
        write_config(src.config, folder, dtype)
        groups: list[Group] = [(folder, base, shard_bytes)]
        if lora:
            write_adapter_config(folder, plan, src.layers)
            groups.append((folder / LORA, lora, None))
        if plan.prefix:
            vectors = initial_prefixes(src.config, plan.layers, plan.prefix, recipe.seed)
            kind = next(kind for kind, _ in base.values())
            write_tensors(
                folder / PREFIX, {f"{d}.prefix": v.to(kind) for d, v in enumerate(vectors)}
            )
        parts = [("rest", outside()), *((f"{s}", inside(s)) for s in range(plan.stored_layers))]
        fill(folder, groups, parts, advance)
    return Path(out)


def count_pieces(source: str | Path, recipe: Recipe) -> int:
    """How many tensors `convert_folder` writes."""
    src = Source.open(source)
    plan = recipe.plan(src.config.get_text_config().num_hidden_layers, src.sizes)
    return sum(map(len, _layouts(src, plan, None)))


def _layouts(src: Source, plan: Plan, dtype: torch.dtype | None) -> tuple[Layout, Layout]:
    """What is written: the stored tensors, and the matrices of the depths."""
    inner = f"{src.layers}."
    base = {key: src.info(key) for key in src.tensors.tensors if not key.startswith(inner)}
    lora: Layout = {}
    for s in range(plan.stored_layers):
        first = plan.depths_of(s)[0]
        for name in src.names:
            base[f"{inner}{s}.{name}"] = src.info(f"{inner}{first}.{name}")
    for linear in plan.ranks:
        out, in_ = src.sizes[linear]
        for depth in range(plan.layers):
            if rank := plan.rank_of(depth, linear):
                first = plan.depths_of(plan.stored_of_depth[depth])[0]
                stored, _ = src.info(f"{inner}{first}.{linear}.weight")
                lora[lora_key(src.layers, depth, linear, "A")] = stored, (rank, in_)
                lora[lora_key(src.layers, depth, linear, "B")] = stored, (out, rank)
    if dtype is not None:
        base, lora = ({key: (dtype, shape) for key, (_, shape) in g.items()} for g in (base, lora))
    return base, lora
