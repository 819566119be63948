"""Models tuned once: the pocket by its own recipe, others with their embeddings as they are."""

import json

import pytest
import torch
from tiny_gemma2 import T, tiny_model, tiny_rows

from gemma_ext.sae import load_model, pocket_of, tuned_model


def once(rows):
    """Gives the rows at the first call and raises at a second."""
    left = [rows]
    return left.pop


def test_names_of_pockets():
    assert pocket_of("pocket") == "nano"
    assert pocket_of("pocket:small") == "small"
    assert pocket_of("google/gemma-3-270m") is None


def test_a_folder_of_another_model_is_refused(tmp_path):
    """Which would be steered, measured and shown as if it were the one that was asked for."""
    options = {"steps": 3, "batch": 4}
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match=r"out: expected a model tuned by .*, got None"):
        tuned_model("pocket", tmp_path / "out", once(None), **options)
    made_of = {"model": "pocket:small", "steps": 3, "batch": 4, "rate": 5e-3}
    (tmp_path / "out" / "tuned.json").write_text(json.dumps(made_of))
    with pytest.raises(ValueError, match=r"'pocket', .* got {'model': 'pocket:small'"):
        tuned_model("pocket", tmp_path / "out", once(None), **options)


def mean_loss(model, rows):
    with torch.no_grad():
        return float(model(input_ids=rows, labels=rows).loss)


@pytest.mark.slow
def test_a_pocket_is_tuned_once(tiny_size, tmp_path):
    name = f"pocket:{tiny_size}"
    base, tokenizer = load_model(name)
    assert tokenizer.bos_token_id is not None
    assert not base.training
    rows = torch.randint(4, 40, (6, 16))
    read = once(rows)
    made = [
        tuned_model(name, tmp_path / "out" / "tuned", read, steps=60, batch=4) for _ in range(2)
    ]
    assert mean_loss(made[0], rows) < mean_loss(base, rows) - 0.5
    for a, b in zip(made[0].parameters(), made[1].parameters(), strict=True):
        assert torch.equal(a, b)
    assert made[0].config._attn_implementation == "eager"
    assert not made[0].training


@pytest.mark.slow
def test_another_model_keeps_its_embeddings(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    rows = tiny_rows().long()
    base = tiny_model()
    made = tuned_model(
        str(tmp_path / "model"),
        tmp_path / "tuned",
        once(rows),
        steps=20,
        batch=8,
        rate=1e-2,
        dtype=torch.bfloat16,
    )
    assert rows.shape[1] == T
    assert made.dtype == torch.bfloat16
    before, after = (m.get_input_embeddings().weight.float() for m in (base, made))
    assert torch.equal(before.bfloat16().float(), after)
    moved = [
        float((a.detach().float() - b.detach().float()).abs().max())
        for (name, a), b in zip(base.named_parameters(), made.parameters(), strict=True)
        if "proj" in name
    ]
    assert min(moved) > 1e-3
    assert mean_loss(made.float(), rows) < mean_loss(base, rows)
