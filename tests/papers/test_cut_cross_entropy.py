"""The authors' signature and presets on our options."""

from __future__ import annotations

import pytest
import torch

from gemma_ext.papers import cut_cross_entropy as paper
from gemma_ext.reference import cce as reference
from gemma_ext.testing import assert_close


def problem():
    g = torch.Generator().manual_seed(0)
    e = torch.randn(2, 7, 8, generator=g)
    c = torch.randn(40, 8, generator=g)
    targets = torch.randint(0, 40, (2, 7), generator=g)
    targets[0, :3] = -100
    return e, c, targets


def test_thresholds_are_the_published_ones():
    assert paper.filter_threshold(torch.bfloat16) == 2.0**-12
    assert paper.filter_threshold(torch.float16) == 2.0**-15
    assert paper.filter_threshold(torch.float32) == 2.0**-28


def test_presets():
    options = {name: config.options(torch.bfloat16) for name, config in paper.PRESETS.items()}
    assert options["cce"] == {"impl": "cce", "filter_eps": 2.0**-12}
    for name in ("cce_kahan_full_c", "cce_kahan_full_e", "cce_exact", "cce_kahan_full"):
        assert options[name] == {"impl": "exact", "filter_eps": None}
    assert options["torch_compile"] == {"impl": "reference"}


@pytest.mark.parametrize("impl", paper.PRESETS)
@pytest.mark.parametrize("shift", [0, True])
def test_every_preset_gives_the_loss(impl, shift):
    e, c, targets = problem()
    want = reference.linear_cross_entropy(e, c, targets, softcap=5.0, shift=int(shift))
    loss, lse = paper.linear_cross_entropy(
        e, c, targets, softcap=5.0, shift=shift, return_lse=True, impl=impl
    )
    assert_close(loss, want, rel=1e-5)
    assert lse.shape == (2, 7 - int(shift))


def test_z_loss_of_a_returned_lse():
    e, c, targets = problem()
    loss, lse = paper.linear_cross_entropy(
        e, c, targets, shift=True, return_lse=True, impl="torch_compile"
    )
    want = reference.linear_cross_entropy(e, c, targets, shift=1, z_loss=0.1)
    assert_close(loss + 0.1 * paper.compute_z_loss(lse, targets, shift=True), want, rel=1e-6)
    assert paper.compute_z_loss(lse, targets, True, reduction="none").shape == lse.shape
    with pytest.raises(ValueError, match="expected lse to be"):
        paper.compute_z_loss(lse, targets)


def test_unknown_preset_is_named():
    with pytest.raises(ValueError, match=r"cce_kahan_full_c.*got 'cce_kahan'"):
        paper.linear_cross_entropy(*problem(), impl="cce_kahan")
