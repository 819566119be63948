"""Every operator in every dtype on shapes that a sanitizer gets through in seconds.

    compute-sanitizer --tool racecheck python tests/gpu/small_shapes.py
    compute-sanitizer --tool memcheck python tests/gpu/small_shapes.py depth divergence

No pytest: what is looked at is the memory, values are tested elsewhere.
"""

from __future__ import annotations

import sys

import torch
from depth_steps import layers, parts, rows, step_of_pages, step_of_rows
from gpu_problem import DEVICE, DTYPES, FORMS, ours, problem
from sae_steps import inputs
from sae_steps import results as sparse_results
from soup_digest import results

import gemma_ext

# tests/ops, which gpu_problem has put on the path
from divergence_oracle import KINDS  # isort: skip
from divergence_oracle import problem as two_heads  # isort: skip

SHAPES = ((130, 72, 300), (7, 136, 515), (65, 9, 257))  # whole tiles and ragged ones; padded rows


def loss(dtype: torch.dtype) -> None:
    for shape in SHAPES:
        p = problem(*shape, dtype, bias=True)
        for options in FORMS.values():
            ours(p, softcap=30.0, **options)
        ours(p, impl="cce", filter_eps="auto")
        ours(p, impl="cce", filter_eps="auto", memory="lean")
        ours(p, impl="exact", memory="lean")
        ours(p, impl="exact", label_smoothing=0.1)
        logprobs, entropy = gemma_ext.linear_logprobs(targets=p.targets, **p.leaves())
        (logprobs.sum() + entropy.sum()).backward()
        gemma_ext.linear_cross_entropy(p.e, p.c, p.targets, return_argmax=True)


def divergence(dtype: torch.dtype) -> None:
    x = two_heads(70, 72, 1100, 40, bias=True, ignored=0.2, dtype=dtype, softcap=9.0)
    for kind in KINDS:
        for options in ({"impl": "exact"}, {"impl": "cce", "filter_eps": 2.0**-4}):
            given = [t.to(DEVICE) for t in x.tensors()]
            given[0].requires_grad_()
            given[1].requires_grad_()
            found = gemma_ext.ops.cce.divergence.divergence_rows(
                *given, kind=kind, softcap=9.0, **options
            )
            found.divergence.sum().backward()


def souping(dtype: torch.dtype) -> None:
    results(dtype, DEVICE)


def sae(dtype: torch.dtype) -> None:
    sparse_results(inputs(130, 72, 1500, dtype, DEVICE), capacity=None)


def depth(dtype: torch.dtype) -> None:
    step_of_pages(*parts(dtype))
    for n in (5, 60):  # tiles of 16 and of 64 rows
        step_of_rows(layers(dtype), *rows(dtype, n))


FAMILIES = {f.__name__: f for f in (loss, divergence, souping, sae, depth)}


def main() -> None:
    for name in sys.argv[1:] or FAMILIES:
        for dtype in DTYPES:
            FAMILIES[name](dtype)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        print(f"small_shapes: {name} done", flush=True)


if __name__ == "__main__":
    main()
