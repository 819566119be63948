"""How far implementations of one name lie apart, on generated fine-tunes in bfloat16.

    python benchmarks/souping_facts.py

Base weights have a standard deviation of 0.02; the deltas of three fine-tunes have 4e-4, 1e-4 or
2e-5, which is what full fine-tuning, short fine-tuning and a low learning rate leave. Prints the
tables of docs/kernels/souping.md; no number here is a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gemma_ext.souping import METHODS, constant, merge_tensors

N, SIZES = 1 << 20, (4e-4, 1e-4, 2e-5)
READINGS = ("ties", "ties_ref", "ties_mergelm", "ties_row", "ties_ls")


def family(size: float, models: int = 3) -> tuple[list[Tensor], Tensor]:
    """bfloat16 [1024, 1024] each: fine-tunes and their base."""
    generator = torch.Generator().manual_seed(0)

    def normal() -> Tensor:
        return torch.randn(1024, N // 1024, generator=generator)

    base = (0.02 * normal()).bfloat16()
    return [(base.float() + size * normal()).bfloat16() for _ in range(models)], base


def merge(name: str, tunes: list[Tensor], base: Tensor | None, **parameters: object) -> Tensor:
    method = METHODS[name]()
    values = constant(method, len(tunes), **parameters)
    models = [{"w": tune} for tune in tunes]
    origin = None if base is None else {"w": base}
    return merge_tensors(method, models, origin, values)["w"]


def rounding(tunes: list[Tensor]) -> tuple[float, float]:
    """(share of wrong elements, RMS error against correct rounding) of a mean in bfloat16 steps."""
    weights = [0.3, 0.3, 0.4]
    true = sum(w * t.double() for w, t in zip(weights, tunes, strict=True))
    right = merge("linear", tunes, None, weight=weights)
    steps = torch.stack(tunes) * torch.tensor(weights, dtype=torch.bfloat16).view(-1, 1, 1)
    steps = steps.sum(0) / torch.tensor(weights, dtype=torch.bfloat16).sum()
    errors = [(x.double() - true).square().mean().sqrt() for x in (steps, right)]
    return float((steps != right).double().mean()), float(errors[0] / errors[1])


def karcher_in_bf16(tunes: list[Tensor]) -> Tensor:
    """Ten steps with every intermediate in bfloat16."""
    units = [(t / t.norm()).flatten() for t in tunes]
    u = sum(units) / len(units)
    u = u / u.norm()
    for _ in range(10):
        tangent = torch.zeros_like(u)
        for x in units:
            c = torch.dot(u, x).clamp(-1, 1)
            angle = torch.arccos(c)
            if float(angle) > 1e-5:
                tangent += (angle / torch.sin(angle)) * (x - c * u) / len(units)
        length = tangent.norm()
        if float(length) < 1e-5:
            break
        u = torch.cos(length) * u + torch.sin(length) * tangent / length
        u = u / u.norm()
    return u.view_as(tunes[0]) * (sum(t.norm() for t in tunes) / len(tunes))


def relative(x: Tensor, true: Tensor) -> float:
    return float((x.double() - true.double()).norm() / true.double().norm())


def row(name: str, values: list[str]) -> None:
    print("| " + " | ".join([name, *values]) + " |")


def main() -> None:
    families = [family(size) for size in SIZES]
    row("standard deviation of deltas", [f"{size:g}" for size in SIZES])
    row("---", ["---"] * len(SIZES))
    moved = [(t[0].float() - b.float()).abs() for t, b in families]
    row("distinct magnitudes of 1 M deltas", [str(len(m.unique())) for m in moved])
    row("deltas that are exactly 0", [f"{float((m == 0).double().mean()):.1%}" for m in moved])
    for name in READINGS:
        kept = [
            merge(name, tunes[:1], base, weight=1.0, density=0.2) != base
            for tunes, base in families
        ]
        row(f"kept by `{name}` at density 0.2", [f"{float(k.double().mean()):.1%}" for k in kept])
    wrong = [rounding(tunes) for tunes, _ in families]
    row("mean of 3 in bf16 steps: wrong elements", [f"{share:.0%}" for share, _ in wrong])
    row("its RMS error, in that of correct rounding", [f"{ratio:.1f}" for _, ratio in wrong])
    cosines = [torch.cosine_similarity(t[0].double().flatten(), b.double().flatten(), 0)
               for t, b in families]  # fmt: skip
    row("cosine of a fine-tune with its base", [f"{float(c):.5f}" for c in cosines])
    exact = [merge_wide(tunes) for tunes, _ in families]
    steps = [karcher_in_bf16(tunes) for tunes, _ in families]
    row("Karcher in bf16 steps, relative error",
        [f"{relative(s, e):.1e}" for s, e in zip(steps, exact, strict=True)])  # fmt: skip
    plain = [sum(t.double() for t in tunes) / 3 for tunes, _ in families]
    row("Karcher against the plain mean",
        [f"{relative(p, e):.1e}" for p, e in zip(plain, exact, strict=True)])  # fmt: skip


def merge_wide(tunes: list[Tensor]) -> Tensor:
    return merge("karcher", [t.float() for t in tunes], None)


if __name__ == "__main__":
    main()
