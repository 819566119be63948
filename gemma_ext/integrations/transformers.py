"""Patch causal language models of `transformers` so that their loss never holds the logits.

    patch(model)                      # one model, also behind PEFT, DDP or torch.compile
    patch(Gemma2ForCausalLM)          # every instance of a class
    patch("gemma2")                   # the same by model type or class name

The model's own forward still runs, from the backbone to auxiliary losses; only the head's product
is deferred (`gemma_ext.integrations._deferred_logits`) until the model asks for a cross-entropy.
Soft-caps, logit scales, shifted labels, `num_items_in_batch`, `logits_to_keep`, router losses and
adapters on the head are therefore the model's, not a copy of them, and a model that treats its
logits in a way that cannot be deferred raises instead of training on another loss.

With `labels`, outputs carry `logits=None`; without, nothing changes.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from gemma_ext.integrations._defer_head import (
    defer_head,
    prepare_head,
    release_head,
    vocab_size,
)
from gemma_ext.integrations._deferred_logits import DeferredLogits, LossOptions
from gemma_ext.ops.cce import inputs
from gemma_ext.ops.vocab_state import VocabState

__all__ = ["patch", "unpatch"]

Target = TypeVar("Target", bound="nn.Module | type | str")
_PATCH = "_gemma_ext_patch"
_STATE = "_gemma_ext_vocab_state"


@dataclasses.dataclass
class _Patch:
    """Options of one patched model or class.

    Attributes:
        original: the forward that the model or class had in its own namespace, if any.
        impl, filter_eps, state, train_only: as in `patch`.
    """

    original: Callable[..., Any] | None
    impl: str
    filter_eps: float | str | None
    state: bool
    train_only: bool
    enabled: bool = True


def patch(
    model_or_class_or_name: Target,
    *,
    impl: str = "auto",
    filter_eps: float | str | None = "auto",
    state: bool = True,
    train_only: bool = False,
) -> Target:
    """Make a causal language model compute its loss with `gemma_ext.linear_cross_entropy`.

    Args:
        model_or_class_or_name: a model (wrappers are looked through), a model class, or the name of
            one: a class name such as "Gemma2ForCausalLM" or a model type such as "gemma2".
        impl, filter_eps: as in `gemma_ext.linear_cross_entropy`.
        state: carry a vocabulary order and profile from step to step, one per model. It is not
            part of the model's checkpoints; the first step of a run fills it.
        train_only: leave evaluation as it is, logits included (needed by `compute_metrics`).

    Returns:
        The argument. Patching again replaces the options.

    Raises:
        ValueError: unknown name or option, or a class whose forward takes no labels.
        TypeError: not a model, a class or a name.

    Example:
        >>> model = patch(AutoModelForCausalLM.from_pretrained("google/gemma-2-2b"))
        >>> Trainer(model=model, ...).train()
    """
    if impl not in inputs.IMPLS:
        raise ValueError(f"expected impl to be one of {', '.join(inputs.IMPLS)}, got {impl!r}")
    inputs.check_filter_eps(filter_eps)
    owner = _resolve(model_or_class_or_name)
    cls = owner if isinstance(owner, type) else type(owner)
    if _labels_position(cls) is None:
        raise ValueError(f"expected the forward of {cls.__name__} to take labels")
    present = vars(owner).get(_PATCH)
    original = present.original if present else vars(owner).get("forward")
    if _is_fused_by_trl(original):
        raise ValueError(
            "expected a model with its own forward, got one whose head a trainer of trl has fused; "
            "use gemma_ext.integrations.trl.patch(trainer)"
        )
    setattr(owner, _PATCH, _Patch(original, impl, filter_eps, state, train_only))
    if present is None:
        forward = _wrap(cls.forward, per_instance=owner is not cls)
        # a bound method, because copy.deepcopy of the model binds it to the copy
        owner.forward = forward if owner is cls else types.MethodType(forward, owner)
        _on_head(owner, prepare_head)
    return model_or_class_or_name


def unpatch(model_or_class_or_name: Target) -> Target:
    """Undo `patch`; what was not patched stays as it is."""
    owner = _resolve(model_or_class_or_name)
    present = vars(owner).get(_PATCH)
    if present is None:
        return model_or_class_or_name
    if getattr(vars(owner).get("forward"), _PATCH, False):
        if present.original is None:
            del owner.forward
        else:
            owner.forward = present.original
        delattr(owner, _PATCH)
        _on_head(owner, release_head)
    else:
        # somebody wrapped our forward, so it has to stay, but only passes calls through
        present.enabled = False
    return model_or_class_or_name


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside torch.compile, (Distributed)DataParallel and PEFT wrappers."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif isinstance(getattr(model, "module", None), nn.Module):
            model = model.module
        else:
            return model


def loss_options(model: nn.Module, head: nn.Module, settings: Any) -> LossOptions:
    """Options of a loss of `model`, with the vocabulary state it carries."""
    owner = type(model).__name__
    size = vocab_size(head, owner)
    state = None
    if settings.state:
        state = vars(model).get(_STATE)
        if state is None or len(state.order) != size:
            # beside the model's modules, so that checkpoints of the model stay as they are
            state = vars(model)[_STATE] = VocabState(size, device=head.weight.device)
    return LossOptions(owner, settings.impl, settings.filter_eps, state)


def output_head(model: nn.Module) -> nn.Module:
    """The module of `model` that projects into the vocabulary."""
    head = model.get_output_embeddings()
    if head is None:
        raise TypeError(f"expected {type(model).__name__} to have output embeddings, got None")
    return head


def _on_head(owner: nn.Module | type, action: Callable[[nn.Module], None]) -> None:
    head = None if isinstance(owner, type) else owner.get_output_embeddings()
    if head is not None:
        action(head)


def _wrap(class_forward: Callable[..., Any], per_instance: bool) -> Callable[..., Any]:
    """A forward that defers the head, for an instance or for the class of `class_forward`."""

    @functools.wraps(class_forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if per_instance:
            settings = vars(self)[_PATCH]
            original = settings.original or functools.partial(_plain(type(self).forward), self)
        else:
            settings = next(vars(c)[_PATCH] for c in type(self).__mro__ if _PATCH in vars(c))
            original = functools.partial(class_forward, self)
        return _run(self, settings, original, args, kwargs)

    setattr(forward, _PATCH, True)
    return forward


def _run(
    model: nn.Module,
    settings: _Patch,
    original: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    position = _labels_position(type(model))
    labels = args[position] if len(args) > position else kwargs.get("labels")
    skip = settings.train_only and not model.training
    if labels is None or skip or not settings.enabled:
        return original(*args, **kwargs)
    losses: list[None] = []
    head = output_head(model)
    options = loss_options(model, head, settings)
    with defer_head(head, options, lambda: losses.append(None)):
        output = original(*args, **kwargs)
    return _resolve_logits(output, drop=bool(losses))


def _resolve_logits(output: Any, drop: bool) -> Any:
    """`output` without its deferred logits, or with their values where no loss used them."""

    def resolve(value: Any) -> Any:
        if not isinstance(value, DeferredLogits):
            return value
        return None if drop else value.materialize()

    if isinstance(output, DeferredLogits):
        return resolve(output)
    if isinstance(output, tuple):
        resolved = ((value, resolve(value)) for value in output)
        return tuple(new for old, new in resolved if new is not None or old is None)
    if isinstance(output, dict):
        return type(output)(**{key: resolve(value) for key, value in output.items()})
    return output


def _plain(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A class's forward as it was before `patch`."""
    while getattr(forward, _PATCH, False):
        forward = forward.__wrapped__
    return forward


