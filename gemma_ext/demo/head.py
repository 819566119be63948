"""Time and peak memory of one loss on a head of Gemma-2-2B's size, in a process of its own.

    python -m gemma_ext.demo.head sampled '{"tokens": 512, "dtype": "bf16"}'

prints one JSON line. Peak memory is the kernel's high-water mark of resident memory, reset after
inputs and warm-up are in place, so nothing that another measurement left behind can hide in it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gemma_ext import linear_cross_entropy
from gemma_ext.bench.data import batch, classifier
from gemma_ext.bench.timing import Mark, PeakMemory, measure

LOSSES = ("eager", "exact", "sampled")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_TAU = {"fp32": 2.0**-8, "bf16": "auto"}  # of float32 "auto" is exact
DATA = "plaw-2.5"  # ids ordered by frequency, as a BPE vocabulary's are


@dataclass(frozen=True)
class Head:
    """A head and how it is measured.

    Attributes:
        tokens: N. width: D. vocabulary: V. The defaults are Gemma-2-2B's.
        softcap: of the logits.
        dtype: "bf16" or "fp32", storage of hidden states and classifier.
        threads: of torch.
        rounds: measured steps; the fastest counts.
    """

    tokens: int = 2048
    width: int = 2304
    vocabulary: int = 256_000
    softcap: float = 30.0
    dtype: str = "bf16"
    threads: int = 2
    rounds: int = 2


def eager_loss(e: Tensor, c: Tensor, targets: Tensor, softcap: float) -> Tensor:
    """What transformers runs for Gemma 2: e [N, D], c [V, D]; several [N, V] matrices."""
    logits = F.linear(e, c)
    logits = torch.tanh(logits / softcap) * softcap
    return F.cross_entropy(logits.float(), targets)


def measure_apart(loss: str, head: Head) -> dict[str, Any]:
    """`measure_here` in a fresh process.

    Raises:
        RuntimeError: the process failed; the message ends with what it said.
    """
    command = [sys.executable, "-m", "gemma_ext.demo.head", loss, json.dumps(asdict(head))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"head, {loss}: exit status {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure_here(loss: str, head: Head) -> dict[str, Any]:
    """One loss, forward and backward: "eager", or ours, "exact" or "sampled".

    Returns:
        seconds: fastest step; forward: its forward part; peak: bytes above the inputs; gradients:
        bytes of dE and dC in that peak; logits: bytes of float32 [N, V]; loss; kept: fraction of
        strips that the backward computed; isa: the instruction set that our kernels took.
    """
    torch.set_num_threads(head.threads)
    dtype = DTYPES[head.dtype]
    c = classifier(head.vocabulary, head.width, unit=True, scale=1.0, seed=0)
    (warm_e, warm_targets), (e, targets) = (
        batch(c, DATA, head.tokens, softcap=head.softcap, seed=seed) for seed in (1, 2)
    )
    c, e, warm_e = (tensor.to(dtype).requires_grad_() for tensor in (c, e, warm_e))
    seen: dict[str, Any] = {}

    def run(e: Tensor, targets: Tensor) -> Tensor:
        if loss == "eager":
            return eager_loss(e, c, targets, head.softcap)
        if loss == "exact":
            return linear_cross_entropy(e, c, targets, softcap=head.softcap, impl="exact")
        tau = _TAU[head.dtype]
        out = linear_cross_entropy(
            e, c, targets, softcap=head.softcap, filter_eps=tau, return_stats=True
        )
        seen["stats"] = out.stats
        return out.loss

    def step(mark: Mark, e: Tensor, targets: Tensor) -> None:
        e.grad = c.grad = None
        value = run(e, targets)
        mark()
        value.backward()
        seen["loss"] = float(value.detach())

    warm = min(64, head.tokens)
    measure(lambda mark: step(mark, warm_e[:warm], warm_targets[:warm]))
    c.grad = None
    with PeakMemory() as memory:
        runs = [measure(lambda mark: step(mark, e, targets)) for _ in range(head.rounds)]
        peak = memory.peak()
    best = min(runs, key=lambda r: r.total)
    return {
        "seconds": best.total,
        "forward": best.forward,
        "peak": peak,
        "gradients": (e.numel() + c.numel()) * e.element_size(),
        "logits": 4 * head.tokens * head.vocabulary,
        "loss": seen["loss"],
        "kept": seen["stats"].kept_fraction if "stats" in seen else 1.0,
        "isa": torch.ops.gemma_ext.cpu_isa(),
    }


if __name__ == "__main__":
    print(json.dumps(measure_here(sys.argv[1], Head(**json.loads(sys.argv[2])))))
