"""Where activations are taken from a model of `transformers`, and put back.

| name                                  | activation                                      |
|---------------------------------------|-------------------------------------------------|
| `12`, `blocks.12.hook_resid_post`     | residual stream behind block 12                 |
| `blocks.12.hook_resid_pre`            | before it                                       |
| `blocks.12.hook_mlp_out`              | what the MLP adds to the stream                 |
| `blocks.12.hook_attn_out`             | what attention adds to it                       |
| `blocks.12.hook_mlp_in`               | what the MLP sees                               |
| `blocks.12.attn.hook_z`               | concatenated heads before the output's product  |
| `model.layers.12.mlp`                 | output of any module by its path                |
| `model.layers.12.mlp.input`           | its input, as Gemma Scope 2 names it            |

Gemma-2 and later norm a branch once more before it joins the stream; what it adds is behind that
norm.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
_NAMES = ("hook_resid_post", "hook_resid_pre", "hook_mlp_out", "hook_mlp_in", "hook_attn_out")


@dataclass(frozen=True)
class Site:
    """One place of a model.

    Attributes:
        name: as it was asked for.
        module: whose input or output it is.
        side: "input" or "output".
    """

    name: str
    module: nn.Module
    side: str


def find_site(model: nn.Module, name: str | int) -> Site:
    """A place in a model whose activations [..., D] are read or changed.

    Args:
        name: a block's number (its output), a hook as SAELens names it
            ("blocks.12.hook_mlp_out"), or the path of a module, behind which ".input" or ".output"
            (the default) may stand.

    Raises:
        ValueError: there is none.
    """
    name = f"blocks.{name}.hook_resid_post" if str(name).isdigit() else str(name)
    match = _BLOCK.fullmatch(name)
    if match:
        return _named(name, _block(model, int(match[1])), match[2])
    path, side = name, "output"
    for ending in ("input", "output"):
        if name.endswith(f".{ending}"):
            path, side = name.removesuffix(f".{ending}"), ending
    for root in (model, getattr(model, "base_model", model)):
        try:
            return Site(name, root.get_submodule(path), side)
        except AttributeError:
            continue
    raise ValueError(f"site: expected a block's hook or the path of a module, got {name!r}")


def blocks(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks of a causal model.

    Raises:
        ValueError: there is no one list of as many modules as the model has layers.
    """
    if not hasattr(model, "config"):
        raise ValueError(f"model: expected one of transformers, got {type(model).__name__}")
    count = model.config.get_text_config().num_hidden_layers
    found = [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if len(found) != 1:
        raise ValueError(f"model: expected one list of {count} blocks, got {len(found)}")
    return found[0]


class _Reached(Exception):
    pass


@torch.no_grad()
def capture(model: nn.Module, ids: Tensor, sites: Sequence[Site], **inputs: Any) -> list[Tensor]:
    """Activations [B, T, D] at every site; the model stops behind the last of them.

    Args:
        ids: [B, T] int64.
        inputs: more arguments of the model, as attention_mask.
    """
    found: dict[int, Tensor] = {}

    def keep(place: int) -> Callable[[Tensor], None]:
        def kept(value: Tensor) -> None:
            found[place] = value
            if len(found) == len(sites):
                raise _Reached

        return kept

    with _listening([(site, keep(place)) for place, site in enumerate(sites)]):
        try:
            model(input_ids=ids, use_cache=False, **inputs)
        except _Reached:
            pass
        else:
            missed = [site.name for place, site in enumerate(sites) if place not in found]
            raise ValueError(f"site: the model's forward does not reach {', '.join(missed)}")
    return [found[place].detach() for place in range(len(sites))]


@contextmanager
def replacing(site: Site, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside the block the model goes on with `change(activation)`, [..., D], in its place."""
    with _listening([(site, change)]):
        yield


@contextmanager
def _listening(
    calls: Sequence[tuple[Site, Callable[[Tensor], Tensor | None]]],
) -> Iterator[None]:
    handles = []
    try:
        for site, call in calls:
            handles.append(_attach(site, call))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _attach(site: Site, call: Callable[[Tensor], Tensor | None]) -> Any:
    """A hook that passes the activation on, changed if `call` gives another."""

    def before(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if args:
            changed = call(args[0])
            return None if changed is None else ((changed, *args[1:]), kwargs)
        first = next(iter(kwargs))
        changed = call(kwargs[first])
        return None if changed is None else (args, kwargs | {first: changed})

    def behind(module: nn.Module, args: tuple, output: Any) -> Any:
        if isinstance(output, tuple):
            changed = call(output[0])
            return None if changed is None else (changed, *output[1:])
        return call(output)

    if site.side == "input":
        return site.module.register_forward_pre_hook(before, with_kwargs=True)
    return site.module.register_forward_hook(behind)


def _block(model: nn.Module, number: int) -> nn.Module:
    found = blocks(model)
    if number >= len(found):
        raise ValueError(f"site: expected a block below {len(found)}, got {number}")
    return found[number]


def _named(name: str, block: nn.Module, hook: str) -> Site:
    normed = hasattr(block, "post_feedforward_layernorm")
    if hook == "hook_resid_post":
        return Site(name, block, "output")
    if hook == "hook_resid_pre":
        return Site(name, block, "input")
    if hook == "hook_mlp_in":
        return Site(name, block.mlp, "input")
    if hook == "hook_mlp_out":
        return Site(name, block.post_feedforward_layernorm if normed else block.mlp, "output")
    if hook == "hook_attn_out":
        return Site(name, block.post_attention_layernorm if normed else block.self_attn, "output")
    if hook == "attn.hook_z":
        return Site(name, block.self_attn.o_proj, "input")
    raise ValueError(
        f"site: expected one of {', '.join(_NAMES)}, attn.hook_z of a block, got {hook!r}"
    )
