"""Losses over several processes: each case is one check of a `checks_*` module on 2 or 4 ranks."""

import ast
from pathlib import Path

import pytest
import torch

from gemma_ext.distributed import vocab_parallel_linear_cross_entropy, vocab_shard_range


def _cases():
    for path in sorted(Path(__file__).parent.glob("checks_*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("check_"):
                limits = [
                    ast.literal_eval(arg) for mark in node.decorator_list for arg in mark.args
                ]
                for world in limits or (2, 4):
                    name = f"{node.name[6:]}-{world}"
                    yield pytest.param(path.stem, world, node.name, id=name)


@pytest.mark.parametrize(("module", "world", "check"), _cases())
def test_on_ranks(assert_check, module, world, check):
    assert_check(module, world, check)


def test_needs_an_initialised_process_group():
    with pytest.raises(RuntimeError, match="init_process_group"):
        vocab_parallel_linear_cross_entropy(
            torch.zeros(1, 2), torch.zeros(3, 2), torch.tensor([0]), impl="reference"
        )


def test_shards_follow_torch_chunking():
    for vocab in (1, 2, 3, 7, 8, 9, 257):
        for world in (1, 2, 3, 4, 8):
            sizes = [chunk.numel() for chunk in torch.arange(vocab).chunk(world)]
            sizes += [0] * (world - len(sizes))
            ranges = [vocab_shard_range(vocab, rank, world) for rank in range(world)]
            assert [stop - start for start, stop in ranges] == sizes
            assert ranges[-1][1] == vocab
