"""Where response tokens are, and the states that predict them."""

import pytest
import torch
from ppo_tiny import END, PAD, random_sequences, tiny_model

from gemma_ext.nn.ppo import FrozenReference, HiddenHead, Sequences, exact_kl, full_kl, read


def logits_of(model, sequences):
    """float64 [B, T, V] that predict the response's tokens."""
    out = model(
        input_ids=sequences.ids,
        attention_mask=sequences.mask,
        position_ids=sequences.position_ids,
    ).logits
    return out[:, sequences.prompt_width - 1 : -1].double()


def test_response_ends_with_its_first_end_and_nothing_behind_it():
    prompts = torch.tensor([[0, 5], [6, 7]])
    responses = torch.tensor([[8, END, 9, END], [3, 4, 5, 6]])
    found = Sequences.build(prompts, (prompts > 0).long(), responses, [END], pad=PAD)
    assert found.response_mask.tolist() == [[True, True, False, False], [True] * 4]
    assert found.responses.tolist() == [[8, END, 0, 0], [3, 4, 5, 6]]
    assert found.mask.tolist() == [[0, 1, 1, 1, 0, 0], [1] * 6]
    assert found.targets.tolist() == [8, END, 3, 4, 5, 6]
    assert found.lengths.tolist() == [2, 4]
    assert found.owners.tolist() == [0, 0, 1, 1, 1, 1]
    assert found.position_ids[0].tolist() == [0, 0, 1, 2, 2, 2]


def test_every_end_of_several_ends_and_none_does_not():
    prompts, responses = torch.ones(1, 1).long(), torch.tensor([[5, 9, 7, 8]])
    for ends, length in (([7, 9], 2), ([7], 3), ([], 4)):
        found = Sequences.build(prompts, prompts, responses, ends)
        assert found.lengths.tolist() == [length]


def test_packing_and_unpacking():
    sequences = random_sequences()
    values = torch.randn(int(sequences.lengths.sum()))
    laid = sequences.unpack(values, fill=-1)
    assert laid.shape == sequences.response_mask.shape
    assert torch.equal(sequences.pack(laid), values)
    assert bool((laid[~sequences.response_mask] == -1).all())


def test_hidden_rows_are_those_one_before():
    sequences = random_sequences()
    width = sequences.ids.shape[1]
    places = torch.arange(width).expand(len(sequences), -1).unsqueeze(-1)
    rows, tokens = sequences.hidden_rows(places)[:, 0], sequences.targets
    assert torch.equal(sequences.ids[sequences.owners, rows + 1], tokens)
    last = sequences.last()
    assert torch.equal(last.nonzero()[:, 1], sequences.prompt_width - 1 + sequences.lengths)


def test_trimming_and_joining_keep_the_tokens():
    sequences = random_sequences(rows=4, prompt=9, response=11)
    short = sequences[torch.tensor([0, 1])].trimmed()
    assert short.ids.shape == (2, 2 + 11)
    assert torch.equal(short.targets, sequences[:2].targets)
    narrow = sequences[2:4].trimmed()
    joined = Sequences.cat([short, narrow], pad=PAD)
    assert torch.equal(joined.targets, sequences.targets)
    assert torch.equal(
        joined.position_ids[joined.mask.bool()], sequences.position_ids[sequences.mask.bool()]
    )


@pytest.mark.parametrize(
    ("ids", "mask", "response_mask", "message"),
    [
        ((2, 5), (2, 4), (2, 3), "expected ids and mask to be"),
        ((2, 5), (2, 5), (2, 5), "with T < 5"),
        ((2, 5), (2, 5), (3, 2), r"expected response_mask to be \[2, T\]"),
    ],
)
def test_shapes_that_do_not_fit(ids, mask, response_mask, message):
    with pytest.raises(ValueError, match=message):
        Sequences(torch.zeros(ids), torch.zeros(mask), torch.zeros(response_mask, dtype=torch.bool))


def test_other_mistakes():
    with pytest.raises(ValueError, match="expected a bool response_mask"):
        Sequences(torch.zeros(1, 3), torch.zeros(1, 3), torch.zeros(1, 2))
    prompts = torch.tensor([[5, 0]])
    with pytest.raises(ValueError, match="padded on the left"):
        Sequences.build(prompts, (prompts > 0).long(), torch.tensor([[4]]), [END])


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_logprobs_and_entropy_are_those_of_whole_logits(temperature):
    model, sequences = tiny_model(), random_sequences()
    logprobs, entropy = read(model, sequences).head.logprobs(sequences.targets, temperature)
    whole = (logits_of(model, sequences) / temperature).log_softmax(-1)
    wanted = whole.gather(2, sequences.responses.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(logprobs.double(), sequences.pack(wanted), atol=2e-5, rtol=0)
    wanted = -(whole.exp() * whole).sum(-1)
    torch.testing.assert_close(entropy.double(), sequences.pack(wanted), atol=1e-4, rtol=0)


def test_gradient_is_that_of_whole_logits():
    model, sequences = tiny_model(), random_sequences()
    upstream = torch.randn(int(sequences.lengths.sum()))
    found = read(model, sequences).head.logprobs(sequences.targets, 0.7)[0]
    mine = torch.autograd.grad((found * upstream).sum(), list(model.parameters()))
    whole = (logits_of(model, sequences) / 0.7).log_softmax(-1)
    wanted = sequences.pack(whole.gather(2, sequences.responses.unsqueeze(-1)).squeeze(-1))
    theirs = torch.autograd.grad((wanted * upstream).sum(), list(model.parameters()))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-4)


def test_padding_on_either_side_changes_nothing():
    model, sequences = tiny_model(), random_sequences(rows=3)
    alone = torch.cat(
        [FrozenReference(model).logprobs(sequences[at : at + 1].trimmed(), 0.7) for at in range(3)]
    )
    wide = Sequences.cat([sequences, random_sequences(rows=1, prompt=11, response=13, seed=1)])[:3]
    found = FrozenReference(model).logprobs(wide, 0.7)
    torch.testing.assert_close(found, alone, atol=1e-5, rtol=0)


def test_exact_kl_to_one_and_to_several():
    model, others = tiny_model(0), [tiny_model(1), tiny_model(2)]
    sequences = random_sequences()
    heads = [(a, read(m, sequences).head) for a, m in zip((0.25, 0.75), others, strict=True)]
    found = exact_kl(read(model, sequences).head, heads, 0.7)
    p = (logits_of(model, sequences) / 0.7).log_softmax(-1)
    wanted = sum(
        a * full_kl(p, (logits_of(m, sequences) / 0.7).log_softmax(-1))
        for a, m in zip((0.25, 0.75), others, strict=True)
    )
    torch.testing.assert_close(found.double(), sequences.pack(wanted), atol=1e-5, rtol=1e-4)


def test_head_without_anything():
    hidden, weight = torch.randn(3, 4), torch.randn(7, 4)
    logprobs, _ = HiddenHead(hidden, weight).logprobs(torch.tensor([0, 6, 2]), 2.0)
    wanted = (hidden @ weight.T / 2).log_softmax(-1)[torch.arange(3), torch.tensor([0, 6, 2])]
    torch.testing.assert_close(logprobs, wanted)
