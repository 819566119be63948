"""Every build of the product kernels that this processor runs, each in a process of its own."""

from __future__ import annotations

import functools

import pytest
from test_cce_isa import HERE, run_script, runnable

FUSED = [isa for isa in runnable() if isa != "baseline"]


@functools.cache
def printed(isa: str) -> list[str]:
    done = run_script(HERE / "checks_isa_sae_products.py", isa)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.slow
@pytest.mark.parametrize("isa", runnable())
def test_build_matches_float64(isa):
    assert printed(isa)[0] == isa


@pytest.mark.slow
@pytest.mark.skipif(len(FUSED) < 2, reason="one set with fused multiply-adds, or none")
def test_sums_over_tokens_and_entries_have_the_bits_of_every_set():
    assert len({printed(isa)[1] for isa in FUSED}) == 1
