"""Work goes to the current stream and to no other."""

from __future__ import annotations

import pytest
import torch
from gpu_problem import FORMS, Outcome, assert_same_bits, ours, problem

pytestmark = pytest.mark.card
every_form = pytest.mark.parametrize("form", FORMS)
SPIN = 50_000_000  # cycles, about 30 ms: another stream would overtake


@every_form
def test_inputs_made_on_a_side_stream(form):
    p = problem(300, 136, 2000, torch.bfloat16)
    want = ours(p, **FORMS[form])
    late = p.e.clone()
    p.e.zero_()
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(SPIN)
        p.e.copy_(late)
        got = ours(p, **FORMS[form])
    side.synchronize()
    assert_same_bits(got, want)


@every_form
def test_the_next_operation_on_the_stream_sees_the_result(form):
    p = problem(300, 136, 2000, torch.bfloat16)
    want = ours(p, **FORMS[form])
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        got = {name: value.clone() for name, value in ours(p, **FORMS[form]).items()}
    side.synchronize()
    assert_same_bits(got, want)


@every_form
def test_two_calls_in_flight(form):
    """No state is shared: what one stream computes does not depend on the other."""
    problems = [problem(300, 136, 2000, torch.bfloat16, seed=seed) for seed in (1, 2)]
    wants = [ours(p, **FORMS[form]) for p in problems]
    streams = [torch.cuda.Stream() for _ in problems]
    torch.cuda.synchronize()
    found: list[list[Outcome]] = [[], []]
    for _ in range(10):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                found[i].append(ours(problems[i], **FORMS[form]))
    torch.cuda.synchronize()
    for want, outcomes in zip(wants, found, strict=True):
        for got in outcomes:
            assert_same_bits(got, want)
