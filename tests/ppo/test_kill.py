"""A run that is killed ten times at random gives the bits of one that was left alone."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

CHECKS = Path(__file__).with_name("checks_kill.py")


@pytest.mark.slow
def test_killed_ten_times(tmp_path):
    seed = random.randrange(2**31)
    done = subprocess.run(
        [sys.executable, str(CHECKS), str(tmp_path), str(seed)],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, f"seed {seed}: {done.stderr[-2000:]}"
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found["steps"]) == 10, seed
    assert found["steps"][-1] < 30, seed
    assert found["weights"], f"seed {seed}: {found}"
    assert found["history"], f"seed {seed}: {found}"
