"""Audits in embedding space: starts, balls, suffixes, and what is written under them."""

import math
from dataclasses import replace

import pytest
import torch

from gemma_ext.papers.continuous_at import AttackConfig, Encoder
from gemma_ext.papers.continuous_at.evaluation import embedding

ASK = "def read(path): {optim_str}\n"
TARGET = " return path.open"


@pytest.fixture
def rows(pocket_nano):
    encoder = Encoder(pocket_nano.tokenizer)
    return [
        encoder.row(encoder.prompt(text), encoder.answer(target))
        for text, target in (("def f(x):", " return x"), ("import os\nclass A:", " pass"))
    ]


def test_stronger_attacks_stay_in_the_ball(pocket_nano, rows):
    config = embedding.stronger(AttackConfig(eps_rel=0.05), steps=12)
    assert (config.steps, config.step, config.unit, config.keep) == (12, "l2norm", "ball", "best")
    found = embedding.audit(pocket_nano.model, rows, config, restarts=3)
    assert found.losses.shape == (3, 2)
    assert (found.worst <= found.clean).all()
    assert torch.equal(found.worst, found.losses.amin(0))
    from gemma_ext.papers.continuous_at.embeddings import Embeddings

    radius = 0.05 * Embeddings(pocket_nano.model).mean_norm()
    for row, delta in zip(rows, found.deltas, strict=True):
        assert delta.shape == (len(row.prompt), 128)
        assert delta.norm(dim=1).max() <= radius * (1 + 1e-5)
    single = embedding.audit(pocket_nano.model, rows, config)
    torch.testing.assert_close(single.losses[0], found.losses[0])
    weak = replace(config, steps=0)
    assert (found.worst < embedding.audit(pocket_nano.model, rows, weak).worst).all()
    with pytest.raises(ValueError, match="expected steps to be at least 1, got 0"):
        embedding.stronger(AttackConfig(), steps=0)


def test_deltas_are_those_of_the_losses(pocket_nano, rows):
    """The loss of each row by a forward of its own, under the delta that was kept."""
    config = embedding.stronger(AttackConfig(eps_rel=0.1), steps=6)
    found = embedding.audit(pocket_nano.model, rows, config, restarts=2)
    embed = pocket_nano.model.get_input_embeddings()
    for row, delta, worst in zip(rows, found.deltas, found.worst, strict=True):
        ids = torch.tensor([[*row.prompt, *row.target]])
        with torch.no_grad():
            inputs = embed(ids)
            inputs[0, : len(row.prompt)] += delta
            logits = pocket_nano.model(inputs_embeds=inputs).logits[0, -len(row.target) - 1 : -1]
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(row.target))
        assert loss.item() == pytest.approx(worst.item(), abs=1e-4)


def test_an_unconstrained_suffix_writes_the_target(pocket_nano):
    model, tokenizer = pocket_nano.model, pocket_nano.tokenizer
    row = embedding.suffix(tokenizer, ASK, "import os", "! ! ! ! ! !")
    start, end = row.free
    assert tokenizer.decode(row.prompt[start:end]) == "! ! ! ! ! !"
    assert tokenizer.decode(row.prompt[end:]) == "\n"
    config = replace(embedding.SUFFIX, steps=80, rate=0.1)
    found = embedding.audit(model, [row], config)
    assert found.deltas[0].shape == (end - start, 128)
    assert found.worst.item() < 0.3 < found.clean.item()
    count = len(row.target)
    (text,) = embedding.answers(model, tokenizer, found, max_tokens=count)
    assert text == "import os"
    with pytest.raises(ValueError, match="first: expected a text of at least one token, got ''"):
        embedding.suffix(tokenizer, ASK, TARGET, "")


def test_answers_of_a_batch_are_those_alone(pocket_nano, rows):
    weak = embedding.stronger(AttackConfig(eps_rel=0.05), steps=3)
    found = embedding.audit(pocket_nano.model, rows, weak)
    together = embedding.answers(pocket_nano.model, pocket_nano.tokenizer, found, 8)
    alone = embedding.answers(pocket_nano.model, pocket_nano.tokenizer, found, 8, batch_size=1)
    assert together == alone
    clean = replace(found, deltas=tuple(torch.zeros_like(delta) for delta in found.deltas))
    ids = pocket_nano.model.generate(
        torch.tensor([rows[0].prompt]), attention_mask=torch.ones(1, len(rows[0].prompt)),
        max_new_tokens=8, do_sample=False, pad_token_id=0,
    )  # fmt: skip
    expected = pocket_nano.tokenizer.decode(ids[0, len(rows[0].prompt) :], skip_special_tokens=True)
    assert embedding.answers(pocket_nano.model, pocket_nano.tokenizer, clean, 8)[0] == expected


def test_audits_refuse(pocket_nano, rows):
    model, best = pocket_nano.model, AttackConfig(keep="best")
    with pytest.raises(ValueError, match="expected restarts to be at least 1, got 0"):
        embedding.audit(model, rows, best, restarts=0)
    for config in (AttackConfig(), replace(best, sites=(0,))):
        with pytest.raises(ValueError, match="on embeddings alone that keeps the best iterate"):
            embedding.audit(model, rows, config)
    with pytest.raises(ValueError, match="expected a finite radius"):
        embedding.audit(model, rows, replace(best, eps_rel=math.inf), restarts=2)
