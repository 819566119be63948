"""Give the trainers of `trl` the losses of this package.

From version 1.16 the trainers of `trl` (SFT, DPO, KTO, GRPO, RLOO) install a fused head of their
own: `model(..., fused_lm_head=True)` returns per-token log-probabilities instead of logits, read
from `lm_head.weight` in chunks. That call never reaches the model's forward, so
`gemma_ext.integrations.transformers.patch` has no say in it; `patch` here replaces it.

    trainer = SFTTrainer(model=model, ...)
    gemma_ext.integrations.trl.patch(trainer)
    trainer.train()

`install` puts a function with the signature of trl's in its place, for all trainers at once.
"""

from __future__ import annotations

import dataclasses
import inspect
import types
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, nn

from gemma_ext.integrations._chunked_logprob import ChunkedLogProbFunction
from gemma_ext.integrations._forwards import layers, level_of, stand_in
from gemma_ext.integrations.transformers import warn_of_state
from gemma_ext.nn._defer_head import defer_head
from gemma_ext.nn._deferred_logits import DeferredLogits, LossOptions
from gemma_ext.nn._models import output_head, unwrap
from gemma_ext.ops.cce import cce_rows, inputs

__all__ = ["ChunkedLogProbFunction", "install", "patch", "uninstall", "unpatch"]

Trainer = TypeVar("Trainer")
# of a model: its patches, more than one where trl has fused its head again for another trainer
_PATCH = "_gemma_ext_trl_patches"
_IGNORE = -100
_FUNCTION = "_ChunkedLogProbFunction"
# what trl's fused forward closes over
_CLOSURE = ("original_forward", "temperature", "cast_lm_head_to_fp32", "outputs")


@dataclasses.dataclass
class _Patch:
    """What one forward of ours does.

    Attributes:
        fused: the forward that trl installed; also answers calls without `fused_lm_head`.
        native: the forward below it.
        temperature, float32, fields: what trl asked its own head for.
        impl, filter_eps, memory: as in `patch`.
    """

    fused: Callable[..., Any]
    native: Callable[..., Any]
    temperature: float
    float32: bool
    fields: tuple[str, ...]
    impl: str
    filter_eps: float | str | None
    memory: str
    enabled: bool = True


def patch(
    trainer: Trainer,
    *,
    impl: str = "auto",
    filter_eps: float | str | None = "auto",
    memory: str = "default",
    state: object = None,
) -> Trainer:
    """Replace the fused head of a trl trainer, and of its reference model, by this package's.

    Call it after the trainer is built and before `train()`. Its temperature and its float32 head
    (`cast_lm_head_to_fp32`) are kept.

    Args:
        trainer: of trl, with a model that has a fused head.
        impl, filter_eps, memory, state: as in `gemma_ext.integrations.transformers.patch`.

    Returns:
        The trainer. Patching again replaces the options.

    Raises:
        TypeError: the trainer's model has no fused head of trl, or one of an unknown release.
        ValueError: unknown option.
    """
    inputs.Method(impl, filter_eps, memory=memory)
    warn_of_state(state)
    for index, model in enumerate(_models(trainer)):
        installed = vars(model).get("forward")
        patches = vars(model).get(_PATCH, [])
        levels = [level for f in layers(installed) if (level := _level_of(f)) is not None]
        if levels:
            patches[levels[0]] = dataclasses.replace(
                patches[levels[0]], impl=impl, filter_eps=filter_eps, memory=memory, enabled=True
            )
            continue
        if not _takes_fused_head(getattr(installed, "__func__", None)):
            if index:
                continue
            raise TypeError(
                f"expected a trainer of trl >= 1.16 whose model has a fused head and has not been "
                f"prepared for training yet, got {type(trainer).__name__}"
            )
        patches.append(_read(installed, impl, filter_eps, memory))
        setattr(model, _PATCH, patches)
        model.forward = types.MethodType(_wrap(installed.__func__, len(patches) - 1), model)
    return trainer


def _read(
    fused: Callable[..., Any], impl: str, filter_eps: float | str | None, memory: str
) -> _Patch:
    """The settings that trl's fused forward closes over."""
    closed = inspect.getclosurevars(fused.__func__).nonlocals
    missing = [name for name in _CLOSURE if name not in closed]
    if missing:
        raise TypeError(
            f"expected the fused head of trl 1.16, which closes over {', '.join(_CLOSURE)}, "
            f"got one without {', '.join(missing)}"
        )
    native, temperature, float32, fields = (closed[name] for name in _CLOSURE)
    return _Patch(fused, native, temperature, float32, tuple(fields), impl, filter_eps, memory)


def unpatch(trainer: Trainer) -> Trainer:
    """Give the trainer its own fused head back."""
    for model in _models(trainer):
        patches = vars(model).get(_PATCH)
        level = _level_of(vars(model).get("forward"))
        if level is not None:
            model.forward = patches[level].fused
            del patches[level:]
        elif patches:
            # wrapped by somebody, so our forward has to stay
            patches[-1].enabled = False
    return trainer


def _takes_fused_head(forward: Any) -> bool:
    return "fused_lm_head" in getattr(getattr(forward, "__code__", None), "co_varnames", ())


def _level_of(forward: Callable[..., Any] | None) -> int | None:
    """The level of a forward made here; one of `integrations.transformers` may lie below trl's."""
    ours = _takes_fused_head(getattr(forward, "__func__", forward))
    return level_of(forward) if ours else None


