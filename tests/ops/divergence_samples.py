"""Argument tuples of the divergence ops, for the checks that all ops of the family go through."""

from __future__ import annotations

import torch
from cce_oracle import IGNORE
from divergence_oracle import problem

N, D, V, TEACHER_D = 11, 24, 300, 16
EPS = {"bare": 0.0, "full": 2.0**-3, "auto": -1.0}
KIND = {"bare": 0, "full": 2, "auto": 1}


def numbers(variant: str) -> tuple:
    """kind, beta, the two maps, ignore_index."""
    return (KIND[variant], 0.3, 5.0, 1.2, 0.8, 0.0, 0.9, 1.1, IGNORE)


def heads(dtype: torch.dtype, variant: str, grad: bool) -> tuple:
    x = problem(N, D, V, TEACHER_D, bias=variant != "bare", ignored=0.3, dtype=dtype, seed=1)
    mine = (x.e, x.c, x.bias)
    for t in mine:
        if t is not None:
            t.requires_grad_(grad)
    return (*mine, x.teacher_e, x.teacher_c, x.teacher_bias, x.targets)


def forward_args(dtype: torch.dtype, variant: str, grad: bool) -> tuple:
    return (*heads(dtype, variant, grad), *numbers(variant), EPS[variant])


def backward_args(dtype: torch.dtype, variant: str, grad: bool) -> tuple:
    args = forward_args(dtype, variant, grad)
    with torch.no_grad():
        _, nll, lse, _, state, masses, summary = torch.ops.gemma_ext.cce_divergence_forward(*args)
    g = torch.Generator().manual_seed(4)
    upstream = (torch.randn(N, generator=g) for _ in range(3))
    kept = (nll, lse, state, masses, summary)
    needs = (True, True, args[2] is not None)
    return (*args[:7], *kept, *upstream, *numbers(variant), 7, *needs)


SAMPLES = {"cce_divergence_forward": forward_args, "cce_divergence_backward": backward_args}
