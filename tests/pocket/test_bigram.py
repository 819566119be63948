"""The baseline against a dictionary of counts, and its edges."""

import math
from collections import Counter
from itertools import pairwise

import pytest
import torch

from gemma_ext.pocket import bigram_perplexity


def kneser_ney(train: list[int], heldout: list[int], v: int) -> float:
    pairs = Counter(pairwise(train))
    context, followers, predecessors = Counter(train[:-1]), Counter(), Counter()
    for left, right in pairs:
        followers[left] += 1
        predecessors[right] += 1

    def discount(counts):
        once = sum(1 for c in counts if c == 1)
        twice = sum(1 for c in counts if c == 2)
        return once / (once + 2 * twice) if once + twice else 0.5

    d, d_low = discount(pairs.values()), discount(predecessors.values())
    total = 0.0
    for left, right in pairwise(heldout):
        low = max(predecessors[right] - d_low, 0) / len(pairs)
        low += d_low * len(predecessors) / len(pairs) / v
        p = low
        if context[left]:
            p = max(pairs[left, right] - d, 0) / context[left]
            p += d * followers[left] / context[left] * low
        total -= math.log(p)
    return math.exp(total / (len(heldout) - 1))


@pytest.mark.parametrize(("v", "n"), [(5, 40), (50, 2000), (300, 500)])
def test_bigram_perplexity_matches_the_formula(v, n):
    generator = torch.Generator().manual_seed(v)
    draw = torch.rand(n + 300, generator=generator)
    ids = (v * draw**3).long().clamp_(max=v - 1)
    got = bigram_perplexity(ids[:n], ids[n:], v)
    assert got == pytest.approx(kneser_ney(ids[:n].tolist(), ids[n:].tolist(), v), rel=1e-12)


def test_bigram_distribution_sums_to_one():
    v, train = 12, torch.tensor([0, 1, 2, 1, 0, 3, 3, 3, 1, 2, 2, 0, 5, 0, 5])
    for previous in (0, 5, 7):
        p = [1 / bigram_perplexity(train, torch.tensor([previous, w]), v) for w in range(v)]
        assert sum(p) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(
    ("train", "heldout", "message"),
    [
        ([0], [0, 1], r"train_ids: expected \[n\]"),
        ([0, 1], [[0, 1]], r"heldout_ids: expected \[n\]"),
        ([0, 9], [0, 1], r"train_ids: expected ids in \[0, 9\)"),
        ([0, 1], [0, -1], r"heldout_ids: expected ids in \[0, 9\)"),
    ],
)
def test_bigram_refuses_bad_streams(train, heldout, message):
    with pytest.raises(ValueError, match=message):
        bigram_perplexity(torch.tensor(train), torch.tensor(heldout), 9)
