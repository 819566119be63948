"""Several roles on one backbone: each a LoRA adapter, and none of them for the reference."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from gemma_ext.extras import require

if TYPE_CHECKING:
    from peft import PeftModel

POLICY, VALUE, REWARD = "policy", "value", "reward"


def with_adapters(model: nn.Module, config: Any, *more: str) -> PeftModel:
    """The model of transformers under an adapter for its policy and one for each further role.

    The policy's is active. All are trainable; whoever gives them to an optimiser decides.

    Args:
        config: of peft, for all of them.
        more: names, such as "value" and "reward".

    Raises:
        ImportError: peft is missing.
    """
    require("an adapter for every role", "ppo", "peft")
    from peft import get_peft_model

    made = get_peft_model(model, config, adapter_name=POLICY)
    for name in more:
        made.add_adapter(name, config)
    for name in more:
        for parameter in adapter_parameters(made, name):
            parameter.requires_grad_(True)
    return made


def adapter_parameters(model: nn.Module, name: str) -> list[nn.Parameter]:
    """Parameters of one adapter.

    Raises:
        ValueError: there is none of that name.
    """
    inner = peft_model(model)
    # peft keeps those of a module in dicts by adapter; a module of the model may have the same name
    places = [m for m in inner.modules() if isinstance(m, (nn.ModuleDict, nn.ParameterDict))]
    own = {
        id(p)
        for place in places
        if name in place
        for p in (place[name].parameters() if isinstance(place, nn.ModuleDict) else [place[name]])
    }
    found = [p for p in model.parameters() if id(p) in own]
    if not found or name not in inner.peft_config:
        raise ValueError(f"expected an adapter named {name}, got {', '.join(inner.peft_config)}")
    return found


@contextmanager
def active(model: nn.Module, name: str) -> Iterator[None]:
    """Within the block the adapter of that name acts; which parameters train stays as it is."""
    inner = peft_model(model)
    before = inner.active_adapter
    try:
        with _same_training(inner):
            inner.set_adapter(name)
        yield
    finally:
        with _same_training(inner):
            inner.set_adapter(before)


@contextmanager
def without(model: nn.Module) -> Iterator[None]:
    """Within the block no adapter acts; which parameters train stays as it is."""
    inner = peft_model(model)
    with _same_training(inner), inner.disable_adapter():
        yield


@contextmanager
def _same_training(model: nn.Module) -> Iterator[None]:
    """peft also decides what trains where it switches: only the active adapter."""
    trained = [(p, p.requires_grad) for p in model.parameters()]
    try:
        yield
    finally:
        for parameter, requires in trained:
            parameter.requires_grad_(requires)


def peft_model(model: nn.Module) -> PeftModel:
    """The model of peft inside of torch.compile and (Distributed)DataParallel.

    Raises:
        TypeError: there is none.
    """
    found = peft_or_bare(model)
    if not hasattr(found, "disable_adapter"):
        raise TypeError(f"expected a model of peft, got {type(found).__name__}")
    return found


def peft_or_bare(model: nn.Module) -> nn.Module:
    """The model inside of torch.compile and (Distributed)DataParallel, peft around it kept."""
    while not hasattr(model, "disable_adapter"):
        inner = getattr(model, "module", getattr(model, "_orig_mod", None))
        if not isinstance(inner, nn.Module):
            break
        model = inner
    return model
