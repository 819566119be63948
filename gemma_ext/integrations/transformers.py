"""Patch causal language models of `transformers` so that their loss never holds the logits.

    patch(model)                      # one model, also behind PEFT, DDP or torch.compile
    patch(Gemma2ForCausalLM)          # every instance of a class
    patch("gemma2")                   # the same by model type or class name

The model's own forward still runs, from the backbone to auxiliary losses; only the head's product
is deferred (`gemma_ext.nn._deferred_logits`) until the model asks for a cross-entropy.
Soft-caps, logit scales, shifted labels, `num_items_in_batch`, `logits_to_keep`, router losses and
adapters on the head are therefore the model's, not a copy of them, and a model that treats its
logits in a way that cannot be deferred raises instead of training on another loss.

With `labels`, outputs carry `logits=None`; without, nothing changes. An evaluation in which a
`Trainer` collects logits (`predict`, `compute_metrics`) keeps them.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from gemma_ext.extras import require
from gemma_ext.integrations._forwards import layers, level_of, stand_in
from gemma_ext.integrations._labelled_forward import Forward, Settings, run
from gemma_ext.nn._defer_head import prepare_head, release_head
from gemma_ext.nn._models import output_head, unwrap
from gemma_ext.ops.cce import inputs

__all__ = ["patch", "unpatch"]

Target = TypeVar("Target", bound="nn.Module | type | str")
_PATCH = "_gemma_ext_patch"
_REPLACED = "_gemma_ext_replaced"


def patch(
    model_or_class_or_name: Target,
    *,
    impl: str = "auto",
    filter_eps: float | str | None = "auto",
    memory: str = "default",
    state: object = None,
    train_only: bool | None = None,
) -> Target:
    """Make a language model compute its loss with `gemma_ext.linear_cross_entropy`.

    A patched model is pickled, copied and unwrapped with its patch; a patched class is the matter
    of its process.

    Args:
        model_or_class_or_name: a model (wrappers are looked through), a model class, or the name of
            one: a class name such as "Gemma2ForCausalLM" or a model type such as "gemma2".
        impl, filter_eps, memory: as in `gemma_ext.linear_cross_entropy`.
        state: ignored; there is no state any more.
        train_only: True leaves evaluation as it is, logits included; False drops the logits of
            every call with labels; None keeps them where a `Trainer` collects them, and warns once
            of other evaluations.

    Returns:
        The argument. Patching again replaces the options.

    Raises:
        ValueError: unknown name or option, or a class whose forward takes no labels.
        TypeError: not a model, a class or a name; a model without a head into the vocabulary.

    Example:
        >>> model = patch(AutoModelForCausalLM.from_pretrained("google/gemma-2-2b"))
        >>> Trainer(model=model, ...).train()
    """
    inputs.Method(impl, filter_eps, memory=memory)
    warn_of_state(state)
    owner = _resolve(model_or_class_or_name)
    cls = owner if isinstance(owner, type) else type(owner)
    if "labels" not in inspect.signature(cls.forward).parameters:
        raise ValueError(f"expected the forward of {cls.__name__} to take labels")
    present = vars(owner).get(_PATCH)
    below = list(present.below) if present else []
    installed = vars(owner).get("forward")
    level = level_of(installed)
    if level is None:
        below.append(installed)
    else:
        below = [*below, *[None] * (level + 1)][: level + 1]
    if any("fused_lm_head" in _names(forward) for forward in layers(below[-1])):
        raise ValueError(
            "expected a model with its own forward, got one whose head a trainer of trl has fused; "
            "use gemma_ext.integrations.trl.patch(trainer)"
        )
    head = _require_head(owner)
    setattr(owner, _PATCH, Settings(below, impl, filter_eps, memory, train_only))
    if level is None and owner is cls:
        cls.forward = _class_forward(cls, len(below) - 1)
    elif level is None:
        owner.forward = PatchedForward(owner, len(below) - 1)
        prepare_head(head)
    return model_or_class_or_name


def unpatch(model_or_class_or_name: Target) -> Target:
    """Undo `patch`; what was not patched stays as it is."""
    owner = _resolve(model_or_class_or_name)
    present = vars(owner).get(_PATCH)
    if present is None:
        return model_or_class_or_name
    level = level_of(vars(owner).get("forward"))
    if level is not None:
        replaced = present.below[level]
        del present.below[level:]
        if replaced is None:
            del owner.forward
        else:
            owner.forward = replaced
    if present.below:
        # somebody wrapped a forward of ours, so it has to stay, but only passes calls through
        present.enabled = False
    else:
        delattr(owner, _PATCH)
    if not isinstance(owner, type) and (head := owner.get_output_embeddings()) is not None:
        release_head(head)
    return model_or_class_or_name


class PatchedForward:
    """`model.forward` of a patched model.

    In place of a bound method, which is pickled by its name and so comes back as the forward of the
    class.

    Args:
        model: patched.
        level: of its function, in `Settings.below` of the model.
    """

    __slots__ = ("__func__", "__self__")

    def __init__(self, model: nn.Module, level: int) -> None:
        self.__self__ = model
        self.__func__ = _instance_forward(type(model), level)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__func__(self.__self__, *args, **kwargs)

    @property
    def __wrapped__(self) -> Forward:
        # accelerate's unwrap_model binds the innermost of these to the model
        return self.__func__

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.__func__.__get__(self.__self__))

    def __reduce__(self) -> tuple[Any, ...]:
        return PatchedForward, (self.__self__, level_of(self))


def warn_of_state(state: object) -> None:
    """Warn whoever still passes the vocabulary state of earlier releases."""
    if state is not None:
        warnings.warn(
            "state is ignored and will be refused from the next release on: the loss carries "
            "nothing from step to step",
            FutureWarning,
        )


def _require_head(owner: nn.Module | type) -> nn.Module | None:
    """The head of a model; of a class, whether its models can have one."""
    if not isinstance(owner, type):
        return output_head(owner)
    # the accessor that all models inherit knows no head but `lm_head`
    inherited = owner.get_output_embeddings.__qualname__.startswith("EmbeddingAccessMixin.")
    makers = [vars(base)["__init__"] for base in owner.__mro__ if "__init__" in vars(base)]
    if inherited and not any("lm_head" in _names(inspect.unwrap(make)) for make in makers):
        raise TypeError(f"expected {owner.__name__} to have output embeddings, got None")
    return None


def _instance_settings(model: nn.Module) -> Settings | None:
    return vars(model).get(_PATCH)


@functools.cache
def _instance_forward(cls: type, level: int) -> Forward:
    """The forward of patched models of class `cls`, for all of them."""

    def below(model: nn.Module) -> Forward:
        settings = vars(model).get(_PATCH)
        replaced = settings.below[level] if settings and level < len(settings.below) else None
        return replaced or functools.partial(_plain(type(model).forward), model)

    return _forward(cls.forward, level, _instance_settings, below)


def _class_forward(cls: type, level: int) -> Forward:
    """The forward of a patched class, which calls the one that `cls` has now."""
    replaced = cls.forward

    def settings(model: nn.Module) -> Settings | None:
        return vars(cls).get(_PATCH)

    def below(model: nn.Module) -> Forward:
        return functools.partial(replaced, model)

    forward = _forward(replaced, level, settings, below)
    setattr(forward, _REPLACED, replaced)
    return forward


def _forward(
    replaced: Forward,
    level: int,
    settings_of: Callable[[nn.Module], Settings | None],
    below_of: Callable[[nn.Module], Forward],
) -> Forward:
    """A forward in the place of the function `replaced` that defers the head."""
    position = list(inspect.signature(replaced).parameters).index("labels") - 1

    @stand_in(replaced, level)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        settings, below = settings_of(self), below_of(self)
        labels = args[position] if len(args) > position else kwargs.get("labels")
        if labels is None or settings is None or not settings.enabled:
            return below(*args, **kwargs)
        return run(self, settings, below, args, kwargs)

    return forward


def _plain(forward: Forward) -> Forward:
    """A class's forward as it was before `patch`."""
    while level_of(forward) is not None:
        forward = getattr(forward, _REPLACED)
    return forward


def _names(function: Any) -> tuple[str, ...]:
    """Local variables and attributes that a plain function uses."""
    code = getattr(function, "__code__", None)
    return () if code is None else code.co_varnames + code.co_names


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
    require("patching by name", "hf", "transformers")
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    found = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(name, name), None)
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ValueError(
            f"expected the class name or model type of a causal language model, got {name!r}"
        )
    return found
