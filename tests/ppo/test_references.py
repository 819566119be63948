"""References, roles of adapters, critics and heads."""

import pytest
import torch
from ppo_tiny import D, adapted, random_sequences, tiny_model

from gemma_ext.nn.ppo import (
    AdapterCritic,
    AdapterOffReference,
    AdapterReward,
    FrozenReference,
    Reference,
    SeparateCritic,
    SharedCritic,
    ValueHead,
    active,
    read,
)


def head(seed=0, bias=True):
    torch.manual_seed(seed)
    made = ValueHead(D, bias=bias)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_()
    return made


def test_policy_without_its_adapter_is_the_base_to_the_bit():
    sequences = random_sequences()
    base = FrozenReference(tiny_model()).logprobs(sequences, 0.7)
    policy = adapted(tiny_model(), "value", dropout=0.5).train()
    trained = {n for n, p in policy.named_parameters() if p.requires_grad}
    reference = AdapterOffReference(policy)
    assert isinstance(reference, Reference)
    assert torch.equal(reference.logprobs(sequences, 0.7), base)
    assert policy.training
    assert {n for n, p in policy.named_parameters() if p.requires_grad} == trained
    [(weight, found)] = reference.heads(sequences)
    assert weight == 1
    assert not found.hidden.requires_grad
    on = read(policy.eval(), sequences).head.logprobs(sequences.targets, 0.7)[0]
    assert not torch.allclose(on, base, atol=1e-3)


def test_references_that_hold_nothing_of_their_own():
    for reference in (
        FrozenReference(tiny_model()),
        AdapterOffReference(adapted(tiny_model())),
    ):
        assert reference.after_update(tiny_model(), 1) == {}
        reference.load_state_dict(reference.state_dict())


def test_adapters_off_wants_adapters():
    with pytest.raises(TypeError, match="expected a model of peft, got Gemma2ForCausalLM"):
        AdapterOffReference(tiny_model())


def test_roles_switch_without_changing_what_trains():
    policy = adapted(tiny_model(), "value", "reward")
    trained = {n: p.requires_grad for n, p in policy.named_parameters()}
    assert {n.split(".")[-2] for n, on in trained.items() if on} == {"policy", "value", "reward"}
    sequences = random_sequences()
    own = read(policy, sequences).states
    with active(policy, "value"):
        other = read(policy, sequences).states
        assert {n: p.requires_grad for n, p in policy.named_parameters()} == trained
    assert policy.active_adapter == "policy"
    assert {n: p.requires_grad for n, p in policy.named_parameters()} == trained
    assert torch.equal(read(policy, sequences).states, own)
    assert not torch.allclose(own, other, atol=1e-3)


def test_shared_critic_reads_the_states_of_the_policy():
    model, sequences = tiny_model(), random_sequences()
    critic = SharedCritic(D, head())
    found = read(model, sequences)
    states = model.model(
        input_ids=sequences.ids,
        attention_mask=sequences.mask,
        position_ids=sequences.position_ids,
    ).last_hidden_state
    wanted = sequences.hidden_rows(states) @ critic.head.weight[0] + critic.head.bias
    torch.testing.assert_close(critic(sequences, found), wanted, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="expected what the policy read"):
        critic(sequences)


def test_separate_critic_of_every_kind_reads_the_same():
    sequences, made = random_sequences(), head(bias=False)
    causal = tiny_model()
    wanted = SharedCritic(D, made)(sequences, read(causal, sequences))
    classifier = tiny_model(kind="Gemma2ForSequenceClassification", num_labels=1)
    classifier.model.load_state_dict(causal.model.state_dict())
    with torch.no_grad():
        classifier.score.weight.copy_(made.weight)
    for critic in (
        SeparateCritic(causal, made),
        SeparateCritic(causal.model, made),
        SeparateCritic(classifier),
    ):
        torch.testing.assert_close(critic(sequences), wanted, atol=1e-5, rtol=1e-5)
    assert not classifier.score.weight.requires_grad


def test_adapter_critic_trains_its_adapter_and_head_alone():
    policy = adapted(tiny_model(), "value")
    critic = AdapterCritic(policy, head=head())
    sequences = random_sequences()
    with active(policy, "value"):
        wanted = critic.head(read(policy, sequences).states)
    assert torch.equal(critic(sequences), wanted)
    with critic.acting():
        critic(sequences).square().sum().backward()
    named = {id(p): n for n, p in policy.named_parameters()}
    touched = [named[id(p)] for p in policy.parameters() if p.grad is not None]
    assert touched
    assert all(".value." in name for name in touched)
    assert {id(p) for p in critic.trained()} == {
        *(id(p) for n, p in policy.named_parameters() if ".value." in n),
        *(id(p) for p in critic.head.parameters()),
    }
    with pytest.raises(ValueError, match="expected an adapter named judge, got policy, value"):
        AdapterCritic(policy, "judge")


def test_adapter_reward_scores_the_last_token_of_each_response():
    policy = adapted(tiny_model(), "reward")
    reward = AdapterReward(policy, head(), batch=2)
    sequences = random_sequences()
    with active(policy, "reward"):
        states = policy(
            input_ids=sequences.ids,
            attention_mask=sequences.mask,
            position_ids=sequences.position_ids,
            output_hidden_states=True,
        ).hidden_states[-1]
    wanted = reward.head(states[sequences.last()])
    torch.testing.assert_close(reward.score_sequences(sequences), wanted, atol=1e-5, rtol=1e-5)
    assert not any(p.requires_grad for n, p in policy.named_parameters() if ".reward." in n)
    assert policy.active_adapter == "policy"


@pytest.mark.parametrize(
    "prefix", ["v_head.summary.", "score.", "pretrained_model.v_head.summary."]
)
def test_head_of_the_names_of_others(prefix):
    weight, bias = torch.randn(1, D), torch.randn(1)
    found = ValueHead.of({f"{prefix}weight": weight, f"{prefix}bias": bias, "other": bias})
    states = torch.randn(3, D)
    torch.testing.assert_close(found(states), states @ weight[0] + bias)
    assert ValueHead.of({f"{prefix}weight": weight.bfloat16()}).bias is None


def test_heads_that_are_none():
    with pytest.raises(ValueError, match=r"expected one output, \[1, D\], got \[2, 24\]"):
        ValueHead.of({"score.weight": torch.zeros(2, D)})
    with pytest.raises(ValueError, match="got neither"):
        ValueHead.of({})
    assert ValueHead(D)(torch.randn(0, D)).shape == (0,)
    assert torch.equal(ValueHead(D)(torch.randn(4, D)), torch.zeros(4))
