"""Shards of a model in gloo processes, and what does not split."""

import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import checks_parallel
import pytest
import torch
from serve_tiny import tiny

from gemma_ext.serve.parallel import shard_weights
from gemma_ext.serve.weights import read_weights

HERE = Path(__file__).parent
RANKS = HERE.parent / "distributed" / "ranks.py"


def outcomes() -> dict[int, list[dict[str, str | None]]]:
    """What each rank of 2 and of 4 reported, {check: traceback or None}."""
    env = dict(os.environ, OMP_NUM_THREADS="1")
    env["PYTHONPATH"] = os.pathsep.join([str(HERE), *filter(None, sys.path)])
    with TemporaryDirectory() as folder:
        command = [sys.executable, RANKS, "checks_parallel", folder]
        log = subprocess.run(command, env=env, capture_output=True, text=True).stderr
        found = {}
        for world in (2, 4):
            files = [Path(folder, f"{world}-{rank}.json") for rank in range(world)]
            found[world] = [json.loads(f.read_text()) if f.exists() else {"": log} for f in files]
        return found


@pytest.mark.slow
def test_ranks_give_the_tokens_of_one_process():
    checks = {n: check for n, check in vars(checks_parallel).items() if n.startswith("check_")}
    for world, ranks in outcomes().items():
        wanted = {n for n, check in checks.items() if world in getattr(check, "worlds", (2, 4))}
        for rank, outcome in enumerate(ranks):
            failed = {name: said for name, said in outcome.items() if said is not None}
            assert not failed, f"rank {rank} of {world}:\n" + "\n".join(failed.values())
            assert set(outcome) == wanted


def test_shards_are_the_model():
    whole = read_weights(tiny("Qwen2", loops=2, rank=3))
    parts = [shard_weights(whole, rank, 2) for rank in range(2)]
    x = torch.randn(5, 32, dtype=torch.float64)
    layer, mine = whole.block[1], [part.block[1] for part in parts]
    assert torch.equal(torch.cat([p.head for p in parts]), whole.head)
    for i, name in enumerate(("q", "k", "v")):
        p = layer.qkv[i]
        assert torch.equal(torch.cat([m.qkv[i].weight for m in mine]), p.weight), name
        assert torch.equal(torch.cat([m.qkv[i].bias for m in mine]), p.bias), name
        assert torch.equal(torch.cat([m.qkv[i].lora_b for m in mine], 1), p.lora_b), name
    down = layer.down
    y = torch.randn(5, 44, dtype=torch.float64)
    summed = sum(
        y[:, part] @ m.down.weight.T + y[:, part] @ m.down.lora_a[1].T @ m.down.lora_b[1].T
        for m, part in zip(mine, (slice(0, 22), slice(22, 44)), strict=True)
    )
    torch.testing.assert_close(summed, y @ (down.weight + down.lora_b[1] @ down.lora_a[1]).T)
    assert x.shape[1] == down.weight.shape[0]


@pytest.mark.parametrize(
    ("options", "ranks", "sentence"),
    [
        ({}, 3, "ranks: expected a divisor of the 4 heads, got 3"),
        ({"intermediate_size": 43}, 2, "ranks: expected a divisor of the 43 MLP width, got 2"),
        (
            {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 36},
            2,
            "ranks: expected a divisor or a multiple of the 3 heads of keys, got 2",
        ),
        ({"vocab_size": 1}, 2, "ranks: expected at most one a token of the vocabulary, got 2"),
    ],
)
def test_what_does_not_split_is_refused(options, ranks, sentence):
    weights = read_weights(tiny("Gemma2", **options))
    with pytest.raises(ValueError, match=f"^{sentence}"):
        shard_weights(weights, ranks - 1, ranks)