def _models(trainer: Any) -> list[nn.Module]:
    models = [getattr(trainer, "model", None), getattr(trainer, "ref_model", None)]
    return [unwrap(model) for model in models if isinstance(model, nn.Module)]


def _wrap(fused: Callable[..., Any], level: int) -> Callable[..., Any]:
    @stand_in(fused, level)
    def forward(self: nn.Module, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        settings = vars(self)[_PATCH][level]
        if not fused_lm_head or not settings.enabled:
            return settings.fused(*args, fused_lm_head=fused_lm_head, **kwargs)
        return _score(self, settings, args, kwargs)

    return forward


def _score(
    model: nn.Module, settings: _Patch, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """What trl's fused forward returns, from the logits that the model's own forward describes."""
    labels = kwargs.pop("labels", None)
    aligned = kwargs.pop("shift_labels", None)
    items = kwargs.pop("num_items_in_batch", None)
    kwargs.update(use_cache=False, return_dict=True)
    head = output_head(model)
    options = LossOptions(type(model).__name__, settings.impl, settings.filter_eps, settings.memory)
    with defer_head(head, options):
        output = settings.native(*args, **kwargs)
    logits = output.logits
    if not isinstance(logits, DeferredLogits):
        raise TypeError(f"expected {type(model).__name__} to return the logits of its head")
    if settings.float32:
        logits = logits.in_float32()
    if settings.temperature != 1.0:
        logits = logits / settings.temperature
    if aligned is None:
        logits, labels = logits[:, :-1, :], labels[:, 1:]
    else:
        labels = aligned
    labels = labels.to(logits.device)
    mask = labels != _IGNORE
    fields = per_token(logits, labels, settings.fields)
    loss = -fields["log_probs"].sum() / (mask.sum().clamp(min=1) if items is None else items)
    aux_loss = getattr(output, "aux_loss", None)
    if aux_loss is not None:
        text_config = model.config.get_text_config()
        loss = loss + getattr(text_config, "router_aux_loss_coef", 0.0) * aux_loss

    from trl.trainer.utils import FusedCausalLMOutput

    return FusedCausalLMOutput(loss=loss, label_mask=mask, aux_loss=aux_loss, **fields)


def per_token(logits: DeferredLogits, labels: Tensor, fields: tuple[str, ...]) -> dict[str, Tensor]:
    """Per-token quantities of deferred logits [..., V] and labels [...], zero where ignored.

    Args:
        fields: of "log_probs" (always returned) and "entropy", both differentiable, and, without
            gradient, "is_top1", "log_sum_sq_probs" (log sum_v p_v^2) and "mean_logits".
    """
    head = logits.head()
    e, c, bias = head.pop("e"), head.pop("c"), head.pop("bias")
    e, flat = e.reshape(-1, e.shape[-1]), labels.reshape(-1)

    with logits.autocast_of_the_head():
        rows = cce_rows(
            e,
            c,
            flat,
            bias,
            **head,
            want_entropy="entropy" in fields,
            want_argmax="is_top1" in fields,
            want_moments="log_sum_sq_probs" in fields or "mean_logits" in fields,
        )
    values = {"log_probs": -rows.nll}
    if "entropy" in fields:
        values["entropy"] = rows.entropy()
    if "log_sum_sq_probs" in fields:
        values["log_sum_sq_probs"] = rows.log_sum_sq_probs
    if "mean_logits" in fields:
        values["mean_logits"] = rows.average_logit
    if "is_top1" in fields:
        values["is_top1"] = rows.is_top1(flat) & (flat != _IGNORE)
    return {name: value.view(labels.shape) for name, value in values.items()}


_original: Any = None


def install(
    *, impl: str = "auto", filter_eps: float | str | None = "auto", memory: str = "default"
) -> None:
    """Make the trainers of trl in this process score their tokens in `ChunkedLogProbFunction`.

    One line for SFT, DPO, KTO, GRPO, RLOO and asynchronous GRPO, before or after they are built:
    they look the function up at every call. The distillation trainers have a divergence of their
    own, which stays. `patch` does more for one trainer, since it follows what the model's own
    forward does to its logits, and wins where both are used.

    Args:
        impl, filter_eps, memory: as in `gemma_ext.linear_cross_entropy`.

    Raises:
        ImportError: trl is missing. TypeError: it has no such function; 1.16 has.
        ValueError: unknown option.
    """
    global _original
    ours = type(
        "ChunkedLogProbFunction",
        (ChunkedLogProbFunction,),
        {"method": inputs.Method(impl, filter_eps, memory=memory)},
    )
    utils = _trainer_utils()
    theirs = getattr(utils, _FUNCTION, None)
    if theirs is None:
        raise TypeError(
            f"expected trl >= 1.16, which scores tokens in {_FUNCTION}, got one without"
        )
    if not issubclass(theirs, ChunkedLogProbFunction):
        _original = theirs
    setattr(utils, _FUNCTION, ours)


def uninstall() -> None:
    """Give trl its own function back."""
    utils = _trainer_utils()
    if _original is not None and issubclass(getattr(utils, _FUNCTION), ChunkedLogProbFunction):
        setattr(utils, _FUNCTION, _original)


def _trainer_utils() -> Any:
    try:
        from trl.trainer import utils
    except ModuleNotFoundError as error:
        raise ImportError(f"expected trl >= 1.16, got none: {error}") from error
    return utils
