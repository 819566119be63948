"""How implementations are called on other devices, tried with the CPU as one of them."""

from __future__ import annotations

import torch
from cce_impls import IMPLS, on_device
from cce_oracle import check, expected, problem, run

from gemma_ext import linear_cross_entropy


def test_strides_and_offsets_travel():
    seen = []

    def note(t):
        seen.append(t)
        return t * 2

    x = torch.arange(24.0).reshape(4, 6)
    for view in (x.T, x[1:, ::2], x[:1].expand(3, 6), x[3, 5:]):
        leaf = view.detach().requires_grad_()
        (grad,) = torch.autograd.grad(on_device(note, "cpu")(leaf).sum(), leaf)
        assert torch.equal(grad, torch.full_like(view, 2.0))
        assert torch.equal(seen[-1], view)
        assert seen[-1].stride() == view.stride()
        assert seen[-1].data_ptr() != view.data_ptr()


def test_loss_and_gradients_come_back():
    p = problem((3, 5), 8, 300, ignored=0.2, seed=1)
    moved = on_device(linear_cross_entropy, "cpu")
    options = {"softcap": 5.0, "token_weights": torch.rand(3, 5)}
    got = run(moved, p, return_lse=True, return_stats=True, **options)
    check(got, expected(p, **options))
    assert got[0].stats.kept_fraction == 1


def test_every_device_is_tried():
    assert ("cuda" in {impl.device for impl in IMPLS}) == torch.cuda.is_available()
