"""The gradient path: exact in any pieces, blind to padding and to what is behind an end."""

import dataclasses

import pytest
import torch
from ppo_tiny import END, D, adapted, config, random_sequences, tiny_model

from gemma_ext.nn.ppo import (
    AdapterCritic,
    AdapterOffReference,
    FrozenReference,
    SeparateCritic,
    Sequences,
    SharedCritic,
    explained_variance,
)
from gemma_ext.ppo import experience
from gemma_ext.ppo.decay import decay_groups
from gemma_ext.ppo.update import Update


def parts(kind="shared", seed=0):
    """A policy, its critic and its reference, the same every time."""
    if kind == "adapter":
        policy = adapted(tiny_model(seed), "value")
        critic = AdapterCritic(policy)
        reference = AdapterOffReference(policy)
    else:
        policy = tiny_model(seed)
        critic = SharedCritic(D) if kind == "shared" else SeparateCritic(tiny_model(seed + 1))
        reference = FrozenReference(tiny_model(seed + 2))
    torch.manual_seed(9)
    with torch.no_grad():
        critic.head.weight.normal_(std=0.1)
    return policy, critic, reference


def experienced(settings, made, sequences, coef=0.05):
    policy, critic, reference = made
    found = experience.score_tokens(
        policy, critic if settings.has_critic else None, reference, sequences, settings
    )
    scores = torch.arange(len(sequences)).float().sin()
    extra = {"greedy_scores": scores.cos()} if settings.advantage == "remax" else {}
    return experience.build(sequences, scores, found, coef, settings, **extra), found


def names_of(module, parameters):
    known = {id(p): name for name, p in module.named_parameters()}
    return {known[id(p)] for p in parameters if id(p) in known}


@pytest.mark.parametrize("kind", ["Gemma2", "Gemma3Text", "GPT2", "OPT", "Llama"])
def test_decay_spares_what_transformers_spares(kind):
    """Norms and biases, by their names or as LayerNorm."""
    import transformers

    sizes = {
        "vocab_size": 7, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
        "max_position_embeddings": 16,
    }  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(**sizes)
    model = transformers.AutoModelForCausalLM.from_config(config)
    decayed, spared = decay_groups(model.parameters(), [model], 0.3)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.3, 0.0)
    wanted = transformers.Trainer.get_decay_parameter_names(None, model)
    every = dict(model.named_parameters())
    assert names_of(model, decayed["params"]) == {n for n in wanted if n in every}
    assert names_of(model, spared["params"]) == set(every) - set(wanted)
    assert len(decayed["params"]) + len(spared["params"]) == len(every)


@pytest.mark.parametrize("kind", ["shared", "separate", "adapter"])
def test_weights_decay_and_norms_and_biases_do_not(kind, tmp_path):
    """A step without gradients is the decay alone: w (1 - lr decay)."""
    settings = config(tmp_path, weight_decay=0.5, learning_rate=0.1)
    policy, critic, reference = parts(kind)
    update = Update(settings, policy, critic, reference)
    before = [p.detach().clone() for p in update.trained()]
    for parameter in update.trained():
        parameter.grad = torch.zeros_like(parameter)
    for optimiser in update.optimisers:
        optimiser.step()
    known = {id(p): n for m in (policy, critic) for n, p in m.named_parameters()}
    told = set()
    for parameter, old in zip(update.trained(), before, strict=True):
        name = known[id(parameter)]
        kept = "norm" in name or name.endswith("bias")
        told.add(kept)
        torch.testing.assert_close(parameter.detach(), old if kept else 0.95 * old)
    assert True in told
    assert False in told


def gradients(settings, kind, sequences, rows=None):
    """Gradients of one optimiser step, before the optimiser sees them."""
    made = parts(kind)
    batch, _ = experienced(settings, made, sequences)
    update = Update(settings, made[0], made[1] if settings.has_critic else None, made[2])
    # another policy than the one that drew, so that ratios are not 1
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in update.trained():
            parameter.add_(0.02 * torch.randn_like(parameter))
    kept = []
    # in the order of `trained`; an optimiser has those that decay first
    for group, optimiser in zip(update.groups, update.optimisers, strict=True):
        optimiser.step = lambda group=group: kept.extend(
            p.grad.clone() if p.grad is not None else None for p in group
        )
    rows = torch.arange(len(sequences)) if rows is None else rows
    metrics = update.step(batch, rows, coef=0.05)
    return kept, metrics


