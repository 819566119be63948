"""The step benchmark on a tiny model: who computes the loss, peaked logits, adapters, bars."""

from __future__ import annotations

import math
import sys
import types
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import bench_step
import step_impls
import step_model

B, T, V, STRIP, TAU = 2, 24, 4096, 256, 2.0**-8


@pytest.fixture
def config():
    return transformers.Gemma2Config(
        vocab_size=V, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=32, query_pre_attn_scalar=32,
    )  # fmt: skip


@pytest.fixture
def model(config):
    return step_model.build(config, torch.float32, "cpu", checkpointing=False)


@pytest.fixture
def ids(config) -> torch.Tensor:
    return step_model.zipf_tokens(config, 1, B, T, "cpu")[0]


def job(config, **changes) -> bench_step.Job:
    settings = {
        "config": config, "weights": None, "text": None, "device": "cpu", "dtype": "fp32",
        "b": B, "t": T, "checkpointing": True, "sgd": True, "seconds": 0.0, "rounds": 2,
        "options": {},
    }  # fmt: skip
    return bench_step.Job(**settings | changes)


def run(config, case: bench_step.Case, *names: str, **changes) -> dict[str, dict]:
    known = step_impls.implementations()
    chosen = {name: known[name] for name in names}
    return {row["name"]: row for row in bench_step.run_case(job(config, **changes), case, chosen)}


def test_all_agree_on_loss_and_gradients(config):
    rows = run(config, bench_step.Case("flat"), "eager", "liger", "exact", "ours")
    eager = rows["eager"]
    assert eager["loss"] == pytest.approx(math.log(V), rel=0.05)
    for name in ("exact", "ours"):
        row = rows[name]
        assert row["note"] == ""
        assert row["loss"] == pytest.approx(eager["loss"], rel=1e-5)
        assert row["grad_norm"] == pytest.approx(eager["grad_norm"], rel=1e-3)
        assert row["head_norm"] == pytest.approx(eager["head_norm"], rel=1e-3)
        assert row["total"] > row["forward"] > 0
        assert row["saved"] == pytest.approx(eager["total"] - row["total"])
        assert row["rounds"] == 2
        assert row["extra_mb"] >= 0
    assert rows["liger"]["note"] == "liger-kernel needs a CUDA device"
    assert rows["liger"]["total"] is None


def test_a_wrong_gradient_prints_no_time(config):
    def wrong(model):
        def loss(ids, labels):
            value = step_impls.model_loss(model)(ids, labels)
            return value + 0.2 * (value - value.detach())

        return nullcontext(loss)

    chosen = {
        "eager": step_impls.Implementation(step_impls.eager),
        "ours": step_impls.Implementation(wrong, ours=True),
    }
    eager, ours = bench_step.run_case(job(config), bench_step.Case("flat"), chosen)
    assert eager["total"] is not None
    assert ours["note"].startswith("RED: grad_norm")
    assert ours["total"] is None


def test_a_failure_is_a_row(config):
    def broken(model):
        raise RuntimeError("no such thing\nat all")

    chosen = {"ours": step_impls.Implementation(broken, ours=True)}
    (row,) = bench_step.run_case(job(config), bench_step.Case("flat"), chosen)
    assert row["note"] == "failed: RuntimeError: no such thing"


def test_a_frozen_head_gets_no_gradient(config):
    rows = run(config, bench_step.Case("flat", lora=True), "eager", "ours")
    assert rows["ours"]["note"] == ""
    assert rows["ours"]["head_norm"] is None
    assert rows["ours"]["grad_norm"] == pytest.approx(rows["eager"]["grad_norm"], rel=1e-3)


