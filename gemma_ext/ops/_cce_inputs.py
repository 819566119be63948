"""Validation and shifting of the arguments of the linear cross-entropy functions."""

from __future__ import annotations

from numbers import Integral, Real

import torch
from torch import Tensor

from gemma_ext import _loader
from gemma_ext.ops.vocab_state import VocabState

IMPLS = ("auto", "cce", "exact", "reference")
REDUCTIONS = ("mean", "sum", "none")
_KERNEL_DEVICES = ("cpu", "meta", "cuda")
_CUDA_REFUSAL = _loader.cuda_refusal("cce_forward")  # looked up once: a compiler traces the checks
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_NUMBERS = (Real, torch.SymInt, torch.SymFloat)


def check_tensor(name: str, value: object) -> None:
    """Raise TypeError unless `value` is a plain tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"expected {name} to be a tensor, got {type(value).__name__}")
    if type(value).__name__ == "DTensor":
        raise TypeError(
            f"expected {name} to be a plain tensor, got DTensor; use gemma_ext.distributed: "
            "vocab_parallel_linear_cross_entropy if all ranks hold the same tokens, "
            "gather_head(c) if not"
        )


def check_vector(name: str, value: Tensor | None, size: int, device: torch.device) -> None:
    """Raise unless `value` is None or a floating [size] tensor on `device`."""
    if value is None:
        return
    check_tensor(name, value)
    if value.device != device:
        raise ValueError(f"expected {name} on {device} like e, got {value.device}")
    if not value.is_floating_point():
        raise TypeError(f"expected {name} to be floating, got {value.dtype}")
    if value.dim() != 1 or value.shape[0] != size:
        raise ValueError(f"expected {name} to be [{size}], got {list(value.shape)}")


def check_problem(
    e: Tensor, c: Tensor, targets: Tensor, bias: Tensor | None, impl: str, filter_eps: object
) -> None:
    """Raise TypeError or ValueError unless e [..., D], c [V, D], targets [...], bias [V] fit."""
    for name, value in (("e", e), ("c", c), ("targets", targets)):
        check_tensor(name, value)
        if value.device != e.device:
            raise ValueError(f"expected {name} on {e.device} like e, got {value.device}")
    check_impl(impl, filter_eps)
    if impl != "reference" and e.device.type not in _KERNEL_DEVICES:
        raise ValueError(
            f"expected e on {' or '.join(_KERNEL_DEVICES)} with impl={impl!r}, got {e.device}; "
            "impl='reference' runs anywhere and holds the logits"
        )
    if impl != "reference" and e.device.type == "cuda" and _CUDA_REFUSAL:
        raise NotImplementedError(f"{_CUDA_REFUSAL}, which holds the logits")
    allowed = _KERNEL_DTYPES + ((torch.float64,) if impl == "reference" else ())
    for name, value in (("e", e), ("c", c)):
        if value.dtype not in allowed:
            raise TypeError(
                f"expected {name} to be float32, bfloat16 or float16 "
                f"(float64 with impl='reference'), got {value.dtype}"
            )
    if c.dtype != e.dtype and not _autocast_is_on(e.device.type):
        raise TypeError(f"expected c to be {e.dtype} like e, got {c.dtype}")
    if targets.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"expected targets to be int32 or int64, got {targets.dtype}")
    if e.dim() < 1:
        raise ValueError("expected e to be [..., D], got a 0-d tensor")
    if c.dim() != 2 or c.shape[1] != e.shape[-1]:
        raise ValueError(f"expected c to be [V, {e.shape[-1]}], got {list(c.shape)}")
    if c.shape[0] < 1:
        raise ValueError("expected c to have at least one row, got 0")
    if targets.shape != e.shape[:-1]:
        raise ValueError(f"expected targets to be {list(e.shape[:-1])}, got {list(targets.shape)}")
    check_vector("bias", bias, c.shape[0], e.device)


def to_autocast(e: Tensor, c: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The three in the autocast dtype where autocast is on, as it would be for `F.linear`.

    Differentiable: gradients come back in the dtypes of the arguments.
    """
    kind = e.device.type
    if not _autocast_is_on(kind):
        return e, c, bias
    dtype = torch.get_autocast_dtype(kind)
    return e.to(dtype), c.to(dtype), None if bias is None else bias.to(dtype)


def _autocast_is_on(device_type: str) -> bool:
    # torch knows no autocast on meta and raises when asked
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def check_impl(impl: object, filter_eps: object) -> None:
    """Raise ValueError or TypeError unless both are known."""
    if impl not in IMPLS:
        raise ValueError(f"expected impl to be one of {', '.join(IMPLS)}, got {impl!r}")
    check_filter_eps(filter_eps)


