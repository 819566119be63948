"""Steering: known answers, identities of the modes, gates and their memory, requests."""

from __future__ import annotations

import itertools

import pytest
import torch
from sae_lists import DEVICES, DTYPES, IDS

from gemma_ext.ops.sae import Steering, fresh_state, pack, steer

IMPLS = ("auto", "reference")
MODES = ("add", "ablate", "clamp", "min_clamp", "scale", "project", "cap")
GATES = (
    {},
    {"gate": "per_token"},
    {"gate": "per_token", "together": True},
    {"gate": "per_input"},
    {"gate": "per_input", "scope": "prompt"},
    {"gate": "per_input", "scope": "window", "window": 2},
)
GATE_IDS = ("constant", "own", "together", "causal", "prompt", "window")


def tables(count: int = 3, width: int = 19, dtype=torch.float32, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    decoder, encoder = (torch.randn(count, width, generator=g).to(dtype) for _ in range(2))
    bias, threshold = torch.randn(2, count, generator=g)
    return {
        "decoder": decoder,
        "encoder": encoder,
        "bias": bias,
        "threshold": threshold.abs() + 2,
        "level": torch.rand(count, generator=g) * 3,
        "strength": torch.randn(count, generator=g),
    }


def stream(b: int = 3, t: int = 6, width: int = 19, dtype=torch.float32, seed: int = 1):
    return torch.randn(b, t, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


def code(x, s: Steering):
    """f by the formula, in float64."""
    p = x.double() @ s.encoder.double().T + s.bias.double()
    return torch.where(p > s.threshold.double(), p, 0.0)


def want(x, s: Steering, gates):
    """x' in float64 for gates [B, T, S]."""
    f = code(x, s)
    norm = s.decoder.double().norm(dim=-1)
    q = x.double() @ s.decoder.double().T / norm
    level = s.level.double()
    u = {
        "add": torch.ones_like(f),
        "ablate": -f,
        "clamp": level - f,
        "min_clamp": torch.maximum(level, f) - f,
        "scale": (level - 1) * f,
        "project": (level - 1) * q / norm,
        "cap": (torch.minimum(q, level) - q) / norm,
    }[s.mode]
    return x.double() + (gates * s.strength.double() * u) @ s.decoder.double()


def expected_gates(x, s: Steering):
    fires = code(x, s) > s.gate_threshold
    some = fires.any(-1, keepdim=True).expand_as(fires)
    if s.gate == "constant":
        return torch.ones_like(fires)
    if s.gate == "per_token":
        return some if s.together else fires
    if s.scope == "prompt":
        return some.any(1, keepdim=True).expand_as(fires)
    reach = s.window or x.shape[1]
    lagged = [some.roll(d, 1) * (torch.arange(x.shape[1]) >= d)[:, None] for d in range(reach)]
    return torch.stack(lagged).any(0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("gate", GATES, ids=GATE_IDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("impl", IMPLS)
def test_every_mode_and_gate(impl, mode, gate, dtype, device):
    for width in (19, 64):
        s = Steering(**tables(width=width, dtype=dtype), mode=mode, **gate)
        x = stream(width=width, dtype=dtype)
        gates = expected_gates(x, s)
        true = want(x, s, gates.double())
        there = Steering(
            **{n: v.to(device) for n, v in tables(width=width, dtype=dtype).items()},
            mode=mode,
            **gate,
        )
        got = steer(x.to(device), there, impl=impl).cpu()
        assert got.dtype == dtype
        limit = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
        assert (got.double() - true).abs().max() <= limit * true.abs().max()
        still = ~gates.any(-1)
        assert torch.equal(got[still], x[still])
        if gate:
            assert 0 < gates.double().mean() <= 1


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("gate", GATES, ids=GATE_IDS)
def test_strength_0_changes_no_bit(gate, mode, impl):
    """sae-detox oracle 1; zeros of either sign, NaN and infinity included."""
    x = stream()
    x[0, 0, :4] = torch.tensor([-0.0, 0.0, torch.nan, torch.inf])
    s = Steering(**{**tables(), "strength": 0.0}, mode=mode, **gate)
    assert torch.equal(steer(x, s, impl=impl).view(torch.int32), x.view(torch.int32))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("gate", GATES, ids=GATE_IDS)
def test_identities_between_modes(gate, impl):
    """sae-detox oracle 2."""
    t = {**tables(), "strength": 1.0}
    x = stream()

    def run(mode, level):
        return steer(x, Steering(**{**t, "level": level}, mode=mode, **gate), impl=impl)

    assert torch.equal(run("clamp", 0.0), run("ablate", 0.0))
    assert torch.equal(run("scale", 0.0), run("ablate", 0.0))
    assert torch.equal(run("min_clamp", 0.0), x)
    assert torch.equal(run("scale", 1.0), x)
    assert torch.equal(run("project", 1.0), x)


@pytest.mark.parametrize("impl", IMPLS)
def test_clamp_to_the_code_itself_is_the_identity(impl):
    x = stream(1, 1)
    s = Steering(**{**tables(1), "threshold": -50.0}, mode="clamp")
    f = x[0, 0] @ s.encoder[0] + s.bias
    s = Steering(**{**tables(1), "threshold": -50.0, "level": f}, mode="clamp")
    torch.testing.assert_close(steer(x, s, impl=impl), x, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["fp64", "bf16"])
def test_increments_are_the_decode_form_with_its_error(dtype):
    """sae-detox oracle 3: (x - x^) + decode(f with f_j := c)."""
    g = torch.Generator().manual_seed(4)
    features, width, chosen = 12, 20, [2, 7]
    encoder, decoder = (
        torch.randn(features, width, generator=g, dtype=torch.float64) for _ in range(2)
    )
    bias = torch.randn(features, generator=g, dtype=torch.float64)
    x = torch.randn(1, 9, width, generator=g, dtype=torch.float64)
    encoder, decoder, x = (y.to(dtype).double() for y in (encoder, decoder, x))
    f = (x @ encoder.T + bias).relu()
    changed = f.clone()
    changed[..., chosen] = 1.5
    true = (x - f @ decoder) + changed @ decoder
    s = Steering(
        decoder[chosen].to(dtype), 1.0, encoder[chosen].to(dtype), bias[chosen],
        mode="clamp", level=1.5,
    )  # fmt: skip
    got = steer(x.to(dtype), s, impl="reference" if dtype == torch.float64 else "auto")
    ulp = 1e-12 if dtype == torch.float64 else 2 * 2.0**-8 * float(x.abs().max())
    assert (got.double() - true).abs().max() <= ulp


@pytest.mark.parametrize("impl", IMPLS)
def test_tiers_are_nested(impl):
    """sae-detox oracle 4: tokens that tier 3 changes are among those of tier 2, and all of 1."""
    x = stream(8, 12, seed=3)
    touched = []
    for gate in (GATES[1], GATES[3], {}):
        s = Steering(**tables(), mode="add", **gate)
        touched.append((steer(x, s, impl=impl) != x).any(-1))
    own, causal, constant = touched
    assert bool((own <= causal).all())
    assert bool((causal <= constant).all())
    assert 0 < own.sum() < causal.sum() < constant.sum()
    quiet = Steering(**{**tables(), "threshold": 1e9}, mode="add", gate="per_input")
    assert torch.equal(steer(x, quiet, impl=impl), x)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("gate", GATES[3:], ids=GATE_IDS[3:])
def test_any_cutting_into_calls(gate, impl, device):
    """sae-detox oracle 5: one prefill, single steps and any split have the same gates."""
    t = {n: v.to(device) for n, v in tables().items()}
    s = Steering(**{**t, "threshold": 5.0}, **gate)
    x = stream(8, 12, seed=3).to(device)
    whole = fresh_state(8, device)
    want = steer(x, s, state=whole, impl=impl)
    if gate.get("scope") == "prompt":
        cuts = [[12], [12, 12], [5, 12]]
    else:
        cuts = [[12], list(range(1, 13)), [1, 4, 12], [7, 8, 12]]
    for ends in cuts:
        state = fresh_state(8, device)
        starts = [0, *ends[:-1]]
        parts = [
            steer(x[:, a:b], s, state=state, impl=impl) for a, b in zip(starts, ends, strict=True)
        ]
        if gate.get("scope") == "prompt" and len(ends) == 2 and ends[0] == 5:
            first = expected_gates(x[:, :5].cpu(), Steering(**{
                **tables(), "threshold": torch.full((3,), 5.0)}, **gate))[:, 0]  # fmt: skip
            changed = (torch.cat(parts, 1) != x).any(-1).cpu()
            assert torch.equal(changed, first.any(-1, keepdim=True).expand(8, 12))
        else:
            assert torch.equal(torch.cat(parts, 1), want)
            if gate.get("scope") != "prompt":
                assert torch.equal(state, whole)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("gate", GATES, ids=GATE_IDS)
def test_padding_on_either_side(gate, impl):
    """sae-detox oracle 5: pads neither open a gate nor count as tokens nor change."""
    s = Steering(**tables(), **gate)
    x = stream(4, 9, seed=3)
    loud = 100 * torch.ones(4, 5, 19)  # would open every gate
    bare = fresh_state(4)
    want = steer(x, s, state=bare, impl=impl)
    for left in (True, False):
        padded = torch.cat([loud, x] if left else [x, loud], 1)
        inside = torch.arange(14) >= 5 if left else torch.arange(14) < 9
        state = fresh_state(4)
        reads = inside.expand(4, 14)
        got = steer(padded, s, state=state, reads=reads, impl=impl)
        assert torch.equal(got[:, inside], want)
        assert torch.equal(got[:, ~inside], loud)
        assert torch.equal(state, bare)


@pytest.mark.parametrize("impl", IMPLS)
def test_tokens_that_are_read_need_not_be_written(impl):
    s = Steering(**tables(), gate="per_input", scope="prompt")
    x = stream(2, 8, seed=3)
    writes = torch.arange(8).expand(2, 8) >= 5
    full, got = (steer(x, s, writes=w, impl=impl) for w in (None, writes))
    assert torch.equal(got[:, 5:], full[:, 5:])
    assert torch.equal(got[:, :5], x[:, :5])


@pytest.mark.parametrize("impl", IMPLS)
def test_orthonormal_dictionary(impl):
    """sae-detox oracle 7: ablation takes the latent away and leaves the others alone."""
    basis = torch.linalg.qr(torch.randn(16, 16))[0][:6]
    x = torch.randn(1, 5, 6) @ basis
    f = x @ basis.T
    s = Steering(basis[[1, 4]], encoder=basis[[1, 4]], mode="ablate")
    after = steer(x, s, impl=impl) @ basis.T
    fired = f[..., [1, 4]] > 0
    assert fired.any()
    assert after[..., [1, 4]][fired].abs().max() < 1e-5
    torch.testing.assert_close(after[..., [1, 4]][~fired], f[..., [1, 4]][~fired])
    torch.testing.assert_close(after[..., [0, 2, 3, 5]], f[..., [0, 2, 3, 5]])


@pytest.mark.parametrize("impl", IMPLS)
def test_ablation_is_not_projection(impl):
    """sae-detox oracle 8."""
    d = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    x = torch.tensor([[[2.6, 0.8]]])
    encoder = torch.linalg.inv(d).T  # reads the true codes (2, 1)
    ablated = steer(x, Steering(d[:1], encoder=encoder[:1], mode="ablate"), impl=impl)
    torch.testing.assert_close(ablated, d[1].reshape(1, 1, 2))
    projected = steer(x, Steering(d[:1], mode="project"), impl=impl)
    torch.testing.assert_close(projected, torch.tensor([[[0.0, 0.8]]]))


@pytest.mark.parametrize("impl", IMPLS)
def test_the_threshold_itself_is_closed(impl):
    """sae-detox oracle 9: a strict comparison, at a pre-activation that is exact."""
    x = torch.zeros(1, 3, 4)
    x[0, :, 0] = torch.tensor([2.0, 2.0000002, 1.9999999])
    w = torch.tensor([[1.0, 0, 0, 0]])
    s = Steering(w, encoder=w, threshold=2.0, gate="per_token")
    assert (steer(x, s, impl=impl) != x).any(-1).tolist() == [[False, True, False]]


@pytest.mark.parametrize("impl", IMPLS)
def test_cap_and_project_at_a_level(impl):
    d = torch.tensor([[3.0, 0.0]])
    x = torch.tensor([[[4.0, 1.0], [1.0, 1.0], [-5.0, 1.0]]])
    capped = steer(x, Steering(d, mode="cap", level=2.0), impl=impl)
    assert capped[0, :, 0].tolist() == [2.0, 1.0, -5.0]
    half = steer(x, Steering(d, mode="project", level=0.5), impl=impl)
    assert half[0, :, 0].tolist() == [2.0, 0.5, -2.5]


def requests():
    """One of everything, tables shared between the first two."""
    shared = Steering(**tables(3), mode="add", gate="per_input")
    return [
        shared,
        shared,
        None,
        Steering(**tables(1, seed=2), mode="clamp"),
        Steering(**tables(2, seed=3), mode="ablate", gate="per_token", together=True),
        Steering(tables(2, seed=4)["decoder"], -3.0, mode="project"),
        Steering(**tables(4, seed=5), gate="per_input", scope="window", window=3),
    ]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("impl", IMPLS)
def test_requests_together_are_requests_alone(impl, dtype, device):
    """sae-detox oracle 11, bit for bit, their memory too."""
    specs = requests()
    x = stream(len(specs), 7, seed=3, dtype=dtype).to(device)
    states = fresh_state(len(specs), device)
    packed = pack(_moved(specs, device))
    got = torch.cat([steer(x[:, :4], packed, state=states, impl=impl),
                     steer(x[:, 4:], packed, state=states, impl=impl)], 1)  # fmt: skip
    for b, s in enumerate(_moved(specs, device)):
        state = fresh_state(1, device)
        if s is None:
            assert torch.equal(got[b], x[b])
            continue
        own = x[b : b + 1]
        alone = torch.cat([steer(own[:, :4], s, state=state, impl=impl),
                           steer(own[:, 4:], s, state=state, impl=impl)], 1)  # fmt: skip
        assert torch.equal(got[b], alone[0])
        assert torch.equal(states[b], state[0])


def _moved(specs, device):
    done = {}
    for s in specs:
        if s is not None and id(s) not in done:
            given = {
                k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in vars(s).items()
            }
            done[id(s)] = Steering(**given)
    return [None if s is None else done[id(s)] for s in specs]


def test_tables_of_one_steering_are_packed_once():
    assert pack(requests()).decoder.shape[0] == 3 + 1 + 2 + 2 + 4


@pytest.mark.parametrize("impl", IMPLS)
def test_strengths_of_their_own(impl):
    """[B, S] is B requests of one direction table."""
    t = tables()
    strengths = torch.randn(3, 3)
    x = stream()
    got = steer(x, Steering(**{**t, "strength": strengths}), impl=impl)
    for b in range(3):
        alone = steer(x[b : b + 1], Steering(**{**t, "strength": strengths[b]}), impl=impl)
        assert torch.equal(got[b], alone[0])


def test_bits_do_not_depend_on_threads():
    x = stream(5, 40, width=131)
    s = Steering(**tables(width=131), mode="clamp", gate="per_input")
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(steer(x, s))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_one_request_without_a_batch():
    s = Steering(**tables())
    x = stream(1, 6)
    assert torch.equal(steer(x[0], s), steer(x, s)[0])
    assert steer(x[:, :0], s).shape == (1, 0, 19)
    assert steer(torch.randn(0, 4, 19), s).shape == (0, 4, 19)


def test_gradients_take_the_formulas():
    t = {n: v.double() for n, v in tables(2, 5).items()}
    x = stream(1, 3, 5).double().requires_grad_()
    for mode, gate in itertools.product(MODES, GATES[:2]):
        s = Steering(**t, mode=mode, **gate)
        assert torch.autograd.gradcheck(lambda y, s=s: steer(y, s, impl="reference"), (x,))
    single = stream().requires_grad_()
    (grad,) = torch.autograd.grad(steer(single, Steering(**tables())).sum(), single)
    assert torch.equal(grad, torch.ones_like(grad))
    strength = torch.ones(3, requires_grad=True)
    out = steer(stream(), Steering(**{**tables(), "strength": strength}))
    assert torch.autograd.grad(out.sum(), strength)[0].abs().min() > 0


def test_strengths_are_learned():
    """One steering over many steps: no graph is gone through twice."""
    strength = torch.zeros(3, requires_grad=True)
    s = Steering(**{**tables(), "strength": strength})
    x, losses = stream(), []
    target = steer(x, Steering(**{**tables(), "strength": torch.tensor([0.5, -1.0, 2.0])}))
    optimizer = torch.optim.SGD([strength], lr=0.01)
    for _ in range(5):
        optimizer.zero_grad()
        loss = (steer(x, s) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.9 * losses[0]


E = torch.randn(3, 19)
MESSAGES = {
    "expected mode to be add, ablate, clamp, min_clamp, scale, project or cap, got 'boost'": {
        "mode": "boost"
    },
    "expected gate to be constant, per_input or per_token, got 'open'": {"gate": "open"},
    "expected scope to be causal, prompt or window, got 'all'": {"scope": "all"},
    "expected window with scope='window' and only there, got None with 'window'": {
        "scope": "window"
    },
    "expected window with scope='window' and only there, got 3 with 'causal'": {"window": 3},
    "expected window to be at least 1, got 0": {"scope": "window", "window": 0},
    "expected an encoder with mode='ablate' and gate='constant', got None": {"mode": "ablate"},
    "expected an encoder with mode='add' and gate='per_token', got None": {"gate": "per_token"},
    "expected decoder to be [S, D], got [19]": {"decoder": E[0]},
    "expected encoder to be [3, 19], got [2, 19]": {"encoder": E[:2]},
    "expected encoder in torch.float32 on cpu like decoder, got it in torch.float16": {
        "encoder": E.half()
    },
    "expected bias to be one number or [3], got [2]": {"bias": torch.ones(2)},
    "expected threshold to be one number or [3], got [2, 3]": {"threshold": torch.ones(2, 3)},
    "expected strength to be one number or [3] or [B, 3], got [2]": {"strength": torch.ones(2)},
    "expected level to be one number or [3] or [B, 3], got [1, 1, 3]": {
        "level": torch.ones(1, 1, 3)
    },
    "expected strength and level of one batch, got [2, 4]": {
        "strength": torch.ones(2, 3),
        "level": torch.ones(4, 3),
    },
}


@pytest.mark.parametrize("message", MESSAGES)
def test_steerings_that_do_not_fit(message):
    with pytest.raises(ValueError) as caught:
        Steering(**{"decoder": E, **MESSAGES[message]})
    assert message in str(caught.value)


S = Steering(E)
X = torch.randn(2, 4, 19)
CALLS = {
    "expected x to be [B, T, 19] or [T, 19], got [2, 4, 18]": lambda: steer(X[..., 1:], S),
    "expected x to be [B, T, 19] or [T, 19], got [19]": lambda: steer(X[0, 0], S),
    "expected 2 requests like x has, got 3": lambda: steer(X, [S, S, S]),
    "expected state to be int32 [2] on cpu, got torch.int32 [3] on cpu": lambda: steer(
        X, S, state=fresh_state(3)
    ),
    "expected reads to be bool [2, 4] on cpu, got torch.bool [4, 4]": lambda: steer(
        X, S, reads=torch.ones(4, 4, dtype=torch.bool)
    ),
    "expected writes to be bool [2, 4] on cpu, got torch.int64 [2, 4]": lambda: steer(
        X, S, writes=torch.ones(2, 4, dtype=torch.int64)
    ),
    "expected at least one steering, got none": lambda: steer(X, [None, None]),
    "expected every decoder to be [S, 19] in torch.float32, got [1, 18]": lambda: steer(
        X, [S, Steering(E[:1, 1:])]
    ),
    "expected strength to be [S] where each request has a steering, got [2, 3]": lambda: steer(
        X, [S, Steering(E, torch.ones(2, 3))]
    ),
    "expected x on meta like the steering, got it on cpu": lambda: steer(X, Steering(E.to("meta"))),
    "expected impl to be 'auto' or 'reference', got 'fast'": lambda: steer(X, S, impl="fast"),
}


@pytest.mark.parametrize("message", CALLS)
def test_calls_that_do_not_fit(message):
    with pytest.raises(ValueError) as caught:
        CALLS[message]()
    assert message in str(caught.value)


def test_types_that_do_not_fit():
    with pytest.raises(TypeError, match=r"expected decoder to be float32, .* got torch\.int64"):
        Steering(E.long())
    with pytest.raises(TypeError, match=r"expected decoder to be float32, .* got list"):
        Steering([1.0])
    with pytest.raises(TypeError, match=r"expected x to be float32, .* got torch\.int64"):
        steer(X.long(), S)
    with pytest.raises(TypeError, match=r"expected x to be float32, .* got torch\.float64"):
        steer(X.double(), S)
    with pytest.raises(TypeError, match=r"expected decoder to be float32, .* got torch\.float64"):
        steer(X, Steering(E.double()))
