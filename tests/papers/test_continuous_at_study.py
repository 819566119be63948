"""The audit, the page, and the example: what is split, and a run that goes on."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import tiny_gemma
import torch

from gemma_ext import pocket
from gemma_ext.papers import continuous_at as cat
from gemma_ext.papers.continuous_at import page, study

pytest.importorskip("transformers")
pytest.importorskip("peft")
SCRIPT = Path(__file__).resolve().parents[2] / "python_examples" / "continuous_at.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("continuous_at_example", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    texts = [document.text for document in pocket.documents(30_000)]
    return tiny_gemma.base(tmp_path_factory.mktemp("tiny"), texts)


def records():
    rows = []
    for name, strong in (("taught", (1.0,)), ("C-AdvUL", (0.1, 0.2, 0.3)), ("no attack", (0.9,))):
        for seed, value in enumerate(strong):
            rows.append(
                {
                    "name": name, "seed": seed, "clean": 0.0, "attacked": 0.5, "strong": value,
                    "loss_clean": 1.0, "loss_attacked": 0.5, "loss_strong": 0.25, "useful": 0.75,
                    "over_refusal": 0.0, "borderline": 0.5,
                }
            )  # fmt: skip
    return rows


def test_the_page_has_every_model_and_only_numbers_that_all_have(tmp_path):
    rows = records()
    rows[0]["gcg"] = 0.5
    head, cells = page.table(rows)
    assert "GCG" not in head
    assert [line[:2] for line in cells] == [["taught", "1"], ["C-AdvUL", "3"], ["no attack", "1"]]
    assert cells[1][head.index("K = 100, restarts")] == "0.20 ± 0.25"
    assert page.markdown(rows).count("\n") == 5
    lines = [{"step": 1, "away": 1.0, "heldout_harmful_attacked": 2.0}, {"step": 2, "away": 1.5}]
    histories, facts = {"C-AdvUL": lines}, {"model": "<pocket>"}
    page.write(tmp_path / "report.html", rows, histories, facts, command="python x --seeds 3")
    text = (tmp_path / "report.html").read_text()
    assert text.count("<svg") == 3
    assert "&lt;pocket&gt;" in text
    assert "after no attack" in text
    assert "python x --seeds 3" in text


def test_losses_under_two_attacks_are_correlated_over_models(tmp_path):
    rows = [row | {"loss_gcg": 2 * at + 1.0} for at, row in enumerate(records())]
    assert page.agreement(rows) is None  # all have one loss under the strong attack
    rows = [row | {"loss_strong": float(x)} for row, x in zip(rows, (1, 3, 2, 4, 5), strict=True)]
    assert page.agreement(rows) == pytest.approx(0.9)
    assert page.agreement(rows[:2]) is None
    assert page.agreement([*rows, records()[0]]) is None
    lines = [{"step": 1, "away": 1.0}]
    page.write(tmp_path / "report.html", rows, {"C-AdvUL": lines}, {}, command="")
    text = (tmp_path / "report.html").read_text()
    assert "<b>0.90</b><span>correlation of losses under K = 100 and GCG</span>" in text
    assert "loss, GCG" in text


def test_what_is_audited_is_never_trained_on(example, tiny):
    _, tokenizer = example.load_model(str(tiny))
    tokenizer.chat_template = example.TEMPLATE
    data = example.Data(cat.Encoder(tokenizer))
    audit = data.audit(cat.AttackConfig(), 16, [])
    hardened = {row.prompt for pair in data.pairs() for row in (pair.harmful, pair.safe)}
    useful = {row.prompt for row in data.useful_rows()}
    taught = useful | {row.prompt for row in data.refusals(data.harmful)}
    audited = {row.prompt for pair in audit.harmful for row in (pair.harmful,)}
    audited |= {row.prompt for row in (*audit.useful, *audit.borderline)}
    assert len(audited) == 16 + 16 * 3 + 9
    assert not audited & (hardened | taught)
    assert not useful & hardened
    assert [row.prompt for row in audit.useful] == [row.prompt for row in audit.refused]
    assert tokenizer.decode(audit.harmful[0].harmful.target).startswith(" Sure, to ")


def test_an_audit_counts_what_the_model_writes(example, tiny):
    model, tokenizer = example.load_model(str(tiny))
    tokenizer.chat_template = example.TEMPLATE
    data = example.Data(cat.Encoder(tokenizer))
    attack = cat.AttackConfig(steps=2, unit="ball", rate=0.5, eps_rel=0.5)
    audit = data.audit(attack, 2, [lambda model: {"gcg": 0.25}])
    found = audit(model)
    assert found["clean"] == found["useful"] == 0.0
    assert found["gcg"] == 0.25
    assert found["loss_strong"] < found["loss_attacked"] < found["loss_clean"]
    rows = [pair.harmful for pair in audit.harmful]
    loss = cat.TargetLoss(model)
    with torch.no_grad():
        ids = torch.tensor([rows[0].prompt])
        written = model.generate(input_ids=ids, max_new_tokens=3, do_sample=False)[
            0, ids.shape[1] :
        ]
    own = cat.Row(rows[0].prompt, tuple(written.tolist()))
    assert study.greedy(loss, [own, rows[0]]).tolist() == [True, False]


def test_variants_differ_in_what_they_are_named_after():
    ul = cat.TrainConfig(attack=cat.AttackConfig(eps_rel=0.3))
    found = study.variants(ul, (cat.EMBEDDINGS, 2), cat.TrainConfig.ipo())
    assert found["C-AdvUL"] == ul
    assert found["C-AdvIPO"].loss == "ipo"
    assert (found["one step"].attack.steps, found["one step"].attack.unit) == (1, "ball")
    assert found["LAT"].attack.sites == (cat.EMBEDDINGS, 2)
    assert found["no attack"].attack.steps == 0
    assert {config.attack.eps_rel for name, config in found.items() if name != "C-AdvIPO"} == {0.3}


@pytest.mark.slow
def test_a_run_goes_on(example, tiny, tmp_path, capsys):
    options = {
        "model": str(tiny), "device": "cpu", "dtype": "float32", "out": tmp_path / "out",
        "seeds": 1, "steps": 2, "teaching": 2, "rate": 1e-3, "teaching_rate": 1e-3, "eps": 0.1,
        "gcg_steps": 1, "gcg_requests": 1, "count": 2, "only": "C-AdvUL,no attack",
    }  # fmt: skip
    example.main(**options)
    assert "| no attack | 1 |" in capsys.readouterr().out
    before = (tmp_path / "out" / "results.json").stat().st_mtime_ns
    example.main(**options)
    assert (tmp_path / "out" / "results.json").stat().st_mtime_ns == before
    assert (tmp_path / "out" / "report.html").exists()
    assert "| C-AdvUL | 1 |" in (tmp_path / "out" / "table.md").read_text()