def test_adapters_alone_train_and_change_nothing_at_first(model, ids):
    before = step_model.hidden_states(model, ids)
    step_model.add_adapters(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 4
    assert all(".down." in name or ".up." in name for name in trained)
    assert torch.equal(step_model.hidden_states(model, ids), before)
    with pytest.raises(ValueError, match="linear layers named"):
        step_model.add_adapters(model, names=("nothing",))


def sampled_share(hidden, head, labels, filter_eps):
    """As `kept_share`: what sampling strips by their mass keeps in the mean."""
    p = step_model.softmax(hidden[:, :-1].flatten(0, 1).float(), head)
    return (p.unflatten(1, (-1, STRIP)).sum(2) / TAU).clamp(max=1).mean().item()


@pytest.mark.parametrize("target", [0.2, 0.11])
def test_the_search_reaches_a_kept_share(model, ids, monkeypatch, target):
    monkeypatch.setattr(step_model, "kept_share", sampled_share)
    reached = step_model.sharpen(model, ids, target)
    assert 0.5 * target < reached <= target
    hidden, head = step_model.hidden_states(model, ids), step_model.head_of(model)
    found = sampled_share(hidden, head, ids, "auto")
    assert found == pytest.approx(reached, rel=0.05)  # the norm itself gives what was searched


def test_a_share_out_of_reach_is_said(model, ids, monkeypatch):
    """Every row keeps at least one of sixteen strips."""
    monkeypatch.setattr(step_model, "kept_share", sampled_share)
    assert 1 / 16 < step_model.sharpen(model, ids, 0.01) < 0.15


def test_the_share_is_that_of_the_loss(model, ids):
    hidden, head = step_model.hidden_states(model, ids), step_model.head_of(model)
    assert step_model.kept_share(hidden, head, ids, None) == 1.0
    assert 0 < step_model.kept_share(hidden, head, ids, 0.5) < 1


def test_labels_follow_the_model(model, ids):
    step_model.scale_norm(step_model.final_norm(model), 40.0)
    hidden, head = step_model.hidden_states(model, ids), step_model.head_of(model)
    p = step_model.softmax(hidden[:, :-1].flatten(0, 1), head).detach()
    drawn = 0.0
    for seed in range(20):
        labels = step_model.model_labels(hidden, head, seed)
        assert labels.shape == ids.shape
        drawn += p.gather(1, labels[:, 1:].flatten()[:, None]).mean().item() / 20
    assert drawn == pytest.approx(p.square().sum(1).mean().item(), rel=0.15)


@pytest.mark.parametrize("family", ["Gemma2RMSNorm", "LlamaRMSNorm"])
def test_the_norm_is_scaled(family):
    if family == "Gemma2RMSNorm":
        from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm as Norm
    else:
        from transformers.models.llama.modeling_llama import LlamaRMSNorm as Norm
    norm, x = Norm(16), torch.randn(3, 16)
    before = norm(x)
    step_model.scale_norm(norm, 3.0)
    assert torch.allclose(norm(x), 3 * before, rtol=1e-5)


def test_tokens_are_frequent_from_the_first_id_on_and_never_padding(config):
    (ids,) = step_model.zipf_tokens(config, 1, 8, 512, "cpu")
    counts = torch.bincount(ids.flatten(), minlength=V)
    assert counts[config.pad_token_id] == 0
    assert counts[1] > counts[10] > counts[1000]


def test_liger_is_put_on_and_taken_off(model, ids, monkeypatch):
    asked = {}

    def apply(rope: bool = True, fused_linear_cross_entropy: bool = False, model=None):
        asked.update(rope=rope, fused=fused_linear_cross_entropy)
        model.forward = types.MethodType(lambda self, **_: SimpleNamespace(loss="liger's"), model)

    monkeypatch.setattr(step_impls, "liger_patches", lambda: {"gemma2": apply})
    with step_impls.liger(model) as loss:
        assert loss(ids, ids) == "liger's"
    assert asked == {"rope": False, "fused": True}
    assert torch.isfinite(model(input_ids=ids, labels=ids).loss)


def test_the_compiled_head_is_the_models(model, ids, monkeypatch):
    monkeypatch.setattr(step_impls, "compiled_head", lambda: step_impls.head_loss)
    with step_impls.compiled(model) as loss, step_impls.eager(model) as own:
        assert loss(ids, ids).item() == pytest.approx(own(ids, ids).item(), rel=1e-6)


def test_ours_leaves_the_model_as_it_was(model, ids):
    forward = vars(model).get("forward")
    with step_impls.ours(model) as loss:
        assert vars(model).get("forward") is not forward
        loss(ids, ids).backward()
    assert vars(model).get("forward") is forward


def test_cases_by_name():
    def labels(*words):
        return [case.label for case in bench_step.cases_of(*words)]

    assert labels(None, [0.05, 0.01]) == [
        "flat", "kept-0.05", "kept-0.01", "lora-flat", "lora-kept-0.05"
    ]  # fmt: skip
    assert labels(["lora-peaked"], [0.02]) == ["lora-kept-0.02"]
    real = bench_step.cases_of(None, [0.05], real=True)
    assert [case.label for case in real] == ["real", "lora-real"]


@pytest.mark.parametrize(
    ("case", "kept", "own", "verdicts"),
    [
        (bench_step.Case("flat"), 1.0, 0.450, ["liger MISS", "eager MISS"]),
        (bench_step.Case("flat"), 1.0, 0.440, ["liger pass", "eager pass"]),
        (bench_step.Case(0.05), 0.05, 0.440, ["liger pass", "eager MISS"]),
        (bench_step.Case(0.05), 0.05, 0.420, ["liger pass", "eager pass"]),
        (bench_step.Case("flat", lora=True), 1.0, 0.459, ["liger pass", "eager pass"]),
        (bench_step.Case("flat", lora=True), 1.0, 0.461, ["liger pass", "eager MISS"]),
    ],
)
def test_bars(case, kept, own, verdicts):
    rows = {
        "eager": {"total": 0.460},
        "liger": {"total": 0.490},
        "ours": {"total": own, "kept": kept},
    }
    found = [line.split(" ") for line in bench_step.bars(case, rows)]
    assert [f"{words[3].strip(',')} {words[-1]}" for words in found] == verdicts


def test_a_page_is_saved(config, tmp_path):
    rows = list(run(config, bench_step.Case("flat"), "eager", "ours", rounds=1).values())
    facts = {"device": "somewhere", "commit": "abc", "date": "today", "load": "0"}
    bench_step.report.save(tmp_path, "step", rows, facts, bench_step.LAYOUT)
    page = (tmp_path / "step.md").read_text()
    assert "## gemma2-1x64-V4096 flat, B=2 T=24 fp32, checkpointing, SGD" in page
    assert "commit abc, today, load 0" in page
    again = [row | {"loss": 1.0} for row in rows]
    bench_step.report.save(tmp_path, "step", again, facts, bench_step.LAYOUT)
    assert page.count("| ours ") == (tmp_path / "step.md").read_text().count("| ours ") == 1
