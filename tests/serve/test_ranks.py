"""Processes that share one model: where they listen, and what they leave behind."""

import os
import sys
from pathlib import Path

import pytest
import torch
from serve_tiny import tiny

from gemma_ext.serve.ranks import Ranks
from gemma_ext.serve.runner import Sizes
from gemma_ext.serve.weights import read_weights

_LISTENS = "0A"


def read(rank):
    return read_weights(tiny("Gemma2", loops=2, rank=4, dtype=torch.float32))


def listening(process):
    """Addresses, in hex, at which a process takes connections."""
    links = (_link(path) for path in Path(f"/proc/{process}/fd").iterdir())
    nodes = {link[8:-1] for link in links if link.startswith("socket:[")}
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_, node = line.split()[:10]
            if state == _LISTENS and node in nodes:
                found.add(local)
    return found


def _link(path):
    try:
        return os.readlink(path)
    except OSError:  # closed meanwhile
        return ""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_nobody_outside_the_machine_reaches_the_ranks():
    before = listening(os.getpid())
    ranks = Ranks(read(0), read, 2, "gloo", Sizes(4, 8, 16, 64), {})
    try:
        (other,) = (process.pid for process in ranks._processes)
        found = (listening(os.getpid()) - before) | listening(other)
        folder = Path(ranks._folder.name)
        assert folder.stat().st_mode & 0o777 == 0o700
    finally:
        ranks.close()
    assert found
    assert all(address.startswith("0100007F:") for address in found)
    assert not folder.exists()