@pytest.mark.parametrize("kind", ["shared", "separate", "adapter"])
@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"kl_in": "loss", "kl_estimator": "full", "entropy_coef": 0.1, "dual_clip": 1.5},
        {"kl_in": "loss", "kl_estimator": "k3", "aggregation": "seq-mean-token-mean"},
    ],
)
def test_pieces_of_one_row_give_the_gradient_of_the_whole(tmp_path, kind, changed):
    sequences = random_sequences(rows=6)
    base = config(tmp_path, per_device_train_batch_size=6, max_grad_norm=None, **changed)
    whole, seen = gradients(base, kind, sequences)
    single = dataclasses.replace(base, per_device_train_batch_size=1, gradient_accumulation_steps=6)
    pieces, other = gradients(single, kind, sequences)
    assert any(g is not None and bool(g.abs().max() > 1e-4) for g in whole)
    for a, b in zip(whole, pieces, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    for name, value in seen.items():
        assert other[name] == pytest.approx(value, abs=1e-5), name


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"entropy_coef": 0.3},
        {"cliprange": 0.05, "cliprange_high": 0.4, "dual_clip": 1.02, "cliprange_value": None},
        {"kl_in": "loss", "kl_estimator": "k1+"},
        {"kl_in": "loss", "kl_estimator": "full"},
        {"aggregation": "seq-mean-token-sum"},
        {"aggregation": "seq-mean-token-mean"},
        {"aggregation": "seq-mean-token-sum-norm"},
    ],
    ids=lambda changed: "-".join(str(value) for value in changed.values()) or "plain",
)
def test_loss_gradient_is_that_of_the_formula_over_whole_logits(tmp_path, changed):
    """The whole objective once more, padded, with materialised logits."""
    sequences = random_sequences(rows=4)
    settings = config(
        tmp_path, per_device_train_batch_size=4, max_grad_norm=None, vf_coef=0.3, **changed
    )
    mine, _ = gradients(settings, "shared", sequences)
    made = parts("shared")
    batch, _ = experienced(settings, made, sequences)
    policy, critic, reference = made
    torch.manual_seed(4)
    everything = [*policy.parameters(), *critic.parameters()]
    with torch.no_grad():
        for parameter in everything:
            parameter.add_(0.02 * torch.randn_like(parameter))
    asked = {
        "input_ids": sequences.ids,
        "attention_mask": sequences.mask,
        "position_ids": sequences.position_ids,
    }
    places = slice(sequences.prompt_width - 1, -1)

    def of_token(logp):
        return logp.gather(2, sequences.responses.unsqueeze(-1)).squeeze(-1)

    out = policy(**asked, output_hidden_states=True)
    whole = (out.logits[:, places] / 0.9).log_softmax(-1)
    logp = of_token(whole)
    values = out.hidden_states[-1][:, places] @ critic.head.weight[0] + critic.head.bias
    mask, lengths = sequences.response_mask, sequences.lengths
    ratio = (logp - batch.logprobs).exp()
    low, high = 1 - settings.cliprange, 1 + (settings.cliprange_high or settings.cliprange)
    gain = batch.advantages
    policy_loss = torch.max(-gain * ratio, -gain * ratio.clamp(low, high))
    if settings.dual_clip:
        capped = torch.min(policy_loss, -gain * settings.dual_clip)
        assert bool((capped < policy_loss)[mask & (gain < 0)].any())
        policy_loss = torch.where(gain < 0, capped, policy_loss)
    policy_loss = policy_loss + settings.entropy_coef * (whole.exp() * whole).sum(-1)
    if settings.kl_in == "loss":
        with torch.no_grad():
            ref = (reference.model(**asked).logits[:, places] / 0.9).log_softmax(-1)
        if settings.kl_estimator == "full":
            kl = (whole.exp() * (whole - ref)).sum(-1)
        else:  # a "+" has the gradient of k2
            kl = (logp - of_token(ref)) ** 2 / 2
        policy_loss = policy_loss + 0.05 * kl
    rows = (policy_loss * mask).sum(1)
    total = {
        "token-mean": rows.sum() / lengths.sum(),
        "seq-mean-token-sum": rows.mean(),
        "seq-mean-token-mean": (rows / lengths).mean(),
        "seq-mean-token-sum-norm": rows.mean() / settings.response_length,
    }[settings.aggregation]
    error = (values - batch.returns) ** 2
    if settings.cliprange_value:
        near = batch.values + (values - batch.values).clamp(-0.2, 0.2)
        error = torch.max(error, (near - batch.returns) ** 2)
    (total + 0.3 * (error / 2 * mask).sum() / lengths.sum()).backward()
    for a, p in zip(mine, everything, strict=True):
        torch.testing.assert_close(a, p.grad, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("kind", ["shared", "separate", "adapter"])
def test_ratio_is_one_at_the_first_minibatch(tmp_path, kind):
    sequences = random_sequences(rows=8)
    settings = config(
        tmp_path, num_mini_batches=2, num_ppo_epochs=1, local_rollout_forward_batch_size=3
    )
    made = parts(kind)
    batch, _ = experienced(settings, made, sequences)
    first = Update(settings, made[0], made[1], made[2]).run(batch, 0, 0.0, 1.0)[0]
    assert first["approxkl"] == pytest.approx(0, abs=1e-6)
    for name in ("ratio", "ratio_min", "ratio_max"):
        assert first[name] == pytest.approx(1, abs=1e-5)
    assert first["clipfrac"] == 0


def test_nothing_behind_an_end_and_no_padding_counts(tmp_path):
    settings = config(tmp_path, per_device_train_batch_size=6, max_grad_norm=None)
    sequences = random_sequences(rows=6)
    plain, _ = gradients(settings, "shared", sequences)
    # other tokens behind the ends, and wider padding on both sides
    noise = torch.randint(3, 60, sequences.responses.shape)
    dirty = torch.where(sequences.response_mask, sequences.responses, noise)
    ids = torch.cat([sequences.ids[:, : sequences.prompt_width], dirty], 1)
    wide = Sequences.cat(
        [
            Sequences(ids, sequences.mask, sequences.response_mask),
            random_sequences(rows=1, prompt=9, response=12),
        ]
    )[:6]
    other, _ = gradients(settings, "shared", wide)
    for a, b in zip(plain, other, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_no_gradient_reaches_what_is_behind_an_end_or_padding(tmp_path):
    """Not a small one: none."""
    sequences = random_sequences(rows=6)
    settings = config(
        tmp_path, per_device_train_batch_size=6, entropy_coef=0.1, kl_in="loss", kl_estimator="k2"
    )
    made = parts()
    batch, _ = experienced(settings, made, sequences)
    seen = []

    def keep(module, inputs, states):
        states.retain_grad()
        seen.append(states)

    handle = made[0].get_input_embeddings().register_forward_hook(keep)
    Update(settings, *made).step(batch, torch.arange(6), coef=0.05)
    handle.remove()
    [states] = seen
    assert states.shape[:2] == sequences.ids.shape
    outside = ~sequences.mask.bool()
    assert bool(outside[:, : sequences.prompt_width].any())
    assert bool(outside[:, sequences.prompt_width :].any())
    assert not states.grad[outside].any()
    # nor the last token, whose state predicts one that is not there
    last = sequences.last()
    assert not states.grad[last].any()
    assert bool(states.grad[sequences.mask.bool() & ~last].abs().amax(-1).gt(0).all())


def test_rewards_are_whitened_and_keep_their_mean(tmp_path):
    sequences = random_sequences(rows=6)
    found = {}
    for name in (False, True):
        settings = config(
            tmp_path, whiten_rewards=name, whiten_advantages=False, kl_coef=0.3, lam=0.0, gamma=0.0
        )
        batch, _ = experienced(settings, parts(), sequences, coef=0.3)
        found[name] = batch.packed("returns")  # of lam = gamma = 0: the rewards
    plain = found[False]
    expected = (plain - plain.mean()) / plain.std() + plain.mean()
    torch.testing.assert_close(found[True], expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(plain, expected, atol=1e-2)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_groups_are_scaled_as_the_settings_say(tmp_path, scale):
    settings = config(
        tmp_path, advantage="grpo", num_generations=4, kl_in="loss", scale_rewards=scale
    )
    batch, _ = experienced(settings, parts(), random_sequences(rows=8))
    groups = torch.arange(8).float().sin().view(2, 4)
    wanted = groups - groups.mean(1, keepdim=True)
    if scale != "none":
        std = groups.std(1, keepdim=True) if scale == "group" else groups.std()
        wanted = wanted / (std + 1e-4)
    torch.testing.assert_close(batch.advantages[:, 0], wanted.flatten())


def test_first_token_and_end_each_count_once(tmp_path):
    """A response of an end alone has one term, the end's."""
    settings = config(tmp_path, per_device_train_batch_size=2, whiten_advantages=False)
    prompt = torch.tensor([[5, 6], [7, 8]])
    responses = torch.tensor([[END, 9, 9], [9, END, 4]])
    sequences = Sequences.build(prompt, torch.ones_like(prompt), responses, [END])
    made = parts("shared")
    batch, found = experienced(settings, made, sequences)
    assert found.logprobs.shape == (3,)
    logits = made[0](input_ids=prompt).logits[:, -1] / 0.9
    first = logits.log_softmax(-1)[torch.arange(2), responses[:, 0]]
    torch.testing.assert_close(found.logprobs[:2], first, atol=1e-5, rtol=0)
    assert batch.sequences.response_mask.tolist() == [[True, False, False], [True, True, False]]
    # the score stands at the end: with gamma = lam = 1 the return is the rest of the rewards
    one = dataclasses.replace(settings, lam=1.0, kl_coef=0.0)
    batch, _ = experienced(one, made, sequences, coef=0.0)
    scores = torch.arange(2).float().sin()
    torch.testing.assert_close(batch.returns[0, 0], scores[0])
    torch.testing.assert_close(batch.returns[1, :2], scores[1].expand(2))


@pytest.mark.parametrize("advantage", ["rloo", "grpo", "remax", "reinforce++"])
def test_advantages_without_a_critic(tmp_path, advantage):
    settings = config(tmp_path, advantage=advantage, num_generations=2, kl_in="loss")
    sequences = random_sequences(rows=8)
    batch, _ = experienced(settings, parts(), sequences)
    assert batch.values is None
    assert batch.returns is None
    scores = torch.arange(8).float().sin()
    by_row = torch.stack([batch.advantages[row, 0] for row in range(8)])
    pairs = scores.view(4, 2)
    if advantage == "rloo":
        torch.testing.assert_close(by_row, (pairs - pairs.flip(1)).flatten())
    elif advantage == "grpo":
        wanted = (pairs - pairs.mean(1, keepdim=True)) / (pairs.std(1, keepdim=True) + 1e-4)
        torch.testing.assert_close(by_row, wanted.flatten())
    elif advantage == "remax":
        torch.testing.assert_close(by_row, scores - scores.cos())
    else:
        every = batch.packed("advantages")
        assert float(every.mean()) == pytest.approx(0, abs=1e-5)
        assert float(every.std()) == pytest.approx(1, abs=1e-4)


def test_importance_weights_scale_the_loss(tmp_path):
    settings = config(tmp_path, importance_cap=1.5)
    sequences, made = random_sequences(rows=4), parts()
    found = experience.score_tokens(made[0], made[1], made[2], sequences, settings)
    batch = experience.build(
        sequences,
        torch.ones(4),
        found,
        0.0,
        settings,
        sampler_logprobs=found.logprobs - torch.linspace(-1, 1, len(found.logprobs)),
    )
    wanted = torch.linspace(-1, 1, len(found.logprobs)).exp().clamp(max=1.5)
    torch.testing.assert_close(batch.packed("weights"), wanted, atol=1e-5, rtol=1e-5)


def test_value_head_overfits(tmp_path):
    """A constant reward first, then one that differs between the rows."""
    sequences = random_sequences(rows=6)
    settings = config(
        tmp_path,
        per_device_train_batch_size=6,
        gradient_accumulation_steps=1,
        num_ppo_epochs=15,
        learning_rate=1e-9,
        value_learning_rate=5e-2,
        lam=1.0,
        vf_coef=1.0,
        max_grad_norm=None,
        cliprange_value=None,
    )
    policy, critic, reference = parts("separate")
    update = Update(settings, policy, critic, reference)
    for scores in (torch.ones(6), torch.arange(6).float() / 3):
        for step in range(2):
            found = experience.score_tokens(policy, critic, reference, sequences, settings)
            batch = experience.build(sequences, scores, found, 0.0, settings)
            updates = update.run(batch, step, 0.0, 1.0)
        assert updates[-1]["loss/value"] < 5e-3
    found = experience.score_tokens(policy, critic, reference, sequences, settings)
    assert explained_variance(found.values, batch.packed("returns")) > 0.95


def test_what_cannot_be_trained(tmp_path):
    policy = tiny_model().requires_grad_(False)
    reference = FrozenReference(tiny_model())
    with pytest.raises(ValueError, match="policy: expected trainable parameters, got none"):
        Update(config(tmp_path), policy, None, reference)
    half = tiny_model().bfloat16()
    with pytest.raises(ValueError, match="expected trainable weights in float32"):
        Update(config(tmp_path), half, None, reference)


def test_a_batch_without_a_score_moves_nothing(tmp_path):
    """Adam has momentum by then, and would go on without a gradient."""
    settings, sequences = config(tmp_path, weight_decay=0.1), random_sequences(rows=8)
    made = parts()
    update = Update(settings, *made)
    batch, _ = experienced(settings, made, sequences)
    update.step(batch, torch.arange(8))
    moved = [p.detach().clone() for p in update.trained()]
    nothing = Sequences(sequences.ids, sequences.mask, torch.zeros_like(sequences.response_mask))
    found = experience.score_tokens(*made, nothing, settings)
    scores = torch.full((8,), float("nan"))
    update.step(experience.build(nothing, scores, found, 0.05, settings), torch.arange(8))
    assert all(torch.equal(a, b) for a, b in zip(moved, update.trained(), strict=True))


def test_reinforce_whitens_as_the_settings_say(tmp_path):
    found = []
    for unbiased in (True, False):
        settings = config(tmp_path, advantage="reinforce++", whiten_unbiased=unbiased)
        batch, _ = experienced(settings, parts(), random_sequences(rows=8))
        found.append(batch.packed("advantages").double())
    n = len(found[0])
    torch.testing.assert_close(found[1], found[0] * (n / (n - 1)) ** 0.5, rtol=1e-5, atol=1e-6)
