"""Routing of rows: against sorting by hand, and what it promises."""

from __future__ import annotations

import pytest
import torch
from depth_pages import DEVICES, IMPLS, ints

from gemma_ext.ops.depth_batching import depth_compact


def by_hand(loop, leave, drop, loops):
    kinds = []
    for i, ran in enumerate(loop):
        if drop[i] or not -1 <= ran < loops:
            kinds.append(loops + 1)
        elif ran >= 0 and (leave[i] or ran == loops - 1):
            kinds.append(loops)
        else:
            kinds.append(ran + 1)
    order = sorted(range(len(loop)), key=lambda i: kinds[i])
    runs = [kinds[i] if kinds[i] < loops else -1 for i in order]
    offsets = [sum(k < j for k in kinds) for j in range(loops + 1)]
    leaves, drops = kinds.count(loops), kinds.count(loops + 1)
    return order, runs, offsets, [len(loop) - leaves - drops, leaves, drops]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("loops", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("n", [0, 1, 31, 128, 129, 1000])
@pytest.mark.parametrize("impl", IMPLS)
def test_rows_are_sorted_by_what_they_run_next(impl, n, loops, device):
    g = torch.Generator().manual_seed(n + loops)
    loop = torch.randint(-3, loops + 2, (n,), generator=g, dtype=torch.int32)
    leave, drop = torch.rand(2, n, generator=g) < 0.3
    for dropped in (drop, None):
        given = None if dropped is None else dropped.to(device)
        got = depth_compact(loop.to(device), leave.to(device), loops, drop=given, impl=impl)
        gone = (torch.zeros(n, dtype=torch.bool) if dropped is None else dropped).tolist()
        want = by_hand(loop.tolist(), leave.tolist(), gone, loops)
        assert [x.tolist() for x in got] == list(want)
        assert {x.dtype for x in got} == {torch.int32}


@pytest.mark.parametrize("impl", IMPLS)
def test_steps_of_two_loops(impl):
    """Four requests: a, c and d leave at loop 0, b goes on; then theirs enter again."""
    loop, leave = ints(0, 0, 0, 0), torch.tensor([True, False, True, True])
    first = depth_compact(loop, leave, 2, impl=impl)
    assert first.order.tolist() == [1, 0, 2, 3]
    assert first.seg_offsets.tolist() == [0, 0, 1]
    assert first.counts.tolist() == [1, 3, 0]
    again = depth_compact(ints(0, -1, -1, -1), torch.zeros(4, dtype=torch.bool), 2, impl=impl)
    assert again.order.tolist() == [1, 2, 3, 0]
    assert again.next_loop.tolist() == [0, 0, 0, 1]
    assert again.seg_offsets.tolist() == [0, 3, 4]


@pytest.mark.parametrize("impl", IMPLS)
def test_a_row_that_enters_cannot_leave(impl):
    got = depth_compact(ints(-1), torch.tensor([True]), 3, impl=impl)
    assert got.counts.tolist() == [1, 0, 0]


@pytest.mark.parametrize("impl", IMPLS)
def test_views_are_read_as_they_are(impl):
    loop, leave = ints(0, 9, 1, 9)[::2], torch.tensor([True, False, False, True])[::2]
    assert depth_compact(loop, leave, 3, impl=impl).order.tolist() == [1, 0]


LOOP, LEAVE = ints(0, 1), torch.zeros(2, dtype=torch.bool)
CALLS = {
    "expected loops in [1, 64], got 0": lambda: depth_compact(LOOP, LEAVE, 0),
    "expected loops in [1, 64], got 65": lambda: depth_compact(LOOP, LEAVE, 65),
    "expected loop to be [n], got [1, 2]": lambda: depth_compact(LOOP[None], LEAVE, 2),
    "expected leave to be [2] on cpu, got [1] on cpu": lambda: depth_compact(LOOP, LEAVE[1:], 2),
    "expected drop to be [2] on cpu, got [1] on cpu": lambda: depth_compact(
        LOOP, LEAVE, 2, drop=LEAVE[1:]
    ),
    "expected impl to be 'auto' or 'reference', got 'fast'": lambda: depth_compact(
        LOOP, LEAVE, 2, impl="fast"
    ),
}


@pytest.mark.parametrize("message", CALLS)
def test_calls_that_do_not_fit(message):
    with pytest.raises(ValueError) as caught:
        CALLS[message]()
    assert str(caught.value) == message


def test_types_that_do_not_fit():
    with pytest.raises(TypeError, match=r"expected loop to be int32, got torch\.int64"):
        depth_compact(LOOP.long(), LEAVE, 2)
    with pytest.raises(TypeError, match=r"expected leave to be bool, got torch\.int32"):
        depth_compact(LOOP, LOOP, 2)
