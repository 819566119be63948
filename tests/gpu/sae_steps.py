"""Every op of sparse dictionaries on one problem, its results by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gemma_ext.ops.sae import (
    Codes,
    Steering,
    decode,
    decode_error,
    encode_batch_topk,
    encode_group_max,
    encode_threshold,
    encode_topk,
    nested_errors,
    scatter,
    steer,
)


def inputs(n: int, width: int, features: int, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Whole numbers, whose products are exact, so that engines and cards agree to the bit."""
    g = torch.Generator().manual_seed(n + features)
    shapes = {"x": (n, width), "encoder": (features, width), "decoder": (features, width)}
    found = {name: torch.randint(-2, 3, s, generator=g).to(dtype) for name, s in shapes.items()}
    found["bias"] = torch.randint(-3, 4, (features,), generator=g).float()
    found["mask"] = torch.rand(features, generator=g) < 0.2
    here: dict[str, Any] = {name: t.to(device) for name, t in found.items()}
    rows = here["decoder"][:3], here["encoder"][:3]
    here["steering"] = Steering(rows[0], encoder=rows[1], mode="ablate", gate="per_token")
    here["steering"].requests  # noqa: B018  packed from Python's numbers, which waits
    return here


def encoders(q: dict[str, Any], k: int, capacity: int | None = 64) -> dict[str, Codes]:
    """What waits for the device is left out with a capacity."""
    x, w, b, n = q["x"], q["encoder"], q["bias"], len(q["x"])
    top = encode_topk(x, w, b, k=k, aux=(q["mask"], k))
    return {
        "topk": top.codes,
        "aux": top.aux,
        "batch": encode_batch_topk(x, w, b, total=n * k).codes,
        "threshold": encode_threshold(x, w, b, threshold=60.0, capacity=capacity).codes,
        "groups": encode_group_max(x, w, b, groups=1),
    }


def results(q: dict[str, Any], k: int = 8, capacity: int | None = 64) -> dict[str, Tensor]:
    """Forward and backward of everything."""
    x, found = q["x"], {}
    decoder = q["decoder"].detach().clone().requires_grad_()
    for name, codes in encoders(q, k, capacity).items():
        values = torch.relu(codes.values).detach().requires_grad_()
        sparse = codes.with_values(values)
        residual, squared = decode_error(sparse, decoder, None, x)
        loss = squared.sum() + decode(sparse, decoder, unit_norm=name == "topk").sum()
        grads = torch.autograd.grad(loss, (values, decoder))
        sums, totals = scatter(sparse, x)
        here = [codes.values, codes.indices, residual, squared, *grads, sums, totals]
        found |= {f"{name} {i}": t.detach() for i, t in enumerate(here)}
    top = encode_topk(x, q["encoder"], q["bias"], k=k).codes
    errors = nested_errors(top, decoder, None, x, by="rank")
    found["nested"] = errors.detach()
    found["d nested"] = torch.autograd.grad(errors.sum(), decoder)[0]
    found["steered"] = steer(x, q["steering"])
    return found