def check_state(state: object, vocab: int, device: torch.device) -> None:
    """Raise TypeError or ValueError unless None or a `VocabState` of `vocab` ids on `device`."""
    if state is None:
        return
    if not isinstance(state, VocabState):
        raise TypeError(f"expected state to be None or a VocabState, got {type(state).__name__}")
    if state.order.shape[0] != vocab:
        raise ValueError(f"expected state for {vocab} ids, got {state.order.shape[0]}")
    if state.order.device != device:
        raise ValueError(f"expected state on {device} like e, got {state.order.device}")


def check_filter_eps(filter_eps: object) -> None:
    """Raise unless `filter_eps` is "auto", None or a number in [0, 1)."""
    if filter_eps is None or filter_eps == "auto":
        return
    if isinstance(filter_eps, (str, bool)) or not isinstance(filter_eps, (int, float)):
        raise TypeError(f"expected filter_eps to be 'auto', None or a float, got {filter_eps!r}")
    if not 0.0 <= filter_eps < 1.0:
        raise ValueError(f"expected filter_eps in [0, 1), got {filter_eps}")


def _check_number(name: str, value: object, what: str = "a number") -> None:
    if isinstance(value, bool) or not isinstance(value, _NUMBERS):
        raise TypeError(f"expected {name} to be {what}, got {type(value).__name__}")


def check_scalars(
    softcap: float | None,
    temperature: float,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
) -> None:
    """Raise TypeError unless all are numbers, ValueError unless cap and temperature are positive.

    A tensor is refused: its gradient would be lost.
    """
    if softcap is not None:
        _check_number("softcap", softcap, "None or a number")
        if not softcap > 0:
            raise ValueError(f"expected softcap to be None or positive, got {softcap}")
    _check_number("temperature", temperature)
    if not temperature > 0:
        raise ValueError(f"expected temperature to be positive, got {temperature}")
    _check_number("logit_scale", logit_scale)
    if not isinstance(ignore_index, (Integral, torch.SymInt)):
        raise TypeError(f"expected ignore_index to be an int, got {type(ignore_index).__name__}")


def check_terms(reduction: object, label_smoothing: float, z_loss: float = 0.0) -> None:
    """Raise TypeError or ValueError unless the terms of the loss and its reduction are known."""
    if reduction not in REDUCTIONS:
        raise ValueError(
            f"expected reduction to be one of {', '.join(REDUCTIONS)}, got {reduction!r}"
        )
    _check_number("label_smoothing", label_smoothing)
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"expected label_smoothing in [0, 1], got {label_smoothing}")
    _check_number("z_loss", z_loss)


def check_loss(
    reduction: str,
    label_smoothing: float,
    token_weights: Tensor | None,
    targets: Tensor,
    num_items_in_batch: object,
    z_loss: float = 0.0,
) -> None:
    """Raise TypeError or ValueError unless the options of the loss fit each other."""
    check_terms(reduction, label_smoothing, z_loss)
    if token_weights is not None:
        check_tensor("token_weights", token_weights)
        if token_weights.device != targets.device:
            raise ValueError(
                f"expected token_weights on {targets.device} like e, got {token_weights.device}"
            )
        if token_weights.shape != targets.shape:
            raise ValueError(
                f"expected token_weights to be {list(targets.shape)}, "
                f"got {list(token_weights.shape)}"
            )
    if num_items_in_batch is None:
        return
    if reduction != "mean":
        raise ValueError(f"expected reduction 'mean' with num_items_in_batch, got {reduction!r}")
    if isinstance(num_items_in_batch, Tensor):
        if num_items_in_batch.numel() != 1:
            raise ValueError(
                "expected num_items_in_batch to hold one number, "
                f"got {list(num_items_in_batch.shape)}"
            )
        return
    _check_number("num_items_in_batch", num_items_in_batch, "a number or a tensor")
    if num_items_in_batch < 0:
        raise ValueError(f"expected num_items_in_batch to be 0 or more, got {num_items_in_batch}")


def check_shift(shift: int | bool) -> int:
    """`shift` as an int; True means 1."""
    if not isinstance(shift, int):
        raise TypeError(f"expected shift to be an int or bool, got {type(shift).__name__}")
    if shift < 0:
        raise ValueError(f"expected shift to be 0 or more, got {shift}")
    return int(shift)


def resolve_shift(shift: int | bool, targets: Tensor) -> int:
    """Number of positions a label lies ahead of its hidden state.

    A sequence of no more than that many positions has none that is scored.
    """
    steps = check_shift(shift)
    if steps and targets.dim() < 1:
        raise ValueError("expected targets to be [..., T] with shift, got a 0-d tensor")
    return steps


def shift_left(values: Tensor, steps: int, fill: float) -> Tensor:
    """values[..., t + steps] at t, `fill` in the last `steps` positions; e itself is not copied."""
    if steps == 0:
        return values
    tail = torch.full_like(values[..., :steps], fill)
    return torch.cat((values[..., steps:], tail), dim=-1)
