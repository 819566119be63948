"""The benchmark data are what their names promise."""

from __future__ import annotations

import pytest
import torch

from gemma_ext.bench import data

# A second block of 128 rows; wide enough that planted rows stand out of the near-orthogonal noise.
N, D, V = 130, 768, 3001


@pytest.mark.parametrize("alpha", [4.0, 1.3])
def test_planted_logits_are_exact_and_on_top(alpha: float) -> None:
    head = data.head_data(f"plaw-{alpha:g}", N, D, V)
    k = data.WIDTHS[alpha]
    capped = 30 * torch.tanh(head.e.double() @ head.c.double().T / 30)
    wanted = 18 - alpha * torch.log(torch.arange(1, k + 1, dtype=torch.float64))
    distance = (capped.unsqueeze(2) - wanted).abs().amin(1)  # each wanted value is met by some id
    assert distance.max() < 1e-4


def test_same_arguments_same_bits_and_seeds_differ() -> None:
    first, again = (data.head_data("plaw-2.5", N, D, V, seed=3) for _ in range(2))
    other = data.head_data("plaw-2.5", N, D, V, seed=4)
    assert torch.equal(first.e, again.e)
    assert torch.equal(first.c, again.c)
    assert torch.equal(first.targets, again.targets)
    assert not torch.equal(first.e, other.e)


def test_ids_are_distinct_and_log_uniform() -> None:
    ids = data.log_uniform_ids(2000, 16, V, generator=torch.Generator().manual_seed(0))
    assert ids.min() >= 0
    assert ids.max() < V
    assert all(len(row.unique()) == 16 for row in ids)
    first = ids[:, 0]
    below = (first < 54).float().mean()  # ln(55) / ln(3002) = 0.5005
    assert abs(below - 0.5) < 0.05


def test_every_id_is_used_when_there_are_only_k() -> None:
    ids = data.log_uniform_ids(5, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ids.sort(1).values, torch.arange(16).expand(5, 16))


def test_targets_follow_the_softmax() -> None:
    head = data.head_data("plaw-4", 2000, 256, 500)
    p = (30 * torch.tanh(head.e @ head.c.T / 30)).softmax(1)
    hit = (p.argmax(1) == head.targets).float().mean()
    assert abs(hit - p.amax(1).mean()) < 0.03


def test_shuffled_ids_lose_the_frequency_order() -> None:
    plain = data.head_data("plaw-2.5", 500, D, V).targets.float().median()
    shuffled = data.head_data("plaw-2.5-shuffled", 500, D, V).targets.float().median()
    assert plain < 0.1 * V
    assert shuffled > 0.3 * V


@pytest.mark.parametrize(
    ("kind", "d", "message"), [("plaw-3", 128, "kind"), ("plaw-1.3", 64, "at least 96")]
)
def test_bad_input_is_named(kind: str, d: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        data.head_data(kind, 4, d, V)
