"""Parts and numbers checked, and brought into the shapes that the engines take."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gemma_ext.ops.souping.parts import Part
from gemma_ext.ops.souping.rules import Cut, Mask, Numbers, RowMask

STORAGE = (torch.float32, torch.bfloat16, torch.float16)
ROUNDING = ("nearest", "stochastic")
MAX_MODELS = 64


def checked(
    parts: Sequence[Part], *, out: bool = False, base: bool = False, models: int | None = None
) -> int:
    """The number of models M of all parts; 0 without parts."""
    if isinstance(parts, Part):
        raise TypeError("expected parts to be a sequence of Part, got one Part")
    count = models
    for part in parts:
        if not isinstance(part, Part):
            raise TypeError(f"expected parts of type Part, got {type(part).__name__}")
        count = len(part.sources) if count is None else count
        if len(part.sources) != count:
            raise ValueError(
                f"expected {count} sources in every part, got {len(part.sources)} in {part.name!r}"
            )
        if not part.sources and part.base is None:
            raise ValueError(f"expected a source or a base in {part.name!r}, got neither")
        if base and part.base is None:
            raise ValueError(f"expected a base in {part.name!r}, got None")
        if out and part.out is None:
            raise ValueError(f"expected an out in {part.name!r}, got None")
        if part.models is not None and len(part.models) != count:
            raise ValueError(
                f"expected {count} entries of models in {part.name!r}, got {len(part.models)}"
            )
        if part.offset < 0:
            raise ValueError(f"expected an offset >= 0 in {part.name!r}, got {part.offset}")
        _check_tensors(part)
    if len({part.base is None for part in parts}) > 1:
        raise ValueError("expected a base in all parts or in none, got both")
    if len({first_tensor(part).device for part in parts}) > 1:
        raise ValueError("expected all parts on one device, got several")
    count = count or 0
    if count > MAX_MODELS:
        raise ValueError(f"expected at most {MAX_MODELS} models, got {count}")
    return count


def _check_tensors(part: Part) -> None:
    named = [(f"sources[{m}]", x) for m, x in enumerate(part.sources)]
    named += [(name, x) for name in ("base", "out") if (x := getattr(part, name)) is not None]
    first = named[0][1]
    for name, x in named:
        if not isinstance(x, Tensor):
            got = type(x).__name__
            raise TypeError(f"expected {name} of {part.name!r} to be a tensor, got {got}")
        if x.shape != first.shape:
            raise ValueError(
                f"expected {name} of {part.name!r} to be {list(first.shape)}, got {list(x.shape)}"
            )
        if x.dtype not in STORAGE:
            raise TypeError(
                f"expected {name} of {part.name!r} to be float32, bfloat16 or float16, "
                f"got {x.dtype}"
            )
        if x.device != first.device:
            raise ValueError(
                f"expected {name} of {part.name!r} on {first.device}, got it on {x.device}"
            )


def check_rounding(rounding: str) -> None:
    if rounding not in ROUNDING:
        raise ValueError(f"expected rounding to be one of {ROUNDING}, got {rounding!r}")


def table(name: str, value: Numbers, rows: int, models: int) -> Tensor:
    """float64 [rows, M] on the CPU of one number, [M] or [rows, M]."""
    given = _numbers(name, value)
    if given.shape not in ((), (models,), (rows, models)):
        raise ValueError(
            f"expected {name} to be one number, [{models}] or [{rows}, {models}], "
            f"got {list(given.shape)}"
        )
    return given.expand(rows, models)


def column(name: str, value: float | Sequence[float] | Tensor, rows: int) -> Tensor:
    """float64 [rows] on the CPU of one number or [rows]."""
    given = _numbers(name, value)
    if given.shape not in ((), (rows,)):
        raise ValueError(f"expected {name} to be one number or [{rows}], got {list(given.shape)}")
    return given.expand(rows)


def _numbers(name: str, value: object) -> Tensor:
    try:
        return torch.as_tensor(value, dtype=torch.float64).detach().cpu()
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"expected {name} to be numbers, got {value!r}") from None


def row_count(parts: Sequence[Part]) -> int:
    """Rows of the last dimension in all parts."""
    return sum(rows_of(part) for part in parts)


def rows_of(part: Part) -> int:
    shape = first_tensor(part).shape
    width = shape[-1] if shape else 1
    return first_tensor(part).numel() // width if width else 0


def first_tensor(part: Part) -> Tensor:
    return part.sources[0] if part.sources else part.base


def tensors_of(part: Part) -> list[Tensor]:
    """The sources, and the base where there is one."""
    return [*part.sources] if part.base is None else [*part.sources, part.base]


def device_of(parts: Sequence[Part]) -> torch.device | None:
    return first_tensor(parts[0]).device if parts else None


def models_of(part: Part) -> list[int]:
    """What each source counts as in random numbers."""
    return list(range(len(part.sources)) if part.models is None else part.models)


def check_mask(mask: Mask | RowMask | None, rows: int, models: int) -> None:
    if not isinstance(mask, Mask):
        return
    for name in ("keep", "drop"):
        cut: Cut | None = getattr(mask, name)
        if cut is None:
            continue
        streams = models if cut.quantity == "delta" else 1
        allowed = ((1, streams), (rows, streams))
        if tuple(cut.bits.shape) not in allowed or cut.ties.shape != cut.bits.shape:
            raise ValueError(
                f"expected the cut {name} to be [1, {streams}] or [{rows}, {streams}], "
                f"got {list(cut.bits.shape)}"
            )


def check_like(part: Part, name: str, given: Sequence[Tensor], models: int) -> None:
    """M tensors of the part's shape."""
    if len(given) != models:
        raise ValueError(f"expected {models} {name} in {part.name!r}, got {len(given)}")
    _check_tensors(Part([first_tensor(part)], name=part.name, out=None))
    for m, x in enumerate(given):
        if x.shape != first_tensor(part).shape:
            raise ValueError(
                f"expected {name}[{m}] of {part.name!r} to be {list(first_tensor(part).shape)}, "
                f"got {list(x.shape)}"
            )
        if x.dtype not in STORAGE:
            raise TypeError(
                f"expected {name}[{m}] of {part.name!r} to be float32, bfloat16 or float16, "
                f"got {x.dtype}"
            )


