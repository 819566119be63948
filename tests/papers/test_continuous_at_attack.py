"""The attack on tiny models of transformers: what moves, what does not, and what it costs."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from gemma_ext.papers.continuous_at import (
    EMBEDDINGS,
    Attack,
    AttackConfig,
    Batch,
    Embeddings,
    Perturbed,
    Row,
    TargetLoss,
)
from gemma_ext.papers.continuous_at.perturbation import added

pytest.importorskip("transformers")
ROWS = [
    Row((2, 5, 6, 7, 8, 9, 10, 11), (0, 4, 5)),  # id 0, the padding, inside a target
    Row((2, 9), (3,)),
    Row((2, 1, 4, 4), (9, 9, 8, 9, 7, 9, 9)),
    Row((2,), (17, 18)),
]
STRONG = AttackConfig(rate=0.1, unit="ball", eps_rel=0.5)


def gemma2(**changes):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    values = {
        "vocab_size": 101, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 6,
        "query_pre_attn_scalar": 8, "attn_implementation": "eager", "pad_token_id": 0,
        "eos_token_id": 1, "bos_token_id": 2, "initializer_range": 0.3,
    }  # fmt: skip
    return Gemma2ForCausalLM(Gemma2Config(**values | changes)).eval()


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=101, hidden_size=24, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=4, attn_implementation="eager",
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def model():
    return gemma2()


def test_embeddings_are_those_that_the_model_reads(model):
    embed = Embeddings(model)
    ids = torch.arange(101)
    scaled = model.model.embed_tokens.weight.detach() * 32**0.5
    assert torch.allclose(embed(ids), scaled, rtol=1e-6)
    assert embed.mean_norm() == pytest.approx(float(scaled.norm(dim=1).mean()), rel=1e-6)
    assert not embed(ids).requires_grad


def test_a_model_that_scales_outside_its_embedding_is_refused():
    class Outside(nn.Module):
        """Embeds by a plain table and scales in its forward, but not what it is given."""

        def __init__(self, inner):
            super().__init__()
            self.inner = inner
            self.table = nn.Embedding.from_pretrained(inner.model.embed_tokens.weight.detach())

        def get_input_embeddings(self):
            return self.table

        def forward(self, input_ids=None, inputs_embeds=None, **options):
            if input_ids is not None:
                return self.inner(input_ids=input_ids, **options)
            return self.inner(inputs_embeds=inputs_embeds, **options)

    with pytest.raises(ValueError, match="model: expected the same logits from ids as from their"):
        Embeddings(Outside(gemma2()))


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("make", [gemma2, llama])
def test_loss_is_that_of_full_logits_in_a_batch_and_alone(make, padding):
    model = make()
    loss, batch = TargetLoss(model), Batch(ROWS, padding=padding)
    found = loss(batch)
    assert torch.equal(found, loss(batch, Embeddings(model)(batch.ids)))
    means = []
    for row in ROWS:
        logits = model(input_ids=torch.tensor([row.prompt + row.target])).logits[0]
        rows = logits[len(row.prompt) - 1 : -1]
        means.append(torch.nn.functional.cross_entropy(rows, torch.tensor(row.target)))
    assert torch.allclose(batch.means(found), torch.stack(means), atol=1e-5)


@pytest.mark.parametrize("cap", [30.0, 5.0, None])
def test_gradient_of_the_perturbation_is_that_of_full_logits(cap):
    model = gemma2(final_logit_softcapping=cap, initializer_range=1.0)
    batch, perturbed = Batch(ROWS), Perturbed(model)
    delta = torch.randn(len(batch.places[0]), 32) * 0.01
    ours, theirs = delta.clone().requires_grad_(), delta.clone().requires_grad_()
    perturbed(batch, [ours]).sum().backward()
    states = added(perturbed.embeddings(batch.ids), batch, theirs)
    logits = model(inputs_embeds=states, **batch.model_inputs()).logits[batch.predictors]
    assert cap is None or logits.abs().max() > 0.3 * cap  # the cap is felt
    torch.nn.functional.cross_entropy(logits, batch.targets, reduction="sum").backward()
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-6 * float(theirs.grad.abs().max()) + 1e-6)


def test_no_perturbation_is_the_clean_loss_bit_for_bit(model):
    batch = Batch(ROWS)
    count = len(batch.places[0])
    perturbed = Perturbed(model, (EMBEDDINGS, 0, 1))
    found = perturbed(batch, [torch.zeros(count, 32)] * 3)
    assert torch.equal(found, TargetLoss(model)(batch))
    bf16 = gemma2().to(torch.bfloat16)
    found = Perturbed(bf16)(batch, [torch.zeros(count, 32)])
    assert torch.equal(found, TargetLoss(bf16)(batch))


def test_targets_padding_and_tokens_that_are_not_free_do_not_move(model):
    rows = [replace(ROWS[0], free=(3, 5)), *ROWS[1:]]
    batch = Batch(rows)
    zero = torch.zeros(*batch.ids.shape, 32)
    moved = added(zero, batch, torch.ones(len(batch.places[0]), 32)).any(-1)
    assert torch.equal(moved, batch.free)
    assert batch.free[0].nonzero()[:, 0].tolist() == [3, 4]
    assert not (batch.free & (batch.scored | ~batch.mask)).any()
    assert [row.moved for row in rows] == batch.free.sum(1).tolist() == [2, 2, 4, 1]


@pytest.mark.parametrize("step", ["sign", "l2norm", "adam", "rms"])
@pytest.mark.parametrize("sites", [(EMBEDDINGS,), (0,), (EMBEDDINGS, 0, 1)])
def test_attack_stays_in_the_balls_and_lowers_the_loss(model, step, sites):
    config = replace(STRONG, step=step, sites=sites)
    attack = Attack(model, config)
    found = attack(ROWS)
    assert (found.losses[-1] < found.losses[0]).all()
    assert found.losses.shape == (11, 4)
    for delta, radius in zip(found.deltas, found.radii, strict=True):
        assert delta.dtype == torch.float32
        assert (delta.norm(dim=1) <= radius * (1 + 1e-6)).all()
    assert torch.allclose(attack.losses(ROWS, found.deltas).double(), found.losses[-1], atol=1e-5)
    assert torch.allclose(found.losses[0], TargetLoss(model).means(Batch(ROWS)).double(), atol=1e-5)
    assert all(delta.any() for delta in found.deltas)


def test_radius_is_a_share_of_the_mean_norm_and_of_a_states_own(model):
    batch = Batch(ROWS)
    perturbed = Perturbed(model, (EMBEDDINGS, 1))
    first, second = perturbed.norms(batch)
    assert first.tolist() == pytest.approx([perturbed.embeddings.mean_norm()] * len(first))
    states = []
    handle = model.model.layers[1].register_forward_hook(lambda m, a, out: states.append(out))
    model(input_ids=batch.ids, **batch.model_inputs())
    handle.remove()
    out = states[0][0] if isinstance(states[0], tuple) else states[0]
    assert torch.allclose(second, out[batch.free].norm(dim=1), rtol=1e-5)


def test_any_long_single_sign_step_lands_on_the_fixed_point(model):
    one = Attack(model, AttackConfig(eps_rel=0.1).one_step())(ROWS[:1])
    long = Attack(model, AttackConfig(eps_rel=0.1, rate=10.0, steps=1))(ROWS[:1])
    assert torch.allclose(one.deltas[0], long.deltas[0], atol=1e-7)
    elements = one.radii[0][:, None] / 32**0.5
    assert torch.allclose(one.deltas[0].abs(), elements.expand(-1, 32), rtol=1e-5)
    assert one.boundary == (1.0,)


def test_the_ball_is_a_dead_number_while_steps_are_short(model):
    found = Attack(model, AttackConfig(eps_rel=0.5))(ROWS)
    assert found.boundary == (0.0,)
    assert found.deltas[0].norm(dim=1).max() <= 10 * 1e-4 * 32**0.5 * (1 + 1e-5)
    assert torch.equal(found.deltas[0], Attack(model, AttackConfig(eps_rel=5.0))(ROWS).deltas[0])


def test_loss_falls_with_the_radius_on_average(model):
    means = [
        float(Attack(model, replace(STRONG, eps_rel=eps))(ROWS).losses[-1].mean())
        for eps in (0.05, 0.2, 0.8)
    ]
    assert means == sorted(means, reverse=True)


@pytest.mark.parametrize("sites", [(EMBEDDINGS,), (EMBEDDINGS, 1)])
def test_a_rows_result_does_not_depend_on_its_neighbours(model, sites):
    config = replace(STRONG, step="l2norm", steps=4, init="ball", sites=sites)
    together, chunked = Attack(model, config)(ROWS), Attack(model, config, batch_tokens=12)(ROWS)
    for at, row in enumerate(ROWS):
        alone = Attack(model, config)([row])
        assert torch.allclose(alone.losses[:, 0], together.losses[:, at], atol=1e-5)
        for one, some, part in zip(alone.deltas, together.of([at]), chunked.of([at]), strict=True):
            assert torch.allclose(one, some, atol=1e-5)
            assert torch.allclose(one, part, atol=1e-5)


def test_parameters_get_no_gradient_and_ask_for_it_as_before():
    model = gemma2()
    model.lm_head.weight.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    Attack(model, STRONG)(ROWS)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert all(p.grad is None for p in model.parameters())
    broken = Attack(model, STRONG)
    broken.perturbed.loss.model = None
    with pytest.raises(TypeError):
        broken(ROWS)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags


def test_hooks_of_blocks_are_gone_afterwards(model):
    Attack(model, replace(STRONG, sites=(0, 1)))(ROWS)
    assert not any(len(layer._forward_hooks) for layer in model.model.layers)


@pytest.mark.parametrize("step", ["sign", "adam"])
def test_rows_that_lost_leave_and_the_others_do_not_notice(model, step):
    config = replace(STRONG, step=step, steps=8)
    whole = Attack(model, config)(ROWS)
    floor = float(whole.losses[4].median()) + 1e-3
    found = Attack(model, replace(config, floor=floor))(ROWS)
    expected = [(whole.losses[:8, at] < floor).double().argmax().item() or 8 for at in range(4)]
    reached = [bool((whole.losses[:8, at] < floor).any()) for at in range(4)]
    expected = [e if r else 8 for e, r in zip(expected, reached, strict=True)]
    assert found.steps.tolist() == expected
    assert len(set(expected)) > 1
    for at, steps in enumerate(expected):
        assert found.losses[-1, at] == pytest.approx(float(whole.losses[steps, at]), abs=1e-4)
    everyone = Attack(model, replace(config, floor=1e9))(ROWS)
    assert everyone.steps.tolist() == [0] * 4
    assert torch.equal(everyone.deltas[0], torch.zeros_like(everyone.deltas[0]))


def test_best_iterate_is_kept_with_its_own_loss(model):
    config = AttackConfig(steps=12, rate=0.9, unit="ball", eps_rel=0.8, keep="best")
    attack = Attack(model, config)
    found = attack(ROWS, evaluate=False)
    again = attack.losses(ROWS, found.deltas).double()
    assert torch.allclose(again, found.losses.min(0).values, atol=1e-4)
    assert (found.losses.min(0).values < found.losses[-1] - 1e-4).any()  # the last is not the best


def test_no_steps_is_the_control(model):
    found = Attack(model, replace(STRONG, steps=0))(ROWS)
    assert torch.equal(found.deltas[0], torch.zeros(15, 32))
    assert found.losses.shape == (1, 4)
    assert Attack(model, replace(STRONG, steps=0))(ROWS, evaluate=False).losses.shape == (0, 4)


def test_same_draws_with_dropout_give_the_same_attack():
    model = llama()
    for layer in model.model.layers:
        layer.mlp = nn.Sequential(layer.mlp, nn.Dropout(0.3))
    attack = Attack(model, STRONG)
    model.train()
    found = []
    for _ in range(2):
        torch.manual_seed(5)
        found.append(attack(ROWS).deltas[0])
    other = attack(ROWS).deltas[0]
    assert torch.equal(*found)
    assert not torch.equal(found[0], other)
    assert model.training
    model.eval()
    assert torch.equal(attack(ROWS).deltas[0], attack(ROWS).deltas[0])


def test_half_precision_weights_are_attacked_in_float32():
    model = gemma2().to(torch.bfloat16)
    found = Attack(model, AttackConfig(rate=1e-5, eps_rel=0.05))(ROWS)
    # steps that bfloat16 could not add up
    assert found.deltas[0].dtype == torch.float32
    assert found.deltas[0].abs().max() == pytest.approx(1e-4, rel=1e-3)
    strong = Attack(model, replace(STRONG, step="rms"))(ROWS)
    assert strong.losses[-1].mean() < strong.losses[0].mean()


def test_infinite_balls_are_allowed(model):
    found = Attack(model, AttackConfig(rate=0.05, eps_rel=math.inf))(ROWS)
    assert (found.losses[-1] < found.losses[0]).all()
    assert found.boundary == (0.0,)


def test_a_perturbation_is_for_the_prompt_whatever_follows(model):
    attack = Attack(model, STRONG)
    found = attack(ROWS)
    others = [replace(row, target=(30, 31)) for row in ROWS]
    together = attack.losses(others, found.deltas)
    for at, row in enumerate(others):
        (delta,) = found.of([at])
        assert float(attack.losses([row], [delta])) == pytest.approx(float(together[at]), abs=1e-5)
    order = [2, 0, 0]
    (some,) = found.of(order)
    lengths = [ROWS[at].moved for at in order]
    assert [len(part) for part in some.split(lengths)] == lengths
    assert torch.equal(some[:4], found.of([2])[0])


def test_recomputed_blocks_are_refused_and_embeddings_are_not():
    model = gemma2().train()
    model.gradient_checkpointing_enable()
    plain = Attack(gemma2(), STRONG)(ROWS)
    assert torch.allclose(Attack(model, STRONG)(ROWS).deltas[0], plain.deltas[0], atol=1e-5)
    with pytest.raises(ValueError, match="sites: expected EMBEDDINGS alone under gradient"):
        Attack(model, replace(STRONG, sites=(0,)))(ROWS)


def test_errors_are_one_sentence(model):
    with pytest.raises(ValueError, match="rows: expected at least one, got none"):
        Attack(model)([])
    with pytest.raises(ValueError, match="rows: expected at least one, got none"):
        Batch([])
    with pytest.raises(ValueError, match="padding: expected right or left, got 'up'"):
        Batch(ROWS, padding="up")
    with pytest.raises(ValueError, match="batch_tokens: expected at least 1, got 0"):
        Attack(model, batch_tokens=0)
    with pytest.raises(ValueError, match="sites: expected -1 to 1, got 2"):
        Perturbed(model, (2,))
    with pytest.raises(ValueError, match=r"sites: expected some, each once, got \[0, 0\]"):
        Perturbed(model, (0, 0))
    with pytest.raises(ValueError, match="prompt: expected at least one token, got none"):
        Row((), (1,))
    with pytest.raises(ValueError, match="target: expected at least one token, got none"):
        Row((1,), ())
    with pytest.raises(ValueError, match="free: expected 0 <= start < end <= 2, got"):
        Row((1, 2), (3,), free=(1, 3))
