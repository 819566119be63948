"""No encoder holds the [N, F] pre-activations: peak resident memory in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
N, D, F, K = 8192, 32, 32768, 16
DENSE = 4 * N * F

SCRIPT = """
import json, sys
import torch
from gemma_ext.ops import sae

name, n, d, f, k = json.loads(sys.argv[1])
torch.set_num_threads(2)

def hwm():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))

def call(rows, features):
    x = torch.randn(rows, d)
    weight = (torch.randn(features, d) / d**0.5).requires_grad_()
    mask = torch.rand(features) < 0.1
    base = None
    if rows == n:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        base = hwm()
    if name == "topk":
        codes = sae.encode_topk(x, weight, k=k, aux=(mask, k)).codes
    elif name == "groups":
        codes = sae.encode_group_max(x, weight, groups=k)
    elif name == "batch":
        codes = sae.encode_batch_topk(x, weight, total=rows * k, aux=(mask, k)).codes
    else:
        # 16 of 32768 normal numbers are above
        codes = sae.encode_threshold(x, weight, threshold=3.3).codes
    codes.values.sum().backward()
    return base

call(64, 512)
base = call(n, f)
print(hwm() - base)
"""


@pytest.mark.parametrize("name", ["topk", "groups", "batch", "threshold"])
def test_peak(name):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps([name, N, D, F, K])],
        env=os.environ | {"PYTHONPATH": ROOT, "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    lists = 8 * N * K
    gradients = 4 * F * D + 4 * F
    # candidates: four times the lists and a part of a tile for each row in work; an arena of the
    # batch grows by half and keeps what its spans do not tell apart
    assert int(done.stdout) < 3 * gradients + 12 * lists + (48 << 20) < DENSE / 8