def check_rows(out: Tensor, sources: Sequence[Tensor], rows: Tensor) -> None:
    """What `gather_rows_` takes; the rows' values where they can be read without waiting."""
    if out.dim() != 2:
        raise ValueError(f"expected out to be [V, D], got {list(out.shape)}")
    if not sources:
        raise ValueError("expected at least one source, got none")
    for m, x in enumerate(sources):
        if x.dim() != 2 or x.shape[1] != out.shape[1]:
            raise ValueError(
                f"expected sources[{m}] to be [V_m, {out.shape[1]}], got {list(x.shape)}"
            )
    for name, x in [("out", out), *((f"sources[{m}]", x) for m, x in enumerate(sources))]:
        if x.dtype not in STORAGE:
            raise TypeError(f"expected {name} to be float32, bfloat16 or float16, got {x.dtype}")
        if x.device != out.device:
            raise ValueError(f"expected {name} on {out.device}, got it on {x.device}")
    if rows.dtype != torch.int64 or rows.shape != (out.shape[0], len(sources)):
        raise ValueError(
            f"expected rows to be int64 [{out.shape[0]}, {len(sources)}], "
            f"got {rows.dtype} {list(rows.shape)}"
        )
    if rows.device.type == "cpu" and rows.numel():
        top = rows.amax(0)
        for m, x in enumerate(sources):
            if top[m] >= x.shape[0]:
                raise ValueError(
                    f"expected rows of sources[{m}] below {x.shape[0]}, got {int(top[m])}"
                )


def check_moves(moves: Sequence) -> None:
    """Five tensors of one shape, dtype by dtype a storage type, on one device."""
    for move in moves:
        named = {
            name: getattr(move, name) for name in ("x", "v", "best", "group_best", "group_worst")
        }
        for name, x in named.items():
            if x.shape != move.x.shape:
                raise ValueError(
                    f"expected {name} of {move.name!r} to be {list(move.x.shape)}, "
                    f"got {list(x.shape)}"
                )
            if x.dtype not in STORAGE:
                raise TypeError(
                    f"expected {name} of {move.name!r} to be float32, bfloat16 or float16, "
                    f"got {x.dtype}"
                )
            if x.device != move.x.device:
                raise ValueError(
                    f"expected {name} of {move.name!r} on {move.x.device}, got it on {x.device}"
                )
