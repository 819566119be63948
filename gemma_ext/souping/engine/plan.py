"""What an output is made of: for every tensor, where its sources are and what happens to them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from gemma_ext.souping.engine.files.checkpoint import Checkpoint, Stored
from gemma_ext.souping.engine.files.sources import Source
from gemma_ext.souping.method import Method, TensorInfo, Values

OUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LAYER = re.compile(r"\.(?:layers|h|blocks|block)\.(\d+)\.")
_EMBEDDING = re.compile(r"(embed_tokens|lm_head|wte|word_embeddings|embed_in|embed_out)\.weight$")


@dataclass(frozen=True)
class Target:
    """A tensor of the output.

    Attributes:
        info: its name, shape and layer.
        dtype: it is written in; float32, bfloat16 or float16 where it is merged.
        sources: of the M models; a single one where `values` is None.
        base: that deltas are taken from.
        values: of the method's parameters; None for a tensor that is copied, not merged.
    """

    info: TensorInfo
    dtype: torch.dtype
    sources: Sequence[Source]
    base: Source | None = None
    values: Values | None = None

    def __post_init__(self) -> None:
        shape = self.info.shape
        for source in self.inputs:
            # reading on beyond a tensor would take the next one for its rows
            same = len(source.shape) == len(shape) and source.shape[1:] == shape[1:]
            if not same or source.shape[:1] < shape[:1]:
                raise ValueError(
                    f"{source.stored.path}: expected {self.info.name!r} to be {list(shape)}, "
                    f"got {list(source.shape)}"
                )
            if self.values is not None and not source.stored.dtype.is_floating_point:
                raise ValueError(
                    f"{source.stored.path}: expected {self.info.name!r} to be floating-point, "
                    f"got {source.stored.dtype}"
                )
        if self.values is not None and self.dtype not in OUT_DTYPES:
            raise ValueError(
                f"dtype: expected a merge into float32, bfloat16 or float16, got {self.dtype}"
            )

    @property
    def inputs(self) -> list[Source]:
        """The sources, and the base last."""
        return [*self.sources, *([self.base] if self.base else [])]

    @property
    def is_copy(self) -> bool:
        """Whether the bytes of a file are the result, so that they need not come into memory."""
        source, *more = self.inputs
        return (
            self.values is None
            and not more
            and source.is_plain
            and source.stored.tensor is None
            and source.stored.dtype == self.dtype
        )


def plan(
    method: Method,
    models: Sequence[Checkpoint],
    base: Checkpoint | None,
    values: Callable[[TensorInfo], Values],
    *,
    dtype: torch.dtype | None = None,
    skip: bool = False,
) -> list[Target]:
    """The targets of a merge of whole models, tensor by tensor of the same name.

    A tied `lm_head.weight` that some model has not is its embedding. Integer tensors are the base's
    (the first model's without a base). Embeddings of different row counts are cut to the rows that
    all have.

    Args:
        values: parameters for a tensor of the output.
        dtype: of the output's floating-point tensors; by default what the base, or the first model,
            stores (bfloat16 for fp8, float32 for float64).
        skip: tensors that are missing somewhere or of other shapes stay the base's, instead of
            ending the merge.

    Raises:
        ValueError: M or the base does not fit the method; a tensor is missing or of another shape.
    """
    check_models(method, len(models), base is not None)
    used = base if method.base != "unused" else None
    everyone = [*models, *([used] if used else [])]
    ordered = [*([used] if used else []), *models]
    names = dict.fromkeys(name for model in ordered for name in model.tensors)
    layers = count_layers(names)
    targets = []
    for name in names:
        found = [find(model, name) for model in everyone]
        try:
            shape = common_shape(name, everyone, found)
        except ValueError:
            if not skip or used is None:
                raise
            kept = found[-1]
            if kept is not None:
                info = TensorInfo(name, kept.shape, layer_of(name), layers)
                targets.append(copied(info, Source(kept), dtype))
            continue
        info = TensorInfo(name, shape, layer_of(name), layers)
        sources = [Source(one) for one in found if one is not None]
        origin = sources[len(models)] if used else None
        targets.append(merged(info, sources[: len(models)], origin, values, dtype))
    return targets


def merged(
    info: TensorInfo,
    sources: Sequence[Source],
    base: Source | None,
    values: Callable[[TensorInfo], Values],
    dtype: torch.dtype | None = None,
) -> Target:
    """The target of a tensor: merged, or copied from the base or the first source if it holds
    integers.

    Args:
        values: asked for the parameters if it is merged.
        dtype: of the output; by default what the base, or the first source, stores.
    """
    reference = base or sources[0]
    if not reference.stored.dtype.is_floating_point:
        return copied(info, reference, None)
    dtype = dtype or default_dtype(reference.stored.dtype)
    return Target(info, dtype, sources, base, values(info))


def check_models(method: Method, models: int, has_base: bool) -> None:
    """Raises unless `method` is one, and takes so many models, with a base or without."""
    if not isinstance(method, Method):
        got = f"the class {method.__name__}" if isinstance(method, type) else repr(method)
        raise TypeError(f"method: expected a Method, as souping.get('ties')() makes one, got {got}")
    least, most = method.models
    if models < least or (most is not None and models > most):
        expected = f"{least}" if most == least else f"{least} or more"
        if most not in (None, least):
            expected = f"{least} to {most}"
        raise ValueError(f"{method.name}: expected {expected} models, got {models}")
    if method.base == "needed" and not has_base:
        raise ValueError(f"{method.name}: expected a base model, got none")


def find(model: Checkpoint, name: str) -> Stored | None:
    """A tensor by name, or the embedding in the place of a tied head."""
    if name in model.tensors:
        return model.tensors[name]
    if name.endswith("lm_head.weight"):
        embeddings = [own for own in model.tensors if own.endswith("embed_tokens.weight")]
        if len(embeddings) == 1:
            return model.tensors[embeddings[0]]
    return None


def common_shape(
    name: str, models: Sequence[Checkpoint], found: Sequence[Stored | None]
) -> tuple[int, ...]:
    """The shape that a tensor has in every model; the fewest rows of an embedding.

    Raises:
        ValueError: it is missing in one, or its shapes or kinds differ.
    """
    for model, stored in zip(models, found, strict=True):
        if stored is None:
            owner = next(m.path for m, s in zip(models, found, strict=True) if s is not None)
            raise ValueError(f"{model.path}: expected tensor {name!r}, which {owner} has, got none")
    present = [stored for stored in found if stored is not None]
    first = present[0]
    for model, stored in zip(models, present, strict=True):
        if stored.dtype.is_floating_point != first.dtype.is_floating_point:
            raise ValueError(
                f"{model.path}: expected tensor {name!r} of a kind with {first.dtype}, "
                f"got {stored.dtype}"
            )
        same = stored.shape == first.shape
        if _EMBEDDING.search(name) and len(first.shape) == len(stored.shape) == 2:
            same = stored.shape[1] == first.shape[1]
        if not same:
            raise ValueError(
                f"{model.path}: expected tensor {name!r} to be {list(first.shape)} as in "
                f"{models[0].path}, got {list(stored.shape)}"
            )
    if not first.shape:
        return ()
    return (min(stored.shape[0] for stored in present), *first.shape[1:])


def copied(info: TensorInfo, source: Source, dtype: torch.dtype | None) -> Target:
    """A tensor that is taken as it is, in its own dtype if None is given or it holds integers; in
    bfloat16 if it has scales."""
    stored = source.stored
    if not stored.dtype.is_floating_point:
        dtype = stored.dtype
    elif dtype is None:
        dtype = stored.dtype if stored.scale is None else default_dtype(stored.dtype)
    return Target(info, dtype, [source])


def default_dtype(stored: torch.dtype) -> torch.dtype:
    """What merges of tensors stored in a dtype are written in."""
    if stored in OUT_DTYPES:
        return stored
    return torch.bfloat16 if stored.itemsize == 1 else torch.float32


def layer_of(name: str) -> int | None:
    """The decoder layer in a tensor's name."""
    match = _LAYER.search(f".{name}")
    return int(match.group(1)) if match else None


def count_layers(names: Iterable[str] | Mapping[str, object]) -> int:
    return 1 + max((layer for name in names if (layer := layer_of(name)) is not None), default=-1)
