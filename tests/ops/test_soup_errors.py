"""What is refused, in which words."""

from __future__ import annotations

import re

import pytest
import torch

from gemma_ext.ops.souping import (
    Cut,
    Gram,
    Magnitudes,
    Mask,
    Move,
    Norms,
    Part,
    RowMask,
    Rule,
    consensus_,
    crossover_,
    dots,
    fisher_,
    gather_rows_,
    gram_rows,
    merge_,
    mutate_,
    nearswap_,
    overlaps,
    sign_balance,
    soup,
    soup_,
    swarm_,
)


def x(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(*shape, dtype=dtype)


def part(count: int = 2, base: bool = True, out: bool = True, **more) -> Part:
    start = x(3, 4) if base else None
    return Part([x(3, 4) for _ in range(count)], start, x(3, 4) if out else None, "w", **more)


def cut(rows: int, streams: int) -> Cut:
    return Cut(torch.zeros(rows, streams, dtype=torch.int32), torch.zeros(rows, streams).long())


REFUSED = [
    (lambda: soup_([part(2), part(3)], 1.0), "expected 2 sources in every part, got 3 in 'w'"),
    (lambda: soup_([Part([], None, x(3))], []), "expected a source or a base in '', got neither"),
    (lambda: soup_([part(out=False)], 1.0), "expected an out in 'w', got None"),
    (lambda: nearswap_([part(1, base=False)], 1.0), "expected a base in 'w', got None"),
    (lambda: consensus_([part(base=False)], 1.0), "expected a base in 'w', got None"),
    (lambda: soup_([part(models=[1])], 1.0), "expected 2 entries of models in 'w', got 1"),
    (lambda: soup_([part(offset=-1)], 1.0), "expected an offset >= 0 in 'w', got -1"),
    (lambda: soup_([part(), part(base=False)], 1.0), "expected a base in all parts or in none"),
    (lambda: soup_([Part([x(2)] * 65, None, x(2))], 1.0), "expected at most 64 models, got 65"),
    (
        lambda: soup_([Part([x(3), x(4)], None, x(3), "w")], 1.0),
        "expected sources[1] of 'w' to be [3], got [4]",
    ),
    (
        lambda: soup_([Part([x(3)], x(4), x(3), "w")], 1.0),
        "expected base of 'w' to be [3], got [4]",
    ),
    (
        lambda: soup_([Part([x(3)], None, x(1, 3), "w")], 1.0),
        "expected out of 'w' to be [3], got [1, 3]",
    ),
    (
        lambda: soup_([Part([x(3, dtype=torch.int32)], None, x(3), "w")], 1.0),
        "expected sources[0] of 'w' to be float32, bfloat16 or float16, got torch.int32",
    ),
    (
        lambda: soup_([Part([x(3)], None, x(3).to("meta"), "w")], 1.0),
        "expected out of 'w' on cpu, got it on meta",
    ),
    (
        lambda: soup_([Part([x(3).to("meta")], None, x(3).to("meta"))], 1.0),
        "expected tensors on cpu",
    ),
    (
        lambda: soup_([part()], [1.0] * 3),
        "expected weights to be one number, [2] or [1, 2], got [3]",
    ),
    (
        lambda: soup_([part()], 1.0, scale=[1.0] * 2),
        "expected scale to be one number or [1], got [2]",
    ),
    (
        lambda: soup_([part()], x(2, 2), rows=True),
        "expected weights to be one number, [2] or [3, 2]",
    ),
    (lambda: soup_([part()], 1.0, rounding="up"), "expected rounding to be one of"),
    (
        lambda: soup_([part()], 1.0, impl="fast"),
        "expected impl to be 'auto' or 'reference', got 'fast'",
    ),
    (lambda: soup([part()], x(3)), "expected weights to be [2] or [1, 2], got [3]"),
    (lambda: soup([part()], [0.5, 0.5]), "expected weights to be a tensor, got list"),
    (lambda: soup_(part(), 1.0), "expected parts to be a sequence of Part, got one Part"),
    (lambda: soup_(["w"], 1.0), "expected parts of type Part, got str"),
    (
        lambda: soup_([Part([[1.0]], None, x(1), "w")], 1.0),
        "expected sources[0] of 'w' to be a tensor, got list",
    ),
    (lambda: soup_([part()], "ab"), "expected weights to be numbers, got 'ab'"),
    (lambda: soup_([part()], 1.0, scale="x"), "expected scale to be numbers, got 'x'"),
    (lambda: merge_([part()], "ties"), "expected rule to be a Rule, got str"),
    (lambda: Magnitudes(0), "expected models to be an int of 1 or more, got 0"),
    (lambda: Magnitudes("2"), "expected models to be an int of 1 or more, got '2'"),
    (lambda: soup([part()], x(2), scale=x(2)), "expected scale to be one number or [1], got [2]"),
    (
        lambda: merge_([part()], Rule(), mask=3),
        "expected mask to be a Mask, a RowMask or None, got int",
    ),
    (
        lambda: merge_([part()], Rule(), mask=Mask(keep=cut(3, 2))),
        "expected the cut keep to be [1, 2] or [1, 2], got [3, 2]",
    ),
    (
        lambda: merge_([part()], Rule(), mask=Mask(drop=cut(1, 3))),
        "expected the cut drop to be [1, 2] or [1, 2], got [1, 3]",
    ),
    (lambda: merge_([part()], Rule(), mask=Mask(density=[0.5] * 3)), "expected density to be"),
    (
        lambda: merge_([part()], Rule(), mask=RowMask(keep=[1])),
        "expected keep to be one number or [2]",
    ),
    (
        lambda: merge_([part()], Rule(), divide=[1.0]),
        "expected divide to be one number, [2] or [1, 2]",
    ),
    (
        lambda: merge_([part()], Rule(), alone=[1.0]),
        "expected alone to be one number, [2] or [1, 2]",
    ),
    (lambda: Rule("vote"), "expected election to be one of"),
    (lambda: Rule(combine="median"), "expected combine to be one of"),
    (lambda: Rule(zero=2), "expected zero to be one of (1, -1, 0), got 2"),
    (lambda: RowMask(spread="cube"), "expected spread to be 'rank' or 'value', got 'cube'"),
    (lambda: RowMask(rescale=True), "expected a density with rescale=True, got None"),
    (lambda: cut(1, 1).resolved("some"), "expected ties to be 'all' or 'none', got 'some'"),
    (lambda: Magnitudes(2, quantity="mean"), "expected quantity to be one of"),
    (lambda: Magnitudes(3).survey([part()]), "expected 3 sources in every part, got 2"),
    (lambda: Magnitudes(2).survey([part()], 1), "expected groups to be 1 numbers below 1, got [1]"),
    (lambda: Magnitudes(2).survey([part()], [0, 0]), "expected groups to be 1 numbers below 1"),
    (lambda: Magnitudes(2).settle([1, 2, 3]), "expected keep to be one number, [2] or [1, 2, 1]"),
    (lambda: Gram(2).add([part()], [3]), "expected groups to be 1 numbers below 1, got [3]"),
    (lambda: Norms(3).add([part()]), "expected 3 sources in every part, got 2"),
    (lambda: gram_rows([part(2), part(3)]), "expected 2 sources in every part, got 3"),
    (lambda: dots([part()], [x(4, 3)]), "expected along[0] of 'w' to be [3, 4], got [4, 3]"),
    (lambda: overlaps([part()], mask="all"), "expected mask to be a Mask"),
    (lambda: sign_balance([part()], Rule("sum"), [1.0] * 3), "expected weights to be one number"),
    (lambda: consensus_([part()], 0.2, task=2), "expected task to be a model below 2, got 2"),
    (lambda: consensus_([part()], [0.2] * 3), "expected lambdas to be one number, [2] or [1, 2]"),
    (lambda: fisher_([part()], []), "expected fishers of 1 parts, got 0"),
    (lambda: fisher_([part()], [[x(3, 4)]]), "expected 2 fishers in 'w', got 1"),
    (
        lambda: fisher_([part()], [[x(3, 4), x(4)]]),
        "expected fishers[1] of 'w' to be [3, 4], got [4]",
    ),
    (
        lambda: fisher_([part()], [[x(3, 4), x(3, 4, dtype=torch.float64)]]),
        "expected fishers[1] of 'w' to be float32, bfloat16 or float16, got torch.float64",
    ),
    (lambda: nearswap_([part(2)], 1.0), "expected 1 sources in every part, got 2 in 'w'"),
    (lambda: nearswap_([part(1)], [1.0, 2.0]), "expected t to be one number or [1], got [2]"),
    (lambda: mutate_([part(2)], 0.1, 0.1), "expected 1 sources in every part, got 2 in 'w'"),
    (lambda: mutate_([part(1)], [0.1, 0.2], 0.1), "expected rate to be one number or [1], got [2]"),
    (lambda: crossover_([part()], 1.0, kind="cut"), "expected kind to be one of"),
    (lambda: crossover_([part()], [1.0, -1.0]), "expected weights not to be negative, got -1"),
    (
        lambda: swarm_([Move(x(3), x(3), x(3), x(4), x(3), "w")], [0.1] * 4),
        "expected group_best of 'w'",
    ),
    (
        lambda: swarm_([Move(x(3), x(3), x(3), x(3, dtype=torch.int64), x(3))], [0.1] * 4),
        "expected group_best of '' to be float32, bfloat16 or float16, got torch.int64",
    ),
    (lambda: swarm_([Move(*[x(3)] * 5)], [0.1] * 3), "expected coefficients to be one number, [4]"),
    (
        lambda: swarm_([Move(x(3), x(3), x(3), x(3), x(3).to("meta"))], [0.1] * 4),
        "expected group_worst of '' on cpu, got it on meta",
    ),
    (lambda: gather_rows_(x(3), [x(3, 2)], x(3, 1).long()), "expected out to be [V, D], got [3]"),
    (lambda: gather_rows_(x(3, 2), [], x(3, 0).long()), "expected at least one source, got none"),
    (
        lambda: gather_rows_(x(3, 2), [x(3, 4)], x(3, 1).long()),
        "expected sources[0] to be [V_m, 2], got [3, 4]",
    ),
    (
        lambda: gather_rows_(x(3, 2), [x(5, 2).double()], x(3, 1).long()),
        "expected sources[0] to be float32, bfloat16 or float16, got torch.float64",
    ),
    (
        lambda: gather_rows_(x(3, 2), [x(5, 2).to("meta")], x(3, 1).long()),
        "expected sources[0] on cpu, got it on meta",
    ),
    (
        lambda: gather_rows_(x(3, 2), [x(5, 2)], x(3, 1)),
        "expected rows to be int64 [3, 1], got torch.float32 [3, 1]",
    ),
    (
        lambda: gather_rows_(x(3, 2), [x(5, 2)], torch.tensor([[0], [5], [1]])),
        "expected rows of sources[0] below 5, got 5",
    ),
]


@pytest.mark.parametrize(("call", "words"), REFUSED, ids=[words[:60] for _, words in REFUSED])
def test_refusal(call, words):
    with pytest.raises((ValueError, TypeError), match=re.escape(words)):
        call()


def test_several_devices_are_refused():
    here, there = part(), Part([x(3).to("meta")] * 2, x(3).to("meta"), x(3).to("meta"))
    with pytest.raises(ValueError, match="expected all parts on one device, got several"):
        soup_([here, there], 1.0)
