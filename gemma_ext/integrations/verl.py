"""The fused head of `verl`: log-probabilities and entropy, right under a soft-cap.

verl's own fused heads (`use_fused_kernels`, backends torch and triton) know a temperature and no
cap, so a model of Gemma 2 trains on other logits than it samples from. The functions here have
their signatures, and the cap; `install` puts them where verl's forwards look them up:

    gemma_ext.integrations.verl.install(model.config)

Signatures as of verl 0.8 and 0.9.1; in the second its torch backend may also be liger's.
"""

from __future__ import annotations

import functools
import importlib
import sys
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from gemma_ext.distributed import vocab_parallel_linear_logprobs
from gemma_ext.ops.cce import linear_logprobs

__all__ = ["FusedLinearForPPO", "install", "linear_cross_entropy", "uninstall"]

_PLACES = {
    "FusedLinearForPPO": "verl.utils.experimental.torch_functional",
    "linear_cross_entropy": "verl.utils.kernel.linear_cross_entropy",
}
_REDUCTIONS = ("none", "sum", "mean")
_originals: dict[str, Any] = {}


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: dist.ProcessGroup | None = None,
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """verl's `linear_cross_entropy` (its triton backend).

    Args:
        hidden: [..., D]; weight: [V, D], or this rank's rows of it, in rank order, with a group;
            labels: of any shape with as many elements as `hidden` has rows.
        temperature: divides the logits after the cap.
        reduction: of the log-probabilities: "none", "sum" or "mean".
        dist_process_group: ranks over which the vocabulary is spread.
        softcap, logit_scale, options: as in `gemma_ext.linear_logprobs`.

    Returns:
        (log_probs, entropy), float32, shaped as `labels`, where verl's are flat; log_probs a number
        unless reduction is "none".

    Raises:
        TypeError, ValueError: as `gemma_ext.linear_logprobs`; an unknown reduction.
    """
    if reduction not in _REDUCTIONS:
        raise ValueError(
            f"expected reduction to be one of {', '.join(_REDUCTIONS)}, got {reduction!r}"
        )
    options = {
        "temperature": temperature,
        "softcap": softcap,
        "logit_scale": logit_scale,
        **options,
    }
    # flat: verl's Megatron forward has states [T, 1, D] beside labels [1, T]
    rows, flat = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    if dist_process_group is None:
        log_probs, entropy = linear_logprobs(rows, weight, flat, **options)
    else:
        log_probs, entropy = vocab_parallel_linear_logprobs(
            rows, weight, flat, group=dist_process_group, **options
        )
    log_probs, entropy = log_probs.view(labels.shape), entropy.view(labels.shape)
    if reduction == "sum":
        log_probs = log_probs.sum()
    if reduction == "mean":
        log_probs = log_probs.mean()
    return log_probs, entropy


class FusedLinearForPPO(nn.Module):
    """verl's module of this name (its torch backend).

    Args:
        chunk_size, impl_backend: not looked at.
        softcap, logit_scale, options: as in `gemma_ext.linear_logprobs`.
    """

    def __init__(self, chunk_size: int = 512, impl_backend: str = "torch", **options: Any) -> None:
        super().__init__()
        self.chunk_size = chunk_size
        self.options = options

    def forward(
        self,
        hidden_states: Tensor,
        vocab_weights: Tensor,
        input_ids: Tensor,
        temperature: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """(log_probs, entropy), float32, shaped as `input_ids`."""
        return linear_cross_entropy(
            hidden_states, vocab_weights, input_ids, temperature, **self.options
        )


def install(config: Any = None, **options: Any) -> None:
    """Put the two above in the place of verl's, for every model of this process.

    Modules of verl that have imported one already, as its Megatron forwards do, get it too.

    Args:
        config: of the model, whose text part names `final_logit_softcapping` and, as a number,
            `logit_scale`.
        options: of `gemma_ext.linear_logprobs`; they come before what `config` says.

    Raises:
        ImportError: verl is missing, or has its fused heads elsewhere.
    """
    options = {**_of(config), **options}
    ours = {
        "FusedLinearForPPO": functools.partial(FusedLinearForPPO, **options),
        "linear_cross_entropy": functools.partial(linear_cross_entropy, **options),
    }
    modules = {name: _module(place, name) for name, place in _PLACES.items()}
    for name, module in modules.items():
        now = getattr(module, name)
        _originals.setdefault(name, now)
        _replace(name, now, ours[name])


def uninstall() -> None:
    """Give verl its own back."""
    for name in list(_originals):
        now = getattr(_module(_PLACES[name], name), name)
        _replace(name, now, _originals.pop(name))


def _replace(name: str, old: Any, new: Any) -> None:
    for place, module in list(sys.modules.items()):
        if place.startswith("verl.") and getattr(module, "__dict__", {}).get(name) is old:
            setattr(module, name, new)


def _of(config: Any) -> dict[str, Any]:
    if config is None:
        return {}
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = {"softcap": getattr(text, "final_logit_softcapping", None)}
    scale = getattr(text, "logit_scale", None)
    return found if scale is None else {**found, "logit_scale": float(scale)}


def _module(place: str, name: str) -> Any:
    try:
        module = importlib.import_module(place)
    except ModuleNotFoundError as error:
        raise ImportError(f"expected verl with {place}.{name}, got: {error}") from error
    if not hasattr(module, name):
        raise ImportError(f"expected verl with {place}.{name}, got a module without it")
    return module
