"""One process and two, which share its batch, make the same steps."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

CHECKS = Path(__file__).with_name("checks_ppo_ranks.py")


_SHARDED = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("fsdp critic", "fsdp root")]


_WRAPPED = ["ddp", "adapters", "accelerate"]


@pytest.mark.parametrize("kind", ["plain", "apart", *_WRAPPED, "fsdp", *_SHARDED, "pieces"])
def test_two_ranks_are_one(kind, tmp_path):
    for package in {"adapters": ["peft"], "accelerate": ["accelerate"]}.get(kind, []):
        pytest.importorskip(package)
    done = subprocess.run(
        [sys.executable, str(CHECKS), str(tmp_path), kind],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["ranks"] == 0
    assert found["weights"] < 1e-6
    assert max(found["rewards"]) > 0
    # sums of up to 48 tokens in float32
    assert {name: apart for name, apart in found["lines"].items() if apart > 1e-5} == {}
