"""Which stored layer runs at which depth."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_ext.nn.recursive import ORDERS, Plan


@pytest.mark.parametrize(
    ("layers", "loops", "order", "expected"),
    [
        (6, 2, "cycle", [0, 1, 2, 0, 1, 2]),
        (6, 3, "cycle", [0, 1, 0, 1, 0, 1]),
        (4, 4, "cycle", [0, 0, 0, 0]),
        (6, 2, "sequence", [0, 0, 1, 1, 2, 2]),
        (6, 2, "middle-cycle", [0, 1, 2, 1, 2, 3]),
        (5, 1, "cycle", [0, 1, 2, 3, 4]),
    ],
)
def test_orders(layers, loops, order, expected):
    plan = Plan.of(layers, loops, order)
    assert list(plan.stored_of_depth) == expected
    assert plan.layers == layers
    assert plan.stored_layers == max(expected) + 1


def test_gemma2_2b_keeps_its_parity_in_the_middle():
    for loops, block in ((2, 12), (3, 8), (4, 6), (6, 4)):
        plan = Plan.of(26, loops, "middle-cycle")
        assert plan.stored == block
        assert plan.stored_layers == block + 2
        for stored in range(1, block + 1):
            assert len({depth % 2 for depth in plan.depths_of(stored)}) == 1
    assert {d % 2 for d in Plan.of(26, 2).depths_of(0)} == {0, 1}


@given(st.data())
def test_every_plan_comes_back_from_its_dict(data):
    loops, block = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 6))
    order = data.draw(st.sampled_from(ORDERS))
    ends = st.integers(0, 3) if order == "middle-cycle" else st.just(0)
    prelude, coda = data.draw(ends), data.draw(ends)
    layers = prelude + coda + loops * block
    plan = Plan.of(
        layers, loops, order, prelude=prelude, coda=coda, ranks={"a.b": 3}, init="average"
    )
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert plan.stored == block
    seen = [plan.loop_of(depth) for depth in range(layers)]
    assert seen[:prelude] == [None] * prelude
    assert seen[layers - coda :] == [None] * coda
    for loop in range(loops):
        assert seen.count(loop) == block
    for stored in range(prelude, prelude + block):
        depths = plan.depths_of(stored)
        assert [plan.loop_of(depth) for depth in depths] == list(range(loops))
        assert [plan.rank_of(depth, "a.b") for depth in depths] == [3] * loops
    for depth in (*range(prelude), *range(layers - coda, layers)):
        assert plan.rank_of(depth, "a.b") == 0
    if order != "sequence":
        assert plan.exits()[-1] == layers - coda
        assert [plan.loop_of(end - 1) for end in plan.exits()] == list(range(loops))


def test_first_loop_can_go_without_matrices():
    plan = Plan.of(6, 3, ranks={"q": 4}, lora_from_loop=1)
    assert [plan.rank_of(d, "q") for d in range(6)] == [0, 0, 4, 4, 4, 4]
    assert plan.rank_of(5, "k") == 0


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((6, 2, "reverse"), {}, "order: expected one of cycle, middle-cycle, sequence"),
        ((6, 4), {}, "loops: expected a divisor of the 6 shared layers of 6, got 4"),
        ((6, 0), {}, "got 0"),
        ((3, 2, "middle-cycle"), {}, "divisor of the 1 shared layers of 3, got 2"),
        ((6, 2), {"prelude": 2}, "expected 0 for order 'cycle', got"),
        ((6, 2, "middle-cycle"), {"prelude": -1}, "expected numbers >= 0"),
        ((6, 2), {"lora_from_loop": 2}, "lora_from_loop: expected one of the loops 0..1, got 2"),
        ((6, 2), {"lora_from_loop": -1}, "lora_from_loop: expected one of the loops 0..1, got -1"),
    ],
)
def test_what_is_no_plan(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        Plan.of(*arguments, **options)


def test_dicts_that_are_no_plan():
    good = Plan.of(6, 2).to_dict()
    with pytest.raises(ValueError, match=r"recursive: expected keys .* got depth"):
        Plan.from_dict({**good, "depth": 3})
    with pytest.raises(ValueError, match="got no stored_of_depth"):
        Plan.from_dict({"loops": 2})
    with pytest.raises(ValueError, match=r"expected stored_of_depth \[0, 1, 2, 0, 1, 2\]"):
        Plan.from_dict({**good, "stored_of_depth": [0, 1, 2, 0, 2, 1]})
    with pytest.raises(ValueError, match="and stored 3"):
        Plan.from_dict({**good, "stored": 2})
    with pytest.raises(ValueError, match="whose loops have ends, got 'sequence'"):
        Plan.of(6, 2, "sequence").exits()
