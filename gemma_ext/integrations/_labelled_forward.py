"""One labelled call of a patched model: its own forward, with the head deferred."""

from __future__ import annotations

import dataclasses
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from gemma_ext.nn._defer_head import defer_head, is_deferred
from gemma_ext.nn._deferred_logits import DeferredLogits, DeferredLogitsError, LossOptions
from gemma_ext.nn._models import output_head

Forward = Callable[..., Any]


@dataclasses.dataclass
class Settings:
    """Of one patched model or class.

    Attributes:
        below: the forwards that ours replaced, each in the namespace of the model or class, None
            for none. There is more than one if others wrapped our forward before it was patched
            again.
        impl, filter_eps, memory, train_only: as in `gemma_ext.integrations.transformers.patch`.
        enabled: False passes calls through.
        warned: of an evaluation without logits.
    """

    below: list[Forward | None]
    impl: str
    filter_eps: float | str | None
    memory: str
    train_only: bool | None
    enabled: bool = True
    warned: bool = False


def run(
    model: nn.Module,
    settings: Settings,
    below: Forward,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """What `below` returns when the head of `model` is deferred."""
    head = output_head(model)
    # deferred already: by another forward of ours, above this one
    if is_deferred(head) or (not model.training and _keeps_logits(model, settings)):
        return below(*args, **kwargs)
    losses: list[None] = []
    options = LossOptions(type(model).__name__, settings.impl, settings.filter_eps, settings.memory)
    with defer_head(head, options, lambda: losses.append(None)) as mode:
        output = below(*args, **kwargs)
    if not mode.entered:
        raise DeferredLogitsError(
            f"expected {options.owner} to compute its logits by calling its head, a "
            f"{type(head).__name__}, which a forward with labels never did; unpatch the model to "
            f"train it with materialised logits"
        )
    return resolve_logits(output, drop=bool(losses))


def _keeps_logits(model: nn.Module, settings: Settings) -> bool:
    """Whether an evaluation is to return its logits."""
    if settings.train_only is not None:
        return settings.train_only
    if torch.is_grad_enabled():
        return False
    if torch.compiler.is_compiling():
        _warn_of_compiled_evaluation(type(model).__name__)
        return False
    wanted = _trainer_wants_logits()
    if wanted is None and not settings.warned:
        settings.warned = True
        _warn_of_evaluation(type(model).__name__)
    return bool(wanted)


def _trainer_wants_logits() -> bool | None:
    """Whether the `Trainer` above this call collects logits; None if none is to be seen.

    It tells nobody but its own `prediction_step`, which subclasses replace.
    """
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "prediction_step" and "prediction_loss_only" in frame.f_locals:
            return not frame.f_locals["prediction_loss_only"]
        frame = frame.f_back
    return None


def _warn_of_evaluation(owner: str) -> None:
    warnings.warn(
        f"{owner} was evaluated with labels and returned no logits; patch(model, train_only=True) "
        f"keeps them, for Trainer.predict and compute_metrics, and train_only=False ends this "
        f"warning"
    )


@torch.compiler.assume_constant_result
def _warn_of_compiled_evaluation(owner: str) -> None:
    # runs while the graph is traced, where no caller can be asked
    _warn_of_evaluation(owner)


def resolve_logits(output: Any, drop: bool) -> Any:
    """`output` without its deferred logits, or with their values where no loss used them."""
    if isinstance(output, DeferredLogits):
        return None if drop else output.materialize()
    if not _holds_logits(output):
        return output
    if isinstance(output, dict):
        return type(output)(**{key: resolve_logits(output[key], drop) for key in output})
    resolved = ((value, resolve_logits(value, drop)) for value in output)
    return type(output)(new for old, new in resolved if new is not None or old is None)


def _holds_logits(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_holds_logits(item) for item in value.values())
    if isinstance(value, (tuple, list)):
        return any(_holds_logits(item) for item in value)
    return isinstance(value, DeferredLogits)
