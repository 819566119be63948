"""Steering inside tiny Gemma-2, Gemma-3 and Llama models: generation, padding, sites, restoring."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from gemma_ext.nn.steering import steer_hook
from gemma_ext.nn.steering_sweep import SteerSweep
from gemma_ext.ops.sae import Steering, steer

sys.path.append(str(Path(__file__).resolve().parents[1] / "integrations"))
from tiny_models import VOCAB, build

NAMES = ("Gemma2", "Gemma3", "Llama")
WIDTH, LAYER = 32, 1
GATES = (
    {},
    {"gate": "per_token"},
    {"gate": "per_input"},
    {"gate": "per_input", "scope": "prompt"},
    {"gate": "per_input", "scope": "window", "window": 3},
)
GATE_IDS = ("constant", "own", "causal", "prompt", "window")
GREEDY = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def model(name="Gemma2", **options):
    return build(name, num_hidden_layers=3, use_cache=True, **options)


def prompts(rows=3, length=9, seed=0):
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def steering(m, strength=2.0, seed=0, **gate):
    """Latents that fire on a tenth of the tokens, and directions as long as the tokens."""
    g = torch.Generator().manual_seed(seed)
    decoder, encoder = (torch.randn(3, WIDTH, generator=g) for _ in range(2))
    x = hidden(m, prompts(8, 12))[LAYER + 1].flatten(0, 1)
    threshold = (x @ encoder.T).quantile(0.9, dim=0)
    size = x.norm(dim=-1).mean() / decoder.norm(dim=-1, keepdim=True)
    return Steering(decoder * size, strength, encoder=encoder, threshold=threshold, **gate)


@torch.no_grad()
def logits(m, ids, **options):
    return m(input_ids=ids, use_cache=False, **options).logits


@torch.no_grad()
def hidden(m, ids, **options):
    return m(input_ids=ids, output_hidden_states=True, use_cache=False, **options).hidden_states


def hooks(m) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks")
    return sum(len(getattr(x, kind)) for x in m.modules() for kind in kinds)


@pytest.mark.parametrize("gate", GATES, ids=GATE_IDS)
@pytest.mark.parametrize("name", NAMES)
def test_strength_0_is_no_hook(name, gate):
    """sae-detox oracle 1."""
    m, ids = model(name), prompts()
    want = logits(m, ids)
    with steer_hook(m, LAYER, steering(m, 0.0, **gate)):
        assert torch.equal(logits(m, ids), want)
    with steer_hook(m, LAYER, steering(m, **gate)):
        assert not torch.equal(logits(m, ids), want)
    assert torch.equal(logits(m, ids), want)


@pytest.mark.parametrize("site", ["resid_post", "resid_mid", "mlp_in"])
def test_the_model_is_as_it_was_after_an_error(site):
    m, ids = model(), prompts()
    before = {n: x.clone() for n, x in m.state_dict().items()}
    s = steering(m)
    found, want = hooks(m), logits(m, ids)
    wrong = Steering(torch.randn(1, WIDTH - 1))
    with pytest.raises(ValueError, match="expected x"), steer_hook(m, LAYER, wrong, site=site):
        logits(m, ids)
    with pytest.raises(TypeError), steer_hook(m, LAYER, s, site=site):
        m(input_ids=ids, no_such_argument=1, logits_to_keep="all")
    assert hooks(m) == found
    assert torch.equal(logits(m, ids), want)
    assert all(torch.equal(x, before[n]) for n, x in m.state_dict().items())


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("name", NAMES)
def test_output_of_the_block(name, layer):
    """And blocks below it, bit for bit as without (sae-detox oracle 6)."""
    m, ids = model(name), prompts()
    plain = hidden(m, ids)
    s = steering(m, gate="per_token")
    with steer_hook(m, layer, s):
        steered = hidden(m, ids)
    reads = torch.arange(ids.shape[1]).expand(ids.shape) > 0
    assert torch.equal(steered[layer + 1], steer(plain[layer + 1], s, reads=reads))
    assert all(torch.equal(a, b) for a, b in zip(plain[: layer + 1], steered, strict=False))
    assert not torch.equal(steered[-1], plain[-1])


@pytest.mark.parametrize("name", NAMES)
def test_keys_and_values_below_are_those_without(name):
    """sae-detox oracle 6; those above are not."""
    m, ids = model(name), prompts()
    caches = []
    with torch.no_grad():
        for strength in (0.0, 2.0):
            with steer_hook(m, LAYER, steering(m, strength, gate="per_input")) as hook:
                out = m(input_ids=ids, use_cache=True)
                state = hook.state
            caches.append((out.get("cache", out.get("past_key_values")).layers, state))
    (plain, unsteered), (steered, gates) = caches
    assert torch.equal(unsteered, gates)
    for i, (a, b) in enumerate(zip(plain, steered, strict=True)):
        same = torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values)
        assert same == (i <= LAYER)


def test_the_last_block():
    m, ids = model(), prompts()
    with steer_hook(m, 2, steering(m), skip_first=False):
        found = m.model(input_ids=ids).last_hidden_state
    block = {}
    handle = m.model.layers[2].register_forward_hook(lambda *a: block.update(out=a[-1]))
    m.model(input_ids=ids)
    handle.remove()
    out = block["out"][0] if isinstance(block["out"], tuple) else block["out"]
    assert torch.equal(found, m.model.norm(steer(out, steering(m))))


def hooked(module, change, run, *, before=False):
    """`run()` with `module`'s output, or input, changed."""
    if before:
        handle = module.register_forward_pre_hook(lambda _, args: (change(args[0]), *args[1:]))
    else:
        handle = module.register_forward_hook(lambda _, args, out: change(out))
    try:
        return run()
    finally:
        handle.remove()


