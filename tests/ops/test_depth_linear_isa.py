"""Every build of linear layers and head this processor can run, each in a process of its own."""

from __future__ import annotations

import pytest
from test_cce_isa import HERE, run_script, runnable


@pytest.mark.parametrize("isa", runnable())
def test_build_matches_float64(isa):
    done = run_script(HERE / "checks_isa_depth_linear.py", isa)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == isa