@functools.cache
def _labels_position(cls: type) -> int | None:
    """Position of `labels` in the forward of a model class, after self; None without it."""
    names = list(inspect.signature(cls.forward).parameters)
    return names.index("labels") - 1 if "labels" in names else None


def _is_fused_by_trl(forward: Callable[..., Any] | None) -> bool:
    code = getattr(getattr(forward, "__func__", None), "__code__", None)
    return code is not None and "fused_lm_head" in code.co_varnames


def _resolve(target: nn.Module | type | str) -> nn.Module | type:
    """The model or class that `target` stands for."""
    if isinstance(target, str):
        return _class_by_name(target)
    if isinstance(target, nn.Module):
        target = unwrap(target)
    elif not (isinstance(target, type) and issubclass(target, nn.Module)):
        raise TypeError(f"expected a model, a model class or its name, got {type(target).__name__}")
    if not hasattr(target, "get_output_embeddings"):
        name = target.__name__ if isinstance(target, type) else type(target).__name__
        raise TypeError(f"expected a language model of transformers, got {name}")
    return target


def _class_by_name(name: str) -> type:
    try:
        import transformers
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    except ModuleNotFoundError:
        raise ImportError(
            "patching by name needs transformers: pip install 'gemma_ext[hf]'"
        ) from None

    found = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(name, name), None)
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ValueError(
            f"expected the class name or model type of a causal language model, got {name!r}"
        )
    return found
