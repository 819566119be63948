"""Who computes the loss in the step benchmark: transformers itself, a compiled head, peers, ours.

Each is a context in which a model's loss of a batch is theirs; after it the model is as before.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import baselines  # noqa: F401 - puts .peers/ on the path
import torch
import torch.nn.functional as F
from step_model import head_of
from torch import Tensor, nn

from gemma_ext.integrations.transformers import patch, unpatch

Loss = Callable[[Tensor, Tensor], Tensor]  # of ids [B, T] and labels [B, T]


@dataclass(frozen=True)
class Implementation:
    """A way to the loss.

    Attributes:
        on: the context for a model, which yields the loss.
        refuse: why it cannot run on a model and a device, or None.
    """

    on: Callable[[nn.Module], AbstractContextManager[Loss]]
    refuse: Callable[[nn.Module, str], str | None] = lambda model, device: None
    ours: bool = False


def model_loss(model: nn.Module) -> Loss:
    return lambda ids, labels: model(input_ids=ids, labels=labels).loss


@contextmanager
def eager(model: nn.Module) -> Iterator[Loss]:
    yield model_loss(model)


@contextmanager
def compiled(model: nn.Module) -> Iterator[Loss]:
    """The backbone as it is, head and loss as one compiled function."""
    head = head_of(model)

    def loss(ids: Tensor, labels: Tensor) -> Tensor:
        hidden = model.base_model(input_ids=ids).last_hidden_state
        following = F.pad(labels, (0, 1), value=-100)[:, 1:]
        return compiled_head()(hidden.flatten(0, 1), head.weight, following.flatten(), head.softcap)

    yield loss


@cache
def compiled_head() -> Callable[..., Tensor]:
    return torch.compile(head_loss, dynamic=False)


def head_loss(rows: Tensor, weight: Tensor, labels: Tensor, softcap: float | None) -> Tensor:
    """Mean loss of rows [N, D] against weight [V, D]; labels [N], -100 where there is none."""
    logits = F.linear(rows, weight)
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    return F.cross_entropy(logits.float(), labels)


@contextmanager
def liger(model: nn.Module) -> Iterator[Loss]:
    """liger-kernel's fused linear cross-entropy alone, its other kernels off."""
    apply = liger_patches()[model.config.model_type]
    switches = {
        name: name == "fused_linear_cross_entropy"
        for name, parameter in inspect.signature(apply).parameters.items()
        if isinstance(parameter.default, bool)
    }
    owner = type(model)
    forward = owner.forward
    apply(**switches, model=model)
    try:
        yield model_loss(model)
    finally:
        vars(model).pop("forward", None)
        owner.forward = forward  # some versions replace that of the class


def liger_patches() -> dict[str, Callable[..., None]]:
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    return MODEL_TYPE_TO_APPLY_LIGER_FN


def refuse_liger(model: nn.Module, device: str) -> str | None:
    if device != "cuda":
        return "liger-kernel needs a CUDA device"
    for module in ("liger_kernel", "triton"):
        if find_spec(module) is None:
            return f"liger-kernel is not installed: no module {module}"
    kind = model.config.model_type
    return None if kind in liger_patches() else f"liger-kernel has no patch for {kind}"


@contextmanager
def ours(model: nn.Module, **options: Any) -> Iterator[Loss]:
    patch(model, **options)
    try:
        yield model_loss(model)
    finally:
        unpatch(model)


def implementations(**options: Any) -> dict[str, Implementation]:
    """All by name; ``options`` are those of ``patch``."""
    exact = options | {"impl": "exact"}
    return {
        "eager": Implementation(eager),
        "compile": Implementation(compiled),
        "liger": Implementation(liger, refuse_liger),
        "exact": Implementation(partial(ours, **exact), ours=True),
        "ours": Implementation(partial(ours, **options), ours=True),
    }
