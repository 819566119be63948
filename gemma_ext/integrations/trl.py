"""Give the trainers of `trl` the losses of this package.

From version 1.16 the trainers of `trl` (SFT, DPO, KTO, GRPO, RLOO) install a fused head of their
own: `model(..., fused_lm_head=True)` returns per-token log-probabilities instead of logits, read
from `lm_head.weight` in chunks. That call never reaches the model's forward, so
`gemma_ext.integrations.transformers.patch` has no say in it; `patch` here replaces it.

    trainer = SFTTrainer(model=model, ...)
    gemma_ext.integrations.trl.patch(trainer)
    trainer.train()
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from gemma_ext.integrations._defer_head import defer_head
from gemma_ext.integrations._deferred_logits import DeferredLogits
from gemma_ext.integrations.transformers import loss_options, output_head, unwrap
from gemma_ext.ops.cce import cce_rows, inputs

__all__ = ["patch", "unpatch"]

Trainer = TypeVar("Trainer")
_PATCH = "_gemma_ext_trl_patch"
_IGNORE = -100


@dataclasses.dataclass
class _Patch:
    """Options of a patched model.

    Attributes:
        fused: the forward that trl installed; also answers calls without `fused_lm_head`.
        native: the forward below it.
        temperature, fields: what trl asked its own head for.
        impl, filter_eps, state: as in `patch`.
    """

    fused: Callable[..., Any]
    native: Callable[..., Any]
    temperature: float
    fields: tuple[str, ...]
    impl: str
    filter_eps: float | str | None
    state: bool


def patch(
    trainer: Trainer,
    *,
    impl: str = "auto",
    filter_eps: float | str | None = "auto",
    state: bool = True,
) -> Trainer:
    """Replace the fused head of a trl trainer, and of its reference model, by this package's.

    Call it after the trainer is built and before `train()`.

    Args:
        trainer: of trl, with a model that has a fused head.
        impl, filter_eps, state: as in `gemma_ext.integrations.transformers.patch`.

    Returns:
        The trainer.

    Raises:
        TypeError: the trainer's model has no fused head of trl.
        ValueError: unknown option, or a head that trl was told to run in float32.
    """
    if impl not in inputs.IMPLS:
        raise ValueError(f"expected impl to be one of {', '.join(inputs.IMPLS)}, got {impl!r}")
    inputs.check_filter_eps(filter_eps)
    for index, model in enumerate(_models(trainer)):
        present = vars(model).get(_PATCH)
        fused = present.fused if present else vars(model).get("forward")
        code = getattr(getattr(fused, "__func__", None), "__code__", None)
        if code is None or "fused_lm_head" not in code.co_varnames:
            if index:
                continue
            raise TypeError(
                f"expected a trainer of trl >= 1.16 whose model has a fused head and has not been "
                f"prepared for training yet, got {type(trainer).__name__}"
            )
        closed = inspect.getclosurevars(fused.__func__).nonlocals
        if closed.get("fp32_lm_head"):
            raise ValueError("expected the head to run in its own dtype, got a float32 head")
        settings = _Patch(
            fused,
            closed["original_forward"],
            closed.get("temperature", 1.0),
            tuple(closed.get("outputs", ("log_probs",))),
            impl,
            filter_eps,
            state,
        )
        setattr(model, _PATCH, settings)
        model.forward = types.MethodType(_wrap(fused.__func__), model)
    return trainer


def unpatch(trainer: Trainer) -> Trainer:
    """Give the trainer its own fused head back."""
    for model in _models(trainer):
        present = vars(model).get(_PATCH)
        if present is not None:
            model.forward = present.fused
            delattr(model, _PATCH)
    return trainer


def _models(trainer: Any) -> list[nn.Module]:
    models = [getattr(trainer, "model", None), getattr(trainer, "ref_model", None)]
    return [unwrap(model) for model in models if isinstance(model, nn.Module)]


def _wrap(fused: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(fused)
    def forward(self: nn.Module, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        settings = vars(self)[_PATCH]
        if not fused_lm_head:
            return settings.fused(*args, **kwargs)
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
    with defer_head(head, loss_options(model, head, settings)):
        output = settings.native(*args, **kwargs)
    logits = output.logits
    if not isinstance(logits, DeferredLogits):
        raise TypeError(f"expected {type(model).__name__} to return the logits of its head")
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
    rows = cce_rows(
        e,
        c,
        flat,
        bias,
        want_entropy="entropy" in fields,
        want_argmax="is_top1" in fields,
        **head,
    )
    values = {"log_probs": -rows.nll}
    if "entropy" in fields:
        values["entropy"] = rows.lse - rows.mean_logit
    if "is_top1" in fields:
        values["is_top1"] = (rows.argmax == flat) & (flat != _IGNORE)
    with torch.no_grad():
        if "log_sum_sq_probs" in fields:
            # sum_v p_v^2 = sum_v exp(2 s_v) / exp(2 lse); halving the temperature doubles s
            squared = cce_rows(e, c, flat, bias, temperature=0.5, **head)
            values["log_sum_sq_probs"] = squared.lse - 2 * rows.lse.detach()
        if "mean_logits" in fields:
            even = c.new_full((c.shape[0],), 1 / c.shape[0], dtype=torch.float32)
            averaged = cce_rows(e, c, flat, bias, class_weight=even, **head)
            values["mean_logits"] = averaged.weighted_logit_sum
    return {name: value.view(labels.shape) for name, value in values.items()}
