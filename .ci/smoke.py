"""Use an installed gemma_ext as a stranger would: `python smoke.py <environment folder>`."""

import sys
from pathlib import Path

import torch

import gemma_ext
from gemma_ext import info


def loss_and_gradients(impl: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """Loss of a soft-capped head and its two gradients, from fixed inputs."""
    generator = torch.Generator().manual_seed(7)
    e = torch.randn(37, 64, generator=generator).to(dtype).requires_grad_()
    c = torch.randn(1000, 64, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(0, 1000, (37,), generator=generator)
    targets[3] = -100
    loss = gemma_ext.linear_cross_entropy(e, c, targets, softcap=30.0, impl=impl)
    loss.backward()
    return [loss.detach(), e.grad, c.grad]


def main() -> None:
    package = Path(gemma_ext.__file__).resolve()
    if Path(sys.argv[1]).resolve() not in package.parents:
        raise SystemExit(f"expected gemma_ext from {sys.argv[1]}, got {package}")
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        expected = loss_and_gradients("reference", dtype)
        for impl in ("exact", "auto"):
            for ours, theirs in zip(loss_and_gradients(impl, dtype), expected, strict=True):
                scale = theirs.abs().max().item()
                torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * scale)
    info.main()
    print(f"smoke: gemma_ext {gemma_ext.__version__} works with torch {torch.__version__}")


if __name__ == "__main__":
    main()
