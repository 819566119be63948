"""Every operator in every dtype on shapes that a sanitizer gets through in seconds.

    compute-sanitizer --tool racecheck python tests/gpu/small_shapes.py

No pytest: what is looked at is the memory, values are tested elsewhere.
"""

from __future__ import annotations

import torch
from gpu_problem import DEVICE, DTYPES, FORMS, ours, problem
from sae_steps import inputs
from sae_steps import results as sparse_results
from soup_digest import results

import gemma_ext

SHAPES = ((130, 72, 300), (7, 136, 515), (65, 9, 257))  # whole tiles and ragged ones; padded rows


def main() -> None:
    for dtype in DTYPES:
        results(dtype, DEVICE)
        sparse_results(inputs(130, 72, 1500, dtype, DEVICE), capacity=None)
        for shape in SHAPES:
            p = problem(*shape, dtype, bias=True)
            for options in FORMS.values():
                ours(p, softcap=30.0, **options)
            ours(p, impl="cce", filter_eps="auto")
            ours(p, impl="exact", label_smoothing=0.1)
            logprobs, entropy = gemma_ext.linear_logprobs(targets=p.targets, **p.leaves())
            (logprobs.sum() + entropy.sum()).backward()
            gemma_ext.linear_cross_entropy(p.e, p.c, p.targets, return_argmax=True)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    print("small_shapes: done")


if __name__ == "__main__":
    main()
