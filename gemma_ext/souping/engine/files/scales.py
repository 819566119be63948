"""Scales that quantisers write beside fp8 weights: weight = fp8 value * scale.

| beside `x.weight` [N, K, ...] | of shape                         | a scale for          |
|-------------------------------|----------------------------------|----------------------|
| `x.weight_scale` or           | one element                      | the tensor           |
| `x.weight_scale_inv`          | [N] or [N, 1, ...]               | each row             |
|                               | [ceil(N / 128), ceil(K / 128)]   | a block of 128 x 128 |

The first is compressed-tensors', FBGEMM's and vLLM's name, the second DeepSeek's, who multiply by
it as well. Scales of activations mean nothing to weights that are no longer fp8.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor

BLOCK = 128
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_OF_ACTIVATIONS = (".input_scale", ".output_scale")
_MARKS = re.compile(r"(scale|zero_point)[^.]*$")


def pair_scales(dtypes: Mapping[str, torch.dtype]) -> tuple[dict[str, str], set[str]]:
    """The scales of fp8 weights, and of activations.

    Args:
        dtypes: of a model's tensors, by name.

    Returns:
        names of weights to names of their scales; names of tensors that are neither.

    Raises:
        ValueError: a quantiser's tensor beside a weight that it is not known how to apply.
    """
    modules: dict[str, list[str]] = defaultdict(list)
    for name in dtypes:
        modules[name.rpartition(".")[0]].append(name)
    scales: dict[str, str] = {}
    dropped: set[str] = set()
    for name in (name for name, dtype in dtypes.items() if dtype in FP8):
        module, _, last = name.rpartition(".")
        own = (f"{name}_scale", f"{name}_scale_inv")
        beside = [n for n in modules[module] if n != name]
        dropped.update(n for n in beside if n.endswith(_OF_ACTIVATIONS))
        found = [n for n in beside if last in n[len(module) :] and _MARKS.search(n)]
        if len(found) > 1 or any(n not in own for n in found):
            raise ValueError(
                f"expected the scales of fp8 {name!r} as {own[0]!r} or {own[1]!r} alone, "
                f"got {', '.join(map(repr, found))}"
            )
        if found:
            scales[name] = found[0]
    return scales, dropped


def check_scales(name: str, shape: tuple[int, ...], scales: tuple[int, ...]) -> None:
    """Raises a ValueError unless scales of a shape fit a weight's."""
    rows = shape[:1]
    fitting = [rows, (*rows, *(1 for _ in shape[1:]))]
    if len(shape) == 2:
        fitting.append(tuple(-(-size // BLOCK) for size in shape))
    if scales not in fitting and any(size != 1 for size in scales):
        raise ValueError(
            f"expected the scales of fp8 {name!r} {list(shape)} to be one, one for each row or "
            f"for each block of {BLOCK} x {BLOCK}, got {list(scales)}"
        )


def descale(rows: Tensor, scales: Tensor, first: int, count: int) -> Tensor:
    """Rows [r, ...] from row `first` on of an fp8 weight of `count` rows, times its scales;
    float32."""
    if scales.numel() == 1:
        return rows.float() * scales.float().view(())
    step = 1 if len(scales) == count else BLOCK
    places = torch.arange(first, first + len(rows)) // step
    factors = scales.float().view(len(scales), -1)[places]
    if factors.shape[1] > 1:
        factors = factors.repeat_interleave(BLOCK, 1)[:, : rows.shape[1]]
    else:
        factors = factors.view(-1, *[1] * (rows.dim() - 1))
    return rows.float() * factors
