"""Any lists, any steering: the kernels against the formulas in float64."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sae_lists import EPS, FORMS, problem, safe

from gemma_ext.ops.sae import Steering, decode_error, fresh_state, nested_errors, pack, steer

WEIGHT = 3  # of `outputs`, its gradient
QUIET = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}
lists = st.fixed_dictionaries(
    {
        "n": st.integers(0, 40),
        "k": st.integers(0, 20),
        "features": st.integers(1, 60),
        "width": st.integers(1, 70),
        "form": st.sampled_from(FORMS),
        "dtype": st.sampled_from(list(EPS)),
        "hot": st.none() | st.just(0),
        "seed": st.integers(0, 99),
    }
)


def outputs(p, widths, unit_norm, impl):
    leaves = p.leaves()
    codes = p.codes.with_values(leaves["values"])
    given_ = (codes, leaves["weight"], leaves["bias"], leaves["rows"])
    _, squared = decode_error(*given_, unit_norm=unit_norm, impl=impl)
    levels = nested_errors(*given_, widths=widths, unit_norm=unit_norm, impl=impl)
    loss = (squared * 0.5).sum() + levels.sum()
    return [squared, levels, *torch.autograd.grad(loss, list(leaves.values()))]


def sizes(p, widths, unit_norm, true):
    """What the rounding of each output is relative to: its largest entry; of a gradient without
    what is parallel to each row, which may be all of it, that of the whole gradient."""
    largest = [float(x.detach().abs().max()) if x.numel() else 0.0 for x in true]
    if unit_norm:
        whole = outputs(p.wide(), widths, False, "reference")[WEIGHT]
        largest[WEIGHT] = float(whole.abs().max())
    return largest


@settings(max_examples=60, **QUIET)
@given(lists, st.booleans(), st.integers(1, 3), st.data())
def test_any_lists(call, unit_norm, threads, data):
    features = call["features"]
    widths = sorted(data.draw(st.sets(st.integers(1, features), min_size=1, max_size=4)))
    p = problem(**call)
    torch.set_num_threads(threads)
    found = outputs(p, widths, unit_norm, "auto")
    p.codes = safe(p.codes)
    true = outputs(p.wide(), widths, unit_norm, "reference")
    limit = 64 * EPS[call["dtype"]]
    for got, want, scale in zip(found, true, sizes(p, widths, unit_norm, true), strict=True):
        assert got.shape == want.shape
        assert bool(((got.double() - want).abs() <= limit * scale + 1e-5).all())


latents = st.fixed_dictionaries(
    {
        "mode": st.sampled_from(("add", "ablate", "clamp", "min_clamp", "scale", "project", "cap")),
        "gate": st.sampled_from(("constant", "per_input", "per_token")),
        "together": st.booleans(),
        "level": st.floats(-2, 2),
        "gate_threshold": st.floats(-1, 1),
    }
)
scopes = st.sampled_from(
    ({"scope": "causal"}, {"scope": "prompt"}, {"scope": "window", "window": 2})
)


@settings(max_examples=60, **QUIET)
@given(
    st.lists(st.none() | st.tuples(latents, scopes, st.integers(1, 4)), min_size=1, max_size=5),
    st.integers(1, 9),
    st.integers(1, 40),
    st.integers(0, 99),
)
def test_any_steering(specs, tokens, width, seed):
    """Two calls, so that gates have something to remember; masks that differ."""
    g = torch.Generator().manual_seed(seed)

    def numbers(*shape):
        return torch.randn(*shape, generator=g)

    made = []
    for spec in specs:
        if spec is None:
            made.append(None)
            continue
        options, scope, count = spec
        tables = (numbers(count, width), numbers(count), numbers(count, width), numbers(count))
        made.append(Steering(*tables, **options, **scope))
    if not any(made):
        return
    x = numbers(len(made), 2 * tokens, width)
    reads = torch.rand(len(made), 2 * tokens, generator=g) < 0.8
    writes = torch.rand(len(made), 2 * tokens, generator=g) < 0.8
    requests = pack(made)
    results = []
    for impl in ("auto", "reference"):
        state, parts = fresh_state(len(made)), []
        for at in (slice(0, tokens), slice(tokens, None)):
            masks = {"reads": reads[:, at], "writes": writes[:, at]}
            parts.append(steer(x[:, at], requests, state=state, impl=impl, **masks))
        results.append((torch.cat(parts, 1), state))
    (got, state), (want, true_state) = results
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))
    assert torch.equal(state, true_state)
    assert torch.equal(got[~writes], x[~writes])
