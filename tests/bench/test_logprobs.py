"""The benchmark of log-probabilities on a tiny head: what is asked, what is found wrong."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import bench_logprobs as bench


def options(**changes: object) -> argparse.Namespace:
    chosen = {
        "device": "cpu", "shape": (96, 32, 512), "head": "full", "idle": 0.5, "dtype": "bf16",
        "data": "plaw-2.5", "softcap": 30.0, "temperature": 0.7, "model": None,
    }  # fmt: skip
    return argparse.Namespace(**{**chosen, **changes})


def test_a_share_of_rows_has_no_gradient():
    p = bench.problem(options())
    idle = p.upstream[0] == 0
    assert torch.equal(idle, p.upstream[1] == 0)
    assert 0.3 < float(idle.float().mean()) < 0.7
    again = bench.problem(options())
    assert torch.equal(p.targets, again.targets)
    assert torch.equal(p.upstream[0], again.upstream[0])


@pytest.mark.parametrize("head", bench.HEADS)
@pytest.mark.parametrize("name", bench.SUBJECTS)
def test_every_subject_is_checked_against_float64(name, head):
    if name == "trl":
        pytest.importorskip("trl")
    found = bench.check(name, options(head=head))
    assert found["error"] < 0.1
    # trl's logits are rounded
    assert (found["logp_error"] > 1e-4) == (name == "trl")


def test_a_real_models_head(tmp_path, pocket_nano):
    torch.manual_seed(0)
    vocabulary = len(pocket_nano.tokenizer)
    model = transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(
            vocab_size=vocabulary, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=1, head_dim=16, final_logit_softcapping=7.0,
        )
    )  # fmt: skip
    model.save_pretrained(tmp_path)
    pocket_nano.tokenizer.save_pretrained(tmp_path)
    p = bench.problem(options(model=tmp_path, shape=(600, 0, 0), dtype="fp32"))
    assert p.e.shape == (600, 32)
    assert p.c.shape == (vocabulary, 32)
    assert p.softcap == 7.0
    assert (
        bench.check("exact", options(model=tmp_path, shape=(600, 0, 0), dtype="fp32"))["error"]
        < 1e-3
    )
