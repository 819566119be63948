"""What tests of merge methods share: fresh models, one way to run a method, and rounding bounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from gemma_ext.souping.engine.memory import merge_tensors
from gemma_ext.souping.method import Method
from gemma_ext.souping.parameters import constant

SHAPES = {
    "model.embed_tokens.weight": (13, 8),
    "model.layers.0.self_attn.q_proj.weight": (8, 8),
    "model.layers.0.mlp.up_proj.weight": (11, 8),
    "model.layers.0.norm.weight": (8,),
    "model.layers.1.mlp.down_proj.weight": (8, 11),
    "model.layers.1.gate": (1,),
}
Tensors = dict[str, Tensor]


def tensors(
    seed: int, dtype: torch.dtype = torch.float32, shapes: Mapping[str, Sequence[int]] = SHAPES
) -> Tensors:
    """Normal numbers of standard deviation 1."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(tuple(shape), generator=generator).to(dtype)
        for name, shape in shapes.items()
    }


def family(
    models: int,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    size: float = 0.1,
    shapes: Mapping[str, Sequence[int]] = SHAPES,
) -> tuple[list[Tensors], Tensors]:
    """(M fine-tunes, their base): deltas of standard deviation `size`."""
    base = tensors(seed, torch.float32, shapes)
    tunes = []
    for model in range(models):
        noise = tensors(1000 * (seed + 1) + model, torch.float32, shapes)
        tunes.append({name: (base[name] + size * noise[name]).to(dtype) for name in base})
    return tunes, {name: tensor.to(dtype) for name, tensor in base.items()}


def run(
    method: Method | type[Method],
    models: Sequence[Tensors],
    base: Tensors | None = None,
    *,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    **parameters: object,
) -> Tensors:
    """The merge in memory, with the same parameters for every tensor."""
    method = method() if isinstance(method, type) else method
    values = constant(method, len(models), seed=seed, **parameters)
    return dict(merge_tensors(method, models, base, values, dtype=dtype))


def stack(models: Sequence[Tensors], base: Tensors, name: str) -> Tensor:
    """float64 deltas [M, ...] of what float32 makes of them."""
    return torch.stack([(m[name].float() - base[name].float()).double() for m in models])


def assert_near(got: Tensors, expected: Tensors, tolerance: float = 2e-6) -> None:
    """Every element within `tolerance` of the true float64 value, relative to the largest one."""
    assert got.keys() == expected.keys()
    for name, true in expected.items():
        error = (got[name].double() - true.double()).abs()
        bound = tolerance * max(1.0, float(true.double().abs().max()))
        assert float(error.max()) <= bound, (name, float(error.max()), bound)


def assert_same(got: Tensors, expected: Tensors) -> None:
    """Bit for bit."""
    assert got.keys() == expected.keys()
    for name in expected:
        assert torch.equal(got[name], expected[name].to(got[name].dtype)), name