@pytest.mark.parametrize("name", NAMES)
def test_sites_by_meaning(name):
    """personality oracle 5: post_attention_layernorm writes to resid_mid in Gemma, not in Llama."""
    m, ids = model(name).double(), prompts()
    v = torch.randn(1, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 5
    s = Steering(v)
    block = m.model.layers[LAYER]
    options = {"skip_first": False, "impl": "reference"}
    with steer_hook(m, LAYER, s, site="resid_mid", **options):
        mid = logits(m, ids)
    with steer_hook(m, LAYER, s, site="mlp_in", **options):
        mlp = logits(m, ids)
    by_name = hooked(block.post_attention_layernorm, lambda x: x + v, lambda: logits(m, ids))
    read = hooked(block.mlp, lambda x: x + v, lambda: logits(m, ids), before=True)
    torch.testing.assert_close(mlp, read, rtol=0, atol=1e-12)
    if name == "Llama":
        torch.testing.assert_close(by_name, mlp, rtol=0, atol=1e-12)
        written = hooked(block.self_attn.o_proj, lambda x: x + v, lambda: logits(m, ids))
    else:
        written = by_name
    torch.testing.assert_close(mid, written, rtol=0, atol=1e-12)
    assert (mid - mlp).abs().max() > 1e-3


def test_the_gate_at_resid_mid_reads_resid_mid():
    m, ids = model(), prompts()
    seen = {}
    norm = m.model.layers[LAYER].pre_feedforward_layernorm
    handle = norm.register_forward_pre_hook(lambda _, args: seen.update(x=args[0].clone()))
    logits(m, ids)
    handle.remove()
    s = steering(m, gate="per_token")
    with steer_hook(m, LAYER, s, site="resid_mid"):
        handle = norm.register_forward_pre_hook(lambda _, args: seen.update(y=args[0].clone()))
        logits(m, ids)
        handle.remove()
    reads = torch.arange(ids.shape[1]).expand(ids.shape) > 0
    assert torch.equal(seen["y"], steer(seen["x"], s, reads=reads))


def padded(ids, count, left):
    pad = torch.zeros(ids.shape[0], count, dtype=ids.dtype)
    mask = torch.cat([pad, torch.ones_like(ids)] if left else [torch.ones_like(ids), pad], 1)
    return torch.cat([pad, ids] if left else [ids, pad], 1), mask


@pytest.mark.parametrize("gate", GATES, ids=GATE_IDS)
@pytest.mark.parametrize("name", NAMES)
def test_padding_on_either_side(name, gate):
    m, ids = model(name), prompts()
    want = logits(m, ids)
    with steer_hook(m, LAYER, steering(m, **gate)) as hook:
        steered = logits(m, ids)
        state = hook.state
    for left in (True, False):
        more, mask = padded(ids, 4, left)
        places = (mask.cumsum(-1) - 1).clamp(min=0)
        with steer_hook(m, LAYER, steering(m, **gate)) as hook:
            got = logits(m, more, attention_mask=mask, position_ids=places)
            assert torch.equal(hook.state, state)
        torch.testing.assert_close(got[mask.bool()].reshape(want.shape), steered, rtol=0, atol=1e-3)
    assert (steered - want).abs().max() > 0.1


def test_the_first_token_is_left_alone():
    m, ids = model(), prompts()
    plain = hidden(m, ids)[LAYER + 1]
    more, mask = padded(ids, 2, True)
    for skip in (True, False):
        with steer_hook(m, LAYER, steering(m), skip_first=skip):
            changed = (hidden(m, ids)[LAYER + 1] != plain).any(-1)
            bare = hidden(m, more, attention_mask=mask)[LAYER + 1]
        assert changed[:, 0].any() != skip
        assert changed[:, 1:].all()
        with steer_hook(m, LAYER, steering(m, 0.0), skip_first=skip):
            still = hidden(m, more, attention_mask=mask)[LAYER + 1]
        moved = (bare != still).any(-1)
        assert not moved[:, :2].any()
        assert moved[:, 2].any() != skip


def test_a_mask_of_the_prompt_by_hand():
    """Where the model gets one of four dimensions, which does not tell padding."""
    m, ids = model("Llama"), prompts()
    s = steering(m)
    more, mask = padded(ids, 3, True)
    with steer_hook(m, LAYER, s):
        want = logits(m, more, attention_mask=mask)
    count = more.shape[1]
    seen = torch.ones(count, count, dtype=torch.bool).tril() & mask[:, None, None].bool()
    wide = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    with (
        pytest.raises(ValueError, match=r"attention_mask to be \[3, 12\], got \[3, 1, 12, 12\]"),
        steer_hook(m, LAYER, s),
    ):
        logits(m, more, attention_mask=wide)
    with steer_hook(m, LAYER, s, attention_mask=mask):
        got = logits(m, more, attention_mask=wide)
    torch.testing.assert_close(got[:, 3:], want[:, 3:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("gate", GATES, ids=GATE_IDS)
@pytest.mark.parametrize("name", NAMES)
def test_generation_with_a_cache_is_generation_without(name, gate):
    """Gates remember through single steps what one call over everything sees."""
    m, ids = model(name), prompts()
    more, mask = padded(ids, 2, True)
    mask[0] = 1
    more[0, :2] = 5
    length = more.shape[1]
    options = {**GREEDY, "max_new_tokens": 6, "attention_mask": mask}
    found = []
    for cached in (True, False):
        with steer_hook(m, LAYER, steering(m, **gate), prompt_length=None if cached else length):
            found.append(m.generate(more, use_cache=cached, **options))
    assert torch.equal(*found)
    assert not torch.equal(found[0], m.generate(more, **options))


@pytest.mark.parametrize("name", ["Gemma2", "Llama"])
def test_other_ways_to_generate(name):
    """A prompt in chunks; a static cache, whose masks have four dimensions."""
    m, ids = model(name), prompts()
    more, mask = padded(ids, 2, True)
    s = steering(m, gate="per_input")
    options = {**GREEDY, "max_new_tokens": 5, "attention_mask": mask}
    with steer_hook(m, LAYER, s):
        want = m.generate(more, **options)
        chunks = m.generate(more, prefill_chunk_size=4, **options)
    with steer_hook(m, LAYER, s, attention_mask=mask):
        static = m.generate(more, cache_implementation="static", disable_compile=True, **options)
    assert torch.equal(chunks, want)
    assert torch.equal(static, want)
    assert not torch.equal(want, m.generate(more, **options))


def test_two_blocks_at_once():
    m, ids = model(), prompts()
    plain = hidden(m, ids)
    s, other = steering(m), steering(m, -1.0, seed=3)
    reads = torch.arange(ids.shape[1]).expand(ids.shape) > 0
    with steer_hook(m, 0, s):
        between = hidden(m, ids)[2]
        with steer_hook(m, 1, other):
            both = hidden(m, ids)
    assert torch.equal(both[1], steer(plain[1], s, reads=reads))
    assert torch.equal(both[2], steer(between, other, reads=reads))


@pytest.mark.parametrize("length", [4, torch.tensor([2, 4, 9])], ids=["all", "each"])
def test_positions(length):
    m, ids = model(), prompts()
    plain = hidden(m, ids)[LAYER + 1]
    ends = torch.as_tensor(length).reshape(-1, 1)
    columns = torch.arange(ids.shape[1]).expand(ids.shape)
    where = {
        "all": columns > 0,
        "prompt": (columns < ends) & (columns > 0),
        "response": (columns >= ends) & (columns > 0),
    }
    for positions, want in where.items():
        with steer_hook(m, LAYER, steering(m), positions=positions, prompt_length=length):
            changed = (hidden(m, ids)[LAYER + 1] != plain).any(-1)
        assert torch.equal(changed, want)


def test_positions_of_generation():
    m, ids = model(), prompts()
    options = {**GREEDY, "max_new_tokens": 5}
    with steer_hook(m, LAYER, steering(m), positions="prompt"):
        prompt = m.generate(ids, **options)
    with steer_hook(m, LAYER, steering(m), positions="response"):
        response = m.generate(ids, **options)
    plain = m.generate(ids, **options)
    # the first new token comes from the prompt alone
    assert torch.equal(response[:, : ids.shape[1] + 1], plain[:, : ids.shape[1] + 1])
    assert not torch.equal(prompt, plain)
    assert not torch.equal(response, plain)


def test_prompt_scope_sees_the_prompt_alone():
    """Of a call that holds a response too; the gates of other scopes see everything."""
    m, ids = model(), prompts(8, 12)
    plain = hidden(m, ids)[LAYER + 1]
    s = steering(m, gate="per_input", scope="prompt")
    fires = (plain @ s.encoder.T > s.threshold).any(-1)
    fires[:, 0] = False
    for end in (3, 12):
        with steer_hook(m, LAYER, s, prompt_length=end):
            changed = (hidden(m, ids)[LAYER + 1] != plain).any(-1)
        assert torch.equal(changed[:, 1:].any(-1), fires[:, :end].any(-1))
    assert 0 < fires[:, :3].any(-1).sum() < fires.any(-1).sum()


def test_one_steering_for_each_sequence():
    m, ids = model(), prompts()
    specs = [steering(m, seed=1, gate="per_input"), None, steering(m, -1.0, seed=2)]
    options = {**GREEDY, "max_new_tokens": 5}
    with steer_hook(m, LAYER, specs):
        together = m.generate(ids, **options)
    for row, s in enumerate(specs):
        with steer_hook(m, LAYER, [s, s, s] if s else steering(m, 0.0)):
            assert torch.equal(m.generate(ids, **options)[row], together[row])


def test_gradients_go_through():
    m, ids = model(), prompts()
    for site in ("resid_post", "resid_mid", "mlp_in"):
        m.zero_grad()
        with steer_hook(m, LAYER, steering(m, gate="per_token"), site=site):
            m(input_ids=ids, labels=ids).loss.backward()
        assert m.model.embed_tokens.weight.grad.abs().max() > 0
    strength = torch.ones(3, requires_grad=True)
    with steer_hook(m, LAYER, steering(m, strength)):
        for _ in range(2):
            m(input_ids=ids, labels=ids).loss.backward()
    assert strength.grad.abs().min() > 0


def test_calls_that_gates_cannot_follow():
    m, ids = model(), prompts()
    with torch.no_grad(), steer_hook(m, LAYER, steering(m, gate="per_input")):
        out = m(input_ids=ids, use_cache=True)
        cache = out.get("cache", out.get("past_key_values"))
        m.model(input_ids=ids[:1, :4])
        name = "cache" if "cache" in out else "past_key_values"
        with pytest.raises(RuntimeError, match="expected a call that goes on after 4 tokens of 1"):
            m(input_ids=ids[:, :1], **{name: cache})


S = Steering(torch.randn(2, WIDTH))
BAD = {
    "expected layer in [0, 3), got 3": lambda m: steer_hook(m, 3, S),
    "expected layer in [0, 3), got -1": lambda m: steer_hook(m, -1, S),
    "expected site to be resid_post, resid_mid or mlp_in, got 'attn_out'": lambda m: steer_hook(
        m, 0, S, site="attn_out"
    ),
    "expected positions to be all, prompt or response, got 'last'": lambda m: steer_hook(
        m, 0, S, positions="last"
    ),
    "expected decoder layers in Linear, got none": lambda m: steer_hook(
        torch.nn.Linear(2, 2), 0, S
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_what_does_not_fit(message):
    with pytest.raises(ValueError) as caught, BAD[message](model()):
        pass
    assert message in str(caught.value)


def test_sites_of_unknown_architectures_are_refused():
    m = model("Phi3")
    with (
        pytest.raises(ValueError, match=r"expected a model of type gemma, .* got 'phi3'"),
        steer_hook(m, 0, S, site="resid_mid"),
    ):
        pass


FACTORS = [0.0, 1.0, -1.5]


@pytest.mark.parametrize("gate", GATES, ids=GATE_IDS)
@pytest.mark.parametrize("name", NAMES)
def test_sweep_is_separate_runs(name, gate):
    """personality oracle 10: token for token."""
    m, ids = model(name), prompts()
    more, mask = padded(ids, 2, True)
    mask[0] = 1
    more[0, :2] = 5
    options = {**GREEDY, "max_new_tokens": 6}
    sweep = SteerSweep(m, LAYER, steering(m, **gate), FACTORS)
    before = hooks(m)
    found = sweep.generate(more, mask, **options)
    last = sweep.hidden(more, mask)
    assert found.shape == (3, 3, more.shape[1] + 6)
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    for s, factor in enumerate(FACTORS):
        with steer_hook(m, LAYER, steering(m, 2.0 * factor, **gate)):
            assert torch.equal(m.generate(more, attention_mask=mask, **options), found[s])
            with torch.no_grad():
                alone = m.model(input_ids=more, attention_mask=mask, position_ids=places)
        got, want = last[s][mask.bool()], alone.last_hidden_state[mask.bool()]
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert not torch.equal(found[0], found[1])
    assert hooks(m) == before
    assert not any("forward" in vars(b) for b in m.model.layers)


def test_sweep_past_a_sliding_window():
    m, ids = model(sliding_window=4), prompts(2, 11)
    options = {**GREEDY, "max_new_tokens": 5}
    found = SteerSweep(m, LAYER, steering(m, gate="per_input"), FACTORS).generate(ids, **options)
    for s, factor in enumerate(FACTORS):
        with steer_hook(m, LAYER, steering(m, 2.0 * factor, gate="per_input")):
            assert torch.equal(m.generate(ids, **options), found[s])


def test_sweep_runs_lower_blocks_once():
    """Rows that each block computes of a prompt: B below, S B above."""
    m, ids = model(), prompts()
    sweep = SteerSweep(m, LAYER, steering(m), FACTORS)
    rows = [0, 0, 0]
    handles = [
        b.self_attn.register_forward_pre_hook(
            lambda _, args, kwargs, i=i: rows.__setitem__(
                i, rows[i] + kwargs["hidden_states"].shape[0]
            ),
            with_kwargs=True,
        )
        for i, b in enumerate(m.model.layers)
    ]
    sweep.hidden(ids)
    for handle in handles:
        handle.remove()
    assert rows == [3, 3, 9]


def test_sweep_of_prompts_of_one_token():
    m, ids = model(), prompts(2, 1)
    options = {**GREEDY, "max_new_tokens": 4}
    found = SteerSweep(m, LAYER, steering(m), FACTORS, skip_first=False).generate(ids, **options)
    for s, factor in enumerate(FACTORS):
        with steer_hook(m, LAYER, steering(m, 2.0 * factor), skip_first=False):
            assert torch.equal(m.generate(ids, **options), found[s])


def test_sweeps_that_do_not_fit():
    m = model()
    with pytest.raises(ValueError, match=r"expected layer in \[0, 3\), got 7"):
        SteerSweep(m, 7, steering(m), FACTORS)
    with pytest.raises(ValueError, match="expected at least one strength, got none"):
        SteerSweep(m, 1, steering(m), [])
    with pytest.raises(ValueError, match="expected one steering for a sweep"):
        SteerSweep(m, 1, steering(m, torch.ones(2, 3)), FACTORS)
